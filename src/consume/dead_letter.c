/*-------------------------------------------------------------------------
 *
 * dead_letter.c
 *		Messages that a subscription gave up, and those it is to try once more.
 *
 *		inbox transaction        redrive()               take
 *		-----------------> DEAD ----------> REDRIVEN ---------> (handler)
 *		                    ^                   ^                |  |  |
 *		                    |                   '- worker ended -'  |  '-> removed
 *		                    '-- failed, or worker ended again ------'
 *
 * A message becomes a dead letter in the transaction that puts its id into the
 * inbox.  Taking one counts as an attempt as soon as that is committed, before
 * the handler runs; it is removed in the transaction of the handler.
 *
 * The request, redriven_at, stays while the handler runs: if the worker ends meanwhile,
 * the next one takes the dead letter again.  What it finds with the error that such
 * an end leaves may be what ends workers: that it takes together with its request.
 *
 * Must never: be called outside of a transaction of worker_begin().
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "consume/dead_letter.h"
#include "consume/failure.h"
#include "consume/owner.h"
#include "server/query.h"

/* Makes a dead letter of a message whose attempts are used up. */
void
dead_letter_store(const SubscriptionRow *row, const Delivery *delivery)
{
	static CachedQuery query = {
		"insert into fanout.dead_letter (message_id, topic, consumer_group, type, key, id, headers,"
		" content_type, created_at, payload, raw, reason, sqlstate, attempts)"
		" values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
	};
	static const int attributes[] = {
		MESSAGE_ID, MESSAGE_TOPIC, MESSAGE_CONSUMER_GROUP, MESSAGE_TYPE, MESSAGE_KEY, MESSAGE_SEQUENCE,
		MESSAGE_HEADERS, MESSAGE_CONTENT_TYPE, MESSAGE_PUBLISHED_AT
	};
	Oid			types[14] = {
		UUIDOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT8OID, JSONBOID,
		TEXTOID, TIMESTAMPTZOID, TEXTOID, BYTEAOID, TEXTOID, TEXTOID, INT4OID
	};
	Caller		caller = become_owner();
	MessageValues message;
	Datum		values[14];
	char		nulls[14];

	memset(nulls, ' ', sizeof(nulls));
	delivery_values(delivery, row->topic, row->consumer_group, &message);
	for (int i = 0; i < lengthof(attributes); i++)
	{
		values[i] = message.values[attributes[i]];
		nulls[i] = message.nulls[attributes[i]] ? 'n' : ' ';
	}
	delivery_body(&message, &values[9], &nulls[9]);
	values[11] = CStringGetTextDatum(delivery->error);
	values[12] = CStringGetTextDatum(delivery->sqlstate);
	values[13] = Int32GetDatum(delivery->attempts);
	query_change(&query, 14, types, values, nulls, 1);
	become_caller(&caller);
}

/* The columns that become attributes come in their order, from the third on. */
static void
read_redriven(Redriven *redriven, const SubscriptionRow *row)
{
	MessageValues *message = &redriven->message;
	TupleDesc	desc = SPI_tuptable->tupdesc;
	bool		isnull;

	redriven->dead_id = DatumGetInt64(query_value(0, 1, &isnull));
	redriven->request = DatumGetTimestampTz(query_value(0, 2, &isnull));
	if (isnull)
		redriven->request = 0;
	for (int i = 0; i < MESSAGE_ATTRIBUTES; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i + 2);
		Datum		value = query_value(0, i + 3, &message->nulls[i]);

		if (message->nulls[i])
			continue;
		if (attr->attlen == -1)
			value = PointerGetDatum(PG_DETOAST_DATUM_COPY(value));
		else if (!attr->attbyval)
			value = PointerGetDatum(memcpy(palloc(attr->attlen), DatumGetPointer(value), attr->attlen));
		message->values[i] = value;
	}
	message->nulls[MESSAGE_BODY] = true;
}

/*
 * Takes the next dead letter that is to be tried again; in the context.  Returns
 * false if there is none, but for those that others have locked.
 */
bool
dead_letter_take(const SubscriptionRow *row, MemoryContext context, Redriven *redriven)
{
	static CachedQuery query = {
		"update fanout.dead_letter d"
		" set redriven_at = case when " IS_UNFINISHED("reason") " then null else redriven_at end,"
		" attempts = attempts + 1, reason = " AS_UNFINISHED("reason") ", sqlstate = '57P01'"
		" where dead_id = (select dead_id from fanout.dead_letter"
		" where topic = $1 and consumer_group = $2 and redriven_at is not null"
		" order by dead_id limit 1 for update skip locked)"
		" returning dead_id, redriven_at, message_id, topic, consumer_group, type, key, id, coalesce(headers, '{}'), null::jsonb,"
		" coalesce(raw, convert_to(payload, 'UTF8')), created_at, true, attempts, content_type"
	};
	Caller		caller = become_owner();
	Oid			types[2] = {TEXTOID, TEXTOID};
	Datum		values[2] = {CStringGetTextDatum(row->topic), CStringGetTextDatum(row->consumer_group)};
	MemoryContext oldcontext;
	bool		found;

	query_execute(&query, 2, types, values, NULL);
	found = (SPI_processed > 0);
	if (found)
	{
		oldcontext = MemoryContextSwitchTo(context);
		read_redriven(redriven, row);
		MemoryContextSwitchTo(oldcontext);
	}
	become_caller(&caller);
	return found;
}

/* Is any to be tried again, as one that others have locked? */
bool
dead_letter_waits(const SubscriptionRow *row)
{
	static CachedQuery query = {
		"select from fanout.dead_letter where topic = $1 and consumer_group = $2 and redriven_at is not null limit 1"
	};
	Oid			types[2] = {TEXTOID, TEXTOID};
	Datum		values[2] = {CStringGetTextDatum(row->topic), CStringGetTextDatum(row->consumer_group)};

	owner_execute(&query, 2, types, values, NULL);
	return SPI_processed > 0;
}

/* Removes a dead letter that is done with.  Returns false if somebody has purged it. */
bool
dead_letter_remove(int64 dead_id)
{
	static CachedQuery lock = {"select from fanout.dead_letter where dead_id = $1 for update"};
	static CachedQuery query = {"delete from fanout.dead_letter where dead_id = $1"};
	Oid			types[1] = {INT8OID};
	Datum		values[1] = {Int64GetDatum(dead_id)};

	owner_execute(&lock, 1, types, values, NULL);
	if (SPI_processed == 0)
		return false;
	owner_change(&query, 1, types, values, NULL, 1);
	return true;
}

/* Writes the error with which a dead letter has failed once more; a newer request stays. */
void
dead_letter_failed(const Redriven *redriven, const char *sqlstate, const char *error)
{
	static CachedQuery query = {
		"update fanout.dead_letter set reason = $2, sqlstate = $3, dead_at = clock_timestamp(),"
		" redriven_at = nullif(redriven_at, $4) where dead_id = $1"
	};
	Oid			types[4] = {INT8OID, TEXTOID, TEXTOID, TIMESTAMPTZOID};
	Datum		values[4] = {
		Int64GetDatum(redriven->dead_id), CStringGetTextDatum(error), CStringGetTextDatum(sqlstate),
		TimestampTzGetDatum(redriven->request)
	};
	char		nulls[4] = {' ', ' ', ' ', redriven->request != 0 ? ' ' : 'n'};

	owner_execute(&query, 4, types, values, nulls);
}
