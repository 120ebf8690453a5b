/*-------------------------------------------------------------------------
 *
 * dead_letter.h
 *		Messages that a subscription gave up, and those it is to try once more.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_DEAD_LETTER_H
#define PGF_DEAD_LETTER_H

#include "postgres.h"

#include "consume/delivery.h"
#include "consume/subscription.h"

/* A dead letter that is to be tried again. */
typedef struct Redriven
{
	int64		dead_id;
	TimestampTz request;		/* redriven_at, which is still set; 0: it is
								 * not any more */
	MessageValues message;
} Redriven;

extern void dead_letter_store(const SubscriptionRow *row, const Delivery *delivery);
extern bool dead_letter_take(const SubscriptionRow *row, MemoryContext context, Redriven *redriven);
extern bool dead_letter_waits(const SubscriptionRow *row);
extern bool dead_letter_remove(int64 dead_id);
extern void dead_letter_failed(const Redriven *redriven, const char *sqlstate, const char *error);

#endif							/* PGF_DEAD_LETTER_H */
