/*-------------------------------------------------------------------------
 *
 * rowjson.c
 *		Rows to JSON, the same from every session.
 *
 * Responsible for the text of a row, on the write path of every captured row;
 * rowjson.h says what each type becomes.  What depends on the type alone (the
 * type beneath a domain, its output function and the settings that this depends
 * on, the elements of an array, the escaped column name) is looked up once, in
 * a plan.
 *
 * The common types are written straight into the caller's buffer, without a
 * look at any setting.  All others are their output function's text, which
 * textform.c asks for.  That is the only code of others that runs here: no
 * casts, and so none of to_json(), whose form arrays and composites have.
 *
 * A composite type may be altered while a plan lives.  So nothing is kept of it:
 * each composite value's attributes are planned when it is rendered, in memory
 * that is freed with it.
 *
 * It must never change a plan while rendering: an output function may write to
 * the very table whose row is being rendered, and so come back here with the
 * same plan.  It must never allocate in the plan's context either (the
 * functions called cache what they want there, once); what it allocates in the
 * current one, the caller's reset frees.
 *
 * No locks.  A plan depends on the relation's descriptor alone: a type cannot
 * change what is kept of it while a column uses it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>
#include <math.h>

#include "access/htup_details.h"
#include "access/tupmacs.h"
#include "catalog/pg_type.h"
#include "common/shortest_dec.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/cash.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/typcache.h"
#include "utils/uuid.h"

#include "capture/isotime.h"
#include "capture/msgid.h"
#include "capture/rowjson.h"
#include "capture/textform.h"
#include "server/append.h"
#include "server/compat.h"

/* Digits of the longest int8 and its sign. */
#define INTEGER_LEN		20

/* That as money: a currency sign, a comma for each three digits, two quotes. */
#define MONEY_LEN		40

typedef struct RowJsonType RowJsonType;

/* Appends a value, which is not null, as JSON. */
typedef void (*RowJsonRender) (StringInfo out, RowJsonType *type, Datum value);

/* What rowjson_text() gives. */
typedef enum RowJsonTextForm
{
	TEXT_IS_JSON,				/* the JSON as it is */
	TEXT_IS_UNQUOTED,			/* the JSON without its quotes, if any */
	TEXT_IS_OUTPUT,				/* what the type's output function gives */
	TEXT_IS_OUTPUT_IF_STRING	/* the same if the JSON is a string */
} RowJsonTextForm;

/* How values of one type are rendered. */
struct RowJsonType
{
	Oid			typid;			/* not a domain, but the base of one */
	RowJsonRender render;
	RowJsonTextForm text_form;
	TextForm	form;			/* not if text_form says that it is not used */

	/* of an array that may be a JSON array, its elements */
	RowJsonType *element;
	int16		element_len;
	bool		element_byval;
	char		element_align;
};

typedef struct RowJsonColumn
{
	AttrNumber	attnum;
	char	   *name;			/* "name": with the comma before it, if any */
	int			namelen;
	RowJsonType type;
} RowJsonColumn;

struct RowJson
{
	int			ncolumns;
	RowJsonColumn columns[FLEXIBLE_ARRAY_MEMBER];
};

/* Where the elements of an array are being read. */
typedef struct ArrayCursor
{
	RowJsonType *element;
	int16		typlen;
	bool		typbyval;
	char		typalign;
	int			ndim;
	const int  *dims;
	const char *next;			/* the next element that is not null */
	const bits8 *nulls;			/* NULL: there are none */
	int			index;			/* of the next element */
} ArrayCursor;

static void append_bool(StringInfo out, RowJsonType *type, Datum value);
static void append_int2(StringInfo out, RowJsonType *type, Datum value);
static void append_int4(StringInfo out, RowJsonType *type, Datum value);
static void append_int8(StringInfo out, RowJsonType *type, Datum value);
static void append_float4(StringInfo out, RowJsonType *type, Datum value);
static void append_float8(StringInfo out, RowJsonType *type, Datum value);
static void append_numeric(StringInfo out, RowJsonType *type, Datum value);
static void append_money(StringInfo out, RowJsonType *type, Datum value);
static void append_datetime(StringInfo out, RowJsonType *type, Datum value);
static void append_text(StringInfo out, RowJsonType *type, Datum value);
static void append_name(StringInfo out, RowJsonType *type, Datum value);
static void append_bytea(StringInfo out, RowJsonType *type, Datum value);
static void append_uuid(StringInfo out, RowJsonType *type, Datum value);
static void append_json(StringInfo out, RowJsonType *type, Datum value);
static void append_jsonb(StringInfo out, RowJsonType *type, Datum value);
static void append_output(StringInfo out, RowJsonType *type, Datum value);
static void append_array(StringInfo out, RowJsonType *type, Datum value);
static void append_composite(StringInfo out, RowJsonType *type, Datum value);

