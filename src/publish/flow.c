/*-------------------------------------------------------------------------
 *
 * flow.c
 *		The state machine of one topic's messages.
 *
 * Most topics ride with the main cursor, which reads for all of them at once.  One
 * that cannot go at the pace of the others leaves it and gets a cursor of its own:
 *
 *		            +---------------- joined, and recorded ----------------+
 *		            v                                                      |
 *		        ATTACHED --- paused, refused ----> LEAVING <-----------+   |
 *		            |                                 |                |   |
 *		            | late, large, long,  nothing in flight, recorded  |   |
 *		            | held messages                   v                |   |
 *		            |                             DETACHED             |   |
 *		            |            due, and refused |      | not refused |   |
 *		            |                             v      |             |   |
 *		            |                          PROBING --|--- refused -+   |
 *		            |                            acked | |             |   |
 *		            v                                  v v             |   |
 *		            +--------------------------> CATCHING_UP -- paused,|   |
 *		            |                                 |       refused -+   |
 *		            |      read up to the main cursor v                |   |
 *		            +--- late, with little ------> JOINING ------------+   |
 *		                                              +--------------------+
 *
 *		-> LEAVING, CATCHING_UP	flow_leave(): pause(), flow_refused(), the caller
 *		-> DETACHED				record_leaving() in progress.c
 *		-> PROBING				try_again() in catchup.c, once its topology is declared anew
 *		-> CATCHING_UP			try_again(), probe_settled()
 *		-> JOINING				join() in catchup.c, flow_let_pass()
 *		-> ATTACHED				record_joining() in progress.c
 *
 * ATTACHED: its runs belong to chunks of the main cursor (chunks.c).
 * LEAVING: publishes nothing new; what is in flight is awaited.
 * DETACHED: has nothing in memory.  It is paused or was refused, or waits its turn.
 * PROBING: one message, since those before it were refused.
 * CATCHING_UP: reads with its own cursor, up to where the main cursor is.
 * JOINING: has read as far as the main cursor and rides with it, behind runs of its own;
 *		the ledger does not say so yet.
 *
 * In all states but ATTACHED the topic has entries of its own in the ledger, and the
 * main cursor's do not count for it.  Its place is before its first message that is
 * not done.  The first such entry is in the same transaction as the next main one, so
 * that no message is passed over; the one that ends this says "attached", when the
 * main cursor's entries are true for the topic.
 *
 * When the memory of a topic is given up, messages behind its place may have been
 * accepted already.  Their ids are remembered, so that they do not go again.
 *
 * Messages in fanout.held are read first.  Only redrive() and rotation write them.
 *
 * For each topic, in all states, the messages that wait in the outbox are counted: a
 * message counts from when its row is found, by the main cursor or ahead of it, until it
 * is done.  Where a count was lost, recount.c makes it anew.  Only sessions read the
 * counts: flush() waits by the flag "waits", so that a wrong count could delay nobody.
 *
 * Must never: wait for the broker; let a topic's refusal reach another.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "executor/spi.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "broker/connection.h"
#include "publish/chunks.h"
#include "publish/flow.h"
#include "publish/ledger.h"
#include "publish/reader.h"
#include "publish/topic.h"
#include "publish/topology.h"
#include "server/backlog.h"
#include "server/guc.h"
#include "server/query.h"
#include "server/worker.h"

#define KEY_BUCKETS 16384

/* A topic with so many messages in a batch leaves the main cursor. */
#define LARGE_BATCH 20000

/*
 * So does one that has so much in memory while that keeps the main cursor from reading:
 * an eighth to a quarter of what chunks.c allows at most.  A message counts for MESSAGE_BYTES,
 * too.
 */
#define MUCH_BYTES (RUN_BYTES / 4)
#define MESSAGE_BYTES 512

#define TOPIC_DROPPED "its topic was dropped"

dlist_head	flow_detached = DLIST_STATIC_INIT(flow_detached);
const Cursor *flow_main;
const FlowSender *flow_sender;

