"""Attention score of runs of bgbias.py: what share of the embedding's input gradient falls on the
object? A score of 1 means all of it, 0 as much as by chance; below 0, the model looks at the
background. Section 5 of "On Background Bias in Deep Metric Learning" (Kobs & Hotho 2022).

    python eval_attention.py runs/*                       # scores of all test images, one table
    python eval_attention.py runs/toy-contrastive-* --figure attention.png --images 3 --limit 200
    python eval_attention.py runs/toy-contrastive-* --neighbours neighbours.png --images 3

Start it where the runs were trained, because the paths of the data are relative. Scores are saved
in RUN/attention.npz (arrays image, score, a, p) for the report. An undefined score is nan. A newer
best.pt or mask recomputes them.
"""

import argparse
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

import bgbias
from bgbias import DISTANCES, EVAL_BATCH, TEST, Split, UserError, loader, make_batches, seed_of

COPIES = 25  # noisy copies of an image
SIGMA = 0.15  # standard deviation of the noise, as a fraction of the image's range
QUANTILE = 0.99  # a map is clipped at this quantile
NOISE, RANDOM, PICK = range(100, 103)  # purposes of random numbers; bgbias.py uses 0 to 4
# Pixels of all copies in a batch of one image or more. A CPU is fastest if they fit in its caches.
BATCH_PIXELS = {"cpu": 2**19, "gpu": 2**23}
RESAMPLES, SANITY = 2000, 200  # of the bootstrap; images per run of --sanity
VERSIONS, NEIGHBOURS = 5, 5  # of a query; photos nearest to the last version
CANDIDATES = 1000  # queries from which --worst picks
WIDTH, GAP, TEXT = 900, 5, 16  # px: picture, between cells, font; a README is about as wide
BLANK = Image.new("RGB", (1, 1), "white"), "", None  # a cell
RIGHT, WRONG = "#009e73", "#d55e00"  # green and orange that colour-blind people can distinguish


# ---- 1. The score --------------------------------------------------------------------------------


def attention_map(model, images, black_embedding, distance, generator):
    """How strongly each pixel changes the distance to the embedding of a black image (Section 5):
    network input (B, 3, H, W) -> (B, H, W) in [0, 1]. A map is 0 if no pixel changes the distance.

    model: (N, 3, H, W) -> (N, D), BatchNorm in eval mode. black_embedding: (1, D). distance:
    bgbias.euclidean or bgbias.cosine. generator: the generator of the noise, or a list of one per
    image. With a list, the noise of an image does not depend on its batch.
    """
    generators = generator if isinstance(generator, list) else [generator] * len(images)
    noise = torch.stack([
        torch.randn(COPIES, *images.shape[1:], generator=g, device=g.device, dtype=images.dtype)
        for g in generators]).to(images.device)  # (B, 25, 3, H, W)
    span = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    copies = images[:, None] + SIGMA * span[:, None, None, None, None] * noise
    copies = copies.flatten(0, 1).requires_grad_()  # (B * 25, 3, H, W)
    target = distance(model(copies), black_embedding).sum() / COPIES  # sum of the images' means
    gradient, = torch.autograd.grad(target, copies)  # with respect to the copies only
    gradient = gradient.mean(dim=1).abs()  # the mean over the channels comes first
    G = gradient.unflatten(0, (-1, COPIES)).sum(dim=1)  # (B, H, W)
    low = G.amin((1, 2))
    high = G.flatten(1).quantile(QUANTILE, dim=1)
    span = (high - low).clamp(min=torch.finfo(G.dtype).tiny)  # 0 / 0 becomes 0
    return ((G - low[:, None, None]) / span[:, None, None]).clip(0, 1)


def attention_score(attention, mask):
    """(a - p) / (1 - p) with a and p of shares() (Section 5): (B, H, W), (B, 1, H, W) in [0, 1],
    1 = foreground -> (B,). The score is undefined (nan) if the mask is full, p = 1, or if the
    attention is 0 everywhere."""
    return above_chance(*shares(attention, mask))


def shares(attention, mask):
    """The share of the attention (a) and of the image (p) on the object: (B,) float64 each."""
    attention, mask = attention.double(), mask.double().reshape(attention.shape)
    return (attention * mask).sum((-2, -1)) / attention.sum((-2, -1)), mask.mean((-2, -1))


def above_chance(a, p):
    return torch.where(p < 1, (a - p) / (1 - p), torch.nan)


