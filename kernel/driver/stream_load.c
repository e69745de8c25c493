// SPDX-License-Identifier: GPL-2.0
/*
 * A stream that is loaded: write() collects the bytes of a record and loads it,
 * inside the call, when the last one arrives.
 *
 * What arrives may be anything. Every number is checked as soon as it is there,
 * before what follows it is taken.
 */
#include <linux/ktime.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "sample.h"

#define SAMPLE_HEADER_BYTES	sizeof(struct vfio_mig_record)

static u64 sample_length(struct sample_stream *stream)
{
	return le64_to_cpu(stream->header.length);
}

static bool sample_is(struct sample_stream *stream, u16 record_class)
{
	return le16_to_cpu(stream->header.record_class) == record_class;
}

static bool sample_invalidates(struct sample_stream *stream)
{
	return le32_to_cpu(stream->header.flags) & VFIO_MIG_RECORD_F_INVALIDATES;
}

static bool sample_header_is_whole(struct sample_stream *stream)
{
	return stream->filled >= SAMPLE_HEADER_BYTES;
}

/* --- checks ----------------------------------------------------------------------------- */

static u64 sample_length_limit(struct sample_device *dev)
{
	u64 limit = (u64)READ_ONCE(dev->params.record_limit_kib) << 10;

	return limit ?: sample_longest_record(dev);
}

/* What holds for the records of every fd. */
int sample_check_header(struct sample_stream *stream, const struct vfio_mig_record *record)
{
	u64 loaded = READ_ONCE(stream->session->loaded_epoch);
	u64 epoch = le64_to_cpu(record->epoch);

	if (le16_to_cpu(record->stream) != stream->index)
		return -EXDEV;
	if (!epoch)
		return -EPROTO;
	if (loaded && epoch > loaded && epoch - loaded > VFIO_MIG_MAX_EPOCHS_AHEAD)
		return -E2BIG;
	return 0;
}

/* The header has arrived: is it the next one of this stream? */
static int sample_check_stream_header(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	const struct vfio_mig_record *record = &stream->header;
	u64 sequence = le64_to_cpu(record->sequence);
	u32 flags = le32_to_cpu(record->flags);
	u64 length = sample_length(stream);
	int ret;

	ret = sample_check_header(stream, record);
	if (ret)
		return ret;
	if (sequence != stream->records)
		return sequence < stream->records ? -EALREADY : -EILSEQ;
	if (le64_to_cpu(record->epoch) < stream->epoch &&	/* overtaken: see reinit=priority */
	    (session->multi || !sample_is(stream, VFIO_MIG_RECORD_DIRTY)))
		return -EPROTO;
	if (length > sample_length_limit(dev))
		return -E2BIG;
	switch (le16_to_cpu(record->record_class)) {
	case VFIO_MIG_RECORD_CRITICAL:
		if (flags & ~(VFIO_MIG_RECORD_F_EPOCH_COMPLETE | VFIO_MIG_RECORD_F_INVALIDATES) ||
		    stream->index || (sample_invalidates(stream) && !session->multi))
			return -EPROTO;
		if (sample_invalidates(stream) ?
		    length < sizeof(struct vfio_mig_record_ranges) + dev->critical_bytes :
		    length != dev->critical_bytes)
			return -EPROTO;
		break;
	case VFIO_MIG_RECORD_DIRTY:
		if (flags || (session->multi && !stream->index) ||
		    length < sizeof(struct sample_dirty))
			return -EPROTO;
		break;
	case VFIO_MIG_RECORD_END:
		if (flags || length != sizeof(struct vfio_mig_record_end))
			return -EPROTO;
		break;
	default:
		return -EPROTO;
	}
	stream->payload = kvmalloc(length, GFP_KERNEL_ACCOUNT);
	return stream->payload ? 0 : -ENOMEM;
}

