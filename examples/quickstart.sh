#!/usr/bin/env bash
# Installs what is needed, and demonstrates a mount:  examples/quickstart.sh [IMAGE]
#
# Without IMAGE: creates a sample QED image, mounts and partitions it; as root it also attaches
# the disk to a loop device, makes a file system, writes a file and reads it back; unmounts, and
# checks that the image is clean.  With IMAGE: mounts it read-only and shows its partitions.
# Leaves nothing behind except the virtual environment in .venv.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

work='' mounted='' loop='' files=''

# Undoes everything, in reverse order, at every exit.
clean_up() {
    local code=$?
    trap - EXIT
    trap '' HUP INT TERM
    if release; then
        [ -z "$work" ] || rm -rf "$work"
    else
        # Deleting the directory now would delete the files on the mounted disk.
        printf 'quickstart.sh: left behind, because it is in use: %s\n' "$work" >&2
        code=$((code ? code : 1))
    fi
    exit "$code"
}

# Unmounts and detaches everything that is in use.
release() {
    if [ -n "$files" ]; then
        umount "$work/files" && files='' || return
    fi
    if [ -n "$loop" ]; then
        losetup --detach "$loop" || return
        wait_detached
        loop=''
    fi
    if [ -n "$mounted" ]; then
        "$venv/bin/qedfuse" umount "$work/mnt" && mounted='' || return
    fi
}

# Waits for the loop device: while udev has it open, the kernel detaches it only later.
wait_detached() {
    local tries=50
    while [ "$tries" -gt 0 ] && losetup "$loop" >/dev/null 2>&1; do
        sleep 0.1
        tries=$((tries - 1))
    done
}

# Finds the device of the loop device's first partition, as $node.
find_partition() {
    local name=${loop#/dev/}p1 number
    # On a kernel that does not read partition tables itself, partx does.
    [ -e "/sys/class/block/$name" ] || partx --add "$loop"
    ! have udevadm || udevadm settle 2>/dev/null || true
    node=/dev/$name
    if [ ! -b "$node" ]; then
        # Without udev, and without devtmpfs in /dev, the script must create the node.
        number=$(cat "/sys/class/block/$name/dev")
        node=$work/$name
        mknod "$node" b "${number%:*}" "${number#*:}"
    fi
}

# Mounts an image on $work/mnt; options follow.
mount_image() {
    mkdir "$work/mnt"
    "$venv/bin/qedfuse" "$@" "$work/mnt"
    mounted=yes
}

show_image() {
    mount_image "$1" -o ro
    say "Mounted read-only; its partitions"
    fdisk -l "$work/mnt/"*
    release
}

use_loop() {
    if ! loop=$(losetup --find --show --partscan "$disk" 2>"$work/said"); then
        loop=''
        say "Skipping the loop device, which cannot be attached here: $(cat "$work/said")"
        return 0
    fi
    say "Attached to $loop; making a file system on its first partition"
    local node
    find_partition
    mkfs.ext4 -q "$node"
    mkdir "$work/files"
    mount "$node" "$work/files"
    files=yes
    say "Writing a file and reading it back"
    printf 'Hello from inside a QED image.\n' >"$work/files/hello.txt"
    sync "$work/files/hello.txt"
    cat "$work/files/hello.txt"
}

show_sample() {
    local image=$work/sample.qed disk=$work/mnt/sample.raw
    say "Creating a QED image of 1 GiB"
    "$venv/bin/python" -c 'import sys, trio, qedfuse
trio.run(qedfuse.create_image, sys.argv[1], 1 << 30)' "$image"
    mount_image "$image"
    say "Mounted; the disk is a flat file"
    ls -ls "$disk"
    say "Partitioning it"
    printf 'label: dos\nsize=512MiB, type=83\ntype=83\n' | sfdisk --quiet "$disk"
    fdisk -l "$disk"
    if [ "$(id -u)" = 0 ]; then
        use_loop
    else
        say "Skipping the loop device, which needs root"
    fi
    say "Unmounting"
    release
    say "Checking that the image is clean"
    "$venv/bin/qedimg" check "$image"
    "$venv/bin/python" - "$image" <<'END'
import sys
from qedfuse.ondisk.header import HEADER_BYTES, parse_header
with open(sys.argv[1], "rb") as file:
    header = parse_header(file.read(HEADER_BYTES), sys.argv[1])
sys.exit("NEED_CHECK is set" if header.need_check else print("NEED_CHECK is clear"))
END
    ls -ls "$image"
}

case ${1:-} in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "${BASH_SOURCE[0]}"
        exit
        ;;
esac
[ $# -le 1 ] || die "found $# arguments, expected at most one, the image"
[ $# = 0 ] || [ -f "$1" ] || die "$1: found no regular file, expected a QED image"

needs=("${runtime_needs[@]}" fdisk=fdisk sfdisk=fdisk)
[ "$(id -u)" != 0 ] || needs+=(losetup=mount mount=mount partx=util-linux mkfs.ext4=e2fsprogs)
install_packages "${needs[@]}"
install_project ""
check_fuse

trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
work=$(mktemp -d)
if [ $# = 1 ]; then show_image "$1"; else show_sample; fi
say "Done"
