/*-------------------------------------------------------------------------
 *
 * test_broker_channels.c
 *		Unit tests of broker.c: several channels, and requests that nobody
 *		waits for, against brokers made of raw bytes.
 *
 * Each script plays the server from the end of the login on, checks what it
 * hears, and hangs up if that is something else: then the client's next event
 * is not the one that is expected.  What the scripts cannot show, the states of
 * a channel one by one, is in test_channels.c.
 *
 *-------------------------------------------------------------------------
 */
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>

#include "fake_broker.h"

#define MANY_CHANNELS	2000
#define ROUNDS			20000

/* The last frame that the server has read. */
static int	heard_type;
static int	heard_channel;
static unsigned char heard[70000];
static size_t heard_len;

static Broker *broker;
static pid_t server;


/*
 * The server's side
 */

static void
hear(int fd)
{
	unsigned char head[7];

	get(fd, head, 7);
	heard_type = head[0];
	heard_channel = head[1] << 8 | head[2];
	heard_len = ((size_t) head[3] << 24) + ((size_t) head[4] << 16) + ((size_t) head[5] << 8) + head[6];
	get(fd, heard, heard_len + 1);
}

static void
give_up(int channel, int class_id, int method_id)
{
	fprintf(stderr, "# the server expected method %d.%d on channel %d, and heard a frame of type %d, %d.%d on %d\n",
			class_id, method_id, channel, heard_type, heard[0] << 8 | heard[1],
			heard[2] << 8 | heard[3], heard_channel);
	_exit(1);
}

static void
hear_method(int fd, int channel, int class_id, int method_id)
{
	hear(fd);
	if (heard_type != 1 || heard_channel != channel || (heard[0] << 8 | heard[1]) != class_id ||
		(heard[2] << 8 | heard[3]) != method_id)
		give_up(channel, class_id, method_id);
}

#define say(fd, channel, bytes) put_frame(fd, 1, channel, bytes, sizeof(bytes))

static void
let_open(int fd, int channel, bool confirms)
{
	hear_method(fd, channel, 20, 10);
	if (confirms)
		hear_method(fd, channel, 85, 10);
	say(fd, channel, channel_open_ok);
	if (confirms)
		say(fd, channel, select_ok);
}

static void
hear_message(int fd, int channel)
{
	hear_method(fd, channel, 60, 40);
	hear(fd);
	if (heard_type != 2 || heard_channel != channel)
		give_up(channel, 60, 40);
	hear(fd);
	if (heard_type != 3 || heard_channel != channel)
		give_up(channel, 60, 40);
}

static void
say_ack(int fd, int channel, int tag)
{
	unsigned char bytes[sizeof(ack)];

	memcpy(bytes, ack, sizeof(ack));
	for (int i = 0; i < 4; i++)
		bytes[11 - i] = (unsigned char) (tag >> 8 * i);
	say(fd, channel, bytes);
}

/* The rest of the conversation is of no interest. */
static void
go_on(int fd)
{
	for (;;)
		hear(fd);
}


/*
 * The client's side
 */

static void
begin(Script script)
{
	BrokerError error;

	broker = log_in_to(script, &server, &error);
	if (broker == NULL)
	{
		printf("Bail out! %s\n", error.text);
		exit(1);
	}
}

static void
end(void)
{
	broker_close(broker, false);
	stop_server(server);
}

static BrokerEvent
expect(BrokerEventType type, int channel, const char *name)
{
	BrokerEvent event = next_event(broker);

	ok(event.type == type && event.channel == channel, "%s", name);
	if (event.type != type || event.channel != channel)
		diag("event %d of channel %d: %s", event.type, event.channel,
			 event.type == BROKER_DISCONNECTED ? event.text : "");
	return event;
}

static int
open_channel(bool confirms)
{
	BrokerError error;

	error.text[0] = '\0';
	return broker_open_channel(broker, confirms, &error);
}

