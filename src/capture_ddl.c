/*-------------------------------------------------------------------------
 *
 * capture_ddl.c
 *		What fanout.capture() needs of the parser and the catalogs.
 *
 * Only helpers of the SQL functions: nothing here runs when rows are written.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/event_trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "nodes/parsenodes.h"
#include "parser/parser.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"

#include "compat.h"
#include "relinfo.h"

PG_FUNCTION_INFO_V1(pgf_trigger_arguments);
PG_FUNCTION_INFO_V1(pgf_set_trigger_arguments);
PG_FUNCTION_INFO_V1(pgf_lock_capture);
PG_FUNCTION_INFO_V1(pgf_condition_for);
PG_FUNCTION_INFO_V1(pgf_column_altered);

Datum
pgf_trigger_arguments(PG_FUNCTION_ARGS)
{
	int			nargs;
	Oid			relid;
	Oid			parent;
	char	  **args = relinfo_trigger_arguments(PG_GETARG_OID(0), &nargs, &relid, &parent);
	Datum	   *elements;

	if (args == NULL)
		PG_RETURN_NULL();
	elements = palloc((nargs + 1) * sizeof(Datum));
	for (int i = 0; i < nargs; i++)
		elements[i] = CStringGetTextDatum(args[i]);
	PG_RETURN_ARRAYTYPE_P(construct_array(elements, nargs, TEXTOID, -1, false, TYPALIGN_INT));
}

/* The form in which pg_trigger keeps them: NUL-terminated, one after another. */
static bytea *
pack_arguments(Datum *arguments, int nargs)
{
	StringInfoData packed;
	bytea	   *result;

	initStringInfo(&packed);
	for (int i = 0; i < nargs; i++)
	{
		appendStringInfoString(&packed, TextDatumGetCString(arguments[i]));
		appendStringInfoChar(&packed, '\0');
	}
	result = palloc(VARHDRSZ + packed.len);
	SET_VARSIZE(result, VARHDRSZ + packed.len);
	memcpy(VARDATA(result), packed.data, packed.len);
	return result;
}

static void
update_trigger(HeapTuple tuple, Relation rel, bytea *packed)
{
	Datum		values[Natts_pg_trigger] = {0};
	bool		nulls[Natts_pg_trigger] = {0};
	bool		replace[Natts_pg_trigger] = {0};
	HeapTuple	copy;

	values[Anum_pg_trigger_tgargs - 1] = PointerGetDatum(packed);
	replace[Anum_pg_trigger_tgargs - 1] = true;
	copy = heap_modify_tuple(tuple, RelationGetDescr(rel), values, nulls, replace);
	CatalogTupleUpdate(rel, &copy->t_self, copy);
	CacheInvalidateRelcacheByRelid(((Form_pg_trigger) GETSTRUCT(tuple))->tgrelid);
}

/*
 * Writes pg_trigger as ALTER TRIGGER ... RENAME does, for there is no command
 * that changes arguments, and CREATE OR REPLACE TRIGGER would have to be fed
 * with the deparsed condition of a trigger that may be somebody else's.  The
 * caller's ALTER TABLE holds the lock that keeps the table's triggers still.
 */
Datum
pgf_set_trigger_arguments(PG_FUNCTION_ARGS)
{
	Relation	rel = table_open(TriggerRelationId, RowExclusiveLock);
	Datum	   *arguments;
	bool	   *nulls;
	int			nargs;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	/* granted by mistake, it would open all tables' triggers */
	if (!superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be superuser to call %s", "fanout.set_trigger_arguments()")));
	if (array_contains_nulls(PG_GETARG_ARRAYTYPE_P(1)))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("arguments of a trigger must not be null")));
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT,
					  &arguments, &nulls, &nargs);
	ScanKeyInit(&key, Anum_pg_trigger_oid, BTEqualStrategyNumber, F_OIDEQ, PG_GETARG_DATUM(0));
	scan = systable_beginscan(rel, TriggerOidIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (!HeapTupleIsValid(tuple) || ((Form_pg_trigger) GETSTRUCT(tuple))->tgnargs != nargs)
		elog(ERROR, "trigger %u has not %d arguments", PG_GETARG_OID(0), nargs);
	update_trigger(tuple, rel, pack_arguments(arguments, nargs));
	systable_endscan(scan);
	table_close(rel, RowExclusiveLock);
	PG_RETURN_VOID();
}

