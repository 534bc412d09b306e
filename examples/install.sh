#!/usr/bin/env bash
# Installs qedfuse where mount(8) and /etc/fstab find it; run it as root.
#
#   examples/install.sh              a virtual environment in /opt/qedfuse, and links to it
#   examples/install.sh --link VENV  only the links, to a virtual environment that is there
#   examples/install.sh --uninstall  takes the links and /opt/qedfuse away
#
# The links: /usr/local/bin/qedfuse, /sbin/mount.qedfuse and /sbin/mount.fuse.qedfuse.
# mount(8) looks for its helpers in /sbin only and runs them with a PATH of its own, so a
# program in a virtual environment is not found without them.
# PREFIX, BINDIR and SBINDIR in the environment choose other places.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

prefix=${PREFIX:-/opt/qedfuse}
links=(
    "${BINDIR:-/usr/local/bin}/qedfuse"
    "${SBINDIR:-/sbin}/mount.qedfuse"
    "${SBINDIR:-/sbin}/mount.fuse.qedfuse"
)

# is_ours LINK: did this script make it?  Only then may it be replaced or removed.
is_ours() {
    [ -L "$1" ] && case $(readlink "$1") in */bin/qedfuse) ;; *) false ;; esac
}

make_links() {
    local link
    for link in "${links[@]}"; do
        [ ! -e "$link" ] && [ ! -L "$link" ] || is_ours "$link" ||
            die "$link: found a file that is not ours, expected nothing or our link"
    done
    for link in "${links[@]}"; do
        mkdir -p "$(dirname "$link")"
        ln -sfn "$1/bin/qedfuse" "$link"
        say "$link -> $1/bin/qedfuse"
    done
}

uninstall() {
    local link
    for link in "${links[@]}"; do
        if is_ours "$link"; then
            rm "$link"
            say "Removed $link"
        fi
    done
    if [ -e "$prefix/.made-for" ]; then
        rm -rf "$prefix"
        say "Removed $prefix"
    fi
}

install() {
    [ ! -e "$prefix" ] || [ -e "$prefix/.made-for" ] || [ -z "$(ls -A "$prefix")" ] ||
        die "$prefix: found files that are not ours, expected nothing or an earlier installation"
    install_packages "${runtime_needs[@]}"
    venv=$prefix
    make_venv
    say "Installing qedfuse into $prefix"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "$root"
    make_links "$prefix"
}

case ${1:-} in
    '') install ;;
    --uninstall) uninstall ;;
    --link)
        [ -x "${2:-}/bin/qedfuse" ] || die "${2:-}/bin/qedfuse: found no program, expected qedfuse"
        make_links "$(cd "$2" && pwd)"
        ;;
    -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "${BASH_SOURCE[0]}" ;;
    *) die "$1: unknown argument (see --help)" ;;
esac
