/*-------------------------------------------------------------------------
 *
 * channels.c
 *		The channels of one AMQP connection: which there are, and what each
 *		of them waits for.
 *
 * A channel's life, by number, with the function that performs each
 * transition; methods are those that arrive:
 *
 *		FREE --channels_open()--> OPENING --open-ok--> OPEN
 *		OPENING --open-ok, if it publishes--> SELECTING --select-ok--> OPEN
 *		OPEN --channels_ask()--> ASKED --the answer--> OPEN
 *
 *		OPENING, SELECTING, OPEN, ASKED
 *			--channels_close()--> CLOSING --close-ok--> FREE
 *			--channel.close--> CLOSED --channels_told(), channels_close()--> FREE
 *
 *		ENDED --channels_paid()--> FREE
 *
 * Ending a channel leaves something to be written: a channel.close if we end it,
 * a close-ok if the broker does.  These are debts: the channel is in the list of
 * debtors until the caller has written them, which may have to wait for room in the
 * socket.  Where the drawing says FREE, a channel with a debt becomes ENDED.
 * If the closes of both sides cross, the channel stays CLOSING until close-ok
 * has come, and owes the other one meanwhile.  If our own close was not even
 * written by then, close-ok takes its place, and the channel is ENDED.
 *
 * A channel whose close-ok never comes stays CLOSING: its number is not used
 * again, for nobody could tell the old channel's frames from the new one's.
 * For the same reason a number that the broker has closed is not FREE before
 * the caller has been told.
 *
 * "life" counts a number's channels.  What is queued for the caller carries
 * it, and is dropped when it is not the present one: after channels_close()
 * nothing of the old channel is delivered, at no cost per event.
 *
 * Frames that arrive on a number whose channel is over are no fault of the
 * broker's: it may have sent them before it knew (RabbitMQ's basic.cancel for
 * a queue that went away; RabbitMQ's own clients ignore them, too).
 *
 * Responsible for: numbers, states, debts, and the memory of each channel,
 * which is allocated when it is opened and freed when it is over.  Bounded by
 * the limit.  Everything but channels_init() and channels_destroy() takes the
 * same time however many channels there are.
 *
 * Must never: write or read a socket, know rabbitmq-c.
 *
 * Scenarios, each of them a test in test/unit/test_channels.c.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/channels.h"

static uint16_t take_number(Channels *channels, ChannelUse use);
static void put_back_number(Channels *channels, Channel *channel);
static void owe(Channels *channels, Channel *channel, ChannelDebt debt);
static void release(Channels *channels, Channel *channel);
static void free_contents(Channel *channel);
static ChannelNews closed_by_broker(Channels *channels, Channel *channel);
static ChannelNews method_while_closing(Channels *channels, Channel *channel, uint32_t method);

/*
 * Makes room for channels 1 to limit (1 to 65535).  Returns false if there is
 * no memory.  A Channels that is all zero has none, and may be destroyed.
 */
bool
channels_init(Channels *channels, int limit)
{
	memset(channels, 0, sizeof(*channels));
	channels->all = calloc((size_t) limit + 1, sizeof(Channel));
	if (channels->all == NULL)
		return false;
	channels->limit = limit;
	return true;
}

/* Frees everything, in whatever state the channels are. */
void
channels_destroy(Channels *channels)
{
	for (int number = 1; number <= channels->limit; number++)
	{
		free_contents(&channels->all[number]);
		free(channels->all[number].why);
	}
	free(channels->all);
	memset(channels, 0, sizeof(*channels));
}

/* Returns a channel that is open or has been, or NULL if the number was never used. */
Channel *
channels_get(Channels *channels, int number)
{
	if (number < 1 || number > channels->limit)
		return NULL;
	return channels->all[number].life > 0 ? &channels->all[number] : NULL;
}

/*
 * Begins a channel, for which the caller writes channel.open, and confirm.select
 * if it publishes.  Returns its number, or 0 if none is free or there is no
 * memory.  One channel at a time is for CHANNEL_CALLS.
 */
