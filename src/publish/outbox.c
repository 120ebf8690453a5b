/*-------------------------------------------------------------------------
 *
 * outbox.c
 *		The outbox tables: writing rows, reading batches, keeping the ledger.
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
 * Rows are never updated or deleted.  The ledger (fanout.sent) says up to
 * where they were sent.  Both are rings of segments that are emptied by TRUNCATE.
 *
 * Must never: read more than the chunk being filled has room for, but for one
 * message that is larger; copy or move messages by a statement without looking
 * how many it found (query_change()).
 *
 * Locks: writers hold ROW EXCLUSIVE on a segment until their transaction
 * ends, so that rotation, which takes ACCESS EXCLUSIVE without waiting, never
 * meets a row that is still undecided.  Readers read all segments, so that it
 * never matters which segment a row went to.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "catalog/pg_type.h"
#include "commands/sequence.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "utils/xid8.h"

#include "broker/broker.h"
#include "capture/headers.h"
#include "capture/msgid.h"
#include "capture/writer.h"
#include "publish/ledger.h"
#include "publish/outbox.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/segment.h"
#include "server/shmem.h"
#include "server/tables.h"
#include "server/wakeup.h"

#define PORTAL_NAME "pg_fanout_batch"

#define OUTBOX_NATTS 11

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

/*
 * Microseconds that the sequence may lie behind the clock where a session cannot
 * tell whether others draw numbers from it.
 */
#define SEQUENCE_LAG (10 * USECS_PER_SEC)

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

/* ---- writing ---- */

/* Columns of fanout.outbox, made once per session. */
static TupleDesc
row_descriptor(void)
{
	static const Oid types[OUTBOX_NATTS] = {
		INT2OID, INT8OID, XID8OID, INT4OID, UUIDOID, TEXTOID,
		TEXTOID, JSONBOID, TEXTOID, TEXTOID, TIMESTAMPTZOID
	};
	static TupleDesc desc = NULL;
	MemoryContext old_context;
	TupleDesc	fresh;

	if (desc != NULL)
		return desc;
	old_context = MemoryContextSwitchTo(TopMemoryContext);
	fresh = CreateTemplateTupleDesc(OUTBOX_NATTS);
	for (int i = 0; i < OUTBOX_NATTS; i++)
		TupleDescInitEntry(fresh, i + 1, NULL, types[i], -1, 0);
	MemoryContextSwitchTo(old_context);
	desc = fresh;
	return desc;
}

/* The last number that was drawn, or 0. */
static int64
last_number(Oid sequence)
{
	LOCAL_FCINFO(fcinfo, 1);
	FmgrInfo	flinfo;
	Datum		number;

	fmgr_info(F_PG_SEQUENCE_LAST_VALUE, &flinfo);
	InitFunctionCallInfoData(*fcinfo, &flinfo, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = ObjectIdGetDatum(sequence);
	fcinfo->args[0].isnull = false;
	number = FunctionCallInvoke(fcinfo);
	return fcinfo->isnull ? 0 : DatumGetInt64(number);
}

/*
 * Moves the sequence on to the microseconds since 1970, as its owner, if it lies
 * behind them by more than that.
 */
static void
move_to_clock(Oid sequence, int64 lag)
{
	int64		now = GetCurrentTimestamp() +
		((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE)) * USECS_PER_DAY;
	Oid			user;
	int			context;
	Relation	rel = relation_open(sequence, AccessShareLock);

	GetUserIdAndSecContext(&user, &context);
	SetUserIdAndSecContext(rel->rd_rel->relowner, context | SECURITY_LOCAL_USERID_CHANGE);
	relation_close(rel, NoLock);
	if (last_number(sequence) < now - lag)
		(void) DirectFunctionCall2(setval_oid, ObjectIdGetDatum(sequence), Int64GetDatum(now));
	SetUserIdAndSecContext(user, context);
}

/*
 * Sees to it that ids never go back: not after a restore of any kind, nor on a
 * standby that was promoted before the last numbers of its primary reached it.
 * No id that was ever drawn lies above the clock, since nobody draws a million
 * of them in a second.  So the first session that draws one after the server
 * started, or was promoted, moves the sequence on to the clock; all others wait
 * for it, for moments, so that nobody draws meanwhile.
 *
 * Without a slot in shared memory each session has to do it, and then others
 * may be drawing: it is done only if they cannot draw as many as are skipped.
 */
static void
follow_clock(Oid sequence)
{
	DatabaseSlot *slot = shmem_my_slot();
	LOCKTAG		tag;

	if (slot == NULL && pgf_shared != NULL)
	{
		slot = shmem_want_slot(MyDatabaseId);
		shmem_wake_launcher(0);
	}
	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, RelationRelationId, sequence, 3);
	(void) LockAcquire(&tag, ExclusiveLock, false, false);
	if (slot == NULL)
		move_to_clock(sequence, SEQUENCE_LAG);
	else if (pg_atomic_read_u32(&slot->ids_follow_clock) == 0)
	{
		move_to_clock(sequence, 0);
		pg_atomic_write_u32(&slot->ids_follow_clock, 1);
	}
	(void) LockRelease(&tag, ExclusiveLock, false);
}

