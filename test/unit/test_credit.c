/*-------------------------------------------------------------------------
 *
 * test_credit.c
 *		Unit tests of credit.c.
 *
 *-------------------------------------------------------------------------
 */
#include "broker/credit.h"
#include "tap.h"

int
main(void)
{
	Credit		credit;

	credit_init(&credit, 10 * WRITE_OVERHEAD);
	ok(!credit_covers(&credit, 1) && !credit_take(&credit, 1), "nothing is written before the first look at the socket");
	credit_refill(&credit);
	ok(credit_take(&credit, 4 * WRITE_OVERHEAD) && credit.left == 5 * WRITE_OVERHEAD,
	   "a frame is charged its bytes and what the kernel books for a write");
	ok(!credit_covers(&credit, 5 * WRITE_OVERHEAD) && credit_covers(&credit, 4 * WRITE_OVERHEAD),
	   "no more is written than there is credit");
	ok(!credit_take(&credit, 5 * WRITE_OVERHEAD) && credit.left == 5 * WRITE_OVERHEAD, "a frame not written is not charged");
	ok(!credit_covers(&credit, 100 * WRITE_OVERHEAD), "a frame larger than all credit waits for all of it");
	credit_refill(&credit);
	ok(credit_take(&credit, 100 * WRITE_OVERHEAD) && credit.left == 0, "and takes it");
	ok(credit_largest(&credit, 1000000) == 9 * WRITE_OVERHEAD && credit_largest(&credit, 4096) == 4096,
	   "the largest frame is bounded by the credit and by the broker");
	credit_init(&credit, 100000000);
	ok(credit.max == 128 * 1024, "credit is bounded, however large the buffer");
	return done();
}
