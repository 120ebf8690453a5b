/*-------------------------------------------------------------------------
 *
 * guard.h
 *		The triggers that keep foreign rows out of pg_fanout's own tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_GUARD_H
#define PGF_GUARD_H

#include "postgres.h"

/*
 * In a trigger function: is the change one that a worker of a subscription makes
 * by itself, rather than a trigger that it fires?
 */
extern bool guard_is_replicated(void);

#endif							/* PGF_GUARD_H */
