"""Does an image retrieval model look at the object or at the background? This script trains one,
replaces the backgrounds of its test images, and measures how much of the retrieval is lost. After
Kobs & Hotho, "On Background Bias in Deep Metric Learning" (ICMV 2022, arXiv:2210.01615).

    python bgbias.py                                # toy data, contrastive loss, a minute or two
    python bgbias.py --bgaugment                    # the same, backgrounds replaced in training
    python bgbias.py --dataset cars196 --loss contrastive --bgaugment     # a run of the paper
    python bgbias.py --dataset my_photos --loss triplet                # my_photos/images/<class>/
    python bgbias.py --report runs                  # all runs in one table, beside the paper's

Every default is the paper's; toy has its own (DEFAULTS). A run lives in the folder
RUNS/<dataset>-<loss>-<base|bgaugment>-s<seed>/ with config.json, log.jsonl, last.pt, best.pt and,
written last, result.json. The same command goes on with a run that was stopped, after its last
whole epoch. To start over, delete the run's folder; to test it again, delete its result.json.

The sections below follow the paper:
    1. constants        splits, hyper-parameters, the paper's results (Section 4)
    2. data             three datasets, a folder of your own, the embedded toy set (Section 4.1)
    3. batches          crops, background replacement, BGAugment (Sections 3 and 5)
    4. sampler          m images of each class in a batch (Section 4)
    5. network          BN-Inception + Linear(1024, 128) + L2 normalisation (Section 4)
    6. losses           five of them (Section 4.2)
    7. metrics          MAP@R, R-precision, Recall@K (Section 4.3)
    8. test protocol    clean, replaced, and what a shop would ask (Section 4.3)
    9. training         epochs, selection, checkpoints (Section 4)
   10. tables           ours beside the paper's (Sections 4.3 and 5)
   11. command line

Shapes: B batch, D embedding (128), C classes, N images, H W pixels, S crop size, K neighbours.
A mask is (B, 1, H, W) in [0, 1], soft, and 1 = foreground, everywhere.
A comment tagged DIFF marks what the authors' code does differently; the README lists the same.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# ---- 1. Constants --------------------------------------------------------------------------------

# Class-disjoint splits, 0-based labels (Section 4.1).
SPLITS = {
    "cars196": {"train": range(0, 74), "val": range(74, 98), "test": range(98, 196)},
    "cub200": {"train": range(0, 75), "val": range(75, 100), "test": range(100, 200)},
    "sop": {"train": range(0, 8489), "val": range(8489, 11318), "test": range(11318, 22634)},
    "toy": {"train": range(0, 100), "val": range(100, 120), "test": range(120, 170)},
}
COUNTS = {  # images, test images
    "cars196": (16185, 8131), "cub200": (11788, 5924), "sop": (120053, 60502), "toy": (3400, 1000)}
POOL = 100  # background photos in each of val/ and test/

# The optima of "A Metric Learning Reality Check" (Musgrave et al. 2020), which the paper took over.
# Margins are distances (contrastive), differences of distances (triplet), degrees (arcface);
# lr_loss is the learning rate of the class weights. A folder of the user's own takes Cars196's.
HPARAMS = {
    "cars196": {
        "contrastive": dict(pos_margin=0.26523381895861114, neg_margin=0.5409405918690342),
        "triplet": dict(margin=0.11902737154413517),
        "multi_similarity": dict(alpha=14.358760978642266, beta=75.83486384086837,
                                 base=0.6615555839124118),
        "arcface": dict(margin=20.52230893710211, scale=49.501652066223656,
                        lr_loss=7.398518179078544e-06),
        "normalized_softmax": dict(temperature=0.08863250090946041, lr_loss=0.011046164985524668),
    },
    "cub200": {
        # The negative margin is no typo: every positive pair then has a loss above 0, so nzmean(),
        # the mean over the terms above 0, is over all of them.
        "contrastive": dict(pos_margin=-0.19999999999999726, neg_margin=0.3841191369511769),
        "triplet": dict(margin=0.09610074859813894),
        "multi_similarity": dict(alpha=0.010000000000000505, beta=50.601773762279336,
                                 base=0.5624815816186126),
        "arcface": dict(margin=23.225935497468093, scale=99.99999999999999,
                        lr_loss=0.0051384088179694),
        "normalized_softmax": dict(temperature=0.10874714987070239, lr_loss=0.004468915155818225),
    },
    "sop": {
        "contrastive": dict(pos_margin=0.2850258234628094, neg_margin=0.5130146609636679),
        "triplet": dict(margin=0.04519248868248313),
        "multi_similarity": dict(alpha=8.492496310524517, beta=57.38862611417401,
                                 base=0.41673621630849955),
        "arcface": dict(margin=18.63185573324141, scale=220.36285192573413,
                        lr_loss=0.0020186601854510562),
        "normalized_softmax": dict(temperature=0.06306243924788482, lr_loss=0.0005468337161961759),
    },
    "toy": {  # ours
        "contrastive": dict(pos_margin=0.2, neg_margin=0.7),
        "triplet": dict(margin=0.2),
        "multi_similarity": dict(alpha=2.0, beta=20.0, base=0.5),
        "arcface": dict(margin=10.0, scale=16.0, lr_loss=0.01),
        "normalized_softmax": dict(temperature=0.1, lr_loss=0.01),
    },
}

Published = namedtuple("Published", "clean replaced replaced_std attention attention_std")


def read_paper(text):
    """{dataset: {loss: {"base": Published, "bgaugment": Published}}}"""
    tables = defaultdict(dict)
    for line in text.strip().splitlines():
        dataset, loss, *numbers = line.split()
        base, bgaugment = np.array(numbers, float).reshape(2, 5).tolist()
        tables[dataset][loss] = {"base": Published(*base), "bgaugment": Published(*bgaugment)}
    return dict(tables)


# The paper's results, base and then BGAugment: test MAP@R in %, on clean photos and with replaced
# backgrounds, its standard deviation over the draws; attention score, its own over the images.
PAPER = read_paper("""
cars196  contrastive         15.22  13.31 0.15  0.50 0.09    16.43  16.31 0.03  0.53 0.10
cars196  triplet             15.33  13.40 0.04  0.50 0.09    15.28  15.19 0.05  0.54 0.09
cars196  multi_similarity    18.80  16.25 0.06  0.52 0.09    15.61  15.48 0.05  0.50 0.09
cars196  arcface             16.25  13.63 0.08  0.49 0.10    16.19  16.23 0.04  0.56 0.10
cars196  normalized_softmax  18.06  15.36 0.03  0.51 0.09    18.15  18.12 0.05  0.56 0.09
cub200   contrastive         20.27  12.47 0.08  0.25 0.08    19.39  15.46 0.08  0.32 0.10
cub200   triplet             18.29  10.94 0.05  0.24 0.08    18.56  15.33 0.16  0.33 0.09
cub200   multi_similarity    19.19  12.21 0.16  0.26 0.08    18.93  15.65 0.16  0.30 0.09
cub200   arcface             20.66  12.87 0.16  0.25 0.08    20.91  17.92 0.08  0.33 0.09
cub200   normalized_softmax  20.18  12.41 0.10  0.24 0.08    20.60  17.39 0.10  0.30 0.08
sop      contrastive         37.98   4.17 0.05  0.07 0.16    31.52  24.09 0.04  0.31 0.20
sop      triplet             36.71   6.05 0.06  0.08 0.17    29.63  21.39 0.07  0.26 0.22
sop      multi_similarity    39.65   6.51 0.06  0.11 0.17    32.67  24.00 0.07  0.28 0.19
sop      arcface             40.50   6.98 0.05  0.13 0.14    22.25  16.53 0.05  0.26 0.17
sop      normalized_softmax  41.52   7.67 0.04  0.12 0.14    32.16  24.60 0.03  0.28 0.20
""")

DEFAULTS = {  # of those flags that differ between the paper's setup and toy
    "paper": dict(epochs=1000, iterations=100, lr=1e-6, image_size=227, backbone="bninception",
                  weights="imagenet"),
    "toy": dict(epochs=15, iterations=50, lr=5e-5, image_size=48, backbone="smallconv",
                weights="none"),
}
RMSPROP = dict(weight_decay=1e-4, momentum=0.9, alpha=0.99, eps=1e-8)
EMBEDDING = 128
RESIZE = 256 / 227  # short side of a resized photo / side of the crop taken from it
CROP_SCALE, CROP_RATIO, FLIP = (0.16, 1.0), (0.75, 1.33), 0.5  # of RandomResizedCrop, Section 4
DRAWS = 5  # draws of random backgrounds at test time; validation draws once an epoch
RECALL_AT = {"sop": (1, 10, 100, 1000)}  # the K of Recall@K; of all others 1, 2, 4, 8
EVAL_BATCH = 32  # photos; no figure depends on it
LEAVE_FREE = 0.1  # share of the machine's memory that decoded photos leave to others
WORKER_TIMEOUT = 60  # seconds

# Every random number gets a seed of its own from the run's seed, its purpose and its position, so a
# run that goes on after a stop needs no saved random state.
INIT, TRAIN, VAL, TEST, DROPOUT = range(5)

# Network input: channel order, mean, standard deviation, for pixels in [0, 255].
BGR_CAFFE = ([2, 1, 0], [104.0, 117.0, 128.0], [1.0, 1.0, 1.0])
RGB_TORCHVISION = ([0, 1, 2], [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])

BNINCEPTION_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"


class UserError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


def one_line(error):
    return " ".join(str(error).split())[:150] or repr(error)


@contextlib.contextmanager
def explain(subject, remedy):
    """Any error inside becomes a UserError: what it is about, the reason, and what to do. For the
    reading and writing of files and the work of libraries, which raise nearly anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or "DataLoader" in str(error):  # a worker that died
            raise
        raise UserError(f"{subject}: {one_line(error)}; {remedy}") from error


