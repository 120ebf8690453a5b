/*-------------------------------------------------------------------------
 *
 * subscription.h
 *		The rows of fanout.subscription, and the SQL functions that change them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SUBSCRIPTION_H
#define PGF_SUBSCRIPTION_H

#include "postgres.h"

/* Who declared a queue decides who may declare it again. */
typedef enum QueueOrigin
{
	QUEUE_UNKNOWN,				/* it was not looked for yet */
	QUEUE_FOREIGN,				/* it was there when it was first looked for */
	QUEUE_OWN,					/* it was not, and the worker declared it */
} QueueOrigin;

/* Where a stream is read from at first. */
typedef enum StreamStart
{
	STREAM_NONE,				/* the queue is no stream */
	STREAM_FROM_FIRST,
	STREAM_FROM_LAST,
	STREAM_FROM_NEXT,
	STREAM_FROM_OFFSET,
	STREAM_FROM_TIME,
} StreamStart;

/* One row of fanout.subscription.  Intervals are in milliseconds. */
typedef struct SubscriptionRow
{
	int32		subscription_id;
	int32		version;
	int32		inbox_id;		/* whose ids in the inbox are its own */
	char	   *topic;			/* server encoding */
	char	   *consumer_group;
	char	   *exchange;		/* UTF-8 */
	char	   *queue;
	bool		batch;			/* the handler takes an array */
	bool		ordered;
	bool		requeue;		/* on_failure = 'requeue' */
	bool		drop_queue;		/* it has ended, and so shall its queue */
	QueueOrigin origin;			/* who declared its queue */
	StreamStart start_kind;
	int64		start_value;	/* offset, or seconds since 1970 */
	int			prefetch;
	int			max_attempts;
	long		retry_delay;
	long		max_retry_delay;
	int			handler_timeout;
	char	   *wait_for;		/* SQLSTATEs, each with a blank behind it */
	long		max_wait;

	/* as found when it was read */
	Oid			handler;		/* InvalidOid: see problem */
	Oid			message_type;
	Oid			argument_type;	/* that, or the array of it */
	Oid			sync_target;	/* the table of sync_table(); InvalidOid: none */
	char	   *problem;		/* why it cannot be consumed; NULL: it can */
} SubscriptionRow;

extern int	subscription_publish_all(void);
extern bool subscription_load(int32 subscription_id, MemoryContext context, SubscriptionRow *row);
extern bool subscription_is(int32 subscription_id, int32 version);
extern void subscription_set_origin(int32 subscription_id, QueueOrigin origin);
extern void subscription_queue_dropped(int32 subscription_id);
extern bool subscription_has_binding(const char *topic, const char *consumer_group, int64 *delivery_limit);

#endif							/* PGF_SUBSCRIPTION_H */
