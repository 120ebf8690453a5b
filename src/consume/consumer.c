/*-------------------------------------------------------------------------
 *
 * consumer.c
 *		The worker that consumes one subscription's queue.
 *
 * One loop, each round of which does whatever can be done without waiting:
 *
 *		connect -> queue there? handler there? -> consume -> take deliveries
 *		-> handle them -> ack -> give back what is due -> look after the rest
 *
 * and then waits for the first of: the latch (a request), the broker's socket,
 * the next thing due by the clock.
 *
 * Deliveries move so:
 *
 *		            behind another of its key
 *		    (arrives) ---------------------> WAITING
 *		        |  ^                            |
 *		        |  |                            | that one is done with
 *		        v  |                            v
 *		      READY <---------------------------+
 *		        |  ^
 *		        |  '---------------------------------------.
 *		        +--> acked: applied, seen before, or dead   | comes again
 *		        |                                           |
 *		        '--> FAILED --- nacked, when due ---> AWAY -+--> GONE
 *		                                                 (did not come)
 *
 * All deliveries at hand are handled in one transaction; if that fails, in
 * another one with a savepoint for each; and if that fails too (in a deferred
 * trigger, at commit), each in its own.  Acks follow the commit.
 *
 * A delivery that failed is not acked; its body is let go.  When its next
 * attempt is due it is nacked, and comes again at once.  Those of the same key
 * that come after it wait in memory (order.c).  They, too, are not acked, and
 * would use up the prefetch: when half of it waits and all of it has come, the
 * consumer is cancelled and another begun on the same channel, with a fresh
 * prefetch.
 *
 * Attempts are in fanout.failure.  A handler that ends the process (FATAL, a
 * crash) leaves no trace, so after a process that ended while a handler ran,
 * what is delivered again first is suspect: it is handled singly, and the
 * attempt is recorded before it.  So is every attempt after the first.
 *
 * Losing the connection loses nothing: what was not acked comes again, and
 * the inbox knows what was applied.  What failed keeps its place before those
 * of its key, in whatever order the broker sends them.
 * Of the others all that comes again is gathered first, and put in order.
 *
 * No transaction is open while the broker is waited for.  An error in here
 * (not one of a handler) ends the process, and the launcher starts it again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "broker/connection.h"
#include "capture/msgid.h"
#include "consume/consumer.h"
#include "consume/delivery.h"
#include "consume/handler.h"
#include "consume/inbox.h"
#include "consume/order.h"
#include "publish/topology.h"
#include "server/compat.h"
#include "server/guc.h"
#include "server/monotime.h"
#include "server/worker.h"

/*
 * Most deliveries in one transaction: a quarter of the prefetch, so that the
 * next ones come while these are handled and acked; within these bounds.
 */
#define BATCH_MIN 100
#define BATCH_MAX 1000

/* More deliveries that wait than this are no longer made room for. */
#define MAX_WAITING 65535

/* Bounds one ack or nack without progress; SIGTERM is taken meanwhile. */
#define SETTLE_TIMEOUT_MS 30000

/* A delivery that was given back and has not come again is somebody else's. */
#define AWAY_TIMEOUT_MS 30000

/*
 * When a consumer begins, the one before it may not be gone yet for the
 * broker, and what it had in hand comes back only then, after newer messages.
 */
#define PREDECESSOR_MS 3000
#define PREDECESSOR_LOOK_MS 100

/*
 * A quorum queue whose leader does not answer, as after a start of the broker,
 * is said to have no messages and no consumers.
 */
#define LEADER_MS 500

/* What is delivered again is gathered until nothing came for so long. */
#define GATHER_MS 100
#define GATHER_MAX MAX_WAITING

/* How long room is waited for. */
#define ROOM_MS 20

/* How often the depth of the queue is looked at. */
#define INSPECT_MS 5000

#define MAX_REFUSED_MS 30000

/* Failures are logged no more often. */
#define FAILURE_LOG_MS 60000

#define EVENTS_AT_ONCE 10000

/* A message may be in the queue more than once: linked by "same". */
typedef struct FailedEntry
{
	pg_uuid_t	message_id;		/* hash key */
	Delivery   *first;
} FailedEntry;

typedef struct Consumer
{
	Connection	conn;
	int32		subscription_id;
	SubscriptionRow row;
	MemoryContext row_context;
	char		name[300];		/* for log messages */
	char		connection_name[300];

	/* consuming */
	bool		consuming;
	char		tag[32];		/* consumer tag */
	uint32		epoch;			/* how many basic.consume */
	int			refusals;		/* in a row */
	uint32		doubted;		/* for connection_believes() */
	char		last_refusal[600];	/* so that it is logged once */
	MonoTime	inspect_at;
	MonoTime	consuming_since;

	/* deliveries */
	MemoryContext deliveries;
	Delivery  **gathered;		/* delivered again first of all: to be sorted */
	int			ngathered;
	bool		gathering;
	MonoTime	gather_until;
	Delivery   *first_ready;
	Delivery   *last_ready;
	int			nready;
	Order		order;
	Delivery  **released;		/* while order_release() runs */
	int			nreleased;
	HTAB	   *failed;			/* by message id: FAILED, AWAY, GONE, and
								 * those of them that are READY again */
	int			in_hand;		/* delivered, and neither acked nor nacked */
	int			blocked;		/* of these, WAITING or FAILED */
	int			blocked_now;	/* the same, of this epoch */
	int			in_hand_now;	/* delivered in this epoch, and in hand */
	MonoTime	room_until;		/* nothing is handled before; 0: it is */
	size_t		bytes;			/* of deliveries in memory */
	bool		suspicious;		/* of what is delivered again */
	MonoTime	failure_log_at; /* no sooner */
	MonoTime	next_due;		/* of one that is FAILED; 0: none */
	MonoTime	next_gone;		/* of one that is AWAY; 0: none */
} Consumer;

