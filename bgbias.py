"""Does an image retrieval model look at the object or at the background? This script trains a
model, replaces the backgrounds of its test images, and measures how much accuracy that costs. It
implements Kobs & Hotho, "On Background Bias in Deep Metric Learning" (ICMV 2022, arXiv:2210.01615).

    python bgbias.py                                # toy data, contrastive loss, about a minute
    python bgbias.py --dataset cars196 --loss contrastive --bgaugment     # a run of the paper
    python bgbias.py --dataset my_photos --loss triplet                # my_photos/images/<class>/
    python bgbias.py --report runs                  # all runs in one table, beside the paper's

The defaults are the paper's settings, except for the toy set, which has its own. Each run has one
folder: RUNS/<dataset>-<loss>-<base|bgaugment>-s<seed>, followed by every setting that is not the
default. A run writes result.json last. The same command resumes an interrupted run.

Shapes: B batch, D embedding (128), C classes, N images, H W pixels, S crop size, K neighbours.
Every mask is soft: (B, 1, H, W) in [0, 1], where 1 = foreground.
Sections in parentheses are the paper's. DIFF marks a difference from the authors' code (README).
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm


# ==================================================================================================
# PART I: THE PAPER
# ==================================================================================================


# ---- 1. Protocol ---------------------------------------------------------------------------------

# No class is in two splits. Labels start at 0 (Section 4.1).
SPLITS = {
    "cars196": {"train": range(0, 74), "val": range(74, 98), "test": range(98, 196)},
    "cub200": {"train": range(0, 75), "val": range(75, 100), "test": range(100, 200)},
    "sop": {"train": range(0, 8489), "val": range(8489, 11318), "test": range(11318, 22634)},
    "toy": {"train": range(0, 100), "val": range(100, 120), "test": range(120, 170)},
}
COUNTS = {  # images, test images
    "cars196": (16185, 8131), "cub200": (11788, 5924), "sop": (120053, 60502), "toy": (3400, 1000)}
POOL_SIZE = 100  # background photos in each of val/ and test/

DEFAULTS = dict(epochs=1000, iterations=100, lr=1e-6, image_size=227, backbone="bninception",
                weights="imagenet")
TOY_DEFAULTS = dict(epochs=15, iterations=50, lr=5e-5, image_size=48, backbone="smallconv",
                    weights="none")
RMSPROP = dict(weight_decay=1e-4, momentum=0.9, alpha=0.99, eps=1e-8)
EMBEDDING = 128
RESIZE = 256 / 227  # short side of a resized photo / side of the crop taken from it
CROP_SCALE, CROP_RATIO, FLIP = (0.16, 1.0), (0.75, 1.33), 0.5  # training transform, Section 4
DRAWS = 5  # random backgrounds of `replaced` per test photo; a validation photo gets one
TEST_DRAWS = {"replaced": DRAWS, "same_class": 1, "other_class": 1}  # backgrounds per test photo
RECALL_AT = {"sop": (1, 10, 100, 1000)}  # the K of Recall@K; other datasets use 1, 2, 4, 8
EVAL_BATCH = 32  # photos per batch in evaluation; the size does not change the results

# Random numbers are seeded with the run's seed, their purpose and the number of the batch or photo.
# So a resumed run needs no saved random state.
INIT, TRAIN, VAL, TEST, STEP = range(5)

# The paper uses the optima of "A Metric Learning Reality Check" (Musgrave et al. 2020). Arcface's
# margin is in degrees. A user's own folder uses those of cars196.
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
        # The negative pos_margin is correct: nzmean() then averages over all positive pairs.
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
    "toy": {  # chosen by us
        "contrastive": dict(pos_margin=0.2, neg_margin=0.7),
        "triplet": dict(margin=0.2),
        "multi_similarity": dict(alpha=2.0, beta=20.0, base=0.5),
        "arcface": dict(margin=10.0, scale=16.0, lr_loss=0.01),
        "normalized_softmax": dict(temperature=0.1, lr_loss=0.01),
    },
}


# ---- 2. Backgrounds ------------------------------------------------------------------------------

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean in RGB, which fills the hidden part of a photo


def replace_background(images, masks, backgrounds):
    """Keeps the foreground of the images and takes the rest from the backgrounds: (B, 3, H, W),
    (B, 1, H, W) in [0, 1] with 1 = foreground, (B, 3, H, W) -> (B, 3, H, W)."""
    return images * masks + backgrounds * (1 - masks)


def remove_object(images, masks):
    """Fills the object and a margin of S / 64 from the background around it: (B, 3, S, S) in
    [0, 255], (B, 1, S, S) in [0, 1] -> (B, 3, S, S). The fill is blur(image * keep) / blur(keep),
    where keep is 1 on the background."""
    margin = max(1, images.shape[-1] // 64)
    keep = (F.max_pool2d(masks, 2 * margin + 1, 1, margin) < 0.1).float()
    # The fill is smooth, so half of the resolution is enough.
    known = F.interpolate(torch.cat([images * keep, keep], dim=1), scale_factor=0.5, mode="area")
    place = torch.linspace(0, 1, known.shape[-1], device=images.device)
    colour, share = known.mean(dim=(2, 3), keepdim=True).split((3, 1), dim=1)
    fill = colour / share.clamp(min=1e-6)  # the mean of the background, or black if there is none
    for divisor in (4, 10, 24, 64):  # Gaussians of standard deviation S / divisor
        blur = (((place - place[:, None]) * divisor).square() / -2).exp()
        blur = blur / blur.sum(dim=1, keepdim=True)
        colour, share = (blur @ known @ blur.T).split((3, 1), dim=1)
        # The narrowest blur that sees at least a tenth of background wins.
        fill = fill + (10 * share).clamp(max=1) * (colour / share.clamp(min=1e-6) - fill)
    return torch.where(keep > 0, images, F.interpolate(fill, images.shape[2:], mode="bilinear"))


def as_backgrounds(drawn):
    """uint8 photos (B, 3, S, S), or (B, 4, S, S) with masks -> (B, 3, S, S) without objects"""
    return remove_object(*unpack(drawn)) if drawn.shape[1] == 4 else drawn.float()


def unpack(photos):
    """(B, 4, S, S) uint8 -> images (B, 3, S, S) in [0, 255], masks (B, 1, S, S) in [0, 1]"""
    return photos[:, :3].float(), photos[:, 3:].float() / 255


# ---- 3. Sampler ----------------------------------------------------------------------------------


class MPerClassSampler:
    """Batches of indices into `labels` (Section 4): batch_size // m distinct classes, m images of
    each, without replacement unless the class has fewer than m. Too few classes: ValueError."""

    def __init__(self, labels, m, batch_size):
        labels = np.asarray(labels)
        self.classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.m, self.batch_size = m, batch_size

    def batch(self, seed):
        """A list of indices, the same for the same seed (an int or a tuple of ints)."""
        rng = np.random.default_rng(seed)
        indices = []
        for c in rng.choice(len(self.classes), self.batch_size // self.m, replace=False):
            images = self.classes[c]
            indices += rng.choice(images, self.m, replace=len(images) < self.m).tolist()
        return indices


# ---- 4. Network ----------------------------------------------------------------------------------

# A block without a 1x1 branch has stride 2.
BLOCKS = {  # in, 1x1, 3x3 (reduce, out), double 3x3 (reduce, 1, 2), pool, projection
    "3a": (192, 64, (64, 64), (64, 96, 96), nn.AvgPool2d, 32),
    "3b": (256, 64, (64, 96), (64, 96, 96), nn.AvgPool2d, 64),
    "3c": (320, None, (128, 160), (64, 96, 96), nn.MaxPool2d, None),
    "4a": (576, 224, (64, 96), (96, 128, 128), nn.AvgPool2d, 128),
    "4b": (576, 192, (96, 128), (96, 128, 128), nn.AvgPool2d, 128),
    "4c": (576, 160, (128, 160), (128, 160, 160), nn.AvgPool2d, 128),
    "4d": (608, 96, (128, 192), (160, 192, 192), nn.AvgPool2d, 128),
    "4e": (608, None, (128, 192), (192, 256, 256), nn.MaxPool2d, None),
    "5a": (1056, 352, (192, 320), (160, 224, 224), nn.AvgPool2d, 128),
    "5b": (1024, 352, (192, 320), (192, 224, 224), nn.MaxPool2d, 128),
}


def conv(width, out, kernel, stride=1):
    """A padded convolution."""
    layer = nn.Conv2d(width, out, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(layer.weight)  # frozen BatchNorm cannot correct the activations' scale
    return layer


def unit(network, name, width, out, kernel, stride=1):
    """Convolution, BatchNorm and ReLU. The network registers the first two as NAME and NAME_bn."""
    layer = conv(width, out, kernel, stride)
    norm = nn.BatchNorm2d(out)
    network.add_module(name, layer)
    network.add_module(f"{name}_bn", norm)
    return nn.Sequential(layer, norm, nn.ReLU())


def block(network, name, width, single, triple, double, pool, projection):
    """The branches of a block, whose outputs are concatenated; see BLOCKS. `triple` and `double`
    hold the output channels of each convolution of their branch."""
    stride, padding = (1, 1) if single else (2, 0)
    branches = []
    if single:
        branches.append(unit(network, f"{name}_1x1", width, single, 1))
    branches.append(nn.Sequential(
        unit(network, f"{name}_3x3_reduce", width, triple[0], 1),
        unit(network, f"{name}_3x3", triple[0], triple[1], 3, stride)))
    branches.append(nn.Sequential(
        unit(network, f"{name}_double_3x3_reduce", width, double[0], 1),
        unit(network, f"{name}_double_3x3_1", double[0], double[1], 3),
        unit(network, f"{name}_double_3x3_2", double[1], double[2], 3, stride)))
    branches.append(nn.Sequential(pool(3, stride, padding, ceil_mode=True)))
    if projection:
        branches[-1].append(unit(network, f"{name}_pool_proj", width, projection, 1))
    return branches


class BNInception(nn.Module):
    """BN-Inception (Ioffe & Szegedy 2015): (B, 3, H, W) BGR, mean-subtracted -> (B, 1024).
    Its parameters are named as in the public checkpoint bn_inception-52deb4733.pth."""

    def __init__(self):
        super().__init__()
        # PyTorch does not look into lists, so the modules have only the flat names of unit().
        self.stem = [
            unit(self, "conv1_7x7_s2", 3, 64, 7, stride=2),  # (B, 64, 114, 114) at 227 px
            nn.MaxPool2d(3, 2, ceil_mode=True),
            unit(self, "conv2_3x3_reduce", 64, 64, 1),
            unit(self, "conv2_3x3", 64, 192, 3),
            nn.MaxPool2d(3, 2, ceil_mode=True)]  # (B, 192, 28, 28)
        self.blocks = [block(self, f"inception_{name}", *row) for name, row in BLOCKS.items()]

    def forward(self, x):
        for layer in self.stem:
            x = layer(x)
        for branches in self.blocks:
            x = torch.cat([branch(x) for branch in branches], dim=1)
        return x.mean(dim=(2, 3))  # (B, 1024, 7, 7) -> (B, 1024)


# Network input: channel order, mean and standard deviation, for pixels in [0, 255].
BGR_CAFFE = ([2, 1, 0], [104.0, 117.0, 128.0], [1.0, 1.0, 1.0])
RGB_IMAGENET = ([0, 1, 2], [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


class Embedder(nn.Module):
    """Backbone, Linear(features, embedding) and L2 norm (Section 4): (B, 3, S, S) normalised ->
    (B, embedding) of unit length. If `embedding` is 0, there is no linear layer. Raises UserError
    for a backbone that is unknown or does not give (B, features)."""

    def __init__(self, backbone, weights, size, embedding=EMBEDDING):
        super().__init__()
        self.backbone = build_backbone(backbone, weights)
        order, mean, std = input_scaling(backbone, self.backbone)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)
        self.features = count_features(backbone, self.eval(), size)
        self.width = embedding or self.features
        self.head = nn.Linear(self.features, embedding) if embedding else nn.Identity()
        load_head(self.head, weights)  # only from a run's best.pt
        self.to(memory_format=torch.channels_last)  # faster, on a CPU too

    def normalise(self, images):
        """(..., 3, H, W) RGB in [0, 255] -> the backbone's input."""
        return (images.index_select(-3, self.order) - self.mean) / self.std

    def forward(self, x):
        features = self.backbone(x.contiguous(memory_format=torch.channels_last))
        return F.normalize(self.head(features.to(self.mean.dtype)), dim=1)

    def train(self, mode=True):
        super().train(mode)
        # BatchNorm keeps ImageNet's statistics. Only its affine weights are trained.
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


