/*-------------------------------------------------------------------------
 *
 * caution.c
 *		How carefully messages are tried, by what has happened of late.
 *
 * Mostly a batch is one transaction without savepoints, and a call has the time that the
 * subscription allows.  Each of these goes beyond that for a while, none depends on
 * another:
 *
 *		              begins                          ends
 *		SAVEPOINTS    an error in a batch             after CAREFUL_BATCHES of them
 *		                                              without one
 *		ALONE         a batch was undone by an        when as many deliveries were
 *		              error that is no single         tried, a transaction each
 *		              message's
 *		SUSPECTS      the process before ended while  when as many were stored, or
 *		              a handler ran: what is          what comes was not delivered
 *		              delivered again is stored       before
 *		SINGLY        the same, or what was tried     when as many tries from the
 *		              from the waiting room was       waiting room were made, each
 *		              undone                          recorded first; or it is empty
 *		IMPATIENT     a call did not end in its time  after IMPATIENT_MS
 *
 * A handler that ends the process (FATAL, a crash) leaves no trace.  So what it may have
 * been is stored in the waiting room, and tried from there with its attempt recorded
 * before, so that such a message becomes a dead letter in the end.
 *
 * While the worker is impatient, messages that were not tried before have only a few
 * times what one took lately, before they are stored, to be tried later with their whole
 * time.
 *
 * Must never: decide what becomes of a message, which apply.c does.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "consume/caution.h"

/* After an error in a batch so many more are run with savepoints at once. */
#define CAREFUL_BATCHES 50

/*
 * Stores so many of the deliveries that come again, because one of them may have ended the
 * process.  If a batch was larger, that one may be behind them, and is stored after the
 * process has ended once or twice more.
 */
#define MAY_BE_SUSPECT 200

/* For how long, and how many times what a call took lately another one may take. */
#define IMPATIENT_MS 30000
#define PATIENCE_TIMES 4
#define PATIENCE_MIN_MS 25

Caution		caution;

/* clean: the process before did not end while a handler ran. */
void
caution_begin(bool clean)
{
	caution.singly = caution.suspects = clean ? 0 : MAY_BE_SUSPECT;
}

bool
caution_impatient(void)
{
	return caution.impatient_until > mono_now();
}

/* Says how a batch is to be run. */
void
caution_prepare(Batch *batch)
{
	batch->careful = caution.savepoints > 0;
	if (caution_impatient())
		batch->patience_ms = Max(PATIENCE_MIN_MS, caution.slowest_ms * PATIENCE_TIMES);
}

/* Takes the time of a message for what the next ones will take, by and by. */
static void
learn_time(const Batch *batch)
{
	int64		us;

	if (batch->applied == 0)
		return;
	us = Min((mono_now() - batch->began) / batch->applied, PG_INT32_MAX);
	caution.usual_us += (us - caution.usual_us) / 4;
}

/* Takes from the outcome of a batch how the next ones are to be run. */
void
caution_learn(const Batch *batch)
{
	learn_time(batch);
	if (batch->failed || (batch->careful && caution.savepoints == 0))
		caution.savepoints = CAREFUL_BATCHES;
	else if (caution.savepoints > 0)
		caution.savepoints--;
	caution.slowest_ms = Max(batch->slowest_ms, caution.slowest_ms - caution.slowest_ms / 16);
	if (batch->failed && batch->failure.late && batch->failure.class == FAILURE_COUNTS)
		caution.impatient_until = mono_later(IMPATIENT_MS);
}

/* Counts down ALONE: a batch has taken n deliveries. */
void
caution_taken(int n)
{
	caution.alone -= Min(caution.alone, n);
}

/* Begins ALONE: a batch of n deliveries was undone by an error that is no single message's. */
void
caution_undone(int n)
{
	caution.alone = n;
}

/* Counts down SUSPECTS: n of them were stored. */
void
caution_stored(int n)
{
	caution.suspects -= Min(caution.suspects, n);
}

/* Ends SUSPECTS: all that the process before may have tried has come again. */
void
caution_nothing_suspect(void)
{
	caution.suspects = 0;
}

/* Counts down SINGLY, for the next try from the waiting room; false: it is over. */
bool
caution_take_singly(void)
{
	if (caution.singly == 0)
		return false;
	caution.singly--;
	return true;
}

/* Begins SINGLY: a batch from the waiting room was undone, of limit messages at most. */
void
caution_room_undone(int limit)
{
	caution.singly = limit;
}

/* Ends SINGLY: the waiting room is empty, and no suspect will come into it. */
void
caution_room_empty(void)
{
	if (caution.suspects == 0)
		caution.singly = 0;
}
