/*-------------------------------------------------------------------------
 *
 * inbox.c
 *		The tables of the consuming half: subscriptions, inbox, failures, and
 *		the dead letters of subscriptions; subscribe() and unsubscribe().
 *
 * A message is applied when its id is in the inbox, which it comes into in the
 * transaction that ran its handler.  The inbox is insert-only, in a ring of
 * four segments: rows go to the current one, and that and the two before it are
 * looked into.  After half the retention the next one becomes current.  So the
 * youngest row of the fourth is as old as the retention, at least; it is
 * emptied by TRUNCATE, which nobody who looks into the others is in the way of.
 *
 * The worker runs as the role that subscribed, which has no right to these
 * tables.  So every statement here runs as the extension's owner, with
 * settings of its own, and no code of a user runs meanwhile: the tables have no
 * triggers, and what is done has been done when it returns.
 *
 * Must never: call a handler, or leave the owner's rights behind.
 *
 * Locks: writers hold ROW EXCLUSIVE and readers ACCESS SHARE on segments until
 * their transaction ends, never on the one that is to be emptied; rotation takes
 * ACCESS EXCLUSIVE on that, only if nobody has any lock.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "capture/msgid.h"
#include "consume/inbox.h"
#include "publish/maintenance.h"
#include "publish/wire.h"
#include "server/query.h"
#include "server/segment.h"
#include "server/shmem.h"
#include "server/tables.h"
#include "server/wakeup.h"

#define INBOX_SEGMENTS 4

/* Statements must name segments: a partition that is pruned is locked, too. */
#define LOOK_UP_SEGMENT(segment) \
	"select message_id from fanout.inbox_" #segment \
	" where subscription_id = $1 and message_id = any ($2)"
#define LOOK_UP(a, b, c) \
	{LOOK_UP_SEGMENT(a) " union all " LOOK_UP_SEGMENT(b) " union all " LOOK_UP_SEGMENT(c)}
#define IN_RUNS_SEGMENT(segment) \
	"exists (select from fanout.inbox_" #segment \
	" where subscription_id = $1 and message_id between first and last)"
#define IN_RUNS(a, b, c) \
	{"select from unnest($2, $3) run (first, last) where " \
	IN_RUNS_SEGMENT(a) " or " IN_RUNS_SEGMENT(b) " or " IN_RUNS_SEGMENT(c) " limit 1"}

PG_FUNCTION_INFO_V1(pgf_subscribe);
PG_FUNCTION_INFO_V1(pgf_unsubscribe);
PG_FUNCTION_INFO_V1(pgf_sync_table);
PG_FUNCTION_INFO_V1(pgf_subscriptions_changed);
PG_FUNCTION_INFO_V1(pgf_wake_consumers);

/* ---- the owner's rights ---- */

/* The schema is the extension's own (see the install script), and its owner's. */
static Oid
owner(void)
{
	Oid			schema = get_namespace_oid("fanout", false);
	HeapTuple	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
	Oid			result;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for schema %u", schema);
	result = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);
	return result;
}

Caller
become_owner(void)
{
	static const char *const settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"enable_seqscan", "off"},	/* plans are made when tables are empty */
		{"plan_cache_mode", "force_generic_plan"},
		{"jit", "off"},			/* a disabled scan looks dear enough for it */
	};
	Caller		caller;

	GetUserIdAndSecContext(&caller.user, &caller.context);
	SetUserIdAndSecContext(owner(), caller.context | SECURITY_LOCAL_USERID_CHANGE);
	caller.settings = NewGUCNestLevel();
	for (int i = 0; i < lengthof(settings); i++)
		(void) set_config_option(settings[i][0], settings[i][1], PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	return caller;
}

void
become_caller(const Caller *caller)
{
	AtEOXact_GUC(false, caller->settings);
	SetUserIdAndSecContext(caller->user, caller->context);
}

/* ---- subscriptions ---- */

