/*-------------------------------------------------------------------------
 *
 * broker_probe.c
 *		Checks broker.c against a real RabbitMQ.
 *
 *		broker_probe URI [check ...]
 *
 * Without names, all checks run but "bench".  The broker must be one's own:
 * queues named pgf_probe* are made and deleted, memory alarms raised, and the
 * node is stopped for seconds.  What needs more than a connection is skipped
 * unless these are set:
 *
 *		PGF_RABBITMQCTL		command that runs rabbitmqctl for the node
 *		PGF_RABBITMQ_PID	the node's process, to be frozen
 *		PGF_TLS_CA, PGF_TLS_CERT, PGF_TLS_KEY	files, for an amqps:// URI
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "broker/broker.h"
#include "client.h"
#include "tap.h"

#define EXCHANGE	"pgf_probe"
#define QUEUE		"pgf_probe_q"

typedef void (*Check) (void);

static BrokerAddress *address;
static int	channel;			/* the one that the checks publish on */

static BrokerOptions options = {
	.connection_name = "broker_probe",
	.connect_timeout_ms = 5000,
	.rpc_timeout_ms = 5000,
	.heartbeat_s = 60,
	.min_channels = 1,
	.max_channels = 2000,
	.tls_verify = true,
	.wait = wait_socket,
	.fd_changed = fd_changed,
};

/* Waits for the next event, at most so long. */
static BrokerEvent
next_event(Broker *broker, long timeout_ms)
{
	int64_t		deadline = now_ms() + timeout_ms;
	BrokerEvent event;

	for (;;)
	{
		broker_next_event(broker, &event);
		if (event.type != BROKER_NOTHING || now_ms() >= deadline)
			return event;
		wait_socket(broker_fd(broker), false, 50);
	}
}

/* Opens a channel for publishing; gives up the one before, whatever its state. */
static bool
reopen(Broker *broker)
{
	BrokerError error;

	broker_close_channel(broker, channel);
	channel = broker_open_channel(broker, true, &error);
	return channel != 0 && next_event(broker, 5000).type == BROKER_CHANNEL_OPENED;
}

static Broker *
must_connect(void)
{
	BrokerError error;
	Broker	   *broker = broker_connect(address, NULL, &options, &error);

	channel = 0;
	if (broker == NULL || !reopen(broker))
	{
		printf("Bail out! %s\n", broker == NULL ? error.text : "no channel");
		exit(1);
	}
	return broker;
}

static BrokerResult
publish(Broker *broker, const char *exchange, const char *id, const char *body,
		size_t len, BrokerError *error)
{
	BrokerField headers[] = {
		{.name = "op",.type = BROKER_VALUE_STRING,.value.string = {"insert", 6}},
		{.name = "sequence",.type = BROKER_VALUE_INT,.value.integer = 42},
		{.name = "ratio",.type = BROKER_VALUE_DOUBLE,.value.real = 0.5},
		{.name = "flag",.type = BROKER_VALUE_BOOL,.value.boolean = true},
		{.name = "none",.type = BROKER_VALUE_NULL},
	};
	BrokerMessage message = {
		.exchange = exchange,
		.routing_key = "key",
		.message_id = id,
		.content_type = "application/json",
		.type = "row",
		.timestamp = 1700000000,
		.headers = headers,
		.nheaders = 5,
		.body = body,
		.body_len = len,
	};

	return broker_publish(broker, channel, &message, 3000, error);
}

static void
set_up(Broker *broker, const BrokerField *arguments, int narguments)
{
	BrokerError error;

	broker_delete_queue(broker, QUEUE, false, false, &error);
	if (broker_declare_exchange(broker, EXCHANGE, &error) != BROKER_OK ||
		broker_declare_queue(broker, QUEUE, arguments, narguments, &error) != BROKER_OK ||
		broker_bind_queue(broker, QUEUE, EXCHANGE, &error) != BROKER_OK)
		diag("set-up failed: %s", error.text);
}

