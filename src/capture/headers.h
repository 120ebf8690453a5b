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

/* A string among them, in the current context; NULL: there is none. */
extern char *headers_string(Jsonb *headers, const char *name);

#endif							/* PGF_HEADERS_H */
