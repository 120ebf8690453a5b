/*-------------------------------------------------------------------------
 *
 * connection.h
 *		A worker's connection to the broker, made again when it is lost.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CONNECTION_H
#define PGF_CONNECTION_H

#include "postgres.h"

#include "broker.h"
#include "monotime.h"

/* The longest pause between two attempts, in milliseconds. */
#define MAX_RECONNECT_MS 30000

typedef struct Connection
{
	Broker	   *broker;			/* NULL: none */
	MonoTime	connect_at;		/* no sooner */
	MonoTime	connected_at;
	int			failures;		/* in a row */

	/* the connection's own */
	const char *who;			/* in log messages: "publisher" */
	BrokerAddress *addresses;	/* of pg_fanout.uri */
	int			naddresses;
	int			next_address;
	char	   *settings;		/* what the connection was made from */
	char	   *problem;		/* of a setting, for which none is made */
	MemoryContext settings_context;
	BrokerOptions options;
	bool		was_connected;
	char		last_failure[600];	/* so that it is logged once */
} Connection;

/*
 * who names the worker in log messages, name the connection in the broker's
 * own tools; both must last.  Connects nothing yet.
 */
extern void connection_init(Connection *conn, const char *who, const char *name);

/*
 * Have settings changed on which a connection depends (or were none taken over
 * yet)?  Then the caller closes the connection and lets the new ones be used.
 */
extern bool connection_settings_changed(const Connection *conn);
extern void connection_use_settings(Connection *conn);

/*
 * One attempt, with the next of the addresses; bounded by
 * pg_fanout.connect_timeout, and by the resolver.  If it fails, it has been
 * logged and the next attempt is scheduled (connect_at).  *again: is it another
 * one after the first of this process?
 */
extern bool connection_open(Connection *conn, bool *again);

/* Ends it without blame; the next attempt may be made at once. */
extern void connection_close(Connection *conn, bool polite);

/*
 * Ends it because of what text says: logs that once, and schedules the next
 * attempt.  Ends the process if it was SIGTERM that shut the socket down.
 */
extern void connection_failed(Connection *conn, const char *text);

/*
 * To connect is not enough: a node may accept connections and do nothing with
 * them.  The pauses between attempts begin anew once the broker has done what
 * it is for, or the connection has lasted.
 */
extern void connection_works(Connection *conn);
extern void connection_lasts(Connection *conn, MonoTime now);

/*
 * ms doubled "times" times, at most max, a quarter of it jitter, for which the
 * microseconds of the clock will do.
 */
extern long backoff(long ms, int times, long max);

#endif							/* PGF_CONNECTION_H */
