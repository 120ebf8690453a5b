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

#include <sys/stat.h>

#include "broker/broker.h"
#include "server/monotime.h"

/* The longest pause between two attempts, in milliseconds. */
#define MAX_RECONNECT_MS 30000

typedef struct Connection
{
	Broker	   *broker;			/* NULL: none */
	MonoTime	connect_at;		/* no sooner */
	MonoTime	connected_at;
	uint32		logins;			/* so far; the number of the present one */
	uint32		anew_login;		/* the latest that was made for a 403's sake */
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
	struct stat password_file;	/* as it was at the login; all 0: none */
	uint32		denied_login;	/* the last one of which a 403 was proved */
	MonoTime	denied_at;
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
 * Makes one attempt, with the next of the addresses; bounded by
 * pg_fanout.connect_timeout.  If it fails, it has been logged and the next
 * attempt is scheduled (connect_at).
 */
extern bool connection_open(Connection *conn);

/*
 * Is a 403 to be believed?  If not, the login may have lost its rights, as one
 * with a token that has expired, and the caller is to log in anew and to ask
 * again.  *doubted is the caller's, one for each thing that can be refused; 0
 * at first, and to be set to 0 when the thing has been allowed.  refused_before:
 * it is known to be refused.
 */
extern bool connection_believes(Connection *conn, uint32 *doubted, bool refused_before);

/*
 * Ends it because of a 403 that may be the login's fault; why is logged.  The
 * next login, with the password file as it is now, may be made at once, and no
 * failure counts.
 */
extern void connection_log_in_anew(Connection *conn, const char *why);

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
 * The broker is there, but something that it is sent ends the connection, and it is being
 * found out what: the pause before the next attempt is a short one.
 */
extern void connection_hasten(Connection *conn);

/*
 * ms doubled "times" times, at most max, a quarter of it jitter, for which the
 * microseconds of the clock will do.
 */
extern long backoff(long ms, int times, long max);

#endif							/* PGF_CONNECTION_H */
