"""One geometry for photo and mask, replacement by hand, torchvision on PIL images as referee."""

import io
import sys
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

AUTHORS_TRAIN = transforms.Compose([  # on PIL images, with the paper's numbers
    transforms.RandomResizedCrop(40, scale=(0.16, 1), ratio=(0.75, 1.33)),
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


def test_decoding_against_torchvision_on_pil(album):
    steps = transforms.Compose([transforms.Resize(45), transforms.PILToTensor()])
    for path, photo in zip(album[0], Photos(*album, 45), strict=True):
        expected = steps(Image.open(path))
        assert photo.dtype == torch.uint8 and photo.shape == (4, *expected.shape[1:])
        assert min(photo.shape[1:]) == 45
        assert (photo[:3].int() - expected.int()).abs().max() <= 1


def test_evaluation_crops_against_torchvision_on_pil(album):
    steps = transforms.Compose(
        [transforms.Resize(45), transforms.CenterCrop(40), transforms.PILToTensor()])
    photos, _, labels = evaluation(Photos(*album, 45), labels=[7, 7, 9, 2, 2, 2])[0]
    assert photos.shape == (len(SIZES), 4, 40, 40) and labels.tolist() == [7, 7, 9, 2, 2, 2]
    for path, photo in zip(album[0], photos, strict=True):
        assert (photo[:3].int() - steps(Image.open(path)).int()).abs().max() <= 1
        assert torch.equal(photo[3], photo[1])  # the mask is the green channel


def test_photos_without_masks(album):
    """As in the pools of backgrounds."""
    with_masks, without = Photos(*album, 45), Photos(album[0], None, 45)
    assert all(torch.equal(a[:3], b) for a, b in zip(with_masks, without, strict=True))


def test_photo_and_mask_take_one_geometry(album):
    """The mask is the green channel, so it stays that, whatever crop and flip follow."""
    for photo in Photos(*album, 45):
        assert torch.equal(photo[3], photo[1])
        torch.manual_seed(0)
        crops = [random_view(photo, 40) for _ in range(20)]
        assert all(torch.equal(crop[3], crop[1]) for crop in crops)
        assert len({crop.numpy().tobytes() for crop in crops}) > 4  # few fit in a very wide photo


def test_random_view_against_torchvision_on_pil():
    """The same seed draws the same crop and flip; 8-bit rounding is all that may differ."""
    array = picture(90, 60)
    photo, worst = torch.from_numpy(array).permute(2, 0, 1), 0
    for seed in range(60):
        torch.manual_seed(seed)
        view = random_view(photo, 40)
        torch.manual_seed(seed)
        expected = transforms.functional.pil_to_tensor(AUTHORS_TRAIN(Image.fromarray(array)))
        assert view.shape == (3, 40, 40)
        worst = max(worst, (view.int() - expected.int()).abs().max().item())
    assert worst <= 2


def test_half_of_the_views_are_flipped():
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(1, 60, 60)
    torch.manual_seed(0)
    crops = [random_view(ramp, 16) for _ in range(400)]
    flipped = sum(bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops)
    assert 160 < flipped < 240  # 200 +- 10


@pytest.fixture
def decoded(monkeypatch):
    """Grows by the path of every photo and mask that is opened."""
    opened = []
    for name in ("open_rgb", "open_mask"):
        real = getattr(bgbias, name)
        monkeypatch.setattr(bgbias, name, lambda path, real=real: opened.append(path) or real(path))
    return opened


def test_a_photo_is_decoded_once(album, decoded):
    photos = Photos(album[0] * 20, album[1] * 20, 45)
    assert len(photos) == 120 and Counter(decoded) == dict.fromkeys(album[0] + album[1], 20)
    decoded.clear()
    for i in [0, 1, 0, 5, 119, 0]:
        photos[i]
    assert not decoded


def test_photos_that_are_not_to_be_kept_are_decoded_at_every_use(album, decoded, capsys):
    """As in the test, which uses each once; nothing is said about memory then."""
    photos = Photos(*album, 45, keep=False)
    assert not decoded
    for i in [0, 1, 0]:
        photos[i]
    assert decoded == [files[i] for i in (0, 1, 0) for files in album]
    assert capsys.readouterr().out == ""


def test_as_many_photos_are_kept_as_memory_has_room_for(album, decoded, monkeypatch, capsys):
    """The others give the same, but are decoded at every use, and one line says so."""
    kept = Photos(*album, 45)
    assert len(kept.kept) == 6 and capsys.readouterr().out == ""
    free = iter([0.9, 0.5, 0.11, 0.1, 0.09, 0.5, 0.5])  # a tenth is left to others
    monkeypatch.setattr(bgbias, "free_memory", lambda: next(free))
    partly = Photos(*album, 45)
    said = capsys.readouterr().out
    assert len(partly) == 6 and len(partly.kept) == 4
    assert said.startswith("memory is short: 4 of 6 photos stay decoded, ") and said.count("\n") == 1
    decoded.clear()
    assert all(torch.equal(kept[i], partly[i]) for i in range(6))
    assert decoded == [files[i] for i in (4, 5) for files in album]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_nothing_is_decoded_ahead_when_memory_is_short(album, monkeypatch, stderr):
    """Or the photos that wait to be taken would fill it. With a progress bar and without."""
    opened, real = [], bgbias.open_rgb

    def slow(path):
        opened.append(path)
        time.sleep(0.01)
        return real(path)

    monkeypatch.setattr(bgbias, "open_rgb", slow)
    monkeypatch.setattr(bgbias, "free_memory", lambda: 0.0)
    monkeypatch.setattr(sys, "stderr", stderr())
    assert Photos(album[0] * 100, None, 45).kept == []
    assert len(opened) < 600


def test_free_memory_is_a_share_of_the_machines():
    assert 0 < bgbias.free_memory() <= 1


@pytest.mark.parametrize("content, share", [
    ("MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  2000 kB\n", 0.25),
    ("MemTotal:  8000 kB\nMemFree:  100 kB\n", 1), (None, 1)])
def test_free_memory_by_hand(monkeypatch, content, share):
    """Where nobody says how much is available, photos are kept."""
    def read_text(path):
        if content is None:
            raise FileNotFoundError(path)
        return content

    monkeypatch.setattr(bgbias.Path, "read_text", read_text)
    assert bgbias.free_memory() == share


def test_kinds_of_image_files(tmp_path):
    """Grey, palette and 16-bit files become 8-bit RGB; as for masks, no EXIF rotation."""
    grey = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([grey] * 3, axis=2)).quantize(25).save(tmp_path / "palette.png")
    for name in ("grey.png", "deep.png", "palette.png"):
        image = bgbias.open_rgb(tmp_path / name)
        assert image.mode == "RGB" and (np.asarray(image) == grey[:, :, None]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    Image.fromarray(picture(30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert bgbias.open_rgb(tmp_path / "turned.jpg").size == (30, 20)


def test_errors_name_the_file(album):
    Image.fromarray(picture(60, 90)[:, :, 0]).save(album[1][0])
    sizes = r"its size is \(60, 90\), the photo's is \(90, 60\)"
    with pytest.raises(UserError, match=f"{album[1][0]}: {sizes}; delete it and run masks.py"):
        Photos(*album, 45)
    album[0][0].write_bytes(album[0][0].read_bytes()[:500])
    with pytest.raises(UserError, match=f"{album[0][0]}: no readable image"):
        Photos(*album, 45)


def save_mask(path, kind):
    """A file in the place of a mask of 90 x 60 px, of that kind."""
    soft = np.tile(np.arange(90, dtype=np.uint8) * 2, (60, 1))
    grey = Image.fromarray(soft)
    made = {"1-bit": lambda: grey.convert("1"), "grey RGB": lambda: grey.convert("RGB"),
            "black": lambda: Image.fromarray(0 * soft), "white": lambda: Image.fromarray(0 * soft + 255),
            "values 0 and 1": lambda: Image.fromarray(soft // 100),
            "alpha": lambda: Image.merge("LA", (grey, grey)),
            "RGBA": lambda: grey.convert("RGBA"), "palette": lambda: grey.quantize(4),
            "coloured": lambda: Image.merge("RGB", (grey, grey, Image.fromarray(255 - soft))),
            "16 bits": lambda: Image.fromarray(soft.astype(np.uint16) * 257)}
    if kind == "float":  # which PNG has not
        Image.fromarray(soft / np.float32(178)).save(path, "TIFF")
    elif kind == "no image":
        path.write_bytes(b"no image")
    else:
        made[kind]().save(path, "PNG")


@pytest.mark.parametrize("keep", [True, False])  # as in training, as in the test
@pytest.mark.parametrize("kind", ["values 0 and 1", "alpha", "RGBA", "palette", "coloured", "16 bits",
                                  "float", "no image"])
def test_what_is_no_mask_is_refused_by_its_path(album, kind, keep):
    save_mask(album[1][0], kind)
    with pytest.raises(UserError) as refused:
        Photos(*album, 45, keep=keep)[0]
    assert str(refused.value).startswith(f"{album[1][0]}: ")
    assert str(refused.value).endswith("; delete it and run masks.py, or save 8-bit greyscale, "
                                       "255 = foreground")


@pytest.mark.parametrize("kind, expected", [
    ("1-bit", None), ("grey RGB", 2 * np.arange(90)), ("black", np.zeros(90)), ("white", np.full(90, 255))])
def test_other_files_that_are_masks(album, kind, expected):
    save_mask(album[1][0], kind)
    mask = np.asarray(bgbias.open_mask(album[1][0]))
    assert mask.shape == (60, 90) and mask.dtype == np.uint8
    if kind == "1-bit":
        assert set(mask.flatten()) == {0, 255} and mask[:, :10].mean() < 30 < 150 < mask[:, 80:].mean()
    else:
        assert (mask == expected).all()
    assert Photos(*album, 45)[0].shape == (4, 45, 67)


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
    return Batches(photos=photos, labels=range(len(photos)), size=40, seed=seed, pool=pool,
                   draws=draws, sampler=Listed(*lists))


def evaluation(photos, labels=None, pool=POOL, draws=2, seed=(1, 2)):
    """The label of a photo is its index, if none are given."""
    return Batches(photos=photos, labels=labels or range(len(photos)), size=40, seed=seed, pool=pool,
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
        assert torch.equal(found, 10 * labels.byte()[:, None, None, None].expand(-1, 4, 40, 40))
        assert backgrounds.shape == (2, len(rows), 3, 40, 40)
        assert found.dtype == backgrounds.dtype == torch.uint8


def test_training_crops_each_photo_on_its_own(album):
    """With the training transform: the mask, a copy of the green channel, stays that."""
    photos, backgrounds, _ = training(Photos(*album, 45), [0] * 20, draws=0)[0]
    assert len({photo.numpy().tobytes() for photo in photos}) == 20
    assert torch.equal(photos[:, 3], photos[:, 1])
    assert backgrounds.shape == (0, 20, 3, 40, 40)


def test_the_sampler_is_asked_for_batch_n_of_this_seed():
    labels = np.repeat(range(5), 4)
    photos = [torch.zeros(4, 40, 40, dtype=torch.uint8)] * len(labels)
    sampler = MPerClassSampler(labels, 2, 8)
    batches = Batches(photos=photos, labels=labels, size=40, seed=(3, 1), pool=[], draws=0,
                      sampler=sampler)
    asked = [sampler.batch((3, 1, n)) for n in range(6)]
    assert [[index for index, _ in batches.plan(n)] for n in range(6)] == asked
    assert [batches[n][2].tolist() for n in range(6)] == labels[asked].tolist()
    assert len(set(map(str, asked))) == 6


@pytest.mark.parametrize("make", [
    lambda photos, **options: training(photos, [0] * 12, **options),
    lambda photos, **options: evaluation([photos[0]] * 12, **options)])
def test_backgrounds_are_drawn_with_replacement_and_evenly(album, make):
    _, backgrounds, _ = make(Photos(*album, 45), draws=100)[0]
    assert (backgrounds.amin((2, 3, 4)) == backgrounds.amax((2, 3, 4))).all()
    drawn = backgrounds[:, :, 0, 0, 0] // 20  # (draws, B), 100 +- 10 of each
    count = drawn.flatten().bincount(minlength=12)
    assert len(count) == 12 and 60 < count.min() and count.max() < 140
    assert any(len(row.unique()) < 12 for row in drawn) and len(drawn.unique(dim=0)) == 100


def test_backgrounds_take_the_training_transform_in_evaluation_too(album):
    """Of a ramp, views tell how wide the crop was and whether it is flipped."""
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 60, 60)
    _, backgrounds, _ = evaluation([Photos(*album, 45)[0]], pool=[ramp], draws=400)[0]
    left, right = backgrounds[:, 0, 0, 0, 0].int(), backgrounds[:, 0, 0, 0, -1].int()
    assert 160 < (left > right).sum() < 240  # 200 +- 10
    widths = (left - right).abs() / 240
    assert 0.3 < widths.min() < 0.4 and 0.9 < widths.max() <= 1  # area from 0.16, ratio from 3:4


def test_replacing_backgrounds_changes_nothing_else(album):
    """Base and BGAugment see the same photos, cropped alike; one draw is the first of several."""
    photos = Photos(*album, 45)
    for make in (lambda draws: training(photos, [0, 3, 3, 5], draws=draws),
                 lambda draws: evaluation(photos, draws=draws)):
        items = [make(draws)[0] for draws in (0, 1, 3)]
        for found, backgrounds, labels in items:
            assert torch.equal(found, items[0][0]) and torch.equal(labels, items[0][2])
            assert torch.equal(backgrounds, items[2][1][:len(backgrounds)])


def test_training_batches_are_a_function_of_seed_and_number(album):
    """Whatever is drawn before, by whatever worker, from wherever a run goes on."""
    photos, lists = Photos(*album, 45), [[0, 1], [2, 3], [4, 5], [0, 1]]
    batches = training(photos, *lists)
    once = [batches[n] for n in range(4)]
    for workers, start in ((0, 0), (2, 0), (0, 3), (2, 2)):
        torch.manual_seed(workers)
        args = SimpleNamespace(workers=workers, device="cpu")
        found = list(loader(batches, args, range(start, 4)))
        assert len(found) == 4 - start and all(map(same, once[start:], found))
    for k in range(2):  # the same photos; neither photos nor backgrounds are as before
        assert not torch.equal(once[0][k], once[3][k])
        assert not torch.equal(once[0][k], training(photos, *lists, seed=(1, 3))[0][k])


def epochs(batches, numbers, workers=0):
    """[(photos, backgrounds, labels)], whole epochs, whatever the size of the items."""
    args, whole = SimpleNamespace(workers=workers, device="cpu"), batches.items_a_pass
    items = range(numbers.start * whole, numbers.stop * whole)
    items = list(loader(batches, args, items))
    passes = []
    for first in range(0, len(items), whole):
        photos, backgrounds, labels = zip(*items[first:first + whole])
        passes.append((torch.cat(photos), torch.cat(backgrounds, dim=1), torch.cat(labels)))
    return passes


def test_evaluation_goes_through_all_photos_in_order_once_an_epoch(album, monkeypatch):
    monkeypatch.setattr(bgbias, "EVAL_BATCH", 4)
    photos = Photos(*album, 45)
    batches = evaluation(photos)
    assert batches.items_a_pass == 2
    assert [batches[n][2].tolist() for n in range(5)] == [
        [0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]
    first, second, third = epochs(batches, range(3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], third[0])
    for b in range(len(SIZES)):  # each epoch draws backgrounds of its own for each photo
        drawn = [backgrounds[:, b].flatten().tolist() for _, backgrounds, _ in (first, second, third)]
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 32])
def test_evaluation_depends_neither_on_the_size_of_its_batches_nor_on_workers(
        album, monkeypatch, size):
    """Backgrounds are a function of seed, epoch and photo, so a run may go on anywhere."""
    photos = Photos(*album, 45)
    expected = epochs(evaluation(photos), range(3))
    monkeypatch.setattr(bgbias, "EVAL_BATCH", size)
    batches = evaluation(photos)
    for workers, numbers in ((0, range(3)), (2, range(3)), (0, range(1, 3)), (1, range(2, 3))):
        torch.manual_seed(size)
        found = epochs(batches, numbers, workers)
        assert len(found) == len(numbers) and all(map(same, found, expected[numbers.start:]))
    other = epochs(evaluation(photos, seed=(1, 3)), range(1))[0]
    assert torch.equal(other[0], expected[0][0]) and not torch.equal(other[1], expected[0][1])


def test_seed_of_gives_every_purpose_its_own_seed():
    seeds = {seed_of(*numbers) for numbers in np.ndindex(6, 6, 6)}
    assert len(seeds) == 216 and all(0 <= s < 2**64 for s in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)


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


def test_unpack_by_hand():
    photos = torch.tensor([[200, 100], [50, 90], [0, 80], [255, 51]], dtype=torch.uint8)
    images, masks = bgbias.unpack(photos.reshape(1, 4, 1, 2))
    assert images.tolist() == [[[[200, 100]], [[50, 90]], [[0, 80]]]]
    assert masks.flatten().tolist() == pytest.approx([1, 0.2])


def test_views_by_hand():
    """Two pixels, all foreground and three fifths; each condition is one line of arithmetic."""
    model = Embedder("smallconv", "none", 32)
    photos = torch.tensor([[200, 100], [50, 100], [0, 100], [255, 153]]).reshape(1, 4, 1, 2)
    drawn = torch.tensor([[10, 20], [30, 40], [50, 60]]).reshape(1, 1, 3, 1, 2)
    mean, std = (np.array(RGB) * 255 for RGB in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    first, second = np.array([200, 50, 0]), np.array([100, 100, 100])
    pixels = {
        "clean": (first, second),
        "replaced": (first, 0.6 * second + 0.4 * np.array([20, 40, 60])),
        "object_only": (first, 0.6 * second + 0.4 * mean),
        "background_only": (mean, 0.4 * second + 0.6 * mean),
    }
    images, masks = bgbias.unpack(photos.byte())
    found = dict(views(model.normalise(images), masks, model.normalise(drawn.float()), extra=True))
    assert list(found) == list(pixels)
    for name, pair in pixels.items():
        expected = (np.stack(pair, axis=1) - mean[:, None]) / std[:, None]
        (version,) = found[name]
        np.testing.assert_allclose(version[0, :, 0].numpy(), expected, atol=1e-4)


# RGB in [0, 255]: mean colour, standard deviation, order of the channels the network wants.
INPUTS = {"bninception": ((128, 117, 104), (1, 1, 1), [2, 1, 0]),
          "smallconv": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), [0, 1, 2])}


@pytest.mark.parametrize("backbone", INPUTS)
def test_views_of_normalised_images_are_normalised_views_of_pixels(backbone):
    """Compositing pixels, with the mean colour where a part is left out, and then normalising."""
    model, rng = Embedder(backbone, "none", 64), np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 6, 7)).astype(float)
    backgrounds = rng.integers(0, 256, (4, 2, 3, 6, 7)).astype(float)
    masks = rng.choice([0, 0.25, 0.7, 1], (2, 1, 6, 7))
    mean, std, order = INPUTS[backbone]
    mean, std = np.array(mean)[:, None, None], np.array(std)[:, None, None]
    pixels = {"clean": [images],
              "replaced": [masks * images + (1 - masks) * drawn for drawn in backgrounds],
              "object_only": [masks * images + (1 - masks) * mean],
              "background_only": [(1 - masks) * images + masks * mean]}
    normalised = [model.normalise(torch.tensor(x).float()) for x in (images, backgrounds)]
    found = dict(views(normalised[0], torch.tensor(masks).float(), normalised[1], extra=True))
    assert list(found) == list(pixels)
    for name, versions in pixels.items():
        for version, expected in zip(found[name], versions, strict=True):
            expected = ((expected - mean) / std)[:, order]
            np.testing.assert_allclose(version.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_the_part_that_is_left_out_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    images, others = torch.randn(2, 3, 3, 4, 5, generator=rng)
    masks = torch.randint(2, (3, 1, 4, 5), generator=rng).float()
    swapped = replace_background(images, masks, others)
    before, after = (dict(views(x, masks, others[None], extra=True)) for x in (images, swapped))
    for condition in ("replaced", "object_only"):
        assert torch.equal(before[condition][0], after[condition][0])
    assert not torch.equal(before["background_only"][0], after["background_only"][0])


def test_views_are_as_many_as_the_draws_and_no_more_than_asked():
    """Validation asks for no extra ones."""
    images, masks = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    for draws in (0, 1, 5):
        drawn = torch.randn(draws, 2, 3, 4, 5)
        found = {name: len(versions) for name, versions in views(images, masks, drawn, extra=False)}
        assert found == {"clean": 1, "replaced": draws}
        found = {name: len(versions) for name, versions in views(images, masks, drawn, extra=True)}
        assert found == {"clean": 1, "replaced": draws, "object_only": 1, "background_only": 1}