/* Tells the launcher which subscriptions there are; called by the publisher. */
static int
publish_subscriptions(void)
{
	static CachedQuery query = {
		"select subscription_id, version, role::oid from fanout.subscription s"
		" where active and fanout.subscription_problem(s) is null order by subscription_id"
	};
	Caller		caller = become_owner();
	Subscription *subscriptions;
	int			n;
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	n = SPI_processed;
	subscriptions = palloc((n + 1) * sizeof(Subscription));
	for (int i = 0; i < n; i++)
	{
		subscriptions[i].subscription_id = DatumGetInt32(query_value(i, 1, &isnull));
		subscriptions[i].version = DatumGetInt32(query_value(i, 2, &isnull));
		subscriptions[i].role = DatumGetObjectId(query_value(i, 3, &isnull));
	}
	become_caller(&caller);
	return shmem_set_subscriptions(MyDatabaseId, subscriptions, n);
}

static char *
text_value(int row, int column)
{
	bool		isnull;
	Datum		value = query_value(row, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

static char *
utf8(const char *s)
{
	size_t		len;
	const char *result = wire_utf8(s, strlen(s), &len);

	return result != NULL ? pstrdup(result) : NULL;
}

static void
read_subscription(SubscriptionRow *row)
{
	bool		isnull;

	row->version = DatumGetInt32(query_value(0, 1, &isnull));
	row->topic = text_value(0, 2);
	row->consumer_group = text_value(0, 3);
	row->exchange = utf8(row->topic);
	row->queue = utf8(psprintf("%s_%s", row->topic, row->consumer_group));
	row->batch = DatumGetBool(query_value(0, 4, &isnull));
	row->ordered = DatumGetBool(query_value(0, 5, &isnull));
	row->prefetch = DatumGetInt32(query_value(0, 6, &isnull));
	row->max_attempts = DatumGetInt32(query_value(0, 7, &isnull));
	row->retry_delay = (long) DatumGetInt64(query_value(0, 8, &isnull));
	row->max_retry_delay = (long) DatumGetInt64(query_value(0, 9, &isnull));
	row->handler_timeout = (int) DatumGetInt64(query_value(0, 10, &isnull));
	row->handler = DatumGetObjectId(query_value(0, 11, &isnull));
	row->message_type = DatumGetObjectId(query_value(0, 12, &isnull));
	row->argument_type = DatumGetObjectId(query_value(0, 13, &isnull));
	row->problem = text_value(0, 14);
	row->sync_target = DatumGetObjectId(query_value(0, 15, &isnull));
	if (row->exchange == NULL || row->queue == NULL)
		row->problem = pstrdup("its name cannot be converted to UTF-8");
}

bool
inbox_load_subscription(int32 subscription_id, MemoryContext context, SubscriptionRow *row)
{
	static CachedQuery query = {
		"select version, topic, consumer_group, batch, ordered, prefetch, max_attempts,"
		" (extract(epoch from retry_delay) * 1000)::bigint, (extract(epoch from max_retry_delay) * 1000)::bigint,"
		" (extract(epoch from handler_timeout) * 1000)::bigint,"
		" coalesce(fanout.subscription_handler(s), 0), 'fanout.message'::regtype::oid,"
		" case when batch then 'fanout.message[]'::regtype else 'fanout.message'::regtype end::oid,"
		" coalesce(fanout.subscription_problem(s), fanout.handler_problem(s), fanout.sync_problem(s.subscription_id)),"
		" coalesce((select t.target::oid from fanout.sync_target t where t.subscription_id = s.subscription_id), 0)"
		" from fanout.subscription s where subscription_id = $1 and active"
	};
	Caller		caller = become_owner();
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(subscription_id)};
	bool		found;

	query_execute(&query, 1, types, values, NULL);
	found = (SPI_processed == 1);
	if (found)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(context);

		memset(row, 0, sizeof(*row));
		row->subscription_id = subscription_id;
		read_subscription(row);
		MemoryContextSwitchTo(oldcontext);
	}
	become_caller(&caller);
	return found;
}

