/*-------------------------------------------------------------------------
 *
 * floor.c
 *		Triggers that write a row for each row, and nothing else.
 *
 * The limit of capture, as bare.c is that of publishing: the row is as large
 * as a message's and goes where a message's would go, behind all others; its
 * contents are made up.  Nothing is looked at, rendered or remembered.  The rows of a
 * statement are put into the heap a hundred or so at a time, the rest by the
 * trigger at its end.
 *
 *	floor_row()			after each row; argument: bytes of the payload
 *	floor_statement()	after each statement
 *
 * The table is public.message (id bigint, payload text), without an index, as the
 * outbox is.  One benchmark, one statement at a time: an error leaves rows behind.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "commands/trigger.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(floor_row);
PG_FUNCTION_INFO_V1(floor_statement);

#define MAX_ROWS 128

static int64 next_id = 0;
static Datum payload = (Datum) 0;
static int	nrows = 0;

static void
insert_several(Relation rel, HeapTuple *rows)
{
	TupleTableSlot **slots = palloc(nrows * sizeof(TupleTableSlot *));

	for (int i = 0; i < nrows; i++)
	{
		slots[i] = MakeTupleTableSlot(RelationGetDescr(rel), &TTSOpsHeapTuple);
		ExecStoreHeapTuple(rows[i], slots[i], true);
	}
	heap_multi_insert(rel, slots, nrows, GetCurrentCommandId(true), HEAP_INSERT_SKIP_FSM, NULL);
	for (int i = 0; i < nrows; i++)
		ExecDropSingleTupleTableSlot(slots[i]);
}

static void
insert_rows(void)
{
	Relation	rel = table_open(RelnameGetRelid("message"), RowExclusiveLock);
	bool		nulls[2] = {false, false};
	HeapTuple	rows[MAX_ROWS];

	for (int i = 0; i < nrows; i++)
	{
		Datum		values[2] = {Int64GetDatum(next_id++), payload};

		rows[i] = heap_form_tuple(RelationGetDescr(rel), values, nulls);
	}
	RelationSetTargetBlock(rel, InvalidBlockNumber);
	if (nrows == 1)
		heap_insert(rel, rows[0], GetCurrentCommandId(true), HEAP_INSERT_SKIP_FSM, NULL);
	else
		insert_several(rel, rows);
	nrows = 0;
	table_close(rel, NoLock);
}

static void
make_payload(int size)
{
	text	   *bytes = MemoryContextAlloc(TopMemoryContext, VARHDRSZ + size);

	SET_VARSIZE(bytes, VARHDRSZ + size);
	memset(VARDATA(bytes), 'x', size);
	payload = PointerGetDatum(bytes);
}

Datum
floor_row(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (payload == (Datum) 0)
		make_payload(pg_strtoint32(trigger->tg_trigger->tgargs[0]));
	if (++nrows == MAX_ROWS)
		insert_rows();
	return PointerGetDatum(NULL);
}

Datum
floor_statement(PG_FUNCTION_ARGS)
{
	if (nrows > 0)
		insert_rows();
	return PointerGetDatum(NULL);
}
