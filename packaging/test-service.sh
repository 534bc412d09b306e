#!/usr/bin/env bash
# Tests the package where systemd runs: services, fstab at boot, a restart, removal while in use.
# packaging/test.sh runs it as root in a virtual machine or a container, as a service, at each of two
# boots:
#
#   packaging/test-service.sh PACKAGE.deb
#
# After a failure it goes on, because a boot takes minutes.  The last line on the console is RESULT and
# the number of failures.
set -uE

package=$1
state=/var/lib/test-service
say() { printf '== %s\n' "$*"; }
die() {
    printf 'test-service.sh: FAILED: %s\n' "$*"
    echo "$*" >>"$state.failures"
    systemctl --no-pager --no-legend --failed || true
}
trap 'die "line $LINENO: $BASH_COMMAND"' ERR
finish() {
    trap - ERR
    [ -z "$restart" ] || return
    echo "RESULT $(wc -l <"$state.failures")"
    systemctl poweroff
}
restart=''
trap finish EXIT
touch "$state.failures"
# A container shares settings with the machine around it, and may lack capabilities and AppArmor.
has_kernel() { ! systemd-detect-virt --quiet --container; }
put() { printf '%s' "$2" | dd of="$1" bs=4096 seek=1 conv=notrunc,fsync status=none; }
get() { dd if="$1" bs=1 skip=4096 count=5 status=none; }
expect() { [ "$1" = "$2" ] || die "found '$1', expected '$2'"; }
wait_for() { timeout 120 sh -c "until $1; do sleep 0.2; done" || die "in vain: $1"; }
is_clean() {
    qedimg check -q "$1" || die "$1: damaged"
    ! qedimg info --output=json "$1" | grep '"dirty-flag": true' || die "$1: not closed cleanly"
}
# in_sandbox MOUNTPOINT [COMMAND...]: all parts of the sandbox are in force; the command runs qedfuse.
in_sandbox() {
    local -r mountpoint=$1 sandbox='^  sandbox on: Landlock .*no new privileges, .*seccomp ([0-9]* system calls), not dumpable$'
    shift
    "$@" qedfuse stats "$mountpoint" | grep "$sandbox" || die "$mountpoint: $("$@" qedfuse stats "$mountpoint" | grep sandbox)"
}
as_nobody() { setpriv --reuid nobody --regid nogroup --clear-groups "$@"; }
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -y -qq "$@" </dev/null >/run/apt.log 2>&1 || { cat /run/apt.log && die "apt-get $*"; }
}

# An ordinary user mounts by the command and by fstab.
ordinary_users() {
    say "Ordinary users"
    mkdir -p /srv/user/mnt
    chown -R nobody /srv/user
    as_nobody qedimg create -q /srv/user/own.qed 16M
    as_nobody qedfuse /srv/user/own.qed /srv/user/mnt
    put /srv/user/mnt/own.raw hello 2>/dev/null && die "root has access to the disk of a user"
    in_sandbox /srv/user/mnt as_nobody
    server=$(pgrep -u nobody -f 'qedfuse /srv/user/own.qed')
    ! has_kernel || expect "$(cat "/proc/${server%%$'\n'*}/attr/current")" 'qedfuse (enforce)'
    as_nobody qedfuse umount /srv/user/mnt
    for option in user users; do
        sed -i '\,^/srv/user,d' /etc/fstab
        echo "/srv/user/own.qed /srv/user/mnt fuse.qedfuse noauto,$option 0 0" >>/etc/fstab
        as_nobody mount /srv/user/mnt
        in_sandbox /srv/user/mnt as_nobody
        as_nobody umount /srv/user/mnt
        ! grep ' /srv/user/mnt ' /proc/mounts || die "$option: the user could not unmount"
        # umount(8) returns before the server has closed the image.
        wait_for 'qedimg check -q /srv/user/own.qed'
    done
    sed -i '\,^/srv/user,d' /etc/fstab
}

