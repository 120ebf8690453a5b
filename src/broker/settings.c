/*-------------------------------------------------------------------------
 *
 * settings.c
 *		The settings of the connection to the broker, and the password file.
 *
 * What ALTER DATABASE and ALTER ROLE store is in pg_db_role_setting, which
 * everybody can read.  So they refuse a URI with a password.  One that is
 * there all the same (stored before this library was loaded) is used, with a
 * warning from the publisher: refusing it then would only take away the
 * broker, not the secret.
 *
 * GUC_SUPERUSER_ONLY still lets members of pg_read_all_settings see a value,
 * pg_monitor among them; so SHOW never shows the password in a URI, not even
 * to superusers, and pg_settings leaves the setting out.
 *
 * Nothing here may print the value of pg_fanout.uri.  The server does so when
 * a check hook fails without a message of its own, so each failure sets one.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>
#include <unistd.h>

#include "common/string.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/guc.h"
#include "utils/memutils.h"

#include "broker/broker.h"
#include "broker/settings.h"
#include "server/compat.h"
#include "server/guc.h"

#define DEFAULT_URI			"amqp://guest:guest@localhost:5672/"

/* pg_settings would show the reset value, for which there is no show hook */
#define HIDDEN (GUC_SUPERUSER_ONLY | GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE)

char	   *pgf_uri;
char	   *pgf_password_file;
char	   *pgf_tls_ca_file;
char	   *pgf_tls_cert_file;
char	   *pgf_tls_key_file;
bool		pgf_tls_verify = true;
int			pgf_connect_timeout = 1500;
int			pgf_heartbeat = 30;

static void define_connection_settings(void);
static void define_tls_settings(void);
static void define_secret(const char *name, const char *short_desc, const char *long_desc,
						  char **variable, const char *boot_value,
						  GucStringCheckHook check_hook);
static const char *show_uri(void);
static bool check_uri(char **newval, void **extra, GucSource source);
static bool check_stored_password(const BrokerAddress *addresses, int count, GucSource source);
static bool has_secret(const BrokerAddress *address);
static void check_password_file(const char *path);

/*
 * Defines the settings of the connection.  To be called once per process, before
 * the prefix of our settings is reserved.
 */
void
settings_define(void)
{
	define_connection_settings();
	define_tls_settings();
}

static void
define_connection_settings(void)
{
	define_secret("pg_fanout.uri",
				  "Where the broker is.",
				  "One or several amqp:// or amqps:// URIs, separated by commas, "
				  "tried in turn.",
				  &pgf_uri, DEFAULT_URI, check_uri);
	define_secret("pg_fanout.password_file",
				  "File whose first line is the password for the broker.",
				  "It replaces any password in pg_fanout.uri.",
				  &pgf_password_file, "", NULL);
	guc_define_int("pg_fanout.connect_timeout",
				   "Time allowed for connecting and logging in to the broker.",
				   NULL,
				   &pgf_connect_timeout, 100, 60 * 1000, GUC_UNIT_MS);
	guc_define_int("pg_fanout.heartbeat",
				   "Interval of heartbeats on the connection to the broker.",
				   "0 disables heartbeats.",
				   &pgf_heartbeat, 0, 3600, GUC_UNIT_S);
}

