/*-------------------------------------------------------------------------
 *
 * jsonbuild.c
 *		jsonb of what a message has: headers, and a body.
 *
 * Making these two is a good part of what a message costs.  The server's way is
 * to push one token after another onto a stack of states, copy each string, sort the
 * members of each object at its end, and append each value to a buffer that may grow.  Here a tree is made at once, with strings that stay where they are, and
 * written to memory that has room for all of it.
 *
 * Only plain JSON texts are read here, as nearly all are: without escapes, with numbers
 * of at most MAX_NUMBER characters and no exponents, nested at most MAX_DEPTH deep, and
 * of at most MAX_TEXT bytes.  All other texts, JSON or not, are left to jsonb_in(), which
 * raises the errors.  The result is the same, byte for byte.  RFC 8259 has the grammar,
 * utils/jsonb.h what jsonb is in memory and on disk.
 *
 * The text is in an encoding whose multibyte characters have no ASCII bytes, as all
 * server encodings are.
 *
 * Must never: read beyond the end of the text, raise an error but for lack of memory,
 * or accept what jsonb_in() refuses.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

#include "consume/jsonbuild.h"
#include "server/utf8.h"

/* Limits of a plain text, far below those of jsonb, so that none of these can be met. */
#define MAX_TEXT (256 * 1024)
#define MAX_DEPTH 64
#define MAX_NUMBER 64

/* Digits that fit an int64 whatever they are. */
#define INT64_DIGITS 18

/* Objects of at most so many members are sorted by insertion, larger ones by qsort(). */
#define FEW_MEMBERS 32

/* Room for members or elements at first. */
#define FIRST_ROOM 16

/* ---- containers ---- */

/*
 * Compares as jsonb sorts the members of an object: shorter names first.  Of one
 * name, those that came first.
 */
static int
compare_members(const JsonbPair * a, const JsonbPair * b)
{
	int			cmp;

	if (a->key.val.string.len != b->key.val.string.len)
		return a->key.val.string.len < b->key.val.string.len ? -1 : 1;
	cmp = memcmp(a->key.val.string.val, b->key.val.string.val, a->key.val.string.len);
	if (cmp != 0)
		return cmp;
	return a->order < b->order ? -1 : 1;
}

static int
compare_pointers(const void *a, const void *b)
{
	return compare_members(*(JsonbPair * const *) a, *(JsonbPair * const *) b);
}

static bool
same_name(const JsonbPair * a, const JsonbPair * b)
{
	return a->key.val.string.len == b->key.val.string.len &&
		memcmp(a->key.val.string.val, b->key.val.string.val, a->key.val.string.len) == 0;
}

static void
sort_members(JsonbPair * pairs, int n, JsonbPair * *sorted)
{
	for (int i = 0; i < n; i++)
	{
		int			place = i;

		pairs[i].order = i;
		for (; n <= FEW_MEMBERS && place > 0 && compare_members(sorted[place - 1], &pairs[i]) > 0; place--)
			sorted[place] = sorted[place - 1];
		sorted[place] = &pairs[i];
	}
	if (n > FEW_MEMBERS)
		qsort(sorted, n, sizeof(JsonbPair *), compare_pointers);
}

/* Makes an object of members in any order; of those of one name the last one counts. */
static void
make_object(JsonbPair * pairs, int n, JsonbValue *object)
{
	JsonbPair **sorted = palloc((n + 1) * sizeof(JsonbPair *));

	object->type = jbvObject;
	object->val.object.pairs = palloc((n + 1) * sizeof(JsonbPair));
	object->val.object.nPairs = 0;
	sort_members(pairs, n, sorted);
	for (int i = 0; i < n; i++)
	{
		if (i + 1 == n || !same_name(sorted[i], sorted[i + 1]))
			object->val.object.pairs[object->val.object.nPairs++] = *sorted[i];
	}
}

static void
make_array(JsonbValue *elements, int n, JsonbValue *array)
{
	array->type = jbvArray;
	array->val.array.nElems = n;
	array->val.array.elems = elements;
	array->val.array.rawScalar = false;
}

/* ---- scalars ---- */

static void
set_string(JsonbValue *value, const char *text, size_t len)
{
	value->type = jbvString;
	value->val.string.val = unconstify(char *, text);

	value->val.string.len = len;
}

