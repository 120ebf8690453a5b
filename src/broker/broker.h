/*-------------------------------------------------------------------------
 *
 * broker.h
 *		One AMQP 0-9-1 connection to RabbitMQ.
 *
 * The only interface through which the rest of pg_fanout sees the broker.
 * Nothing here raises a PostgreSQL error by itself: results are codes and a
 * text.  Only the wait callback may not return (it may raise an error or
 * end the process), so a caller must be able to lose a Broker at any wait.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_BROKER_H
#define PGF_BROKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "broker/message.h"
#include "broker/types.h"

typedef struct Broker Broker;

/* One element of pg_fanout.uri.  All strings are NUL-terminated. */
typedef struct BrokerAddress
{
	char	   *host;
	int			port;
	char	   *user;
	char	   *password;		/* NULL: not given in the URI */
	char	   *vhost;
	bool		tls;			/* amqps:// */
} BrokerAddress;

typedef struct BrokerOptions
{
	const char *connection_name;	/* shown by the management UI */
	const char *tls_ca_file;	/* NULL: the system's authorities */
	const char *tls_cert_file;	/* NULL, and the key too: no client
								 * certificate */
	const char *tls_key_file;
	bool		tls_verify;		/* verify the chain and the host name */
	int			connect_timeout_ms; /* bounds connect + handshake + login */
	int			rpc_timeout_ms; /* bounds the wait for a reply to a declare */
	int			heartbeat_s;	/* 0 disables */
	int			away_s;			/* so long may the caller serve nothing; the
								 * heartbeat is at least half of it */
	bool		consumer;		/* opens a channel that consumes */
	bool		forwards;		/* keeps what broker_forward() needs */
	int			min_channels;	/* how many broker_open_channel() must be able
								 * to open; those that are being closed count */
	int			max_channels;	/* how many it may, unless the broker allows
								 * fewer */

	/*
	 * Waits until fd is readable (or writable) or timeout_ms has passed,
	 * whichever is first; returns true if the socket is ready.  It must be
	 * the process's interruptible wait.  For tests outside the server a plain
	 * poll() will do.
	 */
	bool		(*wait) (int fd, bool for_write, long timeout_ms);

	/* Told the socket as soon as it exists, and -1 before it is closed. */
	void		(*fd_changed) (int fd);
} BrokerOptions;

/*
 * Parses a comma-separated list of amqp:// and amqps:// URIs (RabbitMQ URI
 * specification: percent-decoding, default port 5672 or 5671, default user
 * "guest" and password "guest" if no user is given, vhost "/" if there is no
 * path or an empty one).  Returns a malloc'd array of *count
 * addresses, to be freed with broker_free_addresses(), or NULL with *error
 * set to a static text that names what is wrong and never quotes the URI.
 */
extern BrokerAddress *broker_parse_uri(const char *uri, int *count, const char **error);
extern void broker_free_addresses(BrokerAddress *addresses, int count);

/*
 * Connects and logs in; opens the channel that consumes, if the options want
 * one.  The password overrides the address's unless NULL.  Returns NULL with
 * *error filled on failure: at the latest after options->connect_timeout_ms.
 * All of it waits through options->wait(), looking up the host's name included,
 * but for the TLS handshake (broker_handshake_fd()).
 * The options must outlive the connection; address and password need not.
 */
extern Broker *broker_connect(const BrokerAddress *address, const char *password,
							  const BrokerOptions *options, BrokerError *error);

/*
 * Closes the socket and frees everything.  polite: close as AMQP wants it, if
 * the connection is healthy and the socket takes that at once, and wait for
 * the answer, at most 200 ms and without calling options->wait(); so it may
 * be used where nothing may be raised.
 */
extern void broker_close(Broker *broker, bool polite);

/* -1 once the connection is lost. */
extern int	broker_fd(const Broker *broker);

/*
 * The socket of a TLS handshake that this process is in, or -1.  The handshake
 * happens inside one library call, before fd_changed() can be told.  Safe in
 * a signal handler, which is what it is for: shutdown() of it ends the call.
 */
