// SPDX-License-Identifier: GPL-2.0
/*
 * The emulated firmware: commands that take time, and as many of them at once as
 * it has engines. The mutex that a stream's copies, or its commands too, take.
 * Faults.
 */
#include <linux/hrtimer.h>
#include <linux/ktime.h>
#include <linux/sched.h>
#include <linux/string.h>

#include "sample.h"

/* Of the firmwares that several devices have. */
static struct sample_engines sample_firmwares[SAMPLE_FIRMWARES];

void sample_firmwares_init(void)
{
	u32 i;

	for (i = 0; i < SAMPLE_FIRMWARES; i++)
		init_waitqueue_head(&sample_firmwares[i].wait);
}

void sample_engines_init(struct sample_device *dev)
{
	init_waitqueue_head(&dev->own_engines.wait);
	dev->engines = dev->params.firmware ? &sample_firmwares[dev->params.firmware - 1] :
					      &dev->own_engines;
}

/* Whether a command takes no time, so that it needs no engine and no worker. */
bool sample_instant(struct sample_device *dev, u32 mib_s)
{
	return !mib_s && !READ_ONCE(dev->params.command_us);
}

static bool sample_take_engine(struct sample_device *dev)
{
	struct sample_engines *engines = dev->engines;
	int most = READ_ONCE(dev->params.engines);
	int busy = atomic_read(&engines->busy);
	int seen = atomic_read(&engines->busy_most);

	do {
		if (busy >= most)
			return false;
	} while (!atomic_try_cmpxchg(&engines->busy, &busy, busy + 1));
	while (seen <= busy && !atomic_try_cmpxchg(&engines->busy_most, &seen, busy + 1))
		;
	return true;
}

/* Whoever waits for an engine has one now, or the session is over. */
static bool sample_stops_waiting(struct sample_session *session, bool *has_engine)
{
	*has_engine = !READ_ONCE(session->code) && sample_take_engine(session->dev);
	return *has_engine || READ_ONCE(session->code);
}

/*
 * One command that moves so many bytes. It takes an engine for its time, and is
 * given up when the session ends. Returns 0 or what ended the session.
 */
int sample_command(struct sample_stream *stream, u64 bytes, u32 mib_s, u32 more_us)
{
	struct sample_session *session = stream->session;
	struct sample_device *dev = session->dev;
	u64 ns = ((u64)READ_ONCE(dev->params.command_us) + more_us) * NSEC_PER_USEC;
	ktime_t start = ktime_get();
	bool has_engine;

	if (mib_s)
		ns += mul_u64_u64_div_u64(bytes, NSEC_PER_SEC, (u64)mib_s << 20);
	atomic64_inc(&stream->counters->commands);
	if (!ns)
		return READ_ONCE(session->code);
	wait_event(dev->engines->wait, sample_stops_waiting(session, &has_engine));
	if (!has_engine)
		return READ_ONCE(session->code);
	wait_event_hrtimeout(stream->wait, READ_ONCE(session->code),
			     ns_to_ktime(min_t(u64, ns, SAMPLE_MAX_COMMAND_NS)));
	atomic_dec(&dev->engines->busy);
	wake_up_all(&dev->engines->wait);
	atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), start)), &stream->counters->command_ns);
	return READ_ONCE(session->code);
}

/* The time of an arc. A tick can be long against it, so no msleep(). */
void sample_sleep_us(u64 us)
{
	ktime_t time = us_to_ktime(us);

	if (!us)
		return;
	set_current_state(TASK_UNINTERRUPTIBLE);
	schedule_hrtimeout(&time, HRTIMER_MODE_REL);
}

/* Whether this call is the one that the parameter "fault" names. */
bool sample_fault(struct sample_device *dev, const char *call)
{
	char fault[SAMPLE_FAULT_BYTES];
	char *number = fault;
	char *name;
	u32 at;

	if (!READ_ONCE(dev->params.fault[0]))
		return false;
	strscpy(fault, dev->params.fault);
	name = strsep(&number, ":");
	if (strcmp(name, call) || !number || kstrtou32(number, 10, &at))
		return false;
	return atomic_inc_return(&dev->fault_calls) == at;
}

void sample_lock(struct sample_stream *stream)
{
	ktime_t start;

	if (mutex_trylock(stream->lock))
		return;
	start = ktime_get();
	mutex_lock(stream->lock);
	atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), start)), &stream->counters->lock_wait_ns);
}

void sample_unlock(struct sample_stream *stream)
{
	mutex_unlock(stream->lock);
}
