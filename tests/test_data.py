"""Data: the three datasets as users have them, a user's own folder, the toy set, one mask rule."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import bgbias
from bgbias import SPLITS, UserError, list_backgrounds, load_splits, make_toy, mask_path, open_rgb
from conftest import write_image


def annotations(**columns):
    """A MATLAB struct array as in the Cars196 devkit."""
    rows = list(zip(*columns.values()))
    kinds = [(name, object) for name in columns]
    return {"annotations": np.array([tuple(row) for row in rows], dtype=kinds)[None]}


@pytest.fixture
def cars(tmp_path):
    """The same six photos (three classes, told apart by grey level) in both layouts of Cars196."""
    grey = lambda k: Image.new("RGB", (8, 8), (k, k, k))
    classes, part = [1, 99, 196, 1, 99, 196], [0, 1, 1, 1, 0, 0]
    old, new = tmp_path / "old", tmp_path / "new/stanford_cars"
    for folder in (old / "car_ims", new / "cars_train", new / "cars_test", new / "devkit"):
        folder.mkdir(parents=True)
    names = [f"car_ims/{i + 1:06d}.jpg" for i in range(6)]
    for name, label in zip(names, classes):
        grey(label).save(old / name)
    savemat(old / "cars_annos.mat", annotations(relative_im_path=names, **{"class": classes}, test=part))
    # In the other layout each part has its own order and its own 00001.jpg.
    for test, folder, file in ((0, "cars_train", "devkit/cars_train_annos.mat"),
                               (1, "cars_test", "cars_test_annos_withlabels.mat")):
        own = [label for label, p in zip(classes, part) if p == test][::-1]
        names = [f"{i + 1:05d}.jpg" for i in range(3)]
        for name, label in zip(names, own):
            grey(label).save(new / folder / name)
        savemat(new / file, annotations(**{"class": own}, fname=names))
    return old, tmp_path / "new"


def test_both_cars_layouts_give_a_photo_the_same_class(cars):
    found = []
    for data in cars:
        items = bgbias.list_cars196(bgbias.dataset_root("cars196", data))
        assert all(abs(np.asarray(Image.open(path)).mean() - (label + 1)) < 2 for path, label in items)
        found.append(sorted(label for _, label in items))
    assert found[0] == found[1] == [0, 0, 98, 98, 195, 195]


def test_cars_with_the_test_labels_inside_the_devkit(cars):
    root = cars[1] / "stanford_cars"
    name = "cars_test_annos_withlabels.mat"
    (root / name).rename(root / "devkit" / name)
    assert len(bgbias.list_cars196(root)) == 6


def test_cars_photos_of_equal_name_have_masks_of_their_own(cars):
    root = cars[1] / "stanford_cars"
    masks = [mask_path(root, path) for path, _ in bgbias.list_cars196(root)]
    assert len(set(masks)) == 6
    assert mask_path(root, root / "cars_test/00001.jpg") == root / "masks/cars_test/00001.png"


def test_wrong_counts_and_missing_lists_are_named(cars, tmp_path):
    with pytest.raises(UserError, match="6 images, 4 for testing, instead of 16,185 and 8,131"):
        load_splits("cars196", cars[0])
    (cars[1] / "stanford_cars/devkit/cars_train_annos.mat").unlink()
    with pytest.raises(UserError, match="cars_train_annos.mat: .*No such file.*list of the dataset is missing"):
        load_splits("cars196", cars[1])
    with pytest.raises(UserError, match="no sop, looked in it and one folder deeper for Stanford_Online_Products"):
        load_splits("sop", tmp_path)


def test_the_photos_of_a_named_dataset_go_where_their_class_belongs(cars, monkeypatch):
    monkeypatch.setitem(bgbias.COUNTS, "cars196", (6, 2))
    parts = {"train": range(0, 98), "val": range(98, 99), "test": range(99, 196)}
    monkeypatch.setitem(SPLITS, "cars196", parts)
    for data in cars:
        splits = load_splits("cars196", data, need_masks=False)
        for part, label in {"train": 0, "val": 98, "test": 195}.items():
            images, masks, labels = splits[part]
            assert labels.tolist() == [label, label] and len(set(images)) == 2
            assert all(abs(np.asarray(Image.open(path)).mean() - (label + 1)) < 2 for path in images)
            root = bgbias.dataset_root("cars196", data)
            assert masks == [mask_path(root, image) for image in images]
        with pytest.raises(UserError, match="missing mask, one of 6; run: python masks.py --dataset"):
            load_splits("cars196", data)
        splits["test"].images[1].unlink()
        with pytest.raises(UserError, match=f"{splits['test'].images[1]}: missing image, one of 1; unpack"):
            load_splits("cars196", data, need_masks=False)


def test_broken_lists_are_named(cars, tmp_path):
    for file in ("old/cars_annos.mat", "new/stanford_cars/cars_test_annos_withlabels.mat"):
        (tmp_path / file).write_text("<html>404</html>")
    for data in cars:
        with pytest.raises(UserError, match=r"annos.*\.mat: .*missing or broken, get it again; see README, Data"):
            load_splits("cars196", data)
    (make_sop(tmp_path, {"train": [2], "test": [2]}) / "Ebay_test.txt").write_text("a b\n1 2 3\n")
    with pytest.raises(UserError, match="Ebay_test.txt: .*missing or broken, get it again; see README, Data"):
        load_splits("sop", tmp_path)


@pytest.mark.parametrize("dataset, train_and_val, images, tests", [
    ("cars196", 98, 196, 98), ("cub200", 100, 200, 100), ("sop", 11318, 22634, 11316)])
def test_splits_are_disjoint_and_complete(dataset, train_and_val, images, tests):
    parts = SPLITS[dataset]
    assert sorted(label for part in parts.values() for label in part) == list(range(images))
    assert len(parts["train"]) + len(parts["val"]) == train_and_val and len(parts["test"]) == tests


# Photos in each of CUB's classes, counted from its own image_class_labels.txt.
CUB_CLASS_SIZES = [
    60, 60, 58, 60, 44, 41, 53, 48, 59, 60, 60, 56, 60, 60, 58, 58, 57, 45, 59, 59, 60, 56, 59,
    52, 60, 60, 60, 59, 60, 60, 60, 53, 59, 59, 60, 60, 59, 60, 59, 60, 60, 60, 59, 60, 60, 60,
    60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 58, 60, 59, 60, 60, 60, 60, 50, 60, 60, 60, 60,
    60, 60, 60, 60, 60, 57, 60, 60, 59, 60, 60, 60, 60, 60, 53, 60, 60, 60, 60, 60, 60, 60, 60,
    60, 60, 60, 60, 59, 60, 60, 60, 50, 60, 60, 60, 49, 60, 59, 60, 60, 60, 60, 60, 50, 60, 59,
    60, 59, 60, 59, 60, 60, 60, 60, 59, 59, 59, 60, 60, 60, 60, 60, 60, 60, 60, 59, 60, 60, 60,
    60, 60, 58, 60, 60, 60, 60, 60, 60, 60, 59, 60, 51, 60, 59, 60, 60, 60, 59, 60, 60, 59, 60,
    60, 60, 60, 60, 59, 60, 59, 59, 60, 60, 60, 60, 60, 60, 60, 60, 56, 59, 60, 59, 60, 60, 60,
    60, 60, 50, 60, 60, 58, 60, 60, 60, 60, 60, 59, 60, 60, 60, 60,
]


def test_cub_split_sizes_follow_from_the_official_list():
    labels = np.repeat(range(200), CUB_CLASS_SIZES)
    sizes = {part: np.isin(labels, SPLITS["cub200"][part]).sum() for part in SPLITS["cub200"]}
    assert sizes == {"train": 4373, "val": 1491, "test": 5924}
    assert bgbias.COUNTS["cub200"] == (len(labels), sizes["test"])


def make_sop(data, sizes):
    """Stanford Online Products with sizes[part] = [images of each class], 1 px photos and masks."""
    root, label, number = data / "Stanford_Online_Products", 0, 0
    root.mkdir(parents=True)
    for part, counts in sizes.items():
        lines = ["image_id class_id super_class_id path"]
        for count in counts:
            label += 1
            for i in range(count):
                number += 1
                path = f"chair_final/{label}_{i}.JPG"
                lines.append(f"{number} {label} 1 {path}")
        (root / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_sop_lists(tmp_path):
    root = make_sop(tmp_path, {"train": [2, 1], "test": [3]})
    items = bgbias.list_sop(root)
    assert [label for _, label in items] == [0, 0, 1, 2, 2, 2]
    assert items[0][0] == root / "chair_final/1_0.JPG"
    assert mask_path(root, items[0][0]) == root / "masks/chair_final/1_0.png"


def split_sizes(splits):
    return [len(splits[part].images) for part in ("train", "val", "test")]


def test_own_folder(shop):
    splits = load_splits(str(shop / "shop"))
    assert split_sizes(splits) == [12, 4, 20]
    for part, classes in {"train": range(3), "val": [3], "test": range(4, 9)}.items():
        images, masks, labels = splits[part]
        assert images == [shop / f"shop/images/c{c}/p{i}.jpg" for c in classes for i in range(4)]
        assert masks == [shop / f"shop/masks/c{c}/p{i}.png" for c in classes for i in range(4)]
        assert labels.tolist() == [c for c in classes for _ in range(4)]


@pytest.mark.parametrize("classes", range(3, 60))
def test_own_folder_parts_are_never_empty(classes):
    parts = bgbias.split_classes("my_photos", classes, training=True)
    assert sorted(label for part in parts.values() for label in part) == list(range(classes))
    assert all(len(part) for part in parts.values())
    assert abs(len(parts["train"]) - classes * 74 / 196) <= 1


def test_empty_class_folders_and_other_files_do_not_count(shop):
    (shop / "shop/images/a_empty").mkdir()
    (shop / "shop/images/c0/notes.txt").write_text("no photo")
    splits = load_splits(str(shop / "shop"))
    labels = np.concatenate([splits[part].labels for part in ("train", "val", "test")])
    assert labels.tolist() == np.repeat(range(9), 4).tolist()


def test_upper_case_and_webp_photos_count(shop):
    write_image(shop / "shop/images/c0/q.WEBP", np.random.default_rng(1))
    (shop / "shop/images/c0/p0.jpg").rename(shop / "shop/images/c0/p0.JPG")
    assert split_sizes(load_splits(str(shop / "shop"), need_masks=False)) == [13, 4, 20]


# Each makes something at a path that a photo could have.
NO_PHOTOS = {
    ".hidden.jpg": lambda path: write_image(path, np.random.default_rng(2)),
    "._p0.jpg": lambda path: path.write_bytes(b"what macOS leaves on a stick"),
    "folder.jpg": lambda path: write_image(path / "p9.jpg", np.random.default_rng(2)),
    "pipe.jpg": os.mkfifo,
    "nowhere.jpg": lambda path: path.symlink_to("gone.jpg"),
    "raw.tiff": lambda path: write_image(path, np.random.default_rng(2)),
}


@pytest.mark.parametrize("name", NO_PHOTOS)
def test_what_is_no_photo_is_left_out(shop, name):
    """Of a class of a folder, and of a pool; to open a pipe would wait for ever."""
    own, backgrounds = str(shop / "shop"), shop / "data/unsplash_backgrounds"
    splits, pool = load_splits(own), list_backgrounds(backgrounds, "val")
    for folder in ("shop/images/c0", "shop/images/c4", "data/unsplash_backgrounds/val"):
        NO_PHOTOS[name](shop / folder / name)
    for part, split in load_splits(own).items():
        assert split.images == splits[part].images and split.masks == splits[part].masks
        assert split.labels.tolist() == splits[part].labels.tolist()
    assert list_backgrounds(backgrounds, "val") == pool


def test_a_link_to_a_photo_is_a_photo(shop):
    (shop / "shop/images/c0/p9.jpg").symlink_to(shop / "shop/images/c0/p0.jpg")
    assert split_sizes(load_splits(str(shop / "shop"), need_masks=False)) == [13, 4, 20]


def test_what_is_missing_is_named(shop):
    own = str(shop / "shop")
    mask = shop / "shop/masks/c3/p1.png"
    mask.unlink()
    message = f"{mask}: missing mask, one of 1; run: python masks.py --dataset {own} \\("
    with pytest.raises(UserError, match=message):
        load_splits(own)
    assert split_sizes(load_splits(own, need_masks=False)) == [12, 4, 20]
    with pytest.raises(UserError, match="nowhere: neither cars196, cub200, sop, toy nor a folder"):
        load_splits(str(shop / "nowhere"))


def test_two_photos_with_one_mask(shop):
    write_image(shop / "shop/images/c0/p0.png", np.random.default_rng(1))
    with pytest.raises(UserError, match="masks/c0/p0.png: would be the mask of two photos"):
        load_splits(str(shop / "shop"))


def refused(own, part):
    """load_splits refuses the folder and says what one must look like."""
    with pytest.raises(UserError) as error:
        load_splits(str(own))
    assert f"{own}: no class with two photos for {part}; it takes three folders" in str(error.value)
    assert f"{own}/images/<class>/ of photos" in str(error.value)


def test_too_few_classes_or_photos(shop):
    own = shop / "shop"
    for label in range(4, 9):  # all that are for testing have one photo left
        for i in range(1, 4):
            (own / f"images/c{label}/p{i}.jpg").unlink()
    refused(own, "test")
    for label in range(2, 9):
        shutil.rmtree(own / f"images/c{label}")
    refused(own, "test")
    shutil.rmtree(own / "images/c1")
    refused(own, "val")


def test_images_without_class_folders_or_without_photos(shop):
    own = shop / "shop"
    photos = sorted(own.glob("images/*/*.jpg"))
    for number, photo in enumerate(photos):
        photo.rename(own / f"images/{number}.jpg")
    refused(own, "train")  # the class folders are empty now
    for label in range(9):
        (own / f"images/c{label}").rmdir()
    refused(own, "train")
    for photo in own.glob("images/*.jpg"):
        photo.unlink()
    assert not list((own / "images").iterdir())
    refused(own, "train")
    for label in range(9):
        (own / f"images/c{label}").mkdir()
    refused(own, "train")


def test_backgrounds_are_sorted_and_needed(shop):
    pool = list_backgrounds(shop / "data/unsplash_backgrounds", "val")
    assert [path.name for path in pool] == ["b0.jpg", "b1.jpg", "b2.jpg"]
    with pytest.raises(UserError, match="--backgrounds .*: no photos in"):
        list_backgrounds(shop / "data", "val")


def test_every_kind_of_image_opens_as_rgb(tmp_path):
    grey = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
        Image.fromarray(grey).convert(mode).save(path)
        image = open_rgb(path)
        assert image.mode == "RGB" and image.size == (13, 4)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "deep.png"))[..., 0], grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees": PIL does not, so neither do we
    Image.fromarray(grey).save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(tmp_path / "turned.jpg").size == (13, 4)


def png(width, height, data):
    """A PNG file, whatever its header says."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, chunk in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
        content += struct.pack(">I", len(chunk)) + name + chunk
        content += struct.pack(">I", zlib.crc32(name + chunk))
    return content


