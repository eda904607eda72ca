"""One geometry for photo and mask, lenders, batches, backgrounds and removal by hand, and what the network sees of them
in training and test; torchvision on PIL images as referee."""

import itertools
import re
import time
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import bgbias
from bgbias import (
    Embedder, EvaluationBatches, MPerClassSampler, Photos, TrainingBatches, UserError, draw_background,
    draw_test_lenders, draw_training_lender, load_batches, random_view, remove_object, replace_background, seed_of,
    split_by_group, unpack)
from conftest import slow_removal, write_shop

pytestmark = pytest.mark.usefixtures("one_thread")

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
    photos, batch = Photos(*album, SIZE), evaluation(Photos(*album, SIZE), labels=[7, 7, 9, 2, 2, 2])[0]
    assert batch.photos.shape == (len(SIZES), 4, SIZE, SIZE) and batch.labels.tolist() == [7, 7, 9, 2, 2, 2]
    for path, photo, view in zip(album[0], photos, batch.photos, strict=True):
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
    crops, _, backgrounds = training(Photos(*album, SIZE), [0] * 20, bgaugment="none")[0]
    assert len({crop.numpy().tobytes() for crop in crops}) == 20 and backgrounds is None
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


def box_of(left, right):
    """A mask (50, 100) with a box between two columns."""
    mask = np.zeros((50, 100), np.uint8)
    mask[10:40, left:right] = 255
    return mask


def splits_of(folder, images):
    """Splits with those masks: one for training, one for validation, the others for the test; the first two photos are
    also among those that were left out, which do not count."""
    folder.mkdir()
    masks = save(folder / "masks", [np.asarray(image) for image in images])
    photos = save(folder / "images", [picture(*image.size) for image in images])
    rows = {"train": slice(1), "val": slice(1, 2), "test": slice(2, None), "left_out": slice(2)}
    return {name: bgbias.Split(photos[some], masks[some], np.zeros(len(photos[some]), int))
            for name, some in rows.items()}


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


KINDS = {"fine": box_of(40, 60), "empty": box_of(0, 0), "full": np.full((50, 100), 255, np.uint8),
         # The centre crop takes the columns from 28 to 72 of 100, so less than half of a full mask.
         "just inside": box_of(18, 38), "just outside": box_of(17, 37), "beside": box_of(80, 100)}


@pytest.mark.parametrize("kinds, unusable, off_centre", [
    (dict(fine=20), None, None), (dict(fine=20, empty=1), None, None), (dict(fine=19, empty=1), "5%", None),
    (dict(fine=8, full=1, empty=1), "20%", "10%"), ({"fine": 19, "just inside": 1}, None, None),
    ({"fine": 19, "just outside": 1}, None, "5%"), (dict(fine=5, beside=4, empty=1), "10%", "40%")])
def test_masks_and_places_of_the_object_that_make_results_wrong_are_counted(
        tmp_path, capsys, kinds, unusable, off_centre):
    """From five percent on, one line each. It counts all photos, whether they are kept or only decoded."""
    masks = [KINDS[kind] for kind, count in kinds.items() for _ in range(count)]
    album = save(tmp_path / "images", [picture(100, 50)] * len(masks)), save(tmp_path / "masks", masks)
    kept, checked = Photos(*album, SIZE), Photos(*album, SIZE, keep=False)
    assert len([*checked.decode_all("checking")]) == len(masks)
    for photos in (kept, checked):
        photos.warn_of_masks("test")
        photos.warn_of_crop("test")
        said = capsys.readouterr().out.splitlines()
        assert all(line.startswith("warning: ") and " of the test photos" in line for line in said)
        shares = {what: re.search(r"(\d+%)", line)[1] for line in said
                  for what in ("nearly empty", "centre crop") if what in line}
        assert shares == {what: share for what, share in
                          (("nearly empty", unusable), ("centre crop", off_centre)) if share}


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


# ---- Which photo lends its background ------------------------------------------------------------

