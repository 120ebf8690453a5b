/*-------------------------------------------------------------------------
 *
 * order.h
 *		Which deliveries wait behind which.
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
 * A delivery has no, one or two keys (two: its change moved the row from one
 * key to another).  It has to wait as long as an earlier one of any of its
 * keys failed, or waits itself.  A barrier (TRUNCATE) waits for all before it,
 * and all after it wait.
 */
typedef struct OrderItem
{
	uint64_t	keys[2];		/* hashes; a collision only costs time */
	int			nkeys;
	bool		barrier;
	bool		pinned;			/* failed: leaves by order_remove() alone */

	/* the order's own */
	struct OrderItem *previous;
	struct OrderItem *next;
} OrderItem;

typedef struct Order
{
	OrderItem  *first;			/* those that failed or wait, oldest first */
	OrderItem  *last;
	size_t		count;

	/* what they keep from being handled */
	uint64_t   *keys;			/* a set: open addressing, 0 is a free place */
	size_t		nplaces;		/* a power of two, or 0 */
	size_t		nkeys;
	size_t		blocking;		/* how many of them are in the set */
	bool		barrier;		/* one of these is a barrier */
	bool		stale;			/* some may go: order_release() */
} Order;

/* Begins empty; what was in it is forgotten, and the memory kept. */
extern void order_init(Order *order);
extern void order_clear(Order *order);

/* Must the item wait? */
extern bool order_blocks(const Order *order, const OrderItem *item);

/* The youngest of those that failed or wait.  False: out of memory. */
extern bool order_add(Order *order, OrderItem *item);

/* Done with, or never to be seen again. */
extern void order_remove(Order *order, OrderItem *item);

/*
 * Hands over, oldest first, those that need not wait any more; they are out of
 * the order then, unless release() returns false after it has pinned them.
 */
extern void order_release(Order *order, bool (*release) (OrderItem *item, void *arg), void *arg);

#endif							/* PGF_ORDER_H */
