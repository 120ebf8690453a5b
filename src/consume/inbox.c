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

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/uuid.h"

#include "capture/msgid.h"
#include "consume/inbox.h"
#include "consume/waiting.h"
#include "publish/maintenance.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/segment.h"
#include "server/tables.h"

#define INBOX_SEGMENTS 4
#define LOOKED_INTO 3

/* Columns of its tables. */
#define INBOX_ID 2
#define MESSAGE_ID 3

/* Columns of the primary key's index, as the install script makes it. */
#define KEY_INBOX_ID 1
#define KEY_MESSAGE_ID 2

/* ---- looking up, and recording ---- */

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
compare_id(const Delivery *delivery, const pg_uuid_t *id)
{
	return memcmp(&delivery->message_id, id, UUID_LEN);
}

static int
compare_ids(const void *a, const void *b)
{
	return compare_id(*(Delivery *const *) a, &(*(Delivery *const *) b)->message_id);
}

static Delivery **
sort_by_id(Delivery **deliveries, int n)
{
	Delivery  **sorted = palloc((n + 1) * sizeof(Delivery *));

	memcpy(sorted, deliveries, n * sizeof(Delivery *));
	qsort(sorted, n, sizeof(Delivery *), compare_ids);
	return sorted;
}

/* The ids in one segment, by the index of its primary key. */
typedef struct IdScan
{
	Relation	rel;
	Relation	index;
	IndexScanDesc scan;
	TupleTableSlot *slot;
} IdScan;

/* An index of other columns would find nothing, and messages be applied twice. */
static bool
is_by_id(Relation index)
{
	return index->rd_index->indnkeyatts >= KEY_MESSAGE_ID &&
		index->rd_index->indkey.values[KEY_INBOX_ID - 1] == INBOX_ID &&
		index->rd_index->indkey.values[KEY_MESSAGE_ID - 1] == MESSAGE_ID &&
		segment_is_plain_index(index);
}

static Relation
open_primary_key(Relation rel)
{
	Oid			relid;

	/* this is what looks for it */
	list_free(RelationGetIndexList(rel));
	relid = rel->rd_pkindex;
	if (OidIsValid(relid))
	{
		Relation	index = index_open(relid, AccessShareLock);

		if (is_by_id(index))
			return index;
	}
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("the primary key of table \"fanout.%s\" was altered", RelationGetRelationName(rel)),
			 errhint("Make it (inbox_id, message_id, segment) again, or create the extension again.")));
}

static IdScan
begin_scan(int segment, Snapshot snapshot)
{
	IdScan		scan;

	scan.rel = table_open(segment_oid("inbox", segment), AccessShareLock);
	scan.index = open_primary_key(scan.rel);
	scan.scan = pgf_index_beginscan(scan.rel, scan.index, snapshot, 3);
	scan.slot = table_slot_create(scan.rel, NULL);
	return scan;
}

static void
end_scan(IdScan *scan)
{
	ExecDropSingleTupleTableSlot(scan->slot);
	index_endscan(scan->scan);
	index_close(scan->index, NoLock);
	table_close(scan->rel, NoLock);
}

/* Returns the lowest id in the inbox of those from first to last; NULL: none. */
static const pg_uuid_t *
lowest_id(IdScan *scan, int32 inbox_id, const pg_uuid_t *first, const pg_uuid_t *last)
{
	ScanKeyData keys[3];
	bool		isnull;

	ScanKeyInit(&keys[0], KEY_INBOX_ID, BTEqualStrategyNumber, F_INT4EQ, Int32GetDatum(inbox_id));
	ScanKeyInit(&keys[1], KEY_MESSAGE_ID, BTGreaterEqualStrategyNumber, F_UUID_GE, UUIDPGetDatum(first));
	ScanKeyInit(&keys[2], KEY_MESSAGE_ID, BTLessEqualStrategyNumber, F_UUID_LE, UUIDPGetDatum(last));
	index_rescan(scan->scan, keys, 3, NULL, 0);
	if (!index_getnext_slot(scan->scan, ForwardScanDirection, scan->slot))
		return NULL;
	return DatumGetUUIDP(slot_getattr(scan->slot, MESSAGE_ID, &isnull));
}

/*
 * Marks those that are in a segment.  Each search goes on from the id that the last
 * one found, so that there are no more of them than ids found, and one.  Messages that
 * come together mostly are new, and their ids neighbours (msgid.c): then it is one.
 */
static void
find_seen(IdScan *scan, int32 inbox_id, Delivery **sorted, int n)
{
	const pg_uuid_t *found;
	int			i = 0;

	while (i < n && (found = lowest_id(scan, inbox_id, &sorted[i]->message_id, &sorted[n - 1]->message_id)) != NULL)
	{
		while (i < n && compare_id(sorted[i], found) < 0)
			i++;
		for (; i < n && compare_id(sorted[i], found) == 0; i++)
			sorted[i]->outcome = OUTCOME_SEEN;
	}
}

/*
 * Sets the outcome of deliveries whose ids are in the inbox to SEEN.  In a
 * transaction of worker_begin().  There is no planner in it: workers keep their plans,
 * and one made for an empty inbox is as slow as can be for one that has grown.
 */
void
inbox_look_up(int32 inbox_id, Delivery **deliveries, int n)
{
	Caller		caller = become_owner();
	int			segment = current_segment();
	Delivery  **sorted = sort_by_id(deliveries, n);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());

	for (int back = 0; back < LOOKED_INTO; back++)
	{
		IdScan		scan = begin_scan((segment + INBOX_SEGMENTS - back) % INBOX_SEGMENTS, snapshot);

		find_seen(&scan, inbox_id, sorted, n);
		end_scan(&scan);
	}
	UnregisterSnapshot(snapshot);
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
