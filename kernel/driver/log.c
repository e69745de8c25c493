// SPDX-License-Identifier: GPL-2.0
/*
 * The log of a device's calls: a ring of lines. The numbers of the lines show
 * what it has lost.
 */
#include <linux/ktime.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "sample.h"

#define SAMPLE_LINE_BYTES	112

struct sample_line {
	u64 number;
	u64 time_ns;
	u32 tid;
	char text[SAMPLE_LINE_BYTES];
};

struct sample_log {
	spinlock_t lock;	/* of all that follows */
	u32 room;
	u64 first;		/* numbers of lines: the oldest one, and the next one */
	u64 next;
	struct sample_line line[] __counted_by(room);
};

int sample_log_init(struct sample_device *dev)
{
	u32 room = dev->params.log_lines;
	struct sample_log *log;

	log = kvzalloc(struct_size(log, line, room), GFP_KERNEL);
	if (!log)
		return -ENOMEM;
	spin_lock_init(&log->lock);
	log->room = room;
	dev->log = log;
	return 0;
}

void sample_log_free(struct sample_device *dev)
{
	kvfree(dev->log);
}

void sample_log_clear(struct sample_device *dev)
{
	struct sample_log *log = dev->log;

	spin_lock(&log->lock);
	log->first = log->next;
	spin_unlock(&log->lock);
}

/* One line, when the call that it tells of ends. */
void sample_log(struct sample_device *dev, const char *format, ...)
{
	struct sample_log *log = dev->log;
	char text[SAMPLE_LINE_BYTES];
	struct sample_line *line;
	va_list args;
	u32 at;

	va_start(args, format);
	vscnprintf(text, sizeof(text), format, args);
	va_end(args);
	spin_lock(&log->lock);
	div_u64_rem(log->next, log->room, &at);
	line = &log->line[at];
	line->number = log->next;
	line->time_ns = ktime_get_real_ns();
	line->tid = task_pid_nr(current);
	strscpy(line->text, text);
	log->next++;
	if (log->next - log->first > log->room)
		log->first = log->next - log->room;
	spin_unlock(&log->lock);
}

/* The line of that number, or the oldest one after it. */
static bool sample_log_get(struct sample_log *log, u64 number, struct sample_line *line)
{
	bool found;
	u32 at;

	spin_lock(&log->lock);
	number = max(number, log->first);
	found = number < log->next;
	if (found) {
		div_u64_rem(number, log->room, &at);
		*line = log->line[at];
	}
	spin_unlock(&log->lock);
	return found;
}

struct sample_log_reader {
	struct sample_device *dev;
	struct sample_line line;
};

/* The position is the number of the line that is wanted. */
static void *sample_log_start(struct seq_file *file, loff_t *pos)
{
	struct sample_log_reader *reader = file->private;

	if (!sample_log_get(reader->dev->log, *pos, &reader->line))
		return NULL;
	*pos = reader->line.number;
	return &reader->line;
}

static void *sample_log_next(struct seq_file *file, void *value, loff_t *pos)
{
	++*pos;
	return sample_log_start(file, pos);
}

static void sample_log_stop(struct seq_file *file, void *value)
{
}

static int sample_log_show(struct seq_file *file, void *value)
{
	const struct sample_line *line = value;

	seq_printf(file, "%llu %llu %u %s\n", line->number, line->time_ns, line->tid, line->text);
	return 0;
}

static const struct seq_operations sample_log_seq_ops = {
	.start = sample_log_start,
	.next = sample_log_next,
	.stop = sample_log_stop,
	.show = sample_log_show,
};

static int sample_log_open(struct inode *inode, struct file *file)
{
	struct sample_log_reader *reader;

	reader = __seq_open_private(file, &sample_log_seq_ops, sizeof(*reader));
	if (!reader)
		return -ENOMEM;
	reader->dev = inode->i_private;
	return 0;
}

static ssize_t sample_log_write(struct file *file, const char __user *buf, size_t size, loff_t *pos)
{
	struct seq_file *seq = file->private_data;
	struct sample_log_reader *reader = seq->private;

	sample_log_clear(reader->dev);
	return size;
}

const struct file_operations sample_log_fops = {
	.owner = THIS_MODULE,
	.open = sample_log_open,
	.read = seq_read,
	.write = sample_log_write,
	.llseek = seq_lseek,
	.release = seq_release_private,
};
