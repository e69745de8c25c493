/* SPDX-License-Identifier: GPL-2.0 */
/*
 * vfio_v3_sample: a device whose state is memory. What the files of the driver
 * share.
 *
 * Locks, outermost first:
 *   state_mutex	of a device: its state, its session, what the user opted in to
 *   write_mutex	of a stream that is loaded: one write() at a time
 *   gate		of a session: readers touch the device's memory or the streams'
 *			buffers; who ends the session waits for them as the writer
 *   stream->lock	the one that the parameter "lock" chooses: held over copies, and
 *			over firmware commands if "lock_over" says so
 *   guest_mutex	of a device: writers of its memory and of its epoch
 *   queue_lock		of a stream that is saved: its queue and its plan
 * A write() that waits for an epoch holds write_mutex only. dev->session changes
 * under state_mutex and guest_mutex; either is enough to look at it.
 */
#ifndef VFIO_V3_SAMPLE_H
#define VFIO_V3_SAMPLE_H

#include <linux/atomic.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/pci_regs.h>
#include <linux/prandom.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "params.h"
#include "vfio_v3.h"
#include "vfio_v3_stream.h"

#define SAMPLE_NAME		"vfio_v3_sample"
#define SAMPLE_MAX_RANGES	256
#define SAMPLE_BLOCK_LOCKS	16
#define SAMPLE_CONFIG_BYTES	256
#define SAMPLE_BAR_BYTES	4096
#define SAMPLE_MAX_COMMAND_NS	(60 * NSEC_PER_SEC)

struct sample_buffer;
struct sample_log;

/* The start of a DIRTY record's payload. Numbers of blocks follow, then the blocks. */
struct sample_dirty {
	__le64 count;
	__le64 block[];
};

/* What was done on the data fds of one number, in all sessions of a device. */
struct sample_counters {
	atomic64_t reads;
	atomic64_t read_bytes;
	atomic64_t writes;
	atomic64_t write_bytes;
	atomic64_t commands;
	atomic64_t command_ns;
	atomic64_t copy_ns;
	atomic64_t lock_wait_ns;
};

struct sample_stream {
	struct sample_session *session;
	u32 index;
	struct file *file;		/* of a dirty stream, once somebody asked for it */
	struct mutex own_lock;		/* stream->lock, with lock=fd */
	struct mutex *lock;		/* held over copies, see above */
	wait_queue_head_t wait;
	struct sample_counters *counters;

	/* what was saved or loaded so far */
	u64 records;
	u64 bytes;
	u64 digest;

	/* of a stream that is saved */
	spinlock_t queue_lock;
	struct list_head ready;		/* records that are saved */
	u32 ready_records;
	u64 ready_bytes;		/* of them, unread */
	struct sample_buffer *spare;
	struct work_struct work;
	bool saving;			/* a record is being saved */
	u32 block_saves;		/* of the fd of blocks: commands in flight */
	u64 saving_bytes;
	bool end_saved;
	bool critical_planned;
	bool saving_critical;		/* that record has critical data */
	bool first_image;		/* what is saved now counts as initial_bytes */
	u64 saved_epoch;		/* the newest one whose critical data is saved */
	u64 cursor;			/* the block to look at next */
	u64 planned;			/* blocks to be saved */
	u64 initial_bytes;		/* unread bytes that count as v2's initial_bytes */
	u64 reported_epoch;		/* by REINIT, or by STREAM_INFO */

	/* of a stream that is loaded */
	struct mutex write_mutex;	/* see above */
	struct vfio_mig_record header;
	u64 filled;			/* bytes of the record that arrived */
	u64 waits_for;			/* the epoch that its next byte has to wait for */
	void *payload;
	u64 epoch;			/* of the newest record */
	bool ended;
};

struct sample_session {
	struct kref kref;
	struct sample_device *dev;
	struct rw_semaphore gate;
	wait_queue_head_t idle;		/* whoever waits for SAVEs in flight */
	int code;			/* what all calls return; 0: it goes on */
	bool failed;
	bool saving;
	bool multi;			/* v3: several streams */
	bool by_block;			/* of which stream 1 is the fd of blocks */
	bool suspended;			/* in PRE_COPY_P2P: nothing is saved */
	bool final;			/* in STOP_COPY */
	unsigned long *planned;
	unsigned long *returned;	/* blocks that were ever saved for the user */
	u64 *valid_from;		/* by block: epochs before this one are invalid */
	u64 *version;			/* by block: the one that was read, or is loaded */
	struct vfio_mig_block_range *ranges;	/* that the next critical record tells of */
	u32 ranges_count;
	atomic_t block_reads;		/* pread()s of the fd of blocks, in progress */
	struct mutex block_lock[SAMPLE_BLOCK_LOCKS];	/* of blocks that are loaded */
	u32 info_calls;
	u64 loaded_epoch;
	u32 streams;
	struct sample_stream stream[] __counted_by(streams);
};

/* What a reconfiguration does to dirty data that was saved before it. */
struct sample_invalidation {
	u64 first_block;
	u64 blocks;		/* 0: it stays valid */
};

struct sample_engines {
	atomic_t busy;
	atomic_t busy_most;
	wait_queue_head_t wait;
};

struct sample_device {
	struct vfio_device vdev;
	struct sample_params params;
	u64 blocks;
	u64 block_bytes;
	u64 critical_bytes;

	struct mutex state_mutex;	/* see above */
	enum vfio_device_mig_state state;
	struct sample_session *session;
	u32 dirty_streams;		/* that the user opted in to */
	bool by_block;
	bool dma_logging;
	bool info_v2_logged;