/* How many numbers of blocks, or ranges, the payload begins with. */
static u64 sample_count(struct sample_stream *stream)
{
	return le64_to_cpu(*(__le64 *)stream->payload);
}

static bool sample_has_count(struct sample_stream *stream)
{
	return sample_is(stream, VFIO_MIG_RECORD_DIRTY) || sample_invalidates(stream);
}

/* Bytes of the payload up to the end of what the count counts. */
static u64 sample_list_bytes(struct sample_stream *stream)
{
	u64 each = sample_is(stream, VFIO_MIG_RECORD_DIRTY) ? sizeof(__le64) :
							      sizeof(struct vfio_mig_block_range);

	return sizeof(__le64) + sample_count(stream) * each;
}

static int sample_check_count(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	u64 follows = dev->critical_bytes;

	if (sample_count(stream) > dev->blocks)
		return -E2BIG;
	if (sample_is(stream, VFIO_MIG_RECORD_DIRTY))
		follows = sample_count(stream) * dev->block_bytes;
	return sample_length(stream) == sample_list_bytes(stream) + follows ? 0 : -EPROTO;
}

static int sample_check_blocks(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	const struct sample_dirty *dirty = stream->payload;
	u64 streams = session->multi ? session->streams - 1 : 1;
	u64 home = session->multi ? stream->index - 1 : 0;
	u64 i;

	for (i = 0; i < sample_count(stream); i++) {
		u64 block = le64_to_cpu(dirty->block[i]);
		u64 remainder;

		div64_u64_rem(block, streams, &remainder);
		if (block >= session->dev->blocks || remainder != home)
			return -EPROTO;
	}
	return 0;
}

static int sample_check_ranges(struct sample_stream *stream)
{
	const struct vfio_mig_block_range *range = stream->payload +
						   sizeof(struct vfio_mig_record_ranges);
	u64 most = stream->session->dev->blocks;
	u64 i;

	for (i = 0; i < sample_count(stream); i++, range++) {
		u64 first = le64_to_cpu(range->first_block);
		u64 epoch = le64_to_cpu(range->epoch);

		if (first >= most || le64_to_cpu(range->blocks) > most - first || !epoch ||
		    epoch > le64_to_cpu(stream->header.epoch))
			return -EPROTO;
	}
	return 0;
}

static int sample_check_list(struct sample_stream *stream)
{
	return sample_is(stream, VFIO_MIG_RECORD_DIRTY) ? sample_check_blocks(stream) :
							  sample_check_ranges(stream);
}

/* The epoch that the payload of this record has to wait for; 0: none. */
static u64 sample_needed_epoch(struct sample_stream *stream)
{
	if (!stream->session->multi || !sample_is(stream, VFIO_MIG_RECORD_DIRTY))
		return 0;
	return le64_to_cpu(stream->header.epoch);
}

/* --- a record is loaded ----------------------------------------------------------------- */

/* Dirty data of these blocks is void if it is of an earlier epoch: whether it came or not. */
static void sample_apply_range(struct sample_session *session,
			       const struct vfio_mig_block_range *range)
{
	u64 first = le64_to_cpu(range->first_block);
	u64 end = first + le64_to_cpu(range->blocks);
	u64 epoch = le64_to_cpu(range->epoch);
	u64 block;

	for (block = first; block < end; block++) {
		struct mutex *lock = &session->block_lock[block % SAMPLE_BLOCK_LOCKS];

		mutex_lock(lock);
		WRITE_ONCE(session->valid_from[block], max(session->valid_from[block], epoch));
		if (session->by_block)
			session->version[block] = 0;
		mutex_unlock(lock);
	}
}

