/*-------------------------------------------------------------------------
 *
 * maintenance.c
 *		What a publisher does by the clock: the ring of segments, counters, and
 *		the upkeep of the consuming half.
 *
 * Rows of the outbox are never updated or deleted.  The ledger (fanout.sent) says
 * up to where they were sent.  Both are rings of segments that are emptied by
 * TRUNCATE.
 *
 * All of it runs inside a transaction opened by worker_begin().
 *
 * Locks: ACCESS EXCLUSIVE on a segment to be emptied, taken without waiting.
 * Writers hold ROW EXCLUSIVE until their transaction ends, so no row is
 * undecided then.  SHARE ROW EXCLUSIVE on fanout.topic_grant, likewise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "storage/lmgr.h"

#include "publish/maintenance.h"
#include "server/query.h"
#include "server/segment.h"
#include "server/tables.h"
#include "server/worker.h"

static const ConsumerUpkeep *consumers = NULL;

/* ---- the ring of segments ---- */

/* Returns the segment that new rows go to, from fanout.rotation. */
int
maintenance_current_segment(void)
{
	static CachedQuery query = {"select current::int from fanout.rotation"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	if (SPI_processed != 1)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("table \"fanout.rotation\" has " UINT64_FORMAT " rows instead of one", SPI_processed),
				 errhint("Somebody changed it. Leave the row with the segment that has the newest messages.")));
	return DatumGetInt32(query_value(0, 1, &isnull));
}

/* The newest entry of the main cursor in the ledger that is older than the retention: seconds. */
#define EXPIRED \
	"(select * from fanout.sent where topic_id is null and sent_at < now() - %1$d * interval '1 s'" \
	" order by sent_at desc, sent_id desc limit 1)"

/*
 * Do all rows of the segment count as sent by an entry of the ledger that is
 * older than the retention, but for those of topics that have left the main cursor,
 * which it shows as committed?
 * That entry is the newest such one; what it has passed is decided by the same rule as
 * everywhere.  Rows before the block from which on it has not read need not be looked
 * at, unless some may be anywhere.
 */
static bool
segment_expired(int segment, int retention_s)
{
	char		sql[2048];
	bool		isnull;

	snprintf(sql, sizeof(sql),
			 "with l as (select s.*, case when s.files[%2$d + 1] = pg_relation_filenode('fanout.outbox_%2$d')"
			 " and not exists (select from fanout.scattered c"
			 " where c.segment = %2$d and not pg_visible_in_snapshot(c.xid, s.base))"
			 " then format('(%%s,0)', s.unread[%2$d + 1])::tid else '(0,0)' end as first from " EXPIRED " s)"
			 " select exists (select from l) and not exists (select from l, lateral ("
			 " select from fanout.outbox_%2$d o"
			 " where o.ctid >= l.first and not pg_visible_in_snapshot(o.xid, l.base)"
			 " and not (pg_visible_in_snapshot(o.xid, l.target)"
			 " and (o.id <= l.last_id or o.topic_id in (select topic_id from fanout.detached))) offset 0) o)",
			 retention_s, segment);
	if (SPI_execute(sql, false, 1) != SPI_OK_SELECT)
		elog(ERROR, "could not inspect segment %d", segment);
	return DatumGetBool(query_value(0, 1, &isnull));
}

/*
 * May a topic that has left the main cursor not have sent rows of a segment that has
 * expired?  That is so if the entry by which it has shows any transaction that the topic's
 * base does not show.  No row is looked at: there may be very many, and nothing is
 * published meanwhile.  found: told each such topic, or NULL.
 */
