/*-------------------------------------------------------------------------
 *
 * headers.h
 *		Reading the headers of a message, a jsonb object.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_HEADERS_H
#define PGF_HEADERS_H

#include "postgres.h"

#include "utils/jsonb.h"

/* Finds a header, which may be put into the buffer; NULL: there is none. */
extern JsonbValue *headers_find(Jsonb *headers, const char *name, JsonbValue *buffer);

/* A string among them, in the current context; NULL: there is none. */
extern char *headers_string(Jsonb *headers, const char *name);

#endif							/* PGF_HEADERS_H */
