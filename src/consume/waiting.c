/*-------------------------------------------------------------------------
 *
 * waiting.c
 *		The waiting room: messages that were acked and are yet to be applied.
 *
 * A message whose attempt failed is stored in fanout.waiting, with its body, and
 * acked; so is every later message of its keys, behind it.  A message is in the
 * table as long as it waits, and nowhere else: the worker keeps a count, the time
 * at which the next one is due and, if they are few, which ones there are.
 *
 *		(broker) --failed--> DUE LATER --the clock--> DUE --applied--> (inbox)
 *		   |                     ^                   ^  |
 *		   | behind one of       '------failed-------|--+--given up--> (dead letter)
 *		   | its key                                 |  |
 *		   '--------> BEHIND ------------------------'  '--one before it came--.
 *		                ^      the one before it left                         |
 *		                '-----------------------------------------------------'
 *
 *		DUE LATER, DUE	next_try is set
 *		BEHIND			next_try is NULL
 *
 *		(broker) -> DUE LATER, BEHIND	waiting_store()
 *		DUE -> gone, DUE LATER			waiting_settle()
 *		DUE LATER -> gone				drop_superseded(), called by both
 *		DUE LATER -> DUE				mark_superseded(), called by that
 *		BEHIND -> DUE					promote(), called by both
 *		DUE -> BEHIND					waiting_take()
 *
 * The order is that of "place": the message's sequence or, if it has none, that
 * of the one before it; and among equals that of storing.  So what the broker
 * delivers again in another order than at first still has its place.  Whether a
 * message is really the first of its keys is decided when it is taken, by all
 * that is before it; promote() may err towards taking too early.  What it did not see
 * while others changed the room is found by promote_all() soon after.
 *
 * A subscription that has its failed messages given back to their queue
 * (on_failure) stores none of them: a row without a body remembers the attempts, and
 * becomes a stored message if the delivery has to be stored after all.
 *
 * Locks: a row that is taken is locked until the transaction ends, so that
 * skip() and retry() see it before or after its attempt.  One that they have locked
 * is not waited for, and keeps back only what is behind it; other waits are bounded
 * by owner.c.
 *
 * Must never: lose a row whose message was not applied, given up or skipped in
 * the same transaction; or be called outside of a transaction of worker_begin().
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "consume/failure.h"
#include "consume/owner.h"
#include "consume/waiting.h"
#include "server/query.h"
#include "server/worker.h"

/* The first message of a key; an expression, NULL if there is none. */
#define FIRST_OF(key) \
	"(select waiting_id from (" \
	"(select waiting_id, place from fanout.waiting where subscription_id = $1 and key1 = " key \
	" order by place, waiting_id limit 1) union all" \
	" (select waiting_id, place from fanout.waiting where subscription_id = $1 and key2 = " key \
	" order by place, waiting_id limit 1)) f order by place, waiting_id limit 1)"

/* Makes those due that the query finds; returns how many others have locked. */
#define PROMOTE(query) \
	"with wanted as materialized (" query ")," \
	" free as (select waiting_id from fanout.waiting where waiting_id = any (array(select waiting_id from wanted))" \
	" for update skip locked)," \
	" done as (update fanout.waiting w set next_try = clock_timestamp() from free f" \
	" where w.waiting_id = f.waiting_id returning 1)" \
	" select (select count(*) from wanted) - (select count(*) from done)"

/* A message given back to its queue that is due in so many milliseconds is due. */
#define DUE_SOON_MS 5

/* After so many milliseconds it is looked whether others have let go of messages. */
#define LOCKED_MS 200
#define PROMOTE_AGAIN_MS 1000

/* waiting_put_off() puts a message off as so many attempts do. */
#define PUT_OFF_TRIES 5

/* hasten() makes so many messages due at once, at most. */
#define HASTEN_MAX 1000

/*
 * Finds the messages that are due, the one that was due first at the head.  The time is a
 * parameter: a function that is volatile would be asked about each message that is not due.
 */
#define FIND_DUE \
	"select waiting_id, key1, key2, barrier or (postponed > 0 and waits_since is null) from fanout.waiting" \
	" where subscription_id = $1 and next_try <= $3 and not requeued order by next_try limit $2"

/* Waits for nothing, and nobody for it: see set_order() in delivery.c. */
#define IS_FREE \
	"coalesce(key1 is null and key2 is null and headers operator(pg_catalog.?) 'compare'" \
	" and not headers operator(pg_catalog.?) 'op', false)"

/* The columns that waiting_take() chooses by among messages that may be due. */
#define CANDIDATE \
	"waiting_id, place, key1, key2, barrier, next_try is null and attempts = 0 and postponed = 0 as follows," \
	" coalesce(octet_length(payload), octet_length(raw)) as size, " IS_FREE " as free"

/* What is known of a message that may be taken, without its body. */
typedef struct Candidate
{
	int64		waiting_id;
	OrderItem	order;
	bool		follows;		/* never tried, and behind another */
	int64		size;
} Candidate;

/* Messages that are due, and the keys they have. */
typedef struct DueList
{
	Datum	   *ids;
	int			n;
	Datum	   *keys;
	int			nkeys;
	bool		singly;			/* there is one, which is to be tried alone */
	int			depth;			/* messages that are looked for of each key */
} DueList;

/*
 * The worker remembers the waiting messages, sorted by id, if there are at most so many
 * and nobody else has changed them.  If there are more, it asks the table.
 */
#define KNOWN_MAX 1000

/*
 * If there are more, counting them takes time: they are counted no more often than each
 * RECOUNT_MS, and for no more than one of RECOUNT_PART parts of the time.
 */
#define RECOUNT_MS 1000
#define RECOUNT_PART 100

typedef struct KnownMessage
{
	pg_uuid_t	message_id;
	OrderItem	order;
} KnownMessage;

WaitingRoom waiting_room = {.stale = true};

static KnownMessage known[KNOWN_MAX];
static int	nknown = -1;		/* -1: to be read */
static MonoTime promote_at = 0; /* others had locked what was to be due; 0:
								 * none */
static MonoTime heads_at = 0;	/* all of the room is looked at no sooner,
								 * unless it has to be */
static MonoTime hastened_at = 0;	/* when hasten() made messages due; 0:
									 * never */
static MonoTime hasten_at = 0;	/* when it is to do that once more; 0: no need */
static int64 nrequeued = 0;		/* rows of messages given back to their queue */
static MonoTime count_at = 0;	/* very many are counted no sooner */
static bool order_kept = true;	/* there may be rows that were stored in order */

static void update_failed(const Delivery *delivery);
static int	delete_done(Delivery **deliveries, int n, bool locked);

static int64 last_place = 0;	/* that was given to any */
static Order walk;				/* in waiting_take() */

/* ---- arrays ---- */

