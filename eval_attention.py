"""Attention score of runs of bgbias.py: what share of the embedding's input gradient falls on the
object? A score of 1 means all of it, 0 as much as by chance; below 0, the model looks at the
background. Section 5 of "On Background Bias in Deep Metric Learning" (Kobs & Hotho 2022).

    python eval_attention.py runs/*                       # scores of all test images, one table
    python eval_attention.py runs/toy-contrastive-* --figure attention.png --images 3 --limit 200
    python eval_attention.py runs/toy-contrastive-* --neighbours neighbours.png --images 3

Objects sit in the centre, where every network looks. So the table also has the score "beyond
another mask": the score minus the score of the same map with the mask of another photo. This
difference is attention to *this* object.

Start the script where the runs were trained, because the paths of the data are relative. Scores are
saved in RUN/attention.npz for the report: arrays image, score, a (attention on the object), p (area
of the object) and beyond. An undefined score is nan. The scores are computed again if best.pt or
the data has changed, which their checksums tell.

Shapes: B batch, D embedding (128), Q queries, H W pixels, S crop size, K neighbours.
"""

import argparse
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

import bgbias
from bgbias import DISTANCES, UserError, column_of, make_evaluation_batches, seed_of

COPIES = 25  # noisy copies of an image
SIGMA = 0.15  # standard deviation of the noise, as a fraction of the image's range
QUANTILE = 0.99  # a map is clipped at this quantile

# Seeds, like those of bgbias.py, which has 0 to 4.
NOISE_SEED = 100  # the noise of the copies
WEIGHTS_SEED = 101  # the random weights of --sanity
PICK_SEED = 102  # the images of --limit, --sanity and the pictures
OTHER_MASK_SEED = 103  # whose mask is the other one

# Pixels of all copies in a batch of one image or more. A CPU is fastest if they fit in its caches.
BATCH_PIXELS = {"cpu": 2**19, "gpu": 2**23}
RESAMPLES = 2000  # of the bootstrap
SANITY = 200  # images of each run that --sanity checks: enough for two digits
NEIGHBOURS = 5  # photos beside a query in a picture
CANDIDATES = 1000  # random queries from which --worst picks, so that SOP fits in memory

WIDTH = 900  # px of a picture; a README is about as wide
GAP = 5  # px between two cells, and the width of a frame
CAPTION = 16  # px, font of the lines above a row; each line is twice as high
LABEL = 13  # px, font of the line above a cell; a larger one would cut most names of classes
RIGHT = "#009e73"  # green and orange that colour-blind people can distinguish
WRONG = "#d55e00"


# ---- 1. The score --------------------------------------------------------------------------------


def attention_map(model, images, black_embedding, distance, generator):
    """How strongly each pixel changes the distance to the embedding of a black image (§5):
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
    """(a - p) / (1 - p), where a is the share of the attention on the object, and p the share of
    the image (§5): (B, H, W), (B, 1, H, W) in [0, 1], 1 = foreground -> (B,). The score is
    undefined (nan) if the mask is full, p = 1, or if the attention is 0 everywhere."""
    return above_chance(*shares(attention, mask))


def shares(attention, mask):
    """attention_on_object and object_area: the shares of the attention and of the image that are on
    the object. (B, H, W), (B, 1, H, W) or (B, H, W) -> two tensors (B,) float64."""
    attention, mask = attention.double(), mask.double().reshape(attention.shape)
    attention_on_object = (attention * mask).sum((-2, -1)) / attention.sum((-2, -1))
    return attention_on_object, mask.mean((-2, -1))


def above_chance(attention_on_object, object_area):
    score = (attention_on_object - object_area) / (1 - object_area)
    return torch.where(object_area < 1, score, torch.nan)


# ---- 2. Scores of a run --------------------------------------------------------------------------

# A finished run. split: the test photos. tested: the heading of its table. data: the checksum of
# the data as it is now.
Run = namedtuple("Run", "folder args split tested data")
# The numbers of one image. beyond: the score minus the score of the same map with another mask.
Score = namedtuple("Score", "score attention_on_object object_area beyond")


def load_run(folder, device):
    """The finished Run in `folder`, or None, with a line, if there is none. Raises UserError if its
    data is missing."""
    folder = Path(folder)
    if not (folder / "result.json").exists():
        if not folder.is_file():  # RUNS/* also matches the report
            print(f"{folder} is left out, because it is not a finished run")
        return None
    result = bgbias.read_result(folder)
    if result is None:
        print(f"{folder} is left out, because another version of bgbias.py made it")
        return None
    args = argparse.Namespace(**{**result["args"], "device": device, "workers": None})
    if bgbias.network_checksum(args.backbone, args.runs, args.data) != result.get("network"):
        print(f"{folder} is left out, because the files of its network have changed; restore them")
        return None
    bgbias.choose_device(args)
    splits = bgbias.load_splits(args.dataset, args.data, measure=args.measure)
    data = bgbias.data_checksum(args, splits)
    if data != result["data"]:
        print(f"{folder}: photos, masks or backgrounds have changed since this run")
    return Run(folder, args, splits["test"], result["tested"], data)


def network_of(run, *, trained=True):
    """The network of the run's best epoch, or one with random weights."""
    args = run.args
    if trained:
        return bgbias.load_embedder(run.folder, args).to(args.device)
    torch.manual_seed(seed_of(args.seed, WEIGHTS_SEED))
    network = bgbias.Embedder(args.backbone, "none", args.image_size, args.embedding)
    return network.eval().requires_grad_(requires_grad=False).to(args.device)


