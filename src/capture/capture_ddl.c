/*-------------------------------------------------------------------------
 *
 * capture_ddl.c
 *		What fanout.capture() needs of the parser and the catalogs.
 *
 * Makes the conditions of capture triggers from what users write, finds out
 * whether they can be evaluated, and changes the arguments of triggers.  It
 * must never run when rows are written.
 *
 * Conditions are edited as text, at places that the server's own parser finds,
 * and become WHEN conditions of triggers.  So the server keeps them: by column
 * number, with dependencies, in each partition, and in dumps.
 *
 * Locks: those of CREATE TRIGGER, and one that makes sessions that capture the
 * same table take turns.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/transam.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "nodes/parsenodes.h"
#include "optimizer/optimizer.h"
#include "parser/parser.h"
#include "storage/lock.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/plancache.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "capture/cache.h"
#include "server/compat.h"

PG_FUNCTION_INFO_V1(pgf_trigger_arguments);
PG_FUNCTION_INFO_V1(pgf_set_trigger_arguments);
PG_FUNCTION_INFO_V1(pgf_lock_capture);
PG_FUNCTION_INFO_V1(pgf_condition_for);
PG_FUNCTION_INFO_V1(pgf_row_condition);
PG_FUNCTION_INFO_V1(pgf_condition_names_columns);
PG_FUNCTION_INFO_V1(pgf_condition_problem);
PG_FUNCTION_INFO_V1(pgf_condition_is_never_true);
PG_FUNCTION_INFO_V1(pgf_condition_counts_too_often);
PG_FUNCTION_INFO_V1(pgf_capture);
PG_FUNCTION_INFO_V1(pgf_uncapture);

static bool is_null(Node *node);

Datum
pgf_trigger_arguments(PG_FUNCTION_ARGS)
{
	int			nargs;
	Oid			relid;
	Oid			parent;
	char	   *name;
	char	  **args = cache_trigger_arguments(PG_GETARG_OID(0), &nargs, &relid, &parent, &name);
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
update_trigger(HeapTuple tuple, Relation rel, int nargs, bytea *packed)
{
	Datum		values[Natts_pg_trigger] = {0};
	bool		nulls[Natts_pg_trigger] = {0};
	bool		replace[Natts_pg_trigger] = {0};
	HeapTuple	copy;

	values[Anum_pg_trigger_tgnargs - 1] = Int16GetDatum(nargs);
	replace[Anum_pg_trigger_tgnargs - 1] = true;
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
 * caller holds a lock that keeps the table's triggers still.
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
	if (!HeapTupleIsValid(tuple) || nargs > PG_INT16_MAX)
		elog(ERROR, "trigger %u cannot have %d arguments", PG_GETARG_OID(0), nargs);
	update_trigger(tuple, rel, nargs, pack_arguments(arguments, nargs));
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

/* One change of a condition's text: length bytes at location become text. */
typedef struct Edit
{
	int			location;
	int			length;
	const char *text;
} Edit;

#define MAX_EDITS 1000

typedef struct EditList
{
	const char *sql;			/* "select (<condition>)" */
	const char *row;			/* name of a row: the only one, or that is
								 * missing */
	const char *table;			/* name of the table, where rows have it */
	const char *replacement;
	Oid			entity;
	bool		typed;			/* below what needs a row of the table's type */
	int			count;
	Edit		edits[MAX_EDITS];
	bool		names_columns;	/* a column of OLD or NEW is named */
} EditList;

static void
add_edit(EditList *list, int location, int length, const char *text)
{
	if (list->count == MAX_EDITS)
		ereport(ERROR,
				(errcode(ERRCODE_STATEMENT_TOO_COMPLEX),
				 errmsg("condition names rows or columns more than %d times", MAX_EDITS)));
	list->edits[list->count].location = location;
	list->edits[list->count].length = length;
	list->edits[list->count++].text = text;
}

/* The name that a reference begins with; "" if it is none. */
static const char *
first_name(ColumnRef *ref)
{
	return IsA(linitial(ref->fields), String) ? strVal(linitial(ref->fields)) : "";
}

