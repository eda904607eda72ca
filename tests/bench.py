"""How fast bgbias is, beside the plain way of doing the same. Run it by hand:

    python tests/bench.py                    # all parts, some minutes on two cores
    python tests/bench.py input network      # some of them

It prints a Markdown table: work, our time, the peer's, their ratio. Times are medians of several
rounds in which both take turns. Peers that are not installed are left out: pip install
pytorch-metric-learning faiss-cpu pretrainedmodels six munch.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import bgbias  # noqa: E402
import eval_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work, clock):
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def row(name, ours, peer_name, peer, *, wanted, faster=True, rounds=ROUNDS, clock=time.perf_counter):
    """Prints a line of the table. Ratio: how many times faster than the peer we are, or, if not
    `faster`, how many times its time we take."""
    ours(), peer()  # warm-up
    times = [(seconds(ours, clock), seconds(peer, clock)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*times))
    ratio = f"{b / a:.2f} times faster" if faster else f"{a / b:.2f} times its time"
    print(f"| {name} | {1000 * a:,.1f} ms | {peer_name}: {1000 * b:,.1f} ms | {ratio} | {wanted} |", flush=True)


def installed(module):
    """Whether a module is installed. If not, the table says so."""
    try:
        __import__(module)
    except ImportError:
        print(f"| ({module} is not installed) | | | | |")
        return False
    return True


def photos(folder, count, size, mode="RGB"):
    """Paths of files as detailed as photos, about two bits a pixel as JPEG; masks are plain discs."""
    paths = []
    for i in range(count):
        rng = np.random.default_rng([count, i])
        picture = Image.radial_gradient("L").resize(size)
        if mode == "RGB":
            detail = rng.integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
            picture = Image.fromarray(detail).resize(size, Image.BICUBIC)
        path = Path(folder, f"{mode}{i}.{'png' if mode == 'L' else 'jpg'}")
        picture.save(path, quality=85)
        paths.append(path)
    return paths


def bench_input():
    """CPU time of a training batch: 32 photos the size of Cars196's, with new backgrounds."""
    with tempfile.TemporaryDirectory() as folder:
        images, masks = photos(folder, 32, (700, 480)), photos(folder, 32, (700, 480), "L")
        Path(folder, "pool").mkdir()
        pool = photos(f"{folder}/pool", 20, (1280, 960))
        labels = np.repeat(np.arange(8), 4)
        batches = bgbias.TrainingBatches(
            bgbias.Photos(images, masks, 227), labels, bgbias.MPerClassSampler(labels, 4, 32), size=227, seed=(0,),
            bgaugment="pool", pool=bgbias.Photos(pool, None, 227))
        numbers = itertools.count()
        view = transforms.Compose([
            transforms.Resize(256), transforms.RandomResizedCrop(227, bgbias.CROP_SCALE, bgbias.CROP_RATIO),
            transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

        def plain():
            for n, (image, mask) in enumerate(zip(images, masks)):
                for path, mode in ((image, "RGB"), (mask, "L"), (pool[n % len(pool)], "RGB")):
                    view(Image.open(path).convert(mode))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker; CPU time counts threads that only wait, too
        row("input: CPU time of a batch of 32 with backgrounds, decoded once", lambda: batches[next(numbers)],
            "decoded, resized, cropped on every access", plain, wanted="20", clock=time.process_time)
        torch.set_num_threads(threads)


def bench_network():
    """A training step and a forward pass of BN-Inception on 32 photos of 227 px."""
    model = bgbias.Embedder("bninception", "none", 227).to(DEVICE)
    plain = bgbias.BNInception().to(DEVICE).eval()
    plain.load_state_dict(model.backbone.state_dict())
    peers = {"same network, contiguous": plain}
    if installed("pretrainedmodels"):
        import pretrainedmodels
        public = pretrainedmodels.bninception(pretrained=None).to(DEVICE).eval()
        peers["pretrainedmodels"] = torch.nn.Sequential(
            Features(public), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    x = torch.randn(32, 3, 227, 227, device=DEVICE)

    def step(network):
        network(x).sum().backward()

    def forward(network):
        with torch.no_grad():
            network(x)

    for name, peer in peers.items():
        row("BN-Inception, training step, 32 x 227 px", lambda: step(model), name, lambda p=peer: step(p),
            wanted="1.25", rounds=3)
        row("BN-Inception, forward, 32 x 227 px", lambda: forward(model), name, lambda p=peer: forward(p),
            wanted="1.4", rounds=3)


class Features(torch.nn.Module):
    """pretrainedmodels' network without its pooling and classifier."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.features(x)


def bench_metrics():
    """MAP@R, R-precision and Recall@K of up to 60,000 embeddings in classes of 2 to 8, like SOP's."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12_000), rng.integers(2, 9, 12_000))[:60_000]
    centres = torch.randn(12_000, 128)[torch.from_numpy(labels)]
    embeddings = torch.nn.functional.normalize(centres + torch.randn(len(labels), 128), dim=1).to(DEVICE)
    out = torch.empty(280, len(labels), device=DEVICE)

    def product():
        for queries in embeddings.split(len(out)):
            torch.mm(queries, embeddings.T, out=out[:len(queries)])

    for ks, wanted in (((1,), "2.2 at most"), ((1, 10, 100, 1000), "2.4 at most")):
        row(f"retrieval metrics, {len(labels):,} x 128, K up to {ks[-1]}",
            lambda ks=ks: bgbias.retrieval_metrics(embeddings, labels, ks), "bare matrix product", product,
            wanted=wanted, faster=False, rounds=3)
    if installed("pytorch_metric_learning") and installed("faiss"):
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        calculator = AccuracyCalculator(include=("mean_average_precision_at_r", "r_precision", "precision_at_1"),
                                        k="max_bin_count", device=torch.device("cpu"))
        tensor = torch.from_numpy(labels)
        row("retrieval metrics, K = 1", lambda: bgbias.retrieval_metrics(embeddings, labels, (1,)),
            "pytorch-metric-learning with faiss", lambda: calculator.get_accuracy(embeddings.cpu(), tensor),
            wanted="-", rounds=1)


def bench_training():
    """What a training asks of the system: processes, and waits for a GPU."""
    fork, forked = os.fork, []
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--data {folder}/data --runs {folder}/runs --iterations 2 --epochs 3 --device {DEVICE}"
        os.fork = lambda: forked.append(1) or fork()
        with open(os.devnull, "w") as quiet, warnings.catch_warnings():
            stdout, sys.stdout = sys.stdout, quiet
            bgbias.main([*flags.split(), "--workers", "2", "--bgaugment"])
            sys.stdout = stdout
        os.fork = fork
    print(f"| processes started by 3 epochs and the test, 2 workers | {len(forked)} | workers: 2 | "
          f"{len(forked) / 2:.0f} times | 3: training, validation, test |")
    if DEVICE == "cpu":
        print("| waits for the GPU in a training step | not run: no GPU | | | 0 |")
        return
    labels = torch.arange(8).repeat_interleave(4).cuda()
    weight = torch.nn.Parameter(torch.randn(8, 128).cuda())
    for loss, function in bgbias.LOSSES.items():
        embeddings = torch.nn.functional.normalize(torch.randn(32, 128).cuda(), dim=1).requires_grad_()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            function(embeddings, labels, weight, **bgbias.HPARAMS["cars196"][loss]).backward()
        torch.cuda.set_sync_debug_mode("default")
        print(f"| waits for the GPU in a step of {loss} | {len(waits)} | | | 0 |")


def bench_validation():
    """An epoch's validation beside its own forward passes: BN-Inception, 96 photos of 227 px."""
    with tempfile.TemporaryDirectory() as folder:
        images, masks = photos(folder, 96, (340, 256)), photos(folder, 96, (340, 256), "L")
        labels = np.repeat(np.arange(24), 4)
        batches = bgbias.EvaluationBatches(bgbias.Photos(images, masks, 227), labels, size=227, seed=(0,), draws=1,
                                           pool=bgbias.Photos(images, None, 227))
        model = bgbias.Embedder("bninception", "none", 227).to(DEVICE).eval()
        args = types.SimpleNamespace(workers=None, device=DEVICE)
        bgbias.choose_device(args)
        ready = [torch.randn(len(batches[n][0]), 3, 227, 227, device=DEVICE) for n in range(3) for _ in range(2)]

        def validate():
            embedded = bgbias.embed(model, bgbias.load_batches(batches, args), bgbias.replaced_views)
            for condition in ("clean", "replaced"):
                bgbias.retrieval_metrics(embedded[condition][0], labels, (1,))

        def forwards():
            with torch.no_grad():
                for x in ready:
                    model(x)

        row(f"validation of 96 photos, clean and replaced, {args.workers} workers", validate,
            "its forward passes", forwards, wanted="1.1 at most", faster=False, rounds=3)


def bench_epoch():
    """The second epoch of a run with BGAugment: BN-Inception, 300 photos of 227 px, 96 of them for validation.
    Beside it, the same steps and forward passes on data that is already on the device."""
    steps = 100 if DEVICE == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        images, masks = photos(folder, 300, (340, 256)), photos(folder, 300, (340, 256), "L")
        Path(folder, "val").mkdir()
        photos(f"{folder}/val", 20, (340, 256))
        args = bgbias.parse_args(["--dataset", folder, "--bgaugment", "--backgrounds", folder, "--device", DEVICE,
                                  "--epochs", "2", "--iterations", str(steps), "--weights", "none"])
        bgbias.choose_device(args)
        labels = np.repeat(np.arange(75), 4)
        splits = {"train": bgbias.Split(images[96:], masks[96:], labels[96:]),
                  "val": bgbias.Split(images[:96], masks[:96], labels[:96]),
                  "test": bgbias.Split(images[:96], masks[:96], labels[:96])}
        state = bgbias.State(args, 51, "none")
        bgbias.train(args, splits, state, Path(folder, "run"))
    x, y = torch.randn(32, 3, 227, 227, device=DEVICE), torch.arange(8, device=DEVICE).repeat_interleave(4)
    network = state.network

    def bare():
        network.train()
        for _ in range(steps):
            state.optimiser.zero_grad()
            bgbias.contrastive(network(x), y, **args.hparams).backward()
            state.optimiser.step()
        with torch.no_grad():
            for _ in range(2 * 3):  # 96 photos, clean and replaced
                network(x)

    bare()  # warm-up
    ours, peer = state.history[-1]["seconds"], seconds(bare, time.perf_counter)
    print(f"| an epoch: {steps} steps, 96 validation photos, {args.workers} workers | {1000 * ours:,.0f} ms | its "
          f"steps and forward passes: {1000 * peer:,.0f} ms | {ours / peer:.2f} times its time | 1.2 at most |")


def bench_attention():
    """Attention maps of toy images beside the bare gradients of as many copies."""
    with tempfile.TemporaryDirectory() as folder:
        split = bgbias.load_splits("toy", folder)["test"]
        rows = list(range(400))
        args = bgbias.parse_args(["--data", folder, "--device", DEVICE])
        bgbias.choose_device(args)
        run = eval_attention.Run(folder=None, args=args, split=split, tested="", data="")
        model = bgbias.Embedder("smallconv", "none", 48).to(DEVICE).eval().requires_grad_(requires_grad=False)
        pixels = eval_attention.BATCH_PIXELS["gpu" if DEVICE == "cuda" else "cpu"]
        batch = pixels // (eval_attention.COPIES * 48**2)

        def bare():
            for start in range(0, len(rows), batch):
                count = len(rows[start:start + batch]) * eval_attention.COPIES
                x = torch.randn(count, 3, 48, 48, device=DEVICE, requires_grad=True)
                torch.autograd.grad(model(x).sum(), x)

        row(f"attention of 400 toy images, {args.workers} workers",
            lambda: list(eval_attention.attention_maps(run, rows, model)),
            "bare gradients of the copies, their noise drawn", bare, wanted="1.18 at most", faster=False, rounds=3)


def bench_startup():
    """From the shell to the help text."""
    ours = [sys.executable, str(ROOT / "bgbias.py"), "--help"]
    peer = [sys.executable, "-c", "import torch, torchvision"]
    row("bgbias.py --help", lambda: subprocess.run(ours, stdout=subprocess.DEVNULL, check=True),
        "import torch, torchvision", lambda: subprocess.run(peer, check=True), wanted="0.5 s more at most",
        faster=False)


PARTS = {"input": bench_input, "network": bench_network, "metrics": bench_metrics, "training": bench_training,
         "validation": bench_validation, "epoch": bench_epoch, "attention": bench_attention,
         "startup": bench_startup}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: no part; there are {', '.join(PARTS)}")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()})"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}\n")
    print("| work | ours | peer | ratio | to reach |\n|---|---|---|---|---|")
    for part in parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
