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

#include "datatype/timestamp.h"
#include "utils/uuid.h"

#include "broker/broker.h"
#include "consume/order.h"
#include "server/monotime.h"

/*
 * Says what a transaction has made of a message.  After NONE and EARLY the delivery stays
 * unacked; all other outcomes are committed, so it can be acked.
 */
typedef enum DeliveryOutcome
{
	OUTCOME_NONE,				/* its turn did not come */
	OUTCOME_APPLIED,
	OUTCOME_SEEN,				/* was applied, given up or stored before */
	OUTCOME_EARLY,				/* given back before, and not due yet */
	OUTCOME_BEHIND,				/* stored behind one of its key that waits */
	OUTCOME_FAILED,				/* stored to be tried again */
	OUTCOME_DEAD,				/* given up */
} DeliveryOutcome;

typedef struct MessageValues MessageValues;

/*
 * A message at hand: a delivery of the broker's, or one from the waiting room.
 * Of the first there is a wire, of the second what was stored.
 */
typedef struct Delivery
{
	OrderItem	order;
	pg_uuid_t	message_id;
	DeliveryOutcome outcome;
	struct Delivery *next;		/* in the list of those at hand */
	int			batch_index;	/* in a batch */

	/* of a delivery of the broker's */
	BrokerDelivery *wire;		/* NULL: from the waiting room */
	size_t		size;			/* of that in memory */
	uint64		tag;
	int64		returned;		/* header x-delivery-count */
	int64		stream_offset;	/* header x-stream-offset; -1: none */

	/* of one from the waiting room */
	int64		waiting_id;		/* 0: of the broker's, and not known there */
	MessageValues *stored;

	/* of the message */
	char	   *type;			/* these: server encoding, NULL: none */
	char	   *key;
	char	   *old_key;
	int64		sequence;
	bool		has_sequence;
	int64		place;			/* sequence, or that of the one before it */
	bool		truncates;
	uint64		way;			/* hash of the way it has come, see via.h */

	/* of attempts */
	int			attempts;		/* that count, the present one included once
								 * it was recorded */
	bool		begun;			/* the present one was recorded before it */
	int			postponed;		/* tries that did not count, in a row */
	TimestampTz waits_since;	/* first failure of those of wait_for; 0: none */
	TimestampTz next_try;		/* if OUTCOME_FAILED or EARLY */
	MonoTime	requeue_at;		/* if it is given back to its queue then */
	bool		breaks;			/* the last error may be no fault of its own */
	char		sqlstate[6];	/* of the last error */
	char	   *error;			/* the same; NULL: none */
} Delivery;

/* A fanout.message as the handler gets it, and as a dead letter keeps it. */
#define MESSAGE_ATTRIBUTES 13

struct MessageValues
{
	Datum		values[MESSAGE_ATTRIBUTES];
	bool		nulls[MESSAGE_ATTRIBUTES];
};

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

extern Delivery *delivery_new(BrokerDelivery *wire, const char *queue, bool ordered);
extern void delivery_free(Delivery *delivery);
extern bool delivery_of_stream(const BrokerDelivery *wire);
extern void delivery_values(const Delivery *delivery, const char *topic,
							const char *consumer_group, MessageValues *message);
extern void delivery_body(const MessageValues *message, Datum *values, char *nulls);
extern char *delivery_via(const MessageValues *message);
extern uint64 delivery_way(const MessageValues *message);
extern uint64 delivery_key_hash(const char *key);
extern void delivery_set_body(MessageValues *message);

#endif							/* PGF_DELIVERY_H */
