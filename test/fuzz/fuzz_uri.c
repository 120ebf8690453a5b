/*-------------------------------------------------------------------------
 *
 * fuzz_uri.c
 *		Any text into the parser of pg_fanout.uri.
 *
 * Promised: what is taken has all its parts, within their limits; written again
 * with everything escaped, it is read as the same.  What is not taken gets a
 * text that is a constant, so that no password is in it.
 *
 *-------------------------------------------------------------------------
 */
#include "broker/broker.h"
#include "fuzz.h"

static char *
escape(char *to, const char *from)
{
	for (; *from != '\0'; from++)
		to += sprintf(to, "%%%02x", (unsigned char) *from);
	return to;
}

/* Room for three bytes for each of the address's, and the punctuation. */
static char *
write_uri(const BrokerAddress *a)
{
	char	   *uri = malloc(3 * (strlen(a->host) + strlen(a->user) +
								  (a->password ? strlen(a->password) : 0) + strlen(a->vhost)) + 64);
	char	   *to = uri;

	to += sprintf(to, a->tls ? "amqps://" : "amqp://");
	to = escape(to, a->user);
	if (a->password != NULL)
	{
		*to++ = ':';
		to = escape(to, a->password);
	}
	*to++ = '@';
	if (strchr(a->host, ':') != NULL)
		*to++ = '[';
	to = escape(to, a->host);
	if (strchr(a->host, ':') != NULL)
		*to++ = ']';
	to += sprintf(to, ":%d/", a->port);
	to = escape(to, a->vhost);
	*to = '\0';
	return uri;
}

static void
check_address(const BrokerAddress *a)
{
	CHECK(a->user != NULL);
	CHECK(strlen(a->host) <= BROKER_MAX_SHORTSTR && strlen(a->vhost) <= BROKER_MAX_SHORTSTR);
	CHECK(a->port >= 1 && a->port <= 65535);
}

static void
check_round_trip(const BrokerAddress *a)
{
	const char *error;
	int			count;
	char	   *uri = write_uri(a);
	BrokerAddress *again = broker_parse_uri(uri, &count, &error);

	/* escaped, a ":" in a host is no IPv6 address */
	if (strchr(a->host, ':') == NULL)
	{
		CHECK(again != NULL && count == 1);
		CHECK(again->tls == a->tls && again->port == a->port);
		CHECK(strcmp(again->host, a->host[0] ? a->host : "localhost") == 0);
		CHECK(strcmp(again->user, a->user) == 0);
		CHECK((again->password == NULL) == (a->password == NULL));
		CHECK(a->password == NULL || strcmp(again->password, a->password) == 0);
		CHECK(strcmp(again->vhost, a->vhost[0] ? a->vhost : "/") == 0);
	}
	if (again != NULL)
		broker_free_addresses(again, count);
	free(uri);
}

int
LLVMFuzzerTestOneInput(const uint8_t * data, size_t size)
{
	const char *error = NULL;
	int			count = -1;
	char	   *uri = malloc(size + 1);
	BrokerAddress *addresses;

	memcpy(uri, data, size);
	uri[size] = '\0';
	addresses = broker_parse_uri(uri, &count, &error);
	if (addresses == NULL)
		CHECK(count == 0 && error != NULL && (error < uri || error > uri + size));
	else
	{
		CHECK(count > 0 && error == NULL);
		for (int i = 0; i < count; i++)
		{
			check_address(&addresses[i]);
			check_round_trip(&addresses[i]);
		}
		broker_free_addresses(addresses, count);
	}
	free(uri);
	return 0;
}
