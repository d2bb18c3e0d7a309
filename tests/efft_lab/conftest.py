"""Make the tiny models of the library's tests available to the tests of the experiment code."""

from tests.efft.conftest import _one_thread, adapted_vit, images, randomize, saved, tiny_vit, unchanged

__all__ = ["_one_thread", "adapted_vit", "images", "randomize", "saved", "tiny_vit", "unchanged"]
