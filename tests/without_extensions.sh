#!/usr/bin/env bash
# Runs all tests without C extensions, as on a host where qedfuse was installed without a compiler:
#   tests/without_extensions.sh [ARGUMENT...]
#   tests/without_extensions.sh -m MODULE [ARGUMENT...]
# ARGUMENTs are passed to pytest, or to another MODULE: tests.fuzz or tests.crash.explore.  All runs
# in a temporary copy of this tree.
set -eu
# shellcheck source=tests/shared.sh
. "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

install_for_tests
scratch=$(mktemp -d)
chmod 755 "$scratch" # some tests run the program as another user
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "Tests without extensions"
make_copy "$scratch/tree" CC=false
cd "$scratch/tree"
export QEDFUSE_TEST_EXTENSIONS=none
if [ "${1-}" = -m ]; then
    .venv/bin/python "$@"
else
    run_tests "$@"
fi
