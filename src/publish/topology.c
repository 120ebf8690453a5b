/*-------------------------------------------------------------------------
 *
 * topology.c
 *		Declares on the broker what the catalog says.
 *
 * The publisher's picture of topics and bindings lives here.  It is read
 * again whenever fanout.topology_change says that it changed, in the same
 * transaction that reads the messages, so that nothing is published before
 * what was declared with it.  What the broker answers is remembered as
 * "answered" and written into the catalog by the next transaction: there is
 * none open while the broker is asked.
 *
 * A refusal (404, 403, 405, 406) concerns one topic.  It is not tried again
 * until somebody calls topology_forget_topic() for it, which the publisher
 * does with a growing delay, so that nothing loops hot.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "publish/alert.h"
#include "publish/reader.h"
#include "publish/topology.h"
#include "publish/wire.h"
#include "server/guc.h"

static HTAB *topics = NULL;
static Topic *restless = NULL;	/* list of those that may not be at rest */
static uint32 current_load = 0;

Topic *
topology_find(int32 topic_id)
{
	return topics == NULL ? NULL : hash_search(topics, &topic_id, HASH_FIND, NULL);
}

Topic *
topology_next(int *i)
{
	static HASH_SEQ_STATUS scan;
	Topic	   *topic;

	if (topics == NULL)
		return NULL;
	if ((*i)++ == 0)
		hash_seq_init(&scan, topics);
	topic = hash_seq_search(&scan);
	return topic;
}

/* ---- topics that are not at rest ---- */

void
topology_touch(Topic *topic)
{
	if (topic->restless)
		return;
	topic->restless = true;
	topic->next = restless;
	restless = topic;
}

static bool
answered(const Topic *topic)
{
	if (topic->answered)
		return true;
	for (int b = 0; b < topic->nbindings; b++)
	{
		if (topic->bindings[b].answered)
			return true;
	}
	return false;
}

static bool
at_rest(const Topic *topic)
{
	return !topic->held && topic->holding == 0 && !topic->stalled && !topic->stall_changed &&
		!answered(topic) && topology_error(topic) == NULL;
}

Topic *
topology_restless(Topic *last)
{
	Topic	  **next = last ? &last->next : &restless;

	while (*next != NULL && at_rest(*next))
	{
		(*next)->restless = false;
		*next = (*next)->next;
	}
	return *next;
}

/* ---- reading the catalog ---- */

static void
execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls)
{
	int			result = SPI_execute_with_args(sql, nargs, types, values, nulls, false, 0);

	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", sql, SPI_result_code_string(result));
}

static Datum
column(int row, int number, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, number, isnull);
}

static char *
text_column(int row, int number)
{
	bool		isnull;

	return TextDatumGetCString(column(row, number, &isnull));
}

static bool
bool_column(int row, int number)
{
	bool		isnull;
	Datum		value = column(row, number, &isnull);

	return !isnull && DatumGetBool(value);
}

/* Refused to be dropped, or declared again meanwhile: as new, but no news. */
static void
keep_undropped(Topic *topic)
{
	if (topic->error != NULL)
		pfree(topic->error);
	topic->error = NULL;
	topic->gone = false;
	topic->answered = false;
	topic->confirmed = false;
	topic->rechecked = true;
}

static void
load_topic(int row)
{
	bool		isnull;
	bool		found;
	size_t		len;
	int32		topic_id = DatumGetInt32(column(row, 1, &isnull));
	Topic	   *topic = hash_search(topics, &topic_id, HASH_ENTER, &found);
	MemoryContext oldcontext;
	char	   *format;

	if (!found)
	{
		memset(topic, 0, sizeof(Topic));
		topic->topic_id = topic_id;
	}
	topic->load = current_load;
	topic->context = AllocSetContextCreate(TopMemoryContext, "pg_fanout topic", ALLOCSET_SMALL_SIZES);
	oldcontext = MemoryContextSwitchTo(topic->context);
	topic->name = text_column(row, 2);
	topic->exchange = unconstify(char *, wire_utf8(topic->name, strlen(topic->name), &len));
	format = text_column(row, 3);
	topic->content_type = (strcmp(format, "cloudevents") == 0) ?
		"application/cloudevents+json" : "application/json";
	topic->dead_letters = bool_column(row, 4);
	topic->paused = bool_column(row, 5);
	if (topic->dropping && !bool_column(row, 6))
		keep_undropped(topic);
	topic->dropping = bool_column(row, 6);
	topic->bindings = NULL;
	topic->nbindings = 0;
	topic->held = false;
	MemoryContextSwitchTo(oldcontext);
	topic->restless = false;	/* the list begins anew, too */
	topology_touch(topic);
}

