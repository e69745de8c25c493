// SPDX-License-Identifier: GPL-2.0
/*
 * The fd of addressable blocks: pread() saves blocks by number, write() loads a
 * whole record, in any order and by any number of threads. Of two versions of a
 * block the newer one wins.
 */
#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "sample.h"

#define SAMPLE_HEAD_BYTES							\
	(sizeof(struct vfio_mig_record) + sizeof(struct vfio_mig_record_blocks))

static_assert(SAMPLE_HEAD_BYTES == VFIO_MIG_BLOCKS_HEAD_BYTES);

/* The end of the stream, as it is read and written. */
struct sample_blocks_end {
	struct vfio_mig_record record;
	struct vfio_mig_record_end end;
};

static_assert(sizeof(struct sample_blocks_end) == VFIO_MIG_BLOCKS_END_BYTES);

struct sample_blocks_head {
	struct vfio_mig_record record;
	struct vfio_mig_record_blocks blocks;
};

static u64 sample_versions_digest(const u64 *version, u64 blocks)
{
	u64 digest = 0;
	__le64 number;
	u64 i;

	for (i = 0; i < blocks; i++) {
		number = cpu_to_le64(READ_ONCE(version[i]));
		digest = sample_digest(digest, &number, sizeof(number));
	}
	return digest;
}

static u64 sample_unread_blocks(struct sample_session *session)
{
	struct sample_device *dev = session->dev;
	u64 count = 0;
	u64 block;

	for (block = 0; block < dev->blocks; block++)
		count += READ_ONCE(session->version[block]) != READ_ONCE(dev->version[block]);
	return count;
}

/* Bytes of the blocks that were not read as they are now, in records of chunk_kib. */
u64 sample_blocks_pending(struct sample_session *session)
{
	struct sample_device *dev = session->dev;
	u64 each = sizeof(__le64) + dev->block_bytes;
	u64 chunk = (u64)READ_ONCE(dev->params.chunk_kib) << 10;
	u64 in_record = max_t(u64, 1, div64_u64(chunk, each));
	u64 blocks = sample_unread_blocks(session);

	return blocks * each + DIV64_U64_ROUND_UP(blocks, in_record) * SAMPLE_HEAD_BYTES;
}

/* --- GET_DIRTY_BLOCKS ------------------------------------------------------------------- */

/* Move what is dirty into the bitmap. */
static int sample_take_dirty(struct sample_stream *stream, u8 *bitmap)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	int ret = READ_ONCE(session->code);
	u64 block;

	lockdep_assert_held(&dev->state_mutex);
	if (ret)
		return ret;
	if (sample_fault(dev, "dirty_blocks"))
		return -EIO;
	for (block = 0; block < dev->blocks; block++)
		if (test_and_clear_bit(block, dev->dirty))
			bitmap[block / BITS_PER_BYTE] |= 1 << block % BITS_PER_BYTE;
	return 0;
}

/* Bits are only set in the user's bitmap. */
static int sample_give_bitmap(u8 __user *to, const u8 *bitmap, u64 bytes)
{
	u64 i;
	u8 byte;

	for (i = 0; i < bytes; i++) {
		if (!bitmap[i])
			continue;
		if (get_user(byte, to + i) || put_user((u8)(byte | bitmap[i]), to + i))
			return -EFAULT;
	}
	return 0;
}

long sample_dirty_blocks(struct sample_stream *stream, void __user *arg)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 bytes = DIV_ROUND_UP_ULL(dev->blocks, BITS_PER_BYTE);
	struct vfio_mig_dirty_blocks dirty;
	u8 *bitmap = NULL;
	bool room;
	int ret;

	if (!session->saving)
		return -EBADF;
	if (copy_from_user(&dirty, arg, sizeof(dirty)))
		return -EFAULT;
	if (dirty.argsz < sizeof(dirty) || dirty.flags)
		return -EINVAL;
	room = dirty.blocks >= dev->blocks;
	dirty.blocks = dev->blocks;
	dirty.block_bytes = dev->block_bytes;
	if (room) {
		bitmap = kvzalloc(bytes, GFP_KERNEL_ACCOUNT);
		if (!bitmap)
			return -ENOMEM;
	}
	mutex_lock(&dev->state_mutex);
	ret = READ_ONCE(session->code);
	if (!ret)
		ret = room ? sample_take_dirty(stream, bitmap) : -EINVAL;
	sample_log(dev, "dirty_blocks blocks=%llu -> %d", dev->blocks, ret);
	mutex_unlock(&dev->state_mutex);
	if ((!ret || ret == -EINVAL) && copy_to_user(arg, &dirty, sizeof(dirty)))
		ret = -EFAULT;
	if (!ret)
		ret = sample_give_bitmap(u64_to_user_ptr(dirty.bitmap), bitmap, bytes);
	kvfree(bitmap);
	return ret;
}

