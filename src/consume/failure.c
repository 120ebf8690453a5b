/*-------------------------------------------------------------------------
 *
 * failure.c
 *		What a handler's error means for its message, and when it is tried again.
 *
 * An attempt counts if the message may be to blame:
 *
 *	 error								class		tried again
 *	 ---------------------------------	---------	---------------------------
 *	 40xxx, 55P03: deadlock,			CONFLICT	soon, alone, with jitter;
 *	 serialization, lock not granted				no attempt
 *	 53xxx: no memory, disk, ...		OUTER		after retry_delay, doubling;
 *	 57xxx: cancelled by somebody else,				no attempt
 *	 shut down
 *	 one of wait_for					WAITS		after retry_delay, doubling; no
 *													attempt until max_wait is over
 *	 any other, and a call that did		COUNTS		after retry_delay, doubling,
 *	 not end in time								max_attempts times
 *
 * Must never: keep a text longer than MAX_ERROR, or decide anything by a text.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "consume/failure.h"
#include "server/monotime.h"

/* Milliseconds before a message that met a conflict is tried again. */
#define CONFLICT_DELAY_MS 20
#define MAX_CONFLICT_DELAY_MS 5000

static bool
in_list(const char *list, const char *sqlstate)
{
	char		entry[8];

	snprintf(entry, sizeof(entry), "%s ", sqlstate);
	return strstr(list, entry) != NULL;
}

