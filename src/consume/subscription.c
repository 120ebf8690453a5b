/*-------------------------------------------------------------------------
 *
 * subscription.c
 *		The rows of fanout.subscription, and the SQL functions that change them.
 *
 * A subscription's row is written by SQL functions (subscribe() and its like)
 * and read by its worker, which begins anew whenever the row's version is
 * another one.  The functions that users call are in C because only there the
 * role that calls can be told from the one whose rights are needed: each hands
 * its arguments, and the caller's role, to a function in SQL that runs with the
 * rights of the extension's owner.
 *
 *		subscribe()           pause()               unsubscribe()
 *		(none) ------> ACTIVE ------> PAUSED ------> (row stays, not active)
 *		                 ^  ^           |                     |
 *		                 |  '-resume()--'                     |
 *		                 '--------------- subscribe() --------'
 *
 * An ACTIVE one has a worker, unless its role may not log in any more.  So has one
 * that has ended, for as long as it takes to delete the queue if that was asked for.
 *
 * Must never: run a statement with the caller's rights on our tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

#include "capture/rights.h"
#include "consume/owner.h"
#include "consume/subscription.h"
#include "server/query.h"
#include "server/shmem.h"
#include "server/utf8.h"
#include "server/wakeup.h"

PG_FUNCTION_INFO_V1(pgf_declare);
PG_FUNCTION_INFO_V1(pgf_subscribe);
PG_FUNCTION_INFO_V1(pgf_unsubscribe);
PG_FUNCTION_INFO_V1(pgf_sync_table);
PG_FUNCTION_INFO_V1(pgf_alter_subscription);
PG_FUNCTION_INFO_V1(pgf_pause);
PG_FUNCTION_INFO_V1(pgf_resume);
PG_FUNCTION_INFO_V1(pgf_retry);
PG_FUNCTION_INFO_V1(pgf_skip);
PG_FUNCTION_INFO_V1(pgf_subscriptions_changed);
PG_FUNCTION_INFO_V1(pgf_wake_consumers);

/* ---- rows ---- */

/*
 * Tells the launcher which subscriptions of this database are to have a worker.
 * Called by the publisher, in a transaction of worker_begin().  Returns how many
 * got no slot (pg_fanout.max_subscriptions).
 */
int
subscription_publish_all(void)
{
	static CachedQuery query = {
		"select subscription_id, version, fanout.subscriber(s)::oid from fanout.subscription s"
		" where (active and not paused or drop_queue) and fanout.subscription_problem(s) is null order by subscription_id"
	};
	Caller		caller = become_owner();
	Subscription *subscriptions;
	int			n;
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	n = SPI_processed;
	subscriptions = palloc((n + 1) * sizeof(Subscription));
	for (int i = 0; i < n; i++)
	{
		subscriptions[i].subscription_id = DatumGetInt32(query_value(i, 1, &isnull));
		subscriptions[i].version = DatumGetInt32(query_value(i, 2, &isnull));
		subscriptions[i].role = DatumGetObjectId(query_value(i, 3, &isnull));
	}
	become_caller(&caller);
	return shmem_set_subscriptions(MyDatabaseId, subscriptions, n);
}

