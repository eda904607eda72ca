"""Networks of the user's own, as --backbone REPO:NAME of torch.hub: tested as they are and trained,
against what the tests compute from the network itself; and each way in which they can be odd."""

import itertools
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import bgbias
import eval_attention
from conftest import write_image

SIZE = 16  # px of the crops
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

HUBCONF = """
import torch
from torch import nn
def net():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""

# The same network twice: its scaling of the photos told as attributes, and done inside.
OWN_SCALING = (0.3, 0.5, 0.7), (0.2, 0.4, 0.1)
SCALED = HUBCONF + f"\nM, S = {OWN_SCALING}" + """
def told():
    network = net()
    network.mean, network.std = M, S
    return network
class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.mean, self.std = (0, 0, 0), (1, 1, 1)
    def forward(self, x):
        m, s = (torch.tensor(v)[:, None, None] for v in (M, S))
        return self.net((x - m) / s)
def inside():
    return Inside()
"""

# A network whose output is `{}` of its features f, (B, 32).
ODD = HUBCONF + """
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        f = self.net(x)
        return {}
def odd():
    return Odd()
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums depend on the number of threads, and so small a network is quicker with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the networks and a shop of 22 classes x 3 photos: 8 for training, 3 for
    validation, 11 for testing, or all of them for a network as it is."""
    root, rng = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    for label, i in itertools.product(range(22), range(3)):
        write_image(root / f"shop/images/c{label:02d}/p{i}.png", rng, (20, 18))
        write_image(root / f"shop/masks/c{label:02d}/p{i}.png", rng, (20, 18), mode="L")
    for part, i in itertools.product(("val", "test"), range(3)):
        write_image(root / f"data/unsplash_backgrounds/{part}/b{i}.png", rng, (30, 20))
    for name, text in (("mine", HUBCONF), ("scaled", SCALED)):
        write_hubconf(root / name, text)
    return root


def write_hubconf(folder, text):
    folder.mkdir()
    (folder / "hubconf.py").write_text(text)
    return folder


def command(root, flags, runs="runs"):
    """The arguments of a run of mine:net; later flags win."""
    return [*shlex.split(
        f"--dataset {root}/shop --data {root}/data --runs {root}/{runs} --backbone {root}/mine:net "
        f"--image-size {SIZE} --epochs 2 --iterations 3 --batch-size 8 --lr 1e-3 --device cpu"),
        *shlex.split(flags)]


def finish(root, flags, runs="runs"):
    """The folder of the run, when it is done."""
    args = bgbias.parse_args(command(root, flags, runs))
    bgbias.main(command(root, flags, runs))
    return bgbias.run_folder(args, bgbias.KINDS[args.bgaugment])


def failure(capsys, root, flags, runs="failed"):
    """The one line that the command ends with, with exit code 2 and no traceback."""
    shutil.rmtree(root / runs, ignore_errors=True)
    with pytest.raises(SystemExit) as ended:
        bgbias.command("bgbias.py", lambda: bgbias.main(command(root, flags, runs)))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("bgbias.py: error: ") and "Traceback" not in "".join(lines)
    assert not list((root / runs).glob("*/result.json"))
    return lines[-1]


AS_IT_IS = "--epochs 0 --embedding 0"
TRAINED = "--bgaugment --embedding 16"


@pytest.fixture(scope="module")
def as_it_is(root):
    return finish(root, AS_IT_IS)


@pytest.fixture(scope="module")
def trained(root):
    return finish(root, TRAINED)


def result(run):
    return json.loads((run / "result.json").read_text())


def weights(run, file="best.pt"):
    return torch.load(run / file, weights_only=True)["network"]


def network_itself():
    """The network of HUBCONF, without torch.hub."""
    names = {}
    exec(HUBCONF, names)
    return names["net"]().eval()


def inputs(root):
    """{condition: photos (66, 3, S, S), with ImageNet's mean and std}, and their labels."""
    pixels, masks = [], []
    for file in sorted((root / "shop/images").glob("*/*")):
        mask = root / "shop/masks" / file.relative_to(root / "shop/images")
        for path, planes in ((file, pixels), (mask, masks)):
            picture = Image.open(path)
            side = round(SIZE * 256 / 227)
            assert picture.size == (20, side)  # so there is nothing to resize
            left, top = (20 - SIZE) // 2, (side - SIZE) // 2
            crop = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
            planes.append(torch.from_numpy(np.atleast_3d(crop).transpose(2, 0, 1).copy()))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    x, m = (torch.stack(pixels) - mean) / std, torch.stack(masks)
    found = {"clean": x, "object_only": x * m, "background_only": x * (1 - m)}
    return found, np.repeat(np.arange(22), 3)


def slow_map_at_r(e, labels):
    """The mean over the queries of sum_{i <= R} P@i [i-th is right] / R."""
    scores = []
    for q in range(len(e)):
        others = [j for j in range(len(e)) if j != q]
        others.sort(key=lambda j: float(((e[q] - e[j]) ** 2).sum()))
        right = [labels[j] == labels[q] for j in others]
        R = sum(right)
        scores.append(sum(sum(right[:i]) / i for i in range(1, R + 1) if right[i - 1]) / R)
    return float(np.mean(scores))


# ---- As it is ------------------------------------------------------------------------------------


def test_network_as_it_is(root, as_it_is, capsys):
    assert as_it_is.name == "shop-untrained-base-s42"
    photos, labels = inputs(root)
    scores = result(as_it_is)
    for condition, x in photos.items():
        with torch.no_grad():
            features = network_itself()(x).double().numpy()
        e = features / np.linalg.norm(features, axis=1, keepdims=True)
        expected = slow_map_at_r(e, labels)
        assert scores["test"][condition]["map@r"] == pytest.approx(expected, abs=1e-9)
    assert len({scores["test"][condition]["map@r"] for condition in photos}) == 3
    assert (scores["tested"], scores["epochs"]) == ("22 test classes, 66 photos", 0)
    bgbias.report(as_it_is.parent)
    assert "| the network as it is" in capsys.readouterr().out


def test_features_are_kept_as_they_are(as_it_is):
    state = weights(as_it_is)
    assert {name.partition(".")[0] for name in state} == {"backbone"}
    for name, value in network_itself().state_dict().items():
        assert torch.equal(state[f"backbone.{name}"], value)


def test_another_size_of_embedding_adds_a_linear_layer(root):
    state = weights(finish(root, "--epochs 0 --embedding 5", "five"))
    assert state["head.weight"].shape == (5, 32) and state["head.bias"].shape == (5,)


def test_repo_relative_to_the_current_folder(root, as_it_is, monkeypatch):
    monkeypatch.chdir(root)
    run = finish(root, f"{AS_IT_IS} --backbone ./mine:net", "relative")
    assert result(run)["test"] == result(as_it_is)["test"]
    eval_attention.main([str(run), "--device", "cpu", "--neighbours", str(root / "relative.png")])
    assert Image.open(root / "relative.png").size[0] == 900


# ---- Trained -------------------------------------------------------------------------------------


def test_trained_with_bgaugment(root, trained):
    assert trained.name == "shop-contrastive-bgaugment-s42"
    state, scores = weights(trained), result(trained)
    assert state["head.weight"].shape == (16, 32)
    assert scores["tested"] == "11 test classes, 33 photos"
    itself = network_itself()
    assert not torch.equal(state["backbone.0.weight"], itself[0].weight)
    assert not torch.equal(state["backbone.1.weight"], itself[1].weight)
    for name in ("running_mean", "running_var"):  # BatchNorm's statistics stay as they were
        assert torch.equal(state[f"backbone.1.{name}"], getattr(itself[1], name))
    photos, labels = inputs(root)
    itself.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items()
                            if name.startswith("backbone.")})
    with torch.no_grad():
        e = F.linear(itself(photos["clean"][33:]), state["head.weight"], state["head.bias"])
    e = F.normalize(e.double(), dim=1).numpy()
    expected = slow_map_at_r(e, labels[33:])
    assert scores["test"]["clean"]["map@r"] == pytest.approx(expected, abs=1e-9)