static bool
is_star(ColumnRef *ref)
{
	return list_length(ref->fields) == 2 && IsA(lsecond(ref->fields), A_Star);
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

/* Points an error at the condition, not at the statement that called us. */
static void
condition_context(void *arg)
{
	int			position = geterrposition();

	if (position > 0)
	{
		errposition(0);
		internalerrposition(position);
		internalerrquery(arg);
	}
}

/*
 * Parses "select <condition>" and makes sure that it is one expression and nothing
 * else.
 */
static Node *
parse_expression(const char *sql)
{
	ErrorContextCallback context = {error_context_stack, condition_context, unconstify(char *, sql)};
	List	   *parsed;
	SelectStmt *select;

	error_context_stack = &context;
	parsed = raw_parser(sql, RAW_PARSE_DEFAULT);
	error_context_stack = context.previous;
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
			 errmsg("condition must be a single expression")));
	return NULL;				/* keep compiler quiet */
}

/*
 * Parses a condition in "select (<condition>)".  It must also be an expression
 * without the parentheses, so that the text can be put between others.
 */
static Node *
parse_condition(const char *condition, const char *sql)
{
	(void) parse_expression(psprintf("select %s\n", condition));
	return parse_expression(sql);
}

/* The walker visits position(a in b) as b, a. */
static int
compare_edits(const void *a, const void *b)
{
	return ((const Edit *) a)->location - ((const Edit *) b)->location;
}

/*
 * Finds what a walker wants to edit in a condition, and returns the condition
 * with the edits made.
 */
static text *
edit_condition(EditList *list, const char *condition, bool (*walker) (Node *node, void *arg))
{
	StringInfoData out;
	int			done = strlen("select (");

	list->sql = psprintf("select (%s\n)", condition);
	(void) walker(parse_condition(condition, list->sql), list);
	qsort(list->edits, list->count, sizeof(Edit), compare_edits);
	initStringInfo(&out);
	for (int i = 0; i < list->count; i++)
	{
		Edit	   *edit = &list->edits[i];

		if (edit->location < done)
			elog(ERROR, "overlapping references in condition");
		appendBinaryStringInfo(&out, list->sql + done, edit->location - done);
		appendStringInfoString(&out, edit->text);
		done = edit->location + edit->length;
	}
	appendBinaryStringInfo(&out, list->sql + done, strlen(list->sql) - done - strlen("\n)"));
	return cstring_to_text_with_len(out.data, out.len);
}

static void
check_entity(Oid entity)
{
	if (get_rel_name(entity) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", entity)));
}

static char *
collation_name(Oid collation)
{
	HeapTuple	tuple = SearchSysCache1(COLLOID, ObjectIdGetDatum(collation));
	Form_pg_collation form;
	char	   *name;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for collation %u", collation);
	form = (Form_pg_collation) GETSTRUCT(tuple);
	name = quote_qualified_identifier(get_namespace_name(form->collnamespace), NameStr(form->collname));
	ReleaseSysCache(tuple);
	return name;
}

/*
 * A NULL in the place of a column of the missing row: of the column's type and
 * collation.  Such conditions do not depend on the table's row type, which would
 * keep the server from rewriting the table.
 */
static char *
null_column(Oid entity, const char *column)
{
	HeapTuple	tuple = SearchSysCacheAttName(entity, column);
	Form_pg_attribute attr;
	StringInfoData null;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of table \"%s\" does not exist", column, get_rel_name(entity))));
	attr = (Form_pg_attribute) GETSTRUCT(tuple);
	initStringInfo(&null);
	appendStringInfo(&null, "(null::%s",
					 format_type_extended(attr->atttypid, attr->atttypmod,
										  FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY));
	if (OidIsValid(attr->attcollation) && attr->attcollation != get_typcollation(attr->atttypid))
		appendStringInfo(&null, " collate %s", collation_name(attr->attcollation));
	appendStringInfoChar(&null, ')');
	ReleaseSysCache(tuple);
	return null.data;
}

/* Length of a reference to a column, "row.column", in which blanks may stand. */
static int
reference_length(const char *sql, int location, const char *row, const char *column)
{
	const char *s = sql + location + written_length(sql + location, row, false);

	while (isspace((unsigned char) *s))
		s++;
	if (*s != '.')
		return 0;
	s++;
	while (isspace((unsigned char) *s))
		s++;
	if (*s != '"' && pg_strncasecmp(s, column, strlen(column)) != 0)
		return 0;
	if (*s == '"' && strncmp(s + 1, column, strlen(column)) != 0)
		return 0;
	return s + strlen(column) + (*s == '"' ? 2 : 0) - (sql + location);
}

