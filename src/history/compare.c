/*-------------------------------------------------------------------------
 *
 * compare.c
 *		The source's part of a comparison: ranges of rows, to messages; and the SQL
 *		function compare().
 *
 * A comparison is walked as a backfill is (backfill.c), by a unique index on the
 * key.  Each step writes one message, for that group's queue alone: all rows of its
 * range, as the capture would send them, and a snapshot that was taken before they
 * were read.
 *
 *		after < keys <= upto		the next step begins after this upto
 *		after < keys				the last one
 *
 * Then a message says how many ranges there were; or, if the comparison fails or is
 * cancelled, why there are no more.  None of them has "op", so consumers other than the
 * copy's ignore them; consume/compare.c has the rest, and why this is exact.
 *
 * Whole rows are sent, not hashes: the copy may lack some of the columns, or have
 * them with other types, so that a hash of the row would tell nothing, and hashes of
 * all columns are as long as most of the values.
 *
 * It must never take the snapshot after the rows were read.
 *
 * Locks: ROW SHARE on the table; of a repair, FOR NO KEY UPDATE on the rows, so that
 * the message's sequence stands among those of their changes where the lock does.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"

#include "capture/capture.h"
#include "consume/owner.h"
#include "history/history.h"
#include "server/query.h"

PG_FUNCTION_INFO_V1(pgf_compare);
PG_FUNCTION_INFO_V1(pgf_write_comparison);

/*
 * Returns a snapshot (pg_snapshot) as text.  To be called before a range is read, in
 * a transaction of worker_begin(), with the rights of pg_fanout.
 */
char *
compare_snapshot(void)
{
	static CachedQuery query = {"select pg_catalog.pg_current_snapshot()::text"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	return TextDatumGetCString(query_value(0, 1, &isnull));
}

/* Names the table as it was named when the comparison began, for the copy knows it by that. */
static Jsonb *
make_headers(const Walk *walk, const WalkRow *row)
{
	StringInfoData text;

	initStringInfo(&text);
	appendStringInfo(&text, "{\"compare\":" INT64_FORMAT ",\"schema\":", walk->id);
	escape_json(&text, row->schema);
	appendStringInfoString(&text, ",\"table\":");
	escape_json(&text, row->table);
	appendStringInfoChar(&text, '}');
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(text.data)));
}

/* The names of the key's columns, and what says how they sort. */
static void
append_key(StringInfo out, const WalkRow *row, Relation rel)
{
	static CachedQuery query = {"select array_to_json(fanout.key_order($1, $2))::text"};
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum	   *attnums = palloc((row->nkeys + 1) * sizeof(Datum));
	Datum		values[2];
	bool		isnull;
	Caller		caller = become_owner();

	appendStringInfoString(out, ",\"key\":");
	for (int i = 0; i < row->nkeys; i++)
	{
		attnums[i] = Int16GetDatum(row->keys[i]);
		appendStringInfoChar(out, i == 0 ? '[' : ',');
		escape_json(out, get_attname(RelationGetRelid(rel), row->keys[i], false));
	}
	values[0] = ObjectIdGetDatum(RelationGetRelid(rel));
	values[1] = PointerGetDatum(construct_array(attnums, row->nkeys, INT2OID, 2, true, TYPALIGN_SHORT));
	query_execute(&query, 2, types, values, NULL);
	appendStringInfo(out, "],\"order\":%s", TextDatumGetCString(query_value(0, 1, &isnull)));
	become_caller(&caller);
}

/* Values are strings, which the copy's input functions read, or are JSON anyway. */
static void
append_bound(StringInfo out, const char *name, char **texts, const WalkRow *row, Relation rel)
{
	appendStringInfo(out, ",\"%s\":", name);
	if (texts == NULL)
	{
		appendStringInfoString(out, "null");
		return;
	}
	for (int i = 0; i < row->nkeys; i++)
	{
		Oid			type = TupleDescAttr(RelationGetDescr(rel), row->keys[i] - 1)->atttypid;

		appendStringInfoChar(out, i == 0 ? '[' : ',');
		if (getBaseType(type) == JSONBOID)
			appendStringInfoString(out, texts[i]);
		else
			escape_json(out, texts[i]);
	}
	appendStringInfoChar(out, ']');
}

