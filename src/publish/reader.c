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
 * While the main cursor cannot go on, because there is no broker, batches are found
 * ahead of it, so that it is known how many messages wait; it reads them as one batch
 * then:
 *
 *		   main cursor's base      ahead.base       ahead.target
 *		---------|---------------------|-----------------|------> snapshots
 *		         |   found, not read   |  being found    |
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
#include "access/transam.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/lwlock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "broker/broker.h"
#include "capture/capture.h"
#include "capture/headers.h"
#include "capture/msgid.h"
#include "publish/ledger.h"
#include "publish/reader.h"
#include "publish/wire.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/tables.h"
#include "server/utf8.h"

/* Rows of fanout.held that are fetched at once; they are all in memory together. */
#define FETCH_MAX 50

/* Message.segment of those in fanout.held */
#define HELD OUTBOX_SEGMENTS

/* ---- batches and cursors ---- */

/* Copies a snapshot into TopMemoryContext. */
Datum
snapshot_keep(Datum snapshot)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	Datum		copy = PointerGetDatum(PG_DETOAST_DATUM_COPY(snapshot));

	MemoryContextSwitchTo(oldcontext);
	return copy;
}

static void
snapshot_replace(Datum *snapshot, Datum by)
{
	Datum		copy = snapshot_keep(by);

	if (*snapshot != (Datum) 0)
		pfree(DatumGetPointer(*snapshot));
	*snapshot = copy;
}

static Batch *
batch_create(const Cursor *cursor, Datum target, uint64 number, const Unread *unread)
{
	Batch	   *batch = MemoryContextAllocZero(TopMemoryContext, sizeof(Batch));

	batch->references = 1;
	batch->number = number;
	batch->base_number = cursor->number;
	batch->base = snapshot_keep(cursor->base);
	batch->target = snapshot_keep(target);
	batch->unread = batch->end_unread = *unread;
	return batch;
}

Batch *
batch_share(Batch *batch)
{
	batch->references++;
	return batch;
}

/* Gives up one reference. */
void
batch_release(Batch *batch)
{
	if (--batch->references > 0)
		return;
	pfree(DatumGetPointer(batch->base));
	pfree(DatumGetPointer(batch->target));
	pfree(batch);
}

/* What was found ahead of the main cursor. */
static struct
{
	bool		on;				/* something was */
	Datum		base;			/* it was, up to here; in TopMemoryContext */
	Datum		target;			/* of the batch that is being found; so is
								 * this */
	Unread		unread;			/* with respect to the main cursor's base, or
								 * to the end of its batch */
	bool		open;
	BatchScan	scan;
}			ahead;

/* Writes where what the main cursor has not read begins, once its batch is read. */
static void
main_unread(Unread *unread)
{
	if (ahead.on)
		*unread = ahead.unread;
	else
		scan_unread(unread);
}

/* There are many topics, and only a few read at once. */
static void
free_entries(Cursor *cursor)
{
	if (cursor->topic_id == 0 || cursor->scan.entries == NULL)
		return;
	pfree(cursor->scan.entries);
	cursor->scan.entries = NULL;
	cursor->scan.room = 0;
}

static void
leave_batch(Cursor *cursor)
{
	if (cursor->batch != NULL)
		batch_release(cursor->batch);
	cursor->batch = NULL;
	cursor->last_id = 0;
	cursor->left_known = false;
}

/*
 * Gives up what was found of the batch, but not the place in it.  A topic's cursor
 * remembers where the rest is.
 */
void
cursor_close(Cursor *cursor)
{
	if (!cursor->open)
		return;
	if (cursor->topic_id != 0 && !cursor->scan.passing)
	{
		scan_left(&cursor->scan, &cursor->left);
		cursor->left_known = true;
	}
	scan_end(&cursor->scan);
	free_entries(cursor);
	cursor->open = false;
}

/*
 * Passes over what the snapshot shows, from now on, as if it were read; 0: nothing
 * more.  Outlives cursor_free().
 */
