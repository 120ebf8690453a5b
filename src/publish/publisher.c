/*-------------------------------------------------------------------------
 *
 * publisher.c
 *		The worker that publishes one database's outbox.
 *
 * One loop, each round of which does whatever can be done without waiting:
 *
 *		connect -> declare topology -> read a chunk -> publish what may go
 *		-> take confirms -> record settled chunks -> retry what is stalled
 *
 * and then waits for the first of: the latch (a commit, a request), the
 * broker's socket, the next thing due by the clock.
 *
 * Messages move so:
 *
 *		                  publish             ack
 *		    WAITING ---------------> IN_FLIGHT ------> SENT
 *		     |  ^  |                  |  |  | \
 *		     |  |  |   connection or  |  |  |  basic.return --> RETURNED
 *		     |  +--|--- channel lost -+  |  |                     | ack
 *		     |     |                nack |  | alone in flight     |
 *		     |     v                     v  v and refused         v
 *		     |   HELD <--- the topic is stalled: nack, return, 403, 404
 *		     v
 *		    DEAD   (the broker could never take it: size, headers, encoding)
 *
 * At most two chunks of the outbox are in memory: one whose confirms are
 * awaited while the other is being published; and a small one that is settled.  A chunk is recorded, in one
 * transaction, when all its messages are settled and all chunks before it are:
 * held and dead ones are moved, and one entry in the ledger marks the rest
 * sent, with those of small chunks before it.  Messages held of a topic that flows again are read as
 * chunks of their own; "drain" below.
 *
 * While a topic has messages held, all its further ones are held too, so that
 * its order is kept and nothing else waits for it.
 *
 * A topic that was nacked is tried again on a new channel; see renew_channel().
 *
 * Which refused message it was: confirms name it.  A channel closed by the
 * broker does not, and everything in flight is then unknown.  The publisher
 * isolates: it sends those messages again one at a time, and the one that is
 * alone in flight when it happens again is the culprit.
 *
 * No transaction is open while the broker is waited for.  An error in here
 * ends the process, the launcher starts it again, and the ledger says where
 * to go on: messages not recorded are sent again with the same message id.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "commands/dbcommands.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "broker/broker.h"
#include "broker/confirms.h"
#include "broker/connection.h"
#include "publish/alert.h"
#include "publish/flight.h"
#include "publish/ledger.h"
#include "publish/maintenance.h"
#include "publish/publisher.h"
#include "publish/reader.h"
#include "publish/topology.h"
#include "publish/wire.h"
#include "server/compat.h"
#include "server/guc.h"
#include "server/monotime.h"
#include "server/worker.h"

#define MAX_CHUNKS 2

/* One is being closed while the next one is opened. */
#define PUBLISHING_CHANNELS 2
#define DRAIN_MESSAGES 1000
#define MAX_WINDOW 65535
#define MAX_WINDOW_BYTES (16 * 1024 * 1024)

/* Bounds one broker_publish() without progress; SIGTERM is taken meanwhile. */
#define PUBLISH_TIMEOUT_MS 30000

#define FIRST_STATISTICS_MS 1000
#define STATISTICS_MS 10000
#define ALARM_LOG_MS 1000
#define EVENTS_AT_ONCE 10000
#define RECORD_AGAIN_MS 500

/* How long a window that was full may wait for half of it to be confirmed. */
#define REFILL_MS 200

/* How long small chunks are gathered, for one entry in the ledger. */
#define GATHER_MS 50
#define GATHER_MESSAGES 1000
#define GATHER_BYTES (1024 * 1024)
#define TOPIC_DROPPED "its topic was dropped"
#define RECHECK_TOPICS 50		/* each time maintain() runs */

typedef struct Publisher
{
	Connection	conn;
	MonoTime	unblocked_at;	/* end of the last alarm */
	char		alarm[256];		/* why it blocks us */
	bool		alarm_logged;	/* the log says that we are blocked */
	MonoTime	alarm_log_at;	/* no sooner */

	/* reading */
	Cursor		cursor;
	bool		more;			/* there may be something to read */
	Chunk	   *first;			/* chunks of the outbox, oldest first */
	Chunk	   *newest;
	int			nchunks;
	Chunk	   *settled;		/* taken from these, to be recorded */
	MonoTime	record_settled_at;
	Chunk	   *drain;			/* held messages being sent; NULL: none */
	Topic	   *drain_topic;	/* looked up anew after each load */
	int32		drain_topic_id;
	bool		drain_disturbed;	/* more was held since it was read */
	bool		drain_refused;	/* one of it was: the rest waits behind it */
	MonoTime	drain_record_at;	/* its rows were locked: no sooner */
	uint64		flush_recorded; /* flush() tickets behind the ledger */
	uint64		verify_pending; /* verify() tickets not served */
	bool		declare;		/* something may have to be declared */
	bool		drops_seen;		/* something may have to be dropped, once what
								 * was written before it is sent */
	bool		drops;			/* now */

	/* publishing */
	Flight		flight;
	int			channel;		/* the one on which all is published; 0: none */
	bool		channel_open;
	MonoTime	channel_asked_at;	/* when its opening was asked for */
	Confirms	window;
	int			window_limit;
	size_t		window_bytes;
	MonoTime	refill_at;		/* at the latest; 0: the window was not full */
	int			isolate;		/* messages to be sent one at a time */
	bool		renew_channel;	/* once nothing is in flight on it */
	bool		log_in_anew;	/* the connection, too */
	char		refusal[600];	/* the 403 that asks for it */

	/* by the clock */
	MonoTime	statistics_at;	/* 0: nothing to count */
	MonoTime	statistics_since;
	MonoTime	maintenance_at;
	MonoTime	record_at;		/* answers not recorded yet: no sooner */
} Publisher;

static Publisher pub;

/* ---- settling messages ---- */

/*
 * The chunk still knows the message; the flight does not any more, and its body
 * is not needed any more: if it has to be moved, it is copied from its table.
 */
static void
settle(Message *message, MessageState state)
{
	message->state = state;
	message->chunk->unsettled--;
	flight_settle(&pub.flight, &message->flight);
	reader_free_body(message);
}

static bool
diverted(const Topic *topic)
{
	return topic->paused || topic->stalled || topic->held || topic->holding > 0;
}