# ---- 2. Scores of a run --------------------------------------------------------------------------

Run = namedtuple("Run", "folder args split tested")  # split: the test photos


def load_run(folder, device):
    """The finished Run in `folder`. Raises UserError if its data is missing."""
    saved = bgbias.saved_result(folder)
    args = argparse.Namespace(**{**saved["args"], "device": device, "workers": None})
    bgbias.choose_device(args)
    splits = bgbias.load_splits(args.dataset, args.data, training=args.epochs > 0)
    if bgbias.fingerprint(args, splits) != saved["fingerprint"]:
        print(f"{folder}: photos, masks or backgrounds have changed since this run")
    return Run(Path(folder), args, splits["test"], saved["tested"])


def network_of(run, *, trained=True):
    """The network of the run's best epoch, or one with random weights."""
    args = run.args
    if trained:
        return bgbias.load_embedder(run.folder, args).to(args.device)
    torch.manual_seed(seed_of(args.seed, RANDOM))
    network = bgbias.Embedder(args.backbone, "none", args.image_size, args.embedding)
    return network.eval().requires_grad_(requires_grad=False).to(args.device)


def photos_of(run, rows, draws=None):
    """Batches of the test images in these rows of run.split."""
    images, masks, labels = run.split
    some = Split([images[row] for row in rows], [masks[row] for row in rows], labels[rows])
    return make_batches(run.args, some, TEST, draws or {})


def attention_maps(run, rows, network):
    """Yields (photo (4, S, S) uint8, attention (S, S)) of the test images `rows`, on the CPU."""
    args, size = run.args, run.args.image_size
    if not bgbias.has_gradient(network, size):
        raise UserError(f"{run.folder}: its features have no gradient; give another run")
    with torch.no_grad():
        black = network(network.normalise(torch.zeros(1, 3, size, size, device=args.device)))
    pixels = BATCH_PIXELS["cpu" if args.device == "cpu" else "gpu"]
    batch = max(1, pixels // (COPIES * size**2))  # images
    seeds = (seed_of(args.seed, NOISE, row) for row in rows)
    for photos, _, _ in loader(photos_of(run, rows), args):
        for some in photos.split(batch):
            generators = [torch.Generator(args.device).manual_seed(next(seeds)) for _ in some]
            images, _ = bgbias.unpack(some)
            maps = attention_map(network, network.normalise(images), black, DISTANCES[args.loss],
                                 generators)
            yield from zip(some.cpu(), maps.cpu())


def collect_maps(run, rows, network):
    """Photos (N, 4, S, S) and attention (N, S, S) of a few test images."""
    photos, maps = zip(*attention_maps(run, rows, network))
    return torch.stack(photos), torch.stack(maps)


def score_run(run, limit=None):
    """{image path: (score, a, p)} of all test images, or of `limit` random ones. If all images are
    scored, the scores are saved in RUN/attention.npz. They are read from there if up to date."""
    file = run.folder / "attention.npz"
    images = [str(path) for path in run.split.images]
    newest = max(path.stat().st_mtime for path in (run.folder / "best.pt", *run.split.masks))
    if file.exists() and file.stat().st_mtime >= newest:
        saved = np.load(file)
        if saved["image"].tolist() == images:
            values = np.stack([saved["score"], saved["a"], saved["p"]], axis=1)
            return dict(zip(images, values.tolist()))
    rows, network, scores = sorted(shuffled(run)[:limit]), network_of(run), {}
    if not bgbias.has_gradient(network, run.args.image_size):
        print(f"{run.folder}: has no attention score, because its features have no gradient")
        return scores
    maps = tqdm(attention_maps(run, rows, network), str(run.folder), len(rows), disable=None)
    for row, (photo, attention) in zip(rows, maps):
        a, p = shares(attention, photo[3] / 255)
        scores[images[row]] = torch.stack([above_chance(a, p), a, p]).tolist()
    if len(scores) == len(images):
        score, a, p = np.transpose(list(scores.values()))
        bgbias.write(file, lambda draft: np.savez(draft, image=images, score=score, a=a, p=p))
    return scores


def shuffled(run):
    """The rows of the test images in a random order that the run's seed fixes."""
    order = np.random.default_rng([run.args.seed, PICK]).permutation(len(run.split.images))
    return order.tolist()


# ---- 3. The table: base against BGAugment --------------------------------------------------------


def pair_up(runs):
    """[{"base": Run, "bgaugment": Run}] of runs that differ in nothing else; one may be missing."""
    pairs = {}
    for run in sorted(runs, key=lambda run: run.args.bgaugment):  # base first
        args, variant = run.args, "bgaugment" if run.args.bgaugment else "base"
        key = [run.folder.parent, run.tested, args.loss, args.epochs, args.seed, args.settings,
               args.hparams]
        while variant in pairs.setdefault(str(key), {}):
            key.append("a copy of the run")
        pairs[str(key)][variant] = run
    return list(pairs.values())


def compare(base, other):
    """(mean of other - base, bounds of its 95 % bootstrap interval, fraction of images where it is
    positive) of two {image: (score, a, p)}; None if no image has both scores."""
    gain = np.array([other[image][0] - base[image][0] for image in base if image in other])
    gain = gain[np.isfinite(gain)]
    if len(gain) == 0:
        return None
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(RESAMPLES)]
    return gain.mean(), *np.quantile(means, [0.025, 0.975]), (gain > 0).mean()


