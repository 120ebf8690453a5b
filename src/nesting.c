/*-------------------------------------------------------------------------
 *
 * nesting.c
 *		Ids of messages whose triggers fire in another order than the changes.
 *
 * The id of a message is its place in the order of its key: of two changes of
 * a row, the later one must have the higher id.  Usually the server fires our
 * trigger in the order of the changes, and the next number of the sequence is
 * right.  It does not where a statement runs inside another one: a trigger, or
 * a function in an expression, that writes to captured tables.  The triggers of
 * the inner statement fire at its end, while those of the outer statement
 * ("pending") still wait for theirs, although the outer change was made first:
 *
 *		update t ... where id = 1	row version v0 -> v1, event E1 is queued
 *			application's trigger on that row:
 *			update t ... where id = 1	v1 -> v2, event E2 is queued
 *			end of the inner statement	E2 fires: message of v2
 *		E1 fires: message of v1, after that of v2
 *
 * So an event that fires inside another statement draws more ids than it
 * needs, takes the highest, and leaves the others reserved for events that are
 * pending in the statements around it.  An event that fires later, and was
 * made before, takes its id from there.  There are two ways to recognize one:
 *
 * - By row version: it made the version that the inner event found as its old
 *	 row.  A version is known by table, tuple id and xmin; the latter, because a
 *	 subtransaction that was rolled back leaves tuple ids for others to use.
 *
 * - By identity, that is, the message's key or the row's primary key: it took
 *	 away or replaced a row with an identity that the inner event's row has.
 *	 (Outer: DELETE of key 1; inner: INSERT of key 1.)  But if its old row is
 *	 the newest version that an inner event left behind, it was made after that
 *	 one: foreign key actions queue such events in the outer statement.
 *
 * An INSERT that is known by neither is the later one: a BEFORE trigger has
 * removed what was in its way.  An outer statement cannot do anything else to a
 * row that an inner one has changed: the server refuses that.
 *
 * A reservation belongs to the level, that is, to the statement whose pending
 * events may take it, and ends with it.  Levels are statements of the executor
 * that modify tables, COPY FROM and TRUNCATE.  Foreign key actions are none:
 * their events join those of the statement that caused them.  What an apply
 * worker of logical replication does for each change it received is level 0.
 *
 * Outside nested statements this costs a comparison.  A reserved id that nobody
 * takes is a gap in the sequence.  Memory: an entry for each inner event of a
 * statement and each identity, as the server itself remembers an event for each
 * row of a statement; it is freed when the statement ends.
 *
 * This must never read a table, and never fail a statement for its order.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "executor/executor.h"
#include "replication/logicalworker.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "compat.h"
#include "nesting.h"
#include "outbox.h"

/*
 * Ids reserved for an identity.  A statement takes a key away at most once;
 * foreign key actions may do it again, and events of inner levels that were
 * pending themselves pass one down.
 */
#define RESERVED_IDS 6

/* A row version within one transaction; all zero: none.  Without padding. */
typedef struct RowVersion
{
	Oid			relid;
	TransactionId xmin;
	BlockNumber block;
	uint32		offset;
} RowVersion;

/*
 * Whose ids they are.  Hashed as bytes, so without padding: of version and
 * identity, what the kind has no use for is zero.
 */
typedef struct ReservationKey
{
	uint64		kind;
	uint64		entity;
	uint64		identity;
	RowVersion	version;
} ReservationKey;

#define FOR_VERSION		1		/* the event that made a row version */
#define FOR_IDENTITY	2		/* events that took an identity away */
#define FOR_TRUNCATE	3		/* the TRUNCATE of an entity */

typedef struct Reservation
{
	ReservationKey key;
	int64		ids[RESERVED_IDS];
	int			first;			/* ids from first to end - 1 are left */
	int			end;
	RowVersion	newest;			/* left behind by the inner events so far */
} Reservation;

typedef struct Level
{
	void	   *owner;			/* EState of the statement; NULL: a command */
	bool		truncates;
	HTAB	   *reserved;		/* NULL: nothing is */
	RowVersion	fired;			/* made by the event that fired last */
} Level;

/*
 * levels[depth] is the innermost statement that runs.  Between ExecutorRun and
 * ExecutorFinish of a statement its level is not entered but keeps what is
 * reserved, and its owner tells that it is the same statement's.
 */
static Level *levels = NULL;
static int	nlevels = 0;
static int	depth = 0;

static ExecutorRun_hook_type next_executor_run = NULL;
static ExecutorFinish_hook_type next_executor_finish = NULL;

