/*-------------------------------------------------------------------------
 *
 * handler.c
 *		Runs a subscription's handler on deliveries, in one transaction.
 *
 * The transaction: the extension is locked, the subscription still there, the
 * ids looked up in the inbox, the handler called for those that are not in
 * it, the ids put into the inbox, commit, and WAL flushed whatever the handler
 * has done to synchronous_commit.  Only then may anything be acked.
 *
 * The handler runs as the role of the session, which is the one that
 * subscribed; there are no other rights that it could come back to.  What it
 * sets (SET, SET ROLE, ...) ends with its call.  It cannot commit: it is called
 * as in a query, where the server refuses that.
 *
 * handler_timeout: a timer sends SIGINT, as pg_cancel_backend() would; both
 * cancel what the handler does, which is an error like any other.  One that
 * catches that ends with its process.
 *
 * Must never: ack, or be called while the broker is waited for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "capture/headers.h"
#include "capture/via.h"
#include "consume/handler.h"
#include "server/worker.h"

/*
 * A handler may catch its cancellation, and go on.  When its time is over for
 * so many milliseconds, the process ends; a failed attempt, as any FATAL is.
 */
#define GRACE_MS 2000

/* Of a call, kept for the next one: a thousand messages of 1 kB. */
#define CALL_MEMORY (1024 * 1024)

/* Of an error's text, in bytes. */
#define MAX_ERROR 8192

static TimeoutId handler_timer;
static TimeoutId grace_timer;
static volatile sig_atomic_t timed_out = false;
static bool running = false;
static int	time_allowed = 0;	/* ms, of the call that runs; 0: none does */
static bool refresh = true;		/* the subscription has to be read anew */
static Oid	sync_target = InvalidOid;	/* see sync_table(); InvalidOid: none */
static FmgrInfo handler_function;
static TupleDesc message_desc;
static MemoryContext call_context;	/* what the handler is given, and leaves */
static MemoryContext value_context; /* while one message is made */

/* ---- what it depends on ---- */

static void
something_changed(Datum arg, int cache, uint32 hash)
{
	refresh = true;
}

/* Of the table that sync_table() keeps; others are no business of a handler's. */
static void
table_changed(Datum arg, Oid relid)
{
	if (OidIsValid(sync_target) && (relid == sync_target || relid == InvalidOid))
		refresh = true;
}

static void
handler_late(void)
{
	timed_out = true;
	kill(MyProcPid, SIGINT);
}

static void
handler_deaf(void)
{
	kill(MyProcPid, SIGTERM);
}

void
handler_init(void)
{
	static const int caches[] = {PROCOID, NAMESPACEOID, AUTHOID, AUTHMEMMEMROLE, DATABASEOID};

	for (int i = 0; i < lengthof(caches); i++)
		CacheRegisterSyscacheCallback(caches[i], something_changed, (Datum) 0);
	CacheRegisterRelcacheCallback(table_changed, (Datum) 0);
	handler_timer = RegisterTimeout(USER_TIMEOUT, handler_late);
	grace_timer = RegisterTimeout(USER_TIMEOUT, handler_deaf);
	call_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout call", 0, CALL_MEMORY, ALLOCSET_DEFAULT_MAXSIZE);
	value_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout message", ALLOCSET_DEFAULT_SIZES);
}

bool
handler_running(void)
{
	return running;
}

static bool
read_anew(SubscriptionRow *row, int32 subscription_id, MemoryContext context)
{
	bool		found;

	MemoryContextReset(context);
	refresh = false;
	found = inbox_load_subscription(subscription_id, context, row);
	sync_target = found ? row->sync_target : InvalidOid;
	return found;
}

bool
handler_refresh(SubscriptionRow *row, int32 subscription_id, MemoryContext context)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		found;

	worker_begin();
	found = read_anew(row, subscription_id, context);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	return found;
}

