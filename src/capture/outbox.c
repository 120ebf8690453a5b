/*-------------------------------------------------------------------------
 *
 * outbox.c
 *		Writing the outbox, in the application's transaction.
 *
 * Must never: check rights, read a table of ours, or wait for anything.
 *
 * Locks: ROW EXCLUSIVE on a segment until the transaction ends, so that rotation,
 * which takes ACCESS EXCLUSIVE without waiting, never meets a row that is still
 * undecided.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "utils/xid8.h"

#include "capture/outbox.h"
#include "capture/writer.h"
#include "server/segment.h"
#include "server/shmem.h"
#include "server/tables.h"
#include "server/wakeup.h"

/*
 * Writes one message into the current segment, at once or at the latest when the
 * statement ends, and arranges for the publisher to be woken at commit.  Checks
 * no rights: the caller has decided.
 */
void
outbox_insert(const OutboxRow *row, bool at_once)
{
	DatabaseSlot *slot = shmem_my_slot();
	int			segment = slot ? pg_atomic_read_u32(&slot->current_segment) : 0;

	if (at_once)
		writer_insert(segment, row);
	else
		writer_queue(segment, row);
	wakeup_publisher_at_commit();
}

/* Records that the current transaction changed topics or bindings. */
void
outbox_topology_changed(void)
{
	TupleDesc	desc = CreateTemplateTupleDesc(1);
	Datum		value = FullTransactionIdGetDatum(GetTopFullTransactionId());
	bool		isnull = false;
	HeapTuple	row;

	TupleDescInitEntry(desc, 1, NULL, XID8OID, -1, 0);
	row = heap_form_tuple(desc, &value, &isnull);
	segment_insert(tables_topology_change(), desc, &row, 1);
	wakeup_publisher_at_commit();
}
