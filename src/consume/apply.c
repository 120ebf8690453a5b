/*-------------------------------------------------------------------------
 *
 * apply.c
 *		From messages to one transaction.
 *
 * The transaction: the extension is locked, the subscription still there, the
 * ids looked up in the inbox and the waiting room, the handler called for those
 * that are in neither and need not wait; then inbox, waiting room and dead letters
 * are written, what handlers have deferred is run, and all of it is committed
 * and flushed, whatever the handler has done to synchronous_commit.  Only then may
 * anything be acked.
 *
 * It ends after batch->limit_ms at the latest, and one call: what was not reached keeps
 * the outcome NONE, and its turn is next.
 *
 *		                .--------- no error ---------> COMMITTED
 *		  TOGETHER -----+
 *		                '- error -> GROUPS - no error, or errors of messages -> COMMITTED
 *		                             ^ |
 *		       careful, or one ------' '-- error at the end -> UNDONE
 *
 *		TOGETHER	no savepoints: the first error undoes all
 *		GROUPS		a savepoint for GROUP calls: an error undoes these, and all but
 *					the one that failed are made again
 *
 * A handler that takes arrays is called once for all messages in TOGETHER, or once for
 * each run of messages that have come the same way (via.c).  In GROUPS, an array that
 * fails is cut in halves until the message that fails is alone.
 *
 * A message that met a conflict, or ran out of resources, is only blamed for that
 * if it was the first in its transaction; after others, which hold locks, the
 * transaction ends before it.
 *
 * Messages that wait for others to come first (wait_for) are tried again behind them, the
 * last one first, as long as any of them succeeds: rows of a tree may come, or go, in an
 * order in which only their statement could write them.
 *
 * After a process that ended while a handler ran, messages of the waiting room are
 * tried singly, each in two transactions: the attempt is recorded first, so that it
 * counts even if the process ends.
 *
 * Must never: ack, or be called while the broker is waited for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "consume/apply.h"
#include "consume/handler.h"
#include "consume/inbox.h"
#include "consume/order.h"
#include "consume/stream.h"
#include "consume/waiting.h"
#include "server/worker.h"

/* So many calls have one savepoint. */
#define GROUP 8

/* An array that is called with savepoints is this part of the batch. */
#define ARRAY_PARTS 8

typedef enum ApplyMode
{
	MODE_TOGETHER,
	MODE_GROUPS,
	MODE_AGAIN,					/* take that again, and call */
	MODE_GIVE_UP,				/* take that again, and write its failure */
} ApplyMode;

static Order order;				/* what waits, in the transaction that runs */
static Order ahead;				/* in choose_waiting() */
static MonoTime deadline;		/* of the batch */
static int64 recorded;			/* message whose attempt was recorded; 0: none */
static pg_uuid_t late;			/* message whose call did not end in time */
static bool have_late = false;
static Failure late_failure;	/* its own */
static int64 singly;			/* message of the waiting room that is tried
								 * alone; 0: none */
static bool lost;				/* the handler was, in the middle */
static bool ending;				/* an error is to be the last of the
								 * transaction */

static bool apply_group(SubscriptionRow *row, Batch *batch, Delivery **deliveries, int n);

static void
add(Order *waiting, const Delivery *delivery)
{
	if (!order_add(waiting, &delivery->order))
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
}

static bool
over_time(const Batch *batch)
{
	return batch->tries > 0 && mono_now() >= deadline;
}

/* Lets a message wait if it must.  True if it need not, and has no outcome yet. */
static bool
may_run(Delivery *delivery)
{
	if (delivery->outcome != OUTCOME_NONE)
		return false;
	if (!order_blocks(&order, &delivery->order))
		return true;
	delivery->outcome = OUTCOME_BEHIND;
	add(&order, delivery);
	return false;
}

/* ---- calls ---- */

/* The time of a call; less than all of it only if the message can get that later. */
static int
call_time(const SubscriptionRow *row, const Batch *batch, const Delivery *delivery)
{
	if (delivery->attempts + delivery->postponed > 0 || batch->patience_ms == 0)
		return row->handler_timeout;
	return Min(row->handler_timeout, batch->patience_ms);
}

static void
note_failure(const SubscriptionRow *row, Batch *batch, Delivery *delivery)
{
	if (batch->probe)
		batch->failure.class = FAILURE_OUTER;
	batch->failed = true;
	failure_note(&batch->failure, row, delivery);
}

