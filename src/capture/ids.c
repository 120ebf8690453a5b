/*-------------------------------------------------------------------------
 *
 * ids.c
 *		Ids of messages: numbers of one sequence, which never go back.
 *
 * Two transactions that change the same row draw ids in the order of their changes,
 * because the later one waits for the row's lock first.  So a session must never draw an id
 * before the row is locked whose message gets it, and never keep one for later.
 * But it may draw several at once, for rows that it has all locked.
 *
 * That is why nextval() is not called: it draws one number at a time, or as many as
 * the sequence's CACHE says and keeps the rest.  It would also change what
 * lastval() returns to the application, which is to be its own sequence's number.
 * The sequence's page is written here as nextval_internal() in commands/sequence.c
 * writes it, and its replay is the server's.  Who calls nextval() or setval() on
 * the sequence beside that does no harm.  Of the sequence's options none matters.
 *
 * Must never: check rights, read a table of ours, or wait for anything but the
 * page's lock.
 *
 * Locks: ROW EXCLUSIVE on the sequence until the transaction ends, as nextval()
 * has it; its page while numbers are drawn.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "access/xloginsert.h"
#include "catalog/pg_class.h"
#include "commands/sequence.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "capture/ids.h"
#include "server/compat.h"
#include "server/shmem.h"
#include "server/tables.h"

/* Numbers that are logged ahead, and skipped after a crash: nextval()'s SEQ_LOG_VALS. */
#define LOGGED_AHEAD 32

static bool followed = false;	/* this session has drawn a number */

/* ---- following the clock ---- */

/*
 * Returns whether this is the first draw since the server started, or was promoted,
 * that is known of.  Without a slot in shared memory that is each session's first.
 */
static bool
is_first(DatabaseSlot *slot)
{
	return slot != NULL ? pg_atomic_read_u32(&slot->ids_follow_clock) == 0 : !followed;
}

/*
 * Sees to it that ids never go back: not after a restore of any kind, nor on a
 * standby that was promoted before the last numbers of its primary reached it.
 * No id that was ever drawn lies above the clock, since nobody draws a million
 * of them in a second.  So the first one that is drawn lies above the clock, and
 * all others above it: whoever finds that one was drawn comes to the page later.
 *
 * Returns the number that the next one has to lie above.
 */
static int64
find_floor(DatabaseSlot *slot)
{
	if (!is_first(slot))
		return PG_INT64_MIN;
	return GetCurrentTimestamp() +
		((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE)) * USECS_PER_DAY;
}

/* Remembers that a number above the clock was drawn. */
static void
set_followed(DatabaseSlot *slot)
{
	followed = true;
	if (slot != NULL && pg_atomic_read_u32(&slot->ids_follow_clock) == 0)
		pg_atomic_write_u32(&slot->ids_follow_clock, 1);
}

static DatabaseSlot *
find_slot(void)
{
	DatabaseSlot *slot = shmem_my_slot();

	if (slot == NULL && pgf_shared != NULL && !followed)
	{
		slot = shmem_want_slot(MyDatabaseId);
		shmem_wake_launcher(0);
	}
	return slot;
}

/* ---- drawing ---- */

/* Opens the sequence.  A page of anything else must not be written as one of a sequence. */
static Relation
open_sequence(Oid sequence)
{
	Relation	rel = relation_open(sequence, RowExclusiveLock);

	if (rel->rd_rel->relkind != RELKIND_SEQUENCE)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"fanout.%s\" is not a sequence", RelationGetRelationName(rel)),
				 errhint("Create the extension again.")));
	return rel;
}

/* Returns the only row of a page of a sequence. */
static HeapTupleData
sequence_row(Page page)
{
	ItemId		item = PageGetItemId(page, FirstOffsetNumber);
	HeapTupleData row = {
		.t_len = ItemIdGetLength(item),
		.t_data = (HeapTupleHeader) PageGetItem(page, item)
	};

	return row;
}

/*
 * Logs the state of the sequence as of now, in a critical section.  The buffer is
 * marked as dirty before.
 */
static void
log_sequence(Relation rel, Buffer buffer, HeapTuple row)
{
	xl_seq_rec	record;
	XLogRecPtr	lsn;

	XLogBeginInsert();
	XLogRegisterBuffer(0, buffer, REGBUF_WILL_INIT);
	pgf_set_sequence_locator(&record, rel);
	XLogRegisterData((char *) &record, sizeof(record));
	XLogRegisterData((char *) row->t_data, row->t_len);
	lsn = XLogInsert(RM_SEQ_ID, XLOG_SEQ_LOG);
	PageSetLSN(BufferGetPage(buffer), lsn);
}

/* Raises an error if the sequence cannot give so many numbers more. */
static void
check_range(Relation rel, int64 last_value, int count)
{
	if (last_value > PG_INT64_MAX - count - LOGGED_AHEAD)
		ereport(ERROR,
				(errcode(ERRCODE_SEQUENCE_GENERATOR_LIMIT_EXCEEDED),
				 errmsg("sequence \"fanout.%s\" has reached its end", RelationGetRelationName(rel))));
}

/*
 * Draws numbers above floor from the sequence, whose page is locked, and returns the
 * first one.  It logs the state after some more numbers, so that these need not be logged; and
 * anew after each checkpoint, from which the server would recover.
 */
static int64
advance(Relation rel, Buffer buffer, int count, int64 floor)
{
	Page		page = BufferGetPage(buffer);
	HeapTupleData row = sequence_row(page);
	Form_pg_sequence_data sequence = (Form_pg_sequence_data) GETSTRUCT(&row);
	int64		last = sequence->is_called ? sequence->last_value : sequence->last_value - 1;
	int64		logged = sequence->is_called ? last + sequence->log_cnt : last;
	int64		drawn = Max(last, floor);
	bool		logs = logged < drawn + count || PageGetLSN(page) <= GetRedoRecPtr();

	check_range(rel, drawn, count);
	if (logs && RelationNeedsWAL(rel))
		(void) GetTopTransactionId();	/* whose commit flushes the record */
	START_CRIT_SECTION();
	MarkBufferDirty(buffer);
	sequence->is_called = true;
	if (logs)
	{
		logged = drawn + count + LOGGED_AHEAD;
		sequence->last_value = logged;
		sequence->log_cnt = 0;
		if (RelationNeedsWAL(rel))
			log_sequence(rel, buffer, &row);
	}
	sequence->last_value = drawn + count;
	sequence->log_cnt = logged - sequence->last_value;
	END_CRIT_SECTION();
	return drawn + 1;
}

static int64
draw(Oid sequence, int count, int64 floor)
{
	Relation	rel = open_sequence(sequence);
	Buffer		buffer = ReadBuffer(rel, 0);
	int64		first;

	LockBuffer(buffer, BUFFER_LOCK_EXCLUSIVE);
	first = advance(rel, buffer, count, floor);
	UnlockReleaseBuffer(buffer);
	relation_close(rel, NoLock);
	return first;
}

/*
 * Draws that many ids, which follow one another, and returns the first of them.  The
 * rows whose messages get them must be locked.  Raises an error (25006) in a
 * transaction that may not write.
 */
int64
ids_draw(int count)
{
	DatabaseSlot *slot;
	int64		first;

	PreventCommandIfReadOnly("nextval()");
	PreventCommandIfParallelMode("nextval()");
	slot = find_slot();
	first = draw(tables_outbox_sequence(), count, find_floor(slot));
	set_followed(slot);
	return first;
}