def shuffled(run):
    """The rows of the test images in a random order that the run's seed fixes."""
    order = np.random.default_rng([run.args.seed, PICK_SEED]).permutation(len(run.split.images))
    return order.tolist()


def other_masks(labels):
    """For each test photo, the photo that has the other mask: the next one of another class in a
    random order of all photos, which is the same for all runs. (N,) labels -> (N,) rows."""
    order = np.random.default_rng(OTHER_MASK_SEED).permutation(len(labels))
    others = np.empty(len(labels), int)
    for place, row in enumerate(order):
        steps = 1
        while labels[order[(place + steps) % len(order)]] == labels[row]:
            steps += 1
        others[row] = order[(place + steps) % len(order)]
    return others


def mask_of(run, row):
    """The mask of a test photo, cropped as the test does: (S, S) in [0, 1]."""
    size = run.args.image_size
    mask = TF.resize(bgbias.open_mask(run.split.masks[row]), round(bgbias.RESIZE * size))
    return TF.center_crop(TF.pil_to_tensor(mask), size)[0] / 255


def batches_of(run, rows, draws=0, conditions=()):
    """The EvaluationBatches of these test images, which are decoded on access."""
    return make_evaluation_batches(run.args, run.split, "test", draws, conditions, rows=rows,
                                   keep=False)


