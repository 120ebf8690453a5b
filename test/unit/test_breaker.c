/*
 * When failures are no fault of the messages: many different ones in a row, with
 * one SQLSTATE; and how that ends.
 */
#include "consume/breaker.h"

#include "tap.h"

static Breaker breaker;

static bool
fail(int n, const char *sqlstate, uint64_t first_key)
{
	bool		opened = false;

	for (int i = 0; i < n; i++)
		opened = breaker_failure(&breaker, sqlstate, first_key + i);
	return opened;
}

int
main(void)
{
	ok(!fail(9, "42P01", 1) && !breaker.open, "nine messages that failed are nine messages");
	ok(!fail(1, "42P01", 5), "another attempt of one of them does not count");
	ok(fail(1, "42P01", 10) && breaker.open, "with the tenth it opens");
	ok(fail(1, "42P01", 10) && breaker.probes == 1, "a probe that fails keeps it open");
	ok(fail(1, "22012", 11) && breaker.open && breaker.probes == 2, "with whatever error");
	breaker_success(&breaker);
	ok(!breaker.open && !fail(9, "42P01", 1), "one that succeeds closes it, and counting begins anew");
	breaker_success(&breaker);
	ok(!fail(1, "42P01", 10), "a success among failures is one, too");
	breaker_success(&breaker);
	ok(!fail(9, "42P01", 1) && !fail(9, "22012", 1), "another SQLSTATE begins anew");
	ok(fail(1, "22012", 10), "and may open it");
	return done();
}
