/*-------------------------------------------------------------------------
 *
 * maintenance.h
 *		What a publisher does by the clock: the ring of segments, counters.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_MAINTENANCE_H
#define PGF_MAINTENANCE_H

#include "postgres.h"

extern int	maintenance_current_segment(void);
extern int	maintenance_rotate(int retention_s);
extern void maintenance_count_sent(const int32 *topic_ids, const int64 *counts, int n, double seconds);

#endif							/* PGF_MAINTENANCE_H */
