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

#include "capture/outboxrow.h"

/* Without it nothing is queued. */
extern void writer_init(void);

/* Puts a row into a segment of the outbox. */
extern void writer_insert(int segment, const OutboxRow *row);

/*
 * The same, but the row may wait until the statement ends, the transaction or
 * subtransaction is to commit, or enough rows have come together.
 */
extern void writer_queue(int segment, const OutboxRow *row);

#endif							/* PGF_WRITER_H */