/* Replaces a reference to the row that the operation does not have. */
static void
replace_reference(EditList *list, ColumnRef *ref)
{
	int			length = 0;

	if (list_length(ref->fields) == 2 && !is_star(ref))
	{
		const char *column = strVal(lsecond(ref->fields));

		length = reference_length(list->sql, ref->location, list->row, column);
		if (length > 0)
		{
			add_edit(list, ref->location, length, null_column(list->entity, column));
			return;
		}
	}
	/* comparisons take any row; what else there is, one of the table's type */
	length = written_length(list->sql + ref->location, list->row, is_star(ref));
	add_edit(list, ref->location, length,
			 list->typed || list_length(ref->fields) > 1 + is_star(ref) ? list->replacement : "(null::record)");
}

/* Finds each reference to the row that the operation does not have. */
static bool
replace_missing_row(Node *node, void *arg)
{
	EditList   *list = arg;
	bool		typed = list->typed;
	bool		done;

	if (node == NULL)
		return false;
	if (IsA(node, ColumnRef))
	{
		if (strcmp(first_name((ColumnRef *) node), list->row) == 0)
			replace_reference(list, (ColumnRef *) node);
		return false;
	}
	list->typed = typed || IsA(node, FuncCall) || IsA(node, A_Indirection) || IsA(node, A_ArrayExpr) ||
		IsA(node, MinMaxExpr) || IsA(node, CaseExpr) || IsA(node, CoalesceExpr);
	done = raw_expression_tree_walker(node, replace_missing_row, arg);
	list->typed = typed;
	return done;
}

/*
 * Makes a condition over OLD and NEW one for a single operation: a trigger on
 * INSERT must not mention OLD, nor one on DELETE NEW, so a NULL of the table's
 * row type takes their place.
 */
Datum
pgf_condition_for(PG_FUNCTION_ARGS)
{
	char	   *operation = text_to_cstring(PG_GETARG_TEXT_PP(0));
	Oid			entity = PG_GETARG_OID(1);
	char	   *condition = text_to_cstring(PG_GETARG_TEXT_PP(2));
	EditList	list = {0};

	check_entity(entity);
	if (strcmp(operation, "update") == 0)
	{
		(void) parse_condition(condition, psprintf("select (%s\n)", condition));
		PG_RETURN_DATUM(PG_GETARG_DATUM(2));
	}
	list.entity = entity;
	list.row = (strcmp(operation, "insert") == 0) ? "old" : "new";
	list.replacement = psprintf("(null::%s)",
								quote_qualified_identifier(get_namespace_name(get_rel_namespace(entity)),
														   get_rel_name(entity)));
	PG_RETURN_TEXT_P(edit_condition(&list, condition, replace_missing_row));
}

/*
 * Puts the row's name before each column, and in the place of the table's name.
 */
static bool
qualify_columns(Node *node, void *arg)
{
	EditList   *list = arg;
	ColumnRef  *ref = (ColumnRef *) node;

	if (node == NULL)
		return false;
	if (!IsA(node, ColumnRef))
		return raw_expression_tree_walker(node, qualify_columns, arg);
	if (list_length(ref->fields) == 1)
		add_edit(list, ref->location, 0, list->replacement);
	else if (strcmp(first_name(ref), list->table) == 0)
		add_edit(list, ref->location, written_length(list->sql + ref->location, list->table, false), list->row);
	else
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_COLUMN_REFERENCE),
				 errmsg("condition on the row must name its columns alone, as in a WHERE clause"),
				 errdetail("\"%s\" is not the table.", first_name(ref)),
				 errhint("Conditions over OLD and NEW go into \"when\".")));
	return false;
}

/* Makes a condition on a table's columns one on the columns of OLD or of NEW. */
Datum
pgf_row_condition(PG_FUNCTION_ARGS)
{
	char	   *row = text_to_cstring(PG_GETARG_TEXT_PP(0));
	Oid			entity = PG_GETARG_OID(1);
	char	   *condition = text_to_cstring(PG_GETARG_TEXT_PP(2));
	EditList	list = {0};

	check_entity(entity);
	list.row = row;
	list.table = get_rel_name(entity);
	list.replacement = psprintf("%s.", row);
	PG_RETURN_TEXT_P(edit_condition(&list, condition, qualify_columns));
}