void
cursor_purge(Cursor *cursor, Datum snapshot)
{
	cursor_close(cursor);
	if (cursor->purged != (Datum) 0)
		pfree(DatumGetPointer(cursor->purged));
	cursor->purged = snapshot != (Datum) 0 ? snapshot_keep(snapshot) : (Datum) 0;
}

/* Frees all that the cursor has; it may be set again. */
void
cursor_free(Cursor *cursor)
{
	cursor_close(cursor);
	leave_batch(cursor);
	if (cursor->base != (Datum) 0)
		pfree(DatumGetPointer(cursor->base));
	cursor->base = (Datum) 0;
	free_entries(cursor);
}

/* Puts a cursor where the ledger says.  The snapshots are copied. */
void
cursor_set(Cursor *cursor, Datum base, Datum target, int64 last_id, const Unread *unread)
{
	cursor_free(cursor);
	cursor->base = snapshot_keep(base);
	cursor->unread = *unread;
	if (!DatumGetBool(DirectFunctionCall2(byteaeq, base, target)))
	{
		cursor->batch = batch_create(cursor, target, 0, unread);
		cursor->last_id = last_id;
	}
}

/* Puts a topic's cursor where the main one is. */
void
cursor_leave(Cursor *cursor, const Cursor *main)
{
	cursor_free(cursor);
	cursor->base = snapshot_keep(main->base);
	cursor->number = main->number;
	if (main->batch == NULL)
	{
		main_unread(&cursor->unread);
		return;
	}
	cursor->unread = main->batch->unread;
	cursor->batch = batch_share(main->batch);
	cursor->last_id = main->last_id;
}

/* Puts a topic's cursor into a batch, behind last_id. */
void
cursor_go_back(Cursor *cursor, Batch *batch, int64 last_id)
{
	batch_share(batch);
	cursor_free(cursor);
	cursor->base = snapshot_keep(batch->base);
	cursor->number = 0;
	cursor->unread = batch->unread;
	cursor->batch = batch;
	cursor->last_id = last_id;
}

/* Goes on from the end of a batch that was read. */
static void
end_batch(Cursor *cursor)
{
	Batch	   *batch = cursor->batch;

	scan_end(&cursor->scan);
	free_entries(cursor);
	cursor->open = false;
	if (cursor->topic_id == 0)
		main_unread(&batch->end_unread);
	snapshot_replace(&cursor->base, batch->target);
	cursor->number = batch->number;
	cursor->unread = batch->end_unread;
	leave_batch(cursor);
}

/* Puts the main cursor where the ledger says; an error if ledger_check() raises one. */
void
reader_load_cursor(Cursor *cursor)
{
	LedgerEntry entry;

	ledger_check();
	ledger_read(&entry);
	cursor_set(cursor, entry.base, entry.target, entry.last_id, &entry.unread);
	cursor->number = 1;
	if (cursor->batch != NULL)
		cursor->batch->number = 2;
	scan_load(&entry.unread);
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
	/* somebody may have added columns */
	static Datum values[MaxTupleAttributeNumber];
	static bool nulls[MaxTupleAttributeNumber];

	heap_deform_tuple(tuple, desc, values, nulls);
	for (int i = 1; i <= OUTBOX_CREATED_AT; i++)
		row->values[i] = nulls[i - 1] ? (Datum) 0 : values[i - 1];
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

/* Returns the queue that a message is for alone, in UTF-8; one that has no such name: "". */
static char *
queue_name(Datum value)
{
	char	   *queue = text_or_null(value);
	const char *utf8;
	size_t		len;

	if (queue == NULL)
		return NULL;
	utf8 = utf8_encode(queue, strlen(queue), &len);
	return utf8 == queue ? queue : pstrdup(utf8 != NULL ? utf8 : "");
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
	message->queue = queue_name(row->values[OUTBOX_QUEUE]);
	message->created_at = DatumGetTimestampTz(row->values[OUTBOX_CREATED_AT]);
	message->headers_len = raw_size(row->values[OUTBOX_KEY]) + raw_size(row->values[OUTBOX_HEADERS]);
	message->payload_len = raw_size(row->values[OUTBOX_PAYLOAD]);
	message->bytes = message_unsendable(message) ? 0 : message->headers_len + message->payload_len;
	return message;
}

/*
 * Has it rows to be compared?  Then all changes that it has seen have to be in the queue
 * before it, those too that the queue has refused at first.
 */
static bool
is_comparison(const Message *message)
{
	return message->type != NULL && strcmp(message->type, COMPARISON_TYPE) == 0;
}

static void
take_headers(Message *message, Datum value)
{
	char	   *op;

	message->headers = DatumGetJsonbPCopy(value);
	message->old_key = headers_string(message->headers, "old_key");
	op = headers_string(message->headers, "op");
	message->barrier = (op != NULL && strcmp(op, "t") == 0) || is_comparison(message);
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

/* ---- runs ---- */

/* Creates an empty run of a batch, or, without one, of fanout.held. */
Run *
run_create(struct Flow *flow, Batch *batch)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "pg_fanout run", ALLOCSET_SMALL_SIZES);
	Run		   *run = MemoryContextAllocZero(context, sizeof(Run));

	run->context = context;
	run->flow = flow;
	run->batch = batch ? batch_share(batch) : NULL;
	run->room = 16;
	run->messages = MemoryContextAlloc(context, run->room * sizeof(Message *));
	return run;
}

