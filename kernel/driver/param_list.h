/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The parameters: SAMPLE_PARAM(name, default, least, most, names of the values or
 * NULL, whether a device's can be changed later, text). Whoever includes this has
 * defined what it wants of them.
 */
SAMPLE_PARAM(size_kib, 4096, 4, 64 << 20, NULL, false,
	     "KiB of a device's state, beside critical data; a multiple of block_kib");
SAMPLE_PARAM(block_kib, 16, 4, 16384, NULL, false,
	     "KiB of a block, in which state is dirtied");
SAMPLE_PARAM(critical_kib, 64, 1, 16384, NULL, false,
	     "KiB of critical data");
SAMPLE_PARAM(dirty_kib_s, 0, 0, 16 << 20, NULL, true,
	     "KiB a second that the device itself writes in RUNNING and PRE_COPY");
SAMPLE_PARAM(streams, 8, 0, 64, NULL, false,
	     "most dirty streams of a session; 0: no v3");
SAMPLE_PARAM(lock, SAMPLE_LOCK_FD, 0, 2, sample_lock_names, false,
	     "what a mutex is for: each fd, a device, or global, all devices");
SAMPLE_PARAM(lock_over, SAMPLE_OVER_COPY, 0, 1, sample_lock_over_names, true,
	     "what that mutex is held over: a firmware command and the copy, or only the copy");
SAMPLE_PARAM(save_mib_s, 0, 0, 1 << 20, NULL, true,
	     "MiB/s of one engine that saves; 0: no delay");
SAMPLE_PARAM(load_mib_s, 0, 0, 1 << 20, NULL, true,
	     "MiB/s of one engine that loads; 0: no delay");
SAMPLE_PARAM(engines, 8, 1, 1024, NULL, true,
	     "commands of a device that run at the same time");
SAMPLE_PARAM(firmware, 0, 0, SAMPLE_FIRMWARES, NULL, false,
	     "whose engines: 0, the device's own; else those of all devices with this number");
SAMPLE_PARAM(command_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us that each command takes beside");
SAMPLE_PARAM(chunk_kib, 1024, 4, 16384, NULL, true,
	     "KiB that a command saves, which is a record; at least one block");
SAMPLE_PARAM(chunks, 2, 1, 64, NULL, true,
	     "records that a stream saves ahead of read()");
SAMPLE_PARAM(record_limit_kib, 0, 0, 65536, NULL, true,
	     "KiB of the longest payload loaded; 0: of the longest that it would save itself");
SAMPLE_PARAM(epochs, SAMPLE_EPOCHS_KEEP, 0, 1, sample_epochs_names, true,
	     "what a new epoch does to dirty data saved before: keep, or invalidate it");
SAMPLE_PARAM(invalidate_first, 0, 0, U32_MAX, NULL, true,
	     "the first block that becomes invalid");
SAMPLE_PARAM(invalidate_blocks, U32_MAX, 1, U32_MAX, NULL, true,
	     "the number of blocks that become invalid; more than there are: all that follow");
SAMPLE_PARAM(critical_setup_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us to set up what a critical record has, at the target");
SAMPLE_PARAM(quiesce_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us of an arc into a P2P state");
SAMPLE_PARAM(suspend_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us from pre-copy into STOP_COPY");
SAMPLE_PARAM(stop_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us of an arc into STOP from a running one");
SAMPLE_PARAM(resume_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us of an arc out of STOP to a running one");
SAMPLE_PARAM(run_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us of an arc out of a P2P state, to run");
SAMPLE_PARAM(load_finish_us, 0, 0, SAMPLE_MAX_US, NULL, true,
	     "us of RESUMING to STOP");
SAMPLE_PARAM(precopy, 1, 0, 1, NULL, false,
	     "1: has PRE_COPY");
SAMPLE_PARAM(p2p, 1, 0, 1, NULL, false,
	     "1: has the P2P states");
SAMPLE_PARAM(blocks, 1, 0, 1, NULL, false,
	     "1: has addressable blocks");
SAMPLE_PARAM(info_v2, 1, 0, 1, NULL, true,
	     "1: reports REINIT to a user who opted in");
SAMPLE_PARAM(initial, SAMPLE_INITIAL_IMAGE, 0, 1, sample_initial_names, true,
	     "v2's initial_bytes: the first image, or only the critical data in it");
SAMPLE_PARAM(reinit, SAMPLE_REINIT_FLUSH, 0, 1, sample_reinit_names, true,
	     "v2's new critical data: behind what is unread (flush), or before (priority)");
SAMPLE_PARAM(data_size, 1, 0, 2, NULL, true,
	     "MIG_DATA_SIZE: 0 fails, 1 what is left, 2 always a whole image");
SAMPLE_PARAM(dirty_log, 1, 0, 1, NULL, false,
	     "1: has DMA logging");
SAMPLE_PARAM(reinit_at, 0, 0, U32_MAX, NULL, true,
	     "reconfigure before that PRECOPY_INFO of a session, from 1; 0: never");
SAMPLE_PARAM(zero_end, 0, 0, 1, NULL, true,
	     "1: read() returns 0 at pre-copy's end, not ENOMSG");
SAMPLE_PARAM(log_lines, 16384, 16, 1 << 20, NULL, false,
	     "lines that the log keeps");
SAMPLE_PARAM(log_polls, 0, 0, 1, NULL, true,
	     "1: log poll(), too");

#undef SAMPLE_PARAM