static bool
segment_awaited(int retention_s, void (*found) (int32 topic_id))
{
	char		sql[1024];
	bool		isnull;

	snprintf(sql, sizeof(sql),
			 "select d.topic_id from fanout.detached d, " EXPIRED " l"
			 " where pg_snapshot_xmax(d.base) < pg_snapshot_xmax(l.target)"
			 " or exists (select from pg_snapshot_xip(d.base) x where pg_visible_in_snapshot(x, l.target))",
			 retention_s);
	if (SPI_execute(sql, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not inspect the ledger");
	for (int i = 0; i < SPI_processed && found != NULL; i++)
		found(DatumGetInt32(query_value(i, 1, &isnull)));
	return SPI_processed > 0;
}

/*
 * Under ACCESS EXCLUSIVE no transaction that wrote into it is still undecided,
 * and the rows are looked at once more.  True if it is empty then.  If only topics
 * that have left the main cursor are in the way, these are told.
 */
static bool
empty_outbox(int segment, int retention_s, void (*in_the_way) (int32 topic_id))
{
	Oid			relid = tables_segment(segment);

	if (segment_empty(relid))
		return true;
	if (!segment_expired(segment, retention_s) || segment_awaited(retention_s, in_the_way) ||
		!segment_lock(relid) ||
		!segment_expired(segment, retention_s) || segment_awaited(retention_s, NULL))
		return false;
	segment_truncate(relid);
	return true;
}

/*
 * Entries of topics that have left the main cursor still count; and so does one that
 * says that a topic rides with it again, as long as an older one says otherwise.
 * They are written anew.
 */
static void
save_entries(int segment)
{
	static CachedQuery query = {
		"with entry as (select r.current, topic_id, attached, base, target, last_id, 0, sent_at, files, unread"
		" from fanout.topic_entry t, fanout.rotation r"
		" where t.segment = $1::smallint and (not t.attached or exists ("
		"select from fanout.sent s where s.topic_id = t.topic_id and s.segment <> $1::smallint))),"
		" saved as (insert into fanout.sent"
		" (segment, topic_id, attached, base, target, last_id, count, sent_at, files, unread)"
		" select * from entry returning 1)"
		" select (select count(*) from entry), (select count(*) from saved)"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(segment)};

	query_execute(&query, 1, types, values, NULL);
	query_require_copied(query.sql);
}

static bool
holds_newest_entry(int segment)
{
	static CachedQuery query = {"select segment::int from fanout.sent where topic_id is null order by sent_id desc limit 1"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	return SPI_processed != 1 || DatumGetInt32(query_value(0, 1, &isnull)) == segment;
}

/*
 * Entries go to the ledger's segment of the same number as new rows go to.  So
 * they tell of rows in that segment of the outbox, or in older ones: with no
 * rows left there, nobody asks for them.  But the newest entry is the cursor.
 */
static void
empty_ledger(int segment)
{
	Oid			relid = segment_oid("sent", segment);

	if (segment_empty(relid) || holds_newest_entry(segment) || !segment_lock(relid))
		return;
	save_entries(segment);
	segment_truncate(relid);
}

static int
advance_segment(int current)
{
	static CachedQuery query = {"update fanout.rotation set current = $1::smallint, rotated_at = clock_timestamp()"};
	int			next = (current + 1) % OUTBOX_SEGMENTS;
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(next)};

	query_change(&query, 1, types, values, NULL, 1);
	return next;
}

/* The last rotation may lie in the future: the clock was wrong then. */
static bool
rotation_due(int retention_s)
{
	static CachedQuery query = {
		"select rotated_at not between clock_timestamp() - $1 / 2 * interval '1 s' and clock_timestamp()"
		" from fanout.rotation"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};
	bool		isnull;

	query_execute(&query, 1, types, values, NULL);
	return SPI_processed == 1 && DatumGetBool(query_value(0, 1, &isnull));
}

/* Entries that no entry of the ledger asks for that may still decide on a segment. */
static void
forget_scattered(int retention_s)
{
	static CachedQuery query = {
		"delete from fanout.scattered c where pg_visible_in_snapshot(xid,"
		" (select base from fanout.sent where topic_id is null and sent_at < now() - $1 * interval '1 s'"
		" order by sent_at desc, sent_id desc limit 1))"
		" and not exists (select from fanout.detached d where not pg_visible_in_snapshot(c.xid, d.base))"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};

	query_execute(&query, 1, types, values, NULL);
}

/*
 * Locks all segments, in the order in which a lock of the whole table does: a step looks at
 * them in another one, and may hold one while it wants the next.  False: somebody has locked
 * one of them.
 */
static bool
lock_segments(void)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (!ConditionalLockRelationOid(tables_segment(i), AccessShareLock))
			return false;
	}
	return true;
}