/*
 * An advisory lock that no pg_advisory_lock() can take, since those have 1 or 2
 * in the last field: everybody may call them, and nobody shall be able to keep
 * an administrator waiting.
 */
Datum
pgf_lock_capture(PG_FUNCTION_ARGS)
{
	LOCKTAG		tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, TriggerRelationId, PG_GETARG_OID(0), 3);
	(void) LockAcquire(&tag, ExclusiveLock, false, false);
	PG_RETURN_VOID();
}

/* ---- conditions ---- */

/*
 * The condition is written over OLD and NEW, but a trigger on INSERT must not
 * mention OLD, nor one on DELETE NEW.  There the missing row is replaced in
 * the text by a NULL of the table's row type; the places are found by the
 * server's own parser.
 */
typedef struct Place
{
	int			location;
	bool		star;			/* old.* */
} Place;

typedef struct MissingRow
{
	const char *name;			/* "old" or "new" */
	int			count;
	Place		places[100];
} MissingRow;

static bool
is_star(ColumnRef *ref)
{
	return list_length(ref->fields) == 2 && IsA(lsecond(ref->fields), A_Star);
}

static bool
find_missing(Node *node, void *arg)
{
	MissingRow *missing = arg;

	if (node == NULL)
		return false;
	if (IsA(node, ColumnRef))
	{
		ColumnRef  *ref = (ColumnRef *) node;

		if (IsA(linitial(ref->fields), String) &&
			strcmp(strVal(linitial(ref->fields)), missing->name) == 0)
		{
			if (missing->count == lengthof(missing->places))
				ereport(ERROR,
						(errcode(ERRCODE_STATEMENT_TOO_COMPLEX),
						 errmsg("condition mentions %s more than %d times", missing->name,
								(int) lengthof(missing->places))));
			missing->places[missing->count].location = ref->location;
			missing->places[missing->count++].star = is_star(ref);
		}
		return false;
	}
	return raw_expression_tree_walker(node, find_missing, missing);
}

/*
 * Parses "select (<condition>)" and makes sure that it is one expression and
 * nothing else, so that the text can be put between parentheses elsewhere.
 */
static Node *
parse_condition(const char *sql)
{
	List	   *parsed = raw_parser(sql, RAW_PARSE_DEFAULT);
	SelectStmt *select;

	if (list_length(parsed) == 1 && IsA(((RawStmt *) linitial(parsed))->stmt, SelectStmt))
	{
		select = (SelectStmt *) ((RawStmt *) linitial(parsed))->stmt;
		if (select->op == SETOP_NONE && list_length(select->targetList) == 1 &&
			((ResTarget *) linitial(select->targetList))->name == NULL &&
			select->fromClause == NIL && select->whereClause == NULL &&
			select->groupClause == NIL && select->havingClause == NULL &&
			select->windowClause == NIL && select->sortClause == NIL &&
			select->limitCount == NULL && select->limitOffset == NULL &&
			select->lockingClause == NIL && select->intoClause == NULL)
			return ((ResTarget *) linitial(select->targetList))->val;
	}
	ereport(ERROR,
			(errcode(ERRCODE_SYNTAX_ERROR),
			 errmsg("condition must be a single expression over OLD and NEW")));
	return NULL;				/* keep compiler quiet */
}

/*
 * Length of name, or name.*, as written at s: in any case, or quoted, with
 * blanks before the star.  What only the server's scanner could tell the
 * length of (U&"\006fld") is refused.
 */