/* Frees a run that is in no list any more. */
void
run_free(Run *run)
{
	if (run->batch != NULL)
		batch_release(run->batch);
	MemoryContextDelete(run->context);
}

/*
 * Returns up to where WAL must be on disk before messages of a transaction go out;
 * InvalidXLogRecPtr: it is.
 *
 * A transaction is visible once its commit record is on disk, but for one with
 * synchronous_commit = off, of which clog keeps the record's place: a crash could
 * take it back.  (Flushing all WAL that there is would do, too, at the cost of an
 * fsync for every batch.)  What clog has forgotten is older than a checkpoint.
 */
static XLogRecPtr
commit_lsn(uint64 xid)
{
	FullTransactionId next = ReadNextFullTransactionId();
	uint64		age = U64FromFullTransactionId(next) - xid;
	XLogRecPtr	lsn = InvalidXLogRecPtr;

	LWLockAcquire(XactTruncationLock, LW_SHARED);
	if (age <= XidFromFullTransactionId(next) - pgf_oldest_clog_xid())
		lsn = TransactionIdGetCommitLSN((TransactionId) xid);
	LWLockRelease(XactTruncationLock);
	return lsn;
}

/* Adds a message to a run, and reads its body. */
static void
run_add(Run *run, Message *message, const Row *row)
{
	if (run->count == run->room)
	{
		run->room *= 2;
		run->messages = repalloc(run->messages, run->room * sizeof(Message *));
	}
	if (!message_unsendable(message))
		take_contents(message, row);
	if (run->batch != NULL && (run->count == 0 || run->messages[run->count - 1]->xid != message->xid))
		run->commit_lsn = Max(run->commit_lsn, commit_lsn(message->xid));
	message->run = run;
	run->messages[run->count++] = message;
	run->bytes += message->bytes;
	wire_prepare(message, run->context);
}

/* Is there room for a message?  A first one always fits, however large it is. */
static bool
fits(int count, size_t bytes, const Message *message, RunLimit limit)
{
	return count == 0 || (count < limit.messages && bytes + message->bytes <= limit.bytes);
}

/*
 * Makes a message of a row and adds it to the run, in the run's context, if it fits
 * with what was read before, which is known before its body is read.  Returns false
 * if it does not.  One that is to be passed over always fits.
 */
static bool
add_message(Run *run, HeapTuple tuple, TupleDesc desc, int count, size_t bytes, RunLimit limit,
			int segment, ReaderSkips skips)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(run->context);
	Message    *message;
	Row			row;
	bool		fit;

	take_row(tuple, desc, &row);
	message = make_message(&row);
	message->segment = segment;
	message->place = tuple->t_self;
	if (skips != NULL && skips(run->flow, message))
		fit = true;
	else if ((fit = fits(count, bytes, message, limit)))
		run_add(run, message, &row);
	MemoryContextSwitchTo(oldcontext);
	return fit;
}

