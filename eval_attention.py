"""Attention score of runs of bgbias.py: how much of what moves an image's embedding lies on the
object. 1: all of it, 0: as much as chance, negative: it looks at the background. Section 5 of "On
Background Bias in Deep Metric Learning" (Kobs & Hotho 2022).

    python eval_attention.py runs/*                       # scores of all test images, one table
    python eval_attention.py runs/toy-contrastive-base-s42 runs/toy-contrastive-bgaugment-s42 \
        --figure attention.png --images 8 --sanity
    python eval_attention.py runs/sop-triplet-base-s42 --shard 1/4 --device cuda:0  # 2/4, 3/4, 4/4

Start it in the folder the runs were trained in: all but the device comes from their config.json.
Scores go to RUN/attention.npz (arrays image, score, a, p; score is nan where undefined), their mean
and standard deviation, written last, to RUN/attention.json, where bgbias.py --report finds them.
The same command goes on after an interruption, and starts over if best.pt is another.
"""

import argparse
import hashlib
import json
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch.nn import functional as F
from tqdm import tqdm

import bgbias
from bgbias import KINDS, UserError

COPIES = 25  # noisy copies of an image
SIGMA = 0.15  # of the noise, in units of the image's range
QUANTILE = 0.99  # of a map, where it is clipped

NOISE, RANDOM, PICK = range(100, 103)  # what a random number is for, beside bgbias.py's
# Pixels of all copies in a batch, at least one image's: BN-Inception at 227 px keeps 1.1 GiB for
# the backward pass of an image's 25 copies, and a CPU is fastest with what fits its caches.
BATCH_PIXELS = {"cpu": 2**19, "gpu": 2**23}
SAVE_EVERY = 60  # seconds
RESAMPLES = 2000  # of the bootstrap
SANITY = 200  # images
CELL, GAP, TEXT = 216, 6, 17  # px of the figure: four cells are a README's width


# ---- 1. The score --------------------------------------------------------------------------------


def euclidean(embeddings, others):
    """(B, D), (B or 1, D) -> (B,)"""
    return torch.linalg.vector_norm(embeddings - others, dim=1)


def cosine(embeddings, others):
    """(B, D), (B or 1, D) -> (B,), 0 to 2"""
    return 1 - F.cosine_similarity(embeddings, others, dim=1)


DISTANCES = {"contrastive": euclidean, "triplet": euclidean, "multi_similarity": cosine,
             "arcface": cosine, "normalized_softmax": cosine}


def attention_map(model, images, black_embedding, distance, generator):
    """Where the distance to the black image's embedding is sensitive: network input (B, 3, H, W) ->
    (B, H, W) in [0, 1], all 0 if it is nowhere. Section 5.

    model: (N, 3, H, W) -> (N, D), BatchNorm in eval mode. black_embedding: (1, D). distance:
    euclidean or cosine. generator: of the noise, or B of them, one an image, so that an image's
    noise does not depend on its batch.
    """
    generators = generator if isinstance(generator, list) else [generator] * len(images)
    noise = torch.stack([
        torch.randn(COPIES, *images.shape[1:], generator=g, device=g.device, dtype=images.dtype)
        for g in generators]).to(images.device)  # (B, 25, 3, H, W)
    span = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    copies = images[:, None] + SIGMA * span[:, None, None, None, None] * noise
    copies = copies.flatten(0, 1).requires_grad_()  # (B * 25, 3, H, W)
    target = distance(model(copies), black_embedding).sum() / COPIES  # sum of the images' means
    gradient, = torch.autograd.grad(target, copies)  # of the copies only, none of the weights
    gradient = gradient.mean(dim=1).abs()  # mean over the channels first, then absolute
    G = gradient.unflatten(0, (-1, COPIES)).sum(dim=1)  # (B, H, W)
    low = G.amin((1, 2))
    high = G.flatten(1).quantile(QUANTILE, dim=1)
    span = (high - low).clamp(min=torch.finfo(G.dtype).tiny)  # 0 / 0 is 0
    return ((G - low[:, None, None]) / span[:, None, None]).clip(0, 1)


def attention_score(attention, mask):
    """(a - p) / (1 - p), at most 1, of shares(): (B, H, W), (B, 1, H, W) in [0, 1], 1 = foreground
    -> (B,). nan where it is undefined: p = 1, or no attention anywhere. Section 5."""
    return above_chance(*shares(attention, mask))


