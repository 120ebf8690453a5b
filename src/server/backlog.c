/*-------------------------------------------------------------------------
 *
 * backlog.c
 *		How many messages wait for each topic, in shared memory.
 *
 * The publisher of a database has an entry for each of its topics, and writes there
 * what it knows anyway; sessions read them without counting rows.  All databases share
 * MAX_FIGURES entries, which is a fixed 192 kB.  A publisher that finds none left says
 * that its figures are not known (DatabaseSlot.backlog_known), and so it does until it
 * has found all that was there when it started; whoever wants them has to count then.
 *
 * Locks: none.  An entry is taken with a compare-and-exchange of its owner, and only
 * who has it writes to it.  A reader looks at the owner before and after it has read
 * the figures.  Both figures of an entry may be from different moments.
 *
 * Must never: wait; raise an error.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/shmem.h"

#include "server/backlog.h"

#define MAX_FIGURES 8192

struct BacklogEntry
{
	pg_atomic_uint64 owner;		/* oid of the database and topic; 0: free */
	pg_atomic_uint64 pending;
	pg_atomic_uint64 oldest;
};

static BacklogEntry *entries = NULL;	/* NULL: no shared memory */

Size
backlog_shmem_size(void)
{
	return MAX_FIGURES * sizeof(BacklogEntry);
}

/* With AddinShmemInitLock held. */
void
backlog_shmem_init(void)
{
	bool		found;

	entries = ShmemInitStruct("pg_fanout backlogs", backlog_shmem_size(), &found);
	for (int i = 0; i < MAX_FIGURES && !found; i++)
	{
		pg_atomic_init_u64(&entries[i].owner, 0);
		pg_atomic_init_u64(&entries[i].pending, 0);
		pg_atomic_init_u64(&entries[i].oldest, 0);
	}
}

static uint64
owner_of(int32 topic_id)
{
	return ((uint64) MyDatabaseId << 32) | (uint32) topic_id;
}

static bool
is_mine(uint64 owner)
{
	return (Oid) (owner >> 32) == MyDatabaseId;
}

/* Shows what waits of a topic; entry may be NULL. */
void
backlog_set(BacklogEntry *entry, int64 pending, TimestampTz oldest)
{
	if (entry == NULL)
		return;
	pg_atomic_write_u64(&entry->pending, (uint64) pending);
	pg_atomic_write_u64(&entry->oldest, (uint64) oldest);
}

/* Takes an entry for a topic of this database, for the publisher; NULL: none is left. */
BacklogEntry *
backlog_add(int32 topic_id)
{
	static int	last = 0;

	for (int i = 0; i < MAX_FIGURES; i++)
	{
		BacklogEntry *entry = &entries[(last + i) % MAX_FIGURES];
		uint64		expected = 0;

		if (!pg_atomic_compare_exchange_u64(&entry->owner, &expected, owner_of(topic_id)))
			continue;
		last = (last + i) % MAX_FIGURES;
		backlog_set(entry, 0, 0);
		return entry;
	}
	return NULL;
}

/* Gives an entry back; it may be NULL. */
void
backlog_remove(BacklogEntry *entry)
{
	if (entry == NULL)
		return;
	backlog_set(entry, 0, 0);
	pg_atomic_write_u64(&entry->owner, 0);
}

/* Frees all entries of this database.  For its publisher, when it starts and ends. */
void
backlog_clear(void)
{
	for (int i = 0; i < MAX_FIGURES; i++)
	{
		if (is_mine(pg_atomic_read_u64(&entries[i].owner)))
			backlog_remove(&entries[i]);
	}
}

/*
 * Reads the next entry of this database, of those from *i on; false: there are no
 * more.  In any process.
 */
bool
backlog_next(int *i, BacklogFigures *figures)
{
	while (entries != NULL && *i < MAX_FIGURES)
	{
		BacklogEntry *entry = &entries[(*i)++];
		uint64		owner = pg_atomic_read_u64(&entry->owner);

		if (!is_mine(owner))
			continue;
		figures->topic_id = (int32) (owner & PG_UINT32_MAX);
		figures->pending = (int64) pg_atomic_read_u64(&entry->pending);
		figures->oldest = (TimestampTz) pg_atomic_read_u64(&entry->oldest);
		pg_read_barrier();
		if (pg_atomic_read_u64(&entry->owner) == owner)
			return true;
	}
	return false;
}
