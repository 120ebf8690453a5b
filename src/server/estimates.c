/*-------------------------------------------------------------------------
 *
 * estimates.c
 *		What the planner takes the extension's tables for: large ones.
 *
 * A worker, or the session of a pool, plans a statement once and keeps the plan until
 * the tables are analyzed.  If a table was empty then, a scan of all of it looked
 * as cheap as any index, and so did an index of which the statement needs one column
 * of two.  A minute later the table has a hundred thousand rows, and each execution reads
 * them.  The same happens with statistics of a table that was nearly empty when it was
 * analyzed.
 *
 * Hooks tell the planner that each table that grows has LARGE_TUPLES rows at least, and
 * hide what ANALYZE found in its columns.  So a plan is the same whenever it is made, and
 * good for a large table; a small table is read as fast by any plan.
 *
 * Tables of users that sync_table() keeps are looked up by their keys in the same way,
 * by query_plan_by_index(); for everybody else their estimates are what they are.
 *
 * Must never: change a setting that a statement could see, nor the estimates of other
 * tables.
 *
 * Locks: none.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "commands/extension.h"
#include "nodes/pathnodes.h"
#include "optimizer/plancat.h"
#include "utils/lsyscache.h"
#include "utils/selfuncs.h"

#include "server/estimates.h"

/*
 * Large enough for an index to be cheaper by far than anything else, and so small that
 * no query on a view is worth compiling (jit_above_cost) because of it.
 */
#define LARGE_TUPLES 100000
#define TUPLES_PER_PAGE 50
#define ENTRIES_PER_PAGE 200

/*
 * Lists the tables of the schema fanout that grow with what is published and consumed,
 * sorted by name.  Segments of the outbox are left out because the publisher reads them by
 * place, and tables without an index for their statements because these stay small.
 */
static const char *const growing_tables[] = {
	"dead_letter",
	"held",
	"inbox_0",
	"inbox_1",
	"inbox_2",
	"inbox_3",
	"replay_message",
	"stream_offset",
	"sync_comparison",
	"sync_difference",
	"sync_row",
	"waiting",
};

static get_relation_info_hook_type next_relation_info = NULL;
static get_relation_stats_hook_type next_relation_stats = NULL;

/* true while a statement of query_plan_by_index() is planned */
static bool all_are_large = false;

static int
compare_names(const void *a, const void *b)
{
	return strcmp(a, *(const char *const *) b);
}

/* Has the table the name of one of ours? */
static bool
has_our_name(Oid relid)
{
	char	   *name;

	if (get_rel_namespace(relid) != get_namespace_oid("fanout", true))
		return false;
	name = get_rel_name(relid);
	return name != NULL &&
		bsearch(name, growing_tables, lengthof(growing_tables), sizeof(growing_tables[0]), compare_names) != NULL;
}

/* Where the extension is not, somebody may have a schema of that name. */
static bool
is_growing(Oid relid)
{
	Oid			extension;

	if (!has_our_name(relid))
		return false;
	extension = getExtensionOfObject(RelationRelationId, relid);
	return OidIsValid(extension) && extension == get_extension_oid("pg_fanout", true);
}

/* Catalogs are left out first, because most of what is planned may be about them. */
static bool
is_large(Oid relid)
{
	return relid >= FirstNormalObjectId && (all_are_large || is_growing(relid));
}

/* Raises the size of a table and its indexes to that of a large one. */
static void
relation_info(PlannerInfo * root, Oid relid, bool inhparent, RelOptInfo * rel)
{
	ListCell   *cell;

	if (next_relation_info)
		next_relation_info(root, relid, inhparent, rel);
	if (inhparent || !is_large(relid))
		return;
	rel->tuples = Max(rel->tuples, LARGE_TUPLES);
	rel->pages = Max(rel->pages, LARGE_TUPLES / TUPLES_PER_PAGE);

	/*
	 * reading an index alone, without its table, looks cheap right after
	 * VACUUM
	 */
	rel->allvisfrac = 0;
	foreach(cell, rel->indexlist)
	{
		IndexOptInfo *index = lfirst(cell);

		index->tuples = Max(index->tuples, LARGE_TUPLES);
		index->pages = Max(index->pages, LARGE_TUPLES / ENTRIES_PER_PAGE);
	}
}

/* Says of a column of a large table that it was never analyzed. */
static bool
relation_stats(PlannerInfo * root, RangeTblEntry * rte, AttrNumber attnum, VariableStatData * vardata)
{
	if (rte->rtekind == RTE_RELATION && is_large(rte->relid))
	{
		vardata->statsTuple = NULL;
		return true;
	}
	return next_relation_stats && next_relation_stats(root, rte, attnum, vardata);
}

/*
 * estimates_init
 *		Installs the planner's hooks; while the library is preloaded.
 */
void
estimates_init(void)
{
	next_relation_info = get_relation_info_hook;
	get_relation_info_hook = relation_info;
	next_relation_stats = get_relation_stats_hook;
	get_relation_stats_hook = relation_stats;
}

/*
 * estimates_all_large
 *		Begins or ends that every table of users is taken for a large one; between, a
 *		statement may be planned, and nothing executed.
 */
void
estimates_all_large(bool on)
{
	all_are_large = on;
}