int64
outbox_next_id(void)
{
	static bool followed = false;
	DatabaseSlot *slot = shmem_my_slot();
	Oid			sequence = tables_outbox_sequence();

	if (slot != NULL ? pg_atomic_read_u32(&slot->ids_follow_clock) == 0 : !followed)
		follow_clock(sequence);
	followed = true;
	return nextval_internal(sequence, false);
}

/* The row's columns; texts are made in the current context. */
static void
fill_row(const OutboxRow *row, int segment, Datum *values, bool *nulls)
{
	memset(nulls, false, OUTBOX_NATTS * sizeof(bool));
	values[0] = Int16GetDatum(segment);
	values[1] = Int64GetDatum(row->id);
	values[2] = FullTransactionIdGetDatum(GetTopFullTransactionId());
	values[3] = Int32GetDatum(row->topic_id);
	values[4] = UUIDPGetDatum(&row->message_id);
	values[5] = row->type ? CStringGetTextDatum(row->type) : (Datum) 0;
	nulls[5] = (row->type == NULL);
	values[6] = row->key ? CStringGetTextDatum(row->key) : (Datum) 0;
	nulls[6] = (row->key == NULL);
	values[7] = PointerGetDatum(row->headers);
	nulls[7] = (row->headers == NULL);
	values[8] = PointerGetDatum(cstring_to_text_with_len(row->payload, row->payload_len));
	values[9] = (Datum) 0;
	nulls[9] = true;
	values[10] = TimestampTzGetDatum(row->created_at);
}

void
outbox_insert(const OutboxRow *row, bool at_once)
{
	DatabaseSlot *slot = shmem_my_slot();
	int			segment = slot ? pg_atomic_read_u32(&slot->current_segment) : 0;
	Datum		values[OUTBOX_NATTS];
	bool		nulls[OUTBOX_NATTS];

	fill_row(row, segment, values, nulls);
	if (at_once)
		writer_insert(segment, row_descriptor(), values, nulls);
	else
		writer_queue(segment, row_descriptor(), values, nulls);
	wakeup_publisher_at_commit();
}

