/*-------------------------------------------------------------------------
 *
 * hooks.h
 *		Object-access and utility hooks.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_HOOKS_H
#define PGF_HOOKS_H

/* Installs the hooks before those already there; from _PG_init, under preload. */
extern void hooks_init(void);

#endif							/* PGF_HOOKS_H */
