/*-------------------------------------------------------------------------
 *
 * status.c
 *		SQL functions over shared memory: what the publisher is doing, and
 *		requests to it.
 *
 * Requests are tickets: the caller draws one from a counter and waits until
 * the publisher's counter of what it has served reaches it.  That works in
 * any isolation level, for nothing is read from tables.
 *
 * Must never: wait without a time limit of the caller's, or while it holds the lock of
 * the shared memory.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "commands/trigger.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "capture/cache.h"
#include "capture/outbox.h"
#include "server/backlog.h"
#include "server/compat.h"
#include "server/guard.h"
#include "server/shmem.h"
#include "server/wakeup.h"

PG_FUNCTION_INFO_V1(pgf_library_version);
PG_FUNCTION_INFO_V1(pgf_preloaded);
PG_FUNCTION_INFO_V1(pgf_wake_publisher);
PG_FUNCTION_INFO_V1(pgf_note_tallies);
PG_FUNCTION_INFO_V1(pgf_topology_changed);
PG_FUNCTION_INFO_V1(pgf_flush);
PG_FUNCTION_INFO_V1(pgf_verify);
PG_FUNCTION_INFO_V1(pgf_publisher_status);
PG_FUNCTION_INFO_V1(pgf_subscription_status);
PG_FUNCTION_INFO_V1(pgf_backlog);

#define STATUS_COLUMNS 14
#define SUBSCRIPTION_COLUMNS 19

static const char *const state_name[] = {
	[WORKER_STARTING] = "starting",
	[WORKER_CONNECTING] = "connecting",
	[WORKER_IDLE] = "idle",
	[WORKER_PUBLISHING] = "publishing",
	[WORKER_CONSUMING] = "consuming",
	[WORKER_BLOCKED] = "blocked",
	[WORKER_REFUSED] = "refused",
	[WORKER_DISCONNECTED] = "disconnected",
	[WORKER_PASSIVE] = "passive",
	[WORKER_STOPPED] = "stopped",
};

Datum
pgf_library_version(PG_FUNCTION_ARGS)
{
	PG_RETURN_TEXT_P(cstring_to_text(PG_FANOUT_VERSION));
}

Datum
pgf_preloaded(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(pgf_shared != NULL);
}

static void
topology_changed(void)
{
	outbox_topology_changed();
	cache_invalidate_topics();
}

Datum
pgf_wake_publisher(PG_FUNCTION_ARGS)
{
	topology_changed();
	PG_RETURN_VOID();
}

Datum
pgf_topology_changed(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be called by a trigger", "fanout.topology_changed")));
	if (!guard_is_replicated()) /* nothing was changed then */
		topology_changed();
	return PointerGetDatum(NULL);
}

/*
 * Tells the publisher of new entries in fanout.tally, and wakes it once there are many.
 * That is before they are committed; see add_tallies() in publisher.c.
 */
Datum
pgf_note_tallies(PG_FUNCTION_ARGS)
{
	DatabaseSlot *slot = shmem_my_slot();
	uint32		entries = Max(PG_GETARG_INT32(0), 0);
	uint32		before;

	if (slot != NULL)
	{
		before = pg_atomic_fetch_add_u32(&slot->tallies, entries);
		if (before < MANY_TALLIES && before + entries >= MANY_TALLIES)
			shmem_wake_publisher(slot);
	}
	PG_RETURN_VOID();
}

/* ---- requests ---- */

static DatabaseSlot *
require_slot(void)
{
	DatabaseSlot *slot;

	if (pgf_shared == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_fanout must be loaded via shared_preload_libraries"),
				 errhint("Add it to shared_preload_libraries and restart the server. Messages are kept until then.")));
	slot = shmem_want_slot(MyDatabaseId);
	if (slot == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("no publisher can be started for this database"),
				 errhint("Raise pg_fanout.max_databases and restart the server.")));
	shmem_wake_launcher(RESCAN_DATABASES);
	return slot;
}

