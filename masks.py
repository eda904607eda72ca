"""Foreground masks for every image of a dataset, made with rembg's u2net as the paper's, and their quality.

    python masks.py --dataset cub200                        # masks for every image that has none yet
    python masks.py --dataset my_photos --model u2netp      # FOLDER/images/<class>/*.jpg
    python masks.py --dataset sop --shard 3/8               # images 3, 11, 19, ...: one job of eight
    python masks.py --dataset cub200 --verify --sheet cub200.png
    python masks.py --check ../gt                           # IoU and overlap against masks made by hand

A mask is an 8-bit greyscale PNG of its image's size, soft, 255 = foreground, and lies where bgbias.mask_path
says: ROOT/masks mirrors the image tree. Stop at any moment; the same command goes on with what is missing.
Exit code 1: some images failed, or --verify found masks missing or wrong; each is listed with its reason.

`pip install "rembg[gpu]"` instead of "rembg[cpu]" puts the network on an NVIDIA GPU. rembg downloads a model
once, to ~/.rembg or the folder in U2NET_HOME. Paper: masks in Section 3, their quality in Section 4.
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

from bgbias import ALIASES, UserError, command, load_index, open_rgb, write

# rembg's models that run here and give one mask an image. A table, not what rembg lists: that includes
# services that take the images elsewhere and bill, and models that need prompts or give several masks.
MODELS = ("u2net", "u2netp", "u2net_human_seg", "silueta", "isnet-general-use", "isnet-anime",
          "birefnet-general", "birefnet-general-lite", "birefnet-portrait", "birefnet-dis",
          "birefnet-hrsod", "birefnet-cod", "birefnet-massive", "bria-rmbg")
THRESHOLD = 128  # foreground is >= 128: the paper's, for quality; also for empty and full
EMPTY, FULL = 0.01, 0.99  # shares of foreground beyond which a mask is suspicious
THREADS, IN_NETWORK = 4, 2  # two decode or write; of two in rembg, one prepares while the other computes
PNG_END = b"IEND\xaeB`\x82"
SHEET, ACROSS, THUMB = 48, 3, 160  # contact sheet: entries, entries a row, px

# What became of one image. state: new, skipped, failed; or, with --verify: present, missing, wrong.
# share: foreground in [0, 1], None if unknown. note: the reason, path included, of failed and wrong.
Row = namedtuple("Row", "image mask state share note", defaults=(None, ""))


# ----------------------------------------------------------------------------------------------------
# Making masks
# ----------------------------------------------------------------------------------------------------


def load_model(name):
    """rembg's model as a function: RGB (H, W, 3) uint8 -> soft mask (H, W) uint8, 255 = foreground.

    Mask only, no post-processing (Section 3). Downloads the model file if need be. Raises UserError."""
    try:
        from rembg import new_session, remove
    except (ImportError, SystemExit) as error:  # rembg exits where onnxruntime is missing
        raise UserError('rembg or its onnxruntime is missing; pip install "rembg[cpu]" or "rembg[gpu]"') from error
    try:
        session = new_session(name)
    except Exception as error:  # no network, wrong checksum, not a model: each library has its own class
        home = os.environ.get("U2NET_HOME") or "~/.u2net"
        raise UserError(f"{home}/{name}.onnx: model not there, not downloadable or broken ({type(error).__name__}); "
                        "put the file there by hand, from github.com/danielgatis/rembg/releases/tag/v0.0.0") from error
    print(f"{name} on {session.inner_session.get_providers()[0]}", flush=True)
    return lambda pixels: remove(pixels, session=session, only_mask=True)


def make_masks(images, masks, model):
    """Makes the masks that are not there yet; returns [Row]. Raises UserError (model), OSError (writing)."""
    pairs = list(zip(images, masks))
    todo = [(image, mask) for image, mask in pairs if not whole(mask)]
    segment = load_model(model) if todo else None
    network = Semaphore(IN_NETWORK)

    def make(pair):
        image, mask = pair
        try:
            pixels = np.asarray(open_rgb(image))  # an array has no EXIF, so rembg cannot rotate it
            with network:
                found = segment(pixels)
        except UserError as error:
            return Row(image, mask, "failed", note=str(error))
        except Exception as error:  # Pillow raises nearly anything on a broken file
            return Row(image, mask, "failed", note=f"{image}: {type(error).__name__}: {error}")
        mask.parent.mkdir(parents=True, exist_ok=True)
        write(mask, lambda draft: Image.fromarray(found).save(draft, "PNG"))
        return Row(image, mask, "new", foreground(found))

    made = {row.image: row for row in parallel(make, todo, model)}
    return [made.get(image, Row(image, mask, "skipped")) for image, mask in pairs]


def whole(path):
    """Whether `path` is a PNG to its last byte: cheap enough to ask of 120,000 files."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # missing, or shorter than that
        return False


