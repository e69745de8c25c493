/* SPDX-License-Identifier: GPL-2.0 */
/* The parameters of a device: those of the module when the device is created. */
#ifndef VFIO_V3_SAMPLE_PARAMS_H
#define VFIO_V3_SAMPLE_PARAMS_H

#include <linux/types.h>

struct seq_file;

enum { SAMPLE_LOCK_FD, SAMPLE_LOCK_DEVICE, SAMPLE_LOCK_GLOBAL };
enum { SAMPLE_OVER_COMMAND, SAMPLE_OVER_COPY };
enum { SAMPLE_INITIAL_IMAGE, SAMPLE_INITIAL_CRITICAL };
enum { SAMPLE_EPOCHS_KEEP, SAMPLE_EPOCHS_INVALIDATE };

#define SAMPLE_MAX_US	60000000

/*
 * X(name, default, least, most, names of the values or NULL, whether it can be
 * changed after the device was created, text)
 */
#define SAMPLE_PARAMS(X)									\
	X(size_kib, 4096, 4, 64 << 20, NULL, false,						\
	  "KiB of a device's state, beside critical data; a multiple of block_kib")		\
	X(block_kib, 16, 4, 16384, NULL, false, "KiB of a block, in which state is dirtied")	\
	X(critical_kib, 64, 1, 16384, NULL, false, "KiB of critical data")			\
	X(dirty_kib_s, 0, 0, 16 << 20, NULL, true,						\
	  "KiB a second that the device itself writes in RUNNING and PRE_COPY")			\
	X(streams, 8, 0, 64, NULL, false, "most dirty streams of a session; 0: no v3")		\
	X(lock, SAMPLE_LOCK_FD, 0, 2, sample_lock_names, false,					\
	  "what a mutex is for: each fd, a device, or global, all devices")			\
	X(lock_over, SAMPLE_OVER_COPY, 0, 1, sample_lock_over_names, true,			\
	  "what that mutex is held over: a firmware command and the copy, or only the copy")	\
	X(save_mib_s, 0, 0, 1 << 20, NULL, true, "MiB/s of one engine that saves; 0: no delay")	\
	X(load_mib_s, 0, 0, 1 << 20, NULL, true, "MiB/s of one engine that loads; 0: no delay")	\
	X(engines, 8, 1, 1024, NULL, true, "commands of a device that run at the same time")	\
	X(command_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us that each command takes beside")	\
	X(chunk_kib, 1024, 4, 16384, NULL, true,						\
	  "KiB that a command saves, which is a record; at least one block")			\
	X(chunks, 2, 1, 64, NULL, true, "records that a stream saves ahead of read()")		\
	X(record_limit_kib, 0, 0, 65536, NULL, true,						\
	  "KiB of the longest payload loaded; 0: of the longest that it would save itself")	\
	X(epochs, SAMPLE_EPOCHS_KEEP, 0, 1, sample_epochs_names, true,				\
	  "what a new epoch does to dirty data saved before: keep, or invalidate it")		\
	X(invalidate_first, 0, 0, U32_MAX, NULL, true, "the first block that becomes invalid")	\
	X(invalidate_blocks, U32_MAX, 1, U32_MAX, NULL, true,					\
	  "the number of blocks that become invalid; more than there are: all that follow")	\
	X(critical_setup_us, 0, 0, SAMPLE_MAX_US, NULL, true,					\
	  "us to set up what a critical record has, at the target")				\
	X(quiesce_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us of an arc into a P2P state")		\
	X(suspend_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us from pre-copy into STOP_COPY")	\
	X(stop_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us of an arc into STOP from a running one")\
	X(resume_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us of an arc out of STOP to a running one")\
	X(run_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us of an arc out of a P2P state, to run")	\
	X(load_finish_us, 0, 0, SAMPLE_MAX_US, NULL, true, "us of RESUMING to STOP")		\
	X(precopy, 1, 0, 1, NULL, false, "1: has PRE_COPY")					\
	X(p2p, 1, 0, 1, NULL, false, "1: has the P2P states")					\
	X(blocks, 1, 0, 1, NULL, false, "1: has addressable blocks")				\
	X(info_v2, 1, 0, 1, NULL, true, "1: reports REINIT to a user who opted in")		\
	X(initial, SAMPLE_INITIAL_IMAGE, 0, 1, sample_initial_names, true,			\
	  "v2's initial_bytes: the first image, or only the critical data in it")		\
	X(data_size, 1, 0, 2, NULL, true,							\
	  "MIG_DATA_SIZE: 0 fails, 1 what is left, 2 always a whole image")			\
	X(dirty_log, 1, 0, 1, NULL, false, "1: has DMA logging")				\
	X(reinit_at, 0, 0, U32_MAX, NULL, true,							\
	  "reconfigure before that PRECOPY_INFO of a session, from 1; 0: never")		\
	X(zero_end, 0, 0, 1, NULL, true, "1: read() returns 0 at pre-copy's end, not ENOMSG")	\
	X(log_lines, 16384, 16, 1 << 20, NULL, false, "lines that the log keeps")		\
	X(log_polls, 0, 0, 1, NULL, true, "1: log poll(), too")					\
	X(log_us, 0, 0, 1, NULL, true, "1: add to each line how long the call took")

#define SAMPLE_FAULT_BYTES	32

struct sample_params {
#define X(name, ...) u32 name;
	SAMPLE_PARAMS(X)
#undef X
	char fault[SAMPLE_FAULT_BYTES];	/* "call:number" */
};

extern struct sample_params sample_defaults;

int sample_params_check(const struct sample_params *params);
void sample_params_show(struct seq_file *file, const struct sample_params *params);
int sample_params_change(struct sample_params *params, char *text);

#endif
