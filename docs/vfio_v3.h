/* SPDX-License-Identifier: GPL-2.0-or-later WITH Linux-syscall-note */
/*
 * VFIO device migration with several streams: additions to
 * include/uapi/linux/vfio.h
 *
 * EXPERIMENTAL. No kernel has any of this. The numbers are the next free ones
 * in Linux 7.3-rc1; nobody has reserved them. proto_v3/vfio/uapi.py has the
 * same definitions in Python.
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
 * Critical data is what the device needs before it can use any other data, and
 * what takes time to set up. Dirty data is the rest, in blocks. Every block has
 * one home: the dirty stream that carries it for the whole session.
 *
 * The user keeps the order of the bytes within each stream, and does not
 * interpret them. There is no order between streams: dependencies between them
 * are the target driver's business. The user must not let a waiting dirty
 * stream hold up the critical one.
 *
 * Epochs
 *   An epoch is a generation of critical data. A device starts in epoch 1. Each
 *   reconfiguration of the device that creates new critical data begins the
 *   next epoch. Epochs never decrease. A dirty record of epoch e depends on the
 *   critical data of all epochs up to e.
 *
 *   A new epoch keeps the dirty data of earlier epochs valid (KEEP), or makes
 *   it invalid (INVALIDATE) in the ranges of blocks that the epoch names. The
 *   driver's policy decides. KEEP: such data may be loaded whenever it arrives.
 *   INVALIDATE: the target driver drops it, including data still in flight. The
 *   source driver must therefore mark as dirty again every block of these
 *   ranges that it ever returned in an earlier epoch, not only unread ones.
 *   Otherwise a block in a dropped record would be lost.
 *
 * read()
 *   Returns records (struct vfio_mig_record), in pieces of any size. Waits
 *   while the device saves. In PRE_COPY and PRE_COPY_P2P it fails with ENOMSG
 *   when nothing is left for now. In STOP_COPY every stream ends with an END
 *   record, after which read() returns 0. Several threads may read different
 *   fds at the same time. EBADF on an fd that is being loaded, as for write()
 *   on one that is being saved.
 *
 * write()
 *   The driver loads the records that the bytes complete, inside the call. On a
 *   dirty fd it waits until the critical data that the records depend on is
 *   loaded. On the critical fd it never waits for a dirty stream. Bytes that
 *   differ from the source's stream put the device into ERROR, and the call
 *   fails with
 *     EXDEV	a record of another stream;
 *     EALREADY	a record that was written before;
 *     EILSEQ	a record that is too early: one before it is missing;
 *     EPROTO	bytes that are not the next ones of the record, that follow the
 *		END, or that wait for an epoch that never arrives; or a record
 *		of a class that the stream does not have;
 *     EBADMSG	an END whose counts or digest do not match.
 *
 * poll()
 *   EPOLLIN	there is data to read, or the stream is at its end;
 *   EPOLLPRI	on the critical fd only: the epoch grew since the last
 *		VFIO_MIG_GET_STREAM_INFO on it.
 *   So the user can wait for readiness, and need not query in a loop.
 *
 * close()
 *   On an fd that is being loaded, before its END was written: fails with
 *   ENODATA, and the device goes to ERROR. Otherwise it has no effect: the
 *   session ends with the state machine, not with its fds.
 *
 * Errors
 *   A device that fails on one stream is in ERROR. From then on every call on
 *   any of its streams fails with EIO, including calls that wait.
 *   VFIO_DEVICE_RESET ends the session, as in vfio.h.
 *
 *   VFIO_MIG_GET_PRECOPY_INFO fails with ENOTTY; VFIO_MIG_GET_STREAM_INFO
 *   replaces it.
 *
 *   SET_STATE out of RESUMING fails with ENODATA, and leaves the device in
 *   ERROR, if the END of any stream or the critical data of the newest epoch is
 *   missing. The source still has the guest at that time.
 */

/*
 * A flag of VFIO_DEVICE_FEATURE_MIGRATION: the device has
 * VFIO_DEVICE_FEATURE_MIG_STREAMS. The state machine does not depend on it.
 */
#define VFIO_MIGRATION_MULTI_STREAM	(1 << 3)