/* Sets the outcome of a message that the handler was called with; index: in the call. */
static void
set_outcome(const SubscriptionRow *row, Batch *batch, Delivery *delivery, int index)
{
	delivery->outcome = OUTCOME_APPLIED;
	if (!handler_left_rest(index, &batch->failure))
		return;
	note_failure(row, batch, delivery);
	if (delivery->outcome == OUTCOME_FAILED)
		add(&order, delivery);
}

static void
call(const SubscriptionRow *row, Batch *batch, Delivery **deliveries, int n)
{
	MonoTime	before = mono_now();

	batch->tries++;
	handler_call(row, deliveries, n, call_time(row, batch, deliveries[0]), batch->applied > 0);
	batch->slowest_ms = Max(batch->slowest_ms, (int) ((mono_now() - before) / 1000));
	batch->applied += n;
	for (int i = 0; i < n; i++)
		set_outcome(row, batch, deliveries[i], i);
}

/*
 * Calls with a savepoint: the handler once for all of the deliveries if it takes an
 * array, or for the only one whatever it waits for, if alone; else once for each that may
 * run, in order.  On an error all of that is
 * undone; the error is in batch->failure, and the result is how many were done
 * before it.  -1: no error.
 */
static int
call_in_savepoint(SubscriptionRow *row, Batch *batch, Delivery **deliveries, int n, bool alone)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	int			applied = batch->applied;
	volatile int done = 0;
	volatile bool ok = true;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcontext);
	PG_TRY();
	{
		if (row->batch || alone)
			call(row, batch, deliveries, n);
		for (; !row->batch && !alone && done < n && !over_time(batch); done++)
		{
			if (may_run(deliveries[done]))
				call(row, batch, &deliveries[done], 1);
		}
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(oldcontext);
		handler_failed(&batch->failure, row);
		RollbackAndReleaseCurrentSubTransaction();
		batch->applied = applied;
		ok = false;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcontext);
	CurrentResourceOwner = oldowner;
	return ok ? -1 : done;
}

/*
 * Decides what an error, caught after a savepoint, means.  Returns false if the
 * transaction is to end here.
 */
static bool
message_failed(SubscriptionRow *row, Batch *batch, Delivery *delivery)
{
	Failure    *failure = &batch->failure;
	bool		conflict = failure->class == FAILURE_CONFLICT || failure->class == FAILURE_OUTER;

	lost = handler_lost(row);
	ending = lost || conflict || failure->late;
	if (lost || (conflict && batch->applied > 0))
		return false;
	if (failure->late && call_time(row, batch, delivery) < row->handler_timeout)
		failure->class = FAILURE_CONFLICT;
	note_failure(row, batch, delivery);
	if (delivery->outcome == OUTCOME_FAILED)
		add(&order, delivery);
	return !ending;
}

/* ---- one call for each message ---- */

static bool
is_late(const Delivery *delivery)
{
	return have_late && memcmp(&late, &delivery->message_id, UUID_LEN) == 0;
}

/* Those before one that failed were undone with it. */
static void
reset_applied(Delivery **deliveries, int n)
{
	for (int i = 0; i < n; i++)
	{
		if (deliveries[i]->outcome == OUTCOME_APPLIED)
			deliveries[i]->outcome = OUTCOME_NONE;
	}
}

/*
 * Applies those before one that failed once more.  They were done within the batch's time
 * and have as much of it again: without them the one that failed must not get its outcome,
 * since one of them may be of its key.  Returns false if the transaction is to end.
 */
static bool
apply_before(SubscriptionRow *row, Batch *batch, Delivery **deliveries, int n)
{
	MonoTime	end = deadline;
	bool		result;

	deadline = mono_later(batch->limit_ms);
	result = apply_group(row, batch, deliveries, n);
	deadline = end;
	for (int i = 0; i < n; i++)
		result = result && deliveries[i]->outcome != OUTCOME_NONE;
	return result;
}

/*
 * Applies messages with one savepoint, and again without the one that failed.
 * Returns false if the transaction is to end.
 */
static bool
apply_group(SubscriptionRow *row, Batch *batch, Delivery **deliveries, int n)
{
	while (n > 0)
	{
		int			done = call_in_savepoint(row, batch, deliveries, n, false);
		Failure		failure = batch->failure;

		if (done < 0)
			return true;
		reset_applied(deliveries, done);
		if (!apply_before(row, batch, deliveries, done))
			return false;
		batch->failure = failure;
		if (!message_failed(row, batch, deliveries[done]))
			return false;
		deliveries += done + 1;
		n -= done + 1;
	}
	return true;
}

