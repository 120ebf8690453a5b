/*-------------------------------------------------------------------------
 *
 * caution.h
 *		How carefully messages are tried, by what has happened of late.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CAUTION_H
#define PGF_CAUTION_H

#include "postgres.h"

#include "consume/apply.h"

typedef struct Caution
{
	int			savepoints;		/* batches to be run with savepoints */
	int			alone;			/* deliveries to be applied in batches of one */
	int			suspects;		/* deliveries that may have ended the process
								 * before, at most */
	int			singly;			/* tries from the waiting room to be made
								 * singly, and recorded before */
	MonoTime	impatient_until;
	int			slowest_ms;		/* of the calls of late */
	int			usual_us;		/* time of a message, of late */
} Caution;

/* Written in caution.c alone. */
extern Caution caution;

extern void caution_begin(bool clean);
extern bool caution_impatient(void);
extern void caution_prepare(Batch *batch);
extern void caution_learn(const Batch *batch);
extern void caution_taken(int n);
extern void caution_undone(int n);
extern void caution_stored(int n);
extern void caution_nothing_suspect(void);
extern bool caution_take_singly(void);
extern void caution_room_undone(int limit);
extern void caution_room_empty(void);

#endif							/* PGF_CAUTION_H */
