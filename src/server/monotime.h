/*-------------------------------------------------------------------------
 *
 * monotime.h
 *		Points in time for what is to happen later, or to be given up.
 *
 * GetCurrentTimestamp() follows the wall clock, and somebody may set that: back
 * by an hour, and everything due in a second is due in an hour; forward, and
 * the broker has not confirmed for an hour.  So whatever is due by the clock is
 * kept in the time of the clock that WaitLatch() uses, which nobody can set.  It
 * is the same for all processes of a server, and means nothing in another or
 * after a reboot: what is stored or shown is a TimestampTz.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_MONOTIME_H
#define PGF_MONOTIME_H

#include "postgres.h"

#include "portability/instr_time.h"

/* Microseconds.  0 is long ago, whenever that is. */
typedef int64 MonoTime;

static inline MonoTime
mono_now(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (MonoTime) INSTR_TIME_GET_MICROSEC(now);
}

static inline MonoTime
mono_plus(MonoTime time, int64 ms)
{
	return time + ms * 1000;
}

/* In ms milliseconds. */
static inline MonoTime
mono_later(int64 ms)
{
	return mono_plus(mono_now(), ms);
}

/* Have ms milliseconds passed between the two? */
static inline bool
mono_exceeds(MonoTime from, MonoTime to, int64 ms)
{
	return to >= mono_plus(from, ms);
}

/* Milliseconds until then, rounded up; 0 if it is past. */
static inline long
mono_left(MonoTime now, MonoTime then)
{
	return then <= now ? 0 : (long) ((then - now + 999) / 1000);
}

#endif							/* PGF_MONOTIME_H */
