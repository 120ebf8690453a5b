/*-------------------------------------------------------------------------
 *
 * queue.c
 *		The queue of a subscription, on the broker.
 *
 * A queue that exists is taken as it is.  One that does not is declared, as
 * fanout.declare_binding() would, but only by whom it belongs to: this database's
 * publisher, if the binding was declared here; else the worker, if it has declared
 * the queue before or never seen one.  A queue that somebody else declared, and
 * has deleted, is not made anew as something else.
 *
 *		          found              not found
 *		UNKNOWN --------> FOREIGN   UNKNOWN --declared--> OWN
 *		                  FOREIGN --not found--> refused, until it is there
 *		                                         OWN --not found--> declared again
 *
 * Must never: be called in a transaction.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "consume/queue.h"
#include "publish/topology.h"
#include "server/monotime.h"
#include "server/shmem.h"
#include "server/worker.h"

#define NOT_FOUND 404

/*
 * When a consumer begins, the one before it may not be gone yet for the broker,
 * and what it had comes back only then, after newer messages.
 */
#define PREDECESSOR_MS 3000
#define PREDECESSOR_LOOK_MS 100

/*
 * A quorum queue whose leader does not answer, as after a start of the broker,
 * is said to have no messages and no consumers.
 */
#define LEADER_MS 500

/*
 * Asks the broker for the depth of the queue, and shows it as the subscription's lag.  A
 * stream's is not shown, since it counts the messages that were read, too.
 */
static BrokerResult
look(Broker *broker, const SubscriptionRow *row, uint32_t *messages, uint32_t *consumers, BrokerError *error)
{
	BrokerResult result = broker_inspect_queue(broker, row->queue, messages, consumers, error);

	if (result == BROKER_OK)
		pg_atomic_write_u64(&worker_subscription->lag, row->start_kind == STREAM_NONE ? (uint64) *messages + 1 : 0);
	return result;
}

/* Looks how many messages there are, and tells stat_subscriptions. */
BrokerResult
queue_inspect(Broker *broker, const SubscriptionRow *row, uint32_t *messages, BrokerError *error)
{
	uint32_t	consumers;

	return look(broker, row, messages, &consumers, error);
}

/* Deletes the queue with all that is in it; one that is gone is as good. */
BrokerResult
queue_drop(Broker *broker, const SubscriptionRow *row, BrokerError *error)
{
	BrokerResult result = broker_delete_queue(broker, row->queue, false, false, error);

	return result == BROKER_REFUSED && error->code == NOT_FOUND ? BROKER_OK : result;
}

/* As fanout.declare_binding() would. */
static BrokerResult
declare(Broker *broker, const SubscriptionRow *row, BrokerError *error)
{
	BrokerField arguments[2] = {
		{.name = "x-queue-type",.type = BROKER_VALUE_STRING},
		{.name = "x-delivery-limit",.type = BROKER_VALUE_INT},
	};
	bool		stream = (row->start_kind != STREAM_NONE);
	BrokerResult result;

	arguments[0].value.string.data = stream ? "stream" : "quorum";
	arguments[0].value.string.len = strlen(arguments[0].value.string.data);
	arguments[1].value.integer = NO_DELIVERY_LIMIT;
	result = broker_declare_exchange(broker, row->exchange, error);
	if (result == BROKER_OK)
		result = broker_declare_queue(broker, row->queue, arguments, stream ? 1 : 2, error);
	if (result == BROKER_OK)
		result = broker_bind_queue(broker, row->queue, row->exchange, error);
	return result;
}

static void
set_origin(SubscriptionRow *row, QueueOrigin origin)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	if (row->origin == origin)
		return;
	worker_begin();
	subscription_set_origin(row->subscription_id, origin);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	row->origin = origin;
}

/* This database's publisher declares it, with the arguments that were given. */
static bool
publisher_declares(const SubscriptionRow *row)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		result;

	worker_begin();
	result = subscription_has_binding(row->topic, row->consumer_group);
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

static BrokerResult
declare_missing(Broker *broker, SubscriptionRow *row, BrokerError *error)
{
	BrokerResult result = BROKER_REFUSED;

	if (publisher_declares(row))
		ask_publisher();
	else if (row->origin != QUEUE_FOREIGN)
	{
		result = declare(broker, row, error);
		if (result == BROKER_OK)
			set_origin(row, QUEUE_OWN);
	}
	else
		snprintf(error->text, sizeof(error->text),
				 "the queue \"%s\" was declared by somebody else, and does not exist any more", row->queue);
	return result;
}

/*
 * Waits until nobody else consumes, or PREDECESSOR_MS: then it is another
 * member of the group.  If nobody does since the queue has no leader, a message
 * or LEADER_MS is waited for first.  Interruptible.
 */
static BrokerResult
await_predecessor(Broker *broker, const SubscriptionRow *row, uint32_t messages, uint32_t consumers,
				  BrokerError *error)
{
	MonoTime	gone_until = mono_later(PREDECESSOR_MS);
	MonoTime	leader_until = mono_later(LEADER_MS);
	BrokerResult result = BROKER_OK;

	while (row->ordered && result == BROKER_OK &&
		   ((consumers > 0 && mono_now() < gone_until) ||
			(consumers == 0 && messages == 0 && mono_now() < leader_until)))
	{
		(void) worker_wait(-1, false, PREDECESSOR_LOOK_MS);
		result = look(broker, row, &messages, &consumers, error);
	}
	return result;
}

/*
 * Sees to it that the queue is there, and that whoever consumed it before us is
 * gone.  REFUSED: it is not, and error says why.  Waits PREDECESSOR_MS at most,
 * interruptibly, apart from the broker's answers.
 */
BrokerResult
queue_find(Broker *broker, SubscriptionRow *row, BrokerError *error)
{
	uint32_t	messages;
	uint32_t	consumers;
	BrokerResult result = look(broker, row, &messages, &consumers, error);

	if (result == BROKER_REFUSED && error->code == NOT_FOUND)
		return declare_missing(broker, row, error);
	if (result != BROKER_OK)
		return result;
	if (row->origin == QUEUE_UNKNOWN)
		set_origin(row, QUEUE_FOREIGN);
	/* consumers of a stream do not compete, and nothing comes back to it */
	if (row->start_kind != STREAM_NONE)
		return BROKER_OK;
	return await_predecessor(broker, row, messages, consumers, error);
}
