/*-------------------------------------------------------------------------
 *
 * rowjson.h
 *		Rows to JSON, as to_json() renders them.
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
 * Appends the row as a JSON object {"column":value,...}, byte for byte as
 * row_to_json() would render a row of these columns.  Virtual generated
 * columns (PostgreSQL 18) must not be in the plan.
 */
extern void rowjson_append(StringInfo out, RowJson *plan, HeapTuple tuple, TupleDesc tupdesc);

/*
 * Appends one column's value as JSON, as to_json() would; index counts the
 * plan's columns from 0.  NULL becomes null.
 */
extern void rowjson_append_value(StringInfo out, RowJson *plan, int index,
								 Datum value, bool isnull);

/*
 * The same value as text: what to_json() makes a string comes without quotes
 * and escapes, everything else as its JSON.  A json value, or one that a cast
 * turns into json, stays JSON even where it is a string.  Returns NULL for an
 * SQL NULL.  palloc'd in the current context.
 */
extern char *rowjson_text(RowJson *plan, int index, Datum value, bool isnull);

#endif							/* PGF_ROWJSON_H */
