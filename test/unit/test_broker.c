/*-------------------------------------------------------------------------
 *
 * test_broker.c
 *		Unit tests of broker.c against brokers that misbehave.
 *
 * Each of them is a child process that plays RabbitMQ's part of the login
 * from raw bytes, up to the step where it does something else.  Promised is
 * that broker.c neither crashes nor hangs, and gives the right reason.
 * broker_probe.c has what takes a real broker.
 *
 *-------------------------------------------------------------------------
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fake_broker.h"
#include "tap.h"

/* What a broker that never stops may cost us: a queue full of events. */
#define MEMORY_KB		(250 * 1024)

#define MANY_ACKS		100000

/* What the scripts do, set before the fork. */
static int	bad_step;
static const void *bad_bytes;
static size_t bad_len;
static unsigned seed;

static void
shut_down(int signal)
{
	/* made for a signal handler, see broker.h */
	/* NOLINTNEXTLINE(bugprone-signal-handler) */
	int			fd = announced >= 0 ? announced : broker_handshake_fd();

	(void) signal;
	if (fd >= 0)
		shutdown(fd, SHUT_RDWR);
}

static bool
script_bytes(int fd, int step)
{
	if (step != bad_step)
		return false;
	put(fd, bad_bytes, bad_len);
	return true;
}

static bool
script_close(int fd, int step)
{
	if (step == bad_step)
		close(fd);
	return false;
}

/* Never stops sending the same. */
static bool
script_flood(int fd, int step)
{
	static char many[65536];
	size_t		len = 0;

	if (step != AT_CONNECTED)
		return false;
	while (len + bad_len <= sizeof(many))
	{
		memcpy(many + len, bad_bytes, bad_len);
		len += bad_len;
	}
	for (;;)
		put(fd, many, len);
}

/* Reads one message, and no more before it has got rid of megabytes of acks. */
static bool
script_acks_first(int fd, int step)
{
	if (step != AT_CONNECTED)
		return false;
	skip_message(fd);
	for (int i = 0; i < MANY_ACKS; i++)
		put_frame(fd, 1, 1, ack, sizeof(ack));
	return true;
}

/* What a broker says, with a few bytes changed, cut or repeated. */
static bool
script_fuzz(int fd, int step)
{
	unsigned char all[1024];
	size_t		len = 0;

	if (step != AT_CONNECTED)
		return false;
	skip_message(fd);
	srand(seed);
	len += make_frame(all + len, 1, 1, ack, sizeof(ack));
	len += make_frame(all + len, 1, 1, returned, sizeof(returned));
	len += make_frame(all + len, 2, 1, header_id, sizeof(header_id));
	len += make_frame(all + len, 3, 1, "abc", 3);
	len += make_frame(all + len, 1, 0, "\0\012\0\074\003low", 8);
	len += make_frame(all + len, 1, 1, "\0\024\0\050\001\224\001x\0\0\0\0", 12);
	len += make_frame(all + len, 1, 0, "\0\012\0\062\001\100\001x\0\0\0\0", 12);
	for (int i = rand() % 4; i >= 0; i--)
		all[(size_t) rand() % len] = (unsigned char) (rand() % 3 ? rand() : 0);
	put(fd, all, rand() % 4 ? len : (size_t) rand() % len);
	return true;
}


/*
 * The client's side
 */

/* A login that must fail, in time, with a reason that contains text. */
static void
bad_login(const char *what, const char *text)
{
	BrokerError error;
	int64_t		begin = now_ms();
	pid_t		pid;
	Broker	   *broker = log_in_to(script_bytes, &pid, &error);

	ok(broker == NULL && strstr(error.text, text) != NULL && announced == -1 &&
	   now_ms() - begin < CONNECT_TIMEOUT + 4000 && strstr(error.text, "s3cret") == NULL,
	   "login: %s: %s", what, error.text);
	if (broker != NULL)
		broker_close(broker, false);
	stop_server(pid);
}

static void
bad_login_bytes(int step, const void *bytes, size_t len, const char *what, const char *text)
{
	bad_step = step;
	bad_bytes = bytes;
	bad_len = len;
	bad_login(what, text);
}

