/*-------------------------------------------------------------------------
 *
 * credit.c
 *		How much may be written before the kernel is asked again.
 *
 * While the kernel calls a socket writable, a third of its send buffer is
 * free.  So after one look, that much may be written without another: it is
 * the credit.  Every frame is charged its bytes and what the kernel books for
 * a write of its own.
 *
 * Must never: let more be written than a socket that is writable takes at once.
 *
 *-------------------------------------------------------------------------
 */
#include "broker/credit.h"

/* At most so much is written between two looks at the socket. */
#define CREDIT_MAX			(128 * 1024)

static size_t needed(const Credit *credit, size_t bytes);

/* room: how much a socket that is writable takes.  There is no credit yet. */
void
credit_init(Credit *credit, size_t room)
{
	credit->max = room < CREDIT_MAX ? room : CREDIT_MAX;
	credit->left = 0;
}

/* The socket was found to be writable. */
void
credit_refill(Credit *credit)
{
	credit->left = credit->max;
}

/* May a frame of so many bytes be written? */
bool
credit_covers(const Credit *credit, size_t bytes)
{
	return credit->left >= needed(credit, bytes);
}

/* The same, and charges it. */
bool
credit_take(Credit *credit, size_t bytes)
{
	if (!credit_covers(credit, bytes))
		return false;
	credit->left -= needed(credit, bytes);
	return true;
}

/* Returns the size of the largest frame that is no more than all credit. */
size_t
credit_largest(const Credit *credit, size_t frame_max)
{
	size_t		largest = credit->max - WRITE_OVERHEAD;

	return frame_max < largest ? frame_max : largest;
}

/* A frame larger than all credit there is takes all of it. */
static size_t
needed(const Credit *credit, size_t bytes)
{
	size_t		need = bytes + WRITE_OVERHEAD;

	return need < credit->max ? need : credit->max;
}
