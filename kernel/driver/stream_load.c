// SPDX-License-Identifier: GPL-2.0
/*
 * A stream that is loaded: write() collects the bytes of a record and loads it,
 * inside the call, when the last one arrives.
 *
 * What arrives may be anything: every number is checked before it is used.
 */
#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "sample.h"

static const struct sample_record *sample_header(struct sample_stream *stream)
{
	return &stream->header;
}

static u64 sample_length(struct sample_stream *stream)
{
	return le64_to_cpu(sample_header(stream)->length);
}

static bool sample_header_is_whole(struct sample_stream *stream)
{
	return stream->filled >= sizeof(struct sample_record);
}

static bool sample_record_is_whole(struct sample_stream *stream)
{
	return sample_header_is_whole(stream) &&
	       stream->filled == sizeof(struct sample_record) + sample_length(stream);
}

/* The header has arrived: is it the next one of this stream? */
static int sample_check_header(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	const struct sample_record *record = sample_header(stream);
	bool multi = stream->session->multi;
	u64 sequence = le64_to_cpu(record->sequence);
	u64 epoch = le64_to_cpu(record->epoch);
	u64 length = sample_length(stream);

	if (le16_to_cpu(record->stream) != stream->index)
		return -EXDEV;
	if (sequence != stream->records)
		return sequence < stream->records ? -EALREADY : -EILSEQ;
	if (!epoch || epoch < stream->epoch)
		return -EPROTO;
	if (length > (u64)READ_ONCE(dev->params.record_limit_kib) << 10)
		return -E2BIG;
	switch (le16_to_cpu(record->record_class)) {
	case SAMPLE_CRITICAL:
		if (stream->index || le32_to_cpu(record->flags) & ~SAMPLE_F_EPOCH_COMPLETE ||
		    length != dev->critical_bytes)
			return -EPROTO;
		break;
	case SAMPLE_DIRTY:
		if ((multi && !stream->index) || record->flags ||
		    length < sizeof(struct sample_dirty))
			return -EPROTO;
		break;
	case SAMPLE_END:
		if (record->flags || length != sizeof(struct sample_end))
			return -EPROTO;
		break;
	default:
		return -EPROTO;
	}
	stream->payload = kvmalloc(length, GFP_KERNEL_ACCOUNT);
	return stream->payload ? 0 : -ENOMEM;
}

static int sample_load_critical(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	const struct sample_record *record = sample_header(stream);

	mutex_lock(&dev->guest_mutex);
	memcpy(dev->critical, stream->payload, dev->critical_bytes);
	WRITE_ONCE(dev->epoch, le64_to_cpu(record->epoch));
	mutex_unlock(&dev->guest_mutex);
	if (le32_to_cpu(record->flags) & SAMPLE_F_EPOCH_COMPLETE)
		WRITE_ONCE(session->loaded_epoch, le64_to_cpu(record->epoch));
	return 0;
}

static int sample_load_dirty(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	const struct sample_dirty *dirty = stream->payload;
	u64 length = sample_length(stream);
	u64 count = le64_to_cpu(dirty->count);
	const u8 *from;
	u64 i;

	/* the length has a limit, so this cannot overflow once count has one */
	if (count > dev->blocks || length != sizeof(*dirty) +
					    count * (sizeof(__le64) + dev->block_bytes))
		return -EPROTO;
	for (i = 0; i < count; i++)
		if (le64_to_cpu(dirty->block[i]) >= dev->blocks)
			return -EPROTO;
	from = (const u8 *)&dirty->block[count];
	for (i = 0; i < count; i++) {
		memcpy(dev->data + le64_to_cpu(dirty->block[i]) * dev->block_bytes, from,
		       dev->block_bytes);
		from += dev->block_bytes;
	}
	return 0;
}

