/*-------------------------------------------------------------------------
 *
 * broker.c
 *		One AMQP 0-9-1 connection to RabbitMQ, over rabbitmq-c.
 *
 * The only file that knows rabbitmq-c.  It uses of that library the codec:
 * amqp_handle_input(), amqp_encode_method() and amqp_encode_properties(), and that
 * it opens TLS sockets.
 * Everything else, that is login, RPC, publishing, writing frames and the dispatch
 * of what arrives, is done here, because the library's own versions wait without
 * limit and without interrupts:
 *
 * - amqp_basic_publish() and every RPC write with an infinite deadline and
 *   restart on EINTR (rabbitmq-c #519).  Here, a frame is written only when
 *   the kernel has room for it (see credit.c), so no write blocks.  And each frame
 *   would be a call of the kernel of its own, three for a message; here, all that
 *   are written between broker_cork() and broker_uncork() go together.
 * - Before 0.14, a write that blocks past a heartbeat reads with an infinite
 *   deadline (rabbitmq-c #780).  Unreachable for the same reason.
 * - amqp_consume_message(), amqp_read_message() and amqp_simple_wait_frame()
 *   wait forever; amqp_simple_wait_frame_on_channel() drops queued frames of
 *   other channels; amqp_release_buffers() abort()s between frames.  None of
 *   them may be used here; nor may anything that calls amqp_abort().
 * - The library's reading swallows heartbeats and frames of unknown types in
 *   a loop for as long as a peer sends them, and keeps what they held (measured
 *   with 0.11: 300 MB a second).  So sockets are read here, TLS by tls_read(),
 *   and a frame's header is checked before the library is shown a byte of it
 *   (see "Reading").
 *
 * One call may still keep interrupts away, at most for connect_timeout_ms, and
 * ends when a signal handler shuts the socket down: opening a TLS socket, if the
 * peer accepts connections but does not shake hands (broker_handshake_fd()).
 *
 * Channels: those that the caller opens, one more for requests that are waited
 * for, and one that consumes if the options want it.  What a channel waits for,
 * and which of them there are, is in channels.c; here its methods are written
 * and read.  Nothing is written from within the dispatch but channel.close-ok,
 * and that only if there is room for it, so that dispatching never waits.  Since
 * close-ok may be written at any wait, a frame of a channel is written only
 * after a look at whether the channel is still open: RabbitMQ ends a connection
 * on which a closed channel goes on.  But a message that was begun is finished
 * first, and so is close-ok written behind it (see pay_debts()).
 *
 * The library looks at all the channels it has heard of for every frame that
 * it is asked to forget, and keeps a page of memory for each.  So it never
 * hears of them: the channel's number is taken out of a frame before the library
 * is shown it (see begin_frame()), and cost and memory are those of one channel.
 *
 * Whatever arrives while this file waits for something else (room to write,
 * a reply) is dispatched at once and becomes an event in a queue, which
 * broker_next_event() serves first.  Not reading while waiting to write would
 * deadlock with a broker that waits for us to read its acks.
 *
 * A Broker that was lost stays lost: every call returns BROKER_LOST with the
 * first reason, broker_fd() is -1, and only broker_close() makes sense.  A
 * peer that breaks the protocol is lost; it never ends the process.
 *
 * Must never: raise a PostgreSQL error, allocate with palloc, keep a pointer
 * into a decoded frame past the next read, put a password into a text.
 *
 * Scenarios.  Checks in test/unit/broker_probe.c, against a real RabbitMQ:
 * confirms; return before ack; nack by reject-publish; exchange missing
 * (404), then another channel; closes that cross; a channel refused beside one
 * that is not; 2,000 channels; memory alarm (blocked, unblocked, longer than
 * the user timeout); a frozen broker while writing, while waiting for a reply,
 * while idle, while connecting; a body of many frames; a body over the broker's
 * limit; properties over a frame; login refused; vhost unknown; nobody
 * listening; a request refused (406); the operator closing the connection; TLS
 * with and without trust.
 * In test/unit/test_broker.c, against brokers made of raw bytes: one that goes
 * silent, hangs up or talks nonsense at any step, breaks the order or the size
 * of frames, floods us, confirms what was not sent, or writes before it reads.
 * In test/unit/test_broker_channels.c: one that answers several channels in any
 * order, closes one of them in the middle of a message, closes twice or never,
 * answers what was not asked, or takes nothing in.
 * In test/fuzz/fuzz_broker.c, whatever bytes a fuzzer comes upon.
 *
 *-------------------------------------------------------------------------
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/ssl_socket.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_ssl_socket.h>
#include <amqp_tcp_socket.h>
#endif

#include "broker/assemble.h"
#include "broker/broker.h"
#include "broker/channels.h"
#include "broker/clock.h"
#include "broker/credit.h"
#include "broker/errors.h"
#include "broker/events.h"
#include "broker/frames.h"
#include "broker/message.h"
#include "broker/tcp.h"
#include "broker/tls.h"

#ifndef PG_FANOUT_VERSION
#define PG_FANOUT_VERSION "devel"
#endif

/* Frames about the connection as a whole have this channel number. */
#define CHANNEL_CONNECTION	0

/* What we propose; the broker may lower it to the protocol's minimum. */
#define FRAME_MAX			65536
#define FRAME_MIN			4096

/* The library's private frame type for a protocol header ("AMQP"). */
#define FRAME_PROTOCOL_HEADER 'A'

/* A frame's head, before its payload, and the byte behind it (AMQP 0-9-1, section 4.2.3). */
#define FRAME_HEAD			7
#define FRAME_END			0xCE

/* Frames for a corked socket are collected until they are so many bytes. */
#define WRITE_AT_ONCE		FRAME_MAX

/* A method without strings, rounded up. */
#define SMALL_METHOD_SIZE	64

#define USER_TIMEOUT_MS		10000

/* A content header but for its properties. */
#define HEADER_OVERHEAD		(FRAME_ENVELOPE + 12)

/* How often a wait for room to write looks for frames to read. */
#define WRITE_SLICE_MS		20

/* How long a wait for a reply may keep heartbeats from being served. */
#define READ_SLICE_MS		1000

/* Reads in a row after which interrupts are served. */
#define READS_BETWEEN_WAITS 1024

/* Reads in a row before something else is looked at: the time, room to write. */
#define READS_AT_ONCE		16384

/*
 * While something else is waited for, reading stops once so many bytes of
 * deliveries are queued.
 */
#define DELIVERED_AHEAD		((size_t) 1024 * 1024)

/* Tables in tables: RabbitMQ's own (x-death) have two levels. */
#define NESTED_MAX			16

/* How long a polite close waits for the answer. */
#define GOODBYE_MS			200

/*
 * Limits the channels that a caller may ask for.  AMQP numbers channels with 16 bits,
 * and up to two of the numbers are the connection's own.
 */
#define CHANNELS_MAX		65000

/* Bounds the wait for a broker that has said that it is blocked: it reads nothing meanwhile. */
#define BLOCKED_TIMEOUT_MS	30000

#define HEARTBEAT_NEVER_MS	(60 * 60 * 1000L)

struct Broker
{
	const BrokerOptions *options;
	amqp_connection_state_t conn;
	void	   *tls;			/* the session to read from; NULL: none */
	int			fd;				/* -1: none, or lost */
	char		where[288];		/* host:port, for texts */

	bool		greeted;		/* it has proved to speak what we speak */
	int			major;			/* of the server's version */
	bool		lost;
	BrokerError why;			/* lost: the first reason */
	bool		blocked;		/* by connection.blocked */

	Channels	channels;		/* empty before the login */
	EventQueue	events;			/* not yet fetched */

	/* Calls that wait for their answer */
	int			calls;			/* the channel for them; 0: none yet */
	uint32_t	messages;		/* the last answer's counts */
	uint32_t	consumers;

	/* Consuming */
	int			consuming;		/* the channel that does; 0: none */
	bool		consumes;		/* on it, something was consumed */
	BrokerDelivery *delivery;	/* that is being received on it */
	uint64_t	delivery_tag;	/* on it: the last delivery's */

	/* Writing */
	bool		corked;
	bool		mid_message;	/* a content is half sent */
	bool		write_failed;	/* no use in writing any more */
	size_t		frame_max;		/* negotiated */
	Credit		credit;			/* see refill_credit() */
	size_t		nunwritten;		/* bytes of frames that are not written yet, */
	unsigned char unwritten[WRITE_AT_ONCE + FRAME_MAX]; /* which credit was
														 * taken for */

	/* Heartbeats */
	int			heartbeat;		/* negotiated, in seconds; 0: none */
	int64_t		last_sent_ms;
	int64_t		last_received_ms;

	/* Reading */
	int64_t		last_read_ms;	/* when heartbeats were last served */
	int			reads;			/* since interrupts were last served */
	size_t		frame_left;		/* of the frame the library is being given */
	int			frame_channel;	/* of that frame, or of the last one */
	FrameBuffer received;

	/* Room for the table being sent */
	amqp_table_entry_t *entries;
	int			nentries;
	amqp_pool_t forwarded;		/* the properties of what is forwarded */
};

/* A message to be written: its properties and its body. */
typedef struct Content
{
	amqp_basic_properties_t properties;
	size_t		header_size;	/* of their frame, at most */
	const char *body;
	size_t		body_len;
} Content;

/* A connection that opens a TLS socket; read by signal handlers. */
static amqp_connection_state_t volatile handshaking = NULL;

/* Life of a connection */
static void say_goodbye(Broker *broker);

/* Failure */
static bool lose(Broker *broker, int code, const char *format,...)
			__attribute__((format(printf, 3, 4)));
static bool lose_status(Broker *broker, const char *what, int status);
static bool lose_write(Broker *broker, int status);
static const char *hint(const Broker *broker);
static BrokerResult fail_lost(const Broker *broker, BrokerError *error);
static BrokerResult fail_channel(Broker *broker, int number, BrokerError *error);
static void set_reason(const Broker *broker, BrokerError *why, int code, amqp_bytes_t text,
					   int class_id, int method_id);

/* Connecting */
static Broker *new_broker(const BrokerAddress *address, const BrokerOptions *options);
static void announce(Broker *broker, int fd);
static bool open_socket(Broker *broker, const BrokerAddress *address, int64_t deadline);
static bool open_plain(Broker *broker, int fd);
static bool open_tls(Broker *broker, const BrokerAddress *address, const char *peer,
					 int64_t deadline);
static bool set_up_tls(Broker *broker, amqp_socket_t *tls, const char *host);
static bool refuse_tls(Broker *broker, int status);
static void tune_socket(Broker *broker);

/* Login */
static bool log_in(Broker *broker, const BrokerAddress *address,
				   const char *password, int64_t deadline);
static bool authenticate(Broker *broker, const BrokerAddress *address,
						 const char *password, int64_t deadline);
static bool check_start(Broker *broker, const amqp_connection_start_t *start);
static int	server_major(const amqp_table_t *properties);
static bool send_start_ok(Broker *broker, const char *user, const char *password,
						  int64_t deadline);
static bool tune(Broker *broker, const amqp_connection_tune_t *proposed, int64_t deadline);
static bool open_vhost(Broker *broker, const char *vhost, int64_t deadline);
static void explain_login_failure(Broker *broker, const BrokerAddress *address);
static void explain_vhost_failure(Broker *broker, const BrokerAddress *address);

/* Channels */
static bool send_open(Broker *broker, int channel);
static void pay_debts(Broker *broker);
static bool send_request(Broker *broker, int channel, const BrokerRequest *request);
static bool send_queue_request(Broker *broker, int channel, const BrokerRequest *request);
static bool send_exchange_request(Broker *broker, int channel, const BrokerRequest *request);

/* Calls that wait for their answer */
static bool open_and_wait(Broker *broker, int *channel, ChannelUse use, int64_t deadline);
static bool call_on(Broker *broker, int channel, amqp_method_number_t method, void *arguments,
					int64_t deadline);
