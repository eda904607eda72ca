"""How much of what moves an image's embedding lies on the object: the attention score of "On Background Bias
in Deep Metric Learning" (Kobs & Hotho 2022, Section 5), for every test image of runs of bgbias.py.

    python eval_attention.py runs/*                                         # scores and one table
    python eval_attention.py runs/toy-contrastive-base-s42 runs/toy-contrastive-bgaugment-s42 \
        --figure attention.png --images 8 --sanity
    python eval_attention.py runs/sop-triplet-base-s42 --shard 1/4 --device cuda:0    # and 2/4, 3/4, 4/4

1 is all attention on the object, 0 as much as chance, negative looks at the background. Everything but
the device comes from a run's config.json, so start it in the folder the run was trained in. Scores go to
RUN/attention.npz (arrays image, score, a, p; score is nan where undefined); the same command goes on
after an interruption and starts over if best.pt is another.

Memory: the copies of a batch of images keep at most 1 GiB for the backward pass on a CPU, 0.4 of the
free memory on a GPU (but always one image's); the peak is about twice that.

Shapes as in bgbias.py. Sections: 1. constants, 2. the score, 3. scores of a run, 4. table, 5. figure,
6. whether to believe it, 7. command line.
"""

import argparse
import hashlib
import io
import json
import signal
import time
import zipfile
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

# ----------------------------------------------------------------------------------------------------
# 1. Constants
# ----------------------------------------------------------------------------------------------------

COPIES, SIGMA, QUANTILE = 25, 0.15, 0.99  # noisy copies, noise in units of the image's range, clipping

PAPER_ATTENTION = {  # mean, standard deviation over the test images: base, BGAugment (Section 5)
    "cars196": {
        "arcface": ((0.49, 0.10), (0.56, 0.10)), "contrastive": ((0.50, 0.09), (0.53, 0.10)),
        "multi_similarity": ((0.52, 0.09), (0.50, 0.09)), "triplet": ((0.50, 0.09), (0.54, 0.09)),
        "normalized_softmax": ((0.51, 0.09), (0.56, 0.09))},
    "cub200": {
        "arcface": ((0.25, 0.08), (0.33, 0.09)), "contrastive": ((0.25, 0.08), (0.32, 0.10)),
        "multi_similarity": ((0.26, 0.08), (0.30, 0.09)), "triplet": ((0.24, 0.08), (0.33, 0.09)),
        "normalized_softmax": ((0.24, 0.08), (0.30, 0.08))},
    "sop": {
        "arcface": ((0.13, 0.14), (0.26, 0.17)), "contrastive": ((0.07, 0.16), (0.31, 0.20)),
        "multi_similarity": ((0.11, 0.17), (0.28, 0.19)), "triplet": ((0.08, 0.17), (0.26, 0.22)),
        "normalized_softmax": ((0.12, 0.14), (0.28, 0.20))},
}

NOISE, RANDOM, PICK = range(100, 103)  # purposes of a seed, beside bgbias.py's
EVERY = 60  # seconds between two writes of the scores
MOST = 32  # images a batch: past some hundred copies a GPU gains nothing
RESAMPLES = 2000  # of the bootstrap
SANITY = 200  # images of --sanity
ABOUT_ZERO = 0.05  # what a network with random weights may score: less than the paper's smallest score
CELL, GAP, TEXT = 216, 6, 17  # px of the figure: four cells are a README's width


# ----------------------------------------------------------------------------------------------------
# 2. The score
# ----------------------------------------------------------------------------------------------------


def euclidean(embeddings, others):
    """(B, D), (B or 1, D) -> (B,)"""
    return torch.linalg.vector_norm(embeddings - others, dim=1)


def cosine(embeddings, others):
    """(B, D), (B or 1, D) -> (B,), 0 to 2"""
    return 1 - F.cosine_similarity(embeddings, others, dim=1)


DISTANCES = {"contrastive": euclidean, "triplet": euclidean, "multi_similarity": cosine,
             "arcface": cosine, "normalized_softmax": cosine}


