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
import signal
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
from bgbias import UserError

COPIES, SIGMA, QUANTILE = 25, 0.15, 0.99  # copies; their noise, in the image's range; clipping

KINDS = ("base", "bgaugment")
NOISE, RANDOM, PICK = range(100, 103)  # purposes of a seed, beside bgbias.py's
# What a batch may keep for its backward pass, at least one image's 25 copies (BN-Inception: 1.1
# GiB); the peak is 1.3 times that. More is slower on a CPU; a GPU gains nothing past MOST images.
CPU_ROOM, GPU_ROOM, MOST = 2**27, 0.4, 32  # bytes; share of the free memory; images
EVERY = 60  # seconds between two writes of the scores
RESAMPLES = 2000  # of the bootstrap
SANITY = 200  # images
ABOUT_ZERO = -0.05, 0.05  # below the paper's least score
CHECKS = (  # what is found, and the bounds, if any, that it must keep
    ("score", None), ("beyond another mask's", None),
    ("random weights", ABOUT_ZERO), ("beyond another mask's", ABOUT_ZERO),
    ("mask as map", (1, 1)), ("its complement", (-np.inf, 0)),
    ("occlusion", None), ("background swapped", None), ("object swapped", None))
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
    (B, H, W) in [0, 1], all 0 if it is nowhere. Section 5. model: (N, 3, H, W) -> (N, D), BatchNorm
    in eval mode. black_embedding: (1, D). distance: euclidean or cosine. generator: of the noise,
    or B of them, one an image, so that an image's noise does not depend on its batch."""
    generators = generator if isinstance(generator, list) else [generator] * len(images)
    noise = torch.stack([
        torch.randn(COPIES, *images.shape[1:], generator=g, device=g.device, dtype=images.dtype)
        for g in generators]).to(images.device)  # (B, 25, 3, H, W)
    span = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    copies = images[:, None] + SIGMA * span[:, None, None, None, None] * noise
    copies = copies.flatten(0, 1).requires_grad_()  # (B * 25, 3, H, W)
    target = distance(model(copies), black_embedding).sum() / COPIES  # sum of the images' means
    gradient, = torch.autograd.grad(target, copies)  # none of the weights
    gradient = gradient.mean(dim=1).abs()  # signed mean over the channels first
    G = gradient.unflatten(0, (-1, COPIES)).sum(dim=1)  # (B, H, W)
    low, high = G.amin((1, 2)), G.flatten(1).quantile(QUANTILE, dim=1)
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


def open_run(folder, device="auto"):
    """The Run in `folder`. Raises UserError."""
    config, best = Path(folder, "config.json"), Path(folder, "best.pt")
    for file in (config, best):
        if not file.exists():
            raise UserError(f"{file}: missing; train again")
    try:
        saved = json.loads(config.read_text())["args"] | {"device": device, "workers": None}
        args = bgbias.complete(argparse.Namespace(**saved))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: not of this bgbias.py ({error!r}); train again") from error
    try:
        index = bgbias.load_index(args.dataset, args.data)
    except UserError as error:
        raise UserError(f"{config}: {error} (start where the run was trained)") from error
    images, masks = bgbias.pick(index, index.split["test"])
    photos = bgbias.Photos(images, masks, args.short_side, args.image_size, keep=False)
    checksum = hashlib.sha256(best.read_bytes()).hexdigest()
    return Run(Path(folder), args, [str(path) for path in images], photos, checksum)


def load_model(run, trained=True):
    """The network of the run's best epoch, or one with random weights. Raises UserError."""
    args, file = run.args, run.folder / "best.pt"
    torch.manual_seed(bgbias.mix(args.seed, RANDOM))
    model = bgbias.Embedder(args.backbone, "none", args.image_size)
    try:
        if trained:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            model.load_state_dict(saved["model"])
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = f"not a checkpoint of {args.backbone} ({bgbias.brief(error)})"
        raise UserError(f"{file}: {reason}; train again") from error
    # Nothing is kept for gradients of weights; channels_last is the faster layout, on a CPU too.
    return model.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


def images_per_batch(model, size, device):
    """How many images' copies fit, by what one copy keeps for the backward pass."""
    weights, kept = {t.data_ptr() for t in model.state_dict().values()}, {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor):
        model(torch.zeros(1, 3, size, size, device=device, requires_grad=True))
    image = COPIES * sum(t.nbytes for pointer, t in kept.items() if pointer not in weights)
    gpu = device.startswith("cuda")
    room = GPU_ROOM * torch.cuda.mem_get_info(device)[0] if gpu else CPU_ROOM
    return max(1, min(MOST, int(room / image)))


