/*-------------------------------------------------------------------------
 *
 * nesting.c
 *		Ids of messages in the order of the changes, also where statements nest.
 *
 * The id of a message is its place in the order of its key: of two changes, the
 * later one must have the higher id.  But messages are written when triggers
 * fire, and that is another order where a statement runs inside another one: in
 * a trigger, or in a function that an expression calls.  The events of the inner
 * statement fire at its end, those of the outer one still wait for theirs:
 *
 *		update t ... where id = 1	row version v0 -> v1, event E1 is queued
 *			application's trigger on that row:
 *			update t ... where id = 1	v1 -> v2, event E2 is queued
 *			end of the inner statement	E2 fires: message of v2
 *		E1 fires: message of v1, after that of v2
 *
 * Therefore the order is taken from the queueing of events.  The condition of
 * each capture trigger ends with fanout.count_change(), which the server
 * evaluates right after it has changed a row, or truncated the table; if the
 * condition is true, it queues the event (condition.c has the exception, and
 * sees to it).  The events of a statement fire in the order in which they were
 * queued, so it is enough to count them:
 *
 * - A level stands for a list of events that the server keeps.  Events are queued
 *	 to the list of the innermost statement.  count_change() counts, for each
 *	 level, the events that wait without an id.
 *
 * - Before count_change() counts one, it draws ids for all events that wait at
 *	 the levels around, the outermost first.  Their changes were made before this
 *	 one, since an outer statement changes nothing while an inner one runs.
 *
 * - An event that fires takes the first id that was drawn for its level; if none
 *	 is left, ids are drawn for it and some that wait behind it.
 *
 * So an event that waits without an id is later than all that have one, and ids
 * are in the order of the changes.  What was changed, and how, does not matter.
 *
 * Levels begin and end where the server's lists do: with statements of the
 * executor that may queue events, COPY FROM and TRUNCATE.  The events of foreign
 * key actions join those of the statement that caused them.  Level 0 has the
 * events of anything else: changes that an apply worker of logical replication
 * makes, and the statement during which the library is loaded, unless it is
 * preloaded, since the start of that statement was not seen.  When a statement
 * fails, its level's events are forgotten with the (sub)transaction that it was
 * begun in; no other one of that level can run before that is rolled back.
 *
 * Two things are not followed:
 *
 * - What functions in index expressions, and in WHEN conditions of triggers,
 *	 write to the key of the very row whose change makes the server call them:
 *	 it does so between the change and the queueing of its event.
 *
 * - Events of capture triggers made by hand, without count_change().  They take
 *	 the next id when they fire.
 *
 * A key that is unique only when the transaction ends (a deferrable constraint) may
 * be that of two rows for a while: see taken.c.
 *
 * Outside nested statements this costs one call for each event.  No id is drawn
 * that no event takes, unless events are rolled back.  Memory: eight bytes for
 * each event that waits while an inner statement makes a change, less than the
 * server itself needs for it; freed when the statement ends.
 *
 * Must never: read a table, or fail a statement for its order.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "executor/executor.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "nodes/parsenodes.h"
#include "tcop/utility.h"
#include "utils/memutils.h"

#include "capture/condition.h"
#include "capture/ids.h"
#include "capture/nesting.h"
#include "server/compat.h"

PG_FUNCTION_INFO_V1(pgf_count_change);

/* Ids that are drawn at once, if so many events wait. */
#define IDS_AT_ONCE 128

typedef struct Level
{
	void	   *owner;			/* EState of the statement; NULL: a command */
	int			nest_level;		/* of the subtransaction it was begun in */
	int64	   *ids;			/* of the events that have waited longest,
								 * ascending */
	uint64		size;			/* allocated length of ids */
	uint64		drawn;			/* number of ids */
	uint64		taken;			/* number of those that events have taken */
	uint64		waiting;		/* number of events that wait without an id */
} Level;

/*
 * levels[depth] is the innermost statement that runs.  Between ExecutorRun and
 * ExecutorFinish of a statement its level is not entered but stays as it is, and
 * its owner tells that it is the same statement's.
 */
static Level *levels = NULL;
static int	nlevels = 0;
static int	depth = 0;

static ExecutorRun_hook_type next_executor_run = NULL;
static ExecutorFinish_hook_type next_executor_finish = NULL;
static ProcessUtility_hook_type next_utility = NULL;