/* Arguments of queue.declare: ours, unless the caller's say otherwise. */
static void
set_arguments(Binding *binding, Jsonb *arguments)
{
	int			n;
	BrokerField *fields = wire_fields(arguments, 2, &n);
	int			kept = 0;
	bool		limited = binding->classic || binding->stream;

	if (fields == NULL)
	{
		binding->error = pstrdup("arguments cannot be converted to UTF-8, or have a number that is no double");
		return;
	}
	for (int i = 0; i < n; i++)
	{
		if (strcmp(fields[i].name, "x-delivery-limit") == 0)
			limited = true;
		if (fields[i].type != BROKER_VALUE_NULL)
			fields[kept++] = fields[i];
	}
	fields[kept].name = "x-queue-type";
	fields[kept].type = BROKER_VALUE_STRING;
	fields[kept].value.string.data = binding->classic ? "classic" : binding->stream ? "stream" : "quorum";
	fields[kept].value.string.len = strlen(fields[kept].value.string.data);
	kept++;
	if (!limited)
	{
		fields[kept].name = "x-delivery-limit";
		fields[kept].type = BROKER_VALUE_INT;
		fields[kept].value.integer = NO_DELIVERY_LIMIT;
		kept++;
	}
	binding->arguments = fields;
	binding->narguments = kept;
}

static void
load_binding(Binding *binding, int row)
{
	bool		isnull;
	size_t		len;
	char	   *queue = text_column(row, 3);
	Jsonb	   *arguments = DatumGetJsonbPCopy(column(row, 5, &isnull));

	memset(binding, 0, sizeof(Binding));
	binding->consumer_group = text_column(row, 2);
	binding->queue = unconstify(char *, wire_utf8(queue, strlen(queue), &len));
	binding->classic = bool_column(row, 4);
	binding->stream = bool_column(row, 8);
	binding->signature = psprintf("%d %d %s", binding->classic, binding->stream,
								  JsonbToCString(NULL, &arguments->root, VARSIZE(arguments)));
	(void) column(row, 6, &isnull);
	binding->dropping = !isnull;
	binding->if_unused = bool_column(row, 6);
	binding->if_empty = bool_column(row, 7);
	set_arguments(binding, arguments);
	if (binding->queue == NULL)
		binding->error = pstrdup("name cannot be converted to UTF-8");
}

/* Carries over what was known of the same declaration. */
static void
inherit(Topic *topic, Binding *binding, const Binding *old, int nold)
{
	for (int i = 0; i < nold; i++)
	{
		if (strcmp(old[i].consumer_group, binding->consumer_group) != 0 ||
			strcmp(old[i].signature, binding->signature) != 0)
			continue;
		if (old[i].dropping != binding->dropping)
		{
			/* refused to be dropped, it is still what it was */
			binding->confirmed = old[i].dropping && old[i].confirmed && !old[i].gone;
			return;
		}
		binding->confirmed = old[i].confirmed;
		binding->answered = old[i].answered;
		binding->gone = old[i].gone;
		if (old[i].error != NULL)
			binding->error = pstrdup(old[i].error);
		return;
	}
	/* something new about a stalled topic is worth a try at once */
	topic->retry_at = 0;
}