def attention_maps(run, rows, model):
    """Yields (path, photo (4, S, S) uint8, attention (S, S)) of test images, on the CPU."""
    args, size = run.args, run.args.image_size
    with torch.no_grad():
        black = model(model.normalise(torch.zeros(1, 3, size, size, device=args.device)))
    lists = torch.tensor(rows).split(images_per_batch(model, size, args.device))
    batches = bgbias.Batches(run.photos, lists, size, False, [], 0, (args.seed,))
    for rows, (photos, _) in zip(lists, bgbias.loader(batches, args)):
        if bgbias.STOP:
            raise bgbias.Stopped
        seeds = [bgbias.mix(args.seed, NOISE, row) for row in rows.tolist()]
        generators = [torch.Generator(args.device).manual_seed(seed) for seed in seeds]
        images = model.normalise(photos[:, :3].to(args.device).float())
        maps = attention_map(model, images, black, DISTANCES[args.loss], generators)
        yield from zip([run.images[row] for row in rows], photos, maps.cpu())


def gather(run, rows, trained=True):
    """The photos (N, 4, S, S) of a few test images and their attention (N, S, S)."""
    _, photos, maps = zip(*attention_maps(run, rows, load_model(run, trained)))
    return torch.stack(photos), torch.stack(maps)


def score_run(run, shard=(1, 1)):
    """Scores what is left of the i-th of every n test images; {image path: (score, a, p)} of all
    scored so far. Writes RUN/attention.npz, or of a shard attention-IofN.npz, and once all are
    scored attention.npz and attention.json. Raises UserError; Stopped, with all saved."""
    scores, (i, n), written = read_scores(run), shard, time.monotonic()
    part = "attention.npz" if n == 1 else f"attention-{i}of{n}.npz"
    todo = [row for row in range(i - 1, len(run.images), n) if run.images[row] not in scores]
    if todo:
        (run.folder / "attention.json").unlink(missing_ok=True)
        found = attention_maps(run, todo, load_model(run))
        try:
            for image, photo, attention in tqdm(found, str(run.folder), len(todo), disable=None):
                a, p = shares(attention, photo[3] / 255)
                scores[image] = torch.stack([above_chance(a, p), a, p]).tolist()
                if time.monotonic() > written + EVERY:
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
    values = [score for score, *_ in scores.values() if np.isfinite(score)]
    mean, std = (np.mean(values), np.std(values, ddof=1)) if len(values) > 1 else (np.nan, np.nan)
    undefined = [image for image, (score, *_) in scores.items() if not np.isfinite(score)]
    return {"mean": mean, "std": std, "images": len(scores), "undefined": undefined}


# ---- 3. Table and figure: base against BGAugment -------------------------------------------------

def pair_up(runs):
    """{(dataset, loss, seed): {"base": Run, "bgaugment": Run}}, of which one may lack. Raises
    UserError for two runs that are no such pair."""
    pairs = {}
    for run in runs:
        name, kind = Path(run.args.dataset).resolve().name, KINDS[run.args.bgaugment]
        pair = pairs.setdefault((name, run.args.loss, run.args.seed), {})
        for other in pair.values():
            if kind in pair or run.images != other.images:
                raise UserError(f"{run.folder}: as {other.folder}, but not the base or BGAugment "
                                "run on the same photos that belongs to it; give one of them")
        pair[kind] = run
    return pairs


def compare(base, other):
    """Mean of other - base over the images, the bounds of its 95 % bootstrap interval, the share of
    images where it is positive. Both {image: (score, a, p)}; None if no image has both scores."""
    gain = np.array([other[image][0] - base[image][0] for image in base if image in other])
    gain = gain[np.isfinite(gain)]
    if len(gain):
        rng = np.random.default_rng(0)
        means = [rng.choice(gain, len(gain)).mean() for _ in range(RESAMPLES)]
        return gain.mean(), *np.quantile(means, [0.025, 0.975]), (gain > 0).mean()


def table(pairs, scores):
    """Markdown: base and BGAugment side by side; scores {run folder: {image: (score, a, p)}}."""
    lines = ["| run | images | base | + BGAugment | paper: base | + BGAugment | difference [95 %] "
             "| improved |", "|---|---|---|---|---|---|---|---|"]
    for (dataset, loss, seed), pair in pairs.items():
        found = [scores[pair[kind].folder] if kind in pair else {} for kind in KINDS]
        cells = [f"{dataset} {loss} s{seed}", f"{max(map(len, found)):,}"]
        cells += ["{mean:.3f} ± {std:.3f}".format(**summary(own)).replace("nan ± nan", "-")
                  for own in found]
        paper = bgbias.PAPER.get(dataset, {}).get(loss, ())
        cells += ["{:.2f} ± {:.2f}".format(*row[3:]) for row in paper] or ["-", "-"]
        gain = compare(*found)
        cells += (["{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain), f"{100 * gain[3]:.0f} %"] if gain
                  else ["-", "-"])
        lines.append(f"| {' | '.join(cells)} |")
    for folder, found in scores.items():
        if names := summary(found)["undefined"]:
            lines.append(f"\n{folder}: {len(names):,} of {len(found):,} images left out, full mask "
                         f"or flat map: {', '.join(names[:5])}" + ", ..." * (len(names) > 5))
    return "\n".join(lines)


def choose(run, found, wanted, worst):
    """Rows of the test images to show. wanted: their names, or how many of those with both
    scores, by seed or, with `worst`, where the two differ most. Raises UserError."""
    if len(wanted) == 1 and wanted[0].isdigit():
        gaps = [found["bgaugment"][image][0] - found["base"][image][0] for image in run.images]
        rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(gaps)).tolist()
        rows = [row for row in rows if np.isfinite(gaps[row])]
        rows.sort(key=lambda row: -abs(gaps[row]) * worst)
        hits = [[row] for row in rows[: int(wanted[0])]]
    else:
        hits = [[row for row, image in enumerate(run.images) if f"/{image}".endswith(f"/{name}")]
                for name in wanted]
    for name, rows in zip(wanted, hits or [[]]):
        if not rows:
            raise UserError(f"--images {name}: no test image of {run.folder}")
    return [rows[0] for rows in hits]


