/*-------------------------------------------------------------------------
 *
 * launcher.c
 *		Which databases need which workers.
 *
 * One launcher per server, for publishers, consumers and history workers.  Which
 * subscriptions a database has, and whether something of its past is to be sent,
 * its publisher says by taking slots for them; to the launcher these are workers
 * like any other.
 *
 * It is connected to no database, so it reads pg_database, but cannot see
 * which databases have the extension.  It finds
 * out by starting a publisher: one that finds no extension says so in its slot
 * and ends (a probe).  The launcher remembers that, in its own memory, and does
 * not ask again until the slot of that database is wanted by a hook.
 *
 * It must never connect to a database (DROP DATABASE would wait for it), wait
 * for a worker, or believe its own memory about who is running: that is in the
 * slots, which outlive it.
 *
 * A round, after each wake-up:
 *
 *		refresh		read pg_database, if asked to or once a minute
 *		settle		starts whose worker ended before it attached: back off
 *		collect		slots without extension, or whose database gets no worker:
 *					free them; stop workers that should not be where they are
 *		start		what is due: wanted slots, then databases not yet probed
 *
 * Workers are started one after the other: the next once the last has seen its
 * extension, ended, or START_PATIENCE is over.  So probes take one place in
 * max_worker_processes however many databases there are.
 *
 * Locking: the slots are read under pgf_shared->lock in shared mode, and
 * written by shmem.c only.  A slot that was read may change as soon as the
 * lock is released; each step that follows says what it expects and is refused
 * if that is no longer so.
 *
 * Scenarios:
 *
 * - Server start, promotion of a standby (BgWorkerStart_RecoveryFinished: there
 *	 is no launcher on a standby): every database is probed.
 *
 * - CREATE EXTENSION, commit: the slot is wanted; started when its hold ends.
 *	 Abort: the same; the probe finds nothing, the slot is freed.
 *
 * - DROP EXTENSION, commit: the workers are restarted by hooks.c and find
 *	 nothing; the slots are freed.  Abort: nothing happens.
 *
 * - CREATE DATABASE: the new one is unknown, so it is probed, and keeps a
 *	 publisher if its template had the extension.  The template's is stopped
 *	 by hooks.c and comes back at commit or abort.
 *
 * - DROP DATABASE: stopped by hooks.c.  Commit: the database is gone from
 *	 pg_database, the slot is freed.  Abort: it is started again.
 *
 * - RENAME, SET TABLESPACE: stopped by hooks.c, started again at the end.
 *
 * - Template databases, those that allow no connections and those that an
 *	 interrupted DROP DATABASE left invalid get no worker; one that is there is
 *	 told to end.  When the database becomes an ordinary one, it is unknown.
 *
 * - A worker ends with exit code 0 or by SIGTERM: started again after 1 s.  By
 *	 an error: after 1 s, doubling up to 60 s, and from 1 s again once it ran
 *	 for 60 s.
 *
 * - A worker dies (SIGKILL, SIGSEGV): the postmaster restarts everything with
 *	 new shared memory, and forgets our workers: as server start.
 *
 * - max_worker_processes exhausted: logged once, tried again every
 *	 REGISTER_RETRY until there is room.  A worker that ended keeps its place
 *	 until the postmaster takes notice, so the first failure means nothing yet.
 *
 * - More databases than slots: logged once, tried again whenever a slot may
 *	 have become free.
 *
 * - The launcher fails (exit code 1) or is terminated: the postmaster starts a
 *	 new one after RELAUNCH_DELAY.  Publishers that run are left alone; starts
 *	 whose worker has not attached are taken back, and it is refused if it is
 *	 only late.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>
#include <signal.h>

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "server/compat.h"
#include "server/launcher.h"
#include "server/monotime.h"
#include "server/shmem.h"

/* Milliseconds, unless it says otherwise. */
#define REFRESH_INTERVAL	60000
#define REGISTER_RETRY		10000
#define REGISTER_RETRY_FIRST	200
#define START_PATIENCE		2000
#define RELAUNCH_DELAY_S	5

/* A worker that was registered and has not been seen to attach. */
typedef struct Start
{
	BackgroundWorkerHandle *handle; /* NULL: none */
	uint32		generation;
} Start;

/* What is read of a slot under the lock. */
typedef struct SlotView
{
	WorkerKind	kind;
	Oid			database;
	SlotState	state;
	uint32		generation;
	bool		attached;
	bool		held;
	MonoTime	restart_after;
} SlotView;

