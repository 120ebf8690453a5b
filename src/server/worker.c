/*-------------------------------------------------------------------------
 *
 * worker.c
 *		What every background worker of pg_fanout shares.
 *
 * How a worker enters its database, leaves it, begins a transaction and waits.
 * It knows nothing of the outbox or of the broker, save a socket that SIGTERM
 * shuts down.
 *
 * Ending.  A worker must be gone within 2 s of SIGTERM, whatever it does:
 *
 * - in worker_wait(): at once.
 * - in a query or waiting for a lock: at the server's next
 *	 CHECK_FOR_INTERRUPTS().
 * - in the broker's library: the signal handler shuts the socket down, so that
 *	 every call on it fails at once, and the caller comes to worker_wait().
 * - between a commit and its ack: once that is written (worker_keep_socket()).
 *
 * The same holds for a ProcSignalBarrier, for which DROP DATABASE and others
 * wait in every process of the server; there the bound is that no caller may
 * stay away from worker_wait() for longer than pg_fanout.connect_timeout.
 * pg_cancel_backend() is ignored, but for a consumer's handler: nothing else is
 * a user's to cancel.
 *
 * Its slot is given back in an on_shmem_exit callback.  That was registered
 * before the connection to the database, hence runs after the server's own
 * callback that takes the process out of the ProcArray.  Who sees that the
 * slot has no pid (shmem_stop_publisher) can rely on it that DROP DATABASE will
 * not find us.
 *
 * Locking: each transaction locks the extension (AccessShareLock on the object,
 * as Citus's LockCitusExtension() does) and reads its row again before it
 * touches a table of it.  DROP EXTENSION locks the extension first, too, so
 * that the two wait for each other here and nowhere else, and cannot deadlock.
 *
 * Scenarios:
 *
 * - The slot is not wanted any more, or held: exit before connecting.
 * - No extension at the start: exit, slot ABSENT.
 * - The extension is dropped, dropped and created, or updated while we run:
 *	 exit, slot WANTED; the worker that is started instead begins anew.
 * - Library and extension differ in version (the library was replaced and
 *	 ALTER EXTENSION ... UPDATE not run, or the other way round): logged once,
 *	 looked at again at every wake-up and every VERSION_RECHECK.
 * - SIGTERM from a command that needs the database, or after a change of
 *	 settings: exit without a log message, unless it comes in a query.  SIGTERM
 *	 from anybody else: as the server does it, with one.
 * - Settings of the database or the role that would break a worker
 *	 (default_transaction_read_only, statement_timeout, role, search_path):
 *	 overridden, so that a publisher and a history worker run as the bootstrap superuser in a plain
 *	 session, and a consumer as the role that subscribed.
 * - That role is gone, or may not log in or connect any more: the server ends
 *	 the process with a FATAL, and the launcher backs off.
 *
 * Must never: touch a table before the extension is locked; wait for what SIGTERM does
 * not end.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>
#include <sys/socket.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_extension.h"
#include "commands/dbcommands.h"
#include "executor/spi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "replication/syncrep.h"
#include "replication/walsender.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#include "server/compat.h"
#include "server/guc.h"
#include "server/monotime.h"
#include "server/passive.h"
#include "server/worker.h"

#define EXTENSION_NAME		"pg_fanout"

/* Milliseconds */
#define VERSION_RECHECK		10000
#define PASSIVE_RECHECK		10000
#define HEALTHY_AFTER		60000

/* What pg_extension says of us. */
typedef struct ExtensionRow
{
	Oid			oid;			/* InvalidOid: there is none */
	char		version[64];
} ExtensionRow;

WorkerSlot *worker_self = NULL;
DatabaseSlot *worker_slot = NULL;
SubscriptionSlot *worker_subscription = NULL;
DatabaseSlot *worker_history = NULL;

static volatile sig_atomic_t sigterm_received = false;
static volatile sig_atomic_t broker_socket = -1;
static volatile sig_atomic_t committing = false;	/* and then acking */
static int	(*volatile hidden_socket) (void) = NULL;
static WaitEventSet *socket_set = NULL; /* for broker_socket */
static int	socket_pos;			/* its place there */

