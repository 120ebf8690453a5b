/*-------------------------------------------------------------------------
 *
 * at_hand.c
 *		The deliveries that the worker has and has not acked.
 *
 *		(broker) -> TO BE TRIED -> (a batch) -> acked
 *		              ^    |          |  |
 *		              |    |   undone |  | failed, and the subscription wants
 *		              '----|----------'  | it back in its queue
 *		                   |             v
 *		                   |           HELD ---due---> given back
 *		                   v             v
 *		                   the connection is lost
 *
 * The deliveries to be tried are a list in order.  A batch takes from its head, and puts
 * back there what it did not get to.  Deliveries that are held have no body any more,
 * because the broker still has it, and are in no order.
 *
 * There are no more of both than the broker sends unacked: twice the prefetch at most
 * (too_many() in consumer.c), of a stream what fits into pg_fanout.consumer_memory.
 *
 * Must never: forget a delivery, but with its connection; then all of them come again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/timestamp.h"

#include "consume/at_hand.h"

AtHand		at_hand;

/* ---- those to be tried ---- */

/* Adds a delivery that has come behind the others. */
void
at_hand_append(Delivery *delivery)
{
	delivery->next = NULL;
	if (at_hand.last != NULL)
		at_hand.last->next = delivery;
	else
		at_hand.first = delivery;
	at_hand.last = delivery;
	at_hand.count++;
	at_hand.bytes += delivery->size;
}

static Delivery *
take_first(void)
{
	Delivery   *delivery = at_hand.first;

	at_hand.first = delivery->next;
	if (at_hand.first == NULL)
		at_hand.last = NULL;
	delivery->next = NULL;
	at_hand.count--;
	at_hand.bytes -= delivery->size;
	return delivery;
}

static void
put_back(Delivery *delivery)
{
	delivery->next = at_hand.first;
	at_hand.first = delivery;
	if (at_hand.last == NULL)
		at_hand.last = delivery;
	at_hand.count++;
	at_hand.bytes += delivery->size;
}

/* Puts deliveries that were taken back before all others, in their order. */
void
at_hand_put_back(Delivery **deliveries, int n)
{
	while (n > 0)
		put_back(deliveries[--n]);
}

static int
compare_ids(const void *a, const void *b)
{
	const Delivery *left = *(Delivery *const *) a;
	const Delivery *right = *(Delivery *const *) b;
	int			result = memcmp(&left->message_id, &right->message_id, UUID_LEN);

	return result != 0 ? result : (left->batch_index > right->batch_index) - (left->batch_index < right->batch_index);
}

/* How many come before the first whose id is that of one before it. */
static int
count_different(Delivery **deliveries, int n)
{
	Delivery  **sorted = palloc((n + 1) * sizeof(Delivery *));
	int			different = n;

	for (int i = 0; i < n; i++)
	{
		deliveries[i]->batch_index = i;
		sorted[i] = deliveries[i];
	}
	qsort(sorted, n, sizeof(Delivery *), compare_ids);
	for (int i = 1; i < n; i++)
	{
		if (memcmp(&sorted[i]->message_id, &sorted[i - 1]->message_id, UUID_LEN) == 0)
			different = Min(different, sorted[i]->batch_index);
	}
	pfree(sorted);
	return different;
}

/*
 * Takes the first deliveries for which chosen() says what is wanted, at most limit, and
 * none of an id twice.  A part of a comparison is taken with none before it: it leaves out
 * what waits, and what begins to wait in its own batch is not in the table yet.  Returns
 * how many.
 */
int
at_hand_take(Delivery **deliveries, int limit, DeliveryTest chosen, bool wanted)
{
	int			n = 0;
	int			different;

	while (n < limit && at_hand.first != NULL && chosen(at_hand.first) == wanted &&
		   !(n > 0 && at_hand.first->order.free))
		deliveries[n++] = take_first();
	different = count_different(deliveries, n);
	at_hand_put_back(deliveries + different, n - different);
	return different;
}

static int
compare_places(const void *a, const void *b)
{
	const Delivery *left = *(Delivery *const *) a;
	const Delivery *right = *(Delivery *const *) b;

	if (left->place != right->place)
		return left->place < right->place ? -1 : 1;
	return left->tag < right->tag ? -1 : 1;
}

/*
 * Gives all deliveries their place and, if they are to be ordered, sorts them by it.
 * After several ends of consumers in a row the broker delivers again in another order
 * than the first time: what it had taken back already goes before what it takes back
 * later.  The header "sequence" tells what was first; what has none stays behind what it
 * came behind.
 */
void
at_hand_sort(bool ordered)
{
	int			n = at_hand.count;
	Delivery  **sorted = palloc((n + 1) * sizeof(Delivery *));

	for (int i = 0; i < n; i++)
	{
		sorted[i] = take_first();
		sorted[i]->place = (sorted[i]->has_sequence || i == 0) ? sorted[i]->sequence : sorted[i - 1]->place;
	}
	if (ordered)
		qsort(sorted, n, sizeof(Delivery *), compare_places);
	at_hand_put_back(sorted, n);
	pfree(sorted);
}

/* ---- those that are held ---- */

/* Keeps a delivery that failed, without its body, until it is given back to its queue. */
void
at_hand_hold(Delivery *delivery)
{
	broker_free_delivery(delivery->wire);
	delivery->wire = NULL;
	delivery->requeue_at = mono_now() + (delivery->next_try - GetCurrentTimestamp());
	delivery->next = at_hand.held;
	at_hand.held = delivery;
	at_hand.nheld++;
}

/* The earliest time at which a delivery is to be given back; 0: none is. */
MonoTime
at_hand_next_due(void)
{
	MonoTime	next = 0;

	for (const Delivery *delivery = at_hand.held; delivery != NULL; delivery = delivery->next)
		next = (next == 0) ? delivery->requeue_at : Min(next, delivery->requeue_at);
	return next;
}

/* Takes those that are to be given back now: a list, linked by next. */
Delivery *
at_hand_take_due(MonoTime now)
{
	Delivery   *due = NULL;
	Delivery  **link = &at_hand.held;

	while (*link != NULL)
	{
		Delivery   *delivery = *link;

		if (delivery->requeue_at > now)
		{
			link = &delivery->next;
			continue;
		}
		*link = delivery->next;
		at_hand.nheld--;
		delivery->next = due;
		due = delivery;
	}
	return due;
}

/* ---- all ---- */

/* The lowest delivery tag there is; all that comes later has higher ones. */
uint64
at_hand_lowest_tag(void)
{
	uint64		lowest = PG_UINT64_MAX;

	for (const Delivery *delivery = at_hand.first; delivery != NULL; delivery = delivery->next)
		lowest = Min(lowest, delivery->tag);
	for (const Delivery *delivery = at_hand.held; delivery != NULL; delivery = delivery->next)
		lowest = Min(lowest, delivery->tag);
	return lowest;
}

/* Forgets all of them: their connection is lost, and they will come again. */
void
at_hand_lose(void)
{
	while (at_hand.first != NULL)
		delivery_free(take_first());
	while (at_hand.held != NULL)
	{
		Delivery   *delivery = at_hand.held;

		at_hand.held = delivery->next;
		delivery_free(delivery);
	}
	at_hand.nheld = 0;
}
