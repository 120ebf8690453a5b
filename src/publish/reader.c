/*-------------------------------------------------------------------------
 *
 * reader.c
 *		Reading the outbox in batches, and what becomes of its messages.
 *
 * A batch is what became visible between two snapshots, base and target: rows
 * whose transaction was running in base and has finished since, and rows of
 * transactions that began after it; in order of id.  Two transactions that
 * change the same row do so one after the other (row locks), so the later one
 * draws the higher id, and no snapshot shows it without the earlier.  That is
 * all the order there is, and it needs no waiting for the oldest transaction:
 * one that is open for hours costs a single entry in the batch in which it
 * ends.  Where the rows are is found out by scan.c.
 *
 * Must never: read more than the chunk being filled has room for, but for one
 * message that is larger; copy or move messages by a statement without looking
 * how many it found (query_change()).
 *
 * Locks: ACCESS SHARE on all segments while a transaction reads them, so that it
 * never matters which one a row went to; and those of the queries.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/htup_details.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "broker/broker.h"
#include "capture/headers.h"
#include "capture/msgid.h"
#include "publish/ledger.h"
#include "publish/reader.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/tables.h"

/* Rows of fanout.held that are fetched at once; they are all in memory together. */
#define FETCH_MAX 50

/* Message.segment of those in fanout.held */
#define HELD OUTBOX_SEGMENTS

/* ---- snapshots ---- */

static Datum
keep_snapshot(Datum snapshot, MemoryContext context)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	Datum		copy = PointerGetDatum(PG_DETOAST_DATUM_COPY(snapshot));

	MemoryContextSwitchTo(oldcontext);
	return copy;
}

static void
drop_snapshot(Datum *snapshot)
{
	if (*snapshot != (Datum) 0)
		pfree(DatumGetPointer(*snapshot));
	*snapshot = (Datum) 0;
}

void
reader_load_cursor(Cursor *cursor)
{
	static CachedQuery query = {
		"select base, target, last_id, base::text = target::text,"
		" files[1], files[2], files[3], unread[1], unread[2], unread[3]"
		" from fanout.sent order by sent_id desc limit 1"
	};
	Unread		unread;
	bool		isnull;

	ledger_check();
	query_execute(&query, 0, NULL, NULL, NULL);
	drop_snapshot(&cursor->base);
	drop_snapshot(&cursor->target);
	cursor->base = keep_snapshot(query_value(0, 1, &isnull), TopMemoryContext);
	if (!DatumGetBool(query_value(0, 4, &isnull)))
		cursor->target = keep_snapshot(query_value(0, 2, &isnull), TopMemoryContext);
	cursor->last_id = DatumGetInt64(query_value(0, 3, &isnull));
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		unread.files[i] = DatumGetObjectId(query_value(0, 5 + i, &isnull));
		unread.blocks[i] = DatumGetInt64(query_value(0, 5 + OUTBOX_SEGMENTS + i, &isnull));
	}
	scan_load(&unread);
	scan_end(&cursor->scan);
	cursor->open = false;
}

/* ---- reading a row ---- */

/* Columns of a row, NULL: (Datum) 0. */
typedef struct Row
{
	Datum		values[OUTBOX_CREATED_AT + 1];	/* by their numbers */
} Row;

static void
take_row(HeapTuple tuple, TupleDesc desc, Row *row)
{
	for (int i = 1; i <= OUTBOX_CREATED_AT; i++)
	{
		bool		isnull;

		row->values[i] = heap_getattr(tuple, i, desc, &isnull);
		if (isnull)
			row->values[i] = (Datum) 0;
	}
}

static char *
text_or_null(Datum value)
{
	return value == (Datum) 0 ? NULL : TextDatumGetCString(value);
}

/* Bytes of a value once it is read, found without reading it; NULL: 0. */
static size_t
raw_size(Datum value)
{
	return value == (Datum) 0 ? 0 : toast_raw_datum_size(value) - VARHDRSZ;
}