static MonoTime attached_at = 0;
static WorkerEnd end = WORKER_FAILED;	/* how we end, if not by SIGTERM */
static Oid	extension = InvalidOid; /* as seen when we started */
static Subscription subscription;	/* of a consumer, as it was when we
									 * started */
static volatile sig_atomic_t may_cancel = false;
static bool reloaded = false;
static bool enabled;			/* pg_fanout.enabled, when we started */

/*
 * The latch may have been reset since this round of work began, and what it
 * told of may have come after the work looked for it.  The server resets it
 * while it waits for a heavyweight lock, and worker_wait() while the broker's
 * answer is awaited.
 */
static bool latch_was_reset = false;

static void handle_sigterm(SIGNAL_ARGS);
static void detach(int code, Datum arg);
static void attach(Datum main_arg);
static void set_name(const char *what);
static void pin_settings(void);
static void pin(const char *const(*settings)[2], int n);
static void pin_commit(void);
static void reset_session_user(void);
static void handle_sigint(SIGNAL_ARGS);
static pg_atomic_uint32 *dirty_flag(void);
static void wait_for_extension(void);
static bool extension_usable(bool *logged);
static void note_version(const char *version, bool *logged);
static void wait_until_active(void);
static char *why_passive(void);
static void note_passive(const char *reason, char **noted);
static bool lock_extension(ExtensionRow *row);
static void read_extension(ExtensionRow *row);
static void check_stop(void);
static bool stop_is_expected(void);

/* Entering and leaving the database */

void
worker_attach(Datum main_arg, const char *what)
{
	pqsignal(SIGTERM, handle_sigterm);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGINT, handle_sigint);
	on_shmem_exit(detach, (Datum) 0);
	BackgroundWorkerUnblockSignals();

	attach(main_arg);
	BackgroundWorkerInitializeConnectionByOid(worker_self->database, subscription.role, 0);
	set_name(what);
	pin_settings();
	enabled = pgf_enabled;
	wait_for_extension();
	wait_until_active();
}

/*
 * die() only sets flags; whoever blocks in the broker's library must be told
 * through the socket.
 */
static void
handle_sigterm(SIGNAL_ARGS)
{
	int			save_errno = errno;
	int			fd = broker_socket;

	if (fd < 0 && hidden_socket != NULL)
		fd = hidden_socket();
	sigterm_received = true;
	if (fd >= 0 && !committing)
		shutdown(fd, SHUT_RDWR);
	die(postgres_signal_arg);
	errno = save_errno;
}

/*
 * There is something to cancel only while a handler runs; but the server sends itself such a
 * signal, too, when lock_timeout is over, which bounds what a consumer waits for (owner.c).
 */
static void
handle_sigint(SIGNAL_ARGS)
{
	if (may_cancel || (worker_subscription != NULL && get_timeout_indicator(LOCK_TIMEOUT, false)))
		StatementCancelHandler(postgres_signal_arg);
}

void
worker_allow_cancel(bool allow)
{
	may_cancel = allow;
	if (!allow)
		QueryCancelPending = false;
}

static void
detach(int code, Datum arg)
{
	bool		healthy;

	if (worker_self == NULL)
		return;
	healthy = mono_exceeds(attached_at, mono_now(), HEALTHY_AFTER);
	if (end == WORKER_FAILED && (sigterm_received || code == 0))
		end = WORKER_TERMINATED;
	worker_set_connected(NULL);
	worker_set_state(WORKER_STOPPED);
	if (worker_slot != NULL)
		pg_atomic_write_u32(&worker_slot->in_flight, 0);
	shmem_detach(worker_self, end, healthy);
	worker_self = NULL;
	worker_slot = NULL;
	worker_subscription = NULL;
	worker_history = NULL;
	shmem_wake_launcher(0);
}

