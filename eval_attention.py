"""How much of what moves an image's embedding lies on the object: the attention score of "On
Background Bias in Deep Metric Learning" (Kobs & Hotho 2022, Section 5), for runs of bgbias.py.

    python eval_attention.py runs/*                       # scores of all test images, one table
    python eval_attention.py runs/toy-contrastive-base-s42 runs/toy-contrastive-bgaugment-s42 \
        --figure attention.png --images 8 --sanity
    python eval_attention.py runs/sop-triplet-base-s42 --shard 1/4 --device cuda:0  # 2/4, 3/4, 4/4

1 is all attention on the object, 0 as much as chance, negative looks at the background. All but the
device comes from a run's config.json, so start it in the folder the run was trained in. Scores go
to RUN/attention.npz (arrays image, score, a, p; score is nan where undefined). The same command
goes on after an interruption, and starts over if best.pt is another.

Memory: what the copies of a batch keep for the backward pass is at most 128 MiB on a CPU (more is
slower), 0.4 of the free memory on a GPU, or one image's if that is more (BN-Inception at 227 px:
1.1 GiB). The peak beyond the network itself, measured on a CPU, is 1.3 times that.

Shapes as in bgbias.py. Sections: 1. constants, 2. the score, 3. scores of a run, 4. table,
5. figure, 6. whether to believe it, 7. command line.
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

# --------------------------------------------------------------------------------------------------
# 1. Constants
# --------------------------------------------------------------------------------------------------

COPIES, SIGMA, QUANTILE = 25, 0.15, 0.99  # copies; their noise, in the image's range; clipping

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
CPU_ROOM, GPU_ROOM = 2**27, 0.4  # bytes; share of the free memory
RESAMPLES = 2000  # of the bootstrap
SANITY = 200  # images of --sanity
ABOUT_ZERO = 0.05  # what random weights may score: less than the paper's smallest
CELL, GAP, TEXT = 216, 6, 17  # px of the figure: four cells are a README's width


# --------------------------------------------------------------------------------------------------
# 2. The score
# --------------------------------------------------------------------------------------------------


def euclidean(embeddings, others):
    """(B, D), (B or 1, D) -> (B,)"""
    return torch.linalg.vector_norm(embeddings - others, dim=1)


def cosine(embeddings, others):
    """(B, D), (B or 1, D) -> (B,), 0 to 2"""
    return 1 - F.cosine_similarity(embeddings, others, dim=1)


DISTANCES = {"contrastive": euclidean, "triplet": euclidean, "multi_similarity": cosine,
             "arcface": cosine, "normalized_softmax": cosine}


def attention_map(model, images, black_embedding, distance, generator):
    """Where the distance to the black image's embedding is sensitive: (B, 3, H, W) -> (B, H, W) in
    [0, 1]. Section 5.

    images: the network's input. model: (N, 3, H, W) -> (N, D), one image not touching another
    (BatchNorm in eval mode). black_embedding: (1, D). distance: euclidean or cosine. generator: of
    the noise, or a list of B, one an image, so that the batch does not matter. A flat map is all 0.
    """
    generators = generator if isinstance(generator, list) else [generator] * len(images)
    noise = torch.stack([
        torch.randn(COPIES, *images.shape[1:], generator=g, device=g.device, dtype=images.dtype)
        for g in generators]).to(images.device)  # (B, 25, 3, H, W)
    sigma = SIGMA * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    copies = images[:, None] + sigma[:, None, None, None, None] * noise
    copies = copies.flatten(0, 1).requires_grad_()  # (B * 25, 3, H, W)
    target = distance(model(copies), black_embedding).sum() / COPIES  # sum of the images' means
    gradient, = torch.autograd.grad(target, copies)  # none of the weights
    gradient = gradient.mean(dim=1).abs()  # signed mean over the channels first
    G = gradient.unflatten(0, (-1, COPIES)).sum(dim=1)  # (B, H, W)
    low, high = G.amin((1, 2)), G.flatten(1).quantile(QUANTILE, dim=1)
    span = (high - low).clamp(min=torch.finfo(G.dtype).tiny)  # 0 / 0 is 0
    return ((G - low[:, None, None]) / span[:, None, None]).clip(0, 1)


def shares(attention, mask):
    """Share of the attention on the object, share of the image that is object: two (B,) float64.
    attention (B, H, W); mask (B, 1, H, W) or (B, H, W) in [0, 1], soft, 1 = foreground."""
    attention = attention.double()
    mask = mask.double().reshape(attention.shape)
    return (attention * mask).sum((-2, -1)) / attention.sum((-2, -1)), mask.mean((-2, -1))


def attention_score(attention, mask):
    """(a - p) / (1 - p) of shares(): (B, H, W), (B, 1, H, W) -> (B,), at most 1, 0 = chance; nan if
    it is undefined: p = 1, or no attention anywhere. Section 5."""
    return above_chance(*shares(attention, mask))


def above_chance(a, p):
    return torch.where(p < 1, (a - p) / (1 - p), torch.nan)


# --------------------------------------------------------------------------------------------------
# 3. Scores of a run
# --------------------------------------------------------------------------------------------------

Run = namedtuple("Run", "folder args images masks")  # of the test split


def open_run(folder, device="auto", workers=None):
    """The Run in `folder`. Raises UserError."""
    folder = Path(folder)
    for name in ("config.json", "best.pt"):
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing; give folders of finished runs of bgbias.py")
    try:
        saved = json.loads((folder / "config.json").read_text())["args"]
        args = argparse.Namespace(**saved | {"device": device, "workers": workers})
        args = bgbias.complete(args)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: not of this bgbias.py ({error!r}); train again "
                        "with --fresh") from error
    try:
        index = bgbias.load_index(args.dataset, args.data)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error} (its paths start in the folder the run "
                        "was trained in)") from error
    return Run(folder, args, *bgbias.pick(index, index.split["test"]))


def load_model(run):
    """The run's best epoch, on its device. Raises UserError."""
    args, file = run.args, run.folder / "best.pt"
    model = bgbias.Embedder(args.backbone, "none", args.image_size)
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    except Exception as error:  # noqa: BLE001 - pickle, zip and torch each raise their own
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{file}: not a checkpoint of {args.backbone} ({reason}); train again with "
                        "--fresh") from error
    return frozen(model, args.device)


