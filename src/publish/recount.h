/*-------------------------------------------------------------------------
 *
 * recount.h
 *		Counts anew what waits of topics that have left the main cursor.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_RECOUNT_H
#define PGF_RECOUNT_H

extern void recount_begin(void);
extern bool recount_step(void);

#endif							/* PGF_RECOUNT_H */
