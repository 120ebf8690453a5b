/*-------------------------------------------------------------------------
 *
 * readjson.c
 *		JSON to values of types: what rowjson.h writes is read back equal.
 *
 * A JSON array becomes an array, an object a composite value, element by
 * element; json and jsonb get the text of the value as it stands; any other
 * type's input function gets the characters of a string, or else the text.
 * So nothing passes through another type on its way: neither the text of json
 * nor the sign of a zero is lost, and no type needs a binary form.
 *
 * The caller fixes the settings that the texts were written under; see
 * textform.h.
 *
 * It must never keep anything of a composite type, which may be altered while a
 * reader lives: its attributes are planned for each value, in the current
 * context.
 *
 * No locks, and no memory but the reader's own in its context; the current one
 * gets the values, and what is left over from reading them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/typcache.h"

#include "consume/readjson.h"
#include "server/compat.h"

struct JsonReader
{
	Oid			type;			/* not a domain, but the base of one */
	int32		typmod;
	FmgrInfo	input;			/* of the domain, if it is one */
	Oid			io_param;
	int32		io_typmod;
	Oid			domain;			/* InvalidOid: it is none */
	void	   *domain_extra;	/* what domain_check() keeps */
	bool		takes_json;		/* its input function reads JSON */
	bool		composite;
	MemoryContext context;

	/* of an array that a JSON array stands for */
	JsonReader *element;		/* NULL: it is none */
	Oid			element_type;
	int16		element_len;
	bool		element_byval;
	char		element_align;
};

/* An array that is being read: its elements in the order of storage. */
typedef struct ArrayParts
{
	Datum	   *values;
	bool	   *nulls;
	int			count;
	int			room;
	int			ndim;			/* 0: not known before the first element */
	int			dims[MAXDIM];	/* -1: not known before the end of the first */
} ArrayParts;

pg_noreturn static void
malformed(const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TEXT_REPRESENTATION),
			 errmsg("invalid JSON in a message"),
			 errdetail("%s", what)));
}

/* ---- strings ---- */

static int
hex_value(const char *digits)
{
	int			value = 0;

	for (int i = 0; i < 4; i++)
	{
		char		c = digits[i];

		if (c >= '0' && c <= '9')
			value = value * 16 + c - '0';
		else if (c >= 'a' && c <= 'f')
			value = value * 16 + c - 'a' + 10;
		else if (c >= 'A' && c <= 'F')
			value = value * 16 + c - 'A' + 10;
		else
			return -1;
	}
	return value;
}

static int
unicode_escape(const char *p, const char *end)
{
	int			value = (end - p >= 6 && p[0] == '\\' && p[1] == 'u') ? hex_value(p + 2) : -1;

	if (value < 0)
		malformed("A \\u is not followed by four hexadecimal digits.");
	return value;
}

/* p: at the backslash of a \u.  Appends the character; returns what follows. */
static const char *
append_unicode(StringInfo out, const char *p, const char *end)
{
	pg_wchar	c = unicode_escape(p, end);
	unsigned char buffer[MAX_UNICODE_EQUIVALENT_STRING + 1];

	p += 6;
	if (is_utf16_surrogate_first(c))
	{
		pg_wchar	second = unicode_escape(p, end);

		if (!is_utf16_surrogate_second(second))
			malformed("Half a surrogate pair stands alone.");
		c = surrogate_pair_to_codepoint(c, second);
		p += 6;
	}
	else if (is_utf16_surrogate_second(c))
		malformed("Half a surrogate pair stands alone.");
	if (c == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNTRANSLATABLE_CHARACTER),
				 errmsg("unsupported Unicode escape sequence"),
				 errdetail("\\u0000 cannot be converted to text.")));
	pg_unicode_to_server(c, buffer);
	appendStringInfoString(out, (char *) buffer);
	return p;
}

/* p: at the backslash.  Appends what the escape stands for. */
static const char *
append_escape(StringInfo out, const char *p, const char *end)
{
	static const char escapes[] = "\"\"\\\\//b\bf\fn\nr\rt\t";

	if (p + 1 < end && p[1] == 'u')
		return append_unicode(out, p, end);
	for (const char *e = escapes; p + 1 < end && *e != '\0'; e += 2)
	{
		if (*e == p[1])
		{
			appendStringInfoChar(out, e[1]);
			return p + 2;
		}
	}
	malformed("A backslash is followed by something that is no escape.");
	return NULL;
}