static void sample_load_critical(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 epoch = le64_to_cpu(stream->header.epoch);
	const u8 *from = stream->payload;
	u64 i;

	if (sample_invalidates(stream)) {
		const struct vfio_mig_block_range *range =
			stream->payload + sizeof(struct vfio_mig_record_ranges);

		for (i = 0; i < sample_count(stream); i++)
			sample_apply_range(session, range + i);
		from += sample_list_bytes(stream);
	}
	mutex_lock(&dev->guest_mutex);
	memcpy(dev->critical, from, dev->critical_bytes);
	WRITE_ONCE(dev->epoch, epoch);
	mutex_unlock(&dev->guest_mutex);
	if (le32_to_cpu(stream->header.flags) & VFIO_MIG_RECORD_F_EPOCH_COMPLETE)
		WRITE_ONCE(session->loaded_epoch, epoch);
}

/*
 * A block has one home, and records of a stream come one after the other: what
 * was valid when it was looked at cannot overtake what makes it invalid later.
 */
static void sample_load_dirty(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	const struct sample_dirty *dirty = stream->payload;
	u64 epoch = le64_to_cpu(stream->header.epoch);
	const u8 *from = stream->payload + sample_list_bytes(stream);
	u64 i;

	for (i = 0; i < sample_count(stream); i++) {
		u64 block = le64_to_cpu(dirty->block[i]);

		if (!session->valid_from || epoch >= READ_ONCE(session->valid_from[block]))
			memcpy(dev->data + block * dev->block_bytes, from, dev->block_bytes);
		from += dev->block_bytes;
	}
}

static int sample_load_end(struct sample_stream *stream)
{
	const struct vfio_mig_record_end *end = stream->payload;

	if (le64_to_cpu(end->records) != stream->records ||
	    le64_to_cpu(end->bytes) != stream->bytes ||
	    le64_to_cpu(end->digest) != stream->digest)
		return -EBADMSG;
	WRITE_ONCE(stream->ended, true);
	return 0;
}

/* The record is whole: the firmware loads it. */
static int sample_load_record(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 length = sample_length(stream);
	u32 setup_us = 0;
	int ret = 0;

	if (sample_is(stream, VFIO_MIG_RECORD_CRITICAL))
		setup_us = READ_ONCE(dev->params.critical_setup_us);
	if (!sample_is(stream, VFIO_MIG_RECORD_END)) {
		ret = sample_fault(dev, "load") ? -EIO :
		      sample_command(stream, length, READ_ONCE(dev->params.load_mib_s), setup_us);
		if (ret)
			return ret;
	}
	stream->epoch = max(stream->epoch, le64_to_cpu(stream->header.epoch));
	if (sample_is(stream, VFIO_MIG_RECORD_CRITICAL))
		sample_load_critical(stream);
	else if (sample_is(stream, VFIO_MIG_RECORD_DIRTY))
		sample_load_dirty(stream);
	else
		ret = sample_load_end(stream);
	if (ret)
		return ret;
	stream->records++;
	stream->bytes += SAMPLE_HEADER_BYTES + length;
	stream->digest = sample_digest_record(stream->digest, &stream->header, stream->payload);
	kvfree(stream->payload);
	stream->payload = NULL;
	stream->filled = 0;
	WRITE_ONCE(stream->waits_for, 0);
	if (!stream->index)	/* wake whoever waits for the epoch, or for its absence */
		sample_session_wake(session);
	return 0;
}

/* --- write() ---------------------------------------------------------------------------- */

/* Where the next bytes go, and how many of them before something is to be checked or loaded. */
static u64 sample_room(struct sample_stream *stream, void **to)
{
	u64 filled = stream->filled;

	if (!sample_header_is_whole(stream)) {
		*to = (u8 *)&stream->header + filled;
		return SAMPLE_HEADER_BYTES - filled;
	}
	filled -= SAMPLE_HEADER_BYTES;
	*to = stream->payload + filled;
	if (sample_has_count(stream)) {
		if (filled < sizeof(__le64))
			return sizeof(__le64) - filled;
		if (filled < sample_list_bytes(stream))
			return sample_list_bytes(stream) - filled;
	}
	return sample_length(stream) - filled;
}