/* May messages held of the topic be sent now? */
static bool
may_drain(const Topic *topic, MonoTime now)
{
	return topic->held && !topic->paused && (!topic->stalled || topic->retry_at <= now);
}

/* Is the message one of fanout.held, being sent at last? */
static bool
is_held_message(const Message *message)
{
	return message->chunk == pub.drain;
}

static void
hold_message(Topic *topic, Message *message)
{
	if (!is_held_message(message))
	{
		topic->holding++;
		topology_touch(topic);
		if (topic == pub.drain_topic)
			pub.drain_disturbed = true;
	}
	else
		pub.drain_refused = true;
	settle(message, MESSAGE_HELD);
}

static void
bury_message(Message *message, const char *reason)
{
	message->reason = MemoryContextStrdup(message->chunk->context, reason);
	settle(message, MESSAGE_DEAD);
	pg_atomic_fetch_add_u64(&worker_slot->dead, 1);
}

/*
 * The broker refused a message of the topic, or its topology: one more
 * attempt has failed.
 */
static void
stall_topic(Topic *topic, const char *reason)
{
	if (topic->stalled && topic->retry_at > mono_now())
		return;					/* others of the same window */

	if (!topic->stalled)
	{
		topic->stalled = true;
		topic->stalled_at = GetCurrentTimestamp();
		topic->attempts = 0;
		ereport(LOG,
				(errmsg("topic \"%s\" is stalled", topic->name),
				 errdetail("%s", reason)));
	}
	topology_touch(topic);
	topic->attempts++;
	topic->retry_at = mono_later(backoff(pgf_retry_interval, topic->attempts - 1,
										 Max(pgf_retry_interval, MAX_RETRY_MS)));
	topic->alert = (topic->attempts == pgf_retry_limit);
	topic->stall_changed = true;
	if (topic->reason != NULL)
		pfree(topic->reason);
	topic->reason = MemoryContextStrdup(TopMemoryContext, reason);
	worker_set_error(psprintf("topic \"%s\": %s", topic->name, reason));
}

static void
unstall_topic(Topic *topic)
{
	if (!topic->stalled)
		return;
	topic->stalled = false;
	topic->attempts = 0;
	topic->stall_changed = true;
	ereport(LOG, (errmsg("topic \"%s\" flows again", topic->name)));
}

static void
refused(Message *message, const char *reason)
{
	Topic	   *topic = topology_find(message->topic_id);

	if (topic == NULL || topic->gone)
	{
		bury_message(message, reason);
		return;
	}
	stall_topic(topic, reason);
	hold_message(topic, message);
}

static void
left_window(Message *message)
{
	pub.window_bytes -= message->wire.body_len;
	if (pub.isolate > 0)
		pub.isolate--;
	pg_atomic_write_u32(&worker_slot->in_flight, pub.window.outstanding);
}

static void
acknowledged(void *item, void *arg)
{
	Message    *message = item;
	Topic	   *topic;

	left_window(message);
	if (message->state == MESSAGE_RETURNED)
	{
		refused(message, message->reason);
		return;
	}
	pg_atomic_fetch_add_u64(&worker_slot->confirmed, 1);
	connection_works(&pub.conn);
	topic = topology_find(message->topic_id);
	if (topic != NULL)
	{
		topic->sent++;
		topic->doubted_messages = 0;
		/* the message that was tried went through, and none before it failed */
		if (is_held_message(message) && !pub.drain_refused)
			unstall_topic(topic);
	}
	settle(message, MESSAGE_SENT);
}

static void
nacked(void *item, void *arg)
{
	Message    *message = item;
	Topic	   *topic = topology_find(message->topic_id);

	left_window(message);
	pg_atomic_fetch_add_u64(&worker_slot->nacked, 1);
	if (topic != NULL)
		topic->nacked = true;
	refused(message, message->state == MESSAGE_RETURNED ? message->reason :
			"nacked: a queue is full and rejects publishes, or failed");
}

static bool
has_message_id(void *item, void *arg)
{
	Message    *message = item;

	return message->state == MESSAGE_IN_FLIGHT && strcmp(message->message_id, arg) == 0;
}

/*
 * The ack that follows will settle it.  Returns false if it is none of those
 * in flight: then some other message's ack is not to be believed.
 */
static bool
returned(BrokerEvent *event)
{
	Message    *message = confirms_find(&pub.window, has_message_id, event->message_id);

	pg_atomic_fetch_add_u64(&worker_slot->returned, 1);
	if (message == NULL)
		return false;
	message->state = MESSAGE_RETURNED;
	message->reason = MemoryContextStrdup(message->chunk->context,
										  psprintf("returned: %d %s", event->code, event->text));
	return true;
}

/* ---- losing the connection ---- */

typedef struct InFlight
{
	Message   **messages;
	int			count;
} InFlight;

static bool
collect(void *item, void *arg)
{
	InFlight   *list = arg;

	list->messages[list->count++] = item;
	return false;
}

/*
 * What is in flight is unknown now, and first in line again.  Returns the
 * only message in flight, if there was just one.
 */
static Message *
put_back_all(void)
{
	InFlight	list;
	Message    *only;

	list.messages = palloc((pub.window.outstanding + 1) * sizeof(Message *));
	list.count = 0;
	(void) confirms_find(&pub.window, collect, &list);
	for (int i = list.count - 1; i >= 0; i--)
	{
		list.messages[i]->state = MESSAGE_WAITING;
		list.messages[i]->reason = NULL;	/* of a return whose ack never
											 * came */
		flight_put_back(&pub.flight, &list.messages[i]->flight);
	}
	only = (list.count == 1) ? list.messages[0] : NULL;
	pfree(list.messages);

	confirms_reset(&pub.window);
	pub.window_bytes = 0;
	pg_atomic_write_u32(&worker_slot->in_flight, 0);
	return only;
}

static void
disconnect(bool polite)
{
	if (pub.conn.broker == NULL)
		return;
	(void) put_back_all();
	pub.alarm_logged = false;
	pub.renew_channel = pub.log_in_anew = false;
	connection_close(&pub.conn, polite);
}