static BrokerResult
publish_body(int channel, const char *body, size_t len)
{
	BrokerError error;
	BrokerMessage message = {
		.exchange = "x",.routing_key = "",.message_id = "id",.content_type = "text/plain",
		.body = body,.body_len = len,
	};

	return broker_publish(broker, channel, &message, 3000, &error);
}

static BrokerResult
publish(int channel)
{
	return publish_body(channel, "abc", 3);
}

static BrokerResult
ask(int channel, BrokerRequestKind kind)
{
	BrokerError error;
	BrokerRequest request = {.kind = kind,.queue = "q",.exchange = "x",.if_empty = true};

	return broker_request(broker, channel, &request, &error);
}

static bool
is_quiet(void)
{
	BrokerEvent event;

	for (int i = 0; i < 10; i++)
	{
		broker_next_event(broker, &event);
		if (event.type != BROKER_NOTHING)
			return false;
		wait_socket(broker_fd(broker), false, 10);
	}
	return true;
}


/*
 * Two channels
 */

static bool
script_two(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	let_open(fd, 2, true);
	hear_message(fd, 1);
	hear_message(fd, 2);
	hear_message(fd, 2);
	say_ack(fd, 2, 2);
	say_ack(fd, 1, 1);
	/* frames of two contents may come in any order */
	say(fd, 1, returned);
	say(fd, 2, returned);
	put_frame(fd, 2, 2, header_id, sizeof(header_id));
	put_frame(fd, 2, 1, header_id, sizeof(header_id));
	put_frame(fd, 3, 1, "abc", 3);
	put_frame(fd, 3, 2, "abc", 3);
	say_ack(fd, 1, 2);
	go_on(fd);
	return true;
}

static void
test_two(void)
{
	BrokerEvent event;

	begin(script_two);
	ok(publish(1) == BROKER_REFUSED, "a channel that was never opened refuses messages");
	ok(open_channel(true) == 1 && open_channel(true) == 2, "each channel has a number of its own");
	ok(publish(1) == BROKER_REFUSED, "nothing is published before the channel is open");
	expect(BROKER_CHANNEL_OPENED, 1, "the first channel is open");
	expect(BROKER_CHANNEL_OPENED, 2, "the second channel is open");
	ok(publish(1) == BROKER_OK && publish(2) == BROKER_OK && publish(2) == BROKER_OK, "both take messages");
	event = expect(BROKER_ACK, 2, "an ack says which channel it is of");
	ok(event.tag == 2, "delivery tags count per channel");
	event = expect(BROKER_ACK, 1, "the other channel's ack");
	ok(event.tag == 1, "the other channel has its own tags");
	event = expect(BROKER_RETURN, 1, "returns on two channels may mix");
	ok(event.code == 312 && strcmp(event.message_id, "id") == 0, "a return has its code and id");
	expect(BROKER_RETURN, 2, "the other channel's return is whole");
	event = expect(BROKER_DISCONNECTED, 0, "an ack of a tag that only the other channel has used is a violation");
	ok(strstr(event.text, "was not sent") != NULL, "which the text says: %s", event.text);
	end();
}


/*
 * A channel is closed by the broker in the middle of a message
 */

static bool
script_refuse_one(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	let_open(fd, 2, true);
	hear_message(fd, 2);
	hear_method(fd, 1, 60, 40);
	say(fd, 1, close_404);
	do
		hear(fd);
	while (heard_type != 1);
	/* before anything else is asked, and nothing of the message after it */
	if (heard_channel != 1 || memcmp(heard, close_ok, sizeof(close_ok)) != 0)
		give_up(1, 20, 41);
	say_ack(fd, 2, 1);
	hear_message(fd, 2);
	say_ack(fd, 2, 2);
	let_open(fd, 1, true);
	hear_message(fd, 1);
	say_ack(fd, 1, 1);
	go_on(fd);
	return true;
}

