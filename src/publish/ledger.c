/*-------------------------------------------------------------------------
 *
 * ledger.c
 *		The entries of what was sent.
 *
 * The ledger says by snapshots what was sent, and rows of the outbox say by
 * transaction ids when they were written.  If they come from elsewhere, or if
 * somebody removed them, the publisher would pass over messages without sending
 * them.  So it asks fanout.ledger_problem() in the transaction in which it reads
 * its place.  A database whose ledger has a problem is passive (passive.c), and
 * fanout.activate() decides what is to be sent again.
 *
 * Scenarios:
 *
 * - The ledger is empty, or fanout.rotation or fanout.inbox_rotation has not
 *	 exactly one row (TRUNCATE of all tables).
 *
 * - The newest entry's snapshots, or rows of the outbox, lie in this server's
 *	 future: they were written by another server, or pg_resetwal went back.
 *
 * Must never: update or delete an entry, or guess what was sent.
 *
 * Locks: none but those of the queries.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"

#include "publish/ledger.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/tables.h"

/*
 * Raises an error if the publisher cannot go on from what ledger, rotation and
 * outbox say.  Inside a transaction opened by worker_begin().
 */
void
ledger_check(void)
{
	static CachedQuery query = {"select fanout.ledger_problem()"};
	bool		isnull;
	Datum		problem;

	query_execute(&query, 0, NULL, NULL, NULL);
	problem = query_value(0, 1, &isnull);
	if (!isnull)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("%s", text_to_cstring(DatumGetTextPP(problem))),
				 errhint("Use fanout.activate().")));
}

#define ENTRY_COLUMNS "coalesce(topic_id, 0), coalesce(attached, false), base, target, last_id," \
	" files[1], files[2], files[3], unread[1], unread[2], unread[3]"

/* Takes an entry from a row of the last result; its snapshots are those of the row. */
static void
take_entry(int row, LedgerEntry *entry)
{
	bool		isnull;

	entry->topic_id = DatumGetInt32(query_value(row, 1, &isnull));
	entry->attached = DatumGetBool(query_value(row, 2, &isnull));
	entry->base = query_value(row, 3, &isnull);
	entry->target = query_value(row, 4, &isnull);
	entry->last_id = DatumGetInt64(query_value(row, 5, &isnull));
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		entry->unread.files[i] = DatumGetObjectId(query_value(row, 6 + i, &isnull));
		entry->unread.blocks[i] = DatumGetInt64(query_value(row, 6 + OUTBOX_SEGMENTS + i, &isnull));
	}
}

/*
 * Reads the newest entry of the main cursor.  There must be one (ledger_check()).  Its
 * snapshots last as long as the transaction, which worker_begin() opened.
 */
void
ledger_read(LedgerEntry *entry)
{
	static CachedQuery query = {
		"select " ENTRY_COLUMNS " from fanout.sent where topic_id is null order by sent_id desc limit 1"
	};

	query_execute(&query, 0, NULL, NULL, NULL);
	take_entry(0, entry);
}

/* Reads the newest entry of each topic that does not ride with the main cursor; likewise. */
LedgerEntry *
ledger_read_detached(int *n)
{
	static CachedQuery query = {"select " ENTRY_COLUMNS " from fanout.detached"};
	LedgerEntry *entries;

	query_execute(&query, 0, NULL, NULL, NULL);
	*n = SPI_processed;
	entries = palloc(Max(*n, 1) * sizeof(LedgerEntry));
	for (int i = 0; i < *n; i++)
		take_entry(i, &entries[i]);
	return entries;
}

/*
 * Records that messages are settled: count of them since the last entry.  What became
 * of them must be recorded in the same transaction, opened by worker_begin().  Raises
 * an error if fanout.rotation does not say where the entry belongs.
 */
void
ledger_record(const LedgerEntry *entry, int64 count)
{
	static CachedQuery query = {
		"insert into fanout.sent (segment, topic_id, attached, base, target, last_id, count, files, unread)"
		" select current, $1, $2, $3, $4, $5, $6, array[$7, $8, $9], array[$10, $11, $12] from fanout.rotation"
	};
	Oid			types[12] = {
		INT4OID, BOOLOID, PG_SNAPSHOTOID, PG_SNAPSHOTOID, INT8OID, INT4OID,
		OIDOID, OIDOID, OIDOID, INT8OID, INT8OID, INT8OID
	};
	Datum		values[12] = {
		Int32GetDatum(entry->topic_id), BoolGetDatum(entry->attached), entry->base, entry->target,
		Int64GetDatum(entry->last_id), Int32GetDatum((int32) count)
	};
	char		nulls[12];

	memset(nulls, ' ', sizeof(nulls));
	if (entry->topic_id == 0)
		nulls[0] = nulls[1] = 'n';
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		values[6 + i] = ObjectIdGetDatum(entry->unread.files[i]);
		values[6 + OUTBOX_SEGMENTS + i] = Int64GetDatum(entry->unread.blocks[i]);
	}
	query_execute(&query, 12, types, values, nulls);
	if (SPI_processed != 1)
		tables_row_missing("rotation");
}
