/*-------------------------------------------------------------------------
 *
 * progress.c
 *		What is recorded of topics: how far they have come without the main cursor,
 *		what became of their messages, and that they were refused.
 *
 * Transitions of the state machine in flow.c that are made here:
 *
 *		LEAVING -> DETACHED		nothing is in flight, and its place is recorded
 *		JOINING -> ATTACHED		all that it read by itself is recorded, and the main
 *								cursor's entries are true for it
 *
 * A topic's entries in the ledger come before the main cursor's of the same
 * transaction: one of these must not be true for a topic that has left.
 *
 * All of it runs inside a transaction opened by worker_begin().
 *
 * Must never: wait for a row that a user has locked.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "publish/alert.h"
#include "publish/chunks.h"
#include "publish/flow.h"
#include "publish/ledger.h"
#include "publish/progress.h"
#include "publish/reader.h"
#include "publish/topic.h"
#include "server/query.h"
#include "server/worker.h"

#define LOCKED_AGAIN_MS 500

/* ---- its place ---- */

/* Writes where the topic is into the ledger. */
void
flow_record_position(Flow *flow, bool attached, int64 count)
{
	LedgerEntry entry = {.topic_id = topic_of(flow)->topic_id,.attached = attached};
	const Cursor *cursor = &flow->cursor;
	const Batch *batch = cursor->batch;
	dlist_iter	it;

	entry.last_id = cursor->last_id;
	dlist_foreach(it, &flow->runs)
	{
		Run		   *run = dlist_container(Run, node, it.cur);

		if (run->batch == NULL || run->recorded == run->count)
			continue;
		if (run->chunk == NULL)
		{
			batch = run->batch;
			entry.last_id = run->messages[run->recorded]->id - 1;
		}
		break;
	}
	entry.base = batch ? batch->base : cursor->base;
	entry.target = batch ? batch->target : cursor->base;
	entry.unread = batch ? batch->unread : cursor->unread;
	ledger_record(&entry, count);
	flow->unrecorded = false;
}

/* ---- recording ---- */

static void
bury(const Message *message)
{
	Topic	   *topic = topic_find(message->topic_id);

	reader_bury(message, topic->name);
	ereport(WARNING,
			(errmsg("message %s of topic \"%s\" goes to fanout.dead_letter",
					message->message_id, topic->name),
			 errdetail("%s", message->reason)));
}

/* Records the messages of a run of the outbox that are done; returns how many. */
static int
record_done(Run *run)
{
	int			n = run->done - run->recorded;

	for (; run->recorded < run->done; run->recorded++)
	{
		if (run->messages[run->recorded]->reason != NULL)
			bury(run->messages[run->recorded]);
	}
	return n;
}

/*
 * Records what has become of a run of held messages, of which no more will be sent.
 * Returns false if somebody has locked them.
 */
static bool
record_held(Run *run)
{
	Message   **sent = palloc(run->count * sizeof(Message *));
	Message   **dead = palloc(run->count * sizeof(Message *));
	int			nsent = 0;
	int			ndead = 0;

	for (int i = 0; i < run->count; i++)
	{
		if (run->messages[i]->item.state == WINDOW_ACCEPTED)
			sent[nsent++] = run->messages[i];
		else if (run->messages[i]->item.state == WINDOW_DISCARDED)
			dead[ndead++] = run->messages[i];
	}
	if (!reader_lock_held(sent, &nsent) || !reader_lock_held(dead, &ndead))
		return false;
	reader_release(sent, nsent);
	for (int i = 0; i < ndead; i++)
		bury(dead[i]);
	return true;
}

/*
 * Records how far a topic has come by itself, and frees its runs that are done.  all:
 * what is not done is given up.  Returns false if somebody has locked held messages.
 */
static bool
record_runs(Flow *flow, bool all, int64 *count)
{
	dlist_mutable_iter it;

	dlist_foreach_modify(it, &flow->runs)
	{
		Run		   *run = dlist_container(Run, node, it.cur);
		bool		done = (run->done == run->count);

		if (run->chunk != NULL || !(done || all || run->batch != NULL))
			break;
		if (run->batch != NULL)
			*count += record_done(run);
		else if (!record_held(run))
			return false;
		if (done)
		{
			dlist_delete(&run->node);
			run_free(run);
		}
		else if (!all)
			break;
	}
	return true;
}

