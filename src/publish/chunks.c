/*-------------------------------------------------------------------------
 *
 * chunks.c
 *		What the main cursor has read and the ledger does not say yet.
 *
 * A chunk is done when all messages of all its runs are.  Chunks are recorded in the
 * order in which they were read, so the oldest one that is not done keeps all behind
 * it.  One whose topic leaves the main cursor, or lets others pass, loses that topic's run:
 *
 *		read -> [ runs of topics ] -> done -> recorded, with those before it
 *		                |
 *		                +-- the run goes with its topic (chunks_cut)
 *
 * Memory is bounded by the number of messages of all chunks, done or not, and by the
 * bytes of those that are not done; how much that is depends on what topics have that
 * have left the main cursor.
 *
 * Must never: record a chunk before an older one; ask the broker or the tables anything.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "publish/chunks.h"
#include "publish/reader.h"

/*
 * Of single messages that come a few at a time, each would cost the ledger as
 * much as its row cost the outbox.  So they are gathered for GATHER_MS, or until
 * they are so many.  What is gathered would be sent again after a crash, as what
 * is in flight would be.
 */
#define GATHER_MS		50
#define GATHER_MESSAGES 1000

/* No more is read with so many messages in memory, of a whole share of bytes. */
#define MAX_MESSAGES	(9 * RUN_MESSAGES)

/* A chunk with more topics that are not done may take long, up to MANY_MS; see chunks_awaited(). */
#define FEW_TOPICS		8
#define MANY_MS			3000

static Chunk *first = NULL;
static Chunk *last = NULL;
static uint64 nappended = 0;	/* in all */
static int	nmessages = 0;
static size_t bytes = 0;
static size_t max_bytes = RUN_BYTES;	/* not done; no more is read with so
										 * many */
static int	ndone = 0;			/* messages of the oldest chunks that are done */
static MonoTime done_since = 0; /* when the first of these was */
static Chunk *oldest = NULL;	/* that is not done */
static MonoTime oldest_since = 0;	/* when it became that */
static MonoTime oldest_at = 0;	/* when one of its topics was last done */

Chunk *
chunks_create(void)
{
	return MemoryContextAllocZero(TopMemoryContext, sizeof(Chunk));
}

/* Frees a chunk that has no runs. */
void
chunks_free(Chunk *chunk)
{
	if (chunk->batch != NULL)
		batch_release(chunk->batch);
	pfree(chunk);
}

Chunk *
chunks_first(void)
{
	return first;
}

Chunk *
chunks_last(void)
{
	return last;
}

/* The number of the last chunk that was read. */
uint64
chunks_newest(void)
{
	return nappended;
}

/* Bounds what may be in memory, to RUN_BYTES at most; messages in proportion. */
void
chunks_set_room(size_t share)
{
	max_bytes = share;
}

static int
max_messages(void)
{
	return max_bytes / (RUN_BYTES / MAX_MESSAGES);
}

/* Bounds the next chunk to what may be in memory of all of them. */
RunLimit
chunks_limit(void)
{
	RunLimit	limit = {Min(max_messages(), RUN_MESSAGES), max_bytes};

	return limit;
}

/* May another chunk be read? */
bool
chunks_room(void)
{
	return nmessages <= max_messages() && bytes <= max_bytes;
}

/* ---- what is done ---- */

/* Finds the oldest chunk that is not done, and counts what is done before it. */
static void
look_at_oldest(void)
{
	Chunk	   *chunk = first;

	ndone = 0;
	for (; chunk != NULL && chunk->open_runs == 0; chunk = chunk->next)
		ndone += chunk->count;
	if (chunk != first && done_since == 0)
		done_since = mono_now();
	if (chunk != oldest)
		oldest_since = oldest_at = mono_now();
	oldest = chunk;
}

