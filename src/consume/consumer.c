/*-------------------------------------------------------------------------
 *
 * consumer.c
 *		The worker that consumes one subscription's queue.
 *
 * One loop, each round of which does whatever can be done without waiting:
 *
 *		connect -> queue there? handler there? -> consume -> take deliveries
 *		-> apply a batch of them, and ack -> apply what is due in the waiting room
 *
 * and then waits for the first of: the latch (a request), the broker's socket,
 * the next thing due by the clock.
 *
 *		           connected,                 all of it came
 *		           queue found                (or GATHER_MS)
 *		APART ------------------> GATHERING ------------------> CONSUMING
 *		  ^                            |                            |
 *		  '---- connection lost, or refused (queue, handler) -------'
 *
 *		connect_broker()          end_gathering()
 *		lose_deliveries()
 *
 * A delivery is acked once its transaction is committed, whether it was applied
 * or stored in the waiting room; so nothing stays unacked for longer than it waits for
 * its turn (at_hand.c).
 *
 * What the worker before had at hand is delivered again, perhaps in another order
 * and after newer messages.  So at first all that comes again is gathered, and put
 * in order by the header "sequence".
 *
 * A delivery is stored in the waiting room, untried, if it may have ended the process
 * before (caution.c), or is near the delivery limit of its queue (queue.c), because the
 * queue might drop it otherwise.
 *
 * If messages of many keys fail in a row with the same error, the breaker opens
 * (breaker.c): the subscription is refused, its deliveries go back to the queue, and
 * at growing pauses it connects to consume a single one, or one from the waiting
 * room, as a probe.
 *
 * Losing the connection loses nothing: what was not acked comes again, and
 * inbox and waiting room know what was done.  The waiting room is worked on without
 * a connection, too.
 *
 * A stream is read from a position that is kept with the effects (stream.c): what comes
 * is in order, nothing is gathered or given back, and an ack only lets more come.
 *
 * Must never: ack before the commit, or have a transaction open while the broker is
 * waited for.
 *
 * An error in here (not one of a handler) ends the process, and the launcher starts
 * it again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "broker/connection.h"
#include "capture/msgid.h"
#include "consume/apply.h"
#include "consume/at_hand.h"
#include "consume/breaker.h"
#include "consume/caution.h"
#include "consume/consumer.h"
#include "consume/delivery.h"
#include "consume/handler.h"
#include "consume/queue.h"
#include "consume/stream.h"
#include "consume/waiting.h"
#include "server/guc.h"
#include "server/monotime.h"
#include "server/worker.h"

/*
 * Most messages in one transaction: a quarter of the prefetch, so that the
 * next ones come while these are handled and acked; within these bounds.
 */
#define BATCH_MIN 100
#define BATCH_MAX 1000

/* How long a transaction goes on taking messages; less with a short heartbeat. */
#define BATCH_MS 1000

/*
 * A delivery takes this much memory at least.  The broker is asked for no more of
 * them than fit into consumer_memory.
 */
#define DELIVERY_BYTES 1024

/*
 * What is at hand should be done with in this time, as calls go; otherwise most of it
 * goes back to the queue.  The broker closes the channel of a consumer that keeps a
 * delivery for longer than its consumer_timeout, 30 minutes by default.
 */
#define AT_HAND_MS (5 * 60 * 1000)

/* Bounds one ack or nack without progress; SIGTERM is taken meanwhile. */
#define SETTLE_TIMEOUT_MS 30000

/* What is delivered again is gathered until nothing came for so long. */
#define GATHER_MS 500

/* A probe is a delivery; if none has come for so long, one from the waiting room. */
#define PROBE_WAIT_MS 1000

/* Reasons to refuse a subscription whose queue has another type than it expects. */
#define NO_STREAM "the queue is no stream, and start_at was given for it"
#define IS_STREAM "the queue is a stream; use fanout.alter_subscription() with start_at to read it"

#define PRECONDITION_FAILED 406

/* How often the depth of the queue is looked at. */
#define INSPECT_MS 5000

#define MAX_REFUSED_MS 30000

