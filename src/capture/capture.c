/*-------------------------------------------------------------------------
 *
 * capture.c
 *		From a change to a row in the outbox: the capture trigger, publish(), and
 *		rows that were there before.
 *
 * This runs in the application's own transactions, on every row they write,
 * with their rights.  It must never wait for anything but the server's own
 * heap and index insertion, and never depend on the broker or on any worker.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "access/detoast.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#include "capture/cache.h"
#include "capture/capture.h"
#include "capture/ids.h"
#include "capture/key.h"
#include "capture/msgid.h"
#include "capture/nesting.h"
#include "capture/outbox.h"
#include "capture/rights.h"
#include "capture/rowjson.h"
#include "capture/taken.h"
#include "capture/via.h"
#include "server/append.h"

PG_FUNCTION_INFO_V1(pgf_capture_trigger);
PG_FUNCTION_INFO_V1(pgf_publish);

/*
 * One change, as the renderers need it.  old_row, new_row: NULL if the message
 * has none.
 */
typedef struct Change
{
	CaptureInfo *info;
	TupleDesc	desc;
	CaptureOp	op;				/* of the message */
	HeapTuple	old_row;
	HeapTuple	new_row;
	const char *key;			/* NULL: none */
	bool		key_changed;
	bool		taken;			/* another row has the key that it leaves */
	Jsonb	   *headers;
	TimestampTz now;
	pg_uuid_t	message_id;
} Change;

/* ---- bodies ---- */

static int64
epoch_ms(TimestampTz when)
{
	return when / 1000 +
		((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE)) * SECS_PER_DAY * 1000;
}

static void
append_row(StringInfo out, const Change *change, HeapTuple row)
{
	if (row == NULL)
		append_literal(out, "null");
	else
		rowjson_append(out, change->info->row, row, change->desc);
}

#define MAX_INT64_DIGITS 20		/* and sign */

/* Not by appendStringInfo(), which would cost as much as all columns together. */
static void
append_number(StringInfo out, int64 number)
{
	char	   *p = append_room(out, MAX_INT64_DIGITS);

	append_done(out, p + pg_lltoa(number, p));
}

/* The envelope of Debezium's change events (its documentation, "Data change events"). */
static void
render_debezium(StringInfo out, const Change *change)
{
	HeapTuple	before = change->old_row;

	if (change->op == OP_UPDATE && !change->info->old_row && !change->key_changed)
		before = NULL;

	append_literal(out, "{\"before\":");
	append_row(out, change, before);
	append_literal(out, ",\"after\":");
	append_row(out, change, change->new_row);
	append_literal(out, ",\"source\":");
	append_string(out, change->info->source);
	append_literal(out, ",\"txId\":");
	append_number(out, U64FromFullTransactionId(GetTopFullTransactionId()));
	append_literal(out, ",\"ts_ms\":");
	append_number(out, epoch_ms(GetCurrentTransactionStartTimestamp()));
	append_literal(out, "},\"op\":\"");
	append_string(out, capture_op_code[change->op]);
	append_literal(out, "\",\"ts_ms\":");
	append_number(out, epoch_ms(change->now));
	append_char(out, '}');
}

/* The row as it is after an insert or update, as it was before a delete. */
static void
render_row(StringInfo out, const Change *change)
{
	append_row(out, change, change->new_row != NULL ? change->new_row : change->old_row);
}

/* CloudEvents 1.0, JSON format: what stands before "data". */
static void
open_cloudevent(StringInfo out, const pg_uuid_t *message_id, const char *source_json,
				const char *type, const char *key, TimestampTz when)
{
	char		id[37];
	char		buf[MAXDATELEN + 1];
	int			tz = 0;

	msgid_format(message_id, id);
	appendStringInfo(out, "{\"specversion\":\"1.0\",\"id\":\"%s\",\"source\":%s,\"type\":", id, source_json);
	escape_json(out, type);
	if (key != NULL && key[0] != '\0')
	{
		appendStringInfoString(out, ",\"subject\":");
		escape_json(out, key);
	}
	JsonEncodeDateTime(buf, TimestampTzGetDatum(when), TIMESTAMPTZOID, &tz);
	appendStringInfo(out, ",\"time\":\"%s\",\"datacontenttype\":\"application/json\",\"data\":", buf);
}

