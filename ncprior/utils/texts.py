"""Texts of others, such as those of a file, for messages."""

from __future__ import annotations


def printable(text: str, longest: int = 1000) -> str:
    """Returns a message on one line: control characters are escaped, and it is cut if long.

    Example:
        >>> printable("\\x1b[31m red")
        '\\\\x1b[31m red'
    """
    text = text if len(text) <= longest else text[:longest] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
