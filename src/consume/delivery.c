/*-------------------------------------------------------------------------
 *
 * delivery.c
 *		From an AMQP delivery to a fanout.message.
 *
 * The rules by which a delivery of whatever producer is read (README,
 * "Consuming") are here and nowhere else.  A producer may send anything: what
 * cannot be given to a handler is NULL, and the bytes are always there.
 *
 * A message id that is a UUID is taken as it is.  Another one is hashed
 * together with the queue's name (a version-5 UUID); and if there is none, the
 * content is: type, content type, timestamp, headers (without those that the
 * broker adds, "x-...") and body.  So a repeat has the same id.
 *
 * Must never: raise an error because of what a message contains.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <uuid/uuid.h>

#include "common/hashfn.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "capture/headers.h"
#include "capture/via.h"
#include "consume/delivery.h"
#include "consume/jsonbuild.h"
#include "server/compat.h"
#include "server/utf8.h"

StaticAssertDecl(sizeof(uuid_t) == UUID_LEN, "libuuid and the server agree on UUIDs");

/* The namespace of ids that are made from names, drawn once for all. */
static const uuid_t id_namespace = {
	0x6f, 0x0c, 0x7b, 0x52, 0x3e, 0x41, 0x4d, 0x0a, 0x9a, 0x64, 0x1f, 0x27, 0xd3, 0x88, 0x5b, 0xe1
};

/* ---- texts ---- */

static char *
optional_text(const char *utf8)
{
	return utf8 != NULL ? utf8_decode(utf8, strlen(utf8)) : NULL;
}

static uint64
text_hash(const char *text, size_t len)
{
	return hash_bytes_extended((const unsigned char *) text, len, 0);
}

/* ---- JSON ---- */

/*
 * Tells whether an error is that of jsonb_in() refusing a text: data (class 22), beyond
 * its limits (54), a character that the encoding does not have (0A, in SQL_ASCII), or an
 * array or object for whose members palloc() gives no memory at once (XX000).  It holds
 * nothing but memory when it raises that.
 */
static bool
is_refusal(int sqlstate)
{
	int			category = ERRCODE_TO_CATEGORY(sqlstate);

	return category == ERRCODE_DATA_EXCEPTION || category == ERRCODE_PROGRAM_LIMIT_EXCEEDED ||
		category == ERRCODE_FEATURE_NOT_SUPPORTED || sqlstate == ERRCODE_INTERNAL_ERROR;
}

static Datum
parse_json(char *text, bool *isnull)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	volatile Datum result = (Datum) 0;
	volatile bool failed = false;

	PG_TRY();
	{
		result = DirectFunctionCall1(jsonb_in, CStringGetDatum(text));
	}
	PG_CATCH();
	{
		if (!is_refusal(geterrcode()))
			PG_RE_THROW();
		MemoryContextSwitchTo(oldcontext);
		FlushErrorState();
		failed = true;
	}
	PG_END_TRY();
	*isnull = failed;
	return result;
}

/*
 * Returns the way that the message's change has come, see via.h, in the current
 * context; NULL: it does not tell.
 */
char *
delivery_via(const MessageValues *message)
{
	Jsonb	   *headers;
	char	   *via;

	if (message->nulls[MESSAGE_HEADERS])
		return NULL;
	headers = DatumGetJsonbP(message->values[MESSAGE_HEADERS]);
	via = headers_string(headers, "via");
	if (via == NULL)
		return NULL;
	return via_of_message(via, headers_string(headers, "schema"), headers_string(headers, "table"));
}

/* Returns a hash of that way; messages without one have the same. */
uint64
delivery_way(const MessageValues *message)
{
	char	   *via = delivery_via(message);

	return via != NULL ? text_hash(via, strlen(via)) : 0;
}

/*
 * Returns the bytes as jsonb, in the current context; NULL if they are not JSON
 * in UTF-8.
 */
static Datum
delivery_json(const char *bytes, size_t len, bool *isnull)
{
	size_t		text_len = 0;
	const char *text = len > 0 ? utf8_view(bytes, len, &text_len) : NULL;
	Jsonb	   *json = text !=NULL ? jsonbuild_text(text, text_len) : NULL;

	*isnull = (json == NULL);
	if (text == NULL || json != NULL)
		return JsonbPGetDatum(json);
	return parse_json(pnstrdup(text, text_len), isnull);
}

