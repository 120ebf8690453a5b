/*-------------------------------------------------------------------------
 *
 * guc.c
 *		The settings pg_fanout.*, but for those of the connection to the broker,
 *		which are in settings.c.
 *
 * All but max_databases and max_subscriptions take effect at a reload, and can
 * be set for one database with ALTER DATABASE ... SET; hooks.c then restarts
 * that database's workers.
 *
 * A value that is refused where nobody can be told, as at the start of the
 * server, does not let the default be used in its place: see refused.c.
 *
 * Must never: know the broker; define a setting that holds a secret.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "utils/guc.h"

#include "server/guc.h"

#define SECONDS_PER_YEAR	(365 * 24 * 3600)

bool		pgf_enabled = true;
int			pgf_confirm_timeout = 60000;
int			pgf_max_in_flight = 2000;
int			pgf_max_channels = 256;
int			pgf_retry_interval = 5000;
int			pgf_retry_limit = 10;
int			pgf_retention = 24 * 3600;
int			pgf_inbox_retention = 7 * 24 * 3600;
int			pgf_consumer_memory = 64 * 1024;
int			pgf_max_databases = 64;
int			pgf_max_subscriptions = 32;

static void define_switch(void);
static void define_publishing_settings(void);
static void define_consuming_settings(void);
static void define_limits(void);

/*
 * Defines the settings.  preloading: the library is being loaded by the
 * postmaster, so that those that need it (max_databases, ...) can be defined
 * too.
 */
void
guc_define(bool preloading)
{
	define_switch();
	define_publishing_settings();
	define_consuming_settings();

	/* Without the preload, these would pass for typing errors. */
	if (preloading)
		define_limits();
}

static void
define_switch(void)
{
	DefineCustomBoolVariable("pg_fanout.enabled",
							 "Publishes and consumes.",
							 "Changes are captured in any case.",
							 &pgf_enabled,
							 pgf_enabled,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
}

static void
define_publishing_settings(void)
{
	guc_define_int("pg_fanout.confirm_timeout",
				   "Time after which a broker that has confirmed nothing is given up.",
				   NULL,
				   &pgf_confirm_timeout, 1000, 3600 * 1000, GUC_UNIT_MS);
	guc_define_int("pg_fanout.max_in_flight",
				   "Maximum number of messages of a topic published and not yet confirmed.",
				   NULL,
				   &pgf_max_in_flight, 1, 65535, 0);
	guc_define_int("pg_fanout.max_channels",
				   "Maximum number of channels on which topics are published at the same time.",
				   NULL,
				   &pgf_max_channels, FEWEST_CHANNELS, MOST_CHANNELS, 0);
	guc_define_int("pg_fanout.retry_interval",
				   "Time before a topic that failed is tried again, the first time.",
				   NULL,
				   &pgf_retry_interval, 100, 3600 * 1000, GUC_UNIT_MS);
	guc_define_int("pg_fanout.retry_limit",
				   "Number of attempts after which a failing topic raises an alert.",
				   NULL,
				   &pgf_retry_limit, 1, INT_MAX, 0);
	guc_define_int("pg_fanout.retention",
				   "Time for which sent messages are kept.",
				   NULL,
				   &pgf_retention, 1, SECONDS_PER_YEAR, GUC_UNIT_S);
}

static void
define_consuming_settings(void)
{
	guc_define_int("pg_fanout.inbox_retention",
				   "Time for which messages that were applied are remembered, so that repeats are recognised.",
				   NULL,
				   &pgf_inbox_retention, 1, SECONDS_PER_YEAR, GUC_UNIT_S);
	guc_define_int("pg_fanout.consumer_memory",
				   "Size of the messages that a consumer keeps in memory at once.",
				   "A single message may be larger.",
				   &pgf_consumer_memory, 64, MAX_KILOBYTES, GUC_UNIT_KB);
}

static void
define_limits(void)
{
	DefineCustomIntVariable("pg_fanout.max_databases",
							"Maximum number of databases that can have a publisher.",
							NULL,
							&pgf_max_databases,
							pgf_max_databases, 1, 10000,
							PGC_POSTMASTER, 0,
							NULL, NULL, NULL);
	DefineCustomIntVariable("pg_fanout.max_subscriptions",
							"Maximum number of subscriptions, of all databases, that can have a worker.",
							NULL,
							&pgf_max_subscriptions,
							pgf_max_subscriptions, 0, 10000,
							PGC_POSTMASTER, 0,
							NULL, NULL, NULL);
}

/*
 * Defines a number that is looked at again at each reload.  The variable's
 * initial value is the default; flags: GUC_UNIT_xxx.
 */
void
guc_define_int(const char *name, const char *short_desc, const char *long_desc,
			   int *variable, int min, int max, int flags)
{
	DefineCustomIntVariable(name, short_desc, long_desc,
							variable, *variable, min, max,
							PGC_SUSET, flags,
							NULL, NULL, NULL);
}