static void
render_cloudevent(StringInfo out, const Change *change)
{
	open_cloudevent(out, &change->message_id, change->info->uri,
					change->info->type[change->op], change->key, change->now);
	render_row(out, change);
	appendStringInfoChar(out, '}');
}

static void
render_body(StringInfo out, const Change *change)
{
	switch (change->info->topic.format)
	{
		case FORMAT_DEBEZIUM:
			render_debezium(out, change);
			break;
		case FORMAT_ROW:
			render_row(out, change);
			break;
		case FORMAT_CLOUDEVENTS:
			render_cloudevent(out, change);
			break;
	}
}

/* ---- headers ---- */

/*
 * A changed key is a message of the new key that must not overtake messages
 * of the old one: the publisher learns of it by the header "old_key".  What is
 * written while a message is handled tells the way that it has come.  The header
 * "taken" announces a message of the row that has the key by now.
 */
static Jsonb *
change_headers(const Change *change)
{
	CaptureInfo *info = change->info;
	ChangeHeaders headers = {
		.op = capture_op_code[change->op],.format = topic_format_name[info->topic.format],.via = via_current(),
		.taken = change->taken
	};

	if (change->key_changed)
		headers.old_key = key_render(info, change->old_row, change->desc);
	if (headers.old_key == NULL && headers.via == NULL && !headers.taken)
		return info->headers[change->op];
	if (headers.old_key != NULL)
		headers.key_columns = info->key_columns;
	headers.schema = info->schema;
	headers.table = info->table;
	return cache_headers(&headers);
}

/* Returns the headers with others added, in the current context. */
static Jsonb *
add_headers(Jsonb *headers, Jsonb *more)
{
	return DatumGetJsonbP(DirectFunctionCall2(jsonb_concat, JsonbPGetDatum(headers), JsonbPGetDatum(more)));
}

/* ---- all of it ---- */

static void
render(StringInfo body, Change *change)
{
	HeapTuple	row = change->new_row != NULL ? change->new_row : change->old_row;

	if (row != NULL)
		change->key = key_render(change->info, row, change->desc);
	render_body(body, change);
	change->headers = change_headers(change);
}

/*
 * Rows up to that size can be rendered, whatever is in them: bytes.  Composite values
 * full of nulls grow most: a null takes a bit, and hundreds of bytes as text, which has
 * the column's name.
 */
#define ORDINARY_ROW (64 * 1024)

/* The same of a row that was read whole, whose values may be compressed: bytes. */
#define LARGE_READ BLCKSZ

/* A row of the outbox has at most 1 GB; this leaves room for its other columns. */
#define MAX_MESSAGE (MaxAllocSize - 64 * 1024)

/* The size of a row, its values detoasted: bytes.  NULL: 0. */
static Size
row_size(HeapTuple row, TupleDesc desc)
{
	Size		size = 0;

	if (row == NULL || !HeapTupleHasExternal(row))
		return 0;				/* a page, with whatever is compressed in it */
	for (int i = 0; i < desc->natts; i++)
	{
		bool		isnull;
		Datum		value;

		if (TupleDescAttr(desc, i)->attlen != -1)
			continue;
		value = heap_getattr(row, i + 1, desc, &isnull);
		if (!isnull)
			size += toast_raw_datum_size(value);
	}
	return size;
}

/* Raises an error if the row of the outbox would be too large. */
static void
check_size(const StringInfo body, const Change *change)
{
	Size		size = (Size) body->len + VARSIZE(change->headers);

	if (change->key != NULL)
		size += strlen(change->key);
	if (size > MAX_MESSAGE)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("message is too large")));
}

/* Is that an error of something too large?  palloc() has none of its own for it. */
static bool
is_limit(const ErrorData *error)
{
	return ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_PROGRAM_LIMIT_EXCEEDED ||
		error->sqlerrcode == ERRCODE_OUT_OF_MEMORY || error->sqlerrcode == ERRCODE_INTERNAL_ERROR;
}

/*
 * Renders key, body and headers of a change whose rows are so large that their text may
 * pass the server's limit of 1 GB.  A row that can be stored must not be refused
 * for its message: then the message has an empty body, and the publisher makes a
 * dead letter of it.
 */
static void
render_large(StringInfo body, Change *change)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		render(body, change);
		check_size(body, change);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
		if (!is_limit(error))
			ReThrowError(error);
		resetStringInfo(body);
		change->key = NULL;
		change->key_changed = false;
		change->headers = change_headers(change);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
}

