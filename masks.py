"""Foreground masks of a dataset's images, by rembg's u2net as in the paper, and how good they are.

    python masks.py --dataset cub200                       # masks for every image that has none yet
    python masks.py --dataset my_photos --model u2netp     # FOLDER/images/<class>/*.jpg
    python masks.py --dataset sop --shard 3/8              # images 3, 11, 19, ...: one job of eight
    python masks.py --dataset cub200 --verify --sheet cub200.png
    python masks.py --check ../gt                          # IoU and overlap against masks by hand

A mask is a soft 8-bit greyscale PNG of its image's size, 255 = foreground, and lies where
bgbias.mask_path says: ROOT/masks mirrors the image tree. Stop at any moment; the same command goes
on with what is missing. Exit code 1: an image failed, or --verify found a mask missing or wrong.

rembg downloads a model once; U2NET_HOME names the folder. With `pip install "rembg[gpu]"` in place
of "rembg[cpu]" it runs on an NVIDIA GPU. Paper: masks in Section 3, their quality in Section 4.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from bgbias import ALIASES, UserError, command, load_index, open_rgb, shard, write

# rembg's models that run on this machine and give one mask an image. Not what rembg lists: some of
# its models send the images away and bill, some need prompts, some give several masks.
MODELS = ("u2net", "u2netp", "u2net_human_seg", "silueta", "isnet-general-use", "isnet-anime",
          "birefnet-general", "birefnet-general-lite", "birefnet-portrait", "birefnet-dis",
          "birefnet-hrsod", "birefnet-cod", "birefnet-massive", "bria-rmbg")
THRESHOLD = 128  # foreground is >= 128, as in the paper
EMPTY, FULL = 0.01, 0.99  # shares of foreground beyond which a mask is suspicious
THREADS, IN_NETWORK = 4, 2  # two decode or write; of two in rembg, one prepares, one computes
PNG_END = b"IEND\xaeB`\x82"
SHEET, ACROSS, THUMB = 48, 3, 160  # contact sheet: entries, entries a row, px

# What became of one image. looks: empty, full or "". note: path and reason of missing and failed.
STATES = ("new", "skipped", "failed", "present", "missing", "wrong")
Row = namedtuple("Row", "image mask state looks note", defaults=("", ""))

# ---- 1. Masks (Section 3) ------------------------------------------------------------------------


def load_model(name):
    """rembg's model as a function: RGB (H, W, 3) uint8 -> soft mask (H, W) uint8, 255 = foreground.
    Mask only, no post-processing: the paper's masks. Raises UserError."""
    try:
        from rembg import new_session, remove  # here, because it takes its time
    except (ImportError, SystemExit) as error:  # rembg exits where there is no onnxruntime
        raise UserError("rembg or its onnxruntime is missing; "
                        'pip install "rembg[cpu]", or "rembg[gpu]"') from error
    try:
        session = new_session(name)
    except Exception as error:  # offline, broken file: each library below has its own classes
        home = os.environ.get("U2NET_HOME") or "a folder that U2NET_HOME names"
        raise UserError(f"--model {name}: no download, or a broken file ({type(error).__name__}); "
                        "get it from github.com/danielgatis/rembg/releases/tag/v0.0.0 and put it, "
                        f"as {name}.onnx, into {home}") from error
    print(f"{name} on {session.inner_session.get_providers()[0]}", flush=True)
    return lambda pixels: remove(pixels, session=session, only_mask=True)


def make_masks(images, masks, model):
    """Makes the masks that are not there yet; returns [Row]. Raises UserError if there is no model,
    OSError if a mask cannot be written; an image that cannot be read is a failed Row."""
    todo = [pair for pair in zip(images, masks) if not whole(pair[1])]
    segment = load_model(model) if todo else None
    network = Semaphore(IN_NETWORK)

    def make(pair):
        image, mask = pair
        try:
            pixels = np.asarray(open_rgb(image))  # an array has no EXIF: rembg must not rotate it
            with network:
                found = segment(pixels)
        except Exception as error:  # Pillow raises nearly anything on a broken file
            return Row(image, mask, "failed", note=explain(image, error))
        mask.parent.mkdir(parents=True, exist_ok=True)
        write(mask, lambda draft: Image.fromarray(found).save(draft, "PNG"))
        return Row(image, mask, "new", looks(found))

    made = {row.image: row for row in parallel(make, todo, model)}
    return [made.get(image, Row(image, mask, "skipped")) for image, mask in zip(images, masks)]


