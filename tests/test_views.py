"""One geometry for photo and mask, replacement by hand, torchvision on PIL images as referee."""

import re
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import bgbias
from bgbias import (
    Batches, Embedder, MPerClassSampler, Photos, UserError, loader, random_view, replace_background,
    seed_of, views)

SIZE, SHORT = 40, 45  # of the crops; of the resized photos, 40 * 256 / 227
AUTHORS_TRAIN = transforms.Compose([  # on PIL images, with the paper's numbers
    transforms.RandomResizedCrop(SIZE, scale=(0.16, 1), ratio=(0.75, 1.33)),
    transforms.RandomHorizontalFlip(0.5)])


def picture(width, height, seed=0):
    """A photo with large shapes and some noise, as (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    coarse = np.asarray(coarse.resize((width, height), Image.BICUBIC))
    return (coarse + rng.normal(0, 12, coarse.shape)).clip(0, 255).astype(np.uint8)


def save(folder, arrays):
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(len(arrays))]
    for path, array in zip(paths, arrays):
        Image.fromarray(array).save(path)
    return paths


# Wide, tall, odd, and to be enlarged.
SIZES = [(90, 60), (60, 90), (61, 61), (47, 130), (200, 33), (30, 30)]


@pytest.fixture
def album(tmp_path):
    """Photos of several shapes; the mask of each is its own green channel."""
    photos = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    return save(tmp_path / "images", photos), save(tmp_path / "masks", [p[:, :, 1] for p in photos])


# ---- Decoding, crops and flips -------------------------------------------------------------------


def test_decoding_and_evaluation_crops_against_torchvision_on_pil(album):
    resize, crop = transforms.Resize(SHORT), transforms.CenterCrop(SIZE)
    photos, cropped = Photos(*album, SIZE), evaluation(Photos(*album, SIZE), labels=[7, 7, 9, 2, 2, 2])[0]
    assert cropped[0].shape == (len(SIZES), 4, SIZE, SIZE) and cropped[2].tolist() == [7, 7, 9, 2, 2, 2]
    for path, photo, view in zip(album[0], photos, cropped[0], strict=True):
        resized = resize(Image.open(path))
        for found, expected in ((photo, resized), (view, crop(resized))):
            expected = transforms.functional.pil_to_tensor(expected)
            assert found.dtype == torch.uint8 and found.shape == (4, *expected.shape[1:])
            assert (found[:3].int() - expected.int()).abs().max() <= 1
            assert torch.equal(found[3], found[1])  # the mask is the green channel
        assert min(photo.shape[1:]) == SHORT
    assert round(256 / 227 * 227) == Photos([], None, 227).short_side  # the paper's numbers


def test_random_view_against_torchvision_on_pil():
    """The same seed draws the same crop and flip; only 8-bit rounding may differ."""
    array = picture(90, 60)
    photo, worst = torch.from_numpy(array).permute(2, 0, 1), 0
    for seed in range(60):
        torch.manual_seed(seed)
        view = random_view(photo, SIZE)
        torch.manual_seed(seed)
        expected = transforms.functional.pil_to_tensor(AUTHORS_TRAIN(Image.fromarray(array)))
        assert view.shape == (3, SIZE, SIZE)
        worst = max(worst, (view.int() - expected.int()).abs().max().item())
    assert worst <= 2


def test_photo_and_mask_take_one_geometry(album):
    """The mask is the green channel, and remains it, whatever crop and flip follow."""
    for photo, without_mask in zip(Photos(*album, SIZE), Photos(album[0], None, SIZE), strict=True):
        assert torch.equal(photo[3], photo[1]) and torch.equal(photo[:3], without_mask)
        torch.manual_seed(0)
        crops = [random_view(photo, SIZE) for _ in range(20)]
        assert all(torch.equal(crop[3], crop[1]) for crop in crops)
        assert len({crop.numpy().tobytes() for crop in crops}) > 4  # few fit in a very wide photo
    crops, backgrounds, _ = training(Photos(*album, SIZE), [0] * 20, draws=0)[0]
    assert len({crop.numpy().tobytes() for crop in crops}) == 20 and backgrounds.shape == (0, 20, 3, SIZE, SIZE)
    assert torch.equal(crops[:, 3], crops[:, 1])


@pytest.fixture
def decoded(monkeypatch):
    """Grows by the path of every photo and mask that is opened."""
    opened = []
    for name in ("open_rgb", "open_mask"):
        real = getattr(bgbias, name)
        monkeypatch.setattr(bgbias, name, lambda path, real=real: opened.append(path) or real(path))
    return opened


def test_photos_are_decoded_once_as_many_as_fit_in_memory(album, decoded, monkeypatch, capsys):
    """The rest are the same, but decoded on every access, and one line says so. So are the photos
    of the test, which are used only once."""
    complete = Photos(album[0] * 20, album[1] * 20, SIZE)
    assert len(complete) == len(complete.kept) == 120 and capsys.readouterr().out == ""
    assert Counter(decoded) == dict.fromkeys(album[0] + album[1], 20)
    free = iter([0.9, 0.5, 0.11, 0.1, 0.09, 0.5, 0.5])  # a tenth remains free
    monkeypatch.setattr(bgbias, "free_memory", lambda: next(free))
    partly, none_kept = Photos(*album, SIZE), Photos(*album, SIZE, keep=False)
    said = capsys.readouterr().out
    assert len(partly) == 6 and len(partly.kept) == 4
    assert "4 of 6" in said and said.count("\n") == 1
    decoded.clear()
    assert all(torch.equal(complete[i], partly[i]) for i in (0, 1, 2, 3, 4, 5, 5))
    assert decoded == [files[i] for i in (4, 5, 5) for files in album]
    assert torch.equal(none_kept[0], complete[0]) and decoded[6:] == [album[0][0], album[1][0]]


def test_nothing_is_decoded_ahead_when_memory_is_short(album, decoded, monkeypatch):
    """Otherwise the photos that wait to be taken would fill it."""
    fast = bgbias.open_rgb
    monkeypatch.setattr(bgbias, "open_rgb", lambda path: time.sleep(0.01) or fast(path))
    monkeypatch.setattr(bgbias, "free_memory", lambda: 0.0)
    assert Photos(album[0] * 100, None, SIZE).kept == [] and len(decoded) < 600


def test_free_memory_by_hand(monkeypatch):
    meminfo = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  2000 kB\n"
    monkeypatch.setattr(bgbias.Path, "read_text", lambda path: meminfo)
    assert bgbias.free_memory() == 0.25


# ---- Masks ---------------------------------------------------------------------------------------

SOFT = np.tile(np.arange(90, dtype=np.uint8) * 2, (60, 1))  # as large as the first photo
GREY = Image.fromarray(SOFT)
NO_MASKS = {
    **{f"values {low} and {high}": Image.fromarray(np.where(SOFT < 90, low, high).astype(np.uint8))
       for low, high in ((0, 1), (0, 5), (1, 3), (0, 127))}, "alpha": GREY.convert("LA"), "RGBA": GREY.convert("RGBA"),
    "palette": GREY.quantize(4), "coloured": Image.merge("RGB", (GREY, GREY, Image.fromarray(255 - SOFT))),
    "16 bits": Image.fromarray(SOFT.astype(np.uint16) * 257), "float": Image.fromarray(SOFT / np.float32(178))}
MASKS = {"soft": (GREY, SOFT), "grey RGB": (GREY.convert("RGB"), SOFT),
         "1-bit": (Image.fromarray(SOFT >= 128), 255 * (SOFT >= 128)),
         "dark": (Image.fromarray(SOFT // 100 * 128), SOFT // 100 * 128),
         "black": (Image.fromarray(0 * SOFT), 0 * SOFT), "white": (Image.fromarray(0 * SOFT + 255), 0 * SOFT + 255)}


@pytest.mark.parametrize("name", NO_MASKS)
def test_what_is_no_mask_is_refused_by_its_path(album, name):
    NO_MASKS[name].save(album[1][0], "TIFF" if name == "float" else "PNG")
    with pytest.raises(UserError, match=f"^{album[1][0]}: "):
        Photos(*album, SIZE, keep=False)[0]


@pytest.mark.parametrize("name", MASKS)
def test_what_is_a_mask(album, name):
    image, expected = MASKS[name]
    image.save(album[1][0])
    mask = np.asarray(bgbias.open_mask(album[1][0]))
    assert mask.dtype == np.uint8 and (mask == expected).all()
    assert Photos(*album, SIZE)[0].shape == (4, SHORT, 67)


# Masks of 400 pixels: how many are white, how many light grey, how many dark grey; and whether they
# are nearly empty (less than 1 %), nearly full (more than 99 %), fuzzy (more than 15 % are grey).
FAULTS = {(4, 0, 0): "", (3, 0, 0): "empty", (0, 3, 0): "empty", (0, 4, 0): "", (0, 0, 0): "empty",
          (396, 0, 0): "", (397, 0, 0): "full", (0, 0, 60): "empty", (4, 0, 60): "", (4, 0, 61): "fuzzy",
          (4, 61, 0): "fuzzy", (100, 30, 31): "fuzzy", (350, 50, 0): "full", (339, 61, 0): "full fuzzy"}


def mask_of(white, light, dark, edges=(229, 26)):
    """10 % of 255 is 25.5, 90 % is 229.5."""
    pixels = [255] * white + [edges[0]] * light + [edges[1]] * dark
    return Image.fromarray(np.uint8(pixels + [0] * (400 - len(pixels))).reshape(20, 20))


@pytest.mark.parametrize("counts", FAULTS)
def test_faults_of_a_mask_by_hand(counts):
    *faults, share = bgbias.mask_faults(mask_of(*counts))
    assert [name for name, fault in zip(("empty", "full", "fuzzy"), faults) if fault] == FAULTS[counts].split()
    assert share == sum(counts[:2]) / 400
    assert not bgbias.mask_faults(mask_of(*counts, edges=(230, 25)))[2]  # nearly white and nearly black


def splits_of(folder, images):
    """Splits with those masks, the first of them for training."""
    folder.mkdir()
    masks = save(folder / "masks", [np.asarray(image) for image in images])
    photos = save(folder / "images", [picture(*image.size) for image in images])
    return {"train": bgbias.Split(photos[:1], masks[:1], [0]), "test": bgbias.Split(photos[1:], masks[1:], [1] * 4)}


def test_summary_of_the_masks_by_hand(tmp_path, capsys):
    """Shares of 0, 50, 54, 75 and 100 %: the median is 54 %; of five, three may not be empty or full."""
    images = [mask_of(*counts) for counts in ((0, 0, 0), (200, 0, 0), (146, 70, 0), (300, 0, 70), (400, 0, 0))]
    bgbias.check_masks(splits_of(tmp_path / "fine", images))
    line, = capsys.readouterr().out.splitlines()
    assert re.findall(r"\d+ ?%?", line) == ["54%", "1 ", "5 ", "1 ", "2 "]
    images[2] = mask_of(397, 0, 0)
    with pytest.raises(UserError, match="^masks: "):
        bgbias.check_masks(splits_of(tmp_path / "most", images))
    assert re.findall(r"\d+ ?%?", capsys.readouterr().out) == ["75%", "1 ", "5 ", "2 ", "1 "]


@pytest.mark.parametrize("name", ["images/c0/p1.jpg", "images/c8/p3.jpg", "masks/c0/p1.png", "masks/c8/p3.png"])
@pytest.mark.parametrize("fault", ["size", "turned", "text"])
def test_photos_and_masks_are_compared_before_a_run_begins(shop, failure, name, fault):
    """Of testing (c8) before the run folder is written, of training (c0) before the training."""
    path, exif = shop / "shop" / name, Image.Exif()
    exif[0x0112] = 6
    if fault == "text":
        path.write_text("<html>404</html>")
    else:
        image = Image.open(path)
        image.resize((32, 40) if fault == "size" else image.size).save(path, exif=exif if fault == "turned" else b"")
        path = shop / "shop" / name.replace("images", "masks").replace("jpg", "png")
    line = failure(f"--dataset {shop}/shop --runs {shop}/runs --backbone smallconv --weights none --device cpu")
    assert line.startswith(f"error: {path}: ")
    assert not [*shop.glob("runs/*/*.pt")] and ("c0" in name or not (shop / "runs").exists())


# ---- Batches -------------------------------------------------------------------------------------

# Backgrounds of one colour each tell which of the pool was drawn.
POOL = [torch.full((3, 50 + i, 60), 20 * i, dtype=torch.uint8) for i in range(12)]


class Listed:
    """A sampler of given batches; the number of the batch is the last of its seed's."""

    def __init__(self, *lists):
        self.lists = lists

    def batch(self, seed):
        return self.lists[seed[-1]]