static void
remember_accepted(Flow *flow, const Run *run)
{
	for (int i = run->done; i < run->count; i++)
	{
		AcceptedMessage *accepted;

		if (run->messages[i]->item.state != WINDOW_ACCEPTED)
			continue;
		if (flow->accepted == NULL)
		{
			HASHCTL		ctl = {.keysize = sizeof(int64),.entrysize = sizeof(AcceptedMessage),.hcxt = TopMemoryContext};

			flow->accepted = hash_create("pg_fanout accepted messages", 64, &ctl,
										 HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
		}
		accepted = hash_search(flow->accepted, &run->messages[i]->id, HASH_ENTER, NULL);
		accepted->passed = 0;
		flow_add_backlog(flow, -1); /* it will not be done again */
	}
}

/*
 * The topic goes back to the first message of run that is not done; NULL: to nowhere.
 * Accepted messages that were passed over before it are forgotten, and those behind
 * it will be passed over once more: if one was sent again, it would come after later
 * messages of its key.
 */
static void
go_back_accepted(Flow *flow, const Run *run)
{
	HASH_SEQ_STATUS all;
	AcceptedMessage *accepted;

	if (flow->accepted == NULL)
		return;
	hash_seq_init(&all, flow->accepted);
	while ((accepted = hash_seq_search(&all)) != NULL)
	{
		bool		behind = (run != NULL && (accepted->passed > run->reading ||
											  (accepted->passed == run->reading &&
											   accepted->id > run->messages[run->done]->id)));

		if (accepted->passed == 0)
			continue;
		if (behind && run->reading != 0)
			accepted->passed = 0;
		else
			hash_search(flow->accepted, &accepted->id, HASH_REMOVE, NULL);
	}
}

static void
forget_accepted(Flow *flow)
{
	if (flow->accepted != NULL)
		hash_destroy(flow->accepted);
	flow->accepted = NULL;
}

/*
 * Gives up what is in memory, and stands before the first message that is not done.  If
 * there is none, and the main cursor has read further, recount.c finds out whether
 * anything waits.
 */
static void
forget_runs(Flow *flow)
{
	dlist_mutable_iter it;
	const Run  *first = NULL;

	(void) window_abandon(&flow->window);
	dlist_foreach_modify(it, &flow->runs)
	{
		Run		   *run = dlist_container(Run, node, it.cur);

		if (run->batch != NULL && first == NULL)
		{
			first = run;
			cursor_go_back(&flow->cursor, run->batch, run->messages[run->done]->id - 1);
			go_back_accepted(flow, run);
		}
		if (run->batch != NULL)
			remember_accepted(flow, run);
		dlist_delete(&run->node);
		run_free(run);
	}
	if (first == NULL)
		go_back_accepted(flow, NULL);
	cursor_close(&flow->cursor);
	flow->waits = (first != NULL);
	if (flow->recount != NULL || (first == NULL && flow_reads_behind(flow)))
		flow_uncount(flow);
	flow->bytes = 0;
	flow->held_after = 0;
}

/* LEAVING, and nothing is in flight any more. */
static void
record_leaving(Flow *flow)
{
	int64		count = 0;

	bool		all = record_runs(flow, true, &count);

	flow_record_position(flow, false, count);
	if (!all)
	{
		flow->unrecorded = true;
		flow->record_at = mono_later(LOCKED_AGAIN_MS);
		return;
	}
	forget_runs(flow);
	flow_sender->release(flow);
	flow_set_state(flow, FLOW_DETACHED);
}

static void
record_progress(Flow *flow)
{
	int64		count = 0;
	bool		all = record_runs(flow, false, &count);

	flow_record_position(flow, false, count);
	flow->unrecorded = !all;
	flow->record_at = all ? 0 : mono_later(LOCKED_AGAIN_MS);
}

/* Has a JOINING topic no runs any more but those of the main cursor? */
static bool
has_joined(const Flow *flow)
{
	return flow->state == FLOW_JOINING && !flow->stall_changed && !flow->alert && flow_own_run(flow) == NULL;
}

/* Is all recorded that the main cursor read before the topic joined? */
static bool
may_attach(const Flow *flow)
{
	const Chunk *first = chunks_first();

	return has_joined(flow) && (first == NULL || first->number > flow->join_chunk);
}

/*
 * The topic's rows were all sent up to where it joined.  The main cursor's entries
 * have to say so, too, before they count for it.
 */
static void
record_joining(Flow *flow, uint64 *recorded)
{
	if (*recorded < flow->join_number)
	{
		LedgerEntry entry = {.base = flow->cursor.base,.target = flow->cursor.base,.unread = flow->cursor.unread};

		ledger_record(&entry, 0);
		*recorded = flow->join_number;
	}
	flow_record_position(flow, true, 0);
	flow_end_purges(flow);
	forget_accepted(flow);
	cursor_free(&flow->cursor);
	flow_set_state(flow, FLOW_ATTACHED);
}

/* Is there anything for flow_record_all() to do? */
bool
flow_unrecorded(void)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		const Flow *flow = flow_in(it.cur);

		if ((flow->unrecorded && flow->record_at <= mono_now()) || may_attach(flow))
			return true;
	}
	return false;
}

