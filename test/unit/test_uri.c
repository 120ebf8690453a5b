/*-------------------------------------------------------------------------
 *
 * test_uri.c
 *		Unit tests of uri.c.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/broker.h"
#include "tap.h"

static bool
same(const char *a, const char *b)
{
	return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

/* A single URI that is right. */
static void
good(const char *uri, const char *host, int port, const char *user, const char *password,
	 const char *vhost, bool tls)
{
	const char *error;
	int			count;
	BrokerAddress *a = broker_parse_uri(uri, &count, &error);

	if (!ok(a != NULL && count == 1 && error == NULL && same(a->host, host) && a->port == port &&
			same(a->user, user) && same(a->password, password) && same(a->vhost, vhost) &&
			a->tls == tls, "taken: %s", uri))
	{
		if (a == NULL)
			diag("%s", error);
		else
			diag("%s %d %s %s %s", a->host, a->port, a->user, a->password, a->vhost);
	}
	broker_free_addresses(a, count);
}

/* A list that is wrong; text is a part of the reason. */
static void
bad(const char *uri, const char *text)
{
	const char *error;
	int			count = -1;
	BrokerAddress *a = broker_parse_uri(uri, &count, &error);

	ok(a == NULL && count == 0 && error != NULL && strstr(error, text) != NULL &&
	   strstr(error, "secret") == NULL, "refused: %.60s: %s", uri, error ? error : "(taken)");
	broker_free_addresses(a, count);
}

static void
test_good(void)
{
	good("amqp://", "localhost", 5672, "guest", "guest", "/", false);
	good("amqps://", "localhost", 5671, "guest", "guest", "/", true);
	good("AMQP://h", "h", 5672, "guest", "guest", "/", false);
	good("  amqp://h \t", "h", 5672, "guest", "guest", "/", false);
	good("amqp://user@", "localhost", 5672, "user", NULL, "/", false);
	good("amqp://user:@h", "h", 5672, "user", "", "/", false);
	good("amqp://user:pass@h:10000/vhost", "h", 10000, "user", "pass", "vhost", false);
	good("amqp://:@/", "localhost", 5672, "", "", "/", false);
	good("amqp://:10000", "localhost", 10000, "guest", "guest", "/", false);
	good("amqp://h:/v", "h", 5672, "guest", "guest", "v", false);
	good("amqp:///vhost", "localhost", 5672, "guest", "guest", "vhost", false);
	good("amqp://host/", "host", 5672, "guest", "guest", "/", false);
	good("amqp://host/%2F", "host", 5672, "guest", "guest", "/", false);
	good("amqp://user%61:%61pass%40%2c%3A@ho%61st:10000/v%2fhost", "hoast", 10000, "usera",
		 "apass@,:", "v/host", false);
	good("amqp://u:a:b@h", "h", 5672, "u", "a:b", "/", false);
	good("amqps://[::1]", "::1", 5671, "guest", "guest", "/", true);
	good("amqp://u:p@[fe80::1%25eth0]:1/v", "fe80::1%eth0", 1, "u", "p", "v", false);
	good("amqp://h:65535", "h", 65535, "guest", "guest", "/", false);
	good("amqp://u%C3%A9:p@h", "h", 5672, "u\xc3\xa9", "p", "/", false);
}

static void
test_list(void)
{
	const char *error;
	int			count;
	BrokerAddress *a = broker_parse_uri(" amqp://a , amqps://u:p@b:1/v,\tamqp://c", &count, &error);

	ok(a != NULL && count == 3, "a list of three");
	if (a == NULL)
		return;
	ok(same(a[0].host, "a") && same(a[1].host, "b") && same(a[2].host, "c"), "in order");
	ok(a[1].tls && a[1].port == 1 && same(a[1].vhost, "v") && !a[2].tls, "each by itself");
	broker_free_addresses(a, count);
}

static void
test_bad(void)
{
	char		longname[400];

	bad("", "empty");
	bad("   ", "empty");
	bad("amqp://a,", "empty");
	bad("amqp://a,,amqp://b", "empty");
	bad("http://u:secret@h", "begin with amqp");
	bad("localhost", "begin with amqp");
	bad("amqp:/h", "begin with amqp");
	bad("amqp://u:secret@h:0", "between 1 and 65535");
	bad("amqp://u:secret@h:65536", "between 1 and 65535");
	bad("amqp://u:secret@h:99999999999999999999", "between 1 and 65535");
	bad("amqp://u:secret@h:-1", "not a number");
	bad("amqp://u:secret@h:port", "not a number");
	bad("amqp://u:sec/ret@h", "a password an unescaped \"/\"");
	bad("amqp://u:1234/secret@h", "a password an unescaped \"/\"");
	bad("amqp://h/v@secret", "unescaped \"@\"");
	bad("amqp://u:secret@x@h", "unescaped \"@\"");
	bad("amqp://u:sec%00ret@h", "escaped NUL");
	bad("amqp://u:secret%@h", "hexadecimal");
	bad("amqp://u:secret%4@h", "hexadecimal");
	bad("amqp://u:secret%zz@h", "hexadecimal");
	bad("amqp://h/%", "hexadecimal");
	bad("amqp://u:sec ret@h", "blank");
	bad("amqp://u:sec\x01ret@h", "blank or control");
	bad("amqp://h/v?heartbeat=10", "query");
	bad("amqp://h/v#x", "\"#\"");
	bad("amqp://h/v/w", "vhost contains an unescaped");
	bad("amqp://[::1", "missing");
	bad("amqp://[]", "not an IPv6");
	bad("amqp://[host]", "not an IPv6");
	bad("amqp://[::1]x", "after an IPv6");
	bad("amqp://::1", "in brackets");
	bad("amqp://good,amqp://u:secret@h:0", "between 1 and 65535");

	memset(longname, 'x', sizeof(longname));
	memcpy(longname, "amqp://h/", 9);
	longname[399] = '\0';
	bad(longname, "vhost is too long");
	memcpy(longname, "amqp://xx", 9);
	bad(longname, "host name is too long");
}

int
main(void)
{
	test_good();
	test_list();
	test_bad();
	return done();
}
