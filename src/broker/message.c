/*-------------------------------------------------------------------------
 *
 * message.c
 *		Sizes and limits of what is sent, and the memory of what is received.
 *
 * Finds what the protocol would refuse before a byte of it is sent, because the
 * library notices only after it has sent half of a message, and the broker answers
 * that by closing the connection.
 *
 * Also which AMQP method a request is, by which the caller can tell whether
 * the broker ended a connection because of it.
 *
 * Must never: send anything, or name what rabbitmq-c declares.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/channels.h"
#include "broker/errors.h"
#include "broker/message.h"

/*
 * Memory of a delivery, of which pieces are given out.  Most deliveries have one
 * block, though dozens of names and strings.
 */
typedef struct BrokerBlock
{
	struct BrokerBlock *next;
	size_t		used;			/* of the data */
	size_t		room;
	char		data[];			/* aligned as a pointer is */
} BrokerBlock;

/* The least that is allocated at once. */
#define BLOCK_SIZE (1024 - sizeof(BrokerBlock))

/* Pieces are aligned for what BrokerField has. */
#define PIECE_SIZE(size) (((size) + 7) & ~(size_t) 7)

static bool check_table(const BrokerField *fields, int nfields, BrokerError *error);
static size_t table_size(const BrokerField *fields, int nfields);
static size_t field_size(const BrokerField *field);
static size_t properties_size(const BrokerMessage *message);


/*
 * Requests
 */

/* Methods by BrokerRequestKind (AMQP 0-9-1, sections 1.6 and 1.7). */
static const struct
{
	uint16_t	class_id;
	uint16_t	method_id;
	const char *name;
}			methods[] =

{
	[BROKER_DECLARE_EXCHANGE] = {40, 10, "exchange.declare"},
	[BROKER_DELETE_EXCHANGE] = {40, 20, "exchange.delete"},
	[BROKER_DECLARE_QUEUE] = {50, 10, "queue.declare"},
	[BROKER_INSPECT_QUEUE] = {50, 10, "queue.declare"},
	[BROKER_BIND_QUEUE] = {50, 20, "queue.bind"},
	[BROKER_UNBIND_QUEUE] = {50, 50, "queue.unbind"},
	[BROKER_DELETE_QUEUE] = {50, 40, "queue.delete"},
};

#define BASIC_CLASS 60
#define BASIC_PUBLISH 40

/*
 * Is class_id and method_id, of an event or an error, the method by which a
 * request of this kind is made?
 */
bool
broker_blames_request(int class_id, int method_id, BrokerRequestKind kind)
{
	return class_id == methods[kind].class_id && method_id == methods[kind].method_id;
}

/* Is it the method by which messages are published? */
bool
broker_blames_publish(int class_id, int method_id)
{
	return class_id == BASIC_CLASS && method_id == BASIC_PUBLISH;
}

/* Returns the protocol's name of a method that we send, or NULL. */
const char *
broker_method_name(int class_id, int method_id)
{
	for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
	{
		if (broker_blames_request(class_id, method_id, (BrokerRequestKind) i))
			return methods[i].name;
	}
	return broker_blames_publish(class_id, method_id) ? "basic.publish" : NULL;
}

/* Class and method as one number.  The method that answers is the next one. */
uint32_t
request_method(BrokerRequestKind kind)
{
	return METHOD_NUMBER(methods[kind].class_id, methods[kind].method_id);
}

/* Bytes of a request's frame, rounded up. */
size_t
request_size(const BrokerRequest *request)
{
	return METHOD_SIZE + table_size(request->arguments, request->narguments);
}

/* Checks that a request can be sent as one frame; if not, *error says why. */
bool
request_check(const BrokerRequest *request, size_t frame_max, BrokerError *error)
{
	if (!message_check_short("queue name", request->queue, BROKER_MAX_SHORTSTR, error) ||
		!message_check_short("exchange name", request->exchange, BROKER_MAX_SHORTSTR, error) ||
		!check_table(request->arguments, request->narguments, error))
		return false;
	if (request_size(request) <= frame_max)
		return true;
	error_set(error, 0, "queue arguments do not fit a frame of %zu bytes", frame_max);
	return false;
}


/*
 * Messages
 */

/*
 * Checks that a message can be sent; if not, *error says why.  Sets the size
 * of the content header's frame.
 */
