"""Photographs to try a model on: those that scikit-image carries in its package, so that nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from tokenreduce.zoo.examples import Example

__all__ = ["FIX", "photographs"]

FIX = "pip install scikit-image"
#: Files of ``skimage/data`` in its wheels, with what is seen. All are free; the README.txt there says whose they are.
FILES = {
    "astronaut.png": "an astronaut", "coffee.png": "a cup of coffee", "chelsea.png": "a cat", "rocket.jpg": "a rocket",
    "motorcycle_left.png": "a motorcycle", "camera.png": "a man with a camera", "coins.png": "coins",
    "hubble_deep_field.jpg": "galaxies", "retina.jpg": "a retina", "brick.png": "a brick wall", "grass.png": "grass",
    "gravel.png": "gravel",
}  # fmt: skip
#: Longest side that is kept: none of the models looks at more.
LONGEST = 640


@functools.cache
def photographs(n: int = len(FILES)) -> tuple[Example, ...]:
    """The first ``n`` photographs that are there, as RGB of at most 640 pixels; () without scikit-image.

    ``Example.truth`` says what is seen. scikit-image itself is not imported.
    """
    from tokenreduce.common.images import open_picture

    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        return ()
    folder = Path(found.origin).parent / "data"
    made: list[Example] = []
    for name, truth in FILES.items():
        if len(made) < n and (folder / name).is_file():  # which of them a wheel carries differs between versions
            image = open_picture(folder / name)
            image.thumbnail((LONGEST, LONGEST))
            made.append(Example(truth, image))
    return tuple(made)