static char *
text_value(int row, int column)
{
	bool		isnull;
	Datum		value = query_value(row, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

static char *
utf8(const char *s)
{
	size_t		len;
	const char *result = utf8_encode(s, strlen(s), &len);

	return result != NULL ? pstrdup(result) : NULL;
}

/* Parses start_at, in one of the forms that fanout.check_start_at() returns. */
static StreamStart
stream_start(const char *start_at)
{
	if (start_at == NULL)
		return STREAM_NONE;
	if (strcmp(start_at, "first") == 0)
		return STREAM_FROM_FIRST;
	if (strcmp(start_at, "last") == 0)
		return STREAM_FROM_LAST;
	if (strcmp(start_at, "next") == 0)
		return STREAM_FROM_NEXT;
	return strchr(start_at, '-') != NULL ? STREAM_FROM_TIME : STREAM_FROM_OFFSET;
}

/* Takes over the row that subscription_load() has selected; texts in the current context. */
static void
read_subscription(SubscriptionRow *row)
{
	bool		isnull;

	row->version = DatumGetInt32(query_value(0, 1, &isnull));
	row->topic = text_value(0, 2);
	row->consumer_group = text_value(0, 3);
	row->exchange = utf8(row->topic);
	row->queue = utf8(psprintf("%s_%s", row->topic, row->consumer_group));
	row->batch = DatumGetBool(query_value(0, 4, &isnull));
	row->ordered = DatumGetBool(query_value(0, 5, &isnull));
	row->prefetch = DatumGetInt32(query_value(0, 6, &isnull));
	row->max_attempts = DatumGetInt32(query_value(0, 7, &isnull));
	row->retry_delay = (long) DatumGetInt64(query_value(0, 8, &isnull));
	row->max_retry_delay = (long) DatumGetInt64(query_value(0, 9, &isnull));
	row->handler_timeout = (int) DatumGetInt64(query_value(0, 10, &isnull));
	row->handler = DatumGetObjectId(query_value(0, 11, &isnull));
	row->message_type = DatumGetObjectId(query_value(0, 12, &isnull));
	row->argument_type = DatumGetObjectId(query_value(0, 13, &isnull));
	row->problem = text_value(0, 14);
	row->requeue = DatumGetBool(query_value(0, 15, &isnull));
	row->wait_for = text_value(0, 16);
	row->max_wait = (long) DatumGetInt64(query_value(0, 17, &isnull));
	row->origin = DatumGetBool(query_value(0, 18, &isnull)) ? QUEUE_OWN : QUEUE_FOREIGN;
	if (isnull)
		row->origin = QUEUE_UNKNOWN;
	row->drop_queue = DatumGetBool(query_value(0, 19, &isnull));
	row->sync_target = DatumGetObjectId(query_value(0, 20, &isnull));
	row->inbox_id = DatumGetInt32(query_value(0, 21, &isnull));
	row->start_value = DatumGetInt64(query_value(0, 23, &isnull));
	row->start_kind = stream_start(text_value(0, 22));
	if (row->exchange == NULL || row->queue == NULL)
		row->problem = pstrdup("its name cannot be converted to UTF-8");
}

/*
 * Reads a subscription and what keeps it from being consumed, and notes what its
 * names mean in this database; texts in the context, which is reset.  Returns false, and
 * leaves the row as it is, if it has ended.  In a transaction of worker_begin().
 */
bool
subscription_load(int32 subscription_id, MemoryContext context, SubscriptionRow *row)
{
	static CachedQuery query = {
		"select version, topic, consumer_group, batch, ordered, prefetch, max_attempts,"
		" (extract(epoch from retry_delay) * 1000)::bigint, (extract(epoch from max_retry_delay) * 1000)::bigint,"
		" (extract(epoch from handler_timeout) * 1000)::bigint,"
		" coalesce(fanout.subscription_handler(s), 0), 'fanout.message'::regtype::oid,"
		" case when batch then 'fanout.message[]'::regtype else 'fanout.message'::regtype end::oid,"
		" coalesce(fanout.subscription_problem(s), fanout.handler_problem(s), fanout.queue_problem(s),"
		" fanout.sync_problem(s.subscription_id)),"
		" on_failure = 'requeue', (select coalesce(string_agg(c || ' ', ''), '') from unnest(wait_for) c),"
		" (extract(epoch from max_wait) * 1000)::bigint, queue_declared, drop_queue,"
		" coalesce((select fanout.target_table(t)::oid from fanout.sync_target t where t.subscription_id = s.subscription_id), 0),"
		" inbox_id, start_at, case when start_at like '%-%' then floor(extract(epoch from start_at::timestamptz))::bigint"
		" when start_at ~ '^[0-9]' then start_at::bigint else 0 end"
		" from fanout.subscription s where subscription_id = $1 and (active and not paused or drop_queue)"
	};
	static CachedQuery bind = {"select fanout.bind_subscription($1)"};
	Caller		caller = become_owner();
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(subscription_id)};
	bool		found;

	query_execute(&bind, 1, types, values, NULL);
	query_execute(&query, 1, types, values, NULL);
	found = (SPI_processed == 1);
	if (found)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(context);

		MemoryContextReset(context);
		memset(row, 0, sizeof(*row));
		row->subscription_id = subscription_id;
		read_subscription(row);
		MemoryContextSwitchTo(oldcontext);
	}
	become_caller(&caller);
	return found;
}

