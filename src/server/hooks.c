/*-------------------------------------------------------------------------
 *
 * hooks.c
 *		Commands that concern the workers: extension, database, settings,
 *		COMMIT PREPARED.
 *
 * Sees to it that a command that needs a database for itself finds no
 * worker in it, and that the launcher and the workers look again when the
 * transaction has ended.  Nothing here starts a worker, and nothing is
 * done by reading a command that its effect tells better: extensions and DROP
 * DATABASE are followed through the object-access hook, which sees every way
 * of creating and dropping them, and sees them after the permission check.
 *
 * Scenarios ("hold": no worker can enter the database until the transaction
 * ends; see wakeup.c and shmem.c):
 *
 * - CREATE EXTENSION: hold on the own database, so that a publisher started
 *	 too early does not report the extension as missing.  At the end, commit or
 *	 abort, the launcher starts one; after an abort that one finds nothing.
 *
 * - DROP EXTENSION, ALTER EXTENSION ... UPDATE: the workers are restarted at
 *	 commit, and look at the extension first of all.  Waking them would not do:
 *	 they read nothing while the broker is away.  In their transactions they
 *	 lock the extension before anything else, so there is no deadlock, unless a
 *	 handler makes one with locks of its own.
 *
 * - DROP EXTENSION ... CASCADE while captured tables are written to: the server
 *	 would lock the outbox, then those tables; writers lock them in the other
 *	 order.  So the tables are locked before the command.
 *
 * - DROP and CREATE EXTENSION in one transaction: both; the publisher sees
 *	 that the extension is another one and has itself started again.
 *
 * - DROP DATABASE: in the object-access hook: the caller owns it, nobody can
 *	 connect any more, and the server has not looked for other sessions yet.
 *	 Hold, stop.  At the end the launcher sees whether the database is gone.
 *
 * - CREATE DATABASE ... TEMPLATE, ALTER DATABASE ... RENAME TO, ... SET
 *	 TABLESPACE: the server looks for other sessions before any hook of object
 *	 access, so they are read from the command.  Hold, stop; but only for a
 *	 user to whom the server will not refuse the command.  At the end the
 *	 publisher comes back, and the launcher looks at the new database.
 *
 * - ALTER DATABASE ... ALLOW_CONNECTIONS, IS_TEMPLATE: the launcher looks at
 *	 pg_database at the end.
 *
 * - ALTER DATABASE ... SET pg_fanout.*, ALTER ROLE ... SET pg_fanout.* (of the
 *	 role as which workers run, or of all), RESET: restart at commit, once the
 *	 command has succeeded, so that nobody without rights can cause it.
 *
 * - COMMIT PREPARED: the workers are woken at commit, since messages or
 *	 subscriptions may be in the transaction that was prepared.  If that one created the
 *	 extension, there is no publisher yet: as CREATE EXTENSION.  When a worker of
 *	 logical replication does it, no command is seen here: see wakeup.c.
 *
 * - A worker that does not go within STOP_TIMEOUT: the command goes on, and
 *	 the server reports that the database is being accessed by others.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/catalog.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_trigger.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "nodes/value.h"
#include "parser/parse_func.h"
#include "storage/lmgr.h"
#include "tcop/utility.h"
#include "utils/fmgroids.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "server/compat.h"
#include "server/hooks.h"
#include "server/shmem.h"
#include "server/wakeup.h"

#define EXTENSION_NAME		"pg_fanout"
#define SETTING_PREFIX		"pg_fanout."

/* Milliseconds; a worker is allowed 2 s, and the server waits 5 s itself. */
#define STOP_TIMEOUT		5000

static object_access_hook_type next_object_access = NULL;
static ProcessUtility_hook_type next_utility = NULL;

static void object_access(ObjectAccessType access, Oid class_id, Oid object_id,
						  int sub_id, void *arg);
static void utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
					ProcessUtilityContext context, ParamListInfo params,
					QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc);
static void extension_accessed(ObjectAccessType access, Oid extension);
static bool is_our_extension(Oid extension);
static bool is_commit_prepared(Node *statement);
static void before_utility(Node *statement);
static void after_commit_prepared(void);
static void before_drop(DropStmt *statement);
static bool drops_extension(DropStmt *statement);
static void lock_captured_tables(void);
static void before_create_database(CreatedbStmt *statement);
static void before_alter_database(AlterDatabaseStmt *statement);
static void before_rename(RenameStmt *statement);
static bool changes_settings(Node *statement, Oid *database);
static bool may_be_ours(VariableSetStmt *setting);
static bool workers_run_as(RoleSpec *role);
static bool may_create_databases(void);
static bool may_copy_database(Oid database);
static bool is_template(Oid database);
static void stop_workers(Oid database);

