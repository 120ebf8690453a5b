/*-------------------------------------------------------------------------
 *
 * segment.h
 *		Tables in a ring of segments: outbox, ledger, inbox.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SEGMENT_H
#define PGF_SEGMENT_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "utils/relcache.h"

/* fanout.<table>_<segment>.  InvalidOid if there is no such table. */
extern Oid	segment_oid(const char *table, int segment);

/*
 * Raises an error (55000) unless the table's first columns have the types of desc.
 */
extern void segment_check_columns(Relation rel, TupleDesc desc);

/* Is it a B-tree of columns, of all rows, as the install script makes them? */
extern bool segment_is_plain_index(Relation index);

/* Has no row, dead or alive. */
extern bool segment_empty(Oid segment);

/*
 * Inserts rows, formed by desc, which must have the table's first columns; their
 * memory belongs to the current context from then on.  If there are several,
 * none may be so large that it would be toasted.  Needs no right to the table,
 * and an active snapshot.  An error if the row is not there afterwards.
 */
extern void segment_insert(Oid segment, TupleDesc desc, HeapTuple *rows, int n);

/*
 * The same for a segment of the outbox, by its number, and at least one row: appends
 * them behind what is there, as the reader relies on (insertion.c).  Where it cannot,
 * because a superuser has added something to the table, it says so; see
 * segment_scattered().
 */
extern void segment_append(int number, TupleDesc desc, HeapTuple *rows, int n);

/*
 * Records that the current transaction puts rows into a segment of the outbox in
 * another way, so that they may be anywhere in it and the reader has to read all of
 * it.
 */
extern void segment_scattered(int number);

/*
 * Takes ACCESS EXCLUSIVE until the transaction ends; false, without waiting,
 * if anybody has any lock on it.
 */
extern bool segment_lock(Oid segment);

/* Once it is locked. */
extern void segment_truncate(Oid segment);

#endif							/* PGF_SEGMENT_H */
