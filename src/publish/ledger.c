/*-------------------------------------------------------------------------
 *
 * ledger.c
 *		The entries of what was sent; is the state of this database this server's
 *		own?
 *
 * The ledger says by snapshots what was sent, and rows of the outbox say by
 * transaction ids when they were written.  If they come from elsewhere, or if
 * somebody removed them, the publisher would pass over messages without sending
 * them.  So before it reads anything it asks fanout.ledger_problem(), and until
 * that finds nothing it publishes nothing.  Only fanout.repair_ledger() decides
 * what is to be sent again: a person knows that, and nothing here guesses.
 *
 * Scenarios:
 *
 * - The ledger is empty, or fanout.rotation or fanout.inbox_rotation has not
 *	 exactly one row (TRUNCATE of all tables).
 *
 * - The newest entry's snapshots, or rows of the outbox, lie in this server's
 *	 future: they were written by another server, or pg_resetwal went back.
 *
 * - In each of these cases the publisher waits, says so once in the log, and
 *	 looks again every LEDGER_RECHECK_MS and whenever it is woken.
 *
 * - fanout.repair_ledger() holds the database: all its workers are stopped
 *	 before it reads anything, and come back when its transaction ends.  A
 *	 publisher that kept running would write its own place over the repaired one.
 *
 * Locks: none but those of the queries.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "publish/ledger.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/shmem.h"
#include "server/tables.h"
#include "server/wakeup.h"
#include "server/worker.h"

PG_FUNCTION_INFO_V1(pgf_stop_workers);

#define REPAIR_HINT "Use fanout.repair_ledger()."

/* Milliseconds; a worker is allowed 2 s. */
#define STOP_TIMEOUT 5000

/* Returns what is wrong, in the given context; NULL if nothing is. */
static char *
ledger_problem(MemoryContext context)
{
	static CachedQuery query = {"select fanout.ledger_problem()"};
	bool		isnull;
	Datum		problem;

	query_execute(&query, 0, NULL, NULL, NULL);
	problem = query_value(0, 1, &isnull);
	return isnull ? NULL : MemoryContextStrdup(context, text_to_cstring(DatumGetTextPP(problem)));
}

void
ledger_check(void)
{
	char	   *problem = ledger_problem(CurrentMemoryContext);

	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("%s", problem),
				 errhint(REPAIR_HINT)));
}

/* Tells of a problem that was not told of before; takes it over. */
static void
tell_problem(char *problem)
{
	static char *told = NULL;

	if (told != NULL && strcmp(told, problem) == 0)
	{
		pfree(problem);
		return;
	}
	if (told != NULL)
		pfree(told);
	told = problem;
	worker_set_error(problem);
	ereport(WARNING,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("pg_fanout publishes nothing from database \"%s\"", get_database_name(MyDatabaseId)),
			 errdetail("%s.", problem),
			 errhint(REPAIR_HINT)));
}

bool
ledger_usable(void)
{
	char	   *problem;
	bool		usable;

	worker_begin();
	problem = ledger_problem(TopMemoryContext);
	usable = (problem == NULL);
	if (!usable)
		tell_problem(problem);
	worker_commit();
	return usable;
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

/*
 * fanout.stop_workers(): stops the workers of this database, and keeps them out
 * until the transaction ends.
 */
Datum
pgf_stop_workers(PG_FUNCTION_ARGS)
{
	DatabaseSlot *slot = wakeup_hold_until_end(MyDatabaseId);

	if (slot != NULL && !shmem_stop_workers(slot, STOP_TIMEOUT))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("the workers of pg_fanout in this database do not stop"),
				 errhint("Try again.")));
	PG_RETURN_VOID();
}
