/*-------------------------------------------------------------------------
 *
 * assemble.h
 *		Puts the frames of one channel's contents together.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ASSEMBLE_H
#define PGF_ASSEMBLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum AssembleState
{
	ASSEMBLE_IDLE,				/* no content is being received */
	ASSEMBLE_HEADER,			/* method seen, its header frame must follow */
	ASSEMBLE_BODY,				/* header seen, body frames must follow */
} AssembleState;

typedef enum AssembleResult
{
	ASSEMBLE_MORE,				/* taken; the content is not complete yet */
	ASSEMBLE_DONE,				/* taken; the content is complete */
	ASSEMBLE_VIOLATION,			/* the peer broke the protocol, or the limit;
								 * "problem" says how */
} AssembleResult;

typedef struct Assembler
{
	AssembleState state;
	bool		keep_body;		/* false: the body is counted and dropped */
	uint64_t	max_body;		/* largest body taken, in bytes */
	const char *problem;		/* static text, after ASSEMBLE_VIOLATION */

	/* The content, valid after ASSEMBLE_DONE until the next method. */
	int			code;			/* of a return: reply code; else 0 */
	char text[	256];			/* of a return: reply text; else "" */
	char		message_id[256];	/* "" if the property is absent */
	uint64_t	body_size;
	char	   *body;			/* NULL unless keep_body and body_size > 0 */

	/* private */
	uint64_t	received;
	size_t		capacity;		/* of body */
} Assembler;

extern void assemble_init(Assembler *a, bool keep_body, uint64_t max_body);

/* Frees the body and forgets a content begun; the settings stay. */
extern void assemble_reset(Assembler *a);

/*
 * A method that carries content (basic.return, basic.deliver) begins.  text
 * need not be terminated; it is cut at 255 bytes, AMQP's own limit.
 */
extern AssembleResult assemble_method(Assembler *a, int code,
									  const void *text, size_t text_len);

/* The content header: message_id as in the properties, length 0 if absent. */
extern AssembleResult assemble_header(Assembler *a, const void *message_id,
									  size_t message_id_len, uint64_t body_size);

/* One body frame. */
extern AssembleResult assemble_body(Assembler *a, const void *data, size_t len);

/* Any other method of this channel: not allowed within a content. */
extern AssembleResult assemble_other(Assembler *a);

/* Hands the body over to the caller, who frees it with free(). */
extern char *assemble_take_body(Assembler *a);

#endif							/* PGF_ASSEMBLE_H */
