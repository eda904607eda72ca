"""Foreground masks of a dataset's images, by rembg's u2net as in the paper, and how good they are.

    python masks.py --dataset cub200                       # masks for every image that has none yet
    python masks.py --dataset my_photos --model u2netp     # FOLDER/images/<class>/*.jpg
    python masks.py --dataset sop --shard 3/8              # images 3, 11, 19, ...: one job of eight
    python masks.py --dataset cub200 --verify --sheet cub200.png    # look at those that are there
    python masks.py --check ../gt                          # IoU and overlap against masks by hand

A mask is a soft 8-bit greyscale PNG of its image's size, 255 = foreground. ROOT/masks mirrors the
tree of the images (bgbias.mask_path). Stop at any moment: the same command goes on with the masks
that are missing. The exit code is 1 if an image failed or --verify found a mask missing or wrong.

rembg downloads a model once; U2NET_HOME names the folder. With `pip install "rembg[gpu]"` in place
of "rembg[cpu]" it runs on an NVIDIA GPU. Paper: masks in Section 3, their quality in Section 4.
"""

import argparse
import os
import random
import sys
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from bgbias import ALIASES, UserError, command, load_splits, one_line, open_rgb, shard, write

# The models of rembg that run on this machine and give one mask an image. rembg lists more: some
# send the images away and bill for it, some want prompts, some give several masks.
MODELS = ("u2net", "u2netp", "u2net_human_seg", "silueta", "isnet-general-use", "isnet-anime",
          "birefnet-general", "birefnet-general-lite", "birefnet-portrait", "birefnet-dis",
          "birefnet-hrsod", "birefnet-cod", "birefnet-massive", "bria-rmbg")
THRESHOLD = 128  # a pixel is foreground from this value up, as in the paper
EMPTY, FULL = 0.01, 0.99  # a mask with less or more foreground than this is suspicious
THREADS = 2  # while one is in the network, the other reads or writes files
SHEET, ACROSS, THUMB = 48, 3, 160  # contact sheet: photos, photos a row, px of a tile

# What became of an image. share: of foreground in its mask, nan if nobody looked. note: the path
# and the reason if something is wrong.
Outcome = namedtuple("Outcome", "image mask state share note", defaults=(np.nan, ""))
FAULTS = ("missing", "wrong", "failed")
STATES = ("new", "skipped", "present", *FAULTS)

# ---- 1. Masks (Section 3) ------------------------------------------------------------------------


def rembg_model(name):
    """A model of rembg as a function: RGB (H, W, 3) uint8 -> soft mask (H, W) uint8. Like the
    paper's masks, it is not post-processed. Raises UserError."""
    try:
        from rembg import new_session, remove  # here, because this import takes long
    except (ImportError, SystemExit) as error:  # rembg exits where there is no onnxruntime
        raise UserError("rembg or its onnxruntime is missing; "
                        'pip install "rembg[cpu]", or "rembg[gpu]"') from error
    try:
        session = new_session(name)  # always named: rembg's default is another model than u2net
    except Exception as error:  # of the download or of onnxruntime, which have their own classes
        home = os.environ.get("U2NET_HOME") or "a folder that U2NET_HOME names"
        raise UserError(f"--model {name}: no download, or a broken file ({type(error).__name__}); "
                        "get it from github.com/danielgatis/rembg/releases/tag/v0.0.0 and put it, "
                        f"as {name}.onnx, into {home}") from error
    print(f"{name} on {session.inner_session.get_providers()[0]}", flush=True)
    return lambda pixels: remove(pixels, session=session, only_mask=True)


def make_masks(pairs, model):
    """Makes the masks that are missing among `pairs`, [(image, mask)]; returns an Outcome a pair.
    Raises UserError if there is no model or a mask cannot be written."""
    segment = None if all(mask.exists() for _, mask in pairs) else rembg_model(model)

    def make(pair):
        image, mask = pair
        if mask.exists():
            return Outcome(image, mask, "skipped")
        try:
            # An array, because rembg turns photos as their EXIF data says, and bgbias.py does not.
            values = segment(np.asarray(open_rgb(image)))
        except UserError as error:
            return Outcome(image, mask, "failed", note=str(error))
        except Exception as error:  # of onnxruntime: one image shall not stop the others
            return Outcome(image, mask, "failed", note=f"{image}: {one_line(error)}")
        write(mask, lambda draft: Image.fromarray(values).save(draft, "PNG"))
        return Outcome(image, mask, "new", (values >= THRESHOLD).mean())

    return in_parallel(make, pairs, model)


