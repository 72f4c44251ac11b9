"""The one exception that users see: what is wrong, where, and what would be right, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimnerError(Exception):
    """The user's input was wrong. The command line prints it in one line and exits with code 2.

    What cannot be printed on a line, such as a line's end within a wrong name, is shown as in Python's own strings.
    """

    def __init__(self, message: object = "") -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
        super().__init__(line)


def suggest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'cat'?"` for the nearest known names, else the names themselves; for error messages."""
    names = [str(name) for name in known]
    folded = {name.casefold(): name for name in names}
    near = [folded[n] for n in difflib.get_close_matches(word.casefold(), folded, n=3, cutoff=0.6)]
    if near:
        return "; did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""
