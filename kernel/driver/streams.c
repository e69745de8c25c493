// SPDX-License-Identifier: GPL-2.0
/* v3: the feature by which a user opts in, and the ioctls on the fds. See docs/vfio_v3.h. */
#include <linux/file.h>
#include <linux/uaccess.h>

#include "sample.h"

static int sample_set_streams(struct sample_device *dev,
			      const struct vfio_device_feature_mig_streams *streams)
{
	u32 flags = dev->params.blocks ? VFIO_MIG_STREAMS_BLOCKS : 0;

	lockdep_assert_held(&dev->state_mutex);
	if (dev->session)
		return -EBUSY;
	if (streams->dirty_streams > dev->params.streams || streams->flags & ~flags)
		return -EINVAL;
	if (streams->flags & VFIO_MIG_STREAMS_BLOCKS && streams->dirty_streams != 1)
		return -EINVAL;
	dev->dirty_streams = streams->dirty_streams;
	dev->by_block = streams->flags & VFIO_MIG_STREAMS_BLOCKS;
	return 0;
}

/* VFIO_DEVICE_FEATURE_MIG_STREAMS */
int sample_device_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t argsz)
{
	struct sample_device *dev = to_sample(vdev);
	struct vfio_device_feature_mig_streams streams = {
		.dirty_streams = dev->params.streams,
		.flags = dev->params.blocks ? VFIO_MIG_STREAMS_BLOCKS : 0,
	};
	int ret;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != VFIO_DEVICE_FEATURE_MIG_STREAMS ||
	    !dev->params.streams)
		return -ENOTTY;
	ret = vfio_check_feature(flags, argsz, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET,
				 sizeof(streams));
	if (ret != 1)
		return ret;
	if (flags & VFIO_DEVICE_FEATURE_GET)
		return copy_to_user(arg, &streams, sizeof(streams)) ? -EFAULT : 0;
	if (copy_from_user(&streams, arg, sizeof(streams)))
		return -EFAULT;
	mutex_lock(&dev->state_mutex);
	ret = sample_set_streams(dev, &streams);
	sample_log(dev, "streams dirty=%u flags=%u -> %d", streams.dirty_streams, streams.flags,
		   ret);
	mutex_unlock(&dev->state_mutex);
	return ret;
}

/* The file of a dirty stream, with a reference: made once, and kept until the session is over. */
static struct file *sample_get_file(struct sample_session *session, u32 index)
{
	struct sample_device *dev = session->dev;
	struct sample_stream *stream;
	struct file *file;

	lockdep_assert_held(&dev->state_mutex);
	if (READ_ONCE(session->code))
		return ERR_PTR(READ_ONCE(session->code));
	if (index >= session->streams - 1)
		return ERR_PTR(-EINVAL);
	if (sample_fault(dev, "get_stream"))
		return ERR_PTR(-ENOMEM);
	stream = &session->stream[1 + index];
	if (!stream->file) {
		file = sample_stream_file(stream);
		if (IS_ERR(file))
			return file;
		stream->file = file;
	}
	return get_file(stream->file);
}

static long sample_get_stream(struct sample_stream *stream, void __user *arg)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	struct vfio_mig_get_stream get;
	struct file *file;
	int fd;

	if (copy_from_user(&get, arg, sizeof(get)))
		return -EFAULT;
	if (get.argsz < sizeof(get) || get.flags)
		return -EINVAL;
	mutex_lock(&dev->state_mutex);
	file = sample_get_file(session, get.index);
	fd = IS_ERR(file) ? PTR_ERR(file) : get_unused_fd_flags(O_CLOEXEC);
	sample_log(dev, "get_stream index=%u -> %d", get.index, min(fd, 0));
	mutex_unlock(&dev->state_mutex);
	get.fd = fd < 0 ? -1 : fd;
	if (copy_to_user(arg, &get, sizeof(get))) {
		if (fd >= 0)
			put_unused_fd(fd);
		if (!IS_ERR(file))
			fput(file);
		return -EFAULT;
	}
	if (fd < 0) {
		if (!IS_ERR(file))
			fput(file);
		return fd;
	}
	fd_install(fd, file);
	return 0;
}

/* On a dirty fd of which everything is read, it makes the driver save what became dirty. */
static int sample_fill_stream_info(struct sample_stream *stream, struct vfio_mig_stream_info *info)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;

	lockdep_assert_held(&dev->state_mutex);
	if (READ_ONCE(session->code))
		return READ_ONCE(session->code);
	if (!session->saving)
		return -EINVAL;
	if (sample_fault(dev, "stream_info"))
		return -EIO;
	if (stream->index && !session->by_block && dev->state == VFIO_DEVICE_STATE_PRE_COPY &&
	    !sample_pending(stream, false, false))
		sample_plan(stream);
	mutex_lock(&dev->guest_mutex);
	info->epoch = dev->epoch;
	info->pending_bytes = sample_pending(stream, true, false);
	if (!stream->index)
		WRITE_ONCE(stream->reported_epoch, info->epoch);
	mutex_unlock(&dev->guest_mutex);
	return 0;
}

static long sample_stream_info(struct sample_stream *stream, void __user *arg)
{
	struct sample_device *dev = stream->session->dev;
	struct vfio_mig_stream_info info;
	int ret;

	if (copy_from_user(&info, arg, sizeof(info)))
		return -EFAULT;
	if (info.argsz < sizeof(info) || info.flags)
		return -EINVAL;
	info.epoch = 0;
	info.pending_bytes = 0;
	mutex_lock(&dev->state_mutex);
	ret = sample_fill_stream_info(stream, &info);
	sample_log(dev, "stream_info fd=%u epoch=%llu pending=%llu -> %d", stream->index,
		   info.epoch, info.pending_bytes, ret);
	mutex_unlock(&dev->state_mutex);
	if (!ret && copy_to_user(arg, &info, sizeof(info)))
		ret = -EFAULT;
	return ret;
}

/* Of the fds of a session with several streams. */
long sample_stream_ioctl(struct sample_stream *stream, unsigned int cmd, unsigned long arg)
{
	switch (cmd) {
	case VFIO_MIG_GET_STREAM:
		return stream->index ? -ENOTTY : sample_get_stream(stream, (void __user *)arg);
	case VFIO_MIG_GET_STREAM_INFO:
		return sample_stream_info(stream, (void __user *)arg);
	case VFIO_MIG_GET_DIRTY_BLOCKS:
		if (!stream->session->by_block || !stream->index)
			return -ENOTTY;
		return sample_dirty_blocks(stream, (void __user *)arg);
	}
	return -ENOTTY;
}