bool
inbox_subscription_is(int32 subscription_id, int32 version)
{
	static CachedQuery query = {
		"select from fanout.subscription where subscription_id = $1 and version = $2 and active"
	};
	Caller		caller = become_owner();
	Oid			types[2] = {INT4OID, INT4OID};
	Datum		values[2] = {Int32GetDatum(subscription_id), Int32GetDatum(version)};

	query_execute(&query, 2, types, values, NULL);
	become_caller(&caller);
	return SPI_processed == 1;
}

bool
inbox_binding_exists(const char *topic, const char *consumer_group)
{
	static CachedQuery query = {
		"select from fanout.bindings where topic = $1 and consumer_group = $2"
	};
	Caller		caller = become_owner();
	Oid			types[2] = {TEXTOID, TEXTOID};
	Datum		values[2] = {CStringGetTextDatum(topic), CStringGetTextDatum(consumer_group)};

	query_execute(&query, 2, types, values, NULL);
	become_caller(&caller);
	return SPI_processed > 0;
}

/* ---- the inbox ---- */

static Datum
uuid_array(Datum *ids, int n)
{
	return PointerGetDatum(construct_array(ids, n, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
}

static Datum
id_array(Delivery **deliveries, int n, bool (*chosen) (const Delivery *delivery), int *count)
{
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));

	*count = 0;
	for (int i = 0; i < n; i++)
	{
		if (chosen == NULL || chosen(deliveries[i]))
			ids[(*count)++] = UUIDPGetDatum(&deliveries[i]->message_id);
	}
	return uuid_array(ids, *count);
}

static int
current_segment(void)
{
	static CachedQuery query = {"select current::int from fanout.inbox_rotation"};
	bool		isnull;

	query_execute(&query, 0, NULL, NULL, NULL);
	if (SPI_processed != 1)
		tables_row_missing("inbox_rotation");
	return DatumGetInt32(query_value(0, 1, &isnull));
}

static int
compare_ids(const void *a, const void *b)
{
	const Delivery *left = *(Delivery *const *) a;
	const Delivery *right = *(Delivery *const *) b;
	int			result = memcmp(&left->message_id, &right->message_id, UUID_LEN);

	if (result != 0)
		return result;
	return left->order.place < right->order.place ? -1 : 1;
}

static Delivery **
sort_by_id(Delivery **deliveries, int n)
{
	Delivery  **sorted = palloc((n + 1) * sizeof(Delivery *));

	memcpy(sorted, deliveries, n * sizeof(Delivery *));
	qsort(sorted, n, sizeof(Delivery *), compare_ids);
	return sorted;
}

static bool
equal_ids(const Delivery *a, const Delivery *b, size_t length)
{
	return memcmp(&a->message_id, &b->message_id, length) == 0;
}

static void
find_twins(Delivery **sorted, int n)
{
	for (int i = 0; i < n; i++)
		sorted[i]->outcome = (i > 0 && equal_ids(sorted[i], sorted[i - 1], UUID_LEN)) ? OUTCOME_TWIN : OUTCOME_NONE;
}

/*
 * Might any of them be in the inbox?  The ids of a process that writes messages
 * count up in their second half (msgid.c), so those that come together are a
 * few runs.  Nothing in the inbox lies within a run whose messages are all new,
 * and one search finds that out.  Other producers' ids are no runs.
 */