/* Failures are logged no more often. */
#define FAILURE_LOG_MS 60000

#define EVENTS_AT_ONCE 10000

/* While deliveries are at hand, what is due in the waiting room is tried so often. */
#define DUE_PAUSE_MS 100
#define IMPATIENT_PAUSE_MS 10000

/* Whether others have let go of dead letters that are to be tried is looked at so often. */
#define REDRIVE_LOCKED_MS 1000

typedef enum Phase
{
	APART,						/* nothing is consumed */
	GATHERING,					/* what was delivered before comes again */
	CONSUMING,
} Phase;

typedef struct Consumer
{
	Connection	conn;
	int32		subscription_id;
	SubscriptionRow row;
	MemoryContext row_context;
	char		name[300];		/* for log messages */
	char		connection_name[300];

	/* consuming */
	Phase		phase;
	int			prefetch;		/* that the broker was asked for */
	uint32		consumed;		/* deliveries since then */
	int			refusals;		/* in a row */
	uint32		doubted;		/* for connection_believes() */
	char		last_refusal[600];	/* so that it is logged once */
	MonoTime	inspect_at;
	MonoTime	gather_until;
	MemoryContext deliveries;	/* of those at hand */

	/* applying */
	Breaker		breaker;
	char		broken[512];	/* what it opened with; "": that was told */
	MonoTime	probe_room_at;	/* while it is open: no delivery has come */
	MonoTime	due_at;			/* what is due was last tried; 0: never */
	MonoTime	failure_log_at; /* no sooner */
	MonoTime	redrive_at;		/* there may be dead letters to be tried; 0:
								 * there are none */
} Consumer;

static Consumer con;

/* Shows a state; while only probes are made it is REFUSED, whatever they do. */
static void
set_state(WorkerState state)
{
	worker_set_state(con.breaker.open ? WORKER_REFUSED : state);
}

static bool
reads_stream(void)
{
	return con.row.start_kind != STREAM_NONE;
}

static bool
memory_full(void)
{
	return at_hand.bytes >= (size_t) pgf_consumer_memory * 1024;
}

/* ---- losing the connection ---- */