def score_table(pairs, scores):
    """Text: a row per run, above the paper's. scores: {run folder: {image: (score, a, p)}}."""
    # DIFF: images with an undefined attention score are left out of the mean and listed.
    # DIFF: the attention score's standard deviation has ddof 1, not 0.
    rows, notes = [], []
    for pair in pairs:
        for run in pair.values():
            found = scores[run.folder]
            undefined = [image for image in found if not np.isfinite(found[image][0])]
            defined = [score for score, _, _ in found.values() if np.isfinite(score)]
            row = {"": run.folder.name, "images": f"{len(defined):,}",
                   "attention": bgbias.mean_and_std(defined) if defined else "undefined"}
            rows.append(row)
            for paper in bgbias.paper_row(vars(run.args)):
                rows.append({"": paper[""], "attention": paper["attention"]})
            if undefined:
                notes.append(f"{run.folder}: {len(undefined):,} images are left out, because "
                             "their mask is full or their map is flat, among them "
                             + ", ".join(undefined[:5]))
        gain = compare(*(scores[run.folder] for run in pair.values())) if len(pair) == 2 else None
        if gain:
            row["BGAugment - base [95 %]"] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)
            row["images improved"] = f"{100 * gain[3]:.0f} %"
    return "\n".join([bgbias.as_table(rows), *notes])


# ---- 4. Pictures: attention and nearest neighbours -----------------------------------------------


def title_of(run):
    if run.args.bgaugment:
        return "BGAugment"
    return "base" if run.args.epochs else "not trained"


def cell_side(columns):
    """The side of a cell in px."""
    return (WIDTH + GAP) // columns - GAP


def draw_grid(rows, columns, file):
    """Writes a PNG of rows (caption, cells). The caption stands above its row. A cell is (uint8
    tensor or PIL image, text, colour of its frame or None)."""
    font, px = ImageFont.load_default(TEXT), cell_side(columns)
    heights = [px + GAP + 2 * TEXT * len(caption.splitlines()) for caption, _ in rows]
    canvas = Image.new("RGB", (WIDTH, sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for caption, cells in rows:
        for text in caption.splitlines():
            draw.text((0, top + TEXT), text, "black", font, anchor="lm")
            top += 2 * TEXT
        for k, (picture, text, colour) in enumerate(cells):
            left = k * (px + GAP)
            if torch.is_tensor(picture):
                picture = TF.to_pil_image(picture)
            canvas.paste(picture.convert("RGB").resize((px, px), Image.LANCZOS), (left, top))
            if colour:
                draw.rectangle((left, top, left + px - 1, top + px - 1), None, colour, GAP)
            draw.text((left + 2 * GAP, top + 2 * GAP), text, "white", font, stroke_width=2,
                      stroke_fill=colour or "black")
        top += px + GAP
    bgbias.write(file, lambda draft: canvas.save(draft, "PNG"))
    print(f"picture: {file}")


def draw_attention(pair, count, file):
    """Draws --figure: each row shows an image, its mask, and the map of each run of the pair."""
    runs = list(pair.values())
    rows = shuffled(runs[0])[:count]
    drawn = [collect_maps(run, rows, network_of(run)) for run in runs]
    lines, side = [], cell_side(2 + len(runs))
    for n in range(len(rows)):
        photo, mask = (TF.to_pil_image(planes).resize((side, side), Image.LANCZOS)
                       for planes in drawn[0][0][n].split((3, 1)))
        cells = [(photo, "photo", None), (outlined(photo, mask), "mask", None)]
        for run, (photos, maps) in zip(runs, drawn):
            score = attention_score(maps[n], photos[n, 3] / 255)
            cells.append((outlined(heated(photo, maps[n]), mask),
                          f"{title_of(run)} {score:.2f}", None))
        lines.append(("", cells))
    draw_grid(lines, 2 + len(runs), file)


def outlined(photo, mask):
    """The photo with a line where its soft mask crosses one half."""
    inside = mask.point(lambda value: 255 * (value >= 128))
    edge = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(3)),
                                 inside.filter(ImageFilter.MinFilter(3)))
    return Image.composite(Image.new("RGB", photo.size, "cyan"), photo, edge)