static bool
find_column_names(Node *node, void *arg)
{
	ColumnRef  *ref = (ColumnRef *) node;

	if (node == NULL)
		return false;
	if (!IsA(node, ColumnRef))
		return raw_expression_tree_walker(node, find_column_names, arg);
	if (list_length(ref->fields) > 1 && !is_star(ref))
		((EditList *) arg)->names_columns = true;
	return false;
}

/*
 * Tells whether a condition over OLD and NEW names single columns.  Copies of
 * the rows may differ from them then, since some changes are not sent.
 */
Datum
pgf_condition_names_columns(PG_FUNCTION_ARGS)
{
	EditList	list = {0};

	(void) edit_condition(&list, text_to_cstring(PG_GETARG_TEXT_PP(0)), find_column_names);
	PG_RETURN_BOOL(list.names_columns);
}

/* ---- conditions that fail for some rows ---- */

/* Is there an equality operator, or an order, for all values of the type? */
static bool
is_comparable(Oid type, bool ordered)
{
	TypeCacheEntry *entry = lookup_type_cache(type, ordered ? TYPECACHE_CMP_PROC : TYPECACHE_EQ_OPR);

	return OidIsValid(ordered ? entry->cmp_proc : entry->eq_opr);
}

/*
 * Describes why values of a type cannot be compared; NULL if they can.  The
 * server finds that out of rows and arrays only when it compares two.
 */
static char *
comparison_problem(Oid type, bool ordered)
{
	TupleDesc	desc;
	char	   *problem = NULL;

	if (type_is_range(type) || type_is_multirange(type))
	{
		type = type_is_multirange(type) ? get_multirange_range(type) : type;
		return comparison_problem(get_range_subtype(type), true);
	}
	if (type == RECORDOID || is_comparable(type, ordered))
		return NULL;
	if (!type_is_rowtype(type))
		return psprintf("Values of type %s cannot be compared.", format_type_be(type));
	desc = lookup_rowtype_tupdesc_domain(type, -1, false);
	for (int i = 0; i < desc->natts && problem == NULL; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i);

		if (!attr->attisdropped && !is_comparable(attr->atttypid, ordered))
			problem = psprintf("It compares whole rows, and column \"%s\" is of type %s, which has no %s.",
							   NameStr(attr->attname), format_type_be(attr->atttypid),
							   ordered ? "order" : "equality operator");
	}
	ReleaseTupleDesc(desc);
	return problem;
}

/* Does the operator, of rows or arrays, need an order rather than equality? */
static bool
needs_order(Oid function)
{
	switch (function)
	{
		case F_RECORD_LT:
		case F_RECORD_LE:
		case F_RECORD_GT:
		case F_RECORD_GE:
		case F_ARRAY_LT:
		case F_ARRAY_LE:
		case F_ARRAY_GT:
		case F_ARRAY_GE:
			return true;
		default:
			return false;
	}
}

/* Compares by the bytes, hence any row. */
static bool
compares_images(Oid function)
{
	switch (function)
	{
		case F_RECORD_IMAGE_EQ:
		case F_RECORD_IMAGE_NE:
		case F_RECORD_IMAGE_LT:
		case F_RECORD_IMAGE_LE:
		case F_RECORD_IMAGE_GT:
		case F_RECORD_IMAGE_GE:
			return true;
		default:
			return false;
	}
}

/*
 * Describes why an operand cannot be compared; NULL if it can.  Of a row that is
 * written out, the parts count.
 */
static char *
problem_of_operand(Node *operand, bool ordered)
{
	Oid			type;
	ListCell   *lc;

	if (IsA(operand, RelabelType))
		return problem_of_operand((Node *) ((RelabelType *) operand)->arg, ordered);
	if (IsA(operand, RowExpr))
	{
		foreach(lc, ((RowExpr *) operand)->args)
		{
			char	   *problem = problem_of_operand(lfirst(lc), ordered);

			if (problem != NULL)
				return problem;
		}
		return NULL;
	}
	if (IsA(operand, ArrayExpr) && ((ArrayExpr *) operand)->element_typeid == RECORDOID)
	{
		foreach(lc, ((ArrayExpr *) operand)->elements)
		{
			char	   *problem = problem_of_operand(lfirst(lc), ordered);

			if (problem != NULL)
				return problem;
		}
		return NULL;
	}
	type = getBaseType(exprType(operand));
	return type == RECORDARRAYOID ? NULL : comparison_problem(type, ordered);
}

