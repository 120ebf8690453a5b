/*-------------------------------------------------------------------------
 *
 * catchup.h
 *		Topics that have left the main cursor: trying again, reading, joining.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CATCHUP_H
#define PGF_CATCHUP_H

#include "postgres.h"

#include "publish/state.h"
#include "server/monotime.h"

extern bool flow_try_all(bool connected);
extern bool flow_read_all(bool connected);
extern size_t flow_main_share(void);
extern void flow_join_all(bool connected);
extern MonoTime flow_next_retry(bool connected);
extern bool flow_anything_waits(uint64 number);
extern void flow_move_to_held(int32 topic_id);

#endif							/* PGF_CATCHUP_H */
