/*-------------------------------------------------------------------------
 *
 * writer.c
 *		Rows into the outbox's segments, a statement's together.
 *
 * A statement that changes many rows pays for locking, opening and logging
 * once per page rather than once per row: its rows are queued and inserted
 * together.  Their ids are drawn before, so it never matters in which order
 * they get there.  The queue belongs to one subtransaction, and only this one
 * may insert it: the rows carry its xid.
 *
 * Scenarios:
 *
 * - The statement ends: the queue is inserted, so that the next statement
 *	 sees it.
 *
 * - The statement is one of several, in a function that the outer one calls:
 *	 the same.
 *
 * - A subtransaction begins while its parent has a queue (an exception block in
 *	 another AFTER trigger): its rows are inserted one by one.
 *
 * - A command that is no statement of the executor has written rows (COPY): the
 *	 queue is inserted when the command ends.
 *
 * - What is neither (an apply worker of logical
 *	 replication): before COMMIT, PREPARE TRANSACTION, or the end of the
 *	 subtransaction.
 *
 * - ROLLBACK, also to a savepoint: the queue is forgotten.
 *
 * - Rows written while the transaction commits, by others' callbacks: nobody
 *	 would insert them later, so they are inserted at once.
 *
 * - Rows that must be toasted are inserted at once, since
 *	 inserting several at once cannot do that.
 *
 * - A trigger that somebody has put on the outbox changes captured tables while
 *	 the queue is inserted: its rows are inserted at once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heaptoast.h"
#include "access/htup_details.h"
#include "access/xact.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "tcop/utility.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "capture/writer.h"
#include "server/insertion.h"
#include "server/segment.h"

/* A dozen pages, and little enough to stay in the processor's cache. */
#define QUEUE_ROWS 128

static struct
{
	MemoryContext context;		/* holds the rows; NULL: nothing is queued */
	SubTransactionId subid;
	int			segment;
	int			count;
	HeapTuple	rows[QUEUE_ROWS];
}			queue;

static bool committing = false;
static bool flushing = false;	/* the queue is being inserted */
static ExecutorFinish_hook_type next_executor_finish = NULL;
static ProcessUtility_hook_type next_utility = NULL;

/* ---- inserting ---- */

void
writer_insert(int segment, const OutboxRow *row)
{
	HeapTuple	tuple = outboxrow_form(row, segment);

	segment_append(segment, outboxrow_descriptor(), &tuple, 1);
}

/* ---- the queue ---- */

static void
forget_queue(void)
{
	queue.count = 0;
	flushing = false;
	MemoryContextReset(queue.context);
}

/* Inserts what the current subtransaction has queued. */
static void
flush_queue(void)
{
	MemoryContext old_context;

	if (queue.count == 0 || flushing || queue.subid != GetCurrentSubTransactionId())
		return;
	flushing = true;
	old_context = MemoryContextSwitchTo(queue.context);
	segment_append(queue.segment, outboxrow_descriptor(), queue.rows, queue.count);
	MemoryContextSwitchTo(old_context);
	forget_queue();
}

static bool
may_queue(void)
{
	return queue.context != NULL && !committing && !flushing &&
		(queue.count == 0 || queue.subid == GetCurrentSubTransactionId());
}

void
writer_queue(int segment, const OutboxRow *row)
{
	MemoryContext old_context;
	HeapTuple	tuple;

	if (!may_queue())
	{
		writer_insert(segment, row);
		return;
	}
	if (queue.count == QUEUE_ROWS || queue.segment != segment)
		flush_queue();
	queue.subid = GetCurrentSubTransactionId();
	queue.segment = segment;

	old_context = MemoryContextSwitchTo(queue.context);
	tuple = outboxrow_form(row, segment);
	MemoryContextSwitchTo(old_context);
	if (tuple->t_len <= TOAST_TUPLE_THRESHOLD)
		queue.rows[queue.count++] = tuple;
	else
	{
		segment_append(segment, outboxrow_descriptor(), &tuple, 1);
		heap_freetuple(tuple);
	}
}

/* ---- when it is inserted ---- */

/*
 * Not so a query that changes nothing, or a foreign key's own, which leaves its
 * triggers to the statement: one that runs for each row would have the rows inserted
 * one by one.  In parallel mode nothing may be inserted at all.
 */
static bool
ends_statement(const QueryDesc *query)
{
	if (query->estate->es_top_eflags & EXEC_FLAG_SKIP_TRIGGERS)
		return false;
	return query->operation != CMD_SELECT || query->plannedstmt->hasModifyingCTE;
}

static void
executor_finish(QueryDesc *query)
{
	if (next_executor_finish)
		next_executor_finish(query);
	else
		standard_ExecutorFinish(query);
	if (ends_statement(query) && !IsInParallelMode())
		flush_queue();
}

/*
 * Inserts what a command has queued.  Nothing of pstmt may be looked at after the
 * command: it may have ended the transaction whose memory that is.
 */
static void
utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree,
		ProcessUtilityContext context, ParamListInfo params,
		QueryEnvironment *query_env, DestReceiver *dest, QueryCompletion *qc)
{
	ProcessUtility_hook_type next = next_utility ? next_utility : standard_ProcessUtility;

	next(pstmt, query_string, read_only_tree, context, params, query_env, dest, qc);
	flush_queue();
}

/*
 * The server has no snapshot any more, and some that check for one.  It has also
 * fired the deferred triggers; what somebody's trigger on the outbox deferred is
 * left.
 */
static void
flush_at_end(void)
{
	if (queue.count == 0)
		return;
	PushActiveSnapshot(GetTransactionSnapshot());
	flush_queue();
	PopActiveSnapshot();
	AfterTriggerFireDeferred();
}

static void
xact_callback(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			committing = true;
			flush_at_end();
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_ABORT:
			insertion_end();
			forget_queue();
			committing = false;
			break;
		case XACT_EVENT_PARALLEL_PRE_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PARALLEL_ABORT:
			break;
	}
}

static void
subxact_callback(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_PRE_COMMIT_SUB)
		flush_queue();
	if (event == SUBXACT_EVENT_ABORT_SUB)
		insertion_end();
	if (event == SUBXACT_EVENT_ABORT_SUB && (queue.count == 0 || queue.subid == subid))
		forget_queue();
}

/*
 * Lets rows be queued.  To be called once in the postmaster, before
 * nesting_init(): the queue is inserted inside the level of the statement.
 */
void
writer_init(void)
{
	queue.context = AllocSetContextCreate(TopMemoryContext, "pg_fanout queue", ALLOCSET_DEFAULT_SIZES);
	next_executor_finish = ExecutorFinish_hook;
	ExecutorFinish_hook = executor_finish;
	next_utility = ProcessUtility_hook;
	ProcessUtility_hook = utility;
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
}
