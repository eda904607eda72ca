"""Attention score of runs of bgbias.py: how much of what moves an image's embedding lies on the
object. 1: all of it, 0: as much as chance, negative: it looks at the background. Section 5 of "On
Background Bias in Deep Metric Learning" (Kobs & Hotho 2022).

    python eval_attention.py runs/*                       # scores of all test images, one table
    python eval_attention.py runs/toy-contrastive-* --figure attention.png --images 3 --sanity
    python eval_attention.py runs/toy-contrastive-* --neighbours neighbours.png --images 3
    python eval_attention.py runs/sop-triplet-base-s42 --shard 1/4 --device cuda:0  # 2/4, 3/4, 4/4

Start it in the folder the runs were trained in: all but the device comes from their config.json.
Scores go to RUN/attention.npz (arrays image, score, a, p; score is nan where undefined), their mean
and standard deviation to RUN/attention.json, where bgbias.py --report finds them. The same command
goes on after an interruption, and starts over if best.pt, a photo or a mask is another.
"""

import argparse
import hashlib
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch.nn import functional as F
from tqdm import tqdm

import bgbias
from bgbias import EVAL_BATCH, KINDS, UserError, explain, seed_of

COPIES = 25  # noisy copies of an image
SIGMA = 0.15  # of the noise, in units of the image's range
QUANTILE = 0.99  # of a map, where it is clipped

NOISE, RANDOM, PICK = range(100, 103)  # what a random number is for, beside bgbias.py's
# Pixels of all copies in a batch, at least one image's: BN-Inception at 227 px keeps 1.1 GiB for
# the backward pass of an image's 25 copies, and a CPU is fastest with what fits its caches.
BATCH_PIXELS = {"cpu": 2**19, "gpu": 2**23}
RESAMPLES = 2000  # of the bootstrap
SANITY = 200  # images
NEIGHBOURS = 5  # photos a row
CANDIDATES = 1000  # queries among which --worst picks
TITLES = {"base": "base", "bgaugment": "+ BGAugment"}
WIDTH, GAP, TEXT = 900, 5, 16  # px of a figure, which is as wide as a README
BLANK = Image.new("RGB", (1, 1), "white"), "", None  # a cell
RIGHT, WRONG = "#009e73", "#d55e00"  # told apart by the colour-blind too


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

# split: the test photos. checksum: of all that a score follows from.
Run = namedtuple("Run", "folder args split images checksum")


def load_run(folder, device="auto"):
    """The Run in `folder`. Raises UserError."""
    folder = Path(folder)
    with explain(folder / "config.json", "not of this bgbias.py, train again"):
        saved = json.loads((folder / "config.json").read_text())["args"]
        args = argparse.Namespace(**{**saved, "device": device, "workers": None})
        bgbias.short_side(args.image_size), seed_of(args.seed)
        if args.loss not in DISTANCES:
            raise UserError(f"{folder}: its loss {args.loss} has no entry in DISTANCES in "
                            "eval_attention.py")
        bgbias.choose_device(args)
    try:
        split = bgbias.load_splits(args.dataset, args.data, training=args.epochs > 0)["test"]
    except UserError as error:
        raise UserError(f"{folder}: {error} (start where the run was trained)") from error
    arguments = DISTANCES[args.loss].__name__, args.image_size, args.seed, args.backbone
    checksum = hashlib.sha256(f"{arguments}".encode())
    with explain(folder / "best.pt", "train again"):
        checksum.update((folder / "best.pt").read_bytes())
    for path in (*split.images, *split.masks):
        file = path.stat()
        checksum.update(f"{path} {file.st_size} {file.st_mtime_ns}".encode())
    return Run(folder, args, split, [str(path) for path in split.images], checksum.hexdigest())


def network_of(run, *, trained=True):
    """The network of the run's best epoch, or one with random weights. Raises UserError."""
    args, file = run.args, run.folder / "best.pt"
    torch.manual_seed(seed_of(args.seed, RANDOM))
    network = bgbias.Embedder(args.backbone, "none", args.image_size, args.embedding)
    if trained:
        with explain(file, "train again"):
            network.load_state_dict(bgbias.read_checkpoint(file)["network"])
    # Then nothing is kept for the gradients of weights.
    return network.eval().requires_grad_(requires_grad=False).to(args.device)


