/*-------------------------------------------------------------------------
 *
 * handler.c
 *		Calls a subscription's handler.
 *
 * The handler runs as the role of the session, which is the one that
 * subscribed; there are no other rights that it could come back to.  What it
 * sets (SET, SET ROLE, ...) ends with its call.  It cannot commit: it is called
 * as in a query, where the server refuses that.
 *
 * Two timers bound a call, and the deferred triggers at the end of the
 * transaction.  The first sends SIGINT, as pg_cancel_backend() would; both cancel
 * what the handler does, which is an error like any other.  One that catches that
 * ends with its process, GRACE_MS later.
 *
 *		idle --handler_begin()--> in a transaction --call--> timers run
 *		  ^                          |    ^                    |
 *		  '------handler_end()-------'    '--return, or error--'
 *
 * A call waits for a lock as long as it may take, if it is the first one in its
 * transaction.  After others it holds their locks, and somebody may wait for
 * those: then it waits LOCK_WAIT_MS, and is tried again alone.  So handlers of two
 * workers do not deadlock with each other across messages.
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
#include "miscadmin.h"
#include "storage/lock.h"
#include "storage/proc.h"
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

#include "capture/via.h"
#include "consume/handler.h"
#include "server/utf8.h"
#include "server/worker.h"

/*
 * A handler may catch its cancellation, and go on.  When its time is over for
 * so many milliseconds, the process ends; a failed attempt, as any FATAL is.
 */
#define GRACE_MS 2000

/* Of a call, kept for the next one: a thousand messages of 1 kB. */
#define CALL_MEMORY (1024 * 1024)

/* How long a call waits for a lock while its transaction holds those of others. */
#define LOCK_WAIT_MS 5

static TimeoutId handler_timer;
static TimeoutId grace_timer;
static volatile sig_atomic_t timed_out = false;
static int	call_timeout = 0;	/* of the call that runs, in milliseconds; 0:
								 * none does */
static bool running = false;
static bool refresh = true;		/* the subscription has to be read anew */
static Oid	sync_target = InvalidOid;	/* see sync_table(); InvalidOid: none */
static FmgrInfo handler_function;
static TupleDesc message_desc;
static MemoryContext call_context;	/* what the handler is given, and leaves */
static MemoryContext value_context; /* while one message is made */
static const SubscriptionRow *called = NULL;	/* whose handler runs, if it
												 * may do a message in part */
static List *rests = NIL;		/* of Rest, of the latest call; in
								 * call_context */
static char *latest_via = NULL; /* of the latest delivery, see via.h; in
								 * TopMemoryContext */
static uint64 latest_way = 0;	/* that delivery's way, of which the text is
								 * latest_via */

/* Says why the handler of the latest call did only a part of a message. */
typedef struct Rest
{
	int			index;			/* of the message, in the call's array */
	Failure		failure;		/* why */
} Rest;

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

/* Prepares everything; called once, before any other function. */
void
handler_init(void)
{
	static const int caches[] = {PROCOID, NAMESPACEOID, AUTHOID, AUTHMEMMEMROLE, DATABASEOID, RELOID};

	for (int i = 0; i < lengthof(caches); i++)
		CacheRegisterSyscacheCallback(caches[i], something_changed, (Datum) 0);
	CacheRegisterRelcacheCallback(table_changed, (Datum) 0);
	handler_timer = RegisterTimeout(USER_TIMEOUT, handler_late);
	grace_timer = RegisterTimeout(USER_TIMEOUT, handler_deaf);
	call_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout call", 0, CALL_MEMORY, ALLOCSET_DEFAULT_MAXSIZE);
	value_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout message", ALLOCSET_DEFAULT_SIZES);
}

/* Does a transaction run in which handlers are called? */
bool
handler_running(void)
{
	return running;
}

static bool
read_anew(SubscriptionRow *row, int32 subscription_id, MemoryContext context)
{
	bool		found;

	refresh = false;
	found = subscription_load(subscription_id, context, row);
	sync_target = found ? row->sync_target : InvalidOid;
	return found;
}

/*
 * Reads the subscription anew, in a transaction of its own; texts in the context,
 * which is reset.  Returns false, and leaves the row as it is, if the subscription has
 * ended.
 */
bool
handler_refresh(SubscriptionRow *row, int32 subscription_id, MemoryContext context)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		found;

	worker_begin();
	/* deliveries are read outside of transactions */
	utf8_init();
	found = read_anew(row, subscription_id, context);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	return found;
}

