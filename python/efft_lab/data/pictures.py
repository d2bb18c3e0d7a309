"""Picture files: finding them, checking that they can be read, decoding each kind to the RGB that a viewer shows."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: What ends a whole file of a format. Only these are accepted by their ends; every other file is decoded.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}

# TIFF tags that say how stored numbers are to be understood.
_BITS, _PHOTOMETRIC, _LEAST, _GREATEST = 258, 262, (340, 280), (341, 281)
_WHITE_IS_ZERO, _ORIENTATION = 0, 274


def pillow() -> Any:
    """The module ``PIL.Image``, or an error that says how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'efft-kernels[vision]'") from error
    return Image


def is_hidden(name: str) -> bool:
    """Whether an operating system or a tool put a file or folder there beside the data: ``.ipynb_checkpoints``,
    ``._x.png``, ``__MACOSX``, ``@eaDir``."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def files(folder: Path) -> list[Path]:
    """All files anywhere below a folder, sorted; hidden ones, and those in hidden folders, are left out."""
    found: list[Path] = []
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not is_hidden(name)]
        found += [Path(place, name) for name in names if not is_hidden(name)]
    return sorted(found)


def pictures(folder: Path) -> list[Path]:
    """Those of `files` whose ending is that of a picture."""
    return [path for path in files(folder) if path.suffix.lower() in SUFFIXES]


def size_upright(image: Any) -> tuple[int, int]:
    """Width and height that an opened picture has once its EXIF orientation is applied; reads the header alone."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def as_rgb(image: Any) -> Any:
    """A picture as a viewer shows it: an RGB ``PIL.Image.Image`` with 8 bits a channel.

    - The EXIF orientation is applied.
    - Whole numbers of 16 bits are scaled by 65535, or by what the file says: 12 bits per sample, or TIFF's tags for the
      least and greatest value. Numbers of 12 bits in a file that says 16 are taken for 16 bits, so they come out dark:
      no single picture tells the two apart.
    - Floating-point numbers must be within 0..1, or the file must say their least and greatest value. So must it for
      signed and 32-bit numbers, whose types are not ranges of brightness.
    - What is transparent shows white. Of an animation the first frame is taken.

    Args:
        image: an opened ``PIL.Image.Image`` of any mode.

    Raises:
        ValueError: the range of the numbers is not known, or some lie outside.
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
    """The numbers of a grey picture, [height, width], from their range to 0..255."""
    values = np.asarray(image).astype(np.float64)
    least, greatest = _range(image, tags)
    if not (values.min() >= least and values.max() <= greatest):  # also where there are NaNs
        raise ValueError(
            f"expected grey values from {least:g} to {greatest:g}, got {values.min():g} to {values.max():g}; store "
            "them as 8 or 16 bits, as floating-point numbers within 0..1, or with their range (TIFF tags 340 and 341)"
        )
    shares = (values - least) / (greatest - least)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds with up to 8 bits only
        shares = 1 - shares
    return np.rint(255 * shares).astype(np.uint8)


def _range(image: Any, tags: dict[int, Any]) -> tuple[float, float]:
    given = [next((_first(tags[tag]) for tag in names if tag in tags), None) for names in (_LEAST, _GREATEST)]
    natural: tuple[float, float] | None = (0.0, 2.0 ** _first(tags.get(_BITS, 16)) - 1)
    if image.mode == "F":
        natural = (0.0, 1.0)
    elif image.mode == "I" and tags:  # without tags it comes from a PGM or PNG file, and has 16 bits
        natural = None
    least, greatest = (
        value if value is not None or natural is None else natural[end] for end, value in enumerate(given)
    )
    if least is None or greatest is None or not least < greatest:
        raise ValueError(
            "the range of its signed or 32-bit grey values is not known; store them as 8 or 16 bits, as floating-point "
            "numbers within 0..1, or with their range (TIFF tags 340 and 341)"
        )
    return float(least), float(greatest)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def check_readable(paths: Sequence[Path]) -> None:
    """Opens every picture, in parallel: header and end of JPEG and PNG files, all of any other.

    Raises:
        ValueError: some cannot be read; it says how many, and names the first ones with the reason.
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
    """Why a picture cannot be read; None if it can, as far as its header and end tell where these are enough."""
    try:
        with pillow().open(path) as image:
            end = _ENDS.get(image.format)
            if end is not None:
                with open(path, "rb") as file:
                    file.seek(max(path.stat().st_size - 64, 0))
                    if end in file.read():
                        return None
            as_rgb(image)
    except Exception as error:  # Pillow has many
        return f"{path}: {error}"
    return None
