"""Find image files, check that they can be read, and decode them to the RGB values that an image viewer shows."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: Bytes near the end of a complete file, by format. For these formats, :func:`check_readable` only looks for these
#: bytes. It decodes files of all other formats.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}

# Numbers of TIFF tags (_LEAST and _GREATEST have two alternatives each), and one value of the tag _PHOTOMETRIC.
_BITS, _PHOTOMETRIC, _LEAST, _GREATEST = 258, 262, (340, 280), (341, 281)
_WHITE_IS_ZERO, _ORIENTATION = 0, 274


def pillow() -> Any:
    """Import and return the module ``PIL.Image``. If Pillow is missing, the error explains how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'efft-kernels[vision]'") from error
    return Image


def is_hidden(name: str) -> bool:
    """Return whether a file or folder was created by an operating system or a tool and is not part of the data.

    Examples are ``.ipynb_checkpoints``, ``._x.png``, ``__MACOSX`` and ``@eaDir``.
    """
    return name.startswith((".", "__MACOSX", "@eaDir"))


def folders(folder: Path) -> list[Path]:
    """Return the sorted subfolders of a folder that are not hidden (:func:`is_hidden`)."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def files(folder: Path) -> list[Path]:
    """Return the sorted files in a folder and all its subfolders. Hidden files and hidden folders are left out."""
    found: list[Path] = []
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not is_hidden(name)]
        found += [Path(place, name) for name in names if not is_hidden(name)]
    return sorted(found)


def pictures(folder: Path) -> list[Path]:
    """Return those files of :func:`files` whose name has the ending of an image format."""
    return [path for path in files(folder) if path.suffix.lower() in SUFFIXES]


def size_upright(image: Any) -> tuple[int, int]:
    """Return the width and height of an opened image after its EXIF orientation is applied. Only the header is read."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def as_rgb(image: Any) -> Any:
    """Convert an image to the form that an image viewer shows: an RGB ``PIL.Image.Image`` with 8 bits per channel.

    - The EXIF orientation is applied.
    - Integers of 16 bits are divided by 65535. If the file states another range (12 bits per sample, or the TIFF tags
      for the minimum and maximum value), that range is used. If a file with 12-bit numbers states 16 bits, its image
      becomes dark, because a single image does not reveal the mistake.
    - Floating-point numbers must be within 0..1, or the file must state their minimum and maximum.
    - For signed and 32-bit integers, the file must state the minimum and maximum, because the ranges of these types are
      not ranges of brightness.
    - Transparent pixels become white. The first frame of an animation is used.

    Args:
        image: an opened ``PIL.Image.Image`` of any mode.

    Raises:
        ValueError: the range of the numbers is not known, or some numbers are outside the range.
        OSError: the file is damaged.
    """
    from PIL import ImageOps

    tags = dict(getattr(image, "tag_v2", None) or {})
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return pillow().fromarray(_in_eight_bits(image, tags)).convert("RGB")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        seen = pillow().new("RGBA", image.size, "white")
        seen.alpha_composite(image.convert("RGBA"))
        image = seen
    return image.convert("RGB")


def _in_eight_bits(image: Any, tags: dict[int, Any]) -> npt.NDArray[np.uint8]:
    """Scale the numbers of a gray image, [height, width], from their range to 0..255."""
    values = np.asarray(image).astype(np.float64)
    least, greatest = _range(image, tags)
    if not (values.min() >= least and values.max() <= greatest):  # also true if a value is NaN
        raise ValueError(
            f"expected gray values from {least:g} to {greatest:g}, got {values.min():g} to {values.max():g}; store "
            "them as 8 or 16 bits, as floating-point numbers within 0..1, or with their range (TIFF tags 340 and 341)"
        )
    shares = (values - least) / (greatest - least)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow handles this tag only for up to 8 bits
        shares = 1 - shares
    return np.rint(255 * shares).astype(np.uint8)


def _range(image: Any, tags: dict[int, Any]) -> tuple[float, float]:
    given = [next((_first(tags[tag]) for tag in names if tag in tags), None) for names in (_LEAST, _GREATEST)]
    natural: tuple[float, float] | None = (0.0, 2.0 ** _first(tags.get(_BITS, 16)) - 1)
    if image.mode == "F":
        natural = (0.0, 1.0)
    elif image.mode == "I" and tags:  # an image without tags comes from a PGM or PNG file and has 16 bits
        natural = None
    least, greatest = (
        value if value is not None or natural is None else natural[end] for end, value in enumerate(given)
    )
    if least is None or greatest is None or not least < greatest:
        raise ValueError(
            "the range of the signed or 32-bit gray values is not known; store them as 8 or 16 bits, as floating-point "
            "numbers within 0..1, or with their range (TIFF tags 340 and 341)"
        )
    return float(least), float(greatest)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def check_readable(paths: Sequence[Path]) -> None:
    """Open all images in parallel and check that they can be read.

    Of JPEG and PNG files, only the header and the end are read. If the end is missing, and for all other formats, the
    image is decoded.

    Raises:
        ValueError: some images cannot be read. The message gives their number, and the names of the first five with the
            reasons.
    """
    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(_problem, paths) if problem is not None]
    if problems:
        more = f"; ... ({len(problems)} in all)" if len(problems) > 5 else ""
        raise ValueError(
            f"{len(problems)} of {len(paths)} images cannot be read: {'; '.join(problems[:5])}{more}. Remove or "
            "replace them"
        )


def _problem(path: Path) -> str | None:
    """Return the reason why an image cannot be read, or None if no problem was found."""
    try:
        with pillow().open(path) as image:
            end = _ENDS.get(image.format)
            if end is not None:
                with open(path, "rb") as file:
                    file.seek(max(path.stat().st_size - 64, 0))
                    if end in file.read():
                        return None
            as_rgb(image)
    except Exception as error:  # Pillow raises many types of errors
        return f"{path}: {error}"
    return None
