/*-------------------------------------------------------------------------
 *
 * insertion.h
 *		Announces insertions into the outbox to whoever reads it by place.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_INSERTION_H
#define PGF_INSERTION_H

#include "postgres.h"

#include "storage/block.h"
#include "utils/relcache.h"

#include "server/shmem.h"

extern void insertion_begin(Relation rel, int segment);
extern void insertion_end(void);

extern bool insertion_take(DatabaseSlot *slot, int segment);
extern bool insertion_marked(DatabaseSlot *slot, int segment);
extern void insertion_oldest(const Oid *relids, BlockNumber * oldest, int n);

#endif							/* PGF_INSERTION_H */