class Killed(BaseException):
    """What bgbias.py has no handler for, as kill -9 leaves it no time for one."""


def test_killed_and_resumed(root, trained, monkeypatch):
    step, calls = torch.optim.RMSprop.step, itertools.count(1)

    def dying(self, *args, **kwargs):
        if next(calls) == 5:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.RMSprop, "step", dying)
        with pytest.raises(Killed):
            finish(root, TRAINED, "resumed")
    run = root / "resumed" / trained.name
    assert (run / "last.pt").exists() and not (run / "result.json").exists()
    assert finish(root, TRAINED, "resumed") == run
    for file in ("last.pt", "best.pt"):
        ours, whole = weights(run, file), weights(trained, file)
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert result(run)["test"] == result(trained)["test"]


def test_a_run_is_of_its_network(root, capsys, trained):
    shutil.copytree(root / "mine", root / "other")
    with pytest.raises(bgbias.UserError, match="begun with --backbone .*mine:net .now .*other:net"):
        finish(root, f"{TRAINED} --backbone {root}/other:net")


# ---- Attention and neighbours --------------------------------------------------------------------


def test_attention_of_the_network_as_it_is(root, as_it_is):
    eval_attention.main([str(as_it_is), "--device", "cpu"])
    with np.load(as_it_is / "attention.npz") as saved:
        assert len(saved["image"]) == 66 and np.isfinite(saved["score"]).all()
        found = saved["score"][:4]
    network = network_itself()

    def model(x):
        return F.normalize(network(x), dim=1)

    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    black = model((torch.zeros(1, 3, SIZE, SIZE) - mean) / std).detach()
    noise = [torch.Generator().manual_seed(bgbias.seed_of(42, eval_attention.NOISE, row))
             for row in range(4)]
    x = inputs(root)[0]["clean"][:4]
    maps = eval_attention.attention_map(model, x, black, eval_attention.euclidean, noise)
    masks = [np.asarray(Image.open(file).crop((2, 1, 2 + SIZE, 1 + SIZE)), float) / 255
             for file in sorted((root / "shop/masks").glob("*/*"))[:4]]
    for score, A, m in zip(found, maps.double().numpy(), masks):
        a, p = (A * m).sum() / A.sum(), m.mean()
        assert score == pytest.approx((a - p) / (1 - p), abs=1e-4)