extern int	broker_handshake_fd(void);

/* Is the connection blocked by the broker (connection.blocked)? */
extern bool broker_blocked(const Broker *broker);

/* The first number of the server's version, as it says; 0: it does not. */
extern int	broker_major(const Broker *broker);

/* How many channels broker_open_channel() may have open, by BrokerOptions and by the broker. */
extern int	broker_max_channels(const Broker *broker);

/* How many of these are left; and how many are not, since the broker has not closed them yet. */
extern int	broker_free_channels(const Broker *broker);
extern int	broker_closing_channels(const Broker *broker);

/*
 * Milliseconds until broker_next_event() must be called again for the sake of
 * heartbeats; an hour if there are none.
 */
extern long broker_next_heartbeat(const Broker *broker);

/*
 * Channels that the caller opens, each for one purpose, so that what happens to
 * one of them concerns no other.  None of these three calls waits, for the
 * socket or for an answer; a time limit for the answer is the caller's business,
 * who gives up by broker_close_channel().  What was written in a corked socket
 * stays there until it is uncorked.
 *
 * broker_open_channel() begins a channel, for publishing if it confirms, else
 * for requests.  Returns its number, or 0 with *error filled: none is free, or
 * the socket has no room now (code 0; try again later), or the connection is
 * lost.  The channel can be used once BROKER_CHANNEL_OPENED has come.
 *
 * broker_close_channel() ends it, whatever it waits for.  No event of the
 * channel is delivered after the call.  The number is free again after the
 * broker's answer, and stays taken if none comes.  Of a channel that is over,
 * or 0, it does nothing.
 *
 * broker_request() asks for a thing on a channel that is open for requests.
 * The answer is the event BROKER_REPLY; a refusal is BROKER_CHANNEL_CLOSED of
 * that channel, with the reason.  BROKER_BUSY: the one before is not answered
 * yet, or the socket has no room.  BROKER_REFUSED: the channel is not open.
 * A broker that has blocked the connection does not read it, and answers
 * nothing: better ask broker_blocked() first.
 */
extern int	broker_open_channel(Broker *broker, bool confirms, BrokerError *error);
extern void broker_close_channel(Broker *broker, int channel);
extern BrokerResult broker_request(Broker *broker, int channel, const BrokerRequest *request,
								   BrokerError *error);

/*
 * Hands one persistent, mandatory message to the socket, on a channel that
 * confirms.  BROKER_OK only means that it was written: the confirm decides.
 * The delivery tag is the count of messages published on that channel since it
 * was opened, beginning with 1.  Waits (interruptibly) for room in the socket's
 * buffer frame by frame, at most timeout_ms without a byte leaving the kernel,
 * and then the connection is given up as BROKER_LOST.  What the broker says
 * meanwhile is kept for broker_next_event().
 *
 * BROKER_REFUSED: the channel is not open, or was closed by the broker, maybe
 * in the middle of this very message; then BROKER_CHANNEL_CLOSED is among the
 * events.
 */
extern BrokerResult broker_publish(Broker *broker, int channel, const BrokerMessage *message,
								   long timeout_ms, BrokerError *error);

/*
 * Publishes a message that was delivered on this connection, to one queue, as
 * broker_publish() does: with its body and all of its properties, but for what the broker
 * would act on or refuse, or has counted: user_id, and the headers CC, BCC,
 * x-delivery-count and x-acquired-count.  The connection's options must have said
 * "forwards".
 */
extern BrokerResult broker_forward(Broker *broker, int channel, const char *queue,
								   const BrokerDelivery *delivery, long timeout_ms,
								   BrokerError *error);

/*
 * Can broker_publish() send a message of so many bytes, headers included,
 * without waiting for the socket?  Of a message too large for that ever (128
 * kB, or a third of the send buffer): can it begin at once?  Cheap: asks the
 * kernel only once per 128 kB or so.
 */
extern bool broker_writable(Broker *broker, size_t bytes);