/*
 * A row of a topic that is not known was found.  Topics may have been written while
 * their triggers were disabled (pg_restore --disable-triggers), so nobody said that
 * there are new ones.
 */
bool		flow_unknown_topic = false;

static WindowKeys keys;
static Topic *last_found = NULL;	/* the last one whose row was found */
static bool large_found = false;	/* a topic has to leave the main cursor
									 * before that goes on */
static int	nwithout = 0;		/* topics without an entry for their backlog */

/* ---- setting up ---- */

static void
set_text(char **place, const char *to)
{
	if (*place != NULL)
		pfree(*place);
	*place = to ? MemoryContextStrdup(TopMemoryContext, to) : NULL;
}

/* To be called once; main: where the main cursor stands, at any time. */
void
flow_init(const Cursor *main, const FlowSender *to)
{
	WindowKey **buckets = MemoryContextAllocZero(TopMemoryContext, KEY_BUCKETS * sizeof(WindowKey *));

	window_keys_init(&keys, buckets, KEY_BUCKETS);
	flow_main = main;
	flow_sender = to;
}

/* Begins the flow of a new topic, all zeros so far. */
void
flow_create(Topic *topic)
{
	Flow	   *flow = &topic->flow;

	window_init(&flow->window, &keys);
	dlist_init(&flow->runs);
	flow->cursor.topic_id = topic->topic_id;
	flow->entry = backlog_add(topic->topic_id);
	if (flow->entry == NULL)
		nwithout++;
}

bool
flow_has_runs(const Flow *flow)
{
	return !dlist_is_empty(unconstify(dlist_head *, &flow->runs));
}

/* Returns the first run, if the topic has read it by itself or kept it for itself, or NULL. */
const Run  *
flow_own_run(const Flow *flow)
{
	const Run  *run = flow_has_runs(flow) ?
		dlist_head_element(Run, node, unconstify(dlist_head *, &flow->runs)) : NULL;

	return run != NULL && run->chunk == NULL ? run : NULL;
}

/* Is nothing left to be done for the topic? */
bool
flow_at_rest(const Topic *topic)
{
	const Flow *flow = &topic->flow;

	return flow->state == FLOW_ATTACHED && flow->window.count == 0 && flow->channel == 0 &&
		!flow_has_runs(flow);
}

/* Frees what a flow at rest still has. */
void
flow_free(Topic *topic)
{
	Flow	   *flow = &topic->flow;

	cursor_free(&flow->cursor);
	if (flow->entry == NULL)
		nwithout--;
	backlog_remove(flow->entry);
	set_text(&flow->reason, NULL);
	set_text(&flow->returned, NULL);
	if (flow->window.slots != NULL)
		pfree(flow->window.slots);
	if (flow->accepted != NULL)
		hash_destroy(flow->accepted);
	last_found = NULL;
}

/* Has the main cursor read further in the outbox than the topic's own, or may it have? */
bool
flow_reads_behind(const Flow *flow)
{
	return flow->cursor.batch != NULL || flow->cursor.number < flow_main->number;
}

bool
flow_is_gone(const Topic *topic)
{
	return !topic->known || topic->declaration.gone;
}

/* ---- what is dropped ---- */

/* Returns the number of the main cursor's base up to which all messages were sent. */
static uint64
sent_up_to(Flow *flow)
{
	dlist_iter	it;

	if (flow->held)
		return 0;
	dlist_foreach(it, &flow->runs)
	{
		const Run  *run = dlist_container(Run, node, it.cur);

		if (run->done < run->count)
			return run->batch != NULL ? run->batch->base_number : 0;
	}
	return flow->cursor.number;
}

/*
 * For topology_init().  A topic that has left the main cursor may have much to send that
 * was written before.  If it is paused, or the broker refuses it, that may take for ever,
 * and perhaps what is dropped is the reason.
 */