/* Rows come grouped by topic; returns how many belong to this one. */
static int
load_bindings_of(int first, int nrows)
{
	bool		isnull;
	int32		topic_id = DatumGetInt32(column(first, 1, &isnull));
	Topic	   *topic = topology_find(topic_id);
	int			n = 1;
	MemoryContext oldcontext;

	while (first + n < nrows && DatumGetInt32(column(first + n, 1, &isnull)) == topic_id)
		n++;
	if (topic == NULL)
		return n;
	oldcontext = MemoryContextSwitchTo(topic->context);
	topic->bindings = palloc0(n * sizeof(Binding));
	topic->nbindings = n;
	for (int i = 0; i < n; i++)
		load_binding(&topic->bindings[i], first + i);
	MemoryContextSwitchTo(oldcontext);
	return n;
}

static void
load_bindings(void)
{
	int			nrows;

	execute("select topic_id, consumer_group, queue, queue_type = 'classic', arguments,"
			" drop_if_unused, drop_if_empty, queue_type = 'stream' from fanout.binding order by topic_id, consumer_group",
			0, NULL, NULL, NULL);
	nrows = SPI_processed;
	for (int row = 0; row < nrows;)
		row += load_bindings_of(row, nrows);
}

static void
set_reason(Topic *topic, const char *reason)
{
	char	   *copy = reason ? MemoryContextStrdup(TopMemoryContext, reason) : NULL;

	if (topic->reason != NULL)
		pfree(topic->reason);
	topic->reason = copy;
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

static TimestampTz
store_retry_at(MonoTime retry_at)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), mono_left(mono_now(), retry_at));
}

static void
load_stalls(void)
{
	bool		isnull;

	execute("select topic_id, stalled_at, attempts, retry_at, last_error from fanout.stall",
			0, NULL, NULL, NULL);
	for (int row = 0; row < SPI_processed; row++)
	{
		Topic	   *topic = topology_find(DatumGetInt32(column(row, 1, &isnull)));
		MonoTime	retry_at = load_retry_at(DatumGetTimestampTz(column(row, 4, &isnull)));

		if (topic == NULL)
			continue;
		if (topic->stalled || topic->stall_changed)
		{
			/* resume() may have brought the next attempt forward */
			topic->retry_at = Min(topic->retry_at, retry_at);
			continue;
		}
		topic->stalled = true;
		topic->stalled_at = DatumGetTimestampTz(column(row, 2, &isnull));
		topic->attempts = DatumGetInt32(column(row, 3, &isnull));
		topic->retry_at = retry_at;
		set_reason(topic, text_column(row, 5));
	}
}

void
topology_find_held(void)
{
	int32	   *ids;
	int			n = reader_topics_held(&ids);

	for (int i = 0; i < n; i++)
	{
		Topic	   *topic = topology_find(ids[i]);

		if (topic != NULL)
		{
			topic->held = true;
			topology_touch(topic);
		}
	}
}

/* Nothing is left that could be refused: no need to wait for the next retry. */
static void
hurry_emptied_topics(void)
{
	Topic	   *topic;
	int			i = 0;

	while ((topic = topology_next(&i)) != NULL)
	{
		if (topic->stalled && !topic->held && topic->holding == 0 && topology_error(topic) == NULL)
			topic->retry_at = 0;
	}
}

/* What a topic had before this load: kept until its bindings were compared. */
typedef struct Previous
{
	Topic	   *topic;
	MemoryContext context;
	char	   *exchange;
	Binding    *bindings;
	int			nbindings;
} Previous;

static Previous *
remember_previous(int *count)
{
	Previous   *previous = palloc((topics ? hash_get_num_entries(topics) + 1 : 1) * sizeof(Previous));
	Topic	   *topic;
	int			i = 0;

	*count = 0;
	while ((topic = topology_next(&i)) != NULL)
	{
		Previous   *p = &previous[(*count)++];

		p->topic = topic;
		p->context = topic->context;
		p->exchange = topic->exchange;
		p->bindings = topic->bindings;
		p->nbindings = topic->nbindings;
	}
	return previous;
}

static void
forget_topic(Topic *topic)
{
	set_reason(topic, NULL);
	if (topic->error != NULL)
		pfree(topic->error);
	hash_search(topics, &topic->topic_id, HASH_REMOVE, NULL);
}

