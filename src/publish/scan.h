/*-------------------------------------------------------------------------
 *
 * scan.h
 *		Finds the rows of a batch in the segments of the outbox.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SCAN_H
#define PGF_SCAN_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "datatype/timestamp.h"
#include "storage/block.h"
#include "storage/off.h"

#include "capture/outboxrow.h"
#include "server/tables.h"

/*
 * For each segment: as long as it is stored in that file (pg_class.relfilenode), all
 * rows that are ever committed and not visible in some base lie in this block or
 * behind it.
 */
typedef struct Unread
{
	Oid			files[OUTBOX_SEGMENTS];
	BlockNumber blocks[OUTBOX_SEGMENTS];
} Unread;

/* A row of a batch: where it is. */
typedef struct Entry
{
	int64		id;
	BlockNumber block;
	int32		topic_id;
	OffsetNumber offset;
	uint16		segment;
} Entry;

/* Blocks to be read. */
typedef struct Range
{
	int			segment;
	BlockNumber first;
	BlockNumber behind;			/* the first one that is not read */
} Range;

/* A row that was found, with its buffer locked. */
typedef struct ScanRow
{
	int64		id;
	uint64		xid;
	int32		topic_id;
	bool		again;			/* it was found before, in another pass or
								 * scan */
	HeapTuple	tuple;
	TupleDesc	desc;
} ScanRow;

/*
 * Is a row to be among the entries?  Called for each row of a batch, in each pass.  Must
 * not wait.
 */
typedef bool (*ScanWanted) (const ScanRow *row);

/* A batch: the rows that base does not show and target does. */
typedef struct BatchScan
{
	Datum		base;			/* pg_snapshots, the caller's */
	Datum		target;
	int32		topic_id;		/* rows of this topic alone; 0: those that are
								 * wanted */
	ScanWanted	wanted;
	Datum		purged;			/* pg_snapshot: what it shows is passed over,
								 * too; 0: none */
	Unread		unread;			/* with respect to base */
	bool		has_rows[OUTBOX_SEGMENTS];
	Range	   *ranges;			/* where its rows are */
	int			nranges;
	Entry	   *entries;		/* found and not taken yet, in order of id */
	int			count;
	int			next;
	int			room;
	bool		more;			/* there are rows behind the entries: ids
								 * above the last of them */

	/* the pass over the ranges that is under way */
	bool		passing;
	bool		again;			/* these rows were found before */
	bool		first;			/* it is the main batch's first one */
	int			range;
	BlockNumber block;			/* in that range, the next one */
	int64		after_id;		/* rows with ids up to here are passed over */
	int64		cut_id;			/* and those from here on, 0: none */
	bool		read[OUTBOX_SEGMENTS];	/* first: segments whose floor moves */
	BlockNumber committed[OUTBOX_SEGMENTS]; /* the last block with a row */
	BlockNumber cut[OUTBOX_SEGMENTS];	/* the lowest block of rows that were
										 * cut off */
} BatchScan;

extern void scan_load(const Unread *unread);
extern bool scan_sees(Datum snapshot, uint64 xid);
extern TimestampTz scan_created_at(const ScanRow *row);
extern void scan_message_id(const ScanRow *row, char message_id[37]);
extern void scan_unread(Unread *unread);
extern void scan_begin(void);
extern void scan_open(void);
extern void scan_batch(BatchScan *scan, Datum base, Datum target, int64 after_id, const bool *anywhere,
					   ScanWanted wanted, bool resumed);
extern void scan_topic(BatchScan *scan, Datum base, Datum target, int64 after_id, int32 topic_id,
					   const Unread *unread, const bool *anywhere, Datum purged);
extern void scan_found(BatchScan *scan, Datum base, Datum target, int64 after_id, ScanWanted wanted,
					   const Unread *unread, const bool *anywhere);
extern bool scan_step(BatchScan *scan, int blocks);
extern bool scan_moved(const BatchScan *scan);
extern void scan_check(const BatchScan *scan);
extern const Entry *scan_next(BatchScan *scan);
extern HeapTuple scan_fetch(const Entry *entry, TupleDesc *desc);
extern void scan_close(void);
extern void scan_left(const BatchScan *scan, Unread *unread);
extern void scan_end(BatchScan *scan);

#endif							/* PGF_SCAN_H */
