"""What the tests share: a tiny shop, the toy set, one-line errors, and runs that are killed."""

import contextlib
import itertools
import os
import shlex
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the tests expect a CPU

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bgbias


def write_image(path, rng, size=(40, 32), mode="RGB"):
    """A random picture, coarse enough to survive JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.BICUBIC).convert(mode).save(path)


def write_shop(folder, classes=9, photos=4, size=(40, 32), suffix="jpg"):
    """folder/shop/{images,masks,backgrounds}, complete: bgbias.py needs no flag but --dataset.
    Returns `folder`."""
    rng, digits = np.random.default_rng(0), len(str(classes - 1))
    for label, i in itertools.product(range(classes), range(photos)):
        name = f"c{label:0{digits}}/p{i}"
        write_image(folder / f"shop/images/{name}.{suffix}", rng, size)
        write_image(folder / f"shop/masks/{name}.png", rng, size, mode="L")
    for split, i in itertools.product(("val", "test"), range(3)):
        write_image(folder / f"shop/backgrounds/{split}/b{i}.{suffix}", rng, (50, 40))
    return folder


@pytest.fixture
def shop(tmp_path):
    """tmp_path with the folder shop/ of 9 classes x 4 photos, their masks and 2 x 3 backgrounds."""
    return write_shop(tmp_path)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The folder of the toy set, drawn once for all tests."""
    return bgbias.make_toy(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def one_thread():
    """Sums depend on the number of threads, and a small network is faster with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def failure(capsys):
    """failure(flags): the one line on stderr of a command that ends with exit code 2. The flags are
    a string, as in a shell, or a list; `main` can be another script's."""
    def run(flags, main=bgbias.main):
        flags = shlex.split(flags) if isinstance(flags, str) else [*map(str, flags)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            bgbias.command(lambda: main(flags))
        assert ended.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line
    return run


class Killed(BaseException):
    """The scripts have no handler for it, just as kill -9 leaves them no time for one."""


@contextlib.contextmanager
def die_at(owner, name, call):
    """Dies in that call, from 1, of owner.name: `with die_at(Path, "replace", 3): main(flags)`."""
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dying)
        yield
