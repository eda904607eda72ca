"""BN-Inception against the paper's table and a second forward pass; checkpoints; torchvision."""

import copy
import functools
import hashlib
import io
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn import functional as F

import bgbias
from bgbias import BNInception, Embedder, UserError

# block: in | 1x1 | 3x3 reduce, 3x3 | double 3x3: reduce, 1, 2 | pool, projection | out, side at 227
TABLE = """
3a  192  64   64  64   64  96  96 avg  32   256 28
3b  256  64   64  96   64  96  96 avg  64   320 28
3c  320   0  128 160   64  96  96 max   0   576 14
4a  576 224   64  96   96 128 128 avg 128   576 14
4b  576 192   96 128   96 128 128 avg 128   576 14
4c  576 160  128 160  128 160 160 avg 128   608 14
4d  608  96  128 192  160 192 192 avg 128   608 14
4e  608   0  128 192  192 256 256 max   0  1056  7
5a 1056 352  192 320  160 224 224 avg 128  1024  7
5b 1024 352  192 320  192 224 224 max 128  1024  7
"""
ROWS = [[int(cell) if cell.isdigit() else cell for cell in line.split()] for line in TABLE.strip().splitlines()]


def convolutions():
    """{name: (out, in, kernel, kernel)} of all convolutions, from the table."""
    shapes = {"conv1_7x7_s2": (64, 3, 7, 7), "conv2_3x3_reduce": (64, 64, 1, 1), "conv2_3x3": (192, 64, 3, 3)}
    for block, width, one, reduce, three, double, first, second, _, projection, _, _ in ROWS:
        for name, out, into, side in [
                ("1x1", one, width, 1), ("3x3_reduce", reduce, width, 1), ("3x3", three, reduce, 3),
                ("double_3x3_reduce", double, width, 1), ("double_3x3_1", first, double, 3),
                ("double_3x3_2", second, first, 3), ("pool_proj", projection, width, 1)]:
            if out:
                shapes[f"inception_{block}_{name}"] = (out, into, side, side)
    return shapes


