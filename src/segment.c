/*-------------------------------------------------------------------------
 *
 * segment.c
 *		Tables in a ring of segments: outbox, ledger, inbox.
 *
 * All three are insert-only.  Rows go to the current segment; what is too old
 * goes a segment at a time, by TRUNCATE, which leaves no dead tuples.  Which
 * one that is, and when, is the affair of whoever owns the table.
 *
 * They have no constraints but unique indexes, and neither triggers, defaults
 * nor policies.  So rows are put straight into heap and indexes, as the server
 * does with its catalogs, but for what it looks up for each of these anew.
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
#include "catalog/namespace.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "nodes/execnodes.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "segment.h"

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

static void
insert_heap(Relation rel, TupleDesc desc, HeapTuple *rows, int n)
{
	TupleTableSlot **slots = palloc(n * sizeof(TupleTableSlot *));

	/* slots that own their rows: others would be copied */
	for (int i = 0; i < n; i++)
	{
		slots[i] = MakeTupleTableSlot(desc, &TTSOpsHeapTuple);
		ExecStoreHeapTuple(rows[i], slots[i], true);
	}
	heap_multi_insert(rel, slots, n, GetCurrentCommandId(true), 0, NULL);
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
insert_entries(Relation rel, HeapTuple *rows, int n)
{
	List	   *indexes = RelationGetIndexList(rel);
	ListCell   *cell;

	foreach(cell, indexes)
	{
		Relation	index = index_open(lfirst_oid(cell), RowExclusiveLock);

		/* not so while it is built beside us (REINDEX CONCURRENTLY) */
		for (int i = 0; i < n && index->rd_index->indisready; i++)
			insert_entry(rel, index, rows[i]);
		index_close(index, NoLock);
	}
	list_free(indexes);
}

void
segment_insert(Oid segment, TupleDesc desc, HeapTuple *rows, int n)
{
	Relation	rel = table_open(segment, RowExclusiveLock);

	if (n == 1)
		simple_heap_insert(rel, rows[0]);
	else if (n > 1)
		insert_heap(rel, desc, rows, n);
	insert_entries(rel, rows, n);
	table_close(rel, NoLock);
}

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
