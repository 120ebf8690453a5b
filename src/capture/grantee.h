/*-------------------------------------------------------------------------
 *
 * grantee.h
 *		The type of a role that something was granted to.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_GRANTEE_H
#define PGF_GRANTEE_H

#include "postgres.h"

/* A value of the type fanout.grantee, see the head of grantee.c. */
typedef struct Grantee
{
	Oid			role;			/* invalid: known by name alone */
	NameData	name;			/* when it was written */
} Grantee;

extern Oid	grantee_role(const Grantee *grantee);

#endif							/* PGF_GRANTEE_H */
