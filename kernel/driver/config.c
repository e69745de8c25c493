// SPDX-License-Identifier: GPL-2.0
/*
 * The device as a VMM sees it: PCI config space, BAR0, no interrupts.
 *
 * BAR0 is the first 4 KiB of the state, so a write there makes block 0 dirty.
 */
#include <linux/pci_ids.h>
#include <linux/uaccess.h>

#include "sample.h"

#define SAMPLE_VENDOR_ID	0x1234	/* of no vendor: what emulated devices use */
#define SAMPLE_DEVICE_ID	0x7633
#define SAMPLE_OFFSET_SHIFT	40
#define SAMPLE_OFFSET_MASK	(BIT_ULL(SAMPLE_OFFSET_SHIFT) - 1)

/* The bits of config space that can be written. */
static const struct {
	u8 offset;
	u8 bytes;
	u32 bits;
} sample_writable[] = {
	{ PCI_COMMAND, 2, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
			  PCI_COMMAND_PARITY | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE },
	{ PCI_CACHE_LINE_SIZE, 1, 0xff },
	{ PCI_LATENCY_TIMER, 1, 0xff },
	{ PCI_BASE_ADDRESS_0, 4, (u32)~(SAMPLE_BAR_BYTES - 1) },
	{ PCI_INTERRUPT_LINE, 1, 0xff },
};

static void sample_config_put16(struct sample_device *dev, u8 offset, u16 value)
{
	put_unaligned_le16(value, dev->config + offset);
}

void sample_config_init(struct sample_device *dev)
{
	sample_config_put16(dev, PCI_VENDOR_ID, SAMPLE_VENDOR_ID);
	sample_config_put16(dev, PCI_DEVICE_ID, SAMPLE_DEVICE_ID);
	sample_config_put16(dev, PCI_CLASS_DEVICE, PCI_CLASS_OTHERS << 8);
	sample_config_put16(dev, PCI_SUBSYSTEM_VENDOR_ID, SAMPLE_VENDOR_ID);
	sample_config_put16(dev, PCI_SUBSYSTEM_ID, SAMPLE_DEVICE_ID);
	put_unaligned_le32(PCI_BASE_ADDRESS_SPACE_MEMORY, dev->config + PCI_BASE_ADDRESS_0);
}

static u8 sample_config_mask(u64 offset)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(sample_writable); i++)
		if (offset >= sample_writable[i].offset &&
		    offset < sample_writable[i].offset + sample_writable[i].bytes)
			return sample_writable[i].bits >> 8 * (offset - sample_writable[i].offset);
	return 0;
}

static u64 sample_region_bytes(u32 index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return SAMPLE_BAR_BYTES;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return SAMPLE_CONFIG_BYTES;
	}
	return 0;
}

/* Bytes of the access that are in the region, or -EINVAL. */
static ssize_t sample_region_room(loff_t pos, size_t count)
{
	u64 at = pos & SAMPLE_OFFSET_MASK;
	u64 bytes = sample_region_bytes(pos >> SAMPLE_OFFSET_SHIFT);

	if (pos < 0 || at >= bytes)
		return -EINVAL;
	return min_t(u64, count, bytes - at);
}

ssize_t sample_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos)
{
	struct sample_device *dev = to_sample(vdev);
	ssize_t bytes = sample_region_room(*ppos, count);
	u64 at = *ppos & SAMPLE_OFFSET_MASK;
	void *from = dev->config;

	if (bytes < 0)
		return bytes;
	if (*ppos >> SAMPLE_OFFSET_SHIFT == VFIO_PCI_BAR0_REGION_INDEX)
		from = dev->data;
	if (copy_to_user(buf, from + at, bytes))
		return -EFAULT;
	*ppos += bytes;
	return bytes;
}

ssize_t sample_region_write(struct vfio_device *vdev, const char __user *buf, size_t count,
			    loff_t *ppos)
{
	struct sample_device *dev = to_sample(vdev);
	ssize_t bytes = sample_region_room(*ppos, count);
	u64 at = *ppos & SAMPLE_OFFSET_MASK;
	u8 value[SAMPLE_CONFIG_BYTES];
	ssize_t i;

	if (bytes < 0)
		return bytes;
	bytes = min_t(ssize_t, bytes, sizeof(value));
	if (copy_from_user(value, buf, bytes))
		return -EFAULT;
	mutex_lock(&dev->guest_mutex);
	if (*ppos >> SAMPLE_OFFSET_SHIFT == VFIO_PCI_CONFIG_REGION_INDEX) {
		for (i = 0; i < bytes; i++) {
			u8 mask = sample_config_mask(at + i);

			dev->config[at + i] = (dev->config[at + i] & ~mask) | (value[i] & mask);
		}
	} else if (!dev->active) {
		bytes = -EBUSY;	/* the user should have kept everybody out (vfio.h, STOP) */
	} else {
		memcpy(dev->data + at, value, bytes);
		sample_mark_dirty(dev, 0);
	}
	mutex_unlock(&dev->guest_mutex);
	if (bytes > 0)
		*ppos += bytes;
	return bytes;
}

int sample_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
		       struct vfio_info_cap *caps)
{
	if (info->index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info->offset = (u64)info->index << SAMPLE_OFFSET_SHIFT;
	info->size = sample_region_bytes(info->index);
	info->flags = info->size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0;
	return 0;
}

long sample_device_info(struct vfio_device_info __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

long sample_irq_info(struct vfio_irq_info __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index > VFIO_PCI_MSIX_IRQ_INDEX)
		return -EINVAL;
	info.flags = VFIO_IRQ_INFO_EVENTFD;
	info.count = 0;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

/* There are no interrupts: all that can be done is to turn them off. */
long sample_set_irqs(struct vfio_irq_set __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_irq_set, count);
	struct vfio_irq_set set;

	if (copy_from_user(&set, arg, minsz))
		return -EFAULT;
	if (set.argsz < minsz || set.index >= VFIO_PCI_NUM_IRQS || set.start || set.count)
		return -EINVAL;
	if (set.flags != (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER))
		return -EINVAL;
	return 0;
}