void
hooks_init(void)
{
	next_object_access = object_access_hook;
	object_access_hook = object_access;
	next_utility = ProcessUtility_hook;
	ProcessUtility_hook = utility;
}

/* Object access */

static void
object_access(ObjectAccessType access, Oid class_id, Oid object_id, int sub_id, void *arg)
{
	if (next_object_access)
		next_object_access(access, class_id, object_id, sub_id, arg);

	if (class_id == ExtensionRelationId)
		extension_accessed(access, object_id);
	else if (class_id == DatabaseRelationId && access == OAT_DROP)
		stop_workers(object_id);
}

static void
extension_accessed(ObjectAccessType access, Oid extension)
{
	if (access != OAT_POST_CREATE && access != OAT_DROP && access != OAT_POST_ALTER)
		return;
	if (!is_our_extension(extension))
		return;
	if (access == OAT_POST_CREATE)
		wakeup_hold_until_end(MyDatabaseId);
	wakeup_launcher_at_end();
	wakeup_restart_at_commit(MyDatabaseId);
}

/*
 * By SnapshotSelf, since a row that was only just inserted is not visible yet.
 */
static bool
is_our_extension(Oid extension)
{
	Relation	relation = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		ours;

	ScanKeyInit(&key, Anum_pg_extension_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(extension));
	scan = systable_beginscan(relation, ExtensionOidIndexId, true, SnapshotSelf, 1, &key);
	tuple = systable_getnext(scan);
	ours = HeapTupleIsValid(tuple) &&
		strcmp(NameStr(((Form_pg_extension) GETSTRUCT(tuple))->extname), EXTENSION_NAME) == 0;
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return ours;
}

/* Utility commands */

/*
 * Nothing of pstmt may be looked at after the command: it may have ended the
 * transaction whose memory that is.
 */
static void
utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
		ProcessUtilityContext context, ParamListInfo params,
		QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc)
{
	bool		commit_prepared = is_commit_prepared(pstmt->utilityStmt);
	Oid			database = InvalidOid;
	bool		restart = changes_settings(pstmt->utilityStmt, &database);
	ProcessUtility_hook_type next = next_utility ? next_utility : standard_ProcessUtility;

	before_utility(pstmt->utilityStmt);
	next(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
	if (commit_prepared)
		after_commit_prepared();
	if (restart)
		wakeup_restart_at_commit(database);
}

static bool
is_commit_prepared(Node *statement)
{
	return IsA(statement, TransactionStmt) &&
		((TransactionStmt *) statement)->kind == TRANS_STMT_COMMIT_PREPARED;
}

static void
before_utility(Node *statement)
{
	switch (nodeTag(statement))
	{
		case T_DropStmt:
			before_drop((DropStmt *) statement);
			break;
		case T_CreatedbStmt:
			before_create_database((CreatedbStmt *) statement);
			break;
		case T_AlterDatabaseStmt:
			before_alter_database((AlterDatabaseStmt *) statement);
			break;
		case T_RenameStmt:
			before_rename((RenameStmt *) statement);
			break;
		default:
			break;
	}
}

/*
 * The own transaction of COMMIT PREPARED ends after this, and its callback is
 * what wakes the publisher.
 */
static void
after_commit_prepared(void)
{
	if (shmem_my_slot() != NULL)
	{
		wakeup_publisher_at_commit();
		wakeup_subscriptions_at_commit();
		wakeup_consumers_at_commit();
		wakeup_launcher_at_end();
	}
	else if (OidIsValid(get_extension_oid(EXTENSION_NAME, true)))
		wakeup_hold_until_end(MyDatabaseId);
}

/* Without CASCADE, captures make it fail. */
static void
before_drop(DropStmt *statement)
{
	if (statement->removeType == OBJECT_EXTENSION && statement->behavior == DROP_CASCADE &&
		superuser() && drops_extension(statement))
		lock_captured_tables();
}

static bool
drops_extension(DropStmt *statement)
{
	ListCell   *cell;

	foreach(cell, statement->objects)
	{
		if (strcmp(strVal(lfirst(cell)), EXTENSION_NAME) == 0)
			return OidIsValid(get_extension_oid(EXTENSION_NAME, true));
	}
	return false;
}

/* In order of oid, as two such commands would. */
static void
lock_captured_tables(void)
{
	Oid			function = LookupFuncName(list_make2(makeString("fanout"), makeString("capture_trigger")),
										  0, NULL, true);
	Relation	relation = table_open(TriggerRelationId, AccessShareLock);
	List	   *tables = NIL;
	ListCell   *cell;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, Anum_pg_trigger_tgfoid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(function));
	scan = systable_beginscan(relation, InvalidOid, false, NULL, 1, &key);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		tables = list_append_unique_oid(tables, ((Form_pg_trigger) GETSTRUCT(tuple))->tgrelid);
	systable_endscan(scan);
	table_close(relation, AccessShareLock);

	list_sort(tables, list_oid_cmp);
	foreach(cell, tables)
		LockRelationOid(lfirst_oid(cell), AccessExclusiveLock);
	list_free(tables);
}