/* The byte that was taken last may have ended something. *whole: the record. */
static int sample_check_progress(struct sample_stream *stream, bool *whole)
{
	u64 filled = stream->filled - SAMPLE_HEADER_BYTES;
	int ret = 0;

	*whole = false;
	if (!sample_header_is_whole(stream))
		return 0;
	if (!filled) {
		ret = sample_check_stream_header(stream);
		if (!ret)
			WRITE_ONCE(stream->waits_for, sample_needed_epoch(stream));
		return ret;
	}
	if (sample_has_count(stream) && filled == sizeof(__le64))
		ret = sample_check_count(stream);
	if (!ret && sample_has_count(stream) && filled >= sizeof(__le64) &&
	    filled == sample_list_bytes(stream))
		ret = sample_check_list(stream);
	*whole = !ret && filled == sample_length(stream);
	return ret;
}

/* Bytes taken: no more than up to the next check. */
static ssize_t sample_copy_in(struct sample_stream *stream, const char __user *buf, size_t size)
{
	ktime_t start = ktime_get();
	size_t bytes;
	void *to;

	bytes = min_t(u64, size, sample_room(stream, &to));
	if (copy_from_user(to, buf, bytes))
		return -EFAULT;
	stream->filled += bytes;
	atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), start)), &stream->counters->copy_ns);
	return bytes;
}

/* One piece, under the locks. Bytes taken, or an errno; *bad: of what was written. */
static ssize_t sample_write_piece(struct sample_stream *stream, const char __user *buf, size_t size,
				  int *bad)
{
	struct sample_session *session = stream->session;
	bool over_command = READ_ONCE(session->dev->params.lock_over) == SAMPLE_OVER_COMMAND;
	ssize_t bytes = 0;
	bool whole = false;

	down_read(&session->gate);
	sample_lock(stream);
	if (READ_ONCE(session->code))
		bytes = READ_ONCE(session->code);
	else if (stream->ended)
		*bad = -EPROTO;
	else
		bytes = sample_copy_in(stream, buf, size);
	if (bytes > 0)
		*bad = sample_check_progress(stream, &whole);
	if (whole && over_command)
		*bad = sample_load_record(stream);
	sample_unlock(stream);
	if (whole && !over_command)
		*bad = sample_load_record(stream);
	up_read(&session->gate);
	return bytes;
}

bool sample_epoch_is_loaded(struct sample_session *session, u64 epoch)
{
	return READ_ONCE(session->loaded_epoch) >= epoch;
}

/* Whoever waits for the epoch waits no longer: it is there, or will never be. */
bool sample_epoch_is_decided(struct sample_session *session, u64 epoch)
{
	return READ_ONCE(session->code) || sample_epoch_is_loaded(session, epoch) ||
	       READ_ONCE(session->stream[0].ended);
}

/* Wait for the epoch of the record, with none of the locks that its critical data needs. */
static int sample_wait_for_epoch(struct sample_stream *stream, bool nonblock)
{
	struct sample_session *session = stream->session;
	u64 epoch = READ_ONCE(stream->waits_for);

	if (sample_epoch_is_decided(session, epoch))
		return 0;
	if (nonblock)
		return -EAGAIN;
	return wait_event_interruptible(stream->wait, sample_epoch_is_decided(session, epoch));
}

/* What was written cannot be the source's: the device fails. Returns what the call returns. */
int sample_refuse(struct sample_stream *stream, const struct vfio_mig_record *record, int error)
{
	struct sample_session *session = stream->session;

	if (READ_ONCE(session->code))	/* it was the session's end, not the record */
		return READ_ONCE(session->code);
	sample_log(session->dev,
		   "refused fd=%u class=%u epoch=%llu sequence=%llu length=%llu -> %d",
		   stream->index, le16_to_cpu(record->record_class), le64_to_cpu(record->epoch),
		   le64_to_cpu(record->sequence), le64_to_cpu(record->length), error);
	sample_session_fail(session);
	if (session->multi || error == -EIO || error == -ENOMEM)
		return error;
	return -EINVAL;		/* v2 has no names for what can be wrong */
}

