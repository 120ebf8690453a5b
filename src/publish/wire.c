/*-------------------------------------------------------------------------
 *
 * wire.c
 *		From an outbox row to an AMQP message.
 *
 * What this file makes is all a consumer sees, so the rules of the message
 * format (README, "Messages") are here and nowhere else.
 *
 * Must never: change a message that cannot be sent as it is; it says so, and the caller
 * makes it a dead letter.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

#include "capture/outbox.h"
#include "capture/via.h"
#include "publish/wire.h"
#include "server/utf8.h"

StaticAssertDecl(OUTBOX_MAX_TYPE == BROKER_MAX_SHORTSTR,
				 "whatever type may be written to the outbox must go into a message");

/* Our own headers, set by set_own_headers(). */
#define OWN_HEADERS 4

/*
 * A number is an integer if it is one and fits 64 bits, else a double.
 *
 * Not beyond a double: RabbitMQ does not know AMQP's infinity, and closes the
 * connection on it (541), with everything that is in flight.
 */
static bool
set_number(BrokerField *field, Numeric number)
{
	char	   *text = DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(number)));
	char	   *end;

	errno = 0;
	field->type = BROKER_VALUE_INT;
	field->value.integer = strtoll(text, &end, 10);
	if (errno != 0 || *end != '\0')
	{
		field->type = BROKER_VALUE_DOUBLE;
		field->value.real = strtod(text, NULL);
		return isfinite(field->value.real);
	}
	return true;
}

static bool
set_string(BrokerField *field, const char *s, size_t len)
{
	field->type = BROKER_VALUE_STRING;
	field->value.string.data = utf8_encode(s, len, &field->value.string.len);
	return field->value.string.data != NULL;
}

static bool
set_field(BrokerField *field, const JsonbValue *value)
{
	switch (value->type)
	{
		case jbvBool:
			field->type = BROKER_VALUE_BOOL;
			field->value.boolean = value->val.boolean;
			return true;
		case jbvNumeric:
			return set_number(field, value->val.numeric);
		case jbvString:
			return set_string(field, value->val.string.val, value->val.string.len);
		default:
			field->type = BROKER_VALUE_NULL;
			return true;
	}
}

BrokerField *
wire_fields(Jsonb *object, int extra, int *count)
{
	int			n = object != NULL && JB_ROOT_IS_OBJECT(object) ? JB_ROOT_COUNT(object) : 0;
	BrokerField *fields = palloc0((n + extra) * sizeof(BrokerField));
	JsonbIterator *it;
	JsonbValue	v;

	*count = 0;
	if (n == 0)
		return fields;
	it = JsonbIteratorInit(&object->root);
	(void) JsonbIteratorNext(&it, &v, true);
	while (JsonbIteratorNext(&it, &v, true) == WJB_KEY)
	{
		BrokerField *field = &fields[(*count)++];
		size_t		len;
		char	   *name = pnstrdup(v.val.string.val, v.val.string.len);

		field->name = utf8_encode(name, v.val.string.len, &len);
		(void) JsonbIteratorNext(&it, &v, true);
		if (field->name == NULL || !set_field(field, &v))
			return NULL;
	}
	return fields;
}

/*
 * Adds this database to the way that a change has come, which is in the message
 * if it was made while another one was handled; else it begins here.
 */
static void
set_via(BrokerField *fields, int *count)
{
	BrokerField *field = NULL;
	char	   *via;

	for (int i = 0; i < *count; i++)
	{
		if (strcmp(fields[i].name, "via") == 0 && fields[i].type == BROKER_VALUE_STRING)
			field = &fields[i];
	}
	if (field == NULL)
	{
		field = &fields[(*count)++];
		field->name = "via";
		field->type = BROKER_VALUE_STRING;
		via = pstrdup(via_database());
	}
	else
		via = psprintf("%.*s,%s", (int) field->value.string.len, field->value.string.data, via_database());
	field->value.string.data = via;
	field->value.string.len = strlen(via);
}

/*
 * Sets a number, unless the message brings one of its own: the copy of another
 * message, see history/replay.c, has that one's.
 */
static void
set_integer(BrokerField *fields, int *count, const char *name, int64 value)
{
	BrokerField *field;

	for (int i = 0; i < *count; i++)
	{
		if (strcmp(fields[i].name, name) == 0)
			return;
	}
	field = &fields[(*count)++];
	field->name = name;
	field->type = BROKER_VALUE_INT;
	field->value.integer = value;
}

const char *
wire_content_type(const char *format, size_t len)
{
	static const char cloudevents[] = "cloudevents";

	return len == strlen(cloudevents) && memcmp(format, cloudevents, len) == 0 ?
		"application/cloudevents+json" : "application/json";
}

/*
 * Returns the content type of a row, by the format that it was rendered in, which its
 * topic may not have any more; NULL: it is no row.
 */
static const char *
content_type_of_row(const BrokerField *fields, int count)
{
	for (int i = 0; i < count; i++)
	{
		if (strcmp(fields[i].name, "format") == 0 && fields[i].type == BROKER_VALUE_STRING)
			return wire_content_type(fields[i].value.string.data, fields[i].value.string.len);
	}
	return NULL;
}

static bool
set_own_headers(Message *message, BrokerField *fields, int *count)
{
	BrokerField *field;

	set_integer(fields, count, "sequence", message->id);
	set_integer(fields, count, "xid", (int64) message->xid);
	set_via(fields, count);
	if (message->key == NULL)
		return true;
	field = &fields[(*count)++];
	field->name = "key";
	return set_string(field, message->key, strlen(message->key));
}

/*
 * The names in a captured change's type can be longer in UTF-8 than they are in
 * the database, and then too long together.
 */
static const char *
short_string(const char *s)
{
	size_t		len;
	const char *utf8 = utf8_encode(s, strlen(s), &len);

	if (utf8 == NULL || len <= BROKER_MAX_SHORTSTR)
		return utf8;
	return pnstrdup(utf8, pg_encoding_mbcliplen(PG_UTF8, utf8, len, BROKER_MAX_SHORTSTR));
}

static const char *
prepare(Message *message)
{
	BrokerMessage *wire = &message->wire;
	BrokerField *fields;

	if (message->payload_len == 0)
		return "the row is too large to be rendered as JSON";
	if (message->payload_len > BROKER_MAX_BODY)
		return psprintf("body of %zu bytes is larger than the %d that RabbitMQ can take",
						message->payload_len, BROKER_MAX_BODY);
	if (message_unsendable(message))
		return psprintf("headers and key of %zu bytes do not fit into a frame", message->headers_len);
	fields = wire_fields(message->headers, OWN_HEADERS, &wire->nheaders);
	if (fields == NULL || !set_own_headers(message, fields, &wire->nheaders))
		return "headers cannot be converted to UTF-8, or have a number that is no double";
	wire->headers = fields;
	message->content_type = content_type_of_row(fields, wire->nheaders);
	wire->message_id = message->message_id;
	wire->timestamp = message->created_at / USECS_PER_SEC +
		(uint64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY;
	if (message->type != NULL && (wire->type = short_string(message->type)) == NULL)
		return "type cannot be converted to UTF-8";
	wire->body = utf8_encode(message->payload, message->payload_len, &wire->body_len);
	if (wire->body == NULL)
		return "body is not valid in the database's encoding, so it cannot be converted to UTF-8";
	return NULL;
}

void
wire_prepare(Message *message, MemoryContext context)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(context);

	message->reason = unconstify(char *, prepare(message));
	MemoryContextSwitchTo(oldcontext);
}