static void
tear_down(Broker *broker)
{
	BrokerError error;

	broker_delete_queue(broker, QUEUE, false, false, &error);
	broker_delete_exchange(broker, EXCHANGE, false, &error);
	broker_close(broker, true);
	ok(announced == -1, "the socket is withdrawn when it is closed");
}

/* On a new channel, publishes until n are confirmed, window at a time. */
static int
publish_many(Broker *broker, int n, int window, const char *body, size_t len)
{
	uint64_t	sent = 0;
	uint64_t	settled = 0;
	uint64_t	highest = 0;
	BrokerError error;
	BrokerEvent event;
	char	   *seen = calloc((size_t) n + 1, 1);

	while (settled < (uint64_t) n)
	{
		broker_cork(broker);
		while (sent < (uint64_t) n && sent - settled < (uint64_t) window)
		{
			if (publish(broker, EXCHANGE, "id", body, len, &error) != BROKER_OK)
			{
				diag("publish failed: %s", error.text);
				free(seen);
				return (int) settled;
			}
			sent++;
		}
		broker_uncork(broker);

		event = next_event(broker, 10000);
		if (event.type != BROKER_ACK || event.tag > sent)
		{
			diag("event %d, tag %llu: %s", event.type, (unsigned long long) event.tag, event.text);
			break;
		}
		for (uint64_t tag = event.multiple ? highest + 1 : event.tag; tag <= event.tag; tag++)
		{
			settled += !seen[tag];
			seen[tag] = 1;
		}
		while (highest < sent && seen[highest + 1])
			highest++;
	}
	free(seen);
	return (int) settled;
}

static void
check_confirms(void)
{
	Broker	   *broker = must_connect();
	BrokerError error;
	uint32_t	messages = 0;
	uint32_t	consumers = 1;

	set_up(broker, NULL, 0);
	ok(publish_many(broker, 5000, 1000, "{}", 2) == 5000, "every message is confirmed once");
	ok(broker_inspect_queue(broker, QUEUE, &messages, &consumers, &error) == BROKER_OK &&
	   messages == 5000 && consumers == 0, "the queue holds them all");
	ok(reopen(broker) && publish_many(broker, 3, 3, "", 0) == 3,
	   "empty bodies are sent");
	tear_down(broker);
}

static void
check_return(void)
{
	Broker	   *broker = must_connect();
	BrokerError error;
	BrokerEvent event;

	broker_declare_exchange(broker, EXCHANGE, &error);
	publish(broker, EXCHANGE, "b5b9b1f4-0000-4000-8000-00000000002a", "{}", 2, &error);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_RETURN && event.code == 312, "an unroutable message is returned");
	ok(strcmp(event.message_id, "b5b9b1f4-0000-4000-8000-00000000002a") == 0 &&
	   strcmp(event.text, "NO_ROUTE") == 0, "the return brings the message id and the text");
	event = next_event(broker, 5000);
	ok(event.type == BROKER_ACK && event.tag == 1, "its ack comes after the return");
	tear_down(broker);
}

static void
check_nack(void)
{
	Broker	   *broker = must_connect();
	BrokerField arguments[] = {
		{.name = "x-max-length",.type = BROKER_VALUE_INT,.value.integer = 1},
		{.name = "x-overflow",.type = BROKER_VALUE_STRING,.value.string = {"reject-publish", 14}},
	};
	BrokerError error;
	int			acks = 0;
	int			nacks = 0;

	set_up(broker, arguments, 2);
	for (int i = 0; i < 10; i++)
	{
		BrokerEvent event;

		publish(broker, EXCHANGE, "id", "{}", 2, &error);
		event = next_event(broker, 5000);
		acks += event.type == BROKER_ACK;
		nacks += event.type == BROKER_NACK;
	}
	ok(acks >= 1 && nacks >= 1 && acks + nacks == 10,
	   "a full queue with reject-publish nacks (%d acks, %d nacks)", acks, nacks);
	tear_down(broker);
}

