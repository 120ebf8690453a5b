/*-------------------------------------------------------------------------
 *
 * handler.h
 *		Calls a subscription's handler.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_HANDLER_H
#define PGF_HANDLER_H

#include "postgres.h"

#include "consume/delivery.h"
#include "consume/failure.h"
#include "consume/subscription.h"

typedef enum HandlerState
{
	HANDLER_READY,
	HANDLER_UNUSABLE,			/* row->problem says why */
	HANDLER_ENDED,				/* the subscription is over, or another one */
} HandlerState;

extern void handler_init(void);
extern bool handler_running(void);
extern void handler_more_time(void);
extern void handler_leave_rest(int index, ErrorData *edata);
extern bool handler_refresh(SubscriptionRow *row, int32 subscription_id, MemoryContext context);

extern void handler_begin(void);
extern HandlerState handler_prepare(SubscriptionRow *row);
extern void handler_call(const SubscriptionRow *row, Delivery **deliveries, int n, int timeout_ms, bool others);
extern bool handler_left_rest(int index, Failure *failure);
extern void handler_call_message(const SubscriptionRow *row, MessageValues *values);
extern bool handler_lost(SubscriptionRow *row);
extern void handler_finish(const SubscriptionRow *row);
extern void handler_failed(Failure *failure, const SubscriptionRow *row);
extern void handler_end(void);

#endif							/* PGF_HANDLER_H */