static void
merge_previous(Previous *previous, int count)
{
	for (int i = 0; i < count; i++)
	{
		Previous   *p = &previous[i];
		Topic	   *topic = p->topic;

		if (topic->load != current_load)
			forget_topic(topic);
		else
		{
			MemoryContext oldcontext = MemoryContextSwitchTo(topic->context);

			for (int b = 0; b < topic->nbindings; b++)
				inherit(topic, &topic->bindings[b], p->bindings, p->nbindings);
			MemoryContextSwitchTo(oldcontext);
		}
		MemoryContextDelete(p->context);
	}
}

void
topology_load(void)
{
	Previous   *previous;
	int			nprevious;

	if (topics == NULL)
	{
		HASHCTL		ctl = {0};

		ctl.keysize = sizeof(int32);
		ctl.entrysize = sizeof(Topic);
		topics = hash_create("pg_fanout topology", 64, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	previous = remember_previous(&nprevious);
	current_load++;
	restless = NULL;
	execute("select topic_id, topic, format, on_exhausted = 'dead_letter', paused, dropping from fanout.topic",
			0, NULL, NULL, NULL);
	for (int row = 0; row < SPI_processed; row++)
		load_topic(row);
	load_bindings();
	merge_previous(previous, nprevious);
	load_stalls();
	topology_find_held();
	hurry_emptied_topics();
}

/* ---- declaring ---- */

void
topology_forget_topic(Topic *topic)
{
	topic->confirmed = false;
	topic->rechecked = false;
	if (topic->error != NULL)
		pfree(topic->error);
	topic->error = NULL;
	for (int b = 0; b < topic->nbindings; b++)
	{
		topic->bindings[b].confirmed = false;
		topic->bindings[b].rechecked = false;
		if (topic->bindings[b].error != NULL &&
			topic->bindings[b].queue != NULL && topic->bindings[b].arguments != NULL)
		{
			pfree(topic->bindings[b].error);
			topic->bindings[b].error = NULL;
		}
	}
}

void
topology_forget_confirmed(void)
{
	Topic	   *topic;
	int			i = 0;

	while ((topic = topology_next(&i)) != NULL)
		topology_forget_topic(topic);
}

static Topic *
longest_unchecked(uint32 round)
{
	Topic	   *topic;
	Topic	   *chosen = NULL;
	int			i = 0;

	while ((topic = topology_next(&i)) != NULL)
	{
		if (topic->recheck == round || topic->dropping || !topic->confirmed || topology_error(topic) != NULL)
			continue;
		if (chosen == NULL || topic->recheck < chosen->recheck)
			chosen = topic;
	}
	return chosen;
}

void
topology_recheck(int count)
{
	static uint32 round = 0;
	Topic	   *topic;

	round++;
	while (count-- > 0 && (topic = longest_unchecked(round)) != NULL)
	{
		topic->recheck = round;
		topic->rechecked = topic->confirmed;
		topic->confirmed = false;
		for (int b = 0; b < topic->nbindings; b++)
		{
			topic->bindings[b].rechecked = topic->bindings[b].confirmed;
			topic->bindings[b].confirmed = false;
		}
	}
}

const char *
topology_error(const Topic *topic)
{
	if (topic->error != NULL)
		return topic->error;
	for (int b = 0; b < topic->nbindings; b++)
	{
		if (topic->bindings[b].error != NULL && !topic->bindings[b].dropping)
			return topic->bindings[b].error;
	}
	return NULL;
}

static char *
answer_text(const BrokerError *error, MemoryContext context)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	char	   *text = error->code != 0 ? psprintf("%d %s", error->code, error->text) : pstrdup(error->text);

	MemoryContextSwitchTo(oldcontext);
	return text;
}

bool
topology_access_refused(const Topic *topic)
{
	return topic->stalled && topic->reason != NULL && atoi(topic->reason) == BROKER_ACCESS_REFUSED;
}

/* Is it still unknown what the broker says?  A 403 may be the login's fault. */
static bool
unanswered(Connection *conn, Topic *topic, BrokerResult result, const BrokerError *error)
{
	return result == BROKER_LOST ||
		(result == BROKER_REFUSED && error->code == BROKER_ACCESS_REFUSED &&
		 !connection_believes(conn, &topic->doubted_topology, topology_access_refused(topic)));
}

static BrokerResult
declare_exchange(Connection *conn, Topic *topic, BrokerError *error)
{
	BrokerResult result;

	if (topic->exchange == NULL)
	{
		snprintf(error->text, sizeof(error->text), "name cannot be converted to UTF-8");
		error->code = 0;
		result = BROKER_REFUSED;
	}
	else
		result = broker_declare_exchange(conn->broker, topic->exchange, error);
	if (unanswered(conn, topic, result, error))
		return result;
	topic->confirmed = (result == BROKER_OK);
	topic->answered = topic->answered || !topic->confirmed || !topic->rechecked;
	topic->rechecked = false;
	if (result != BROKER_OK)
		topic->error = answer_text(error, TopMemoryContext);
	return BROKER_OK;
}

static BrokerResult
declare_binding(Connection *conn, Topic *topic, Binding *binding, BrokerError *error)
{
	BrokerResult result = broker_declare_queue(conn->broker, binding->queue, binding->arguments,
											   binding->narguments, error);

	if (result == BROKER_OK)
		result = broker_bind_queue(conn->broker, binding->queue, topic->exchange, error);
	if (unanswered(conn, topic, result, error))
		return result;
	binding->confirmed = (result == BROKER_OK);
	binding->answered = binding->answered || !binding->confirmed || !binding->rechecked;
	binding->rechecked = false;
	if (result != BROKER_OK)
		binding->error = answer_text(error, topic->context);
	return BROKER_OK;
}

/*
 * Quorum queues know neither if-unused nor if-empty (RabbitMQ closes the
 * connection with 540 NOT_IMPLEMENTED), so their counts are looked at first.
 */
static BrokerResult
may_delete(Broker *broker, const Binding *binding, BrokerError *error)
{
	uint32_t	messages;
	uint32_t	consumers;
	BrokerResult result = broker_inspect_queue(broker, binding->queue, &messages, &consumers, error);

	if (result != BROKER_OK)
		return result;
	error->code = 0;
	if (binding->if_unused && consumers > 0)
		snprintf(error->text, sizeof(error->text), "not dropped: the queue has %u consumers", consumers);
	else if (binding->if_empty && messages > 0)
		snprintf(error->text, sizeof(error->text), "not dropped: the queue has %u messages", messages);
	else
		return BROKER_OK;
	return BROKER_REFUSED;
}

static BrokerResult
delete_queue(Connection *conn, Topic *topic, Binding *binding, BrokerError *error)
{
	BrokerResult result = may_delete(conn->broker, binding, error);

	if (result == BROKER_OK)
		result = broker_delete_queue(conn->broker, binding->queue,
									 binding->classic && binding->if_unused,
									 binding->classic && binding->if_empty, error);
	if (unanswered(conn, topic, result, error))
		return result;
	binding->answered = true;
	binding->confirmed = true;
	binding->gone = (result == BROKER_OK || error->code == 404);
	if (!binding->gone)
		binding->error = answer_text(error, topic->context);
	return BROKER_OK;
}

static BrokerResult
delete_exchange(Connection *conn, Topic *topic, BrokerError *error)
{
	BrokerResult result = broker_delete_exchange(conn->broker, topic->exchange, true, error);

	if (unanswered(conn, topic, result, error))
		return result;
	topic->answered = true;
	topic->confirmed = true;
	topic->gone = (result == BROKER_OK || error->code == 404);
	if (!topic->gone)
		topic->error = answer_text(error, TopMemoryContext);
	return BROKER_OK;
}

BrokerResult
topology_declare_topic(Connection *conn, Topic *topic, bool drops, BrokerError *error)
{
	BrokerResult result = BROKER_OK;

	topology_touch(topic);
	if (!topic->confirmed && topic->error == NULL && !topic->dropping)
		result = declare_exchange(conn, topic, error);
	for (int b = 0; b < topic->nbindings && result == BROKER_OK; b++)
	{
		Binding    *binding = &topic->bindings[b];

		if (binding->confirmed || binding->error != NULL)
			continue;
		if (binding->dropping)
			result = drops ? delete_queue(conn, topic, binding, error) : BROKER_OK;
		else if (topic->confirmed)
			result = declare_binding(conn, topic, binding, error);
	}
	if (result == BROKER_OK && drops && topic->dropping && !topic->gone && topic->error == NULL)
		result = delete_exchange(conn, topic, error);
	if (result == BROKER_OK)
		topic->doubted_topology = 0;
	return result;
}

BrokerResult
topology_declare(Connection *conn, bool drops, BrokerError *error)
{
	Topic	   *topic;
	int			i = 0;
	BrokerResult result = BROKER_OK;
	Topic	  **all = palloc((hash_get_num_entries(topics) + 1) * sizeof(Topic *));
	int			n = 0;

	/* asking the broker waits, so no hash scan may be open meanwhile */
	while ((topic = topology_next(&i)) != NULL)
		all[n++] = topic;
	for (i = 0; i < n && result == BROKER_OK; i++)
		result = topology_declare_topic(conn, all[i], drops, error);
	pfree(all);
	return result;
}

/* ---- recording ---- */

bool
topology_unrecorded(void)
{
	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		if (answered(topic) || topic->stall_changed)
			return true;
	}
	return false;
}

