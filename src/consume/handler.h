/*-------------------------------------------------------------------------
 *
 * handler.h
 *		Runs a subscription's handler on deliveries, in one transaction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_HANDLER_H
#define PGF_HANDLER_H

#include "postgres.h"

#include "consume/inbox.h"

typedef enum HandlerMode
{
	HANDLER_TOGETHER,			/* the first error undoes all */
	HANDLER_SAVEPOINTS,			/* an error undoes that delivery */
} HandlerMode;

typedef enum HandlerResult
{
	HANDLER_COMMITTED,			/* outcomes are set */
	HANDLER_ERROR,				/* all undone; sqlstate and error of the first
								 * delivery are set */
	HANDLER_UNUSABLE,			/* all undone: row->problem says why */
	HANDLER_ENDED,				/* all undone: the subscription is over */
} HandlerResult;

/* Once, before any other. */
extern void handler_init(void);

/* Does a transaction run in which handlers are called? */
extern bool handler_running(void);

/*
 * For a handler of ours that has much to do: from now on, the call that runs has
 * its whole handler_timeout again.  Nothing, if no worker called it.
 */
extern void handler_more_time(void);

/*
 * Reads the subscription anew if anything that it depends on may have changed;
 * texts in the context, which is reset then.  In a transaction of its own.
 * False: it is over.
 */
extern bool handler_refresh(SubscriptionRow *row, int32 subscription_id, MemoryContext context);

/*
 * One transaction: inbox, handler, and what the handler writes.  An error of
 * the handler's is recorded in the delivery: with HANDLER_SAVEPOINTS, and
 * attempts left, in the same transaction as its failure; due is set then.
 */
extern HandlerResult handler_apply(SubscriptionRow *row, Delivery **deliveries, int n, HandlerMode mode);

/* The same for a dead letter, which is removed if it succeeds. */
extern HandlerResult handler_redrive(SubscriptionRow *row, Redriven *redriven,
									 char *sqlstate, char **error);

/* Sets when the next attempt is due, after attempts of them. */
extern void handler_schedule(const SubscriptionRow *row, Delivery *delivery);

#endif							/* PGF_HANDLER_H */