static bool
may_be_seen(int32 subscription_id, int segment, Delivery **sorted, int n)
{
	static CachedQuery queries[INBOX_SEGMENTS] = {
		IN_RUNS(0, 3, 2), IN_RUNS(1, 0, 3), IN_RUNS(2, 1, 0), IN_RUNS(3, 2, 1)
	};
	Oid			types[3] = {INT4OID, UUIDARRAYOID, UUIDARRAYOID};
	Datum		values[3] = {Int32GetDatum(subscription_id), (Datum) 0, (Datum) 0};
	Datum	   *first = palloc((n + 1) * sizeof(Datum));
	Datum	   *last = palloc((n + 1) * sizeof(Datum));
	int			runs = 0;

	for (int i = 0; i < n; i++)
	{
		if (i == 0 || !equal_ids(sorted[i], sorted[i - 1], MSGID_HALF))
			first[runs++] = UUIDPGetDatum(&sorted[i]->message_id);
		last[runs - 1] = UUIDPGetDatum(&sorted[i]->message_id);
	}
	if (runs > n / 4)
		return true;
	values[1] = uuid_array(first, runs);
	values[2] = uuid_array(last, runs);
	query_execute(&queries[segment], 3, types, values, NULL);
	return SPI_processed > 0;
}

/* All with that id, of which the lowest one is searched for. */
static void
set_seen(Delivery **sorted, int n, const pg_uuid_t *id)
{
	int			low = 0;
	int			high = n;

	while (low < high)
	{
		int			middle = (low + high) / 2;

		if (memcmp(&sorted[middle]->message_id, id, UUID_LEN) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	for (; low < n && memcmp(&sorted[low]->message_id, id, UUID_LEN) == 0; low++)
		sorted[low]->outcome = OUTCOME_SEEN;
}

static void
find_seen(int32 subscription_id, int segment, Delivery **sorted, int n)
{
	static CachedQuery queries[INBOX_SEGMENTS] = {
		LOOK_UP(0, 3, 2), LOOK_UP(1, 0, 3), LOOK_UP(2, 1, 0), LOOK_UP(3, 2, 1)
	};
	Oid			types[2] = {INT4OID, UUIDARRAYOID};
	Datum		values[2] = {Int32GetDatum(subscription_id), (Datum) 0};
	int			count;
	bool		isnull;

	values[1] = id_array(sorted, n, NULL, &count);
	query_execute(&queries[segment], 2, types, values, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		set_seen(sorted, n, DatumGetUUIDP(query_value(i, 1, &isnull)));
}

void
inbox_look_up(int32 subscription_id, Delivery **deliveries, int n)
{
	Caller		caller = become_owner();
	int			segment = current_segment();
	Delivery  **sorted = sort_by_id(deliveries, n);

	find_twins(sorted, n);
	if (may_be_seen(subscription_id, segment, sorted, n))
		find_seen(subscription_id, segment, sorted, n);
	become_caller(&caller);
}

static bool
is_done(const Delivery *delivery)
{
	return delivery->outcome == OUTCOME_APPLIED || delivery->outcome == OUTCOME_DEAD;
}

static bool
is_done_at_last(const Delivery *delivery)
{
	return delivery->known && (is_done(delivery) || delivery->outcome == OUTCOME_SEEN);
}

static void
forget_failures(int32 subscription_id, Delivery **deliveries, int n)
{
	static CachedQuery query = {
		"delete from fanout.failure where subscription_id = $1 and message_id = any ($2)"
	};
	Oid			types[2] = {INT4OID, UUIDARRAYOID};
	Datum		values[2] = {Int32GetDatum(subscription_id), (Datum) 0};
	int			count;

	values[1] = id_array(deliveries, n, is_done_at_last, &count);
	if (count > 0)
		query_execute(&query, 2, types, values, NULL);
}

/* As the outbox is written (writer.c): there is nothing on it but its index. */
static void
insert_ids(int32 subscription_id, int segment, Delivery **deliveries, int n)
{
	Oid			relid = segment_oid("inbox", segment);
	Relation	rel = table_open(relid, RowExclusiveLock);
	TupleDesc	desc = CreateTupleDescCopy(RelationGetDescr(rel));
	Datum		values[3] = {Int16GetDatum(segment), Int32GetDatum(subscription_id), (Datum) 0};
	bool		nulls[3] = {false, false, false};
	HeapTuple  *rows = palloc((n + 1) * sizeof(HeapTuple));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (!is_done(deliveries[i]))
			continue;
		values[2] = UUIDPGetDatum(&deliveries[i]->message_id);
		rows[count++] = heap_form_tuple(desc, values, nulls);
	}
	segment_insert(relid, desc, rows, count);
	table_close(rel, NoLock);
}

void
inbox_record(int32 subscription_id, Delivery **deliveries, int n)
{
	Caller		caller = become_owner();

	insert_ids(subscription_id, current_segment(), deliveries, n);
	forget_failures(subscription_id, deliveries, n);
	become_caller(&caller);
}

/* ---- failures ---- */

void
inbox_record_failure(int32 subscription_id, const Delivery *delivery)
{
	static CachedQuery query = {
		"insert into fanout.failure as f (subscription_id, message_id, type, key, old_key, truncates,"
		" sequence, attempts, sqlstate, error, failed_at, next_try)"
		" values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, clock_timestamp(), $11)"
		" on conflict (subscription_id, message_id) do update set attempts = excluded.attempts,"
		" sqlstate = excluded.sqlstate, error = excluded.error, failed_at = excluded.failed_at,"
		" next_try = excluded.next_try"
	};
	Caller		caller = become_owner();
	Oid			types[11] = {
		INT4OID, UUIDOID, TEXTOID, TEXTOID, TEXTOID, BOOLOID, INT8OID, INT4OID, TEXTOID, TEXTOID, TIMESTAMPTZOID
	};
	char		nulls[11];
	Datum		values[11];

	memset(nulls, ' ', sizeof(nulls));
	values[0] = Int32GetDatum(subscription_id);
	values[1] = UUIDPGetDatum(&delivery->message_id);
	values[2] = query_text_param(delivery->type, &nulls[2]);
	values[3] = query_text_param(delivery->key, &nulls[3]);
	values[4] = query_text_param(delivery->old_key, &nulls[4]);
	values[5] = BoolGetDatum(delivery->truncates);
	values[6] = Int64GetDatum(delivery->sequence);
	nulls[6] = delivery->has_sequence ? ' ' : 'n';
	values[7] = Int32GetDatum(delivery->attempts);
	values[8] = CStringGetTextDatum(delivery->sqlstate);
	values[9] = CStringGetTextDatum(delivery->error);
	values[10] = TimestampTzGetDatum(GetCurrentTimestamp() + (delivery->due - mono_now()));
	query_change(&query, 11, types, values, nulls, 1);
	become_caller(&caller);
}

static Delivery *
read_failure(int row, bool ordered)
{
	Delivery   *delivery = palloc0(sizeof(Delivery));
	bool		isnull;
	char	   *key;
	char	   *old_key;

	memcpy(&delivery->message_id, DatumGetUUIDP(query_value(row, 1, &isnull)), sizeof(pg_uuid_t));
	delivery->type = text_value(row, 2);
	delivery->key = text_value(row, 3);
	delivery->old_key = text_value(row, 4);
	delivery->truncates = DatumGetBool(query_value(row, 5, &isnull));
	delivery->sequence = DatumGetInt64(query_value(row, 6, &isnull));
	delivery->has_sequence = !isnull;
	delivery->attempts = DatumGetInt32(query_value(row, 7, &isnull));
	strlcpy(delivery->sqlstate, text_value(row, 8), sizeof(delivery->sqlstate));
	delivery->error = text_value(row, 9);
	delivery->due = mono_now() + (DatumGetTimestampTz(query_value(row, 10, &isnull)) - GetCurrentTimestamp());
	delivery->known = true;
	if (ordered)
	{
		key = delivery->key ? utf8(delivery->key) : NULL;
		old_key = delivery->old_key ? utf8(delivery->old_key) : NULL;
		delivery_set_keys(delivery, key, key ? strlen(key) : 0, old_key, old_key ? strlen(old_key) : 0);
	}
	return delivery;
}

Delivery  **
inbox_load_failures(int32 subscription_id, bool ordered, MemoryContext context, int *n)
{
	static CachedQuery query = {
		"select message_id, type, key, old_key, truncates, sequence, attempts, sqlstate, error, next_try"
		" from fanout.failure where subscription_id = $1 order by sequence, failed_at"
	};
	Caller		caller = become_owner();
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(subscription_id)};
	MemoryContext oldcontext;
	Delivery  **failures;

	query_execute(&query, 1, types, values, NULL);
	oldcontext = MemoryContextSwitchTo(context);
	*n = SPI_processed;
	failures = palloc((*n + 1) * sizeof(Delivery *));
	for (int i = 0; i < *n; i++)
		failures[i] = read_failure(i, ordered);
	MemoryContextSwitchTo(oldcontext);
	become_caller(&caller);
	return failures;
}

/* ---- dead letters ---- */

/* The body as text, or else the bytes. */
static void
set_body(const BrokerDelivery *wire, Datum *values, char *nulls)
{
	char	   *payload = delivery_text(wire->body_len > 0 ? wire->body : "", wire->body_len);

	values[0] = query_text_param(payload, &nulls[0]);
	nulls[1] = (payload == NULL) ? ' ' : 'n';
	values[1] = (payload == NULL) ?
		PointerGetDatum(cstring_to_text_with_len(wire->body, wire->body_len)) : (Datum) 0;
}

void
inbox_bury(const SubscriptionRow *row, const Delivery *delivery)
{
	static CachedQuery query = {
		"insert into fanout.dead_letter (message_id, topic, consumer_group, type, key, id, headers,"
		" content_type, created_at, payload, raw, reason, sqlstate, attempts)"
		" values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
	};
	static const int attributes[] = {
		MESSAGE_ID, MESSAGE_TOPIC, MESSAGE_CONSUMER_GROUP, MESSAGE_TYPE, MESSAGE_KEY, MESSAGE_SEQUENCE,
		MESSAGE_HEADERS, MESSAGE_CONTENT_TYPE, MESSAGE_PUBLISHED_AT
	};
	Oid			types[14] = {
		UUIDOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT8OID, JSONBOID,
		TEXTOID, TIMESTAMPTZOID, TEXTOID, BYTEAOID, TEXTOID, TEXTOID, INT4OID
	};
	Caller		caller = become_owner();
	MessageValues message;
	Datum		values[14];
	char		nulls[14];

	memset(nulls, ' ', sizeof(nulls));
	delivery_values(delivery, row->topic, row->consumer_group, &message);
	for (int i = 0; i < lengthof(attributes); i++)
	{
		values[i] = message.values[attributes[i]];
		nulls[i] = message.nulls[attributes[i]] ? 'n' : ' ';
	}
	set_body(delivery->wire, &values[9], &nulls[9]);
	values[11] = CStringGetTextDatum(delivery->error);
	values[12] = CStringGetTextDatum(delivery->sqlstate);
	values[13] = Int32GetDatum(delivery->attempts);
	query_change(&query, 14, types, values, nulls, 1);
	become_caller(&caller);
}

/* The columns that become attributes come in their order, from the second on. */
static void
read_redriven(Redriven *redriven, const SubscriptionRow *row)
{
	MessageValues *message = &redriven->message;
	TupleDesc	desc = SPI_tuptable->tupdesc;
	bool		isnull;
	struct varlena *raw;

	redriven->dead_id = DatumGetInt64(query_value(0, 1, &isnull));
	for (int i = 0; i < MESSAGE_ATTRIBUTES; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i + 1);
		Datum		value = query_value(0, i + 2, &message->nulls[i]);

		if (message->nulls[i])
			continue;
		if (attr->attlen == -1)
			value = PointerGetDatum(PG_DETOAST_DATUM_COPY(value));
		else if (!attr->attbyval)
			value = PointerGetDatum(memcpy(palloc(attr->attlen), DatumGetPointer(value), attr->attlen));
		message->values[i] = value;
	}
	raw = (struct varlena *) DatumGetPointer(message->values[MESSAGE_RAW]);
	message->values[MESSAGE_BODY] = delivery_json(VARDATA_ANY(raw), VARSIZE_ANY_EXHDR(raw),
												  &message->nulls[MESSAGE_BODY]);
}

