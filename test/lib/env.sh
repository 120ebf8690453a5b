# env.sh - what test/check and test/demo share; sourced, not run.
#
# Both build and run in a scratch directory owned by a user other than root,
# because neither PostgreSQL nor our RabbitMQ script runs as root.  Root is
# needed for one thing only, installing missing packages.

# shellcheck shell=bash

# The list of packages, in one place.  PostgreSQL's are added below: those of
# the version that this Debian has, or none if PG_CONFIG names a server.
packages=(build-essential clang git golang-github-rabbitmq-amqp091-go-dev golang-go
	libclang-rt-dev libdbd-pg-perl libfaketime libipc-run-perl libjson-xs-perl librabbitmq-dev libssl-dev locales openssl
	perl pkg-config procps python3 python3-pika rabbitmq-server shellcheck uuid-dev)

die() {
	echo "${0##*/}: $*" >&2
	exit 1
}

# Runs a command as root.
as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# The user that builds and runs: oneself, or postgres in root's place.
test_user() {
	if [ "$(id -u)" = 0 ]; then echo postgres; else id -un; fi
}

# Runs a command as test_user, in a clean environment: a PGHOST, a PYTHONPATH
# or a MAKEFLAGS of the caller must not decide what is tested.
as_user() {
	local -a become=()

	if [ "$(id -u)" = 0 ]; then
		become=(setpriv --reuid postgres --regid postgres --init-groups)
	fi
	env -i PATH=/usr/local/bin:/usr/bin:/bin LC_ALL=C.UTF-8 \
		HOME="${scratch:-/}" TMPDIR=/tmp PG_CONFIG="${pg_config:-}" \
		"${become[@]}" "$@"
}

# The major version of PostgreSQL that this Debian carries.
pg_major() {
	apt-cache policy postgresql | sed -n 's/^ *Candidate: *\([0-9]*\).*/\1/p'
}

