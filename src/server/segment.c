/*-------------------------------------------------------------------------
 *
 * segment.c
 *		Tables in a ring of segments: outbox, ledger, inbox.
 *
 * All three are insert-only.  Rows go to the current segment; what is too old
 * goes a segment at a time, by TRUNCATE, which leaves no dead tuples.  Which
 * one that is, and when, is the affair of whoever owns the table.
 *
 * As the install script makes them, they are heaps with B-trees and unique
 * constraints, and their only trigger is the guard, which need not see what
 * pg_fanout writes itself.  So rows are put straight into heap and indexes, as
 * the server does with its catalogs, but for what it looks up for each of these
 * anew.  If a superuser has added anything else (another kind of index, an
 * expression, a predicate, a constraint, a trigger, another access method),
 * rows are inserted as by INSERT, with the rights of whoever writes.  Policies
 * are passed over, as they are for the owner.
 *
 * Must never: write a row that an index, a constraint or a trigger does not get
 * to see, or pass over one that a trigger kept away.
 *
 * Locks: whoever reads or writes a segment keeps a lock on it until its
 * transaction ends.  Emptying takes ACCESS EXCLUSIVE only if nobody has any.
 * Looking at a segment waits for whoever has that: VACUUM FULL, CLUSTER.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/tableam.h"
#include "catalog/namespace.h"
#include "catalog/pg_am.h"
#include "catalog/pg_type.h"
#include "catalog/pg_index.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "nodes/execnodes.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/xid8.h"

#include "server/insertion.h"
#include "server/segment.h"
#include "server/tables.h"

#define GUARD "pg_fanout_guard"

Oid
segment_oid(const char *table, int segment)
{
	char		name[NAMEDATALEN];

	snprintf(name, sizeof(name), "%s_%d", table, segment);
	return get_relname_relid(name, get_namespace_oid("fanout", false));
}

bool
segment_empty(Oid segment)
{
	Relation	rel = table_open(segment, AccessShareLock);
	bool		empty = (RelationGetNumberOfBlocks(rel) == 0);

	table_close(rel, AccessShareLock);
	return empty;
}

/* ---- inserting ---- */

/*
 * The rows were formed for a table as the install script makes it.  One that
 * lacks a column, or has another type there, would be filled with garbage.
 */
void
segment_check_columns(Relation rel, TupleDesc desc)
{
	TupleDesc	actual = RelationGetDescr(rel);

	if (rel->rd_rel->relkind != RELKIND_RELATION)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"fanout.%s\" is not a table", RelationGetRelationName(rel)),
				 errhint("Create the extension again.")));
	for (int i = 0; i < desc->natts; i++)
	{
		if (i >= actual->natts || TupleDescAttr(actual, i)->attisdropped ||
			TupleDescAttr(actual, i)->atttypid != TupleDescAttr(desc, i)->atttypid)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("columns of table \"fanout.%s\" were altered", RelationGetRelationName(rel)),
					 errhint("Give column %d its type back, or create the extension again.", i + 1)));
	}
}

/* Is it the trigger that keeps away what others write?  What we write it need not see. */
static bool
is_guard(const Trigger *trigger)
{
	return strcmp(trigger->tgname, GUARD) == 0;
}

static bool
is_plain_table(Relation rel)
{
	TupleConstr *constr = RelationGetDescr(rel)->constr;
	TriggerDesc *triggers = rel->trigdesc;

	if (rel->rd_rel->relam != HEAP_TABLE_AM_OID || rel->rd_rel->relpersistence != RELPERSISTENCE_PERMANENT ||
		(constr != NULL && (constr->num_check > 0 || constr->has_generated_stored)))
		return false;
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		if (TRIGGER_FOR_INSERT(triggers->triggers[i].tgtype) && !is_guard(&triggers->triggers[i]))
			return false;
	}
	return true;
}

/*
 * Has a column been made NOT NULL for which a row has no value?  Most rows of the
 * outbox have NULLs somewhere, and captured rows are many: their bitmaps tell.
 */
static bool
lacks_value(Relation rel, HeapTuple *rows, int n)
{
	TupleDesc	desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		if (!TupleDescAttr(desc, i)->attnotnull)
			continue;
		for (int r = 0; r < n; r++)
		{
			HeapTupleHeader row = rows[r]->t_data;

			if (i >= HeapTupleHeaderGetNatts(row) ? !TupleDescAttr(desc, i)->atthasmissing :
				(HeapTupleHasNulls(rows[r]) && att_isnull(i, row->t_bits)))
				return true;
		}
	}
	return false;
}