/* ---- batches ---- */

/*
 * Finds out which segments may have rows anywhere that are not visible in base.
 */
static void
find_scattered(Datum base, bool *anywhere)
{
	static CachedQuery query = {
		"select coalesce(bit_or(1 << segment), 0) from fanout.scattered"
		" where xid >= pg_snapshot_xmin($1) and not pg_visible_in_snapshot(xid, $1)"
	};
	Oid			types[1] = {PG_SNAPSHOTOID};
	Datum		values[1] = {base};
	bool		isnull;
	int			segments;

	query_execute(&query, 1, types, values, NULL);
	segments = DatumGetInt32(query_value(0, 1, &isnull));
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		anywhere[i] = (segments & (1 << i)) != 0;
}

/* The next batch of the main cursor is what was found ahead of it. */
static void
begin_found(Cursor *cursor, ScanWanted wanted)
{
	bool		anywhere[OUTBOX_SEGMENTS];

	cursor->batch = batch_create(cursor, ahead.base, cursor->number + 1, &ahead.unread);
	scan_open();
	find_scattered(cursor->base, anywhere);
	scan_found(&cursor->scan, cursor->batch->base, cursor->batch->target, cursor->last_id, wanted,
			   &ahead.unread, anywhere);
	scan_close();
	cursor->batch->unread = cursor->batch->end_unread = cursor->scan.unread;
	cursor->open = true;
	ahead.on = false;
}

/*
 * Begins a batch of the main cursor: a new one, or the rest of the one that the
 * ledger was in the midst of.  reader_find() finds its rows.  Not while something is
 * being found ahead.
 */
void
reader_begin_batch(Cursor *cursor, ScanWanted wanted)
{
	bool		anywhere[OUTBOX_SEGMENTS];
	bool		resumed = (cursor->batch != NULL);
	Batch	   *batch;

	if (!resumed && ahead.on)
	{
		begin_found(cursor, wanted);
		return;
	}
	scan_begin();
	PushActiveSnapshot(GetTransactionSnapshot());
	if (!resumed)
		cursor->batch = batch_create(cursor, DirectFunctionCall1(pg_current_snapshot, (Datum) 0),
									 cursor->number + 1, &cursor->unread);
	batch = cursor->batch;
	find_scattered(batch->base, anywhere);
	scan_batch(&cursor->scan, batch->base, batch->target, cursor->last_id, anywhere, wanted, resumed);
	batch->unread = batch->end_unread = cursor->scan.unread;
	PopActiveSnapshot();
	scan_close();
	cursor->open = true;
}

/* Reads at most so many blocks of a batch.  Returns whether its next rows are found. */
bool
reader_find(Cursor *cursor, int blocks)
{
	bool		found;

	scan_open();
	found = scan_step(&cursor->scan, blocks);
	scan_close();
	return found;
}

/* Is the main cursor's next batch one that was found before it? */
bool
reader_is_ahead(void)
{
	return ahead.on;
}

/* Is something being found ahead of the main cursor? */
bool
reader_finds_ahead(void)
{
	return ahead.open;
}

/* Goes on behind what was found ahead, or, of nothing, behind the main cursor's batch. */
static void
begin_ahead(const Cursor *main, ScanWanted found)
{
	bool		anywhere[OUTBOX_SEGMENTS];

	scan_begin();
	PushActiveSnapshot(GetTransactionSnapshot());
	if (!ahead.on)
	{
		scan_unread(&ahead.unread);
		snapshot_replace(&ahead.base, main->batch ? main->batch->target : main->base);
	}
	snapshot_replace(&ahead.target, DirectFunctionCall1(pg_current_snapshot, (Datum) 0));
	find_scattered(ahead.base, anywhere);
	scan_batch(&ahead.scan, ahead.base, ahead.target, 0, anywhere, found, false);
	PopActiveSnapshot();
	scan_close();
	ahead.on = ahead.open = true;
}

