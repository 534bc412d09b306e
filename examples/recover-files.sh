#!/usr/bin/env bash
# Copies the files out of a damaged image, and then repairs the image.
#
#   examples/recover-files.sh [DIRECTORY]
#
# Works in a temporary directory within DIRECTORY, which is removed at the end; the image
# is a sample that is damaged on purpose.
# Needs qedfuse and qedimg (examples/install.sh) and e2fsprogs.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=examples/scratch.sh
. "$(dirname "${BASH_SOURCE[0]}")/scratch.sh"
install_packages mkfs.ext4=e2fsprogs

say "A sample: a file system with two files"
mkdir tree
echo "The only copy of a letter." >tree/letter.txt
seq 100000 >tree/numbers.txt
qedimg create vm.qed 64M
mount_disk vm.qed
mkfs.ext4 -q -d tree disk/vm.raw
unmount_disk

say "Damage: an entry that points into a table, and an unclean shutdown"
# Entry 32767, the last one of the L1 table, which begins at byte 65536 and has 4 clusters.
printf '\0\0\1\0\0\0\0\0' | dd of=vm.qed bs=1 seek=$((5 * 65536 - 8)) conv=notrunc status=none
printf '\2' | dd of=vm.qed bs=1 seek=16 conv=notrunc status=none # the bit NEED_CHECK

say "The check lists the damage, and changes nothing"
qedimg check vm.qed || [ $? = 2 ]

say "A mount for writing is refused"
mount_disk vm.qed && die "vm.qed: mounted, expected a refusal"

say "A read-only mount works, and the files are copied out"
mkdir recovered
mount_disk vm.qed -o ro
debugfs -R 'rdump / recovered' disk/vm.raw 2>/dev/null
unmount_disk
diff -r --exclude=lost+found tree recovered
ls -l recovered

say "A dry run of the repair, and the repair"
qedimg check -r all --dry-run vm.qed || [ $? = 2 ]
qedimg check -r all vm.qed
ls -l vm.qed*

say "The image is sound, and can be written to again"
qedimg check vm.qed
mount_disk vm.qed
e2fsck -fn disk/vm.raw
unmount_disk
say "Done"