/* All but key, headers and payload, of which it notes the sizes.  In the current context. */
static Message *
make_message(const Row *row)
{
	Message    *message = palloc0(sizeof(Message));

	message->id = DatumGetInt64(row->values[OUTBOX_ID]);
	message->xid = DatumGetUInt64(row->values[OUTBOX_XID]);
	message->topic_id = DatumGetInt32(row->values[OUTBOX_TOPIC_ID]);
	msgid_format(DatumGetUUIDP(row->values[OUTBOX_MESSAGE_ID]), message->message_id);
	message->type = text_or_null(row->values[OUTBOX_TYPE]);
	message->queue = text_or_null(row->values[OUTBOX_QUEUE]);
	message->created_at = DatumGetTimestampTz(row->values[OUTBOX_CREATED_AT]);
	message->headers_len = raw_size(row->values[OUTBOX_KEY]) + raw_size(row->values[OUTBOX_HEADERS]);
	message->payload_len = raw_size(row->values[OUTBOX_PAYLOAD]);
	message->bytes = reader_unsendable(message) ? 0 : message->headers_len + message->payload_len;
	return message;
}

bool
reader_unsendable(const Message *message)
{
	return message->payload_len > BROKER_MAX_BODY || message->headers_len > READER_MAX_HEADERS;
}

static void
take_headers(Message *message, Datum value)
{
	char	   *op;

	message->headers = DatumGetJsonbPCopy(value);
	message->old_key = headers_string(message->headers, "old_key");
	op = headers_string(message->headers, "op");
	message->truncates = (op != NULL && strcmp(op, "t") == 0);
}

/*
 * Reads key, headers and payload.  The payload without a second copy, which of a
 * large one would cost as much again.
 */
static void
take_contents(Message *message, const Row *row)
{
	message->key = text_or_null(row->values[OUTBOX_KEY]);
	if (row->values[OUTBOX_HEADERS] != (Datum) 0)
		take_headers(message, row->values[OUTBOX_HEADERS]);
	message->payload = VARDATA(PG_DETOAST_DATUM_COPY(row->values[OUTBOX_PAYLOAD]));
}

void
reader_free_body(Message *message)
{
	const char *body = message->wire.body;

	if (body != NULL && body != message->payload)
		pfree(unconstify(char *, body));
	if (message->payload != NULL)
		pfree(message->payload - VARHDRSZ);
	message->wire.body = NULL;
	message->payload = NULL;
}

/* ---- chunks ---- */

static Chunk *
make_chunk(MemoryContext parent, int limit)
{
	MemoryContext context = AllocSetContextCreate(parent, "pg_fanout chunk", ALLOCSET_DEFAULT_SIZES);
	Chunk	   *chunk = MemoryContextAllocZero(context, sizeof(Chunk));

	chunk->context = context;
	chunk->messages = MemoryContextAlloc(context, limit * sizeof(Message *));
	return chunk;
}

/* A first message always does, however large it is. */
static bool
fits(const Chunk *chunk, const Message *message, int limit)
{
	if (chunk->count == 0)
		return true;
	return chunk->count < limit && chunk->bytes + message->bytes <= CHUNK_BYTES;
}

/*
 * Makes a message of a row and adds it to the chunk, in the chunk's context, if it
 * fits, which is known before its body is read.  Returns NULL if it does not.
 */
static Message *
add_message(Chunk *chunk, HeapTuple tuple, TupleDesc desc, int limit)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(chunk->context);
	Message    *message;
	Row			row;

	take_row(tuple, desc, &row);
	message = make_message(&row);
	if (fits(chunk, message, limit))
	{
		if (!reader_unsendable(message))
			take_contents(message, &row);
		message->chunk = chunk;
		chunk->messages[chunk->count++] = message;
		chunk->bytes += message->bytes;
	}
	else
		message = NULL;
	MemoryContextSwitchTo(oldcontext);
	return message;
}