bool
flow_may_drop(Topic *topic, uint32 load)
{
	Flow	   *flow = &topic->flow;

	if (flow->state == FLOW_ATTACHED || topic->paused || flow->stalled)
	{
		flow->drop_number = 0;
		return true;
	}
	if (flow->drop_number == 0 || flow->drop_load < load)
	{
		flow->drop_number = flow_main->number;
		flow->drop_load = load;
	}
	return sent_up_to(flow) >= flow->drop_number;
}

/* Has what waits to be dropped asked for again. */
static void
request_drop(Flow *flow)
{
	if (flow->drop_number != 0)
		topology_request(topic_of(flow), false);
}

void
flow_set_state(Flow *flow, FlowState state)
{
	if (flow->state == FLOW_ATTACHED && state != FLOW_ATTACHED)
		dlist_push_tail(&flow_detached, &flow->node);
	else if (flow->state != FLOW_ATTACHED && state == FLOW_ATTACHED)
		dlist_delete(&flow->node);
	flow->state = state;
	request_drop(flow);
	flow_sender->update(flow);
}

/* ---- what waits ---- */

/* Finds about when the oldest message that is not done was written. */
static void
find_oldest(Flow *flow)
{
	dlist_iter	it;

	dlist_foreach(it, &flow->runs)
	{
		const Run  *run = dlist_container(Run, node, it.cur);

		if (run->batch == NULL || run->done == run->count)
			continue;
		flow->oldest = run->messages[run->done]->created_at;
		return;
	}
	if (flow->backlog == 0)
		flow->oldest = 0;
}

/* Shows sessions what waits. */
static void
show_backlog(Flow *flow)
{
	Assert(flow->uncounted || flow->backlog >= 0);
	if (!flow->uncounted)
		backlog_set(flow->entry, Max(flow->backlog, 0), flow->oldest);
}

/* More messages wait, or (count < 0) fewer. */
void
flow_add_backlog(Flow *flow, int64 count)
{
	flow->backlog += count;
	find_oldest(flow);
	show_backlog(flow);
}

/* Another message waits: its row was found. */
void
flow_count_row(Flow *flow, const ScanRow *row)
{
	if (flow->oldest == 0)
		flow->oldest = scan_created_at(row);
	flow->backlog++;
	show_backlog(flow);
}

/* It is known how many messages wait. */
void
flow_set_backlog(Flow *flow, int64 count)
{
	flow->uncounted = false;
	flow->recount = NULL;
	flow->backlog = count;
	find_oldest(flow);
	show_backlog(flow);
}

/* It is not known any more how many messages wait. */
void
flow_uncount(Flow *flow)
{
	flow->uncounted = true;
	flow->recount = NULL;
	flow->oldest = 0;
}

/*
 * Has counted anew what waits of the topics whose messages are not in memory, because
 * some may have been taken away.
 */
void
flow_uncount_detached(void)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		if (flow_in(it.cur)->state == FLOW_DETACHED)
			flow_uncount(flow_in(it.cur));
	}
}

/*
 * Counts anew what waits of the topics that ride with the main cursor: what they have in
 * memory.  At the end of a batch, when nothing is found behind it.
 */
void
flow_count_riding(void)
{
	Topic	   *topic;
	int			i = 0;

	while ((topic = topic_next(&i)) != NULL)
	{
		if (flow_rides(&topic->flow))
			flow_set_backlog(&topic->flow, topic->flow.window.count);
	}
}

/* Was the message given up with fanout.purge(), one by one? */
bool
flow_has_purged_id(const Flow *flow, const char *message_id)
{
	for (int i = 0; i < flow->npurged; i++)
	{
		if (strcmp(flow->purged[i], message_id) == 0)
			return true;
	}
	return false;
}

/* Was the row given up with fanout.purge()?  Of a topic without the main cursor. */
bool
flow_has_purged(const Flow *flow, const ScanRow *row)
{
	char		message_id[37];

	if (flow->cursor.purged != (Datum) 0 && scan_sees(flow->cursor.purged, row->xid))
		return true;
	if (flow->npurged == 0)
		return false;
	scan_message_id(row, message_id);
	return flow_has_purged_id(flow, message_id);
}