def attention_map(model, images, black_embedding, distance, generator):
    """Where the distance to the black image's embedding is sensitive: (B, 3, H, W) -> (B, H, W) in [0, 1].

    images: the network's input; model: (N, 3, H, W) -> (N, D), treating images apart (BatchNorm in eval mode);
    black_embedding (1, D); distance: euclidean or cosine; generator: of the noise, or a list of B, one an image
    (then an image's noise does not depend on the batch). A flat map is 0 everywhere. Section 5.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(images)
    noise = torch.stack([torch.randn(COPIES, *images.shape[1:], generator=g, device=g.device, dtype=images.dtype)
                         for g in generators]).to(images.device)  # (B, 25, 3, H, W)
    sigma = SIGMA * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    copies = (images[:, None] + sigma[:, None, None, None, None] * noise).flatten(0, 1).requires_grad_()
    target = distance(model(copies), black_embedding).sum() / COPIES  # every image's mean: they do not mix
    gradient, = torch.autograd.grad(target, copies)  # no gradients of the weights
    G = gradient.mean(dim=1).abs().unflatten(0, (-1, COPIES)).sum(dim=1)  # signed mean over the channels
    low, high = G.amin((1, 2)), G.flatten(1).quantile(QUANTILE, dim=1)
    span = (high - low).clamp(min=torch.finfo(G.dtype).tiny)  # 0 / 0 is 0
    return ((G - low[:, None, None]) / span[:, None, None]).clip(0, 1)


def shares(attention, mask):
    """Share of the attention on the object and of the image that is object, (B,) and (B,), float64.
    attention (B, H, W); mask (B, 1, H, W) or (B, H, W) in [0, 1], soft, 1 = foreground."""
    attention = attention.double()
    mask = mask.double().reshape(attention.shape)
    return (attention * mask).sum((-2, -1)) / attention.sum((-2, -1)), mask.mean((-2, -1))


def attention_score(attention, mask):
    """(a - p) / (1 - p) of shares(): (B, H, W), (B, 1, H, W) -> (B,) up to 1, 0 = chance; nan where it is
    undefined, that is p = 1 or no attention anywhere. Section 5."""
    return above_chance(*shares(attention, mask))


def above_chance(a, p):
    return torch.where(p < 1, (a - p) / (1 - p), torch.nan)


# ----------------------------------------------------------------------------------------------------
# 3. Scores of a run
# ----------------------------------------------------------------------------------------------------

Run = namedtuple("Run", "folder args images masks")  # of the test split


def open_run(folder, device="auto", workers=None):
    """The Run in `folder`. Raises UserError."""
    folder = Path(folder)
    for name in ("config.json", "best.pt"):
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing; give folders of finished runs of bgbias.py")
    try:
        saved = json.loads((folder / "config.json").read_text())["args"]
        args = bgbias.complete(argparse.Namespace(**saved | {"device": device, "workers": workers}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: not of this bgbias.py ({error!r}); train again with --fresh") from error
    try:
        index = bgbias.load_index(args.dataset, args.data)
    except UserError as error:
        raise UserError(f"{error} (as {folder / 'config.json'} says, whose paths start where it was trained)") from error
    return Run(folder, args, *bgbias.pick(index, index.split["test"]))


def load_model(run):
    """The run's best epoch, on its device. Raises UserError."""
    model, file = bgbias.Embedder(run.args.backbone, "none", run.args.image_size), run.folder / "best.pt"
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    except Exception as error:  # noqa: BLE001 - pickle, zip and torch each raise their own
        raise UserError(f"{file}: not a checkpoint of {run.args.backbone} ({' '.join(str(error).split())[:150]}); "
                        "train again with --fresh") from error
    return frozen(model, run.args.device)


def frozen(model, device):
    """Without gradients of weights nothing is kept for them; channels_last is 1.3 times as fast, on a CPU too."""
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def images_per_batch(model, size, device):
    """How many images' copies fit: measured by what one copy keeps for the backward pass."""
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = model(torch.zeros(1, 3, size, size, device=device, requires_grad=True))
    image = COPIES * sum(n for pointer, n in kept.items() if pointer not in weights)
    del held  # till here, so that no two tensors share an address
    room = 0.4 * torch.cuda.mem_get_info(device)[0] if str(device).startswith("cuda") else 2**30
    return max(1, min(MOST, int(room / image)))


