/*-------------------------------------------------------------------------
 *
 * shmem.h
 *		The slots in shared memory: one for each database that has, or may
 *		have, the extension.
 *
 * Locking: pgf_shared->lock (an LWLock) guards a slot's lifecycle (fields up
 * to "hot").  Hot fields are atomics and are touched by committing backends
 * without any lock.  The status block is written by the publisher alone,
 * under the slot's spinlock, and read under it.
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

#include "monotime.h"

typedef enum SlotState
{
	SLOT_FREE,					/* unused */
	SLOT_WANTED,				/* a publisher should be started */
	SLOT_STARTING,				/* registered; has not seen the extension yet */
	SLOT_RUNNING,				/* the publisher has seen the extension */
	SLOT_ABSENT,				/* the publisher found no extension; the
								 * launcher takes note and frees the slot */
} SlotState;

typedef enum PublisherState
{
	PUBLISHER_STARTING,
	PUBLISHER_CONNECTING,
	PUBLISHER_IDLE,
	PUBLISHER_PUBLISHING,
	PUBLISHER_BLOCKED,			/* by the broker (connection.blocked) */
	PUBLISHER_DISCONNECTED,		/* waits before it tries to connect again */
	PUBLISHER_STOPPED,
} PublisherState;

typedef struct PublisherStatus
{
	PublisherState state;
	TimestampTz since;			/* of the state */
	TimestampTz connected_at;	/* 0 = not connected */
	char		connected_to[256];	/* host:port/vhost, "" = not connected */
	char		last_error[512];	/* "" = none */
	TimestampTz last_error_at;	/* 0 = none */
} PublisherStatus;

typedef struct DatabaseSlot
{
	/* lifecycle, under pgf_shared->lock */
	Oid			database;		/* InvalidOid = free */
	SlotState	state;
	uint32		generation;		/* incremented with each start and when freed */
	int			holds;			/* transactions that keep workers out */
	bool		restart;		/* the publisher was told to end, to start
								 * again at once */
	int			publisher_pid;	/* 0 = none attached */
	Latch	   *publisher_latch;	/* points into ProcGlobal, never freed;
									 * NULL = none attached */
	int			failures;		/* in a row, for the backoff */
	MonoTime	restart_after;	/* launcher starts it no sooner */
	ConditionVariable detached; /* signalled when publisher_pid becomes 0 */

	/* hot */
	pg_atomic_uint32 dirty;		/* something was committed since the last read */
	pg_atomic_uint32 current_segment;	/* of the ring of outbox segments */
	pg_atomic_uint64 flush_requested;	/* tickets drawn by flush() */
	pg_atomic_uint64 flush_done;	/* highest ticket served */
	pg_atomic_uint64 verify_requested;	/* tickets drawn by check() */
	pg_atomic_uint64 verify_done;
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

	slock_t		mutex;
	PublisherStatus status;
} DatabaseSlot;

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
	DatabaseSlot slots[FLEXIBLE_ARRAY_MEMBER];
} PgfShared;

extern PgfShared *pgf_shared;	/* NULL: the library is not preloaded */

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
 * Ends the publisher of a slot that the caller holds and waits, interruptibly
 * and at most timeout_ms, until it has left its database.  Returns false if
 * it has not.
 */
extern bool shmem_stop_publisher(DatabaseSlot *slot, long timeout_ms);

/*
 * Tells the publisher of a database (InvalidOid: every publisher) to end and
 * have itself started again at once.  If it waits to be started again, the
 * backoff ends.  Caller wakes the launcher.
 */
extern void shmem_restart_publisher(Oid database);

/* Lifecycle steps of the launcher. */
extern bool shmem_begin_start(DatabaseSlot *slot, Oid database, uint32 *generation);
extern bool shmem_cancel_start(DatabaseSlot *slot, uint32 generation, bool failed);
extern bool shmem_free_slot(DatabaseSlot *slot, Oid database, SlotState state);

/* Lifecycle steps of a publisher. */
typedef enum PublisherEnd
{
	PUBLISHER_FAILED,			/* error: start again, backing off */
	PUBLISHER_TERMINATED,		/* by hand: start again in a second */
	PUBLISHER_RESTART,			/* start again at once */
	PUBLISHER_NO_EXTENSION,		/* start again when somebody asks */
} PublisherEnd;

extern DatabaseSlot *shmem_attach(int index, uint32 generation);
extern void shmem_attached_running(DatabaseSlot *slot);
extern void shmem_detach(DatabaseSlot *slot, PublisherEnd end, bool healthy);

/*
 * Sets the launcher's latch; rescan: RESCAN_xxx bits or 0.  Takes no lock and
 * cannot fail.
 */
extern void shmem_wake_launcher(uint32 rescan);

/* Sets the publisher's latch, once until it has looked.  Same promise. */
extern void shmem_wake_publisher(DatabaseSlot *slot);

#endif							/* PGF_SHMEM_H */
