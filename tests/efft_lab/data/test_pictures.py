"""Compare decoded pictures with explicit pixels, or with pixels computed without Pillow's conversions."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efft_lab.data.pictures import as_rgb, check_readable
from efft_lab.data.task import FileImages

Array = Any


def decoded(path: Path) -> Array:
    return np.asarray(FileImages([path], [0]).image(0))


def grey(values: Array) -> Array:
    """Convert gray values [height, width] in 0..255 to RGB."""
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


LEVELS = np.array([[0, 257, 32768], [40000, 65278, 65535]], np.uint16)
EIGHT_BITS = [[0, 1, 128], [156, 254, 255]]  # LEVELS / 257, rounded


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits(name: str, tmp_path: Path) -> None:
    Image.fromarray(LEVELS).save(tmp_path / name)
    np.testing.assert_array_equal(decoded(tmp_path / name), grey(EIGHT_BITS))


@pytest.mark.parametrize(("maximum", "expected"), [(65535, EIGHT_BITS), (1023, [[0, 0, 128], [156, 254, 255]])])
def test_sixteen_bits_of_pgm(maximum: int, expected: Any, tmp_path: Path) -> None:
    values = np.floor(LEVELS * (maximum / 65535)).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 %d\n" % maximum + values.tobytes())
    assert np.abs(decoded(tmp_path / "a.pgm").astype(int) - grey(expected)).max() <= (0 if maximum == 65535 else 1)


def tiff(values: bytes, bits: int, shape: tuple[int, int], kind: int = 1, photometric: int = 1, **more: float) -> bytes:
    """Return an uncompressed little-endian gray TIFF; ``more`` may contain min and max (tags 340, 341)."""
    tags = [
        *((256, 3, shape[1]), (257, 3, shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 0), (277, 3, 1), (278, 3, shape[0]), (279, 4, len(values)), (339, 3, kind)),
        *((tag, 11, more[name]) for tag, name in ((340, "min"), (341, "max")) if name in more),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHI", tag, type, 1) + struct.pack("<f" if type == 11 else "<I", start if tag == 273 else value)
        for tag, type, value in tags
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values


TIFFS: dict[str, tuple[bytes, Any]] = {
    "12 bits": (tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10]), 12, (1, 4)), [[0, 128, 255, 1]]),
    "16 bits, white is zero": (tiff(LEVELS.tobytes(), 16, (2, 3), photometric=0), 255 - np.array(EIGHT_BITS)),
    "16 bits that say 12": (
        tiff(np.array([[0, 2048, 4095]], "<u2").tobytes(), 16, (1, 3), max=4095.0),
        [[0, 128, 255]],
    ),
    "signed 16 bits with a range": (
        tiff(np.array([[-1000, 0, 1000]], "<i2").tobytes(), 16, (1, 3), kind=2, min=-1000.0, max=1000.0),
        [[0, 128, 255]],
    ),
    "floats": (tiff(np.array([[0, 0.25, 1]], "<f4").tobytes(), 32, (1, 3), kind=3), [[0, 64, 255]]),
    "floats with a range": (
        tiff(np.array([[-8, 0, 8]], "<f4").tobytes(), 32, (1, 3), kind=3, min=-8.0, max=8.0),
        [[0, 128, 255]],
    ),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff(kind: str, tmp_path: Path) -> None:
    content, expected = TIFFS[kind]
    (tmp_path / "a.tiff").write_bytes(content)
    np.testing.assert_array_equal(decoded(tmp_path / "a.tiff"), grey(expected))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(np.array([[0, 300]], "<f4").tobytes(), 32, (1, 2), kind=3), "gray values from 0 to 1, got 0 to 300"),
        (tiff(np.array([[0, np.nan]], "<f4").tobytes(), 32, (1, 2), kind=3), "gray values from 0 to 1, got nan"),
        (tiff(np.array([[-5, 300]], "<i2").tobytes(), 16, (1, 2), kind=2), "range of the signed or 32-bit gray values"),
        (tiff(np.array([[0, 300]], "<u4").tobytes(), 32, (1, 2)), "range of the signed or 32-bit gray values"),
    ],
)
def test_numbers_of_unknown_range_are_refused_at_the_start(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 of 1 images cannot be read: .*a\.tif: .*{message}"):
        check_readable([tmp_path / "a.tif"])


# The inverse of each orientation; the EXIF standard describes the positions of the first row and column.
UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_orientation(format: str, orientation: int, tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a", format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(tmp_path / "a"), UPRIGHT[orientation](pixels))


def test_orientation_of_sixteen_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(LEVELS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), UPRIGHT[6](grey(EIGHT_BITS)))


def test_cmyk(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    expected = [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(decoded(tmp_path / "a.tif"), expected)
    Image.fromarray(np.repeat(np.repeat(inks, 16, 0), 16, 1), "CMYK").save(tmp_path / "a.jpg", quality=100)
    centres = decoded(tmp_path / "a.jpg")[8, 8::16].astype(int)  # JPEG files of Adobe's kind store the inks inverted
    assert np.abs(centres - expected[0]).max() <= 8


def palette(transparency: Any) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (None, [[[10, 20, 30], [200, 100, 50], [0, 0, 0]]]),
        (2, [[[10, 20, 30], [200, 100, 50], [255, 255, 255]]]),
        (bytes([255, 255, 51]), [[[10, 20, 30], [200, 100, 50], [204, 204, 204]]]),  # a fifth of black on white
    ],
)
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette(format: str, transparency: Any, expected: Any, tmp_path: Path) -> None:
    if format == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF does not support partial transparency")
    options = {} if transparency is None else {"transparency": transparency}
    palette(transparency).save(tmp_path / "a", format, **options)
    np.testing.assert_array_equal(decoded(tmp_path / "a"), expected)


def test_transparency(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), grey([[7, 255]]))
    four = np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(four).save(tmp_path / "b.png")
    np.testing.assert_array_equal(decoded(tmp_path / "b.png"), [[[9, 8, 7], [255] * 3, [204] * 3]])
    Image.fromarray(np.array([[3, 5]], np.uint8)).save(tmp_path / "c.png", transparency=5)
    np.testing.assert_array_equal(decoded(tmp_path / "c.png"), grey([[3, 255]]))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.gif"])
def test_one_bit(name: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False, True]])).save(tmp_path / name)
    np.testing.assert_array_equal(decoded(tmp_path / name), grey([[255, 0, 255]]))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame_of_an_animation(name: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decoded(tmp_path / name), grey(np.full((4, 4), 10)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_cut_files_are_found(format: str, tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    path, buffer = tmp_path / "a", io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    path.write_bytes(buffer.getvalue())
    check_readable([path])
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        check_readable([path])


def test_what_follows_the_end_of_a_file_does_no_harm(tmp_path: Path) -> None:
    """Phones append videos and thumbnails to image files."""
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes() + bytes(1000))
    check_readable([path])


def test_many_unreadable_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path in paths:
        path.write_bytes(zlib.compress(b"no picture"))
    with pytest.raises(
        ValueError, match=r"9 of 9 images .*0\.png.*4\.png: .*; \.\.\. \(9 in all\)\. Remove or replace them"
    ):
        check_readable(paths)


def test_plain_pictures_keep_their_pixels() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(as_rgb(Image.fromarray(pixels))), pixels)
