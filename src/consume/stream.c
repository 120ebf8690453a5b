/*-------------------------------------------------------------------------
 *
 * stream.c
 *		Where a stream is read from, and how far it was read.
 *
 * A stream keeps what is acked, so an ack only asks for more.  What counts is the
 * position: the offset up to which every message was applied, given up or stored
 * in the waiting room.  It is written in the transaction that does so (fanout.stream_offset), so
 * the position and the effects are kept, restored and lost together.  The inbox
 * is used as for any queue, because a publisher that sends a message again puts
 * it into the stream twice, at two offsets.
 *
 * With each connection it is found out first where the broker stands:
 *
 *		                     none, "next"            its last messages came,
 *		stream_begin() ----> SEEKING_END             or it is empty: position is stored,
 *		     |                    '----------------> connection begins anew
 *		     | none, or without a message id
 *		     +-------------> AT_START ------- first message: position is stored --.
 *		     | position with a message id                                         v
 *		     '-------------> CHECKING -- the message at the position, or ---> READING
 *		                          |      a gap behind it, which is counted
 *		                          '- another message there, or none at all: refused
 *
 *		stream_begin()			the first arrow
 *		stream_delivered()		those that a message causes
 *		stream_time_is_up()		those that silence causes
 *
 * CHECKING begins at the last message that was read instead of the next one, because
 * a stream that was deleted and declared anew counts from 0 again: its messages
 * below the position would be left out without a word.  Whoever reads on must have
 * said so (alter_subscription(start_at)), since what is in the new stream may have
 * been applied before.
 *
 * A position is stored as soon as the first message has come, or it is sure that there
 * is none: "next" and "last" mean another place with each connection.
 *
 * The row of a subscription is updated with each batch.  It is found by its ctid, so
 * that its dead versions, which an old snapshot may keep for hours, are not looked at.
 *
 * Must never: store a position above a message that is not settled; or take
 * silence as a proof that a stream was declared anew.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "storage/itemptr.h"
#include "utils/memutils.h"

#include "consume/owner.h"
#include "consume/stream.h"
#include "server/query.h"
#include "server/worker.h"

/* A message at the position, or the last one, comes within this time. */
#define ANSWER_MS 5000

/* The last messages of a stream have come when none came for so long. */
#define QUIET_MS 300

/* While messages go on coming, so long is the end of a stream searched for. */
#define SEEK_MS 2000

typedef enum StreamPhase
{
	SEEKING_END,
	AT_START,
	CHECKING,
	READING,
} StreamPhase;

static StreamPhase phase = READING;
static int64 expected;			/* offset of the next message; -1: not known */
static bool stored;				/* there is a position in the table */
static pg_uuid_t last_id;		/* of the message at the position */
static MonoTime due;			/* for stream_time_is_up(); 0: never */
static MonoTime seek_until;		/* SEEKING_END: no longer; 0: none has come */
static ItemPointerData place;	/* of the row, to find it again */
static bool have_place = false;
static BrokerField start = {.name = "x-stream-offset"};
static char trouble[300];		/* why nothing may be read */

/* ---- the position in the table ---- */

/* Reads the position.  Returns whether there is one, and its message's id is known. */
static bool
load_position(int32 inbox_id)
{
	static CachedQuery query = {
		"select stream_offset, message_id from fanout.stream_offset where inbox_id = $1"
	};
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(inbox_id)};
	bool		isnull = true;
	Datum		id;

	owner_execute(&query, 1, types, values, NULL);
	stored = (SPI_processed == 1);
	if (!stored)
		return false;
	expected = DatumGetInt64(query_value(0, 1, &isnull)) + 1;
	id = query_value(0, 2, &isnull);
	if (!isnull)
		memcpy(&last_id, DatumGetUUIDP(id), UUID_LEN);
	return !isnull;
}

/* Forgets the positions of subscriptions that begin anew, or have ended with their queue. */
static void
forget_others(void)
{
	static CachedQuery query = {
		"delete from fanout.stream_offset o"
		" where not exists (select from fanout.subscription s where s.inbox_id = o.inbox_id)"
	};

	owner_execute(&query, 0, NULL, NULL, NULL);
}

static void
note_place(void)
{
	bool		isnull;

	if (SPI_processed == 1)
		place = *(ItemPointer) DatumGetPointer(query_value(0, 1, &isnull));
	have_place = (SPI_processed == 1);
}

