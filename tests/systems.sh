#!/usr/bin/env bash
# Runs quickstart and the whole suite on minimal Debian systems:
#   tests/systems.sh [-d DIR] [bookworm|trixie]... [-- ARGUMENT...]
#
# Must be run as root, on a Debian.  Without a name it runs Debian 12 (bookworm) and Debian 13
# (trixie).  Each system is a directory with a minimal Debian, Python and pip; it uses this
# machine's kernel, /dev/fuse and loop devices.  It gets a copy of the files that git tracks
# here, changes included, and runs examples/quickstart.sh and tests/run.sh; ARGUMENTs are
# passed to pytest.
#
# DIR keeps the minimal systems (300 MB each) for the next run, and a system in which a test
# has failed (2 GB); without it a temporary directory is used and removed.  Registries and
# proxies are those of this machine: apt's sources with the name of the release replaced,
# apt's Acquire options, /etc/pip.conf, proxy and PIP_ variables.
#
# Exit code: 0 if everything passes on each system, otherwise 1.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
# shellcheck source=tests/minimalsystem.sh
. "$root/tests/minimalsystem.sh"

known=(bookworm trixie)
directory=''
systems=() arguments=()

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
}

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage ;;
        -d)
            [ $# -gt 1 ] || die "-d: expected a directory"
            directory=$2
            shift
            ;;
        --)
            shift
            arguments=("$@")
            break
            ;;
        bookworm | trixie) systems+=("$1") ;;
        *) die "found $1, expected one of: ${known[*]}" ;;
    esac
    shift
done
[ ${#systems[@]} -gt 0 ] || systems=("${known[@]}")

# try_system ROOT: runs quickstart and the suite; fails if one of them does.
try_system() {
    # shellcheck disable=SC2016  # expanded inside
    enter "$1" sh -euc '
        cd /src
        examples/quickstart.sh
        exec tests/run.sh "$@"' sh ${arguments[@]+"${arguments[@]}"}
}

# versions ROOT: prints the versions that matter for the tests.
versions() {
    # shellcheck disable=SC2016  # expanded inside
    enter "$1" sh -c '
        printf "Debian %s, %s" "$(cat /etc/debian_version)" "$(python3 --version)"
        dpkg-query --show --showformat ", \${Package} \${source:Upstream-Version}" \
            libfuse3-dev qemu-utils e2fsprogs util-linux 2>/dev/null || true'
}

open_store "$directory"

failed=0 summary=()
for system in "${systems[@]}"; do
    target=$store/$system
    new_system "$system" "$target"
    copy_tree "$target"
    say "$system: quickstart and the suite"
    result=passed
    try_system "$target" || result=FAILED
    summary+=("$system: $result ($(versions "$target"))")
    detach_loops "$target"
    if [ "$result" = passed ]; then
        rm -rf --one-file-system "$target"
    else
        failed=1
        [ -n "$temporary" ] || say "$system: kept in $target"
    fi
done
printf '%s\n' "${summary[@]}"
[ "$failed" = 0 ]
