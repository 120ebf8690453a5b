/*-------------------------------------------------------------------------
 *
 * wakeup.c
 *		The transaction callback: waking workers, releasing holds.
 *
 * All that pg_fanout does at the end of a backend's transaction is done here,
 * in one callback that is registered once per process; but for the rows that
 * still have to be inserted before, see writer.c.
 *
 * XACT_EVENT_COMMIT comes after the transaction has left the ProcArray, so a
 * publisher that is woken by it sees what was committed.  An error in it would
 * be a PANIC, so it must never allocate or read a catalog; and on the hot path (a
 * commit with messages) takes no lock either: one atomic exchange, and a latch
 * if the publisher had nothing to do.  The LWLock in shmem.c is taken only
 * for what is rare, as the server itself does after commit.
 *
 * Scenarios:
 *
 * - COMMIT: the publisher is woken if the transaction wrote messages or changed
 *	 subscriptions, consumers if it left work for them; workers whose settings
 *	 were changed restart; holds end.
 *
 * - ROLLBACK, error, a backend that ends within a transaction (FATAL,
 *	 pg_terminate_backend: the server aborts the transaction before it lets go
 *	 of shared memory): holds end.
 *
 * - PREPARE TRANSACTION: as ROLLBACK.  Nothing is visible yet.  COMMIT PREPARED,
 *	 which may come from another backend, wakes the publisher (see hooks.c).
 *
 * - COMMIT PREPARED by a worker of logical replication (two_phase = true) is no
 *	 command, and nobody can tell what was prepared.  The worker's own
 *	 transaction around it has no transaction id, and those that apply changes
 *	 have one: so the end of each without one wakes the workers.
 *
 * - ROLLBACK TO SAVEPOINT, an error caught in PL/pgSQL: holds taken since then
 *	 end at once, because the locks that made them useful are released, too.
 *	 A wake-up stays, and is in vain at worst.
 *
 * - Parallel workers write nothing: their events are ignored.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "replication/logicalworker.h"
#include "utils/memutils.h"

#include "server/shmem.h"
#include "server/wakeup.h"

typedef struct Hold
{
	DatabaseSlot *slot;			/* NULL: released */
	SubTransactionId subid;
} Hold;

/* What the current transaction asked for; lists in TopTransactionContext. */
static bool publisher_at_commit = false;
static bool removed_at_commit = false;
static bool subscriptions_at_commit = false;
static bool consumers_at_commit = false;
static bool launcher_at_end = false;
static uint32 rescan_at_end = 0;
static List *holds = NIL;		/* of Hold */
static List *restarts = NIL;	/* of Oid */

static void xact_callback(XactEvent event, void *arg);
static void subxact_callback(SubXactEvent event, SubTransactionId subid,
							 SubTransactionId parent, void *arg);
static bool may_be_commit_prepared(void);
static void commit_work(void);
static void end_work(void);
static void release_holds(SubTransactionId subid);
static void inherit_holds(SubTransactionId subid, SubTransactionId parent);

void
wakeup_init(void)
{
	static bool registered = false;

	if (registered || pgf_shared == NULL)
		return;
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
	registered = true;
}

void
wakeup_publisher_at_commit(void)
{
	if (publisher_at_commit || pgf_shared == NULL)
		return;
	wakeup_init();
	publisher_at_commit = true;
}

void
wakeup_removed_at_commit(void)
{
	wakeup_publisher_at_commit();
	removed_at_commit = true;
}

void
wakeup_subscriptions_at_commit(void)
{
	if (pgf_shared == NULL)
		return;
	wakeup_init();
	subscriptions_at_commit = true;
}

void
wakeup_consumers_at_commit(void)
{
	if (pgf_shared == NULL)
		return;
	wakeup_init();
	consumers_at_commit = true;
}

void
wakeup_launcher_at_end(void)
{
	if (pgf_shared == NULL)
		return;
	wakeup_init();
	launcher_at_end = true;
	rescan_at_end |= RESCAN_DATABASES;
}

