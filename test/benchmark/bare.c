/*-------------------------------------------------------------------------
 *
 * bare.c
 *		The limit: what publishing and consuming cost with rabbitmq-c and nothing else.
 *
 *	bare publish PORT EXCHANGE[,EXCHANGE...] FILE WINDOW [RATE]
 *		Publishes each line of FILE, all of them read before, with confirms and
 *		with the properties and headers that pg_fanout gives a message.  Each
 *		exchange has a channel of its own, and the messages go to them in turn.
 *		At most WINDOW are unconfirmed on a channel.  With RATE, so many per
 *		second, and then prints of each "key microseconds", when it was handed to
 *		the socket.
 *
 *	bare consume PORT QUEUE COUNT PREFETCH
 *		Consumes COUNT messages, acking several at once, and prints of each
 *		"key microseconds", when it was there.
 *
 * Both say "ready" when connected, begin at a line of input, and say "done".
 *
 *-------------------------------------------------------------------------
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/time.h>

#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>

#define CHANNEL 1				/* of the consumer, and the publisher's first */

typedef struct
{
	char	   *body;
	size_t		len;
	int64_t		time;
	char		id[37];
	char		key[12];
} Item;

static amqp_connection_state_t conn;
static Item *items;
static size_t nitems;

/* What is published to one exchange: each nchannels-th item, from the first one on. */
typedef struct
{
	const char *exchange;
	size_t		next;			/* item */
	uint64_t	sent;			/* the last delivery tag */
	uint64_t	lowest;			/* delivery tag that is not confirmed */
	uint64_t	in_flight;
	bool	   *confirmed;		/* by delivery tag */
} Channel;

static Channel *channels;		/* the first one has number CHANNEL */
static int	nchannels;

static void
die(const char *format,...)
{
	va_list		args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(1);
}

static void
check(amqp_rpc_reply_t reply, const char *what)
{
	if (reply.reply_type != AMQP_RESPONSE_NORMAL)
		die("%s failed", what);
}

/* Microseconds since 1970. */
static int64_t
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (int64_t) t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void
connect_to(int port)
{
	amqp_socket_t *socket;

	conn = amqp_new_connection();
	socket = amqp_tcp_socket_new(conn);
	if (socket == NULL || amqp_socket_open(socket, "127.0.0.1", port) != 0)
		die("cannot connect to port %d", port);
	check(amqp_login(conn, "/", 0, AMQP_DEFAULT_FRAME_SIZE, 0, AMQP_SASL_METHOD_PLAIN, "guest", "guest"), "login");
}

static void
open_channel(int number)
{
	amqp_channel_open(conn, number);
	check(amqp_get_rpc_reply(conn), "channel.open");
}

static void
say(const char *word)
{
	puts(word);
	fflush(stdout);
}

static void
wait_for_go(void)
{
	char		line[16];

	say("ready");
	if (fgets(line, sizeof(line), stdin) == NULL)
		exit(0);
}

/* ---------------------------------------------------------------------------
 * Publishing
 * ---------------------------------------------------------------------------
 */

static void
add_item(char *body, size_t len, uint64_t base)
{
	static size_t room = 0;
	Item	   *item;

	if (nitems == room)
	{
		room = room == 0 ? 1024 : room * 2;
		items = realloc(items, room * sizeof(Item));
		if (items == NULL)
			die("out of memory");
	}
	item = &items[nitems++];
	item->body = body;
	item->len = len;
	snprintf(item->key, sizeof(item->key), "%zu", nitems);
	snprintf(item->id, sizeof(item->id), "%08x-%04x-4000-8000-%012zx",
			 (unsigned) (base >> 32), (unsigned) (base & 0xffff), nitems);
}

static void
read_items(const char *name)
{
	FILE	   *file = fopen(name, "r");
	uint64_t	base = (uint64_t) now() << 20 ^ (uint64_t) getpid();
	char	   *line = NULL;
	size_t		room = 0;
	ssize_t		len;

	if (file == NULL)
		die("cannot read %s", name);
	while ((len = getline(&line, &room, file)) > 0)
	{
		add_item(line, len - 1, base);
		line = NULL;
		room = 0;
	}
	fclose(file);
}

