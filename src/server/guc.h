/*-------------------------------------------------------------------------
 *
 * guc.h
 *		The settings pg_fanout.*, but for those of the connection to the broker.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_GUC_H
#define PGF_GUC_H

/* For pg_fanout.max_channels. */
#define FEWEST_CHANNELS		4
#define MOST_CHANNELS		2000

extern bool pgf_enabled;
extern int	pgf_confirm_timeout;	/* ms */
extern int	pgf_max_in_flight;	/* messages of a topic */
extern int	pgf_max_channels;
extern int	pgf_retry_interval; /* ms */
extern int	pgf_retry_limit;	/* attempts */
extern int	pgf_retention;		/* s */
extern int	pgf_inbox_retention;	/* s */
extern int	pgf_consumer_memory;	/* kB */
extern int	pgf_max_databases;
extern int	pgf_max_subscriptions;

extern void guc_define(bool preloading);

/* For those who define settings of their own. */
extern void guc_define_int(const char *name, const char *short_desc, const char *long_desc,
						   int *variable, int min, int max, int flags);

#endif							/* PGF_GUC_H */