static bool await_channel(Broker *broker, int channel, int64_t deadline);
static const void *await_reply(Broker *broker, amqp_method_number_t reply, int64_t deadline);
static bool wait_for_frames(Broker *broker, int64_t deadline);

/* Publishing */
static void fill_properties(const BrokerMessage *message, amqp_basic_properties_t *properties);
static BrokerResult publish_content(Broker *broker, int channel, amqp_basic_publish_t *publish,
									const Content *content, long timeout_ms, BrokerError *error);
static bool may_publish(Broker *broker, int channel);
static void tidy_properties(amqp_basic_properties_t *properties);
static bool is_named(const amqp_table_entry_t *entry, const char *name);
static bool send_content_header(Broker *broker, int channel, const Content *content,
								long timeout_ms);
static bool send_content_body(Broker *broker, int channel, const char *body, size_t len,
							  long timeout_ms);

/* Consuming */
static BrokerResult settle_delivery(Broker *broker, amqp_method_number_t method, void *arguments,
									long timeout_ms, BrokerError *error);
static bool begin_delivery(Broker *broker, const amqp_basic_deliver_t *deliver);
static bool take_properties(Broker *broker, const amqp_basic_properties_t *properties);
static bool keep_properties(BrokerDelivery *delivery, amqp_bytes_t encoded);
static void delivery_assembled(Broker *broker, Channel *channel);
static BrokerField *keep_table(BrokerDelivery *delivery, const amqp_table_t *table, int depth);
static BrokerField *keep_array(BrokerDelivery *delivery, const amqp_array_t *array, int depth);
static bool keep_value(BrokerDelivery *delivery, BrokerField *field,
					   const amqp_field_value_t *value, int depth);

/* Tables */
static bool fill_table(Broker *broker, const BrokerField *fields, int nfields,
					   amqp_table_t *table);
static void fill_entry(const BrokerField *field, amqp_table_entry_t *entry);
static amqp_table_entry_t text_entry(const char *key, const char *value);
static amqp_table_entry_t true_entry(const char *key);

/* Writing */
static bool send_method(Broker *broker, int channel, amqp_method_number_t id,
						void *arguments, size_t size, long timeout_ms);
static bool send_frame(Broker *broker, const amqp_frame_t *frame, size_t size,
					   long timeout_ms);
static bool wait_for_room(Broker *broker, size_t size, long timeout_ms);
static bool write_frame(Broker *broker, const amqp_frame_t *frame);
static bool encode_frame(Broker *broker, const amqp_frame_t *frame);
static int	encode_payload(const amqp_frame_t *frame, amqp_bytes_t to);
static void put_number(unsigned char *to, int bytes, uint64_t number);
static bool write_out(Broker *broker);
static bool write_method(Broker *broker, int channel, amqp_method_number_t id, void *arguments);
static bool take_room_now(Broker *broker, size_t size);
static void refill_credit(Broker *broker);

/* Reading */
static void nothing_to_fetch(Broker *broker, BrokerEvent *event);
static void set_empty_event(BrokerEvent *event, BrokerEventType type);
static bool read_frame(Broker *broker, amqp_frame_t *frame);
static int	receive_frame(Broker *broker, amqp_frame_t *frame);
static int	decode_received(Broker *broker, amqp_frame_t *frame);
static bool begin_frame(Broker *broker, const FrameHead *head);
static int	receive(Broker *broker);
static void serve_heartbeats(Broker *broker);
static void drain(Broker *broker);
static void dispatch(Broker *broker, const amqp_frame_t *frame);
static void dispatch_connection(Broker *broker, const amqp_frame_t *frame);
static void dispatch_channel(Broker *broker, const amqp_frame_t *frame);
static void dispatch_content(Broker *broker, const amqp_frame_t *frame);
static bool dispatch_content_method(Broker *broker, int number, const amqp_method_t *method);
static void dispatch_method(Broker *broker, int number, const amqp_method_t *method);
static void dispatch_delivery(Broker *broker, Channel *channel, const amqp_basic_deliver_t *deliver);
static void dispatch_return(Broker *broker, int number, const amqp_basic_return_t *returned);
static void dispatch_other(Broker *broker, int number, const amqp_method_t *method);
static void channel_opened(Broker *broker, int number);
static void channel_answered(Broker *broker, int number, const amqp_method_t *method);
static void connection_closed(Broker *broker, const amqp_connection_close_t *close);
static void connection_blocked(Broker *broker, const amqp_connection_blocked_t *blocked);
static void connection_unblocked(Broker *broker);
static void channel_closed(Broker *broker, int number, const amqp_channel_close_t *close);
static void confirmed(Broker *broker, int number, BrokerEventType type, uint64_t tag, bool multiple);
static bool is_delivery(const Broker *broker, const Channel *channel);
static AssembleResult content_header(Broker *broker, Channel *channel, const amqp_frame_t *frame);
static void content_assembled(Broker *broker, int number, AssembleResult result);
static BrokerEvent *push_event(Broker *broker, BrokerEventType type, int channel);
static bool pop_event(Broker *broker, BrokerEvent *event);
static bool is_method(const amqp_frame_t *frame, int channel, amqp_method_number_t id);

static amqp_bytes_t bytes_of(const char *text);


/*
 * Life of a connection
 */

Broker *
broker_connect(const BrokerAddress *address, const char *password,
			   const BrokerOptions *options, BrokerError *error)
{
	Broker	   *broker = new_broker(address, options);
	int64_t		deadline = clock_ms() + options->connect_timeout_ms;

	if (broker == NULL)
	{
		error_set(error, 0, "out of memory");
		return NULL;
	}
	if (password == NULL)
		password = address->password ? address->password : "";

	if (open_socket(broker, address, deadline) &&
		log_in(broker, address, password, deadline) &&
		(!options->consumer ||
		 open_and_wait(broker, &broker->consuming, CHANNEL_CONSUMES, deadline)))
		return broker;

	(void) fail_channel(broker, broker->consuming, error);
	broker_close(broker, false);
	return NULL;
}

void
broker_close(Broker *broker, bool polite)
{
	int			fd;

	if (polite && !broker->mid_message && broker_writable(broker, METHOD_SIZE))
		say_goodbye(broker);

	/* The library would begin a TLS shutdown; spare it a dead peer. */
	fd = broker->conn ? amqp_get_sockfd(broker->conn) : -1;
	announce(broker, -1);
	if (fd >= 0)
		shutdown(fd, SHUT_RDWR);
	amqp_destroy_connection(broker->conn);

	broker_free_delivery(broker->delivery);
	channels_destroy(&broker->channels);
	events_destroy(&broker->events);
	empty_amqp_pool(&broker->forwarded);
	free(broker->entries);
	free(broker);
}

/*
 * Without the answer, RabbitMQ would log a warning about a client that went
 * away.  Whatever else it still says is of no interest.
 */
static void
say_goodbye(Broker *broker)
{
	int64_t		deadline = clock_ms() + GOODBYE_MS;
	amqp_connection_close_t close = {.reply_code = AMQP_REPLY_SUCCESS};
	amqp_frame_t frame;

	broker_uncork(broker);
	if (!send_method(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_CLOSE_METHOD,
					 &close, METHOD_SIZE, 0))
		return;
	while (!broker->lost && clock_left(deadline) > 0)
	{
		broker->reads = 0;		/* keeps read_frame() from calling wait() */
		if (read_frame(broker, &frame))
		{
			if (is_method(&frame, CHANNEL_CONNECTION, AMQP_CONNECTION_CLOSE_OK_METHOD))
				return;
		}
		else if (!broker->lost)
			tcp_wait_readable(broker->fd, clock_left(deadline));
	}
}

int
broker_fd(const Broker *broker)
{
	return broker->fd;
}

bool
broker_blocked(const Broker *broker)
{
	return broker->blocked;
}

int
broker_major(const Broker *broker)
{
	return broker->major;
}

/* The last one is for broker_call(). */
int
broker_max_channels(const Broker *broker)
{
	return broker->channels.limit - 1;
}

int
broker_free_channels(const Broker *broker)
{
	return broker_max_channels(broker) - broker->channels.taken;
}

int
broker_closing_channels(const Broker *broker)
{
	return channels_closing(&broker->channels);
}

long
broker_next_heartbeat(const Broker *broker)
{
	if (broker->heartbeat == 0 || broker->lost)
		return HEARTBEAT_NEVER_MS;
	return clock_left(broker->last_read_ms + broker->heartbeat * 1000 / 2);
}

int
broker_handshake_fd(void)
{
	amqp_connection_state_t conn = handshaking;

	return conn ? amqp_get_sockfd(conn) : -1;
}


/*
 * Failure
 */

/* Gives the connection up, unless it was before.  Returns false. */
static bool
lose(Broker *broker, int code, const char *format,...)
{
	va_list		args;
	int			fd;

	if (broker->lost)
		return false;
	broker->lost = true;
	va_start(args, format);
	error_set_args(&broker->why, code, format, args);
	va_end(args);

	fd = amqp_get_sockfd(broker->conn);
	announce(broker, -1);
	if (fd >= 0)
		shutdown(fd, SHUT_RDWR);
	return false;
}

/* The same, for a status of the library.  errno must be the call's. */
static bool
lose_status(Broker *broker, const char *what, int status)
{
	int			saved_errno = errno;

	if (status == AMQP_STATUS_HEARTBEAT_TIMEOUT)
		return lose(broker, 0, "no heartbeat from %s for %d s",
					broker->where, 2 * broker->heartbeat);
	if (status == AMQP_STATUS_CONNECTION_CLOSED || status == AMQP_STATUS_SOCKET_CLOSED)
		return lose(broker, 0, "%s closed the connection unexpectedly%s", broker->where, hint(broker));
	if (status == AMQP_STATUS_SOCKET_ERROR && saved_errno != 0)
		return lose(broker, 0, "could not %s %s: %s%s", what, broker->where,
					strerror(saved_errno), hint(broker));
	if (status == AMQP_STATUS_SSL_ERROR && tls_reason() != NULL)
		return lose(broker, 0, "TLS connection to %s failed: %s", broker->where, tls_reason());
	if (status == AMQP_STATUS_SSL_ERROR && saved_errno != 0)
		return lose(broker, 0, "TLS connection to %s failed: %s", broker->where,
					strerror(saved_errno));
	return lose(broker, 0, "could not %s %s: %s%s", what, broker->where,
				amqp_error_string2(status), hint(broker));
}

/* The same for a write: a last word of the broker explains more than a broken pipe does. */
static bool
lose_write(Broker *broker, int status)
{
	int			saved_errno = errno;

	broker->write_failed = true;
	if (status == AMQP_STATUS_SOCKET_ERROR || status == AMQP_STATUS_SSL_ERROR)
		drain(broker);
	errno = saved_errno;
	return lose_status(broker, "write to", status);
}

/* For texts about a peer that may never have spoken AMQP. */
static const char *
hint(const Broker *broker)
{
	return broker->greeted ? "" : " (does the port expect TLS?)";
}

static BrokerResult
fail_lost(const Broker *broker, BrokerError *error)
{
	*error = broker->why;
	return BROKER_LOST;
}

/* Why a channel did not do what it should. */
static BrokerResult
fail_channel(Broker *broker, int number, BrokerError *error)
{
	const Channel *channel = channels_get(&broker->channels, number);

	if (broker->lost)
		return fail_lost(broker, error);
	if (channel != NULL && channel->why != NULL)
		*error = *channel->why;
	else
		error_set(error, 0, "channel %d is not open", number);
	return BROKER_REFUSED;
}

/* Why the broker closed something, in its words if it has any. */
static void
set_reason(const Broker *broker, BrokerError *why, int code, amqp_bytes_t text,
		   int class_id, int method_id)
{
	error_set(why, code, "closed by %s with code %d", broker->where, code);
	if (text.len > 0)
		error_copy_text(why->text, sizeof(why->text), text.bytes, text.len);
	why->class_id = class_id;
	why->method_id = method_id;
}


/*
 * Connecting
 */

