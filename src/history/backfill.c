/*-------------------------------------------------------------------------
 *
 * backfill.c
 *		Rows that exist already, to messages; and the SQL function backfill().
 *
 * A table is walked in the order of a unique index without NULLs, or, if it has
 * none, in the order of its pages.  A step looks first, without locks, how far it
 * gets: to the last of so many keys, or over so many pages; and no further than rows of
 * so many bytes.  Then it locks and reads the rows of that range, and nothing else says
 * where the next step begins:
 *
 *		keys	... last step ...|.......... range ..........|... next step ...
 *		looked					 > position		   <= bound = next position
 *		locked					 > position and <= bound
 *
 * A row that changes between the two, or whose key does, is locked as it is now, or
 * not found.  Then its change is a message of its own, since the queue was bound
 * before the walk began.  So is one that moves over the position, in either
 * direction: by key only if its key changes, by page with any update.  Therefore a
 * table is walked by pages only if all its updates are captured.  When it is
 * rewritten (VACUUM FULL, CLUSTER), a walk by pages begins anew, for all rows have
 * another place; so does one by a key that sorts in another way since (ALTER TYPE), for
 * rows that were behind the position may be before it.  That a row is sent twice does no
 * harm.  A comparison, whose ranges must not overlap, ends instead.
 *
 * Ids are drawn while the rows are locked: a row's message has a higher sequence
 * than all changes that it contains, and a lower one than all later ones.
 *
 * The table is read as its owner, restricted as in maintenance commands: the
 * condition may call functions.
 *
 * It must never follow where a locked row is now to say how far the walk is, nor take the
 * rows of a table for those of another one that has its name by now.
 *
 * Locks: ROW SHARE on the table and FOR NO KEY UPDATE on the rows, which conflict
 * with updates, but not with foreign keys' checks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/parsenodes.h"
#include "parser/parse_node.h"
#include "parser/parse_clause.h"
#include "parser/parse_collate.h"
#include "parser/parse_relation.h"
#include "parser/parser.h"
#include "storage/bufmgr.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/plancache.h"
#include "utils/ruleutils.h"
#include "utils/typcache.h"

#include "capture/cache.h"
#include "capture/capture.h"
#include "capture/textform.h"
#include "consume/owner.h"
#include "history/history.h"
#include "server/compat.h"
#include "server/query.h"

PG_FUNCTION_INFO_V1(pgf_backfill);

extern Datum pgf_row_condition(PG_FUNCTION_ARGS);

/* Bytes that the values of a step's rows have in the table, about. */
#define STEP_BYTES	(2 * 1024 * 1024)

/* The table of a step, and the trigger that says how its rows are rendered. */
typedef struct Source
{
	Relation	rel;
	Trigger    *trigger;
	char	   *condition;		/* on "new"; NULL: all rows */
} Source;

/* The bounds of a range of keys, as parameters: one for each column of the key. */
typedef struct Range
{
	int			n;
	bool		open;			/* it has no upper bound */
	Oid			types[2 * INDEX_MAX_KEYS];
	Datum		values[2 * INDEX_MAX_KEYS]; /* those it lies behind, then
											 * those up to which it goes */
} Range;

/* ---- the table's owner ---- */

static Caller
become_table_owner(Relation rel)
{
	Caller		caller;

	GetUserIdAndSecContext(&caller.user, &caller.context);
	caller.settings = NewGUCNestLevel();
	SetUserIdAndSecContext(rel->rd_rel->relowner,
						   caller.context | SECURITY_RESTRICTED_OPERATION | SECURITY_LOCAL_USERID_CHANGE);
	return caller;
}

/* Is it the statement that is prepared, with arguments of the same types? */
static bool
is_prepared(const WalkQuery *query, const char *sql, const Range *range)
{
	return query->sql != NULL && strcmp(query->sql, sql) == 0 && query->nargs == range->n &&
		memcmp(query->types, range->types, range->n * sizeof(Oid)) == 0;
}

/*
 * Makes sure that the statement that was executed has read the table, which it names.  The
 * name of its schema may have been given to another one meanwhile, for which no lock of a
 * table is needed.  Raises an error after which the step is tried again.
 */
