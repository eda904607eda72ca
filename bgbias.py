"""Does an image retrieval model look at the object or at the background? This script trains a
model, replaces the backgrounds of its test photos, and measures how far retrieval drops. It
implements Kobs & Hotho, "On Background Bias in Deep Metric Learning" (ICMV 2022, arXiv:2210.01615).

    python bgbias.py                                # toy data, contrastive loss, a few minutes
    python bgbias.py --dataset cars196 --loss contrastive --bgaugment     # a run of the paper
    python bgbias.py --dataset my_photos --measure  # no training; my_photos/images/<class>/
    python bgbias.py --report runs                  # all runs in one table, beside the paper's

Part I is the paper. Read it from top to bottom. Part II brings photos in and numbers out.

The defaults are the paper's settings, except for the toy set, which has its own. Each run has one
folder: RUNS/<dataset>-<loss>-<variant>-s<seed>, followed by every setting that is not the default.
The variants are base (backgrounds stay), bgaugment (backgrounds of a pool, the paper's BGAugment)
and own (backgrounds of other training photos). A run writes result.json last. The same command
resumes an interrupted run.

Shapes: B batch, D embedding (128), C classes, N photos, Q queries, H W height and width, S crop.
Every mask is soft: (B, 1, H, W) in [0, 1], where 1 = foreground.
§ marks a section of the paper, and DIFF a difference from the authors' code (README).
"""

import argparse
import contextlib
import csv
import errno
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
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

# A class is in one split only, so the test asks for objects of classes that the network has never
# seen (§4.1). About half of the classes are for the test; of the others, three quarters are
# for training. Labels are the numbers of the classes, counted from 0. The toy set is ours.
SPLITS = {
    "cars196": {"train": range(0, 74), "val": range(74, 98), "test": range(98, 196)},
    "cub200": {"train": range(0, 75), "val": range(75, 100), "test": range(100, 200)},
    "sop": {"train": range(0, 8489), "val": range(8489, 11318), "test": range(11318, 22634)},
    "toy": {"train": range(0, 100), "val": range(100, 120), "test": range(120, 170)},
}
POOL_SIZE = 100  # background photos for training and validation, and as many others for the test

# Settings of all runs of the paper (§4).
DEFAULTS = dict(epochs=1000, iterations=100, patience=15, batch_size=32, lr=1e-6,
                backbone="bninception", weights="imagenet", embedding=128, image_size=227)
RMSPROP = dict(weight_decay=1e-4, momentum=0.9, alpha=0.99, eps=1e-8)
# The toy set is small, and its network starts from random weights.
TOY_DEFAULTS = dict(epochs=15, iterations=50, lr=5e-5, backbone="smallconv", weights="none",
                    image_size=48)

# The paper resizes the short side of a photo to 256 px and crops 227 px. We keep this ratio at
# other crop sizes, so that they see the same part of a photo.
RESIZE = 256 / 227
# The training transform (§4) crops a random region, mirrors it with probability FLIP, and
# resizes it. The region's share of the photo's area and its aspect ratio lie in these ranges. The
# test crops the centre.
CROP_SCALE = (0.16, 1.0)
CROP_RATIO = (0.75, 1.33)
FLIP = 0.5

# The test on random backgrounds is repeated this many times, with new backgrounds (§4.3).
DRAWS = 5
# The K of Recall@K. Larger ones are customary for SOP, because its gallery is large.
RECALL_AT = {"sop": (1, 10, 100, 1000)}
RECALL_AT_DEFAULT = (1, 2, 4, 8)
EVAL_BATCH = 32  # photos per batch in validation and test; the size does not change the results

# Each photo, batch and step has a seed of its own. It is made of the run's seed, a number for the
# purpose (below), and the numbers of the batch and the photo. So nothing depends on earlier
# batches, and a resumed run needs no saved random state.
INIT_SEED = 0  # the initial weights
TRAIN_SEED = 1  # training batches
VAL_SEED = 2  # backgrounds of the validation
TEST_SEED = 3  # backgrounds of the test
STEP_SEED = 4  # what a training step draws itself, such as dropout

# Hyper-parameters of the losses: the optima of "A Metric Learning Reality Check" (Musgrave et al.
# 2020), which the paper uses. Three odd values are correct: alpha and the negative pos_margin of
# cub200, and lr_loss of arcface on cars196. Arcface's margin is in degrees. A user's own folder is
# split like cars196, and takes its values. A loss without an entry takes its function's defaults.
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
        # The negative pos_margin is correct. d - pos_margin is then positive for every pair, so the
        # loss averages over all positive pairs.
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


def unpack(photos):
    """(B, 4, S, S) uint8 -> images (B, 3, S, S) in [0, 255], masks (B, 1, S, S) in [0, 1]"""
    return photos[:, :3].float(), photos[:, 3:].float() / 255


def replace_background(images, masks, backgrounds):
    """Keeps the foreground of the images and takes the rest from the backgrounds: (B, 3, H, W),
    (B, 1, H, W) in [0, 1] with 1 = foreground, (B, 3, H, W) -> (B, 3, H, W)."""
    return images * masks + backgrounds * (1 - masks)


# Which background does a photo get? The next functions decide it. The lender is the photo that
# gives its background to another photo.
#
#   used in                         decided by              the background of
#   training, --bgaugment           draw_background         a photo of the pool
#   training, --bgaugment own       draw_training_lender    a photo of another class in the batch
#   test, replaced                  draw_background         a photo of the pool
#   test, same_class, any_class     draw_test_lenders       another test photo
#
# TrainingBatches and EvaluationBatches (Part II) call them. train() and replaced_views() paste.


def draw_background(pool):
    """The paper's way: a random photo of the pool, (3, H, W). Several photos may draw the same one.
    It uses torch's generator, which the caller has seeded for this photo."""
    return pool[int(torch.randint(len(pool), ()))]


def draw_training_lender(labels, k):
    """The lender of photo k of a training batch: a random photo of another class in this batch.
    (B,) labels -> an index. It uses torch's generator, which the caller has seeded for photo k."""
    candidates = (labels != labels[k]).nonzero()[:, 0]
    return int(candidates[torch.randint(len(candidates), ())])


def split_by_group(groups):
    """(N,) groups -> a list with the indices of each group"""
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    _, starts = np.unique(groups[order], return_index=True)
    return np.split(order, starts[1:])


def draw_test_lenders(groups, seed, draws=DRAWS):
    """The lenders of the test, (draws, N) indices: in draw k, photo i gets the background of photo
    lenders[k, i], which is in the same group. `groups` (N,) are the labels for same_class. For
    any_class, all photos are one group.

    The photos of a group form a random cycle, such as c a d b. In draw 0, each of them borrows from
    the one before it: a from c, d from a, b from d, c from b; in draw 1 from the second one before
    it, and so on. So a photo lends its background exactly once in each draw, and never to itself.
    This matters, because two photos with the same background would find each other by it.

    A photo alone in its group keeps its own background. In a group of few photos, lenders repeat
    from draw to draw. If all groups are that small, there are fewer draws."""
    rng = np.random.default_rng(seed)
    cycles = [rng.permutation(members) for members in split_by_group(groups)]
    largest = max(map(len, cycles))
    draws = max(1, min(draws, largest - 1))
    lenders = np.tile(np.arange(len(groups)), (draws, 1))
    for cycle in cycles:
        if len(cycle) > 1:
            for k in range(draws):
                lenders[k, cycle] = np.roll(cycle, 1 + k % (len(cycle) - 1))
    return lenders


MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean in RGB; a painted background has this colour

# The object is removed by blurring the background into its place, with several widths. The standard
# deviation is the crop's side S / divisor. S/4 reaches across any object, but is blind to detail.
# S/64 keeps the detail, but reaches only the object's edge. S/10 and S/24 lie between them.
BLUR_DIVISORS = (4, 10, 24, 64)  # from wide to narrow
# A blur counts fully where at least a tenth of what it sees is background. With less, its colour
# would come from a few distant pixels, so the result of the wider blur is mixed in.
SEEN_ENOUGH = 0.1
# A pixel is background if its mask, and those of all pixels around it, are below a tenth: soft
# masks end in a faint margin, which still shows the object.
FAINT = 0.1


