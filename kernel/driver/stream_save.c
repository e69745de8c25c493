// SPDX-License-Identifier: GPL-2.0
/*
 * A stream that is saved. A plan says which blocks, and whether critical data, are
 * to be saved; a firmware command saves a record of them; a queue has the records
 * that read() has not returned yet.
 *
 * Where commands take time, a worker runs them as long as the queue has room, so
 * that SAVE and read() overlap. Where they take none, read() saves by itself.
 */
#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "sample.h"

struct sample_buffer {
	struct list_head entry;
	size_t room;
	size_t bytes;
	size_t read;
	bool begun;			/* a reader has it */
	bool numbered;			/* it has its place in the stream */
	bool critical;
	bool initial;			/* a part of a first image that is initial */
	u8 data[] __counted_by(room);
};

/* What read() and poll() find; or an errno. */
enum {
	SAMPLE_AT_END,		/* for good */
	SAMPLE_HAS_DATA,
	SAMPLE_BUSY,		/* there will be data, or the end */
	SAMPLE_DRY,		/* there is nothing for now */
};

/* v2's stream carries everything; of v3's, stream 0 critical data and the others blocks. */
static bool sample_has_critical(struct sample_stream *stream)
{
	return !stream->index;
}

static bool sample_has_blocks(struct sample_stream *stream)
{
	return !stream->session->by_block && (stream->index || !stream->session->multi);
}

/* Blocks with the same remainder have the same stream. */
static u64 sample_first_block(struct sample_stream *stream)
{
	return stream->session->multi ? stream->index - 1 : 0;
}

static u64 sample_stride(struct sample_stream *stream)
{
	return stream->session->multi ? stream->session->streams - 1 : 1;
}

static u64 sample_dirty_record_bytes(struct sample_device *dev, u64 blocks)
{
	return sizeof(struct vfio_mig_record) + sizeof(struct sample_dirty) +
	       blocks * (sizeof(__le64) + dev->block_bytes);
}

static u64 sample_ranges_bytes(u32 count)
{
	return count ? sizeof(struct vfio_mig_record_ranges) +
		       count * sizeof(struct vfio_mig_block_range) : 0;
}

static u64 sample_critical_record_bytes(struct sample_session *session)
{
	return sizeof(struct vfio_mig_record) + session->dev->critical_bytes +
	       sample_ranges_bytes(READ_ONCE(session->ranges_count));
}

static u64 sample_end_record_bytes(void)
{
	return sizeof(struct vfio_mig_record) + sizeof(struct vfio_mig_record_end);
}

/* Blocks of a DIRTY record that is full: it fits into chunk_kib, header and all. */
static u64 sample_blocks_per_record(struct sample_device *dev)
{
	u64 chunk = (u64)READ_ONCE(dev->params.chunk_kib) << 10;
	u64 empty = sample_dirty_record_bytes(dev, 0);
	u64 each = sizeof(__le64) + dev->block_bytes;

	return chunk > empty + each ? div64_u64(chunk - empty, each) : 1;
}

static u64 sample_blocks_bytes(struct sample_device *dev, u64 blocks)
{
	u64 records = DIV64_U64_ROUND_UP(blocks, sample_blocks_per_record(dev));

	return records * sample_dirty_record_bytes(dev, 0) +
	       blocks * (sizeof(__le64) + dev->block_bytes);
}

/* Of a device that is saved once, from the first block to the ENDs. */
u64 sample_image_bytes(struct sample_device *dev)
{
	u64 streams = max(dev->dirty_streams, 1U);
	u64 bytes = sizeof(struct vfio_mig_record) + dev->critical_bytes +
		    sample_end_record_bytes();
	u64 blocks, i;

	for (i = 0; i < streams; i++) {
		blocks = div64_u64(dev->blocks + streams - 1 - i, streams);
		bytes += sample_blocks_bytes(dev, blocks);
	}
	if (dev->dirty_streams)
		bytes += streams * sample_end_record_bytes();
	return bytes;
}

