/*-------------------------------------------------------------------------
 *
 * query.c
 *		Statements that a worker runs again and again, prepared once.
 *
 * Must never: take a result of fewer or more rows for success where rows are written or
 * moved; leave a setting of the planner changed.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "optimizer/cost.h"
#include "utils/builtins.h"
#include "utils/plancache.h"
#include "utils/resowner.h"

#include "server/estimates.h"
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

static void
require_rows(const char *sql, uint64 changed, uint64 wanted)
{
	if (changed != wanted)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("a statement of pg_fanout changed " UINT64_FORMAT " rows instead of " UINT64_FORMAT,
						changed, wanted),
				 errdetail("The statement is: %s", sql),
				 errhint("Look for a trigger or a rule on the table that keeps rows away, and drop it.")));
}

/*
 * Runs a statement that writes or moves rows, whose loss nobody else would
 * notice: a row that was not found, one that a trigger or a rule kept away.
 * SQL functions have fanout.require_rows() for that.
 */
void
query_change(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls, uint64 rows)
{
	query_execute(query, nargs, types, values, nulls);
	require_rows(query->sql, SPI_processed, rows);
}

/*
 * Raises an error if the statement that was run last has stored fewer or more rows
 * than it found.  Its result is a row of two bigints: how many it found, and how many
 * it stored.  For statements of which nobody knows before how many rows they copy.
 */
void
query_require_copied(const char *sql)
{
	bool		isnull;
	int64		found = DatumGetInt64(query_value(0, 1, &isnull));
	int64		stored = DatumGetInt64(query_value(0, 2, &isnull));

	require_rows(sql, stored, found);
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

/* The settings are variables that the planner alone looks at. */
static void
set_planner(bool seqscan, bool bitmapscan, bool all_large)
{
	enable_seqscan = seqscan;
	enable_bitmapscan = bitmapscan;
	estimates_all_large(all_large);
}

/*
 * Plans a statement on tables of users, unless it is planned, for tables that are large:
 * rows are looked up by an index of the key.
 *
 * plan: prepared with CURSOR_OPT_GENERIC_PLAN, and kept; it is executed next, in the same
 * transaction, whose locks keep the plan valid until then.  What the statement fires does
 * not see the settings.
 */
void
query_plan_by_index(SPIPlanPtr plan)
{
	const volatile bool seqscan = enable_seqscan;
	const volatile bool bitmapscan = enable_bitmapscan;
	CachedPlan *volatile cached = NULL;

	PG_TRY();
	{
		set_planner(false, false, true);
		cached = SPI_plan_get_cached_plan(plan);
	}
	PG_CATCH();
	{
		set_planner(seqscan, bitmapscan, false);
		PG_RE_THROW();
	}
	PG_END_TRY();
	set_planner(seqscan, bitmapscan, false);
	if (cached != NULL)
		ReleaseCachedPlan(cached, CurrentResourceOwner);
}
