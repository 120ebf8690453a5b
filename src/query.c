/*-------------------------------------------------------------------------
 *
 * query.c
 *		Statements that a worker runs again and again, prepared once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"

#include "query.h"

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
	int			result = SPI_execute_plan(query_prepare(query, nargs, types, 0), values, nulls, false, 0);

	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", query->sql, SPI_result_code_string(result));
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
