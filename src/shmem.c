/*-------------------------------------------------------------------------
 *
 * shmem.c
 *		The slots in shared memory, and every transition of their state.
 *
 * A slot stands for one database in which a publisher runs, should run, or
 * must not run for a while.  No other file writes a slot's lifecycle fields,
 * so that whether two workers can run in one database, or one that was asked
 * to leave can stay, is decided here:
 *
 * - want (a backend, the launcher): FREE or ABSENT becomes WANTED.
 *
 * - begin_start (launcher): WANTED without holds becomes STARTING, under a
 *	 new generation that only the worker registered for it knows.
 *
 * - attach (worker): only if the slot is STARTING under its generation, no
 *	 other has attached and there is no hold.  It sets publisher_pid before it
 *	 connects to the database, so a hold's owner who sees no pid knows that
 *	 nobody is in the database and that nobody can get in.
 *
 * - attached_running (worker): STARTING becomes RUNNING once the extension was
 *	 seen.
 *
 * - detach (worker, after it has left the ProcArray): back to WANTED with a
 *	 time before which it is not started again, or to ABSENT.  A worker killed
 *	 by SIGKILL does not come here, but then the postmaster makes the shared
 *	 memory anew.
 *
 * - cancel_start (launcher): STARTING becomes WANTED if the worker could not
 *	 be registered or ended before it attached.  The generation changes, so
 *	 that one which is only late is refused.
 *
 * - free (launcher): ABSENT, or WANTED in a database that gets no worker,
 *	 becomes FREE, unless it is held.
 *
 * Holds are counted, and belong to transactions (see wakeup.c).
 *
 * Locking: pgf_shared->lock is held exclusively for each of these and never
 * while anything can be raised or waited for.  Signals are sent under it:
 * publisher_pid is cleared under it before the process ends, so the pid cannot
 * have been given to another.  Readers without the lock (shmem_my_slot,
 * shmem_wake_*) read single words that are valid at any time: an oid, and
 * pointers to latches that live as long as the shared memory does.  The worst
 * that can come of a stale one is a needless wake-up.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"

#include "compat.h"
#include "guc.h"
#include "shmem.h"

#define TRANCHE_NAME		"pg_fanout"

/* Delay before a publisher is started again, in milliseconds. */
#define RESTART_DELAY_MIN	1000
#define RESTART_DELAY_MAX	60000

PgfShared  *pgf_shared = NULL;

static shmem_startup_hook_type next_shmem_startup = NULL;
#if PGF_HAVE_SHMEM_REQUEST_HOOK
static shmem_request_hook_type next_shmem_request = NULL;
#endif

static void request_shmem(void);
static void startup_shmem(void);
static Size shmem_size(void);
static void init_shared(PgfShared *shared);
static void init_slot(DatabaseSlot *slot);
static void reset_slot(DatabaseSlot *slot);
static DatabaseSlot *find_slot(Oid database);
static DatabaseSlot *want_slot_locked(Oid database);
static void signal_publisher(DatabaseSlot *slot);
static bool publisher_attached(DatabaseSlot *slot);
static void schedule(DatabaseSlot *slot, PublisherEnd end);
static void note_failure(DatabaseSlot *slot);

/* Memory */

void
shmem_init(void)
{
#if PGF_HAVE_SHMEM_REQUEST_HOOK
	next_shmem_request = shmem_request_hook;
	shmem_request_hook = request_shmem;
#else
	request_shmem();
#endif
	next_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
}

static void
request_shmem(void)
{
#if PGF_HAVE_SHMEM_REQUEST_HOOK
	if (next_shmem_request)
		next_shmem_request();
#endif
	RequestAddinShmemSpace(shmem_size());
	RequestNamedLWLockTranche(TRANCHE_NAME, 1);
}

static void
startup_shmem(void)
{
	bool		found;

	if (next_shmem_startup)
		next_shmem_startup();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	pgf_shared = ShmemInitStruct("pg_fanout", shmem_size(), &found);
	if (!found)
		init_shared(pgf_shared);
	LWLockRelease(AddinShmemInitLock);
}