static Broker *
new_broker(const BrokerAddress *address, const BrokerOptions *options)
{
	Broker	   *broker = calloc(1, sizeof(Broker));
	bool		ipv6 = strchr(address->host, ':') != NULL;

	if (broker == NULL)
		return NULL;
	broker->conn = amqp_new_connection();
	if (broker->conn == NULL)
	{
		free(broker);
		return NULL;
	}
	init_amqp_pool(&broker->forwarded, 4096);
	broker->options = options;
	broker->fd = -1;
	broker->frame_max = FRAME_MIN;
	broker->last_read_ms = clock_ms();
	broker->last_received_ms = broker->last_read_ms;
	snprintf(broker->where, sizeof(broker->where), ipv6 ? "[%s]:%d" : "%s:%d",
			 address->host, address->port);
	return broker;
}

/* Every change of the socket goes through here, for the signal handler. */
static void
announce(Broker *broker, int fd)
{
	if (fd == broker->fd)
		return;
	broker->fd = fd;
	broker->options->fd_changed(fd);
}

/*
 * Connects, and hands the socket over to the library.  For TLS, too, we connect
 * ourselves first, and let that connection go: the library opens its TLS socket
 * in one blocking call, which must not be where a host is looked up or found
 * out to be unreachable.
 */
static bool
open_socket(Broker *broker, const BrokerAddress *address, int64_t deadline)
{
	char		problem[sizeof(broker->why.text)];
	char		peer[BROKER_MAX_SHORTSTR + 1];
	bool		known;
	int			fd = tcp_connect(address->host, address->port, deadline,
								 broker->options->wait, broker->options->fd_changed,
								 problem, sizeof(problem));

	if (fd < 0)
		return lose(broker, 0, "%s", problem);
	broker->fd = fd;
	if (!address->tls)
		return open_plain(broker, fd);

	known = tcp_peer(fd, peer, sizeof(peer));
	announce(broker, -1);
	close(fd);
	if (!known)
		return lose(broker, 0, "could not connect to %s: the connection was closed", broker->where);
	return open_tls(broker, address, peer, deadline);
}

/* Hands the socket over to the library. */
static bool
open_plain(Broker *broker, int fd)
{
	amqp_socket_t *plain = amqp_tcp_socket_new(broker->conn);

	if (plain == NULL)
	{
		close(fd);
		return lose(broker, 0, "out of memory");
	}
	amqp_tcp_socket_set_sockfd(plain, fd);
	tune_socket(broker);
	return true;
}

/*
 * Opens a TLS socket of the library's to peer, the address that answered.  The
 * name, for the server and for its certificate, is address->host all the same.
 */
static bool
open_tls(Broker *broker, const BrokerAddress *address, const char *peer, int64_t deadline)
{
	amqp_socket_t *tls = amqp_ssl_socket_new(broker->conn);
	struct timeval timeout;
	int			status;

	if (tls == NULL)
		return lose(broker, 0, "could not set up TLS");
	if (!set_up_tls(broker, tls, address->host))
		return false;

	timeout.tv_sec = clock_left(deadline) / 1000;
	timeout.tv_usec = clock_left(deadline) % 1000 * 1000;
	handshaking = broker->conn;
	status = amqp_socket_open_noblock(tls, peer, address->port, &timeout);
	handshaking = NULL;
	if (status != AMQP_STATUS_OK)
		return refuse_tls(broker, status);

	broker->greeted = true;
	broker->tls = tls_session();
	announce(broker, amqp_get_sockfd(broker->conn));
	tune_socket(broker);
	return true;
}

/*
 * OpenSSL verifies the host name (tls_verify()); the library would refuse a
 * certificate that is for an address.
 */
static bool
set_up_tls(Broker *broker, amqp_socket_t *tls, const char *host)
{
	const BrokerOptions *options = broker->options;
	void	   *context = amqp_ssl_socket_get_context(tls);
	char		problem[sizeof(broker->why.text)];

	tls_begin(context, host);
	amqp_ssl_socket_set_verify_peer(tls, options->tls_verify);
	amqp_ssl_socket_set_verify_hostname(tls, false);

	if (options->tls_verify && !tls_verify(context, host))
		return lose(broker, 0, "could not set up TLS");
	if ((options->tls_verify || options->tls_ca_file != NULL) &&
		!tls_trust(context, options->tls_ca_file, problem, sizeof(problem)))
		return lose(broker, 0, "%s", problem);

	if ((options->tls_cert_file == NULL) != (options->tls_key_file == NULL))
		return lose(broker, 0, "certificate file and key file must be set together");
	if (options->tls_cert_file != NULL &&
		!tls_identify(context, options->tls_cert_file, options->tls_key_file,
					  problem, sizeof(problem)))
		return lose(broker, 0, "%s", problem);
	return true;
}

static bool
refuse_tls(Broker *broker, int status)
{
	const char *reason = tls_rejection();

	if (reason != NULL)
		return lose(broker, 0, "could not connect to %s: the server's certificate could not be verified: %s",
					broker->where, reason);
	if (status == AMQP_STATUS_TIMEOUT)
		return lose(broker, 0, "could not connect to %s: TLS handshake timed out",
					broker->where);
	if (status == AMQP_STATUS_SSL_CONNECTION_FAILED)
		return lose(broker, 0, "could not connect to %s: TLS handshake failed: %s",
					broker->where, tls_reason() ? tls_reason() : "the connection was closed");
	return lose(broker, 0, "could not connect to %s: %s", broker->where,
				amqp_error_string2(status));
}


/*
 * The user timeout bounds what slips through to a blocking write.  It has to
 * be off while the broker has blocked us: a broker that reads nothing is then
 * no reason to give up, and the heartbeats still tell a dead one.
 */
static void
tune_socket(Broker *broker)
{
	tcp_set_user_timeout(broker->fd, USER_TIMEOUT_MS);
	credit_init(&broker->credit, tcp_tune(broker->fd));
}


/*
 * Login (AMQP 0-9-1, section 2.2.4).  amqp_login() would do it in one call
 * that serves no interrupts, and takes any frame_max.
 */

static bool
log_in(Broker *broker, const BrokerAddress *address, const char *password,
	   int64_t deadline)
{
	if (!authenticate(broker, address, password, deadline))
	{
		explain_login_failure(broker, address);
		return false;
	}
	if (!open_vhost(broker, address->vhost, deadline))
	{
		explain_vhost_failure(broker, address);
		return false;
	}
	return true;
}

static bool
authenticate(Broker *broker, const BrokerAddress *address, const char *password,
			 int64_t deadline)
{
	const void *reply;
	int			status;

	errno = 0;
	status = amqp_send_header(broker->conn);
	if (status != AMQP_STATUS_OK)
		return lose_write(broker, status);

	reply = await_reply(broker, AMQP_CONNECTION_START_METHOD, deadline);
	if (reply == NULL || !check_start(broker, reply))
		return false;
	broker->greeted = true;
	broker->major = server_major(&((const amqp_connection_start_t *) reply)->server_properties);
	if (!send_start_ok(broker, address->user, password, deadline))
		return false;

	reply = await_reply(broker, AMQP_CONNECTION_TUNE_METHOD, deadline);
	return reply != NULL && tune(broker, reply, deadline);
}

static bool
check_start(Broker *broker, const amqp_connection_start_t *start)
{
	const char *word = start->mechanisms.bytes;
	const char *end = word + start->mechanisms.len;

	if (start->version_major != 0 || start->version_minor != 9)
		return lose(broker, 0, "%s speaks AMQP %d.%d, not 0.9", broker->where,
					start->version_major, start->version_minor);

	while (word != NULL && word < end)
	{
		const char *space = memchr(word, ' ', (size_t) (end - word));
		size_t		len = (size_t) ((space ? space : end) - word);

		if (len == 5 && memcmp(word, "PLAIN", 5) == 0)
			return true;
		word += len + 1;
	}
	return lose(broker, 0, "%s does not offer authentication mechanism PLAIN",
				broker->where);
}

/* Of "4.0.5": 4. */
static int
leading_number(amqp_bytes_t text)
{
	const char *digit = text.bytes;
	int			number = 0;

	for (size_t n = text.len; n > 0 && *digit >= '0' && *digit <= '9' && number < 1000; n--)
		number = number * 10 + *digit++ - '0';
	return number;
}

static int
server_major(const amqp_table_t *properties)
{
	for (int i = 0; i < properties->num_entries; i++)
	{
		const amqp_table_entry_t *entry = &properties->entries[i];

		if (entry->key.len == 7 && memcmp(entry->key.bytes, "version", 7) == 0 &&
			entry->value.kind == AMQP_FIELD_KIND_UTF8)
			return leading_number(entry->value.value.bytes);
	}
	return 0;
}

static bool
send_start_ok(Broker *broker, const char *user, const char *password, int64_t deadline)
{
	/* connection.blocked is sent only to a client that says it knows it */
	amqp_table_entry_t capabilities[] = {
		true_entry("connection.blocked"),
		true_entry("basic.nack"),
		true_entry("publisher_confirms"),
		true_entry("consumer_cancel_notify"),
		true_entry("exchange_exchange_bindings"),
		true_entry("authentication_failure_close"),
	};
	amqp_table_entry_t properties[] = {
		text_entry("product", "pg_fanout"),
		text_entry("version", PG_FANOUT_VERSION),
		text_entry("connection_name", broker->options->connection_name),
		{.key = bytes_of("capabilities"),.value = {.kind = AMQP_FIELD_KIND_TABLE}},
	};
	amqp_connection_start_ok_t ok = {
		.client_properties = {.num_entries = 4,.entries = properties},
		.mechanism = bytes_of("PLAIN"),
		.locale = bytes_of("en_US"),
	};
	size_t		user_len = strlen(user);
	size_t		password_len = strlen(password);
	char	   *response;
	bool		sent;

	properties[3].value.value.table.num_entries = 6;
	properties[3].value.value.table.entries = capabilities;

	if (user_len > BROKER_MAX_SHORTSTR || password_len > FRAME_MIN / 2)
		return lose(broker, 0, "user name or password is too long");

	/* RFC 4616: an empty authorization identity, user, password */
	ok.response.len = user_len + password_len + 2;
	response = malloc(ok.response.len);
	if (response == NULL)
		return lose(broker, 0, "out of memory");
	ok.response.bytes = response;
	response[0] = '\0';
	memcpy(response + 1, user, user_len + 1);
	memcpy(response + user_len + 2, password, password_len);

	sent = send_method(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_START_OK_METHOD,
					   &ok, 2 * FRAME_MIN, clock_left(deadline));
	explicit_bzero(response, ok.response.len);
	free(response);
	return sent;
}

/* How many channels the connection has, if so many may be opened. */
static int
channels_with(const BrokerOptions *options, int opened)
{
	return (opened < CHANNELS_MAX ? opened : CHANNELS_MAX) + options->consumer + 1;
}

/*
 * Settles the limits.  The checks stand before amqp_tune_connection(): a
 * frame_max under the protocol's minimum would make the library write past
 * its buffer (GHSA-jh48-qjf5-fx5v).
 */