static void
check_table_read(SPIPlanPtr plan, Relation rel)
{
	CachedPlanSource *source = linitial(SPI_plan_get_plan_sources(plan));
	Query	   *query = linitial_node(Query, source->query_list);
	RangeTblEntry *table = linitial_node(RangeTblEntry, query->rtable);

	if (table->relid != RelationGetRelid(rel))
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("table \"%s\" was renamed while its rows were looked for", RelationGetRelationName(rel))));
}

/*
 * Runs a statement of the walk, whose first table is rel, as the owner of that; it is prepared
 * again only if it is another one.
 */
static void
run_as_owner(WalkQuery *query, const char *sql, Range *range, Relation rel)
{
	Caller		caller = become_table_owner(rel);
	MemoryContext context = CurrentMemoryContext;
	int			result;

	if (!is_prepared(query, sql, range))
	{
		SPIPlanPtr	plan = SPI_prepare(sql, range->n, range->types);

		if (plan == NULL || SPI_keepplan(plan) != 0)
			elog(ERROR, "could not prepare \"%s\": %s", sql, SPI_result_code_string(SPI_result));
		if (query->plan != NULL)
			SPI_freeplan(query->plan);
		if (query->sql != NULL)
			pfree(query->sql);
		query->plan = plan;
		query->nargs = range->n;
		memcpy(query->types, range->types, range->n * sizeof(Oid));
		query->sql = MemoryContextStrdup(TopMemoryContext, sql);
	}
	result = SPI_execute_plan(query->plan, range->values, NULL, false, 0);
	MemoryContextSwitchTo(context);
	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", sql, SPI_result_code_string(result));
	check_table_read(query->plan, rel);
	become_caller(&caller);
}

/* ---- the source ---- */

/* The function of all capture triggers. */
static Oid
capture_function(void)
{
	static CachedQuery query = {"select 'fanout.capture_trigger()'::regprocedure::oid"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	return DatumGetObjectId(query_value(0, 1, &isnull));
}

/*
 * A trigger of the capture that fires for rows; rather one of all inserts.  It is a copy:
 * those of the relation are freed as soon as anybody changes it in the catalogs, as ANALYZE
 * does, whatever is locked.
 */
static Trigger *
find_trigger(Relation rel, const char *topic)
{
	Trigger    *found = NULL;
	Oid			function = capture_function();
	TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		Trigger    *trigger = &triggers->triggers[i];

		if (trigger->tgfoid != function || !TRIGGER_FOR_ROW(trigger->tgtype) || trigger->tgnargs < 1 ||
			strcmp(trigger->tgargs[0], topic) != 0 ||
			cache_option(trigger->tgargs, trigger->tgnargs, "idle") != NULL ||
			cache_option(trigger->tgargs, trigger->tgnargs, "sent_as") != NULL)
			continue;
		if (found == NULL || TRIGGER_FOR_INSERT(trigger->tgtype))
			found = trigger;
	}
	return found;
}

/* The condition of a trigger, over OLD and NEW, as the server has it now. */
static char *
trigger_condition(Oid trigger)
{
	static CachedQuery query = {"select fanout.trigger_condition($1)"};
	Oid			types[1] = {OIDOID};
	Datum		values[1] = {ObjectIdGetDatum(trigger)};
	bool		isnull;
	Datum		value;

	query_execute(&query, 1, types, values, NULL);
	value = query_value(0, 1, &isnull);
	return isnull ? NULL : TextDatumGetCString(value);
}

/* Opens the table and finds its capture.  Returns why that cannot be, or NULL. */
static char *
open_source(const WalkRow *row, Source *source)
{
	bool		filtered;

	memset(source, 0, sizeof(*source));
	source->rel = try_relation_open(row->entity, RowShareLock);
	if (source->rel == NULL)
		return "the table was dropped";
	source->trigger = find_trigger(source->rel, row->topic);
	if (source->trigger == NULL)
		return psprintf("the table is not captured into topic \"%s\" any more", row->topic);
	filtered = cache_option(source->trigger->tgargs, source->trigger->tgnargs, "where") != NULL;
	if (filtered && cache_option(source->trigger->tgargs, source->trigger->tgnargs, "when") != NULL)
		return "the table is captured with \"where\" and \"when\" now";
	if (filtered)
		source->condition = trigger_condition(source->trigger->tgoid);
	if (row->where != NULL)
		source->condition = source->condition == NULL ? row->where :
			psprintf("(%s) and (%s)", source->condition, row->where);
	return NULL;
}

