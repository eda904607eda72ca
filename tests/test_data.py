"""Data: the three datasets as users have them, a user's own folder, the toy set, readable images."""

import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

import bgbias
import masks
from bgbias import (
    SPLITS, Photos, UserError, list_backgrounds, list_photos, load_splits, mask_path, open_image, open_rgb, parse_args)
from conftest import ROOT, write_image

# ---- The three datasets --------------------------------------------------------------------------


def annotations(**columns):
    """A MATLAB struct array as in the Cars196 devkit."""
    fields = [(name, object) for name in columns]
    return {"annotations": np.array(list(zip(*columns.values())), dtype=fields)[None]}


@pytest.fixture
def cars(tmp_path):
    """The same twelve photos (six classes, told apart by grey level) in both layouts of Cars196."""
    classes, is_test = [1, 40, 99, 130, 160, 196] * 2, [0, 1, 1, 0] * 3
    old, new = tmp_path / "old", tmp_path / "new/stanford_cars"
    for folder in (old / "car_ims", new / "cars_train", new / "cars_test", new / "devkit"):
        folder.mkdir(parents=True)
    names = [f"car_ims/{i + 1:06d}.jpg" for i in range(12)]
    for name, label in zip(names, classes):
        Image.new("RGB", (8, 8), (label, label, label)).save(old / name)
    savemat(old / "cars_annos.mat", annotations(relative_im_path=names, **{"class": classes}, test=is_test))
    # In the other layout each part has its own order and its own 00001.jpg.
    for test, folder, file in ((0, "cars_train", "devkit/cars_train_annos.mat"),
                               (1, "cars_test", "cars_test_annos_withlabels.mat")):
        own = [label for label, of_test in zip(classes, is_test) if of_test == test][::-1]
        names = [f"{i + 1:05d}.jpg" for i in range(6)]
        for name, label in zip(names, own):
            Image.new("RGB", (8, 8), (label, label, label)).save(new / folder / name)
        savemat(new / file, annotations(**{"class": own}, fname=names))
    return old, tmp_path / "new"


def test_both_cars_layouts_give_each_photo_its_class_and_mask(cars, monkeypatch):
    monkeypatch.setitem(bgbias.COUNTS, "cars196", (12, 4))
    ranges = {"train": range(0, 98), "val": range(98, 130), "test": range(130, 196)}
    monkeypatch.setitem(SPLITS, "cars196", ranges)
    for data, photo, mask in [(cars[0], "old/car_ims/000003.jpg", "old/masks/car_ims/000003.png"),
                              (cars[1], "new/stanford_cars/cars_test/00002.jpg",
                               "new/stanford_cars/masks/cars_test/00002.png")]:
        splits = load_splits("cars196", data, need_masks=False)
        for name, classes in {"train": [0, 39], "val": [98, 129], "test": [159, 195]}.items():
            images, _, labels = splits[name]
            assert sorted(labels.tolist()) == sorted(2 * classes) and len(set(images)) == 4
            for path, label in zip(images, labels, strict=True):
                assert abs(np.asarray(Image.open(path)).mean() - (label + 1)) < 2
        masks = {image: mask for split in splits.values() for image, mask in zip(split.images, split.masks)}
        parent = data.parent
        assert masks[parent / photo] == parent / mask and len(set(masks.values())) == 12
        with pytest.raises(UserError, match=f"{data}/.*png: .*python masks.py --dataset cars196 --data {data}$"):
            load_splits("cars196", data)
        (parent / photo).unlink()
        with pytest.raises(UserError, match=f"{parent / photo}: "):
            load_splits("cars196", data, need_masks=False)


def move(old, new):
    new.parent.mkdir(parents=True, exist_ok=True)
    old.rename(new)


def nest(root):
    """Kaggle's cars_train/cars_train/00001.jpg."""
    for folder in ("cars_train", "cars_test"):
        move(root / folder, root / "here")
        move(root / "here", root / folder / folder)


def relabel(path, number):
    """Changes the labels of a list: number(label), or no labels for None."""
    rows = loadmat(path, simplify_cells=True)["annotations"]
    columns = {"fname": [row["fname"] for row in rows]}
    if number:
        columns["class"] = [number(row["class"]) for row in rows]
    savemat(path, annotations(**columns))


