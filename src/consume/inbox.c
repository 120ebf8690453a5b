/*-------------------------------------------------------------------------
 *
 * inbox.c
 *		Which messages were applied, or given up.
 *
 * A message is applied when its id is in the inbox, which it comes into in the
 * transaction that ran its handler.  The inbox is insert-only, in a ring of
 * four segments: rows go to the current one, and that and the two before it are
 * looked into.  After half the retention the next one becomes current.  So the
 * youngest row of the fourth is as old as the retention, at least; it is
 * emptied by TRUNCATE, which nobody who looks into the others is in the way of.
 *
 *		     looked into
 *		  .------+------.
 *		  |      |      |
 *		[older][old][current][empty] --half the retention--> current
 *		  '------------------------------to be emptied---------'
 *
 * Must never: forget an id within the retention.
 *
 * Locks: writers hold ROW EXCLUSIVE and readers ACCESS SHARE on segments until
 * their transaction ends, never on the one that is to be emptied; rotation takes
 * ACCESS EXCLUSIVE on that, only if nobody has any lock.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "utils/array.h"
#include "utils/rel.h"

#include "capture/msgid.h"
#include "consume/inbox.h"
#include "consume/waiting.h"
#include "publish/maintenance.h"
#include "server/query.h"
#include "server/segment.h"
#include "server/tables.h"

#define INBOX_SEGMENTS 4

/* Statements must name segments: a partition that is pruned is locked, too. */
#define LOOK_UP_SEGMENT(segment) \
	"select message_id from fanout.inbox_" #segment \
	" where inbox_id = $1 and message_id = any ($2)"
#define LOOK_UP(a, b, c) \
	{LOOK_UP_SEGMENT(a) " union all " LOOK_UP_SEGMENT(b) " union all " LOOK_UP_SEGMENT(c)}
#define IN_RUNS_SEGMENT(segment) \
	"exists (select from fanout.inbox_" #segment \
	" where inbox_id = $1 and message_id between first and last)"
#define IN_RUNS(a, b, c) \
	{"select from unnest($2, $3) run (first, last) where " \
	IN_RUNS_SEGMENT(a) " or " IN_RUNS_SEGMENT(b) " or " IN_RUNS_SEGMENT(c) " limit 1"}

/* ---- looking up, and recording ---- */

static Datum
uuid_array(Datum *ids, int n)
{
	return PointerGetDatum(construct_array(ids, n, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
}

static Datum
id_array(Delivery **deliveries, int n)
{
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));

	for (int i = 0; i < n; i++)
		ids[i] = UUIDPGetDatum(&deliveries[i]->message_id);
	return uuid_array(ids, n);
}

