/*-------------------------------------------------------------------------
 *
 * shmem.c
 *		The slots in shared memory, and every transition of their state.
 *
 * A slot stands for one worker that runs, should run, or must not run for a
 * while: the publisher of a database, or the consumer of a subscription.  No
 * other file writes a slot's lifecycle fields, so that whether two workers can
 * run for one, or one that was asked to leave can stay, is decided here:
 *
 * - want (a backend, the launcher): FREE or ABSENT becomes WANTED.
 *
 * - set_subscriptions (publisher): the same for the slots of subscriptions.
 *	 One that is gone becomes FREE, at once or, if its worker has attached,
 *	 when that detaches.
 *
 * - begin_start (launcher): WANTED without holds becomes STARTING, under a
 *	 new generation that only the worker registered for it knows.
 *
 * - attach (worker): only if the slot is STARTING under its generation, no
 *	 other has attached and there is no hold.  It sets the pid before it
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
 *	 becomes FREE, unless it is held.  With a publisher's slot, those of the
 *	 database's subscriptions become unwanted.
 *
 * Holds are counted, belong to transactions (see wakeup.c), and keep all
 * workers out of a database.
 *
 * Locking: pgf_shared->lock is held exclusively for each of these and never
 * while anything can be raised or waited for.  Signals are sent under it:
 * the pid is cleared under it before the process ends, so the pid cannot
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

#include "server/backlog.h"
#include "server/compat.h"
#include "server/guc.h"
#include "server/shmem.h"

#define TRANCHE_NAME		"pg_fanout"

/* Delay before a worker is started again, in milliseconds. */
#define RESTART_DELAY_MIN	1000
#define RESTART_DELAY_MAX	60000

PgfShared  *pgf_shared = NULL;
Announcement *shmem_announcements = NULL;

static shmem_startup_hook_type next_shmem_startup = NULL;
#if PGF_HAVE_SHMEM_REQUEST_HOOK
static shmem_request_hook_type next_shmem_request = NULL;
#endif

static void request_shmem(void);
static void startup_shmem(void);
static Size shmem_size(void);
static Size announcements_size(void);
static void init_shared(PgfShared *shared);
static void init_slot(DatabaseSlot *slot);
static void reset_slot(DatabaseSlot *slot);
static DatabaseSlot *find_slot(Oid database);
static DatabaseSlot *want_slot_locked(Oid database);
static void init_worker(WorkerSlot *worker, WorkerKind kind);
static void init_subscription(SubscriptionSlot *slot);
static void reset_worker(WorkerSlot *worker);
static void reset_subscription(SubscriptionSlot *slot);
static void signal_worker(WorkerSlot *worker);
static bool stop_worker(WorkerSlot *worker, Oid database, MonoTime deadline);
static bool worker_attached(WorkerSlot *worker, Oid database);
static void restart_worker(WorkerSlot *worker);
static const Subscription *find_subscription(const Subscription *subscriptions, int n, int32 id);
static void update_subscription(SubscriptionSlot *slot, const Subscription *wanted);
static void end_subscription(SubscriptionSlot *slot);
static bool add_subscription(Oid database, const Subscription *wanted);
static void end_history(WorkerSlot *worker);
static void free_worker(WorkerSlot *worker);
static void schedule(WorkerSlot *worker, WorkerEnd end);
static void note_failure(WorkerSlot *worker);

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
	RequestAddinShmemSpace(add_size(shmem_size(), announcements_size()));
	RequestAddinShmemSpace(backlog_shmem_size());
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
	shmem_announcements = ShmemInitStruct("pg_fanout insertions", announcements_size(), &found);
	for (int i = 0; i < pgf_max_backends() && !found; i++)
		pg_atomic_init_u64(&shmem_announcements[i].place, 0);
	backlog_shmem_init();
	LWLockRelease(AddinShmemInitLock);
}

static Size
database_slots_size(void)
{
	return MAXALIGN(add_size(offsetof(PgfShared, slots),
							 mul_size(pgf_max_databases, sizeof(DatabaseSlot))));
}

static Size
shmem_size(void)
{
	return add_size(database_slots_size(),
					mul_size(pgf_max_subscriptions, sizeof(SubscriptionSlot)));
}

static Size
announcements_size(void)
{
	return mul_size(pgf_max_backends(), sizeof(Announcement));
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
	shared->nsubscriptions = pgf_max_subscriptions;
	shared->subscriptions = (SubscriptionSlot *) ((char *) shared + database_slots_size());
	for (int i = 0; i < shared->nsubscriptions; i++)
		init_subscription(&shared->subscriptions[i]);
}