/* Takes note of a row that the main cursor has found, or that was found ahead of it. */
static Flow *
note_row(const ScanRow *row)
{
	Flow	   *flow;

	if (last_found == NULL || last_found->topic_id != row->topic_id)
		last_found = topic_find_or_add(row->topic_id);
	if (!last_found->known)
		flow_unknown_topic = true;
	flow = &last_found->flow;
	if (!flow_rides(flow) && flow_has_purged(flow, row))
		return flow;
	if (flow->state == FLOW_DETACHED)
		flow->waits = true;
	if (!row->again && (flow->recount == NULL || !scan_sees(flow->recount->upto, row->xid)))
		flow_count_row(flow, row);
	return flow;
}

/* For reader_find_ahead(): the row is only counted. */
bool
flow_found(const ScanRow *row)
{
	(void) note_row(row);
	return false;
}

/* Is it known of all topics what waits? */
bool
flow_backlogs_counted(void)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		if (flow_in(it.cur)->uncounted)
			return false;
	}
	return true;
}

/* Do sessions see what waits of all topics? */
bool
flow_backlogs_shown(void)
{
	return nwithout == 0;
}

/* ---- its messages in memory ---- */

static uint64
key_hash(const Message *message, const char *key)
{
	return hash_bytes_extended((const unsigned char *) key, strlen(key), (uint32) message->topic_id);
}

static void
admit_message(Flow *flow, Message *message)
{
	WindowItem *item = &message->item;

	if (message->key != NULL)
		item->keys[item->nkeys++].hash = key_hash(message, message->key);
	if (message->old_key != NULL)
		item->keys[item->nkeys++].hash = key_hash(message, message->old_key);
	item->barrier = message->barrier;
	item->bytes = message->wire.body_len;
	window_add(&flow->window, item);
}

/* Messages of a topic that is gone can go nowhere. */
static void
discard_all(Flow *flow)
{
	WindowItem *item;

	while ((item = window_next(&flow->window)) != NULL)
	{
		message_of(item)->reason = TOPIC_DROPPED;
		window_discard(&flow->window, item);
	}
	flow_settle(flow);
}

/* Takes in a run that was read.  Of a chunk: it must be appended. */
void
flow_admit(Run *run)
{
	Flow	   *flow = run->flow;

	dlist_push_tail(&flow->runs, &run->node);
	flow->bytes += run->bytes;
	for (int i = 0; i < run->count; i++)
		admit_message(flow, run->messages[i]);
	if (flow_is_gone(topic_of(flow)))
		discard_all(flow);
	flow_sender->update(flow);
}

/*
 * Gives up the message that was read to be probed, at its limit of attempts: whether the
 * broker is there, or what the message needs is declared, does not matter any more.
 */
void
flow_give_up(Flow *flow)
{
	WindowItem *item = window_next(&flow->window);
	Message    *message;

	if (item == NULL)
		return;
	message = message_of(item);
	if (message->reason == NULL)
		message->reason = MemoryContextStrdup(message->run->context, flow->reason);
	message->attempts = flow->attempts - flow->idle_attempts;
	window_discard(&flow->window, item);
	flow_settle(flow);
}

/*
 * For reader_fill(): returns the run of the chunk that the topic's messages go into,
 * or NULL if it does not ride with the main cursor.
 */
Run *
flow_run_for(Chunk *chunk, int32 topic_id)
{
	Flow	   *flow = &topic_find_or_add(topic_id)->flow;

	if (!flow_rides(flow))
		return NULL;
	if (flow->filling == NULL)
	{
		flow->filling = run_create(flow, flow_main->batch);
		flow->filling->chunk = chunk;
		flow->filling->next_of_chunk = chunk->runs;
		chunk->runs = flow->filling;
	}
	return flow->filling;
}

/* A chunk is filled: runs that were begun for a message without room go. */
void
flow_end_runs(Chunk *chunk)
{
	Run		  **link = &chunk->runs;

	while (*link != NULL)
	{
		Run		   *run = *link;

		run->flow->filling = NULL;
		if (run->count > 0)
			link = &run->next_of_chunk;
		else
		{
			*link = run->next_of_chunk;
			run_free(run);
		}
	}
}

