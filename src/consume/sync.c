/*-------------------------------------------------------------------------
 *
 * sync.c
 *		The built-in handler of sync_table(): keeps a table equal to the remote
 *		entity.
 *
 * Decides what each message does to the table: applies messages one after the
 * other, in the order given, and leaves out those that are not for it.
 *
 *		no header "op"; another table than the source	ignored
 *		a change that has come through this very table	own
 *		not newer than what is remembered of its key	stale
 *		header "compare", no "op"						compared (compare.c)
 *		all others					written (sync_write.c)
 *
 * A row is found by its own key columns, as their types compare, and looks as the
 * key does; the header "key" only has to be made of the same values, since else a
 * change of the key could go unnoticed.
 *
 * Where the source's key is deferrable, a row may leave a key that another one has
 * already.  The header "taken" says so: then nothing is deleted, so that no row that
 * refers to the key is in the way or goes with it, and the message of the other row,
 * which follows, writes what is there:
 *
 *		1 -> 2 (2 is there)				writes 2, deletes 1
 *		2 -> 3 (taken)					writes 3, leaves 2
 *		2 is there						writes 2
 *
 * Rights: everything that runs code of others, input functions, defaults,
 * triggers and constraints, runs as the table's owner, as the role that subscribed
 * must be allowed to; none of that role's own rights are lent to them.  Deferred
 * triggers are fired before these rights end.
 *
 * It must never write anything for a message that it cannot tell what row it is
 * about, and never count what is rolled back.
 *
 * Locks: see sync_target.c.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/numeric.h"
#include "utils/typcache.h"

#include "capture/headers.h"
#include "capture/via.h"
#include "consume/compare.h"
#include "consume/delivery.h"
#include "consume/handler.h"
#include "consume/sync_target.h"
#include "server/shmem.h"
#include "server/utf8.h"
#include "server/worker.h"

PG_FUNCTION_INFO_V1(pgf_sync_messages);

typedef enum SyncAction
{
	SYNC_NOTHING,
	SYNC_WRITE,
	SYNC_DELETE,
	SYNC_TRUNCATE,
	SYNC_COMPARE,
} SyncAction;

/* NULL: the message has none. */
typedef struct SyncMessage
{
	const char *key;			/* headers */
	const char *old_key;
	const char *key_columns;
	const char *op;
	const char *schema;
	const char *table;
	const char *format;
	const char *via;
	int64		xid;			/* 0: none */
	int64		compare;		/* the run that it is a part of; 0: none */
	int64		sequence;
	bool		has_sequence;
	bool		taken;			/* another row has the key that this one
								 * leaves; a message of it follows */
	bool		superseded;		/* a later one tells where its row has come
								 * to: see waiting.c */
	char	   *body;			/* in the server encoding; NULL: it cannot be */

	/* looked into */
	SyncAction	action;
	SyncValues	row;			/* of a delete, its key alone */
	bool		moves;			/* the key changed */
	SyncValues	old_key_values;
} SyncMessage;

typedef struct SyncCounts
{
	uint64		stale;
	uint64		own;
	uint64		ignored;
} SyncCounts;

/* Counts the messages of a transaction, for the worker's counters once it has committed. */
static SyncCounts counted;

/* Counts those of the call that runs; added to the transaction's once the call has succeeded. */
static SyncCounts counting;

#define HINT_OTHERS "Only messages of pg_fanout can be applied to a table."

/* ---- counters ---- */

static void
xact_ended(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT && worker_subscription != NULL)
	{
		pg_atomic_fetch_add_u64(&worker_subscription->stale, counted.stale);
		pg_atomic_fetch_add_u64(&worker_subscription->own, counted.own);
		pg_atomic_fetch_add_u64(&worker_subscription->ignored, counted.ignored);
	}
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT)
		memset(&counted, 0, sizeof(counted));
}

static void
count_call(void)
{
	counted.stale += counting.stale;
	counted.own += counting.own;
	counted.ignored += counting.ignored;
}

