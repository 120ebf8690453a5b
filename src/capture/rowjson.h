/*-------------------------------------------------------------------------
 *
 * rowjson.h
 *		Rows to JSON, the same from every session.
 *
 * What a value becomes depends on it and its type alone, never on a setting of
 * the session:
 *
 *	- numbers are JSON numbers, floats the shortest that read back exactly; NaN
 *	  and the infinities are strings; booleans are booleans
 *	- dates and timestamps are strings in ISO 8601, timestamptz in UTC
 *	- json is the text as it is, jsonb as it prints itself
 *	- an array is a JSON array, of arrays if it has more than one dimension
 *	- but an array that a JSON array would not read back as is a string, the
 *	  array's text: if a lower bound is not 1; always if its elements are json or
 *	  jsonb, or of a domain over arrays; always int2vector and oidvector
 *	- a composite value is an object of its attributes
 *	- a domain's value is one of the type beneath
 *	- all else is a string: what the type's output function gives under the
 *	  settings of textform.h.  Casts to json are never used.
 *
 * The type's input function reads each of these strings back to the equal
 * value.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ROWJSON_H
#define PGF_ROWJSON_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "lib/stringinfo.h"

/* How one relation's rows are rendered; made once, used for many rows. */
typedef struct RowJson RowJson;

/*
 * Plans the rendering of the columns named by attnums (1-based, of tupdesc,
 * no dropped ones), in that order.  Everything is allocated in context.
 */
extern RowJson *rowjson_plan(TupleDesc tupdesc, const AttrNumber *attnums, int nattnums,
							 MemoryContext context);

/*
 * Appends the row as a JSON object {"column":value,...}.  Virtual generated
 * columns (PostgreSQL 18) must not be in the plan.
 */
extern void rowjson_append(StringInfo out, RowJson *plan, HeapTuple tuple, TupleDesc tupdesc);

/*
 * Appends one column's value as JSON; index counts the plan's columns from 0.
 * NULL becomes null.
 */
extern void rowjson_append_value(StringInfo out, RowJson *plan, int index,
								 Datum value, bool isnull);

/*
 * The same value as text: a string comes without quotes and escapes, everything
 * else as its JSON.  A json or jsonb value stays JSON even where it is a string.
 * Returns NULL for an SQL NULL.  palloc'd in the current context.
 */
extern char *rowjson_text(RowJson *plan, int index, Datum value, bool isnull);

#endif							/* PGF_ROWJSON_H */