static void
init_worker(WorkerSlot *worker, WorkerKind kind)
{
	worker->kind = kind;
	worker->state = SLOT_FREE;
	ConditionVariableInit(&worker->detached);
	SpinLockInit(&worker->mutex);
}

static void
init_slot(DatabaseSlot *slot)
{
	init_worker(&slot->worker, WORKER_PUBLISHER);
	init_worker(&slot->history, WORKER_HISTORY);
	pg_atomic_init_u32(&slot->rows_removed, 0);
	pg_atomic_init_u32(&slot->history_dirty, 0);
	ConditionVariableInit(&slot->progress);
	pg_atomic_init_u32(&slot->dirty, 0);
	pg_atomic_init_u32(&slot->ids_follow_clock, 0);
	pg_atomic_init_u32(&slot->subscriptions_dirty, 0);
	pg_atomic_init_u32(&slot->current_segment, 0);
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		pg_atomic_init_u32(&slot->written[i], 0);
	pg_atomic_init_u64(&slot->flush_requested, 0);
	pg_atomic_init_u64(&slot->flush_done, 0);
	pg_atomic_init_u64(&slot->verify_requested, 0);
	pg_atomic_init_u64(&slot->verify_done, 0);
	pg_atomic_init_u32(&slot->backlog_known, 0);
	pg_atomic_init_u32(&slot->tallies, 0);
	pg_atomic_init_u32(&slot->in_flight, 0);
	pg_atomic_init_u64(&slot->published, 0);
	pg_atomic_init_u64(&slot->confirmed, 0);
	pg_atomic_init_u64(&slot->returned, 0);
	pg_atomic_init_u64(&slot->nacked, 0);
	pg_atomic_init_u64(&slot->reconnects, 0);
	pg_atomic_init_u64(&slot->dead, 0);
}

static void
init_subscription(SubscriptionSlot *slot)
{
	init_worker(&slot->worker, WORKER_CONSUMER);
	pg_atomic_init_u32(&slot->dirty, 0);
	pg_atomic_init_u32(&slot->waiting, 0);
	pg_atomic_init_u64(&slot->delivered, 0);
	pg_atomic_init_u64(&slot->applied, 0);
	pg_atomic_init_u64(&slot->skipped, 0);
	pg_atomic_init_u64(&slot->stale, 0);
	pg_atomic_init_u64(&slot->own, 0);
	pg_atomic_init_u64(&slot->ignored, 0);
	pg_atomic_init_u64(&slot->failed, 0);
	pg_atomic_init_u64(&slot->dead, 0);
	pg_atomic_init_u64(&slot->reconnects, 0);
	pg_atomic_init_u64(&slot->lag, 0);
}

/*
 * What the previous owner left.  The condition variables stay as they are,
 * because somebody may still be about to leave them.
 */
static void
reset_worker(WorkerSlot *worker)
{
	worker->restart = false;
	worker->unwanted = false;
	worker->failures = 0;
	worker->restart_after = 0;
	SpinLockAcquire(&worker->mutex);
	memset(&worker->status, 0, sizeof(worker->status));
	worker->status.state = WORKER_STOPPED;
	SpinLockRelease(&worker->mutex);
}

static void
reset_slot(DatabaseSlot *slot)
{
	reset_worker(&slot->worker);
	pg_atomic_write_u32(&slot->dirty, 0);
	pg_atomic_write_u32(&slot->subscriptions_dirty, 0);
	pg_atomic_write_u32(&slot->history_dirty, 0);
	pg_atomic_write_u32(&slot->current_segment, 0);
	pg_atomic_write_u32(&slot->ids_follow_clock, 0);
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
}

static void
reset_subscription(SubscriptionSlot *slot)
{
	reset_worker(&slot->worker);
	slot->clean = false;
	pg_atomic_write_u32(&slot->dirty, 0);
	pg_atomic_write_u32(&slot->waiting, 0);
	pg_atomic_write_u64(&slot->delivered, 0);
	pg_atomic_write_u64(&slot->applied, 0);
	pg_atomic_write_u64(&slot->skipped, 0);
	pg_atomic_write_u64(&slot->stale, 0);
	pg_atomic_write_u64(&slot->own, 0);
	pg_atomic_write_u64(&slot->ignored, 0);
	pg_atomic_write_u64(&slot->failed, 0);
	pg_atomic_write_u64(&slot->dead, 0);
	pg_atomic_write_u64(&slot->reconnects, 0);
	pg_atomic_write_u64(&slot->lag, 0);
}

/* Finding, wanting and holding: any backend */