static void executor_run(PGF_EXECUTOR_RUN_ARGS);
static void run(PGF_EXECUTOR_RUN_ARGS);
static void executor_finish(QueryDesc *query);
static void finish(QueryDesc *query);
static bool has_pending_events(QueryDesc *query);
static void enter_level(void *owner, bool truncates);
static void leave_level(bool ends);
static void forget_reserved(Level *level);
static void xact_callback(XactEvent event, void *arg);
static int64 claim(Level *level, const NestedChange *change);
static Reservation *older_than_inner(Level *level, const NestedChange *change);
static Reservation *lower(Reservation *a, Reservation *b);
static void pass_down(const NestedChange *change, int64 id);
static Reservation *to_pass_down(Level *level, const NestedChange *change);
static void reserve_all(const NestedChange *change);
static void reserve_at(Level *level, const NestedChange *change);
static void reserve(Level *level, const ReservationKey *key, int n);
static Reservation *add_reservation(Level *level, const ReservationKey *key, int64 id);
static void note_newest(const NestedChange *change);
static Reservation *find(Level *level, const ReservationKey *key);
static RowVersion version_of(Oid relid, HeapTuple row);
static bool same_version(const RowVersion *a, const RowVersion *b);
static ReservationKey version_key(const NestedChange *change, HeapTuple row);
static ReservationKey identity_key(const NestedChange *change, int i);
static ReservationKey truncate_key(const NestedChange *change);
static bool is_own(HeapTuple row);

/*
 * Installs the hooks that follow statements.  To be called once per process
 * that may write rows.
 */
void
nesting_init(void)
{
	next_executor_run = ExecutorRun_hook;
	ExecutorRun_hook = executor_run;
	next_executor_finish = ExecutorFinish_hook;
	ExecutorFinish_hook = executor_finish;
	RegisterXactCallback(xact_callback, NULL);
}

/*
 * Tells whether the next id may be another one than the sequence's next:
 * whether a statement runs inside another one, or something is reserved.
 */
bool
nesting_matters(void)
{
	if (depth > 1 || IsLogicalWorker())
		return true;
	return nlevels > depth && levels[depth].reserved != NULL;
}

/*
 * Draws the id of a captured change; to be called when its trigger fires, if
 * nesting_matters().
 */
int64
nesting_draw(const NestedChange *change)
{
	int64		id = nlevels > depth ? claim(&levels[depth], change) : 0;

	if (id != 0)
		pass_down(change, id);
	else
	{
		reserve_all(change);
		id = outbox_next_id();
	}
	note_newest(change);
	return id;
}

/*
 * Notes that the event that made a row version has fired; to be called for each
 * captured change, since an inner one then needs to reserve nothing for it.
 */
void
nesting_fired(Oid relid, HeapTuple new_row)
{
	if (depth < nlevels)
		levels[depth].fired = version_of(relid, new_row);
}

/* Enters the level of a command that queues trigger events: COPY FROM, TRUNCATE. */
void
nesting_enter_command(bool truncates)
{
	enter_level(NULL, truncates);
}

/* Leaves it, also after an error. */
void
nesting_leave_command(void)
{
	leave_level(true);
}

/* Statements */

static void
executor_run(PGF_EXECUTOR_RUN_ARGS)
{
	volatile bool done = false;

	if (!has_pending_events(query))
	{
		run(PGF_EXECUTOR_RUN_PASS);
		return;
	}
	enter_level(query->estate, false);
	PG_TRY();
	{
		run(PGF_EXECUTOR_RUN_PASS);
		done = true;
	}
	PG_FINALLY();
	{
		leave_level(!done);
	}
	PG_END_TRY();
}

static void
run(PGF_EXECUTOR_RUN_ARGS)
{
	if (next_executor_run)
		next_executor_run(PGF_EXECUTOR_RUN_PASS);
	else
		standard_ExecutorRun(PGF_EXECUTOR_RUN_PASS);
}

static void
executor_finish(QueryDesc *query)
{
	if (!has_pending_events(query))
	{
		finish(query);
		return;
	}
	enter_level(query->estate, false);
	PG_TRY();
	{
		finish(query);
	}
	PG_FINALLY();
	{
		leave_level(true);
	}
	PG_END_TRY();
}

static void
finish(QueryDesc *query)
{
	if (next_executor_finish)
		next_executor_finish(query);
	else
		standard_ExecutorFinish(query);
}

