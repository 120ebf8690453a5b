/*-------------------------------------------------------------------------
 *
 * condition.h
 *		The condition of most capture triggers, ready made.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CONDITION_H
#define PGF_CONDITION_H

#include "postgres.h"

#include "nodes/execnodes.h"

extern void condition_prepare(EState *estate, ExprState * counts, ExprState * never);

#endif							/* PGF_CONDITION_H */