/*
 * Finds what was committed behind the main cursor's batch, whose rows must be found, and
 * calls found() for each row, which takes none.  Looks at no more than so many blocks;
 * returns whether it has come to an end.  Inside a transaction.
 */
bool
reader_find_ahead(const Cursor *main, int blocks, ScanWanted found)
{
	bool		ended;

	if (!ahead.open)
		begin_ahead(main, found);
	scan_open();
	ended = scan_step(&ahead.scan, blocks);
	scan_close();
	if (!ended)
		return false;
	scan_end(&ahead.scan);
	snapshot_replace(&ahead.base, ahead.target);
	ahead.open = false;
	return true;
}

/*
 * Fills a chunk, within limit, with the next rows of the main cursor's batch, of topics for which
 * run_for() gives a run; others are passed over.  Sets chunk->ends_batch, and ends
 * the batch then.  Once reader_find() has found them.
 */
void
reader_fill(Cursor *cursor, Chunk *chunk, RunLimit limit, Run *(*run_for) (Chunk *chunk, int32 topic_id))
{
	BatchScan  *scan = &cursor->scan;
	XLogRecPtr	upto = InvalidXLogRecPtr;
	const Entry *entry;

	scan_open();
	scan_check(scan);
	while ((entry = scan_next(scan)) != NULL)
	{
		Run		   *run = run_for(chunk, entry->topic_id);

		if (run != NULL)
		{
			TupleDesc	desc;
			HeapTuple	tuple;
			size_t		bytes = run->bytes;
			bool		fit;

			if (chunk->count >= limit.messages)
				break;
			tuple = scan_fetch(entry, &desc);
			fit = add_message(run, tuple, desc, chunk->count, chunk->bytes, limit,
							  entry->segment, NULL);
			heap_freetuple(tuple);
			if (!fit)
				break;
			chunk->count++;
			chunk->bytes += run->bytes - bytes;
			upto = Max(upto, run->commit_lsn);
		}
		cursor->last_id = entry->id;
		scan->next++;
	}
	scan_close();
	chunk->last_id = cursor->last_id;
	chunk->batch = batch_share(cursor->batch);
	chunk->ends_batch = (entry == NULL && !scan->passing);
	if (chunk->ends_batch)
		end_batch(cursor);
	XLogFlush(upto);
}

/* ---- batches of a topic ---- */

/* Begins a batch up to the main cursor's base, or goes on with one. */
static void
open_topic_batch(Cursor *cursor, const Cursor *main)
{
	bool		anywhere[OUTBOX_SEGMENTS];
	Batch	   *batch = cursor->batch;

	if (batch == NULL)
	{
		batch = cursor->batch = batch_create(cursor, main->base, main->number, &cursor->unread);
		if (main->batch != NULL)
			batch->end_unread = main->batch->unread;
		else
			main_unread(&batch->end_unread);
		cursor->last_id = 0;
		cursor->left_known = false;
	}
	find_scattered(batch->base, anywhere);
	scan_topic(&cursor->scan, batch->base, batch->target, cursor->last_id, cursor->topic_id,
			   cursor->left_known ? &cursor->left : &batch->unread, anywhere, cursor->purged);
	cursor->open = true;
}

/* Fills a run with the rows that were found; a batch that is read is ended. */
static void
fill_run(Cursor *cursor, Run *run, RunLimit limit, ReaderSkips skips)
{
	BatchScan  *scan = &cursor->scan;
	const Entry *entry;

	while ((entry = scan_next(scan)) != NULL)
	{
		TupleDesc	desc;
		HeapTuple	tuple = scan_fetch(entry, &desc);
		bool		fit = add_message(run, tuple, desc, run->count, run->bytes, limit,
									  entry->segment, skips);

		heap_freetuple(tuple);
		if (!fit)
			break;
		cursor->last_id = entry->id;
		scan->next++;
	}
	run->ends_batch = (entry == NULL && !scan->passing);
}

