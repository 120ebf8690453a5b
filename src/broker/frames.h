/*-------------------------------------------------------------------------
 *
 * frames.h
 *		What a socket has received and nobody has decoded yet.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_FRAMES_H
#define PGF_FRAMES_H

#include <stdbool.h>
#include <stddef.h>

/* Size of the buffer, and so the most that one recv() can take; a frame's head must fit. */
#define FRAMES_SIZE			65536

typedef struct FrameBuffer
{
	size_t		first;			/* bytes[first .. last - 1] are here */
	size_t		last;
	unsigned char bytes[FRAMES_SIZE];
} FrameBuffer;

/* The first bytes of a frame (AMQP 0-9-1, section 4.2.3). */
typedef struct FrameHead
{
	bool		protocol;		/* "AMQP" instead: a protocol header */
	int			type;
	int			channel;
	size_t		payload;		/* bytes */
} FrameHead;

extern void *frames_room(FrameBuffer *buffer, size_t *room);
extern void frames_add(FrameBuffer *buffer, size_t bytes);
extern bool frames_head(const FrameBuffer *buffer, FrameHead *head);
extern void frames_hide_channel(FrameBuffer *buffer);

#endif							/* PGF_FRAMES_H */