static Size
shmem_size(void)
{
	return add_size(offsetof(PgfShared, slots),
					mul_size(pgf_max_databases, sizeof(DatabaseSlot)));
}

static void
init_shared(PgfShared *shared)
{
	memset(shared, 0, shmem_size());
	shared->lock = &GetNamedLWLockTranche(TRANCHE_NAME)->lock;
	pg_atomic_init_u32(&shared->rescan, 0);
	shared->nslots = pgf_max_databases;
	for (int i = 0; i < shared->nslots; i++)
		init_slot(&shared->slots[i]);
}

static void
init_slot(DatabaseSlot *slot)
{
	slot->state = SLOT_FREE;
	ConditionVariableInit(&slot->detached);
	ConditionVariableInit(&slot->progress);
	SpinLockInit(&slot->mutex);
	pg_atomic_init_u32(&slot->dirty, 0);
	pg_atomic_init_u32(&slot->current_segment, 0);
	pg_atomic_init_u64(&slot->flush_requested, 0);
	pg_atomic_init_u64(&slot->flush_done, 0);
	pg_atomic_init_u64(&slot->verify_requested, 0);
	pg_atomic_init_u64(&slot->verify_done, 0);
	pg_atomic_init_u32(&slot->in_flight, 0);
	pg_atomic_init_u64(&slot->published, 0);
	pg_atomic_init_u64(&slot->confirmed, 0);
	pg_atomic_init_u64(&slot->returned, 0);
	pg_atomic_init_u64(&slot->nacked, 0);
	pg_atomic_init_u64(&slot->reconnects, 0);
	pg_atomic_init_u64(&slot->dead, 0);
}

/*
 * What the previous database left.  The condition variables stay as they
 * are, because somebody may still be about to leave them.
 */
static void
reset_slot(DatabaseSlot *slot)
{
	slot->restart = false;
	slot->failures = 0;
	slot->restart_after = 0;
	pg_atomic_write_u32(&slot->dirty, 0);
	pg_atomic_write_u32(&slot->current_segment, 0);
	pg_atomic_write_u64(&slot->flush_requested, 0);
	pg_atomic_write_u64(&slot->flush_done, 0);
	pg_atomic_write_u64(&slot->verify_requested, 0);
	pg_atomic_write_u64(&slot->verify_done, 0);
	pg_atomic_write_u32(&slot->in_flight, 0);
	pg_atomic_write_u64(&slot->published, 0);
	pg_atomic_write_u64(&slot->confirmed, 0);
	pg_atomic_write_u64(&slot->returned, 0);
	pg_atomic_write_u64(&slot->nacked, 0);
	pg_atomic_write_u64(&slot->reconnects, 0);
	pg_atomic_write_u64(&slot->dead, 0);
	SpinLockAcquire(&slot->mutex);
	memset(&slot->status, 0, sizeof(slot->status));
	slot->status.state = PUBLISHER_STOPPED;
	SpinLockRelease(&slot->mutex);
}

/* Finding, wanting and holding: any backend */

/* With the lock, or as shmem_my_slot() without it. */
static DatabaseSlot *
find_slot(Oid database)
{
	for (int i = 0; i < pgf_shared->nslots; i++)
	{
		if (pgf_shared->slots[i].database == database)
			return &pgf_shared->slots[i];
	}
	return NULL;
}

DatabaseSlot *
shmem_my_slot(void)
{
	static DatabaseSlot *cached = NULL;

	if (pgf_shared == NULL || !OidIsValid(MyDatabaseId))
		return NULL;
	if (cached == NULL || cached->database != MyDatabaseId)
		cached = find_slot(MyDatabaseId);
	return cached;
}