/* Updates the row where it was last; false if it is not there any more. */
static bool
update_in_place(Datum *values, const char *nulls)
{
	static CachedQuery query = {
		"update fanout.stream_offset set stream_offset = $2, message_id = $3, missed = missed + $4"
		" where ctid = $5 and inbox_id = $1 returning ctid"
	};
	Oid			types[5] = {INT4OID, INT8OID, UUIDOID, INT8OID, TIDOID};

	if (!have_place)
		return false;
	values[4] = PointerGetDatum(&place);
	owner_execute(&query, 5, types, values, nulls);
	note_place();
	return have_place;
}

/*
 * Writes the position, in a transaction of worker_begin(): offset, the id of the
 * message there (NULL: not known), and how many before it were missed.
 */
static void
write_position(int32 inbox_id, int64 offset, const pg_uuid_t *id, int64 missed)
{
	static CachedQuery query = {
		"insert into fanout.stream_offset as o (inbox_id, stream_offset, message_id, missed) values ($1, $2, $3, $4)"
		" on conflict (inbox_id) do update set stream_offset = excluded.stream_offset,"
		" message_id = excluded.message_id, missed = o.missed + excluded.missed returning ctid"
	};
	Oid			types[4] = {INT4OID, INT8OID, UUIDOID, INT8OID};
	Datum		values[5] = {Int32GetDatum(inbox_id), Int64GetDatum(offset), UUIDPGetDatum(id), Int64GetDatum(missed)};
	const char *nulls = (id != NULL) ? "     " : "  n  ";

	if (update_in_place(values, nulls))
		return;
	owner_execute(&query, 4, types, values, nulls);
	note_place();
}

/* Writes the position in a transaction of its own, before anything is read from there. */
static void
store_position(const SubscriptionRow *row, int64 offset, const pg_uuid_t *id, int64 missed)
{
	MemoryContext oldcontext = CurrentMemoryContext;

	worker_begin();
	write_position(row->inbox_id, offset, id, missed);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	stored = true;
}

/* ---- beginning ---- */

static void
start_at_text(const char *where)
{
	start.type = BROKER_VALUE_STRING;
	start.value.string.data = where;
	start.value.string.len = strlen(where);
}

static void
start_at_number(BrokerValueType type, int64 number)
{
	start.type = type;
	start.value.integer = number;
}

/* Sets where to begin without a position: as the subscription says. */
static void
begin_as_asked(const SubscriptionRow *row, MonoTime now)
{
	phase = AT_START;
	if (row->start_kind == STREAM_FROM_OFFSET)
	{
		expected = row->start_value;
		start_at_number(BROKER_VALUE_INT, expected);
	}
	else if (row->start_kind == STREAM_FROM_TIME)
		start_at_number(BROKER_VALUE_TIMESTAMP, row->start_value);
	else if (row->start_kind == STREAM_FROM_FIRST)
		start_at_text("first");
	else
	{
		start_at_text("last");
		due = mono_plus(now, ANSWER_MS);
		if (row->start_kind == STREAM_FROM_NEXT)
			phase = SEEKING_END;
	}
}

/*
 * Begins to read a stream on a new connection.  Returns the argument
 * "x-stream-offset", valid until the next call.  Not in a transaction.
 */
const BrokerField *
stream_begin(const SubscriptionRow *row, MonoTime now)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	bool		known;

	expected = -1;
	due = seek_until = 0;
	worker_begin();
	forget_others();
	known = load_position(row->inbox_id);
	worker_commit();
	MemoryContextSwitchTo(oldcontext);
	if (!stored)
	{
		begin_as_asked(row, now);
		return &start;
	}
	phase = known ? CHECKING : AT_START;
	if (known)
		due = mono_plus(now, ANSWER_MS);
	start_at_number(BROKER_VALUE_INT, known ? expected - 1 : expected);
	return &start;
}

/* ---- the first messages of a connection ---- */

static void
log_gap(const SubscriptionRow *row, int64 missed)
{
	ereport(WARNING,
			(errmsg("pg_fanout consumer of %s: up to " INT64_FORMAT " messages of the stream were removed before they were read",
					row->queue, missed),
			 errhint("The stream keeps too little, by its x-max-age or x-max-length-bytes, for how long nothing was read.")));
}

/*
 * Begins to read at a message, the first one that may be read.  If it is not the one
 * behind the position, which is removed, too, those between are counted as missed.  Some
 * of these offsets may have been marks of the broker's own, and no messages.
 */
