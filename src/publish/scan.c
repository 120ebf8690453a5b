/*-------------------------------------------------------------------------
 *
 * scan.c
 *		Finds the rows of a batch in the segments of the outbox.
 *
 * A batch is what became visible between two snapshots, base and target.  There is
 * no index to find it by.  Rows are appended, so those written after the last batch
 * lie at the end of their segment, and what else belongs to a batch was written
 * before by transactions that were still running.  Their rows are seen when the
 * blocks are read, and it is noted which blocks these are:
 *
 *		|........................|......X..Y...X....|............|
 *		0                    unread   (X, Y run)   floor        end
 *
 * - "floor" of each segment: everything behind it is read by the next batch.
 *
 * - "pending": for each transaction that was running when its rows were seen, the
 *	 blocks that these are in.  They are read again once it has ended.
 *
 * - "unread": the first block of either.  The ledger keeps it, so that another
 *	 publisher can begin there, knowing nothing of what is pending.
 *
 * Only coverage depends on this: which rows a batch has is decided by their
 * transaction (column xid) and the two snapshots.  So reading a block too often does
 * no harm, and no row is in two batches.
 *
 * The floor must not be behind
 *
 * - the block that was the last one before the target snapshot was taken, since more
 *	 rows go there;
 *
 * - a block that a session has announced to write to (insertion.c);
 *
 * - the last block with a committed row.  VACUUM cuts off blocks at the end that have
 *	 none, and the file may then grow again with rows that were not read.
 *
 * Segments that nobody has written to since they were read are left alone.
 *
 * Rows that did not come by way of segment_append() may be anywhere in a segment, and
 * rows that somebody has deleted may be cut off; fanout.scattered tells of both, and
 * the whole segment is read once.  So it is when it is stored in another file than
 * before: VACUUM FULL, CLUSTER, TRUNCATE.
 *
 * A batch is read in passes if it has more than MAX_ENTRIES rows: the first pass
 * keeps the lowest ids, the next one those above, and begins at the first block with
 * a row that was left for it: ids follow blocks nearly always.  Only the first pass
 * moves the floor and notes what is pending.
 *
 * Memory: 24 MB of entries at most; and 120 bytes for each transaction that target
 * does not show and that has written to the outbox.  These are the ones that run,
 * which max_connections and max_prepared_transactions bound, and those that end
 * while the blocks are read.
 *
 * Must never: read a row without its segment locked (ACCESS SHARE), since nobody may
 * rewrite the table meanwhile; wait for a transaction.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_am.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/uuid.h"
#include "utils/xid8.h"

#include "capture/msgid.h"
#include "publish/scan.h"
#include "server/insertion.h"
#include "server/segment.h"
#include "server/tables.h"
#include "server/worker.h"

/* Entries in memory: of a larger batch, at least three quarters of them. */
#define MAX_ENTRIES (1024 * 1024)

/* The same of a batch of a single topic, of which several may be walked at once. */
#define MAX_TOPIC_ENTRIES (256 * 1024)

/* Room for so many entries is kept between batches. */
#define KEPT_ENTRIES 16384

/* Ranges of blocks that are told apart, of one transaction in one segment. */
#define MAX_EXTENTS 4

/* Blocks between two rows of one extent. */
#define MAX_GAP 16

/* A range of at least so many blocks goes through a ring of buffers. */
#define BULK_BLOCKS 1024

typedef struct Extent
{
	BlockNumber first;
	BlockNumber last;
} Extent;

typedef struct Pending
{
	uint64		xid;			/* hash key */
	int			count[OUTBOX_SEGMENTS];
	Extent		extents[OUTBOX_SEGMENTS][MAX_EXTENTS];
} Pending;

/* One segment, as it was read the last time. */
typedef struct Place
{
	Oid			file;
	BlockNumber floor;
	bool		busy;			/* insertions were under way */
} Place;

/* What scan_begin() has seen. */
typedef struct Start
{
	bool		written;
	BlockNumber blocks;
	BlockNumber announced;
} Start;

/* The bits of a row's null bitmap that stand for the columns up to topic_id. */
#define HEAD_BITS ((1 << OUTBOX_TOPIC_ID) - 1)

static Place places[OUTBOX_SEGMENTS];
static HTAB *pending = NULL;
static Start starts[OUTBOX_SEGMENTS];

