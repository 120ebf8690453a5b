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

/* fanout.<table>_<segment>.  InvalidOid if there is no such table. */
extern Oid	segment_oid(const char *table, int segment);

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
 * Takes ACCESS EXCLUSIVE until the transaction ends; false, without waiting,
 * if anybody has any lock on it.
 */
extern bool segment_lock(Oid segment);

/* Once it is locked. */
extern void segment_truncate(Oid segment);

#endif							/* PGF_SEGMENT_H */