static void
bad_login_method(int step, const void *payload, size_t len, const char *what, const char *text)
{
	unsigned char frame[1000];

	bad_login_bytes(step, frame, make_frame(frame, 1, 0, payload, len), what, text);
}

static void
test_login(void)
{
	unsigned char bytes[sizeof(tune)];
	unsigned char other[sizeof(start)];

	options.consumer = true;	/* a channel is part of its login */
	for (int step = AT_START; step <= AT_CHANNEL_OPEN_OK; step++)
	{
		BrokerError error;
		pid_t		pid;
		Broker	   *broker;

		if (step == AT_LOGGED_IN)
			continue;
		bad_login_bytes(step, "", 0, "silence", "no reply");
		bad_step = step;
		broker = log_in_to(script_close, &pid, &error);
		ok(broker == NULL && announced == -1, "login: closed: %s", error.text);
		stop_server(pid);
		bad_login_bytes(step, "HTTP/1.1 400 Bad Request\r\n\r\nHTTP/1.1 400 Bad Request\r\n\r\n", 56,
						"another protocol", "not an AMQP 0-9-1 frame");
	}
	bad_login_bytes(AT_CHANNEL_OPEN_OK, "\1\0\1\0\0\0\14\0\24\0\50\001\224\001x\0\0\0\0\316", 20,
					"channel refused", "x");
	options.consumer = false;
	bad_login_bytes(AT_START, "AMQP\0\1\0\0", 8, "AMQP 1.0", "does not speak AMQP 0-9-1");
	bad_login_bytes(AT_START, "\x15\x03\x03\x00\x02\x02\x28\x00\x00\x00\x00", 11, "a TLS alert", "not an AMQP 0-9-1 frame");

	memcpy(other, start, sizeof(start));
	other[5] = 8;
	bad_login_method(AT_START, other, sizeof(other), "AMQP 0-8", "speaks AMQP 0.8");
	memcpy(other, start, sizeof(start));
	other[24] = 'X';
	bad_login_method(AT_START, other, sizeof(other), "no PLAIN", "mechanism PLAIN");
	bad_login_method(AT_START, tune, sizeof(tune), "tune first", "unexpected");
	bad_login_method(AT_TUNE, "\0\012\0\024\0\0\0\1x", 9, "a challenge", "unexpected");
	bad_login_method(AT_TUNE, "\0\012\0\062\001\223\001x\0\0\0\0", 12, "403",
					 "authentication failed for user \"guest\"");
	memcpy(bytes, tune, sizeof(tune));
	bytes[4] = 0;
	bytes[5] = 1;
	bad_login_method(AT_TUNE, bytes, sizeof(bytes), "one channel", "only 1 channel");
	memcpy(bytes, tune, sizeof(tune));
	bytes[7] = 0;
	bytes[8] = 0;
	bytes[9] = 1;
	bad_login_method(AT_TUNE, bytes, sizeof(bytes), "frames of 1 byte", "invalid frame size");
	bytes[9] = 0;
	bytes[6] = 0x80;
	bad_login_method(AT_OPEN_OK, "\0\012\0\062\002\022\001x\0\0\0\0", 12, "530", "vhost \"/\"");
}

/* After the login the server sends bytes; what becomes of it? */
static void
bad_bytes_later(const void *bytes, size_t len, const char *what, const char *text)
{
	BrokerError error;
	BrokerEvent event = {0};
	pid_t		pid;
	int64_t		deadline = now_ms() + 2000;
	Broker	   *broker;

	bad_step = AT_CONNECTED;
	bad_bytes = bytes;
	bad_len = len;
	broker = connect_to(script_bytes, &pid, &error);
	if (!ok(broker != NULL, "connected %s", error.text))
		return;
	do
	{
		broker_next_event(broker, &event);
		if (event.type == BROKER_NOTHING)
			wait_socket(broker_fd(broker), false, 10);
	} while (event.type != BROKER_DISCONNECTED && now_ms() < deadline);
	ok(event.type == BROKER_DISCONNECTED && strstr(event.text, text) != NULL && announced == -1,
	   "%s: %s", what, event.type == BROKER_DISCONNECTED ? event.text : "(not noticed)");
	broker_close(broker, true);
	stop_server(pid);
}

