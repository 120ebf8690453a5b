/*-------------------------------------------------------------------------
 *
 * taken.h
 *		Keys that a row leaves when another row has them already.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TAKEN_H
#define PGF_TAKEN_H

#include "postgres.h"

#include "access/htup.h"
#include "utils/rel.h"

#include "capture/cache.h"

extern HeapTuple taken_find(const CaptureInfo *info, Relation rel, HeapTuple left);

#endif							/* PGF_TAKEN_H */
