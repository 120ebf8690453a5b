/*-------------------------------------------------------------------------
 *
 * wire.h
 *		From an outbox row to an AMQP message.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WIRE_H
#define PGF_WIRE_H

#include "postgres.h"

#include "broker/types.h"
#include "publish/run.h"

/*
 * Fills message->wire except exchange, routing key and content type, and the content
 * type of a row, in the chunk's context: UTF-8 texts, and the headers op, schema, table,
 * key, sequence, xid with the caller's own.  Sets message->reason if that cannot
 * be done.  Needs a transaction (utf8_init() reads the catalog the first time).
 */
extern void wire_prepare(Message *message, MemoryContext context);

/* The content type of bodies in a format, a constant. */
extern const char *wire_content_type(const char *format, size_t len);

/*
 * The scalar members of a JSON object as AMQP fields, in the current context;
 * room is left for extra more.  Returns NULL if one cannot be converted.
 */
extern BrokerField *wire_fields(Jsonb *object, int extra, int *count);

#endif							/* PGF_WIRE_H */
