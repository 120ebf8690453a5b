/*-------------------------------------------------------------------------
 *
 * connection.c
 *		A worker's connection to the broker, made again when it is lost.
 *
 * Responsible for: which of the hosts of pg_fanout.uri is tried when, with
 * which settings and which password; the pauses between attempts; and that a
 * failure that lasts is logged once.  What goes over the connection is its
 * worker's business.
 *
 * Must never: wait but in worker_wait(), keep the password longer than it
 * takes to log in, or connect while a setting is not what was asked for
 * (refused.c).
 *
 * A lost connection is tried again after 0.1 s, doubling up to
 * MAX_RECONNECT_MS, but every host once before the first pause.
 *
 * A login can lose its rights while it lasts: the password is a token that
 * expires, or a right came with a newer one.  The broker then answers 403 to
 * whatever is asked for next, on a connection that stays.  So a 403 is believed
 * only once a new login has got it, too: see connection_believes().  If that
 * login is refused, it is the connection that fails, as at any other time.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/memutils.h"

#include "broker/connection.h"
#include "broker/settings.h"
#include "server/monotime.h"
#include "server/refused.h"
#include "server/worker.h"

/* Bounds the wait for one answer to a declare. */
#define RPC_TIMEOUT_MS 10000

/* After so many pauses the next one is 0.4 s, for connection_hasten(). */
#define SHORT_PAUSES 2

/*
 * After a new login has proved that something is really refused: how long other
 * 403 are believed without a login of their own; and how old the login may be
 * when the same thing is refused again.
 */
#define REFUSED_TOO_MS 5000
#define REFUSED_AGAIN_MS 60000

long
backoff(long ms, int times, long max)
{
	for (int i = 0; i < times && ms < max; i++)
		ms *= 2;
	ms = Min(ms, max);
	return ms - ms / 8 + (long) (mono_now() % (ms / 4 + 1));
}

/* ---- settings ---- */

void
connection_init(Connection *conn, const char *who, const char *name)
{
	memset(conn, 0, sizeof(*conn));
	conn->who = who;
	conn->options.connection_name = name;
	conn->settings_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout settings",
												   ALLOCSET_SMALL_SIZES);
	refused_note_stored();
	worker_set_socket_finder(broker_handshake_fd);
}

/* The settings a connection depends on, as one text. */
static char *
current_settings(void)
{
	char	   *problem = refused_setting();

	return psprintf("%s|%s|%s|%s|%s|%s|%d|%d|%d", problem ? problem : "", pgf_uri, pgf_password_file, pgf_tls_ca_file,
					pgf_tls_cert_file, pgf_tls_key_file, pgf_tls_verify, pgf_connect_timeout, pgf_heartbeat);
}

bool
connection_settings_changed(const Connection *conn)
{
	char	   *settings = current_settings();
	bool		changed = conn->settings == NULL || strcmp(conn->settings, settings) != 0;

	pfree(settings);
	return changed;
}

/* A copy, since a reload frees the setting's own value at any wait. */
static char *
nonempty(Connection *conn, const char *setting)
{
	return (setting != NULL && setting[0] != '\0') ? MemoryContextStrdup(conn->settings_context, setting) : NULL;
}

static void
set_options(Connection *conn)
{
	BrokerOptions *options = &conn->options;

	options->tls_ca_file = nonempty(conn, pgf_tls_ca_file);
	options->tls_cert_file = nonempty(conn, pgf_tls_cert_file);
	options->tls_key_file = nonempty(conn, pgf_tls_key_file);
	options->tls_verify = pgf_tls_verify;
	options->connect_timeout_ms = pgf_connect_timeout;
	options->rpc_timeout_ms = RPC_TIMEOUT_MS;
	options->heartbeat_s = pgf_heartbeat;
	options->wait = worker_wait;
	options->fd_changed = worker_broker_fd;
}

void
connection_use_settings(Connection *conn)
{
	const char *error;
	char	   *settings = current_settings();
	const char *problem = refused_setting();

	Assert(conn->broker == NULL);
	MemoryContextReset(conn->settings_context);
	conn->settings = MemoryContextStrdup(conn->settings_context, settings);
	pfree(settings);
	if (conn->addresses != NULL)
		broker_free_addresses(conn->addresses, conn->naddresses);
	conn->addresses = broker_parse_uri(pgf_uri, &conn->naddresses, &error);
	if (problem == NULL)
		problem = error;
	conn->problem = problem ? MemoryContextStrdup(conn->settings_context, problem) : NULL;
	conn->next_address = conn->naddresses > 1 ? (uint64) mono_now() % conn->naddresses : 0;
	conn->failures = 0;
	conn->connect_at = 0;
	conn->last_failure[0] = '\0';
	set_options(conn);
}

/* ---- losing it ---- */

void
connection_works(Connection *conn)
{
	conn->failures = 0;
	conn->last_failure[0] = '\0';
}

void
connection_lasts(Connection *conn, MonoTime now)
{
	if (conn->broker != NULL && conn->failures > 0 &&
		mono_exceeds(conn->connected_at, now, MAX_RECONNECT_MS))
		connection_works(conn);
}

void
connection_hasten(Connection *conn)
{
	conn->failures = Min(conn->failures, SHORT_PAUSES);
}

