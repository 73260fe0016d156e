"""HTML and SVG by function calls, where all text is escaped unless it says that it is markup."""

from __future__ import annotations

import re
from html import escape

_EMPTY = ("meta", "link", "img")  # elements of HTML that have no end
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no page may hold them


class Markup(str):
    """Text that is markup already."""

    def __add__(self, other: str) -> Markup:
        return Markup(str(self) + escaped(other))


def escaped(text: object) -> Markup:
    """``text`` as it stands in markup, in quotes too."""
    return text if isinstance(text, Markup) else Markup(escape(_CONTROLS.sub("\ufffd", str(text))))


def join(*children: object, between: str = "") -> Markup:
    """The children side by side."""
    return Markup(between.join(escaped(child) for child in children))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element with its children; ``cls`` is the class, and an underscore in a name is a hyphen."""
    shown = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
    )
    start = f"<{name}{shown}>"
    return Markup(start if name in _EMPTY else f"{start}{join(*children)}</{name}>")
