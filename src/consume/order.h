/*-------------------------------------------------------------------------
 *
 * order.h
 *		Which messages must wait for others, told by their keys.
 *
 * Pure: no PostgreSQL, no broker.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ORDER_H
#define PGF_ORDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * A message has no, one or two keys (two: its change moved the row from one key
 * to another).  A barrier (TRUNCATE) waits for all before it, and all after it
 * wait for the barrier, but for those that wait for nothing.
 */
typedef struct OrderItem
{
	uint64_t	keys[2];		/* hashes; a collision only costs time */
	int			nkeys;
	bool		barrier;
	bool		free;			/* waits for nothing, and nobody for it; it
								 * has no key */
} OrderItem;

/* The keys that messages further on must not overtake. */
typedef struct Order
{
	uint64_t   *keys;			/* a set, open addressing; 0 marks a free
								 * place */
	size_t		room;			/* of the set: a power of two, or 0 */
	size_t		nkeys;
	bool		any;			/* a message waits, perhaps without a key */
	bool		barrier;		/* a barrier waits */
} Order;

extern void order_clear(Order *order);
extern bool order_blocks(const Order *order, const OrderItem *item);
extern bool order_add(Order *order, const OrderItem *item);

#endif							/* PGF_ORDER_H */
