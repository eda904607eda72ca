"""Background bias in deep metric learning: train an image retrieval model, replace the backgrounds of
its test images, and see how much of the retrieval goes. One script, after Kobs & Hotho, "On Background
Bias in Deep Metric Learning" (ICMV 2022, arXiv 2210.01615).

    python bgbias.py                                  # toy data, contrastive loss, one minute
    python bgbias.py --bgaugment                      # the same, backgrounds replaced while training
    python bgbias.py --dataset cars196 --loss contrastive --bgaugment       # a run of the paper
    python bgbias.py --dataset my_photos --loss triplet                     # FOLDER/images/<class>/*.jpg

Every default is the paper's (toy has its own row in DEFAULTS). A run lives in
RUNS/<dataset>-<loss>-<base|bgaugment>-s<seed>/: config.json, log.jsonl, last.pt, best.pt and, written
last, result.json. The same command again resumes it; a run with a result.json is done.

The sections below follow the paper:
    1. constants            tables of splits and hyper-parameters (Section 4, Musgrave et al. 2020)
    2. data                 three datasets, a folder of your own, the embedded toy set (Section 4.1)
    3. views                crops, background replacement, BGAugment (Sections 3 and 5)
    4. sampler              m images of each class in a batch (Section 4)
    5. network              BN-Inception + Linear(1024, 128) + L2 norm (Section 4)
    6. losses               five of them (Section 4.2)
    7. metrics              MAP@R, R-precision, Recall@K (Section 4.3)
    8. test protocol        clean, replaced, and what a shop would ask (Section 4.3)
    9. training             epochs, selection, checkpoints, resuming (Section 4)
   10. command line

Shapes: B batch, D embedding (128), C classes, N images, H W pixels, S crop size, K neighbours.
A mask is (B, 1, H, W) in [0, 1], soft, and 1 = foreground, everywhere.
A line tagged DIFF does something else than the authors' code; the README lists the same lines.
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
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------
# 1. Constants
# ----------------------------------------------------------------------------------------------------

# Class-disjoint splits, 0-based labels (Section 4.1).
SPLITS = {
    "cars196": {"train": range(0, 74), "val": range(74, 98), "test": range(98, 196)},
    "cub200": {"train": range(0, 75), "val": range(75, 100), "test": range(100, 200)},
    "sop": {"train": range(0, 8489), "val": range(8489, 11318), "test": range(11318, 22634)},
    "toy": {"train": range(0, 100), "val": range(100, 120), "test": range(120, 170)},
}
COUNTS = {"cars196": (16185, 8131), "cub200": (11788, 5924), "sop": (120053, 60502)}  # all, test
ALIASES = {"stanford_online_products": "sop"}

# The optima of "A Metric Learning Reality Check" (Musgrave et al. 2020), which the paper takes over.
# A user's own folder takes the row of Cars196. Margins are distances (contrastive), differences of
# distances (triplet), degrees (arcface); lr_loss is the learning rate of the class weights.
HPARAMS = {
    "cars196": {
        "contrastive": {"pos_margin": 0.26523381895861114, "neg_margin": 0.5409405918690342},
        "triplet": {"margin": 0.11902737154413517},
        "multi_similarity": {
            "alpha": 14.358760978642266, "beta": 75.83486384086837, "base": 0.6615555839124118},
        "arcface": {
            "margin": 20.52230893710211, "scale": 49.501652066223656, "lr_loss": 7.398518179078544e-06},
        "normalized_softmax": {"temperature": 0.08863250090946041, "lr_loss": 0.011046164985524668},
    },
    "cub200": {
        # The negative margin is intended: it counts every positive pair in the mean.
        "contrastive": {"pos_margin": -0.19999999999999726, "neg_margin": 0.3841191369511769},
        "triplet": {"margin": 0.09610074859813894},
        "multi_similarity": {
            "alpha": 0.010000000000000505, "beta": 50.601773762279336, "base": 0.5624815816186126},
        "arcface": {
            "margin": 23.225935497468093, "scale": 99.99999999999999, "lr_loss": 0.0051384088179694},
        "normalized_softmax": {"temperature": 0.10874714987070239, "lr_loss": 0.004468915155818225},
    },
    "sop": {
        "contrastive": {"pos_margin": 0.2850258234628094, "neg_margin": 0.5130146609636679},
        "triplet": {"margin": 0.04519248868248313},
        "multi_similarity": {
            "alpha": 8.492496310524517, "beta": 57.38862611417401, "base": 0.41673621630849955},
        "arcface": {
            "margin": 18.63185573324141, "scale": 220.36285192573413, "lr_loss": 0.0020186601854510562},
        "normalized_softmax": {"temperature": 0.06306243924788482, "lr_loss": 0.0005468337161961759},
    },
    "toy": {  # ours, chosen on toy's validation classes
        "contrastive": {"pos_margin": 0.2, "neg_margin": 0.7},
        "triplet": {"margin": 0.2},
        "multi_similarity": {"alpha": 2.0, "beta": 20.0, "base": 0.5},
        "arcface": {"margin": 10.0, "scale": 16.0, "lr_loss": 0.01},
        "normalized_softmax": {"temperature": 0.1, "lr_loss": 0.01},
    },
}

DEFAULTS = {  # the flags whose default depends on the dataset: the paper's, and toy's
    "paper": {"epochs": 1000, "iterations": 100, "lr": 1e-6, "image_size": 227,
              "backbone": "bninception", "weights": "imagenet"},
    "toy": {"epochs": 10, "iterations": 50, "lr": 3e-4, "image_size": 48,
            "backbone": "smallconv", "weights": "none"},
}
RMSPROP = {"weight_decay": 1e-4, "momentum": 0.9, "alpha": 0.99, "eps": 1e-8}
EMBEDDING = 128
SHORT_SIDE = 256 / 227  # short side of a photo before cropping, in units of the crop
CROP_SCALE, CROP_RATIO, FLIP = (0.16, 1.0), (0.75, 1.33), 0.5  # of RandomResizedCrop, Section 4
DRAWS = 5  # random draws of backgrounds at test time; validation draws once an epoch
RECALL_AT = {"sop": (1, 10, 100, 1000)}  # else 1, 2, 4, 8
EVAL_BATCH = 64  # part of the seed of the evaluation's backgrounds: not a flag

# Network input: channel order, mean, standard deviation, for pixels in [0, 255].
BGR_CAFFE = ([2, 1, 0], [104.0, 117.0, 128.0], [1.0, 1.0, 1.0])
RGB_TORCHVISION = ([0, 1, 2], [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])

BNINCEPTION_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"


class UserError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


class Stopped(Exception):
    """SIGTERM came; raised where the training state is whole."""


# ----------------------------------------------------------------------------------------------------
# 2. Data
# ----------------------------------------------------------------------------------------------------

# Per image: path, mask path, label; `split` maps train, val, test to their image indices.
Index = namedtuple("Index", "images masks labels split")

LAYOUTS = {  # folders looked for under DATA, what marks them, and what to say when none is there
    "cars196": ((".", "cars196", "stanford_cars"), ("car_ims", "cars_train"),
                "car_ims/ + cars_annos.mat, or cars_train/ + cars_test/ + devkit/"),
    "cub200": (("CUB_200_2011", "cub200/CUB_200_2011"), ("images",), "CUB_200_2011/images/"),
    "sop": (("Stanford_Online_Products", "sop/Stanford_Online_Products"), ("Ebay_train.txt",),
            "Stanford_Online_Products/Ebay_train.txt"),
}


def list_cars196(root):
    """[(path, label)] of either layout: car_ims/ + cars_annos.mat, or cars_train/, cars_test/ + devkit/."""
    from scipy.io import loadmat

    if (root / "car_ims").is_dir():
        lists = [(root / "cars_annos.mat", root, "relative_im_path")]
    else:
        test = "cars_test_annos_withlabels.mat"  # without labels in the devkit, so often put beside it
        test = root / test if (root / test).exists() else root / "devkit" / test
        lists = [(root / "devkit" / "cars_train_annos.mat", root / "cars_train", "fname"),
                 (test, root / "cars_test", "fname")]
    items = []
    for file, folder, field in lists:
        annotations = loadmat(need(file), simplify_cells=True)["annotations"]
        items += [(folder / a[field], int(a["class"]) - 1) for a in annotations]
    return items


def list_classes(root):
    """[(path, label)] of root/images/<class>/<photo>, classes and photos sorted by name."""
    classes = sorted(p for p in (root / "images").iterdir() if p.is_dir())
    return [(photo, label) for label, folder in enumerate(classes) for photo in sorted(folder.iterdir())
            if photo.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]


def list_sop(root):
    """[(path, label)] of Ebay_train.txt, then Ebay_test.txt: image_id class_id super_class_id path."""
    items = []
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        rows = [line.split() for line in need(root / name).read_text().splitlines()[1:]]
        items += [(root / path, int(label) - 1) for _, label, _, path in rows]
    return items


def need(file):
    """`file`, if it is there. Raises UserError."""
    if not file.exists():
        raise UserError(f"{file}: missing list; README, section Data, says where to get it")
    return file


def mask_path(root, image):
    """The one rule: ROOT/images/a/b.jpg and ROOT/a/b.jpg both have their mask at ROOT/masks/a/b.png."""
    parts = image.relative_to(root).parts
    return Path(root, "masks", *parts[parts[0] == "images":]).with_suffix(".png")


def dataset_root(dataset, data):
    """The folder that holds `dataset`: a named one under `data`, or the user's own. Raises UserError."""
    data = Path(data)
    if dataset == "toy":
        return make_toy(data / "toy")
    if dataset not in LAYOUTS:
        if not Path(dataset, "images").is_dir():
            raise UserError(f"--dataset {dataset}: neither {', '.join(SPLITS)} nor a folder with images/<class>/")
        return Path(dataset)
    folders, marks, wanted = LAYOUTS[dataset]
    for folder in folders:
        if any((data / folder / mark).exists() for mark in marks):
            return data / folder
    raise UserError(f"--data {data}: no {dataset} here, expected {wanted}; README, section Data")