/* ---- statements ---- */

/* A table's own rows, not those of tables that inherit from it. */
static char *
from_clause(const Source *source)
{
	Relation	rel = source->rel;

	return psprintf("from %s%s as \"new\"%s",
					rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE ? "" : "only ",
					quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
											   RelationGetRelationName(rel)),
					source->condition == NULL || TRIGGER_FOR_INSERT(source->trigger->tgtype) ? "" :
					" cross join lateral (select \"new\".*) as \"old\"");
}

/* The type of a column of the key; of a domain, its base type. */
static Oid
key_type(const WalkRow *row, Relation rel, int key)
{
	return getBaseType(TupleDescAttr(RelationGetDescr(rel), row->keys[key] - 1)->atttypid);
}

/*
 * Appends "(new.a, new.b) > ($1, $2)", with parameters from first on.  A domain is cast to
 * its base type, because operators of enums and ranges take no domain over one; the index
 * serves all the same.
 */
static void
append_comparison(StringInfo sql, const WalkRow *row, Relation rel, const char *operator, int first)
{
	appendStringInfoChar(sql, '(');
	for (int i = 0; i < row->nkeys; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(RelationGetDescr(rel), row->keys[i] - 1);
		Oid			type = key_type(row, rel, i);

		appendStringInfo(sql, "%s\"new\".%s", i == 0 ? "" : ", ", quote_identifier(NameStr(attr->attname)));
		if (type != attr->atttypid)
			appendStringInfo(sql, "::%s",
							 format_type_extended(type, -1, FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY));
	}
	appendStringInfo(sql, ") %s (", operator);
	for (int i = 0; i < row->nkeys; i++)
		appendStringInfo(sql, "%s$%d", i == 0 ? "" : ", ", first + i);
	appendStringInfoChar(sql, ')');
}

/* The keys' columns, separated by commas, each followed by that. */
static void
append_keys(StringInfo sql, const WalkRow *row, Relation rel, const char *suffix)
{
	for (int i = 0; i < row->nkeys; i++)
		appendStringInfo(sql, "%s\"new\".%s%s", i == 0 ? "" : ", ",
						 quote_identifier(get_attname(RelationGetRelid(rel), row->keys[i], false)), suffix);
}

/* Appends an expression for the bytes that a row's values of variable length take in the table. */
static void
append_size(StringInfo sql, Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);

	appendStringInfoChar(sql, '0');
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i);

		if (!attr->attisdropped && attr->attlen == -1 && !PGF_IS_VIRTUAL_GENERATED(attr))
			appendStringInfo(sql, " + coalesce(pg_column_size(\"new\".%s), 0)", quote_identifier(NameStr(attr->attname)));
	}
}

/* ---- the range of a step ---- */

/* Adds values of the key, from their texts. */
static void
add_to_range(Range *range, const WalkRow *row, Relation rel, char **texts)
{
	for (int i = 0; i < row->nkeys; i++)
	{
		Oid			type = key_type(row, rel, i);
		Oid			input;
		Oid			parameter;

		getTypeInputInfo(type, &input, &parameter);
		range->types[range->n] = type;
		range->values[range->n++] = OidInputFunctionCall(input, texts[i], parameter, -1);
	}
}

/*
 * Counts the rows of the step: those in SPI_tuptable, or the first of them that have so many
 * bytes, by the last column of each.  There must be a row, and one is taken whatever its size.
 */
static int
rows_of_step(void)
{
	int			column = SPI_tuptable->tupdesc->natts;
	int			last;
	int64		bytes = 0;

	for (last = 0; last < SPI_processed - 1; last++)
	{
		bool		isnull;

		bytes += DatumGetInt64(query_value(last, column, &isnull));
		if (bytes > STEP_BYTES)
			break;
	}
	return last + 1;
}

/*
 * Finds the key up to which the step goes: of so many rows, or so many bytes.
 * Returns false if there are none left.
 */
