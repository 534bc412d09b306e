#!/usr/bin/env bash
# Installs what the measurements need, then measures qedfuse, QEMU and a baseline:
#
#   benchmarks/run.sh                   every cell, in one to two hours
#   benchmarks/run.sh --quick           every cell, in about ten minutes
#   benchmarks/run.sh --cells 1m        the cells whose names contain "1m"
#   benchmarks/run.sh --peer-root DIR   the QEMU in DIR, another Debian's root, as well
#
# Arguments are passed to benchmarks/speed.py; --help lists them.  QEDFUSE names the program
# to measure, if it is not that of this checkout.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$root"

install_packages "${runtime_needs[@]}" \
    qemu-img=qemu-utils qemu-storage-daemon=qemu-system-common fio=fio tar=tar \
    losetup=mount mount=mount mkfs.ext4=e2fsprogs findmnt=util-linux
install_project ""
check_fuse
# The Python program also looks for losetup and mkfs.ext4 there.
export PATH
exec "$venv/bin/python" -m benchmarks.speed "$@"