static Consumer con;

static void consume_anew(void);

/* ---- lists ---- */

static void
append_ready(Delivery *delivery)
{
	order_place(&con.order, &delivery->order);
	delivery->state = DELIVERY_READY;
	delivery->next = NULL;
	if (con.last_ready != NULL)
		con.last_ready->next = delivery;
	else
		con.first_ready = delivery;
	con.last_ready = delivery;
	con.nready++;
}

static Delivery *
take_ready(void)
{
	Delivery   *delivery = con.first_ready;

	con.first_ready = delivery->next;
	if (con.first_ready == NULL)
		con.last_ready = NULL;
	delivery->next = NULL;
	con.nready--;
	return delivery;
}

static void
count_blocked(const Delivery *delivery, int change)
{
	con.blocked += change;
	if (delivery->epoch == con.epoch)
		con.blocked_now += change;
	pg_atomic_write_u32(&worker_subscription->waiting, con.blocked);
}

static void
count_in_hand(const Delivery *delivery, int change)
{
	con.in_hand += change;
	if (delivery->epoch == con.epoch)
		con.in_hand_now += change;
}

static void
drop_body(Delivery *delivery)
{
	if (delivery->wire != NULL)
		con.bytes -= delivery->size;
	delivery_drop_body(delivery);
}

static void
add_to_order(Delivery *delivery)
{
	if (!order_add(&con.order, &delivery->order))
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
}

static void
remember_failed(Delivery *delivery)
{
	bool		found;
	FailedEntry *entry = hash_search(con.failed, &delivery->message_id, HASH_ENTER, &found);

	delivery->same = found ? entry->first : NULL;
	entry->first = delivery;
}

static void
forget_failed(Delivery *delivery)
{
	FailedEntry *entry = hash_search(con.failed, &delivery->message_id, HASH_FIND, NULL);
	Delivery  **link;

	Assert(entry != NULL);
	link = &entry->first;
	while (*link != delivery)
		link = &(*link)->same;
	*link = delivery->same;
	if (entry->first == NULL)
		hash_search(con.failed, &delivery->message_id, HASH_REMOVE, NULL);
}

/* The first that waits to come again, if one does; else one in hand, or NULL. */
static Delivery *
find_failed(const pg_uuid_t *message_id)
{
	FailedEntry *entry = hash_search(con.failed, message_id, HASH_FIND, NULL);
	Delivery   *found = entry ? entry->first : NULL;

	for (Delivery *delivery = found; delivery != NULL; delivery = delivery->same)
	{
		if (delivery->tag == 0 && (found->tag != 0 || delivery->order.place < found->order.place))
			found = delivery;
	}
	return found;
}

static void
forget(Delivery *delivery)
{
	if (delivery->order.pinned)
	{
		order_remove(&con.order, &delivery->order);
		forget_failed(delivery);
	}
	drop_body(delivery);
	delivery_free(delivery);
}

static void
note_due(MonoTime *next, MonoTime when)
{
	if (*next == 0 || when < *next)
		*next = when;
}

static void
set_away(Delivery *delivery)
{
	delivery->state = DELIVERY_AWAY;
	delivery->away_since = mono_now();
	note_due(&con.next_gone, mono_plus(delivery->away_since, AWAY_TIMEOUT_MS));
}

/* ---- losing the connection ---- */

/* Everything in hand comes again; what failed keeps its place. */
static void
lose_deliveries(void)
{
	OrderItem  *next;
	OrderItem  *item = con.order.first;

	while (con.first_ready != NULL)
	{
		Delivery   *delivery = take_ready();

		if (!delivery->order.pinned)
		{
			drop_body(delivery);
			delivery_free(delivery);
		}
	}
	while (con.ngathered > 0)
	{
		Delivery   *delivery = con.gathered[--con.ngathered];

		drop_body(delivery);
		delivery_free(delivery);
	}
	con.gathering = false;
	order_clear(&con.order);
	for (; item != NULL; item = next)
	{
		Delivery   *delivery = (Delivery *) item;

		next = item->next;
		drop_body(delivery);
		if (!item->pinned)
		{
			delivery_free(delivery);
			continue;
		}
		item->waiting = false;
		delivery->tag = 0;
		set_away(delivery);
		add_to_order(delivery);
	}
	con.consuming = false;
	con.in_hand = con.in_hand_now = con.blocked = con.blocked_now = 0;
	con.room_until = 0;
	con.next_due = 0;
	pg_atomic_write_u32(&worker_subscription->waiting, 0);
	pg_atomic_write_u64(&worker_subscription->lag, 0);
}

static void
disconnect(bool polite)
{
	lose_deliveries();
	connection_close(&con.conn, polite);
}

static void
broker_failed(const char *text)
{
	lose_deliveries();
	connection_failed(&con.conn, text);
}

/*
 * The queue or the handler cannot be used: nothing is consumed for a while.
 * What had been delivered goes back to the queue, for others perhaps.
 */