static StreamVerdict
read_from(const SubscriptionRow *row, int64 offset)
{
	int64		missed = stored ? offset - expected : 0;

	if (!stored || missed > 0)
		store_position(row, offset - 1, NULL, missed);
	if (missed > 0)
		log_gap(row, missed);
	phase = READING;
	due = 0;
	return STREAM_TAKE;
}

/* Notes one of the last messages of a stream: the position may be there. */
static StreamVerdict
note_end(const Delivery *delivery)
{
	MonoTime	now = mono_now();

	if (seek_until == 0)
		seek_until = mono_plus(now, SEEK_MS);
	expected = delivery->stream_offset + 1;
	last_id = delivery->message_id;
	due = Min(seek_until, mono_plus(now, QUIET_MS));
	return STREAM_PASS;
}

static StreamVerdict
check_position(const SubscriptionRow *row, const Delivery *delivery)
{
	if (delivery->stream_offset >= expected)
		return read_from(row, delivery->stream_offset);
	if (delivery->stream_offset < expected - 1)
		return STREAM_PASS;
	if (memcmp(&delivery->message_id, &last_id, UUID_LEN) == 0)
	{
		phase = READING;
		due = 0;
		return STREAM_PASS;
	}
	snprintf(trouble, sizeof(trouble), "the stream has another message at offset " INT64_FORMAT
			 " than the one that was read: it was deleted and declared anew."
			 " Use fanout.alter_subscription() with start_at to read it.", delivery->stream_offset);
	return STREAM_REFUSE;
}

/*
 * Decides what to do with a delivery.  *problem is set if nothing may be read.  Not in a
 * transaction.
 */
StreamVerdict
stream_delivered(const SubscriptionRow *row, const Delivery *delivery, const char **problem)
{
	*problem = trouble;
	if (delivery->stream_offset < 0)
	{
		strlcpy(trouble, "a delivery of the stream has no offset", sizeof(trouble));
		return STREAM_REFUSE;
	}
	switch (phase)
	{
		case SEEKING_END:
			return note_end(delivery);
		case AT_START:
			if (delivery->stream_offset < expected)
				return STREAM_PASS;
			return read_from(row, delivery->stream_offset);
		case CHECKING:
			return check_position(row, delivery);
		case READING:
			break;
	}
	return STREAM_TAKE;
}

/* Was nothing of the stream delivered before? */
bool
stream_is_new(void)
{
	return !stored;
}

/* ---- silence ---- */

/* When stream_time_is_up() is to be called, while the stream is consumed; 0: never. */
MonoTime
stream_due(void)
{
	return due;
}

/* The stream says nothing, though it should. */
static bool
silent(const char **problem)
{
	snprintf(trouble, sizeof(trouble), "the stream delivers no message from offset " INT64_FORMAT " on,"
			 " up to which it was read: it was deleted and declared anew, or is not available."
			 " In the first case use fanout.alter_subscription() with start_at.", expected - 1);
	if (phase != CHECKING)
		strlcpy(trouble, "the stream has messages, and delivers none: it is not available", sizeof(trouble));
	*problem = trouble;
	return false;
}

/*
 * Decides what it means that no message came in time, given how many the stream
 * has.  Returns true if the connection is to begin anew; false: see *problem, unless it
 * is NULL.  Not in a transaction.
 */
bool
stream_time_is_up(const SubscriptionRow *row, uint32_t messages, const char **problem)
{
	bool		seeking = (phase == SEEKING_END);

	*problem = NULL;
	due = 0;
	if (seeking && seek_until != 0)
		store_position(row, expected - 1, &last_id, 0);
	else if (phase == CHECKING || messages > 0)
		return silent(problem);
	else
	{
		store_position(row, -1, NULL, 0);
		expected = 0;
	}
	return seeking;
}

/* ---- settled messages ---- */

/*
 * Writes the position behind the deliveries of a batch, in order, before the first
 * one whose turn did not come.  In the transaction that settles them.
 */
void
stream_record(const SubscriptionRow *row, Delivery *const *deliveries, int n)
{
	int			settled = 0;

	while (settled < n && deliveries[settled]->outcome != OUTCOME_NONE)
		settled++;
	if (settled > 0)
		write_position(row->inbox_id, deliveries[settled - 1]->stream_offset,
					   &deliveries[settled - 1]->message_id, 0);
}
