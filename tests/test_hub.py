"""Networks of the user's own, as --backbone FOLDER:NAME of torch.hub: tested without training
and trained, against what the tests compute from the network itself."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import bgbias
import eval_attention
from conftest import naive_metrics, pixels_of, result, scaled, versions_of, write_shop

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16  # px of the crops
OWN_SCALING = (0.3, 0.5, 0.7), (0.2, 0.4, 0.1)

# net(); the same network twice with a scaling of its own, which it tells as attributes or does
# inside; and one whose output is OUTPUT of net()'s features f, (B, 32).
HUBCONF = f"M, S = {OWN_SCALING}" + """
import torch
from torch import nn
def net():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(2), nn.Flatten())
def told():
    network = net()
    network.mean, network.std = torch.tensor(M).double(), torch.tensor(S).numpy()
    return network
def inside():
    network, (m, s) = net(), torch.tensor((M, S))[..., None, None]
    network.mean, network.std = (0, 0, 0), (1, 1, 1)
    network.register_forward_pre_hook(lambda module, x: (x[0] - m) / s)
    return network
def odd():
    network = net()
    network.register_forward_hook(lambda module, x, f: OUTPUT)
    return network
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the networks, mine/, and a shop of 22 classes x 3 photos: 8 for training, 3 for
    validation, 11 for testing, or all of them for an untrained network."""
    root = write_shop(tmp_path_factory.mktemp("hub"), classes=22, photos=3, size=(20, 18), suffix="png")
    write_hubconf(root / "mine", HUBCONF)
    return root


def write_hubconf(folder, text):
    folder.mkdir()
    (folder / "hubconf.py").write_text(text)


def command(root, flags, runs):
    """The arguments of a run of mine:net; later flags win."""
    return shlex.split(f"--dataset {root}/shop --runs {root}/{runs} --backbone {root}/mine:net --image-size {SIZE} "
                       f"--epochs 2 --iterations 3 --batch-size 8 --lr 1e-3 --device cpu {flags}")


def finish(root, flags, runs="runs"):
    """The folder of the run, when it is finished."""
    bgbias.main(command(root, flags, runs))
    return bgbias.run_folder(bgbias.parse_args(command(root, flags, runs)))


UNTRAINED = "--measure all"
TRAINED = "--bgaugment --embedding 16"


@pytest.fixture(scope="module")
def untrained(root):
    return finish(root, UNTRAINED)


@pytest.fixture(scope="module")
def trained(root):
    return finish(root, TRAINED)


def weights(run, file="best.pt"):
    return torch.load(run / file, weights_only=True)["network"]


def network_itself():
    """The network of HUBCONF, without torch.hub."""
    names = {}
    exec(HUBCONF, names)
    return names["net"]().eval()


def inputs(root):
    """{condition: photos (66, 3, S, S), in [0, 255]}, and their labels."""
    files = sorted((root / "shop/images").glob("*/*"))
    masks = [root / "shop/masks" / file.relative_to(root / "shop/images") for file in files]
    images, masks = (torch.stack([pixels_of(file, SIZE) for file in some]) for some in (files, masks))
    return versions_of(images, masks / 255), np.repeat(np.arange(22), 3)


def slow_map_at_r(features, labels):
    return naive_metrics(F.normalize(features.detach().double(), dim=1), labels, ())["map@r"]


# ---- Without training ----------------------------------------------------------------------------


def test_untrained_network(root, untrained):
    photos, labels = inputs(root)
    test = result(untrained)["test"]
    for condition, x in photos.items():
        expected = slow_map_at_r(network_itself()(scaled(x)), labels)
        assert test[condition][0]["map@r"] == pytest.approx(expected, abs=1e-9)
    assert len({test[condition][0]["map@r"] for condition in photos}) == 4
    assert "22 test classes, 66 photos" in result(untrained)["tested"] and result(untrained)["epochs"] == 0
    state = weights(untrained)
    assert state.keys() == {f"backbone.{name}" for name in network_itself().state_dict()}  # no linear layer
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in network_itself().state_dict().items())
    state = weights(finish(root, "--measure all --embedding 5"))
    assert state["head.weight"].shape == (5, 32) and state["head.bias"].shape == (5,)


def test_folder_relative_to_the_current_folder(root, untrained, monkeypatch):
    monkeypatch.chdir(root)
    run = finish(root, f"{UNTRAINED} --backbone ./mine:net")
    assert run != untrained and result(run)["test"] == result(untrained)["test"]


# ---- Trained -------------------------------------------------------------------------------------


def test_trained_with_bgaugment(root, trained):
    state = weights(trained)
    assert state["head.weight"].shape == (16, 32)
    itself = network_itself()
    assert not torch.equal(state["backbone.0.weight"], itself[0].weight)
    assert not torch.equal(state["backbone.1.weight"], itself[1].weight)
    assert torch.equal(state["backbone.1.running_var"], itself[1].running_var)  # BatchNorm is frozen
    photos, labels = inputs(root)
    itself.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items()
                            if name.startswith("backbone.")})
    features = itself(scaled(photos["clean"][33:]))
    expected = slow_map_at_r(F.linear(features, state["head.weight"], state["head.bias"]), labels[33:])
    assert result(trained)["test"]["clean"][0]["map@r"] == pytest.approx(expected, abs=1e-9)


# ---- Its own scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [0, 6])
def test_mean_and_std_of_its_own(root, embedding):
    embeddings, scores = [], []
    for name in ("told", "inside"):
        folder = finish(root, f"--measure all --embedding {embedding} --backbone {root}/mine:{name}")
        run = eval_attention.load_run(folder, "cpu")
        batches = bgbias.make_evaluation_batches(run.args, run.split, "test", 1, conditions=())
        items = bgbias.load_batches(batches, run.args)
        embeddings.append(bgbias.embed(eval_attention.network_of(run), items, bgbias.all_views))
        scores.append(result(folder)["test"])
    for told, inside in zip(*(found.values() for found in embeddings), strict=True):
        torch.testing.assert_close(told, inside, rtol=1e-5, atol=1e-5)
        assert told.std(dim=1).mean() > 0.01
    if not embedding:
        for condition, x in inputs(root)[0].items():  # painted over with one colour, whatever the network
            expected = F.normalize(network_itself()(scaled(x, *OWN_SCALING)), dim=1)
            torch.testing.assert_close(embeddings[0][condition][0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert scores[0]["query"] == scores[1]["query"]
    imagenet = result(finish(root, f"--measure all --embedding {embedding}"))
    assert scores[0]["clean"] != imagenet["test"]["clean"]  # so it makes a difference


@pytest.mark.parametrize("name, value, word", [
    ("M", "(123.7, 116.3, 103.5)", "mean"), ("S", "(0.2, 0.2, 1.1)", "std"), ("S", "(0.2, 0, 0.2)", "std")])
def test_error_scaling(root, tmp_path, failure, name, value, word):
    write_hubconf(tmp_path / "odd", f"{HUBCONF}{name} = {value}\n")
    line = failure(command(root, f"{UNTRAINED} --backbone {tmp_path}/odd:told", "failed"))
    assert f"--backbone {tmp_path}/odd:told: its {word} " in line


class Stated(torch.nn.Module):
    """A network that states what the test gives it."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TIMM = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
