/*-------------------------------------------------------------------------
 *
 * sync_write.c
 *		The statements that write the table of a subscription of sync_table().
 *
 * A message is one statement on one row, found by the key: what the table's
 * triggers, defaults, constraints and columns of its own see is what the
 * source's statement would have shown them.  An insert or update is an UPDATE,
 * and an INSERT only if there is no such row, so that an update of a row takes no
 * number of a sequence here.  A changed key is an UPDATE of the key, which leaves
 * the row's other columns, and other tables' rows that refer to it, where they
 * are.
 *
 * Statements are made of names that were looked up in the catalogs; values are
 * parameters of the columns' types.  Each plan is made once for a set of columns.
 *
 * It must never decide whether a message is to be applied (sync.c), and never run
 * with other rights than those of the table's owner, whose triggers run here.
 *
 * Locks: those of its statements; ACCESS EXCLUSIVE for TRUNCATE, if it is free.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "consume/inbox.h"
#include "consume/sync_target.h"
#include "server/query.h"

/* Rows that are deleted between two looks at what is known of them. */
#define PIECE 1000

/* ---- texts of statements ---- */

/* Inheritance is not followed: the copy is this table. */
static void
append_target(StringInfo sql, const SyncTarget *target)
{
	appendStringInfo(sql, "%s%s as t", target->partitioned ? "" : "only ", target->qualified);
}

/* The operator that a unique index uses, wherever its type was made. */
static char *
equality(Oid type)
{
	Oid			operator = lookup_type_cache(type, TYPECACHE_EQ_OPR)->eq_opr;
	HeapTuple	tuple = SearchSysCache1(OPEROID, ObjectIdGetDatum(operator));
	Form_pg_operator form;
	char	   *name;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "no equality operator for type %u", type);
	form = (Form_pg_operator) GETSTRUCT(tuple);
	name = psprintf("operator(%s.%s)", quote_identifier(get_namespace_name(form->oprnamespace)),
					NameStr(form->oprname));
	ReleaseSysCache(tuple);
	return name;
}

/*
 * Returns the column as an operand of the type's operators.  A domain is cast to its base
 * type, because operators of enums and ranges take no domain over one; indexes serve all
 * the same.
 */
static char *
operand(const SyncColumn *column)
{
	if (!column->of_domain)
		return psprintf("t.%s", column->local);
	return psprintf("t.%s::%s", column->local,
					format_type_extended(column->type, -1, FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY));
}

/*
 * Appends the condition that finds the row of a key.  first: the number of the
 * key's first parameter.
 *
 * Where equal values may look different, the row must look as the key does, because
 * messages of keys that look different come in any order: a late DELETE of 1.0 must
 * not take the row 1.00 that came since, and two rows of a source that tells "a"
 * and "A" apart must not become one.  The unique index refuses the second.
 */
static void
append_key(StringInfo sql, const SyncTarget *target, int first)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		SyncColumn *key = &target->columns[target->keys[i]];

		appendStringInfo(sql, "%s%s %s $%d", i == 0 ? "" : " and ", operand(key), equality(key->type), first + i);
		if (key->inexact)
			appendStringInfo(sql, " and row(%s)::record operator(pg_catalog.*=) row($%d)::record", operand(key), first + i);
	}
}

/*
 * Appends what an UPDATE sets: not the key, unless it changes.  A column that is
 * GENERATED ALWAYS AS IDENTITY cannot be set; whether it has the value is
 * returned.  Parameters are the row's columns in order.  False: it sets nothing.
 */
static bool
append_set(StringInfo sql, const SyncTarget *target, Bitmapset *columns, bool with_key)
{
	const char *separator = " set ";
	int			parameter = 0;

	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		SyncColumn *column = &target->columns[i];

		parameter++;
		if (column->identity || (column->is_key && !with_key))
			continue;
		appendStringInfo(sql, "%s%s = $%d", separator, column->local, parameter);
		separator = ", ";
	}
	return separator[0] == ',';
}

static void
append_returning(StringInfo sql, const SyncTarget *target, Bitmapset *columns, bool with_key)
{
	const char *separator = " returning ";
	int			parameter = 0;

	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		SyncColumn *column = &target->columns[i];

		parameter++;
		if (!column->identity || (column->is_key && !with_key))
			continue;
		appendStringInfo(sql, "%st.%s is not distinct from $%d", separator, column->local, parameter);
		separator = " and ";
	}
}

