/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * VFIO device migration with several streams: additions to
 * include/uapi/linux/vfio.h
 *
 * EXPERIMENTAL. No kernel has any of this. The numbers are the next ones that
 * are free in Linux 7.3-rc1; nobody has reserved them. proto_v3/vfio/uapi.py has the
 * same definitions in Python.
 *
 * What is not said here is as in vfio.h: the states and their arcs, and
 * everything that a user sees who does not opt in.
 */
#ifndef _UAPI_VFIO_V3_H
#define _UAPI_VFIO_V3_H

#include <linux/types.h>
#include <linux/ioctl.h>

/* As in vfio.h; it may be included too, before this header or after it. */
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
 * one or more dirty ones, each with an fd of its own, all saved or all loaded.
 * The arcs that begin a session return the critical fd as data_fd;
 * VFIO_MIG_GET_STREAM on it gives the others. They all end with the session:
 * after that every call on any of them fails with ENODEV.
 *
 * Critical data is what the device needs before it can use any other, and what
 * takes time to set up; dirty data is the rest, in blocks. Every block has one
 * home: the dirty stream that carries it for the whole session.
 *
 * The user keeps the order of the bytes within each stream, and looks into none
 * of them. It owes no order across streams: what depends on what is the target
 * driver's business. It must not let a dirty stream that waits hold up the
 * critical one.
 *
 * Epochs
 *   An epoch is a generation of critical data. A device begins in epoch 1; each
 *   reconfiguration of it that makes new critical data begins the next one.
 *   Epochs only grow. A dirty record of epoch e depends on the critical data of
 *   all epochs up to e.
 *
 *   A new epoch leaves the dirty data of earlier ones valid (KEEP), or not
 *   (INVALIDATE), by the driver's policy, for the ranges of blocks that the
 *   epoch names. KEEP: such data may be loaded whenever it arrives. INVALIDATE:
 *   the target driver drops it, also what was still on its way. The source
 *   driver must therefore mark as dirty again every block of these ranges that
 *   it ever gave out in an earlier epoch, and not only what is unread: a record
 *   that is dropped would else be a block that is lost.
 *
 * read()
 *   Gives records, as struct vfio_mig_record has them, in pieces of any size.
 *   It waits while the device saves. In PRE_COPY and PRE_COPY_P2P it fails with
 *   ENOMSG when there is nothing left for now. In STOP_COPY every stream ends
 *   with an END record, and read() then returns 0. Several threads may read
 *   different fds at the same time. EBADF on an fd that is loaded, as for
 *   write() on one that is saved.
 *
 * write()
 *   The driver loads what the bytes complete, inside the call. On a dirty fd it
 *   waits until the critical data is loaded that the records depend on. On the
 *   critical fd it never waits for a dirty one. What is not the stream that the
 *   source gave puts the device into ERROR, and fails with
 *     EXDEV	a record of another stream;
 *     EALREADY	a record that came before;
 *     EILSEQ	a record that comes too early: one before it is missing;
 *     EPROTO	bytes that are not the next ones of the record, or that follow
 *		the END, or that wait for an epoch that never came; or a record
 *		of a class that the stream does not have;
 *     EBADMSG	an END whose counts or digest are not those of what came.
 *
 * poll()
 *   EPOLLIN	there is something to read, or the stream is at its end;
 *   EPOLLPRI	on the critical fd only: the epoch grew since the last
 *		VFIO_MIG_GET_STREAM_INFO on it.
 *   The user can so wait for readiness, and need not ask in a loop.
 *
 * close()
 *   Of an fd that is being loaded, before its END was written: it fails with
 *   ENODATA, and the device goes into ERROR. In all other cases nothing
 *   happens: the session ends with the state machine, not with its fds.
 *
 * Errors
 *   A device that fails on one stream is in ERROR, and every call on any of its
 *   streams fails with EIO from then on, those that wait included.
 *   VFIO_DEVICE_RESET ends the session, as in vfio.h.
 *
 *   VFIO_MIG_GET_PRECOPY_INFO fails with ENOTTY: VFIO_MIG_GET_STREAM_INFO is in
 *   its place.
 *
 *   SET_STATE out of RESUMING fails with ENODATA, and leaves the device in
 *   ERROR, if the END of any stream or the critical data of the newest epoch is
 *   not there. The source still has the guest then.
 */

/*
 * A flag of VFIO_DEVICE_FEATURE_MIGRATION: the device has
 * VFIO_DEVICE_FEATURE_MIG_STREAMS. The state machine does not depend on it.
 */