def remove_object(images, masks):
    """Fills the object and a margin of S / 64 from the background around it: (B, 3, S, S) in
    [0, 255], (B, 1, S, S) in [0, 1] -> (B, 3, S, S). The fill is blur(image * keep) / blur(keep),
    where keep is 1 on the background."""
    margin = max(1, images.shape[-1] // 64)
    keep = (F.max_pool2d(masks, 2 * margin + 1, 1, margin) < FAINT).float()
    # The fill is smooth, so half of the resolution is enough.
    known = F.avg_pool2d(torch.cat([images * keep, keep], dim=1), 2, ceil_mode=True)
    position = torch.linspace(0, 1, known.shape[-1], device=images.device)
    colour, seen = known.mean(dim=(2, 3), keepdim=True).split((3, 1), dim=1)
    fill = colour / seen.clamp(min=1e-6)  # the mean of the background, or black if there is none
    for divisor in BLUR_DIVISORS:  # each replaces the wider one where it sees enough background
        gauss = (((position - position[:, None]) * divisor).square() / -2).exp()
        gauss = gauss / gauss.sum(dim=1, keepdim=True)  # a matrix that blurs columns or rows
        colour, seen = (gauss @ known @ gauss.T).split((3, 1), dim=1)
        trust = (seen / SEEN_ENOUGH).clamp(max=1)
        fill = fill + trust * (colour / seen.clamp(min=1e-6) - fill)
    return torch.where(keep > 0, images, F.interpolate(fill, images.shape[2:], mode="bilinear"))


# The conditions of the test. Query and gallery are changed alike, except in `query`.
#
#   clean             the photo as it is
#   replaced          its object in front of a photo of the pool: the paper's test; only with a pool
#   same_class        its object in front of the background of another test photo of its class
#   any_class         its object in front of the background of another test photo, of any class
#   pasted            its object cut out and put back: what cutting and pasting alone changes
#   object_only       its object in front of a plain colour
#   background_only   the photo with its object removed
#   photo_and_object  the mean of the embeddings of clean and object_only: an advice for users
#   query             the query in the reference condition, the gallery clean
#   chance            random embeddings
#
# The reference condition, args.reference, is `replaced` if there is a pool, and `any_class` if not.
# args.select is the condition whose validation MAP@R selects the best epoch: clean for base,
# replaced for BGAugment, any_class for own backgrounds.


# ---- 3. Sampler ----------------------------------------------------------------------------------


class MPerClassSampler:
    """Batches of indices into `labels` (§4): batch_size // m distinct classes, m images of
    each, without replacement unless the class has fewer than m. batch() raises ValueError if there
    are too few classes."""

    def __init__(self, labels, m, batch_size):
        labels = np.asarray(labels)
        self.classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.m, self.batch_size = m, batch_size

    def batch(self, seed):
        """A list of indices, the same for the same seed (an int or a tuple of ints)."""
        rng = np.random.default_rng(seed)
        indices = []
        for c in rng.choice(len(self.classes), self.batch_size // self.m, replace=False):
            members = self.classes[c]
            indices += rng.choice(members, self.m, replace=len(members) < self.m).tolist()
        return indices


def make_sampler(labels, loss, batch_size):
    """The MPerClassSampler of a loss: 4 images per class for pair losses, 1 for classification
    losses (IMAGES_PER_CLASS). Raises UserError."""
    # DIFF: if there are too few classes for a batch, it holds all, with as many images each as fit.
    classes = min(batch_size // IMAGES_PER_CLASS[loss], len(np.unique(labels)))
    if classes < 2:
        raise UserError(f"--batch-size {batch_size}: too small for two classes; give at least "
                        f"{2 * IMAGES_PER_CLASS[loss]}")
    m = batch_size // classes
    return MPerClassSampler(labels, m, m * classes)


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


def block(network, name, width, out_1x1, outs_3x3, outs_double, pool, projection):
    """The branches of a block, whose outputs are concatenated; see BLOCKS. `outs_3x3` and
    `outs_double` hold the output channels of each convolution of their branch."""
    stride, padding = (1, 1) if out_1x1 else (2, 0)
    branches = []
    if out_1x1:
        branches.append(unit(network, f"{name}_1x1", width, out_1x1, 1))
    reduce, out = outs_3x3
    branches.append(nn.Sequential(
        unit(network, f"{name}_3x3_reduce", width, reduce, 1),
        unit(network, f"{name}_3x3", reduce, out, 3, stride)))
    reduce, middle, out = outs_double
    branches.append(nn.Sequential(
        unit(network, f"{name}_double_3x3_reduce", width, reduce, 1),
        unit(network, f"{name}_double_3x3_1", reduce, middle, 3),
        unit(network, f"{name}_double_3x3_2", middle, out, 3, stride)))
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
    """Backbone, Linear(features, embedding) and L2 norm (§4): (B, 3, S, S) normalised ->
    (B, embedding) of unit length. If `embedding` is 0, there is no linear layer. Raises UserError
    for a backbone that is unknown or does not give (B, features)."""

    def __init__(self, backbone, weights, size, embedding=128):
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
        # BatchNorm keeps its running statistics, which are ImageNet's with ImageNet weights. Only
        # its affine weights are trained.
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


# ---- 5. Losses -----------------------------------------------------------------------------------

# Every loss is a function of embeddings (B, D) of unit length, labels (B,) and class weights, also
# called proxies: one vector per training class (C, D). Pair losses ignore `weight`. The arguments
# after the * are hyper-parameters, and HPARAMS overrides their defaults. A loss that takes lr_loss
# gets class weights. It is their learning rate, and only the optimiser uses it.
# [x]+ is max(x, 0), and mean+ is the mean over the terms above 0.


def pairs(labels):
    """Two (B, B) booleans. Positive pairs: same label and i != j. Negative pairs: other label."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def mean_above_zero(terms, chosen):
    """mean+ over the chosen terms; 0, with a gradient path, if none is above 0."""
    terms = F.relu(terms) * chosen  # masking instead of indexing avoids a GPU sync
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def distances(embeddings):
    """(B, D) -> (B, B) Euclidean, with gradient 0 (not infinity) between equal embeddings."""
    return torch.linalg.vector_norm(embeddings[:, None] - embeddings, dim=2)


def log1p_sum_exp(terms, chosen):
    """log(1 + the sum of exp over the chosen terms of each row): (rows, terms) -> (rows,)"""
    # It is the logsumexp of the terms and a 0.
    return F.pad(terms.masked_fill(~chosen, -math.inf), (1, 0)).logsumexp(dim=1)


def contrastive(embeddings, labels, weight=None, *, pos_margin=0.0, neg_margin=0.5):
    """mean+_pos [d - pos_margin]+ + mean+_neg [neg_margin - d]+  (Hadsell et al. 2006)"""
    d = distances(embeddings)
    pos, neg = pairs(labels)
    return mean_above_zero(d - pos_margin, pos) + mean_above_zero(neg_margin - d, neg)


def triplet(embeddings, labels, weight=None, *, margin=0.1):
    """mean+_(a,p,n) [d_ap - d_an + margin]+ over all triplets  (Weinberger & Saul 2009)"""
    d = distances(embeddings)
    pos, neg = pairs(labels)
    triplets = pos[:, :, None] & neg[:, None, :]  # (B, B, B): anchor, positive, negative
    return mean_above_zero(d[:, :, None] - d[:, None, :] + margin, triplets)


def multi_similarity(embeddings, labels, weight=None, *, alpha=2.0, beta=50.0, base=0.5):
    """mean_a [log(1 + sum_p exp(alpha (base - s_ap))) / alpha
             + log(1 + sum_n exp(beta (s_an - base))) / beta]  (Wang et al. 2019, without miner)"""
    s = embeddings @ embeddings.T
    pos, neg = pairs(labels)
    attract = log1p_sum_exp(alpha * (base - s), pos) / alpha
    repel = log1p_sum_exp(beta * (s - base), neg) / beta
    return (attract + repel).mean()


def arcface(embeddings, labels, weight, *, margin=20.0, scale=50.0, lr_loss=0.01):
    """cross-entropy of scale cos(theta_c); for the image's own class, scale cos(theta_c + margin)
    (Deng et al. 2019). The margin is added at every angle; later versions use another formula where
    theta + margin exceeds 180 degrees."""
    cosines = embeddings @ F.normalize(weight, dim=1).T  # (B, C)
    theta = cosines.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    own_class = F.one_hot(labels, len(weight)).bool()
    logits = torch.where(own_class, (theta + math.radians(margin)).cos(), cosines)
    return F.cross_entropy(scale * logits, labels)


def normalized_softmax(embeddings, labels, weight, *, temperature=0.1, lr_loss=0.01):
    """cross-entropy of cos(e, W_c) / temperature  (Zhai & Wu 2019)"""
    cosines = embeddings @ F.normalize(weight, dim=1).T  # (B, C)
    return F.cross_entropy(cosines / temperature, labels)


def euclidean(embeddings, others):
    """Distance of each row to the same row of `others`, or to its only row: (B, D), (B or 1, D) ->
    (B,). This distance and the next one are those of the attention score (§5)."""
    return torch.linalg.vector_norm(embeddings - others, dim=1)


def cosine(embeddings, others):
    """1 - cosine similarity, from 0 to 2, with the shapes of euclidean()."""
    return 1 - F.cosine_similarity(embeddings, others, dim=1)


# A new loss needs its function and a row here: the function, the distance that the attention score
# uses, and the number of images per class in a batch: 4 for losses of pairs, 1 for classification.
LOSS_TABLE = [
    (contrastive, euclidean, 4),
    (triplet, euclidean, 4),
    (multi_similarity, cosine, 4),
    (arcface, cosine, 1),
    (normalized_softmax, cosine, 1),
]
LOSSES = {function.__name__: function for function, _, _ in LOSS_TABLE}
DISTANCES = {function.__name__: distance for function, distance, _ in LOSS_TABLE}
IMAGES_PER_CLASS = {function.__name__: images for function, _, images in LOSS_TABLE}


def hyper_parameters(loss, dataset):
    """{name: value}: the defaults of the loss's function, overridden by HPARAMS."""
    defaults = inspect.signature(LOSSES[loss]).parameters.values()
    values = {p.name: p.default for p in defaults if p.kind is p.KEYWORD_ONLY}
    values |= HPARAMS.get(dataset, HPARAMS["cars196"]).get(loss, {})
    return json.loads(json.dumps(values))  # as a config.json has them: lists, no tuples


# ---- 6. Metrics ----------------------------------------------------------------------------------


@torch.no_grad()
def query_metrics(embeddings, labels, ks, gallery=None, ignored=None):
    """The metrics of each query: a dict with the keys map@r, r_precision, and recall@K for each K
    in `ks`. Each value is (N,), from 0 to 1, or nan where a query has no right item.

    embeddings (N, D), labels (N,): every item queries all others by Euclidean distance. `gallery`
    (N, D) holds other embeddings of the same items; with it, every item queries the gallery without
    itself. `ignored` (N,) is the index of one more item that each query leaves out. Raises
    ValueError if lengths differ, FloatingPointError on nan or inf. Memory is linear in N.

    An item of the query's label is right, any other one is wrong. R is the number of right items.
    Rule 1. The i-th nearest right item has rank_i = i + the number of wrong items that are nearer
            or at the same distance.
    Rule 2. All metrics follow from these ranks (§4.3): MAP@R = sum_i [rank_i <= R] i /
            rank_i / R, R-precision = sum_i [rank_i <= R] / R, Recall@K = [rank_1 <= K].
    Rule 3. A right item with R or more wrong items before it has a rank above R and adds nothing.
            So the R nearest wrong items are enough, except for Recall@K, whose K may exceed R."""
    # DIFF: the query itself is removed from its results, not whatever comes first.
    # DIFF: at equal distance, wrong items rank before right ones.
    # So equal embeddings score 0 in MAP@R if there are enough wrong items, in any order of files.
    embeddings = torch.as_tensor(embeddings)
    device, count = embeddings.device, len(embeddings)
    gallery = embeddings if gallery is None else torch.as_tensor(gallery)
    labels = torch.as_tensor(labels, device=device)
    if not count == len(labels) == len(gallery):
        raise ValueError(f"the lengths differ: {count} embeddings, {len(labels)} labels, "
                         f"{len(gallery)} items in the gallery")
    if not (embeddings.isfinite().all() and gallery.isfinite().all()):
        raise FloatingPointError("the embeddings contain nan or inf")

    # Sort by label: then the items of a class are consecutive.
    order = labels.argsort(stable=True)
    _, sizes = labels[order].unique_consecutive(return_counts=True)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (N,) first item of the class
    size = sizes.repeat_interleave(sizes)  # (N,) items of the class
    R = size - 1
    left_out = torch.arange(count, device=device)[:, None]  # (N, 1): an item is no result of itself
    if ignored is not None:
        place = order.argsort()  # of each item in the sorted order
        ignored = place[torch.as_tensor(ignored, device=device)[order]]
        is_right = (ignored >= first) & (ignored < first + size) & (ignored != left_out[:, 0])
        R = R - is_right.long()
        left_out = torch.cat([left_out, ignored[:, None]], dim=1)

    # q . g - |g|^2 / 2 is larger for nearer items g. An extra dimension adds the second term.
    center = gallery.mean(dim=0)  # subtracting it preserves distances and saves float32 precision
    queries = F.pad(embeddings[order] - center, (0, 1), value=1)
    columns = F.pad(gallery[order] - center, (0, 1))
    columns[:, -1] = columns.square().sum(dim=1) / -2

    names = ["map@r", "r_precision", *(f"recall@{k}" for k in ks)]
    values = {name: torch.full((count,), torch.nan, device=device) for name in names}
    # One class size at a time, so that the right items of Q queries form a rectangle (Q, n - 1).
    for n in sizes[sizes > 1].unique().tolist():
        i = torch.arange(1, n, device=device)  # numbers the right items
        # (Q,) queries at a time, with at most 2**24 similarities: 64 MiB in float32
        for q in (size == n).nonzero()[:, 0].split(max(1, 2**24 // count)):
            near = (queries[q] @ columns.T).scatter_(1, left_out[q], -math.inf)  # (Q, N)
            class_items = first[q, None] + torch.arange(n, device=device)  # (Q, n)
            right = near.gather(1, class_items).sort(descending=True).values
            right = right[:, :n - 1].contiguous()
            wrong = near.scatter_(1, class_items, -math.inf)  # `near` is not needed any more
            nearest_wrong = wrong.topk(n - 1).values  # Rule 3
            # Rule 1. A right item that is left out is at -inf, so its rank exceeds R.
            ranks = i + torch.searchsorted(-nearest_wrong, -right, right=True)  # (Q, n - 1)
            found = ranks <= R[q, None]  # Rule 2
            first_rank = 1 + (wrong >= right[:, :1]).sum(dim=1)
            values["map@r"][order[q]] = (found * i / ranks).sum(dim=1) / R[q]  # 0 / 0 is nan
            values["r_precision"][order[q]] = found.sum(dim=1) / R[q]
            for k in ks:
                hit = (first_rank <= k).float()
                values[f"recall@{k}"][order[q]] = hit.masked_fill(R[q] == 0, torch.nan)
    return {name: column.cpu().double() for name, column in values.items()}


def retrieval_metrics(embeddings, labels, ks, gallery=None, ignored=None):
    """The means of query_metrics() over the queries that have a right item: {"map@r":, ...}.
    Raises ValueError if there is no such query.

    By hand: items 0, 2, 7 of class a and 3, 9 of class b, on a line. R is 2 for a and 1 for b.
        query 0 finds 2 a, 3 b, 7 a, 9 b: MAP@R (1/1 + 0) / 2, R-precision 1/2, Recall@1 1
        query 2 finds 3 b, 0 a, 7 a, 9 b: MAP@R (0 + 1/2) / 2, R-precision 1/2, Recall@1 0
        query 7 finds 9 b, 3 b, 2 a, 0 a: all 0, and so are queries 3 (2 a) and 9 (7 a)
    >>> places = torch.tensor([[0.0], [2.0], [7.0], [3.0], [9.0]])
    >>> means = retrieval_metrics(places, labels=[0, 0, 0, 1, 1], ks=[1])
    >>> {name: round(mean, 4) for name, mean in means.items()}
    {'map@r': 0.15, 'r_precision': 0.2, 'recall@1': 0.2}
    """
    return mean_metrics(query_metrics(embeddings, labels, ks, gallery, ignored))


def mean_metrics(values):
    """The means of query_metrics(). Raises ValueError if no query has a right item."""
    if values["map@r"].isnan().all():
        raise ValueError("no query has a right item, so there is nothing to retrieve")
    return {name: float(column.nanmean()) for name, column in values.items()}


@torch.no_grad()
def fooled_and_confused(clean, any_class, labels, lenders):
    """A wrong object in front of the query's own background, and a right object in front of another
    background: how often is the wrong one nearer to the query? clean (N, D): the photos. any_class
    (draws, N, D): in draw k, object i is in front of the background of photo lenders[k, i]. Returns
    two tensors (draws, N), from 0 to 1; nan where a query is left out.

    In each draw, one photo stands in front of the query's background. If its class is another one,
    it is the impostor. If not, the query is left out of this draw.
    fooled:   the share of the query's right photos, with their backgrounds of this draw, that are
              farther from the query than the impostor. Ties count half. 0: only the object counts.
              1: only the background counts. 0.5: a constant network.
    confused: the same with the impostor on its background of the next draw, which is not the
              query's. A network that ignores backgrounds, but recognises objects badly, has equal
              values of both. So their difference comes from the background.

    An example: the right photos of a query are at distances 1 and 3. The impostor is at distance 2
    in front of the query's background, and at distance 4 elsewhere. Then one of two right photos is
    farther than the impostor, fooled = 1/2, and confused = 0.
    Geirhos et al. (2019) set shape against texture in this way."""
    labels = np.asarray(labels)
    fooled, confused = torch.full((2, *lenders.shape), torch.nan, dtype=torch.float64)
    for k, lender in enumerate(lenders):
        this_draw, next_draw = any_class[k], any_class[(k + 1) % len(lenders)]
        in_front = lender.argsort()  # photo in_front[q] stands in front of q's background
        for members in split_by_group(labels):
            queries = members[labels[in_front[members]] != labels[members]]
            if len(members) < 2 or len(queries) == 0:
                continue
            impostors = in_front[queries]
            candidates = torch.cat(
                [this_draw[members], this_draw[impostors], next_draw[impostors]])
            # Computed without a matrix product, equal embeddings are exactly equally far.
            far = torch.cdist(clean[queries], candidates,
                              compute_mode="donot_use_mm_for_euclid_dist").cpu()
            right, impostor, moved = far.split([len(members), len(queries), len(queries)], dim=1)
            # A query is no right photo of itself: nan is neither farther nor as far.
            right = right.masked_fill(torch.as_tensor(queries[:, None] == members), torch.nan)
            for shares, distance in ((fooled, impostor), (confused, moved)):
                distance = distance.diagonal()[:, None]  # each query has its own impostor
                farther = (right > distance) + 0.5 * (right == distance)
                shares[k, queries] = farther.sum(dim=1).double() / (len(members) - 1)
    return fooled, confused


# ---- 7. Training ---------------------------------------------------------------------------------


class State:
    """A run's network, class weights (C, D) or None, optimiser, and the results of each epoch. The
    first of them, epoch 0, is the network before the training."""

    def __init__(self, args, classes, weights):
        torch.manual_seed(seed_of(args.seed, INIT_SEED))
        network = Embedder(args.backbone, weights, args.image_size, args.embedding)
        self.network = network.to(args.device)
        groups = [{"params": self.network.parameters(), "lr": args.lr}]
        self.class_weights = None
        if "lr_loss" in args.hparams:
            self.class_weights = nn.Parameter(torch.randn(classes, network.width).to(args.device))
            groups.append({"params": [self.class_weights], "lr": args.hparams["lr_loss"]})
        self.optimiser = torch.optim.RMSprop(groups, **RMSPROP)
        self.history, self.args = [], args

    @property
    def finished_epochs(self):
        """The number of finished epochs."""
        return max(0, len(self.history) - 1)

    @property
    def scores(self):
        """The validation MAP@R in the condition args.select, of epochs 0, 1, 2, ..."""
        return [row[self.args.select]["map@r"] for row in self.history]

    @property
    def best_epoch(self):
        """The first epoch with the best score. Epoch 0 is never chosen; it stands for "none"."""
        trained = self.scores[1:]
        return trained.index(max(trained)) + 1 if trained else 0

    @property
    def is_finished(self):
        return self.finished_epochs >= min(self.args.epochs, self.best_epoch + self.args.patience)

    def save(self, path, *, optimiser):
        content = {"network": self.network.state_dict(), "class_weights": self.class_weights,
                   "history": self.history}
        if optimiser:
            content["optimiser"] = self.optimiser.state_dict()
        buffer = io.BytesIO()  # torch.save() itself does not say that a disk is full
        torch.save(content, buffer)
        write(path, lambda draft: draft.write_bytes(buffer.getbuffer()))

    def load(self, path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(content["network"])
        if self.class_weights is not None:
            self.class_weights.data.copy_(content["class_weights"])
        if "optimiser" in content:
            self.optimiser.load_state_dict(content["optimiser"])
        self.history = content["history"]


def train(args, splits, state, run):
    """Trains from `state`. An epoch has `iterations` batches and then a validation (§4).
    Stops after `patience` epochs without improvement, or after `epochs`. Writes log.jsonl, best.pt
    (the best epoch) and last.pt (for resuming) into the folder `run`. Raises UserError."""
    network = state.network
    sampler = make_sampler(splits["train"].labels, args.loss, args.batch_size)
    training_batches = make_training_batches(args, splits["train"], sampler)
    # Validate on the reference condition, and on the one that selects the best epoch.
    conditions = ("any_class",) if "any_class" in (args.reference, args.select) else ()
    validation_batches = make_evaluation_batches(args, splits["val"], "val", 1, conditions)
    # Both loaders last until the end, so that workers start once and prefetch during validations.
    first, last = state.finished_epochs * args.iterations, args.epochs * args.iterations
    training_loader = load_batches(training_batches, args, range(first, last))
    per_epoch = validation_batches.per_epoch
    batch_numbers = [*range(state.finished_epochs * per_epoch, args.epochs * per_epoch)]
    if not state.history:  # epoch 0 sees the backgrounds of epoch 1
        batch_numbers = [*range(per_epoch), *batch_numbers]
    validation_loader = load_batches(validation_batches, args, batch_numbers)
    if not state.history:
        scores = validate(network, validation_batches, validation_loader)
        state.history.append({"epoch": 0, "loss": None, **scores})
        print_epoch(args, state, splits)
    while not state.is_finished:
        start = time.monotonic()
        epoch = state.finished_epochs + 1
        network.train()
        losses = []
        for step in progress(range(args.iterations), f"steps of epoch {epoch}"):
            photos, labels, backgrounds = next(training_loader)
            images, masks = unpack(photos)
            # Seed after next(): without workers, it crops in this process and seeds, too.
            torch.manual_seed(seed_of(args.seed, STEP_SEED, epoch, step))
            if args.bgaugment != "none":  # BGAugment, the paper's method
                if args.bgaugment == "own":  # `backgrounds` are the lenders' photos and masks
                    backgrounds = remove_object(*unpack(backgrounds))
                replaced = replace_background(images, masks, backgrounds)
                # The paper replaces all. With own backgrounds, clean MAP@R fell less for half.
                share = 1.0 if args.bgaugment == "pool" else 0.5
                chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < share
                images = torch.where(chosen, replaced, images)
            embeddings = network(network.normalise(images))
            loss = LOSSES[args.loss](embeddings, labels, state.class_weights, **args.hparams)
            state.optimiser.zero_grad()
            loss.backward()
            state.optimiser.step()
            losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())  # read once per epoch, to avoid GPU syncs
        if not math.isfinite(mean_loss):
            raise UserError(f"--lr {args.lr}: the loss is {mean_loss} in epoch {epoch}; give a "
                            "lower lr")
        trained = time.monotonic()
        scores = validate(network, validation_batches, validation_loader)
        now = time.monotonic()
        state.history.append({"epoch": epoch, "loss": mean_loss, **scores, "seconds": now - start,
                              "seconds_validation": now - trained})
        if state.best_epoch == epoch:
            state.save(run / "best.pt", optimiser=False)
        write_text(run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.history))
        state.save(run / "last.pt", optimiser=True)
        print_epoch(args, state, splits)


def validate(network, validation_batches, validation_loader):
    """{condition: metrics} of the next epoch's items: clean photos, one draw of backgrounds."""
    items = itertools.islice(validation_loader, validation_batches.per_epoch)
    embedded = embed(network, items, replaced_views)
    check_finite(embedded, validation_batches.photos)
    return {condition: retrieval_metrics(draws[0], validation_batches.labels, ks=(1,))
            for condition, draws in embedded.items()}


# ---- 8. Test -------------------------------------------------------------------------------------


def replaced_views(images, masks, batch):
    """Yields (condition, images (B, 3, S, S)) of an EvaluationBatch, whose photos are `images` and
    `masks`: the photos as they are, and on other backgrounds, once for each draw."""
    yield "clean", images
    for background in batch.backgrounds:  # the paper's test
        yield "replaced", replace_background(images, masks, background)
    for condition, draws in batch.lender_photos.items():
        for lender_photos in draws:
            emptied = remove_object(*unpack(lender_photos))
            yield condition, replace_background(images, masks, emptied)


def all_views(images, masks, batch):
    """Yields (condition, images (B, 3, S, S)): all conditions of the test."""
    yield from replaced_views(images, masks, batch)
    emptied = remove_object(images, masks)
    yield "pasted", replace_background(images, masks, emptied)
    paint = images.new_tensor(MEAN_COLOUR).view(3, 1, 1)
    yield "object_only", replace_background(images, masks, paint)
    yield "background_only", emptied


@torch.no_grad()
def embed(network, items, views):
    """{condition: embeddings (draws, N, D)} of EvaluationBatches; `views` is one of the above."""
    network.eval()
    parts = defaultdict(list)  # {condition: [(draws, B, D) of each batch]}
    for batch in items:
        images, masks = unpack(batch.photos)
        embedded = defaultdict(list)
        for condition, view in views(images, masks, batch):
            embedded[condition].append(network(network.normalise(view)))
        for condition, draws in embedded.items():
            parts[condition].append(torch.stack(draws))
    return {condition: torch.cat(some, dim=1) for condition, some in parts.items()}


def run_test(network, test_batches, args):
    """Tests a network. Returns two things: the result, {"test": {condition: [metrics of each
    draw]}, "fooled": [share in each draw], "confused": [...]}, all from 0 to 1; and the values of
    each photo in %, {column: (N,)}."""
    items = progress(load_batches(test_batches, args), "test batches", test_batches.per_epoch)
    embeddings = embed(network, items, all_views)
    check_finite(embeddings, test_batches.photos)
    labels, clean = test_batches.labels, embeddings["clean"][0]
    lenders = test_batches.lender_indices()["any_class"]

    # Two more conditions need no forward pass.
    both = embeddings["clean"] + embeddings["object_only"]
    embeddings["photo_and_object"] = F.normalize(both, dim=2)
    rng = torch.Generator().manual_seed(0)
    embeddings["chance"] = torch.randn(DRAWS, len(labels), 128, generator=rng)

    ks = RECALL_AT.get(args.dataset, RECALL_AT_DEFAULT)
    values = defaultdict(list)  # {condition: [query_metrics() of each draw]}
    for condition, draws in embeddings.items():
        for draw in draws:
            values[condition].append(query_metrics(draw, labels, ks))
    # In `query`, only the query has another background. The photo that lent it has the same one.
    # The query would find it for that reason, so we leave it out of the gallery.
    for k, draw in enumerate(embeddings[args.reference]):
        lender = lenders[k] if args.reference == "any_class" else None
        values["query"].append(query_metrics(draw, labels, ks, gallery=clean, ignored=lender))
    fooled, confused = fooled_and_confused(clean, embeddings["any_class"], labels, lenders)
    return (metrics_per_draw(values, fooled, confused),
            percent_per_photo(values, fooled, confused, args.reference))


def metrics_per_draw(values, fooled, confused):
    """The first result of run_test(). A draw without any query is skipped."""
    result = {"test": {}}
    for condition, draws in values.items():
        usable = [draw for draw in draws if not draw["map@r"].isnan().all()]
        result["test"][condition] = [mean_metrics(draw) for draw in usable]
    for name, shares in (("fooled", fooled), ("confused", confused)):
        means = shares.nanmean(dim=1)
        result[name] = means[~means.isnan()].tolist()
    return result


def percent_per_photo(values, fooled, confused, reference):
    """The second result of run_test(): average precisions (MAP@R of one query), the drop in points
    from clean to the reference condition, and the shares."""
    photos = {}
    for condition in ("clean", "any_class", "replaced"):
        if condition in values:
            draws = torch.stack([draw["map@r"] for draw in values[condition]])
            photos[condition] = 100 * draws.nanmean(dim=0)
    photos["drop"] = photos["clean"] - photos[reference]
    photos["fooled"], photos["confused"] = (100 * x.nanmean(dim=0) for x in (fooled, confused))
    return photos


# ==================================================================================================
# PART II: FROM FILES TO TABLES
# ==================================================================================================


# ---- 9. Datasets ---------------------------------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix. It is printed as one line, and the exit code is 2."""


Split = namedtuple("Split", "images masks labels")  # paths, paths, (N,) integers
COUNTS = {  # images, test images
    "cars196": (16185, 8131), "cub200": (11788, 5924), "sop": (120053, 60502), "toy": (3400, 1000)}
with contextlib.suppress(ImportError):  # phones take HEIC photos, which Pillow alone cannot read
    import pillow_heif
    pillow_heif.register_heif_opener()
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # not decoded by Pillow itself
PHOTO_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items()
                  if name in Image.OPEN.keys() - NO_PHOTOS}  # all that the installed Pillow reads

# A dataset is recognised by one of these paths. Its root is the folder that contains the path.
PLACES = {"cars196": ("cars_train", "car_ims"), "cub200": ("CUB_200_2011/images",),
          "sop": ("Stanford_Online_Products/Ebay_train.txt",)}
SOURCES = {"cars196": "https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars",
           "cub200": "https://data.caltech.edu/records/65de6-vp158",
           "sop": "ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip"}
CARS196_LISTS = {  # where each list of labels is to be had
    "cars_train_annos": "https://github.com/pytorch/vision/issues/7545",
    "cars_test_annos_withlabels": "https://github.com/pytorch/vision/issues/7545",
    "cars_annos": "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset"}


def dataset_root(dataset, data):
    """The root of a named dataset in `data`, or the user's own folder. Raises UserError."""
    if dataset == "toy":
        return make_toy(Path(data, "toy"))
    if dataset in PLACES:
        for place in PLACES[dataset]:
            for found in find_below(Path(data), place):
                return found.parent
        raise UserError(f"--data {data}: {' or '.join(PLACES[dataset])} is neither in it nor up to "
                        f"two folders deeper; download it from {SOURCES[dataset]}")
    if not Path(dataset, "images").is_dir():
        raise UserError(f"--dataset {dataset}: it has no folder images/; give a folder that has "
                        f"one, or {', '.join(SPLITS)}")
    return Path(dataset)


def find_below(folder, pattern):
    """The paths that match a pattern in a folder, then those one and two folders deeper. Hidden
    folders are skipped: run_all.sh unpacks into one."""
    found = []
    for depth in ("", "*/", "*/*/"):
        found += sorted(folder.glob(depth + pattern))
    return [path for path in found if not is_hidden(path.relative_to(folder))]


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def list_cars196(root):
    """[(path, label)] of cars_train/ and cars_test/, or of car_ims/. Raises UserError."""
    if (root / "cars_train").is_dir() and (root / "cars_test").is_dir():
        listed = (read_cars196(root, "cars_train", "cars_train_annos") +
                  read_cars196(root, "cars_test", "cars_test_annos_withlabels"))
    elif (root / "car_ims").is_dir():
        listed = read_cars196(root, "car_ims", "cars_annos")
    else:
        raise UserError(f"{root}: cars_test/ is missing; download it from {SOURCES['cars196']}")
    first = min(number for _, number in listed)  # 1 in the official lists, 0 in some copies
    return [(path, number - first) for path, number in listed]


def read_cars196(root, folder, name):
    """[(path, number of the class)] of one folder, from the list NAME.mat. Raises UserError."""
    from scipy.io import loadmat

    photos = root / folder
    if (photos / folder).is_dir():  # Kaggle's cars_train/cars_train/
        photos = photos / folder
    # A browser may name a list "cars_annos (1).mat". The devkit's list of cars_test/ has no labels.
    for path in find_below(root, name.removesuffix("_withlabels") + "*.mat"):
        try:
            rows = loadmat(str(path), simplify_cells=True)["annotations"]
        except Exception as error:  # scipy raises nearly anything
            raise UserError(f"{path}: not a readable MATLAB file ({error}); download it again from "
                            f"{CARS196_LISTS[name]}") from error
        if "class" in rows[0]:
            field = "fname" if "fname" in rows[0] else "relative_im_path"
            return [(photos / Path(row[field]).name, int(row["class"])) for row in rows]
    raise UserError(f"{root}: {name}.mat, which has the labels of {folder}/, is missing; download "
                    f"it from {CARS196_LISTS[name]} into this folder")


def list_sop(root):
    """[(path, label)] of Ebay_{train,test}.txt: image_id class_id super_class_id path."""
    lines = [line for name in ("Ebay_train.txt", "Ebay_test.txt")
             for line in (root / name).read_text().splitlines()[1:]]
    return [(root / path, int(label) - 1) for _, label, _, path in map(str.split, lines)]


def list_folder(root):
    """[(path, label)] of root/images/<class>/<photo>, sorted by name. Prints what it leaves out."""
    folders = visible(root / "images")
    classes = [photos for photos in map(list_photos, folders) if photos]
    listed = [(photo, label) for label, photos in enumerate(classes) for photo in photos]
    found = itertools.chain(*(visible(folder) or [folder] for folder in folders))
    print_left_out(root / "images", found, [photo for photo, _ in listed])
    return listed


def print_left_out(folder, found, photos):
    """Prints how many of the paths that were found in a folder are not among its photos."""
    photos = set(photos)
    left_out = Counter()
    for path in found:
        if path in photos:
            continue
        if path.is_dir():
            left_out["sub-folders or folders without photos"] += 1
        else:
            left_out[path.suffix.lower() or "files without a suffix"] += 1
    if left_out:
        line = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        if left_out.keys() & HEIC_SUFFIXES:
            line += "; for HEIC photos, run: pip install pillow-heif"
        print(f"left out of {folder}: {line}")


def visible(folder):
    """The sorted paths in a folder, except hidden files; [] if it is missing or a file."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in paths if not path.name.startswith("."))


def list_photos(folder):
    """The sorted paths of the photos in a folder."""
    return [path for path in visible(folder)
            if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]


def list_backgrounds(args, name):
    """The sorted photos of the pool in --backgrounds/val or /test. Raises UserError."""
    # DIFF: backgrounds are sorted by name, so that a seed fixes the draws.
    pool = list_photos(Path(args.backgrounds, name))
    of_paper = args.dataset in PLACES and "backgrounds" not in args.settings
    if not pool or (of_paper and len(pool) != POOL_SIZE):
        wanted = f" instead of {POOL_SIZE}" if of_paper else ""
        raise UserError(f"--backgrounds {args.backgrounds}: {len(pool)} photos in {name}/{wanted}; "
                        "put background photos into its folders val/ and test/")
    return pool


def mask_path(root, image):
    """The mask of ROOT/images/a/b.jpg or ROOT/a/b.jpg is ROOT/masks/a/b.png."""
    folder = root / "images" if root / "images" in image.parents else root
    return Path(root, "masks", image.relative_to(folder)).with_suffix(".png")


def load_splits(dataset, data="data", *, measure=None, need_masks=True):
    """{"train", "val", "test", "left_out": Split} of a dataset (§4.1). `measure` is None for
    a run with training, "test" for the classes that such a run tests, "all" for all classes as test
    classes. Without `need_masks`, masks may be missing and classes few. Raises UserError."""
    root = dataset_root(dataset, data)
    listed = {"cars196": list_cars196, "sop": list_sop}.get(dataset, list_folder)(root)
    images, labels = [path for path, _ in listed], np.array([label for _, label in listed], int)
    masks = [mask_path(root, image) for image in images]
    if dataset in SPLITS:
        check_counts(dataset, root, labels)
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: missing (in total: {len(missing):,} photos); delete or "
                        f"rename {root}, and download {dataset} again from {SOURCES[dataset]}")
    if need_masks:
        where = f" --data {data}" if dataset in SPLITS else ""
        check_mask_files(root, masks, f"python masks.py --dataset {dataset}{where}")

    photos = Split(images, masks, labels)
    left_out = choose(photos, labels < 0)  # none
    if need_masks and dataset not in SPLITS:  # the paper's data sets stay as they are
        unusable = find_unusable(masks)
        left_out, photos = choose(photos, unusable), choose(photos, ~unusable)
        # A class may have lost all of its photos, so classes are numbered anew.
        photos = photos._replace(labels=np.unique(photos.labels, return_inverse=True)[1])

    splits = split_classes(dataset, photos, measure)
    if measure == "test" and dataset not in SPLITS and any(map(is_too_small, splits.values())):
        print(f"{root}: too few classes to be split for a training, so all of them are measured")
        splits = split_classes(dataset, photos, "all")
    for name, split in splits.items():
        needed = name == "test" or measure is None
        if is_too_small(split) and needed and (need_masks or not images):
            raise UserError(f"{root}: too few classes or photos for {name}; put photos into at "
                            f"least six folders {root}/images/<class>/ (two for --measure)")
    return {**splits, "left_out": left_out}


def choose(split, chosen):
    """The photos of a Split where the booleans `chosen` (N,) are true."""
    rows = np.flatnonzero(chosen)
    return Split([split.images[i] for i in rows], [split.masks[i] for i in rows],
                 split.labels[rows])


def split_classes(dataset, photos, measure):
    """{"train", "val", "test": Split} of all photos of a dataset."""
    classes = int(photos.labels.max(initial=-1)) + 1
    if measure == "all":
        ranges = {"train": range(0), "val": range(0), "test": range(classes)}
    elif dataset in SPLITS:
        ranges = SPLITS[dataset]
    else:  # a user's folder is split 74 : 24 : 98, like Cars196
        train = max(2, round(classes * 74 / 196))
        val = max(2, round(classes * 24 / 196))
        ranges = {"train": range(train), "val": range(train, train + val),
                  "test": range(train + val, classes)}
    return {name: choose(photos, np.isin(photos.labels, labels)) for name, labels in ranges.items()}


def is_too_small(split):
    """Whether a split has no two classes, or no class of two photos."""
    sizes = np.unique(split.labels, return_counts=True)[1]
    return len(sizes) < 2 or sizes.max() < 2


def check_counts(dataset, root, labels):
    """Raises UserError if a named dataset is incomplete."""
    found = len(labels), int(np.isin(labels, SPLITS[dataset]["test"]).sum())
    wanted = COUNTS[dataset]
    if found != wanted:
        remedy = "delete it, and it is drawn again"
        if dataset in SOURCES:
            remedy = (f"delete or rename it, and download {dataset} again from "
                      f"{SOURCES[dataset]}")
        raise UserError(f"{root}: {found[0]:,} images, {found[1]:,} of them for testing, instead "
                        f"of {wanted[0]:,} and {wanted[1]:,}; {remedy}")


def find_unusable(masks):
    """(N,) booleans: masks that are nearly empty or full. Prints their number. Raises UserError if
    most are."""
    with ThreadPoolExecutor() as threads:
        faults = [*progress(threads.map(judge_mask, masks), "looking at masks", len(masks))]
    unusable = np.array([empty or full for empty, full, _, _ in faults], bool)
    refuse_unusable(unusable.sum(), len(masks))
    if unusable.any():
        print(f"left out: {unusable.sum():,} of {len(masks):,} photos, because their mask is "
              "nearly empty or full (left_out.csv in the run's folder)")
    return unusable


def check_mask_files(root, masks, command):
    """Raises UserError if two photos share a mask or if masks are missing. `command` is masks.py's
    for this dataset."""
    shared = shared_masks(masks)
    if shared:
        raise UserError(f"{shared[0]}: two photos share this mask (in total: {len(shared):,} such "
                        f"masks); rename the photos that this command lists: {command} --verify")
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        # Masks made by hand are perhaps there under other names. masks.py would make them anew.
        remedy = f"run: {command}"
        strays = describe_strays(root, masks)
        if strays:
            remedy = f"{strays}: rename or delete them, then {remedy}"
        raise UserError(f"{missing[0]}: missing (in total: {len(missing):,} masks); {remedy}")


def shared_masks(masks):
    """The masks that belong to two photos or more, such as b.jpg and b.png, in their order."""
    return [mask for mask, photos in Counter(masks).items() if photos > 1]


def describe_strays(root, masks):
    """Says how many files in ROOT/masks are no photo's mask; "" if there are none."""
    expected = set(masks)
    strays = [path for path in sorted((root / "masks").rglob("*")) if path not in expected
              and path.is_file() and not is_hidden(path.relative_to(root))]
    if not strays:
        return ""
    text = f"{root / 'masks'} has {len(strays):,} files that fit no photo, such as {strays[0]}"
    same_letters = {unicodedata.normalize("NFC", str(mask)) for mask in masks}
    if unicodedata.normalize("NFC", str(strays[0])) in same_letters:
        text += " (it differs from a photo's mask only in the Unicode form of its name)"
    return text


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
        raise UserError(f"{path}: {explain_unreadable(path, error)}") from error


def explain_unreadable(path, error):
    """What a file is that Pillow cannot read, and what to do."""
    start = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs instead of an image; run: git lfs pull"
    is_heic = start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1")  # whatever its suffix
    if is_heic and not HEIC_SUFFIXES & PHOTO_SUFFIXES:
        return "a HEIC photo; run: pip install pillow-heif"
    return (f"not a readable image ({error}); replace it with a good copy of the same name "
            "(masks.py --verify lists all damaged photos), and the same command resumes")


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
        problem = f"{mask}: its size is {opened.size}, the photo's is {photo.size}"
        with Image.open(image) as stored:
            fits_as_stored = stored.size == opened.size
        if fits_as_stored:
            raise UserError(f"{problem}, because the photo's EXIF tag turns it; turn "
                            "the mask in the same way")
        raise UserError(f"{problem}; delete the mask and run masks.py")
    return photo, opened


def mask_faults(mask):
    """(is nearly empty, is nearly full, is fuzzy, share of foreground) of a mask."""
    foreground, grey = mask_shares(mask)
    return foreground < EMPTY, foreground > FULL, grey > FUZZY, foreground


def mask_shares(mask):
    """(share of foreground, share of grey) of the pixels of a mask."""
    pixels = np.asarray(mask)
    return (pixels >= THRESHOLD).mean(), ((pixels > 25) & (pixels < 230)).mean()


@functools.cache
def judge_mask(path):
    """mask_faults() of a file, which is read once per process."""
    return mask_faults(open_mask(path))


def check_masks(splits):
    """Prints statistics of a sample of the masks. Raises UserError if most are empty or full."""
    masks = [mask for name in ("train", "val", "test") for mask in splits[name].masks]
    sample = np.random.default_rng(0).permutation(len(masks))[:200]
    faults = np.array([judge_mask(masks[i]) for i in sample])
    empty, full, fuzzy = faults[:, :3].sum(axis=0).astype(int)
    print(f"masks: {np.median(faults[:, 3]):.0%} foreground (median), {empty} of {len(sample)} "
          f"nearly empty, {full} nearly full, {fuzzy} fuzzy")
    refuse_unusable(empty + full, len(sample))


def refuse_unusable(unusable, masks):
    """Raises UserError if more than half of this number of masks are nearly empty or full."""
    if 2 * unusable > masks:
        raise UserError("masks: most are empty or full; replace those that masks.py --verify lists")


class Photos(torch.utils.data.Dataset):
    """Item i: photo and mask in one (4, H, W) uint8 tensor, so that both get the same crops and
    flips; without masks, (3, H, W). It is resized for crops of `size` px. With `keep`, as many
    photos as fit in memory are decoded now. The rest are decoded on every access."""

    def __init__(self, images, masks, size, *, keep=True):
        self.images, self.masks = images, masks
        self.size, self.short_side = size, round(RESIZE * size)
        self.kept = []
        self.faults = {}  # {index: (the mask is nearly empty or full, the object is off centre)}
        if not keep:
            return
        # DIFF: photos are resized once per run, not on every access.
        for photo in self.decode_all("decoding photos"):
            if free_memory() < 0.1:
                print(f"memory is short: {len(self.kept):,} of {len(self):,} photos are kept, the "
                      "rest are decoded on every access (--workers helps)")
                break
            self.kept.append(photo)

    def decode_all(self, title):
        """Yields all items in order. Threads decode them ahead, until the caller stops. Raises
        UserError with the number of damaged files; nothing is yielded after the first of them."""
        threads, errors = ThreadPoolExecutor(), []
        try:
            decoded = threads.map(self.try_to_decode, range(len(self)))
            for photo in progress(decoded, title, len(self)):
                if isinstance(photo, UserError):
                    errors.append(photo)
                elif not errors:
                    yield photo
        finally:
            threads.shutdown(cancel_futures=True)
        if errors:
            raise UserError(f"{errors[0]} (in total: {len(errors):,} damaged files)")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.kept[i] if i < len(self.kept) else self.decode(i)

    def try_to_decode(self, i):
        """The item, or the UserError that says what is wrong with its files."""
        try:
            return self.decode(i)
        except UserError as error:
            return error

    def decode(self, i):
        image = self.images[i]
        planes = [open_rgb(image)] if self.masks is None else open_pair(image, self.masks[i])
        photo = torch.cat([TF.pil_to_tensor(TF.resize(plane, self.short_side)) for plane in planes])
        if self.masks is not None:
            foreground = photo[3] >= THRESHOLD
            share = foreground.float().mean()
            inside = TF.center_crop(foreground, self.size).sum() / foreground.sum()  # or nan
            self.faults[i] = bool(share < EMPTY or share > FULL), bool(inside < 0.5)
        return photo

    def warn_of_masks(self, split):
        """Prints a line if five percent of the decoded photos have a nearly empty or full mask."""
        share = self.share_of_faults(0)
        if share >= 0.05:
            print(f"warning: {share:.0%} of the {split} photos have a mask that is nearly empty or "
                  "full; look at the masks with masks.py --verify --sheet")

    def warn_of_crop(self, split):
        """Prints a line if the centre crop cuts off the objects of five percent of the photos."""
        share = self.share_of_faults(1)
        if share >= 0.05:
            print(f"warning: in {share:.0%} of the {split} photos, more than half of the object "
                  "lies outside of the centre crop; crop the photos around the object")

    def share_of_faults(self, fault):
        return sum(faults[fault] for faults in self.faults.values()) / max(1, len(self.faults))


def free_memory():
    """Fraction of memory available, of this machine or container or job; 1.0 if unknown."""
    free = [1.0]
    with contextlib.suppress(OSError, KeyError):  # only Linux has this file, and not every sandbox
        machine = dict(re.findall(r"(\w+): +(\d+)", Path("/proc/meminfo").read_text()))
        free.append(int(machine["MemAvailable"]) / int(machine["MemTotal"]))
    groups = ""
    with contextlib.suppress(OSError):
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

# A training batch. photos: (B, 4, S, S) uint8, photo and mask, cropped at random. labels: (B,).
# backgrounds: None for a base run; photos of the pool, (B, 3, S, S) uint8; or, with own
# backgrounds, other photos of the batch and their masks, (B, 4, S, S) uint8.
TrainingBatch = namedtuple("TrainingBatch", "photos labels backgrounds")

# A test batch. photos: (B, 4, S, S) uint8, cropped at the centre. labels: (B,). backgrounds: photos
# of the pool, a list of (B, 3, S, S) uint8, one for each draw; empty without a pool. lender_photos:
# {condition: list of (B, 4, S, S) uint8}, photos and masks of the lenders of each draw.
EvaluationBatch = namedtuple("EvaluationBatch", "photos labels backgrounds lender_photos")


def seed_of(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_crops(*numbers):
    """Seeds the generator that torchvision's random crops use, in this process only."""
    torch.default_generator.manual_seed(seed_of(*numbers))


def random_view(photo, size):
    """The training transform, RandomResizedCrop and flip: (., H, W) uint8 -> (., S, S) uint8."""
    # DIFF: crops are resized as uint8 tensors, not as PIL images; pixels differ by at most 1.
    box = torchvision.transforms.RandomResizedCrop.get_params(photo, CROP_SCALE, CROP_RATIO)
    view = TF.resized_crop(photo, *box, [size, size], antialias=True)
    return TF.hflip(view) if torch.rand(()) < FLIP else view


class TrainingBatches(torch.utils.data.Dataset):
    """Item n is the n-th TrainingBatch of a run. `bgaugment` is none, pool or own."""

    def __init__(self, photos, labels, sampler, size, seed, bgaugment="none", pool=None):
        self.photos, self.labels, self.sampler = photos, torch.as_tensor(labels), sampler
        self.size, self.seed = size, seed
        self.bgaugment, self.pool = bgaugment, pool

    def __getitem__(self, n):
        # DIFF: a batch depends only on the seed and its number, so a resumed run repeats no batch.
        indices = self.sampler.batch((*self.seed, n))
        labels = self.labels[indices]
        photos, backgrounds = [], []
        for k, index in enumerate(indices):
            seed_crops(*self.seed, n, k)
            photos.append(random_view(self.photos[index], self.size))
            if self.bgaugment == "pool":
                backgrounds.append(random_view(draw_background(self.pool), self.size))
            elif self.bgaugment == "own":
                lender = indices[draw_training_lender(labels, k)]
                backgrounds.append(random_view(self.photos[lender], self.size))
        return TrainingBatch(torch.stack(photos), labels,
                             torch.stack(backgrounds) if backgrounds else None)


class EvaluationBatches(torch.utils.data.Dataset):
    """Item n is an EvaluationBatch. The first `per_epoch` items hold all photos in order, or those
    in `rows`; the next items hold them again, with other backgrounds, as each validation needs.
    `draws` is the number of backgrounds for each photo: of the pool, if there is one, and for each
    one of `conditions` (same_class, any_class) of other photos. `rows` does not change them."""

    def __init__(self, photos, labels, size, seed, draws=0, pool=None, conditions=(), rows=None):
        self.photos, self.labels = photos, torch.as_tensor(labels)
        self.size, self.seed = size, seed
        self.draws, self.pool, self.conditions = draws, pool, conditions
        self.rows = range(len(photos)) if rows is None else rows
        self.per_epoch = math.ceil(len(self.rows) / EVAL_BATCH)
        self.drawn = None, None  # the last epoch and its lenders

    def lender_indices(self, epoch=0):
        """{condition: (draws, N) indices of the photos that lend their background}"""
        if self.drawn[0] != epoch:
            groups = {"same_class": self.labels, "any_class": torch.zeros_like(self.labels)}
            seed = (*self.seed, epoch)
            self.drawn = epoch, {condition: draw_test_lenders(groups[condition], seed, self.draws)
                                 for condition in self.conditions}
        return self.drawn[1]

    def crops(self, indices):
        """Photos and masks: (B, 4, S, S)."""
        return torch.stack([TF.center_crop(self.photos[i], self.size) for i in indices])

    def __getitem__(self, n):
        epoch, batch = divmod(n, self.per_epoch)
        indices = self.rows[batch * EVAL_BATCH:(batch + 1) * EVAL_BATCH]
        backgrounds = []  # of each photo
        for index in indices if self.pool else ():
            seed_crops(*self.seed, epoch, index)
            backgrounds.append([random_view(draw_background(self.pool), self.size)
                                for _ in range(self.draws)])
        lender_photos = {}
        for condition, lenders in self.lender_indices(epoch).items():
            lender_photos[condition] = [self.crops(draw[indices]) for draw in lenders]
        return EvaluationBatch(self.crops(indices), self.labels[indices],
                               [torch.stack(draw) for draw in zip(*backgrounds)], lender_photos)


def make_training_batches(args, split, sampler):
    """The TrainingBatches of a Split."""
    photos, pool = Photos(split.images, split.masks, args.image_size), None
    photos.warn_of_masks("training")
    if args.bgaugment == "pool":
        pool = Photos(list_backgrounds(args, "val"), None, args.image_size)
    return TrainingBatches(photos, split.labels, sampler, args.image_size, (args.seed, TRAIN_SEED),
                           args.bgaugment, pool)


def make_evaluation_batches(args, split, name, draws, conditions, *, rows=None, keep=True):
    """The EvaluationBatches of a Split, which is the `name` split: val or test. It decides which
    photos are the pool, if there is one. Without draws, no pool is needed."""
    pool = None
    if args.reference == "replaced" and draws:
        pool = Photos(list_backgrounds(args, name), None, args.image_size)
    seed = args.seed, {"val": VAL_SEED, "test": TEST_SEED}[name]
    photos = Photos(split.images, split.masks, args.image_size, keep=keep)
    return EvaluationBatches(photos, split.labels, args.image_size, seed, draws, pool, conditions,
                             rows)


def load_batches(batches, args, numbers=None):
    """Yields items of `batches`, on the device: those with these numbers, or the first epoch."""
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # workers share decoded photos
    for batch in torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=args.workers,
            sampler=range(batches.per_epoch) if numbers is None else numbers,
            timeout=120 if args.workers else 0,  # seconds; a full /dev/shm would block forever
            multiprocessing_context="fork" if fork and args.workers else None,
            pin_memory=args.device.startswith("cuda")):
        yield to_device(batch, args.device)


def progress(items, title, total=None):
    """Yields the items. A terminal shows a bar. A file gets a line after half a minute, and then
    each minute: how many items are done and how long the rest will take."""
    total = len(items) if total is None else total
    if sys.stderr.isatty():
        yield from tqdm(items, title, total, leave=False)
        return
    start, next_line = time.monotonic(), 30
    for done, item in enumerate(items, start=1):
        yield item
        seconds = time.monotonic() - start
        if seconds > next_line:
            left = seconds / done * (total - done) / 60
            print(f"{title}: {done:,} of {total:,}, {left:.1f} min left", file=sys.stderr)
            next_line = seconds + 60


def to_device(batch, device):
    """The batch with all its tensors on the device."""
    if torch.is_tensor(batch):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, list):
        return [to_device(item, device) for item in batch]
    if isinstance(batch, dict):
        return {key: to_device(item, device) for key, item in batch.items()}
    if isinstance(batch, tuple):
        return type(batch)(*(to_device(item, device) for item in batch))
    return batch


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
    if not Path(folder, "hubconf.py").is_file():
        raise UserError(f"--backbone {name}: there is no {folder}/hubconf.py; correct the folder")
    try:
        network = torch.hub.load(folder, entry, source="local")
    except RuntimeError as error:
        if "Cannot find callable" not in str(error):
            raise
        raise UserError(f"--backbone {name}: {folder}/hubconf.py has no function {entry}(); "
                        "correct the name") from error
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
        print(f"--weights {weights}: the backbone of a run, without its linear layer; give "
              f"--embedding {len(saved['bias'])} to load it too")


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
                        "be trained; add --measure")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"--backbone {args.backbone}: no parameter requires a gradient; leave out "
                        "--embedding 0 to train a linear layer on top")


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
    file = Path(run, "result.json")
    if not file.is_file():
        raise UserError(f"{run}: not a finished run; give a folder with a result.json")
    result = json.loads(file.read_text())
    if result.get("format") != FORMAT:
        raise UserError(f"{run}: another version of bgbias.py made it; give a run of this version")
    args = argparse.Namespace(**result["args"])

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