/* The longest payload that this device would save. */
u64 sample_longest_record(struct sample_device *dev)
{
	u64 dirty = sample_dirty_record_bytes(dev, sample_blocks_per_record(dev));
	u64 critical = sizeof(struct vfio_mig_record) + dev->critical_bytes +
		       sample_ranges_bytes(SAMPLE_MAX_RANGES);

	return max(dirty, critical) - sizeof(struct vfio_mig_record);
}

/* v2, reinit=priority: critical data goes before dirty records that nobody began to read. */
static bool sample_overtakes(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;

	return !stream->session->multi && dev->vdev.precopy_info_v2 &&
	       READ_ONCE(dev->params.info_v2) &&
	       READ_ONCE(dev->params.reinit) == SAMPLE_REINIT_PRIORITY;
}

/* v2 has to be asked for what is new, unless it overtakes. */
static bool sample_critical_due(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;

	return sample_has_critical(stream) &&
	       READ_ONCE(session->dev->epoch) > stream->saved_epoch &&
	       (session->multi || stream->critical_planned || sample_overtakes(stream));
}

static bool sample_is_firm(struct sample_buffer *buffer)
{
	return buffer->begun || buffer->critical || buffer->initial;
}

/* Whether a command may start: there is something to save, and the device is not suspended. */
static bool sample_can_save(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;

	lockdep_assert_held(&stream->queue_lock);
	if (READ_ONCE(session->suspended) || READ_ONCE(session->code) ||
	    (session->by_block && stream->index))
		return false;
	return sample_critical_due(stream) || stream->planned ||
	       (session->final && !stream->end_saved);
}

/* Bytes that are not read; with those that nobody asked for yet, and the END that is to come? */
static u64 __sample_pending(struct sample_stream *stream, bool unplanned, bool end)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 blocks = stream->planned;
	u64 bytes = stream->ready_bytes + stream->saving_bytes;
	u64 block;

	lockdep_assert_held(&stream->queue_lock);
	if (unplanned && sample_has_blocks(stream) && !session->final)
		for (block = sample_first_block(stream); block < dev->blocks;
		     block += sample_stride(stream))
			blocks += test_bit(block, dev->dirty) && !test_bit(block, session->planned);
	bytes += sample_blocks_bytes(dev, blocks);
	if (sample_critical_due(stream) || (unplanned && sample_has_critical(stream) &&
					    READ_ONCE(dev->epoch) > stream->saved_epoch))
		bytes += sample_critical_record_bytes(session);
	if (!stream->end_saved && (session->final || end))
		bytes += sample_end_record_bytes();
	return bytes;
}

u64 sample_pending(struct sample_stream *stream, bool unplanned, bool end)
{
	u64 bytes;

	if (stream->session->by_block && stream->index)
		return sample_blocks_pending(stream->session) +
		       ((end || stream->session->final) && !stream->end_saved ?
			sample_end_record_bytes() : 0);
	spin_lock(&stream->queue_lock);
	bytes = __sample_pending(stream, unplanned, end);
	spin_unlock(&stream->queue_lock);
	return bytes;
}

/* What is dirty is to be saved from now on. */
static void __sample_plan(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 block;

	lockdep_assert_held(&stream->queue_lock);
	stream->critical_planned = true;
	if (!sample_has_blocks(stream))
		return;
	for (block = sample_first_block(stream); block < dev->blocks;
	     block += sample_stride(stream))
		if (test_and_clear_bit(block, dev->dirty) &&
		    !test_and_set_bit(block, session->planned))
			stream->planned++;
}

void sample_plan(struct sample_stream *stream)
{
	spin_lock(&stream->queue_lock);
	__sample_plan(stream);
	spin_unlock(&stream->queue_lock);
	sample_kick(stream);
	wake_up_all(&stream->wait);
}