def test_attention_of_a_trained_network(trained, capsys):
    eval_attention.main([str(trained), "--device", "cpu"])
    out = capsys.readouterr().out
    saved = json.loads((trained / "attention.json").read_text())
    assert saved["images"] == 33 and -1 < saved["mean"] < 1
    assert trained.name in out and f"{saved['mean']:.2f}" in out


@pytest.mark.parametrize("name", ["as_it_is", "trained"])
def test_neighbours(request, tmp_path, name):
    run = request.getfixturevalue(name)
    loaded = eval_attention.load_run(run, "cpu")
    labels = np.array(loaded.split.labels)
    first = eval_attention.nearest(loaded, list(range(len(labels))))["replaced"][:, 0].numpy()
    draw = result(run)["test"]["query"]["draws"][0]
    assert (labels[first] == labels).mean() == pytest.approx(draw["recall@1"], abs=1e-12)
    flags = ["--neighbours", str(tmp_path / "a.png"), "--images", "2"]
    eval_attention.main([str(run), "--device", "cpu", *flags])
    assert Image.open(tmp_path / "a.png").size == (900, 2 * (108 + 5 + 32))


# ---- Its own scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [0, 6])
def test_mean_and_std_of_its_own(root, embedding):
    embeddings, scores = [], []
    for name in ("told", "inside"):
        flags = f"--epochs 0 --embedding {embedding} --backbone {root}/scaled:{name}"
        run = eval_attention.load_run(finish(root, flags, f"{name}{embedding}"), "cpu")
        batches = bgbias.test_batches(run.split, run.args, draws=1)
        items = bgbias.loader(batches, run.args, range(batches.items_a_pass))
        embeddings.append(bgbias.embed(eval_attention.network_of(run), items, "cpu"))
        scores.append(result(run.folder)["test"])
    for condition in ("clean", "replaced"):
        told, inside = (found[condition] for found in embeddings)
        torch.testing.assert_close(told, inside, rtol=1e-5, atol=1e-5)
        assert told.std(dim=1).mean() > 0.01
    if not embedding:
        mean, std, M, S = (torch.tensor(v)[:, None, None] for v in (MEAN, STD, *OWN_SCALING))
        x = inputs(root)[0]["clean"] * std + mean  # in [0, 1]
        with torch.no_grad():
            expected = F.normalize(network_itself()((x - M) / S), dim=1)
        torch.testing.assert_close(embeddings[0]["clean"][0], expected, rtol=1e-4, atol=1e-5)
    for condition in ("clean", "replaced", "query"):
        told, inside = (json.dumps(found[condition]) for found in scores)
        assert told == inside
    imagenet = result(finish(root, f"--epochs 0 --embedding {embedding}", f"imagenet{embedding}"))
    assert scores[0]["clean"] != imagenet["test"]["clean"]  # so it does make a difference


