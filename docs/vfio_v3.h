/* SPDX-License-Identifier: GPL-2.0-or-later WITH Linux-syscall-note */
/*
 * VFIO device migration with several streams: additions to
 * include/uapi/linux/vfio.h
 *
 * EXPERIMENTAL. No kernel has any of this; the sample driver in kernel/driver
 * implements it. The numbers are the next free ones in Linux 7.3-rc1; nobody
 * has reserved them. proto_v3/vfio/uapi.py has the same definitions in Python.
 * What the bytes of the streams are is in vfio_v3_stream.h, for drivers only.
 *
 * Everything that is not described here is as in vfio.h: the states and their
 * arcs, and all behaviour towards a user who does not opt in.
 */
#ifndef _UAPI_VFIO_V3_H
#define _UAPI_VFIO_V3_H

#include <linux/types.h>
#include <linux/ioctl.h>

/* As in vfio.h, which may be included before or after this header. */
#ifndef VFIO_TYPE
#define VFIO_TYPE	(';')
#endif
#ifndef VFIO_BASE
#define VFIO_BASE	100
#endif

/*
 * A session with several streams
 *
 * The state machine is that of vfio.h. A session has one critical stream and
 * one or more dirty streams, each with its own fd. All of them are saved, or
 * all of them are loaded. The arcs that begin a session return the critical fd
 * as data_fd; VFIO_MIG_GET_STREAM on it returns the others. All streams end
 * with the session; after that every call on any of their fds fails with
 * ENODEV.
 *
 * vfio.h says that the data written in RESUMING should be taken from the data
 * transfer output of a single FD. With several streams this holds for each fd:
 * what is written to a fd of the target is what was read from the fd with the
 * same index at the source. What vfio.h says of the data_fd, and what
 * struct vfio_migration_ops says of the one file that a driver returns to the
 * VFIO core, holds for the critical fd. The driver makes the others itself, so
 * the core does not know of them. The driver ensures that each of them is at
 * its end, or fails, when the session is over.
 *
 * Critical data is what the device needs before it can use any other data, and
 * what takes time to set up. Dirty data is the rest, in blocks. Every block has
 * one home: the dirty stream that carries it for the whole session.
 *
 * The user keeps the order of the bytes within each stream, and does not
 * interpret them: they are a matter between the drivers of source and target.
 * There is no order between streams: dependencies between them are the target
 * driver's business. The user must not let a waiting dirty stream hold up the
 * critical one.
 *
 * Epochs
 *   An epoch is a generation of critical data. A device starts in epoch 1. Each
 *   reconfiguration of the device that creates new critical data begins the
 *   next epoch. Epochs never decrease. Dirty data of epoch e depends on the
 *   critical data of all epochs up to e.
 *
 *   A new epoch keeps the dirty data of earlier epochs valid. Optionally, a
 *   driver may make it invalid instead, in ranges of blocks that the epoch
 *   names. The target driver then drops such data, including data still in
 *   flight. The source driver must therefore mark as dirty again every block of
 *   these ranges that it ever returned in an earlier epoch, not only unread
 *   ones: otherwise a block in flight would be lost. So each such epoch costs
 *   another pass over its ranges. The user sees nothing of it.
 *
 * read()
 *   Returns bytes of the stream, in pieces of any size. Waits while the device
 *   saves. In PRE_COPY and PRE_COPY_P2P it fails with ENOMSG when nothing is
 *   left for now. In STOP_COPY every stream comes to its end, where read()
 *   returns 0. Several threads may read different fds at the same time. EBADF
 *   on an fd that is being loaded, as for write() on one that is being saved.
 *
 *   A device may refuse to be saved before it is stopped. That is no failure:
 *   until STOP_COPY read() fails with ENOMSG on every stream, pending_bytes is 0
 *   and epoch does not grow; then all of the state comes. A device of which
 *   dirty data was returned whose critical data it refuses to save has failed.
 *
 * write()
 *   The driver loads what the bytes complete, inside the call. On a dirty fd it
 *   waits until the critical data that they depend on is loaded. On the
 *   critical fd it never waits for a dirty stream. Bytes that differ from the
 *   source's stream put the device into ERROR, and the call fails with
 *     EXDEV	bytes of another stream;
 *     EALREADY	bytes that were written before;
 *     EILSEQ	bytes that are too early: some before them are missing;
 *     EPROTO	bytes that cannot be the next ones of the stream, that follow
 *		its end, or that wait for an epoch that never arrives;
 *     E2BIG	a length or a number above the driver's limits, or an epoch too
 *		far ahead of the loaded one: before any data is taken or any
 *		memory allocated for it;
 *     EBADMSG	an end of the stream that does not match what was written;
 *     ENOMEM	no memory for what the bytes complete; it is charged to the
 *		writing process.
 *   The driver holds for each stream no more than what it is about to load.
 *
 * Waiting calls
 *   A write() that waits for an epoch waits before it takes the byte after
 *   which it would have something to load, or earlier. Bytes that were taken
 *   stay taken. The wait ends when the epoch is loaded; when the critical
 *   stream ended without it (EPROTO); when any stream fails (EIO); when the
 *   session is over, be it by SET_STATE, by VFIO_DEVICE_RESET, or because the
 *   device is closed (ENODEV); or by a signal. After a signal write() returns
 *   the number of bytes taken by this call, or fails with EINTR (or is
 *   restarted) if there are none. close() of the fd by another thread does not
 *   end the wait.
 *
 *   With O_NONBLOCK, write() does not wait for an epoch: it returns the number
 *   of bytes taken, or fails with EAGAIN if there are none. read() does not
 *   wait while the device saves: EAGAIN. The time of the device's own commands
 *   is not avoided.
 *
 *   No waiting call holds anything that SET_STATE, VFIO_DEVICE_RESET or a
 *   write() to the critical fd needs. A driver with one mutex drops it
 *   meanwhile.
 *
 * poll()
 *   EPOLLIN	there is data to read, or the stream is at its end;
 *   EPOLLPRI	on the critical fd only: the epoch grew since the last
 *		VFIO_MIG_GET_STREAM_INFO on it, by whichever thread, or, before
 *		the first one, since the session began. One thread
 *		should wait for it; the epoch in the answer counts, not the
 *		event;
 *   EPOLLOUT	on an fd that is being loaded: write() would take at least one
 *		byte without waiting for an epoch.
 *   Once the session is over: EPOLLHUP, and once the device failed EPOLLERR as
 *   well; with EPOLLIN or EPOLLOUT, because read() and write() then return at
 *   once. So the user can wait for readiness, and need not query in a loop.
 *
 * close()
 *   Never fails, and has no effect on session or device: the session ends with
 *   the state machine, not with its fds. SET_STATE out of RESUMING tells
 *   whether everything was written.
 *
 * Errors
 *   A device that fails on one stream is in ERROR. From then on every call on
 *   any of its streams fails with EIO, including calls that wait.
 *   VFIO_DEVICE_RESET ends the session, as in vfio.h, and alone leaves ERROR:
 *   SET_STATE fails with EIO. (The driver has to check this: the VFIO core has
 *   no arc out of ERROR, and warns when asked for one.)
 *
 *   VFIO_MIG_GET_PRECOPY_INFO fails with ENOTTY; VFIO_MIG_GET_STREAM_INFO
 *   replaces it.
 *
 *   SET_STATE out of RESUMING fails with ENODATA, and leaves the device in
 *   ERROR, if the end of any stream or the critical data of the newest epoch is
 *   missing. The session is over then (ENODEV). The source still has the guest
 *   at that time.
 *
 *   The ioctls below fail with ENOTTY on an fd that does not have them, before
 *   the argument is looked at. Of the argument the kernel reads and writes the
 *   structure, never more of argsz.
 */