/*
 * Makes one step of rotation: empties segments whose rows have all been sent for
 * longer than the retention, those of the ledger with them, and makes the next
 * one current if it is empty and the current one is old enough.  Never waits for
 * a lock.  in_the_way: told each topic that has left the main cursor and keeps a segment from
 * being emptied.  Returns the current segment.
 */
int
maintenance_rotate(int retention_s, void (*in_the_way) (int32 topic_id))
{
	int			current = maintenance_current_segment();

	if (!lock_segments())
		return current;
	for (int i = 1; i < OUTBOX_SEGMENTS; i++)
	{
		int			segment = (current + i) % OUTBOX_SEGMENTS;

		if (empty_outbox(segment, retention_s, in_the_way))
			empty_ledger(segment);
	}
	if (!segment_empty(tables_segment(current)) &&
		segment_empty(tables_segment((current + 1) % OUTBOX_SEGMENTS)) &&
		rotation_due(retention_s))
		current = advance_segment(current);
	forget_scattered(retention_s);
	return current;
}

/* ---- counters ---- */

/*
 * Adds to the counters of sent messages.  ids (int4) and counts (int8) are parallel arrays;
 * seconds is the time that they were counted for.
 */
void
maintenance_count_sent(Datum *topic_ids, Datum *counts, int n, double seconds)
{
	static CachedQuery query = {
		"insert into fanout.topic_stat as s (topic_id, sent, rate, updated_at)"
		" select topic_id, c.sent, c.sent / $3, clock_timestamp()"
		" from unnest($1, $2) c (topic_id, sent) join fanout.topic using (topic_id)"
		" on conflict (topic_id) do update"
		" set sent = s.sent + excluded.sent, rate = excluded.rate, updated_at = excluded.updated_at"
	};
	Oid			types[3] = {INT4ARRAYOID, INT8ARRAYOID, FLOAT8OID};
	Datum		values[3] = {
		PointerGetDatum(construct_array(topic_ids, n, INT4OID, sizeof(int32), true, TYPALIGN_INT)),
		PointerGetDatum(construct_array(counts, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE)),
		Float8GetDatum(seconds)
	};

	query_execute(&query, 3, types, values, NULL);
}

/*
 * Adds up by how much the numbers of held messages and dead letters have changed.
 * Sessions that look at them would have to.  In a transaction of its own: the snapshot
 * that the totals are true for does not tell which of one's own changes they have.
 */
void
maintenance_add_tallies(void)
{
	static CachedQuery query = {"select fanout.add_tallies()"};

	pg_atomic_write_u32(&worker_slot->tallies, 0);
	query_execute(&query, 0, NULL, NULL, NULL);
}

/* ---- grants ---- */

/*
 * Keeps up with roles that were renamed, dropped, or created.  Not now if somebody who
 * grants or revokes holds the table, however long his transaction takes.
 */
void
maintenance_bind_grants(void)
{
	static CachedQuery query = {"select fanout.bind_grants()"};

	if (ConditionalLockRelationOid(tables_oid("topic_grant"), ShareRowExclusiveLock))
		query_execute(&query, 0, NULL, NULL, NULL);
}

/* ---- consumers ---- */

/* Names the functions of the consuming half; to be called once in the postmaster. */
void
maintenance_set_upkeep(const ConsumerUpkeep *upkeep)
{
	consumers = upkeep;
}

/* Asks for the history worker if something of the past is to be sent. */
static void
want_history(void)
{
	static CachedQuery query = {"select from fanout.backfill where state = 'running' limit 1"};

	query_execute(&query, 0, NULL, NULL, NULL);
	if (SPI_processed > 0)
		shmem_want_history(worker_slot);
}

/*
 * Puts into shared memory which other workers the database needs.  Returns how
 * many subscriptions found no place.  The caller wakes the launcher.
 */
int
maintenance_publish_subscriptions(void)
{
	want_history();
	return consumers->publish_subscriptions();
}

void
maintenance_rotate_inbox(int retention_s)
{
	consumers->rotate_inbox(retention_s);
}
