/*-------------------------------------------------------------------------
 *
 * owner.h
 *		The rights of the extension's owner, for statements on its own tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_OWNER_H
#define PGF_OWNER_H

#include "postgres.h"

#include "server/query.h"

/* What become_caller() goes back to. */
typedef struct Caller
{
	Oid			user;
	int			context;
	int			settings;		/* nest level */
} Caller;

extern Caller become_owner(void);
extern void become_caller(const Caller *caller);
extern void owner_change(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls,
						 uint64 rows);
extern void owner_execute(CachedQuery *query, int nargs, Oid *types, Datum *values, const char *nulls);

#endif							/* PGF_OWNER_H */
