#!/usr/bin/env bash
# Lists the partitions of two images as files, and copies files out of each: without root, without
# loop devices, and without the kernel's drivers for the file systems.
#
#   examples/copy-from-partitions.sh [DIRECTORY]
#
# Works in a temporary directory within DIRECTORY, which is removed at the end; the images are
# samples: one as Windows makes it (GPT with FAT and NTFS), one as Linux makes it (MBR with ext4,
# and with btrfs and swap in logical partitions).
# Needs qedfuse and qedimg (examples/install.sh), e2fsprogs, mtools, dosfstools, ntfs-3g, fuse2fs
# and btrfs-progs.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=examples/scratch.sh
. "$(dirname "${BASH_SOURCE[0]}")/scratch.sh"
install_packages sfdisk=fdisk mkfs.ext4=e2fsprogs mkfs.fat=dosfstools mcopy=mtools \
    mkntfs=ntfs-3g fuse2fs=fuse2fs mkfs.btrfs=btrfs-progs

say "Two samples"
mkdir tree
echo "The only copy of a letter." >tree/letter.txt
qedimg create windows.qed 256M
mount_disk windows.qed
sfdisk --quiet disk/windows.raw <<'TABLE'
label: gpt
start=2048, size=65536, type=uefi
start=67584, size=131072, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7
TABLE
unmount_disk
qedimg create linux.qed 512M
mount_disk linux.qed
sfdisk --quiet disk/linux.raw <<'TABLE'
label: dos
start=2048, size=131072, type=83
start=133120, size=786432, type=5
start=135168, size=524288, type=83
start=661504, size=65536, type=82
TABLE
unmount_disk

say "Each partition is a file"
mount_disk windows.qed -o partitions
ls -l disk
mkfs.fat disk/windows.raw.p1 >/dev/null
mcopy -i disk/windows.raw.p1 tree/letter.txt ::/
mkntfs --quiet --force --fast --sector-size 512 --sectors-per-track 63 --heads 255 \
    --partition-start 67584 disk/windows.raw.p2 >/dev/null 2>&1
ntfscp --quiet disk/windows.raw.p2 tree/letter.txt letter.txt
unmount_disk
mount_disk linux.qed -o partitions
ls -l disk
mkfs.ext4 -q -d tree disk/linux.raw.p1
mkfs.btrfs --rootdir tree disk/linux.raw.p5 >/dev/null
mkswap disk/linux.raw.p6 >/dev/null
unmount_disk
qedimg info --partitions windows.qed | sed -n '/^partition table/,$p'
qedimg info --partitions linux.qed | sed -n '/^partition table/,$p'

say "Files are copied out of each"
mkdir fat ntfs ext4 btrfs
mount_disk windows.qed -o ro,partitions
mcopy -i disk/windows.raw.p1 ::/letter.txt fat/
ntfscat disk/windows.raw.p2 letter.txt >ntfs/letter.txt
unmount_disk
mount_disk linux.qed -o ro,partitions
mkdir inside
fuse2fs -o ro disk/linux.raw.p1 inside
cp inside/letter.txt ext4/
fusermount3 -u inside
btrfs restore disk/linux.raw.p5 btrfs >/dev/null
unmount_disk
for copy in fat ntfs ext4 btrfs; do
    cmp tree/letter.txt "$copy/letter.txt"
    say "$copy: $(cat "$copy/letter.txt")"
done
say "Done"