static void
bad_frame(int type, int channel, const void *payload, size_t len, const char *what,
		  const char *text)
{
	unsigned char frame[1000];

	bad_bytes_later(frame, make_frame(frame, type, channel, payload, len), what, text);
}

/* A return, then this frame. */
static void
bad_return(int type, const void *payload, size_t len, const char *what, const char *text)
{
	unsigned char frames[1000];
	size_t		n = make_frame(frames, 1, 1, returned, sizeof(returned));

	n += make_frame(frames + n, type, 1, payload, len);
	bad_bytes_later(frames, n, what, text);
}

static void
test_frames(void)
{
	static const char nothing[64];
	unsigned char huge[17];
	unsigned char frames[1000];
	size_t		n;

	bad_frame(1, 9, ack, sizeof(ack), "unknown channel", "unknown channel 9");
	bad_frame(8, 9, "", 0, "heartbeat on an unknown channel", "unknown channel 9");
	bad_frame(99, 1, "x", 1, "frame of an unknown type", "not an AMQP 0-9-1 frame");
	bad_frame(1, 1, ack, sizeof(ack), "ack of what was not sent", "confirmed that was not sent");
	bad_frame(1, 1, ack_all, sizeof(ack_all), "ack of everything", "confirmed that was not sent");
	bad_frame(1, 1, "\0\172\0\172", 4, "unknown method", "read from");
	bad_frame(1, 1, select_ok, sizeof(select_ok), "reply nobody asked for", "unexpected method");
	bad_frame(1, 2, ack, sizeof(ack), "ack on a channel that was not opened", "unknown channel 2");
	bad_frame(1, 1, close_ok, sizeof(close_ok), "close-ok nobody asked for", "unexpected method");
	bad_frame(1, 1, declare_ok, sizeof(declare_ok), "declare-ok nobody asked for", "unexpected method");
	bad_frame(1, 1, deliver, sizeof(deliver), "delivery to a publisher", "unexpected method");
	bad_frame(1, 0, ack, sizeof(ack), "ack on the connection", "unexpected frame");
	bad_frame(3, 0, "x", 1, "body on the connection", "unexpected frame");
	bad_frame(1, 1, ack, 9, "ack cut short", "read from");
	for (size_t len = 0; len < 4; len++)
		bad_frame(1, 1, nothing, len, "method frame too short", "read from");
	for (size_t len = 0; len < 14; len++)
		bad_frame(2, 1, nothing, len, "header frame too short", "");
	bad_bytes_later("\1\0\1\377\377\377\377\0\0\0\0", 11, "frame of 4 GB", "frame of 4294967295 bytes");
	bad_bytes_later("\1\0\1\0\2\0\0\0\0\0\0", 11, "frame over the limit", "frame of 131072 bytes");
	bad_bytes_later("\1\0\1\0\0\0\4\0\125\0\013X", 12, "frame without an end", "read from");

	bad_frame(2, 1, header_id, sizeof(header_id), "header out of turn", "header came out of turn");
	bad_frame(3, 1, "x", 1, "body out of turn", "body came out of turn");
	bad_return(3, "x", 1, "body before header", "body came out of turn");
	bad_return(1, ack, sizeof(ack), "ack within a return", "within a content");
	bad_return(1, returned, sizeof(returned), "return within a return", "within another");
	bad_return(2, "\0\012\0\0\0\0\0\0\0\0\0\0\0\0", 14, "header of another class", "class");
	memset(huge, 0x7f, sizeof(huge));
	memcpy(huge, "\0\074\0\0", 4);
	huge[12] = huge[13] = 0;
	bad_return(2, huge, 14, "giant body announced", "larger than the limit");
	bad_return(2, "\0\074\0\0\0\0\0\0\0\0\0\1\40\0\377\377\377\377", 18, "broken header table", "read from");

	n = make_frame(frames, 1, 1, returned, sizeof(returned));
	n += make_frame(frames + n, 2, 1, header_id, sizeof(header_id));
	n += make_frame(frames + n, 3, 1, "abcdef", 6);
	bad_bytes_later(frames, n, "body longer than announced", "longer than announced");
	n = make_frame(frames, 1, 1, returned, sizeof(returned));
	n += make_frame(frames + n, 2, 1, header_id, sizeof(header_id));
	n += make_frame(frames + n, 3, 1, "", 0);
	bad_bytes_later(frames, n, "empty body frame", "empty");
}

