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
 * ends.
 *
 * Must never: read more than the chunk being filled has room for, but for one
 * message that is larger; copy or move messages by a statement without looking
 * how many it found (query_change()).
 *
 * Locks: none but those of the queries.  All segments are read, so that it never
 * matters which one a row went to.
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
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/timestamp.h"

#include "broker/broker.h"
#include "capture/headers.h"
#include "capture/msgid.h"
#include "publish/ledger.h"
#include "publish/reader.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/tables.h"

#define PORTAL_NAME "pg_fanout_batch"

/*
 * What is longer than this is not copied into the batch's cursor, since that is
 * materialized before its first row is seen, and FETCH_MAX rows are in memory
 * together.  It is read from the segment once a chunk has room for it.  Headers
 * are measured as they are stored; compressed, they may become 255 times as
 * large.
 */
#define MAX_FETCHED 1000

/* What readers select; place: where else to find what was not fetched. */
#define MESSAGE_COLUMNS(place, contents) \
	"id, xid, topic_id, message_id, type, queue, created_at, " place ", " \
	"octet_length(key), pg_column_size(headers), octet_length(payload), " contents

/* These of its columns are not read in their order; the first one is 1. */
#define SEGMENT			8
#define PLACE			9
#define KEY_LENGTH		10
#define HEADERS_LENGTH	11
#define PAYLOAD_LENGTH	12
#define KEY				13
#define HEADERS			14

#define IF_SHORT(column, length) \
	"case when " length " <= " CppAsString2(MAX_FETCHED) " then " column " end"
#define SHORT_CONTENTS \
	IF_SHORT("key", "octet_length(key)") ", " \
	IF_SHORT("headers", "pg_column_size(headers)") ", " \
	IF_SHORT("payload", "octet_length(payload)")

/* Most rows fetched at once; they are all in memory together. */
#define FETCH_MAX 50

/* Message.segment of those in fanout.held */
#define HELD OUTBOX_SEGMENTS

/* Rows that were fetched from a portal, without what is longer than MAX_FETCHED. */
typedef struct Rows
{
	TupleDesc	desc;
	HeapTuple  *tuples;
	int			count;
	int			next;			/* the first one that is in no chunk yet */
} Rows;

/* Of the batch being walked: those that did not fit the last chunk. */
static Rows kept;
static MemoryContext kept_context = NULL;

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
		"select base, target, last_id, base::text = target::text"
		" from fanout.sent order by sent_id desc limit 1"
	};
	bool		isnull;

	ledger_check();
	query_execute(&query, 0, NULL, NULL, NULL);
	drop_snapshot(&cursor->base);
	drop_snapshot(&cursor->target);
	cursor->base = keep_snapshot(query_value(0, 1, &isnull), TopMemoryContext);
	if (!DatumGetBool(query_value(0, 4, &isnull)))
		cursor->target = keep_snapshot(query_value(0, 2, &isnull), TopMemoryContext);
	cursor->last_id = DatumGetInt64(query_value(0, 3, &isnull));
	cursor->portal_open = false;
}

/* ---- reading ---- */

