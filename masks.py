"""Makes foreground masks of a dataset with rembg's u2net, as in the paper, and checks them.

    python masks.py --dataset cub200                       # masks for all images without one
    python masks.py --dataset my_photos --model u2netp     # FOLDER/images/<class>/*.jpg
    python masks.py --dataset sop --shard 3/8              # job 3 of 8: images 3, 11, 19, ...
    python masks.py --dataset cub200 --verify --sheet cub200.png    # look at the existing masks
    python masks.py --check ../gt                          # IoU and overlap with hand-made masks

A mask is a soft 8-bit greyscale PNG of its image's size, 255 = foreground. ROOT/masks mirrors the
tree of the images (bgbias.mask_path). Existing masks are kept and judged; if none is missing, a
second start judges them only with --verify. ROOT/masks.csv has a row for each photo. Interrupt this
script at any time: the same command makes the missing masks. The exit code is 1 if an image failed,
or if a mask that was judged is missing, wrong or shared by two photos. rembg downloads a model
once, into the folder that the variable U2NET_HOME names.
"""

import argparse
import csv
import io
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from bgbias import (EMPTY, FULL, FUZZY, THRESHOLD, UserError, command, dataset_root,
                    describe_strays, load_splits, mask_shares, open_image, open_mask, open_pair,
                    open_rgb, shared_masks, write, write_text)

# These models of rembg run on this machine and give one mask per image. Its other models send the
# images to a paid service, need prompts, or give several masks.
MODELS = ("u2net", "u2netp", "u2net_human_seg", "silueta", "isnet-general-use", "isnet-anime",
          "birefnet-general", "birefnet-general-lite", "birefnet-portrait", "birefnet-dis",
          "birefnet-hrsod", "birefnet-cod", "birefnet-massive", "bria-rmbg")
CUT_OUT = 0.95  # a photo with more foreground in its alpha channel is no cut-out
FAULTS = ("missing", "wrong", "failed", "shared")  # states without a usable mask
LISTED = 10  # masks of each fault that are printed; masks.csv has all of them
SHEET, ACROSS, THUMB = 48, 3, 160  # contact sheet: photos, photos per row, px of a tile

# ---- 1. Masks (Section 3) ------------------------------------------------------------------------

# state: new, from transparency, present, or in FAULTS. foreground, grey: shares of the mask's
# pixels. error: what is wrong with the photo or its mask.
Outcome = namedtuple("Outcome", "state image mask foreground grey error", defaults=(None, None, ""))


def rembg_model(name):
    """A function: path of an image -> its mask, a greyscale PIL image. The mask is soft and not
    post-processed, as in the paper. Raises UserError if the model cannot be downloaded."""
    try:
        from rembg import new_session, remove  # here, because the import is slow
    except RuntimeError as error:  # numba, which rembg imports: docker --user leaves no home folder
        raise UserError(f"rembg: {error}; set the environment variable NUMBA_CACHE_DIR to a folder "
                        "that is writable") from error
    try:
        session = new_session(name)  # always named, because rembg's default is not u2net
    except OSError as error:
        raise UserError(f"--model {name}: the download failed ({error}); download {name}.onnx from "
                        "github.com/danielgatis/rembg/releases/tag/v0.0.0 and set U2NET_HOME to "
                        "its folder") from error
    print(f"{name} on {session.inner_session.get_providers()[0]}", flush=True)

    def segment(image):
        return Image.fromarray(remove(np.asarray(open_rgb(image)), session=session, only_mask=True))
    return segment


def alpha_of(image):
    """The alpha channel of a cut-out, which is its mask; None for other photos."""
    alpha = open_image(image).convert("RGBA").getchannel("A")
    return alpha if 0 < (np.asarray(alpha) >= THRESHOLD).mean() < CUT_OUT else None


