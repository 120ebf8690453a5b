/*-------------------------------------------------------------------------
 *
 * sync_rows.c
 *		What is remembered of the rows that messages of a subscription were about.
 *
 * All SQL on fanout.sync_row.  Of each key that a message was about it has the
 * highest sequence that was applied, which is what makes repeats and late
 * messages harmless, those too that the inbox does not remember.  A deleted row
 * leaves its sequence there, with the time; the publisher removes it when the
 * inbox's retention has passed.
 *
 * A batch loads what is known of its keys by one statement, looks at it and
 * changes it in memory, and stores it by another one.  Nobody else can see the
 * difference, since no code of users reads the table.
 *
 * Keys are remembered by a hash of 122 bits: a key may be longer than an index
 * entry, and two keys with the same hash would take four billion times four
 * billion of them.
 *
 * It must never be asked for a key that was not among those loaded.
 *
 * Locks: those of its statements.  Two sessions that apply messages of one
 * subscription at once may both write a key; the higher sequence stays.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <uuid/uuid.h>

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"

#include "consume/inbox.h"
#include "consume/sync_rows.h"
#include "server/query.h"

/* Rows of fanout.sync_row are forgotten in so many slices, each a statement. */
#define SLICES 256

/* of the batch; in the context that was current when it was loaded */
static HTAB *rows = NULL;

/*
 * sync_rows_hash
 *		Sets the hash of a key's text.
 */
void
sync_rows_hash(const char *key, SyncHash *hash)
{
	static const uuid_t namespace = {
		0x5c, 0x1c, 0x07, 0x5e, 0x0b, 0x0f, 0x4d, 0x0e, 0x9b, 0x1f, 0x6a, 0x35, 0x0c, 0x7e, 0x2d, 0x91
	};
	uuid_t		result;

	uuid_generate_sha1(result, namespace, key, strlen(key));
	memcpy(hash->data, result, UUID_LEN);
}