/* ---- the trigger ---- */

static CaptureOp
operation_of(TriggerEvent event)
{
	if (TRIGGER_FIRED_BY_INSERT(event))
		return OP_INSERT;
	if (TRIGGER_FIRED_BY_UPDATE(event))
		return OP_UPDATE;
	if (TRIGGER_FIRED_BY_DELETE(event))
		return OP_DELETE;
	return OP_TRUNCATE;
}

/* Begins a message of a change of a row, or of a row that was there. */
static void
begin_change(Change *change, CaptureInfo *info, TupleDesc desc, CaptureOp op)
{
	memset(change, 0, sizeof(*change));
	change->info = info;
	change->desc = desc;
	change->op = op;
	change->now = GetCurrentTimestamp();
	msgid_new(&change->message_id);
}

/*
 * Finds out what the message says: of an update that takes a row out of the
 * capture's filter, that it was deleted; of one that brings it in, inserted.
 */
static void
describe_change(Change *change, TriggerData *trigdata)
{
	CaptureInfo *info = cache_of_trigger(trigdata);
	CaptureOp	event = operation_of(trigdata->tg_event);

	begin_change(change, info, RelationGetDescr(trigdata->tg_relation),
				 (event == OP_UPDATE && info->sent_as >= 0) ? info->sent_as : event);
	if (change->op == OP_UPDATE || change->op == OP_DELETE)
		change->old_row = trigdata->tg_trigtuple;
	if (change->op == OP_UPDATE || change->op == OP_INSERT)
		change->new_row = (event == OP_UPDATE) ? trigdata->tg_newtuple : trigdata->tg_trigtuple;
	if (change->op == OP_UPDATE)
		change->key_changed = key_differs(info, change->old_row, change->new_row, change->desc);
}

/*
 * Renders a message and puts it into the outbox.  large: its rows may be too large
 * to be rendered; queue: NULL, or the only one to get it; more: an object that is
 * added to its headers, or NULL.  Returns the bytes of the body.
 */
static Size
write_change(Change *change, bool large, int64 id, const char *queue, Jsonb *more)
{
	StringInfoData body;
	OutboxRow	row;

	initStringInfo(&body);
	if (large)
		render_large(&body, change);
	else
		render(&body, change);

	memset(&row, 0, sizeof(row));
	row.id = id;
	row.topic_id = change->info->topic.topic_id;
	row.message_id = change->message_id;
	row.type = change->info->type[change->op];
	row.key = change->key;
	row.headers = (more == NULL) ? change->headers : add_headers(change->headers, more);
	row.payload = body.data;
	row.payload_len = body.len;
	row.queue = queue;
	row.created_at = change->now;
	outbox_insert(&row, false);
	return body.len;
}

/* Are the change's rows so large that they may not be rendered? */
static bool
is_large(const Change *change)
{
	return row_size(change->old_row, change->desc) + row_size(change->new_row, change->desc) > ORDINARY_ROW;
}

/* Finds the row that has the key which the change's row has left; NULL: there is none. */
static HeapTuple
find_taker(const Change *change, Relation rel)
{
	if (!OidIsValid(change->info->key_index) || (change->op != OP_DELETE && !change->key_changed))
		return NULL;
	return taken_find(change->info, rel, change->old_row);
}

/*
 * Writes the message of a change, and one of the row that has taken the key which it
 * leaves.  Their ids are drawn right after that row was read, before rendering runs
 * any code that could change it.
 */
static void
capture_change(TriggerData *trigdata)
{
	Change		change;
	Change		taker;
	HeapTuple	row;
	int64		id;
	int64		taker_id;

	describe_change(&change, trigdata);
	row = find_taker(&change, trigdata->tg_relation);
	change.taken = (row != NULL);
	id = nesting_take_id(change.info->counted);
	taker_id = change.taken ? ids_draw(1) : 0;
	(void) write_change(&change, is_large(&change), id, NULL, NULL);
	if (!change.taken)
		return;
	begin_change(&taker, change.info, change.desc, OP_READ);
	taker.new_row = row;
	(void) write_change(&taker, is_large(&taker), taker_id, NULL, NULL);
}