static bool
tune(Broker *broker, const amqp_connection_tune_t *proposed, int64_t deadline)
{
	amqp_connection_tune_ok_t ok = {
		.channel_max = (uint16_t) channels_with(broker->options, broker->options->max_channels),
		.frame_max = FRAME_MAX,
		.heartbeat = (uint16_t) broker->options->heartbeat_s,
	};

	if (proposed->channel_max != 0 && proposed->channel_max < channels_with(broker->options, broker->options->min_channels))
		return lose(broker, 0, "%s allows only %d channels per connection, %d are needed",
					broker->where, proposed->channel_max, channels_with(broker->options, broker->options->min_channels));
	if (proposed->frame_max != 0 && proposed->frame_max < FRAME_MIN)
		return lose(broker, 0, "%s proposes an invalid frame size", broker->where);

	if (proposed->channel_max != 0 && proposed->channel_max < ok.channel_max)
		ok.channel_max = proposed->channel_max;
	if (proposed->frame_max != 0 && proposed->frame_max < ok.frame_max)
		ok.frame_max = proposed->frame_max;
	if (ok.heartbeat != 0 && proposed->heartbeat != 0 && proposed->heartbeat < ok.heartbeat)
		ok.heartbeat = proposed->heartbeat;
	/* a peer is given up after two; what the server proposes is no limit */
	if (ok.heartbeat != 0)
		ok.heartbeat = ok.heartbeat * 2 < broker->options->away_s ? (broker->options->away_s + 1) / 2 : ok.heartbeat;

	if (amqp_tune_connection(broker->conn, ok.channel_max, (int) ok.frame_max, 0) != AMQP_STATUS_OK ||
		!channels_init(&broker->channels, ok.channel_max))
		return lose(broker, 0, "out of memory");
	broker->frame_max = ok.frame_max;
	broker->heartbeat = ok.heartbeat;
	return send_method(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_TUNE_OK_METHOD, &ok,
					   METHOD_SIZE, clock_left(deadline));
}

static bool
open_vhost(Broker *broker, const char *vhost, int64_t deadline)
{
	amqp_connection_open_t open = {0};

	open.virtual_host = bytes_of(vhost);
	return send_method(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_OPEN_METHOD, &open,
					   METHOD_SIZE, clock_left(deadline)) &&
		await_reply(broker, AMQP_CONNECTION_OPEN_OK_METHOD, deadline) != NULL;
}

static void
explain_login_failure(Broker *broker, const BrokerAddress *address)
{
	if (broker->why.code == AMQP_ACCESS_REFUSED)
		error_set(&broker->why, AMQP_ACCESS_REFUSED,
				  "authentication failed for user \"%s\" at %s",
				  address->user, broker->where);
}

/* The broker's own words say which of the two it was, if it tells. */
static void
explain_vhost_failure(Broker *broker, const BrokerAddress *address)
{
	BrokerError why = broker->why;

	if (why.code == AMQP_NOT_ALLOWED || why.code == AMQP_ACCESS_REFUSED ||
		why.code == AMQP_NOT_FOUND)
		error_set(&broker->why, why.code,
				  "vhost \"%s\" at %s does not exist or user \"%s\" may not access it (%.200s)",
				  address->vhost, broker->where, address->user, why.text);
}


/*
 * Channels
 */

int
broker_open_channel(Broker *broker, bool confirms, BrokerError *error)
{
	int			channel;

	if (broker->lost)
	{
		(void) fail_lost(broker, error);
		return 0;
	}
	pay_debts(broker);
	if (!take_room_now(broker, 2 * SMALL_METHOD_SIZE))
	{
		error_set(error, 0, "no room in the socket to %s for now", broker->where);
		return 0;
	}
	channel = channels_open(&broker->channels, confirms ? CHANNEL_PUBLISHES : CHANNEL_REQUESTS);
	if (channel == 0)
		error_set(error, 0, "no channel to %s is free", broker->where);
	else if (!send_open(broker, channel))
	{
		(void) fail_lost(broker, error);
		return 0;
	}
	return channel;
}

/* Only with credit for it. */
static bool
send_open(Broker *broker, int channel)
{
	amqp_channel_open_t open = {0};
	amqp_confirm_select_t select = {0};

	return write_method(broker, channel, AMQP_CHANNEL_OPEN_METHOD, &open) &&
		(channels_get(&broker->channels, channel)->use != CHANNEL_PUBLISHES ||
		 write_method(broker, channel, AMQP_CONFIRM_SELECT_METHOD, &select));
}

void
broker_close_channel(Broker *broker, int channel)
{
	channels_close(&broker->channels, channel);
	pay_debts(broker);
}

/*
 * Writes the closes that channels owe, as far as there is room for them.  Not in the
 * middle of a message: RabbitMQ's reader knows nothing of the close that its channel
 * process has sent, and ends the connection if it finds a method where it expects the
 * rest of a content (501, UNEXPECTED_FRAME).
 */
static void
pay_debts(Broker *broker)
{
	amqp_channel_close_t close = {.reply_code = AMQP_REPLY_SUCCESS};
	amqp_channel_close_ok_t close_ok = {0};
	int			channel;

	if (broker->mid_message)
		return;
	while ((channel = channels_debtor(&broker->channels)) != 0 &&
		   take_room_now(broker, SMALL_METHOD_SIZE))
	{
		bool		ours = channels_get(&broker->channels, channel)->debt == CHANNEL_OWES_CLOSE;

		channels_paid(&broker->channels);
		(void) (ours ? write_method(broker, channel, AMQP_CHANNEL_CLOSE_METHOD, &close) :
				write_method(broker, channel, AMQP_CHANNEL_CLOSE_OK_METHOD, &close_ok));
	}
}

BrokerResult
broker_request(Broker *broker, int channel, const BrokerRequest *request, BrokerError *error)
{
	const Channel *c = channels_get(&broker->channels, channel);

	if (broker->lost || c == NULL || !channel_is_open(c) ||
		(c->use != CHANNEL_REQUESTS && c->use != CHANNEL_CALLS))
		return fail_channel(broker, channel, error);
	if (!request_check(request, broker->frame_max, error))
		return BROKER_TOO_LARGE;
	if (c->state == CHANNEL_ASKED)
	{
		error_set(error, 0, "the request before is not answered yet");
		return BROKER_BUSY;
	}
	if (!take_room_now(broker, request_size(request)))
	{
		error_set(error, 0, "no room in the socket to %s for now", broker->where);
		return BROKER_BUSY;
	}
	if (!send_request(broker, channel, request))
		return fail_lost(broker, error);
	channels_ask(&broker->channels, channel, request_method(request->kind) + 1,
				 request_method(request->kind) == AMQP_QUEUE_DECLARE_METHOD ? request->queue : NULL);
	return BROKER_OK;
}

/* Only with credit for it. */
static bool
send_request(Broker *broker, int channel, const BrokerRequest *request)
{
	switch (request->kind)
	{
		case BROKER_DECLARE_EXCHANGE:
		case BROKER_DELETE_EXCHANGE:
			return send_exchange_request(broker, channel, request);
		case BROKER_DECLARE_QUEUE:
		case BROKER_INSPECT_QUEUE:
		case BROKER_DELETE_QUEUE:
		case BROKER_BIND_QUEUE:
		case BROKER_UNBIND_QUEUE:
			break;
	}
	return send_queue_request(broker, channel, request);
}

static bool
send_exchange_request(Broker *broker, int channel, const BrokerRequest *request)
{
	amqp_exchange_declare_t declare = {
		.exchange = bytes_of(request->exchange),
		.type = bytes_of("fanout"),
		.durable = 1,
	};
	amqp_exchange_delete_t delete = {
		.exchange = declare.exchange,
		.if_unused = request->if_unused,
	};

	return write_method(broker, channel, request_method(request->kind),
						request->kind == BROKER_DECLARE_EXCHANGE ? (void *) &declare : &delete);
}

static bool
send_queue_request(Broker *broker, int channel, const BrokerRequest *request)
{
	amqp_queue_declare_t declare = {
		.queue = bytes_of(request->queue),
		.passive = request->kind == BROKER_INSPECT_QUEUE,
		.durable = request->kind == BROKER_DECLARE_QUEUE,
	};
	amqp_queue_delete_t delete = {
		.queue = declare.queue,
		.if_unused = request->if_unused,
		.if_empty = request->if_empty,
	};
	amqp_queue_bind_t bind = {.queue = declare.queue,.exchange = bytes_of(request->exchange)};
	amqp_queue_unbind_t unbind = {.queue = bind.queue,.exchange = bind.exchange};
	void	   *arguments = &declare;

	if (request->kind == BROKER_DELETE_QUEUE)
		arguments = &delete;
	else if (request->kind == BROKER_BIND_QUEUE)
		arguments = &bind;
	else if (request->kind == BROKER_UNBIND_QUEUE)
		arguments = &unbind;
	return fill_table(broker, request->arguments, request->narguments, &declare.arguments) &&
		write_method(broker, channel, request_method(request->kind), arguments);
}


/*
 * Calls that wait for their answer
 */

/*
 * Runs on a channel for such calls, which is opened if it is not open, and ends
 * with a refusal.
 */
BrokerResult
broker_call(Broker *broker, const BrokerRequest *request, uint32_t *messages,
			uint32_t *consumers, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	BrokerResult result;

	if (broker->lost)
		return fail_lost(broker, error);
	if (!request_check(request, broker->frame_max, error))
		return BROKER_TOO_LARGE;

	/* A corked request would stay in the kernel for a while. */
	broker_uncork(broker);
	if (open_and_wait(broker, &broker->calls, CHANNEL_CALLS, deadline) &&
		wait_for_room(broker, request_size(request), clock_left(deadline)) &&
		broker_request(broker, broker->calls, request, error) == BROKER_OK &&
		await_channel(broker, broker->calls, deadline))
	{
		if (messages != NULL)
			*messages = broker->messages;
		if (consumers != NULL)
			*consumers = broker->consumers;
		return BROKER_OK;
	}

	result = fail_channel(broker, broker->calls, error);
	broker_close_channel(broker, broker->calls);
	broker->calls = 0;
	return result;
}

/*
 * Opens one of the connection's own channels, unless it is open.  Its number may
 * be that of one that the broker closed, with close-ok not written yet.  Returns
 * false if the connection is lost, or the channel was closed by the broker.
 */
static bool
open_and_wait(Broker *broker, int *channel, ChannelUse use, int64_t deadline)
{
	const Channel *c = channels_get(&broker->channels, *channel);

	if (broker->lost)
		return false;
	if (c != NULL && c->state == CHANNEL_OPEN)
		return true;
	broker_close_channel(broker, *channel);
	*channel = 0;
	while (channels_debtor(&broker->channels) != 0 ||
		   !credit_covers(&broker->credit, SMALL_METHOD_SIZE))
	{
		if (!wait_for_room(broker, SMALL_METHOD_SIZE, clock_left(deadline)))
			return false;
		pay_debts(broker);
	}
	*channel = channels_open(&broker->channels, use);
	if (*channel == 0)
		return lose(broker, 0, "out of memory");
	return credit_take(&broker->credit, SMALL_METHOD_SIZE) && send_open(broker, *channel) &&
		await_channel(broker, *channel, deadline);
}

/*
 * Sends a method and waits for its answer, the method with the next number.
 * Returns false if the connection was lost, or the channel refused.
 */
static bool
call_on(Broker *broker, int channel, amqp_method_number_t method, void *arguments,
		int64_t deadline)
{
	if (!send_method(broker, channel, method, arguments, METHOD_SIZE, clock_left(deadline)))
		return false;
	channels_ask(&broker->channels, channel, method + 1, NULL);
	return await_channel(broker, channel, deadline);
}

/*
 * Waits until a channel has its answer.  Returns false if the connection was
 * lost, or the channel refused.
 */
static bool
await_channel(Broker *broker, int channel, int64_t deadline)
{
	const Channel *c = channels_get(&broker->channels, channel);
	amqp_frame_t frame;

	while (!broker->lost && channel_awaits_answer(c))
	{
		if (clock_left(deadline) > 0 && read_frame(broker, &frame))
			dispatch(broker, &frame);
		else if (!wait_for_frames(broker, deadline))
			return false;
	}
	return !broker->lost && c->state == CHANNEL_OPEN;
}

/*
 * Waits for a method on the connection, during the login.  Returns it decoded,
 * valid until the next read, or NULL if the connection was lost.
 */
static const void *
await_reply(Broker *broker, amqp_method_number_t reply, int64_t deadline)
{
	amqp_frame_t frame;

	do
	{
		while (clock_left(deadline) > 0 && read_frame(broker, &frame))
		{
			if (is_method(&frame, CHANNEL_CONNECTION, reply))
				return frame.payload.method.decoded;
			dispatch(broker, &frame);
		}
	} while (wait_for_frames(broker, deadline));
	return NULL;
}