SCALINGS = [
    ({}, IMAGENET),
    ({"mean": 0.5, "std": 0.25}, ((127.5,) * 3, (63.75,) * 3)),
    ({"mean": torch.tensor(0.5), "std": np.float64(0.25)}, ((127.5,) * 3, (63.75,) * 3)),
    ({"mean": torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1), "std": np.full((3, 1, 1), 0.2)},
     ((51, 102, 153), (51,) * 3)),
    ({"mean": torch.nn.Parameter(torch.full((3,), 0.2))}, ((51,) * 3, IMAGENET[1])),  # each on its own
    ({"std": [0.2] * 3}, (IMAGENET[0], (51,) * 3)),
    ({"mean": lambda: 0.5, "std": [0.2] * 4}, IMAGENET),  # a method; too many
    ({"mean": None, "std": "0.2"}, IMAGENET),
    ({"pretrained_cfg": TIMM}, ((122.4, 117.3, 104.55), (68.85, 66.3, 71.4))),
    ({"pretrained_cfg": TIMM, "mean": 0.2, "std": lambda: 1}, ((51,) * 3, (68.85, 66.3, 71.4))),  # its own first
    ({"pretrained_cfg": {"url": ""}}, IMAGENET), ({"pretrained_cfg": None}, IMAGENET)]


