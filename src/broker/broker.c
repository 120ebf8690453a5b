/*-------------------------------------------------------------------------
 *
 * broker.c
 *		One AMQP 0-9-1 connection to RabbitMQ, over rabbitmq-c.
 *
 * The only file that knows rabbitmq-c.  It uses of that library the codec and
 * the writing of frames: amqp_handle_input() and amqp_send_frame(); for TLS
 * also its transport and heartbeats, amqp_simple_wait_frame_noblock().
 * Everything above frames, that is login, RPC, publishing and the dispatch of
 * what arrives, is done here, because the library's own versions wait without
 * limit and without interrupts:
 *
 * - amqp_basic_publish() and every RPC write with an infinite deadline and
 *   restart on EINTR (rabbitmq-c #519).  Here, a frame is written only when
 *   the kernel has room for it (see "Writing"), so the library's blocking
 *   write does not block.
 * - Before 0.14, a write that blocks past a heartbeat reads with an infinite
 *   deadline (rabbitmq-c #780).  Unreachable for the same reason.
 * - amqp_consume_message(), amqp_read_message() and amqp_simple_wait_frame()
 *   wait forever; amqp_simple_wait_frame_on_channel() drops queued frames of
 *   other channels; amqp_release_buffers() abort()s between frames.  None of
 *   them may be used here; nor may anything that calls amqp_abort().
 * - The library's reading swallows heartbeats and frames of unknown types in
 *   a loop for as long as a peer sends them, and keeps what they held (measured
 *   with 0.11: 300 MB a second).  So a plain socket is read here, and a frame's
 *   header is checked before the library is shown a byte of it (see "Reading").
 *
 * Two calls may still keep interrupts away, both under a peer that is hostile
 * rather than slow, and both end when a signal handler shuts the socket down:
 *
 * - opening a TLS socket, at most for connect_timeout_ms, if the peer accepts
 *   connections but does not shake hands (broker_handshake_fd());
 * - reading TLS, since the library does not give its session away: the loop
 *   named above, for a peer that has the certificate we trust.
 *
 * Channels: 1 publishes in confirm mode, or consumes, 2 is for topology, so that a refusal
 * there (AMQP closes the channel) leaves the messages in flight alone.  A
 * channel's life:
 *
 *		DOWN --channel.open, open-ok--> OPEN --channel.close--> REFUSED
 *		REFUSED --close-ok, channel.open, open-ok--> OPEN
 *
 * channel.close is answered when the channel is needed again: the broker
 * ignores the channel until then, and sending nothing from within the
 * dispatch means that dispatching never waits.
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
 * (404), then reopened; reopening that crosses the broker's close; memory
 * alarm (blocked, unblocked, longer than the user timeout); a frozen broker
 * while writing, while waiting for a reply, while idle, while connecting; a
 * body of many frames; a body over the broker's limit; properties over a
 * frame; login refused; vhost unknown; nobody listening; 406 on the topology
 * channel; the operator closing the connection; TLS with and without trust.
 * In test/unit/test_broker.c, against brokers made of raw bytes: one that goes
 * silent, hangs up or talks nonsense at any step, breaks the order or the size
 * of frames, floods us, confirms what was not sent, or writes before it reads.
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
#include "broker/clock.h"
#include "broker/tcp.h"
#include "broker/tls.h"

#ifndef PG_FANOUT_VERSION
#define PG_FANOUT_VERSION "devel"
#endif

/* room for what the broker says when it closes */
#define WHY_SIZE (sizeof(((BrokerError *) NULL)->text))

#define CHANNEL_CONNECTION	0
#define CHANNEL_PUBLISHING	1
#define CHANNEL_TOPOLOGY	2

/* What we propose; the broker may lower it to the protocol's minimum. */
#define FRAME_MAX			65536
#define FRAME_MIN			4096

/* The library's private frame type for a protocol header ("AMQP"). */
#define FRAME_PROTOCOL_HEADER 'A'

/* Frame type, channel and size before a payload; and the end octet after it. */
#define FRAME_HEAD			7
#define FRAME_ENVELOPE		8

/* A method's identifiers and up to three short strings, rounded up. */
#define METHOD_SIZE			1024

#define USER_TIMEOUT_MS		10000

/* What the kernel books for a small write on top of its bytes, rounded up. */
#define WRITE_OVERHEAD		1024

/* At most so much is written between two looks at the socket. */
#define CREDIT_MAX			(128 * 1024)

/* How often a wait for room to write looks for frames to read. */
#define WRITE_SLICE_MS		20

/* How long a wait for a reply may keep heartbeats from being served. */
#define READ_SLICE_MS		1000

/* Reads in a row after which interrupts are served. */
#define READS_BETWEEN_WAITS 1024

/* Reads in a row before something else is looked at: the time, room to write. */
#define READS_AT_ONCE		16384

/* What is taken from the kernel in one piece. */
#define INBOX_SIZE			65536

/*
 * As many events as a window of unconfirmed messages can give rise to: a
 * return and an ack for each of 65535.
 */
#define EVENTS_MAX			(128 * 1024)

/* More bytes in deliveries than any consumer lets pile up while it waits. */
#define DELIVERED_MAX		((size_t) 1024 * 1024 * 1024)

/* Of these, so many are taken in on the way, when it is not them that is asked for. */
#define DELIVERED_AHEAD		((size_t) 1024 * 1024)

/* Tables in tables: RabbitMQ's own (x-death) have two levels. */
#define NESTED_MAX			16

/* How long a polite close waits for the answer. */
#define GOODBYE_MS			200

#define HEARTBEAT_NEVER_MS	(60 * 60 * 1000L)

typedef enum ChannelState
{
	CHANNEL_DOWN,				/* not opened yet */
	CHANNEL_OPEN,
	CHANNEL_REFUSED,			/* closed by the broker; close-ok is owed */
} ChannelState;

typedef struct Channel
{
	ChannelState state;
	BrokerError why;			/* REFUSED */
} Channel;

struct Broker
{
	const BrokerOptions *options;
	amqp_connection_state_t conn;
	bool		tls;
	int			fd;				/* -1: none, or lost */
	char		where[288];		/* host:port, for texts */

	bool		greeted;		/* it has proved to speak what we speak */
	int			major;			/* of the server's version */
	bool		lost;
	BrokerError why;			/* lost: the first reason */
	bool		blocked;		/* by connection.blocked */

	Channel		channels[3];	/* 0 is never used */
	uint64_t	published;		/* on this publishing channel: the last tag */
	Assembler	content;		/* basic.return, or basic.deliver, of the
								 * publishing channel */
	BrokerDelivery *delivery;	/* that content's, if it is a delivery */
	bool		consumes;		/* on this channel, something was consumed */
	uint64_t	delivery_tag;	/* on this channel: the last delivery's */
	size_t		delivered;		/* bytes of deliveries not yet fetched */

	/* Writing */
	bool		corked;
	bool		mid_message;	/* a content is half sent */
	size_t		frame_max;		/* negotiated */
	size_t		credit_max;		/* see refill_credit() */
	size_t		credit;			/* may be written without asking the kernel */