/*
 * Reads the next messages of a topic that has left the main cursor, within limit,
 * and no further than to the main cursor's base.  Looks at no more than so many
 * blocks, and may find nothing therefore (cursor->open then).  Returns NULL if there
 * are none.
 */
Run *
reader_read_topic(Cursor *cursor, const Cursor *main, struct Flow *flow, RunLimit limit, int blocks,
				  ReaderSkips skips)
{
	Run		   *run = NULL;

	scan_open();
	if (cursor->open && scan_moved(&cursor->scan))
		cursor_close(cursor);
	if (!cursor->open)
		open_topic_batch(cursor, main);
	if (scan_step(&cursor->scan, blocks))
	{
		run = run_create(flow, cursor->batch);
		fill_run(cursor, run, limit, skips);
		if (run->ends_batch)
			end_batch(cursor);
	}
	scan_close();
	if (run != NULL && run->count == 0)
	{
		run_free(run);
		run = NULL;
	}
	if (run != NULL)
		XLogFlush(run->commit_lsn);
	return run;
}

/* Is the main cursor in the midst of finding rows, or is that still to come? */
bool
reader_is_finding(const Cursor *main)
{
	return ahead.open ||
		(main->batch != NULL && (!main->open || (main->scan.passing && !main->scan.again)));
}

/* Returns a pg_snapshot of what was found, or is being found; it lasts until the next step. */
static Datum
found_upto(const Cursor *main)
{
	if (ahead.on)
		return ahead.open ? ahead.target : ahead.base;
	return main->batch ? main->batch->target : main->base;
}

/*
 * Begins to call found(), which takes none, for each row from unread on up to what the
 * main cursor, or reader_find_ahead(), has found or is finding.  scan->target is that
 * snapshot, in TopMemoryContext, until reader_end_count().  Inside a transaction.
 */
void
reader_begin_count(BatchScan *scan, const Cursor *main, const Unread *unread, ScanWanted found)
{
	static Datum nothing = (Datum) 0;
	bool		anywhere[OUTBOX_SEGMENTS];

	if (nothing == (Datum) 0)
		nothing = snapshot_keep(DirectFunctionCall1(pg_snapshot_in, CStringGetDatum("1:1:")));
	find_scattered(nothing, anywhere);
	scan_open();
	scan_found(scan, nothing, snapshot_keep(found_upto(main)), 0, found, unread, anywhere);
	scan_close();
}

/*
 * Goes on with that, by at most so many blocks.  Returns whether it has come to an end.
 * *moved: a segment is stored in another file now, so it has to be begun anew.
 */
bool
reader_count(BatchScan *scan, int blocks, bool *moved)
{
	bool		ended = false;

	scan_open();
	*moved = scan_moved(scan);
	if (!*moved)
		ended = scan_step(scan, blocks);
	scan_close();
	return ended;
}

