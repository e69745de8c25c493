/* SPDX-License-Identifier: GPL-2.0 */
/* The bytes of a stream: records, little-endian. They cross hosts. */
#ifndef VFIO_V3_SAMPLE_FORMAT_H
#define VFIO_V3_SAMPLE_FORMAT_H

#include <linux/types.h>

enum {
	SAMPLE_CRITICAL = 1,
	SAMPLE_DIRTY = 2,
	SAMPLE_END = 3,
};

#define SAMPLE_F_EPOCH_COMPLETE	BIT(0)

struct sample_record {
	__le16 record_class;
	__le16 stream;
	__le32 flags;
	__le64 epoch;
	__le64 sequence;
	__le64 length;
};

/* The payload of an END. */
struct sample_end {
	__le64 records;
	__le64 bytes;
	__le64 digest;
};

/* The start of a DIRTY record's payload. Numbers of blocks follow, then the blocks. */
struct sample_dirty {
	__le64 count;
	__le64 block[];
};

#endif
