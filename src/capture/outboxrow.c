/*-------------------------------------------------------------------------
 *
 * outboxrow.c
 *		From a message to a row of the outbox.
 *
 * The columns are known, so their values go straight to their places.
 * heap_form_tuple() would want each as a datum, copied before, and was a fifth of
 * the cost of a captured row.  A row is laid out as any other:
 *
 *		 0	header, with a bitmap of the columns that are not NULL
 *		32	segment, database, id, xid, topic_id, message_id: OutboxHead
 *		76	type, key, headers, payload, queue: with a length of one byte if short,
 *			else of four and aligned; nothing if NULL
 *			created_at, aligned
 *
 * segment_append() sees to it that the table still has these columns.
 *
 * No locks.  It must never read anything but the message.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/memutils.h"

#include "capture/outboxrow.h"
#include "server/compat.h"

#define HEADER_SIZE MAXALIGN(SizeofHeapTupleHeader + BITMAPLEN(OUTBOX_NATTS))
#define FIXED_SIZE (offsetof(OutboxHead, message_id) + UUID_LEN)

/* Columns of fanout.outbox, made once per session. */
TupleDesc
outboxrow_descriptor(void)
{
	static const Oid types[OUTBOX_NATTS] = {
		INT2OID, OIDOID, INT8OID, XID8OID, INT4OID, UUIDOID, TEXTOID,
		TEXTOID, JSONBOID, TEXTOID, TEXTOID, TIMESTAMPTZOID
	};
	static TupleDesc desc = NULL;
	MemoryContext old_context;
	TupleDesc	fresh;

	if (desc != NULL)
		return desc;
	old_context = MemoryContextSwitchTo(TopMemoryContext);
	fresh = CreateTemplateTupleDesc(OUTBOX_NATTS);
	for (int i = 0; i < OUTBOX_NATTS; i++)
		TupleDescInitEntry(fresh, i + 1, NULL, types[i], -1, 0);
	MemoryContextSwitchTo(old_context);
	desc = fresh;
	return desc;
}

/* The most that columns take which may be NULL, their lengths and alignment included. */
static Size
variable_size(const OutboxRow *row)
{
	const Size	overhead = VARHDRSZ + ALIGNOF_INT;

	return 5 * overhead + row->payload_len +
		(row->type != NULL ? strlen(row->type) : 0) +
		(row->key != NULL ? strlen(row->key) : 0) +
		(row->headers != NULL ? VARSIZE(row->headers) : 0) +
		(row->queue != NULL ? strlen(row->queue) : 0);
}

/* Allocates a row that has no values yet.  size: of all columns, at most. */
static HeapTuple
allocate_row(Size size)
{
	HeapTuple	tuple = palloc(HEAPTUPLESIZE + HEADER_SIZE + size);
	HeapTupleHeader header = (HeapTupleHeader) ((char *) tuple + HEAPTUPLESIZE);

	memset(header, 0, HEADER_SIZE + FIXED_SIZE);
	ItemPointerSetInvalid(&header->t_ctid);
	HeapTupleHeaderSetNatts(header, OUTBOX_NATTS);
	header->t_hoff = HEADER_SIZE;
	header->t_infomask = HEAP_HASNULL | HEAP_HASVARWIDTH;
	ItemPointerSetInvalid(&tuple->t_self);
	tuple->t_tableOid = InvalidOid;
	tuple->t_data = header;
	return tuple;
}

static void
set_not_null(HeapTuple tuple, AttrNumber column)
{
	tuple->t_data->t_bits[(column - 1) / BITS_PER_BYTE] |= 1 << ((column - 1) % BITS_PER_BYTE);
}

/* Fills in the columns that have fixed places, and returns where the next one begins. */
static char *
put_fixed(HeapTuple tuple, const OutboxRow *row, int segment)
{
	OutboxHead *columns = (OutboxHead *) ((char *) tuple->t_data + HEADER_SIZE);

	columns->segment = segment;
	columns->database = MyDatabaseId;
	columns->id = row->id;
	columns->xid = U64FromFullTransactionId(GetTopFullTransactionId());
	columns->topic_id = row->topic_id;
	memcpy(&columns->message_id, &row->message_id, UUID_LEN);
	for (AttrNumber column = OUTBOX_SEGMENT; column <= OUTBOX_MESSAGE_ID; column++)
		set_not_null(tuple, column);
	return (char *) columns + FIXED_SIZE;
}

/* Goes on to an aligned place; what is left out is zero, as everywhere in the server. */
static char *
align(char *place, uintptr_t alignment)
{
	char	   *aligned = (char *) TYPEALIGN(alignment, place);

	memset(place, 0, aligned - place);
	return aligned;
}

/* Fills in a column of variable length, and returns where the next one begins. */
static char *
put_bytes(HeapTuple tuple, char *place, AttrNumber column, const char *bytes, Size len)
{
	set_not_null(tuple, column);
	if (len + VARHDRSZ_SHORT <= VARATT_SHORT_MAX)
	{
		SET_VARSIZE_SHORT(place, len + VARHDRSZ_SHORT);
		memcpy(place + VARHDRSZ_SHORT, bytes, len);
		return place + VARHDRSZ_SHORT + len;
	}
	place = align(place, ALIGNOF_INT);
	SET_VARSIZE(place, len + VARHDRSZ);
	memcpy(VARDATA(place), bytes, len);
	return place + VARHDRSZ + len;
}

static char *
put_string(HeapTuple tuple, char *place, AttrNumber column, const char *string)
{
	return string == NULL ? place : put_bytes(tuple, place, column, string, strlen(string));
}

/*
 * Returns the row that a message becomes, in a chunk of the current context, for
 * heap_freetuple().  Raises the error of palloc() if that would be larger than 1 GB.
 */
HeapTuple
outboxrow_form(const OutboxRow *row, int segment)
{
	HeapTuple	tuple = allocate_row(FIXED_SIZE + variable_size(row) + MAXIMUM_ALIGNOF + sizeof(TimestampTz));
	char	   *place = put_fixed(tuple, row, segment);

	place = put_string(tuple, place, OUTBOX_TYPE, row->type);
	place = put_string(tuple, place, OUTBOX_KEY, row->key);
	if (row->headers != NULL)
		place = put_bytes(tuple, place, OUTBOX_HEADERS, VARDATA(row->headers), VARSIZE(row->headers) - VARHDRSZ);
	place = put_bytes(tuple, place, OUTBOX_PAYLOAD, row->payload, row->payload_len);
	place = put_string(tuple, place, OUTBOX_QUEUE, row->queue);
	place = align(place, ALIGNOF_DOUBLE);
	set_not_null(tuple, OUTBOX_CREATED_AT);
	memcpy(place, &row->created_at, sizeof(row->created_at));
	tuple->t_len = place + sizeof(row->created_at) - (char *) tuple->t_data;
	return tuple;
}