static void
check_missing_exchange(void)
{
	Broker	   *broker = must_connect();
	BrokerError error;
	BrokerEvent event;

	set_up(broker, NULL, 0);
	publish(broker, "pgf_probe_none", "id", "{}", 2, &error);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_CHANNEL_CLOSED && event.code == 404,
	   "a missing exchange closes the channel: %s", event.text);
	ok(publish(broker, EXCHANGE, "id", "{}", 2, &error) == BROKER_REFUSED,
	   "publishing on the closed channel is refused");
	ok(reopen(broker), "the channel is opened again");
	publish(broker, EXCHANGE, "id", "{}", 2, &error);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_ACK && event.tag == 1, "delivery tags begin at 1 again");

	publish(broker, "pgf_probe_none", "id", "{}", 2, &error);
	usleep(200000);
	ok(reopen(broker),
	   "reopening crosses a close that was not read yet");
	publish(broker, EXCHANGE, "id", "{}", 2, &error);
	ok(reopen(broker), "an open channel can be reopened");
	publish(broker, EXCHANGE, "id", "{}", 2, &error);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_ACK && event.tag == 1, "the old channel's confirms are dropped");
	tear_down(broker);
}

/* What happens to one channel concerns no other. */
static void
check_channels(void)
{
	Broker	   *broker = must_connect();
	BrokerField argument = {.name = "x-max-length",.type = BROKER_VALUE_INT,.value.integer = 7};
	BrokerRequest request = {.kind = BROKER_DECLARE_QUEUE,.queue = QUEUE};
	BrokerError error;
	BrokerEvent event;
	int			first = channel;
	int			second;
	int			asking;
	int			acks = 0;

	set_up(broker, NULL, 0);
	channel = 0;
	ok(reopen(broker), "a second channel is opened");
	second = channel;
	asking = broker_open_channel(broker, false, &error);
	ok(next_event(broker, 5000).channel == asking, "a third one, for requests");
	for (int i = 0; i < 100; i++)
	{
		channel = i % 2 == 0 ? first : second;
		publish(broker, channel == second && i > 50 ? "pgf_probe_none" : EXCHANGE, "id", "{}", 2, &error);
	}
	request.arguments = &argument;
	request.narguments = 1;
	ok(broker_request(broker, asking, &request, &error) == BROKER_OK, "a request nobody waits for");
	for (int closed = 0; closed < 2 || acks < 50;)
	{
		event = next_event(broker, 5000);
		if (event.type == BROKER_CHANNEL_CLOSED && event.channel == asking)
			closed += event.code == 406 && broker_blames_request(event.class_id, event.method_id, BROKER_DECLARE_QUEUE);
		else if (event.type == BROKER_CHANNEL_CLOSED && event.channel == second)
			closed += event.code == 404 && broker_blames_publish(event.class_id, event.method_id);
		else if (event.type == BROKER_ACK && event.channel == first)
			acks = (int) event.tag > acks ? (int) event.tag : acks;
		else if (event.type != BROKER_ACK)
			break;
	}
	ok(event.type != BROKER_DISCONNECTED && acks == 50, "the channel that is not refused has all its confirms (%d)", acks);
	request.narguments = 0;
	asking = broker_open_channel(broker, false, &error);
	ok(next_event(broker, 5000).type == BROKER_CHANNEL_OPENED &&
	   broker_request(broker, asking, &request, &error) == BROKER_OK, "another channel asks");
	event = next_event(broker, 5000);
	ok(event.type == BROKER_REPLY && event.channel == asking && event.messages > 0,
	   "and is answered with the queue's counts (%u)", event.messages);
	channel = first;
	for (int i = 0; i < 50; i++)
	{
		ok(reopen(broker), "a channel is opened while the one before is being closed (%d)", channel);
		publish(broker, i % 2 ? EXCHANGE : "pgf_probe_none", "id", "{}", 2, &error);
	}
	tear_down(broker);
}