	struct mutex guest_mutex;	/* see above */
	bool running;			/* writes by itself */
	bool active;			/* takes writes */
	void *data;
	void *critical;
	u64 epoch;
	unsigned long *dirty;
	u64 *version;			/* by block; grows with each write */
	struct delayed_work guest_work;
	struct rnd_state random;
	ktime_t guest_time;
	u64 guest_owed_bytes;

	struct mutex device_lock;	/* stream->lock, with lock=device */
	struct sample_engines own_engines;
	struct sample_engines *engines;	/* its own, or those of its firmware */
	atomic_t fault_calls;

	u8 config[SAMPLE_CONFIG_BYTES];
	struct dentry *debugfs;
	struct sample_log *log;
	struct sample_counters counters[1 + VFIO_MIG_MAX_DIRTY_STREAMS];
};

extern struct workqueue_struct *sample_workqueue;

static inline struct sample_device *to_sample(struct vfio_device *vdev)
{
	return container_of(vdev, struct sample_device, vdev);
}

/* config.c */
void sample_config_init(struct sample_device *dev);
ssize_t sample_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos);
ssize_t sample_region_write(struct vfio_device *vdev, const char __user *buf, size_t count,
			    loff_t *ppos);
int sample_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
		       struct vfio_info_cap *caps);
long sample_device_info(struct vfio_device_info __user *arg);
long sample_irq_info(struct vfio_irq_info __user *arg);
long sample_set_irqs(struct vfio_irq_set __user *arg);

/* state.c */
int sample_memory_init(struct sample_device *dev);
void sample_memory_free(struct sample_device *dev);
void sample_guest_start(struct sample_device *dev);
void sample_guest_stop(struct sample_device *dev);
void sample_guest_may(struct sample_device *dev, bool running, bool active);
void sample_mark_dirty(struct sample_device *dev, u64 block);
int sample_write_blocks(struct sample_device *dev, u64 first, u64 count);
int sample_reconfigure(struct sample_device *dev, const struct sample_invalidation *what);
u64 sample_digest(u64 digest, const void *data, size_t bytes);
u64 sample_digest_record(u64 digest, const struct vfio_mig_record *record, const void *payload);
u64 sample_device_digest(struct sample_device *dev);

/* firmware.c */
void sample_firmwares_init(void);
void sample_engines_init(struct sample_device *dev);
bool sample_instant(struct sample_device *dev, u32 mib_s);
int sample_command(struct sample_stream *stream, u64 bytes, u32 mib_s, u32 more_us);
void sample_sleep_us(u64 us);
bool sample_fault(struct sample_device *dev, const char *call);
void sample_lock(struct sample_stream *stream);
void sample_unlock(struct sample_stream *stream);

/* migration.c */
extern const struct vfio_migration_ops sample_migration_ops;
extern const struct vfio_log_ops sample_dma_log_ops;
const char *sample_state_name(u32 state);
enum vfio_device_mig_state sample_state(struct sample_device *dev);
void sample_note_info_v2(struct sample_device *dev);
void sample_reset(struct sample_device *dev, const char *why);

/* session.c */
struct file *sample_session_start(struct sample_device *dev, bool saving, bool suspended,
				  bool final);
void sample_session_put(struct sample_session *session);
void sample_session_get(struct sample_session *session);
void sample_session_fail(struct sample_session *session);
void sample_session_stop(struct sample_session *session, int code);
void sample_session_end(struct sample_device *dev);
void sample_session_wake(struct sample_session *session);
struct file *sample_stream_file(struct sample_stream *stream);
int sample_stream_release(struct inode *inode, struct file *file);

/* stream_save.c */
extern const struct file_operations sample_save_fops;
void sample_save_init(struct sample_stream *stream);
void sample_save_free(struct sample_stream *stream);
void sample_plan_all(struct sample_session *session);
void sample_plan(struct sample_stream *stream);
void sample_kick(struct sample_stream *stream);
void sample_settle(struct sample_session *session);
u64 sample_pending(struct sample_stream *stream, bool unplanned, bool end);
u64 sample_longest_record(struct sample_device *dev);
u64 sample_image_bytes(struct sample_device *dev);

/* stream_load.c */
extern const struct file_operations sample_load_fops;
int sample_check_header(struct sample_stream *stream, const struct vfio_mig_record *record);
bool sample_epoch_is_loaded(struct sample_session *session, u64 epoch);
bool sample_epoch_is_decided(struct sample_session *session, u64 epoch);
int sample_refuse(struct sample_stream *stream, const struct vfio_mig_record *record, int error);
void sample_load_free(struct sample_stream *stream);
int sample_load_check(struct sample_session *session);

/* streams.c */
int sample_device_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t argsz);
long sample_stream_ioctl(struct sample_stream *stream, unsigned int cmd, unsigned long arg);

/* blocks.c */
extern const struct file_operations sample_save_blocks_fops;
extern const struct file_operations sample_load_blocks_fops;
u64 sample_blocks_pending(struct sample_session *session);
long sample_dirty_blocks(struct sample_stream *stream, void __user *arg);

/* log.c */
int sample_log_init(struct sample_device *dev);
void sample_log_free(struct sample_device *dev);
__printf(2, 3) void sample_log(struct sample_device *dev, const char *format, ...);
void sample_log_clear(struct sample_device *dev);
extern const struct file_operations sample_log_fops;

/* debugfs.c */
void sample_debugfs_init(void);
void sample_debugfs_exit(void);
void sample_debugfs_add(struct sample_device *dev);
void sample_debugfs_remove(struct sample_device *dev);

#endif