/*
 * For reader_begin_batch(): counts the row; does its topic ride with the main cursor?
 * One that is not known yet will.  One that has too many will not (flow_leave_large()):
 * to remember them all takes time, and others wait.
 */
bool
flow_wanted(const ScanRow *row)
{
	Flow	   *flow = note_row(row);

	if (!flow_rides(flow))
		return false;
	if (flow->batch_number != flow_main->batch->number)
		flow->batch_rows = 0;
	flow->batch_number = flow_main->batch->number;
	if (++flow->batch_rows <= LARGE_BATCH)
		return true;
	large_found = true;
	return false;
}

/*
 * Has topics leave the main cursor that have very many messages in the batch whose
 * rows were found just now: others would wait for all of them.  To be called before the
 * main cursor takes any row that was found: it was not told of all of theirs.
 */
void
flow_leave_large(void)
{
	Topic	   *topic;
	int			i = 0;

	if (!large_found)
		return;
	large_found = false;
	while ((topic = topic_next(&i)) != NULL)
	{
		Flow	   *flow = &topic->flow;

		if (flow_rides(flow) && flow->batch_rows > LARGE_BATCH &&
			flow->batch_number == flow_main->batch->number)
			flow_leave(flow, true);
	}
}

/* Returns the bytes of memory that the topic's messages take. */
size_t
flow_memory(const Flow *flow)
{
	return flow->bytes + flow->window.count * MESSAGE_BYTES;
}

/* Returns the limit of a run that is to take about so many bytes of memory. */
RunLimit
flow_run_limit(size_t bytes)
{
	RunLimit	limit = {Min(Max(bytes / (2 * MESSAGE_BYTES), 1), RUN_MESSAGES), bytes};

	return limit;
}

/*
 * Has a topic leave the main cursor that has so much in memory that others' messages
 * cannot be read; of several, the one with the most.  Returns whether there was any; if
 * not, there is none before the main cursor has read more.
 */
bool
flow_leave_much(void)
{
	Topic	   *topic;
	Flow	   *most = NULL;
	int			i = 0;

	while ((topic = topic_next(&i)) != NULL)
	{
		Flow	   *flow = &topic->flow;

		if (flow_rides(flow) && flow_memory(flow) >= MUCH_BYTES &&
			(most == NULL || flow_memory(flow) > flow_memory(most)))
			most = flow;
	}
	if (most != NULL)
		flow_leave(most, true);
	return most != NULL;
}

/* ---- refusals ---- */

void
flow_recovered(Flow *flow)
{
	if (!flow->stalled)
		return;
	flow->stalled = false;
	flow->attempts = 0;
	flow->stall_changed = true;
	ereport(LOG, (errmsg("topic \"%s\" flows again", topic_of(flow)->name)));
}

/*
 * The broker refused a message of the topic, or its topology: one more attempt has
 * failed.  code: what the broker said, or 0.
 */
void
flow_refused(Flow *flow, int code, const char *reason)
{
	Topic	   *topic = topic_of(flow);

	flow_leave(flow, false);
	if (flow->stalled && flow->retry_at > mono_now())
		return;					/* another one of the same attempt */
	if (!flow->stalled)
	{
		flow->stalled = true;
		flow->stalled_at = GetCurrentTimestamp();
		flow->attempts = 0;
		ereport(LOG,
				(errmsg("topic \"%s\" is stalled", topic->name),
				 errdetail("%s", reason)));
	}
	flow->attempts++;
	flow->idle_attempts = Min(flow->idle_attempts, flow->attempts - 1);
	flow->retry_at = mono_later(backoff(pgf_retry_interval, flow->attempts - 1,
										Max(pgf_retry_interval, MAX_RETRY_MS)));
	flow->alert = (flow->attempts == pgf_retry_limit);
	flow->stall_changed = true;
	flow->redeclared = false;
	flow->code = code;
	set_text(&flow->reason, reason);
	worker_set_error(psprintf("topic \"%s\": %s", topic->name, reason));
}