/* The types rendered here, and those that would look like an array. */
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
	{FLOAT4OID, append_float4, TEXT_IS_UNQUOTED},
	{FLOAT8OID, append_float8, TEXT_IS_UNQUOTED},
	{NUMERICOID, append_numeric, TEXT_IS_OUTPUT},
	{MONEYOID, append_money, TEXT_IS_UNQUOTED},
	{DATEOID, append_datetime, TEXT_IS_UNQUOTED},
	{TIMESTAMPOID, append_datetime, TEXT_IS_UNQUOTED},
	{TIMESTAMPTZOID, append_datetime, TEXT_IS_UNQUOTED},
	{TEXTOID, append_text, TEXT_IS_OUTPUT},
	{VARCHAROID, append_text, TEXT_IS_OUTPUT},
	{BPCHAROID, append_text, TEXT_IS_OUTPUT},
	{NAMEOID, append_name, TEXT_IS_OUTPUT},
	{BYTEAOID, append_bytea, TEXT_IS_OUTPUT},
	{UUIDOID, append_uuid, TEXT_IS_UNQUOTED},
	{JSONOID, append_json, TEXT_IS_JSON},
	{JSONBOID, append_jsonb, TEXT_IS_JSON},
	{INT2VECTOROID, append_output, TEXT_IS_OUTPUT},
	{OIDVECTOROID, append_output, TEXT_IS_OUTPUT},
};

/* ----------
 * Plans
 * ----------
 */

static void plan_type(RowJsonType *type, Oid typid, MemoryContext context);

/*
 * Tells whether a JSON array of such elements is read back as the array that it
 * was.  Elements that are JSON arrays themselves would look like another
 * dimension, and a JSON null among elements that are json like an SQL NULL.
 */
static bool
may_be_json_array(Oid element)
{
	Oid			base;

	if (!OidIsValid(element))
		return false;
	base = getBaseType(element);
	return base != JSONOID && base != JSONBOID && (base == element || !type_is_array(base));
}

static void
plan_elements(RowJsonType *type, Oid element, MemoryContext context)
{
	type->render = append_array;
	type->text_form = TEXT_IS_OUTPUT_IF_STRING;
	type->element = MemoryContextAllocZero(context, sizeof(RowJsonType));
	plan_type(type->element, element, context);
	get_typlenbyvalalign(element, &type->element_len, &type->element_byval,
						 &type->element_align);
}

/* Chooses the way to render values of the type; rowjson.h has the rules. */
static void
choose_render(RowJsonType *type, MemoryContext context)
{
	Oid			element;

	for (int i = 0; i < lengthof(known_types); i++)
	{
		if (known_types[i].typid == type->typid)
		{
			type->render = known_types[i].render;
			type->text_form = known_types[i].text_form;
			return;
		}
	}

	element = get_element_type(type->typid);
	if (may_be_json_array(element))
		plan_elements(type, element, context);
	else if (type_is_rowtype(type->typid))
	{
		type->render = append_composite;
		type->text_form = TEXT_IS_JSON;
	}
	else
	{
		type->render = append_output;
		type->text_form = TEXT_IS_OUTPUT;
	}
}

static void
plan_type(RowJsonType *type, Oid typid, MemoryContext context)
{
	type->typid = getBaseType(typid);
	choose_render(type, context);
	if (type->text_form == TEXT_IS_OUTPUT || type->text_form == TEXT_IS_OUTPUT_IF_STRING)
		textform_prepare(&type->form, type->typid, context);
}

/* name: scratch memory */
static void
plan_column(RowJsonColumn *column, Form_pg_attribute att, StringInfo name,
			MemoryContext context)
{
	escape_json(name, NameStr(att->attname));
	appendStringInfoChar(name, ':');
	column->attnum = att->attnum;
	column->name = MemoryContextStrdup(context, name->data);
	column->namelen = name->len;
	plan_type(&column->type, att->atttypid, context);
}

