/*-------------------------------------------------------------------------
 *
 * replay.c
 *		Messages that the outbox still has, once more to one queue.
 *
 * The outbox has no index, and its rows lie about, but not quite, in the order of
 * their ids.  So a replay goes through the segments by pages first, and lists in
 * fanout.replay_message what is to be sent; then it sends the list in order:
 *
 *		position {segment, page}	collect: some pages in each step
 *		position {id}				send: some messages in each step
 *
 * A message is copied: into a new row of the outbox, with an id that is its place
 * among all others, for that one queue.  What it was before goes along in its
 * headers: "sequence" and "xid", which wire.c takes over, and "replay".  The rows
 * that it is a copy of stay as they are.
 *
 * What is pending, held or dead is not sent: it reaches the queue by itself, which
 * was bound before.  What rotation has emptied since it was listed is missing.
 *
 * It must never replay what a replay has written.
 *
 * Locks: ACCESS SHARE on the segments, for a step; rotation does not wait for it,
 * and comes again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "capture/capture.h"
#include "capture/ids.h"
#include "capture/msgid.h"
#include "capture/outbox.h"
#include "history/history.h"
#include "server/query.h"
#include "server/tables.h"

/* Pages that a step reads while it collects. */
#define COLLECT_PAGES	1000

/* Bytes of bodies after which a step ends. */
#define STEP_BYTES	(2 * 1024 * 1024)

/* Columns of the statement that reads messages. */
enum
{
	REPLAY_LISTED = 1,
	REPLAY_ID,
	REPLAY_TOPIC,
	REPLAY_MESSAGE_ID,
	REPLAY_TYPE,
	REPLAY_KEY,
	REPLAY_HEADERS,
	REPLAY_PAYLOAD,
	REPLAY_CREATED_AT,
};

/* ---- collect ---- */

static BlockNumber
segment_pages(int segment)
{
	Relation	rel = relation_open(tables_segment(segment), AccessShareLock);
	BlockNumber pages = RelationGetNumberOfBlocks(rel);

	relation_close(rel, NoLock);
	return pages;
}

/*
 * Lists what is to be sent of some pages of a segment.  What is pending there is found
 * once, and not for each message.
 */