def training(photos, *lists, pool=POOL, draws=2, seed=(1, 2)):
    """The label of a photo is its index."""
    return Batches(photos=photos, labels=range(len(photos)), size=SIZE, seed=seed, pool=pool,
                   draws=draws, sampler=Listed(*lists))


def evaluation(photos, labels=None, pool=POOL, draws=2, seed=(1, 2)):
    """The label of a photo is its index, if none are given."""
    return Batches(photos=photos, labels=labels or range(len(photos)), size=SIZE, seed=seed, pool=pool,
                   draws=draws)


def same(a, b):
    return all(map(torch.equal, a, b))


def test_training_batches_hold_the_photos_of_the_sampler():
    """Photos of one colour each stay that, however they are cropped."""
    photos = [torch.full((4, 50, 60 + i), 10 * i, dtype=torch.uint8) for i in range(6)]
    batches = training(photos, [0, 3], [5, 1, 1])
    for n, rows in enumerate([[0, 3], [5, 1, 1]]):
        found, backgrounds, labels = batches[n]
        assert labels.tolist() == rows
        assert torch.equal(found, 10 * labels.byte()[:, None, None, None].expand(-1, 4, SIZE, SIZE))
        assert backgrounds.shape == (2, len(rows), 3, SIZE, SIZE)
        assert found.dtype == backgrounds.dtype == torch.uint8