/* At the start of a session, and when it becomes final. */
void sample_plan_all(struct sample_session *session)
{
	struct sample_stream *first = &session->stream[0];
	bool starts = !first->saved_epoch && !first->critical_planned;
	u32 i;

	first->first_image = starts && !session->final &&
			     READ_ONCE(session->dev->params.initial) == SAMPLE_INITIAL_IMAGE;
	for (i = 0; i < session->streams; i++)
		sample_plan(&session->stream[i]);
	if (!starts || session->final)
		return;
	if (READ_ONCE(session->dev->params.initial) == SAMPLE_INITIAL_CRITICAL)
		first->initial_bytes = sample_critical_record_bytes(session);
	else
		first->initial_bytes = sample_pending(first, false, false);
}

/* --- a record is saved ------------------------------------------------------------------ */

static struct sample_buffer *sample_get_buffer(struct sample_stream *stream, u64 bytes)
{
	struct sample_buffer *buffer = xchg(&stream->spare, NULL);

	if (!buffer || buffer->room < bytes) {
		kvfree(buffer);
		buffer = kvmalloc(struct_size(buffer, data, bytes), GFP_KERNEL_ACCOUNT);
		if (!buffer)
			return NULL;
		buffer->room = bytes;
	}
	buffer->bytes = bytes;
	buffer->read = 0;
	buffer->begun = false;
	buffer->numbered = false;
	buffer->critical = false;
	buffer->initial = false;
	return buffer;
}

static void sample_put_buffer(struct sample_stream *stream, struct sample_buffer *buffer)
{
	kvfree(xchg(&stream->spare, buffer));
}

static void sample_put_header(struct sample_stream *stream, struct sample_buffer *buffer,
			      u16 record_class, u32 flags, u64 epoch)
{
	struct vfio_mig_record *record = (void *)buffer->data;

	record->record_class = cpu_to_le16(record_class);
	record->stream = cpu_to_le16(stream->index);
	record->flags = cpu_to_le32(flags);
	record->epoch = cpu_to_le64(epoch);
	record->sequence = 0;		/* when its first byte is read, see sample_number() */
	record->length = cpu_to_le64(buffer->bytes - sizeof(*record));
}

static struct sample_buffer *sample_save_critical(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u32 flags = VFIO_MIG_RECORD_F_EPOCH_COMPLETE;
	struct vfio_mig_record_ranges *ranges;
	struct sample_buffer *buffer;
	u64 epoch, bytes;
	u8 *to;

	mutex_lock(&dev->guest_mutex);
	buffer = sample_get_buffer(stream, sample_critical_record_bytes(session));
	if (!buffer) {
		mutex_unlock(&dev->guest_mutex);
		return NULL;
	}
	epoch = dev->epoch;
	to = buffer->data + sizeof(struct vfio_mig_record);
	if (session->ranges_count) {
		flags |= VFIO_MIG_RECORD_F_INVALIDATES;
		ranges = (void *)to;
		ranges->count = cpu_to_le64(session->ranges_count);
		bytes = sample_ranges_bytes(session->ranges_count);
		memcpy(ranges + 1, session->ranges, bytes - sizeof(*ranges));
		to += bytes;
		WRITE_ONCE(session->ranges_count, 0);
	}
	memcpy(to, dev->critical, dev->critical_bytes);
	mutex_unlock(&dev->guest_mutex);
	sample_put_header(stream, buffer, VFIO_MIG_RECORD_CRITICAL, flags, epoch);
	buffer->critical = true;
	spin_lock(&stream->queue_lock);
	stream->saved_epoch = epoch;
	stream->critical_planned = false;
	stream->saving_critical = true;
	stream->saving_bytes = buffer->bytes;
	spin_unlock(&stream->queue_lock);
	return buffer;
}