static void
collect_pages(const Walk *walk, int segment, BlockNumber first)
{
	Oid			types[1] = {INT8OID};
	Datum		values[1] = {Int64GetDatum(walk->id)};
	char	   *sql = psprintf(
							   "with found as (select b.backfill_id, o.id, %1$d, o.ctid"
							   " from fanout.backfill b join fanout.outbox_%1$d o on o.topic_id = b.topic_id"
							   " where b.backfill_id = $1 and o.ctid >= '(%2$u,0)' and o.ctid < '(%3$u,0)'"
							   " and o.database = (fanout.this_database()).database"
							   " and o.created_at >= b.since and o.created_at < b.until"
							   " and (o.queue is null or o.queue = b.queue)"
							   " and not coalesce(o.headers ? 'replay', false)"
							   " and o.id not in (select p.id from fanout.pending p where p.segment = %1$d"
							   " and p.place >= '(%2$u,0)' and p.place < '(%3$u,0)')"
							   " and not exists (select from fanout.held h where h.id = o.id)"
							   " and not exists (select from fanout.dead_letter d where d.id = o.id and d.consumer_group is null)),"
							   " listed as (insert into fanout.replay_message (backfill_id, id, segment, place)"
							   " select * from found returning 1)"
							   " select (select count(*) from found), (select count(*) from listed)",
							   segment, first, first + COLLECT_PAGES);

	if (SPI_execute_with_args(sql, 1, types, values, NULL, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not list messages of segment %d", segment);
	query_require_copied(sql);
}

static void
collect_step(const Walk *walk, const WalkRow *row, WalkStep *step)
{
	int			segment = row->nposition == 0 ? 0 : pg_strtoint32(row->position[0]);
	BlockNumber first = row->nposition == 0 ? 0 : (BlockNumber) strtoul(row->position[1], NULL, 10);

	collect_pages(walk, segment, first);
	first += COLLECT_PAGES;
	if (first >= segment_pages(segment))
	{
		segment++;
		first = 0;
	}
	step->position = palloc(2 * sizeof(char *));
	step->nposition = segment < OUTBOX_SEGMENTS ? 2 : 1;
	step->position[0] = segment < OUTBOX_SEGMENTS ? psprintf("%d", segment) : "0";
	step->position[1] = psprintf("%u", first);
}

/* ---- send ---- */

static char *
text_or_null(HeapTuple tuple, TupleDesc desc, int column)
{
	bool		isnull;
	Datum		value = SPI_getbinval(tuple, desc, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

/* The headers of a message that is sent again; of its id only if that is another one. */
static Jsonb *
replay_headers(const Walk *walk, HeapTuple tuple, TupleDesc desc)
{
	bool		isnull;
	Datum		headers = SPI_getbinval(tuple, desc, REPLAY_HEADERS, &isnull);
	char	   *added = psprintf("{\"replay\":" INT64_FORMAT "}", walk->id);

	return DatumGetJsonbP(DirectFunctionCall2(jsonb_concat, headers,
											  DirectFunctionCall1(jsonb_in, CStringGetDatum(added))));
}

/* Writes the copy of one message.  Returns the bytes of its body. */
static Size
copy_message(const Walk *walk, const WalkRow *row, HeapTuple tuple, TupleDesc desc)
{
	OutboxRow	copy;
	bool		isnull;

	memset(&copy, 0, sizeof(copy));
	copy.id = ids_draw(1);
	copy.topic_id = DatumGetInt32(SPI_getbinval(tuple, desc, REPLAY_TOPIC, &isnull));
	copy.message_id = *DatumGetUUIDP(SPI_getbinval(tuple, desc, REPLAY_MESSAGE_ID, &isnull));
	if (row->again)
		msgid_new(&copy.message_id);
	copy.type = text_or_null(tuple, desc, REPLAY_TYPE);
	copy.key = text_or_null(tuple, desc, REPLAY_KEY);
	copy.headers = replay_headers(walk, tuple, desc);
	copy.payload = TextDatumGetCString(SPI_getbinval(tuple, desc, REPLAY_PAYLOAD, &isnull));
	copy.payload_len = strlen(copy.payload);
	copy.queue = row->queue;
	copy.created_at = DatumGetTimestampTz(SPI_getbinval(tuple, desc, REPLAY_CREATED_AT, &isnull));
	outbox_insert(&copy, false);
	return copy.payload_len;
}

/* Reads the next messages of the list; those that are gone are NULL but for their id there. */
static void
read_messages(const Walk *walk, const WalkRow *row)
{
	static CachedQuery query = {
		"select r.id, o.id, o.topic_id, o.message_id, o.type, o.key,"
		" coalesce(o.headers, '{}') || jsonb_build_object('sequence', o.id, 'xid', o.xid::text::bigint)"
		" || case when $4 then jsonb_build_object('replay_of', o.message_id) else '{}' end,"
		" o.payload, o.created_at"
		" from (select * from fanout.replay_message where backfill_id = $1 and id > $2 order by id limit $3) r"
		" left join lateral (select * from fanout.outbox_0 s where r.segment = 0 and s.ctid = r.place"
		" union all select * from fanout.outbox_1 s where r.segment = 1 and s.ctid = r.place"
		" union all select * from fanout.outbox_2 s where r.segment = 2 and s.ctid = r.place) o on o.id = r.id"
		" order by r.id"
	};
	Oid			types[4] = {INT8OID, INT8OID, INT4OID, BOOLOID};
	Datum		values[4] = {
		Int64GetDatum(walk->id), Int64GetDatum(strtoll(row->position[0], NULL, 10)),
		Int32GetDatum(walk->rows), BoolGetDatum(row->again)
	};

	query_execute(&query, 4, types, values, NULL);
}

static void
forget_list(const Walk *walk)
{
	static CachedQuery query = {"delete from fanout.replay_message where backfill_id = $1"};
	Oid			types[1] = {INT8OID};
	Datum		values[1] = {Int64GetDatum(walk->id)};

	query_execute(&query, 1, types, values, NULL);
}

static void
send_step(const Walk *walk, const WalkRow *row, WalkStep *step)
{
	SPITupleTable *table;
	uint64		n;
	int64		last = 0;
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout message",
												  ALLOCSET_DEFAULT_SIZES);

	read_messages(walk, row);
	table = SPI_tuptable;
	n = SPI_processed;
	for (uint64 i = 0; i < n && step->bytes <= STEP_BYTES; i++)
	{
		MemoryContext old_context = MemoryContextSwitchTo(context);
		bool		gone;

		CHECK_FOR_INTERRUPTS();
		(void) SPI_getbinval(table->vals[i], table->tupdesc, REPLAY_ID, &gone);
		if (!gone)
		{
			step->bytes += copy_message(walk, row, table->vals[i], table->tupdesc);
			step->sent++;
		}
		last = DatumGetInt64(SPI_getbinval(table->vals[i], table->tupdesc, REPLAY_LISTED, &gone));
		step->rows++;
		MemoryContextSwitchTo(old_context);
		MemoryContextReset(context);
	}
	SPI_freetuptable(table);
	step->walked = (n == 0);
	if (step->walked)
	{
		forget_list(walk);
		return;
	}
	step->nposition = 1;
	step->position = palloc(sizeof(char *));
	step->position[0] = psprintf(INT64_FORMAT, last);
}

/*
 * Lists the messages of some pages, or writes copies of the next ones.  In a
 * transaction of worker_begin(), which the caller ends.  Fills in step.
 */
void
replay_step(Walk *walk, const WalkRow *row, WalkStep *step)
{
	if (row->nposition == 1)
		send_step(walk, row, step);
	else
		collect_step(walk, row, step);
}

/* Tells the consumer group that all messages have been sent again. */
void
replay_end(const Walk *walk, const WalkRow *row)
{
	char	   *body = psprintf("{\"replay\":" INT64_FORMAT ",\"messages\":" INT64_FORMAT "}", walk->id, row->sent);
	char	   *headers = psprintf("{\"replay\":" INT64_FORMAT ",\"last\":true}", walk->id);

	capture_notice(row->topic, "pg_fanout.replay",
				   DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(body))),
				   DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(headers))), row->queue);
}