@pytest.mark.parametrize("mean, std", [
    ("torch.tensor([0.3, 0.5, 0.7])[None, :, None, None]", "torch.tensor([0.2, 0.4, 0.1])"),
    ("torch.tensor([0.3, 0.5, 0.7]).double()", "torch.tensor([0.2, 0.4, 0.1]).double().numpy()")])
def test_mean_and_std_of_other_kinds(root, tmp_path, mean, std):
    text = f"{SCALED}\nM, S = {mean}, {std}\n"
    write_hubconf(tmp_path / "kinds", text)
    run = finish(root, f"{AS_IT_IS} --backbone {tmp_path}/kinds:told", tmp_path.name)
    told = finish(root, f"{AS_IT_IS} --backbone {root}/scaled:told", "told0")
    assert result(run)["test"] == result(told)["test"]


@pytest.mark.parametrize("mean", ["0.5", "[0.5]", "[0.1] * 4", "'grey'", "nn.Flatten", "None",
                                  "(123.7, 116.3, 103.5)", "(0.5, 0.5, float('nan'))"])
def test_error_mean(root, tmp_path, capsys, mean):
    """Of one channel, say."""
    write_hubconf(tmp_path / "odd", f"{SCALED}\nM = {mean}\n")
    line = failure(capsys, root, f"{AS_IT_IS} --backbone {tmp_path}/odd:told")
    assert "--backbone: its network's mean: " in line and "needed: 3 numbers" in line


# ---- Its weights ---------------------------------------------------------------------------------


def test_weights_none_makes_them_random(root, as_it_is):
    own = weights(as_it_is)
    runs = [weights(finish(root, f"{AS_IT_IS} --weights none --seed {seed}", f"none{n}"))
            for n, seed in enumerate((1, 1, 2))]
    for name in ("backbone.0.weight", "backbone.0.bias"):
        first, again, other = (state[name] for state in runs)
        assert torch.equal(first, again)
        assert not torch.isclose(first, own[name]).any() and not torch.isclose(first, other).any()
    bound = (3 * 3 * 3) ** -0.5  # PyTorch's initialisation of a convolution is uniform within
    weight = runs[0]["backbone.0.weight"]
    assert weight.abs().max() < bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_weights_of_a_file(root, tmp_path):
    state = network_itself().state_dict()
    state["0.weight"] = torch.linspace(-1, 1, state["0.weight"].numel()).view_as(state["0.weight"])
    state["1.running_mean"] += 0.5
    torch.save(state, tmp_path / "mine.pth")
    run = finish(root, f"{AS_IT_IS} --weights {tmp_path}/mine.pth", "file")
    loaded = weights(run)
    assert loaded.keys() == {f"backbone.{name}" for name in state}
    assert all(torch.equal(loaded[f"backbone.{name}"], value) for name, value in state.items())
    network = eval_attention.network_of(eval_attention.load_run(run, "cpu"))
    assert torch.equal(network.backbone[0].weight, state["0.weight"])


@pytest.mark.parametrize("content", [
    b"no weights", {"0.weight": torch.zeros(8, 3, 3, 3)}, [1], None])
def test_error_weights(root, tmp_path, capsys, content):
    file = tmp_path / "mine.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    line = failure(capsys, root, f"{AS_IT_IS} --weights {file}")
    assert f"--weights {file}: " in line and f"give a state dict of {root}/mine:net" in line


# ---- Odd networks --------------------------------------------------------------------------------

EXPECTED = f"needed: a tensor (B, features), finite float32, of (B, 3, {SIZE}, {SIZE})"