static void
check_many_channels(void)
{
	Broker	   *broker = must_connect();
	BrokerError error;
	int			opened = 1;
	int64_t		start = now_ms();

	set_up(broker, NULL, 0);
	while (opened < options.max_channels && (channel = broker_open_channel(broker, true, &error)) != 0 &&
		   next_event(broker, 5000).type == BROKER_CHANNEL_OPENED)
		opened++;
	ok(opened == options.max_channels, "%d channels are opened (%ld ms): %s", opened, (long) (now_ms() - start), error.text);
	ok(broker_open_channel(broker, true, &error) == 0, "and no more: %s", error.text);
	ok(publish_many(broker, 1000, 100, "{}", 2) == 1000, "the last one publishes");
	tear_down(broker);
}

static void
check_topology(void)
{
	Broker	   *broker = must_connect();
	BrokerField other[] = {
		{.name = "x-max-length",.type = BROKER_VALUE_INT,.value.integer = 7},
	};
	BrokerError error;
	BrokerEvent event;
	uint32_t	messages;
	uint32_t	consumers;

	set_up(broker, NULL, 0);
	publish(broker, EXCHANGE, "id", "{}", 2, &error);
	ok(broker_declare_queue(broker, QUEUE, other, 1, &error) == BROKER_REFUSED && error.code == 406,
	   "a queue declared otherwise is refused: %s", error.text);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_ACK && event.tag == 1, "the message in flight is confirmed nevertheless");
	ok(broker_declare_queue(broker, QUEUE, NULL, 0, &error) == BROKER_OK,
	   "the topology channel works again after a refusal");
	ok(broker_inspect_queue(broker, "pgf_probe_none", &messages, &consumers, &error) == BROKER_REFUSED &&
	   error.code == 404, "a missing queue is 404");
	ok(broker_delete_queue(broker, QUEUE, true, true, &error) == BROKER_REFUSED && error.code == 406,
	   "a queue that is not empty is not deleted: %s", error.text);
	ok(broker_unbind_queue(broker, QUEUE, EXCHANGE, &error) == BROKER_OK, "unbind");
	publish(broker, EXCHANGE, "id2", "{}", 2, &error);
	ok(next_event(broker, 5000).type == BROKER_RETURN, "unbound, the message is returned");
	ok(broker_delete_exchange(broker, EXCHANGE, true, &error) == BROKER_OK, "delete exchange");
	tear_down(broker);
}

static void
check_too_large(void)
{
	Broker	   *broker = must_connect();
	size_t		len = 70000;
	char	   *big = malloc(len + 1);
	BrokerField header = {.name = "h",.type = BROKER_VALUE_STRING,.value.string = {big, len}};
	BrokerMessage message = {
		.exchange = EXCHANGE,.routing_key = "",.message_id = "id",.content_type = "text/plain",
		.headers = &header,.nheaders = 1,.body = "x",.body_len = 1,
	};
	BrokerError error;
	BrokerResult last = BROKER_OK;
	uint64_t	sent = 0;

	memset(big, 'x', len);
	big[len] = '\0';
	set_up(broker, NULL, 0);
	ok(broker_publish(broker, channel, &message, 1000, &error) == BROKER_TOO_LARGE,
	   "headers over a frame are refused: %s", error.text);
	for (header.value.string.len = 65300; header.value.string.len < 65600; header.value.string.len++)
	{
		BrokerResult result = broker_publish(broker, channel, &message, 1000, &error);

		if (result == BROKER_OK)
			sent++;
		if (last == BROKER_TOO_LARGE && result != last)
			break;
		last = result;
	}
	ok(last == BROKER_TOO_LARGE && sent > 0 && !strstr(error.text, "write"),
	   "every size up to the frame's limit is taken, none beyond (%s)", error.text);
	message.nheaders = 0;
	message.routing_key = big;
	ok(broker_publish(broker, channel, &message, 1000, &error) == BROKER_TOO_LARGE,
	   "a long routing key is refused: %s", error.text);
	message.routing_key = "";
	message.message_id = "0123456789012345678901234567890123456789012345678901234567890123";
	ok(broker_publish(broker, channel, &message, 1000, &error) == BROKER_TOO_LARGE,
	   "a long message id is refused: %s", error.text);
	message.message_id = "id";
	ok(broker_publish(broker, channel, &message, 1000, &error) == BROKER_OK, "the connection still works");
	sent++;
	for (uint64_t highest = 0; highest < sent;)
	{
		BrokerEvent event = next_event(broker, 5000);

		if (event.type != BROKER_ACK)
		{
			diag("event %d %s", event.type, event.text);
			break;
		}
		if (event.tag > highest)
			highest = event.tag;
		if (highest == sent)
			ok(true, "all that was taken is confirmed, nothing else");
	}
	free(big);
	tear_down(broker);
}

