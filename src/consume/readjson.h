/*-------------------------------------------------------------------------
 *
 * readjson.h
 *		JSON to values of types: what rowjson.h writes is read back equal.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_READJSON_H
#define PGF_READJSON_H

#include "postgres.h"

#include "consume/jsonscan.h"

/* How values of one type are read; made once, used for many. */
typedef struct JsonReader JsonReader;

extern JsonReader *readjson_plan(Oid type, int32 typmod, MemoryContext context);
extern Datum readjson_value(JsonReader *reader, const JsonSlice *slice, bool *isnull);
extern char *readjson_string(const JsonSlice *slice);

#endif							/* PGF_READJSON_H */
