/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * VFIO device migration with several streams: the bytes of the streams
 *
 * EXPERIMENTAL, as vfio_v3.h is. This is not a uAPI. It is between the drivers
 * of one kind of device, which may as well use a format of their own: the user
 * passes the bytes on, never looks at them, and may split them anywhere, except
 * on the fd of blocks. The simulated device and the sample driver in
 * kernel/driver use this one. proto_v3/vfio/uapi.py has the same definitions in
 * Python.
 *
 * A stream is records, which follow each other without padding or alignment.
 * Numbers are little-endian, because source and target may be different
 * machines.
 */
#ifndef _VFIO_V3_STREAM_H
#define _VFIO_V3_STREAM_H

#include <linux/types.h>

/**
 * struct vfio_mig_record - the header before the payload of each record
 *
 * @record_class: The kind of the record, VFIO_MIG_RECORD_*.
 * @stream: The stream of the record: 0 is the critical one, 1 + index a dirty
 *	one or that of the blocks.
 * @flags: VFIO_MIG_RECORD_F_*, in CRITICAL records only.
 * @epoch: The newest epoch when the record was saved, from 1.
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
 * Optional: a driver that never makes data invalid refuses it (EPROTO).
 *
 * Limits. The target driver checks each number as soon as it has it, before it
 * takes the data that follows or allocates memory for it. It refuses with
 *   E2BIG	a length above that of the longest record that it would save
 *		itself, a number of blocks or ranges above what its device has,
 *		or, once an epoch is loaded, one that is more than
 *		VFIO_MIG_MAX_EPOCHS_AHEAD ahead of it: such a record would only
 *		keep a writer waiting;
 *   EPROTO	a class, flag, or length that the stream cannot have, epoch 0, a
 *		block that the device does not have;
 *   ENOMEM	a record for which there is no memory. It is charged to the
 *		writing process (GFP_KERNEL_ACCOUNT).
 * A stream needs memory for one record, so a session for 1 + dirty_streams.
 */
struct vfio_mig_record {
	__le16	record_class;
#define VFIO_MIG_RECORD_CRITICAL	1
#define VFIO_MIG_RECORD_DIRTY		2
#define VFIO_MIG_RECORD_END		3
#define VFIO_MIG_RECORD_BLOCKS		4
	__le16	stream;
	__le32	flags;
#define VFIO_MIG_RECORD_F_EPOCH_COMPLETE	(1 << 0)
#define VFIO_MIG_RECORD_F_INVALIDATES		(1 << 1)
	__le64	epoch;
#define VFIO_MIG_MAX_EPOCHS_AHEAD	65536
	__le64	sequence;
	__le64	length;
};

/**
 * struct vfio_mig_record_end - the payload of an END record
 *
 * @records: The number of records before this one in the stream.
 * @bytes: Their bytes, headers included.
 * @digest: A digest of what describes the data in them: headers, and numbers of
 *	blocks. The data itself is not part of it: that would be another pass
 *	over all of it, on the way that makes the downtime, and v2 has none. The
 *	drivers define how it is computed.
 *
 * On the fd of blocks it describes all blocks of the device, as they are in
 * STOP_COPY: records is their number, bytes is 0, and digest is one of their
 * versions.
 *
 * The target driver refuses an END that does not match what was written, or on
 * the fd of blocks what is loaded (EBADMSG).
 */
struct vfio_mig_record_end {
	__le64	records;
	__le64	bytes;
	__le64	digest;
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
 *
 * Expensive: the source sends all blocks of the ranges again, whatever of them
 * the target has, because it cannot know.
 */
struct vfio_mig_record_ranges {
	__le64	count;
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
	__le64	first_block;
	__le64	blocks;
	__le64	epoch;
};

/**
 * struct vfio_mig_record_blocks - the start of a BLOCKS record's payload
 *
 * @first_block: The number of the first block.
 * @blocks: The number of blocks, all consecutive.
 *
 * A __le64 version for each block follows, then the data of all blocks. The
 * version of a block never decreases: of two records with the same block, the
 * one with the higher version has the current data.
 */
struct vfio_mig_record_blocks {
	__le64	first_block;
	__le64	blocks;
};

#endif /* _VFIO_V3_STREAM_H */