def shares(attention, mask):
    """a, the share of the attention, and p, of the image, that is on the object: (B,) float64."""
    attention, mask = attention.double(), mask.double().reshape(attention.shape)
    return (attention * mask).sum((-2, -1)) / attention.sum((-2, -1)), mask.mean((-2, -1))


def above_chance(a, p):
    return torch.where(p < 1, (a - p) / (1 - p), torch.nan)


# ---- 2. Scores of a run --------------------------------------------------------------------------

# images: paths of the test images; photos: their bgbias.Photos; best: checksum of best.pt.
Run = namedtuple("Run", "folder args images photos best")


def load_run(folder, device="auto"):
    """The Run in `folder`. Raises UserError."""
    config, best = Path(folder, "config.json"), Path(folder, "best.pt")
    for file in (config, best):
        if not file.exists():
            raise UserError(f"{file}: missing; train again")
    try:
        saved = json.loads(config.read_text())["args"]
        args = argparse.Namespace(**{**saved, "device": device, "workers": None})
        bgbias.choose_device(args)
        short = bgbias.short_side(args.image_size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: not of this bgbias.py ({error!r}); train again") from error
    try:
        split = bgbias.load_splits(args.dataset, args.data)["test"]
    except UserError as error:
        raise UserError(f"{config}: {error} (start where the run was trained)") from error
    photos = bgbias.Photos(split.images, split.masks, short, keep=False)
    checksum = hashlib.sha256(best.read_bytes()).hexdigest()
    return Run(Path(folder), args, [str(path) for path in split.images], photos, checksum)


def network_of(run, *, trained=True):
    """The network of the run's best epoch, or one with random weights. Raises UserError."""
    args, file = run.args, run.folder / "best.pt"
    torch.manual_seed(bgbias.seed_of(args.seed, RANDOM))
    network = bgbias.Embedder(args.backbone, "none", args.image_size)
    try:
        if trained:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            network.load_state_dict(saved["network"])
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = f"not a checkpoint of {args.backbone} ({bgbias.one_line(error)})"
        raise UserError(f"{file}: {reason}; train again") from error
    # Nothing is kept for gradients of weights; channels_last is the faster layout, on a CPU too.
    network.eval().requires_grad_(requires_grad=False)
    return network.to(args.device, memory_format=torch.channels_last)


def attention_maps(run, rows, network):
    """Yields (path, photo (4, S, S) uint8, attention (S, S)) of test images, on the CPU."""
    args, size = run.args, run.args.image_size
    with torch.no_grad():
        black = torch.zeros(1, 3, size, size, device=args.device)
        black = network(network.normalise(black))
    pixels = BATCH_PIXELS["cpu" if args.device == "cpu" else "gpu"]
    batch = max(1, pixels // (COPIES * size**2))  # images
    for start in range(0, len(rows), batch):
        some = rows[start:start + batch]
        photos = torch.stack([TF.center_crop(run.photos[row], size) for row in some])
        seeds = [bgbias.seed_of(args.seed, NOISE, row) for row in some]
        generators = [torch.Generator(args.device).manual_seed(seed) for seed in seeds]
        images, _ = bgbias.unpack(photos.to(args.device))
        maps = attention_map(network, network.normalise(images), black, DISTANCES[args.loss],
                             generators)
        yield from zip([run.images[row] for row in some], photos, maps.cpu())


def gather(run, rows, network):
    """The photos (N, 4, S, S) of a few test images and their attention (N, S, S)."""
    _, photos, maps = zip(*attention_maps(run, rows, network))
    return torch.stack(photos), torch.stack(maps)


def score_run(run, shard=(1, 1)):
    """Scores what is left of the i-th of every n test images; {image path: (score, a, p)} of all
    scored so far. Writes RUN/attention.npz, or of a shard attention-IofN.npz, and once all are
    scored attention.npz and attention.json. Raises UserError."""
    scores, (i, n), written = read_scores(run), shard, time.monotonic()
    part = "attention.npz" if n == 1 else f"attention-{i}of{n}.npz"
    todo = [row for row in range(i - 1, len(run.images), n) if run.images[row] not in scores]
    if todo:
        (run.folder / "attention.json").unlink(missing_ok=True)
        found = attention_maps(run, todo, network_of(run))
        try:
            for image, photo, attention in tqdm(found, str(run.folder), len(todo), disable=None):
                a, p = shares(attention, photo[3] / 255)
                scores[image] = torch.stack([above_chance(a, p), a, p]).tolist()
                if time.monotonic() > written + SAVE_EVERY:
                    write_scores(run, part, scores)
                    written = time.monotonic()
        finally:  # whatever ends it
            write_scores(run, part, scores)
    scores = read_scores(run)  # other shards may have written meanwhile
    if len(scores) == len(run.images) and (todo or not (run.folder / "attention.json").exists()):
        write_scores(run, "attention.npz", scores)
        bgbias.write_json(run.folder / "attention.json", summary(scores))
    return scores


def read_scores(run):
    """What RUN's attention*.npz hold of this best.pt and these test images. Raises UserError."""
    scores = {}
    for file in run.folder.glob("attention*.npz"):
        try:
            with np.load(file) as saved:
                values = np.stack([saved[name] for name in ("score", "a", "p")], axis=1).tolist()
                if saved["best"] == run.best:
                    scores |= zip(saved["image"].tolist(), values, strict=True)
        except Exception as error:  # zip and NumPy each raise their own
            raise UserError(f"{file}: not readable ({error}); delete it") from error
    return {image: scores[image] for image in run.images if image in scores}


def write_scores(run, name, scores):
    score, a, p = np.array(list(scores.values())).reshape(-1, 3).T

    def save(draft):
        with draft.open("wb") as file:  # given a name, NumPy would append .npz to it
            np.savez(file, image=list(scores), score=score, a=a, p=p, best=run.best)
    bgbias.write(run.folder / name, save)


def summary(scores):
    """Of {image: (score, a, p)}: mean and standard deviation (ddof 1) of the scores that are
    defined, nan if those are fewer than two; how many images there are, which have no score."""
    # DIFF: images whose attention score is undefined are left out of the mean and named.
    # DIFF: the attention score's standard deviation over the images has ddof 1, the authors' 0.
    values = [score for score, *_ in scores.values() if np.isfinite(score)]
    mean, std = (np.mean(values), np.std(values, ddof=1)) if len(values) > 1 else (np.nan, np.nan)
    undefined = [image for image, (score, *_) in scores.items() if not np.isfinite(score)]
    return {"mean": mean, "std": std, "images": len(scores), "undefined": undefined}


# ---- 3. Table and figure: base against BGAugment -------------------------------------------------


def pair_up(runs):
    """{(dataset, loss, seed): {"base": Run, "bgaugment": Run}}, of which one may lack. Raises
    UserError for two runs that are no such pair."""
    pairs = {}
    for run in sorted(runs, key=lambda run: run.args.bgaugment):  # base first
        name, kind = bgbias.dataset_name(run.args.dataset), KINDS[run.args.bgaugment]
        pair = pairs.setdefault((name, run.args.loss, run.args.seed), {})
        for other in pair.values():
            if kind in pair or run.images != other.images:
                raise UserError(f"{run.folder} and {other.folder}: are no pair; give one base and "
                                "one BGAugment run of the same dataset, loss, seed and photos")
        pair[kind] = run
    return pairs


def compare(base, other):
    """Mean of other - base over the images, the bounds of its 95 % bootstrap interval, the share of
    images where it is positive. Both {image: (score, a, p)}; None if no image has both scores."""
    gain = np.array([other[image][0] - base[image][0] for image in base if image in other])
    gain = gain[np.isfinite(gain)]
    if len(gain) == 0:
        return None
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(RESAMPLES)]
    return gain.mean(), *np.quantile(means, [0.025, 0.975]), (gain > 0).mean()


def score_table(pairs, scores):
    """Text: a row a run, beside the paper's; scores {run folder: {image: (score, a, p)}}."""
    rows, notes = [], []
    for pair in pairs.values():
        for run in pair.values():
            row = bgbias.table_row([bgbias.read_result(run.folder)])
            row |= {"": run.folder.name, "images": f"{len(scores[run.folder]):,}"}
            rows.append(row)
            if names := summary(scores[run.folder])["undefined"]:
                notes.append(f"\n{run.folder}: {len(names):,} images left out, full mask or flat "
                             f"map: {', '.join(names[:5])}" + ", ..." * (len(names) > 5))
        gain = compare(*(scores[run.folder] for run in pair.values())) if len(pair) == 2 else None
        if gain:
            row["BGAugment - base [95 %]"] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)
            row["images improved"] = f"{100 * gain[3]:.0f} %"
    columns = ("", "images", "attention", "± images", "paper: attention",
               "BGAugment - base [95 %]", "images improved")
    return "\n".join([bgbias.as_text(bgbias.table(rows, columns)), *notes])