static void
watch_transactions(void)
{
	static bool watching = false;

	if (!watching)
		RegisterXactCallback(xact_ended, NULL);
	watching = true;
}

/* ---- from a body to rows ---- */

/* Finds a member of an object; false: there is none, or it is a null. */
static bool
find_member(const JsonSlice *object, const char *quoted_name, JsonSlice *found)
{
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	value;

	found->kind = JSON_IS_NULL;
	jsonscan_enter(object, &cursor);
	while (jsonscan_member(&cursor, &name, &value) == JSON_FOUND)
	{
		if (name.len == strlen(quoted_name) && memcmp(name.text, quoted_name, name.len) == 0)
			*found = value;
	}
	return found->kind != JSON_IS_NULL;
}

/* Finds the row that a message is about, and the one before, if it says so. */
static void
find_rows(const SyncMessage *message, JsonSlice *row, JsonSlice *old_row)
{
	JsonSlice	body;

	row->kind = old_row->kind = JSON_IS_NULL;
	if (message->format == NULL)
		sync_refuse("it has no header \"format\"", HINT_OTHERS);
	if (message->body == NULL || !jsonscan_text(message->body, strlen(message->body), &body) ||
		body.kind != JSON_IS_OBJECT)
		return;
	if (strcmp(message->format, "row") == 0)
		*row = body;
	else if (strcmp(message->format, "cloudevents") == 0)
		(void) find_member(&body, "\"data\"", row);
	else if (strcmp(message->format, "debezium") == 0)
	{
		(void) find_member(&body, "\"before\"", old_row);
		/* of a deleted row there is only what it was */
		if (!find_member(&body, "\"after\"", row))
			*row = *old_row;
	}
	else
		sync_refuse(psprintf("its format \"%s\" is not known", message->format), HINT_OTHERS);
}

/* ---- keys ---- */

/*
 * Tells whether the key of a single column of that type is JSON, not a text: see
 * rowjson_text().  An array may be either; its text begins with a brace, or with
 * bounds as in [0:1]={7,8}.
 */
static bool
key_is_json(Oid type, const char *key)
{
	if (type_is_array(type))
		return key[0] == '[' && key[1 + strspn(key + 1, "+-0123456789")] != ':';
	return type == JSONOID || type == JSONBOID || type_is_rowtype(type);
}

static bool
slice_is(const JsonSlice *slice, const char *text)
{
	return (slice->len == strlen(text) && memcmp(slice->text, text, slice->len) == 0) ||
		(slice->kind == JSON_IS_STRING && strcmp(readjson_string(slice), text) == 0);
}

/* Takes a JSON array apart; false: it is none of that many elements. */
static bool
read_elements(const char *text, JsonSlice *elements, int count)
{
	JsonSlice	array;
	JsonSlice	element;
	JsonCursor	cursor;
	int			n = 0;

	if (!jsonscan_text(text, strlen(text), &array) || array.kind != JSON_IS_ARRAY)
		return false;
	jsonscan_enter(&array, &cursor);
	while (jsonscan_element(&cursor, &element) == JSON_FOUND)
	{
		if (n == count)
			return false;
		elements[n++] = element;
	}
	return n == count;
}

/*
 * Tells whether the header "key" has the values of the key columns, in whatever
 * order.  Only then is the row known whenever its key changes.
 */
static bool
key_has_values(const char *key, const JsonSlice *slices, int count)
{
	JsonSlice  *elements = palloc((count + 1) * sizeof(JsonSlice));

	if (count == 1)
		return slice_is(&slices[0], key);
	if (!read_elements(key, elements, count))
		return false;
	for (int i = 0; i < count; i++)
	{
		int			k;

		for (k = 0; k < count; k++)
		{
			if (elements[k].len == slices[i].len && memcmp(elements[k].text, slices[i].text, slices[i].len) == 0)
				break;
		}
		if (k == count)
			return false;
		elements[k].len = 0;	/* each stands for one */
	}
	return true;
}