@functools.cache
def public_state():
    """A state dict as the public checkpoint's: the table's names, running statistics other than
    0 and 1, the ImageNet classifier, and no num_batches_tracked, which PyTorch did not have yet."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in convolutions().items():
        out, fan_in = shape[0], math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=rng) * (2 / fan_in) ** 0.5
        state[f"{name}.bias"] = torch.randn(out, generator=rng) / 10
        for part in ("weight", "bias", "running_mean", "running_var"):
            low = 0.5 if part in ("weight", "running_var") else -0.5
            state[f"{name}_bn.{part}"] = low + torch.rand(out, generator=rng)
    classifier = torch.nn.Linear(1024, 1000).state_dict()
    return state | {f"last_linear.{name}": value for name, value in classifier.items()}


def loaded():
    network = BNInception().eval()
    network.load_state_dict({k: v for k, v in public_state().items() if "last_linear" not in k})
    return network


def test_names_and_shapes_of_the_public_checkpoint():
    state = BNInception().state_dict()
    expected = {k: v.shape for k, v in public_state().items() if "last_linear" not in k}
    assert {k: v.shape for k, v in state.items() if "num_batches" not in k} == expected
    assert {"conv1_7x7_s2.weight", "inception_5b_pool_proj_bn.bias"} < set(state)


@torch.no_grad()
def test_a_copy_has_weights_of_its_own():
    """The network lists its modules a second time, in the order of the forward pass: a copy, and a network from a file,
    must list their own modules."""
    network, file = loaded(), io.BytesIO()
    x = 60 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    before = network(x)
    torch.save(network, file)
    file.seek(0)
    copies = [copy.deepcopy(network), torch.load(file, weights_only=False)]
    for parameter in network.parameters():
        parameter.zero_()
    assert before.any() and not network(x).any() and all(torch.equal(other(x), before) for other in copies)


def naive_forward(state, x):
    """BN-Inception once more, written from the table with functions only: {block: its output}."""
    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, state[f"{name}.bias"], stride, weight.shape[2] // 2)
        mean, var, scale, shift = (state[f"{name}_bn.{part}"][:, None, None]
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()

    def chain(x, *names, stride=1):
        for name in names[:-1]:
            x = conv(x, name)
        return conv(x, names[-1], stride)

    x = F.max_pool2d(conv(x, "conv1_7x7_s2", 2), 3, 2, ceil_mode=True)
    x = F.max_pool2d(conv(conv(x, "conv2_3x3_reduce"), "conv2_3x3"), 3, 2, ceil_mode=True)
    outputs = {}
    for block, *_ in ROWS:
        b = f"inception_{block}_"
        stride = 2 if block in ("3c", "4e") else 1
        three = chain(x, b + "3x3_reduce", b + "3x3", stride=stride)
        double = [b + "double_3x3_" + part for part in ("reduce", "1", "2")]
        double = chain(x, *double, stride=stride)
        if stride == 2:
            x = torch.cat([three, double, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
        else:
            padded = F.pad(x, (1, 1, 1, 1), value=-math.inf if block == "5b" else 0)
            around = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # the mean counts the padding
            pooled = around.amax((4, 5)) if block == "5b" else around.mean((4, 5))
            x = torch.cat([conv(x, b + "1x1"), three, double, conv(pooled, b + "pool_proj")], 1)
        outputs[block] = x
    return outputs


@pytest.mark.parametrize("height, width", [(227, 227), (64, 97)])
@torch.no_grad()
def test_forward_against_the_table(height, width):
    x = 60 * torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1)).double()
    expected = naive_forward({k: v.double() for k, v in public_state().items()}, x)
    found = loaded().double()(x)
    assert found.shape == (1, 1024) and expected["5b"].std() > 0.1
    torch.testing.assert_close(found, expected["5b"].mean((2, 3)))
    if height == 227:
        for (*_, out, side), output in zip(ROWS, expected.values(), strict=True):
            assert output.shape[1:] == (out, side, side)


def test_a_file_like_the_public_checkpoint_loads(tmp_path):
    torch.save(public_state(), tmp_path / "public.pth")
    model = Embedder("bninception", str(tmp_path / "public.pth"), 64)
    for name, value in loaded().state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)


def serve(tmp_path, monkeypatch, digest=None):
    """The checkpoint where the download looks for it, but on this disk; its name has the beginning
    of its own or another hash."""
    torch.save(public_state(), tmp_path / "draft")
    digest = digest or hashlib.sha256((tmp_path / "draft").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "draft").rename(tmp_path / f"bn_inception-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bgbias, "BNINCEPTION_URL", file.as_uri())
    return file


def test_a_download_with_the_right_hash_is_loaded(tmp_path, monkeypatch):
    assert bgbias.BNINCEPTION_URL.endswith("/bn_inception-52deb4733.pth")  # the public one's hash
    serve(tmp_path, monkeypatch)
    model = Embedder("bninception", "imagenet", 64)
    assert torch.equal(model.backbone.conv2_3x3.weight, public_state()["conv2_3x3.weight"])


def test_a_download_with_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch, digest="0badf00d")
    with pytest.raises(RuntimeError, match="0badf00d"):
        Embedder("bninception", "imagenet", 64)


def test_a_failed_download_names_the_flags(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch).unlink()
    with pytest.raises(UserError, match="--backbone bninception: .*--weights FILE"):
        Embedder("bninception", "imagenet", 64)


@pytest.fixture(scope="module")
def bninception():
    return Embedder("bninception", "none", 64)


def test_batchnorm_statistics_stay_but_its_affine_weights_train(bninception):
    model = bninception
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.eval().train()
    assert model.training and model.head.training and not any(m.training for m in norms)
    model(torch.randn(4, 3, 64, 64)).std().backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert all(m.weight.grad.isfinite().all() and m.bias.grad.any() for m in norms)
    assert sum(bool(m.weight.grad.any()) for m in norms) == 69


def test_dropout_still_drops_while_training():
    model = Embedder("squeezenet1_1", "none", 64)
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_embeddings_are_a_linear_layer_of_the_features_at_unit_length(bninception):
    for model, features in ((bninception, 1024), (Embedder("smallconv", "none", 48), 128)):
        x = model.normalise(255 * torch.rand(3, 3, 64, 64))
        embeddings = model(x)
        assert embeddings.shape == (3, 128) and model.head.weight.shape == (128, features)
        expected = model.backbone(x) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(embeddings, expected / expected.square().sum(dim=1, keepdim=True).sqrt())


# name: (side, features, what the network computes before its classifier)
TORCHVISION = {
    "squeezenet1_1": (64, 512, lambda net, x: net.features(x).mean((2, 3))), "resnet18": (64, 512, None),
    "mobilenet_v3_small": (64, 1024, None), "swin_t": (64, 768, None), "densenet121": (64, 1024, None),
    "googlenet": (64, 1024, None)}


def torchvision_network(name):
    torch.manual_seed(3)
    return torchvision.models.get_model(name, weights=None).eval()


def before_classifier(network, x):
    """The input of the network's last layer."""
    seen = []
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    handle = linear[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_torchvision_backbone_is_the_network_without_its_classifier(name):
    size, features, naive = TORCHVISION[name]
    network = torchvision_network(name)
    network.transform_input = True  # of GoogLeNet: as its ImageNet weights expect it
    torch.manual_seed(3)
    model = Embedder(name, "none", size).eval()  # the same seed, so the same weights
    assert model.order.tolist() == [0, 1, 2] and model.head.weight.shape == (128, features)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = naive(network, x) if naive else before_classifier(network, x)
        torch.testing.assert_close(model.backbone(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert model.train()(x).shape == (2, 128)  # no auxiliary outputs


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_torchvision_backbone_from_a_file(name, tmp_path):
    """The public GoogLeNet weights expect its input transform, from a file as from the web."""
    network = torchvision_network(name)
    for module in network.modules():  # GoogLeNet's random weights let nothing of the image through
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = Embedder(name, str(tmp_path / "weights.pth"), 64).eval()
    network.transform_input = True  # no effect on ResNet
    x = 2 + torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = before_classifier(network, x)
        torch.testing.assert_close(model.backbone(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_imagenet_weights_of_a_torchvision_backbone(monkeypatch):
    """Its default weights, as torchvision would download them."""
    state = torchvision_network("resnet18").state_dict()
    served = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(served, "get_state_dict", lambda *_, **__: state)
    torch.manual_seed(99)
    model = Embedder("resnet18", "imagenet", 64)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_normalise_by_hand(bninception):
    """One pixel of RGB (10, 20, 30): BGR minus the mean colour; RGB by ImageNet's mean and std."""
    pixel = torch.tensor([10.0, 20.0, 30.0])[None, :, None, None]
    caffe = bninception.normalise(pixel)
    assert caffe.flatten().tolist() == [30 - 104, 20 - 117, 10 - 128]
    usual = Embedder("squeezenet1_1", "none", 64).normalise(pixel)
    expected = [(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225]
    assert usual.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name, mean, std", [
    ("efficientnet_v2_l", (127.5,) * 3, (127.5,) * 3),  # the only one of torchvision's 80 with another scaling
    ("efficientnet_v2_m", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ("smallconv", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))])
def test_scaling_of_torchvision_networks(name, mean, std):
    assert bgbias.input_scaling(name, None) == ([0, 1, 2], pytest.approx(mean), pytest.approx(std))


@pytest.mark.parametrize("backbone, weights", [
    ("resnet19", "none"), ("fcn_resnet50", "none"), ("smallconv", "imagenet")])
def test_an_unknown_backbone_is_named(backbone, weights):
    with pytest.raises(UserError, match=f"--backbone {backbone}: .*{weights}"):
        Embedder(backbone, weights, 64)


# ---- Files of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, value, shapes", [
    ("conv2_3x3.weight", None, "(in the file: missing, in the network: [192, 64, 3, 3])"),
    ("conv2_3x3.bias", torch.zeros(7), "(in the file: [7], in the network: [192])"),
    ("conv9.weight", torch.zeros(1), "(in the file: [1], in the network: missing)")])
def test_weights_that_do_not_fit_are_never_loaded_in_part(name, value, shapes, tmp_path):
    """One tensor is missing, has another shape, or is one too many."""
    state = public_state() | {name: value}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(f"--weights {tmp_path}/w.pth: {name} does not fit {shapes}")):
        Embedder("bninception", str(tmp_path / "w.pth"), 64)
    network = loaded()
    for parameter in network.parameters():
        parameter.data.zero_()
    with pytest.raises(UserError, match=name):
        bgbias.fit_weights(network, bgbias.read_weights(tmp_path / "w.pth")[0], ("last_linear",), "w")
    assert not any(parameter.any() for parameter in network.parameters())


def renamed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


FORMS = {
    "as it is": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}},
    "DataParallel": lambda state: renamed(state, "module."),
    "compiled": lambda state: {"state_dict": renamed(state, "_orig_mod.")},
    "compiled DataParallel": lambda state: renamed(state, "module._orig_mod."),
    "another classifier": lambda state: state | {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)},
    "a deeper classifier": lambda state: state | {"fc.0.weight": torch.zeros(9, 512), "fc.3.bias": torch.zeros(7)},
    "no classifier": lambda state: {name: value for name, value in state.items() if not name.startswith("fc.")},
    "half precision": lambda state: {name: value.half() for name, value in state.items()}}