def attention_maps(run, model, rows):
    """Yields (rows, photos (B, 4, S, S) uint8, attention (B, S, S) on the CPU) of test images, by batches."""
    args = run.args
    with torch.no_grad():
        black = model(model.normalise(torch.zeros(1, 3, args.image_size, args.image_size, device=args.device)))
    B = images_per_batch(model, args.image_size, args.device)
    lists = [rows[i : i + B] for i in range(0, len(rows), B)]
    photos = bgbias.Photos(run.images, run.masks, args.short_side, args.image_size, keep=False)
    batches = bgbias.Batches(photos, lists, args.image_size, False, None, 0, (args.seed,))
    for rows, (photos, _) in zip(lists, bgbias.loader(batches, args)):
        if bgbias.STOP:
            raise bgbias.Stopped
        generators = [torch.Generator(args.device).manual_seed(bgbias.mix(args.seed, NOISE, row)) for row in rows]
        images = model.normalise(photos[:, :3].to(args.device).float())
        yield rows, photos, attention_map(model, images, black, DISTANCES[args.loss], generators).cpu()


def score_images(run, model, rows):
    """Yields (image path, (score, a, p)) of test images."""
    for rows, photos, attention in attention_maps(run, model, rows):
        a, p = shares(attention, photos[:, 3] / 255)
        for row, values in zip(rows, torch.stack([above_chance(a, p), a, p], dim=1).tolist()):
            yield str(run.images[row]), values


def score_run(run, shard=(1, 1)):
    """{image path: (score, a, p)} of what is scored of a run's test images, after scoring the i-th of every n.
    Writes RUN/attention.npz, or RUN/attention-IofN.npz until all shards are there. Raises UserError, Stopped."""
    i, n = shard
    part = "attention.npz" if n == 1 else f"attention-{i}of{n}.npz"
    scores = read_scores(run)
    todo = [row for row in range(i - 1, len(run.images), n) if str(run.images[row]) not in scores]
    bar = tqdm(total=len(todo), desc=str(run.folder), unit="image", disable=None if todo else True)
    written = time.monotonic()
    try:
        for image, values in score_images(run, load_model(run), todo) if todo else ():
            scores[image] = values
            bar.update()
            if time.monotonic() > written + EVERY:
                write_scores(run, part, scores)
                written = time.monotonic()
    finally:  # whatever stops it
        bar.close()
        if todo:
            write_scores(run, part, scores)
    scores = read_scores(run)  # other shards may have written meanwhile
    if len(scores) == len(run.images) and not (n == 1 and todo):
        write_scores(run, "attention.npz", scores)
    return scores


def checkpoint_id(run):
    return hashlib.sha256((run.folder / "best.pt").read_bytes()).hexdigest()


def read_scores(run):
    """What RUN's attention*.npz hold of this best.pt and these test images. Raises UserError."""
    wanted, scores, id_now = {str(p) for p in run.images}, {}, checkpoint_id(run)
    for file in sorted(run.folder.glob("attention*.npz")):
        try:
            with np.load(file) as saved:
                if saved["best"] == id_now:
                    scores |= zip(saved["image"].tolist(), zip(*(saved[k].tolist() for k in ("score", "a", "p"))))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file}: not readable ({error}); delete it") from error
    return {image: values for image, values in scores.items() if image in wanted}


def write_scores(run, name, scores):
    score, a, p = np.array(list(scores.values())).reshape(-1, 3).T
    buffer = io.BytesIO()
    np.savez(buffer, image=np.array(list(scores), str), score=score, a=a, p=p, best=checkpoint_id(run))
    bgbias.write(run.folder / name, lambda draft: draft.write_bytes(buffer.getbuffer()))


# ----------------------------------------------------------------------------------------------------
# 4. Table
# ----------------------------------------------------------------------------------------------------


def pair_up(runs):
    """{(dataset, loss, seed): {"base": Run, "bgaugment": Run}}, either may lack. Raises UserError."""
    pairs = {}
    for run in runs:
        args = run.args
        pair = pairs.setdefault((Path(args.dataset).resolve().name, args.loss, args.seed), {})
        kind = "bgaugment" if args.bgaugment else "base"
        if kind in pair:
            raise UserError(f"{run.folder}: the same dataset, loss and seed as {pair[kind].folder}; give one of them")
        pair[kind] = run
    return pairs