/*
 * rowjson_plan
 *		Plans the rendering of some columns; see rowjson.h.
 *
 * The caller frees the plan with its context, once the relation's descriptor
 * has changed and nobody is using the plan.
 */
RowJson *
rowjson_plan(TupleDesc tupdesc, const AttrNumber *attnums, int nattnums,
			 MemoryContext context)
{
	RowJson    *plan = MemoryContextAllocZero(context, offsetof(RowJson, columns) +
											  nattnums * sizeof(RowJsonColumn));
	StringInfoData name;

	initStringInfo(&name);
	plan->ncolumns = nattnums;
	for (int i = 0; i < nattnums; i++)
	{
		Form_pg_attribute att = TupleDescAttr(tupdesc, attnums[i] - 1);

		Assert(!att->attisdropped);
		resetStringInfo(&name);
		if (i > 0)
			appendStringInfoChar(&name, ',');
		plan_column(&plan->columns[i], att, &name, context);
	}
	pfree(name.data);
	return plan;
}

/* ----------
 * Rendering
 * ----------
 */

static inline void
append_value(StringInfo out, RowJsonType *type, Datum value, bool isnull)
{
	if (isnull)
		append_literal(out, "null");
	else
		type->render(out, type, value);
}

/* values, isnull: of all columns of the relation, in its order */
static void
append_object(StringInfo out, RowJson *plan, const Datum *values, const bool *isnull)
{
	append_char(out, '{');
	for (int i = 0; i < plan->ncolumns; i++)
	{
		RowJsonColumn *column = &plan->columns[i];

		append_bytes(out, column->name, column->namelen);
		append_value(out, &column->type, values[column->attnum - 1],
					 isnull[column->attnum - 1]);
	}
	append_char(out, '}');
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
	append_object(out, plan, values, isnull);
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
	append_value(out, &plan->columns[index].type, value, isnull);
}

/*
 * rowjson_text
 *		Gives one value as text; see rowjson.h.  Errors as in
 *		rowjson_append().
 */
char *
rowjson_text(RowJson *plan, int index, Datum value, bool isnull)
{
	RowJsonType *type = &plan->columns[index].type;
	StringInfoData json;

	Assert(index >= 0 && index < plan->ncolumns);
	if (isnull)
		return NULL;
	if (type->text_form == TEXT_IS_OUTPUT)
		return textform_output(&type->form, value);

	initStringInfo(&json);
	type->render(&json, type, value);
	if (type->text_form == TEXT_IS_JSON || json.data[0] != '"')
		return json.data;
	if (type->text_form == TEXT_IS_OUTPUT_IF_STRING)
		return textform_output(&type->form, value);
	return pnstrdup(json.data + 1, json.len - 2);
}

/* ----------
 * Numbers and booleans
 * ----------
 */

static void
append_bool(StringInfo out, RowJsonType *type, Datum value)
{
	if (DatumGetBool(value))
		append_literal(out, "true");
	else
		append_literal(out, "false");
}

static void
append_int2(StringInfo out, RowJsonType *type, Datum value)
{
	char	   *p = append_room(out, INTEGER_LEN);

	append_done(out, p + pg_ltoa(DatumGetInt16(value), p));
}

static void
append_int4(StringInfo out, RowJsonType *type, Datum value)
{
	char	   *p = append_room(out, INTEGER_LEN);

	append_done(out, p + pg_ltoa(DatumGetInt32(value), p));
}

static void
append_int8(StringInfo out, RowJsonType *type, Datum value)
{
	char	   *p = append_room(out, INTEGER_LEN);

	append_done(out, p + pg_lltoa(DatumGetInt64(value), p));
}

/* NaN and the infinities are not JSON numbers, hence strings. */
static void
append_not_finite(StringInfo out, float8 number)
{
	if (isnan(number))
		append_literal(out, "\"NaN\"");
	else if (number > 0)
		append_literal(out, "\"Infinity\"");
	else
		append_literal(out, "\"-Infinity\"");
}

/* the shortest number that reads back exactly */
static void
append_float4(StringInfo out, RowJsonType *type, Datum value)
{
	float4		number = DatumGetFloat4(value);

	if (!isfinite(number))
	{
		append_not_finite(out, number);
		return;
	}
	enlargeStringInfo(out, FLOAT_SHORTEST_DECIMAL_LEN);
	out->len += float_to_shortest_decimal_bufn(number, out->data + out->len);
	out->data[out->len] = '\0';
}