GROUPS = {"one group": [0] * 9, "two photos": [3, 3], "one photo": [5], "pairs": [0, 1, 2, 2, 1, 0],
          "many sizes": [4, 4, 7, 4, 7, 1, 4, 4, 9, 9, 9, 4, 7], "alone": [2, 0, 1]}


def cycle_of(lenders, start):
    """The photos that one reaches from `start` along its lenders, until one comes back."""
    cycle = [start]
    while (following := int(lenders[cycle[-1]])) != start:
        cycle.append(following)
    return cycle


@pytest.mark.parametrize("draws", [1, 2, 5, 20])
@pytest.mark.parametrize("name", GROUPS)
def test_each_photo_lends_its_background_once_per_draw_within_its_group_and_never_to_itself(name, draws):
    """A photo alone in its group keeps its own. There are as many draws as the largest group has other photos."""
    groups = np.array(GROUPS[name])
    sizes = np.bincount(groups)[groups]
    lenders = draw_test_lenders(groups, (1, 2), draws)
    assert lenders.shape == (max(1, min(draws, sizes.max() - 1)), len(groups))
    for draw in lenders:
        assert sorted(draw) == list(range(len(groups))) and (groups[draw] == groups).all()
        assert ((draw == np.arange(len(groups))) == (sizes == 1)).all()


@pytest.mark.parametrize("name", GROUPS)
def test_a_draw_goes_along_the_cycle_of_its_group_in_steps_of_one_and_more(name):
    """Draw k, counted from 0: steps of 1 + k mod (n - 1) in a group of n. So in n - 1 draws, each photo stands in front
    of the background of every other one."""
    groups = np.array(GROUPS[name])
    lenders = draw_test_lenders(groups, 7, draws=20)
    for photo, group in enumerate(groups):
        n = int((groups == group).sum())
        cycle = cycle_of(lenders[0], photo)
        assert sorted(cycle) == np.flatnonzero(groups == group).tolist()  # all of the group in one cycle
        if n > 1:
            assert [int(draw[photo]) for draw in lenders] == [cycle[1 + k % (n - 1)] for k in range(len(lenders))]
            if len(lenders) >= n - 1:
                assert {int(draw[photo]) for draw in lenders[:n - 1]} == {*cycle[1:]}


def test_fewer_draws_are_the_first_of_more_and_seeds_differ():
    groups = GROUPS["many sizes"]
    five = draw_test_lenders(groups, (1, 2, 3), 5)
    assert five.shape == (5, len(groups)) and np.array_equal(draw_test_lenders(groups, (1, 2, 3)), five)  # DRAWS is 5
    for draws in range(1, 5):
        assert np.array_equal(draw_test_lenders(groups, (1, 2, 3), draws), five[:draws])
    for same in (np.array(groups), torch.tensor(groups)):
        assert np.array_equal(draw_test_lenders(same, (1, 2, 3)), five)
    seeds = [0, 1, (1, 2), (2, 1), (1, 2, 4), (1, 3, 3)]
    assert len({draw_test_lenders(groups, seed).tobytes() for seed in [*seeds, (1, 2, 3)]}) == 7


def test_all_cycles_are_equally_likely():
    """Of four photos there are six cycles: 1,000 +- 29 of each."""
    counts = Counter(tuple(cycle_of(draw_test_lenders([0] * 4, seed, 1)[0], 0)) for seed in range(6000))
    assert {*counts} == {(0, *rest) for rest in itertools.permutations((1, 2, 3))}
    assert 850 < min(counts.values()) and max(counts.values()) < 1150


def test_split_by_group_by_hand():
    found = split_by_group(torch.tensor([5, 2, 5, 9, 2, 5]))
    assert [members.tolist() for members in found] == [[1, 4], [0, 2, 5], [3]]


def test_lenders_of_the_training_are_of_another_class_each_equally_likely():
    labels = torch.tensor([3, 0, 3, 1, 0, 3])
    torch.manual_seed(0)
    for k, label in enumerate(labels):
        counts = Counter(draw_training_lender(labels, k) for _ in range(1200))
        others = (labels != label).nonzero().flatten().tolist()
        assert sorted(counts) == others
        for count in counts.values():  # within five standard deviations
            assert abs(count - 1200 / len(others)) < 5 * (1200 / len(others)) ** 0.5