static void
refused(const char *text)
{
	disconnect(true);
	if (strcmp(text, con.last_refusal) != 0)
	{
		ereport(LOG,
				(errmsg("pg_fanout %s does not consume", con.name),
				 errdetail("%s", text)));
		strlcpy(con.last_refusal, text, sizeof(con.last_refusal));
	}
	worker_set_error(text);
	worker_set_state(WORKER_REFUSED);
	con.conn.connect_at = mono_later(backoff(1000, con.refusals, MAX_REFUSED_MS));
	con.refusals++;
}

/* Takes a 403 for what it is, or lets a new login prove it. */
static void
access_refused(const char *text)
{
	if (connection_believes(&con.conn, &con.doubted, con.refusals > 0))
	{
		refused(text);
		return;
	}
	lose_deliveries();
	connection_log_in_anew(&con.conn, text);
}

static void
accepted(void)
{
	con.refusals = 0;
	con.doubted = 0;
	con.last_refusal[0] = '\0';
	connection_works(&con.conn);
}

static char *
error_text(const BrokerError *error)
{
	return error->code != 0 ? psprintf("%d %s", error->code, error->text) : pstrdup(error->text);
}

/* What a call that failed means. */
static void
call_failed(BrokerResult result, const BrokerError *error)
{
	if (result == BROKER_LOST)
		broker_failed(error->text);
	else if (error->code == BROKER_ACCESS_REFUSED)
		access_refused(error_text(error));
	else
		refused(error_text(error));
}

/* ---- settling ---- */

static bool
ack(uint64 tag, bool multiple)
{
	BrokerError error;
	BrokerResult result = broker_ack(con.conn.broker, tag, multiple, SETTLE_TIMEOUT_MS, &error);

	if (result == BROKER_OK)
		return true;
	call_failed(result, &error);
	return false;
}

/* Of what is in hand, but not being settled; all taken later have higher ones. */
static uint64
lowest_tag(void)
{
	uint64		lowest = PG_UINT64_MAX;

	for (const Delivery *delivery = con.first_ready; delivery != NULL; delivery = delivery->next)
		lowest = Min(lowest, delivery->tag);
	for (const OrderItem *item = con.order.first; item != NULL; item = item->next)
	{
		const Delivery *delivery = (const Delivery *) item;

		if (delivery->tag != 0)
			lowest = Min(lowest, delivery->tag);
	}
	for (int i = 0; i < con.ngathered; i++)
		lowest = Min(lowest, con.gathered[i]->tag);
	return lowest;
}

/*
 * One ack does for all that are lower than what stays in hand: one that waits
 * may be older than any of these, and an ack of it would lose it.
 */
static void
ack_all(const uint64 *tags, int n)
{
	uint64		limit = (n > 1) ? lowest_tag() : 0;
	uint64		highest = 0;

	for (int i = 0; i < n; i++)
	{
		if (tags[i] < limit)
			highest = Max(highest, tags[i]);
		else if (!ack(tags[i], false))
			return;
	}
	if (highest > 0)
		(void) ack(highest, true);
}

static void
log_failure(const Delivery *delivery)
{
	char		id[37];

	if (con.failure_log_at > mono_now())
		return;
	con.failure_log_at = mono_later(FAILURE_LOG_MS);
	msgid_format(&delivery->message_id, id);
	ereport(LOG,
			(errmsg("pg_fanout %s: handler failed on message %s", con.name, id),
			 errdetail("%s", delivery->error),
			 errhint("It is tried again; see fanout.delivery_failure. Further failures are logged once a minute.")));
}

static void
fail(Delivery *delivery)
{
	pg_atomic_fetch_add_u64(&worker_subscription->failed, 1);
	log_failure(delivery);
	delivery->state = DELIVERY_FAILED;
	drop_body(delivery);
	if (!delivery->order.pinned)
	{
		delivery->order.pinned = true;
		add_to_order(delivery);
		remember_failed(delivery);
	}
	count_blocked(delivery, 1);
	note_due(&con.next_due, delivery->due);
}

/* The other half is for what can be worked on. */
static size_t
memory_for_waiting(void)
{
	return (size_t) pgf_consumer_memory * 1024 / 2;
}

static void
wait_in_order(Delivery *delivery)
{
	delivery->state = DELIVERY_WAITING;
	if (con.bytes > memory_for_waiting())
		drop_body(delivery);
	if (delivery->order.pinned)
		delivery->order.waiting = true;
	else
		add_to_order(delivery);
	count_blocked(delivery, 1);
}

static void
announce_dead(const Delivery *delivery)
{
	char		id[37];

	msgid_format(&delivery->message_id, id);
	pg_atomic_fetch_add_u64(&worker_subscription->failed, 1);
	pg_atomic_fetch_add_u64(&worker_subscription->dead, 1);
	ereport(WARNING,
			(errmsg("pg_fanout %s: message %s goes to fanout.dead_letter", con.name, id),
			 errdetail("%s", delivery->error)));
}

/* Does what the outcome says; true: it is to be acked. */
static bool
settle(Delivery *delivery)
{
	switch (delivery->outcome)
	{
		case OUTCOME_APPLIED:
			pg_atomic_fetch_add_u64(&worker_subscription->applied, 1);
			return true;
		case OUTCOME_SEEN:
		case OUTCOME_TWIN:
			pg_atomic_fetch_add_u64(&worker_subscription->skipped, 1);
			return true;
		case OUTCOME_DEAD:
			announce_dead(delivery);
			return true;
		case OUTCOME_FAILED:
			fail(delivery);
			return false;
		case OUTCOME_BLOCKED:
			wait_in_order(delivery);
			return false;
		case OUTCOME_NONE:
			break;
	}
	elog(ERROR, "a delivery has no outcome");
	return false;
}