static Datum
int8_array(Datum *values, int n)
{
	return PointerGetDatum(construct_array(values, n, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/* The index of a value; -1: it is not there. */
static int
index_of(const Datum *values, int n, int64 value)
{
	for (int i = 0; i < n; i++)
	{
		if (DatumGetInt64(values[i]) == value)
			return i;
	}
	return -1;
}

static bool
is_element(const Datum *values, int n, int64 value)
{
	return index_of(values, n, value) >= 0;
}

/* What was remembered of the room is not so any more. */
static void
forget_known(void)
{
	nknown = -1;
}

static void
out_of_memory(void)
{
	ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
}

/* ---- what is known of the room ---- */

/*
 * Sets the number of messages.  One that is not counted stays above KNOWN_MAX, so that
 * nobody takes the room for small, or empty, without a look.
 */
static void
set_count(int64 count)
{
	if (waiting_room.recount_at != 0 && count <= KNOWN_MAX)
	{
		waiting_room.stale = true;
		count = KNOWN_MAX + 1;
	}
	waiting_room.count = count;
	pg_atomic_write_u32(&worker_subscription->waiting, (uint32) Min(count, PG_INT32_MAX));
}

/* Runs a PROMOTE() statement.  What others have locked has its turn later. */
static void
run_promote(CachedQuery *query, int nargs, Oid *types, Datum *values)
{
	bool		isnull;

	owner_execute(query, nargs, types, values, NULL);
	if (DatumGetInt64(query_value(0, 1, &isnull)) > 0)
		promote_at = mono_later(PROMOTE_AGAIN_MS);
}

/* Makes the first barrier due if it waits behind nothing. */
static void
promote_barrier(const SubscriptionRow *row)
{
	static CachedQuery query = {
		PROMOTE("select waiting_id from (select waiting_id, place, next_try from fanout.waiting"
				" where subscription_id = $1 and barrier order by place, waiting_id limit 1) w"
				" where next_try is null and not exists (select from fanout.waiting b where b.subscription_id = $1"
				" and (b.place, b.waiting_id) < (w.place, w.waiting_id) and not " IS_FREE ")")
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};

	run_promote(&query, 1, types, values);
}

/* Makes those due that wait behind nothing: all of the room is looked at. */
static void
promote_all(const SubscriptionRow *row)
{
	static CachedQuery query = {
		PROMOTE("select waiting_id from fanout.waiting w"
				" where subscription_id = $1 and next_try is null"
				" and (key1 is null or waiting_id = " FIRST_OF("w.key1") ")"
				" and (key2 is null or waiting_id = " FIRST_OF("w.key2") ")"
				" and not exists (select from fanout.waiting b where b.subscription_id = $1 and b.barrier"
				" and (b.place, b.waiting_id) < (w.place, w.waiting_id)) and not barrier")
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};
	MonoTime	begun = mono_now();

	promote_at = 0;
	run_promote(&query, 1, types, values);
	promote_barrier(row);
	heads_at = mono_plus(begun, Max(PROMOTE_AGAIN_MS, (mono_now() - begun) * RECOUNT_PART / 1000));
}

/*
 * Has all of the room looked at, soon: what others, or a transaction that was undone, have
 * left of it may have a message that is the first of its keys and is not due.
 */
static void
promote_soon(void)
{
	if (promote_at == 0)
		promote_at = Max(mono_now(), heads_at);
}

/* When the next one is due after that time; 0: never.  *barrier: is one behind others? */
static MonoTime
earliest(const SubscriptionRow *row, TimestampTz after, bool *barrier)
{
	static CachedQuery query = {
		"select (select min(next_try) from fanout.waiting where subscription_id = $1 and next_try > $2 and not requeued),"
		" exists (select from fanout.waiting where subscription_id = $1 and barrier and next_try is null)"
	};
	Oid			types[2] = {INT4OID, TIMESTAMPTZOID};
	Datum		values[2] = {Int32GetDatum(row->subscription_id), TimestampTzGetDatum(after)};
	TimestampTz next_try;
	bool		isnull;

	owner_execute(&query, 2, types, values, NULL);
	*barrier = DatumGetBool(query_value(0, 2, &isnull));
	next_try = DatumGetTimestampTz(query_value(0, 1, &isnull));
	return isnull ? 0 : Max(1, mono_now() + (next_try - GetCurrentTimestamp()));
}

/* No attempt is put off for longer, in microseconds: what is due later was by another clock. */
static int64
longest_pause(const SubscriptionRow *row)
{
	return row->max_retry_delay * INT64CONST(1250);
}

/* Was the clock set back since the last call, as far as this process has seen it? */
static bool
clock_was_set_back(void)
{
	static int64 ahead = PG_INT64_MIN;	/* of the clock that only goes on */
	int64		before = ahead;

	ahead = GetCurrentTimestamp() - mono_now();
	return ahead + USECS_PER_SEC < before;
}

/*
 * Makes those due that would be tried later than any attempt is put off, since the clock
 * was set back when they had got their time, but for what others have locked.
 */
static void
heed_clock(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"update fanout.waiting set next_try = clock_timestamp() where waiting_id = any (array("
		"select waiting_id from fanout.waiting where subscription_id = $1 and next_try > $2 and not requeued"
		" for update skip locked))"
	};
	Oid			types[2] = {INT4OID, TIMESTAMPTZOID};
	Datum		values[2] = {
		Int32GetDatum(row->subscription_id), TimestampTzGetDatum(GetCurrentTimestamp() + longest_pause(row))
	};

	(void) clock_was_set_back();
	owner_execute(&query, 2, types, values, NULL);
}

/* Something is to be done then, too; 0: nothing. */
static void
due_at(MonoTime when)
{
	if (when != 0)
		waiting_room.next_due = (waiting_room.next_due == 0) ? when : Min(waiting_room.next_due, when);
}

/*
 * Finds when the next one is due.  What was due at a time of which it is known that others
 * have all of that locked (locked; DT_NOBEGIN: none is) is looked at again after a pause,
 * and what is due later does not wait for it.
 *
 * Somebody is always first, so if nobody is due something was left undone.  A barrier has
 * no key to be promoted by, and others may be due that it does not wait for.
 */
static void
find_next_due(const SubscriptionRow *row, TimestampTz locked)
{
	MonoTime	again = (locked != DT_NOBEGIN) ? mono_later(LOCKED_MS) : 0;
	bool		barrier = false;

	if (clock_was_set_back())
		heed_clock(row);
	waiting_room.next_due = (waiting_room.count > 0) ? earliest(row, locked, &barrier) : 0;
	if (waiting_room.count > 0 && waiting_room.next_due == 0 && again == 0)
		promote_all(row);
	else if (barrier)
		promote_barrier(row);
	if (waiting_room.count > 0 && (barrier || waiting_room.next_due == 0))
		waiting_room.next_due = earliest(row, locked, &barrier);
	due_at(again);
	due_at(promote_at);
	if (waiting_room.count > 0)
		due_at(hasten_at);
}

/*
 * Frees what was stored in order, of a subscription that is not ordered any more, but for
 * what others have locked.  Once there is nothing of that kind, none comes.
 */
static void
forget_order(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"with wanted as materialized (select waiting_id from fanout.waiting where subscription_id = $1"
		" and (key1 is not null or barrier or next_try is null)),"
		" free as (select waiting_id from fanout.waiting where waiting_id = any (array(select waiting_id from wanted))"
		" for update skip locked),"
		" done as (update fanout.waiting w"
		" set key1 = null, key2 = null, barrier = false, next_try = coalesce(next_try, clock_timestamp())"
		" from free f where w.waiting_id = f.waiting_id)"
		" select count(*) from wanted"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};
	bool		isnull;

	if (row->ordered)
		order_kept = true;
	if (row->ordered || !order_kept)
		return;
	owner_execute(&query, 1, types, values, NULL);
	order_kept = DatumGetInt64(query_value(0, 1, &isnull)) > 0;
}

#define COUNT_WAITING(from) \
	"select count(*) filter (where not requeued), count(*) filter (where requeued) from " from
#define WAITING_AT_MOST \
	"(select requeued from fanout.waiting where subscription_id = $1 order by place, waiting_id" \
	" limit " CppAsString2(KNOWN_MAX) " + 1) w"

/*
 * Counts the messages, all of them or no more than one above KNOWN_MAX.  These are read
 * in order of the index: a bitmap would have those behind them, too.
 */
static void
count_messages(const SubscriptionRow *row, bool all)
{
	static CachedQuery queries[2] = {
		{COUNT_WAITING(WAITING_AT_MOST)}, {COUNT_WAITING("fanout.waiting where subscription_id = $1")}
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};
	CachedQuery *query = &queries[all ? 1 : 0];
	int64		count;
	int64		requeued;
	bool		isnull;
	Caller		caller = become_owner();

	if (!all)
		query_plan_by_index(query_prepare(query, 1, types, CURSOR_OPT_GENERIC_PLAN));
	query_execute(query, 1, types, values, NULL);
	become_caller(&caller);
	count = DatumGetInt64(query_value(0, 1, &isnull));
	requeued = DatumGetInt64(query_value(0, 2, &isnull));
	if (!all && count + requeued > KNOWN_MAX)
	{
		/* there may be more of either */
		waiting_room.recount_at = count_at;
		nrequeued = Max(nrequeued, 1);
		set_count(Max(waiting_room.count, KNOWN_MAX + 1));
		return;
	}
	waiting_room.recount_at = 0;
	nrequeued = requeued;
	set_count(count);
}

/* Counts the messages; if they are very many, only when it is time. */
static void
count_room(const SubscriptionRow *row)
{
	MonoTime	begun = mono_now();
	bool		all = (begun >= count_at);

	count_messages(row, all);
	if (all)
		count_at = mono_plus(begun, Max(RECOUNT_MS, (mono_now() - begun) * RECOUNT_PART / 1000));
}

/* Notes the highest place that was given to any. */
static void
find_last_place(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"select coalesce(max(place), 0) from fanout.waiting where subscription_id = $1"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};
	bool		isnull;

	owner_execute(&query, 1, types, values, NULL);
	last_place = Max(last_place, DatumGetInt64(query_value(0, 1, &isnull)));
}