/* At the begin of a transaction. */
static HandlerResult
prepare(SubscriptionRow *row)
{
	if (!inbox_subscription_is(row->subscription_id, row->version))
		return HANDLER_ENDED;
	if (refresh && !read_anew(row, row->subscription_id, GetMemoryChunkContext(row->topic)))
		return HANDLER_ENDED;
	if (row->problem != NULL)
		return HANDLER_UNUSABLE;
	fmgr_info_cxt(row->handler, &handler_function, TopTransactionContext);
	message_desc = lookup_rowtype_tupdesc_copy(row->message_type, -1);
	return HANDLER_COMMITTED;
}

/* ---- calling it ---- */

static Datum
message_datum(MessageValues *message)
{
	return HeapTupleGetDatum(heap_form_tuple(message_desc, message->values, message->nulls));
}

/* What the handler writes carries the way that its messages have come: via.h. */
static void
note_via(const MessageValues *message)
{
	Jsonb	   *headers = message->nulls[MESSAGE_HEADERS] ? NULL : DatumGetJsonbP(message->values[MESSAGE_HEADERS]);

	via_add(via_of_message(headers_string(headers, "via"), headers_string(headers, "schema"),
						   headers_string(headers, "table")));
}

/* In the current memory context; what it took to make it is let go. */
static Datum
delivery_datum(const SubscriptionRow *row, const Delivery *delivery)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(value_context);
	MessageValues message;

	MemoryContextReset(value_context);
	delivery_values(delivery, row->topic, row->consumer_group, &message);
	note_via(&message);
	MemoryContextSwitchTo(oldcontext);
	return message_datum(&message);
}

static Datum
array_datum(const SubscriptionRow *row, Datum *elements, int n)
{
	return PointerGetDatum(construct_array(elements, n, row->message_type, -1, false, TYPALIGN_DOUBLE));
}

static void
enable_timers(void)
{
	enable_timeout_after(handler_timer, time_allowed);
	enable_timeout_after(grace_timer, time_allowed + GRACE_MS);
}

static void
start_timer(const SubscriptionRow *row)
{
	timed_out = false;
	time_allowed = row->handler_timeout;
	worker_allow_cancel(true);
	enable_timers();
}

static void
stop_timer(void)
{
	disable_timeout(handler_timer, false);
	disable_timeout(grace_timer, false);
	time_allowed = 0;
	worker_allow_cancel(false);
}

void
handler_more_time(void)
{
	CHECK_FOR_INTERRUPTS();
	if (time_allowed == 0)
		return;
	disable_timeout(handler_timer, false);
	disable_timeout(grace_timer, false);
	enable_timers();
}

static void
call(const SubscriptionRow *row, Datum argument)
{
	LOCAL_FCINFO(fcinfo, 1);
	int			settings = NewGUCNestLevel();

	InitFunctionCallInfoData(*fcinfo, &handler_function, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = argument;
	fcinfo->args[0].isnull = false;
	SetCurrentStatementStartTimestamp();
	PushActiveSnapshot(GetTransactionSnapshot());
	start_timer(row);
	(void) FunctionCallInvoke(fcinfo);
	stop_timer();
	PopActiveSnapshot();
	CommandCounterIncrement();
	AtEOXact_GUC(false, settings);
}

/* What was made for the call goes before the next one, and at the end. */
static void
forget_call(void)
{
	MemoryContextReset(call_context);
	MemoryContextReset(value_context);
}

static void
call_on(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(call_context);
	Datum	   *messages;

	forget_call();
	messages = palloc(n * sizeof(Datum));
	for (int i = 0; i < n; i++)
		messages[i] = delivery_datum(row, deliveries[i]);
	call(row, row->batch ? array_datum(row, messages, n) : messages[0]);
	via_set(NULL);
	MemoryContextSwitchTo(oldcontext);
}

/* ---- errors ---- */

/* Takes the error that was caught and leaves none behind; in the context. */
static char *
take_error(MemoryContext context, const SubscriptionRow *row, char *sqlstate)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	ErrorData  *edata = CopyErrorData();
	StringInfoData text;
	bool		late = timed_out && edata->sqlerrcode == ERRCODE_QUERY_CANCELED;

	FlushErrorState();
	stop_timer();
	strlcpy(sqlstate, unpack_sql_state(edata->sqlerrcode), 6);
	initStringInfo(&text);
	if (late)
		appendStringInfo(&text, "the handler did not end within its timeout of %d ms", row->handler_timeout);
	else
		appendStringInfoString(&text, edata->message ? edata->message : "missing error text");
	if (edata->detail != NULL)
		appendStringInfo(&text, "\nDETAIL:  %s", edata->detail);
	if (edata->context != NULL)
		appendStringInfo(&text, "\nCONTEXT:  %s", edata->context);
	if (text.len > MAX_ERROR)
		text.		data[pg_mbcliplen(text.data, text.len, MAX_ERROR)] = '\0';

	timed_out = false;
	FreeErrorData(edata);
	MemoryContextSwitchTo(oldcontext);
	return text.data;
}