static void
before_create_database(CreatedbStmt *statement)
{
	const char *source = "template1";
	Oid			database;
	ListCell   *cell;

	foreach(cell, statement->options)
	{
		DefElem    *option = lfirst(cell);

		if (strcmp(option->defname, "template") == 0 && option->arg != NULL)
			source = defGetString(option);
	}
	database = get_database_oid(source, true);
	if (OidIsValid(database) && may_create_databases() && may_copy_database(database))
		stop_workers(database);
	wakeup_launcher_at_end();
}

static void
before_alter_database(AlterDatabaseStmt *statement)
{
	Oid			database = get_database_oid(statement->dbname, true);
	ListCell   *cell;

	wakeup_launcher_at_end();
	foreach(cell, statement->options)
	{
		DefElem    *option = lfirst(cell);

		if (strcmp(option->defname, "tablespace") == 0 &&
			OidIsValid(database) && pgf_owns_database(database))
			stop_workers(database);
	}
}

static void
before_rename(RenameStmt *statement)
{
	Oid			database;

	if (statement->renameType != OBJECT_DATABASE)
		return;
	database = get_database_oid(statement->subname, true);
	if (OidIsValid(database) && pgf_owns_database(database) && may_create_databases())
		stop_workers(database);
}

/* *database: whose workers are concerned; InvalidOid: those of all. */
static bool
changes_settings(Node *statement, Oid *database)
{
	const char *dbname = NULL;

	if (IsA(statement, AlterDatabaseSetStmt))
	{
		AlterDatabaseSetStmt *set = (AlterDatabaseSetStmt *) statement;

		if (!may_be_ours(set->setstmt))
			return false;
		dbname = set->dbname;
	}
	else if (IsA(statement, AlterRoleSetStmt))
	{
		AlterRoleSetStmt *set = (AlterRoleSetStmt *) statement;

		if (!may_be_ours(set->setstmt) || !workers_run_as(set->role))
			return false;
		dbname = set->database;
	}
	else
		return false;

	*database = dbname ? get_database_oid(dbname, true) : InvalidOid;
	return dbname == NULL || OidIsValid(*database);
}

static bool
may_be_ours(VariableSetStmt *setting)
{
	return setting->kind == VAR_RESET_ALL ||
		pg_strncasecmp(setting->name, SETTING_PREFIX, strlen(SETTING_PREFIX)) == 0;
}

/* NULL: ALTER ROLE ALL */
static bool
workers_run_as(RoleSpec *role)
{
	return role == NULL || get_rolespec_oid(role, true) == BOOTSTRAP_SUPERUSERID;
}

/*
 * The server's have_createdb_privilege() is exported only since some minor
 * release.
 */
static bool
may_create_databases(void)
{
	HeapTuple	role;
	bool		result = false;

	if (superuser())
		return true;
	role = SearchSysCache1(AUTHOID, ObjectIdGetDatum(GetUserId()));
	if (HeapTupleIsValid(role))
	{
		result = ((Form_pg_authid) GETSTRUCT(role))->rolcreatedb;
		ReleaseSysCache(role);
	}
	return result;
}

/* As createdb() decides. */
static bool
may_copy_database(Oid database)
{
	return is_template(database) || pgf_owns_database(database);
}

static bool
is_template(Oid database)
{
	HeapTuple	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(database));
	bool		result = false;

	if (HeapTupleIsValid(tuple))
	{
		result = ((Form_pg_database) GETSTRUCT(tuple))->datistemplate;
		ReleaseSysCache(tuple);
	}
	return result;
}

static void
stop_workers(Oid database)
{
	DatabaseSlot *slot = wakeup_hold_until_end(database);

	if (slot != NULL)
		shmem_stop_workers(slot, STOP_TIMEOUT);
}