/*
 * Reads what the worker has to know of the room, if that may have changed: at the
 * start, after a transaction that was undone, when a function has changed it, and when
 * very many messages are to be counted.  However many wait, it mostly reads few of them.
 */
void
waiting_look(const SubscriptionRow *row)
{
	if (!waiting_room.stale)
		return;
	forget_known();
	forget_order(row);
	heed_clock(row);
	count_room(row);
	if (waiting_room.count > 0)
		promote_soon();
	find_last_place(row);
	find_next_due(row, DT_NOBEGIN);
	waiting_room.stale = false;
}

/* ---- what the broker delivers ---- */

static void
add_waiting_key(Order *order, int64 key)
{
	OrderItem	item = {.keys = {(uint64) key},.nkeys = 1};

	if (!order_add(order, &item))
		out_of_memory();
}

static int
collect_keys(Delivery **deliveries, int n, bool (*chosen) (const Delivery *delivery), Datum *keys)
{
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		const OrderItem *item = &deliveries[i]->order;

		for (int j = 0; j < item->nkeys && (chosen == NULL || chosen(deliveries[i])); j++)
			keys[count++] = Int64GetDatum((int64) item->keys[j]);
	}
	return count;
}

/*
 * Tells whether an attempt is due later.  If it is by more than any attempt is put off,
 * the clock was set back, and it is due.
 */
static bool
is_early(const SubscriptionRow *row, TimestampTz next_try)
{
	TimestampTz wait = next_try - GetCurrentTimestamp();

	return wait > DUE_SOON_MS * INT64CONST(1000) && wait <= longest_pause(row);
}

/*
 * Takes what is known of a delivery that was given back to its queue, or was stored.
 * The broker delivers it again at once if the connection was lost while it was held.
 */
static void
recall(const SubscriptionRow *row, Delivery *delivery, int result)
{
	bool		isnull;
	TimestampTz next_try;

	if (!DatumGetBool(query_value(result, 2, &isnull)))
	{
		delivery->outcome = OUTCOME_SEEN;
		return;
	}
	delivery->waiting_id = DatumGetInt64(query_value(result, 3, &isnull));
	delivery->attempts = DatumGetInt32(query_value(result, 4, &isnull));
	delivery->postponed = DatumGetInt32(query_value(result, 5, &isnull));
	delivery->waits_since = DatumGetTimestampTz(query_value(result, 6, &isnull));
	next_try = DatumGetTimestampTz(query_value(result, 7, &isnull));
	if (!is_early(row, next_try))
		return;
	delivery->next_try = next_try;
	if (row->requeue)
		delivery->outcome = OUTCOME_EARLY;
}