/**
 * VFIO_DEVICE_FEATURE_MIG_STREAMS - the number of streams of a session
 *
 * The device has several streams if it has this feature, which
 * VFIO_DEVICE_FEATURE_PROBE tells. There is no flag for it in
 * VFIO_DEVICE_FEATURE_MIGRATION, as the state machine does not depend on it.
 *
 * Upon VFIO_DEVICE_FEATURE_GET, read the maximum number of dirty streams of a
 * session, and the flags that the device knows.
 *
 * Upon VFIO_DEVICE_FEATURE_SET, select both for later sessions. The target must
 * select the same as the source, before it enters RESUMING; the user transports
 * the setting. dirty_streams 0 opts out. The setting holds until the next SET,
 * VFIO_DEVICE_RESET, or the last close of the device, whoever made it. Without
 * it, the device behaves as one without this feature: one stream, no epochs.
 *
 * VFIO_MIG_STREAMS_BLOCKS: instead of the dirty streams there is one fd of
 * addressable blocks, see VFIO_MIG_GET_DIRTY_BLOCKS. dirty_streams must be 1.
 *
 * Valid in any state. Does not block.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * ENOTTY	the device has one stream only;
 * EBUSY	SET with a session open;
 * EINVAL	SET of more dirty streams than the device has, of a flag that it
 *		does not have or that cannot be set, or of
 *		VFIO_MIG_STREAMS_BLOCKS with dirty_streams other than 1;
 * and as for every VFIO_DEVICE_FEATURE.
 */
