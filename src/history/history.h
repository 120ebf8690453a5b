/*-------------------------------------------------------------------------
 *
 * history.h
 *		The worker that sends rows and messages of the past.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_HISTORY_H
#define PGF_HISTORY_H

#include "postgres.h"

#include "access/transam.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "utils/rel.h"
#include "utils/reltrigger.h"

#include "server/monotime.h"

/* main_arg: the slot, as the launcher packed it for worker_attach(). */
extern PGDLLEXPORT void pg_fanout_history_main(Datum main_arg);

/* A statement of a walk, prepared; sql: NULL before the first use. */
typedef struct WalkQuery
{
	char	   *sql;
	int			nargs;
	Oid			types[2 * INDEX_MAX_KEYS];	/* of the arguments */
	SPIPlanPtr	plan;
} WalkQuery;

/* A backfill or replay that runs: what its row in fanout.backfill does not say. */
typedef struct Walk
{
	int64		id;
	int32		topic_id;
	bool		recovers;		/* it moves dead letters */
	bool		listed;			/* it still runs */
	int			rows;			/* for the next transaction */
	uint64		previous_xid;	/* of its transactions that may not be sent
								 * yet; */
	uint64		last_xid;		/* 0: none */
	bool		must_drain;		/* nothing more until all is sent */
	MonoTime	next_at;
	int			failures;		/* in a row */
	long		pause;			/* ms, of the last wait for what is unsent */
	WalkQuery	bounds;
	WalkQuery	read;
} Walk;

/* The row of fanout.backfill, locked; texts in the current context. */
typedef struct WalkRow
{
	char	   *kind;
	Oid			entity;
	char	   *schema;			/* the table's name when it was declared;
								 * NULL: there is no table */
	char	   *table;
	char	   *topic;
	char	   *queue;			/* NULL: the topic's exchange */
	bool		bound;			/* the queue's binding is there */
	char	   *where;			/* NULL: all rows */
	int32		rate;			/* rows per second; 0: no limit */
	int			nkeys;			/* 0: by place in the file */
	int16	   *keys;
	int			nposition;		/* 0: at the beginning */
	char	  **position;
	char	   *order;			/* in which position stands; NULL: in none */
	Oid			file;
	bool		walked;			/* all rows are written */
	int64		done;			/* rows looked at, or dead letters moved */
	int64		sent;
	int64		estimated;		/* -1: not known */
	bool		again;			/* a replay, under new message ids */
	bool		repair;			/* a comparison that mends what differs */
} WalkRow;

/* What a step has done. */
typedef struct WalkStep
{
	int64		rows;			/* looked at */
	int64		sent;			/* of these, written to the outbox */
	Size		bytes;
	bool		walked;
	int			nposition;
	char	  **position;		/* the next step goes on behind it */
	char	   *order;			/* that of the key; NULL: there is none */
	Oid			file;
	const char *failure;		/* NULL, or why it cannot go on */
	int64		estimated;		/* of a recovery; -1: not known */
	const char *waits;			/* NULL, or why a recovery stands still */
} WalkStep;

/* Between which keys the rows of a step lie: texts, in the key's order. */
typedef struct WalkRange
{
	char	  **after;			/* NULL: from the beginning */
	char	  **upto;			/* included; NULL: to the end */
} WalkRange;

extern Relation backfill_open_entity(FunctionCallInfo fcinfo, const char *detail);
extern int64 backfill_declare(FunctionCallInfo fcinfo, const char *sql, int nargs, Oid *types);
extern void backfill_step(Walk *walk, const WalkRow *row, WalkStep *step);
extern void backfill_end(const Walk *walk, const WalkRow *row);

extern char *compare_snapshot(void);
extern Size compare_write(const Walk *walk, const WalkRow *row, Relation rel, Trigger *trigger,
						  const WalkRange *range, const char *snapshot);
extern void compare_end(const Walk *walk, const char *failure);

extern void replay_step(Walk *walk, const WalkRow *row, WalkStep *step);
extern void replay_end(const Walk *walk, const WalkRow *row);

extern void recover_step(Walk *walk, const WalkRow *row, WalkStep *step);
extern int64 recover_stop(int64 walk_id, bool polite);

#endif							/* PGF_HISTORY_H */