/*
 * readjson_string
 *		Returns the characters of a string, or the text of any other value.
 *
 * The slice is in the server encoding, as the result is, which is palloc'd in
 * the current context.  Raises 22P02 for what is no escape, 22P05 for \u0000
 * and for characters that the encoding does not have.
 */
char *
readjson_string(const JsonSlice *slice)
{
	const char *p = slice->text +1;
	const char *end = slice->text +slice->len - 1;
	StringInfoData out;

	if (slice->kind != JSON_IS_STRING)
		return pnstrdup(slice->text, slice->len);
	if (memchr(p, '\\', end - p) == NULL)
		return pnstrdup(p, end - p);
	initStringInfo(&out);
	while (p < end)
	{
		const char *escape = memchr(p, '\\', end - p);
		const char *plain_end = (escape != NULL) ? escape : end;

		appendBinaryStringInfo(&out, p, plain_end - p);
		p = (escape != NULL) ? append_escape(&out, escape, end) : end;
	}
	return out.data;
}

/* ---- plans ---- */

/* int2vector and oidvector look like arrays, but are written as their text. */
static Oid
element_type(Oid type)
{
	return (type == INT2VECTOROID || type == OIDVECTOROID) ? InvalidOid : get_element_type(type);
}

static void
plan_elements(JsonReader *reader, Oid element)
{
	reader->element = readjson_plan(element, reader->typmod, reader->context);
	reader->element_type = element;
	get_typlenbyvalalign(element, &reader->element_len, &reader->element_byval, &reader->element_align);
}

/*
 * readjson_plan
 *		Plans the reading of values of a type; of a domain, its constraints are
 *		checked, too.
 *
 * Everything is in the context; it holds as long as the type exists.
 */
JsonReader *
readjson_plan(Oid type, int32 typmod, MemoryContext context)
{
	JsonReader *reader = MemoryContextAllocZero(context, sizeof(JsonReader));
	Oid			input;
	Oid			element;

	reader->typmod = typmod;
	reader->type = getBaseTypeAndTypmod(type, &reader->typmod);
	reader->domain = (reader->type != type) ? type : InvalidOid;
	reader->context = context;
	reader->takes_json = (reader->type == JSONOID || reader->type == JSONBOID);
	reader->composite = type_is_rowtype(reader->type);
	reader->io_typmod = OidIsValid(reader->domain) ? typmod : reader->typmod;
	getTypeInputInfo(type, &input, &reader->io_param);
	fmgr_info_cxt(input, &reader->input, context);
	element = element_type(reader->type);
	if (OidIsValid(element))
		plan_elements(reader, element);
	return reader;
}

/* ---- arrays ---- */

static void
add_element(ArrayParts *parts, Datum value, bool isnull)
{
	if (parts->count == parts->room)
	{
		parts->room = Max(2 * parts->room, 16);
		parts->values = parts->values ?
			repalloc_huge(parts->values, parts->room * sizeof(Datum)) : palloc(parts->room * sizeof(Datum));
		parts->nulls = parts->nulls ?
			repalloc_huge(parts->nulls, parts->room * sizeof(bool)) : palloc(parts->room * sizeof(bool));
	}
	parts->values[parts->count] = value;
	parts->nulls[parts->count++] = isnull;
}

static void
set_dimension(ArrayParts *parts, int level, int count)
{
	if (parts->dims[level] == -1)
		parts->dims[level] = count;
	else if (parts->dims[level] != count)
		malformed("Arrays in an array do not have the same number of elements.");
}

/* Reads one dimension; arrays in it are the next one. */
static void
read_dimension(JsonReader *reader, ArrayParts *parts, const JsonSlice *slice, int level)
{
	JsonCursor	cursor;
	JsonSlice	value;
	JsonStep	step;
	int			count = 0;

	if (level == MAXDIM)
		malformed("An array has too many dimensions.");
	jsonscan_enter(slice, &cursor);
	for (; (step = jsonscan_element(&cursor, &value)) == JSON_FOUND; count++)
	{
		bool		inner = (value.kind == JSON_IS_ARRAY);
		bool		isnull;
		Datum		element;

		if (parts->ndim == 0 && !inner)
			parts->ndim = level + 1;
		if (parts->ndim != 0 && inner != (level + 1 < parts->ndim))
			malformed("Arrays in an array do not have the same number of dimensions.");
		if (inner)
		{
			read_dimension(reader, parts, &value, level + 1);
			continue;
		}
		element = readjson_value(reader->element, &value, &isnull);
		add_element(parts, element, isnull);
	}
	if (step == JSON_MALFORMED || (count == 0 && level > 0))
		malformed("An array is malformed.");
	set_dimension(parts, level, count);
}