def test_the_sampler_is_asked_for_batch_n_of_this_seed():
    labels = np.repeat(range(5), 4)
    photos = [torch.zeros(4, SIZE, SIZE, dtype=torch.uint8)] * len(labels)
    sampler = MPerClassSampler(labels, 2, 8)
    batches = Batches(photos=photos, labels=labels, size=SIZE, seed=(3, 1), sampler=sampler)
    asked = [sampler.batch((3, 1, n)) for n in range(6)]
    assert [[index for index, _ in batches.plan(n)] for n in range(6)] == asked
    assert len(set(map(str, asked))) == 6


@pytest.mark.parametrize("make", [
    lambda photos, **options: training(photos, [0] * 12, **options),
    lambda photos, **options: evaluation([photos[0]] * 12, **options)])
def test_backgrounds_are_drawn_with_replacement_and_evenly(album, make):
    _, backgrounds, _ = make(Photos(*album, SIZE), draws=100)[0]
    assert (backgrounds.amin((2, 3, 4)) == backgrounds.amax((2, 3, 4))).all()
    drawn = backgrounds[:, :, 0, 0, 0] // 20  # (draws, B), 100 +- 10 of each
    count = drawn.flatten().bincount(minlength=12)
    assert len(count) == 12 and 60 < count.min() and count.max() < 140
    assert any(len(row.unique()) < 12 for row in drawn) and len(drawn.unique(dim=0)) == 100


