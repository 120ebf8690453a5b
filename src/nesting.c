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
 *	 away or replaced a row with an identity that the inner event's row has
 *	 (outer: DELETE of key 1; inner: INSERT of key 1), or gave the identity to a
 *	 row, and inner events left a row with it behind.
 *
 * An event that is known by neither is the later one: a BEFORE trigger has
 * removed what was in its way.  An outer statement cannot do anything else to a
 * row that an inner one has changed: the server refuses that.  But foreign key
 * actions can, and queue their events in the outer statement.  So no event takes
 * an id below that of the event that made its old row; and an inner event that
 * does not find the newest version of a row, as far as that is known, reserves
 * new ids for what must have happened in between.
 *
 * A reservation belongs to the level, that is, to the statement whose pending
 * events may take it, and ends with it.  Levels are statements of the executor
 * that modify tables, COPY FROM and TRUNCATE.  Foreign key actions are none:
 * their events join those of the statement that caused them.  What an apply
 * worker of logical replication does for each change it received is level 0.
 *
 * Outside nested statements this costs a comparison.  A reserved id that nobody
 * takes is a gap in the sequence.  Memory: some 300 bytes for each inner event of
 * a statement, at most, as the server itself remembers an event for each row of
 * a statement; it is freed when the statement ends.
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
 * Ids reserved for an identity at a time, and kept for it.  A statement takes a
 * key away at most once, and gives it at most once; foreign key actions may do
 * it again, and events that were pending themselves pass one down.
 */
#define RESERVED_IDS 3
#define KEPT_IDS 6

/*
 * A row version within one transaction, or without relid the lack of one, that
 * the (sub)transaction xmin left behind; all zero: not known.  Without padding.
 */
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
	int			nids;
	int64		ids[KEPT_IDS];	/* in ascending order */
	RowVersion	newest;			/* left behind by the inner events so far */
	RowVersion	older;			/* what counts if that was rolled back */
	int64		newest_id;		/* of the event that left the newest behind */
} Reservation;

/* The id of the event that made a row version. */
typedef struct Made
{
	RowVersion	version;		/* hash key */
	int64		id;
} Made;

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

/* Events that fired in nested statements of the outermost one; NULL: none. */
static HTAB *made = NULL;

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
static void forget_events(void);
static void xact_callback(XactEvent event, void *arg);
static int64 claim(Level *level, const NestedChange *change);
static Reservation *lowest_of_identities(Level *level, const NestedChange *change, bool version_known,
										 int64 above);
static Reservation *lower(Reservation *a, Reservation *b, int64 above);
static bool keeps_identities(const NestedChange *change);
static void forget_claimed(Level *level, const NestedChange *change);
static void pass_down(const NestedChange *change, int64 id);
static Reservation *to_pass_down(Level *level, const NestedChange *change, int64 below);
static void reserve_all(const NestedChange *change);
static void reserve_at(Level *level, const NestedChange *change);
static void reserve_identity(Level *level, const NestedChange *change, int i, const RowVersion *found);
static void add_id(Reservation *reservation, bool fresh, int64 id);
static void reserve(Level *level, const ReservationKey *key, int n);
static void note_event(const NestedChange *change, int64 id);
static void note_made(RowVersion version, int64 id);
static void set_newest(Reservation *reservation, RowVersion newest, int64 id);
static RowVersion newest_version(const Reservation *reservation);
static int64 made_by(const NestedChange *change);
static int	first_above(const Reservation *reservation, int64 id);
static int64 take_id(Reservation *reservation, int i);
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
	note_event(change, id);
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
	if (ends && depth == 0)
		forget_events();
}

static void
forget_reserved(Level *level)
{
	if (level->reserved != NULL)
		hash_destroy(level->reserved);
	level->reserved = NULL;
}

static void
forget_events(void)
{
	if (made != NULL)
		hash_destroy(made);
	made = NULL;
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
	forget_events();
}

/* Taking what is reserved */

/*
 * Takes the id that was reserved for this event at its own level; 0 if none
 * was, which is the rule.
 */
