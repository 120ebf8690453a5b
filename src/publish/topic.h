/*-------------------------------------------------------------------------
 *
 * topic.h
 *		The topics of a database, as its publisher knows them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TOPIC_H
#define PGF_TOPIC_H

#include "postgres.h"

#include "publish/state.h"

/* Who keeps what is carried over when the catalog is read again: flow.c, topology.c. */
typedef struct TopicKeepers
{
	void		(*create) (Topic *topic);
	bool		(*at_rest) (const Topic *topic);
	void		(*free) (Topic *topic);
	void		(*drop_changed) (Topic *topic);
	void		(*inherit) (Topic *topic, Binding *binding, const Binding *old);
	void		(*gone) (Topic *topic);
} TopicKeepers;

extern void topic_init(const TopicKeepers *who);
extern bool topic_changed(void);
extern void topic_load(void);
extern uint32 topic_loads(void);
extern Topic *topic_find(int32 topic_id);
extern Topic *topic_find_or_add(int32 topic_id);
extern Topic *topic_next(int *i);
extern Binding *topic_binding(const Topic *topic, const char *consumer_group);

#endif							/* PGF_TOPIC_H */
