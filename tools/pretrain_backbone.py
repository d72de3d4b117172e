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
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from docstring_parser import parse
from lightning_fabric import Fabric
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers import HybridEmbed  # type: ignore[attr-defined]
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.nn import functional as F

from duallora.atomic import exclusive, remove_leftovers, write_atomic
from duallora.errors import DualLoRAError
from duallora.progress import Progress
from duallora.streams.folder import FolderDataset
from duallora.train import make_fabric

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)
CROP_SCALE = (0.35, 1.0)
CROP_RATIO = 4 / 3  # of the longer side to the shorter one, at most
COLOUR = (0.7, 1.3)  # factors of saturation and of brightness
WARM_UP = 0.05  # share of the steps
CUTMIX_UNTIL = 0.85  # share of the steps; the rest sees whole images
CLIP = 1.0  # norm of the gradient
STRIDE = 8  # pixels a token, each way
SAVE_SECONDS = 120.0
EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the images.

    Attributes:
        depth: number of blocks.
        width: of the tokens; the stem's channels are 1/6, 1/3, 2/3 and all of it.
        heads: attention heads a block.
        images: training images in each part of the schedule, separated by commas.
        sizes: image side in pixels in each part; the last is what the model is built for.
        batch: images a step.
        learning_rate: its peak.
        weight_decay: on matrices and convolution kernels only.
        label_smoothing: share of the target spread over all classes.
        cutmix: share of the batches that are mixed; none in the last 15 % of the steps.
        drop_path: in the last block; it grows linearly from zero in the first.
        ema: decay per step of the exponential average that is saved as the weights.
        seed: of weights, order and draws.
    """

    depth: int = 6
    width: int = 192
    heads: int = 3
    images: tuple[int, ...] = (1_020_000, 500_000)
    sizes: tuple[int, ...] = (48, 64)
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    cutmix: float = 0.25
    drop_path: float = 0.05
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.depth, self.heads, self.batch, self.learning_rate, *self.images, *self.sizes) <= 0:
            raise DualLoRAError("depth, heads, batch, learning rate, images and sizes have to be above zero.")
        if len(self.images) != len(self.sizes):
            raise DualLoRAError("--images and --sizes need one number for each part of the schedule.")
        if self.side < max(self.sizes) or any(size % STRIDE for size in self.sizes):
            raise DualLoRAError(f"--sizes have to be multiples of {STRIDE}, the last one the largest.")
        if self.width < 6 or self.width % self.heads:
            raise DualLoRAError("--width has to be 6 or more and a multiple of --heads.")
        if not all(0 <= share < 1 for share in (self.label_smoothing, self.drop_path, self.ema)):
            raise DualLoRAError("--label-smoothing, --drop-path and --ema have to be 0 or more and below 1.")
        if not 0 <= self.cutmix <= 1 or self.weight_decay < 0:
            raise DualLoRAError("--cutmix has to lie in [0, 1], and --weight-decay cannot be negative.")

    @property
    def side(self) -> int:
        """Image side that the model is built for."""
        return self.sizes[-1]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the stem's convolutions."""
        return self.width // 6, self.width // 3, 2 * self.width // 3, self.width

    @property
    def steps(self) -> int:
        """In the whole schedule."""
        return sum(self._parts)

    @property
    def _parts(self) -> list[int]:
        return [max(1, round(images / self.batch)) for images in self.images]

    def size_at(self, step: int) -> int:
        """Image side of a step."""
        for size, steps in zip(self.sizes, self._parts, strict=True):
            if step < steps:
                return size
            step -= steps
        return self.side

    def rate_at(self, step: int) -> float:
        """Learning rate: a linear warm-up, then one cosine to zero."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / (self.steps - warm_up)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


def build(recipe: Recipe, classes: int) -> VisionTransformer:
    """The embedded architecture with a head; smaller images get resampled position embeddings."""
    stem = ConvStem(depth=4, channels=recipe.channels, stride=(2, 2, 1, 2), act_layer=nn.GELU)
    stem.num_features = recipe.width  # type: ignore[assignment]  # HybridEmbed reads the stem's width there
    grid = recipe.side // STRIDE
    return VisionTransformer(
        img_size=recipe.side,
        patch_size=1,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        num_classes=classes,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False, feature_size=(grid, grid)),
        drop_path_rate=recipe.drop_path,
        dynamic_img_size=True,
    )


def keyed(*key: object) -> Random:
    """A generator for one purpose; text is hashed, so that neighbouring keys give unrelated draws."""
    return Random("/".join(map(str, key)))


def samples(recipe: Recipe, step: int, count: int) -> list[tuple[int, int]]:
    """Epoch and index of each image of a step: every epoch shows all images once, in its own order."""
    places = range(step * recipe.batch, (step + 1) * recipe.batch)
    orders = {}
    for epoch in {place // count for place in places}:
        generator = torch.Generator().manual_seed(keyed(recipe.seed, "order", epoch).getrandbits(63))
        orders[epoch] = torch.randperm(count, generator=generator)
    return [(place // count, int(orders[place // count][place % count])) for place in places]


def view_draws(seed: int, epoch: int, index: int) -> tuple[float, ...]:
    """Left, top, width, height of a crop in [0, 1]; -1 to mirror it, else 1; saturation; brightness."""
    random = keyed(seed, "view", epoch, index)
    width = height = 1.0
    for _ in range(10):
        area, skew = random.uniform(*CROP_SCALE), CROP_RATIO ** random.uniform(-1, 1)
        if max(area * skew, area / skew) <= 1:
            width, height = math.sqrt(area * skew), math.sqrt(area / skew)
            break
    left, top = random.random() * (1 - width), random.random() * (1 - height)
    mirror = random.choice((-1.0, 1.0))
    return left, top, width, height, mirror, random.uniform(*COLOUR), random.uniform(*COLOUR)


def views(pixels: Tensor, draws: Tensor, size: int) -> Tensor:
    """Crops, mirrors and recolours a batch where it lies: (B, 3, H, W) bytes -> (B, 3, size, size)."""
    left, top, width, height, mirror, saturation, brightness = draws.unbind(1)
    none = torch.zeros_like(left)
    # Output coordinates in [-1, 1] to those of the input.
    across = torch.stack([mirror * width, none, 2 * left + width - 1], 1)
    down = torch.stack([none, height, 2 * top + height - 1], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [len(pixels), 3, size, size], align_corners=False)
    cut = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    grey = (cut * cut.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
    coloured = (grey + saturation.view(-1, 1, 1, 1) * (cut - grey)) * brightness.view(-1, 1, 1, 1)
    return normalised(coloured.clamp(0, 1))


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] as the model gets them."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def cutmix(images: Tensor, random: Random) -> tuple[Tensor, float]:
    """Pastes one random box of each image's predecessor in the batch; also the share that is left."""
    side = images.shape[-1]
    half = side * math.sqrt(1 - random.random()) / 2
    centres = [side * random.random() for _ in range(2)]
    (top, bottom), (left, right) = (
        (max(0, round(centre - half)), min(side, round(centre + half))) for centre in centres
    )
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / side**2