/* The next blocks of the plan, as many as a record takes. The cursor is the saver's. */
static u64 sample_take_blocks(struct sample_stream *stream, __le64 *blocks, u64 most)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 stride = sample_stride(stream);
	u64 looked_at, count = 0;

	for (looked_at = 0; looked_at < dev->blocks && count < most; looked_at += stride) {
		if (stream->cursor >= dev->blocks)
			stream->cursor = sample_first_block(stream);
		if (test_and_clear_bit(stream->cursor, session->planned)) {
			blocks[count++] = cpu_to_le64(stream->cursor);
			if (session->returned)
				set_bit(stream->cursor, session->returned);
		}
		stream->cursor += stride;
	}
	return count;
}

static struct sample_buffer *sample_save_blocks(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	u64 most = min(READ_ONCE(stream->planned), sample_blocks_per_record(dev));
	struct sample_buffer *buffer;
	struct sample_dirty *dirty;
	u64 count, i;
	u8 *to;

	buffer = sample_get_buffer(stream, sample_dirty_record_bytes(dev, most));
	if (!buffer)
		return NULL;
	dirty = (void *)buffer->data + sizeof(struct vfio_mig_record);
	count = sample_take_blocks(stream, dirty->block, most);
	if (WARN_ON(count != most)) {
		kvfree(buffer);
		return NULL;
	}
	dirty->count = cpu_to_le64(count);
	spin_lock(&stream->queue_lock);
	buffer->initial = stream->first_image;
	stream->planned -= count;
	stream->saving_bytes = buffer->bytes;
	spin_unlock(&stream->queue_lock);
	smp_mb();	/* what is returned, then the epoch: see sample_invalidate() */
	sample_put_header(stream, buffer, VFIO_MIG_RECORD_DIRTY, 0, READ_ONCE(dev->epoch));
	to = (u8 *)&dirty->block[count];
	for (i = 0; i < count; i++) {
		u64 block = le64_to_cpu(dirty->block[i]);

		memcpy(to, dev->data + block * dev->block_bytes, dev->block_bytes);
		to += dev->block_bytes;
	}
	return buffer;
}

static struct sample_buffer *sample_save_end(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	struct sample_buffer *buffer;

	buffer = sample_get_buffer(stream, sample_end_record_bytes());
	if (!buffer)
		return NULL;
	sample_put_header(stream, buffer, VFIO_MIG_RECORD_END, 0, READ_ONCE(dev->epoch));
	spin_lock(&stream->queue_lock);
	stream->end_saved = true;
	stream->saving_bytes = buffer->bytes;
	spin_unlock(&stream->queue_lock);
	return buffer;
}

/* A record's first byte is about to be read: its place, and all that depends on it. */
static void sample_number(struct sample_stream *stream, struct sample_buffer *buffer)
{
	struct vfio_mig_record *record = (void *)buffer->data;
	struct vfio_mig_record_end *end = (void *)(record + 1);

	buffer->numbered = true;
	record->sequence = cpu_to_le64(stream->records);
	if (le16_to_cpu(record->record_class) == VFIO_MIG_RECORD_END) {
		end->records = cpu_to_le64(stream->records);
		end->bytes = cpu_to_le64(stream->bytes);
		end->digest = cpu_to_le64(stream->digest);
	}
	stream->records++;
	stream->bytes += buffer->bytes;
	stream->digest = sample_digest_record(stream->digest, record, record + 1);
}

/* The entry behind which a record that was saved is put. */
static struct list_head *sample_place(struct sample_stream *stream, struct sample_buffer *buffer)
{
	struct sample_buffer *each;

	lockdep_assert_held(&stream->queue_lock);
	if (!buffer->critical || !sample_overtakes(stream))
		return stream->ready.prev;
	list_for_each_entry_reverse(each, &stream->ready, entry)
		if (sample_is_firm(each))
			return &each->entry;
	return &stream->ready;
}