static void
attach(Datum main_arg)
{
	uint32		generation;

	memcpy(&generation, MyBgworkerEntry->bgw_extra, sizeof(generation));
	worker_self = shmem_attach(DatumGetInt32(main_arg), generation);
	if (worker_self == NULL)
	{
		shmem_wake_launcher(0);
		proc_exit(0);
	}
	if (worker_self->kind == WORKER_PUBLISHER)
		worker_slot = (DatabaseSlot *) worker_self;
	else if (worker_self->kind == WORKER_HISTORY)
		worker_history = (DatabaseSlot *) ((char *) worker_self - offsetof(DatabaseSlot, history));
	else
	{
		worker_subscription = (SubscriptionSlot *) worker_self;
		LWLockAcquire(pgf_shared->lock, LW_SHARED);
		subscription = worker_subscription->subscription;
		LWLockRelease(pgf_shared->lock);
	}
	attached_at = mono_now();
	worker_set_state(WORKER_STARTING);
}

/* pg_stat_activity has bgw_type as backend_type already. */
static void
set_name(const char *what)
{
	char		name[NAMEDATALEN];

	snprintf(name, sizeof(name), "pg_fanout %s", what);
	SetConfigOption("application_name", name, PGC_USERSET, PGC_S_OVERRIDE);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/*
 * Overrides what ALTER DATABASE, ALTER ROLE and postgresql.conf may have set
 * for applications.  PGC_S_OVERRIDE stays in force after a reload, and is what
 * RESET comes back to; a SET clause of a function still works.
 *
 * The first list would break any worker.  The second is for what runs nothing
 * but our own statements; a handler expects the settings of its role.
 *
 * synchronous_commit is off in a publisher because what it writes is its own
 * bookkeeping: if a crash loses it, some messages are sent again.  What a
 * consumer commits it acks, so it must not be lost.
 */
static void
pin_settings(void)
{
	static const char *const settings[][2] = {
		{"role", "none"},
		{"session_replication_role", "origin"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"default_transaction_deferrable", "off"},
		{"statement_timeout", "0"},
		{"lock_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"idle_session_timeout", "0"},
		{"transaction_timeout", "0"},	/* PostgreSQL 17 */
	};
	static const char *const own_settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"row_security", "off"},
		{"synchronous_commit", "off"},
		{"work_mem", "16MB"},
		{"temp_file_limit", "-1"},	/* a large batch waits in a temporary file */
		{"jit", "off"},
		{"max_parallel_workers_per_gather", "0"},
		{"datestyle", "ISO"},
		{"intervalstyle", "postgres"},
	};

	reset_session_user();
	pin(settings, lengthof(settings));
	if (worker_subscription == NULL)
		pin(own_settings, lengthof(own_settings));
	else
		pin_commit();
}

static void
pin(const char *const(*settings)[2], int n)
{
	for (int i = 0; i < n; i++)
	{
		if (GetConfigOption(settings[i][0], true, false) != NULL)
			SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET, PGC_S_OVERRIDE);
	}
}

