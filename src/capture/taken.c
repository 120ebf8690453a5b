/*-------------------------------------------------------------------------
 *
 * taken.c
 *		Keys that a row leaves when another row has them already.
 *
 * Where the unique index of a key is deferrable, two rows may have the key for a
 * while within a transaction.  The message of the row that leaves it then comes
 * after the one of the row that stays, and a consumer that follows messages by
 * key would end without a row.  So when a message says that a row has left a key,
 * that index is searched for another row, and the message of that one is written
 * behind it, as it is by then:
 *
 *		row A has key 5			(of another transaction)
 *		insert B with key 5		c, key 5: B
 *		delete A				d, key 5, taken
 *								r, key 5: B
 *
 * The id of the second message is drawn after the search.  So it is higher than
 * those of all changes that the row has in it; a change that comes later gets a
 * higher one; and of the messages that say that a row has left a key, the last one
 * is written when at most one row is there.
 *
 * Scenarios:
 *
 * - Rows change places in one statement: its triggers fire when all of them
 *	 have been changed, so each finds the row that has its key by then.
 *
 * - The new row goes, and the old one stays: the old one is found.
 *
 * - The other row is not among those that the capture's "where" chooses: for
 *	 consumers there is none, and the key is not taken.
 *
 * - The row itself is back at its key by a later statement that has fired first:
 *	 it is found, and sent once more.
 *
 * - Keys that are equal and look different, as 1.0 and 1.00: these are two keys.
 *
 * - The key has a unique index that is not deferrable, or none at all: cache.c has
 *	 found no index, and nothing is searched.
 *
 * It must never wait for anybody, nor find a row of a transaction that is still
 * running: nobody knows what becomes of it.  (Rows of two transactions that have
 * the same key have no order that could be kept.)
 *
 * Locks: ACCESS SHARE on the index, for the time of a search.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/stratnum.h"
#include "access/tableam.h"
#include "executor/executor.h"
#include "nodes/primnodes.h"
#include "optimizer/optimizer.h"
#include "rewrite/rewriteManip.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

#include "capture/key.h"
#include "capture/taken.h"
#include "server/compat.h"

/*
 * Makes the keys of a search for what conflicts with a row; false: nothing does,
 * since NULLs are distinct.
 */
static bool
make_scan_keys(Relation rel, Relation index, HeapTuple row, ScanKey keys)
{
	Oid		   *operators;
	Oid		   *procedures = NULL;
	uint16	   *strategies = NULL;

	if (index->rd_index->indisexclusion)	/* WITHOUT OVERLAPS */
		RelationGetExclusionInfo(index, &operators, &procedures, &strategies);
	for (int i = 0; i < index->rd_index->indnkeyatts; i++)
	{
		Oid			type = index->rd_opcintype[i];
		bool		isnull;
		Datum		value = heap_getattr(row, index->rd_index->indkey.values[i], RelationGetDescr(rel), &isnull);

		if (isnull && !pgf_nulls_not_distinct(index))
			return false;
		ScanKeyEntryInitialize(&keys[i], isnull ? SK_ISNULL | SK_SEARCHNULL : 0, i + 1,
							   strategies != NULL ? strategies[i] : BTEqualStrategyNumber,
							   InvalidOid, index->rd_indcollation[i],
							   procedures != NULL ? procedures[i] :
							   get_opcode(get_opfamily_member(index->rd_opfamily[i], type, type, BTEqualStrategyNumber)),
							   value);
	}
	return true;
}

/* Tells whether the capture sends a row. */
static bool
meets_filter(const CaptureInfo *info, Relation rel, TupleTableSlot *slot)
{
	ExprContext *context;
	Node	   *filter;
	ExprState  *state;
	Datum		result;
	bool		isnull;

	if (info->filter == NULL)
		return true;
	filter = stringToNode(info->filter);
	filter = pgf_expand_generated(filter, rel, PRS2_OLD_VARNO);
	filter = pgf_expand_generated(filter, rel, PRS2_NEW_VARNO);
	ChangeVarNodes(filter, PRS2_OLD_VARNO, INNER_VAR, 0);
	ChangeVarNodes(filter, PRS2_NEW_VARNO, INNER_VAR, 0);
	state = ExecInitExpr(expression_planner((Expr *) filter), NULL);
	context = CreateStandaloneExprContext();
	context->ecxt_innertuple = slot;
	result = ExecEvalExprSwitchContext(state, context, &isnull);
	FreeExprContext(context, true);
	return !isnull && DatumGetBool(result);
}

/* Tells whether consumers have a row by that key. */
static bool
is_known_by(const CaptureInfo *info, Relation rel, TupleTableSlot *slot, const char *key)
{
	HeapTuple	row = ExecFetchSlotHeapTuple(slot, false, NULL);
	char	   *other = key_render(info, row, RelationGetDescr(rel));

	return other != NULL && strcmp(other, key) == 0 && meets_filter(info, rel, slot);
}

/*
 * taken_find
 *		Returns a row that has the key which another one has left, in the current
 *		context; NULL: there is none.
 *
 * info: of a capture that has a key_index; left: the row as it was, in rel, whose trigger fires.  The caller draws the id of
 * the message of the row that is found before anything else runs.  Raises errors of
 * the capture's "where" and of types' functions.
 */
HeapTuple
taken_find(const CaptureInfo *info, Relation rel, HeapTuple left)
{
	char	   *key = key_render(info, left, RelationGetDescr(rel));
	Relation	index;
	ScanKeyData keys[INDEX_MAX_KEYS];
	HeapTuple	found = NULL;

	if (key == NULL)
		return NULL;
	index = index_open(info->key_index, AccessShareLock);
	if (make_scan_keys(rel, index, left, keys))
	{
		TupleTableSlot *slot = table_slot_create(rel, NULL);
		IndexScanDesc scan = pgf_index_beginscan(rel, index, SnapshotSelf, index->rd_index->indnkeyatts);

		index_rescan(scan, keys, index->rd_index->indnkeyatts, NULL, 0);
		while (found == NULL && index_getnext_slot(scan, ForwardScanDirection, slot))
		{
			if (is_known_by(info, rel, slot, key))
				found = ExecCopySlotHeapTuple(slot);
		}
		index_endscan(scan);
		ExecDropSingleTupleTableSlot(slot);
	}
	index_close(index, AccessShareLock);
	return found;
}
