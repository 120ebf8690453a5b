/*-------------------------------------------------------------------------
 *
 * inbox.h
 *		The tables of the consuming half: subscriptions, inbox, failures, and
 *		the dead letters of subscriptions.
 *
 * All of these run in a transaction of worker_begin(), with the rights of the
 * extension's owner.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_INBOX_H
#define PGF_INBOX_H

#include "postgres.h"

#include "consume/delivery.h"

/*
 * Goes on with the rights of the extension's owner, and settings for its own
 * statements, until become_caller().  An error undoes it, too, as it undoes the
 * (sub)transaction.
 */
typedef struct Caller
{
	Oid			user;
	int			context;
	int			settings;		/* nest level */
} Caller;

extern Caller become_owner(void);
extern void become_caller(const Caller *caller);

/* One row of fanout.subscription.  Intervals are in milliseconds. */
typedef struct SubscriptionRow
{
	int32		subscription_id;
	int32		version;
	char	   *topic;			/* server encoding */
	char	   *consumer_group;
	char	   *exchange;		/* UTF-8 */
	char	   *queue;
	bool		batch;			/* the handler takes an array */
	bool		ordered;
	int			prefetch;
	int			max_attempts;
	long		retry_delay;
	long		max_retry_delay;
	int			handler_timeout;

	/* as found when it was read */
	Oid			handler;		/* InvalidOid: see problem */
	Oid			message_type;
	Oid			argument_type;	/* that, or the array of it */
	Oid			sync_target;	/* the table of sync_table(); InvalidOid: none */
	char	   *problem;		/* why it cannot be consumed; NULL: it can */
} SubscriptionRow;

extern void inbox_init(void);

/* Texts in the context.  False: it has ended. */
extern bool inbox_load_subscription(int32 subscription_id, MemoryContext context, SubscriptionRow *row);

/* Is it the same still? */
extern bool inbox_subscription_is(int32 subscription_id, int32 version);

/* Is the queue one that this database's publisher declares? */
extern bool inbox_binding_exists(const char *topic, const char *consumer_group);

/*
 * Sets the outcome of each: OUTCOME_SEEN if it is in the inbox, OUTCOME_TWIN if
 * it is of the same id as one before it, else OUTCOME_NONE.
 */
extern void inbox_look_up(int32 subscription_id, Delivery **deliveries, int n);

/* Puts those into the inbox that were applied or given up, and forgets their failures. */
extern void inbox_record(int32 subscription_id, Delivery **deliveries, int n);

/* Writes the failure of one that will be tried again. */
extern void inbox_record_failure(int32 subscription_id, const Delivery *delivery);

/* Makes a dead letter of one whose attempts are used up. */
extern void inbox_bury(const SubscriptionRow *row, const Delivery *delivery);

/* Deliveries without a wire, in the context, oldest first: what failed. */
extern Delivery **inbox_load_failures(int32 subscription_id, bool ordered, MemoryContext context, int *n);

/* A dead letter that is to be tried again. */
typedef struct Redriven
{
	int64		dead_id;
	MessageValues message;
} Redriven;

/*
 * Takes the next one, which counts as an attempt as soon as that is committed.
 * In the current context.  False: there is none.
 */
extern bool inbox_take_redriven(const SubscriptionRow *row, MemoryContext context, Redriven *redriven);

/* It is done with: removes it.  False: it is gone already. */
extern bool inbox_remove_redriven(int64 dead_id);
extern void inbox_record_redriven(int64 dead_id, const char *sqlstate, const char *error);

#endif							/* PGF_INBOX_H */