def foreground(mask):
    """Share of foreground pixels of a mask (H, W) uint8."""
    return float((mask >= THRESHOLD).mean())


def parallel(work, items, label):
    """[work(item)] in order, THREADS at a time, with rate and ETA; the first exception ends it."""
    pool = ThreadPoolExecutor(THREADS)
    often = 0.1 if sys.stderr.isatty() else 60  # seconds: the log of a job stays readable
    try:
        return list(tqdm(pool.map(work, items), label, len(items), unit=" images", mininterval=often))
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------
# Verifying them
# ----------------------------------------------------------------------------------------------------


def verify(pair):
    """Row of one (image, mask) as it lies on disk."""
    image, mask = pair
    if not mask.exists():
        return Row(image, mask, "missing", note=str(mask))
    try:
        with Image.open(image) as photo, Image.open(mask) as found:
            if (found.mode, found.size) != ("L", photo.size):
                return Row(image, mask, "wrong", note=f"{mask}: mode {found.mode}, {found.size} px, for a photo "
                           f"of {photo.size}; delete it and make it again")
            return Row(image, mask, "present", foreground(np.asarray(found)))
    except Exception as error:  # as above
        return Row(image, mask, "wrong", note=f"{mask}: {type(error).__name__}: {error}")


def summarise(rows):
    """Prints counts and, by path, what needs a person's eye; returns whether all masks are there and sound."""
    counts = Counter(row.state for row in rows)
    print(f"{len(rows):,} images: " + ", ".join(f"{n:,} {state}" for state, n in sorted(counts.items())))
    lists = {f"empty (under {EMPTY:.0%} foreground)": [str(r.mask) for r in rows if is_empty(r)],
             f"full (over {FULL:.0%} foreground)": [str(r.mask) for r in rows if is_full(r)]}
    lists |= {state: [r.note for r in rows if r.state == state] for state in ("missing", "wrong", "failed")}
    for title, lines in lists.items():
        if lines:
            print("\n  ".join([f"{title}: {len(lines):,}", *lines]))
    return not any(counts[state] for state in ("missing", "wrong", "failed"))


def is_empty(row):
    return row.share is not None and row.share < EMPTY


def is_full(row):
    return row.share is not None and row.share > FULL


# ----------------------------------------------------------------------------------------------------
# Their quality (Section 4)
# ----------------------------------------------------------------------------------------------------


def mask_quality(pred, truth):
    """(IoU, overlap) of two masks (H, W), 0 to 255, both thresholded at 128; overlap is the share of the true
    mask that `pred` covers. Raises ValueError on two sizes or an empty true mask."""
    pred, truth = np.asarray(pred) >= THRESHOLD, np.asarray(truth) >= THRESHOLD
    if pred.shape != truth.shape:
        raise ValueError(f"true mask of {truth.shape[::-1]} px, predicted mask of {pred.shape[::-1]}")
    if not truth.any():
        raise ValueError("the true mask is empty")
    both = (pred & truth).sum()
    return float(both / (pred | truth).sum()), float(both / truth.sum())


def check(folder, model):
    """[(true mask's path, image's path or None, predicted mask (H, W), IoU, overlap)] of every *_mask.png below
    `folder`, against its *_mask_pred.png or else what `model` makes of *_image.*. Raises UserError."""
    truths = sorted(Path(folder).rglob("*_mask.png"))
    if not truths:
        raise UserError(f"--check {folder}: no *_mask.png here")
    found, segment = [], None
    for path in tqdm(truths, "check", leave=False, disable=None):
        stem = path.name.removesuffix("_mask.png")
        image = next((p for p in sorted(path.parent.iterdir()) if p.name.startswith(f"{stem}_image.")), None)
        pred = path.with_name(f"{stem}_mask_pred.png")
        if pred.exists():
            pred = np.asarray(open_rgb(pred).getchannel(0))
        elif image is None:
            raise UserError(f"{path}: neither {pred.name} nor {stem}_image.* is beside it")
        else:
            segment = segment or load_model(model)
            pred = segment(np.asarray(open_rgb(image)))
        try:
            found.append((path, image, pred, *mask_quality(pred, open_rgb(path).getchannel(0))))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    return found