static bool
find_key_bound(Walk *walk, const WalkRow *row, const Source *source, Range *range, WalkStep *step)
{
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfoString(&sql, "select ");
	append_keys(&sql, row, source->rel, "::text");
	appendStringInfoString(&sql, ", (");
	append_size(&sql, source->rel);
	appendStringInfo(&sql, ")::bigint from %s%s as \"new\"",
					 source->rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE ? "" : "only ",
					 quote_qualified_identifier(get_namespace_name(RelationGetNamespace(source->rel)),
												RelationGetRelationName(source->rel)));
	if (range->n > 0)
	{
		appendStringInfoString(&sql, " where ");
		append_comparison(&sql, row, source->rel, ">", 1);
	}
	appendStringInfoString(&sql, " order by ");
	append_keys(&sql, row, source->rel, "");
	appendStringInfo(&sql, " limit %d", walk->rows);
	run_as_owner(&walk->bounds, sql.data, range, source->rel);
	if (SPI_processed == 0)
		return false;
	step->rows = rows_of_step();
	step->nposition = row->nkeys;
	step->position = palloc(row->nkeys * sizeof(char *));
	for (int i = 0; i < row->nkeys; i++)
		step->position[i] = SPI_getvalue(SPI_tuptable->vals[step->rows - 1], SPI_tuptable->tupdesc, i + 1);
	add_to_range(range, row, source->rel, step->position);
	return true;
}

static bool
is_comparison(const WalkRow *row)
{
	return strcmp(row->kind, "compare") == 0;
}

/*
 * Does the table have another name than when the comparison began?  The copy takes no message
 * under that.  Returns why the comparison cannot go on, or NULL.
 */
static const char *
check_name(const WalkRow *row, Relation rel)
{
	char	   *schema = get_namespace_name(RelationGetNamespace(rel));

	if (!is_comparison(row) || schema == NULL ||
		(strcmp(schema, row->schema) == 0 && strcmp(RelationGetRelationName(rel), row->table) == 0))
		return NULL;
	return psprintf("table %s was renamed to %s, and its copy takes no messages under that name: "
					"use fanout.unsubscribe() and fanout.sync_table() there, with the new name as \"source\", and compare again",
					quote_qualified_identifier(row->schema, row->table),
					quote_qualified_identifier(schema, RelationGetRelationName(rel)));
}

/* Returns what says in which order the key sorts, as one text. */
static char *
order_of_key(const WalkRow *row, Relation rel)
{
	static CachedQuery query = {"select fanout.key_order($1, $2)::text"};
	Oid			types[2] = {OIDOID, INT2ARRAYOID};
	Datum		values[2] = {ObjectIdGetDatum(RelationGetRelid(rel)), (Datum) 0};
	Datum	   *attnums = palloc(row->nkeys * sizeof(Datum));
	bool		isnull;
	Datum		value;

	for (int i = 0; i < row->nkeys; i++)
		attnums[i] = Int16GetDatum(row->keys[i]);
	values[1] = PointerGetDatum(construct_array(attnums, row->nkeys, INT2OID, 2, true, TYPALIGN_SHORT));
	query_execute(&query, 2, types, values, NULL);
	value = query_value(0, 1, &isnull);
	return isnull ? pstrdup("") : TextDatumGetCString(value);
}

/* Has the key been sorted in another way when the walk came to its position? */
static bool
is_sorted_anew(const WalkRow *row, const WalkStep *step)
{
	return row->nposition > 0 && row->nkeys > 0 && strcmp(row->order, step->order) != 0;
}

/*
 * Looks at the key that the table has now; fills in step->order.  Returns why the walk
 * cannot go on by it, or NULL.
 */
static const char *
check_key(const WalkRow *row, Relation rel, WalkStep *step)
{
	if (row->nkeys == 0)
		return NULL;
	for (int i = 0; i < row->nkeys; i++)
	{
		if (TupleDescAttr(RelationGetDescr(rel), row->keys[i] - 1)->attisdropped)
			return "a column of the key was dropped";
	}
	step->order = order_of_key(row, rel);
	if (is_comparison(row) && is_sorted_anew(row, step))
		return "the key sorts in another way than when the comparison began";
	return NULL;
}

/* The range of a step by keys: behind the position, unless that says nothing any more. */
static bool
key_range(Walk *walk, const WalkRow *row, const Source *source, Range *range, WalkStep *step)
{
	if (row->nposition > 0 && row->nposition != row->nkeys)
		elog(ERROR, "backfill " INT64_FORMAT " has a malformed position", walk->id);
	if (row->nposition > 0 && !is_sorted_anew(row, step))
		add_to_range(range, row, source->rel, row->position);
	return find_key_bound(walk, row, source, range, step);
}

