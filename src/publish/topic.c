/*-------------------------------------------------------------------------
 *
 * topic.c
 *		The topics of a database, as its publisher knows them.
 *
 * Topics and bindings are read from the catalog when fanout.topology_change says
 * that they changed.  What the broker has confirmed of a declaration (topology.c)
 * and what a topic's messages are doing (flow.c) is carried over.
 *
 * A topic that is not in the catalog any more, but whose messages were not sent
 * yet, stays here (known = false) until they have become dead letters.
 *
 * All of it runs inside a transaction opened by worker_begin(), but for finding.
 *
 * Must never: ask the broker anything.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"

#include "publish/topic.h"
#include "publish/wire.h"
#include "server/query.h"
#include "server/utf8.h"

static const TopicKeepers *keepers;
static HTAB *topics = NULL;
static uint32 current_load = 0;

void
topic_init(const TopicKeepers *who)
{
	keepers = who;
}

/* ---- finding ---- */

Topic *
topic_find(int32 topic_id)
{
	return topics == NULL ? NULL : hash_search(topics, &topic_id, HASH_FIND, NULL);
}

/* Returns all topics, in no particular order; begin with *i = 0; NULL at the end. */
Topic *
topic_next(int *i)
{
	static HASH_SEQ_STATUS scan;

	if (topics == NULL)
		return NULL;
	if ((*i)++ == 0)
		hash_seq_init(&scan, topics);
	return hash_seq_search(&scan);
}