static void
append_columns(StringInfo sql, const SyncTarget *target, Bitmapset *columns)
{
	const char *separator = "";

	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		appendStringInfo(sql, "%s%s", separator, target->columns[i].local);
		separator = ", ";
	}
}

/* ---- plans ---- */

/* parameters: the columns, then those of the key, if it is another one */
static SPIPlanPtr
prepare(const SyncTarget *target, const char *sql, Bitmapset *columns, bool key)
{
	Oid		   *types = palloc((target->ncolumns + target->nkeys + 1) * sizeof(Oid));
	int			n = 0;
	SPIPlanPtr	plan;

	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
		types[n++] = target->columns[i].type;
	for (int i = 0; key && i < target->nkeys; i++)
		types[n++] = target->columns[target->keys[i]].type;
	plan = SPI_prepare_cursor(sql, n, types, CURSOR_OPT_GENERIC_PLAN);
	if (plan == NULL || SPI_keepplan(plan) != 0)
		elog(ERROR, "could not prepare \"%s\": %s", sql, SPI_result_code_string(SPI_result));
	return plan;
}

/* Runs it, and returns how many rows it found; the result is in SPI_tuptable. */
static uint64
execute(const SyncTarget *target, SPIPlanPtr plan, const SyncValues *row, const SyncValues *key)
{
	Datum	   *values = palloc((target->ncolumns + target->nkeys + 1) * sizeof(Datum));
	char	   *nulls = palloc(target->ncolumns + target->nkeys + 1);
	MemoryContext context = CurrentMemoryContext;
	int			n = 0;
	int			result;

	for (int i = -1; row != NULL && (i = bms_next_member(row->columns, i)) >= 0;)
	{
		values[n] = row->values[i];
		nulls[n++] = row->nulls[i] ? 'n' : ' ';
	}
	for (int i = 0; key != NULL && i < target->nkeys; i++)
	{
		values[n] = key->values[target->keys[i]];
		nulls[n++] = ' ';
	}
	query_plan_by_index(plan);
	result = SPI_execute_snapshot(plan, values, nulls, InvalidSnapshot, InvalidSnapshot, false, !target->queues_triggers, 0);
	MemoryContextSwitchTo(context);
	if (result < 0)
		elog(ERROR, "could not write the table: %s", SPI_result_code_string(result));
	pfree(values);
	pfree(nulls);
	return SPI_processed;
}

static SyncStatements *
find_statements(SyncTarget *target, Bitmapset *columns)
{
	SyncStatements *statements;
	MemoryContext oldcontext;

	for (int i = 0; i < target->nstatements; i++)
	{
		if (bms_equal(target->statements[i].columns, columns))
			return &target->statements[i];
	}
	/* more sets than that is a table that is altered all the time */
	if (target->nstatements == MAX_STATEMENTS)
		sync_write_forget(target);
	oldcontext = MemoryContextSwitchTo(target->context);
	statements = &target->statements[target->nstatements++];
	memset(statements, 0, sizeof(*statements));
	statements->columns = bms_copy(columns);
	MemoryContextSwitchTo(oldcontext);
	return statements;
}

static void
free_plan(SPIPlanPtr *plan)
{
	if (*plan != NULL)
		SPI_freeplan(*plan);
	*plan = NULL;
}

/*
 * sync_write_forget
 *		Frees the plans of all statements on the table.
 */
void
sync_write_forget(SyncTarget *target)
{
	for (int i = 0; i < target->nstatements; i++)
	{
		free_plan(&target->statements[i].update);
		free_plan(&target->statements[i].insert);
		free_plan(&target->statements[i].move);
		bms_free(target->statements[i].columns);
	}
	target->nstatements = 0;
	free_plan(&target->delete_plan);
	free_plan(&target->exists_plan);
	free_plan(&target->occupied_plan);
	free_plan(&target->range_plan);
}

/* ---- is there a row? ---- */

/*
 * sync_write_exists
 *		Tells whether there is a row of that key.
 */
bool
sync_write_exists(SyncTarget *target, const SyncValues *row)
{
	if (target->exists_plan == NULL)
	{
		StringInfoData sql;

		initStringInfo(&sql);
		appendStringInfoString(&sql, "select from ");
		append_target(&sql, target);
		appendStringInfoString(&sql, " where ");
		append_key(&sql, target, 1);
		target->exists_plan = prepare(target, sql.data, NULL, true);
	}
	return execute(target, target->exists_plan, NULL, row) > 0;
}