/*
 * Cork collects the frames of what is published, and writes them in pieces of 64 kB, or
 * before something is waited for; uncork writes the rest.
 */
extern void broker_cork(Broker *broker);
extern void broker_uncork(Broker *broker);

/*
 * Next thing the broker said, without waiting.  BROKER_NOTHING means that
 * frames queued, bytes buffered (TLS too) and the socket are all drained, so
 * that it is right to sleep on the socket now.
 */
extern void broker_next_event(Broker *broker, BrokerEvent *event);

/*
 * Consuming, on a channel that broker_connect() opens, if the options say so.
 * Deliveries come as events.
 *
 * broker_consume() sets the prefetch (1 to 65535: deliveries that are neither
 * acked nor nacked at any time) of the consumer that it begins; one that was
 * begun before keeps its own.  argument: one of the consumer's, or NULL; the broker
 * refuses (406) what consumers of that type of queue do not have.  Both wait for the answer, as topology does.
 * BROKER_REFUSED (404: no such queue, 403): the channel is closed, and
 * BROKER_CHANNEL_CLOSED is among the events.
 *
 * Deliveries that were in work when a consumer was cancelled can still be
 * settled.  broker_ack(): multiple: all outstanding up to tag.  broker_requeue()
 * gives one back (basic.nack).  They wait as broker_publish() does.
 */
extern BrokerResult broker_consume(Broker *broker, const char *queue, const char *consumer_tag,
								   uint16_t prefetch, const BrokerField *argument,
								   BrokerError *error);
extern BrokerResult broker_cancel(Broker *broker, const char *consumer_tag, BrokerError *error);
extern BrokerResult broker_ack(Broker *broker, uint64_t tag, bool multiple, long timeout_ms,
							   BrokerError *error);
extern BrokerResult broker_requeue(Broker *broker, uint64_t tag, long timeout_ms,
								   BrokerError *error);

/*
 * Requests that are waited for: any of them by broker_call(), or each by name.
 * All run on a channel of their own, opened when needed; a refusal (404, 403,
 * 405, 406) is BROKER_REFUSED, and no event.  They wait for the reply
 * interruptibly, at most rpc_timeout_ms (then BROKER_LOST).  Events of the other
 * channels that arrive meanwhile are kept for broker_next_event().  messages and
 * consumers may be NULL.  A broker that has blocked the connection does not read
 * it, and answers nothing: better ask broker_blocked() first.
 */
extern BrokerResult broker_call(Broker *broker, const BrokerRequest *request, uint32_t *messages,
								uint32_t *consumers, BrokerError *error);
extern BrokerResult broker_declare_exchange(Broker *broker, const char *exchange,
											BrokerError *error);
extern BrokerResult broker_declare_queue(Broker *broker, const char *queue,
										 const BrokerField *arguments, int narguments,
										 BrokerError *error);
extern BrokerResult broker_bind_queue(Broker *broker, const char *queue,
									  const char *exchange, BrokerError *error);

/* Passive declare: counts of a queue that exists, BROKER_REFUSED 404 if not. */
extern BrokerResult broker_inspect_queue(Broker *broker, const char *queue,
										 uint32_t *messages, uint32_t *consumers,
										 BrokerError *error);

/*
 * Are such counts no answer, if they came so many microseconds after the request?  Of a quorum
 * queue whose process does not answer it within 250 ms, RabbitMQ says that it has no messages
 * and no consumers (rabbit_quorum_queue.erl, stat()).
 */
extern bool broker_counts_doubtful(uint32_t messages, uint32_t consumers, int64_t took_us);
extern BrokerResult broker_delete_queue(Broker *broker, const char *queue,
										bool if_unused, bool if_empty, BrokerError *error);
extern BrokerResult broker_unbind_queue(Broker *broker, const char *queue,
										const char *exchange, BrokerError *error);
extern BrokerResult broker_delete_exchange(Broker *broker, const char *exchange,
										   bool if_unused, BrokerError *error);

#endif							/* PGF_BROKER_H */