static long
max_rss_kb(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_maxrss;
}

/* A declaration in a flood must end in time, and must not fill the memory. */
static void
flood(int type, int channel, const void *payload, size_t len, const char *what)
{
	static unsigned char frame[60100];
	BrokerError error;
	BrokerResult result;
	long		rss;
	pid_t		pid;
	int64_t		begin;
	Broker	   *broker;

	bad_bytes = frame;
	bad_len = make_frame(frame, type, channel, payload, len);
	broker = connect_to(script_flood, &pid, &error);
	if (!ok(broker != NULL, "connected %s", error.text))
		return;
	begin = now_ms();
	longest_wait = 0;
	last_wait = begin;
	rss = max_rss_kb();
	result = broker_declare_exchange(broker, "x", &error);
	ok(result == BROKER_LOST && now_ms() - begin < RPC_TIMEOUT + 4000, "%s: %s (%ld ms)",
	   what, error.text, (long) (now_ms() - begin));
	ok(longest_wait < 500, "%s: interrupts are served every %ld ms", what, longest_wait);
	ok(max_rss_kb() - rss < MEMORY_KB, "%s: takes %ld kB of memory", what, max_rss_kb() - rss);
	broker_close(broker, true);
	stop_server(pid);
}

static void
test_floods(void)
{
	static const char zeros[60000];

	flood(8, 0, "", 0, "flood of heartbeats");
	flood(8, 1, zeros, sizeof(zeros), "flood of large heartbeats on a channel");
	flood(99, 1, zeros, sizeof(zeros), "flood of unknown frames");
	flood(1, 0, "\0\012\0\075", 4, "flood of unblocked");
	flood(1, 1, "\0\024\0\051", 4, "flood of close-ok");
}

/* However long it talks, whoever asks for the next event gets his turn. */
static void
test_turns(void)
{
	unsigned char frame[100];
	BrokerError error;
	BrokerEvent event;
	pid_t		pid;
	int64_t		begin;
	Broker	   *broker;

	bad_bytes = frame;
	bad_len = make_frame(frame, 8, 0, "", 0);
	broker = connect_to(script_flood, &pid, &error);
	begin = now_ms();
	do
		broker_next_event(broker, &event);
	while (event.type == BROKER_NOTHING && now_ms() - begin < 5000);
	ok(event.type == BROKER_MORE, "endless heartbeats do not keep the caller (%ld ms)",
	   (long) (now_ms() - begin));
	broker_close(broker, true);
	stop_server(pid);
}

/*
 * An event of this type has no delivery: not the one either that the caller took with the
 * event before, and has freed.
 */
static void
no_old_delivery(BrokerEventType type, const char *what)
{
	unsigned char frame[100];
	BrokerError error;
	BrokerEvent event;
	pid_t		pid;
	int64_t		deadline = now_ms() + 5000;
	Broker	   *broker;

	bad_bytes = frame;
	bad_len = make_frame(frame, 8, 0, "", 0);
	broker = connect_to(script_flood, &pid, &error);
	if (type != BROKER_MORE)
		kill(pid, type == BROKER_NOTHING ? SIGSTOP : SIGKILL);
	do
	{
		event.delivery = (BrokerDelivery *) &event;
		broker_next_event(broker, &event);
	} while (event.type != type && now_ms() < deadline);
	ok(event.type == type && event.delivery == NULL && event.channel == 0, "%s has no delivery", what);
	broker_close(broker, true);
	stop_server(pid);
}