static void
set_error(const SubscriptionRow *row, Delivery *delivery)
{
	if (delivery->error != NULL)
		pfree(delivery->error);
	delivery->error = NULL;
	delivery->error = take_error(GetMemoryChunkContext(delivery), row, delivery->sqlstate);
}

void
handler_schedule(const SubscriptionRow *row, Delivery *delivery)
{
	int64		delay = row->retry_delay;
	MonoTime	now = mono_now();

	for (int i = 1; i < delivery->attempts && delay < row->max_retry_delay; i++)
		delay *= 2;
	delay = Min(delay, row->max_retry_delay);
	/* jitter only ever adds */
	delivery->due = mono_plus(now, delay + now % (delay / 4 + 1));
}

/* ---- deliveries ---- */

static bool
overlaps(const OrderItem *a, const OrderItem *b)
{
	if (a->barrier || b->barrier)
		return true;
	for (int i = 0; i < a->nkeys; i++)
	{
		for (int j = 0; j < b->nkeys; j++)
		{
			if (a->keys[i] == b->keys[j])
				return true;
		}
	}
	return false;
}

/* Is it behind one of the first that failed, or that is behind one? */
static bool
is_blocked(Delivery **deliveries, int index)
{
	for (int i = 0; i < index; i++)
	{
		if ((deliveries[i]->outcome == OUTCOME_FAILED || deliveries[i]->outcome == OUTCOME_BLOCKED) &&
			overlaps(&deliveries[i]->order, &deliveries[index]->order))
			return true;
	}
	return false;
}

/* After the error was taken, in the transaction that goes on. */
static void
record_failure(const SubscriptionRow *row, Delivery *delivery)
{
	delivery->attempts++;
	if (delivery->attempts >= row->max_attempts)
	{
		inbox_bury(row, delivery);
		delivery->outcome = OUTCOME_DEAD;
		return;
	}
	handler_schedule(row, delivery);
	inbox_record_failure(row->subscription_id, delivery);
	delivery->known = true;
	delivery->outcome = OUTCOME_FAILED;
}

static void
apply_in_savepoint(const SubscriptionRow *row, Delivery *delivery)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	volatile bool failed = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcontext);
	PG_TRY();
	{
		call_on(row, &delivery, 1);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		set_error(row, delivery);
		RollbackAndReleaseCurrentSubTransaction();
		failed = true;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcontext);
	CurrentResourceOwner = oldowner;

	if (failed)
		record_failure(row, delivery);
	else
		delivery->outcome = OUTCOME_APPLIED;
}

static void
apply_each(const SubscriptionRow *row, Delivery **deliveries, int n, HandlerMode mode)
{
	for (int i = 0; i < n; i++)
	{
		Delivery   *delivery = deliveries[i];

		if (delivery->outcome != OUTCOME_NONE)
			continue;
		if (mode == HANDLER_TOGETHER)
		{
			call_on(row, &delivery, 1);
			delivery->outcome = OUTCOME_APPLIED;
		}
		else if (is_blocked(deliveries, i))
			delivery->outcome = OUTCOME_BLOCKED;
		else
			apply_in_savepoint(row, delivery);
	}
}