/* Fills a chunk with the next rows of a batch; the last of the batch sets chunk->last. */
static void
fill_chunk(BatchScan *scan, Chunk *chunk)
{
	const Entry *entry;

	while ((entry = scan_next(scan)) != NULL)
	{
		TupleDesc	desc;
		HeapTuple	tuple = scan_fetch(entry, &desc);
		Message    *message = add_message(chunk, tuple, desc, CHUNK_MESSAGES);

		if (message == NULL)
			break;
		message->segment = entry->segment;
		message->place = tuple->t_self;
		heap_freetuple(tuple);
		scan->next++;
	}
	chunk->last = (entry == NULL);
}

/* ---- batches ---- */

/*
 * Makes sure that a crash cannot take back what is about to be published:
 * with synchronous_commit = off a transaction is visible before its commit
 * record is on disk.
 */
static void
flush_wal(void)
{
	XLogRecPtr	upto = GetXLogInsertRecPtr();
	uint32		in_page = upto % XLOG_BLCKSZ;

	/*
	 * Just after a page boundary the insert position points behind the header
	 * of a page that no record has begun yet; XLogFlush() would complain that
	 * there is not that much.
	 */
	if (in_page == SizeOfXLogShortPHD ||
		(in_page == SizeOfXLogLongPHD && XLogSegmentOffset(upto, wal_segment_size) == in_page))
		upto -= in_page;
	XLogFlush(upto);
}

/* Takes the snapshot up to which a new batch reaches. */
static void
take_target(Cursor *cursor)
{
	Datum		target = DirectFunctionCall1(pg_current_snapshot, (Datum) 0);

	cursor->target = keep_snapshot(target, TopMemoryContext);
	cursor->last_id = 0;
}

/*
 * Looks whether topics or bindings were changed, and forgets that: what the entries
 * tell of is read after this, with a newer snapshot still, so those that became
 * visible only now may go too.  Finds out which segments may have rows of the batch
 * anywhere.
 */
static void
look_around(const Cursor *cursor, bool *topology, bool *anywhere)
{
	static CachedQuery query = {
		"select exists (select from fanout.topology_change),"
		" (select coalesce(bit_or(1 << segment), 0) from fanout.scattered"
		" where xid >= pg_snapshot_xmin($1) and not pg_visible_in_snapshot(xid, $1))"
	};
	static CachedQuery forget = {"delete from fanout.topology_change"};
	Oid			types[1] = {PG_SNAPSHOTOID};
	Datum		values[1] = {cursor->base};
	bool		isnull;
	int			segments;

	query_execute(&query, 1, types, values, NULL);
	*topology = DatumGetBool(query_value(0, 1, &isnull));
	segments = DatumGetInt32(query_value(0, 2, &isnull));
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		anywhere[i] = (segments & (1 << i)) != 0;
	if (*topology)
		query_execute(&forget, 0, NULL, NULL, NULL);
}

/*
 * Finds the rows of a batch: a new one, or the rest of the one that the ledger was in
 * the midst of.
 */
static void
open_batch(Cursor *cursor, bool *topology)
{
	bool		anywhere[OUTBOX_SEGMENTS];
	bool		resumed = (cursor->target != (Datum) 0);

	scan_begin();
	PushActiveSnapshot(GetTransactionSnapshot());
	if (!resumed)
		take_target(cursor);
	look_around(cursor, topology, anywhere);
	scan_batch(&cursor->scan, cursor->base, cursor->target, cursor->last_id, anywhere, resumed);
	PopActiveSnapshot();
	cursor->open = true;
}

/* Goes on with a batch.  A pause must not wait for the end of one of millions. */
static void
continue_batch(Cursor *cursor, bool *topology)
{
	bool		anywhere[OUTBOX_SEGMENTS];

	look_around(cursor, topology, anywhere);
	scan_reopen(&cursor->scan);
}