def compare(base, other, seed=0):
    """Mean of other - base over the images both define, its 95 % bootstrap interval over images, and the share
    of images where it is positive; each {image: (score, a, p)}. None if there are no such images."""
    gain = np.array([other[image][0] - base[image][0] for image in sorted(base.keys() & other.keys())])
    gain = gain[np.isfinite(gain)]
    if not len(gain):
        return None
    rng = np.random.default_rng(seed)
    means = [gain[rng.integers(len(gain), size=len(gain))].mean() for _ in range(RESAMPLES)]
    return gain.mean(), *np.quantile(means, [0.025, 0.975]), (gain > 0).mean()


def summary(scores):
    """Mean +- standard deviation (ddof 1) of the defined scores, as text."""
    values = np.array([score for score, _, _ in scores.values()])
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return "too few images"
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def table(pairs, scores):
    """Markdown: base and BGAugment side by side; `scores` is {run folder: {image: (score, a, p)}}."""
    lines = ["| run | images | base | + BGAugment | paper: base | + BGAugment | difference [95 %] | improved |",
             "|---|---|---|---|---|---|---|---|"]
    notes = []
    for (dataset, loss, seed), pair in pairs.items():
        found = {kind: scores[run.folder] for kind, run in pair.items()}
        ours = [summary(found[kind]) if kind in found else "-" for kind in ("base", "bgaugment")]
        paper = PAPER_ATTENTION.get(dataset, {}).get(loss)
        paper = [f"{mean:.2f} ± {std:.2f}" for mean, std in paper] if paper else ["-", "-"]
        gain = compare(found["base"], found["bgaugment"]) if len(found) == 2 else None
        gain = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain), f"{100 * gain[3]:.0f} %"] if gain else ["-", "-"]
        cells = [f"{dataset} {loss} s{seed}", f"{max(map(len, found.values())):,}", *ours, *paper, *gain]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"\n{pair[kind].folder}: {note}" for kind in pair if (note := undefined(found[kind]))]
    return "\n".join(lines + notes)


def undefined(scores):
    """One line that counts and names the images without a score, or nothing."""
    names = [image for image, (score, _, _) in scores.items() if not np.isfinite(score)]
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return names and (f"{len(names):,} of {len(scores):,} images left out, their mask is full or their map flat: "
                      f"{', '.join(names[:5])}{more}")


# ----------------------------------------------------------------------------------------------------
# 5. Figure
# ----------------------------------------------------------------------------------------------------


def choose(run, found, wanted, worst):
    """Test images to show, as rows: their names, or their number, by seed or where the two runs differ most."""
    images = [str(p) for p in run.images]
    if not (len(wanted) == 1 and wanted[0].isdigit()):
        rows = [[i for i, image in enumerate(images) if f"/{image}".endswith(f"/{name}")] for name in wanted]
        if [] in rows:
            raise UserError(f"--images {wanted[rows.index([])]}: no test image of {run.folder}; see its attention.npz")
        return [row[0] for row in rows]
    gaps = np.array([found["bgaugment"][image][0] - found["base"][image][0] for image in images])
    rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(images))
    rows = [int(row) for row in rows if np.isfinite(gaps[row])]
    if worst:
        rows.sort(key=lambda row: -abs(gaps[row]))
    return rows[: int(wanted[0])]


