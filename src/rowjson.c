/*-------------------------------------------------------------------------
 *
 * rowjson.c
 *		Rows to JSON, as to_json() renders them.
 *
 * Responsible for the text of a row, byte for byte what row_to_json() of the
 * same server gives, on the write path of every captured row.  What to_json()
 * looks up for each value (the type behind a domain, its category, its output
 * function, the escaped column name) is looked up once, in a plan.
 *
 * The common types are written straight into the caller's buffer.  Whatever
 * nests (arrays, composites) or has a cast to json goes through to_json()
 * itself, and is right by construction.
 *
 * It must never change a plan while rendering: an output or cast function may
 * write to the very table whose row is being rendered, and so come back here
 * with the same plan.  It must never allocate in the plan's context either
 * (the functions called cache what they want there, once); what it allocates
 * in the current one, the caller's reset frees.
 *
 * No locks.  A plan depends on the relation's descriptor alone: a type cannot
 * change what is kept of it while a column uses it.  Casts come and go at any
 * time and hence are looked up when a value is rendered.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>
#include <math.h>

#include "access/htup_details.h"
#include "access/transam.h"
#include "catalog/pg_type.h"
#include "common/shortest_dec.h"
#include "fmgr.h"
#include "nodes/makefuncs.h"
#include "parser/parse_coerce.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/float.h"
#include "utils/fmgroids.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/uuid.h"

#include "compat.h"
#include "msgid.h"
#include "rowjson.h"

/* Digits of the longest int8 and its sign. */
#define INTEGER_LEN		20

typedef struct RowJsonColumn RowJsonColumn;

/* Appends a value, which is not null, as JSON. */
typedef void (*RowJsonRender) (StringInfo out, RowJsonColumn *column, Datum value);

/* What rowjson_text() gives. */
typedef enum RowJsonTextForm
{
	TEXT_IS_JSON,				/* the JSON as it is */
	TEXT_IS_UNQUOTED,			/* the JSON without its quotes */
	TEXT_IS_OUTPUT				/* what the type's output function gives */
} RowJsonTextForm;

struct RowJsonColumn
{
	AttrNumber	attnum;
	Oid			typid;			/* of the column, or the base of its domain */
	RowJsonRender render;
	RowJsonTextForm text_form;
	char	   *name;			/* "name": with the comma before it, if any */
	int			namelen;
	FmgrInfo	output;			/* the type's output function */
	FmgrInfo	to_json;		/* to_json() for an argument of the type */
};

struct RowJson
{
	int			ncolumns;
	RowJsonColumn columns[FLEXIBLE_ARRAY_MEMBER];
};

static void append_bool(StringInfo out, RowJsonColumn *column, Datum value);
static void append_int2(StringInfo out, RowJsonColumn *column, Datum value);
static void append_int4(StringInfo out, RowJsonColumn *column, Datum value);
static void append_int8(StringInfo out, RowJsonColumn *column, Datum value);
static void append_float4(StringInfo out, RowJsonColumn *column, Datum value);
static void append_float8(StringInfo out, RowJsonColumn *column, Datum value);
static void append_number(StringInfo out, RowJsonColumn *column, Datum value);
static void append_datetime(StringInfo out, RowJsonColumn *column, Datum value);
static void append_text(StringInfo out, RowJsonColumn *column, Datum value);
static void append_name(StringInfo out, RowJsonColumn *column, Datum value);
static void append_uuid(StringInfo out, RowJsonColumn *column, Datum value);
static void append_json(StringInfo out, RowJsonColumn *column, Datum value);
static void append_jsonb(StringInfo out, RowJsonColumn *column, Datum value);
static void append_output(StringInfo out, RowJsonColumn *column, Datum value);
static void append_extension(StringInfo out, RowJsonColumn *column, Datum value);
static void append_to_json(StringInfo out, RowJsonColumn *column, Datum value);

/* The types rendered here; the numbers and date/times are to_json()'s list. */
static const struct
{
	Oid			typid;
	RowJsonRender render;
	RowJsonTextForm text_form;
}			known_types[] =