static void
settle_all(Delivery **deliveries, int n)
{
	uint64	   *tags = palloc((n + 1) * sizeof(uint64));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (!settle(deliveries[i]))
			continue;
		tags[count++] = deliveries[i]->tag;
		count_in_hand(deliveries[i], -1);
		forget(deliveries[i]);
	}
	ack_all(tags, count);
	pfree(tags);
}

/* ---- handling ---- */

static void
put_back_one(Delivery *delivery)
{
	Delivery   *before = NULL;
	Delivery   *after = con.first_ready;

	while (after != NULL && after->order.place < delivery->order.place)
	{
		before = after;
		after = after->next;
	}
	delivery->state = DELIVERY_READY;
	delivery->next = after;
	if (before != NULL)
		before->next = delivery;
	else
		con.first_ready = delivery;
	if (after == NULL)
		con.last_ready = delivery;
	con.nready++;
}

/*
 * In their places, mostly before all others: what is in no list would be lost
 * sight of when the connection is.
 */
static void
put_back(Delivery **deliveries, int n)
{
	for (int i = n - 1; i >= 0; i--)
		put_back_one(deliveries[i]);
}

/* Nothing was done, and nothing can be; true if so. */
static bool
cannot_handle(HandlerResult result, Delivery **deliveries, int n)
{
	if (result == HANDLER_ENDED)
		worker_end(WORKER_TERMINATED);
	if (result != HANDLER_UNUSABLE)
		return false;
	put_back(deliveries, n);
	refused(con.row.problem);
	return true;
}

static void
record(Delivery *delivery)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	worker_begin();
	if (delivery->outcome == OUTCOME_DEAD)
	{
		inbox_bury(&con.row, delivery);
		inbox_record(con.row.subscription_id, &delivery, 1);
	}
	else
		inbox_record_failure(con.row.subscription_id, delivery);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	delivery->known = true;
}

/* An attempt has failed, and its transaction is over. */
static void
record_failure(Delivery *delivery)
{
	delivery->outcome = (delivery->attempts >= con.row.max_attempts) ? OUTCOME_DEAD : OUTCOME_FAILED;
	handler_schedule(&con.row, delivery);
	record(delivery);
}

/* Should the process end, this is what is known. */
static void
record_attempt(Delivery *delivery)
{
	if (delivery->error != NULL)
		pfree(delivery->error);
	delivery->error = MemoryContextStrdup(con.deliveries, "the worker ended while the handler ran");
	strlcpy(delivery->sqlstate, "57P01", sizeof(delivery->sqlstate));
	handler_schedule(&con.row, delivery);
	delivery->outcome = OUTCOME_FAILED;
	record(delivery);
}

static void
handle_singly(Delivery *delivery)
{
	HandlerResult result;
	bool		exhausted = delivery->attempts >= con.row.max_attempts;

	if (order_blocks(&con.order, &delivery->order))
	{
		wait_in_order(delivery);
		return;
	}
	if (exhausted)
		record_failure(delivery);
	else
	{
		delivery->attempts++;
		if (delivery->suspect || delivery->known)
			record_attempt(delivery);
		result = handler_apply(&con.row, &delivery, 1, HANDLER_TOGETHER);
		if (cannot_handle(result, &delivery, 1))
			return;
		if (result == HANDLER_ERROR)
			record_failure(delivery);
	}
	settle_all(&delivery, 1);
}

static void
handle_batch(Delivery **deliveries, int n)
{
	HandlerResult result = handler_apply(&con.row, deliveries, n, HANDLER_TOGETHER);

	if (result == HANDLER_ERROR && n > 1)
		result = handler_apply(&con.row, deliveries, n, HANDLER_SAVEPOINTS);
	if (cannot_handle(result, deliveries, n))
		return;
	if (result == HANDLER_COMMITTED)
	{
		settle_all(deliveries, n);
		return;
	}
	if (n == 1)
	{
		deliveries[0]->attempts++;
		record_failure(deliveries[0]);
		settle_all(deliveries, 1);
		return;
	}
	put_back(deliveries, n);
	while (n-- > 0 && con.first_ready != NULL)
		handle_singly(take_ready());
}

static bool
goes_alone(const Delivery *delivery)
{
	return delivery->suspect || delivery->attempts > 0;
}

/*
 * The next to be handled with others, or NULL.  One of its key may have failed
 * since it came.
 */
static Delivery *
next_of_batch(void)
{
	while (con.first_ready != NULL && !goes_alone(con.first_ready))
	{
		Delivery   *delivery = take_ready();

		if (!order_blocks(&con.order, &delivery->order))
			return delivery;
		wait_in_order(delivery);
	}
	return NULL;
}

static bool
memory_full(void)
{
	return con.bytes >= (size_t) pgf_consumer_memory * 1024;
}

/* Those that wait leave too little room for others. */
static bool
crowded(void)
{
	return con.consuming && con.blocked_now * 2 >= con.row.prefetch && con.blocked < MAX_WAITING;
}