/* Lists of Oid, in list_context. */
static MemoryContext list_context;
static List *databases = NIL;	/* those that may have a worker */
static List *absent = NIL;		/* of these, those without the extension */
static List *unknown = NIL;		/* of these, those to probe; some that have a
								 * slot may be among them */

static Start *starts;			/* one for each worker's slot */
static MonoTime patience_until = 0; /* with the last start */
static MonoTime register_after = 0;
static MonoTime refresh_at = 0;
static int	register_failures = 0;	/* in a row */
static bool slots_exhausted = false;

static void attach_launcher(void);
static void detach_launcher(int code, Datum arg);
static void take_back_starts(void);
static void refresh(void);
static void read_databases(void);
static bool may_have_worker(Form_pg_database database);
static void classify_databases(bool forget);
static void settle(void);
static void collect(void);
static void collect_slot(WorkerSlot *slot, const SlotView *view);
static void start(void);
static bool start_is_pending(void);
static bool start_next(MonoTime now);
static int	find_due_slot(MonoTime now, Oid *database);
static int	find_unknown_database(Oid *database);
static bool start_worker(int index, Oid database);
static bool register_worker(int index, uint32 generation, Oid database);
static void note_register_failure(void);
static void note_slots_exhausted(void);
static long next_wakeup(void);
static void sooner(MonoTime *at, MonoTime other);
static void wait_for_work(long timeout_ms);
static SlotView view_slot(WorkerSlot *slot);
static bool has_slot(Oid database);

void
launcher_register(void)
{
	BackgroundWorker worker;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = RELAUNCH_DELAY_S;
	strlcpy(worker.bgw_library_name, "pg_fanout", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "pg_fanout_launcher_main",
			sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "pg_fanout launcher", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "pg_fanout launcher", BGW_MAXLEN);
	RegisterBackgroundWorker(&worker);
}

void
pg_fanout_launcher_main(Datum main_arg)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	pqsignal(SIGINT, SIG_IGN);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	SetConfigOption("application_name", "pg_fanout launcher", PGC_USERSET, PGC_S_OVERRIDE);

	list_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout launcher",
										 ALLOCSET_DEFAULT_SIZES);
	starts = MemoryContextAllocZero(TopMemoryContext, shmem_worker_count() * sizeof(Start));
	attach_launcher();
	take_back_starts();

	for (;;)
	{
		refresh();
		settle();
		collect();
		start();
		wait_for_work(next_wakeup());
	}
}

static void
attach_launcher(void)
{
	on_shmem_exit(detach_launcher, (Datum) 0);

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	pgf_shared->launcher_pid = MyProcPid;
	pgf_shared->launcher_latch = MyLatch;
	LWLockRelease(pgf_shared->lock);
}

static void
detach_launcher(int code, Datum arg)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	pgf_shared->launcher_pid = 0;
	pgf_shared->launcher_latch = NULL;
	LWLockRelease(pgf_shared->lock);
}

/* Starts of a launcher before this one: nobody watches them any more. */
static void
take_back_starts(void)
{
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		SlotView	view = view_slot(shmem_worker(i));

		if (view.state == SLOT_STARTING && !view.attached)
			shmem_cancel_start(shmem_worker(i), view.generation, false);
	}
}

/* Refresh */

static void
refresh(void)
{
	uint32		rescan = pg_atomic_exchange_u32(&pgf_shared->rescan, 0);
	MonoTime	now = mono_now();

	if (rescan == 0 && now < refresh_at)
		return;
	read_databases();
	classify_databases((rescan & RESCAN_EXTENSIONS) != 0);
	refresh_at = mono_plus(now, REFRESH_INTERVAL);
}

static void
read_databases(void)
{
	Relation	relation;
	TableScanDesc scan;
	HeapTuple	tuple;

	list_free(databases);
	databases = NIL;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();	/* table_beginscan_catalog() needs it */
	relation = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(relation, 0, NULL);
	while (HeapTupleIsValid(tuple = heap_getnext(scan, ForwardScanDirection)))
	{
		Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);
		MemoryContext old_context;

		if (!may_have_worker(database))
			continue;
		old_context = MemoryContextSwitchTo(list_context);
		databases = lappend_oid(databases, database->oid);
		MemoryContextSwitchTo(old_context);
	}
	table_endscan(scan);
	table_close(relation, AccessShareLock);
	CommitTransactionCommand();
}