FORMAT = 2  # of config.json and result.json; other versions of this script have another number
# The way from clean photos to foreign backgrounds, and what changes in the step to each condition.
CHAIN = {"pasted": "cutting and pasting", "same class": "another background of the class",
         "any class": "a background that no longer goes with the class",
         "replaced": "a background foreign to the data"}
RESAMPLES = 2000  # of the bootstrap
NOISY = 20  # with fewer classes, a mean over them depends on which classes they are
NOTES = """MAP@R and R@1 (Recall@1) are in %. *drop %* is the fall of MAP@R from clean to the
condition in parentheses, in % of clean. Numbers after ± are standard deviations: over the seeds;
with one seed, over the draws of backgrounds (for attention: over the photos). README, "What the
numbers mean", explains all columns."""


def read_result(run):
    """The content of a finished run's result.json, its folder `run`, and `columns`: {column: values
    in %, one for each draw}. The attention columns hold one score for each photo, not in %, and
    `scored` is the number of scored photos. None if another version of this script wrote it."""
    result = json.loads((run / "result.json").read_text())
    if result.get("format") != FORMAT:
        return None
    columns = {}
    for condition, draws in result["test"].items():
        name = column_of(condition)
        columns[name] = [100 * draw["map@r"] for draw in draws]
        columns[f"R@1 {name}"] = [100 * draw["recall@1"] for draw in draws]
    clean, chance = np.mean(columns["clean"]), np.mean(columns["chance"])
    # Where a network hardly retrieves anything, a drop is noise.
    result["above_chance"] = bool(clean > chance + min(chance, (100 - chance) / 4))
    if result["above_chance"]:
        reference = column_of(result["args"]["reference"])
        columns[f"drop % ({reference})"] = [100 * (1 - draw / clean) for draw in columns[reference]]
        columns["fooled %"] = [100 * share for share in result["fooled"]]
        columns["confused %"] = [100 * share for share in result["confused"]]
        columns |= steps_of(columns)
    saved = np.load(run / "attention.npz") if (run / "attention.npz").exists() else {}
    if saved and saved["data"] == result["data"]:  # not of other photos or masks
        result["scored"] = len(saved["score"])
        for name, column in (("score", "attention"), ("beyond", "beyond another mask")):
            if np.isfinite(saved[name]).any():
                columns[column] = saved[name][np.isfinite(saved[name])]
    return {**result, "columns": columns, "run": run}


