/*-------------------------------------------------------------------------
 *
 * test_forward.c
 *		Unit tests of broker_forward(): what is delivered goes on as it came.
 *
 * The broker is a child process that makes the same messages as this one from the same
 * seed: it delivers them, in pieces of any size, hears what is forwarded, and compares
 * that byte by byte with what it should be.  It confirms a message that is right, and
 * hangs up at the first one that is not.
 *
 *-------------------------------------------------------------------------
 */
#include <netinet/tcp.h>

#include "fake_broker.h"

#define FRAME_SIZE		4096	/* the broker allows no larger frames */
#define FRAME_OVERHEAD	8
#define CONTENT_HEADER	12		/* class, weight, size of the body */
#define MOST_PROPERTIES	(FRAME_SIZE - FRAME_OVERHEAD - CONTENT_HEADER)
#define LARGEST_BODY	100000
#define RANDOM_MESSAGES 3000

/* The channels of the client. */
#define CONSUMES	1
#define PUBLISHES	2

#define CONSUMER_TAG "c"
#define QUEUE		"to"

typedef struct Bytes
{
	unsigned char data[2 * FRAME_SIZE];
	size_t		len;
} Bytes;

/* A message as it is delivered, and as it is to be forwarded. */
typedef struct Sample
{
	Bytes		in;				/* flags and properties */
	Bytes		out;
	size_t		body_len;
} Sample;

static unsigned char body[LARGEST_BODY];

/* What the child plays. */
static int	nmessages;
static void (*make) (int number, Sample *sample);
static size_t (*piece_of) (int number, size_t at, size_t len);


/*
 * Encoding (AMQP 0-9-1, section 4.2; the types of fields as RabbitMQ has them)
 */

static void
put_bytes(Bytes *to, const void *bytes, size_t len)
{
	if (to->len + len > sizeof(to->data))
		abort();
	memcpy(to->data + to->len, bytes, len);
	to->len += len;
}

static void
put_number(Bytes *to, uint64_t number, int bytes)
{
	for (int i = bytes - 1; i >= 0; i--)
	{
		unsigned char byte = (unsigned char) (number >> (8 * i));

		put_bytes(to, &byte, 1);
	}
}

static void
put_short(Bytes *to, const char *text)
{
	put_number(to, strlen(text), 1);
	put_bytes(to, text, strlen(text));
}

static void
put_long(Bytes *to, const Bytes *bytes)
{
	put_number(to, bytes->len, 4);
	put_bytes(to, bytes->data, bytes->len);
}

static uint64_t
random_number(void)
{
	return (uint64_t) rand() << 42 ^ (uint64_t) rand() << 21 ^ (uint64_t) rand();
}

/* Types of fields; those that have fields come last. */
static const char kinds[] = "tbBsuIilLfdDSxTVAF";

static char
any_kind(bool nested)
{
	return kinds[random_number() % (strlen(kinds) - (nested ? 0 : 2))];
}

static void put_table(Bytes *to, int depth);

static void
put_value(Bytes *to, char kind, int depth)
{
	Bytes		nested = {.len = 0};

	put_bytes(to, &kind, 1);
	switch (kind)
	{
		case 't':
			put_number(to, random_number() % 2, 1);
			break;
		case 'b':
		case 'B':
			put_number(to, random_number(), 1);
			break;
		case 's':
		case 'u':
			put_number(to, random_number(), 2);
			break;
		case 'I':
		case 'i':
		case 'f':
			put_number(to, random_number(), 4);
			break;
		case 'l':
		case 'L':
		case 'd':
		case 'T':
			put_number(to, random_number(), 8);
			break;
		case 'D':
			put_number(to, random_number(), 1);
			put_number(to, random_number(), 4);
			break;
		case 'S':
		case 'x':
			put_number(&nested, random_number(), (int) (random_number() % 9));
			put_long(to, &nested);
			break;
		case 'A':
			for (uint64_t i = random_number() % 3; i > 0; i--)
				put_value(&nested, any_kind(depth > 0), depth - 1);
			put_long(to, &nested);
			break;
		case 'F':
			put_table(to, depth - 1);
			break;
		default:
			break;
	}
}

static void
put_table(Bytes *to, int depth)
{
	static const char *const names[] = {"", "a", "x-death", "sequence", "CC", "BCC", "x-delivery-count", "CCC", "cc"};
	Bytes		fields = {.len = 0};

	for (uint64_t i = random_number() % 4; i > 0; i--)
	{
		put_short(&fields, names[random_number() % 9]);
		put_value(&fields, any_kind(depth > 0), depth);
	}
	put_long(to, &fields);
}

