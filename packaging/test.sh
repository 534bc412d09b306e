#!/usr/bin/env bash
# Builds the packages and tests them in minimal systems; on demand, not part of tests/run.sh:
#
#   packaging/test.sh -d DIR [deb|suite|container|service|wheel|bookworm]...
#
#   deb       Debian 13: build and lintian; in a system without compiler and pip: packaging/test-deb.sh
#   suite     Debian 13: tests of mounts and examples with the installed package and Debian's pytest
#   container Debian 13 with systemd, in namespaces of this machine: packaging/test-service.sh
#   service   the same in a virtual machine, with what belongs to the kernel (AppArmor, limits)
#   wheel     Debian 13 and 12: a wheel is built from the source distribution, and used without a compiler
#   bookworm  Debian 12: the package is refused, examples/install.sh installs
#
# Without a name all are run.  Must be run as root, on a Debian.  DIR keeps the minimal systems (3 GB)
# and the package for the next run; `deb` builds it again.
#
# Exit code: 0 if everything passes, otherwise 1.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
# shellcheck source=tests/minimalsystem.sh
. "$root/tests/minimalsystem.sh"

known=(deb suite container service wheel bookworm)
directory='' parts=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -d) directory=${2:-} && shift ;;
        deb | suite | container | service | wheel | bookworm) parts+=("$1") ;;
        *) die "found $1, expected one of: ${known[*]}" ;;
    esac
    shift
