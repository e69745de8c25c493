// SPDX-License-Identifier: GPL-2.0
/*
 * vfio_v3_sample: a sample VFIO device with a large state, for migration v2 and
 * for the proposed v3 (docs/vfio_v3.h). It is an mdev with a PCI config space, so
 * that a VMM's vfio-pci takes it. It has no hardware: README.md says what is
 * emulated, and how.
 */
#include <linux/device.h>
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "sample.h"

struct workqueue_struct *sample_workqueue;

static int sample_init(struct vfio_device *vdev)
{
	struct sample_device *dev = to_sample(vdev);
	struct sample_params *params = &dev->params;
	int ret;

	ret = sample_params_init(params);
	if (ret)
		return ret;
	mutex_init(&dev->state_mutex);
	mutex_init(&dev->guest_mutex);
	mutex_init(&dev->device_lock);
	sample_engines_init(dev);
	sample_config_init(dev);
	ret = sample_memory_init(dev);
	if (ret)
		return ret;
	ret = sample_log_init(dev);
	if (ret) {
		sample_memory_free(dev);
		return ret;
	}
	dev->state = VFIO_DEVICE_STATE_RUNNING;
	dev->running = true;
	dev->active = true;
	vdev->migration_flags = VFIO_MIGRATION_STOP_COPY;
	if (params->p2p)
		vdev->migration_flags |= VFIO_MIGRATION_P2P;
	if (params->precopy)
		vdev->migration_flags |= VFIO_MIGRATION_PRE_COPY;
	vdev->mig_ops = &sample_migration_ops;
	if (params->dirty_log)
		vdev->log_ops = &sample_dma_log_ops;
	return 0;
}

static void sample_release(struct vfio_device *vdev)
{
	struct sample_device *dev = to_sample(vdev);

	sample_log_free(dev);
	sample_memory_free(dev);
	mutex_destroy(&dev->device_lock);
	mutex_destroy(&dev->guest_mutex);
	mutex_destroy(&dev->state_mutex);
}

static int sample_open(struct vfio_device *vdev)
{
	sample_log(to_sample(vdev), "open -> 0");
	return 0;
}

static void sample_close(struct vfio_device *vdev)
{
	struct sample_device *dev = to_sample(vdev);

	sample_reset(dev, "close");
	dev->dma_logging = false;
	dev->info_v2_logged = false;
}

static long sample_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return sample_device_info((void __user *)arg);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return sample_irq_info((void __user *)arg);
	case VFIO_DEVICE_SET_IRQS:
		return sample_set_irqs((void __user *)arg);
	case VFIO_DEVICE_RESET:
		sample_reset(to_sample(vdev), "reset");
		return 0;
	}
	return -ENOTTY;
}

static const struct vfio_device_ops sample_device_ops = {
	.name = SAMPLE_NAME,
	.init = sample_init,
	.release = sample_release,
	.open_device = sample_open,
	.close_device = sample_close,
	.read = sample_region_read,
	.write = sample_region_write,
	.ioctl = sample_ioctl,
	.get_region_info_caps = sample_region_info,
	.device_feature = sample_device_feature,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

static int sample_probe(struct mdev_device *mdev)
{
	struct sample_device *dev;
	int ret;

	dev = vfio_alloc_device(sample_device, vdev, &mdev->dev, &sample_device_ops);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	sample_guest_start(dev);
	ret = vfio_register_emulated_iommu_dev(&dev->vdev);
	if (ret) {
		sample_guest_stop(dev);
		vfio_put_device(&dev->vdev);
		return ret;
	}
	dev_set_drvdata(&mdev->dev, dev);
	sample_debugfs_add(dev);
	return 0;
}

static void sample_remove(struct mdev_device *mdev)
{
	struct sample_device *dev = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&dev->vdev);
	sample_debugfs_remove(dev);
	sample_guest_stop(dev);
	vfio_put_device(&dev->vdev);
}

/* As many as there is memory for. */
static unsigned int sample_get_available(struct mdev_type *type)
{
	return INT_MAX;
}

static struct mdev_driver sample_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.driver = {
		.name = SAMPLE_NAME,
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
	},
	.probe = sample_probe,
	.remove = sample_remove,
	.get_available = sample_get_available,
};

static struct mdev_type sample_type = {
	.sysfs_name = "1",
	.pretty_name = "State that is memory",
};

static struct mdev_type *sample_types[] = { &sample_type };
static struct mdev_parent sample_parent;
static struct device *sample_parent_device;

/* Its name is the first half of the type's: mdev_type_add() in drivers/vfio/mdev/mdev_sysfs.c. */
static const struct class sample_class = {
	.name = SAMPLE_NAME,
};

static int __init sample_module_init(void)
{
	int ret;

	sample_workqueue = alloc_workqueue(SAMPLE_NAME, WQ_UNBOUND, 0);
	if (!sample_workqueue)
		return -ENOMEM;
	sample_firmwares_init();
	sample_debugfs_init();
	ret = mdev_register_driver(&sample_driver);
	if (ret)
		goto err_debugfs;
	ret = class_register(&sample_class);
	if (ret)
		goto err_driver;
	sample_parent_device = device_create(&sample_class, NULL, MKDEV(0, 0), NULL, SAMPLE_NAME);
	if (IS_ERR(sample_parent_device)) {
		ret = PTR_ERR(sample_parent_device);
		goto err_class;
	}
	ret = mdev_register_parent(&sample_parent, sample_parent_device, &sample_driver,
				   sample_types, ARRAY_SIZE(sample_types));
	if (ret)
		goto err_device;
	return 0;

err_device:
	device_unregister(sample_parent_device);
err_class:
	class_unregister(&sample_class);
err_driver:
	mdev_unregister_driver(&sample_driver);
err_debugfs:
	sample_debugfs_exit();
	destroy_workqueue(sample_workqueue);
	return ret;
}

static void __exit sample_module_exit(void)
{
	mdev_unregister_parent(&sample_parent);
	device_unregister(sample_parent_device);
	class_unregister(&sample_class);
	mdev_unregister_driver(&sample_driver);
	sample_debugfs_exit();
	destroy_workqueue(sample_workqueue);
}

module_init(sample_module_init);
module_exit(sample_module_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Sample VFIO device for migration v2 and v3, without hardware");