static void
test_refused(void)
{
	size_t		len = 32 * 1024 * 1024;
	char	   *body = calloc(len, 1);
	BrokerEvent event;
	int			result;

	begin(script_refuse_one);
	(void) (open_channel(true) + open_channel(true));
	expect(BROKER_CHANNEL_OPENED, 1, "channel 1 is open");
	expect(BROKER_CHANNEL_OPENED, 2, "channel 2 is open");
	publish(2);
	result = publish_body(1, body, len);
	ok(result == BROKER_REFUSED, "a channel closed in the middle of a message refuses it (%d)", result);
	ok(publish(1) == BROKER_REFUSED, "and the next one");
	event = expect(BROKER_CHANNEL_CLOSED, 1, "an event says which channel was closed");
	ok(event.code == 404 && strcmp(event.text, "gone") == 0, "and why");
	ok(broker_blames_publish(event.class_id, event.method_id) &&
	   !broker_blames_request(event.class_id, event.method_id, BROKER_DECLARE_QUEUE) &&
	   strcmp(broker_method_name(event.class_id, event.method_id), "basic.publish") == 0,
	   "and because of which method");
	expect(BROKER_ACK, 2, "the other channel's message is confirmed");
	ok(publish(2) == BROKER_OK, "the other channel goes on");
	event = expect(BROKER_ACK, 2, "its next message is confirmed");
	ok(event.tag == 2, "its tags go on");
	broker_close_channel(broker, 1);
	ok(open_channel(true) == 1, "the number is free, and closing what is over does nothing");
	expect(BROKER_CHANNEL_OPENED, 1, "channel 1 is open again");
	publish(1);
	event = expect(BROKER_ACK, 1, "a message on the new channel is confirmed");
	ok(event.tag == 1, "delivery tags begin at 1 again");
	free(body);
	end();
}


/*
 * Closing
 */

static bool
script_closing(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	hear_message(fd, 1);
	hear_method(fd, 4, 20, 10);
	say_ack(fd, 1, 1);
	say(fd, 4, channel_open_ok);
	hear_method(fd, 4, 50, 20);
	say(fd, 4, bind_ok);
	hear_method(fd, 1, 20, 40);
	/* all this was on its way */
	say_ack(fd, 1, 1);
	say(fd, 1, returned);
	put_frame(fd, 2, 1, header_id, sizeof(header_id));
	put_frame(fd, 3, 1, "abc", 3);
	let_open(fd, 2, true);
	let_open(fd, 3, true);
	hear_method(fd, 3, 20, 40);
	/* the other side's close crosses ours */
	say(fd, 3, close_404);
	hear_method(fd, 3, 20, 41);
	say(fd, 3, close_ok);
	say(fd, 1, close_ok);
	hear_message(fd, 2);
	say_ack(fd, 2, 1);
	let_open(fd, 1, false);
	let_open(fd, 3, true);
	/* closed before it is open */
	hear_method(fd, 3, 20, 40);
	say(fd, 3, close_ok);
	go_on(fd);
	return true;
}

static void
test_closing(void)
{
	BrokerError error;
	BrokerEvent event;

	begin(script_closing);
	(void) open_channel(true);
	expect(BROKER_CHANNEL_OPENED, 1, "a channel is open");
	publish(1);
	ok(broker_bind_queue(broker, "q", "x", &error) == BROKER_OK, "its ack is taken in by a call");
	ok(publish(2) == BROKER_REFUSED, "another number is refused");
	broker_close_channel(broker, 1);
	broker_close_channel(broker, 1);
	ok(publish(1) == BROKER_REFUSED, "a channel that is being closed refuses messages");
	ok(open_channel(true) == 2, "the number of a channel that is being closed is not used");
	expect(BROKER_CHANNEL_OPENED, 2, "no event of the closed channel comes after the call");
	ok(open_channel(true) == 3, "the last number");
	ok(open_channel(true) == 0, "there are no more than max_channels");
	expect(BROKER_CHANNEL_OPENED, 3, "the third channel is open");
	broker_close_channel(broker, 3);
	ok(open_channel(true) == 0, "a number is not free before close-ok has come");
	(void) is_quiet();
	publish(2);
	expect(BROKER_ACK, 2, "closes that cross are settled, and no event");
	ok(open_channel(false) == 1, "a number is free once close-ok has come, the last first");
	ok(open_channel(true) == 3, "and so is the number whose closes crossed");
	broker_close_channel(broker, 3);
	event = expect(BROKER_CHANNEL_OPENED, 1, "a channel closed before it was open is never open");
	ok(is_quiet() && broker_fd(broker) >= 0, "and nothing else comes of it (%s)", event.text);
	end();
}