def heated(photo, attention):
    """Attention (S, S) over the grey photo: from grey (0) over red to yellow (1)."""
    level = TF.to_pil_image(attention.float()).resize(photo.size, Image.BILINEAR)
    full, empty = (Image.new("L", photo.size, value) for value in (255, 0))
    grey = photo.convert("L").point(lambda value: 0.7 * value).convert("RGB")
    return Image.composite(Image.merge("RGB", (full, level, empty)), grey, level)


def nearest(run, rows):
    """{"clean": (Q, 5), "replaced": (Q, 5)}: the rows of the clean photos that are nearest to each
    photo in `rows`, which is clean or has a new background (draw 0 of the test's `query`)."""
    batches = photos_of(run, range(len(run.split.images)), {"replaced": 1})
    embeddings = bgbias.embed(network_of(run), loader(batches, run.args))
    center = embeddings["clean"][0].mean(dim=0)  # see retrieval_metrics()
    gallery, found = embeddings["clean"][0] - center, {}
    for condition, (queries,) in embeddings.items():
        distances = torch.cdist(queries[rows] - center, gallery)
        distances[range(len(rows)), rows] = torch.inf  # a photo is not its own neighbour
        found[condition] = distances.argsort(dim=1)[:, :min(NEIGHBOURS, len(gallery) - 1)].cpu()
    return found


