/*-------------------------------------------------------------------------
 *
 * shmem.h
 *		The slots in shared memory: one for each database that has, or may
 *		have, the extension, with its history worker, and one for each subscription.
 *
 * Locking: pgf_shared->lock (an LWLock) guards a worker's lifecycle (fields up
 * to "mutex") and what else says so.  Hot fields are atomics and are touched by
 * committing backends without any lock.  The status block is written by the
 * worker alone, under the slot's spinlock, and read under it.
 *
 * The transitions of a slot's state, and who makes them, are in shmem.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SHMEM_H
#define PGF_SHMEM_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "port/atomics.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/spin.h"

#include "server/monotime.h"
#include "server/tables.h"

typedef enum SlotState
{
	SLOT_FREE,					/* unused */
	SLOT_WANTED,				/* a worker should be started */
	SLOT_STARTING,				/* registered; has not seen the extension yet */
	SLOT_RUNNING,				/* the worker has seen the extension */
	SLOT_ABSENT,				/* the worker found no extension; the launcher
								 * takes note and frees the slot */
} SlotState;

typedef enum WorkerState
{
	WORKER_STARTING,
	WORKER_CONNECTING,
	WORKER_IDLE,
	WORKER_PUBLISHING,
	WORKER_CONSUMING,
	WORKER_BLOCKED,				/* by the broker (connection.blocked) */
	WORKER_REFUSED,				/* connected, but the queue or the handler
								 * cannot be used; waits before it tries again */
	WORKER_DISCONNECTED,		/* waits before it tries to connect again */
	WORKER_PASSIVE,				/* waits until the database may publish and
								 * consume */
	WORKER_STOPPED,
} WorkerState;

typedef struct WorkerStatus
{
	WorkerState state;
	TimestampTz since;			/* of the state */
	TimestampTz connected_at;	/* 0 = not connected */
	char		connected_to[256];	/* host:port/vhost, "" = not connected */
	char		last_error[512];	/* "" = none */
	TimestampTz last_error_at;	/* 0 = none */
} WorkerStatus;

typedef enum WorkerKind
{
	WORKER_PUBLISHER,
	WORKER_CONSUMER,
	WORKER_HISTORY,
} WorkerKind;

/* What the slots of all kinds of workers have in common. */
typedef struct WorkerSlot
{
	WorkerKind	kind;			/* never changes */
	Oid			database;		/* InvalidOid = free */
	SlotState	state;
	uint32		generation;		/* incremented with each start and when freed */
	bool		restart;		/* the worker was told to end, to start again
								 * at once */
	bool		unwanted;		/* the worker was told to end for good */
	int			pid;			/* 0 = none attached */
	Latch	   *latch;			/* points into ProcGlobal, never freed; NULL =
								 * none attached */
	int			failures;		/* in a row, for the backoff */
	MonoTime	restart_after;	/* launcher starts it no sooner */
	ConditionVariable detached; /* signalled when pid becomes 0 */

	slock_t		mutex;
	WorkerStatus status;
} WorkerSlot;

/*
 * What one session inserts into the outbox, see insertion.c: the table's oid and a
 * block, 0: nothing.  Tables of other databases may have the same oid; a floor then
 * waits for somebody else's insertion, for a moment.
 */
typedef union Announcement
{
	pg_atomic_uint64 place;
	char		line[PG_CACHE_LINE_SIZE];	/* sessions must not share one */
} Announcement;

/*
 * The publisher adds up the entries of fanout.tally when there are so many, because whoever
 * looks at the counts reads all that are left: less than 1 ms.
 */
#define MANY_TALLIES 1000