def whole(path):
    """Whether `path` ends as a PNG does; cheap enough to ask of 120,000 files."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # missing, or shorter than that
        return False


def looks(mask):
    """"empty", "full" or "" for a mask (H, W) uint8."""
    share = (mask >= THRESHOLD).mean()
    return "empty" if share < EMPTY else "full" if share > FULL else ""


def explain(path, error):
    """One line that names `path`, as a UserError already does."""
    return str(error) if isinstance(error, UserError) else f"{path}: {error!r}"


def parallel(work, items, label):
    """[work(item)] in order, THREADS at a time, with rate and ETA; an exception ends all of it."""
    pool = ThreadPoolExecutor(THREADS)
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a job's log stays readable
    try:
        results = pool.map(work, items)
        return list(tqdm(results, label, len(items), unit=" images", mininterval=every))
    finally:
        pool.shutdown(cancel_futures=True)


def verify(pair):
    """Row of (image, mask) as they lie on disk."""
    image, mask = pair
    if not mask.exists():
        return Row(image, mask, "missing", note=str(mask))
    try:
        with Image.open(image) as photo, Image.open(mask) as found:
            if (found.mode, found.size) == ("L", photo.size):
                return Row(image, mask, "present", looks(np.asarray(found)))
            note = f"{mask}: {found.mode} {found.size}, should be L {photo.size}; delete it"
    except Exception as error:  # as above
        note = explain(mask, error)
    return Row(image, mask, "wrong", note=note)


def summarise(rows):
    """Prints counts and, by path, what needs a person's eye; returns whether all is well."""
    counts = Counter(row.state for row in rows)
    print(f"{len(rows):,} images: " + ", ".join(f"{counts[s]:,} {s}" for s in STATES if counts[s]))
    lists = {f"empty, under {EMPTY:.0%} foreground": [r.mask for r in rows if r.looks == "empty"],
             f"full, over {FULL:.0%} foreground": [r.mask for r in rows if r.looks == "full"]}
    for state in ("missing", "wrong", "failed"):
        lists[state] = [row.note for row in rows if row.state == state]
    for title, lines in lists.items():
        if lines:
            print(f"{title}: {len(lines):,}", *lines, sep="\n  ")
    return not (counts["missing"] or counts["wrong"] or counts["failed"])


# ---- 2. Their quality (Section 4) ----------------------------------------------------------------


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
    """[(IoU, overlap, path of the true mask, of the image, predicted mask)] for every *_mask.png
    below `folder`: scores its *_mask_pred.png, or else what `model` makes of its *_image.*.
    Raises UserError, with the path, where there is neither, or on two sizes or an empty truth."""
    truths, results, segment = sorted(Path(folder).rglob("*_mask.png")), [], None
    if not truths:
        raise UserError(f"--check {folder}: no *_mask.png in this folder")
    for truth in tqdm(truths, "check", leave=False, disable=None):
        stem = truth.name.removesuffix("mask.png")
        pred = truth.with_name(f"{stem}mask_pred.png")
        images = [p for p in truth.parent.iterdir() if p.name.startswith(f"{stem}image.")]
        if pred.exists():
            mask = np.asarray(open_rgb(pred).getchannel(0))
        elif images:
            segment = segment or load_model(model)
            mask = segment(np.asarray(open_rgb(images[0])))
        else:
            raise UserError(f"{truth}: neither {pred.name} nor {stem}image.* beside it")
        try:
            scores = mask_quality(mask, open_rgb(truth).getchannel(0))
        except ValueError as error:
            raise UserError(f"{truth}: {error}") from error
        results.append((*scores, truth, images[0] if images else None, mask))
    return results