def in_parallel(work, items, label):
    """[work(item)] in order, THREADS at a time, with a progress bar; an exception ends it all."""
    with ThreadPoolExecutor(THREADS) as threads:
        results = threads.map(work, items)
        return list(tqdm(results, label, len(items), unit=" images", mininterval=5))


def verify(pair):
    """The Outcome of (image, mask) as they are on disk."""
    image, mask = pair
    if not mask.exists():
        return Outcome(image, mask, "missing", note=str(mask))
    try:
        with Image.open(image) as photo, Image.open(mask) as saved:
            if (saved.mode, saved.size) == ("L", photo.size):
                share = (np.asarray(saved) >= THRESHOLD).mean()
                return Outcome(image, mask, "present", share)
            fault = f"{saved.mode} {saved.size}, should be L {photo.size}"
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        fault = one_line(error)
    return Outcome(image, mask, "wrong", note=f"{mask}: {fault}; delete it and make it again")


def summarise(outcomes):
    """Prints how many images are in which state, and the paths of suspicious masks and of faults.
    Returns whether there are no faults."""
    counts = Counter(outcome.state for outcome in outcomes)
    states = ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
    print(f"{len(outcomes):,} images: {states}")
    empty, full = f"empty, under {EMPTY:.0%} foreground", f"full, over {FULL:.0%} foreground"
    lists = {empty: [outcome.mask for outcome in outcomes if outcome.share < EMPTY],
             full: [outcome.mask for outcome in outcomes if outcome.share > FULL]}
    for fault in FAULTS:
        lists[fault] = [outcome.note for outcome in outcomes if outcome.state == fault]
    for title, lines in lists.items():
        if lines:
            print(f"{title}: {len(lines):,}", *lines, sep="\n  ")
    return not any(lists[fault] for fault in FAULTS)


# ---- 2. Their quality (Section 4) ----------------------------------------------------------------

# How well a mask fits the one made by hand. truth: path of the latter. image: path, None without.
Quality = namedtuple("Quality", "iou overlap truth image mask")


def mask_quality(pred, truth):
    """(IoU, overlap) of two masks (H, W) in [0, 255], thresholded at 128 (Section 4). Overlap: the
    share of the true mask that `pred` covers. Raises ValueError: two sizes or an empty truth."""
    pred, truth = np.asarray(pred) >= THRESHOLD, np.asarray(truth) >= THRESHOLD
    if pred.shape != truth.shape:
        raise ValueError(f"predicted mask (H, W) {pred.shape}, true mask {truth.shape}")
    if not truth.any():
        raise ValueError("the true mask is empty")
    both = (pred & truth).sum()
    return float(both / (pred | truth).sum()), float(both / truth.sum())


def check(folder, model):
    """[Quality] of the mask of every *_mask.png, made by hand, below `folder`, and prints it. The
    mask is *_mask_pred.png, or else what `model` makes of *_image.*. Raises UserError."""
    truths = sorted(Path(folder).rglob("*_mask.png"))
    if not truths:
        raise UserError(f"--check {folder}: no *_mask.png in this folder")
    results = []
    segment = None
    print(f"{'IoU':>8s} {'overlap':>8s}")
    for truth in truths:
        stem = truth.name.removesuffix("mask.png")
        pred = truth.with_name(f"{stem}mask_pred.png")
        images = [path for path in truth.parent.iterdir() if path.name.startswith(f"{stem}image.")]
        if pred.exists():
            mask = np.asarray(open_rgb(pred).getchannel(0))
        elif images:
            segment = segment or rembg_model(model)
            mask = segment(np.asarray(open_rgb(images[0])))
        else:
            raise UserError(f"{truth}: neither {pred.name} nor {stem}image.* beside it")
        try:
            iou, overlap = mask_quality(mask, open_rgb(truth).getchannel(0))
        except ValueError as error:
            raise UserError(f"{truth}: {error}") from error
        results.append(Quality(iou, overlap, truth, images[0] if images else None, mask))
        print(f"{iou:8.4f} {overlap:8.4f}  {truth}", flush=True)
    return results