bool
segment_is_plain_index(Relation index)
{
	return index->rd_rel->relam == BTREE_AM_OID &&
		index->rd_index->indimmediate && !index->rd_index->indisexclusion &&
		heap_attisnull(index->rd_indextuple, Anum_pg_index_indexprs, NULL) &&
		heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL);
}

/* ---- the fast way: a plain table and plain indexes ---- */

/* options: HEAP_INSERT_xxx */
static void
insert_heap(Relation rel, TupleDesc desc, HeapTuple *rows, int n, int options)
{
	TupleTableSlot **slots;

	if (n == 1)
	{
		heap_insert(rel, rows[0], GetCurrentCommandId(true), options, NULL);
		return;
	}
	/* slots that own their rows: others would be copied */
	slots = palloc(n * sizeof(TupleTableSlot *));
	for (int i = 0; i < n; i++)
	{
		slots[i] = MakeTupleTableSlot(desc, &TTSOpsHeapTuple);
		ExecStoreHeapTuple(rows[i], slots[i], true);
	}
	heap_multi_insert(rel, slots, n, GetCurrentCommandId(true), options, NULL);
}

/*
 * Inserts rows into the block that is the last one of the table by then, or into
 * new ones: never into one that this session used before, nor into one that has
 * room again.  The reader relies on that (insertion.c).
 */
static void
append_heap(Relation rel, int number, TupleDesc desc, HeapTuple *rows, int n)
{
	insertion_begin(rel, number);
	RelationSetTargetBlock(rel, InvalidBlockNumber);
	insert_heap(rel, desc, rows, n, HEAP_INSERT_SKIP_FSM);
	insertion_end();
}

static void
insert_entry(Relation rel, Relation index, HeapTuple row)
{
	IndexInfo	info = {.type = T_IndexInfo};	/* a B-tree does not look at
												 * it */
	IndexUniqueCheck unique = index->rd_index->indisunique ? UNIQUE_CHECK_YES : UNIQUE_CHECK_NO;
	Datum		values[INDEX_MAX_KEYS];
	bool		nulls[INDEX_MAX_KEYS];

	for (int i = 0; i < index->rd_index->indnatts; i++)
		values[i] = heap_getattr(row, index->rd_index->indkey.values[i], RelationGetDescr(rel), &nulls[i]);
	(void) index_insert(index, values, nulls, &row->t_self, rel, unique, false, &info);
}

static void
insert_entries(Relation rel, Relation index, HeapTuple *rows, int n)
{
	/* not so while it is built beside us (REINDEX CONCURRENTLY) */
	if (!index->rd_index->indisready)
		return;
	for (int i = 0; i < n; i++)
		insert_entry(rel, index, rows[i]);
}

/* ---- the server's way: whatever a superuser has made of the table ---- */

/* The triggers are a copy, which lasts as long as the statement. */
static void
leave_out_guard(ResultRelInfo *info)
{
	TriggerDesc *triggers = info->ri_TrigDesc;

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		if (is_guard(&triggers->triggers[i]))
			triggers->triggers[i].tgenabled = TRIGGER_DISABLED;
	}
}

static void
insert_by_executor(EState *estate, ResultRelInfo *info, TupleTableSlot *slot, HeapTuple row)
{
	ExecForceStoreHeapTuple(row, slot, false);
	ItemPointerSetInvalid(&slot->tts_tid);
	ExecSimpleRelationInsert(info, estate, slot);
	if (!ItemPointerIsValid(&slot->tts_tid))
		ereport(ERROR,
				(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
				 errmsg("a trigger kept a row away from table \"fanout.%s\"",
						RelationGetRelationName(info->ri_RelationDesc)),
				 errhint("Drop the trigger.")));
	ResetPerTupleExprContext(estate);
}

/*
 * Inserts rows as INSERT does, though without a plan, and with no rights needed:
 * it sees to constraints, triggers and all kinds of indexes, but gives triggers
 * no transition tables.  The workers of logical replication do it in this way
 * (replication/logical/worker.c).
 */
