/*-------------------------------------------------------------------------
 *
 * apply.h
 *		From messages to one transaction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_APPLY_H
#define PGF_APPLY_H

#include "postgres.h"

#include "consume/dead_letter.h"
#include "consume/delivery.h"
#include "consume/failure.h"
#include "consume/subscription.h"
#include "server/monotime.h"

typedef enum ApplyResult
{
	APPLY_COMMITTED,			/* outcomes are set */
	APPLY_UNDONE,				/* by an error that is no single message's:
								 * failure */
	APPLY_UNUSABLE,				/* nothing was done: row->problem says why */
	APPLY_ENDED,				/* nothing was done: the subscription is over */
} ApplyResult;

/*
 * Messages that are to be applied in one transaction, in order, their ids
 * different.  Those from the waiting room are chosen in it.
 */
typedef struct Batch
{
	Delivery  **deliveries;
	int			n;
	int			limit;			/* of n, if it is from the waiting room */
	size_t		memory;			/* bytes of bodies, likewise */
	bool		from_room;
	bool		singly;			/* from the room: one, recorded before it */
	bool		careful;		/* a savepoint for each from the start */
	bool		store;			/* stored, whatever on_failure says */
	bool		probe;			/* nothing counts as an attempt */
	long		limit_ms;		/* so long are messages begun with */
	int			patience_ms;	/* time of a call that was not tried before */

	MonoTime	began;			/* set when it is run */

	/* results */
	int			tries;			/* handler calls */
	int			applied;		/* messages of those that succeeded */
	int			slowest_ms;		/* of them */
	bool		failed;			/* a call did not succeed */
	Failure		failure;		/* the last one */
} Batch;

extern ApplyResult apply_batch(SubscriptionRow *row, Batch *batch);
extern ApplyResult apply_due(SubscriptionRow *row, Batch *batch);
extern ApplyResult apply_redriven(SubscriptionRow *row, Redriven *redriven, Failure *failure);
extern ApplyResult apply_store(SubscriptionRow *row, Batch *batch);

#endif							/* PGF_APPLY_H */
