/*-------------------------------------------------------------------------
 *
 * recover.c
 *		Moves dead letters from "<queue>_dead" back to their queue.
 *
 * It is the only part of the history worker that talks to the broker: on a connection
 * of its own, which consumes the queue of dead letters on one channel and publishes to
 * the queue on another one, that confirms.
 *
 *		delivery -> publish, mandatory -> in flight -> confirm -> ack
 *
 * A dead letter is acked only after the confirm of its copy, so none is lost.  If the
 * connection is lost in between, the queue has the copy, and the dead letter is moved
 * once more, or stays: with the same message id.
 *
 *		NONE --connect_again()--> CONNECTED --channel opened--> CONSUMING
 *		  ^                       |                             |
 *		  +------ lose() ---------+-----------------------------+
 *		  +------ recover_stop(): it is over, or does not run any more
 *
 * One recovery at a time has the connection; the others wait for it to end.
 *
 * Bounds: as many messages are moved as were there at the beginning, so that what
 * becomes a dead letter again meanwhile is not moved in a circle.  A step takes about
 * STEP_MS, the end of a recovery SETTLE_MS, besides connecting
 * (pg_fanout.connect_timeout) and requests (BrokerOptions.rpc_timeout_ms).  MAX_IN_FLIGHT messages are in flight; each is freed
 * as soon as it is written.
 *
 * Failures:
 *
 * - A broker that is away, or takes nothing: the error is shown, and it goes on by
 *	 itself, after a pause that doubles (connection.c).
 *
 * - A message that is returned or nacked, a queue that is missing, a right that is
 *	 lacking: the recovery has failed, with the error in the view.  A return has no tag,
 *	 so after it no confirm is believed any more.
 *
 * It must never ack a dead letter whose copy is not confirmed; and never have a
 * transaction open while it waits for the broker.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"

#include "broker/connection.h"
#include "history/history.h"
#include "server/worker.h"

/*
 * Dead letters that the broker has in memory for us, of whatever size.  With 200 small
 * ones a recovery takes a fifth less time.
 */
#define MAX_IN_FLIGHT	50

/* ms */
#define STEP_MS			250
#define SETTLE_MS		5000
#define WRITE_TIMEOUT	10000
#define NEXT_TURN		500
#define QUIET			2000

/* Seconds in which other walks may take their turns. */
#define AWAY			30

/* A copy that was written, of a dead letter that is not acked. */
typedef struct InFlight
{
	uint64		tag;			/* of the copy */
	uint64		delivery_tag;	/* of the dead letter */
	bool		confirmed;
	bool		refused;
} InFlight;

typedef struct Recovery
{
	int64		walk_id;		/* 0: none has the connection */
	bool		initialized;
	Connection	conn;
	uint32		doubted;		/* for connection_believes() */
	int			channel;		/* that publishes; 0: none */
	bool		channel_open;
	bool		consuming;
	MonoTime	heard_at;		/* when it began to, or the last delivery came */
	bool		unreliable;		/* no confirm is believed any more */
	uint64		published;		/* on the channel */
	int			nin_flight;
	InFlight	in_flight[MAX_IN_FLIGHT];	/* in order of both tags */
	char	   *queue;			/* of the walk, UTF-8 */
	int64		left;			/* dead letters still to be taken, without
								 * those in flight */
	int64		moved;			/* in this step */
	char	   *failure;		/* of this step */
} Recovery;

static Recovery recovery;

/* ---- the connection ---- */

/* Forgets what was open on a connection that is gone: what was in flight is to be moved again. */
static void
forget_channels(void)
{
	recovery.left += recovery.nin_flight;
	recovery.nin_flight = 0;
	recovery.published = 0;
	recovery.channel = 0;
	recovery.channel_open = recovery.consuming = recovery.unreliable = false;
}

static void
lose(const char *text)
{
	connection_failed(&recovery.conn, text);
	forget_channels();
}

/* The process ends: the broker is told, so that it does not log a lost client. */
static void
say_goodbye(int code, Datum arg)
{
	if (recovery.conn.broker != NULL)
		broker_close(recovery.conn.broker, true);
	recovery.conn.broker = NULL;
}