/*
 * sync_write_occupied
 *		Tells whether a row of that key is there which is not the one of the old
 *		key: two texts of a key may be equal to its type.
 */
bool
sync_write_occupied(SyncTarget *target, const SyncValues *row, const SyncValues *old_key)
{
	SyncValues	key = *row;

	key.columns = sync_target_key_set(target);
	if (target->occupied_plan == NULL)
	{
		StringInfoData sql;
		int			parameter = 0;

		initStringInfo(&sql);
		appendStringInfoString(&sql, "select from ");
		append_target(&sql, target);
		for (int i = -1; (i = bms_next_member(key.columns, i)) >= 0;)
			appendStringInfo(&sql, "%s%s %s $%d", parameter == 0 ? " where " : " and ", operand(&target->columns[i]),
							 equality(target->columns[i].type), parameter + 1),
				parameter++;
		appendStringInfoString(&sql, " and not (");
		append_key(&sql, target, target->nkeys + 1);
		appendStringInfoChar(&sql, ')');
		target->occupied_plan = prepare(target, sql.data, key.columns, true);
	}
	return execute(target, target->occupied_plan, &key, old_key) > 0;
}

/* ---- rows ---- */

/* An UPDATE returns whether columns that it could not set have their value. */
static void
check_identity(const SyncTarget *target)
{
	bool		isnull;

	if (SPI_processed == 0 || SPI_tuptable == NULL || SPI_tuptable->tupdesc->natts == 0 ||
		DatumGetBool(query_value(0, 1, &isnull)))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_GENERATED_ALWAYS),
			 errmsg("an identity column of table %s cannot follow the one of the source", target->qualified),
			 errdetail("It is GENERATED ALWAYS, which no UPDATE can change."),
			 errhint("Use ALTER TABLE ... ALTER COLUMN ... SET GENERATED BY DEFAULT.")));
}

static SPIPlanPtr
prepare_update(SyncTarget *target, Bitmapset *columns, bool with_key)
{
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfoString(&sql, "update ");
	append_target(&sql, target);
	if (!append_set(&sql, target, columns, with_key))
		return NULL;
	appendStringInfoString(&sql, " where ");
	append_key(&sql, target, bms_num_members(columns) + 1);
	append_returning(&sql, target, columns, with_key);
	return prepare(target, sql.data, columns, true);
}

/*
 * Makes sure that a row that was just written is no other subscription's.  What is known of it
 * was loaded before, and the other one may have written it since; now it is locked, or
 * the key is taken.
 */
static void
check_others(const SyncTarget *target, const SyncValues *row)
{
	static CachedQuery query = {
		"select from fanout.sync_row where subscription_id = any ($1) and subscription_id <> $2 and hash = $3"
		" and deleted_at is null"
	};
	Oid			types[] = {INT4ARRAYOID, INT4OID, UUIDOID};
	Datum		values[] = {target->sharers, Int32GetDatum(target->subscription_id), UUIDPGetDatum(&row->hash)};

	if (!target->shared)
		return;
	owner_execute(&query, 3, types, values, NULL);
	if (SPI_processed > 0)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("another subscription has written a row of table %s meanwhile", target->qualified)));
}

/*
 * sync_write_update
 *		Updates the row of that key; false: there is none, or a trigger left it out.
 *
 * If the row has nothing but its key, nothing is written.
 */
bool
sync_write_update(SyncTarget *target, const SyncValues *row)
{
	SyncStatements *statements = find_statements(target, row->columns);
	bool		found;

	if (statements->update == NULL)
		statements->update = prepare_update(target, row->columns, false);
	if (statements->update == NULL)
		return sync_write_exists(target, row);
	found = execute(target, statements->update, row, row) > 0;
	check_identity(target);
	return found;
}

/*
 * sync_write_move
 *		Updates the row of the old key, its key among the rest; false as above.
 */
bool
sync_write_move(SyncTarget *target, const SyncValues *row, const SyncValues *old_key)
{
	SyncStatements *statements = find_statements(target, row->columns);
	bool		found;

	if (statements->move == NULL)
		statements->move = prepare_update(target, row->columns, true);
	if (statements->move == NULL)
		return false;
	found = execute(target, statements->move, row, old_key) > 0;
	check_identity(target);
	check_others(target, row);
	check_others(target, old_key);
	return found;
}

/*
 * sync_write_insert
 *		Inserts the row; false: a trigger left it out.
 */
