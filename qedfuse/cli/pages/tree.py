"""The man pages and the files for shells: their texts, and their paths below ``docs/share/``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.cli.pages import bash, fish, man, programs, zsh

if TYPE_CHECKING:
    from pathlib import Path


def files() -> dict[str, str]:
    """Return the text of each file, by its path below ``docs/share/``."""
    generated = {"man/man1/qedimg.1": man.qedimg_page(), "man/man8/qedfuse.8": man.qedfuse_page()}
    for program in (programs.qedimg(), programs.qedfuse()):
        generated |= {
            f"bash-completion/completions/{program.name}": bash.script(program),
            f"zsh/site-functions/_{program.name}": zsh.script(program),
            f"fish/vendor_completions.d/{program.name}.fish": fish.script(program),
        }
    return generated


def write(directory: Path) -> None:
    """Write all files below a directory; create directories, and replace files."""
    for name, text in files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