@functools.cache
def resnet_state():
    return torchvision_network("resnet18").state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_files_that_people_have(form, tmp_path):
    torch.save(FORMS[form](resnet_state()), tmp_path / "w.pth")
    torch.manual_seed(99)
    state = bgbias.build_backbone("resnet18", str(tmp_path / "w.pth")).state_dict()
    assert state.keys() == {name for name in resnet_state() if not name.startswith("fc.")}
    for name, value in state.items():
        expected = resnet_state()[name].half().float() if form == "half precision" else resnet_state()[name]
        assert torch.equal(value, expected)


def test_a_file_without_the_versions_of_its_modules(tmp_path):
    """MNASNet's own load_state_dict() refuses such a state dict."""
    expected = torchvision_network("mnasnet0_5").state_dict()
    torch.save(dict(expected), tmp_path / "w.pth")
    state = bgbias.build_backbone("mnasnet0_5", str(tmp_path / "w.pth")).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_a_network_whose_own_names_begin_with_module():
    network = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 3)})
    state = {"module.weight": torch.ones(3, 2), "module.bias": torch.ones(3)}
    bgbias.fit_weights(network, state, (), "w")
    assert network["module"].weight.eq(1).all() and network["module"].bias.eq(1).all()


def test_safetensors_if_installed(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    torch.save(resnet_state(), file)  # the package is no requirement, so the test brings a stand-in
    package = types.ModuleType("safetensors.torch")
    package.load_file = lambda path: torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    state = bgbias.build_backbone("resnet18", str(file)).state_dict()
    assert torch.equal(state["conv1.weight"], resnet_state()["conv1.weight"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # so that the import fails
    with pytest.raises(UserError, match=f"--weights {file}: .*pip install safetensors"):
        bgbias.build_backbone("resnet18", str(file))


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"version https://git-lfs", "not a file of weights"), (b"", "not a file of weights"),
    (torch.nn.Linear(1, 1), "not a file of weights"), ([torch.zeros(1)], "no state dict"),
    ({"epoch": 3}, "no state dict"), ({"state_dict": {"epoch": 3}}, "no state dict")])
