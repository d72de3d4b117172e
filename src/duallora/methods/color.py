"""CoLoR: a LoRA and a head per task; an image's task is that of the nearest centre of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from duallora.adapters.lora import LowRank
from duallora.adapters.per_pass import PerPass
from duallora.backbones.backbone import Backbone
from duallora.classifiers.log_probabilities import within_tasks
from duallora.methods.base import Method
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import Batch, Encoding, Loader, TaskInfo
from duallora.runtime import parallel

# Added to the logs of tasks not chosen: nothing in a sum, and yet it leaves their classes apart in fp32.
_OTHER_TASK = -50.0


@dataclass(frozen=True)
class CoLoRConfig(AdapterFields, MethodConfig):
    """Fields of CoLoR.

    Attributes:
        rank: r, rank of each task's adapter.
        centres: k-means centres of a task, at most as many as it has different images; null is twice its
            classes (class-incremental), the paper's domain-incremental streams have 5.
    """

    positive: ClassVar[tuple[str, ...]] = ("centres",)

    centres: int | None = None
    projections: Literal["qv", "kv", "qkv"] = "qv"


class PerTask(nn.Module):
    """One low-rank pair a task, of which none, one or a different one per image acts.

    Args:
        dim: d.
        out: columns written.
        active: the task that acts in a pass; (B,) one for each image; None for none.
    """

    def __init__(self, dim: int, out: int, active: PerPass[int | Tensor]) -> None:
        super().__init__()
        self.dim, self.out, self.active = dim, out, active
        self.pairs = nn.ModuleList()

    def open(self, rank: int, generator: torch.Generator, device: torch.device) -> None:
        """Adds the pair of a new task and freezes the others."""
        self.requires_grad_(False)
        self.pairs.append(LowRank(self.dim, self.out, rank, generator).to(device))

    @torch.no_grad()
    def clear(self, task: int) -> None:
        """Sets the pair of a task to zero."""
        for parameter in self.pairs[task].parameters():
            parameter.zero_()

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, N, d) -> (B, N, out)."""
        active = self.active.get()
        if active is None:
            return None
        if isinstance(active, int):
            one: Tensor = self.pairs[active](x)
            return one
        a, b = (torch.stack([getattr(pair, name) for pair in self.pairs])[active] for name in "ab")
        return torch.bmm(torch.bmm(x, a), b)


class CoLoR(Method):
    """``y = x (W_0 + A_s B_s)``, s the task of the k-means centre nearest to the bare backbone's feature."""

    paper = "CoLoR, Wistuba et al. 2023 (2311.17601)"
    stores = "A and B per task, k-means centres, heads, class rows"
    leaves = "its share of the pooled covariance"
    reconstruction = True
    forward_passes = 2
    config: CoLoRConfig

    def __init__(
        self, backbone: Backbone, config: CoLoRConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        super().__init__(backbone, config, seed, context)
        self.active: PerPass[int | Tensor] = PerPass()
        self.attach(
            config.first_adapted_layer, config.projections, lambda dim, out: PerTask(dim, out, self.active)
        )
        self.updates = [update for update in self.adapters.values() if isinstance(update, PerTask)]
        none = torch.zeros(0, backbone.feature_dim, device=self.device)
        self._set_centres(none, torch.zeros(0, dtype=torch.long, device=self.device))

    @property
    def centres(self) -> Tensor:
        """Of all tasks (K, feature_dim)."""
        return self.learned.get_buffer("centres")

    @property
    def centre_task(self) -> Tensor:
        """The task of each centre (K,)."""
        return self.learned.get_buffer("centre_task")

    def _set_centres(self, centres: Tensor, task: Tensor) -> None:
        self.learned.register_buffer("centres", centres)
        self.learned.register_buffer("centre_task", task)

    def grow(self, task: int) -> None:
        """A pair in every adapted layer."""
        generator = self.generator(task, "adapter")
        for update in self.updates:
            update.open(self.config.rank, generator, self.device)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the current classes, with the current task's LoRA for every image."""
        return self.class_loss.cross_entropy(self.current_logits(batch.images), batch.labels)

    def current_logits(self, images: Tensor) -> Tensor:
        """Logits of the current classes, with the current task's LoRA for every image."""
        with self.context.autocast(), self.acting(len(self.heads.tasks) - 1):
            features = self.backbone(images).float()
        return self.heads.current(features)

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """Centres of the task's frozen features, then the rows, each image with the LoRA it would get."""
        with torch.no_grad():
            features = parallel.gather(torch.cat([self.query(batch.images) for batch in loader()]))
        wanted = 2 * len(task.classes) if self.config.centres is None else self.config.centres
        seed = int(torch.randint(2**31, (1,), generator=self.generator(task.index, "centres")))
        found = _centres(features, wanted, seed).to(self.device)
        of_task = self.centre_task.new_full((len(found),), task.index)
        self._set_centres(torch.cat([self.centres, found]), torch.cat([self.centre_task, of_task]))
        super().consolidate(task, loader)

    @torch.no_grad()
    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """With random centres."""
        counts = [2 * len(t.classes) if self.config.centres is None else self.config.centres for t in tasks]
        width, generator = self.backbone.feature_dim, self.generator(0, "measurement")
        task = torch.arange(len(tasks)).repeat_interleave(torch.tensor(counts))
        centres = torch.randn(sum(counts), width, generator=generator)
        self._set_centres(centres.to(self.device), task.to(self.device))

    def choose(self, images: Tensor) -> Tensor:
        """Task (n,) of the nearest centre, for images (n, 3, H, W)."""
        # Without products: these take another path for larger batches, and near a tie another task.
        features = self.query(images)
        far = torch.cdist(features, self.centres, compute_mode="donot_use_mm_for_euclid_dist")
        return self.centre_task[far.argmin(1)]

    def encode(self, images: Tensor) -> Encoding:
        """A forward pass, each image with the LoRA of its chosen task."""
        chosen = self.choose(images)
        with self.acting(chosen):
            return Encoding(self.backbone(images).float(), chosen=chosen)

    def extract(self, images: Tensor) -> Tensor:
        """Features (n, d), each image with the LoRA of its chosen task."""
        return self.encode(images).features

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Log-probabilities inside each task (n, R); rows of the tasks that were not chosen are far below."""
        row_task = self.rows.row_task
        rows = within_tasks(super().head_logits(encoding), row_task, len(self.heads.tasks))
        if encoding.chosen is None:
            return rows
        return rows + _OTHER_TASK * (row_task != encoding.chosen[:, None])

    def acting(self, tasks: int | Tensor) -> AbstractContextManager[int | Tensor]:
        """The LoRA of one task, or of one per image, acts in passes inside this context alone."""
        return self.active.holding(tasks)

    def forget(self, task: int, kept: Tensor) -> None:
        """With the last class of a task also its centres, so that its LoRA is never chosen, and that LoRA."""
        super().forget(task, kept)
        if bool(kept.any()):
            return
        mine = self.centre_task == task
        self._set_centres(self.centres[~mine], self.centre_task[~mine])
        for update in self.updates:
            update.clear(task)


def _centres(features: Tensor, count: int, seed: int) -> Tensor:
    """``count`` k-means centres (K, d) of features (n, d), but no more than there are different features."""
    from sklearn.cluster import KMeans  # here, because it takes a second that no other method needs
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    x = features.cpu().double()
    kmeans = KMeans(min(count, len(x.unique(dim=0))), n_init=10, random_state=seed)
    with threadpool_limits(limits=1):  # threads would add up a centre in the order in which they finish
        return torch.from_numpy(kmeans.fit(x.numpy()).cluster_centers_).float()
