# shellcheck shell=bash disable=SC2154  # setup.sh, which is sourced before, defines the rest
# A scratch directory for the examples, as $work; source it with their arguments.
#
# It is created in the directory that the first argument names, or in TMPDIR, and is
# unmounted and removed at every exit.

work=''

mount_disk() { # IMAGE [OPTION...]: mounts it as $work/disk/NAME.raw
    mkdir -p "$work/disk"
    qedfuse "$@" "$work/disk"
}

unmount_disk() { # returns when everything is durable
    qedfuse umount "$work/disk"
}

clean_up() {
    local code=$?
    trap - EXIT
    trap '' HUP INT TERM
    cd /
    if ! mountpoint -q "$work/disk" || unmount_disk; then
        rm -rf "$work"
    else
        printf '%s: left behind, because it is in use: %s\n' "${0##*/}" "$work" >&2
        code=$((code ? code : 1))
    fi
    exit "$code"
}

case ${1:-} in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0"
        exit
        ;;
esac
for program in qedfuse qedimg; do
    have "$program" || die "$program: found no such program (see: examples/install.sh)"
done
[ -d "${1:-${TMPDIR:-/tmp}}" ] || die "$1: found no directory, expected one to work in"
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
work=$(mktemp -d "${1:-${TMPDIR:-/tmp}}/${0##*/}.XXXXXX")
cd "$work" || exit
