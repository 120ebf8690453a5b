/*-------------------------------------------------------------------------
 *
 * confirms.h
 *		The window of messages published and not confirmed yet.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CONFIRMS_H
#define PGF_CONFIRMS_H

#include <stdbool.h>
#include <stdint.h>

/* Items by delivery tag: a ring from the oldest unsettled tag on. */
typedef struct Confirms
{
	void	  **items;			/* NULL: settled */
	uint64_t	capacity;
	uint64_t	oldest;			/* lowest tag that may be unsettled */
	uint64_t	next;			/* tag of the next publish */
	uint64_t	outstanding;	/* unsettled ones in [oldest, next) */
} Confirms;

/* Called for each item that a confirm settles, in order of tag. */
typedef void (*ConfirmsSettled) (void *item, void *arg);

/* The caller provides room for capacity items. */
extern void confirms_init(Confirms *window, void **items, uint64_t capacity);

/* Forgets everything; tags start at 1 again, as on a new channel. */
extern void confirms_reset(Confirms *window);

/* No room: the span from the oldest unsettled tag to the newest is used up. */
extern bool confirms_full(const Confirms *window);

/* The item was published; returns its delivery tag. */
extern uint64_t confirms_add(Confirms *window, void *item);

/*
 * Settles one tag, or with multiple everything outstanding up to it, in which
 * tags settled already are no error.  Returns false, and settles nothing, for
 * a tag that was never published, or single and settled already: the broker
 * has lost count, and the connection must not be trusted any longer.  So it is
 * with tag 0, by which AMQP means "all" (basic.ack): all that the broker had
 * seen when it said so, which nobody knows here.  RabbitMQ does not send it.
 */
extern bool confirms_settle(Confirms *window, uint64_t tag, bool multiple,
							ConfirmsSettled settled, void *arg);

/* Walks the outstanding items in order of tag until visit returns true. */
extern void *confirms_find(const Confirms *window,
						   bool (*visit) (void *item, void *arg), void *arg);

/* The outstanding item with the lowest tag, or NULL. */
extern void *confirms_oldest(const Confirms *window);

#endif							/* PGF_CONFIRMS_H */