/* One that did not end in time before all was undone need not prove that again. */
static bool
apply_late(SubscriptionRow *row, Batch *batch, Delivery *delivery)
{
	if (!may_run(delivery))
		return true;
	have_late = false;
	batch->tries++;
	batch->failure = late_failure;
	return message_failed(row, batch, delivery);
}

static void
apply_in_groups(SubscriptionRow *row, Batch *batch)
{
	int			n;

	for (int i = 0; i < batch->n && !over_time(batch); i += n)
	{
		if (is_late(batch->deliveries[i]))
		{
			n = 1;
			if (!apply_late(row, batch, batch->deliveries[i]))
				return;
			continue;
		}
		for (n = 1; n < GROUP && i + n < batch->n && !is_late(batch->deliveries[i + n]); n++)
			;
		if (!apply_group(row, batch, batch->deliveries + i, n))
			return;
	}
}

static void
apply_one_by_one(SubscriptionRow *row, Batch *batch)
{
	for (int i = 0; i < batch->n && !over_time(batch); i++)
	{
		Delivery   *delivery = batch->deliveries[i];

		if (!may_run(delivery))
			continue;
		late = delivery->message_id;
		call(row, batch, &delivery, 1);
	}
}

/* ---- arrays ---- */

static int
choose_runnable(Delivery **deliveries, int n, Delivery **chosen)
{
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (may_run(deliveries[i]))
			chosen[count++] = deliveries[i];
	}
	return count;
}

/*
 * How many can be in one array, from the first on: those that have come the same way,
 * which is then that of all that is written meanwhile.  sync_table() tells them apart.
 */
static int
count_same_way(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	int			same = 1;

	if (OidIsValid(row->sync_target))
		return n;
	while (same < n && deliveries[same]->way == deliveries[0]->way)
		same++;
	return Min(same, n);
}

/* Returns false if the transaction is to end. */
static bool
apply_array(SubscriptionRow *row, Batch *batch, Delivery **deliveries, int n)
{
	Delivery  **chosen = palloc((n + 1) * sizeof(Delivery *));
	int			count = choose_runnable(deliveries, n, chosen);
	int			same = count_same_way(row, chosen, count);

	if (same < count)
	{
		if (!apply_array(row, batch, chosen, same))
			return false;
		return !over_time(batch) && apply_array(row, batch, chosen + same, count - same);
	}
	if (count == 0 || call_in_savepoint(row, batch, chosen, count, false) < 0)
		return true;
	if (count == 1)
		return message_failed(row, batch, chosen[0]);
	if (!apply_array(row, batch, chosen, count / 2))
		return false;
	return !over_time(batch) && apply_array(row, batch, chosen + count / 2, count - count / 2);
}

static void
apply_arrays(SubscriptionRow *row, Batch *batch, ApplyMode mode)
{
	int			part = Max(1, batch->n / ARRAY_PARTS);
	Delivery  **chosen;
	int			n;

	if (mode != MODE_TOGETHER)
	{
		for (int i = 0; i < batch->n && !over_time(batch); i += part)
		{
			if (!apply_array(row, batch, batch->deliveries + i, Min(part, batch->n - i)))
				return;
		}
		return;
	}
	chosen = palloc((batch->n + 1) * sizeof(Delivery *));
	n = choose_runnable(batch->deliveries, batch->n, chosen);
	for (int done = 0, same; done < n && !over_time(batch); done += same)
	{
		same = count_same_way(row, chosen + done, n - done);
		call(row, batch, chosen + done, same);
	}
}

/* ---- what waits for others of the batch ---- */

/* Tries a message that waits again.  Returns false if the transaction is to end. */
static bool
apply_again(SubscriptionRow *row, Batch *batch, Delivery **delivery)
{
	Delivery	noted = **delivery;

	failure_forget(*delivery);
	if (call_in_savepoint(row, batch, delivery, 1, true) < 0 || message_failed(row, batch, *delivery))
		return true;
	/* behind it are others of its key by now */
	if ((*delivery)->outcome == OUTCOME_NONE)
		**delivery = noted;
	return false;
}

/*
 * Chooses those that wait for others, and are the first of their keys that do: one that was
 * called behind another that failed only when that was called again is not.
 */
