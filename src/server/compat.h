/*-------------------------------------------------------------------------
 *
 * compat.h
 *		Differences between PostgreSQL 14 and 18, in one place.
 *
 * No other file tests PG_VERSION_NUM.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_COMPAT_H
#define PGF_COMPAT_H

#include "postgres.h"

#include "access/genam.h"
#include "access/transam.h"
#include "catalog/pg_database.h"
#include "catalog/pg_proc.h"
#include "commands/sequence.h"
#include "fmgr.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "postmaster/autovacuum.h"
#include "replication/walsender.h"
#include "rewrite/rewriteHandler.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/guc_tables.h"
#include "utils/rel.h"
#include "utils/wait_event.h"

#include "server/append.h"

#if PG_VERSION_NUM < 140000
#error "pg_fanout needs PostgreSQL 14 or later"
#endif

/* 15: shared memory is requested in a hook, not in _PG_init */
#if PG_VERSION_NUM >= 150000
#define PGF_HAVE_SHMEM_REQUEST_HOOK 1
#else
#define PGF_HAVE_SHMEM_REQUEST_HOOK 0
#endif

/*
 * 15: MaxBackends is known when shared memory is requested.  Before, it is this
 * (InitializeMaxBackends() in postinit.c).
 */
static inline int
pgf_max_backends(void)
{
#if PG_VERSION_NUM >= 150000
	return MaxBackends;
#else
	return MaxConnections + autovacuum_max_workers + 1 + max_worker_processes + max_wal_senders;
#endif
}

/* 17: the number is not a field of PGPROC any more; that of a backend is below MaxBackends */
static inline int
pgf_my_proc_number(void)
{
#if PG_VERSION_NUM >= 170000
	return MyProcNumber;
#else
	return MyProc->pgprocno;
#endif
}

/* 17: another name; the caller holds XactTruncationLock */
static inline TransactionId
pgf_oldest_clog_xid(void)
{
#if PG_VERSION_NUM >= 170000
	return TransamVariables->oldestClogXid;
#else
	return ShmemVariableCache->oldestClogXid;
#endif
}

/* 17: it belongs to a resource owner; here to none, as before */
static inline WaitEventSet *
pgf_create_wait_event_set(int nevents)
{
#if PG_VERSION_NUM >= 170000
	return CreateWaitEventSet(NULL, nevents);
#else
	return CreateWaitEventSet(TopMemoryContext, nevents);
#endif
}

/* 15: a prefix can be reserved */
#if PG_VERSION_NUM < 150000
#define MarkGUCPrefixReserved(prefix) EmitWarningsOnPlaceholders(prefix)
#endif

/* 14.9, 15.4 and later: DROP DATABASE that did not finish leaves this mark */
#ifndef DATCONNLIMIT_INVALID_DB
#define DATCONNLIMIT_INVALID_DB (-2)
#endif

/* 16: settings are in a hash table; before, in the array that is returned */
static inline struct config_generic **
pgf_guc_variables(int *n)
{
#if PG_VERSION_NUM >= 160000
	return get_guc_variables(n);
#else
	*n = GetNumConfigOptions();
	return get_guc_variables();
#endif
}

/* 17: IsBackgroundWorker has gone */
#if PG_VERSION_NUM < 170000
#define AmBackgroundWorkerProcess() (IsBackgroundWorker)
#endif

/* 18: pg_noreturn stands before the declaration */
#if PG_VERSION_NUM < 180000
#define pg_noreturn pg_attribute_noreturn()
#endif

/* 16: one function for the ownership of all kinds of objects, and one for rights on them */
static inline bool
pgf_owns_database(Oid database)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(DatabaseRelationId, database, GetUserId());
#else
	return pg_database_ownercheck(database, GetUserId());
#endif
}

static inline bool
pgf_may_execute(Oid function, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_aclcheck(ProcedureRelationId, function, role, ACL_EXECUTE) == ACLCHECK_OK;
#else
	return pg_proc_aclcheck(function, role, ACL_EXECUTE) == ACLCHECK_OK;
#endif
}

/* 16: a membership may not let a role act as the other */
static inline bool
pgf_may_become(Oid member, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return member_can_set_role(member, role);
#else
	return is_member_of_role(member, role);
#endif
}

/* 17: an extension's wait events have names */
typedef enum PgfWait
{
	PGF_WAIT_LAUNCHER,
	PGF_WAIT_PUBLISHER,
	PGF_WAIT_CONSUMER,
	PGF_WAIT_HISTORY,
	PGF_WAIT_STOP,
} PgfWait;

static inline uint32
pgf_wait_event(PgfWait wait)
{
#if PG_VERSION_NUM >= 170000
	static const char *const names[] = {
		"PgFanoutLauncherMain", "PgFanoutPublisherMain", "PgFanoutConsumerMain",
		"PgFanoutHistoryMain", "PgFanoutWorkerStop"
	};
	static uint32 events[lengthof(names)];

	if (events[wait] == 0)
		events[wait] = WaitEventExtensionNew(names[wait]);
	return events[wait];
#else
	return PG_WAIT_EXTENSION;
#endif
}