static void
broker_failed(const char *text)
{
	if (pub.conn.broker != NULL)
		(void) put_back_all();
	pub.alarm_logged = false;
	pub.renew_channel = pub.log_in_anew = false;
	connection_failed(&pub.conn, text);
}

/*
 * Codes with which the broker closes a connection because of what it was sent
 * (AMQP 0-9-1, constants: hard errors about frames, syntax and commands).
 */
static bool
blames_content(int code)
{
	return code >= 501 && code <= 506;
}

/* Only if flight_has_ready(). */
static Message *
next_message(void)
{
	return (Message *) ((char *) flight_next(&pub.flight) - offsetof(Message, flight));
}

static Message *
take_culprit(void)
{
	int			n = pub.window.outstanding;
	Message    *only = put_back_all();

	if (only == NULL)
	{
		pub.isolate = n;
		return NULL;
	}
	/* it was put back as the first in line */
	return next_message();
}

static void
disconnected(BrokerEvent *event)
{
	if (blames_content(event->code))
	{
		Message    *message = take_culprit();

		if (message != NULL)
			bury_message(message, psprintf("%d %s", event->code, event->text));
	}
	broker_failed(event->text);
}

/* Asks for a channel, after giving up the one before; it is open once an event says so. */
static void
open_channel(void)
{
	BrokerError error;

	broker_close_channel(pub.conn.broker, pub.channel);
	pub.channel = broker_open_channel(pub.conn.broker, true, &error);
	pub.channel_open = false;
	pub.channel_asked_at = mono_now();
	if (pub.channel == 0)
		broker_failed(error.text);
}

static void
reopen_channel(void)
{
	if (pub.log_in_anew)
		return;					/* the next one is of another connection */
	pub.renew_channel = false;
	open_channel();
}

static bool
may_renew_channel(void)
{
	return pub.renew_channel && pub.conn.broker != NULL && pub.window.outstanding == 0 &&
		!broker_blocked(pub.conn.broker);
}

/*
 * A channel remembers how it reaches a quorum queue.  If the node that led the
 * queue was down when the channel first published to it, RabbitMQ 3.10 nacks
 * everything on that channel, even when another node leads the queue by then
 * (rabbit_fifo_client, enqueue/3).  A new channel asks anew.
 */
static bool
renew_channel(void)
{
	if (!may_renew_channel())
		return false;
	confirms_reset(&pub.window);
	if (pub.log_in_anew)
	{
		pub.renew_channel = pub.log_in_anew = false;
		connection_log_in_anew(&pub.conn, pub.refusal);
	}
	else
		reopen_channel();
	return true;
}

/*
 * Asks for a new login once nothing is in flight, so that nothing need be sent
 * twice for its sake; until then nothing is published.
 */
static void
log_in_anew(int code, const char *text)
{
	snprintf(pub.refusal, sizeof(pub.refusal), "%d %s", code, text);
	pub.renew_channel = pub.log_in_anew = true;
}

/* Takes a 403 of a message for what it is, or lets a new login prove it. */
static bool
believes_refusal(const Message *message)
{
	Topic	   *topic = topology_find(message->topic_id);

	return topic == NULL || topic->gone ||
		connection_believes(&pub.conn, &topic->doubted_messages, topology_access_refused(topic));
}

static void
channel_closed(BrokerEvent *event)
{
	Message    *message = take_culprit();

	if (message != NULL && event->code == BROKER_ACCESS_REFUSED && !believes_refusal(message))
	{
		flight_put_back(&pub.flight, &message->flight);
		pub.isolate = 0;
		log_in_anew(event->code, event->text);
		return;
	}
	if (message != NULL)
	{
		char	   *reason = psprintf("%d %s", event->code, event->text);

		/* 406 of a publish is about the message: larger than the limit */
		if (event->code == 406)
			bury_message(message, reason);
		else
			refused(message, reason);
	}
	reopen_channel();
}

/* ---- what the broker says ---- */

/*
 * Alarms may come and go faster than anybody reads of them: what is logged is
 * how it stands, at most once in ALARM_LOG_MS.
 */
static bool
alarm_untold(void)
{
	return pub.conn.broker != NULL && broker_blocked(pub.conn.broker) != pub.alarm_logged;
}

static void
log_alarm(void)
{
	if (!alarm_untold() || pub.alarm_log_at > mono_now())
		return;
	pub.alarm_logged = !pub.alarm_logged;
	pub.alarm_log_at = mono_later(ALARM_LOG_MS);
	if (pub.alarm_logged)
		ereport(LOG, (errmsg("pg_fanout publisher is blocked by the broker"),
					  errdetail("%s", pub.alarm)));
	else
		ereport(LOG, (errmsg("pg_fanout publisher is no longer blocked by the broker")));
}

static void
handle_event(BrokerEvent *event)
{
	switch (event->type)
	{
		case BROKER_CHANNEL_OPENED:
			pub.channel_open = true;
			break;
		case BROKER_ACK:
		case BROKER_NACK:
			if (!confirms_settle(&pub.window, event->tag, event->multiple,
								 event->type == BROKER_ACK ? acknowledged : nacked, NULL))
				broker_failed("the broker confirmed a message that was not in flight");
			break;
		case BROKER_RETURN:
			if (!returned(event))
				broker_failed("the broker returned a message that was not in flight");
			break;
		case BROKER_BLOCKED:
			strlcpy(pub.alarm, event->text, sizeof(pub.alarm));
			log_alarm();
			break;
		case BROKER_UNBLOCKED:
			pub.unblocked_at = mono_now();
			log_alarm();
			break;
		case BROKER_CHANNEL_CLOSED:
			channel_closed(event);
			break;
		case BROKER_DISCONNECTED:
			disconnected(event);
			break;
		case BROKER_NOTHING:
		case BROKER_MORE:
		case BROKER_REPLY:		/* to requests that nobody waits for */
		case BROKER_DELIVERY:	/* these come to consumers only */
		case BROKER_CANCELLED:
			break;
	}
}

/*
 * Returns false if all that the broker has said is taken.  However much that
 * is, the rest of the work gets its turn.
 */
static bool
take_events(void)
{
	BrokerEvent event;

	for (int i = 0; i < EVENTS_AT_ONCE && pub.conn.broker != NULL; i++)
	{
		broker_next_event(pub.conn.broker, &event);
		if (event.type == BROKER_NOTHING)
			return false;
		if (event.type == BROKER_MORE)
			return true;
		handle_event(&event);
	}
	return pub.conn.broker != NULL;
}

