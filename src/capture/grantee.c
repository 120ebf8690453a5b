/*-------------------------------------------------------------------------
 *
 * grantee.c
 *		The type of a role that something was granted to.
 *
 * A grant must follow its role when that is renamed, and must not go to another role
 * that takes the name of one that was dropped: so it has the role's oid.  In another
 * server the oid means nothing, and there the role may be missing while a dump is
 * restored: so it also has the name.  Unlike regrole, the type accepts a name that no
 * role has.
 *
 *		in memory						as text				which role
 *		-----------------------------	----------------	---------------------------
 *		oid of a role					its name of today	that one
 *		oid of a role that was dropped	''					none, ever again
 *		name alone						the name			whichever has it when asked
 *
 * The text is what dumps contain.  No role's name is empty, so '' is read as none, too.
 *
 * Must never: raise an error because a role is missing.
 *
 * Locks: none but those of a look into pg_authid.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"

#include "capture/grantee.h"

PG_FUNCTION_INFO_V1(pgf_grantee_in);
PG_FUNCTION_INFO_V1(pgf_grantee_out);

/* Returns the role that a grantee is now, or InvalidOid if there is none. */
Oid
grantee_role(const Grantee *grantee)
{
	if (!OidIsValid(grantee->role))
		return get_role_oid(NameStr(grantee->name), true);
	return GetUserNameFromId(grantee->role, true) != NULL ? grantee->role : InvalidOid;
}

/* Reads a role's name as it is, without quotes; 42622 if no role can have it. */
Datum
pgf_grantee_in(PG_FUNCTION_ARGS)
{
	char	   *name = PG_GETARG_CSTRING(0);
	Grantee    *grantee = palloc0(sizeof(Grantee));

	if (strlen(name) >= NAMEDATALEN)
		ereport(ERROR,
				(errcode(ERRCODE_NAME_TOO_LONG),
				 errmsg("name of a role is too long")));
	namestrcpy(&grantee->name, name);
	grantee->role = get_role_oid(name, true);
	PG_RETURN_POINTER(grantee);
}

/* Returns the name that a dump must contain, see above. */
Datum
pgf_grantee_out(PG_FUNCTION_ARGS)
{
	Grantee    *grantee = (Grantee *) PG_GETARG_POINTER(0);
	char	   *name;

	if (!OidIsValid(grantee->role))
		PG_RETURN_CSTRING(pstrdup(NameStr(grantee->name)));
	name = GetUserNameFromId(grantee->role, true);
	PG_RETURN_CSTRING(name != NULL ? name : pstrdup(""));
}
