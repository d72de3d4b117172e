"""Inference cost of a learner with many tasks against the frozen backbone: same batch and machine, medians.

    python benchmarks/inference.py [--tasks 10] [--batch 64] [--repeats 20] [--backbone embedded]
                                   [--device cpu] [--limit 1.25]

Random images serve as tasks: speed depends on how many tasks there are, not on what they show. The two are
timed in turn, so that a change of the machine's speed meets both. Exit status 1 if the ratio of the medians
is above ``--limit``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from duallora import ContinualLearner, DualLoRAConfig, load_backbone


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


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> int:
    """Measures, prints and compares with the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=1.25)
    args = parser.parse_args()

    frozen = load_backbone(args.backbone, pretrained=args.backbone == "embedded")
    learner = ContinualLearner(
        load_backbone(args.backbone, pretrained=args.backbone == "embedded"),
        DualLoRAConfig(rank=10, residual="own", epochs=1),
        device=args.device,
    )
    size = frozen.info.input_size[1]
    for task in range(args.tasks):
        learner.learn(RandomImages(task, size))
    frozen.to(learner.device)
    batch = torch.rand(args.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(
        learner.device
    )

    with torch.no_grad():
        calls = {"frozen": lambda: frozen(batch), "learner": lambda: learner.method.logits(batch)}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(args.repeats + 3):
            for name, call in calls.items():
                elapsed = seconds(call, learner.device)
                if repeat >= 3:  # warm-up
                    times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["learner"] / median["frozen"]
    threads = torch.get_num_threads()
    print(
        f"{args.backbone}, {args.tasks} tasks, batch {args.batch}, {learner.device}, {threads} threads, "
        f"median of {args.repeats}"
    )
    print(f"frozen backbone  {1e3 * median['frozen']:8.1f} ms  {args.batch / median['frozen']:8.0f} images/s")
    print(
        f"learner          {1e3 * median['learner']:8.1f} ms  {args.batch / median['learner']:8.0f} images/s"
    )
    print(f"ratio            {ratio:8.3f}  (limit {args.limit})")
    return 0 if ratio <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