/* --- pread() and read() ----------------------------------------------------------------- */

/* A command may start, unless the device is suspended. Whoever suspends it waits for it. */
static bool sample_begin_save(struct sample_stream *stream)
{
	bool begins;

	spin_lock(&stream->queue_lock);
	begins = !READ_ONCE(stream->session->suspended);
	stream->block_saves += begins;
	spin_unlock(&stream->queue_lock);
	return begins;
}

static void sample_end_save(struct sample_stream *stream)
{
	spin_lock(&stream->queue_lock);
	stream->block_saves--;
	spin_unlock(&stream->queue_lock);
	wake_up_all(&stream->session->idle);
}

static bool sample_may_save_blocks(struct sample_session *session)
{
	return READ_ONCE(session->code) || !READ_ONCE(session->suspended);
}

static int sample_wait_to_save(struct sample_stream *stream, bool nonblock)
{
	struct sample_session *session = stream->session;

	while (!sample_begin_save(stream)) {
		if (READ_ONCE(session->code))
			return READ_ONCE(session->code);
		if (nonblock)
			return -EAGAIN;
		if (wait_event_interruptible(stream->wait, sample_may_save_blocks(session)))
			return -ERESTARTSYS;
	}
	return 0;
}

static int sample_save_command(struct sample_stream *stream, u64 bytes)
{
	struct sample_device *dev = stream->session->dev;
	bool over_command = READ_ONCE(dev->params.lock_over) == SAMPLE_OVER_COMMAND;
	int ret;

	if (over_command)
		sample_lock(stream);
	if (sample_fault(dev, "save")) {
		sample_session_fail(stream->session);
		ret = -EIO;
	} else {
		ret = sample_command(stream, bytes, READ_ONCE(dev->params.save_mib_s), 0);
	}
	if (over_command)
		sample_unlock(stream);
	return ret;
}

/* Header, versions, blocks. The versions first: a block that changes meanwhile gets a newer one. */
static int sample_copy_blocks_out(struct sample_stream *stream, char __user *buf, u64 first,
				  __le64 *version, u64 count, u64 epoch)
{
	struct sample_device *dev = stream->session->dev;
	struct sample_blocks_head head = {
		.record.record_class = cpu_to_le16(VFIO_MIG_RECORD_BLOCKS),
		.record.stream = cpu_to_le16(stream->index),
		.record.epoch = cpu_to_le64(epoch),
		.record.length = cpu_to_le64(sizeof(head.blocks) +
					     count * (sizeof(__le64) + dev->block_bytes)),
		.blocks.first_block = cpu_to_le64(first),
		.blocks.blocks = cpu_to_le64(count),
	};
	u64 i;

	spin_lock(&stream->queue_lock);
	head.record.sequence = cpu_to_le64(stream->records);
	stream->records++;
	spin_unlock(&stream->queue_lock);
	for (i = 0; i < count; i++)
		version[i] = cpu_to_le64(READ_ONCE(dev->version[first + i]));
	smp_rmb();	/* the versions, then the data: see sample_mark_dirty() */
	if (copy_to_user(buf, &head, sizeof(head)) ||
	    copy_to_user(buf + sizeof(head), version, count * sizeof(*version)) ||
	    copy_to_user(buf + sizeof(head) + count * sizeof(*version),
			 dev->data + first * dev->block_bytes, count * dev->block_bytes))
		return -EFAULT;
	return 0;
}

/* The user has these versions now, unless an epoch that began meanwhile made them invalid. */
static void sample_were_read(struct sample_session *session, u64 first, const __le64 *version,
			     u64 count, u64 epoch)
{
	u64 i;

	mutex_lock(&session->dev->guest_mutex);
	for (i = 0; i < count; i++)
		if (session->valid_from[first + i] <= epoch)
			session->version[first + i] = max(session->version[first + i],
							  le64_to_cpu(version[i]));
	mutex_unlock(&session->dev->guest_mutex);
}