static bool
may_have_worker(Form_pg_database database)
{
	return database->datallowconn && !database->datistemplate &&
		database->datconnlimit != DATCONNLIMIT_INVALID_DB;
}

/*
 * Divides the databases into absent and unknown.  forget: all are unknown.  So
 * is one that was not in the list for a while; it may come back changed.
 */
static void
classify_databases(bool forget)
{
	MemoryContext old_context = MemoryContextSwitchTo(list_context);
	List	   *known = NIL;
	ListCell   *cell;

	foreach(cell, absent)
	{
		if (!forget && list_member_oid(databases, lfirst_oid(cell)))
			known = lappend_oid(known, lfirst_oid(cell));
	}
	list_free(absent);
	absent = known;
	list_free(unknown);
	unknown = list_difference_oid(databases, absent);
	MemoryContextSwitchTo(old_context);
}

/* Settle */

/*
 * A worker that attached speaks for itself.  One that ended before (it could
 * not be forked, or failed in the server's own code) cannot.
 */
static void
settle(void)
{
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		SlotView	view;
		bool		settled;
		pid_t		pid;

		if (starts[i].handle == NULL)
			continue;
		view = view_slot(shmem_worker(i));
		settled = view.state != SLOT_STARTING || view.generation != starts[i].generation ||
			view.attached;
		if (!settled && GetBackgroundWorkerPid(starts[i].handle, &pid) == BGWH_STOPPED)
		{
			shmem_cancel_start(shmem_worker(i), starts[i].generation, true);
			settled = true;
		}
		if (settled)
		{
			pfree(starts[i].handle);
			starts[i].handle = NULL;
		}
	}
}

/* Collect */

static void
collect(void)
{
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		SlotView	view = view_slot(shmem_worker(i));

		if (OidIsValid(view.database))
			collect_slot(shmem_worker(i), &view);
	}
}

static void
collect_slot(WorkerSlot *slot, const SlotView *view)
{
	bool		eligible = list_member_oid(databases, view->database);

	if (view->state == SLOT_ABSENT)
	{
		if (shmem_free_slot(slot, view->database, SLOT_ABSENT) && eligible &&
			view->kind == WORKER_PUBLISHER)
		{
			MemoryContext old_context = MemoryContextSwitchTo(list_context);

			absent = list_append_unique_oid(absent, view->database);
			MemoryContextSwitchTo(old_context);
		}
	}
	else if (eligible && view->kind == WORKER_PUBLISHER)
		absent = list_delete_oid(absent, view->database);
	else if (eligible)
		return;
	else if (view->state == SLOT_WANTED)
		shmem_free_slot(slot, view->database, SLOT_WANTED);
	else if (view->attached)
		shmem_restart_workers(view->database);
}

/* Start */

static void
start(void)
{
	MonoTime	now = mono_now();

	while (now >= register_after && !start_is_pending())
	{
		if (!start_next(now))
			break;
	}
}

static bool
start_is_pending(void)
{
	if (mono_now() >= patience_until)
		return false;
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		SlotView	view = view_slot(shmem_worker(i));

		if (view.state == SLOT_STARTING)
			return true;
	}
	return false;
}

/* Returns false if there is nothing to start, or no way to. */
static bool
start_next(MonoTime now)
{
	Oid			database;
	int			index = find_due_slot(now, &database);

	if (index < 0)
		index = find_unknown_database(&database);
	return index >= 0 && start_worker(index, database);
}

/* The one that has been due for longest; -1: none. */
static int
find_due_slot(MonoTime now, Oid *database)
{
	int			due = -1;
	MonoTime	due_since = now;

	for (int i = 0; i < shmem_worker_count(); i++)
	{
		SlotView	view = view_slot(shmem_worker(i));

		if (view.state == SLOT_WANTED && !view.held && view.restart_after <= due_since &&
			list_member_oid(databases, view.database))
		{
			due = i;
			due_since = view.restart_after;
			*database = view.database;
		}
	}
	return due;
}

/* Takes a slot for a database of which nothing is known; -1: none. */
static int
find_unknown_database(Oid *database)
{
	DatabaseSlot *slot;

	while (unknown != NIL && has_slot(llast_oid(unknown)))
		unknown = list_delete_last(unknown);
	if (unknown == NIL)
		return -1;

	*database = llast_oid(unknown);
	slot = shmem_want_slot(*database);
	if (slot == NULL)
	{
		note_slots_exhausted();
		return -1;
	}
	slots_exhausted = false;
	unknown = list_delete_last(unknown);
	return slot - pgf_shared->slots;
}