/* ---- ids ---- */

static int
hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c = pg_tolower((unsigned char) c);
	return (c >= 'a' && c <= 'f') ? c - 'a' + 10 : -1;
}

/* 32 hex digits, with or without the four hyphens. */
static bool
parse_uuid(const char *s, pg_uuid_t *id)
{
	bool		hyphens = (strlen(s) == 36);

	for (int i = 0; i < UUID_LEN; i++)
	{
		int			high;
		int			low;

		if (hyphens && (i == 4 || i == 6 || i == 8 || i == 10) && *s++ != '-')
			return false;
		high = hex_digit(s[0]);
		low = (high >= 0) ? hex_digit(s[1]) : -1;
		if (low < 0)
			return false;
		id->data[i] = high << 4 | low;
		s += 2;
	}
	return *s == '\0';
}

static void
append_header(StringInfo name, const BrokerField *header)
{
	Jsonb	   *json = jsonbuild_fields(header, 1);

	appendBinaryStringInfo(name, VARDATA(json), VARSIZE(json) - VARHDRSZ);
}

static void
append_content(StringInfo name, const BrokerDelivery *wire)
{
	appendStringInfoString(name, wire->type ? wire->type : "");
	appendStringInfoChar(name, '\0');
	appendStringInfoString(name, wire->content_type ? wire->content_type : "");
	appendStringInfoChar(name, '\0');
	appendStringInfo(name, UINT64_FORMAT, (uint64) wire->timestamp);
	for (int i = 0; i < wire->nheaders; i++)
	{
		if (strncmp(wire->headers[i].name, "x-", 2) != 0)
			append_header(name, &wire->headers[i]);
	}
	appendStringInfoChar(name, '\0');
	if (wire->body_len > 0 && wire->body_len < MaxAllocSize - name->len - 1)
		appendBinaryStringInfo(name, wire->body, wire->body_len);
}

static void
derive_id(const BrokerDelivery *wire, const char *queue, pg_uuid_t *id)
{
	StringInfoData name;
	uuid_t		hash;

	initStringInfo(&name);
	appendStringInfoString(&name, queue);
	appendStringInfoChar(&name, '\0');
	if (wire->message_id != NULL && wire->message_id[0] != '\0')
		appendStringInfoString(&name, wire->message_id);
	else
	{
		appendStringInfoChar(&name, '\0');
		append_content(&name, wire);
	}
	uuid_generate_sha1(hash, id_namespace, name.data, name.len);
	memcpy(id->data, hash, UUID_LEN);
	pfree(name.data);
}

/* ---- a delivery ---- */

static const BrokerField *
find_header(const BrokerDelivery *wire, const char *name, BrokerValueType type)
{
	for (int i = 0; i < wire->nheaders; i++)
	{
		const BrokerField *header = &wire->headers[i];

		/* the first character tells most names apart, without a call */
		if (header->type == type && header->name[0] == name[0] && strcmp(header->name, name) == 0)
			return header;
	}
	return NULL;
}

/* A header that is a key: a string or, as text, an integer. */
typedef struct KeyHeader
{
	BrokerField field;
	char		digits[24];
} KeyHeader;

/* Returns the key that a header tells, perhaps in *space; NULL: it tells none. */
static const BrokerField *
find_key(const BrokerDelivery *wire, const char *name, KeyHeader *space)
{
	const BrokerField *field = find_header(wire, name, BROKER_VALUE_STRING);
	const BrokerField *integer = find_header(wire, name, BROKER_VALUE_INT);

	if (field != NULL || integer == NULL)
		return field;
	space->field = *integer;
	space->field.type = BROKER_VALUE_STRING;
	space->field.value.string.data = space->digits;
	space->field.value.string.len = snprintf(space->digits, sizeof(space->digits), INT64_FORMAT,
											 integer->value.integer);
	return &space->field;
}

static char *
text_header(const BrokerField *field)
{
	return field ? utf8_decode(field->value.string.data, field->value.string.len) : NULL;
}

/*
 * Returns the number that stands for a key, in the server encoding, in the order of a
 * delivery with that key; of one that has no such text in UTF-8: 0.
 */