static amqp_table_entry_t
text_entry(const char *name, const char *value)
{
	amqp_table_entry_t entry = {amqp_cstring_bytes(name), {.kind = AMQP_FIELD_KIND_UTF8}};

	entry.value.value.bytes = amqp_cstring_bytes(value);
	return entry;
}

static amqp_table_entry_t
number_entry(const char *name, int64_t value)
{
	amqp_table_entry_t entry = {amqp_cstring_bytes(name), {.kind = AMQP_FIELD_KIND_I64}};

	entry.value.value.i64 = value;
	return entry;
}

static bool
has_items(const Channel *channel)
{
	return channel->next < nitems;
}

/* Publishes the channel's next item. */
static void
publish(Channel *channel)
{
	Item	   *item = &items[channel->next];
	amqp_table_entry_t headers[] = {
		number_entry("sequence", channel->next + 1), number_entry("xid", 1000), text_entry("key", item->key)
	};
	amqp_basic_properties_t properties = {
		._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG |
		AMQP_BASIC_TIMESTAMP_FLAG | AMQP_BASIC_TYPE_FLAG | AMQP_BASIC_APP_ID_FLAG | AMQP_BASIC_HEADERS_FLAG,
		.content_type = amqp_cstring_bytes("application/json"),
		.delivery_mode = AMQP_DELIVERY_PERSISTENT,
		.message_id = amqp_cstring_bytes(item->id),
		.timestamp = time(NULL),
		.type = amqp_cstring_bytes("benchmark"),
		.app_id = amqp_cstring_bytes("pg_fanout"),
		.headers = {3, headers}
	};
	amqp_bytes_t body = {item->len, item->body};

	item->time = now();
	if (amqp_basic_publish(conn, CHANNEL + (channel - channels), amqp_cstring_bytes(channel->exchange),
						   amqp_empty_bytes, true, false, &properties, body) != AMQP_STATUS_OK)
		die("publishing failed");
	channel->next += nchannels;
	channel->sent++;
	channel->in_flight++;
}

/* Notes an ack.  Those of single messages may come out of order. */
static void
note_ack(Channel *channel, const amqp_basic_ack_t *ack)
{
	for (uint64_t tag = ack->multiple ? channel->lowest : ack->delivery_tag; tag <= ack->delivery_tag; tag++)
	{
		channel->in_flight -= !channel->confirmed[tag];
		channel->confirmed[tag] = true;
	}
	while (channel->lowest <= channel->sent && channel->confirmed[channel->lowest])
		channel->lowest++;
}

/* Takes one frame within the time, if there is one. */
static bool
take_confirm(struct timeval *timeout)
{
	amqp_frame_t frame;
	int			status = amqp_simple_wait_frame_noblock(conn, &frame, timeout);

	if (status == AMQP_STATUS_TIMEOUT)
		return false;
	if (status != AMQP_STATUS_OK || frame.frame_type != AMQP_FRAME_METHOD ||
		frame.payload.method.id != AMQP_BASIC_ACK_METHOD)
		die("not an ack: status %d, method %x", status, (unsigned) frame.payload.method.id);

	note_ack(&channels[frame.channel - CHANNEL], frame.payload.method.decoded);
	if (!amqp_frames_enqueued(conn) && !amqp_data_in_buffer(conn))
		amqp_maybe_release_buffers(conn);
	return true;
}

/* Waits for a confirm if it must, and takes all that are there already. */
static void
take_confirms(bool wait)
{
	struct timeval none = {0, 0};

	if (wait && !take_confirm(NULL))
		die("no confirm");
	while (take_confirm(&none))
		;
}

static uint64_t
unconfirmed(void)
{
	uint64_t	n = 0;

	for (int i = 0; i < nchannels; i++)
		n += channels[i].in_flight;
	return n;
}

/* Publishes an item on each channel that has room; returns how many. */
static int
publish_in_turn(uint64_t window)
{
	int			n = 0;

	for (int i = 0; i < nchannels; i++)
	{
		if (!has_items(&channels[i]) || channels[i].in_flight >= window)
			continue;
		publish(&channels[i]);
		n++;
	}
	return n;
}

static void
publish_all(uint64_t window)
{
	int			since = 0;		/* the last look for confirms */
	int			n;

	while ((n = publish_in_turn(window)) > 0 || unconfirmed() > 0)
	{
		since += n;
		if (n > 0 && since < 64)
			continue;
		take_confirms(n == 0);
		since = 0;
	}
}

