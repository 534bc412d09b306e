#!/usr/bin/env bash
# Installs a package on this machine, uses it as a stranger would, and purges it again; run it as root
# on a machine, or in a minimal system, that has no qedfuse:
#
#   packaging/test-deb.sh PACKAGE.deb
#
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

list_files() { find / -xdev \( -path /proc -o -path /tmp -o -path /var -o -path /run -o -path /sys \) -prune -o -print | sort; }

work=$(mktemp -d)
fstab=$(mktemp)
cp /etc/fstab "$fstab" 2>/dev/null || true
cleanup() {
    umount "$work/mnt" 2>/dev/null || true
    cp "$fstab" /etc/fstab
    rm -rf "$work" "$fstab"
}
trap cleanup EXIT

say "Installing the dependencies, and the package"
apt-get update -qq
start=$(date +%s)
apt-get install -y -qq "$package" </dev/null >"$work/log" 2>&1 || { cat "$work/log"; die "apt-get install failed"; }
say "apt-get install took $(($(date +%s) - start)) s"
! dpkg -l gcc python3-pip 2>/dev/null | grep -q '^ii' || say "note: this machine has a compiler or pip already"

say "Its files"
for path in /usr/sbin/mount.fuse.qedfuse /usr/sbin/mount.qedfuse \
    /usr/share/bash-completion/completions/qedfuse /usr/share/zsh/vendor-completions/_qedimg \
    /usr/share/fish/vendor_completions.d/qedimg.fish '/usr/lib/systemd/system/qedfuse@.service'; do
    [ -e "$path" ] || die "$path: missing"
done
python3 -c '
import qedfuse.check._sweep, qedfuse.hostio._iothreads, qedfuse.mount.fuse._extraops
import qedfuse.tools.inspection._maplines'

say "A disk by mount and fstab"
qedimg create "$work/vm.qed" 64M
mkdir "$work/mnt"
echo "$work/vm.qed $work/mnt fuse.qedfuse noauto 0 0" >>/etc/fstab
mount "$work/mnt"
printf 'hello' | dd of="$work/mnt/vm.raw" bs=4096 seek=1 conv=notrunc,fsync status=none
umount "$work/mnt"
mount -t qedfuse -o ro "$work/vm.qed" "$work/mnt"
[ "$(dd if="$work/mnt/vm.raw" bs=1 skip=4096 count=5 status=none)" = hello ] || die "found other data"
umount "$work/mnt"
# umount(8) returns before the server has closed the image.
timeout 20 sh -c "until qedimg check '$work/vm.qed'; do sleep 0.1; done"

say "Removing it"
cp /etc/fstab "$work/fstab"
sed -i '\|fuse.qedfuse|d' /etc/fstab
apt-get remove -y -qq qedfuse </dev/null >"$work/log" 2>&1 || { cat "$work/log"; die "remove failed"; }
! command -v qedfuse >/dev/null || die "qedfuse is still there"
apt-get purge -y -qq qedfuse </dev/null >"$work/log" 2>&1 || { cat "$work/log"; die "purge failed"; }
list_files | grep -i qedfuse | grep -v -F "${QEDFUSE_SOURCE:-/src}" >"$work/left" || true
[ ! -s "$work/left" ] || { cat "$work/left"; die "files are left after the purge"; }
say "Everything works, and nothing is left"