static int
choose_waiting(const SubscriptionRow *row, const Batch *batch, Delivery **chosen)
{
	int			n = 0;

	order_clear(&ahead);
	for (int i = 0; i < batch->n; i++)
	{
		Delivery   *delivery = batch->deliveries[i];

		if (delivery->outcome != OUTCOME_FAILED && delivery->outcome != OUTCOME_BEHIND)
			continue;
		if (failure_waits(row, delivery) && !order_blocks(&ahead, &delivery->order))
			chosen[n++] = delivery;
		add(&ahead, delivery);
	}
	return n;
}

/*
 * Tries those that wait again, as long as any of them succeeds.  Where the calls before took
 * all of the batch's time, half of it again is for that: else the same calls would take
 * all of it each time, and of many that wait one for the other only one would succeed.
 */
static void
apply_waiting(SubscriptionRow *row, Batch *batch)
{
	bool		progress = batch->failed && batch->applied > 0 && !lost && !ending;
	Delivery  **chosen = progress ? palloc(batch->n * sizeof(Delivery *)) : NULL;

	if (progress && over_time(batch))
		deadline = mono_later(batch->limit_ms / 2);
	while (progress)
	{
		progress = false;
		for (int i = choose_waiting(row, batch, chosen) - 1; i >= 0 && !over_time(batch); i--)
		{
			if (!apply_again(row, batch, &chosen[i]))
				return;
			progress = progress || chosen[i]->outcome == OUTCOME_APPLIED;
		}
	}
}

/* ---- the transaction ---- */

static void
take_recorded(const SubscriptionRow *row, Batch *batch, MemoryContext context)
{
	batch->deliveries[0] = waiting_take_again(row, recorded, context);
	batch->n = batch->deliveries[0] != NULL ? 1 : 0;
	if (batch->n == 1)
		batch->deliveries[0]->begun = true;
}

/* Takes those whose time has not come for due: a probe may be of any message. */
static void
take_early(Batch *batch)
{
	for (int i = 0; i < batch->n; i++)
	{
		if (batch->deliveries[i]->outcome == OUTCOME_EARLY)
			batch->deliveries[i]->outcome = OUTCOME_NONE;
	}
}

/*
 * Gets the messages, and what they must wait for.  What the waiting room gives
 * was chosen so that it waits for nothing.
 */
static void
get_messages(const SubscriptionRow *row, Batch *batch, ApplyMode mode, MemoryContext context)
{
	order_clear(&order);
	waiting_look(row);
	if (!batch->from_room)
	{
		/* skip() moves a message from the one to the other */
		waiting_filter(row, batch->deliveries, batch->n, &order);
		inbox_look_up(row->inbox_id, batch->deliveries, batch->n);
		if (batch->probe || batch->store)
			take_early(batch);
	}
	else if (mode == MODE_AGAIN || mode == MODE_GIVE_UP)
		take_recorded(row, batch, context);
	else
	{
		batch->n = waiting_take(row, batch->limit, batch->memory, batch->singly || batch->probe, context, batch->deliveries);
		singly = (batch->n == 1) ? batch->deliveries[0]->waiting_id : 0;
	}
}

/*
 * Gives up messages whose attempts are used up: the process ended in the last one,
 * or there may be fewer than before.
 */
static void
give_up_exhausted(const SubscriptionRow *row, Batch *batch)
{
	for (int i = 0; i < batch->n; i++)
	{
		if (batch->deliveries[i]->attempts >= row->max_attempts)
			batch->deliveries[i]->outcome = OUTCOME_DEAD;
	}
}

/* Records the attempt of a message whose turn comes in the next transaction. */
static void
record_attempt(const SubscriptionRow *row, const Batch *batch)
{
	if (!batch->singly || batch->probe || batch->n == 0 || batch->deliveries[0]->outcome == OUTCOME_DEAD)
		return;
	recorded = batch->deliveries[0]->waiting_id;
	waiting_begin_attempt(row, recorded, batch->deliveries[0]->attempts + 1);
}

/* Did any of them fail before? */
static bool
any_failed(const Batch *batch)
{
	for (int i = 0; i < batch->n; i++)
	{
		if (batch->deliveries[i]->attempts + batch->deliveries[i]->postponed > 0)
			return true;
	}
	return false;
}

