/*-------------------------------------------------------------------------
 *
 * uri.c
 *		Parses pg_fanout.uri: a list of AMQP URIs.
 *
 * RabbitMQ's URI specification (https://www.rabbitmq.com/docs/uri-spec),
 * which is RFC 3986 with these meanings:
 *
 *		amqp[s]://[user[:password]@][host][:port][/vhost]
 *
 * A list is separated by commas, with blanks around its items; a comma that
 * belongs to a password is written %2C.  rabbitmq-c's amqp_parse_url() writes
 * into its argument, knows no lists and takes "%00"; hence our own.
 *
 * Responsible for: syntax alone.  Whether a host exists is for the resolver.
 *
 * Must never: quote any part of the URI in an error, since it may hold a
 * password; hence all errors are static texts.
 *
 * Scenarios, each of them a test in test/unit/test_uri.c: all defaults; each
 * part alone; percent-decoding everywhere; lists with blanks; IPv6; no
 * vhost; ports 0, 65536 and not a number; NUL, control characters and broken
 * escapes; unknown scheme; query and fragment; a stray "@", "/" or ":", which
 * may well belong to a password; overlong parts.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "broker/broker.h"

#define AMQP_PORT	5672
#define AMQPS_PORT	5671

/* A part of the caller's string. */
typedef struct Span
{
	const char *start;
	const char *end;
} Span;

/* Parsers return NULL if all is well, else a static text. */
static const char *parse_list(Span list, BrokerAddress **addresses, int *count);
static const char *add_item(Span item, BrokerAddress **addresses, int *count);
static const char *parse_item(Span item, BrokerAddress *address);
static const char *check_characters(Span item);
static const char *parse_scheme(Span *rest, BrokerAddress *address);
static const char *parse_userinfo(Span userinfo, BrokerAddress *address);
static const char *default_userinfo(BrokerAddress *address);
static const char *parse_hostport(Span hostport, BrokerAddress *address);
static const char *parse_ipv6(Span *rest, BrokerAddress *address);
static const char *parse_port(Span digits, int *port);
static const char *parse_vhost(Span path, BrokerAddress *address);
static const char *decode(Span part, char **result);
static const char *duplicate(const char *text, char **result);
static const char *find(Span span, char c);
static int	hex_value(char c);
static Span trim(Span span);

static const char *const out_of_memory = "out of memory";

BrokerAddress *
broker_parse_uri(const char *uri, int *count, const char **error)
{
	Span		list = {uri, uri + strlen(uri)};
	BrokerAddress *addresses = NULL;

	*count = 0;
	*error = parse_list(list, &addresses, count);
	if (*error == NULL)
		return addresses;

	broker_free_addresses(addresses, *count);
	*count = 0;
	return NULL;
}

void
broker_free_addresses(BrokerAddress *addresses, int count)
{
	for (int i = 0; i < count; i++)
	{
		free(addresses[i].host);
		free(addresses[i].user);
		if (addresses[i].password != NULL)
			explicit_bzero(addresses[i].password, strlen(addresses[i].password));
		free(addresses[i].password);
		free(addresses[i].vhost);
	}
	free(addresses);
}

static const char *
parse_list(Span list, BrokerAddress **addresses, int *count)
{
	for (;;)
	{
		const char *comma = find(list, ',');
		Span		item = {list.start, comma ? comma : list.end};
		const char *problem = add_item(trim(item), addresses, count);

		if (problem != NULL || comma == NULL)
			return problem;
		list.start = comma + 1;
	}
}

static const char *
add_item(Span item, BrokerAddress **addresses, int *count)
{
	BrokerAddress *grown;

	grown = realloc(*addresses, ((size_t) *count + 1) * sizeof(BrokerAddress));
	if (grown == NULL)
		return out_of_memory;
	*addresses = grown;

	/* Counted first, so that what it holds is freed if it is faulty. */
	memset(&grown[*count], 0, sizeof(BrokerAddress));
	return parse_item(item, &grown[(*count)++]);
}

static const char *
parse_item(Span item, BrokerAddress *address)
{
	Span		authority;
	Span		path;
	const char *slash;
	const char *at;
	const char *problem;

	problem = check_characters(item);
	if (problem == NULL)
		problem = parse_scheme(&item, address);
	if (problem != NULL)
		return problem;

	slash = find(item, '/');
	authority.start = item.start;
	authority.end = slash ? slash : item.end;
	path.start = authority.end;
	path.end = item.end;
	if (find(path, '@') != NULL)
		return "vhost contains an unescaped \"@\", or a password an unescaped \"/\"";

	at = find(authority, '@');
	if (at != NULL)
	{
		Span		userinfo = {authority.start, at};

		problem = parse_userinfo(userinfo, address);
		authority.start = at + 1;
	}
	else
		problem = default_userinfo(address);

	if (problem == NULL)
		problem = parse_hostport(authority, address);
	if (problem == NULL)
		problem = parse_vhost(path, address);
	return problem;
}

/* What may stand nowhere, so that later parsers need not care. */
static const char *
check_characters(Span item)
{
	if (item.start == item.end)
		return "URI is empty";

	for (const char *p = item.start; p < item.end; p++)
	{
		if ((unsigned char) *p <= ' ' || *p == 0x7f)
			return "URI contains a blank or control character";
		if (*p == '?')
			return "query parameters in the URI are not supported";
		if (*p == '#')
			return "URI contains an unescaped \"#\"";
	}
	return NULL;
}

