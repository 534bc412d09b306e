#!/usr/bin/env bash
# Installs a package on this machine, uses it as a stranger would, and purges it again; run it as root
# on a machine, or in a minimal Debian 13, that has no qedfuse:
#
#   packaging/test-deb.sh PACKAGE.deb
#
# It installs further packages (man-db, shells) and does not remove them.
# Exit code: 0 if everything works and the purge leaves nothing, otherwise 1.
set -eu

say() { printf '== %s\n' "$*"; }
die() {
    printf 'test-deb.sh: %s\n' "$*" >&2
    exit 1
}

if [ $# != 1 ] || [ ! -e "$1" ]; then die "expected the path of a package"; fi
[ "$(id -u)" = 0 ] || die "must be run as root"
! command -v qedfuse >/dev/null || die "found qedfuse, expected a machine without it"
package=$(realpath "$1")
export DEBIAN_FRONTEND=noninteractive

work=$(mktemp -d /tmp/test-deb.XXXXXX)
mnt=$work/mnt
cp /etc/fstab "$work/fstab" 2>/dev/null || : >"$work/fstab"
cleanup() {
    umount --lazy "$mnt" "$work/second" "$work/user/mnt" 2>/dev/null || true
    cat "$work/fstab" >/etc/fstab
    rm -rf "$work"
}
trap cleanup EXIT

# apt ARGUMENT...: run apt-get, and show what it prints only if it fails.
apt() { apt-get -y -qq "$@" </dev/null >"$work/log" 2>&1 || { cat "$work/log" && die "apt-get $* failed"; }; }

# list_files: all files of this machine, also those of /run and /tmp.
list_files() {
    local places=(/) place
    for place in /run /tmp; do ! mountpoint -q "$place" || places+=("$place"); done
    find "${places[@]}" -xdev \( -path "$work" -o -path "${package%/*}" \) -prune -o -print | sort -u
}

# fresh NAME: create an image that has data at 4096.
fresh() {
    rm -f "$work/$1.qed"
    qedimg create -q "$work/$1.qed" 64M
    qedfuse "$work/$1.qed" "$mnt"
    put hello
    qedfuse umount "$mnt"
}
put() { printf '%s' "$1" | dd of="$(echo "$mnt"/*.raw)" bs=4096 seek=1 conv=notrunc,fsync status=none; }
get() { dd if="$(echo "$mnt"/*.raw)" bs=1 skip=4096 count=5 status=none; }
# in_sandbox COMMAND...: all parts of the sandbox are in force for the disk that the command shows.
in_sandbox() {
    "$@" | grep -q '^  sandbox on: Landlock .*no new privileges, .*seccomp ([0-9]* system calls), not dumpable$' ||
        die "not in a complete sandbox: $("$@" | grep sandbox)"
}
expect() { [ "$1" = "$2" ] || die "found '$1', expected '$2'"; }
# wait_for COMMAND: wait until a command succeeds.
wait_for() { timeout 60 sh -c "until $1; do sleep 0.1; done" || die "in vain: $1"; }

# other_version SUFFIX: repack the package as another version, whose modules cannot be imported: a
# server that imported one of them would fail.
other_version() {
    rm -rf "$work/tree"
    dpkg-deb -R "$package" "$work/tree"
    sed -i "s/^Version: .*/&$1/" "$work/tree/DEBIAN/control"
    find "$work/tree/usr/lib/python3" -name '*.py' |
        while read -r file; do echo 'raise ImportError("another version")' >>"$file"; done
    find "$work/tree/usr/lib/python3" -name '*.so' -delete
    dpkg-deb -b "$work/tree" "$work/other$1.deb" >/dev/null
}

# press_tab SHELL LINE TEXT: type a line with tabs into a shell on a terminal; its output has the text.
press_tab() {
    : >"$work/typescript"
    {
        wait_for "grep -q READY '$work/typescript'"
        printf '%b\rexit\r' "$2 >$work/typed"
        wait_for "[ -s '$work/typed' ]"
    } | script --quiet --flush --command "$1" "$work/typescript" >/dev/null
    grep -q -e "$3" "$work/typed" || { cat -v "$work/typescript" && die "$1: completion failed"; }
}

# fusermount3 needs it; a minimal container may lack it.
[ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
apt-get update -qq
list_files >"$work/before"

say "Installation"
start=$(date +%s%N)
apt install "$package"
say "apt-get install took $((($(date +%s%N) - start) / 1000000000)) s for $(grep -c '^Setting up' "$work/log") packages"
for name in gcc cc python3-pip python3-venv python3-dev; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" != installed ] ||
        say "note: this machine has $name"
done
qedfuse --version
python3 -c '
import qedfuse.check._sweep, qedfuse.hostio._iothreads, qedfuse.mount.fuse._extraops
import qedfuse.mount.sandbox._threads, qedfuse.remote._crc32, qedfuse.tools.inspection._maplines'

say "Man pages and completions"
apt install man-db bash-completion zsh fish
for page in '8 qedfuse' '8 mount.fuse.qedfuse' '8 mount.qedfuse' '1 qedimg'; do
    # shellcheck disable=SC2086  # two words
    man $page | grep -q SYNOPSIS || die "man $page: no page"
done
mandb -q
whatis qedfuse qedimg
export PROMPT_COMMAND='printf READY'
press_tab 'bash -il' 'qedimg chec\t --hel\t' 'qedimg check'
press_tab 'bash -il' 'qedfuse umou\t --hel\t' 'qedfuse umount'
unset PROMPT_COMMAND
printf 'autoload -Uz compinit\ncompinit -u -D\nPS1=READY\n' >"$work/.zshrc"
ZDOTDIR=$work press_tab 'zsh -i' 'qedimg chec\t --hel\t' 'qedimg check'
ZDOTDIR=$work press_tab 'zsh -i' 'qedfuse umou\t --hel\t' 'qedfuse umount'
expect "$(HOME=$work fish -c 'complete -C "qedimg chec"' | cut -f 1)" check
expect "$(HOME=$work fish -c 'complete -C "qedfuse umou"' | cut -f 1)" umount
rm -f /root/.bash_history

say "A disk by mount(8) and fstab"
mkdir "$mnt" "$work/second"
fresh vm
fresh second
cat >>/etc/fstab <<FSTAB
$work/vm.qed $mnt fuse.qedfuse defaults 0 0
$work/second.qed $work/second fuse.qedfuse ro,nofail,x-systemd.mount-timeout=1min 0 0
FSTAB
mount -a
mount -a # changes nothing
expect "$(grep -c ' fuse.qedfuse ' /proc/mounts)" 2
expect "$(get)" hello
in_sandbox qedfuse stats "$mnt"
put world
umount -a -t fuse.qedfuse
cat "$work/fstab" >/etc/fstab
# umount(8) returns before the server has closed the image.
wait_for "qedimg check -q '$work/vm.qed'"
mount -t qedfuse -o ro "$work/vm.qed" "$mnt"
expect "$(get)" world
qedfuse umount "$mnt"

say "A disk of an ordinary user"
mkdir -m 711 "$work/user" "$work/user/mnt"
chmod 711 "$work"
chown -R nobody "$work/user"
as_nobody() { setpriv --reuid nobody --regid nogroup --clear-groups "$@"; }
as_nobody sh -euc "cd '$work/user'; qedimg create -q a.qed 1M; qedfuse a.qed mnt; test -e mnt/a.raw; qedfuse umount mnt; qedimg check -q a.qed"
for option in user users; do
    echo "$work/user/a.qed $work/user/mnt fuse.qedfuse noauto,$option 0 0" >>/etc/fstab
    as_nobody mount "$work/user/mnt"
    in_sandbox as_nobody qedfuse stats "$work/user/mnt"
    printf "%5s" "$option" | as_nobody dd of="$work/user/mnt/a.raw" conv=notrunc,fsync status=none
    as_nobody umount "$work/user/mnt"
    cat "$work/fstab" >/etc/fstab
    # umount(8) returns before the server has closed the image.
    wait_for "qedimg check -q '$work/user/a.qed'"
    ! grep -q " $work/user/mnt " /proc/mounts || die "$option: the user could not unmount"
    expect "$(qedimg convert -O raw "$work/user/a.qed" - | head -c 5)" "$(printf '%5s' "$option")"
done

say "An upgrade, a downgrade and a removal while a disk is mounted"
other_version +later
other_version ~earlier
for change in "install $work/other+later.deb" "install --allow-downgrades $work/other~earlier.deb" 'remove qedfuse'; do
    fresh vm
    qedfuse --pidfile "$work/pid" -o partitions "$work/vm.qed" "$mnt"
    # shellcheck disable=SC2086  # several words
    apt $change
    expect "$(get)" hello
    put world
    echo 'start=2048' | sfdisk -q "$mnt/vm.raw" 2>/dev/null || true
    kill -0 "$(cat "$work/pid")"
    umount "$mnt"
    wait_for "! kill -0 $(cat "$work/pid") 2>/dev/null"
    apt install --reinstall --allow-downgrades "$package"
    ! qedimg info --output=json "$work/vm.qed" | grep '"dirty-flag": true' || die "vm.qed: not closed cleanly"
    qedimg check -q "$work/vm.qed"
    mount -t fuse.qedfuse -o ro "$work/vm.qed" "$mnt"
    expect "$(get)" world
    qedfuse umount "$mnt"
done

say "Purge"
install -m 600 /dev/null /etc/qedfuse/vm.conf
apt remove qedfuse
[ -e /etc/qedfuse/vm.conf ] || die "removal without a purge removed a configuration"
hash -r
for name in qedfuse qedimg mount.qedfuse; do ! command -v $name || die "$name is still there"; done
apt purge qedfuse
# man-db keeps formatted pages that were read, for a week.  A user without XDG_RUNTIME_DIR has the
# records of his mounts in a directory of his own in /tmp.
list_files | comm -13 "$work/before" - | grep -i -e qed |
    grep -v -e '^/var/cache/man/cat[0-9]/' -e '^/tmp/qedfuse-[0-9]*\(/\|$\)' >"$work/left" || true
[ ! -s "$work/left" ] || { cat "$work/left" && die "files are left after the purge"; }
say "Everything works, and nothing is left"