static void
insert_all_by_executor(Relation rel, HeapTuple *rows, int n)
{
	EState	   *estate = CreateExecutorState();
	ResultRelInfo *info = makeNode(ResultRelInfo);
	TupleTableSlot *slot = table_slot_create(rel, &estate->es_tupleTable);

	InitResultRelInfo(info, rel, 0, NULL, 0);
	leave_out_guard(info);
	estate->es_opened_result_relations = lappend(estate->es_opened_result_relations, info);
	estate->es_output_cid = GetCurrentCommandId(true);
	AfterTriggerBeginQuery();
	ExecBSInsertTriggers(estate, info);
	ExecOpenIndices(info, false);
	for (int i = 0; i < n; i++)
		insert_by_executor(estate, info, slot, rows[i]);
	ExecCloseIndices(info);
	ExecASInsertTriggers(estate, info, NULL);
	AfterTriggerEndQuery(estate);
	ExecResetTupleTable(estate->es_tupleTable, false);
	FreeExecutorState(estate);
}

/* ---- which way ---- */

/*
 * Opens the indexes.  They stay open even if one is not plain: the caller closes
 * them.
 */
static bool
open_indexes(Relation rel, Relation *indexes, List *oids)
{
	bool		plain = true;
	ListCell   *cell;
	int			i = 0;

	foreach(cell, oids)
	{
		indexes[i] = index_open(lfirst_oid(cell), RowExclusiveLock);
		plain = plain && segment_is_plain_index(indexes[i]);
		i++;
	}
	return plain;
}

/*
 * Inserts rows in the fast way if the table and its indexes allow it, and returns
 * whether they did.  number: append to that segment of the outbox; -1: anywhere.
 */
static bool
insert_rows(Relation rel, int number, TupleDesc desc, HeapTuple *rows, int n)
{
	List	   *oids = RelationGetIndexList(rel);
	int			nindexes = list_length(oids);
	Relation   *indexes = palloc((nindexes + 1) * sizeof(Relation));
	bool		plain = open_indexes(rel, indexes, oids) && is_plain_table(rel) && !lacks_value(rel, rows, n);

	if (!plain)
		insert_all_by_executor(rel, rows, n);
	else if (number >= 0)
		append_heap(rel, number, desc, rows, n);
	else
		insert_heap(rel, desc, rows, n, 0);
	for (int i = 0; i < nindexes; i++)
	{
		if (plain)
			insert_entries(rel, indexes[i], rows, n);
		index_close(indexes[i], NoLock);
	}
	pfree(indexes);
	list_free(oids);
	return plain;
}

void
segment_insert(Oid segment, TupleDesc desc, HeapTuple *rows, int n)
{
	Relation	rel = table_open(segment, RowExclusiveLock);

	segment_check_columns(rel, desc);
	if (n > 0)
		(void) insert_rows(rel, -1, desc, rows, n);
	table_close(rel, NoLock);
}

void
segment_append(int number, TupleDesc desc, HeapTuple *rows, int n)
{
	Relation	rel = table_open(tables_segment(number), RowExclusiveLock);
	bool		appended;

	segment_check_columns(rel, desc);
	appended = insert_rows(rel, number, desc, rows, n);
	table_close(rel, NoLock);
	if (!appended)
		segment_scattered(number);
}

/* One row of each subtransaction is enough. */
void
segment_scattered(int number)
{
	static uint64 noted_xid = 0;
	static SubTransactionId noted_subid[OUTBOX_SEGMENTS];
	FullTransactionId xid = GetTopFullTransactionId();
	TupleDesc	desc;
	Datum		values[2] = {FullTransactionIdGetDatum(xid), Int16GetDatum(number)};
	bool		nulls[2] = {false, false};
	HeapTuple	row;

	if (noted_xid != U64FromFullTransactionId(xid))
		memset(noted_subid, 0, sizeof(noted_subid));
	noted_xid = U64FromFullTransactionId(xid);
	if (noted_subid[number] == GetCurrentSubTransactionId())
		return;
	desc = CreateTemplateTupleDesc(2);
	TupleDescInitEntry(desc, 1, NULL, XID8OID, -1, 0);
	TupleDescInitEntry(desc, 2, NULL, INT2OID, -1, 0);
	row = heap_form_tuple(desc, values, nulls);
	segment_insert(tables_scattered(), desc, &row, 1);
	noted_subid[number] = GetCurrentSubTransactionId();
}

/* ---- emptying ---- */

bool
segment_lock(Oid segment)
{
	return ConditionalLockRelationOid(segment, AccessExclusiveLock);
}

void
segment_truncate(Oid segment)
{
	char	   *sql = psprintf("truncate fanout.%s", get_rel_name(segment));

	if (SPI_execute(sql, false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not execute \"%s\"", sql);
}