def make(image, mask, segment):
    """Makes the mask of an image; returns the Outcome. A failed image is recorded; the others
    continue. Raises UserError if the mask cannot be written."""
    try:
        alpha = alpha_of(image)
        made = alpha or segment(image)
        if made.getextrema()[1] < THRESHOLD:  # no object was found; what is left would look like
            made = Image.new("L", made.size)  # labels to open_mask()
    except UserError as error:
        return Outcome("failed", image, mask, error=str(error))
    except Exception as error:  # onnxruntime raises nearly anything
        return Outcome("failed", image, mask, error=f"{image}: {error}")
    try:
        write(mask, lambda draft: made.save(draft, "PNG"))
    except OSError as error:
        raise UserError(f"{mask}: cannot be written ({error.strerror}); make the folder masks/ "
                        "writable, or a link to a folder that is") from error
    return Outcome("from transparency" if alpha else "new", image, mask, *mask_shares(made))


def verify(image, mask):
    """The Outcome of an image and its existing mask."""
    if not mask.exists():
        return Outcome("missing", image, mask, error=str(mask))
    try:
        _, saved = open_pair(image, mask)
    except UserError as error:
        return Outcome("wrong", image, mask, error=str(error))
    return Outcome("present", image, mask, *mask_shares(saved))


def suspicion(outcome):
    """What is suspicious about a readable mask; "" if nothing is."""
    if outcome.state in FAULTS:
        return ""
    reasons = []
    if outcome.foreground < EMPTY:
        reasons.append("nearly empty")
    if outcome.foreground > FULL:
        reasons.append("nearly full")
    if outcome.grey > FUZZY:
        reasons.append("fuzzy")
    return " and ".join(reasons)


def summarise(outcomes):
    """Prints the number of images in each state, then the first images of each fault."""
    counts = Counter(outcome.state for outcome in outcomes).most_common()
    states = ", ".join(f"{count:,} {state}" for state, count in counts)
    print(f"{len(outcomes):,} images: {states}")
    problems = defaultdict(list)
    for outcome in outcomes:
        if suspicion(outcome):
            shares = f"{outcome.foreground:.1%} foreground, {outcome.grey:.0%} grey"
            problems["suspicious"].append(f"{outcome.mask}: {suspicion(outcome)} ({shares})")
        elif outcome.error:
            problems[outcome.state].append(outcome.error)
    for problem, lines in sorted(problems.items()):
        print(f"{problem}: {len(lines):,}")
        for line in lines[:LISTED]:
            print(f"  {line}")
        if len(lines) > LISTED:
            print(f"  and {len(lines) - LISTED:,} more")


