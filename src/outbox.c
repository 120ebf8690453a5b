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
 * Locks: writers hold ROW EXCLUSIVE on a segment until their transaction
 * ends, so that rotation, which takes ACCESS EXCLUSIVE without waiting, never
 * meets a row that is still undecided.  Readers read all segments, so that it
 * never matters which segment a row went to.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "catalog/indexing.h"
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

#include "broker.h"
#include "compat.h"
#include "headers.h"
#include "ledger.h"
#include "msgid.h"
#include "outbox.h"
#include "query.h"
#include "relinfo.h"
#include "segment.h"
#include "shmem.h"
#include "wakeup.h"
#include "writer.h"

#define PORTAL_NAME "pg_fanout_batch"

#define OUTBOX_NATTS 11

/* What readers select; read_message() takes it apart in this order. */
#define MESSAGE_COLUMNS(most, place) \
	"id, xid, topic_id, message_id, type, key, headers, " \
	"case when octet_length(payload) <= " CppAsString2(most) " then payload end, " \
	"octet_length(payload), queue, created_at, " place

#define MAX_BODY 536870912

StaticAssertDecl(MAX_BODY == BROKER_MAX_BODY, "MAX_BODY is the broker's");

/*
 * Longer payloads are not copied into the batch's cursor, which is materialized
 * before its first row is seen; they are read from the segment with the chunk.
 */
#define MAX_CURSOR_BODY 1000

/*
 * Microseconds that the sequence may lie behind the clock where a session cannot
 * tell whether others draw numbers from it.
 */
#define SEQUENCE_LAG (10 * USECS_PER_SEC)

/* Most rows fetched at once; they are all in memory together. */
#define FETCH_MAX 50

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
	Oid			sequence = relinfo_outbox_sequence();

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
	Relation	rel = table_open(relinfo_topology_change(), RowExclusiveLock);
	Datum		value = FullTransactionIdGetDatum(GetTopFullTransactionId());
	bool		isnull = false;

	CatalogTupleInsert(rel, heap_form_tuple(RelationGetDescr(rel), &value, &isnull));
	table_close(rel, NoLock);
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

static void
read_headers(Message *message, Datum value)
{
	char	   *op;

	message->headers = DatumGetJsonbPCopy(value);
	message->old_key = headers_string(message->headers, "old_key");
	op = headers_string(message->headers, "op");
	message->truncates = (op != NULL && strcmp(op, "t") == 0);
}

/* In the current context. */
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
	message->key = text_or_null(tuple, desc, 6);
	value = SPI_getbinval(tuple, desc, 7, &isnull);
	if (!isnull)
		read_headers(message, value);
	message->payload = text_or_null(tuple, desc, 8);
	message->payload_len = DatumGetInt32(SPI_getbinval(tuple, desc, 9, &isnull));
	message->queue = text_or_null(tuple, desc, 10);
	message->created_at = DatumGetTimestampTz(SPI_getbinval(tuple, desc, 11, &isnull));
	value = SPI_getbinval(tuple, desc, 12, &isnull);
	message->segment = isnull ? -1 : DatumGetInt16(value);
	value = SPI_getbinval(tuple, desc, 13, &isnull);
	if (!isnull)
		message->place = *(ItemPointer) DatumGetPointer(value);
	return message;
}

/* ---- payloads that are not in the cursor ---- */

static bool
is_left_in(const Message *message, int segment)
{
	return message->payload == NULL && message->segment == segment && message->payload_len <= MAX_BODY;
}

/* The rows come in any order. */
static void
take_payload(Message **messages, int n, int row)
{
	bool		isnull;
	int64		id = DatumGetInt64(query_value(row, 1, &isnull));

	for (int i = 0; i < n; i++)
	{
		if (messages[i]->id == id)
			messages[i]->payload = TextDatumGetCString(query_value(row, 2, &isnull));
	}
}

/*
 * By their places in the heap, which stay while nobody rewrites the segment:
 * VACUUM FULL or CLUSTER between two chunks of a batch makes this fail, and the
 * worker begins anew.
 */