# ---- 2. Data -------------------------------------------------------------------------------------

Split = namedtuple("Split", "images masks labels")  # paths, paths, (N,) integers

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# One of these, in DATA or one folder deeper, shows where a dataset is: its root is what holds it.
PLACES = {
    "cars196": ("car_ims", "cars_train"),
    "cub200": ("CUB_200_2011/images",),
    "sop": ("Stanford_Online_Products/Ebay_train.txt",),
}
BROKEN_LIST = "this list of the dataset is missing or broken, get it again; see README, Data"


def dataset_root(dataset, data):
    """The folder of `dataset`: a named one in `data`, or the user's own. Raises UserError."""
    if dataset == "toy":
        return make_toy(Path(data, "toy"))
    for place in PLACES.get(dataset, ()):
        for found in (Path(data, place), *sorted(Path(data).glob(f"*/{place}"))):
            if found.exists():
                return found.parent
    if dataset in PLACES:
        raise UserError(f"--data {data}: no {dataset}, looked in it and one folder deeper for "
                        f"{' or '.join(PLACES[dataset])}; see README, Data")
    if not Path(dataset, "images").is_dir():
        raise UserError(f"--dataset {dataset}: neither {', '.join(SPLITS)} nor a folder with "
                        "images/<class>/ in it")
    return Path(dataset)


def list_cars196(root):
    """[(path, label)] of car_ims/ + cars_annos.mat or of cars_train/, cars_test/ + devkit/."""
    from scipy.io import loadmat

    test = "cars_test_annos_withlabels.mat"  # not part of the devkit: beside it or put into it
    test = test if (root / test).exists() else f"devkit/{test}"
    lists = [("devkit/cars_train_annos.mat", "cars_train", "fname"), (test, "cars_test", "fname")]
    if (root / "car_ims").is_dir():
        lists = [("cars_annos.mat", "", "relative_im_path")]
    listed = []
    for file, folder, field in lists:
        with explain(root / file, BROKEN_LIST), (root / file).open("rb") as mat:
            rows = loadmat(mat, simplify_cells=True)["annotations"]
            listed += [(root / folder / row[field], int(row["class"]) - 1) for row in rows]
    return listed


def list_sop(root):
    """[(path, label)] of Ebay_{train,test}.txt: image_id class_id super_class_id path."""
    listed = []
    for file in (root / "Ebay_train.txt", root / "Ebay_test.txt"):
        with explain(file, BROKEN_LIST):
            rows = [line.split() for line in file.read_text().splitlines()[1:]]
            listed += [(root / path, int(label) - 1) for _, label, _, path in rows]
    return listed


def list_folder(root):
    """[(path, label)] of root/images/<class>/<photo>, classes and photos sorted by name."""
    folders = sorted(folder for folder in (root / "images").glob("[!.]*") if folder.is_dir())
    classes = [photos for photos in map(list_photos, folders) if photos]
    return [(photo, label) for label, photos in enumerate(classes) for photo in photos]


def list_photos(folder):
    """Sorted paths of the photos in a folder; what begins with a dot is none."""
    return sorted(path for path in folder.glob("[!.]*")
                  if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())


def mask_path(root, image):
    """The one rule: the mask of ROOT/images/a/b.jpg or ROOT/a/b.jpg is ROOT/masks/a/b.png. Raises
    ValueError for an image outside of ROOT."""
    parts = image.relative_to(root).parts
    if ".." in parts:
        raise ValueError(f"{image} is not in {root}")
    if parts[0] == "images":
        parts = parts[1:]
    return Path(root, "masks", *parts).with_suffix(".png")


def split_classes(dataset, classes, training):
    """{part: range of labels}; a user's folder is split 74 : 24 : 98, as Cars196, for training."""
    if dataset in SPLITS:
        return SPLITS[dataset]
    train = max(1, round(classes * 74 / 196)) if training else 0
    val = train + max(1, round(classes * 24 / 196)) if training else 0
    return {"train": range(train), "val": range(train, val), "test": range(val, classes)}


def load_splits(dataset, data="data", *, need_masks=True, training=True):
    """{"train": Split, "val": Split, "test": Split} of a dataset, its files checked to be there.
    Without `training`, all classes of a user's folder are for testing. Raises UserError naming what
    lacks. Section 4.1."""
    root = dataset_root(dataset, data)
    listed = {"cars196": list_cars196, "sop": list_sop}.get(dataset, list_folder)(root)
    labels = np.array([label for _, label in listed], dtype=int)
    splits = {}
    for part, classes in split_classes(dataset, len(np.unique(labels)), training).items():
        rows = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
        images = [listed[row][0] for row in rows]
        with explain(f"{root}: a list of it names a file elsewhere", "get that list again"):
            masks = [mask_path(root, image) for image in images]
        splits[part] = Split(images, masks, labels[rows])
    images = [path for split in splits.values() for path in split.images]
    masks = [path for split in splits.values() for path in split.masks]
    counts = len(images), len(splits["test"].images)
    if counts != COUNTS.get(dataset, counts):
        raise UserError(f"{root}: {counts[0]:,} images, {counts[1]:,} for testing, instead of "
                        "{:,} and {:,}; delete it and unpack it again".format(*COUNTS[dataset]))
    for part, split in splits.items():
        if np.bincount(split.labels, minlength=1).max() < 2 and (training or part == "test"):
            raise UserError(f"{root}: no class with two photos for {part}; it takes three folders "
                            f"{root}/images/<class>/ of photos at least, or one with --epochs 0")
    mask, photos = Counter(masks).most_common(1)[0]
    if photos > 1:
        raise UserError(f"{mask}: would be the mask of two photos; rename one of them")
    needed = {"image": (images, f"unpack {root} again")}
    if need_masks:
        where = f" --data {data}" if dataset in SPLITS else ""
        needed["mask"] = (masks, f"run: python masks.py --dataset {dataset}{where} (with the "
                          "--model of the others)")
    for what, (paths, remedy) in needed.items():
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: missing {what}, one of {len(missing):,}; {remedy}")
    return splits