static DatabaseSlot *
want_slot_locked(Oid database)
{
	DatabaseSlot *slot = find_slot(database);

	if (slot == NULL)
	{
		slot = find_slot(InvalidOid);
		if (slot == NULL)
			return NULL;
		reset_slot(slot);
		pg_write_barrier();		/* shmem_my_slot() sees a slot that is clean */
		slot->database = database;
	}
	if (slot->state == SLOT_FREE || slot->state == SLOT_ABSENT)
		slot->state = SLOT_WANTED;
	return slot;
}

DatabaseSlot *
shmem_want_slot(Oid database)
{
	DatabaseSlot *slot;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	slot = want_slot_locked(database);
	LWLockRelease(pgf_shared->lock);
	return slot;
}

DatabaseSlot *
shmem_hold(Oid database)
{
	DatabaseSlot *slot;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	slot = want_slot_locked(database);
	if (slot != NULL)
	{
		slot->holds++;
		slot->restart_after = 0;
	}
	LWLockRelease(pgf_shared->lock);
	return slot;
}

void
shmem_release(DatabaseSlot *slot)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	Assert(slot->holds > 0);
	slot->holds--;
	LWLockRelease(pgf_shared->lock);
}

/* Stopping: any backend */

static void
signal_publisher(DatabaseSlot *slot)
{
	if (slot->publisher_pid != 0)
		kill(slot->publisher_pid, SIGTERM);
}

static bool
publisher_attached(DatabaseSlot *slot)
{
	bool		attached;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	attached = (slot->publisher_pid != 0);
	LWLockRelease(pgf_shared->lock);
	return attached;
}

bool
shmem_stop_publisher(DatabaseSlot *slot, long timeout_ms)
{
	MonoTime	deadline = mono_later(timeout_ms);
	bool		stopped = false;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	Assert(slot->holds > 0);
	signal_publisher(slot);
	LWLockRelease(pgf_shared->lock);

	ConditionVariablePrepareToSleep(&slot->detached);
	while (!(stopped = !publisher_attached(slot)))
	{
		long		left = mono_left(mono_now(), deadline);

		if (left == 0)
			break;
		ConditionVariableTimedSleep(&slot->detached, left, pgf_wait_event(PGF_WAIT_STOP));
	}
	ConditionVariableCancelSleep();
	return stopped;
}

void
shmem_restart_publisher(Oid database)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < pgf_shared->nslots; i++)
	{
		DatabaseSlot *slot = &pgf_shared->slots[i];

		if (!OidIsValid(slot->database) ||
			(slot->database != database && OidIsValid(database)))
			continue;
		slot->restart_after = 0;
		slot->restart = (slot->publisher_pid != 0);
		signal_publisher(slot);
	}
	LWLockRelease(pgf_shared->lock);
}

/* Lifecycle: launcher */

/*
 * Makes the slot STARTING for the worker that is registered next, and tells
 * its generation.  Returns false if that is not possible (any more).
 */
bool
shmem_begin_start(DatabaseSlot *slot, Oid database, uint32 *generation)
{
	bool		ok;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ok = (slot->database == database && slot->state == SLOT_WANTED && slot->holds == 0);
	if (ok)
	{
		slot->state = SLOT_STARTING;
		*generation = ++slot->generation;
	}
	LWLockRelease(pgf_shared->lock);
	return ok;
}

/*
 * Takes back a start of which no worker has attached; failed: the worker ended
 * by itself, so back off.  Returns false if one has attached.
 */
bool
shmem_cancel_start(DatabaseSlot *slot, uint32 generation, bool failed)
{
	bool		ok;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ok = (slot->state == SLOT_STARTING && slot->generation == generation &&
		  slot->publisher_pid == 0);
	if (ok)
	{
		slot->state = SLOT_WANTED;
		slot->generation++;
		if (failed)
			note_failure(slot);
	}
	LWLockRelease(pgf_shared->lock);
	return ok;
}

/*
 * Frees a slot that is still the database's, in that state and not held.
 */
