/*-------------------------------------------------------------------------
 *
 * credit.h
 *		How much may be written before the kernel is asked again.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CREDIT_H
#define PGF_CREDIT_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of the send buffer that the kernel takes for a small write, besides its data; rounded up. */
#define WRITE_OVERHEAD		1024

typedef struct Credit
{
	size_t		max;
	size_t		left;
} Credit;

extern void credit_init(Credit *credit, size_t room);
extern void credit_refill(Credit *credit);
extern bool credit_covers(const Credit *credit, size_t bytes);
extern bool credit_take(Credit *credit, size_t bytes);
extern size_t credit_largest(const Credit *credit, size_t frame_max);

#endif							/* PGF_CREDIT_H */