def column_of(condition):
    """The name of a condition in tables."""
    return condition.replace("_and_", " + ").replace("_", " ")


def steps_of(columns):
    """{what changes in a step of CHAIN: its changes of MAP@R in points, one for each draw}"""
    steps, before = {}, columns["clean"]
    for condition, what in CHAIN.items():
        if condition in columns:
            after = columns[condition]
            draws = range(max(len(before), len(after)))
            steps[what] = [after[k % len(after)] - before[k % len(before)] for k in draws]
            before = after
    return steps


def row_name(args, shared=()):
    """The name of a row, such as: contrastive + BGAugment, lr 0.001; without the `shared` texts."""
    name = "as it is"
    if not args["measure"]:
        variants = {"none": "", "pool": " + BGAugment", "own": " + own backgrounds"}
        name = args["loss"] + variants[args["bgaugment"]]
    return ", ".join([name, *(text for text in changes_of(args) if text not in shared)])


def changes_of(args):
    """["lr 0.001", ...]: the settings and hyper-parameters that are not default."""
    changes = dict(args["settings"])
    if not args["measure"]:
        known = args["loss"] in LOSSES  # or a loss that this script no longer has
        defaults = hyper_parameters(args["loss"], args["dataset"]) if known else {}
        ours = args["hparams"]
        for key in sorted(ours | defaults):
            if ours.get(key) != defaults.get(key):
                changes[key] = ours.get(key)
    return [f"{key.replace('_', ' ')} {value}" for key, value in changes.items()]