/*
 * Requests
 */

static bool
script_requests(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, false);
	let_open(fd, 2, false);
	hear_method(fd, 1, 40, 10);
	if (memcmp(heard + 4, "\0\0\1x\6fanout\2", 12) != 0)
		give_up(1, 40, 10);
	hear_method(fd, 2, 50, 10);
	if (memcmp(heard + 4, "\0\0\1q\1", 5) != 0)
		give_up(2, 50, 10);
	say(fd, 2, declare_ok);
	say(fd, 1, exchange_ok);
	hear_method(fd, 1, 50, 10);
	if (memcmp(heard + 4, "\0\0\1q\2", 5) != 0)
		give_up(1, 50, 10);
	say(fd, 1, declare_ok);
	hear_method(fd, 1, 50, 20);
	if (memcmp(heard + 4, "\0\0\1q\1x", 6) != 0)
		give_up(1, 50, 20);
	say(fd, 1, bind_ok);
	hear_method(fd, 1, 50, 50);
	put_frame(fd, 1, 1, "\0\62\0\63", 4);
	hear_method(fd, 1, 50, 40);
	if (memcmp(heard + 4, "\0\0\1q\2", 5) != 0)
		give_up(1, 50, 40);
	put_frame(fd, 1, 1, "\0\62\0\51\0\0\0\5", 8);
	hear_method(fd, 1, 40, 20);
	say(fd, 1, close_404);
	hear_method(fd, 1, 20, 41);
	/* the other channel's goes on; its last request is never answered */
	hear_method(fd, 2, 50, 20);
	say(fd, 2, bind_ok);
	hear_method(fd, 2, 50, 20);
	hear_method(fd, 2, 20, 40);
	say(fd, 2, bind_ok);
	say(fd, 2, close_ok);
	hear_method(fd, 4, 20, 10);
	say(fd, 4, channel_open_ok);
	hear_method(fd, 4, 40, 10);
	say(fd, 0, close_540);
	go_on(fd);
	return true;
}

static void
test_requests(void)
{
	BrokerError error = {0};
	BrokerEvent event;

	begin(script_requests);
	(void) (open_channel(false) + open_channel(false));
	ok(ask(1, BROKER_DECLARE_EXCHANGE) == BROKER_REFUSED, "nothing is asked before the channel is open");
	expect(BROKER_CHANNEL_OPENED, 1, "a channel for requests is open without confirm.select");
	expect(BROKER_CHANNEL_OPENED, 2, "another one");
	ok(publish(1) == BROKER_REFUSED, "it takes no messages");
	ok(ask(1, BROKER_DECLARE_EXCHANGE) == BROKER_OK && ask(2, BROKER_INSPECT_QUEUE) == BROKER_OK,
	   "requests on two channels do not wait for each other");
	ok(ask(1, BROKER_BIND_QUEUE) == BROKER_BUSY, "a channel has one request at a time");
	event = expect(BROKER_REPLY, 2, "an answer says of which channel it is, whatever the order");
	ok(event.messages == 7 && event.consumers == 3, "and how many messages and consumers the queue has");
	expect(BROKER_REPLY, 1, "an exchange was declared");
	ask(1, BROKER_DECLARE_QUEUE);
	expect(BROKER_REPLY, 1, "a queue was declared");
	ask(1, BROKER_BIND_QUEUE);
	expect(BROKER_REPLY, 1, "a queue was bound");
	ask(1, BROKER_UNBIND_QUEUE);
	expect(BROKER_REPLY, 1, "a queue was unbound");
	ask(1, BROKER_DELETE_QUEUE);
	event = expect(BROKER_REPLY, 1, "a queue was deleted");
	ok(event.messages == 5, "with so many messages");
	ask(1, BROKER_DELETE_EXCHANGE);
	event = expect(BROKER_CHANNEL_CLOSED, 1, "a refusal closes the request's channel");
	ok(event.code == 404, "with the broker's reason");
	ask(2, BROKER_BIND_QUEUE);
	expect(BROKER_REPLY, 2, "and no other");
	ask(2, BROKER_BIND_QUEUE);
	broker_close_channel(broker, 2);
	ok(is_quiet(), "an answer to a request that was given up is dropped");
	ok(broker_declare_exchange(broker, "x", &error) == BROKER_LOST && error.code == 540 &&
	   broker_blames_request(error.class_id, error.method_id, BROKER_DELETE_QUEUE) &&
	   !broker_blames_request(error.class_id, error.method_id, BROKER_DECLARE_QUEUE),
	   "an error tells which method the broker closed the connection for");
	event = expect(BROKER_DISCONNECTED, 0, "and so does the event");
	ok(event.code == 540 && broker_blames_request(event.class_id, event.method_id, BROKER_DELETE_QUEUE) &&
	   strcmp(broker_method_name(event.class_id, event.method_id), "queue.delete") == 0, "by its name");
	ok(open_channel(true) == 0 && ask(1, BROKER_BIND_QUEUE) == BROKER_LOST, "a lost connection opens nothing");
	broker_close_channel(broker, 1);
	end();
}

