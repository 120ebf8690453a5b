/*-------------------------------------------------------------------------
 *
 * delivery.h
 *		From an AMQP delivery to a fanout.message.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_DELIVERY_H
#define PGF_DELIVERY_H

#include "postgres.h"

#include "utils/uuid.h"

#include "broker/broker.h"
#include "consume/order.h"
#include "server/monotime.h"

typedef enum DeliveryState
{
	DELIVERY_READY,				/* to be handled */
	DELIVERY_WAITING,			/* behind another of its key */
	DELIVERY_FAILED,			/* in hand until its next attempt is due */
	DELIVERY_AWAY,				/* failed, and on its way back to us */
	DELIVERY_GONE,				/* failed, and did not come back */
} DeliveryState;

/* What became of a delivery in a transaction. */
typedef enum DeliveryOutcome
{
	OUTCOME_NONE,
	OUTCOME_APPLIED,
	OUTCOME_SEEN,				/* was applied, or given up, before */
	OUTCOME_TWIN,				/* of another one in the same batch */
	OUTCOME_BLOCKED,			/* behind one that failed in the same batch */
	OUTCOME_FAILED,
	OUTCOME_DEAD,
} DeliveryOutcome;

typedef struct Delivery
{
	OrderItem	order;			/* first, so that the pointers are equal */
	pg_uuid_t	message_id;
	DeliveryState state;
	DeliveryOutcome outcome;
	struct Delivery *next;		/* in the list of those to be handled */
	struct Delivery *same;		/* another that failed, of the same message id */

	/* of the delivery in hand */
	BrokerDelivery *wire;		/* NULL: its body was let go */
	size_t		size;			/* of that in memory, now or before */
	uint64		tag;			/* 0: not in hand */
	uint32		epoch;			/* of which basic.consume */
	bool		suspect;		/* the worker may have ended because of it */

	/* of the message */
	char	   *type;			/* these: server encoding, NULL: none */
	char	   *key;
	char	   *old_key;
	int64		sequence;
	bool		has_sequence;
	bool		truncates;

	/* of attempts that failed */
	bool		known;			/* has a row in fanout.failure */
	int			attempts;		/* begun */
	MonoTime	due;			/* next attempt */
	MonoTime	away_since;
	char		sqlstate[6];	/* of the last error */
	char	   *error;			/* the same; NULL: none */
} Delivery;

/* A fanout.message as the handler gets it, and as a dead letter keeps it. */
#define MESSAGE_ATTRIBUTES 13

typedef struct MessageValues
{
	Datum		values[MESSAGE_ATTRIBUTES];
	bool		nulls[MESSAGE_ATTRIBUTES];
} MessageValues;

/* In the order of the type's attributes. */
enum
{
	MESSAGE_ID,
	MESSAGE_TOPIC,
	MESSAGE_CONSUMER_GROUP,
	MESSAGE_TYPE,
	MESSAGE_KEY,
	MESSAGE_SEQUENCE,
	MESSAGE_HEADERS,
	MESSAGE_BODY,
	MESSAGE_RAW,
	MESSAGE_PUBLISHED_AT,
	MESSAGE_REDELIVERED,
	MESSAGE_ATTEMPT,
	MESSAGE_CONTENT_TYPE,
};

/*
 * Reads from the wire what has to be known before it is handled: id, keys,
 * sequence.  Takes over the wire.  In the current context.
 */
extern Delivery *delivery_new(BrokerDelivery *wire, const char *queue, bool ordered);

/* Sets the hashes by which it is ordered, from the keys' texts in UTF-8. */
extern void delivery_set_keys(Delivery *delivery, const char *key, size_t key_len,
							  const char *old_key, size_t old_key_len);
extern void delivery_free(Delivery *delivery);

/* Lets its body go; what was read of it stays. */
extern void delivery_drop_body(Delivery *delivery);

/* In the current context; raises no error because of what the message is. */
extern void delivery_values(const Delivery *delivery, const char *topic,
							const char *consumer_group, MessageValues *message);

/* The bytes as jsonb, NULL if they are not JSON in UTF-8.  The same promise. */
extern Datum delivery_json(const char *bytes, size_t len, bool *isnull);

/* The bytes in the server's encoding, or NULL if that cannot be. */
extern char *delivery_text(const char *utf8, size_t len);

#endif							/* PGF_DELIVERY_H */