/* All that the prefetch allows, so that nothing is on its way. */
static bool
all_has_come(void)
{
	return con.in_hand_now >= con.row.prefetch;
}

/*
 * What is on its way when a consumer is cancelled goes back to the queue, and
 * comes after newer messages.  So before room is made, nothing is acked until
 * all has come; or for ROOM_MS, since the queue may have no more.
 */
static bool
await_room(void)
{
	if (!con.row.ordered || !crowded() || memory_full())
	{
		con.room_until = 0;
		return false;
	}
	if (con.room_until == 0)
		con.room_until = mono_later(ROOM_MS);
	if (con.room_until > mono_now())
		return true;
	con.room_until = 0;
	return false;
}

static int
batch_limit(void)
{
	return Max(BATCH_MIN, Min(con.row.prefetch / 4, BATCH_MAX));
}

static bool
handle_ready(void)
{
	Delivery  **deliveries;
	Delivery   *next;
	int			n = 0;

	if (con.first_ready == NULL || con.conn.broker == NULL || con.gathering || await_room())
		return false;
	worker_set_state(WORKER_CONSUMING);
	if (goes_alone(con.first_ready))
	{
		handle_singly(take_ready());
		return true;
	}
	deliveries = palloc(Min(con.nready, batch_limit()) * sizeof(Delivery *));
	while (n < batch_limit() && (next = next_of_batch()) != NULL)
		deliveries[n++] = next;
	if (n > 0)
		handle_batch(deliveries, n);
	return true;
}

/* ---- what waits ---- */

/* Back to the queue, to come again at once.  False: the connection is lost. */
static bool
give_back(Delivery *delivery)
{
	BrokerError error;
	BrokerResult result;

	count_blocked(delivery, -1);
	result = broker_requeue(con.conn.broker, delivery->tag, SETTLE_TIMEOUT_MS, &error);
	delivery->tag = 0;
	count_in_hand(delivery, -1);
	set_away(delivery);
	if (result == BROKER_OK)
		return true;
	call_failed(result, &error);
	return false;
}

static bool
give_back_due(MonoTime now)
{
	bool		any = false;
	OrderItem  *item = con.order.first;

	if (con.next_due == 0 || con.next_due > now || !con.consuming)
		return false;
	con.next_due = 0;
	for (; item != NULL; item = item->next)
	{
		Delivery   *delivery = (Delivery *) item;

		if (delivery->state != DELIVERY_FAILED)
			continue;
		if (delivery->due > now)
			note_due(&con.next_due, delivery->due);
		else if (!give_back(delivery))
			return true;
		else
			any = true;
	}
	return any;
}

/* Somebody else has them, or they were purged: nobody waits for them any more. */
static void
give_up_gone(MonoTime now)
{
	OrderItem  *next;

	if (con.next_gone == 0 || con.next_gone > now || !con.consuming)
		return;
	con.next_gone = 0;
	for (OrderItem *item = con.order.first; item != NULL; item = next)
	{
		Delivery   *delivery = (Delivery *) item;
		MonoTime	gone;

		next = item->next;
		if (delivery->state != DELIVERY_AWAY)
			continue;
		gone = mono_plus(Max(delivery->away_since, con.consuming_since), AWAY_TIMEOUT_MS);
		if (gone > now)
		{
			note_due(&con.next_gone, gone);
			continue;
		}
		if (!delivery->known)
		{
			forget(delivery);
			continue;
		}
		order_remove(&con.order, item);
		delivery->order.pinned = false;
		delivery->state = DELIVERY_GONE;
	}
}

/*
 * Its body was let go: it has to come again, and keeps its place.  So that this
 * does not take a while for each of a key, those behind it are called, too, as
 * many as there is room for.
 */
static OrderVerdict
call_back(Delivery *delivery, size_t *room)
{
	delivery->state = DELIVERY_FAILED;
	delivery->due = mono_now();
	note_due(&con.next_due, delivery->due);
	if (!delivery->order.pinned)
	{
		delivery->order.pinned = true;
		remember_failed(delivery);
	}
	if (*room < delivery->size)
		return ORDER_STAYS;
	*room -= delivery->size;
	return ORDER_STAYS_ALONE;
}

static OrderVerdict
release(OrderItem *item, void *arg)
{
	Delivery   *delivery = (Delivery *) item;

	item->waiting = false;
	if (delivery->wire == NULL)
		return call_back(delivery, arg);
	count_blocked(delivery, -1);
	con.released[con.nreleased++] = delivery;
	return item->pinned ? ORDER_STAYS : ORDER_LEAVES;
}

/*
 * They come before what is ready, which came later.  Whether that has to wait
 * is not decided before its turn: else it might be put before what came before
 * it.
 */
static void
release_waiting(void)
{
	size_t		room = memory_for_waiting();

	room -= Min(room, con.bytes);
	con.released = palloc((con.order.count + 1) * sizeof(Delivery *));
	con.nreleased = 0;
	order_release(&con.order, release, &room);
	put_back(con.released, con.nreleased);
	pfree(con.released);
}

/* ---- deliveries ---- */

/* One that failed has come again. */
static void
came_again(Delivery *delivery, BrokerDelivery *wire)
{
	delivery->wire = wire;
	delivery->size = wire->size;
	delivery->tag = wire->tag;
	delivery->epoch = con.epoch;
	count_in_hand(delivery, 1);
	con.bytes += wire->size;
	if (delivery->state == DELIVERY_GONE)
	{
		delivery->order.pinned = true;
		add_to_order(delivery);
	}
	if (delivery->due <= mono_now())
	{
		append_ready(delivery);
		return;
	}
	delivery->state = DELIVERY_FAILED;
	drop_body(delivery);
	count_blocked(delivery, 1);
	note_due(&con.next_due, delivery->due);
}

