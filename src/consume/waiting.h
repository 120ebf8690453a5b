/*-------------------------------------------------------------------------
 *
 * waiting.h
 *		The waiting room: messages that were acked and are yet to be applied.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WAITING_H
#define PGF_WAITING_H

#include "postgres.h"

#include "consume/delivery.h"
#include "consume/failure.h"
#include "consume/order.h"
#include "consume/subscription.h"
#include "server/monotime.h"

/* What the worker knows of the room, once waiting_look() was called. */
typedef struct WaitingRoom
{
	bool		stale;			/* the table may say something else */
	int64		count;			/* messages in it, at least if recount_at */
	MonoTime	recount_at;		/* there are very many, and they are counted
								 * then; 0: count is right */
	MonoTime	next_due;		/* 0: none is due by the clock */
} WaitingRoom;

extern WaitingRoom waiting_room;

extern void waiting_look(const SubscriptionRow *row);
extern void waiting_filter(const SubscriptionRow *row, Delivery **deliveries, int n, Order *order);
extern void waiting_requeue(const SubscriptionRow *row, Delivery **deliveries, int n);
extern void waiting_store(const SubscriptionRow *row, Delivery **deliveries, int n);
extern void waiting_settle(const SubscriptionRow *row, Delivery **deliveries, int n);
extern int	waiting_take(const SubscriptionRow *row, int limit, size_t memory, bool singly,
						 MemoryContext context, Delivery **deliveries);
extern Delivery *waiting_take_again(const SubscriptionRow *row, int64 waiting_id, MemoryContext context);
extern void waiting_put_off(const SubscriptionRow *row, int64 waiting_id, const Failure *failure);
extern void waiting_begin_attempt(const SubscriptionRow *row, int64 waiting_id, int attempts);
extern void waiting_forget(int retention_s);

#endif							/* PGF_WAITING_H */
