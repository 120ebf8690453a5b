/*-------------------------------------------------------------------------
 *
 * refused.h
 *		Settings whose value the server did not take.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_REFUSED_H
#define PGF_REFUSED_H

#include "postgres.h"

#include "nodes/pg_list.h"

/*
 * To be called while the library is being preloaded, before and after the
 * settings are defined: refused_collect() takes down what they are to be, and
 * refused_note() remembers what of that was not taken.
 */
extern List *refused_collect(void);
extern void refused_note(List *asked);

/*
 * Look at what ALTER DATABASE and ALTER ROLE have stored for this session; in a
 * worker, outside a transaction.  refused_note_stored() remembers what is wrong
 * with it when the worker begins.  refused_stored_mended(): was something, and
 * is nothing any more?  The next session will have the right values.
 */
extern void refused_note_stored(void);
extern bool refused_stored_mended(void);

/*
 * Returns what is wrong with the first setting that was refused and has not
 * been put right since, palloc'd, or NULL if there is none.  Shows no value of
 * pg_fanout.uri.
 */
extern char *refused_setting(void);

#endif							/* PGF_REFUSED_H */
