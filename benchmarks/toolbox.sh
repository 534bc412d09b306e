#!/usr/bin/env bash
# Installs what the measurements need, then measures qedimg and qemu-img:
#
#   benchmarks/toolbox.sh                   every task, in about twenty minutes
#   benchmarks/toolbox.sh --quick           smaller disks, in about two minutes
#   benchmarks/toolbox.sh --tasks convert   the tasks whose names contain "convert"
#
# Arguments are passed to benchmarks/toolbox.py; --help lists them.  QEDIMG is the command to
# measure, if it is not that of this checkout.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$root"

install_packages "${runtime_needs[@]}" qemu-img=qemu-utils qemu-io=qemu-utils findmnt=util-linux
install_project ""
exec "$venv/bin/python" -m benchmarks.toolbox "$@"