static void
check_key(const SyncTarget *target, const SyncMessage *message, const JsonSlice *slices)
{
	if (message->key == NULL)
		sync_refuse("it has no header \"key\"", "Capture the remote table with a key.");
	if (!key_has_values(message->key, slices, target->nkeys))
		sync_refuse("its key is not made of the columns of the table's key",
					"Capture the remote table, and call fanout.sync_table(), with the same columns as \"key\".");
}

/* The place of a name in a JSON array of names; -1: there is none. */
static int
place_of(const JsonSlice *names, int count, const char *name)
{
	for (int i = 0; i < count; i++)
	{
		if (slice_is(&names[i], name))
			return i;
	}
	return -1;
}

/* Finds the old key's values, of which there is but the header's text. */
static void
read_old_key(const SyncTarget *target, const SyncMessage *message, JsonSlice *slices)
{
	JsonSlice  *names = palloc((target->nkeys + 1) * sizeof(JsonSlice));
	JsonSlice  *values = palloc((target->nkeys + 1) * sizeof(JsonSlice));
	const SyncColumn *key = &target->columns[target->keys[0]];
	StringInfoData text;

	if (target->nkeys == 1)
	{
		initStringInfo(&text);
		if (key_is_json(key->type, message->old_key))
			appendStringInfoString(&text, message->old_key);
		else
			escape_json(&text, message->old_key);
		if (!jsonscan_text(text.data, text.len, &slices[0]))
			sync_refuse("its header \"old_key\" is no value of the table's key", HINT_OTHERS);
		return;
	}
	if (message->key_columns == NULL || !read_elements(message->key_columns, names, target->nkeys) ||
		!read_elements(message->old_key, values, target->nkeys))
		sync_refuse("its header \"old_key\" does not have the columns of the table's key", HINT_OTHERS);
	for (int i = 0; i < target->nkeys; i++)
	{
		int			place = place_of(names, target->nkeys, target->columns[target->keys[i]].remote);

		if (place < 0)
			sync_refuse("its header \"old_key\" does not have the columns of the table's key", HINT_OTHERS);
		slices[i] = values[place];
	}
}

/* ---- looking into a message ---- */

static bool
has_op(const SyncMessage *message, const char *op)
{
	return strcmp(message->op, op) == 0;
}

/* Is it a change of the table that this one is a copy of?  The first one is. */
static bool
is_of_source(SyncTarget *target, const SyncMessage *message)
{
	if ((message->op == NULL && message->compare == 0) || message->schema == NULL || message->table == NULL)
		return false;
	if (target->source_schema == NULL)
		sync_target_set_source(target, message->schema, message->table);
	return strcmp(target->source_schema, message->schema) == 0 &&
		strcmp(target->source_table, message->table) == 0;
}

static void
read_values(SyncTarget *target, SyncMessage *message)
{
	JsonSlice  *slices = palloc((target->nkeys + 1) * sizeof(JsonSlice));
	JsonSlice	row;
	JsonSlice	old_row;

	find_rows(message, &row, &old_row);
	if (row.kind != JSON_IS_OBJECT)
		sync_refuse("its body has no row", "The body must be JSON in UTF-8, in the format that its header \"format\" names.");
	if (message->action == SYNC_WRITE)
		sync_target_set_shape(target, &row);
	sync_target_key_slices(target, &row, slices);
	check_key(target, message, slices);
	if (message->action == SYNC_WRITE)
		sync_target_read_row(target, &row, &message->row);
	else
		sync_target_read_key(target, slices, &message->row);

	if (message->old_key == NULL || message->action != SYNC_WRITE)
		return;
	if (old_row.kind == JSON_IS_OBJECT)
		sync_target_key_slices(target, &old_row, slices);
	else
		read_old_key(target, message, slices);
	sync_target_read_key(target, slices, &message->old_key_values);
	message->moves = memcmp(&message->old_key_values.hash, &message->row.hash, sizeof(SyncHash)) != 0;
}