/* Not less than "on". */
static void
pin_commit(void)
{
	if (synchronous_commit < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
		SetConfigOption("synchronous_commit", "on", PGC_SUSET, PGC_S_OVERRIDE);
}

/*
 * ALTER ROLE ... SET session_authorization is possible, too.  Unlike the others
 * it must be set in a transaction, and by name.
 */
static void
reset_session_user(void)
{
	Oid			role = (worker_subscription != NULL) ? subscription.role : BOOTSTRAP_SUPERUSERID;

	StartTransactionCommand();
	SetConfigOption("session_authorization", GetUserNameFromId(role, false),
					PGC_SUSET, PGC_S_OVERRIDE);
	CommitTransactionCommand();
}

/* The extension */

static pg_atomic_uint32 *
dirty_flag(void)
{
	if (worker_history != NULL)
		return &worker_history->history_dirty;
	return worker_slot ? &worker_slot->dirty : &worker_subscription->dirty;
}

/*
 * ALTER EXTENSION wakes us as a commit with messages does: clear, then look,
 * then wait unless it is set again.
 */
static void
wait_for_extension(void)
{
	pg_atomic_uint32 *dirty = dirty_flag();
	bool		logged = false;

	for (;;)
	{
		pg_atomic_exchange_u32(dirty, 0);
		if (extension_usable(&logged))
			break;
		if (pg_atomic_read_u32(dirty) == 0)
			(void) worker_wait(-1, false, VERSION_RECHECK);
	}
	pg_atomic_write_u32(dirty, 1);
}

/* Ends the process if there is none; false: it has another version. */
static bool
extension_usable(bool *logged)
{
	ExtensionRow row;
	bool		usable;

	StartTransactionCommand();
	if (!lock_extension(&row))
		worker_end(WORKER_NO_EXTENSION);
	if (worker_self->state != SLOT_RUNNING)
	{
		shmem_attached_running(worker_self);
		shmem_wake_launcher(0);
	}
	extension = row.oid;
	usable = (strcmp(row.version, PG_FANOUT_VERSION) == 0);
	if (!usable)
		note_version(row.version, logged);
	CommitTransactionCommand();
	return usable;
}

static void
note_version(const char *version, bool *logged)
{
	char text[	256];

	if (*logged)
		return;
	*logged = true;
	snprintf(text, sizeof(text), "extension version %s does not match library version %s",
			 version, PG_FANOUT_VERSION);
	worker_set_error(text);
	ereport(WARNING,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg(worker_subscription == NULL ? "pg_fanout publishes nothing from database \"%s\"" :
					"pg_fanout consumes nothing in database \"%s\"",
					get_database_name(MyDatabaseId)),
			 errdetail("The extension has version %s, the loaded library has version %s.",
					   version, PG_FANOUT_VERSION),
			 errhint("Run ALTER EXTENSION pg_fanout UPDATE, or restart the server to load the library that is installed.")));
}

/*
 * Waits while the database is passive (see passive.c).  What ends that restarts
 * the worker; it looks again all the same, for somebody may repair a table by
 * hand.  The publisher takes the consumers' slots back.
 */
static void
wait_until_active(void)
{
	pg_atomic_uint32 *dirty = dirty_flag();
	char	   *noted = NULL;
	char	   *reason;

	while (pg_atomic_exchange_u32(dirty, 0), (reason = why_passive()) != NULL)
	{
		note_passive(reason, &noted);
		if (pg_atomic_read_u32(dirty) == 0)
			(void) worker_wait(-1, false, PASSIVE_RECHECK);
	}
	if (noted != NULL)
		worker_set_state(WORKER_STARTING);
	pg_atomic_write_u32(dirty, 1);
}

static char *
why_passive(void)
{
	char	   *reason;

	worker_begin();
	reason = passive_reason(TopMemoryContext);
	worker_commit();
	return reason;
}

/* Logs a reason that is another one than *noted, and takes it over. */
static void
note_passive(const char *reason, char **noted)
{
	bool		known = (*noted != NULL && strcmp(*noted, reason) == 0);

	if (*noted != NULL)
		pfree(*noted);
	*noted = unconstify(char *, reason);
	if (known)
		return;
	worker_set_error(reason);
	worker_set_state(WORKER_PASSIVE);
	if (worker_slot == NULL)
		return;
	(void) shmem_set_subscriptions(MyDatabaseId, NULL, 0);
	shmem_wake_launcher(0);
	StartTransactionCommand();
	ereport(enabled ? WARNING : LOG,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("pg_fanout neither publishes nor consumes in database \"%s\"",
					get_database_name(MyDatabaseId)),
			 errdetail("%s.", reason),
			 enabled ? errhint("Use fanout.activate().") : 0));
	CommitTransactionCommand();
}

/*
 * Locks the extension against DROP EXTENSION until the transaction ends.
 * Returns false if there is none, or if it changed while we waited.
 */
static bool
lock_extension(ExtensionRow *row)
{
	Oid			locked;

	read_extension(row);
	if (!OidIsValid(row->oid))
		return false;
	locked = row->oid;
	LockDatabaseObject(ExtensionRelationId, locked, 0, AccessShareLock);
	read_extension(row);
	return row->oid == locked;
}