static int sample_load_end(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	const struct sample_end *end = stream->payload;

	if (le64_to_cpu(end->records) != stream->records ||
	    le64_to_cpu(end->bytes) != stream->bytes ||
	    le64_to_cpu(end->digest) != stream->digest)
		return -EBADMSG;
	stream->ended = true;
	session->newest_epoch = max(session->newest_epoch, stream->epoch);
	return 0;
}

/* The record is whole: the firmware loads it. */
static int sample_load_record(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	const struct sample_record *record = sample_header(stream);
	u64 length = sample_length(stream);
	u16 record_class = le16_to_cpu(record->record_class);
	u32 setup_us = 0;
	int ret;

	if (record_class == SAMPLE_CRITICAL)
		setup_us = READ_ONCE(dev->params.critical_setup_us);
	ret = sample_fault(dev, "load") ? -EIO : 0;
	if (!ret && record_class != SAMPLE_END)
		ret = sample_command(stream, length, READ_ONCE(dev->params.load_mib_s), setup_us);
	if (ret)
		return ret;
	stream->epoch = le64_to_cpu(record->epoch);
	switch (record_class) {
	case SAMPLE_CRITICAL:
		ret = sample_load_critical(stream);
		break;
	case SAMPLE_DIRTY:
		ret = sample_load_dirty(stream);
		break;
	case SAMPLE_END:
		ret = sample_load_end(stream);
		break;
	}
	if (ret)
		return ret;
	stream->records++;
	stream->bytes += sizeof(*record) + length;
	stream->digest = sample_digest_record(stream->digest, record, stream->payload);
	kvfree(stream->payload);
	stream->payload = NULL;
	stream->filled = 0;
	if (!stream->index)
		sample_session_wake(session);	/* whoever waits for the epoch, or for its absence */
	return 0;
}

/* Where the next bytes go, and how many of them. */
static size_t sample_room(struct sample_stream *stream, void **to)
{
	if (!sample_header_is_whole(stream)) {
		*to = (u8 *)&stream->header + stream->filled;
		return sizeof(struct sample_record) - stream->filled;
	}
	*to = stream->payload + stream->filled - sizeof(struct sample_record);
	return sizeof(struct sample_record) + sample_length(stream) - stream->filled;
}

/* Take bytes until one of them ends a header or a record. Bytes taken, or an errno. */
static ssize_t sample_copy_in(struct sample_stream *stream, const char __user *buf, size_t size)
{
	ktime_t start = ktime_get();
	size_t bytes;
	void *to;

	bytes = min(size, sample_room(stream, &to));
	if (copy_from_user(to, buf, bytes))
		return -EFAULT;
	stream->filled += bytes;
	atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), start)), &stream->counters->copy_ns);
	return bytes;
}

/* One piece, under the locks. Bytes taken, or an errno, of which *bad says whether it is the end. */
static ssize_t sample_write_piece(struct sample_stream *stream, const char __user *buf, size_t size,
				  bool *bad)
{
	struct sample_session *session = stream->session;
	bool had_header = sample_header_is_whole(stream);
	ssize_t bytes;
	bool whole;
	int ret = 0;

	down_read(&session->gate);
	sample_lock(stream);
	bytes = READ_ONCE(session->code);
	if (!bytes)
		bytes = sample_copy_in(stream, buf, size);
	if (bytes < 0) {
		sample_unlock(stream);
		up_read(&session->gate);
		return bytes;
	}
	if (stream->ended)
		ret = -EPROTO;
	else if (!had_header && sample_header_is_whole(stream))
		ret = sample_check_header(stream);
	whole = !ret && sample_record_is_whole(stream);
	if (whole && READ_ONCE(session->dev->params.lock_over) == SAMPLE_OVER_COMMAND)
		ret = sample_load_record(stream);
	sample_unlock(stream);
	if (whole && READ_ONCE(session->dev->params.lock_over) != SAMPLE_OVER_COMMAND)
		ret = sample_load_record(stream);
	up_read(&session->gate);
	*bad = ret;
	return ret ?: bytes;
}