{
	{BOOLOID, append_bool, TEXT_IS_JSON},
	{INT2OID, append_int2, TEXT_IS_JSON},
	{INT4OID, append_int4, TEXT_IS_JSON},
	{INT8OID, append_int8, TEXT_IS_JSON},
	{FLOAT4OID, append_float4, TEXT_IS_OUTPUT},
	{FLOAT8OID, append_float8, TEXT_IS_OUTPUT},
	{NUMERICOID, append_number, TEXT_IS_OUTPUT},
	{DATEOID, append_datetime, TEXT_IS_UNQUOTED},
	{TIMESTAMPOID, append_datetime, TEXT_IS_UNQUOTED},
	{TIMESTAMPTZOID, append_datetime, TEXT_IS_UNQUOTED},
	{TEXTOID, append_text, TEXT_IS_OUTPUT},
	{VARCHAROID, append_text, TEXT_IS_OUTPUT},
	{BPCHAROID, append_text, TEXT_IS_OUTPUT},
	{NAMEOID, append_name, TEXT_IS_OUTPUT},
	{UUIDOID, append_uuid, TEXT_IS_UNQUOTED},
	{JSONOID, append_json, TEXT_IS_JSON},
	{JSONBOID, append_jsonb, TEXT_IS_JSON},
	{ANYARRAYOID, append_to_json, TEXT_IS_JSON},
};

/* ----------
 * Plans
 * ----------
 */

/*
 * Chooses the way to render the column's type, as json_categorize_type() in
 * the server does.
 */
static void
choose_render(RowJsonColumn *column)
{
	for (int i = 0; i < lengthof(known_types); i++)
	{
		if (known_types[i].typid == column->typid)
		{
			column->render = known_types[i].render;
			column->text_form = known_types[i].text_form;
			return;
		}
	}

	if (type_is_array(column->typid) || type_is_rowtype(column->typid))
	{
		column->render = append_to_json;
		column->text_form = TEXT_IS_JSON;
		return;
	}

	/* to_json() ignores casts to json of built-in types. */
	if (column->typid < FirstNormalObjectId)
		column->render = append_output;
	else
		column->render = append_extension;
	column->text_form = TEXT_IS_OUTPUT;
}

static void
prepare_output(RowJsonColumn *column, MemoryContext context)
{
	Oid			output;
	bool		isvarlena;

	getTypeOutputInfo(column->typid, &output, &isvarlena);
	fmgr_info_cxt(output, &column->output, context);
}

/*
 * to_json() takes anyelement and learns the type from the expression that
 * calls it, so give it one.
 */
static void
prepare_to_json(RowJsonColumn *column, MemoryContext context)
{
	Node	   *arg = (Node *) makeNullConst(column->typid, -1, InvalidOid);
	FuncExpr   *call = makeFuncExpr(F_TO_JSON, JSONOID, list_make1(arg),
									InvalidOid, InvalidOid, COERCE_EXPLICIT_CALL);

	fmgr_info_cxt(F_TO_JSON, &column->to_json, context);
	fmgr_info_set_expr((Node *) call, &column->to_json);
}

static void
plan_column(RowJsonColumn *column, Form_pg_attribute att, bool first,
			MemoryContext context)
{
	StringInfoData name;

	initStringInfo(&name);
	if (!first)
		appendStringInfoChar(&name, ',');
	escape_json(&name, NameStr(att->attname));
	appendStringInfoChar(&name, ':');

	column->attnum = att->attnum;
	column->typid = getBaseType(att->atttypid);
	column->name = pnstrdup(name.data, name.len);
	column->namelen = name.len;
	pfree(name.data);

	choose_render(column);
	prepare_output(column, context);
	prepare_to_json(column, context);
}

/*
 * rowjson_plan
 *		Plans the rendering of some columns; see rowjson.h.
 *
 * The caller frees the plan with its context, once the relation's descriptor
 * has changed.
 */
RowJson *
rowjson_plan(TupleDesc tupdesc, const AttrNumber *attnums, int nattnums,
			 MemoryContext context)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	RowJson    *plan;

	plan = palloc0(offsetof(RowJson, columns) + nattnums * sizeof(RowJsonColumn));
	plan->ncolumns = nattnums;
	for (int i = 0; i < nattnums; i++)
	{
		Form_pg_attribute att = TupleDescAttr(tupdesc, attnums[i] - 1);

		Assert(!att->attisdropped);
		plan_column(&plan->columns[i], att, i == 0, context);
	}

	MemoryContextSwitchTo(oldcontext);
	return plan;
}

/* ----------
 * Rendering
 * ----------
 */

