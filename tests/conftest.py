"""A tiny shop that the tests share: 9 classes x 4 photos with masks, and two pools of backgrounds."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def write_image(path, rng, size=(40, 32), mode="RGB"):
    """A random picture, coarse enough to survive JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.BICUBIC).convert(mode).save(path)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The folder of the toy set, drawn once for all tests."""
    import bgbias

    return bgbias.make_toy(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def shop(tmp_path):
    """tmp_path with shop/images, shop/masks and data/unsplash_backgrounds/{val,test}."""
    rng = np.random.default_rng(0)
    for label in range(9):
        for i in range(4):
            write_image(tmp_path / f"shop/images/c{label}/p{i}.jpg", rng)
            write_image(tmp_path / f"shop/masks/c{label}/p{i}.png", rng, mode="L")
    for part in ("val", "test"):
        for i in range(3):
            write_image(tmp_path / f"data/unsplash_backgrounds/{part}/b{i}.jpg", rng, (50, 40))
    return tmp_path