static void
read_extension(ExtensionRow *row)
{
	Relation	relation = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	memset(row, 0, sizeof(*row));
	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(EXTENSION_NAME));
	scan = systable_beginscan(relation, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		version = heap_getattr(tuple, Anum_pg_extension_extversion,
										   RelationGetDescr(relation), &isnull);

		row->oid = ((Form_pg_extension) GETSTRUCT(tuple))->oid;
		if (!isnull)
			text_to_cstring_buffer(DatumGetTextPP(version), row->version,
								   sizeof(row->version));
	}
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
}

/* Transactions */

void
worker_begin(void)
{
	ExtensionRow row;

	latch_was_reset = true;
	SetCurrentStatementStartTimestamp();
	pgstat_report_activity(STATE_RUNNING, MyBgworkerEntry->bgw_type);
	StartTransactionCommand();
	if (!lock_extension(&row) || row.oid != extension ||
		strcmp(row.version, PG_FANOUT_VERSION) != 0)
		worker_end(WORKER_RESTART);
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	PushActiveSnapshot(GetTransactionSnapshot());
}

/* Within a savepoint that somebody has left open, nothing would be committed. */
void
worker_commit(void)
{
	if (IsSubTransaction())
		elog(FATAL, "a savepoint was left open");
	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
}

void
worker_abort(void)
{
	AbortOutOfAnyTransaction();
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* Working */

/*
 * Waits only after a round that did nothing and could not miss a wake-up: after
 * one that ran a transaction or waited for the broker, another one looks at
 * everything again.
 */
static void
run_rounds(bool (*work) (void), void (*wait) (void))
{
	MemoryContext round = AllocSetContextCreate(TopMemoryContext, "pg_fanout round",
												ALLOCSET_DEFAULT_SIZES);

	for (;;)
	{
		bool		any;

		MemoryContextSwitchTo(round);
		latch_was_reset = false;
		any = work();
		MemoryContextReset(round);
		if (!any && !latch_was_reset)
			wait();
		else
			check_stop();
	}
}

void
worker_run(void (*start) (void), bool (*work) (void), void (*wait) (void))
{
	PG_TRY();
	{
		start();
		run_rounds(work, wait);
	}
	PG_CATCH();
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
		ErrorData  *edata = CopyErrorData();

		worker_set_error(edata->message);
		MemoryContextSwitchTo(oldcontext);
		PG_RE_THROW();
	}
	PG_END_TRY();
	pg_unreachable();
}

/* Waiting */

/*
 * Waits for the latch or a socket, and returns what has happened, as WaitLatchOrSocket() does.
 * That one makes a new set of events for each wait, which was a sixth of the publisher's work where
 * confirms come one at a time; so the set for the broker's socket is made once.
 */
static int
wait_for(int fd, int socket_events, long timeout_ms, uint32 wait_event)
{
	int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout_ms >= 0 ? WL_TIMEOUT : 0);
	WaitEvent	occurred[2];	/* one of the latch, one of the socket */
	int			result = 0;
	int			n;

	if (fd < 0)
		return WaitLatch(MyLatch, events, timeout_ms, wait_event);
	if (fd != broker_socket)
		return WaitLatchOrSocket(MyLatch, events | socket_events, fd, timeout_ms, wait_event);
	if (socket_set == NULL)
	{
		WaitEventSet *set = pgf_create_wait_event_set(3);

		AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
		AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
		socket_pos = AddWaitEventToSet(set, socket_events, fd, NULL, NULL);
		socket_set = set;
	}
	else
		ModifyWaitEvent(socket_set, socket_pos, socket_events, NULL);
	n = WaitEventSetWait(socket_set, timeout_ms, occurred, lengthof(occurred), wait_event);
	for (int i = 0; i < n; i++)
		result |= occurred[i].events;
	return result;
}

/*
 * Does not sleep while changed settings are to be read, since their wake-up may
 * have been lost.
 */
