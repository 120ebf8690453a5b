/*-------------------------------------------------------------------------
 *
 * writer.h
 *		Rows into the outbox's segments, a statement's together.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WRITER_H
#define PGF_WRITER_H

#include "postgres.h"

#include "access/tupdesc.h"

/* Without it nothing is queued. */
extern void writer_init(void);

/* Puts a row, all columns of fanout.outbox, into a segment. */
extern void writer_insert(int segment, TupleDesc desc, Datum *values, bool *nulls);

/*
 * The same, but the row may wait until the statement ends, the transaction or
 * subtransaction is to commit, or enough rows have come together.  The
 * descriptor must live as long as the session.
 */
extern void writer_queue(int segment, TupleDesc desc, Datum *values, bool *nulls);

#endif							/* PGF_WRITER_H */