bool
inbox_take_redriven(const SubscriptionRow *row, MemoryContext context, Redriven *redriven)
{
	static CachedQuery query = {
		"update fanout.dead_letter d set redriven_at = null, attempts = attempts + 1,"
		" reason = 'the worker ended while the handler ran', sqlstate = '57P01'"
		" where dead_id = (select dead_id from fanout.dead_letter"
		" where topic = $1 and consumer_group = $2 and redriven_at is not null"
		" order by dead_id limit 1 for update skip locked)"
		" returning dead_id, message_id, topic, consumer_group, type, key, id, coalesce(headers, '{}'), null::jsonb,"
		" coalesce(raw, convert_to(payload, 'UTF8')), created_at, true, attempts, content_type"
	};
	Caller		caller = become_owner();
	Oid			types[2] = {TEXTOID, TEXTOID};
	Datum		values[2] = {CStringGetTextDatum(row->topic), CStringGetTextDatum(row->consumer_group)};
	MemoryContext oldcontext;
	bool		found;

	query_execute(&query, 2, types, values, NULL);
	found = (SPI_processed > 0);
	if (found)
	{
		oldcontext = MemoryContextSwitchTo(context);
		read_redriven(redriven, row);
		MemoryContextSwitchTo(oldcontext);
	}
	become_caller(&caller);
	return found;
}