def attention_maps(run, rows, network):
    """Yields (photo (4, S, S) uint8, attention (S, S)) of the test images `rows`, on the CPU."""
    args, size = run.args, run.args.image_size
    if not bgbias.has_gradient(network, size):
        raise UserError(f"{run.folder}: its features have no gradient; give another run")
    with torch.no_grad():
        black = network(network.normalise(torch.zeros(1, 3, size, size, device=args.device)))
    pixels = BATCH_PIXELS["cpu" if args.device == "cpu" else "gpu"]
    count = max(1, pixels // (COPIES * size**2))  # images in a batch
    seeds = (seed_of(args.seed, NOISE_SEED, row) for row in rows)
    for batch in bgbias.load_batches(batches_of(run, rows), args):
        for photos in batch.photos.split(count):
            generators = [torch.Generator(args.device).manual_seed(next(seeds)) for _ in photos]
            images, _ = bgbias.unpack(photos)
            maps = attention_map(network, network.normalise(images), black, DISTANCES[args.loss],
                                 generators)
            yield from zip(photos.cpu(), maps.cpu())


def collect_maps(run, rows, network):
    """Photos (N, 4, S, S) and attention (N, S, S) of a few test images."""
    photos, maps = zip(*attention_maps(run, rows, network))
    return torch.stack(photos), torch.stack(maps)


def score_run(run, limit=None):
    """{image path: Score} of all test images, or of `limit` random ones; {} if the network has no
    gradient. The scores are saved in RUN/attention.npz, and read from it if they are up to date and
    of enough images: a smaller limit gives all that is there."""
    images = [str(path) for path in run.split.images]
    rows = sorted(shuffled(run)[:limit])
    saved = read_scores(run)
    if saved.keys() >= {images[row] for row in rows}:
        return saved
    network = network_of(run)
    if not bgbias.has_gradient(network, run.args.image_size):
        print(f"{run.folder}: has no attention score, because its features have no gradient")
        return {}
    scores, others = {}, other_masks(run.split.labels)
    maps = bgbias.progress(attention_maps(run, rows, network), str(run.folder), len(rows))
    for row, (photo, attention) in zip(rows, maps):
        attention_on_object, object_area = shares(attention, photo[3] / 255)
        score = above_chance(attention_on_object, object_area)
        beyond = score - attention_score(attention, mask_of(run, others[row]))
        values = torch.stack([score, attention_on_object, object_area, beyond])
        scores[images[row]] = Score(*values.tolist())
    write_scores(run, scores)
    return scores


def checksums_of(run):
    """The checksums of what the scores of a run are made from."""
    return {"data": run.data, "best": bgbias.file_checksum(run.folder / "best.pt")}


def write_scores(run, scores):
    score, attention_on_object, object_area, beyond = np.transpose([*scores.values()])
    arrays = {"image": [*scores], "score": score, "a": attention_on_object, "p": object_area,
              "beyond": beyond, **checksums_of(run)}
    bgbias.write(run.folder / "attention.npz", lambda draft: np.savez(draft, **arrays))


def read_scores(run):
    """{image path: Score} in RUN/attention.npz; {} if best.pt or the data has changed since."""
    file = run.folder / "attention.npz"
    if not file.exists():
        return {}
    with np.load(file) as saved:
        if any(saved[name] != checksum for name, checksum in checksums_of(run).items()):
            return {}
        columns = [saved[name].tolist() for name in ("score", "a", "p", "beyond")]
        return dict(zip(saved["image"].tolist(), map(Score, *columns)))


# ---- 3. The table: base against the other variants -----------------------------------------------

TITLES = {"none": "base", "pool": "BGAugment", "own": "own backgrounds"}  # of args.bgaugment


def title_of(run):
    return "as it is" if run.args.measure else TITLES[run.args.bgaugment]


def group_runs(runs):
    """[{title: Run}] of runs that differ in nothing but the variant: base, BGAugment and own
    backgrounds, in this order; some may be missing."""
    order = ["as it is", *TITLES.values()]
    groups = {}
    for run in sorted(runs, key=lambda run: order.index(title_of(run))):
        args, title = run.args, title_of(run)
        # The variants select their best epoch by different scores, unless --select was given.
        key = [run.folder.parent, run.tested, args.measure, args.loss, args.seed, args.settings,
               args.hparams]
        while title in groups.setdefault(str(key), {}):
            key.append("a copy of the run")
        groups[str(key)][title] = run
    return list(groups.values())


def compare(base, other):
    """(mean of other - base, bounds of its 95 % bootstrap interval, fraction of images where it is
    positive, number of images) of two {image: Score}; None if no image has both scores."""
    gain = np.array([other[image].score - base[image].score for image in base if image in other])
    gain = gain[np.isfinite(gain)]
    if len(gain) == 0:
        return None
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return gain.mean(), low, high, (gain > 0).mean(), len(gain)


def score_table(groups, scores):
    """Text: a row per run, above the paper's. scores: {run folder: {image: Score}}."""
    # DIFF: images with an undefined attention score are left out of the mean and listed.
    # DIFF: the attention score's standard deviation has ddof 1, not 0.
    rows, notes = [], []
    for group in groups:
        for title, run in group.items():
            found = scores[run.folder]
            undefined = [image for image in found if not np.isfinite(found[image].score)]
            row = {"": run.folder.name, "images": f"{len(found) - len(undefined):,}",
                   "attention": mean_of([values.score for values in found.values()]),
                   "beyond another mask": mean_of([values.beyond for values in found.values()])}
            rows.append(row)
            base = group.get("base")
            gain = compare(scores[base.folder], found) if base and run is not base else None
            if gain:
                row["over base [95 %]"] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)
                row["images improved"] = f"{100 * gain[3]:.0f} % of {gain[4]:,}"
            for paper in bgbias.paper_row(vars(run.args)):
                rows.append({"": paper[""], "attention": paper["attention"]})
            if undefined:
                notes.append(f"{run.folder}: {len(undefined):,} images are left out, because "
                             "their mask is full or their map is flat, among them "
                             + ", ".join(undefined[:5]))
    return "\n".join([bgbias.as_table(rows), *notes])


