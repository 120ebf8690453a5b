/*-------------------------------------------------------------------------
 *
 * key.c
 *		The keys of captured rows.
 *
 * A key is a text, and two rows have the same key if the texts are equal: no
 * consumer knows how the columns' types compare.
 *
 * It must never read a column that is excluded.
 *
 * No locks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "lib/stringinfo.h"
#include "utils/datum.h"

#include "capture/key.h"
#include "capture/rowjson.h"

/*
 * key_differs
 *		Tells whether an update has changed a column of the key.
 */
bool
key_differs(const CaptureInfo *info, HeapTuple old_row, HeapTuple new_row, TupleDesc desc)
{
	for (int i = 0; i < info->nkeys; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, info->keys[i] - 1);
		bool		old_null;
		bool		new_null;
		Datum		old_value = heap_getattr(old_row, info->keys[i], desc, &old_null);
		Datum		new_value = heap_getattr(new_row, info->keys[i], desc, &new_null);

		if (old_null != new_null)
			return true;
		if (!old_null && !datum_image_eq(old_value, new_value, attr->attbyval, attr->attlen))
			return true;
	}
	return false;
}

/*
 * key_render
 *		Returns the key as text: of a single column its value, of several a JSON
 *		array.  NULL: there is no key, or all of it is NULL.
 *
 * In the current context.  Raises errors of types' output functions.
 */
char *
key_render(const CaptureInfo *info, HeapTuple row, TupleDesc desc)
{
	StringInfoData out;
	bool		all_null = true;

	if (info->nkeys == 0)
		return NULL;
	if (info->nkeys == 1)
	{
		bool		isnull;
		Datum		value = heap_getattr(row, info->keys[0], desc, &isnull);

		return rowjson_text(info->key, 0, value, isnull);
	}

	initStringInfo(&out);
	for (int i = 0; i < info->nkeys; i++)
	{
		bool		isnull;
		Datum		value = heap_getattr(row, info->keys[i], desc, &isnull);

		appendStringInfoChar(&out, i == 0 ? '[' : ',');
		rowjson_append_value(&out, info->key, i, value, isnull);
		all_null = all_null && isnull;
	}
	appendStringInfoChar(&out, ']');
	return all_null ? NULL : out.data;
}