static bool sample_may_go_on(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;

	if (READ_ONCE(session->code) || !session->multi || !sample_header_is_whole(stream))
		return true;
	if (le16_to_cpu(sample_header(stream)->record_class) != SAMPLE_DIRTY)
		return true;
	return READ_ONCE(session->loaded_epoch) >= le64_to_cpu(sample_header(stream)->epoch) ||
	       READ_ONCE(session->stream[0].ended);
}

/* Wait for the epoch of the record, with none of the locks that its critical data needs. */
static int sample_wait_for_epoch(struct sample_stream *stream, bool nonblock)
{
	struct sample_session *session = stream->session;

	if (!sample_may_go_on(stream)) {
		if (nonblock)
			return -EAGAIN;
		if (wait_event_interruptible(stream->wait, sample_may_go_on(stream)))
			return -ERESTARTSYS;
	}
	return READ_ONCE(session->code);
}

static bool sample_epoch_is_missing(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;

	return session->multi && sample_header_is_whole(stream) &&
	       le16_to_cpu(sample_header(stream)->record_class) == SAMPLE_DIRTY &&
	       READ_ONCE(session->loaded_epoch) < le64_to_cpu(sample_header(stream)->epoch);
}

static ssize_t sample_write_all(struct sample_stream *stream, const char __user *buf, size_t size,
				bool nonblock)
{
	struct sample_session *session = stream->session;
	size_t done = 0;
	bool bad = false;
	ssize_t ret;

	if (READ_ONCE(session->code))
		return READ_ONCE(session->code);
	while (done < size) {
		ret = sample_wait_for_epoch(stream, nonblock);
		if (ret == -EAGAIN || ret == -ERESTARTSYS)
			return done ?: ret;
		if (ret)
			return ret;
		if (sample_epoch_is_missing(stream)) {
			ret = -EPROTO;
			bad = true;
		} else {
			ret = sample_write_piece(stream, buf + done, size - done, &bad);
		}
		if (bad) {
			if (READ_ONCE(session->code))	/* it was not the record: the session ended */
				return READ_ONCE(session->code);
			sample_session_fail(session);
			sample_log(session->dev, "refused fd=%u class=%u epoch=%llu sequence=%llu length=%llu -> %zd",
				   stream->index, le16_to_cpu(stream->header.record_class),
				   le64_to_cpu(stream->header.epoch),
				   le64_to_cpu(stream->header.sequence), sample_length(stream), ret);
			return session->multi || ret == -EIO || ret == -ENOMEM ? ret : -EINVAL;
		}
		if (ret == -EFAULT)
			return done ?: ret;
		if (ret < 0)
			return ret;
		done += ret;
	}
	return done;
}

static ssize_t sample_load_write(struct file *file, const char __user *buf, size_t size, loff_t *pos)
{
	struct sample_stream *stream = file->private_data;
	struct sample_device *dev = stream->session->dev;
	bool nonblock = file->f_flags & O_NONBLOCK;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	if (nonblock ? !mutex_trylock(&stream->write_mutex) :
		       mutex_lock_interruptible(&stream->write_mutex))
		return nonblock ? -EAGAIN : -ERESTARTSYS;
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

/* At the end of RESUMING, when nobody writes any more: is everything there? */
int sample_load_check(struct sample_session *session)
{
	bool whole = !READ_ONCE(session->failed);
	u32 i;

	for (i = 0; i < session->streams; i++)
		whole &= session->stream[i].ended && !session->stream[i].filled;
	whole &= session->loaded_epoch >= session->newest_epoch;
	if (whole)
		return 0;
	return session->multi ? -ENODATA : -EIO;
}

const struct file_operations sample_load_fops = {
	.owner = THIS_MODULE,
	.write = sample_load_write,
	.release = sample_stream_release,
};

void sample_load_free(struct sample_stream *stream)
{
	kvfree(stream->payload);
}