static void
check_confirm_timeout(void)
{
	Message    *oldest = confirms_oldest(&pub.window);

	if (pub.conn.broker == NULL || broker_blocked(pub.conn.broker))
		return;
	if (!pub.channel_open &&
		mono_exceeds(Max(pub.channel_asked_at, pub.unblocked_at), mono_now(), pgf_confirm_timeout))
	{
		broker_failed("the broker did not open a channel within pg_fanout.confirm_timeout");
		return;
	}
	if (oldest == NULL)
		return;
	/* an alarm's time does not count: the broker did not read what we sent */
	if (mono_exceeds(Max(oldest->published_at, pub.unblocked_at), mono_now(), pgf_confirm_timeout))
		broker_failed("the broker did not confirm a message within pg_fanout.confirm_timeout");
}

/* ---- connecting ---- */

static void
use_settings(void)
{
	pub.window_limit = Min(pgf_max_in_flight, MAX_WINDOW);
	if (!connection_settings_changed(&pub.conn))
		return;
	disconnect(true);
	connection_use_settings(&pub.conn);
}

static void
connect_broker(void)
{
	if (!connection_open(&pub.conn))
		return;
	if (pub.conn.logins > 1)
		pg_atomic_fetch_add_u64(&worker_slot->reconnects, 1);
	topology_forget_confirmed();
	pub.declare = true;
	pub.channel = 0;
	open_channel();
}

/* ---- recording stalls ---- */

static void
drop_chunk(Chunk *chunk)
{
	MemoryContextDelete(chunk->context);
}

/* False: it was held, and somebody has purged it. */
static bool
bury(const Message *message, const char *topic, int attempts)
{
	if (!reader_bury(message, topic, attempts))
		return false;
	ereport(WARNING,
			(errmsg("message %s of topic \"%s\" goes to fanout.dead_letter",
					message->message_id, topic),
			 errdetail("%s", message->reason)));
	return true;
}

/*
 * The first message held has been refused too often: on with the next one.
 */
static void
bury_first_held(Topic *topic)
{
	Chunk	   *chunk = reader_read_held(topic->topic_id, 1, CurrentMemoryContext);
	bool		buried;

	if (chunk == NULL)
		return;
	chunk->messages[0]->reason = topic->reason;
	buried = reader_lock_held(chunk->messages, 1) && bury(chunk->messages[0], topic->name, topic->attempts);
	drop_chunk(chunk);
	if (!buried)
		return;					/* somebody is purging it */
	pg_atomic_fetch_add_u64(&worker_slot->dead, 1);
	topic->attempts = 0;
	topic->retry_at = mono_now();
	topic->stall_changed = true;
}

/*
 * At least the second attempt: that one was made with the first message held,
 * the first may have been any.
 */
static void
bury_exhausted(void)
{
	/* not one that is being sent just now */
	if (pub.drain != NULL && pub.drain->unsettled > 0)
		return;
	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		if (topic->dead_letters && topic->stalled && topic->held &&
			topic->attempts >= Max(pgf_retry_limit, 2))
			bury_first_held(topic);
	}
}

static void
record_stalls(void)
{
	/* first the alert, which tells of the attempts */
	topology_record_stalls();
	bury_exhausted();
}

/* ---- topology ---- */

/* A topic whose topology is refused must not flow: a queue would miss messages. */
static void
stall_refused_topics(void)
{
	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		const char *error = topology_error(topic);

		if (error != NULL && !topic->dropping && !topic->stalled)
			stall_topic(topic, error);
	}
}

/*
 * Rows that somebody's open transaction has locked are left for later: no
 * topic may wait for a user who has paused another one and not committed yet.
 */
static void
record_topology(void)
{
	if (!topology_unrecorded())
		return;
	worker_begin();
	topology_record();
	record_stalls();
	worker_commit();
	pub.record_at = mono_later(RECORD_AGAIN_MS);
}

static void
serve_verify(void)
{
	if (pub.verify_pending > pg_atomic_read_u64(&worker_slot->verify_done))
	{
		pg_atomic_write_u64(&worker_slot->verify_done, pub.verify_pending);
		ConditionVariableBroadcast(&worker_slot->progress);
	}
}

static void
declare_topology(void)
{
	BrokerError error;
	BrokerResult result;

	pub.declare = false;
	result = topology_declare(&pub.conn, pub.drops, &error);
	if (result == BROKER_LOST)
		broker_failed(error.text);
	else if (result == BROKER_REFUSED)
	{
		log_in_anew(error.code, error.text);
		return;
	}
	else
		pub.drops = false;
	stall_refused_topics();
	record_topology();
	if (pub.conn.broker != NULL)
		serve_verify();
}

/* A broker that blocks the connection does not answer on it either. */
static bool
may_declare(void)
{
	return pub.declare && pub.conn.broker != NULL && !broker_blocked(pub.conn.broker);
}

static void
load_topology(void)
{
	topology_load();
	pub.drain_topic = pub.drain ? topology_find(pub.drain_topic_id) : NULL;
	pub.drain_disturbed = true; /* redrive() may have added to what is held */
	pub.declare = true;
	pub.drops_seen = true;
	pub.drops = false;
}

/* ---- reading ---- */

static uint64
key_hash(const Message *message, const char *key)
{
	return hash_bytes_extended((const unsigned char *) key, strlen(key), (uint32) message->topic_id);
}

static void
admit_message(Message *message)
{
	FlightItem *item = &message->flight;

	if (message->key != NULL)
		item->keys[item->nkeys++] = key_hash(message, message->key);
	if (message->old_key != NULL)
		item->keys[item->nkeys++] = key_hash(message, message->old_key);
	item->barrier = message->truncates;
	flight_add(&pub.flight, item);
}

static void
admit_chunk(Chunk *chunk)
{
	chunk->unsettled = chunk->count;
	for (int i = 0; i < chunk->count; i++)
		admit_message(chunk->messages[i]);
}

static void
prepare_chunk(Chunk *chunk)
{
	for (int i = 0; i < chunk->count; i++)
		wire_prepare(chunk->messages[i], chunk->context);
}