static bool
publish_small(Broker *broker)
{
	BrokerError error;
	BrokerMessage message = {
		.exchange = "x",.routing_key = "",.message_id = "id",.content_type = "text/plain",
		.body = "abc",.body_len = 3,
	};

	return broker_publish(broker, 1, &message, 3000, &error) == BROKER_OK;
}

/* Writing does not deadlock with a broker that cannot get rid of its acks. */
static void
test_acks_first(void)
{
	BrokerError error;
	BrokerEvent event;
	pid_t		pid;
	Broker	   *broker = connect_to(script_acks_first, &pid, &error);
	size_t		len = 16 * 1024 * 1024;
	char	   *body = calloc(len, 1);
	BrokerMessage message = {
		.exchange = "x",.routing_key = "",.message_id = "id",.content_type = "text/plain",
		.body = body,.body_len = len,
	};
	int			acks = 0;

	ok(publish_small(broker), "a small body is written");
	ok(broker_publish(broker, 1, &message, 3000, &error) == BROKER_OK,
	   "a large body is written to a broker that writes first: %s", error.text);
	for (int64_t deadline = now_ms() + 5000; acks < MANY_ACKS && now_ms() < deadline;)
	{
		broker_next_event(broker, &event);
		acks += event.type == BROKER_ACK;
		if (event.type == BROKER_DISCONNECTED)
			break;
	}
	ok(acks == MANY_ACKS, "and no event is lost (%d)", acks);
	free(body);
	broker_close(broker, true);
	stop_server(pid);
}

/* A TLS port that takes connections and says nothing. */
static void
test_silent_tls(void)
{
	BrokerAddress address;
	BrokerError error;
	Broker	   *broker;
	pid_t		pid = start_server(script_flood, &address);
	int64_t		begin = now_ms();

	kill(pid, SIGSTOP);
	address.tls = true;
	broker = broker_connect(&address, NULL, &options, &error);
	ok(broker == NULL && announced == -1 && now_ms() - begin < CONNECT_TIMEOUT + 4000,
	   "a silent TLS port times out: %s (%ld ms)", error.text, (long) (now_ms() - begin));

	begin = now_ms();
	ualarm(300000, 0);
	broker = broker_connect(&address, NULL, &options, &error);
	ok(broker == NULL && broker_handshake_fd() == -1 && now_ms() - begin < CONNECT_TIMEOUT / 2,
	   "a signal handler ends the TLS handshake: %s (%ld ms)", error.text, (long) (now_ms() - begin));
	stop_server(pid);
}

static void
test_fuzz(void)
{
	const char *runs = getenv("PGF_FUZZ");
	int			n = runs != NULL ? atoi(runs) : 200;
	int			ended = 0;

	for (seed = 1; seed <= (unsigned) n; seed++)
	{
		BrokerError error;
		BrokerEvent event;
		pid_t		pid;
		Broker	   *broker = connect_to(script_fuzz, &pid, &error);

		if (broker == NULL)
		{
			diag("seed %u: %s", seed, error.text);
			stop_server(pid);
			continue;
		}
		(void) publish_small(broker);
		for (int i = 0; i < 8; i++)
		{
			broker_next_event(broker, &event);
			if (event.type == BROKER_DISCONNECTED)
				break;
			if (event.type == BROKER_NOTHING)
				wait_socket(broker_fd(broker), false, 5);
		}
		broker_close(broker, true);
		stop_server(pid);
		ended++;
	}
	ok(ended == n, "%d distorted conversations were survived", ended);
}

int
main(void)
{
	signal(SIGPIPE, SIG_IGN);
	signal(SIGALRM, shut_down);
	test_login();
	test_frames();
	test_floods();
	test_turns();
	no_old_delivery(BROKER_NOTHING, "an event that says that there is none");
	no_old_delivery(BROKER_MORE, "an event that says that there is more");
	no_old_delivery(BROKER_DISCONNECTED, "the end of the connection");
	test_acks_first();
	test_silent_tls();
	test_fuzz();
	return done();
}