typedef struct DatabaseSlot
{
	WorkerSlot	worker;			/* the publisher */
	WorkerSlot	history;		/* free unless something of the past is to be
								 * sent */
	int			holds;			/* transactions that keep workers out of the
								 * database; under the lock */

	/* hot */
	pg_atomic_uint32 dirty;		/* something was committed since the last read */
	pg_atomic_uint32 rows_removed;	/* from the outbox, by hand */
	pg_atomic_uint32 subscriptions_dirty;	/* subscriptions were changed */
	pg_atomic_uint32 history_dirty; /* fanout.backfill was changed */
	pg_atomic_uint32 current_segment;	/* of the ring of outbox segments */
	pg_atomic_uint32 written[OUTBOX_SEGMENTS];	/* marks, see insertion.c */
	pg_atomic_uint32 ids_follow_clock;	/* the outbox's sequence was moved on
										 * since the server started */
	pg_atomic_uint64 flush_requested;	/* tickets drawn by flush() */
	pg_atomic_uint64 flush_done;	/* highest ticket served */
	pg_atomic_uint64 verify_requested;	/* tickets drawn by check() */
	pg_atomic_uint64 verify_done;
	pg_atomic_uint32 backlog_known; /* the figures of backlog.c are true */
	pg_atomic_uint32 tallies;	/* entries in fanout.tally that were not added
								 * up, about */
	ConditionVariable progress; /* signalled when flush_done or verify_done
								 * moves */

	/* counters since the slot was taken; written by the publisher alone */
	pg_atomic_uint32 in_flight;
	pg_atomic_uint64 published;
	pg_atomic_uint64 confirmed;
	pg_atomic_uint64 returned;
	pg_atomic_uint64 nacked;
	pg_atomic_uint64 reconnects;
	pg_atomic_uint64 dead;
} DatabaseSlot;

/* A row of fanout.subscription that is to have a worker. */
typedef struct Subscription
{
	int32		subscription_id;
	int32		version;		/* another one: the worker starts again */
	Oid			role;			/* as whom the worker connects */
} Subscription;

typedef struct SubscriptionSlot
{
	WorkerSlot	worker;			/* the consumer */
	Subscription subscription;	/* under the lock */
	bool		clean;			/* the last worker ended while no handler ran;
								 * under the lock */

	/* hot */
	pg_atomic_uint32 dirty;		/* the worker should look into its tables */

	/* counters since the slot was taken; written by the consumer alone */
	pg_atomic_uint32 waiting;
	pg_atomic_uint64 delivered;
	pg_atomic_uint64 applied;
	pg_atomic_uint64 skipped;
	pg_atomic_uint64 stale;
	pg_atomic_uint64 own;
	pg_atomic_uint64 ignored;
	pg_atomic_uint64 failed;
	pg_atomic_uint64 dead;
	pg_atomic_uint64 reconnects;
	pg_atomic_uint64 lag;		/* messages in the queue, plus 1; 0 = unknown */
} SubscriptionSlot;

/* What the launcher is asked to find out, in PgfShared.rescan. */
#define RESCAN_DATABASES	1	/* pg_database may have changed */
#define RESCAN_EXTENSIONS	2	/* also look again where there was none */

typedef struct PgfShared
{
	LWLock	   *lock;
	int			launcher_pid;	/* 0 = none; under the lock */
	Latch	   *launcher_latch; /* NULL = none; read without the lock */
	pg_atomic_uint32 rescan;	/* RESCAN_xxx bits, cleared by the launcher */
	int			nslots;
	int			nsubscriptions;
	SubscriptionSlot *subscriptions;	/* an array behind this one */
	DatabaseSlot slots[FLEXIBLE_ARRAY_MEMBER];
} PgfShared;

extern PgfShared *pgf_shared;	/* NULL: the library is not preloaded */

/* One for each backend, by its number; NULL without shared memory. */
extern Announcement *shmem_announcements;

extern void shmem_init(void);	/* installs the hooks, from _PG_init */

/*
 * The slot of this process's database, or NULL if there is none (library not
 * preloaded, no publisher was ever wanted, or all slots are taken).  Takes no
 * lock and cannot fail, so it may be called in a commit callback.  The
 * pointer is cached and checked against the database's oid.  The slot may be
 * given to another database later, but not while this transaction has a lock
 * on one of the extension's tables: then a publisher finds the extension.
 */
