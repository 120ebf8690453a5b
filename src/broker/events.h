/*-------------------------------------------------------------------------
 *
 * events.h
 *		What the broker has said and nobody has fetched yet.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_EVENTS_H
#define PGF_EVENTS_H

#include "broker/types.h"

typedef struct QueuedEvent
{
	BrokerEvent event;
	uint32_t	life;			/* of its channel, see channels.c */
} QueuedEvent;

typedef struct EventQueue
{
	QueuedEvent *events;		/* [first .. last - 1] are queued */
	size_t		first;
	size_t		last;
	size_t		capacity;
	size_t		delivered;		/* bytes of the deliveries among them */
} EventQueue;

extern void events_destroy(EventQueue *queue);
extern BrokerEvent *events_push(EventQueue *queue, BrokerEventType type, int channel, uint32_t life);
extern bool events_push_delivery(EventQueue *queue, int channel, uint32_t life,
								 BrokerDelivery *delivery);
extern bool events_pop(EventQueue *queue, BrokerEvent *event, uint32_t *life);

#endif							/* PGF_EVENTS_H */
