# pg_fanout: see README.md
#
#   make && make install           PG_CONFIG=... chooses the server
#   make installcheck              regression, isolation and TAP tests, against
#                                  private servers (not as root)

EXTENSION = pg_fanout
MODULE_big = pg_fanout
PGFILEDESC = "pg_fanout - transactional outbox for RabbitMQ"

# make sure that a VPATH build finds the sources
srcdir_ := $(dir $(lastword $(MAKEFILE_LIST)))
sources := $(sort $(patsubst $(srcdir_)%,%,$(wildcard $(srcdir_)src/*.c $(srcdir_)src/*/*.c)))

OBJS = $(sources:.c=.o)
# a VPATH build begins in an empty directory; as targets, VPATH would find them
$(shell mkdir -p $(sort $(dir $(sources))))
DATA = $(patsubst $(srcdir_)%,%,$(sort $(wildcard $(srcdir_)sql/*--*.sql)))

# The version stands once, in the control file.
version := $(shell sed -n "s/^default_version *= *'\(.*\)'/\1/p" $(srcdir_)pg_fanout.control)

PKG_CONFIG ?= pkg-config
PG_CPPFLAGS = -I$(srcdir_)src -DPG_FANOUT_VERSION='"$(version)"' $(shell $(PKG_CONFIG) --cflags librabbitmq libssl uuid)
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers
ifdef WERROR
PG_CFLAGS += -Werror
endif
SHLIB_LINK = $(shell $(PKG_CONFIG) --libs librabbitmq libssl libcrypto uuid) -pthread

REGRESS = $(sort $(patsubst $(srcdir_)test/sql/%.sql,%,$(wildcard $(srcdir_)test/sql/*.sql)))
REGRESS_OPTS = --inputdir=$(srcdir_)test --temp-instance=./tmp_regress --temp-config=$(srcdir_)test/regress.conf --encoding=UTF8 --no-locale
ISOLATION = $(sort $(patsubst $(srcdir_)test/specs/%.spec,%,$(wildcard $(srcdir_)test/specs/*.spec)))
ISOLATION_OPTS = --inputdir=$(srcdir_)test --outputdir=. --temp-instance=./tmp_regress --temp-config=$(srcdir_)test/regress.conf --encoding=UTF8 --no-locale

TAP_TESTS = 1
# the longest first, so that none is alone at the end
longest = 111_flows_at_random 032_consume_faults 074_sync_random 093_detached 130_plans \
	090_independent 117_dead_letters_recovered 106_backfill 110_poison 048_reader 005_outbox \
	129_exactly_one_batch 055_tid_ranges 128_blocks_cut_off 018_broker_refusals 067_order_matrix \
	036_consume_liar 112_many_topics 047_tokens 013_broker_states 062_refused 020_liar 030_consume \
	104_streams 010_lifecycle
tests := $(patsubst $(srcdir_)%,%,$(sort $(wildcard $(srcdir_)test/t/*.pl)))
PROVE_TESTS = $(longest:%=test/t/%.pl) $(filter-out $(longest:%=test/t/%.pl),$(tests))

EXTRA_CLEAN = tmp_regress log test/unit/build

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

$(OBJS): $(wildcard $(srcdir_)src/*/*.h) $(srcdir_)pg_fanout.control
