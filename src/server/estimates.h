/*-------------------------------------------------------------------------
 *
 * estimates.h
 *		What the planner takes the extension's tables for.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ESTIMATES_H
#define PGF_ESTIMATES_H

#include "postgres.h"

extern void estimates_init(void);
extern void estimates_all_large(bool on);

#endif							/* PGF_ESTIMATES_H */