static void
check_big_body(void)
{
	Broker	   *broker = must_connect();
	size_t		len = 10 * 1024 * 1024 + 7;
	char	   *body = malloc(len);
	BrokerError error;
	BrokerEvent event;
	int64_t		start = now_ms();

	memset(body, 'x', len);
	set_up(broker, NULL, 0);
	ok(publish(broker, EXCHANGE, "id", body, len, &error) == BROKER_OK, "a body of 10 MB is sent");
	event = next_event(broker, 20000);
	ok(event.type == BROKER_ACK, "and confirmed (%ld ms)", (long) (now_ms() - start));
	broker_unbind_queue(broker, QUEUE, EXCHANGE, &error);
	publish(broker, EXCHANGE, "big", body, len, &error);
	event = next_event(broker, 20000);
	ok(event.type == BROKER_RETURN && strcmp(event.message_id, "big") == 0,
	   "a returned body of 10 MB is skipped");
	ok(next_event(broker, 5000).type == BROKER_ACK, "its ack follows");
	free(body);
	tear_down(broker);
}

static void
check_over_limit(void)
{
	Broker	   *broker = must_connect();
	size_t		len = 140 * 1024 * 1024;
	char	   *body = calloc(len, 1);
	BrokerError error = {0};
	BrokerEvent event;
	BrokerResult result;

	set_up(broker, NULL, 0);
	result = publish(broker, EXCHANGE, "id", body, len, &error);
	ok(result == BROKER_OK || result == BROKER_REFUSED,
	   "a body over the broker's limit does not cost the connection (%d %s)", result, error.text);
	event = next_event(broker, 20000);
	ok(event.type == BROKER_CHANNEL_CLOSED && event.code == 406, "but the channel: %s", event.text);
	ok(reopen(broker), "which can be opened again");
	free(body);
	tear_down(broker);
}

static void
expect_failure(BrokerAddress a, const char *password, const char *text, const char *name)
{
	BrokerError error;
	Broker	   *broker;
	int64_t		start = now_ms();

	broker = broker_connect(&a, password, &options, &error);
	ok(broker == NULL && strstr(error.text, text) != NULL && strstr(error.text, "s3cret") == NULL,
	   "%s: %s (%ld ms)", name, error.text, (long) (now_ms() - start));
	ok(announced == -1, "no socket is left");
	if (broker != NULL)
		broker_close(broker, true);
}

static void
check_login(void)
{
	BrokerAddress a = *address;

	expect_failure(a, "s3cret", "authentication failed for user", "wrong password");
	a.user = "nobody";
	expect_failure(a, "s3cret", "authentication failed for user \"nobody\"", "unknown user");
	a = *address;
	a.vhost = "none";
	expect_failure(a, NULL, "vhost \"none\"", "unknown vhost");
	a = *address;
	a.port = 1;
	expect_failure(a, NULL, "Connection refused", "nobody listens");
	a.host = "no-such-host.invalid";
	expect_failure(a, NULL, "could not resolve host name", "unknown host");
	a.host = "192.0.2.1";
	a.port = 5672;
	options.connect_timeout_ms = 500;
	expect_failure(a, NULL, "could not connect to 192.0.2.1:5672", "unreachable host");
	options.connect_timeout_ms = 5000;
}

