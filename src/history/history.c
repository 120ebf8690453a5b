/*-------------------------------------------------------------------------
 *
 * history.c
 *		The worker that sends rows and messages of the past: its loop.
 *
 * One for each database that has something to send, started when a row of
 * fanout.backfill is running, and gone when none is.  It writes messages into the
 * outbox, the publisher sends them; only to move dead letters back does it talk to the
 * broker (recover.c), between transactions.  The first MAX_WALKS that
 * run take turns, a transaction each; the others wait until one of them is done.
 *
 *		           backfill()
 *		               |
 *		               v   pause_backfill()
 *		            RUNNING <-----------> PAUSED
 *		             |  |  \             /   ^
 *		   end_walk()|  |   cancel_backfill()|
 *		             v  |          v         | resume_backfill()
 *		          DONE  |      CANCELLED     |
 *		                v record_failure()   |
 *		              FAILED ----------------'
 *
 * A transaction writes at most MAX_ROWS rows and about MAX_BYTES, and in its end
 * where it has come to: after a crash the next one goes on there.  It is committed
 * without waiting for WAL: what a crash takes back is position and messages
 * together.
 *
 * Live messages must not wait behind those of the past.  So a walk has at most two
 * transactions that are not sent yet, and together all walks have no more than
 * MAX_ROWS rows in a transaction.  One whose topic is paused or refused stands
 * still; the others go on.
 *
 * Errors: a lock that was not got in LOCK_TIMEOUT, a deadlock, a lack of resources:
 * the step is tried again with fewer rows, after a pause that doubles up to
 * MAX_RETRY.  All others end the walk, with the error in the view, and so does the
 * drop of its queue's binding; resume_backfill() goes on where it was.
 *
 * It must never wait for a lock while application sessions wait for those it has,
 * for longer than LOCK_TIMEOUT; and never run code of users with more rights than
 * the table's owner has.
 *
 * Locks: the row of fanout.backfill; ROW SHARE on the table; FOR NO KEY UPDATE on
 * the rows of a step, until its end.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "history/history.h"
#include "server/query.h"
#include "server/utf8.h"
#include "server/worker.h"

#define MAX_WALKS		8
#define MAX_ROWS		300
#define FEWEST_ROWS		16
#define MAX_BYTES		(2 * 1024 * 1024)
#define LOCK_TIMEOUT	"200ms"

/* ms */
#define FIRST_PAUSE		4
#define LONG_PAUSE		50
#define MAX_PAUSE		500
#define FIRST_RETRY		100
#define MAX_RETRY		10000
#define LOOK_AGAIN		1000

#define QUEUE_NOT_BOUND "the consumer group is not bound to the topic any more"

/* Failures in a row of which the view tells. */
#define TOLD_FAILURES	5

static Walk walks[MAX_WALKS];
static int	nwalks = 0;

/* ---- which walks there are ---- */

static void
forget_query(WalkQuery *query)
{
	if (query->plan != NULL)
		SPI_freeplan(query->plan);
	if (query->sql != NULL)
		pfree(query->sql);
}

/*
 * Counts dead letters that were moved when their recovery did not run any more.  It waits
 * for no lock: without them the recovery, resumed, looks for more than there are.
 */
static void
count_moved(int64 id, int64 moved)
{
	static CachedQuery query = {
		"update fanout.backfill set rows_done = rows_done + $2, rows_sent = rows_sent + $2"
		" where backfill_id in (select backfill_id from fanout.backfill where backfill_id = $1"
		" for no key update skip locked)"
	};
	Oid			types[2] = {INT8OID, INT8OID};
	Datum		values[2] = {Int64GetDatum(id), Int64GetDatum(moved)};

	worker_begin();
	query_execute(&query, 2, types, values, NULL);
	worker_commit();
}

/* Forgets the walks that do not run any more.  Not in a transaction. */
static void
forget_ended(void)
{
	for (int i = nwalks - 1; i >= 0; i--)
	{
		int64		moved;

		if (walks[i].listed)
			continue;
		moved = recover_stop(walks[i].id, true);
		if (moved > 0)
			count_moved(walks[i].id, moved);
		forget_query(&walks[i].bounds);
		forget_query(&walks[i].read);
		walks[i] = walks[--nwalks];
	}
}

static Walk *
find_walk(int64 id)
{
	for (int i = 0; i < nwalks; i++)
	{
		if (walks[i].id == id)
			return &walks[i];
	}
	return NULL;
}

