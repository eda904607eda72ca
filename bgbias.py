"""Background bias in deep metric learning: train an image retrieval model, replace the backgrounds
of its test images, and see how much of the retrieval goes. One script, after Kobs & Hotho, "On
Background Bias in Deep Metric Learning" (ICMV 2022, arXiv 2210.01615).

    python bgbias.py                                # toy data, contrastive loss, about a minute
    python bgbias.py --bgaugment                    # the same, backgrounds replaced in training
    python bgbias.py --dataset cars196 --loss contrastive --bgaugment     # a run of the paper
    python bgbias.py --dataset my_photos --loss triplet                 # my_photos/images/<class>/
    python bgbias.py --report runs                  # all runs beside the paper's, and a chart

Every default is the paper's; toy has its own (DEFAULTS). A run lives in
RUNS/<dataset>-<loss>-<base|bgaugment>-s<seed>/: config.json, log.jsonl, last.pt, best.pt and,
written last, result.json. The same command again resumes it; a run with a result.json is done.

The sections below follow the paper:
    1. constants        splits and hyper-parameters (Section 4; Musgrave et al. 2020)
    2. data             three datasets, a folder of your own, the embedded toy set (Section 4.1)
    3. views            crops, background replacement, BGAugment (Sections 3 and 5)
    4. sampler          m images of each class in a batch (Section 4)
    5. network          BN-Inception + Linear(1024, 128) + L2 normalisation (Section 4)
    6. losses           five of them (Section 4.2)
    7. metrics          MAP@R, R-precision, Recall@K (Section 4.3)
    8. test protocol    clean, replaced, and what a shop would ask (Section 4.3)
    9. training         epochs, selection, checkpoints, resuming (Section 4)
   10. report           ours beside the paper's (Sections 4.3 and 5)
   11. command line

Shapes: B batch, D embedding (128), C classes, N images, H W pixels, S crop size, K neighbours.
A mask is (B, 1, H, W) in [0, 1], soft, and 1 = foreground, everywhere.
A comment tagged DIFF marks what the authors' code does differently; the README lists the same.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont
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
ALIASES = {"stanford_online_products": "sop"}

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
        # The negative margin is intended: it counts every positive pair in the mean.
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

# The paper's results, base and BGAugment: test MAP@R in % clean, with replaced backgrounds and its
# standard deviation over the draws; mean attention score, its standard deviation over the images.
PAPER = {
    "cars196": {
        "arcface": ((16.25, 13.63, 0.08, 0.49, 0.10), (16.19, 16.23, 0.04, 0.56, 0.10)),
        "contrastive": ((15.22, 13.31, 0.15, 0.50, 0.09), (16.43, 16.31, 0.03, 0.53, 0.10)),
        "multi_similarity": ((18.80, 16.25, 0.06, 0.52, 0.09), (15.61, 15.48, 0.05, 0.50, 0.09)),
        "normalized_softmax": ((18.06, 15.36, 0.03, 0.51, 0.09), (18.15, 18.12, 0.05, 0.56, 0.09)),
        "triplet": ((15.33, 13.40, 0.04, 0.50, 0.09), (15.28, 15.19, 0.05, 0.54, 0.09)),
    },
    "cub200": {
        "arcface": ((20.66, 12.87, 0.16, 0.25, 0.08), (20.91, 17.92, 0.08, 0.33, 0.09)),
        "contrastive": ((20.27, 12.47, 0.08, 0.25, 0.08), (19.39, 15.46, 0.08, 0.32, 0.10)),
        "multi_similarity": ((19.19, 12.21, 0.16, 0.26, 0.08), (18.93, 15.65, 0.16, 0.30, 0.09)),
        "normalized_softmax": ((20.18, 12.41, 0.10, 0.24, 0.08), (20.60, 17.39, 0.10, 0.30, 0.08)),
        "triplet": ((18.29, 10.94, 0.05, 0.24, 0.08), (18.56, 15.33, 0.16, 0.33, 0.09)),
    },
    "sop": {
        "arcface": ((40.50, 6.98, 0.05, 0.13, 0.14), (22.25, 16.53, 0.05, 0.26, 0.17)),
        "contrastive": ((37.98, 4.17, 0.05, 0.07, 0.16), (31.52, 24.09, 0.04, 0.31, 0.20)),
        "multi_similarity": ((39.65, 6.51, 0.06, 0.11, 0.17), (32.67, 24.00, 0.07, 0.28, 0.19)),
        "normalized_softmax": ((41.52, 7.67, 0.04, 0.12, 0.14), (32.16, 24.60, 0.03, 0.28, 0.20)),
        "triplet": ((36.71, 6.05, 0.06, 0.08, 0.17), (29.63, 21.39, 0.07, 0.26, 0.22)),
    },
}

DEFAULTS = {  # of the flags whose default depends on the dataset
    "paper": dict(epochs=1000, iterations=100, lr=1e-6, image_size=227, backbone="bninception",
                  weights="imagenet"),
    "toy": dict(epochs=15, iterations=50, lr=5e-5, image_size=48, backbone="smallconv",
                weights="none"),
}
RMSPROP = dict(weight_decay=1e-4, momentum=0.9, alpha=0.99, eps=1e-8)
EMBEDDING = 128
SHORT_SIDE = 256 / 227  # short side of a photo before cropping, in units of the crop
CROP_SCALE, CROP_RATIO, FLIP = (0.16, 1.0), (0.75, 1.33), 0.5  # of RandomResizedCrop, Section 4
DRAWS = 5  # random draws of backgrounds at test time; validation draws once an epoch
RECALL_AT = {"sop": (1, 10, 100, 1000)}  # else 1, 2, 4, 8
CONDITIONS = ("clean", "replaced", "query", "object_only", "background_only")
GROUP = 32  # of the search for the nearest neighbours
EVAL_BATCH = 64  # part of the seed of the evaluation's backgrounds: not a flag

# Network input: channel order, mean, standard deviation, for pixels in [0, 255].
BGR_CAFFE = ([2, 1, 0], [104.0, 117.0, 128.0], [1.0, 1.0, 1.0])
RGB_TORCHVISION = ([0, 1, 2], [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])

BNINCEPTION_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"


class UserError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


class Stopped(Exception):
    """SIGTERM came; raised where the training state is whole."""


# ---- 2. Data -------------------------------------------------------------------------------------

# Per image: path, mask path, label; `split` maps train, val, test to their image indices.
Index = namedtuple("Index", "images masks labels split")

PHOTO = (".jpg", ".jpeg", ".png", ".webp")
MARKS = {  # what is looked for under DATA; its parent is the dataset's root
    "cars196": ("car_ims", "cars196/car_ims", "cars_train", "cars196/cars_train",
                "stanford_cars/cars_train"),
    "cub200": ("CUB_200_2011/images", "cub200/CUB_200_2011/images"),
    "sop": ("Stanford_Online_Products/Ebay_train.txt",
            "sop/Stanford_Online_Products/Ebay_train.txt"),
}


def dataset_root(dataset, data):
    """The folder of `dataset`: a named one under `data`, or the user's own. Raises UserError."""
    if dataset == "toy":
        return make_toy(Path(data, "toy"))
    for mark in MARKS.get(dataset, ()):
        if Path(data, mark).exists():
            return Path(data, mark).parent
    if dataset in MARKS:
        looked = ", ".join(MARKS[dataset])
        raise UserError(f"--data {data}: no {dataset} in it, looked for {looked}; see README, Data")
    if not Path(dataset, "images").is_dir():
        raise UserError(f"--dataset {dataset}: neither {', '.join(SPLITS)} nor a folder with "
                        "images/<class>/ in it")
    return Path(dataset)