def figure(pair, found, rows, file):
    """Writes a PNG, a row per image: photo, mask, base and BGAugment heat maps and their scores."""
    (photos, base), (_, bgaugment) = (gather(pair[kind], rows) for kind in KINDS)
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
def occlusion(run, model, rows):
    """How far the embedding moves when the background is swapped, when the object is, and the share
    of the image that is object: (3, N). A photo of the test pool takes their place; no gradient."""
    args, moves = run.args, []
    pool = bgbias.Photos(bgbias.list_backgrounds(args.backgrounds, "test"), None, args.short_side)
    lists, seed = torch.tensor(rows).split(bgbias.EVAL_BATCH), (args.seed, bgbias.TEST)
    batches = bgbias.Batches(run.photos, lists, args.image_size, False, pool, 1, seed)
    for batch in bgbias.loader(batches, args):
        photos, (drawn,) = (tensor.to(args.device) for tensor in batch)
        images, masks = bgbias.unpack(photos)
        views = (images, bgbias.replace_background(images, masks, drawn),
                 bgbias.replace_background(drawn, masks, images))
        e, *moved = (model(model.normalise(view)) for view in views)
        moved = [DISTANCES[args.loss](e, other) for other in moved]
        moves.append(torch.stack([*moved, masks.mean((1, 2, 3))]).cpu())
    return torch.cat(moves, dim=1)


def check_run(run):
    """The figures of CHECKS, means over SANITY test images. Objects are central, and so is any
    network's view of a photo: what a map scores beyond its score with the mask of another image,
    here the next one, is attention to this object."""
    rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(run.images))[:SANITY]
    rows, found = sorted(rows.tolist()), []
    for trained in (True, False):
        photos, maps = gather(run, rows, trained)
        masks = photos[:, 3] / 255
        score, other = (attention_score(maps, m) for m in (masks, masks.roll(1, dims=0)))
        found += [score.nanmean(), (score - other).nanmean()]
    hard = (masks >= 0.5).double()
    found += [attention_score(attention, hard).nanmean() for attention in (hard, 1 - hard)]
    background, object_, p = occlusion(run, load_model(run), rows)
    found += [above_chance(object_ / (object_ + background), p).nanmean(), background.mean(),
              object_.mean()]
    return [float(figure) for figure in found]


def sanity(pairs, scores):
    """Markdown: CHECKS of each run, with a "no" where one fails."""
    heads = ["run", *(what for what, _ in CHECKS)]
    lines = [f"\n| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for pair in pairs.values():
        for run in pair.values():
            cells = [f"{x:.3f}" + " **no**" * bool(bounds and not bounds[0] <= x <= bounds[1])
                     for x, (_, bounds) in zip(check_run(run), CHECKS)]
            lines.append(f"| {' | '.join([run.folder.name, *cells])} |")
    for (dataset, *_), pair in pairs.items():
        if dataset == "toy" and len(pair) == 2:  # where the shortcut was planted
            _, low, *_ = compare(*(scores[pair[kind].folder] for kind in KINDS))
            lines.append(f"\n{pair['bgaugment'].folder.name} scores more than base: "
                         + ("yes" if low > 0 else "**no**"))
    return "\n".join(lines)


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
    signal.signal(signal.SIGTERM, lambda *_: bgbias.STOP.append(True))
    finished = [folder for folder in args.runs if Path(folder, "result.json").exists()]
    if not finished:
        raise UserError(f"{args.runs[0]}: no finished run; give folders that have a result.json")
    for folder in args.runs:
        if folder not in finished and not Path(folder).is_file():  # RUNS/* has files too
            print(f"{folder}: no finished run, left out")
    pairs = pair_up(open_run(folder, args.device) for folder in finished)
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
    print(table(pairs, scores))
    if args.figure:
        pair, = pairs.values()
        found = {kind: scores[run.folder] for kind, run in pair.items()}
        figure(pair, found, choose(pair["base"], found, args.images, args.worst), args.figure)
    if args.sanity:
        print(sanity(pairs, scores))


if __name__ == "__main__":
    bgbias.command("eval_attention.py", main)