static void
publish_at_rate(double rate)
{
	int64_t		begin = now();

	for (size_t sent = 0; sent < nitems;)
	{
		int64_t		wait = begin + (int64_t) (sent * 1000000 / rate) - now();
		struct timeval timeout = {wait / 1000000, wait % 1000000};

		if (wait <= 0)
			publish(&channels[sent++ % nchannels]);
		else
			take_confirm(&timeout);
	}
	while (unconfirmed() > 0)
		take_confirms(true);
}

static void
print_times(void)
{
	for (size_t i = 0; i < nitems; i++)
		printf("%s %lld\n", items[i].key, (long long) items[i].time);
}

/* Opens a channel for each of the exchanges, which are separated by commas. */
static void
open_channels(char *exchanges)
{
	for (char *name = strtok(exchanges, ","); name != NULL; name = strtok(NULL, ","))
	{
		int			number = CHANNEL + nchannels;
		Channel		channel = {.exchange = name, .next = nchannels, .lowest = 1};

		channels = realloc(channels, (nchannels + 1) * sizeof(Channel));
		channel.confirmed = calloc(nitems + 2, sizeof(bool));
		if (channels == NULL || channel.confirmed == NULL)
			die("out of memory");
		channels[nchannels++] = channel;
		open_channel(number);
		amqp_confirm_select(conn, number);
		check(amqp_get_rpc_reply(conn), "confirm.select");
	}
}

static void
run_publisher(char *exchanges, const char *file, int window, double rate)
{
	read_items(file);
	open_channels(exchanges);
	wait_for_go();
	if (rate > 0)
		publish_at_rate(rate);
	else
		publish_all(window);
	say("done");
	if (rate > 0)
		print_times();
}

/* ---------------------------------------------------------------------------
 * Consuming
 * ---------------------------------------------------------------------------
 */

static void
note_key(Item *item, const amqp_basic_properties_t *properties)
{
	const amqp_table_t *headers = &properties->headers;

	item->time = now();
	for (int i = 0; i < headers->num_entries; i++)
	{
		amqp_bytes_t value = headers->entries[i].value.value.bytes;

		if (headers->entries[i].key.len == 3 && memcmp(headers->entries[i].key.bytes, "key", 3) == 0 &&
			value.len < sizeof(item->key))
			memcpy(item->key, value.bytes, value.len);
	}
}

static void
consume_all(size_t count, uint64_t every)
{
	for (size_t i = 0; i < count; i++)
	{
		amqp_envelope_t envelope;

		amqp_maybe_release_buffers(conn);
		check(amqp_consume_message(conn, &envelope, NULL, 0), "consuming");
		note_key(&items[i], &envelope.message.properties);
		if (envelope.delivery_tag % every == 0 || i + 1 == count)
			amqp_basic_ack(conn, CHANNEL, envelope.delivery_tag, true);
		amqp_destroy_envelope(&envelope);
	}
}

static void
run_consumer(const char *queue, size_t count, int prefetch)
{
	items = calloc(count, sizeof(Item));
	if (items == NULL)
		die("out of memory");
	nitems = count;
	open_channel(CHANNEL);
	amqp_basic_qos(conn, CHANNEL, 0, prefetch, false);
	check(amqp_get_rpc_reply(conn), "basic.qos");
	wait_for_go();
	amqp_basic_consume(conn, CHANNEL, amqp_cstring_bytes(queue), amqp_empty_bytes, false, false, false,
					   amqp_empty_table);
	check(amqp_get_rpc_reply(conn), "basic.consume");
	consume_all(count, prefetch / 10 + 1);
	say("done");
	print_times();
}

int
main(int argc, char **argv)
{
	if (argc < 6)
		die("usage: bare publish PORT EXCHANGE[,EXCHANGE...] FILE WINDOW [RATE] | bare consume PORT QUEUE COUNT PREFETCH");
	connect_to(atoi(argv[2]));
	if (strcmp(argv[1], "publish") == 0)
		run_publisher(argv[3], argv[4], atoi(argv[5]), argc > 6 ? atof(argv[6]) : 0);
	else
		run_consumer(argv[3], strtoul(argv[4], NULL, 10), atoi(argv[5]));
	amqp_connection_close(conn, AMQP_REPLY_SUCCESS);
	amqp_destroy_connection(conn);
	return 0;
}