/* All that is at hand comes again. */
static void
lose_deliveries(void)
{
	at_hand_lose();
	con.phase = APART;
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

/* One ack does for all that are lower than what stays at hand. */
static void
ack_all(const uint64 *tags, int n)
{
	uint64		limit = (n > 1) ? at_hand_lowest_tag() : 0;
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

/* Tells the breaker what has become of a message. */
static void
tell_breaker(const Delivery *delivery)
{
	uint64		key;

	if (delivery->outcome == OUTCOME_APPLIED)
	{
		breaker_success(&con.breaker);
		return;
	}
	if (!delivery->breaks && !con.breaker.open)
		return;
	memcpy(&key, delivery->message_id.data, sizeof(key));
	if (delivery->order.nkeys > 0)
		key = delivery->order.keys[0];
	if (breaker_failure(&con.breaker, delivery->sqlstate, key))
		worker_copy_text(con.broken, psprintf("messages of %d keys failed with SQLSTATE %s in a row, the last one: %s",
											  BREAKER_FAILURES, delivery->sqlstate, delivery->error), sizeof(con.broken));
}

/*
 * Counts and announces what has become of a message, and tells the breaker if it
 * was tried.
 */
static void
report(const Delivery *delivery)
{
	if (delivery->outcome == OUTCOME_APPLIED || delivery->outcome == OUTCOME_FAILED ||
		delivery->outcome == OUTCOME_DEAD)
		tell_breaker(delivery);
	switch (delivery->outcome)
	{
		case OUTCOME_APPLIED:
			pg_atomic_fetch_add_u64(&worker_subscription->applied, 1);
			break;
		case OUTCOME_SEEN:
			pg_atomic_fetch_add_u64(&worker_subscription->skipped, 1);
			break;
		case OUTCOME_DEAD:
			announce_dead(delivery);
			break;
		case OUTCOME_FAILED:
			pg_atomic_fetch_add_u64(&worker_subscription->failed, 1);
			log_failure(delivery);
			break;
		case OUTCOME_BEHIND:
		case OUTCOME_EARLY:
		case OUTCOME_NONE:
			break;
	}
}

/* Is it to be given back to the queue, when it is due? */
static bool
goes_back(const Delivery *delivery, bool stored)
{
	return delivery->outcome == OUTCOME_EARLY ||
		(con.row.requeue && !stored && delivery->outcome == OUTCOME_FAILED);
}

/*
 * Acks what has an outcome, but what failed and is to be given back to the queue;
 * what has none is at hand again, in its place.
 */
static void
settle(Delivery **deliveries, int n, bool stored)
{
	uint64	   *tags = palloc((n + 1) * sizeof(uint64));
	int			count = 0;

	/* no line in the log is to end the process before the ack */
	HOLD_INTERRUPTS();
	for (int i = n - 1; i >= 0; i--)
	{
		if (deliveries[i]->outcome == OUTCOME_NONE)
			at_hand_put_back(&deliveries[i], 1);
	}
	for (int i = 0; i < n; i++)
	{
		if (deliveries[i]->outcome == OUTCOME_NONE)
			continue;
		report(deliveries[i]);
		if (goes_back(deliveries[i], stored))
		{
			at_hand_hold(deliveries[i]);
			continue;
		}
		tags[count++] = deliveries[i]->tag;
		delivery_free(deliveries[i]);
	}
	RESUME_INTERRUPTS();
	ack_all(tags, count);
	worker_keep_socket(false);
	pfree(tags);
}

/* ---- batches ---- */

static int
batch_limit(void)
{
	return Max(BATCH_MIN, Min(con.row.prefetch / 4, BATCH_MAX));
}

static void
prepare_batch(Batch *batch, Delivery **deliveries)
{
	memset(batch, 0, sizeof(*batch));
	batch->deliveries = deliveries;
	batch->probe = con.breaker.open;
	batch->limit_ms = BATCH_MS;
	if (con.conn.options.heartbeat_s > 0)
		batch->limit_ms = Min(BATCH_MS, con.conn.options.heartbeat_s * 1000L / 3);
	caution_prepare(batch);
}

/*
 * After a batch: if the breaker has opened and nothing after that has succeeded, or a
 * probe has failed, nothing is consumed for a while; if a probe has succeeded, all is
 * as before.
 */
static void
heed_breaker(bool was_open)
{
	if (con.broken[0] != '\0' && con.breaker.open)
	{
		refused(con.broken);
		con.conn.connect_at = mono_later(backoff(1000, con.breaker.probes, MAX_REFUSED_MS));
	}
	else if (was_open && !con.breaker.open)
	{
		disconnect(true);
		con.conn.connect_at = 0;
		con.last_refusal[0] = '\0';
	}
	con.broken[0] = '\0';
}

/* Nothing was done, and nothing can be; true if so. */
static bool
cannot_apply(ApplyResult result)
{
	if (result == APPLY_ENDED)
		worker_end(WORKER_TERMINATED);
	if (result != APPLY_UNUSABLE)
		return false;
	refused(con.row.problem);
	return true;
}

/* ---- applying deliveries ---- */

/*
 * May a delivery have ended the process before, or is it near the limit of its
 * queue?  Then it must not stay unacked.  A stream does not tell what was delivered
 * before: that is what comes first.
 */
static bool
must_store(const Delivery *delivery)
{
	if (reads_stream())
		return caution.suspects > 0;
	return delivery->wire->redelivered &&
		(caution.suspects > 0 || queue_near_limit(delivery->returned));
}

/*
 * Gives all that is at hand back to the queue, for the group, if it will take too
 * long; the next connection asks for less (see prefetch()).  Nobody else would get what
 * a stream has delivered.
 */
static void
give_back_excess(void)
{
	if (reads_stream() || at_hand.count <= 1 ||
		(int64) at_hand.count * caution.usual_us / 1000 <= AT_HAND_MS)
		return;
	disconnect(true);
	con.conn.connect_at = 0;
}

static bool
handle_deliveries(void)
{
	Batch		batch;
	bool		was_open = con.breaker.open;
	bool		store;
	ApplyResult result;

	if (at_hand.first == NULL || con.phase != CONSUMING)
		return false;
	set_state(WORKER_CONSUMING);
	store = must_store(at_hand.first);
	prepare_batch(&batch, palloc(batch_limit() * sizeof(Delivery *)));
	batch.n = at_hand_take(batch.deliveries, caution.alone > 0 || was_open ? 1 : batch_limit(), must_store, store);
	caution_taken(batch.n);
	result = store ? apply_store(&con.row, &batch) : apply_batch(&con.row, &batch);
	if (store && result == APPLY_COMMITTED)
		caution_stored(batch.n);
	if (result != APPLY_COMMITTED)
		at_hand_put_back(batch.deliveries, batch.n);
	if (cannot_apply(result))
		return true;
	if (result == APPLY_UNDONE)
		caution_undone(batch.n);
	else
		settle(batch.deliveries, batch.n, store);
	caution_learn(&batch);
	heed_breaker(was_open);
	give_back_excess();
	return true;
}

/* ---- giving back ---- */

/* Gives deliveries back to the queue that are due, for whoever takes them next. */
static bool
requeue_due(void)
{
	Delivery   *due = con.phase == APART ? NULL : at_hand_take_due(mono_now());
	bool		any = (due != NULL);
	BrokerResult result = BROKER_OK;

	while (due != NULL)
	{
		Delivery   *delivery = due;
		BrokerError error;

		due = delivery->next;
		if (result == BROKER_OK)
		{
			result = broker_requeue(con.conn.broker, delivery->tag, SETTLE_TIMEOUT_MS, &error);
			if (result != BROKER_OK)
				call_failed(result, &error);
		}
		delivery_free(delivery);
	}
	return any;
}

/* ---- applying what is due ---- */

/*
 * What is due is tried by and by, so that it makes batches, while there is something
 * at hand; and seldom while calls do not end in time.
 */
static bool
may_try_due(MonoTime now)
{
	if (waiting_room.stale || waiting_room.next_due == 0 || waiting_room.next_due > now || con.phase == GATHERING ||
		con.row.problem != NULL || con.row.drop_queue)
		return false;
	if (con.breaker.open)
		return con.phase == CONSUMING && at_hand.first == NULL && con.probe_room_at <= now;
	return at_hand.first == NULL ||
		mono_exceeds(con.due_at, now, caution_impatient() ? IMPATIENT_PAUSE_MS : DUE_PAUSE_MS);
}

static bool
handle_due(void)
{
	Batch		batch;
	bool		was_open = con.breaker.open;
	ApplyResult result;

	if (!may_try_due(mono_now()))
		return false;
	set_state(WORKER_CONSUMING);
	prepare_batch(&batch, palloc(batch_limit() * sizeof(Delivery *)));
	batch.from_room = true;
	batch.limit = batch_limit();
	batch.memory = (size_t) pgf_consumer_memory * 1024 / 2;
	batch.singly = caution_take_singly();
	result = apply_due(&con.row, &batch);
	con.due_at = mono_now();
	if (cannot_apply(result))
		return true;
	if (result == APPLY_UNDONE)
		caution_room_undone(batch.limit);
	else if (waiting_room.count == 0)
		caution_room_empty();
	for (int i = 0; i < batch.n; i++)
		report(batch.deliveries[i]);
	caution_learn(&batch);
	heed_breaker(was_open);
	return true;
}

/* Looks into the waiting room after somebody else has changed it. */
static bool
look_into_room(void)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	if (pg_atomic_exchange_u32(&worker_subscription->dirty, 0) != 0)
	{
		waiting_room.stale = true;
		con.redrive_at = mono_now();
	}
	if (waiting_room.recount_at != 0 && waiting_room.recount_at <= mono_now())
		waiting_room.stale = true;
	if (!waiting_room.stale)
		return false;
	worker_begin();
	waiting_look(&con.row);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	return true;
}

/* ---- what is delivered again at first ---- */

static void
end_gathering(void)
{
	if (con.phase != GATHERING)
		return;
	con.phase = CONSUMING;
	at_hand_sort(con.row.ordered);
}

/*
 * How many deliveries the broker may send: as declared, but no more than fit into
 * memory, or are done with in half of AT_HAND_MS; one, if it is to be a probe.
 */
static int
prefetch(void)
{
	int64		limit = pgf_consumer_memory / (DELIVERY_BYTES / 1024);

	if (con.breaker.open)
		return 1;
	if (caution.usual_us > 0)
		limit = Min(limit, AT_HAND_MS * INT64CONST(500) / caution.usual_us);
	return Max(1, Min(con.row.prefetch, limit));
}

static bool
gathered_all(void)
{
	if (con.phase != GATHERING ||
		(at_hand.count < con.prefetch && !memory_full() && con.gather_until > mono_now()))
		return false;
	end_gathering();
	return true;
}

/* ---- deliveries ---- */

/* Once all that was delivered before has come, the process ended in none of the rest. */
static void
nothing_suspect(void)
{
	if (at_hand.first == NULL || !must_store(at_hand.first))
		caution_nothing_suspect();
}

static Delivery *
read_delivery(BrokerDelivery *wire)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(con.deliveries);
	Delivery   *delivery = delivery_new(wire, con.row.queue, con.row.ordered);

	MemoryContextSwitchTo(oldcontext);
	return delivery;
}

