/*-------------------------------------------------------------------------
 *
 * broker.h
 *		One AMQP 0-9-1 connection to RabbitMQ.
 *
 * The only interface through which the rest of pg_fanout sees the broker.
 * Nothing here raises a PostgreSQL error by itself: results are codes and a
 * text.  Only the wait callback may not return (it may raise an error or
 * end the process), so a caller must be able to lose a Broker at any wait.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_BROKER_H
#define PGF_BROKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The largest body RabbitMQ can be configured to take (max_message_size). */
#define BROKER_MAX_BODY		(512 * 1024 * 1024)

/* Longest AMQP short string: names of exchanges, queues, properties. */
#define BROKER_MAX_SHORTSTR 255

/* Longest message id: what a return brings back, BrokerEvent.message_id. */
#define BROKER_MAX_MESSAGE_ID 63

/* The reply code with which a login, a channel or a declaration is not allowed. */
#define BROKER_ACCESS_REFUSED 403

typedef struct Broker Broker;

/* One element of pg_fanout.uri.  All strings are NUL-terminated. */
typedef struct BrokerAddress
{
	char	   *host;
	int			port;
	char	   *user;
	char	   *password;		/* NULL: not given in the URI */
	char	   *vhost;
	bool		tls;			/* amqps:// */
} BrokerAddress;

typedef struct BrokerOptions
{
	const char *connection_name;	/* shown by the management UI */
	const char *tls_ca_file;	/* NULL: the system's authorities */
	const char *tls_cert_file;	/* NULL, and the key too: no client
								 * certificate */
	const char *tls_key_file;
	bool		tls_verify;		/* verify the chain and the host name */
	int			connect_timeout_ms; /* bounds connect + handshake + login */
	int			rpc_timeout_ms; /* bounds the wait for a reply to a declare */
	int			heartbeat_s;	/* 0 disables */
	int			away_s;			/* so long may the caller serve nothing; the
								 * heartbeat is at least half of it */
	bool		consumer;		/* consumes, and does not publish */

	/*
	 * Waits until fd is readable (or writable) or timeout_ms has passed,
	 * whichever is first; returns true if the socket is ready.  It must be
	 * the process's interruptible wait.  For tests outside the server a plain
	 * poll() will do.
	 */
	bool		(*wait) (int fd, bool for_write, long timeout_ms);

	/* Told the socket as soon as it exists, and -1 before it is closed. */
	void		(*fd_changed) (int fd);
} BrokerOptions;

typedef enum BrokerResult
{
	BROKER_OK,
	BROKER_REFUSED,				/* the broker closed the channel: code, text */
	BROKER_LOST,				/* the connection is gone; only broker_close()
								 * may follow */
	BROKER_TOO_LARGE,			/* the text says what is; nothing was sent */
} BrokerResult;

/* Why the last call failed; text never contains a password. */
typedef struct BrokerError
{
	int			code;			/* AMQP reply code, 0 if none */
	char text[	512];
} BrokerError;

typedef enum BrokerEventType
{
	BROKER_NOTHING,				/* no more frames for now */
	BROKER_MORE,				/* frames that mean nothing, and more to come:
								 * call again before sleeping */
	BROKER_ACK,
	BROKER_NACK,
	BROKER_RETURN,				/* message_id, code, text */
	BROKER_BLOCKED,				/* connection.blocked: text is the reason */
	BROKER_UNBLOCKED,
	BROKER_CHANNEL_CLOSED,		/* the publishing or consuming channel: code,
								 * text; all that was in flight is unknown;
								 * call broker_reopen() */
	BROKER_DISCONNECTED,		/* code, text */
	BROKER_DELIVERY,			/* delivery: the receiver frees it with
								 * broker_free_delivery() */
	BROKER_CANCELLED,			/* the broker ended the consumer: its queue is
								 * gone, or moves */
} BrokerEventType;

typedef struct BrokerDelivery BrokerDelivery;

typedef struct BrokerEvent
{
	BrokerEventType type;
	uint64_t	tag;			/* ACK, NACK */
	bool		multiple;		/* ACK, NACK: all outstanding up to tag */
	int			code;
	char		message_id[BROKER_MAX_MESSAGE_ID + 1];	/* RETURN */
	BrokerDelivery *delivery;	/* DELIVERY, else NULL */
	char text[	512];
} BrokerEvent;