static void
end_batch(Cursor *cursor)
{
	scan_end(&cursor->scan);
	drop_snapshot(&cursor->base);
	cursor->base = cursor->target;
	cursor->target = (Datum) 0;
	cursor->open = false;
}

/*
 * Returns the next chunk of the batch being walked, or else the first chunk of a new
 * batch, as a child of parent.  Sets *topology if topics or bindings changed since the
 * last call, in the new batch's target at least (and forgets that they did).  Returns
 * NULL if there is nothing new; the base then moves up by itself.
 */
Chunk *
reader_read(Cursor *cursor, MemoryContext parent, bool *topology)
{
	Chunk	   *chunk = make_chunk(parent, CHUNK_MESSAGES);

	if (cursor->open)
		continue_batch(cursor, topology);
	else
		open_batch(cursor, topology);
	fill_chunk(&cursor->scan, chunk);
	scan_close();
	chunk->base = keep_snapshot(cursor->base, chunk->context);
	chunk->target = keep_snapshot(cursor->target, chunk->context);
	chunk->unread = cursor->scan.unread;
	if (chunk->last)
		end_batch(cursor);
	if (chunk->count == 0)
	{
		MemoryContextDelete(chunk->context);
		return NULL;
	}
	flush_wal();
	return chunk;
}

/* ---- results ---- */

static Datum
place_array(Datum *places, int count)
{
	return PointerGetDatum(construct_array(places, count, TIDOID, sizeof(ItemPointerData), false, TYPALIGN_SHORT));
}

