/*-------------------------------------------------------------------------
 *
 * progress.h
 *		What is recorded of topics.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_PROGRESS_H
#define PGF_PROGRESS_H

#include "postgres.h"

#include "publish/state.h"
#include "server/monotime.h"

extern bool flow_unrecorded(void);
extern void flow_record_all(uint64 *recorded);
extern void flow_record_run(Run *run);
extern void flow_record_position(Flow *flow, bool attached, int64 count);
extern bool flow_stalls_unrecorded(void);
extern void flow_record_stalls(void);

#endif							/* PGF_PROGRESS_H */
