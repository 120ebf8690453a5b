/*-------------------------------------------------------------------------
 *
 * stream.h
 *		Where a stream is read from, and how far it was read.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_STREAM_H
#define PGF_STREAM_H

#include "postgres.h"

#include "broker/broker.h"
#include "consume/delivery.h"
#include "consume/subscription.h"
#include "server/monotime.h"

/* Says what the consumer must do with a delivery of a stream. */
typedef enum StreamVerdict
{
	STREAM_TAKE,				/* its turn comes */
	STREAM_PASS,				/* it was read before, or need not be: ack it */
	STREAM_REFUSE,				/* nothing may be read: the text says why */
} StreamVerdict;

extern const BrokerField *stream_begin(const SubscriptionRow *row, MonoTime now);
extern StreamVerdict stream_delivered(const SubscriptionRow *row, const Delivery *delivery, const char **problem);
extern void stream_record(const SubscriptionRow *row, Delivery *const *deliveries, int n);
extern bool stream_is_new(void);
extern MonoTime stream_due(void);
extern bool stream_time_is_up(const SubscriptionRow *row, uint32_t messages, const char **problem);

#endif							/* PGF_STREAM_H */