/* The first of the messages that were refused says why. */
static void
take_refusals(Flow *flow)
{
	WindowItem *item;
	bool		first = true;

	while ((item = window_take_refused(&flow->window)) != NULL)
	{
		bool		returned = (item->refusal == WINDOW_RETURNED);

		if (first)
		{
			flow->serial = true;
			flow_refused(flow, returned ? 312 : 0, returned && flow->returned ? flow->returned :
						 "nacked: a queue is full and rejects publishes, or failed");
		}
		first = false;
	}
}

/* A probe has ended without a refusal. */
static void
probe_settled(Flow *flow)
{
	if (!flow->give_up)
	{
		flow_recovered(flow);
		flow_set_state(flow, FLOW_CATCHING_UP);
		return;
	}
	/* the message was given up: the next one gets attempts of its own */
	flow->give_up = false;
	flow->attempts = 0;
	flow->retry_at = mono_now();
	flow->stall_changed = true;
	flow_leave(flow, false);
}

static void
message_done(Flow *flow, Message *message)
{
	Run		   *run = message->run;

	if (message->item.state == WINDOW_ACCEPTED)
	{
		topic_of(flow)->sent++;
		pg_atomic_fetch_add_u64(&worker_slot->confirmed, 1);
	}
	else
		pg_atomic_fetch_add_u64(&worker_slot->dead, 1);
	reader_free_body(message);
	run->done++;
	chunks_message_done(run, message);
	flow->bytes -= message->bytes;
	if (run->batch != NULL)
		flow->backlog--;
	if (run->chunk == NULL)
		flow->unrecorded = true;
}

/* To be called after each confirm, discard and loss: takes what is settled. */
void
flow_settle(Flow *flow)
{
	WindowItem *item;
	bool		any = false;

	while ((item = window_take_done(&flow->window)) != NULL)
	{
		message_done(flow, message_of(item));
		any = true;
	}
	if (any)
		flow_add_backlog(flow, 0);
	take_refusals(flow);
	if (flow->state == FLOW_PROBING && any && flow->window.count == 0)
		probe_settled(flow);
	if (flow->state == FLOW_LEAVING)
		flow->unrecorded = true;
	if (flow_is_gone(topic_of(flow)) && window_next(&flow->window) != NULL)
		discard_all(flow);
	request_drop(flow);
	flow_sender->update(flow);
}

/* ---- leaving the main cursor ---- */

/*
 * Takes its runs out of the main cursor's chunks, and stands where that one is.  Behind a run of
 * its own nothing is done, so that an entry in the ledger stays as it is.
 */
static void
detach(Flow *flow)
{
	dlist_iter	it;

	flow->unrecorded = flow->unrecorded || flow_own_run(flow) == NULL;
	dlist_foreach(it, &flow->runs)
	{
		Run		   *run = dlist_container(Run, node, it.cur);

		if (run->chunk != NULL)
			chunks_cut(run);
	}
	cursor_leave(&flow->cursor, flow_main);
	flow->held_after = 0;
	flow->record_at = 0;
}

/* Has the topic ride with the main cursor from here on, behind what it has by itself. */
void
flow_ride(Flow *flow)
{
	flow->join_number = flow_main->number;
	flow->join_chunk = chunks_newest();
	flow_set_state(flow, FLOW_JOINING);
}

/*
 * Has a topic that rides with the main cursor let others pass: what it has in memory is not
 * waited for any more.  It need not read anything by itself.
 */
void
flow_let_pass(Flow *flow)
{
	detach(flow);
	flow_ride(flow);
}

/*
 * Has the topic leave the main cursor.  keep: it goes on, at its own pace; else it
 * publishes nothing more for now, and gives up what it has in memory.
 */