	/* Heartbeats */
	int			heartbeat;		/* negotiated, in seconds; 0: none */
	int64_t		last_sent_ms;
	int64_t		last_received_ms;

	/* Reading */
	int64_t		last_read_ms;	/* when heartbeats were last served */
	int			reads;			/* since interrupts were last served */
	size_t		frame_left;		/* of the frame the library is being given */
	size_t		inbox_first;	/* inbox[inbox_first .. inbox_last - 1] is */
	size_t		inbox_last;		/* received and not given to it yet */
	unsigned char inbox[INBOX_SIZE];

	/* Events not yet fetched: events[first .. last - 1] */
	BrokerEvent *events;
	size_t		first;
	size_t		last;
	size_t		capacity;

	/* Room for the table being sent */
	amqp_table_entry_t *entries;
	int			nentries;
};

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
static void set_error(BrokerError *error, int code, const char *format,...)
			__attribute__((format(printf, 3, 4)));
static BrokerResult fail_lost(const Broker *broker, BrokerError *error);
static BrokerResult fail_channel(const Broker *broker, int channel, BrokerError *error);
static void copy_text(char *to, size_t size, amqp_bytes_t from);
static void copy_reason(const Broker *broker, char *to, int code, amqp_bytes_t from);

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

/* Channels and calls */
static bool open_channel(Broker *broker, int channel, int64_t deadline);
static bool open_publishing_channel(Broker *broker, int64_t deadline);
static BrokerResult call_declare(Broker *broker, amqp_queue_declare_t *declare,
								 const amqp_queue_declare_ok_t **ok, BrokerError *error);
static BrokerResult call_topology(Broker *broker, amqp_method_number_t request,
								  void *arguments, amqp_method_number_t reply,
								  const void **answer, BrokerError *error);
static const void *call(Broker *broker, int channel, amqp_method_number_t request,
						void *arguments, amqp_method_number_t reply, int64_t deadline);
static const void *await_reply(Broker *broker, int channel,
							   amqp_method_number_t reply, int64_t deadline);

/* Publishing */
static BrokerResult check_message(const Broker *broker, const BrokerMessage *message,
								  size_t *header_size, BrokerError *error);
static bool check_short(const char *what, const char *text, size_t max,
						BrokerError *error);
static size_t properties_size(const BrokerMessage *message);
static void fill_properties(const BrokerMessage *message, amqp_basic_properties_t *properties);
static bool send_content_header(Broker *broker, const BrokerMessage *message,
								size_t size, long timeout_ms);
static bool send_content_body(Broker *broker, const char *body, size_t len,
							  long timeout_ms);

/* Consuming */
static BrokerResult settle_delivery(Broker *broker, amqp_method_number_t method, void *arguments,
									long timeout_ms, BrokerError *error);
static void drop_deliveries(Broker *broker);
static bool begin_delivery(Broker *broker, const amqp_basic_deliver_t *deliver);
static bool take_properties(Broker *broker, const amqp_basic_properties_t *properties);
static void delivery_assembled(Broker *broker);
static void *keep(BrokerDelivery *delivery, size_t size);
static char *keep_text(BrokerDelivery *delivery, amqp_bytes_t bytes);
static BrokerField *keep_table(BrokerDelivery *delivery, const amqp_table_t *table, int depth);
static BrokerField *keep_array(BrokerDelivery *delivery, const amqp_array_t *array, int depth);
static bool keep_value(BrokerDelivery *delivery, BrokerField *field,
					   const amqp_field_value_t *value, int depth);

/* Tables */
static size_t table_size(const BrokerField *fields, int nfields);
static size_t field_size(const BrokerField *field);
static bool check_table(const BrokerField *fields, int nfields, BrokerError *error);
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
static bool take_credit(Broker *broker, size_t size);
static void refill_credit(Broker *broker);

/* Reading */
static bool read_frame(Broker *broker, amqp_frame_t *frame);
static int	read_library(Broker *broker, amqp_frame_t *frame);
static int	read_inbox(Broker *broker, amqp_frame_t *frame);
static int	decode_inbox(Broker *broker, amqp_frame_t *frame);
static bool begin_frame(Broker *broker);
static int	fill_inbox(Broker *broker);
static void serve_heartbeats(Broker *broker);
static void drain(Broker *broker);
static void dispatch(Broker *broker, const amqp_frame_t *frame);
static void dispatch_connection(Broker *broker, const amqp_frame_t *frame);
static void dispatch_publishing(Broker *broker, const amqp_frame_t *frame);
static void dispatch_delivery(Broker *broker, const amqp_basic_deliver_t *deliver);
static void dispatch_method(Broker *broker, const amqp_frame_t *frame);
static void dispatch_topology(Broker *broker, const amqp_frame_t *frame);
static void connection_closed(Broker *broker, const amqp_connection_close_t *close);
static void connection_blocked(Broker *broker, const amqp_connection_blocked_t *blocked);
static void connection_unblocked(Broker *broker);
static void channel_closed(Broker *broker, int channel, const amqp_channel_close_t *close);
static void confirmed(Broker *broker, BrokerEventType type, uint64_t tag, bool multiple);
static AssembleResult content_header(Broker *broker, const amqp_frame_t *frame);
static void content_assembled(Broker *broker, AssembleResult result);
static BrokerEvent *push_event(Broker *broker, BrokerEventType type);
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
		set_error(error, 0, "out of memory");
		return NULL;
	}
	if (password == NULL)
		password = address->password ? address->password : "";

	if (open_socket(broker, address, deadline) &&
		log_in(broker, address, password, deadline) &&
		open_publishing_channel(broker, deadline))
		return broker;

	*error = broker->lost ? broker->why : broker->channels[CHANNEL_PUBLISHING].why;
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

	assemble_reset(&broker->content);
	broker_free_delivery(broker->delivery);
	drop_deliveries(broker);
	free(broker->events);
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
	broker->why.code = code;
	va_start(args, format);
	vsnprintf(broker->why.text, sizeof(broker->why.text), format, args);
	va_end(args);

	/* The library may have closed the socket itself (heartbeat timeout). */
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

static void
set_error(BrokerError *error, int code, const char *format,...)
{
	va_list		args;

	error->code = code;
	va_start(args, format);
	vsnprintf(error->text, sizeof(error->text), format, args);
	va_end(args);
}

static BrokerResult
fail_lost(const Broker *broker, BrokerError *error)
{
	*error = broker->why;
	return BROKER_LOST;
}

/* Why a channel did not do what it should. */
static BrokerResult
fail_channel(const Broker *broker, int channel, BrokerError *error)
{
	if (broker->lost)
		return fail_lost(broker, error);
	*error = broker->channels[channel].why;
	return BROKER_REFUSED;
}

/* The peer's text for our logs: whatever its bytes, plain ASCII comes out. */
static void
copy_text(char *to, size_t size, amqp_bytes_t from)
{
	const unsigned char *bytes = from.bytes;
	size_t		len = from.len < size - 1 ? from.len : size - 1;

	for (size_t i = 0; i < len; i++)
		to[i] = bytes[i] >= ' ' && bytes[i] < 0x7f ? (char) bytes[i] : '?';
	to[len] = '\0';
}