def mean_and_std(values):
    """The mean and, for several values, the sample standard deviation (ddof 1), as text."""
    mean = f"{round(float(np.mean(values)), 2) + 0:.2f}"  # + 0 turns -0.00 into 0.00
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def columns_of(args):
    """The columns of the first table; all results of one table have the same reference."""
    reference = column_of(args["reference"])
    return ("clean", "any class", "replaced", f"drop % ({reference})", "query", "object only",
            "background only", "photo + object", "fooled % (confused)", "R@1 clean",
            f"R@1 {reference}", "attention", "beyond another mask")


def table_row(name, results, columns):
    """The row {column: text} of results that differ only in the seed."""
    row = {"": name, "seeds": str(len(results))}
    for column in columns:
        if column == "fooled % (confused)":
            fooled = values_of(results, "fooled %"), values_of(results, "confused %")
            if all(fooled):
                row[column] = "{} ({})".format(*map(mean_and_std, fooled))
        elif column in ("attention", "beyond another mask"):
            scores = values_of(results, column)
            # Only scores of equally many photos have a mean. A few of them may be undefined.
            if scores and len({result["scored"] for result in results}) == 1:
                defined = sorted({len(result["columns"][column]) for result in results})
                photos = " to ".join(f"{count:,}" for count in defined)
                row[column] = f"{mean_and_std(scores)} ({photos} photos)"
        elif values := values_of(results, column):
            row[column] = mean_and_std(values)
        elif column.startswith("drop %"):
            row[column] = "too close to chance"
    return row