void
connection_close(Connection *conn, bool polite)
{
	if (conn->broker == NULL)
		return;
	broker_close(conn->broker, polite);
	conn->broker = NULL;
	worker_set_connected(NULL);
}

void
connection_failed(Connection *conn, const char *text)
{
	/* SIGTERM shuts the socket down: then that is all there is to it */
	CHECK_FOR_INTERRUPTS();
	if (strcmp(text, conn->last_failure) != 0)
	{
		ereport(LOG, (errmsg("pg_fanout %s is not connected to the broker", conn->who),
					  errdetail("%s", text)));
		strlcpy(conn->last_failure, text, sizeof(conn->last_failure));
	}
	worker_set_error(text);
	if (conn->broker != NULL)
		conn->next_address = (conn->next_address + 1) % conn->naddresses;
	connection_close(conn, false);
	conn->connect_at = mono_later(backoff(100, conn->failures, MAX_RECONNECT_MS));
	conn->failures++;
	worker_set_state(WORKER_DISCONNECTED);
}

/* ---- logging in anew ---- */

/* The password file, or all 0 if there is none. */
static struct stat
stat_password_file(void)
{
	struct stat st;

	if (pgf_password_file[0] == '\0' || stat(pgf_password_file, &st) != 0)
		memset(&st, 0, sizeof(st));
	return st;
}

/* Has the password file been written or replaced since the login? */
static bool
password_file_changed(const Connection *conn)
{
	struct stat now = stat_password_file();

	return now.st_ino != conn->password_file.st_ino || now.st_size != conn->password_file.st_size ||
		now.st_mtime != conn->password_file.st_mtime || now.st_ctime != conn->password_file.st_ctime;
}

/*
 * Decides whether a 403 is to be believed.  It is proved if a login that was
 * made for its sake gets it again.  Without a proof of its own it is believed if
 * this login was made for the sake of another one, shortly before, or another one
 * was proved on it, so that many things that are not allowed cost one login and not
 * many; or if it was proved earlier and this login is not old, so that what is tried
 * again and again costs a login now and then; but only as long as there is no new
 * password.
 */
bool
connection_believes(Connection *conn, uint32 *doubted, bool refused_before)
{
	MonoTime	now = mono_now();
	bool		proved = *doubted != 0 && conn->logins >= *doubted;

	if (proved)
	{
		conn->denied_login = conn->logins;
		conn->denied_at = now;
	}
	if (proved ||
		(!password_file_changed(conn) &&
		 ((refused_before && !mono_exceeds(conn->connected_at, now, REFUSED_AGAIN_MS)) ||
		  (conn->anew_login == conn->logins && !mono_exceeds(conn->connected_at, now, REFUSED_TOO_MS)) ||
		  (conn->denied_login == conn->logins && !mono_exceeds(conn->denied_at, now, REFUSED_TOO_MS)))))
	{
		*doubted = 0;
		return true;
	}
	*doubted = conn->logins + 1;
	return false;
}

void
connection_log_in_anew(Connection *conn, const char *why)
{
	ereport(LOG, (errmsg("pg_fanout %s logs in to the broker again", conn->who),
				  errdetail("%s", why)));
	connection_close(conn, true);
	conn->connect_at = 0;
	conn->anew_login = conn->logins + 1;
}

/* ---- making it ---- */

/* Reads the password file; a problem with it is one of the connection. */
static bool
read_password(Connection *conn, char **password)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	volatile bool ok = true;

	PG_TRY();
	{
		*password = settings_read_password();
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(oldcontext);
		edata = CopyErrorData();
		FlushErrorState();
		connection_failed(conn, edata->message);
		FreeErrorData(edata);
		ok = false;
	}
	PG_END_TRY();
	return ok;
}

static void
connected(Connection *conn, const BrokerAddress *address)
{
	char		where[256];

	conn->connected_at = mono_now();
	conn->logins++;
	snprintf(where, sizeof(where), "%s:%d/%s", address->host, address->port,
			 strcmp(address->vhost, "/") == 0 ? "" : address->vhost);
	worker_set_connected(where);
	ereport(LOG, (errmsg("pg_fanout %s connected to the broker at %s", conn->who, where)));
}

static void
not_connected(Connection *conn, const char *text)
{
	connection_failed(conn, text);
	conn->next_address = (conn->next_address + 1) % conn->naddresses;
	/* every host once before the first pause */
	if (conn->failures < conn->naddresses)
		conn->connect_at = 0;
}

bool
connection_open(Connection *conn)
{
	BrokerAddress *address;
	BrokerError error;
	char	   *password = NULL;

	if (conn->problem != NULL)
	{
		if (refused_stored_mended())
			worker_end(WORKER_RESTART);
		connection_failed(conn, conn->problem);
		return false;
	}
	/* before it is read, so that what is written meanwhile is not missed */
	conn->password_file = stat_password_file();
	if (!read_password(conn, &password))
		return false;
	worker_set_state(WORKER_CONNECTING);
	address = &conn->addresses[conn->next_address];
	conn->broker = broker_connect(address, password, &conn->options, &error);
	if (password != NULL)
	{
		explicit_bzero(password, strlen(password));
		pfree(password);
	}
	if (conn->broker == NULL)
	{
		not_connected(conn, error.text);
		return false;
	}
	connected(conn, address);
	return true;
}