static void
append_chunk(Chunk *chunk)
{
	if (pub.newest != NULL)
		pub.newest->next = chunk;
	else
		pub.first = chunk;
	pub.newest = chunk;
	pub.nchunks++;
}

static void
batch_recorded(uint64 ticket, bool drops)
{
	if (ticket > pub.flush_recorded)
		pub.flush_recorded = ticket;
	if (drops)
	{
		pub.drops = true;
		pub.declare = true;
	}
}

/*
 * What has to wait until this batch is recorded: a flush() that began before
 * its snapshot, and the dropping of what it saw marked, since a queue must
 * still get what was written before.
 */
static void
note_end_of_batch(Chunk *chunk, uint64 ticket)
{
	if (chunk != NULL && !chunk->last)
		return;
	if (chunk == NULL)
		chunk = (pub.newest != NULL) ? pub.newest : pub.settled;
	if (chunk == NULL)
		batch_recorded(ticket, pub.drops_seen);
	else
	{
		chunk->flush_ticket = ticket;
		chunk->drops_behind = chunk->drops_behind || pub.drops_seen;
	}
	pub.drops_seen = false;
}

/*
 * Has the chunk a message of a topic that is not known here?  Topics may have
 * been written while their triggers were disabled (pg_restore --disable-triggers),
 * so nobody said that there are new ones.
 */
static bool
has_unknown_topic(const Chunk *chunk)
{
	for (int i = 0; chunk != NULL && i < chunk->count; i++)
	{
		if (topology_find(chunk->messages[i]->topic_id) == NULL)
			return true;
	}
	return false;
}

static void
read_chunk(void)
{
	static uint64 batch_ticket = 0;
	bool		topology = false;
	Chunk	   *chunk;

	if (pub.cursor.target == (Datum) 0)
	{
		/*
		 * Cleared before the snapshot is taken, so that no commit is missed,
		 * and before the ticket is read, so that no flush() is: it sets the
		 * flag after it has drawn its ticket.
		 */
		pub.more = false;
		pg_atomic_write_u32(&worker_slot->dirty, 0);
		pg_memory_barrier();
		batch_ticket = pg_atomic_read_u64(&worker_slot->flush_requested);
	}
	worker_begin();
	chunk = reader_read(&pub.cursor, TopMemoryContext, &topology);
	if (topology || has_unknown_topic(chunk))
		load_topology();
	if (chunk != NULL)
		prepare_chunk(chunk);
	worker_commit();

	note_end_of_batch(chunk, batch_ticket);
	if (chunk == NULL)
		return;
	pub.more = true;
	append_chunk(chunk);
	/* nothing of it may go before what it came with is declared */
	if (may_declare())
		declare_topology();
	admit_chunk(chunk);
}

/* ---- publishing ---- */

/* Settles a message that cannot or must not be published; true if so. */
static bool
turned_away(Message *message, Topic *topic)
{
	if (topic == NULL || topic->gone)
		bury_message(message, TOPIC_DROPPED);
	else if (message->reason != NULL)
		bury_message(message, message->reason);
	else if (is_held_message(message) ?
			 pub.drain_refused || !may_drain(topic, mono_now()) : diverted(topic))
		hold_message(topic, message);
	else
		return false;
	if (pub.isolate > 0)
		pub.isolate--;
	return true;
}

static void
publish(Message *message, Topic *topic)
{
	BrokerMessage *wire = &message->wire;
	BrokerError error;
	BrokerResult result;

	wire->exchange = message->queue ? "" : topic->exchange;
	wire->routing_key = message->queue ? message->queue : "";
	wire->content_type = topic->content_type;
	result = broker_publish(pub.conn.broker, pub.channel, wire, PUBLISH_TIMEOUT_MS, &error);
	if (result == BROKER_TOO_LARGE)
	{
		bury_message(message, error.text);
		return;
	}

	/*
	 * Even if the channel or the connection broke: then it is one of those to
	 * be put back, and an event will say so.
	 */
	message->state = MESSAGE_IN_FLIGHT;
	message->published_at = mono_now();
	(void) confirms_add(&pub.window, message);
	pub.window_bytes += wire->body_len;
	pg_atomic_fetch_add_u64(&worker_slot->published, 1);
	pg_atomic_write_u32(&worker_slot->in_flight, pub.window.outstanding);
	if (result == BROKER_LOST)
		broker_failed(error.text);
}

static bool
window_open(void)
{
	if (pub.conn.broker == NULL || !pub.channel_open || pub.declare || pub.renew_channel ||
		broker_blocked(pub.conn.broker))
		return false;
	if (pub.window.outstanding == 0)
		return true;
	return pub.isolate == 0 &&
		pub.window.outstanding < pub.window_limit &&
		pub.window_bytes < MAX_WINDOW_BYTES &&
		!confirms_full(&pub.window);
}

/*
 * A window that was full is filled again once half of it is confirmed.  A
 * message for each confirm would have the broker do for each what it can do for
 * many at once: a quorum queue writes and replicates them together.  The other
 * half keeps it busy meanwhile; if it is never confirmed, the rest is for those
 * that are.
 *
 * Quorum queues of RabbitMQ 4 take half as much again in this way, while 3.10
 * takes a few percent less (test/bench drain).
 */
static bool
worth_filling(void)
{
	return broker_major(pub.conn.broker) < 4 ||
		pub.window.outstanding <= pub.window_limit / 2 || pub.refill_at <= mono_now();
}

static bool
may_publish(void)
{
	return flight_has_ready(&pub.flight) && window_open() && worth_filling();
}

/* Publishes what may go.  Returns whether it did anything. */
static bool
publish_ready(void)
{
	bool		any = false;
	int			n = 0;

	if (!may_publish())
		return false;
	worker_set_state(WORKER_PUBLISHING);
	broker_cork(pub.conn.broker);
	while (flight_has_ready(&pub.flight) && window_open())
	{
		Message    *message = next_message();
		Topic	   *topic = topology_find(message->topic_id);

		any = true;
		if (!turned_away(message, topic))
			publish(message, topic);
		/* confirms free the window, and must not pile up at the broker */
		if (++n % 100 == 0)
			(void) take_events();
	}
	pub.refill_at = (pub.window.outstanding >= pub.window_limit) ? mono_later(REFILL_MS) : 0;
	if (pub.conn.broker != NULL)
		broker_uncork(pub.conn.broker);
	return any;
}