static void
fail(const char *text)
{
	if (recovery.failure == NULL)
		recovery.failure = pstrdup(text);
}

/* A 403 may be the login's fault: then it is made again. */
static void
refused(int code, const char *text)
{
	if (code == BROKER_ACCESS_REFUSED && !connection_believes(&recovery.conn, &recovery.doubted, false))
	{
		connection_log_in_anew(&recovery.conn, text);
		forget_channels();
	}
	else
		fail(text);
}

static void
failed_call(BrokerResult result, const BrokerError *error)
{
	if (result == BROKER_LOST)
		lose(error->text);
	else
		refused(error->code, error->text);
}

static void
initialize(void)
{
	connection_init(&recovery.conn, "recovery of dead letters", "pg_fanout recover_dead");
	recovery.conn.options.consumer = true;
	recovery.conn.options.forwards = true;
	recovery.conn.options.min_channels = 1;
	recovery.conn.options.max_channels = 2;
	recovery.conn.options.away_s = AWAY;
	before_shmem_exit(say_goodbye, (Datum) 0);
	recovery.initialized = true;
}

/* ---- messages ---- */

static char *
dead_queue(void)
{
	return psprintf("%s_dead", recovery.queue);
}

/* Counts the dead letters.  Returns false if that failed, or has to be asked again. */
static bool
count_dead(uint32_t *messages)
{
	BrokerError error;
	uint32_t	consumers;
	MonoTime	asked_at = mono_now();
	BrokerResult result = broker_inspect_queue(recovery.conn.broker, dead_queue(), messages,
											   &consumers, &error);

	if (result != BROKER_OK)
		failed_call(result, &error);
	return result == BROKER_OK && !broker_counts_doubtful(*messages, consumers, mono_now() - asked_at);
}

static void
begin_consuming(void)
{
	BrokerError error;
	BrokerResult result;

	recovery.channel_open = true;
	result = broker_consume(recovery.conn.broker, dead_queue(), "pg_fanout",
							Max(1, Min(recovery.left, MAX_IN_FLIGHT)), NULL, &error);
	recovery.consuming = (result == BROKER_OK);
	recovery.heard_at = mono_now();
	if (result != BROKER_OK)
		failed_call(result, &error);
}

/*
 * Writes the copy of a dead letter.  One beyond the bound stays unacked, and goes back;
 * there is none after it that is not.
 */
static void
forward(const BrokerDelivery *delivery)
{
	BrokerError error;
	BrokerResult result;
	InFlight   *copy = &recovery.in_flight[recovery.nin_flight];

	recovery.heard_at = mono_now();
	if (recovery.left <= 0 || recovery.failure != NULL)
		return;
	if (recovery.nin_flight == MAX_IN_FLIGHT)
	{
		lose("the broker delivers more than was asked for");
		return;
	}
	result = broker_forward(recovery.conn.broker, recovery.channel, recovery.queue, delivery,
							WRITE_TIMEOUT, &error);
	if (result != BROKER_OK)
	{
		failed_call(result, &error);
		return;
	}
	copy->tag = ++recovery.published;
	copy->delivery_tag = delivery->tag;
	copy->confirmed = copy->refused = false;
	recovery.nin_flight++;
	recovery.left--;
}

static void
answered(uint64 tag, bool multiple, bool refused)
{
	for (int i = 0; i < recovery.nin_flight && !recovery.unreliable; i++)
	{
		InFlight   *copy = &recovery.in_flight[i];

		if (multiple ? copy->tag > tag : copy->tag != tag)
			continue;
		copy->refused = copy->refused || refused;
		copy->confirmed = !copy->refused;
	}
}

/*
 * Acks the first dead letters as far as their copies are confirmed, with one ack for
 * all: a channel of RabbitMQ sends at most 32 commands to a quorum queue before they
 * are answered, and if it ends, those that it has not sent are lost.
 */
