/*-------------------------------------------------------------------------
 *
 * insertion.c
 *		Announces insertions into the outbox to whoever reads it by place.
 *
 * The outbox has no index.  Rows are appended: each goes to the block that is the
 * last one of its segment when its insertion begins, or behind that.  So the
 * publisher reads a segment from a block on, its floor, and whatever comes later
 * lies behind the floor; but for the rows of a session that has chosen its block and
 * not yet put its rows there.  Such a session shows the block here.
 *
 * Order of events, where # is a full memory barrier:
 *
 *		session:	announces the last block # looks whether the segment is marked
 *					as written, and marks it # chooses a block, inserts # withdraws
 *		publisher:	takes the mark # looks how many blocks there are # reads the
 *					announcements # takes a snapshot # looks whether the mark is set
 *					again # reads the rows
 *
 * So one of these is true of each row:
 *
 * - it was there when the publisher read the block;
 * - the publisher saw it announced, and keeps its floor at that block or before;
 * - its block was chosen after the publisher had looked how many there are, so it
 *	 is the last one of these, or behind.
 *
 * In the last two cases the mark is set, or the announcement was seen, and the
 * publisher reads the segment the next time.  And if the snapshot shows the row,
 * the mark was set before the snapshot was taken: the publisher finds that it has
 * taken the mark or that it is set again, or sees the announcement; so it does not
 * leave out the segment.
 *
 * Scenarios:
 *
 * - An error in the midst of an insertion: it stays announced until the session's
 *	 next one, or until its transaction ends.  The floor waits for that.
 *
 * - A session that ends: its transaction is aborted first.
 *
 * - The server starts again: nothing is announced, and nobody inserts.
 *
 * - The library is not preloaded: there is no shared memory, and no publisher.
 *
 * - The database has no slot yet, or gets another one: the slot is looked up after
 *	 the announcement.  If there is none, or a slot is marked that is not the
 *	 database's any more, the publisher of the new slot has yet to start.  It begins
 *	 by reading each segment from where the ledger says, and either sees the
 *	 announcement or finds the row in place.
 *
 * Must never: wait.  Locks: none; a session writes its own entry only.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/bufmgr.h"
#include "utils/rel.h"

#include "server/compat.h"
#include "server/insertion.h"

static bool announced = false;	/* by this session */

/* ---- writing ---- */

/*
 * Announces that this session is about to append rows to a segment of the outbox,
 * which it must have locked so that nobody takes blocks away; and marks the segment
 * as written.  The rows must then go to the block that is the last one now, or
 * behind it.
 */
void
insertion_begin(Relation rel, int segment)
{
	DatabaseSlot *slot;
	BlockNumber blocks;

	if (shmem_announcements == NULL)
		return;
	blocks = RelationGetNumberOfBlocks(rel);
	announced = true;
	pg_atomic_write_u64(&shmem_announcements[pgf_my_proc_number()].place,
						(uint64) RelationGetRelid(rel) << 32 | (blocks > 0 ? blocks - 1 : 0));
	pg_memory_barrier();
	slot = shmem_my_slot();		/* not before: see above */
	if (slot == NULL || pg_atomic_read_u32(&slot->written[segment]) != 0)
		return;
	pg_atomic_write_u32(&slot->written[segment], 1);
	pg_memory_barrier();
}

/*
 * Withdraws the announcement, if there is one: the rows are in their blocks, or the
 * transaction that was to insert them has ended.
 */
void
insertion_end(void)
{
	if (!announced)
		return;
	pg_memory_barrier();
	pg_atomic_write_u64(&shmem_announcements[pgf_my_proc_number()].place, 0);
	announced = false;
}

/* ---- reading ---- */

/*
 * Takes the mark of a segment: returns whether anybody has begun an insertion since
 * it was taken the last time.  Insertions that began before are announced, or done.
 */
bool
insertion_take(DatabaseSlot *slot, int segment)
{
	return pg_atomic_exchange_u32(&slot->written[segment], 0) != 0;
}

/* Has anybody begun an insertion since the mark was taken? */
bool
insertion_marked(DatabaseSlot *slot, int segment)
{
	pg_memory_barrier();
	return pg_atomic_read_u32(&slot->written[segment]) != 0;
}

/*
 * Writes into oldest, for each table, the first block that an announced insertion
 * may put a row into; InvalidBlockNumber: none is announced.
 */
void
insertion_oldest(const Oid *relids, BlockNumber * oldest, int n)
{
	for (int i = 0; i < n; i++)
		oldest[i] = InvalidBlockNumber;
	pg_memory_barrier();
	for (int backend = 0; backend < pgf_max_backends(); backend++)
	{
		uint64		place = pg_atomic_read_u64(&shmem_announcements[backend].place);

		for (int i = 0; i < n && place != 0; i++)
		{
			if (relids[i] == (Oid) (place >> 32))
				oldest[i] = Min(oldest[i], (BlockNumber) place);
		}
	}
	pg_memory_barrier();
}