/*
 * Suspect is what the broker delivers again first, after a process that ended
 * while a handler ran.  How many that process had in hand is not known: with
 * those that waited, more than the prefetch.
 */
static bool
is_suspect(const BrokerDelivery *wire)
{
	if (!wire->redelivered)
		con.suspicious = false;
	return con.suspicious;
}

static int
compare_sequences(const void *a, const void *b)
{
	const Delivery *left = *(Delivery *const *) a;
	const Delivery *right = *(Delivery *const *) b;

	if (left->sequence != right->sequence)
		return left->sequence < right->sequence ? -1 : 1;
	return left->tag < right->tag ? -1 : 1;
}

/*
 * After several ends in a row the broker delivers again in another order than
 * the first time: what it had taken back already goes before what it takes
 * back later.  The header "sequence" tells what was first.
 */
static void
end_gathering(void)
{
	if (!con.gathering)
		return;
	con.gathering = false;
	qsort(con.gathered, con.ngathered, sizeof(Delivery *), compare_sequences);
	for (int i = 0; i < con.ngathered; i++)
		append_ready(con.gathered[i]);
	con.ngathered = 0;
}

/*
 * With those that waited, the one before had more in hand than its prefetch.
 * So as long as only such come, one prefetch after the other is taken.
 */
static bool
gathered_all(void)
{
	bool		full = all_has_come() && con.ngathered < GATHER_MAX && !memory_full();

	if (!con.gathering || (!full && !memory_full() && con.gather_until > mono_now()))
		return false;
	if (full)
	{
		consume_anew();
		con.gather_until = mono_later(GATHER_MS);
	}
	else
		end_gathering();
	return true;
}

/* More than the prefetches that were asked for can be. */
static bool
too_many(void)
{
	return con.in_hand >= 2 * (MAX_WAITING + con.row.prefetch);
}

static void
delivered(BrokerDelivery *wire)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(con.deliveries);
	Delivery   *delivery = delivery_new(wire, con.row.queue, con.row.ordered);
	Delivery   *failed = find_failed(&delivery->message_id);

	MemoryContextSwitchTo(oldcontext);
	pg_atomic_fetch_add_u64(&worker_subscription->delivered, 1);
	if (failed != NULL)
	{
		delivery->wire = NULL;
		delivery_free(delivery);
		if (failed->tag == 0)
			came_again(failed, wire);
		else
		{
			/* a repeat of one in hand, which is enough */
			uint64		tag = wire->tag;

			broker_free_delivery(wire);
			pg_atomic_fetch_add_u64(&worker_subscription->skipped, 1);
			(void) ack(tag, false);
		}
		return;
	}
	delivery->epoch = con.epoch;
	delivery->suspect = is_suspect(wire);
	count_in_hand(delivery, 1);
	con.bytes += wire->size;
	if (con.gathering && wire->redelivered && con.ngathered < GATHER_MAX)
	{
		con.gathered[con.ngathered++] = delivery;
		con.gather_until = mono_later(GATHER_MS);
		return;
	}
	end_gathering();
	append_ready(delivery);
}

static void
channel_closed(const BrokerEvent *event)
{
	char	   *text = psprintf("%d %s", event->code, event->text);

	if (event->code == BROKER_ACCESS_REFUSED)
		access_refused(text);
	else
		refused(text);
}

static void
handle_event(BrokerEvent *event)
{
	switch (event->type)
	{
		case BROKER_DELIVERY:
			if (event->delivery == NULL)
				break;
			if (too_many())
			{
				broker_free_delivery(event->delivery);
				broker_failed("the broker delivers more than was asked for");
			}
			else
				delivered(event->delivery);
			break;
		case BROKER_CANCELLED:
			refused("the broker cancelled the consumer: its queue was deleted, or is not available");
			break;
		case BROKER_CHANNEL_CLOSED:
			channel_closed(event);
			break;
		case BROKER_DISCONNECTED:
			broker_failed(event->text);
			break;
		default:
			break;
	}
}

/*
 * As much as may be in memory, but something in any case.  Returns false if
 * all that the broker has said is taken.
 */
static bool
take_events(void)
{
	BrokerEvent event;

	for (int i = 0; i < EVENTS_AT_ONCE && con.conn.broker != NULL &&
		 ((con.nready == 0 && con.ngathered == 0) || !memory_full()); i++)
	{
		broker_next_event(con.conn.broker, &event);
		if (event.type == BROKER_NOTHING)
			return false;
		if (event.type == BROKER_MORE)
			return true;
		handle_event(&event);
	}
	return con.conn.broker != NULL;
}

/* ---- consuming ---- */

static bool
inspect_queue(uint32_t *messages, uint32_t *consumers, BrokerError *error, BrokerResult *result)
{
	*result = broker_inspect_queue(con.conn.broker, con.row.queue, messages, consumers, error);
	con.inspect_at = mono_later(INSPECT_MS);
	if (*result != BROKER_OK)
		return false;
	pg_atomic_write_u64(&worker_subscription->lag, (uint64) *messages + 1);
	return true;
}