static bool
row_exists(const char *table, const char *where, int nargs, Oid *types, Datum *values)
{
	char	   *sql = psprintf("select from %s where %s", table, where);

	execute(sql, nargs, types, values, NULL);
	pfree(sql);
	return SPI_processed > 0;
}

/*
 * Runs an UPDATE or DELETE of one row that some transaction may have locked,
 * without waiting for it; returns whether it was done.
 */
static bool
change_unlocked(const char *command, const char *table, const char *where,
				int nargs, Oid *types, Datum *values, const char *nulls)
{
	/* no stronger lock than the command's own: KEY SHARE may be held long */
	const char *strength = (strncmp(command, "delete", 6) == 0) ? "update" : "no key update";
	char	   *sql = psprintf("%s and ctid = (select ctid from %s where %s for %s skip locked)",
							   command, table, where, strength);

	execute(sql, nargs, types, values, nulls);
	pfree(sql);
	return SPI_processed > 0;
}

#define BINDING_KEY "topic_id = $1 and consumer_group = $2"

static void
record_binding(Topic *topic, Binding *binding)
{
	Oid			types[3] = {INT4OID, TEXTOID, TEXTOID};
	Datum		values[3] = {Int32GetDatum(topic->topic_id), CStringGetTextDatum(binding->consumer_group), (Datum) 0};
	char		nulls[3] = {' ', ' ', 'n'};
	const char *command;

	if (binding->error != NULL)
	{
		values[2] = CStringGetTextDatum(binding->error);
		nulls[2] = ' ';
	}
	if (binding->gone)
		command = "delete from fanout.binding where drop_if_unused is not null and " BINDING_KEY;
	else if (binding->dropping)
		command = "update fanout.binding set drop_if_unused = null, drop_if_empty = null, last_error = $3 where " BINDING_KEY;
	else
		command = "update fanout.binding set last_error = $3,"
			" declared_at = case when $3 is null then clock_timestamp() else declared_at end where " BINDING_KEY;
	binding->answered = !change_unlocked(command, "fanout.binding", BINDING_KEY,
										 binding->gone ? 2 : 3, types, values, nulls) &&
		row_exists("fanout.binding", BINDING_KEY, 2, types, values);
}

