/*-------------------------------------------------------------------------
 *
 * events.c
 *		What the broker has said and nobody has fetched yet.
 *
 * A queue that grows by doubling, up to EVENTS_MAX events and DELIVERED_MAX
 * bytes of deliveries: no honest broker has more to say while the caller waits
 * for something else.  A queue that is empty begins at its front again, so
 * that one that is emptied now and then stays as small as its longest run.
 *
 * Owns the deliveries in it.
 *
 * Must never: grow beyond these limits.  Which events are out of date is for the caller
 * to find: "life" (channels.c).
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/events.h"
#include "broker/message.h"

/*
 * Limits the events in the queue.  A window of 65535 unconfirmed messages gives rise
 * to no more: a return and an ack for each.
 */
#define EVENTS_MAX			(128 * 1024)

/* Limits the bytes of deliveries in the queue; consumers stop reading long before. */
#define DELIVERED_MAX		((size_t) 1024 * 1024 * 1024)

static void clear_event(BrokerEvent *event);

/* Frees the queue and the deliveries in it. */
void
events_destroy(EventQueue *queue)
{
	for (size_t i = queue->first; i < queue->last; i++)
		broker_free_delivery(queue->events[i].event.delivery);
	free(queue->events);
	memset(queue, 0, sizeof(*queue));
}

/*
 * Appends an event, empty but for its type and channel, for the caller to fill.
 * Returns NULL if the queue is full, or there is no memory.
 */
BrokerEvent *
events_push(EventQueue *queue, BrokerEventType type, int channel, uint32_t life)
{
	QueuedEvent *queued;

	if (queue->first == queue->last)
		queue->first = queue->last = 0;
	if (queue->last == queue->capacity)
	{
		size_t		capacity = queue->capacity ? 2 * queue->capacity : 64;
		QueuedEvent *events = NULL;

		if (capacity <= EVENTS_MAX)
			events = realloc(queue->events, capacity * sizeof(QueuedEvent));
		if (events == NULL)
			return NULL;
		queue->events = events;
		queue->capacity = capacity;
	}

	queued = &queue->events[queue->last++];
	queued->life = life;
	clear_event(&queued->event);
	queued->event.type = type;
	queued->event.channel = channel;
	return &queued->event;
}

/* Appends a delivery, which is the queue's from then on.  Returns false if it is full. */
bool
events_push_delivery(EventQueue *queue, int channel, uint32_t life, BrokerDelivery *delivery)
{
	BrokerEvent *event = NULL;

	if (queue->delivered <= DELIVERED_MAX)
		event = events_push(queue, BROKER_DELIVERY, channel, life);
	if (event == NULL)
		return false;
	event->delivery = delivery;
	queue->delivered += delivery->size;
	return true;
}

/* Takes the first event out, and its delivery.  Returns false if there is none. */
bool
events_pop(EventQueue *queue, BrokerEvent *event, uint32_t *life)
{
	QueuedEvent *next;

	if (queue->first == queue->last)
		return false;
	next = &queue->events[queue->first++];
	*event = next->event;
	*life = next->life;
	if (next->event.delivery != NULL)
		queue->delivered -= next->event.delivery->size;
	return true;
}

/* All but the text beyond its first byte: most events have none. */
static void
clear_event(BrokerEvent *event)
{
	event->tag = 0;
	event->multiple = false;
	event->code = event->class_id = event->method_id = 0;
	event->messages = event->consumers = 0;
	event->message_id[0] = '\0';
	event->delivery = NULL;
	event->text[0] = '\0';
}