/* As fanout.declare_binding() would. */
static BrokerResult
declare_queue(BrokerError *error)
{
	BrokerField arguments[2] = {
		{.name = "x-queue-type",.type = BROKER_VALUE_STRING},
		{.name = "x-delivery-limit",.type = BROKER_VALUE_INT},
	};
	BrokerResult result;

	arguments[0].value.string.data = "quorum";
	arguments[0].value.string.len = strlen("quorum");
	arguments[1].value.integer = NO_DELIVERY_LIMIT;
	result = broker_declare_exchange(con.conn.broker, con.row.exchange, error);
	if (result == BROKER_OK)
		result = broker_declare_queue(con.conn.broker, con.row.queue, arguments, lengthof(arguments), error);
	if (result == BROKER_OK)
		result = broker_bind_queue(con.conn.broker, con.row.queue, con.row.exchange, error);
	return result;
}

/* This database's publisher declares it, with the arguments that were given. */
static bool
publisher_declares(void)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		result;

	worker_begin();
	result = inbox_binding_exists(con.row.topic, con.row.consumer_group);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	return result;
}

static void
ask_publisher(void)
{
	DatabaseSlot *slot = shmem_my_slot();

	if (slot == NULL)
		return;
	pg_atomic_fetch_add_u64(&slot->verify_requested, 1);
	shmem_wake_publisher(slot);
}

/*
 * Waits until nobody else consumes, or PREDECESSOR_MS: then it is another
 * member of the group.  If nobody does since the queue has no leader, a message
 * or LEADER_MS is waited for first.  Interruptible.
 */
static bool
await_predecessor(uint32_t messages, uint32_t consumers)
{
	MonoTime	gone_until = mono_later(PREDECESSOR_MS);
	MonoTime	leader_until = mono_later(LEADER_MS);
	BrokerError error;
	BrokerResult result;

	while (con.row.ordered &&
		   ((consumers > 0 && mono_now() < gone_until) ||
			(consumers == 0 && messages == 0 && mono_now() < leader_until)))
	{
		(void) worker_wait(-1, false, PREDECESSOR_LOOK_MS);
		if (!inspect_queue(&messages, &consumers, &error, &result))
		{
			call_failed(result, &error);
			return false;
		}
	}
	return true;
}

/* Sees to it that the queue is there; one that is, is taken as it is. */
static bool
find_queue(void)
{
	uint32_t	messages;
	uint32_t	consumers;
	BrokerError error;
	BrokerResult result;

	if (inspect_queue(&messages, &consumers, &error, &result))
		return await_predecessor(messages, consumers);
	if (result == BROKER_REFUSED && error.code == 404)
	{
		if (publisher_declares())
			ask_publisher();
		else
			result = declare_queue(&error);
		if (result == BROKER_OK)
			return true;
	}
	call_failed(result, &error);
	return false;
}

static bool
consume(void)
{
	BrokerError error;
	BrokerResult result;

	con.epoch++;
	con.blocked_now = con.in_hand_now = 0;
	con.room_until = 0;
	snprintf(con.tag, sizeof(con.tag), "pg_fanout-%u", con.epoch);
	result = broker_consume(con.conn.broker, con.row.queue, con.tag, con.row.prefetch, &error);
	if (result == BROKER_OK)
		return true;
	call_failed(result, &error);
	return false;
}

/* What is in hand stays in hand, and uses up no prefetch any more. */
static void
consume_anew(void)
{
	BrokerError error;
	BrokerResult result = broker_cancel(con.conn.broker, con.tag, &error);

	if (result == BROKER_OK)
		(void) consume();
	else
		call_failed(result, &error);
}

static bool
make_room(void)
{
	if (!crowded() || (con.row.ordered && !all_has_come()))
		return false;
	consume_anew();
	return true;
}

static void
begin_consuming(void)
{
	if (!find_queue() || !consume())
		return;
	con.consuming = true;
	con.consuming_since = mono_now();
	con.gathering = con.row.ordered;
	con.gather_until = mono_later(GATHER_MS);
	accepted();
	worker_set_state(WORKER_IDLE);
}

/* Not before there is a handler to give deliveries to. */
static void
connect_broker(void)
{
	if (!handler_refresh(&con.row, con.subscription_id, con.row_context))
		worker_end(WORKER_TERMINATED);
	if (con.row.problem != NULL)
	{
		refused(con.row.problem);
		return;
	}
	if (!connection_open(&con.conn))
		return;
	if (con.conn.logins > 1)
		pg_atomic_fetch_add_u64(&worker_subscription->reconnects, 1);
	begin_consuming();
}

/* ---- dead letters ---- */

static bool
take_redriven(Redriven *redriven)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		found;

	worker_begin();
	found = inbox_take_redriven(&con.row, oldcontext, redriven);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	return found;
}

static void
redrive(Redriven *redriven)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	char		sqlstate[6];
	char	   *error;
	HandlerResult result = handler_redrive(&con.row, redriven, sqlstate, &error);

	if (result == HANDLER_COMMITTED)
	{
		pg_atomic_fetch_add_u64(&worker_subscription->applied, 1);
		return;
	}
	if (cannot_handle(result, NULL, 0))
	{
		strlcpy(sqlstate, "55000", sizeof(sqlstate));
		error = con.row.problem;
	}
	pg_atomic_fetch_add_u64(&worker_subscription->failed, 1);
	worker_begin();
	inbox_record_redriven(redriven->dead_id, sqlstate, error);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
}

