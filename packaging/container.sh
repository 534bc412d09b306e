#!/usr/bin/env bash
# Boots a system without a virtual machine: its systemd is the first process of new namespaces, and has
# this machine's kernel, /dev/fuse and loop devices, but no network configuration, udev or settings of
# the kernel.
#
#   packaging/container.sh ROOT     returns when the system restarts or switches off
#
# Needs root.  ROOT is a directory that `new_system` of tests/minimalsystem.sh has made, with systemd.
set -eu
root=$1

case ${2:-start} in
    start)
        # A kill of unshare(1) ends all processes, and with them the mounts.
        exec unshare --mount --pid --fork --kill-child --propagation private "$0" "$root" group
        ;;
    group)
        # Copies of mounts of this machine would keep their servers alive.
        findmnt --noheadings --list --types fuse.qedfuse --output TARGET |
            while read -r mountpoint; do umount --lazy "$mountpoint"; done
        # systemd makes its control groups below the one in which it starts.
        mount -t cgroup2 cgroup "$root/mnt"
        group=$root/mnt/qedfuse-test-$(od -An -N4 -tx4 /dev/urandom | tr -d ' ')
        mkdir "$group"
        (
            echo "$BASHPID" >"$group/cgroup.procs"
            exec unshare --mount --pid --cgroup --uts --ipc --fork --kill-child --propagation private \
                "$0" "$root" boot
        ) || true # ends by a signal
        find "$group" -depth -type d -exec rmdir {} +
        ;;
    boot)
        umount "$root/mnt" # in this namespace
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount --bind "$root/proc/sys" "$root/proc/sys"
        mount -o remount,ro,bind "$root/proc/sys"
        mount -t sysfs -o ro sysfs "$root/sys"
        mount -t cgroup2 cgroup "$root/sys/fs/cgroup"
        mount -t tmpfs tmpfs "$root/run"
        mount -t tmpfs tmpfs "$root/dev"
        for device in null zero full random urandom tty fuse loop-control; do
            cp -a "/dev/$device" "$root/dev/"
        done
        cp -a /dev/loop[0-9]* "$root/dev/"
        chmod 666 "$root/dev/fuse"
        mkdir "$root/dev/pts" "$root/dev/shm"
        mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
        ln -s pts/ptmx "$root/dev/ptmx"
        ln -s /proc/self/fd "$root/dev/fd"
        # As on other machines, an unmount takes effect for services with a mount namespace of their own.
        mount --make-rshared "$root"
        exec chroot "$root" env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
            /lib/systemd/systemd --show-status=0 </dev/null >/dev/null 2>&1
        ;;
esac
