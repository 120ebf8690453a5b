/*-------------------------------------------------------------------------
 *
 * tcp.h
 *		A TCP socket that is never waited for without interrupts.
 *
 * Pure: no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TCP_H
#define PGF_TCP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Connects to the first address of host that answers.  Returns the
 * non-blocking, close-on-exec socket, or -1 with a reason in text.  wait and
 * fd_changed are those of BrokerOptions; fd_changed is told every socket that
 * is tried, and -1 before one is closed.  Looking up the name counts towards
 * the deadline, and waits in wait() as connecting does.
 */
extern int	tcp_connect(const char *host, int port, int64_t deadline,
						bool (*wait) (int fd, bool for_write, long timeout_ms),
						void (*fd_changed) (int fd),
						char *text, size_t text_size);

/*
 * Writes the peer's address as a text that is a number, not a name, and that
 * needs no lookup.  False: the socket is not connected any more.
 */
extern bool tcp_peer(int fd, char *address, size_t size);

/*
 * Sets the options a broker connection wants: no Nagle, keepalive, a large
 * send buffer.  Returns how many bytes may be written without blocking once
 * tcp_writable() says so.
 */
extern size_t tcp_tune(int fd);

/*
 * How long the kernel tries in vain to have written bytes acknowledged before
 * it ends the connection.  0: as long as the peer's kernel answers.
 */
extern void tcp_set_user_timeout(int fd, int ms);

/* Bytes written but not yet acknowledged by the peer's kernel. */
extern int	tcp_unsent(int fd);

/* Does a write not block now, or fail at once?  Same for a read, if asked. */
extern bool tcp_writable(int fd, bool *readable);

/* Plain waits, without interrupts; for short times. */
extern void tcp_wait_readable(int fd, long timeout_ms);
extern void tcp_wait_writable(int fd, long timeout_ms);

#endif							/* PGF_TCP_H */
