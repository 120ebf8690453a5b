/*-------------------------------------------------------------------------
 *
 * segment.c
 *		Tables in a ring of segments: outbox, ledger, inbox.
 *
 * All three are insert-only.  Rows go to the current segment; what is too old
 * goes a segment at a time, by TRUNCATE, which leaves no dead tuples.  Which
 * one that is, and when, is the affair of whoever owns the table.
 *
 * Locks: whoever reads or writes a segment keeps a lock on it until its
 * transaction ends.  Emptying takes ACCESS EXCLUSIVE only if nobody has any.
 * Looking at a segment waits for whoever has that: VACUUM FULL, CLUSTER.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
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

void
segment_insert(Oid segment, TupleDesc desc, HeapTuple *rows, int n)
{
	Relation	rel = table_open(segment, RowExclusiveLock);
	CatalogIndexState indexes = CatalogOpenIndexes(rel);
	TupleTableSlot **slots = palloc((n + 1) * sizeof(TupleTableSlot *));

	/* slots that own their rows: others would be copied */
	for (int i = 0; i < n; i++)
	{
		slots[i] = MakeTupleTableSlot(desc, &TTSOpsHeapTuple);
		ExecStoreHeapTuple(rows[i], slots[i], true);
	}
	CatalogTuplesMultiInsertWithInfo(rel, slots, n, indexes);
	CatalogCloseIndexes(indexes);
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
