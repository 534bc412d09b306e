#!/usr/bin/env bash
# Installs qedfuse where mount(8) and /etc/fstab find it; run it as root.
#
#   examples/install.sh              create a virtual environment in /opt/qedfuse, and links to it
#   examples/install.sh --link VENV  create only the links, to an existing virtual environment
#   examples/install.sh --uninstall  remove the links and /opt/qedfuse
#
# The links are qedfuse and qedimg in /usr/local/bin, mount.qedfuse and mount.fuse.qedfuse in
# /sbin, and man pages and completions of bash, zsh and fish in /usr/local/share.
# mount(8) looks for its helpers only in /sbin and runs them with its own PATH, so it does not
# find a program in a virtual environment without them.
# PREFIX, BINDIR, SBINDIR and DATADIR in the environment select other directories.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

prefix=${PREFIX:-/opt/qedfuse}
data=${DATADIR:-/usr/local/share}
# Each link, and its target in the virtual environment.
links=(
    "${BINDIR:-/usr/local/bin}/qedfuse=bin/qedfuse"
    "${BINDIR:-/usr/local/bin}/qedimg=bin/qedimg"
    "${SBINDIR:-/sbin}/mount.qedfuse=bin/qedfuse"
    "${SBINDIR:-/sbin}/mount.fuse.qedfuse=bin/qedfuse"
)
for page in man/man1/qedimg.1 man/man8/qedfuse.8 \
    bash-completion/completions/{qedfuse,qedimg} \
    zsh/site-functions/_{qedfuse,qedimg} \
    fish/vendor_completions.d/{qedfuse,qedimg}.fish; do
    links+=("$data/$page=share/$page")
done

# is_ours LINK=TARGET: whether this script made the link, and so may replace or remove it.
# The links of the Debian package are relative.
is_ours() {
    [ -L "${1%=*}" ] && case $(readlink "${1%=*}") in /*/"${1##*=}") ;; *) false ;; esac
}

make_links() {
    local pair link target
    for pair in "${links[@]}"; do
        link=${pair%=*}
        [ ! -e "$link" ] && [ ! -L "$link" ] || is_ours "$pair" ||
            die "$link: found a file of another program, expected nothing or a link of this script"
    done
    for pair in "${links[@]}"; do
        link=${pair%=*} target=$1/${pair##*=}
        # An environment that was installed with "pip install -e" has no man pages.
        [ -e "$target" ] || continue
        mkdir -p "$(dirname "$link")"
        ln -sfn "$target" "$link"
        say "$link -> $target"
    done
}

uninstall() {
    local pair
    for pair in "${links[@]}"; do
        if is_ours "$pair"; then
            rm "${pair%=*}"
            say "Removed ${pair%=*}"
        fi
    done
    if [ -e "$prefix/.made-for" ]; then
        rm -rf "$prefix"
        say "Removed $prefix"
    fi
}

install() {
    [ ! -e "$prefix" ] || [ -e "$prefix/.made-for" ] || [ -z "$(ls -A "$prefix")" ] ||
        die "$prefix: found other files, expected nothing or an earlier installation"
    # shellcheck source=/dev/null
    release=$(. /etc/os-release 2>/dev/null && printf '%s' "${ID:-}${VERSION_ID:-}")
    case $release in
        debian12) say "Installing with pip: Debian 12's libraries are too old for the Debian package" ;;
        debian*) say "Installing with pip; packaging/build-deb.sh builds a Debian package instead" ;;
    esac
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