static void
find_stored(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	static CachedQuery query = {
		"select message_id, requeued, waiting_id, attempts, postponed, waits_since, next_try"
		" from fanout.waiting where subscription_id = $1 and message_id = any ($2)"
	};
	Oid			types[2] = {INT4OID, UUIDARRAYOID};
	Datum		values[2] = {Int32GetDatum(row->subscription_id), (Datum) 0};
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));
	bool		isnull;

	for (int i = 0; i < n; i++)
		ids[i] = UUIDPGetDatum(&deliveries[i]->message_id);
	values[1] = PointerGetDatum(construct_array(ids, n, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
	owner_execute(&query, 2, types, values, NULL);
	for (uint64 found = 0; found < SPI_processed; found++)
	{
		pg_uuid_t  *id = DatumGetUUIDP(query_value(found, 1, &isnull));

		for (int i = 0; i < n; i++)
		{
			if (memcmp(id, &deliveries[i]->message_id, UUID_LEN) == 0 && deliveries[i]->outcome == OUTCOME_NONE)
				recall(row, deliveries[i], found);
		}
	}
}

static void
find_waiting_keys(const SubscriptionRow *row, Delivery **deliveries, int n, Order *order)
{
	static CachedQuery query = {
		"select k from unnest($2) k where exists (select from fanout.waiting where subscription_id = $1 and key1 = k)"
		" or exists (select from fanout.waiting where subscription_id = $1 and key2 = k)"
	};
	Oid			types[2] = {INT4OID, INT8ARRAYOID};
	Datum		values[2] = {Int32GetDatum(row->subscription_id), (Datum) 0};
	Datum	   *keys = palloc((2 * n + 1) * sizeof(Datum));
	bool		isnull;

	values[1] = int8_array(keys, collect_keys(deliveries, n, NULL, keys));
	owner_execute(&query, 2, types, values, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		add_waiting_key(order, DatumGetInt64(query_value(i, 1, &isnull)));
}

static bool
barrier_waits(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"select from fanout.waiting where subscription_id = $1 and barrier limit 1"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};

	owner_execute(&query, 1, types, values, NULL);
	return SPI_processed > 0;
}

static void
read_known(KnownMessage *message, int result)
{
	bool		isnull;

	memset(message, 0, sizeof(*message));
	memcpy(&message->message_id, DatumGetUUIDP(query_value(result, 1, &isnull)), UUID_LEN);
	for (int column = 2; column <= 3; column++)
	{
		int64		key = DatumGetInt64(query_value(result, column, &isnull));

		if (!isnull)
			message->order.keys[message->order.nkeys++] = (uint64) key;
	}
	message->order.barrier = DatumGetBool(query_value(result, 4, &isnull));
}

/* Where the message is among those that are known, or would be. */
static int
known_place(const pg_uuid_t *id)
{
	int			low = 0;
	int			high = nknown;

	while (low < high)
	{
		int			middle = (low + high) / 2;

		if (memcmp(&known[middle].message_id, id, UUID_LEN) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static bool
is_known(const pg_uuid_t *id, int place)
{
	return place < nknown && memcmp(&known[place].message_id, id, UUID_LEN) == 0;
}

static void
remember(const KnownMessage *message)
{
	int			place;

	if (nknown < 0)
		return;
	if (nknown == KNOWN_MAX)
	{
		forget_known();
		return;
	}
	place = known_place(&message->message_id);
	memmove(&known[place + 1], &known[place], (nknown - place) * sizeof(KnownMessage));
	known[place] = *message;
	nknown++;
}

static void
forget(const pg_uuid_t *id)
{
	int			place = nknown > 0 ? known_place(id) : 0;

	if (nknown <= 0 || !is_known(id, place))
		return;
	nknown--;
	memmove(&known[place], &known[place + 1], (nknown - place) * sizeof(KnownMessage));
}

/* Reads which messages are in the room, KNOWN_MAX at most. */
static void
know_all(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"select message_id, key1, key2, barrier from fanout.waiting where subscription_id = $1 and not requeued"
		" order by message_id"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(row->subscription_id)};

	if (nknown >= 0)
		return;
	owner_execute(&query, 1, types, values, NULL);
	nknown = 0;
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		KnownMessage message;

		read_known(&message, i);
		remember(&message);
	}
}

/*
 * Does the same as the functions before, without asking the table.  Returns false, and
 * does nothing, if there are too many.
 */
static bool
filter_known(const SubscriptionRow *row, Delivery **deliveries, int n, Order *order)
{
	know_all(row);
	if (nknown < 0)
		return false;
	for (int i = 0; i < n; i++)
	{
		const pg_uuid_t *id = &deliveries[i]->message_id;

		if (is_known(id, known_place(id)))
			deliveries[i]->outcome = OUTCOME_SEEN;
	}
	for (int i = 0; i < nknown && row->ordered; i++)
	{
		if (!order_add(order, &known[i].order))
			out_of_memory();
	}
	return true;
}

/*
 * Tells what the room means for deliveries: the outcome of those that are in it
 * is SEEN, those that were given back to their queue get their attempts, or are EARLY,
 * and order gets what the others must wait for.
 */
void
waiting_filter(const SubscriptionRow *row, Delivery **deliveries, int n, Order *order)
{
	OrderItem	anything = {.nkeys = 0};

	bool		recalls = row->requeue || nrequeued > 0;

	if (waiting_room.count == 0 && !recalls)
		return;
	if (waiting_room.count <= KNOWN_MAX && !recalls && filter_known(row, deliveries, n, order))
		return;
	find_stored(row, deliveries, n);
	if (!row->ordered)
		return;
	anything.barrier = barrier_waits(row);
	if (!order_add(order, &anything))
		out_of_memory();
	find_waiting_keys(row, deliveries, n, order);
}

/* Notes that a delivery has been stored. */
static void
remember_delivery(const Delivery *delivery)
{
	KnownMessage message = {.message_id = delivery->message_id,.order = delivery->order};

	remember(&message);
}

static bool
is_behind(const Delivery *delivery)
{
	return delivery->outcome == OUTCOME_BEHIND;
}

static bool
any_behind(Delivery **deliveries, int n)
{
	for (int i = 0; i < n; i++)
	{
		if (is_behind(deliveries[i]))
			return true;
	}
	return false;
}

/* Makes the first message of each key due, unless it has its time. */
static void
promote(const SubscriptionRow *row, Datum *keys, int n)
{
	static CachedQuery query = {
		PROMOTE("select waiting_id from fanout.waiting where next_try is null and waiting_id = any (array("
				"select " FIRST_OF("k.key") " from (select distinct unnest($2)) k (key)))")
	};
	Oid			types[2] = {INT4OID, INT8ARRAYOID};
	Datum		values[2] = {Int32GetDatum(row->subscription_id), (Datum) 0};

	if (n == 0)
		return;
	values[1] = int8_array(keys, n);
	run_promote(&query, 2, types, values);
}

/* The ids of those that failed because they wait for something else (wait_for). */
static int
collect_ids_that_wait(Delivery **deliveries, int n, Datum *ids)
{
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (deliveries[i]->outcome == OUTCOME_FAILED && deliveries[i]->waits_since != 0)
			ids[count++] = UUIDPGetDatum(&deliveries[i]->message_id);
	}
	return count;
}

/* Forgets the messages of the result (id, two keys); returns their keys, in an array for them. */
static int
forget_removed(Datum *keys)
{
	int			nkeys = 0;
	bool		isnull;

	for (uint64 i = 0; i < SPI_processed; i++)
	{
		forget(DatumGetUUIDP(query_value(i, 1, &isnull)));
		for (int column = 2; column <= 3; column++)
		{
			keys[nkeys] = query_value(i, column, &isnull);
			nkeys += isnull ? 0 : 1;
		}
	}
	return nkeys;
}

/* Is a message l of the same table later than w, and a change that the operations name? */
#define LATER(condition, operations) \
	"exists (select from fanout.waiting l where l.subscription_id = w.subscription_id and " condition \
	" and l.headers ->> 'op' in (" operations ") and l.headers ->> 'schema' = w.headers ->> 'schema'" \
	" and l.headers ->> 'table' = w.headers ->> 'table' and (l.place, l.waiting_id) > (w.place, w.waiting_id))"

#define CHANGES "'c', 'u', 'r', 'd'"

/* Another row has the key that its row leaves: only the message behind it says what is there. */
#define IS_TAKEN "coalesce(l.headers ->> 'taken' = 'true', false)"

/* Does a later message say what becomes of the row that has a key? */
#define TOLD(hash, key) \
	"(" LATER("l.key1 = " hash " and l.key = " key " and not (l.headers ->> 'op' = 'd' and " IS_TAKEN ")", CHANGES) \
	" or " LATER("l.key2 = " hash " and l.headers ->> 'old_key' = " key " and not " IS_TAKEN, CHANGES) ")"

/*
 * Gives messages that change a key the header "superseded", and makes them due, if a later
 * message says what becomes of the row at its new key.  With that header, sync_table() only
 * removes the row from its old key, because no later message need say that (drop_superseded()
 * has removed those of which one does).
 */
static void
mark_superseded(Oid *types, Datum *values)
{
	static CachedQuery query = {
		"update fanout.waiting w set headers = headers || '{\"superseded\": true}', next_try = clock_timestamp()"
		" where subscription_id = $1 and message_id = any ($2) and not barrier and headers ->> 'op' in (" CHANGES ")"
		" and key2 is not null and not headers ? 'superseded' and " TOLD("w.key1", "w.key")
	};

	owner_execute(&query, 2, types, values, NULL);
	if (SPI_processed > 0)
		waiting_room.next_due = mono_now();
}

/*
 * Removes messages of sync_table() that wait for something, typically the other row of
 * a foreign key, if a later message of the same row is there, or a TRUNCATE: that says
 * what becomes of the whole row, and what the earlier one waits for may never come,
 * because it is gone by now at the source.  A message that another row has taken the key
 * says nothing of that row, but the one behind it does.  Makes those behind them due.  One that
 * changes a key tells of two rows, so it goes only if later ones tell of both.
 * Returns true if there were any.
 */
static bool
drop_superseded(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	static CachedQuery query = {
		"delete from fanout.waiting w where subscription_id = $1 and message_id = any ($2)"
		" and not barrier and headers ->> 'op' in (" CHANGES ")"
		" and (" TOLD("w.key1", "w.key") " and (key2 is null or " TOLD("w.key2", "w.headers ->> 'old_key'") ")"
		" or " LATER("l.barrier", "'t'") ") returning message_id, key1, key2"
	};
	Oid			types[2] = {INT4OID, UUIDARRAYOID};
	Datum		values[2] = {Int32GetDatum(row->subscription_id), (Datum) 0};
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));
	Datum	   *keys = palloc((2 * n + 1) * sizeof(Datum));
	int			count = collect_ids_that_wait(deliveries, n, ids);

	if (count == 0 || !OidIsValid(row->sync_target))
		return false;
	values[1] = PointerGetDatum(construct_array(ids, count, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
	owner_execute(&query, 2, types, values, NULL);
	count = SPI_processed;
	promote(row, keys, forget_removed(keys));
	set_count(waiting_room.count - count);
	mark_superseded(types, values);
	return count > 0;
}

/* Those that failed may be due before all others. */
static void
note_next_due(Delivery **deliveries, int n)
{
	MonoTime	now = mono_now();
	TimestampTz clock = GetCurrentTimestamp();

	for (int i = 0; i < n; i++)
	{
		MonoTime	due = Max(1, now + (deliveries[i]->next_try - clock));

		if (deliveries[i]->outcome == OUTCOME_FAILED && (waiting_room.next_due == 0 || due < waiting_room.next_due))
			waiting_room.next_due = due;
	}
}

/* A delivery's place, by its sequence or behind what came before it. */
static int64
place_of(const Delivery *delivery)
{
	int64		place = delivery->has_sequence ? delivery->sequence : last_place;

	last_place = Max(last_place, place);
	return place;
}

static void
optional_key(const OrderItem *item, int index, Datum *value, char *null)
{
	*null = (index < item->nkeys) ? ' ' : 'n';
	*value = (index < item->nkeys) ? Int64GetDatum((int64) item->keys[index]) : (Datum) 0;
}

static void
optional_time(TimestampTz time, Datum *value, char *null)
{
	*null = (time != 0) ? ' ' : 'n';
	*value = TimestampTzGetDatum(time);
}

/* Columns of the message, in the order of the statement in insert(). */
static void
message_params(const SubscriptionRow *row, const Delivery *delivery, Datum *values, char *nulls)
{
	static const int attributes[] = {
		MESSAGE_ID, MESSAGE_TYPE, MESSAGE_KEY, MESSAGE_SEQUENCE, MESSAGE_HEADERS,
		MESSAGE_PUBLISHED_AT, MESSAGE_REDELIVERED, MESSAGE_CONTENT_TYPE
	};
	MessageValues message;

	delivery_values(delivery, row->topic, row->consumer_group, &message);
	for (int i = 0; i < lengthof(attributes); i++)
	{
		values[i] = message.values[attributes[i]];
		nulls[i] = message.nulls[attributes[i]] ? 'n' : ' ';
	}
	delivery_body(&message, &values[lengthof(attributes)], &nulls[lengthof(attributes)]);
}

/*
 * When a message is due, as it is stored; 0: behind another.  One that was given back
 * keeps its time.  What has no key of its own to be promoted by is due at once: if it has
 * to wait, that shows when it is taken.
 */
static TimestampTz
next_try(const Delivery *delivery)
{
	if (delivery->next_try != 0)
		return delivery->next_try;
	return (delivery->order.nkeys == 0 || delivery->order.barrier) ? GetCurrentTimestamp() : 0;
}

/* Of an attempt that failed, in the order of insert() and update_failed(). */
static void
failure_params(const Delivery *delivery, Datum *values, char *nulls)
{
	values[0] = Int32GetDatum(delivery->attempts);
	values[1] = Int32GetDatum(delivery->postponed);
	values[2] = query_text_param(delivery->error ? delivery->sqlstate : NULL, &nulls[2]);
	values[3] = query_text_param(delivery->error, &nulls[3]);
	optional_time(delivery->waits_since, &values[4], &nulls[4]);
	optional_time(next_try(delivery), &values[5], &nulls[5]);
}

static void
insert(const SubscriptionRow *row, const Delivery *delivery)
{
	static CachedQuery query = {
		"insert into fanout.waiting as w (subscription_id, place, key1, key2, barrier,"
		" message_id, type, key, sequence, headers, published_at, redelivered, content_type, payload, raw,"
		" attempts, postponed, sqlstate, error, waits_since, next_try, failed_at)"
		" values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21,"
		" case when $19 is not null then clock_timestamp() end)"
		" on conflict (subscription_id, message_id) do update set requeued = false, place = excluded.place,"
		" key1 = excluded.key1, key2 = excluded.key2, barrier = excluded.barrier, headers = excluded.headers,"
		" published_at = excluded.published_at, redelivered = excluded.redelivered,"
		" content_type = excluded.content_type, payload = excluded.payload, raw = excluded.raw,"
		" attempts = excluded.attempts, postponed = excluded.postponed, waits_since = excluded.waits_since,"
		" next_try = excluded.next_try, sqlstate = coalesce(excluded.sqlstate, w.sqlstate),"
		" error = coalesce(excluded.error, w.error), failed_at = coalesce(excluded.failed_at, w.failed_at)"
		" where w.requeued"
	};
	Oid			types[21] = {
		INT4OID, INT8OID, INT8OID, INT8OID, BOOLOID,
		UUIDOID, TEXTOID, TEXTOID, INT8OID, JSONBOID, TIMESTAMPTZOID, BOOLOID, TEXTOID, TEXTOID, BYTEAOID,
		INT4OID, INT4OID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID
	};
	Datum		values[21];
	char		nulls[21];

	memset(nulls, ' ', sizeof(nulls));
	values[0] = Int32GetDatum(row->subscription_id);
	values[1] = Int64GetDatum(place_of(delivery));
	optional_key(&delivery->order, 0, &values[2], &nulls[2]);
	optional_key(&delivery->order, 1, &values[3], &nulls[3]);
	values[4] = BoolGetDatum(delivery->order.barrier);
	message_params(row, delivery, &values[5], &nulls[5]);
	failure_params(delivery, &values[15], &nulls[15]);
	query_change(&query, 21, types, values, nulls, 1);
}

/*
 * Stores deliveries of the broker's: those that are BEHIND another, and those
 * that have FAILED.  Forgets what was known of those that are done with.
 */
void
waiting_store(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	MemoryContext scratch = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout waiting", ALLOCSET_DEFAULT_SIZES);
	Datum	   *keys = palloc((2 * n + 1) * sizeof(Datum));
	int			stored = 0;
	Caller		caller = become_owner();

	for (int i = 0; i < n; i++)
	{
		MemoryContext oldcontext;

		if (deliveries[i]->outcome != OUTCOME_BEHIND && deliveries[i]->outcome != OUTCOME_FAILED)
			continue;
		oldcontext = MemoryContextSwitchTo(scratch);
		insert(row, deliveries[i]);
		MemoryContextSwitchTo(oldcontext);
		MemoryContextReset(scratch);
		remember_delivery(deliveries[i]);
		stored++;
	}
	become_caller(&caller);
	MemoryContextDelete(scratch);
	(void) delete_done(deliveries, n, false);
	if (stored == 0)
		return;
	set_count(waiting_room.count + stored);
	note_next_due(deliveries, n);
	promote(row, keys, collect_keys(deliveries, n, is_behind, keys));
	if (drop_superseded(row, deliveries, n) || any_behind(deliveries, n))
		find_next_due(row, DT_NOBEGIN);
}

/* ---- what is given back to its queue ---- */

static void
insert_requeued(const SubscriptionRow *row, const Delivery *delivery)
{
	static CachedQuery query = {
		"insert into fanout.waiting (subscription_id, place, barrier, message_id, type, key, sequence, headers, redelivered,"
		" attempts, postponed, sqlstate, error, waits_since, next_try, failed_at, requeued)"
		" values ($1, 0, false, $2, $3, $4, $5, '{}', false, $6, $7, $8, $9, $10, $11, clock_timestamp(), true)"
	};
	Oid			types[11] = {
		INT4OID, UUIDOID, TEXTOID, TEXTOID, INT8OID, INT4OID, INT4OID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID
	};
	Datum		values[11];
	char		nulls[11];

	memset(nulls, ' ', sizeof(nulls));
	values[0] = Int32GetDatum(row->subscription_id);
	values[1] = UUIDPGetDatum(&delivery->message_id);
	values[2] = query_text_param(delivery->type, &nulls[2]);
	values[3] = query_text_param(delivery->key, &nulls[3]);
	values[4] = Int64GetDatum(delivery->sequence);
	nulls[4] = delivery->has_sequence ? ' ' : 'n';
	failure_params(delivery, &values[5], &nulls[5]);
	query_change(&query, 11, types, values, nulls, 1);
}

/*
 * Remembers the attempts of deliveries that FAILED and will be given back to their
 * queue, and forgets those of deliveries that are done with.
 */
void
waiting_requeue(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	for (int i = 0; i < n; i++)
	{
		Caller		caller;

		if (deliveries[i]->outcome != OUTCOME_FAILED)
			continue;
		if (deliveries[i]->waiting_id != 0)
		{
			update_failed(deliveries[i]);
			continue;
		}
		caller = become_owner();
		insert_requeued(row, deliveries[i]);
		become_caller(&caller);
	}
	(void) delete_done(deliveries, n, false);
}

/*
 * Forgets the attempts of messages that somebody else of the group has taken from
 * the queue since, retention_s seconds after they were due.
 */
void
waiting_forget(int retention_s)
{
	static CachedQuery query = {
		"delete from fanout.waiting where requeued and next_try < clock_timestamp() - $1 * interval '1 s'"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(retention_s)};

	owner_execute(&query, 1, types, values, NULL);
}

/* ---- what is taken from the room ---- */

static bool
is_done(const Delivery *delivery)
{
	return delivery->outcome == OUTCOME_APPLIED || delivery->outcome == OUTCOME_DEAD ||
		delivery->outcome == OUTCOME_SEEN;
}

/*
 * Removes the rows of messages that are done with; returns how many.  Those that
 * waiting_take() has locked must be there; what a row remembers of a delivery that was
 * given back, somebody may have forgotten before.
 */
static int
delete_done(Delivery **deliveries, int n, bool locked)
{
	static CachedQuery query = {"delete from fanout.waiting where waiting_id = any ($1)"};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1];
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (is_done(deliveries[i]) && deliveries[i]->waiting_id != 0)
			ids[count++] = Int64GetDatum(deliveries[i]->waiting_id);
	}
	if (count == 0)
		return 0;
	values[0] = int8_array(ids, count);
	if (locked)
		owner_change(&query, 1, types, values, NULL, count);
	else
		owner_execute(&query, 1, types, values, NULL);
	return count;
}