# Installs what is missing, and starts no service: Debian's postinst scripts
# would start a server and a broker, the latter listening to the whole network.
install_packages() {
	local major missing=() package policy=/usr/sbin/policy-rc.d

	system_pg_config=${PG_CONFIG:-}
	if [ -z "$system_pg_config" ]; then
		[ -n "$(pg_major)" ] || as_root apt-get -qq update
		major=$(pg_major)
		packages+=("postgresql-$major" "postgresql-server-dev-$major")
		system_pg_config=/usr/lib/postgresql/$major/bin/pg_config
	fi
	# maybe not from a package
	for package in npm nodejs; do
		command -v "${package%js}" >/dev/null || packages+=("$package")
	done
	for package in "${packages[@]}"; do
		dpkg-query -W -f '${Status}' "$package" 2>/dev/null |
			grep -q ' installed$' || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0

	echo "installing ${missing[*]}"
	as_root apt-get -qq update
	[ -e $policy ] && policy=
	[ -z "$policy" ] || printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
	[ -z "$policy" ] || as_root chmod 755 $policy
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
		--no-install-recommends install "${missing[@]}" >/tmp/pg_fanout-apt.$$ 2>&1 ||
		{ tail -20 /tmp/pg_fanout-apt.$$; missing=(); }
	rm -f /tmp/pg_fanout-apt.$$
	[ -z "$policy" ] || as_root rm -f $policy
	[ ${#missing[@]} -gt 0 ] || die "could not install the packages"
}

# Installs what programs in Node import, below a directory of the copied tree.
# npm runs as the caller, whose configuration says where from.
install_node_modules() {
	local dir=$scratch/src/$1 modules

	modules=$(mktemp -d /tmp/pg_fanout-npm.XXXXXX)
	cp "$dir/package.json" "$modules"
	npm --prefix "$modules" --silent --no-audit --no-fund --no-package-lock install ||
		die "could not install what ${dir#"$scratch/src/"}/package.json lists"
	tar -c -C "$modules" node_modules | as_user tar -x -C "$dir"
	rm -rf "$modules"
}

# Sets $scratch to a new directory of test_user, with a short path: the names
# of unix sockets in it may have 107 bytes at most.
make_scratch() {
	scratch=$(as_user mktemp -d /tmp/pgf.XXXXXX)
}

# Copies the source tree, without what is ignored, to $scratch/src.
copy_tree() {
	local top=$1 file

	as_user mkdir "$scratch/src"
	(
		cd "$top" || exit
		# safe.directory: under sudo the clone belongs to somebody else
		git -c safe.directory='*' ls-files -coz --exclude-standard |
			while IFS= read -r -d '' file; do
				[ ! -e "$file" ] || printf '%s\0' "$file"
			done | tar -c --null -T -
	) | as_user tar -x -C "$scratch/src"
}

# Makes a PostgreSQL of our own in $scratch/pg and sets $pg_config.
#
# A server finds its extensions relative to its own binary.  So with copies of
# the binaries, and links to all the rest, "make install" leaves the system's
# PostgreSQL alone, needs no root, and two runs do not disturb each other.
make_postgres() {
	local system=$system_pg_config bindir dir

	[ -x "$system" ] || die "no pg_config at $system"
	bindir=$("$system" --bindir)
	for dir in "$("$system" --pkglibdir)" "$("$system" --sharedir)"; do
		as_user mkdir -p "$scratch/pg$(dirname "$dir")"
		as_user cp -rs "$dir" "$scratch/pg$(dirname "$dir")/"
	done
	as_user mkdir -p "$scratch/pg$bindir"
	as_user cp "$bindir"/* "$scratch/pg$bindir/"
	dir=$("$system" --includedir)
	as_user mkdir -p "$scratch/pg$(dirname "$dir")"
	as_user ln -s "$dir" "$scratch/pg$dir"
	# an extension that is installed in the system must not be what we test
	as_user rm -f "$scratch/pg$("$system" --pkglibdir)/pg_fanout.so" \
		"$scratch/pg$("$system" --sharedir)"/extension/pg_fanout[.-]*
	pg_config=$scratch/pg$bindir/pg_config
}

# Prints N free ports of the loopback interface.  They lie below the range that
# the kernel gives to outgoing connections, so that a port is still free when
# its server is stopped for a while and started again.  All who ask take them in
# turn, so that nobody is given one whose server has not started yet.
free_ports() {
	python3 - "$1" "/tmp/pgf-port.$(id -u)" <<-'END'
		import fcntl, random, socket, sys
		count, name = int(sys.argv[1]), sys.argv[2]
		low = int(open('/proc/sys/net/ipv4/ip_local_port_range').read().split()[0])
		high = low if low > 15000 else 65536
		held = []
		with open(name, 'a+') as last:
		    fcntl.flock(last, fcntl.LOCK_EX)
		    last.seek(0)
		    port = int(last.read() or random.randrange(10000, high))
		    while len(held) < count:
		        port = port + 1 if port + 1 < high else 10000
		        s = socket.socket()
		        try:
		            s.bind(('127.0.0.1', port))
		            held.append(s)
		        except OSError:
		            s.close()
		    last.truncate(0)
		    last.write(str(port))
		print(*(s.getsockname()[1] for s in held))
	END
}

# A process that ended but was not reaped yet does not count as alive.
alive() {
	[ -n "$1" ] && grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status"
}

# Waits up to SECONDS until none of the processes is alive.
wait_gone() {
	local tenths=$(($1 * 10)) pid

	shift
	for pid; do
		while alive "$pid"; do
			[ $((tenths -= 1)) -gt 0 ] || return 1
			sleep 0.1
		done
	done
}

# Ends all processes that work in a directory, however they were started, and
# prints what they were.
kill_below() {
	local cwd pid pids=()

	for cwd in /proc/[0-9]*/cwd; do
		case $(readlink "$cwd" 2>/dev/null) in
			"$1" | "$1"/*)
				pid=${cwd#/proc/} pid=${pid%/cwd}
				ps -o pid=,args= -p "$pid" || true
				pids+=("$pid")
				;;
		esac
	done
	[ ${#pids[@]} = 0 ] || kill -s KILL "${pids[@]}" 2>/dev/null || true
	wait_gone 5 "${pids[@]}"
}