DatabaseSlot *
wakeup_hold_until_end(Oid database)
{
	MemoryContext old_context;
	Hold	   *hold;

	if (pgf_shared == NULL)
		return NULL;
	wakeup_launcher_at_end();

	/* Everything that can fail comes before the hold. */
	old_context = MemoryContextSwitchTo(TopTransactionContext);
	hold = palloc(sizeof(Hold));
	hold->slot = NULL;
	hold->subid = GetCurrentSubTransactionId();
	holds = lappend(holds, hold);
	MemoryContextSwitchTo(old_context);

	hold->slot = shmem_hold(database);
	if (hold->slot == NULL)
		rescan_at_end |= RESCAN_EXTENSIONS;
	return hold->slot;
}

void
wakeup_restart_at_commit(Oid database)
{
	MemoryContext old_context;

	if (pgf_shared == NULL)
		return;
	wakeup_init();
	old_context = MemoryContextSwitchTo(TopTransactionContext);
	restarts = list_append_unique_oid(restarts, database);
	MemoryContextSwitchTo(old_context);
	launcher_at_end = true;
}

static void
xact_callback(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_COMMIT:
			if (may_be_commit_prepared())
				publisher_at_commit = subscriptions_at_commit = consumers_at_commit = true;
			commit_work();
			end_work();
			break;
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			end_work();
			break;
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
		case XACT_EVENT_PARALLEL_PRE_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PARALLEL_ABORT:
			break;
	}
}

static bool
may_be_commit_prepared(void)
{
	return pgf_shared != NULL && IsLogicalWorker() &&
		!TransactionIdIsValid(GetTopTransactionIdIfAny());
}

/* Must not fail: see above. */
static void
commit_work(void)
{
	ListCell   *cell;

	if (publisher_at_commit)
	{
		DatabaseSlot *slot = shmem_my_slot();

		if (slot != NULL && removed_at_commit)
			pg_atomic_write_u32(&slot->rows_removed, 1);
		/* Without a slot: a publisher that comes later finds the messages. */
		if (slot != NULL)
			shmem_wake_publisher(slot);
	}
	if (subscriptions_at_commit)
	{
		DatabaseSlot *slot = shmem_my_slot();

		/* Without a slot: as above. */
		if (slot != NULL)
			shmem_wake_for_subscriptions(slot);
	}
	if (consumers_at_commit)
		shmem_wake_consumers(MyDatabaseId);
	foreach(cell, restarts)
		shmem_restart_workers(lfirst_oid(cell));
}

/* Must not fail, either. */
static void
end_work(void)
{
	if (holds != NIL)
		release_holds(InvalidSubTransactionId);
	if (launcher_at_end)
		shmem_wake_launcher(rescan_at_end);

	publisher_at_commit = false;
	removed_at_commit = false;
	subscriptions_at_commit = false;
	consumers_at_commit = false;
	launcher_at_end = false;
	rescan_at_end = 0;
	holds = NIL;
	restarts = NIL;
}

static void
subxact_callback(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent, void *arg)
{
	if (holds == NIL)
		return;
	if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		release_holds(subid);
		shmem_wake_launcher(RESCAN_DATABASES);
	}
	else if (event == SUBXACT_EVENT_COMMIT_SUB)
		inherit_holds(subid, parent);
}

/* InvalidSubTransactionId: all. */
static void
release_holds(SubTransactionId subid)
{
	ListCell   *cell;

	foreach(cell, holds)
	{
		Hold	   *hold = lfirst(cell);

		if (hold->slot == NULL || (subid != InvalidSubTransactionId && hold->subid != subid))
			continue;
		shmem_release(hold->slot);
		hold->slot = NULL;
	}
}

static void
inherit_holds(SubTransactionId subid, SubTransactionId parent)
{
	ListCell   *cell;

	foreach(cell, holds)
	{
		Hold	   *hold = lfirst(cell);

		if (hold->subid == subid)
			hold->subid = parent;
	}
}