def split_ranges(dataset, classes):
    """{split: range of labels}; a user's folder is split 74 : 24 : 98, as Cars196. Raises UserError."""
    if dataset in SPLITS:
        return SPLITS[dataset]
    if classes < 3:
        raise UserError(f"--dataset {dataset}: {classes} classes in images/, at least 3 are needed")
    train, val = max(1, round(classes * 74 / 196)), max(1, round(classes * 24 / 196))
    return {"train": range(train), "val": range(train, train + val), "test": range(train + val, classes)}


def load_index(dataset, data="data", need_masks=True):
    """The Index of a dataset, every file checked to be there. Raises UserError naming what is not."""
    root = dataset_root(dataset, data)
    items = {"cars196": list_cars196, "sop": list_sop}.get(dataset, list_classes)(root)
    images, labels = [p for p, _ in items], np.array([label for _, label in items])
    masks = [mask_path(root, p) for p in images]
    ranges = split_ranges(dataset, len(set(labels.tolist())))
    split = {k: np.flatnonzero((labels >= r.start) & (labels < r.stop)) for k, r in ranges.items()}
    counts = len(images), len(split["test"])
    if dataset in COUNTS and counts != COUNTS[dataset]:
        raise UserError("{}: {:,} images, {:,} of them test, but {} has {:,} and {:,}; unpack it again".format(
            root, *counts, dataset, *COUNTS[dataset]))
    twice = [p for p, n in Counter(masks).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]}: would be the mask of two photos; rename one of them")
    check_files(images, "image", f"unpack {root} again")
    if need_masks:
        check_files(masks, "mask", f"make it with: python masks.py --dataset {dataset} --data {data}")
    return Index(images, masks, labels, split)


def check_files(paths, what, remedy):
    missing = [p for p in paths if not p.exists()]
    if missing:
        raise UserError(f"{missing[0]}: missing {what}, one of {len(missing):,}; {remedy}")