/* Calls that wait, beside a channel of the caller's. */
static bool
script_calls(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	hear_message(fd, 1);
	let_open(fd, 4, false);
	hear_method(fd, 4, 50, 10);
	say_ack(fd, 1, 1);
	say(fd, 4, declare_ok);
	/* refused, then closed while nobody asks for anything */
	hear_method(fd, 4, 40, 10);
	say(fd, 4, close_404);
	hear_method(fd, 4, 20, 41);
	let_open(fd, 4, false);
	hear_method(fd, 4, 50, 20);
	say(fd, 4, bind_ok);
	say(fd, 4, close_404);
	hear_method(fd, 4, 20, 41);
	let_open(fd, 4, false);
	hear_method(fd, 4, 50, 20);
	say(fd, 4, bind_ok);
	hear_method(fd, 4, 50, 10);
	say(fd, 4, other_ok);
	go_on(fd);
	return true;
}

static void
test_calls(void)
{
	BrokerError error = {0};
	uint32_t	messages = 0;
	uint32_t	consumers = 0;

	begin(script_calls);
	(void) open_channel(true);
	expect(BROKER_CHANNEL_OPENED, 1, "a channel is open");
	publish(1);
	ok(broker_inspect_queue(broker, "q", &messages, &consumers, &error) == BROKER_OK &&
	   messages == 7 && consumers == 3, "a request is waited for: %s", error.text);
	expect(BROKER_ACK, 1, "what other channels are told meanwhile is kept");
	ok(broker_declare_exchange(broker, "x", &error) == BROKER_REFUSED && error.code == 404,
	   "a refusal is the call's result");
	ok(is_quiet(), "and no event");
	ok(broker_bind_queue(broker, "q", "x", &error) == BROKER_OK, "the next call has a new channel");
	ok(is_quiet(), "its channel is closed while nobody asks for anything");
	ok(broker_bind_queue(broker, "q", "x", &error) == BROKER_OK, "the next call has a new channel, too");
	ok(broker_declare_queue(broker, "q", NULL, 0, &error) == BROKER_LOST &&
	   strstr(error.text, "another queue") != NULL, "an answer about another queue ends the connection");
	end();
}


/*
 * What no honest broker does
 */

static const unsigned char *bad_payload;
static size_t bad_payload_len;
static int	bad_type;
static int	bad_channel;

