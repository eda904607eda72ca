"""One geometry for photo and mask, replacement by hand, torchvision on PIL images as referee."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import bgbias
from bgbias import (
    Batches, Embedder, Photos, UserError, conditions, loader, random_view, replace_background)

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


@pytest.mark.parametrize("crop", [None, 40])
def test_decoding_against_torchvision_on_pil(album, crop):
    steps = [transforms.Resize(45), transforms.CenterCrop(crop or 45), transforms.PILToTensor()]
    if crop is None:
        del steps[1]
    for path, photo in zip(album[0], Photos(*album, 45, crop), strict=True):
        expected = transforms.Compose(steps)(Image.open(path))
        assert photo.dtype == torch.uint8 and photo.shape == (4, *expected.shape[1:])
        assert (photo[:3].int() - expected.int()).abs().max() <= 1
        assert (45 in photo.shape) if crop is None else photo.shape == (4, 40, 40)


@pytest.mark.parametrize("crop", [None, 40])
def test_photo_and_mask_take_one_geometry(album, crop):
    """The mask is the green channel, so it stays that, whatever crop and flip follow."""
    for photo in Photos(*album, 45, crop):
        assert torch.equal(photo[3], photo[1])
        torch.manual_seed(0)
        views = [random_view(photo, 40) for _ in range(20)]
        assert all(torch.equal(view[3], view[1]) for view in views)
        assert len({view.numpy().tobytes() for view in views}) > 4  # few fit in a very wide photo


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
    views = [random_view(ramp, 16) for _ in range(400)]
    flipped = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views)
    assert 160 < flipped < 240  # 200 +- 10


def test_a_photo_is_decoded_once(album, monkeypatch):
    decoded, open_rgb = [], bgbias.open_rgb
    monkeypatch.setattr(bgbias, "open_rgb", lambda path: decoded.append(path) or open_rgb(path))
    photos = Photos(*album, 45)
    for i in [0, 1, 0, 5, 0]:
        photos[i]
    assert sorted(decoded) == sorted(album[0] + album[1])


def test_streaming_says_so_and_gives_the_same(album, monkeypatch, capsys):
    kept = Photos(*album, 45, 40)
    assert kept.kept is not None and capsys.readouterr().out == ""
    monkeypatch.setattr(bgbias, "free_memory", lambda: 20_000)
    streamed = Photos(*album, 45, 40)
    assert streamed.kept is None
    assert "6 photos, 0.0 GiB decoded, do not fit" in (said := capsys.readouterr().out) and "at every use" in said
    assert all(torch.equal(kept[i], streamed[i]) for i in range(len(SIZES)))


def test_free_memory_is_some_of_the_machines():
    assert 2**20 < bgbias.free_memory() < 2**50


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
    with pytest.raises(UserError, match=f"{album[1][0]}: its size is .60, 90., the photo.s is .90, 60.; .* run masks.py"):
        Photos(*album, 45)
    album[0][0].write_bytes(album[0][0].read_bytes()[:500])
    with pytest.raises(UserError, match=f"{album[0][0]}: no readable image"):
        Photos(*album, 45)


# Backgrounds of one colour each tell which of the pool was drawn.
POOL = [torch.full((3, 50 + i, 60), 20 * i, dtype=torch.uint8) for i in range(12)]


def batches(photos, lists, train=True, pool=POOL, draws=2, seed=(1, 2)):
    return Batches(photos, lists, 40, train, pool, draws, seed)


def test_batches_hold_the_listed_photos(album):
    photos = Photos(*album, 45, 40)
    lists = [[0, 3], [5, 1, 1]]
    for rows, (found, backgrounds) in zip(lists, batches(photos, lists, train=False)):
        assert torch.equal(found, torch.stack([photos[i] for i in rows]))
        assert backgrounds.shape == (2, len(rows), 3, 40, 40) and backgrounds.dtype == torch.uint8
    found, backgrounds = batches(photos, [[0, 0, 0]], train=True, draws=0)[0]
    assert found.shape == (3, 4, 40, 40) and not torch.equal(found[0], found[1])
    assert backgrounds.numel() == 0


def test_backgrounds_are_drawn_with_replacement_and_evenly(album):
    photos = Photos(*album, 45, 40)
    _, backgrounds = batches(photos, [[0] * 12], train=False, draws=100)[0]
    assert (backgrounds.amin((2, 3, 4)) == backgrounds.amax((2, 3, 4))).all()
    drawn = backgrounds[:, :, 0, 0, 0] // 20  # (draws, B), 100 +- 10 of each
    count = drawn.flatten().bincount(minlength=12)
    assert len(count) == 12 and 60 < count.min() and count.max() < 140
    assert any(len(row.unique()) < 12 for row in drawn) and len(drawn.unique(dim=0)) == 100


def test_backgrounds_take_the_training_transform_in_evaluation_too(album):
    pool = [torch.from_numpy(picture(90, 60)).permute(2, 0, 1)]
    _, backgrounds = batches(Photos(*album, 45, 40), [[0, 1, 2]], train=False, pool=pool)[0]
    assert len({b.numpy().tobytes() for b in backgrounds.flatten(0, 1)}) == 6


def test_batches_are_a_function_of_seed_and_number(album):
    photos, lists = Photos(*album, 45), [[0, 1], [2, 3], [4, 5], [0, 1]]
    once = batches(photos, lists)

    def same(a, b):
        return all(map(torch.equal, a, b))

    for workers, start in ((0, 0), (2, 0), (0, 3), (2, 2)):
        torch.manual_seed(workers)
        found = list(loader(once, SimpleNamespace(workers=workers, device="cpu"), start))
        assert len(found) == 4 - start
        assert all(same(once[b], item) for b, item in zip(range(start, 4), found))
    assert not same(once[0], once[3])  # the same photos, other crops
    assert not any(map(torch.equal, once[0], batches(photos, lists, seed=(1, 3))[0]))


def test_mix_gives_every_purpose_its_own_seed():
    seeds = {bgbias.mix(*numbers) for numbers in np.ndindex(6, 6, 6)}
    assert len(seeds) == 216 and all(0 <= s < 2**64 for s in seeds)
    assert bgbias.mix(1, 2) == bgbias.mix(1, 2)


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


def test_conditions_by_hand():
    """Two pixels, all foreground and three fifths; each condition is one line of arithmetic."""
    model = Embedder("smallconv", "none", 32)
    photo = torch.tensor([[200, 100], [50, 100], [0, 100], [255, 153]]).reshape(1, 4, 1, 2)
    drawn = torch.tensor([[10, 20], [30, 40], [50, 60]]).reshape(1, 1, 3, 1, 2)
    mean, std = (np.array(RGB) * 255 for RGB in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    first, second = np.array([200, 50, 0]), np.array([100, 100, 100])
    pixels = {
        "clean": (first, second),
        "replaced_0": (first, 0.6 * second + 0.4 * np.array([20, 40, 60])),
        "object_only": (first, 0.6 * second + 0.4 * mean),
        "background_only": (mean, 0.4 * second + 0.6 * mean),
    }
    found = dict(conditions(photo.byte(), drawn.byte(), model, everything=True))
    assert list(found) == list(pixels)
    for name, pair in pixels.items():
        expected = (np.stack(pair, axis=1) - mean[:, None]) / std[:, None]
        np.testing.assert_allclose(found[name][0, :, 0].numpy(), expected, atol=1e-4)


def test_conditions_without_draws_are_clean_only():
    model, photo = Embedder("smallconv", "none", 32), torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
    assert [name for name, _ in conditions(photo, torch.empty(0), model)] == ["clean"]
    two = torch.zeros(2, 2, 3, 3, 3, dtype=torch.uint8)
    found = [name for name, _ in conditions(photo, two, model)]
    assert found == ["clean", "replaced_0", "replaced_1"]