static Datum
read_array(JsonReader *reader, const JsonSlice *slice)
{
	ArrayParts	parts = {0};
	int			lower[MAXDIM];

	for (int i = 0; i < MAXDIM; i++)
	{
		parts.dims[i] = -1;
		lower[i] = 1;
	}
	read_dimension(reader, &parts, slice, 0);
	if (parts.count == 0)
		return PointerGetDatum(construct_empty_array(reader->element_type));
	return PointerGetDatum(construct_md_array(parts.values, parts.nulls, parts.ndim, parts.dims, lower,
											  reader->element_type, reader->element_len,
											  reader->element_byval, reader->element_align));
}

/* ---- composite values ---- */

/* The attribute of that name; -1: there is none. */
static int
find_attribute(TupleDesc desc, const char *name)
{
	for (int i = 0; i < desc->natts; i++)
	{
		if (!TupleDescAttr(desc, i)->attisdropped && strcmp(NameStr(TupleDescAttr(desc, i)->attname), name) == 0)
			return i;
	}
	return -1;
}

/* Finds the slice of each attribute; of those that are not there, a null. */
static void
read_members(const JsonSlice *slice, TupleDesc desc, JsonSlice *attributes)
{
	static const JsonSlice absent = {.kind = JSON_IS_NULL,.text = "null",.len = 4};
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	value;
	JsonStep	step;

	for (int i = 0; i < desc->natts; i++)
		attributes[i] = absent;
	jsonscan_enter(slice, &cursor);
	while ((step = jsonscan_member(&cursor, &name, &value)) == JSON_FOUND)
	{
		int			i = find_attribute(desc, readjson_string(&name));

		if (i >= 0)
			attributes[i] = value;
	}
	if (step == JSON_MALFORMED)
		malformed("An object is malformed.");
}

static Datum
read_composite(JsonReader *reader, const JsonSlice *slice)
{
	TupleDesc	desc = lookup_rowtype_tupdesc(reader->type, reader->typmod);
	JsonSlice  *attributes = palloc(desc->natts * sizeof(JsonSlice));
	Datum	   *values = palloc0(desc->natts * sizeof(Datum));
	bool	   *nulls = palloc(desc->natts * sizeof(bool));
	Datum		result;

	read_members(slice, desc, attributes);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i);

		nulls[i] = true;
		if (!attr->attisdropped)
			values[i] = readjson_value(readjson_plan(attr->atttypid, attr->atttypmod, CurrentMemoryContext),
									   &attributes[i], &nulls[i]);
	}
	result = HeapTupleGetDatum(heap_form_tuple(desc, values, nulls));
	ReleaseTupleDesc(desc);
	return result;
}

/* ---- values ---- */

/*
 * Reads what stands for its parts; the constraints of a domain are checked
 * afterwards.  Such types have the binary form that domain_check() asks for, and
 * that others need not have.
 */
static Datum
read_container(JsonReader *reader, const JsonSlice *slice)
{
	Datum		value = (reader->element != NULL) ? read_array(reader, slice) : read_composite(reader, slice);

	if (OidIsValid(reader->domain))
		domain_check(value, false, reader->domain, &reader->domain_extra, reader->context);
	return value;
}

/*
 * readjson_value
 *		Reads one value; a JSON null is an SQL NULL, whatever the type.
 *
 * Raises what the types' input functions and domains raise, 22P02 for what is no
 * JSON.  The value is in the current context, with all that it took to make it.
 */
Datum
readjson_value(JsonReader *reader, const JsonSlice *slice, bool *isnull)
{
	char	   *text = NULL;

	check_stack_depth();
	*isnull = (slice->kind == JSON_IS_NULL);
	if ((reader->element != NULL && slice->kind == JSON_IS_ARRAY) ||
		(reader->composite && slice->kind == JSON_IS_OBJECT))
		return read_container(reader, slice);
	if (reader->takes_json && !*isnull)
		text = pnstrdup(slice->whole, slice->whole_len);

	else if (!*isnull)
		text = readjson_string(slice);

	else if (!OidIsValid(reader->domain))
		return (Datum) 0;
	/* a domain may have a word to say on NULL */
	return InputFunctionCall(&reader->input, text, reader->io_param, reader->io_typmod);
}