# ---- 5. Losses -----------------------------------------------------------------------------------


# Every loss is called as LOSSES[loss](embeddings, labels, weight, **HPARAMS[dataset][loss]). Class
# weights, also called proxies, are one vector per class. Pair losses ignore `weight`. All losses
# ignore `lr_loss`, the class weights' learning rate, which the optimiser uses. [x]+ is max(x, 0).


def pairs(labels):
    """Two (B, B) booleans. Positive pairs: same label and i != j. Negative pairs: other label."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def nzmean(terms, chosen):
    """Mean over the chosen terms that are above 0; 0, with a gradient path, if there are none.
    Masking instead of indexing avoids a GPU sync."""
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
    """cross-entropy of scale cos(theta_c); for the image's own class, scale cos(theta_c + margin)
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


def euclidean(embeddings, others):
    """Distance of each row to the same row, or to the only row: (B, D), (B or 1, D) -> (B,)."""
    return torch.linalg.vector_norm(embeddings - others, dim=1)


def cosine(embeddings, others):
    """1 - cosine similarity, from 0 to 2, with the shapes of euclidean()."""
    return 1 - F.cosine_similarity(embeddings, others, dim=1)


# A new loss needs an entry in the next three tables, in CLASS_WEIGHTS if it has class weights, and
# in HPARAMS for the dataset that you train on.
LOSSES = {"contrastive": contrastive, "triplet": triplet, "multi_similarity": multi_similarity,
          "arcface": arcface, "normalized_softmax": normalized_softmax}
DISTANCES = {"contrastive": euclidean, "triplet": euclidean, "multi_similarity": cosine,
             "arcface": cosine, "normalized_softmax": cosine}  # of the attention score, Section 5
IMAGES_PER_CLASS = {"contrastive": 4, "triplet": 4, "multi_similarity": 4,
                    "arcface": 1, "normalized_softmax": 1}  # in a batch
CLASS_WEIGHTS = {"arcface", "normalized_softmax"}


# ---- 6. Metrics ----------------------------------------------------------------------------------


