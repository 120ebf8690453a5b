/*-------------------------------------------------------------------------
 *
 * clock.h
 *		The clock of all deadlines in the broker layer.
 *
 * Pure: no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CLOCK_H
#define PGF_CLOCK_H

#include <stdint.h>

/* The time now, in milliseconds; it never goes back. */
extern int64_t clock_ms(void);

/* The milliseconds until a deadline, 0 if it has passed. */
extern long clock_left(int64_t deadline);

#endif							/* PGF_CLOCK_H */