void
outbox_topology_changed(void)
{
	TupleDesc	desc = CreateTemplateTupleDesc(1);
	Datum		value = FullTransactionIdGetDatum(GetTopFullTransactionId());
	bool		isnull = false;
	HeapTuple	row;

	TupleDescInitEntry(desc, 1, NULL, XID8OID, -1, 0);
	row = heap_form_tuple(desc, &value, &isnull);
	segment_insert(tables_topology_change(), desc, &row, 1);
	wakeup_publisher_at_commit();
}

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
outbox_load_cursor(Cursor *cursor)
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
	size_t		room = (headers_len > 0) ? OUTBOX_MAX_HEADERS : 0;
	bool		isnull;
	Datum		headers = SPI_getbinval(tuple, desc, HEADERS, &isnull);

	if (!isnull)
		headers_len = room = toast_raw_datum_size(headers);
	message->headers_len = key_len + headers_len;
	message->payload_len = length_or_zero(tuple, desc, PAYLOAD_LENGTH);
	message->bytes = outbox_unsendable(message) ? 0 : key_len + room + message->payload_len;
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
outbox_unsendable(const Message *message)
{
	return message->payload_len > BROKER_MAX_BODY || message->headers_len > OUTBOX_MAX_HEADERS;
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
outbox_free_body(Message *message)
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
	if (!outbox_unsendable(message))
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
		if (!outbox_unsendable(message))
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
outbox_read(Cursor *cursor, MemoryContext parent, bool *topology)
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

void
outbox_record_sent(const Chunk *chunk)
{
	static CachedQuery query = {
		"insert into fanout.sent (segment, base, target, last_id, count)"
		" select current, $1, $2, $3, $4 from fanout.rotation"
	};
	Oid			types[4] = {PG_SNAPSHOTOID, PG_SNAPSHOTOID, INT8OID, INT4OID};
	Datum		values[4] = {
		chunk->base, chunk->target,
		Int64GetDatum(chunk->messages[chunk->count - 1]->id),
		Int32GetDatum(chunk->before + chunk->count)
	};

	query_execute(&query, 4, types, values, NULL);
	if (SPI_processed != 1)
		tables_row_missing("rotation");
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
outbox_hold(Message **messages, int n)
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
outbox_bury(const Message *message, const char *topic, int attempts)
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
outbox_read_held(int32 topic_id, int limit, MemoryContext parent)
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
outbox_lock_held(Message **messages, int n)
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
outbox_release(Message **messages, int n)
{
	static CachedQuery query = {"delete from fanout.held where id = any ($1)"};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1] = {ids_of(messages, n)};

	if (n > 0)
		query_execute(&query, 1, types, values, NULL);
}

int
outbox_topics_held(int32 **topic_ids)
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

void
outbox_count_sent(const int32 *topic_ids, const int64 *counts, int n, double seconds)
{
	static CachedQuery query = {
		"insert into fanout.topic_stat as s (topic_id, sent, rate, updated_at)"
		" select t.topic_id, $2, $2 / $3, clock_timestamp() from fanout.topic t where t.topic_id = $1"
		" on conflict (topic_id) do update"
		" set sent = s.sent + excluded.sent, rate = excluded.rate, updated_at = excluded.updated_at"
	};
	Oid			types[3] = {INT4OID, INT8OID, FLOAT8OID};

	for (int i = 0; i < n; i++)
	{
		Datum		values[3] = {
			Int32GetDatum(topic_ids[i]), Int64GetDatum(counts[i]), Float8GetDatum(seconds)
		};

		query_execute(&query, 3, types, values, NULL);
	}
}

/* ---- the ring of segments ---- */

int
outbox_current_segment(void)
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

/*
 * Do all rows of the segment count as sent by an entry of the ledger that is
 * older than the retention?  That entry is the newest such one; what it has
 * passed is decided by the same rule as everywhere.  Only rows from its
 * base's xmin on can be unsent, so the index finds them.
 */
static bool
segment_expired(int segment, int retention_s)
{
	char		sql[1024];
	bool		isnull;

	snprintf(sql, sizeof(sql),
			 "with l as (select * from fanout.sent"
			 " where sent_at < now() - %d * interval '1 s' order by sent_at desc, sent_id desc limit 1)"
			 " select exists (select from l) and not exists (select from l, fanout.outbox_%d o"
			 " where o.xid >= pg_snapshot_xmin(l.base) and not pg_visible_in_snapshot(o.xid, l.base)"
			 " and not (pg_visible_in_snapshot(o.xid, l.target) and o.id <= l.last_id))",
			 retention_s, segment);
	if (SPI_execute(sql, false, 1) != SPI_OK_SELECT)
		elog(ERROR, "could not inspect segment %d", segment);
	return DatumGetBool(query_value(0, 1, &isnull));
}

/*
 * Under ACCESS EXCLUSIVE no transaction that wrote into it is still undecided,
 * and the rows are looked at once more.  True if it is empty then.
 */
static bool
empty_outbox(int segment, int retention_s)
{
	Oid			relid = tables_segment(segment);

	if (segment_empty(relid))
		return true;
	if (!segment_expired(segment, retention_s) || !segment_lock(relid) ||
		!segment_expired(segment, retention_s))
		return false;
	segment_truncate(relid);
	return true;
}

static bool
holds_newest_entry(int segment)
{
	static CachedQuery query = {"select segment::int from fanout.sent order by sent_id desc limit 1"};
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

	if (!segment_empty(relid) && !holds_newest_entry(segment) && segment_lock(relid))
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

int
outbox_rotate(int retention_s)
{
	int			current = outbox_current_segment();

	for (int i = 1; i < OUTBOX_SEGMENTS; i++)
	{
		int			segment = (current + i) % OUTBOX_SEGMENTS;

		if (empty_outbox(segment, retention_s))
			empty_ledger(segment);
	}
	if (!segment_empty(tables_segment(current)) &&
		segment_empty(tables_segment((current + 1) % OUTBOX_SEGMENTS)) &&
		rotation_due(retention_s))
		current = advance_segment(current);
	return current;
}