/* With the lock, or as shmem_my_slot() without it. */
static DatabaseSlot *
find_slot(Oid database)
{
	for (int i = 0; i < pgf_shared->nslots; i++)
	{
		if (pgf_shared->slots[i].worker.database == database)
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
	if (cached == NULL || cached->worker.database != MyDatabaseId)
		cached = find_slot(MyDatabaseId);
	return cached;
}

/* One that the history worker of an earlier owner has left, too. */
static DatabaseSlot *
find_free_slot(void)
{
	for (int i = 0; i < pgf_shared->nslots; i++)
	{
		DatabaseSlot *slot = &pgf_shared->slots[i];

		if (!OidIsValid(slot->worker.database) && !OidIsValid(slot->history.database))
			return slot;
	}
	return NULL;
}

static DatabaseSlot *
want_slot_locked(Oid database)
{
	DatabaseSlot *slot = find_slot(database);

	if (slot == NULL)
	{
		slot = find_free_slot();
		if (slot == NULL)
			return NULL;
		reset_slot(slot);
		pg_write_barrier();		/* shmem_my_slot() sees a slot that is clean */
		slot->worker.database = database;
	}
	if (slot->worker.state == SLOT_FREE || slot->worker.state == SLOT_ABSENT)
		slot->worker.state = SLOT_WANTED;
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
		slot->worker.restart_after = 0;
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

bool
shmem_held(const WorkerSlot *worker)
{
	const DatabaseSlot *slot = OidIsValid(worker->database) ? find_slot(worker->database) : NULL;

	return slot != NULL && slot->holds > 0;
}

/* All workers */

int
shmem_worker_count(void)
{
	return 2 * pgf_shared->nslots + pgf_shared->nsubscriptions;
}

WorkerSlot *
shmem_worker(int index)
{
	if (index < pgf_shared->nslots)
		return &pgf_shared->slots[index].worker;
	index -= pgf_shared->nslots;
	if (index < pgf_shared->nsubscriptions)
		return &pgf_shared->subscriptions[index].worker;
	return &pgf_shared->slots[index - pgf_shared->nsubscriptions].history;
}

/* Stopping: any backend */

static void
signal_worker(WorkerSlot *worker)
{
	if (worker->pid != 0)
		kill(worker->pid, SIGTERM);
}

bool
shmem_stop_workers(DatabaseSlot *slot, long timeout_ms)
{
	MonoTime	deadline = mono_later(timeout_ms);
	Oid			database = slot->worker.database;
	bool		stopped = true;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	Assert(slot->holds > 0);
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		if (shmem_worker(i)->database == database)
			signal_worker(shmem_worker(i));
	}
	LWLockRelease(pgf_shared->lock);

	for (int i = 0; i < shmem_worker_count(); i++)
		stopped = stop_worker(shmem_worker(i), database, deadline) && stopped;
	return stopped;
}

/* Waits until it has left the database. */
static bool
stop_worker(WorkerSlot *worker, Oid database, MonoTime deadline)
{
	bool		stopped;

	if (!worker_attached(worker, database))
		return true;
	ConditionVariablePrepareToSleep(&worker->detached);
	while (!(stopped = !worker_attached(worker, database)))
	{
		long		left = mono_left(mono_now(), deadline);

		if (left == 0)
			break;
		ConditionVariableTimedSleep(&worker->detached, left, pgf_wait_event(PGF_WAIT_STOP));
	}
	ConditionVariableCancelSleep();
	return stopped;
}

static bool
worker_attached(WorkerSlot *worker, Oid database)
{
	bool		attached;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	attached = (worker->database == database && worker->pid != 0);
	LWLockRelease(pgf_shared->lock);
	return attached;
}

void
shmem_restart_workers(Oid database)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < shmem_worker_count(); i++)
	{
		WorkerSlot *worker = shmem_worker(i);

		if (OidIsValid(worker->database) &&
			(worker->database == database || !OidIsValid(database)))
			restart_worker(worker);
	}
	LWLockRelease(pgf_shared->lock);
}

static void
restart_worker(WorkerSlot *worker)
{
	worker->restart_after = 0;
	worker->restart = (worker->pid != 0);
	signal_worker(worker);
}

/* Subscriptions: the publisher */

int
shmem_set_subscriptions(Oid database, const Subscription *subscriptions, int n)
{
	int			without = 0;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < pgf_shared->nsubscriptions; i++)
	{
		SubscriptionSlot *slot = &pgf_shared->subscriptions[i];
		const Subscription *wanted;

		if (slot->worker.database != database)
			continue;
		wanted = find_subscription(subscriptions, n, slot->subscription.subscription_id);
		if (wanted != NULL)
			update_subscription(slot, wanted);
		else
			end_subscription(slot);
	}
	for (int i = 0; i < n; i++)
	{
		if (shmem_subscription_slot(database, subscriptions[i].subscription_id) == NULL &&
			!add_subscription(database, &subscriptions[i]))
			without++;
	}
	LWLockRelease(pgf_shared->lock);
	return without;
}