static void
apply_at_once(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	Delivery  **chosen = palloc((n + 1) * sizeof(Delivery *));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (deliveries[i]->outcome == OUTCOME_NONE)
			chosen[count++] = deliveries[i];
	}
	if (count > 0)
		call_on(row, chosen, count);
	for (int i = 0; i < count; i++)
		chosen[i]->outcome = OUTCOME_APPLIED;
}

/*
 * What handlers have left for the commit is theirs, too: it gets as much time
 * as a call, and what it sets ends with it.  A cursor WITH HOLD would be run to
 * its end there, however long that takes.
 */
static void
finish_handlers(const SubscriptionRow *row)
{
	int			settings = NewGUCNestLevel();

	start_timer(row);
	AfterTriggerFireDeferred();
	stop_timer();
	PortalHashTableDeleteAll();
	AtEOXact_GUC(false, settings);
}

/* Advisory locks of the session would be there for ever. */
static void
release_locks(void)
{
	LockReleaseAll(USER_LOCKMETHOD, true);
}

static void
commit(const SubscriptionRow *row)
{
	finish_handlers(row);
	worker_commit();
	/* whatever synchronous_commit was at that moment */
	XLogFlush(XactLastCommitEnd);
	release_locks();
}

static HandlerResult
apply(SubscriptionRow *row, Delivery **deliveries, int n, HandlerMode mode)
{
	HandlerResult result = prepare(row);

	if (result != HANDLER_COMMITTED)
	{
		worker_abort();
		return result;
	}
	inbox_look_up(row->subscription_id, deliveries, n);
	if (row->batch && mode == HANDLER_TOGETHER)
		apply_at_once(row, deliveries, n);
	else
		apply_each(row, deliveries, n, mode);
	inbox_record(row->subscription_id, deliveries, n);
	commit(row);
	return HANDLER_COMMITTED;
}

/* With savepoints, failures were counted that are not recorded now. */
static void
undo_outcomes(Delivery **deliveries, int n, HandlerMode mode)
{
	for (int i = 0; i < n; i++)
	{
		bool		counted = (deliveries[i]->outcome == OUTCOME_FAILED ||
							   deliveries[i]->outcome == OUTCOME_DEAD);

		if (mode == HANDLER_SAVEPOINTS && counted)
		{
			deliveries[i]->attempts--;
			deliveries[i]->known = (deliveries[i]->attempts > 0);
		}
		deliveries[i]->outcome = OUTCOME_NONE;
	}
}

HandlerResult
handler_apply(SubscriptionRow *row, Delivery **deliveries, int n, HandlerMode mode)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	volatile HandlerResult result = HANDLER_ERROR;

	worker_begin();
	running = true;
	PG_TRY();
	{
		result = apply(row, deliveries, n, mode);
	}
	PG_CATCH();
	{
		set_error(row, deliveries[0]);
		worker_abort();
		release_locks();
	}
	PG_END_TRY();
	running = false;
	MemoryContextSwitchTo(oldcontext);
	forget_call();
	if (result != HANDLER_COMMITTED)
		undo_outcomes(deliveries, n, mode);
	return result;
}

/* ---- dead letters ---- */

static HandlerResult
redrive(SubscriptionRow *row, Redriven *redriven)
{
	HandlerResult result = prepare(row);

	if (result != HANDLER_COMMITTED)
	{
		worker_abort();
		return result;
	}
	if (inbox_remove_redriven(redriven->dead_id))
	{
		Datum		message = message_datum(&redriven->message);

		note_via(&redriven->message);
		call(row, row->batch ? array_datum(row, &message, 1) : message);
		via_set(NULL);
	}
	commit(row);
	return HANDLER_COMMITTED;
}

HandlerResult
handler_redrive(SubscriptionRow *row, Redriven *redriven, char *sqlstate, char **error)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	volatile HandlerResult result = HANDLER_ERROR;

	worker_begin();
	running = true;
	PG_TRY();
	{
		result = redrive(row, redriven);
	}
	PG_CATCH();
	{
		*error = take_error(oldcontext, row, sqlstate);
		worker_abort();
		release_locks();
	}
	PG_END_TRY();
	running = false;
	MemoryContextSwitchTo(oldcontext);
	return result;
}