/* The segments, locked and open in the current transaction. */
static Relation segments[OUTBOX_SEGMENTS];

/* The block of the last row that was fetched: the next one is mostly there, too. */
static Buffer fetched = InvalidBuffer;

/* One step of a pass over the ranges of a batch. */
typedef struct Pass
{
	BatchScan  *scan;
	Snapshot	snapshot;		/* taken after target */
	uint64		xid;			/* the answers of the last row: */
	bool		in_base;
	bool		in_target;
	Pending    *pending;		/* its entry, NULL: not looked up */
} Pass;

/* ---- segments ---- */

static void
open_segments(void)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		segments[i] = table_open(tables_segment(i), AccessShareLock);
		segment_check_columns(segments[i], outboxrow_descriptor());
		if (segments[i]->rd_rel->relam != HEAP_TABLE_AM_OID)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("table \"fanout.%s\" is not a heap", RelationGetRelationName(segments[i])),
					 errhint("Change its access method back with ALTER TABLE ... SET ACCESS METHOD heap.")));
	}
}

/* Does the snapshot (pg_snapshot) show a transaction, if that was committed? */
bool
scan_sees(Datum snapshot, uint64 xid)
{
	return DatumGetBool(DirectFunctionCall2(pg_visible_in_snapshot,
											FullTransactionIdGetDatum(FullTransactionIdFromU64(xid)),
											snapshot));
}

/* ---- what is pending ---- */

void
scan_load(const Unread *unread)
{
	HASHCTL		ctl;

	memset(&ctl, 0, sizeof(ctl));
	ctl.keysize = sizeof(uint64);
	ctl.entrysize = sizeof(Pending);
	ctl.hcxt = TopMemoryContext;
	if (pending != NULL)
		hash_destroy(pending);
	pending = hash_create("pg_fanout pending transactions", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		places[i].file = unread->files[i];
		places[i].floor = unread->blocks[i];
		places[i].busy = true;
	}
}

static BlockNumber
distance(const Extent *extent, BlockNumber block)
{
	if (block < extent->first)
		return extent->first - block;
	return block > extent->last ? block - extent->last : 0;
}

/* Adds a block to the nearest extent, or makes it one of its own. */
static void
add_block(Pending *entry, int segment, BlockNumber block)
{
	Extent	   *extents = entry->extents[segment];
	int			n = entry->count[segment];
	int			nearest = 0;

	for (int i = 1; i < n; i++)
	{
		if (distance(&extents[i], block) < distance(&extents[nearest], block))
			nearest = i;
	}
	if (n == 0 || (n < MAX_EXTENTS && distance(&extents[nearest], block) > MAX_GAP))
	{
		extents[n].first = extents[n].last = block;
		entry->count[segment]++;
		return;
	}
	extents[nearest].first = Min(extents[nearest].first, block);
	extents[nearest].last = Max(extents[nearest].last, block);
}

static void
note_pending(Pass *pass, int segment, BlockNumber block)
{
	if (pass->pending == NULL)
	{
		bool		found;

		pass->pending = hash_search(pending, &pass->xid, HASH_ENTER, &found);
		if (!found)
			memset(pass->pending->count, 0, sizeof(pass->pending->count));
	}
	add_block(pass->pending, segment, block);
}

/*
 * Writes where what is not visible in the main cursor's base begins.  During the
 * first pass of its batch that is scan->unread.
 */
void
scan_unread(Unread *unread)
{
	HASH_SEQ_STATUS all;
	Pending    *entry;

	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		unread->files[i] = places[i].file;
		unread->blocks[i] = places[i].floor;
	}
	hash_seq_init(&all, pending);
	while ((entry = hash_seq_search(&all)) != NULL)
	{
		for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		{
			for (int j = 0; j < entry->count[i]; j++)
				unread->blocks[i] = Min(unread->blocks[i], entry->extents[i][j].first);
		}
	}
}

/* ---- ranges ---- */

static void
add_range(BatchScan *scan, int segment, BlockNumber first, BlockNumber behind)
{
	BlockNumber blocks = RelationGetNumberOfBlocks(segments[segment]);
	Range	   *range = &scan->ranges[scan->nranges];

	range->segment = segment;
	range->first = first;
	range->behind = Min(behind, blocks);
	if (range->first < range->behind)
		scan->nranges++;
}