/* The same into WHY_SIZE bytes; but it must say something. */
static void
copy_reason(const Broker *broker, char *to, int code, amqp_bytes_t from)
{
	if (from.len > 0)
		copy_text(to, WHY_SIZE, from);
	else
		snprintf(to, WHY_SIZE, "closed by %s with code %d", broker->where, code);
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
	broker->options = options;
	broker->tls = address->tls;
	broker->fd = -1;
	broker->frame_max = FRAME_MIN;
	broker->last_read_ms = clock_ms();
	broker->last_received_ms = broker->last_read_ms;
	assemble_init(&broker->content, options->consumer, BROKER_MAX_BODY);
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
	broker->credit_max = tcp_tune(broker->fd);
	if (broker->credit_max > CREDIT_MAX)
		broker->credit_max = CREDIT_MAX;
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

	reply = await_reply(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_START_METHOD, deadline);
	if (reply == NULL || !check_start(broker, reply))
		return false;
	broker->greeted = true;
	broker->major = server_major(&((const amqp_connection_start_t *) reply)->server_properties);
	if (!send_start_ok(broker, address->user, password, deadline))
		return false;

	reply = await_reply(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_TUNE_METHOD, deadline);
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

/*
 * Settles the limits.  The checks stand before amqp_tune_connection(): a
 * frame_max under the protocol's minimum would make the library write past
 * its buffer (GHSA-jh48-qjf5-fx5v).
 */
static bool
tune(Broker *broker, const amqp_connection_tune_t *proposed, int64_t deadline)
{
	amqp_connection_tune_ok_t ok = {
		.channel_max = CHANNEL_TOPOLOGY,
		.frame_max = FRAME_MAX,
		.heartbeat = (uint16_t) broker->options->heartbeat_s,
	};

	if (proposed->channel_max != 0 && proposed->channel_max < CHANNEL_TOPOLOGY)
		return lose(broker, 0, "%s allows only %d channel per connection, 2 are needed",
					broker->where, proposed->channel_max);
	if (proposed->frame_max != 0 && proposed->frame_max < FRAME_MIN)
		return lose(broker, 0, "%s proposes an invalid frame size", broker->where);

	if (proposed->frame_max != 0 && proposed->frame_max < ok.frame_max)
		ok.frame_max = proposed->frame_max;
	if (ok.heartbeat != 0 && proposed->heartbeat != 0 && proposed->heartbeat < ok.heartbeat)
		ok.heartbeat = proposed->heartbeat;
	/* a peer is given up after two; what the server proposes is no limit */
	if (ok.heartbeat != 0)
		ok.heartbeat = ok.heartbeat * 2 < broker->options->away_s ? (broker->options->away_s + 1) / 2 : ok.heartbeat;

	if (amqp_tune_connection(broker->conn, ok.channel_max, (int) ok.frame_max,
							 broker->tls ? ok.heartbeat : 0) != AMQP_STATUS_OK)
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
	return call(broker, CHANNEL_CONNECTION, AMQP_CONNECTION_OPEN_METHOD, &open,
				AMQP_CONNECTION_OPEN_OK_METHOD, deadline) != NULL;
}

static void
explain_login_failure(Broker *broker, const BrokerAddress *address)
{
	if (broker->why.code == AMQP_ACCESS_REFUSED)
		set_error(&broker->why, AMQP_ACCESS_REFUSED,
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
		set_error(&broker->why, why.code,
				  "vhost \"%s\" at %s does not exist or user \"%s\" may not access it (%.200s)",
				  address->vhost, broker->where, address->user, why.text);
}


/*
 * Channels and calls
 */

static bool
open_channel(Broker *broker, int channel, int64_t deadline)
{
	Channel    *c = &broker->channels[channel];
	amqp_channel_close_ok_t close_ok = {0};
	amqp_channel_open_t open = {0};

	if (c->state == CHANNEL_OPEN)
		return true;
	if (c->state == CHANNEL_REFUSED)
	{
		if (!send_method(broker, channel, AMQP_CHANNEL_CLOSE_OK_METHOD, &close_ok,
						 METHOD_SIZE, clock_left(deadline)))
			return false;
		c->state = CHANNEL_DOWN;
	}
	if (call(broker, channel, AMQP_CHANNEL_OPEN_METHOD, &open,
			 AMQP_CHANNEL_OPEN_OK_METHOD, deadline) == NULL)
		return false;
	c->state = CHANNEL_OPEN;
	return true;
}

static bool
open_publishing_channel(Broker *broker, int64_t deadline)
{
	amqp_confirm_select_t select = {0};

	if (!open_channel(broker, CHANNEL_PUBLISHING, deadline))
		return false;
	return broker->options->consumer ||
		call(broker, CHANNEL_PUBLISHING, AMQP_CONFIRM_SELECT_METHOD, &select,
			 AMQP_CONFIRM_SELECT_OK_METHOD, deadline) != NULL;
}

/*
 * A channel that is still open is closed first; what was in flight on it is
 * unknown then, as after the broker's own channel.close.
 */
BrokerResult
broker_reopen(Broker *broker, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	Channel    *channel = &broker->channels[CHANNEL_PUBLISHING];
	amqp_channel_close_t close = {.reply_code = AMQP_REPLY_SUCCESS};

	if (broker->lost)
		return fail_lost(broker, error);

	if (channel->state == CHANNEL_OPEN &&
		call(broker, CHANNEL_PUBLISHING, AMQP_CHANNEL_CLOSE_METHOD, &close,
			 AMQP_CHANNEL_CLOSE_OK_METHOD, deadline) != NULL)
		channel->state = CHANNEL_DOWN;

	/* Tags of the old channel must not be taken for those of the new one. */
	drop_deliveries(broker);
	broker_free_delivery(broker->delivery);
	broker->delivery = NULL;
	broker->consumes = false;
	broker->delivery_tag = 0;
	for (size_t i = broker->first; i < broker->last; i++)
	{
		BrokerEventType type = broker->events[i].type;

		if (type != BROKER_BLOCKED && type != BROKER_UNBLOCKED)
			broker->events[i].type = BROKER_NOTHING;
	}
	broker->published = 0;
	assemble_reset(&broker->content);

	if (!open_publishing_channel(broker, deadline))
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
	return BROKER_OK;
}

BrokerResult
broker_declare_exchange(Broker *broker, const char *exchange, BrokerError *error)
{
	amqp_exchange_declare_t declare = {
		.exchange = bytes_of(exchange),
		.type = bytes_of("fanout"),
		.durable = 1,
	};

	if (!check_short("exchange name", exchange, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	return call_topology(broker, AMQP_EXCHANGE_DECLARE_METHOD, &declare,
						 AMQP_EXCHANGE_DECLARE_OK_METHOD, NULL, error);
}

BrokerResult
broker_declare_queue(Broker *broker, const char *queue, const BrokerField *arguments,
					 int narguments, BrokerError *error)
{
	amqp_queue_declare_t declare = {0};
	const amqp_queue_declare_ok_t *ok;

	declare.queue = bytes_of(queue);
	declare.durable = 1;
	if (!check_short("queue name", queue, BROKER_MAX_SHORTSTR, error) ||
		!check_table(arguments, narguments, error))
		return BROKER_TOO_LARGE;
	if (table_size(arguments, narguments) + METHOD_SIZE > broker->frame_max)
	{
		set_error(error, 0, "queue arguments do not fit a frame of %zu bytes",
				  broker->frame_max);
		return BROKER_TOO_LARGE;
	}
	if (!fill_table(broker, arguments, narguments, &declare.arguments))
		return fail_lost(broker, error);
	return call_declare(broker, &declare, &ok, error);
}

BrokerResult
broker_bind_queue(Broker *broker, const char *queue, const char *exchange,
				  BrokerError *error)
{
	amqp_queue_bind_t bind = {0};

	bind.queue = bytes_of(queue);
	bind.exchange = bytes_of(exchange);
	if (!check_short("queue name", queue, BROKER_MAX_SHORTSTR, error) ||
		!check_short("exchange name", exchange, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	return call_topology(broker, AMQP_QUEUE_BIND_METHOD, &bind,
						 AMQP_QUEUE_BIND_OK_METHOD, NULL, error);
}

BrokerResult
broker_inspect_queue(Broker *broker, const char *queue, uint32_t *messages,
					 uint32_t *consumers, BrokerError *error)
{
	amqp_queue_declare_t declare = {0};
	const amqp_queue_declare_ok_t *ok;
	BrokerResult result;

	declare.queue = bytes_of(queue);
	declare.passive = 1;
	if (!check_short("queue name", queue, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	result = call_declare(broker, &declare, &ok, error);
	if (result == BROKER_OK)
	{
		*messages = ok->message_count;
		*consumers = ok->consumer_count;
	}
	return result;
}

BrokerResult
broker_delete_queue(Broker *broker, const char *queue, bool if_unused, bool if_empty,
					BrokerError *error)
{
	amqp_queue_delete_t delete = {
		.queue = bytes_of(queue),
		.if_unused = if_unused,
		.if_empty = if_empty,
	};

	if (!check_short("queue name", queue, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	return call_topology(broker, AMQP_QUEUE_DELETE_METHOD, &delete,
						 AMQP_QUEUE_DELETE_OK_METHOD, NULL, error);
}

BrokerResult
broker_unbind_queue(Broker *broker, const char *queue, const char *exchange,
					BrokerError *error)
{
	amqp_queue_unbind_t unbind = {0};

	unbind.queue = bytes_of(queue);
	unbind.exchange = bytes_of(exchange);
	if (!check_short("queue name", queue, BROKER_MAX_SHORTSTR, error) ||
		!check_short("exchange name", exchange, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	return call_topology(broker, AMQP_QUEUE_UNBIND_METHOD, &unbind,
						 AMQP_QUEUE_UNBIND_OK_METHOD, NULL, error);
}

BrokerResult
broker_delete_exchange(Broker *broker, const char *exchange, bool if_unused,
					   BrokerError *error)
{
	amqp_exchange_delete_t delete = {
		.exchange = bytes_of(exchange),
		.if_unused = if_unused,
	};

	if (!check_short("exchange name", exchange, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	return call_topology(broker, AMQP_EXCHANGE_DELETE_METHOD, &delete,
						 AMQP_EXCHANGE_DELETE_OK_METHOD, NULL, error);
}

/* declare-ok names the queue: an answer to an earlier question is noticed. */
static BrokerResult
call_declare(Broker *broker, amqp_queue_declare_t *declare,
			 const amqp_queue_declare_ok_t **ok, BrokerError *error)
{
	const void *answer;
	BrokerResult result = call_topology(broker, AMQP_QUEUE_DECLARE_METHOD, declare,
										AMQP_QUEUE_DECLARE_OK_METHOD, &answer, error);

	if (result != BROKER_OK)
		return result;
	*ok = answer;
	if ((*ok)->queue.len == declare->queue.len &&
		memcmp((*ok)->queue.bytes, declare->queue.bytes, declare->queue.len) == 0)
		return BROKER_OK;
	lose(broker, 0, "protocol violation by %s: another queue was declared than the one asked for",
		 broker->where);
	return fail_lost(broker, error);
}

/* One call on the topology channel, which is opened if it is not. */
static BrokerResult
call_topology(Broker *broker, amqp_method_number_t request, void *arguments,
			  amqp_method_number_t reply, const void **answer, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	const void *decoded;

	if (broker->lost)
		return fail_lost(broker, error);

	/* A corked request would stay in the kernel for a while. */
	broker_uncork(broker);
	if (!open_channel(broker, CHANNEL_TOPOLOGY, deadline))
		return fail_channel(broker, CHANNEL_TOPOLOGY, error);
	decoded = call(broker, CHANNEL_TOPOLOGY, request, arguments, reply, deadline);
	if (decoded == NULL)
		return fail_channel(broker, CHANNEL_TOPOLOGY, error);
	if (answer != NULL)
		*answer = decoded;
	return BROKER_OK;
}

/*
 * Sends a method and waits for its reply.  Returns the decoded reply, valid
 * until the next read, or NULL if the connection was lost or the channel
 * refused.
 */
static const void *
call(Broker *broker, int channel, amqp_method_number_t request, void *arguments,
	 amqp_method_number_t reply, int64_t deadline)
{
	if (!send_method(broker, channel, request, arguments, METHOD_SIZE, clock_left(deadline)))
		return NULL;
	return await_reply(broker, channel, reply, deadline);
}

static const void *
await_reply(Broker *broker, int channel, amqp_method_number_t reply, int64_t deadline)
{
	amqp_frame_t frame;

	for (;;)
	{
		while (read_frame(broker, &frame))
		{
			if (is_method(&frame, channel, reply))
				return frame.payload.method.decoded;
			dispatch(broker, &frame);
			if (broker->channels[channel].state == CHANNEL_REFUSED)
				return NULL;
			if (clock_left(deadline) == 0)
				break;
		}
		if (broker->lost)
			return NULL;
		if (clock_left(deadline) == 0)
		{
			lose(broker, 0, "no reply from %s in time", broker->where);
			return NULL;
		}
		broker->options->wait(broker->fd, false,
							  clock_left(deadline) < READ_SLICE_MS ? clock_left(deadline) : READ_SLICE_MS);
	}
}


/*
 * Publishing
 */

BrokerResult
broker_publish(Broker *broker, const BrokerMessage *message, long timeout_ms,
			   BrokerError *error)
{
	amqp_basic_publish_t publish = {
		.exchange = bytes_of(message->exchange),
		.routing_key = bytes_of(message->routing_key),
		.mandatory = 1,
	};
	size_t		header_size;
	bool		sent;

	if (broker->lost || broker->channels[CHANNEL_PUBLISHING].state != CHANNEL_OPEN)
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
	if (check_message(broker, message, &header_size, error) != BROKER_OK)
		return BROKER_TOO_LARGE;

	broker->mid_message = true;
	sent = send_method(broker, CHANNEL_PUBLISHING, AMQP_BASIC_PUBLISH_METHOD, &publish,
					   publish.exchange.len + publish.routing_key.len + 32, timeout_ms) &&
		send_content_header(broker, message, header_size, timeout_ms) &&
		send_content_body(broker, message->body, message->body_len, timeout_ms);
	broker->mid_message = false;
	if (!sent)
		return fail_channel(broker, CHANNEL_PUBLISHING, error);

	broker->published++;
	return BROKER_OK;
}

bool
broker_writable(Broker *broker, size_t bytes)
{
	size_t		need = bytes + METHOD_SIZE + 3 * WRITE_OVERHEAD;

	if (broker->lost)
		return false;
	if (need > broker->credit_max)
		need = broker->credit_max;
	if (broker->credit < need)
		refill_credit(broker);
	return broker->credit >= need;
}

void
broker_cork(Broker *broker)
{
	if (broker->lost || broker->corked)
		return;
	tcp_set_cork(broker->fd, true);
	broker->corked = true;
}

void
broker_uncork(Broker *broker)
{
	if (broker->lost || !broker->corked)
		return;
	tcp_set_cork(broker->fd, false);
	broker->corked = false;
}

/*
 * Everything the protocol would refuse, and the library only after it has
 * sent half of the message.  Sets the size of the content header's frame.
 */
static BrokerResult
check_message(const Broker *broker, const BrokerMessage *message, size_t *header_size,
			  BrokerError *error)
{
	if (!check_short("exchange name", message->exchange, BROKER_MAX_SHORTSTR, error) ||
		!check_short("routing key", message->routing_key, BROKER_MAX_SHORTSTR, error) ||
		!check_short("message id", message->message_id, BROKER_MAX_MESSAGE_ID, error) ||
		!check_short("content type", message->content_type, BROKER_MAX_SHORTSTR, error) ||
		!check_short("type", message->type, BROKER_MAX_SHORTSTR, error) ||
		!check_table(message->headers, message->nheaders, error))
		return BROKER_TOO_LARGE;

	*header_size = FRAME_ENVELOPE + 12 + properties_size(message);
	if (*header_size > broker->frame_max)
	{
		set_error(error, 0, "properties and headers need a frame of %zu bytes, the limit is %zu",
				  *header_size, broker->frame_max);
		return BROKER_TOO_LARGE;
	}
	if (message->body_len > BROKER_MAX_BODY)
	{
		set_error(error, 0, "body of %zu bytes is larger than %d bytes",
				  message->body_len, BROKER_MAX_BODY);
		return BROKER_TOO_LARGE;
	}
	return BROKER_OK;
}

/* text may be NULL: an absent property. */
static bool
check_short(const char *what, const char *text, size_t max, BrokerError *error)
{
	size_t		len = text ? strlen(text) : 0;

	if (len <= max)
		return true;
	set_error(error, 0, "%s of %zu bytes is longer than %zu bytes", what, len, max);
	return false;
}

/* Flags, then what fill_properties() sets. */
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
	size += 1 + strlen("pg_fanout");
	return size;
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
	properties->app_id = bytes_of("pg_fanout");
	if (message->type != NULL)
	{
		properties->_flags |= AMQP_BASIC_TYPE_FLAG;
		properties->type = bytes_of(message->type);
	}
}

static bool
send_content_header(Broker *broker, const BrokerMessage *message, size_t size,
					long timeout_ms)
{
	amqp_basic_properties_t properties;
	amqp_frame_t frame;

	fill_properties(message, &properties);
	if (!fill_table(broker, message->headers, message->nheaders, &properties.headers))
		return false;

	frame.frame_type = AMQP_FRAME_HEADER;
	frame.channel = CHANNEL_PUBLISHING;
	frame.payload.properties.class_id = AMQP_BASIC_CLASS;
	frame.payload.properties.body_size = message->body_len;
	frame.payload.properties.decoded = &properties;
	return send_frame(broker, &frame, size, timeout_ms);
}

/*
 * Pieces are as large as a frame and the credit allow.  The broker may refuse
 * the message before it has all of it; then there is no use in the rest.
 */
static bool
send_content_body(Broker *broker, const char *body, size_t len, long timeout_ms)
{
	size_t		piece = broker->frame_max;
	amqp_frame_t frame;

	if (piece > broker->credit_max - WRITE_OVERHEAD)
		piece = broker->credit_max - WRITE_OVERHEAD;
	piece -= FRAME_ENVELOPE;

	frame.frame_type = AMQP_FRAME_BODY;
	frame.channel = CHANNEL_PUBLISHING;
	while (len > 0)
	{
		size_t		now = len < piece ? len : piece;

		frame.payload.body_fragment.bytes = (void *) body;
		frame.payload.body_fragment.len = now;
		if (!send_frame(broker, &frame, now + FRAME_ENVELOPE, timeout_ms))
			return false;
		if (broker->channels[CHANNEL_PUBLISHING].state != CHANNEL_OPEN)
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
			   uint16_t prefetch, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	amqp_basic_qos_t qos = {.prefetch_count = prefetch};
	amqp_basic_consume_t consume = {0};

	if (broker->lost || broker->channels[CHANNEL_PUBLISHING].state != CHANNEL_OPEN)
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
	if (!check_short("queue name", queue, BROKER_MAX_SHORTSTR, error) ||
		!check_short("consumer tag", consumer_tag, BROKER_MAX_SHORTSTR, error))
		return BROKER_TOO_LARGE;
	broker->consumes = true;
	consume.queue = bytes_of(queue);
	consume.consumer_tag = bytes_of(consumer_tag);
	if (call(broker, CHANNEL_PUBLISHING, AMQP_BASIC_QOS_METHOD, &qos,
			 AMQP_BASIC_QOS_OK_METHOD, deadline) == NULL ||
		call(broker, CHANNEL_PUBLISHING, AMQP_BASIC_CONSUME_METHOD, &consume,
			 AMQP_BASIC_CONSUME_OK_METHOD, deadline) == NULL)
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
	return BROKER_OK;
}

BrokerResult
broker_cancel(Broker *broker, const char *consumer_tag, BrokerError *error)
{
	int64_t		deadline = clock_ms() + broker->options->rpc_timeout_ms;
	amqp_basic_cancel_t cancel = {0};

	if (broker->lost || broker->channels[CHANNEL_PUBLISHING].state != CHANNEL_OPEN)
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
	cancel.consumer_tag = bytes_of(consumer_tag);
	if (call(broker, CHANNEL_PUBLISHING, AMQP_BASIC_CANCEL_METHOD, &cancel,
			 AMQP_BASIC_CANCEL_OK_METHOD, deadline) == NULL)
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
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
	if (broker->lost || broker->channels[CHANNEL_PUBLISHING].state != CHANNEL_OPEN ||
		!send_method(broker, CHANNEL_PUBLISHING, method, arguments, 64, timeout_ms))
		return fail_channel(broker, CHANNEL_PUBLISHING, error);
	return BROKER_OK;
}

/* One piece of a delivery's memory. */
typedef struct BrokerBlock
{
	struct BrokerBlock *next;
} BrokerBlock;

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

/* Those that nobody has fetched. */
static void
drop_deliveries(Broker *broker)
{
	for (size_t i = broker->first; i < broker->last; i++)
	{
		broker_free_delivery(broker->events[i].delivery);
		broker->events[i].delivery = NULL;
	}
	broker->delivered = 0;
}

static bool
begin_delivery(Broker *broker, const amqp_basic_deliver_t *deliver)
{
	BrokerDelivery *delivery = broker->options->consumer ? calloc(1, sizeof(BrokerDelivery)) : NULL;

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
		(delivery->message_id = keep_text(delivery, properties->message_id)) == NULL)
		return false;
	if ((flags & AMQP_BASIC_CONTENT_TYPE_FLAG) &&
		(delivery->content_type = keep_text(delivery, properties->content_type)) == NULL)
		return false;
	if ((flags & AMQP_BASIC_TYPE_FLAG) &&
		(delivery->type = keep_text(delivery, properties->type)) == NULL)
		return false;
	if ((flags & AMQP_BASIC_HEADERS_FLAG) && properties->headers.num_entries > 0)
	{
		delivery->headers = keep_table(delivery, &properties->headers, 0);
		delivery->nheaders = properties->headers.num_entries;
	}
	return delivery->nheaders == 0 || delivery->headers != NULL;
}

static void
delivery_assembled(Broker *broker)
{
	BrokerDelivery *delivery = broker->delivery;
	BrokerEvent *event;

	delivery->body_len = (size_t) broker->content.body_size;
	delivery->size += delivery->body_len;
	delivery->body = assemble_take_body(&broker->content);
	if (broker->delivered > DELIVERED_MAX)
	{
		lose(broker, 0, "%s sends more than can be taken in", broker->where);
		return;
	}
	event = push_event(broker, BROKER_DELIVERY);
	if (event == NULL)
		return;
	event->delivery = delivery;
	broker->delivered += delivery->size;
	broker->delivery = NULL;
}

/* Memory that goes with the delivery; NULL if there is none. */
static void *
keep(BrokerDelivery *delivery, size_t size)
{
	BrokerBlock *block = malloc(sizeof(BrokerBlock) + size);

	if (block == NULL)
		return NULL;
	block->next = delivery->memory;
	delivery->memory = block;
	delivery->size += sizeof(BrokerBlock) + size;
	return block + 1;
}

static char *
keep_text(BrokerDelivery *delivery, amqp_bytes_t bytes)
{
	char	   *copy = keep(delivery, bytes.len + 1);

	if (copy == NULL)
		return NULL;
	if (bytes.len > 0)
		memcpy(copy, bytes.bytes, bytes.len);
	copy[bytes.len] = '\0';
	return copy;
}

static BrokerField *
keep_table(BrokerDelivery *delivery, const amqp_table_t *table, int depth)
{
	BrokerField *fields = keep(delivery, (size_t) (table->num_entries + 1) * sizeof(BrokerField));

	for (int i = 0; i < table->num_entries && fields != NULL; i++)
	{
		fields[i].name = keep_text(delivery, table->entries[i].key);
		if (fields[i].name == NULL ||
			!keep_value(delivery, &fields[i], &table->entries[i].value, depth))
			return NULL;
	}
	return fields;
}

static BrokerField *
keep_array(BrokerDelivery *delivery, const amqp_array_t *array, int depth)
{
	BrokerField *fields = keep(delivery, (size_t) (array->num_entries + 1) * sizeof(BrokerField));

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
			field->value.string.data = keep_text(delivery, value->value.bytes);
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

/* Encoded size without the leading length. */
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
		if (!check_short("name of a header", fields[i].name, BROKER_MAX_SHORTSTR, error))
			return false;
	}
	return true;
}

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
 * Writing
 *
 * While the kernel calls the socket writable, a third of its send buffer is
 * free.  So after one look, that much may be written without another: it is
 * the credit.  Every frame is charged its bytes and what the kernel books for
 * a write of its own.  A socket that is not writable still has room for the
 * heartbeats that the library writes on its own account while it reads TLS.
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

/* Returns false if the connection is lost. */
static bool
send_frame(Broker *broker, const amqp_frame_t *frame, size_t size, long timeout_ms)
{
	int			status;

	if (!take_credit(broker, size) && !wait_for_room(broker, size, timeout_ms))
		return false;

	errno = 0;
	status = amqp_send_frame(broker->conn, frame);
	broker->last_sent_ms = clock_ms();
	if (status == AMQP_STATUS_OK)
		return true;

	return lose_write(broker, status);
}

/*
 * Waits until a frame of so many bytes can be written without blocking, at
 * most timeout_ms without a single byte leaving the kernel's buffer.
 */
static bool
wait_for_room(Broker *broker, size_t size, long timeout_ms)
{
	int64_t		deadline = clock_ms() + timeout_ms;
	int			unsent = INT_MAX;

	for (;;)
	{
		refill_credit(broker);
		if (broker->lost)
			return false;
		if (take_credit(broker, size))
			return true;

		if (tcp_unsent(broker->fd) < unsent)
		{
			unsent = tcp_unsent(broker->fd);
			deadline = clock_ms() + timeout_ms;
		}
		if (clock_left(deadline) == 0)
			return lose(broker, 0, "%s has taken no data for %ld ms", broker->where,
						timeout_ms);
		broker->options->wait(broker->fd, true, WRITE_SLICE_MS);
	}
}

/* A frame larger than all credit there is takes all of it. */
static bool
take_credit(Broker *broker, size_t size)
{
	size_t		need = size + WRITE_OVERHEAD;

	if (need > broker->credit_max)
		need = broker->credit_max;
	if (broker->lost || broker->credit < need)
		return false;
	broker->credit -= need;
	return true;
}

/* Looks at the socket; on the way, takes in what is there to read. */
static void
refill_credit(Broker *broker)
{
	bool		readable;
	bool		writable = tcp_writable(broker->fd, &readable);

	if (writable)
		broker->credit = broker->credit_max;
	if (readable && (!writable || broker->delivered < DELIVERED_AHEAD))
		drain(broker);
}


/*
 * Reading
 *
 * A plain socket is read into the inbox, from which the library gets a frame at
 * a time.  Nothing makes us wait: a frame that is not complete yet stays with
 * the library, its rest is read when it comes.
 */

void
broker_next_event(Broker *broker, BrokerEvent *event)
{
	amqp_frame_t frame;
	int			frames = 0;

	while (broker->first == broker->last && read_frame(broker, &frame))
	{
		dispatch(broker, &frame);
		if (++frames > READS_AT_ONCE && broker->first == broker->last)
		{
			event->type = BROKER_MORE;
			return;
		}
	}

	if (pop_event(broker, event))
		return;
	if (!broker->lost)
	{
		event->type = BROKER_NOTHING;
		return;
	}
	event->type = BROKER_DISCONNECTED;
	event->code = broker->why.code;
	memcpy(event->text, broker->why.text, sizeof(event->text));
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
	status = broker->tls ? read_library(broker, frame) : read_inbox(broker, frame);
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

static int
read_library(Broker *broker, amqp_frame_t *frame)
{
	struct timeval no_wait = {0, 0};

	return amqp_simple_wait_frame_noblock(broker->conn, frame, &no_wait);
}

/* Returns AMQP_STATUS_TIMEOUT if there is no complete frame yet. */
static int
read_inbox(Broker *broker, amqp_frame_t *frame)
{
	int			status;

	do
	{
		status = decode_inbox(broker, frame);
		if (status != AMQP_STATUS_TIMEOUT)
			return status;
		status = fill_inbox(broker);
	} while (status == AMQP_STATUS_OK);
	return status;
}

static int
decode_inbox(Broker *broker, amqp_frame_t *frame)
{
	for (;;)
	{
		size_t		have = broker->inbox_last - broker->inbox_first;
		amqp_bytes_t bytes;
		int			taken;

		if (have == 0 || (broker->frame_left == 0 && have < FRAME_HEAD))
			return AMQP_STATUS_TIMEOUT;
		if (broker->frame_left == 0 && !begin_frame(broker))
			return AMQP_STATUS_BAD_AMQP_DATA;

		bytes.bytes = broker->inbox + broker->inbox_first;
		bytes.len = have < broker->frame_left ? have : broker->frame_left;
		taken = amqp_handle_input(broker->conn, bytes, frame);
		if (taken <= 0)
			return taken < 0 ? taken : AMQP_STATUS_BAD_AMQP_DATA;
		broker->inbox_first += (size_t) taken;
		broker->frame_left -= (size_t) taken;
		if (frame->frame_type != 0)
			return AMQP_STATUS_OK;
	}
}

/*
 * What the library would believe: it makes a pool of memory for every channel
 * it hears of, and skips what it does not know.
 */
static bool
begin_frame(Broker *broker)
{
	const unsigned char *head = broker->inbox + broker->inbox_first;
	int			channel = head[1] << 8 | head[2];
	size_t		size = (size_t) head[3] << 24 | (size_t) head[4] << 16 |
		(size_t) head[5] << 8 | head[6];

	if (memcmp(head, "AMQP", 4) == 0)
	{
		broker->frame_left = FRAME_ENVELOPE;
		return true;
	}
	if (head[0] != AMQP_FRAME_METHOD && head[0] != AMQP_FRAME_HEADER &&
		head[0] != AMQP_FRAME_BODY && head[0] != AMQP_FRAME_HEARTBEAT)
		return lose(broker, 0, "%s sent something that is not an AMQP 0-9-1 frame%s",
					broker->where, hint(broker));
	if (channel > CHANNEL_TOPOLOGY)
		return lose(broker, 0, "protocol violation by %s: frame on unknown channel %d",
					broker->where, channel);
	if (size + FRAME_ENVELOPE > (size_t) amqp_get_frame_max(broker->conn))
		return lose(broker, 0, "protocol violation by %s: frame of %zu bytes",
					broker->where, size);
	broker->frame_left = size + FRAME_ENVELOPE;
	return true;
}

/* Moves what is left, less than the head of a frame, to the front. */
static int
fill_inbox(Broker *broker)
{
	size_t		have = broker->inbox_last - broker->inbox_first;
	ssize_t		n;

	memmove(broker->inbox, broker->inbox + broker->inbox_first, have);
	broker->inbox_first = 0;
	broker->inbox_last = have;

	n = recv(broker->fd, broker->inbox + have, INBOX_SIZE - have, MSG_DONTWAIT);
	if (n == 0)
		return AMQP_STATUS_CONNECTION_CLOSED;
	if (n < 0)
		return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ?
			AMQP_STATUS_TIMEOUT : AMQP_STATUS_SOCKET_ERROR;
	broker->inbox_last += (size_t) n;
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
	int			status;

	broker->last_read_ms = clock_ms();
	if (broker->tls || interval == 0)
		return;
	if (broker->last_read_ms - broker->last_received_ms > 2 * interval)
	{
		lose_status(broker, "read from", AMQP_STATUS_HEARTBEAT_TIMEOUT);
		return;
	}
	if (broker->last_read_ms - broker->last_sent_ms < interval / 2 ||
		!tcp_writable(broker->fd, NULL))
		return;

	errno = 0;
	status = amqp_send_frame(broker->conn, &frame);
	broker->last_sent_ms = broker->last_read_ms;
	if (status != AMQP_STATUS_OK)
		lose_status(broker, "write to", status);
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
		if (broker->delivered >= DELIVERED_AHEAD)
			break;
	}
}

/* Takes note of a frame nobody waits for.  Never waits, never writes much. */
static void
dispatch(Broker *broker, const amqp_frame_t *frame)
{
	if (frame->frame_type == AMQP_FRAME_HEARTBEAT)
		return;

	switch (frame->channel)
	{
		case CHANNEL_CONNECTION:
			dispatch_connection(broker, frame);
			break;
		case CHANNEL_PUBLISHING:
			dispatch_publishing(broker, frame);
			break;
		case CHANNEL_TOPOLOGY:
			dispatch_topology(broker, frame);
			break;
		default:
			lose(broker, 0, "protocol violation by %s: frame on unknown channel %d",
				 broker->where, frame->channel);
			break;
	}
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

static void
dispatch_publishing(Broker *broker, const amqp_frame_t *frame)
{
	switch (frame->frame_type)
	{
		case AMQP_FRAME_METHOD:
			dispatch_method(broker, frame);
			break;
		case AMQP_FRAME_HEADER:
			content_assembled(broker, content_header(broker, frame));
			break;
		case AMQP_FRAME_BODY:
			content_assembled(broker,
							  assemble_body(&broker->content,
											frame->payload.body_fragment.bytes,
											frame->payload.body_fragment.len));
			break;
	}
}

/* Of a tag that is 0 or comes again, an ack would settle something else. */
static void
dispatch_delivery(Broker *broker, const amqp_basic_deliver_t *deliver)
{
	AssembleResult result = assemble_method(&broker->content, 0, "", 0);

	if (result != ASSEMBLE_VIOLATION &&
		(!broker->consumes || deliver->delivery_tag <= broker->delivery_tag))
	{
		broker->content.problem = broker->consumes ?
			"a delivery tag is not greater than the one before it" :
			"a delivery came before anything was consumed";
		result = ASSEMBLE_VIOLATION;
	}
	if (result != ASSEMBLE_VIOLATION && !begin_delivery(broker, deliver))
		lose(broker, 0, "out of memory");
	content_assembled(broker, result);
}

static void
dispatch_method(Broker *broker, const amqp_frame_t *frame)
{
	const void *decoded = frame->payload.method.decoded;

	if (frame->payload.method.id == AMQP_BASIC_RETURN_METHOD)
	{
		const amqp_basic_return_t *returned = decoded;

		content_assembled(broker,
						  assemble_method(&broker->content, returned->reply_code,
										  returned->reply_text.bytes,
										  returned->reply_text.len));
		return;
	}

	if (frame->payload.method.id == AMQP_BASIC_DELIVER_METHOD && broker->options->consumer)
	{
		dispatch_delivery(broker, decoded);
		return;
	}

	if (assemble_other(&broker->content) == ASSEMBLE_VIOLATION)
	{
		content_assembled(broker, ASSEMBLE_VIOLATION);
		return;
	}
	switch (frame->payload.method.id)
	{
		case AMQP_BASIC_ACK_METHOD:
			{
				const amqp_basic_ack_t *ack = decoded;

				confirmed(broker, BROKER_ACK, ack->delivery_tag, ack->multiple);
				break;
			}
		case AMQP_BASIC_NACK_METHOD:
			{
				const amqp_basic_nack_t *nack = decoded;

				confirmed(broker, BROKER_NACK, nack->delivery_tag, nack->multiple);
				break;
			}
		case AMQP_CHANNEL_CLOSE_METHOD:
			channel_closed(broker, CHANNEL_PUBLISHING, decoded);
			break;
		case AMQP_CHANNEL_CLOSE_OK_METHOD:
			/* broker_reopen()'s close crossed the broker's */
			break;
		case AMQP_BASIC_CANCEL_METHOD:
			(void) push_event(broker, BROKER_CANCELLED);
			break;
		default:
			lose(broker, 0, "protocol violation by %s: unexpected method on the publishing channel",
				 broker->where);
			break;
	}
}

static void
dispatch_topology(Broker *broker, const amqp_frame_t *frame)
{
	if (is_method(frame, CHANNEL_TOPOLOGY, AMQP_CHANNEL_CLOSE_METHOD))
		channel_closed(broker, CHANNEL_TOPOLOGY, frame->payload.method.decoded);
	else
		lose(broker, 0, "protocol violation by %s: unexpected frame on the topology channel",
			 broker->where);
}

/* close-ok is a courtesy: it is sent only if that takes no waiting. */
static void
connection_closed(Broker *broker, const amqp_connection_close_t *close)
{
	amqp_connection_close_ok_t ok = {0};
	char text[	WHY_SIZE];
	int			code = close->reply_code;

	copy_reason(broker, text, code, close->reply_text);
	if (!broker->mid_message && tcp_writable(broker->fd, NULL))
		amqp_send_method(broker->conn, CHANNEL_CONNECTION,
						 AMQP_CONNECTION_CLOSE_OK_METHOD, &ok);
	lose(broker, code, "%s", text);
}

static void
connection_blocked(Broker *broker, const amqp_connection_blocked_t *blocked)
{
	BrokerEvent *event = push_event(broker, BROKER_BLOCKED);

	if (event == NULL)
		return;
	copy_text(event->text, sizeof(event->text), blocked->reason);
	broker->blocked = true;
	tcp_set_user_timeout(broker->fd, 0);
}

static void
connection_unblocked(Broker *broker)
{
	if (push_event(broker, BROKER_UNBLOCKED) == NULL)
		return;
	broker->blocked = false;
	tcp_set_user_timeout(broker->fd, USER_TIMEOUT_MS);
}

static void
channel_closed(Broker *broker, int channel, const amqp_channel_close_t *close)
{
	Channel    *c = &broker->channels[channel];
	BrokerEvent *event;

	c->state = CHANNEL_REFUSED;
	c->why.code = close->reply_code;
	copy_reason(broker, c->why.text, close->reply_code, close->reply_text);
	if (channel != CHANNEL_PUBLISHING)
		return;

	event = push_event(broker, BROKER_CHANNEL_CLOSED);
	if (event == NULL)
		return;
	event->code = c->why.code;
	memcpy(event->text, c->why.text, sizeof(event->text));
}

/*
 * A tag that is not used up yet, or 0, must not reach a window of messages in
 * flight: by the time it is looked at there, the message may have been sent.
 */
static void
confirmed(Broker *broker, BrokerEventType type, uint64_t tag, bool multiple)
{
	BrokerEvent *event;

	if (tag == 0 || tag > broker->published)
	{
		lose(broker, 0, "protocol violation by %s: a message was confirmed that was not sent",
			 broker->where);
		return;
	}
	event = push_event(broker, type);
	if (event == NULL)
		return;
	event->tag = tag;
	event->multiple = multiple;
}

static AssembleResult
content_header(Broker *broker, const amqp_frame_t *frame)
{
	const amqp_basic_properties_t *properties = frame->payload.properties.decoded;
	amqp_bytes_t id = amqp_empty_bytes;

	/* Of another class, "decoded" would be of another type. */
	if (frame->payload.properties.class_id != AMQP_BASIC_CLASS)
	{
		broker->content.problem = "a content header is of the wrong class";
		return ASSEMBLE_VIOLATION;
	}
	if (broker->delivery != NULL && broker->content.state == ASSEMBLE_HEADER &&
		!take_properties(broker, properties))
	{
		broker->content.problem = "out of memory for its properties";
		return ASSEMBLE_VIOLATION;
	}
	if (properties->_flags & AMQP_BASIC_MESSAGE_ID_FLAG)
		id = properties->message_id;
	return assemble_header(&broker->content, id.bytes, id.len,
						   frame->payload.properties.body_size);
}

static void
content_assembled(Broker *broker, AssembleResult result)
{
	const Assembler *returned = &broker->content;
	BrokerEvent *event;

	if (result == ASSEMBLE_VIOLATION)
		lose(broker, 0, "protocol violation by %s: %s", broker->where, returned->problem);
	if (result != ASSEMBLE_DONE)
		return;
	if (broker->delivery != NULL)
	{
		delivery_assembled(broker);
		return;
	}

	event = push_event(broker, BROKER_RETURN);
	if (event == NULL)
		return;
	event->code = returned->code;
	copy_text(event->text, sizeof(event->text), bytes_of(returned->text));
	snprintf(event->message_id, sizeof(event->message_id), "%.*s",
			 BROKER_MAX_MESSAGE_ID, returned->message_id);
}

/* Returns the new event, or NULL with the connection given up. */
static BrokerEvent *
push_event(Broker *broker, BrokerEventType type)
{
	BrokerEvent *event;

	if (broker->first == broker->last)
		broker->first = broker->last = 0;
	if (broker->last == broker->capacity)
	{
		size_t		capacity = broker->capacity ? 2 * broker->capacity : 64;
		BrokerEvent *events = NULL;

		if (capacity <= EVENTS_MAX)
			events = realloc(broker->events, capacity * sizeof(BrokerEvent));
		if (events == NULL)
		{
			lose(broker, 0, "%s sends more than can be taken in", broker->where);
			return NULL;
		}
		broker->events = events;
		broker->capacity = capacity;
	}

	event = &broker->events[broker->last++];
	event->type = type;
	event->tag = 0;
	event->multiple = false;
	event->code = 0;
	event->message_id[0] = '\0';
	event->delivery = NULL;
	event->text[0] = '\0';
	return event;
}

/* broker_reopen() may have voided some. */
static bool
pop_event(Broker *broker, BrokerEvent *event)
{
	while (broker->first < broker->last)
	{
		BrokerEvent *next = &broker->events[broker->first++];

		if (next->type == BROKER_NOTHING)
			continue;
		*event = *next;
		if (next->delivery != NULL)
		{
			broker->delivered -= next->delivery->size;
			next->delivery = NULL;
		}
		return true;
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

	bytes.len = strlen(text);
	bytes.bytes = (void *) text;

	return bytes;
}
