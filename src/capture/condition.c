/*-------------------------------------------------------------------------
 *
 * condition.c
 *		The condition of most capture triggers, ready made.
 *
 * That is fanout.count_change() alone.  For each statement the server would read
 * the expression from its text, plan it and initialize it, when the first row has
 * been changed: a third of what capture adds to a statement that changes one row.
 * ExecutorStart() has left a place for the result (ri_TrigWhenExprs).  Before the
 * statement runs, an expression is put there whose evaluation is the call itself.
 *
 * Where that cannot be done, the server does as ever, with the same result: other
 * conditions, partitions that rows are routed to, COPY, a user who may not
 * execute the function and gets the server's error.
 *
 * When a row moves to another partition, the server also evaluates the conditions of the
 * partitioned table's own triggers, as if that table were updated, because foreign keys
 * have events there.  It queues none for any other trigger, so nothing
 * must be counted: those conditions that call count_change() are replaced by one
 * that is never true, whatever else is in them.  (What moves is deleted from one
 * partition and inserted into the other, and that is counted there.)
 *
 * Must never: read a table, or take any other condition of a table for this one.
 *
 * State: the oid of fanout.count_change(), until any function or schema changes.
 * No locks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_trigger.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/reltrigger.h"
#include "utils/syscache.h"

#include "capture/condition.h"
#include "server/compat.h"

/* fanout.count_change(); InvalidOid: there is none */
static Oid	count_change = InvalidOid;

/* How the text of its call begins, as outfuncs.c writes it; not if there is none */
static char call[64];

static bool known = false;		/* both */

static void
forget(Datum arg, int cacheid, uint32 hashvalue)
{
	known = false;
}

/* Finds fanout.count_change(), or that there is none. */
static void
find_count_change(void)
{
	static bool registered = false;
	Oid			schema;

	if (!registered)
	{
		CacheRegisterSyscacheCallback(PROCOID, forget, (Datum) 0);
		CacheRegisterSyscacheCallback(NAMESPACEOID, forget, (Datum) 0);
		registered = true;
	}
	count_change = InvalidOid;
	known = true;				/* the look-up may find that it is not */
	schema = get_namespace_oid("fanout", true);
	if (OidIsValid(schema))
		count_change = GetSysCacheOid3(PROCNAMEARGSNSP, Anum_pg_proc_oid, CStringGetDatum("count_change"),
									   PointerGetDatum(buildoidvector(NULL, 0)), ObjectIdGetDatum(schema));
	snprintf(call, sizeof(call), "{FUNCEXPR :funcid %u ", count_change);
}

/* Where the condition calls count_change(), which has no arguments; NULL: nowhere. */
static const char *
find_call(const char *qual)
{
	if (qual == NULL)
		return NULL;
	if (!known)
		find_count_change();
	return OidIsValid(count_change) ? strstr(qual, call) : NULL;
}

/* Returns what is to stand for the condition; NULL: itself. */
static ExprState *
ready_made(bool partitioned, const Trigger *trigger, ExprState * counts, ExprState * never)
{
	const char *found = find_call(trigger->tgqual);

	if (found == NULL)
		return NULL;
	if (partitioned)
		return TRIGGER_FOR_ROW(trigger->tgtype) ? never : NULL;
	return found == trigger->tgqual && pgf_may_execute(count_change, GetUserId()) ? counts : NULL;
}

static void
prepare_relation(ResultRelInfo *relation, ExprState * counts, ExprState * never)
{
	bool		partitioned = relation->ri_RelationDesc->rd_rel->relkind == RELKIND_PARTITIONED_TABLE;
	TriggerDesc *triggers = relation->ri_TrigDesc;

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		if (relation->ri_TrigWhenExprs[i] == NULL)
			relation->ri_TrigWhenExprs[i] = ready_made(partitioned, &triggers->triggers[i], counts, never);
	}
}

/*
 * Gives ready made expressions to the conditions of a statement: counts to those
 * that are nothing but count_change(), never to those that count what is no event.
 * To be called before the statement runs, as the user who runs it.  The expressions
 * are used by many statements, and never freed.
 */
void
condition_prepare(EState *estate, ExprState * counts, ExprState * never)
{
	ListCell   *cell;

	foreach(cell, estate->es_opened_result_relations)
		prepare_relation(lfirst(cell), counts, never);
}