def leave_old_files(root):
    """An old, partial car_ims/ beside the set and above it, a hidden folder of an unpacking that was stopped, and
    the files that macOS writes beside others."""
    for folder in (root, root.parent):
        write_image(folder / "car_ims/000001.jpg", np.random.default_rng(0))
    savemat(root / "cars_annos.mat", annotations(relative_im_path=["car_ims/000001.jpg"] * 2, **{"class": [1, 2]}))
    (root.parent / ".unpacking/stanford_cars/cars_train").mkdir(parents=True)
    (root / "devkit/._cars_train_annos.mat").write_bytes(b"Mac OS X")


LABELS = "cars_test_annos_withlabels.mat"
CARS_THAT_WORK = {
    "torchvision": lambda root: None,
    "test labels in the devkit": lambda root: move(root / LABELS, root / "devkit" / LABELS),
    "car_devkit.tgz unpacked beside": lambda root: move(root / "devkit", root / "car_devkit/devkit"),
    "nested folders of Kaggle": nest,
    "renamed by a browser": lambda root: move(root / LABELS, root / "cars_test_annos_withlabels (1).mat"),
    "the devkit's test list too": lambda root: (
        shutil.copy(root / LABELS, root / "devkit/cars_test_annos.mat"),
        relabel(root / "devkit/cars_test_annos.mat", None)),
    "labels from 0": lambda root: [relabel(root / name, lambda label: label - 1)
                                   for name in (LABELS, "devkit/cars_train_annos.mat")],
    "two folders deeper": lambda root: move(root, root.parent / "archive/stanford_cars"),
    "no folder of its own": lambda root: [move(path, root.parent / path.name) for path in sorted(root.iterdir())],
    "old files": leave_old_files}


@pytest.mark.parametrize("layout", CARS_THAT_WORK)
def test_layouts_of_cars_that_people_have(cars, layout, monkeypatch):
    """Every photo has the grey level of its class, and no mask belongs to two photos."""
    monkeypatch.setitem(bgbias.COUNTS, "cars196", (12, 8))
    CARS_THAT_WORK[layout](cars[1] / "stanford_cars")
    splits = load_splits("cars196", cars[1], need_masks=False)
    images = sum((split.images for split in splits.values()), [])
    labels = np.concatenate([split.labels for split in splits.values()])
    assert sorted(labels) == sorted([0, 39, 98, 129, 159, 195] * 2)
    for path, label in zip(images, labels, strict=True):
        assert abs(np.asarray(Image.open(path)).mean() - (label + 1)) < 2
    assert len(set(sum((split.masks for split in splits.values()), []))) == 12


def kaggle_bundle(root):
    """Nested folders, and only the list of the other layout, whose names do not fit."""
    nest(root)
    move(root / LABELS, root / "cars_annos.mat")
    shutil.rmtree(root / "devkit")


def by_classes(root):
    """Kaggle's car_data/car_data/train/<class>/. The folders sort in another order than the official classes."""
    for part in ("train", "test"):
        folder = root / f"car_data/car_data/{part}/AM General Hummer SUV 2000"
        move(root / f"cars_{part}/00001.jpg", folder / "00001.jpg")
        shutil.rmtree(root / f"cars_{part}")


KAGGLE, ISSUE = "https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars", "pytorch/vision/issues/7545"
CARS_THAT_LACK = {
    "labels of Kaggle's bundle": (kaggle_bundle, "cars_train_annos.mat", ISSUE),
    "test labels": (lambda root: move(root / LABELS, root.parent / LABELS), LABELS, ISSUE),
    "labels in the test list": (lambda root: relabel(root / LABELS, None), LABELS, ISSUE),
    "a good list": (lambda root: (root / LABELS).write_text("<html>404</html>"), LABELS, ISSUE),
    "the end of a list": (lambda root: (root / LABELS).write_bytes((root / LABELS).read_bytes()[:300]), LABELS, ISSUE),
    "cars_test": (lambda root: shutil.rmtree(root / "cars_test"), "cars_test/", KAGGLE),
    "the list of car_ims": (lambda root: (shutil.rmtree(root / "cars_test"), (root / "car_ims").mkdir()),
                            "cars_annos.mat", "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset"),
    "the official order of the classes": (by_classes, "cars_train or car_ims", KAGGLE)}


@pytest.mark.parametrize("lack", CARS_THAT_LACK)
def test_cars_that_lack_a_file_say_which_and_where_it_is(cars, lack, failure):
    change, file, address = CARS_THAT_LACK[lack]
    change(cars[1] / "stanford_cars")
    line = failure(["--dataset", "cars196", "--data", cars[1]], masks.main)
    assert file in line and address in line, line


