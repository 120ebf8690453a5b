/*-------------------------------------------------------------------------
 *
 * catchup.c
 *		Topics that have left the main cursor: when they are tried again, what they
 *		read by themselves, and how they join it again.
 *
 * Transitions of the state machine in flow.c that are made here:
 *
 *		DETACHED -> CATCHING_UP	it is not refused, and not paused (any more)
 *		DETACHED -> PROBING		it is due, and its topology was declared anew
 *		PROBING -> CATCHING_UP	there is nothing to be sent any more
 *		CATCHING_UP -> JOINING	it has read as far as the main cursor, which is
 *								between two batches, and the broker is quick
 *
 * A topic reads what is held of it first, and then the outbox, in batches up to the
 * main cursor's base.  At most MAX_READERS read at once, a step at a time, so that
 * all others are kept waiting for some milliseconds only.
 *
 * Must never: read further than the main cursor.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "publish/catchup.h"
#include "publish/flow.h"
#include "publish/progress.h"
#include "publish/reader.h"
#include "publish/recount.h"
#include "publish/topic.h"
#include "publish/topology.h"
#include "server/guc.h"
#include "server/worker.h"

/* So many topics read at once; each has the turn for TURN_MS if others wait. */
#define MAX_READERS 4
#define TURN_MS 1000

/* Blocks that are looked at before others get their turn: some milliseconds. */
#define READ_BLOCKS 256

/* Messages in memory of a topic that reads by itself. */
#define MAX_MESSAGES (4 * RUN_MESSAGES)

/*
 * MAX_BYTES bounds the memory of all topics that read by themselves.  Each has an equal share,
 * or a FREE_PART of what is free, if that is more, and MAIN_LEAST at least.  A topic reads half
 * its share at once, when it has less than that, so that a reading does not go beyond the
 * share.  A single message may be larger than any share.
 *
 * A topic that leaves the main cursor keeps what it has in memory, whatever its share.  So the
 * main cursor may have a MAIN_PART of what is left of twice MAX_BYTES, or MAIN_LEAST, because
 * each further topic that leaves then adds little.
 */
#define MAX_BYTES (8 * RUN_BYTES)
#define FREE_PART 8
#define MAIN_PART 16
#define MAIN_LEAST (64 * 1024)

/* A topic whose oldest message has been in flight for longer does not join. */
#define JOIN_FLIGHT_MS 200

static int	nreading = 0;		/* topics that have something to read by
								 * themselves */
static size_t apart = 0;		/* bytes that all have that have left the main
								 * cursor */

/* ---- memory ---- */

/* A single message, however large, leaves the others what they may have. */
static size_t
counted_memory(const Flow *flow)
{
	size_t		bytes = flow_memory(flow);

	return flow->window.count > 1 ? bytes : Min(bytes, MAIN_LEAST);
}

/* Is there anything before the main cursor that it has not read? */
static bool
is_behind(const Flow *flow)
{
	return flow->held || flow_reads_behind(flow);
}

/* Counts what topics have that left the main cursor, for the two shares below. */
static void
count_memory(void)
{
	dlist_iter	it;

	nreading = 0;
	apart = 0;
	dlist_foreach(it, &flow_detached)
	{
		const Flow *flow = flow_in(it.cur);

		nreading += (flow->state == FLOW_CATCHING_UP && is_behind(flow)) ? 1 : 0;
		apart += counted_memory(flow);
	}
}

/* Takes what topics have that left the main cursor off a bound, and divides the rest. */
static size_t
part_of_rest(size_t bound, int parts)
{
	return (bound - Min(apart, bound)) / parts;
}

/* Half of what a topic that reads by itself may have. */
static size_t
half_share(void)
{
	size_t		share = Min(MAX_BYTES / Max(nreading, 1), part_of_rest(2 * MAX_BYTES, FREE_PART));

	share = Max(share, part_of_rest(MAX_BYTES, FREE_PART));
	return Min(Max(share, MAIN_LEAST) / 2, RUN_BYTES);
}

/* How many bytes may the main cursor have in memory? */
size_t
flow_main_share(void)
{
	return Max(Min(part_of_rest(2 * MAX_BYTES, MAIN_PART), RUN_BYTES), MAIN_LEAST);
}

/* For the reader: accepted before, or purged. */
static bool
skips(Flow *flow, const Message *message)
{
	AcceptedMessage *accepted = flow->accepted == NULL ? NULL :
		hash_search(flow->accepted, &message->id, HASH_FIND, NULL);

	if (accepted != NULL)
	{
		/* kept: the topic may have to go back once more */
		accepted->passed = flow->readings;
		flow->unrecorded = true;
		return true;
	}
	return flow_has_purged_id(flow, message->message_id);
}

static Run *
read_held(Flow *flow, RunLimit limit)
{
	bool		last;
	Run		   *run = reader_read_held(flow, topic_of(flow)->topic_id, flow->held_after, limit, &last);

	if (run != NULL)
		flow->held_after = run->messages[run->count - 1]->id;
	else if (flow->held_after == 0)
		flow->held = false;
	else if (!flow_has_runs(flow))
		flow->held_after = 0;	/* there may be new ones before it */
	flow->held_read = (run == NULL && flow->held_after != 0);
	return run;
}