def write_table(outcomes, root):
    """Writes ROOT/masks.csv: a row for each photo, by its path below the root."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["photo", "state", "foreground", "grey"])
    for outcome in outcomes:
        shares = ["", ""]
        if outcome.state not in FAULTS:
            shares = [f"{outcome.foreground:.4f}", f"{outcome.grey:.4f}"]
        state = "suspicious" if suspicion(outcome) else outcome.state
        writer.writerow([outcome.image.relative_to(root).as_posix(), state, *shares])
    try:
        write_text(root / "masks.csv", table.getvalue())
    except OSError as error:
        print(f"{root / 'masks.csv'}: not written ({error.strerror})")
    else:
        print(f"{root / 'masks.csv'}: the state of every mask")


# ---- 2. Quality of masks (Section 4) -------------------------------------------------------------

# truth: path of the hand-made mask. image: path or None. mask: PIL image.
Quality = namedtuple("Quality", "iou overlap truth image mask")


def mask_quality(pred, truth):
    """(IoU, overlap) of two masks (H, W) in [0, 255], thresholded at 128 (Section 4). The overlap
    is the share of the true mask that `pred` covers. Raises ValueError if the sizes differ or the
    true mask is empty."""
    pred, truth = np.asarray(pred) >= THRESHOLD, np.asarray(truth) >= THRESHOLD
    if pred.shape != truth.shape:
        raise ValueError(f"the predicted mask is (H, W) {pred.shape}, the true mask {truth.shape}")
    if not truth.any():
        raise ValueError("the true mask is empty")
    both = (pred & truth).sum()
    return float(both / (pred | truth).sum()), float(both / truth.sum())


def check(folder, model):
    """[Quality] of every hand-made *_mask.png below `folder`; prints each. It is compared with
    *_mask_pred.png or, if that is missing, with `model`'s mask of *_image.*. Raises UserError."""
    truths = sorted(Path(folder).rglob("*_mask.png"))
    if not truths:
        raise UserError(f"--check {folder}: it contains no *_mask.png; give a folder that does")
    results = []
    segment = None
    print(f"{'IoU':>8s} {'overlap':>8s}")
    for truth in truths:
        stem = truth.name.removesuffix("mask.png")
        pred = truth.with_name(f"{stem}mask_pred.png")
        beside = (path for path in truth.parent.iterdir() if path.name.startswith(f"{stem}image."))
        image = next(beside, None)
        if pred.exists():
            mask = open_mask(pred)
        elif image:
            segment = segment or rembg_model(model)
            mask = segment(image)
        else:
            raise UserError(f"{truth}: {pred.name} and {stem}image.* are missing; add one of them")
        try:
            iou, overlap = mask_quality(mask, open_mask(truth))
        except ValueError as error:
            raise UserError(f"{truth}: {error}; correct or remove this file") from error
        results.append(Quality(iou, overlap, truth, image, mask))
        print(f"{iou:8.4f} {overlap:8.4f}  {truth}", flush=True)
    return results


def print_statistics(results):
    """Prints one line per folder, as in the paper's table; std has ddof 0."""
    folders = defaultdict(list)
    for result in results:
        folders[result.truth.parent.name].append((result.iou, result.overlap))
    print(f"\n{'':20s}  images  IoU mean     std  median  overlap mean")
    for name, scores in folders.items():
        iou, overlap = np.transpose(scores)
        print(f"{name:20s}{len(scores):8d}{iou.mean():10.4f}{iou.std():8.4f}{np.median(iou):8.4f}"
              f"{overlap.mean():14.4f}")


# ---- 3. Contact sheet ----------------------------------------------------------------------------