#define VFIO_MIGRATION_MULTI_STREAM	(1 << 3)

/**
 * VFIO_DEVICE_FEATURE_MIG_STREAMS - how many streams a session has
 *
 * Upon VFIO_DEVICE_FEATURE_GET, read the most dirty streams that a session can
 * have, and which flags the device knows.
 *
 * Upon VFIO_DEVICE_FEATURE_SET, choose both for the sessions to come. The
 * target has to choose what the source did, before it enters RESUMING; the user
 * carries the choice there. dirty_streams 0 opts out. Without a SET, and after
 * opting out, the device is one without this feature: one stream, no records,
 * no epochs.
 *
 * VFIO_MIG_STREAMS_BLOCKS: in place of the dirty streams there is one fd of
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
#define VFIO_MIG_STREAMS_BLOCKS	(1 << 0) /* Blocks in place of dirty streams */
};

/* 13 is VFIO_DEVICE_FEATURE_ZPCI_ERROR as of Linux 7.3-rc1. */
#define VFIO_DEVICE_FEATURE_MIG_STREAMS	14

/**
 * VFIO_MIG_GET_STREAM - _IO(VFIO_TYPE, VFIO_BASE + 22)
 *
 * This ioctl is used on the critical fd. It returns in fd the fd of dirty
 * stream index, counted from 0. With VFIO_MIG_STREAMS_BLOCKS, index 0 is the fd
 * of blocks. The user closes it; see above for when it may.
 *
 * The caller sets argsz, flags (none is defined: 0) and index. Where no fd can
 * be returned, fd is -1, unless the structure itself was refused.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P, STOP_COPY and RESUMING. Does not block.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	argsz is more than the caller's memory;
 * EINVAL	argsz is less than the structure, a flag is set, or there is no
 *		such stream;
 * ENOTTY	this is not the critical fd, or one of a session with a single
 *		stream;
 * EMFILE	the process has no room for one more fd; it may try again;
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
 * This ioctl is used on the fd of any stream that is saved. It returns
 *
 * epoch		the newest epoch that the device has begun; 1 until the device
 *			is stopped, if it gives nothing of its state before;
 * pending_bytes	the unread bytes of this stream, those that wait to be
 *			saved included.
 *
 * On the critical fd that is what is critical and unread: once the guest is
 * stopped and the device in PRE_COPY_P2P, the answer is final. The ioctl clears
 * EPOLLPRI there. In PRE_COPY, on a dirty fd of which all is read, it makes the
 * driver save what became dirty since, as VFIO_MIG_GET_PRECOPY_INFO does;
 * read() does not.
 *
 * The caller sets argsz and flags (none is defined: 0); argsz stays as it is.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	argsz is more than the caller's memory;
 * EINVAL	argsz is less than the structure, a flag is set, or the device
 *		is in any other state;
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
 * This ioctl is used on the fd of blocks that is saved. It tells which blocks
 * changed since the last call; the first call tells of all that can be read. A
 * block that was told of is the user's to read. It is told of again only if it
 * changes again, or if a new epoch makes it invalid.
 *
 * The caller sets argsz, flags (none is defined: 0), bitmap, which is the
 * address of the bitmap, and blocks, which is for how many bits there is room.
 * Block b is bit b % 8, the lowest one being 0, of byte b / 8. Bits are only
 * set in the bitmap, none is cleared. block_bytes and blocks are answered: the
 * size of a block and how many the device has. They are answered also where the
 * room is too small, so that a first call with blocks 0 asks for them. The room
 * is looked at before the driver tells of anything: no block is lost by it.
 *
 * After EFAULT the user should take every block for dirty, as for
 * VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: what the driver told of may be lost.
 *
 * pread() on the fd of blocks gives one BLOCKS record with blocks as they are
 * now. It waits while the device saves them, and in PRE_COPY_P2P, where it
 * saves nothing, until that state is left. Its offset is the number of the
 * first block times block_bytes; its size is that of the record, sizeof(struct
 * vfio_mig_record) + sizeof(struct vfio_mig_record_blocks) and 8 + block_bytes
 * for each block. It fails with EINVAL for blocks that do not exist, or that
 * cannot be read before the device is stopped. Any number of threads may call
 * it at the same time.
 *
 * read() on the fd of blocks gives the END record in STOP_COPY, once every
 * block was read as it is then, and fails with ENOMSG before that. It gives the
 * END whole, or fails with EINVAL where there is no room for it.
 *
 * write() on the fd of blocks that is loaded takes one whole record a call,
 * else it fails with EPROTO. Any number of threads may call it, with the
 * records in any order but for the END, which is the last one. A block that is
 * older than the one that is there is dropped. The END fails with EBADMSG if
 * its digest is not that of the versions that are there.
 *
 * Valid in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
 *
 * Return: 0 on success, -1 and errno set on failure:
 * EFAULT	argsz, or blocks, is more than the caller's memory;
 * EINVAL	argsz is less than the structure, a flag is set, or blocks is
 *		less than the device has;
 * EBADF	this is the fd of blocks of a session that is loaded;
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
 * What the fds give and take, so that the source's and the target's driver
 * agree on it. The user does not look inside, and may cut the bytes anywhere,
 * but for those of the fd of blocks. Records follow each other without padding,
 * and are aligned to nothing. Numbers have the byte order of the machine.
 */

