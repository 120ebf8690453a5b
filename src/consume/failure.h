/*-------------------------------------------------------------------------
 *
 * failure.h
 *		What a handler's error means for its message, and when it is tried again.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_FAILURE_H
#define PGF_FAILURE_H

#include "postgres.h"

#include "consume/delivery.h"
#include "consume/subscription.h"

/* The longest text of an error that is kept, in bytes. */
#define MAX_ERROR 1024

/*
 * An attempt is recorded before it is made, with this text as its error and 57P01, because
 * nobody may live to record how it ended.  IS_UNFINISHED() is SQL that tells whether a column
 * has that text, AS_UNFINISHED() is SQL that puts it once in front of the former error.
 */
#define UNFINISHED_ATTEMPT "the handler runs, or the worker ended while it did"
#define IS_UNFINISHED(column) "coalesce(sqlstate = '57P01' and starts_with(" column ", '" UNFINISHED_ATTEMPT "'), false)"
#define AS_UNFINISHED(column) \
	"case when " IS_UNFINISHED(column) " then " column \
	" else '" UNFINISHED_ATTEMPT "' || coalesce('; before that: ' || " column ", '') end"

typedef enum FailureClass
{
	FAILURE_COUNTS,				/* the message's own: an attempt */
	FAILURE_WAITS,				/* one of wait_for: no attempt for max_wait */
	FAILURE_CONFLICT,			/* with other transactions: no attempt */
	FAILURE_OUTER,				/* resources, somebody's intervention: no
								 * attempt */
} FailureClass;

/* An error that was caught while a handler ran. */
typedef struct Failure
{
	FailureClass class;
	bool		late;			/* the call's time was over */
	char		sqlstate[6];
	char text[	MAX_ERROR + 1];
} Failure;

extern bool failure_is_own(int sqlerrcode);
extern void failure_set(Failure *failure, const SubscriptionRow *row, const ErrorData *edata, bool late,
						int timeout_ms);
extern void failure_take(Failure *failure, const SubscriptionRow *row, bool late, int timeout_ms);
extern void failure_note(const Failure *failure, const SubscriptionRow *row, Delivery *delivery);
extern bool failure_waits(const SubscriptionRow *row, const Delivery *delivery);
extern void failure_forget(Delivery *delivery);
extern TimestampTz failure_next_try(const SubscriptionRow *row, int attempts);

#endif							/* PGF_FAILURE_H */