static void
list_walk(int64 id, int32 topic_id, uint64 last_xid, bool recovers, bool walked)
{
	Walk	   *walk = find_walk(id);

	if (walk == NULL && nwalks < MAX_WALKS)
	{
		walk = &walks[nwalks++];
		memset(walk, 0, sizeof(*walk));
		walk->id = id;
		walk->topic_id = topic_id;
		walk->recovers = recovers;
		walk->rows = FEWEST_ROWS;
		walk->last_xid = last_xid;

		/* once that is sent, so is what was committed before it */
		walk->must_drain = walked;
	}
	if (walk != NULL)
		walk->listed = true;
}

/* Compares what runs with the table.  In a transaction of worker_begin(). */
static void
read_walks(void)
{
	static CachedQuery query = {
		"select backfill_id, topic_id, coalesce(last_xid::text, '0')::bigint, kind = 'recover_dead', walked from fanout.backfill"
		" where state = 'running' order by backfill_id limit 8"
	};
	bool		isnull;

	for (int i = 0; i < nwalks; i++)
		walks[i].listed = false;
	query_execute(&query, 0, NULL, NULL, NULL);
	for (int i = 0; i < SPI_processed; i++)
		list_walk(DatumGetInt64(query_value(i, 1, &isnull)), DatumGetInt32(query_value(i, 2, &isnull)),
				  DatumGetInt64(query_value(i, 3, &isnull)), DatumGetBool(query_value(i, 4, &isnull)),
				  DatumGetBool(query_value(i, 5, &isnull)));
}

/* ---- what is not sent yet ---- */

/* Asks something of what a transaction wrote for a topic. */
static bool
ask(CachedQuery *query, int32 topic_id, uint64 xid)
{
	Oid			types[2] = {INT4OID, INT8OID};
	Datum		values[2] = {Int32GetDatum(topic_id), Int64GetDatum((int64) xid)};
	bool		isnull;

	query_execute(query, 2, types, values, NULL);
	return DatumGetBool(query_value(0, 1, &isnull));
}

/*
 * Has the publisher recorded that all is sent of a batch that has what a transaction wrote for
 * the topic?  That costs little to know.
 */
static bool
is_batch_sent(int32 topic_id, uint64 xid)
{
	static CachedQuery query = {
		"select pg_visible_in_snapshot($2::text::xid8, coalesce("
		" (select case when not attached then base end from fanout.sent where topic_id = $1 order by sent_id desc limit 1),"
		" (select base from fanout.sent where topic_id is null order by sent_id desc limit 1)))"
		" and not exists (select from fanout.held where topic_id = $1 and xid = $2::text::xid8)"
	};

	return ask(&query, topic_id, xid);
}

/*
 * Has the publisher not sent all that a transaction wrote for the topic?  If others have very
 * many messages in the same batch, only a look at each tells.
 */
static bool
is_unsent(int32 topic_id, uint64 xid)
{
	static CachedQuery query = {
		"select exists (select from fanout.pending where topic_id = $1 and xid = $2::text::xid8)"
		" or exists (select from fanout.held where topic_id = $1 and xid = $2::text::xid8)"
	};

	return ask(&query, topic_id, xid);
}

/* Is all that a transaction of the walk wrote known to be sent? */
static bool
is_sent(const Walk *walk, uint64 xid)
{
	return is_batch_sent(walk->topic_id, xid) ||
		(walk->pause >= LONG_PAUSE && !is_unsent(walk->topic_id, xid));
}

/*
 * Looks what has been sent since.  Returns whether the walk may write more; else it
 * is looked at again after a pause, which takes into account how long looking took.
 */
static bool
may_go_on(Walk *walk)
{
	MonoTime	begun = mono_now();

	if (walk->previous_xid != 0 && is_sent(walk, walk->previous_xid))
		walk->previous_xid = 0;
	if (walk->must_drain && walk->previous_xid == 0 && walk->last_xid != 0 && is_sent(walk, walk->last_xid))
		walk->last_xid = 0;
	if (walk->previous_xid == 0 && (!walk->must_drain || walk->last_xid == 0))
	{
		walk->pause = 0;
		return true;
	}
	walk->pause = Min(MAX_PAUSE, Max(FIRST_PAUSE, walk->pause + walk->pause / 4));
	walk->pause = Max(walk->pause, Min(MAX_PAUSE, 4 * mono_left(begun, mono_now())));
	walk->next_at = mono_later(walk->pause);
	return false;
}

/* ---- one step ---- */