def mean_of(values):
    """The mean and standard deviation of the values that are defined, as text."""
    defined = [value for value in values if np.isfinite(value)]
    return bgbias.mean_and_std(defined) if defined else "undefined"


# ---- 4. Pictures: attention and nearest neighbours -----------------------------------------------

BLANK = Image.new("RGB", (1, 1), "white"), "", None  # a cell


def cell_side(columns):
    """The side of a cell in px."""
    return (WIDTH + GAP) // columns - GAP


def draw_grid(rows, columns, file):
    """Writes a PNG of rows (caption, cells). The caption stands above its row. A cell is (uint8
    tensor or PIL image, label, colour of its frame or None). The label stands above its cell."""
    px = cell_side(columns)
    caption_font, label_font = ImageFont.load_default(CAPTION), ImageFont.load_default(LABEL)
    heights = [2 * CAPTION * len(caption.splitlines()) + 2 * LABEL + px + GAP
               for caption, _ in rows]
    canvas = Image.new("RGB", (WIDTH, sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for caption, cells in rows:
        for text in caption.splitlines():
            draw.text((0, top + CAPTION), text, "black", caption_font, anchor="lm")
            top += 2 * CAPTION
        for k, (picture, label, colour) in enumerate(cells):
            left = k * (px + GAP)
            text = shortened(label, label_font, px)
            draw.text((left, top + LABEL), text, colour or "black", label_font, anchor="lm")
            if torch.is_tensor(picture):
                picture = TF.to_pil_image(picture)
            below = top + 2 * LABEL
            canvas.paste(picture.convert("RGB").resize((px, px), Image.LANCZOS), (left, below))
            if colour:
                draw.rectangle((left, below, left + px - 1, below + px - 1), None, colour, GAP)
        top += 2 * LABEL + px + GAP
    bgbias.write(file, lambda draft: canvas.save(draft, "PNG"))
    print(f"picture: {file}")


def shortened(text, font, width):
    """The text, without its middle if it is wider than `width` px. Names of classes often differ
    only in their first or last characters."""
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 0:
        kept -= 1
        shown = f"{text[:kept - kept // 2]}…{text[len(text) - kept // 2:]}"
    return shown


def draw_attention(group, count, file):
    """Draws --figure: each row shows an image, its mask, and the map of each run of the group."""
    runs = list(group.values())
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
    inside = mask.point(lambda value: 255 if value >= bgbias.THRESHOLD else 0)
    edge = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(3)),
                                 inside.filter(ImageFilter.MinFilter(3)))
    return Image.composite(Image.new("RGB", photo.size, "cyan"), photo, edge)


def heated(photo, attention):
    """Attention (S, S) over the grey photo: from grey (0) over red to yellow (1)."""
    level = TF.to_pil_image(attention.float()).resize(photo.size, Image.BILINEAR)
    full, empty = (Image.new("L", photo.size, value) for value in (255, 0))
    grey = photo.convert("L").point(lambda value: 0.7 * value).convert("RGB")
    return Image.composite(Image.merge("RGB", (full, level, empty)), grey, level)


def ignored_photos(batches, rows, condition):
    """(Q, 1 or 2): the photos that leave the gallery of the queries `rows`: the query itself and,
    if its background is that of another test photo, this lender. The test's `query` ignores the
    same photos."""
    queries = torch.as_tensor(rows)[:, None]
    if condition != "any_class":
        return queries
    lenders = torch.as_tensor(batches.lender_indices()[condition][0])
    return torch.cat([queries, lenders[queries]], dim=1)