/**
 * VFIO_DEVICE_FEATURE_MIG_STREAMS - the number of streams of a session
 *
 * Upon VFIO_DEVICE_FEATURE_GET, read the maximum number of dirty streams of a
 * session, and the flags that the device knows.
 *
 * Upon VFIO_DEVICE_FEATURE_SET, select both for later sessions. The target must
 * select the same as the source, before it enters RESUMING; the user transports
 * the setting. dirty_streams 0 opts out. Without a SET, and after opting out,
 * the device behaves as one without this feature: one stream, no records, no
 * epochs.
 *
 * VFIO_MIG_STREAMS_BLOCKS: instead of the dirty streams there is one fd of
 * addressable blocks, see VFIO_MIG_GET_DIRTY_BLOCKS. dirty_streams must be 1.
 *
 * Valid in any state. Does not block.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * ENOTTY	the device does not have VFIO_MIGRATION_MULTI_STREAM;
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

/* 13 is VFIO_DEVICE_FEATURE_ZPCI_ERROR as of Linux 7.3-rc1. */
#define VFIO_DEVICE_FEATURE_MIG_STREAMS	14

/**
 * VFIO_MIG_GET_STREAM - _IO(VFIO_TYPE, VFIO_BASE + 22)
 *
 * This ioctl is used on the critical fd. It returns in fd the fd of dirty
 * stream index, counted from 0. With VFIO_MIG_STREAMS_BLOCKS, index 0 is the fd
 * of blocks. The user closes the fd; see close() above.
 *
 * The caller sets argsz, flags (none is defined: 0) and index. If no fd can be
 * returned, fd is -1, unless the structure itself was refused.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P, STOP_COPY and RESUMING. Does not block.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	argsz is larger than the caller's memory;
 * EINVAL	argsz is smaller than the structure, a flag is set, or there is
 *		no such stream;
 * ENOTTY	this is not the critical fd, or it is one of a session with a
 *		single stream;
 * EMFILE	the process has no room for another fd; it may try again;
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
 * On the critical fd these are the unread critical bytes. Once the guest is
 * stopped and the device is in PRE_COPY_P2P, the answer is final. The ioctl
 * clears EPOLLPRI there. In PRE_COPY, on a dirty fd of which everything is
 * read, it makes the driver save what became dirty since, as
 * VFIO_MIG_GET_PRECOPY_INFO does; read() does not.
 *
 * The caller sets argsz and flags (none is defined: 0); argsz is not changed.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	argsz is larger than the caller's memory;
 * EINVAL	argsz is smaller than the structure, a flag is set, or the
 *		device is in any other state;
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
 * pread() on the fd of blocks returns one BLOCKS record with the blocks as they
 * are now. It waits while the device saves them, and in PRE_COPY_P2P, where the
 * device saves nothing, until that state is left. The offset is the number of
 * the first block times block_bytes. The size is that of the record:
 * sizeof(struct vfio_mig_record) + sizeof(struct vfio_mig_record_blocks), and
 * 8 + block_bytes for each block. It fails with EINVAL for blocks that do not
 * exist, or that cannot be read before the device is stopped. Any number of
 * threads may call it at the same time.
 *
 * read() on the fd of blocks returns the END record in STOP_COPY, once every
 * block was read as it is then, and fails with ENOMSG before that. It returns
 * the whole END, or fails with EINVAL if there is no room for it.
 *
 * write() on the fd of blocks that is being loaded takes one whole record in
 * each call; otherwise it fails with EPROTO. Any number of threads may call it,
 * with the records in any order, except that the END is the last one. A block
 * that is older than the loaded one is dropped. The END fails with EBADMSG if
 * its digest is not that of the loaded versions.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	argsz, or blocks, is larger than the caller's memory;
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

/*
 * Records
 *
 * The format of the bytes on the fds, so that the drivers of source and target
 * agree on it. The user does not interpret records and may split the bytes
 * anywhere, except on the fd of blocks. Records follow each other without
 * padding or alignment. Numbers have the byte order of the machine.
 */