@pytest.mark.parametrize("attributes, scaling", SCALINGS)
def test_scaling_that_a_network_states(attributes, scaling):
    order, mean, std = bgbias.input_scaling("folder:name", Stated(**attributes))
    assert order == [0, 1, 2]
    assert (mean, std) == (pytest.approx(scaling[0], rel=1e-6), pytest.approx(scaling[1], rel=1e-6))


# ---- Without gradients ---------------------------------------------------------------------------


# The same features from NumPy, as from an ONNX session, and from a network.
NUMPY = f"M, S = {OWN_SCALING}" + """
from pathlib import Path
import numpy as np, torch
W = np.load(Path(__file__).with_name("w.npy"))
def function():
    return lambda images: np.require(images, np.float32, "C").reshape(len(images), -1) @ W
class Plain(torch.nn.Module):
    def forward(self, images):
        features = function()(images.detach().cpu().numpy())
        return torch.from_numpy(features).to(images.device)
class WithScaling(Plain):
    mean, std = M, S
class NotDetached(torch.nn.Module):
    def forward(self, images):
        return torch.from_numpy(function()(images.numpy()))
class DetachedInput(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = module()
    def forward(self, images):
        return self.network(images.detach())
def module():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(len(W), W.shape[1], bias=False))
    network[1].weight.data = torch.from_numpy(W.T.copy())
    return network
def frozen():
    return module().requires_grad_(False)
"""


@pytest.fixture(scope="module")
def in_numpy(root):
    """(the folder of NUMPY, the weight by which its networks multiply their input)"""
    weight = np.random.default_rng(5).normal(size=(3 * SIZE**2, 10)).astype(np.float32)
    write_hubconf(root / "numpy", NUMPY)
    np.save(root / "numpy/w.npy", weight)
    return root / "numpy", weight


@pytest.mark.parametrize("name", ["Plain", "WithScaling", "NotDetached"])
def test_a_network_without_gradients_is_measured(root, in_numpy, capsys, name):
    folder, weight = in_numpy
    scaling = OWN_SCALING if name == "WithScaling" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    run = finish(root, f"{UNTRAINED} --backbone {folder}:{name}")
    printed = capsys.readouterr().out
    assert "10 features, 0 trainable parameters" in printed
    scale, = re.findall(r"\(pixel - \[(.*)\]\) / \[(.*)\]", printed)
    told = [float(n) for n in ", ".join(scale).split(", ")]
    assert told == pytest.approx([255 * value for values in scaling for value in values], abs=0.6)
    photos, labels = inputs(root)
    for condition, x in photos.items():
        expected = slow_map_at_r(scaled(x, *scaling).flatten(1).double() @ torch.from_numpy(weight).double(), labels)
        assert result(run)["test"][condition][0]["map@r"] == pytest.approx(expected, abs=1e-9)
    module = finish(root, f"{UNTRAINED} --backbone {folder}:module")
    assert (result(module)["test"] == result(run)["test"]) == (name != "WithScaling")


def test_error_no_such_hubconf_or_function(root, failure):
    for name, words in ((f"{root}/nowhere:net", f"{root}/nowhere/hubconf.py"), (f"{root}/mine:nothing", "nothing()")):
        assert words in failure(command(root, f"--measure --backbone {name}", "runs"))



@pytest.mark.parametrize("flags, words", [
    ("Plain", ["no gradient", "--measure"]), ("NotDetached", ["no gradient", "--measure"]),
    ("Plain --embedding 0", ["no gradient", "--measure"]), ("frozen --embedding 0", ["leave out --embedding 0"])])
def test_error_not_trainable(root, in_numpy, failure, flags, words):
    line = failure(command(root, f"--epochs 1 --backbone {in_numpy[0]}:{flags}", "failed"))
    assert f"--backbone {in_numpy[0]}:{flags.split()[0]}: " in line and all(word in line for word in words)
    assert not (root / "failed").exists()