@pytest.mark.parametrize("dataset, place", [
    ("cub200", "CUB_200_2011/images"), ("sop", "Stanford_Online_Products/Ebay_train.txt"), ("cars196", "car_ims")])
def test_a_dataset_is_found_up_to_two_folders_deeper_and_not_in_hidden_folders(tmp_path, dataset, place):
    (tmp_path / ".new" / place).mkdir(parents=True)
    (tmp_path / "a/.new" / place).mkdir(parents=True)
    with pytest.raises(UserError, match=f"--data {tmp_path}: .*{re.escape(bgbias.SOURCES[dataset])}"):
        bgbias.dataset_root(dataset, tmp_path)
    for folder in ("a/b", "c", "."):  # the nearest one is taken
        (tmp_path / folder / place).mkdir(parents=True)
        assert bgbias.dataset_root(dataset, tmp_path) == (tmp_path / folder / place).parent


def test_wrong_numbers_of_photos_and_missing_files_are_named(cars, tmp_path):
    with pytest.raises(UserError, match=f"{cars[0]}: 12 .*16,185 and 8,131"):
        load_splits("cars196", cars[0])
    for label in range(3):  # an archive that was not unpacked to its end
        write_image(tmp_path / f"CUB_200_2011/images/{label:03d}/1.jpg", np.random.default_rng(0))
    with pytest.raises(UserError, match=f"{tmp_path}/CUB_200_2011: 3 .*11,788 and 5,924"):
        load_splits("cub200", tmp_path)
    with pytest.raises(UserError, match=f"--data {tmp_path}: Stanford_Online_Products"):
        load_splits("sop", tmp_path)


@pytest.mark.parametrize("dataset, classes, trained, images, tested", [
    ("cars196", 196, 98, 8054 + 8131, 8131), ("cub200", 200, 100, 5864 + 5924, 5924),
    ("sop", 22634, 11318, 59551 + 60502, 60502)])
def test_splits_and_counts_are_those_of_the_literature(dataset, classes, trained, images, tested):
    """The first half of the classes (of SOP, its own split); a quarter of those is for validation."""
    ranges = SPLITS[dataset]
    assert [*ranges["train"], *ranges["val"], *ranges["test"]] == list(range(classes))
    assert (len(ranges["train"]), ranges["test"].start) == (math.ceil(0.75 * trained), trained)
    assert bgbias.COUNTS[dataset] == (images, tested)


def test_sop_lists(tmp_path):
    header = "image_id class_id super_class_id path\n"
    (tmp_path / "Ebay_train.txt").write_text(header + "1 1 1 chair_final/a.JPG\n2 1 1 chair_final/b.JPG\n")
    (tmp_path / "Ebay_test.txt").write_text(header + "3 2 7 sofa_final/a.JPG\n")
    expected = [("chair_final/a.JPG", 0), ("chair_final/b.JPG", 0), ("sofa_final/a.JPG", 1)]
    assert bgbias.list_sop(tmp_path) == [(tmp_path / name, label) for name, label in expected]
    assert mask_path(tmp_path, tmp_path / "sofa_final/a.JPG") == tmp_path / "masks/sofa_final/a.png"


# ---- A folder of the user's own ------------------------------------------------------------------


def split_sizes(splits):
    """The number of photos of each split. None is left out."""
    assert [*splits] == ["train", "val", "test", "left_out"] and splits["left_out"].images == []
    return [len(splits[name].images) for name in ("train", "val", "test")]


