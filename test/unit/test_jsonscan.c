/*
 * JSON texts are taken apart into slices that are the text itself, whatever is in
 * them; what is not JSON where it is looked at is malformed; nothing is read behind
 * the end, wherever a text is cut.
 */
#include "consume/jsonscan.h"

#include <stdlib.h>
#include <string.h>

#include "tap.h"

static bool
is(const JsonSlice *slice, JsonKind kind, const char *text)
{
	return slice->kind == kind && slice->len == strlen(text) && memcmp(slice->text, text, slice->len) == 0;
}

static bool
whole_is(const JsonSlice *slice, const char *text)
{
	return slice->whole_len == strlen(text) && memcmp(slice->whole, text, slice->whole_len) == 0;
}

/* Walks through all that is in a text; false: something is malformed. */
static bool
walk(const JsonSlice *value, int depth)
{
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	inner;
	JsonStep	step;

	if (value->kind != JSON_IS_OBJECT && value->kind != JSON_IS_ARRAY)
		return true;
	jsonscan_enter(value, &cursor);
	do
	{
		step = (value->kind == JSON_IS_OBJECT) ? jsonscan_member(&cursor, &name, &inner) : jsonscan_element(&cursor, &inner);
		if (step == JSON_FOUND && depth > 0 && !walk(&inner, depth - 1))
			return false;
	} while (step == JSON_FOUND);
	return step == JSON_END;
}

/* The text in memory of its own, so that a look behind its end is noticed. */
static bool
is_json(const char *text, size_t len)
{
	char	   *copy = malloc(len > 0 ? len : 1);
	JsonSlice	value;
	bool		result;

	if (copy == NULL)
		abort();
	memcpy(copy, text, len);
	result = jsonscan_text(copy, len, &value) && walk(&value, 100);
	free(copy);
	return result;
}

static void
test_values(void)
{
	static const struct
	{
		const char *text;
		JsonKind	kind;
		const char *value;
	}			cases[] = {
		{"{}", JSON_IS_OBJECT, "{}"},
		{" [ ] ", JSON_IS_ARRAY, "[ ]"},
		{"\"a\\\"b\"", JSON_IS_STRING, "\"a\\\"b\""},
		{"-1.50e+3", JSON_IS_NUMBER, "-1.50e+3"},
		{"true", JSON_IS_BOOLEAN, "true"},
		{"\tfalse\n", JSON_IS_BOOLEAN, "false"},
		{"null", JSON_IS_NULL, "null"},
		{"{\"a\":[1,{\"b\":\"}\\\\\"}]}", JSON_IS_OBJECT, "{\"a\":[1,{\"b\":\"}\\\\\"}]}"},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		JsonSlice	value;

		ok(jsonscan_text(cases[i].text, strlen(cases[i].text), &value) && is(&value, cases[i].kind, cases[i].value) &&
		   whole_is(&value, cases[i].text), "%s is a value", cases[i].value);
	}
}

static void
test_malformed(void)
{
	static const char *const texts[] = {
		"", " ", "{", "}", "[", "]", "\"", "\"\\", "\"\\\"", "nul", "tru", "falsy", "x", "1 2", "{}{}", "{\"a\"}", "{\"a\":}", "{\"a\":1,}",
		"{,}", "{1:2}", "{\"a\" 1}", "{\"a\":1 \"b\":2}", "[1,]", "[,1]", "[1 2]", "[1}", "{\"a\":1]", "{\"a\":[}", "\n\"a", "[\"a]", "'a'"
	};

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
		ok(!is_json(texts[i], strlen(texts[i])), "malformed text number %zu", i);
}

static void
test_members(void)
{
	const char *text = "{ \"a\" : 1 , \"b\":[ 1, [2] ] ,\"\\u0000\": {\"c\":\"\\ud800\"} }";
	JsonSlice	value;
	JsonSlice	name;
	JsonSlice	found;
	JsonCursor	cursor;

	ok(jsonscan_text(text, strlen(text), &value), "an object");
	jsonscan_enter(&value, &cursor);
	ok(jsonscan_member(&cursor, &name, &found) == JSON_FOUND && is(&name, JSON_IS_STRING, "\"a\"") &&
	   is(&found, JSON_IS_NUMBER, "1") && whole_is(&found, " 1 "), "its first member");
	ok(jsonscan_member(&cursor, &name, &found) == JSON_FOUND && is(&found, JSON_IS_ARRAY, "[ 1, [2] ]"), "its second one");
	ok(jsonscan_member(&cursor, &name, &found) == JSON_FOUND && is(&name, JSON_IS_STRING, "\"\\u0000\"") &&
	   is(&found, JSON_IS_OBJECT, "{\"c\":\"\\ud800\"}"), "its third one, with its escapes");
	ok(jsonscan_member(&cursor, &name, &found) == JSON_END, "its end");
}

/* Cut anywhere, and with any byte changed: no look behind the end. */
static void
test_damage(void)
{
	const char *text = "{\"a\":[1,\"x\\\"\",{\"b\":null,\"c\":[true,false]}],\"d\":{}}";
	size_t		len = strlen(text);
	char	   *changed = strdup(text);
	int			whole = 0;

	if (changed == NULL)
		abort();
	for (size_t i = 0; i <= len; i++)
		whole += is_json(text, i);
	ok(whole == 1, "a text is malformed wherever it is cut");
	for (size_t i = 0; i < len; i++)
	{
		for (int c = 0; c < 256; c++)
		{
			changed[i] = (char) c;
			(void) is_json(changed, len);
		}
		changed[i] = text[i];
	}
	ok(true, "a text may be damaged anywhere");
	free(changed);
}

/* Depth takes no stack. */
static void
test_depth(void)
{
	size_t		len = 2000000;
	char	   *text = malloc(len);
	JsonSlice	value;

	if (text == NULL)
		abort();
	memset(text, '[', len / 2);
	memset(text +len / 2, ']', len / 2);
	ok(jsonscan_text(text, len, &value) && value.len == len, "a million arrays in one another");
	free(text);
}

int
main(void)
{
	test_values();
	test_malformed();
	test_members();
	test_damage();
	test_depth();
	return done();
}
