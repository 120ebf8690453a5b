/*-------------------------------------------------------------------------
 *
 * nesting.h
 *		Ids of messages in the order of the changes, also where statements nest.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_NESTING_H
#define PGF_NESTING_H

#include "postgres.h"

extern void nesting_init(void);

extern int64 nesting_take_id(bool counted);

#endif							/* PGF_NESTING_H */