static void
read_payloads_in(int segment, Message **messages, int n)
{
	static CachedQuery queries[OUTBOX_SEGMENTS] = {
		{"select id, payload from fanout.outbox_0 where ctid = any ($1)"},
		{"select id, payload from fanout.outbox_1 where ctid = any ($1)"},
		{"select id, payload from fanout.outbox_2 where ctid = any ($1)"}
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
	values[0] = PointerGetDatum(construct_array(places, count, TIDOID, sizeof(ItemPointerData), false, TYPALIGN_SHORT));
	query_execute(&queries[segment], 1, types, values, NULL);
	MemoryContextSwitchTo(context); /* SPI does not come back to it */
	for (uint64 i = 0; i < SPI_processed; i++)
		take_payload(messages, n, i);
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
read_payloads(Message **messages, int n, size_t *bytes)
{
	for (int segment = 0; segment < OUTBOX_SEGMENTS; segment++)
		read_payloads_in(segment, messages, n);
	for (int i = 0; i < n; i++)
	{
		if (messages[i]->payload != NULL)
			*bytes += messages[i]->payload_len;
	}
}

static Chunk *
make_chunk(MemoryContext parent, int limit)
{
	MemoryContext context = AllocSetContextCreate(parent, "pg_fanout chunk", ALLOCSET_DEFAULT_SIZES);
	Chunk	   *chunk = MemoryContextAllocZero(context, sizeof(Chunk));

	chunk->context = context;
	chunk->messages = MemoryContextAlloc(context, limit * sizeof(Message *));
	return chunk;
}

/*
 * Fetches n rows; returns how many there were.  *largest is the largest
 * payload seen.
 */
static int
fetch_rows(Portal portal, Chunk *chunk, int n, size_t *largest)
{
	MemoryContext oldcontext;
	int			fetched;

	SPI_cursor_fetch(portal, true, n);
	fetched = SPI_processed;
	oldcontext = MemoryContextSwitchTo(chunk->context);
	for (int i = 0; i < fetched; i++)
	{
		Message    *message = read_message(SPI_tuptable->vals[i], SPI_tuptable->tupdesc);

		message->chunk = chunk;
		chunk->messages[chunk->count++] = message;
		*largest = Max(*largest, message->payload_len);
	}
	SPI_freetuptable(SPI_tuptable);
	read_payloads(chunk->messages + chunk->count - fetched, fetched, &chunk->bytes);
	MemoryContextSwitchTo(oldcontext);
	return fetched;
}

/*
 * Fills a chunk to its limits of count and bytes; sets chunk->last at the end
 * of the portal.  All rows of one fetch are in memory at once, so it begins
 * with a single one and grows as long as they prove to be small.
 */
static void
fill_chunk(Portal portal, Chunk *chunk, int limit)
{
	int			step = 1;
	size_t		largest = 1;

	while (chunk->count < limit && chunk->bytes < CHUNK_BYTES)
	{
		int			n = Min(step, limit - chunk->count);

		n = Max(1, Min(n, (int) ((CHUNK_BYTES - chunk->bytes) / largest)));
		if (fetch_rows(portal, chunk, n, &largest) < n)
		{
			chunk->last = true;
			return;
		}
		step = Min(step * 4, FETCH_MAX);
	}
}

static Portal
open_batch(const Cursor *cursor)
{
	static CachedQuery query = {
		"select " MESSAGE_COLUMNS(MAX_CURSOR_BODY, "segment, place") " from ("
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

	fill_chunk(portal, chunk, CHUNK_MESSAGES);
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
		ledger_row_missing("rotation");
}

/* Parameters $1 to $10, the columns of a message; xid and uuid as text. */
#define MESSAGE_PARAMS 10

static void
message_params(const Message *message, Oid *types, Datum *values, char *nulls)
{
	static const Oid message_types[MESSAGE_PARAMS] = {
		INT8OID, XID8OID, INT4OID, TEXTOID, TEXTOID, TEXTOID, JSONBOID, TEXTOID, TEXTOID, TIMESTAMPTZOID
	};

	memcpy(types, message_types, sizeof(message_types));
	memset(nulls, ' ', MESSAGE_PARAMS);
	values[0] = Int64GetDatum(message->id);
	values[1] = UInt64GetDatum(message->xid);
	values[2] = Int32GetDatum(message->topic_id);
	values[3] = CStringGetTextDatum(message->message_id);
	values[4] = query_text_param(message->type, &nulls[4]);
	values[5] = query_text_param(message->key, &nulls[5]);
	values[6] = PointerGetDatum(message->headers);
	nulls[6] = (message->headers == NULL) ? 'n' : ' ';
	values[7] = query_text_param(message->payload, &nulls[7]);
	values[8] = query_text_param(message->queue, &nulls[8]);
	values[9] = TimestampTzGetDatum(message->created_at);
}

void
outbox_hold(Message **messages, int count)
{
	static CachedQuery query = {
		"insert into fanout.held (id, xid, topic_id, message_id, type, key, headers, payload, queue, created_at)"
		" values ($1, $2, $3, $4::uuid, $5, $6, $7, $8, $9, $10)"
		" on conflict (id) do nothing"
	};

	for (int i = 0; i < count; i++)
	{
		Oid			types[MESSAGE_PARAMS];
		Datum		values[MESSAGE_PARAMS];
		char		nulls[MESSAGE_PARAMS];

		message_params(messages[i], types, values, nulls);
		query_execute(&query, MESSAGE_PARAMS, types, values, nulls);
	}
}

static void
bury_from_outbox(const Message *message, const char *topic, int attempts)
{
	static CachedQuery query = {
		"insert into fanout.dead_letter (id, topic, message_id, type, key, headers, payload, queue, xid, created_at, reason, attempts)"
		" select id, $3, message_id, type, key, headers, payload, queue, xid, created_at, $4, $5"
		" from fanout.outbox where xid = $1 and id = $2"
		" on conflict (id) where consumer_group is null do nothing"
	};
	Oid			types[5] = {XID8OID, INT8OID, TEXTOID, TEXTOID, INT4OID};
	Datum		values[5] = {
		UInt64GetDatum(message->xid), Int64GetDatum(message->id), CStringGetTextDatum(topic),
		CStringGetTextDatum(message->reason), Int32GetDatum(attempts)
	};

	query_execute(&query, 5, types, values, NULL);
}

static void
bury_from_memory(const Message *message, const char *topic, int attempts)
{
	static CachedQuery query = {
		"insert into fanout.dead_letter (id, xid, message_id, type, key, headers, payload, queue, created_at, topic, reason, attempts)"
		" select $1, $2, $4::uuid, $5, $6, $7, $8, $9, $10, $11, $12, $13"
		" where $3 is not null"
		" on conflict (id) where consumer_group is null do nothing"
	};
	Oid			types[MESSAGE_PARAMS + 3];
	Datum		values[MESSAGE_PARAMS + 3];
	char		nulls[MESSAGE_PARAMS + 3];

	message_params(message, types, values, nulls);
	types[10] = TEXTOID;
	values[10] = query_text_param(topic, &nulls[10]);
	types[11] = TEXTOID;
	values[11] = query_text_param(message->reason, &nulls[11]);
	types[12] = INT4OID;
	values[12] = Int32GetDatum(attempts);
	nulls[12] = ' ';
	query_execute(&query, MESSAGE_PARAMS + 3, types, values, nulls);
}

void
outbox_bury(Message **messages, int count, const char *topic, int attempts)
{
	for (int i = 0; i < count; i++)
	{
		if (messages[i]->payload == NULL)
			bury_from_outbox(messages[i], topic, attempts);
		else
			bury_from_memory(messages[i], topic, attempts);
	}
	(void) outbox_release(messages, count);
}

/* ---- held messages ---- */

Chunk *
outbox_read_held(int32 topic_id, int limit, MemoryContext parent)
{
	static CachedQuery query = {
		"select " MESSAGE_COLUMNS(MAX_BODY, "null::smallint, null::tid") " from fanout.held where topic_id = $1 order by id"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(topic_id)};
	Chunk	   *chunk = make_chunk(parent, limit);
	Portal		portal = SPI_cursor_open(NULL, query_prepare(&query, 1, types, CURSOR_OPT_NO_SCROLL),
										 values, NULL, false);

	fill_chunk(portal, chunk, limit);
	SPI_cursor_close(portal);
	if (chunk->count == 0)
	{
		MemoryContextDelete(chunk->context);
		return NULL;
	}
	return chunk;
}

/*
 * Rows that a transaction is about to purge are passed over: the publisher
 * waits for no user.
 */
bool
outbox_release(Message **messages, int count)
{
	static CachedQuery query = {
		"delete from fanout.held where id in"
		" (select id from fanout.held where id = any ($1) for update skip locked)"
	};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1];
	Datum	   *ids;
	static CachedQuery left = {"select exists (select from fanout.held where id = any ($1))"};
	bool		isnull;

	if (count == 0)
		return true;
	ids = palloc(count * sizeof(Datum));
	for (int i = 0; i < count; i++)
		ids[i] = Int64GetDatum(messages[i]->id);
	values[0] = PointerGetDatum(construct_array(ids, count, INT8OID, sizeof(int64),
												FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	query_execute(&query, 1, types, values, NULL);
	if (SPI_processed == count)
		return true;
	query_execute(&left, 1, types, values, NULL);
	return !DatumGetBool(query_value(0, 1, &isnull));
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
		return 0;
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
	Oid			relid = relinfo_segment(segment);

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

	query_execute(&query, 1, types, values, NULL);
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
	if (!segment_empty(relinfo_segment(current)) &&
		segment_empty(relinfo_segment((current + 1) % OUTBOX_SEGMENTS)) &&
		rotation_due(retention_s))
		current = advance_segment(current);
	return current;
}
