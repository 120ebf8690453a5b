/*-------------------------------------------------------------------------
 *
 * message.h
 *		Sizes and limits of what is sent, and the memory of what is received.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_MESSAGE_H
#define PGF_MESSAGE_H

#include "broker/types.h"

/* Frame type, channel and size before a payload; and the end octet after it. */
#define FRAME_ENVELOPE		8

/* A method's identifiers and up to three short strings, rounded up. */
#define METHOD_SIZE			1024

/* Property app-id of every message. */
#define MESSAGE_APP_ID		"pg_fanout"

extern bool message_check(const BrokerMessage *message, size_t frame_max, size_t *header_size,
						  BrokerError *error);
extern bool message_check_short(const char *what, const char *text, size_t max, BrokerError *error);
extern bool request_check(const BrokerRequest *request, size_t frame_max, BrokerError *error);
extern size_t request_size(const BrokerRequest *request);
extern uint32_t request_method(BrokerRequestKind kind);

/*
 * Which request a close of a channel or of the connection is about, by the
 * class_id and method_id of an event or an error; both are 0 if the broker
 * does not say.  broker_method_name() returns "queue.declare", or NULL if it
 * is no method that we send.
 */
extern bool broker_blames_request(int class_id, int method_id, BrokerRequestKind kind);
extern bool broker_blames_publish(int class_id, int method_id);
extern const char *broker_method_name(int class_id, int method_id);

extern void broker_free_delivery(BrokerDelivery *delivery);
extern void *delivery_keep(BrokerDelivery *delivery, size_t size);
extern char *delivery_keep_text(BrokerDelivery *delivery, const void *bytes, size_t len);

#endif							/* PGF_MESSAGE_H */
