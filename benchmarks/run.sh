#!/usr/bin/env bash
# Sets up all that the measurements need, then measures qedfuse beside QEMU and a limit:
#
#   benchmarks/run.sh                   every cell, in about half an hour
#   benchmarks/run.sh --quick           every cell, in about five minutes
#   benchmarks/run.sh --cells 1m        the cells whose names contain "1m"
#
# Arguments go on to benchmarks/speed.py; --help tells them all.  QEDFUSE names the program
# to measure, where it is not the one of this checkout.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$root"

install_packages "${runtime_needs[@]}" \
    qemu-img=qemu-utils qemu-storage-daemon=qemu-system-common fio=fio tar=tar \
    losetup=mount mount=mount mkfs.ext4=e2fsprogs findmnt=util-linux
install_project ""
check_fuse
# For the measurements' own Python too, which looks for losetup and mkfs.ext4.
export PATH
exec "$venv/bin/python" -m benchmarks.speed "$@"