uint64
delivery_key_hash(const char *key)
{
	size_t		len;
	const char *utf8 = utf8_encode(key, strlen(key), &len);

	return utf8 != NULL ? text_hash(utf8, len) : 0;
}

static void
add_order_key(OrderItem *item, const BrokerField *field)
{
	uint64		hash;

	if (field == NULL)
		return;
	hash = text_hash(field->value.string.data, field->value.string.len);
	if (item->nkeys == 0 || item->keys[0] != hash)
		item->keys[item->nkeys++] = hash;
}

static int64
integer_header(const BrokerDelivery *wire, const char *name, bool *found)
{
	const BrokerField *field = find_header(wire, name, BROKER_VALUE_INT);

	*found = (field != NULL);
	return field ? field->value.integer : 0;
}

/*
 * Sets what a delivery waits for, and what waits for it.  A message of a comparison
 * waits for nothing: it leaves out what waits, and may mend what others wait for.
 */
static void
set_order(Delivery *delivery, const BrokerField *key, const BrokerField *old_key, const BrokerField *op)
{
	bool		found;

	add_order_key(&delivery->order, key);
	add_order_key(&delivery->order, old_key);
	delivery->order.barrier = delivery->truncates;
	if (delivery->order.nkeys == 0 && op == NULL)
	{
		(void) integer_header(delivery->wire, "compare", &found);
		delivery->order.free = found;
	}
}

/*
 * Hashes the headers that a message's way is made of, so that equal ways give equal
 * numbers, but other ones than delivery_way() gives: only deliveries of the same kind
 * are compared.  0: the message tells of no way.
 */
static uint64
way_on_wire(const BrokerDelivery *wire)
{
	static const char *const names[] = {"schema", "table", "via"};
	uint64		way = 0;

	if (find_header(wire, "via", BROKER_VALUE_STRING) == NULL)
		return 0;
	for (int i = 0; i < lengthof(names); i++)
	{
		const BrokerField *field = find_header(wire, names[i], BROKER_VALUE_STRING);

		if (field != NULL)
			way = hash_combine64(way, text_hash(field->value.string.data, field->value.string.len));
	}
	return way;
}

/*
 * Reads from the wire what has to be known before a delivery is handled: id,
 * keys, sequence.  Takes over the wire.  In the current context, freed by
 * delivery_free().
 */
Delivery *
delivery_new(BrokerDelivery *wire, const char *queue, bool ordered)
{
	Delivery   *delivery = palloc0(sizeof(Delivery));
	KeyHeader	space[2];
	const BrokerField *key = find_key(wire, "key", &space[0]);
	const BrokerField *old_key = find_key(wire, "old_key", &space[1]);
	const BrokerField *op = find_header(wire, "op", BROKER_VALUE_STRING);
	bool		found;

	delivery->wire = wire;
	delivery->size = wire->size;
	delivery->tag = wire->tag;
	delivery->returned = integer_header(wire, "x-delivery-count", &found);
	delivery->stream_offset = integer_header(wire, "x-stream-offset", &found);
	if (!found)
		delivery->stream_offset = -1;
	if (wire->message_id == NULL || !parse_uuid(wire->message_id, &delivery->message_id))
		derive_id(wire, queue, &delivery->message_id);
	delivery->type = optional_text(wire->type);
	delivery->key = text_header(key);
	delivery->old_key = text_header(old_key);
	delivery->sequence = integer_header(wire, "sequence", &delivery->has_sequence);
	delivery->truncates = (op != NULL && strcmp(op->value.string.data, "t") == 0);
	delivery->way = way_on_wire(wire);
	if (ordered)
		set_order(delivery, key, old_key, op);
	return delivery;
}

/* Does the queue that it comes from keep what is acked? */
bool
delivery_of_stream(const BrokerDelivery *wire)
{
	return find_header(wire, "x-stream-offset", BROKER_VALUE_INT) != NULL;
}

static void
free_text(char *text)
{
	if (text !=NULL)
		pfree(text);
}

/* Frees a delivery that delivery_new() has made. */
void
delivery_free(Delivery *delivery)
{
	broker_free_delivery(delivery->wire);
	free_text(delivery->type);
	free_text(delivery->key);
	free_text(delivery->old_key);
	free_text(delivery->error);
	pfree(delivery);
}

/* ---- its message ---- */