bool
inbox_remove_redriven(int64 dead_id)
{
	static CachedQuery query = {"delete from fanout.dead_letter where dead_id = $1"};
	Caller		caller = become_owner();
	Oid			types[1] = {INT8OID};
	Datum		values[1] = {Int64GetDatum(dead_id)};

	query_execute(&query, 1, types, values, NULL);
	become_caller(&caller);
	return SPI_processed == 1;
}

void
inbox_record_redriven(int64 dead_id, const char *sqlstate, const char *error)
{
	static CachedQuery query = {
		"update fanout.dead_letter set reason = $2, sqlstate = $3, dead_at = clock_timestamp() where dead_id = $1"
	};
	Caller		caller = become_owner();
	Oid			types[3] = {INT8OID, TEXTOID, TEXTOID};
	Datum		values[3] = {
		Int64GetDatum(dead_id), CStringGetTextDatum(error), CStringGetTextDatum(sqlstate)
	};

	query_execute(&query, 3, types, values, NULL);
	become_caller(&caller);
}

/* ---- the ring of segments ---- */

/* Unless it is in use; false: it is not empty. */
static bool
empty_inbox(int segment)
{
	Oid			relid = segment_oid("inbox", segment);

	if (segment_empty(relid))
		return true;
	if (!segment_lock(relid))
		return false;
	segment_truncate(relid);
	return true;
}