def test_backgrounds_take_the_training_transform_in_evaluation_too(album):
    """Of a ramp, views tell how wide the crop was and whether it is flipped."""
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 60, 60)
    _, backgrounds, _ = evaluation([Photos(*album, SIZE)[0]], pool=[ramp], draws=400)[0]
    left, right = backgrounds[:, 0, 0, 0, 0].int(), backgrounds[:, 0, 0, 0, -1].int()
    assert 160 < (left > right).sum() < 240  # 200 +- 10
    widths = (left - right).abs() / 240
    assert 0.3 < widths.min() < 0.4 and 0.9 < widths.max() <= 1  # area from 0.16, ratio from 3:4


def test_replacing_backgrounds_changes_nothing_else(album):
    """Base and BGAugment see the same photos, cropped alike; draws=1 is the first of several."""
    photos = Photos(*album, SIZE)
    for make in (lambda draws: training(photos, [0, 3, 3, 5], draws=draws),
                 lambda draws: evaluation(photos, draws=draws)):
        items = [make(draws)[0] for draws in (0, 1, 3)]
        for found, backgrounds, labels in items:
            assert torch.equal(found, items[0][0]) and torch.equal(labels, items[0][2])
            assert torch.equal(backgrounds, items[2][1][:len(backgrounds)])