static void
call_handlers(SubscriptionRow *row, Batch *batch, ApplyMode mode)
{
	if (mode == MODE_GIVE_UP && batch->n == 1)
		note_failure(row, batch, batch->deliveries[0]);
	else if (row->batch)
		apply_arrays(row, batch, mode);
	else if (mode == MODE_TOGETHER)
		apply_one_by_one(row, batch);
	else
		apply_in_groups(row, batch);
	apply_waiting(row, batch);
}

static void
write_outcomes(const SubscriptionRow *row, Batch *batch)
{
	for (int i = 0; i < batch->n; i++)
	{
		if (batch->deliveries[i]->outcome == OUTCOME_DEAD)
			dead_letter_store(row, batch->deliveries[i]);
	}
	inbox_record(row->inbox_id, batch->deliveries, batch->n);
	if (row->start_kind != STREAM_NONE && !batch->from_room)
		stream_record(row, batch->deliveries, batch->n);
	if (batch->from_room)
		waiting_settle(row, batch->deliveries, batch->n);
	else if (row->requeue && !batch->store)
		waiting_requeue(row, batch->deliveries, batch->n);
	else
		waiting_store(row, batch->deliveries, batch->n);
}

/* The caller acks what was committed, and then has SIGTERM end what waits for the broker. */
static void
commit(void)
{
	worker_keep_socket(true);
	worker_commit();
	/* whatever synchronous_commit was at that moment */
	XLogFlush(XactLastCommitEnd);
}

static ApplyResult
undo(HandlerState state)
{
	worker_abort();
	waiting_room.stale = true;
	return state == HANDLER_ENDED ? APPLY_ENDED : APPLY_UNUSABLE;
}

static ApplyResult
transaction(SubscriptionRow *row, Batch *batch, ApplyMode mode, MemoryContext context)
{
	HandlerState state = handler_prepare(row);

	if (state != HANDLER_READY)
		return undo(state);
	get_messages(row, batch, mode, context);
	if (mode == MODE_TOGETHER && (batch->n == 1 || any_failed(batch)))
		mode = MODE_GROUPS;
	if (batch->from_room && mode != MODE_AGAIN && mode != MODE_GIVE_UP)
	{
		give_up_exhausted(row, batch);
		record_attempt(row, batch);
	}
	if (recorded == 0 || mode == MODE_AGAIN || mode == MODE_GIVE_UP)
	{
		call_handlers(row, batch, mode);
		if (lost)
			return undo(HANDLER_UNUSABLE);
		write_outcomes(row, batch);
		handler_finish(row);
	}
	commit();
	return APPLY_COMMITTED;
}

/* As they were before the transaction that was undone. */
static void
reset_outcomes(Batch *batch)
{
	for (int i = 0; i < batch->n && !batch->from_room; i++)
	{
		Delivery   *delivery = batch->deliveries[i];

		delivery->outcome = OUTCOME_NONE;
		delivery->attempts = delivery->postponed = 0;
		delivery->waiting_id = 0;
		delivery->waits_since = delivery->next_try = 0;
	}
	if (batch->from_room)
		batch->n = 0;
}

static void
begin_batch(Batch *batch)
{
	batch->tries = batch->applied = batch->slowest_ms = 0;
	batch->failed = lost = ending = false;
	batch->began = mono_now();
	deadline = mono_plus(batch->began, batch->limit_ms);
}

/* Runs one transaction.  What it takes from the room is in the current context. */
static ApplyResult
run(SubscriptionRow *row, Batch *batch, ApplyMode mode)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	volatile ApplyResult result = APPLY_UNDONE;

	begin_batch(batch);
	handler_begin();
	PG_TRY();
	{
		result = transaction(row, batch, mode, oldcontext);
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(oldcontext);
		handler_failed(&batch->failure, row);
		worker_abort();
		waiting_room.stale = true;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcontext);
	handler_end();
	if (result != APPLY_COMMITTED)
		reset_outcomes(batch);
	return result;
}

/* ---- deliveries ---- */

/*
 * The attempt of a single message was undone at its end: writes that.  One that was applied
 * or stored before, or waits, had none; it is our own statements that failed.
 */
static ApplyResult
write_failure(SubscriptionRow *row, Batch *batch)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	ApplyResult result;
	HandlerState state;

	worker_begin();
	state = handler_prepare(row);
	if (state == HANDLER_READY)
	{
		get_messages(row, batch, MODE_TOGETHER, oldcontext);
		if (may_run(batch->deliveries[0]))
			note_failure(row, batch, batch->deliveries[0]);
		write_outcomes(row, batch);
		commit();
		result = APPLY_COMMITTED;
	}
	else
		result = undo(state);
	MemoryContextSwitchTo(oldcontext);
	return result;
}

