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

/*
 * Records that the messages of a batch, from base to target, are settled up to
 * last_id: count of them since the last entry; unread is with respect to base.  What
 * became of them must be recorded in the same transaction, opened by worker_begin().
 * Raises an error if fanout.rotation does not say where the entry belongs.
 */
void
ledger_record_sent(Datum base, Datum target, int64 last_id, int count, const Unread *unread)
{
	static CachedQuery query = {
		"insert into fanout.sent (segment, base, target, last_id, count, files, unread)"
		" select current, $1, $2, $3, $4, array[$5, $6, $7], array[$8, $9, $10] from fanout.rotation"
	};
	Oid			types[10] = {
		PG_SNAPSHOTOID, PG_SNAPSHOTOID, INT8OID, INT4OID, OIDOID, OIDOID, OIDOID, INT8OID, INT8OID, INT8OID
	};
	Datum		values[10] = {base, target, Int64GetDatum(last_id), Int32GetDatum(count)};

	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		values[4 + i] = ObjectIdGetDatum(unread->files[i]);
		values[4 + OUTBOX_SEGMENTS + i] = Int64GetDatum(unread->blocks[i]);
	}
	query_execute(&query, 10, types, values, NULL);
	if (SPI_processed != 1)
		tables_row_missing("rotation");
}
