/*-------------------------------------------------------------------------
 *
 * guard.c
 *		The triggers that keep foreign rows out of pg_fanout's own tables.
 *
 * What these tables say is true of one server only: snapshots and transaction
 * ids mean nothing elsewhere.  Logical replication would bring them all the
 * same, by a publication FOR ALL TABLES or TABLES IN SCHEMA.  There are two
 * walls.
 *
 * The outer one is an event trigger in the install script: it takes the tables
 * out of every subscription as soon as that is made or refreshed.  The workers
 * of a subscription neither copy nor change a table that is not in it.
 *
 * The inner one is here, for a subscription that was made while event triggers
 * were off.  Every table has two triggers, enabled always:
 *
 *		pg_fanout_guard				before each row
 *		pg_fanout_guard_truncate	before TRUNCATE
 *
 * Scenarios:
 *
 * - An apply worker or a table synchronization worker inserts, updates or
 *	 deletes a row: the row is passed over, and the worker goes on.
 *
 * - It truncates a table: nothing can pass that over.  An empty table is left
 *	 to it; otherwise it is an error, and the worker stops, because messages
 *	 would be lost.
 *
 * - A user's trigger that such a worker fires calls functions of pg_fanout: what
 *	 they write is this server's own.  It is told by the depth of triggers.
 *
 * - Somebody inserts into the outbox by hand, or updates a row there: allowed if the
 *	 row carries the transaction that does it.  With another one it would never be
 *	 sent, or count as sent.  The publisher is told that such a row may be anywhere
 *	 (fanout.scattered).
 *
 * - Somebody deletes rows of the outbox by hand: they are gone.  The publisher is told,
 *	 since VACUUM may cut off their blocks, and then others may be written there; and
 *	 because it has counted them.
 *
 * The outbox, the ledger and the inbox are written without the executor (see
 * segment.c), so these triggers cost nothing there.
 *
 * Nothing here reads a table, or takes a lock but for fanout.scattered.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "replication/logicalworker.h"
#include "storage/bufmgr.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"
#include "utils/xid8.h"

#include "server/guard.h"
#include "server/segment.h"
#include "server/tables.h"
#include "server/wakeup.h"

PG_FUNCTION_INFO_V1(pgf_guard);

/* The depth of triggers counts the one that asks. */
bool
guard_is_replicated(void)
{
	return IsLogicalWorker() &&
		DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0)) == 1;
}

/* The publisher finds out at once that rows are gone. */
static void
check_truncate(Relation rel)
{
	if (guard_is_replicated() && RelationGetNumberOfBlocks(rel) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("logical replication cannot truncate table \"fanout.%s\"", RelationGetRelationName(rel)),
				 errdetail("It has rows of this server, which no other server may remove."),
				 errhint("Enable event triggers, then use ALTER SUBSCRIPTION ... REFRESH PUBLICATION, which takes the tables of pg_fanout out of the subscription.")));
	wakeup_removed_at_commit();
}

/*
 * Raises an error unless the row carries the transaction that writes it.  column is
 * the column that says so.
 */
static void
check_transaction(TriggerData *trigdata, HeapTuple row, const char *column)
{
	TupleDesc	desc = RelationGetDescr(trigdata->tg_relation);
	FullTransactionId xid = InvalidFullTransactionId;

	for (int i = 0; i < desc->natts; i++)
	{
		bool		isnull;
		Datum		value;

		if (strcmp(NameStr(TupleDescAttr(desc, i)->attname), column) != 0)
			continue;
		value = heap_getattr(row, i + 1, desc, &isnull);
		if (!isnull)
			xid = DatumGetFullTransactionId(value);
	}
	if (!FullTransactionIdEquals(xid, GetTopFullTransactionId()))
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("row for table \"fanout.%s\" is not of this transaction",
						RelationGetRelationName(trigdata->tg_relation)),
				 errdetail("Its \"%s\" is " UINT64_FORMAT ", and the transaction is " UINT64_FORMAT ".", column,
						   U64FromFullTransactionId(xid), U64FromFullTransactionId(GetTopFullTransactionId())),
				 errhint("Use fanout.publish() to write a message.")));
}

/*
 * A row that INSERT or UPDATE brings goes wherever there is room, and where UPDATE or
 * DELETE have removed rows from the end, the segment may become shorter.
 */
static void
note_place(Relation rel)
{
	for (int segment = 0; segment < OUTBOX_SEGMENTS; segment++)
	{
		if (RelationGetRelid(rel) == tables_segment(segment))
			segment_scattered(segment);
	}
}

/* Returns the row as it was, or NULL: it is passed over. */
static HeapTuple
check_row(TriggerData *trigdata)
{
	HeapTuple	row = TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event) ?
		trigdata->tg_newtuple : trigdata->tg_trigtuple;

	if (guard_is_replicated())
		return NULL;
	if (trigdata->tg_trigger->tgnargs > 0)
	{
		if (TRIGGER_FIRED_BY_DELETE(trigdata->tg_event))
			wakeup_removed_at_commit();
		else
			check_transaction(trigdata, row, trigdata->tg_trigger->tgargs[0]);
		note_place(trigdata->tg_relation);
	}
	return row;
}

/*
 * The trigger function fanout.guard([column]).  column names the column of a
 * row that has to be the transaction that inserts or updates it.
 */
Datum
pgf_guard(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trigdata->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"fanout.guard\" must be called before a change, as a trigger")));
	if (TRIGGER_FIRED_FOR_ROW(trigdata->tg_event))
		return PointerGetDatum(check_row(trigdata));
	if (TRIGGER_FIRED_BY_TRUNCATE(trigdata->tg_event))
		check_truncate(trigdata->tg_relation);
	return PointerGetDatum(NULL);
}