/* Reads the topic's next run, if there is one, and takes it in. */
static void
read_run(Flow *flow)
{
	size_t		before = counted_memory(flow);
	RunLimit	limit = flow_run_limit(half_share());
	Run		   *run;

	if (flow->state == FLOW_PROBING)
		limit.messages = 1;

	flow->readings++;
	worker_begin();
	if (flow->held)
		run = read_held(flow, limit);
	else
		run = reader_read_topic(&flow->cursor, flow_main, flow, limit, READ_BLOCKS, skips);
	worker_commit();
	if (run == NULL)
		return;
	run->reading = flow->readings;
	flow_admit(run);
	if (flow->give_up)
		flow_give_up(flow);
	apart += counted_memory(flow) - before;
}

/* May the topic read its next run now? */
static bool
may_read(const Flow *flow)
{
	if (!is_behind(flow))
		return false;
	if (flow->held && flow->held_read && flow_has_runs(flow))
		return false;
	if (flow->state == FLOW_PROBING)
		return flow->window.count == 0 && !flow_has_runs(flow);
	return flow->state == FLOW_CATCHING_UP && flow->window.count < MAX_MESSAGES && flow_memory(flow) < half_share();
}

/* Makes room among those who read at once: whoever had the turn longest gives it up. */
static bool
take_turn(Flow *flow)
{
	dlist_iter	it;
	Flow	   *longest = NULL; /* that is not in the middle of looking */
	int			n = 0;

	if (flow->cursor.open)
		return true;
	dlist_foreach(it, &flow_detached)
	{
		Flow	   *other = flow_in(it.cur);

		if (!other->cursor.open)
			continue;
		n++;
		if (!other->cursor.scan.passing &&
			(longest == NULL || other->turn_since < longest->turn_since))
			longest = other;
	}
	if (n >= MAX_READERS)
	{
		if (longest == NULL || !mono_exceeds(longest->turn_since, mono_now(), TURN_MS))
			return false;
		cursor_close(&longest->cursor);
	}
	flow->turn_since = mono_now();
	return true;
}

/*
 * A probe finds nothing to be sent: somebody has purged it.  If it was to be given up, the
 * topology is still what was refused last.
 */
static void
nothing_to_probe(Flow *flow)
{
	if (flow->state != FLOW_PROBING || is_behind(flow) || flow->window.count > 0 || flow_has_runs(flow))
		return;
	if (flow->give_up)
	{
		flow_leave(flow, false);
		return;
	}
	flow_recovered(flow);
	flow_set_state(flow, FLOW_CATCHING_UP);
}

/*
 * A segment of the outbox cannot be emptied because of messages that this topic has
 * not sent.  If it does not send any for now, they are moved.
 */
void
flow_move_to_held(int32 topic_id)
{
	Topic	   *topic = topic_find(topic_id);

	if (topic != NULL)
		topic->flow.moving = true;
}

/* Moves a run of what the topic has not sent to fanout.held, where it is read first. */
static void
move_run(Flow *flow)
{
	Run		   *run;

	flow->readings++;
	worker_begin();
	run = reader_read_topic(&flow->cursor, flow_main, flow, WHOLE_RUN, READ_BLOCKS, skips);
	flow->moving = flow_reads_behind(flow);
	if (run != NULL)
	{
		reader_hold(run->messages, run->count);
		flow_add_backlog(flow, -run->count);
		flow->held = true;
		run_free(run);
	}
	if (!flow->moving)
		flow->waits = false;
	if (run != NULL || !flow->moving)
		flow_record_position(flow, false, 0);
	worker_commit();
}

/*
 * Has each topic that catches up read its next run, as far as that can be done at
 * once.  Returns whether any did.  connected: there is a broker to publish to.
 */
bool
flow_read_all(bool connected)
{
	dlist_mutable_iter it;
	bool		any = recount_step();

	count_memory();
	dlist_foreach_modify(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);
		bool		usable = connected || flow_is_gone(topic_of(flow)) || flow->give_up;

		nothing_to_probe(flow);
		if (flow->state != FLOW_DETACHED)
			flow->moving = false;
		else if (flow->moving && take_turn(flow))
		{
			move_run(flow);
			any = true;
		}
		if (!usable || !may_read(flow) || !take_turn(flow))
			continue;
		read_run(flow);
		any = true;
	}
	return any;
}

/* ---- trying again ---- */

/*
 * Is a message of it to be given up?  It has attempts of its own, whatever those of the
 * declaration were before it came.
 */
static bool
is_exhausted(const Flow *flow)
{
	return topic_of(flow)->dead_letters && flow->attempts - flow->idle_attempts >= Max(pgf_retry_limit, 2) &&
		(flow->waits || flow->held) && !flow->stall_changed && !flow->alert;
}

