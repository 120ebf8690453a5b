/*-------------------------------------------------------------------------
 *
 * maintenance.h
 *		What a publisher does by the clock: the ring of segments, counters, and
 *		the upkeep of the consuming half.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_MAINTENANCE_H
#define PGF_MAINTENANCE_H

#include "postgres.h"

/*
 * What a publisher does for the consumers of its database, whose code is above
 * its own: publish_subscriptions() puts into shared memory which workers there
 * should be, and returns how many found no place; rotate_inbox() forgets what was
 * applied longer ago than the retention, in seconds.
 */
typedef struct ConsumerUpkeep
{
	int			(*publish_subscriptions) (void);
	void		(*rotate_inbox) (int retention_s);
} ConsumerUpkeep;

extern void maintenance_set_upkeep(const ConsumerUpkeep *upkeep);
extern int	maintenance_publish_subscriptions(void);
extern void maintenance_rotate_inbox(int retention_s);
extern void maintenance_bind_grants(void);
extern void maintenance_add_tallies(void);

extern int	maintenance_current_segment(void);
extern int	maintenance_rotate(int retention_s, void (*in_the_way) (int32 topic_id));
extern void maintenance_count_sent(Datum *topic_ids, Datum *counts, int n, double seconds);

#endif							/* PGF_MAINTENANCE_H */