def frozen(model, device):
    """`model` for input gradients only: nothing is kept for the weights', and channels_last is the
    faster layout, on a CPU too."""
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
    cuda = str(device).startswith("cuda")
    room = GPU_ROOM * torch.cuda.mem_get_info(device)[0] if cuda else CPU_ROOM
    return max(1, min(MOST, int(room / image)))


def attention_maps(run, model, rows):
    """Yields (rows, photos (B, 4, S, S) uint8, attention (B, S, S)) of test images, on the CPU."""
    args, size = run.args, run.args.image_size
    with torch.no_grad():
        black = model(model.normalise(torch.zeros(1, 3, size, size, device=args.device)))
    lists = torch.tensor(rows).split(images_per_batch(model, size, args.device))
    batches = bgbias.Batches(test_photos(run), lists, size, False, None, 0, (args.seed,))
    for rows, (photos, _) in zip(lists, bgbias.loader(batches, args)):
        if bgbias.STOP:
            raise bgbias.Stopped
        seeds = [bgbias.mix(args.seed, NOISE, int(row)) for row in rows]
        generators = [torch.Generator(args.device).manual_seed(seed) for seed in seeds]
        images = model.normalise(photos[:, :3].to(args.device).float())
        attention = attention_map(model, images, black, DISTANCES[args.loss], generators)
        yield rows, photos, attention.cpu()


def test_photos(run):
    args = run.args
    return bgbias.Photos(run.images, run.masks, args.short_side, args.image_size, keep=False)