static Datum
uuid_array(const SyncHash *hashes, int count)
{
	Datum	   *values = palloc((count + 1) * sizeof(Datum));

	for (int i = 0; i < count; i++)
		values[i] = UUIDPGetDatum(&hashes[i]);
	return PointerGetDatum(construct_array(values, count, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
}

static SyncRow *
enter_row(const SyncHash *hash)
{
	bool		found;
	SyncRow    *row = hash_search(rows, hash, HASH_ENTER, &found);

	if (!found)
		memset((char *) row + sizeof(SyncHash), 0, sizeof(SyncRow) - sizeof(SyncHash));
	return row;
}

/* Takes over what a row of the query's result says. */
static void
read_row(int i, int32 subscription_id)
{
	bool		isnull;
	SyncRow    *row = enter_row(DatumGetUUIDP(query_value(i, 2, &isnull)));
	bool		live = DatumGetBool(query_value(i, 4, &isnull));

	if (DatumGetInt32(query_value(i, 1, &isnull)) != subscription_id)
	{
		row->foreign = row->foreign || live;
		return;
	}
	row->live = live;
	row->sequence = DatumGetInt64(query_value(i, 3, &isnull));
	row->xid = DatumGetInt64(query_value(i, 5, &isnull));
}

/*
 * sync_rows_load
 *		Loads what is known of the keys; what was loaded before is gone.
 *
 * sharers: integer[], the subscriptions that write into the same table, this one
 * included.  What is loaded lives in the current memory context.
 */
void
sync_rows_load(int32 subscription_id, Datum sharers, const SyncHash *hashes, int count)
{
	static CachedQuery query = {
		"select subscription_id, hash, sequence, deleted_at is null, coalesce(xid, 0)"
		" from fanout.sync_row where subscription_id = any ($1) and hash = any ($2)"
	};
	HASHCTL		control = {
		.keysize = sizeof(SyncHash),.entrysize = sizeof(SyncRow),.hcxt = CurrentMemoryContext
	};
	Oid			types[] = {INT4ARRAYOID, UUIDARRAYOID};
	Datum		values[] = {sharers, uuid_array(hashes, count)};
	Caller		caller;

	rows = hash_create("pg_fanout sync rows", Max(count, 16), &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	for (int i = 0; i < count; i++)
		(void) enter_row(&hashes[i]);
	caller = become_owner();
	query_execute(&query, 2, types, values, NULL);
	for (int i = 0; i < SPI_processed; i++)
		read_row(i, subscription_id);
	SPI_freetuptable(SPI_tuptable);
	become_caller(&caller);
}

/*
 * sync_rows_find
 *		Returns what is known of a key that was loaded.
 */
SyncRow *
sync_rows_find(const SyncHash *hash)
{
	return enter_row(hash);
}

/*
 * sync_rows_set
 *		Remembers what was applied last, until it is stored.
 */
void
sync_rows_set(SyncRow *row, int64 sequence, uint64 xid, bool live)
{
	row->sequence = sequence;
	row->xid = xid;
	row->live = live;
	row->changed = true;
}

/*
 * sync_rows_store
 *		Stores what has changed since it was loaded.
 */
void
sync_rows_store(int32 subscription_id)
{
	static CachedQuery query = {
		"insert into fanout.sync_row as s (subscription_id, hash, sequence, deleted_at, xid)"
		" select $1, hash, sequence, case when not live then now() end, nullif(xid, 0)"
		" from unnest($2, $3, $4, $5) as given (hash, sequence, live, xid)"
		" on conflict (subscription_id, hash) do update"
		" set sequence = excluded.sequence, xid = excluded.xid, deleted_at = excluded.deleted_at"
		" where s.sequence <= excluded.sequence"
	};
	Oid			types[] = {INT4OID, UUIDARRAYOID, INT8ARRAYOID, BOOLARRAYOID, INT8ARRAYOID};
	long		room = hash_get_num_entries(rows) + 1;
	SyncHash   *hashes = palloc(room * sizeof(SyncHash));
	Datum	   *sequences = palloc(room * sizeof(Datum));
	Datum	   *live = palloc(room * sizeof(Datum));
	Datum	   *xids = palloc(room * sizeof(Datum));
	int			n = 0;
	HASH_SEQ_STATUS status;
	SyncRow    *row;

	hash_seq_init(&status, rows);
	while ((row = hash_seq_search(&status)) != NULL)
	{
		if (!row->changed)
			continue;
		hashes[n] = row->hash;
		sequences[n] = Int64GetDatum(row->sequence);
		xids[n] = Int64GetDatum((int64) row->xid);
		live[n++] = BoolGetDatum(row->live);
		row->changed = false;
	}
	if (n > 0)
	{
		Datum		values[] = {
			Int32GetDatum(subscription_id), uuid_array(hashes, n),
			PointerGetDatum(construct_array(sequences, n, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE)),
			PointerGetDatum(construct_array(live, n, BOOLOID, 1, true, TYPALIGN_CHAR)),
			PointerGetDatum(construct_array(xids, n, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE))
		};

		owner_execute(&query, 5, types, values, NULL);
	}
}

/*
 * sync_rows_forget
 *		Removes what is older than a TRUNCATE, whose sequence stands for it.
 *
 * A slice of the hashes at a time, so that no statement takes longer than a
 * handler may: between them the handler's time begins again.
 */
void
sync_rows_forget(int32 subscription_id, int64 floor, void (*between) (void))
{
	static CachedQuery query = {
		"delete from fanout.sync_row where subscription_id = $1 and sequence < $2 and hash between $3 and $4"
	};
	Oid			types[] = {INT4OID, INT8OID, UUIDOID, UUIDOID};
	SyncHash	first = {0};
	SyncHash	last = {0};
	Datum		values[] = {
		Int32GetDatum(subscription_id), Int64GetDatum(floor), UUIDPGetDatum(&first), UUIDPGetDatum(&last)
	};

	memset(&last, 0xFF, sizeof(last));
	for (int i = 0; i < SLICES; i++)
	{
		first.data[0] = last.data[0] = i;
		owner_execute(&query, 4, types, values, NULL);
		between();
	}
}