/* Channel 1 publishes, 2 is for requests, 3 is closed; then one bad frame. */
static bool
script_bad(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	let_open(fd, 2, false);
	let_open(fd, 3, true);
	hear_method(fd, 3, 20, 40);
	say(fd, 3, close_ok);
	put_frame(fd, bad_type, bad_channel, bad_payload, bad_payload_len);
	say(fd, 1, close_404);
	go_on(fd);
	return true;
}

/* A frame ends the connection with this text, or is ignored if that is NULL. */
static void
bad_frame(int type, int channel, const void *bytes, size_t len, const char *what, const char *text)
{
	BrokerEvent event;

	bad_type = type;
	bad_channel = channel;
	bad_payload = bytes;
	bad_payload_len = len;
	begin(script_bad);
	for (int i = 0; i < 3; i++)
		(void) open_channel(i != 1);
	for (int i = 0; i < 3; i++)
		event = next_event(broker);
	broker_close_channel(broker, 3);
	event = next_event(broker);
	if (text !=NULL)
		ok(event.type == BROKER_DISCONNECTED && strstr(event.text, text) != NULL,
		   "%s ends the connection: %s", what, event.text);
	else
		ok(event.type == BROKER_CHANNEL_CLOSED && event.channel == 1 && is_quiet(), "%s is ignored", what);
	end();
}

static void
test_bad(void)
{
	bad_frame(1, 4, bind_ok, sizeof(bind_ok), "a reply on a channel never opened", "unknown channel 4");
	bad_frame(1, 9, bind_ok, sizeof(bind_ok), "a reply on a channel beyond the limit", "unknown channel 9");
	bad_frame(1, 2, bind_ok, sizeof(bind_ok), "a reply nobody asked for", "unexpected method on channel 2");
	bad_frame(1, 2, ack, sizeof(ack), "an ack on a channel for requests", "unexpected method on channel 2");
	bad_frame(1, 2, returned, sizeof(returned), "a return on a channel for requests", "unexpected method on channel 2");
	bad_frame(2, 2, header_id, sizeof(header_id), "a header on a channel for requests", "channel for requests");
	bad_frame(3, 2, "x", 1, "a body on a channel for requests", "channel for requests");
	bad_frame(1, 1, channel_open_ok, sizeof(channel_open_ok), "open-ok of a channel that is open", "unexpected method on channel 1");
	bad_frame(1, 1, close_ok, sizeof(close_ok), "close-ok of a channel that is open", "unexpected method on channel 1");
	bad_frame(1, 3, ack, sizeof(ack), "an ack on a channel that is over", NULL);
	bad_frame(1, 3, close_ok, sizeof(close_ok), "a second close-ok", NULL);
	bad_frame(1, 3, close_404, sizeof(close_404), "a close of what is closed", NULL);
	bad_frame(2, 3, header_id, sizeof(header_id), "a header on a channel that is over", NULL);
	bad_frame(3, 3, "x", 1, "a body on a channel that is over", NULL);
}

/*
 * The number of a channel that the broker closed is not used before the caller
 * knows.
 */
static bool
script_closed_twice(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	let_open(fd, 2, false);
	hear_method(fd, 2, 50, 20);
	hear_method(fd, 4, 20, 10);
	say(fd, 1, close_404);
	say(fd, 1, close_404);
	hear_method(fd, 1, 20, 41);
	say(fd, 4, channel_open_ok);
	hear_method(fd, 4, 50, 20);
	say(fd, 4, bind_ok);
	let_open(fd, 3, true);
	say(fd, 3, close_404);
	hear_method(fd, 3, 20, 41);
	let_open(fd, 3, true);
	go_on(fd);
	return true;
}