struct vfio_device_feature_mig_streams {
	__u32	dirty_streams;
	__u32	flags;
#define VFIO_MIG_STREAMS_BLOCKS	(1 << 0) /* Blocks instead of dirty streams */
};

/* No device has more dirty streams: each costs memory at both ends. */
#define VFIO_MIG_MAX_DIRTY_STREAMS	64

/* 13 is VFIO_DEVICE_FEATURE_ZPCI_ERROR as of Linux 7.3-rc1. */
#define VFIO_DEVICE_FEATURE_MIG_STREAMS	14

/**
 * VFIO_MIG_GET_STREAM - _IO(VFIO_TYPE, VFIO_BASE + 22)
 *
 * This ioctl is used on the critical fd. It returns in fd the fd of dirty
 * stream index, counted from 0. With VFIO_MIG_STREAMS_BLOCKS, index 0 is the fd
 * of blocks. The fd has O_CLOEXEC. Called again for the same index, it returns
 * another descriptor of the same open file, as dup() does, also if all earlier
 * ones were closed. The user closes each of them; see close() above.
 *
 * The caller sets argsz, flags (none is defined: 0) and index. If no fd can be
 * returned, fd is -1, unless the structure itself was refused.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P, STOP_COPY and RESUMING. Does not block.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	the structure is not in the caller's memory;
 * EINVAL	argsz is smaller than the structure, a flag is set, or there is
 *		no such stream;
 * ENOTTY	this is not the critical fd, or it is one of a session with a
 *		single stream;
 * EMFILE, ENFILE, ENOMEM
 *		there is no room for another fd; the user may try again;
 * ENODEV	the session is over;
 * EIO		the device failed.
 */
struct vfio_mig_get_stream {
	__u32	argsz;
	__u32	flags;
	__u32	index;
	__s32	fd;
};

#define VFIO_MIG_GET_STREAM	_IO(VFIO_TYPE, VFIO_BASE + 22)

/**
 * VFIO_MIG_GET_STREAM_INFO - _IO(VFIO_TYPE, VFIO_BASE + 23)
 *
 * This ioctl is used on the fd of any stream that is being saved. It returns
 *
 * epoch		the newest epoch of the device; stays 1 until the device
 *			is stopped, if it saves no state before;
 * pending_bytes	the unread bytes of this stream, including those that
 *			are not saved yet.
 *
 * On the critical fd these are the unread critical bytes. The ioctl clears
 * EPOLLPRI there. In PRE_COPY, on a dirty fd of which everything is read, it
 * makes the driver save what became dirty since, as VFIO_MIG_GET_PRECOPY_INFO
 * does; read() does not. In PRE_COPY_P2P it only reports.
 *
 * Once the guest is stopped and the device is in PRE_COPY_P2P, the answer is
 * final. A driver that is not told of a reconfiguration, and can ask its device
 * only before the device is suspended, asks on the arc from PRE_COPY to
 * PRE_COPY_P2P, before it suspends. The user stops the guest before it takes
 * that arc.
 *
 * The caller sets argsz and flags (none is defined: 0); argsz is not changed.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	the structure is not in the caller's memory;
 * EINVAL	argsz is smaller than the structure, a flag is set, or the
 *		device is in RESUMING;
 * ENOTTY	this is the fd of a session with a single stream;
 * ENODEV	the session is over;
 * EIO		the device failed.
 */