def score_images(run, model, rows):
    """Yields (image path, (score, a, p)) of test images."""
    for rows, photos, attention in attention_maps(run, model, rows):
        a, p = shares(attention, photos[:, 3] / 255)
        for row, values in zip(rows, torch.stack([above_chance(a, p), a, p], dim=1).tolist()):
            yield str(run.images[row]), values


def score_run(run, shard=(1, 1)):
    """Scores what is left of the i-th of every n test images; {image path: (score, a, p)} of all
    scored so far. Writes RUN/attention.npz; a shard writes RUN/attention-IofN.npz, and the last one
    attention.npz too. Raises UserError; Stopped, with all saved."""
    i, n = shard
    part = "attention.npz" if n == 1 else f"attention-{i}of{n}.npz"
    scores = read_scores(run)
    todo = [row for row in range(i - 1, len(run.images), n) if str(run.images[row]) not in scores]
    if todo:
        written = time.monotonic()
        found = score_images(run, load_model(run), todo)
        try:
            for image, values in tqdm(found, str(run.folder), len(todo), disable=None):
                scores[image] = values
                if time.monotonic() > written + EVERY:
                    write_scores(run, part, scores)
                    written = time.monotonic()
        finally:  # whatever ends it
            write_scores(run, part, scores)
    scores = read_scores(run)  # other shards may have written meanwhile
    if len(scores) == len(run.images) and any(run.folder.glob("attention-*of*.npz")):
        write_scores(run, "attention.npz", scores)
    return scores


def checkpoint_id(run):
    return hashlib.sha256((run.folder / "best.pt").read_bytes()).hexdigest()


def read_scores(run):
    """What RUN's attention*.npz hold of this best.pt and these test images. Raises UserError."""
    scores, best = {}, checkpoint_id(run)
    for file in sorted(run.folder.glob("attention*.npz")):
        try:
            with np.load(file) as saved:
                values = np.stack([saved[name] for name in ("score", "a", "p")], axis=1).tolist()
                if saved["best"] == best:
                    scores |= zip(saved["image"].tolist(), values, strict=True)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file}: not readable ({error}); delete it") from error
    return {str(p): scores[str(p)] for p in run.images if str(p) in scores}


def write_scores(run, name, scores):
    score, a, p = np.array(list(scores.values())).reshape(-1, 3).T
    buffer = io.BytesIO()
    images = np.array(list(scores), str)
    np.savez(buffer, image=images, score=score, a=a, p=p, best=checkpoint_id(run))
    bgbias.write(run.folder / name, lambda draft: draft.write_bytes(buffer.getbuffer()))


# --------------------------------------------------------------------------------------------------
# 4. Table
# --------------------------------------------------------------------------------------------------


def pair_up(runs):
    """{(dataset, loss, seed): {"base": Run, "bgaugment": Run}}, either may lack. UserError if two
    runs would take the same place."""
    pairs = {}
    for run in runs:
        name = Path(run.args.dataset).resolve().name
        pair = pairs.setdefault((name, run.args.loss, run.args.seed), {})
        kind = "bgaugment" if run.args.bgaugment else "base"
        other = next(iter(pair.values()), run)
        if kind in pair:
            raise UserError(f"{run.folder}: the same dataset, loss and seed as "
                            f"{pair[kind].folder}; give one of them")
        if run.images != other.images:
            raise UserError(f"{run.folder}: has other test images than {other.folder}; give runs "
                            "trained with the same --data")
        pair[kind] = run
    return pairs


def compare(base, other, seed=0):
    """Mean of other - base over the images, the bounds of its 95 % bootstrap interval, the share of
    images where it is positive. Both {image: (score, a, p)}; None if no image has both scores."""
    gain = finite([other[image][0] - base[image][0] for image in base])
    if not len(gain):
        return None
    rng = np.random.default_rng(seed)
    means = [gain[rng.integers(len(gain), size=len(gain))].mean() for _ in range(RESAMPLES)]
    return gain.mean(), *np.quantile(means, [0.025, 0.975]), (gain > 0).mean()