/* Is the subscription still active, and of this version? */
bool
subscription_is(int32 subscription_id, int32 version)
{
	static CachedQuery query = {
		"select from fanout.subscription where subscription_id = $1 and version = $2 and active and not paused"
	};
	Oid			types[2] = {INT4OID, INT4OID};
	Datum		values[2] = {Int32GetDatum(subscription_id), Int32GetDatum(version)};

	owner_execute(&query, 2, types, values, NULL);
	return SPI_processed == 1;
}

/* Remembers who declared the queue. */
void
subscription_set_origin(int32 subscription_id, QueueOrigin origin)
{
	static CachedQuery query = {
		"update fanout.subscription set queue_declared = $2 where subscription_id = $1"
	};
	Oid			types[2] = {INT4OID, BOOLOID};
	Datum		values[2] = {Int32GetDatum(subscription_id), BoolGetDatum(origin == QUEUE_OWN)};

	owner_execute(&query, 2, types, values, NULL);
}

/*
 * Remembers that a subscription that has ended has no queue any more.  Removes what its
 * worker has stored while it ended, which unsubscribe() could not see yet: that worker
 * was gone before this one began.
 */
void
subscription_queue_dropped(int32 subscription_id)
{
	static CachedQuery queries[2] = {
		{"update fanout.subscription set drop_queue = false where subscription_id = $1"},
		{"delete from fanout.waiting where subscription_id = $1"}
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(subscription_id)};

	for (int i = 0; i < lengthof(queries); i++)
		owner_execute(&queries[i], 1, types, values, NULL);
}

/*
 * Is the queue one that this database's publisher declares?  Then *delivery_limit is how
 * often it takes a message back before it drops it, PG_INT32_MAX if always.
 */
bool
subscription_has_binding(const char *topic, const char *consumer_group, int64 *delivery_limit)
{
	static CachedQuery query = {
		"select least(coalesce(fanout.delivery_limit(b), $3), $3)::bigint from fanout.binding b"
		" join fanout.topic t using (topic_id) where t.topic = $1 and b.consumer_group = $2"
	};
	Oid			types[3] = {TEXTOID, TEXTOID, INT4OID};
	Datum		values[3] = {
		CStringGetTextDatum(topic), CStringGetTextDatum(consumer_group), Int32GetDatum(PG_INT32_MAX)
	};
	bool		isnull;

	owner_execute(&query, 3, types, values, NULL);
	if (SPI_processed == 0)
		return false;
	*delivery_limit = DatumGetInt64(query_value(0, 1, &isnull));
	return true;
}

/* ---- functions of users ---- */

/*
 * Calls a function in SQL with the owner's rights; its arguments are the role
 * that called us, and that alone, and what we were called with.  Returns its
 * result if that is a bigint.
 */