def on_cpu(workers):
    return SimpleNamespace(workers=workers, device="cpu")


def test_training_batches_are_a_function_of_seed_and_number(album):
    """Whatever is drawn before, by whatever worker, from wherever a run resumes."""
    photos, lists = Photos(*album, SIZE), [[0, 1], [2, 3], [4, 5], [0, 1]]
    batches = training(photos, *lists)
    once = [batches[n] for n in range(4)]
    for workers, start in ((0, 0), (2, 0), (0, 3), (2, 2)):
        torch.manual_seed(workers)
        found = list(loader(batches, on_cpu(workers), range(start, 4)))
        assert len(found) == 4 - start and all(map(same, once[start:], found))
    for k in range(2):  # photos 0 and 1 again, with other crops and other backgrounds
        assert not torch.equal(once[0][k], once[3][k])
        assert not torch.equal(once[0][k], training(photos, *lists, seed=(1, 3))[0][k])


def passes(batches, numbers, workers=0):
    """[(photos, backgrounds, labels)] of whole passes, whatever the size of the items."""
    whole = batches.items_per_pass
    items = list(loader(batches, on_cpu(workers), range(numbers.start * whole, numbers.stop * whole)))
    joined = []
    for first in range(0, len(items), whole):
        photos, backgrounds, labels = zip(*items[first:first + whole])
        joined.append((torch.cat(photos), torch.cat(backgrounds, dim=1), torch.cat(labels)))
    return joined