/* ---- recording chunks ---- */

static Message **
select_messages(const Chunk *chunk, MessageState state, int *count)
{
	Message   **selected = palloc((chunk->count + 1) * sizeof(Message *));

	*count = 0;
	for (int i = 0; i < chunk->count; i++)
	{
		if (chunk->messages[i]->state == state)
			selected[(*count)++] = chunk->messages[i];
	}
	return selected;
}

static void
record_dead(const Chunk *chunk)
{
	int			n;
	Message   **dead = select_messages(chunk, MESSAGE_DEAD, &n);

	for (int i = 0; i < n; i++)
	{
		Topic	   *topic = topology_find(dead[i]->topic_id);

		(void) bury(dead[i], topic ? topic->name : psprintf("(dropped: %d)", dead[i]->topic_id), 0);
	}
}

/*
 * Those of a topic that was dropped meanwhile become dead letters, since nobody
 * would ever send what is held of it.
 */
static void
record_held(const Chunk *chunk)
{
	int			n;
	int			kept = 0;
	Message   **held = select_messages(chunk, MESSAGE_HELD, &n);

	for (int i = 0; i < n; i++)
	{
		Topic	   *topic = topology_find(held[i]->topic_id);

		if (topic != NULL)
			topic->holding--;
		if (topic == NULL || topic->gone)
		{
			held[i]->state = MESSAGE_DEAD;
			held[i]->reason = TOPIC_DROPPED;
			continue;
		}
		topic->held = true;
		held[kept++] = held[i];
	}
	reader_hold(held, kept);
}

static bool
all_sent(const Chunk *chunk)
{
	for (int i = 0; i < chunk->count; i++)
	{
		if (chunk->messages[i]->state != MESSAGE_SENT)
			return false;
	}
	return true;
}

/*
 * Of single messages that come a few at a time, each would cost the ledger as
 * much as its row cost the outbox.  What is gathered would be sent again after
 * a crash, as what is in flight would be.
 */
static bool
may_gather(const Chunk *chunk)
{
	return chunk->before + chunk->count < GATHER_MESSAGES &&
		chunk->bytes < GATHER_BYTES && all_sent(chunk);
}

/* The oldest chunk stands for those settled before it, which were all sent. */
static void
take_oldest_chunk(void)
{
	Chunk	   *chunk = pub.first;
	Chunk	   *before = pub.settled;

	pub.first = chunk->next;
	if (pub.first == NULL)
		pub.newest = NULL;
	pub.nchunks--;

	pub.settled = chunk;
	if (before == NULL)
		pub.record_settled_at = mono_later(GATHER_MS);
	else
	{
		chunk->before = before->before + before->count;
		chunk->flush_ticket = Max(chunk->flush_ticket, before->flush_ticket);
		drop_chunk(before);
	}
	if (!may_gather(chunk))
		pub.record_settled_at = 0;
}

/* Somebody may have begun to wait for it since it was taken. */
static bool
settled_due(void)
{
	return pub.settled != NULL &&
		(pub.record_settled_at <= mono_now() || pub.settled->drops_behind ||
		 pg_atomic_read_u64(&worker_slot->flush_requested) > pg_atomic_read_u64(&worker_slot->flush_done));
}

static void
record_chunk(Chunk *chunk)
{
	worker_begin();
	record_held(chunk);
	record_dead(chunk);
	ledger_record_sent(chunk->base, chunk->target, chunk->messages[chunk->count - 1]->id,
					   chunk->before + chunk->count, &chunk->unread);
	record_stalls();
	worker_commit();

	batch_recorded(chunk->flush_ticket, chunk->drops_behind);
	pub.settled = NULL;
	drop_chunk(chunk);
}

static void
record_drain(void)
{
	Chunk	   *chunk = pub.drain;
	Topic	   *topic = pub.drain_topic;
	int			nsent;
	int			ndead;
	Message   **sent = select_messages(chunk, MESSAGE_SENT, &nsent);
	Message   **dead = select_messages(chunk, MESSAGE_DEAD, &ndead);
	bool		all = true;

	worker_begin();
	if (!reader_lock_held(sent, nsent) || !reader_lock_held(dead, ndead))
	{
		/* somebody is purging them: only this topic waits for that */
		worker_commit();
		pub.drain_record_at = mono_later(RECORD_AGAIN_MS);
		return;
	}
	reader_release(sent, nsent);
	record_dead(chunk);
	record_stalls();
	worker_commit();

	for (int i = 0; i < chunk->count; i++)
		all = all && chunk->messages[i]->state != MESSAGE_HELD;
	/* the last of them is out: the topic flows directly again */
	if (topic != NULL && all && chunk->last && !pub.drain_disturbed)
		topic->held = false;
	pub.drain = NULL;
	pub.drain_topic = NULL;
	drop_chunk(chunk);
}

static bool
drain_settled(void)
{
	return pub.drain != NULL && pub.drain->unsettled == 0;
}

static bool
record_settled(void)
{
	bool		any = false;

	while (true)
	{
		if (settled_due())
			record_chunk(pub.settled);
		else if (pub.first != NULL && pub.first->unsettled == 0)
			take_oldest_chunk();	/* there is room for another now */
		else
			break;
		any = true;
	}
	if (drain_settled() && pub.drain_record_at <= mono_now())
	{
		record_drain();
		any = true;
	}
	return any;
}

/* ---- stalled and paused topics ---- */

/*
 * A topic that is paused as well is tried once it is resumed; one whose
 * messages are held in memory only, once they are recorded.
 */
static bool
awaits_retry(const Topic *topic)
{
	return topic->stalled && !(topic->paused && topic->held) &&
		(topic->held || topic->holding == 0);
}

/*
 * A topic is tried again: its topology first, for the queue or the exchange
 * may be what is missing.
 */
