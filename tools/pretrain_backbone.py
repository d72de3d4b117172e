"""Pre-trains the embedded backbone from scratch: the recipe of its model card as one command.

    python tools/pretrain_backbone.py DATA --out DIR --minutes 8

DATA holds train/<class>/ and val/<class>/ with images. The state is saved in DIR every two minutes and when
the time is up; the same command goes on from there until the schedule is complete. Then it writes
DIR/backbone.safetensors and prints its top-1 on val/. On the CPU in fp32, pieces give the same weights as one
long run, bit for bit: every draw is keyed by the seed and by epoch and image (crop, flip, colour) or by the
step (cutmix, drop path). Where the device has bf16, the model runs under bf16 autocast.

The model card leaves these open, so they are choices made here: saturation and brightness between .7 and
1.3, width to height of a crop between 3/4 and 4/3, bilinear crops, the share of cutmix uniform in [0, 1), no
weight decay on position embedding and class token, batches that run on across the end of an epoch.

`duallora` loads the file as `embedded` when depth, width and heads are the defaults, see docs/backbones.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from docstring_parser import parse
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.errors import DualLoRAError
from duallora.runtime.compute import Machine
from duallora.runtime.progress import Progress
from duallora.storage.atomic import exclusive, remove_leftovers, write_atomic
from pretrain_images import (
    cutmix,
    decode,
    keyed,
    normalised,
    open_data,
    samples,
    soft_targets,
    view_draws,
    views,
)
from pretrain_recipe import Recipe, build, parameter_groups, rounded, write_backbone

CUTMIX_UNTIL = 0.85  # share of the steps; the rest sees whole images
CLIP = 1.0  # norm of the gradient
SAVE_SECONDS = 120.0
EVALUATION_BATCH = 250


class Training:
    """Model, optimizer, average and the number of steps done.

    Args:
        recipe: what to do.
        pixels: all training images, uint8 (N, 3, H, W), on the device.
        labels: (N,), on the device.
        fabric: the device and its autocast.
    """

    def __init__(self, recipe: Recipe, pixels: Tensor, labels: Tensor, fabric: Fabric) -> None:
        self.recipe, self.pixels, self.labels, self.fabric = recipe, pixels, labels, fabric
        self.classes = int(labels.max()) + 1
        self.done = 0
        torch.manual_seed(keyed(recipe.seed, "weights").getrandbits(63))
        self.model = build(recipe, self.classes).to(pixels.device).train()
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.weights: dict[str, Tensor] = self.model.state_dict()  # the model's own tensors, not copies
        self.average = {name: tensor.clone() for name, tensor in self.weights.items()}

    def step(self) -> Tensor:
        """One batch; returns its loss, still on the device."""
        images, targets = self.batch()
        # Drop path draws from the global generator.
        torch.manual_seed(keyed(self.recipe.seed, "drop path", self.done).getrandbits(63))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.done)
        with self.fabric.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self._follow()
        self.done += 1
        return loss.detach()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Augmented images and soft targets of the next step."""
        recipe, device = self.recipe, self.pixels.device
        chosen = samples(recipe, self.done, len(self.pixels))
        indices = torch.tensor([index for _, index in chosen], device=device)
        draws = torch.tensor([view_draws(recipe.seed, *sample) for sample in chosen], device=device)
        images, share = views(self.pixels[indices], draws, recipe.size_at(self.done)), 1.0
        random = keyed(recipe.seed, "cutmix", self.done)
        if random.random() < recipe.cutmix and self.done < CUTMIX_UNTIL * recipe.steps:
            images, share = cutmix(images, random)
        return images, soft_targets(self.labels[indices], self.classes, recipe.label_smoothing, share)

    @torch.no_grad()
    def _follow(self) -> None:
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(self.weights[name], 1 - self.recipe.ema)
            else:
                average.copy_(self.weights[name])

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, and the average."""
        found = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        found |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return found

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Goes back to what :meth:`state` gave after ``done`` steps."""
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(tensors[f"weights.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        for name, parameter in self.model.named_parameters():
            moments = {key: tensors[f"{key}.{name}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}
        self.done = done


def save_state(path: Path, training: Training, made_from: Mapping[str, Any]) -> None:
    """Writes tensors and position as one file, so that they cannot disagree."""
    progress = json.dumps({"done": training.done, "made_from": made_from})
    write_atomic(path, save(training.state(), {"progress": progress}))


def resume(path: Path, training: Training, made_from: Mapping[str, Any]) -> None:
    """Restores the state file, if there is one.

    Raises:
        DualLoRAError: it is damaged, or belongs to another recipe or other images.
    """
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as opened:
            saved = json.loads(opened.metadata()["progress"])
            done, found = saved["done"], saved["made_from"]
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not iterable)
    except (SafetensorError, KeyError, TypeError) as error:
        raise DualLoRAError(f"{path} is no state of this script; delete it or take another --out.") from error
    wanted = json.loads(json.dumps(made_from))
    differing = [name for name in wanted if wanted[name] != found.get(name)]
    if differing:
        raise DualLoRAError(
            f"{path.parent} holds a training that differs in {', '.join(differing)}; repeat its options and "
            "images to go on, or take another --out."
        )
    training.restore(tensors, done)


def train(
    training: Training, save_now: Callable[[], None], progress: Progress, until: float = math.inf
) -> None:
    """Runs to the end of the schedule or, after at least one step, until the clock says ``until``."""
    steps = training.recipe.steps
    losses: list[Tensor] = []
    said = time.monotonic()
    for _ in progress.track(range(training.done, steps), steps - training.done, "training"):
        losses.append(training.step())
        now = time.monotonic()
        if now < until and now - said < SAVE_SECONDS and training.done < steps:
            continue
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise DualLoRAError(f"the loss is {loss} by step {training.done}; lower --learning-rate.")
        save_now()
        speed = len(losses) * training.recipe.batch / (time.monotonic() - said)
        size = training.recipe.size_at(training.done - 1)
        progress.line(
            f"step {training.done} of {steps}: loss {loss:.3f}, {size} px, {speed:.0f} images a second"
        )
        losses, said = [], time.monotonic()
        if now >= until:
            return


@torch.no_grad()
def top1(model: nn.Module, pixels: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of the images whose class gets the largest logit, in fp32."""
    model.eval()
    right = 0
    for images, wanted in zip(pixels.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        logits = model(normalised(images.to(device).float() / 255))
        right += int((logits.argmax(1).cpu() == wanted).sum())
    return right / len(labels)


def pretrain(data: Path, out: Path, recipe: Recipe, device: str, until: float, progress: Progress) -> None:
    """Goes on with the training in ``out``; at the end of the schedule writes and measures the weights."""
    fabric = Machine.of(device).fabric
    images, held_out = open_data(data)
    identity = hashlib.sha256("\n".join(images.identifiers).encode()).hexdigest()
    made_from = {**asdict(recipe), "images in DATA": identity}
    with exclusive(out):
        remove_leftovers(out)
        pixels, labels = decode(images, recipe.side, progress, "reading train/")
        training = Training(recipe, pixels.to(fabric.device), labels.to(fabric.device), fabric)
        state = out / "state.safetensors"
        resume(state, training, made_from)
        train(training, partial(save_state, state, training, made_from), progress, until)
        if training.done < recipe.steps:
            print(f"stopped at step {training.done} of {recipe.steps}; run the same command again to go on")
            return
        weights = rounded(training.average)
        write_backbone(out / "backbone.safetensors", weights, recipe, images.classes)
    training.model.load_state_dict(weights)
    accuracy = top1(training.model, *decode(held_out, recipe.side, progress, "reading val/"), fabric.device)
    print(f"{out / 'backbone.safetensors'}: {100 * accuracy:.1f} % top-1 on {data / 'val'}")


def numbers(text: str) -> tuple[int, ...]:
    """``"1.02e6,0.5e6"`` -> (1020000, 500000)."""
    return tuple(int(float(part)) for part in text.split(","))


def command_line() -> argparse.ArgumentParser:
    """The options of the recipe come from its fields and their descriptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="state and finished weights")
    described = {entry.arg_name: entry.description for entry in parse(Recipe.__doc__ or "").params}
    for field in fields(Recipe):
        default, several = field.default, isinstance(field.default, tuple)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = (described[field.name] or "").rstrip(".").replace("%", "%%")
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=numbers if several else type(default),
            default=default,
            metavar="N,..." if several else "N",
            help=f"{text} (default: {shown})",
        )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="stop after so many")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; what the user can put right is one sentence."""
    started = time.monotonic()
    given = vars(command_line().parse_args(words))
    try:
        recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
        until = started + 60 * given["minutes"]
        pretrain(given["data"], given["out"], recipe, given["device"], until, Progress())
    except DualLoRAError as error:
        print(f"pretrain_backbone: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pretrain_backbone: interrupted; the same command goes on from the last save.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