def test_evaluation_goes_through_all_photos_in_order_once_per_epoch(album, monkeypatch):
    monkeypatch.setattr(bgbias, "EVAL_BATCH", 4)
    batches = evaluation(Photos(*album, SIZE))
    assert batches.items_per_pass == 2
    assert [batches[n][2].tolist() for n in range(5)] == [
        [0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]
    first, second, third = passes(batches, range(3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], third[0])
    for b in range(len(SIZES)):  # each epoch draws backgrounds of its own for each photo
        drawn = [backgrounds[:, b].flatten().tolist() for _, backgrounds, _ in (first, second, third)]
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_evaluation_depends_neither_on_the_size_of_its_batches_nor_on_workers(album, monkeypatch, size):
    """Backgrounds are a function of seed, epoch and photo, so a run may resume anywhere."""
    photos = Photos(*album, SIZE)
    expected = passes(evaluation(photos), range(3))
    monkeypatch.setattr(bgbias, "EVAL_BATCH", size)
    batches = evaluation(photos)
    for workers, numbers in ((0, range(3)), (2, range(3)), (0, range(1, 3)), (1, range(2, 3))):
        torch.manual_seed(size)
        found = passes(batches, numbers, workers)
        assert len(found) == len(numbers) and all(map(same, found, expected[numbers.start:]))
    assert len(list(loader(batches, on_cpu(0)))) == -(-len(SIZES) // size)  # one pass by default
    other = passes(evaluation(photos, seed=(1, 3)), range(1))[0]
    assert torch.equal(other[0], expected[0][0]) and not torch.equal(other[1], expected[0][1])


def test_seed_of_gives_every_purpose_its_own_seed():
    seeds = {seed_of(*numbers) for numbers in np.ndindex(6, 6, 6)}
    assert len(seeds) == 216 and all(0 <= s < 2**64 for s in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)


# ---- Compositing ---------------------------------------------------------------------------------


def test_replacement_at_mask_zero_one_and_between():
    rng = torch.Generator().manual_seed(0)
    image, background = (torch.randint(256, (2, 3, 4, 5), generator=rng).float() for _ in range(2))
    assert torch.equal(replace_background(image, torch.ones(2, 1, 4, 5), background), image)
    assert torch.equal(replace_background(image, torch.zeros(2, 1, 4, 5), background), background)
    mask = torch.rand(2, 1, 4, 5, generator=rng)
    found = replace_background(image, mask, background)
    for b, c, y, x in np.ndindex(2, 3, 4, 5):
        m = mask[b, 0, y, x].item()
        expected = image[b, c, y, x].item() * m + background[b, c, y, x].item() * (1 - m)
        assert found[b, c, y, x].item() == pytest.approx(expected, rel=1e-5)


def test_views_by_hand():
    """Two pixels, all foreground and three fifths; each condition is one line of arithmetic."""
    photos = torch.tensor([[200, 100], [50, 100], [0, 100], [255, 153]], dtype=torch.uint8)
    drawn = torch.tensor([[10, 20], [30, 40], [50, 60]]).float().reshape(1, 1, 3, 1, 2)
    mean = np.array([124, 116, 104])
    first, second = np.array([200, 50, 0]), np.array([100, 100, 100])
    expected = {
        "clean": (first, second),
        "replaced": (first, 0.6 * second + 0.4 * np.array([20, 40, 60])),
        "object_only": (first, 0.6 * second + 0.4 * mean),
        "background_only": (mean, 0.4 * second + 0.6 * mean),
    }
    images, masks = bgbias.unpack(photos.reshape(1, 4, 1, 2))
    found = dict(views(images, masks, drawn, extra=True))
    assert list(found) == list(expected)
    for name, pixels in expected.items():
        (version,) = found[name]
        np.testing.assert_allclose(version[0, :, 0].numpy(), np.stack(pixels, axis=1), atol=1e-4)


# RGB in [0, 255]: mean colour, standard deviation, order of the channels the network wants.
INPUTS = {"bninception": ((128, 117, 104), (1, 1, 1), [2, 1, 0]),
          "smallconv": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), [0, 1, 2])}


@pytest.mark.parametrize("backbone", INPUTS)
@torch.no_grad()
def test_embed_composites_pixels_and_then_normalises(backbone):
    """Each condition in NumPy, photo by photo; the painted colour is the same for both networks."""
    model, rng = Embedder(backbone, "none", 64).eval(), np.random.default_rng(0)
    photos, pool = ([torch.from_numpy(rng.integers(0, 256, (planes, 64, 64), dtype=np.uint8)) for _ in range(3)]
                    for planes in (4, 3))
    batches = Batches(photos=photos, labels=range(3), size=64, seed=(1,), pool=pool, draws=2)
    found, validation = (bgbias.embed(model, [batches[0]], extra=extra) for extra in (True, False))
    mean, std, order = INPUTS[backbone]
    paint = np.array([124, 116, 104])[:, None, None]
    for k, photo in enumerate(photos):
        image, mask = photo[:3].double().numpy(), photo[3].double().numpy() / 255
        drawn = batches[0][1][:, k].double().numpy()
        pixels = {"clean": [image], "replaced": [mask * image + (1 - mask) * other for other in drawn],
                  "object_only": [mask * image + (1 - mask) * paint],
                  "background_only": [(1 - mask) * image + mask * paint]}
        assert list(found) == list(pixels)
        for condition, versions in pixels.items():
            for embedding, version in zip(found[condition][:, k], versions, strict=True):
                x = ((version.transpose(1, 2, 0) - mean) / std)[..., order].transpose(2, 0, 1)
                torch.testing.assert_close(embedding, model(torch.from_numpy(x).float()[None])[0],
                                           rtol=1e-3, atol=1e-5)
    assert list(validation) == ["clean", "replaced"]
    assert all(torch.equal(validation[condition], found[condition]) for condition in validation)