int
channels_open(Channels *channels, ChannelUse use)
{
	uint16_t	number = take_number(channels, use);
	Channel    *channel = &channels->all[number];

	if (number == 0)
		return 0;
	channel->use = use;
	channel->life++;
	channel->published = 0;
	if (use == CHANNEL_PUBLISHES || use == CHANNEL_CONSUMES)
	{
		channel->content = malloc(sizeof(Assembler));
		if (channel->content == NULL)
		{
			put_back_number(channels, channel);
			return 0;
		}
		assemble_init(channel->content, use == CHANNEL_CONSUMES, BROKER_MAX_BODY);
	}
	channel->state = CHANNEL_OPENING;
	return number;
}

/* Takes a free number, the last one freed first; 0: there is none. */
static uint16_t
take_number(Channels *channels, ChannelUse use)
{
	uint16_t	number = channels->free;

	if (channels->all == NULL)
		return 0;
	if (use == CHANNEL_CALLS)
		return channels->all[channels->limit].state == CHANNEL_FREE ? (uint16_t) channels->limit : 0;
	if (number != 0)
		channels->free = channels->all[number].next;
	else if (channels->used < channels->limit - 1)
		number = (uint16_t) ++channels->used;
	channels->taken += (number != 0);
	return number;
}

static void
put_back_number(Channels *channels, Channel *channel)
{
	uint16_t	number = (uint16_t) (channel - channels->all);

	channel->state = CHANNEL_FREE;
	if (number == channels->limit)
		return;
	channel->next = channels->free;
	channels->free = number;
	channels->taken--;
}

/*
 * Notes that a request was written to a channel that is OPEN: the method that
 * answers it, and the queue that the answer must name, or NULL.
 */
void
channels_ask(Channels *channels, int number, uint32_t awaits, const char *queue)
{
	Channel    *channel = &channels->all[number];

	channel->state = CHANNEL_ASKED;
	channel->awaits = awaits;
	free(channel->queue);
	channel->queue = queue != NULL ? strdup(queue) : NULL;
}

/*
 * Ends a channel on the caller's behalf: it has been told, or wants to hear no
 * more.  Does nothing to one that is over already.
 */
void
channels_close(Channels *channels, int number)
{
	Channel    *channel = channels_get(channels, number);

	if (channel == NULL)
		return;
	switch (channel->state)
	{
		case CHANNEL_OPENING:
		case CHANNEL_SELECTING:
		case CHANNEL_OPEN:
		case CHANNEL_ASKED:
			channel->life++;
			channel->state = CHANNEL_CLOSING;
			free_contents(channel);
			owe(channels, channel, CHANNEL_OWES_CLOSE);
			break;
		case CHANNEL_CLOSED:
			release(channels, channel);
			break;
		case CHANNEL_FREE:
		case CHANNEL_CLOSING:
		case CHANNEL_ENDED:
			break;
	}
}

/* Notes that the caller knows that the broker closed the channel. */
void
channels_told(Channels *channels, int number)
{
	Channel    *channel = channels_get(channels, number);

	if (channel != NULL && channel->state == CHANNEL_CLOSED)
		release(channels, channel);
}

/*
 * Takes a method that has arrived on a channel.  After CHANNEL_REFUSED the
 * caller gives the reason with channels_set_reason() and pays the debts.
 */