static Datum evaluate_condition(ExprState * state, ExprContext * context, bool *isnull);
static Datum evaluate_never(ExprState * state, ExprContext * context, bool *isnull);
static void executor_run(PGF_EXECUTOR_RUN_ARGS);
static void run(PGF_EXECUTOR_RUN_ARGS);
static void executor_finish(QueryDesc *query);
static void finish(QueryDesc *query);
static bool may_queue_events(QueryDesc *query);
static void utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
					ProcessUtilityContext context, ParamListInfo params,
					QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc);
static void run_utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
						ProcessUtilityContext context, ParamListInfo params,
						QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc);
static bool is_level(Node *command);
static void enter_level(void *owner);
static void end_level(void);
static Level *level_at(int at);
static void forget_level(Level *level);
static void xact_callback(XactEvent event, void *arg);
static void subxact_callback(SubXactEvent event, SubTransactionId subid,
							 SubTransactionId parent, void *arg);
static void draw_all_ids(Level *level);
static void draw_ids(Level *level, int count);
static void reserve_ids(Level *level, int count);

/* The condition that is nothing but count_change(); nobody changes it. */
static ExprState condition =
{
	.type = T_ExprState,
		.flags = EEO_FLAG_IS_QUAL,
		.evalfunc = evaluate_condition
};

/* The condition of what the server asks for and never queues; see condition.c. */
static ExprState never =
{
	.type = T_ExprState,
		.flags = EEO_FLAG_IS_QUAL,
		.evalfunc = evaluate_never
};

/*
 * Installs the hooks that follow statements.  To be called once per process
 * that may write rows.
 */
void
nesting_init(void)
{
	NodeSetTag(&condition, T_ExprState);
	NodeSetTag(&never, T_ExprState);
	next_executor_run = ExecutorRun_hook;
	ExecutorRun_hook = executor_run;
	next_executor_finish = ExecutorFinish_hook;
	ExecutorFinish_hook = executor_finish;
	next_utility = ProcessUtility_hook;
	ProcessUtility_hook = utility;
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
}

/* Events */

/*
 * Counts an event that the server is about to queue: fanout.count_change().  It is
 * the last part of the trigger's condition, and true, so the event is queued for sure.
 */
static void
count_change(void)
{
	Level	   *level = level_at(depth);

	for (int i = 0; i < depth; i++)
		draw_all_ids(&levels[i]);
	level->nest_level = GetCurrentTransactionNestLevel();
	level->waiting++;
}

/*
 * Evaluates fanout.count_change() where condition.c does not.  The condition of a
 * trigger is read from the catalog, which gives its parts no place in a text; a
 * query's own parts have one.  Counting what is no event would give those that wait
 * the ids of others.
 */
Datum
pgf_count_change(PG_FUNCTION_ARGS)
{
	if (fcinfo->flinfo->fn_expr == NULL || exprLocation(fcinfo->flinfo->fn_expr) >= 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("function %s can only be called in the condition of a capture trigger",
						"fanout.count_change()")));
	count_change();
	PG_RETURN_BOOL(true);
}

static Datum
evaluate_condition(ExprState * state, ExprContext * context, bool *isnull)
{
	count_change();
	*isnull = false;
	return BoolGetDatum(true);
}

static Datum
evaluate_never(ExprState * state, ExprContext * context, bool *isnull)
{
	*isnull = false;
	return BoolGetDatum(false);
}

/*
 * Returns the id of the event that fires.  To be called once for each event that
 * a capture trigger is called for; counted tells whether count_change() was
 * called when the event was queued.  The rows of all events that wait are locked
 * by then, so ids are drawn for many of them at once.
 */
int64
nesting_take_id(bool counted)
{
	Level	   *level = level_at(depth);

	if (counted && level->taken == level->drawn && level->waiting > 1)
		draw_ids(level, Min(level->waiting, IDS_AT_ONCE));
	if (counted && level->taken < level->drawn)
		return level->ids[level->taken++];
	if (counted && level->waiting > 0)
		level->waiting--;
	return ids_draw(1);
}

/* Draws ids for all events that wait at the level. */
static void
draw_all_ids(Level *level)
{
	while (level->waiting > 0)
	{
		CHECK_FOR_INTERRUPTS();
		draw_ids(level, Min(level->waiting, IDS_AT_ONCE));
	}
}

/* Draws ids for that many events, which have waited longest. */
static void
draw_ids(Level *level, int count)
{
	int64		first;

	reserve_ids(level, count);
	first = ids_draw(count);
	for (int i = 0; i < count; i++)
		level->ids[level->drawn++] = first + i;
	level->waiting -= count;
}