static void
add_place(Range *range, BlockNumber block, OffsetNumber offset)
{
	ItemPointer tid = palloc(sizeof(ItemPointerData));

	ItemPointerSet(tid, block, offset);
	range->types[range->n] = TIDOID;
	range->values[range->n++] = PointerGetDatum(tid);
}

/*
 * Ends the range of pages before, if its rows have more bytes than a step may have: a page
 * has hundreds of rows whose values are elsewhere.
 */
static void
bound_pages(Walk *walk, const Source *source, Range *range)
{
	StringInfoData sql;
	ItemPointer last;
	int			nrows;
	bool		isnull;

	if (!OidIsValid(source->rel->rd_rel->reltoastrelid))
		return;
	initStringInfo(&sql);
	appendStringInfoString(&sql, "select \"new\".ctid, (");
	append_size(&sql, source->rel);
	appendStringInfo(&sql, ")::bigint from only %s as \"new\" where \"new\".ctid >= $1 and \"new\".ctid < $2"
					 " order by \"new\".ctid",
					 quote_qualified_identifier(get_namespace_name(RelationGetNamespace(source->rel)),
												RelationGetRelationName(source->rel)));
	run_as_owner(&walk->bounds, sql.data, range, source->rel);
	if (SPI_processed == 0 || (nrows = rows_of_step()) == SPI_processed)
		return;
	last = (ItemPointer) DatumGetPointer(query_value(nrows - 1, 1, &isnull));
	range->n--;
	add_place(range, ItemPointerGetBlockNumber(last), OffsetNumberNext(ItemPointerGetOffsetNumber(last)));
}

/* The same by pages: position is the first place that was not read, as ctid. */
static bool
page_range(Walk *walk, const WalkRow *row, const Source *source, Range *range, WalkStep *step)
{
	Relation	rel = source->rel;
	BlockNumber nblocks = RelationGetNumberOfBlocks(rel);
	double		per_page = rel->rd_rel->relpages > 0 ? rel->rd_rel->reltuples / rel->rd_rel->relpages : 50;
	ItemPointerData first;
	BlockNumber block;

	ItemPointerSet(&first, 0, 0);
	step->file = rel->rd_rel->relfilenode;
	if (row->nposition > 0 && row->file == step->file)
		first = *(ItemPointer) DatumGetPointer(DirectFunctionCall1(tidin, CStringGetDatum(row->position[0])));
	block = ItemPointerGetBlockNumberNoCheck(&first);
	if (block >= nblocks)
		return false;
	add_place(range, block, ItemPointerGetOffsetNumberNoCheck(&first));
	add_place(range, Min((uint64) nblocks, (uint64) block + (uint64) Max(1, walk->rows / Max(1, per_page))), 0);
	bound_pages(walk, source, range);
	step->nposition = 1;
	step->position = palloc(sizeof(char *));
	step->position[0] = DatumGetCString(DirectFunctionCall1(tidout, range->values[1]));
	return true;
}

/*
 * The statement that reads the rows of the range, and locks them, unless they are
 * only compared.
 */
static char *
read_statement(const WalkRow *row, const Source *source, const Range *range)
{
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfo(&sql, "select \"new\" %s where ", from_clause(source));
	if (row->nkeys == 0)
		appendStringInfoString(&sql, "\"new\".ctid >= $1 and \"new\".ctid < $2");
	else
	{
		int			upper = range->open ? 0 : row->nkeys;

		appendStringInfoString(&sql, "true");
		if (range->n > upper)
		{
			appendStringInfoString(&sql, " and ");
			append_comparison(&sql, row, source->rel, ">", 1);
		}
		if (!range->open)
		{
			appendStringInfoString(&sql, " and ");
			append_comparison(&sql, row, source->rel, "<=", range->n - row->nkeys + 1);
		}
	}
	if (source->condition != NULL)
		appendStringInfo(&sql, " and (%s\n)", source->condition);
	if (row->nkeys > 0)
	{
		appendStringInfoString(&sql, " order by ");
		append_keys(&sql, row, source->rel, "");
	}
	if (!is_comparison(row) || row->repair)
		appendStringInfoString(&sql, " for no key update of \"new\"");
	return sql.data;
}

/* ---- a step ---- */