/* Waits a while for something to read; gives the connection up at the deadline. */
static bool
wait_for_frames(Broker *broker, int64_t deadline)
{
	long		left = clock_left(deadline);

	if (broker->lost || !write_out(broker))
		return false;
	if (left == 0)
		return lose(broker, 0, "no reply from %s in time", broker->where);
	broker->options->wait(broker->fd, false, left < READ_SLICE_MS ? left : READ_SLICE_MS);
	return true;
}


/*
 * Publishing
 */

/*
 * Writes a message: method, content header, body.  The channel may be closed by the
 * broker at each wait for room.  Then the rest of a message that was begun is written
 * all the same, and close-ok behind it.
 */
static BrokerResult
publish_content(Broker *broker, int channel, amqp_basic_publish_t *publish, const Content *content,
				long timeout_ms, BrokerError *error)
{
	Channel    *c = channels_get(&broker->channels, channel);
	bool		sent;

	sent = send_method(broker, channel, AMQP_BASIC_PUBLISH_METHOD, publish,
					   publish->exchange.len + publish->routing_key.len + 32, timeout_ms);
	broker->mid_message = sent;
	sent = sent && send_content_header(broker, channel, content, timeout_ms) &&
		send_content_body(broker, channel, content->body, content->body_len, timeout_ms);
	broker->mid_message = false;
	if (!sent || c->state != CHANNEL_OPEN)
		return fail_channel(broker, channel, error);

	c->published++;
	return BROKER_OK;
}

static bool
may_publish(Broker *broker, int channel)
{
	const Channel *c = channels_get(&broker->channels, channel);

	return !broker->lost && c != NULL && c->state == CHANNEL_OPEN && c->use == CHANNEL_PUBLISHES;
}

BrokerResult
broker_publish(Broker *broker, int channel, const BrokerMessage *message, long timeout_ms,
			   BrokerError *error)
{
	amqp_basic_publish_t publish = {
		.exchange = bytes_of(message->exchange),
		.routing_key = bytes_of(message->routing_key),
		.mandatory = 1,
	};
	Content		content = {.body = message->body,.body_len = message->body_len};

	if (!may_publish(broker, channel))
		return fail_channel(broker, channel, error);
	if (!message_check(message, broker->frame_max, &content.header_size, error))
		return BROKER_TOO_LARGE;
	fill_properties(message, &content.properties);
	if (!fill_table(broker, message->headers, message->nheaders, &content.properties.headers))
		return fail_channel(broker, channel, error);
	return publish_content(broker, channel, &publish, &content, timeout_ms, error);
}

/*
 * Is it a header that the broker would act on: CC and BCC, which are more queues?  Or one
 * that it adds to each delivery: how often the message was delivered from the queue that
 * it was in (x-acquired-count since RabbitMQ 4.3)?
 */
static bool
stays_behind(const amqp_table_entry_t *entry)
{
	return is_named(entry, "CC") || is_named(entry, "BCC") ||
		is_named(entry, "x-delivery-count") || is_named(entry, "x-acquired-count");
}

/* Takes out those, and user_id, which the broker compares with the login. */
static void
tidy_properties(amqp_basic_properties_t *properties)
{
	amqp_table_t *headers = &properties->headers;
	int			kept = 0;

	properties->_flags &= ~(amqp_flags_t) AMQP_BASIC_USER_ID_FLAG;
	if (!(properties->_flags & AMQP_BASIC_HEADERS_FLAG))
		return;
	for (int i = 0; i < headers->num_entries; i++)
	{
		if (!stays_behind(&headers->entries[i]))
			headers->entries[kept++] = headers->entries[i];
	}
	headers->num_entries = kept;
}