@pytest.mark.parametrize("flags", [AS_IT_IS, "--epochs 1"])
@pytest.mark.parametrize("output, came", [
    ("f[:, :, None, None]", "[2, 32, 1, 1]"),
    ("f.flatten()", "[64]"),
    ("(f, f)", "tuple"),
    ("{{'features': f}}", "dict"),
    ("None", "NoneType"),
    ("f[:1]", "[1, 32]"),
    ("f.repeat(2, 1)", "[4, 32]"),
    ("f / 0 * 0", "nan"),
    ("f.long()", "int64"),
    ("f.double()", "float64"),
    ("f.half()", "float16"),
    ("f.nothing", "nothing"),
])
def test_error_output(root, tmp_path, capsys, output, came, flags):
    write_hubconf(tmp_path / "odd", ODD.format(output.replace("{{", "{").replace("}}", "}")))
    line = failure(capsys, root, f"{flags} --backbone {tmp_path}/odd:odd")
    assert f"--backbone {tmp_path}/odd:odd" in line and EXPECTED in line and came in line


def test_error_nan_of_photos(root, tmp_path, capsys):
    """A network that is sound for the black image it is tried with, and not for photos."""
    write_hubconf(tmp_path / "odd", ODD.format("f / (x.amax() == 0) * (x.amax() == 0)"))
    line = failure(capsys, root, f"{AS_IT_IS} --backbone {tmp_path}/odd:odd")
    assert f"{tmp_path}/odd:odd" in line and "not finite" in line


@pytest.mark.parametrize("text, came", [
    ("raise ValueError('no licence')", "no licence"),
    ("import a_module_nowhere", "a_module_nowhere"),
    ("def net(:", "invalid syntax"),
    ("def net(classes):\n    return None", "classes"),
    ("def net():\n    return 3", "int"),
    ("def net():\n    raise OSError('weights not downloaded')", "weights not downloaded"),
    ("net = 3", "net"),
    ("def other():\n    return None", "net"),
    ("dependencies = ['a_module_nowhere']\ndef net():\n    pass", "a_module_nowhere"),
])
def test_error_hubconf(root, tmp_path, capsys, text, came):
    write_hubconf(tmp_path / "odd", text)
    line = failure(capsys, root, f"{AS_IT_IS} --backbone {tmp_path}/odd:net")
    start, _, rest = line.partition(f"--backbone {tmp_path}/odd:net: ")
    reason, _, remedy = rest.partition("; ")
    assert came in reason and remedy.startswith("needed: REPO:NAME, NAME a function that returns the network")


@pytest.mark.parametrize("backbone", ["empty:net", "gone:net", "./gone:net", ":net", "empty:"])
def test_error_no_hubconf(root, tmp_path, capsys, monkeypatch, backbone):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    line = failure(capsys, root, f"{AS_IT_IS} --backbone {backbone}")
    assert f"--backbone {backbone}: " in line and "hubconf.py" in line
    assert "internet" not in line  # a misspelt folder is not looked for on GitHub


def test_error_network_gone(root, as_it_is, tmp_path, capsys):
    """When the run is done, and its attention is wanted."""
    run = tmp_path / as_it_is.name
    shutil.copytree(as_it_is, run, ignore=shutil.ignore_patterns("attention*"))
    saved = json.loads((run / "config.json").read_text())
    saved["args"]["backbone"] = f"{tmp_path}/gone:net"
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit) as ended:
        flags = [str(run), "--device", "cpu"]
        bgbias.command("eval_attention.py", lambda: eval_attention.main(flags))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and f"--backbone {tmp_path}/gone:net: " in line


def test_error_image_size(root, tmp_path, capsys):
    """A network whose linear layer fits one size alone."""
    fixed = "def fixed():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))\n"
    write_hubconf(tmp_path / "fixed", HUBCONF + fixed)
    flags = f"{AS_IT_IS} --backbone {tmp_path}/fixed:fixed"
    line = failure(capsys, root, f"{flags} --image-size 24")
    assert f"--backbone {tmp_path}/fixed:fixed, --image-size 24: " in line
    assert "2x1728 and 768x8" in line
    assert "--image-size 24: " in line and "of (B, 3, 24, 24)" in line
    assert "map@r" in result(finish(root, flags, "fixed"))["test"]["clean"]