/* Finds out what a message does, and to which row. */
static void
look_into(SyncTarget *target, SyncMessage *message)
{
	message->action = SYNC_NOTHING;
	message->moves = false;
	if (!is_of_source(target, message))
	{
		counting.ignored++;
		return;
	}
	if (via_contains(message->via, target->schema, target->table))
	{
		counting.own++;
		return;
	}
	if (!message->has_sequence)
		sync_refuse("it has no header \"sequence\"", HINT_OTHERS);
	if (message->op == NULL)
		message->action = SYNC_COMPARE;
	else if (has_op(message, "t"))
		message->action = SYNC_TRUNCATE;
	else if (has_op(message, "d"))
		message->action = SYNC_DELETE;
	else if (has_op(message, "c") || has_op(message, "u") || has_op(message, "r"))
		message->action = SYNC_WRITE;
	else
		sync_refuse(psprintf("its header \"op\" is \"%s\"", message->op), HINT_OTHERS);
	if (message->action == SYNC_WRITE || message->action == SYNC_DELETE)
		read_values(target, message);
}

/* ---- applying one ---- */

static bool
is_stale(const SyncTarget *target, const SyncRow *known, const SyncMessage *message)
{
	return message->sequence <= Max(known->sequence, target->floor);
}

static void
put_row(SyncTarget *target, const SyncMessage *message)
{
	if (!sync_write_put(target, &message->row))
		counting.ignored++;
}

static void
refuse_foreign(const SyncTarget *target, const SyncRow *known)
{
	if (known->foreign)
		ereport(ERROR,
				(errcode(ERRCODE_UNIQUE_VIOLATION),
				 errmsg("another subscription has a row of this key in table %s", target->qualified),
				 errhint("Several subscriptions can keep one table only if their rows have different keys.")));
}

static void
apply_write(SyncTarget *target, const SyncMessage *message)
{
	SyncRow    *known = sync_rows_find(&message->row.hash);

	if (message->superseded || is_stale(target, known, message))
	{
		counting.stale++;
		return;
	}
	refuse_foreign(target, known);
	put_row(target, message);
	sync_rows_set(known, message->sequence, message->xid, true);
}

/* Takes away what was at a key, unless another row has it at the source. */
static void
apply_leave(SyncTarget *target, SyncRow *known, const SyncValues *key, const SyncMessage *message)
{
	if (!message->taken && !known->foreign && !sync_write_delete(target, key))
		counting.ignored++;
	sync_rows_set(known, message->sequence, message->xid, message->taken && known->live);
}

static void
apply_delete(SyncTarget *target, const SyncMessage *message)
{
	SyncRow    *known = sync_rows_find(&message->row.hash);

	if (is_stale(target, known, message))
		counting.stale++;
	else
		apply_leave(target, known, &message->row, message);
}

/*
 * Applies a change of the key: moves the row, if it is there and its new place is
 * free; else writes the new one and takes the old one away.
 */
static void
apply_move(SyncTarget *target, const SyncMessage *message)
{
	SyncRow    *known_old = sync_rows_find(&message->old_key_values.hash);
	SyncRow    *known = sync_rows_find(&message->row.hash);
	bool		leaves = !is_stale(target, known_old, message);
	bool		arrives = !message->superseded && !is_stale(target, known, message);

	if (!leaves || !arrives)
		counting.stale++;
	if (arrives)
		refuse_foreign(target, known);
	if (arrives && leaves && !message->taken && !known_old->foreign &&
		!sync_write_occupied(target, &message->row, &message->old_key_values) &&
		sync_write_move(target, &message->row, &message->old_key_values))
	{
		sync_rows_set(known_old, message->sequence, message->xid, false);
		sync_rows_set(known, message->sequence, message->xid, true);
		return;
	}
	if (arrives)
	{
		put_row(target, message);
		sync_rows_set(known, message->sequence, message->xid, true);
	}
	if (leaves)
		apply_leave(target, known_old, &message->old_key_values, message);
}

/* ---- applying all ---- */