def half_suspicious(outcomes):
    """The entries of a contact sheet. One half are suspicious masks, the other half ordinary ones,
    both at random. If there are too few of one kind, there are more of the other."""
    shown = [outcome for outcome in outcomes if outcome.state not in FAULTS]
    random.Random(0).shuffle(shown)
    suspicious = [outcome for outcome in shown if suspicion(outcome)]
    ordinary = [outcome for outcome in shown if not suspicion(outcome)]
    chosen = suspicious[:max(SHEET // 2, SHEET - len(ordinary))]
    chosen += ordinary[:SHEET - len(chosen)]
    entries = []
    for outcome in chosen:
        name = "/".join(outcome.image.parts[-2:])
        reason = f"{suspicion(outcome) or 'ordinary'}, {outcome.foreground:.1%} foreground"
        entries.append((outcome.image, open_mask(outcome.mask), name, reason))
    return entries


def contact_sheet(entries, out):
    """Writes the PNG `out`: photo, mask and cut-out of each (photo's path, mask, name, reason)."""
    if not entries:
        raise UserError(f"--sheet {out}: there are no masks to show; make masks first")
    width, height = 3 * THUMB + 16, THUMB + 34  # of an entry; two lines of text are 30 px
    titles = 16
    rows = math.ceil(len(entries) / ACROSS)
    sheet = Image.new("RGB", (ACROSS * width, titles + rows * height), "lightgrey")
    draw = ImageDraw.Draw(sheet)
    for x in range(0, sheet.width, width):
        for k, title in enumerate(("photo", "mask", "cut-out")):
            draw.text((x + k * THUMB + 2, 2), title, "black")
    for i, (image, mask, name, reason) in enumerate(entries):
        x, y = i % ACROSS * width, titles + i // ACROSS * height
        photo = open_rgb(image)
        photo.thumbnail((THUMB, THUMB))
        mask = mask.resize(photo.size)
        cutout = Image.composite(photo, Image.new("RGB", photo.size, "magenta"), mask)
        for k, tile in enumerate((photo, mask, cutout)):
            sheet.paste(tile, (x + k * THUMB, y))
        while draw.textlength(name) > 3 * THUMB:  # the end of a long name tells most
            name = name[1:]
        draw.text((x + 2, y + photo.height + 2), f"{name}\n{reason}", "black")
    write(out, lambda draft: sheet.save(draft, "PNG"))
    print(f"contact sheet: {out}")


# ---- 4. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Make foreground masks with rembg, or check masks (Kobs & Hotho 2022).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--dataset", type=os.path.expanduser,
                        help="cars196, cub200, sop, or a folder with images/<class>/")
    either.add_argument("--check", metavar="FOLDER", type=os.path.expanduser, help="compare "
                        "hand-made *_mask.png with *_mask_pred.png, or with what --model makes of "
                        "*_image.*")
    add("--data", default="data", type=os.path.expanduser, help="folder of the named datasets")
    add("--model", default="u2net", choices=MODELS, help="a model of rembg; the paper's is u2net")
    add("--shard", default="1/1", metavar="I/N", help="process every N-th image from the I-th on")
    add("--verify", action="store_true", help="check the existing masks and make none")
    add("--sheet", type=Path, metavar="OUT.png", help=f"draw a contact sheet of {SHEET} masks, "
        "half of them suspicious, or with --check the worst")
    return parser.parse_args(argv)


def process(pairs, shared, args):
    """[Outcome] of (image, mask) pairs. Makes the missing masks, except with --verify."""
    segment = None
    if not args.verify and not all(mask.exists() for _, mask in pairs):
        segment = rembg_model(args.model)
    outcomes = []
    for image, mask in tqdm(pairs, unit=" images", mininterval=5):
        if mask in shared:
            error = f"{image}: another photo has the same mask, {mask}; rename one of them"
            outcomes.append(Outcome("shared", image, mask, error=error))
        elif args.verify or mask.exists():
            outcomes.append(verify(image, mask))
        else:
            outcomes.append(make(image, mask, segment))
    return outcomes


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        results = check(args.check, args.model)
        print_statistics(results)
        if args.sheet:
            worst_first = [(result.image, result.mask, str(result.truth), f"IoU {result.iou:.2f}")
                           for result in sorted(results) if result.image]
            contact_sheet(worst_first[:SHEET], args.sheet)
        return
    numbers = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    first, jobs = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= first <= jobs:
        raise UserError(f"--shard {args.shard}: give I/N with I from 1 to N")
    splits = load_splits(args.dataset, args.data, need_masks=False, measure="all")
    root = dataset_root(args.dataset, args.data)
    pairs = [pair for split in splits.values() for pair in zip(split.images, split.masks)]
    masks = [mask for _, mask in pairs]
    strays = describe_strays(root, masks)
    if strays:
        print(strays)
    pairs = pairs[first - 1::jobs]
    # To judge the masks of 100,000 photos takes an hour. A job that starts again need not do it.
    judged = jobs > 1 or (root / "masks.csv").exists()
    if judged and not args.verify and not args.sheet and all(mask.exists() for _, mask in pairs):
        return print(f"{len(pairs):,} images: all have a mask; --verify checks the masks")
    outcomes = process(pairs, shared_masks(masks), args)
    summarise(outcomes)
    if jobs == 1:
        write_table(outcomes, root)
    if args.sheet:
        contact_sheet(half_suspicious(outcomes), args.sheet)
    if any(outcome.state in FAULTS for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    command(main)
