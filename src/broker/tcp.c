/*-------------------------------------------------------------------------
 *
 * tcp.c
 *		A TCP socket that is never waited for without interrupts.
 *
 * Responsible for: connecting within a deadline, the socket's options, and
 * what the kernel tells about the room in its buffers.
 *
 * Must never: block anywhere but in the caller's wait function, or leave a
 * socket open that nobody was told of: the wait function may not return.
 *
 * Scenarios: several addresses, of which some refuse or do not answer; a name
 * that does not resolve; a deadline that passes; a signal handler that shuts
 * the socket down while it connects.
 *
 *-------------------------------------------------------------------------
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/sockios.h>
#endif

#include "broker/clock.h"
#include "broker/resolve.h"
#include "broker/tcp.h"

/* Asked for; the kernel caps it at net.core.wmem_max. */
#define SEND_BUFFER			(1024 * 1024)

/* Below this, the answer of the kernel is not to be believed. */
#define SEND_BUFFER_MIN		(16 * 1024)

typedef struct Attempt
{
	bool		(*wait) (int fd, bool for_write, long timeout_ms);
	void		(*fd_changed) (int fd);
	int			problem;		/* errno of the last failure */
} Attempt;

static int	connect_any(Attempt *attempt, const struct addrinfo *all, int64_t deadline);
static int	connect_one(Attempt *attempt, const struct addrinfo *ai, int64_t deadline);
static int	finish_connect(Attempt *attempt, int fd, int64_t deadline);

int
tcp_connect(const char *host, int port, int64_t deadline,
			bool (*wait) (int fd, bool for_write, long timeout_ms),
			void (*fd_changed) (int fd), char *text, size_t text_size)
{
	Attempt		attempt = {wait, fd_changed, EADDRNOTAVAIL};
	struct addrinfo *all = resolve(host, port, deadline, wait, text, text_size);
	int			fd;

	if (all == NULL)
		return -1;
	fd = connect_any(&attempt, all, deadline);
	freeaddrinfo(all);
	if (fd < 0)
		snprintf(text, text_size, strchr(host, ':') ?
				 "could not connect to [%s]:%d: %s" : "could not connect to %s:%d: %s",
				 host, port, strerror(attempt.problem));
	return fd;
}

/* Each address gets its share of the time left. */
static int
connect_any(Attempt *attempt, const struct addrinfo *all, int64_t deadline)
{
	int			left = 0;
	int			fd = -1;

	for (const struct addrinfo *ai = all; ai != NULL; ai = ai->ai_next)
		left++;
	for (const struct addrinfo *ai = all; ai != NULL && fd < 0; ai = ai->ai_next)
		fd = connect_one(attempt, ai, clock_ms() + clock_left(deadline) / left--);
	return fd;
}

static int
connect_one(Attempt *attempt, const struct addrinfo *ai, int64_t deadline)
{
	int			fd = socket(ai->ai_family,
							ai->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC,
							ai->ai_protocol);

	if (fd < 0)
	{
		attempt->problem = errno;
		return -1;
	}
	attempt->fd_changed(fd);

	attempt->problem = connect(fd, ai->ai_addr, ai->ai_addrlen) == 0 ? 0 : errno;
	if (attempt->problem == EINPROGRESS || attempt->problem == EINTR)
		attempt->problem = finish_connect(attempt, fd, deadline);
	if (attempt->problem == 0)
		return fd;

	attempt->fd_changed(-1);
	close(fd);
	return -1;
}

/* Waits until the connect has ended; returns its errno. */
static int
finish_connect(Attempt *attempt, int fd, int64_t deadline)
{
	int			problem = 0;
	socklen_t	len = sizeof(problem);

	while (!tcp_writable(fd, NULL))
	{
		if (clock_left(deadline) == 0)
			return ETIMEDOUT;
		attempt->wait(fd, true, clock_left(deadline));
	}
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &problem, &len) < 0)
		return errno;
	return problem;
}

bool
tcp_peer(int fd, char *address, size_t size)
{
	struct sockaddr_storage peer;
	socklen_t	len = sizeof(peer);

	return getpeername(fd, (struct sockaddr *) &peer, &len) == 0 &&
		getnameinfo((struct sockaddr *) &peer, len, address, (socklen_t) size, NULL, 0, NI_NUMERICHOST) == 0;
}

/*
 * Linux calls a TCP socket writable while at most two thirds of its send
 * buffer are in use, so a third is what may be written.  No option here is
 * worth failing for.
 */
size_t
tcp_tune(int fd)
{
	int			on = 1;
	int			size = SEND_BUFFER;
	socklen_t	len = sizeof(size);

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));

	if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &len) < 0 || size < SEND_BUFFER_MIN)
		size = SEND_BUFFER_MIN;
	return (size_t) size / 3;
}

void
tcp_set_user_timeout(int fd, int ms)
{
#ifdef TCP_USER_TIMEOUT
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof(ms));
#else
	(void) fd;
	(void) ms;
#endif
}

int
tcp_unsent(int fd)
{
	int			bytes = 0;

#ifdef SIOCOUTQ
	if (ioctl(fd, SIOCOUTQ, &bytes) < 0)
		return 0;
#else
	(void) fd;
#endif
	return bytes;
}

bool
tcp_writable(int fd, bool *readable)
{
	struct pollfd p = {.fd = fd,.events = POLLOUT};

	if (readable != NULL)
		p.events |= POLLIN;
	if (poll(&p, 1, 0) < 0)
		p.revents = 0;
	if (readable != NULL)
		*readable = (p.revents & (POLLIN | POLLERR | POLLHUP)) != 0;
	return (p.revents & (POLLOUT | POLLERR | POLLHUP)) != 0;
}

void
tcp_wait_readable(int fd, long timeout_ms)
{
	struct pollfd p = {.fd = fd,.events = POLLIN};

	poll(&p, 1, (int) timeout_ms);
}

void
tcp_wait_writable(int fd, long timeout_ms)
{
	struct pollfd p = {.fd = fd,.events = POLLOUT};

	poll(&p, 1, (int) timeout_ms);
}