static bool
retry_topology(Topic *topic)
{
	BrokerError error;
	BrokerResult result;
	const char *refusal;

	topology_forget_topic(topic);
	result = topology_declare_topic(&pub.conn, topic, false, &error);
	if (result == BROKER_LOST)
	{
		broker_failed(error.text);
		return false;
	}
	if (result == BROKER_REFUSED)
	{
		log_in_anew(error.code, error.text);
		return false;
	}
	refusal = topology_error(topic);
	if (refusal != NULL)
		stall_topic(topic, refusal);
	else if (!topic->held && topic->holding == 0)
		unstall_topic(topic);
	record_topology();
	return refusal == NULL;
}

static void
start_drain(Topic *topic)
{
	/* a stalled topic is probed with a single message */
	int			limit = topic->stalled ? 1 : DRAIN_MESSAGES;

	worker_begin();
	pub.drain = reader_read_held(topic->topic_id, limit, TopMemoryContext);
	if (pub.drain != NULL)
		prepare_chunk(pub.drain);
	worker_commit();

	pub.drain_topic = topic;
	pub.drain_topic_id = topic->topic_id;
	/* what is held in memory was not read, and comes later */
	pub.drain_disturbed = topic->holding > 0;
	pub.drain_refused = false;
	pub.drain_record_at = 0;
	if (pub.drain != NULL)
		admit_chunk(pub.drain);
	else
	{
		/* somebody purged them */
		topic->held = false;
		unstall_topic(topic);
		pub.drain_topic = NULL;
	}
}

/* The topic that is due, or NULL. */
static Topic *
due_topic(MonoTime now)
{
	Topic	   *due = NULL;

	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		if (!may_drain(topic, now) && !(awaits_retry(topic) && topic->retry_at <= now))
			continue;
		/* whoever waits longest, so that all get their turn */
		if (due == NULL || topic->retry_at < due->retry_at)
			due = topic;
	}
	return due;
}

/* One topic at a time. */
static bool
may_retry(void)
{
	return pub.conn.broker != NULL && pub.drain == NULL && !pub.renew_channel &&
		!broker_blocked(pub.conn.broker);
}

static bool
retry_stalled(void)
{
	Topic	   *topic;

	if (!may_retry())
		return false;
	topic = due_topic(mono_now());
	if (topic == NULL)
		return false;
	if (topic->stalled && topic->nacked)
	{
		topic->nacked = false;
		pub.renew_channel = true;
		return true;
	}
	if (topic->stalled && !retry_topology(topic))
		return true;
	if (pub.conn.broker != NULL && topic->held && !topic->paused)
	{
		start_drain(topic);
		/* those that flow take turns */
		if (!topic->stalled)
			topic->retry_at = mono_now();
	}
	return true;
}

/* When the next stalled topic is due, or 0. */
static MonoTime
next_retry(void)
{
	MonoTime	next = 0;		/* a topic's 0 is "at once": work() has taken
								 * it */

	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		if (awaits_retry(topic) && (next == 0 || topic->retry_at < next))
			next = topic->retry_at;
	}
	return next;
}

/* ---- flush() ---- */

/* Is there anything that the broker has refused, or that is held back? */
static bool
something_waits(void)
{
	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		if (topic->held || topic->holding > 0 || topology_error(topic) != NULL)
			return true;
	}
	return false;
}

static void
serve_flush(void)
{
	if (pub.flush_recorded <= pg_atomic_read_u64(&worker_slot->flush_done))
		return;
	if (pub.conn.broker == NULL || pub.declare || something_waits())
		return;
	pg_atomic_write_u64(&worker_slot->flush_done, pub.flush_recorded);
	ConditionVariableBroadcast(&worker_slot->progress);
}

/* ---- subscriptions ---- */

/*
 * The launcher cannot read the table, so it is told through shared memory
 * which workers there should be; also while there is no broker.
 */
static void
read_subscriptions(void)
{
	static bool logged = false;
	int			without;

	pg_atomic_write_u32(&worker_slot->subscriptions_dirty, 0);
	pg_memory_barrier();
	worker_begin();
	without = maintenance_publish_subscriptions();
	if (without > 0 && !logged)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("pg_fanout cannot start a consumer for %d of the subscriptions of database \"%s\"",
						without, get_database_name(MyDatabaseId)),
				 errhint("Increase pg_fanout.max_subscriptions.")));
	worker_commit();
	shmem_wake_launcher(0);
	logged = (without > 0);
}

/* ---- requests ---- */

/* ms */
static long
maintenance_interval(void)
{
	return Max(1, Min(60, Min(pgf_retention, pgf_inbox_retention) / 4)) * 1000L;
}

static void
take_requests(void)
{
	uint64		verify = pg_atomic_read_u64(&worker_slot->verify_requested);

	if (verify > pub.verify_pending)
	{
		pub.verify_pending = verify;
		topology_forget_confirmed();
		pub.declare = true;
	}
	if (pg_atomic_read_u32(&worker_slot->dirty) != 0)
		pub.more = true;
	if (pg_atomic_read_u32(&worker_slot->subscriptions_dirty) != 0)
		read_subscriptions();
	if (worker_reloaded())
	{
		use_settings();
		pub.maintenance_at = Min(pub.maintenance_at, mono_later(maintenance_interval()));
	}
}

/* ---- by the clock ---- */

static void
count_sent(void)
{
	Topic	   *topic;
	int			i = 0;
	int			n = 0;
	int32	   *ids = palloc(sizeof(int32) * 64);
	int64	   *counts = palloc(sizeof(int64) * 64);
	int			room = 64;

	while ((topic = topology_next(&i)) != NULL)
	{
		if (topic->sent == 0)
			continue;
		if (n == room)
		{
			room *= 2;
			ids = repalloc(ids, sizeof(int32) * room);
			counts = repalloc(counts, sizeof(int64) * room);
		}
		ids[n] = topic->topic_id;
		counts[n++] = topic->sent;
		topic->sent = 0;
	}
	maintenance_count_sent(ids, counts, n,
						   Max(1.0, (mono_now() - pub.statistics_since) / (double) USECS_PER_SEC));
	pfree(ids);
	pfree(counts);
}

static bool
sent_uncounted(void)
{
	Topic	   *topic;
	int			i = 0;
	bool		uncounted = false;

	while ((topic = topology_next(&i)) != NULL)
		uncounted = uncounted || topic->sent > 0;
	return uncounted;
}

