/*-------------------------------------------------------------------------
 *
 * query.h
 *		Statements that a worker runs again and again, prepared once.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_QUERY_H
#define PGF_QUERY_H

#include "postgres.h"

#include "executor/spi.h"

/* Static, with the SQL alone; belongs to the process. */
typedef struct CachedQuery
{
	const char *sql;
	SPIPlanPtr	plan;
} CachedQuery;

/*
 * Both prepare it the first time and raise an error if anything fails; SPI
 * must be connected.  options: CURSOR_OPT_xxx.
 */
extern SPIPlanPtr query_prepare(CachedQuery *query, int nargs, Oid *types, int options);
extern void query_execute(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls);

/*
 * The same for a statement that must concern this many rows: raises an error if
 * they were more or less.
 */
extern void query_change(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls,
						 uint64 rows);

extern void query_require_copied(const char *sql);

extern void query_plan_by_index(SPIPlanPtr plan);

/* A value of the last result; rows from 0, columns from 1. */
extern Datum query_value(int row, int column, bool *isnull);

/* A parameter that may be NULL: sets *null to 'n' or ' '. */
extern Datum query_text_param(const char *s, char *null);

#endif							/* PGF_QUERY_H */
