/*-------------------------------------------------------------------------
 *
 * pg_fanout.c
 *		Where the server meets the library: wiring, and nothing else.
 *
 * Preloaded (shared_preload_libraries), the library gets its shared memory,
 * hooks and launcher.  Loaded later, by a function or a trigger, it only
 * writes the outbox: rows wait there until a server with the preload reads
 * them.
 *
 * Must never: read a table or the catalog, since the postmaster runs this, which is in no
 * database.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "broker/settings.h"
#include "capture/nesting.h"
#include "capture/writer.h"
#include "consume/inbox.h"
#include "server/compat.h"
#include "server/estimates.h"
#include "server/guc.h"
#include "server/hooks.h"
#include "server/launcher.h"
#include "server/refused.h"
#include "server/shmem.h"
#include "server/wakeup.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

/*
 * Defines all settings.  What was asked for is collected before, and compared
 * afterwards, because a value that a definition refuses is lost.
 */
static void
define_settings(bool preloading)
{
	List	   *asked = preloading ? refused_collect() : NIL;

	guc_define(preloading);
	settings_define();
	if (preloading)
	{
		MarkGUCPrefixReserved("pg_fanout");
		refused_note(asked);
	}
}

void
_PG_init(void)
{
	define_settings(process_shared_preload_libraries_in_progress);

	if (IsBinaryUpgrade)
		return;
	if (!process_shared_preload_libraries_in_progress)
	{
		nesting_init();
		return;
	}

	shmem_init();
	hooks_init();
	estimates_init();
	wakeup_init();
	writer_init();
	nesting_init();
	inbox_init();
	launcher_register();
}
