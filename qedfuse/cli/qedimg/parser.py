"""The argument parser of a subcommand: options and operands in any order, errors of one line."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qedfuse.errors import UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_OPERAND_MARK: Final = "\ufdd0"
"""The mark in front of an operand that begins with a dash: a noncharacter of Unicode."""
_NEGATIVE: Final = re.compile(r"-\d")
"""The beginning of a size such as ``-1G``; no option has a digit after the dash."""


class Parser(argparse.ArgumentParser):
    """A parser that accepts ``resize vm.qed -1G`` and ``-- -name.qed``.

    argparse takes ``-1G`` for an option, and ignores ``--`` where options and operands are
    mixed.  Therefore an operand that begins with a dash carries a mark until it is converted.
    """

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the subcommand's name.

        Raises:
            UsageError: The words are not a valid command line.
            SystemExit: ``--help`` was given; the help has been printed.
        """
        words = list(words)
        end = words.index("--") if "--" in words else len(words)
        marked = [_OPERAND_MARK + word if _NEGATIVE.match(word) else word for word in words[:end]]
        marked += [
            _OPERAND_MARK + word if word.startswith("-") else word for word in words[end + 1 :]
        ]
        return self.parse_intermixed_args(marked)

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` with argparse's message, as one line."""
        msg = f"{printable(message.replace(_OPERAND_MARK, ''))} (see: {self.prog} --help)"
        raise UsageError(msg)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:  # noqa: ANN401
        """Remove the mark from a word, and convert the word."""
        return super()._get_value(action, arg_string.removeprefix(_OPERAND_MARK))