def test_a_linear_layer_is_trained_on_a_frozen_network(root, in_numpy):
    state = weights(finish(root, f"--epochs 1 --embedding 4 --lr 0.1 --backbone {in_numpy[0]}:frozen"))
    torch.manual_seed(bgbias.seed_of(42, bgbias.INIT_SEED))
    before = bgbias.Embedder(f"{in_numpy[0]}:frozen", "own", SIZE, 4).state_dict()
    assert torch.equal(state["backbone.1.weight"], before["backbone.1.weight"])
    assert not torch.equal(state["head.weight"], before["head.weight"])


def test_the_weights_behind_a_detached_input_are_trained(root, in_numpy):
    state = weights(finish(root, f"--epochs 1 --lr 0.1 --backbone {in_numpy[0]}:DetachedInput"))
    assert not torch.isclose(state["backbone.network.1.weight"], torch.from_numpy(in_numpy[1]).T).all()


@pytest.mark.parametrize("name", ["Plain", "NotDetached", "DetachedInput"])
def test_no_attention_score_without_gradients(root, in_numpy, failure, capsys, name):
    run, other = (finish(root, f"{UNTRAINED} --backbone {in_numpy[0]}:{name}") for name in (name, "module"))
    capsys.readouterr()
    eval_attention.main([str(run), str(other), "--device", "cpu", "--sanity"])
    note, *table = capsys.readouterr().out.splitlines()
    assert str(run) in note and [line.split("|")[2].strip() for line in table[2:4]] == ["0", "66"]
    assert [line.split("|")[1].strip() for line in table[7:]] == [other.name]  # the table of --sanity
    assert not (run / "attention.npz").exists() and (other / "attention.npz").exists()
    assert str(run) in failure([run, "--figure", root / "a.png", "--device", "cpu"], main=eval_attention.main)


def test_error_a_function_is_no_network(root, in_numpy, failure):
    line = failure(command(root, f"{UNTRAINED} --backbone {in_numpy[0]}:function", "failed"))
    assert f"--backbone {in_numpy[0]}:function: function() returns a function" in line and "torch.nn.Module" in line
    assert not (root / "failed").exists()


# ---- Its weights ---------------------------------------------------------------------------------


def test_weights_none_makes_them_random(root, untrained):
    own = weights(untrained)
    runs = [weights(finish(root, f"{UNTRAINED} --weights none --seed {seed}", runs))
            for seed, runs in ((1, "a"), (1, "b"), (2, "a"))]
    for name in ("backbone.0.weight", "backbone.0.bias"):
        first, again, other = (state[name] for state in runs)
        assert torch.equal(first, again)
        assert not torch.isclose(first, own[name]).any() and not torch.isclose(first, other).any()
    bound = (3 * 3 * 3) ** -0.5  # PyTorch's initialisation of a convolution is uniform within
    weight = runs[0]["backbone.0.weight"]
    assert weight.abs().max() < bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