static void
ack_confirmed(void)
{
	BrokerError error;
	int			n = 0;

	while (n < recovery.nin_flight && recovery.in_flight[n].confirmed)
		n++;
	if (n == 0)
		return;
	if (broker_ack(recovery.conn.broker, recovery.in_flight[n - 1].delivery_tag, true, WRITE_TIMEOUT, &error) != BROKER_OK)
	{
		lose(error.text);
		return;
	}
	recovery.nin_flight -= n;
	memmove(recovery.in_flight, recovery.in_flight + n, recovery.nin_flight * sizeof(InFlight));
	recovery.moved += n;
}

static void
take_event(const BrokerEvent *event)
{
	switch (event->type)
	{
		case BROKER_CHANNEL_OPENED:
			begin_consuming();
			break;
		case BROKER_DELIVERY:
			forward(event->delivery);
			break;
		case BROKER_ACK:
			answered(event->tag, event->multiple, false);
			break;
		case BROKER_NACK:
			answered(event->tag, event->multiple, true);
			fail(psprintf("queue \"%s\" refuses a message", recovery.queue));
			break;
		case BROKER_RETURN:
			recovery.unreliable = true;
			fail(psprintf("a message for queue \"%s\" was returned: %d %s", recovery.queue, event->code, event->text));
			break;
		case BROKER_CHANNEL_CLOSED:
			recovery.unreliable = true;
			refused(event->code, psprintf("%d %s", event->code, event->text));
			break;
		case BROKER_CANCELLED:
			lose("the broker ended the consumer of the queue of dead letters");
			break;
		case BROKER_BLOCKED:
			lose(psprintf("the broker takes no messages: %s", event->text));
			break;
		case BROKER_DISCONNECTED:
			lose(event->text);
			break;
		default:
			break;
	}
}

/* Takes the next thing that the broker has said.  Returns whether there was one. */
static bool
take_next(void)
{
	BrokerEvent event;

	broker_next_event(recovery.conn.broker, &event);
	take_event(&event);
	if (event.type == BROKER_DELIVERY)
		broker_free_delivery(event.delivery);
	CHECK_FOR_INTERRUPTS();
	return event.type != BROKER_NOTHING;
}

static void
wait_for_broker(MonoTime deadline)
{
	(void) worker_wait(broker_fd(recovery.conn.broker), false,
					   Min(mono_left(mono_now(), deadline), broker_next_heartbeat(recovery.conn.broker)));
}

static bool
is_sound(void)
{
	return recovery.conn.broker != NULL && recovery.failure == NULL;
}

static bool
goes_on(void)
{
	return is_sound() && (recovery.left > 0 || recovery.nin_flight > 0);
}

/* Takes what the broker says until there is no more to move, or the time is over. */
static void
move_messages(void)
{
	MonoTime	deadline = mono_later(STEP_MS);

	while (goes_on() && mono_now() < deadline)
	{
		if (take_next() || !goes_on())
			continue;
		ack_confirmed();
		if (goes_on())
			wait_for_broker(deadline);
	}
}

/* ---- beginning and end ---- */

static bool
all_answered(void)
{
	for (int i = 0; i < recovery.nin_flight; i++)
	{
		if (!recovery.in_flight[i].confirmed && !recovery.in_flight[i].refused)
			return false;
	}
	return true;
}

/*
 * Closes the connection in good order, so that nothing comes twice, or in another order:
 * ends the consumer, moves what was delivered, waits SETTLE_MS at most for the confirms,
 * and acks all at once.  After a failure nothing more is moved, and the consumer is not
 * ended, because that changes the order of what it has.
 *
 * The consumer is ended first because the broker answers that only after it has taken in
 * all acks before it, and an ack that it has not passed on to the queue when the channel
 * closes is lost (see ack_confirmed()).
 */
static void
settle_and_close(void)
{
	MonoTime	deadline = mono_later(SETTLE_MS);
	BrokerError error;

	if (is_sound() && recovery.consuming &&
		broker_cancel(recovery.conn.broker, "pg_fanout", &error) == BROKER_LOST)
		lose(error.text);
	while (recovery.conn.broker != NULL && !recovery.unreliable && mono_now() < deadline)
	{
		if (take_next())
			continue;
		if (all_answered())
			break;
		wait_for_broker(deadline);
	}
	if (recovery.conn.broker != NULL)
		ack_confirmed();
	connection_close(&recovery.conn, true);
	forget_channels();
}

