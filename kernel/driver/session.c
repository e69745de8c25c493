// SPDX-License-Identifier: GPL-2.0
/*
 * A session: the streams that save or load a device's state, from the arc that
 * returns a data fd to the arc, reset or close that ends it. Its memory lives as
 * long as an fd of it, and keeps the device's.
 */
#include <linux/anon_inodes.h>
#include <linux/bitmap.h>
#include <linux/file.h>
#include <linux/slab.h>

#include "sample.h"

static DEFINE_MUTEX(sample_global_lock);	/* "lock=global" */

static void sample_session_free_arrays(struct sample_session *session)
{
	kvfree(session->planned);
	kvfree(session->returned);
	kvfree(session->valid_from);
	kvfree(session->version);
	kvfree(session->ranges);
}

/* What a session keeps for each block. */
static bool sample_session_alloc_arrays(struct sample_session *session)
{
	u64 blocks = session->dev->blocks;
	bool done = true;

	if (session->saving) {
		session->planned = kvcalloc(BITS_TO_LONGS(blocks), sizeof(long),
					    GFP_KERNEL_ACCOUNT);
		done &= !!session->planned;
	}
	if (session->saving && session->multi) {
		session->returned = kvcalloc(BITS_TO_LONGS(blocks), sizeof(long),
					     GFP_KERNEL_ACCOUNT);
		session->ranges = kvcalloc(SAMPLE_MAX_RANGES, sizeof(*session->ranges),
					   GFP_KERNEL_ACCOUNT);
		done &= session->returned && session->ranges;
	}
	if (session->multi) {
		session->valid_from = kvcalloc(blocks, sizeof(u64), GFP_KERNEL_ACCOUNT);
		done &= !!session->valid_from;
	}
	if (session->by_block) {
		session->version = kvcalloc(blocks, sizeof(u64), GFP_KERNEL_ACCOUNT);
		done &= !!session->version;
	}
	return done;
}

static void sample_session_free(struct kref *kref)
{
	struct sample_session *session = container_of(kref, struct sample_session, kref);
	struct sample_device *dev = session->dev;
	u32 i;

	for (i = 0; i < session->streams; i++) {
		if (session->saving)
			sample_save_free(&session->stream[i]);
		else
			sample_load_free(&session->stream[i]);
		mutex_destroy(&session->stream[i].own_lock);
		mutex_destroy(&session->stream[i].write_mutex);
	}
	for (i = 0; i < SAMPLE_BLOCK_LOCKS; i++)
		mutex_destroy(&session->block_lock[i]);
	sample_session_free_arrays(session);
	kvfree(session);
	vfio_put_device(&dev->vdev);
}

void sample_session_get(struct sample_session *session)
{
	kref_get(&session->kref);
}

void sample_session_put(struct sample_session *session)
{
	kref_put(&session->kref, sample_session_free);
}

void sample_session_wake(struct sample_session *session)
{
	u32 i;

	for (i = 0; i < session->streams; i++)
		wake_up_all(&session->stream[i].wait);
	wake_up_all(&session->idle);
	wake_up_all(&session->dev->engines->wait);
}

/* Something failed on a stream: all streams have. The state follows, see sample_state(). */
void sample_session_fail(struct sample_session *session)
{
	WRITE_ONCE(session->failed, true);
	cmpxchg(&session->code, 0, -EIO);
	sample_session_wake(session);
}

/* All calls return code from now on; when this returns, none touches the device any more. */
void sample_session_stop(struct sample_session *session, int code)
{
	xchg(&session->code, code);
	sample_session_wake(session);
	down_write(&session->gate);
	up_write(&session->gate);
}

/* The session, if there is one, is over. */
void sample_session_end(struct sample_device *dev)
{
	struct sample_session *session = dev->session;
	u32 i;

	lockdep_assert_held(&dev->state_mutex);
	if (!session)
		return;
	sample_session_stop(session, -ENODEV);
	mutex_lock(&dev->guest_mutex);
	dev->session = NULL;
	mutex_unlock(&dev->guest_mutex);
	for (i = 0; i < session->streams; i++)
		if (session->stream[i].file)
			fput(session->stream[i].file);
	sample_session_put(session);
}

