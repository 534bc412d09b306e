"""The parser of a subcommand's words: complaints of one line, options and names in any order."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qedfuse.errors import UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLAIN: Final = "\ufdd0"
"""Marks a word that is no option although it begins with a dash; no character of any text."""
_NEGATIVE: Final = re.compile(r"-\d")
"""How a size begins by which a disk is to shrink; no option of ours does."""


class Parser(argparse.ArgumentParser):
    """A parser that takes ``resize vm.qed -1G`` and ``-- -name.qed`` as they are meant.

    argparse would take the first for an option, and forgets the double dash where options
    and names are mixed.
    """

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse what follows the subcommand's name.

        Raises:
            UsageError: It makes no sense.
            SystemExit: Help was asked for, and has been printed.
        """
        words = list(words)
        end = words.index("--") if "--" in words else len(words)
        plain = [_PLAIN + word if _NEGATIVE.match(word) else word for word in words[:end]]
        plain += [_PLAIN + word if word.startswith("-") else word for word in words[end + 1 :]]
        return self.parse_intermixed_args(plain)

    def error(self, message: str) -> NoReturn:
        """Complain.

        Raises:
            UsageError: Always.
        """
        msg = f"{printable(message.replace(_PLAIN, ''))} (see: {self.prog} --help)"
        raise UsageError(msg)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:  # noqa: ANN401
        """Take the mark off before a word is converted."""
        return super()._get_value(action, arg_string.removeprefix(_PLAIN))