extern DatabaseSlot *shmem_my_slot(void);

/*
 * Finds or takes a slot for a database and marks it SLOT_WANTED unless a
 * worker is starting or running.  Returns NULL if all are taken
 * (pg_fanout.max_databases).  Caller wakes the launcher.
 */
extern DatabaseSlot *shmem_want_slot(Oid database);

/*
 * As shmem_want_slot(), and keeps the launcher from starting a worker, and
 * one that was started from connecting, until shmem_release().  One that is
 * connected goes on until shmem_stop_publisher().  A held slot is never freed.
 * A backoff ends: what failed may be what is being changed.
 * Not for direct use: wakeup_hold_until_end() pairs the calls.
 */
extern DatabaseSlot *shmem_hold(Oid database);
extern void shmem_release(DatabaseSlot *slot);

/*
 * Ends all workers of a database whose slot the caller holds and waits,
 * interruptibly and at most timeout_ms, until they have left it.  Returns
 * false if one has not.
 */
extern bool shmem_stop_workers(DatabaseSlot *slot, long timeout_ms);

/*
 * Tells the workers of a database (InvalidOid: all workers) to end and have
 * themselves started again at once.  If one waits to be started again, the
 * backoff ends.  Caller wakes the launcher.
 */
extern void shmem_restart_workers(Oid database);

/*
 * These are the subscriptions of a database, and no others: new ones get
 * slots, workers of those that are gone are told to end, and those of changed
 * ones to start again.  Returns how many got no slot
 * (pg_fanout.max_subscriptions).  Caller wakes the launcher.
 */
extern int	shmem_set_subscriptions(Oid database, const Subscription *subscriptions, int n);

/* The slot of a worker of this database's, or NULL.  Takes no lock. */
extern SubscriptionSlot *shmem_subscription_slot(Oid database, int32 subscription_id);

/*
 * The publisher asks for the history worker of its database, which ends itself
 * once nothing is left to do.  It goes on (false) if it was asked for meanwhile.
 * Caller wakes the launcher.
 */
extern void shmem_want_history(DatabaseSlot *slot);
extern bool shmem_end_history(DatabaseSlot *slot);

/* All workers, of databases, subscriptions and history, in one numbering. */
extern int	shmem_worker_count(void);
extern WorkerSlot *shmem_worker(int index);

/* Do holds keep the worker out of its database?  With the lock. */
extern bool shmem_held(const WorkerSlot *worker);

/* Lifecycle steps of the launcher. */
extern bool shmem_begin_start(WorkerSlot *worker, Oid database, uint32 *generation);
extern bool shmem_cancel_start(WorkerSlot *worker, uint32 generation, bool failed);
extern bool shmem_free_slot(WorkerSlot *worker, Oid database, SlotState state);

/* Lifecycle steps of a worker. */
typedef enum WorkerEnd
{
	WORKER_FAILED,				/* error: start again, backing off */
	WORKER_TERMINATED,			/* by hand: start again in a second */
	WORKER_RESTART,				/* start again at once */
	WORKER_NO_EXTENSION,		/* start again when somebody asks */
} WorkerEnd;

extern WorkerSlot *shmem_attach(int index, uint32 generation);
extern void shmem_attached_running(WorkerSlot *worker);
extern void shmem_detach(WorkerSlot *worker, WorkerEnd end, bool healthy);

/*
 * Sets the launcher's latch; rescan: RESCAN_xxx bits or 0.  Takes no lock and
 * cannot fail.
 */
extern void shmem_wake_launcher(uint32 rescan);

/* Sets the publisher's latch, once until it has looked.  Same promise. */
extern void shmem_wake_publisher(DatabaseSlot *slot);

/* Makes the publisher read the subscriptions again.  Same promise. */
extern void shmem_wake_for_subscriptions(DatabaseSlot *slot);

/* Makes the consumers of a database look into their tables.  Same promise. */
extern void shmem_wake_consumers(Oid database);

#endif							/* PGF_SHMEM_H */