void
flow_leave(Flow *flow, bool keep)
{
	switch (flow->state)
	{
		case FLOW_ATTACHED:
		case FLOW_JOINING:
			detach(flow);
			flow_set_state(flow, keep ? FLOW_CATCHING_UP : FLOW_LEAVING);
			break;
		case FLOW_PROBING:
		case FLOW_CATCHING_UP:
			if (!keep)
			{
				flow->give_up = false;
				flow_set_state(flow, FLOW_LEAVING);
			}
			break;
		case FLOW_LEAVING:
		case FLOW_DETACHED:
			break;
	}
	if (flow->state == FLOW_LEAVING)
		flow->unrecorded = true;
}

/* May what is in its window be published, as far as the flow is concerned? */
bool
flow_may_send(const Flow *flow)
{
	return flow->state != FLOW_LEAVING && flow->state != FLOW_DETACHED &&
		window_next(&flow->window) != NULL;
}

/* ---- what the catalog says ---- */

static bool
wants_serial(const Topic *topic)
{
	for (int b = 0; b < topic->nbindings; b++)
	{
		if (topic->bindings[b].refuses && !topic->bindings[b].dropping)
			return true;
	}
	return topic->flow.serial;
}

/* Chooses the mode of the topic's window. */
void
flow_choose_mode(Flow *flow)
{
	window_set_serial(&flow->window, wants_serial(topic_of(flow)));
}

/* The catalog was read again. */
void
flow_reconsider(Topic *topic)
{
	Flow	   *flow = &topic->flow;

	if (topic->known && (topic->paused || flow->stalled))
	{
		if (topic->paused || flow_rides(flow))
			flow_leave(flow, false);
	}
	else if (flow->held)
		flow_leave(flow, true);
	if (flow_is_gone(topic))
	{
		flow->stalled = false;
		discard_all(flow);
	}
	flow_choose_mode(flow);
	flow_sender->update(flow);
}

/*
 * Takes notice that the broker's answer to a topic's declaration has changed.  A topic
 * that waits for its next attempt looks at it then; but one that has begun to probe would
 * wait for ever, because its message is not published without the declaration.
 */
void
flow_declared(Topic *topic)
{
	const char *error = topology_error(topic);

	if (error != NULL && !topic->dropping && (!topic->flow.stalled || topic->flow.state == FLOW_PROBING))
		flow_refused(&topic->flow, topic->declaration.code, error);
	if (flow_is_gone(topic))
		flow_reconsider(topic);
	flow_sender->update(&topic->flow);
}

/*
 * Looks which topics have messages in fanout.held; somebody may have purged them.  Inside
 * a transaction.
 */
void
flow_find_held(void)
{
	int32	   *ids;
	int			n = reader_topics_held(&ids);
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		if (flow_in(it.cur)->state == FLOW_DETACHED)
			flow_in(it.cur)->held = false;
	}

	for (int i = 0; i < n; i++)
	{
		Flow	   *flow = &topic_find_or_add(ids[i])->flow;

		flow->held = true;
		if (flow_rides(flow))
			flow_leave(flow, true);
	}
}

/*
 * When to try again, from and to the catalog.  Somebody may have set the wall
 * clock meanwhile: no pause is longer than the longest.
 */
static MonoTime
load_retry_at(TimestampTz stored)
{
	int64		left = (stored - GetCurrentTimestamp()) / 1000;

	return mono_later(Max(0, Min(left, Max(pgf_retry_interval, MAX_RETRY_MS))));
}

