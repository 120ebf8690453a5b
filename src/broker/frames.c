/*-------------------------------------------------------------------------
 *
 * frames.c
 *		What a socket has received and nobody has decoded yet.
 *
 * Bytes are received in large pieces and decoded a frame at a time.  The head
 * of a frame can be looked at before the decoder is shown a byte of it.
 *
 * Must never: grow, read a socket, or understand a frame beyond its head.
 *
 *-------------------------------------------------------------------------
 */
#include <string.h>

#include "broker/frames.h"

/* Frame type, channel and size. */
#define FRAME_HEAD			7

/*
 * Returns where bytes may be received, and how many.  What is left, less than
 * the head of a frame, moves to the front.
 */
void *
frames_room(FrameBuffer *buffer, size_t *room)
{
	size_t		have = buffer->last - buffer->first;

	memmove(buffer->bytes, buffer->bytes + buffer->first, have);
	buffer->first = 0;
	buffer->last = have;
	*room = FRAMES_SIZE - have;
	return buffer->bytes + have;
}

/* Notes that bytes were received into the room that frames_room() gave. */
void
frames_add(FrameBuffer *buffer, size_t bytes)
{
	buffer->last += bytes;
}

/* Reads the head of the frame that begins here.  Returns false if it is not complete. */
bool
frames_head(const FrameBuffer *buffer, FrameHead *head)
{
	const unsigned char *bytes = buffer->bytes + buffer->first;

	if (buffer->last - buffer->first < FRAME_HEAD)
		return false;
	head->protocol = memcmp(bytes, "AMQP", 4) == 0;
	head->type = bytes[0];
	head->channel = bytes[1] << 8 | bytes[2];
	head->payload = (size_t) bytes[3] << 24 | (size_t) bytes[4] << 16 |
		(size_t) bytes[5] << 8 | bytes[6];
	return true;
}

/* Makes the frame that begins here one of channel 0. */
void
frames_hide_channel(FrameBuffer *buffer)
{
	buffer->bytes[buffer->first + 1] = 0;
	buffer->bytes[buffer->first + 2] = 0;
}