/*
 * A topic that was refused is tried again: its topology first, for the queue or the
 * exchange may be what is missing.
 */
static void
retry_topology(Flow *flow)
{
	Topic	   *topic = topic_of(flow);
	const char *error = topology_error(topic);

	if (!flow->redeclared)
	{
		flow->redeclared = true;
		topology_forget_topic(topic);
		topology_request(topic, true);
	}
	else if (error != NULL)
		flow_refused(flow, topic->declaration.code, error);
	else if (topology_ready(topic))
	{
		if (topic->paused)
			flow_recovered(flow);
		else
			flow_set_state(flow, FLOW_PROBING);
	}
}

/* Is there something to try for a topic that was refused and is paused? */
static bool
may_try(const Flow *flow)
{
	const Topic *topic = topic_of(flow);

	return !topic->paused || topology_error(topic) != NULL || flow->redeclared;
}

static bool
try_again(Flow *flow, bool connected)
{
	Topic	   *topic = topic_of(flow);

	if (!flow->stalled)
	{
		if (topic->paused)
			return false;
		flow_set_state(flow, FLOW_CATCHING_UP);
		return true;
	}
	if (flow->retry_at > mono_now() || !may_try(flow))
		return false;
	if (!flow->waits && !flow->held && !flow->uncounted)
		flow->idle_attempts = flow->attempts;
	if (is_exhausted(flow) && !topic->paused)
	{
		flow->give_up = true;
		flow_set_state(flow, FLOW_PROBING);
		return true;
	}
	if (!connected)
		return false;
	retry_topology(flow);
	return flow->state != FLOW_DETACHED;
}

/* Tries those again that are due.  Returns whether any goes on. */
bool
flow_try_all(bool connected)
{
	dlist_mutable_iter it;
	bool		any = false;

	dlist_foreach_modify(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);

		if (flow->state == FLOW_DETACHED)
			any = try_again(flow, connected) || any;
	}
	return any;
}

/* When the next one is due, or 0. */
MonoTime
flow_next_retry(bool connected)
{
	MonoTime	next = 0;
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		const Flow *flow = flow_in(it.cur);

		if (flow->state != FLOW_DETACHED || !flow->stalled || !may_try(flow) || flow->redeclared)
			continue;
		if (!connected && !is_exhausted(flow))
			continue;
		if (next == 0 || flow->retry_at < next)
			next = Max(flow->retry_at, 1);
	}
	return next;
}

/* ---- joining the main cursor ---- */

/* Does the broker confirm its messages soon enough, and does it have a channel for them? */
static bool
is_quick(const Flow *flow)
{
	const WindowItem *item = window_oldest(&flow->window);

	if (flow_in_line(flow->list) || flow->unconfirmed_since != 0)
		return false;
	return item == NULL || !mono_exceeds(item->published_at, mono_now(), Max(JOIN_FLIGHT_MS, flow_sender->patience_ms()));
}

static void
join(Flow *flow)
{
	if (flow->state != FLOW_CATCHING_UP || is_behind(flow) || !is_quick(flow) || flow_sender->lags(flow))
		return;
	if (!reader_is_ahead())
		flow_set_backlog(flow, flow->window.count);
	else if (flow->uncounted)
		return;
	flow->serial = false;
	flow->unrecorded = true;
	flow_ride(flow);
	flow_choose_mode(flow);
}

/*
 * Lets topics ride with the main cursor again that have read as far, or can do so with
 * another run.  To be called while the main cursor is between two batches.
 */
void
flow_join_all(bool connected)
{
	dlist_mutable_iter it;

	dlist_foreach_modify(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);

		if (flow->state != FLOW_CATCHING_UP)
			continue;
		if (connected && flow->cursor.batch == NULL && !flow->held && may_read(flow) && take_turn(flow))
			read_run(flow);
		join(flow);
	}
}

/*
 * Does the topic's entry in the ledger say that it has sent what the main cursor's base of that
 * number shows?  Its state does not tell: a topic may be late all the time with what comes.
 */
static bool
has_sent(const Flow *flow, uint64 number)
{
	const Run  *run = flow_own_run(flow);

	if (flow->held || flow->unrecorded)
		return false;
	if (run == NULL)
		return flow->cursor.number >= number;
	return run->batch != NULL && run->batch->base_number >= number;
}

/* May the topic have anything to send up to that number?  It may as long as that is not known. */
static bool
may_wait(const Flow *flow, uint64 number)
{
	if (topology_error(topic_of(flow)) != NULL)
		return true;
	if (flow->state == FLOW_JOINING || flow->state == FLOW_CATCHING_UP)
		return !has_sent(flow, number);
	return flow->state != FLOW_DETACHED || flow->uncounted || flow->waits || flow->held ||
		flow->window.count > 0 || flow->unrecorded;
}

/* Is there anything of a topic without the main cursor that is not sent, up to that number? */
bool
flow_anything_waits(uint64 number)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		if (may_wait(flow_in(it.cur), number))
			return true;
	}
	return false;
}