/* Save one record into the queue. Whoever calls it has set stream->saving. */
static int sample_save_one(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	struct sample_buffer *buffer;
	int ret;

	if (sample_critical_due(stream))
		buffer = sample_save_critical(stream);
	else if (READ_ONCE(stream->planned))
		buffer = sample_save_blocks(stream);
	else
		buffer = sample_save_end(stream);
	if (!buffer)
		return -ENOMEM;
	ret = sample_fault(dev, "save") ? -EIO : 0;
	if (!ret)
		ret = sample_command(stream, buffer->bytes, READ_ONCE(dev->params.save_mib_s), 0);
	if (ret) {
		kvfree(buffer);
		return ret;
	}
	spin_lock(&stream->queue_lock);
	stream->saving_bytes = 0;
	stream->saving_critical = false;
	list_add(&buffer->entry, sample_place(stream, buffer));
	stream->ready_records++;
	stream->ready_bytes += buffer->bytes;
	spin_unlock(&stream->queue_lock);
	wake_up_all(&stream->wait);
	return 0;
}

static void sample_saving_ends(struct sample_stream *stream, int ret)
{
	spin_lock(&stream->queue_lock);
	stream->saving = false;
	stream->saving_bytes = 0;
	stream->saving_critical = false;
	spin_unlock(&stream->queue_lock);
	if (ret && !READ_ONCE(stream->session->code))
		sample_session_fail(stream->session);
	wake_up_all(&stream->wait);
	wake_up_all(&stream->session->idle);
}

/* For critical data that overtakes there is one chunk more. */
static bool sample_has_room(struct sample_stream *stream)
{
	u32 chunks = READ_ONCE(stream->session->dev->params.chunks);

	if (sample_overtakes(stream) && sample_critical_due(stream))
		chunks++;
	return stream->ready_records < chunks;
}

static bool sample_may_save_more(struct sample_stream *stream)
{
	bool may;

	spin_lock(&stream->queue_lock);
	may = sample_can_save(stream) && sample_has_room(stream);
	if (!may)
		stream->saving = false;
	spin_unlock(&stream->queue_lock);
	return may;
}

static void sample_save_work(struct work_struct *work)
{
	struct sample_stream *stream = container_of(work, struct sample_stream, work);
	struct sample_session *session = stream->session;
	int ret = 0;

	down_read(&session->gate);
	while (!ret && sample_may_save_more(stream)) {
		bool locked = READ_ONCE(session->dev->params.lock_over) == SAMPLE_OVER_COMMAND;

		if (locked)
			sample_lock(stream);
		ret = sample_save_one(stream);
		if (locked)
			sample_unlock(stream);
	}
	up_read(&session->gate);
	if (ret)
		sample_saving_ends(stream, ret);
	wake_up_all(&stream->wait);
	wake_up_all(&session->idle);
	sample_session_put(session);
}

static bool sample_saves_at_once(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;

	return sample_instant(dev, READ_ONCE(dev->params.save_mib_s));
}

/* Let the worker save ahead, if there is what to save, room for it, and a delay. */
void sample_kick(struct sample_stream *stream)
{
	struct sample_session *session = stream->session;
	bool start;

	if (sample_saves_at_once(stream))
		return;
	spin_lock(&stream->queue_lock);
	start = !stream->saving && sample_can_save(stream) && sample_has_room(stream);
	if (start)
		stream->saving = true;
	spin_unlock(&stream->queue_lock);
	if (!start)
		return;
	sample_session_get(session);
	if (!queue_work(sample_workqueue, &stream->work))
		sample_session_put(session);
}

static bool sample_is_idle(struct sample_stream *stream)
{
	bool idle;

	spin_lock(&stream->queue_lock);	/* who starts a command looks at suspended under it */
	idle = !stream->saving && !stream->block_saves;
	spin_unlock(&stream->queue_lock);
	return idle;
}

/* Wait for the SAVEs in flight: the device is suspended after them. */
void sample_settle(struct sample_session *session)
{
	u32 i;

	for (i = 0; i < session->streams; i++)
		wait_event(session->idle, sample_is_idle(&session->stream[i]));
}

/* --- read() and poll() ------------------------------------------------------------------ */