ChannelNews
channels_method(Channels *channels, int number, uint32_t method)
{
	Channel    *channel = channels_get(channels, number);

	if (channel == NULL)
		return CHANNEL_VIOLATION;
	if (method == METHOD_CHANNEL_CLOSE &&
		(channel_awaits_answer(channel) || channel->state == CHANNEL_OPEN))
		return closed_by_broker(channels, channel);
	switch (channel->state)
	{
		case CHANNEL_OPENING:
			if (method != METHOD_CHANNEL_OPEN_OK)
				return CHANNEL_VIOLATION;
			channel->state = channel->use == CHANNEL_PUBLISHES ? CHANNEL_SELECTING : CHANNEL_OPEN;
			return channel->state == CHANNEL_OPEN ? CHANNEL_OPENED : CHANNEL_NO_NEWS;
		case CHANNEL_SELECTING:
			if (method != METHOD_CONFIRM_SELECT_OK)
				return CHANNEL_VIOLATION;
			channel->state = CHANNEL_OPEN;
			return CHANNEL_OPENED;
		case CHANNEL_ASKED:
			if (method != channel->awaits)
				return CHANNEL_OTHER;
			channel->state = CHANNEL_OPEN;
			return CHANNEL_ANSWERED;
		case CHANNEL_OPEN:
			return CHANNEL_OTHER;
		case CHANNEL_CLOSING:
			return method_while_closing(channels, channel, method);
		case CHANNEL_FREE:
		case CHANNEL_CLOSED:
		case CHANNEL_ENDED:
			break;
	}
	return CHANNEL_NO_NEWS;
}

static ChannelNews
closed_by_broker(Channels *channels, Channel *channel)
{
	channel->state = CHANNEL_CLOSED;
	free_contents(channel);
	owe(channels, channel, CHANNEL_OWES_CLOSE_OK);
	return CHANNEL_REFUSED;
}

/* Everything but the two closes was sent before the broker knew of ours. */
static ChannelNews
method_while_closing(Channels *channels, Channel *channel, uint32_t method)
{
	bool		written = channel->debt != CHANNEL_OWES_CLOSE;

	if (method == METHOD_CHANNEL_CLOSE)
	{
		owe(channels, channel, CHANNEL_OWES_CLOSE_OK);
		if (!written)
			channel->state = CHANNEL_ENDED;
	}
	else if (method == METHOD_CHANNEL_CLOSE_OK && written)
		release(channels, channel);
	return CHANNEL_NO_NEWS;
}

/* Keeps the reason for which the broker closed the channel. */
void
channels_set_reason(Channels *channels, int number, const BrokerError *why)
{
	Channel    *channel = &channels->all[number];

	if (channel->why == NULL)
		channel->why = malloc(sizeof(BrokerError));
	if (channel->why != NULL)
		*channel->why = *why;
}

/* Returns how many channels wait for close-ok.  Looks at all that were ever opened. */
int
channels_closing(const Channels *channels)
{
	int			n = 0;

	for (int number = 1; number <= channels->used; number++)
		n += (channels->all[number].state == CHANNEL_CLOSING);
	return n;
}

/* Returns the channel whose debt is the oldest, or 0 if there are no debts. */
int
channels_debtor(const Channels *channels)
{
	return channels->first_debtor;
}

/* Notes that the debt of channels_debtor() was written. */
void
channels_paid(Channels *channels)
{
	Channel    *channel = &channels->all[channels->first_debtor];

	channels->first_debtor = channel->next;
	if (channels->first_debtor == 0)
		channels->last_debtor = 0;
	channel->next = 0;
	channel->in_debtors = false;
	channel->debt = CHANNEL_OWES_NOTHING;
	if (channel->state == CHANNEL_ENDED)
		release(channels, channel);
}

/* A debt replaces an older one, in its place in the list. */
static void
owe(Channels *channels, Channel *channel, ChannelDebt debt)
{
	uint16_t	number = (uint16_t) (channel - channels->all);

	channel->debt = debt;
	if (channel->in_debtors)
		return;
	channel->in_debtors = true;
	channel->next = 0;
	if (channels->last_debtor != 0)
		channels->all[channels->last_debtor].next = number;
	else
		channels->first_debtor = number;
	channels->last_debtor = number;
}

/* The channel is over for both sides and for the caller. */
static void
release(Channels *channels, Channel *channel)
{
	channel->life++;
	free(channel->why);
	channel->why = NULL;
	if (channel->debt != CHANNEL_OWES_NOTHING)
		channel->state = CHANNEL_ENDED;
	else
		put_back_number(channels, channel);
}

static void
free_contents(Channel *channel)
{
	if (channel->content != NULL)
		assemble_reset(channel->content);
	free(channel->content);
	free(channel->queue);
	channel->content = NULL;
	channel->queue = NULL;
}