/* Tells whether the query fires triggers of its own when it ends. */
static bool
has_pending_events(QueryDesc *query)
{
	if (query->estate->es_top_eflags & EXEC_FLAG_SKIP_TRIGGERS)
		return false;
	return query->operation != CMD_SELECT || query->plannedstmt->hasModifyingCTE;
}

/* Levels */

/*
 * Enters the next level.  What another statement left there is forgotten.
 */
static void
enter_level(void *owner, bool truncates)
{
	Level	   *level;

	if (depth + 1 >= nlevels)
	{
		int			n = Max(8, nlevels * 2);	/* bounded by the stack's depth */

		levels = levels ? repalloc(levels, n * sizeof(Level))
			: MemoryContextAlloc(TopMemoryContext, n * sizeof(Level));
		memset(levels + nlevels, 0, (n - nlevels) * sizeof(Level));
		nlevels = n;
	}
	level = &levels[++depth];
	if (owner == NULL || level->owner != owner)
	{
		forget_reserved(level);
		memset(&level->fired, 0, sizeof(level->fired));
	}
	level->owner = owner;
	level->truncates = truncates;
}

/* Leaves the level; if its statement ends, forgets what is reserved for it. */
static void
leave_level(bool ends)
{
	if (ends)
	{
		forget_reserved(&levels[depth]);
		levels[depth].owner = NULL;
	}
	depth--;
}

static void
forget_reserved(Level *level)
{
	if (level->reserved != NULL)
		hash_destroy(level->reserved);
	level->reserved = NULL;
}

static void
xact_callback(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_PREPARE && event != XACT_EVENT_ABORT)
		return;
	for (int i = 0; i < nlevels; i++)
	{
		forget_reserved(&levels[i]);
		levels[i].owner = NULL;
	}
	depth = 0;
}

/* Taking what is reserved */

/*
 * Takes the id that was reserved for this event at its own level; 0 if none
 * was, which is the rule.  The event that made the version that an inner one
 * found is the last one before that: what else is reserved for its identities
 * waits for nobody.
 */
static int64
claim(Level *level, const NestedChange *change)
{
	Reservation *version = NULL;
	Reservation *lowest;
	ReservationKey key;
	int64		id;

	if (level->reserved == NULL)
		return 0;
	if (change->new_row != NULL)
	{
		key = version_key(change, change->new_row);
		version = find(level, &key);
	}
	lowest = lower(version, older_than_inner(level, change));
	if (lowest == NULL)
		return 0;
	id = lowest->ids[lowest->first++];
	if (version != NULL)
	{
		(void) hash_search(level->reserved, &key, HASH_REMOVE, NULL);
		for (int i = 0; i < change->nidentities; i++)
		{
			key = identity_key(change, i);
			(void) hash_search(level->reserved, &key, HASH_REMOVE, NULL);
		}
	}
	return id;
}

/*
 * Finds the reservation with the lowest id among those for events that took an
 * identity of this one's old row away, unless this event came after the inner
 * ones.
 */
static Reservation *
older_than_inner(Level *level, const NestedChange *change)
{
	Reservation *found = NULL;
	ReservationKey key;
	RowVersion	old;

	if (change->old_row == NULL)
	{
		key = truncate_key(change);
		return change->new_row == NULL ? find(level, &key) : NULL;
	}
	old = version_of(change->relid, change->old_row);
	for (int i = 0; i < change->nold; i++)
	{
		Reservation *other;

		key = identity_key(change, i);
		other = find(level, &key);
		if (other != NULL && !same_version(&other->newest, &old))
			found = lower(found, other);
	}
	return found;
}

static Reservation *
lower(Reservation *a, Reservation *b)
{
	if (a == NULL || (b != NULL && b->ids[b->first] < a->ids[a->first]))
		return b;
	return a;
}

/*
 * The event with this id was pending itself, and so may be the one that made
 * its old row.  Keeps an id below for that one: what was reserved for the
 * version that this event made, else the highest of those of its identities.
 */
static void
pass_down(const NestedChange *change, int64 id)
{
	ReservationKey key;

	if (change->old_row == NULL || !is_own(change->old_row))
		return;
	key = version_key(change, change->old_row);
	for (int i = 0; i < depth; i++)
	{
		Reservation *from;

		if (levels[i].reserved == NULL || find(&levels[i], &key) != NULL)
			continue;
		from = to_pass_down(&levels[i], change);
		if (from != NULL && from->ids[from->end - 1] < id)
			add_reservation(&levels[i], &key, from->ids[--from->end]);
	}
}