bool
sync_write_insert(SyncTarget *target, const SyncValues *row)
{
	SyncStatements *statements = find_statements(target, row->columns);

	if (statements->insert == NULL)
	{
		StringInfoData sql;
		int			n = bms_num_members(row->columns);

		initStringInfo(&sql);
		appendStringInfo(&sql, "insert into %s (", target->qualified);
		append_columns(&sql, target, row->columns);
		/* what the source generated as an identity is the row's identity here */
		appendStringInfoString(&sql, ") overriding system value values (");
		for (int i = 1; i <= n; i++)
			appendStringInfo(&sql, "%s$%d", i == 1 ? "" : ", ", i);
		appendStringInfoChar(&sql, ')');
		statements->insert = prepare(target, sql.data, row->columns, false);
	}
	return execute(target, statements->insert, row, NULL) > 0;
}

/*
 * sync_write_put
 *		Makes a row look like that, or inserts it.  False: a trigger left it out.
 */
bool
sync_write_put(SyncTarget *target, const SyncValues *row)
{
	bool		written = sync_write_update(target, row);

	if (!written && !(target->skips_updates && sync_write_exists(target, row)))
		written = sync_write_insert(target, row);
	check_others(target, row);
	return written;
}

/*
 * sync_write_delete
 *		Deletes the row of that key, if there is one; false: a trigger left it out.
 */
bool
sync_write_delete(SyncTarget *target, const SyncValues *key)
{
	bool		found;

	if (target->delete_plan == NULL)
	{
		StringInfoData sql;

		initStringInfo(&sql);
		appendStringInfoString(&sql, "delete from ");
		append_target(&sql, target);
		appendStringInfoString(&sql, " where ");
		append_key(&sql, target, 1);
		target->delete_plan = prepare(target, sql.data, NULL, true);
	}
	found = execute(target, target->delete_plan, NULL, key) > 0;
	check_others(target, key);
	return found || !target->skips_deletes || !sync_write_exists(target, key);
}

/*
 * sync_write_check_constraints
 *		Checks the constraints that are deferred, and fires deferred triggers.
 *
 * At the end of the transaction this would be done with the rights of the role
 * that subscribed, which are none of the table's owner's.  What is deferred again
 * meanwhile would be: an error, 42501, unless the owner has those rights anyway.
 */
