# shellcheck shell=bash
# The virtual machine of these tests: a minimal Debian 12 with Debian's kernel, under QEMU.
# To be sourced; needs root, and `say` and `die` of examples/setup.sh.
#
# make_machine makes it in the directory $vm_dir, or updates it:
#   base/       its root directory; base.raw is the disk with it
#   tree.tar    this checkout with its uncommitted changes, installed: unpacked at each boot
# boot_machine boots it; what a boot writes to base.raw is discarded.

: "${vm_dir:?}" "${root:?}"
machine_disks=() # further arguments of QEMU
base=$vm_dir/base

# Packages of the machine, the kernel included.
machine_packages=(
    linux-image-cloud-amd64 initramfs-tools zstd kmod iproute2 util-linux procps
    python3 python3-venv python3-dev git gcc libc6-dev pkg-config libfuse3-dev fuse3
    e2fsprogs fdisk fio dmsetup qemu-utils
)

# in_base COMMAND...: run a command in the base, with this machine's network.
in_base() (
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --mount --propagation private sh -euc '
        mount -t proc proc "$0/proc"
        mount --rbind /dev "$0/dev"
        exec chroot "$0" env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
            PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
    ' "$base" "$@" </dev/null
)

# copy_configuration: the base uses the package sources of this machine.
copy_configuration() {
    local file
    rm -rf "$base"/etc/apt/sources.list*
    cp -a /etc/apt/sources.list* "$base/etc/apt/" 2>/dev/null || true
    for file in /etc/apt/apt.conf.d/* /etc/apt/auth.conf.d/* /etc/apt/trusted.gpg.d/* \
        /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
        # Hooks call programs that the base does not have.
        if [ -f "$file" ] && ! grep -qs -e Invoke -e Cmd-Not-Found "$file"; then
            mkdir -p "$base${file%/*}"
            cp -L "$file" "$base$file"
        fi
    done
}

# make_base: debootstrap, packages, and a Python environment with what the project needs.
make_base() {
    local digest
    digest=$({
        printf '%s\n' "${machine_packages[@]}"
        sed -n '/^requires/p; /^dependencies/,/^\]/p; /^test = /,/^\]/p' "$root/pyproject.toml"
    } | sha256sum)
    [ "$digest" = "$(cat "$vm_dir/base.digest" 2>/dev/null)" ] && return
    say "Making the machine (takes minutes, once)"
    rm -rf "$base" "$vm_dir/base.digest"
    debootstrap --variant=minbase --include=ca-certificates bookworm "$base" >"$vm_dir/log" 2>&1 ||
        die "debootstrap failed: see $vm_dir/log"
    copy_configuration
    mkdir -p "$base/etc/initramfs-tools/conf.d"
    echo MODULES=list >"$base/etc/initramfs-tools/conf.d/vm"
    printf '%s\n' virtio_pci virtio_blk ext4 >"$base/etc/initramfs-tools/modules"
    copy_tree "$base/src"
    {
        in_base apt-get update -qq
        in_base apt-get install -y -qq --no-install-recommends \
            -o Dpkg::Options::=--force-confold "${machine_packages[@]}"
        in_base sh -euc '
            python3 -m venv /opt/venv
            /opt/venv/bin/pip install -q --upgrade setuptools wheel
            /opt/venv/bin/pip install -q "/src[test]"
            # Only the dependencies stay: each boot unpacks its own tree.
            /opt/venv/bin/pip uninstall -q -y qedfuse
            apt-get clean
            rm -rf /root/.cache /src'
    } >>"$vm_dir/log" 2>&1 || die "making the machine failed: see $vm_dir/log"
    rm -f "$vm_dir/base.raw"
    mke2fs -q -t ext4 -d "$base" "$vm_dir/base.raw" 16G >>"$vm_dir/log" 2>&1
    cp -L "$base/vmlinuz" "$vm_dir/kernel"
    cp -L "$base/initrd.img" "$vm_dir/initrd"
    echo "$digest" >"$vm_dir/base.digest"
}

# copy_tree DIRECTORY: copy the files of this checkout that git tracks or does not ignore.
copy_tree() {
    rm -rf "$1"
    mkdir -p "$1"
    git -C "$root" ls-files -z --cached --others --exclude-standard |
        tar -C "$root" --null --files-from - --ignore-failed-read -c 2>/dev/null | tar -C "$1" -x
}

# make_machine: make or update all that `boot_machine` needs.
make_machine() {
    local digest
    [ "$(id -u)" = 0 ] || die "needs root, for debootstrap and chroot"
    install_packages debootstrap=debootstrap qemu-system-x86_64=qemu-system-x86 \
        qemu-img=qemu-utils mke2fs=e2fsprogs unshare=util-linux git=git
    mkdir -p "$vm_dir"
    exec 9>"$vm_dir/lock"
    flock -n 9 || die "$vm_dir: in use by another run"
    make_base
    copy_tree "$base/src"
    digest=$(tar -C "$base" --sort=name --mtime=@0 -c src | sha256sum)
    if [ "$digest" != "$(cat "$vm_dir/tree.digest" 2>/dev/null)" ]; then
        say "Installing this checkout in the machine"
        rm -f "$vm_dir/tree.digest"
        in_base /opt/venv/bin/pip install -q --no-deps --no-build-isolation -e \
            /src >>"$vm_dir/log" 2>&1 || die "pip failed: see $vm_dir/log"
        rm -rf "$base/src/build"
        (cd "$base" && tar -cf "$vm_dir/tree.tar" src opt/venv/bin/qed* \
            opt/venv/lib/python3*/site-packages/*qedfuse*)
        echo "$digest" >"$vm_dir/tree.digest"
    fi
}

# boot_machine COMMAND...: boot, run the command as root and print its output; return its
# exit status, or 125 if the machine ended without one.
#   memory, limit    megabytes; longest run in seconds
#   machine_disks    further arguments of QEMU
#   cut_after        seconds from the line "CUT-ME" until QEMU is killed
boot_machine() {
    local run=$vm_dir/run line status=125
    local first='tar -xf /dev/vdb -C / && exec /src/tests/vm/init'
    rm -rf "$run"
    mkdir -p "$run/content/run" "$run/content/opt"
    { printf 'exec'; printf ' %q' "$@"; echo; } >"$run/content/run/command"
    cp "$vm_dir/tree.tar" "$run/tree.tar"
    tar -C "$run/content" -rf "$run/tree.tar" run/command
    qemu-img create -q -f qcow2 -b "$vm_dir/base.raw" -F raw "$run/disk.qcow2"
    while IFS= read -r line; do
        line=${line%$'\r'}
        case $line in
            'VM-STATUS '*) status=${line#VM-STATUS } ;;
            CUT-ME)
                if [ -n "${cut_after:-}" ]; then
                    sleep "$cut_after"
                    kill -KILL "$(cat "$run/pid")"
                    status=0
                fi
                ;;
            *'sysrq: Power Off' | *'reboot: Power down') ;;
            *) printf '%s\n' "$line" ;;
        esac
    done < <(exec timeout --kill-after 5 "${limit:-1800}" qemu-system-x86_64 \
        -accel "${VM_ACCEL:-tcg,thread=multi}" -cpu max -m "${memory:-1500}" -smp 2 \
        -kernel "$vm_dir/kernel" -initrd "$vm_dir/initrd" \
        -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 no_timer_check init=/bin/sh -- -c \"$first\"" \
        -drive "file=$run/disk.qcow2,if=none,id=system,discard=unmap" \
        -device "virtio-blk-pci,drive=system" \
        -drive "file=$run/tree.tar,format=raw,if=none,id=tree,readonly=on" \
        -device "virtio-blk-pci,drive=tree" \
        "${machine_disks[@]}" -device virtio-rng-pci -pidfile "$run/pid" \
        -nodefaults -display none -serial stdio -no-reboot </dev/null 2>&1 9>&-)
    rm -rf "$run"
    return "$status"
}