static inline void
append_value(StringInfo out, RowJsonColumn *column, Datum value, bool isnull)
{
	if (isnull)
		appendBinaryStringInfo(out, "null", 4);
	else
		column->render(out, column, value);
}

/*
 * rowjson_append
 *		Appends a row as a JSON object; see rowjson.h.
 *
 * tupdesc is the relation's descriptor, the one of the plan or an equal one.
 * Raises what the types' output functions raise.  Scratch memory is left in
 * the current context.
 */
void
rowjson_append(StringInfo out, RowJson *plan, HeapTuple tuple, TupleDesc tupdesc)
{
	/* On the stack, not in the plan, which may be in use further up it. */
	Datum		values[MaxHeapAttributeNumber];
	bool		isnull[MaxHeapAttributeNumber];

	heap_deform_tuple(tuple, tupdesc, values, isnull);

	appendStringInfoCharMacro(out, '{');
	for (int i = 0; i < plan->ncolumns; i++)
	{
		RowJsonColumn *column = &plan->columns[i];

		Assert(column->attnum <= tupdesc->natts);
		appendBinaryStringInfo(out, column->name, column->namelen);
		append_value(out, column, values[column->attnum - 1],
					 isnull[column->attnum - 1]);
	}
	appendStringInfoCharMacro(out, '}');
}

/*
 * rowjson_append_value
 *		Appends one value as JSON; see rowjson.h.  Errors and memory as in
 *		rowjson_append().
 */
void
rowjson_append_value(StringInfo out, RowJson *plan, int index, Datum value, bool isnull)
{
	Assert(index >= 0 && index < plan->ncolumns);
	append_value(out, &plan->columns[index], value, isnull);
}

/*
 * Does to_json() use a cast for this type, one that an extension or a user
 * made?  The test is the server's own, in json_categorize_type().
 */
static bool
has_cast_to_json(RowJsonColumn *column)
{
	Oid			castfunc;

	return column->render == append_extension &&
		find_coercion_pathway(JSONOID, column->typid,
							  COERCION_EXPLICIT, &castfunc) == COERCION_PATH_FUNC &&
		OidIsValid(castfunc);
}

/*
 * rowjson_text
 *		Gives one value as text; see rowjson.h.  Errors as in
 *		rowjson_append().
 */
char *
rowjson_text(RowJson *plan, int index, Datum value, bool isnull)
{
	RowJsonColumn *column = &plan->columns[index];
	StringInfoData buf;

	Assert(index >= 0 && index < plan->ncolumns);
	if (isnull)
		return NULL;

	if (column->text_form == TEXT_IS_OUTPUT && !has_cast_to_json(column))
		return OutputFunctionCall(&column->output, value);

	initStringInfo(&buf);
	column->render(&buf, column, value);
	if (column->text_form != TEXT_IS_UNQUOTED)
		return buf.data;

	buf.data[buf.len - 1] = '\0';
	return pstrdup(buf.data + 1);
}

/* ----------
 * Numbers and booleans
 * ----------
 */

static void
append_bool(StringInfo out, RowJsonColumn *column, Datum value)
{
	if (DatumGetBool(value))
		appendBinaryStringInfo(out, "true", 4);
	else
		appendBinaryStringInfo(out, "false", 5);
}

static void
append_int2(StringInfo out, RowJsonColumn *column, Datum value)
{
	enlargeStringInfo(out, INTEGER_LEN);
	out->len += pg_ltoa(DatumGetInt16(value), out->data + out->len);
}

static void
append_int4(StringInfo out, RowJsonColumn *column, Datum value)
{
	enlargeStringInfo(out, INTEGER_LEN);
	out->len += pg_ltoa(DatumGetInt32(value), out->data + out->len);
}

static void
append_int8(StringInfo out, RowJsonColumn *column, Datum value)
{
	enlargeStringInfo(out, INTEGER_LEN);
	out->len += pg_lltoa(DatumGetInt64(value), out->data + out->len);
}

/* Only the shortest form can be written in place; float4out() does the rest. */
static void
append_float4(StringInfo out, RowJsonColumn *column, Datum value)
{
	float4		number = DatumGetFloat4(value);

	if (extra_float_digits <= 0 || !isfinite(number))
	{
		append_number(out, column, value);
		return;
	}
	enlargeStringInfo(out, FLOAT_SHORTEST_DECIMAL_LEN);
	out->len += float_to_shortest_decimal_bufn(number, out->data + out->len);
	out->data[out->len] = '\0';
}