def open_rgb(path):
    """The photo as PIL opens it (no EXIF rotation), 8-bit RGB. Raises UserError."""
    with explain(f"{path}: no readable image", "replace or remove it"):
        image = Image.open(path)
        if image.mode.startswith("I"):  # PIL clips 16 bits at 255 where it should divide
            image = Image.fromarray((np.asarray(image, float) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def open_mask(path):
    """The mask as an 8-bit greyscale PIL image, 255 = foreground. Raises UserError for a file that
    is no mask: another mode (but 1-bit and grey RGB are fine), or values 0 and 1."""
    with explain(path, "delete it and run masks.py, or save 8-bit greyscale, 255 = foreground"):
        mask = Image.open(path)
        channels = mask.split()
        if mask.mode == "RGB" and channels[0] == channels[1] == channels[2]:
            mask = channels[0]
        if mask.mode not in ("1", "L"):
            raise ValueError(f"no mask, its mode is {mask.mode} instead of L")
        mask = mask.convert("L")
        if mask.getextrema()[1] == 1:
            raise ValueError("no mask, its largest value is 1")
        return mask


def list_backgrounds(folder, part):
    """Sorted paths of the pool FOLDER/val or FOLDER/test. Raises UserError."""
    # DIFF: backgrounds are sorted by name; in file-system order a seed would not fix the draws.
    pool = list_photos(Path(folder, part))
    if not pool:
        raise UserError(f"--backgrounds {folder}: no photos in {Path(folder, part)}; it takes the "
                        "folders val/ and test/ with photos, see README, Data")
    return pool


# The toy set. Each class is one product (a random pattern) that one seller photographs, nearly
# always in front of the same backdrop. So the backdrop predicts the class: the bias we want to see.
# It is written once, in the layout of a user's own folder, so that all other code is the same.


def toy_texture(seed, size):
    """A backdrop, (size, size) PIL image: distorted waves between two random colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / 64
    waves = rng.uniform([-3, -3, 0, 0.3], [3, 3, 1, 1], (3, 4))
    level = sum(a * np.sin(2 * np.pi * (fx * x + fy * y + p)) for fx, fy, p, a in waves)
    dark, light = rng.uniform(0, 255, (2, 3))
    image = dark + (light - dark) * (np.tanh(2 * level[..., None]) + 1) / 2
    return Image.fromarray(image.astype(np.uint8))


def toy_class(rng, photos=20, size=54, share=0.95):
    """Yields (photo, mask), PIL images, of one class: two colours on a symmetric 5 x 5 grid, in
    random scale, rotation, position and light, with probability `share` on its seller's backdrop.
    """
    half = rng.random((5, 3)) < 0.5
    grid = np.concatenate([half, half[:, 1::-1]], axis=1)[..., None]
    tile = np.where(grid, *rng.uniform(0, 255, (2, 3))).astype(np.uint8)
    tile = Image.fromarray(tile).convert("RGBA")
    seller = rng.integers(2**60)
    for _ in range(photos):
        seed = seller if rng.random() < share else rng.integers(2**60)
        top, left = rng.integers(0, size, 2)
        photo = toy_texture(seed, 2 * size).crop((left, top, left + size, top + size))
        side = int(size * rng.uniform(0.5, 0.8))
        product = tile.resize((side, side), Image.NEAREST)
        product = product.rotate(rng.uniform(-30, 30), Image.BICUBIC, expand=True)
        corner = tuple(int((size - n) * rng.random()) for n in product.size)
        mask = Image.new("L", photo.size)
        mask.paste(product.getchannel("A"), corner)
        photo.paste(product, corner, product)
        light = np.asarray(photo) * rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, 3)
        yield Image.fromarray(light.clip(0, 255).astype(np.uint8)), mask


def make_toy(root, seed=2022):
    """Writes the toy set to `root`, unless it is there, and returns `root`. It is the same every
    time, takes 10 s, and is there as a whole or not at all. Raises UserError."""
    if root.exists():
        return root
    draft = draft_of(root)
    try:
        for label in range(SPLITS["toy"]["test"].stop):
            photos, masks = draft / f"images/{label:03d}", draft / f"masks/{label:03d}"
            photos.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i, (photo, mask) in enumerate(toy_class(np.random.default_rng([seed, label]))):
                photo.save(photos / f"{i:02d}.png")
                mask.save(masks / f"{i:02d}.png")
        for number, part in enumerate(("val", "test")):
            pool = draft / "backgrounds" / part
            pool.mkdir(parents=True)
            for i in range(POOL):
                toy_texture([seed, number, i, 1], 80).save(pool / f"{i:02d}.png")
        draft.rename(root)
    except OSError as error:
        if not root.exists():  # else another run was faster
            raise UserError(f"{root}: could not be written ({error}); make room, or give another "
                            "--data") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


# ---- 3. Batches: decoding once, crops, background replacement ------------------------------------


class Photos(torch.utils.data.Dataset):
    """Item i: photo and mask as one (4, H, W) uint8 tensor (R, G, B, mask), short side resized to
    `short`. One tensor, so that every later crop and flip is the same for both. `masks` None:
    (3, H, W). With `keep`, photos are decoded now and stay in memory, as many as it has room for;
    the others are decoded at every use."""

    def __init__(self, images, masks, short, *, keep=True):
        self.images, self.masks, self.short = images, masks, short
        self.kept = []
        if not keep:
            return
        # DIFF: photos are resized once a run; the authors do it at every use, to the same end.
        with ThreadPoolExecutor() as threads:
            decoded = threads.map(self.decode, range(len(self)))
            for photo in tqdm(decoded, "decoding", len(self), leave=False, disable=None):
                if free_memory() < LEAVE_FREE:
                    print(f"memory is short: {len(self.kept):,} of {len(self):,} photos stay "
                          "decoded, the others are decoded at every use (--workers helps)")
                    threads.shutdown(cancel_futures=True)  # break alone leaves them at work
                    break
                self.kept.append(photo)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.kept[i] if i < len(self.kept) else self.decode(i)

    def decode(self, i):
        planes = [open_rgb(self.images[i])]
        if self.masks is not None:
            planes.append(open_mask(self.masks[i]))
            if planes[0].size != planes[1].size:
                raise UserError(f"{self.masks[i]}: its size is {planes[1].size}, the photo's is "
                                f"{planes[0].size}; delete it and run masks.py")
        return torch.cat([TF.pil_to_tensor(TF.resize(plane, self.short)) for plane in planes])


def free_memory():
    """The share of the machine's memory that Linux says can be had; 1 where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines}
        return kilobytes["MemAvailable:"] / kilobytes["MemTotal:"]
    except (OSError, KeyError):
        return 1.0


def short_side(crop):
    """The short side, in px, to which a photo is resized before a crop of that size is taken."""
    return round(RESIZE * crop)


def random_view(photo, size):
    """The training transform, RandomResizedCrop and flip: (., H, W) uint8 -> (., S, S) uint8."""
    # DIFF: crops are resized as uint8 tensors, the authors' as PIL images: one level off at most.
    box = torchvision.transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO)
    view = TF.resized_crop(photo, *box, [size, size], antialias=True)
    return TF.hflip(view) if torch.rand(()) < FLIP else view


def seed_of(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Batches(torch.utils.data.Dataset):
    """Item n: photos (B, 4, S, S), backgrounds (draws, B, 3, S, S), both uint8, and labels (B,).

    Training (with a sampler): item n is the n-th batch of the training, its photos cropped at
    random. Evaluation (without one): EVAL_BATCH photos in order, centre-cropped; item
    e * items_a_pass + i is the i-th of epoch e, both from 0. Backgrounds are drawn with replacement
    from `pool` and always take the training transform, in evaluation too (Section 4).
    """

    def __init__(self, *, photos, labels, size, seed, pool, draws, sampler=None):
        self.photos, self.labels = photos, torch.as_tensor(labels)
        self.size, self.seed = size, seed
        self.pool, self.draws = pool, draws
        self.sampler = sampler
        self.items_a_pass = math.ceil(len(photos) / EVAL_BATCH)

    def plan(self, n):
        """[(index of a photo, seed of its random numbers)] of item n."""
        # DIFF: a batch is a function of the seed and its number, so a resumed run repeats none.
        if self.sampler:
            indices = self.sampler.batch((*self.seed, n))
            return [(index, (*self.seed, n, slot)) for slot, index in enumerate(indices)]
        epoch, item = divmod(n, self.items_a_pass)
        indices = range(len(self.photos))[item * EVAL_BATCH:(item + 1) * EVAL_BATCH]
        return [(index, (*self.seed, epoch, index)) for index in indices]

    def __getitem__(self, n):
        plan, square = self.plan(n), (self.size, self.size)
        photos = torch.empty(len(plan), 4, *square, dtype=torch.uint8)
        backgrounds = torch.empty(self.draws, len(plan), 3, *square, dtype=torch.uint8)
        for k, (index, seed) in enumerate(plan):
            torch.default_generator.manual_seed(seed_of(*seed))  # of torchvision's crops and ours
            photo = self.photos[index]
            photos[k] = (random_view(photo, self.size) if self.sampler
                         else TF.center_crop(photo, self.size))
            for draw in range(self.draws):
                chosen = int(torch.randint(len(self.pool), ()))
                backgrounds[draw, k] = random_view(self.pool[chosen], self.size)
        return photos, backgrounds, self.labels[[index for index, _ in plan]]


def loader(batches, args, items):
    """Yields those items (a range) of `batches`, prepared ahead by --workers processes. Raises
    UserError if they cannot be started; what ends them later is told in command()."""
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # shares the decoded photos
    try:
        yield from torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=items, num_workers=args.workers,
            multiprocessing_context="fork" if fork and args.workers else None,
            timeout=WORKER_TIMEOUT if args.workers else 0, worker_init_fn=quiet_worker,
            pin_memory=args.device.startswith("cuda"))
    except OSError as error:
        raise UserError(f"--workers {args.workers}: {one_line(error)}; use fewer, or 0") from error


def quiet_worker(worker):
    """Ctrl-C reaches the workers too, but the main process ends them, and says so. What goes wrong
    in a worker reaches the main process as an exception; its stderr would only repeat it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")


def to_device(tensors, device):
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def unpack(photos):
    """(B, 4, S, S) uint8 -> images (B, 3, S, S) in [0, 255], masks (B, 1, S, S) in [0, 1]"""
    return photos[:, :3].float(), photos[:, 3:].float() / 255


def replace_background(images, masks, backgrounds):
    """(B, 3, H, W), (B, 1, H, W) in [0, 1] with 1 = foreground, (B, 3, H, W) -> (B, 3, H, W)"""
    return images * masks + backgrounds * (1 - masks)


def views(images, masks, backgrounds, *, extra):
    """Yields (condition, its versions of the images, one a draw of backgrounds): clean, replaced
    and, with `extra`, object_only and background_only, where the other part has the mean colour.

    images (B, 3, S, S) and backgrounds (draws, B, 3, S, S) are normalised as the network wants it,
    which makes the mean colour 0; masks (B, 1, S, S).
    """
    yield "clean", [images]
    yield "replaced", [replace_background(images, masks, drawn) for drawn in backgrounds]
    if extra:
        yield "object_only", [replace_background(images, masks, 0)]
        yield "background_only", [replace_background(images, 1 - masks, 0)]


# ---- 4. Sampler ----------------------------------------------------------------------------------


class MPerClassSampler:
    """Batches of `batch_size` indices into `labels`: batch_size / m distinct classes, m images of
    each, without replacement unless the class has fewer. Raises ValueError if there are too few
    classes. Section 4."""

    def __init__(self, labels, m, batch_size):
        labels = np.asarray(labels)
        self.classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.m, self.batch_size = m, batch_size
        if batch_size % m or batch_size // m > len(self.classes):
            raise ValueError(f"no {batch_size} images, {m} each, from {len(self.classes)} classes")

    def batch(self, seed):
        """A list of indices, the same for the same seed (an int or a tuple of ints)."""
        rng = np.random.default_rng(seed)
        indices = []
        for c in rng.choice(len(self.classes), self.batch_size // self.m, replace=False):
            images = self.classes[c]
            indices += rng.choice(images, self.m, replace=len(images) < self.m).tolist()
        return indices


def images_per_class(loss, batch_size, classes):
    """m: 4 for pair losses, 1 for classification losses, if there are enough classes."""
    # DIFF: with fewer classes than a batch wants, m grows to a divisor of the batch size that fits.
    # But never one class alone, if there are two: of one class, nothing is learned.
    least = 1 if loss in CLASSIFICATION else 4
    for m in range(least, batch_size // min(2, classes) + 1):
        if batch_size % m == 0 and batch_size // m <= classes:
            return m
    raise UserError(f"--batch-size {batch_size}: not {least} images or more of each of two classes")


# ---- 5. Network ----------------------------------------------------------------------------------

BLOCKS = {  # in, 1x1, 3x3 (reduce, out), double 3x3 (reduce, out), pool, projection
    # (without a 1x1 branch the block has stride 2)
    "3a": (192, 64, (64, 64), (64, 96), "avg", 32),
    "3b": (256, 64, (64, 96), (64, 96), "avg", 64),
    "3c": (320, None, (128, 160), (64, 96), "max", None),
    "4a": (576, 224, (64, 96), (96, 128), "avg", 128),
    "4b": (576, 192, (96, 128), (96, 128), "avg", 128),
    "4c": (576, 160, (128, 160), (128, 160), "avg", 128),
    "4d": (608, 96, (128, 192), (160, 192), "avg", 128),
    "4e": (608, None, (128, 192), (192, 256), "max", None),
    "5a": (1056, 352, (192, 320), (160, 224), "avg", 128),
    "5b": (1024, 352, (192, 320), (192, 224), "max", 128),
}


def conv(width, out, kernel, stride=1):
    """A padded convolution. Kaiming initialisation, because BatchNorm is frozen: nothing else keeps
    an untrained network's activations in range."""
    layer = nn.Conv2d(width, out, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(layer.weight)
    return layer


class BNInception(nn.Module):
    """BN-Inception (Ioffe & Szegedy 2015): (B, 3, H, W) BGR, mean-subtracted -> (B, 1024).
    Its parameters are named as in the public checkpoint bn_inception-52deb4733.pth."""

    def __init__(self):
        super().__init__()
        self.add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self.add("conv2_3x3_reduce", 64, 64, 1)
        self.add("conv2_3x3", 64, 192, 3)
        for block, (width, one, three, double, _, projection) in BLOCKS.items():
            name, stride = f"inception_{block}", 1 if one else 2
            if one:
                self.add(f"{name}_1x1", width, one, 1)
            self.add(f"{name}_3x3_reduce", width, three[0], 1)
            self.add(f"{name}_3x3", *three, 3, stride)
            self.add(f"{name}_double_3x3_reduce", width, double[0], 1)
            self.add(f"{name}_double_3x3_1", *double, 3)
            self.add(f"{name}_double_3x3_2", double[1], double[1], 3, stride)
            if projection:
                self.add(f"{name}_pool_proj", width, projection, 1)

    def add(self, name, width, out, kernel, stride=1):
        self.add_module(name, conv(width, out, kernel, stride))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(out))

    def branch(self, x, *names):
        for name in names:
            x = F.relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))
        return x

    def block(self, x, block):
        _, one, _, _, pool, projection = BLOCKS[block]
        name = f"inception_{block}"
        stride, padding = (1, 1) if one else (2, 0)
        pool2d = F.avg_pool2d if pool == "avg" else F.max_pool2d
        pooled = pool2d(x, 3, stride, padding, ceil_mode=True)
        branches = [self.branch(x, f"{name}_1x1")] if one else []
        branches.append(self.branch(x, f"{name}_3x3_reduce", f"{name}_3x3"))
        double = ("reduce", "1", "2")
        branches.append(self.branch(x, *(f"{name}_double_3x3_{part}" for part in double)))
        branches.append(self.branch(pooled, f"{name}_pool_proj") if projection else pooled)
        return torch.cat(branches, dim=1)

    def forward(self, x):
        x = self.branch(x, "conv1_7x7_s2")  # (B, 64, 114, 114) at 227 px
        x = self.branch(F.max_pool2d(x, 3, 2, ceil_mode=True), "conv2_3x3_reduce", "conv2_3x3")
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)  # (B, 192, 28, 28)
        for block in BLOCKS:
            x = self.block(x, block)
        return x.mean(dim=(2, 3))  # (B, 1024, 7, 7) -> (B, 1024)