static Datum
id_array(Datum *ids, int count)
{
	return PointerGetDatum(construct_array(ids, count, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/* The columns of a message in fanout.outbox and fanout.held. */
#define CONTENTS "message_id, type, key, headers, payload, queue, xid, created_at"

/* Copies the messages of one segment. */
static void
hold_from(int segment, Message **messages, int n)
{
#define HOLD_FROM(segment) \
	"insert into fanout.held (id, topic_id, " CONTENTS ")" \
	" select id, topic_id, " CONTENTS " from fanout.outbox_" #segment \
	" join unnest($1, $2) m (place, message) on ctid = place and id = message"
	static CachedQuery queries[OUTBOX_SEGMENTS] = {{HOLD_FROM(0)}, {HOLD_FROM(1)}, {HOLD_FROM(2)}};
	Oid			types[2] = {TIDARRAYOID, INT8ARRAYOID};
	Datum		values[2];
	Datum	   *places = palloc((n + 1) * sizeof(Datum));
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (messages[i]->segment != segment)
			continue;
		places[count] = PointerGetDatum(&messages[i]->place);
		ids[count++] = Int64GetDatum(messages[i]->id);
	}
	if (count == 0)
		return;
	values[0] = place_array(places, count);
	values[1] = id_array(ids, count);
	query_change(&queries[segment], 2, types, values, NULL, count);
}

/*
 * Copies from table to table, so that however many bodies there are, one at a
 * time is in memory.  That includes those that were not read.
 */
void
reader_hold(Message **messages, int n)
{
	for (int segment = 0; segment < OUTBOX_SEGMENTS; segment++)
		hold_from(segment, messages, n);
}

#define BURY "insert into fanout.dead_letter (id, topic, " CONTENTS ", reason, attempts)" \
	" select id, $3, " CONTENTS ", $4, $5 from "

static void
bury_from_outbox(const Message *message, Oid *types, Datum *values)
{
#define BURY_FROM(segment) BURY "fanout.outbox_" #segment " where ctid = $2 and id = $1"
	static CachedQuery queries[OUTBOX_SEGMENTS] = {{BURY_FROM(0)}, {BURY_FROM(1)}, {BURY_FROM(2)}};

	query_change(&queries[message->segment], 5, types, values, NULL, 1);
}

static bool
bury_from_held(Oid *types, Datum *values)
{
	static CachedQuery query = {
		"with moved as (delete from fanout.held where id = $1 returning *) "
		BURY "moved"
	};

	query_execute(&query, 5, types, values, NULL);
	return SPI_processed > 0;
}

bool
reader_bury(const Message *message, const char *topic, int attempts)
{
	Oid			types[5] = {INT8OID, TIDOID, TEXTOID, TEXTOID, INT4OID};
	Datum		values[5] = {
		Int64GetDatum(message->id), PointerGetDatum(&message->place), CStringGetTextDatum(topic),
		CStringGetTextDatum(message->reason), Int32GetDatum(attempts)
	};

	if (message->segment == HELD)
		return bury_from_held(types, values);
	bury_from_outbox(message, types, values);
	return true;
}

/* ---- held messages ---- */

/* Fills a chunk from a portal; sets chunk->last if that is at its end. */
static void
fill_held_chunk(Portal portal, Chunk *chunk, int limit)
{
	bool		full = false;

	while (!full && !chunk->last)
	{
		SPITupleTable *fetched;
		uint64		n;

		SPI_cursor_fetch(portal, true, FETCH_MAX);
		fetched = SPI_tuptable;
		n = SPI_processed;
		for (uint64 i = 0; i < n && !full; i++)
		{
			Message    *message = add_message(chunk, fetched->vals[i], fetched->tupdesc, limit);

			if (message == NULL)
				full = true;
			else
				message->segment = HELD;
		}
		chunk->last = !full && n < FETCH_MAX;
		SPI_freetuptable(fetched);
	}
}

/* Returns the first messages held for a topic, in order, at most limit; NULL if none. */
Chunk *
reader_read_held(int32 topic_id, int limit, MemoryContext parent)
{
	static CachedQuery query = {
		"select null::smallint, null::oid, id, xid, topic_id, message_id, type, key, headers, payload, queue, created_at"
		" from fanout.held where topic_id = $1 order by id"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(topic_id)};
	Chunk	   *chunk = make_chunk(parent, limit);
	Portal		portal = SPI_cursor_open(NULL, query_prepare(&query, 1, types, CURSOR_OPT_NO_SCROLL),
										 values, NULL, false);

	fill_held_chunk(portal, chunk, limit);
	SPI_cursor_close(portal);
	if (chunk->count == 0)
	{
		MemoryContextDelete(chunk->context);
		return NULL;
	}
	return chunk;
}

static Datum
ids_of(Message **messages, int n)
{
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));

	for (int i = 0; i < n; i++)
		ids[i] = Int64GetDatum(messages[i]->id);
	return id_array(ids, n);
}

/*
 * Locks rows so that nothing that is done to them can fail to find them.  It
 * passes over those that a transaction is about to purge, because the publisher
 * waits for no user.
 */
bool
reader_lock_held(Message **messages, int n)
{
	static CachedQuery lock = {"select from fanout.held where id = any ($1) for update skip locked"};
	static CachedQuery all = {"select from fanout.held where id = any ($1)"};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1] = {ids_of(messages, n)};
	uint64		locked;

	if (n == 0)
		return true;
	query_execute(&lock, 1, types, values, NULL);
	locked = SPI_processed;
	if (locked == n)
		return true;
	query_execute(&all, 1, types, values, NULL);
	return SPI_processed == locked;
}

void
reader_release(Message **messages, int n)
{
	static CachedQuery query = {"delete from fanout.held where id = any ($1)"};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1] = {ids_of(messages, n)};

	if (n > 0)
		query_execute(&query, 1, types, values, NULL);
}

int
reader_topics_held(int32 **topic_ids)
{
	static CachedQuery query = {
		"select topic_id from fanout.topic t"
		" where exists (select from fanout.held h where h.topic_id = t.topic_id)"
	};
	int			n;
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	n = SPI_processed;
	*topic_ids = palloc((n + 1) * sizeof(int32));
	for (int i = 0; i < n; i++)
		(*topic_ids)[i] = DatumGetInt32(query_value(i, 1, &isnull));
	return n;
}