def bmp(width, height, data):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + len(data), 0, 0, 54) + header + data


def test_the_files_of_the_next_test_are_images_but_for_their_header(tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 1, b"\0abcdef"))
    (tmp_path / "b.png").write_bytes(bmp(2, 1, b"cbafed\0\0"))
    for name in ("a.png", "b.png"):
        assert open_rgb(tmp_path / name).tobytes() == b"abcdef"


JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffdb0043000806060706")
BROKEN = {
    "empty": b"",
    "a JPEG of 30 bytes": JPEG,
    "a PNG signature": png(2, 1, b"")[:8],
    "a PNG that says it is giant": png(60_000, 60_000, b"\0abc"),
    "a BMP that says it is giant": bmp(60_000, 60_000, b"abc"),
    "a PNG without pixels": png(20, 20, b""),
    "a PNG of size 0": png(0, 0, b""),
    "a page": b"<html>404</html>",
    "noise": np.random.default_rng(0).bytes(500),
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_image_is_named(content, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(BROKEN[content])
    with pytest.raises(UserError) as error:
        open_rgb(path)
    assert str(error.value).startswith(f"{path}: no readable image: ")
    assert str(error.value).endswith("; replace or remove it") and "\n" not in str(error.value)


def test_one_line_of_an_error():
    assert bgbias.one_line(ValueError("first\n  second\tthird ")) == "first second third"
    assert bgbias.one_line(MemoryError()) == "MemoryError()"  # it has no text
    assert bgbias.one_line(OSError("x" * 500)) == 150 * "x"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_image_cut_short_is_named_wherever_it_is_cut(suffix, tmp_path):
    write_image(tmp_path / f"whole.{suffix}", np.random.default_rng(0))
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in range(0, len(content) * 3 // 4, 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"cut.{suffix}: no readable image: .*replace or remove it"):
            open_rgb(path)


def test_toy_is_whole_and_always_the_same(toy):
    splits = load_splits("toy", toy.parent)
    assert split_sizes(splits) == [2000, 400, 1000]
    assert {part: sorted(set(split.labels.tolist())) for part, split in splits.items()} == {
        part: list(classes) for part, classes in SPLITS["toy"].items()}
    again = [pair for _, pair in zip(range(3), bgbias.toy_class(np.random.default_rng([2022, 5])))]
    for i, (photo, mask) in enumerate(again):
        assert np.array_equal(photo, Image.open(toy / f"images/005/{i:02d}.png"))
        assert np.array_equal(mask, Image.open(toy / f"masks/005/{i:02d}.png"))


def test_toy_masks_are_exact_and_most_photos_share_the_sellers_backdrop(toy):
    """Where the mask is empty, a photo shows its backdrop: a two-colour texture, which is the
    class's own in most photos and unlike that of other classes."""
    colours = []
    for label in range(30):
        own = []
        for path in sorted((toy / f"images/{label:03d}").iterdir()):
            photo = np.asarray(Image.open(path), float)
            mask = np.asarray(Image.open(mask_path(toy, path)))
            assert 0.15 < (mask > 127).mean() < 0.85
            outside = photo[mask == 0]
            own.append(outside.mean(axis=0) / outside.mean())
        colours.append(np.array(own))
    within = np.mean([np.median(np.abs(own - np.median(own, axis=0))) for own in colours])
    across = np.median(np.abs(np.concatenate(colours) - np.median(np.concatenate(colours), axis=0)))
    assert within < across / 2


def test_toy_pools_are_apart_from_each_other_and_from_the_sellers(toy):
    pools = {part: {path.read_bytes() for path in list_backgrounds(toy / "backgrounds", part)}
             for part in ("val", "test")}
    assert len(pools["val"]) == len(pools["test"]) == 100
    assert not pools["val"] & pools["test"]


def test_make_toy_leaves_an_existing_folder_alone(tmp_path):
    (tmp_path / "toy").mkdir()
    assert make_toy(tmp_path / "toy") == tmp_path / "toy"
    assert not list(Path(tmp_path / "toy").iterdir())
