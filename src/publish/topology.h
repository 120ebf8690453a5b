/*-------------------------------------------------------------------------
 *
 * topology.h
 *		Declares on the broker what the catalog says.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TOPOLOGY_H
#define PGF_TOPOLOGY_H

#include "postgres.h"

#include "broker/connection.h"
#include "publish/state.h"

extern void topology_init(void (*declared) (Topic *topic), bool (*may_drop) (Topic *topic, uint32 load),
						  bool (*suspected) (void));
extern void topology_request(Topic *topic, bool first);
extern void topology_request_all(void);
extern bool topology_keeps(uint32 load);
extern void topology_drop(uint32 load);
extern void topology_unblocked(void);
extern const char *topology_check(MonoTime now, MonoTime heard_at);
extern void topology_forget_confirmed(bool anew);
extern void topology_forget_topic(Topic *topic);
extern void topology_recheck(int count);
extern void topology_inherit(Topic *topic, Binding *binding, const Binding *old);
extern void topology_drop_changed(Topic *topic);
extern void topology_forget(Topic *topic);

extern bool topology_step(Connection *conn);
extern void topology_opened(Connection *conn, int channel);
extern void topology_replied(Connection *conn, const BrokerEvent *event);
extern bool topology_refused(Connection *conn, const BrokerEvent *event);
extern void topology_lost(const BrokerEvent *event, bool doubtful);
extern bool topology_owns(int channel);
extern bool topology_busy(void);
extern bool topology_asks(void);
extern bool topology_channels_scarce(const Connection *conn);
extern bool topology_doubtful(const BrokerEvent *event);
extern MonoTime topology_timeout(void);

extern bool topology_ready(const Topic *topic);
extern const char *topology_error(const Topic *topic);
extern bool topology_unrecorded(void);
extern void topology_record(void);

#endif							/* PGF_TOPOLOGY_H */
