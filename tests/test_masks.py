"""masks.py, run for real: rembg, onnxruntime and files, with a network of one layer as u2net.

The network is the mean over the channels of its input, so that a mask is the photo's brightness,
stretched to 0 ... 255: easy to foresee for a photo that the test paints.
"""

import csv
import re
import shutil
import statistics
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import jaccard_score, recall_score

import bgbias
import masks

# ---- The network and the photos ------------------------------------------------------------------


def field(number, value):
    """A field of a protobuf message, as in an ONNX file: an integer, or a text or bytes with their length."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)
    if isinstance(value, int):
        return varint(8 * number) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(8 * number + 2) + varint(len(value)) + value


def onnx_mean():
    """An ONNX file of u2net's shapes, (1, 3, 320, 320) -> (1, 1, 320, 320): ReduceMean over axis 1.
    Field numbers from onnx.proto; there is no onnx package among the requirements."""
    def tensor(name, channels):
        dims = b"".join(field(1, field(1, n)) for n in (1, channels, 320, 320))
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    axes = field(1, "axes") + field(8, 1) + field(20, 7)
    node = field(1, "photo") + field(2, "mask") + field(4, "ReduceMean") + field(5, axes)
    graph = field(1, node) + field(2, "mean") + field(11, tensor("photo", 3)) + field(12, tensor("mask", 1))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))  # IR 8, operators 13


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """The network under u2net's name where rembg looks for it; returns its folder."""
    home = tmp_path / "models"
    home.mkdir()
    (home / "u2net.onnx").write_bytes(onnx_mean())
    monkeypatch.setenv("U2NET_HOME", str(home))
    monkeypatch.setenv("MODEL_CHECKSUM_DISABLED", "1")  # older rembg wants its own u2net there
    return home


