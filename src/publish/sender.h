/*-------------------------------------------------------------------------
 *
 * sender.h
 *		Publishes the messages of all topics, each on a channel of its own.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SENDER_H
#define PGF_SENDER_H

#include "postgres.h"

#include "broker/connection.h"
#include "publish/flow.h"

/*
 * Channels besides those of topics: for requests, and some that are being closed, or are not,
 * while a queue hangs.
 */
#define OTHER_CHANNELS 32

extern void sender_init(Connection *connection);
extern void sender_update(Flow *flow);
extern void sender_release(Flow *flow);
extern bool sender_lags(const Flow *flow);
extern int	sender_patience_ms(void);

extern bool sender_publish(bool (*take_events) (void));
extern bool sender_may_publish(void);
extern bool sender_idle(void);
extern bool sender_is_slow(const Flow *flow, MonoTime now);
extern bool sender_is_passed(const Flow *flow, MonoTime now, int ms);
extern bool sender_is_late(const Flow *flow, MonoTime now, int ms);

extern bool sender_owns(int channel);
extern void sender_opened(int channel);
extern const char *sender_confirmed(const BrokerEvent *event);
extern const char *sender_returned(const BrokerEvent *event);
extern bool sender_closed(const BrokerEvent *event);
extern bool sender_doubtful(const BrokerEvent *event);
extern bool sender_suspects(void);
extern void sender_lost(const BrokerEvent *event, bool request);

extern const char *sender_check(MonoTime now, MonoTime unblocked_at);
extern void sender_heard(void);
extern MonoTime sender_heard_at(void);
extern long sender_timeout(MonoTime now);

#endif							/* PGF_SENDER_H */
