"""Speed of ``duallora serve`` beside a bare timm model behind the same server; and a soak.

    python benchmarks/serve.py [--clients 1,8,64] [--seconds 10] [--repeats 3] [--tasks 10] [--size 256]
                               [--backbone embedded] [--device cpu] [--limit 0.9]
    python benchmarks/serve.py --soak 600

Every client sends one JPEG image after another over its own connection. The two servers are measured in turn,
``--repeats`` times each, so that a change of the machine's speed meets both; figures are medians over the
repeats. The bare model is the backbone with one linear layer, its answers have the same fields. Exit status 1
if the throughput of duallora is below ``--limit`` times that of the bare model at any number of clients.

What it prints is Markdown, as it stands in docs/serving.md.

``--soak`` asks good and bad things at once for so many seconds while generations of the model change, one in
three of them broken. Exit status 1 if a good request was lost, a bad one answered otherwise than it should,
a generation not taken, or memory grew by more than 5 % between the second and the last fifth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from duallora import ContinualLearner, DualLoRAConfig, load_backbone
from duallora.data.transforms import evaluation_transform
from duallora.outputs import Prediction
from http_load import Load, load, picture, post
from serve_soak import soaked

_PATIENCE = 300.0
"""Seconds after which a server gives a request up: queues of a slow machine are no fault of the server."""


class RandomImages(torch.utils.data.Dataset):
    """Two classes of random images for one task."""

    def __init__(self, task: int, size: int, images: int = 24) -> None:
        generator = torch.Generator().manual_seed(task)
        self.classes = [f"{task}-a", f"{task}-b"]
        self.targets = [i % 2 for i in range(images)]
        self.images = torch.rand(images, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.targets[index]


class BareModel:
    """A timm model with one linear layer, answering with the fields of a prediction."""

    def __init__(self, backbone: str, device: str, classes: int) -> None:
        frozen = load_backbone(backbone, pretrained=backbone == "embedded")
        self.preprocess = evaluation_transform(frozen.info)
        self.device = device
        self.model = frozen.model.to(device).eval()
        width = self.model.num_features
        self.head = torch.nn.Linear(width, classes).to(device)
        self.classes = [f"class {i}" for i in range(classes)]
        self.generation, self.about = "bare", {}

    @torch.no_grad()
    def answer(self, images: torch.Tensor, top: int) -> list[Prediction]:
        """Softmax of the linear layer."""
        features = self.model.forward_head(
            self.model.forward_features(images.to(self.device)), pre_logits=True
        )
        values, which = self.head(features).softmax(1).topk(min(top, len(self.classes)), 1)
        found = []
        for row, columns in zip(values.tolist(), which.tolist(), strict=True):
            best = tuple((self.classes[c], p) for c, p in zip(columns, row, strict=True))
            found.append(Prediction(None, best[0][0], best[0][1], "", 1.0, 0.0, best))
        return found


class Fixed:
    """A source whose model stays."""

    refused, taken, refusals = None, 0, 0

    def __init__(self, model: BareModel) -> None:
        self.current = model

    def start(self) -> None:
        """Nothing to look for."""

    def stop(self) -> None:
        """Nothing was begun."""


def serve_bare(args: argparse.Namespace) -> None:
    """The bare model behind the application of ``duallora serve``; prints the address as that does."""
    import uvicorn

    from duallora.serving.app import create_app
    from duallora.serving.limits import Limits
    from duallora.serving.listening import listening

    limits = Limits(timeout=_PATIENCE)
    with listening("127.0.0.1", 0) as listener:
        app = create_app(Fixed(BareModel(args.backbone, args.device, 2 * args.tasks)), limits, local=True)
        print(f"serving bare at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


def teach(folder: Path, args: argparse.Namespace, tasks: int) -> None:
    """A model of tasks of random images: speed depends on how many there are, not on what they show."""
    backbone = load_backbone(args.backbone, pretrained=args.backbone == "embedded")
    learner = ContinualLearner(backbone, DualLoRAConfig(epochs=1), device=args.device)
    for task in range(tasks):
        learner.learn(RandomImages(task, backbone.info.input_size[1]))
    learner.save(folder)


@contextmanager
def server(words: list[str]) -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if " at http" not in line:
            sys.exit(f"the server did not start: {line}")
        yield int(line.split("http://127.0.0.1:")[1].split()[0])
    finally:
        process.terminate()
        process.wait()


def duallora_words(folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of the real server."""
    entry = "from duallora.cli import main; raise SystemExit(main())"
    words = ["serve", str(folder), "--port", "0", "--device", args.device, "--timeout", f"{_PATIENCE:g}"]
    return [sys.executable, "-u", "-c", entry, *words]


def compare(args: argparse.Namespace, work: Path) -> int:
    """Measures both servers and prints the table."""
    teach(work / "model", args, args.tasks)
    bare = [sys.executable, __file__, "--bare", "--backbone", args.backbone, "--device", args.device]
    bare += ["--tasks", str(args.tasks)]
    requests = [post("/predict", picture(seed, args.size)) for seed in range(32)]
    found: dict[tuple[str, int], list[Load]] = {}
    with server(duallora_words(work / "model", args)) as own, server(bare) as other:
        ports = {"duallora": own, "bare": other}
        for port in ports.values():
            asyncio.run(load(port, max(args.clients), min(3.0, args.seconds), requests))  # warm-up
        for _ in range(args.repeats):
            for clients in args.clients:
                for name, port in ports.items():
                    result = asyncio.run(load(port, clients, args.seconds, requests))
                    if result.lost:
                        sys.exit(f"{name} lost {len(result.lost)} requests, the first: {result.lost[0]}")
                    found.setdefault((name, clients), []).append(result)
    print(
        f"{args.backbone}, {args.tasks} tasks, {args.size} x {args.size} JPEG, {args.device}, "
        f"{torch.get_num_threads()} threads, medians of {args.repeats} x {args.seconds:g} s\n"
    )
    print("| clients | server | images/s | p50 ms | p99 ms | of the bare model's |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    worst = float("inf")
    for clients in args.clients:
        speed = {name: _median(found[name, clients], "throughput") for name in ports}
        ratio = speed["duallora"] / speed["bare"]
        worst = min(worst, ratio)
        for name in ports:
            p50, p99 = (statistics.median(r.quantile(q) for r in found[name, clients]) for q in (0.5, 0.99))
            share = f"{ratio:.2f}" if name == "duallora" else ""
            print(f"| {clients} | {name} | {speed[name]:.1f} | {p50:.1f} | {p99:.1f} | {share} |")
    return 0 if worst >= args.limit else 1


def _median(loads: list[Load], name: str) -> float:
    return statistics.median(getattr(each, name) for each in loads)


def soak(args: argparse.Namespace, work: Path) -> int:
    """Starts the server and lets everything loose on it."""
    states = [work / "a", work / "b"]
    for state, tasks in zip(states, (2, 3), strict=True):
        teach(state, args, tasks)
    shutil.copytree(states[0], work / "model")
    with server(duallora_words(work / "model", args)) as port:
        return asyncio.run(soaked(port, work / "model", states, args))


def main() -> int:
    """Measures, prints and compares with the limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=0.9)
    parser.add_argument("--soak", type=float)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        serve_bare(args)
        return 0
    with tempfile.TemporaryDirectory() as work:
        return (compare if args.soak is None else soak)(args, Path(work))


if __name__ == "__main__":
    sys.exit(main())
