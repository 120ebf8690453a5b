/*-------------------------------------------------------------------------
 *
 * at_hand.h
 *		The deliveries that the worker has and has not acked.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_AT_HAND_H
#define PGF_AT_HAND_H

#include "postgres.h"

#include "consume/delivery.h"
#include "server/monotime.h"

typedef struct AtHand
{
	Delivery   *first;			/* those to be tried */
	Delivery   *last;
	int			count;
	size_t		bytes;			/* of them in memory */
	Delivery   *held;			/* failed: to be given back when due */
	int			nheld;
} AtHand;

/* Written in at_hand.c alone. */
extern AtHand at_hand;

typedef bool (*DeliveryTest) (const Delivery *delivery);

extern void at_hand_append(Delivery *delivery);
extern void at_hand_put_back(Delivery **deliveries, int n);
extern int	at_hand_take(Delivery **deliveries, int limit, DeliveryTest chosen, bool wanted);
extern void at_hand_sort(bool ordered);
extern void at_hand_hold(Delivery *delivery);
extern MonoTime at_hand_next_due(void);
extern Delivery *at_hand_take_due(MonoTime now);
extern uint64 at_hand_lowest_tag(void);
extern void at_hand_lose(void);

#endif							/* PGF_AT_HAND_H */