def test_error_a_file_without_weights(tmp_path, content, words):
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError, match=f"--weights {file}: .*{words}.*; ") as error:
        bgbias.build_backbone("smallconv", str(file))
    assert len(str(error.value).splitlines()) == 1


# ---- The size of the crops -----------------------------------------------------------------------


@pytest.mark.parametrize("name, dataset, size", [
    ("resnet18", "cub200", 224), ("inception_v3", "my_photos", 299), ("vit_b_16", "sop", 224),
    ("swin_v2_t", "cars196", 256), ("bninception", "cub200", 227), ("smallconv", "cub200", 227), ("a:net", "sop", 227),
    ("smallconv", "toy", 48), ("bninception", "toy", 48), ("resnet18", "toy", 48), ("alexnet", "toy", 63),
    ("vit_b_16", "toy", 224), ("a:net", "toy", 48)])
def test_size_without_a_flag(name, dataset, size):
    assert bgbias.default_image_size(name, dataset) == size
    for weights in ("none", "imagenet", "w.pth"):
        args = bgbias.parse_args(["--dataset", dataset, "--backbone", name, "--weights", weights])
        assert args.image_size == size and "image_size" not in args.settings
    args = bgbias.parse_args(["--dataset", dataset, "--backbone", name, "--image-size", "100"])
    assert args.image_size == 100 and args.settings["image_size"] == 100


@pytest.mark.parametrize("name", [name for name in bgbias.TORCHVISION if name.startswith("vit_")])
def test_a_vision_transformer_is_built_for_its_default_size(name):
    """torchvision builds vit_h_14 for 224 px, unless it loads its weights, which are for 518."""
    with torch.device("meta"):  # shapes without numbers
        network = bgbias.build_network(name, "none")
    assert network.image_size == bgbias.default_image_size(name, "cub200")


@pytest.mark.parametrize("name, size, right", [("alexnet", 32, 224), ("vit_b_32", 227, 224)])
def test_error_a_size_that_a_network_cannot_take(name, size, right):
    with pytest.raises(UserError, match=f"--image-size {size}: {name} .*--image-size {right}$"):
        Embedder(name, "none", size)


@pytest.mark.parametrize("name, size", [("inception_v3", 75), ("googlenet", 32)])
def test_auxiliary_classifiers_are_removed(name, size):
    """They fail below 299 and 224 px in training mode; and no parameter is left without a gradient."""
    model = Embedder(name, "none", size, 8).train()
    model(torch.randn(2, 3, size, size))[:, :4].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not [key for key in model.state_dict() if "aux" in key.lower()]