static const Subscription *
find_subscription(const Subscription *subscriptions, int n, int32 id)
{
	for (int i = 0; i < n; i++)
	{
		if (subscriptions[i].subscription_id == id)
			return &subscriptions[i];
	}
	return NULL;
}

static void
update_subscription(SubscriptionSlot *slot, const Subscription *wanted)
{
	bool		same = (slot->subscription.version == wanted->version &&
						slot->subscription.role == wanted->role);

	slot->subscription = *wanted;
	if (same && !slot->worker.unwanted)
		return;
	slot->worker.unwanted = false;
	slot->worker.failures = 0;
	restart_worker(&slot->worker);
}

static void
end_subscription(SubscriptionSlot *slot)
{
	if (slot->worker.pid == 0)
	{
		free_worker(&slot->worker);
		return;
	}
	slot->worker.unwanted = true;
	signal_worker(&slot->worker);
}

static bool
add_subscription(Oid database, const Subscription *wanted)
{
	for (int i = 0; i < pgf_shared->nsubscriptions; i++)
	{
		SubscriptionSlot *slot = &pgf_shared->subscriptions[i];

		if (OidIsValid(slot->worker.database))
			continue;
		reset_subscription(slot);
		slot->subscription = *wanted;
		slot->worker.state = SLOT_WANTED;
		pg_write_barrier();
		slot->worker.database = database;
		return true;
	}
	return false;
}

SubscriptionSlot *
shmem_subscription_slot(Oid database, int32 subscription_id)
{
	if (pgf_shared == NULL)
		return NULL;
	for (int i = 0; i < pgf_shared->nsubscriptions; i++)
	{
		SubscriptionSlot *slot = &pgf_shared->subscriptions[i];

		if (slot->worker.database == database && slot->subscription.subscription_id == subscription_id)
			return slot;
	}
	return NULL;
}

/* History: the publisher, and the worker itself */

void
shmem_want_history(DatabaseSlot *slot)
{
	WorkerSlot *worker = &slot->history;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	pg_atomic_write_u32(&slot->history_dirty, 1);
	if (!OidIsValid(worker->database))
	{
		reset_worker(worker);
		worker->state = SLOT_WANTED;
		worker->database = slot->worker.database;
	}
	else if (worker->unwanted)
	{
		worker->unwanted = false;
		worker->restart = (worker->pid != 0);
	}
	LWLockRelease(pgf_shared->lock);
}

bool
shmem_end_history(DatabaseSlot *slot)
{
	bool		ended;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ended = (pg_atomic_read_u32(&slot->history_dirty) == 0);
	if (ended)
		slot->history.unwanted = true;
	LWLockRelease(pgf_shared->lock);
	return ended;
}

static void
end_history(WorkerSlot *worker)
{
	if (!OidIsValid(worker->database))
		return;
	worker->unwanted = true;
	if (worker->pid == 0)
		free_worker(worker);
	else
		signal_worker(worker);
}

/* Lifecycle: launcher */

/*
 * Makes the slot STARTING for the worker that is registered next, and tells
 * its generation.  Returns false if that is not possible (any more).
 */
bool
shmem_begin_start(WorkerSlot *worker, Oid database, uint32 *generation)
{
	bool		ok;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ok = (worker->database == database && worker->state == SLOT_WANTED && !shmem_held(worker));
	if (ok)
	{
		worker->state = SLOT_STARTING;
		*generation = ++worker->generation;
	}
	LWLockRelease(pgf_shared->lock);
	return ok;
}

/*
 * Takes back a start of which no worker has attached; failed: the worker ended
 * by itself, so back off.  Returns false if one has attached.
 */
bool
shmem_cancel_start(WorkerSlot *worker, uint32 generation, bool failed)
{
	bool		ok;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ok = (worker->state == SLOT_STARTING && worker->generation == generation &&
		  worker->pid == 0);
	if (ok)
	{
		worker->state = SLOT_WANTED;
		worker->generation++;
		if (failed)
			note_failure(worker);
	}
	LWLockRelease(pgf_shared->lock);
	return ok;
}

static void
free_worker(WorkerSlot *worker)
{
	worker->database = InvalidOid;
	worker->state = SLOT_FREE;
	worker->generation++;
	worker->unwanted = false;
}