def print_quality(found):
    """Prints check's result: each image, then each folder's mean, std (ddof 0), median, quartiles, min and max."""
    folders = defaultdict(list)
    print(f"{'IoU':>8s}{'overlap':>9s}")
    for path, _, _, iou, overlap in found:
        print(f"{iou:8.4f}{overlap:9.4f}  {path}")
        folders[path.parent.name].append((iou, overlap))
    if len(folders) > 1:
        folders["all"] = [row[3:] for row in found]
    print("\n{:32s}".format("") + "".join(f"{name:>8s}" for name in "mean std median q1 q3 min max".split()))
    for name, scores in folders.items():
        for title, x in zip(("IoU", "overlap"), np.array(scores).T):
            q1, median, q3 = np.percentile(x, (25, 50, 75))
            row = (x.mean(), x.std(), median, q1, q3, x.min(), x.max())
            print(f"{f'{name} ({len(x)}), {title}':32s}" + "".join(f"{value:8.4f}" for value in row))


# ----------------------------------------------------------------------------------------------------
# Contact sheet
# ----------------------------------------------------------------------------------------------------


def entries(rows):
    """Up to SHEET [(image path, mask, caption)] of a dataset: suspicious masks, then an even sample."""
    rows = [r for r in rows if r.state in ("new", "skipped", "present")]
    odd = [r for r in rows if is_empty(r) or is_full(r)][:SHEET]
    rest = [r for r in rows if not (is_empty(r) or is_full(r))]
    room = SHEET - len(odd)
    picked = odd + [rest[i] for i in np.linspace(0, len(rest) - 1, min(room, len(rest))).astype(int)]
    return [(r.image, open_rgb(r.mask).getchannel(0), "/".join(r.image.parts[-2:])) for r in picked]


def contact_sheet(entries, out):
    """Writes the PNG `out`: image, mask and cut-out of each (image path, mask, caption). Raises UserError."""
    if not entries:
        raise UserError(f"--sheet {out}: there is no mask to show")
    width, height = 3 * THUMB + 16, THUMB + 20
    sheet = Image.new("RGB", (ACROSS * width, -(-len(entries) // ACROSS) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (path, mask, caption) in enumerate(entries):
        x, y = i % ACROSS * width, i // ACROSS * height
        photo = open_rgb(path)
        photo.thumbnail((THUMB, THUMB))
        mask = Image.fromarray(np.asarray(mask)).resize(photo.size)
        cut = Image.composite(photo, Image.new("RGB", photo.size, "magenta"), mask)  # no product is magenta
        for k, tile in enumerate((photo, mask, cut)):
            sheet.paste(tile, (x + k * THUMB, y))
        draw.text((x, y + THUMB + 2), caption[-78:], "black")
    write(Path(out), lambda draft: sheet.save(draft, "PNG"))


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------


def shard(text):
    """"3/8" -> slice of every 8th item from the third."""
    i, n = (int(part) for part in text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return slice(i - 1, None, n)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Foreground masks with rembg, and their quality.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help="toy, cars196, cub200, sop, or a folder with images/<class>/")
    what.add_argument("--check", metavar="FOLDER", help="compare *_mask.png, made by hand, with *_mask_pred.png "
                      "or, where there is none, with what --model makes of *_image.*")
    add("--data", default="data", help="folder that holds the named datasets")
    add("--model", default="u2net", choices=MODELS, help="rembg's model; the paper's is u2net")
    add("--shard", type=shard, default="1/1", metavar="I/N", help="only every N-th image, from the I-th: N jobs share "
        "a dataset")
    add("--verify", action="store_true", help="make nothing, look at the masks that are there")
    add("--sheet", metavar="OUT.png", help=f"contact sheet of {SHEET}: suspicious masks first, with --check worst first")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.sheet and not Path(args.sheet).parent.is_dir():  # now, not after hours
        raise UserError(f"--sheet {args.sheet}: there is no folder {Path(args.sheet).parent}")
    if args.check:
        found = check(args.check, args.model)
        print_quality(found)
        worst = sorted(found, key=lambda row: row[3])[:SHEET]
        shown = [(image, pred, f"{path}  IoU {iou:.2f}") for path, image, pred, iou, _ in worst]
        sound = True
    else:
        index = load_index(ALIASES.get(args.dataset, args.dataset), args.data, need_masks=False)
        images, masks = index.images[args.shard], index.masks[args.shard]
        rows = (parallel(verify, list(zip(images, masks)), "verify") if args.verify else
                make_masks(images, masks, args.model))
        sound, shown = summarise(rows), entries(rows) if args.sheet else []
    if args.sheet:
        contact_sheet(shown, args.sheet)
        print(f"contact sheet: {args.sheet}")
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    command("masks.py", main)