/* Makes room for that many ids. */
static void
reserve_ids(Level *level, int count)
{
	uint64		size = Max(IDS_AT_ONCE, level->size);

	if (level->taken == level->drawn)
		level->taken = level->drawn = 0;
	while (size < level->drawn + count)
		size *= 2;
	if (size == level->size)
		return;
	if (level->ids == NULL)
		level->ids = MemoryContextAlloc(TopMemoryContext, size * sizeof(int64));
	else
		level->ids = repalloc_huge(level->ids, size * sizeof(int64));
	level->size = size;
}

/* Statements */

static void
executor_run(PGF_EXECUTOR_RUN_ARGS)
{
	condition_prepare(query->estate, &condition, &never);
	if (!may_queue_events(query))
	{
		run(PGF_EXECUTOR_RUN_PASS);
		return;
	}
	enter_level(query->estate);
	PG_TRY();
	{
		run(PGF_EXECUTOR_RUN_PASS);
	}
	PG_FINALLY();
	{
		depth--;
	}
	PG_END_TRY();
}

static void
run(PGF_EXECUTOR_RUN_ARGS)
{
	if (next_executor_run)
		next_executor_run(PGF_EXECUTOR_RUN_PASS);
	else
		standard_ExecutorRun(PGF_EXECUTOR_RUN_PASS);
}

/*
 * Fires the events of a statement at its level.  If its start went by unseen,
 * its events were counted at the level that it is inside.
 */
static void
executor_finish(QueryDesc *query)
{
	if (!may_queue_events(query) || level_at(depth + 1)->owner != query->estate)
	{
		finish(query);
		return;
	}
	enter_level(query->estate);
	PG_TRY();
	{
		finish(query);
	}
	PG_FINALLY();
	{
		end_level();
	}
	PG_END_TRY();
}

static void
finish(QueryDesc *query)
{
	if (next_executor_finish)
		next_executor_finish(query);
	else
		standard_ExecutorFinish(query);
}

/*
 * Tells whether the server keeps a list of events for the query.  A query that
 * does not, such as a foreign key action, may still queue some: to the list of
 * the statement that it is inside.
 */
static bool
may_queue_events(QueryDesc *query)
{
	return (query->estate->es_top_eflags & EXEC_FLAG_SKIP_TRIGGERS) == 0;
}

/* Runs a command; those that queue events, at a level of their own. */
static void
utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
		ProcessUtilityContext context, ParamListInfo params,
		QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc)
{
	if (!is_level(pstmt->utilityStmt))
	{
		run_utility(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
		return;
	}
	enter_level(NULL);
	PG_TRY();
	{
		run_utility(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
	}
	PG_FINALLY();
	{
		end_level();
	}
	PG_END_TRY();
}

static void
run_utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
			ProcessUtilityContext context, ParamListInfo params,
			QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc)
{
	if (next_utility)
		next_utility(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
	else
		standard_ProcessUtility(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
}

static bool
is_level(Node *command)
{
	return IsA(command, TruncateStmt) ||
		(IsA(command, CopyStmt) && ((CopyStmt *) command)->is_from);
}

/* Levels */

/* Enters the next level, anew unless it is the owner's already. */
static void
enter_level(void *owner)
{
	Level	   *level = level_at(depth + 1);

	if (owner == NULL || level->owner != owner)
		forget_level(level);
	level->owner = owner;
	depth++;
}

/* Leaves the level for good. */
static void
end_level(void)
{
	forget_level(&levels[depth]);
	depth--;
}

/* Returns a level; there are as many as there is room for on the stack. */
static Level *
level_at(int at)
{
	if (at >= nlevels)
	{
		int			n = Max(8, nlevels * 2);

		levels = levels ? repalloc(levels, n * sizeof(Level))
			: MemoryContextAlloc(TopMemoryContext, n * sizeof(Level));
		memset(levels + nlevels, 0, (n - nlevels) * sizeof(Level));
		nlevels = n;
	}
	return &levels[at];
}

static void
forget_level(Level *level)
{
	if (level->ids != NULL)
		pfree(level->ids);
	memset(level, 0, sizeof(Level));
}

static void
xact_callback(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_PREPARE && event != XACT_EVENT_ABORT)
		return;
	for (int i = 0; i < nlevels; i++)
		forget_level(&levels[i]);
	depth = 0;
}

/* Forgets the events of statements that were begun in what is rolled back. */
static void
subxact_callback(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	if (event != SUBXACT_EVENT_ABORT_SUB)
		return;
	for (int i = 0; i < nlevels; i++)
	{
		if (levels[i].nest_level >= GetCurrentTransactionNestLevel())
			forget_level(&levels[i]);
	}
}