bool
worker_wait(int fd, bool for_write, long timeout_ms)
{
	static const PgfWait wait_event[] = {
		[WORKER_PUBLISHER] = PGF_WAIT_PUBLISHER,[WORKER_CONSUMER] = PGF_WAIT_CONSUMER,[WORKER_HISTORY] = PGF_WAIT_HISTORY
	};
	int			socket_events = for_write ? WL_SOCKET_WRITEABLE : WL_SOCKET_READABLE;
	int			events;

	if (ConfigReloadPending)
		timeout_ms = 0;

	latch_was_reset = true;
	events = wait_for(fd, socket_events, timeout_ms, pgf_wait_event(wait_event[worker_self->kind]));
	if (events & WL_LATCH_SET)
		ResetLatch(MyLatch);
	check_stop();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		reloaded = true;
		if (pgf_enabled != enabled)
			worker_end(WORKER_RESTART);
	}
	return (events & socket_events) != 0;
}

static void
check_stop(void)
{
	if (sigterm_received && stop_is_expected())
		worker_end(WORKER_RESTART);
	CHECK_FOR_INTERRUPTS();
}

/* Did we ask for the SIGTERM ourselves?  Then it is no news for the log. */
static bool
stop_is_expected(void)
{
	bool		expected;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	expected = worker_self->restart || worker_self->unwanted || shmem_held(worker_self);
	LWLockRelease(pgf_shared->lock);
	return expected;
}

void
worker_end(WorkerEnd how)
{
	end = how;
	proc_exit(0);
}

bool
worker_reloaded(void)
{
	bool		result = reloaded;

	reloaded = false;
	return result;
}

/*
 * A SIGTERM that came before there was a socket must not be lost on it: the
 * flag is looked at after the socket is known to the handler.
 */
void
worker_broker_fd(int fd)
{
	if (socket_set != NULL)
		FreeWaitEventSet(socket_set);
	socket_set = NULL;
	broker_socket = fd;
	if (fd >= 0 && sigterm_received)
		shutdown(fd, SHUT_RDWR);
}

/*
 * From a commit until its ack is written, the socket stays as it is, so that nobody else in the
 * group gets what was applied because this process was told to end at that moment.  The
 * commit ends in any case, and an ack that has to be waited for is given up then.  But
 * SIGTERM also ends the wait for a synchronous standby, and what is not known to be there
 * must not be acked.
 */
void
worker_keep_socket(bool keep)
{
	committing = keep && !(SyncRepRequested() && SyncRepStandbyNames != NULL && SyncRepStandbyNames[0] != '\0');
}

/*
 * Names the function that tells of a socket while worker_broker_fd() has not
 * been told of one: find is called by the handler of SIGTERM, so it must be safe
 * there, and returns -1 if there is no socket.  Call it before the first
 * connection is made.
 */
void
worker_set_socket_finder(int (*find) (void))
{
	hidden_socket = find;
}

/* Status */

void
worker_set_state(WorkerState state)
{
	WorkerStatus *status = &worker_self->status;
	TimestampTz now = GetCurrentTimestamp();

	SpinLockAcquire(&worker_self->mutex);
	if (status->state != state || status->since == 0)
	{
		status->state = state;
		status->since = now;
	}
	SpinLockRelease(&worker_self->mutex);
}

void
worker_set_connected(const char *connected_to)
{
	WorkerStatus *status = &worker_self->status;
	TimestampTz now = GetCurrentTimestamp();

	SpinLockAcquire(&worker_self->mutex);
	status->connected_at = connected_to ? now : 0;
	strlcpy(status->connected_to, connected_to ? connected_to : "",
			sizeof(status->connected_to));
	SpinLockRelease(&worker_self->mutex);
}

/* Copies as much of a text as fits into size bytes, and no part of a character. */
void
worker_copy_text(char *to, const char *text, size_t size)
{
	size_t		len = strlen(text);

	strlcpy(to, text, len < size ? size : pg_mbcliplen(text, len, size - 1) + 1);
}

void
worker_set_error(const char *text)
{
	WorkerStatus *status = &worker_self->status;
	TimestampTz now = GetCurrentTimestamp();
	char		copy[sizeof(status->last_error)];

	worker_copy_text(copy, text, sizeof(copy));
	SpinLockAcquire(&worker_self->mutex);
	strlcpy(status->last_error, copy, sizeof(status->last_error));
	status->last_error_at = now;
	SpinLockRelease(&worker_self->mutex);
}