def smallconv():
    """Four 3x3 convolution blocks for the toy set: (B, 3, H, W) -> (B, 128)."""
    layers = []
    for width, out in itertools.pairwise((3, 16, 32, 64, 128)):
        layers += [conv(width, out, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveMaxPool2d(1), nn.Flatten())


def build_backbone(name, weights):
    """The network without its classifier: (B, 3, H, W) -> (B, features). Raises UserError."""
    if name == "bninception":
        network = BNInception()
    elif name == "smallconv":
        network = smallconv()
        if weights == "imagenet":
            raise UserError("--weights imagenet: smallconv has none; use --weights none")
    elif ":" in name:
        network = hub_backbone(name, weights)
    elif name in torchvision.models.list_models(module=torchvision.models):
        return torchvision_backbone(name, weights)
    else:
        raise UserError(f"--backbone {name}: not bninception, smallconv, in torchvision.models or "
                        "REPO:NAME")
    if weights not in ("imagenet", "none") or (name, weights) == ("bninception", "imagenet"):
        load_weights(network, name, weights)
    return network


def hub_backbone(name, weights):
    """REPO:NAME: calls NAME() of the hubconf.py in REPO, a folder or GitHub's owner/repo. With
    weights "none", its layers (all that PyTorch can reset) become random. Raises UserError."""
    repo, _, entry = name.rpartition(":")
    remedy = ("needed: REPO:NAME, NAME a function that returns the network, in the hubconf.py of a "
              "folder or of GitHub's owner/repo")
    with explain(f"--backbone {name}", remedy):
        on_github = repo.count("/") == 1 and not repo.startswith(".") and not Path(repo).is_dir()
        network = torch.hub.load(repo, entry, source="github" if on_github else "local",
                                 trust_repo=True)
        for module in network.modules():
            if weights == "none" and hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return network


def torchvision_backbone(name, weights):
    with explain("--weights imagenet", "not downloaded, use --weights FILE, or none"):
        pretrained = "DEFAULT" if weights == "imagenet" else None
        network = torchvision.models.get_model(name, weights=pretrained)
    if weights not in ("imagenet", "none"):
        load_weights(network, name, weights)
    network.aux_logits = False  # GoogLeNet, Inception v3: return logits alone in training too,
    network.transform_input = True  # and rescale the input as their ImageNet weights want it
    classifiers = [path for path, layer in network.named_modules() if 1000 in
                   (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))]
    parent, _, classifier = classifiers[-1].rpartition(".")
    setattr(network.get_submodule(parent), classifier, nn.Identity())
    return network


def load_weights(network, name, weights):
    """Loads a checkpoint strictly: BN-Inception's from the web, or a file. Raises UserError."""
    remedy = f"give a state dict of {name}"
    if weights == "imagenet":
        remedy = f"fetch {BNINCEPTION_URL} elsewhere and give it as --weights FILE"
    with explain(f"--weights {weights}", remedy):
        if weights == "imagenet":
            state = torch.hub.load_state_dict_from_url(BNINCEPTION_URL, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        if name == "bninception":  # the file has an ImageNet classifier, ours has none
            state = {k: v for k, v in state.items() if not k.startswith("last_linear.")}
        network.load_state_dict(state)


def own_scaling(network, name, default):
    """The `mean` or `std` that a hub network has as an attribute, for RGB in [0, 1], made to fit
    pixels in [0, 255]; the default if it has none. Raises UserError."""
    if not hasattr(network, name):
        return default
    with explain(f"--backbone: its network's {name}", "needed: 3 numbers in [0, 1]"):
        own = torch.as_tensor(getattr(network, name), dtype=torch.float32).detach()
        if own.numel() != 3 or not ((own >= 0) & (own <= 1)).all():
            raise ValueError(f"is {own.tolist()}")
    return 255 * own


class Embedder(nn.Module):
    """Backbone, Linear(features, embedding), L2 norm: (B, 3, S, S) normalised -> (B, embedding),
    unit length; embedding 0 leaves the linear layer out. Raises UserError for unknown backbones,
    wrong weights, sizes the backbone does not take, outputs that are not (B, features). Section 4.
    """

    def __init__(self, backbone, weights, size, embedding=EMBEDDING):
        super().__init__()
        self.backbone = build_backbone(backbone, weights)
        order, mean, std = BGR_CAFFE if backbone == "bninception" else RGB_TORCHVISION
        remedy = f"needed: a tensor (B, features), finite float32, of (B, 3, {size}, {size})"
        with torch.no_grad(), explain(f"--backbone {backbone}, --image-size {size}", remedy):
            output = self.eval().backbone(torch.zeros(2, 3, size, size))
            if not torch.is_tensor(output) or output.ndim != 2 or len(output) != 2:
                raise ValueError(f"gives {getattr(output, 'shape', type(output))} of 2 images")
            if output.dtype != torch.float32:
                raise ValueError(f"gives {output.dtype}")
            if not output.isfinite().all():
                raise ValueError("gives nan or inf, are the --weights sound?")
        if ":" in backbone:
            mean = own_scaling(self.backbone, "mean", mean)
            std = own_scaling(self.backbone, "std", std)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1), persistent=False)
        self.width = embedding or output.shape[1]
        self.head = nn.Linear(output.shape[1], embedding) if embedding else nn.Identity()
        self.to(memory_format=torch.channels_last)  # the faster layout, on a CPU too

    def normalise(self, images):
        """(..., 3, H, W) RGB in [0, 255] -> the backbone's input."""
        return (images.index_select(-3, self.order) - self.mean) / self.std

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.head(self.backbone(x)), dim=1)

    def train(self, mode=True):
        super().train(mode)
        # BatchNorm keeps the statistics it came with, ImageNet's; only its affine weights train.
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


# ---- 6. Losses of embeddings (B, D) of unit length, labels (B,) and, if any, class weights (C, D)