static void
forget_topic_rows(Topic *topic)
{
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(topic->topic_id)};

	execute("delete from fanout.stall where topic_id = $1", 1, types, values, NULL);
	execute("delete from fanout.topic_stat where topic_id = $1", 1, types, values, NULL);
}

/* What was held of it in the meantime can go nowhere. */
static void
bury_held_rows(Topic *topic)
{
	Oid			types[2] = {INT4OID, TEXTOID};
	Datum		values[2] = {Int32GetDatum(topic->topic_id), CStringGetTextDatum(topic->name)};

	execute("with h as (delete from fanout.held where topic_id = $1 returning *)"
			" insert into fanout.dead_letter (id, topic, message_id, type, key, headers, payload, queue, xid, created_at, reason, attempts)"
			" select id, $2, message_id, type, key, headers, payload, queue, xid, created_at, 'its topic was dropped', 0 from h",
			2, types, values, NULL);
}

#define TOPIC_KEY "topic_id = $1"

static void
record_topic(Topic *topic)
{
	Oid			types[2] = {INT4OID, TEXTOID};
	Datum		values[2] = {Int32GetDatum(topic->topic_id), (Datum) 0};
	char		nulls[2] = {' ', 'n'};
	const char *command;

	if (topic->error != NULL)
	{
		values[1] = CStringGetTextDatum(topic->error);
		nulls[1] = ' ';
	}
	if (topic->gone)
		command = "delete from fanout.topic where dropping and " TOPIC_KEY;
	else if (topic->dropping)
		command = "update fanout.topic set dropping = false, last_error = $2 where " TOPIC_KEY;
	else
		command = "update fanout.topic set last_error = $2,"
			" declared_at = case when $2 is null then clock_timestamp() else declared_at end where " TOPIC_KEY;
	if (!change_unlocked(command, "fanout.topic", TOPIC_KEY, topic->gone ? 1 : 2, types, values, nulls))
		topic->answered = row_exists("fanout.topic", TOPIC_KEY, 1, types, values);
	else
	{
		topic->answered = false;
		if (topic->gone)
		{
			forget_topic_rows(topic);
			bury_held_rows(topic);
		}
	}
}