bool
message_check(const BrokerMessage *message, size_t frame_max, size_t *header_size,
			  BrokerError *error)
{
	if (!message_check_short("exchange name", message->exchange, BROKER_MAX_SHORTSTR, error) ||
		!message_check_short("routing key", message->routing_key, BROKER_MAX_SHORTSTR, error) ||
		!message_check_short("message id", message->message_id, BROKER_MAX_MESSAGE_ID, error) ||
		!message_check_short("content type", message->content_type, BROKER_MAX_SHORTSTR, error) ||
		!message_check_short("type", message->type, BROKER_MAX_SHORTSTR, error) ||
		!check_table(message->headers, message->nheaders, error))
		return false;

	*header_size = FRAME_ENVELOPE + 12 + properties_size(message);
	if (*header_size > frame_max)
	{
		error_set(error, 0, "properties and headers need a frame of %zu bytes, the limit is %zu",
				  *header_size, frame_max);
		return false;
	}
	if (message->body_len > BROKER_MAX_BODY)
	{
		error_set(error, 0, "body of %zu bytes is larger than %d bytes",
				  message->body_len, BROKER_MAX_BODY);
		return false;
	}
	return true;
}

/* Checks the length of a short string.  text may be NULL: it is absent. */
bool
message_check_short(const char *what, const char *text, size_t max, BrokerError *error)
{
	size_t		len = text ? strlen(text) : 0;

	if (len <= max)
		return true;
	error_set(error, 0, "%s of %zu bytes is longer than %zu bytes", what, len, max);
	return false;
}

/* Bytes of the flags and of the properties that broker.c fills in. */
static size_t
properties_size(const BrokerMessage *message)
{
	size_t		size = 2;

	size += 1 + strlen(message->content_type);
	size += 4 + table_size(message->headers, message->nheaders);
	size += 1;					/* delivery mode */
	size += 1 + strlen(message->message_id);
	size += 8;					/* timestamp */
	if (message->type != NULL)
		size += 1 + strlen(message->type);
	size += 1 + strlen(MESSAGE_APP_ID);
	return size;
}

/* Bytes of a table (AMQP 0-9-1, section 4.2.5.5) without the leading length. */
static size_t
table_size(const BrokerField *fields, int nfields)
{
	size_t		size = 0;

	for (int i = 0; i < nfields; i++)
		size += 1 + strlen(fields[i].name) + 1 + field_size(&fields[i]);
	return size;
}

static size_t
field_size(const BrokerField *field)
{
	switch (field->type)
	{
		case BROKER_VALUE_NULL:
			return 0;
		case BROKER_VALUE_BOOL:
			return 1;
		case BROKER_VALUE_INT:
		case BROKER_VALUE_DOUBLE:
		case BROKER_VALUE_TIMESTAMP:
			return 8;
		case BROKER_VALUE_STRING:
			return 4 + field->value.string.len;
		case BROKER_VALUE_TABLE:
		case BROKER_VALUE_ARRAY:
			break;				/* never sent */
	}
	return 0;
}

static bool
check_table(const BrokerField *fields, int nfields, BrokerError *error)
{
	for (int i = 0; i < nfields; i++)
	{
		if (!message_check_short("name of a header", fields[i].name, BROKER_MAX_SHORTSTR, error))
			return false;
	}
	return true;
}


/*
 * Deliveries
 */

/* Frees a delivery with all that it has; NULL is none. */
void
broker_free_delivery(BrokerDelivery *delivery)
{
	BrokerBlock *block;

	if (delivery == NULL)
		return;
	while ((block = delivery->memory) != NULL)
	{
		delivery->memory = block->next;
		free(block);
	}
	free(delivery->body);
	free(delivery);
}

/* Adds a block with room for at least so many bytes; NULL if there is no memory. */
static BrokerBlock *
add_block(BrokerDelivery *delivery, size_t size)
{
	size_t		room = size > BLOCK_SIZE ? size : BLOCK_SIZE;
	BrokerBlock *block = malloc(sizeof(BrokerBlock) + room);

	if (block == NULL)
		return NULL;
	block->used = 0;
	block->room = room;
	block->next = delivery->memory;
	delivery->memory = block;
	delivery->size += sizeof(BrokerBlock) + room;
	return block;
}

/* Returns memory that is freed with the delivery, or NULL if there is none. */
void *
delivery_keep(BrokerDelivery *delivery, size_t size)
{
	BrokerBlock *block = delivery->memory;
	void	   *piece;

	size = PIECE_SIZE(size);
	if (block == NULL || size > block->room - block->used)
		block = add_block(delivery, size);
	if (block == NULL)
		return NULL;
	piece = block->data + block->used;
	block->used += size;
	return piece;
}

/* Returns a terminated copy in the delivery's memory, or NULL. */
char *
delivery_keep_text(BrokerDelivery *delivery, const void *bytes, size_t len)
{
	char	   *copy = delivery_keep(delivery, len + 1);

	if (copy == NULL)
		return NULL;
	if (len > 0)
		memcpy(copy, bytes, len);
	copy[len] = '\0';
	return copy;
}