static int
compare_ranges(const void *a, const void *b)
{
	const Range *left = a;
	const Range *right = b;

	if (left->segment != right->segment)
		return left->segment - right->segment;
	return left->first < right->first ? -1 : left->first > right->first;
}

/* Joins those that overlap: no row may be found twice. */
static void
join_ranges(BatchScan *scan)
{
	int			kept = 0;

	qsort(scan->ranges, scan->nranges, sizeof(Range), compare_ranges);
	for (int i = 1; i < scan->nranges; i++)
	{
		Range	   *last = &scan->ranges[kept];
		Range	   *range = &scan->ranges[i];

		if (range->segment == last->segment && range->first <= last->behind)
			last->behind = Max(last->behind, range->behind);
		else
			scan->ranges[++kept] = *range;
	}
	if (scan->nranges > 0)
		scan->nranges = kept + 1;
}

/* Allocates the ranges: one for each extent, and one for each segment. */
static void
make_room(BatchScan *scan)
{
	HASH_SEQ_STATUS all;
	Pending    *entry;
	Size		n = OUTBOX_SEGMENTS;

	hash_seq_init(&all, pending);
	while ((entry = hash_seq_search(&all)) != NULL)
	{
		for (int i = 0; i < OUTBOX_SEGMENTS; i++)
			n += entry->count[i];
	}
	scan->ranges = MemoryContextAlloc(TopMemoryContext, n * sizeof(Range));
	scan->nranges = 0;
}

/*
 * Takes the blocks of transactions that have ended by the target snapshot.  Those of
 * one that was rolled back are read for nothing, once: whether it was may be long
 * forgotten (the commit log is truncated) when the broker was away for weeks.
 */
static void
add_pending(BatchScan *scan)
{
	HASH_SEQ_STATUS all;
	Pending    *entry;

	hash_seq_init(&all, pending);
	while ((entry = hash_seq_search(&all)) != NULL)
	{
		if (!scan_sees(scan->target, entry->xid))
			continue;
		for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		{
			for (int j = 0; j < entry->count[i]; j++)
				add_range(scan, i, entry->extents[i][j].first, entry->extents[i][j].last + 1);
		}
		hash_search(pending, &entry->xid, HASH_REMOVE, NULL);
	}
}

/* ---- entries ---- */

static int
max_entries(const BatchScan *scan)
{
	return scan->topic_id != 0 ? MAX_TOPIC_ENTRIES : MAX_ENTRIES;
}

static int
compare_entries(const void *a, const void *b)
{
	int64		left = ((const Entry *) a)->id;
	int64		right = ((const Entry *) b)->id;

	return left < right ? -1 : left > right;
}

/* There is no room for all rows of the batch: the highest ids are for another pass. */
static void
cut_entries(BatchScan *scan)
{
	int			kept = scan->count - scan->count / 4;

	qsort(scan->entries, scan->count, sizeof(Entry), compare_entries);
	for (int i = kept; i < scan->count; i++)
	{
		Entry	   *entry = &scan->entries[i];

		scan->cut[entry->segment] = Min(scan->cut[entry->segment], entry->block);
	}
	scan->count = kept;
	scan->cut_id = scan->entries[kept - 1].id + 1;
	scan->more = true;
}

/* With a buffer locked: so the entries are cut later, if there are too many. */
static void
add_entry(BatchScan *scan, const Entry *entry)
{
	if (scan->cut_id != 0 && entry->id >= scan->cut_id)
	{
		scan->cut[entry->segment] = Min(scan->cut[entry->segment], entry->block);
		return;
	}
	if (scan->count == scan->room)
	{
		scan->room = Max(256, Min(2 * scan->room, max_entries(scan) + MaxHeapTuplesPerPage));
		scan->entries = scan->entries == NULL ?
			MemoryContextAlloc(TopMemoryContext, scan->room * sizeof(Entry)) :
			repalloc(scan->entries, scan->room * sizeof(Entry));
	}
	scan->entries[scan->count++] = *entry;
}

/* ---- reading ---- */

/*
 * Raises an error (55000) if the segment is stored in another file than when the
 * batch was begun: its rows are elsewhere.
 */