def test_own_folder(shop):
    splits = load_splits(str(shop / "shop"))
    for name, classes in {"train": range(3), "val": range(3, 5), "test": range(5, 9)}.items():
        images, masks, labels = splits[name]
        assert images == [shop / f"shop/images/c{c}/p{i}.jpg" for c in classes for i in range(4)]
        assert masks == [shop / f"shop/masks/c{c}/p{i}.png" for c in classes for i in range(4)]
        assert labels.tolist() == [c for c in classes for _ in range(4)]
    assert split_sizes(load_splits(str(shop / "shop"), measure="all")) == [0, 0, 36]
    for name, split in load_splits(str(shop / "shop"), measure="test").items():  # those of a training
        assert (split.images, split.labels.tolist()) == (splits[name].images, splits[name].labels.tolist())


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 2), (3, 2, 4), (8, 2, 10), (23, 7, 30), (74, 24, 98)])
def test_own_folder_is_split_like_cars196(tmp_path, sizes):
    """74 : 24 : 98, but two classes at least, because one class alone has no wrong photos."""
    for c in range(sum(sizes)):
        (tmp_path / f"images/{c:03d}").mkdir(parents=True)
        for i in range(2):
            (tmp_path / f"images/{c:03d}/{i}.jpg").touch()
    splits = load_splits(str(tmp_path), need_masks=False)
    labels = [splits[name].labels.tolist() for name in ("train", "val", "test")]
    assert sum(labels, []) == np.repeat(range(sum(sizes)), 2).tolist()
    assert [len(own) // 2 for own in labels] == list(sizes)


@pytest.mark.parametrize("suffix", ["JPG", "jfif", "WEBP", "gif", "bmp", "tif", "tiff", "avif"])
def test_other_formats_are_photos_of_their_class(shop, suffix):
    """Were the class left out, the labels of all others would change."""
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip("this Pillow does not read it")
    folder, rng = shop / "shop/images/c0", np.random.default_rng(1)
    for i in range(4):
        (folder / f"p{i}.jpg").unlink()
        write_image(folder / f"p{i}.{suffix}", rng)
    (folder / f"p4.{suffix}").symlink_to(folder / f"p0.{suffix}")
    images, _, labels = load_splits(str(shop / "shop"), need_masks=False)["train"]
    assert images[:5] == [folder / f"p{i}.{suffix}" for i in range(5)] == list_photos(folder)
    assert labels.tolist() == 5 * [0] + 4 * [1] + 4 * [2]
    assert Photos(images[:5], None, 32)[4].shape == (3, 36, 45)


def test_a_class_and_a_pool_hold_photos_only_and_the_rest_is_counted(shop, capsys):
    own = shop / "shop"
    splits, pool = load_splits(str(own)), pool_of(own)
    assert capsys.readouterr().out == ""
    for name in ("c0/a.txt", "c8/b.TXT", "c1/x.heic", "c1/.hidden.jpg", "readme.md", "loose.jpg", "b9/y.heic",
                 "c2/LICENSE", "c3/IMG_0001", "../backgrounds/val/z.txt", "../backgrounds/val/.hidden.jpg",
                 "../backgrounds/val/IMG_2.HEIC"):
        (own / "images" / name).parent.mkdir(exist_ok=True)
        (own / "images" / name).touch()
    for folder in ("images/c0", "backgrounds/val"):
        write_image(own / folder / "folder.jpg/p9.jpg", np.random.default_rng(2))
        os.mkfifo(own / folder / "pipe.png")  # to open it would wait forever
        (own / folder / "nowhere.webp").symlink_to("gone.webp")
    for split, before in zip(load_splits(str(own)).values(), splits.values(), strict=True):
        assert (split.images, split.masks) == (before.images, before.masks)
        assert split.labels.tolist() == before.labels.tolist()
    heic = "; for HEIC photos, run: pip install pillow-heif\n"
    rest = {".png", ".webp", "sub-folders or folders without photos"}  # one of each
    line = capsys.readouterr().out
    assert line.startswith(f"left out of {own}/images: ") and line.endswith(heic) and line.count("\n") == 1
    assert left_out_in(line) == dict.fromkeys(rest | {".jpg", ".md"}, 1) | {
        ".txt": 2, ".heic": 2, "files without a suffix": 2}
    assert pool_of(own) == pool
    folder = own / "backgrounds/val"
    bgbias.print_left_out(folder, bgbias.visible(folder), pool)
    line = capsys.readouterr().out
    assert line.startswith(f"left out of {folder}: ") and line.endswith(heic) and line.count("\n") == 1
    assert left_out_in(line) == dict.fromkeys(rest | {".txt", ".heic"}, 1)


def left_out_in(line):
    """{what: how many} of "left out of FOLDER: 1 .jpg, 2 .txt; ..."."""
    entries = line.partition(": ")[2].partition(";")[0].split(", ")
    return {what: int(count) for count, what in (entry.split(" ", 1) for entry in entries)}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every folder")
@pytest.mark.parametrize("name", ["images/c0", "images"])
def test_a_folder_that_may_not_be_read_is_not_skipped(shop, name):
    (shop / "shop" / name).chmod(0)
    try:
        with pytest.raises(PermissionError, match=name):
            load_splits(str(shop / "shop"))
    finally:
        (shop / "shop" / name).chmod(0o755)


def pool_of(folder, *flags):
    return list_backgrounds(parse_args(["--dataset", str(folder), *flags]), "val")


def test_missing_masks_and_folders_are_named(shop):
    own, mask = str(shop / "shop"), shop / "shop/masks/c3/p1.png"
    mask.unlink()
    with pytest.raises(UserError, match=f"{mask}: .*python masks.py --dataset {own}$"):
        load_splits(own)
    assert split_sizes(load_splits(own, need_masks=False)) == [12, 8, 16]
    with pytest.raises(UserError, match=f"--dataset {shop}/nowhere: "):
        load_splits(str(shop / "nowhere"))


def rename_masks(own, name):
    for mask in sorted(own.glob("masks/*/*")):
        mask.rename(mask.with_name(name.format(mask.stem)))


def test_masks_under_other_names_are_not_called_missing_only(shop):
    """As rembg's users name them. The command would make them anew. Hidden files are no masks."""
    own = shop / "shop"
    (own / "masks/c0/.DS_Store").touch()
    rename_masks(own, "{}_mask.png")
    with pytest.raises(UserError) as error:
        load_splits(str(own))
    assert re.search(f"^{own}/masks/c0/p0.png: missing .*36 masks.*; {own}/masks has 36 files that fit no photo, such "
                     f"as {own}/masks/c0/p0_mask.png: .* python masks.py --dataset {own}$", str(error.value))
    assert "Unicode" not in str(error.value)
    rename_masks(own, "{:.2}.jpg")
    with pytest.raises(UserError, match="has 36 files that fit no photo, such as .*/p0.jpg"):
        load_splits(str(own))
    rename_masks(own, "{}.png")
    assert split_sizes(load_splits(str(own))) == [12, 8, 16]


def test_a_mask_whose_name_differs_only_in_its_unicode_form(shop):
    """A Mac writes é as e and an accent; zip files and Linux keep it so."""
    own = shop / "shop"
    (own / "images/c0/p0.jpg").rename(own / "images/c0/caf\u00e9.jpg")
    (own / "masks/c0/p0.png").rename(own / "masks/c0/cafe\u0301.png")
    with pytest.raises(UserError, match="caf\u00e9.png: missing .* has 1 files .*cafe\u0301.png .*Unicode"):
        load_splits(str(own))


def test_two_photos_with_one_mask(shop):
    """masks.py lists all of them, and makes the other masks."""
    own, rng = shop / "shop", np.random.default_rng(1)
    write_image(own / "images/c0/p0.png", rng)
    write_image(own / "images/c5/p1.webp", rng)
    with pytest.raises(UserError, match=f"^{own}/masks/c0/p0.png: .*2 such masks.* masks.py --dataset {own} --verify$"):
        load_splits(str(own))
    assert split_sizes(load_splits(str(own), need_masks=False)) == [13, 8, 17]


def test_too_few_classes_or_photos(shop, capsys):
    own = shop / "shop"

    def refused(name, **options):
        with pytest.raises(UserError, match=f"{own}: .* for {name}; .*{own}/images/<class>/"):
            load_splits(str(own), **options)

    def measured_as_a_whole(photos):
        """--measure takes all classes of a folder that cannot be split, with a line that names it."""
        capsys.readouterr()
        assert split_sizes(load_splits(str(own), measure="test")) == [0, 0, photos]
        line, = capsys.readouterr().out.splitlines()
        assert str(own) in line and "all of them are measured" in line

    for path in own.glob("images/c[5-8]/p[1-3].jpg"):  # every test class has one photo
        path.unlink()
    refused("test")
    measured_as_a_whole(24)
    for gone, name in (("c[5-8]", "test"), ("c[2-4]", "val")):
        for path in own.glob(f"images/{gone}"):
            shutil.rmtree(path)
        refused(name)
    measured_as_a_whole(8)  # two classes are enough
    assert split_sizes(load_splits(str(own), measure="all")) == [0, 0, 8] and capsys.readouterr().out == ""
    shutil.rmtree(own / "images/c1")
    for measure in ("test", "all"):
        refused("test", measure=measure)
    (own / "images/c0").rename(shop / "elsewhere")
    with pytest.raises(UserError, match=f"{own}"):  # masks.py with no photo at all
        load_splits(str(own), need_masks=False, measure="all")


# Photos whose mask says nothing, and the share of foreground that their masks have. Of 40 x 32 px, 1 % is 12.8.
UNUSABLE = {"c0/p1": 0, "c2/p0": 1 - 12 / 1280, **{f"c3/p{i}": 12 / 1280 for i in range(4)}}
USABLE = {"c0/p0": 13 / 1280, "c8/p3": 1 - 13 / 1280}


def write_mask(root, photo, foreground):
    pixels = np.zeros(1280, np.uint8)
    pixels[:round(foreground * 1280)] = 255
    Image.fromarray(pixels.reshape(32, 40)).save(root / f"masks/{photo}.png")


def test_photos_with_a_nearly_empty_or_full_mask_are_left_out(shop, capsys):
    """With one line. Classes are numbered and split after that, so a class without any photo leaves no gap."""
    own = shop / "shop"
    for photo, foreground in (UNUSABLE | USABLE).items():
        write_mask(own, photo, foreground)
    for measure in (None, "test", "all"):
        splits = load_splits(str(own), measure=measure)
        line, = capsys.readouterr().out.splitlines()
        assert line.startswith("left out: 6 of 36 photos") and "mask" in line and "left_out.csv" in line
        assert splits["left_out"].images == [own / f"images/{photo}.jpg" for photo in UNUSABLE]
        assert splits["left_out"].masks == [own / f"masks/{photo}.png" for photo in UNUSABLE]
        for split in splits.values():
            assert len(split.images) == len(split.masks) == len(split.labels)
    # Eight classes are split 3 : 2 : 3.
    splits = load_splits(str(own))
    found = {name: {(path.parent.name, int(label)) for path, label in zip(split.images, split.labels)}
             for name, split in splits.items() if name != "left_out"}
    assert found == {"train": {("c0", 0), ("c1", 1), ("c2", 2)}, "val": {("c4", 3), ("c5", 4)},
                     "test": {("c6", 5), ("c7", 6), ("c8", 7)}}
    assert [len(splits[name].images) for name in found] == [10, 8, 12]


def test_no_photo_is_left_out_for_masks_py_and_of_toy(shop, capsys, monkeypatch):
    """masks.py is to repair the masks, and the paper's data sets stay as they are."""
    own = shop / "shop"
    for photo, foreground in UNUSABLE.items():
        write_mask(own, photo, foreground)
    assert split_sizes(load_splits(str(own), need_masks=False)) == [12, 8, 16]
    own.rename(shop / "toy")
    monkeypatch.setitem(bgbias.COUNTS, "toy", (36, 16))
    monkeypatch.setitem(SPLITS, "toy", {"train": range(3), "val": range(3, 5), "test": range(5, 9)})
    assert split_sizes(load_splits("toy", shop)) == [12, 8, 16]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("unusable", [18, 19])
def test_if_most_masks_are_unusable_the_masks_are_wrong(shop, capsys, unusable):
    """More than half of 36. Then nothing is left out."""
    own = shop / "shop"
    for i in range(unusable):
        write_mask(own, f"c{i % 9}/p{i // 9}", i % 2)
    if unusable == 18:
        assert len(load_splits(str(own))["left_out"].images) == 18
    else:
        with pytest.raises(UserError, match="masks: most .*masks.py --verify"):
            load_splits(str(own))
        assert capsys.readouterr().out == ""


def test_backgrounds_are_sorted_and_needed(shop):
    own = shop / "shop"
    assert pool_of(own) == [own / f"backgrounds/val/b{i}.jpg" for i in range(3)]
    with pytest.raises(UserError, match=f"--backgrounds {own}: "):
        pool_of(own, "--backgrounds", str(own))
    # The paper's datasets need the paper's number, unless the user names other backgrounds.
    pools = (shop / "shop/backgrounds").rename(shop / "unsplash_backgrounds")
    with pytest.raises(UserError, match=f"--backgrounds {pools}: 3 .* 100"):
        pool_of("cub200", "--data", str(shop))
    assert len(pool_of("cub200", "--backgrounds", str(pools))) == 3


# ---- Images --------------------------------------------------------------------------------------


def test_every_kind_of_image_opens_as_rgb(tmp_path):
    grey = np.arange(0, 260, 5).clip(0, 255).astype(np.uint8).reshape(4, 13)
    image = Image.fromarray(grey)
    images = {"grey.png": image, "grey_alpha.png": image.convert("LA"), "rgba.png": image.convert("RGBA"),
              "palette.png": Image.fromarray(np.stack([grey] * 3, axis=2)).quantize(60),
              "cmyk.tiff": image.convert("CMYK"), "grey.gif": image, "rgb.bmp": image.convert("RGB"),
              "deep.png": Image.fromarray(grey.astype(np.uint16) * 257)}
    for name, saved in images.items():
        saved.save(tmp_path / name)
        opened = open_rgb(tmp_path / name)
        assert opened.mode == "RGB" and (np.asarray(opened) == grey[:, :, None]).all(), name
    image.convert("1").save(tmp_path / "bits.png")
    assert set(np.asarray(open_rgb(tmp_path / "bits.png")).flatten()) == {0, 255}


# How a file with this EXIF orientation stores an upright picture. The standard says where its first
# row and column belong: 6 for instance is "row 0 is the right-hand side, column 0 is the top".
STORED = {1: np.asarray, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
          6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_photos_masks_and_backgrounds_are_turned_upright(tmp_path, suffix):
    """In all eight orientations, and their sizes with them."""
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip("this Pillow does not read it")
    write_image(tmp_path / "photo.png", np.random.default_rng(0), (60, 44))
    upright = np.asarray(Image.open(tmp_path / "photo.png"))
    Image.fromarray(upright[..., 1]).save(tmp_path / "mask.png")
    expected = Photos([tmp_path / "photo.png"], [tmp_path / "mask.png"], 32)[0].int()
    for orientation, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif = exif.tobytes()
        photo, mask = tmp_path / f"photo{orientation}.{suffix}", tmp_path / f"mask{orientation}.png"
        Image.fromarray(stored(upright)).save(photo, exif=exif, quality=100, lossless=True)
        Image.fromarray(stored(upright[..., 1])).save(mask, exif=exif)
        found, background = Photos([photo], [mask], 32)[0].int(), Photos([photo], None, 32)[0].int()
        assert (found - expected).abs().max() <= (8 if suffix in ("jpg", "avif") else 0), photo
        assert (background == found[:3]).all()
        assert open_image(photo).size == open_image(mask).size == (60, 44), photo


@pytest.mark.parametrize("name", ["RGBA.png", "RGBA.webp", "LA.png", "P.png", "P.gif", "RGB.png", "L.png"])
def test_transparency_becomes_white_and_is_the_mask(tmp_path, name):
    """Whatever colour is hidden below it. Without alpha channel, a file names one transparent colour.
    The colours are grey, so that every mode holds them."""
    mode, rng = name.split(".")[0], np.random.default_rng(0)
    soft = "A" in mode
    colours = rng.integers(20, 256, (6, 8, 1), dtype=np.uint8).repeat(3, axis=2)
    alpha = rng.choice([0, 64, 200, 255] if soft else [0, 255], (6, 8)).astype(np.uint8)
    for hidden in (0, 13):
        colours[alpha == 0] = hidden
        image = Image.fromarray(np.dstack([colours, alpha]) if soft else colours)
        image = image.quantize(60) if mode == "P" else image.convert(mode)
        first = tuple(np.argwhere(alpha == 0)[0, ::-1].tolist())
        transparency = {} if soft else {"transparency": image.getpixel(first)}
        image.save(tmp_path / name, lossless=True, exact=True, **transparency)
        opened = np.asarray(open_rgb(tmp_path / name)).astype(int)
        for y, x in np.ndindex(6, 8):
            share = int(alpha[y, x]) / 255
            assert np.abs(opened[y, x] - (share * colours[y, x] + (1 - share) * 255)).max() <= 1
        np.testing.assert_array_equal(masks.alpha_of(tmp_path / name), alpha)
    Image.fromarray(colours).convert("RGBA").save(tmp_path / "opaque.png")
    assert masks.alpha_of(tmp_path / "opaque.png") is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_unreadable_image_is_named(suffix, tmp_path):
    """One that is no image at all, and one that is cut short anywhere."""
    path = tmp_path / f"broken.{suffix}"
    write_image(path, np.random.default_rng(0))
    whole = path.read_bytes()
    for content in (b"<html>404</html>", *(whole[:len(whole) * k // 20] for k in range(15))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: "):
            open_rgb(path)


def test_unreadable_files_that_have_a_remedy(tmp_path):
    """A pointer of git-lfs, and a HEIC photo that an app has named .jpg."""
    photo = tmp_path / "IMG_0001.jpg"
    photo.write_text("version https://git-lfs.github.com/spec/v1\n"
                     "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")
    for opened in (open_image, open_rgb, bgbias.open_mask):
        with pytest.raises(UserError, match=f"^{photo}: a pointer of git-lfs .*: git lfs pull$"):
            opened(photo)
    photo.write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(UserError, match=f"^{photo}: a HEIC photo; run: pip install pillow-heif$"):
        open_rgb(photo)


def test_heic_photos_are_read_if_pillow_heif_is_installed(tmp_path):
    """By a stand-in with the same function, in a process of its own: photos are HEIC by their content."""
    (tmp_path / "pillow_heif.py").write_text("""
from PIL import Image

def register_heif_opener():
    Image.register_open("HEIF", lambda *args: Image.new("RGB", (3, 2), "red"), lambda start: start[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif"])
""")
    for name in ("a.HEIC", "b.jpg", "c.txt"):
        (tmp_path / name).write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100))
    script = ("import bgbias, pathlib; photos = bgbias.list_photos(pathlib.Path()); "
              "print(*photos, *(bgbias.open_rgb(photo).size for photo in photos))")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
                          capture_output=True, text=True)
    assert done.stdout == "a.HEIC b.jpg (3, 2) (3, 2)\n", done.stderr


@pytest.mark.parametrize("orientation, turned", [(1, False), (3, False), (6, True), (8, True)])
def test_a_mask_that_fits_only_the_photo_as_it_is_stored(tmp_path, orientation, turned):
    """Many tools ignore EXIF, and so do the masks that they write."""
    exif, photo, mask = Image.Exif(), tmp_path / "photo.jpg", tmp_path / "mask.png"
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(photo, exif=exif)
    Image.new("L", (40, 30)).save(mask)
    if turned:
        with pytest.raises(UserError, match=rf"^{mask}: .*\(40, 30\), .*\(30, 40\), because .*EXIF.* turn the mask"):
            bgbias.open_pair(photo, mask)
    else:
        bgbias.open_pair(photo, mask)
    Image.new("L", (41, 30)).save(mask)  # fits in neither way
    with pytest.raises(UserError, match="delete the mask and run masks.py$"):
        bgbias.open_pair(photo, mask)


@pytest.mark.parametrize("files, expected", [
    ({}, 1), ({"meminfo": "MemTotal: 8000 kB\nMemFree: 100 kB\n", "self/cgroup": "0::/\n"}, 1),
    ({"meminfo": "MemTotal: 8000 kB\nMemAvailable: 2000 kB\n"}, 0.25)])
def test_memory_that_a_sandbox_does_not_tell_counts_as_free(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        bgbias.write_text(tmp_path / "proc" / name, text)
    monkeypatch.setattr(bgbias, "Path", lambda *parts: tmp_path.joinpath(*(str(part).lstrip("/") for part in parts)))
    assert bgbias.free_memory() == expected


def test_what_fails_to_be_written_leaves_the_old_file(tmp_path):
    bgbias.write(tmp_path / "a/x.txt", lambda draft: draft.write_text("old"))

    def fail(draft):
        draft.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bgbias.write(tmp_path / "a/x.txt", fail)
    assert (tmp_path / "a/x.txt").read_text() == "old" and len(list((tmp_path / "a").iterdir())) == 1


# ---- The toy set ---------------------------------------------------------------------------------


def test_toy_is_complete_and_always_the_same(toy):
    splits = load_splits("toy", toy.parent)
    assert split_sizes(splits) == [2000, 400, 1000]
    assert {name: sorted(set(splits[name].labels.tolist())) for name in SPLITS["toy"]} == {
        name: list(classes) for name, classes in SPLITS["toy"].items()}
    assert split_sizes(load_splits("toy", toy.parent, measure="test")) == [2000, 400, 1000]
    every = load_splits("toy", toy.parent, measure="all")
    assert split_sizes(every) == [0, 0, 3400] and set(every["test"].labels.tolist()) == set(range(170))
    pairs = zip(range(3), bgbias.toy_class(np.random.default_rng([2022, 5])))
    for i, (photo, mask) in pairs:
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


def test_toy_pools_share_no_picture(toy):
    args = parse_args(["--data", str(toy.parent)])
    pools = [{path.read_bytes() for path in list_backgrounds(args, name)} for name in ("val", "test")]
    assert len(pools[0]) == len(pools[1]) == 100 and not pools[0] & pools[1]
