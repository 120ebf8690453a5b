/*-------------------------------------------------------------------------
 *
 * query.c
 *		Statements that a worker runs again and again, prepared once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"

#include "server/query.h"

SPIPlanPtr
query_prepare(CachedQuery *query, int nargs, Oid *types, int options)
{
	if (query->plan == NULL)
	{
		query->plan = SPI_prepare_cursor(query->sql, nargs, types, options);
		if (query->plan == NULL || SPI_keepplan(query->plan) != 0)
			elog(ERROR, "could not prepare \"%s\": %s", query->sql,
				 SPI_result_code_string(SPI_result));
	}
	return query->plan;
}

void
query_execute(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls)
{
	MemoryContext context = CurrentMemoryContext;
	int			result = SPI_execute_plan(query_prepare(query, nargs, types, 0), values, nulls, false, 0);

	/* SPI leaves its own as the current one */
	MemoryContextSwitchTo(context);
	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", query->sql, SPI_result_code_string(result));
}

/*
 * Runs a statement that writes or moves rows, whose loss nobody else would
 * notice: a row that was not found, one that a trigger or a rule kept away.
 */
void
query_change(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls, uint64 rows)
{
	query_execute(query, nargs, types, values, nulls);
	if (SPI_processed != rows)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("a statement of pg_fanout changed " UINT64_FORMAT " rows instead of " UINT64_FORMAT,
						SPI_processed, rows),
				 errdetail("The statement is: %s", query->sql)));
}

Datum
query_value(int row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column, isnull);
}

Datum
query_text_param(const char *s, char *null)
{
	*null = (s == NULL) ? 'n' : ' ';
	return s == NULL ? (Datum) 0 : CStringGetTextDatum(s);
}
