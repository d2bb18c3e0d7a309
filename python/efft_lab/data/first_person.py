"""Draw first-person views of a 3-D world: levels of the game Freedoom, rendered by the engine ViZDoom.

The task ``doom-distance`` replaces VTAB's DMLab. The camera of each view is at the position of an object in the level
and looks in a random direction. The class is the distance of the surface in the center of the view, as given by the
engine's depth buffer. The training pool shows levels with odd numbers, and the test set shows levels with even numbers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efft_lab.data.splits import distinct, pixel_keys

SIZE = 64  # pixels, height and width
EDGES = (
    6.0,
    9.0,
    13.5,
    20.0,
    30.0,
    45.0,
    68.0,
)  # edges of the classes in units of the depth buffer; each edge is about 1.5 times the previous one
LEVELS = 32  # number of levels of Freedoom, phase 2
_FACTOR = 6  # height and width of the engine's images relative to SIZE; averaging them avoids aliasing
_SPOT = 20  # height and width of the center region in pixels of the large image
_EVEN = 0.12  # maximum range of the depth in the center region, relative to its median
_DARKEST = 20.0  # minimum mean brightness (maximum 255)
_PER_PLACE = 6  # number of views tried from every position
_TRIED = 6  # number of views tried per required view: two thirds are rejected, and class sizes differ

Views = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]  # [n, 64, 64, 3], depths [n]


def vizdoom() -> Any:
    """Import and return ViZDoom. If it is missing, the error explains how to install it."""
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("this task's images are drawn by vizdoom: pip install 'efft-kernels[render]'") from error
    return vizdoom


def levels(test: bool) -> range:
    """Return the numbers of the levels of the training pool or of the test set."""
    return range(2 if test else 1, LEVELS + 1, 2)


def draw(n: int, test: bool, rng: np.random.RandomState) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draw n views with equally frequent classes. Return the images, uint8 [n, 64, 64, 3], and their labels [n].

    Raises:
        RuntimeError: The levels do not have enough views of a class.
    """
    places = -(-_TRIED * n // (_PER_PLACE * len(levels(test))))
    views = [collect(level, places, rng) for level in levels(test)]
    images, depth = (np.concatenate(parts) for parts in zip(*views, strict=True))
    label = np.digitize(depth, EDGES) - 1
    kept = distinct(pixel_keys(images), label)  # two views may have the same direction
    images, label = images[kept], label[kept]
    classes = len(EDGES) - 1
    chosen = []
    for c, share in enumerate(np.bincount(np.arange(n) % classes, minlength=classes).tolist()):
        candidates = rng.permutation(np.flatnonzero(label == c))
        if len(candidates) < share:
            raise RuntimeError(f"expected {share} views of class {c}, the levels gave {len(candidates)}")
        chosen.append(candidates[:share])
    order = rng.permutation(np.concatenate(chosen))
    return images[order], label[order].astype(np.int64)


def collect(level: int, most: int, rng: np.random.RandomState) -> Views:
    """Draw views from the positions of at most ``most`` objects of a level.

    Return the images of the accepted views, uint8 [n, 64, 64, 3], and the depths in their centers [n].
    """
    images, depths = [], []
    with _running(level) as game:
        places = sorted({(round(o.position_x), round(o.position_y)) for o in game.get_state().objects})
        for x, y in (places[k] for k in rng.permutation(len(places))[:most].tolist()):
            game.send_game_command(f"warp {x} {y}")
            for turn in rng.randint(1, 360, _PER_PLACE).tolist():
                game.make_action([turn], 2)
                state = game.get_state()
                if state is None:
                    raise RuntimeError(
                        f"level {level} ended when the player was moved to {x}, {y}, but no position should end it"
                    )
                view = _judge(state.screen_buffer, state.depth_buffer)
                if view is not None and abs(state.game_variables - (x, y)).max() < 1:
                    images.append(view[0])
                    depths.append(view[1])
    return np.array(images, np.uint8).reshape(-1, SIZE, SIZE, 3), np.array(depths)


def _judge(screen: npt.NDArray[np.uint8], depth: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], float] | None:
    """Return the view, uint8 [64, 64, 3], and the depth in its center.

    Return None if the view is too dark, or if the depth varies too much in the center or is outside of the classes.
    """
    height, width = depth.shape
    half = _SPOT // 2
    spot = depth[height // 2 - half : height // 2 + half, width // 2 - half : width // 2 + half].astype(float)
    middle = float(np.median(spot))
    if not EDGES[0] <= middle < EDGES[-1] or np.ptp(spot) > max(1.0, _EVEN * middle):
        return None
    left = (width - height) // 2
    square = screen[:, left : left + height].reshape(SIZE, _FACTOR, SIZE, _FACTOR, 3).mean((1, 3))
    if square.mean() < _DARKEST:
        return None
    return np.rint(square).astype(np.uint8), middle


@contextmanager
def _running(level: int) -> Iterator[Any]:
    """Run a level without monsters, in which the player cannot touch any object.

    The engine writes files to the current folder when it starts. The current folder is therefore a temporary one during
    the start.
    """
    engine = vizdoom()
    game = engine.DoomGame()
    game.set_doom_game_path(str(Path(engine.__file__).parent / "freedoom2.wad"))
    game.set_doom_map(f"map{level:02d}")
    game.set_screen_resolution(engine.ScreenResolution.RES_512X384)
    game.set_screen_format(engine.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_objects_info_enabled(True)
    game.set_window_visible(False)
    for part in ("hud", "crosshair", "weapon", "decals", "particles", "messages", "corpses", "screen_flashes"):
        getattr(game, f"set_render_{part}")(False)
    game.set_mode(engine.Mode.PLAYER)
    game.set_seed(1)
    game.set_episode_timeout(0)
    game.set_available_buttons([engine.Button.TURN_LEFT_RIGHT_DELTA])
    game.set_available_game_variables([engine.GameVariable.POSITION_X, engine.GameVariable.POSITION_Y])
    # By default, the game displays a text in the center of the view when the player finds a secret.
    game.add_game_args("-nomonsters -nosound +sv_cheats 1 +cl_showsecretmessage 0 +con_midtime 0")
    with tempfile.TemporaryDirectory() as scratch:
        game.set_doom_config_path(str(Path(scratch) / "vizdoom.ini"))
        here = Path.cwd()
        os.chdir(scratch)
        try:
            game.init()
        finally:
            os.chdir(here)
        try:
            for cheat in ("god", "noclip"):  # the ground does not harm the player, and the player picks up nothing
                game.send_game_command(cheat)
            yield game
        finally:
            game.close()
