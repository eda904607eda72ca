"""What the tests share: a tiny shop, the toy set, one-line errors, and runs that are killed."""

import contextlib
import itertools
import json
import math
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
    """A random picture, coarse enough to survive JPEG; of mode L, a mask with a soft box in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    if mode == "L":
        top, left = rng.integers(0, (4, 5))
        coarse = np.pad(coarse[..., 0] // 2 + 128, ((top, 4 - top), (left, 5 - left)))
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(path)


def write_shop(folder, classes=9, photos=4, size=(40, 32), suffix="jpg"):
    """folder/shop/{images,masks,backgrounds}, complete: bgbias.py needs no flag but --dataset. Returns `folder`."""
    rng, digits = np.random.default_rng(0), len(str(classes - 1))
    for label, i in itertools.product(range(classes), range(photos)):
        name = f"c{label:0{digits}}/p{i}"
        write_image(folder / f"shop/images/{name}.{suffix}", rng, size)
        write_image(folder / f"shop/masks/{name}.png", rng, size, mode="L")
    for split, i in itertools.product(("val", "test"), range(3)):
        write_image(folder / f"shop/backgrounds/{split}/b{i}.{suffix}", rng, (50, 40))
    return folder


def slow_removal(image, mask):
    """bgbias.remove_object() of one photo (3, S, S) and its mask (S, S): at half the resolution, the mean of the
    background, then Gaussian blurs of it, each in proportion to how much of it they see, and fully from a tenth on."""
    size, margin, half = len(mask), max(1, len(mask) // 64), (len(mask) + 1) // 2
    padded = np.pad(mask, margin)
    keep = np.array([[padded[y:y + 2 * margin + 1, x:x + 2 * margin + 1].max() < 0.1 for x in range(size)]
                     for y in range(size)])
    spans = [slice(2 * i, 2 * i + 2) for i in range(half)]  # the last one has one pixel if the size is odd
    *known, share = ([[plane[y, x].mean() for x in spans] for y in spans] for plane in [*image * keep, keep])
    known, share, fill = np.array(known), np.array(share), np.empty((3, half, half), np.float32)
    for y, x in np.ndindex(half, half):
        colour = known.sum((1, 2)) / max(share.sum(), 1e-9)  # black if there is no background
        for sigma in (half - 1) / np.array([4, 10, 24, 64]):
            weights = np.outer(*(np.exp(-((np.arange(half) - centre) / sigma) ** 2 / 2) for centre in (y, x)))
            if seen := (weights * share).sum():
                blurred = (weights * known).sum((1, 2)) / seen
                colour = colour + min(1, 10 * seen / weights.sum()) * (blurred - colour)
        fill[:, y, x] = colour
    enlarged = [Image.fromarray(plane).resize((size, size), Image.BILINEAR) for plane in fill]
    return np.where(keep, image, np.stack(enlarged))


def pixels_of(file, size):
    """A photo or mask as the test sees it, resized and cropped at the centre by Pillow: (channels, S, S) float."""
    picture = Image.open(file)
    scale = round(size * 256 / 227) / min(picture.size)
    picture = picture.resize([int(n * scale) for n in picture.size], Image.BILINEAR)
    left, top = (round((n - size) / 2) for n in picture.size)
    picture = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32)
    return torch.from_numpy(np.atleast_3d(picture).transpose(2, 0, 1).copy())


def versions_of(images, masks):
    """{condition: the photos of the test, (N, 3, S, S)} for those without another photo's background."""
    removed = torch.stack([torch.tensor(slow_removal(image.numpy(), mask[0].numpy())).float()
                           for image, mask in zip(images, masks)])
    paint = torch.tensor((124, 116, 104))[:, None, None]
    return {"clean": images, "pasted": images * masks + removed * (1 - masks),
            "object_only": images * masks + paint * (1 - masks), "background_only": removed}


def scaled(pixels, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """The input of a network, by default with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(values, dtype=pixels.dtype)[:, None, None] for values in (mean, std))
    return (pixels / 255 - mean) / std


def naive_query_metrics(embeddings, labels, ks, gallery=None, ignored=None):
    """bgbias.query_metrics(): one query, one neighbour at a time, in float64; of equally near items the wrong ones come
    first. {metric: [value of each query]}."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    gallery = embeddings if gallery is None else np.asarray(gallery, dtype=np.float64)
    labels, rows = np.asarray(labels).tolist(), []
    for q in range(len(labels)):
        others = [i for i in range(len(labels)) if i != q and (ignored is None or i != ignored[q])]
        R = sum(labels[i] == labels[q] for i in others)
        if R == 0:
            rows.append(dict.fromkeys(["map@r", "r_precision", *(f"recall@{k}" for k in ks)], math.nan))
            continue
        squares = ((gallery - embeddings[q]) ** 2).sum(axis=1)
        ranked = sorted((squares[i], labels[i] == labels[q]) for i in others)
        right = [r for _, r in ranked]
        precision = [sum(right[: i + 1]) / (i + 1) for i in range(R)]
        row = {"map@r": sum(p for p, r in zip(precision, right) if r) / R, "r_precision": sum(right[:R]) / R}
        rows.append(row | {f"recall@{k}": float(any(right[:k])) for k in ks})
    return {name: [row[name] for row in rows] for name in rows[0]}


def naive_metrics(embeddings, labels, ks, gallery=None, ignored=None):
    """bgbias.retrieval_metrics(): the means over the queries that have a right item."""
    values = naive_query_metrics(embeddings, labels, ks, gallery, ignored)
    return {name: mean_of(column) for name, column in values.items()}


def mean_of(values):
    """The mean of the numbers that are not nan; nan if there are none."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def result(run):
    """What is in the result.json of a run folder."""
    return json.loads((run / "result.json").read_text())


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