/* Takes over a delivery of a stream, or passes over it. */
static void
delivered_of_stream(BrokerDelivery *wire)
{
	Delivery   *delivery = read_delivery(wire);
	const char *problem;
	StreamVerdict verdict = stream_delivered(&con.row, delivery, &problem);

	if (verdict == STREAM_TAKE)
	{
		at_hand_append(delivery);
		return;
	}
	if (verdict == STREAM_PASS)
		(void) ack(delivery->tag, false);
	else
		refused(problem);
	delivery_free(delivery);
}

/* Takes over a delivery. */
static void
delivered(BrokerDelivery *wire)
{
	pg_atomic_fetch_add_u64(&worker_subscription->delivered, 1);
	if (reads_stream())
	{
		delivered_of_stream(wire);
		return;
	}
	if (con.consumed++ == 0 && delivery_of_stream(wire))
	{
		broker_free_delivery(wire);
		refused(IS_STREAM);
		return;
	}
	if (!wire->redelivered)
	{
		end_gathering();
		nothing_suspect();
	}
	at_hand_append(read_delivery(wire));
	if (con.phase == GATHERING)
		con.gather_until = mono_later(GATHER_MS);
}

/*
 * Tells whether the broker delivered far more than the prefetch allows.  It may from a
 * stream, whose chunks it delivers whole; there consumer_memory is the only bound.
 */