static ssize_t sample_write_all(struct sample_stream *stream, const char __user *buf, size_t size,
				bool nonblock)
{
	struct sample_session *session = stream->session;
	size_t done = 0;
	ssize_t ret;
	int bad = 0;

	if (READ_ONCE(session->code))
		return READ_ONCE(session->code);
	while (done < size) {
		ret = sample_wait_for_epoch(stream, nonblock);
		if (ret)
			return done ?: ret;
		if (READ_ONCE(session->code))
			return READ_ONCE(session->code);
		if (!sample_epoch_is_loaded(session, READ_ONCE(stream->waits_for)))
			return sample_refuse(stream, &stream->header, -EPROTO);
		ret = sample_write_piece(stream, buf + done, size - done, &bad);
		if (bad)
			return sample_refuse(stream, &stream->header, bad);
		if (ret == -EFAULT)
			return done ?: ret;
		if (ret < 0)
			return ret;
		done += ret;
	}
	return done;
}

static ssize_t sample_load_write(struct file *file, const char __user *buf, size_t size,
				 loff_t *pos)
{
	struct sample_stream *stream = file->private_data;
	struct sample_device *dev = stream->session->dev;
	bool nonblock = file->f_flags & O_NONBLOCK;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	if (nonblock) {
		if (!mutex_trylock(&stream->write_mutex))
			return -EAGAIN;
	} else if (mutex_lock_interruptible(&stream->write_mutex)) {
		return -ERESTARTSYS;
	}
	if (sample_fault(dev, "write"))
		ret = -EIO;
	else
		ret = sample_write_all(stream, buf, size, nonblock);
	mutex_unlock(&stream->write_mutex);
	atomic64_inc(&stream->counters->writes);
	if (ret > 0)
		atomic64_add(ret, &stream->counters->write_bytes);
	sample_log(dev, "write fd=%u size=%zu -> %zd", stream->index, size, ret);
	return ret;
}

static __poll_t sample_load_poll(struct file *file, poll_table *wait)
{
	struct sample_stream *stream = file->private_data;
	struct sample_session *session = stream->session;
	__poll_t ready = 0;
	int code;

	poll_wait(file, &stream->wait, wait);
	code = READ_ONCE(session->code);
	if (code)
		ready = EPOLLOUT | EPOLLWRNORM | EPOLLHUP | (code == -EIO ? EPOLLERR : 0);
	else if (sample_epoch_is_decided(session, READ_ONCE(stream->waits_for)))
		ready = EPOLLOUT | EPOLLWRNORM;
	if (READ_ONCE(session->dev->params.log_polls))
		sample_log(session->dev, "poll fd=%u -> %u", stream->index, (__force u32)ready);
	return ready;
}

static long sample_load_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct sample_stream *stream = file->private_data;

	return stream->session->multi ? sample_stream_ioctl(stream, cmd, arg) : -ENOTTY;
}

/* At the end of RESUMING, when nobody writes any more: is everything there? */
int sample_load_check(struct sample_session *session)
{
	bool whole = !READ_ONCE(session->failed);
	u32 i;

	for (i = 0; i < session->streams; i++) {
		struct sample_stream *stream = &session->stream[i];

		whole &= stream->ended && stream->epoch <= session->loaded_epoch;
	}
	if (whole)
		return 0;
	return session->multi ? -ENODATA : -EIO;
}

const struct file_operations sample_load_fops = {
	.owner = THIS_MODULE,
	.write = sample_load_write,
	.poll = sample_load_poll,
	.unlocked_ioctl = sample_load_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = sample_stream_release,
};

void sample_load_free(struct sample_stream *stream)
{
	kvfree(stream->payload);
}
