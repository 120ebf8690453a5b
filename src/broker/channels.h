/*-------------------------------------------------------------------------
 *
 * channels.h
 *		The channels of one AMQP connection.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CHANNELS_H
#define PGF_CHANNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "broker/assemble.h"
#include "broker/types.h"

/* Class and method as one number, as on the wire (AMQP 0-9-1, section 4.2.4). */
#define METHOD_NUMBER(class_id, method_id) ((uint32_t) (class_id) << 16 | (method_id))
#define METHOD_CHANNEL_OPEN_OK METHOD_NUMBER(20, 11)
#define METHOD_CHANNEL_CLOSE METHOD_NUMBER(20, 40)
#define METHOD_CHANNEL_CLOSE_OK METHOD_NUMBER(20, 41)
#define METHOD_CONFIRM_SELECT_OK METHOD_NUMBER(85, 11)

/* A channel's life is drawn in channels.c. */
typedef enum ChannelState
{
	CHANNEL_FREE,				/* the number can be opened */
	CHANNEL_OPENING,			/* channel.open is sent */
	CHANNEL_SELECTING,			/* open-ok has come, confirm.select is sent */
	CHANNEL_OPEN,
	CHANNEL_ASKED,				/* the answer to a request is awaited */
	CHANNEL_CLOSING,			/* closed by us: close-ok is awaited */
	CHANNEL_CLOSED,				/* closed by the broker: the caller has not
								 * been told yet */
	CHANNEL_ENDED,				/* over; close-ok is not written yet */
} ChannelState;

typedef enum ChannelUse
{
	CHANNEL_PUBLISHES,			/* in confirm mode */
	CHANNEL_REQUESTS,			/* of the caller, answered by events */
	CHANNEL_CONSUMES,			/* the connection's own */
	CHANNEL_CALLS,				/* the connection's own, for requests that are
								 * waited for */
} ChannelUse;

/* Names the method that is still to be written to a channel that is over. */
typedef enum ChannelDebt
{
	CHANNEL_OWES_NOTHING,
	CHANNEL_OWES_CLOSE,
	CHANNEL_OWES_CLOSE_OK,
} ChannelDebt;

/* Tells the caller of channels_method() what a method that has arrived means. */
typedef enum ChannelNews
{
	CHANNEL_NO_NEWS,			/* nothing is left to be done for it */
	CHANNEL_OPENED,
	CHANNEL_ANSWERED,			/* to the request */
	CHANNEL_REFUSED,			/* the broker has closed the channel */
	CHANNEL_OTHER,				/* a content or a confirm of an open channel */
	CHANNEL_VIOLATION,
} ChannelNews;

typedef struct Channel
{
	/* all but life and published are private to channels.c, to be read only */
	ChannelState state;
	ChannelUse	use;
	ChannelDebt debt;
	bool		in_debtors;
	uint16_t	next;			/* number: in the list of free ones, or of
								 * debtors; 0: last */
	uint32_t	life;			/* events of a channel's earlier lives differ */
	uint32_t	awaits;			/* ASKED: the method that answers */
	Assembler  *content;		/* OPENING to ASKED, of a use that receives
								 * contents, else NULL */
	char	   *queue;			/* ASKED: the queue that the answer must name,
								 * or NULL */
	BrokerError *why;			/* CLOSED; NULL: no memory for it */

	uint64_t	published;		/* the last delivery tag that we used up */
} Channel;

typedef struct Channels
{
	Channel    *all;			/* by number; [0] is never used */
	int			limit;			/* the highest number; CHANNEL_CALLS has it */
	int			used;			/* the highest of the others ever opened */
	int			taken;			/* how many of these are not free */
	uint16_t	free;			/* first of those that were used */
	uint16_t	first_debtor;
	uint16_t	last_debtor;
} Channels;

extern bool channels_init(Channels *channels, int limit);
extern void channels_destroy(Channels *channels);
extern Channel *channels_get(Channels *channels, int number);
extern int	channels_open(Channels *channels, ChannelUse use);
extern void channels_ask(Channels *channels, int number, uint32_t awaits, const char *queue);
extern void channels_close(Channels *channels, int number);
extern void channels_told(Channels *channels, int number);
extern ChannelNews channels_method(Channels *channels, int number, uint32_t method);
extern void channels_set_reason(Channels *channels, int number, const BrokerError *why);
extern int	channels_closing(const Channels *channels);
extern int	channels_debtor(const Channels *channels);
extern void channels_paid(Channels *channels);

/* Are contents and confirms expected on the channel? */
static inline bool
channel_is_open(const Channel *channel)
{
	return channel->state == CHANNEL_OPEN || channel->state == CHANNEL_ASKED;
}

/* Does it wait for an answer that makes it OPEN? */
static inline bool
channel_awaits_answer(const Channel *channel)
{
	return channel->state == CHANNEL_OPENING || channel->state == CHANNEL_SELECTING ||
		channel->state == CHANNEL_ASKED;
}

#endif							/* PGF_CHANNELS_H */
