/*-------------------------------------------------------------------------
 *
 * append.h
 *		Appending short texts to a StringInfo without a call where there is room.
 *
 * A row's JSON is made of some dozens of short pieces, and the functions in
 * lib/stringinfo.c cost more than the copying.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_APPEND_H
#define PGF_APPEND_H

#include "postgres.h"

#include "lib/stringinfo.h"

/* Makes room for that many bytes and a NUL, and returns where to write them. */
static inline char *
append_room(StringInfo out, int len)
{
	if (unlikely(out->maxlen - out->len <= len))
		enlargeStringInfo(out, len);
	return out->data + out->len;
}

/* Says that bytes were written into the room, up to the end. */
static inline void
append_done(StringInfo out, char *end)
{
	*end = '\0';
	out->len = end - out->data;
}

static inline void
append_bytes(StringInfo out, const char *bytes, int len)
{
	char	   *to = append_room(out, len);

	memcpy(to, bytes, len);
	append_done(out, to + len);
}

/* The same of a string literal. */
#define append_literal(out, literal) append_bytes(out, "" literal, sizeof(literal) - 1)

static inline void
append_string(StringInfo out, const char *string)
{
	append_bytes(out, string, strlen(string));
}

static inline void
append_char(StringInfo out, char c)
{
	append_bytes(out, &c, 1);
}

#endif							/* PGF_APPEND_H */
