/*-------------------------------------------------------------------------
 *
 * headers.c
 *		Reading the headers of a message, a jsonb object.
 *
 * Must never: trust that it is one, since a producer may send anything.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "capture/headers.h"

JsonbValue *
headers_find(Jsonb *headers, const char *name, JsonbValue *buffer)
{
	if (headers == NULL || !JB_ROOT_IS_OBJECT(headers))
		return NULL;
	return getKeyJsonValueFromContainer(&headers->root, name, strlen(name), buffer);
}

char *
headers_string(Jsonb *headers, const char *name)
{
	JsonbValue	buffer;
	JsonbValue *value = headers_find(headers, name, &buffer);

	if (value == NULL || value->type != jbvString)
		return NULL;
	return pnstrdup(value->val.string.val, value->val.string.len);
}