# Every loss is called as LOSSES[loss](embeddings, labels, weight, **HPARAMS[dataset][loss]). Pair
# losses have no use for the class weights, and no loss for lr_loss, which is the optimiser's.


def pairs(labels):
    """Positive and negative pairs, two (B, B) booleans: same label and i != j; other label."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def nzmean(terms, chosen):
    """Mean over the chosen terms that are above 0; 0, with a gradient path, if there are none.
    Multiplied, not indexed, by booleans: a GPU need not tell the CPU how many there are."""
    terms = F.relu(terms) * chosen
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def distances(embeddings):
    """(B, D) -> (B, B) Euclidean, with gradient 0 (not infinity) between equal embeddings."""
    return torch.linalg.vector_norm(embeddings[:, None] - embeddings, dim=2)


def contrastive(embeddings, labels, weight=None, *, pos_margin, neg_margin):
    """nzmean_pos [d - pos_margin]+ + nzmean_neg [neg_margin - d]+  (Hadsell et al. 2006)"""
    d = distances(embeddings)
    pos, neg = pairs(labels)
    return nzmean(d - pos_margin, pos) + nzmean(neg_margin - d, neg)


def triplet(embeddings, labels, weight=None, *, margin):
    """nzmean_(a,p,n) [d_ap - d_an + margin]+ over all triplets  (Weinberger & Saul 2009)"""
    d = distances(embeddings)
    pos, neg = pairs(labels)
    triplets = pos[:, :, None] & neg[:, None, :]  # (B, B, B): anchor, positive, negative
    return nzmean(d[:, :, None] - d[:, None, :] + margin, triplets)


def multi_similarity(embeddings, labels, weight=None, *, alpha, beta, base):
    """mean_a [log(1 + sum_p exp(alpha (base - s_ap))) / alpha
             + log(1 + sum_n exp(beta (s_an - base))) / beta]  (Wang et al. 2019, without miner)"""
    s = embeddings @ embeddings.T
    pos, neg = pairs(labels)

    def log1p_sum_exp(terms, chosen):  # log(1 + sum exp x) is the logsumexp of x and a 0
        return F.pad(terms.masked_fill(~chosen, -math.inf), (1, 0)).logsumexp(dim=1)

    attract = log1p_sum_exp(alpha * (base - s), pos) / alpha
    repel = log1p_sum_exp(beta * (s - base), neg) / beta
    return (attract + repel).mean()


def arcface(embeddings, labels, weight, *, margin, scale, lr_loss=None):
    """cross-entropy of scale cos(theta_c), for the own class scale cos(theta_c + margin degrees)
    (Deng et al. 2019; unlike later versions, also where theta + margin exceeds 180 degrees)"""
    cosines = embeddings @ F.normalize(weight, dim=1).T  # (B, C)
    theta = cosines.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    own = F.one_hot(labels, len(weight)).bool()
    logits = torch.where(own, (theta + math.radians(margin)).cos(), cosines)
    return F.cross_entropy(scale * logits, labels)


def normalized_softmax(embeddings, labels, weight, *, temperature, lr_loss=None):
    """cross-entropy of cos(e, W_c) / temperature  (Zhai & Wu 2019)"""
    cosines = embeddings @ F.normalize(weight, dim=1).T  # (B, C)
    return F.cross_entropy(cosines / temperature, labels)


# Classification losses have class weights, pair losses have none.
CLASSIFICATION = {"arcface": arcface, "normalized_softmax": normalized_softmax}
LOSSES = {"contrastive": contrastive, "triplet": triplet, "multi_similarity": multi_similarity,
          **CLASSIFICATION}


# ---- 7. Metrics ----------------------------------------------------------------------------------

GROUP = 32  # values, of which largest() first looks at the maximum


@torch.no_grad()
def retrieval_metrics(embeddings, labels, ks, gallery=None):
    """MAP@R, R-precision, Recall@K, K in `ks`: {"map@r", "r_precision", "recall@1", ...}, 0 to 1.

    embeddings (N, D), labels (N,): every item queries all others by Euclidean distance. With
    `gallery` (N, D), other embeddings of the same items, it queries those; its own never counts. R
    is the number of other items with the query's label; queries with R = 0 are left out. Raises
    ValueError if that leaves none, FloatingPointError on nan or inf. Section 4.3.

    All three are one quantity, the rank of the i-th nearest right item: i plus the number of wrong
    items that are at most as far. MAP@R = sum_i [rank_i <= R] i / rank_i / R, R-precision =
    sum_i [rank_i <= R] / R, Recall@K = [rank_1 <= K]. Memory does not grow with N squared.
    """
    # DIFF: a query's own item is always removed; older releases of their library drop a first hit.
    # DIFF: of equally near items the wrong come first; in the authors' library the order decides.
    # So an embedding that maps everything to one point scores 0, whatever the order of the files.
    embeddings = torch.as_tensor(embeddings)
    gallery = embeddings if gallery is None else torch.as_tensor(gallery)
    labels = torch.as_tensor(labels, device=gallery.device)
    if not (embeddings.isfinite().all() and gallery.isfinite().all()):
        raise FloatingPointError("the embeddings are not finite")
    order = labels.argsort(stable=True)  # a class is now a range of columns of the gallery
    _, sizes = labels[order].unique_consecutive(return_counts=True)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (N,) first column of the class
    others = sizes.repeat_interleave(sizes) - 1  # (N,) R
    center = gallery.mean(dim=0)  # distances stay, but float32 keeps more of their digits
    # With a dimension more, an inner product orders the items: q . g - |g|^2 / 2, the larger the
    # nearer. The gallery is padded, for largest(), with items that are nobody's neighbour.
    queries = F.pad(embeddings[order] - center, (0, 1), value=1)
    columns = F.pad(gallery[order] - center, (0, 1, 0, -len(gallery) % GROUP))
    columns[:, -1] = columns.square().sum(dim=1) / -2
    columns[len(gallery):, -1] = -math.inf
    chunk = gallery.new_empty(max(1, 2**24 // len(columns)), len(columns))  # new memory is slow
    sums = Counter()
    for R in others[others > 0].unique().tolist():
        for q in (others == R).nonzero()[:, 0].split(len(chunk)):  # (Q,)
            near = torch.mm(queries[q], columns.T, out=chunk[:len(q)])  # (Q, N)
            near.scatter_(1, q[:, None], -math.inf)  # an item is no neighbour of its own
            right = near.gather(1, first[q, None] + torch.arange(R + 1, device=q.device))
            right = right.sort(descending=True).values[:, :R].contiguous()  # (Q, R)
            # If a right item has rank <= R, at most R right and R - 1 wrong items are at least as
            # near. So the 2 R nearest contain them all, and tell the ranks up to R.
            best = largest(near, min(2 * R, near.shape[1]))
            hits = torch.arange(1, R + 1, device=q.device)
            ranks = hits + at_least(best, right) - at_least(right, right)  # (Q, R) exact up to R
            found = ranks <= R
            sums["map@r"] += (found * hits / ranks).sum() / R
            sums["r_precision"] += found.sum() / R
            first_rank = ranks[:, 0]
            if max(ks) > R:  # where it must be exact beyond R
                first_right = right[:, :1]
                as_near = (right == first_right).sum(dim=1)
                first_rank = 1 + near.ge_(first_right).sum(dim=1) - as_near  # in place is quicker
            for k in ks:
                sums[f"recall@{k}"] += (first_rank <= k).sum()
    if not sums:
        raise ValueError("no label occurs twice, so there is nothing to retrieve")
    return {name: float(total) / int((others > 0).sum()) for name, total in sums.items()}


def largest(values, k):
    """The k largest of each row of values (Q, N), N a multiple of GROUP: (Q, k), sorted. They lie
    in the k groups with the largest maxima, so that one quick pass leaves little to sort."""
    groups = values.unflatten(1, (GROUP, -1))  # (Q, GROUP, N / GROUP): a group is a column
    chosen = groups.amax(dim=1).topk(min(k, groups.shape[2])).indices
    return groups.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1).topk(k).values


def at_least(values, bounds):
    """How many of values (Q, V), sorted descending, are >= each of bounds (Q, W): (Q, W)."""
    return values.shape[1] - torch.searchsorted(values.flip(1), bounds)


def nmi(embeddings, labels, seed):
    """Normalised mutual information, in [0, 1], of the labels and as many KMeans clusters."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    kmeans = KMeans(len(np.unique(labels)), n_init=1, random_state=seed % 2**32)
    return float(normalized_mutual_info_score(labels, kmeans.fit_predict(embeddings.cpu().numpy())))


# ---- 8. Test protocol ----------------------------------------------------------------------------


@torch.no_grad()
def embed(network, batches, device, *, extra=False):
    """{condition: (draws, N, D)} of items of evaluation Batches; draws is 1 but for replaced."""
    network.eval()
    embeddings = defaultdict(list)
    for item in tqdm(batches, "embedding", leave=False, disable=None):
        photos, backgrounds, _ = to_device(item, device)
        images, masks = unpack(photos)
        images, backgrounds = network.normalise(images), network.normalise(backgrounds.float())
        for condition, versions in views(images, masks, backgrounds, extra=extra):
            embeddings[condition].append(torch.stack([network(version) for version in versions]))
    return {condition: torch.cat(parts, dim=1) for condition, parts in embeddings.items()}


def test_batches(split, args, draws=DRAWS):
    """Batches of the test photos and new backgrounds. Fewer draws are the first of more."""
    short = short_side(args.image_size)
    pool = Photos(list_backgrounds(args.backgrounds, "test"), None, short)
    photos = Photos(split.images, split.masks, short, keep=False)
    return Batches(photos=photos, labels=split.labels, size=args.image_size,
                   seed=(args.seed, TEST), pool=pool, draws=draws)