/*
 * Ends the recovery's use of the connection, if it has it; what is unacked goes back.
 * polite: the connection is in order, and may be waited for.  Returns how many dead
 * letters were moved on that occasion.  Not in a transaction.
 */
int64
recover_stop(int64 walk_id, bool polite)
{
	int64		moved = recovery.moved;

	if (recovery.walk_id != walk_id)
		return 0;
	if (polite)
		settle_and_close();
	else
	{
		connection_close(&recovery.conn, false);
		forget_channels();
	}
	recovery.walk_id = 0;
	pfree(recovery.queue);
	recovery.queue = NULL;
	return recovery.moved - moved;
}

static void
begin_walk(const Walk *walk, const WalkRow *row)
{
	if (!recovery.initialized)
		initialize();
	if (recovery.walk_id == 0)
		recovery.queue = MemoryContextStrdup(TopMemoryContext, row->queue);
	recovery.walk_id = walk->id;
	recovery.left = row->estimated - row->done - recovery.nin_flight;
	recovery.moved = 0;
	recovery.failure = NULL;
}

/* Makes the connection, if there is none.  Returns whether there is one. */
static bool
connect_again(void)
{
	BrokerError error;
	int64		left = recovery.left + recovery.nin_flight;

	if (connection_settings_changed(&recovery.conn))
	{
		settle_and_close();
		recovery.left = left - recovery.moved;
		connection_use_settings(&recovery.conn);
	}
	if (recovery.conn.broker != NULL)
		return true;
	if (recovery.conn.connect_at > mono_now() || !connection_open(&recovery.conn))
		return false;
	recovery.channel = broker_open_channel(recovery.conn.broker, true, &error);
	if (recovery.channel == 0)
		lose(error.text);
	return recovery.channel != 0;
}

/* ---- a step ---- */

/*
 * Has somebody else taken the rest?  Then nothing will ever come.  A queue without
 * messages is not enough, since they may be on the way.
 */
static bool
is_empty(void)
{
	uint32_t	messages;

	return recovery.consuming && recovery.nin_flight == 0 &&
		mono_exceeds(recovery.heard_at, mono_now(), QUIET) &&
		count_dead(&messages) && messages == 0;
}

/* Moves for a while.  Sets walked if it is over. */
static void
run(WalkStep *step)
{
	uint32_t	messages;

	if (step->estimated < 0)
	{
		if (!count_dead(&messages))
			return;
		step->estimated = recovery.left = messages;
	}
	move_messages();
	if (is_sound())
		ack_confirmed();
	if (!is_sound())
		return;
	if (recovery.moved > 0)
		connection_works(&recovery.conn);
	step->walked = (recovery.left <= 0 && recovery.nin_flight == 0) || is_empty();
}

/*
 * Moves dead letters for about STEP_MS; not in a transaction.  Fills in of step: rows
 * and sent, how many were moved; estimated, how many there were to begin with; walked,
 * that it is over; failure, why it cannot go on; waits, why it stands still.  row->queue
 * is in UTF-8.
 */
void
recover_step(Walk *walk, const WalkRow *row, WalkStep *step)
{
	step->estimated = row->estimated;
	if (recovery.walk_id != 0 && recovery.walk_id != walk->id)
	{
		walk->next_at = mono_later(NEXT_TURN);
		return;
	}
	begin_walk(walk, row);
	if (connect_again())
		run(step);
	step->failure = recovery.failure;
	if (step->walked || step->failure != NULL)
		(void) recover_stop(walk->id, true);
	step->rows = step->sent = recovery.moved;
	if (step->walked || step->failure != NULL)
		return;
	if (recovery.conn.broker == NULL)
	{
		step->waits = pstrdup(recovery.conn.last_failure);
		walk->next_at = recovery.conn.connect_at;
	}
}