/* Bits of the flags, in the order of the properties (AMQP 0-9-1, 1.8.1). */
enum
{
	CONTENT_TYPE = 15, CONTENT_ENCODING = 14, HEADERS = 13, DELIVERY_MODE = 12, PRIORITY = 11,
	CORRELATION_ID = 10, REPLY_TO = 9, EXPIRATION = 8, MESSAGE_ID = 7, TIMESTAMP = 6,
	TYPE = 5, USER_ID = 4, APP_ID = 3, CLUSTER_ID = 2,
};

/* Adds a field of the headers, to out unless it stays behind. */
static void
add_header(Bytes *in, Bytes *out, const char *name, char kind)
{
	Bytes		field = {.len = 0};
	bool		stays = strcmp(name, "CC") == 0 || strcmp(name, "BCC") == 0 ||
		strcmp(name, "x-delivery-count") == 0 || strcmp(name, "x-acquired-count") == 0;

	put_short(&field, name);
	put_value(&field, kind, 2);
	if (in->len + field.len > MOST_PROPERTIES / 2)
		return;
	put_bytes(in, field.data, field.len);
	if (!stays)
		put_bytes(out, field.data, field.len);
}

/* Begins a sample with properties of these flags; the headers are given encoded. */
static void
put_properties(Sample *sample, int flags, const Bytes *in, const Bytes *out)
{
	static const char *const texts[] = {"", "x", "some text"};

	memset(sample, 0, sizeof(*sample));
	put_number(&sample->in, (uint64_t) flags, 2);
	put_number(&sample->out, (uint64_t) flags & ~(uint64_t) (1 << USER_ID), 2);
	for (int bit = CONTENT_TYPE; bit >= CLUSTER_ID; bit--)
	{
		Bytes		value = {.len = 0};

		if (!(flags & 1 << bit))
			continue;
		if (bit == HEADERS)
		{
			put_long(&sample->in, in);
			put_long(&sample->out, out);
			continue;
		}
		if (bit == DELIVERY_MODE || bit == PRIORITY)
			put_number(&value, random_number(), 1);
		else if (bit == TIMESTAMP)
			put_number(&value, random_number(), 8);
		else
			put_short(&value, texts[random_number() % 3]);
		put_bytes(&sample->in, value.data, value.len);
		if (bit != USER_ID)
			put_bytes(&sample->out, value.data, value.len);
	}
}


/*
 * Messages
 */

static const char *const header_names[] = {
	"", "a", "sequence", "x-death", "CC", "BCC", "x-delivery-count", "x-acquired-count", "cc", "CC1"
};

/* Any properties, any headers, a body of any size. */
static void
make_random(int number, Sample *sample)
{
	static const size_t sizes[] = {0, 0, 1, 3, FRAME_SIZE - FRAME_OVERHEAD, FRAME_SIZE - FRAME_OVERHEAD + 1, 3 * FRAME_SIZE};
	Bytes		in = {.len = 0};
	Bytes		out = {.len = 0};

	srand((unsigned) number);
	for (uint64_t i = random_number() % 8; i > 0; i--)
		add_header(&in, &out, header_names[random_number() % 10], any_kind(true));
	put_properties(sample, random_number() % 3 == 0 ? rand() & 0xFFFC : number % 2 << HEADERS, &in, &out);
	sample->body_len = sizes[random_number() % 7];
}

/* No property at all, and no body. */
static void
make_bare(int number, Sample *sample)
{
	put_properties(sample, 0, NULL, NULL);
	sample->body_len = (size_t) number % 2;
}

/* One header of each type, and each of those that stay behind. */
static void
make_full(int number, Sample *sample)
{
	Bytes		in = {.len = 0};
	Bytes		out = {.len = 0};

	srand((unsigned) number / 1000);
	for (const char *kind = kinds; *kind != '\0'; kind++)
		add_header(&in, &out, "name", *kind);
	for (int i = 0; i < 10; i++)
		add_header(&in, &out, header_names[i], 'A');
	put_properties(sample, 0xFFFC, &in, &out);
	sample->body_len = 5;
}

/* As many bytes of properties as a frame takes, with and without delivery_mode. */
static void
make_largest(int number, Sample *sample)
{
	Bytes		field = {.len = 0};
	size_t		room = MOST_PROPERTIES - 2 - 4 - (size_t) number % 2;

	put_short(&field, "long");
	put_number(&field, 'S', 1);
	put_number(&field, room - field.len - 4, 4);
	while (field.len < room)
		put_number(&field, 'x', 1);
	put_properties(sample, 1 << HEADERS | number % 2 << DELIVERY_MODE, &field, &field);
	if (sample->in.len != MOST_PROPERTIES)
		abort();
	sample->body_len = 1;
}

