/*-------------------------------------------------------------------------
 *
 * ids.h
 *		Ids of messages: numbers of one sequence, which never go back.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_IDS_H
#define PGF_IDS_H

#include "postgres.h"

extern int64 ids_draw(int count);

#endif							/* PGF_IDS_H */
