// SPDX-License-Identifier: GPL-2.0
/*
 * The device's state, which is memory: blocks, and critical data with its epoch.
 * And who changes it: the device itself (dirty_kib_s), BAR0, debugfs.
 *
 * A block is copied without a lock, as a device's DMA would: who writes it marks
 * it dirty afterwards, so a copy that is torn is followed by a better one.
 */
#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/random.h>
#include <linux/vmalloc.h>

#include "sample.h"

#define SAMPLE_PRIME		0x9e3779b185ebca87ULL
#define SAMPLE_LANES		4
#define SAMPLE_GUEST_MS		10

int sample_memory_init(struct sample_device *dev)
{
	const struct sample_params *params = &dev->params;
	u64 bytes = (u64)params->size_kib << 10;

	dev->block_bytes = (u64)params->block_kib << 10;
	dev->blocks = div64_u64(bytes, dev->block_bytes);
	dev->critical_bytes = (u64)params->critical_kib << 10;
	dev->epoch = 1;
	dev->data = vzalloc(bytes);
	dev->critical = vzalloc(dev->critical_bytes);
	dev->dirty = kvcalloc(BITS_TO_LONGS(dev->blocks), sizeof(long), GFP_KERNEL);
	dev->version = kvcalloc(dev->blocks, sizeof(*dev->version), GFP_KERNEL);
	if (!dev->data || !dev->critical || !dev->dirty || !dev->version) {
		sample_memory_free(dev);
		return -ENOMEM;
	}
	memset64(dev->version, 1, dev->blocks);
	prandom_seed_state(&dev->random, get_random_u64());
	prandom_bytes_state(&dev->random, dev->data, bytes);
	prandom_bytes_state(&dev->random, dev->critical, dev->critical_bytes);
	return 0;
}

void sample_memory_free(struct sample_device *dev)
{
	vfree(dev->data);
	vfree(dev->critical);
	kvfree(dev->dirty);
	kvfree(dev->version);
}

void sample_mark_dirty(struct sample_device *dev, u64 block)
{
	lockdep_assert_held(&dev->guest_mutex);
	smp_wmb();	/* the data, then its version, */
	WRITE_ONCE(dev->version[block], dev->version[block] + 1);
	smp_mb__before_atomic();	/* then the bit */
	set_bit(block, dev->dirty);
}

static void sample_write_block(struct sample_device *dev, u64 block)
{
	u64 *words = dev->data + block * dev->block_bytes;
	u32 at = prandom_u32_state(&dev->random) % (u32)(dev->block_bytes / sizeof(u64));

	words[at] += 1 + prandom_u32_state(&dev->random);
	sample_mark_dirty(dev, block);
}

/* As a guest that makes the device change these blocks. -EBUSY: it is stopped. */
int sample_write_blocks(struct sample_device *dev, u64 first, u64 count)
{
	int ret = 0;

	mutex_lock(&dev->guest_mutex);
	if (!dev->active)
		ret = -EBUSY;
	else if (first >= dev->blocks || count > dev->blocks - first)
		ret = -EINVAL;
	else
		for (u64 block = first; block < first + count; block++)
			sample_write_block(dev, block);
	mutex_unlock(&dev->guest_mutex);
	return ret;
}

/*
 * The epoch that began makes dirty data of these blocks invalid. What the user
 * has of them, or may have, is to be saved once more. A record of an earlier
 * epoch that is being saved either has its blocks in the bitmap by now, or takes
 * the new epoch: see sample_save_blocks().
 */
static void sample_invalidate(struct sample_session *session,
			      const struct sample_invalidation *what)
{
	struct sample_device *dev = session->dev;
	struct vfio_mig_block_range *range = session->ranges;
	u64 first = what->first_block;
	u64 blocks, block;

	lockdep_assert_held(&dev->guest_mutex);
	if (first >= dev->blocks)
		return;
	blocks = min(what->blocks, dev->blocks - first);
	if (session->ranges_count == SAMPLE_MAX_RANGES) {	/* too many: all blocks instead */
		session->ranges_count = 0;
		first = 0;
		blocks = dev->blocks;
	}
	range += session->ranges_count;
	range->first_block = cpu_to_le64(first);
	range->blocks = cpu_to_le64(blocks);
	range->epoch = cpu_to_le64(dev->epoch);
	WRITE_ONCE(session->ranges_count, session->ranges_count + 1);
	smp_mb();	/* the epoch before the bitmap */
	for (block = first; block < first + blocks; block++) {
		session->valid_from[block] = dev->epoch;
		if (!test_bit(block, session->returned))
			continue;
		if (session->by_block)
			session->version[block] = 0;
		set_bit(block, dev->dirty);
	}
}

static struct sample_invalidation sample_default_invalidation(struct sample_device *dev)
{
	struct sample_invalidation what = {};

	what.first_block = READ_ONCE(dev->params.invalidate_first);
	if (READ_ONCE(dev->params.epochs) == SAMPLE_EPOCHS_INVALIDATE)
		what.blocks = READ_ONCE(dev->params.invalidate_blocks);
	return what;
}