def values_of(results, column):
    """The values of one result, or the means of several; [] if a result has none."""
    values = [result["columns"].get(column, ()) for result in results]
    if not all(map(len, values)):
        return []
    return list(values[0]) if len(values) == 1 else [float(np.mean(draws)) for draws in values]


def paper_row(args):
    """The row of the paper's result for the same dataset, loss and variant, if there is one."""
    numbers = PAPER.get((args["dataset"], args["loss"]))
    if not numbers or args["measure"] or args["bgaugment"] == "own":
        return []
    of_variant = numbers[:5] if args["bgaugment"] == "none" else numbers[5:]
    clean, replaced, over_draws, attention, over_images = of_variant
    return [{"": "  paper", "clean": f"{clean:.2f}",
             "replaced": f"{replaced:.2f} ± {over_draws:.2f}",
             "drop % (replaced)": f"{100 * (clean - replaced) / clean:.2f}",
             "attention": f"{attention:.2f} ± {over_images:.2f}"}]


def as_table(rows):
    """Rows {column: text} as an aligned Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns]
    for row in rows:
        lines.append([row.get(column, "") for column in columns])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def explain_drop(result):
    """The drop of a run, step by step (lines of text), and the classes that drop most."""
    columns, reference = result["columns"], column_of(result["args"]["reference"])
    if not result["above_chance"]:
        return [f"Clean MAP@R {np.mean(columns['clean']):.2f} % is too close to chance, "
                f"{np.mean(columns['chance']):.2f} %. So a drop or a fooled share would be noise."]
    names = ["clean", *(condition for condition in CHAIN if condition in columns)]
    path = " → ".join(f"{name} {np.mean(columns[name]):.1f}" for name in names)
    lines = [f"The drop of MAP@R (in %), step by step: {path}; object only "
             f"{np.mean(columns['object only']):.1f}"]
    steps = []
    for before, after in itertools.pairwise(names):
        change = round(np.mean(columns[after]) - np.mean(columns[before]), 1) + 0  # not -0.0
        draws = columns[CHAIN[after]]
        spread = f" ± {np.std(draws, ddof=1):.1f}" if len(draws) > 1 else ""
        steps.append(f"{CHAIN[after]} {change:+.1f}{spread}")
    lines.append(f"In points: {', '.join(steps)}. The size of a step depends on the order.")
    if np.mean(columns["pasted"]) < 0.9 * np.mean(columns["clean"]):
        lines.append("Cutting and pasting costs over a tenth: check the masks.")
    photos = read_photos(result["run"])
    by_class = defaultdict(list)
    for photo in photos.values():
        by_class[photo["class"]].append((photo["clean"], photo[result["args"]["reference"]]))
    means = {name: np.mean(values, axis=0) for name, values in by_class.items() if len(values) >= 5}
    worst = sorted(means, key=lambda name: means[name][1] - means[name][0])[:5]
    worst = [name for name in worst if means[name][1] < means[name][0]]
    if worst:
        texts = ["{} ({:.1f} → {:.1f})".format(name, *means[name]) for name in worst]
        lines.append(f"The classes that drop most, from clean to {reference}: {', '.join(texts)}.")
    return lines


def class_name(args, image, label):
    """The name of a class: its folder's, or its number in the lists of the dataset."""
    return str(label + 1) if args.dataset in ("cars196", "sop") else image.parent.name