static void
define_tls_settings(void)
{
	define_secret("pg_fanout.tls_ca_file",
				  "File with the certificate authorities that the broker's certificate must come from.",
				  "If empty, those of the operating system.",
				  &pgf_tls_ca_file, "", NULL);
	define_secret("pg_fanout.tls_cert_file",
				  "File with the certificate to show to the broker.",
				  NULL,
				  &pgf_tls_cert_file, "", NULL);
	define_secret("pg_fanout.tls_key_file",
				  "File with the private key of the certificate to show to the broker.",
				  NULL,
				  &pgf_tls_key_file, "", NULL);
	DefineCustomBoolVariable("pg_fanout.tls_verify",
							 "Verifies the broker's certificate and host name.",
							 NULL,
							 &pgf_tls_verify,
							 pgf_tls_verify,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
}

/* A string that only superusers may see. */
static void
define_secret(const char *name, const char *short_desc, const char *long_desc,
			  char **variable, const char *boot_value, GucStringCheckHook check_hook)
{
	DefineCustomStringVariable(name, short_desc, long_desc,
							   variable, boot_value,
							   PGC_SUSET,
							   variable == &pgf_uri ? HIDDEN : GUC_SUPERUSER_ONLY,
							   check_hook, NULL,
							   variable == &pgf_uri ? show_uri : NULL);
}

static bool
check_uri(char **newval, void **extra, GucSource source)
{
	BrokerAddress *addresses;
	const char *error = NULL;
	int			count = 0;
	bool		ok;

	addresses = broker_parse_uri(*newval, &count, &error);
	if (addresses == NULL)
	{
		GUC_check_errmsg("invalid value for parameter \"%s\"", "pg_fanout.uri");
		GUC_check_errdetail("%s", error);
		return false;
	}
	ok = check_stored_password(addresses, count, source);
	broker_free_addresses(addresses, count);
	return ok;
}

/*
 * PGC_S_TEST is how ALTER DATABASE, ALTER ROLE and CREATE FUNCTION ... SET ask
 * whether they may store a value in a catalog.
 */
static bool
check_stored_password(const BrokerAddress *addresses, int count, GucSource source)
{
	bool		stored = (source >= PGC_S_GLOBAL && source <= PGC_S_DATABASE_USER);

	if (source != PGC_S_TEST && !(stored && AmBackgroundWorkerProcess()))
		return true;
	for (int i = 0; i < count; i++)
	{
		if (!has_secret(&addresses[i]))
			continue;
		if (stored)
		{
			ereport(WARNING,
					(errmsg("the password in pg_fanout.uri can be read by every user"),
					 errdetail("It is stored in the catalog pg_db_role_setting."),
					 errhint("Change it, and use pg_fanout.password_file.")));
			return true;
		}
		GUC_check_errmsg("pg_fanout.uri must not be stored in the database with a password");
		GUC_check_errdetail("Every user could read it there.");
		GUC_check_errhint("Use pg_fanout.password_file, or set pg_fanout.uri in postgresql.conf.");
		return false;
	}
	return true;
}

/* guest:guest is what RabbitMQ is shipped with, and what no user means. */
static bool
has_secret(const BrokerAddress *address)
{
	if (address->password == NULL || address->password[0] == '\0')
		return false;
	return strcmp(address->user, "guest") != 0 || strcmp(address->password, "guest") != 0;
}

/*
 * Reads the password from pg_fanout.password_file: its first line without the
 * line end, palloc'd in the current context, or NULL if no file is set.  Raises
 * an error if the file cannot be read, if it is empty, or if others than its
 * owner may read it (the server's rule for ssl_key_file: a file of root may be
 * readable by a group).  The error names the file and quotes nothing of it.
 */
char *
settings_read_password(void)
{
	FILE	   *file;
	StringInfoData line;
	bool		found;

	if (pgf_password_file == NULL || pgf_password_file[0] == '\0')
		return NULL;

	check_password_file(pgf_password_file);
	file = AllocateFile(pgf_password_file, "r");
	if (file == NULL)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open password file \"%s\": %m", pgf_password_file)));
	initStringInfo(&line);
	found = pg_get_line_buf(file, &line);
	FreeFile(file);

	if (!found || pg_strip_crlf(line.data) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("password file \"%s\" has no password in its first line",
						pgf_password_file)));
	return line.data;
}

/* The rules of check_ssl_key_file_permissions(). */
static void
check_password_file(const char *path)
{
	struct stat st;

	if (stat(path, &st) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not access password file \"%s\": %m", path)));
	if (!S_ISREG(st.st_mode))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("password file \"%s\" is not a regular file", path)));
	if (st.st_uid != geteuid() && st.st_uid != 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("password file \"%s\" must be owned by the database user or root", path)));
	if ((st.st_uid == geteuid() && (st.st_mode & (S_IRWXG | S_IRWXO))) ||
		(st.st_uid == 0 && (st.st_mode & (S_IWGRP | S_IXGRP | S_IRWXO))))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("password file \"%s\" has group or world access", path),
				 errdetail("File must have permissions u=rw (0600) or less if owned by the database user, or permissions u=rw,g=r (0640) or less if owned by root.")));
}

/* Where the password in the URI that begins at s begins; NULL if it has none. */
static const char *
find_password(const char *s, const char **end)
{
	const char *host = s + strcspn(s, "/,?#");
	const char *colon = memchr(s, ':', host - s);

	*end = NULL;
	for (const char *c = s; c < host; c++)
	{
		if (*c == '@')
			*end = c;
	}
	return (*end != NULL && colon != NULL && colon < *end) ? colon + 1 : NULL;
}

/*
 * The setting with passwords masked.  The result is valid until the next call;
 * the server copies it at once.
 */
static const char *
show_uri(void)
{
	static StringInfo out = NULL;
	const char *s = pgf_uri;
	const char *scheme;

	if (out == NULL)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);

		out = makeStringInfo();
		MemoryContextSwitchTo(oldcontext);
	}
	resetStringInfo(out);
	while ((scheme = strstr(s, "://")) != NULL)
	{
		const char *end;
		const char *password = find_password(scheme + 3, &end);

		if (password == NULL)
			end = password = scheme + 3;
		appendBinaryStringInfo(out, s, password - s);
		if (end != password || *end == '@')
			appendStringInfoString(out, "***");
		s = end;
	}
	appendStringInfoString(out, s);
	return out->data;
}