/* Loads what is known of the keys of all messages. */
static void
load_rows(const SyncTarget *target, const SyncMessage *messages, int count)
{
	SyncHash   *hashes = palloc(2 * (count + 1) * sizeof(SyncHash));
	int			n = 0;

	for (int i = 0; i < count; i++)
	{
		if (messages[i].action != SYNC_WRITE && messages[i].action != SYNC_DELETE)
			continue;
		hashes[n++] = messages[i].row.hash;
		if (messages[i].moves)
			hashes[n++] = messages[i].old_key_values.hash;
	}
	sync_rows_load(target->subscription_id, target->sharers, hashes, n);
}

static void
apply_truncate(SyncTarget *target, const SyncMessage *message)
{
	if (message->sequence <= target->floor)
	{
		counting.stale++;
		return;
	}
	sync_rows_store(target->subscription_id);
	sync_target_set_floor(target, message->sequence, message->xid);
	sync_write_truncate(target, message->sequence, handler_more_time);
}

static void
apply_comparison(SyncTarget *target, const SyncMessage *message, int index)
{
	CompareMessage comparison = {
		.run = message->compare,.sequence = message->sequence,.xid = message->xid,.body = message->body
	};
	ErrorData  *refusal;

	sync_rows_store(target->subscription_id);
	refusal = compare_apply(target, &comparison, handler_more_time);
	if (refusal != NULL)
		handler_leave_rest(index, refusal);
}

/* Applies one, the index'th; false: what was loaded of rows is gone. */
static bool
apply_one(SyncTarget *target, const SyncMessage *message, int index)
{
	via_begin(message->via);
	switch (message->action)
	{
		case SYNC_NOTHING:
			break;
		case SYNC_TRUNCATE:
			apply_truncate(target, message);
			return false;
		case SYNC_COMPARE:
			apply_comparison(target, message, index);
			return false;
		case SYNC_DELETE:
			apply_delete(target, message);
			break;
		case SYNC_WRITE:
			if (message->moves)
				apply_move(target, message);
			else
				apply_write(target, message);
			break;
	}
	return true;
}

static void
apply_all(SyncTarget *target, SyncMessage *messages, int count)
{
	for (int i = 0; i < count; i++)
		look_into(target, &messages[i]);
	load_rows(target, messages, count);
	for (int i = 0; i < count; i++)
	{
		if (!apply_one(target, &messages[i], i))
			load_rows(target, messages + i + 1, count - i - 1);
	}
	sync_rows_store(target->subscription_id);
	via_begin_deferred();
	sync_write_check_constraints(target);
	via_end();
	sync_target_check_name(target);
}

/*
 * Applies them with the rights of the table's owner, and with none of those of
 * the role that subscribed.
 */
static void
apply_as_owner(SyncTarget *target, SyncMessage *messages, int count)
{
	Oid			user;
	int			context;

	GetUserIdAndSecContext(&user, &context);
	SetUserIdAndSecContext(target->owner, context | SECURITY_LOCAL_USERID_CHANGE);
	apply_all(target, messages, count);
	SetUserIdAndSecContext(user, context);
}

/* ---- the handler ---- */

static const char *
text_value(Datum value, bool isnull)
{
	return isnull ? NULL : TextDatumGetCString(value);
}

static int64
integer_header(Jsonb *headers, const char *name)
{
	JsonbValue	buffer;
	JsonbValue *value = headers_find(headers, name, &buffer);

	if (value == NULL || value->type != jbvNumeric)
		return 0;
	return DatumGetInt64(DirectFunctionCall1(numeric_int8, NumericGetDatum(value->val.numeric)));
}

static bool
boolean_header(Jsonb *headers, const char *name)
{
	JsonbValue	buffer;
	JsonbValue *value = headers_find(headers, name, &buffer);

	return value != NULL && value->type == jbvBool && value->val.boolean;
}

/* The body's own bytes, since jsonb does not keep all that they say. */
static char *
read_body(const Datum *values, const bool *nulls)
{
	bytea	   *raw = nulls[MESSAGE_RAW] ? NULL : DatumGetByteaPP(values[MESSAGE_RAW]);

	if (raw != NULL && VARSIZE_ANY_EXHDR(raw) > 0)
		return utf8_decode(VARDATA_ANY(raw), VARSIZE_ANY_EXHDR(raw));
	if (nulls[MESSAGE_BODY])
		return NULL;
	return DatumGetCString(DirectFunctionCall1(jsonb_out, values[MESSAGE_BODY]));
}