void
sync_write_check_constraints(const SyncTarget *target)
{
	MemoryContext context = CurrentMemoryContext;
	Oid			user;
	int			security;

	GetUserIdAndSecContext(&user, &security);
	if (target->untrusted)
		SetUserIdAndSecContext(user, security | SECURITY_RESTRICTED_OPERATION);
	if (SPI_execute("set constraints all immediate", false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not check constraints");
	SetUserIdAndSecContext(user, security);
	MemoryContextSwitchTo(context);
}

/* ---- ranges ---- */

/* Appends "t.a, t.b", in the order of keys. */
static void
append_keys(StringInfo sql, const SyncTarget *target, const int *keys)
{
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(sql, "%st.%s", i == 0 ? "" : ", ", target->columns[keys[i]].local);
}

/* Appends " and row(t.a, t.b) > row($1, $2)". */
static void
append_bound(StringInfo sql, const SyncTarget *target, const int *keys, const char *operator, int first)
{
	appendStringInfoString(sql, " and row(");
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(sql, "%s%s", i == 0 ? "" : ", ", operand(&target->columns[keys[i]]));
	appendStringInfo(sql, ") operator(pg_catalog.%s) row(", operator);
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(sql, "%s$%d", i == 0 ? "" : ", ", first + i);
	appendStringInfoChar(sql, ')');
}

/* Prepares the statement that reads a range, unless it was the last one. */
static void
prepare_range(SyncTarget *target, const int *keys, bool after, bool upto)
{
	StringInfoData sql;
	Oid		   *types = palloc(2 * (target->nkeys + 1) * sizeof(Oid));
	int			n = 0;

	for (int side = 0; side < 2; side++)
	{
		for (int i = 0; (side == 0 ? after : upto) && i < target->nkeys; i++)
			types[n++] = target->columns[keys[i]].type;
	}
	initStringInfo(&sql);
	appendStringInfoString(&sql, "select ");
	for (int i = 0; i < target->ncolumns; i++)
		appendStringInfo(&sql, "%st.%s", i == 0 ? "" : ", ", target->columns[i].local);
	appendStringInfoString(&sql, " from ");
	append_target(&sql, target);
	appendStringInfoString(&sql, " where true");
	if (after)
		append_bound(&sql, target, keys, ">", 1);
	if (upto)
		append_bound(&sql, target, keys, "<=", n - target->nkeys + 1);

	/*
	 * not by an index of the first column alone, in which a range may be all
	 * of the table
	 */
	appendStringInfoString(&sql, " order by ");
	append_keys(&sql, target, keys);
	if (target->range_plan != NULL && strcmp(target->range_sql, sql.data) == 0)
		return;
	free_plan(&target->range_plan);
	target->range_plan = SPI_prepare_cursor(sql.data, n, types, CURSOR_OPT_GENERIC_PLAN);
	if (target->range_plan == NULL || SPI_keepplan(target->range_plan) != 0)
		elog(ERROR, "could not prepare \"%s\": %s", sql.data, SPI_result_code_string(SPI_result));
	target->range_sql = MemoryContextStrdup(target->context, sql.data);
}

/*
 * sync_write_open_range
 *		Opens a cursor over the rows of a range of keys: all columns, in their order.
 *
 * keys: indexes of the columns in whose order keys are compared, the key's; types
 * that have no order of PostgreSQL's own must not get here.  after: NULL, or the
 * key behind which the range begins; upto: NULL, or the last one of it.
 */
Portal
sync_write_open_range(SyncTarget *target, const int *keys, const SyncValues *after, const SyncValues *upto)
{
	Datum	   *values = palloc(2 * (target->nkeys + 1) * sizeof(Datum));
	MemoryContext context = CurrentMemoryContext;
	Portal		cursor;
	int			n = 0;

	prepare_range(target, keys, after != NULL, upto != NULL);
	for (int i = 0; after != NULL && i < target->nkeys; i++)
		values[n++] = after->values[keys[i]];
	for (int i = 0; upto != NULL && i < target->nkeys; i++)
		values[n++] = upto->values[keys[i]];
	query_plan_by_index(target->range_plan);
	cursor = SPI_cursor_open(NULL, target->range_plan, values, NULL, false);
	MemoryContextSwitchTo(context);
	return cursor;
}

/* ---- TRUNCATE ---- */

/* Does a foreign key refer from the table, or from a part of it, to another part, or to itself? */
static bool
refers_to_itself(const SyncTarget *target)
{
	static CachedQuery query = {
		"select exists (select from pg_catalog.pg_constraint where contype = 'f'"
		" and (conrelid = $1 or conrelid in (select relid from pg_catalog.pg_partition_tree($1)))"
		" and (confrelid = $1 or confrelid in (select relid from pg_catalog.pg_partition_tree($1))"
		" or confrelid in (select relid from pg_catalog.pg_partition_ancestors($1))))"
	};
	Oid			types[] = {OIDOID};
	Datum		values[] = {ObjectIdGetDatum(target->relid)};
	bool		isnull;

	owner_execute(&query, 1, types, values, NULL);
	return DatumGetBool(query_value(0, 1, &isnull));
}

/*
 * Tells whether TRUNCATE does what deleting all rows would: nothing younger is
 * there, nor a row of another subscription; no trigger looks at rows that are
 * deleted, those of foreign keys included, but for one from the table to itself; and
 * the owner may.
 */
static bool
may_truncate(const SyncTarget *target, int64 sequence)
{
	static CachedQuery query = {
		"with part as materialized (select $4 as relid union select relid from pg_catalog.pg_partition_tree($4))"
		" select not exists (select from fanout.sync_row where subscription_id = $1 and sequence > $2 and deleted_at is null)"
		" and pg_catalog.has_table_privilege($3, $4, 'truncate')"
		" and not exists (select from pg_catalog.pg_trigger tr"
		" where tr.tgrelid in (select relid from part) and tr.tgtype & 9 = 9 and tr.tgenabled <> 'D'"
		" and not (tr.tgisinternal and tr.tgconstrrelid in (select relid from part)))"
	};
	Oid			types[] = {INT4OID, INT8OID, OIDOID, OIDOID};
	Datum		values[] = {
		Int32GetDatum(target->subscription_id), Int64GetDatum(sequence),
		ObjectIdGetDatum(target->owner), ObjectIdGetDatum(target->relid)
	};
	bool		isnull;

	owner_execute(&query, 4, types, values, NULL);
	return DatumGetBool(query_value(0, 1, &isnull)) && !target->shared;
}

/* Who reads the table may do so for hours: then rows are deleted instead. */
static bool
truncate_at_once(const SyncTarget *target)
{
	if (!ConditionalLockRelationOid(target->relid, AccessExclusiveLock))
		return false;
	if (SPI_execute(psprintf("truncate %s%s", target->partitioned ? "" : "only ", target->qualified),
					false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not truncate the table");
	return true;
}

/* Reads keys of a piece of the table out of the cursor's result. */
static SyncValues *
read_piece(const SyncTarget *target, int count, SyncHash *hashes)
{
	SyncValues *keys = palloc0((count + 1) * sizeof(SyncValues));

	for (int i = 0; i < count; i++)
	{
		keys[i].values = palloc0(target->ncolumns * sizeof(Datum));
		keys[i].nulls = palloc0(target->ncolumns * sizeof(bool));
		for (int k = 0; k < target->nkeys; k++)
			keys[i].values[target->keys[k]] = query_value(i, k + 1, &keys[i].nulls[target->keys[k]]);
		sync_target_hash_key(target, keys[i].values, keys[i].nulls, &keys[i].hash);
		hashes[i] = keys[i].hash;
	}
	return keys;
}

/*
 * Deletes those rows of a piece that the TRUNCATE is newer than.  In a table
 * that other subscriptions write, these are the rows that this one has written.
 */
static void
delete_piece(SyncTarget *target, int count, int64 sequence)
{
	SyncHash   *hashes = palloc((count + 1) * sizeof(SyncHash));
	SyncValues *keys = read_piece(target, count, hashes);

	sync_rows_load(target->subscription_id, target->sharers, hashes, count);
	for (int i = 0; i < count; i++)
	{
		SyncRow    *known = sync_rows_find(&hashes[i]);

		if (known->live && known->sequence > sequence)
			continue;
		if (!target->shared || (known->live && !known->foreign))
			(void) sync_write_delete(target, &keys[i]);
	}
}

/* Deletes the rows that the TRUNCATE is newer than, piece by piece. */
static void
delete_pieces(SyncTarget *target, int64 sequence, void (*between) (void))
{
	MemoryContext context = CurrentMemoryContext;
	MemoryContext piece = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout sync piece", ALLOCSET_DEFAULT_SIZES);
	StringInfoData sql;
	Portal		cursor;
	SPIPlanPtr	plan;

	initStringInfo(&sql);
	appendStringInfoString(&sql, "select ");
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(&sql, "%st.%s", i == 0 ? "" : ", ", target->columns[target->keys[i]].local);
	appendStringInfoString(&sql, " from ");
	append_target(&sql, target);
	plan = SPI_prepare(sql.data, 0, NULL);
	cursor = SPI_cursor_open(NULL, plan, NULL, NULL, false);
	for (;;)
	{
		SPITupleTable *rows;

		SPI_cursor_fetch(cursor, true, PIECE);
		rows = SPI_tuptable;
		if (SPI_processed == 0)
			break;
		MemoryContextSwitchTo(piece);
		delete_piece(target, SPI_processed, sequence);
		MemoryContextSwitchTo(context);
		SPI_freetuptable(rows);
		MemoryContextReset(piece);
		between();
	}
	SPI_cursor_close(cursor);
	MemoryContextSwitchTo(context);
}

/*
 * Rows that refer to each other can only go together: triggers of all deletes are fired
 * behind them, as those of one statement.  That takes the memory and the time of one.
 */
static void
delete_together(SyncTarget *target, int64 sequence, void (*between) (void))
{
	AfterTriggerBeginQuery();
	target->queues_triggers = true;
	delete_pieces(target, sequence, between);
	target->queues_triggers = false;
	AfterTriggerEndQuery(NULL);
}

/*
 * sync_write_truncate
 *		Removes all rows that a TRUNCATE of the source removed: those of this
 *		subscription of which nothing younger was applied.
 *
 * In pieces, if it takes deletes; between() is called after each.  What was
 * loaded of rows is gone afterwards.
 */
void
sync_write_truncate(SyncTarget *target, int64 sequence, void (*between) (void))
{
	if (!may_truncate(target, sequence) || !truncate_at_once(target))
	{
		if (refers_to_itself(target))
			delete_together(target, sequence, between);
		else
			delete_pieces(target, sequence, between);
	}
	sync_rows_forget(target->subscription_id, sequence, between);
}