/* Adds a chunk behind all others, with its runs, whose messages are not done. */
void
chunks_append(Chunk *chunk)
{
	if (last != NULL)
		last->next = chunk;
	else
		first = chunk;
	last = chunk;
	chunk->number = ++nappended;
	chunk->read_at = mono_now();
	nmessages += chunk->count;
	bytes += chunk->bytes;
	for (Run *run = chunk->runs; run != NULL; run = run->next_of_chunk)
		chunk->open_runs++;
	look_at_oldest();
}

static void
run_closed(Chunk *chunk)
{
	if (--chunk->open_runs == 0)
		look_at_oldest();
	if (chunk == oldest)
		oldest_at = mono_now();
}

/* Another message of the run is done. */
void
chunks_message_done(Run *run, const Message *message)
{
	if (run->chunk == NULL)
		return;
	bytes -= message->bytes;
	if (run->done == run->count)
		run_closed(run->chunk);
}

/* Takes a run, which its topic keeps for itself, out of its chunk. */
void
chunks_cut(Run *run)
{
	Chunk	   *chunk = run->chunk;
	Run		  **link = &chunk->runs;

	while (*link != run)
		link = &(*link)->next_of_chunk;
	*link = run->next_of_chunk;
	run->next_of_chunk = NULL;
	run->chunk = NULL;
	chunk->count -= run->count;
	nmessages -= run->count;
	for (int i = run->done; i < run->count; i++)
		bytes -= run->messages[i]->bytes;
	if (run->done < run->count)
		run_closed(chunk);
}

/* When it is time to record what is done, or 0: nothing is. */
MonoTime
chunks_due_at(void)
{
	return done_since == 0 ? 0 : mono_plus(done_since, GATHER_MS);
}

/* Is it time to record what is done? */
bool
chunks_due(void)
{
	return done_since != 0 && (ndone >= Min(GATHER_MESSAGES, max_messages() / 2) || mono_now() >= chunks_due_at());
}

/* Does a chunk that is done wait to be recorded for an older one that is not? */
bool
chunks_one_waits(void)
{
	return oldest != NULL && oldest->next != NULL && oldest->next->open_runs == 0;
}

/*
 * Returns the oldest chunk that is not done, and since when it is waited for; NULL: there is
 * none.  A chunk of many topics may wait for each of them a moment, and is not held up as
 * long as one after the other is done, for MANY_MS at most.
 */
Chunk *
chunks_awaited(MonoTime *since)
{
	if (oldest == NULL)
		return NULL;
	*since = oldest_since;
	if (oldest->open_runs > FEW_TOPICS && !mono_exceeds(oldest_since, mono_now(), MANY_MS))
		*since = oldest_at;
	return oldest;
}

/* ---- recording ---- */

static void
record_runs(Chunk *chunk, void (*record_run) (Run *run))
{
	Run		   *next;

	for (Run *run = chunk->runs; run != NULL; run = next)
	{
		next = run->next_of_chunk;
		record_run(run);
	}
	chunk->runs = NULL;
}

/*
 * Has the runs of all chunks that are done recorded, and takes these chunks out,
 * but for the last of them, which is returned with what concerns all of them, to be
 * written into the ledger and freed by the caller; NULL if there is none.  *count:
 * messages in them.  record_run() frees the run.
 */
Chunk *
chunks_record(void (*record_run) (Run *run), int *count)
{
	Chunk	   *newest = NULL;

	*count = 0;
	while (first != NULL && first->open_runs == 0)
	{
		Chunk	   *chunk = first;

		record_runs(chunk, record_run);
		*count += chunk->count;
		nmessages -= chunk->count;
		first = chunk->next;
		if (newest != NULL)
		{
			if (chunk->flush.ticket < newest->flush.ticket)
				chunk->flush = newest->flush;
			chunk->load = Max(chunk->load, newest->load);
			chunks_free(newest);
		}
		newest = chunk;
	}
	if (first == NULL)
		last = NULL;
	done_since = 0;
	look_at_oldest();
	return newest;
}