/* A header or argument value. */
typedef enum BrokerValueType
{
	BROKER_VALUE_NULL,
	BROKER_VALUE_BOOL,
	BROKER_VALUE_INT,			/* sent as a 64-bit signed integer */
	BROKER_VALUE_DOUBLE,
	BROKER_VALUE_STRING,
	BROKER_VALUE_TABLE,			/* of a delivery only: fields with names */
	BROKER_VALUE_ARRAY,			/* of a delivery only: fields without */
} BrokerValueType;

typedef struct BrokerField
{
	const char *name;
	BrokerValueType type;
	union
	{
		bool		boolean;
		int64_t		integer;
		double		real;
		struct
		{
			const char *data;
			size_t		len;
		}			string;
		struct
		{
			struct BrokerField *fields;
			int			count;
		}			nested;
	}			value;
} BrokerField;

typedef struct BrokerMessage
{
	const char *exchange;
	const char *routing_key;
	const char *message_id;
	const char *content_type;
	const char *type;			/* NULL: property absent */
	uint64_t	timestamp;		/* seconds since 1970 */
	const BrokerField *headers;
	int			nheaders;
	const char *body;
	size_t		body_len;
} BrokerMessage;

/*
 * One message delivered to a consumer.  The strings are the peer's bytes: they
 * need be valid in no encoding, but end with a NUL, and are cut at one that is
 * in them.  NULL: the property is absent.
 */
struct BrokerDelivery
{
	uint64_t	tag;
	bool		redelivered;
	bool		has_timestamp;
	uint64_t	timestamp;		/* seconds since 1970 */
	const char *message_id;
	const char *content_type;
	const char *type;
	BrokerField *headers;		/* names and strings as above, but with NULs
								 * in strings; nothing is NULL */
	int			nheaders;
	char	   *body;			/* NULL if body_len is 0 */
	size_t		body_len;
	size_t		size;			/* of all of it in memory, about */
	struct BrokerBlock *memory; /* private */
};

/*
 * Parses a comma-separated list of amqp:// and amqps:// URIs (RabbitMQ URI
 * specification: percent-decoding, default port 5672 or 5671, default user
 * "guest" and password "guest" if no user is given, vhost "/" if there is no
 * path or an empty one).  Returns a malloc'd array of *count
 * addresses, to be freed with broker_free_addresses(), or NULL with *error
 * set to a static text that names what is wrong and never quotes the URI.
 */
extern BrokerAddress *broker_parse_uri(const char *uri, int *count, const char **error);
extern void broker_free_addresses(BrokerAddress *addresses, int count);

/*
 * Connects, logs in, opens the publishing channel in confirm mode.  The
 * password overrides the address's unless NULL.  Returns NULL with *error
 * filled on failure: at the latest after options->connect_timeout_ms.  All of
 * it waits through options->wait(), looking up the host's name included, but
 * for the TLS handshake (broker_handshake_fd()).
 * The options must outlive the connection; address and password need not.
 */
extern Broker *broker_connect(const BrokerAddress *address, const char *password,
							  const BrokerOptions *options, BrokerError *error);

/*
 * Closes the socket and frees everything.  polite: close as AMQP wants it, if
 * the connection is healthy and the socket takes that at once, and wait for
 * the answer, at most 200 ms and without calling options->wait(); so it may
 * be used where nothing may be raised.
 */
extern void broker_close(Broker *broker, bool polite);

/* -1 once the connection is lost. */
extern int	broker_fd(const Broker *broker);

/*
 * The socket of a TLS handshake that this process is in, or -1.  The handshake
 * happens inside one library call, before fd_changed() can be told.  Safe in
 * a signal handler, which is what it is for: shutdown() of it ends the call.
 */
extern int	broker_handshake_fd(void);

/* Is the connection blocked by the broker (connection.blocked)? */
extern bool broker_blocked(const Broker *broker);

/* The first number of the server's version, as it says; 0: it does not. */
extern int	broker_major(const Broker *broker);

/*
 * Milliseconds until broker_next_event() must be called again for the sake of
 * heartbeats; an hour if there are none.
 */
extern long broker_next_heartbeat(const Broker *broker);

/*
 * Hands one persistent, mandatory message to the socket.  BROKER_OK only
 * means that it was written: the confirm decides.  The delivery tag is the
 * count of messages published since broker_connect() or broker_reopen(),
 * beginning with 1.  Waits (interruptibly) for room in the socket's buffer
 * frame by frame, at most timeout_ms without a byte leaving the kernel, and
 * then the connection is given up as BROKER_LOST.  What the broker says
 * meanwhile is kept for broker_next_event().
 *
 * BROKER_REFUSED: the publishing channel is closed, maybe in the middle of
 * this very message; BROKER_CHANNEL_CLOSED is, or was, among the events.
 */
