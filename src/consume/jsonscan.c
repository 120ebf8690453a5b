/*-------------------------------------------------------------------------
 *
 * jsonscan.c
 *		Takes a JSON text apart without changing a byte of it.
 *
 * The server's own reader turns escapes into characters wherever they stand,
 * so that a body with \u0000 somewhere in a json column could not be read at
 * all; and jsonb keeps neither the text of numbers nor the order of members.
 * Here each value is a slice of the text, in which nothing was looked at that
 * nobody asks for.
 *
 * It checks the JSON grammar of what it walks through: the brackets, commas
 * and colons of the containers that are entered.  Of a value that is skipped it
 * only checks that strings end and that brackets balance; whoever reads that
 * value checks it.
 *
 * No allocation, no recursion, no dependency on the server: an object of any
 * depth takes a counter.  The text is in an encoding whose multibyte characters
 * have no ASCII bytes, as all server encodings are.  RFC 8259 has the grammar.
 *
 * Must never: read beyond the end of the text, whatever it contains.
 *
 *-------------------------------------------------------------------------
 */
#include "consume/jsonscan.h"

#include <string.h>

static const char *
skip_blanks(const char *p, const char *end)
{
	while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r'))
		p++;
	return p;
}

/* p: at the opening quote.  Returns what follows the closing one; NULL: none. */
static const char *
skip_string(const char *p, const char *end)
{
	for (p++; p < end; p++)
	{
		if (*p == '\\')
			p++;
		else if (*p == '"')
			return p + 1;
	}
	return NULL;
}

/* p: at the opening bracket.  Returns what follows its partner; NULL: none. */
static const char *
skip_container(const char *p, const char *end)
{
	size_t		depth = 0;

	while (p < end)
	{
		switch (*p)
		{
			case '"':
				p = skip_string(p, end);
				if (p == NULL)
					return NULL;
				continue;
			case '{':
			case '[':
				depth++;
				break;
			case '}':
			case ']':
				if (--depth == 0)
					return p + 1;
				break;
			default:
				break;
		}
		p++;
	}
	return NULL;
}

static const char *
skip_number(const char *p, const char *end)
{
	while (p < end && *p != '\0' && strchr("+-.0123456789eE", *p) != NULL)
		p++;
	return p;
}

static const char *
skip_word(const char *p, const char *end, const char *word)
{
	size_t		len = strlen(word);

	return (size_t) (end - p) >= len && memcmp(p, word, len) == 0 ? p + len : NULL;
}

/*
 * Sets the slice of the value that begins at p, maybe with blanks; returns what
 * follows it and the blanks behind it.
 */
static const char *
read_value(const char *p, const char *end, JsonSlice *value)
{
	const char *whole = p;
	const char *after;

	p = skip_blanks(p, end);
	if (p == end)
		return NULL;
	switch (*p)
	{
		case '"':
			value->kind = JSON_IS_STRING;
			after = skip_string(p, end);
			break;
		case '{':
		case '[':
			value->kind = (*p == '{') ? JSON_IS_OBJECT : JSON_IS_ARRAY;
			after = skip_container(p, end);
			break;
		case 't':
		case 'f':
			value->kind = JSON_IS_BOOLEAN;
			after = skip_word(p, end, *p == 't' ? "true" : "false");
			break;
		case 'n':
			value->kind = JSON_IS_NULL;
			after = skip_word(p, end, "null");
			break;
		default:
			value->kind = JSON_IS_NUMBER;
			after = skip_number(p, end);
			if (after == p)
				return NULL;
			break;
	}
	if (after == NULL)
		return NULL;
	value->text = p;
	value->len = (size_t) (after - p);
	after = skip_blanks(after, end);
	value->whole = whole;
	value->whole_len = (size_t) (after - whole);
	return after;
}

/*
 * jsonscan_text
 *		Finds the one value of a text of len bytes; false if it is not JSON.
 *
 * The slice points into the text.
 */
bool
jsonscan_text(const char *text, size_t len, JsonSlice *value)
{
	const char *after = read_value(text, text +len, value);

	return after != NULL && skip_blanks(after, text +len) == text +len;
}

/*
 * jsonscan_enter
 *		Begins to read an object or an array; the cursor points into its text.
 */
void
jsonscan_enter(const JsonSlice *container, JsonCursor *cursor)
{
	cursor->next = container->text +1;
	cursor->end = container->text +container->len;
	cursor->close = (container->kind == JSON_IS_OBJECT) ? '}' : ']';
	cursor->first = true;
}

/* Steps over the comma before the next one, or the bracket at the end. */
static JsonStep
step(JsonCursor *cursor)
{
	const char *p = skip_blanks(cursor->next, cursor->end);
	bool		first = cursor->first;

	cursor->first = false;
	if (p == cursor->end)
		return JSON_MALFORMED;
	if (*p == cursor->close)
		return p + 1 == cursor->end ? JSON_END : JSON_MALFORMED;
	if (!first && *p != ',')
		return JSON_MALFORMED;
	cursor->next = first ? p : p + 1;
	return JSON_FOUND;
}

/*
 * jsonscan_element
 *		Finds the next element of the array that was entered.
 *
 * After JSON_END or JSON_MALFORMED the cursor is of no more use.
 */
JsonStep
jsonscan_element(JsonCursor *cursor, JsonSlice *value)
{
	JsonStep	result = step(cursor);

	if (result != JSON_FOUND)
		return result;
	cursor->next = read_value(cursor->next, cursor->end, value);
	return cursor->next != NULL ? JSON_FOUND : JSON_MALFORMED;
}

/*
 * jsonscan_member
 *		Finds the next member of the object that was entered; its name is the
 *		slice of a string.  Otherwise as jsonscan_element().
 */
JsonStep
jsonscan_member(JsonCursor *cursor, JsonSlice *name, JsonSlice *value)
{
	JsonStep	result = step(cursor);
	const char *p;

	if (result != JSON_FOUND)
		return result;
	p = read_value(cursor->next, cursor->end, name);
	if (p == NULL || name->kind != JSON_IS_STRING)
		return JSON_MALFORMED;
	if (p == cursor->end || *p != ':')
		return JSON_MALFORMED;
	cursor->next = read_value(p + 1, cursor->end, value);
	return cursor->next != NULL ? JSON_FOUND : JSON_MALFORMED;
}