struct vfio_mig_stream_info {
	__u32	argsz;
	__u32	flags;
	__aligned_u64	epoch;
	__aligned_u64	pending_bytes;
};

#define VFIO_MIG_GET_STREAM_INFO	_IO(VFIO_TYPE, VFIO_BASE + 23)

/**
 * VFIO_MIG_GET_DIRTY_BLOCKS - _IO(VFIO_TYPE, VFIO_BASE + 24)
 *
 * This ioctl is used on the fd of blocks that is being saved. It reports the
 * blocks that changed since the last call; the first call reports all blocks
 * that can be read. The user must read a block that is reported. It is reported
 * again only if it changes again, or if a new epoch makes it invalid.
 *
 * The caller sets argsz, flags (none is defined: 0), bitmap, which is the
 * address of the bitmap, and blocks, which is the number of bits that it has
 * room for. Block b is bit b % 8, 0 being the lowest one, of byte b / 8. Bits
 * are only set in the bitmap, none is cleared. The ioctl returns block_bytes,
 * the size of a block, and blocks, the number of blocks of the device. It
 * returns them also if the bitmap is too small, so a first call with blocks 0
 * can query them. The room is checked before the driver reports any block, so
 * no block is lost by it.
 *
 * After EFAULT the user should treat every block as dirty, as for
 * VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: blocks that the driver reported may
 * be lost.
 *
 * pread() on the fd of blocks returns one record with the blocks as they are
 * now. It waits while the device saves them, and in PRE_COPY_P2P, where the
 * device saves nothing, until that state is left; with O_NONBLOCK it fails with
 * EAGAIN. So a user whose only thread reads must not call it in PRE_COPY_P2P
 * without O_NONBLOCK. The offset is the number of the first block times
 * block_bytes. The size is VFIO_MIG_BLOCKS_HEAD_BYTES, and 8 + block_bytes for
 * each block. It fails with EINVAL for another size, for blocks that do not
 * exist, or that cannot be read before the device is stopped. Any number of
 * threads may call it at the same time.
 *
 * read() on the fd of blocks returns the end of the stream in STOP_COPY, once
 * every block was read as it is then, and fails with ENOMSG before that. It
 * returns the whole of it, VFIO_MIG_BLOCKS_END_BYTES, or fails with EINVAL if
 * there is no room for it; after it read() returns 0.
 *
 * If the device refuses to be saved before it is stopped, pread() fails with
 * ENOMSG, and no block is reported until STOP_COPY, where all of them are.
 *
 * write() on the fd of blocks that is being loaded takes what one pread() or
 * the read() returned, as a whole, in each call; otherwise it fails with
 * EPROTO. Any number of threads may call it, in any order, except that the end
 * is the last. A block that is older than the loaded one is dropped. The end
 * fails with EBADMSG if not every block is loaded as it was in STOP_COPY.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	the structure or the bitmap is not in the caller's memory;
 * EINVAL	argsz is smaller than the structure, a flag is set, or blocks is
 *		smaller than the number of blocks of the device;
 * EBADF	this is the fd of blocks of a session that is being loaded;
 * ENOTTY	this is not the fd of blocks;
 * ENODEV	the session is over;
 * EIO		the device failed.
 */
struct vfio_mig_dirty_blocks {
	__u32	argsz;
	__u32	flags;
	__aligned_u64	block_bytes;
	__aligned_u64	blocks;
	__aligned_u64	bitmap;
};

#define VFIO_MIG_GET_DIRTY_BLOCKS	_IO(VFIO_TYPE, VFIO_BASE + 24)

/* Bytes of a pread() on the fd of blocks, beside 8 + block_bytes a block. */
#define VFIO_MIG_BLOCKS_HEAD_BYTES	48
/* Of the end of the fd of blocks. */
#define VFIO_MIG_BLOCKS_END_BYTES	56

#endif /* _UAPI_VFIO_V3_H */