def figure(pair, found, rows, file):
    """Writes a PNG: a row per image: photo, mask outline, base and BGAugment heat maps with their scores."""
    run = pair["base"]
    photos = bgbias.Photos(run.images, run.masks, run.args.short_side, run.args.image_size, keep=False)
    pictures = [[TF.to_pil_image(x).resize((CELL, CELL), Image.LANCZOS) for x in photos[row].split((3, 1))]
                for row in rows]
    columns = {"photo": [photo for photo, _ in pictures], "mask": [outlined(*both) for both in pictures]}
    for kind, title in (("base", "base"), ("bgaugment", "+ BGAugment")):
        maps = [a for _, _, batch in attention_maps(pair[kind], load_model(pair[kind]), rows) for a in batch]
        columns[title] = [outlined(heated(photo, a), mask) for a, (photo, mask) in zip(maps, pictures)]
        for row, cell in zip(rows, columns[title]):
            label(cell, f"{found[kind][str(run.images[row])][0]:.2f}")
    canvas = Image.new("RGB", (4 * (CELL + GAP) - GAP, 2 * TEXT + len(rows) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for x, (title, cells) in zip(range(0, canvas.width, CELL + GAP), columns.items()):
        draw.text((x + CELL / 2, TEXT), title, "black", font, anchor="mm")
        for k, cell in enumerate(cells):
            canvas.paste(cell, (x, 2 * TEXT + k * (CELL + GAP)))
    bgbias.write(Path(file), lambda draft: canvas.save(draft, "PNG"))


def label(cell, text):
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(TEXT)
    _, _, right, bottom = draw.textbbox((GAP, GAP), text, font)
    draw.rectangle((0, 0, right + GAP, bottom + GAP), "black")
    draw.text((GAP, GAP), text, "white", font)


def outlined(photo, mask):
    """The photo with the edge of its mask, where the soft mask crosses one half."""
    inside = mask.point(lambda value: 255 * (value >= 128))
    edge = ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(3)), inside.filter(ImageFilter.MinFilter(3)))
    return Image.composite(Image.new("RGB", photo.size, (0, 255, 255)), photo, edge)


def heated(photo, attention):
    """Attention (S, S) over the greyed photo: none is grey, then red, 1 is yellow."""
    level = TF.to_pil_image(attention.float()).resize(photo.size, Image.BILINEAR)
    level = np.asarray(level, np.float32)[..., None] / 255
    grey = np.asarray(photo.convert("L"), np.float32)[..., None] * 0.6
    colour = np.concatenate([np.full_like(level, 255), 255 * level, np.zeros_like(level)], axis=2)
    alpha = np.sqrt(level)
    return Image.fromarray((grey * (1 - alpha) + colour * alpha).astype(np.uint8))


# ----------------------------------------------------------------------------------------------------
# 6. Whether to believe it: input gradients can mislead (Shah et al. 2021), so four checks beyond the paper
# ----------------------------------------------------------------------------------------------------


def sample(run):
    """Rows of at most SANITY test images, the same for all runs of a seed."""
    return sorted(np.random.default_rng([run.args.seed, PICK]).permutation(len(run.images))[:SANITY].tolist())


@torch.no_grad()
def occlusion(run, model, rows):
    """How far the embedding moves when the background is swapped and when the object is, and what is object:
    three (N,). Both take the same photo of the test pool; no gradients involved."""
    args, moves = run.args, []
    photos = bgbias.Photos(run.images, run.masks, args.short_side, args.image_size, keep=False)
    pool = bgbias.Photos(bgbias.list_backgrounds(args.backgrounds, "test"), None, args.short_side)
    lists = [rows[i : i + bgbias.EVAL_BATCH] for i in range(0, len(rows), bgbias.EVAL_BATCH)]
    batches = bgbias.Batches(photos, lists, args.image_size, False, pool, 1, (args.seed, bgbias.TEST))
    for photo, (drawn,) in bgbias.loader(batches, args):
        image, mask = photo[:, :3].to(args.device).float(), photo[:, 3:].to(args.device) / 255
        drawn = drawn.to(args.device).float()
        swaps = (image, bgbias.replace_background(image, mask, drawn), bgbias.replace_background(drawn, mask, image))
        e, *moved = (model(model.normalise(x)) for x in swaps)
        moves.append(torch.stack([*(DISTANCES[args.loss](e, other) for other in moved), mask.mean((1, 2, 3))]).cpu())
    return torch.cat(moves, dim=1)


def random_scores(run, rows):
    """{image: (score, a, p)} of the same network with random weights."""
    torch.manual_seed(bgbias.mix(run.args.seed, RANDOM))
    model = frozen(bgbias.Embedder(run.args.backbone, "none", run.args.image_size), run.args.device)
    return dict(score_images(run, model, rows))


def mean(values):
    values = np.asarray(values, np.float64)
    return values[np.isfinite(values)].mean()


def oracles(run, rows):
    """Mean score of a map that is the mask, thresholded at one half, and of its complement."""
    photos = bgbias.Photos(run.images, run.masks, run.args.short_side, run.args.image_size, keep=False)
    masks = torch.stack([photos[row][3] >= 128 for row in rows]).double()
    return mean(attention_score(masks, masks)), mean(attention_score(1 - masks, masks))


