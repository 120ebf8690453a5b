/*-------------------------------------------------------------------------
 *
 * test_message.c
 *		Unit tests of message.c and errors.c.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/channels.h"
#include "broker/errors.h"
#include "broker/message.h"
#include "tap.h"

#define FRAME_MAX 4096

static char long_name[BROKER_MAX_SHORTSTR + 2];
static BrokerError error;

static bool
refused(const BrokerMessage *message, const char *text)
{
	size_t		size;

	error.text[0] = '\0';
	return !message_check(message, FRAME_MAX, &size, &error) && strstr(error.text, text) != NULL &&
		error.code == 0;
}

static void
test_messages(void)
{
	BrokerMessage good = {
		.exchange = "x",.routing_key = "",.message_id = "id",.content_type = "text/plain",
		.body = "abc",.body_len = 3,
	};
	BrokerMessage message = good;
	BrokerField header = {.name = "h",.type = BROKER_VALUE_STRING,.value.string = {"", 0}};
	size_t		size = 0;

	/*
	 * envelope, class to body size, flags, type, empty table, mode, id, time,
	 * app
	 */
	(void) message_check(&good, FRAME_MAX, &size, &error);
	ok(size == 8 + 12 + 2 + 11 + 4 + 1 + 3 + 8 + 10,
	   "the header frame's size is that of its properties (%zu)", size);
	message.exchange = long_name;
	ok(refused(&message, "exchange name of 256 bytes"), "a long exchange name is refused");
	message = good;
	message.routing_key = long_name;
	ok(refused(&message, "routing key"), "a long routing key is refused");
	message = good;
	message.message_id = long_name;
	ok(refused(&message, "message id of 256 bytes is longer than 63"), "a long message id is refused");
	message = good;
	message.type = long_name;
	ok(refused(&message, "type"), "a long type is refused");
	message = good;
	message.body_len = (size_t) BROKER_MAX_BODY + 1;
	ok(refused(&message, "body of"), "a body over the limit is refused");
	message = good;
	message.headers = &header;
	message.nheaders = 1;
	(void) message_check(&message, FRAME_MAX, &size, &error);
	header.value.string.len = FRAME_MAX - size;
	ok(message_check(&message, FRAME_MAX, &size, &error) && size == FRAME_MAX, "headers may fill a frame");
	header.value.string.len++;
	ok(refused(&message, "the limit is 4096"), "but not more");
	header.value.string.len = 0;
	header.name = long_name;
	ok(refused(&message, "name of a header"), "a long name of a header is refused");
}

static void
test_requests(void)
{
	BrokerField argument = {.name = "a",.type = BROKER_VALUE_STRING,.value.string = {"", 0}};
	BrokerRequest request = {
		.kind = BROKER_DECLARE_QUEUE,.queue = "q",.arguments = &argument,.narguments = 1,
	};

	ok(request_check(&request, FRAME_MAX, &error), "a request fits a frame");
	argument.value.string.len = FRAME_MAX;
	ok(!request_check(&request, FRAME_MAX, &error) && strstr(error.text, "arguments") != NULL,
	   "arguments over a frame are refused");
	argument.value.string.len = 0;
	request.queue = long_name;
	ok(!request_check(&request, FRAME_MAX, &error) && strstr(error.text, "queue name") != NULL,
	   "a long queue name is refused");
	ok(request_method(BROKER_UNBIND_QUEUE) == METHOD_NUMBER(50, 50), "requests have AMQP's numbers");
}

static void
test_blame(void)
{
	ok(broker_blames_request(50, 10, BROKER_DECLARE_QUEUE) && broker_blames_request(50, 10, BROKER_INSPECT_QUEUE) &&
	   !broker_blames_request(50, 10, BROKER_DELETE_QUEUE), "a declaration of a queue is blamed");
	ok(!broker_blames_request(0, 0, BROKER_DECLARE_EXCHANGE) && !broker_blames_publish(0, 0) &&
	   broker_method_name(0, 0) == NULL, "nothing is blamed if the broker does not say what");
	ok(broker_blames_publish(60, 40) && strcmp(broker_method_name(60, 40), "basic.publish") == 0,
	   "a message is blamed");
	ok(strcmp(broker_method_name(40, 20), "exchange.delete") == 0 && broker_method_name(60, 41) == NULL,
	   "methods that we send have names");
}

static void
test_texts(void)
{
	char text[	6];

	error_copy_text(text, sizeof(text), "a\nb\0\377defg", 10);
	ok(strcmp(text, "a?b??") == 0, "the peer's text is cut, and plain ASCII");
	error_copy_text(text, sizeof(text), NULL, 0);
	ok(text[0] == '\0', "and may be empty");
	error_set(&error, 5, "%s", long_name);
	ok(error.code == 5 && error.class_id == 0 && strlen(error.text) == sizeof(long_name) - 1, "an error has its text");
}

/* Pieces of all sizes, each full of its number. */
static void
test_pieces(BrokerDelivery *delivery)
{
	enum
	{
		PIECES = 200
	};
	unsigned char *pieces[PIECES];
	bool		whole = true;

	for (int i = 0; i < PIECES; i++)
	{
		pieces[i] = delivery_keep(delivery, (size_t) i * i % 3001);
		if (pieces[i] == NULL || (uintptr_t) pieces[i] % sizeof(void *) != 0)
			abort();
		memset(pieces[i], i, (size_t) i * i % 3001);
	}
	for (int i = 0; i < PIECES; i++)
	{
		for (int j = 0; j < i * i % 3001; j++)
			whole = whole && pieces[i][j] == i;
	}
	ok(whole && delivery->size > 200000, "pieces of its memory do not overlap");
}

static void
test_memory(void)
{
	BrokerDelivery *delivery = calloc(1, sizeof(BrokerDelivery));

	if (delivery == NULL)
		abort();
	delivery->message_id = delivery_keep_text(delivery, "id\0x", 4);
	delivery->body = malloc(3);
	ok(strcmp(delivery->message_id, "id") == 0 && delivery->size > 5, "a delivery counts what it keeps");
	test_pieces(delivery);
	broker_free_delivery(delivery);
	broker_free_delivery(NULL);
	ok(true, "and all of it is freed");
}

int
main(void)
{
	memset(long_name, 'x', sizeof(long_name) - 1);
	test_messages();
	test_requests();
	test_blame();
	test_texts();
	test_memory();
	return done();
}