static void
make_table(void)
{
	HASHCTL		ctl = {0};

	ctl.keysize = sizeof(int32);
	ctl.entrysize = sizeof(Topic);
	ctl.hcxt = TopMemoryContext;
	topics = hash_create("pg_fanout topics", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
}

/*
 * Returns a topic, one that is not in the catalog if it was not there yet.
 */
Topic *
topic_find_or_add(int32 topic_id)
{
	bool		found;
	Topic	   *topic;

	if (topics == NULL)
		make_table();
	topic = hash_search(topics, &topic_id, HASH_ENTER, &found);
	if (found)
		return topic;
	memset(topic, 0, sizeof(Topic));
	topic->topic_id = topic_id;
	topic->context = AllocSetContextCreate(TopMemoryContext, "pg_fanout topic", ALLOCSET_SMALL_SIZES);
	topic->name = MemoryContextStrdup(topic->context, psprintf("(dropped: %d)", topic_id));
	keepers->create(topic);
	return topic;
}

/* Returns the binding of a consumer group, or NULL. */
Binding *
topic_binding(const Topic *topic, const char *consumer_group)
{
	for (int i = 0; i < topic->nbindings; i++)
	{
		if (strcmp(topic->bindings[i].consumer_group, consumer_group) == 0)
			return &topic->bindings[i];
	}
	return NULL;
}

/* ---- reading the catalog ---- */

/*
 * Tells whether topics or bindings were changed since the last call, and forgets
 * that: what the entries tell of is read after this, with a newer snapshot still,
 * so those that became visible only now may go too.
 */
bool
topic_changed(void)
{
	static CachedQuery query = {"select exists (select from fanout.topology_change)"};
	static CachedQuery forget = {"delete from fanout.topology_change"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	if (!DatumGetBool(query_value(0, 1, &isnull)))
		return false;
	query_execute(&forget, 0, NULL, NULL, NULL);
	return true;
}

static char *
text_value(int row, int column)
{
	bool		isnull;

	return TextDatumGetCString(query_value(row, column, &isnull));
}

/* NULL counts as false. */
static bool
bool_value(int row, int column)
{
	bool		isnull;
	Datum		value = query_value(row, column, &isnull);

	return !isnull && DatumGetBool(value);
}

/* What a topic had before this load: kept until its bindings were compared. */
typedef struct Previous
{
	Topic	   *topic;
	MemoryContext context;
	Binding    *bindings;
	int			nbindings;
} Previous;

static Previous *
remember_previous(int *count)
{
	Previous   *previous = palloc((hash_get_num_entries(topics) + 1) * sizeof(Previous));
	Topic	   *topic;
	int			i = 0;

	*count = 0;
	while ((topic = topic_next(&i)) != NULL)
	{
		Previous   *p = &previous[(*count)++];

		p->topic = topic;
		p->context = topic->context;
		p->bindings = topic->bindings;
		p->nbindings = topic->nbindings;
	}
	return previous;
}

static void
load_topic(int row)
{
	bool		isnull;
	size_t		len;
	int32		topic_id = DatumGetInt32(query_value(row, 1, &isnull));
	Topic	   *topic = topic_find(topic_id);
	MemoryContext oldcontext;
	char	   *format;
	bool		dropping;

	if (topic != NULL)			/* what it had is freed in merge_previous() */
		topic->context = AllocSetContextCreate(TopMemoryContext, "pg_fanout topic", ALLOCSET_SMALL_SIZES);
	else
		topic = topic_find_or_add(topic_id);
	topic->load = current_load;
	topic->known = true;
	oldcontext = MemoryContextSwitchTo(topic->context);
	topic->name = text_value(row, 2);
	topic->exchange = unconstify(char *, utf8_encode(topic->name, strlen(topic->name), &len));
	format = text_value(row, 3);
	topic->content_type = wire_content_type(format, strlen(format));
	topic->dead_letters = bool_value(row, 4);
	topic->paused = bool_value(row, 5);
	dropping = bool_value(row, 6);
	if (topic->dropping != dropping)
	{
		topic->dropping = dropping;
		topic->drop_load = current_load;
		keepers->drop_changed(topic);
	}
	topic->bindings = NULL;
	topic->nbindings = 0;
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Tells whether the queue may refuse a message by design, so that its topic has one
 * message per key in flight.  At-least-once dead lettering needs reject-publish, but
 * the queue refuses only what is beyond a maximum length: without one among the
 * arguments the messages of a key are pipelined.  (A maximum from a policy shows at
 * the first refusal, like that of any queue.)
 */
static bool
refuses_by_design(const Binding *binding, const BrokerField *fields, int n)
{
	bool		rejects = false;
	bool		bounded = false;

	for (int i = 0; i < n; i++)
	{
		if (strcmp(fields[i].name, "x-overflow") == 0 && fields[i].type == BROKER_VALUE_STRING &&
			strncmp(fields[i].value.string.data, "reject-publish", strlen("reject-publish")) == 0)
			rejects = true;
		if (strncmp(fields[i].name, "x-max-length", strlen("x-max-length")) == 0 &&
			fields[i].type != BROKER_VALUE_NULL)
			bounded = true;
	}
	return rejects && (bounded || binding->dead_queue == NULL);
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
		return;
	binding->refuses = refuses_by_design(binding, fields, n);
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
	char	   *queue = text_value(row, 3);
	Jsonb	   *arguments = DatumGetJsonbPCopy(query_value(row, 5, &isnull));

	memset(binding, 0, sizeof(Binding));
	binding->consumer_group = text_value(row, 2);
	binding->queue = unconstify(char *, utf8_encode(queue, strlen(queue), &len));
	if (bool_value(row, 9) && binding->queue != NULL)
		binding->dead_queue = psprintf("%s_dead", binding->queue);
	binding->classic = bool_value(row, 4);
	binding->stream = bool_value(row, 8);
	binding->signature = psprintf("%d %d %s", binding->classic, binding->stream,
								  JsonbToCString(NULL, &arguments->root, VARSIZE(arguments)));
	(void) query_value(row, 6, &isnull);
	binding->dropping = !isnull;
	binding->drop_load = current_load;
	binding->if_unused = bool_value(row, 6);
	binding->if_empty = bool_value(row, 7);
	binding->undeclared = bool_value(row, 10);
	set_arguments(binding, arguments);
	binding->answer.lasting = (binding->queue == NULL || binding->arguments == NULL);
	if (binding->queue == NULL)
		binding->answer.error = pstrdup("name cannot be converted to UTF-8");
	else if (binding->arguments == NULL)
		binding->answer.error = pstrdup("arguments cannot be converted to UTF-8, or have a number that is no double");
}

/* Rows come grouped by topic; returns how many belong to this one. */
static int
load_bindings_of(int first, int nrows)
{
	bool		isnull;
	int32		topic_id = DatumGetInt32(query_value(first, 1, &isnull));
	Topic	   *topic = topic_find(topic_id);
	int			n = 1;
	MemoryContext oldcontext;

	while (first + n < nrows && DatumGetInt32(query_value(first + n, 1, &isnull)) == topic_id)
		n++;
	if (topic == NULL || topic->load != current_load)
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
	static CachedQuery query = {
		"select topic_id, consumer_group, queue, queue_type = 'classic', fanout.queue_arguments(b),"
		" drop_if_unused, drop_if_empty, queue_type = 'stream', dead_letter, declared_at is null"
		" from fanout.binding b order by topic_id, consumer_group"
	};
	int			nrows;

	query_execute(&query, 0, NULL, NULL, NULL);
	nrows = SPI_processed;
	for (int row = 0; row < nrows;)
		row += load_bindings_of(row, nrows);
}

/* Carries over what was known of the same declarations. */
static void
inherit_bindings(Topic *topic, const Binding *old, int nold)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(topic->context);

	for (int i = 0; i < topic->nbindings; i++)
	{
		Binding    *binding = &topic->bindings[i];
		const Binding *same = NULL;

		for (int j = 0; j < nold && same == NULL; j++)
		{
			if (strcmp(old[j].consumer_group, binding->consumer_group) == 0 &&
				strcmp(old[j].signature, binding->signature) == 0)
				same = &old[j];
		}
		if (same != NULL && same->dropping)
			binding->drop_load = same->drop_load;
		keepers->inherit(topic, binding, same);
	}
	MemoryContextSwitchTo(oldcontext);
}

/* A topic that is not in the catalog any more: messages of it may be left. */
static void
forget_topic(Topic *topic)
{
	topic->known = false;
	topic->paused = false;
	topic->context = AllocSetContextCreate(TopMemoryContext, "pg_fanout topic", ALLOCSET_SMALL_SIZES);
	topic->name = MemoryContextStrdup(topic->context, topic->name);
	topic->exchange = NULL;
	topic->bindings = NULL;
	topic->nbindings = 0;
	keepers->gone(topic);
}

/* One that was forgotten before stays as long as there is anything left of it. */
static void
remove_if_done(Topic *topic)
{
	if (!keepers->at_rest(topic) || topic->declaration.queued || topic->declaration.asking)
		return;
	keepers->free(topic);
	MemoryContextDelete(topic->context);
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
		{
			if (!topic->known)
			{
				remove_if_done(topic);
				continue;
			}
			forget_topic(topic);
		}
		else
			inherit_bindings(topic, p->bindings, p->nbindings);
		MemoryContextDelete(p->context);
	}
}

/* How often topics and bindings were read. */
uint32
topic_loads(void)
{
	return current_load;
}

/* Reads topics and bindings. */
void
topic_load(void)
{
	static CachedQuery query = {
		"select topic_id, topic, format, on_exhausted = 'dead_letter', paused, dropping from fanout.topic"
	};
	Previous   *previous;
	int			nprevious;

	if (topics == NULL)
		make_table();
	previous = remember_previous(&nprevious);
	current_load++;
	query_execute(&query, 0, NULL, NULL, NULL);
	for (int row = 0; row < SPI_processed; row++)
		load_topic(row);
	load_bindings();
	merge_previous(previous, nprevious);
}
