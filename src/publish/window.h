/*-------------------------------------------------------------------------
 *
 * window.h
 *		The messages of one topic between its reading and its end: which may be
 *		published next, what is in flight, and what has to go again.
 *
 * Pure: no PostgreSQL, no broker.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WINDOW_H
#define PGF_WINDOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum WindowState
{
	WINDOW_UNSENT,				/* not sent yet, or to be sent again */
	WINDOW_IN_FLIGHT,
	WINDOW_REFUSED,				/* UNSENT as soon as nothing is in flight */
	WINDOW_ACCEPTED,
	WINDOW_DISCARDED,
} WindowState;

typedef enum WindowRefusal
{
	WINDOW_NOT_REFUSED,
	WINDOW_NACKED,
	WINDOW_RETURNED,
} WindowRefusal;

/* One key of an item. */
typedef struct WindowKey
{
	uint64_t	hash;			/* the caller's; a collision costs time, or a
								 * repeat */

	/* the window's own */
	const struct Window *window;
	struct WindowKey *chain;	/* the next one in the bucket */
	struct WindowItem *waiting; /* serial: the next item of the key */
} WindowKey;

/*
 * A message.  It belongs to the caller, who embeds it and sets the first four
 * fields.  It has no, one or two keys (two: its change moved the row from one
 * key to another); a barrier (TRUNCATE, a comparison) belongs to all keys of the
 * topic.
 */
typedef struct WindowItem
{
	WindowKey	keys[2];
	int			nkeys;
	bool		barrier;
	size_t		bytes;

	/* for the caller to read */
	WindowState state;
	WindowRefusal refusal;		/* of the last attempt */
	uint64_t	tag;			/* delivery tag of the last attempt */
	int64_t		published_at;

	/* the window's own */
	struct WindowItem *next;	/* in order of id */
	struct WindowItem *next_ready;
	int			waits_for;		/* items */
	bool		lined_up;		/* serial: its keys' other items wait for it */
	bool		untold;			/* refused, and window_take_refused() has yet
								 * to say so */
} WindowItem;

/*
 * The newest item of each key, needed in serial mode and to work off a
 * refusal.  All windows of a process may use the same buckets.
 */
typedef struct WindowKeys
{
	WindowKey **buckets;
	size_t		nbuckets;		/* a power of two */
} WindowKeys;

typedef struct Window
{
	/* for the caller to read */
	size_t		count;			/* items added and not taken back */
	size_t		in_flight;
	size_t		bytes;			/* of those in flight */
	bool		serial;
	bool		stopping;		/* nothing goes while anything is in flight */

	/* the window's own from here on; items, in order of id */
	WindowItem *first;
	WindowItem *last;
	WindowItem *cursor;			/* the first UNSENT one that is not lined up */
	WindowItem *untold;			/* none before it is untold */
	bool		wants_serial;	/* once nothing is in flight */

	/* in flight: a ring of tags */
	WindowItem **slots;			/* NULL: settled, or another window's tag */
	uint64_t	capacity;		/* a power of two */
	uint64_t	oldest;			/* the lowest tag in flight */
	uint64_t	newest;			/* the last tag published on its channel */
	uint64_t	found;			/* tag of the last one that was looked for */

	/* serial mode */
	WindowKeys *keys;
	WindowItem *first_ready;	/* may be published */
	WindowItem *last_ready;
	size_t		nlined_up;
	bool		barrier;		/* the last one lined up is a barrier */
} Window;

extern void window_keys_init(WindowKeys *keys, WindowKey **buckets, size_t nbuckets);
extern void window_init(Window *window, WindowKeys *keys);
extern void window_set_slots(Window *window, WindowItem **slots, uint64_t capacity);
extern void window_set_serial(Window *window, bool serial);

extern void window_add(Window *window, WindowItem *item);
extern WindowItem *window_next(const Window *window);
extern bool window_has_room(const Window *window, uint64_t tag);
extern void window_published(Window *window, WindowItem *item, uint64_t tag, int64_t now);
extern void window_discard(Window *window, WindowItem *item);

extern bool window_ack(Window *window, uint64_t tag, bool multiple);
extern bool window_nack(Window *window, uint64_t tag, bool multiple);
extern WindowItem *window_find(Window *window,
							   bool (*matches) (const WindowItem *item, const void *arg),
							   const void *arg);
extern void window_returned(Window *window, WindowItem *item);
extern size_t window_lost(Window *window);
extern void window_continue(Window *window, uint64_t tag);
extern WindowItem *window_oldest(const Window *window);

extern WindowItem *window_take_refused(Window *window);
extern WindowItem *window_take_done(Window *window);
extern WindowItem *window_abandon(Window *window);

#endif							/* PGF_WINDOW_H */
