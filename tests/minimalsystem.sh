# shellcheck shell=bash
# Minimal Debian systems: directories with Debian, Python and pip, which use this machine's kernel,
# /dev/fuse and loop devices.
# To be sourced; needs root, and examples/setup.sh.
#
#   open_store [DIR]            use DIR for systems, or a temporary directory; needed first
#   make_base NAME              make the minimal Debian NAME (bookworm, trixie) unless DIR has it
#   new_system NAME ROOT        copy that system to ROOT
#   copy_tree ROOT              copy the files that git tracks here to /src of a system
#   enter ROOT COMMAND...       run a command in a system
#   detach_loops ROOT           detach loop devices that a killed command has left
#
# Registries and proxies are those of this machine: apt's sources with the name of the release
# replaced, apt's Acquire options, /etc/pip.conf, proxy and PIP_ variables.

: "${root:?}" # of examples/setup.sh

store='' temporary='' target='' inside=''

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
        # This copy of a mount would hold the mount: an unmount elsewhere would wait for the end of
        # this system.
        findmnt --noheadings --list --types fuse.qedfuse --output TARGET |
            while read -r mountpoint; do umount --lazy "$mountpoint"; done
        mount --bind "$directory" "$directory" # so that "/" is a mount, as on other systems
        mount -t proc proc "$directory/proc"
        mount --rbind /sys "$directory/sys"
        mount --rbind /dev "$directory/dev"
        mount -t tmpfs tmpfs "$directory/run"
        # A device of its own, because tests change its mode.
        mknod --mode=666 "$directory/run/fuse" c 10 229
        mount --bind "$directory/run/fuse" "$directory/dev/fuse"
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

# new_system NAME ROOT: makes ROOT a new copy of the minimal system.
new_system() {
    make_base "$1"
    rm -rf --one-file-system "$2"
    cp -a "$store/$1.base" "$2"
}

# copy_tree ROOT: copies the files that git tracks here, changes included, to /src of a system.
copy_tree() {
    local changes
    mkdir "$1/src"
    # A commit of the uncommitted changes, on no branch; empty if there are none.
    changes=$(git_here -c user.name=tests -c user.email=tests stash create)
    git_here archive "${changes:-HEAD}" | tar -x -C "$1/src"
}

# Runs git on this tree, whichever user owns it.
git_here() {
    git -c safe.directory="$root" -C "$root" "$@"
}

# open_store [DIR]: makes DIR, or a temporary directory that is removed at the end, the place of systems.
open_store() {
    [ "$(id -u)" = 0 ] || die "must be run as root: it makes systems and enters them"
    install_packages debootstrap=debootstrap git=git unshare=util-linux losetup=mount
    check_fuse
    if [ -n "${1:-}" ]; then
        mkdir -p "$1"
        store=$(cd "$1" && pwd -P)
    else
        temporary=$(mktemp -d)
        store=$temporary
    fi
    local untracked
    untracked=$(git_here ls-files --others --exclude-standard)
    [ -z "$untracked" ] || say "Not tracked by git, therefore not copied: ${untracked//$'\n'/ }"
}