static void
append_float8(StringInfo out, RowJsonType *type, Datum value)
{
	float8		number = DatumGetFloat8(value);

	if (!isfinite(number))
	{
		append_not_finite(out, number);
		return;
	}
	enlargeStringInfo(out, DOUBLE_SHORTEST_DECIMAL_LEN);
	out->len += double_to_shortest_decimal_bufn(number, out->data + out->len);
	out->data[out->len] = '\0';
}

/*
 * numeric_out() depends on no setting.  What is not a number there, NaN and the
 * infinities, needs quotes and no escapes.
 */
static void
append_numeric(StringInfo out, RowJsonType *type, Datum value)
{
	char	   *number = OutputFunctionCall(&type->form.output, value);
	bool		quote = !isdigit((unsigned char) number[number[0] == '-' ? 1 : 0]);

	if (quote)
		append_char(out, '"');
	appendStringInfoString(out, number);
	if (quote)
		append_char(out, '"');
	pfree(number);
}

/*
 * Appends money as cash_out() writes it in the C locale, "-$1,234.50".  The
 * number is of hundredths there, whatever it is under lc_monetary.
 */
static void
append_money(StringInfo out, RowJsonType *type, Datum value)
{
	Cash		amount = DatumGetCash(value);
	uint64		rest = amount < 0 ? -(uint64) amount : (uint64) amount;
	char		buf[MONEY_LEN];
	char	   *start = buf + sizeof(buf);

	*--start = '"';
	for (int digits = 0; digits < 3 || rest > 0; digits++, rest /= 10)
	{
		if (digits == 2)
			*--start = '.';
		else if (digits > 2 && digits % 3 == 2)
			*--start = ',';
		*--start = '0' + rest % 10;
	}
	*--start = '$';
	if (amount < 0)
		*--start = '-';
	*--start = '"';
	append_bytes(out, start, buf + sizeof(buf) - start);
}

/* ----------
 * Strings
 * ----------
 */

/* ISO 8601 and UTC, whatever the settings; infinity comes as that word. */
static void
append_datetime(StringInfo out, RowJsonType *type, Datum value)
{
	append_char(out, '"');
	isotime_append(out, type->typid, value);
	append_char(out, '"');
}

/* text, varchar and char(n), whose output functions only copy */
static void
append_text(StringInfo out, RowJsonType *type, Datum value)
{
	text	   *string = DatumGetTextPP(value);

	escape_json_with_len(out, VARDATA_ANY(string), VARSIZE_ANY_EXHDR(string));
	if ((Pointer) string != DatumGetPointer(value))
		pfree(string);
}

static void
append_name(StringInfo out, RowJsonType *type, Datum value)
{
	escape_json(out, NameStr(*DatumGetName(value)));
}

/* A message id is written like any other uuid, so msgid_format() will do. */
static void
append_uuid(StringInfo out, RowJsonType *type, Datum value)
{
	append_char(out, '"');
	enlargeStringInfo(out, 2 * UUID_LEN + 4);
	msgid_format(DatumGetUUIDP(value), out->data + out->len);
	out->len += 2 * UUID_LEN + 4;
	append_char(out, '"');
}

/* hex, as byteaout() writes it with its backslash escaped */
static void
append_bytea(StringInfo out, RowJsonType *type, Datum value)
{
	bytea	   *bytes = DatumGetByteaPP(value);
	int			len = VARSIZE_ANY_EXHDR(bytes);

	append_literal(out, "\"\\\\x");
	enlargeStringInfo(out, 2 * len + 1);
	out->len += hex_encode(VARDATA_ANY(bytes), len, out->data + out->len);
	append_char(out, '"');
	if ((Pointer) bytes != DatumGetPointer(value))
		pfree(bytes);
}

static void
append_output(StringInfo out, RowJsonType *type, Datum value)
{
	char	   *string = textform_output(&type->form, value);

	escape_json_with_len(out, string, strlen(string));
	pfree(string);
}

/* ----------
 * JSON
 * ----------
 */

/* json keeps the text it was given, spaces and all. */
static void
append_json(StringInfo out, RowJsonType *type, Datum value)
{
	text	   *json = DatumGetTextPP(value);

	append_bytes(out, VARDATA_ANY(json), VARSIZE_ANY_EXHDR(json));
	if ((Pointer) json != DatumGetPointer(value))
		pfree(json);
}