static struct mutex *sample_choose_lock(struct sample_device *dev, struct sample_stream *stream)
{
	switch (dev->params.lock) {
	case SAMPLE_LOCK_DEVICE:
		return &dev->device_lock;
	case SAMPLE_LOCK_GLOBAL:
		return &sample_global_lock;
	}
	return &stream->own_lock;
}

static struct sample_session *sample_session_alloc(struct sample_device *dev, bool saving)
{
	u32 streams = 1 + dev->dirty_streams;
	struct sample_session *session;
	u32 i;

	session = kvzalloc(struct_size(session, stream, streams), GFP_KERNEL_ACCOUNT);
	if (!session)
		return NULL;
	session->streams = streams;
	session->saving = saving;
	session->multi = dev->dirty_streams;
	session->by_block = dev->by_block;
	session->dev = dev;
	if (!sample_session_alloc_arrays(session)) {
		sample_session_free_arrays(session);
		kvfree(session);
		return NULL;
	}
	for (i = 0; i < SAMPLE_BLOCK_LOCKS; i++)
		mutex_init(&session->block_lock[i]);
	kref_init(&session->kref);
	init_rwsem(&session->gate);
	init_waitqueue_head(&session->idle);
	get_device(&dev->vdev.device);	/* a stale fd may be the last that knows the device */
	for (i = 0; i < streams; i++) {
		struct sample_stream *stream = &session->stream[i];

		stream->session = session;
		stream->index = i;
		mutex_init(&stream->own_lock);
		mutex_init(&stream->write_mutex);
		init_waitqueue_head(&stream->wait);
		stream->lock = sample_choose_lock(dev, stream);
		stream->counters = &dev->counters[i];
		if (saving)
			sample_save_init(stream);
	}
	return session;
}

/* The file of a stream. It holds the session. */
struct file *sample_stream_file(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	bool by_block = session->by_block && stream->index;
	const struct file_operations *fops;
	struct file *file;

	if (session->saving)
		fops = by_block ? &sample_save_blocks_fops : &sample_save_fops;
	else
		fops = by_block ? &sample_load_blocks_fops : &sample_load_fops;
	file = anon_inode_getfile("[vfio_v3_sample]", fops, stream,
				  session->saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(file))
		return file;
	stream_open(file_inode(file), file);
	if (by_block && session->saving)
		file->f_mode |= FMODE_PREAD;	/* with a position; read() has none */
	sample_session_get(session);
	return file;
}

int sample_stream_release(struct inode *inode, struct file *file)
{
	struct sample_stream *stream = file->private_data;

	sample_log(stream->session->dev, "release fd=%u", stream->index);
	sample_session_put(stream->session);
	return 0;
}

/* A new session, and the file that the arc returns: v2's, or the critical one. */
struct file *sample_session_start(struct sample_device *dev, bool saving, bool suspended,
				  bool final)
{
	struct sample_session *session;
	struct file *file;

	lockdep_assert_held(&dev->state_mutex);
	session = sample_session_alloc(dev, saving);
	if (!session)
		return ERR_PTR(-ENOMEM);
	session->suspended = suspended;
	session->final = final;
	file = sample_stream_file(&session->stream[0]);
	if (IS_ERR(file)) {
		sample_session_put(session);
		return file;
	}
	mutex_lock(&dev->guest_mutex);
	dev->session = session;
	if (saving) {	/* the user has nothing yet */
		WRITE_ONCE(dev->epoch, 1);
		session->stream[0].reported_epoch = 1;
		bitmap_fill(dev->dirty, dev->blocks);
	}
	mutex_unlock(&dev->guest_mutex);
	return file;
}