def soft_targets(labels: Tensor, classes: int, smoothing: float, share: float = 1.0) -> Tensor:
    """Smoothed targets (B, classes) of a batch of which ``share`` was left by :func:`cutmix`."""
    hot = F.one_hot(labels, classes).float()
    mixed = share * hot + (1 - share) * hot.roll(1, 0)
    return (1 - smoothing) * mixed + smoothing / classes


def parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices and kernels; none on biases, norms, position embedding and class token."""
    exempt = model.no_weight_decay()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0} for decays, group in groups.items()
    ]


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


def decode(data: FolderDataset, side: int, progress: Progress, label: str) -> tuple[Tensor, Tensor]:
    """All images as bytes (N, 3, side, side), resized and cut to the middle where they differ, and labels."""
    pixels = torch.empty(len(data), 3, side, side, dtype=torch.uint8)
    for place in progress.track(range(len(data)), len(data), label):
        image, _ = data[place]
        if image.size != (side, side):
            image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
        pixels[place] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels, torch.tensor(data.targets)


def open_data(folder: Path) -> tuple[FolderDataset, FolderDataset]:
    """Training and validation images.

    Raises:
        DualLoRAError: a folder is missing or has no images, or they differ in their classes.
    """
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DualLoRAError(
                f"{folder} has no folder {part}/; DATA holds train/ and val/ with the classes."
            )
    training, validation = FolderDataset(folder / "train"), FolderDataset(folder / "val")
    if training.classes != validation.classes:
        raise DualLoRAError(f"train/ and val/ in {folder} hold different classes; give both the same.")
    return training, validation


def rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are distributed: fp16, but for the batch norm's, whose variances need the range."""
    return {
        name: tensor.half() if tensor.is_floating_point() and ".bn." not in name else tensor
        for name, tensor in weights.items()
    }


def write_backbone(path: Path, weights: Mapping[str, Tensor], recipe: Recipe, classes: Sequence[str]) -> None:
    """Writes weights in timm's keys, with the metadata that ``embedded`` needs."""
    grid = recipe.side // STRIDE
    architecture = (
        f"timm VisionTransformer(img_size={recipe.side}, patch_size=1, embed_dim={recipe.width}, "
        f"depth={recipe.depth}, num_heads={recipe.heads}, num_classes={len(classes)}, embed_layer=partial("
        f"HybridEmbed, backbone=stem, proj=False, feature_size=({grid}, {grid}))); stem = timm ConvStem("
        f"depth=4, channels={recipe.channels}, stride=(2, 2, 1, 2), kernel_size=3, act_layer=GELU), "
        f"stem.num_features = {recipe.width}"
    )
    metadata = {
        "architecture": architecture,
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "head_classes": ",".join(classes),
    }
    write_atomic(path, in_order(save(dict(weights), metadata)))


def in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: as saved, their order changes the sha256 from call to call."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


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
    fabric = make_fabric(device)
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