# Makes images, installs the package, and uses services without a restart.
first_boot() {
    say "Installation: $(uname -r), systemd $(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p')"
    apt install "$package"
    expect "$(systemctl is-enabled qedfuse@.service || true)" disabled
    mkdir -p /srv/images /mnt/vm /mnt/file /mnt/root /mnt/early /mnt/manual
    for name in vm early manual; do qedimg create -q "/srv/images/$name.qed" 64M; done
    printf 'IMAGE=/srv/images/vm.qed\nMOUNTPOINT=/mnt/vm\nOPTIONS=-o allow_other,discard\n' >/etc/qedfuse/vm.conf

    say "A service: start, use, stop"
    systemctl start qedfuse@vm
    expect "$(systemctl show -P SubState qedfuse@vm)" running
    server=$(systemctl show -P MainPID qedfuse@vm)
    expect "$(readlink "/proc/$server/ns/mnt")" "$(readlink /proc/1/ns/mnt)" # the mount is for all
    ! has_kernel || expect "$(cat "/proc/$server/oom_score_adj")" -500
    grep -q qedfuse.slice "/proc/$server/cgroup" || die "not in its slice"
    mkfs.ext4 -q /mnt/vm/vm.raw
    mount -o loop,discard /mnt/vm/vm.raw /mnt/root
    cp -a /usr/share/doc/qedfuse /mnt/root/doc
    fstrim /mnt/root
    qedfuse stats /mnt/vm | head -n 20
    in_sandbox /mnt/vm
    say "Stopping while the disk is in use"
    systemctl stop --no-block qedfuse@vm
    # shellcheck disable=SC2016  # expanded by wait_for
    wait_for '[ "$(systemctl show -P SubState qedfuse@vm)" = stop-sigterm ]'
    touch /mnt/root/while-stopping
    sync
    diff -r /usr/share/doc/qedfuse /mnt/root/doc || die "the file system lost its disk"
    umount /mnt/root
    # shellcheck disable=SC2016  # expanded by wait_for
    wait_for '[ "$(systemctl is-active qedfuse@vm)" != deactivating ]'
    expect "$(systemctl show -P Result qedfuse@vm)" success
    ! pgrep -f 'qedfuse -f' || die "the process is still there"
    is_clean /srv/images/vm.qed
    ! journalctl -q -u qedfuse@vm -p warning --no-pager | grep . || say "note: warnings of the service, see above"
    journalctl -u qedfuse@vm --no-pager -o cat

    say "A disk that stays in use for longer than a stop may take"
    qedimg create -q /srv/images/busy.qed 64M
    printf 'IMAGE=/srv/images/busy.qed\nMOUNTPOINT=/mnt/file\n' >/etc/qedfuse/busy.conf
    mkdir -p /run/systemd/system/qedfuse@busy.service.d
    printf '[Service]\nTimeoutStopSec=5\n' >/run/systemd/system/qedfuse@busy.service.d/limit.conf
    systemctl daemon-reload
    systemctl start qedfuse@busy
    exec 5<>/mnt/file/busy.raw
    systemctl stop --no-block qedfuse@busy
    # shellcheck disable=SC2016  # expanded by wait_for
    wait_for '[ "$(systemctl show -P SubState qedfuse@busy)" = stop-sigterm ]'
    printf later | dd of=/mnt/file/busy.raw bs=4096 seek=1 conv=notrunc status=none # not durable yet
    # shellcheck disable=SC2016  # expanded by wait_for
    wait_for '[ "$(systemctl is-active qedfuse@busy)" = failed ]'
    exec 5>&-
    expect "$(systemctl show -P Result qedfuse@busy)" timeout
    is_clean /srv/images/busy.qed
    systemctl start qedfuse@busy
    expect "$(get /mnt/file/busy.raw)" later
    systemctl stop qedfuse@busy
    rm -r /etc/qedfuse/busy.conf /run/systemd/system/qedfuse@busy.service.d
    systemctl daemon-reload

    say "Messages of a service that cannot start"
    printf 'IMAGE=/srv/images/none.qed\nMOUNTPOINT=/mnt/file\n' >/etc/qedfuse/none.conf
    ! systemctl start qedfuse@none 2>/dev/null || die "started without an image"
    journalctl -u qedfuse@none --no-pager -o cat | grep 'none.qed' || die "no message"
    ! systemctl start qedfuse@absent 2>/dev/null || die "started without a configuration"
    rm /etc/qedfuse/none.conf
    systemctl reset-failed

    say "A service that hardens itself without the calls of a sandbox"
    mkdir -p /mnt/own
    cat >/run/systemd/system/own.service <<'UNIT'
[Service]
Type=notify
ExecStart=/usr/bin/qedfuse -f /srv/images/manual.qed /mnt/own
SystemCallFilter=@system-service @mount
SystemCallFilter=~@sandbox
SystemCallErrorNumber=EPERM
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER
UNIT
    systemctl daemon-reload
    systemctl start own
    put /mnt/own/manual.raw hello
    qedfuse stats /mnt/own | grep '^  sandbox on: .*; without Landlock (' || die "the statistics do not say what is missing"
    systemctl stop own
    expect "$(systemctl show -P Result own)" success
    is_clean /srv/images/manual.qed

    if has_kernel; then
        say "Without user namespaces, under AppArmor"
        printf 'abi <abi/4.0>,\nprofile qedfuse /usr/bin/qedfuse {\n  allow all,\n}\n' >/run/apparmor
        apparmor_parser --replace --skip-cache /run/apparmor
        sysctl -q -w user.max_user_namespaces=0
        ! as_nobody unshare --user true 2>/dev/null || die "found user namespaces"
        ordinary_users
        sysctl -q -w user.max_user_namespaces=1000
        apparmor_parser --remove /run/apparmor
    else
        ordinary_users
    fi

    say "A source that QEMU reads"
    qemu-img create -q -f qcow2 /srv/images/foreign.qcow2 8M
    printf 'IMAGE=/srv/images/foreign.qcow2\nMOUNTPOINT=/mnt/file\nOPTIONS=-r\n' >/etc/qedfuse/foreign.conf
    systemctl start qedfuse@foreign
    expect "$(stat -c %s /mnt/file/foreign.qcow2.raw)" 8388608
    cmp -n 8388608 /mnt/file/foreign.qcow2.raw /dev/zero
    systemctl stop qedfuse@foreign
    expect "$(systemctl show -P Result qedfuse@foreign)" success

    say "fstab, without a restart"
    cat >>/etc/fstab <<'FSTAB'
/srv/images/early.qed /mnt/early fuse.qedfuse defaults 0 0
/mnt/vm/vm.raw /mnt/root ext4 loop,nofail,x-systemd.requires=qedfuse@vm.service 0 0
FSTAB
    systemctl daemon-reload
    # mount(8) starts no service.
    expect "$(systemctl is-active qedfuse@vm || true)" inactive
    ! mount -a || die "mount -a found a disk whose service does not run"
    mountpoint -q /mnt/early || die "mount -a left out another line"
    systemctl start mnt-root.mount
    expect "$(systemctl is-active qedfuse@vm)" active
    mountpoint -q /mnt/root || die "the service did not bring the file system"
    mount -a # changes nothing
    in_sandbox /mnt/early
    put /mnt/early/early.raw hello
    systemctl stop mnt-early.mount
    wait_for 'qedimg check -q /srv/images/early.qed'
    systemctl start mnt-early.mount
    expect "$(get /mnt/early/early.raw)" hello
    touch /mnt/root/at-restart
    put /mnt/early/early.raw world
    systemctl enable qedfuse@vm
    qedfuse /srv/images/manual.qed /mnt/manual
    put /mnt/manual/manual.raw world # and no unmount
    touch "$state"
    say "Restart"
    restart=yes
    systemctl reboot
}

