/*-------------------------------------------------------------------------
 *
 * test_events.c
 *		Unit tests of events.c.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/events.h"
#include "broker/message.h"
#include "tap.h"

static EventQueue queue;

static void
test_order(void)
{
	BrokerEvent event;
	uint32_t	life;
	uint64_t	pushed = 0;
	uint64_t	popped = 0;
	bool		in_order = true;

	ok(!events_pop(&queue, &event, &life), "an empty queue has nothing");
	for (int round = 0; round < 1000; round++)
	{
		for (int i = rand() % 100; i > 0; i--)
		{
			BrokerEvent *next = events_push(&queue, BROKER_ACK, 5, (uint32_t) pushed);

			next->tag = pushed++;
		}
		for (int i = rand() % 100; i > 0 && events_pop(&queue, &event, &life); i--)
		{
			in_order = in_order && event.tag == popped && life == popped && event.channel == 5;
			popped++;
		}
	}
	while (events_pop(&queue, &event, &life))
		in_order = in_order && event.tag == popped++;
	ok(in_order && popped == pushed, "events come out as they went in (%d)", (int) popped);
	event = *events_push(&queue, BROKER_RETURN, 1, 1);
	ok(event.tag == 0 && !event.multiple && event.code == 0 && event.class_id == 0 && event.messages == 0 &&
	   event.text[0] == '\0' && event.message_id[0] == '\0' && event.delivery == NULL, "a new event is empty");
	(void) events_pop(&queue, &event, &life);
}

static void
test_bounds(void)
{
	BrokerEvent event;
	uint32_t	life;
	int			n = 0;

	while (n < 1000000 && events_push(&queue, BROKER_ACK, 1, 1) != NULL)
		n++;
	ok(n == 128 * 1024, "the queue is bounded (%d)", n);
	while (events_pop(&queue, &event, &life))
		n--;
	ok(n == 0 && events_push(&queue, BROKER_ACK, 1, 1) != NULL, "and takes more once it is empty");
	(void) events_pop(&queue, &event, &life);
}

static BrokerDelivery *
new_delivery(size_t size)
{
	BrokerDelivery *delivery = calloc(1, sizeof(BrokerDelivery));

	if (delivery == NULL)
		abort();
	delivery->size = size;
	return delivery;
}

static void
test_deliveries(void)
{
	BrokerDelivery *third = new_delivery(1);
	BrokerEvent event;
	uint32_t	life;

	ok(events_push_delivery(&queue, 1, 1, new_delivery(1000)) && queue.delivered == 1000, "bytes of deliveries are counted");
	ok(events_push_delivery(&queue, 1, 1, new_delivery((size_t) 1024 * 1024 * 1024)), "one may go beyond the bound");
	ok(!events_push_delivery(&queue, 1, 1, third), "the next may not");
	broker_free_delivery(third);
	(void) events_pop(&queue, &event, &life);
	ok(event.type == BROKER_DELIVERY && event.delivery->size == 1000 &&
	   queue.delivered == (size_t) 1024 * 1024 * 1024, "one that is fetched does not count any more");
	broker_free_delivery(event.delivery);
	events_destroy(&queue);
	ok(queue.delivered == 0 && !events_pop(&queue, &event, &life), "the rest is freed with the queue");
}

int
main(void)
{
	test_order();
	test_bounds();
	test_deliveries();
	return done();
}
