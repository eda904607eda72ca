"""One geometry for photo and mask, backgrounds and removal by hand, torchvision on PIL images as referee."""

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
    TEST_DRAWS, Batches, Embedder, MPerClassSampler, Photos, UserError, as_backgrounds, loader, random_view,
    remove_object, replace_background, seed_of, unpack)
from conftest import slow_removal

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
    crops, backgrounds, _ = training(Photos(*album, SIZE), [0] * 20, draws={})[0]
    assert len({crop.numpy().tobytes() for crop in crops}) == 20 and backgrounds == {}
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


@pytest.mark.parametrize("line, limit, used, stat, expected", [  # of the machine, a quarter is free
    ("9:cpu:/", "", "", "", 0.25), ("0::/job/task", "max", "current", "inactive_file 0", 0.1),
    ("4:memory:/job/task", "limit_in_bytes", "usage_in_bytes", "total_inactive_file 5\ninactive_file 0", 0.15)])
def test_free_memory_by_hand(tmp_path, monkeypatch, line, limit, used, stat, expected):
    """The cgroup of the job, above that of its task, has 100 bytes and uses 90, some of them for files it has read."""
    group = "sys/fs/cgroup/memory/job" if "memory" in line else "sys/fs/cgroup/job"
    for path, text in {"proc/meminfo": "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  2000 kB\n",
                       "proc/self/cgroup": f"5:pids:/\n{line}\n", f"{group}/task/memory.max": "max\n",
                       f"{group}/memory.{limit}": "100\n", f"{group}/memory.{used}": "90\n",
                       f"{group}/memory.stat": f"anon 1\n{stat}\n"}.items():
        bgbias.write_text(tmp_path / path, text)
    monkeypatch.setattr(bgbias, "Path", lambda *parts: tmp_path.joinpath(*(str(part).lstrip("/") for part in parts)))
    assert bgbias.free_memory() == pytest.approx(expected)


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


def training(photos, *lists, labels=None, pool=POOL, draws={"replaced": 2}, seed=(1, 2)):
    """The label of a photo is its index, if none are given."""
    return Batches(photos=photos, labels=labels or range(len(photos)), size=SIZE, seed=seed, pool=pool,
                   draws=draws, sampler=Listed(*lists))


def evaluation(photos, labels=None, pool=POOL, draws={"replaced": 2}, seed=(1, 2)):
    """The label of a photo is its index, if none are given."""
    return Batches(photos=photos, labels=labels or range(len(photos)), size=SIZE, seed=seed, pool=pool, draws=draws)


def same(a, b):
    """Whether two items of Batches are equal."""
    return a[1].keys() == b[1].keys() and all(map(torch.equal, *([x[0], x[2], *x[1].values()] for x in (a, b))))


def test_training_batches_hold_the_photos_of_the_sampler():
    """Photos of one colour each stay that, however they are cropped."""
    photos = [torch.full((4, 50, 60 + i), 10 * i, dtype=torch.uint8) for i in range(6)]
    batches = training(photos, [0, 3], [5, 1, 1])
    for n, rows in enumerate([[0, 3], [5, 1, 1]]):
        found, backgrounds, labels = batches[n]
        assert labels.tolist() == rows
        assert torch.equal(found, 10 * labels.byte()[:, None, None, None].expand(-1, 4, SIZE, SIZE))
        assert backgrounds["replaced"].shape == (2, len(rows), 3, SIZE, SIZE)
        assert found.dtype == backgrounds["replaced"].dtype == torch.uint8


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
    backgrounds = make(Photos(*album, SIZE), draws={"replaced": 100})[0][1]["replaced"]
    assert (backgrounds.amin((2, 3, 4)) == backgrounds.amax((2, 3, 4))).all()
    drawn = backgrounds[:, :, 0, 0, 0] // 20  # (draws, B), 100 +- 10 of each
    count = drawn.flatten().bincount(minlength=12)
    assert len(count) == 12 and 60 < count.min() and count.max() < 140
    assert any(len(row.unique()) < 12 for row in drawn) and len(drawn.unique(dim=0)) == 100


