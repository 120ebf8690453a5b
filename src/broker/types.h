/*-------------------------------------------------------------------------
 *
 * types.h
 *		What is said to the broker, and what it says.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TYPES_H
#define PGF_TYPES_H

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

/* The reply code with which an operator, or a broker that ends, closes a connection. */
#define BROKER_CONNECTION_FORCED 320

typedef enum BrokerResult
{
	BROKER_OK,
	BROKER_REFUSED,				/* the broker closed the channel: code, text */
	BROKER_LOST,				/* the connection is gone; only broker_close()
								 * may follow */
	BROKER_TOO_LARGE,			/* the text says what is; nothing was sent */
	BROKER_BUSY,				/* not now: the text says why; nothing was
								 * sent */
} BrokerResult;

/* Why the last call failed; text never contains a password. */
typedef struct BrokerError
{
	int			code;			/* AMQP reply code, 0 if none */
	int			class_id;		/* of the method that the broker blames for a */
	int			method_id;		/* close (broker_blames_request()), or 0 */
	char text[	512];
} BrokerError;

typedef enum BrokerEventType
{
	BROKER_NOTHING,				/* no more frames for now */
	BROKER_MORE,				/* frames that mean nothing, and more to come:
								 * call again before sleeping */
	BROKER_CHANNEL_OPENED,		/* channel: it can be used now */
	BROKER_CHANNEL_CLOSED,		/* channel, by the broker: code, text, blame;
								 * all that was in flight on it is unknown,
								 * and a request on it is refused; the number
								 * is free */
	BROKER_REPLY,				/* channel: its request is done; messages,
								 * consumers if it was about a queue */
	BROKER_ACK,					/* channel, tag, multiple */
	BROKER_NACK,				/* channel, tag, multiple */
	BROKER_RETURN,				/* channel, message_id, code, text */
	BROKER_BLOCKED,				/* connection.blocked: text is the reason */
	BROKER_UNBLOCKED,
	BROKER_DISCONNECTED,		/* code, text, blame */
	BROKER_DELIVERY,			/* delivery: the receiver frees it with
								 * broker_free_delivery() */
	BROKER_CANCELLED,			/* the broker ended the consumer: its queue is
								 * gone, or moves */
} BrokerEventType;

typedef struct BrokerDelivery BrokerDelivery;

typedef struct BrokerEvent
{
	BrokerEventType type;
	int			channel;		/* 0: the connection */
	uint64_t	tag;			/* ACK, NACK */
	bool		multiple;		/* ACK, NACK: all outstanding up to tag */
	int			code;
	int			class_id;		/* blame, as in BrokerError */
	int			method_id;
	uint32_t	messages;		/* REPLY */
	uint32_t	consumers;
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
	BROKER_VALUE_TIMESTAMP,		/* seconds since 1970: to be sent only */
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
		int64_t		integer;	/* INT, TIMESTAMP */
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

typedef enum BrokerRequestKind
{
	BROKER_DECLARE_EXCHANGE,	/* exchange: durable, fanout */
	BROKER_DELETE_EXCHANGE,		/* exchange, if_unused */
	BROKER_DECLARE_QUEUE,		/* queue, arguments: durable */
	BROKER_INSPECT_QUEUE,		/* queue: counts of one that exists, else
								 * refused (404) */
	BROKER_BIND_QUEUE,			/* queue, exchange */
	BROKER_UNBIND_QUEUE,		/* queue, exchange */
	BROKER_DELETE_QUEUE,		/* queue, if_unused, if_empty: answered also
								 * if there is none */
} BrokerRequestKind;

/* Asks the broker for something.  Strings and fields need not outlive the call. */
typedef struct BrokerRequest
{
	BrokerRequestKind kind;
	const char *exchange;		/* these two where the kind wants them */
	const char *queue;
	bool		if_unused;
	bool		if_empty;
	const BrokerField *arguments;
	int			narguments;
} BrokerRequest;

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
	const void *properties;		/* as they came, if the options say so */
	size_t		properties_len;
	size_t		size;			/* of all of it in memory, about */
	struct BrokerBlock *memory; /* private */
};

#endif							/* PGF_TYPES_H */