static void
update_failed(const Delivery *delivery)
{
	static CachedQuery query = {
		"update fanout.waiting set attempts = $2, postponed = $3, sqlstate = $4, error = $5, waits_since = $6,"
		" next_try = $7, failed_at = clock_timestamp() where waiting_id = $1"
	};
	Oid			types[7] = {INT8OID, INT4OID, INT4OID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID};
	Datum		values[7];
	char		nulls[7];
	Caller		caller = become_owner();

	memset(nulls, ' ', sizeof(nulls));
	values[0] = Int64GetDatum(delivery->waiting_id);
	failure_params(delivery, &values[1], &nulls[1]);
	query_change(&query, 7, types, values, nulls, 1);
	become_caller(&caller);
}

/* Lets messages wait that are due.  Returns false if others have locked some of them. */
static bool
set_behind(Datum *ids, int n)
{
	static CachedQuery query = {
		"update fanout.waiting set next_try = null where waiting_id = any (array("
		"select waiting_id from fanout.waiting where waiting_id = any ($1) and next_try is not null for update skip locked))"
	};
	Oid			types[1] = {INT8ARRAYOID};
	Datum		values[1];

	if (n == 0)
		return true;
	values[0] = int8_array(ids, n);
	owner_execute(&query, 1, types, values, NULL);
	return SPI_processed == (uint64) n;
}