/* Functions, not operators, that compare rows or elements of arrays. */
static bool
compares_operands(Oid function)
{
	switch (function)
	{
		case F_RECORD_EQ:
		case F_RECORD_NE:
		case F_RECORD_LT:
		case F_RECORD_LE:
		case F_RECORD_GT:
		case F_RECORD_GE:
		case F_BTRECORDCMP:
		case F_HASH_RECORD:
		case F_ARRAY_EQ:
		case F_ARRAY_NE:
		case F_ARRAY_LT:
		case F_ARRAY_LE:
		case F_ARRAY_GT:
		case F_ARRAY_GE:
		case F_BTARRAYCMP:
		case F_HASH_ARRAY:
		case F_ARRAY_LARGER:
		case F_ARRAY_SMALLER:
		case F_ARRAY_POSITION_ANYCOMPATIBLEARRAY_ANYCOMPATIBLE:
		case F_ARRAY_POSITION_ANYCOMPATIBLEARRAY_ANYCOMPATIBLE_INT4:
		case F_ARRAY_POSITIONS:
		case F_ARRAY_REMOVE:
		case F_ARRAY_REPLACE:
		case F_WIDTH_BUCKET_ANYCOMPATIBLE_ANYCOMPATIBLEARRAY:
			return true;
		default:
			return false;
	}
}

/*
 * Operands of the server's own operators and functions.  Others look at rows as
 * they like.
 */
static char *
problem_of_operands(Oid function, List *args)
{
	ListCell   *lc;

	if (function >= FirstNormalObjectId || compares_images(function))
		return NULL;
	foreach(lc, args)
	{
		Oid			type = getBaseType(exprType(lfirst(lc)));
		char	   *problem;

		if (!type_is_rowtype(type) && !type_is_array(type) && !type_is_range(type) && !type_is_multirange(type))
			continue;
		problem = problem_of_operand(lfirst(lc), needs_order(function));
		if (problem != NULL)
			return problem;
	}
	return NULL;
}

static char *
problem_of_rows(RowCompareExpr * rows)
{
	ListCell   *left;
	ListCell   *operator;

	forboth(left, rows->largs, operator, rows->opnos)
	{
		char	   *problem = problem_of_operands(get_opcode(lfirst_oid(operator)), list_make1(lfirst(left)));

		if (problem != NULL)
			return problem;
	}
	return NULL;
}

/* Stops at the first operator that fails for some rows, and describes why. */
static bool
find_problem(Node *node, void *arg)
{
	char	  **problem = arg;

	if (node == NULL)
		return false;
	switch (nodeTag(node))
	{
		case T_OpExpr:
		case T_DistinctExpr:
		case T_NullIfExpr:
			set_opfuncid((OpExpr *) node);
			if (get_func_rettype(((OpExpr *) node)->opfuncid) == BOOLOID)
				*problem = problem_of_operands(((OpExpr *) node)->opfuncid, ((OpExpr *) node)->args);
			break;
		case T_FuncExpr:
			if (compares_operands(((FuncExpr *) node)->funcid))
				*problem = problem_of_operands(((FuncExpr *) node)->funcid, ((FuncExpr *) node)->args);
			break;
		case T_RowCompareExpr:
			*problem = problem_of_rows((RowCompareExpr *) node);
			break;
		case T_ScalarArrayOpExpr:
			set_sa_opfuncid((ScalarArrayOpExpr *) node);
			*problem = problem_of_operands(((ScalarArrayOpExpr *) node)->opfuncid,
										   ((ScalarArrayOpExpr *) node)->args);
			break;
		case T_MinMaxExpr:
			*problem = comparison_problem(((MinMaxExpr *) node)->minmaxtype, true);
			break;
		default:
			break;
	}
	return *problem != NULL || expression_tree_walker(node, find_problem, arg);
}

/*
 * The parts of a trigger's condition, all of which must be true, as the server
 * keeps them, but for the call of count_change().
 */