static int64
claim(Level *level, const NestedChange *change)
{
	int64		above = made_by(change);
	Reservation *version = NULL;
	Reservation *lowest;
	ReservationKey key;
	int64		id;

	if (level->reserved == NULL)
		return 0;
	if (change->new_row != NULL || change->old_row == NULL)
	{
		key = change->new_row != NULL ? version_key(change, change->new_row) : truncate_key(change);
		version = lower(NULL, find(level, &key), above);
	}
	/* where the row kept its identities, its version says it all */
	if (version != NULL && keeps_identities(change))
		lowest = version;
	else
		lowest = lower(version, lowest_of_identities(level, change, version != NULL, above), above);
	if (lowest == NULL)
		return 0;
	id = take_id(lowest, first_above(lowest, above));
	if (version != NULL && change->new_row != NULL)
		forget_claimed(level, change);
	return id;
}

/*
 * Finds the reservation with the lowest id for events that took an identity of
 * the old row away, or (not if the version is known, which says more) gave the
 * new row one that inner events left in use.
 */
static Reservation *
lowest_of_identities(Level *level, const NestedChange *change, bool version_known, int64 above)
{
	Reservation *found = NULL;

	for (int i = 0; i < change->nidentities; i++)
	{
		ReservationKey key = identity_key(change, i);
		Reservation *other = find(level, &key);

		if (other != NULL &&
			(i < change->nold || (!version_known && OidIsValid(newest_version(other).relid))))
			found = lower(found, other, above);
	}
	return found;
}

/* The one of two reservations, or NULL, whose next id above that one is lower. */
static Reservation *
lower(Reservation *a, Reservation *b, int64 above)
{
	if (b == NULL || first_above(b, above) < 0)
		return a;
	if (a == NULL)
		return b;
	return b->ids[first_above(b, above)] < a->ids[first_above(a, above)] ? b : a;
}

static bool
keeps_identities(const NestedChange *change)
{
	int			n = change->nold;

	return change->nidentities == 2 * n &&
		memcmp(change->identities, change->identities + n, n * sizeof(uint64)) == 0;
}

/*
 * The event that made the version that an inner one found is the last one
 * before that: what else is reserved for its identities waits for nobody.
 */
static void
forget_claimed(Level *level, const NestedChange *change)
{
	ReservationKey key = version_key(change, change->new_row);

	(void) hash_search(level->reserved, &key, HASH_REMOVE, NULL);
	for (int i = 0; i < change->nidentities; i++)
	{
		key = identity_key(change, i);
		(void) hash_search(level->reserved, &key, HASH_REMOVE, NULL);
	}
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
		int64		passed;

		if (levels[i].reserved == NULL || find(&levels[i], &key) != NULL)
			continue;
		from = to_pass_down(&levels[i], change, id);
		if (from == NULL)
			continue;
		passed = take_id(from, first_above(from, id) < 0 ? from->nids - 1 : first_above(from, id) - 1);
		add_id(hash_search(levels[i].reserved, &key, HASH_ENTER, NULL), true, passed);
	}
}