/* The record that comes next; NULL while one is being saved, or due, that goes before it. */
static struct sample_buffer *sample_next(struct sample_stream *stream)
{
	struct sample_buffer *first;

	lockdep_assert_held(&stream->queue_lock);
	first = list_first_entry_or_null(&stream->ready, struct sample_buffer, entry);
	if (first && !sample_is_firm(first) && sample_overtakes(stream) &&
	    (stream->saving_critical || (sample_critical_due(stream) && sample_can_save(stream))))
		return NULL;
	return first;
}

static int sample_status(struct sample_stream *stream)
{
	int code = READ_ONCE(stream->session->code);
	int status = SAMPLE_DRY;

	if (code)
		return code;
	spin_lock(&stream->queue_lock);
	if (sample_next(stream))
		status = SAMPLE_HAS_DATA;
	else if (stream->saving)
		status = SAMPLE_BUSY;
	else if (sample_can_save(stream))
		status = sample_saves_at_once(stream) ? SAMPLE_HAS_DATA : SAMPLE_BUSY;
	else if (stream->session->final)
		status = SAMPLE_AT_END;
	spin_unlock(&stream->queue_lock);
	if (status == SAMPLE_BUSY)
		sample_kick(stream);
	return status;
}

static int sample_wait_for_data(struct sample_stream *stream, bool nonblock)
{
	int status = sample_status(stream);

	if (status != SAMPLE_BUSY)
		return status;
	if (nonblock)
		return -EAGAIN;
	if (wait_event_interruptible(stream->wait, sample_status(stream) != SAMPLE_BUSY))
		return -ERESTARTSYS;
	return sample_status(stream);
}

/* Under the stream's lock, so one at a time: the record to copy from, saved now if need be. */
static struct sample_buffer *sample_first_ready(struct sample_stream *stream)
{
	struct sample_buffer *buffer;
	bool save;
	int ret;

	for (;;) {
		spin_lock(&stream->queue_lock);
		buffer = sample_next(stream);
		if (buffer)
			buffer->begun = true;
		save = !buffer && !stream->saving && sample_can_save(stream) &&
		       sample_saves_at_once(stream);
		if (save)
			stream->saving = true;
		spin_unlock(&stream->queue_lock);
		if (!save)
			return buffer;
		ret = sample_save_one(stream);
		sample_saving_ends(stream, ret);
		if (ret)
			return ERR_PTR(ret);
	}
}

static void sample_was_read(struct sample_stream *stream, struct sample_buffer *buffer,
			    size_t bytes)
{
	bool whole;

	spin_lock(&stream->queue_lock);
	buffer->read += bytes;
	whole = buffer->read == buffer->bytes;
	stream->ready_bytes -= bytes;
	stream->initial_bytes -= min_t(u64, stream->initial_bytes, bytes);
	if (whole) {
		list_del(&buffer->entry);
		stream->ready_records--;
	}
	spin_unlock(&stream->queue_lock);
	if (whole) {
		sample_put_buffer(stream, buffer);
		sample_kick(stream);
	}
}

/* Bytes copied, 0 if there was nothing, or an errno. */
static ssize_t sample_copy_out(struct sample_stream *stream, char __user *buf, size_t size)
{
	struct sample_buffer *buffer;
	size_t done = 0, bytes;

	while (done < size) {
		if (READ_ONCE(stream->session->code))
			return READ_ONCE(stream->session->code);
		buffer = sample_first_ready(stream);
		if (IS_ERR(buffer))
			return done ?: PTR_ERR(buffer);
		if (!buffer)
			break;
		bytes = min(size - done, buffer->bytes - buffer->read);
		if (!buffer->numbered)
			sample_number(stream, buffer);
		if (copy_to_user(buf + done, buffer->data + buffer->read, bytes))
			return done ?: -EFAULT;
		sample_was_read(stream, buffer, bytes);
		done += bytes;
	}
	return done;
}

