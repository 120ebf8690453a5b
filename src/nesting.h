/*-------------------------------------------------------------------------
 *
 * nesting.h
 *		Ids of messages whose triggers fire in another order than the changes.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_NESTING_H
#define PGF_NESTING_H

#include "postgres.h"

#include "access/htup.h"

/* At most: key and row identity, of the old row and of the new one. */
#define NESTING_IDENTITIES 4

/* One captured change, as far as its place in the order depends on it. */
typedef struct NestedChange
{
	Oid			relid;			/* table or partition that was written */
	uint64		entity;			/* of the capture: identities are its own */
	HeapTuple	old_row;		/* NULL: INSERT, TRUNCATE */
	HeapTuple	new_row;		/* NULL: DELETE, TRUNCATE */
	int			nold;			/* the first so many identities are of old_row */
	int			nidentities;
	uint64		identities[NESTING_IDENTITIES];
} NestedChange;

extern void nesting_init(void);

extern void nesting_enter_command(bool truncates);
extern void nesting_leave_command(void);

extern bool nesting_matters(void);
extern int64 nesting_draw(const NestedChange *change);
extern void nesting_fired(Oid relid, HeapTuple new_row);

#endif							/* PGF_NESTING_H */