static int
written_length(const char *s, const char *name, bool star)
{
	int			len = strlen(name);
	bool		quoted = (*s == '"');
	const char *end = s + len + (quoted ? 2 : 0);

	if (pg_strncasecmp(s + (quoted ? 1 : 0), name, len) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 errmsg("condition must not write %s with escapes", name)));
	if (star)
	{
		end = strchr(end, '*');
		return end == NULL ? 0 : end + 1 - s;
	}
	return end - s;
}

/* The walker visits position(a in b) as b, a. */
static int
compare_places(const void *a, const void *b)
{
	return ((const Place *) a)->location - ((const Place *) b)->location;
}

Datum
pgf_condition_for(PG_FUNCTION_ARGS)
{
	char	   *operation = text_to_cstring(PG_GETARG_TEXT_PP(0));
	Oid			entity = PG_GETARG_OID(1);
	char	   *condition = text_to_cstring(PG_GETARG_TEXT_PP(2));
	char	   *sql = psprintf("select (%s\n)", condition);
	MissingRow	missing = {0};
	StringInfoData out;
	int			done = strlen("select (");
	Node	   *expression = parse_condition(sql);

	if (get_rel_name(entity) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", entity)));
	if (strcmp(operation, "update") == 0)
		PG_RETURN_TEXT_P(cstring_to_text(condition));
	missing.name = (strcmp(operation, "insert") == 0) ? "old" : "new";
	(void) find_missing(expression, &missing);
	qsort(missing.places, missing.count, sizeof(Place), compare_places);

	initStringInfo(&out);
	for (int i = 0; i < missing.count; i++)
	{
		int			location = missing.places[i].location;

		if (location < done)
			elog(ERROR, "overlapping references in condition");
		appendBinaryStringInfo(&out, sql + done, location - done);
		appendStringInfo(&out, "(null::%s)",
						 quote_qualified_identifier(get_namespace_name(get_rel_namespace(entity)),
													get_rel_name(entity)));
		done = location + written_length(sql + location, missing.name, missing.places[i].star);
	}
	appendBinaryStringInfo(&out, sql + done, strlen(sql) - done - strlen("\n)"));
	PG_RETURN_TEXT_P(cstring_to_text_with_len(out.data, out.len));
}

/* ---- renamed and dropped columns ---- */

static void
call_for_altered_tables(const char *sql, const char *old_name, const char *new_name)
{
	Oid			types[2] = {TEXTOID, TEXTOID};
	Datum		values[2] = {CStringGetTextDatum(old_name), CStringGetTextDatum(new_name)};

	if (SPI_execute_with_args(sql, 2, types, values, NULL, false, 0) < 0)
		elog(ERROR, "could not look after captures of an altered table");
}

static void
column_dropped(AlterTableStmt *stmt)
{
	ListCell   *lc;

	foreach(lc, stmt->cmds)
	{
		AlterTableCmd *cmd = lfirst_node(AlterTableCmd, lc);

		if (cmd->subtype == AT_DropColumn)
			call_for_altered_tables("select fanout.column_dropped(objid, $1)"
									" from pg_event_trigger_ddl_commands() where classid = 'pg_class'::regclass and $2 is not null",
									cmd->name, "");
	}
}

Datum
pgf_column_altered(PG_FUNCTION_ARGS)
{
	Node	   *parsetree;

	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be called by an event trigger", "fanout.column_altered")));
	parsetree = ((EventTriggerData *) fcinfo->context)->parsetree;

	SPI_connect();
	if (IsA(parsetree, AlterTableStmt))
		column_dropped((AlterTableStmt *) parsetree);
	else if (IsA(parsetree, RenameStmt) && ((RenameStmt *) parsetree)->renameType == OBJECT_COLUMN)
		call_for_altered_tables("select fanout.column_renamed(objid, $1, $2)"
								" from pg_event_trigger_ddl_commands() where classid = 'pg_class'::regclass",
								((RenameStmt *) parsetree)->subname, ((RenameStmt *) parsetree)->newname);
	SPI_finish();
	PG_RETURN_NULL();
}
