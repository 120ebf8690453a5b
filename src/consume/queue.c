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
 * A quorum queue drops a message that it has taken back more often than its delivery
 * limit says.  So what is near it is stored before it is tried, and a queue whose limit
 * is too low for on_failure "requeue", or cannot be found out, is refused.  The broker
 * tells the limit of a queue only when the queue is declared with another one.  That a
 * policy makes it lower it does not tell at all.
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
#define PRECONDITION_FAILED 406

/* Taken for the limit of a queue that no message is given back to on purpose. */
#define ASSUMED_LIMIT 3

/* The limit of a queue that was declared without one; RabbitMQ has none before 4.0. */
#define DEFAULT_LIMIT 20

/* Arguments that ask_limit() gives to a queue, at most; and the length of each. */
#define MAX_ARGUMENTS 12
#define MAX_ARGUMENT 256

/* Holds the arguments with which ask_limit() declares a queue, and their texts. */
typedef struct Arguments
{
	BrokerField fields[MAX_ARGUMENTS];
	char		names[MAX_ARGUMENTS][MAX_ARGUMENT];
	char		values[MAX_ARGUMENTS][MAX_ARGUMENT];
	int			n;
} Arguments;

static int64 delivery_limit = ASSUMED_LIMIT;

/*
 * When a consumer begins, the one before it may not be gone yet for the broker,
 * and what it had comes back only then, after newer messages.
 */
#define PREDECESSOR_MS 3000
#define PREDECESSOR_LOOK_MS 100

/*
 * A quorum queue that has no leader yet, as after a start of the broker, is said to have
 * no messages and no consumers.
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

/*
 * This database's publisher declares it, with the arguments that were given; *limit: its
 * delivery limit, see subscription_has_binding().
 */
static bool
publisher_declares(const SubscriptionRow *row, int64 *limit)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		result;

	worker_begin();
	result = subscription_has_binding(row->topic, row->consumer_group, limit);
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
	int64		limit;

	if (publisher_declares(row, &limit))
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

/* ---- its delivery limit ---- */

/* Copies what is between two texts, cut to MAX_ARGUMENT; false: it is not there. */
static bool
copy_between(const char *text, const char *before, const char *behind, char *copy)
{
	const char *begin = strstr(text, before);
	const char *end;

	if (begin == NULL)
		return false;
	begin += strlen(before);
	end = strstr(begin, behind);
	if (end == NULL)
		return false;
	strlcpy(copy, begin, Min(end - begin + 1, MAX_ARGUMENT));
	return true;
}

/* Sets an argument to a value that the broker tells as text. */
static void
set_argument(BrokerField *field, char *value, const char *type)
{
	if (strcmp(type, "bool") == 0)
	{
		field->type = BROKER_VALUE_BOOL;
		field->value.boolean = (strcmp(value, "true") == 0);
	}
	else if (strcmp(type, "longstr") == 0)
	{
		field->type = BROKER_VALUE_STRING;
		field->value.string.data = value;
		field->value.string.len = strlen(value);
	}
	else
	{
		field->type = BROKER_VALUE_INT;
		field->value.integer = strtoll(value, NULL, 10);
	}
}

/*
 * Adds the argument that a queue has, and that it was declared without.  Returns false
 * if the text of the error does not tell.
 */
static bool
add_argument(Arguments *arguments, const char *name, const char *text)
{
	int			n = arguments->n;
	char		type[MAX_ARGUMENT];

	if (n == MAX_ARGUMENTS ||
		!copy_between(text, "received none but current is the value '", "' of type '", arguments->values[n]) ||
		!copy_between(strstr(text, "but current is"), "' of type '", "'", type))
		return false;
	strlcpy(arguments->names[n], name, MAX_ARGUMENT);
	arguments->fields[n].name = arguments->names[n];
	set_argument(&arguments->fields[n], arguments->values[n], type);
	arguments->n++;
	return true;
}

/* The delivery limit that the text of an error tells; -1: it does not. */
static int64
told_limit(const char *text)
{
	char		value[MAX_ARGUMENT];

	if (strstr(text, "but current is none") != NULL)
		return DEFAULT_LIMIT;
	if (!copy_between(text, "but current is '", "'", value) &&
		!copy_between(text, "but current is the value '", "'", value))
		return -1;
	/* a negative one is none, since RabbitMQ 4 */
	return value[0] == '-' ? NO_DELIVERY_LIMIT : strtoll(value, NULL, 10);
}