def finite(values):
    values = np.asarray(values, np.float64)
    return values[np.isfinite(values)]


def summary(scores):
    """Mean ± standard deviation over the images (ddof 1), as text."""
    values = finite([score for score, _, _ in scores.values()])
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else "undefined"


def table(pairs, scores):
    """Markdown: base and BGAugment side by side; scores {run folder: {image: (score, a, p)}}."""
    lines = ["| run | images | base | + BGAugment | paper: base | + BGAugment | difference [95 %] "
             "| improved |", "|---|---|---|---|---|---|---|---|"]
    notes = []
    for (dataset, loss, seed), pair in pairs.items():
        found = {kind: scores[run.folder] for kind, run in pair.items()}
        ours = [summary(found[kind]) if kind in found else "-" for kind in ("base", "bgaugment")]
        paper = PAPER_ATTENTION.get(dataset, {}).get(loss)
        paper = [f"{mean:.2f} ± {std:.2f}" for mean, std in paper] if paper else ["-", "-"]
        gain = compare(found["base"], found["bgaugment"]) if len(found) == 2 else None
        gain = [interval(gain), f"{100 * gain[3]:.0f} %"] if gain else ["-", "-"]
        images = f"{len(next(iter(found.values()))):,}"
        cells = [f"{dataset} {loss} s{seed}", images, *ours, *paper, *gain]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [undefined(run.folder, found[kind]) for kind, run in pair.items()]
    return "\n".join(lines + [note for note in notes if note])


def interval(gain):
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)


def undefined(folder, scores):
    """A line that counts and names the images without a score, or nothing."""
    names = [image for image, (score, _, _) in scores.items() if not np.isfinite(score)]
    if not names:
        return ""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return (f"\n{folder}: {len(names):,} of {len(scores):,} images left out, their mask is full or "
            f"their map flat: {', '.join(names[:5])}{more}")


# --------------------------------------------------------------------------------------------------
# 5. Figure
# --------------------------------------------------------------------------------------------------


def choose(run, found, wanted, worst):
    """Rows of the test images to show. wanted: their names, or how many of those with both
    scores, by seed or, with `worst`, where the two differ most. Raises UserError."""
    images = [str(p) for p in run.images]
    if not (len(wanted) == 1 and wanted[0].isdigit()):
        hits = [[k for k, image in enumerate(images) if f"/{image}".endswith(f"/{name}")]
                for name in wanted]
        if [] in hits:
            raise UserError(f"--images {wanted[hits.index([])]}: no test image of {run.folder}; "
                            "its attention.npz lists them")
        return [rows[0] for rows in hits]
    gaps = [found["bgaugment"][image][0] - found["base"][image][0] for image in images]
    rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(images))
    rows = [int(row) for row in rows if np.isfinite(gaps[row])]
    if worst:
        rows.sort(key=lambda row: -abs(gaps[row]))
    return rows[: int(wanted[0])]