static int
rabbitmqctl(const char *arguments)
{
	char		command[1024];

	snprintf(command, sizeof(command), "%s %s >/dev/null 2>&1", getenv("PGF_RABBITMQCTL"), arguments);
	return system(command);
}

static void
check_blocked(void)
{
	Broker	   *broker;
	BrokerError error;
	BrokerEvent event;
	size_t		len = 16 * 1024 * 1024;
	char	   *body;
	BrokerResult result;
	int64_t		start;
	long		elapsed;

	if (getenv("PGF_RABBITMQCTL") == NULL)
	{
		ok(true, "# SKIP PGF_RABBITMQCTL is not set");
		return;
	}
	broker = must_connect();
	set_up(broker, NULL, 0);
	rabbitmqctl("set_vm_memory_high_watermark 0.000001");
	sleep(2);
	publish(broker, EXCHANGE, "id", "{}", 2, &error);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_BLOCKED && broker_blocked(broker),
	   "a memory alarm is announced: %s", event.text);
	body = calloc(len, 1);
	start = now_ms();
	longest_wait = 0;
	last_wait = 0;
	result = publish(broker, EXCHANGE, "id", body, len, &error);
	elapsed = (long) (now_ms() - start);

	/* Of TLS, RabbitMQ 3.10 goes on taking data in. */
	ok((result == BROKER_LOST && elapsed >= 3000 && elapsed < 6000 && longest_wait < 500) ||
	   (result == BROKER_OK && address->tls),
	   "a blocked broker is given up after the timeout: %s (%ld ms, %ld ms without interrupts)",
	   error.text, elapsed, longest_wait);
	broker_close(broker, false);

	rabbitmqctl("set_vm_memory_high_watermark 0.4");
	sleep(2);
	broker = must_connect();
	set_up(broker, NULL, 0);
	rabbitmqctl("set_vm_memory_high_watermark 0.000001");
	sleep(2);
	publish(broker, EXCHANGE, "id", "{}", 2, &error);
	event = next_event(broker, 5000);
	ok(event.type == BROKER_BLOCKED, "blocked again");

	/* Written but unread for longer than the user timeout of 10 s. */
	for (int i = 0; i < 4000 && broker_writable(broker, 2048); i++)
		publish(broker, EXCHANGE, "id", body, 2048, &error);
	sleep(12);
	rabbitmqctl("set_vm_memory_high_watermark 0.4");
	event = next_event(broker, 10000);
	ok(event.type == BROKER_UNBLOCKED && !broker_blocked(broker),
	   "the connection outlives a long alarm with unread data (%d %s)", event.type, event.text);
	ok(next_event(broker, 10000).type == BROKER_ACK, "and what was written is confirmed");
	free(body);
	tear_down(broker);
}

static void
freeze(int signal)
{
	const char *pid = getenv("PGF_RABBITMQ_PID");

	if (pid != NULL)
		kill(atoi(pid), signal);
	usleep(50000);				/* each of its threads has to notice */
}