def sanity(pairs, scores):
    """Markdown: per run the score beside occlusion's, then the checks and whether each holds."""
    lines = ["", f"| run (at most {SANITY} images) | attention score | occlusion score | moved by background "
             "| moved by object | random weights |", "|---|---|---|---|---|---|"]
    checks = []
    for run in (run for pair in pairs.values() for run in pair.values()):
        rows = sample(run)
        ours = mean([scores[run.folder][str(run.images[row])][0] for row in rows])
        background, object_, p = occlusion(run, load_model(run), rows)
        moved = above_chance(object_ / (object_ + background), p)
        random = mean([score for score, _, _ in random_scores(run, rows).values()])
        lines.append(f"| {run.folder.name} | {ours:.3f} | {mean(moved):.3f} | {background.mean():.3f} "
                     f"| {object_.mean():.3f} | {random:.3f} |")
        same, complement = oracles(run, rows)
        checks += [(f"{run.folder.name}: the mask as map scores 1, its complement less than 0",
                    f"{same:.3f}, {complement:.3f}", same == 1 and complement < 0),
                   (f"{run.folder.name}: random weights score 0 within {ABOUT_ZERO}", f"{random:.3f}",
                    abs(random) <= ABOUT_ZERO)]
    for (dataset, loss, seed), pair in pairs.items():
        if dataset == "toy" and len(pair) == 2:
            gain, low, high, _ = compare(scores[pair["base"].folder], scores[pair["bgaugment"].folder])
            checks.append((f"toy {loss} s{seed}: BGAugment beats base", f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]", low > 0))
    lines += ["", "| check | found | holds |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {found} | {'yes' if holds else '**no**'} |" for what, found, holds in checks])


# ----------------------------------------------------------------------------------------------------
# 7. Command line
# ----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    def part(text):
        i, n = (int(number) for number in text.split("/"))
        if not 1 <= i <= n:
            raise ValueError
        return i, n

    part.__name__ = "I/N with 1 <= I <= N"  # argparse: invalid ... value
    parser = argparse.ArgumentParser(description="Attention score of runs of bgbias.py (Kobs & Hotho 2022, Section 5).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", help="run folders; a base and a BGAugment run of one dataset, loss and seed are compared")
    add("--shard", type=part, default=(1, 1), metavar="I/N", help="score the I-th of every N images only")
    add("--figure", type=Path, metavar="PNG", help="draw the maps of one base and one BGAugment run")
    add("--images", nargs="+", default=["8"], help="for --figure: how many, or file names")
    add("--worst", action="store_true", help="for --figure: where the two runs differ most, instead of by seed")
    add("--sanity", action="store_true", help="also check whether the score can be believed")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=int, help="processes that prepare batches (default: 8 on a GPU, 0 on the CPU)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: bgbias.STOP.append(True))
    pairs = pair_up(open_run(folder, args.device, args.workers) for folder in args.runs)
    runs = [run for pair in pairs.values() for run in pair.values()]
    if args.figure and not (len(pairs) == 1 and len(runs) == 2):
        raise UserError("--figure: give one base and one BGAugment run of the same dataset, loss and seed")
    if args.figure and (args.figure.suffix != ".png" or not args.figure.parent.is_dir()):
        raise UserError(f"--figure {args.figure}: give a .png in a folder that exists")
    scores = {run.folder: score_run(run, args.shard) for run in runs}
    missing = {run.folder: len(run.images) - len(scores[run.folder]) for run in runs}
    if any(missing.values()):
        folder, n = max(missing.items(), key=lambda item: item[1])
        return print(f"shard {args.shard[0]}/{args.shard[1]} is done; {folder} lacks {n:,} images of the others")
    print(table(pairs, scores))
    if args.figure:
        pair, = pairs.values()
        found = {kind: scores[run.folder] for kind, run in pair.items()}
        figure(pair, found, choose(pair["base"], found, args.images, args.worst), args.figure)
        print(f"\n{args.figure}")
    if args.sanity:
        print(sanity(pairs, scores))


if __name__ == "__main__":
    bgbias.command("eval_attention.py", main)