/* Finds a reservation that has an id below. */
static Reservation *
to_pass_down(Level *level, const NestedChange *change, int64 below)
{
	ReservationKey key;
	Reservation *from;

	if (change->new_row != NULL)
	{
		key = version_key(change, change->new_row);
		from = find(level, &key);
		if (from != NULL && from->ids[0] < below)
			return from;
	}
	for (int i = 0; i < change->nidentities; i++)
	{
		key = identity_key(change, i);
		from = find(level, &key);
		if (from != NULL && from->ids[0] < below)
			return from;
	}
	return NULL;
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
	if (level->reserved == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(ReservationKey), .entrysize = sizeof(Reservation)};

		level->reserved = hash_create("pg_fanout reserved ids", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	for (int i = 0; i < change->nidentities; i++)
		reserve_identity(level, change, i, own ? &version.version : NULL);
	if (own && find(level, &version) == NULL)
		reserve(level, &version, 1);
	key = truncate_key(change);
	if (level->truncates && find(level, &key) == NULL)
		reserve(level, &key, 1);
}

/*
 * Reserves ids for an identity, unless some are already: those are lower, and
 * right for the events of a later one, too.  But if the newest version with
 * this identity is not the one that this event found (NULL: none of this
 * transaction's), something that is pending has happened in between.
 */
static void
reserve_identity(Level *level, const NestedChange *change, int i, const RowVersion *found)
{
	ReservationKey key = identity_key(change, i);
	Reservation *reservation = find(level, &key);

	if (reservation != NULL && found != NULL)
	{
		RowVersion	newest = newest_version(reservation);

		if (same_version(&newest, found))
			return;
	}
	reserve(level, &key, RESERVED_IDS);
}

/* Keeps an id, in the place of the highest one if there is no room. */
static void
add_id(Reservation *reservation, bool fresh, int64 id)
{
	if (fresh)
	{
		reservation->nids = 0;
		memset(&reservation->newest, 0, sizeof(RowVersion));
		memset(&reservation->older, 0, sizeof(RowVersion));
	}
	if (reservation->nids == KEPT_IDS)
		reservation->nids--;
	reservation->ids[reservation->nids++] = id;
}

static void
reserve(Level *level, const ReservationKey *key, int n)
{
	bool		found;
	Reservation *reservation = hash_search(level->reserved, key, HASH_ENTER, &found);

	/* the lowest ones are for what has been pending for longest */
	if (found && reservation->nids > KEPT_IDS - n)
		reservation->nids = KEPT_IDS - n;
	for (int i = 0; i < n; i++)
		add_id(reservation, !found && i == 0, outbox_next_id());
}

/*
 * Notes the id of the event that made a row version, and what it left behind of
 * each of its identities, wherever that is reserved.  An identity that the new
 * row does not have is left without a row; the new row's come last.
 */
static void
note_event(const NestedChange *change, int64 id)
{
	RowVersion	none = {InvalidOid, GetCurrentTransactionId()};
	RowVersion	newest = none;

	if (change->new_row != NULL)
	{
		newest = version_of(change->relid, change->new_row);
		note_made(newest, id);
	}
	for (int i = 0; i <= depth && i < nlevels; i++)
	{
		for (int k = 0; levels[i].reserved != NULL && k < change->nidentities; k++)
		{
			ReservationKey key = identity_key(change, k);
			Reservation *reservation = hash_search(levels[i].reserved, &key, HASH_FIND, NULL);

			if (reservation != NULL)
				set_newest(reservation, k < change->nold ? none : newest, id);
		}
	}
}

static void
note_made(RowVersion version, int64 id)
{
	Made	   *event;

	if (made == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(RowVersion), .entrysize = sizeof(Made)};

		made = hash_create("pg_fanout nested events", 64, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	event = hash_search(made, &version, HASH_ENTER, NULL);
	event->id = id;
}

/*
 * Keeps what counts if this subtransaction is rolled back.  An event that was
 * pending is not the newest any more when it fires.
 */
static void
set_newest(Reservation *reservation, RowVersion newest, int64 id)
{
	if (TransactionIdIsCurrentTransactionId(reservation->newest.xmin) && reservation->newest_id > id)
		return;
	if (reservation->newest.xmin != newest.xmin)
		reservation->older = newest_version(reservation);
	reservation->newest = newest;
	reservation->newest_id = id;
}

static RowVersion
newest_version(const Reservation *reservation)
{
	static const RowVersion unknown = {0};

	if (TransactionIdIsCurrentTransactionId(reservation->newest.xmin))
		return reservation->newest;
	if (TransactionIdIsCurrentTransactionId(reservation->older.xmin))
		return reservation->older;
	return unknown;
}

/* The id of the event that made the old row, if that is known; else 0. */
static int64
made_by(const NestedChange *change)
{
	RowVersion	version;
	Made	   *event;

	if (made == NULL || change->old_row == NULL)
		return 0;
	version = version_of(change->relid, change->old_row);
	event = hash_search(made, &version, HASH_FIND, NULL);
	return event != NULL ? event->id : 0;
}

/* Entries */

/* Index of the first id above that one, or -1. */
static int
first_above(const Reservation *reservation, int64 id)
{
	for (int i = 0; i < reservation->nids; i++)
	{
		if (reservation->ids[i] > id)
			return i;
	}
	return -1;
}

static int64
take_id(Reservation *reservation, int i)
{
	int64		id = reservation->ids[i];

	reservation->nids--;
	memmove(&reservation->ids[i], &reservation->ids[i + 1], (reservation->nids - i) * sizeof(int64));
	return id;
}

/* Finds a reservation that has an id left. */
static Reservation *
find(Level *level, const ReservationKey *key)
{
	Reservation *reservation = hash_search(level->reserved, key, HASH_FIND, NULL);

	return reservation != NULL && reservation->nids > 0 ? reservation : NULL;
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