static Reservation *
to_pass_down(Level *level, const NestedChange *change)
{
	Reservation *from = NULL;
	ReservationKey key;

	if (change->new_row != NULL)
	{
		key = version_key(change, change->new_row);
		from = find(level, &key);
	}
	for (int i = 0; from == NULL && i < change->nidentities; i++)
	{
		key = identity_key(change, i);
		from = find(level, &key);
	}
	return from;
}

/* Reserving */

/*
 * Reserves ids for all events that may be pending in the statements around
 * this event's, those of the outermost first: its changes were made first.
 */
static void
reserve_all(const NestedChange *change)
{
	for (int i = IsLogicalWorker() ? 0 : 1; i < depth; i++)
		reserve_at(&levels[i], change);
}

/*
 * Reserves nothing if the event that made the old row has only just fired: of
 * a row whose trigger changes it again, nothing is kept then.
 */
static void
reserve_at(Level *level, const NestedChange *change)
{
	ReservationKey version;
	ReservationKey key;
	bool		own = change->old_row != NULL && is_own(change->old_row);

	if (own)
	{
		version = version_key(change, change->old_row);
		if (same_version(&level->fired, &version.version))
			return;
	}
	for (int i = 0; i < change->nidentities; i++)
	{
		key = identity_key(change, i);
		reserve(level, &key, RESERVED_IDS);
	}
	if (own)
		reserve(level, &version, 1);
	if (level->truncates)
	{
		key = truncate_key(change);
		reserve(level, &key, 1);
	}
}

/*
 * Reserves n ids, unless some are already: those are lower, and right for the
 * events of a later one, too.
 */
static void
reserve(Level *level, const ReservationKey *key, int n)
{
	Reservation *reservation;

	if (level->reserved != NULL && find(level, key) != NULL)
		return;
	reservation = add_reservation(level, key, outbox_next_id());
	while (--n > 0)
		reservation->ids[reservation->end++] = outbox_next_id();
}

static Reservation *
add_reservation(Level *level, const ReservationKey *key, int64 id)
{
	Reservation *reservation;

	if (level->reserved == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(ReservationKey), .entrysize = sizeof(Reservation)};

		level->reserved = hash_create("pg_fanout reserved ids", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	reservation = hash_search(level->reserved, key, HASH_ENTER, NULL);
	reservation->ids[0] = id;
	reservation->first = 0;
	reservation->end = 1;
	memset(&reservation->newest, 0, sizeof(RowVersion));
	return reservation;
}

/*
 * Notes the row version that this event left behind, wherever one of its
 * identities is reserved.
 */
static void
note_newest(const NestedChange *change)
{
	RowVersion	newest = {0};

	if (change->new_row != NULL)
		newest = version_of(change->relid, change->new_row);
	for (int i = 0; i <= depth && i < nlevels; i++)
	{
		for (int k = 0; levels[i].reserved != NULL && k < change->nidentities; k++)
		{
			ReservationKey key = identity_key(change, k);
			Reservation *reservation = hash_search(levels[i].reserved, &key, HASH_FIND, NULL);

			if (reservation != NULL)
				reservation->newest = newest;
		}
	}
}

/* Keys */

/* Finds a reservation that has an id left. */
static Reservation *
find(Level *level, const ReservationKey *key)
{
	Reservation *reservation = hash_search(level->reserved, key, HASH_FIND, NULL);

	return reservation != NULL && reservation->first < reservation->end ? reservation : NULL;
}

static RowVersion
version_of(Oid relid, HeapTuple row)
{
	RowVersion	version;

	version.relid = relid;
	version.xmin = HeapTupleHeaderGetXmin(row->t_data);
	version.block = ItemPointerGetBlockNumber(&row->t_self);
	version.offset = ItemPointerGetOffsetNumber(&row->t_self);
	return version;
}

static bool
same_version(const RowVersion *a, const RowVersion *b)
{
	return memcmp(a, b, sizeof(RowVersion)) == 0;
}

static ReservationKey
version_key(const NestedChange *change, HeapTuple row)
{
	ReservationKey key = {FOR_VERSION, change->entity, 0, version_of(change->relid, row)};

	return key;
}

static ReservationKey
identity_key(const NestedChange *change, int i)
{
	ReservationKey key = {FOR_IDENTITY, change->entity, change->identities[i]};

	return key;
}

static ReservationKey
truncate_key(const NestedChange *change)
{
	ReservationKey key = {FOR_TRUNCATE, change->entity};

	return key;
}

/* Was the row version made by this transaction? */
static bool
is_own(HeapTuple row)
{
	return TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(row->t_data));
}