class Attention(torch.nn.Module):
    """Parameters that no reset_parameters() reaches: in_proj_weight, in_proj_bias, and a class token."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.linspace(-1, 1, 8).view(1, 2, 4))
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.norm = torch.nn.LayerNorm(4)
        self.scale = torch.nn.Parameter(torch.full((4,), 0.1))


def test_weights_none_reaches_every_parameter():
    def randomised(seed):
        network = Attention()
        network.load_state_dict(learned)
        torch.manual_seed(seed)
        bgbias.randomise(network)
        return network.state_dict()

    learned = {name: value + 0.1 * torch.rand(value.shape) for name, value in Attention().state_dict().items()}
    learned["scale"] = torch.full((4,), 0.1)  # all equal: there is nothing that it could have learned
    first, again, other = (randomised(seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in learned)
    assert [name for name in learned if torch.equal(first[name], learned[name])] == ["scale"]
    assert not torch.equal(first["attention.in_proj_weight"], other["attention.in_proj_weight"])
    for name in ("token", "attention.in_proj_weight", "attention.in_proj_bias"):
        assert torch.equal(first[name].flatten().sort().values, learned[name].flatten().sort().values)
    assert first["norm.weight"].tolist() == [1] * 4  # by its reset_parameters()


def test_its_own_weights_are_not_imagenet(root, untrained, failure):
    assert result(untrained)["args"]["weights"] == "own"
    line = failure(command(root, f"{UNTRAINED} --weights imagenet", "failed"))
    assert f"--backbone {root}/mine:net: " in line and "--weights imagenet" in line and not (root / "failed").exists()


def test_weights_of_a_file(root, tmp_path):
    state = network_itself().state_dict()
    state["0.weight"] = torch.linspace(-1, 1, state["0.weight"].numel()).view_as(state["0.weight"])
    state["1.running_mean"] += 0.5
    torch.save(state, tmp_path / "mine.pth")
    run = finish(root, f"{UNTRAINED} --weights {tmp_path}/mine.pth")
    loaded = weights(run)
    assert loaded.keys() == {f"backbone.{name}" for name in state}
    assert all(torch.equal(loaded[f"backbone.{name}"], value) for name, value in state.items())


def test_weights_of_a_run(root, trained, untrained, capsys):
    """Its backbone, and its linear layer if that has the right size. One line says which."""
    def states(flags, run=trained):
        capsys.readouterr()
        args = bgbias.parse_args(command(root, f"--weights {run}/best.pt {flags}", "runs"))
        torch.manual_seed(0)
        network = bgbias.Embedder(args.backbone, args.weights, args.image_size, args.embedding)
        line, = capsys.readouterr().out.splitlines()
        return line, network.state_dict()

    saved = weights(trained)
    line, state = states("--embedding 16")
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    assert line == f"--weights {trained}/best.pt: the backbone and the linear layer of a run"
    for embedding in (5, 0):
        line, state = states(f"--embedding {embedding}")
        assert all(torch.equal(state[name], saved[name]) for name in saved if name.startswith("backbone."))
        assert "without its linear layer; give --embedding 16" in line
    assert "head.weight" not in state
    line, state = states("--embedding 16", run=untrained)
    assert torch.equal(state["backbone.0.weight"], weights(untrained)["backbone.0.weight"])
    assert line.endswith("the backbone of a run, which has no linear layer")


def test_weights_of_a_run_with_another_network(root, trained, failure):
    line = failure(command(root, f"--backbone smallconv --weights {trained}/best.pt", "failed"))
    assert f"--weights {trained}/best.pt: 0.weight does not fit" in line and not (root / "failed").exists()


@pytest.mark.parametrize("change", ["network.half()", "network.double()", "torch.compile(network)",
                                    "torch.compile(network.bfloat16())"])
def test_a_network_in_another_state(root, tmp_path, change):
    """A compiled network, or one in another precision, is measured in float32 and not compiled."""
    text = f"{HUBCONF}def changed():\n    network = net()\n    return {change}\n"
    write_hubconf(tmp_path / "changed", text)
    network = bgbias.Embedder(f"{tmp_path}/changed:changed", "own", SIZE, 0)
    x = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(network(x), F.normalize(network_itself()(x), dim=1), atol=0.01, rtol=0)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32, torch.int64}
    assert network.state_dict().keys() == {f"backbone.{name}" for name in network_itself().state_dict()}


# ---- Using the result ----------------------------------------------------------------------------


def test_load_network_finds_the_numbers_of_the_test_again(root, trained):
    network, preprocess = bgbias.load_network(trained)
    files = sorted((root / "shop/images").glob("*/*"))[33:]  # those of the test
    photos = torch.stack([preprocess(str(file)) for file in files])
    assert photos.shape == (33, 3, SIZE, SIZE) and photos.dtype == torch.uint8
    expected = torch.stack([pixels_of(file, SIZE) for file in files])
    assert (photos - expected).abs().max() <= 1
    embeddings = network(photos)
    assert embeddings.shape == (33, 16) and not embeddings.requires_grad
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(33))
    assert not any(module.training for module in network.modules())
    metrics = bgbias.retrieval_metrics(embeddings, np.repeat(np.arange(11), 3), (1,))
    test = result(trained)["test"]["clean"][0]
    assert {name: test[name] for name in metrics} == pytest.approx(metrics, abs=1e-9)
    torch.testing.assert_close(network(photos[:1].float()), embeddings[:1])  # pixels of any type


def test_load_network_turns_photos_upright(root, trained, tmp_path):
    _, preprocess = bgbias.load_network(str(trained), device="cpu")
    file = root / "shop/images/c00/p0.png"
    exif = Image.Exif()
    exif[274] = 6  # stored turned by 90 degrees
    Image.open(file).transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(preprocess(tmp_path / "turned.png"), preprocess(file))


def test_error_load_network_of_an_unfinished_run(root, trained, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path)
    with pytest.raises(bgbias.UserError, match=f"^{tmp_path}: not a finished run; "):
        bgbias.load_network(tmp_path)


# ---- Odd networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [UNTRAINED, "--epochs 1"])
@pytest.mark.parametrize("output", ["f[:, :, None, None]", "f.flatten()", "(f, f)", "{'features': f}",
                                    "f[:1]", "f.repeat(2, 1)"])
def test_error_output(root, tmp_path, failure, output, flags):
    write_hubconf(tmp_path / "odd", HUBCONF.replace("OUTPUT", output))
    line = failure(command(root, f"{flags} --backbone {tmp_path}/odd:odd", "failed"))
    assert f"--backbone {tmp_path}/odd:odd" in line
    assert not (root / "failed").exists()


# Networks that eval() does not reach, and others whose features an image shares with its batch.
BATCHES = """
import torch
from torch import nn
from torch.nn import functional as F
class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.hidden = [self.make()]
    def make(self):
        return nn.Identity()
    def forward(self, x):
        return self.hidden[0](self.first(x)).mean((2, 3))