def open_rgb(path):
    """The photo as PIL opens it (no EXIF rotation), 8-bit RGB. Raises UserError."""
    try:
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):  # PIL clips 16 bits at 255 where it should divide
            image = Image.fromarray((np.asarray(image, np.float64) / 257).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from error


def list_backgrounds(folder, part):
    """Sorted paths of the pool FOLDER/val or FOLDER/test (sorted, so that a seed fixes the draws)."""
    pool = Path(folder, part)
    paths = sorted(p for p in pool.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not paths:
        raise UserError(f"--backgrounds {pool}: no background photos; README, section Data")
    return paths


# The toy set: products with a class's own pattern, photographed by a seller before the seller's own
# backdrop. Written once, in the layout of a user's own folder, so all other code is the same.


def toy_texture(seed, size):
    """A procedural backdrop (size, size, 3) in [0, 255]: squashed waves between two colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / 64
    waves = rng.uniform([-6, -6, 0, 0.3], [6, 6, 1, 1], (3, 4))
    level = np.tanh(2 * sum(a * np.sin(2 * np.pi * (fx * x + fy * y + p)) for fx, fy, p, a in waves))
    dark, light = rng.uniform(0, 255, (2, 3))
    return dark + (light - dark) * (level[..., None] + 1) / 2


def toy_class(rng, photos=20, size=64, share=0.8):
    """Yields (photo, mask), PIL images, of one class: its pattern (two colours on a symmetric 5 x 5 grid)
    under random scale, rotation, shift and light; `share` of the photos before the seller's backdrop."""
    half = rng.random((5, 3)) < 0.5
    grid = np.concatenate([half, half[:, 1::-1]], axis=1)[..., None]
    tile = Image.fromarray(np.where(grid, *rng.uniform(0, 255, (2, 3))).astype(np.uint8)).convert("RGBA")
    seller = rng.integers(2**60)
    for _ in range(photos):
        seed = seller if rng.random() < share else rng.integers(2**60)
        top, left = rng.integers(0, size, 2)
        photo = Image.fromarray(toy_texture(seed, 2 * size)[top:, left:][:size, :size].astype(np.uint8))
        side = int(size * rng.uniform(0.45, 0.75))
        product = tile.resize((side, side), Image.NEAREST)
        product = product.rotate(rng.uniform(-40, 40), Image.BICUBIC, expand=True)
        at = tuple(int((size - n) * rng.random()) for n in product.size)
        mask = Image.new("L", photo.size)
        mask.paste(product.getchannel("A"), at)
        photo.paste(product, at, product)
        light = rng.uniform(0.6, 1.3) * rng.uniform(0.8, 1.2, 3)
        yield Image.fromarray((np.asarray(photo) * light).clip(0, 255).astype(np.uint8)), mask


def make_toy(root, seed=2022):
    """Writes the toy set to `root`, whole or not at all; returns `root`. Deterministic, about 10 s."""
    if root.exists():
        return root
    draft = root.with_name(f"{root.name}.tmp{os.getpid()}")
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
            texture = Image.fromarray(toy_texture([seed, k, i, 1], 96).astype(np.uint8))
            texture.save(draft / "backgrounds" / part / f"{i:02d}.png")
    try:
        draft.rename(root)
    except OSError:  # another run was faster
        shutil.rmtree(draft)
    return root


# ----------------------------------------------------------------------------------------------------
# 3. Views: decoding once, crops, background replacement
# ----------------------------------------------------------------------------------------------------


class Photos(torch.utils.data.Dataset):
    """Item i: photo and mask as one (4, H, W) uint8 tensor (R, G, B, mask), short side resized to `short`,
    centre-cropped to `crop` if given. Decoded once and kept if memory allows, else at every use.
    One tensor, so that whatever crop or flip follows is the same for both. `masks` None: RGB only."""

    def __init__(self, images, masks, short, crop=None, keep=True):
        self.images, self.masks, self.short, self.crop = images, masks, short, crop
        self.kept = None
        if keep and self.fits():
            with ThreadPoolExecutor(os.cpu_count()) as threads:  # PIL decodes outside the interpreter lock
                self.kept = list(tqdm(threads.map(self.decode, range(len(self))), "decoding",
                                      len(self), leave=False, disable=None))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.decode(i) if self.kept is None else self.kept[i]

    def decode(self, i):
        planes = [open_rgb(self.images[i])]
        if self.masks is not None:
            planes.append(open_rgb(self.masks[i]).getchannel(0))
            if planes[0].size != planes[1].size:
                raise UserError(f"{self.masks[i]}: mask of {planes[1].size} px for a photo of {planes[0].size}; "
                                "delete it and run masks.py")
        planes = [TF.pil_to_tensor(TF.resize(p, self.short)) for p in planes]
        photo = torch.cat(planes)
        return TF.center_crop(photo, self.crop).clone() if self.crop else photo

    def fits(self):
        """Whether the decoded photos fit in four fifths of the memory that is free; if not, says so."""
        sample = [Image.open(p).size for p in self.images[:: max(1, len(self) // 64)]]
        aspect = 1 if self.crop else np.mean([max(s) / min(s) for s in sample])
        needed = len(self) * 4 * (self.crop or self.short) ** 2 * aspect
        free = free_memory()
        if needed > 0.8 * free:
            print(f"{len(self):,} photos need {needed / 2**30:.1f} GiB decoded, {free / 2**30:.1f} GiB are free: "
                  "decoding them at every use instead (--workers helps)")
        return needed <= 0.8 * free


def free_memory():
    """Bytes that could be allocated now (Linux), or half the machine's memory."""
    try:
        fields = dict(line.split(":") for line in open("/proc/meminfo"))
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def random_view(photo, size):
    """The training transform, (channels, H, W) uint8 -> (channels, size, size): RandomResizedCrop, flip."""
    box = torchvision.transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO)
    view = TF.resized_crop(photo, *box, [size, size], antialias=True)
    return TF.hflip(view) if torch.rand(()) < FLIP else view


class Batches(torch.utils.data.Dataset):
    """Item b: (photos (B, 4, S, S), backgrounds (draws, B, 3, S, S)), uint8, of the b-th index list.

    `train` crops the photos at random. Backgrounds are drawn with replacement from `pool` and always take the
    training transform, in evaluation too (Section 4). All randomness is a function of (seed, b): neither
    workers nor a resumed run change it.
    """

    def __init__(self, photos, lists, size, train, pool, draws, seed):
        self.photos, self.lists, self.size, self.train = photos, lists, size, train
        self.pool, self.draws, self.seed = pool, draws, seed

    def __len__(self):
        return len(self.lists)

    def __getitem__(self, b):
        torch.manual_seed(mix(*self.seed, b))
        photos = [self.photos[i] for i in self.lists[b]]
        photos = torch.stack([random_view(p, self.size) if self.train else p for p in photos])
        if not self.draws:
            return photos, torch.empty(0)
        picks = torch.randint(len(self.pool), (self.draws * len(photos),))
        backgrounds = torch.stack([random_view(self.pool[i], self.size) for i in picks])
        return photos, backgrounds.unflatten(0, (self.draws, len(photos)))


def mix(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def loader(batches, args, start=0):
    """Iterates items start, start + 1, ... of `batches`, prepared ahead by --workers processes."""
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, len(batches)), num_workers=args.workers,
        worker_init_fn=ignore_signals, pin_memory=args.device == "cuda")


def ignore_signals(_):
    for number in (signal.SIGTERM, signal.SIGINT):  # the parent decides when workers end
        signal.signal(number, signal.SIG_IGN)


def replace_background(images, masks, backgrounds):
    """Images on new backgrounds: (B, 3, H, W), (B, 1, H, W) in [0, 1] with 1 = foreground, (B, 3, H, W)."""
    return images * masks + backgrounds * (1 - masks)


def conditions(photos, backgrounds, network, everything=False):
    """Yields (name, network input (B, 3, S, S)): clean, replaced_0, ... and, with `everything`, object_only
    and background_only, where the other part takes the mean colour of the network's input normalisation."""
    images, masks = photos[:, :3].float(), photos[:, 3:].float() / 255
    yield "clean", network.normalise(images)
    for draw, drawn in enumerate(backgrounds):
        yield f"replaced_{draw}", network.normalise(replace_background(images, masks, drawn.float()))
    if everything:
        mean = network.mean_colour.expand_as(images)
        yield "object_only", network.normalise(replace_background(images, masks, mean))
        yield "background_only", network.normalise(replace_background(images, 1 - masks, mean))


# ----------------------------------------------------------------------------------------------------
# 4. Sampler
# ----------------------------------------------------------------------------------------------------


class MPerClassSampler:
    """Iterates `batches` lists of batch_size indices into `labels`: batch_size / m distinct classes, m images of
    each, without replacement unless the class has fewer than m. The same seed gives the same lists."""

    def __init__(self, labels, m, batch_size, batches, seed):
        labels = np.asarray(labels)
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.m, self.batch_size, self.batches, self.seed = m, batch_size, batches, seed
        if batch_size % m or batch_size // m > len(self.members):
            raise ValueError(f"{batch_size} images are not {m} each of at most {len(self.members)} classes")

    def __len__(self):
        return self.batches

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        for _ in range(self.batches):
            classes = rng.choice(len(self.members), self.batch_size // self.m, replace=False)
            members = [self.members[c] for c in classes]
            yield [int(i) for own in members for i in rng.choice(own, self.m, replace=len(own) < self.m)]


def images_per_class(loss, batch_size, classes):
    """m: 4 for pair losses, 1 for classification losses. Raises UserError."""
    # DIFF: with fewer classes than a batch wants, m grows to the next divisor of the batch size.
    least = 1 if loss in CLASSIFICATION else 4
    for m in range(least, batch_size + 1):
        if batch_size % m == 0 and batch_size // m <= classes:
            return m
    raise UserError(f"--batch-size {batch_size}: a {loss} batch has {least} images of each class, so take a multiple")


# ----------------------------------------------------------------------------------------------------
# 5. Network
# ----------------------------------------------------------------------------------------------------

BLOCKS = {  # in, 1x1, 3x3 (reduce, out), double 3x3 (reduce, out), pool, projection; no 1x1: stride 2
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


class BNInception(nn.Module):
    """BN-Inception (Ioffe & Szegedy 2015): (B, 3, H, W) BGR in [0, 255], mean-subtracted -> (B, 1024).
    Parameters are named as in the public checkpoint bn_inception-52deb4733.pth."""

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
        self.add_module(name, nn.Conv2d(width, out, kernel, stride, kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(out))

    def conv(self, x, *names):
        for name in names:
            x = F.relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))
        return x

    def block(self, x, block):
        _, one, _, _, pool, projection = BLOCKS[block]
        name = f"inception_{block}"
        stride, padding = (1, 1) if one else (2, 0)
        pooling = F.avg_pool2d if pool == "avg" else F.max_pool2d
        pooled = pooling(x, 3, stride, padding, ceil_mode=True)
        branches = [self.conv(x, f"{name}_1x1")] if one else []
        branches.append(self.conv(x, f"{name}_3x3_reduce", f"{name}_3x3"))
        double = ("reduce", "1", "2")
        branches.append(self.conv(x, *(f"{name}_double_3x3_{part}" for part in double)))
        branches.append(self.conv(pooled, f"{name}_pool_proj") if projection else pooled)
        return torch.cat(branches, dim=1)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x, "conv1_7x7_s2"), 3, 2, ceil_mode=True)  # (B, 64, 57, 57) at 227 px
        x = F.max_pool2d(self.conv(x, "conv2_3x3_reduce", "conv2_3x3"), 3, 2, ceil_mode=True)  # (B, 192, 28, 28)
        for block in BLOCKS:
            x = self.block(x, block)
        return x.mean(dim=(2, 3))  # (B, 1024, 7, 7) -> (B, 1024)


def smallconv():
    """Four 3x3 convolution blocks for the toy set: (B, 3, H, W) -> (B, 128)."""
    layers = []
    for width, out in itertools.pairwise((3, 32, 64, 128, 128)):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def load_weights(network, name, weights):
    """Loads a checkpoint strictly into `network`: a file, or BN-Inception's from the web. Raises UserError."""
    try:
        if weights == "imagenet":
            state = torch.hub.load_state_dict_from_url(BNINCEPTION_URL, map_location="cpu", check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - urllib, pickle and zip each raise their own
        remedy = (f"download {BNINCEPTION_URL} elsewhere and give it as --weights FILE" if weights == "imagenet"
                  else "give a PyTorch state dict")
        raise UserError(f"--weights {weights}: {str(error).splitlines()[0]}; {remedy}") from error
    if name == "bninception":  # the ImageNet classifier, which BNInception does not have
        state = {k: v for k, v in state.items() if not k.startswith("last_linear.")}
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--weights {weights}: not a checkpoint of {name} ({reason})") from error


def torchvision_backbone(name, weights):
    """A torchvision classifier without its last layer: (B, 3, H, W) RGB, normalised -> (B, features)."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--backbone {name}: neither bninception, smallconv nor a classifier of torchvision.models")
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT" if weights == "imagenet" else None)
    except OSError as error:
        raise UserError(f"--weights imagenet: {name} could not be downloaded ({error}); use --weights FILE") from error
    network.aux_logits = False  # of GoogLeNet and Inception v3, in training mode
    if weights not in ("imagenet", "none"):
        load_weights(network, name, weights)
    outputs = {n: getattr(m, "out_features", getattr(m, "out_channels", 0)) for n, m in network.named_modules()}
    classifier = [n for n, width in outputs.items() if width == 1000][-1]
    network.set_submodule(classifier, nn.Identity())
    return network


class Embedder(nn.Module):
    """Backbone, Linear(features, 128), L2 normalisation: (B, 3, S, S) normalised -> (B, 128) of unit length."""

    def __init__(self, backbone, weights, size):
        super().__init__()
        if backbone == "bninception":
            self.backbone = BNInception()
        elif backbone == "smallconv":
            self.backbone = smallconv()
        else:
            self.backbone = torchvision_backbone(backbone, weights)
        if backbone == "smallconv" and weights == "imagenet":
            raise UserError("--weights imagenet: smallconv has none; use --weights none")
        if backbone in ("bninception", "smallconv") and weights != "none":
            load_weights(self.backbone, backbone, weights)
        order, mean, std = BGR_CAFFE if backbone == "bninception" else RGB_TORCHVISION
        self.order = order
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        try:
            with torch.no_grad():
                features = self.eval().backbone(torch.zeros(1, 3, size, size)).shape[1]
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--image-size {size}: {backbone} cannot take it ({error})") from error
        self.head = nn.Linear(features, EMBEDDING)

    def normalise(self, images):
        """(B, 3, H, W) RGB in [0, 255] -> the backbone's input."""
        return (images[:, self.order] - self.mean) / self.std

    @property
    def mean_colour(self):
        """(3, 1, 1) RGB: the colour that normalise() maps to zero."""
        return self.mean[self.order]

    def forward(self, x):
        return F.normalize(self.head(self.backbone(x)), dim=1)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():  # running statistics stay ImageNet's, the affine weights train
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


# ----------------------------------------------------------------------------------------------------
# 6. Losses: (embeddings (B, D) of unit length, labels (B,), weight (C, D) or None, hyper-parameters)
# ----------------------------------------------------------------------------------------------------


def pairs(labels):
    """Positive and negative pairs, two (B, B) booleans: same label and i != j; other label."""
    same = labels[:, None] == labels[None]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def nzmean(terms):
    """Mean over the strictly positive of non-negative terms, 0 (with a gradient path) if there are none."""
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def distances(embeddings):
    """(B, D) -> (B, B) Euclidean, with gradient 0 (not infinity) where two embeddings are the same."""
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def contrastive(embeddings, labels, weight=None, *, pos_margin, neg_margin):
    """nzmean_pos [d_ij - pos_margin]+  +  nzmean_neg [neg_margin - d_ij]+   (Hadsell et al. 2006)"""
    d, (pos, neg) = distances(embeddings), pairs(labels)
    return nzmean(F.relu(d[pos] - pos_margin)) + nzmean(F.relu(neg_margin - d[neg]))


def triplet(embeddings, labels, weight=None, *, margin):
    """nzmean_(a,p,n) [d_ap - d_an + margin]+ over all triplets of the batch   (Weinberger & Saul 2009)"""
    d, (pos, neg) = distances(embeddings), pairs(labels)
    triplets = pos[:, :, None] & neg[:, None, :]  # (B, B, B): anchor, positive, negative
    return nzmean(F.relu(d[:, :, None] - d[:, None, :] + margin)[triplets])


def multi_similarity(embeddings, labels, weight=None, *, alpha, beta, base):
    """mean_a  log(1 + sum_p exp(alpha (base - s_ap))) / alpha  +  log(1 + sum_n exp(beta (s_an - base))) / beta
    (Wang et al. 2019, without its miner)"""
    s, (pos, neg) = embeddings @ embeddings.T, pairs(labels)

    def log1p_sum_exp(terms, chosen):  # the padded zero is the 1 +
        return F.pad(terms.masked_fill(~chosen, -math.inf), (1, 0)).logsumexp(dim=1)

    return (log1p_sum_exp(alpha * (base - s), pos) / alpha + log1p_sum_exp(beta * (s - base), neg) / beta).mean()


def class_cosines(embeddings, weight):
    """(B, D), (C, D) -> (B, C)"""
    return F.normalize(embeddings, dim=1) @ F.normalize(weight, dim=1).T


def arcface(embeddings, labels, weight, *, margin, scale):
    """cross-entropy of scale * cos(theta_y + margin) against scale * cos(theta_c), margin in degrees
    (Deng et al. 2019, the plain form, for theta + margin > pi too)"""
    cosines = class_cosines(embeddings, weight)
    theta = cosines.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    target = F.one_hot(labels, len(weight)).bool()
    return F.cross_entropy(scale * torch.where(target, (theta + math.radians(margin)).cos(), cosines), labels)


def normalized_softmax(embeddings, labels, weight, *, temperature):
    """cross-entropy of cos(e, W_c) / temperature   (Zhai & Wu 2019)"""
    return F.cross_entropy(class_cosines(embeddings, weight) / temperature, labels)


PAIR = {"contrastive": contrastive, "triplet": triplet, "multi_similarity": multi_similarity}
CLASSIFICATION = {"arcface": arcface, "normalized_softmax": normalized_softmax}  # these have a weight
LOSSES = {**PAIR, **CLASSIFICATION}


# ----------------------------------------------------------------------------------------------------
# 7. Metrics
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval_metrics(embeddings, labels, ks, gallery=None):
    """MAP@R, R-precision and Recall@K for K in `ks`, as {"map@r", "r_precision", "recall@1", ...} in [0, 1].

    embeddings (N, D), labels (N,); every item queries all others by Euclidean distance. With `gallery` (N, D),
    other embeddings of the same items, the neighbours are those; an item's own never counts. R is the number
    of other items with the query's label; queries with R = 0 are left out (ValueError if that leaves none).
    Ties count against the query: of equally near items the wrong ones come first, so that an embedding that
    maps everything to one point scores 0, whatever the order of the files. Section 4.3; memory O(N).
    """
    gallery = embeddings if gallery is None else gallery
    _, labels, counts = torch.as_tensor(labels, device=gallery.device).unique(return_inverse=True, return_counts=True)
    others = counts[labels] - 1  # (N,) R of every item
    queries = others.argsort()[(others == 0).sum():]  # those of about equal R share a chunk
    if len(queries) == 0:
        raise ValueError("no label occurs twice, so there is nothing to retrieve")
    members, first = labels.argsort(), counts.cumsum(0) - counts  # items by label, where each label begins
    norms = gallery.square().sum(dim=1) / 2
    sums = Counter()
    for q in queries.split(max(1, 2**24 // len(gallery))):
        R = others[q, None]  # (Q, 1)
        near = (embeddings[q] @ gallery.T).sub_(norms)  # (Q, N), orders as minus the distance does
        near.scatter_(1, q[:, None], -math.inf)
        slots = torch.arange(int(R.max()) + 1, device=q.device)
        own = members[(first[labels[q], None] + slots).clamp(max=len(members) - 1)]  # (Q, R + 1)
        right = near.gather(1, own).masked_fill_(slots > R, -math.inf).sort(descending=True).values[:, :-1]
        # Among the 2R + 1 nearest at most R are right: a right item not nearer than all of them has R + 1
        # wrong ones before it, so this many are enough to know every rank up to R.
        best = near.topk(min(2 * len(slots) - 1, near.shape[1])).values
        hits = slots[1:]  # right items so far, 1 to R
        rank = hits + at_least(best, right) - at_least(right, right)  # wrong ones that are as near come first
        found = (rank <= R) & (hits <= R)
        sums["map@r"] += ((found * hits / rank).sum(dim=1, keepdim=True) / R).sum()
        sums["r_precision"] += (found.sum(dim=1, keepdim=True) / R).sum()
        nearest = right[:, :1].contiguous()
        wrong_before = (near >= nearest).sum(dim=1) - (right >= nearest).sum(dim=1)
        for k in ks:
            sums[f"recall@{k}"] += (wrong_before < k).sum()
    return {name: float(total) / len(queries) for name, total in sums.items()}


def at_least(values, bounds):
    """How many of values (Q, V), sorted descending, are >= each of bounds (Q, W): (Q, W)."""
    return values.shape[1] - torch.searchsorted(values.flip(1), bounds.contiguous())


def nmi(embeddings, labels, seed):
    """Normalised mutual information in [0, 1] of KMeans clusters, as many as labels, with the labels."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    clusters = KMeans(len(np.unique(labels)), n_init=1, random_state=seed).fit_predict(embeddings.cpu().numpy())
    return float(normalized_mutual_info_score(labels, clusters))


# ----------------------------------------------------------------------------------------------------
# 8. Test protocol
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model, photos, pool, draws, seed, args, everything=False):
    """{condition: (N, D)} of all photos (centre crops) under all conditions(); a photo is decoded once for all."""
    model.eval()
    chunks = torch.arange(len(photos)).split(EVAL_BATCH)
    batches = Batches(photos, chunks, args.image_size, False, pool, draws, seed)
    parts = defaultdict(list)
    for batch in tqdm(loader(batches, args), "embedding", leave=False, disable=None):
        if STOP:
            raise Stopped
        photo, backgrounds = (t.to(args.device, non_blocking=True) for t in batch)
        for name, images in conditions(photo, backgrounds, model, everything):
            parts[name].append(model(images))
    return {name: torch.cat(part) for name, part in parts.items()}


def test(model, index, args):
    """The paper's test protocol and what it leaves open: {condition: {metric: value}}, the drawn conditions
    (replaced, query) as {"mean": ..., "std": ..., "draws": [...]}, std with ddof 1."""
    rows = index.split["test"]
    labels = index.labels[rows]
    photos = Photos(*pick(index, rows), args.short_side, args.image_size, keep=False)
    pool = Photos(list_backgrounds(args.backgrounds, "test"), None, args.short_side)
    found = embed(model, photos, pool, DRAWS, (args.seed, TEST), args, everything=True)
    ks = RECALL_AT.get(args.dataset, (1, 2, 4, 8))

    def score(name, gallery=None):
        scores = retrieval_metrics(found[name], labels, ks, gallery)
        return scores | ({"nmi": nmi(found[name], labels, args.seed)} if args.nmi and gallery is None else {})

    names = [f"replaced_{draw}" for draw in range(DRAWS)]
    return {
        "clean": score("clean"),
        "replaced": spread([score(name) for name in names]),
        "query": spread([score(name, found["clean"]) for name in names]),
        "object_only": score("object_only"),
        "background_only": score("background_only"),
    }


def pick(index, rows):
    return [index.images[i] for i in rows], [index.masks[i] for i in rows]


def spread(draws):
    """Mean and sample standard deviation of a list of metric dicts."""
    values = {name: [d[name] for d in draws] for name in draws[0]}
    return {"mean": {k: float(np.mean(v)) for k, v in values.items()},
            "std": {k: float(np.std(v, ddof=1)) for k, v in values.items()}, "draws": draws}


# ----------------------------------------------------------------------------------------------------
# 9. Training
# ----------------------------------------------------------------------------------------------------

# Every random number is a function of (seed, purpose, epoch, batch), so no random state needs saving.
INIT, SAMPLE, TRAIN, VAL, TEST, STEP = range(6)
STOP = []  # filled by SIGTERM


def write(path, save):
    """Writes through a temporary name, so that `path` is always whole: save(temporary path)."""
    draft = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path, content):
    write(path, lambda draft: draft.write_text(json.dumps(content, indent=2) + "\n"))


class Trainer:
    """Model, class weights, optimiser and progress of one run; `progress` is all that resuming needs besides."""

    def __init__(self, args, index, run):
        self.args, self.index, self.run = args, index, run
        torch.manual_seed(mix(args.seed, INIT))
        self.model = Embedder(args.backbone, args.weights, args.image_size).to(args.device)
        hparams = dict(HPARAMS.get(args.dataset, HPARAMS["cars196"])[args.loss])
        groups = [{"params": self.model.parameters(), "lr": args.lr}]
        self.weight = None  # (C, D)
        if args.loss in CLASSIFICATION:
            classes = len(np.unique(index.labels[index.split["train"]]))
            self.weight = nn.Parameter(torch.randn(classes, EMBEDDING, device=args.device))
            groups.append({"params": [self.weight], "lr": hparams.pop("lr_loss")})
        self.optimiser = torch.optim.RMSprop(groups, **RMSPROP)
        self.loss = lambda e, y: LOSSES[args.loss](e, y, self.weight, **hparams)
        self.progress = {"epoch": 1, "step": 0, "loss": 0.0, "seconds": 0.0, "best": -1.0, "best_epoch": 0}

    def save(self, name="last.pt"):
        state = {"model": self.model.state_dict(), "weight": self.weight, "progress": self.progress,
                 "optimiser": self.optimiser.state_dict()}
        write(self.run / name, lambda draft: torch.save(state, draft))

    def load(self, name="last.pt"):
        state = torch.load(self.run / name, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = state["progress"]
        if self.weight is not None:
            self.weight.data.copy_(state["weight"])

    def fit(self):
        """Trains until --patience epochs brought nothing or --epochs are over. Raises Stopped, with all saved."""
        args, rows = self.args, self.index.split
        self.photos = Photos(*pick(self.index, rows["train"]), args.short_side)
        self.val = Photos(*pick(self.index, rows["val"]), args.short_side, args.image_size)
        self.pool = Photos(list_backgrounds(args.backgrounds, "val"), None, args.short_side)
        try:
            while not self.finished():
                start = time.monotonic()
                self.train_epoch()
                self.validate(start)
        except Stopped:
            self.save()
            raise
        if not (self.run / "best.pt").exists():  # --epochs 0: the untrained network is the result
            self.save("best.pt")

    def finished(self):
        p = self.progress
        return p["epoch"] > self.args.epochs or p["epoch"] - 1 - p["best_epoch"] >= self.args.patience

    def train_epoch(self):
        """The rest of the current epoch: all of it, or what SIGTERM left."""
        args, p = self.args, self.progress
        labels = self.index.labels[self.index.split["train"]]
        m = images_per_class(args.loss, args.batch_size, len(np.unique(labels)))
        seed = (args.seed, SAMPLE, p["epoch"])
        lists = list(MPerClassSampler(labels, m, args.batch_size, args.iterations, seed))
        seed = (args.seed, TRAIN, p["epoch"])
        batches = Batches(self.photos, lists, args.image_size, True, self.pool, int(args.bgaugment), seed)
        self.model.train()
        bar = tqdm(loader(batches, args, p["step"]), f"epoch {p['epoch']}", leave=False, disable=None)
        for photos, backgrounds in bar:
            label = torch.as_tensor(labels[lists[p["step"]]], device=args.device)
            p["loss"] += self.step(photos, backgrounds, label)
            p["step"] += 1
            if STOP:
                raise Stopped

    def step(self, photos, backgrounds, labels):
        """One optimiser step; returns the loss. Raises UserError if it is not finite."""
        args, p = self.args, self.progress
        torch.manual_seed(mix(args.seed, STEP, p["epoch"], p["step"]))  # for backbones with dropout
        photos, backgrounds = photos.to(args.device), backgrounds.to(args.device)
        *_, (_, images) = conditions(photos, backgrounds, self.model)  # clean, or BGAugment's
        loss = self.loss(self.model(images), labels)
        if not loss.isfinite():
            raise UserError(f"--lr {args.lr}: the loss is {loss.item()} in epoch {p['epoch']}; the last good state is "
                            f"{self.run / 'last.pt'}. Lower --lr and start over with --fresh")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def validate(self, start):
        """Clean and replaced validation, selection, log, checkpoints."""
        args, p = self.args, self.progress
        found = embed(self.model, self.val, self.pool, 1, (args.seed, VAL, p["epoch"]), args)
        labels = self.index.labels[self.index.split["val"]]
        clean, replaced = (retrieval_metrics(found[name], labels, (1,)) for name in ("clean", "replaced_0"))
        score = (clean if args.select == "clean" else replaced)["map@r"]
        if score > p["best"]:
            p.update(best=score, best_epoch=p["epoch"])
        seconds = time.monotonic() - start
        row = {"epoch": p["epoch"], "loss": p["loss"] / args.iterations, "val_clean": clean,
               "val_replaced": replaced, "best": p["best"], "best_epoch": p["best_epoch"], "seconds": seconds}
        p.update(epoch=p["epoch"] + 1, step=0, loss=0.0, seconds=p["seconds"] + seconds)
        self.log(row)
        if p["best_epoch"] == row["epoch"]:
            self.save("best.pt")
        self.save()

    def log(self, row):
        """Appends to log.jsonl, dropping what a killed run had written past its last checkpoint; prints."""
        args, file = self.args, self.run / "log.jsonl"
        lines = file.read_text().splitlines()[: row["epoch"] - 1] if file.exists() else []
        write(file, lambda draft: draft.write_text("\n".join([*lines, json.dumps(row)]) + "\n"))
        waited = row["epoch"] - row["best_epoch"]
        left = min(args.epochs - row["epoch"], args.patience - waited) * row["seconds"]
        print(f"epoch {row['epoch']:4d}  loss {row['loss']:8.4f}  val MAP@R clean {100 * row['val_clean']['map@r']:5.2f}"
              f"  replaced {100 * row['val_replaced']['map@r']:5.2f}  best {100 * row['best']:5.2f}"
              f"  patience {waited:2d}/{args.patience}  {row['seconds']:6.1f} s  ETA >= {clock(left)}", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# ----------------------------------------------------------------------------------------------------
# 10. Command line
# ----------------------------------------------------------------------------------------------------

FREE = {"runs", "device", "workers", "fresh", "test_only", "nmi"}  # arguments a resumed run may change


def parse_args(argv=None):
    def at_least(low, kind=int):
        def number(text):
            value = kind(text)
            if not low <= value < math.inf:
                raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
            return value
        return number

    parser = argparse.ArgumentParser(
        description="Train an image retrieval model and measure its background bias (Kobs & Hotho, 2022).",
        epilog=f"Defaults are the paper's; with --dataset toy: {DEFAULTS['toy']}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="toy", help="toy, cars196, cub200, sop, or a folder with images/<class>/ and masks/<class>/")
    add("--loss", default="contrastive", choices=LOSSES, help="training loss")
    add("--bgaugment", action="store_true", help="replace the background of every training image")
    add("--data", default="data", help="folder that holds the named datasets")
    add("--backgrounds", help="folder with val/ and test/ photos (default: DATA/unsplash_backgrounds, toy: its own)")
    add("--runs", default="runs", help="folder for the run folders")
    add("--seed", type=at_least(0), default=42, help="fixes every random number")
    add("--epochs", type=at_least(0), help="at most; 0 tests the untrained network")
    add("--iterations", type=at_least(1), help="batches an epoch")
    add("--patience", type=at_least(1), default=15, help="stop after this many epochs without a better val MAP@R")
    add("--batch-size", type=at_least(2), default=32, help="images a batch")
    add("--lr", type=at_least(0, float), help="learning rate of the network; the class weights have their own")
    add("--backbone", help="bninception, smallconv or a torchvision classifier, as resnet50")
    add("--weights", help="imagenet, none (random), or a checkpoint file of the backbone")
    add("--image-size", type=at_least(16), help="crop side in px; the short side before cropping is 256/227 of it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=at_least(0), help="processes that prepare batches (default: 8 on a GPU, 0 on the CPU)")
    add("--select", choices=("clean", "corrupted"), help="val MAP@R that picks the epoch (default: corrupted with "
        "--bgaugment, else clean)")
    add("--fresh", action="store_true", help="delete what the run folder holds and start over")
    add("--test-only", action="store_true", help="test the run's best.pt again")
    add("--nmi", action="store_true", help="also cluster the test embeddings (slow) and report NMI")
    toy = parser.parse_known_args(argv)[0].dataset == "toy"
    parser.set_defaults(**DEFAULTS["toy" if toy else "paper"])
    return complete(parser.parse_args(argv))


def complete(args):
    """Fills in what depends on other arguments. Raises UserError."""
    args.dataset = ALIASES.get(args.dataset, args.dataset)
    args.backgrounds = args.backgrounds or str(
        Path(args.data, "toy/backgrounds" if args.dataset == "toy" else "unsplash_backgrounds"))
    args.select = args.select or ("corrupted" if args.bgaugment else "clean")
    args.short_side = round(SHORT_SIDE * args.image_size)
    if args.device == "auto":
        args.device = ("cuda" if torch.cuda.is_available() else
                       "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else min(8, os.cpu_count())
    return args


def run_folder(args, bgaugment):
    kind = "bgaugment" if bgaugment else "base"
    return Path(args.runs, f"{Path(args.dataset).resolve().name}-{args.loss}-{kind}-s{args.seed}")


def open_run(args):
    """The run folder with its config.json, new or the same as before. Raises UserError."""
    run = run_folder(args, args.bgaugment)
    if args.fresh and run.exists():
        shutil.rmtree(run)
    file = run / "config.json"
    if file.exists():
        saved = json.loads(file.read_text())["args"]
        other = [f"--{k.replace('_', '-')} {saved.get(k)} (now {v})" for k, v in vars(args).items()
                 if k not in FREE and saved.get(k) != v]
        if other:
            raise UserError(f"{run}: was run with {', '.join(other)}; give the same arguments, another --runs, or --fresh")
        return run
    if args.test_only:
        raise UserError(f"--test-only: {run} holds no run; train it first, without --test-only")
    run.mkdir(parents=True, exist_ok=True)
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    write_json(file, {"args": vars(args), "git": sha.stdout.strip() or "unknown", "device": device,
                      "python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                      "torchvision": torchvision.__version__})
    return run


CONDITIONS = ("clean", "replaced", "query", "object_only", "background_only")


def print_results(args):
    """Prints the run's test MAP@R in percent, beside its base or BGAugment sibling's if that is done too."""
    print(f"\ntest MAP@R, %  {'':12s}" + "".join(f"{name.replace('_', ' '):>17s}" for name in CONDITIONS))
    for bgaugment in (False, True):
        run = run_folder(args, bgaugment)
        if not (run / "result.json").exists():
            continue
        scores = json.loads((run / "result.json").read_text())["test"]
        cells = [f"{100 * s['mean']['map@r']:.2f} +- {100 * s['std']['map@r']:.2f}" if "mean" in s
                 else f"{100 * s['map@r']:.2f}" for s in (scores[name] for name in CONDITIONS)]
        print(f"{args.loss + (' + BGAugment' if bgaugment else ''):27s}" + "".join(f"{c:>17s}" for c in cells))
    print(f"all metrics: {run_folder(args, args.bgaugment) / 'result.json'}")


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: STOP.append(True))
    run = open_run(args)
    if (run / "result.json").exists() and not args.test_only:
        print(f"{run} is done (--fresh starts over, --test-only tests again)")
        return print_results(args)
    print(f"{run}: " + (run / "config.json").read_text(), flush=True)
    trainer = Trainer(args, load_index(args.dataset, args.data), run)
    if (run / "last.pt").exists():
        trainer.load()
        print(f"resuming at epoch {trainer.progress['epoch']}, batch {trainer.progress['step']}")
    if not args.test_only:
        trainer.fit()
    elif not (run / "best.pt").exists():
        raise UserError(f"{run / 'best.pt'}: missing; train first, without --test-only")
    progress = trainer.progress
    trainer.load("best.pt")
    scores = test(trainer.model, trainer.index, args)
    write_json(run / "result.json", {"args": vars(args), "epochs": progress["epoch"] - 1, "best_epoch":
               progress["best_epoch"], "val_best": progress["best"], "seconds": progress["seconds"], "test": scores})
    print_results(args)


def command(name, main):
    """Runs a script's main(); errors the user can mend end in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped:
        print(f"{name}: stopped by SIGTERM, all saved; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on after the last epoch", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    command("bgbias.py", main)