@torch.no_grad()
def retrieval_metrics(embeddings, labels, ks, gallery=None):
    """MAP@R, R-precision, Recall@K, K in `ks`: {"map@r", "r_precision", "recall@1", ...}, 0 to 1.

    embeddings (N, D), labels (N,): every item queries all others by Euclidean distance. `gallery`
    (N, D) holds other embeddings of the same items; with it, every item queries the gallery without
    itself. R is the number of other items with the query's label. Queries with R = 0 are left out.
    Raises ValueError if no query remains, FloatingPointError on nan or inf. Memory is linear in N.

    All metrics (Section 4.3) follow from the rank of the i-th nearest right item. That rank is i
    plus the number of wrong items at the same distance or nearer. MAP@R = sum_i [rank_i <= R] i /
    rank_i / R, R-precision = sum_i [rank_i <= R] / R, Recall@K = [rank_1 <= K]."""
    # DIFF: the query itself is removed from its results, not whatever comes first.
    # DIFF: at equal distance, wrong items rank before right ones.
    # Equal embeddings therefore score (nearly) 0 in MAP@R, whatever the order of the files.
    embeddings = torch.as_tensor(embeddings)
    gallery = embeddings if gallery is None else torch.as_tensor(gallery)
    labels = torch.as_tensor(labels, device=gallery.device)
    if not (embeddings.isfinite().all() and gallery.isfinite().all()):
        raise FloatingPointError("the embeddings contain nan or inf")
    order = labels.argsort(stable=True)  # makes the items of a class consecutive
    _, sizes = labels[order].unique_consecutive(return_counts=True)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (N,) first item of the class
    others = sizes.repeat_interleave(sizes) - 1  # (N,) R
    center = gallery.mean(dim=0)  # subtracting it preserves distances and saves float32 precision
    # q . g - |g|^2 / 2 is larger for nearer items g. The extra dimension adds the second term.
    queries = F.pad(embeddings[order] - center, (0, 1), value=1)
    columns = F.pad(gallery[order] - center, (0, 1))
    columns[:, -1] = columns.square().sum(dim=1) / -2
    sums = Counter()
    for R in others[others > 0].unique().tolist():
        for q in (others == R).nonzero()[:, 0].split(max(1, 2**24 // len(columns))):  # (Q,)
            near = queries[q] @ columns.T  # (Q, N)
            near.scatter_(1, q[:, None], -math.inf)  # an item is not its own neighbour
            right = near.gather(1, first[q, None] + torch.arange(R + 1, device=q.device))
            right = right.sort(descending=True).values[:, :R].contiguous()  # (Q, R)
            # At most R right and R - 1 wrong items are as near as a right item of rank <= R. So the
            # 2 R nearest items are enough to compute all ranks up to R.
            best = near.topk(min(2 * R, len(columns))).values
            hits = torch.arange(1, R + 1, device=q.device)
            nearer, right_nearer = (torch.searchsorted(-items, -right, right=True)
                                    for items in (best, right))  # or at the same distance
            ranks = hits + nearer - right_nearer  # (Q, R)
            found = ranks <= R
            sums["map@r"] += (found * hits / ranks).sum() / R
            sums["r_precision"] += found.sum() / R
            ties = (right == right[:, :1]).sum(dim=1)
            first_rank = 1 + near.ge_(right[:, :1]).sum(dim=1) - ties  # K may be larger than R
            for k in ks:
                sums[f"recall@{k}"] += (first_rank <= k).sum()
    if not sums:
        raise ValueError("no label occurs twice, so there is nothing to retrieve")
    return {name: float(total) / int((others > 0).sum()) for name, total in sums.items()}


# ---- 7. Training ---------------------------------------------------------------------------------


class State:
    """A run's network, class weights (C, D) or None, optimiser, and results of each epoch."""

    def __init__(self, args, classes, weights):
        torch.manual_seed(seed_of(args.seed, INIT))
        network = Embedder(args.backbone, weights, args.image_size, args.embedding)
        self.network = network.to(args.device)
        groups = [{"params": self.network.parameters(), "lr": args.lr}]
        self.class_weights = None
        if args.loss in CLASS_WEIGHTS:
            self.class_weights = nn.Parameter(torch.randn(classes, network.width).to(args.device))
            groups.append({"params": [self.class_weights], "lr": args.hparams["lr_loss"]})
        self.optimiser = torch.optim.RMSprop(groups, **RMSPROP)
        self.history, self.args = [], args

    @property
    def best_epoch(self):
        """The first epoch with the best validation MAP@R, counted from 1; 0 if there is none."""
        scores = [row[self.args.select]["map@r"] for row in self.history]
        return scores.index(max(scores)) + 1 if scores else 0

    @property
    def is_finished(self):
        return len(self.history) >= min(self.args.epochs, self.best_epoch + self.args.patience)

    def save(self, path, *, optimiser):
        content = {"network": self.network.state_dict(), "class_weights": self.class_weights,
                   "history": self.history}
        if optimiser:
            content["optimiser"] = self.optimiser.state_dict()
        write(path, lambda draft: torch.save(content, draft))

    def load(self, path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(content["network"])
        if self.class_weights is not None:
            self.class_weights.data.copy_(content["class_weights"])
        if "optimiser" in content:
            self.optimiser.load_state_dict(content["optimiser"])
        self.history = content["history"]


def train(args, splits, state, run):
    """Trains for epochs of `iterations` batches, each followed by a validation (Section 4). Starts
    from `state`. Stops after `patience` epochs without improvement, or after `epochs`. Writes
    log.jsonl, best.pt (the best epoch) and last.pt (for resuming). Raises UserError."""
    network = state.network
    train_labels = splits["train"].labels
    # DIFF: if there are too few classes for a batch, it holds all, with as many images each as fit.
    classes = min(args.batch_size // IMAGES_PER_CLASS[args.loss], len(np.unique(train_labels)))
    if classes < 2:
        raise UserError(f"--batch-size {args.batch_size}: too small for two classes; give more")
    m = args.batch_size // classes
    sampler = MPerClassSampler(train_labels, m, m * classes)
    draws = {"replaced": 1} if args.bgaugment else {}
    train_batches = make_batches(args, splits["train"], TRAIN, draws, sampler)
    val_batches = make_batches(args, splits["val"], VAL, {"replaced": 1})
    # Both loaders last until the end, so that workers start once and prefetch during validations.
    done, steps, items = len(state.history), args.iterations, val_batches.items_per_pass
    train_loader = loader(train_batches, args, range(done * steps, args.epochs * steps))
    val_loader = loader(val_batches, args, range(done * items, args.epochs * items))
    while not state.is_finished:
        start = time.monotonic()
        epoch = len(state.history) + 1
        network.train()
        losses = []
        for step in tqdm(range(steps), f"epoch {epoch}", leave=False, disable=None):
            photos, backgrounds, labels = next(train_loader)
            # Seeds dropout, so that a resumed run is identical. Without workers, next() seeds too.
            torch.manual_seed(seed_of(args.seed, STEP, epoch, step))
            images, masks = unpack(photos)
            if args.bgaugment:  # the paper's method
                drawn = as_backgrounds(backgrounds["replaced"][0])
                images = replace_background(images, masks, drawn)
            embeddings = network(network.normalise(images))
            loss = LOSSES[args.loss](embeddings, labels, state.class_weights, **args.hparams)
            state.optimiser.zero_grad()
            loss.backward()
            state.optimiser.step()
            losses.append(loss.detach())
        loss = float(torch.stack(losses).mean())  # read once per epoch, to avoid GPU syncs
        if not math.isfinite(loss):
            raise UserError(f"--lr {args.lr}: the loss is {loss} in epoch {epoch}; give a lower lr")
        embedded = embed(network, itertools.islice(val_loader, items))
        scores = {condition: retrieval_metrics(draws[0], val_batches.labels, (1,))
                  for condition, draws in embedded.items()}  # clean and replaced
        seconds = time.monotonic() - start
        state.history.append({"epoch": epoch, "loss": loss, **scores, "seconds": seconds})
        if state.best_epoch == epoch:
            state.save(run / "best.pt", optimiser=False)
        write_text(run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.history))
        state.save(run / "last.pt", optimiser=True)
        clean, replaced = (100 * scores[name]["map@r"] for name in ("clean", "replaced"))
        print(f"epoch {epoch:3d}  loss {loss:.4f}  val MAP@R clean {clean:5.2f}  replaced "
              f"{replaced:5.2f}  (best {args.select}: epoch {state.best_epoch})  {seconds:.1f} s, "
              f"up to {seconds * (args.epochs - epoch) / 60:.1f} min left", flush=True)


# ---- 8. Test -------------------------------------------------------------------------------------


@torch.no_grad()
def embed(network, batches, *, extra=False):
    """{condition: (draws, N, D)} of evaluation batches: clean, the conditions of their backgrounds
    and, with `extra`, pasted (cut out and put back), object_only and background_only."""
    network.eval()
    embeddings = defaultdict(list)
    for photos, backgrounds, _ in tqdm(batches, "embedding", leave=False, disable=None):
        images, masks = unpack(photos)
        views = {"clean": [images]}
        for condition, draws in backgrounds.items():
            views[condition] = [replace_background(images, masks, as_backgrounds(drawn))
                                for drawn in draws]
        if extra:
            removed, paint = remove_object(images, masks), images.new_tensor(MEAN_COLOUR)
            views["pasted"] = [replace_background(images, masks, removed)]
            views["object_only"] = [replace_background(images, masks, paint.view(3, 1, 1))]
            views["background_only"] = [removed]
        for condition, versions in views.items():
            embedded = [network(network.normalise(version)) for version in versions]
            embeddings[condition].append(torch.stack(embedded))
    return {condition: torch.cat(parts, dim=1) for condition, parts in embeddings.items()}


def run_test(network, batches, args):
    """{condition: [metrics of each draw]}, the paper's clean and replaced (Section 4.3) among them.
    In `query`, only the query's background is replaced. `chance` uses random embeddings."""
    embeddings, labels = embed(network, loader(batches, args), extra=True), batches.labels.numpy()
    ks = RECALL_AT.get(args.dataset, (1, 2, 4, 8))
    rng = torch.Generator().manual_seed(0)
    embeddings["chance"] = torch.randn(DRAWS, len(labels), EMBEDDING, generator=rng)
    scores, clean = defaultdict(list), embeddings["clean"][0]
    for condition, draws in embeddings.items():
        for draw in draws:
            scores[condition].append(retrieval_metrics(draw, labels, ks))
    scores["query"] = [retrieval_metrics(draw, labels, ks, gallery=clean)
                       for draw in embeddings["replaced"]]
    return dict(scores)


# ==================================================================================================
# PART II: FROM FILES TO TABLES
# ==================================================================================================


# ---- 9. Datasets ---------------------------------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix. It is printed as one line, and the exit code is 2."""


Split = namedtuple("Split", "images masks labels")  # paths, paths, (N,) integers
NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # not decoded by Pillow itself
PHOTO_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items()
                  if name in Image.OPEN.keys() - NO_PHOTOS}  # all that the installed Pillow reads

# A dataset is recognised by one of these paths. Its root is the folder that contains the path.
PLACES = {"cars196": ("car_ims", "cars_train"), "cub200": ("CUB_200_2011/images",),
          "sop": ("Stanford_Online_Products/Ebay_train.txt",)}


def dataset_root(dataset, data):
    """The root of a named dataset in `data`, or the user's own folder. Raises UserError."""
    if dataset == "toy":
        return make_toy(Path(data, "toy"))
    if dataset in PLACES:
        for place in PLACES[dataset]:
            for found in (Path(data, place), *sorted(Path(data).glob(f"*/{place}"))):
                if found.exists():
                    return found.parent
        raise UserError(f"--data {data}: {' or '.join(PLACES[dataset])} is neither in it nor one "
                        "folder deeper; put it there (README, Reproduce the paper)")
    if not Path(dataset, "images").is_dir():
        raise UserError(f"--dataset {dataset}: it has no folder images/; give a folder that has "
                        f"one, or {', '.join(SPLITS)}")
    return Path(dataset)


def list_cars196(root):
    """[(path, label)] of car_ims/ + cars_annos.mat or of cars_train/, cars_test/ + devkit/."""
    from scipy.io import loadmat

    if (root / "car_ims").is_dir():
        files = [("cars_annos.mat", "", "relative_im_path")]
    else:
        test = "cars_test_annos_withlabels.mat"  # a separate download: beside devkit/ or in it
        test = test if (root / test).exists() else f"devkit/{test}"
        files = [("devkit/cars_train_annos.mat", "cars_train", "fname"),
                 (test, "cars_test", "fname")]
    listed = []
    for file, folder, field in files:
        rows = loadmat(str(root / file), simplify_cells=True)["annotations"]
        listed += [(root / folder / row[field], int(row["class"]) - 1) for row in rows]
    return listed


def list_sop(root):
    """[(path, label)] of Ebay_{train,test}.txt: image_id class_id super_class_id path."""
    lines = [line for name in ("Ebay_train.txt", "Ebay_test.txt")
             for line in (root / name).read_text().splitlines()[1:]]
    return [(root / path, int(label) - 1) for _, label, _, path in map(str.split, lines)]


def list_folder(root):
    """[(path, label)] of root/images/<class>/<photo>, sorted by name. Prints what it leaves out."""
    folders, labels = visible(root / "images"), {}
    for label, folder in enumerate(filter(list_photos, folders)):
        labels |= dict.fromkeys(list_photos(folder), label)
    found = itertools.chain(*(visible(path) or [path] for path in folders))
    left_out = Counter("folders without photos or inside classes" if path.is_dir() else
                       path.suffix.lower() or path.name for path in found if path not in labels)
    if left_out:
        print("left out:", ", ".join(f"{count} {what}" for what, count in left_out.items())
              + "; convert .heic to .jpg" * (".heic" in left_out))
    return list(labels.items())


def visible(folder):
    """The sorted paths in a folder, except hidden files; [] if it is missing or a file."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in paths if not path.name.startswith("."))


def list_photos(folder):
    """The sorted paths of the photos in a folder."""
    return [path for path in visible(folder)
            if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]


def list_backgrounds(args, name):
    """The sorted photos in --backgrounds/val or /test; [] if it is own. Raises UserError."""
    # DIFF: backgrounds are sorted by name, so that a seed fixes the draws.
    pool = list_photos(Path(args.backgrounds, name))
    of_paper = args.dataset in PLACES and "backgrounds" not in args.settings
    if (not pool and args.backgrounds != "own") or (of_paper and len(pool) != POOL_SIZE):
        raise UserError(f"--backgrounds {args.backgrounds}: {len(pool)} photos in {name}/"
                        f"{f' instead of {POOL_SIZE}' * of_paper}; put background photos into "
                        "its folders val/ and test/, or give --backgrounds own")
    return pool


def mask_path(root, image):
    """The mask of ROOT/images/a/b.jpg or ROOT/a/b.jpg is ROOT/masks/a/b.png."""
    folder = root / "images" if root / "images" in image.parents else root
    return Path(root, "masks", image.relative_to(folder)).with_suffix(".png")


def load_splits(dataset, data="data", *, need_masks=True, training=True):
    """{"train", "val", "test": Split} (Section 4.1). Without `training`, all classes of a folder
    are test classes. Without `need_masks`, masks may be missing, classes few. Raises UserError."""
    root = dataset_root(dataset, data)
    listed = {"cars196": list_cars196, "sop": list_sop}.get(dataset, list_folder)(root)
    images, labels = [path for path, _ in listed], np.array([label for _, label in listed], int)
    masks = [mask_path(root, image) for image in images]
    classes = len(np.unique(labels))  # a user's folder is split 74 : 24 : 98, like Cars196
    trained = training * max(2, round(classes * 74 / 196))
    seen = trained + training * max(2, round(classes * 24 / 196))
    ranges = {"train": range(trained), "val": range(trained, seen), "test": range(seen, classes)}
    splits = {}
    for name, chosen in SPLITS.get(dataset, ranges).items():
        rows = np.flatnonzero((labels >= chosen.start) & (labels < chosen.stop))
        splits[name] = Split([images[i] for i in rows], [masks[i] for i in rows], labels[rows])
    counts = len(images), len(splits["test"].images)
    if counts != COUNTS.get(dataset, counts):
        raise UserError(f"{root}: {counts[0]:,} images, {counts[1]:,} of them for testing, instead "
                        "of {:,} and {:,}; delete it and unpack it again".format(*COUNTS[dataset]))
    for name in splits if training else ("test",):
        photos = np.unique(splits[name].labels, return_counts=True)[1]  # photos per class
        if (need_masks or not images) and (len(photos) < 2 or photos.max() < 2):
            raise UserError(f"{root}: too few classes or photos for {name}; put photos into at "
                            f"least six folders {root}/images/<class>/ (two for --epochs 0)")
    mask, photos = Counter(masks).most_common(1)[0]
    if photos > 1:
        raise UserError(f"{mask}: two photos share this mask; rename one of them")
    missing = [path for path in images + masks * need_masks if not path.is_file()]
    if missing:
        where = f" --data {data}" if dataset in SPLITS else ""
        remedy = (f"unpack {root} again" if missing[0] in images else
                  f"run: python masks.py --dataset {dataset}{where}")
        raise UserError(f"{missing[0]}: missing (in total: {len(missing):,} files); {remedy}")
    return splits


# ---- 10. Photos ----------------------------------------------------------------------------------

THRESHOLD = 128  # a pixel of a mask is foreground from this value on, as in the paper

# A mask is suspicious if less than EMPTY or more than FULL is foreground, or more than FUZZY grey.
EMPTY, FULL, FUZZY = 0.01, 0.99, 0.15  # grey: 10 to 90 %


def open_image(path):
    """The decoded PIL image of a file, upright. Raises UserError."""
    # DIFF: images are turned upright as their EXIF tag says.
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises nearly anything
        raise UserError(f"{path}: not a readable image ({error}); replace it with a good copy of "
                        "the same name, and the same command resumes") from error


def open_rgb(path):
    """The photo as an upright 8-bit RGB PIL image. Transparency becomes white. Raises UserError."""
    image = open_image(path)
    if image.mode[0] in "IF":  # more than 8 bits or floats, which Pillow would clip at 255
        pixels = np.asarray(image, float)
        white = next((white for white in (1, 255) if pixels.max() <= white), 65535)
        image = Image.fromarray((pixels / (white / 255)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_mask(path):
    """The mask as an upright 8-bit greyscale PIL image, 255 = foreground. Grey RGB and 1-bit files
    are accepted too. Raises UserError for others, and for labels (a largest value of 1 to 127)."""
    mask = open_image(path)
    channels = mask.split()
    if mask.mode == "RGB" and channels[0] == channels[1] == channels[2]:
        mask = channels[0]
    if mask.mode not in ("1", "L") or 0 < mask.convert("L").getextrema()[1] < THRESHOLD:
        raise UserError(f"{path}: not a mask (mode {mask.mode}, largest value "
                        f"{mask.getextrema()[-1]}); save it as 8-bit greyscale, 255 = foreground")
    return mask.convert("L")


def open_pair(image, mask):
    """The photo and its mask, as open_rgb() and open_mask(). Raises UserError if sizes differ."""
    photo, opened = open_rgb(image), open_mask(mask)
    if photo.size != opened.size:
        raise UserError(f"{mask}: its size is {opened.size}, the photo's is {photo.size}; delete "
                        "the mask and run masks.py")
    return photo, opened


def mask_faults(mask):
    """(is nearly empty, is nearly full, is fuzzy, share of foreground) of a mask."""
    pixels = np.asarray(mask)
    share, grey = (pixels >= THRESHOLD).mean(), ((pixels > 25) & (pixels < 230)).mean()
    return share < EMPTY, share > FULL, grey > FUZZY, share


def check_masks(splits):
    """Prints statistics of a sample of the masks. Raises UserError if most are empty or full."""
    masks = [mask for split in splits.values() for mask in split.masks]
    sample = np.random.default_rng(0).permutation(len(masks))[:200]
    faults = np.array([mask_faults(open_mask(masks[i])) for i in sample])
    empty, full, fuzzy = faults[:, :3].sum(axis=0).astype(int)
    print(f"masks: {np.median(faults[:, 3]):.0%} foreground (median), {empty} of {len(sample)} "
          f"nearly empty, {full} nearly full, {fuzzy} fuzzy")
    if 2 * (empty + full) > len(sample):
        raise UserError("masks: most are empty or full; replace those that masks.py --verify lists")


class Photos(torch.utils.data.Dataset):
    """Item i: photo and mask in one (4, H, W) uint8 tensor, so that both get the same crops and
    flips; without masks, (3, H, W). It is resized for crops of `size` px. With `keep`, as many
    photos as fit in memory are decoded now. The rest are decoded on every access."""

    def __init__(self, images, masks, size, *, keep=True):
        self.images, self.masks = images, masks
        self.short_side = round(RESIZE * size)
        self.kept = []
        if not keep:
            return
        # DIFF: photos are resized once per run, not on every access.
        for photo in self.decode_all("decoding"):
            if free_memory() < 0.1:
                print(f"memory is short: {len(self.kept):,} of {len(self):,} photos are kept, the "
                      "rest are decoded on every access (--workers helps)")
                break
            self.kept.append(photo)

    def decode_all(self, title):
        """Yields all items in order. Threads decode them ahead, until the caller stops."""
        threads = ThreadPoolExecutor()
        try:
            decoded = threads.map(self.decode, range(len(self)))
            yield from tqdm(decoded, title, len(self), leave=False, disable=None)
        finally:
            threads.shutdown(cancel_futures=True)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.kept[i] if i < len(self.kept) else self.decode(i)

    def decode(self, i):
        image = self.images[i]
        planes = [open_rgb(image)] if self.masks is None else open_pair(image, self.masks[i])
        return torch.cat([TF.pil_to_tensor(TF.resize(plane, self.short_side)) for plane in planes])


def free_memory():
    """Fraction of memory available, of this machine or container or job; 1.0 if not Linux."""
    if sys.platform != "linux":
        return 1.0
    machine = dict(re.findall(r"(\w+): +(\d+)", Path("/proc/meminfo").read_text()))
    free = [int(machine["MemAvailable"]) / int(machine["MemTotal"])]
    groups = Path("/proc/self/cgroup").read_text()  # 0::/path (version 2) or N:memory:/path (1)
    for version1, path in re.findall(r"^\d+:(memory|):/(.*)", groups, re.M):
        group = Path("/sys/fs/cgroup", version1, path)
        names = ("limit_in_bytes", "usage_in_bytes") if version1 else ("max", "current")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such limit, or it is "max"
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                stat = dict(re.findall(r"(\w+) (\d+)", (folder / "memory.stat").read_text()))
                used -= int(stat.get("total_inactive_file", stat["inactive_file"]))  # file cache
                free.append(1 - used / limit)
    return min(free)


# ---- 11. Batches ---------------------------------------------------------------------------------


def seed_of(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def random_view(photo, size):
    """The training transform, RandomResizedCrop and flip: (., H, W) uint8 -> (., S, S) uint8."""
    # DIFF: crops are resized as uint8 tensors, not as PIL images; pixels differ by at most 1.
    box = torchvision.transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO)
    view = TF.resized_crop(photo, *box, [size, size], antialias=True)
    return TF.hflip(view) if torch.rand(()) < FLIP else view


class Batches(torch.utils.data.Dataset):
    """Item n: photos (B, 4, S, S), {condition: backgrounds (draws, B, 3 or 4, S, S)}, both uint8,
    and labels (B,). `draws` is {condition: backgrounds per photo}; see background(). With a
    sampler, item n is the n-th batch of the training, and its photos are cropped at random. Without
    one, items_per_pass items hold all photos in order, cropped at the centre, and the following
    items hold the same photos with other backgrounds."""

    def __init__(self, *, photos, labels, size, seed, pool=None, draws=None, sampler=None):
        self.photos, self.labels = photos, torch.as_tensor(labels)
        self.size, self.seed = size, seed
        self.pool, self.draws, self.sampler = pool, draws or {}, sampler
        self.items_per_pass = math.ceil(len(photos) / EVAL_BATCH)

    def plan(self, n):
        """[(index of a photo, seed of its random numbers)] of item n."""
        # DIFF: a batch depends only on the seed and its number, so a resumed run repeats no batch.
        if self.sampler:
            indices = self.sampler.batch((*self.seed, n))
            return [(index, (*self.seed, n, slot)) for slot, index in enumerate(indices)]
        epoch, item = divmod(n, self.items_per_pass)
        indices = range(len(self.photos))[item * EVAL_BATCH:(item + 1) * EVAL_BATCH]
        return [(index, (*self.seed, epoch, index)) for index in indices]

    def view(self, index):
        """Photo and mask, cropped: (4, S, S)."""
        photo = self.photos[index]
        return random_view(photo, self.size) if self.sampler else TF.center_crop(photo, self.size)

    def background(self, index, condition, others):
        """For `replaced`, a photo of the pool (3, S, S) with the training transform (Section 4).
        Else, or without a pool, one of `others` and its mask (4, S, S): for `same_class` of the
        same class, for all else of another one."""
        if condition == "replaced" and self.pool is not None:
            return random_view(self.pool[int(torch.randint(len(self.pool), ()))], self.size)
        of_class = self.labels[others] == self.labels[index]
        if condition == "same_class":  # once each: photos that share one would find each other
            seed = (*self.seed, int(self.labels[index]))
            order = np.random.default_rng(seed).permutation(others[of_class].numpy())
            return self.view(int(np.roll(order, 1)[order == index][0]))
        rows = others[~of_class]
        return self.view(int(rows[torch.randint(len(rows), ())]))

    def __getitem__(self, n):
        plan, photos, drawn = self.plan(n), [], defaultdict(list)
        indices = [index for index, _ in plan]
        others = torch.tensor(indices) if self.sampler else torch.arange(len(self.photos))
        for index, seed in plan:
            torch.default_generator.manual_seed(seed_of(*seed))  # torchvision's crops use it
            photo = self.view(index)
            if self.sampler and self.draws and self.pool is None and torch.rand(()) < 0.5:
                photo = photo.index_fill(0, torch.tensor(3), 255)  # half of the images stay clean
            photos.append(photo)
            for condition, draws in self.draws.items():
                chosen = [self.background(index, condition, others) for _ in range(draws)]
                drawn[condition].append(torch.stack(chosen))
        backgrounds = {condition: torch.stack(some, dim=1) for condition, some in drawn.items()}
        return torch.stack(photos), backgrounds, self.labels[indices]


def make_batches(args, split, purpose, draws, sampler=None):
    """The Batches of a Split. Photos that are needed only once are not kept in memory."""
    keep = purpose != TEST or "other_class" in draws
    photos = Photos(split.images, split.masks, args.image_size, keep=keep)
    paths = list_backgrounds(args, "test" if purpose == TEST else "val") if draws else []
    pool = Photos(paths, None, args.image_size) if paths else None
    return Batches(photos=photos, labels=split.labels, size=args.image_size, pool=pool,
                   seed=(args.seed, purpose), draws=draws, sampler=sampler)


def loader(batches, args, items=None):
    """Yields items of `batches`, on the device: `items`, or one evaluation pass if None."""
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # workers share decoded photos
    for photos, backgrounds, labels in torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=args.workers,
            sampler=range(batches.items_per_pass) if items is None else items,
            timeout=120 if args.workers else 0,  # seconds; a full /dev/shm would block forever
            multiprocessing_context="fork" if fork and args.workers else None,
            pin_memory=args.device.startswith("cuda")):
        photos, labels, *drawn = (tensor.to(args.device, non_blocking=True)
                                  for tensor in (photos, labels, *backgrounds.values()))
        yield photos, dict(zip(backgrounds, drawn)), labels


# ---- 12. Other networks --------------------------------------------------------------------------

BNINCEPTION_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"
TORCHVISION = torchvision.models.list_models(module=torchvision.models)  # its classifiers


def default_weights(name):
    """The default ImageNet weights of a torchvision network, which state its size and scaling."""
    return torchvision.models.get_model_weights(name).DEFAULT


def default_image_size(name, dataset):
    """The side of the crops without --image-size. A torchvision network has its own, whatever its
    weights are. Toy's photos are small, so on toy it is 48, or the smallest that the network takes
    if that is larger."""
    size = (TOY_DEFAULTS if dataset == "toy" else DEFAULTS)["image_size"]
    if name not in TORCHVISION:
        return size
    if dataset == "toy":
        return max(size, *default_weights(name).meta["min_size"])
    return default_weights(name).transforms().crop_size[0]


def build_backbone(name, weights):
    """The network without its classifier: (B, 3, H, W) -> (B, features). `weights` is imagenet, own
    (what FOLDER:NAME returns), none (random) or a file; see read_weights(). Raises UserError."""
    try:
        network = build_network(name, weights)
    except URLError as error:
        raise UserError(f"--backbone {name}: the download failed ({error}); try again, or give a "
                        "file that you have with --weights FILE") from error
    removed = ("last_linear",) if name == "bninception" else ()
    if name in TORCHVISION:
        removed = remove_classifiers(network)
    if is_file(weights):
        state, _ = read_weights(weights)
        fit_weights(network, state, removed, weights)
    return network


def build_network(name, weights):
    """The network of this name, with ImageNet weights, with its own, or else with random ones."""
    if ":" in name and weights != "imagenet":
        return load_hub(name, weights)
    if name == "smallconv" and weights != "imagenet":
        return smallconv()
    if name == "bninception":
        network = BNInception()
        if weights == "imagenet":
            state = torch.hub.load_state_dict_from_url(BNINCEPTION_URL, check_hash=True)
            fit_weights(network, state, ("last_linear",), weights)
        return network
    if name in TORCHVISION:
        if weights == "imagenet":
            return torchvision.models.get_model(name, weights=default_weights(name))
        options = {}
        if name.startswith("vit_"):  # otherwise vit_h_14 would be built for 224 px, not for 518
            options["image_size"] = default_weights(name).meta["min_size"][0]
        return torchvision.models.get_model(name, weights=None, **options)
    raise UserError(f"--backbone {name}: unknown, or not available with --weights {weights}; give "
                    "bninception, smallconv, a torchvision classifier, or FOLDER:NAME")


def remove_classifiers(network):
    """Replaces the last layer with 1000 outputs of a torchvision network by nn.Identity(), removes
    auxiliary classifiers, and returns the paths of both."""
    removed = [name for name in ("aux1", "aux2", "AuxLogits") if hasattr(network, name)]
    for name in removed:  # of GoogLeNet and Inception v3, which need larger images in training
        setattr(network, name, None)
    # Otherwise these two return auxiliary outputs, and do not scale their input.
    network.aux_logits, network.transform_input = False, True
    classifiers = [path for path, layer in network.named_modules() if 1000 in
                   (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))]
    parent, _, classifier = classifiers[-1].rpartition(".")
    setattr(network.get_submodule(parent), classifier, nn.Identity())
    return (*removed, classifiers[-1])


def load_hub(name, weights):
    """What NAME() in the hubconf.py of FOLDER returns, for the name FOLDER:NAME."""
    folder, _, entry = name.rpartition(":")
    network = torch.hub.load(folder, entry, source="local")
    if not isinstance(network, nn.Module):
        raise UserError(f"--backbone {name}: {entry}() returns a {type(network).__name__}; wrap it "
                        "in a torch.nn.Module (README, Your own model)")
    network = getattr(network, "_orig_mod", network)  # without torch.compile()
    network = network.cpu().float()
    if weights == "none":
        randomise(network)
    return network


@torch.no_grad()
def randomise(network):
    """Makes every parameter random: by the reset_parameters() of its module or, if there is none,
    as for class tokens, by a random order of its values. Those keep their distribution."""
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in network.named_parameters():
        if torch.equal(parameter, before[name]):
            order = torch.randperm(parameter.numel())
            parameter.copy_(before[name].flatten()[order].view_as(parameter))


def is_file(weights):
    """Whether --weights is a file."""
    return weights not in ("imagenet", "own", "none")


def read_weights(file):
    """({name: tensor} of the network, None) from a file with a state dict or {"state_dict": ...}.
    For a run's best.pt, the second is {name: tensor} of its linear layer. Raises UserError."""
    if not Path(file).is_file():
        raise UserError(f"--weights {file}: no such file; give imagenet, none or a file")
    try:
        if Path(file).suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"--weights {file}: cannot be read; pip install safetensors") from error
    except Exception as error:  # torch.load raises nearly anything
        raise UserError(f"--weights {file}: not a file of weights ({type(error).__name__}); save "
                        "a network's state_dict() with torch.save()") from error
    if isinstance(content, dict) and {"network", "history"} <= content.keys():  # of State.save()
        return below("backbone.", content["network"]), below("head.", content["network"])
    for key in ("state_dict", "model"):  # of PyTorch Lightning, and of torchvision's own scripts
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(map(torch.is_tensor, content.values())):
        raise UserError(f"--weights {file}: it holds no state dict; save a network's state_dict() "
                        "with torch.save()")
    return content, None


def below(prefix, state):
    """The entries of a state dict whose names have this prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items()
            if name.startswith(prefix)}


def fit_weights(network, state, removed, weights):
    """Loads a state dict, except what belongs to the removed classifiers. If it does not fit, it
    loads nothing and raises a UserError that names the first tensor."""
    own, given = network.state_dict(), {}
    for name, value in state.items():
        if name not in own:  # these prefixes come from DataParallel and torch.compile()
            name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        if not name.startswith(tuple(f"{path}." for path in removed)):
            given[name] = value
    for name in own | given:
        ours, theirs = shape_of(name, own), shape_of(name, given)
        if theirs == "missing" and name.endswith("num_batches_tracked"):
            continue  # files of old PyTorch versions lack it, and nothing uses it
        if ours != theirs:
            raise UserError(f"--weights {weights}: {name} does not fit (in the file: {theirs}, in "
                            f"the network: {ours}); give weights of this --backbone")
    own.update(given)  # unlike many files, `own` knows the versions of its modules
    network.load_state_dict(own)


def shape_of(name, state):
    """The shape of an entry of a state dict as a list, or the word missing."""
    return list(getattr(state[name], "shape", ())) if name in state else "missing"


def load_head(head, weights):
    """Loads the linear layer of a run from its best.pt if it has the size of ours. Says so."""
    saved = read_weights(weights)[1] if is_file(weights) else None
    if saved is None:
        return
    if not saved:
        print(f"--weights {weights}: the backbone of a run, which has no linear layer")
    elif isinstance(head, nn.Linear) and saved["weight"].shape == head.weight.shape:
        head.load_state_dict(saved)
        print(f"--weights {weights}: the backbone and the linear layer of a run")
    else:
        print(f"--weights {weights}: the backbone of a run, without its linear layer, whose size "
              f"is {len(saved['bias'])}")


def input_scaling(name, network):
    """The network input: the order of the channels, and the mean and standard deviation of pixels
    in [0, 255]. They are ImageNet's unless the network, or torchvision for it, states others."""
    if name == "bninception":
        return BGR_CAFFE
    order, mean, std = RGB_IMAGENET
    if name in TORCHVISION:
        transforms = default_weights(name).transforms()
        mean = [255 * value for value in transforms.mean]
        std = [255 * value for value in transforms.std]
    if ":" in name:
        mean = stated_scaling(name, network, "mean") or mean
        std = stated_scaling(name, network, "std") or std
    return order, mean, std


def stated_scaling(name, network, attribute):
    """The attribute `mean` or `std` of a network from a folder, or else that of timm's
    `pretrained_cfg`, for pixels in [0, 255]; None if neither is stated. Raises UserError."""
    config = getattr(network, "pretrained_cfg", None)
    from_timm = config.get(attribute) if isinstance(config, dict) else None
    values = three_numbers(getattr(network, attribute, None)) or three_numbers(from_timm)
    if not values:
        return None
    if max(values) > 1:
        raise UserError(f"--backbone {name}: its {attribute} exceeds 1; divide it by 255")
    if attribute == "std" and min(values) <= 0:
        raise UserError(f"--backbone {name}: its std is not above 0; give the standard deviation "
                        "of pixels in [0, 1]")
    return [255 * value for value in values]


def three_numbers(value):
    """One number, or three in any shape, as a list of three; None for all else, as for a method."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        return None
    if len(numbers) == 1:
        return 3 * numbers
    return numbers if len(numbers) == 3 else None


@torch.no_grad()
def count_features(name, network, size):
    """The number of features of an Embedder's backbone. Raises UserError if it does not give
    (B, features), or if the features of an image depend on its batch, as in training mode."""
    buffers = {key: buffer.clone() for key, buffer in network.named_buffers()}
    pixels = 255 * torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = network.normalise(pixels)
    with torch.random.fork_rng(devices=[]):  # dropout in training mode draws random numbers
        alone = compute_features(name, network, images[:1])
        together = compute_features(name, network, images)
    for key, buffer in network.named_buffers():  # running statistics in training mode have moved
        if key in buffers and buffer.shape == buffers[key].shape:
            buffer.copy_(buffers[key])
    change = float((together[0] - alone[0]).norm() / alone[0].norm().clamp(min=1e-30))
    if change > 0.01:
        raise UserError(f"--backbone {name}: the features of an image change by {change:.0%} of "
                        "their length if it is in a batch of three; let eval() reach all dropout "
                        "and BatchNorm (modules in a plain list are not registered)")
    return alone.shape[1]


def compute_features(name, network, images):
    """The features of a few images, in float32. Raises UserError if they are not (B, features)."""
    count, size = len(images), images.shape[-1]
    try:
        features = network.backbone(images)
    except Exception as error:  # the network of a user raises nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if name in TORCHVISION:
            right = default_weights(name).transforms().crop_size[0]
            raise UserError(f"--image-size {size}: {name} cannot take it ({reason}); give "
                            f"--image-size {right}") from error
        remedy = ("give an --image-size at which it takes a single image" if count == 1 else
                  "export it for any number of images")
        raise UserError(f"--backbone {name}: it fails on a batch of {count} at {size} px "
                        f"({reason}); {remedy}") from error
    if not torch.is_tensor(features) or features.ndim != 2 or len(features) != count:
        raise UserError(f"--backbone {name}: its output for a batch of {count} is "
                        f"{getattr(features, 'shape', type(features))}; return one tensor of shape "
                        "(images, features)")
    return features.float()


def has_gradient(network, size):
    """Whether PyTorch can differentiate an Embedder's features with respect to its input or, if
    they require a gradient, its weights."""
    images = torch.zeros(1, 3, size, size, device=network.mean.device, requires_grad=True)
    try:
        return network.backbone(images.clone()).requires_grad
    except RuntimeError:  # numpy() refuses a tensor that requires a gradient
        return False


def check_trainable(args, network):
    """Raises UserError if an Embedder can be measured, but not trained."""
    if not has_gradient(network, args.image_size):
        raise UserError(f"--backbone {args.backbone}: its features have no gradient, so it cannot "
                        "be trained; add --epochs 0")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"--backbone {args.backbone}: no parameter requires a gradient; leave out "
                        "--embedding 0 to train a linear layer on top")


def saved_result(run):
    """The content of a finished run's result.json. Raises UserError if there is none."""
    file = Path(run, "result.json")
    if not file.is_file():
        raise UserError(f"{run}: not a finished run; give a folder with a result.json")
    return json.loads(file.read_text())


def load_embedder(run, args):
    """The Embedder of a run's best epoch, in eval mode. Without gradients of its weights, the
    gradients of its input need less memory."""
    network = Embedder(args.backbone, "none", args.image_size, args.embedding)
    saved = torch.load(Path(run, "best.pt"), map_location="cpu", weights_only=True)
    network.load_state_dict(saved["network"])
    return network.eval().requires_grad_(requires_grad=False)


class PixelEmbedder(nn.Module):
    """An Embedder that scales its input: (B, 3, S, S) RGB in [0, 255] -> (B, D) of unit length. So
    nobody can feed an exported file wrongly."""

    def __init__(self, embedder):
        super().__init__()
        self.embedder = embedder

    def forward(self, images):
        return self.embedder(self.embedder.normalise(images.float()))


def load_network(run, device="cpu"):
    """(network, preprocess) of a finished run, for use in other programs. preprocess(path) gives a
    photo (3, S, S) uint8, upright, resized and cropped as in the test. network is a PixelEmbedder
    in eval mode. Raises UserError if the run is not finished."""
    args = argparse.Namespace(**saved_result(run)["args"])

    def preprocess(path):
        photo = Photos([path], None, args.image_size, keep=False)[0]
        return TF.center_crop(photo, args.image_size)

    network = PixelEmbedder(load_embedder(run, args))
    return network.eval().to(device), preprocess


# ---- 13. Toy -------------------------------------------------------------------------------------


def smallconv():
    """Four 3x3 convolution blocks for the toy set: (B, 3, H, W) -> (B, 128)."""
    layers = []
    for width, out in itertools.pairwise((3, 16, 32, 64, 128)):
        layers += [conv(width, out, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveMaxPool2d(1), nn.Flatten())


# Toy is a user's folder. A class is the product of one seller, who has a favourite backdrop.


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
    """Yields (photo, mask) pairs of one class, as PIL images: a symmetric 5 x 5 grid of two colours
    in random size, pose and light, on the seller's backdrop with probability `share`."""
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


def draw_toy(root, seed):
    """Saves all pictures of the toy set in the folder `root`."""
    pictures = {}
    for label in range(SPLITS["toy"]["test"].stop):
        for i, (photo, mask) in enumerate(toy_class(np.random.default_rng([seed, label]))):
            pictures[f"images/{label:03d}/{i:02d}.png"] = photo
            pictures[f"masks/{label:03d}/{i:02d}.png"] = mask
    for number, name in enumerate(("val", "test")):
        for i in range(POOL_SIZE):
            pictures[f"backgrounds/{name}/{i:02d}.png"] = toy_texture([seed, number, i, 1], 80)
    for path, picture in pictures.items():
        Path(root, path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(Path(root, path))


def make_toy(root, seed=2022):
    """Draws the toy set in the folder `root`, unless it exists, and returns `root`. The set is the
    same every time; drawing it takes 10 s. The folder is renamed into place when complete."""
    if not root.exists():
        try:
            write(root, lambda draft: draw_toy(draft, seed))
        except OSError:
            if not root.exists():  # otherwise another process was faster
                raise
    return root


# ---- 14. Tables ----------------------------------------------------------------------------------

# The paper's results are five numbers for base, then five for BGAugment: test MAP@R in % on clean
# photos; MAP@R with replaced backgrounds and its standard deviation over the draws; the attention
# score and its standard deviation over the images.
PAPER = {tuple(row[:2]): [*map(float, row[2:])] for row in map(str.split, """
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
""".strip().splitlines())}

COLUMNS = ("clean", "replaced", "query", "object only", "background only", "lost %", "R@1 clean",
           "R@1 replaced", "attention")

# The conditions on the way from clean to replaced, and what the step to each of them costs.
STEPS = {"pasted": "cutting and pasting costs", "same class": "another background",
         "other class": "losing what the background tells about the class",
         "replaced": "foreign backgrounds"}
STEP_COLUMNS = ("clean", *STEPS, *(f"R@1 {step}" for step in STEPS))
NOTES = """MAP@R and R@1 (Recall@1) are in %. *lost %* is the fall from clean to replaced, in % of
clean, unless clean is below twice chance. Numbers after ± are standard deviations: over the seeds
or, with one seed, over the draws of backgrounds (for attention: over the images)."""


def read_result(run):
    """The content of a finished run's result.json, and `columns`: {column: values in %, one per
    draw}. The column attention holds one score per image, not in %."""
    result = json.loads((run / "result.json").read_text())
    columns = {}
    for condition, draws in result["test"].items():
        name = condition.replace("_", " ")
        columns[name] = [100 * draw["map@r"] for draw in draws]
        columns[f"R@1 {name}"] = [100 * draw["recall@1"] for draw in draws]
    clean, replaced, chance = (np.mean(columns[name]) for name in ("clean", "replaced", "chance"))
    columns["lost %"] = [100 * (1 - replaced / clean) if clean > 2 * chance else math.nan]
    if (run / "attention.npz").exists():
        scores = np.load(run / "attention.npz")["score"]
        if np.isfinite(scores).any():
            columns["attention"] = scores[np.isfinite(scores)]
    return {**result, "columns": columns}


def row_name(result):
    """The name of a row, such as: contrastive + BGAugment, lr 0.001."""
    args = result["args"]
    name = args["loss"] if args["epochs"] else "not trained"
    hparams = HPARAMS.get(args["dataset"], HPARAMS["cars196"]).get(args["loss"], {})
    edited = {key: args["hparams"].get(key) for key in sorted(args["hparams"] | hparams)
              if args["epochs"] and args["hparams"].get(key) != hparams.get(key)}
    settings = [f"{key.replace('_', ' ')} {value}"
                for key, value in (args["settings"] | edited).items()]
    name = ", ".join([f"{name} + BGAugment" if args["bgaugment"] else name, *settings])
    return name.replace("backgrounds own", "own backgrounds")


def mean_and_std(values):
    """The mean and, for several values, the sample standard deviation (ddof 1), as text."""
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def table_row(name, results, columns):
    """The row {column: text} of results that differ only in the seed."""
    row = {"": name, "seeds": str(len(results))}
    for column in columns:
        values = [result["columns"][column] for result in results if column in result["columns"]]
        if len(values) == len(results):  # otherwise some seeds have no attention score
            row[column] = mean_and_std(values[0] if len(values) == 1 else [*map(np.mean, values)])
    if "nan" in row.get("lost %", ""):
        row["lost %"] = "hardly better than chance"
    return row


def paper_row(args):
    """The row of the paper's result for the same dataset, loss and variant, if there is one."""
    numbers = PAPER.get((args["dataset"], args["loss"]))
    if not numbers or not args["epochs"]:
        return []
    clean, replaced, draws, attention, images = numbers[5:] if args["bgaugment"] else numbers[:5]
    return [{"": "  paper", "clean": f"{clean:.2f}", "replaced": f"{replaced:.2f} ± {draws:.2f}",
             "lost %": f"{100 * (clean - replaced) / clean:.2f}",
             "attention": f"{attention:.2f} ± {images:.2f}"}]


def as_table(rows):
    """Rows {column: text} as an aligned Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns]
    for row in rows:
        lines.append([row.get(column, "") for column in columns])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def explain_loss(result):
    """Two lines: MAP@R from clean to replaced (own: to other class), and what each step costs."""
    names = ("clean", *STEPS)[:4 if result["args"]["backgrounds"] == "own" else 5]
    means = [np.mean(result["columns"][name]) for name in names]
    path = " → ".join(f"{name} {mean:.1f}" for name, mean in zip(names, means))
    costs = ", ".join(f"{what} {round(before - after, 1) + 0:.1f}"  # + 0 turns -0.0 into 0.0
                      for what, before, after in zip(STEPS.values(), means, means[1:]))
    hint = " Pasting costs over a tenth: check the masks." if means[1] < 0.9 * means[0] else ""
    return f"What the loss is made of (MAP@R in %): {path}\nOf {means[0]:.1f}, {costs}.{hint}"


def report(folder, of=None):
    """Markdown tables of all finished runs in `folder` beside the paper's (Sections 4.3 and 5), two
    per test set; with `of`, only that run's. Raises UserError if there is no finished run."""
    tables = defaultdict(lambda: defaultdict(dict))  # {heading: {row: {seed: result}}}
    for run in sorted(file.parent for file in folder.glob("*/result.json")):
        result = read_result(run)
        tables[result["tested"]][row_name(result)][result["args"]["seed"]] = result
    if not tables:
        raise UserError(f"--report {folder}: it contains no finished run; train one first")
    parts, of = [], read_result(of) if of else None
    for heading in [of["tested"]] if of else tables:
        rows, steps = [], []
        for name, seeds in tables[heading].items():
            results = list(seeds.values())
            rows += [table_row(name, results, COLUMNS), *paper_row(results[0]["args"])]
            steps.append(table_row(name, results, STEP_COLUMNS))
        parts += [f"## {heading}", as_table(rows)]
        parts += [explain_loss(of)] if of else ["What the loss is made of:", as_table(steps)]
    return "\n\n".join(parts)


# ---- 15. Command line ----------------------------------------------------------------------------


def write(path, save):
    """Calls save(temporary path) and renames the result to `path`, so `path` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        save(draft)
        draft.replace(path)


def write_text(path, text):
    write(path, lambda draft: draft.write_text(text, "utf-8", "backslashreplace"))


# These flags do not change what a run computes, or they have their own place in the run's name.
NO_SETTINGS = {"dataset", "loss", "bgaugment", "seed", "data", "runs", "device", "workers",
               "report"}


def parse_args(argv=None):
    """The arguments, `settings` (those that are not default), `hparams` and the dataset's name."""
    parser = argparse.ArgumentParser(
        description="Train an image retrieval model and measure its background bias.",
        epilog=f"Defaults are in brackets. They are the paper's, except for toy: {TOY_DEFAULTS}")
    add, default = parser.add_argument, " [%(default)s]"
    add("--dataset", default="toy", help="toy [default], cars196, cub200, sop or FOLDER")
    add("--loss", choices=LOSSES, default="contrastive", help="training loss" + default)
    add("--bgaugment", action="store_true", help="replace backgrounds of training images")
    add("--data", default="data", help="folder that holds the named datasets" + default)
    add("--backgrounds", type=os.path.normpath, help="folder with val/ and test/, or own: those of "
        "photos of other classes [DATA/unsplash_backgrounds, or FOLDER/backgrounds, else own]")
    add("--runs", default="runs", help="folder that holds the run folders" + default)
    add("--seed", type=int, default=42, help="seed of all random numbers" + default)
    add("--epochs", type=int, help="largest number of epochs; 0: no training" + default)
    add("--iterations", type=int, help="batches per epoch" + default)
    add("--patience", type=int, default=15, help="epochs without improvement, then stop" + default)
    add("--batch-size", type=int, default=32, help="images per batch" + default)
    add("--lr", type=float, help="learning rate of the network" + default)
    add("--backbone", help="bninception, smallconv, a torchvision classifier, or FOLDER:NAME, "
        "which calls NAME() in FOLDER/hubconf.py" + default)
    add("--weights", help="imagenet, own (of FOLDER:NAME), none (random) or FILE" + default)
    add("--embedding", type=int, default=EMBEDDING, help="size; 0: no linear layer" + default)
    add("--image-size", type=int, help="side of the crops in px" + default)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps" + default)
    add("--workers", type=int, help="processes that prepare batches [up to 8 with CUDA, else 0]")
    add("--select", choices=("clean", "replaced"), help="validation score that selects the best "
        "epoch [replaced with --bgaugment, else clean]")
    add("--report", metavar="RUNS", help="print all tables of RUNS, and write RUNS/report.md")
    parser.set_defaults(**DEFAULTS)  # the help shows these
    known, _ = parser.parse_known_args(argv)
    pools = dict.fromkeys(PLACES, Path(known.data, "unsplash_backgrounds"))
    pools["toy"] = Path(known.data, "toy/backgrounds")
    parser.set_defaults(
        **TOY_DEFAULTS if known.dataset == "toy" else DEFAULTS,
        backgrounds=str(pools.get(known.dataset, Path(known.dataset, "backgrounds"))),
        select="replaced" if known.bgaugment else "clean")
    parser.set_defaults(image_size=default_image_size(known.backbone, known.dataset))
    if ":" in known.backbone:
        parser.set_defaults(weights="own")
    args = parser.parse_args(argv)
    if not (known.backgrounds or args.bgaugment or args.dataset in SPLITS
            or Path(args.backgrounds).is_dir()):
        args.backgrounds = "own"  # without BGAugment, no pool is needed
    excluded = NO_SETTINGS if args.epochs else NO_SETTINGS | {"epochs"}
    args.settings = {name: value for name, value in vars(args).items()
                     if name not in excluded and value != parser.get_default(name)}
    args.hparams = HPARAMS.get(args.dataset, HPARAMS["cars196"])[args.loss]
    args.name = os.path.basename(os.path.abspath(args.dataset))
    return args


def choose_device(args):
    """Sets --device and --workers to what this machine has, unless the user gave them."""
    if args.device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        args.device = "cuda" if torch.cuda.is_available() else mps
    cuda = torch.device(args.device).type == "cuda"
    if cuda:  # the data loader pins memory for the current device
        torch.cuda.set_device(torch.empty(0, device=args.device).device)
    if args.workers is None:
        args.workers = min(8, len(os.sched_getaffinity(0))) if cuda else 0


def run_folder(args):
    """RUNS/<dataset>-<loss>-<base|bgaugment>-s<seed>, then the settings in the parser's order."""
    parts = [args.name, args.loss if args.epochs else "untrained",
             "bgaugment" if args.bgaugment else "base", f"s{args.seed}"]
    parts += [f"{key}_{value}" for key, value in args.settings.items()]
    name = os.fsencode(re.sub(r'[\s/\\:*?"<>|]', "-", "-".join(parts)))
    if len(name) > 200:  # file systems allow 255 bytes
        name = name[:180] + b"-%08x" % zlib.crc32(name)
    return Path(args.runs, os.fsdecode(name))


def fingerprint(args, splits):
    """A checksum over the names and sizes of all photos, masks and backgrounds."""
    lists = [paths for split in splits.values() for paths in (split.images, split.masks)]
    lists += [list_photos(Path(args.backgrounds, name)) for name in ("val", "test")]
    lines = [f"{path.parent.name}/{path.name} {path.stat().st_size}\n"
             for path in itertools.chain(*lists)]
    return f"{zlib.crc32(os.fsencode(''.join(lines))):08x}"


def check_config(run, config):
    """Raises UserError if the run was begun with other settings, hyper-parameters or data."""
    before, now = ({**c["args"], "fingerprint of the data": c["fingerprint"]}
                   for c in (json.loads((run / "config.json").read_text()), config))
    for key in sorted(before.keys() & now.keys() - NO_SETTINGS - {"backgrounds"}):
        if before[key] != now[key]:
            raise UserError(f"{run}: its {key} was {before[key]}, not {now[key]}; restore it, or "
                            "give a new folder with --runs")


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        text = f"# Background bias, measured\n\n{NOTES}\n\n{report(Path(args.report))}\n"
        write_text(Path(args.report, "report.md"), text)
        return print(text)
    choose_device(args)
    splits = load_splits(args.dataset, args.data, training=args.epochs > 0)
    for name in ("val", "test") if args.epochs else ("test",):
        list_backgrounds(args, name)
    run, cuda = run_folder(args), args.device.startswith("cuda")
    config = {"args": vars(args), "fingerprint": fingerprint(args, splits),
              "distance": DISTANCES[args.loss].__name__,
              "device": torch.cuda.get_device_name(args.device) if cuda else args.device,
              **{module.__name__: module.__version__ for module in (torch, torchvision, np)}}
    done, resumed = (args.epochs and (run / name).exists() for name in ("result.json", "last.pt"))
    if done or resumed:
        check_config(run, config)
    if done:
        print(f"{run} is finished; delete its result.json to test it again")
        return print(f"\n{report(run.parent, of=run)}\n\n{NOTES}")
    check_masks(splits)
    images, masks, labels = splits["test"]
    if args.epochs:  # otherwise a damaged test photo would be found only after the training
        for _ in Photos(images, masks, args.image_size, keep=False).decode_all("checking"):
            pass
    # A resumed run loads its weights from last.pt, so we need no download.
    state = State(args, len(np.unique(splits["train"].labels)), "none" if resumed else args.weights)
    network = state.network
    if args.epochs:
        check_trainable(args, network)
    if resumed:
        state.load(run / "last.pt")
    else:
        (run / "attention.npz").unlink(missing_ok=True)  # scores of an earlier network
        write_text(run / "config.json", json.dumps(config, indent=2))
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    mean, std = (buffer.flatten().round().tolist() for buffer in (network.mean, network.std))
    print(f"{run}: {args.backbone}, {network.features:,} features, {parameters:,} trainable "
          f"parameters, (pixel - {mean}) / {std}, {args.image_size} px, backgrounds: "
          f"{args.backgrounds}, {args.device}"
          + f", resumed after epoch {len(state.history)}" * bool(resumed), flush=True)
    if not state.is_finished:
        train(args, splits, state, run)
    elif not args.epochs:
        state.save(run / "best.pt", optimiser=False)
    result = {**config, "epochs": len(state.history), "best_epoch": state.best_epoch,
              "seconds": sum(row["seconds"] for row in state.history)}
    state.load(run / "best.pt")  # its history ends with the best epoch
    test_batches = make_batches(args, splits["test"], TEST, TEST_DRAWS)
    result["test"] = run_test(state.network, test_batches, args)
    chance = 100 * np.mean([draw["map@r"] for draw in result["test"]["chance"]])
    result["tested"] = (f"{args.name}: {len(np.unique(labels))} test classes, {len(labels):,} "
                        f"photos, chance {chance:.2g} %, data {config['fingerprint']}")
    write_text(run / "result.json", json.dumps(result, indent=2))
    print(f"\n{report(run.parent, of=run)}\n\n{NOTES}")


def command(main):
    """Runs a script's main(). A UserError ends in one line on stderr and exit code 2."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout has no reconfigure()
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        reason = str(error).split("UserError: ")[-1].strip()  # without a worker's traceback
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(main)