static MonoTime
deadline(FunctionCallInfo fcinfo)
{
	Interval   *timeout;
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz end;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("timeout must not be null")));
	timeout = PG_GETARG_INTERVAL_P(0);
	end = DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
												  TimestampTzGetDatum(now),
												  IntervalPGetDatum(timeout)));
	if (end < now)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("timeout must not be negative")));
	/* PostgreSQL 17 has infinite intervals */
	return mono_now() + (TIMESTAMP_IS_NOEND(end) ? PG_INT64_MAX / 2 : end - now);
}

/* Waits until *done reaches ticket; false at the deadline. */
static bool
wait_for(DatabaseSlot *slot, pg_atomic_uint64 *done, uint64 ticket, MonoTime end)
{
	bool		reached;

	ConditionVariablePrepareToSleep(&slot->progress);
	while (!(reached = pg_atomic_read_u64(done) >= ticket))
	{
		MonoTime	now = mono_now();

		if (now >= end)
			break;

		/*
		 * In slices: a publisher that was started only now has to be told of
		 * the request once more.
		 */
		(void) ConditionVariableTimedSleep(&slot->progress,
										   Min(200, mono_left(now, end)),
										   PG_WAIT_EXTENSION);
	}
	ConditionVariableCancelSleep();
	return reached;
}

Datum
pgf_flush(PG_FUNCTION_ARGS)
{
	MonoTime	end = deadline(fcinfo);
	DatabaseSlot *slot = require_slot();
	uint64		ticket = pg_atomic_add_fetch_u64(&slot->flush_requested, 1);

	shmem_wake_publisher(slot);
	PG_RETURN_BOOL(wait_for(slot, &slot->flush_done, ticket, end));
}

Datum
pgf_verify(PG_FUNCTION_ARGS)
{
	MonoTime	end = deadline(fcinfo);
	DatabaseSlot *slot = require_slot();
	uint64		ticket = pg_atomic_add_fetch_u64(&slot->verify_requested, 1);

	shmem_wake_publisher(slot);
	PG_RETURN_BOOL(wait_for(slot, &slot->verify_done, ticket, end));
}

/* ---- the workers' status ---- */

static void
set_text(Datum *value, bool *isnull, const char *s)
{
	*isnull = (s[0] == '\0');
	if (!*isnull)
		*value = CStringGetTextDatum(s);
}

static void
set_time(Datum *value, bool *isnull, TimestampTz when)
{
	*isnull = (when == 0);
	*value = TimestampTzGetDatum(when);
}

static void
fill_status(DatabaseSlot *slot, Datum *values, bool *nulls)
{
	WorkerStatus status;
	int			pid = slot->worker.pid;

	SpinLockAcquire(&slot->worker.mutex);
	status = slot->worker.status;
	SpinLockRelease(&slot->worker.mutex);
	if (pid == 0)
		status.state = WORKER_STOPPED;

	values[0] = Int32GetDatum(pid);
	nulls[0] = (pid == 0);
	values[1] = CStringGetTextDatum(state_name[status.state]);
	set_time(&values[2], &nulls[2], status.since);
	set_text(&values[3], &nulls[3], status.connected_to);
	set_time(&values[4], &nulls[4], status.connected_at);
	values[5] = Int32GetDatum(pg_atomic_read_u32(&slot->in_flight));
	values[6] = Int64GetDatum(pg_atomic_read_u64(&slot->published));
	values[7] = Int64GetDatum(pg_atomic_read_u64(&slot->confirmed));
	values[8] = Int64GetDatum(pg_atomic_read_u64(&slot->returned));
	values[9] = Int64GetDatum(pg_atomic_read_u64(&slot->nacked));
	values[10] = Int64GetDatum(pg_atomic_read_u64(&slot->dead));
	values[11] = Int64GetDatum(pg_atomic_read_u64(&slot->reconnects));
	set_text(&values[12], &nulls[12], status.last_error);
	set_time(&values[13], &nulls[13], status.last_error_at);
}