/* Reads fanout.stall: what is known already is only brought forward. */
void
flow_load_stalls(void)
{
	static CachedQuery query = {"select topic_id, stalled_at, attempts, retry_at, last_error from fanout.stall"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	for (int row = 0; row < SPI_processed; row++)
	{
		Topic	   *topic = topic_find(DatumGetInt32(query_value(row, 1, &isnull)));
		TimestampTz stored = DatumGetTimestampTz(query_value(row, 4, &isnull));
		MonoTime	retry_at = load_retry_at(stored);
		Flow	   *flow = topic ? &topic->flow : NULL;

		if (flow == NULL || !topic->known)
			continue;
		flow->retry_stored = stored;
		if (flow->stalled || flow->stall_changed)
		{
			/* resume() may have brought the next attempt forward */
			flow->retry_at = Min(flow->retry_at, retry_at);
			continue;
		}
		flow->stalled = true;
		flow->stalled_at = DatumGetTimestampTz(query_value(row, 2, &isnull));
		flow->attempts = DatumGetInt32(query_value(row, 3, &isnull));
		flow->retry_at = retry_at;
		set_text(&flow->reason, TextDatumGetCString(query_value(row, 5, &isnull)));
		flow->code = atoi(flow->reason);
	}
}

/* Puts the topics that had left the main cursor where the ledger says.  At start. */
void
flow_load_detached(void)
{
	int			n;
	LedgerEntry *entries = ledger_read_detached(&n);

	for (int i = 0; i < n; i++)
	{
		Flow	   *flow = &topic_find_or_add(entries[i].topic_id)->flow;

		cursor_set(&flow->cursor, entries[i].base, entries[i].target, entries[i].last_id, &entries[i].unread);
		flow_uncount(flow);
		flow_set_state(flow, FLOW_DETACHED);
	}
}

static void
forget_purges(Flow *flow)
{
	cursor_purge(&flow->cursor, (Datum) 0);
	for (int i = 0; i < flow->npurged; i++)
		pfree(flow->purged[i]);
	flow->npurged = 0;
	flow->npurges = 0;
}

static void
add_purge(Flow *flow, int row)
{
	bool		isnull;
	Datum		message_id = query_value(row, 3, &isnull);
	int			n = flow->npurged;

	if (isnull)
	{
		cursor_purge(&flow->cursor, query_value(row, 2, &isnull));
		return;
	}
	flow->purged = n == 0 && flow->purged == NULL ?
		MemoryContextAlloc(TopMemoryContext, sizeof(char *)) :
		repalloc(flow->purged, (n + 1) * sizeof(char *));
	flow->purged[n] = MemoryContextStrdup(TopMemoryContext, TextDatumGetCString(message_id));
	flow->npurged++;
}

/* Takes the purges of a topic, of which more are added until it joins the main cursor. */
static void
take_purges(Flow *flow, int first, int count)
{
	if (count == flow->npurges)
		return;
	forget_purges(flow);
	for (int i = 0; i < count; i++)
		add_purge(flow, first + i);
	flow->npurges = count;
	flow_uncount(flow);
}

static void
delete_purges(int32 topic_id)
{
	static CachedQuery query = {"delete from fanout.purged where topic_id = $1"};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(topic_id)};

	query_execute(&query, 1, types, values, NULL);
}

static int32
purge_topic(int row)
{
	bool		isnull;

	return DatumGetInt32(query_value(row, 1, &isnull));
}

/*
 * Reads what fanout.purge() gave up of messages that were not sent.  Of a topic that
 * rides with the main cursor it is void.
 */
void
flow_load_purges(void)
{
	static CachedQuery query = {
		"select topic_id, snapshot, message_id::text from fanout.purged p order by topic_id, fanout.purged_order(p)"
	};
	int32	   *riding;
	int			nriding = 0;
	int			rows;
	int			count;

	query_execute(&query, 0, NULL, NULL, NULL);
	rows = SPI_processed;
	riding = palloc((rows + 1) * sizeof(int32));
	for (int row = 0; row < rows; row += count)
	{
		Topic	   *topic = topic_find_or_add(purge_topic(row));

		for (count = 1; row + count < rows && purge_topic(row + count) == topic->topic_id;)
			count++;
		if (!flow_rides(&topic->flow))
		{
			take_purges(&topic->flow, row, count);
			continue;
		}
		riding[nriding++] = topic->topic_id;
		forget_purges(&topic->flow);
	}
	for (int i = 0; i < nriding; i++)
		delete_purges(riding[i]);
}

/* The topic rides with the main cursor again: there is nothing left to be given up. */
void
flow_end_purges(Flow *flow)
{
	if (flow->npurges > 0)
		delete_purges(topic_of(flow)->topic_id);
	forget_purges(flow);
}