def nearest(run, batches, rows):
    """{"clean": (Q, K), "replaced" or "any_class": (Q, K)}: the clean photos that are nearest to
    each photo in `rows`, which is clean or has another background: draw 0 of the run's reference
    condition. Recall@1 of the test's `clean` and `query` counts the first columns."""
    items = bgbias.load_batches(batches, run.args)
    items = bgbias.progress(items, str(run.folder), batches.per_epoch)
    embeddings = bgbias.embed(network_of(run), items, bgbias.replaced_views)
    center = embeddings["clean"][0].mean(dim=0)  # see query_metrics()
    gallery, found = embeddings["clean"][0] - center, {}
    for condition, (queries,) in embeddings.items():
        ignored = ignored_photos(batches, rows, condition).to(gallery.device)
        distances = torch.cdist(queries[rows] - center, gallery).scatter_(1, ignored, torch.inf)
        count = min(NEIGHBOURS, len(gallery) - ignored.shape[1])
        found[condition] = distances.argsort(dim=1)[:, :count].cpu()
    return found


def find_misled(run, batches, rows, near):
    """The places in `rows` of the queries whose nearest photo is right on their own background and
    wrong on the new one, though the gallery has a right photo. `near`: what nearest() found."""
    labels, reference = batches.labels, run.args.reference
    right = {condition: labels[found[:, 0]] == labels[rows] for condition, found in near.items()}
    ignored = ignored_photos(batches, rows, reference)
    of_class = (labels[ignored] == labels[rows][:, None]).sum(dim=1)
    answerable = labels.bincount()[labels[rows]] > of_class
    return (right["clean"] & ~right[reference] & answerable).nonzero()[:, 0].tolist()


def versions_of(run, rows):
    """Yields for each query {condition: the photo on draw 0 of its backgrounds, (3, S, S) uint8}"""
    batches = batches_of(run, rows, draws=1, conditions=("same_class", "any_class"))
    for batch in bgbias.load_batches(batches, run.args):
        views = dict(bgbias.all_views(*bgbias.unpack(batch.photos), batch))
        for k in range(len(batch.photos)):
            yield {condition: view[k].round().byte().cpu() for condition, view in views.items()}


def draw_neighbours(group, count, file, *, worst):
    """Draws --neighbours: a row shows a query on several backgrounds and, for one run, the photos
    nearest to the last version. With `worst`, only queries that the new background misleads."""
    first = next(iter(group.values()))
    args, split, reference = first.args, first.split, first.args.reference
    conditions = ("any_class",) if reference == "any_class" else ()
    batches = make_evaluation_batches(args, split, "test", 1, conditions)
    labels, rows = batches.labels, shuffled(first)[:CANDIDATES if worst else count]
    near = {title: nearest(run, batches, rows) for title, run in group.items()}
    places = range(len(rows))
    if worst:
        places = find_misled(first, batches, rows, near[title_of(first)])[:count]
        if not places:
            raise UserError(f"--worst: new backgrounds mislead no query of {first.folder}; leave "
                            "out --worst")
    lines = []
    for q, versions in zip(places, versions_of(first, [rows[q] for q in places])):
        cells = [(versions["clean"], "query", None)]
        for condition in ("pasted", "same_class", "any_class", "replaced"):
            if condition in versions:
                cells.append((versions[condition], column_of(condition), None))
        blank = [BLANK] * len(cells)
        name = "/".join(split.images[rows[q]].parts[-2:])
        name += ", picked because it is misled\n" if worst else "\n"
        for title, found in near.items():
            right = {key: labels[found[key][q]] == labels[rows[q]] for key in found}
            for row, hit in zip(found[reference][q].tolist(), right[reference]):
                label = bgbias.class_name(args, split.images[row], split.labels[row])
                cells.append((batches.crops([row])[0, :3], label, RIGHT if hit else WRONG))
            own, new = (f"{int(right[key].sum())} of {len(right[key])}"
                        for key in ("clean", reference))
            lines.append((f"{name}{title}: {new} right (green) on the new background, {own} on its "
                          "own background", cells))
            cells, name = blank.copy(), ""  # the next run's row has the same query
    draw_grid(lines, len(blank) + NEIGHBOURS, file)


# ---- 5. Checks beyond the paper, because gradients can mislead (Shah et al. 2021) ----------------