static void
append_float8(StringInfo out, RowJsonColumn *column, Datum value)
{
	float8		number = DatumGetFloat8(value);

	if (extra_float_digits <= 0 || !isfinite(number))
	{
		append_number(out, column, value);
		return;
	}
	enlargeStringInfo(out, DOUBLE_SHORTEST_DECIMAL_LEN);
	out->len += double_to_shortest_decimal_bufn(number, out->data + out->len);
	out->data[out->len] = '\0';
}

/*
 * Any number by its output function.  NaN and the infinities are not JSON
 * numbers, hence strings; nothing in them needs an escape.
 */
static void
append_number(StringInfo out, RowJsonColumn *column, Datum value)
{
	char	   *number = OutputFunctionCall(&column->output, value);
	bool		quote = !isdigit((unsigned char) number[number[0] == '-' ? 1 : 0]);

	if (quote)
		appendStringInfoCharMacro(out, '"');
	appendStringInfoString(out, number);
	if (quote)
		appendStringInfoCharMacro(out, '"');
	pfree(number);
}

/* ----------
 * Strings
 * ----------
 */

/*
 * ISO 8601 whatever DateStyle says, timestamptz in the session's time zone;
 * infinity comes as that word.
 */
static void
append_datetime(StringInfo out, RowJsonColumn *column, Datum value)
{
	appendStringInfoCharMacro(out, '"');
	enlargeStringInfo(out, MAXDATELEN + 1);
	JsonEncodeDateTime(out->data + out->len, value, column->typid, NULL);
	out->len += strlen(out->data + out->len);
	appendStringInfoCharMacro(out, '"');
}

/* text, varchar and char(n), whose output functions only copy */
static void
append_text(StringInfo out, RowJsonColumn *column, Datum value)
{
	text	   *string = DatumGetTextPP(value);

	escape_json_with_len(out, VARDATA_ANY(string), VARSIZE_ANY_EXHDR(string));
	if ((Pointer) string != DatumGetPointer(value))
		pfree(string);
}

static void
append_name(StringInfo out, RowJsonColumn *column, Datum value)
{
	escape_json(out, NameStr(*DatumGetName(value)));
}

/* A message id is written like any other uuid, so msgid_format() will do. */
static void
append_uuid(StringInfo out, RowJsonColumn *column, Datum value)
{
	appendStringInfoCharMacro(out, '"');
	enlargeStringInfo(out, 2 * UUID_LEN + 4);
	msgid_format(DatumGetUUIDP(value), out->data + out->len);
	out->len += 2 * UUID_LEN + 4;
	appendStringInfoCharMacro(out, '"');
}

static void
append_output(StringInfo out, RowJsonColumn *column, Datum value)
{
	char	   *string = OutputFunctionCall(&column->output, value);

	escape_json(out, string);
	pfree(string);
}

/* ----------
 * JSON
 * ----------
 */

/* json keeps the text it was given, spaces and all. */
static void
append_json(StringInfo out, RowJsonColumn *column, Datum value)
{
	text	   *json = DatumGetTextPP(value);

	appendBinaryStringInfo(out, VARDATA_ANY(json), VARSIZE_ANY_EXHDR(json));
	if ((Pointer) json != DatumGetPointer(value))
		pfree(json);
}

static void
append_jsonb(StringInfo out, RowJsonColumn *column, Datum value)
{
	Jsonb	   *jsonb = DatumGetJsonbP(value);

	(void) JsonbToCString(out, &jsonb->root, VARSIZE(jsonb));
	if ((Pointer) jsonb != DatumGetPointer(value))
		pfree(jsonb);
}

/* A type that is not built in, enums among them: is there a cast by now? */
static void
append_extension(StringInfo out, RowJsonColumn *column, Datum value)
{
	if (has_cast_to_json(column))
		append_to_json(out, column, value);
	else
		append_output(out, column, value);
}

static void
append_to_json(StringInfo out, RowJsonColumn *column, Datum value)
{
	text	   *json = DatumGetTextPP(FunctionCall1(&column->to_json, value));

	appendBinaryStringInfo(out, VARDATA_ANY(json), VARSIZE_ANY_EXHDR(json));
	pfree(json);
}