/* Those that were due, and wait behind one that failed in the same batch. */
static void
update_behind(Delivery **deliveries, int n)
{
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (is_behind(deliveries[i]))
			ids[count++] = Int64GetDatum(deliveries[i]->waiting_id);
	}
	(void) set_behind(ids, count);
}

/*
 * Makes messages due that wait for others to come first (wait_for), HASTEN_MAX at most and
 * not more often than every retry_delay, or once that is over: one of their kind has found
 * what it waited for, and may be what the next one waits for.  Those whose latest attempt
 * counts keep their pauses.
 */
static void
hasten(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"update fanout.waiting set next_try = clock_timestamp() where waiting_id = any (array("
		"select waiting_id from fanout.waiting where subscription_id = $1 and next_try > clock_timestamp() and not requeued"
		" and waits_since is not null and postponed > 0 order by next_try limit $2 for update skip locked))"
	};
	Oid			types[2] = {INT4OID, INT4OID};
	Datum		values[2] = {Int32GetDatum(row->subscription_id), Int32GetDatum(HASTEN_MAX)};
	MonoTime	now = mono_now();

	hasten_at = (hastened_at == 0) ? 0 : mono_plus(hastened_at, row->retry_delay);
	if (hasten_at > now)
		return;
	hasten_at = 0;
	hastened_at = now;
	owner_execute(&query, 2, types, values, NULL);
}

/* Was any applied that had waited for others to come first? */
static bool
any_found(Delivery **deliveries, int n)
{
	for (int i = 0; i < n; i++)
	{
		if (deliveries[i]->outcome == OUTCOME_APPLIED && deliveries[i]->waits_since != 0)
			return true;
	}
	return false;
}

/*
 * Writes the outcomes of what waiting_take() has given: removes what is done
 * with, schedules what failed, and makes due what waited behind these.  If it has given
 * nothing, it has found out already when it is to be asked again.
 */
void
waiting_settle(const SubscriptionRow *row, Delivery **deliveries, int n)
{
	Datum	   *keys = palloc((2 * n + 1) * sizeof(Datum));
	bool		barrier = false;

	if (n == 0)
		return;
	for (int i = 0; i < n; i++)
	{
		if (deliveries[i]->outcome == OUTCOME_FAILED)
			update_failed(deliveries[i]);
		if (is_done(deliveries[i]))
			forget(&deliveries[i]->message_id);
		barrier = barrier || (is_done(deliveries[i]) && deliveries[i]->order.barrier);
	}
	update_behind(deliveries, n);
	set_count(waiting_room.count - delete_done(deliveries, n, true));
	if (barrier)
		promote_all(row);
	else
		promote(row, keys, collect_keys(deliveries, n, is_done, keys));
	(void) drop_superseded(row, deliveries, n);
	if (any_found(deliveries, n))
		hasten(row);
	find_next_due(row, DT_NOBEGIN);
}

/* ---- taking what is due ---- */

static void
add_due_keys(DueList *due, int result)
{
	for (int column = 2; column <= 3; column++)
	{
		bool		isnull;
		Datum		key = query_value(result, column, &isnull);

		if (!isnull && !is_element(due->keys, due->nkeys, DatumGetInt64(key)))
			due->keys[due->nkeys++] = key;
	}
}