/* What the inbox would not recognise any more may as well be applied again. */
static void
forget_old(CachedQuery *query, int retention_s)
{
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};

	query_execute(query, 1, types, values, NULL);
}

/*
 * Empties segments that are older than the retention, and goes on to the next;
 * removes failures of which nobody has heard for that long, and what is
 * remembered of rows of sync_table() that were deleted.  Called by the publisher.
 */
static void
rotate(int retention_s)
{
	/* the clock was wrong once: better too long than too short */
	static CachedQuery not_yet = {
		"update fanout.inbox_rotation set rotated_at = clock_timestamp() where rotated_at > clock_timestamp()"
	};
	static CachedQuery due = {
		"select from fanout.inbox_rotation where rotated_at < clock_timestamp() - $1 / 2.0 * interval '1 s'"
	};
	static CachedQuery advance = {
		"update fanout.inbox_rotation set current = $1::smallint, rotated_at = clock_timestamp()"
	};
	static CachedQuery failures = {
		"delete from fanout.failure where next_try < clock_timestamp() - $1 * interval '1 s'"
	};
	static CachedQuery deleted_rows = {
		"delete from fanout.sync_row where deleted_at < clock_timestamp() - $1 * interval '1 s'"
	};
	Caller		caller = become_owner();
	int			next = (current_segment() + 1) % INBOX_SEGMENTS;
	bool		ready = empty_inbox(next);
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};

	query_execute(&not_yet, 0, NULL, NULL, NULL);
	query_execute(&due, 1, types, values, NULL);
	if (SPI_processed == 1)
	{
		if (ready)
		{
			values[0] = Int32GetDatum(next);
			query_change(&advance, 1, types, values, NULL, 1);
		}
		forget_old(&failures, retention_s);
		forget_old(&deleted_rows, retention_s);
	}
	become_caller(&caller);
}