static void
set_int(JsonbValue *value, int64 integer)
{
	value->type = jbvNumeric;
	value->val.numeric = int64_to_numeric(integer);
}

static void
set_numeric(JsonbValue *value, char *digits)
{
	value->type = jbvNumeric;
	value->val.numeric = DatumGetNumeric(DirectFunctionCall3(numeric_in, CStringGetDatum(digits),
															 ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
}

/* ---- jsonb ---- */

/* Returns how many bytes a value takes at most, with the padding before it. */
static size_t
size_limit(const JsonbValue *value)
{
	size_t		size = ALIGNOF_INT + sizeof(uint32);

	switch (value->type)
	{
		case jbvString:
			return value->val.string.len;
		case jbvNumeric:
			return ALIGNOF_INT + VARSIZE_ANY(value->val.numeric);
		case jbvArray:
			for (int i = 0; i < value->val.array.nElems; i++)
				size += sizeof(JEntry) + size_limit(&value->val.array.elems[i]);
			return size;
		case jbvObject:
			for (int i = 0; i < value->val.object.nPairs; i++)
				size += 2 * sizeof(JEntry) + size_limit(&value->val.object.pairs[i].key) +
					size_limit(&value->val.object.pairs[i].value);
			return size;
		default:
			return 0;
	}
}

static char *
write_bytes(char *out, const void *bytes, size_t len)
{
	memcpy(out, bytes, len);
	return out + len;
}

/* Numbers and containers are aligned as an int is. */
static char *
write_padding(char *out)
{
	while (out != (char *) INTALIGN(out))
		*out++ = '\0';
	return out;
}

static char *write_value(char *out, const JsonbValue *value, JEntry * entry);

/*
 * Writes the value of a container's entry, and then sets the entry: to the value's length or,
 * in each JB_OFFSET_STRIDE'th, to where it ends, counted from the first value's beginning.
 */
static char *
write_entry(char *out, const JsonbValue *value, JEntry * entries, int index, const char *values)
{
	out = write_value(out, value, &entries[index]);
	if (index % JB_OFFSET_STRIDE == 0)
		entries[index] = (entries[index] & JENTRY_TYPEMASK) | (out - values) | JENTRY_HAS_OFF;
	return out;
}

static char *
write_container(char *out, const JsonbValue *value)
{
	bool		object = (value->type == jbvObject);
	int			count = object ? value->val.object.nPairs : value->val.array.nElems;
	uint32		header = count | (object ? JB_FOBJECT : JB_FARRAY);
	JEntry	   *entries;
	char	   *values;

	if (!object && value->val.array.rawScalar)
		header |= JB_FSCALAR;
	out = write_bytes(write_padding(out), &header, sizeof(header));
	entries = (JEntry *) out;
	values = out = (char *) (entries + (object ? 2 * count : count));
	for (int i = 0; i < count; i++)
		out = write_entry(out, object ? &value->val.object.pairs[i].key : &value->val.array.elems[i],
						  entries, i, values);
	for (int i = 0; object && i < count; i++)
		out = write_entry(out, &value->val.object.pairs[i].value, entries, count + i, values);
	return out;
}

/* Writes a value, after padding if it needs that; sets *entry to its type and the bytes written. */
static char *
write_value(char *out, const JsonbValue *value, JEntry * entry)
{
	const char *begin = out;
	JEntry		type;

	switch (value->type)
	{
		case jbvString:
			type = JENTRY_ISSTRING;
			out = write_bytes(out, value->val.string.val, value->val.string.len);
			break;
		case jbvNumeric:
			type = JENTRY_ISNUMERIC;
			out = write_bytes(write_padding(out), value->val.numeric, VARSIZE_ANY(value->val.numeric));
			break;
		case jbvBool:
			type = value->val.boolean ? JENTRY_ISBOOL_TRUE : JENTRY_ISBOOL_FALSE;
			break;
		case jbvNull:
			type = JENTRY_ISNULL;
			break;
		default:
			type = JENTRY_ISCONTAINER;
			out = write_container(out, value);
			break;
	}
	*entry = type | (out - begin);
	return out;
}

/* Returns the value as jsonb, in the current context.  jsonb has a scalar as an array of one. */
static Jsonb *
write_jsonb(JsonbValue *value)
{
	JsonbValue	scalar = *value;
	Jsonb	   *jsonb;
	char	   *end;

	if (value->type != jbvArray && value->type != jbvObject)
	{
		make_array(&scalar, 1, value);
		value->val.array.rawScalar = true;
	}
	jsonb = palloc(VARHDRSZ + size_limit(value));
	end = write_container((char *) &jsonb->root, value);
	SET_VARSIZE(jsonb, end - (char *) jsonb);
	return jsonb;
}

/* ---- fields ---- */

static void set_field(const BrokerField *field, JsonbValue *value);

static bool
set_utf8(JsonbValue *value, const char *utf8, size_t len)
{
	const char *text = utf8_view(utf8, len, &len);

	if (text !=NULL)
		set_string(value, text, len);
	return text !=NULL;
}

/* Fields whose name cannot be converted are left out. */
static void
set_table(const BrokerField *fields, int count, JsonbValue *value)
{
	JsonbPair  *pairs = palloc((count + 1) * sizeof(JsonbPair));
	int			n = 0;

	for (int i = 0; i < count; i++)
	{
		if (!set_utf8(&pairs[n].key, fields[i].name, strlen(fields[i].name)))
			continue;
		set_field(&fields[i], &pairs[n].value);
		n++;
	}
	make_object(pairs, n, value);
}

static void
set_fields(const BrokerField *fields, int count, JsonbValue *value)
{
	JsonbValue *elements = palloc((count + 1) * sizeof(JsonbValue));

	for (int i = 0; i < count; i++)
		set_field(&fields[i], &elements[i]);
	make_array(elements, count, value);
}

/*
 * Reads a field's value; null: it has none that jsonb has, as infinity and bytes that
 * are no text.  Nested no deeper than the connection lets fields be.
 */
static void
set_field(const BrokerField *field, JsonbValue *value)
{
	value->type = jbvNull;
	switch (field->type)
	{
		case BROKER_VALUE_BOOL:
			value->type = jbvBool;
			value->val.boolean = field->value.boolean;
			break;
		case BROKER_VALUE_INT:
			set_int(value, field->value.integer);
			break;
		case BROKER_VALUE_DOUBLE:
			if (isfinite(field->value.real))
				set_numeric(value, psprintf("%.17g", field->value.real));
			break;
		case BROKER_VALUE_STRING:
			(void) set_utf8(value, field->value.string.data, field->value.string.len);
			break;
		case BROKER_VALUE_TABLE:
			set_table(field->value.nested.fields, field->value.nested.count, value);
			break;
		case BROKER_VALUE_ARRAY:
			set_fields(field->value.nested.fields, field->value.nested.count, value);
			break;
		default:
			break;
	}
}

/* Returns the fields as an object, in the current context. */
Jsonb *
jsonbuild_fields(const BrokerField *fields, int count)
{
	JsonbValue	object;

	set_table(fields, count, &object);
	return write_jsonb(&object);
}

/* ---- text ---- */

typedef struct TextReader
{
	const char *next;
	const char *end;
	int			depth;
} TextReader;

/* All of these return false if the text is not plain. */
static bool read_value(TextReader *reader, JsonbValue *value);

/* Skips blanks, and returns the character that follows; NUL, which no JSON has: none. */
static inline char
peek(TextReader *reader)
{
	while (reader->next < reader->end && (unsigned char) *reader->next <= ' ' &&
		   (*reader->next == ' ' || *reader->next == '\t' || *reader->next == '\n' || *reader->next == '\r'))
		reader->next++;
	return reader->next < reader->end ? *reader->next : '\0';
}

static bool
take(TextReader *reader, char c)
{
	if (peek(reader) != c)
		return false;
	reader->next++;
	return true;
}

static bool
read_word(TextReader *reader, const char *word, JsonbValue *value)
{
	size_t		len = strlen(word);

	if ((size_t) (reader->end - reader->next) < len || memcmp(reader->next, word, len) != 0)
		return false;
	reader->next += len;
	value->type = (*word == 'n') ? jbvNull : jbvBool;
	value->val.boolean = (*word == 't');
	return true;
}

static bool
read_string(TextReader *reader, JsonbValue *value)
{
	const char *begin = ++reader->next;

	for (const char *p = begin; p < reader->end; p++)
	{
		if (*p == '"')
		{
			set_string(value, begin, p - begin);
			reader->next = p + 1;
			return true;
		}
		if (*p == '\\' || (unsigned char) *p < 0x20)
			return false;
	}
	return false;
}

/* Steps over digits; returns how many there are. */
static int
skip_digits(TextReader *reader)
{
	const char *begin = reader->next;

	while (reader->next < reader->end && *reader->next >= '0' && *reader->next <= '9')
		reader->next++;
	return reader->next - begin;
}

static int64
to_integer(const char *digits, int n)
{
	int64		integer = 0;

	for (int i = 0; i < n; i++)
		integer = integer * 10 + (digits[i] - '0');
	return integer;
}

static bool
read_number(TextReader *reader, JsonbValue *value)
{
	const char *begin = reader->next;
	bool		negative = (peek(reader) == '-');
	const char *digits = begin + (negative ? 1 : 0);
	int			n;

	reader->next = digits;
	n = skip_digits(reader);
	if (n == 0 || (n > 1 && *digits == '0'))
		return false;
	if (n <= INT64_DIGITS && (reader->next == reader->end || *reader->next != '.'))
	{
		set_int(value, negative ? -to_integer(digits, n) : to_integer(digits, n));
		return true;
	}
	if (reader->next < reader->end && *reader->next == '.')
	{
		reader->next++;
		if (skip_digits(reader) == 0)
			return false;
	}
	if (reader->next - begin > MAX_NUMBER)
		return false;
	set_numeric(value, pnstrdup(begin, reader->next - begin));
	return true;
}

/* Makes room for one more, if there is none; n: how many there are. */
static void *
grow(void *array, int n, int *room, size_t size)
{
	if (n < *room)
		return array;
	*room = (*room == 0) ? FIRST_ROOM : *room * 2;
	return array == NULL ? palloc(*room * size) : repalloc(array, *room * size);
}

static bool
read_array(TextReader *reader, JsonbValue *value)
{
	JsonbValue *elements = NULL;
	int			room = 0;
	int			n = 0;

	reader->next++;
	for (bool more = (peek(reader) != ']'); more; more = take(reader, ','))
	{
		elements = grow(elements, n, &room, sizeof(JsonbValue));
		if (!read_value(reader, &elements[n++]))
			return false;
	}
	make_array(elements, n, value);
	return take(reader, ']');
}

static bool
read_member(TextReader *reader, JsonbPair * pair)
{
	return peek(reader) == '"' && read_string(reader, &pair->key) && take(reader, ':') &&
		read_value(reader, &pair->value);
}

static bool
read_object(TextReader *reader, JsonbValue *value)
{
	JsonbPair  *pairs = NULL;
	int			room = 0;
	int			n = 0;

	reader->next++;
	for (bool more = (peek(reader) != '}'); more; more = take(reader, ','))
	{
		pairs = grow(pairs, n, &room, sizeof(JsonbPair));
		if (!read_member(reader, &pairs[n++]))
			return false;
	}
	make_object(pairs, n, value);
	return take(reader, '}');
}

static bool
read_container(TextReader *reader, JsonbValue *value)
{
	bool		plain;

	if (reader->depth == MAX_DEPTH)
		return false;
	reader->depth++;
	plain = (*reader->next == '{') ? read_object(reader, value) : read_array(reader, value);
	reader->depth--;
	return plain;
}

static bool
read_value(TextReader *reader, JsonbValue *value)
{
	switch (peek(reader))
	{
		case '"':
			return read_string(reader, value);
		case '{':
		case '[':
			return read_container(reader, value);
		case 't':
			return read_word(reader, "true", value);
		case 'f':
			return read_word(reader, "false", value);
		case 'n':
			return read_word(reader, "null", value);
		default:
			return read_number(reader, value);
	}
}

/*
 * Returns a plain JSON text of the server's encoding as jsonb, in the current
 * context; NULL: it is not plain, or no JSON.
 */
Jsonb *
jsonbuild_text(const char *json, size_t len)
{
	TextReader	reader = {.next = json,.end = json + len};
	JsonbValue	value;

	if (len > MAX_TEXT || !read_value(&reader, &value) || peek(&reader) != '\0' || reader.next != reader.end)
		return NULL;
	return write_jsonb(&value);
}