static void
make_long(int number, Sample *sample)
{
	make_random(number, sample);
	sample->body_len = LARGEST_BODY - (size_t) number;
}


/*
 * The server's side
 */

static size_t
whole(int number, size_t at, size_t len)
{
	(void) number;
	(void) at;
	return len;
}

static size_t
single_bytes(int number, size_t at, size_t len)
{
	(void) number;
	(void) at;
	(void) len;
	return 1;
}

/* The message of this number is cut once, behind as many bytes. */
static size_t
cut_at_number(int number, size_t at, size_t len)
{
	size_t		cut = (size_t) number % len;

	return at < cut ? cut - at : len;
}

static size_t
any_pieces(int number, size_t at, size_t len)
{
	return 1 + ((size_t) number * 7919 + at * 104729) % (len / 2 + 1);
}

static unsigned char sent[2 * LARGEST_BODY];

static size_t
make_delivery(int number, const Sample *sample)
{
	static const char deliver_begins[] = {0, 60, 0, 60, 1, CONSUMER_TAG[0]};
	Bytes		method = {.len = 0};
	Bytes		header = {.len = 0};
	size_t		len;

	put_bytes(&method, deliver_begins, sizeof(deliver_begins));
	put_number(&method, (uint64_t) number + 1, 8);
	put_bytes(&method, "\0\0\1q", 4);
	len = make_frame(sent, 1, CONSUMES, method.data, method.len);
	put_number(&header, 60, 2);
	put_number(&header, 0, 2);
	put_number(&header, sample->body_len, 8);
	put_bytes(&header, sample->in.data, sample->in.len);
	len += make_frame(sent + len, 2, CONSUMES, header.data, header.len);
	for (size_t at = 0, n; at < sample->body_len; at += n)
	{
		n = sample->body_len - at;
		n = n > FRAME_SIZE - FRAME_OVERHEAD ? FRAME_SIZE - FRAME_OVERHEAD : n;
		len += make_frame(sent + len, 3, CONSUMES, body + at, n);
	}
	return len;
}

static void
deliver_message(int fd, int number, const Sample *sample)
{
	size_t		len = make_delivery(number, sample);

	for (size_t at = 0, n; at < len; at += n)
	{
		n = piece_of(number, at, len);
		n = n > len - at ? len - at : n;
		put(fd, sent + at, n);
	}
}

static void
wrong(int number, const char *what, const unsigned char *is, size_t is_len, const unsigned char *should_be, size_t should_be_len)
{
	size_t		at = 0;

	while (at < is_len && at < should_be_len && is[at] == should_be[at])
		at++;
	fprintf(stderr, "# message %d: %s of %zu bytes in place of %zu, first difference at %zu\n",
			number, what, is_len, should_be_len, at);
	_exit(1);
}

static void
compare(int number, const char *what, const unsigned char *is, size_t is_len, const unsigned char *should_be, size_t should_be_len)
{
	if (is_len != should_be_len || memcmp(is, should_be, is_len) != 0)
		wrong(number, what, is, is_len, should_be, should_be_len);
}

static unsigned char heard[FRAME_SIZE];

/* Reads a frame; returns its payload's length. */
static size_t
hear(int fd, int number, int type, int channel)
{
	unsigned char head[7];
	size_t		len;

	get(fd, head, 7);
	len = (size_t) head[3] << 24 | (size_t) head[4] << 16 | (size_t) head[5] << 8 | head[6];
	if (head[0] != type || (head[1] << 8 | head[2]) != channel || len + FRAME_OVERHEAD > FRAME_SIZE)
	{
		fprintf(stderr, "# message %d: frame of type %d on channel %d with %zu bytes in place of type %d on channel %d\n",
				number, head[0], head[1] << 8 | head[2], len, type, channel);
		_exit(1);
	}
	get(fd, heard, len + 1);
	return len;
}

static void
hear_message(int fd, int number, const Sample *sample)
{
	/* basic.publish to the default exchange, mandatory */
	static const unsigned char publish[] = {0, 60, 0, 40, 0, 0, 0, 2, 't', 'o', 1};
	Bytes		header = {.len = 0};
	size_t		len = hear(fd, number, 1, PUBLISHES);

	compare(number, "method", heard, len, publish, sizeof(publish));
	put_number(&header, 60, 2);
	put_number(&header, 0, 2);
	put_number(&header, sample->body_len, 8);
	put_bytes(&header, sample->out.data, sample->out.len);
	len = hear(fd, number, 2, PUBLISHES);
	compare(number, "header", heard, len, header.data, header.len);
	for (size_t at = 0; at < sample->body_len; at += len)
	{
		len = hear(fd, number, 3, PUBLISHES);
		if (len == 0 || len > sample->body_len - at)
			wrong(number, "body", heard, at + len, body, sample->body_len);
		compare(number, "part of the body", heard, len, body + at, len);
	}
}

