"""Draw the images of the task ``font-letters``: three capital letters in one of many fonts.

The class is the letter in the middle. The task resembles SVHN, in which the class is one digit of a house number. The
letters and the background have two random colors, and the letters are rotated, shifted and scaled at random. The test
set and the training pool use different font families. Pillow reads only the font files, and no code from their packages
is executed.
"""

from __future__ import annotations

import io
import re
import string
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efft_lab.data.fetch import Archive, fetch_archive
from efft_lab.data.pictures import pillow

LETTERS = string.ascii_uppercase
SIZE = 64  # pixels, height and width
_FACTOR = 3  # height and width of the drawn images relative to SIZE; averaging them gives smooth edges
_CONTRAST = 0.3  # minimum difference in brightness between letter and background
_CLIENTS = 4  # number of simultaneous downloads
_FACE = re.compile(r"package/files/[a-z0-9-]+-latin-(400|700)-(normal|italic)\.woff")


def _archive(family: str, sha256: str, size: int) -> Archive:
    return Archive("npm", f"@fontsource/{family}", "5.3.0", sha256, size)


TRAIN = (
    _archive("abril-fatface", "261304489f1ad9509af041947230865e79ae1e7c75c330b75d42d67a5c4a8aff", 54_881),
    _archive("alfa-slab-one", "9a23f35cd084f78793d3375618def5b8a56251df4191edce109a7738b54148b0", 89_461),
    _archive("anton", "796d0b1b7a503636458c0869ef9993659411c86443a4e4e7555ead4b29293db4", 115_630),
    _archive("barlow-condensed", "759fcdd25df64b4ef41653808d849cdb9ba0a520999032ceb137ce035a17e2ea", 1_430_864),
    _archive("bebas-neue", "57928e0ee30b9e8a99033cdd5dc74ad06761007b4ad8fc32173e5d9072ba91fa", 47_974),
    _archive("cinzel", "b80629f715b4603fd099c0ceaa94cc7a15308a75a9cf52f0613a312ee6d53c28", 294_069),
    _archive("comfortaa", "5c82d14fe6efc746213748a2835b7aa7b6e07409f1611eaee52eb25e0bdfcca6", 555_170),
    _archive("cormorant-garamond", "7b6b3f770ae98dcef57acf5a24af08904cadd14f34beef58cf0248c06ae93cc7", 1_784_339),
    _archive("dancing-script", "e392efa74afec672f1c97f8699a16bb8439c8aca1a367ddb5cd035f11e70e31a", 391_335),
    _archive("fira-mono", "f33fe653fa622c4fc5b179c6649e37c6f44ff46067377de9a948cdc486863ba3", 404_704),
    _archive("lato", "50db251f16e9a6c35fe0177b4692b7ec78478b9734c9272d980a75343638aa5c", 490_999),
    _archive("lora", "3f2e66b0934b8652bb1a37645a9fc3e77e83b5841a09e97174e7bb11e11063c9", 1_653_508),
    _archive("old-standard-tt", "21aa9a282a2d5643bb538da8886d69283aeed096d81d31ebc81fd84230564878", 477_545),
    _archive("orbitron", "a9b5e98a3421cd897d7bc0c1d8683579d07191e03090913381daebbbe735f492", 93_070),
    _archive("pacifico", "397f4f0a8a4c44e929cafa4cfede7240f7ac81a922f6779d3fefe2192c67d619", 231_921),
    _archive("playfair-display", "564e61951ecc3e962793cd50395f718cda6350cb934f9000dbe0139c768dc023", 1_438_428),
    _archive("poppins", "f4779bb12acaaa07dc7dd8da82ab0f61515fea2f30664535f7a249eeb0dd5bcf", 2_325_037),
    _archive("quicksand", "237b3cc84bf92c235e17f11fcb54e8a889efeaed9a7bff4bacce8cb422e0a403", 393_800),
    _archive("raleway", "d5dc5cb4563286e45c5b832b0718fa36d84148405cf6f5d1903615a74d253ea8", 2_494_226),
    _archive("vt323", "aca9d83456bcebf445920008ac46e275206d48efd8360eb9cc4c6a04d45bcaf0", 72_807),
)
TEST = (
    _archive("caveat", "ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293", 1_241_035),
    _archive("dm-serif-display", "ddfb21109ee8a7c82703527f1f2df378511d0d5161410eb345bb4a893c9fca4c", 137_292),
    _archive("exo-2", "82ef50ecfba884505fc37362224db4c453ffd81956354436aac491938dec83b5", 2_167_279),
    _archive("josefin-sans", "a89f83ae9d414f027af83546b84e09ac81e960024dfdeea3bcb491e8ed52a962", 862_053),
    _archive("kalam", "0aaf22523f3c57ae19f32c4f4df0d43d6efd01b7563a19cf4ed818cd5601426d", 720_217),
    _archive("libre-baskerville", "5e1a5fe2e28c4269112aa33ff46f80034551d2a9820b2d002afe3305fa8e1ea4", 811_084),
    _archive("lobster", "4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7", 214_571),
    _archive("oswald", "27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb", 565_176),
    _archive("press-start-2p", "7aa0c201772e5099e713f99ce4117c56ebdda85cb4d95b81f22922c13f655e37", 68_994),
    _archive("space-mono", "e0cd78cb7aa93e772905297d8d5ad2a3d9eea7a6a12f281a3940a28ec01c19eb", 293_964),
)


