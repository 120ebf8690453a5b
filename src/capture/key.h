/*-------------------------------------------------------------------------
 *
 * key.h
 *		The keys of captured rows.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_KEY_H
#define PGF_KEY_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"

#include "capture/cache.h"

extern bool key_differs(const CaptureInfo *info, HeapTuple old_row, HeapTuple new_row, TupleDesc desc);
extern char *key_render(const CaptureInfo *info, HeapTuple row, TupleDesc desc);

#endif							/* PGF_KEY_H */
