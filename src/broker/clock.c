/*-------------------------------------------------------------------------
 *
 * clock.c
 *		The clock of all deadlines in the broker layer.
 *
 * Responsible for: one clock that nobody can set.  It is a file of its own so
 * that the fuzzer can replace it.
 *
 * Must never: use the wall clock, which jumps.
 *
 *-------------------------------------------------------------------------
 */
#include <time.h>

#include "broker/clock.h"

int64_t
clock_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

long
clock_left(int64_t deadline)
{
	int64_t		left = deadline - clock_ms();

	return left > 0 ? (long) left : 0;
}