def choose(run, found, wanted, *, worst):
    """Rows of the test images to show. wanted: their names, or how many of those with both
    scores, by seed or, with `worst`, where the two differ most. Raises UserError."""
    if len(wanted) == 1 and wanted[0].isdigit():
        gaps = [found["bgaugment"][image][0] - found["base"][image][0] for image in run.images]
        rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(gaps)).tolist()
        rows = [row for row in rows if np.isfinite(gaps[row])]
        if worst:
            rows.sort(key=lambda row: -abs(gaps[row]))
        rows = rows[:int(wanted[0])]
        if not rows:
            raise UserError(f"--images {wanted[0]}: no test image with a score in {run.folder}")
        return rows
    chosen = []
    for name in wanted:
        rows = [row for row, image in enumerate(run.images) if f"/{image}".endswith(f"/{name}")]
        if not rows:
            raise UserError(f"--images {name}: no test image of {run.folder}")
        chosen.append(rows[0])
    return chosen


def draw_figure(pair, found, rows, file):
    """Writes a PNG, a row per image: photo, mask, base and BGAugment heat maps and their scores."""
    (photos, base), (_, bgaugment) = (gather(pair[kind], rows, network_of(pair[kind]))
                                      for kind in KINDS)
    step, top, font = CELL + GAP, 2 * TEXT, ImageFont.load_default(TEXT)
    canvas = Image.new("RGB", (4 * step - GAP, top + len(rows) * step - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for k, title in enumerate(("photo", "mask", "base", "+ BGAugment")):
        draw.text((k * step + CELL / 2, TEXT), title, "black", font, anchor="mm")
    for n, row in enumerate(rows):
        photo, mask = (TF.to_pil_image(x).resize((CELL, CELL), Image.LANCZOS)
                       for x in photos[n].split((3, 1)))
        layers = photo, heated(photo, base[n]), heated(photo, bgaugment[n])
        cells = photo, *(outlined(layer, mask) for layer in layers)
        scores = (f"{found[kind][pair[kind].images[row]][0]:.2f}" for kind in KINDS)
        for k, (cell, text) in enumerate(zip(cells, ("", "", *scores))):
            x, y = k * step, top + n * step
            canvas.paste(cell, (x, y))
            draw.text((x + GAP, y + GAP), text, "white", font, stroke_width=2, stroke_fill="black")
    bgbias.write(file, lambda draft: canvas.save(draft, "PNG"))


def outlined(photo, mask):
    """The photo with the edge of its mask, where the soft mask crosses one half."""
    inside = mask.point(lambda value: 255 * (value >= 128))
    edge = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(3)),
                                 inside.filter(ImageFilter.MinFilter(3)))
    return Image.composite(Image.new("RGB", photo.size, "cyan"), photo, edge)