/*
 * The first messages after a pause are counted soon; then seldom, because each
 * time leaves a dead tuple behind.
 */
static void
keep_statistics(MonoTime now)
{
	bool		uncounted;

	if (pub.statistics_at > now)
		return;
	uncounted = sent_uncounted();
	if (pub.statistics_at == 0)
	{
		if (uncounted)
		{
			pub.statistics_since = now;
			pub.statistics_at = mono_plus(now, FIRST_STATISTICS_MS);
		}
		return;
	}
	if (uncounted)
	{
		worker_begin();
		count_sent();
		worker_commit();
	}
	pub.statistics_since = now;
	pub.statistics_at = uncounted ? mono_plus(now, STATISTICS_MS) : 0;
}

static void
maintain(MonoTime now)
{
	int			segment;

	if (now < pub.maintenance_at)
		return;
	worker_begin();
	/* what a wrong setting was to keep may be longer than the default */
	segment = pub.conn.problem ? maintenance_current_segment() : maintenance_rotate(pgf_retention);
	topology_find_held();
	worker_commit();
	worker_begin();
	if (pub.conn.problem == NULL)
		maintenance_rotate_inbox(pgf_inbox_retention);
	worker_commit();
	read_subscriptions();
	pg_atomic_write_u32(&worker_slot->current_segment, segment);
	/* the safety nets: under the wake-ups, and under the topology */
	pub.more = true;
	topology_recheck(RECHECK_TOPICS);
	pub.declare = true;
	pub.maintenance_at = mono_plus(now, maintenance_interval());
}

static void
work_by_the_clock(void)
{
	MonoTime	now = mono_now();

	check_confirm_timeout();
	log_alarm();
	connection_lasts(&pub.conn, now);
	maintain(now);
	keep_statistics(now);
}

/* ---- the loop ---- */

static void
earlier(long *timeout, MonoTime now, MonoTime when)
{
	*timeout = Min(*timeout, mono_left(now, when));
}

static void
wait_for_work(void)
{
	MonoTime	now = mono_now();
	MonoTime	retry = next_retry();
	long		timeout = 60000;
	int			fd = -1;

	earlier(&timeout, now, pub.maintenance_at);
	if (pub.statistics_at != 0)
		earlier(&timeout, now, pub.statistics_at);
	if (topology_unrecorded())
		earlier(&timeout, now, pub.record_at);
	if (pub.settled != NULL)
		earlier(&timeout, now, pub.record_settled_at);
	if (drain_settled())
		earlier(&timeout, now, pub.drain_record_at);
	if (pub.conn.broker != NULL)
	{
		fd = broker_fd(pub.conn.broker);
		timeout = Min(timeout, broker_next_heartbeat(pub.conn.broker));
		if (retry != 0 && may_retry())
			earlier(&timeout, now, retry);
		if (alarm_untold())
			earlier(&timeout, now, pub.alarm_log_at);
		if (pub.window.outstanding > 0 || !pub.channel_open)
			timeout = Min(timeout, 1000);
		if (flight_has_ready(&pub.flight) && window_open())
			earlier(&timeout, now, pub.refill_at);
		worker_set_state(broker_blocked(pub.conn.broker) ? WORKER_BLOCKED :
						 pub.nchunks > 0 || pub.drain != NULL ? WORKER_PUBLISHING : WORKER_IDLE);
	}
	else
		earlier(&timeout, now, pub.conn.connect_at);
	(void) worker_wait(fd, false, timeout);
}

static bool
may_read(void)
{
	return pub.conn.broker != NULL && pub.more && pub.nchunks < MAX_CHUNKS &&
		!broker_blocked(pub.conn.broker);
}

/* Everything that can be done without waiting; false if that was nothing. */
static bool
work(void)
{
	bool		any = false;

	take_requests();
	if (pub.conn.broker == NULL && pub.conn.connect_at <= mono_now())
	{
		connect_broker();
		any = true;
	}
	any = take_events() || any;
	any = renew_channel() || any;
	if (may_declare())
	{
		declare_topology();
		any = true;
	}
	any = publish_ready() || any;
	if (may_read())
	{
		read_chunk();
		any = true;
	}
	any = publish_ready() || any;
	any = take_events() || any;
	any = record_settled() || any;
	any = retry_stalled() || any;
	if (pub.record_at <= mono_now())
		record_topology();
	alert_send();
	work_by_the_clock();
	serve_flush();
	/* what the clock asked to be declared must not wait for the next message */
	return any || may_declare() || may_publish() || may_renew_channel();
}

static void
start(void)
{
	FlightKey  *slots;
	size_t		nslots = flight_key_slots(MAX_CHUNKS * CHUNK_MESSAGES + DRAIN_MESSAGES);
	void	  **items = MemoryContextAllocHuge(TopMemoryContext, MAX_WINDOW * sizeof(void *));

	slots = MemoryContextAllocZero(TopMemoryContext, nslots * sizeof(FlightKey));
	flight_init(&pub.flight, slots, nslots);
	confirms_init(&pub.window, items, MAX_WINDOW);

	worker_begin();
	reader_load_cursor(&pub.cursor);
	pg_atomic_write_u32(&worker_slot->current_segment, maintenance_current_segment());
	load_topology();
	worker_commit();
	read_subscriptions();
	pub.more = true;
	pub.maintenance_at = mono_later(1000);
	connection_init(&pub.conn, "publisher", "pg_fanout publisher");
	pub.conn.options.max_channels = PUBLISHING_CHANNELS;
	use_settings();
}

/* The libraries know nothing of exit(); say goodbye if that is possible. */
static void
say_goodbye(int code, Datum arg)
{
	if (pub.conn.broker != NULL)
		broker_close(pub.conn.broker, true);
	pub.conn.broker = NULL;
}

void
pg_fanout_publisher_main(Datum main_arg)
{
	worker_attach(main_arg, "publisher");
	before_shmem_exit(say_goodbye, (Datum) 0);

	/*
	 * Plans are made once, when the tables may be empty; they must be right
	 * for millions of rows.
	 */
	SetConfigOption("enable_seqscan", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("plan_cache_mode", "force_generic_plan", PGC_SUSET, PGC_S_OVERRIDE);

	worker_run(start, work, wait_for_work);
}