def test_backgrounds_take_the_training_transform_in_evaluation_too(album):
    """Of a ramp, views tell how wide the crop was and whether it is flipped."""
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 60, 60)
    backgrounds = evaluation([Photos(*album, SIZE)[0]], pool=[ramp], draws={"replaced": 400})[0][1]["replaced"]
    left, right = backgrounds[:, 0, 0, 0, 0].int(), backgrounds[:, 0, 0, 0, -1].int()
    assert 160 < (left > right).sum() < 240  # 200 +- 10
    widths = (left - right).abs() / 240
    assert 0.3 < widths.min() < 0.4 and 0.9 < widths.max() <= 1  # area from 0.16, ratio from 3:4


@pytest.mark.parametrize("pool", [POOL, None])
def test_replacing_backgrounds_changes_nothing_else(album, pool):
    """Base and BGAugment see the same crops. One draw is the first of several, whatever else is drawn."""
    photos, draws = Photos(*album, SIZE), [{}, {"replaced": 1}, {"replaced": 5}]
    for batches in ([training(photos, [0, 3, 3, 5], pool=pool, draws=some) for some in draws],
                    [evaluation(photos, pool=pool, draws=some) for some in (*draws, TEST_DRAWS)]):
        plain, *items = [some[0] for some in batches]
        for found, backgrounds, labels in items:
            assert torch.equal(found[:, :3], plain[0][:, :3]) and torch.equal(labels, plain[2])
            assert torch.equal(backgrounds["replaced"], items[1][1]["replaced"][:len(backgrounds["replaced"])])


def on_cpu(workers):
    return SimpleNamespace(workers=workers, device="cpu")


@pytest.mark.parametrize("pool", [POOL, None])
def test_training_batches_are_a_function_of_seed_and_number(album, pool):
    """Whatever is drawn before, by whatever worker, from wherever a run resumes."""
    photos, lists = Photos(*album, SIZE), [[0, 1], [2, 3], [4, 5], [0, 1]]
    batches = training(photos, *lists, pool=pool)
    once = [batches[n] for n in range(4)]
    for workers, start in ((0, 0), (2, 0), (0, 3), (2, 2)):
        torch.manual_seed(workers)
        found = list(loader(batches, on_cpu(workers), range(start, 4)))
        assert len(found) == 4 - start and all(map(same, once[start:], found))
    for photos, backgrounds, _ in (once[3], training(photos, *lists, pool=pool, seed=(1, 3))[0]):
        assert not torch.equal(once[0][0], photos)  # photos 0 and 1 again, with other crops and backgrounds
        assert not torch.equal(once[0][1]["replaced"], backgrounds["replaced"])


