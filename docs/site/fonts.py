"""A font for formulas, taken from the package ziamath: browsers need one with a table of mathematics."""

from __future__ import annotations

import logging
from pathlib import Path

# Letters, Greek, primes, arrows, operators, brackets and the alphabets of mathematics.
_RANGES = (
    *(
        (0x20, 0x7E),
        (0xA0, 0xFF),
        (0x2C6, 0x2DD),
        (0x300, 0x338),
        (0x370, 0x3FF),
        (0x2000, 0x206F),
    ),
    *((0x20D0, 0x20F0), (0x2100, 0x214F), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2300, 0x23FF)),
    *((0x27E6, 0x27EF), (0x2980, 0x298F), (0x2A00, 0x2AFF), (0x1D400, 0x1D7FF)),
)

_LICENCE = "math.woff is a part of STIX Two Math, by The STIX Fonts Project Authors, under the\n"
_LICENCE += "SIL Open Font License, version 1.1: https://openfontlicense.org\n"


def write(folder: Path) -> None:
    """Writes the font as `math.woff`, with a note on its licence."""
    import ziamath
    from fontTools import subset

    logging.getLogger("fontTools").setLevel(logging.WARNING)
    options = subset.Options(flavor="woff")
    source = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    font = subset.load_font(str(source), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[c for first, last in _RANGES for c in range(first, last + 1)])
    subsetter.subset(font)
    subset.save_font(font, str(folder / "math.woff"), options)
    (folder / "math-licence.txt").write_text(_LICENCE, encoding="utf-8")
