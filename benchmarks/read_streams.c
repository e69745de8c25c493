// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * read_streams READ_BYTES FD...: read each fd to its end, in a thread each, and
 * print what each thread took, a line a thread.
 *
 * A line: fd, errno of the last read() (0: the end), bytes, read() calls, begin
 * and end (CLOCK_MONOTONIC, ns), voluntary and involuntary context switches,
 * user and system time (ns). All threads begin at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

struct reader {
	pthread_t thread;
	int fd;
	int error;
	char *buffer;
	unsigned long long bytes, calls, begin_ns, end_ns, user_ns, system_ns;
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
	me->begin_ns = now_ns();
	do {
		got = read(me->fd, me->buffer, read_bytes);
		me->calls++;
		if (got > 0)
			me->bytes += got;
	} while (got > 0 || (got < 0 && errno == EINTR));
	me->end_ns = now_ns();
	me->error = got < 0 ? errno : 0;
	getrusage(RUSAGE_THREAD, &after);
	me->voluntary = after.ru_nvcsw - before.ru_nvcsw;
	me->involuntary = after.ru_nivcsw - before.ru_nivcsw;
	me->user_ns = ns(after.ru_utime) - ns(before.ru_utime);
	me->system_ns = ns(after.ru_stime) - ns(before.ru_stime);
	return NULL;
}

int main(int argc, char **argv)
{
	int count = argc - 2;
	struct reader *readers;

	if (count < 1 || !(read_bytes = strtoull(argv[1], NULL, 10))) {
		fprintf(stderr, "usage: read_streams READ_BYTES FD...\n");
		return 2;
	}
	readers = calloc(count, sizeof(*readers));
	if (!readers || pthread_barrier_init(&together, NULL, count))
		return 1;
	for (int i = 0; i < count; i++) {
		readers[i].fd = atoi(argv[2 + i]);
		readers[i].buffer = malloc(read_bytes);
		if (!readers[i].buffer)
			return 1;
		memset(readers[i].buffer, 1, read_bytes); /* its pages are there before the first read() */
		if (pthread_create(&readers[i].thread, NULL, read_to_end, &readers[i]))
			return 1;
	}
	for (int i = 0; i < count; i++)
		pthread_join(readers[i].thread, NULL);
	for (int i = 0; i < count; i++) {
		struct reader *r = &readers[i];

		printf("%d %d %llu %llu %llu %llu %ld %ld %llu %llu\n", r->fd, r->error, r->bytes, r->calls,
		       r->begin_ns, r->end_ns, r->voluntary, r->involuntary, r->user_ns, r->system_ns);
	}
	return 0;
}