/* A value that is too large to render says nothing of a trigger. */
static void
capture_context(void *arg)
{
	errcontext("capture of table \"%s\"", RelationGetRelationName((Relation) arg));
}

Datum
pgf_capture_trigger(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	ErrorContextCallback context = {.callback = capture_context};

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trigdata->tg_event) ||
		TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) == TRIGGER_FIRED_BY_TRUNCATE(trigdata->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be called by an AFTER trigger, for each row or for TRUNCATE",
						"fanout.capture_trigger"),
				 errhint("Use fanout.capture() to create it.")));

	context.previous = error_context_stack;
	context.arg = trigdata->tg_relation;
	error_context_stack = &context;

	/* the trigger manager resets the current context after each row */
	capture_change(trigdata);
	error_context_stack = context.previous;
	return PointerGetDatum(NULL);
}

/* ---- rows that were there before ---- */

/*
 * Writes the message of a row that the caller has locked, as the capture whose
 * trigger that is (on rel, for each row) would write it, with op "r".  Its id is
 * drawn here, so that it stands among those of the row's changes where the lock
 * does.  queue: NULL, or the only one to get it; headers: an object that is added.
 * Returns the bytes of the body.  Memory: the current context's, to be reset by
 * the caller.  Raises errors of types' output functions, and 42704 if the topic
 * is gone.
 */
Size
capture_read_row(Relation rel, Trigger *trigger, HeapTuple tuple, const char *queue, Jsonb *headers)
{
	TriggerData trigdata = {.tg_relation = rel,.tg_trigger = trigger};
	Change		change;

	begin_change(&change, cache_of_trigger(&trigdata), RelationGetDescr(rel), OP_READ);
	change.new_row = tuple;
	return write_change(&change, tuple->t_len > LARGE_READ, ids_draw(1), queue, headers);
}

/*
 * Appends a row as the capture whose trigger that is would send it: a JSON object
 * of its columns.  Memory: the current context's, to be reset by the caller.
 */
void
capture_append_row(StringInfo out, Relation rel, Trigger *trigger, HeapTuple tuple)
{
	TriggerData trigdata = {.tg_relation = rel,.tg_trigger = trigger};

	rowjson_append(out, cache_of_trigger(&trigdata)->row, tuple, RelationGetDescr(rel));
}

/*
 * Returns the names of the columns that make the key of the capture's messages, a
 * JSON array in the key's order.  It lives as long as the cached capture.
 */
const char *
capture_key_columns(Relation rel, Trigger *trigger)
{
	TriggerData trigdata = {.tg_relation = rel,.tg_trigger = trigger};

	return cache_of_trigger(&trigdata)->key_columns;
}

/* ---- publish() ---- */

static int
utf8_length(const char *s)
{
	return strlen((char *) pg_do_encoding_conversion((unsigned char *) unconstify(char *, s), strlen(s),
													 GetDatabaseEncoding(), PG_UTF8));
}

static bool
reserved_header(const char *name, int len)
{
	static const char *const reserved[] = {
		"op", "schema", "table", "format", "key", "old_key", "key_columns", "sequence", "xid", "via",
		"backfill", "last", "replay", "replay_of", "compare", "taken"
	};

	for (int i = 0; i < lengthof(reserved); i++)
	{
		if (strlen(reserved[i]) == len && memcmp(reserved[i], name, len) == 0)
			return true;
	}
	return false;
}

static void
check_header_name(const char *name, int len)
{
	if (len < 1 || utf8_length(name) > 128)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("names of headers have 1 to 128 bytes in UTF-8"),
				 errdetail("This is AMQP's limit for field names.")));
	if (reserved_header(name, len))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("header \"%.*s\" is set by pg_fanout itself", len, name),
				 errhint("Choose another name.")));
}

/* As wire.c decides. */
static void
check_header_number(const char *name, Numeric number)
{
	char	   *text = DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(number)));

	if (!isfinite(strtod(text, NULL)))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("header \"%s\" is out of range", name),
				 errdetail("Numbers are sent as 64-bit integers, or else in double precision."),
				 errhint("Write it as a string.")));
}

