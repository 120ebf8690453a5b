/*-------------------------------------------------------------------------
 *
 * reader.h
 *		Reading the outbox in batches, and what becomes of its messages.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_READER_H
#define PGF_READER_H

#include "postgres.h"

#include "publish/state.h"

/* A run of a topic of its own, and the part of a chunk that is read at once. */
#define RUN_MESSAGES	1000
#define RUN_BYTES		(4 * 1024 * 1024)
#define WHOLE_RUN		((RunLimit) {RUN_MESSAGES, RUN_BYTES})

/* Tells whether a message of the flow is to be passed over. */
typedef bool (*ReaderSkips) (struct Flow *flow, const Message *message);

extern void reader_load_cursor(Cursor *cursor);
extern Datum snapshot_keep(Datum snapshot);
extern void batch_release(Batch *batch);
extern Batch *batch_share(Batch *batch);

extern void cursor_set(Cursor *cursor, Datum base, Datum target, int64 last_id, const Unread *unread);
extern void cursor_leave(Cursor *cursor, const Cursor *main);
extern void cursor_go_back(Cursor *cursor, Batch *batch, int64 last_id);
extern void cursor_purge(Cursor *cursor, Datum snapshot);
extern void cursor_close(Cursor *cursor);
extern void cursor_free(Cursor *cursor);

extern void reader_begin_batch(Cursor *cursor, ScanWanted wanted);
extern bool reader_is_ahead(void);
extern bool reader_finds_ahead(void);
extern bool reader_is_finding(const Cursor *main);
extern bool reader_find_ahead(const Cursor *main, int blocks, ScanWanted found);
extern bool reader_find(Cursor *cursor, int blocks);
extern void reader_fill(Cursor *cursor, Chunk *chunk, RunLimit limit, Run *(*run_for) (Chunk *chunk, int32 topic_id));

extern Run *reader_read_topic(Cursor *cursor, const Cursor *main, struct Flow *flow, RunLimit limit, int blocks,
							  ReaderSkips skips);
extern void reader_begin_count(BatchScan *scan, const Cursor *main, const Unread *unread, ScanWanted found);
extern bool reader_count(BatchScan *scan, int blocks, bool *moved);
extern void reader_end_count(BatchScan *scan);
extern Run *reader_read_held(struct Flow *flow, int32 topic_id, int64 after_id, RunLimit limit, bool *last);

extern Run *run_create(struct Flow *flow, Batch *batch);
extern void run_free(Run *run);
extern void reader_free_body(Message *message);

extern void reader_hold(Message **messages, int n);
extern void reader_bury(const Message *message, const char *topic);
extern bool reader_lock_held(Message **messages, int *n);
extern void reader_release(Message **messages, int n);
extern int	reader_topics_held(int32 **topic_ids);

#endif							/* PGF_READER_H */