/* 15: one function begins a result in a tuplestore; its name is 15.1's */
static inline void
pgf_init_materialized(FunctionCallInfo fcinfo)
{
#if PG_VERSION_NUM >= 150000
	InitMaterializedSRF(fcinfo, 0);
#else
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	MemoryContext oldcontext;
	TupleDesc	desc;

	if (result == NULL || !IsA(result, ReturnSetInfo) || !(result->allowedModes & SFRM_Materialize))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("set-valued function called in context that cannot accept a set")));
	oldcontext = MemoryContextSwitchTo(result->econtext->ecxt_per_query_memory);
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	result->returnMode = SFRM_Materialize;
	result->setResult = tuplestore_begin_heap(true, false, work_mem);
	result->setDesc = desc;
	MemoryContextSwitchTo(oldcontext);
#endif
}

/* 18: a scan may count its searches */
static inline IndexScanDesc
pgf_index_beginscan(Relation heap, Relation index, Snapshot snapshot, int nkeys)
{
#if PG_VERSION_NUM >= 180000
	return index_beginscan(heap, index, snapshot, NULL, nkeys, 0);
#else
	return index_beginscan(heap, index, snapshot, nkeys, 0);
#endif
}

/* 15: a unique index may take NULL for one value */
static inline bool
pgf_nulls_not_distinct(Relation index)
{
#if PG_VERSION_NUM >= 150000
	return index->rd_index->indnullsnotdistinct;
#else
	return false;
#endif
}

/* 18: virtual generated columns are not in the row, but what they are generated from is */
static inline Node *
pgf_expand_generated(Node *expression, Relation rel, int varno)
{
#if PG_VERSION_NUM >= 180000
	return expand_generated_columns_in_expr(expression, rel, varno);
#else
	return expression;
#endif
}

/* 16: VARDATA_ANY() and the like have a header of their own */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/*
 * 18: escape_json_with_len().  It appends a JSON string literal of len bytes,
 * which need no NUL; the result is that of escape_json(), several times as
 * fast: bytes are looked at in words, and copied from one escape to the next.
 */
#if PG_VERSION_NUM < 180000
static inline bool
pgf_json_escapes_byte(unsigned char c)
{
	return c < ' ' || c == '"' || c == '\\';
}

/* The top bit of each byte says whether that byte is zero (or below 0x20). */
static inline bool
pgf_json_escapes_word(const char *p)
{
	const uint64 ones = UINT64CONST(0x0101010101010101);
	uint64		word;
	uint64		quote;
	uint64		backslash;

	memcpy(&word, p, sizeof(word));
	quote = word ^ (ones * '"');
	backslash = word ^ (ones * '\\');
	return ((((word - ones * ' ') & ~word) |
			 ((quote - ones) & ~quote) |
			 ((backslash - ones) & ~backslash)) & (ones * 0x80)) != 0;
}

static inline void
pgf_append_json_escape(StringInfo buf, char c)
{
	static const char letters[] = "\bb\ff\nn\rr\tt\"\"\\\\";

	for (const char *p = letters; *p != '\0'; p += 2)
	{
		if (*p == c)
		{
			appendStringInfoCharMacro(buf, '\\');
			appendStringInfoCharMacro(buf, p[1]);
			return;
		}
	}
	appendStringInfo(buf, "\\u%04x", (unsigned char) c);
}

static inline void
escape_json_with_len(StringInfo buf, const char *str, int len)
{
	const char *end = str + len;

	(void) append_room(buf, len + 2);
	append_char(buf, '"');
	while (str < end)
	{
		const char *start = str;

		while (end - str >= (int) sizeof(uint64) && !pgf_json_escapes_word(str))
			str += sizeof(uint64);
		if (end - str < (int) sizeof(uint64) && end - start >= (int) sizeof(uint64) &&
			!pgf_json_escapes_word(end - sizeof(uint64)))
			str = end;			/* the last word reaches into the one before */
		while (str < end && !pgf_json_escapes_byte((unsigned char) *str))
			str++;
		append_bytes(buf, start, str - start);
		if (str < end)
			pgf_append_json_escape(buf, *str++);
	}
	append_char(buf, '"');
}
#endif

/* Virtual generated columns (18) are not in the heap tuple. */
#if PG_VERSION_NUM >= 180000
#define PGF_IS_VIRTUAL_GENERATED(attr) ((attr)->attgenerated == ATTRIBUTE_GENERATED_VIRTUAL)
#else
#define PGF_IS_VIRTUAL_GENERATED(attr) false
#endif

/* 16: other names for the place of a relation's files */
static inline void
pgf_set_sequence_locator(xl_seq_rec * record, Relation sequence)
{
#if PG_VERSION_NUM >= 160000
	record->locator = sequence->rd_locator;
#else
	record->node = sequence->rd_node;
#endif
}

/* The parameters of ExecutorRun_hook, and how they are passed on. */
#if PG_VERSION_NUM >= 180000
#define PGF_EXECUTOR_RUN_ARGS QueryDesc *query, ScanDirection direction, uint64 count
#define PGF_EXECUTOR_RUN_PASS query, direction, count
#else
#define PGF_EXECUTOR_RUN_ARGS QueryDesc *query, ScanDirection direction, uint64 count, bool execute_once
#define PGF_EXECUTOR_RUN_PASS query, direction, count, execute_once
#endif

#endif							/* PGF_COMPAT_H */