static void
check_file(const BatchScan *scan, int segment)
{
	if (segments[segment]->rd_rel->relfilenode != scan->unread.files[segment])
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"fanout.%s\" was rewritten while it was read",
						RelationGetRelationName(segments[segment]))));
}

/* Rows of one transaction mostly come together. */
static void
look_at_xid(Pass *pass, uint64 xid)
{
	if (pass->xid == xid)
		return;
	pass->xid = xid;
	pass->pending = NULL;
	pass->in_base = scan_sees(pass->scan->base, xid);
	if (pass->scan->purged != (Datum) 0 && scan_sees(pass->scan->purged, xid))
		pass->in_base = true;
	pass->in_target = pass->in_base || scan_sees(pass->scan->target, xid);
}

/* Returns when the row was written.  For ScanWanted. */
TimestampTz
scan_created_at(const ScanRow *row)
{
	bool		isnull;

	return DatumGetTimestampTz(heap_getattr(row->tuple, OUTBOX_CREATED_AT, row->desc, &isnull));
}

/* Writes the row's message id.  For ScanWanted. */
void
scan_message_id(const ScanRow *row, char message_id[37])
{
	bool		isnull;

	msgid_format(DatumGetUUIDP(heap_getattr(row->tuple, OUTBOX_MESSAGE_ID, row->desc, &isnull)), message_id);
}

static bool
is_wanted(const BatchScan *scan, const Entry *entry, uint64 xid, HeapTuple tuple, TupleDesc desc)
{
	ScanRow		row = {
		.id = entry->id,.xid = xid,.topic_id = entry->topic_id,.again = scan->again,
		.tuple = tuple,.desc = desc
	};

	return scan->wanted == NULL || scan->wanted(&row);
}

/*
 * Returns the row's first columns, up to topic_id, or NULL: somebody has allowed null in
 * these.  They are looked at in each row of all topics, which heap_getattr() would make
 * several times as expensive, since other columns are null.
 */
static const OutboxHead *
head_of(HeapTuple row)
{
	if (HeapTupleHasNulls(row) && (row->t_data->t_bits[0] & HEAD_BITS) != HEAD_BITS)
		return NULL;
	return (const OutboxHead *) GETSTRUCT(row);
}

/* With the buffer locked: decides what a row is to the batch. */
static void
read_row(Pass *pass, int segment, HeapTuple row, Buffer buffer)
{
	BatchScan  *scan = pass->scan;
	const OutboxHead *head = head_of(row);
	Entry		entry;

	if (head == NULL || (scan->topic_id != 0 && head->topic_id != scan->topic_id))
		return;
	entry.block = ItemPointerGetBlockNumber(&row->t_self);
	look_at_xid(pass, head->xid);
	if (!pass->in_target)
	{
		if (scan->first)
			note_pending(pass, segment, entry.block);
		return;
	}
	if (!HeapTupleSatisfiesVisibility(row, pass->snapshot, buffer))
		return;					/* rolled back */
	scan->committed[segment] = entry.block;
	if (pass->in_base)
		return;
	scan->has_rows[segment] = true;
	entry.id = head->id;
	if (entry.id <= scan->after_id)
		return;
	entry.topic_id = head->topic_id;
	entry.segment = segment;
	entry.offset = ItemPointerGetOffsetNumber(&row->t_self);
	if (is_wanted(scan, &entry, pass->xid, row, RelationGetDescr(segments[segment])))
		add_entry(scan, &entry);
}

static void
read_block(Pass *pass, int segment, BlockNumber block, BufferAccessStrategy strategy)
{
	Relation	rel = segments[segment];
	Buffer		buffer = ReadBufferExtended(rel, MAIN_FORKNUM, block, RBM_NORMAL, strategy);
	Page		page = BufferGetPage(buffer);
	OffsetNumber last;

	LockBuffer(buffer, BUFFER_LOCK_SHARE);
	last = PageGetMaxOffsetNumber(page);
	for (OffsetNumber offset = FirstOffsetNumber; offset <= last; offset++)
	{
		ItemId		item = PageGetItemId(page, offset);
		HeapTupleData row;

		if (!ItemIdIsNormal(item))
			continue;
		row.t_data = (HeapTupleHeader) PageGetItem(page, item);
		row.t_len = ItemIdGetLength(item);
		row.t_tableOid = RelationGetRelid(rel);
		ItemPointerSet(&row.t_self, block, offset);
		read_row(pass, segment, &row, buffer);
	}
	UnlockReleaseBuffer(buffer);
	if (pass->scan->count >= max_entries(pass->scan))
		cut_entries(pass->scan);
}