# The mounts of fstab and the enabled service are back; then the package goes while they are in use.
second_boot() {
    timeout 300 systemctl is-system-running --wait || systemctl --failed --no-pager
    say "After the restart"
    systemd-analyze critical-chain mnt-early.mount --no-pager | head -n 12 || true
    is_clean /srv/images/manual.qed
    expect "$(systemctl is-active qedfuse@vm)" active
    expect "$(systemctl is-active mnt-early.mount)" active
    in_sandbox /mnt/vm
    in_sandbox /mnt/early
    expect "$(get /mnt/early/early.raw)" world
    [ -e /mnt/root/at-restart ] || die "the file system in the disk is not mounted"
    systemctl --failed --no-legend | { ! grep .; } || die "units have failed"
    # shellcheck disable=SC2016  # journalctl prints it
    ! journalctl -b -u qedfuse@vm -u mnt-early.mount --no-pager | grep -i 'not closed cleanly' || die "not closed cleanly"
    journalctl -b --no-pager -o cat | { ! grep -i 'ordering cycle'; } || die "an ordering cycle"
    qedfuse /srv/images/manual.qed /mnt/manual
    expect "$(get /mnt/manual/manual.raw)" world

    say "Upgrade with active units"
    before=$(systemctl show -P MainPID qedfuse@vm)
    apt install --reinstall "$package"
    expect "$(systemctl show -P MainPID qedfuse@vm)" "$before"
    touch /mnt/root/after-upgrade
    sync

    say "Removal with an active service and other mounts"
    umount /mnt/root
    apt remove qedfuse
    systemctl -q is-active qedfuse@vm && die "the service is still active"
    [ ! -e /mnt/vm/vm.raw ] || die "the disk of the service is still mounted"
    expect "$(get /mnt/early/early.raw)" world # not a service: goes on
    put /mnt/manual/manual.raw again
    umount /mnt/manual /mnt/early
    wait_for '! pgrep -f "[b]in/(qedfuse|mount[.])" >/dev/null'
    sed -i '/qedfuse/d' /etc/fstab
    systemctl daemon-reload
    apt install "$package"
    for name in vm early manual; do is_clean "/srv/images/$name.qed"; done
    expect "$(systemctl is-enabled qedfuse@vm)" enabled
    apt purge qedfuse
    systemctl daemon-reload
    find / -xdev -iname '*qedfuse*' -not -path '/proc/*' -not -path "$package" -not -path "${package%/*}/*" \
        -not -path '/var/cache/apt/*' -not -path '/var/log/*' >/run/left
    find /run /tmp -iname '*qed*' >>/run/left
    [ ! -s /run/left ] || { cat /run/left && die "files are left after the purge"; }
    [ -e /srv/images/vm.qed ] || die "the purge removed an image"
    say "Everything works with systemd"
}

if [ -e "$state" ]; then second_boot; else first_boot; fi
