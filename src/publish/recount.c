/*-------------------------------------------------------------------------
 *
 * recount.c
 *		Counts anew what waits of topics that have left the main cursor.
 *
 * Elsewhere a message is counted when its row is found, and again when it is done
 * (flow.c).  Four things leave a topic's figure unknown (flow_uncount()): the start of
 * the publisher, fanout.purge(), leaving the main cursor in the middle of a batch with
 * nothing in memory, and somebody who removes rows from the outbox by hand.  Then one scan counts for all such topics together:
 *
 *		uncounted -> begin(): its place is kept -> every row behind that place, up to
 *		"upto", counts -> finish(): its figure is known
 *
 *		         its place                   upto
 *		------------|-------------------------|----------> snapshots
 *		            |  counted here           |  counted as the main cursor finds them
 *
 * Meanwhile the topic may go on: what it is done with is subtracted, whether it was
 * counted already or will be.  If its place stops being the one that was kept, because
 * it leaves once more or more is purged, its count is void, and begun anew.
 *
 * Rows that the main cursor is still finding are left to the scan as far as upto shows
 * them, so the scan does not end before that.
 *
 * Memory: two snapshots for each topic that is being counted.
 *
 * Must never: move a cursor; read more than some blocks at once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "publish/flow.h"
#include "publish/reader.h"
#include "publish/recount.h"
#include "publish/topic.h"
#include "server/worker.h"

/* Blocks that are looked at before others get their turn: some milliseconds. */
#define READ_BLOCKS 256

static MemoryContext context = NULL;	/* NULL: nothing is being counted */
static BatchScan scan;
static bool scanned;			/* all of it */

static bool
has_to_begin(const Flow *flow)
{
	return flow->state == FLOW_DETACHED && flow->uncounted && flow->recount == NULL;
}

static bool
any_has_to_begin(void)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		if (has_to_begin(flow_in(it.cur)))
			return true;
	}
	return false;
}

/* Moves the place from which the scan reads back to where a topic needs it. */
static void
begin_before(Unread *unread, const Unread *other)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (unread->files[i] != other->files[i])
			unread->files[i] = InvalidOid;	/* from the first block on */
		unread->blocks[i] = Min(unread->blocks[i], other->blocks[i]);
	}
}

/* Keeps the place of a topic that has nothing in memory. */
static void
keep_place(Flow *flow)
{
	const Cursor *cursor = &flow->cursor;
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	Recount    *recount = palloc0(sizeof(Recount));

	recount->base = PointerGetDatum(PG_DETOAST_DATUM_COPY(cursor->base));
	if (cursor->batch != NULL)
		recount->target = PointerGetDatum(PG_DETOAST_DATUM_COPY(cursor->batch->target));
	recount->last_id = cursor->last_id;
	recount->upto = scan.target;
	flow->recount = recount;
	flow->backlog = 0;
	flow->oldest = 0;
	flow->waits = false;
	MemoryContextSwitchTo(oldcontext);
}

/* Was the row accepted although it is behind the topic's place? */
static bool
was_accepted(const Flow *flow, int64 id)
{
	return flow->accepted != NULL && hash_search(flow->accepted, &id, HASH_FIND, NULL) != NULL;
}

/* Is the row behind the place that was kept? */
static bool
is_behind_place(const Recount *recount, const ScanRow *row)
{
	if (scan_sees(recount->base, row->xid))
		return false;
	return recount->target == (Datum) 0 || row->id > recount->last_id ||
		!scan_sees(recount->target, row->xid);
}

/* For reader_begin_count() */
static bool
count_row(const ScanRow *row)
{
	Topic	   *topic = topic_find(row->topic_id);
	Flow	   *flow = topic ? &topic->flow : NULL;

	if (flow == NULL || flow->recount == NULL || !is_behind_place(flow->recount, row) ||
		was_accepted(flow, row->id) || flow_has_purged(flow, row))
		return false;
	flow->waits = true;
	flow_count_row(flow, row);
	return false;
}

/*
 * Begins to count for all topics that have to be counted and have nothing in memory, if
 * there are any and nothing is being counted yet.  Inside a transaction.
 */
void
recount_begin(void)
{
	dlist_iter	it;
	Unread		unread;
	bool		any = false;

	if (context != NULL)
		return;
	dlist_foreach(it, &flow_detached)
	{
		const Flow *flow = flow_in(it.cur);
		const Unread *place = flow->cursor.batch ? &flow->cursor.batch->unread : &flow->cursor.unread;

		if (!has_to_begin(flow))
			continue;
		if (any)
			begin_before(&unread, place);
		else
			unread = *place;
		any = true;
	}
	if (!any)
		return;
	context = AllocSetContextCreate(TopMemoryContext, "pg_fanout recount", ALLOCSET_SMALL_SIZES);
	reader_begin_count(&scan, flow_main, &unread, count_row);
	scanned = false;
	dlist_foreach(it, &flow_detached)
	{
		if (has_to_begin(flow_in(it.cur)))
			keep_place(flow_in(it.cur));
	}
}

/* Ends it.  counted: all rows were looked at; else it has to be begun anew. */
static void
finish(bool counted)
{
	dlist_iter	it;

	dlist_foreach(it, &flow_detached)
	{
		Flow	   *flow = flow_in(it.cur);

		if (flow->recount == NULL)
			continue;
		flow->recount = NULL;
		if (counted)
			flow_set_backlog(flow, flow->backlog);
	}
	reader_end_count(&scan);
	MemoryContextDelete(context);
	context = NULL;
}

/*
 * Takes a step in counting, if there is anything to count.  Returns whether there was.
 */
bool
recount_step(void)
{
	bool		moved = false;

	if (context == NULL && !any_has_to_begin())
		return false;
	if (context != NULL && scanned && reader_is_finding(flow_main))
		return false;
	worker_begin();
	recount_begin();
	scanned = scanned || reader_count(&scan, READ_BLOCKS, &moved);
	worker_commit();
	if (moved || (scanned && !reader_is_finding(flow_main)))
		finish(!moved);
	return true;
}