static void
check_headers(Jsonb *headers)
{
	JsonbIterator *it;
	JsonbValue	v;

	if (!JB_ROOT_IS_OBJECT(headers))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("headers must be a JSON object"),
				 errhint("For example {\"tenant\": 7}.")));
	it = JsonbIteratorInit(&headers->root);
	(void) JsonbIteratorNext(&it, &v, true);	/* WJB_BEGIN_OBJECT */
	while (JsonbIteratorNext(&it, &v, true) == WJB_KEY)
	{
		char	   *name = pnstrdup(v.val.string.val, v.val.string.len);

		check_header_name(name, v.val.string.len);
		(void) JsonbIteratorNext(&it, &v, true);
		if (v.type == jbvBinary || v.type == jbvObject || v.type == jbvArray)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("header \"%s\" must be a string, a number, a boolean or null", name),
					 errhint("Put nested values into the payload.")));
		if (v.type == jbvNumeric)
			check_header_number(name, v.val.numeric);
	}
}

static char *
render_payload(Jsonb *payload, TopicFormat format, const OutboxRow *row)
{
	char	   *json = JsonbToCString(NULL, &payload->root, VARSIZE(payload));
	StringInfoData out;
	StringInfoData source;

	if (format != FORMAT_CLOUDEVENTS)
		return json;
	initStringInfo(&source);
	escape_json(&source, "/pg_fanout");
	initStringInfo(&out);
	open_cloudevent(&out, &row->message_id, source.data,
					row->type != NULL && row->type[0] != '\0' ? row->type : "message",
					row->key, row->created_at);
	appendStringInfo(&out, "%s}", json);
	return out.data;
}

/* Begins a message that tells of no row: all but key, queue and payload. */
static void
begin_message(OutboxRow *row, const TopicInfo *topic, const char *type, Jsonb *headers)
{
	memset(row, 0, sizeof(*row));
	row->id = ids_draw(1);
	row->topic_id = topic->topic_id;
	msgid_new(&row->message_id);
	row->type = type;
	row->headers = headers;
	row->created_at = GetCurrentTimestamp();
}

static void
write_message(OutboxRow *row, const char *payload)
{
	row->payload = payload;
	row->payload_len = strlen(payload);
	outbox_insert(row, true);
}

/*
 * Writes a message that tells of no change, its payload in no envelope, whatever
 * the topic's format: JSON in the server encoding.  As capture_notice().
 */
void
capture_payload(const char *topic, const char *type, const char *payload, Jsonb *headers, const char *queue)
{
	TopicInfo	info = cache_topic(topic);
	OutboxRow	row;

	begin_message(&row, &info, type, headers);
	row.queue = queue;
	write_message(&row, payload);
}

/*
 * Writes a message that tells of no row.  type: at most OUTBOX_MAX_TYPE bytes;
 * headers: an object; queue: NULL, or the only one to get it.
 */
void
capture_notice(const char *topic, const char *type, Jsonb *payload, Jsonb *headers, const char *queue)
{
	TopicInfo	info = cache_topic(topic);
	OutboxRow	row;

	begin_message(&row, &info, type, headers);
	row.queue = queue;
	write_message(&row, render_payload(payload, info.format, &row));
}

Datum
pgf_publish(PG_FUNCTION_ARGS)
{
	OutboxRow	row;
	TopicInfo	topic;
	char	   *name;
	pg_uuid_t  *result = palloc(sizeof(pg_uuid_t));

	PreventCommandIfReadOnly("fanout.publish()");
	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", PG_ARGISNULL(0) ? "topic" : "payload"),
				 PG_ARGISNULL(0) ? 0 : errhint("A JSON null is written 'null'::jsonb.")));
	name = text_to_cstring(PG_GETARG_TEXT_PP(0));
	rights_check(GetUserId(), name, "publish", NULL);
	topic = cache_topic(name);

	begin_message(&row, &topic, PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)),
				  PG_ARGISNULL(4) ? NULL : PG_GETARG_JSONB_P(4));
	row.key = PG_ARGISNULL(2) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(2));
	if (row.type != NULL && utf8_length(row.type) > OUTBOX_MAX_TYPE)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("type is too long"),
				 errdetail("It has %d bytes in UTF-8; the AMQP property takes %d.",
						   utf8_length(row.type), OUTBOX_MAX_TYPE)));
	if (row.headers != NULL)
		check_headers(row.headers);
	write_message(&row, render_payload(PG_GETARG_JSONB_P(1), topic.format, &row));

	*result = row.message_id;
	PG_RETURN_UUID_P(result);
}