def noise(seed, height=24, width=40):
    """A photo (H, W, 3) uint8 that is nowhere flat."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halves(seed):
    """A photo (24, 40, 3) uint8, dark on the left, bright on the right: its mask is not fuzzy."""
    dark, bright = np.random.default_rng(seed).integers([[0], [190]], [[60], [256]], (2, 3))
    return np.where(np.arange(40)[:, None] < 10 + 3 * seed, dark, bright).astype(np.uint8)[None].repeat(24, 0)


@pytest.fixture
def dataset(tmp_path):
    """FOLDER/images/<class>/: 3 classes of 2 photos."""
    root = tmp_path / "shop"
    for i in range(6):
        path = root / "images" / "abc"[i // 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(halves(i)).save(path)
    return root


def run(capsys, *flags):
    """(exit code, stdout, stderr) of the command line."""
    code = 0
    try:
        bgbias.command(lambda: masks.main([str(flag) for flag in flags]))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def read(path):
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.asarray(image)


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def table(root):
    """The rows of masks.csv: {photo: (state, foreground, grey)}."""
    with open(root / "masks.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["photo", "state", "foreground", "grey"]
    assert len({row[0] for row in rows}) == len(rows)
    return {photo: tuple(values) for photo, *values in rows}


# ---- Making masks --------------------------------------------------------------------------------


def test_masks_are_those_of_rembg(dataset, capsys):
    from rembg import new_session, remove

    run(capsys, "--dataset", dataset)
    session = new_session("u2net")
    for photo in sorted((dataset / "images").rglob("*.png")):  # bytes to bytes, as `rembg p -om`
        theirs = remove(photo.read_bytes(), session=session, only_mask=True)
        (dataset / "theirs.png").write_bytes(theirs)
        ours = read(bgbias.mask_path(dataset, photo))
        np.testing.assert_array_equal(ours, read(dataset / "theirs.png"))


@pytest.mark.filterwarnings("ignore:invalid value")  # one pixel: rembg stretches 0 to 0
def test_every_kind_of_photo_gets_a_mask_of_its_size(tmp_path, capsys):
    """Of a cut-out it is the alpha channel, whatever the colours say; an opaque RGBA is none."""
    rgb, grey = Image.fromarray(halves(0)), Image.fromarray(halves(0)[..., 0])
    cutout, turned = rgb.convert("RGBA"), Image.fromarray(np.rot90(halves(0)))
    alpha = np.tile(np.uint8([[0] * 20 + [128] * 2 + [255] * 18]), (24, 1))
    cutout.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it clockwise, back to `rgb`
    photos = {"rgb.png": rgb, "grey.png": grey, "web.webp": rgb, "palette.gif": rgb.quantize(16),
              "cmyk.jpg": rgb.convert("CMYK"), "opaque.png": rgb.convert("RGBA"),
              "greyalpha.png": grey.convert("LA"), "bits.png": grey.convert("1", dither=Image.Dither.NONE),
              "sixteen.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
              "dot.png": Image.new("RGB", (1, 1), "red"), "cutout.png": cutout, "turned.png": turned}
    found = {}
    for i, (name, photo) in enumerate(photos.items()):
        path = tmp_path / "shop/images" / "abc"[i % 3] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, quality=100, lossless=True, exif=exif if name == "turned.png" else b"")
        found[path.stem] = path
    code, out, _ = run(capsys, "--dataset", tmp_path / "shop")
    assert code == 0 and "12 images: 11 new, 1 from transparency\nsuspicious: 1\n" in out  # the dot
    for name, path in found.items():
        found[name] = read(bgbias.mask_path(tmp_path / "shop", path))
        assert found[name].shape == ((1, 1) if name == "dot" else (24, 40)), name
    np.testing.assert_array_equal(found["cutout"], alpha)
    for name, plain in (("turned", "rgb"), ("opaque", "rgb"), ("sixteen", "grey"), ("greyalpha", "grey")):
        np.testing.assert_array_equal(found[name], found[plain], name)
    assert run(capsys, "--dataset", tmp_path / "shop", "--verify")[0] == 0


def test_an_interrupted_job_resumes(dataset, model, monkeypatch, capsys):
    import rembg

    photos, remove = iter(range(6)), rembg.remove

    def interrupted(*args, **options):
        if next(photos) == 3:
            raise KeyboardInterrupt
        return remove(*args, **options)

    monkeypatch.setattr(rembg, "remove", interrupted)
    assert run(capsys, "--dataset", dataset)[0] == 130
    assert files(dataset / "masks") == ["a/0.png", "a/1.png", "b/2.png"]
    made = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in dataset.glob("masks/*/*.png")}
    monkeypatch.setattr(rembg, "remove", remove)
    code, out, _ = run(capsys, "--dataset", dataset)
    assert code == 0 and re.search("6 images: 3 (present|new), 3 (present|new)\n", out)
    assert sorted(state for state, *_ in table(dataset).values()) == ["new"] * 3 + ["present"] * 3
    for path, content_and_time in made.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == content_and_time
    (model / "u2net.onnx").unlink()  # with nothing to do, no model is needed
    assert run(capsys, "--dataset", dataset, "--verify")[:2] == (0, everything_is_present(dataset))
    monkeypatch.setattr(masks, "verify", None)  # and nothing is judged again
    code, out, _ = run(capsys, "--dataset", dataset)
    assert code == 0 and "6 images: all have a mask" in out
    code, out, _ = run(capsys, "--dataset", dataset, "--shard", "2/3")
    assert code == 0 and "2 images: all have a mask" in out


def everything_is_present(dataset):
    return f"6 images: 6 present\n{dataset / 'masks.csv'}: the state of every mask\n"


def test_masks_that_existed_are_judged_too(dataset, capsys):
    """Also if a run makes none, unless it has a table of them."""
    for photo in sorted((dataset / "images").rglob("*.png")):
        bgbias.write(bgbias.mask_path(dataset, photo), Image.new("L", (40, 24)).save)
    code, out, _ = run(capsys, "--dataset", dataset)
    assert code == 0 and "6 images: 6 present\nsuspicious: 6\n" in out and len(table(dataset)) == 6


def test_failed_images_are_listed_and_the_others_continue(dataset, capsys):
    text, cut = dataset / "images/a/1.png", dataset / "images/c/4.png"
    text.write_text("no image")
    cut.write_bytes(cut.read_bytes()[:50])
    code, out, err = run(capsys, "--dataset", dataset)
    _, first, title, *listed, _ = out.splitlines()
    assert code == 1 and "Traceback" not in err
    assert (first, title) == ("6 images: 4 new, 2 failed", "failed: 2")
    for path, line in zip((text, cut), listed, strict=True):
        assert line.startswith(f"  {path}: ") and not line.startswith(f"  {path}: {path}")
    assert files(dataset / "masks") == ["a/0.png", "b/2.png", "b/3.png", "c/5.png"]
    assert table(dataset)["images/a/1.png"] == table(dataset)["images/c/4.png"] == ("failed", "", "")


def test_shards_share_the_images(dataset, capsys):
    made = []
    for i in (1, 2, 3, 4):
        assert run(capsys, "--dataset", dataset, "--shard", f"{i}/4")[0] == 0
        made.append([name for name in files(dataset / "masks") if name not in sum(made, [])])
    assert made == [["a/0.png", "c/4.png"], ["a/1.png", "c/5.png"], ["b/2.png"], ["b/3.png"]]


    assert not (dataset / "masks.csv").exists(), "a job knows only its own images"


def test_photos_that_share_a_mask_are_all_listed(dataset, capsys):
    for path in ("a/0", "c/4"):
        shutil.copy(dataset / f"images/{path}.png", dataset / f"images/{path}.webp")
    code, out, _ = run(capsys, "--dataset", dataset)
    assert code == 1 and "8 images: 4 shared, 4 new\nshared: 4\n" in out
    for path in ("a/0.png", "a/0.webp", "c/4.png", "c/4.webp"):
        assert f"  {dataset / 'images' / path}: " in out and table(dataset)[f"images/{path}"][0] == "shared"
    assert files(dataset / "masks") == ["a/1.png", "b/2.png", "b/3.png", "c/5.png"]


def test_masks_under_other_names_are_counted(dataset, capsys):
    (dataset / "masks/a").mkdir(parents=True)
    (dataset / "masks/a/0_mask.png").touch()
    out = run(capsys, "--dataset", dataset)[1]
    assert out.startswith(f"{dataset}/masks has 1 files that fit no photo, such as {dataset}/masks/a/0_mask.png\n")


@pytest.mark.parametrize("bytes_of_name", [246, 255])
def test_names_as_long_as_the_system_allows(dataset, capsys, bytes_of_name):
    name = (bytes_of_name - 4) // 2 * "é" + (bytes_of_name - 4) % 2 * "e"
    (dataset / "images/a/0.png").rename(dataset / f"images/a/{name}.png")
    assert run(capsys, "--dataset", dataset)[0] == 0
    assert len(files(dataset / "masks")) == 6 and f"a/{name}.png" in files(dataset / "masks")


def test_what_cannot_be_written_is_one_line(dataset, capsys):
    """The folder for the masks, or only the table."""
    (dataset / "masks").touch()
    code, _, err = run(capsys, "--dataset", dataset)
    line = err.splitlines()[-1]  # after the progress bar
    assert code == 2 and line.startswith(f"error: {dataset}/masks/a/0.png: cannot be written (Not a directory); ")
    assert "Traceback" not in err
    (dataset / "masks").unlink()
    (dataset / "masks.csv").mkdir()
    code, out, err = run(capsys, "--dataset", dataset)
    assert code == 0 and out.endswith(f"{dataset}/masks.csv: not written (Is a directory)\n") and "Trace" not in err


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "1/", "a/b"])
def test_wrong_shard(text, dataset, failure):
    assert failure(f"--dataset {dataset} --shard {text}", masks.main).startswith(f"error: --shard {text}: ")


# ---- The summary, --verify, --sheet --------------------------------------------------------------


def paint(path, ground, spot):
    """A photo of one colour with a small square of another: a mask almost empty, or almost full."""
    pixels = np.full((100, 100, 3), ground, np.uint8)
    pixels[40:46, 40:46] = spot
    Image.fromarray(pixels).save(path)


def test_suspicious_masks_are_listed_by_path(dataset, capsys):
    paint(dataset / "images/a/0.png", 0, 255)
    paint(dataset / "images/b/3.png", 255, 0)
    ramp = np.linspace(0, 255, 40).astype(np.uint8)  # half of it is foreground, most of it grey
    Image.fromarray(np.tile(ramp, (24, 1))).save(dataset / "images/c/4.png")
    expected = (f"suspicious: 3\n"
                f"  {dataset / 'masks/a/0.png'}: nearly empty (0.4% foreground, 0% grey)\n"
                f"  {dataset / 'masks/b/3.png'}: nearly full (99.6% foreground, 0% grey)\n"
                f"  {dataset / 'masks/c/4.png'}: fuzzy (50.0% foreground, 80% grey)\n"
                f"{dataset / 'masks.csv'}: the state of every mask\n")
    code, out, _ = run(capsys, "--dataset", dataset)
    assert code == 0 and out.endswith("6 images: 6 new\n" + expected)
    code, out, _ = run(capsys, "--dataset", dataset, "--verify")
    assert (code, out) == (0, "6 images: 6 present\n" + expected)
    rows = table(dataset)
    assert [state for state, *_ in rows.values()] == [
        "suspicious", "present", "present", "suspicious", "suspicious", "present"]
    for photo, (_, foreground, grey) in rows.items():
        mask = read(dataset / photo.replace("images", "masks"))
        assert float(foreground) == pytest.approx((mask > 127).mean(), abs=1e-4)
        assert float(grey) == pytest.approx(((mask > 25) & (mask < 230)).mean(), abs=1e-4)


def test_many_suspicious_masks_do_not_flood_the_screen(dataset, capsys):
    for i in range(25):
        paint(dataset / f"images/b/{i + 10}.png", 0, 255)
    out = run(capsys, "--dataset", dataset)[1]
    assert "31 images: 31 new\nsuspicious: 25\n" in out and "  and 15 more\n" in out
    assert out.count(": nearly empty (") == 10
    assert [state for state, *_ in table(dataset).values()].count("suspicious") == 25


def test_verify_finds_what_training_would_refuse(dataset, capsys):
    run(capsys, "--dataset", dataset)
    missing, small, cutout, cut, blank, fine = (dataset / "masks" / name for name in files(dataset / "masks"))
    photo = dataset / "images/c/5.png"
    missing.unlink()
    Image.new("L", (24, 40)).save(small)
    Image.new("RGBA", (40, 24)).save(cutout)  # rembg without -om
    cut.write_bytes(cut.read_bytes()[:-60])
    blank.write_bytes(b"")
    before = photo.read_bytes()
    photo.write_bytes(before[:50])
    code, out, _ = run(capsys, "--dataset", dataset, "--verify")
    first, missing_title, missing_line, title, *lines, _ = out.splitlines()
    assert (code, first) == (1, "6 images: 5 wrong, 1 missing")
    assert (missing_title, missing_line, title) == ("missing: 1", f"  {missing}", "wrong: 5")
    for path, line in zip((small, cutout, cut, blank, photo), lines, strict=True):
        assert line.startswith(f"  {path}: ")
    assert [state for state, *_ in table(dataset).values()] == ["missing"] + ["wrong"] * 5
    assert not missing.exists() and fine.exists(), "--verify makes and deletes nothing"
    photo.write_bytes(before)
    for path in (small, cutout, cut, blank):
        path.unlink()
    assert "5 new, 1 present" in run(capsys, "--dataset", dataset)[1]
    assert run(capsys, "--dataset", dataset, "--verify")[:2] == (0, everything_is_present(dataset))


def test_half_of_the_sheet_is_suspicious(tmp_path):
    """Of many masks; of fewer, as many as there are. The reason and the end of the name are below each."""
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")

    def outcomes(suspicious, ordinary):
        image, mask = tmp_path / "a/p.jpg", tmp_path / "mask.png"
        return ([masks.Outcome("new", image, mask, 0.5, 0.2)] * suspicious
                + [masks.Outcome("present", image, mask, 0.5, 0.1)] * ordinary
                + [masks.Outcome("failed", image, mask, error="?")] * 9)

    for (suspicious, ordinary), expected in {(100, 100): (24, 24), (5, 100): (5, 43), (100, 3): (45, 3),
                                             (20, 10): (20, 10)}.items():
        entries = masks.half_suspicious(outcomes(suspicious, ordinary))
        reasons = [reason for *_, reason in entries]
        assert reasons == (["fuzzy, 50.0% foreground"] * expected[0] + ["ordinary, 50.0% foreground"] * expected[1])
        assert {name for _, _, name, _ in entries} == {"a/p.jpg"}


def test_the_sheet_shows_the_end_of_a_long_name(dataset, tmp_path):
    """It is not the same for names that end in other ways, and the same for names that begin in other ways."""
    def caption(name):
        entry = dataset / "images/a/0.png", Image.new("L", (40, 24)), name, "fuzzy"
        masks.contact_sheet([entry], tmp_path / "sheet.png")
        return np.asarray(Image.open(tmp_path / "sheet.png")).tolist()

    assert caption("x" * 200 + "1.jpg") == caption("y" * 60 + "x" * 140 + "1.jpg") != caption("x" * 200 + "2.jpg")


def test_sheet_shows_photo_mask_and_cutout_suspicious_first(dataset, tmp_path, capsys):
    paint(dataset / "images/c/5.png", [0, 0, 0], [0, 200, 0])
    (dataset / "images/a").rename(dataset / "images/Wellensittiche ♂ 猫")
    sheet = tmp_path / "new/sheet.png"
    assert run(capsys, "--dataset", dataset, "--sheet", sheet)[0] == 0
    image = np.asarray(Image.open(sheet))
    t, width, height = masks.THUMB, 3 * masks.THUMB + 16, masks.THUMB + 34  # of an entry
    assert image.shape == (16 + 2 * height, 3 * width, 3)  # 6 photos, 3 a row
    assert all((image[:16, i * width + k * t:][:, :50] < 128).any() for i in range(3) for k in range(3))  # titles
    photo, mask, cut = (image[16:116, k * t:][:, :100] for k in range(3))
    np.testing.assert_array_equal(photo, np.asarray(Image.open(dataset / "images/c/5.png")))
    np.testing.assert_array_equal(mask[..., 0], read(dataset / "masks/c/5.png"))
    expected = photo * (mask / 255) + np.array([255, 0, 255]) * (1 - mask / 255)
    assert np.abs(cut - expected).max() <= 1 and mask.max() - mask.min() > 200


# ---- Models --------------------------------------------------------------------------------------


def test_models_run_here_and_cost_nothing():
    sessions = getattr(pytest.importorskip("rembg.sessions"), "sessions", {})  # {} in an older rembg
    assert not sessions or set(masks.MODELS) <= set(sessions)
    for session in map(sessions.get, masks.MODELS if sessions else ()):
        assert session.is_local() and not session.has_usage_cost(), session


def test_a_model_that_cannot_be_downloaded(dataset, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens: offline on any machine
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = run(capsys, "--dataset", dataset, "--model", "u2netp")
    line = err.splitlines()[-1]  # after rembg's own
    assert code == 2 and line.startswith("error: --model u2netp: ") and "u2netp.onnx" in line and "U2NET_HOME" in line
    assert not (dataset / "masks").exists()


def test_without_a_home_folder_numba_needs_one(dataset, tmp_path, monkeypatch, failure):
    """docker --user: `import rembg` ends with this error of numba."""
    problem = "cannot cache function '_make_tree': no locator available for file 'pymatting/util/kdtree.py'"
    (tmp_path / "rembg.py").write_text(f"raise RuntimeError({problem!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rembg", raising=False)
    line = failure(["--dataset", dataset], masks.main)
    assert line.startswith("error: rembg: ") and problem in line and "NUMBA_CACHE_DIR" in line


# ---- Quality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_mask_quality_against_scikit_learn(seed):
    pred, truth = noise(seed)[..., 0], noise(seed)[..., 1]
    a, b = (pred >= 128).ravel(), (truth >= 128).ravel()
    assert masks.mask_quality(pred, truth) == pytest.approx((jaccard_score(b, a), recall_score(b, a)))


def test_mask_quality_by_hand():
    truth = np.array([[255, 128, 127, 0]], np.uint8)  # 2 px foreground: 128 is in, 127 is out
    assert masks.mask_quality(truth, truth) == (1, 1)
    assert masks.mask_quality(np.array([[0, 200, 200, 200]], np.uint8), truth) == (1 / 4, 1 / 2)
    assert masks.mask_quality(np.zeros_like(truth), truth) == (0, 0)
    with pytest.raises(ValueError, match="empty"):  # otherwise 0 / 0
        masks.mask_quality(truth, np.full_like(truth, 127))
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(1, 4\)"):
        masks.mask_quality(truth.T, truth)


@pytest.fixture
def by_hand(tmp_path):
    """Two folders with hand-made masks: predicted ones that cover 1 ... 5 of 5 columns, and a photo
    for which the network has to predict: white on its left fifth, where the true mask is."""
    def columns(n):
        return Image.fromarray(np.repeat(np.uint8([[255] * 20 * n + [0] * (100 - 20 * n)]), 100, 0))

    for folder in ("birds", "cars"):
        (tmp_path / "gt" / folder).mkdir(parents=True)
    for n in range(1, 6):
        columns(n).save(tmp_path / f"gt/birds/{n}_mask_pred.png")
        columns(2).convert("RGB").save(tmp_path / f"gt/birds/{n}_mask.png")
        Image.fromarray(noise(n, 100, 100)).save(tmp_path / f"gt/birds/{n}_image.jpeg")
    columns(1).save(tmp_path / "gt/cars/7_mask.png")
    columns(1).convert("RGB").save(tmp_path / "gt/cars/7_image.png")
    return tmp_path / "gt"


def test_check_prints_each_and_each_folder_and_shows_the_worst_first(by_hand, tmp_path, capsys):
    code, out, _ = run(capsys, "--check", by_hand, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    ious, overlaps = [1 / 2, 1, 2 / 3, 1 / 2, 2 / 5], [1 / 2, 1, 1, 1, 1]
    for n, iou, overlap in zip(range(1, 6), ious, overlaps):
        assert f"{iou:8.4f} {overlap:8.4f}  {by_hand / 'birds' / str(n)}_mask.png" in out
    figures = statistics.mean(ious), statistics.pstdev(ious), statistics.median(ious), statistics.mean(overlaps)
    row = re.search(r"^birds +5 (.*)", out, re.M).group(1)
    assert row.split() == [f"{figure:.4f}" for figure in figures]
    assert re.search(r"^cars +1 +(0\.9[5-9]|1\.0)", out, re.M)  # the edge is soft
    image, width = np.asarray(Image.open(tmp_path / "sheet.png")), 3 * masks.THUMB + 16
    for n, x in zip((5, 1, 4), (0, width, 2 * width)):  # IoU 2/5, then the two of 1/2
        mask = image[16:116, x + masks.THUMB:][:, :100, 0]
        np.testing.assert_array_equal(mask, read(by_hand / f"birds/{n}_mask_pred.png"))


def test_check_names_what_it_cannot_compare(by_hand, tmp_path, failure):
    lonely, coloured = by_hand / "cars/8_mask.png", by_hand / "birds/3_mask_pred.png"
    Image.fromarray(noise(0, 100, 100)).save(coloured)
    assert failure(f"--check {by_hand}/birds", masks.main).startswith(f"error: {coloured}: ")
    Image.new("L", (100, 100), 255).save(lonely)
    line = failure(f"--check {by_hand}/cars", masks.main)
    assert line.startswith(f"error: {lonely}: ") and "8_mask_pred.png" in line and "8_image." in line
    (tmp_path / "empty").mkdir()
    assert failure(f"--check {tmp_path}/empty", masks.main).startswith(f"error: --check {tmp_path}/empty: ")