/* {"backfill": id}, or {"backfill": id, "last": true}. */
static Jsonb *
make_headers(int64 id, bool last)
{
	char	   *text = psprintf("{\"backfill\":" INT64_FORMAT "%s}", id, last ? ",\"last\":true" : "");

	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(text)));
}

/* Writes the messages of the rows that were read, each in a context of its own. */
static void
write_rows(const Walk *walk, const WalkRow *row, const Source *source, WalkStep *step)
{
	SPITupleTable *table = SPI_tuptable;
	Jsonb	   *headers = make_headers(walk->id, false);
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout row",
												  ALLOCSET_DEFAULT_SIZES);
	uint64		n = SPI_processed;

	for (uint64 i = 0; i < n; i++)
	{
		MemoryContext old_context = MemoryContextSwitchTo(context);
		bool		isnull;
		HeapTupleHeader header = DatumGetHeapTupleHeader(SPI_getbinval(table->vals[i], table->tupdesc, 1, &isnull));
		HeapTupleData tuple = {.t_len = HeapTupleHeaderGetDatumLength(header),.t_data = header};

		CHECK_FOR_INTERRUPTS();
		step->bytes += capture_read_row(source->rel, source->trigger, &tuple, row->queue, headers);
		MemoryContextSwitchTo(old_context);
		MemoryContextReset(context);
	}
	step->sent = n;
	if (row->nkeys == 0)
		step->rows = n;
	SPI_freetuptable(table);
}

/* The texts of a range's bounds, the same from every session. */
static char **
bound_texts(const Range *range, int first, int n)
{
	char	  **texts = palloc(n * sizeof(char *));

	for (int i = 0; i < n; i++)
	{
		TextForm	form;

		textform_prepare(&form, range->types[first + i], CurrentMemoryContext);
		texts[i] = textform_output(&form, range->values[first + i]);
	}
	return texts;
}

/* Writes the message that has all rows of the range. */
static void
write_range(const Walk *walk, const WalkRow *row, const Source *source, const Range *range,
			const char *snapshot, WalkStep *step)
{
	int			upper = range->open ? 0 : row->nkeys;
	WalkRange	texts = {0};

	if (range->n > upper)
		texts.after = bound_texts(range, 0, row->nkeys);
	if (!range->open)
		texts.upto = bound_texts(range, range->n - row->nkeys, row->nkeys);
	step->bytes = compare_write(walk, row, source->rel, source->trigger, &texts, snapshot);
	step->sent = 1;
}

/*
 * Writes the messages of the next rows.  In a transaction of worker_begin(), which
 * the caller ends.  Fills in step: with a failure nothing was written, and the walk
 * is over.  Raises errors of the server's and of the condition.
 */
void
backfill_step(Walk *walk, const WalkRow *row, WalkStep *step)
{
	Source		source;
	Range		range = {0};
	bool		any;

	step->file = row->file;
	step->failure = open_source(row, &source);
	if (step->failure == NULL)
		step->failure = check_name(row, source.rel);
	if (step->failure == NULL)
		step->failure = check_key(row, source.rel, step);
	if (step->failure != NULL)
	{
		if (source.rel != NULL)
			relation_close(source.rel, NoLock);
		return;
	}
	any = row->nkeys > 0 ? key_range(walk, row, &source, &range, step)
		: page_range(walk, row, &source, &range, step);
	step->walked = !any;
	range.open = !any;
	if (any || is_comparison(row))
	{
		Caller		caller;
		char	   *snapshot = is_comparison(row) ? compare_snapshot() : NULL;

		run_as_owner(&walk->read, read_statement(row, &source, &range), &range, source.rel);
		caller = become_table_owner(source.rel);
		if (snapshot != NULL)
			write_range(walk, row, &source, &range, snapshot, step);
		else
			write_rows(walk, row, &source, step);
		become_caller(&caller);
	}
	relation_close(source.rel, NoLock);
}

/*
 * Tells the consumers that all rows have been sent: by a message that is about no
 * row, so that there is one also where there were no rows, or the last was deleted.
 */
void
backfill_end(const Walk *walk, const WalkRow *row)
{
	char	   *body = psprintf("{\"backfill\":" INT64_FORMAT ",\"rows\":" INT64_FORMAT "}", walk->id, row->sent);

	capture_notice(row->topic, "pg_fanout.backfill",
				   DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(body))),
				   make_headers(walk->id, true), row->queue);
}

/* ---- the SQL function ---- */

