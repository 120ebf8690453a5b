/*-------------------------------------------------------------------------
 *
 * client.h
 *		The callbacks that broker.c gets from tests outside the server.
 *
 * They also note what the tests ask about: the socket that was announced, and the
 * longest time between two waits, when interrupts are served.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CLIENT_H
#define PGF_CLIENT_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

static int	announced = -1;
static long longest_wait;		/* between two calls of wait_socket, ms */
static int64_t last_wait;

static int64_t
now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool
wait_socket(int fd, bool for_write, long timeout_ms)
{
	struct pollfd p = {.fd = fd,.events = for_write ? POLLOUT : POLLIN};
	bool		ready;

	if (last_wait != 0 && now_ms() - last_wait > longest_wait)
		longest_wait = (long) (now_ms() - last_wait);
	ready = poll(&p, 1, (int) timeout_ms) > 0;
	last_wait = now_ms();
	return ready;
}

static void
fd_changed(int fd)
{
	announced = fd;
}

#endif							/* PGF_CLIENT_H */
