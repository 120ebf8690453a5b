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
	bool		waiting;		/* pinned, and yet to be handed over */

	/* the order's own */
	uint64_t	place;			/* 0: has none yet */
	struct OrderItem *previous;
	struct OrderItem *next;
} OrderItem;

/* A key that is waited for. */
typedef struct OrderKey
{
	uint64_t	key;			/* 0: free */
	uint64_t	place;			/* of the first that has it */
} OrderKey;

/* What becomes of one that need not wait any more. */
typedef enum OrderVerdict
{
	ORDER_LEAVES,
	ORDER_STAYS,				/* those behind it wait */
	ORDER_STAYS_ALONE,			/* so do they, but they are asked about, too */
} OrderVerdict;

typedef struct Order
{
	OrderItem  *first;			/* those that failed or wait, oldest first */
	OrderItem  *last;
	size_t		count;

	/* what they keep from being handled */
	OrderKey   *keys;			/* a set: open addressing */
	size_t		room;			/* of the set: a power of two, or 0 */
	size_t		nkeys;
	uint64_t	lowest;			/* place of those that are in the set; 0: none */
	uint64_t	barrier;		/* of the first barrier among these; 0: none */
	uint64_t	last_place;		/* that was given to any */
	bool		stale;			/* some may go: order_release() */
} Order;

/* Begins empty; what was in it is forgotten, and the memory kept. */
extern void order_init(Order *order);
extern void order_clear(Order *order);

/* Must the item wait for one that is before it? */
extern bool order_blocks(const Order *order, const OrderItem *item);

/* Gives it the last place, unless it has one: when it comes. */
extern void order_place(Order *order, OrderItem *item);

/* In its place, the last if it has none yet.  False: out of memory. */
extern bool order_add(Order *order, OrderItem *item);

/* Done with, or never to be seen again. */
extern void order_remove(Order *order, OrderItem *item);

/*
 * Asks, oldest first, about those that need not wait any more, pinned ones
 * only if they are waiting.  release() must not change the order itself.
 */
extern void order_release(Order *order, OrderVerdict (*release) (OrderItem *item, void *arg), void *arg);

#endif							/* PGF_ORDER_H */