def heated(photo, attention):
    """Attention (S, S) over the greyed photo: none is grey, then red, 1 is yellow."""
    level = TF.to_pil_image(attention.float()).resize(photo.size, Image.BILINEAR)
    full, none = (Image.new("L", photo.size, value) for value in (255, 0))
    grey = photo.convert("L").point(lambda value: 0.7 * value).convert("RGB")
    return Image.composite(Image.merge("RGB", (full, level, none)), grey, level)


# ---- 4. Whether to believe it: input gradients can mislead (Shah et al. 2021). Beyond the paper. -


@torch.no_grad()
def occlusion(run, network, rows):
    """How far the embedding moves when the background is swapped, when the object is, and the share
    of the image that is object: (3, N). A photo of the test pool takes their place; no gradient."""
    args, short = run.args, bgbias.short_side(run.args.image_size)
    pool = bgbias.Photos(bgbias.list_backgrounds(args.backgrounds, "test"), None, short)
    images = [run.photos.images[row] for row in rows]
    masks = [run.photos.masks[row] for row in rows]
    photos = bgbias.Photos(images, masks, short, keep=False)
    batches = bgbias.Batches(photos=photos, size=args.image_size, seed=(args.seed, bgbias.TEST),
                             pool=pool, draws=1)
    moves = []
    for photos, backgrounds, _ in bgbias.loader(batches, args, range(batches.items_a_pass)):
        images, masks = bgbias.unpack(photos.to(args.device))
        other = backgrounds[0].to(args.device).float()
        views = (images, bgbias.replace_background(images, masks, other),
                 bgbias.replace_background(other, masks, images))
        e, new_background, new_object = (network(network.normalise(view)) for view in views)
        distance = DISTANCES[args.loss]
        moves.append(torch.stack([distance(e, new_background), distance(e, new_object),
                                  masks.mean((1, 2, 3))]).cpu())
    return torch.cat(moves, dim=1)