def write_photos(run, args, split, photos):
    """Writes photos.csv: the average precision of each query in each condition, in %, its drop in
    points, and how often it is fooled and confused. Queries that drop most come first."""
    root = dataset_root(args.dataset, args.data)
    columns = ("clean", "any_class", "replaced", "drop", "fooled", "confused")
    table = []
    for i in np.argsort(-photos["drop"].numpy(), kind="stable"):
        image = split.images[i]
        values = [float(photos[column][i]) if column in photos else math.nan for column in columns]
        if not math.isnan(values[0]):  # otherwise the photo has no other one of its class
            texts = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
            name = class_name(args, image, split.labels[i])
            table.append([image.relative_to(root).as_posix(), name, *texts])
    write_csv(run / "photos.csv", ["photo", "class", *columns], table)


def read_photos(run):
    """{photo: {"class": name, column: value}} of photos.csv; nan for an empty cell."""
    photos = {}
    with open(run / "photos.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        for row in csv.DictReader(file):
            photo, name = row.pop("photo"), row.pop("class")
            values = {column: float(text or "nan") for column, text in row.items()}
            photos[photo] = {"class": name, **values}
    return photos


def compare_rows(first, second):
    """A line: what the second row gains over the first, which has another variant, paired by photo
    over the seeds that both have; with a 95 % bootstrap interval over classes. "" if there are
    fewer than NOISY classes. A row is {seed: result}."""
    seeds = sorted(first.keys() & second.keys())
    differences = defaultdict(list)  # {(class, photo): [(clean, reference) of each seed]}
    for seed in seeds:
        before, after = read_photos(first[seed]["run"]), read_photos(second[seed]["run"])
        for photo in before.keys() & after.keys():
            differences[before[photo]["class"], photo].append(
                [after[photo][column] - before[photo][column]
                 for column in ("clean", first[seed]["args"]["reference"])])
    by_class = defaultdict(list)
    for (name, _), values in sorted(differences.items()):
        by_class[name].append(np.mean(values, axis=0))  # the mean over seeds comes first
    if len(by_class) < NOISY:
        return ""
    sums = np.array([np.sum(values, axis=0) for values in by_class.values()])  # (classes, 2)
    sizes = np.array([len(values) for values in by_class.values()])
    drawn = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)[:, None]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    clean, reference = sums.sum(axis=0) / sizes.sum()
    name = column_of(first[seeds[0]]["args"]["reference"])
    return (f"clean {clean:+.1f} [{low[0]:+.1f}, {high[0]:+.1f}], {name} {reference:+.1f} "
            f"[{low[1]:+.1f}, {high[1]:+.1f}] points ({sizes.sum():,} photos, {len(sizes)} "
            f"classes, seeds {', '.join(map(str, seeds))})")


def compare_variants(rows):
    """Lines for all pairs of rows {name: {seed: result}} that differ only in the variant."""
    lines = []
    for (before, first), (after, second) in itertools.combinations(rows.items(), 2):
        a, b = (next(iter(row.values()))["args"] for row in (first, second))
        if a["measure"] or b["measure"] or a["bgaugment"] == b["bgaugment"]:
            continue
        if a["loss"] == b["loss"] and changes_of(a) == changes_of(b):
            line = compare_rows(first, second)
            if line:
                lines.append(f"{after} minus {before}: {line}")
    return lines


def report(folder, only=None):
    """Markdown tables of all finished runs in `folder` beside the paper's (§4.3 and §5): two
    for each test set. With `only`, a run's folder, those of its test set. Raises UserError if there
    is no finished run."""
    tables = defaultdict(lambda: defaultdict(dict))  # {heading: {row: {seed: result}}}
    chosen, others = None, 0
    for run in sorted(file.parent for file in folder.glob("*/result.json")):
        result = read_result(run)
        if result is None:
            others += 1
            continue
        args = result["args"]
        tables[result["tested"]][row_name(args)][args["seed"]] = result
        if run == only:
            chosen = result
    if others:
        print(f"{folder}: runs of another version of bgbias.py are left out ({others})")
    if not tables:
        raise UserError(f"--report {folder}: it contains no finished run; train one first")
    parts = []
    for heading, rows in tables.items():
        if chosen and heading != chosen["tested"]:
            continue
        shared, rows = shorten_names(rows)
        parts.append(f"## {heading}")
        if shared:
            parts.append(f"All rows: {', '.join(shared)}.")
        parts.append(table_of_rows(rows))
        parts.append("\n".join(explain_drop(chosen)) if chosen else table_of_steps(rows))
        parts.append("\n".join(compare_variants(rows)))
    return "\n\n".join(part for part in parts if part)


def shorten_names(rows):
    """(what all rows have other than the defaults, the rows {name: {seed: result}} without it)"""
    all_args = [next(iter(seeds.values()))["args"] for seeds in rows.values()]
    shared = changes_of(all_args[0])
    for args in all_args:
        shared = [text for text in shared if text in changes_of(args)]
    return shared, {row_name(args, shared): seeds for args, seeds in zip(all_args, rows.values())}


def table_of_rows(rows):
    """The first table, beside the paper's results."""
    table = []
    for name, seeds in rows.items():
        results = list(seeds.values())
        args = results[0]["args"]
        table += [table_row(name, results, columns_of(args)), *paper_row(args)]
    return as_table(table)


def table_of_steps(rows):
    """The drop, step by step, of the rows that are above chance; "" if there are none."""
    table = []
    for name, seeds in rows.items():
        results = list(seeds.values())
        if all(result["above_chance"] for result in results):
            table.append(table_row(name, results, ("clean", *CHAIN, "object only")))
    return f"The drop of MAP@R, step by step:\n\n{as_table(table)}" if table else ""


# ---- 15. Command line ----------------------------------------------------------------------------


def write(path, save):
    """Calls save(temporary path) and renames the result to `path`, so `path` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name of the folder is short, because a file's name may be as long as the system allows.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        try:
            save(draft)
        except OSError as error:  # a full disk is an error without a name
            error.filename = error.filename or str(path)
            raise
        draft.replace(path)


def write_text(path, text):
    write(path, lambda draft: draft.write_text(text, "utf-8", "backslashreplace"))


def write_csv(path, header, rows):
    def save(draft):
        with open(draft, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    write(path, save)


# The first part of a run's name has these flags.
NAMED = ("dataset", "loss", "bgaugment", "measure", "seed")
# These do not change what a run computes. They are not in its name.
WHERE = ("data", "runs", "device", "workers", "report")
# These say how to train. They do not matter to a network that is only measured.
HOW_TO_TRAIN = ("loss", "bgaugment", "epochs", "iterations", "patience", "batch_size", "lr",
                "select", "hparams")


def parse_args(argv=None):
    """The arguments, with defaults filled in, and what follows from them: `settings` (those that
    are not default), `hparams`, `reference` (the condition that the drop is measured on) and the
    dataset's `name`. Raises UserError."""
    parser = argparse.ArgumentParser(
        description="Train an image retrieval model and measure its background bias.",
        epilog=f"""Defaults are in brackets. They are the paper's. The toy set has its own:
{flags_of(TOY_DEFAULTS)}

commands:
  python bgbias.py                                   the toy set, a few minutes
  python bgbias.py --dataset my_photos --measure     a network as it is, on your own photos
  python bgbias.py --dataset cars196 --bgaugment     a run of the paper""",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    home = os.path.expanduser  # of a path that begins with ~
    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=home, default="toy", help="toy [default], cars196, cub200, sop or FOLDER")
    add("--data", type=home, default="data", help="folder that holds the named datasets [data]")
    add("--backgrounds", type=lambda path: os.path.normpath(home(path)), help="the pool, a folder "
        "with val/ and test/ [DATA/unsplash_backgrounds, or FOLDER/backgrounds if it exists]")
    add = parser.add_argument_group("network").add_argument
    add("--backbone", type=home, help="bninception, smallconv, a torchvision classifier, or "
        "FOLDER:NAME, which calls NAME() in FOLDER/hubconf.py [bninception]")
    add("--weights", type=home, help="imagenet, own (of FOLDER:NAME), none (random) or FILE "
        "[imagenet]")
    add("--embedding", type=int, help="dimensions of an embedding; 0: the network's features, "
        f"without a linear layer [{DEFAULTS['embedding']}; with --measure 0]")
    add("--image-size", type=int, help=f"side of the crops in px [{DEFAULTS['image_size']}]")
    add("--measure", nargs="?", choices=("test", "all"), const="test", help="measure the network "
        "as it is, without training, on the classes that a trained run tests, or on all classes")
    add = parser.add_argument_group("training").add_argument
    add("--loss", choices=LOSSES, default="contrastive", help="[contrastive]")
    add("--bgaugment", nargs="?", choices=("none", "pool", "own"), const="pool", default="none",
        help="replace the backgrounds of training photos; pool (or no value): by photos of the "
        "pool, as the paper does; own: by backgrounds of other training photos [none]")
    add("--epochs", type=int, help=f"the largest number of epochs [{DEFAULTS['epochs']}]")
    add("--iterations", type=int, help=f"batches per epoch [{DEFAULTS['iterations']}]")
    add("--patience", type=int, help="stop after so many epochs without improvement "
        f"[{DEFAULTS['patience']}]")
    add("--batch-size", type=int, help=f"photos per batch [{DEFAULTS['batch_size']}]")
    add("--lr", type=float, help=f"learning rate of the network [{DEFAULTS['lr']}]")
    add("--select", choices=("clean", "replaced", "any_class"), help="the best epoch has the "
        "highest validation MAP@R on these photos [clean; with --bgaugment: replaced; with "
        "--bgaugment own: any_class]")
    add("--seed", type=int, default=42, help="seed of all random numbers [42]")
    add = parser.add_argument_group("where and how").add_argument
    add("--runs", type=home, default="runs", help="folder that holds the run folders [runs]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    add("--workers", type=int, help="processes that prepare batches [up to 8 with CUDA, else 0]")
    add("--report", type=home, metavar="RUNS", help="print all tables of RUNS, and write "
        "RUNS/report.md")
    args = parser.parse_args(argv)
    defaults = default_settings(args)
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.reference = "replaced" if args.backgrounds else "any_class"
    args.settings = {name: getattr(args, name) for name in defaults
                     if getattr(args, name) != defaults[name]
                     and not (args.measure and name in HOW_TO_TRAIN)}
    args.hparams = hyper_parameters(args.loss, args.dataset)
    args.name = os.path.basename(os.path.abspath(args.dataset))
    check_args(args)
    return args


def flags_of(settings):
    """The settings as flags of the command line, on two lines."""
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return f"{' '.join(flags[:3])}\n{' '.join(flags[3:])}"


def default_settings(args):
    """{flag: default} of all flags that become part of a run's name if they are given."""
    defaults = dict(DEFAULTS)
    pool = Path(args.dataset, "backgrounds")  # of a user's folder
    if args.dataset == "toy":
        defaults |= TOY_DEFAULTS
        pool = Path(args.data, "toy/backgrounds")
    elif args.dataset in SPLITS:
        pool = Path(args.data, "unsplash_backgrounds")
    elif not pool.is_dir():
        pool = None
    backbone = args.backbone or defaults["backbone"]
    defaults["image_size"] = default_image_size(backbone, args.dataset)
    if ":" in backbone:
        defaults["weights"] = "own"
    if args.measure:
        defaults["embedding"] = 0
    select = {"none": "clean", "pool": "replaced", "own": "any_class"}[args.bgaugment]
    return {"backgrounds": pool and str(pool), **defaults, "select": select}


def check_args(args):
    """Raises UserError for flags that do not go together."""
    if args.backgrounds == "own":
        raise UserError("--backgrounds own: this flag is now --bgaugment own, and a folder without "
                        "backgrounds/ needs no flag; leave it out")
    if args.bgaugment == "pool" and not args.backgrounds and not args.measure:
        raise UserError(f"--bgaugment: {args.dataset}/backgrounds does not exist; put background "
                        "photos into its folders val/ and test/, or give --bgaugment own")
    if args.select == "replaced" and not args.backgrounds and not args.measure:
        raise UserError("--select replaced: there are no background photos; give --select "
                        "any_class")
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: give --measure to measure a network without "
                        "training it")
    least = {"iterations": 1, "patience": 1, "image_size": 1, "embedding": 0, "seed": 0}
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {smallest} or "
                            "more")


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
    """RUNS/<dataset>-<loss>-<base|bgaugment|own>-s<seed>, or RUNS/<dataset>-measure-s<seed>, then
    the settings that are not default."""
    if args.measure:
        parts = [args.name, "measure_all" if args.measure == "all" else "measure"]
    else:
        variant = {"none": "base", "pool": "bgaugment", "own": "own"}[args.bgaugment]
        parts = [args.name, args.loss, variant]
    parts.append(f"s{args.seed}")
    parts += [f"{key}_{value}" for key, value in args.settings.items()]
    name = os.fsencode(re.sub(r'[\s/\\:*?"<>|]', "-", "-".join(parts)))
    if len(name) > 200:  # file systems allow 255 bytes
        name = name[:180] + b"-%08x" % zlib.crc32(name)
    return Path(args.runs, os.fsdecode(name))


