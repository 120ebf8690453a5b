/*-------------------------------------------------------------------------
 *
 * passive.h
 *		Databases that neither publish nor consume.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_PASSIVE_H
#define PGF_PASSIVE_H

#include "postgres.h"

extern char *passive_reason(MemoryContext context);

#endif							/* PGF_PASSIVE_H */