Datum
pgf_publisher_status(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	Datum		values[STATUS_COLUMNS] = {0};
	bool		nulls[STATUS_COLUMNS];
	DatabaseSlot *slot = shmem_my_slot();

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	memset(nulls, slot == NULL, sizeof(nulls));
	if (slot != NULL)
		fill_status(slot, values, nulls);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/*
 * Returns what waits for each topic, as the publisher knows it, and a row for topic 0
 * that says that these figures are true.  No rows: they have to be counted, because
 * there is no publisher, it has not found everything yet, or has too many topics.
 */
Datum
pgf_backlog(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	DatabaseSlot *slot = shmem_my_slot();
	BacklogFigures figures = {0};
	int			i = 0;

	pgf_init_materialized(fcinfo);
	if (slot == NULL || pg_atomic_read_u32(&slot->backlog_known) == 0)
		return (Datum) 0;
	do
	{
		Datum		values[3] = {Int32GetDatum(figures.topic_id), Int64GetDatum(figures.pending)};
		bool		nulls[3] = {0};

		set_time(&values[2], &nulls[2], figures.oldest);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	} while (backlog_next(&i, &figures));
	return (Datum) 0;
}

/* False: it is not, or not any more, of this database. */
static bool
fill_subscription(SubscriptionSlot *slot, Datum *values, bool *nulls)
{
	WorkerStatus status;
	uint64		lag = pg_atomic_read_u64(&slot->lag);
	int			pid;
	bool		ours;

	LWLockAcquire(pgf_shared->lock, LW_SHARED);
	ours = (slot->worker.database == MyDatabaseId && !slot->worker.unwanted);
	values[0] = Int32GetDatum(slot->subscription.subscription_id);
	pid = slot->worker.pid;
	LWLockRelease(pgf_shared->lock);
	SpinLockAcquire(&slot->worker.mutex);
	status = slot->worker.status;
	SpinLockRelease(&slot->worker.mutex);

	values[1] = Int32GetDatum(pid);
	nulls[1] = (pid == 0);
	values[2] = CStringGetTextDatum(state_name[pid == 0 ? WORKER_STOPPED : status.state]);
	set_time(&values[3], &nulls[3], status.since);
	set_text(&values[4], &nulls[4], status.connected_to);
	set_time(&values[5], &nulls[5], status.connected_at);
	values[6] = Int64GetDatum(pg_atomic_read_u64(&slot->delivered));
	values[7] = Int64GetDatum(pg_atomic_read_u64(&slot->applied));
	values[8] = Int64GetDatum(pg_atomic_read_u64(&slot->skipped));
	values[9] = Int64GetDatum(pg_atomic_read_u64(&slot->stale));
	values[10] = Int64GetDatum(pg_atomic_read_u64(&slot->own));
	values[11] = Int64GetDatum(pg_atomic_read_u64(&slot->ignored));
	values[12] = Int64GetDatum(pg_atomic_read_u64(&slot->failed));
	values[13] = Int64GetDatum(pg_atomic_read_u64(&slot->dead));
	values[14] = Int32GetDatum(pg_atomic_read_u32(&slot->waiting));
	values[15] = Int64GetDatum((int64) lag - 1);
	nulls[15] = (lag == 0);
	values[16] = Int64GetDatum(pg_atomic_read_u64(&slot->reconnects));
	set_text(&values[17], &nulls[17], status.last_error);
	set_time(&values[18], &nulls[18], status.last_error_at);
	return ours;
}

Datum
pgf_subscription_status(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;

	pgf_init_materialized(fcinfo);
	for (int i = 0; pgf_shared != NULL && i < pgf_shared->nsubscriptions; i++)
	{
		Datum		values[SUBSCRIPTION_COLUMNS] = {0};
		bool		nulls[SUBSCRIPTION_COLUMNS] = {0};

		if (fill_subscription(&pgf_shared->subscriptions[i], values, nulls))
			tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
