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

known=(bookworm trixie)
store='' temporary='' target='' inside=''
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
            store=$2
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
[ "$(id -u)" = 0 ] || die "must be run as root: it makes systems and enters them"

# Ends the running system and removes temporary files; runs at every exit.
clean_up() {
    local code=$?
    trap - EXIT
    trap '' INT TERM
    # unshare(1) ignores other signals.  Its child is killed with it; as that is the first process
    # of its PID namespace, all others end too, and so do the mounts.
    [ -z "$inside" ] || { kill -KILL "$inside" && wait "$inside"; } 2>/dev/null || true
    [ -z "$target" ] || detach_loops "$target"
    [ -z "$temporary" ] || rm -rf --one-file-system "$temporary"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Prints the codename of this machine's Debian, or nothing.
own_codename() (
    # shellcheck source=/dev/null
    . /etc/os-release
    [ "${ID:-}" != debian ] || printf '%s\n' "${VERSION_CODENAME:-}"
)

# mirror CODENAME: prints the URL from which this machine's apt gets that release, or nothing.
mirror() {
    # shellcheck disable=SC2016  # for apt-get, not for the shell
    apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' \
        'Created-By: Packages' 2>/dev/null |
        awk -v codename="$1" '$1 == codename && $2 == "main" { print $3; exit }'
}

# use_registries ROOT SYSTEM: gives a system's apt and pip the sources of this machine.
use_registries() {
    local target=$1 system=$2 from file
    from=$(own_codename)
    if [ -n "$from" ] && [ -n "$(mirror "$from")" ]; then
        rm -f "$target/etc/apt/sources.list"
        for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
            [ ! -e "$file" ] || sed "s/\b$from\b/$system/g" "$file" >"$target$file"
        done
    fi
    # Not the files themselves: they may name programs that the system lacks.
    apt-config dump | grep '^Acquire::' | grep -v IndexTargets >"$target/etc/apt/apt.conf.d/90machine" ||
        true
    cp -aT /etc/apt/auth.conf.d "$target/etc/apt/auth.conf.d" 2>/dev/null || true
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
        [ ! -e "$file" ] || cp -L "$file" "$target$file"
    done
}

# make_base SYSTEM: makes the minimal system unless it exists.
make_base() {
    local base=$store/$1.base log=$store/$1.log own url
    [ ! -e "$base/.complete" ] || return 0
    say "$1: making a minimal system in $base"
    rm -rf --one-file-system "$base"
    own=$(own_codename)
    url=$([ -z "$own" ] || mirror "$own")
    if ! {
        debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip \
            "$1" "$base" ${url:+"$url"} && use_registries "$base" "$1"
    } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "$1: debootstrap failed (all of it: $log)"
    fi
    rm -f "$log"
    touch "$base/.complete"
}

# enter ROOT COMMAND...: runs a command in a system.
# Its mounts and processes always end with it.  It runs in the background, so that bash handles
# a signal to this script while it waits.
enter() {
    local name pass=() code=0
    local -r directory=$1
    shift
    for name in $(compgen -e); do
        case $name in
            PIP_FIND_LINKS) [ -e "${!name}" ] || pass+=("$name=${!name}") ;; # the system lacks the directory
            CI | TERM | LANG | PIP_* | *_proxy | *_PROXY) pass+=("$name=${!name}") ;;
        esac
    done
    # shellcheck disable=SC2016  # expanded inside
    unshare --mount --pid --fork --kill-child --propagation private sh -euc '
        directory=$1
        shift
        mount --bind "$directory" "$directory" # so that "/" is a mount, as on other systems
        mount -t proc proc "$directory/proc"
        mount --rbind /sys "$directory/sys"
        mount --rbind /dev "$directory/dev"
        mount -t tmpfs tmpfs "$directory/run"
        # A shell starts background jobs with these signals ignored.
        exec chroot "$directory" env -i --default-signal=INT,QUIT "$@"' sh "$directory" \
        HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        "${pass[@]}" "$@" </dev/null &
    inside=$!
    wait "$inside" || code=$?
    inside=''
    return "$code"
}

# detach_loops ROOT: detaches loop devices that a killed test has left.
detach_loops() {
    local device file
    losetup --list --noheadings --output NAME,BACK-FILE | while read -r device file; do
        case $file in
            "$1"/*) losetup --detach "$device" ;;
        esac
    done
}

# make_system SYSTEM ROOT: makes a system with a copy of this tree in /src.
make_system() {
    local changes
    make_base "$1"
    rm -rf --one-file-system "$2"
    cp -a "$store/$1.base" "$2"
    mkdir "$2/src"
    # A commit of the uncommitted changes, on no branch; empty if there are none.
    changes=$(git_here -c user.name=tests -c user.email=tests stash create)
    git_here archive "${changes:-HEAD}" | tar -x -C "$2/src"
}

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

# Runs git on this tree, whichever user owns it.
git_here() {
    git -c safe.directory="$root" -C "$root" "$@"
}

install_packages debootstrap=debootstrap git=git unshare=util-linux losetup=mount
check_fuse
if [ -n "$store" ]; then
    mkdir -p "$store"
else
    temporary=$(mktemp -d)
    store=$temporary
fi
store=$(cd "$store" && pwd -P)
untracked=$(git_here ls-files --others --exclude-standard)
[ -z "$untracked" ] || say "Not tracked by git, therefore not copied: ${untracked//$'\n'/ }"

failed=0 summary=()
for system in "${systems[@]}"; do
    target=$store/$system
    make_system "$system" "$target"
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
