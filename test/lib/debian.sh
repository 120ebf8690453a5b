# debian.sh - packages of other releases of Debian, unpacked and not installed
#
# Sourced, not run.  For tools and headers that this machine's release does not
# have.  Needs no root, and changes nothing outside the directory it is given.

# shellcheck shell=bash

# The archive that this machine takes Debian's packages from.
debian_archive() {
	# apt expands these, not the shell
	# shellcheck disable=SC2016
	apt-get indextargets --format '$(REPO_URI) $(LABEL)' 'Created-By: Packages' |
		sed -n 's/ Debian$//p' | sort -u | head -n 1
}

# Runs a command of apt with the lists of another release, kept in DIR.  A mirror
# may be older than its lists say it should be.
debian_apt() {
	local dir=$1 apt=$2

	shift 2
	"$apt" -qq -o Dir::Etc::SourceList="$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State="$dir/state" -o Dir::Cache="$dir/cache" -o APT::Sandbox::User="$(id -un)" \
		-o Debug::NoLocking=1 -o Acquire::Check-Valid-Until=false "$@"
}

# debian_lists DIR RELEASE: fetches the lists of a release (trixie, sid) into DIR.
debian_lists() {
	local dir=$1 release=$2 archive

	archive=$(debian_archive)
	[ -n "$archive" ] || return 1
	mkdir -p "$dir"/{state/lists,cache/archives}/partial
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $release main" \
		>"$dir/sources.list"
	debian_apt "$dir" apt-get -o APT::Update::Error-Mode=any update
}

# debian_unpack DIR PACKAGE ...: fetches packages of that release, and unpacks
# them into DIR/root.
debian_unpack() {
	local dir=$1 package

	shift
	mkdir -p "$dir/debs" "$dir/root"
	(cd "$dir/debs" && debian_apt "$dir" apt-get download "$@") || return 1
	for package in "$dir"/debs/*.deb; do
		dpkg-deb -x "$package" "$dir/root" || return 1
	done
	rm -r "$dir/debs"
}

# debian_runnable DIR PROGRAM ...: makes unpacked programs (paths below DIR/root)
# run here.  Each becomes a script that starts it with that release's loader and
# libraries, since this machine's may be too old for it; scripts that know where
# they are installed learn where they are.
debian_runnable() {
	local root=$1/root program loader libraries

	shift
	loader=$(find "$root/usr/lib" -name 'ld-linux-*.so.*' | head -n 1)
	[ -n "$loader" ] || return 1
	libraries=${loader%/*}
	for program in "${@/#/$root/}"; do
		[ ! -L "$program" ] || continue
		case $(head -c 4 "$program" | tr -d '\0') in
			'#!'*) sed -i "s,=/usr/lib/,=$root/usr/lib/," "$program" ;;
			$'\x7fELF')
				mv "$program" "$program.elf"
				# the script expands these, not we
				# shellcheck disable=SC2016
				printf '#!/bin/sh\nexec %s --argv0 "$0" --library-path %s %s.elf "$@"\n' \
					"$loader" "$libraries:$libraries/systemd" "$program" >"$program"
				chmod 755 "$program"
				;;
		esac
	done
}

# debian_source DIR PACKAGE: fetches the source of a package of this machine's
# release into DIR.
debian_source() {
	local dir=$1 archive codename

	archive=$(debian_archive)
	codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
	[ -n "$archive" ] && [ -n "$codename" ] || return 1
	mkdir -p "$dir"/{state/lists,cache/archives}/partial
	echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $codename main" \
		>"$dir/sources.list"
	debian_apt "$dir" apt-get -o APT::Update::Error-Mode=any update &&
		(cd "$dir" && debian_apt "$dir" apt-get source --download-only "$2")
}