/*
 * Reads at most so many blocks of the range that is under way; returns how many.  VACUUM
 * may have cut off its last blocks since the range was chosen: they had no row of the
 * batch.
 */
static int
read_range(Pass *pass, int limit)
{
	BatchScan  *scan = pass->scan;
	const Range *range = &scan->ranges[scan->range];
	BlockNumber behind = Min(range->behind, RelationGetNumberOfBlocks(segments[range->segment]));
	int			n = 0;
	BufferAccessStrategy strategy = range->behind - range->first < BULK_BLOCKS ? NULL :
		GetAccessStrategy(BAS_BULKREAD);

	check_file(scan, range->segment);
	for (; n < limit && scan->block < behind; n++, scan->block++)
	{
		CHECK_FOR_INTERRUPTS();
		read_block(pass, range->segment, scan->block, strategy);
	}
	if (strategy != NULL)
		FreeAccessStrategy(strategy);
	if (scan->block >= behind && ++scan->range < scan->nranges)
		scan->block = scan->ranges[scan->range].first;
	return n;
}

/*
 * Leaves out what the next pass need not read: segments that have no row of the
 * batch, so that they may be emptied meanwhile, and blocks before the first row that
 * was left for it.
 */
static void
narrow_ranges(BatchScan *scan)
{
	int			kept = 0;

	for (int i = 0; i < scan->nranges; i++)
	{
		Range		range = scan->ranges[i];

		range.first = Max(range.first, scan->cut[range.segment]);
		if (scan->has_rows[range.segment] && range.first < range.behind)
			scan->ranges[kept++] = range;
	}
	scan->nranges = kept;
}

/* Begins a pass over all ranges; what is found replaces the entries. */
static void
begin_pass(BatchScan *scan, int64 after_id)
{
	scan->passing = true;
	scan->after_id = after_id;
	scan->cut_id = 0;
	scan->count = scan->next = 0;
	scan->more = false;
	scan->range = 0;
	scan->block = scan->nranges > 0 ? scan->ranges[0].first : 0;
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		scan->committed[i] = scan->cut[i] = InvalidBlockNumber;
}

/* ---- batches ---- */

/*
 * To be called before the target snapshot of a batch is taken: sees what has been
 * written, and what is just being written.
 */
void
scan_begin(void)
{
	Oid			relids[OUTBOX_SEGMENTS];
	BlockNumber oldest[OUTBOX_SEGMENTS];

	open_segments();
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		starts[i].written = insertion_take(worker_slot, i);
		starts[i].blocks = RelationGetNumberOfBlocks(segments[i]);
		relids[i] = RelationGetRelid(segments[i]);
	}
	insertion_oldest(relids, oldest, OUTBOX_SEGMENTS);
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		starts[i].announced = oldest[i];
}

static BlockNumber
last_block(BlockNumber blocks)
{
	return blocks > 0 ? blocks - 1 : 0;
}

/*
 * Begins at the first block of a segment that is stored in another file now, or that may
 * have rows of the batch anywhere, or may have lost some: the floor is found anew then.
 */
static void
place_floor(int segment, bool anywhere)
{
	Oid			file = segments[segment]->rd_rel->relfilenode;

	if (places[segment].file == file && !anywhere &&
		places[segment].floor <= last_block(starts[segment].blocks))
		return;
	places[segment].file = file;
	places[segment].floor = 0;
	places[segment].busy = true;
}

/* Once the target snapshot was taken: may it show a row of the segment not read yet? */
static bool
must_read(int segment)
{
	return starts[segment].written || insertion_marked(worker_slot, segment) ||
		places[segment].busy || starts[segment].announced != InvalidBlockNumber;
}