/* ---- calling it ---- */

/* sync_table() reads the bytes of a body. */
static void
set_body(const SubscriptionRow *row, MessageValues *message)
{
	if (!OidIsValid(row->sync_target))
		delivery_set_body(message);
}

static Datum
message_datum(MessageValues *message)
{
	return HeapTupleGetDatum(heap_form_tuple(message_desc, message->values, message->nulls));
}

/*
 * Returns the message's way.  Keeps that of the latest delivery, because the next one has
 * mostly come the same.  Stored messages have numbers of their own for their ways
 * (delivery.c), so that theirs are always made anew.
 */
static const char *
via_of(const Delivery *delivery, const MessageValues *message)
{
	char	   *via;

	if (delivery->wire == NULL)
		return delivery_via(message);
	if (delivery->way == latest_way)
		return latest_via;
	via = delivery_via(message);
	if (via != NULL)
		via = MemoryContextStrdup(TopMemoryContext, via);
	if (latest_via != NULL)
		pfree(latest_via);
	latest_via = via;
	latest_way = delivery->way;
	return latest_via;
}

/*
 * Makes a message, in the current memory context; what that took is let go.  The first
 * of a call also says which way has come what is written from now on: all of a call have
 * come the same, but for sync_table(), which says it for each.
 */
static Datum
delivery_datum(const SubscriptionRow *row, const Delivery *delivery, bool first)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(value_context);
	MessageValues message;

	MemoryContextReset(value_context);
	delivery_values(delivery, row->topic, row->consumer_group, &message);
	set_body(row, &message);
	if (first)
		via_begin(via_of(delivery, &message));
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
	enable_timeout_after(handler_timer, call_timeout);
	enable_timeout_after(grace_timer, call_timeout + GRACE_MS);
}

static void
start_timer(int timeout_ms)
{
	timed_out = false;
	call_timeout = timeout_ms;
	worker_allow_cancel(true);
	enable_timers();
}

static void
stop_timer(void)
{
	disable_timeout(handler_timer, false);
	disable_timeout(grace_timer, false);
	call_timeout = 0;
	worker_allow_cancel(false);
}

/*
 * For a handler of ours that has much to do: from now on, the call that runs has its
 * whole time again.  Nothing, if no worker called it.
 */
void
handler_more_time(void)
{
	CHECK_FOR_INTERRUPTS();
	if (call_timeout == 0)
		return;
	disable_timeout(handler_timer, false);
	disable_timeout(grace_timer, false);
	enable_timers();
}

/*
 * Bounds how long the handler waits for a lock; 0: its timeout does.  The variable of
 * lock_timeout is set as it stands, since a SET in each call is a good part of what a
 * call costs.  If the handler itself SETs it, that ends with its call or its savepoint,
 * which leaves what is here; so this is called again before anything else that may wait.
 */
static void
bound_lock_wait(int ms)
{
	LockTimeout = ms;
}