def need(file, read):
    """read(file) of a dataset's list. Raises UserError if it is missing or broken."""
    if not file.exists():
        raise UserError(f"{file}: missing list; see README, Data")
    try:
        return read(file)
    except Exception as error:  # scipy raises nearly anything
        raise UserError(f"{file}: broken list ({error!r}); get it again, README, Data") from error


def list_cars196(root):
    """[(path, label)] of car_ims/ + cars_annos.mat or of cars_train/, cars_test/ + devkit/."""
    from scipy.io import loadmat

    if (root / "car_ims").is_dir():
        lists = [("cars_annos.mat", "", "relative_im_path")]
    else:
        test = "cars_test_annos_withlabels.mat"  # not part of the devkit: beside it or put into it
        test = test if (root / test).exists() else f"devkit/{test}"
        lists = [("devkit/cars_train_annos.mat", "cars_train", "fname"),
                 (test, "cars_test", "fname")]
    return [item for file, folder, field in lists for item in need(root / file, lambda file: [
        (root / folder / row[field], int(row["class"]) - 1)
        for row in loadmat(file, simplify_cells=True)["annotations"]])]


def list_sop(root):
    """[(path, label)] of Ebay_{train,test}.txt: image_id class_id super_class_id path."""
    def read(file):
        rows = (line.split() for line in file.read_text().splitlines()[1:])
        return [(root / path, int(label) - 1) for _, label, _, path in rows]

    return need(root / "Ebay_train.txt", read) + need(root / "Ebay_test.txt", read)


def list_folder(root):
    """[(path, label)] of root/images/<class>/<photo>, classes and photos sorted by name."""
    classes = [sorted(photos(folder)) for folder in sorted((root / "images").iterdir())]
    return [(photo, label) for label, own in enumerate(filter(None, classes)) for photo in own]


def photos(folder):
    return (p for p in folder.glob("*") if p.suffix.lower() in PHOTO)


def mask_path(root, image):
    """The one rule: the mask of ROOT/images/a/b.jpg or ROOT/a/b.jpg is ROOT/masks/a/b.png."""
    parts = image.relative_to(root).parts
    return Path(root, "masks", *parts[parts[0] == "images":]).with_suffix(".png")


def split_ranges(dataset, classes):
    """{part: range of labels}; a user's folder is split 74 : 24 : 98, as Cars196."""
    if dataset in SPLITS:
        return SPLITS[dataset]
    train = max(1, round(classes * 74 / 196))
    val = train + max(1, round(classes * 24 / 196))
    return {"train": range(train), "val": range(train, val), "test": range(val, classes)}


def load_index(dataset, data="data", need_masks=True):
    """The Index of a dataset, its files checked to be there. Raises UserError naming what lacks."""
    root = dataset_root(dataset, data)
    items = {"cars196": list_cars196, "sop": list_sop}.get(dataset, list_folder)(root)
    images, labels = [path for path, _ in items], np.array([label for _, label in items])
    masks = [mask_path(root, path) for path in images]
    ranges = split_ranges(dataset, len(np.unique(labels)))
    split = {part: np.flatnonzero(np.isin(labels, own)) for part, own in ranges.items()}
    check_counts(dataset, root, labels, split)
    twice = [path for path, n in Counter(masks).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]}: would be the mask of two photos; rename one of them")
    check_files(images, "image", f"unpack {root} again")
    if need_masks:
        check_files(masks, "mask", f"run: python masks.py --dataset {dataset} --data {data}")
    return Index(images, masks, labels, split)


def check_counts(dataset, root, labels, split):
    counts = len(labels), len(split["test"])
    if counts != COUNTS.get(dataset, counts):
        raise UserError(f"{root}: {counts[0]:,} images, {counts[1]:,} for testing, instead of "
                        "{:,} and {:,}; delete it and unpack it again".format(*COUNTS[dataset]))
    for part, rows in split.items():
        if np.bincount(labels[rows], minlength=1).max() < 2:
            raise UserError(f"{root}: no class with two photos for {part}; add classes or photos")


def check_files(paths, what, remedy):
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: missing {what}, one of {len(missing):,}; {remedy}")


def open_rgb(path):
    """The photo as PIL opens it (no EXIF rotation), 8-bit RGB. Raises UserError."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):  # PIL clips 16 bits at 255 where it should divide
            image = Image.fromarray((np.asarray(image, float) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: no readable image ({error}); replace or remove it") from error


def list_backgrounds(folder, part):
    """Sorted paths of the pool FOLDER/val or FOLDER/test. Raises UserError."""
    # DIFF: backgrounds are sorted by name; in file-system order a seed would not fix the draws.
    pool = Path(folder, part)
    if not (paths := sorted(photos(pool))):
        raise UserError(f"--backgrounds {folder}: no photos in {pool}; see README, Data")
    return paths


# The toy set: products with a class's own pattern, photographed by a seller before the seller's own
# backdrop. Written once, in the layout of a user's own folder, so all other code is the same.


def toy_texture(seed, size):
    """A procedural backdrop, a PIL image: squashed waves between two colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / 64
    waves = rng.uniform([-3, -3, 0, 0.3], [3, 3, 1, 1], (3, 4))
    level = sum(a * np.sin(2 * np.pi * (fx * x + fy * y + p)) for fx, fy, p, a in waves)
    dark, light = rng.uniform(0, 255, (2, 3))
    image = dark + (light - dark) * (np.tanh(2 * level[..., None]) + 1) / 2
    return Image.fromarray(image.astype(np.uint8))


def toy_class(rng, photos=20, size=54, share=0.95):
    """Yields (photo, mask), PIL images, of one class: its pattern (two colours on a symmetric 5 x 5
    grid) under random scale, rotation, shift and light, mostly before its seller's backdrop."""
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
        at = tuple(int((size - n) * rng.random()) for n in product.size)
        mask = Image.new("L", photo.size)
        mask.paste(product.getchannel("A"), at)
        photo.paste(product, at, product)
        light = np.asarray(photo) * rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, 3)
        yield Image.fromarray(light.clip(0, 255).astype(np.uint8)), mask


def make_toy(root, seed=2022):
    """Writes the toy set to `root`, whole or not at all; returns it. The same every time, 10 s."""
    if root.exists():
        return root
    draft = root.with_name(f"{root.name}.tmp{os.getpid()}")
    try:
        for label in range(SPLITS["toy"]["test"].stop):
            folders = [draft / kind / f"{label:03d}" for kind in ("images", "masks")]
            for folder in folders:
                folder.mkdir(parents=True)
            for i, pair in enumerate(toy_class(np.random.default_rng([seed, label]))):
                for folder, image in zip(folders, pair):
                    image.save(folder / f"{i:02d}.png")
        for k, part in enumerate(("val", "test")):
            (draft / "backgrounds" / part).mkdir(parents=True)
            for i in range(100):
                toy_texture([seed, k, i, 1], 80).save(draft / "backgrounds" / part / f"{i:02d}.png")
        draft.rename(root)
    except OSError:
        if not root.exists():  # else another run was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


# ---- 3. Views: decoding once, crops, background replacement --------------------------------------


