/*-------------------------------------------------------------------------
 *
 * owner.c
 *		The rights of the extension's owner, for statements on its own tables.
 *
 * A consumer's session has the role that subscribed, which has no right to
 * pg_fanout's tables.  So every statement on them runs between become_owner()
 * and become_caller(), with settings of its own.  No code of a user runs
 * meanwhile: the tables have no triggers but ours, and a statement is done when
 * it returns.
 *
 * Must never: call a handler, or leave the owner's rights behind.  An error
 * takes them back, as it ends the (sub)transaction.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/guc.h"

#include "capture/rights.h"
#include "consume/owner.h"
#include "server/worker.h"

/* Bounds a worker's wait for a row that somebody's open transaction has locked. */
#define LOCK_TIMEOUT "10s"

static void
set(const char *name, const char *value)
{
	(void) set_config_option(name, value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
}

/*
 * Goes on with the rights of the extension's owner, and with settings for its
 * own statements, until become_caller() is called with the result.  Needs a
 * transaction.
 */
Caller
become_owner(void)
{
	static const char *const settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"enable_seqscan", "off"},	/* plans are made when tables are empty */
		{"plan_cache_mode", "force_generic_plan"},
		{"jit", "off"},			/* a disabled scan looks dear enough for it */
	};
	Caller		caller;

	GetUserIdAndSecContext(&caller.user, &caller.context);
	SetUserIdAndSecContext(rights_administrator(), caller.context | SECURITY_LOCAL_USERID_CHANGE);
	caller.settings = NewGUCNestLevel();
	for (int i = 0; i < lengthof(settings); i++)
		set(settings[i][0], settings[i][1]);
	if (worker_subscription != NULL)
		set("lock_timeout", LOCK_TIMEOUT);
	return caller;
}

/* Goes back to the rights and settings from before become_owner(). */
void
become_caller(const Caller *caller)
{
	AtEOXact_GUC(false, caller->settings);
	SetUserIdAndSecContext(caller->user, caller->context);
}

/* Runs query_change() with the rights and settings of become_owner(). */
void
owner_change(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls, uint64 rows)
{
	Caller		caller = become_owner();

	query_change(query, nargs, types, values, nulls, rows);
	become_caller(&caller);
}

/* Runs query_execute() with the rights and settings of become_owner(). */
void
owner_execute(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls)
{
	Caller		caller = become_owner();

	query_execute(query, nargs, types, values, nulls);
	become_caller(&caller);
}