static ssize_t sample_read_some(struct sample_stream *stream, char __user *buf, size_t size,
				bool nonblock)
{
	struct sample_session *session = stream->session;
	ssize_t ret;

	for (;;) {
		ktime_t start;

		ret = sample_wait_for_data(stream, nonblock);
		if (ret == SAMPLE_BUSY)
			continue;	/* another reader was faster */
		if (ret < 0)
			return ret;
		if (ret == SAMPLE_AT_END)
			return 0;
		if (ret == SAMPLE_DRY)
			return READ_ONCE(session->dev->params.zero_end) ? 0 : -ENOMSG;
		if (!size)
			return 0;
		down_read(&session->gate);
		sample_lock(stream);
		start = ktime_get();
		ret = sample_copy_out(stream, buf, size);
		atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), start)),
			     &stream->counters->copy_ns);
		sample_unlock(stream);
		up_read(&session->gate);
		if (ret)	/* else another reader was faster */
			return ret;
	}
}

static ssize_t sample_save_read(struct file *file, char __user *buf, size_t size, loff_t *pos)
{
	struct sample_stream *stream = file->private_data;
	struct sample_device *dev = stream->session->dev;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	if (sample_fault(dev, "read"))
		ret = -EIO;
	else
		ret = sample_read_some(stream, buf, size, file->f_flags & O_NONBLOCK);
	atomic64_inc(&stream->counters->reads);
	if (ret > 0)
		atomic64_add(ret, &stream->counters->read_bytes);
	sample_log(dev, "read fd=%u size=%zu -> %zd", stream->index, size, ret);
	return ret;
}

static __poll_t sample_save_poll(struct file *file, poll_table *wait)
{
	struct sample_stream *stream = file->private_data;
	struct sample_session *session = stream->session;
	__poll_t ready = 0;
	int status;

	poll_wait(file, &stream->wait, wait);
	status = sample_status(stream);
	if (status < 0)
		ready = EPOLLIN | EPOLLRDNORM | EPOLLHUP | (status == -EIO ? EPOLLERR : 0);
	else if (status == SAMPLE_HAS_DATA || status == SAMPLE_AT_END)
		ready = EPOLLIN | EPOLLRDNORM;
	if (status >= 0 && session->multi && !stream->index &&
	    READ_ONCE(session->dev->epoch) > READ_ONCE(stream->reported_epoch))
		ready |= EPOLLPRI;
	if (READ_ONCE(session->dev->params.log_polls))
		sample_log(session->dev, "poll fd=%u -> %u", stream->index, (__force u32)ready);
	return ready;
}

/* --- VFIO_MIG_GET_PRECOPY_INFO ---------------------------------------------------------- */

/* With priority: the bytes up to the last critical or initial one, saved or not. */
static u64 sample_critical_pending(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;
	bool due = READ_ONCE(dev->epoch) > stream->saved_epoch;
	u64 bytes = 0, most = 0;
	struct sample_buffer *each;

	lockdep_assert_held(&stream->queue_lock);
	list_for_each_entry(each, &stream->ready, entry) {
		bytes += each->bytes - each->read;
		if (each->critical || each->initial ||
		    (each->begun && (due || stream->saving_critical)))
			most = bytes;
	}
	if (stream->saving_critical || stream->first_image)
		most += stream->saving_bytes;
	if (stream->first_image)
		most += sample_blocks_bytes(dev, stream->planned);
	return most + (due ? sample_critical_record_bytes(stream->session) : 0);
}

/* New critical data: what is unread becomes initial, the new data follows, and is saved now. */
static void sample_reinit(struct sample_stream *stream)
{
	struct sample_device *dev = stream->session->dev;

	spin_lock(&stream->queue_lock);
	stream->reported_epoch = READ_ONCE(dev->epoch);
	if (sample_overtakes(stream)) {
		stream->initial_bytes = sample_critical_pending(stream);
	} else if (READ_ONCE(dev->params.initial) == SAMPLE_INITIAL_IMAGE) {
		__sample_plan(stream);
		stream->initial_bytes = __sample_pending(stream, false, false);
	} else {
		stream->critical_planned = true;
		stream->initial_bytes = stream->ready_bytes + stream->saving_bytes +
					sample_critical_record_bytes(stream->session);
	}
	spin_unlock(&stream->queue_lock);
	sample_kick(stream);
	wake_up_all(&stream->wait);
}