static int64
call_as_owner(FunctionCallInfo fcinfo, const char *function)
{
	Oid			types[FUNC_MAX_ARGS + 1] = {OIDOID};
	Datum		values[FUNC_MAX_ARGS + 1] = {ObjectIdGetDatum(GetUserId())};
	char		nulls[FUNC_MAX_ARGS + 1] = {' '};
	Oid		   *own_types;
	int			nargs;
	StringInfoData sql;
	Caller		caller;
	int64		result = 0;
	bool		isnull;

	(void) get_func_signature(fcinfo->flinfo->fn_oid, &own_types, &nargs);
	initStringInfo(&sql);
	appendStringInfo(&sql, "select fanout.%s($1::regrole", function);
	for (int i = 0; i < nargs; i++)
	{
		types[i + 1] = own_types[i];
		values[i + 1] = PG_GETARG_DATUM(i);
		nulls[i + 1] = PG_ARGISNULL(i) ? 'n' : ' ';
		appendStringInfo(&sql, ", $%d", i + 2);
	}
	appendStringInfoChar(&sql, ')');
	PreventCommandIfReadOnly(psprintf("fanout.%s()", get_func_name(fcinfo->flinfo->fn_oid)));
	caller = become_owner();
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	if (SPI_execute_with_args(sql.data, nargs + 1, types, values, nulls, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not execute \"%s\"", sql.data);
	if (TupleDescAttr(SPI_tuptable->tupdesc, 0)->atttypid == INT8OID)
		result = DatumGetInt64(query_value(0, 1, &isnull));
	SPI_finish();
	become_caller(&caller);
	return result;
}

/* May the caller consume that queue?  What has no name is refused later. */
static void
check_queue_grant(FunctionCallInfo fcinfo)
{
	if (!PG_ARGISNULL(0) && !PG_ARGISNULL(1))
		rights_check(GetUserId(), text_to_cstring(PG_GETARG_TEXT_PP(0)), "subscribe",
					 text_to_cstring(PG_GETARG_TEXT_PP(1)));
}

/*
 * Runs, as the extension's owner, the SQL function that has the called one's name and
 * "_as".  All functions that declare and drop topics come here.
 */
Datum
pgf_declare(PG_FUNCTION_ARGS)
{
	call_as_owner(fcinfo, psprintf("%s_as", get_func_name(fcinfo->flinfo->fn_oid)));
	PG_RETURN_VOID();
}

Datum
pgf_subscribe(PG_FUNCTION_ARGS)
{
	check_queue_grant(fcinfo);
	call_as_owner(fcinfo, "add_subscription");
	PG_RETURN_VOID();
}

Datum
pgf_sync_table(PG_FUNCTION_ARGS)
{
	check_queue_grant(fcinfo);
	call_as_owner(fcinfo, "add_sync_table");
	PG_RETURN_VOID();
}

Datum
pgf_unsubscribe(PG_FUNCTION_ARGS)
{
	call_as_owner(fcinfo, "remove_subscription");
	PG_RETURN_VOID();
}

Datum
pgf_alter_subscription(PG_FUNCTION_ARGS)
{
	call_as_owner(fcinfo, "change_subscription");
	PG_RETURN_VOID();
}

Datum
pgf_pause(PG_FUNCTION_ARGS)
{
	call_as_owner(fcinfo, "pause_as");
	PG_RETURN_VOID();
}

Datum
pgf_resume(PG_FUNCTION_ARGS)
{
	call_as_owner(fcinfo, "resume_as");
	PG_RETURN_VOID();
}

Datum
pgf_retry(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(call_as_owner(fcinfo, "retry_as"));
}

Datum
pgf_skip(PG_FUNCTION_ARGS)
{
	call_as_owner(fcinfo, "skip_as");
	PG_RETURN_VOID();
}

/* ---- wake-ups ---- */

Datum
pgf_subscriptions_changed(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be called by a trigger", "fanout.subscriptions_changed")));
	wakeup_subscriptions_at_commit();
	return PointerGetDatum(NULL);
}

Datum
pgf_wake_consumers(PG_FUNCTION_ARGS)
{
	wakeup_consumers_at_commit();
	PG_RETURN_VOID();
}