static void
set_text(MessageValues *message, int attribute, const char *text)
{
	message->nulls[attribute] = (text == NULL);
	if (text !=NULL)
		message->values[attribute] = CStringGetTextDatum(text);
}

/* AMQP counts seconds from 1970; what the type cannot hold is no time. */
static void
set_published_at(MessageValues *message, const BrokerDelivery *wire)
{
	uint64		epoch = (uint64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY;

	message->nulls[MESSAGE_PUBLISHED_AT] = !wire->has_timestamp ||
		wire->timestamp > (uint64) (END_TIMESTAMP / USECS_PER_SEC) + epoch - 1;
	if (!message->nulls[MESSAGE_PUBLISHED_AT])
		message->values[MESSAGE_PUBLISHED_AT] =
			TimestampTzGetDatum(((int64) wire->timestamp - (int64) epoch) * USECS_PER_SEC);
}

/* The number of the attempt that is being made. */
static Datum
attempt_number(const Delivery *delivery)
{
	return Int32GetDatum(delivery->begun ? delivery->attempts : delivery->attempts + 1);
}

/* Copies the values that were stored, with what is known of attempts by now. */
static void
stored_values(const Delivery *delivery, MessageValues *message)
{
	*message = *delivery->stored;
	message->values[MESSAGE_ATTEMPT] = attempt_number(delivery);
}

/*
 * Sets the attributes of the message's fanout.message, in the current context; but
 * for the body, which only handlers look at: see delivery_set_body().  Raises no
 * error because of what the message contains.
 */
void
delivery_values(const Delivery *delivery, const char *topic, const char *consumer_group,
				MessageValues *message)
{
	const BrokerDelivery *wire = delivery->wire;

	if (wire == NULL)
	{
		stored_values(delivery, message);
		return;
	}
	memset(message, 0, sizeof(*message));
	message->values[MESSAGE_ID] = UUIDPGetDatum(&delivery->message_id);
	set_text(message, MESSAGE_TOPIC, topic);
	set_text(message, MESSAGE_CONSUMER_GROUP, consumer_group);
	set_text(message, MESSAGE_TYPE, delivery->type);
	set_text(message, MESSAGE_KEY, delivery->key);
	message->values[MESSAGE_SEQUENCE] = Int64GetDatum(delivery->sequence);
	message->nulls[MESSAGE_SEQUENCE] = !delivery->has_sequence;
	message->values[MESSAGE_HEADERS] = JsonbPGetDatum(jsonbuild_fields(wire->headers, wire->nheaders));
	message->nulls[MESSAGE_BODY] = true;
	message->values[MESSAGE_RAW] =
		PointerGetDatum(cstring_to_text_with_len(wire->body_len > 0 ? wire->body : "", wire->body_len));
	set_published_at(message, wire);
	message->values[MESSAGE_REDELIVERED] = BoolGetDatum(wire->redelivered);
	message->values[MESSAGE_ATTEMPT] = attempt_number(delivery);
	set_text(message, MESSAGE_CONTENT_TYPE, optional_text(wire->content_type));
}

/* Sets the attribute that delivery_values() leaves out, in the current context. */
void
delivery_set_body(MessageValues *message)
{
	struct varlena *raw = (struct varlena *) DatumGetPointer(message->values[MESSAGE_RAW]);

	message->values[MESSAGE_BODY] = delivery_json(VARDATA_ANY(raw), VARSIZE_ANY_EXHDR(raw),
												  &message->nulls[MESSAGE_BODY]);
}

/*
 * Sets two parameters of a statement, columns "payload" and "raw": the body as
 * text or, if that is none in the server's encoding from which the same bytes are made
 * again, the bytes.
 */
void
delivery_body(const MessageValues *message, Datum *values, char *nulls)
{
	struct varlena *raw = (struct varlena *) DatumGetPointer(message->values[MESSAGE_RAW]);
	char	   *payload = utf8_decode_exactly(VARDATA_ANY(raw), VARSIZE_ANY_EXHDR(raw));

	nulls[0] = (payload != NULL) ? ' ' : 'n';
	values[0] = (payload != NULL) ? CStringGetTextDatum(payload) : (Datum) 0;
	nulls[1] = (payload == NULL) ? ' ' : 'n';
	values[1] = PointerGetDatum(raw);
}
