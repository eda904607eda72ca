"""Makes foreground masks of a dataset with rembg's u2net, as in the paper, and checks them.

    python masks.py --dataset cub200                       # masks for all images without one
    python masks.py --dataset my_photos --model u2netp     # FOLDER/images/<class>/*.jpg
    python masks.py --dataset sop --shard 3/8              # job 3 of 8: images 3, 11, 19, ...
    python masks.py --dataset cub200 --verify --sheet cub200.png    # look at the existing masks
    python masks.py --check ../gt                          # IoU and overlap with hand-made masks

A mask is a soft 8-bit greyscale PNG of its image's size, 255 = foreground. ROOT/masks mirrors the
tree of the images (bgbias.mask_path). Interrupt this script at any time: the same command makes the
missing masks. The exit code is 1 if an image failed, or if --verify found a missing or wrong mask.
rembg downloads a model once, into the folder that the variable U2NET_HOME names.
"""

import argparse
import random
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from bgbias import (THRESHOLD, UserError, command, load_splits, mask_faults, open_image, open_mask,
                    open_pair, open_rgb, write)

# These models of rembg run on this machine and give one mask per image. Its other models send the
# images to a paid service, need prompts, or give several masks.
MODELS = ("u2net", "u2netp", "u2net_human_seg", "silueta", "isnet-general-use", "isnet-anime",
          "birefnet-general", "birefnet-general-lite", "birefnet-portrait", "birefnet-dis",
          "birefnet-hrsod", "birefnet-cod", "birefnet-massive", "bria-rmbg")
CUT_OUT = 0.95  # a photo with more foreground in its alpha channel is no cut-out
FAULTS = ("missing", "wrong", "failed")  # states without a usable mask
SHEET, ACROSS, THUMB = 48, 3, 160  # contact sheet: photos, photos per row, px of a tile

# ---- 1. Masks (Section 3) ------------------------------------------------------------------------

# state: new, from transparency, skipped, present, suspicious, or in FAULTS. note: path and problem.
Outcome = namedtuple("Outcome", "state image mask note", defaults=("",))


def rembg_model(name):
    """A function: path of an image -> its mask, a greyscale PIL image. The mask is soft and not
    post-processed, as in the paper. Raises UserError if the model cannot be downloaded."""
    from rembg import new_session, remove  # here, because the import is slow

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
    """Makes the mask of an image unless it exists; returns the Outcome. A failed image is recorded;
    the others continue."""
    if mask.exists():
        return Outcome("skipped", image, mask)
    try:
        alpha = alpha_of(image)
        made = alpha or segment(image)
    except Exception as error:  # onnxruntime and Pillow raise nearly anything
        return Outcome("failed", image, mask, f"{image}: {error}")
    write(mask, lambda draft: made.save(draft, "PNG"))
    return judge("from transparency" if alpha else "new", image, mask, made)


def verify(image, mask):
    """The Outcome of an image and its existing mask."""
    if not mask.exists():
        return Outcome("missing", image, mask, str(mask))
    try:
        _, saved = open_pair(image, mask)
    except UserError as error:
        return Outcome("wrong", image, mask, str(error))
    return judge("present", image, mask, saved)


def judge(state, image, mask, pixels):
    """The Outcome of a readable mask: `state`, or suspicious if mask_faults() finds one."""
    empty, full, fuzzy, share = mask_faults(pixels)
    if empty or full or fuzzy:
        note = f"{mask}: {share:.1%} foreground{', fuzzy' * bool(fuzzy)}"
        return Outcome("suspicious", image, mask, note)
    return Outcome(state, image, mask)


def summarise(outcomes):
    """Prints the number of images in each state, and the notes on single images."""
    counts = Counter(outcome.state for outcome in outcomes).most_common()
    states = ", ".join(f"{count:,} {state}" for state, count in counts)
    print(f"{len(outcomes):,} images: {states}")
    for outcome in sorted(outcomes, key=lambda outcome: outcome.state):
        if outcome.note:
            print(f"  {outcome.state}: {outcome.note}")


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


def suspicious_first(outcomes):
    """The entries of a contact sheet: suspicious masks come first, then random ones."""
    shown = [outcome for outcome in outcomes if outcome.state not in FAULTS]
    random.Random(0).shuffle(shown)
    shown.sort(key=lambda outcome: outcome.state != "suspicious")
    return [(outcome.image, open_mask(outcome.mask), "/".join(outcome.image.parts[-2:]))
            for outcome in shown[:SHEET]]


def contact_sheet(entries, out):
    """Writes the PNG `out`: photo, mask and cut-out of each (path of the photo, mask, caption)."""
    if not entries:
        raise UserError(f"--sheet {out}: there are no masks to show; make masks first")
    width, height = 3 * THUMB + 16, THUMB + 20  # of an entry
    rows = -(-len(entries) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, mask, caption) in enumerate(entries):
        x, y = i % ACROSS * width, i // ACROSS * height
        photo = open_rgb(image)
        photo.thumbnail((THUMB, THUMB))
        mask = mask.resize(photo.size)
        cutout = Image.composite(photo, Image.new("RGB", photo.size, "magenta"), mask)
        for k, tile in enumerate((photo, mask, cutout)):
            sheet.paste(tile, (x + k * THUMB, y))
        draw.text((x + 2, y + photo.height + 2), caption[-75:], "black")
    write(out, lambda draft: sheet.save(draft, "PNG"))
    print(f"contact sheet: {out}")


# ---- 4. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Make foreground masks with rembg, or check masks (Kobs & Hotho 2022).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--dataset", help="cars196, cub200, sop, or a folder with images/<class>/")
    either.add_argument("--check", metavar="FOLDER", help="compare hand-made *_mask.png with "
                        "*_mask_pred.png, or with what --model makes of *_image.*")
    add("--data", default="data", help="folder that holds the named datasets")
    add("--model", default="u2net", choices=MODELS, help="a model of rembg; the paper's is u2net")
    add("--shard", default="1/1", metavar="I/N", help="process every N-th image from the I-th on")
    add("--verify", action="store_true", help="check the existing masks instead of making masks")
    add("--sheet", type=Path, metavar="OUT.png", help=f"draw a contact sheet of {SHEET} masks, "
        "suspicious masks first, or with --check the worst first")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        results = check(args.check, args.model)
        print_statistics(results)
        if args.sheet:
            worst_first = [(result.image, result.mask, f"{result.truth} IoU {result.iou:.2f}")
                           for result in sorted(results) if result.image]
            contact_sheet(worst_first[:SHEET], args.sheet)
        return
    splits = load_splits(args.dataset, args.data, need_masks=False, training=False)
    pairs = [pair for split in splits.values() for pair in zip(split.images, split.masks)]
    first, jobs = map(int, args.shard.split("/"))
    if not 1 <= first <= jobs:
        raise UserError(f"--shard {args.shard}: give I/N with I from 1 to N")
    pairs = pairs[first - 1::jobs]
    segment = None
    if not args.verify and not all(mask.exists() for _, mask in pairs):
        segment = rembg_model(args.model)
    outcomes = []
    for image, mask in tqdm(pairs, unit=" images", mininterval=5):
        existing = args.verify or args.sheet and mask.exists()
        outcomes.append(verify(image, mask) if existing else make(image, mask, segment))
    summarise(outcomes)
    if args.sheet:
        contact_sheet(suspicious_first(outcomes), args.sheet)
    if any(outcome.state in FAULTS for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    command(main)