static void sample_fill_info(struct sample_stream *stream, struct vfio_precopy_info *info)
{
	struct sample_device *dev = stream->session->dev;
	bool saves = dev->state == VFIO_DEVICE_STATE_PRE_COPY;
	bool reinit = false;
	u64 all;

	if (saves && dev->vdev.precopy_info_v2 && READ_ONCE(dev->params.info_v2) &&
	    READ_ONCE(dev->epoch) > stream->reported_epoch) {
		sample_reinit(stream);
		reinit = true;
		info->flags |= VFIO_PRECOPY_INFO_REINIT;
	} else if (saves && !sample_pending(stream, false, false)) {
		stream->first_image = false;
		sample_plan(stream);
	}
	spin_lock(&stream->queue_lock);
	info->initial_bytes = stream->initial_bytes;
	all = __sample_pending(stream, saves, false);
	info->dirty_bytes = all - min(all, stream->initial_bytes);
	if (reinit ||
	    (stream->initial_bytes && dev->params.initial == SAMPLE_INITIAL_IMAGE))
		info->dirty_bytes = 0;	/* they count from the new initial data on */
	spin_unlock(&stream->queue_lock);
}

static long sample_precopy_info(struct sample_stream *stream, unsigned int cmd, unsigned long arg)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	struct vfio_precopy_info info = {};
	u32 reinit_at = READ_ONCE(dev->params.reinit_at);
	long ret;

	ret = vfio_check_precopy_ioctl(&dev->vdev, cmd, arg, &info);
	if (ret)
		return ret;
	mutex_lock(&dev->state_mutex);
	sample_note_info_v2(dev);
	if (dev->state != VFIO_DEVICE_STATE_PRE_COPY &&
	    dev->state != VFIO_DEVICE_STATE_PRE_COPY_P2P) {
		ret = -EINVAL;
	} else if (READ_ONCE(session->code)) {
		ret = READ_ONCE(session->code);
	} else if (sample_fault(dev, "precopy_info")) {
		ret = -EIO;
	} else {
		if (++session->info_calls == reinit_at)
			sample_reconfigure(dev, NULL);
		sample_fill_info(stream, &info);
	}
	sample_log(dev, "precopy_info initial=%llu dirty=%llu flags=%u -> %ld", info.initial_bytes,
		   info.dirty_bytes, ret ? 0 : info.flags, ret);
	mutex_unlock(&dev->state_mutex);
	if (!ret && copy_to_user((void __user *)arg, &info,
				 offsetofend(struct vfio_precopy_info, dirty_bytes)))
		ret = -EFAULT;
	return ret;
}

static long sample_save_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct sample_stream *stream = file->private_data;

	if (stream->session->multi)
		return sample_stream_ioctl(stream, cmd, arg);
	return sample_precopy_info(stream, cmd, arg);
}

const struct file_operations sample_save_fops = {
	.owner = THIS_MODULE,
	.read = sample_save_read,
	.poll = sample_save_poll,
	.unlocked_ioctl = sample_save_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = sample_stream_release,
};

void sample_save_init(struct sample_stream *stream)
{
	spin_lock_init(&stream->queue_lock);
	INIT_LIST_HEAD(&stream->ready);
	INIT_WORK(&stream->work, sample_save_work);
	stream->cursor = sample_first_block(stream);
}

void sample_save_free(struct sample_stream *stream)
{
	struct sample_buffer *buffer, *next;

	list_for_each_entry_safe(buffer, next, &stream->ready, entry)
		kvfree(buffer);
	kvfree(stream->spare);
}
