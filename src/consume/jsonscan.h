/*-------------------------------------------------------------------------
 *
 * jsonscan.h
 *		Takes a JSON text apart without changing a byte of it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_JSONSCAN_H
#define PGF_JSONSCAN_H

#include <stdbool.h>
#include <stddef.h>

typedef enum JsonKind
{
	JSON_IS_OBJECT,
	JSON_IS_ARRAY,
	JSON_IS_STRING,
	JSON_IS_NUMBER,
	JSON_IS_BOOLEAN,
	JSON_IS_NULL,
} JsonKind;

/* A value as it stands in the text: a string with its quotes and escapes. */
typedef struct JsonSlice
{
	JsonKind	kind;
	const char *text;			/* not terminated */
	size_t		len;			/* bytes */

	/* the same with the blanks around it */
	const char *whole;
	size_t		whole_len;
} JsonSlice;

/* Where the members of an object, or the elements of an array, are read. */
typedef struct JsonCursor
{
	const char *next;
	const char *end;			/* of the text */
	char		close;			/* the bracket that ends it */
	bool		first;			/* nothing was read yet */
} JsonCursor;

typedef enum JsonStep
{
	JSON_FOUND,
	JSON_END,
	JSON_MALFORMED,
} JsonStep;

extern bool jsonscan_text(const char *text, size_t len, JsonSlice *value);
extern void jsonscan_enter(const JsonSlice *container, JsonCursor *cursor);
extern JsonStep jsonscan_member(JsonCursor *cursor, JsonSlice *name, JsonSlice *value);
extern JsonStep jsonscan_element(JsonCursor *cursor, JsonSlice *value);

#endif							/* PGF_JSONSCAN_H */