/* The properties are decoded into memory that the next call, or the end, frees. */
BrokerResult
broker_forward(Broker *broker, int channel, const char *queue, const BrokerDelivery *delivery,
			   long timeout_ms, BrokerError *error)
{
	amqp_basic_publish_t publish = {.routing_key = bytes_of(queue),.mandatory = 1};
	Content		content = {.body = delivery->body,.body_len = delivery->body_len};
	amqp_bytes_t encoded = {delivery->properties_len, (void *) delivery->properties};
	void	   *decoded;

	if (!may_publish(broker, channel))
		return fail_channel(broker, channel, error);
	if (!message_check_short("queue name", queue, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	recycle_amqp_pool(&broker->forwarded);
	if (amqp_decode_properties(AMQP_BASIC_CLASS, &broker->forwarded, encoded, &decoded) < 0)
	{
		lose(broker, 0, "out of memory");
		return fail_lost(broker, error);
	}
	content.properties = *(amqp_basic_properties_t *) decoded;
	tidy_properties(&content.properties);
	/* no more than came in one frame */
	content.header_size = delivery->properties_len + HEADER_OVERHEAD;
	return publish_content(broker, channel, &publish, &content, timeout_ms, error);
}

bool
broker_writable(Broker *broker, size_t bytes)
{
	size_t		need = bytes + METHOD_SIZE + 2 * WRITE_OVERHEAD;

	if (broker->lost)
		return false;
	if (!credit_covers(&broker->credit, need))
		refill_credit(broker);
	return !broker->lost && credit_covers(&broker->credit, need);
}

void
broker_cork(Broker *broker)
{
	broker->corked = true;
}

void
broker_uncork(Broker *broker)
{
	broker->corked = false;
	(void) write_out(broker);
}

/* All but the headers. */
static void
fill_properties(const BrokerMessage *message, amqp_basic_properties_t *properties)
{
	memset(properties, 0, sizeof(*properties));
	properties->_flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_HEADERS_FLAG |
		AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG |
		AMQP_BASIC_TIMESTAMP_FLAG | AMQP_BASIC_APP_ID_FLAG;
	properties->content_type = bytes_of(message->content_type);
	properties->delivery_mode = AMQP_DELIVERY_PERSISTENT;
	properties->message_id = bytes_of(message->message_id);
	properties->timestamp = message->timestamp;
	properties->app_id = bytes_of(MESSAGE_APP_ID);
	if (message->type != NULL)
	{
		properties->_flags |= AMQP_BASIC_TYPE_FLAG;
		properties->type = bytes_of(message->type);
	}
}

static bool
send_content_header(Broker *broker, int channel, const Content *content, long timeout_ms)
{
	amqp_frame_t frame;

	frame.frame_type = AMQP_FRAME_HEADER;
	frame.channel = (amqp_channel_t) channel;
	frame.payload.properties.class_id = AMQP_BASIC_CLASS;
	frame.payload.properties.body_size = content->body_len;
	frame.payload.properties.decoded = (void *) &content->properties;
	return send_frame(broker, &frame, content->header_size, timeout_ms);
}

/* Pieces are as large as a frame and the credit allow. */
static bool
send_content_body(Broker *broker, int channel, const char *body, size_t len, long timeout_ms)
{
	size_t		piece = credit_largest(&broker->credit, broker->frame_max) - FRAME_ENVELOPE;
	amqp_frame_t frame;

	frame.frame_type = AMQP_FRAME_BODY;
	frame.channel = (amqp_channel_t) channel;
	while (len > 0)
	{
		size_t		now = len < piece ? len : piece;

		frame.payload.body_fragment.bytes = (void *) body;
		frame.payload.body_fragment.len = now;
		if (!send_frame(broker, &frame, now + FRAME_ENVELOPE, timeout_ms))
			return false;
		body += now;
		len -= now;
	}
	return true;
}


/*
 * Consuming
 */

BrokerResult
broker_consume(Broker *broker, const char *queue, const char *consumer_tag,
			   uint16_t prefetch, const BrokerField *argument, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	amqp_basic_qos_t qos = {.prefetch_count = prefetch};
	amqp_basic_consume_t consume = {0};

	if (!message_check_short("queue name", queue, BROKER_MAX_SHORTSTR, error) ||
		!message_check_short("consumer tag", consumer_tag, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	broker->consumes = true;
	consume.queue = bytes_of(queue);
	consume.consumer_tag = bytes_of(consumer_tag);
	if (!call_on(broker, broker->consuming, AMQP_BASIC_QOS_METHOD, &qos, deadline) ||
		!fill_table(broker, argument, argument != NULL ? 1 : 0, &consume.arguments) ||
		!call_on(broker, broker->consuming, AMQP_BASIC_CONSUME_METHOD, &consume, deadline))
		return fail_channel(broker, broker->consuming, error);
	return BROKER_OK;
}

BrokerResult
broker_cancel(Broker *broker, const char *consumer_tag, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	amqp_basic_cancel_t cancel = {0};

	cancel.consumer_tag = bytes_of(consumer_tag);
	if (!call_on(broker, broker->consuming, AMQP_BASIC_CANCEL_METHOD, &cancel, deadline))
		return fail_channel(broker, broker->consuming, error);
	return BROKER_OK;
}

BrokerResult
broker_ack(Broker *broker, uint64_t tag, bool multiple, long timeout_ms, BrokerError *error)
{
	amqp_basic_ack_t ack = {.delivery_tag = tag,.multiple = multiple};

	return settle_delivery(broker, AMQP_BASIC_ACK_METHOD, &ack, timeout_ms, error);
}

BrokerResult
broker_requeue(Broker *broker, uint64_t tag, long timeout_ms, BrokerError *error)
{
	amqp_basic_nack_t nack = {.delivery_tag = tag,.requeue = 1};

	return settle_delivery(broker, AMQP_BASIC_NACK_METHOD, &nack, timeout_ms, error);
}

static BrokerResult
settle_delivery(Broker *broker, amqp_method_number_t method, void *arguments,
				long timeout_ms, BrokerError *error)
{
	if (!send_method(broker, broker->consuming, method, arguments, SMALL_METHOD_SIZE, timeout_ms))
		return fail_channel(broker, broker->consuming, error);
	return BROKER_OK;
}

static bool
begin_delivery(Broker *broker, const amqp_basic_deliver_t *deliver)
{
	BrokerDelivery *delivery = calloc(1, sizeof(BrokerDelivery));

	broker_free_delivery(broker->delivery);
	broker->delivery = delivery;
	if (delivery == NULL)
		return false;
	delivery->tag = broker->delivery_tag = deliver->delivery_tag;
	delivery->redelivered = deliver->redelivered;
	delivery->size = sizeof(BrokerDelivery);
	return true;
}

/* Returns false if there is no memory for them. */
static bool
take_properties(Broker *broker, const amqp_basic_properties_t *properties)
{
	BrokerDelivery *delivery = broker->delivery;
	amqp_flags_t flags = properties->_flags;

	delivery->has_timestamp = (flags & AMQP_BASIC_TIMESTAMP_FLAG) != 0;
	delivery->timestamp = delivery->has_timestamp ? properties->timestamp : 0;
	if ((flags & AMQP_BASIC_MESSAGE_ID_FLAG) &&
		(delivery->message_id = delivery_keep_text(delivery, properties->message_id.bytes, properties->message_id.len)) == NULL)
		return false;
	if ((flags & AMQP_BASIC_CONTENT_TYPE_FLAG) &&
		(delivery->content_type = delivery_keep_text(delivery, properties->content_type.bytes, properties->content_type.len)) == NULL)
		return false;
	if ((flags & AMQP_BASIC_TYPE_FLAG) &&
		(delivery->type = delivery_keep_text(delivery, properties->type.bytes, properties->type.len)) == NULL)
		return false;
	if ((flags & AMQP_BASIC_HEADERS_FLAG) && properties->headers.num_entries > 0)
	{
		delivery->headers = keep_table(delivery, &properties->headers, 0);
		delivery->nheaders = properties->headers.num_entries;
	}
	return delivery->nheaders == 0 || delivery->headers != NULL;
}

/* Keeps the properties as they came.  Returns false if there is no memory for them. */
static bool
keep_properties(BrokerDelivery *delivery, amqp_bytes_t encoded)
{
	delivery->properties = delivery_keep_text(delivery, encoded.bytes, encoded.len);
	delivery->properties_len = encoded.len;
	return delivery->properties != NULL;
}

static void
delivery_assembled(Broker *broker, Channel *channel)
{
	BrokerDelivery *delivery = broker->delivery;

	delivery->body_len = (size_t) channel->content->body_size;
	delivery->size += delivery->body_len;
	delivery->body = assemble_take_body(channel->content);
	if (events_push_delivery(&broker->events, broker->consuming, channel->life, delivery))
		broker->delivery = NULL;
	else
		lose(broker, 0, "%s sends more than can be taken in", broker->where);
}

static BrokerField *
keep_table(BrokerDelivery *delivery, const amqp_table_t *table, int depth)
{
	BrokerField *fields = delivery_keep(delivery, (size_t) (table->num_entries + 1) * sizeof(BrokerField));

	for (int i = 0; i < table->num_entries && fields != NULL; i++)
	{
		fields[i].name = delivery_keep_text(delivery, table->entries[i].key.bytes, table->entries[i].key.len);
		if (fields[i].name == NULL ||
			!keep_value(delivery, &fields[i], &table->entries[i].value, depth))
			return NULL;
	}
	return fields;
}

static BrokerField *
keep_array(BrokerDelivery *delivery, const amqp_array_t *array, int depth)
{
	BrokerField *fields = delivery_keep(delivery, (size_t) (array->num_entries + 1) * sizeof(BrokerField));

	for (int i = 0; i < array->num_entries && fields != NULL; i++)
	{
		fields[i].name = "";
		if (!keep_value(delivery, &fields[i], &array->entries[i], depth))
			return NULL;
	}
	return fields;
}

/* What has no form here, or is nested too deeply, becomes NULL. */
static bool
keep_value(BrokerDelivery *delivery, BrokerField *field, const amqp_field_value_t *value, int depth)
{
	field->type = BROKER_VALUE_INT;
	switch (value->kind)
	{
		case AMQP_FIELD_KIND_BOOLEAN:
			field->type = BROKER_VALUE_BOOL;
			field->value.boolean = value->value.boolean != 0;
			return true;
		case AMQP_FIELD_KIND_I8:
			field->value.integer = value->value.i8;
			return true;
		case AMQP_FIELD_KIND_U8:
			field->value.integer = value->value.u8;
			return true;
		case AMQP_FIELD_KIND_I16:
			field->value.integer = value->value.i16;
			return true;
		case AMQP_FIELD_KIND_U16:
			field->value.integer = value->value.u16;
			return true;
		case AMQP_FIELD_KIND_I32:
			field->value.integer = value->value.i32;
			return true;
		case AMQP_FIELD_KIND_U32:
			field->value.integer = value->value.u32;
			return true;
		case AMQP_FIELD_KIND_I64:
		case AMQP_FIELD_KIND_U64:
		case AMQP_FIELD_KIND_TIMESTAMP:
			field->value.integer = value->value.i64;
			return true;
		case AMQP_FIELD_KIND_F32:
			field->type = BROKER_VALUE_DOUBLE;
			field->value.real = value->value.f32;
			return true;
		case AMQP_FIELD_KIND_F64:
			field->type = BROKER_VALUE_DOUBLE;
			field->value.real = value->value.f64;
			return true;
		case AMQP_FIELD_KIND_UTF8:
		case AMQP_FIELD_KIND_BYTES:
			field->type = BROKER_VALUE_STRING;
			field->value.string.data = delivery_keep_text(delivery, value->value.bytes.bytes,
														  value->value.bytes.len);
			field->value.string.len = value->value.bytes.len;
			return field->value.string.data != NULL;
		default:
			break;
	}
	field->type = BROKER_VALUE_NULL;
	if (depth >= NESTED_MAX)
		return true;
	if (value->kind == AMQP_FIELD_KIND_TABLE)
	{
		field->type = BROKER_VALUE_TABLE;
		field->value.nested.fields = keep_table(delivery, &value->value.table, depth + 1);
		field->value.nested.count = value->value.table.num_entries;
		return field->value.nested.fields != NULL;
	}
	if (value->kind == AMQP_FIELD_KIND_ARRAY)
	{
		field->type = BROKER_VALUE_ARRAY;
		field->value.nested.fields = keep_array(delivery, &value->value.array, depth + 1);
		field->value.nested.count = value->value.array.num_entries;
		return field->value.nested.fields != NULL;
	}
	return true;
}


/*
 * Tables (AMQP 0-9-1, section 4.2.5.5, with RabbitMQ's field types)
 */

/* Points into the caller's fields; valid until the next call. */
static bool
fill_table(Broker *broker, const BrokerField *fields, int nfields, amqp_table_t *table)
{
	if (nfields > broker->nentries)
	{
		amqp_table_entry_t *entries = realloc(broker->entries,
											  (size_t) nfields * sizeof(amqp_table_entry_t));

		if (entries == NULL)
			return lose(broker, 0, "out of memory");
		broker->entries = entries;
		broker->nentries = nfields;
	}
	for (int i = 0; i < nfields; i++)
		fill_entry(&fields[i], &broker->entries[i]);
	table->num_entries = nfields;
	table->entries = broker->entries;
	return true;
}

static void
fill_entry(const BrokerField *field, amqp_table_entry_t *entry)
{
	entry->key = bytes_of(field->name);
	switch (field->type)
	{
		case BROKER_VALUE_NULL:
		case BROKER_VALUE_TABLE:	/* never sent */
		case BROKER_VALUE_ARRAY:
			entry->value.kind = AMQP_FIELD_KIND_VOID;
			break;
		case BROKER_VALUE_BOOL:
			entry->value.kind = AMQP_FIELD_KIND_BOOLEAN;
			entry->value.value.boolean = field->value.boolean;
			break;
		case BROKER_VALUE_INT:
			entry->value.kind = AMQP_FIELD_KIND_I64;
			entry->value.value.i64 = field->value.integer;
			break;
		case BROKER_VALUE_TIMESTAMP:
			entry->value.kind = AMQP_FIELD_KIND_TIMESTAMP;
			entry->value.value.u64 = (uint64_t) field->value.integer;
			break;
		case BROKER_VALUE_DOUBLE:
			entry->value.kind = AMQP_FIELD_KIND_F64;
			entry->value.value.f64 = field->value.real;
			break;
		case BROKER_VALUE_STRING:
			entry->value.kind = AMQP_FIELD_KIND_UTF8;
			entry->value.value.bytes.bytes = (void *) field->value.string.data;
			entry->value.value.bytes.len = field->value.string.len;
			break;
	}
}

static bool
is_named(const amqp_table_entry_t *entry, const char *name)
{
	return entry->key.len == strlen(name) && memcmp(entry->key.bytes, name, entry->key.len) == 0;
}

static amqp_table_entry_t
text_entry(const char *key, const char *value)
{
	amqp_table_entry_t entry = {0};

	entry.key = bytes_of(key);
	entry.value.kind = AMQP_FIELD_KIND_UTF8;
	entry.value.value.bytes = bytes_of(value);
	return entry;
}

static amqp_table_entry_t
true_entry(const char *key)
{
	amqp_table_entry_t entry = {0};

	entry.key = bytes_of(key);
	entry.value.kind = AMQP_FIELD_KIND_BOOLEAN;
	entry.value.value.boolean = 1;
	return entry;
}


/*
 * Writing: a frame only when there is credit for it (credit.c)
 */

static bool
send_method(Broker *broker, int channel, amqp_method_number_t id, void *arguments,
			size_t size, long timeout_ms)
{
	amqp_frame_t frame;

	frame.frame_type = AMQP_FRAME_METHOD;
	frame.channel = (amqp_channel_t) channel;
	frame.payload.method.id = id;
	frame.payload.method.decoded = arguments;
	return send_frame(broker, &frame, size, timeout_ms);
}

/*
 * Writes a frame once there is room for it.  Returns false if the connection
 * is lost, or the frame's channel is not open (any more), unless a message has
 * begun there.
 */
static bool
send_frame(Broker *broker, const amqp_frame_t *frame, size_t size, long timeout_ms)
{
	const Channel *channel = channels_get(&broker->channels, frame->channel);

	if (!wait_for_room(broker, size, timeout_ms) || !credit_take(&broker->credit, size))
		return false;
	if (frame->channel != CHANNEL_CONNECTION && !broker->mid_message &&
		(channel == NULL || !channel_is_open(channel)))
		return false;
	return write_frame(broker, frame);
}

/* The same of a method that there is credit for, whatever the channel's state. */
static bool
write_method(Broker *broker, int channel, amqp_method_number_t id, void *arguments)
{
	amqp_frame_t frame;

	frame.frame_type = AMQP_FRAME_METHOD;
	frame.channel = (amqp_channel_t) channel;
	frame.payload.method.id = id;
	frame.payload.method.decoded = arguments;
	return write_frame(broker, &frame);
}

/* Only with credit for it.  Of a corked socket, it is written together with others. */
static bool
write_frame(Broker *broker, const amqp_frame_t *frame)
{
	if (!encode_frame(broker, frame))
		return false;
	return (broker->corked && broker->nunwritten < WRITE_AT_ONCE) || write_out(broker);
}

/*
 * Encodes a frame behind those that are not written yet, of which there are less than
 * WRITE_AT_ONCE.
 */
static bool
encode_frame(Broker *broker, const amqp_frame_t *frame)
{
	unsigned char *to = broker->unwritten + broker->nunwritten;
	amqp_bytes_t payload = {FRAME_MAX - FRAME_ENVELOPE, to + FRAME_HEAD};
	int			len = encode_payload(frame, payload);

	if (len < 0)
		return lose_status(broker, "write to", len);
	to[0] = frame->frame_type;
	put_number(to + 1, 2, frame->channel);
	put_number(to + 3, 4, (uint64_t) len);
	to[FRAME_HEAD + len] = FRAME_END;
	broker->nunwritten += (size_t) len + FRAME_ENVELOPE;
	broker->last_sent_ms = clock_ms();
	return true;
}

/* Returns the payload's length, or what is wrong with it, a status of the library's. */
static int
encode_payload(const amqp_frame_t *frame, amqp_bytes_t to)
{
	int			head = frame->frame_type == AMQP_FRAME_METHOD ? 4 : 12;
	unsigned char *bytes = to.bytes;
	amqp_bytes_t rest = {to.len - (size_t) head, bytes + head};
	int			len;

	switch (frame->frame_type)
	{
		case AMQP_FRAME_METHOD:
			put_number(bytes, 4, frame->payload.method.id);
			len = amqp_encode_method(frame->payload.method.id, frame->payload.method.decoded, rest);
			return len < 0 ? len : head + len;
		case AMQP_FRAME_HEADER:
			put_number(bytes, 4, (uint64_t) frame->payload.properties.class_id << 16);
			put_number(bytes + 4, 8, frame->payload.properties.body_size);
			len = amqp_encode_properties(frame->payload.properties.class_id, frame->payload.properties.decoded, rest);
			return len < 0 ? len : head + len;
		case AMQP_FRAME_BODY:
			memcpy(bytes, frame->payload.body_fragment.bytes, frame->payload.body_fragment.len);
			return (int) frame->payload.body_fragment.len;
		default:				/* a heartbeat */
			return 0;
	}
}

/* Writes a number as AMQP has it, the highest byte first. */
static void
put_number(unsigned char *to, int bytes, uint64_t number)
{
	for (int i = bytes - 1; i >= 0; i--)
	{
		to[i] = (unsigned char) number;
		number >>= 8;
	}
}

/*
 * Writes the frames that are not written yet.  Since there was credit for them, the
 * kernel takes them at once; if it should not, it is waited for, as long as
 * TCP_USER_TIMEOUT allows, or until a signal handler shuts the socket down.  Returns
 * false if the connection is lost.
 */
static bool
write_out(Broker *broker)
{
	size_t		written = 0;

	while (!broker->lost && written < broker->nunwritten)
	{
		const unsigned char *from = broker->unwritten + written;
		size_t		left = broker->nunwritten - written;
		ssize_t		n;

		errno = 0;
		n = broker->tls != NULL ? tls_write(broker->tls, from, left) : send(broker->fd, from, left, MSG_NOSIGNAL);
		if (n > 0)
			written += (size_t) n;
		else if (errno == EAGAIN)
			tcp_wait_writable(broker->fd, WRITE_SLICE_MS);
		else if (errno != EINTR)
		{
			broker->nunwritten = 0;
			return lose_write(broker, broker->tls != NULL ? AMQP_STATUS_SSL_ERROR : AMQP_STATUS_SOCKET_ERROR);
		}
	}
	broker->nunwritten = 0;
	return !broker->lost;
}

/*
 * Waits until a frame of so many bytes can be written without blocking, at
 * most timeout_ms without a single byte leaving the kernel's buffer, or
 * BLOCKED_TIMEOUT_MS if the broker says that it is blocked.
 */
static bool
wait_for_room(Broker *broker, size_t size, long timeout_ms)
{
	int64_t		since;
	int			unsent = INT_MAX;

	if (!broker->lost && credit_covers(&broker->credit, size))
		return true;
	since = clock_ms();
	for (;;)
	{
		refill_credit(broker);
		pay_debts(broker);
		if (broker->lost)
			return false;
		if (credit_covers(&broker->credit, size))
			return true;

		/* one that has an alarm says so, and reads nothing more */
		if (broker->blocked && timeout_ms < BLOCKED_TIMEOUT_MS)
			timeout_ms = BLOCKED_TIMEOUT_MS;
		if (tcp_unsent(broker->fd) < unsent)
		{
			unsent = tcp_unsent(broker->fd);
			since = clock_ms();
		}
		if (clock_left(since + timeout_ms) == 0)
			return lose(broker, 0, "%s has taken no data for %ld ms", broker->where,
						timeout_ms);
		broker->options->wait(broker->fd, true, WRITE_SLICE_MS);
	}
}

/* Takes credit for a frame with a look at the socket, but never waits, and reads nothing. */
static bool
take_room_now(Broker *broker, size_t size)
{
	if (broker->lost || broker->write_failed)
		return false;
	if (!credit_covers(&broker->credit, size) && write_out(broker) && tcp_writable(broker->fd, NULL))
		credit_refill(&broker->credit);
	return !broker->lost && credit_take(&broker->credit, size);
}

/*
 * Looks at the socket, with nothing left to be written; on the way, takes in what is there
 * to read.
 */
static void
refill_credit(Broker *broker)
{
	bool		readable;
	bool		writable;

	if (!write_out(broker))
		return;
	writable = tcp_writable(broker->fd, &readable);
	if (writable)
		credit_refill(&broker->credit);
	if (readable && (!writable || broker->events.delivered < DELIVERED_AHEAD))
		drain(broker);
}


/*
 * Reading
 *
 * The socket is read into a buffer, from which the library gets a frame at
 * a time.  Nothing makes us wait: a frame that is not complete yet stays with
 * the library, its rest is read when it comes.
 */

void
broker_next_event(Broker *broker, BrokerEvent *event)
{
	int			frames = 0;
	amqp_frame_t frame;

	while (!pop_event(broker, event))
	{
		if (frames++ > READS_AT_ONCE)
		{
			set_empty_event(event, BROKER_MORE);
			return;
		}
		if (!read_frame(broker, &frame))
		{
			nothing_to_fetch(broker, event);
			return;
		}
		dispatch(broker, &frame);
	}
}

static void
nothing_to_fetch(Broker *broker, BrokerEvent *event)
{
	pay_debts(broker);
	set_empty_event(event, broker->lost ? BROKER_DISCONNECTED : BROKER_NOTHING);
	if (!broker->lost)
		return;
	event->code = broker->why.code;
	event->class_id = broker->why.class_id;
	event->method_id = broker->why.method_id;
	memcpy(event->text, broker->why.text, sizeof(event->text));
}

/*
 * Makes an event of no channel.  The caller's event may still have the delivery of the
 * one before, or one that was dropped and freed.
 */
static void
set_empty_event(BrokerEvent *event, BrokerEventType type)
{
	event->type = type;
	event->channel = 0;
	event->delivery = NULL;
}

/*
 * Reads one frame without waiting; serves heartbeats.  Returns false if none
 * is complete, and then library, TLS and kernel hold nothing more; or if the
 * connection is lost.  The frame is valid until the next read.
 */
static bool
read_frame(Broker *broker, amqp_frame_t *frame)
{
	int			status;

	if (broker->lost)
		return false;

	/* A peer that never stops talking must not keep interrupts away. */
	if (++broker->reads > READS_BETWEEN_WAITS)
	{
		broker->reads = 0;
		serve_heartbeats(broker);
		if (broker->lost)
			return false;
		broker->options->wait(broker->fd, false, 0);
	}

	amqp_maybe_release_buffers(broker->conn);
	errno = 0;
	status = receive_frame(broker, frame);
	if (status == AMQP_STATUS_OK)
		return true;
	if (status == AMQP_STATUS_TIMEOUT)
	{
		broker->reads = 0;
		serve_heartbeats(broker);
		return false;
	}
	return lose_status(broker, "read from", status);
}

/* Returns AMQP_STATUS_TIMEOUT if there is no complete frame yet. */
static int
receive_frame(Broker *broker, amqp_frame_t *frame)
{
	int			status;

	do
	{
		status = decode_received(broker, frame);
		if (status != AMQP_STATUS_TIMEOUT)
			return status;
		status = receive(broker);
	} while (status == AMQP_STATUS_OK);
	return status;
}

static int
decode_received(Broker *broker, amqp_frame_t *frame)
{
	FrameBuffer *received = &broker->received;

	for (;;)
	{
		size_t		have = received->last - received->first;
		amqp_bytes_t bytes;
		int			taken;

		if (broker->frame_left == 0)
		{
			FrameHead	head;

			if (!frames_head(received, &head))
				return AMQP_STATUS_TIMEOUT;
			if (!begin_frame(broker, &head))
				return AMQP_STATUS_BAD_AMQP_DATA;
		}
		if (have == 0)
			return AMQP_STATUS_TIMEOUT;

		bytes.bytes = received->bytes + received->first;
		bytes.len = have < broker->frame_left ? have : broker->frame_left;
		taken = amqp_handle_input(broker->conn, bytes, frame);
		if (taken <= 0)
			return taken < 0 ? taken : AMQP_STATUS_BAD_AMQP_DATA;
		received->first += (size_t) taken;
		broker->frame_left -= (size_t) taken;
		if (frame->frame_type != 0)
		{
			frame->channel = (amqp_channel_t) broker->frame_channel;
			return AMQP_STATUS_OK;
		}
	}
}

/*
 * Checks what the library would believe: it skips what it does not know.  Then
 * keeps the channel's number from it: it makes a pool of memory for every
 * channel that it hears of, and looks through all of them.
 */
static bool
begin_frame(Broker *broker, const FrameHead *head)
{
	broker->frame_left = FRAME_ENVELOPE;
	broker->frame_channel = CHANNEL_CONNECTION;
	if (head->protocol)
		return true;
	if (head->type != AMQP_FRAME_METHOD && head->type != AMQP_FRAME_HEADER &&
		head->type != AMQP_FRAME_BODY && head->type != AMQP_FRAME_HEARTBEAT)
		return lose(broker, 0, "%s sent something that is not an AMQP 0-9-1 frame%s",
					broker->where, hint(broker));
	if (head->channel != CHANNEL_CONNECTION && channels_get(&broker->channels, head->channel) == NULL)
		return lose(broker, 0, "protocol violation by %s: frame on unknown channel %d",
					broker->where, head->channel);
	if (head->payload + FRAME_ENVELOPE > (size_t) amqp_get_frame_max(broker->conn))
		return lose(broker, 0, "protocol violation by %s: frame of %zu bytes",
					broker->where, head->payload);
	broker->frame_left += head->payload;
	broker->frame_channel = head->channel;
	frames_hide_channel(&broker->received);
	return true;
}

static int
receive(Broker *broker)
{
	size_t		room;
	void	   *to = frames_room(&broker->received, &room);
	ssize_t		n = broker->tls != NULL ? tls_read(broker->tls, to, room) :
		recv(broker->fd, to, room, MSG_DONTWAIT);

	if (n == 0)
		return AMQP_STATUS_CONNECTION_CLOSED;
	if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
		return AMQP_STATUS_TIMEOUT;
	if (n < 0)
		return broker->tls != NULL ? AMQP_STATUS_SSL_ERROR : AMQP_STATUS_SOCKET_ERROR;
	frames_add(&broker->received, (size_t) n);
	broker->last_received_ms = clock_ms();
	return AMQP_STATUS_OK;
}

/*
 * As the library does it: one is sent for each half of the interval in which
 * nothing else was, and a peer silent for two intervals is gone.
 */
static void
serve_heartbeats(Broker *broker)
{
	amqp_frame_t frame = {.frame_type = AMQP_FRAME_HEARTBEAT,.channel = CHANNEL_CONNECTION};
	int64_t		interval = broker->heartbeat * 1000;

	broker->last_read_ms = clock_ms();
	if (interval == 0)
		return;
	if (broker->last_read_ms - broker->last_received_ms > 2 * interval)
	{
		lose_status(broker, "read from", AMQP_STATUS_HEARTBEAT_TIMEOUT);
		return;
	}
	if (broker->last_read_ms - broker->last_sent_ms < interval / 2 ||
		!tcp_writable(broker->fd, NULL))
		return;

	(void) (encode_frame(broker, &frame) && write_out(broker));
}

/* Callers look at the time, and come back while there is more. */
static void
drain(Broker *broker)
{
	amqp_frame_t frame;
	int			frames = 0;

	while (frames++ < READS_AT_ONCE && read_frame(broker, &frame))
	{
		dispatch(broker, &frame);
		if (broker->events.delivered >= DELIVERED_AHEAD)
			break;
	}
}

/* Takes note of a frame.  Never waits, never writes much. */
static void
dispatch(Broker *broker, const amqp_frame_t *frame)
{
	if (frame->frame_type == AMQP_FRAME_HEARTBEAT)
		return;
	if (frame->channel == CHANNEL_CONNECTION)
		dispatch_connection(broker, frame);
	else if (channels_get(&broker->channels, frame->channel) == NULL)
		lose(broker, 0, "protocol violation by %s: frame on unknown channel %d",
			 broker->where, frame->channel);
	else
		dispatch_channel(broker, frame);
}

static void
dispatch_connection(Broker *broker, const amqp_frame_t *frame)
{
	if (frame->frame_type == FRAME_PROTOCOL_HEADER)
		lose(broker, 0, "%s does not speak AMQP 0-9-1", broker->where);
	else if (is_method(frame, CHANNEL_CONNECTION, AMQP_CONNECTION_CLOSE_METHOD))
		connection_closed(broker, frame->payload.method.decoded);
	else if (is_method(frame, CHANNEL_CONNECTION, AMQP_CONNECTION_BLOCKED_METHOD))
		connection_blocked(broker, frame->payload.method.decoded);
	else if (is_method(frame, CHANNEL_CONNECTION, AMQP_CONNECTION_UNBLOCKED_METHOD))
		connection_unblocked(broker);
	else
		lose(broker, 0, "protocol violation by %s: unexpected frame on the connection",
			 broker->where);
}

/*
 * Takes a frame of a channel that is open, or was.  Contents of one that is
 * over are dropped: the broker may not have known it.
 */
static void
dispatch_channel(Broker *broker, const amqp_frame_t *frame)
{
	const Channel *channel = channels_get(&broker->channels, frame->channel);

	if (frame->frame_type == AMQP_FRAME_METHOD)
		dispatch_method(broker, frame->channel, &frame->payload.method);
	else if (channel_awaits_answer(channel) || channel->state == CHANNEL_OPEN)
		dispatch_content(broker, frame);
}

static void
dispatch_content(Broker *broker, const amqp_frame_t *frame)
{
	Channel    *channel = channels_get(&broker->channels, frame->channel);
	AssembleResult result;

	if (channel->content == NULL)
		lose(broker, 0, "protocol violation by %s: content on a channel for requests",
			 broker->where);
	else if (frame->frame_type == AMQP_FRAME_HEADER)
		content_assembled(broker, frame->channel, content_header(broker, channel, frame));
	else
	{
		result = assemble_body(channel->content, frame->payload.body_fragment.bytes,
							   frame->payload.body_fragment.len);
		content_assembled(broker, frame->channel, result);
	}
}

/*
 * Takes a method with which a content begins, or one that comes in the middle of
 * one.  Returns false if it has nothing to do with contents.
 */
static bool
dispatch_content_method(Broker *broker, int number, const amqp_method_t *method)
{
	Channel    *channel = channels_get(&broker->channels, number);

	if (channel->content == NULL || !channel_is_open(channel))
		return false;
	if (method->id == AMQP_BASIC_RETURN_METHOD)
		dispatch_return(broker, number, method->decoded);
	else if (method->id == AMQP_BASIC_DELIVER_METHOD && channel->use == CHANNEL_CONSUMES)
		dispatch_delivery(broker, channel, method->decoded);
	else if (assemble_other(channel->content) == ASSEMBLE_VIOLATION)
		content_assembled(broker, number, ASSEMBLE_VIOLATION);
	else
		return false;
	return true;
}

/* Takes a method: what it means depends on the channel's state. */
static void
dispatch_method(Broker *broker, int number, const amqp_method_t *method)
{
	if (dispatch_content_method(broker, number, method))
		return;
	switch (channels_method(&broker->channels, number, method->id))
	{
		case CHANNEL_NO_NEWS:
			pay_debts(broker);
			break;
		case CHANNEL_OPENED:
			channel_opened(broker, number);
			break;
		case CHANNEL_ANSWERED:
			channel_answered(broker, number, method);
			break;
		case CHANNEL_REFUSED:
			channel_closed(broker, number, method->decoded);
			break;
		case CHANNEL_OTHER:
			dispatch_other(broker, number, method);
			break;
		case CHANNEL_VIOLATION:
			lose(broker, 0, "protocol violation by %s: unexpected method on channel %d, which is being opened",
				 broker->where, number);
			break;
	}
}

static void
dispatch_return(Broker *broker, int number, const amqp_basic_return_t *returned)
{
	Channel    *channel = channels_get(&broker->channels, number);

	content_assembled(broker, number,
					  assemble_method(channel->content, returned->reply_code,
									  returned->reply_text.bytes, returned->reply_text.len));
}

/* Of a tag that is 0 or comes again, an ack would settle something else. */
static void
dispatch_delivery(Broker *broker, Channel *channel, const amqp_basic_deliver_t *deliver)
{
	AssembleResult result = assemble_method(channel->content, 0, "", 0);

	if (result != ASSEMBLE_VIOLATION &&
		(!broker->consumes || deliver->delivery_tag <= broker->delivery_tag))
	{
		channel->content->problem = broker->consumes ?
			"a delivery tag is not greater than the one before it" :
			"a delivery came before anything was consumed";
		result = ASSEMBLE_VIOLATION;
	}
	if (result != ASSEMBLE_VIOLATION && !begin_delivery(broker, deliver))
		lose(broker, 0, "out of memory");
	content_assembled(broker, broker->consuming, result);
}

/* Takes a method of an open channel that nobody has asked for. */
static void
dispatch_other(Broker *broker, int number, const amqp_method_t *method)
{
	const amqp_basic_ack_t *ack = method->decoded;
	const amqp_basic_nack_t *nack = method->decoded;
	ChannelUse	use = channels_get(&broker->channels, number)->use;

	if (method->id == AMQP_BASIC_ACK_METHOD && use == CHANNEL_PUBLISHES)
		confirmed(broker, number, BROKER_ACK, ack->delivery_tag, ack->multiple);
	else if (method->id == AMQP_BASIC_NACK_METHOD && use == CHANNEL_PUBLISHES)
		confirmed(broker, number, BROKER_NACK, nack->delivery_tag, nack->multiple);
	else if (method->id == AMQP_BASIC_CANCEL_METHOD && use == CHANNEL_CONSUMES)
		(void) push_event(broker, BROKER_CANCELLED, number);
	else
		lose(broker, 0, "protocol violation by %s: unexpected method on channel %d",
			 broker->where, number);
}

static void
channel_opened(Broker *broker, int number)
{
	ChannelUse	use = channels_get(&broker->channels, number)->use;

	if (use == CHANNEL_PUBLISHES || use == CHANNEL_REQUESTS)
		(void) push_event(broker, BROKER_CHANNEL_OPENED, number);
}

/* Takes the answer to a request: to a declaration, it must be of that queue. */
static void
channel_answered(Broker *broker, int number, const amqp_method_t *method)
{
	const Channel *channel = channels_get(&broker->channels, number);
	const amqp_queue_declare_ok_t *declared = method->decoded;
	const		amqp_queue_delete_ok_t *deleted = method->decoded;
	BrokerEvent *event;

	broker->messages = broker->consumers = 0;
	if (method->id == AMQP_QUEUE_DECLARE_OK_METHOD)
	{
		if (channel->queue != NULL &&
			(declared->queue.len != strlen(channel->queue) ||
			 memcmp(declared->queue.bytes, channel->queue, declared->queue.len) != 0))
		{
			lose(broker, 0, "protocol violation by %s: another queue was declared than the one asked for",
				 broker->where);
			return;
		}
		broker->messages = declared->message_count;
		broker->consumers = declared->consumer_count;
	}
	else if (method->id == AMQP_QUEUE_DELETE_OK_METHOD)
		broker->messages = deleted->message_count;
	if (channel->use != CHANNEL_REQUESTS)
		return;
	event = push_event(broker, BROKER_REPLY, number);
	if (event == NULL)
		return;
	event->messages = broker->messages;
	event->consumers = broker->consumers;
}

/* close-ok is a courtesy: it is sent only if that takes no waiting. */
static void
connection_closed(Broker *broker, const amqp_connection_close_t *close)
{
	amqp_connection_close_ok_t ok = {0};
	BrokerError why;

	set_reason(broker, &why, close->reply_code, close->reply_text, close->class_id, close->method_id);
	if (!broker->mid_message && tcp_writable(broker->fd, NULL))
		amqp_send_method(broker->conn, CHANNEL_CONNECTION,
						 AMQP_CONNECTION_CLOSE_OK_METHOD, &ok);
	if (broker->lost)
		return;
	(void) lose(broker, why.code, "%s", why.text);
	broker->why = why;
}

static void
connection_blocked(Broker *broker, const amqp_connection_blocked_t *blocked)
{
	BrokerEvent *event = push_event(broker, BROKER_BLOCKED, 0);

	if (event == NULL)
		return;
	error_copy_text(event->text, sizeof(event->text), blocked->reason.bytes, blocked->reason.len);
	broker->blocked = true;
	tcp_set_user_timeout(broker->fd, 0);
}

static void
connection_unblocked(Broker *broker)
{
	if (push_event(broker, BROKER_UNBLOCKED, 0) == NULL)
		return;
	broker->blocked = false;
	tcp_set_user_timeout(broker->fd, USER_TIMEOUT_MS);
}

/* Takes note that the broker has closed a channel, and answers if there is room. */
static void
channel_closed(Broker *broker, int number, const amqp_channel_close_t *close)
{
	BrokerError why;
	BrokerEvent *event;

	set_reason(broker, &why, close->reply_code, close->reply_text, close->class_id, close->method_id);
	channels_set_reason(&broker->channels, number, &why);
	pay_debts(broker);
	if (number == broker->calls)
		return;
	event = push_event(broker, BROKER_CHANNEL_CLOSED, number);
	if (event == NULL)
		return;
	event->code = why.code;
	event->class_id = why.class_id;
	event->method_id = why.method_id;
	memcpy(event->text, why.text, sizeof(event->text));
}

/*
 * A tag that is not used up yet, or 0, must not reach a window of messages in
 * flight: by the time it is looked at there, the message may have been sent.
 */
static void
confirmed(Broker *broker, int number, BrokerEventType type, uint64_t tag, bool multiple)
{
	BrokerEvent *event;

	if (tag == 0 || tag > channels_get(&broker->channels, number)->published)
	{
		lose(broker, 0, "protocol violation by %s: a message was confirmed that was not sent",
			 broker->where);
		return;
	}
	event = push_event(broker, type, number);
	if (event == NULL)
		return;
	event->tag = tag;
	event->multiple = multiple;
}

/* Is the content being received a delivery?  Else it is a return. */
static bool
is_delivery(const Broker *broker, const Channel *channel)
{
	return channel->use == CHANNEL_CONSUMES && broker->delivery != NULL;
}

static AssembleResult
content_header(Broker *broker, Channel *channel, const amqp_frame_t *frame)
{
	Assembler  *content = channel->content;
	const amqp_basic_properties_t *properties = frame->payload.properties.decoded;
	amqp_bytes_t id = amqp_empty_bytes;

	/* Of another class, "decoded" would be of another type. */
	if (frame->payload.properties.class_id != AMQP_BASIC_CLASS)
	{
		content->problem = "a content header is of the wrong class";
		return ASSEMBLE_VIOLATION;
	}
	if (is_delivery(broker, channel) && content->state == ASSEMBLE_HEADER &&
		(!take_properties(broker, properties) ||
		 (broker->options->forwards &&
		  !keep_properties(broker->delivery, frame->payload.properties.raw))))
	{
		content->problem = "out of memory for its properties";
		return ASSEMBLE_VIOLATION;
	}
	if (properties->_flags & AMQP_BASIC_MESSAGE_ID_FLAG)
		id = properties->message_id;
	return assemble_header(content, id.bytes, id.len, frame->payload.properties.body_size);
}

static void
content_assembled(Broker *broker, int number, AssembleResult result)
{
	Channel    *channel = channels_get(&broker->channels, number);
	const Assembler *returned = channel->content;
	BrokerEvent *event;

	if (result == ASSEMBLE_VIOLATION)
		lose(broker, 0, "protocol violation by %s: %s", broker->where, returned->problem);
	if (result != ASSEMBLE_DONE)
		return;
	if (is_delivery(broker, channel))
	{
		delivery_assembled(broker, channel);
		return;
	}

	event = push_event(broker, BROKER_RETURN, number);
	if (event == NULL)
		return;
	event->code = returned->code;
	error_copy_text(event->text, sizeof(event->text), returned->text, strlen(returned->text));
	snprintf(event->message_id, sizeof(event->message_id), "%.*s",
			 BROKER_MAX_MESSAGE_ID, returned->message_id);
}

/* Returns the new event, or NULL with the connection given up. */
static BrokerEvent *
push_event(Broker *broker, BrokerEventType type, int channel)
{
	uint32_t	life = channel != 0 ? channels_get(&broker->channels, channel)->life : 0;
	BrokerEvent *event = events_push(&broker->events, type, channel, life);

	if (event == NULL)
		lose(broker, 0, "%s sends more than can be taken in", broker->where);
	return event;
}

/* Takes the next event out of the queue; those of channels that are over are dropped. */
static bool
pop_event(Broker *broker, BrokerEvent *event)
{
	uint32_t	life;

	while (events_pop(&broker->events, event, &life))
	{
		if (event->channel == 0 || channels_get(&broker->channels, event->channel)->life == life)
		{
			if (event->type == BROKER_CHANNEL_CLOSED)
				channels_told(&broker->channels, event->channel);
			return true;
		}
		broker_free_delivery(event->delivery);
	}
	return false;
}

static bool
is_method(const amqp_frame_t *frame, int channel, amqp_method_number_t id)
{
	return frame->frame_type == AMQP_FRAME_METHOD && frame->channel == channel &&
		frame->payload.method.id == id;
}

static amqp_bytes_t
bytes_of(const char *text)
{
	amqp_bytes_t bytes = {0};

	bytes.len = text !=NULL ? strlen(text) : 0;
	bytes.bytes = (void *) text;

	return bytes;
}
