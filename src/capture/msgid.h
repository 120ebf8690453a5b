/*-------------------------------------------------------------------------
 *
 * msgid.h
 *		Message ids.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_MSGID_H
#define PGF_MSGID_H

#include "postgres.h"

#include "utils/uuid.h"

/* So many bytes name the process that made an id; the others count up. */
#define MSGID_HALF			(UUID_LEN / 2)

/*
 * A new version-4 UUID.  Each process draws one random base (libuuid) and
 * counts on from it, so that ids never repeat and cost no system call each.
 * They are names, not secrets: the next one can be guessed from the last.
 */
extern void msgid_new(pg_uuid_t *id);

/* Renders id in its 36-character form, NUL-terminated. */
extern void msgid_format(const pg_uuid_t *id, char out[37]);

#endif							/* PGF_MSGID_H */