/* Calls the function, in at most timeout_ms; others: calls before it hold locks. */
static void
call(Datum argument, int timeout_ms, bool others)
{
	LOCAL_FCINFO(fcinfo, 1);
	int			settings = NewGUCNestLevel();

	bound_lock_wait(others ? LOCK_WAIT_MS : 0);
	InitFunctionCallInfoData(*fcinfo, &handler_function, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = argument;
	fcinfo->args[0].isnull = false;
	SetCurrentStatementStartTimestamp();
	PushActiveSnapshot(GetTransactionSnapshot());
	start_timer(timeout_ms);
	(void) FunctionCallInvoke(fcinfo);
	stop_timer();
	PopActiveSnapshot();
	CommandCounterIncrement();
	AtEOXact_GUC(false, settings);
	bound_lock_wait(0);
}

/* What was made for the call goes before the next one, and at the end. */
static void
forget_call(void)
{
	MemoryContextReset(call_context);
	MemoryContextReset(value_context);
	rests = NIL;
}

/*
 * handler_leave_rest
 *		For a handler of ours that has done a part of a message: what it did is
 *		committed, and the message is tried again, as one that failed with that error.
 *
 * index: of the message, in the array that the handler was called with.  Where no
 * worker called it, raises the error.
 */
void
handler_leave_rest(int index, ErrorData *edata)
{
	MemoryContext oldcontext;
	Rest	   *rest;

	if (called == NULL)
		ReThrowError(edata);
	oldcontext = MemoryContextSwitchTo(call_context);
	rest = palloc(sizeof(Rest));
	rest->index = index;
	failure_set(&rest->failure, called, edata, false, 0);
	rests = lappend(rests, rest);
	MemoryContextSwitchTo(oldcontext);
}

/* Has the latest call left something of a message?  Then failure says why. */
bool
handler_left_rest(int index, Failure *failure)
{
	ListCell   *cell;

	foreach(cell, rests)
	{
		Rest	   *rest = lfirst(cell);

		if (rest->index != index)
			continue;
		*failure = rest->failure;
		return true;
	}
	return false;
}

/*
 * Calls the handler on one message, or on several of the same way if it takes an
 * array; it has timeout_ms milliseconds.  others: the transaction has called it before.  Raises
 * the handler's errors; see handler_failed().
 */
void
handler_call(const SubscriptionRow *row, Delivery **deliveries, int n, int timeout_ms, bool others)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(call_context);
	Datum	   *messages;

	forget_call();
	messages = palloc(n * sizeof(Datum));
	for (int i = 0; i < n; i++)
		messages[i] = delivery_datum(row, deliveries[i], i == 0);
	called = row;
	call(row->batch ? array_datum(row, messages, n) : messages[0], timeout_ms, others);
	called = NULL;
	via_end();
	MemoryContextSwitchTo(oldcontext);
}

/* Calls the handler on a message that is no delivery.  Raises its errors. */
void
handler_call_message(const SubscriptionRow *row, MessageValues *values)
{
	Datum		message;

	set_body(row, values);
	message = message_datum(values);
	via_begin(delivery_via(values));
	call(row->batch ? array_datum(row, &message, 1) : message, row->handler_timeout, false);
	via_end();
}

/* ---- transactions ---- */

/*
 * Begins a transaction, in which handlers are called; should the process end
 * before handler_end(), a handler may be to blame.
 */
void
handler_begin(void)
{
	worker_begin();
	running = true;
}

/* Ends what handler_begin() began, once the transaction is over. */
void
handler_end(void)
{
	running = false;
	bound_lock_wait(0);
	/* advisory locks of the session would be there for ever */
	LockReleaseAll(USER_LOCKMETHOD, true);
	forget_call();
}

/*
 * Looks whether the handler can be called in this transaction, and prepares it:
 * the subscription is the same, and the handler is what and whose it was.
 */
HandlerState
handler_prepare(SubscriptionRow *row)
{
	if (!subscription_is(row->subscription_id, row->version))
		return HANDLER_ENDED;
	if (refresh && !read_anew(row, row->subscription_id, GetMemoryChunkContext(row->topic)))
		return HANDLER_ENDED;
	if (row->problem != NULL)
		return HANDLER_UNUSABLE;
	fmgr_info_cxt(row->handler, &handler_function, TopTransactionContext);
	message_desc = lookup_rowtype_tupdesc_copy(row->message_type, -1);
	return HANDLER_READY;
}

/*
 * After an error: is the handler, or what it needs, gone by now?  Then the error
 * is not the message's.  That the subscription has ended is no reason for an error, and
 * may be what a handler has done in this very transaction.
 */
bool
handler_lost(SubscriptionRow *row)
{
	AcceptInvalidationMessages();
	return refresh && handler_prepare(row) == HANDLER_UNUSABLE;
}

/*
 * Runs what handlers have left for the commit, which is theirs, too: it gets as
 * much time as a call, and what it sets ends with it.  A cursor WITH HOLD would
 * be run to its end there, however long that takes.
 */
void
handler_finish(const SubscriptionRow *row)
{
	int			settings = NewGUCNestLevel();

	bound_lock_wait(0);
	start_timer(row->handler_timeout);
	via_begin_deferred();
	AfterTriggerFireDeferred();
	via_end();
	stop_timer();
	PortalHashTableDeleteAll();
	AtEOXact_GUC(false, settings);
}

/*
 * Takes the error of a call, or of the commit, and stops its timers.  In a
 * PG_CATCH() block, in a memory context that lasts.
 */
void
handler_failed(Failure *failure, const SubscriptionRow *row)
{
	failure_take(failure, row, timed_out, call_timeout);
	called = NULL;
	stop_timer();
	timed_out = false;
}
