/*-------------------------------------------------------------------------
 *
 * resolve.h
 *		Looks up the addresses of a host, within a limit and interruptibly.
 *
 * Pure: no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_RESOLVE_H
#define PGF_RESOLVE_H

#include <netdb.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Most lookups that a process may have under way.  Each has a thread and a
 * pipe.
 */
#define RESOLVE_MAX			16

/*
 * Looks up the addresses of host for a TCP connection to port.  Returns what
 * getaddrinfo() found, to be freed with freeaddrinfo(), or NULL with a reason
 * in text.  Waits only in wait(), which is that of BrokerOptions, and not past
 * the deadline (clock_ms()); wait() need not return.
 *
 * For the main thread only.
 */
extern struct addrinfo *resolve(const char *host, int port, int64_t deadline,
								bool (*wait) (int fd, bool for_write, long timeout_ms),
								char *text, size_t text_size);

#endif							/* PGF_RESOLVE_H */