static void
test_closed_twice(void)
{
	BrokerError error;

	begin(script_closed_twice);
	(void) (open_channel(true) + open_channel(false));
	expect(BROKER_CHANNEL_OPENED, 1, "a channel is open");
	expect(BROKER_CHANNEL_OPENED, 2, "another one");
	ask(2, BROKER_BIND_QUEUE);
	/* takes in the close on the way */
	ok(broker_bind_queue(broker, "q", "x", &error) == BROKER_OK, "close-ok is written by whatever call reads the close");
	ok(open_channel(true) == 3, "the number of a channel closed by the broker is not used before its event is fetched");
	expect(BROKER_CHANNEL_CLOSED, 1, "two closes of a channel are one event");
	expect(BROKER_CHANNEL_OPENED, 3, "the third is open");
	expect(BROKER_CHANNEL_CLOSED, 3, "and closed");
	ok(open_channel(true) == 3, "then the number is free at once");
	expect(BROKER_CHANNEL_OPENED, 3, "and opened again");
	ok(is_quiet(), "nothing else is told");
	end();
}


/*
 * The socket is full: nothing waits
 */

static bool
script_deaf(int fd, int step)
{
	if (step != AT_LOGGED_IN)
		return false;
	let_open(fd, 1, true);
	let_open(fd, 2, false);
	raise(SIGSTOP);
	do
		hear(fd);
	while (heard_type != 1 || heard_channel != 2);
	if (memcmp(heard, "\0\24\0\50", 4) != 0)
		give_up(2, 20, 40);
	say(fd, 2, close_ok);
	go_on(fd);
	return true;
}

static void
test_full(void)
{
	BrokerError error = {0};
	BrokerRequest request = {.kind = BROKER_BIND_QUEUE,.queue = "q",.exchange = "x"};
	size_t		len = 20000;
	char	   *body = calloc(len, 1);
	int			sent = 0;
	int			acks = 0;
	int64_t		start;

	options.max_channels = 1000;
	begin(script_deaf);
	(void) (open_channel(true) + open_channel(false));
	expect(BROKER_CHANNEL_OPENED, 1, "a channel for messages is open");
	expect(BROKER_CHANNEL_OPENED, 2, "a channel for requests is open");
	while (broker_writable(broker, len) && sent++ < 100000)
		publish_body(1, body, len);
	options.max_channels = 3;
	while (open_channel(true) != 0)
		;
	start = now_ms();
	ok(broker_request(broker, 2, &request, &error) == BROKER_BUSY, "without room a request is not made: %s", error.text);
	ok(broker_open_channel(broker, true, &error) == 0 && error.code == 0, "and no channel opened: %s", error.text);
	broker_close_channel(broker, 2);
	ok(now_ms() - start < 200, "and a channel is closed without waiting");
	ok(open_channel(true) == 0, "close waits for room in the socket");
	kill(server, SIGCONT);
	for (int64_t deadline = now_ms() + 5000; acks == 0 && now_ms() < deadline;)
	{
		BrokerEvent event;

		broker_next_event(broker, &event);
		if (event.type == BROKER_DISCONNECTED)
			break;
		if (open_channel(true) == 2)
			acks++;
		wait_socket(broker_fd(broker), false, 10);
	}
	ok(acks == 1 && broker_fd(broker) >= 0, "once there is room the close is written, and the number comes free");
	free(body);
	end();
}


/*
 * Limits and costs
 */

/* A broker that allows two channels. */
static bool
script_few(int fd, int step)
{
	unsigned char few[sizeof(tune)];

	if (step != AT_TUNE)
		return false;
	memcpy(few, tune, sizeof(tune));
	few[4] = 0;
	few[5] = 3;
	put_frame(fd, 1, 0, few, sizeof(few));
	hear(fd);
	if (memcmp(heard, "\0\12\0\37\0\3", 6) != 0)
		give_up(0, 10, 31);
	hear(fd);
	put_frame(fd, 1, 0, open_ok, sizeof(open_ok));
	go_on(fd);
	return true;
}

static void
test_few(void)
{
	options.max_channels = 1000;
	begin(script_few);
	ok(open_channel(true) == 1 && open_channel(true) == 2 && open_channel(true) == 0,
	   "the broker's limit holds, less the channel for calls");
	options.max_channels = 3;
	end();
}