static void
check_frozen(void)
{
	Broker	   *broker;
	BrokerError error;
	size_t		len = 32 * 1024 * 1024;
	char	   *body = calloc(len, 1);
	BrokerResult result;
	int64_t		start;
	long		elapsed;

	if (getenv("PGF_RABBITMQ_PID") == NULL)
	{
		ok(true, "# SKIP PGF_RABBITMQ_PID is not set");
		free(body);
		return;
	}
	broker = must_connect();
	set_up(broker, NULL, 0);
	freeze(SIGSTOP);
	start = now_ms();
	longest_wait = 0;
	last_wait = 0;
	result = publish(broker, EXCHANGE, "id", body, len, &error);
	elapsed = (long) (now_ms() - start);
	ok(result == BROKER_LOST && elapsed >= 3000 && elapsed < 6000,
	   "a frozen broker is given up after the timeout: %s (%ld ms)", error.text, elapsed);
	ok(longest_wait < 500, "interrupts were served at least every %ld ms", longest_wait);
	ok(broker_fd(broker) == -1 && publish(broker, EXCHANGE, "id", body, 1, &error) == BROKER_LOST,
	   "a lost connection stays lost");
	broker_close(broker, false);
	freeze(SIGCONT);

	/* Small frames cost the kernel more than their bytes. */
	broker = must_connect();
	set_up(broker, NULL, 0);
	freeze(SIGSTOP);
	longest_wait = 0;
	elapsed = 0;
	do
	{
		start = now_ms();
		last_wait = start;
		result = publish(broker, EXCHANGE, "id", "x", 1, &error);
		elapsed++;
	} while (result == BROKER_OK);
	ok(result == BROKER_LOST && strstr(error.text, "taken no data") != NULL && longest_wait < 500,
	   "so it is with small messages, after %ld: %s, at least every %ld ms", elapsed, error.text, longest_wait);
	broker_close(broker, false);
	freeze(SIGCONT);

	options.heartbeat_s = 2;
	options.rpc_timeout_ms = 1500;
	broker = must_connect();
	set_up(broker, NULL, 0);
	freeze(SIGSTOP);
	start = now_ms();
	result = broker_declare_exchange(broker, EXCHANGE, &error);
	ok(result == BROKER_LOST && now_ms() - start < 2000,
	   "a declaration gives up after its timeout: %s", error.text);
	broker_close(broker, false);
	freeze(SIGCONT);
	options.rpc_timeout_ms = 5000;

	broker = must_connect();
	freeze(SIGSTOP);
	start = now_ms();
	{
		BrokerEvent event = next_event(broker, 10000);

		ok(event.type == BROKER_DISCONNECTED && strstr(event.text, "heartbeat") != NULL,
		   "missing heartbeats end the connection: %s (%ld ms)", event.text, (long) (now_ms() - start));
		ok(announced == -1, "the socket is withdrawn");
	}
	broker_close(broker, false);

	start = now_ms();
	options.connect_timeout_ms = 1500;
	{
		Broker	   *none = broker_connect(address, NULL, &options, &error);

		ok(none == NULL && now_ms() - start < 2500, "connecting to a frozen broker times out: %s", error.text);
	}
	options.connect_timeout_ms = 5000;
	freeze(SIGCONT);

	broker = must_connect();
	ok(broker_next_heartbeat(broker) <= 1000, "half the heartbeat is the longest sleep");
	for (start = now_ms(); now_ms() - start < 7000;)
	{
		BrokerEvent event;

		broker_next_event(broker, &event);
		if (event.type != BROKER_NOTHING)
			break;
		wait_socket(broker_fd(broker), false, broker_next_heartbeat(broker));
	}
	set_up(broker, NULL, 0);
	ok(publish_many(broker, 1, 1, "x", 1) == 1, "an idle connection lives by its heartbeats");
	options.heartbeat_s = 60;
	free(body);
	tear_down(broker);
}

static void
check_restart(void)
{
	Broker	   *broker;
	BrokerError error;
	BrokerEvent event;

	if (getenv("PGF_RABBITMQCTL") == NULL)
	{
		ok(true, "# SKIP PGF_RABBITMQCTL is not set");
		return;
	}
	broker = must_connect();
	set_up(broker, NULL, 0);
	publish(broker, EXCHANGE, "id", "x", 1, &error);
	rabbitmqctl("close_all_connections probing");
	event = next_event(broker, 5000);
	if (event.type == BROKER_ACK)
		event = next_event(broker, 5000);
	ok(event.type == BROKER_DISCONNECTED && event.code == 320,
	   "a connection closed by the operator is told with its reason: %s", event.text);
	broker_next_event(broker, &event);
	ok(event.type == BROKER_DISCONNECTED, "again and again");
	broker_close(broker, true);
	broker = must_connect();
	tear_down(broker);
}