static bool
too_many(void)
{
	return !reads_stream() && at_hand.count + at_hand.nheld >= 2 * con.prefetch;
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
			if (!too_many())
			{
				delivered(event->delivery);
				break;
			}
			broker_free_delivery(event->delivery);
			broker_failed("the broker delivers more than was asked for");
			break;
		case BROKER_CANCELLED:
			refused("the broker cancelled the consumer: its queue was deleted or is not available, or its consumer_timeout is over");
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

	for (int i = 0; i < EVENTS_AT_ONCE && con.conn.broker != NULL && (at_hand.count == 0 || !memory_full()); i++)
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

/*
 * Consumes, with an argument that the broker knows for one type of queue only: so it
 * is found out at once whether the queue is a stream.  0 is the priority of all.  What a
 * stream delivers without a position was never tried.
 */
static BrokerResult
consume(int asked, BrokerError *error)
{
	static const BrokerField no_stream = {.name = "x-priority",.type = BROKER_VALUE_INT};
	const BrokerField *argument = reads_stream() ? stream_begin(&con.row, mono_now()) : &no_stream;
	BrokerResult result = broker_consume(con.conn.broker, con.row.queue, "pg_fanout", asked, argument, error);

	if (reads_stream() && stream_is_new())
		caution_nothing_suspect();
	if (result == BROKER_REFUSED && error->code == PRECONDITION_FAILED && strstr(error->text, argument->name) != NULL)
		strlcpy(error->text, reads_stream() ? NO_STREAM : IS_STREAM, sizeof(error->text));
	return result;
}

static void
begin_consuming(void)
{
	BrokerError error;
	int			asked = prefetch();
	BrokerResult result = queue_find(con.conn.broker, &con.row, &error);

	if (result == BROKER_OK)
		result = consume(asked, &error);
	if (result != BROKER_OK)
	{
		call_failed(result, &error);
		return;
	}
	con.prefetch = asked;
	con.phase = reads_stream() ? CONSUMING : GATHERING;
	con.consumed = 0;
	con.gather_until = mono_later(GATHER_MS);
	con.inspect_at = mono_later(INSPECT_MS);
	con.probe_room_at = mono_later(PROBE_WAIT_MS);
	accepted();
	set_state(WORKER_IDLE);
}

/* When a stream will have said nothing for too long; 0: never. */
static MonoTime
silence_due(void)
{
	return reads_stream() ? stream_due() : 0;
}

/* The subscription has ended, but its queue has not. */
static void
drop_queue(void)
{
	BrokerError error;
	BrokerResult result = queue_drop(con.conn.broker, &con.row, &error);

	if (result != BROKER_OK)
	{
		call_failed(result, &error);
		return;
	}
	worker_begin();
	subscription_queue_dropped(con.subscription_id);
	worker_commit();
	worker_end(WORKER_TERMINATED);
}

/* Not before there is a handler to give deliveries to. */
static void
connect_broker(void)
{
	if (!handler_refresh(&con.row, con.subscription_id, con.row_context))
		worker_end(WORKER_TERMINATED);
	if (con.row.problem != NULL && !con.row.drop_queue)
	{
		refused(con.row.problem);
		return;
	}
	if (!connection_open(&con.conn))
		return;
	if (con.conn.logins > 1)
		pg_atomic_fetch_add_u64(&worker_subscription->reconnects, 1);
	if (con.row.drop_queue)
		drop_queue();
	else
		begin_consuming();
}

/* ---- dead letters ---- */

/* Takes a dead letter, and notes when the next one is to be taken. */
static bool
take_redriven(Redriven *redriven)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		found;

	worker_begin();
	found = dead_letter_take(&con.row, oldcontext, redriven);
	if (!found)
		con.redrive_at = dead_letter_waits(&con.row) ? mono_later(REDRIVE_LOCKED_MS) : 0;
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	return found;
}

