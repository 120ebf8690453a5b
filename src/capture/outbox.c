/*-------------------------------------------------------------------------
 *
 * outbox.c
 *		Writing the outbox, in the application's transaction.
 *
 * Ids come from one sequence.  Of two transactions that change the same row, the
 * later one draws the higher id, because it waits for the row's lock first.  Ids
 * never go back, not even after a restore: see follow_clock().
 *
 * Must never: check rights, read a table of ours, or wait for anything but the
 * moments that follow_clock() takes.
 *
 * Locks: ROW EXCLUSIVE on a segment until the transaction ends, so that rotation,
 * which takes ACCESS EXCLUSIVE without waiting, never meets a row that is still
 * undecided.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "commands/sequence.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "utils/xid8.h"

#include "capture/outbox.h"
#include "capture/writer.h"
#include "server/segment.h"
#include "server/shmem.h"
#include "server/tables.h"
#include "server/wakeup.h"

#define OUTBOX_NATTS 12

/*
 * Microseconds that the sequence may lie behind the clock where a session cannot
 * tell whether others draw numbers from it.
 */
#define SEQUENCE_LAG (10 * USECS_PER_SEC)

/* ---- ids ---- */

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

/* Draws the next number of the sequence, which never goes back. */
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

/* ---- rows ---- */

/* Columns of fanout.outbox, made once per session. */
TupleDesc
outbox_descriptor(void)
{
	static const Oid types[OUTBOX_NATTS] = {
		INT2OID, OIDOID, INT8OID, XID8OID, INT4OID, UUIDOID, TEXTOID,
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

/* The row's columns; texts are made in the current context. */
static void
fill_row(const OutboxRow *row, int segment, Datum *values, bool *nulls)
{
	memset(nulls, false, OUTBOX_NATTS * sizeof(bool));
	values[0] = Int16GetDatum(segment);
	values[1] = ObjectIdGetDatum(MyDatabaseId);
	values[2] = Int64GetDatum(row->id);
	values[3] = FullTransactionIdGetDatum(GetTopFullTransactionId());
	values[4] = Int32GetDatum(row->topic_id);
	values[5] = UUIDPGetDatum(&row->message_id);
	values[6] = row->type ? CStringGetTextDatum(row->type) : (Datum) 0;
	nulls[6] = (row->type == NULL);
	values[7] = row->key ? CStringGetTextDatum(row->key) : (Datum) 0;
	nulls[7] = (row->key == NULL);
	values[8] = PointerGetDatum(row->headers);
	nulls[8] = (row->headers == NULL);
	values[9] = PointerGetDatum(cstring_to_text_with_len(row->payload, row->payload_len));
	values[10] = row->queue ? CStringGetTextDatum(row->queue) : (Datum) 0;
	nulls[10] = (row->queue == NULL);
	values[11] = TimestampTzGetDatum(row->created_at);
}

/*
 * Writes one message into the current segment, at once or at the latest when the
 * statement ends, and arranges for the publisher to be woken at commit.  Checks
 * no rights: the caller has decided.
 */
void
outbox_insert(const OutboxRow *row, bool at_once)
{
	DatabaseSlot *slot = shmem_my_slot();
	int			segment = slot ? pg_atomic_read_u32(&slot->current_segment) : 0;
	Datum		values[OUTBOX_NATTS];
	bool		nulls[OUTBOX_NATTS];

	fill_row(row, segment, values, nulls);
	if (at_once)
		writer_insert(segment, outbox_descriptor(), values, nulls);
	else
		writer_queue(segment, outbox_descriptor(), values, nulls);
	wakeup_publisher_at_commit();
}

/* Records that the current transaction changed topics or bindings. */
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