/* All was undone: was that because one did not end in time? */
static void
note_late(const SubscriptionRow *row, const Batch *batch)
{
	have_late = batch->failure.late && !row->batch;
	late_failure = batch->failure;
}

/*
 * Applies deliveries of the broker's.  If the result is COMMITTED, those with an
 * outcome can be acked.  If it is UNDONE, there are several, and they should be
 * applied in batches of one.
 */
ApplyResult
apply_batch(SubscriptionRow *row, Batch *batch)
{
	bool		careful = batch->careful || batch->n == 1;
	ApplyResult result = run(row, batch, careful ? MODE_GROUPS : MODE_TOGETHER);

	have_late = false;
	if (result == APPLY_UNDONE && !careful)
	{
		note_late(row, batch);
		batch->careful = true;
		result = run(row, batch, MODE_GROUPS);
	}
	if (result == APPLY_UNDONE && batch->n == 1)
		result = write_failure(row, batch);
	have_late = false;
	return result;
}

/* ---- the waiting room ---- */

/* The second transaction of a message that is tried alone, and a third if need be. */
static ApplyResult
apply_recorded(SubscriptionRow *row, Batch *batch)
{
	ApplyResult result = run(row, batch, MODE_AGAIN);

	if (result == APPLY_UNDONE)
		result = run(row, batch, MODE_GIVE_UP);
	recorded = 0;
	return result;
}

/* Puts off a message of which not even the failure can be written, so that others have their turn. */
static void
put_off(const SubscriptionRow *row, const Failure *failure)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	worker_begin();
	waiting_put_off(row, singly, failure);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Applies messages of the waiting room that are due: batch->deliveries has room
 * for batch->limit, and gets them.  UNDONE: they should be taken singly.
 */
ApplyResult
apply_due(SubscriptionRow *row, Batch *batch)
{
	ApplyResult result;

	recorded = singly = 0;
	result = run(row, batch, batch->careful || batch->singly ? MODE_GROUPS : MODE_TOGETHER);
	if (result != APPLY_COMMITTED)
		recorded = 0;
	if (result == APPLY_UNDONE && !batch->careful && !batch->singly)
	{
		note_late(row, batch);
		batch->careful = true;
		result = run(row, batch, MODE_GROUPS);
		have_late = false;
	}
	if (result == APPLY_COMMITTED && recorded != 0)
		result = apply_recorded(row, batch);
	if (result == APPLY_UNDONE && singly != 0 && (batch->singly || batch->probe))
		put_off(row, &batch->failure);
	return result;
}

/*
 * Stores deliveries in the waiting room, in order, without calling the handler.
 * Those that were stored or applied before are only marked as SEEN.  An error
 * ends the process.
 */
ApplyResult
apply_store(SubscriptionRow *row, Batch *batch)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	HandlerState state;
	ApplyResult result = APPLY_COMMITTED;

	worker_begin();
	batch->store = true;
	state = handler_prepare(row);
	if (state == HANDLER_READY)
	{
		get_messages(row, batch, MODE_TOGETHER, oldcontext);
		for (int i = 0; i < batch->n; i++)
		{
			if (batch->deliveries[i]->outcome == OUTCOME_NONE)
				batch->deliveries[i]->outcome = OUTCOME_BEHIND;
		}
		write_outcomes(row, batch);
		commit();
	}
	else
		result = undo(state);
	MemoryContextSwitchTo(oldcontext);
	return result;
}

/* ---- dead letters ---- */

static ApplyResult
redrive(SubscriptionRow *row, Redriven *redriven)
{
	HandlerState state = handler_prepare(row);

	if (state != HANDLER_READY)
		return undo(state);
	if (dead_letter_remove(redriven->dead_id))
		handler_call_message(row, &redriven->message);
	handler_finish(row);
	commit();
	return APPLY_COMMITTED;
}

/* Tries a dead letter again, and removes it if that succeeds; UNDONE: failure. */
ApplyResult
apply_redriven(SubscriptionRow *row, Redriven *redriven, Failure *failure)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	volatile ApplyResult result = APPLY_UNDONE;

	handler_begin();
	PG_TRY();
	{
		result = redrive(row, redriven);
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(oldcontext);
		handler_failed(failure, row);
		worker_abort();
		waiting_room.stale = true;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcontext);
	handler_end();
	return result;
}