void
reader_end_count(BatchScan *scan)
{
	scan_end(scan);
	pfree(DatumGetPointer(scan->target));
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

/* The publisher does not know the name of a topic that was dropped before it started. */
#define BURY "insert into fanout.dead_letter (id, topic, " CONTENTS ", reason, attempts)" \
	" select id, coalesce((select d.topic from fanout.dropped_topic d where d.topic_id = o.topic_id), $3)," \
	" " CONTENTS ", $4, $5 from "

static void
bury_from_outbox(const Message *message, Oid *types, Datum *values)
{
#define BURY_FROM(segment) BURY "fanout.outbox_" #segment " o where ctid = $2 and id = $1"
	static CachedQuery queries[OUTBOX_SEGMENTS] = {{BURY_FROM(0)}, {BURY_FROM(1)}, {BURY_FROM(2)}};

	query_change(&queries[message->segment], 5, types, values, NULL, 1);
}

static void
bury_from_held(Oid *types, Datum *values)
{
	static CachedQuery query = {
		"with moved as (delete from fanout.held where id = $1 returning *) "
		BURY "moved o"
	};

	query_change(&query, 5, types, values, NULL, 1);
}

/*
 * Makes a dead letter of a message, for its reason.  One that was held must be locked
 * (reader_lock_held()).  Raises an error if it is not one afterwards.
 */
void
reader_bury(const Message *message, const char *topic)
{
	Oid			types[5] = {INT8OID, TIDOID, TEXTOID, TEXTOID, INT4OID};
	Datum		values[5] = {
		Int64GetDatum(message->id), PointerGetDatum(&message->place), CStringGetTextDatum(topic),
		CStringGetTextDatum(message->reason), Int32GetDatum(message->attempts)
	};

	if (message->segment == HELD)
		bury_from_held(types, values);
	else
		bury_from_outbox(message, types, values);
}

/* ---- held messages ---- */

/* Fills a run from a portal; returns whether that is at its end. */
static bool
fill_held_run(Portal portal, Run *run, RunLimit limit)
{
	while (true)
	{
		SPITupleTable *fetched;
		uint64		n;
		bool		full = false;

		SPI_cursor_fetch(portal, true, FETCH_MAX);
		fetched = SPI_tuptable;
		n = SPI_processed;
		for (uint64 i = 0; i < n && !full; i++)
			full = !add_message(run, fetched->vals[i], fetched->tupdesc, run->count, run->bytes, limit,
								HELD, NULL);
		SPI_freetuptable(fetched);
		if (full || n < FETCH_MAX)
			return !full;
	}
}

/*
 * Returns the next messages held for a topic, in order, within limit; NULL if
 * there are none.  *last: there are no more behind them.
 */
Run *
reader_read_held(struct Flow *flow, int32 topic_id, int64 after_id, RunLimit limit, bool *last)
{
	static CachedQuery query = {
		"select null::smallint, null::oid, id, xid, topic_id, message_id, type, key, headers, payload, queue, created_at"
		" from fanout.held where topic_id = $1 and id > $2 order by id"
	};
	Oid			types[2] = {INT4OID, INT8OID};
	Datum		values[2] = {Int32GetDatum(topic_id), Int64GetDatum(after_id)};
	Run		   *run = run_create(flow, NULL);
	Portal		portal = SPI_cursor_open(NULL, query_prepare(&query, 2, types, CURSOR_OPT_NO_SCROLL),
										 values, NULL, false);

	*last = fill_held_run(portal, run, limit);
	SPI_cursor_close(portal);
	if (run->count > 0)
		return run;
	run_free(run);
	return NULL;
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
 * Leaves of messages those whose ids are the rows of the result; both are in order of
 * ids.  Returns how many.
 */
static int
keep_found(Message **messages, int n)
{
	int			kept = 0;
	bool		isnull;

	for (int i = 0; i < n && kept < SPI_processed; i++)
	{
		if (messages[i]->id == DatumGetInt64(query_value(kept, 1, &isnull)))
			messages[kept++] = messages[i];
	}
	return kept;
}

/*
 * Locks held messages, which are in order of ids, so that nothing that is done to them
 * can fail to find them.  Leaves those that are there in the array, *n of them: others
 * somebody has purged.  Returns false if a transaction has locked any, and may purge
 * it, because the publisher waits for no user.
 */
bool
reader_lock_held(Message **messages, int *n)
{
	static CachedQuery lock = {"select id from fanout.held where id = any ($1) order by id for update skip locked"};
	static CachedQuery all = {"select from fanout.held where id = any ($1)"};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1] = {ids_of(messages, *n)};
	int			locked;

	if (*n == 0)
		return true;
	query_execute(&lock, 1, types, values, NULL);
	locked = keep_found(messages, *n);
	if (locked < *n)
	{
		query_execute(&all, 1, types, values, NULL);
		if (SPI_processed != locked)
			return false;
	}
	*n = locked;
	return true;
}

/* Removes held messages that were sent, and are locked (reader_lock_held()). */
void
reader_release(Message **messages, int n)
{
	static CachedQuery query = {"delete from fanout.held where id = any ($1)"};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1] = {ids_of(messages, n)};

	if (n > 0)
		query_change(&query, 1, types, values, NULL, n);
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
