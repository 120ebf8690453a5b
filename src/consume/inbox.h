/*-------------------------------------------------------------------------
 *
 * inbox.h
 *		Which messages were applied, or given up.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_INBOX_H
#define PGF_INBOX_H

#include "postgres.h"

#include "consume/delivery.h"
#include "consume/owner.h"
#include "consume/subscription.h"

extern void inbox_init(void);
extern void inbox_look_up(int32 inbox_id, Delivery **deliveries, int n);
extern void inbox_record(int32 inbox_id, Delivery **deliveries, int n);

#endif							/* PGF_INBOX_H */