static const char *
parse_scheme(Span *rest, BrokerAddress *address)
{
	size_t		len = (size_t) (rest->end - rest->start);

	if (len >= 7 && strncasecmp(rest->start, "amqp://", 7) == 0)
	{
		rest->start += 7;
		address->port = AMQP_PORT;
		return NULL;
	}
	if (len >= 8 && strncasecmp(rest->start, "amqps://", 8) == 0)
	{
		rest->start += 8;
		address->port = AMQPS_PORT;
		address->tls = true;
		return NULL;
	}
	return "URI must begin with amqp:// or amqps://";
}

static const char *
parse_userinfo(Span userinfo, BrokerAddress *address)
{
	const char *colon = find(userinfo, ':');
	Span		user = {userinfo.start, colon ? colon : userinfo.end};
	Span		password = {colon ? colon + 1 : userinfo.end, userinfo.end};
	const char *problem;

	problem = decode(user, &address->user);
	if (problem == NULL && colon != NULL)
		problem = decode(password, &address->password);
	return problem;
}

static const char *
default_userinfo(BrokerAddress *address)
{
	const char *problem = duplicate("guest", &address->user);

	return problem ? problem : duplicate("guest", &address->password);
}

static const char *
parse_hostport(Span hostport, BrokerAddress *address)
{
	Span		host = hostport;
	const char *colon;
	const char *problem;

	if (find(hostport, '@') != NULL)
		return "user name or password contains an unescaped \"@\"";

	if (hostport.start < hostport.end && *hostport.start == '[')
	{
		problem = parse_ipv6(&hostport, address);
		if (problem != NULL)
			return problem;
		if (hostport.start == hostport.end)
			return NULL;
		if (*hostport.start != ':')
			return "unexpected characters after an IPv6 address";
		hostport.start++;
		return parse_port(hostport, &address->port);
	}

	colon = find(hostport, ':');
	if (colon != NULL)
	{
		Span		port = {colon + 1, hostport.end};

		if (find(port, ':') != NULL)
			return "more than one \":\" after the user name; an IPv6 address must be in brackets";
		problem = parse_port(port, &address->port);
		if (problem != NULL)
			return problem;
		host.end = colon;
	}
	if (host.start == host.end)
		return duplicate("localhost", &address->host);
	problem = decode(host, &address->host);
	if (problem == NULL && strlen(address->host) > BROKER_MAX_SHORTSTR)
		return "host name is too long";
	return problem;
}

/* [address], advancing *rest behind the bracket. */
static const char *
parse_ipv6(Span *rest, BrokerAddress *address)
{
	const char *bracket = find(*rest, ']');
	Span		inside;

	if (bracket == NULL)
		return "\"]\" of an IPv6 address is missing";
	inside.start = rest->start + 1;
	inside.end = bracket;
	if (find(inside, ':') == NULL || inside.end - inside.start > BROKER_MAX_SHORTSTR)
		return "address in brackets is not an IPv6 address";
	rest->start = bracket + 1;
	return decode(inside, &address->host);
}

/* An empty port is the default one (RFC 3986, section 3.2.3). */
static const char *
parse_port(Span digits, int *port)
{
	int			value = 0;

	if (digits.start == digits.end)
		return NULL;
	for (const char *p = digits.start; p < digits.end; p++)
	{
		if (*p < '0' || *p > '9')
			return "port is not a number";
		value = value * 10 + (*p - '0');
		if (value > 65535)
			return "port must be between 1 and 65535";
	}
	if (value == 0)
		return "port must be between 1 and 65535";
	*port = value;
	return NULL;
}

/*
 * No path, or "/" alone, is the default vhost "/".  By RabbitMQ's URI
 * specification the latter would be a vhost with an empty name, but nobody has
 * one, and most client libraries read it this way.
 */
static const char *
parse_vhost(Span path, BrokerAddress *address)
{
	const char *problem;

	if (path.start != path.end)
		path.start++;
	if (path.start == path.end)
		return duplicate("/", &address->vhost);
	if (find(path, '/') != NULL)
		return "vhost contains an unescaped \"/\"";
	problem = decode(path, &address->vhost);
	if (problem == NULL && strlen(address->vhost) > BROKER_MAX_SHORTSTR)
		return "vhost is too long";
	return problem;
}

/* Percent-decodes into a malloc'd string. */
static const char *
decode(Span part, char **result)
{
	char	   *to = malloc((size_t) (part.end - part.start) + 1);

	if (to == NULL)
		return out_of_memory;
	*result = to;

	for (const char *p = part.start; p < part.end; p++)
	{
		int			high;
		int			low;

		*to = *p;
		if (*p == '%')
		{
			high = part.end - p > 2 ? hex_value(p[1]) : -1;
			low = part.end - p > 2 ? hex_value(p[2]) : -1;
			*to = '\0';
			if (high < 0 || low < 0)
				return "\"%\" is not followed by two hexadecimal digits";
			if (high == 0 && low == 0)
				return "URI contains an escaped NUL";
			*to = (char) (high * 16 + low);
			p += 2;
		}
		to++;
	}
	*to = '\0';
	return NULL;
}

static const char *
duplicate(const char *text, char **result)
{
	*result = strdup(text);
	return *result ? NULL : out_of_memory;
}

static const char *
find(Span span, char c)
{
	size_t		len = (size_t) (span.end - span.start);

	return len > 0 ? memchr(span.start, c, len) : NULL;
}

static int
hex_value(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return -1;
}

static Span
trim(Span span)
{
	while (span.start < span.end && strchr(" \t\r\n", *span.start) != NULL)
		span.start++;
	while (span.start < span.end && strchr(" \t\r\n", span.end[-1]) != NULL)
		span.end--;
	return span;
}