done
[ -n "$directory" ] || die "-d: expected a directory"
[ ${#parts[@]} -gt 0 ] || parts=("${known[@]}")
open_store "$directory"
mkdir -p "$store/packages"
target=$store/system-$$ log=$store/log-$$ # the system of the running part

# install ROOT PACKAGE...: install packages in a system.
install() {
    local -r into=$1
    shift
    enter "$into" env DEBIAN_FRONTEND=noninteractive \
        sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-unsafe-io "$@"' sh "$@" \
        >"$log" 2>&1 || { tail -n 20 "$log" >&2 && die "apt-get could not install: $*"; }
}

# package: print the path of the package, which is built unless it exists.
package() {
    local built
    built=$(find "$store/packages" -name 'qedfuse_*.deb' -print -quit)
    [ -n "$built" ] || die "no package in $store/packages: run the part deb first"
    printf '%s\n' "$built"
}

# target_with NAME: make the target from a minimal system, with the package in /packages.
target_with() {
    new_system "$1" "$target"
    cp -r "$store/packages" "$target/packages"
}

test_deb() {
    new_system trixie "$target"
    copy_tree "$target"
    enter "$target" /src/packaging/build-deb.sh /packages
    rm -f "$store"/packages/qedfuse_*.deb
    cp "$target"/packages/qedfuse_*.deb "$store/packages/"
    install "$target" lintian
    say "$(enter "$target" lintian --version): no line follows if nothing is found"
    enter "$target" sh -c 'lintian --allow-root --fail-on error,warning /packages/*.deb'
    target_with trixie
    cp "$root/packaging/test-deb.sh" "$target/packages/"
    enter "$target" sh -c 'apt-get purge -y -qq --autoremove python3 python3-pip >/dev/null 2>&1'
    enter "$target" sh -c 'exec /packages/test-deb.sh /packages/qedfuse_*.deb'
}

# The tests find the installed package, because the tree has no qedfuse/.
test_suite() {
    target_with trixie
    copy_tree "$target"
    rm -rf "$target/src/qedfuse" "$target/src/setup.py"
    install "$target" python3-pytest python3-pytest-timeout python3-pytest-trio python3-pytest-xdist \
        python3-hypothesis python3-urllib3 qemu-utils e2fsprogs fdisk dosfstools mtools procps mount fio systemd \
        fuse2fs ntfs-3g btrfs-progs \
        "/packages/$(basename "$(package)")"
    enter "$target" sh -euc '
        [ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
        cd /src
        python3 -c "import qedfuse; print(qedfuse.__file__)" | grep ^/usr/lib/python3/dist-packages/
        # Debian has no python3-dissect, which examples/list_files.py imports.
        python3 -m pytest -q -n 4 -p no:cacheprovider -k "not list_files" tests/mounted/test_examples.py \
            tests/mounted/test_mount_chain.py tests/mounted/test_mount_files.py tests/mounted/test_mount_start.py \
            tests/mounted/test_read_paths.py tests/mounted/test_discard.py tests/mounted/test_truncation.py \
            tests/mounted/test_partitions.py tests/mounted/test_stats.py tests/mounted/test_umount.py'
}

# machine_base OUTPUT...: make or update $base, a system with systemd that tests the package when it boots.
# OUTPUT are lines of systemd.exec(5) for the output of the test.
machine_base() {
    base=$store/service.base
    if [ ! -e "$base/.complete" ]; then
        say "Making the machine"
        new_system trixie "$base"
        rm "$base/.complete"
        mkdir -p "$base/etc/initramfs-tools/conf.d"
        echo MODULES=list >"$base/etc/initramfs-tools/conf.d/vm"
        install "$base" linux-image-cloud-amd64 initramfs-tools zstd kmod systemd-sysv udev dbus \
            e2fsprogs procps fdisk mount qemu-utils
        printf '%s\n' virtio_pci virtio_blk ext4 >"$base/etc/initramfs-tools/modules"
        enter "$base" update-initramfs -u >"$log" 2>&1
        cp -L "$base/vmlinuz" "$store/kernel"
        cp -L "$base/initrd.img" "$store/initrd"
        touch "$base/.complete"
    fi
    rm -rf "$base/packages"
    cp -r "$store/packages" "$base/packages"
    cp "$root/packaging/test-service.sh" "$base/packages/"
    # The system boots without a network: the dependencies stay.
    install "$base" apparmor python3-urllib3 "/packages/$(basename "$(package)")"
    enter "$base" dpkg --purge qedfuse >"$log" 2>&1
    : >"$base/etc/fstab"
    cat >"$base/etc/systemd/system/test.service" <<UNIT
[Service]
ExecStart=/packages/test-service.sh /packages/$(basename "$(package)")
Environment=LC_ALL=C.UTF-8
$(printf '%s\n' "$@")
UNIT
    ln -sf ../test.service "$base/etc/systemd/system/multi-user.target.wants/"
}

# Two boots: the test restarts the machine.
test_container() {
    local unit boot
    machine_base StandardOutput=append:/console StandardError=append:/console
    rm -rf --one-file-system "$target"
    cp -a "$base" "$target"
    for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udevd-kernel.socket \
        systemd-udevd-control.socket apparmor.service; do
        ln -sf /dev/null "$target/etc/systemd/system/$unit"
    done
    for boot in first second; do
        say "The $boot boot"
        "$root/packaging/container.sh" "$target" &
        inside=$!
        wait "$inside" || true # a signal ends it
        inside=''
    done
    cat "$target/console"
    grep -q '^RESULT 0' "$target/console"
}

# The machine boots from $store/service.raw.
test_service() {
    install_packages qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils mke2fs=e2fsprogs
    machine_base StandardOutput=tty TTYPath=/dev/ttyS0
    echo '/dev/vda / ext4 defaults 0 1' >"$base/etc/fstab"
    ln -sf /dev/null "$base/etc/systemd/system/serial-getty@ttyS0.service"
    rm -f "$store/service.raw"
    mke2fs -q -t ext4 -d "$base" "$store/service.raw" 8G >"$log" 2>&1
    say "Booting it (without KVM it takes ten minutes)"
    timeout 2400 qemu-system-x86_64 -accel "${VM_ACCEL:-tcg,thread=multi}" -cpu max -m 1500 -smp 2 \
        -kernel "$store/kernel" -initrd "$store/initrd" \
        -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 no_timer_check nowatchdog \
systemd.show_status=0 systemd.default_timeout_start_sec=1800 systemd.mask=apparmor.service" \
        -drive "file=$store/service.raw,format=raw,if=virtio,cache=unsafe" -device virtio-rng-pci \
        -nodefaults -display none -serial stdio </dev/null | tee "$store/console"
    grep -q '^RESULT 0' "$store/console"
}

# pyfuse3 has no wheel on PyPI, so it is built beside that of qedfuse.
test_wheel() {
    local system
    for system in trixie bookworm; do
        new_system "$system" "$target"
        copy_tree "$target"
        say "$system: the source distribution and the wheels, in isolation"
        install "$target" gcc libc6-dev pkg-config libfuse3-dev python3-dev python3-venv
        # shellcheck disable=SC2016  # expanded inside
        enter "$target" sh -euc '
            cd /src
            python3 -m venv /build
            /build/bin/pip install -q build
            /build/bin/python -m build -o /wheels . >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
            tar -tf /wheels/qedfuse-*.tar.gz | cut -d / -f 2- >/tmp/files
            for file in CHANGELOG.md LICENSE docs/architecture.md docs/share/man/man8/qedfuse.8 \
                examples/install.sh packaging/build-deb.sh tests/run.sh; do
                grep -qx "$file" /tmp/files
            done
            pip wheel -q --no-deps -w /wheels "pyfuse3>=3.4"
            ls /wheels
            python3 -m zipfile -l /wheels/qedfuse-*.whl >/tmp/wheel
            if grep "\.[ch] " /tmp/wheel; then exit 1; fi
            test "$(grep -c "\.so " /tmp/wheel)" = 6'
        rm -rf "$store/wheels/$system"
        mkdir -p "$store/wheels"
        cp -r "$target/wheels" "$store/wheels/$system"
        new_system "$system" "$target"
        cp -r "$store/wheels/$system" "$target/wheels"
        install "$target" python3-venv fuse3
        say "$system: the wheels, without a compiler"
        # shellcheck disable=SC2016  # expanded inside
        enter "$target" sh -euc '
            [ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
            ! command -v gcc cc pkg-config
            python3 -m venv /venv
            /venv/bin/pip install -q --only-binary :all: --find-links /wheels qedfuse
            PATH=/venv/bin:$PATH
            python3 -c "
import qedfuse.check._sweep, qedfuse.hostio._iothreads, qedfuse.mount.fuse._extraops
import qedfuse.mount.sandbox._threads, qedfuse.remote._crc32, qedfuse.tools.inspection._maplines"
            cd /tmp
            qedimg create -q vm.qed 64M
            mkdir mnt
            qedfuse vm.qed mnt
            printf hello | dd of=mnt/vm.raw conv=notrunc,fsync status=none
            qedfuse umount mnt
            qedimg check -q vm.qed
            ls /venv/share/man/man8/qedfuse.8'
    done
}

test_bookworm() {
    target_with bookworm
    copy_tree "$target"
    say "Debian 12: what apt-get says about the package"
    enter "$target" sh -c '
        apt-get update -qq
        ! apt-get install -y /packages/qedfuse_*.deb 2>&1 | tee /tmp/log
        grep -q "Depends: python3 (>= 3.13" /tmp/log && ! command -v qedfuse'
    enter "$target" sh -c '! /src/packaging/build-deb.sh'
    say "Debian 12: examples/install.sh"
    # shellcheck disable=SC2016  # expanded inside
    enter "$target" sh -euc '
        [ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
        /src/examples/install.sh
        cd /tmp
        qedimg create -q vm.qed 64M
        mkdir mnt
        echo "/tmp/vm.qed /tmp/mnt fuse.qedfuse defaults 0 0" >>/etc/fstab
        mount -a
        test -e mnt/vm.raw
        umount mnt
        /src/examples/install.sh --uninstall
        ! command -v qedfuse'
}

for part in "${parts[@]}"; do
    say "$part"
    "test_$part"
    rm -rf --one-file-system "$target" "$log"
done
say "Passed: ${parts[*]}"