def draw_neighbours(pair, count, file, *, worst):
    """Draws --neighbours: a row shows a query from clean to replaced and, for one run, the photos
    nearest to the last version. With `worst`, only queries that the new background misleads."""
    first = next(iter(pair.values()))
    labels = torch.as_tensor(first.split.labels)
    rows = shuffled(first)[:CANDIDATES if worst else count]
    found = {variant: nearest(run, rows) for variant, run in pair.items()}
    right = {}
    for variant, near in found.items():
        right[variant] = {key: labels[near[key]] == labels[rows][:, None] for key in near}
    queries = range(len(rows))
    if worst:
        hits = right[next(iter(pair))]
        queries = (hits["clean"][:, 0] & ~hits["replaced"][:, 0]).nonzero()[:count, 0].tolist()
        if not queries:
            raise UserError(f"--worst: new backgrounds mislead no query of {first.folder}; leave "
                            "out --worst")
    batches, lines = photos_of(first, range(len(labels)), bgbias.TEST_DRAWS), []
    for q in queries:
        photos, backgrounds, _ = batches[rows[q] // EVAL_BATCH]
        k = rows[q] % EVAL_BATCH
        image, mask = bgbias.unpack(photos[k:k + 1])
        drawn = {condition: bgbias.as_backgrounds(backgrounds[condition][0, k:k + 1])
                 for condition in ("same_class", "other_class", "replaced")}
        cells = [(photos[k, :3], "query", None)]
        for condition, other in {"pasted": bgbias.remove_object(image, mask), **drawn}.items():
            version = bgbias.replace_background(image, mask, other)[0].round().byte()
            cells.append((version, condition.replace("_", "\n"), None))
        name = "/".join(first.split.images[rows[q]].parts[-2:])
        name += ", picked because it is misled\n" if worst else "\n"
        for variant, near in found.items():
            hits = right[variant]["replaced"][q]
            for row, hit in zip(near["replaced"][q].tolist(), hits):
                photo = TF.center_crop(batches.photos[row], batches.size)
                cells.append((photo[:3], *(("right", RIGHT) if hit else ("wrong", WRONG))))
            lines.append((f"{name}{title_of(pair[variant])}: {int(hits.sum())} of {len(hits)} "
                          f"right with the new background, {int(right[variant]['clean'][q].sum())} "
                          f"of {len(hits)} with its original background", cells))
            cells, name = [BLANK] * VERSIONS, ""  # the other run's row has the same query
    draw_grid(lines, VERSIONS + NEIGHBOURS, file)


# ---- 5. Checks beyond the paper, because gradients can mislead (Shah et al. 2021) ----------------


@torch.no_grad()
def occlusion(run, network, rows):
    """(3, N), without gradients: how far the embedding moves when another background replaces the
    background, how far when it replaces the object, and the object's share of the image."""
    moves, distance = [], DISTANCES[run.args.loss]
    for photos, backgrounds, _ in loader(photos_of(run, rows, {"replaced": 1}), run.args):
        images, masks = bgbias.unpack(photos)
        other = bgbias.as_backgrounds(backgrounds["replaced"][0])
        versions = (images, bgbias.replace_background(images, masks, other),
                    bgbias.replace_background(other, masks, images))
        e, new_background, new_object = (network(network.normalise(x)) for x in versions)
        moves.append(torch.stack([distance(e, new_background), distance(e, new_object),
                                  masks.mean((1, 2, 3))]).cpu())
    return torch.cat(moves, dim=1)


def check_run(run):
    """{column: mean over SANITY test images, as text}. Objects sit in the centre, where every
    network looks. So we also score against another image's mask: the difference is attention to
    *this* object."""
    rows, values = sorted(shuffled(run)[:SANITY]), {}
    for title, trained in (("score", True), ("random weights", False)):
        photos, maps = collect_maps(run, rows, network_of(run, trained=trained))
        masks = photos[:, 3] / 255
        score, other = attention_score(maps, masks), attention_score(maps, masks.roll(1, dims=0))
        values[title] = score.nanmean()
        values[f"{title}: beyond another's mask"] = (score - other).nanmean()
    hard = (masks >= 0.5).double()
    values["mask as map"] = attention_score(hard, hard).nanmean()
    values["its complement"] = attention_score(1 - hard, hard).nanmean()
    background, object_, p = occlusion(run, network_of(run), rows)
    values["occlusion"] = above_chance(object_ / (object_ + background), p).nanmean()
    values["background replaced"] = background.mean()
    values["object replaced"] = object_.mean()
    return {column: f"{value:.3f}" for column, value in values.items()}


# ---- 6. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Attention score of runs of bgbias.py (Kobs & Hotho 2022, Section 5).",
        epilog="A base run and a BGAugment run are compared if they differ in nothing else.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders")
    add("--limit", type=int, metavar="N", help="score only N random test images, without saving")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--figure", type=Path, metavar="PNG",
                        help="draw the attention of one run, or of a base and a BGAugment run")
    either.add_argument("--neighbours", type=Path, metavar="PNG", help="draw the nearest photos to "
                        "some queries on new backgrounds; computes no scores")
    add("--images", type=int, default=8, metavar="N", help="images in a picture [%(default)s]")
    add("--worst", action="store_true", help="with --neighbours: draw queries whose nearest photo "
        "is right on the original background and wrong on the new one")
    add("--sanity", action="store_true", help=f"check the score on {SANITY} images of each run")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    finished = [folder for folder in args.runs if Path(folder, "result.json").exists()]
    if not finished:
        raise UserError(f"{args.runs[0]}: not a finished run; give folders with a result.json")
    for folder in args.runs:
        if folder not in finished and not Path(folder).is_file():  # RUNS/* also matches logs
            print(f"{folder} is left out, because it is not a finished run")
    pairs = pair_up(load_run(folder, args.device) for folder in finished)
    if (args.figure or args.neighbours) and len(pairs) > 1:
        raise UserError(f"{', '.join(finished)}: too many runs for one picture; give one run, or a "
                        "base and a BGAugment run that differ in nothing else")
    if args.neighbours:
        return draw_neighbours(pairs[0], args.images, args.neighbours, worst=args.worst)
    runs = [run for pair in pairs for run in pair.values()]
    scores = {run.folder: score_run(run, args.limit) for run in runs}
    print(score_table(pairs, scores))
    if args.figure:
        draw_attention(pairs[0], args.images, args.figure)
    if args.sanity:
        rows = [{"": run.folder.name, **check_run(run)} for run in runs if scores[run.folder]]
        print(f"\n{bgbias.as_table(rows)}")


if __name__ == "__main__":
    bgbias.command(main)