static char *
text_or_null(HeapTuple tuple, TupleDesc desc, int column)
{
	bool		isnull;
	Datum		value = SPI_getbinval(tuple, desc, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

/* NULL: 0 */
static size_t
length_or_zero(HeapTuple tuple, TupleDesc desc, int column)
{
	bool		isnull;
	Datum		value = SPI_getbinval(tuple, desc, column, &isnull);

	return isnull ? 0 : DatumGetInt32(value);
}

/*
 * Notes the sizes of what may be large.  Headers that were not fetched with the
 * row count for as much as they may become when they are read.
 */
static void
note_sizes(Message *message, HeapTuple tuple, TupleDesc desc)
{
	size_t		key_len = length_or_zero(tuple, desc, KEY_LENGTH);
	size_t		headers_len = length_or_zero(tuple, desc, HEADERS_LENGTH);
	size_t		room = (headers_len > 0) ? READER_MAX_HEADERS : 0;
	bool		isnull;
	Datum		headers = SPI_getbinval(tuple, desc, HEADERS, &isnull);

	if (!isnull)
		headers_len = room = toast_raw_datum_size(headers);
	message->headers_len = key_len + headers_len;
	message->payload_len = length_or_zero(tuple, desc, PAYLOAD_LENGTH);
	message->bytes = reader_unsendable(message) ? 0 : key_len + room + message->payload_len;
}

/* All but key, headers and payload, of which it notes the sizes.  In the current context. */
static Message *
read_message(HeapTuple tuple, TupleDesc desc)
{
	Message    *message = palloc0(sizeof(Message));
	bool		isnull;
	Datum		value;

	message->id = DatumGetInt64(SPI_getbinval(tuple, desc, 1, &isnull));
	message->xid = DatumGetUInt64(SPI_getbinval(tuple, desc, 2, &isnull));
	message->topic_id = DatumGetInt32(SPI_getbinval(tuple, desc, 3, &isnull));
	msgid_format(DatumGetUUIDP(SPI_getbinval(tuple, desc, 4, &isnull)), message->message_id);
	message->type = text_or_null(tuple, desc, 5);
	message->queue = text_or_null(tuple, desc, 6);
	message->created_at = DatumGetTimestampTz(SPI_getbinval(tuple, desc, 7, &isnull));
	value = SPI_getbinval(tuple, desc, SEGMENT, &isnull);
	message->segment = isnull ? HELD : DatumGetInt16(value);
	value = SPI_getbinval(tuple, desc, PLACE, &isnull);
	if (!isnull)
		message->place = *(ItemPointer) DatumGetPointer(value);
	note_sizes(message, tuple, desc);
	return message;
}

bool
reader_unsendable(const Message *message)
{
	return message->payload_len > BROKER_MAX_BODY || message->headers_len > READER_MAX_HEADERS;
}

/* ---- key, headers and payload ---- */

static void
take_headers(Message *message, Datum value)
{
	char	   *op;

	message->headers = DatumGetJsonbPCopy(value);
	message->old_key = headers_string(message->headers, "old_key");
	op = headers_string(message->headers, "op");
	message->truncates = (op != NULL && strcmp(op, "t") == 0);
}

/* Without a second copy, which of a large one would cost as much again. */
static void
take_payload(Message *message, Datum value)
{
	text	   *payload = (text *) PG_DETOAST_DATUM_COPY(value);

	message->payload = VARDATA(payload);
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

/* Takes them from a row, which has them in columns from the first on. */
static void
take_contents(Message *message, HeapTuple tuple, TupleDesc desc, int first)
{
	bool		isnull;
	Datum		value;

	if (message->key == NULL)
		message->key = text_or_null(tuple, desc, first);
	value = SPI_getbinval(tuple, desc, first + 1, &isnull);
	if (!isnull && message->headers == NULL)
		take_headers(message, value);
	value = SPI_getbinval(tuple, desc, first + 2, &isnull);
	if (!isnull && message->payload == NULL)
		take_payload(message, value);
}

/* Was one of them too long to be fetched with the row? */
static bool
is_incomplete(const Message *message, HeapTuple tuple, TupleDesc desc)
{
	return message->payload == NULL ||
		(message->key == NULL && length_or_zero(tuple, desc, KEY_LENGTH) > 0) ||
		(message->headers == NULL && length_or_zero(tuple, desc, HEADERS_LENGTH) > 0);
}

static bool
is_left_in(const Message *message, int segment)
{
	return message->incomplete && message->segment == segment;
}

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

/*
 * Takes what a message left in the table from a row of the last result.  If the
 * headers turn out to be too large, now that they can be measured, all is left.
 */
static void
complete(Message *message, int row)
{
	bool		isnull;
	Datum		headers = query_value(row, 3, &isnull);

	message->incomplete = false;
	if (!isnull && message->headers == NULL)
		message->headers_len = Max(message->headers_len, toast_raw_datum_size(headers));
	if (!reader_unsendable(message))
		take_contents(message, SPI_tuptable->vals[row], SPI_tuptable->tupdesc, 2);
}

/* The rows come in any order. */
static void
complete_all(Message **messages, int n)
{
	bool		isnull;

	for (uint64 row = 0; row < SPI_processed; row++)
	{
		int64		id = DatumGetInt64(query_value(row, 1, &isnull));

		for (int i = 0; i < n; i++)
		{
			if (messages[i]->id == id && messages[i]->incomplete)
				complete(messages[i], row);
		}
	}
}

/*
 * Reads the rest of messages by their places in the heap, which stay while
 * nobody rewrites the table: VACUUM FULL or CLUSTER between two chunks of a
 * batch makes this fail, and the worker begins anew.
 */
static void
read_rest_in(int segment, Message **messages, int n)
{
	static CachedQuery queries[OUTBOX_SEGMENTS] = {
		{"select id, key, headers, payload from fanout.outbox_0 where ctid = any ($1)"},
		{"select id, key, headers, payload from fanout.outbox_1 where ctid = any ($1)"},
		{"select id, key, headers, payload from fanout.outbox_2 where ctid = any ($1)"}
	};
	MemoryContext context = CurrentMemoryContext;
	Oid			types[1] = {TIDARRAYOID};
	Datum		values[1];
	Datum		places[FETCH_MAX];
	int			count = 0;

	Assert(n <= FETCH_MAX);
	for (int i = 0; i < n; i++)
	{
		if (is_left_in(messages[i], segment))
			places[count++] = PointerGetDatum(&messages[i]->place);
	}
	if (count == 0)
		return;
	values[0] = place_array(places, count);
	query_execute(&queries[segment], 1, types, values, NULL);
	MemoryContextSwitchTo(context); /* SPI does not come back to it */
	complete_all(messages, n);
	SPI_freetuptable(SPI_tuptable);
	for (int i = 0; i < n; i++)
	{
		if (is_left_in(messages[i], segment))
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("table \"fanout.outbox_%d\" was rewritten while it was read", segment)));
	}
}

static void
read_rest(Message **messages, int n)
{
	for (int segment = 0; segment < OUTBOX_SEGMENTS; segment++)
		read_rest_in(segment, messages, n);
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
 * Moves rows into the chunk as long as they fit, which is known before their
 * bodies are read.  Returns whether all did.
 */
static bool
take_rows(Rows *rows, Chunk *chunk, int limit)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(chunk->context);
	int			first = chunk->count;

	for (; rows->next < rows->count; rows->next++)
	{
		Message    *message = read_message(rows->tuples[rows->next], rows->desc);

		if (!fits(chunk, message, limit))
			break;
		if (!reader_unsendable(message))
		{
			take_contents(message, rows->tuples[rows->next], rows->desc, KEY);
			message->incomplete = is_incomplete(message, rows->tuples[rows->next], rows->desc);
		}
		message->chunk = chunk;
		chunk->messages[chunk->count++] = message;
		chunk->bytes += message->bytes;
	}
	read_rest(chunk->messages + first, chunk->count - first);
	MemoryContextSwitchTo(oldcontext);
	return rows->next == rows->count;
}

/*
 * Fetches rows until the chunk is full, or the portal at its end: then it sets
 * chunk->last.  Returns the rows that did not fit, which a caller that goes on
 * with the same portal must keep.
 */
static Rows
fill_chunk(Portal portal, Chunk *chunk, int limit)
{
	Rows		rows = {0};

	while (chunk->count < limit && chunk->bytes < CHUNK_BYTES)
	{
		int			n = Min(FETCH_MAX, limit - chunk->count);
		SPITupleTable *fetched;

		SPI_cursor_fetch(portal, true, n);
		fetched = SPI_tuptable;
		rows = (Rows)
		{
			.desc = fetched->tupdesc,.tuples = fetched->vals,.count = SPI_processed
		};
		if (!take_rows(&rows, chunk, limit))
			break;
		chunk->last = (rows.count < n);
		rows = (Rows)
		{
			0
		};
		SPI_freetuptable(fetched);
		if (chunk->last)
			break;
	}
	return rows;
}

/* Copies rows that did not fit for the next chunk: less than FETCH_MAX. */
static void
keep_rows(const Rows *rows)
{
	MemoryContext oldcontext;

	if (rows->next == rows->count)
		return;
	if (kept_context == NULL)
		kept_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout rows", ALLOCSET_DEFAULT_SIZES);
	oldcontext = MemoryContextSwitchTo(kept_context);
	kept.desc = CreateTupleDescCopy(rows->desc);
	kept.tuples = palloc((rows->count - rows->next) * sizeof(HeapTuple));
	for (int i = rows->next; i < rows->count; i++)
		kept.tuples[kept.count++] = heap_copytuple(rows->tuples[i]);
	MemoryContextSwitchTo(oldcontext);
}

static void
fill_batch_chunk(Portal portal, Chunk *chunk)
{
	Rows		rest;

	if (!take_rows(&kept, chunk, CHUNK_MESSAGES))
		return;
	kept = (Rows)
	{
		0
	};
	if (kept_context != NULL)
		MemoryContextReset(kept_context);
	rest = fill_chunk(portal, chunk, CHUNK_MESSAGES);
	keep_rows(&rest);
}

static Portal
open_batch(const Cursor *cursor)
{
	static CachedQuery query = {
		"select " MESSAGE_COLUMNS("segment, place", SHORT_CONTENTS) " from ("
		" select *, ctid as place from fanout.outbox"
		" where xid >= pg_snapshot_xmax($1) and xid < pg_snapshot_xmax($2)"
		" and pg_visible_in_snapshot(xid, $2)"
		" union all"
		" select *, ctid as place from fanout.outbox"
		" where xid = any (array(select x from pg_snapshot_xip($1) x where pg_visible_in_snapshot(x, $2)))"
		") o where id > $3 order by id"
	};
	Oid			types[3] = {PG_SNAPSHOTOID, PG_SNAPSHOTOID, INT8OID};
	Datum		values[3] = {cursor->base, cursor->target, Int64GetDatum(cursor->last_id)};
	SPIPlanPtr	plan = query_prepare(&query, 3, types, CURSOR_OPT_HOLD | CURSOR_OPT_NO_SCROLL);

	return SPI_cursor_open(PORTAL_NAME, plan, values, NULL, false);
}

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

/*
 * Entries that became visible only now go too.  That is right: what they tell
 * of is read after this, with a newer snapshot still.
 */
static void
forget_topology_changes(void)
{
	static CachedQuery query = {"delete from fanout.topology_change"};

	query_execute(&query, 0, NULL, NULL, NULL);
}

/* A pause must not wait for the end of a batch of millions. */
static void
look_for_topology_changes(bool *topology)
{
	static CachedQuery query = {"select exists (select from fanout.topology_change)"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	*topology = DatumGetBool(query_value(0, 1, &isnull));
	if (*topology)
		forget_topology_changes();
}

/* Takes the snapshot up to which a new batch reaches. */
static void
begin_batch(Cursor *cursor, bool *topology)
{
	static CachedQuery query = {
		"select pg_current_snapshot(), exists (select from fanout.topology_change)"
	};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	cursor->target = keep_snapshot(query_value(0, 1, &isnull), TopMemoryContext);
	cursor->last_id = 0;
	*topology = DatumGetBool(query_value(0, 2, &isnull));
	if (*topology)
		forget_topology_changes();
}

static void
end_batch(Cursor *cursor)
{
	drop_snapshot(&cursor->base);
	cursor->base = cursor->target;
	cursor->target = (Datum) 0;
}

Chunk *
reader_read(Cursor *cursor, MemoryContext parent, bool *topology)
{
	Chunk	   *chunk = make_chunk(parent, CHUNK_MESSAGES);
	Portal		portal;

	if (cursor->target == (Datum) 0)
		begin_batch(cursor, topology);
	else
		look_for_topology_changes(topology);
	if (cursor->portal_open)
		portal = SPI_cursor_find(PORTAL_NAME);
	else
		portal = open_batch(cursor);

	fill_batch_chunk(portal, chunk);
	chunk->base = keep_snapshot(cursor->base, chunk->context);
	chunk->target = keep_snapshot(cursor->target, chunk->context);
	cursor->portal_open = !chunk->last;
	if (chunk->last)
	{
		SPI_cursor_close(portal);
		end_batch(cursor);
	}
	if (chunk->count == 0)
	{
		MemoryContextDelete(chunk->context);
		return NULL;
	}
	flush_wal();
	return chunk;
}

/* ---- results ---- */

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

Chunk *
reader_read_held(int32 topic_id, int limit, MemoryContext parent)
{
	static CachedQuery query = {
		"select " MESSAGE_COLUMNS("null::smallint, null::tid", "key, headers, payload")
		" from fanout.held where topic_id = $1 order by id"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(topic_id)};
	Chunk	   *chunk = make_chunk(parent, limit);
	Portal		portal = SPI_cursor_open(NULL, query_prepare(&query, 1, types, CURSOR_OPT_NO_SCROLL),
										 values, NULL, false);

	(void) fill_chunk(portal, chunk, limit);
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