/*
 * As a guest that reconfigures the device: new critical data, a new epoch. Without
 * an invalidation that of the parameters counts. -EBUSY: the device is stopped.
 */
int sample_reconfigure(struct sample_device *dev, const struct sample_invalidation *what)
{
	struct sample_invalidation by_parameters = sample_default_invalidation(dev);
	struct sample_session *session;
	int ret = 0;

	mutex_lock(&dev->guest_mutex);
	session = dev->session;
	if (!dev->active) {
		ret = -EBUSY;
	} else {
		prandom_bytes_state(&dev->random, dev->critical,
				    min_t(u64, dev->critical_bytes, SZ_1K));
		WRITE_ONCE(dev->epoch, dev->epoch + 1);
		if (session && session->saving) {
			if (!what)
				what = &by_parameters;
			if (session->multi && what->blocks)
				sample_invalidate(session, what);
			sample_kick(&session->stream[0]);
			wake_up_all(&session->stream[0].wait);
		}
	}
	mutex_unlock(&dev->guest_mutex);
	return ret;
}

static void sample_guest_work(struct work_struct *work)
{
	struct sample_device *dev = container_of(to_delayed_work(work), struct sample_device,
						 guest_work);
	u64 rate = (u64)READ_ONCE(dev->params.dirty_kib_s) << 10;
	ktime_t now = ktime_get();

	mutex_lock(&dev->guest_mutex);
	if (dev->running && rate) {
		u64 ns = min_t(u64, ktime_to_ns(ktime_sub(now, dev->guest_time)), NSEC_PER_SEC);

		dev->guest_owed_bytes += mul_u64_u64_div_u64(rate, ns, NSEC_PER_SEC);
		for (; dev->guest_owed_bytes >= dev->block_bytes;
		     dev->guest_owed_bytes -= dev->block_bytes)
			sample_write_block(dev, prandom_u32_state(&dev->random) % (u32)dev->blocks);
	}
	dev->guest_time = now;
	mutex_unlock(&dev->guest_mutex);
	queue_delayed_work(sample_workqueue, &dev->guest_work, msecs_to_jiffies(SAMPLE_GUEST_MS));
}

void sample_guest_start(struct sample_device *dev)
{
	INIT_DELAYED_WORK(&dev->guest_work, sample_guest_work);
	dev->guest_time = ktime_get();
	queue_delayed_work(sample_workqueue, &dev->guest_work, 0);
}

void sample_guest_stop(struct sample_device *dev)
{
	cancel_delayed_work_sync(&dev->guest_work);
}

/* What the device does from now on. When this returns, nobody still does the other. */
void sample_guest_may(struct sample_device *dev, bool running, bool active)
{
	mutex_lock(&dev->guest_mutex);
	dev->running = running;
	dev->active = active;
	mutex_unlock(&dev->guest_mutex);
}

static u64 sample_mix(u64 digest, u64 word)
{
	return rol64((digest ^ word) * SAMPLE_PRIME, 29);
}

/* No secret, and no collision that somebody wants: it finds what went wrong. */
u64 sample_digest(u64 digest, const void *data, size_t bytes)
{
	const size_t stride = SAMPLE_LANES * sizeof(__le64);
	u64 lane[SAMPLE_LANES] = { 1, 2, 3, 4 };
	size_t at, i;

	for (at = 0; at + stride <= bytes; at += stride)
		for (i = 0; i < SAMPLE_LANES; i++)
			lane[i] = sample_mix(lane[i],
					     get_unaligned_le64(data + at + i * sizeof(__le64)));
	for (i = 0; i < SAMPLE_LANES; i++)
		digest = sample_mix(digest, lane[i]);
	for (; at < bytes; at++)
		digest = sample_mix(digest, *(const u8 *)(data + at));
	return sample_mix(digest, bytes);
}

/* Of what describes the data of a record: its header, and the numbers of its blocks. */
u64 sample_digest_record(u64 digest, const struct vfio_mig_record *record, const void *payload)
{
	const struct sample_dirty *dirty = payload;

	digest = sample_digest(digest, record, sizeof(*record));
	if (le16_to_cpu(record->record_class) == VFIO_MIG_RECORD_DIRTY)
		digest = sample_digest(digest, dirty,
				       struct_size(dirty, block, le64_to_cpu(dirty->count)));
	return digest;
}

/* Of the whole state. It means something while the device is stopped. */
u64 sample_device_digest(struct sample_device *dev)
{
	__le64 epoch;
	u64 digest;

	mutex_lock(&dev->guest_mutex);
	epoch = cpu_to_le64(dev->epoch);
	digest = sample_digest(0, dev->data, dev->blocks * dev->block_bytes);
	digest = sample_digest(digest, dev->critical, dev->critical_bytes);
	digest = sample_digest(digest, &epoch, sizeof(epoch));
	mutex_unlock(&dev->guest_mutex);
	return digest;
}