static void
read_message(SyncMessage *message, const Datum *values, const bool *nulls)
{
	Jsonb	   *headers = nulls[MESSAGE_HEADERS] ? NULL : DatumGetJsonbP(values[MESSAGE_HEADERS]);

	memset(message, 0, sizeof(*message));
	message->key = text_value(values[MESSAGE_KEY], nulls[MESSAGE_KEY]);
	message->old_key = headers_string(headers, "old_key");
	message->key_columns = headers_string(headers, "key_columns");
	message->op = headers_string(headers, "op");
	message->schema = headers_string(headers, "schema");
	message->table = headers_string(headers, "table");
	message->format = headers_string(headers, "format");
	message->via = via_of_message(headers_string(headers, "via"), message->schema, message->table);
	message->xid = integer_header(headers, "xid");
	message->compare = integer_header(headers, "compare");
	message->taken = boolean_header(headers, "taken");
	message->superseded = boolean_header(headers, "superseded");
	message->has_sequence = !nulls[MESSAGE_SEQUENCE];
	if (message->has_sequence)
		message->sequence = DatumGetInt64(values[MESSAGE_SEQUENCE]);
	message->body = read_body(values, nulls);
}

static void
take_apart(Datum composite, TupleDesc desc, Datum *values, bool *nulls)
{
	HeapTupleHeader header = DatumGetHeapTupleHeader(composite);
	HeapTupleData tuple;

	tuple.t_len = HeapTupleHeaderGetDatumLength(header);
	ItemPointerSetInvalid(&tuple.t_self);
	tuple.t_tableOid = InvalidOid;
	tuple.t_data = header;
	heap_deform_tuple(&tuple, desc, values, nulls);
}

/*
 * fanout.sync_messages(messages fanout.message[]): applies messages of one
 * subscription to its table, in the order given, one after the other.
 *
 * Errors: what the table's constraints, types and triggers raise; 22023 (a
 * message cannot be applied: no sequence, no key or another one, no row in the
 * body, a key column missing), 42703 (an unknown column that is refused), 23505
 * (another subscription has the row), 42704 (not a subscription of sync_table()),
 * 42501 (somebody else's, or no right to act as the table's owner), 42P01 (the
 * table is gone), 55000 (it cannot be kept equal any more), 40001 (its schema was
 * renamed meanwhile).
 */
Datum
pgf_sync_messages(PG_FUNCTION_ARGS)
{
	ArrayType  *array = PG_GETARG_ARRAYTYPE_P(0);
	Oid			type = ARR_ELEMTYPE(array);
	TupleDesc	desc = lookup_rowtype_tupdesc(type, -1);
	SyncMessage *messages;
	Datum	   *elements;
	int			count;
	Datum		values[MESSAGE_ATTRIBUTES];
	bool		nulls[MESSAGE_ATTRIBUTES];
	SyncTarget *target = NULL;

	if (desc->natts != MESSAGE_ATTRIBUTES)
		elog(ERROR, "fanout.message has %d attributes", desc->natts);
	watch_transactions();
	memset(&counting, 0, sizeof(counting));
	deconstruct_array(array, type, -1, false, TYPALIGN_DOUBLE, &elements, NULL, &count);
	messages = palloc((count + 1) * sizeof(SyncMessage));
	SPI_connect();
	for (int i = 0; i < count; i++)
	{
		take_apart(elements[i], desc, values, nulls);
		if (target == NULL)
			target = sync_target_load(values[MESSAGE_TOPIC], values[MESSAGE_CONSUMER_GROUP]);
		read_message(&messages[i], values, nulls);
	}
	if (count > 0)
		apply_as_owner(target, messages, count);
	count_call();
	SPI_finish();
	ReleaseTupleDesc(desc);
	PG_RETURN_VOID();
}
