#!/usr/bin/env bash
# Installs qedfuse where mount(8) and /etc/fstab find it; run it as root.
#
#   examples/install.sh              a virtual environment in /opt/qedfuse, and links to it
#   examples/install.sh --link VENV  only the links, to a virtual environment that is there
#   examples/install.sh --uninstall  takes the links and /opt/qedfuse away
#
# The links: qedfuse and qedimg in /usr/local/bin, mount.qedfuse and mount.fuse.qedfuse in /sbin,
# man pages and the completions of bash, zsh and fish in /usr/local/share.
# mount(8) looks for its helpers in /sbin only and runs them with a PATH of its own, so a
# program in a virtual environment is not found without them.
# PREFIX, BINDIR, SBINDIR and DATADIR in the environment choose other places.
set -eu
# shellcheck source=examples/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

prefix=${PREFIX:-/opt/qedfuse}
data=${DATADIR:-/usr/local/share}
# Each link, and what it leads to in the environment.
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

# is_ours LINK=TARGET: did this script make it?  Only then may it be replaced or removed.
is_ours() {
    [ -L "${1%=*}" ] && case $(readlink "${1%=*}") in */"${1##*=}") ;; *) false ;; esac
}

make_links() {
    local pair link target
    for pair in "${links[@]}"; do
        link=${pair%=*}
        [ ! -e "$link" ] && [ ! -L "$link" ] || is_ours "$pair" ||
            die "$link: found a file that is not ours, expected nothing or our link"
    done
    for pair in "${links[@]}"; do
        link=${pair%=*} target=$1/${pair##*=}
        # An environment that was installed with "pip install -e" has no pages.
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