static void
append_rows(StringInfo out, Relation rel, Trigger *trigger, SPITupleTable * table, uint64 n)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout row", ALLOCSET_DEFAULT_SIZES);

	appendStringInfoString(out, ",\"rows\":[");
	for (uint64 i = 0; i < n; i++)
	{
		MemoryContext old_context = MemoryContextSwitchTo(context);
		bool		isnull;
		HeapTupleHeader header = DatumGetHeapTupleHeader(SPI_getbinval(table->vals[i], table->tupdesc, 1, &isnull));
		HeapTupleData tuple = {.t_len = HeapTupleHeaderGetDatumLength(header),.t_data = header};

		CHECK_FOR_INTERRUPTS();
		if (i > 0)
			appendStringInfoChar(out, ',');
		capture_append_row(out, rel, trigger, &tuple);
		MemoryContextSwitchTo(old_context);
		MemoryContextReset(context);
	}
	appendStringInfoString(out, "]}");
}

/*
 * Writes the message of a range whose rows, of one composite column, are in
 * SPI_tuptable.  snapshot: of compare_snapshot().  As the table's owner.  Returns the
 * bytes of the body.  Errors: of output functions; 54000 if the body passes 1 GB.
 */
Size
compare_write(const Walk *walk, const WalkRow *row, Relation rel, Trigger *trigger,
			  const WalkRange *range, const char *snapshot)
{
	SPITupleTable *table = SPI_tuptable;
	uint64		n = SPI_processed;
	StringInfoData body;

	initStringInfo(&body);
	appendStringInfo(&body, "{\"compare\":" INT64_FORMAT ",\"repair\":%s,\"snapshot\":\"%s\"",
					 walk->id, row->repair ? "true" : "false", snapshot);
	append_key(&body, row, rel);
	appendStringInfo(&body, ",\"key_columns\":%s", capture_key_columns(rel, trigger));
	append_bound(&body, "after", range->after, row, rel);
	append_bound(&body, "upto", range->upto, row, rel);
	append_rows(&body, rel, trigger, table, n);
	SPI_freetuptable(table);
	capture_payload(row->topic, COMPARISON_TYPE, body.data, make_headers(walk, row), row->queue);
	return body.len;
}

/*
 * Tells the copy that a comparison has ended: how many ranges it has been sent, or, with
 * failure, why there are not all.  In a transaction of worker_begin().  Does nothing if the
 * walk is no comparison, or its queue or topic is gone.
 */
void
compare_end(const Walk *walk, const char *failure)
{
	static CachedQuery query = {"select fanout.end_comparison($1, $2)"};
	Oid			types[2] = {INT8OID, TEXTOID};
	char		nulls[2] = {' ', ' '};
	Datum		values[2] = {Int64GetDatum(walk->id), (Datum) 0};

	values[1] = query_text_param(failure, &nulls[1]);
	query_execute(&query, 2, types, values, nulls);
}

/* ---- the SQL functions ---- */

/*
 * compare(entity, topic, consumer_group, repair).  In C because the caller's rights
 * on the table count, while the rest is done with those of the extension's owner.
 */
Datum
pgf_compare(PG_FUNCTION_ARGS)
{
	Oid			types[4] = {REGCLASSOID, TEXTOID, TEXTOID, BOOLOID};

	PreventCommandIfReadOnly("fanout.compare()");
	relation_close(backfill_open_entity(fcinfo, "A comparison reads all rows with the owner's rights."), NoLock);
	PG_RETURN_INT64(backfill_declare(fcinfo, "select fanout.declare_comparison($1, $2, $3, $4)", 4, types));
}

/* write_comparison(topic, queue, headers, body), for end_comparison() alone. */
Datum
pgf_write_comparison(PG_FUNCTION_ARGS)
{
	capture_payload(text_to_cstring(PG_GETARG_TEXT_PP(0)), COMPARISON_TYPE, text_to_cstring(PG_GETARG_TEXT_PP(3)),
					PG_GETARG_JSONB_P(2), text_to_cstring(PG_GETARG_TEXT_PP(1)));
	PG_RETURN_VOID();
}