static List *
trigger_condition(Oid trigger)
{
	Relation	rel = table_open(TriggerRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		isnull = true;
	Datum		condition = (Datum) 0;
	List	   *parts = NIL;

	ScanKeyInit(&key, Anum_pg_trigger_oid, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(trigger));
	scan = systable_beginscan(rel, TriggerOidIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		condition = heap_getattr(tuple, Anum_pg_trigger_tgqual, RelationGetDescr(rel), &isnull);
	if (!isnull)
		parts = make_ands_implicit(stringToNode(TextDatumGetCString(condition)));
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	if (parts != NIL && cache_is_count(llast(parts)))
		parts = list_delete_last(parts);
	return parts;
}

/*
 * Describes why a trigger's condition cannot be evaluated for every row of its
 * table; NULL if nothing is known to stand in the way.
 */
Datum
pgf_condition_problem(PG_FUNCTION_ARGS)
{
	List	   *condition = trigger_condition(PG_GETARG_OID(0));
	char	   *problem = NULL;

	if (!find_problem((Node *) condition, &problem))
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(problem));
}

static bool
any_is_null(List *args)
{
	ListCell   *lc;

	foreach(lc, args)
	{
		if (is_null(lfirst(lc)))
			return true;
	}
	return false;
}

/* Is the value NULL for every row?  Evaluates nothing, so false where not known. */
static bool
is_null(Node *node)
{
	ListCell   *lc;

	switch (nodeTag(node))
	{
		case T_Const:
			return ((Const *) node)->constisnull;
		case T_RelabelType:
			return is_null((Node *) ((RelabelType *) node)->arg);
		case T_CoerceViaIO:
			return is_null((Node *) ((CoerceViaIO *) node)->arg);
		case T_FieldSelect:
			return is_null((Node *) ((FieldSelect *) node)->arg);
		case T_FuncExpr:
			return func_strict(((FuncExpr *) node)->funcid) && any_is_null(((FuncExpr *) node)->args);
		case T_OpExpr:
			set_opfuncid((OpExpr *) node);
			return func_strict(((OpExpr *) node)->opfuncid) && any_is_null(((OpExpr *) node)->args);
		case T_BoolExpr:
			foreach(lc, ((BoolExpr *) node)->args)
			{
				if (!is_null(lfirst(lc)))
					return false;
			}
			return true;
		default:
			return false;
	}
}

static bool
is_never_true(Node *node)
{
	BoolExpr   *expr = (BoolExpr *) node;
	ListCell   *lc;

	if (!IsA(node, BoolExpr) || expr->boolop == NOT_EXPR)
		return is_null(node);
	foreach(lc, expr->args)
	{
		if (is_never_true(lfirst(lc)) == (expr->boolop == AND_EXPR))
			return expr->boolop == AND_EXPR;
	}
	return expr->boolop == OR_EXPR;
}

/* Is the condition true for no row, since the one it looks at is missing? */
Datum
pgf_condition_is_never_true(PG_FUNCTION_ARGS)
{
	List	   *condition = trigger_condition(PG_GETARG_OID(0));

	ListCell   *lc;

	foreach(lc, condition)
	{
		if (is_never_true(lfirst(lc)))
			PG_RETURN_BOOL(true);
	}
	PG_RETURN_BOOL(false);
}

static bool
calls_count(Node *node, void *arg)
{
	if (node == NULL)
		return false;
	return cache_is_count(node) || expression_tree_walker(node, calls_count, arg);
}

/*
 * Tells whether the trigger's condition calls count_change() elsewhere than as its
 * last part, where it would count what may not be queued, or count it twice.
 */
Datum
pgf_condition_counts_too_often(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(calls_count((Node *) trigger_condition(PG_GETARG_OID(0)), NULL));
}

static bool
names_system_column(Node *node, void *arg)
{
	if (node == NULL)
		return false;
	if (IsA(node, Var))
		return ((Var *) node)->varattno < 0;
	return expression_tree_walker(node, names_system_column, arg);
}

/*
 * Makes sure that a condition on the row depends on nothing but the row, by
 * having the server analyze it as what it reads like.  Inside of SPI.
 */
static void
check_where(Oid entity, const char *condition)
{
	char	   *sql = psprintf("select from only %s where (%s\n)",
							   quote_qualified_identifier(get_namespace_name(get_rel_namespace(entity)),
														  get_rel_name(entity)),
							   condition);
	SPIPlanPtr	plan = SPI_prepare(sql, 0, NULL);
	CachedPlanSource *source = linitial(SPI_plan_get_plan_sources(plan));
	Query	   *query = linitial(source->query_list);

	if (query->hasSubLinks)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot use subquery in \"where\"")));
	if (names_system_column(query->jointree->quals, NULL))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_COLUMN_REFERENCE),
				 errmsg("cannot use system column in \"where\""),
				 errdetail("Its value is another one for each version of the row.")));
	if (contain_mutable_functions(query->jointree->quals))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
				 errmsg("functions in \"where\" must be immutable"),
				 errdetail("A row would leave the filter, or enter it, without being changed."),
				 errhint("Conditions on the event, such as its time or user, go into \"when\".")));
}