class Photos(torch.utils.data.Dataset):
    """Item i: photo and mask as one (4, H, W) uint8 tensor (R, G, B, mask), short side resized to
    `short`, centre-cropped to `crop` if given. One tensor, so that every later crop and flip is the
    same for both. `masks` None: (3, H, W). Decoded once and kept, if `keep` and memory allow."""

    def __init__(self, images, masks, short, crop=None, keep=True):
        self.images, self.masks, self.short, self.crop = images, masks, short, crop
        self.kept = None
        if keep and self.fits():
            # DIFF: photos are resized once a run; the authors do it at every use, to the same end.
            with ThreadPoolExecutor(cpus()) as threads:
                decoded = threads.map(self.decode, range(len(self)))
                self.kept = list(tqdm(decoded, "decoding", len(self), leave=False, disable=None))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.decode(i) if self.kept is None else self.kept[i]

    def decode(self, i):
        planes = [open_rgb(self.images[i])]
        if self.masks is not None:
            planes.append(open_rgb(self.masks[i]).getchannel(0))
            if planes[0].size != planes[1].size:
                raise UserError(f"{self.masks[i]}: its size is {planes[1].size}, the photo's is "
                                f"{planes[0].size}; delete it and run masks.py")
        photo = torch.cat([TF.pil_to_tensor(TF.resize(plane, self.short)) for plane in planes])
        return TF.center_crop(photo, self.crop).clone() if self.crop else photo

    def fits(self):
        """Whether all of it, decoded, fits in four fifths of the free memory; says so if not."""
        sizes = [Image.open(path).size for path in self.images[:: len(self) // 64 + 1]]
        aspect = 1 if self.crop else np.mean([max(size) / min(size) for size in sizes])
        needed, free = len(self) * 4 * (self.crop or self.short) ** 2 * aspect, free_memory()
        if needed > 0.8 * free:
            print(f"{len(self):,} photos, {needed / 2**30:.1f} GiB decoded, do not fit in the "
                  f"{free / 2**30:.1f} GiB free: decoding at every use instead (--workers helps)")
        return needed <= 0.8 * free


def cpus():
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory():
    """Bytes that can be had: what Linux and the control groups (version 2) of a container or of a
    scheduler's job leave; elsewhere half of all."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        own = Path("/proc/self/cgroup").read_text().split("::")[1].strip()
    except (OSError, IndexError):
        return free
    group = Path(f"/sys/fs/cgroup{own}")
    for folder in (group, *group.parents):
        try:  # used includes file caches: careful rather than killed
            limit, used = (int((folder / name).read_text())
                           for name in ("memory.max", "memory.current"))
            free = min(free, limit - used)
        except (OSError, ValueError):  # no limit here
            pass
    return free


def random_view(photo, size):
    """The training transform, RandomResizedCrop and flip: (., H, W) uint8 -> (., S, S) uint8."""
    box = torchvision.transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO)
    view = TF.resized_crop(photo, *box, [size, size], antialias=True)
    return TF.hflip(view) if torch.rand(()) < FLIP else view


class Batches(torch.utils.data.Dataset):
    """Item b: photos (B, 4, S, S), backgrounds (draws, B, 3, S, S), uint8, of the b-th index list.

    In training the photos are cropped at random. Backgrounds are drawn with replacement from `pool`
    and always take the training transform, in evaluation too (Section 4).
    """

    def __init__(self, photos, lists, size, train, pool, draws, seed):
        self.photos, self.lists, self.size, self.train = photos, lists, size, train
        self.pool, self.draws, self.seed = pool, draws, seed

    def __len__(self):
        return len(self.lists)

    def __getitem__(self, b):
        # DIFF: random numbers are a function of (seed, epoch, batch), so resuming changes none.
        torch.manual_seed(mix(*self.seed, b))
        photos = [self.photos[i] for i in self.lists[b]]
        if self.train:
            photos = [random_view(photo, self.size) for photo in photos]
        picks = torch.randint(len(self.pool) or 1, (self.draws, len(photos)))
        drawn = [random_view(self.pool[i], self.size) for i in picks.flatten()]
        shape = (*picks.shape, 3, self.size, self.size)
        return torch.stack(photos), torch.cat(drawn).view(shape) if drawn else torch.empty(shape)


def mix(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def loader(batches, args, start=0):
    """Iterates items start, start + 1, ... of `batches`, prepared ahead by --workers processes."""
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # shares the decoded photos
    # Workers inherit what is blocked: the parent, which gets the signal too, decides on their end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        return iter(torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=range(start, len(batches)), num_workers=args.workers,
            multiprocessing_context="fork" if fork and args.workers else None,
            pin_memory=args.device.startswith("cuda")))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def unpack(photos):
    """(B, 4, S, S) uint8 -> images (B, 3, S, S) in [0, 255], masks (B, 1, S, S) in [0, 1]"""
    return photos[:, :3].float(), photos[:, 3:].float() / 255


def replace_background(images, masks, backgrounds):
    """(B, 3, H, W), (B, 1, H, W) in [0, 1] with 1 = foreground, (B, 3, H, W) -> (B, 3, H, W)"""
    return images * masks + backgrounds * (1 - masks)


def conditions(photos, backgrounds, model, everything=False):
    """Yields (name, network input (B, 3, S, S)) of a Batches item: clean, replaced_0, ...
    and, with `everything`, object_only and background_only, the other part in the mean colour."""
    images, masks = unpack(photos)
    yield "clean", model.normalise(images)
    for draw, drawn in enumerate(backgrounds.float()):
        yield f"replaced_{draw}", model.normalise(replace_background(images, masks, drawn))
    if everything:
        mean = model.mean_colour.expand_as(images)
        yield "object_only", model.normalise(replace_background(images, masks, mean))
        yield "background_only", model.normalise(replace_background(images, 1 - masks, mean))


# ---- 4. Sampler ----------------------------------------------------------------------------------


class MPerClassSampler:
    """Iterates `batches` lists of `batch_size` indices into `labels`: batch_size / m distinct
    classes, m images of each, without replacement unless the class has fewer. The same seed (one
    number or several) gives the same lists. Raises ValueError if there are too few classes."""

    def __init__(self, labels, m, batch_size, batches, seed):
        labels = np.asarray(labels)
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.m, self.batch_size, self.batches, self.seed = m, batch_size, batches, seed
        if batch_size % m or batch_size // m > len(self.members):
            raise ValueError(f"no {batch_size} images, {m} each, from {len(self.members)} classes")

    def __len__(self):
        return self.batches

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        for _ in range(self.batches):
            batch = []
            for c in rng.choice(len(self.members), self.batch_size // self.m, replace=False):
                own = self.members[c]
                batch += rng.choice(own, self.m, replace=len(own) < self.m).tolist()
            yield batch


def images_per_class(loss, batch_size, classes):
    """m: 4 for pair losses, 1 for classification losses, if there are enough classes."""
    # DIFF: with fewer classes than a batch wants, m grows to a divisor of the batch size that fits.
    least = 1 if loss in CLASSIFICATION else 4
    for m in range(least, batch_size // min(2, classes) + 1):  # of one class, nothing is learned
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
    """A padded convolution that, untrained, keeps the scale: no BatchNorm here does (Section 4)."""
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
        pooling = F.avg_pool2d if pool == "avg" else F.max_pool2d
        pooled = pooling(x, 3, stride, padding, ceil_mode=True)
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
    if name in ("bninception", "smallconv"):
        network = BNInception() if name == "bninception" else smallconv()
        if name == "smallconv" and weights == "imagenet":
            raise UserError("--weights imagenet: smallconv has none; use --weights none")
        if weights != "none":
            load_weights(network, name, weights)
        return network
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--backbone {name}: not bninception, smallconv or in torchvision.models")
    try:
        pretrained = "DEFAULT" if weights == "imagenet" else None
        network = torchvision.models.get_model(name, weights=pretrained)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--weights imagenet: no download ({error}); use --weights FILE") from error
    if weights not in ("imagenet", "none"):
        load_weights(network, name, weights)
    network.aux_logits = False  # GoogLeNet, Inception v3: return logits alone in training too,
    network.transform_input = True  # and rescale the input as their ImageNet weights want it
    classifier = [n for n, layer in network.named_modules()
                  if 1000 in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))]
    parent, _, name = classifier[-1].rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network


def load_weights(network, name, weights):
    """Loads a checkpoint strictly: BN-Inception's from the web, or a file. Raises UserError."""
    remedy = f"give a state dict of {name}"
    try:
        if weights == "imagenet":
            remedy = f"fetch {BNINCEPTION_URL} elsewhere and give it as --weights FILE"
            state = torch.hub.load_state_dict_from_url(BNINCEPTION_URL, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        if name == "bninception":  # has no ImageNet classifier
            state = {k: v for k, v in state.items() if not k.startswith("last_linear.")}
        network.load_state_dict(state)
    except Exception as error:  # urllib, zip, pickle and torch each raise their own
        raise UserError(f"--weights {weights}: {brief(error)}; {remedy}") from error


def brief(error):
    return " ".join(str(error).split())[:150]


class Embedder(nn.Module):
    """Backbone, Linear(features, 128), L2 norm: (B, 3, S, S) normalised -> (B, 128), unit length.
    Raises UserError for unknown backbones, wrong weights, sizes the backbone does not take."""

    def __init__(self, backbone, weights, size):
        super().__init__()
        self.backbone = build_backbone(backbone, weights)
        self.order, mean, std = BGR_CAFFE if backbone == "bninception" else RGB_TORCHVISION
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        try:
            with torch.no_grad():
                features = self.eval().backbone(torch.zeros(1, 3, size, size)).shape[1]
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--image-size {size}: not for {backbone} ({error})") from error
        self.head = nn.Linear(features, EMBEDDING)

    def normalise(self, images):
        """(B, 3, H, W) RGB in [0, 255] -> the backbone's input."""
        return (images[:, self.order] - self.mean) / self.std

    @property
    def mean_colour(self):
        """(3, 1, 1) RGB, what normalise() maps to zero."""
        return self.mean[self.order]  # the order is its own inverse

    def forward(self, x):
        return F.normalize(self.head(self.backbone(x)), dim=1)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():  # the statistics stay ImageNet's; the affine weights do train
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


# ---- 6. Losses of embeddings (B, D) of unit length, labels (B,) and, if any, class weights (C, D)

# Called as LOSSES[loss](embeddings, labels, weight, **HPARAMS[dataset][loss]); the lr_loss among
# those is the optimiser's.


def pairs(labels):
    """Positive and negative pairs, two (B, B) booleans: same label and i != j; other label."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def nzmean(terms):
    """Mean over the strictly positive of terms >= 0; 0, with a gradient path, if there are none."""
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def distances(embeddings):
    """(B, D) -> (B, B) Euclidean, with gradient 0 (not infinity) between equal embeddings."""
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def contrastive(embeddings, labels, weight=None, *, pos_margin, neg_margin):
    """nzmean_pos [d - pos_margin]+ + nzmean_neg [neg_margin - d]+  (Hadsell et al. 2006)"""
    d, (pos, neg) = distances(embeddings), pairs(labels)
    return nzmean(F.relu(d[pos] - pos_margin)) + nzmean(F.relu(neg_margin - d[neg]))


def triplet(embeddings, labels, weight=None, *, margin):
    """nzmean_(a,p,n) [d_ap - d_an + margin]+ over all triplets  (Weinberger & Saul 2009)"""
    d, (pos, neg) = distances(embeddings), pairs(labels)
    triplets = pos[:, :, None] & neg[:, None, :]  # (B, B, B): anchor, positive, negative
    return nzmean(F.relu(d[:, :, None] - d[:, None, :] + margin)[triplets])


def multi_similarity(embeddings, labels, weight=None, *, alpha, beta, base):
    """mean_a log(1 + sum_p exp(alpha (base - s_ap))) / alpha
            + log(1 + sum_n exp(beta (s_an - base))) / beta  (Wang et al. 2019, without miner)"""
    s, (pos, neg) = embeddings @ embeddings.T, pairs(labels)

    def log1p_sum_exp(terms, chosen):  # the zero padded on is the 1 +
        return F.pad(terms.masked_fill(~chosen, -math.inf), (1, 0)).logsumexp(dim=1)

    attract = log1p_sum_exp(alpha * (base - s), pos) / alpha
    repel = log1p_sum_exp(beta * (s - base), neg) / beta
    return (attract + repel).mean()


def class_cosines(embeddings, weight):
    """(B, D), (C, D) -> (B, C)"""
    return F.normalize(embeddings, dim=1) @ F.normalize(weight, dim=1).T


def arcface(embeddings, labels, weight, *, margin, scale, lr_loss=None):
    """cross-entropy of scale cos(theta_c), for the own class scale cos(theta_c + margin degrees)
    (Deng et al. 2019, in the plain form for theta + margin > 180 degrees too)"""
    cosines = class_cosines(embeddings, weight)
    theta = cosines.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    own = F.one_hot(labels, len(weight)).bool()
    logits = torch.where(own, (theta + math.radians(margin)).cos(), cosines)
    return F.cross_entropy(scale * logits, labels)


def normalized_softmax(embeddings, labels, weight, *, temperature, lr_loss=None):
    """cross-entropy of cos(e, W_c) / temperature  (Zhai & Wu 2019)"""
    return F.cross_entropy(class_cosines(embeddings, weight) / temperature, labels)


# Classification losses have class weights, pair losses have none.
CLASSIFICATION = {"arcface": arcface, "normalized_softmax": normalized_softmax}
LOSSES = {"contrastive": contrastive, "triplet": triplet, "multi_similarity": multi_similarity,
          **CLASSIFICATION}


# ---- 7. Metrics ----------------------------------------------------------------------------------


@torch.no_grad()
def retrieval_metrics(embeddings, labels, ks, gallery=None):
    """MAP@R, R-precision, Recall@K, K in `ks`: {"map@r", "r_precision", "recall@1", ...}, 0 to 1.

    embeddings (N, D), labels (N,): every item queries all others by Euclidean distance. With
    `gallery` (N, D), other embeddings of the same items, it queries those; its own never counts. R
    is the number of other items with the query's label; queries with R = 0 are left out. Raises
    ValueError if that leaves none, FloatingPointError on nan or inf. Section 4.3. Works in chunks:
    memory does not grow with N squared.
    """
    # DIFF: of equally near items the wrong come first; in the authors' library the order decides.
    # An embedding that maps everything to one point scores 0 so, whatever the order of the files.
    embeddings = torch.as_tensor(embeddings)
    gallery = embeddings if gallery is None else torch.as_tensor(gallery)
    labels = torch.as_tensor(labels, device=gallery.device)
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    members, first = labels.argsort(), counts.cumsum(0) - counts  # items by label; its first
    others = counts[labels] - 1  # (N,) R of every item
    queries = others.argsort()[(others == 0).sum():]  # those of similar R share a chunk
    if len(queries) == 0:
        raise ValueError("no label occurs twice, so there is nothing to retrieve")
    if not (embeddings.isfinite().all() and gallery.isfinite().all()):
        raise FloatingPointError("the embeddings are not finite")
    sums = Counter()
    for q, near in nearness(embeddings, gallery, queries):
        R = others[q, None]  # (Q, 1)
        slots = torch.arange(int(R.max()) + 1, device=q.device)
        own = members[(first[labels[q], None] + slots).clamp(max=len(members) - 1)]  # (Q, R + 1)
        right = near.gather(1, own).masked_fill_(slots > R, -math.inf)
        right = right.sort(descending=True).values[:, :-1]  # (Q, R), without the query itself
        hits, rank, wrong_before = ranks(near, right, max(ks))
        found = (rank <= R) & (hits <= R)
        sums["map@r"] += ((found * hits / rank).sum(dim=1, keepdim=True) / R).sum()
        sums["r_precision"] += (found.sum(dim=1, keepdim=True) / R).sum()
        for k in ks:
            sums[f"recall@{k}"] += (wrong_before < k).sum()
    return {name: float(total) / len(queries) for name, total in sums.items()}


def nearness(embeddings, gallery, queries):
    """Yields chunks q (Q,) of the queries and near (Q, N), the larger the nearer a gallery item is
    to the query, -inf for the query's own. N is padded to a multiple of GROUP, with -inf."""
    # With a dimension more, that is an inner product: q . g - |g|^2 / 2.
    extended, padding = F.pad(embeddings, (0, 1), value=1), -len(gallery) % GROUP
    offsets = F.pad(gallery.square().sum(dim=1) / -2, (0, padding), value=-math.inf)
    gallery = torch.cat([F.pad(gallery, (0, 0, 0, padding)), offsets[:, None]], dim=1)  # (N, D + 1)
    chunk = gallery.new_empty(max(1, 2**25 // len(gallery)), len(gallery))  # new memory is slow
    for q in queries.split(len(chunk)):
        near = torch.mm(extended[q], gallery.T, out=chunk[:len(q)])
        yield q, near.scatter_(1, q[:, None], -math.inf)


def ranks(near, right, k):
    """Of each query's right items, sorted from the nearest: how many there are up to it (R,), its
    rank (Q, R), exact up to R, and how many wrong ones come before the first (Q,), exact below k.
    near (Q, N) and right (Q, R) are minus distances; near may be overwritten."""
    hits = torch.arange(1, right.shape[1] + 1, device=right.device)
    # At most R of the 2R + 1 nearest are right: what is not among them has rank > R anyway.
    best = largest(near, min(2 * len(hits) + 1, near.shape[1]))
    rank = hits + at_least(best, right) - at_least(right, right)
    if k <= len(hits) + 1:
        return hits, rank, rank[:, 0] - 1
    nearest = right[:, :1]
    right_too = (right >= nearest).sum(dim=1)
    return hits, rank, near.ge_(nearest).sum(dim=1) - right_too  # in place: ones, quick to sum


def largest(values, k):
    """The k largest of each row of values (Q, N), N a multiple of GROUP: (Q, k), sorted. They lie
    in the k groups with the largest maxima, so that one quick pass leaves little to sort."""
    groups = values.unflatten(1, (GROUP, -1))  # (Q, GROUP, N / GROUP): a group is a column
    chosen = groups.amax(dim=1).topk(min(k, groups.shape[2])).indices
    return groups.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1).topk(k).values


def at_least(values, bounds):
    """How many of values (Q, V), sorted descending, are >= each of bounds (Q, W): (Q, W)."""
    return values.shape[1] - torch.searchsorted(values.flip(1), bounds.contiguous())


def nmi(embeddings, labels, seed):
    """Normalised mutual information, in [0, 1], of the labels and as many KMeans clusters."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    kmeans = KMeans(len(np.unique(labels)), n_init=1, random_state=seed)
    return float(normalized_mutual_info_score(labels, kmeans.fit_predict(embeddings.cpu().numpy())))


# ---- 8. Test protocol ----------------------------------------------------------------------------


@torch.no_grad()
def embed(model, photos, pool, draws, seed, args, everything=False):
    """{condition: (N, D)}: centre crops under all conditions(), each photo read once for all."""
    model.eval()
    chunks = torch.arange(len(photos)).split(EVAL_BATCH)
    batches = Batches(photos, chunks, args.image_size, False, pool, draws, seed)
    parts = defaultdict(list)
    for batch in tqdm(loader(batches, args), "embedding", leave=False, disable=None):
        if STOP:
            raise Stopped
        photo, backgrounds = (t.to(args.device) for t in batch)
        for name, images in conditions(photo, backgrounds, model, everything):
            parts[name].append(model(images))
    return {name: torch.cat(part) for name, part in parts.items()}


def test(model, index, args):
    """The paper's test protocol and three conditions more: {condition: {metric: value}}, or for
    those that draw backgrounds {condition: {"mean", "std" (ddof 1), "draws"}} of such metrics."""
    rows = index.split["test"]
    photos = Photos(*pick(index, rows), args.short_side, args.image_size, keep=False)
    pool = Photos(list_backgrounds(args.backgrounds, "test"), None, args.short_side)
    found = embed(model, photos, pool, DRAWS, (args.seed, TEST), args, everything=True)

    def score(name, gallery=None):
        ks = RECALL_AT.get(args.dataset, (1, 2, 4, 8))
        scores = retrieval_metrics(found[name], index.labels[rows], ks, gallery)
        if args.nmi and gallery is None:
            scores["nmi"] = nmi(found[name], index.labels[rows], args.seed)
        return scores

    names = [f"replaced_{draw}" for draw in range(DRAWS)]
    return {"clean": score("clean"), "replaced": spread([score(name) for name in names]),
            "query": spread([score(name, found["clean"]) for name in names]),
            "object_only": score("object_only"), "background_only": score("background_only")}


def pick(index, rows):
    return [index.images[i] for i in rows], [index.masks[i] for i in rows]


def spread(draws):
    """Mean and sample standard deviation of a list of metric dicts."""
    values = np.array([list(draw.values()) for draw in draws])
    return {"mean": dict(zip(draws[0], values.mean(axis=0).tolist())),
            "std": dict(zip(draws[0], values.std(axis=0, ddof=1).tolist())), "draws": draws}


# ---- 9. Training ---------------------------------------------------------------------------------

# What a random number is for: part of its seed, so that no random state needs saving.
INIT, SAMPLE, TRAIN, VAL, TEST, STEP = range(6)
STOP = []  # filled by SIGTERM


def write(path, save):
    """Calls save(temporary path) and renames the file, so that `path` is always whole."""
    draft = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save(draft)
        draft.replace(path)
    except RuntimeError as error:  # torch.save's, for a full disk
        raise UserError(f"{path}: could not be written ({error}); make room and go on") from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path, content):
    write(path, lambda draft: draft.write_text(json.dumps(content, indent=2) + "\n"))


class Trainer:
    """Model, class weights, optimiser and progress of one run: all that its checkpoints hold."""

    def __init__(self, args, index, run):
        self.args, self.index, self.run = args, index, run
        torch.manual_seed(mix(args.seed, INIT))
        resumes = (run / "last.pt").exists() and not args.fresh
        weights = "none" if resumes else args.weights  # no download to resume
        self.model = Embedder(args.backbone, weights, args.image_size).to(args.device)
        hparams = HPARAMS.get(args.dataset, HPARAMS["cars196"])[args.loss]
        groups = [{"params": self.model.parameters(), "lr": args.lr}]
        self.labels = index.labels[index.split["train"]]
        self.weight = None
        if args.loss in CLASSIFICATION:
            weight = torch.randn(self.labels.max() + 1, EMBEDDING)
            self.weight = nn.Parameter(weight.to(args.device))
            groups.append({"params": [self.weight], "lr": hparams["lr_loss"]})
        self.optimiser = torch.optim.RMSprop(groups, **RMSPROP)
        self.loss = lambda e, y: LOSSES[args.loss](e, y, self.weight, **hparams)
        self.progress = dict(epoch=1, step=0, loss=0.0, seconds=0.0, best=-1.0, best_epoch=0)

    def save(self, name):
        state = {"model": self.model.state_dict(), "weight": self.weight,
                 "optimiser": self.optimiser.state_dict(), "progress": self.progress}
        write(self.run / name, lambda draft: torch.save(state, draft))

    def load(self, name):
        try:
            state = torch.load(self.run / name, map_location=self.args.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.progress = state["progress"]
            if self.weight is not None:
                self.weight.data.copy_(state["weight"])
        except Exception as error:  # zip, pickle and torch each raise their own
            raise UserError(f"{self.run / name}: {brief(error)}; if it is damaged, --fresh starts "
                            "over") from error

    def fit(self):
        """Trains until --patience epochs brought nothing better, or for --epochs."""
        args, split = self.args, self.index.split
        self.photos = Photos(*pick(self.index, split["train"]), args.short_side)
        self.val = Photos(*pick(self.index, split["val"]), args.short_side, args.image_size)
        self.pool = Photos(list_backgrounds(args.backgrounds, "val"), None, args.short_side)
        signal.signal(signal.SIGTERM, lambda *_: STOP.append(True))  # now there is what to save
        try:
            while not self.finished():
                start = time.monotonic()
                self.train_epoch()
                self.validate(start)
        except Stopped:
            self.save("last.pt")
            raise
        except FloatingPointError as error:
            epoch = self.progress["epoch"]
            raise UserError(f"--lr {args.lr}: {error} in epoch {epoch}; {self.run} keeps the one "
                            "before; lower --lr and start --fresh") from error
        if not self.progress["best_epoch"]:  # --epochs 0: the untrained network is the result
            self.save("best.pt")

    def finished(self):
        done = self.progress["epoch"] - 1
        waited = done - self.progress["best_epoch"]
        return done >= self.args.epochs or waited >= self.args.patience

    def train_epoch(self):
        """The current epoch, or the rest of it that SIGTERM left."""
        args, p = self.args, self.progress
        m = images_per_class(args.loss, args.batch_size, len(np.unique(self.labels)))
        seed = (args.seed, SAMPLE, p["epoch"])
        lists = list(MPerClassSampler(self.labels, m, args.batch_size, args.iterations, seed))
        batches = Batches(self.photos, lists, args.image_size, True, self.pool,
                          int(args.bgaugment), (args.seed, TRAIN, p["epoch"]))
        self.model.train()
        todo = loader(batches, args, start=p["step"])
        for batch in tqdm(todo, f"epoch {p['epoch']}", leave=False, disable=None):
            photos, backgrounds = (t.to(args.device) for t in batch)
            labels = torch.as_tensor(self.labels[lists[p["step"]]], device=args.device)
            p["loss"] += self.train_step(photos, backgrounds, labels)
            p["step"] += 1
            if STOP:
                raise Stopped

    def train_step(self, photos, backgrounds, labels):
        """One optimiser step; returns the loss. Raises FloatingPointError if it is not finite."""
        p = self.progress
        torch.manual_seed(mix(self.args.seed, STEP, p["epoch"], p["step"]))  # for dropout
        images, masks = unpack(photos)
        if self.args.bgaugment:
            images = replace_background(images, masks, backgrounds[0].float())
        loss = self.loss(self.model(self.model.normalise(images)), labels)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"the loss is {value}")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return value

    def validate(self, start):
        """Clean and replaced validation, selection, log, checkpoints."""
        args, p = self.args, self.progress
        found = embed(self.model, self.val, self.pool, 1, (args.seed, VAL, p["epoch"]), args)
        labels = self.index.labels[self.index.split["val"]]
        scores = {"clean": retrieval_metrics(found["clean"], labels, (1,)),
                  "corrupted": retrieval_metrics(found["replaced_0"], labels, (1,))}
        better = scores[args.select]["map@r"] > p["best"]
        if better:
            p.update(best=scores[args.select]["map@r"], best_epoch=p["epoch"])
        row = {"epoch": p["epoch"], "loss": p["loss"] / args.iterations, **scores,
               "best": p["best"], "best_epoch": p["best_epoch"],
               "seconds": time.monotonic() - start}
        p.update(epoch=p["epoch"] + 1, step=0, loss=0.0, seconds=p["seconds"] + row["seconds"])
        self.log(row)
        if better:
            self.save("best.pt")
        self.save("last.pt")

    def log(self, row):
        """Appends to log.jsonl (without what a killed run wrote past its checkpoint) and prints."""
        file, args = self.run / "log.jsonl", self.args
        lines = file.read_text().splitlines()[:row["epoch"] - 1] if file.exists() else []
        lines.append(json.dumps(row) + "\n")
        write(file, lambda draft: draft.write_text("\n".join(lines)))
        clean, replaced = (100 * row[kind]["map@r"] for kind in ("clean", "corrupted"))
        waited = row["epoch"] - row["best_epoch"]
        left = int(row["seconds"] * min(args.epochs - row["epoch"], args.patience - waited))
        print(f"epoch {row['epoch']:4d}  loss {row['loss']:8.4f}  val MAP@R clean {clean:5.2f} "
              f"replaced {replaced:5.2f} best {100 * row['best']:5.2f}  patience {waited:2d}/"
              f"{args.patience}  {row['seconds']:5.1f} s  ETA {timedelta(0, left)}", flush=True)


# ---- 10. Report ----------------------------------------------------------------------------------

# Of one run: {(condition, metric): (mean,) or, over draws or images, (mean, standard deviation)},
# and the flags, as text, that are not the default.
Result = namedtuple("Result", "figures unusual")
WITHIN = {"replaced": "draws", "query": "draws", "attention": "images"}
IN_PAPER = {("clean", "map@r"): 0, ("replaced", "map@r"): 1, ("attention", "score"): 3}
PANEL = 1600, 1200  # px of the chart's drawing, twice its size
TABLES = {
    "Table 1: MAP@R, %": (("clean", "map@r"), ("replaced", "map@r")),
    "Table 2: attention score": (("attention", "score"),),
    "Not in the paper: MAP@R, %": (
        ("query", "map@r"), ("object_only", "map@r"), ("background_only", "map@r")),
    "Not in the paper: Recall@K, R-precision, %": (),  # table_row()
}
INTRODUCTION = f"""# Background bias, measured

![MAP@R, clean and replaced](report.png)

± draws: standard deviation over the {DRAWS} random draws of backgrounds, ± images: over the test
images, both inside a run. ± seeds: over the runs of different seeds. With several seeds the other
figures are means over them. Difference: ours minus the paper's."""


def read_result(run):
    """(dataset, loss, bgaugment) and Result of a run folder. Raises UserError if it has none."""
    file, log, attention = (run / f for f in ("result.json", "log.jsonl", "attention.json"))
    if not file.exists():
        epochs = len(log.read_text().splitlines()) if log.exists() else 0
        raise UserError(f"{run}: not finished, {epochs} epochs so far")
    try:
        saved = json.loads(file.read_text())
        args, figures = argparse.Namespace(**saved["args"]), {}
        if args.loss not in LOSSES or run_folder(args, args.bgaugment).name != run.name:
            raise ValueError(f"it is of {run_folder(args, args.bgaugment).name}")
        for condition, scores in saved["test"].items():
            parts = [scores["mean"], scores["std"]] if "mean" in scores else [scores]
            for metric in parts[0]:
                figures[condition, metric] = tuple(float(part[metric]) for part in parts)
        if attention.exists():
            scores = json.loads(attention.read_text())
            if math.isfinite(scores["mean"]):  # or no image's score is defined
                figures["attention", "score"] = float(scores["mean"]), float(scores["std"])
        if not {("clean", "map@r"), ("replaced", "map@r")} <= figures.keys():
            raise ValueError("no MAP@R")
        key = Path(args.dataset).resolve().name, args.loss, args.bgaugment
        return key, Result(figures, unusual(args))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run}: left out, not a result ({error!r})") from error


def unusual(args):
    """The flags with which `args` differ from the defaults, in text; for a named dataset, those are
    the paper's."""
    if Path(args.weights).name == Path(BNINCEPTION_URL).name:  # the paper's, fetched by hand
        args.weights = "imagenet"
    flags = ["--dataset", args.dataset, "--loss", args.loss, "--data", args.data, "--device", "cpu"]
    usual = vars(parse_args(flags + ["--bgaugment"] * args.bgaugment))
    return " ".join(f"--{name.replace('_', '-')} {getattr(args, name, None)}" for name in usual
                    if name not in FREE | {"seed"}
                    and getattr(args, name, None) != usual[name])


def read_runs(folder):
    """{(dataset, loss, bgaugment): [Result], one a seed}, and notes, a line each."""
    found, notes = defaultdict(list), []
    for run in sorted({file.parent for file in folder.glob("*/*.json")}):
        try:
            key, result = read_result(run)
        except UserError as error:
            notes.append(str(error))
            continue
        found[key].append(result)
        if result.unusual:
            notes.append(f"\\* {run}: {result.unusual}")
    if not found:
        raise UserError(f"--report {folder}: no finished run; {(notes or ['train one first'])[0]}")
    return found, notes


def figure(results, condition, metric, paper=None):
    """[(column head, cell)] of one figure; `paper`: the paper's row, if it has one."""
    key, scale = (condition, metric), 1 if condition == "attention" else 100
    found = scale * np.array([r.figures[key] for r in results if key in r.figures])
    heads = [condition.replace("_", " ")]
    if condition in WITHIN:
        heads.append(f"± {WITHIN[condition]}")
    ours = [f"{x:.2f}" for x in found.mean(axis=0)] if len(found) else ["not run", "-"]
    seeds = f"{found[:, 0].std(ddof=1):.2f}" if len(found) > 1 else "-"
    columns = [*zip(heads, ours), ("± seeds", seeds)]
    if paper and key in IN_PAPER:
        mean, std = paper[IN_PAPER[key]:][:2]
        gap = round(found[:, 0].mean() - mean, 2) + 0 if len(found) else None  # + 0: no -0.00
        columns += [("paper", f"{mean:.2f} ± {std:.2f}" if condition in WITHIN else f"{mean:.2f}"),
                    ("difference", "-" if gap is None else f"{gap:+.2f}")]
    return columns


def table_row(title, results, dataset, paper):
    """[(column head, cell)] of one dataset, loss, and base or BGAugment."""
    if TABLES[title]:
        return [column for key in TABLES[title] for column in figure(results, *key, paper)]
    metrics = [f"recall@{k}" for k in RECALL_AT.get(dataset, (1, 2, 4, 8))] + ["r_precision"]
    return [(f"{metric} {condition}", figure(results, condition, metric)[0][1])
            for metric in metrics for condition in ("clean", "replaced")]


def table(title, dataset, found):
    """Lines of Markdown: a row for each loss, base and BGAugment."""
    if all(dataset != key[0] for key in found):
        return [f"{dataset}: not run"]
    rows, keys = [], TABLES[title] or [("clean", "map@r")]
    for loss, bgaugment in itertools.product(LOSSES, (False, True)):
        results = [result for result in found.get((dataset, loss, bgaugment), [])
                   if any(key in result.figures for key in keys)]
        paper = PAPER[dataset][loss][bgaugment] if dataset in PAPER else None
        mark = " \\*" if any(result.unusual for result in results) else ""
        name = f"{loss}{' + BGAugment' if bgaugment else ''}{mark}"
        rows.append([(dataset, name), ("seeds", str(len(results))),
                     *table_row(title, results, dataset, paper)])
    heads = [head for head, _ in rows[0]]
    cells = [[cell for _, cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *cells)]


def report(folder):
    """Writes folder/report.md, the tables of all runs in it next to the paper's, with the chart
    report.png, and prints it. Raises UserError if no run is finished. Sections 4.3 and 5."""
    found, notes = read_runs(folder)
    draw_chart(found, folder / "report.png")
    lines = [INTRODUCTION]
    for title in TABLES:
        lines += ["", f"## {title}"]
        for dataset in dict.fromkeys([*PAPER, *(dataset for dataset, *_ in found)]):
            lines += ["", *table(title, dataset, found)]
    if notes:
        mark = "\\* made with other settings than the paper's (toy: than its own)"
        lines += ["", "## Notes", "", mark, "", *(f"- {note}" for note in notes)]
    text = "\n".join(lines) + "\n"
    write(folder / "report.md", lambda draft: draft.write_text(text))
    print(text, end="")


def draw_chart(found, file):
    """Writes a PNG, a panel a dataset."""
    datasets = list(dict.fromkeys(dataset for dataset, *_ in found))
    image = Image.new("RGB", (PANEL[0] * len(datasets), PANEL[1]))
    for k, dataset in enumerate(datasets):
        image.paste(draw_panel(dataset, found), (k * PANEL[0], 0))
    image = image.reduce(2)  # shapes are drawn with hard edges
    write(file, lambda draft: image.save(draft, "PNG"))


def draw_panel(dataset, found):
    """By loss, base and BGAugment: a bar from the MAP@R with replaced backgrounds (ring) to the one
    without (disc). The longer the bar, the more hung on the backgrounds."""
    image, font = Image.new("RGB", PANEL, "white"), ImageFont.load_default(48)
    draw = ImageDraw.Draw(image)
    ends = {key[1:]: [100 * np.mean([result.figures[condition, "map@r"][0] for result in results])
                      for condition in ("replaced", "clean")]
            for key, results in found.items() if key[0] == dataset}
    step = next(s for s in (1, 2, 5, 10, 20) if np.max(list(ends.values())) <= 6 * s)
    ticks = range(0, min(6 * step, 100) + 1, step)
    left, right, bottom = 580, PANEL[0] - 60, PANEL[1] - 160
    for tick in ticks:
        x = left + (right - left) * tick / ticks[-1]
        draw.line((x, 110, x, bottom), "lightgrey", 3)
        draw.text((x, bottom + 40), str(tick), "dimgrey", font, "mm")
    draw.text((left, 60), f"{dataset}: test MAP@R, %", "black", font, "lm")
    draw.text((left, PANEL[1] - 50), "ring: replaced backgrounds, disc: clean", "black", font, "lm")
    for i, key in enumerate(itertools.product(LOSSES, (False, True))):
        y, colour = 170 + 70 * i + 40 * (i // 2), ("#d95f02", "#1f78b4")[key[1]]
        draw.text((left - 40, y), "+ BGAugment" if key[1] else key[0], colour, font, "rm")
        if key not in ends:
            draw.text((left + 20, y), "not run", "grey", font, "lm")
            continue
        ring, disc = (left + (right - left) * value / ticks[-1] for value in ends[key])
        draw.line((ring, y, disc, y), colour, 12)
        for x, fill in ((ring, "white"), (disc, colour)):
            draw.ellipse((x - 18, y - 18, x + 18, y + 18), fill, colour, 7)
    return image


# ---- 11. Command line ----------------------------------------------------------------------------

# These may change when a run goes on, or follow from others.
FREE = {"runs", "device", "workers", "fresh", "test_only", "nmi", "short_side"}


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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train an image retrieval model and measure its background bias.",
        epilog=f"Defaults, in brackets, are the paper's. With --dataset toy: {DEFAULTS['toy']}.")

    def add(flag, help, **options):
        takes_value = "action" not in options
        parser.add_argument(flag, help=help + " [%(default)s]" * takes_value, **options)

    add("--dataset", "toy, cars196, cub200, sop or FOLDER of images/<class>/", default="toy")
    add("--loss", "training loss", choices=LOSSES, default="contrastive")
    add("--bgaugment", "replace the background of every training image", action="store_true")
    add("--data", "folder that holds the named datasets", default="data")
    add("--backgrounds", "folder with val/ and test/ photos; None: DATA/unsplash_backgrounds")
    add("--runs", "folder that holds the run folders", default="runs")
    add("--seed", "fixes every random number", type=number(0), default=42)
    add("--epochs", "at most so many; 0 tests the untrained network", type=number(0))
    add("--iterations", "batches an epoch", type=number(1))
    add("--patience", "epochs without improvement before it stops", type=number(1), default=15)
    add("--batch-size", "images a batch", type=number(2), default=32)
    add("--lr", "learning rate of the network, not of class weights", type=number(0, float))
    add("--backbone", "bninception, smallconv or a torchvision classifier such as resnet50")
    add("--weights", "imagenet, none (random) or a checkpoint file of the backbone")
    add("--image-size", "side of the crops in px; photos: 256/227 of it", type=number(16))
    add("--device", "auto, cpu, cuda, cuda:1, mps", default="auto")
    add("--workers", "processes preparing batches; None: up to 8 for a GPU, else 0", type=number(0))
    add("--select", "validation that picks the epoch; None: corrupted with --bgaugment, else clean",
        choices=("clean", "corrupted"))
    add("--fresh", "delete the run's folder and start over", action="store_true")
    add("--test-only", "test the run's best.pt again", action="store_true")
    add("--nmi", "report NMI of the test embeddings too (slow)", action="store_true")
    add("--report", "tables and a chart of all runs in RUNS: RUNS/report.md, .png", metavar="RUNS")
    parser.set_defaults(**DEFAULTS["paper"])
    if parser.parse_known_args(argv)[0].dataset == "toy":
        parser.set_defaults(**DEFAULTS["toy"])
    return complete(parser.parse_args(argv))


def complete(args):
    """Fills in what depends on other arguments. Raises UserError."""
    args.dataset = ALIASES.get(args.dataset, args.dataset)
    pools = "toy/backgrounds" if args.dataset == "toy" else "unsplash_backgrounds"
    args.backgrounds = args.backgrounds or str(Path(args.data, pools))
    args.select = args.select or ("corrupted" if args.bgaugment else "clean")
    args.short_side = round(SHORT_SIDE * args.image_size)
    if args.device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        args.device = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if args.workers is None:
        args.workers = min(8, cpus()) if args.device.startswith("cuda") else 0
    return args


def run_folder(args, bgaugment):
    name, kind = Path(args.dataset).resolve().name, "bgaugment" if bgaugment else "base"
    return Path(args.runs, f"{name}-{args.loss}-{kind}-s{args.seed}")


def open_run(args):
    """The folder of the run; of one begun with other arguments or not to be read, UserError."""
    run = run_folder(args, args.bgaugment)
    if args.test_only and not (run / "best.pt").exists():
        raise UserError(f"--test-only: no best.pt in {run}; train it first")
    kept = any((run / name).exists() for name in ("last.pt", "best.pt", "result.json"))
    if args.fresh or not kept:
        return run
    try:
        saved = dict(json.loads((run / "config.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'config.json'}: {error!r}; --fresh starts the run over") from error
    differ = [f"--{name.replace('_', '-')} {saved.get(name)} (now {value})" for name, value
              in vars(args).items() if name not in FREE and saved.get(name) != value]
    if differ:
        raise UserError(f"{run}: begun with {', '.join(differ)}; take the same, --runs or --fresh")
    return run


def write_config(args, run):
    """Writes config.json: all arguments, git revision, device, versions."""
    git = shutil.which("git") and subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True).stdout.strip()
    gpu = args.device.startswith("cuda")
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {
        "args": vars(args), "git": git or "unknown",
        "device": torch.cuda.get_device_name(args.device) if gpu else args.device,
        "python": sys.version.split()[0], "torch": torch.__version__,
        "torchvision": torchvision.__version__, "numpy": np.__version__})


def print_results(args):
    """Prints the run's test MAP@R in percent, and its base or BGAugment sibling's, if done."""
    print(f"\n{'test MAP@R, %':29s}", *(f"{name:>15s}" for name in CONDITIONS))
    flags = set()
    for kind in ("base", "BGAugment"):
        run = run_folder(args, kind == "BGAugment")
        if not (run / "result.json").exists():
            continue
        try:
            _, result = read_result(run)
        except UserError as error:
            print(error)
            continue
        cells = [" +- ".join(f"{100 * x:.2f}" for x in result.figures.get((name, "map@r"), ()))
                 for name in CONDITIONS]
        print(f"{args.loss + ', ' + kind:29s}", *(f"{cell:>15s}" for cell in cells))
        flags.add(result.unusual or "the defaults")
    if len(flags) > 1:
        print(f"not to be compared, one has {', the other '.join(flags)}")
    print(f"all metrics: {run_folder(args, args.bgaugment) / 'result.json'}")


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        return report(Path(args.report))
    run = open_run(args)
    if (run / "result.json").exists() and not (args.test_only or args.fresh):
        print(f"{run} is done; --test-only tests it again, --fresh starts over")
        return print_results(args)
    index = load_index(args.dataset, args.data)
    for part in ("val", "test"):
        list_backgrounds(args.backgrounds, part)  # an error now, not after the training
    trainer = Trainer(args, index, run)
    if args.fresh and not args.test_only:
        shutil.rmtree(run, ignore_errors=True)
    if (run / "last.pt").exists():
        trainer.load("last.pt")
    elif not args.test_only:
        write_config(args, run)
    config, at = (run / "config.json").read_text(), trainer.progress
    print(f"{run}, epoch {at['epoch']}, batch {at['step']}: {' '.join(config.split())}", flush=True)
    if not args.test_only:
        trainer.fit()
    progress = trainer.progress
    trainer.load("best.pt")
    scores = test(trainer.model, trainer.index, args)
    write_json(run / "result.json", {
        "args": vars(args), "epochs": progress["epoch"] - 1, "best_epoch": progress["best_epoch"],
        "val_best": progress["best"], "seconds": progress["seconds"], "test": scores})
    print_results(args)


def command(name, main):
    """Runs a script's main(); what the user can mend ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        reason = str(error).split("UserError: ")[-1].strip()  # without a worker's traceback
        print(f"{name}: error: {reason}", file=sys.stderr)
        sys.exit(2)
    except Stopped:
        print(f"{name}: SIGTERM, all is saved; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:  # workers ignore the SIGTERM with which Python ends them, and would be waited for
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in torch.multiprocessing.active_children():
            worker.kill()


if __name__ == "__main__":
    command("bgbias.py", main)