static bool
redrive_dead(void)
{
	Redriven	redriven;

	if (pg_atomic_read_u32(&worker_subscription->dirty) == 0 || con.row.problem != NULL)
		return false;
	pg_atomic_write_u32(&worker_subscription->dirty, 0);
	pg_memory_barrier();
	if (!take_redriven(&redriven))
		return false;
	/* there may be more: one at a time, between deliveries */
	pg_atomic_write_u32(&worker_subscription->dirty, 1);
	redrive(&redriven);
	return true;
}

/* ---- the loop ---- */

static void
use_settings(void)
{
	if (!connection_settings_changed(&con.conn))
		return;
	disconnect(true);
	connection_use_settings(&con.conn);
}

static void
work_by_the_clock(void)
{
	MonoTime	now = mono_now();
	uint32_t	messages;
	uint32_t	consumers;
	BrokerError error;
	BrokerResult result;

	connection_lasts(&con.conn, now);
	give_up_gone(now);
	if (con.consuming && con.inspect_at <= now && !inspect_queue(&messages, &consumers, &error, &result))
		call_failed(result, &error);
}

static bool
work(void)
{
	bool		any = false;

	if (worker_reloaded())
		use_settings();
	if (con.conn.broker == NULL && con.conn.connect_at <= mono_now())
	{
		connect_broker();
		any = true;
	}
	any = take_events() || any;
	any = gathered_all() || any;
	any = make_room() || any;
	any = handle_ready() || any;
	if (con.order.stale)
	{
		release_waiting();
		any = true;
	}
	any = give_back_due(mono_now()) || any;
	any = redrive_dead() || any;
	work_by_the_clock();
	return any;
}

static void
earlier(long *timeout, MonoTime now, MonoTime when)
{
	if (when != 0)
		*timeout = Min(*timeout, mono_left(now, when));
}

static void
wait_for_work(void)
{
	MonoTime	now = mono_now();
	long		timeout = 60000;
	int			fd = -1;

	if (con.conn.broker != NULL)
	{
		fd = broker_fd(con.conn.broker);
		timeout = Min(timeout, broker_next_heartbeat(con.conn.broker));
		worker_set_state(WORKER_IDLE);
	}
	else
		earlier(&timeout, now, Max(con.conn.connect_at, 1));
	if (con.consuming)
	{
		earlier(&timeout, now, con.next_due);
		earlier(&timeout, now, con.next_gone);
		earlier(&timeout, now, con.inspect_at);
		if (con.gathering)
			earlier(&timeout, now, con.gather_until);
		if (con.first_ready != NULL)
			earlier(&timeout, now, con.room_until);
	}
	(void) worker_wait(fd, false, timeout);
}

/* What failed before has its place before all that comes. */
static void
load_failures(void)
{
	Delivery  **failures;
	int			n;

	worker_begin();
	failures = inbox_load_failures(con.subscription_id, con.row.ordered, con.deliveries, &n);
	worker_commit();
	for (int i = 0; i < n; i++)
	{
		failures[i]->order.pinned = true;
		set_away(failures[i]);
		add_to_order(failures[i]);
		remember_failed(failures[i]);
	}
	pfree(failures);
}

static void
take_over(void)
{
	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	con.subscription_id = worker_subscription->subscription.subscription_id;
	con.suspicious = !worker_subscription->clean;
	worker_subscription->clean = false;
	LWLockRelease(pgf_shared->lock);
	pg_atomic_write_u32(&worker_subscription->waiting, 0);
}

static void
start(void)
{
	HASHCTL		ctl = {0};

	con.deliveries = AllocSetContextCreate(TopMemoryContext, "pg_fanout deliveries", ALLOCSET_DEFAULT_SIZES);
	con.row_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout subscription", ALLOCSET_SMALL_SIZES);
	ctl.keysize = sizeof(pg_uuid_t);
	ctl.entrysize = sizeof(FailedEntry);
	con.gathered = MemoryContextAllocHuge(TopMemoryContext, GATHER_MAX * sizeof(Delivery *));
	con.failed = hash_create("pg_fanout failures", 64, &ctl, HASH_ELEM | HASH_BLOBS);
	order_init(&con.order);
	handler_init();
	take_over();
	if (!handler_refresh(&con.row, con.subscription_id, con.row_context))
		worker_end(WORKER_TERMINATED);
	snprintf(con.name, sizeof(con.name), "consumer of %s", con.row.queue ? con.row.queue : "(null)");
	snprintf(con.connection_name, sizeof(con.connection_name), "pg_fanout consumer %s/%s",
			 con.row.topic, con.row.consumer_group);
	load_failures();
	connection_init(&con.conn, con.name, con.connection_name);
	con.conn.options.consumer = true;
	use_settings();
}

/*
 * What is in hand goes back to the queue.  The next worker is told whether a
 * handler was running.
 */
static void
say_goodbye(int code, Datum arg)
{
	if (worker_subscription != NULL && !handler_running())
	{
		LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
		worker_subscription->clean = true;
		LWLockRelease(pgf_shared->lock);
	}
	if (con.conn.broker != NULL)
		broker_close(con.conn.broker, true);
	con.conn.broker = NULL;
}

void
pg_fanout_consumer_main(Datum main_arg)
{
	worker_attach(main_arg, "consumer");
	before_shmem_exit(say_goodbye, (Datum) 0);

	worker_run(start, work, wait_for_work);
}