void
topology_record(void)
{
	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		for (int b = 0; b < topic->nbindings; b++)
		{
			if (topic->bindings[b].answered)
				record_binding(topic, &topic->bindings[b]);
		}
		if (topic->answered)
			record_topic(topic);
	}
}

/* ---- stalls ---- */

static void
raise_alert(Topic *topic)
{
	ereport(WARNING,
			(errmsg("topic \"%s\" was refused by the broker %d times", topic->name, topic->attempts),
			 errdetail("The broker said: %s", topic->reason),
			 topic->dead_letters ?
			 errhint("The first message waiting goes to fanout.dead_letter.") :
			 errhint("Its messages wait in order; see fanout.stat_topics and fanout.bindings.")));
	alert_queue(topic->name, topic->attempts, topic->reason);
	topic->alert = false;
}

static void
record_stall(Topic *topic)
{
	Oid			types[5] = {INT4OID, TIMESTAMPTZOID, INT4OID, TIMESTAMPTZOID, TEXTOID};
	Datum		values[5] = {
		Int32GetDatum(topic->topic_id), TimestampTzGetDatum(topic->stalled_at),
		Int32GetDatum(topic->attempts), TimestampTzGetDatum(store_retry_at(topic->retry_at)),
		(Datum) 0
	};

	execute("select from fanout.stall where topic_id = $1 for update skip locked", 1, types, values, NULL);
	if (SPI_processed == 0 && row_exists("fanout.stall", TOPIC_KEY, 1, types, values))
		return;					/* resume() has it: next time */
	if (!topic->stalled)
		execute("delete from fanout.stall where topic_id = $1", 1, types, values, NULL);
	else
	{
		values[4] = CStringGetTextDatum(topic->reason);
		execute("insert into fanout.stall (topic_id, stalled_at, attempts, retry_at, last_error)"
				" values ($1, $2, $3, $4, $5)"
				" on conflict (topic_id) do update set attempts = excluded.attempts,"
				" retry_at = excluded.retry_at, last_error = excluded.last_error",
				5, types, values, NULL);
	}
	topic->stall_changed = false;
}

void
topology_record_stalls(void)
{
	for (Topic *topic = topology_restless(NULL); topic != NULL; topic = topology_restless(topic))
	{
		if (topic->stall_changed)
			record_stall(topic);
		if (topic->alert)
			raise_alert(topic);
	}
}