static int sample_save_some(struct sample_stream *stream, char __user *buf, u64 first,
			    __le64 *version, u64 count, u64 bytes)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	ktime_t start;
	u64 epoch, i;
	int ret;

	ret = READ_ONCE(session->code) ?: sample_save_command(stream, bytes);
	if (ret)
		return ret;
	for (i = 0; i < count; i++)
		set_bit(first + i, session->returned);
	smp_mb();	/* what is returned, then the epoch: see sample_invalidate() */
	epoch = READ_ONCE(dev->epoch);
	sample_lock(stream);
	start = ktime_get();
	ret = sample_copy_blocks_out(stream, buf, first, version, count, epoch);
	atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), start)), &stream->counters->copy_ns);
	sample_unlock(stream);
	if (!ret)
		sample_were_read(session, first, version, count, epoch);
	return ret;
}

static ssize_t sample_pread(struct sample_stream *stream, char __user *buf, size_t size, u64 offset,
			    bool nonblock)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 each = sizeof(__le64) + dev->block_bytes;
	u64 first, count, rest, unaligned;
	__le64 *version;
	int ret;

	if (READ_ONCE(session->code))
		return READ_ONCE(session->code);
	if (size < SAMPLE_HEAD_BYTES + each)
		return -EINVAL;
	count = div64_u64_rem(size - SAMPLE_HEAD_BYTES, each, &rest);
	first = div64_u64_rem(offset, dev->block_bytes, &unaligned);
	if (rest || unaligned || first >= dev->blocks || count > dev->blocks - first)
		return -EINVAL;
	version = kvmalloc_array(count, sizeof(*version), GFP_KERNEL_ACCOUNT);
	if (!version)
		return -ENOMEM;
	atomic_inc(&session->block_reads);
	ret = sample_wait_to_save(stream, nonblock);
	if (!ret) {
		down_read(&session->gate);
		ret = sample_save_some(stream, buf, first, version, count, size);
		up_read(&session->gate);
		sample_end_save(stream);
	}
	atomic_dec(&session->block_reads);
	kvfree(version);
	return ret ?: size;
}

static ssize_t sample_read_end(struct sample_stream *stream, char __user *buf, size_t size)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	struct sample_blocks_end end = {
		.record.record_class = cpu_to_le16(VFIO_MIG_RECORD_END),
		.record.stream = cpu_to_le16(stream->index),
		.record.length = cpu_to_le64(sizeof(end.end)),
		.end.records = cpu_to_le64(dev->blocks),
	};

	if (READ_ONCE(session->code))
		return READ_ONCE(session->code);
	if (!session->final || atomic_read(&session->block_reads) || sample_unread_blocks(session))
		return -ENOMSG;
	if (stream->end_saved)
		return 0;
	if (size < sizeof(end))
		return -EINVAL;
	end.record.epoch = cpu_to_le64(READ_ONCE(dev->epoch));
	end.record.sequence = cpu_to_le64(stream->records);
	end.end.digest = cpu_to_le64(sample_versions_digest(dev->version, dev->blocks));
	if (copy_to_user(buf, &end, sizeof(end)))
		return -EFAULT;
	stream->end_saved = true;
	return sizeof(end);
}

static ssize_t sample_save_blocks_read(struct file *file, char __user *buf, size_t size,
				       loff_t *pos)
{
	struct sample_stream *stream = file->private_data;
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	ssize_t ret;

	if (sample_fault(dev, "read")) {
		ret = -EIO;
	} else if (pos) {
		ret = sample_pread(stream, buf, size, *pos, file->f_flags & O_NONBLOCK);
	} else {
		down_read(&session->gate);
		sample_lock(stream);
		ret = sample_read_end(stream, buf, size);
		sample_unlock(stream);
		up_read(&session->gate);
	}
	atomic64_inc(&stream->counters->reads);
	if (ret > 0)
		atomic64_add(ret, &stream->counters->read_bytes);
	if (pos)
		sample_log(dev, "pread fd=%u offset=%lld size=%zu -> %zd", stream->index, *pos,
			   size, ret);
	else
		sample_log(dev, "read fd=%u size=%zu -> %zd", stream->index, size, ret);
	return ret;
}