/* ---- subscribe() and unsubscribe() ---- */

/*
 * Calls the function with the owner's rights, and the role that called us, and
 * that alone, as its first argument.
 */
static void
call_as_owner(FunctionCallInfo fcinfo, const char *sql, Oid *types)
{
	Datum		values[FUNC_MAX_ARGS];
	char		nulls[FUNC_MAX_ARGS];
	Caller		caller;

	values[0] = ObjectIdGetDatum(GetUserId());
	nulls[0] = ' ';
	for (int i = 0; i < PG_NARGS(); i++)
	{
		values[i + 1] = PG_GETARG_DATUM(i);
		nulls[i + 1] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	caller = become_owner();
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	if (SPI_execute_with_args(sql, PG_NARGS() + 1, types, values, nulls, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not execute \"%s\"", sql);
	SPI_finish();
	become_caller(&caller);
}

Datum
pgf_subscribe(PG_FUNCTION_ARGS)
{
	Oid			types[] = {
		OIDOID, TEXTOID, TEXTOID, REGPROCEDUREOID, INT4OID, INT4OID, INTERVALOID, INTERVALOID, BOOLOID, INTERVALOID
	};

	PreventCommandIfReadOnly("fanout.subscribe()");
	call_as_owner(fcinfo, "select fanout.add_subscription($1::regrole, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
				  types);
	PG_RETURN_VOID();
}

Datum
pgf_sync_table(PG_FUNCTION_ARGS)
{
	Oid			types[] = {
		OIDOID, TEXTOID, TEXTOID, REGCLASSOID, TEXTARRAYOID, JSONBOID, TEXTOID, TEXTOID, INT4OID, INT4OID,
		INTERVALOID, INTERVALOID, INTERVALOID
	};

	PreventCommandIfReadOnly("fanout.sync_table()");
	call_as_owner(fcinfo, "select fanout.add_sync_table($1::regrole, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
				  types);
	PG_RETURN_VOID();
}

Datum
pgf_unsubscribe(PG_FUNCTION_ARGS)
{
	Oid			types[] = {OIDOID, TEXTOID, TEXTOID};

	PreventCommandIfReadOnly("fanout.unsubscribe()");
	call_as_owner(fcinfo, "select fanout.remove_subscription($1::regrole, $2, $3)", types);
	PG_RETURN_VOID();
}

Datum
pgf_subscriptions_changed(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be called by a trigger", "fanout.subscriptions_changed")));
	wakeup_subscriptions_at_commit();
	return PointerGetDatum(NULL);
}

Datum
pgf_wake_consumers(PG_FUNCTION_ARGS)
{
	wakeup_consumers_at_commit();
	PG_RETURN_VOID();
}

/*
 * Hands to the publisher what it does for consumers.  To be called once in the
 * postmaster.
 */
void
inbox_init(void)
{
	static const ConsumerUpkeep upkeep = {
		.publish_subscriptions = publish_subscriptions,
		.rotate_inbox = rotate
	};

	maintenance_set_upkeep(&upkeep);
}
