/*-------------------------------------------------------------------------
 *
 * flight.h
 *		Which message may be published next.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_FLIGHT_H
#define PGF_FLIGHT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Messages of the same key are in flight one at a time: once the broker has
 * been given two, a refusal of the first (a nack, a return) can no longer
 * keep the second from overtaking it.
 *
 * A message has no, one or two keys (two: its change moved the row from one
 * key to another).  It waits for the message before it on each of them.  A
 * barrier (TRUNCATE) waits for all messages before it, and all after it wait.
 */
typedef struct FlightItem
{
	uint64_t	keys[2];		/* hashes; a collision only costs time */
	int			nkeys;
	bool		barrier;

	/* the flight's own */
	int			waits_for;
	struct FlightItem *waiting[2];	/* who waits, on each key */
	struct FlightItem *next;	/* in the queue it is in */
} FlightItem;

typedef struct FlightQueue
{
	FlightItem *head;
	FlightItem *tail;
} FlightQueue;

typedef struct FlightKey
{
	uint64_t	key;
	FlightItem *last;			/* newest item of the key; NULL: free slot */
} FlightKey;

typedef struct Flight
{
	FlightQueue arriving;		/* behind a barrier */
	FlightQueue ready;			/* may be published */
	size_t		unsettled;		/* admitted (past arriving) and not settled */
	bool		barrier;		/* the last one admitted is a barrier */
	FlightKey  *keys;			/* open addressing */
	size_t		nslots;			/* a power of two */
	size_t		nkeys;
} Flight;

/*
 * max_items bounds the items between flight_add() and flight_settle(); the
 * caller provides flight_key_slots(max_items) zeroed slots.
 */
extern size_t flight_key_slots(size_t max_items);
extern void flight_init(Flight *flight, FlightKey *slots, size_t nslots);

extern void flight_add(Flight *flight, FlightItem *item);

/* The next item that may be published, or NULL; it is out of the queue. */
extern FlightItem *flight_next(Flight *flight);
extern bool flight_has_ready(const Flight *flight);

/*
 * Published, but not known to have arrived: first in line again.  To keep the
 * order of several, put them back from the last to the first.
 */
extern void flight_put_back(Flight *flight, FlightItem *item);

/* Done with, one way or another: those who waited for it may go. */
extern void flight_settle(Flight *flight, FlightItem *item);

#endif							/* PGF_FLIGHT_H */