bool
shmem_free_slot(DatabaseSlot *slot, Oid database, SlotState state)
{
	bool		ok;

	Assert(state == SLOT_WANTED || state == SLOT_ABSENT);

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ok = (slot->database == database && slot->state == state && slot->holds == 0);
	if (ok)
	{
		slot->database = InvalidOid;
		slot->state = SLOT_FREE;
		slot->generation++;
	}
	LWLockRelease(pgf_shared->lock);
	return ok;
}

/* Lifecycle: publisher */

/*
 * Takes the slot for which this worker was started.  Returns NULL if it is
 * not wanted (any more).  The publisher must read the outbox when it starts,
 * whoever else was woken for what is there: hence dirty.
 */
DatabaseSlot *
shmem_attach(int index, uint32 generation)
{
	DatabaseSlot *slot = &pgf_shared->slots[index];
	bool		ours;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ours = (slot->state == SLOT_STARTING && slot->generation == generation &&
			slot->publisher_pid == 0);
	if (ours && slot->holds > 0)
	{
		slot->state = SLOT_WANTED;
		ours = false;
	}
	if (ours)
	{
		slot->publisher_pid = MyProcPid;
		slot->publisher_latch = MyLatch;
		slot->restart = false;
		pg_atomic_write_u32(&slot->dirty, 1);
	}
	LWLockRelease(pgf_shared->lock);
	return ours ? slot : NULL;
}

void
shmem_attached_running(DatabaseSlot *slot)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	Assert(slot->publisher_pid == MyProcPid);
	slot->state = SLOT_RUNNING;
	LWLockRelease(pgf_shared->lock);
}

/* healthy: it ran for so long that earlier failures do not count any more. */
void
shmem_detach(DatabaseSlot *slot, PublisherEnd end, bool healthy)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	Assert(slot->publisher_pid == MyProcPid);
	slot->publisher_pid = 0;
	slot->publisher_latch = NULL;
	if (healthy)
		slot->failures = 0;
	if (slot->restart || slot->holds > 0)
		end = PUBLISHER_RESTART;
	slot->restart = false;
	schedule(slot, end);
	LWLockRelease(pgf_shared->lock);

	ConditionVariableBroadcast(&slot->detached);
}

static void
schedule(DatabaseSlot *slot, PublisherEnd end)
{
	slot->state = SLOT_WANTED;
	slot->restart_after = 0;

	switch (end)
	{
		case PUBLISHER_FAILED:
			note_failure(slot);
			break;
		case PUBLISHER_TERMINATED:
			slot->restart_after = mono_later(RESTART_DELAY_MIN);
			break;
		case PUBLISHER_RESTART:
			break;
		case PUBLISHER_NO_EXTENSION:
			slot->state = SLOT_ABSENT;
			break;
	}
}

static void
note_failure(DatabaseSlot *slot)
{
	int			doublings = Min(slot->failures, 6);
	int			delay = Min(RESTART_DELAY_MIN << doublings, RESTART_DELAY_MAX);

	slot->failures++;
	slot->restart_after = mono_later(delay);
}

/* Waking: any process, also in a commit callback and in an exit callback */

void
shmem_wake_launcher(uint32 rescan)
{
	Latch	   *latch;

	if (pgf_shared == NULL)
		return;
	pg_atomic_fetch_or_u32(&pgf_shared->rescan, rescan);	/* a full barrier */
	latch = ((volatile PgfShared *) pgf_shared)->launcher_latch;
	if (latch != NULL)
		SetLatch(latch);
}

/*
 * The publisher clears dirty before it looks.  If it is set already, the
 * latch was set with it, or there is no publisher, and the next one looks
 * before it waits for the first time.
 */
void
shmem_wake_publisher(DatabaseSlot *slot)
{
	Latch	   *latch;

	if (pg_atomic_exchange_u32(&slot->dirty, 1) != 0)
		return;
	latch = ((volatile DatabaseSlot *) slot)->publisher_latch;
	if (latch != NULL)
		SetLatch(latch);
}
