// SPDX-License-Identifier: GPL-2.0
/*
 * The state machine: what each arc takes, and what it does to the session. See
 * enum vfio_device_mig_state in include/uapi/linux/vfio.h.
 */
#include <linux/bitmap.h>
#include <linux/err.h>
#include <linux/file.h>

#include "sample.h"

enum sample_action {
	SAMPLE_STAYS,		/* no session, or it stays as it is */
	SAMPLE_STARTS_PRECOPY,
	SAMPLE_PAUSES,		/* nothing is saved any more */
	SAMPLE_CONTINUES,
	SAMPLE_STARTS_STOP_COPY,
	SAMPLE_FINISHES,	/* pre-copy's session goes on to its end */
	SAMPLE_ENDS,
	SAMPLE_STARTS_LOADING,
	SAMPLE_LOADED,
};

#define NO_TIME		0
#define TIME(name)	offsetof(struct sample_params, name)

/* The arcs, with the parameters that say how long each takes. Some are of devices without P2P. */
static const struct sample_arc {
	u8 from;
	u8 to;
	u8 action;
	u16 time[2];
} sample_arcs[] = {
#define ARC(from, to, action, ...)						\
	{ VFIO_DEVICE_STATE_##from, VFIO_DEVICE_STATE_##to, SAMPLE_##action, { __VA_ARGS__ } }
	ARC(RUNNING, RUNNING_P2P, STAYS, TIME(quiesce_us)),
	ARC(RUNNING, PRE_COPY, STARTS_PRECOPY, NO_TIME),
	ARC(RUNNING, STOP, STAYS, TIME(quiesce_us), TIME(stop_us)),
	ARC(RUNNING_P2P, RUNNING, STAYS, TIME(run_us)),
	ARC(RUNNING_P2P, PRE_COPY_P2P, STARTS_PRECOPY, NO_TIME),
	ARC(RUNNING_P2P, STOP, STAYS, TIME(stop_us)),
	ARC(PRE_COPY, PRE_COPY_P2P, PAUSES, TIME(quiesce_us)),
	ARC(PRE_COPY, STOP_COPY, FINISHES, TIME(quiesce_us), TIME(suspend_us)),
	ARC(PRE_COPY, RUNNING, ENDS, NO_TIME),
	ARC(PRE_COPY_P2P, PRE_COPY, CONTINUES, TIME(run_us)),
	ARC(PRE_COPY_P2P, STOP_COPY, FINISHES, TIME(suspend_us)),
	ARC(PRE_COPY_P2P, RUNNING_P2P, ENDS, NO_TIME),
	ARC(STOP, STOP_COPY, STARTS_STOP_COPY, NO_TIME),
	ARC(STOP, RESUMING, STARTS_LOADING, NO_TIME),
	ARC(STOP, RUNNING_P2P, STAYS, TIME(resume_us)),
	ARC(STOP, RUNNING, STAYS, TIME(resume_us), TIME(run_us)),
	ARC(STOP_COPY, STOP, ENDS, NO_TIME),
	ARC(RESUMING, STOP, LOADED, TIME(load_finish_us)),
#undef ARC
};

static const char * const sample_state_names[] = {
	[VFIO_DEVICE_STATE_ERROR] = "ERROR",
	[VFIO_DEVICE_STATE_STOP] = "STOP",
	[VFIO_DEVICE_STATE_RUNNING] = "RUNNING",
	[VFIO_DEVICE_STATE_STOP_COPY] = "STOP_COPY",
	[VFIO_DEVICE_STATE_RESUMING] = "RESUMING",
	[VFIO_DEVICE_STATE_RUNNING_P2P] = "RUNNING_P2P",
	[VFIO_DEVICE_STATE_PRE_COPY] = "PRE_COPY",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "PRE_COPY_P2P",
};

const char *sample_state_name(u32 state)
{
	return state < ARRAY_SIZE(sample_state_names) ? sample_state_names[state] : "?";
}

static bool sample_is_running(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_RUNNING || state == VFIO_DEVICE_STATE_PRE_COPY;
}

static bool sample_is_active(enum vfio_device_mig_state state)
{
	return sample_is_running(state) || state == VFIO_DEVICE_STATE_RUNNING_P2P ||
	       state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

static void sample_enter(struct sample_device *dev, enum vfio_device_mig_state state)
{
	dev->state = state;
	sample_guest_may(dev, sample_is_running(state), sample_is_active(state));
}

/* The state. A stream of v3 that failed took the device to ERROR, whoever noticed it. */
enum vfio_device_mig_state sample_state(struct sample_device *dev)
{
	struct sample_session *session = dev->session;

	lockdep_assert_held(&dev->state_mutex);
	if (session && session->multi && READ_ONCE(session->failed) &&
	    dev->state != VFIO_DEVICE_STATE_ERROR)
		sample_enter(dev, VFIO_DEVICE_STATE_ERROR);
	return dev->state;
}

/* The core keeps this opt-in to itself, so the log tells of it before the next call. */
void sample_note_info_v2(struct sample_device *dev)
{
	lockdep_assert_held(&dev->state_mutex);
	if (!dev->vdev.precopy_info_v2 || dev->info_v2_logged)
		return;
	dev->info_v2_logged = true;
	sample_log(dev, "info_v2 -> 0");
}

/* The end of RESUMING: whether all has arrived. */
static int sample_loaded(struct sample_device *dev)
{
	struct sample_session *session = dev->session;
	int ret;

	sample_session_stop(session, -ENODEV);
	ret = sample_load_check(session);
	sample_session_end(dev);
	if (ret)
		sample_enter(dev, VFIO_DEVICE_STATE_ERROR);
	return ret;
}

static struct file *sample_act(struct sample_device *dev, enum sample_action action, bool suspended)
{
	struct file *file = NULL;

	switch (action) {
	case SAMPLE_STAYS:
	case SAMPLE_PAUSES:	/* was done before the device was quiesced */
		break;
	case SAMPLE_STARTS_PRECOPY:
	case SAMPLE_STARTS_STOP_COPY:
		file = sample_session_start(dev, true, suspended,
					    action == SAMPLE_STARTS_STOP_COPY);
		if (!IS_ERR(file))
			sample_plan_all(dev->session);
		break;
	case SAMPLE_CONTINUES:
		WRITE_ONCE(dev->session->suspended, false);
		sample_session_wake(dev->session);
		break;
	case SAMPLE_FINISHES:
		if (READ_ONCE(dev->session->code))
			return ERR_PTR(dev->session->code);
		dev->session->final = true;
		dev->session->suspended = false;
		sample_plan_all(dev->session);
		break;
	case SAMPLE_ENDS:
		sample_session_end(dev);
		break;
	case SAMPLE_STARTS_LOADING:
		file = sample_session_start(dev, false, false, false);
		break;
	case SAMPLE_LOADED:
		return ERR_PTR(sample_loaded(dev));
	}
	return file;
}

static struct file *sample_step(struct sample_device *dev, enum vfio_device_mig_state to)
{
	enum vfio_device_mig_state from = dev->state;
	const struct sample_arc *arc = NULL;
	struct file *file;
	size_t i;
	u64 us = 0;

	for (i = 0; i < ARRAY_SIZE(sample_arcs); i++)
		if (sample_arcs[i].from == from && sample_arcs[i].to == to)
			arc = &sample_arcs[i];
	if (WARN_ON(!arc))
		return ERR_PTR(-EINVAL);
	if (arc->action == SAMPLE_PAUSES || arc->action == SAMPLE_FINISHES) {
		WRITE_ONCE(dev->session->suspended, true);
		sample_settle(dev->session);
	}
	for (i = 0; i < ARRAY_SIZE(arc->time); i++)
		if (arc->time[i])
			us += READ_ONCE(*(u32 *)((void *)&dev->params + arc->time[i]));
	sample_sleep_us(us);
	if (sample_fault(dev, "arc")) {
		if (dev->session)
			sample_session_fail(dev->session);
		sample_enter(dev, VFIO_DEVICE_STATE_ERROR);
		return ERR_PTR(-EIO);
	}
	if (!sample_is_running(to))	/* before what it left is looked at */
		sample_guest_may(dev, false, sample_is_active(to));
	file = sample_act(dev, arc->action, to == VFIO_DEVICE_STATE_PRE_COPY_P2P);
	if (!IS_ERR(file))
		sample_enter(dev, to);
	return file;
}

static struct file *sample_set_state(struct vfio_device *vdev, enum vfio_device_mig_state to)
{
	struct sample_device *dev = to_sample(vdev);
	enum vfio_device_mig_state from, next;
	struct file *file = NULL;
	int ret = 0;

	mutex_lock(&dev->state_mutex);
	sample_note_info_v2(dev);
	from = sample_state(dev);
	/* vfio_mig_get_next_state() warns of a device that is in ERROR: only a reset helps */
	if (from == VFIO_DEVICE_STATE_ERROR)
		ret = dev->dirty_streams ? -EIO : -EINVAL;
	else if (sample_fault(dev, "set_state"))
		ret = -EIO;
	while (!ret && dev->state != to) {
		ret = vfio_mig_get_next_state(vdev, dev->state, to, &next);
		if (ret)
			break;
		file = sample_step(dev, next);
		if (IS_ERR(file)) {
			ret = PTR_ERR(file);
		} else if (WARN_ON(file && next != to)) {
			fput(file);
			file = NULL;
		}
	}
	sample_log(dev, "set_state %s->%s fd=%d -> %d", sample_state_name(from),
		   sample_state_name(to), !ret && file, ret);
	mutex_unlock(&dev->state_mutex);
	return ret ? ERR_PTR(ret) : file;
}

static int sample_get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct sample_device *dev = to_sample(vdev);

	mutex_lock(&dev->state_mutex);
	*state = sample_state(dev);
	mutex_unlock(&dev->state_mutex);
	return 0;
}

static int sample_data_size(struct vfio_device *vdev, unsigned long *stop_copy_length)
{
	struct sample_device *dev = to_sample(vdev);
	u32 kind = READ_ONCE(dev->params.data_size);
	struct sample_session *session;
	int ret = 0;
	u64 bytes;
	u32 i;

	mutex_lock(&dev->state_mutex);
	sample_note_info_v2(dev);
	session = dev->session;
	bytes = sample_image_bytes(dev);
	if (session && session->saving && kind == 1)
		for (bytes = 0, i = 0; i < session->streams; i++)
			bytes += sample_pending(&session->stream[i], true, true);
	if (!kind)
		ret = -EOPNOTSUPP;
	else if (sample_fault(dev, "mig_data_size"))
		ret = -EIO;
	if (ret)
		bytes = 0;
	sample_log(dev, "mig_data_size stop_copy_length=%llu -> %d", bytes, ret);
	mutex_unlock(&dev->state_mutex);
	*stop_copy_length = bytes;
	return ret;
}

const struct vfio_migration_ops sample_migration_ops = {
	.migration_set_state = sample_set_state,
	.migration_get_state = sample_get_state,
	.migration_get_data_size = sample_data_size,
};

/* VFIO_DEVICE_RESET, and what the last close does. It keeps the device's memory. */
void sample_reset(struct sample_device *dev, const char *why)
{
	mutex_lock(&dev->guest_mutex);
	if (dev->session) {	/* wake whoever waits, before who holds the mutex is waited for */
		xchg(&dev->session->code, -ENODEV);
		sample_session_wake(dev->session);
	}
	mutex_unlock(&dev->guest_mutex);
	mutex_lock(&dev->state_mutex);
	sample_session_end(dev);
	dev->dirty_streams = 0;
	dev->by_block = false;
	sample_enter(dev, VFIO_DEVICE_STATE_RUNNING);
	sample_log(dev, "%s -> 0", why);
	mutex_unlock(&dev->state_mutex);
}

/* DMA logging: the device does no DMA, so its log is empty. The core leaves the order to us. */
static int sample_dma_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes,
				u64 *page_size)
{
	struct sample_device *dev = to_sample(vdev);
	int ret = 0;

	mutex_lock(&dev->state_mutex);
	if (dev->dma_logging)
		ret = -EINVAL;
	else
		dev->dma_logging = true;
	sample_log(dev, "dma_logging_start ranges=%u page_size=%llu -> %d", nnodes, *page_size,
		   ret);
	mutex_unlock(&dev->state_mutex);
	return ret;
}

static int sample_dma_log_stop(struct vfio_device *vdev)
{
	struct sample_device *dev = to_sample(vdev);

	mutex_lock(&dev->state_mutex);
	dev->dma_logging = false;
	sample_log(dev, "dma_logging_stop -> 0");
	mutex_unlock(&dev->state_mutex);
	return 0;
}

static int sample_dma_log_read(struct vfio_device *vdev, unsigned long iova, unsigned long length,
			       struct iova_bitmap *dirty)
{
	struct sample_device *dev = to_sample(vdev);
	int ret;

	mutex_lock(&dev->state_mutex);
	ret = dev->dma_logging ? 0 : -EINVAL;
	sample_log(dev, "dma_logging_report iova=%lu length=%lu -> %d", iova, length, ret);
	mutex_unlock(&dev->state_mutex);
	return ret;
}

const struct vfio_log_ops sample_dma_log_ops = {
	.log_start = sample_dma_log_start,
	.log_stop = sample_dma_log_stop,
	.log_read_and_clear = sample_dma_log_read,
};