def print_statistics(results):
    """Of each folder, and of all if there are several; std is the population's (ddof 0)."""
    folders = defaultdict(list)
    for result in results:
        folders[result.truth.parent.name].append((result.iou, result.overlap))
    if len(folders) > 1:
        folders["all"] = [(result.iou, result.overlap) for result in results]
    titles = ("mean", "std", "median", "q1", "q3", "min", "max")
    print(f"\n{'':30s}" + "".join(f"{title:>8s}" for title in titles))
    for name, scores in folders.items():
        for title, values in zip(("IoU", "overlap"), np.transpose(scores)):
            figures = values.mean(), values.std(), *np.percentile(values, (50, 25, 75, 0, 100))
            cells = "".join(f"{figure:8.4f}" for figure in figures)
            print(f"{f'{name} ({len(scores)}) {title}':30s}{cells}")


# ---- 3. Contact sheet ----------------------------------------------------------------------------


def suspicious_first(outcomes):
    """Entries of a contact sheet: suspicious masks, then some at random."""
    shown = [outcome for outcome in outcomes if outcome.state not in FAULTS]
    random.Random(0).shuffle(shown)
    shown.sort(key=lambda outcome: not (outcome.share < EMPTY or outcome.share > FULL))
    return [(outcome.image, np.asarray(open_rgb(outcome.mask).getchannel(0)),
             "/".join(outcome.image.parts[-2:])) for outcome in shown[:SHEET]]


def worst_first(results):
    """Entries of a contact sheet: the masks that fit worst."""
    shown = sorted((r for r in results if r.image), key=lambda r: r.iou)
    return [(r.image, r.mask, f"{r.truth} IoU {r.iou:.2f}") for r in shown[:SHEET]]


def contact_sheet(entries, out):
    """Writes the PNG `out`: photo, mask and cut-out of each entry (image, mask (H, W), caption).
    Raises UserError if there is none."""
    if not entries:
        raise UserError(f"--sheet {out}: no image with a mask to show")
    width, height = 3 * THUMB + 16, THUMB + 20  # of an entry
    rows = -(-len(entries) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, mask, caption) in enumerate(entries):
        x, y = i % ACROSS * width, i // ACROSS * height
        photo = open_rgb(image)
        photo.thumbnail((THUMB, THUMB))
        mask = Image.fromarray(mask).resize(photo.size)
        cutout = Image.composite(photo, Image.new("RGB", photo.size, "magenta"), mask)
        for k, tile in enumerate((photo, mask, cutout)):
            sheet.paste(tile, (x + k * THUMB, y))
        draw.text((x + 2, y + photo.height + 2), caption[-75:], "black")
    write(Path(out), lambda draft: sheet.save(draft, "PNG"))
    print(f"contact sheet: {out}")


# ---- 4. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Foreground masks with rembg, and their quality (Kobs & Hotho, 2022).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--dataset", help="cars196, cub200, sop, or a folder with images/<class>/")
    either.add_argument("--check", metavar="FOLDER", help="score *_mask_pred.png, or without "
                        "one what --model makes of *_image.*, against *_mask.png, made by hand")
    add("--data", default="data", help="folder that holds the named datasets")
    add("--model", default="u2net", choices=MODELS, help="rembg's name of it; the paper's is u2net")
    add("--shard", default="1/1", type=shard, metavar="I/N", help="every N-th image from the I-th: "
        "the share of one of N jobs")
    add("--verify", action="store_true", help="make none, look at those that are there")
    add("--sheet", metavar="OUT.png", help=f"contact sheet of {SHEET}: suspicious masks first, "
        "with --check the worst first")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.sheet and (Path(args.sheet).suffix != ".png" or Path(args.sheet).is_dir()):
        raise UserError(f"--sheet {args.sheet}: give the name of a .png file")
    if args.check:
        results = check(args.check, args.model)
        print_statistics(results)
        if args.sheet:
            contact_sheet(worst_first(results), args.sheet)
        return
    dataset = ALIASES.get(args.dataset, args.dataset)
    splits = load_splits(dataset, args.data, need_masks=False)
    pairs = [pair for split in splits.values() for pair in zip(split.images, split.masks)]
    first, jobs = args.shard
    pairs = pairs[first - 1::jobs]
    if args.verify:
        outcomes = in_parallel(verify, pairs, "verify")
    else:
        outcomes = make_masks(pairs, args.model)
    sound = summarise(outcomes)
    if args.sheet:
        contact_sheet(suspicious_first(outcomes), args.sheet)
    if not sound:
        sys.exit(1)


if __name__ == "__main__":
    command("masks.py", main)