def print_quality(results):
    """Prints each image's scores, then each folder's; std is the population's (ddof 0)."""
    folders = defaultdict(list)
    print(f"{'IoU':>8s} {'overlap':>8s}")
    for iou, overlap, truth, *_ in results:
        print(f"{iou:8.4f} {overlap:8.4f}  {truth}")
        folders[truth.parent.name].append((iou, overlap))
    if len(folders) > 1:
        folders["all"] = [row[:2] for row in results]
    titles = "mean std median q1 q3 min max".split()
    print(f"\n{'':30s}" + "".join(f"{title:>8s}" for title in titles))
    for name, scores in folders.items():
        for title, x in zip(("IoU", "overlap"), np.array(scores).T):
            cells = (x.mean(), x.std(), *np.percentile(x, (50, 25, 75, 0, 100)))
            print(f"{f'{name} ({len(x)}) {title}':30s}" + "".join(f"{c:8.4f}" for c in cells))


# ---- 3. Contact sheet ----------------------------------------------------------------------------


def sample(rows):
    """Up to SHEET of (image, mask, caption): suspicious masks, then some from all over the set."""
    rows = [row for row in rows if row.state in ("new", "skipped", "present")]
    odd, rest = [r for r in rows if r.looks][:SHEET], [r for r in rows if not r.looks]
    spread = np.linspace(0, len(rest) - 1, min(SHEET - len(odd), len(rest))).astype(int)
    return [(r.image, np.asarray(open_rgb(r.mask).getchannel(0)), "/".join(r.image.parts[-2:]))
            for r in odd + [rest[i] for i in spread]]


def contact_sheet(entries, out):
    """Writes the PNG `out`: photo, mask and cut-out of each entry (image, mask (H, W), caption).
    Raises UserError if there is none."""
    if not entries:
        raise UserError(f"--sheet {out}: no image with a mask to show")
    width, height = 3 * THUMB + 16, THUMB + 20
    sheet = Image.new("RGB", (ACROSS * width, -(-len(entries) // ACROSS) * height), "white")
    for i, (image, mask, caption) in enumerate(entries):
        x, y = i % ACROSS * width, i // ACROSS * height
        photo = open_rgb(image)
        photo.thumbnail((THUMB, THUMB))
        mask = Image.fromarray(mask).resize(photo.size)
        cut = Image.composite(photo, Image.new("RGB", photo.size, "magenta"), mask)
        for k, tile in enumerate((photo, mask, cut)):
            sheet.paste(tile, (x + k * THUMB, y))
        caption = caption[-75:].encode("ascii", "replace").decode()  # what any Pillow's font has
        ImageDraw.Draw(sheet).text((x + 2, y + photo.height + 2), caption, "black")
    write(Path(out), lambda draft: sheet.save(draft, "PNG"))


# ---- 4. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Foreground masks with rembg, and their quality (Kobs & Hotho, 2022).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
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
    if args.sheet and not Path(args.sheet).parent.is_dir():  # said now, not after hours
        raise UserError(f"--sheet {args.sheet}: no folder {Path(args.sheet).parent}; make it first")
    if args.check:
        results, sound = check(args.check, args.model), True
        print_quality(results)
        worst = sorted((row for row in results if row[3]), key=lambda row: row[0])[:SHEET]
        entries = [(image, mask, f"{truth} IoU {iou:.2f}") for iou, _, truth, image, mask in worst]
    else:
        index = load_index(ALIASES.get(args.dataset, args.dataset), args.data, need_masks=False)
        i, n = args.shard
        images, masks = index.images[i - 1::n], index.masks[i - 1::n]
        rows = (parallel(verify, [*zip(images, masks)], "verify") if args.verify
                else make_masks(images, masks, args.model))
        sound, entries = summarise(rows), sample(rows) if args.sheet else []
    if args.sheet:
        contact_sheet(entries, args.sheet)
        print(f"contact sheet: {args.sheet}")
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    command("masks.py", main)