static __poll_t sample_save_blocks_poll(struct file *file, poll_table *wait)
{
	struct sample_stream *stream = file->private_data;
	int code;

	poll_wait(file, &stream->wait, wait);
	code = READ_ONCE(stream->session->code);
	if (code)
		return EPOLLIN | EPOLLRDNORM | EPOLLHUP | (code == -EIO ? EPOLLERR : 0);
	return EPOLLIN | EPOLLRDNORM;	/* blocks can be read at any time */
}

static long sample_blocks_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return sample_stream_ioctl(file->private_data, cmd, arg);
}

const struct file_operations sample_save_blocks_fops = {
	.owner = THIS_MODULE,
	.read = sample_save_blocks_read,
	.poll = sample_save_blocks_poll,
	.unlocked_ioctl = sample_blocks_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = sample_stream_release,
};

/* --- write() ---------------------------------------------------------------------------- */

static void sample_load_block(struct sample_session *session, u64 block, u64 version, u64 epoch,
			      const void *data)
{
	struct sample_device *dev = session->dev;
	struct mutex *lock = &session->block_lock[block % SAMPLE_BLOCK_LOCKS];

	mutex_lock(lock);
	if (epoch >= session->valid_from[block] && version >= session->version[block]) {
		memcpy(dev->data + block * dev->block_bytes, data, dev->block_bytes);
		session->version[block] = version;
		WRITE_ONCE(dev->version[block], version);
	}
	mutex_unlock(lock);
}

/* The blocks of a record that was checked. One at a time, so memory for one is enough. */
static int sample_load_blocks(struct sample_stream *stream, const struct sample_blocks_head *head,
			      const char __user *buf, void *data)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 first = le64_to_cpu(head->blocks.first_block);
	u64 count = le64_to_cpu(head->blocks.blocks);
	const __le64 __user *versions = (void __user *)(buf + sizeof(*head));
	const char __user *from = (void __user *)(versions + count);
	__le64 version;
	u64 i;

	for (i = 0; i < count; i++, from += dev->block_bytes) {
		if (copy_from_user(&version, versions + i, sizeof(version)) ||
		    copy_from_user(data, from, dev->block_bytes))
			return -EFAULT;
		sample_load_block(session, first + i, le64_to_cpu(version),
				  le64_to_cpu(head->record.epoch), data);
	}
	return 0;
}

static int sample_check_blocks_head(struct sample_device *dev,
				    const struct sample_blocks_head *head)
{
	u64 first = le64_to_cpu(head->blocks.first_block);
	u64 count = le64_to_cpu(head->blocks.blocks);

	if (count > dev->blocks)
		return -E2BIG;
	if (first >= dev->blocks || count > dev->blocks - first || head->record.flags)
		return -EPROTO;
	if (le64_to_cpu(head->record.length) != sizeof(head->blocks) +
						count * (sizeof(__le64) + dev->block_bytes))
		return -EPROTO;
	return 0;
}

static int sample_wait_for_blocks_epoch(struct sample_stream *stream, u64 epoch, bool nonblock)
{
	struct sample_session *session = stream->session;

	if (!sample_epoch_is_decided(session, epoch)) {
		if (nonblock)
			return -EAGAIN;
		if (wait_event_interruptible(stream->wait,
					     sample_epoch_is_decided(session, epoch)))
			return -ERESTARTSYS;
	}
	return READ_ONCE(session->code);
}