/**
 * struct vfio_mig_record - what is before the payload of each record
 *
 * @record_class: What the record is, VFIO_MIG_RECORD_*.
 * @stream: The stream it belongs to: 0 is the critical one, 1 + index a dirty
 *	one or that of the blocks.
 * @flags: VFIO_MIG_RECORD_F_*, in CRITICAL records only.
 * @epoch: The newest epoch when the record was saved.
 * @sequence: Its number in its stream, from 0, without gaps. Those of the fd of
 *	blocks may come in another order.
 * @length: Bytes of the payload, which follows.
 *
 * VFIO_MIG_RECORD_CRITICAL: critical data. Critical stream only.
 * VFIO_MIG_RECORD_DIRTY: blocks. The target driver loads it once the critical
 * data of all epochs up to its own is loaded, and drops of it what a later
 * epoch has made invalid.
 * VFIO_MIG_RECORD_END: the last record of a stream, in STOP_COPY; the payload
 * is struct vfio_mig_record_end.
 * VFIO_MIG_RECORD_BLOCKS: blocks with their versions, of the fd of blocks; the
 * payload begins with struct vfio_mig_record_blocks.
 *
 * VFIO_MIG_RECORD_F_EPOCH_COMPLETE: the last critical record of its epoch. Once
 * it is loaded, so is the epoch.
 * VFIO_MIG_RECORD_F_INVALIDATES: the payload begins with
 * struct vfio_mig_record_ranges. Without it, earlier dirty data is kept.
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
 * @records: How many records came before this one in the stream.
 * @bytes: Their bytes, headers included.
 * @digest: A digest of them; how it is made is between the drivers.
 *
 * On the fd of blocks it tells of all blocks of the device instead, as they are
 * in STOP_COPY: records is how many there are, bytes is 0, and digest is one of
 * their versions.
 *
 * The target driver refuses an END that differs from what came, or on the fd of
 * blocks from what is there (EBADMSG).
 */
struct vfio_mig_record_end {
	__aligned_u64	records;
	__aligned_u64	bytes;
	__aligned_u64	digest;
};

/**
 * struct vfio_mig_record_ranges - which dirty data a new epoch makes invalid
 *
 * @count: How many struct vfio_mig_block_range follow. The critical data itself
 *	is after them.
 *
 * Each range has the epoch that makes it invalid. That is the record's, or an
 * earlier one that began since the last record that told of an epoch.
 */
struct vfio_mig_record_ranges {
	__aligned_u64	count;
};

/**
 * struct vfio_mig_block_range - consecutive blocks that an epoch makes invalid
 *
 * @first_block: The number of the first one.
 * @blocks: How many.
 * @epoch: Data of these blocks is invalid if it is of an epoch before this one,
 *	whether it came before the record that tells of it or comes after it.
 */
struct vfio_mig_block_range {
	__aligned_u64	first_block;
	__aligned_u64	blocks;
	__aligned_u64	epoch;
};

/**
 * struct vfio_mig_record_blocks - the beginning of a BLOCKS record's payload
 *
 * @first_block: The number of the first block.
 * @blocks: How many, all consecutive.
 *
 * A __u64 version for each block follows, then the data of all of them. A
 * block's version only grows: of two records with the same block, that with the
 * higher version has it as it is.
 */
struct vfio_mig_record_blocks {
	__aligned_u64	first_block;
	__aligned_u64	blocks;
};

#endif /* _UAPI_VFIO_V3_H */
