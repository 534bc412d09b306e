# shellcheck shell=bash disable=SC2154  # setup.sh, which is sourced before, has the rest
# A scratch directory for the examples, as $work; to be sourced with their arguments.
#
# It is made in the directory that the first argument names, or where TMPDIR says, and
# is removed at every exit, after what is mounted in it.

work=''

mount_disk() { # IMAGE [OPTION...]: its disk is $work/disk/NAME.raw then
    mkdir -p "$work/disk"
    qedfuse "$@" "$work/disk"
}

unmount_disk() { # everything is durable when it returns
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
