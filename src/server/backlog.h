/*-------------------------------------------------------------------------
 *
 * backlog.h
 *		How many messages wait for each topic, in shared memory.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_BACKLOG_H
#define PGF_BACKLOG_H

#include "postgres.h"

#include "datatype/timestamp.h"

typedef struct BacklogEntry BacklogEntry;

/* What an entry says. */
typedef struct BacklogFigures
{
	int32		topic_id;
	int64		pending;
	TimestampTz oldest;			/* created_at of the oldest one; 0: none */
} BacklogFigures;

extern Size backlog_shmem_size(void);
extern void backlog_shmem_init(void);
extern void backlog_clear(void);
extern BacklogEntry *backlog_add(int32 topic_id);
extern void backlog_remove(BacklogEntry *entry);
extern void backlog_set(BacklogEntry *entry, int64 pending, TimestampTz oldest);
extern bool backlog_next(int *i, BacklogFigures *figures);

#endif							/* PGF_BACKLOG_H */