static char *
text_column(int column)
{
	bool		isnull;
	Datum		value = query_value(0, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

static void
read_position(WalkRow *row, Datum array)
{
	Datum	   *elements;
	bool	   *nulls;

	deconstruct_array(DatumGetArrayTypeP(array), TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, &nulls, &row->nposition);
	row->position = palloc((row->nposition + 1) * sizeof(char *));
	for (int i = 0; i < row->nposition; i++)
		row->position[i] = TextDatumGetCString(elements[i]);
}

static void
read_keys(WalkRow *row, Datum array)
{
	ArrayType  *keys = DatumGetArrayTypeP(array);

	row->nkeys = ArrayGetNItems(ARR_NDIM(keys), ARR_DIMS(keys));
	row->keys = palloc((row->nkeys + 1) * sizeof(int16));
	memcpy(row->keys, ARR_DATA_PTR(keys), row->nkeys * sizeof(int16));
}

/* Locks and reads the row.  Returns false if the walk does not run any more. */
static bool
load_row(const Walk *walk, WalkRow *row)
{
	static CachedQuery query = {
		"select kind, entity, topic, queue, \"where\", coalesce(rate, 0), key, position, coalesce(file, 0), walked, rows_sent, again, repair,"
		" rows_done, coalesce(rows_estimated, -1),"
		" queue is null or exists (select from fanout.binding n where n.queue = f.queue), key_order,"
		" (parse_ident(entity_name))[1], (parse_ident(entity_name))[2]"
		" from fanout.backfill f where backfill_id = $1 and state = 'running' for no key update"
	};
	Oid			types[1] = {INT8OID};
	Datum		values[1] = {Int64GetDatum(walk->id)};
	bool		isnull;
	Datum		value;

	query_execute(&query, 1, types, values, NULL);
	if (SPI_processed != 1)
		return false;
	memset(row, 0, sizeof(*row));
	row->kind = text_column(1);
	row->entity = DatumGetObjectId(query_value(0, 2, &isnull));
	row->topic = text_column(3);
	row->queue = text_column(4);
	row->where = text_column(5);
	row->rate = DatumGetInt32(query_value(0, 6, &isnull));
	value = query_value(0, 7, &isnull);
	if (!isnull)
		read_keys(row, value);
	value = query_value(0, 8, &isnull);
	if (!isnull)
		read_position(row, value);
	row->file = DatumGetObjectId(query_value(0, 9, &isnull));
	row->walked = DatumGetBool(query_value(0, 10, &isnull));
	row->sent = DatumGetInt64(query_value(0, 11, &isnull));
	row->again = DatumGetBool(query_value(0, 12, &isnull));
	row->repair = DatumGetBool(query_value(0, 13, &isnull));
	row->done = DatumGetInt64(query_value(0, 14, &isnull));
	row->estimated = DatumGetInt64(query_value(0, 15, &isnull));
	row->bound = DatumGetBool(query_value(0, 16, &isnull));
	row->order = text_column(17);
	row->schema = text_column(18);
	row->table = text_column(19);
	return true;
}

static void
save_step(const Walk *walk, const WalkStep *step, uint64 xid)
{
	static CachedQuery query = {
		"update fanout.backfill set rows_done = rows_done + $2, rows_sent = rows_sent + $3,"
		" position = coalesce($4, position), file = $5, walked = $6, last_xid = coalesce($7::text::xid8, last_xid),"
		" key_order = coalesce($8, key_order),"
		" started_at = coalesce(started_at, clock_timestamp()), updated_at = clock_timestamp(), error = null"
		" where backfill_id = $1"
	};
	Oid			types[8] = {INT8OID, INT8OID, INT8OID, TEXTARRAYOID, OIDOID, BOOLOID, INT8OID, TEXTOID};
	char		nulls[8] = "       ";
	Datum	   *elements = palloc((step->nposition + 1) * sizeof(Datum));
	Datum		values[8] = {
		Int64GetDatum(walk->id), Int64GetDatum(step->rows), Int64GetDatum(step->sent), (Datum) 0,
		ObjectIdGetDatum(step->file), BoolGetDatum(step->walked), Int64GetDatum((int64) xid)
	};

	for (int i = 0; i < step->nposition; i++)
		elements[i] = CStringGetTextDatum(step->position[i]);
	if (step->nposition > 0)
		values[3] = PointerGetDatum(construct_array(elements, step->nposition, TEXTOID, -1, false, TYPALIGN_INT));
	else
		nulls[3] = 'n';
	nulls[6] = (xid != 0) ? ' ' : 'n';
	values[7] = query_text_param(step->order, &nulls[7]);
	query_change(&query, 8, types, values, nulls, 1);
}

/* Sets the state of a walk that runs; of one that fails, tells a copy that waits for it. */
static void
set_state(const Walk *walk, const char *state, const char *error)
{
	static CachedQuery query = {
		"update fanout.backfill set state = $2, error = $3, updated_at = clock_timestamp(),"
		" finished_at = case when $2 <> 'running' then clock_timestamp() end"
		" where backfill_id = $1 and state = 'running'"
	};
	Oid			types[3] = {INT8OID, TEXTOID, TEXTOID};
	char		nulls[3] = "  ";
	Datum		values[3] = {Int64GetDatum(walk->id), CStringGetTextDatum(state), (Datum) 0};

	values[2] = query_text_param(error, &nulls[2]);
	query_execute(&query, 3, types, values, nulls);
	if (strcmp(state, "failed") == 0 && SPI_processed == 1)
		compare_end(walk, error);
}

/* Fewer rows after a transaction that was larger than it should be, else more. */
static void
adapt(Walk *walk, const WalkRow *row, const WalkStep *step)
{
	if (step->bytes > MAX_BYTES)
		walk->rows = walk->rows / 2;
	else if (step->bytes < MAX_BYTES / 4)
		walk->rows = walk->rows * 2;
	walk->rows = Min(walk->rows, Max(FEWEST_ROWS, MAX_ROWS / nwalks));
	if (row->rate > 0)
		walk->rows = Min(walk->rows, row->rate / 4);
	walk->rows = Max(1, walk->rows);
	if (row->rate > 0)
		walk->next_at = mono_later(step->sent * 1000 / row->rate);
}

/* Writes the message that ends a walk. */
static void
tell_end(const Walk *walk, const WalkRow *row)
{
	if (strcmp(row->kind, "replay") == 0)
		replay_end(walk, row);
	else if (strcmp(row->kind, "compare") == 0)
		compare_end(walk, NULL);
	else
		backfill_end(walk, row);
}

static void
save_estimate(const Walk *walk, int64 estimated)
{
	static CachedQuery query = {"update fanout.backfill set rows_estimated = $2 where backfill_id = $1"};
	Oid			types[2] = {INT8OID, INT8OID};
	Datum		values[2] = {Int64GetDatum(walk->id), Int64GetDatum(estimated)};

	query_change(&query, 2, types, values, NULL, 1);
}

/* Records what a recovery has done, and what has become of it. */
static void
save_recovery(const Walk *walk, const WalkRow *row, const WalkStep *step)
{
	worker_begin();
	if (step->estimated != row->estimated)
		save_estimate(walk, step->estimated);
	if (step->rows > 0 || step->walked)
		save_step(walk, step, 0);
	if (step->failure != NULL)
		set_state(walk, "failed", step->failure);
	else if (step->walked)
		set_state(walk, "done", NULL);
	else if (step->waits != NULL)
		set_state(walk, "running", step->waits);
	worker_commit();
}

/*
 * Moves dead letters for a while: reads the row, talks to the broker with no
 * transaction open, and records what came of it in another one.
 */
static void
run_recovery(Walk *walk)
{
	MemoryContext context = CurrentMemoryContext;
	WalkRow		row;
	WalkStep	step;
	const char *queue = NULL;
	size_t		len;
	bool		runs;

	memset(&step, 0, sizeof(step));
	worker_begin();
	runs = load_row(walk, &row);
	if (runs && (queue = utf8_encode(row.queue, strlen(row.queue), &len)) != NULL)
		row.queue = MemoryContextStrdup(context, queue);
	worker_commit();
	MemoryContextSwitchTo(context);
	if (!runs)
		return;
	step.estimated = row.estimated;
	/* an interrupt would lose the connection that is being made */
	worker_allow_cancel(false);
	if (!row.bound)
		step.failure = QUEUE_NOT_BOUND;
	else if (queue != NULL)
		recover_step(walk, &row, &step);
	else
		step.failure = "name cannot be converted to UTF-8";
	worker_allow_cancel(true);
	if (step.rows > 0 || step.walked || step.failure != NULL || step.waits != NULL ||
		step.estimated != row.estimated)
		save_recovery(walk, &row, &step);
	walk->failures = 0;
}

/*
 * Runs one transaction of a walk.  The bookkeeping comes last, so that the messages
 * are in the outbox when it is done.
 */
static void
run_step(Walk *walk)
{
	WalkRow		row;
	WalkStep	step;
	uint64		xid = 0;

	worker_begin();
	memset(&step, 0, sizeof(step));
	if (!load_row(walk, &row))
	{
		worker_commit();
		return;
	}
	if (!row.bound)
		step.failure = QUEUE_NOT_BOUND;
	else if (row.walked)
	{
		tell_end(walk, &row);
		set_state(walk, "done", NULL);
	}
	else if (strcmp(row.kind, "replay") == 0)
		replay_step(walk, &row, &step);
	else
		backfill_step(walk, &row, &step);
	if (step.failure != NULL)
		set_state(walk, "failed", step.failure);
	else if (!row.walked)
	{
		if (step.sent > 0)
			xid = U64FromFullTransactionId(GetTopFullTransactionId());
		save_step(walk, &step, xid);
	}
	worker_commit();
	if (xid != 0)
	{
		walk->previous_xid = walk->last_xid;
		walk->last_xid = xid;
	}
	walk->must_drain = step.walked;
	walk->failures = 0;
	adapt(walk, &row, &step);
}

/* ---- errors ---- */

static bool
is_passing(int sqlstate)
{
	int			category = ERRCODE_TO_CATEGORY(sqlstate);

	return sqlstate == ERRCODE_LOCK_NOT_AVAILABLE ||
		category == ERRCODE_TRANSACTION_ROLLBACK ||
		category == ERRCODE_OPERATOR_INTERVENTION ||
		category == ERRCODE_INSUFFICIENT_RESOURCES;
}

/* Writes what went wrong, in a transaction of its own. */
static void
record_failure(Walk *walk, const ErrorData *error, bool passing)
{
	if (passing && walk->failures != TOLD_FAILURES)
		return;
	worker_begin();
	set_state(walk, passing ? "running" : "failed", error->message);
	worker_commit();
	if (!passing)
		ereport(LOG,
				(errcode(error->sqlerrcode),
				 errmsg("pg_fanout ended backfill " INT64_FORMAT ": %s", walk->id, error->message)));
}

static void
after_error(Walk *walk, const ErrorData *error)
{
	bool		passing = is_passing(error->sqlerrcode);

	(void) recover_stop(walk->id, false);
	walk->failures++;
	walk->rows = Max(1, walk->rows / 4);
	walk->next_at = mono_later(Min(MAX_RETRY, (long) FIRST_RETRY << Min(walk->failures - 1, 7)));
	record_failure(walk, error, passing);
}

static void
try_step(Walk *walk)
{
	MemoryContext context = CurrentMemoryContext;

	worker_allow_cancel(true);	/* lock_timeout is such a signal */
	PG_TRY();
	{
		if (walk->recovers)
			run_recovery(walk);
		else
			run_step(walk);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		worker_abort();
		MemoryContextSwitchTo(context);
		worker_allow_cancel(false);
		after_error(walk, error);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	worker_allow_cancel(false);
}

/* ---- the loop ---- */

static void
start(void)
{
	SetConfigOption("lock_timeout", LOCK_TIMEOUT, PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("extra_float_digits", "1", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("timezone", "UTC", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("bytea_output", "hex", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("enable_seqscan", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("enable_sort", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("enable_bitmapscan", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("plan_cache_mode", "force_generic_plan", PGC_SUSET, PGC_S_OVERRIDE);
}

/* Ends the process if nothing runs any more, unless it was asked for again. */
static void
look_around(void)
{
	pg_atomic_exchange_u32(&worker_history->history_dirty, 0);
	worker_begin();
	read_walks();
	worker_commit();
	forget_ended();
	if (nwalks == 0 && shmem_end_history(worker_history))
		worker_end(WORKER_RESTART);
}

/* Which of the walks that are due may go on?  One transaction looks for all. */
static int
find_due(Walk **due)
{
	int			n = 0;
	int			looked = 0;

	for (int i = 0; i < nwalks; i++)
	{
		if (walks[i].next_at > mono_now())
			continue;
		if (looked++ == 0)
			worker_begin();
		if (may_go_on(&walks[i]))
			due[n++] = &walks[i];
	}
	if (looked > 0)
		worker_commit();
	return n;
}

static long
until_next(void)
{
	MonoTime	at = mono_later(LOOK_AGAIN);

	for (int i = 0; i < nwalks; i++)
		at = Min(at, walks[i].next_at);
	return mono_left(mono_now(), at);
}

/* A round: a transaction of each walk that may go on. */
static bool
work(void)
{
	Walk	   *due[MAX_WALKS];
	int			n;

	look_around();
	n = find_due(due);
	worker_set_state(n > 0 ? WORKER_PUBLISHING : WORKER_IDLE);
	for (int i = 0; i < n; i++)
		try_step(due[i]);
	(void) worker_wait(-1, false, until_next());
	return true;
}

/* worker_run() wants a function that waits, but never calls it: work() waits by itself. */
static void
wait_for_work(void)
{
	(void) worker_wait(-1, false, LOOK_AGAIN);
}

void
pg_fanout_history_main(Datum main_arg)
{
	worker_attach(main_arg, "history");
	worker_run(start, work, wait_for_work);
}