@torch.no_grad()
def occlusion(run, network, rows):
    """(3, N), without gradients: how far the embedding moves when another background replaces the
    background, how far when it replaces the object, and object_area. The other background is that
    of draw 0 of the run's reference condition."""
    args, distance, moves = run.args, DISTANCES[run.args.loss], []
    conditions = ("any_class",) if args.reference == "any_class" else ()
    for batch in bgbias.load_batches(batches_of(run, rows, draws=1, conditions=conditions), args):
        images, masks = bgbias.unpack(batch.photos)
        if args.reference == "replaced":
            other = batch.backgrounds[0]
        else:
            other = bgbias.remove_object(*bgbias.unpack(batch.lender_photos["any_class"][0]))
        versions = (images, bgbias.replace_background(images, masks, other),
                    bgbias.replace_background(other, masks, images))
        e, new_background, new_object = (network(network.normalise(x)) for x in versions)
        moves.append(torch.stack([distance(e, new_background), distance(e, new_object),
                                  masks.mean((1, 2, 3))]).cpu())
    return torch.cat(moves, dim=1)


def check_run(run):
    """{column: mean over SANITY test images, as text}"""
    rows, values = sorted(shuffled(run)[:SANITY]), {}
    others = other_masks(run.split.labels)
    other = torch.stack([mask_of(run, others[row]) for row in rows])
    for title, trained in (("score", True), ("random weights", False)):
        photos, maps = collect_maps(run, rows, network_of(run, trained=trained))
        masks = photos[:, 3] / 255
        score = attention_score(maps, masks)
        values[title] = score.nanmean()
        values[f"{title}: beyond another mask"] = (score - attention_score(maps, other)).nanmean()
    hard = (masks >= 0.5).double()
    values["mask as map"] = attention_score(hard, hard).nanmean()
    values["its complement"] = attention_score(1 - hard, hard).nanmean()
    by_background, by_object, object_area = occlusion(run, network_of(run), rows)
    share = by_object / (by_object + by_background)
    values["occlusion"] = above_chance(share, object_area).nanmean()
    values["background replaced"] = by_background.mean()
    values["object replaced"] = by_object.mean()
    return {column: f"{value:.3f}" for column, value in values.items()}


# ---- 6. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Attention score of runs of bgbias.py (Kobs & Hotho 2022, Section 5).",
        epilog="Runs without and with --bgaugment (pool or own) are compared if they differ in "
        "nothing else.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders")
    add("--limit", type=int, metavar="N", help="score N random test images instead of all, unless "
        "more are scored already")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--figure", type=Path, metavar="PNG", help="draw the attention of one run, "
                        "or of runs that differ only in --bgaugment")
    either.add_argument("--neighbours", type=Path, metavar="PNG", help="draw the nearest photos to "
                        "some queries on new backgrounds; computes no scores")
    add("--images", type=int, default=8, metavar="N", help="images in a picture [%(default)s]")
    add("--worst", action="store_true", help="with --neighbours: draw queries whose nearest photo "
        "is right on their own background and wrong on the new one")
    add("--sanity", action="store_true", help=f"check the score on {SANITY} images of each run")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    found = [load_run(folder, args.device) for folder in args.runs]
    runs = [run for run in found if run]
    if not runs:
        raise UserError(f"{args.runs[0]}: not a finished run of this version; give folders with a "
                        "result.json")
    groups = group_runs(runs)
    if (args.figure or args.neighbours) and len(groups) > 1:
        folders = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{folders}: too many runs for one picture; give one run, or runs that "
                        "differ only in --bgaugment")
    if args.neighbours:
        return draw_neighbours(groups[0], args.images, args.neighbours, worst=args.worst)
    runs = [run for group in groups for run in group.values()]
    scores = {run.folder: score_run(run, args.limit) for run in runs}
    print(score_table(groups, scores))
    if args.figure:
        draw_attention(groups[0], args.images, args.figure)
    if args.sanity:
        rows = [{"": run.folder.name, **check_run(run)} for run in runs if scores[run.folder]]
        print(f"\n{bgbias.as_table(rows)}")


if __name__ == "__main__":
    bgbias.command(main)
