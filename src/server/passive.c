/*-------------------------------------------------------------------------
 *
 * passive.c
 *		Databases that neither publish nor consume.
 *
 * A copy of a database has the topics and subscriptions of its original.  If it
 * published and consumed by itself, messages would go out twice, and the
 * original would lose those that the copy takes from its queues.  So a copy is
 * passive until somebody calls fanout.activate(); it captures all the same.
 * fanout.passive_reason() decides, and says why; the workers ask it when they
 * have found the extension, and wait (worker.c).  It must never be asked by a
 * session that writes to captured tables.
 *
 * fanout.identity says to which database the tables belong: CREATE EXTENSION and
 * fanout.activate() write a row with the server's system identifier and the
 * database's oid and name, and a dump carries the rows of the database that it
 * was made from.
 *
 *		            rows of the identity           what the database is
 *		own only                                   active
 *		own and another one                        a copy, restored from a dump
 *		own and one of zeros                       a copy, of the schema alone
 *		one of another oid                         a copy, made from a template
 *		one of another server, with the same oid   active: pg_upgrade
 *		or name
 *		none                                       passive: somebody emptied it
 *
 * Scenarios:
 *
 * - A dump is restored into a database whose workers run: a trigger on the
 *	 identity has them started again, and they find the database passive.  With
 *	 --disable-triggers, the event trigger does it when triggers are enabled again.
 *
 * - pg_restore -j writes tables in any order: a consumer may begin in the moment
 *	 between the subscription's row and the identity's.
 *
 * - A database is made from a template in which nothing is declared: it is its
 *	 own as soon as something is declared in it.
 *
 * - Promotion of a standby, recovery to a point in time, a data directory that
 *	 was moved: system identifier, oid and rows are the same.  So they are in a
 *	 copy of the data directory that is started as another server, which nothing
 *	 here can tell: pg_fanout.enabled is for that.
 *
 * - The ledger, or a row that must be there, is gone or not of this server:
 *	 passive as well, since nobody knows what was sent.
 *
 * - pg_fanout.enabled is off.  After a reload that changed it the workers start
 *	 again.
 *
 * - fanout.activate() holds the database: all its workers are stopped before it
 *	 reads anything, and come back when its transaction ends.
 *
 * Locks: none but those of the query.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_authid.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "server/passive.h"
#include "server/query.h"
#include "server/shmem.h"
#include "server/wakeup.h"

PG_FUNCTION_INFO_V1(pgf_stop_workers);
PG_FUNCTION_INFO_V1(pgf_restart_workers);

/* Milliseconds; a worker is allowed 2 s. */
#define STOP_TIMEOUT 5000

/*
 * Returns why this database neither publishes nor consumes, in the given context;
 * NULL if it does both.  Inside a transaction opened by worker_begin().  A
 * consumer's role has no right to ask, so a superuser does.
 */
char *
passive_reason(MemoryContext context)
{
	static CachedQuery query = {"select fanout.passive_reason()"};
	Oid			user;
	int			security;
	bool		isnull;
	Datum		reason;

	GetUserIdAndSecContext(&user, &security);
	SetUserIdAndSecContext(BOOTSTRAP_SUPERUSERID, security | SECURITY_LOCAL_USERID_CHANGE);
	query_execute(&query, 0, NULL, NULL, NULL);
	reason = query_value(0, 1, &isnull);
	SetUserIdAndSecContext(user, security);
	return isnull ? NULL : MemoryContextStrdup(context, text_to_cstring(DatumGetTextPP(reason)));
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

/* fanout.restart_workers(): has them ask for the reason again, at commit. */
Datum
pgf_restart_workers(PG_FUNCTION_ARGS)
{
	wakeup_restart_at_commit(MyDatabaseId);
	PG_RETURN_VOID();
}