extern BrokerResult broker_publish(Broker *broker, const BrokerMessage *message,
								   long timeout_ms, BrokerError *error);

/*
 * Can broker_publish() send a message of so many bytes, headers included,
 * without waiting for the socket?  Of a message too large for that ever (128
 * kB, or a third of the send buffer): can it begin at once?  Cheap: asks the
 * kernel only once per 128 kB or so.
 */
extern bool broker_writable(Broker *broker, size_t bytes);

/*
 * Everything published between cork and uncork may be collected into full
 * segments by the kernel (TCP_CORK); uncork sends the rest at once.
 */
extern void broker_cork(Broker *broker);
extern void broker_uncork(Broker *broker);

/*
 * Next thing the broker said, without waiting.  BROKER_NOTHING means that
 * frames queued, bytes buffered (TLS too) and the socket are all drained, so
 * that it is right to sleep on the socket now.
 */
extern void broker_next_event(Broker *broker, BrokerEvent *event);

/*
 * Opens the publishing channel again in confirm mode after
 * BROKER_CHANNEL_CLOSED, or at any time: a channel still open is closed first.
 * Delivery tags start at 1 again; confirms and returns not fetched yet are
 * dropped with the old channel.
 */
extern BrokerResult broker_reopen(Broker *broker, BrokerError *error);

/*
 * Consuming, on the channel that otherwise publishes; only for a connection
 * whose options say so.  Deliveries come as events.
 *
 * broker_consume() sets the prefetch (1 to 65535: deliveries that are neither
 * acked nor nacked at any time) of the consumer that it begins; one that was
 * begun before keeps its own.  Both wait for the answer, as topology does.
 * BROKER_REFUSED (404: no such queue, 403): the channel is closed, and
 * BROKER_CHANNEL_CLOSED is among the events.
 *
 * Deliveries that were in work when a consumer was cancelled can still be
 * settled.  broker_ack(): multiple: all outstanding up to tag.  broker_requeue()
 * gives one back (basic.nack).  They wait as broker_publish() does.
 */
extern BrokerResult broker_consume(Broker *broker, const char *queue, const char *consumer_tag,
								   uint16_t prefetch, BrokerError *error);
extern BrokerResult broker_cancel(Broker *broker, const char *consumer_tag, BrokerError *error);
extern BrokerResult broker_ack(Broker *broker, uint64_t tag, bool multiple, long timeout_ms,
							   BrokerError *error);
extern BrokerResult broker_requeue(Broker *broker, uint64_t tag, long timeout_ms,
								   BrokerError *error);
extern void broker_free_delivery(BrokerDelivery *delivery);

/*
 * Topology.  All run on a channel of their own, opened when needed, so that
 * a refusal (404, 403, 405, 406) never disturbs the messages in flight; they
 * wait for the reply interruptibly, at most rpc_timeout_ms (then
 * BROKER_LOST).  Events of the publishing channel that arrive meanwhile are
 * kept for broker_next_event().  A broker that has blocked the connection
 * does not read it, and answers nothing: better ask broker_blocked() first.
 */
extern BrokerResult broker_declare_exchange(Broker *broker, const char *exchange,
											BrokerError *error);
extern BrokerResult broker_declare_queue(Broker *broker, const char *queue,
										 const BrokerField *arguments, int narguments,
										 BrokerError *error);
extern BrokerResult broker_bind_queue(Broker *broker, const char *queue,
									  const char *exchange, BrokerError *error);

/* Passive declare: counts of a queue that exists, BROKER_REFUSED 404 if not. */
extern BrokerResult broker_inspect_queue(Broker *broker, const char *queue,
										 uint32_t *messages, uint32_t *consumers,
										 BrokerError *error);
extern BrokerResult broker_delete_queue(Broker *broker, const char *queue,
										bool if_unused, bool if_empty, BrokerError *error);
extern BrokerResult broker_unbind_queue(Broker *broker, const char *queue,
										const char *exchange, BrokerError *error);
extern BrokerResult broker_delete_exchange(Broker *broker, const char *exchange,
										   bool if_unused, BrokerError *error);

#endif							/* PGF_BROKER_H */