/*
 * Finds out the delivery limit of a queue that exists, by declaring it as one that has
 * none, with all other arguments that the broker blames us for not to have given: at most
 * MAX_ARGUMENTS times.  -1: it does not tell.  Other types of queues have no limit.  It was
 * seen a moment ago; one that is deleted in this moment is declared, and bound to nothing.
 */
static BrokerResult
ask_limit(Broker *broker, const SubscriptionRow *row, int64 *limit, BrokerError *error)
{
	Arguments  *arguments = palloc0(sizeof(Arguments));
	char		name[MAX_ARGUMENT];
	BrokerResult result;

	arguments->fields[0] = (BrokerField)
	{
		.name = "x-queue-type",.type = BROKER_VALUE_STRING,.value.string =
		{
			"quorum", 6
		}
	};
	arguments->fields[1] = (BrokerField)
	{
		.name = "x-delivery-limit",.type = BROKER_VALUE_INT,.value.integer = NO_DELIVERY_LIMIT
	};
	arguments->n = 2;
	*limit = -1;
	for (;;)
	{
		result = broker_declare_queue(broker, row->queue, arguments->fields, arguments->n, error);
		if (result != BROKER_REFUSED || error->code != PRECONDITION_FAILED ||
			!copy_between(error->text, "inequivalent arg '", "'", name))
			break;
		if (strcmp(name, "x-queue-type") == 0)
			*limit = NO_DELIVERY_LIMIT;
		else if (strcmp(name, "x-delivery-limit") == 0)
			*limit = told_limit(error->text);
		else if (add_argument(arguments, name, error->text))
			continue;
		break;
	}
	if (result == BROKER_OK)
		*limit = NO_DELIVERY_LIMIT;
	pfree(arguments);
	return result == BROKER_REFUSED ? BROKER_OK : result;
}

/*
 * Finds the delivery limit of the queue, and refuses one that would drop what
 * on_failure "requeue" gives back; of a queue that is declared in this database that was
 * looked at before.
 */
static BrokerResult
find_limit(Broker *broker, const SubscriptionRow *row, BrokerError *error)
{
	BrokerResult result;

	delivery_limit = ASSUMED_LIMIT;
	if (!row->requeue || publisher_declares(row, &delivery_limit))
		return BROKER_OK;
	result = ask_limit(broker, row, &delivery_limit, error);
	if (result != BROKER_OK || delivery_limit >= row->max_attempts - 1)
		return result;
	if (delivery_limit < 0)
		snprintf(error->text, sizeof(error->text),
				 "the queue \"%s\" may have a delivery limit, and drop what on_failure \"requeue\" gives back to it; it cannot be found out: %s",
				 row->queue, pstrdup(error->text));
	else
		snprintf(error->text, sizeof(error->text),
				 "queue \"%s\" has a delivery limit of " INT64_FORMAT ", and drops what on_failure \"requeue\" with max_attempts %d gives back to it more often; use on_failure \"wait\"",
				 row->queue, delivery_limit, row->max_attempts);
	error->code = 0;
	return BROKER_REFUSED;
}

/*
 * Would the queue drop a message that it has taken back so often if it took it back
 * twice more?  Of the queue that queue_find() has found last.
 */
bool
queue_near_limit(int64 returned)
{
	return returned + 1 >= delivery_limit;
}

/* ---- finding it ---- */

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
			(consumers == 0 && messages == 0 && mono_now() < Min(leader_until, gone_until))))
	{
		/*
		 * who has been seen is not gone because the queue does not answer
		 * once
		 */
		if (consumers > 0)
			leader_until = mono_later(LEADER_MS + PREDECESSOR_LOOK_MS);
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
	bool		missing = (result == BROKER_REFUSED && error->code == NOT_FOUND);

	if (missing)
		result = declare_missing(broker, row, error);
	else if (result == BROKER_OK && row->origin == QUEUE_UNKNOWN)
		set_origin(row, QUEUE_FOREIGN);
	if (result == BROKER_OK)
		result = find_limit(broker, row, error);
	/* consumers of a stream do not compete, and nothing comes back to it */
	if (result != BROKER_OK || missing || row->start_kind != STREAM_NONE)
		return result;
	return await_predecessor(broker, row, messages, consumers, error);
}