class NormInList(Base):
    def make(self):
        return nn.BatchNorm2d(8)
class DropoutInList(Base):
    def make(self):
        return nn.Dropout()
class FunctionalDropout(Base):
    def forward(self, x):
        return F.dropout(super().forward(x))  # training=True is its default
class AlwaysTraining(DropoutInList):
    def __init__(self):
        super().__init__()
        self.registered = self.hidden[0]
    def train(self, mode=True):
        return super().train(True)
class Centred(Base):
    def forward(self, x):
        features = super().forward(x)
        return features - 0.1 * features.mean(0)
class NormOfOne(Base):
    def forward(self, x):
        features = super().forward(x)
        return F.batch_norm(features, None, None, training=True)  # refuses a single image
class OneImage(Base):
    def forward(self, x):
        if len(x) != 1:
            raise ValueError("index: 0 Got: 3 Expected: 1\\nPlease fix")
        return super().forward(x)
class Counting(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(0))
    def forward(self, x):
        torch.rand(1)
        self.calls = self.calls + 1
        self.cache = torch.zeros(len(x))
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def in_batches(root):
    write_hubconf(root / "batches", BATCHES)
    return root / "batches"


@pytest.mark.parametrize("name", ["NormInList", "DropoutInList", "FunctionalDropout", "AlwaysTraining", "Centred"])
def test_error_features_depend_on_the_batch(root, in_batches, failure, name):
    line = failure(command(root, f"{UNTRAINED} --backbone {in_batches}:{name}", "failed"))
    assert f"--backbone {in_batches}:{name}: the features of an image change by " in line and "eval()" in line
    assert not (root / "failed").exists()


@pytest.mark.parametrize("name, words", [
    ("NormOfOne", "1 at 16 px (ValueError: Expected more than 1"),
    ("OneImage", "3 at 16 px (ValueError: index: 0 Got: 3 Expected: 1); export it for any number of images")])
def test_error_fails_on_some_batch(root, in_batches, failure, name, words):
    line = failure(command(root, f"{UNTRAINED} --backbone {in_batches}:{name}", "failed"))
    assert f"--backbone {in_batches}:{name}: it fails on a batch of {words}" in line


def test_the_check_of_a_network_leaves_no_trace(in_batches):
    """Neither in its buffers nor in the global random state."""
    torch.manual_seed(3)
    network = bgbias.Embedder(f"{in_batches}:Counting", "own", SIZE, 0)
    found = torch.rand(2)
    assert network.backbone.calls == 0
    torch.manual_seed(3)
    torch.nn.Conv2d(3, 8, 3)
    assert torch.equal(found, torch.rand(2))


def test_features_in_half_precision(root, tmp_path, untrained):
    write_hubconf(tmp_path / "half", HUBCONF.replace("OUTPUT", "f.half()"))
    run = finish(root, f"{UNTRAINED} --backbone {tmp_path}/half:odd")
    ours, plain = (result(folder)["test"]["clean"][0]["map@r"] for folder in (run, untrained))
    assert ours == pytest.approx(plain, abs=0.02)
    assert (finish(root, f"--epochs 1 --backbone {tmp_path}/half:odd") / "result.json").exists()