static ssize_t sample_write_blocks_record(struct sample_stream *stream,
					  const struct vfio_mig_record *record,
					  const char __user *buf, size_t size, bool nonblock)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	bool over_command = READ_ONCE(dev->params.lock_over) == SAMPLE_OVER_COMMAND;
	struct sample_blocks_head head = { .record = *record };
	void *data;
	int ret;

	if (size < sizeof(head))
		return sample_refuse(stream, record, -EPROTO);
	if (copy_from_user(&head.blocks, buf + sizeof(*record), sizeof(head.blocks)))
		return -EFAULT;
	ret = sample_check_blocks_head(dev, &head);
	if (ret)
		return sample_refuse(stream, &head.record, ret);
	ret = sample_wait_for_blocks_epoch(stream, le64_to_cpu(head.record.epoch), nonblock);
	if (ret)
		return ret;
	if (!sample_epoch_is_loaded(session, le64_to_cpu(head.record.epoch)))
		return sample_refuse(stream, &head.record, -EPROTO);
	data = kvmalloc(dev->block_bytes, GFP_KERNEL_ACCOUNT);
	if (!data)
		return sample_refuse(stream, &head.record, -ENOMEM);
	down_read(&session->gate);
	if (over_command)
		sample_lock(stream);
	ret = READ_ONCE(session->code);
	if (!ret)
		ret = sample_fault(dev, "load") ? -EIO :
		      sample_command(stream, size, READ_ONCE(dev->params.load_mib_s), 0);
	if (!over_command)
		sample_lock(stream);
	if (!ret)
		ret = sample_load_blocks(stream, &head, buf, data);
	sample_unlock(stream);
	up_read(&session->gate);
	kvfree(data);
	if (ret && ret != -EFAULT)
		return sample_refuse(stream, &head.record, ret);
	return ret ?: size;
}

static ssize_t sample_write_blocks_end(struct sample_stream *stream,
				       const struct vfio_mig_record *record, const char __user *buf)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	struct vfio_mig_record_end end;
	bool good;

	if (copy_from_user(&end, buf + sizeof(*record), sizeof(end)))
		return -EFAULT;
	good = le64_to_cpu(end.records) == dev->blocks && !end.bytes &&
	       le64_to_cpu(end.digest) == sample_versions_digest(session->version, dev->blocks);
	if (!good)
		return sample_refuse(stream, record, -EBADMSG);
	down_read(&session->gate);
	stream->epoch = le64_to_cpu(record->epoch);
	WRITE_ONCE(stream->ended, true);
	up_read(&session->gate);
	return sizeof(struct sample_blocks_end);
}

static ssize_t sample_write_record(struct sample_stream *stream, const char __user *buf,
				   size_t size, bool nonblock)
{
	struct vfio_mig_record record = {};
	int ret;

	if (READ_ONCE(stream->session->code))
		return READ_ONCE(stream->session->code);
	if (copy_from_user(&record, buf, min(size, sizeof(record))))
		return -EFAULT;
	if (size < sizeof(record) || READ_ONCE(stream->ended))
		return sample_refuse(stream, &record, -EPROTO);
	ret = sample_check_header(stream, &record);
	if (ret)
		return sample_refuse(stream, &record, ret);
	if (le64_to_cpu(record.length) != size - sizeof(record))
		return sample_refuse(stream, &record, -EPROTO);
	switch (le16_to_cpu(record.record_class)) {
	case VFIO_MIG_RECORD_BLOCKS:
		return sample_write_blocks_record(stream, &record, buf, size, nonblock);
	case VFIO_MIG_RECORD_END:
		if (record.flags || size != sizeof(struct sample_blocks_end))
			break;
		return sample_write_blocks_end(stream, &record, buf);
	}
	return sample_refuse(stream, &record, -EPROTO);
}

static ssize_t sample_load_blocks_write(struct file *file, const char __user *buf, size_t size,
					loff_t *pos)
{
	struct sample_stream *stream = file->private_data;
	struct sample_device *dev = stream->session->dev;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	if (sample_fault(dev, "write"))
		ret = -EIO;
	else
		ret = sample_write_record(stream, buf, size, file->f_flags & O_NONBLOCK);
	atomic64_inc(&stream->counters->writes);
	if (ret > 0)
		atomic64_add(ret, &stream->counters->write_bytes);
	sample_log(dev, "write fd=%u size=%zu -> %zd", stream->index, size, ret);
	return ret;
}

static __poll_t sample_load_blocks_poll(struct file *file, poll_table *wait)
{
	struct sample_stream *stream = file->private_data;
	int code;

	poll_wait(file, &stream->wait, wait);
	code = READ_ONCE(stream->session->code);
	if (code)
		return EPOLLOUT | EPOLLWRNORM | EPOLLHUP | (code == -EIO ? EPOLLERR : 0);
	return EPOLLOUT | EPOLLWRNORM;
}

const struct file_operations sample_load_blocks_fops = {
	.owner = THIS_MODULE,
	.write = sample_load_blocks_write,
	.poll = sample_load_blocks_poll,
	.unlocked_ioctl = sample_blocks_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = sample_stream_release,
};