static bool
start_worker(int index, Oid database)
{
	WorkerSlot *slot = shmem_worker(index);
	uint32		generation;

	/* Held since we looked?  Its end will wake us. */
	if (!shmem_begin_start(slot, database, &generation))
		return false;
	if (!register_worker(index, generation, database))
	{
		shmem_cancel_start(slot, generation, false);
		note_register_failure();
		return false;
	}
	register_failures = 0;
	patience_until = mono_later(START_PATIENCE);
	return true;
}

static bool
register_worker(int index, uint32 generation, Oid database)
{
	static const char *const names[] = {
		[WORKER_PUBLISHER] = "publisher",[WORKER_CONSUMER] = "consumer",[WORKER_HISTORY] = "history"
	};
	const char *what = names[shmem_worker(index)->kind];
	BackgroundWorker worker;
	MemoryContext old_context;
	bool		registered;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_notify_pid = MyProcPid;
	worker.bgw_main_arg = Int32GetDatum(index);
	memcpy(worker.bgw_extra, &generation, sizeof(generation));
	strlcpy(worker.bgw_library_name, "pg_fanout", sizeof(worker.bgw_library_name));
	snprintf(worker.bgw_function_name, sizeof(worker.bgw_function_name), "pg_fanout_%s_main", what);
	snprintf(worker.bgw_name, BGW_MAXLEN, "pg_fanout %s for database %u", what, database);
	snprintf(worker.bgw_type, BGW_MAXLEN, "pg_fanout %s", what);

	if (starts[index].handle != NULL)
		pfree(starts[index].handle);
	starts[index].handle = NULL;
	starts[index].generation = generation;
	old_context = MemoryContextSwitchTo(TopMemoryContext);
	registered = RegisterDynamicBackgroundWorker(&worker, &starts[index].handle);
	MemoryContextSwitchTo(old_context);
	return registered;
}

static void
note_register_failure(void)
{
	register_failures = Min(register_failures + 1, 3);
	register_after = mono_later(register_failures == 1 ? REGISTER_RETRY_FIRST : REGISTER_RETRY);
	if (register_failures != 2)
		return;
	ereport(LOG,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("pg_fanout cannot start a worker: out of background worker slots"),
			 errdetail("Messages stay in the outbox, or in their queues, until there is one."),
			 errhint("Increase max_worker_processes.")));
}

static void
note_slots_exhausted(void)
{
	if (slots_exhausted)
		return;
	slots_exhausted = true;
	ereport(LOG,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("pg_fanout cannot start more than %d publishers", pgf_shared->nslots),
			 errdetail("There are databases that may need one."),
			 errhint("Increase pg_fanout.max_databases.")));
}

/* Waiting */

/* Milliseconds until something is due that nobody wakes us for. */
static long
next_wakeup(void)
{
	MonoTime	now = mono_now();
	MonoTime	at = refresh_at;
	bool		pending = start_is_pending();

	if (pending)
		sooner(&at, patience_until);
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		SlotView	view = view_slot(shmem_worker(i));

		if (view.state == SLOT_WANTED && !view.held && !pending &&
			list_member_oid(databases, view.database))
			sooner(&at, Max(view.restart_after, register_after));
	}
	return mono_left(now, at);
}

static void
sooner(MonoTime *at, MonoTime other)
{
	if (other < *at)
		*at = other;
}

/*
 * Does not sleep if there is something to do whose wake-up was lost: waiting
 * for a lock on pg_database resets the latch.
 */
static void
wait_for_work(long timeout_ms)
{
	if (pg_atomic_read_u32(&pgf_shared->rescan) != 0 || ConfigReloadPending)
		timeout_ms = 0;
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 timeout_ms, pgf_wait_event(PGF_WAIT_LAUNCHER));
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

/* Slots */

static SlotView
view_slot(WorkerSlot *slot)
{
	SlotView	view;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	view.kind = slot->kind;
	view.database = slot->database;
	view.state = slot->state;
	view.generation = slot->generation;
	view.attached = (slot->pid != 0);
	view.held = shmem_held(slot);
	view.restart_after = slot->restart_after;
	LWLockRelease(pgf_shared->lock);
	return view;
}

/* A publisher's. */
static bool
has_slot(Oid database)
{
	for (int i = 0; i < pgf_shared->nslots; i++)
	{
		SlotView	view = view_slot(shmem_worker(i));

		if (view.database == database)
			return true;
	}
	return false;
}