static void
check_shutdown(void)
{
	Broker	   *broker = must_connect();
	BrokerEvent event;

	set_up(broker, NULL, 0);
	shutdown(announced, SHUT_RDWR);
	event = next_event(broker, 1000);
	ok(event.type == BROKER_DISCONNECTED, "shutdown() by a signal handler ends it: %s", event.text);
	broker_close(broker, true);
	ok(announced == -1, "the socket is withdrawn");
}

static void
check_tls(void)
{
	BrokerOptions saved = options;
	BrokerAddress a = *address;
	Broker	   *broker;
	BrokerError error;

	if (!address->tls)
	{
		ok(true, "# SKIP not an amqps:// URI");
		return;
	}
	options.tls_ca_file = NULL;
	expect_failure(a, NULL, "could not be verified", "unknown authority");
	options.tls_ca_file = "/nonexistent";
	expect_failure(a, NULL, "could not load CA certificate file \"/nonexistent\"", "missing CA file");
	options.tls_ca_file = NULL;
	options.tls_verify = false;
	broker = broker_connect(&a, NULL, &options, &error);
	ok(broker != NULL, "without verification any certificate will do");
	if (broker != NULL)
		broker_close(broker, true);
	options = saved;
	a.host = "127.0.0.1";
	expect_failure(a, NULL, "does not match the host name", "another name in the certificate");
	options.tls_cert_file = NULL;
	a = *address;
	expect_failure(a, NULL, "TLS connection to", "a client certificate is wanted");
	options = saved;
	a = *address;
	a.port--;
	expect_failure(a, NULL, "TLS handshake failed", "TLS to a plain port");
}

static void
bench(void)
{
	static const char body[] = "{\"before\":null,\"after\":{\"id\":1,\"name\":\"someone\"},\"op\":\"c\",\"ts_ms\":1700000000000}";
	Broker	   *broker = must_connect();
	int			n = 200000;
	int64_t		start;

	set_up(broker, NULL, 0);
	start = now_ms();
	n = publish_many(broker, n, 1000, body, sizeof(body) - 1);
	diag("%d messages confirmed in %ld ms", n, (long) (now_ms() - start));
	tear_down(broker);
}

static const struct
{
	const char *name;
	Check		check;
}			checks[] =

{
	{"confirms", check_confirms},
	{"return", check_return},
	{"nack", check_nack},
	{"missing_exchange", check_missing_exchange},
	{"channels", check_channels},
	{"many_channels", check_many_channels},
	{"topology", check_topology},
	{"too_large", check_too_large},
	{"big_body", check_big_body},
	{"over_limit", check_over_limit},
	{"login", check_login},
	{"shutdown", check_shutdown},
	{"restart", check_restart},
	{"tls", check_tls},
	{"blocked", check_blocked},
	{"frozen", check_frozen},
	{"bench", bench},
};

int
main(int argc, char **argv)
{
	const char *error;
	int			count;

	signal(SIGPIPE, SIG_IGN);
	options.tls_ca_file = getenv("PGF_TLS_CA");
	options.tls_cert_file = getenv("PGF_TLS_CERT");
	options.tls_key_file = getenv("PGF_TLS_KEY");
	address = broker_parse_uri(argc > 1 ? argv[1] : "amqp://", &count, &error);
	if (address == NULL)
	{
		printf("Bail out! %s\n", error);
		return 1;
	}
	for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
	{
		bool		wanted = argc <= 2 && checks[i].check != bench;

		for (int j = 2; j < argc; j++)
			wanted = wanted || strcmp(argv[j], checks[i].name) == 0;
		if (!wanted)
			continue;
		diag("%s", checks[i].name);
		checks[i].check();
	}
	broker_free_addresses(address, count);
	return done();
}
