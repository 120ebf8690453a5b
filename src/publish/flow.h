/*-------------------------------------------------------------------------
 *
 * flow.h
 *		The state machine of one topic's messages.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_FLOW_H
#define PGF_FLOW_H

#include "postgres.h"

#include "publish/state.h"
#include "server/monotime.h"

/* The longest pause between attempts, unless pg_fanout.retry_interval is longer. */
#define MAX_RETRY_MS 300000

/*
 * Calls what publishes, which is above the flows: to tell it that it may have to, or must not
 * any more, and to ask whether its confirms take long.
 */
typedef struct FlowSender
{
	void		(*update) (Flow *flow);
	void		(*release) (Flow *flow);	/* the channel, and what is in
											 * flight */
	bool		(*lags) (const Flow *flow);
	int			(*patience_ms) (void);	/* a confirm may take so long */
} FlowSender;

extern bool flow_unknown_topic;

extern void flow_init(const Cursor *main, const FlowSender *to);
extern void flow_create(Topic *topic);
extern bool flow_at_rest(const Topic *topic);
extern void flow_free(Topic *topic);
extern void flow_load_detached(void);
extern void flow_load_stalls(void);
extern void flow_load_purges(void);
extern void flow_find_held(void);
extern void flow_reconsider(Topic *topic);
extern void flow_declared(Topic *topic);
extern bool flow_may_drop(Topic *topic, uint32 load);

extern bool flow_wanted(const ScanRow *row);
extern bool flow_found(const ScanRow *row);
extern bool flow_backlogs_counted(void);
extern bool flow_backlogs_shown(void);
extern void flow_leave_large(void);
extern bool flow_leave_much(void);
extern Run *flow_run_for(Chunk *chunk, int32 topic_id);
extern void flow_end_runs(Chunk *chunk);
extern void flow_admit(Run *run);
extern void flow_give_up(Flow *flow);
extern void flow_settle(Flow *flow);
extern void flow_leave(Flow *flow, bool keep);
extern void flow_let_pass(Flow *flow);
extern void flow_ride(Flow *flow);
extern void flow_refused(Flow *flow, int code, const char *reason);
extern bool flow_may_send(const Flow *flow);

/* For catchup.c, progress.c and recount.c. */
extern dlist_head flow_detached;	/* all that are not ATTACHED */
extern const Cursor *flow_main;
extern const FlowSender *flow_sender;

#define flow_in(list_node) dlist_container(Flow, node, list_node)

extern void flow_set_state(Flow *flow, FlowState state);
extern bool flow_reads_behind(const Flow *flow);
extern bool flow_is_gone(const Topic *topic);
extern bool flow_has_runs(const Flow *flow);
extern const Run *flow_own_run(const Flow *flow);
extern size_t flow_memory(const Flow *flow);
extern RunLimit flow_run_limit(size_t bytes);
extern void flow_recovered(Flow *flow);
extern void flow_add_backlog(Flow *flow, int64 count);
extern void flow_count_row(Flow *flow, const ScanRow *row);
extern void flow_set_backlog(Flow *flow, int64 count);
extern void flow_uncount(Flow *flow);
extern void flow_uncount_detached(void);
extern void flow_count_riding(void);
extern bool flow_has_purged_id(const Flow *flow, const char *message_id);
extern bool flow_has_purged(const Flow *flow, const ScanRow *row);
extern void flow_choose_mode(Flow *flow);
extern void flow_end_purges(Flow *flow);

#endif							/* PGF_FLOW_H */
