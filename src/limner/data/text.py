"""Messages in one line, whatever file names and exceptions hold."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text in one line that any terminal takes: control characters and broken Unicode are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def reason(error: BaseException) -> str:
    """The message of an exception in one short line."""
    text = getattr(error, "strerror", None) or str(error)
    return printable(" ".join(str(text).split()))[:160] or type(error).__name__