def test(network, split, args):
    """The paper's test protocol and three conditions more: {condition: {metric: value}}, or for
    those that draw backgrounds {condition: {"mean", "std" (ddof 1), "draws"}} of such metrics."""
    batches = test_batches(split, args)
    embeddings = embed(network, loader(batches, args, range(batches.items_a_pass)), args.device,
                       extra=True)
    ks = RECALL_AT.get(args.dataset, (1, 2, 4, 8))

    def score(queries, gallery=None):
        metrics = retrieval_metrics(queries, split.labels, ks, gallery)
        if args.nmi and gallery is None:
            metrics["nmi"] = nmi(queries, split.labels, args.seed)
        return metrics

    clean, replaced = embeddings["clean"][0], embeddings["replaced"]
    return {"clean": score(clean),
            "replaced": mean_and_std([score(draw) for draw in replaced]),
            "query": mean_and_std([score(draw, gallery=clean) for draw in replaced]),
            "object_only": score(embeddings["object_only"][0]),
            "background_only": score(embeddings["background_only"][0])}


def mean_and_std(draws):
    """Of a list of metric dicts; the sample standard deviation (ddof 1)."""
    values = np.array([list(draw.values()) for draw in draws])
    return {"mean": dict(zip(draws[0], values.mean(axis=0).tolist())),
            "std": dict(zip(draws[0], values.std(axis=0, ddof=1).tolist())), "draws": draws}


# ---- 9. Training ---------------------------------------------------------------------------------


def draft_of(path):
    """A name beside `path` for this process to write to before it renames. Removes what processes
    left there that were killed."""
    for draft in path.parent.glob(f"{path.name}.tmp*"):
        owner = draft.name.rpartition(".tmp")[2]
        if not owner.isdigit() or not Path("/proc/self").exists() or Path("/proc", owner).exists():
            continue
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)  # another process may be removing it, too
        else:
            draft.unlink(missing_ok=True)
    return path.with_name(f"{path.name}.tmp{os.getpid()}")