/*
 * Records how far the topics have come that are not ATTACHED.  *recorded: the number
 * of the main cursor's base according to the ledger; it may rise.  Inside a transaction,
 * and before anything of the main cursor is recorded in it.
 */
void
flow_record_all(uint64 *recorded)
{
	dlist_mutable_iter it;

	dlist_foreach_modify(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);

		if (!flow->unrecorded || flow->record_at > mono_now())
			continue;
		if (flow->state == FLOW_LEAVING && flow->window.in_flight == 0)
			record_leaving(flow);
		else
			record_progress(flow);
	}
	dlist_foreach_modify(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);

		if (may_attach(flow))
			record_joining(flow, recorded);
	}
}

/* For chunks_record(): records a run of the main cursor that is done, and frees it. */
void
flow_record_run(Run *run)
{
	(void) record_done(run);
	dlist_delete(&run->node);
	run_free(run);
}

/* ---- recording stalls ---- */

static void
raise_alert(Flow *flow)
{
	Topic	   *topic = topic_of(flow);

	ereport(WARNING,
			(errmsg("topic \"%s\" was refused by the broker %d times", topic->name, flow->attempts),
			 errdetail("The broker said: %s", flow->reason),
			 topic->dead_letters ?
			 errhint("The first message waiting goes to fanout.dead_letter.") :
			 errhint("Its messages wait in order; see fanout.stat_topics and fanout.bindings.")));
	alert_queue(topic->name, flow->attempts, flow->reason);
	flow->alert = false;
}

static TimestampTz
store_retry_at(MonoTime retry_at)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), mono_left(mono_now(), retry_at));
}

/* Locks the row of fanout.stall; false: somebody else has. */
static bool
lock_stall(Oid *types, Datum *values)
{
	static CachedQuery lock = {"select from fanout.stall where topic_id = $1 for update skip locked"};
	static CachedQuery find = {"select from fanout.stall where topic_id = $1"};

	query_execute(&lock, 1, types, values, NULL);
	if (SPI_processed > 0)
		return true;
	query_execute(&find, 1, types, values, NULL);
	return SPI_processed == 0;
}

/*
 * Records what is known of a stall.  When resume() has set another time for the next
 * attempt than is known, that stays, until the catalog is read.
 */
static void
record_stall(Flow *flow)
{
	static CachedQuery forget = {"delete from fanout.stall where topic_id = $1"};
	static CachedQuery keep = {
		"insert into fanout.stall (topic_id, stalled_at, attempts, retry_at, last_error)"
		" values ($1, $2, $3, $4, $5)"
		" on conflict (topic_id) do update set attempts = excluded.attempts, last_error = excluded.last_error,"
		" retry_at = case when stall.retry_at = $6 then excluded.retry_at else stall.retry_at end returning retry_at = $4"
	};
	Oid			types[6] = {INT4OID, TIMESTAMPTZOID, INT4OID, TIMESTAMPTZOID, TEXTOID, TIMESTAMPTZOID};
	TimestampTz retry_at = store_retry_at(flow->retry_at);
	bool		isnull;
	Datum		values[6] = {
		Int32GetDatum(topic_of(flow)->topic_id), TimestampTzGetDatum(flow->stalled_at),
		Int32GetDatum(flow->attempts), TimestampTzGetDatum(retry_at), (Datum) 0,
		TimestampTzGetDatum(flow->retry_stored)
	};

	if (!lock_stall(types, values))
		return;					/* resume() has it: next time */
	if (!flow->stalled)
		query_execute(&forget, 1, types, values, NULL);
	else
	{
		values[4] = CStringGetTextDatum(flow->reason);
		query_execute(&keep, 6, types, values, NULL);
		if (DatumGetBool(query_value(0, 1, &isnull)))
			flow->retry_stored = retry_at;
	}
	flow->stall_changed = false;
}

/* Is there a stall or its end to be recorded? */
bool
flow_stalls_unrecorded(void)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		if (flow_in(it.cur)->stall_changed)
			return true;
	}
	return false;
}

/*
 * Writes stalls that changed: fanout.stall, WARNING and NOTIFY for alerts.  Inside a
 * transaction.
 */
void
flow_record_stalls(void)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);

		if (flow->alert)
			raise_alert(flow);
		if (flow->stall_changed)
			record_stall(flow);
	}
}