static void
move_floor(const BatchScan *scan, int segment)
{
	const Start *start = &starts[segment];
	BlockNumber floor = last_block(start->blocks);

	places[segment].busy = (start->announced != InvalidBlockNumber);
	if (scan->committed[segment] == InvalidBlockNumber)
		return;
	floor = Min(floor, scan->committed[segment]);
	floor = Min(floor, start->announced);
	places[segment].floor = Max(places[segment].floor, floor);
}

/* Decides which blocks may have rows of the batch. */
static void
choose_ranges(BatchScan *scan)
{
	make_room(scan);
	add_pending(scan);
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (scan->read[i])
			add_range(scan, i, places[i].floor, InvalidBlockNumber);
	}
	join_ranges(scan);
}

/*
 * Begins to look for the rows of the main cursor's batch whose ids are above
 * after_id, of topics that are wanted.  To be called after scan_begin() and after
 * target was taken.  anywhere: for each segment, whether it may have rows of this
 * batch anywhere.  base and target must stay until scan_end().
 *
 * resumed: target is an old one, from the ledger.  Then nothing is noted as pending,
 * which would be all that has been committed since; the next batch reads it all from
 * the same blocks on.
 */
void
scan_batch(BatchScan *scan, Datum base, Datum target, int64 after_id, const bool *anywhere,
		   ScanWanted wanted, bool resumed)
{
	scan->base = base;
	scan->target = target;
	scan->topic_id = 0;
	scan->wanted = wanted;
	scan->again = false;
	scan->first = !resumed;
	memset(scan->has_rows, false, sizeof(scan->has_rows));
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		place_floor(i, anywhere[i]);
		scan->read[i] = must_read(i);
	}
	scan_unread(&scan->unread);
	choose_ranges(scan);
	begin_pass(scan, after_id);
}

/* Begins to read all behind unread, which is with respect to base, or to an older one. */
static void
begin_at(BatchScan *scan, Datum base, Datum target, int64 after_id, const Unread *unread,
		 const bool *anywhere)
{
	scan->base = base;
	scan->target = target;
	scan->first = false;
	memset(scan->has_rows, false, sizeof(scan->has_rows));
	scan->ranges = MemoryContextAlloc(TopMemoryContext, OUTBOX_SEGMENTS * sizeof(Range));
	scan->nranges = 0;
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		Oid			file = segments[i]->rd_rel->relfilenode;
		bool		known = (file == unread->files[i] && !anywhere[i]);

		scan->unread.files[i] = file;
		scan->unread.blocks[i] = known ? unread->blocks[i] : 0;
		add_range(scan, i, scan->unread.blocks[i], InvalidBlockNumber);
	}
	begin_pass(scan, after_id);
}

/*
 * Begins to look for the rows of a single topic, as scan_batch() does for the main
 * cursor.  unread is with respect to base, or to an older one.  With the segments
 * open.
 */
void
scan_topic(BatchScan *scan, Datum base, Datum target, int64 after_id, int32 topic_id,
		   const Unread *unread, const bool *anywhere, Datum purged)
{
	scan->purged = purged;
	scan->topic_id = topic_id;
	scan->wanted = NULL;
	begin_at(scan, base, target, after_id, unread, anywhere);
}

/*
 * Begins to look for rows of all topics that scan_batch() has found before, in one batch
 * or in several.  unread is with respect to base, or to an older one.  With the segments
 * open.
 */
void
scan_found(BatchScan *scan, Datum base, Datum target, int64 after_id, ScanWanted wanted,
		   const Unread *unread, const bool *anywhere)
{
	scan->topic_id = 0;
	scan->wanted = wanted;
	scan->again = true;
	begin_at(scan, base, target, after_id, unread, anywhere);
}

static void
end_pass(BatchScan *scan)
{
	qsort(scan->entries, scan->count, sizeof(Entry), compare_entries);
	scan->passing = false;
	narrow_ranges(scan);
	if (!scan->first)
		return;
	scan->first = false;
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (scan->read[i])
			move_floor(scan, i);
	}
}

/*
 * Goes on with the pass that is under way, by at most so many blocks.  Returns
 * whether the entries are complete.  With the segments open.  Raises an error
 * (55000) if a segment is stored in another file now.
 */