def attention_maps(run, rows, network):
    """Yields (path, photo (4, S, S) uint8, attention (S, S)) of test images, on the CPU."""
    args, size = run.args, run.args.image_size
    photos = bgbias.Photos(run.split.images, run.split.masks, bgbias.short_side(size), keep=False)
    with torch.no_grad():
        black = torch.zeros(1, 3, size, size, device=args.device)
        black = network(network.normalise(black))
    pixels = BATCH_PIXELS["cpu" if args.device == "cpu" else "gpu"]
    batch = max(1, pixels // (COPIES * size**2))  # images
    for start in range(0, len(rows), batch):
        some = rows[start:start + batch]
        pixels = torch.stack([TF.center_crop(photos[row], size) for row in some])
        seeds = [seed_of(args.seed, NOISE, row) for row in some]
        generators = [torch.Generator(args.device).manual_seed(seed) for seed in seeds]
        images, _ = bgbias.unpack(pixels.to(args.device))
        maps = attention_map(network, network.normalise(images), black, DISTANCES[args.loss],
                             generators)
        yield from zip([run.images[row] for row in some], pixels, maps.cpu())


def gather(run, rows, network):
    """The photos (N, 4, S, S) of a few test images and their attention (N, S, S)."""
    _, photos, maps = zip(*attention_maps(run, rows, network))
    return torch.stack(photos), torch.stack(maps)


def score_run(run, shard=(1, 1)):
    """Scores what is left of the i-th of every n test images; {image path: (score, a, p)} of all
    scored so far. Writes RUN/attention.npz, or of a shard attention-IofN.npz, and once all are
    scored attention.npz and attention.json. Raises UserError."""
    i, n = shard
    part = "attention.npz" if n == 1 else f"attention-{i}of{n}.npz"
    scores = read_scores(run)
    todo = [row for row in range(i - 1, len(run.images), n) if run.images[row] not in scores]
    if todo:
        (run.folder / "attention.json").unlink(missing_ok=True)
        maps = tqdm(attention_maps(run, todo, network_of(run)), str(run.folder), len(todo),
                    disable=None)
        for done, (image, photo, attention) in enumerate(maps, 1):
            a, p = shares(attention, photo[3] / 255)
            scores[image] = torch.stack([above_chance(a, p), a, p]).tolist()
            if done % (len(todo) // 50 + 1) == 0 or done == len(todo):  # a kill costs 2 % at most
                write_scores(run, part, scores)
        scores = read_scores(run)  # other shards may have written meanwhile
    if len(scores) == len(run.images):
        write_scores(run, "attention.npz", scores)
        bgbias.write_json(run.folder / "attention.json", summary(scores))
    return scores


def read_scores(run):
    """What RUN's attention*.npz hold of this checkpoint and these photos. Raises UserError."""
    scores = {}
    for file in run.folder.glob("attention*.npz"):
        with explain(file, "delete it"), np.load(file) as saved:
            values = np.stack([saved[name] for name in ("score", "a", "p")], axis=1)
            if saved["checksum"] == run.checksum:
                values = values.astype(float, casting="safe").tolist()
                scores |= zip(saved["image"].tolist(), values, strict=True)
    return {image: scores[image] for image in run.images if image in scores}


def write_scores(run, name, scores):
    score, a, p = np.array(list(scores.values())).reshape(-1, 3).T

    def save(draft):
        with draft.open("wb") as file:  # given a name, NumPy would append .npz to it
            np.savez(file, image=list(scores), score=score, a=a, p=p, checksum=run.checksum)
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


# ---- 3. The table: base against BGAugment --------------------------------------------------------


def pair_up(runs):
    """{dataset, loss, seed: {"base": Run, "bgaugment": Run}}, of which one may lack. Raises
    UserError for two runs that are no such pair."""
    pairs = {}
    for run in sorted(runs, key=lambda run: run.args.bgaugment):  # base first
        kind = KINDS[run.args.bgaugment]
        pair = pairs.setdefault(bgbias.run_folder(run.args, "").name, {})
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
    return "\n".join([bgbias.as_table(rows, columns, room=bgbias.terminal_width()), *notes])


# ---- 4. Pictures: attention and nearest neighbours -----------------------------------------------


def shuffled(run):
    """The rows of the test images in random order, which the run's seed fixes."""
    return np.random.default_rng([run.args.seed, PICK]).permutation(len(run.images)).tolist()


def asked_for(run, images):
    """The rows of test images that --images may show, and how many: of a number, all of them in
    random order; of names with commas between them, those. Raises UserError."""
    if images.isdecimal() and int(images):
        return shuffled(run), int(images)
    rows = []
    for name in images.split(","):
        found = [row for row, image in enumerate(run.images) if f"/{image}".endswith(f"/{name}")]
        if not found:
            raise UserError(f"--images {name}: no test image of {run.folder}")
        rows.append(found[0])
    return rows, len(rows)


def side(columns):
    """Of a cell, px."""
    return (WIDTH + GAP) // columns - GAP


def draw_grid(rows, columns, file):
    """Writes a PNG of rows (cells, caption): a cell (uint8 tensor or picture, text, colour of its
    frame or None), the caption below its row."""
    font, px = ImageFont.load_default(TEXT), side(columns)
    heights = [px + GAP + (2 * TEXT if caption else 0) for _, caption in rows]
    canvas = Image.new("RGB", (WIDTH, sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for (cells, caption), height in zip(rows, heights):
        for k, (picture, text, colour) in enumerate(cells):
            left = k * (px + GAP)
            if torch.is_tensor(picture):
                picture = TF.to_pil_image(picture)
            canvas.paste(picture.convert("RGB").resize((px, px), Image.LANCZOS), (left, top))
            if colour:
                draw.rectangle((left, top, left + px - 1, top + px - 1), None, colour, GAP)
            draw.text((left + 2 * GAP, top + 2 * GAP), text, "white", font, stroke_width=2,
                      stroke_fill=colour or "black")
        draw.text((0, top + px + TEXT), caption, "black", font, anchor="lm")
        top += height
    bgbias.write(file, lambda draft: canvas.save(draft, "PNG"))
    print(f"picture: {file}")


def draw_attention(pair, scores, images, file, *, worst):
    """The picture of --figure: a row an image, with its mask and the maps of both runs."""
    base = pair["base"]
    found = [scores[pair[kind].folder] for kind in KINDS]
    gaps = [found[1][image][0] - found[0][image][0] for image in base.images]
    rows, count = asked_for(base, images)
    if worst:
        rows.sort(key=lambda row: -abs(np.nan_to_num(gaps[row])))
    rows = rows[:count]
    drawn = [gather(pair[kind], rows, network_of(pair[kind])) for kind in KINDS]
    lines = []
    for n, row in enumerate(rows):
        photo, mask = (TF.to_pil_image(planes).resize((side(4), side(4)), Image.LANCZOS)
                       for planes in drawn[0][0][n].split((3, 1)))
        cells = [(photo, "photo", None), (outlined(photo, mask), "mask", None)]
        for (_, maps), score, kind in zip(drawn, found, KINDS):
            text = f"{TITLES[kind]} {score[base.images[row]][0]:.2f}"
            cells.append((outlined(heated(photo, maps[n]), mask), text, None))
        lines.append((cells, ""))
    draw_grid(lines, 4, file)


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


def nearest(run, rows):
    """{"clean": (Q, 5) rows of the nearest clean photos to those of `rows`, "replaced": likewise to
    them on a new background}, as in the conditions clean and query (draw 0) of the test."""
    batches = bgbias.test_batches(run.split, run.args, draws=1)
    items = bgbias.loader(batches, run.args, range(batches.items_a_pass))
    embeddings = bgbias.embed(network_of(run), items, run.args.device)
    center = embeddings["clean"][0].mean(dim=0)  # as in retrieval_metrics(): more digits are kept
    gallery, found = embeddings["clean"][0] - center, {}
    for condition, (queries,) in embeddings.items():
        distances = torch.cdist(queries[rows] - center, gallery)
        distances[range(len(rows)), rows] = torch.inf  # a photo is no neighbour of its own
        count = min(NEIGHBOURS, len(gallery) - 1)
        found[condition] = distances.topk(count, largest=False).indices.cpu()
    return found


def draw_neighbours(pair, images, file, *, worst):
    """The picture of --neighbours: each query photo, its mask, itself on a new background, and a
    row a run of the photos nearest to the latter. Raises UserError."""
    first = next(iter(pair.values()))
    labels = torch.as_tensor(first.split.labels)
    rows, count = asked_for(first, images)
    rows = rows[:CANDIDATES if worst else count]
    found = {kind: nearest(run, rows) for kind, run in pair.items()}
    right = {}
    for kind, near in found.items():
        right[kind] = {key: labels[near[key]] == labels[rows][:, None] for key in near}
    queries = range(len(rows))
    if worst:
        hits = right[next(iter(pair))]
        queries = (hits["clean"][:, 0] & ~hits["replaced"][:, 0]).nonzero()[:count, 0].tolist()
        if not queries:
            raise UserError(f"--worst: no new background misleads {first.folder}")
    batches, lines = bgbias.test_batches(first.split, first.args, draws=1), []
    for q in queries:
        photos, backgrounds, _ = batches[rows[q] // EVAL_BATCH]
        k = rows[q] % EVAL_BATCH
        image, mask = bgbias.unpack(photos[k:k + 1])
        replaced = bgbias.replace_background(image, mask, backgrounds[0, k]).round().byte()
        name = "/".join(Path(first.images[rows[q]]).parts[-2:])[-40:]  # has room beside the rest
        name += ", picked as misled" if worst else ""
        cells = [(photos[k, :3], "query", None), (photos[k, 3], "mask", None),
                 (replaced[0], "replaced", None)]
        for kind, near in found.items():
            for row, hit in zip(near["replaced"][q].tolist(), right[kind]["replaced"][q]):
                photo = TF.center_crop(batches.photos[row], batches.size)
                cells.append((photo[:3], *(("right", RIGHT) if hit else ("wrong", WRONG))))
            clean, new = (int(right[kind][key][q].sum()) for key in ("clean", "replaced"))
            shown = len(right[kind]["replaced"][q])
            title = TITLES[kind] if pair[kind].args.epochs else "as it is"
            lines.append((cells, f"{title}: {new} of {shown} right on the new background, "
                                 f"{clean} on its own    {name}"))
            cells, name = [BLANK] * 3, ""  # the second row shows the same query
    draw_grid(lines, 3 + NEIGHBOURS, file)


# ---- 5. Whether to believe it: input gradients can mislead (Shah et al. 2021). Beyond the paper. -


@torch.no_grad()
def occlusion(run, network, rows):
    """How far the embedding moves when the background is swapped, when the object is, and the share
    of the image that is object: (3, N). A photo of the test pool takes their place; no gradient."""
    args, split = run.args, run.split
    some = bgbias.Split([split.images[row] for row in rows], [split.masks[row] for row in rows],
                        split.labels[rows])
    batches = bgbias.test_batches(some, args, draws=1)
    moves = []
    for item in bgbias.loader(batches, args, range(batches.items_a_pass)):
        photos, backgrounds, _ = bgbias.to_device(item, args.device)
        images, masks = bgbias.unpack(photos)
        other = backgrounds[0].float()
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
    rows, figures = sorted(shuffled(run)[:SANITY]), {}
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


# ---- 6. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Attention score of runs of bgbias.py (Kobs & Hotho 2022, Section 5).",
        epilog="A base and a BGAugment run of one dataset, loss and seed are compared.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders")
    add("--shard", type=bgbias.shard, default=(1, 1), metavar="I/N", help="every N-th from I on")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--figure", type=Path, metavar="PNG",
                        help="draw the maps of a base and a BGAugment run")
    either.add_argument("--neighbours", type=Path, metavar="PNG", help="draw the nearest photos to "
                        "some queries on new backgrounds, of one run or such a pair; no scores")
    add("--images", default="8", metavar="N", help="of a picture: how many (default: 8), or names, "
        "with commas between them")
    add("--worst", action="store_true", help="of a picture: not by seed, but where base and "
        "BGAugment differ most, or where the new background makes a right neighbour a wrong one")
    add("--sanity", action="store_true", help=f"check the score on {SANITY} images of each run")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


def finished_pairs(args):
    """pair_up() of the finished runs among the arguments. Raises UserError if there are none, or if
    the picture asked for cannot be drawn of them."""
    picture = args.figure or args.neighbours
    if picture and (picture.suffix != ".png" or not picture.parent.is_dir()):
        raise UserError(f"{picture}: give the name of a .png in a folder that exists")
    if args.worst and not args.images.isdecimal():
        raise UserError("--worst: picks the images itself; give --images a number")
    finished = [folder for folder in args.runs if Path(folder, "result.json").exists()]
    if not finished:
        raise UserError(f"{args.runs[0]}: no finished run; give folders that have a result.json")
    for folder in args.runs:
        if folder not in finished and not Path(folder).is_file():  # RUNS/* has files too
            print(f"{folder}: no finished run, left out")
    for folder in finished:
        bgbias.read_result(Path(folder))  # a damaged or renamed run is refused before the work
    pairs = pair_up(load_run(folder, args.device) for folder in finished)
    if picture and (len(pairs) > 1 or args.figure and len(finished) < 2):
        raise UserError(f"{', '.join(finished)}: a picture is of one base and one BGAugment run of "
                        "the same dataset, loss and seed (--neighbours: or of one run)")
    return pairs


def main(argv=None):
    args = parse_args(argv)
    pairs = finished_pairs(args)
    if args.neighbours:
        pair, = pairs.values()
        return draw_neighbours(pair, args.images, args.neighbours, worst=args.worst)
    runs = [run for pair in pairs.values() for run in pair.values()]
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
        draw_attention(pair, scores, args.images, args.figure, worst=args.worst)
    if args.sanity:
        rows = [{"": run.folder.name, **check_run(run)} for run in runs]
        print(f"\n{bgbias.as_table(rows, room=bgbias.terminal_width())}")


if __name__ == "__main__":
    bgbias.command("eval_attention.py", main)