static int
current_segment(void)
{
	static CachedQuery query = {"select current::int from fanout.inbox_rotation"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	if (SPI_processed != 1)
		tables_row_missing("inbox_rotation");
	return DatumGetInt32(query_value(0, 1, &isnull));
}

static int
compare_ids(const void *a, const void *b)
{
	const Delivery *left = *(Delivery *const *) a;
	const Delivery *right = *(Delivery *const *) b;

	return memcmp(&left->message_id, &right->message_id, UUID_LEN);
}

static Delivery **
sort_by_id(Delivery **deliveries, int n)
{
	Delivery  **sorted = palloc((n + 1) * sizeof(Delivery *));

	memcpy(sorted, deliveries, n * sizeof(Delivery *));
	qsort(sorted, n, sizeof(Delivery *), compare_ids);
	return sorted;
}

static bool
equal_ids(const Delivery *a, const Delivery *b, size_t length)
{
	return memcmp(&a->message_id, &b->message_id, length) == 0;
}

/*
 * Might any of them be in the inbox?  The ids of a process that writes messages
 * count up in their second half (msgid.c), so those that come together are a
 * few runs.  Nothing in the inbox lies within a run whose messages are all new,
 * and one search finds that out.  Other producers' ids are no runs.
 */
static bool
may_be_seen(int32 inbox_id, int segment, Delivery **sorted, int n)
{
	static CachedQuery queries[INBOX_SEGMENTS] = {
		IN_RUNS(0, 3, 2), IN_RUNS(1, 0, 3), IN_RUNS(2, 1, 0), IN_RUNS(3, 2, 1)
	};
	Oid			types[3] = {INT4OID, UUIDARRAYOID, UUIDARRAYOID};
	Datum		values[3] = {Int32GetDatum(inbox_id), (Datum) 0, (Datum) 0};
	Datum	   *first = palloc((n + 1) * sizeof(Datum));
	Datum	   *last = palloc((n + 1) * sizeof(Datum));
	int			runs = 0;

	for (int i = 0; i < n; i++)
	{
		if (i == 0 || !equal_ids(sorted[i], sorted[i - 1], MSGID_HALF))
			first[runs++] = UUIDPGetDatum(&sorted[i]->message_id);
		last[runs - 1] = UUIDPGetDatum(&sorted[i]->message_id);
	}
	if (runs > n / 4)
		return true;
	values[1] = uuid_array(first, runs);
	values[2] = uuid_array(last, runs);
	query_execute(&queries[segment], 3, types, values, NULL);
	return SPI_processed > 0;
}

/* All with that id, of which the lowest one is searched for. */
static void
set_seen(Delivery **sorted, int n, const pg_uuid_t *id)
{
	int			low = 0;
	int			high = n;

	while (low < high)
	{
		int			middle = (low + high) / 2;

		if (memcmp(&sorted[middle]->message_id, id, UUID_LEN) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	for (; low < n && memcmp(&sorted[low]->message_id, id, UUID_LEN) == 0; low++)
		sorted[low]->outcome = OUTCOME_SEEN;
}

static void
find_seen(int32 inbox_id, int segment, Delivery **sorted, int n)
{
	static CachedQuery queries[INBOX_SEGMENTS] = {
		LOOK_UP(0, 3, 2), LOOK_UP(1, 0, 3), LOOK_UP(2, 1, 0), LOOK_UP(3, 2, 1)
	};
	Oid			types[2] = {INT4OID, UUIDARRAYOID};
	Datum		values[2] = {Int32GetDatum(inbox_id), (Datum) 0};
	bool		isnull;

	values[1] = id_array(sorted, n);
	query_execute(&queries[segment], 2, types, values, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		set_seen(sorted, n, DatumGetUUIDP(query_value(i, 1, &isnull)));
}

/*
 * Sets the outcome of deliveries, whose ids must differ: SEEN if it is in the
 * inbox, else NONE.  In a transaction of worker_begin().
 */
void
inbox_look_up(int32 inbox_id, Delivery **deliveries, int n)
{
	Caller		caller = become_owner();
	int			segment = current_segment();
	Delivery  **sorted = sort_by_id(deliveries, n);

	for (int i = 0; i < n; i++)
		deliveries[i]->outcome = OUTCOME_NONE;
	if (may_be_seen(inbox_id, segment, sorted, n))
		find_seen(inbox_id, segment, sorted, n);
	become_caller(&caller);
}

static bool
is_done(const Delivery *delivery)
{
	return delivery->outcome == OUTCOME_APPLIED || delivery->outcome == OUTCOME_DEAD;
}

/* As the outbox is written (writer.c): there is nothing on it but its index. */
static void
insert_ids(int32 inbox_id, int segment, Delivery **deliveries, int n)
{
	Oid			relid = segment_oid("inbox", segment);
	Relation	rel = table_open(relid, RowExclusiveLock);
	TupleDesc	desc = CreateTupleDescCopy(RelationGetDescr(rel));
	Datum		values[3] = {Int16GetDatum(segment), Int32GetDatum(inbox_id), (Datum) 0};
	bool		nulls[3] = {false, false, false};
	HeapTuple  *rows = palloc((n + 1) * sizeof(HeapTuple));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (!is_done(deliveries[i]))
			continue;
		values[2] = UUIDPGetDatum(&deliveries[i]->message_id);
		rows[count++] = heap_form_tuple(desc, values, nulls);
	}
	segment_insert(relid, desc, rows, count);
	table_close(rel, NoLock);
}

/* Puts the messages into the inbox that were applied or given up. */
void
inbox_record(int32 inbox_id, Delivery **deliveries, int n)
{
	Caller		caller = become_owner();

	insert_ids(inbox_id, current_segment(), deliveries, n);
	become_caller(&caller);
}

/* ---- the ring of segments ---- */

/* Unless it is in use; false: it is not empty. */
static bool
empty_inbox(int segment)
{
	Oid			relid = segment_oid("inbox", segment);

	if (segment_empty(relid))
		return true;
	if (!segment_lock(relid))
		return false;
	segment_truncate(relid);
	return true;
}

/* What the inbox would not recognise any more may as well be applied again. */
static void
forget_old(CachedQuery *query, int retention_s)
{
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};

	query_execute(query, 1, types, values, NULL);
}

/*
 * Empties the segment that is older than the retention, in seconds, goes on to
 * the next when that is due, and forgets what else is as old: deleted rows of sync_table(), attempts of messages that
 * somebody else has taken.
 * Called by the publisher, in a transaction of worker_begin().
 */
static void
rotate(int retention_s)
{
	/* the clock was wrong once: better too long than too short */
	static CachedQuery not_yet = {
		"update fanout.inbox_rotation set rotated_at = clock_timestamp() where rotated_at > clock_timestamp()"
	};
	static CachedQuery due = {
		"select from fanout.inbox_rotation where rotated_at < clock_timestamp() - $1 / 2.0 * interval '1 s'"
	};
	static CachedQuery advance = {
		"update fanout.inbox_rotation set current = $1::smallint, rotated_at = clock_timestamp()"
	};
	static CachedQuery deleted_rows = {
		"delete from fanout.sync_row where deleted_at < clock_timestamp() - $1 * interval '1 s'"
	};
	Caller		caller = become_owner();
	int			next = (current_segment() + 1) % INBOX_SEGMENTS;
	bool		ready = empty_inbox(next);
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};

	query_execute(&not_yet, 0, NULL, NULL, NULL);
	query_execute(&due, 1, types, values, NULL);
	if (SPI_processed == 1)
	{
		if (ready)
		{
			values[0] = Int32GetDatum(next);
			query_change(&advance, 1, types, values, NULL, 1);
		}
		forget_old(&deleted_rows, retention_s);
		waiting_forget(retention_s);
	}
	become_caller(&caller);
}

/*
 * Hands to the publisher what it does for consumers.  To be called once in the
 * postmaster.
 */
void
inbox_init(void)
{
	static const ConsumerUpkeep upkeep = {
		.publish_subscriptions = subscription_publish_all,
		.rotate_inbox = rotate
	};

	maintenance_set_upkeep(&upkeep);
}