/*
 * Frees a slot that is still the database's, in that state and not held.
 */
bool
shmem_free_slot(WorkerSlot *worker, Oid database, SlotState state)
{
	bool		ok;

	Assert(state == SLOT_WANTED || state == SLOT_ABSENT);

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ok = (worker->database == database && worker->state == state && !shmem_held(worker));
	if (ok)
		free_worker(worker);
	if (ok && worker->kind == WORKER_PUBLISHER)
		end_history(&((DatabaseSlot *) worker)->history);
	for (int i = 0; i < pgf_shared->nsubscriptions && ok && worker->kind == WORKER_PUBLISHER; i++)
	{
		if (pgf_shared->subscriptions[i].worker.database == database)
			end_subscription(&pgf_shared->subscriptions[i]);
	}
	LWLockRelease(pgf_shared->lock);
	return ok;
}

/* Lifecycle: worker */

/*
 * Takes the slot for which this worker was started.  Returns NULL if it is
 * not wanted (any more).  The worker must look at its tables when it starts,
 * whoever else was woken for what is there: hence dirty.
 */
WorkerSlot *
shmem_attach(int index, uint32 generation)
{
	WorkerSlot *worker = shmem_worker(index);
	bool		ours;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	ours = (worker->state == SLOT_STARTING && worker->generation == generation &&
			worker->pid == 0);
	if (ours && shmem_held(worker))
	{
		worker->state = SLOT_WANTED;
		ours = false;
	}
	if (ours)
	{
		worker->pid = MyProcPid;
		worker->latch = MyLatch;
		worker->restart = false;
		if (worker->kind == WORKER_PUBLISHER)
			pg_atomic_write_u32(&((DatabaseSlot *) worker)->dirty, 1);
		else if (worker->kind == WORKER_CONSUMER)
			pg_atomic_write_u32(&((SubscriptionSlot *) worker)->dirty, 1);
	}
	LWLockRelease(pgf_shared->lock);
	return ours ? worker : NULL;
}

void
shmem_attached_running(WorkerSlot *worker)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	Assert(worker->pid == MyProcPid);
	worker->state = SLOT_RUNNING;
	LWLockRelease(pgf_shared->lock);
}

/* healthy: it ran for so long that earlier failures do not count any more. */
void
shmem_detach(WorkerSlot *worker, WorkerEnd end, bool healthy)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	Assert(worker->pid == MyProcPid);
	worker->pid = 0;
	worker->latch = NULL;
	if (healthy)
		worker->failures = 0;
	if (worker->restart || shmem_held(worker))
		end = WORKER_RESTART;
	worker->restart = false;
	if (worker->unwanted)
		free_worker(worker);
	else
		schedule(worker, end);
	LWLockRelease(pgf_shared->lock);

	ConditionVariableBroadcast(&worker->detached);
}

static void
schedule(WorkerSlot *worker, WorkerEnd end)
{
	worker->state = SLOT_WANTED;
	worker->restart_after = 0;

	switch (end)
	{
		case WORKER_FAILED:
			note_failure(worker);
			break;
		case WORKER_TERMINATED:
			worker->restart_after = mono_later(RESTART_DELAY_MIN);
			break;
		case WORKER_RESTART:
			break;
		case WORKER_NO_EXTENSION:
			worker->state = SLOT_ABSENT;
			break;
	}
}

static void
note_failure(WorkerSlot *worker)
{
	int			doublings = Min(worker->failures, 6);
	int			delay = Min(RESTART_DELAY_MIN << doublings, RESTART_DELAY_MAX);

	worker->failures++;
	worker->restart_after = mono_later(delay);
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
	latch = ((volatile DatabaseSlot *) slot)->worker.latch;
	if (latch != NULL)
		SetLatch(latch);
}

void
shmem_wake_for_subscriptions(DatabaseSlot *slot)
{
	Latch	   *latch;

	pg_atomic_exchange_u32(&slot->subscriptions_dirty, 1);	/* a full barrier */
	latch = ((volatile DatabaseSlot *) slot)->worker.latch;
	if (latch != NULL)
		SetLatch(latch);
}

void
shmem_wake_consumers(Oid database)
{
	for (int i = 0; i < pgf_shared->nsubscriptions; i++)
	{
		SubscriptionSlot *slot = &pgf_shared->subscriptions[i];
		Latch	   *latch;

		if (slot->worker.database != database)
			continue;
		pg_atomic_exchange_u32(&slot->dirty, 1);
		latch = ((volatile SubscriptionSlot *) slot)->worker.latch;
		if (latch != NULL)
			SetLatch(latch);
	}
}
