// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * read_streams READ_BYTES STREAMS WAIT DEVICE_FD...: put the devices into
 * STOP_COPY and read each of their data fds to its end, in a thread each.
 *
 * STREAMS is the number of dirty fds of a device that opted in to so many, or 0
 * under v2. If WAIT is 1, it prints "stopped" when the devices are, and reads
 * when it is given a line.
 *
 * Then it prints the time when it began (CLOCK_MONOTONIC, ns): before the first
 * SET_STATE, or, with WAIT, before the first read(). And a line a thread: errno
 * of the last read() (0: the end), bytes, read() calls, time of the end, voluntary
 * and involuntary context switches, user and system time (ns). The threads are
 * there, with their buffers, before anything is timed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <linux/vfio.h>

#include "vfio_v3.h"

struct reader {
	pthread_t thread;
	int fd;
	int error;
	char *buffer;
	unsigned long long bytes, calls, end_ns, user_ns, system_ns;
	long voluntary, involuntary;
};

static size_t read_bytes;
static pthread_barrier_t together;

static unsigned long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static unsigned long long ns(struct timeval time)
{
	return time.tv_sec * 1000000000ULL + time.tv_usec * 1000ULL;
}

static void *read_to_end(void *argument)
{
	struct reader *me = argument;
	struct rusage before, after;
	ssize_t got;

	pthread_barrier_wait(&together);
	getrusage(RUSAGE_THREAD, &before);
	do {
		got = read(me->fd, me->buffer, read_bytes);
		me->calls++;
		if (got > 0)
			me->bytes += got;
	} while (got > 0 || (got < 0 && errno == EINTR));
	me->error = got < 0 ? errno : 0;
	me->end_ns = now_ns();
	getrusage(RUSAGE_THREAD, &after);
	me->voluntary = after.ru_nvcsw - before.ru_nvcsw;
	me->involuntary = after.ru_nivcsw - before.ru_nivcsw;
	me->user_ns = ns(after.ru_utime) - ns(before.ru_utime);
	me->system_ns = ns(after.ru_stime) - ns(before.ru_stime);
	return NULL;
}

/* STOP_COPY; v2's data fd, or v3's critical one. */
static int stop(int device)
{
	struct {
		struct vfio_device_feature feature;
		struct vfio_device_feature_mig_state state;
	} set = {
		.feature = {
			.argsz = sizeof(set),
			.flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET,
		},
		.state = { .device_state = VFIO_DEVICE_STATE_STOP_COPY, .data_fd = -1 },
	};

	if (ioctl(device, VFIO_DEVICE_FEATURE, &set)) {
		perror("SET_STATE");
		exit(1);
	}
	return set.state.data_fd;
}

static int get_stream(int critical, int index)
{
	struct vfio_mig_get_stream get = { .argsz = sizeof(get), .index = index };

	if (ioctl(critical, VFIO_MIG_GET_STREAM, &get)) {
		perror("GET_STREAM");
		exit(1);
	}
	return get.fd;
}

static int start(struct reader *reader)
{
	reader->buffer = malloc(read_bytes);
	if (!reader->buffer)
		return ENOMEM;
	memset(reader->buffer, 1, read_bytes); /* its pages are there before the first read() */
	return pthread_create(&reader->thread, NULL, read_to_end, reader);
}

int main(int argc, char **argv)
{
	unsigned long long begin_ns;
	int streams, waits, count;
	struct reader *readers;

	if (argc < 5) {
		fprintf(stderr, "usage: read_streams READ_BYTES STREAMS WAIT DEVICE_FD...\n");
		return 2;
	}
	read_bytes = strtoull(argv[1], NULL, 10);
	streams = atoi(argv[2]);
	waits = atoi(argv[3]);
	count = (argc - 4) * (1 + streams);
	readers = calloc(count, sizeof(*readers));
	if (!readers || !read_bytes || pthread_barrier_init(&together, NULL, count + 1))
		return 1;
	for (int i = 0; i < count; i++) {
		if (start(&readers[i]))
			return 1;
	}
	begin_ns = now_ns();
	for (int i = 0; i < count; i += 1 + streams) {
		readers[i].fd = stop(atoi(argv[4 + i / (1 + streams)]));
		for (int j = 0; j < streams; j++)
			readers[i + 1 + j].fd = get_stream(readers[i].fd, j);
	}
	if (waits) {
		puts("stopped");
		fflush(stdout);
		if (getchar() == EOF)
			return 1;
		begin_ns = now_ns();
	}
	pthread_barrier_wait(&together);
	for (int i = 0; i < count; i++)
		pthread_join(readers[i].thread, NULL);
	printf("%llu\n", begin_ns);
	for (int i = 0; i < count; i++) {
		struct reader *r = &readers[i];

		printf("%d %llu %llu %llu %ld %ld %llu %llu\n", r->error, r->bytes, r->calls, r->end_ns, r->voluntary,
		       r->involuntary, r->user_ns, r->system_ns);
	}
	return 0;
}
