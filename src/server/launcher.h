/*-------------------------------------------------------------------------
 *
 * launcher.h
 *		Which databases need which workers.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_LAUNCHER_H
#define PGF_LAUNCHER_H

#include "postgres.h"

extern void launcher_register(void);	/* from _PG_init, under preload */
extern PGDLLEXPORT void pg_fanout_launcher_main(Datum main_arg);

#endif							/* PGF_LAUNCHER_H */