static bool
is_conflict(int sqlerrcode)
{
	return ERRCODE_TO_CATEGORY(sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK ||
		sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE;
}

static bool
is_outer(int sqlerrcode)
{
	return ERRCODE_TO_CATEGORY(sqlerrcode) == ERRCODE_INSUFFICIENT_RESOURCES ||
		ERRCODE_TO_CATEGORY(sqlerrcode) == ERRCODE_OPERATOR_INTERVENTION;
}

static FailureClass
classify(const SubscriptionRow *row, int sqlerrcode, const char *sqlstate, bool late)
{
	if (late)
		return FAILURE_COUNTS;
	if (in_list(row->wait_for, sqlstate))
		return FAILURE_WAITS;
	if (is_conflict(sqlerrcode))
		return FAILURE_CONFLICT;
	return is_outer(sqlerrcode) ? FAILURE_OUTER : FAILURE_COUNTS;
}

/* May what was written be the reason of an error, and not what else happens? */
bool
failure_is_own(int sqlerrcode)
{
	return !is_conflict(sqlerrcode) && !is_outer(sqlerrcode);
}

/* Message, detail and context, cut to MAX_ERROR bytes. */
static void
set_text(Failure *failure, const ErrorData *edata, int timeout_ms)
{
	StringInfoData text;

	initStringInfo(&text);
	if (failure->late)
		appendStringInfo(&text, "the handler did not end within its timeout of %d ms", timeout_ms);
	else
		appendStringInfoString(&text, edata->message ? edata->message : "missing error text");
	if (edata->detail != NULL)
		appendStringInfo(&text, "\nDETAIL:  %s", edata->detail);
	if (edata->context != NULL)
		appendStringInfo(&text, "\nCONTEXT:  %s", edata->context);
	strlcpy(failure->text, text.data, pg_mbcliplen(text.data, text.len, MAX_ERROR) + 1);
	pfree(text.data);
}

/* Tells what an error means.  late: the call's timer of timeout_ms had fired. */
void
failure_set(Failure *failure, const SubscriptionRow *row, const ErrorData *edata, bool late, int timeout_ms)
{
	failure->late = late && edata->sqlerrcode == ERRCODE_QUERY_CANCELED;
	strlcpy(failure->sqlstate, unpack_sql_state(edata->sqlerrcode), sizeof(failure->sqlstate));
	failure->class = classify(row, edata->sqlerrcode, failure->sqlstate, failure->late);
	set_text(failure, edata, timeout_ms);
}

/*
 * The same of the error that was caught, of which it leaves nothing behind.  Must be
 * called in a PG_CATCH() block, in a memory context that lasts.
 */
void
failure_take(Failure *failure, const SubscriptionRow *row, bool late, int timeout_ms)
{
	ErrorData  *edata = CopyErrorData();

	FlushErrorState();
	failure_set(failure, row, edata, late, timeout_ms);
	FreeErrorData(edata);
}

/* ---- when it is tried again ---- */

/* ms doubled after each of the tries but the first, up to max; jitter only ever adds. */
static TimestampTz
after(int64 ms, int tries, int64 max)
{
	for (int i = 1; i < tries && ms < max; i++)
		ms *= 2;
	ms = Min(ms, max);
	ms += murmurhash32((uint32) mono_now()) % (ms / 4 + 1);
	return GetCurrentTimestamp() + ms * 1000;
}

/* Is the message still to be kept without attempts? */
static bool
still_waits(const SubscriptionRow *row, Delivery *delivery)
{
	TimestampTz now = GetCurrentTimestamp();

	/* or the clock was set back */
	if (delivery->waits_since == 0 || delivery->waits_since > now)
		delivery->waits_since = now;
	return now < delivery->waits_since + row->max_wait * INT64CONST(1000);
}

static void
count_attempt(const SubscriptionRow *row, Delivery *delivery)
{
	if (!delivery->begun)
		delivery->attempts++;
	delivery->postponed = 0;
	delivery->outcome = (delivery->attempts >= row->max_attempts) ? OUTCOME_DEAD : OUTCOME_FAILED;
	delivery->next_try = after(row->retry_delay, delivery->attempts, row->max_retry_delay);
}

static void
postpone(const SubscriptionRow *row, Delivery *delivery, FailureClass class)
{
	if (delivery->begun)
		delivery->attempts--;
	delivery->postponed++;
	delivery->outcome = OUTCOME_FAILED;
	if (class == FAILURE_CONFLICT)
		delivery->next_try = after(CONFLICT_DELAY_MS, delivery->postponed, MAX_CONFLICT_DELAY_MS);
	else
		delivery->next_try = after(row->retry_delay, delivery->postponed, row->max_retry_delay);
}

/*
 * Might the same error befall every message?  One that fails again says nothing of
 * others.
 */
static bool
may_be_outer(const Failure *failure, const Delivery *delivery)
{
	return !failure->late && delivery->attempts <= 1 &&
		(failure->class == FAILURE_COUNTS || strncmp(failure->sqlstate, "53", 2) == 0);
}

/* Is it kept for another one to come first, as wait_for says, without an attempt? */
bool
failure_waits(const SubscriptionRow *row, const Delivery *delivery)
{
	return delivery->outcome == OUTCOME_FAILED && delivery->postponed > 0 &&
		in_list(row->wait_for, delivery->sqlstate);
}

/* Takes back what failure_note() has noted of a message that waits: it is tried again. */
void
failure_forget(Delivery *delivery)
{
	delivery->outcome = OUTCOME_NONE;
	delivery->postponed--;
}

/* When a message of which attempts were made is due again. */
TimestampTz
failure_next_try(const SubscriptionRow *row, int attempts)
{
	return after(row->retry_delay, attempts, row->max_retry_delay);
}

/*
 * Records a failure in a delivery, as its class says: outcome (FAILED or DEAD),
 * attempts, error and next try.  The text is copied into the delivery's context.
 */
void
failure_note(const Failure *failure, const SubscriptionRow *row, Delivery *delivery)
{
	if (delivery->error != NULL)
		pfree(delivery->error);
	delivery->error = MemoryContextStrdup(GetMemoryChunkContext(delivery), failure->text);
	strlcpy(delivery->sqlstate, failure->sqlstate, sizeof(delivery->sqlstate));
	if (failure->class == FAILURE_COUNTS || (failure->class == FAILURE_WAITS && !still_waits(row, delivery)))
		count_attempt(row, delivery);
	else
		postpone(row, delivery, failure->class);
	delivery->begun = false;
	delivery->breaks = may_be_outer(failure, delivery);
}