/*
 * The condition as an expression on the columns of rel, named "new".  That it is
 * a single one, pgf_row_condition() has seen.
 */
static Node *
parse_where(Relation rel, const char *where)
{
	Datum		qualified = DirectFunctionCall3(pgf_row_condition, CStringGetTextDatum("new"),
												ObjectIdGetDatum(RelationGetRelid(rel)), CStringGetTextDatum(where));
	List	   *statements = raw_parser(psprintf("select (%s\n)", TextDatumGetCString(qualified)), RAW_PARSE_DEFAULT);
	SelectStmt *select = (SelectStmt *) linitial_node(RawStmt, statements)->stmt;
	ParseState *pstate = make_parsestate(NULL);
	ParseNamespaceItem *item = addRangeTableEntryForRelation(pstate, rel, AccessShareLock,
															 makeAlias("new", NIL), false, true);
	Node	   *result;

	addNSItemToQuery(pstate, item, false, true, true);
	result = transformWhereClause(pstate, linitial_node(ResTarget, select->targetList)->val,
								  EXPR_KIND_WHERE, "\"where\"");
	assign_expr_collations(pstate, result);
	if (pstate->p_hasSubLinks)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("\"where\" must not have a subquery")));
	return result;
}

/* Returns the condition in a form that means the same to whoever reads it. */
static char *
canonical_where(Relation rel, const char *where)
{
	Node	   *condition = parse_where(rel, where);
	int			level = NewGUCNestLevel();
	char	   *text;

	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	text = deparse_expression(condition, deparse_context_for("new", RelationGetRelid(rel)), true, false);

	AtEOXact_GUC(false, level);
	return text;
}

/*
 * Opens the table that the first argument, "entity", names, with ACCESS SHARE.  Raises an
 * error if it is null (22004), or unless the caller owns the table (42501).  detail: a
 * sentence, why that is asked for.
 */
Relation
backfill_open_entity(FunctionCallInfo fcinfo, const char *detail)
{
	Relation	rel;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("entity must not be null")));
	rel = relation_open(PG_GETARG_OID(0), AccessShareLock);
	if (!has_privs_of_role(GetUserId(), rel->rd_rel->relowner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be owner of table %s", RelationGetRelationName(rel)),
				 errdetail("%s", detail)));
	return rel;
}

/*
 * Hands the arguments, of these types, to SQL that runs with the rights of the
 * extension's owner.  Returns the number that it returns.
 */
int64
backfill_declare(FunctionCallInfo fcinfo, const char *sql, int nargs, Oid *types)
{
	Datum	   *values = palloc(nargs * sizeof(Datum));
	char	   *nulls = palloc(nargs);
	Caller		caller = become_owner();
	bool		isnull;
	int64		id;

	for (int i = 0; i < nargs; i++)
	{
		values[i] = PG_ARGISNULL(i) ? (Datum) 0 : PG_GETARG_DATUM(i);
		nulls[i] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	if (SPI_connect() != SPI_OK_CONNECT ||
		SPI_execute_with_args(sql, nargs, types, values, nulls, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not run \"%s\"", sql);
	id = DatumGetInt64(query_value(0, 1, &isnull));
	SPI_finish();
	become_caller(&caller);
	return id;
}

/*
 * backfill(entity, topic, consumer_group, where, rate).  In C because the caller's
 * rights on the table count, and the condition is read with the caller's
 * search_path, while the rest is done with the rights of the extension's owner.
 */
Datum
pgf_backfill(PG_FUNCTION_ARGS)
{
	Oid			types[5] = {REGCLASSOID, TEXTOID, TEXTOID, TEXTOID, INT4OID};
	Relation	rel;

	PreventCommandIfReadOnly("fanout.backfill()");
	rel = backfill_open_entity(fcinfo, "A backfill reads all rows and runs its condition with the owner's rights.");
	if (!PG_ARGISNULL(3) && (rel->rd_rel->relkind == RELKIND_RELATION ||
							 rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE))
		fcinfo->args[3].value = CStringGetTextDatum(canonical_where(rel, text_to_cstring(PG_GETARG_TEXT_PP(3))));
	relation_close(rel, NoLock);
	PG_RETURN_INT64(backfill_declare(fcinfo, "select fanout.declare_backfill($1, $2, $3, $4, $5)", 5, types));
}
