"""Elements of HTML and SVG as text, in which every text and attribute is escaped."""

from __future__ import annotations

from html import escape
from typing import TypeAlias

Attribute: TypeAlias = str | float | None

_VOID = ("img", "meta", "line", "circle", "path", "rect", "polyline")


class Html(str):
    """Text that is markup already, as :func:`element` returns it; it is not escaped again."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: Attribute) -> Html:
    """Element with its content.

    Arguments:
        name: Name of the element, such as ``"td"``.
        content: Texts, which are escaped, and other elements.
        attributes: Attributes by name; ``class_`` is ``class``, ``stroke_width`` is
            ``stroke-width``, and one that is ``None`` is left out.
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{opening}/>")
    return Html(f"<{name}{opening}>{join(*content)}</{name}>")


def join(*content: str) -> Html:
    """Texts, which are escaped, and elements one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content))


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