/*
 * Finds what is due; unlocked: but for what others have locked.  What was postponed
 * goes alone, unless it waits for others to come first, and so does a barrier; singly: so
 * does everything.
 */
static DueList
find_due(const SubscriptionRow *row, int limit, bool singly, bool unlocked)
{
	static CachedQuery queries[2] = {{FIND_DUE}, {FIND_DUE " for update skip locked"}};
	Oid			types[3] = {INT4OID, INT4OID, TIMESTAMPTZOID};
	Datum		values[3] = {
		Int32GetDatum(row->subscription_id), Int32GetDatum(limit), TimestampTzGetDatum(GetCurrentTimestamp())
	};
	DueList		due = {.ids = palloc((limit + 1) * sizeof(Datum)),.keys = palloc((2 * limit + 1) * sizeof(Datum))};
	bool		isnull;

	owner_execute(&queries[unlocked ? 1 : 0], 3, types, values, NULL);
	for (uint64 i = 0; i < SPI_processed && !due.singly; i++)
	{
		bool		alone = singly || DatumGetBool(query_value(i, 4, &isnull));

		if (alone && due.n > 0)
			continue;
		due.singly = alone;
		due.ids[due.n++] = query_value(i, 1, &isnull);
		add_due_keys(&due, i);
	}
	due.depth = due.singly ? 1 : Max(8, limit / Max(due.nkeys, 1));
	return due;
}

static void
read_candidate(Candidate *candidate, int result)
{
	bool		isnull;

	memset(candidate, 0, sizeof(*candidate));
	candidate->waiting_id = DatumGetInt64(query_value(result, 1, &isnull));
	for (int column = 3; column <= 4; column++)
	{
		int64		key = DatumGetInt64(query_value(result, column, &isnull));

		if (!isnull)
			candidate->order.keys[candidate->order.nkeys++] = (uint64) key;
	}
	candidate->order.barrier = DatumGetBool(query_value(result, 5, &isnull));
	candidate->follows = DatumGetBool(query_value(result, 6, &isnull));
	candidate->size = DatumGetInt32(query_value(result, 7, &isnull));
	candidate->order.free = DatumGetBool(query_value(result, 8, &isnull)) && !isnull;
}

/*
 * Finds what is due with all that it may have to wait for: of each key the first
 * messages, the first barrier, and the first message that anybody waits for; in order.
 */
static Candidate *
find_candidates(const SubscriptionRow *row, const DueList *due, int *n)
{
	static CachedQuery query = {
		"select " CANDIDATE " from fanout.waiting where waiting_id = any ($2)"
		" union select x.* from unnest($3) k, lateral (select " CANDIDATE " from fanout.waiting"
		" where subscription_id = $1 and key1 = k order by place, waiting_id limit $4) x"
		" union select x.* from unnest($3) k, lateral (select " CANDIDATE " from fanout.waiting"
		" where subscription_id = $1 and key2 = k order by place, waiting_id limit $4) x"
		" union (select " CANDIDATE " from fanout.waiting where subscription_id = $1 and barrier"
		" order by place, waiting_id limit 1)"
		" union (select " CANDIDATE " from fanout.waiting where subscription_id = $1 and not " IS_FREE
		" order by place, waiting_id limit 1)"
		" order by place, waiting_id"
	};
	Oid			types[4] = {INT4OID, INT8ARRAYOID, INT8ARRAYOID, INT4OID};
	Datum		values[4] = {
		Int32GetDatum(row->subscription_id), int8_array(due->ids, due->n), int8_array(due->keys, due->nkeys),
		Int32GetDatum(due->depth)
	};
	Candidate  *candidates;

	owner_execute(&query, 4, types, values, NULL);
	*n = SPI_processed;
	candidates = palloc((*n + 1) * sizeof(Candidate));
	for (int i = 0; i < *n; i++)
		read_candidate(&candidates[i], i);
	return candidates;
}

/* May it be taken because those before it in the same batch are? */
static bool
may_follow(const Candidate *candidate, const DueList *due)
{
	if (due->singly || !candidate->follows || candidate->order.barrier || candidate->order.nkeys == 0)
		return false;
	for (int i = 0; i < candidate->order.nkeys; i++)
	{
		if (!is_element(due->keys, due->nkeys, (int64) candidate->order.keys[i]))
			return false;
	}
	return true;
}

/*
 * Counts a candidate among those that were looked for of its keys, in order; found has two
 * places for each key of the list, as a message has two.  Once a key has had as many, the rest
 * of it waits: a message that was found only because it is due may be behind one that was
 * not found, as after skip() of a barrier.
 */
static void
count_found(const DueList *due, int *found, const OrderItem *item)
{
	for (int i = 0; i < item->nkeys; i++)
	{
		OrderItem	rest = {.keys = {item->keys[i]},.nkeys = 1};
		int			place = index_of(due->keys, due->nkeys, (int64) item->keys[i]);

		if (place >= 0 && ++found[2 * place + i] == due->depth && !order_add(&walk, &rest))
			out_of_memory();
	}
}

/*
 * Chooses, in order, what is due and waits for nothing, and what follows in the
 * same keys; bounded in count and bytes.  What is due and must wait is BEHIND.
 * Leaves what is chosen at the head of the candidates, and returns how many.  *locked:
 * others have locked some of what is due and must wait, so that it still is due.
 */
static int
choose(const DueList *due, Candidate *candidates, int n, int limit, size_t memory, bool *locked)
{
	Datum	   *behind = palloc((due->n + 1) * sizeof(Datum));
	int		   *found = palloc0((2 * due->nkeys + 1) * sizeof(int));
	int			nbehind = 0;
	int			count = 0;
	size_t		size = 0;

	order_clear(&walk);
	for (int i = 0; i < n && count < limit; i++)
	{
		Candidate  *candidate = &candidates[i];
		bool		is_due = is_element(due->ids, due->n, candidate->waiting_id);
		bool		blocked = order_blocks(&walk, &candidate->order);

		if (!blocked && (is_due || may_follow(candidate, due)))
		{
			size += candidate->size;
			if (count > 0 && size > memory)
				break;
			candidates[count++] = *candidate;
		}
		else
		{
			if (is_due)
				behind[nbehind++] = Int64GetDatum(candidate->waiting_id);
			if (!order_add(&walk, &candidate->order))
				out_of_memory();
		}
		count_found(due, found, &candidate->order);
	}
	*locked = !set_behind(behind, nbehind);
	return count;
}

static Datum *
chosen_ids(const Candidate *chosen, int n)
{
	Datum	   *ids = palloc((n + 1) * sizeof(Datum));

	for (int i = 0; i < n; i++)
		ids[i] = Int64GetDatum(chosen[i].waiting_id);
	return ids;
}

/* A value of the result, copied into the current context. */
static Datum
copy_value(int result, int column, bool *isnull)
{
	Form_pg_attribute attr = TupleDescAttr(SPI_tuptable->tupdesc, column - 1);
	Datum		value = query_value(result, column, isnull);

	if (*isnull)
		return (Datum) 0;
	if (attr->attlen == -1)
		return PointerGetDatum(PG_DETOAST_DATUM_COPY(value));
	if (!attr->attbyval)
		return PointerGetDatum(memcpy(palloc(attr->attlen), DatumGetPointer(value), attr->attlen));
	return value;
}