bool
scan_step(BatchScan *scan, int blocks)
{
	Pass		pass = {.scan = scan};

	if (!scan->passing)
		return true;
	PushActiveSnapshot(GetTransactionSnapshot());
	pass.snapshot = GetActiveSnapshot();
	while (scan->range < scan->nranges && blocks > 0)
		blocks -= read_range(&pass, blocks);
	PopActiveSnapshot();
	if (scan->range < scan->nranges)
		return false;
	end_pass(scan);
	return true;
}

/* Opens the segments for the calls that need them. */
void
scan_open(void)
{
	open_segments();
}

/*
 * Returns the next row of the batch without taking it: the caller does that by
 * incrementing scan->next.  NULL: there are no more, or scan_step() has to find
 * them (scan->passing).
 */
const Entry *
scan_next(BatchScan *scan)
{
	if (scan->passing)
		return NULL;
	if (scan->next < scan->count)
		return &scan->entries[scan->next];
	if (scan->more)
	{
		scan->again = true;
		begin_pass(scan, scan->entries[scan->count - 1].id);
	}
	return NULL;
}

/*
 * Tells whether a segment that has rows of the batch, or may have, is stored in another
 * file now: they are elsewhere.  With the segments open.
 */
bool
scan_moved(const BatchScan *scan)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if ((scan->passing || scan->has_rows[i]) &&
			segments[i]->rd_rel->relfilenode != scan->unread.files[i])
			return true;
	}
	return false;
}

/* Raises an error (55000) if scan_moved() says so. */
void
scan_check(const BatchScan *scan)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (scan->has_rows[i])
			check_file(scan, i);
	}
}

/*
 * Writes before which blocks nothing is left of a topic's batch that is only
 * partly read, so that who goes on with it later need not read them.
 */
void
scan_left(const BatchScan *scan, Unread *unread)
{
	if (scan->passing)
		return;
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		unread->files[i] = scan->unread.files[i];
		unread->blocks[i] = scan->cut[i];
	}
	for (int i = scan->next; i < scan->count; i++)
	{
		const Entry *entry = &scan->entries[i];

		unread->blocks[entry->segment] = Min(unread->blocks[entry->segment], entry->block);
	}
}

/*
 * Copies a row into the current context.  Raises an error (55000) if it is not there
 * any more.  With the segments open.
 */
HeapTuple
scan_fetch(const Entry *entry, TupleDesc *desc)
{
	Relation	rel = segments[entry->segment];
	Page		page;
	HeapTuple	copy = NULL;
	bool		isnull;

	*desc = RelationGetDescr(rel);
	fetched = ReleaseAndReadBuffer(fetched, rel, entry->block);
	page = BufferGetPage(fetched);
	LockBuffer(fetched, BUFFER_LOCK_SHARE);
	if (entry->offset <= PageGetMaxOffsetNumber(page) &&
		ItemIdIsNormal(PageGetItemId(page, entry->offset)))
	{
		HeapTupleData row;

		row.t_data = (HeapTupleHeader) PageGetItem(page, PageGetItemId(page, entry->offset));
		row.t_len = ItemIdGetLength(PageGetItemId(page, entry->offset));
		row.t_tableOid = RelationGetRelid(rel);
		ItemPointerSet(&row.t_self, entry->block, entry->offset);
		copy = heap_copytuple(&row);
	}
	LockBuffer(fetched, BUFFER_LOCK_UNLOCK);
	if (copy == NULL || DatumGetInt64(heap_getattr(copy, OUTBOX_ID, *desc, &isnull)) != entry->id)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("a row of table \"fanout.%s\" was removed while it was read", RelationGetRelationName(rel))));
	return copy;
}

/* Closes the segments.  Their locks are kept until the transaction ends. */
void
scan_close(void)
{
	if (BufferIsValid(fetched))
		ReleaseBuffer(fetched);
	fetched = InvalidBuffer;
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
		table_close(segments[i], NoLock);
}

/* Forgets the batch.  Its memory for entries is kept if it is small. */
void
scan_end(BatchScan *scan)
{
	if (scan->ranges != NULL)
		pfree(scan->ranges);
	scan->ranges = NULL;
	scan->nranges = 0;
	if (scan->room > KEPT_ENTRIES)
	{
		pfree(scan->entries);
		scan->entries = NULL;
		scan->room = 0;
	}
	scan->count = scan->next = 0;
	scan->more = scan->passing = false;
}