def passes(batches, numbers, workers=0):
    """[(photos, backgrounds, labels)] of whole passes, whatever the size of the items."""
    whole = batches.items_per_pass
    items = list(loader(batches, on_cpu(workers), range(numbers.start * whole, numbers.stop * whole)))
    joined = []
    for first in range(0, len(items), whole):
        photos, backgrounds, labels = zip(*items[first:first + whole])
        drawn = {name: torch.cat([some[name] for some in backgrounds], dim=1) for name in backgrounds[0]}
        joined.append((torch.cat(photos), drawn, torch.cat(labels)))
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
        drawn = [backgrounds["replaced"][:, b].flatten().tolist() for _, backgrounds, _ in (first, second, third)]
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_evaluation_depends_neither_on_the_size_of_its_batches_nor_on_workers(album, monkeypatch, size):
    """Backgrounds are a function of seed, epoch and photo, so a run may resume anywhere."""
    some = {"photos": Photos(*album, SIZE), "labels": [0, 0, 0, 1, 1, 1], "draws": TEST_DRAWS}
    expected = passes(evaluation(**some), range(3))
    monkeypatch.setattr(bgbias, "EVAL_BATCH", size)
    batches = evaluation(**some)
    for workers, numbers in ((0, range(3)), (2, range(3)), (0, range(1, 3)), (1, range(2, 3))):
        torch.manual_seed(size)
        found = passes(batches, numbers, workers)
        assert len(found) == len(numbers) and all(map(same, found, expected[numbers.start:]))
    assert len(list(loader(batches, on_cpu(0)))) == -(-len(SIZES) // size)  # one pass by default
    other = passes(evaluation(**some, seed=(1, 3)), range(1))[0]
    assert torch.equal(other[0], expected[0][0])
    assert not any(torch.equal(other[1][name], expected[0][1][name]) for name in TEST_DRAWS)


# ---- Backgrounds of other photos -----------------------------------------------------------------


@pytest.fixture
def numbered(album):
    """The photos of the album with their number, times 10, as the red channel."""
    return [photo.index_fill(0, torch.tensor(0), 10 * i) for i, photo in enumerate(Photos(*album, SIZE))]


def test_own_backgrounds_of_training_come_from_other_classes_of_the_batch(numbered):
    """With their masks, cropped alike. About half of the images are kept as they are, by a mask of 255."""
    make = lambda draws: training(numbered, *[[0, 1, 2, 3]] * 50, labels=[0, 0, 1, 1, 2, 2], pool=None, draws=draws)
    own, plain, kept, partners = make({"replaced": 1}), make({}), [], []
    for n in range(50):
        photos, backgrounds, _ = own[n]
        (drawn,), masks = backgrounds["replaced"], plain[n][0][:, 3]
        kept += (photos[:, 3] == 255).all((1, 2)).tolist()
        partners += [(k, i // 10) for k, i in enumerate(drawn[:, 0, 0, 0].tolist())]
        assert drawn.shape == photos.shape == (4, 4, SIZE, SIZE)
        assert torch.equal(drawn[:, 3], drawn[:, 1])  # the mask is the green channel
        assert all(torch.equal(mask, before) or (mask == 255).all() for mask, before in zip(photos[:, 3], masks))
        images, masks = unpack(photos)
        mixed = replace_background(images, masks, as_backgrounds(drawn))
        assert torch.equal(mixed[masks.expand_as(mixed) == 1], images[masks.expand_as(mixed) == 1])
        assert torch.equal(photos[:, :3], plain[n][0][:, :3])
    assert 70 < sum(kept) < 130  # 100 +- 7
    counts = Counter(partners)
    assert len(counts) == 8 and min(counts.values()) > 8 and all({k // 2, other // 2} == {0, 1} for k, other in counts)


def test_partners_in_evaluation_are_of_the_same_or_of_another_class(numbered):
    """Of all photos, cropped at the centre, with their masks. In same_class, a class uses each of its photos once,
    none for itself unless it is the only one: two photos on one background would be near for that reason alone."""
    labels, seen = [0, 0, 0, 1, 1, 2], {}
    for seed in range(200):
        item = evaluation(numbered, labels, pool=None, draws=dict.fromkeys(TEST_DRAWS, 1), seed=(seed, 2))[0]
        for condition, (drawn,) in item[1].items():
            partners = (drawn[:, 0, 0, 0] // 10).tolist()
            assert torch.equal(drawn, item[0][partners])
            seen.setdefault(condition, []).append(partners)
    assert {tuple(partners) for partners in seen["same_class"]} == {(1, 2, 0, 4, 3, 5), (2, 0, 1, 4, 3, 5)}
    for condition in ("other_class", "replaced"):
        for k, partners in enumerate(zip(*seen[condition])):
            assert set(partners) == {j for j in range(6) if labels[j] != labels[k]}


def test_seed_of_gives_every_purpose_its_own_seed():
    seeds = {seed_of(*numbers) for numbers in np.ndindex(6, 6, 6)}
    assert len(seeds) == 216 and all(0 <= s < 2**64 for s in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)


# ---- Compositing ---------------------------------------------------------------------------------


def box(size, top=0, bottom=None, left=0, right=None, value=1.0):
    """A mask (size, size) that is `value` in a box and 0 outside."""
    mask = torch.zeros(size, size)
    mask[top:bottom, left:right] = value
    return mask


RAMP = torch.linspace(0, 1, 24)
MASKED = {"soft": RAMP * RAMP[:, None].flip(0), "box": box(24, 6, 15, 3, 20), "faint": box(24, 6, 15, 3, 20, 0.11),
          "at the edge": box(24, 9, None, 5, 18), "two": box(24, 2, 9, 2, 9) + box(24, 12, 22, 12, 20, 0.4),
          "stripes": (torch.arange(24) % 8 < 3).float().expand(24, 24), "empty": box(24, 0, 0), "full": box(24),
          "a corner is left": box(24) - box(24, 0, 5, 0, 4)}


@pytest.mark.parametrize("size", [24, 25])
@pytest.mark.parametrize("name", MASKED)
def test_removed_objects_pixel_by_pixel(name, size):
    """And together with another photo. A plain background stays plain, whatever is on it."""
    mask, ramp = (torch.nn.functional.pad(m[None], (0, size - 24, 0, size - 24), "replicate")
                  for m in (MASKED[name], RAMP.expand(24, 24)))
    image, other = torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    found, _ = remove_object(torch.stack([image, other]), torch.stack([mask, ramp]))
    np.testing.assert_allclose(found.numpy(), slow_removal(image.numpy(), mask[0].numpy()), atol=1e-2)
    plain = torch.tensor([12.0, 200.0, 90.0])[:, None, None]
    photo = torch.where(mask < 0.1, plain, image)
    assert (remove_object(photo[None], mask[None]) - plain * (name != "full")).abs().max() < 1e-3


@pytest.mark.parametrize("size, margin", [(16, 1), (127, 1), (128, 2), (227, 3)])
def test_only_the_object_and_its_margin_are_removed(size, margin):
    """The rest stays bit for bit. A pixel belongs to the object if its mask is 0.1 or more."""
    image = torch.randint(256, (1, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    for value, found in ((0.09, 0), (0.11, 1), (1.0, 1)):
        mask = box(size, 7, 8, 5, 7, value)  # one pixel high, two wide
        changed = (remove_object(image, mask[None, None]) != image).any(dim=1)[0]
        assert torch.equal(changed, found * box(size, 7 - margin, 8 + margin, 5 - margin, 7 + margin) > 0)


# RGB in [0, 255]: mean colour, standard deviation, order of the channels the network wants.
INPUTS = {"bninception": ((128, 117, 104), (1, 1, 1), [2, 1, 0]),
          "smallconv": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), [0, 1, 2])}


@pytest.mark.parametrize("backbone", INPUTS)
@torch.no_grad()
def test_embed_composites_pixels_and_then_normalises(backbone):
    """Each condition in NumPy, photo by photo; the painted colour is the same for both networks."""
    model, rng = Embedder(backbone, "none", 64).eval(), np.random.default_rng(0)
    photos, pool = ([torch.from_numpy(rng.integers(0, 256, (planes, 64, 64), dtype=np.uint8)) for _ in range(4)]
                    for planes in (4, 3))
    for photo in photos:
        photo[3] *= box(64, 20, 50, 10, 40).byte()
    batches = Batches(photos=photos, labels=[0, 0, 1, 1], size=64, seed=(1,), pool=pool, draws=TEST_DRAWS)
    found, validation = (bgbias.embed(model, [batches[0]], extra=extra) for extra in (True, False))
    mean, std, order = INPUTS[backbone]
    paint = np.array([124, 116, 104])[:, None, None]
    removed = {photo.numpy().tobytes(): slow_removal(photo[:3].numpy(), photo[3].numpy() / 255) for photo in photos}
    for k, photo in enumerate(photos):
        image, mask = photo[:3].double().numpy(), photo[3].double().numpy() / 255
        own = removed[photo.numpy().tobytes()]
        others = {condition: [removed.get(other.numpy().tobytes(), other.double().numpy()) for other in drawn[:, k]]
                  for condition, drawn in batches[0][1].items()}
        pixels = {"clean": [image], "background_only": [own]}
        for condition, backgrounds in {**others, "pasted": [own], "object_only": [paint]}.items():
            pixels[condition] = [mask * image + (1 - mask) * other for other in backgrounds]
        assert found.keys() == pixels.keys()
        x = ((np.concatenate([*pixels.values()]).transpose(0, 2, 3, 1) - mean) / std)[..., order].transpose(0, 3, 1, 2)
        embeddings = torch.cat([found[condition][:, k] for condition in pixels])
        torch.testing.assert_close(embeddings, model(torch.from_numpy(x).float()), rtol=1e-3, atol=1e-5)
    assert validation.keys() == {"clean", *TEST_DRAWS}
    assert all(torch.equal(validation[condition], found[condition]) for condition in validation)
