// SPDX-License-Identifier: GPL-2.0
/* /sys/kernel/debug/vfio_v3_sample/UUID: what a test wants to see and to do. See README.md. */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "sample.h"

#define SAMPLE_TEXT_BYTES	64

static struct dentry *sample_debugfs_root;

/* What was written, as a string without the newline. Free it. */
static char *sample_text(const char __user *buf, size_t size)
{
	char *text;

	if (size >= SAMPLE_TEXT_BYTES)
		return ERR_PTR(-EINVAL);
	text = memdup_user_nul(buf, size);
	if (!IS_ERR(text))
		strim(text);
	return text;
}

static int sample_digest_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%016llx\n", sample_device_digest(file->private));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(sample_digest);

static int sample_counters_show(struct seq_file *file, void *unused)
{
	struct sample_device *dev = file->private;
	u32 i;

	for (i = 0; i < ARRAY_SIZE(dev->counters); i++) {
		struct sample_counters *counters = &dev->counters[i];

		if (!atomic64_read(&counters->reads) && !atomic64_read(&counters->writes) &&
		    !atomic64_read(&counters->commands))
			continue;
		seq_printf(file, "fd=%u reads=%llu read_bytes=%llu ", i,
			   atomic64_read(&counters->reads), atomic64_read(&counters->read_bytes));
		seq_printf(file, "writes=%llu write_bytes=%llu ", atomic64_read(&counters->writes),
			   atomic64_read(&counters->write_bytes));
		seq_printf(file, "commands=%llu command_ns=%llu copy_ns=%llu lock_wait_ns=%llu\n",
			   atomic64_read(&counters->commands),
			   atomic64_read(&counters->command_ns),
			   atomic64_read(&counters->copy_ns),
			   atomic64_read(&counters->lock_wait_ns));
	}
	return 0;
}

static ssize_t sample_counters_write(struct file *file, const char __user *buf, size_t size,
				     loff_t *pos)
{
	struct sample_device *dev = ((struct seq_file *)file->private_data)->private;

	memset(dev->counters, 0, sizeof(dev->counters));
	return size;
}
DEFINE_SHOW_STORE_ATTRIBUTE(sample_counters);

static int sample_params_file_show(struct seq_file *file, void *unused)
{
	struct sample_device *dev = file->private;

	sample_params_show(file, &dev->params);
	return 0;
}

static ssize_t sample_params_file_write(struct file *file, const char __user *buf, size_t size,
					loff_t *pos)
{
	struct sample_device *dev = ((struct seq_file *)file->private_data)->private;
	char *text = sample_text(buf, size);
	int ret;

	if (IS_ERR(text))
		return PTR_ERR(text);
	ret = sample_params_change(&dev->params, text);
	if (!ret)
		atomic_set(&dev->fault_calls, 0);
	kfree(text);
	return ret ?: size;
}
DEFINE_SHOW_STORE_ATTRIBUTE(sample_params_file);

static ssize_t sample_reconfigure_write(struct file *file, const char __user *buf, size_t size,
					loff_t *pos)
{
	struct sample_invalidation what = {};
	char *text = sample_text(buf, size);
	int ret = 0;

	if (IS_ERR(text))
		return PTR_ERR(text);
	if (!strcmp(text, "keep"))
		ret = sample_reconfigure(file->private_data, &what);
	else if (sscanf(text, "invalidate %llu %llu", &what.first_block, &what.blocks) == 2)
		ret = sample_reconfigure(file->private_data, &what);
	else
		ret = sample_reconfigure(file->private_data, NULL);
	kfree(text);
	return ret ?: size;
}

static const struct file_operations sample_reconfigure_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = sample_reconfigure_write,
};

static ssize_t sample_write_write(struct file *file, const char __user *buf, size_t size,
				  loff_t *pos)
{
	char *text = sample_text(buf, size);
	u64 first, count = 1;
	int ret = -EINVAL;

	if (IS_ERR(text))
		return PTR_ERR(text);
	if (sscanf(text, "%llu %llu", &first, &count) >= 1)
		ret = sample_write_blocks(file->private_data, first, count);
	kfree(text);
	return ret ?: size;
}

static const struct file_operations sample_write_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = sample_write_write,
};

void sample_debugfs_add(struct sample_device *dev)
{
	struct dentry *folder = debugfs_create_dir(dev_name(dev->vdev.dev), sample_debugfs_root);

	dev->debugfs = folder;
	debugfs_create_file("log", 0600, folder, dev, &sample_log_fops);
	debugfs_create_file("digest", 0400, folder, dev, &sample_digest_fops);
	debugfs_create_file("counters", 0600, folder, dev, &sample_counters_fops);
	debugfs_create_atomic_t("commands_at_once", 0600, folder, &dev->engines->busy_most);
	debugfs_create_file("params", 0600, folder, dev, &sample_params_file_fops);
	debugfs_create_file("reconfigure", 0200, folder, dev, &sample_reconfigure_fops);
	debugfs_create_file("write", 0200, folder, dev, &sample_write_fops);
}

void sample_debugfs_remove(struct sample_device *dev)
{
	debugfs_remove_recursive(dev->debugfs);
}

void sample_debugfs_init(void)
{
	sample_debugfs_root = debugfs_create_dir(SAMPLE_NAME, NULL);
}

void sample_debugfs_exit(void)
{
	debugfs_remove_recursive(sample_debugfs_root);
}