def test_backgrounds_of_the_pool_are_drawn_evenly():
    torch.manual_seed(0)
    counts = Counter(int(draw_background(POOL)[0, 0, 0]) // 20 for _ in range(1200))
    assert len(counts) == 12 and 60 < min(counts.values()) and max(counts.values()) < 140  # 100 +- 10


# ---- Batches -------------------------------------------------------------------------------------

# Backgrounds of one colour each tell which of the pool was drawn.
POOL = [torch.full((3, 50 + i, 60), 20 * i, dtype=torch.uint8) for i in range(12)]
LENT = "same_class", "any_class"


class Listed:
    """A sampler of given batches; the number of the batch is the last of its seed's."""

    def __init__(self, *lists):
        self.lists = lists

    def batch(self, seed):
        return self.lists[seed[-1]]


def training(photos, *lists, labels=None, bgaugment="pool", pool=POOL, seed=(1, 2)):
    """TrainingBatches of these photos; the label of a photo is its index, if none are given."""
    pool = pool if bgaugment == "pool" else None
    return TrainingBatches(photos, labels or range(len(photos)), Listed(*lists), SIZE, seed, bgaugment, pool)


def evaluation(photos, labels=None, pool=POOL, draws=2, lent=(), seed=(1, 2)):
    """The label of a photo is its index, if none are given."""
    return EvaluationBatches(photos, labels or range(len(photos)), SIZE, seed, draws, pool, lent)


def tensors_of(batch):
    """All tensors of a batch of either kind, in order."""
    if torch.is_tensor(batch) or batch is None:
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch
    return [tensor for part in parts for tensor in tensors_of(part)]


def same(first, second):
    """Whether two batches are equal."""
    first, second = tensors_of(first), tensors_of(second)
    return len(first) == len(second) and all(a is b or torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("bgaugment", ["none", "pool", "own"])
def test_training_batches_hold_the_photos_of_the_sampler(bgaugment):
    """Photos of one colour each stay that, however they are cropped."""
    photos = [torch.full((4, 50, 60 + i), 10 * i, dtype=torch.uint8) for i in range(6)]
    batches = training(photos, [0, 3], [5, 1, 1], bgaugment=bgaugment)
    for n, rows in enumerate([[0, 3], [5, 1, 1]]):
        batch = batches[n]
        assert batch._fields == ("photos", "labels", "backgrounds") and batch.labels.tolist() == rows
        assert torch.equal(batch.photos, 10 * batch.labels.byte()[:, None, None, None].expand(-1, 4, SIZE, SIZE))
        if bgaugment == "none":
            assert batch.backgrounds is None
        else:  # with own backgrounds, a mask comes with each
            assert batch.backgrounds.shape == (len(rows), {"pool": 3, "own": 4}[bgaugment], SIZE, SIZE)
            assert batch.backgrounds.dtype == batch.photos.dtype == torch.uint8


def test_the_sampler_is_asked_for_batch_n_of_this_seed():
    labels = np.repeat(range(5), 4)
    photos = [torch.full((4, SIZE, SIZE), i, dtype=torch.uint8) for i in range(len(labels))]
    sampler = MPerClassSampler(labels, 2, 8)
    batches = TrainingBatches(photos, labels, sampler, SIZE, (3, 1))
    asked = [sampler.batch((3, 1, n)) for n in range(6)]
    assert [batches[n].photos[:, 0, 0, 0].tolist() for n in range(6)] == asked
    assert [batches[n].labels.tolist() for n in range(6)] == [labels[indices].tolist() for indices in asked]
    assert len(set(map(str, asked))) == 6


def drawn_in_training(album):
    """(100, 12): the backgrounds of 100 batches of 12 photos."""
    batches = training(Photos(*album, SIZE), *[[0] * 12] * 100)
    return torch.stack([batches[n].backgrounds for n in range(100)])


def drawn_in_evaluation(album):
    """(100, 12): 100 backgrounds of 12 photos."""
    return torch.stack(evaluation([Photos(*album, SIZE)[0]] * 12, draws=100)[0].backgrounds)


@pytest.mark.parametrize("draw", [drawn_in_training, drawn_in_evaluation])
def test_backgrounds_are_drawn_with_replacement_and_evenly(album, draw):
    backgrounds = draw(album)
    assert (backgrounds.amin((2, 3, 4)) == backgrounds.amax((2, 3, 4))).all()
    drawn = backgrounds[:, :, 0, 0, 0] // 20  # (draws, B), 100 +- 10 of each
    count = drawn.flatten().bincount(minlength=12)
    assert len(count) == 12 and 60 < count.min() and count.max() < 140
    assert any(len(row.unique()) < 12 for row in drawn) and len(drawn.unique(dim=0)) == 100


def test_backgrounds_take_the_training_transform_in_evaluation_too(album):
    """Of a ramp, views tell how wide the crop was and whether it is flipped."""
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 60, 60)
    backgrounds = torch.stack(evaluation([Photos(*album, SIZE)[0]], pool=[ramp], draws=400)[0].backgrounds)
    left, right = backgrounds[:, 0, 0, 0, 0].int(), backgrounds[:, 0, 0, 0, -1].int()
    assert 160 < (left > right).sum() < 240  # 200 +- 10
    widths = (left - right).abs() / 240
    assert 0.3 < widths.min() < 0.4 and 0.9 < widths.max() <= 1  # area from 0.16, ratio from 3:4


def test_the_order_of_random_numbers(album):
    """As in the versions before: the generator is seeded with the seed, the number of the batch or of the epoch, and
    the place or the index of the photo. In training, the photo's own crop comes first; a pool's photo is drawn right
    before its crop."""
    photos, pool = Photos(*album, SIZE), Photos(album[0], None, SIZE)
    rows, batch = [0, 3, 3, 5], training(photos, [], [], [0, 3, 3, 5], pool=pool, seed=(7, 1))[2]
    for k, index in enumerate(rows):
        torch.manual_seed(seed_of(7, 1, 2, k))
        assert torch.equal(batch.photos[k], random_view(photos[index], SIZE))
        assert torch.equal(batch.backgrounds[k], random_view(pool[int(torch.randint(len(pool), ()))], SIZE))
    batches = evaluation(photos, pool=pool, draws=3, lent=LENT, seed=(7, 2))
    for epoch, batch in enumerate([batches[0], batches[1], batches[2]]):  # a batch holds all six photos
        for index in range(len(SIZES)):
            torch.manual_seed(seed_of(7, 2, epoch, index))
            for drawn in batch.backgrounds:
                assert torch.equal(drawn[index], random_view(pool[int(torch.randint(len(pool), ()))], SIZE))


def test_replacing_backgrounds_changes_nothing_else(album):
    """Base and BGAugment, with either kind of backgrounds, see the same crops. One draw is the first of several,
    whatever else is drawn."""
    photos = Photos(*album, SIZE)
    base, *others = [training(photos, [0, 3, 3, 5], bgaugment=some)[0] for some in ("none", "pool", "own")]
    for batch in others:
        assert torch.equal(batch.photos, base.photos) and torch.equal(batch.labels, base.labels)
    none, *some = [evaluation(photos, pool=pool, draws=draws, lent=lent)[0] for pool, draws, lent in (
        (None, 0, ()), (POOL, 1, ()), (POOL, 5, ()), (POOL, 5, LENT), (POOL, 2, ("any_class",)), (None, 3, LENT))]
    most = some[2]
    assert none.backgrounds == [] and none.lender_photos == {}
    for batch in some:
        assert torch.equal(batch.photos, none.photos) and torch.equal(batch.labels, none.labels)
        assert all(map(torch.equal, batch.backgrounds, most.backgrounds))
        for condition, draws in batch.lender_photos.items():
            assert all(map(torch.equal, draws, most.lender_photos[condition]))
    assert [len(batch.backgrounds) for batch in some] == [1, 5, 5, 2, 0]
    assert [[*batch.lender_photos] for batch in some] == [[], [], [*LENT], ["any_class"], [*LENT]]


def on_cpu(workers):
    return SimpleNamespace(workers=workers, device="cpu")


@pytest.mark.parametrize("bgaugment", ["none", "pool", "own"])
def test_training_batches_are_a_function_of_seed_and_number(album, bgaugment):
    """Whatever is drawn before, by whatever worker, from wherever a run resumes."""
    photos, lists = Photos(*album, SIZE), [[0, 1], [2, 3], [4, 5], [0, 1]]
    batches = training(photos, *lists, bgaugment=bgaugment)
    once = [batches[n] for n in range(4)]
    for workers, start in ((0, 0), (2, 0), (0, 3), (2, 2)):
        torch.manual_seed(workers)
        found = list(load_batches(batches, on_cpu(workers), range(start, 4)))
        assert len(found) == 4 - start and all(map(same, once[start:], found))
    for batch in (once[3], training(photos, *lists, bgaugment=bgaugment, seed=(1, 3))[0]):
        assert not torch.equal(once[0].photos, batch.photos)  # photos 0 and 1 again, with other crops and backgrounds
        assert bgaugment == "none" or not torch.equal(once[0].backgrounds, batch.backgrounds)


def epochs_of(batches, numbers, workers=0):
    """[(photos, labels, {condition: (draws, N, ., S, S)})] of whole epochs, whatever the size of the items."""
    per_epoch = batches.per_epoch
    items = list(load_batches(batches, on_cpu(workers), range(numbers.start * per_epoch, numbers.stop * per_epoch)))
    joined = []
    for first in range(0, len(items), per_epoch):
        some = items[first:first + per_epoch]
        drawn = [{"replaced": item.backgrounds, **item.lender_photos} for item in some]
        drawn = {name: torch.cat([torch.stack(part[name]) for part in drawn], dim=1) for name in drawn[0]}
        joined.append((torch.cat([item.photos for item in some]), torch.cat([item.labels for item in some]), drawn))
    return joined


def test_evaluation_goes_through_all_photos_in_order_once_per_epoch(album, monkeypatch):
    monkeypatch.setattr(bgbias, "EVAL_BATCH", 4)
    batches = evaluation(Photos(*album, SIZE), lent=("any_class",))
    assert batches.per_epoch == 2
    assert [batches[n].labels.tolist() for n in range(5)] == [
        [0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]
    first, second, third = epochs_of(batches, range(3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], third[0])
    for b in range(len(SIZES)):  # each epoch draws backgrounds of its own for each photo
        drawn = [backgrounds["replaced"][:, b].flatten().tolist() for _, _, backgrounds in (first, second, third)]
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    cycles = {tuple(batches.lender_indices(epoch)["any_class"][0].tolist()) for epoch in range(20)}
    assert len(cycles) > 14  # of 120


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_evaluation_depends_neither_on_the_size_of_its_batches_nor_on_workers(album, monkeypatch, size):
    """Backgrounds are a function of seed, epoch and photo, so a run may resume anywhere."""
    some = {"photos": Photos(*album, SIZE), "labels": [0, 0, 0, 1, 1, 1], "draws": 5, "lent": LENT}
    expected = epochs_of(evaluation(**some), range(3))
    monkeypatch.setattr(bgbias, "EVAL_BATCH", size)
    batches = evaluation(**some)
    for workers, numbers in ((0, range(3)), (2, range(3)), (0, range(1, 3)), (1, range(2, 3))):
        torch.manual_seed(size)
        found = epochs_of(batches, numbers, workers)
        assert len(found) == len(numbers) and all(map(same, found, expected[numbers.start:]))
    assert len(list(load_batches(batches, on_cpu(0)))) == -(-len(SIZES) // size)  # one epoch by default
    other = epochs_of(evaluation(**some, seed=(1, 3)), range(1))[0]
    assert torch.equal(other[0], expected[0][0]) and {*other[2]} == {"replaced", *LENT}
    assert not any(torch.equal(other[2][name], expected[0][2][name]) for name in ("replaced", "any_class"))


# ---- Backgrounds of other photos -----------------------------------------------------------------


@pytest.fixture
def numbered(album):
    """The photos of the album with their number, times 10, as the red channel."""
    return [photo.index_fill(0, torch.tensor(0), 10 * i) for i, photo in enumerate(Photos(*album, SIZE))]


def test_own_backgrounds_of_training_come_from_other_classes_of_the_batch(numbered):
    """Each is cropped afresh, with its mask, and all candidates occur. The photos and their masks stay as they are."""
    make = lambda bgaugment: training(numbered, *[[0, 1, 2, 3]] * 50, labels=[0, 0, 1, 1, 2, 2], bgaugment=bgaugment)
    own, plain, pairs, fresh = make("own"), make("none"), [], []
    for n in range(50):
        photos, _, backgrounds = own[n]
        assert torch.equal(photos, plain[n].photos) and backgrounds.shape == photos.shape == (4, 4, SIZE, SIZE)
        assert torch.equal(backgrounds[:, 3], backgrounds[:, 1])  # the mask is the green channel
        for k, lender in enumerate((backgrounds[:, 0, 0, 0] // 10).tolist()):
            pairs.append((k, lender))
            fresh.append(not torch.equal(backgrounds[k], photos[lender]))
    counts = Counter(pairs)
    assert {*counts} == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0), (3, 1)}
    assert min(counts.values()) > 10 and max(counts.values()) < 40 and all(fresh)  # 25 +- 3.5


def test_lenders_are_drawn_once_per_epoch_and_keep_no_photos(numbered, monkeypatch):
    """The photos of the validation must not stay in memory while those of the test are decoded."""
    drawn, draw = [], draw_test_lenders
    monkeypatch.setattr(bgbias, "draw_test_lenders", lambda *args: drawn.append(args) or draw(*args))
    batches = evaluation(numbered, [0, 0, 0, 1, 1, 2], pool=None, draws=5, lent=("any_class",))
    for epoch in (0, 0, 1, 1, 0):
        batches.lender_indices(epoch)
    assert len(drawn) == 3
    alive = weakref.ref(batches)
    del batches
    assert alive() is None


def test_lenders_in_evaluation_are_cropped_at_the_centre_with_their_masks(numbered, monkeypatch):
    """In batches of any size, in each draw and epoch: those of draw_test_lenders() of the classes, or of all photos."""
    monkeypatch.setattr(bgbias, "EVAL_BATCH", 4)
    labels, crops = [0, 0, 0, 1, 1, 2], evaluation(numbered, pool=None)
    crops = torch.cat([crops[0].photos, crops[1].photos])
    for seed in range(5):
        batches = evaluation(numbered, labels, pool=None, draws=5, lent=LENT, seed=(seed, 2))
        for epoch in range(3):
            lenders = batches.lender_indices(epoch)
            assert {*lenders} == {*LENT}
            assert np.array_equal(lenders["same_class"], draw_test_lenders(labels, (seed, 2, epoch), 5))
            assert np.array_equal(lenders["any_class"], draw_test_lenders([0] * 6, (seed, 2, epoch), 5))
            assert [len(draws) for draws in (lenders["same_class"], lenders["any_class"])] == [2, 5]
            for n, rows in ((0, range(4)), (1, range(4, 6))):
                batch = batches[2 * epoch + n]
                assert batch.backgrounds == [] and torch.equal(batch.photos, crops[rows])
                for condition, draws in batch.lender_photos.items():
                    assert len(draws) == len(lenders[condition])
                    for draw, expected in zip(draws, lenders[condition]):
                        assert torch.equal(draw, crops[expected[rows]])


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


def composite(image, mask, background):
    """Photos (3, S, S) and a mask (S, S) from 0 to 1, in NumPy and float64."""
    return mask * image + (1 - mask) * background


@pytest.mark.parametrize("backbone", INPUTS)
@torch.no_grad()
def test_embed_composites_pixels_and_then_normalises(backbone):
    """Each condition in NumPy, photo by photo; the painted colour is the same for both networks."""
    model, rng = Embedder(backbone, "none", 64).eval(), np.random.default_rng(0)
    photos, pool = ([torch.from_numpy(rng.integers(0, 256, (planes, 64, 64), dtype=np.uint8)) for _ in range(4)]
                    for planes in (4, 3))
    for photo in photos:
        photo[3] *= box(64, 20, 50, 10, 40).byte()
    batches = EvaluationBatches(photos, [0, 0, 1, 1], 64, (1,), 5, pool, LENT)
    batch, lenders = batches[0], batches.lender_indices(0)
    assert len(lenders["same_class"]) == 1 and len(lenders["any_class"]) == 3
    found, validation = (bgbias.embed(model, [batch], views) for views in (bgbias.all_views, bgbias.replaced_views))
    mean, std, order = INPUTS[backbone]
    paint = np.array([124, 116, 104])[:, None, None]
    removed = [slow_removal(photo[:3].numpy(), photo[3].numpy() / 255) for photo in photos]
    for k, photo in enumerate(photos):
        image, mask = photo[:3].double().numpy(), photo[3].double().numpy() / 255
        backgrounds = {"pasted": [removed[k]], "object_only": [paint],
                       "replaced": [draw[k].double().numpy() for draw in batch.backgrounds],
                       **{condition: [removed[draw[k]] for draw in lenders[condition]] for condition in LENT}}
        pixels = {"clean": [image], "background_only": [removed[k]]}
        for condition, others in backgrounds.items():
            pixels[condition] = [composite(image, mask, other) for other in others]
        assert found.keys() == pixels.keys()
        x = ((np.concatenate([*pixels.values()]).transpose(0, 2, 3, 1) - mean) / std)[..., order].transpose(0, 3, 1, 2)
        embeddings = torch.cat([found[condition][:, k] for condition in pixels])
        torch.testing.assert_close(embeddings, model(torch.from_numpy(x).float()), rtol=1e-3, atol=1e-5)
    assert validation.keys() == {"clean", "replaced", *LENT}
    assert all(torch.equal(validation[condition], found[condition]) for condition in validation)


# ---- What the network sees in a training ---------------------------------------------------------


class Recorder(torch.nn.Module):
    """A network that keeps its inputs of the training and of the validation. Its embedding is the mean colour."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.trained, self.validated = [], []

    def normalise(self, images):
        (self.trained if self.training else self.validated).append(images.clone())
        return images

    def forward(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) * self.weight, dim=1)


def record(tmp_path, bgaugment, flags=""):
    """(args, splits, the Recorder after train()) of two epochs of three steps on a shop with large soft masks."""
    folder = write_shop(tmp_path, classes=8, size=(40, 36)) / "shop"
    args = bgbias.parse_args([
        "--dataset", str(folder), "--loss", "triplet", "--bgaugment", bgaugment, "--image-size", "24", "--epochs", "2",
        "--iterations", "3", "--batch-size", "12", "--device", "cpu", "--workers", "0", *flags.split()])
    state = object.__new__(bgbias.State)
    state.network, state.class_weights, state.history, state.args = Recorder(), None, [], args
    state.optimiser = torch.optim.SGD(state.network.parameters(), 1e-3)
    splits = bgbias.load_splits(args.dataset)
    bgbias.train(args, splits, state, tmp_path / "run")
    assert state.finished_epochs == 2 and len(state.network.trained) == 6
    return args, splits, state.network


def training_batches_of(args, splits):
    sampler = bgbias.make_sampler(splits["train"].labels, args.loss, args.batch_size)
    return bgbias.make_training_batches(args, splits["train"], sampler)


def pixels_and_mask(photo):
    """(4, S, S) uint8 -> (3, S, S), (S, S) from 0 to 1, in NumPy and float64."""
    return photo[:3].double().numpy(), photo[3].double().numpy() / 255


def test_a_base_run_trains_on_the_photos_as_they_are(tmp_path):
    args, splits, network = record(tmp_path, "none")
    batches = training_batches_of(args, splits)
    for n, seen in enumerate(network.trained):
        assert batches[n].backgrounds is None and torch.equal(seen, batches[n].photos[:, :3].float())


def test_bgaugment_trains_on_photos_of_the_pool_which_are_never_emptied(tmp_path, monkeypatch):
    monkeypatch.setattr(bgbias, "remove_object", None)
    args, splits, network = record(tmp_path, "pool")
    batches = training_batches_of(args, splits)
    for n, seen in enumerate(network.trained):
        for image, photo, background in zip(seen, batches[n].photos, batches[n].backgrounds, strict=True):
            expected = composite(*pixels_and_mask(photo), background.double().numpy())
            np.testing.assert_allclose(image.numpy(), expected, atol=1e-3)


def test_own_backgrounds_are_emptied_and_pasted_into_half_of_the_photos(tmp_path):
    args, splits, network = record(tmp_path, "own")
    batches, pasted = training_batches_of(args, splits), []
    for n, seen in enumerate(network.trained):
        pasted.append([])
        for image, photo, lender in zip(seen, batches[n].photos, batches[n].backgrounds, strict=True):
            pasted[n].append(not torch.equal(image, photo[:3].float()))
            if pasted[n][-1]:
                expected = composite(*pixels_and_mask(photo), slow_removal(*pixels_and_mask(lender)))
                np.testing.assert_allclose(image.numpy(), expected, atol=1e-2)
    assert all(len(row) == 12 for row in pasted) and len(set(map(str, pasted))) == 6  # drawn anew in each step
    assert 24 < sum(map(sum, pasted)) < 48  # of 72: 36 +- 4


@pytest.mark.parametrize("bgaugment, flags, conditions", [
    ("none", "", ["clean", "replaced"]), ("pool", "", ["clean", "replaced"]),
    ("own", "", ["clean", "replaced", "any_class"]),
    ("none", "--select any_class", ["clean", "replaced", "any_class"])])
def test_validations_see_the_pool_as_in_earlier_versions_and_another_cycle_each(tmp_path, bgaugment, flags, conditions):
    """Clean, the reference condition, and the one that selects. The validation of epoch e has the seeds of e - 1, and
    so has that before the training."""
    args, splits, network = record(tmp_path, bgaugment, flags)
    photos = Photos(splits["val"].images, splits["val"].masks, 24)
    pool = Photos(bgbias.list_backgrounds(args, "val"), None, 24)
    crops = evaluation_crops(photos)
    seen = iter(network.validated)
    for epoch in (0, 0, 1):  # before the training, after epoch 1, after epoch 2
        views = {condition: next(seen) for condition in conditions}
        assert torch.equal(views["clean"], crops[:, :3].float())
        for i, crop in enumerate(crops):
            torch.manual_seed(seed_of(42, bgbias.VAL_SEED, epoch, i))
            background = random_view(pool[int(torch.randint(len(pool), ()))], 24).double().numpy()
            np.testing.assert_allclose(
                views["replaced"][i].numpy(), composite(*pixels_and_mask(crop), background), atol=1e-3)
        if "any_class" in conditions:
            lenders = draw_test_lenders([0] * len(crops), (42, bgbias.VAL_SEED, epoch), 1)[0]
            for i, crop in enumerate(crops):
                background = slow_removal(*pixels_and_mask(crops[lenders[i]]))
                np.testing.assert_allclose(
                    views["any_class"][i].numpy(), composite(*pixels_and_mask(crop), background), atol=1e-2)
    assert next(seen, None) is None
    cycles = [draw_test_lenders([0] * len(crops), (42, bgbias.VAL_SEED, epoch), 1).tolist() for epoch in (0, 1)]
    assert cycles[0] != cycles[1]


def evaluation_crops(photos):
    """(N, 4, S, S): photos and masks, cropped at the centre."""
    return torch.stack([transforms.functional.center_crop(photo, photos.size) for photo in photos])