/* ---- capture(), uncapture() ---- */

#define MAX_CALL_ARGS 10
#define WHERE_ARG 6				/* of fanout.capture() */

static Oid
function_owner(Oid function)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(function));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", function);
	owner = ((Form_pg_proc) GETSTRUCT(tuple))->proowner;
	ReleaseSysCache(tuple);
	return owner;
}

/*
 * Runs a query over all arguments of the calling function, as the function's
 * owner, and returns its one value: only the triggers and their conditions are
 * the caller's affair.
 */
static Datum
call_as_owner(const char *sql, FunctionCallInfo fcinfo, bool *isnull)
{
	Oid			types[MAX_CALL_ARGS];
	Datum		values[MAX_CALL_ARGS];
	char		nulls[MAX_CALL_ARGS];
	Oid			user;
	int			context;

	Assert(PG_NARGS() <= MAX_CALL_ARGS);
	for (int i = 0; i < PG_NARGS(); i++)
	{
		types[i] = get_fn_expr_argtype(fcinfo->flinfo, i);
		values[i] = PG_ARGISNULL(i) ? (Datum) 0 : PG_GETARG_DATUM(i);
		nulls[i] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	GetUserIdAndSecContext(&user, &context);
	SetUserIdAndSecContext(function_owner(fcinfo->flinfo->fn_oid), context | SECURITY_LOCAL_USERID_CHANGE);
	if (SPI_execute_with_args(sql, PG_NARGS(), types, values, nulls, false, 0) != SPI_OK_SELECT ||
		SPI_processed != 1)
		elog(ERROR, "could not execute \"%s\"", sql);
	SetUserIdAndSecContext(user, context);
	return SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, isnull);
}

/*
 * Runs the statements that a query over the arguments gives, with the caller's
 * rights and search path: whoever may not create a trigger on the table may
 * not capture it, and a condition means what it would mean in the caller's own
 * CREATE TRIGGER.  In C because a SQL function would have to leave its own
 * search path open for that.  Returns how many there were.
 */
static int
run_statements(const char *sql, FunctionCallInfo fcinfo)
{
	Datum	   *statements;
	int			n;
	bool		isnull;
	Datum		array = call_as_owner(sql, fcinfo, &isnull);

	deconstruct_array(DatumGetArrayTypeP(array), TEXTOID, -1, false, TYPALIGN_INT, &statements, NULL, &n);
	for (int i = 0; i < n; i++)
	{
		if (SPI_execute(TextDatumGetCString(statements[i]), false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not change the triggers");
	}
	return n;
}

Datum
pgf_capture(PG_FUNCTION_ARGS)
{
	bool		isnull;

	SPI_connect();
	if (run_statements("select fanout.capture_statements($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)", fcinfo) > 0)
	{
		if (!PG_ARGISNULL(WHERE_ARG))
			check_where(PG_GETARG_OID(0), text_to_cstring(PG_GETARG_TEXT_PP(WHERE_ARG)));
		(void) call_as_owner("select fanout.capture_declared($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
							 fcinfo, &isnull);
	}
	SPI_finish();
	PG_RETURN_VOID();
}

/* With the caller's rights; a table that is not there is nobody's. */
static void
check_ownership(Oid entity)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(entity));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		return;
	owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
	ReleaseSysCache(tuple);
	if (!has_privs_of_role(GetUserId(), owner))
		aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_TABLE, get_rel_name(entity));
}

Datum
pgf_uncapture(PG_FUNCTION_ARGS)
{
	int32		captures;
	bool		isnull;

	SPI_connect();
	check_ownership(PG_ARGISNULL(0) ? InvalidOid : PG_GETARG_OID(0));
	captures = DatumGetInt32(call_as_owner("select fanout.end_captures($1, $2)", fcinfo, &isnull));
	(void) run_statements("select fanout.uncapture_statements($1, $2)", fcinfo);
	SPI_finish();
	PG_RETURN_INT32(captures);
}