def check_run(run):
    """{heading: mean over SANITY test images, as text}. Objects are central, and so is the view of
    any network: what a map scores beyond its score with the mask of another image, here the next
    one, is attention to this object."""
    rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(run.images))[:SANITY]
    rows, figures = sorted(rows.tolist()), {}
    for title, trained in (("score", True), ("random weights", False)):
        photos, maps = gather(run, rows, network_of(run, trained=trained))
        masks = photos[:, 3] / 255
        score, other = attention_score(maps, masks), attention_score(maps, masks.roll(1, dims=0))
        figures[title] = score.nanmean()
        figures[f"{title}: beyond another's mask"] = (score - other).nanmean()
    hard = (masks >= 0.5).double()
    figures["mask as map"] = attention_score(hard, hard).nanmean()
    figures["its complement"] = attention_score(1 - hard, hard).nanmean()
    background, object_, p = occlusion(run, network_of(run), rows)
    figures["occlusion"] = above_chance(object_ / (object_ + background), p).nanmean()
    figures["background swapped"] = background.mean()
    figures["object swapped"] = object_.mean()
    return {heading: f"{figure:.3f}" for heading, figure in figures.items()}


# ---- 5. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Attention score of runs of bgbias.py (Kobs & Hotho 2022, Section 5).",
        epilog="A base and a BGAugment run of one dataset, loss and seed are compared.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders")
    add("--shard", type=bgbias.shard, default=(1, 1), metavar="I/N", help="every N-th from I on")
    add("--figure", type=Path, metavar="PNG", help="draw the maps of a base and a BGAugment run")
    add("--images", nargs="+", default=["8"], help="of --figure: how many (default: 8) or names")
    add("--worst", action="store_true", help="of --figure: where the two differ most, not by seed")
    add("--sanity", action="store_true", help=f"check the score on {SANITY} images of each run")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    finished = [folder for folder in args.runs if Path(folder, "result.json").exists()]
    if not finished:
        raise UserError(f"{args.runs[0]}: no finished run; give folders that have a result.json")
    for folder in args.runs:
        if folder not in finished and not Path(folder).is_file():  # RUNS/* has files too
            print(f"{folder}: no finished run, left out")
    for folder in finished:
        bgbias.read_result(Path(folder))  # a damaged or renamed run is refused before the work
    pairs = pair_up(load_run(folder, args.device) for folder in finished)
    runs = [run for pair in pairs.values() for run in pair.values()]
    if args.figure and not (len(pairs) == 1 and len(runs) == 2 and args.figure.suffix == ".png"
                            and args.figure.parent.is_dir()):
        raise UserError(f"--figure {args.figure}: give a .png in a folder that exists, and one base"
                        " and one BGAugment run of the same dataset, loss and seed")
    scores = {run.folder: score_run(run, args.shard) for run in runs}
    left = {run.folder: len(run.images) - len(scores[run.folder]) for run in runs}
    for folder, n in left.items():
        if n:
            print(f"{folder}: {n:,} images left to the other shards, no table yet")
    if any(left.values()):
        return
    print(score_table(pairs, scores))
    if args.figure:
        pair, = pairs.values()
        found = {kind: scores[run.folder] for kind, run in pair.items()}
        rows = choose(pair["base"], found, args.images, worst=args.worst)
        draw_figure(pair, found, rows, args.figure)
    if args.sanity:
        rows = [{"": run.folder.name, **check_run(run)} for run in runs]
        print(f"\n{bgbias.as_text(bgbias.table(rows))}")


if __name__ == "__main__":
    bgbias.command("eval_attention.py", main)