def figure(pair, found, rows, file):
    """Writes a PNG, a row per image: photo, mask, base and BGAugment heat maps and their scores."""
    photos, resize = test_photos(pair["base"]), Image.Image.resize
    pictures = [[resize(TF.to_pil_image(x), (CELL, CELL), Image.LANCZOS)
                 for x in photos[row].split((3, 1))] for row in rows]
    columns = {"photo": [photo for photo, _ in pictures],
               "mask": [outlined(photo, mask) for photo, mask in pictures]}
    for kind, title in (("base", "base"), ("bgaugment", "+ BGAugment")):
        run = pair[kind]
        maps = [a for _, _, batch in attention_maps(run, load_model(run), rows) for a in batch]
        columns[title] = []
        for row, a, (photo, mask) in zip(rows, maps, pictures):
            cell = outlined(heated(photo, a), mask)
            label(cell, f"{found[kind][str(run.images[row])][0]:.2f}")
            columns[title].append(cell)
    step, top = CELL + GAP, 2 * TEXT
    canvas = Image.new("RGB", (len(columns) * step - GAP, top + len(rows) * step - GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for x, (title, cells) in zip(range(0, canvas.width, step), columns.items()):
        draw.text((x + CELL / 2, TEXT), title, "black", font, anchor="mm")
        for k, cell in enumerate(cells):
            canvas.paste(cell, (x, top + k * step))
    bgbias.write(file, lambda draft: canvas.save(draft, "PNG"))


def label(cell, text):
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(TEXT)
    _, _, right, bottom = draw.textbbox((GAP, GAP), text, font)
    draw.rectangle((0, 0, right + GAP, bottom + GAP), "black")
    draw.text((GAP, GAP), text, "white", font)


def outlined(photo, mask):
    """The photo with the edge of its mask, where the soft mask crosses one half."""
    inside = mask.point(lambda value: 255 * (value >= 128))
    larger, smaller = (inside.filter(f(3)) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    edge = ImageChops.subtract(larger, smaller)
    return Image.composite(Image.new("RGB", photo.size, (0, 255, 255)), photo, edge)


def heated(photo, attention):
    """Attention (S, S) over the greyed photo: none is grey, then red, 1 is yellow."""
    level = TF.to_pil_image(attention.float()).resize(photo.size, Image.BILINEAR)
    level = np.asarray(level, np.float32)[..., None] / 255
    grey = np.asarray(photo.convert("L"), np.float32)[..., None] * 0.7
    colour = np.concatenate([np.full_like(level, 255), 255 * level, np.zeros_like(level)], axis=2)
    return Image.fromarray((grey * (1 - level) + colour * level).astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# 6. Whether to believe it: input gradients can mislead (Shah et al. 2021). Beyond the paper.
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def occlusion(run, model, rows):
    """How far the embedding moves when the background is swapped, when the object is, and the share
    of the image that is object: (3, N). A photo of the test pool takes their place; no gradient."""
    args, moves = run.args, []
    pool = bgbias.Photos(bgbias.list_backgrounds(args.backgrounds, "test"), None, args.short_side)
    lists, seed = torch.tensor(rows).split(bgbias.EVAL_BATCH), (args.seed, bgbias.TEST)
    batches = bgbias.Batches(test_photos(run), lists, args.image_size, False, pool, 1, seed)
    for photos, (drawn,) in bgbias.loader(batches, args):
        photos, drawn = photos.to(args.device), drawn.to(args.device).float()
        image, mask = photos[:, :3].float(), photos[:, 3:] / 255
        swapped = [bgbias.replace_background(image, mask, drawn),
                   bgbias.replace_background(drawn, mask, image)]
        e, *moved = (model(model.normalise(x)) for x in (image, *swapped))
        moved = [DISTANCES[args.loss](e, other) for other in moved]
        moves.append(torch.stack([*moved, mask.mean((1, 2, 3))]).cpu())
    return torch.cat(moves, dim=1)


def oracles(run, rows):
    """Mean score of a map that is the mask, thresholded at one half, and of its complement."""
    photos = test_photos(run)
    masks = torch.stack([photos[row][3] >= 128 for row in rows]).double()
    return [finite(attention_score(maps, masks)).mean() for maps in (masks, 1 - masks)]


def random_weights(run):
    """The run's network before any training or pretraining."""
    torch.manual_seed(bgbias.mix(run.args.seed, RANDOM))
    model = bgbias.Embedder(run.args.backbone, "none", run.args.image_size)
    return frozen(model, run.args.device)


def own_and_other(run, model, rows):
    """Mean score with an image's own mask, and with the next image's. Objects are central, and
    so is any network's view of a photo: what the second has too is no attention to the object."""
    _, photos, maps = zip(*attention_maps(run, model, rows))
    masks, maps = torch.cat(photos)[:, 3] / 255, torch.cat(maps)
    return [finite(attention_score(maps, m)).mean() for m in (masks, masks.roll(1, dims=0))]


def check_run(run):
    """A row of sanity()'s first table, and the run's checks as [(what, found, holds)]."""
    rows = np.random.default_rng([run.args.seed, PICK]).permutation(len(run.images))[:SANITY]
    rows, model, name = sorted(rows.tolist()), load_model(run), run.folder.name
    background, object_, p = occlusion(run, model, rows)
    moved = finite(above_chance(object_ / (object_ + background), p)).mean()
    random, random_other = own_and_other(run, random_weights(run), rows)
    values = (*own_and_other(run, model, rows), random, random_other, moved, background.mean(),
              object_.mean())
    same, complement = oracles(run, rows)
    above = random - random_other
    checks = [("random weights score about 0", f"{random:+.3f}", abs(random) <= ABOUT_ZERO),
              ("... above another image's mask", f"{above:+.3f}", abs(above) <= ABOUT_ZERO),
              ("the mask as map scores 1", f"{same:.3f}", same == 1),
              ("its complement less than 0", f"{complement:+.3f}", complement < 0)]
    row = f"| {name} | {len(rows)} | {' | '.join(f'{value:.3f}' for value in values)} |"
    return row, [(f"{name}: {what}", found, holds) for what, found, holds in checks]


def sanity(pairs, scores):
    """Markdown: the score beside occlusion's and that of random weights, and which checks hold."""
    lines = ["\n| run | images | attention score | another image's mask | random weights "
             "| another image's mask | occlusion score | moved by background | by object |",
             "|---|---|---|---|---|---|---|---|---|"]
    checks = []
    for (dataset, *_), pair in pairs.items():
        for run in pair.values():
            line, found = check_run(run)
            lines, checks = [*lines, line], checks + found
        if dataset == "toy" and len(pair) == 2:  # where the shortcut was planted
            gain = compare(*(scores[pair[kind].folder] for kind in ("base", "bgaugment")))
            what = f"{pair['bgaugment'].folder.name}: scores more than base"
            checks.append((what, interval(gain), gain[1] > 0))
    lines += ["\n| check | found | holds |", "|---|---|---|"]
    for what, found, holds in checks:
        lines.append(f"| {what} | {found} | {'yes' if holds else '**no**'} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 7. Command line
# --------------------------------------------------------------------------------------------------


def shard(text):
    i, n = (int(number) for number in text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 1 <= I <= N")
    return i, n


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Attention score of runs of bgbias.py (Kobs & Hotho 2022, Section 5).",
        epilog="A base and a BGAugment run of one dataset, loss and seed are compared.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders")
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="the I-th of every N images")
    add("--figure", type=Path, metavar="PNG", help="draw the maps of a base and a BGAugment run")
    add("--images", nargs="+", default=["8"], help="of --figure: how many (default: 8) or names")
    add("--worst", action="store_true", help="of --figure: where the two differ most, not by seed")
    add("--sanity", action="store_true", help=f"check the score on {SANITY} images of each run")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--workers", type=int, help="processes that load photos (default: 8, on a CPU 0)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: bgbias.STOP.append(True))
    pairs = pair_up(open_run(folder, args.device, args.workers) for folder in args.runs)
    runs = [run for pair in pairs.values() for run in pair.values()]
    if args.figure and (len(pairs), len(runs)) != (1, 2):
        raise UserError(f"--figure {args.figure}: give one base and one BGAugment run of the same "
                        "dataset, loss and seed")
    if args.figure and (args.figure.suffix != ".png" or not args.figure.parent.is_dir()):
        raise UserError(f"--figure {args.figure}: give a .png in a folder that exists")
    scores = {run.folder: score_run(run, args.shard) for run in runs}
    missing = {run.folder: len(run.images) - len(scores[run.folder]) for run in runs}
    if any(missing.values()):
        print("\n".join(f"{folder}: {n:,} images left to the other shards, no table yet"
                        for folder, n in missing.items() if n))
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
