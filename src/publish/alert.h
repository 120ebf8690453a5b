/*-------------------------------------------------------------------------
 *
 * alert.h
 *		Notifications of topics that the broker refuses.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ALERT_H
#define PGF_ALERT_H

extern void alert_queue(const char *topic, int attempts, const char *error);
extern void alert_send(void);

#endif							/* PGF_ALERT_H */