static void
redrive(Redriven *redriven)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	Failure		failure;
	ApplyResult result = apply_redriven(&con.row, redriven, &failure);

	if (result == APPLY_COMMITTED)
	{
		pg_atomic_fetch_add_u64(&worker_subscription->applied, 1);
		return;
	}
	if (cannot_apply(result))
	{
		strlcpy(failure.sqlstate, "55000", sizeof(failure.sqlstate));
		strlcpy(failure.text, con.row.problem, sizeof(failure.text));
	}
	pg_atomic_fetch_add_u64(&worker_subscription->failed, 1);
	worker_begin();
	dead_letter_failed(redriven, failure.sqlstate, failure.text);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
}

/* One at a time, between deliveries. */
static bool
redrive_dead(void)
{
	Redriven	redriven;

	if (con.redrive_at == 0 || con.redrive_at > mono_now() || con.row.problem != NULL || con.row.drop_queue)
		return false;
	if (take_redriven(&redriven))
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

/*
 * The longest time for which the broker may not hear of us: a batch, in which a
 * call and the deferred triggers take all of their time, and the grace of each.
 */
static int
longest_absence(void)
{
	return (2 * con.row.handler_timeout + 999) / 1000 + 6;
}

/* A stream has said nothing for a while: decides what that means. */
static void
heed_silence(uint32_t messages)
{
	const char *problem;

	if (stream_time_is_up(&con.row, messages, &problem))
	{
		disconnect(true);
		con.conn.connect_at = 0;
	}
	else if (problem != NULL)
		refused(problem);
}

static void
work_by_the_clock(void)
{
	MonoTime	now = mono_now();
	bool		silence = con.phase != APART && silence_due() != 0 && silence_due() <= now;
	uint32_t	messages;
	BrokerError error;
	BrokerResult result;

	connection_lasts(&con.conn, now);
	if (con.phase == APART || (con.inspect_at > now && !silence))
		return;
	con.inspect_at = mono_plus(now, INSPECT_MS);
	/* the process before cannot have ended in what comes later */
	if (reads_stream() && at_hand.first == NULL)
		caution_nothing_suspect();
	result = queue_inspect(con.conn.broker, &con.row, &messages, &error);
	if (result != BROKER_OK)
		call_failed(result, &error);
	else if (silence)
		heed_silence(messages);
}

static bool
work(void)
{
	bool		any = false;

	worker_keep_socket(false);
	if (worker_reloaded())
		use_settings();
	if (con.conn.broker == NULL && con.conn.connect_at <= mono_now())
	{
		connect_broker();
		any = true;
	}
	any = look_into_room() || any;
	any = take_events() || any;
	any = gathered_all() || any;
	any = handle_deliveries() || any;
	any = handle_due() || any;
	any = requeue_due() || any;
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

/* When a message of the waiting room is to be the probe; 0: not now. */
static MonoTime
probe_time(void)
{
	return con.phase != APART && waiting_room.next_due != 0 ? Max(con.probe_room_at, waiting_room.next_due) : 0;
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
		set_state(WORKER_IDLE);
	}
	else
		earlier(&timeout, now, Max(con.conn.connect_at, 1));
	if (con.row.problem == NULL && !con.row.drop_queue)
		earlier(&timeout, now, con.redrive_at);
	if (con.row.problem == NULL && !con.row.drop_queue && con.phase != GATHERING)
		earlier(&timeout, now, con.breaker.open ? probe_time() : waiting_room.next_due);
	earlier(&timeout, now, waiting_room.recount_at);
	if (con.phase != APART)
	{
		earlier(&timeout, now, at_hand_next_due());
		earlier(&timeout, now, con.inspect_at);
		earlier(&timeout, now, silence_due());
	}
	if (con.phase == GATHERING)
		earlier(&timeout, now, con.gather_until);
	(void) worker_wait(fd, false, timeout);
}

/* After a process that ended while a handler ran, what it had tried is suspect. */
static void
take_over(void)
{
	bool		clean;

	LWLockAcquire(pgf_shared->lock, LW_EXCLUSIVE);
	con.subscription_id = worker_subscription->subscription.subscription_id;
	clean = worker_subscription->clean;
	worker_subscription->clean = false;
	LWLockRelease(pgf_shared->lock);
	pg_atomic_write_u32(&worker_subscription->waiting, 0);
	caution_begin(clean);
}

static void
start(void)
{
	con.deliveries = AllocSetContextCreate(TopMemoryContext, "pg_fanout deliveries", ALLOCSET_DEFAULT_SIZES);
	con.row_context = AllocSetContextCreate(TopMemoryContext, "pg_fanout subscription", ALLOCSET_SMALL_SIZES);
	handler_init();
	take_over();
	if (!handler_refresh(&con.row, con.subscription_id, con.row_context))
		worker_end(WORKER_TERMINATED);
	snprintf(con.name, sizeof(con.name), "consumer of %s", con.row.queue ? con.row.queue : "(null)");
	snprintf(con.connection_name, sizeof(con.connection_name), "pg_fanout consumer %s/%s",
			 con.row.topic, con.row.consumer_group);
	connection_init(&con.conn, con.name, con.connection_name);
	con.conn.options.consumer = true;
	con.conn.options.away_s = longest_absence();
	use_settings();
}

/*
 * What is at hand goes back to the queue.  The next worker is told whether a
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

/* Entry point of the background worker of a subscription. */
void
pg_fanout_consumer_main(Datum main_arg)
{
	worker_attach(main_arg, "consumer");
	before_shmem_exit(say_goodbye, (Datum) 0);

	worker_run(start, work, wait_for_work);
}
