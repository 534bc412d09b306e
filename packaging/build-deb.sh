#!/usr/bin/env bash
# Builds qedfuse_VERSION_ARCH.deb for this Debian, from the files that git tracks here, changes
# included:
#
#   packaging/build-deb.sh [DIRECTORY]     puts the package into DIRECTORY (dist)
#
# Debian 13 or newer is needed, because the package uses Debian's own Python libraries; those of
# Debian 12 are too old, and examples/install.sh installs there.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"

case ${1:-} in
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
target=${1:-$root/dist}
# shellcheck source=/dev/null
release=$(. /etc/os-release && printf '%s' "${VERSION_ID:-0}")
[ "${release%%.*}" -ge 13 ] 2>/dev/null ||
    die "found Debian $release, expected 13 or newer (install with examples/install.sh)"

install_packages dpkg-buildpackage=dpkg-dev gcc=gcc c-headers=libc6-dev

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/qedfuse
mkdir "$tree"
if git -C "$root" rev-parse --git-dir >/dev/null 2>&1; then
    git -C "$root" ls-files -z | (cd "$root" && xargs -0 tar -c --ignore-failed-read) | tar -x -C "$tree"
else
    tar -C "$root" -c --exclude=./.venv --exclude='*.so' --exclude=./dist . | tar -x -C "$tree"
fi
cp -r "$tree/packaging/debian" "$tree/debian"
# The version of the package is that of the program.
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$tree/qedfuse/__init__.py")
grep -q "^qedfuse ($version-" "$tree/debian/changelog" ||
    die "packaging/debian/changelog: found no entry for version $version, expected one at its top"
log=$work/log
if ! (cd "$tree" && dpkg-checkbuilddeps) 2>/dev/null; then
    [ "$(id -u)" = 0 ] ||
        die "$(cd "$tree" && dpkg-checkbuilddeps 2>&1) (run as root, or: apt-get build-dep $root)"
    say "Installing what the package needs to be built"
    if ! (apt-get update -qq && env DEBIAN_FRONTEND=noninteractive \
        apt-get build-dep -y -qq "$tree") </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        die "apt-get could not install it"
    fi
fi
say "Building the package"
if ! (cd "$tree" && dpkg-buildpackage --build=binary --no-sign) >"$log" 2>&1; then
    cat "$log" >&2
    die "dpkg-buildpackage failed"
fi
mkdir -p "$target"
cp "$work"/qedfuse_*.deb "$target"
ls "$target"/qedfuse_*.deb