/* Acks one message for each that comes, on whatever channel. */
static bool
script_many(int fd, int step)
{
	static int	tags[65536];

	if (step != AT_LOGGED_IN)
		return false;
	for (;;)
	{
		hear(fd);
		if (heard_type == 3)
			say_ack(fd, heard_channel, ++tags[heard_channel]);
		else if (heard_type == 1 && heard[1] == 20)
			say(fd, heard_channel, channel_open_ok);
		else if (heard_type == 1 && heard[1] == 85)
			say(fd, heard_channel, select_ok);
	}
}

static long
resident_kb(void)
{
	long		pages = 0;
	FILE	   *statm = fopen("/proc/self/statm", "r");

	if (statm == NULL || fscanf(statm, "%*d %ld", &pages) != 1)
		pages = 0;
	if (statm != NULL)
		fclose(statm);
	return pages * sysconf(_SC_PAGESIZE) / 1024;
}

/* Takes acks until none is left to be had; returns how many, -1 if the connection is lost. */
static int
take_acks(void)
{
	BrokerEvent event;
	int			acks = 0;

	for (;;)
	{
		broker_next_event(broker, &event);
		if (event.type == BROKER_ACK)
			acks++;
		else if (event.type == BROKER_NOTHING)
			return acks;
		else if (event.type == BROKER_DISCONNECTED)
			return -1;
	}
}

/*
 * CPU time of ROUNDS messages with their acks, over the channels in turn.  A hundred
 * at a time, and their acks together: how often the socket is read must not depend
 * on when the other process runs.
 */
static double
cost_of_messages(int channels)
{
	const struct timespec nap = {.tv_nsec = 1000000};
	struct timespec from;
	struct timespec to;
	int			acks = 0;
	int			sent = 0;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &from);
	while (acks < ROUNDS)
	{
		int			n;

		for (int i = 0; i < 100 && sent < ROUNDS; i++)
			publish(1 + sent++ % channels);
		nanosleep(&nap, NULL);
		n = take_acks();
		if (n < 0)
			return 1e6;
		acks += n;
	}
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &to);
	return (double) (to.tv_sec - from.tv_sec) * 1e6 / ROUNDS + (double) (to.tv_nsec - from.tv_nsec) / 1e3 / ROUNDS;
}

/* The least of several: others use the processor and its caches meanwhile. */
static double
least_cost(int channels)
{
	double		least = 1e6;

	for (int i = 0; i < 5; i++)
	{
		double		cost = cost_of_messages(channels);

		least = cost < least ? cost : least;
	}
	return least;
}

static int
open_many(int channels)
{
	int			opened = 0;
	BrokerEvent event = {0};

	for (int i = 0; i < channels; i++)
	{
		while (open_channel(true) == 0 && broker_fd(broker) >= 0)
			wait_socket(broker_fd(broker), true, 10);
		if (i % 100 == 99 || i == channels - 1)
			while (opened <= i && (event = next_event(broker)).type == BROKER_CHANNEL_OPENED)
				opened++;
	}
	return opened;
}

static void
test_many(void)
{
	double		few;
	double		many;
	long		before;

	options.max_channels = MANY_CHANNELS;
	begin(script_many);
	open_many(2);
	few = least_cost(2);
	end();
	before = resident_kb();
	begin(script_many);
	ok(open_many(MANY_CHANNELS) == MANY_CHANNELS, "%d channels are opened", MANY_CHANNELS);
	diag("%ld kB of memory for %d channels", resident_kb() - before, MANY_CHANNELS);
	ok((resident_kb() - before) / MANY_CHANNELS < 4, "an idle channel takes less than 4 kB");
	many = least_cost(MANY_CHANNELS);
	ok(many < 2 * few + 1, "a message costs %.1f us with %d channels, %.1f us with 2", many, MANY_CHANNELS, few);
	options.max_channels = 3;
	end();
}

int
main(void)
{
	signal(SIGPIPE, SIG_IGN);
	test_two();
	test_refused();
	test_closing();
	test_requests();
	test_calls();
	test_bad();
	test_closed_twice();
	test_full();
	test_few();
	test_many();
	return done();
}