static void
append_jsonb(StringInfo out, RowJsonType *type, Datum value)
{
	Jsonb	   *jsonb = DatumGetJsonbP(value);

	(void) JsonbToCString(out, &jsonb->root, VARSIZE(jsonb));
	if ((Pointer) jsonb != DatumGetPointer(value))
		pfree(jsonb);
}

/* ----------
 * Arrays
 * ----------
 */

/* The next element; the cursor is at one. */
static void
append_element(StringInfo out, ArrayCursor *cursor)
{
	Datum		value;

	if (cursor->nulls != NULL && att_isnull(cursor->index, cursor->nulls))
		append_literal(out, "null");
	else
	{
		value = fetch_att(cursor->next, cursor->typbyval, cursor->typlen);
		cursor->element->render(out, cursor->element, value);
		cursor->next = att_addlength_pointer(cursor->next, cursor->typlen, cursor->next);
		cursor->next = (char *) att_align_nominal(cursor->next, cursor->typalign);
	}
	cursor->index++;
}

/* Appends the next elements as an array of this dimension and those inside. */
static void
append_dimension(StringInfo out, ArrayCursor *cursor, int dimension)
{
	append_char(out, '[');
	for (int i = 0; i < cursor->dims[dimension]; i++)
	{
		if (i > 0)
			append_char(out, ',');
		if (dimension + 1 < cursor->ndim)
			append_dimension(out, cursor, dimension + 1);
		else
			append_element(out, cursor);
	}
	append_char(out, ']');
}

static bool
begins_at_one(ArrayType *array)
{
	for (int i = 0; i < ARR_NDIM(array); i++)
	{
		if (ARR_LBOUND(array)[i] != 1)
			return false;
	}
	return true;
}

/* Appends an array, as its text if its bounds are not those of a JSON array. */
static void
append_array(StringInfo out, RowJsonType *type, Datum value)
{
	ArrayType  *array = DatumGetArrayTypeP(value);
	ArrayCursor cursor = {
		.element = type->element,
		.typlen = type->element_len,
		.typbyval = type->element_byval,
		.typalign = type->element_align,
		.ndim = ARR_NDIM(array),
		.dims = ARR_DIMS(array),
		.next = ARR_DATA_PTR(array),
		.nulls = ARR_NULLBITMAP(array)
	};

	if (cursor.ndim == 0)
		append_literal(out, "[]");
	else if (!begins_at_one(array))
		append_output(out, type, PointerGetDatum(array));
	else
		append_dimension(out, &cursor, 0);
	if ((Pointer) array != DatumGetPointer(value))
		pfree(array);
}

/* ----------
 * Composites
 * ----------
 */

/* A plan for all attributes. */
static RowJson *
plan_attributes(TupleDesc desc)
{
	AttrNumber *attnums = palloc(Max(desc->natts, 1) * sizeof(AttrNumber));
	int			n = 0;

	for (int i = 0; i < desc->natts; i++)
	{
		if (!TupleDescAttr(desc, i)->attisdropped)
			attnums[n++] = i + 1;
	}
	return rowjson_plan(desc, attnums, n, CurrentMemoryContext);
}

static void
append_attributes(StringInfo out, HeapTupleHeader header, TupleDesc desc)
{
	HeapTupleData tuple = {
		.t_len = HeapTupleHeaderGetDatumLength(header),
		.t_data = header
	};
	Datum	   *values = palloc(Max(desc->natts, 1) * sizeof(Datum));
	bool	   *isnull = palloc(Max(desc->natts, 1) * sizeof(bool));

	heap_deform_tuple(&tuple, desc, values, isnull);
	append_object(out, plan_attributes(desc), values, isnull);
}

/*
 * Appends a composite value as an object.  The attributes are those that its
 * type has now: ALTER TYPE does not touch the values stored.
 */
static void
append_composite(StringInfo out, RowJsonType *type, Datum value)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout composite",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	HeapTupleHeader header = DatumGetHeapTupleHeader(value);
	TupleDesc	desc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(header),
											  HeapTupleHeaderGetTypMod(header));

	check_stack_depth();
	append_attributes(out, header, desc);
	ReleaseTupleDesc(desc);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(context);
}
