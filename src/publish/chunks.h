/*-------------------------------------------------------------------------
 *
 * chunks.h
 *		What the main cursor has read and the ledger does not say yet.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CHUNKS_H
#define PGF_CHUNKS_H

#include "postgres.h"

#include "publish/run.h"
#include "server/monotime.h"

extern Chunk *chunks_create(void);
extern void chunks_append(Chunk *chunk);
extern void chunks_free(Chunk *chunk);
extern Chunk *chunks_first(void);
extern Chunk *chunks_last(void);
extern uint64 chunks_newest(void);
extern void chunks_set_room(size_t share);
extern RunLimit chunks_limit(void);
extern bool chunks_room(void);

extern void chunks_cut(Run *run);
extern void chunks_message_done(Run *run, const Message *message);
extern bool chunks_due(void);
extern MonoTime chunks_due_at(void);
extern bool chunks_one_waits(void);
extern Chunk *chunks_awaited(MonoTime *since);
extern Chunk *chunks_record(void (*record_run) (Run *run), int *count);

#endif							/* PGF_CHUNKS_H */