static char *
text_value(int result, int column)
{
	bool		isnull;
	Datum		value = query_value(result, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

/* Columns 8 on are the attributes of fanout.message. */
static MessageValues *
read_message(int result)
{
	MessageValues *message = palloc(sizeof(MessageValues));

	for (int i = 0; i < MESSAGE_ATTRIBUTES; i++)
		message->values[i] = copy_value(result, 9 + i, &message->nulls[i]);
	message->nulls[MESSAGE_BODY] = true;
	return message;
}

static Delivery *
read_delivery(int result)
{
	Delivery   *delivery = palloc0(sizeof(Delivery));
	bool		isnull;

	delivery->waiting_id = DatumGetInt64(query_value(result, 1, &isnull));
	for (int column = 2; column <= 3; column++)
	{
		int64		key = DatumGetInt64(query_value(result, column, &isnull));

		if (!isnull)
			delivery->order.keys[delivery->order.nkeys++] = (uint64) key;
	}
	delivery->order.barrier = DatumGetBool(query_value(result, 4, &isnull));
	delivery->attempts = DatumGetInt32(query_value(result, 5, &isnull));
	delivery->postponed = DatumGetInt32(query_value(result, 6, &isnull));
	delivery->waits_since = DatumGetTimestampTz(query_value(result, 7, &isnull));
	delivery->error = text_value(result, 8);
	delivery->stored = read_message(result);
	delivery->way = delivery_way(delivery->stored);
	memcpy(&delivery->message_id, DatumGetUUIDP(delivery->stored->values[MESSAGE_ID]), UUID_LEN);
	delivery->key = text_value(result, 9 + MESSAGE_KEY);
	strlcpy(delivery->sqlstate, delivery->error ? text_value(result, 9 + MESSAGE_ATTRIBUTES) : "",
			sizeof(delivery->sqlstate));
	return delivery;
}

/* Locks rows and reads them, bodies included, in order; in the context. */
static int
load(const SubscriptionRow *row, Datum *ids, int n, MemoryContext context, Delivery **deliveries)
{
	static CachedQuery query = {
		"select waiting_id, key1, key2, barrier, attempts, postponed, waits_since, error,"
		" message_id, $2, $3, type, key, sequence, headers, null::jsonb,"
		" coalesce(raw, convert_to(payload, 'UTF8')), published_at, redelivered, attempts, content_type,"
		" sqlstate from fanout.waiting where waiting_id = any ($1) order by place, waiting_id for update skip locked"
	};
	Oid			types[3] = {INT8ARRAYOID, TEXTOID, TEXTOID};
	Datum		values[3] = {
		int8_array(ids, n), CStringGetTextDatum(row->topic), CStringGetTextDatum(row->consumer_group)
	};
	MemoryContext oldcontext;
	int			count;

	owner_execute(&query, 3, types, values, NULL);
	count = SPI_processed;
	oldcontext = MemoryContextSwitchTo(context);
	for (int i = 0; i < count; i++)
		deliveries[i] = read_delivery(i);
	MemoryContextSwitchTo(oldcontext);
	SPI_freetuptable(SPI_tuptable);
	return count;
}

/*
 * Leaves out messages that are behind one that somebody else, as a transaction that
 * called skip(), has locked: of those chosen, in order, it was not loaded.  Returns
 * how many stay.
 */
static int
leave_out_blocked(const Candidate *chosen, int n, Delivery **deliveries, int loaded)
{
	int			next = 0;
	int			kept = 0;

	order_clear(&walk);
	for (int i = 0; i < n; i++)
	{
		bool		have = next < loaded && deliveries[next]->waiting_id == chosen[i].waiting_id;
		Delivery   *delivery = have ? deliveries[next++] : NULL;

		if (have && !order_blocks(&walk, &chosen[i].order))
			deliveries[kept++] = delivery;
		else if (!order_add(&walk, &chosen[i].order))
			out_of_memory();
	}
	return kept;
}

/* One try of waiting_take(); *locked: others have locked what is due, or might have been taken. */
static int
take(const SubscriptionRow *row, int limit, size_t memory, const DueList *due, MemoryContext context,
	 Delivery **deliveries, bool *locked)
{
	Candidate  *chosen;
	int			n;
	int			loaded;

	*locked = false;
	if (due->n == 0)
		return 0;
	chosen = find_candidates(row, due, &n);
	n = choose(due, chosen, n, due->singly ? 1 : limit, memory, locked);
	if (n == 0)
		return 0;
	loaded = load(row, chosen_ids(chosen, n), n, context, deliveries);
	if (loaded == n)
		return n;
	*locked = true;
	return leave_out_blocked(chosen, n, deliveries, loaded);
}

/*
 * Takes messages that are due, locked until the transaction ends: one that is to
 * be tried alone, or up to limit of the others and of those that were never tried
 * and follow them in the same keys, with at most so many bytes of bodies, but one in
 * any case.  Returns how many; 0 if nothing was due after all.  In the context.
 */
int
waiting_take(const SubscriptionRow *row, int limit, size_t memory, bool singly, MemoryContext context,
			 Delivery **deliveries)
{
	TimestampTz now = GetCurrentTimestamp();
	DueList		due;
	bool		locked;
	int			n;

	if (promote_at != 0 && mono_now() >= promote_at)
		promote_all(row);
	if (hasten_at != 0 && mono_now() >= hasten_at)
		hasten(row);
	due = find_due(row, limit, singly, false);
	n = take(row, limit, memory, &due, context, deliveries, &locked);

	if (n == 0 && locked)
	{
		due = find_due(row, limit, singly, true);
		n = take(row, limit, memory, &due, context, deliveries, &locked);
		locked = true;
	}
	if (n == 0)
		find_next_due(row, locked ? now : DT_NOBEGIN);
	return n;
}

/*
 * Takes one message again, in another transaction than waiting_take().  Returns
 * NULL if somebody has removed it meanwhile.
 */
Delivery *
waiting_take_again(const SubscriptionRow *row, int64 waiting_id, MemoryContext context)
{
	Datum		id = Int64GetDatum(waiting_id);
	Delivery   *delivery;

	return load(row, &id, 1, context, &delivery) == 1 ? delivery : NULL;
}

/* Writes that what had become of a message could not be written, and when it is tried again. */
void
waiting_put_off(const SubscriptionRow *row, int64 waiting_id, const Failure *failure)
{
	static CachedQuery query = {
		"update fanout.waiting set postponed = postponed + 1, sqlstate = $2, error = $3, next_try = $4,"
		" failed_at = clock_timestamp() where waiting_id = $1"
	};
	Oid			types[4] = {INT8OID, TEXTOID, TEXTOID, TIMESTAMPTZOID};
	Datum		values[4] = {
		Int64GetDatum(waiting_id), CStringGetTextDatum(failure->sqlstate), CStringGetTextDatum(failure->text),
		TimestampTzGetDatum(failure_next_try(row, PUT_OFF_TRIES))
	};

	owner_execute(&query, 4, types, values, NULL);
}

/*
 * Counts an attempt before it is made, with an error that is true meanwhile, and if the
 * worker does not live to write another one.
 */
void
waiting_begin_attempt(const SubscriptionRow *row, int64 waiting_id, int attempts)
{
	static CachedQuery query = {
		"update fanout.waiting set attempts = $2, error = " AS_UNFINISHED("error") ", sqlstate = '57P01',"
		" next_try = $3, failed_at = clock_timestamp() where waiting_id = $1"
	};
	Oid			types[3] = {INT8OID, INT4OID, TIMESTAMPTZOID};
	Datum		values[3] = {
		Int64GetDatum(waiting_id), Int32GetDatum(attempts), TimestampTzGetDatum(failure_next_try(row, attempts))
	};

	owner_execute(&query, 3, types, values, NULL);
}