@functools.cache
def file_checksum(path):
    """The checksum of a file's content, read once per process."""
    try:
        content = path.read_bytes()
    except PermissionError as error:
        raise UserError(f"{path}: you may not read it; change its permissions") from error
    return f"{zlib.crc32(content):08x} {len(content)}"


def checksum_of(paths):
    """One checksum of the names, folders and contents of files."""
    with ThreadPoolExecutor() as threads:
        sums = [*progress(threads.map(file_checksum, paths), "reading files", len(paths))]
    lines = [f"{path.parent.name}/{path.name} {content}\n" for path, content in zip(paths, sums)]
    return f"{zlib.crc32(os.fsencode(''.join(lines))):08x}"


def data_checksum(args, splits):
    """The checksum of all photos, masks and backgrounds. The splits do not change it."""
    paths = []
    for field in ("images", "masks"):
        paths += sorted(path for split in splits.values() for path in getattr(split, field))
    if args.backgrounds:
        for name in ("val", "test"):
            paths += list_photos(Path(args.backgrounds, name))
    return checksum_of(paths)


def network_checksum(backbone, runs, data):
    """The checksum of the folder of a hubconf.py: all its code, and the weights directly in it.
    None for other networks."""
    if ":" not in backbone:
        return None
    folder = Path(backbone.rpartition(":")[0])
    outer = (folder.resolve(), *folder.resolve().parents)
    ours = {Path(path).resolve() for path in (runs, data)}.difference(outer)
    files = []
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
        if not hidden and not any(place in path.resolve().parents for place in ours):
            files.append(path)
    weights = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".data", ".npz", ".npy",
               ".pkl", ".h5", ".json"}
    files += [path for path in visible(folder)
              if path.suffix.lower() in weights and path.is_file()]
    return checksum_of(files)


def weights_checksum(weights):
    """The checksum of a file of weights; None for other weights, and if the file is gone."""
    if is_file(weights) and Path(weights).is_file():
        return checksum_of([Path(weights)])
    return None


def warn_of_copies(args, splits):
    """Prints a line if the same photo stands in several classes: one of them is wrong."""
    classes = defaultdict(set)  # {content: classes}; the data's checksum has read all files already
    for split in splits.values():
        for image, label in zip(split.images, split.labels):
            classes[file_checksum(image)].add(class_name(args, image, label))
    copies = [sorted(names) for names in classes.values() if len(names) > 1]
    if copies:
        first, second = copies[0][:2]
        print(f"warning: {len(copies):,} photos are in several classes, such as {first} and "
              f"{second}; keep each photo in one class only")


def config_of(args, splits):
    """What a run is made of: arguments, checksums of its files, device and versions."""
    config = {"format": FORMAT, "args": vars(args), "data": data_checksum(args, splits),
              "network": network_checksum(args.backbone, args.runs, args.data),
              "weights": weights_checksum(args.weights),
              "distance": DISTANCES[args.loss].__name__, "device": args.device}
    if args.device.startswith("cuda"):
        config["device"] = torch.cuda.get_device_name(args.device)
    for module in (torch, torchvision, np):
        config[module.__name__] = module.__version__
    return config


def check_config(run, config):
    """Raises UserError if the run was begun with other settings, hyper-parameters, photos or
    network, or by another version."""
    before = json.loads((run / "config.json").read_text())
    if before.get("format") != FORMAT:
        raise UserError(f"{run}: another version of bgbias.py made it; give a new folder with "
                        "--runs")
    ignored = {*NAMED, *WHERE, "name", "settings", "backgrounds"}
    if config["args"]["measure"]:
        ignored |= set(HOW_TO_TRAIN)
    for key in sorted(config["args"].keys() - ignored):
        if key in before["args"] and before["args"][key] != config["args"][key]:
            what = "hyper-parameters" if key == "hparams" else key.replace("_", " ")
            raise UserError(f"{run}: {what} {before['args'][key]} became {config['args'][key]}; "
                            "restore the value, or give a new folder with --runs")
    for key in ("data", "network", "weights"):  # None if a weights file is gone
        if None not in (before.get(key), config[key]) and before[key] != config[key]:
            raise UserError(f"{run}: the files of its {key} have changed; restore them, or give a "
                            "new folder with --runs")


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        text = f"# Background bias, measured\n\n{NOTES}\n\n{report(Path(args.report))}\n"
        print(text)
        return write_text(Path(args.report, "report.md"), text)

    # 1. Look at the data first, because most mistakes are there, and finding them takes seconds.
    choose_device(args)
    splits = load_splits(args.dataset, args.data, measure=args.measure)
    if args.backgrounds:
        for name in ("val", "test"):
            pool, folder = list_backgrounds(args, name), Path(args.backgrounds, name)
            print_left_out(folder, visible(folder), pool)
    config = config_of(args, splits)

    # 2. A run is its folder. One that is finished or interrupted must be the same run.
    run = run_folder(args)
    finished, resumed = (run / "result.json").exists(), (run / "last.pt").exists()
    if finished or resumed:
        check_config(run, config)
    if finished:
        print(f"{run} is finished; delete its result.json to test it again, or the folder to train "
              "it again (as after a change of the code)")
        return print(f"\n{report(run.parent, only=run)}\n\n{NOTES}")

    # 3. The network. Wrong masks are found in a second, so they come before its download. A resumed
    # run loads its weights from last.pt, so it needs no download.
    check_masks(splits)
    weights = "none" if resumed else args.weights
    state = State(args, len(np.unique(splits["train"].labels)), weights)
    if resumed:
        state.load(run / "last.pt")
    if not args.measure:
        check_trainable(args, state.network)
    print_network(args, run, state)

    # 4. What is wrong with the photos must be known before hours of training, not after.
    warn_of_copies(args, splits)
    warn_of_few_classes(args, splits)
    if not args.measure:
        check_photos(args, splits["test"])
    if not resumed:
        (run / "attention.npz").unlink(missing_ok=True)  # scores of an earlier network
        write_text(run / "config.json", json.dumps(config, indent=2))
        write_left_out(run, splits["left_out"])

    # 5. Train, and go back to the best epoch. A measured network is saved as it is.
    if args.measure:
        state.save(run / "best.pt", optimiser=False)
    else:
        if not state.is_finished:
            train(args, splits, state, run)
        warn_of_no_gain(args, state)
    epochs, best_epoch = state.finished_epochs, state.best_epoch
    seconds = sum(row.get("seconds", 0) for row in state.history)
    state.load(run / "best.pt")
    if state.finished_epochs != best_epoch:
        raise UserError(f"{run}/best.pt: has the weights of epoch {state.finished_epochs}, and the "
                        f"best epoch is {best_epoch}; perhaps two processes trained this run at "
                        "the same time; delete its folder and train again")

    # 6. Test. result.json comes last: it says that the run is finished.
    test_batches = make_evaluation_batches(args, splits["test"], "test", DRAWS,
                                           conditions=("same_class", "any_class"))
    if args.measure:
        warn_of_test_photos(test_batches.photos)
    result, photos = run_test(state.network, test_batches, args)
    write_photos(run, args, splits["test"], photos)
    result = {**config, "epochs": epochs, "best_epoch": best_epoch, "seconds": seconds,
              "tested": heading_of(args, splits["test"], result, config), **result}
    write_text(run / "result.json", json.dumps(result, indent=2))
    print(f"\n{report(run.parent, only=run)}\n\n{NOTES}")


def heading_of(args, split, result, config):
    """The heading of a table: runs with the same heading were tested on the same photos."""
    sizes = np.unique(split.labels, return_counts=True)[1]
    chance = 100 * np.mean([draw["map@r"] for draw in result["test"]["chance"]])
    return (f"{args.name}: {(sizes > 1).sum():,} test classes, {len(split.labels):,} photos, "
            f"chance {chance:.2g} %, data {config['data']}")


def check_photos(args, split):
    """Decodes all test photos, so that a damaged one is found before the training. They are decoded
    again for the test, because keeping them would cost SOP 16 GB during the training."""
    photos = Photos(split.images, split.masks, args.image_size, keep=False)
    for _ in photos.decode_all("checking photos"):
        pass
    warn_of_test_photos(photos)
    if args.backgrounds:
        pool = Photos(list_backgrounds(args, "test"), None, args.image_size, keep=False)
        for _ in pool.decode_all("checking backgrounds"):
            pass


def warn_of_test_photos(photos):
    photos.warn_of_masks("test")
    photos.warn_of_crop("test")


def check_finite(embeddings, photos):
    """Raises UserError naming a photo whose embedding is nan or inf."""
    for draws in embeddings.values():
        broken = (~draws.isfinite()).any(dim=2).any(dim=0).nonzero()
        if len(broken) == len(photos):
            raise UserError("the network's output is not finite for any photo; train it with a "
                            "lower --lr, or correct the network")
        if len(broken):
            raise UserError(f"{photos.images[int(broken[0])]}: the network's output for it is not "
                            "finite; correct the network, or leave this photo out")


def warn_of_few_classes(args, splits):
    for name in ("test",) if args.measure else ("val", "test"):
        classes = len(np.unique(splits[name].labels))
        if 0 < classes < NOISY:
            print(f"note: only {classes} {name} classes; with fewer than {NOISY}, the numbers "
                  "are noisy")


def warn_of_no_gain(args, state):
    if max(state.scores[1:]) <= state.scores[0]:
        print("warning: no epoch was better than epoch 0, the network before the training; see "
              "Troubleshooting in README")


def write_left_out(run, left_out):
    """Writes left_out.csv, if photos were left out because of their mask."""
    (run / "left_out.csv").unlink(missing_ok=True)
    if left_out.images:
        rows = [(image, mask, f"{judge_mask(mask)[3]:.4f}")
                for image, mask in zip(left_out.images, left_out.masks)]
        write_csv(run / "left_out.csv", ["photo", "mask", "foreground"], rows)


def print_network(args, run, state):
    network = state.network
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    mean, std = (buffer.flatten().round().int().tolist() for buffer in (network.mean, network.std))
    resumed = f", resumed after epoch {state.finished_epochs}" if state.history else ""
    print(f"run: {run}{resumed}")
    print(f"network: {args.backbone}, {network.features:,} features, {parameters:,} trainable "
          f"parameters, on {args.device}")
    print(f"input: {args.image_size} px, (pixel - {mean}) / {std}, backgrounds of "
          f"{args.backgrounds or 'other photos'}", flush=True)


def print_epoch(args, state, splits):
    """Prints the last epoch. The time that is left includes the test."""
    row = state.history[-1]
    scores = "  ".join(f"{condition} {100 * row[condition]['map@r']:5.2f}"
                       for condition in ("clean", "replaced", "any_class") if condition in row)
    line = f"epoch {row['epoch']:3d}  "
    if row["epoch"] == 0:
        print(f"{line}val MAP@R {scores}  (before the training, never chosen)", flush=True)
        return
    views = sum(condition in row for condition in ("clean", "replaced", "any_class"))
    per_view = row["seconds_validation"] / (len(splits["val"].images) * views)
    of_test = per_view * len(splits["test"].images) * (19 if args.backgrounds else 14)
    left = row["seconds"] * (args.epochs - row["epoch"]) + of_test
    print(f"{line}loss {row['loss']:.4f}  val MAP@R {scores}  (best epoch by "
          f"{args.select}: {state.best_epoch})  {row['seconds']:.1f} s, up to {left / 60:.1f} min "
          "left", flush=True)


def command(main):
    """Runs a script's main(). A UserError ends in one line on stderr and exit code 2."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout has no reconfigure()
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes, or starts again if nothing was saved",
              file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename}: {error.strerror}; give a folder with room that you may "
              "write to (--runs, --data)", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        reason = str(error).split("UserError: ")[-1].strip()  # without a worker's traceback
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(main)
