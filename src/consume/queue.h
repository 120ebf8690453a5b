/*-------------------------------------------------------------------------
 *
 * queue.h
 *		The queue of a subscription, on the broker.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_QUEUE_H
#define PGF_QUEUE_H

#include "postgres.h"

#include "broker/broker.h"
#include "consume/subscription.h"

extern BrokerResult queue_inspect(Broker *broker, const SubscriptionRow *row, uint32_t *messages, BrokerError *error);
extern BrokerResult queue_drop(Broker *broker, const SubscriptionRow *row, BrokerError *error);
extern BrokerResult queue_find(Broker *broker, SubscriptionRow *row, BrokerError *error);
extern bool queue_near_limit(int64 returned);

#endif							/* PGF_QUEUE_H */