def draw(n: int, labels: npt.NDArray[np.int64], faces: Sequence[Any], rng: np.random.RandomState) -> Any:
    """Draw images of letters, uint8 [n, 64, 64, 3].

    Args:
        n: Number of images.
        labels: Index of the letter in the middle, [n].
        faces: Fonts from :func:`load_faces`. Each image uses one of them at random.
        rng: Random generator for everything except the labels.
    """
    return np.stack([_draw_one(int(labels[k]), faces[rng.randint(len(faces))], rng) for k in range(n)])


def load_faces(archives: Sequence[Archive]) -> list[Any]:
    """Load font families as Pillow fonts, with one font for each available combination of weight and style.

    The weights are regular and bold, and the styles are upright and italic. Archives that are not in the cache are
    downloaded. All archives are deleted after they have been read.
    """
    with ThreadPoolExecutor(_CLIENTS) as pool:
        files = list(pool.map(fetch_archive, archives))
    faces = [face for file in files for face in _faces(file)]
    for file in files:
        file.unlink(missing_ok=True)
    return faces


def _faces(file: Path) -> list[Any]:
    from PIL import ImageFont

    with tarfile.open(file) as tar:
        names = sorted(name for name in tar.getnames() if _FACE.fullmatch(name))
        if not names:
            raise RuntimeError(
                f"{file} holds no Latin face of weight 400 or 700: expected files like *-latin-400-normal.woff"
            )
        data = [file.read() for file in map(tar.extractfile, names) if file is not None]
    # The basic layout engine needs only FreeType. Its results are therefore the same on every machine.
    return [ImageFont.truetype(io.BytesIO(d), 24 * _FACTOR, layout_engine=ImageFont.Layout.BASIC) for d in data]


def _draw_one(label: int, face: Any, rng: np.random.RandomState) -> npt.NDArray[np.uint8]:
    middle = LETTERS[label]
    left, right = (LETTERS[k] for k in rng.randint(len(LETTERS), size=2))
    ink, ground = _colors(rng)
    side = SIZE * _FACTOR
    box = face.getbbox(middle)
    height = max(box[3] - box[1], box[2] - box[0])
    font = face.font_variant(size=max(8, round(face.size * rng.uniform(0.45, 0.7) * side / height)))
    mask = pillow().new("L", (side, side))
    _write(mask, (left, middle, right), font)
    shift = rng.uniform(-0.08, 0.08, 2) * side
    mask = mask.rotate(
        rng.uniform(-15, 15), resample=pillow().Resampling.BICUBIC, translate=(round(shift[0]), round(shift[1]))
    )
    share = np.asarray(mask, np.float64).reshape(SIZE, _FACTOR, SIZE, _FACTOR).mean((1, 3))[:, :, None] / 255
    place = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    slope = rng.uniform(-0.2, 0.2, 2)
    shade = slope[0] * place[None, :, None] + slope[1] * place[:, None, None]
    image = ground * (1 - share) + ink * share + shade
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def _write(mask: Any, letters: Sequence[str], font: Any) -> None:
    """Draw three letters next to each other in a mask.

    The second letter is in the middle of the mask and does not touch the others.
    """
    from PIL import ImageDraw

    pen, side = ImageDraw.Draw(mask), mask.width
    boxes = [font.getbbox(letter) for letter in letters]
    x, y = side / 2 - (boxes[1][0] + boxes[1][2]) / 2, side / 2 - (boxes[1][1] + boxes[1][3]) / 2
    gap = 0.06 * side
    before = x + boxes[1][0] - gap - boxes[0][2]
    after = x + boxes[1][2] + gap - boxes[2][0]
    for letter, start in zip(letters, (before, x, after), strict=True):
        pen.text((round(start), round(y)), letter, fill=255, font=font)


def _colors(rng: np.random.RandomState) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    while True:
        ink, ground = rng.uniform(0, 1, (2, 3))
        if abs(ink.mean() - ground.mean()) >= _CONTRAST:
            return ink, ground