static void
let_begin(int fd)
{
	/* the consumer's channel: open, qos, consume; then the one that publishes */
	skip_frame(fd);
	put_frame(fd, 1, CONSUMES, channel_open_ok, sizeof(channel_open_ok));
	skip_frame(fd);
	put_frame(fd, 1, CONSUMES, "\0\074\0\013", 4);
	skip_frame(fd);
	put_frame(fd, 1, CONSUMES, "\0\074\0\025\001" CONSUMER_TAG, 6);
	skip_frame(fd);
	skip_frame(fd);
	put_frame(fd, 1, PUBLISHES, channel_open_ok, sizeof(channel_open_ok));
	put_frame(fd, 1, PUBLISHES, select_ok, sizeof(select_ok));
}

static bool
script_forward(int fd, int step)
{
	int			one = 1;
	static const unsigned char small_tune[] = {0, 10, 0, 30, 7, 255, 0, 0, FRAME_SIZE >> 8, 0, 0, 60};

	if (step == AT_TUNE)
		put_frame(fd, 1, 0, small_tune, sizeof(small_tune));
	if (step != AT_LOGGED_IN)
		return step == AT_TUNE;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	let_begin(fd);
	for (int i = 0; i < nmessages; i++)
	{
		unsigned char confirm[sizeof(ack)];
		Sample		sample;

		make(i, &sample);
		deliver_message(fd, i, &sample);
		hear_message(fd, i, &sample);
		memcpy(confirm, ack, sizeof(ack));
		for (int b = 0; b < 4; b++)
			confirm[11 - b] = (unsigned char) ((i + 1) >> 8 * b);
		put_frame(fd, 1, PUBLISHES, confirm, sizeof(confirm));
	}
	for (;;)
		skip_frame(fd);
}


/*
 * The client's side
 */

/* Forwards all that comes.  Returns how many were confirmed, in order. */
static int
forward_all(Broker *broker, BrokerError *error)
{
	int			confirmed = 0;

	while (confirmed < nmessages)
	{
		BrokerEvent event = next_event(broker);
		BrokerResult result = BROKER_OK;

		if (event.type == BROKER_DELIVERY)
		{
			result = broker_forward(broker, PUBLISHES, QUEUE, event.delivery, 3000, error);
			broker_free_delivery(event.delivery);
		}
		else if (event.type == BROKER_ACK && event.tag == (uint64_t) confirmed + 1)
			confirmed++;
		else
		{
			diag("event %d: %s", event.type, event.type == BROKER_DISCONNECTED ? event.text : "");
			return confirmed;
		}
		if (result != BROKER_OK)
			return confirmed;
	}
	return confirmed;
}

static void
forward(int count, void (*maker) (int, Sample *), size_t (*pieces) (int, size_t, size_t), const char *what)
{
	pid_t		server;
	BrokerError error = {.text = ""};
	Broker	   *broker;
	int			confirmed = 0;

	nmessages = count;
	make = maker;
	piece_of = pieces;
	broker = log_in_to(script_forward, &server, &error);
	if (broker != NULL && broker_consume(broker, "q", CONSUMER_TAG, 1, NULL, &error) == BROKER_OK &&
		broker_open_channel(broker, true, &error) == PUBLISHES && next_event(broker).type == BROKER_CHANNEL_OPENED)
		confirmed = forward_all(broker, &error);
	ok(confirmed == count, "%s: %d of %d %s", what, confirmed, count, error.text);
	if (broker != NULL)
		broker_close(broker, false);
	stop_server(server);
}

int
main(void)
{
	signal(SIGPIPE, SIG_IGN);
	options.consumer = true;
	options.forwards = true;
	for (size_t i = 0; i < sizeof(body); i++)
		body[i] = (unsigned char) (i * 31 >> 3);

	forward(4, make_bare, whole, "messages without a property are forwarded without one");
	forward(200, make_full, whole, "fields of all types go on as they came, but for those that stay behind");
	forward(1000, make_full, cut_at_number, "also if the frames are cut, at whichever byte");
	forward(3, make_full, single_bytes, "or come in single bytes");
	forward(4, make_largest, whole, "properties that fill a frame go on in one");
	forward(20, make_long, any_pieces, "bodies of many frames");
	forward(RANDOM_MESSAGES, make_random, whole, "random properties, headers and sizes");
	forward(RANDOM_MESSAGES, make_random, any_pieces, "random messages in random pieces");
	return done();
}