def write(path, save):
    """Calls save(temporary path) and renames that file, so that `path` is always whole. Raises
    UserError."""
    remedy = "make room or choose another folder, the same command goes on"
    with explain(f"{path}: could not be written", remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_of(path)
        try:
            save(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def write_json(path, content):
    write(path, lambda draft: draft.write_text(json.dumps(content, indent=2) + "\n"))


class State:
    """All that a run has learned: `network`, `class_weights` (C, D) or None, `optimiser`, and in
    `history` the figures of each epoch done, a dict an epoch."""

    def __init__(self, args, classes, weights):
        torch.manual_seed(seed_of(args.seed, INIT))
        network = Embedder(args.backbone, weights, args.image_size, args.embedding)
        self.network = network.to(args.device)
        groups = [{"params": self.network.parameters(), "lr": args.lr}]
        self.class_weights = None
        if args.loss in CLASSIFICATION:
            self.class_weights = nn.Parameter(torch.randn(classes, network.width).to(args.device))
            groups.append({"params": [self.class_weights], "lr": args.hparams["lr_loss"]})
        self.optimiser = torch.optim.RMSprop(groups, **RMSPROP)
        self.history = []
        self.select = args.select

    @property
    def epochs(self):
        return len(self.history)

    @property
    def best_epoch(self):
        """The first epoch of the best validation MAP@R; 0 before the first."""
        scores = [row[self.select]["map@r"] for row in self.history]
        return scores.index(max(scores)) + 1 if scores else 0

    def save(self, path, *, optimiser):
        content = {"network": self.network.state_dict(), "class_weights": self.class_weights,
                   "history": self.history}
        if optimiser:
            content["optimiser"] = self.optimiser.state_dict()
        write(path, lambda draft: torch.save(content, draft))

    def load(self, path):
        """Raises UserError if the file is missing, damaged or of another network."""
        with explain(path, f"if it is damaged, delete {path.parent} to start over"):
            content = read_checkpoint(path)
            self.network.load_state_dict(content["network"])
            if self.class_weights is not None:
                self.class_weights.data.copy_(content["class_weights"])
            if "optimiser" in content:
                self.optimiser.load_state_dict(content["optimiser"])
            self.history = content["history"]
            float(sum(row["seconds"] for row in self.history) + self.best_epoch)  # is it whole?


def read_checkpoint(path):
    """What State.save() wrote, on the CPU. Raises nearly anything if the file is damaged."""
    damaged = zipfile.ZipFile(path).testzip()  # compares checksums, which torch.load does not
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def training_data(args, splits, epochs_done):
    """Iterators over all training batches and all validation items that are left, and how many of
    these an epoch has. Both last to the end of the training: no processes are started anew, and the
    next epoch's batches are prepared while this one is validated."""
    short, labels = short_side(args.image_size), splits["train"].labels
    m = images_per_class(args.loss, args.batch_size, len(np.unique(labels)))
    pool = Photos(list_backgrounds(args.backgrounds, "val"), None, short)
    train = Batches(
        photos=Photos(splits["train"].images, splits["train"].masks, short), labels=labels,
        size=args.image_size, seed=(args.seed, TRAIN), pool=pool, draws=int(args.bgaugment),
        sampler=MPerClassSampler(labels, m, args.batch_size))
    val = Batches(
        photos=Photos(splits["val"].images, splits["val"].masks, short),
        labels=splits["val"].labels, size=args.image_size, seed=(args.seed, VAL), pool=pool,
        draws=1)
    batches = range(epochs_done * args.iterations, args.epochs * args.iterations)
    items = range(epochs_done * val.items_a_pass, args.epochs * val.items_a_pass)
    return loader(train, args, batches), loader(val, args, items), val.items_a_pass


def finished(state, args):
    return state.epochs >= args.epochs or state.epochs - state.best_epoch >= args.patience


def train(args, splits, state, run):
    """Epochs of `iterations` batches, a validation after each; ends when `patience` epochs brought
    nothing better, or after `epochs`. Goes on from where `state` is. Writes log.jsonl, best.pt (the
    best epoch) and last.pt (all it needs to go on). Raises UserError if the loss is not finite.
    Section 4."""
    device, network, val_labels = args.device, state.network, splits["val"].labels
    batches, val_items, items_an_epoch = training_data(args, splits, state.epochs)
    while not finished(state, args):
        start = time.monotonic()
        epoch = state.epochs + 1
        network.train()
        losses = []
        for step in tqdm(range(args.iterations), f"epoch {epoch}", leave=False, disable=None):
            photos, backgrounds, labels = to_device(next(batches), device)
            images, masks = unpack(photos)
            if args.bgaugment:  # the paper's method is this line
                images = replace_background(images, masks, backgrounds[0].float())
            torch.manual_seed(seed_of(args.seed, DROPOUT, epoch, step))  # some backbones have it
            embeddings = network(network.normalise(images))
            loss = LOSSES[args.loss](embeddings, labels, state.class_weights, **args.hparams)
            state.optimiser.zero_grad()
            loss.backward()
            state.optimiser.step()
            losses.append(loss.detach())
        loss = float(torch.stack(losses).mean())  # once an epoch: a GPU need not wait at every step
        try:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            embedded = embed(network, itertools.islice(val_items, items_an_epoch), device)
            clean = retrieval_metrics(embedded["clean"][0], val_labels, (1,))
            replaced = retrieval_metrics(embedded["replaced"][0], val_labels, (1,))
        except FloatingPointError as error:
            raise UserError(f"--lr {args.lr}: {error} in epoch {epoch}; give a lower --lr, and "
                            f"delete {run} or give another --runs") from error
        seconds = time.monotonic() - start
        state.history.append({"epoch": epoch, "loss": loss, "clean": clean, "replaced": replaced,
                              "seconds": seconds})
        if state.best_epoch == epoch:
            state.save(run / "best.pt", optimiser=False)
        log = "".join(json.dumps(row) + "\n" for row in state.history)
        write(run / "log.jsonl", lambda draft, log=log: draft.write_text(log))
        state.save(run / "last.pt", optimiser=True)
        best = state.history[state.best_epoch - 1][args.select]["map@r"]
        print(f"epoch {epoch:3d}  loss {loss:.4f}  val MAP@R clean {100 * clean['map@r']:5.2f}"
              f"  replaced {100 * replaced['map@r']:5.2f}  best {100 * best:5.2f}, epoch "
              f"{state.best_epoch}  {seconds:.1f} s an epoch, at most "
              f"{seconds * (args.epochs - epoch) / 60:.1f} min to go", flush=True)


# ---- 10. Tables ----------------------------------------------------------------------------------

KINDS = ("base", "bgaugment")
BAR = "○ replaced ━ clean ●"

# The figures of a run and of a table. heading: condition, metric, heading of the spread in a run.
FIGURES = {
    "clean": ("clean", "map@r", None),
    "replaced": ("replaced", "map@r", "± draws"),
    "query": ("query", "map@r", None),
    "object only": ("object_only", "map@r", None),
    "background only": ("background_only", "map@r", None),
    "R@1 clean": ("clean", "recall@1", None),
    "R@1 replaced": ("replaced", "recall@1", None),
    "attention": ("attention", "score", "± images"),
}
NOTES = f"""MAP@R, R@1 (Recall@1) and differences in %. ± behind a figure: standard deviation
over the runs of several seeds; ± draws: over the {DRAWS} draws of backgrounds inside a run;
± images: of the test images. The bar goes from MAP@R with replaced backgrounds to the one on clean
photos: the longer it is, the more hangs on the background. *: other settings than the paper's (of
toy and of folders: than the defaults)."""

# A finished run. tested: how many classes and photos. figures: {heading: (value, its spread)}.
# unusual: the flags that are unlike the paper's.
Result = namedtuple("Result", "dataset tested loss kind figures unusual")


def row_name(loss, kind):
    name = loss if loss in LOSSES else "the network as it is"
    return f"{name} + BGAugment" if kind == "bgaugment" else name


def read_result(run):
    """The Result in a run's folder. Raises UserError if there is none."""
    if not (run / "result.json").exists():
        raise UserError(f"{run}: not finished")
    figures = {}
    with explain(run, "not a result, left out"):
        saved = json.loads((run / "result.json").read_text())
        args = argparse.Namespace(**saved["args"])
        kind = KINDS[args.bgaugment]
        if args.loss not in LOSSES:
            raise ValueError(f"its loss {args.loss} is not in LOSSES")
        if run_folder(args, kind).name != run.name:
            raise ValueError(f"it is of {run_folder(args, kind).name}")
        for heading, (condition, metric, _) in FIGURES.items():
            scores = saved["test"].get(condition)
            if scores:
                mean, std = scores.get("mean", scores)[metric], scores.get("std", {}).get(metric, 0)
                if not (0 <= mean <= 1 and 0 <= std <= 1):
                    raise ValueError(f"its {heading} is {mean} ± {std}")
                figures[heading] = 100 * mean, 100 * std
        figures["clean"], figures["replaced"]  # a KeyError if one lacks
        if args.hparams != hparams_of(args):
            args.unusual.append(f"HPARAMS {args.hparams}")
        result = Result(dataset_name(args.dataset), str(saved["tested"]), loss_name(args), kind,
                        figures, " ".join(args.unusual))
    with contextlib.suppress(Exception):  # damaged, or none yet: the row has no attention then
        attention = json.loads((run / "attention.json").read_text())
        if math.isfinite(attention["mean"] + attention["std"]):
            figures["attention"] = attention["mean"], attention["std"]
    return result


def table_row(results):
    """{heading: cell} of the runs, one a seed, of one dataset, loss and kind. Of several seeds a
    figure is "mean ± standard deviation over the seeds". The paper's stand behind ours."""
    first = results[0]
    mark = " *" if any(result.unusual for result in results) else ""
    row = {"": row_name(first.loss, first.kind) + mark, "seeds": str(len(results))}
    paper = PAPER.get(first.dataset, {}).get(first.loss, {}).get(first.kind)
    for heading, (_, _, spread) in FIGURES.items():
        figures = [result.figures[heading] for result in results if heading in result.figures]
        if figures:
            means, stds = np.transpose(figures)
            row[heading] = f"{means.mean():.2f}"
            if len(figures) > 1:
                row[heading] += f" ± {means.std(ddof=1):.2f}"
            if spread:
                row[spread] = f"{stds.mean():.2f}"
        published = getattr(paper, heading, None)
        if published is not None:
            row[f"paper: {heading}"] = f"{published:.2f}"
            if hasattr(paper, f"{heading}_std"):
                row[f"paper: {heading}"] += f" ± {getattr(paper, f'{heading}_std'):.2f}"
            if figures:
                difference = round(means.mean() - published, 2) + 0  # + 0 makes -0.0 a 0.0
                row[f"{heading} - paper"] = f"{difference:+.2f}"
    return row


def add_bars(rows, width=24):
    """Gives each row a bar from the MAP@R with replaced backgrounds to the one on clean photos."""
    ends = [float(row[end].split()[0]) for row in rows for end in ("replaced", "clean")]
    ends = np.reshape(ends, (-1, 2)) * (width - 1) / max(*ends, 0.01)
    for row, (ring, disc) in zip(rows, ends.round().astype(int)):
        cells = np.full(width, " ")
        cells[min(ring, disc):max(ring, disc)] = "━"
        cells[ring] = "○"
        cells[disc] = "●"
        row[BAR] = "".join(cells)


def as_table(rows, wanted=None, *, room=math.inf):
    """Rows {heading: cell} as an aligned Markdown table of all their headings, or of those wanted.
    Columns that do not fit into `room` characters follow below."""
    there = dict.fromkeys(heading for row in rows for heading in row)
    columns = []
    for heading in [heading for heading in wanted or there if heading in there]:
        cells = [heading, "", *(row.get(heading, "") for row in rows)]
        width = max(map(len, cells))
        cells[1] = "-" * width
        columns.append([f"{cell:>{width}}" if heading else f"{cell:<{width}}" for cell in cells])
    names, *columns = columns
    tables = []
    for column in columns:
        if not tables or len(tables[-1][0]) + len(column[0]) + 3 > room:
            tables.append([f"| {name} |" for name in names])
        tables[-1] = [f"{line} {cell} |" for line, cell in zip(tables[-1], column)]
    return "\n\n".join("\n".join(lines) for lines in tables)


def terminal_width():
    return shutil.get_terminal_size((120, 24)).columns


def report(folder):
    """Prints a table a dataset of all finished runs in `folder`, beside the paper's, and writes it
    to folder/report.md. Raises UserError if no run is finished. Sections 4.3 and 5."""
    datasets, remarks = defaultdict(dict), []
    for run in sorted({file.parent for file in folder.glob("*/*.json")}):
        try:
            result = read_result(run)
        except UserError as error:
            remarks.append(f"- {error}")
            continue
        rows = datasets[result.dataset, result.tested]
        rows.setdefault((result.loss, result.kind), []).append(result)
        if result.unusual:
            remarks.append(f"- * {run}: {result.unusual}")
    if not datasets:
        raise UserError(f"--report {folder}: no finished run; {(remarks or ['train one'])[0]}")
    never_run = sorted(PAPER.keys() - {dataset for dataset, _ in datasets})

    def text(room):
        parts = ["# Background bias, measured", NOTES]
        for (dataset, tested), runs in datasets.items():
            keys = list(itertools.product([*LOSSES, "untrained"], KINDS))
            rows = [table_row(runs[key]) for key in keys if key in runs]
            add_bars(rows)
            parts += [f"## {dataset}: {tested}", as_table(rows, room=room)]
            missing = [row_name(*key) for key in keys[:-2] if key not in runs]
            if missing and dataset in SPLITS:
                parts.append(f"{dataset}, not run: {', '.join(missing)}")
        if never_run:
            parts.append(f"not run at all: {', '.join(never_run)}")
        return "\n\n".join(parts + ["\n".join(remarks)] * bool(remarks))

    markdown = text(math.inf) + "\n"
    write(folder / "report.md", lambda draft: draft.write_text(markdown, "utf-8"))
    print(text(terminal_width()))


def print_results(args):
    """Prints the run's test MAP@R, beside its base or BGAugment sibling's if nothing else differs
    between them, and says in words what it means."""
    run = run_folder(args, KINDS[args.bgaugment])
    this, results = read_result(run), []
    for folder in (run_folder(args, kind) for kind in KINDS):
        with contextlib.suppress(UserError):  # the sibling is not there yet, or damaged
            result = read_result(folder)
            if (result.tested, result.unusual) == (this.tested, this.unusual):
                results.append(result)
            else:
                print(f"{folder}: not comparable, {result.tested}, "
                      f"{result.unusual or 'the defaults'}")
    rows = [table_row([result]) for result in results]
    add_bars(rows)
    shown = ["", "clean", "replaced", "query", "object only", "background only", BAR]
    print(f"\ntest MAP@R, %: {this.tested}")
    print(as_table(rows, shown, room=terminal_width()))
    if this.unusual:
        print(f"* {this.unusual}")
    for result in results:
        clean, replaced, background = (
            result.figures[heading][0] for heading in ("clean", "replaced", "background only"))
        lost = f"{100 * (clean - replaced) / clean:.0f} %" if clean > replaced else "nothing"
        print(f"With other backgrounds {row_name(result.loss, result.kind)} loses {lost} of its "
              f"MAP@R; on backgrounds alone it still reaches {background:.1f} %.")
    print(f"all metrics: {run / 'result.json'}")


# ---- 11. Command line ----------------------------------------------------------------------------

# These say which run it is and where its data lies; other values earn no * in the tables.
IDENTITY = {"dataset", "loss", "bgaugment", "seed", "data", "hparams"}
# These may have other values when a run goes on.
MAY_CHANGE = {"runs", "device", "workers", "nmi", "report", "unusual", "photos"}


def number(low, kind=int):
    """An argparse type: a finite number from `low` up."""
    def parse(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def shard(text):
    """An argparse type: "3/8" -> (3, 8), the third of every eight images."""
    i, n = (int(part) for part in text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return i, n


def hparams_of(args):
    """The hyper-parameters of the loss. Raises UserError if it has none."""
    tuned_on = args.dataset if args.dataset in HPARAMS else "cars196"
    if args.loss not in HPARAMS[tuned_on]:
        raise UserError(f"--loss {args.loss}: has no entry in HPARAMS['{tuned_on}']")
    return HPARAMS[tuned_on][args.loss]


def parse_args(argv=None):
    """All arguments, and beside them `hparams`, the loss's, and `unusual`, a list of the flags
    whose values are not the paper's. Raises UserError."""
    parser = argparse.ArgumentParser(
        description="Train an image retrieval model and measure its background bias.",
        epilog=f"Defaults, in brackets, are the paper's. With --dataset toy: {DEFAULTS['toy']}.")
    add, default = parser.add_argument, " [%(default)s]"
    add("--dataset", default="toy",
        help="toy, cars196, cub200, sop or FOLDER of images/<class>/" + default)
    add("--loss", choices=LOSSES, default="contrastive", help="training loss" + default)
    add("--bgaugment", action="store_true", help="replace the background of every training image")
    add("--data", default="data", help="folder that holds the named datasets" + default)
    add("--backgrounds", help="folder with val/ and test/ photos [DATA/unsplash_backgrounds]")
    add("--runs", default="runs", help="folder that holds the run folders" + default)
    add("--seed", type=number(0), default=42, help="fixes every random number" + default)
    add("--epochs", type=number(0), help="at most; 0 tests the untrained network" + default)
    add("--iterations", type=number(1), help="batches an epoch" + default)
    add("--patience", type=number(1), default=15,
        help="epochs without improvement before it stops" + default)
    add("--batch-size", type=number(2), default=32, help="images a batch" + default)
    add("--lr", type=number(0, float), help="learning rate, not of class weights" + default)
    add("--backbone", help="bninception, smallconv, a torchvision classifier, or REPO:NAME, which "
        "runs NAME() of the hubconf.py in a folder or GitHub's owner/repo" + default)
    add("--weights", help="imagenet (REPO:NAME: its own), none (random) or a file" + default)
    add("--embedding", type=number(0), default=EMBEDDING,
        help="size of the embedding; 0: the backbone's features, at unit length" + default)
    add("--image-size", type=number(16), help="side of the crops, px" + default)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps" + default)
    add("--workers", type=number(0), help="processes preparing batches [up to 8 for a GPU, else 0]")
    add("--select", choices=("clean", "replaced"),
        help="validation that picks the epoch [replaced with --bgaugment, else clean]")
    add("--nmi", action="store_true", help="report NMI of the test embeddings too (slow)")
    add("--report", metavar="RUNS", help="tables of all runs in RUNS; writes RUNS/report.md")
    parser.set_defaults(**DEFAULTS["paper"])  # which the help shows
    known, _ = parser.parse_known_args(argv)
    toy = known.dataset == "toy"
    pool = Path(known.data, "toy/backgrounds" if toy else "unsplash_backgrounds")
    parser.set_defaults(**DEFAULTS["toy" if toy else "paper"], backgrounds=str(pool),
                        select="replaced" if known.bgaugment else "clean")
    if ":" in (known.backbone or ""):
        parser.set_defaults(weights="imagenet")  # its own
    args = parser.parse_args(argv)
    if Path(args.weights).name == Path(BNINCEPTION_URL).name:  # the paper's, fetched by hand
        parser.set_defaults(weights=args.weights)
    args.hparams = hparams_of(args)  # in config.json: they make a run what it is
    args.unusual = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
                    if name not in IDENTITY | MAY_CHANGE and value != parser.get_default(name)]
    return args


def choose_device(args):
    """Fills in --device and --workers. Raises UserError if they cannot work."""
    if args.device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        args.device = "cuda" if torch.cuda.is_available() else mps
    with explain(f"--device {args.device}", "it does not work here, give another"):
        probe = torch.ones(1, 1, 2, 2, device=args.device)
        F.conv2d(probe, probe).item()  # a kernel: an old GPU is there, but has none
    if probe.device.type == "cuda":
        torch.cuda.set_device(probe.device)  # batches are pinned for this one
    if args.workers is None:
        args.workers = min(8, os.cpu_count()) if args.device.startswith("cuda") else 0
    # Workers hand their batches over in /dev/shm, of which a container often has only 64 MB. Each
    # prepares two: of training and validation (4 + 3 bytes a pixel), or of the test with its draws.
    largest = max(7 * (args.batch_size + EVAL_BATCH), (4 + 3 * DRAWS) * EVAL_BATCH)
    needed = 2 * args.workers * largest * args.image_size**2
    if args.workers and Path("/dev/shm").is_dir() and needed > shutil.disk_usage("/dev/shm").free:
        raise UserError(f"--workers {args.workers}: they need {needed / 2**20:,.0f} MB of /dev/shm,"
                        " which has less; use fewer or --workers 0, or give the container more "
                        "(docker run --shm-size=2g)")


def dataset_name(dataset):
    """What folders and tables call it; a user's folder never like one of the paper's datasets."""
    if dataset in SPLITS:
        return dataset
    name = Path(dataset).resolve().name
    return f"{name}-folder" if name in SPLITS else name


def loss_name(args):
    """What folders and tables call it; a run of no epochs has none."""
    return args.loss if args.epochs else "untrained"


def run_folder(args, kind):
    name = f"{dataset_name(args.dataset)}-{loss_name(args)}-{kind}-s{args.seed}"
    return Path(args.runs, name)


def check_config(args, run):
    """Raises UserError if the run was begun with other arguments, or its config cannot be read."""
    with explain(run / "config.json", f"delete {run} to start over"):
        saved = dict(json.loads((run / "config.json").read_text())["args"])
        if "photos" in args and args.photos != saved["photos"]:
            raise ValueError("photos were added, removed or renamed since the run was begun")
    differ = [f"--{name.replace('_', '-')} {saved.get(name)} (now {value})" for name, value
              in vars(args).items() if name not in MAY_CHANGE and saved.get(name) != value]
    if differ:
        raise UserError(f"{run}: begun with {', '.join(differ)}; take the same, give another "
                        f"--runs, or delete {run} to start over")


def write_config(args, run):
    """Writes config.json: all arguments, git revision, device, versions."""
    git = shutil.which("git") and subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True).stdout.strip()
    gpu = args.device.startswith("cuda")
    write_json(run / "config.json", {
        "args": vars(args), "git": git or "unknown",
        "device": torch.cuda.get_device_name(args.device) if gpu else args.device,
        "python": sys.version.split()[0], "torch": torch.__version__,
        "torchvision": torchvision.__version__, "numpy": np.__version__})


def check_data(args, splits):
    """Notes in `args` which photos the run is of. Raises UserError if it cannot be trained on them:
    too few classes for the batches, too few backgrounds for the paper's protocol."""
    paths = "".join(str(path) for split in splits.values() for path in split.images)
    args.photos = f"{zlib.crc32(paths.encode()):08x}"
    if args.epochs:
        images_per_class(args.loss, args.batch_size, len(np.unique(splits["train"].labels)))
    for part in ("val", "test") if args.epochs else ("test",):
        photos = len(list_backgrounds(args.backgrounds, part))
        given = any(flag.startswith("--backgrounds") for flag in args.unusual)
        if args.dataset in PAPER and photos != POOL and not given:
            raise UserError(f"{args.backgrounds}/{part}: {photos} photos, not {POOL}; see README, "
                            "Data, or give a folder of your own as --backgrounds")


def main(argv=None):
    args = parse_args(argv)
    if args.report is not None:
        if not args.report or not Path(args.report).is_dir():
            raise UserError(f"--report '{args.report}': no such folder; give the one with the runs")
        return report(Path(args.report))
    kind = KINDS[args.bgaugment]
    run = run_folder(args, kind)
    if (run / "result.json").exists():
        check_config(args, run)
        print(f"{run} is done; to test it again delete its result.json, to start over the folder")
        return print_results(args)
    choose_device(args)
    splits = load_splits(args.dataset, args.data, training=args.epochs > 0)
    check_data(args, splits)
    begun = (run / "last.pt").exists()
    if begun:
        check_config(args, run)
    # A run that goes on needs no pretrained weights, last.pt has its own.
    state = State(args, len(np.unique(splits["train"].labels)), "none" if begun else args.weights)
    if begun:
        state.load(run / "last.pt")
    else:
        write_config(args, run)
    print(f"{dataset_name(args.dataset)} · {row_name(loss_name(args), kind)} · seed {args.seed} · "
          f"{args.backbone}, {args.image_size} px · {args.device} · {run}"
          + (f" · after epoch {state.epochs}" if begun else ""), flush=True)
    if not finished(state, args):
        train(args, splits, state, run)
    elif not begun:  # --epochs 0: the untrained network is the result
        state.save(run / "best.pt", optimiser=False)
    epochs, seconds = state.epochs, sum(row["seconds"] for row in state.history)
    state.load(run / "best.pt")
    labels = splits["test"].labels
    try:
        figures = test(state.network, splits["test"], args)
    except FloatingPointError as error:
        raise UserError(f"--backbone {args.backbone}: {error} on the test photos; are its weights, "
                        "and its std, sound?") from error
    write_json(run / "result.json", {
        "args": vars(args), "epochs": epochs, "best_epoch": state.best_epoch, "seconds": seconds,
        "tested": f"{len(np.unique(labels))} test classes, {len(labels):,} photos",
        "test": figures})
    print_results(args)


def command(name, main):
    """Runs a script's main(); what the user can mend ends in one line on stderr and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # they are None if the caller closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for ○
    try:
        main()
        sys.stdout.flush()  # or a pipe that nobody reads any more is an error when Python ends
        return
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `bgbias.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        reason = str(error).split("UserError: ")[-1].strip()  # without a worker's traceback
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        reason = one_line(error)
        if "DataLoader" in reason or isinstance(error, (ConnectionError, EOFError)):
            reason = (f"--workers: a process that prepares batches died or hangs ({reason}); is "
                      "memory or /dev/shm full (docker run --shm-size=2g)? The same command goes "
                      "on; try fewer, or 0")
        elif isinstance(error, MemoryError) or "memory" in reason:
            reason += "; try a smaller --batch-size"
        elif isinstance(error, RuntimeError):
            raise
    if hasattr(signal, "SIGCHLD"):  # or PyTorch tells of a dead worker again while Python ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print(f"{name}: error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    command("bgbias.py", main)