/**
 * struct vfio_mig_record - the header before the payload of each record
 *
 * @record_class: The kind of the record, VFIO_MIG_RECORD_*.
 * @stream: The stream of the record: 0 is the critical one, 1 + index a dirty
 *	one or that of the blocks.
 * @flags: VFIO_MIG_RECORD_F_*, in CRITICAL records only.
 * @epoch: The newest epoch when the record was saved.
 * @sequence: The number of the record in its stream, from 0, without gaps. The
 *	records of the fd of blocks may arrive in another order.
 * @length: Bytes of the payload, which follows.
 *
 * VFIO_MIG_RECORD_CRITICAL: critical data. Critical stream only.
 * VFIO_MIG_RECORD_DIRTY: blocks. The target driver loads the record once the
 * critical data of all epochs up to its own is loaded. It drops the blocks that
 * a later epoch made invalid.
 * VFIO_MIG_RECORD_END: the last record of a stream, in STOP_COPY; the payload
 * is struct vfio_mig_record_end.
 * VFIO_MIG_RECORD_BLOCKS: blocks with their versions, on the fd of blocks; the
 * payload begins with struct vfio_mig_record_blocks.
 *
 * VFIO_MIG_RECORD_F_EPOCH_COMPLETE: the last critical record of its epoch. When
 * it is loaded, the epoch is loaded.
 * VFIO_MIG_RECORD_F_INVALIDATES: the payload begins with
 * struct vfio_mig_record_ranges. Without it, earlier dirty data stays valid.
 */
struct vfio_mig_record {
	__u16	record_class;
#define VFIO_MIG_RECORD_CRITICAL	1
#define VFIO_MIG_RECORD_DIRTY		2
#define VFIO_MIG_RECORD_END		3
#define VFIO_MIG_RECORD_BLOCKS		4
	__u16	stream;
	__u32	flags;
#define VFIO_MIG_RECORD_F_EPOCH_COMPLETE	(1 << 0)
#define VFIO_MIG_RECORD_F_INVALIDATES		(1 << 1)
	__aligned_u64	epoch;
	__aligned_u64	sequence;
	__aligned_u64	length;
};

/**
 * struct vfio_mig_record_end - the payload of an END record
 *
 * @records: The number of records before this one in the stream.
 * @bytes: Their bytes, headers included.
 * @digest: A digest of them; the drivers define how it is computed.
 *
 * On the fd of blocks it describes all blocks of the device, as they are in
 * STOP_COPY: records is their number, bytes is 0, and digest is one of their
 * versions.
 *
 * The target driver refuses an END that does not match what was written, or on
 * the fd of blocks what is loaded (EBADMSG).
 */
struct vfio_mig_record_end {
	__aligned_u64	records;
	__aligned_u64	bytes;
	__aligned_u64	digest;
};

/**
 * struct vfio_mig_record_ranges - the dirty data that a new epoch makes invalid
 *
 * @count: The number of struct vfio_mig_block_range that follow. The critical
 *	data itself follows them.
 *
 * Each range has the epoch that makes it invalid. That is the epoch of the
 * record, or an earlier one that began since the last record that completed an
 * epoch.
 */
struct vfio_mig_record_ranges {
	__aligned_u64	count;
};

/**
 * struct vfio_mig_block_range - consecutive blocks that an epoch makes invalid
 *
 * @first_block: The number of the first block.
 * @blocks: The number of blocks.
 * @epoch: Data of these blocks is invalid if it is of an epoch before this one,
 *	whether it is written before or after the record with this range.
 */
struct vfio_mig_block_range {
	__aligned_u64	first_block;
	__aligned_u64	blocks;
	__aligned_u64	epoch;
};

/**
 * struct vfio_mig_record_blocks - the start of a BLOCKS record's payload
 *
 * @first_block: The number of the first block.
 * @blocks: The number of blocks, all consecutive.
 *
 * A __u64 version for each block follows, then the data of all blocks. The
 * version of a block never decreases: of two records with the same block, the
 * one with the higher version has the current data.
 */
struct vfio_mig_record_blocks {
	__aligned_u64	first_block;
	__aligned_u64	blocks;
};

#endif /* _UAPI_VFIO_V3_H */
