/*-------------------------------------------------------------------------
 *
 * sync_rows.h
 *		What is remembered of the rows that messages of a subscription were about.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SYNC_ROWS_H
#define PGF_SYNC_ROWS_H

#include "postgres.h"

#include "utils/uuid.h"

/* Stands for the values of a row's key: a hash of their text. */
typedef pg_uuid_t SyncHash;

/* What is known of one key. */
typedef struct SyncRow
{
	SyncHash	hash;			/* first, as of every hash table */
	int64		sequence;		/* of what was applied last; 0: nothing was */
	uint64		xid;			/* the transaction at the source that made it;
								 * 0: not known */
	bool		live;			/* it left a row there */
	bool		foreign;		/* another subscription has a row there */
	bool		changed;		/* has to be stored */
} SyncRow;

extern void sync_rows_hash(const char *key, SyncHash *hash);
extern void sync_rows_load(int32 subscription_id, Datum sharers, const SyncHash *hashes, int count);
extern SyncRow *sync_rows_find(const SyncHash *hash);
extern void sync_rows_set(SyncRow *row, int64 sequence, uint64 xid, bool live);
extern void sync_rows_store(int32 subscription_id);
extern void sync_rows_forget(int32 subscription_id, int64 floor, void (*between) (void));

#endif							/* PGF_SYNC_ROWS_H */
