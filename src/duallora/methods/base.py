"""What a method is: hooks around one task, called in the order of docs/add-a-method.md, and readouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from duallora.adapters.lora import Beside, LowRank, put_beside
from duallora.adapters.per_pass import PerPass
from duallora.adapters.wrapped_mlp import BesideMLP, put_beside_mlp
from duallora.adapters.wrapped_qkv import adapted_layers
from duallora.backbones.backbone import Backbone
from duallora.classifiers.calibration import calibrate
from duallora.classifiers.class_statistics import ByRow, ClassMoments, ClassStatistics
from duallora.classifiers.heads import Heads
from duallora.errors import DualLoRAError
from duallora.methods.class_weights import ClassLoss
from duallora.methods.config import AdapterFields, MethodConfig
from duallora.methods.context import ALONE, MethodContext
from duallora.methods.interface import AdaptedPlace, Batch, BatchOutputs, Encoding, Loader, TaskInfo
from duallora.methods.leader import Leader
from duallora.methods.random_streams import RandomStream, generator
from duallora.runtime import parallel
from duallora.storage.learned import Learned

LEADER_RATE = 5.0
"""Learning rate of a head that leads a training over that of heads that begin as their rows' classifiers."""


class Method:
    """Heads and class rows on the final feature of a frozen backbone; subclasses add adapters to it.

    Args:
        backbone: frozen; already on its device.
        config: the method's fields.
        seed: every draw is keyed by it and the task.
        context: precision and caches.

    Attributes:
        paper: where the method comes from.
        stores: what it keeps of a task, in a few words.
        leaves: what :meth:`forget` leaves of a forgotten task, in a few words.
        reconstruction: whether the paper's code or text was not to be had, so that parts are a guess.
        all_at_once: whether it has to see all tasks' images together.
        readout: which readout is the method's own answer.
        learned: all that is saved, as one module; subclasses add what they keep beside heads, rows and
            adapters.
        by_row: what is kept of every row beside the class rows, see :meth:`keep_by_row`.
        adapters: modules that are trained and saved with the method, with those of their parameters that
            take no gradients; by layer as a string where :meth:`attach` put them.
        beside: the wrapped projections by layer, where :meth:`attach` put updates.
        beside_mlp: the wrapped mlps by layer, where :meth:`attach_mlp` put updates.
        forward_passes: backbone passes per image at inference, of a model with one task.
        more_passes: in a few words, how they grow with the tasks; empty where they do not.
        imprinted: whether a head reads all that class rows read and starts as their classifier.
        leader: the heads that lead a task's training where it is not the task's own, see ``head_starts.py``.
        class_loss: the mean over images in a loss, with the weights of their classes.
        computing: whether the pass leaves the cache alone.
        starts: imprinted heads as they began; empty for other methods and for models saved without.
        orthogonal_norm: norm of the latest task's (merged) update over that of ``W_0``, mean over adapted
            layers; None without, or where an update is no matrix.
        residual_norm: the same for the gated update.
    """

    paper: ClassVar[str] = ""
    stores: ClassVar[str] = "heads, class rows"
    leaves: ClassVar[str] = "its share of the pooled covariance and what it trained of the adapters"
    reconstruction: ClassVar[bool] = False
    all_at_once: ClassVar[bool] = False
    readout: ClassVar[Literal["heads", "calibrated"]] = "heads"
    forward_passes: ClassVar[int] = 1
    more_passes: ClassVar[str] = ""
    imprinted: ClassVar[bool] = False

    def __init__(
        self, backbone: Backbone, config: MethodConfig, seed: int, context: MethodContext = ALONE
    ) -> None:
        if backbone.taken:
            raise DualLoRAError(
                "this backbone belongs to another learner; load it again with load_backbone()."
            )
        backbone.taken = True
        self.backbone, self.config, self.seed, self.context = backbone, config, seed, context
        self.device = next(backbone.parameters()).device
        width = backbone.row_dim if self.imprinted else backbone.feature_dim
        self.heads = Heads(width, self.device)
        self.starts = Heads(width, self.device)
        self.rows = ClassStatistics(backbone.row_dim, self.device)
        self.leader: Leader | None = None
        self.class_loss = ClassLoss()
        self.adapters = nn.ModuleDict()
        self.learned = Learned(self.device)
        for name in ("heads", "starts", "rows", "adapters"):
            self.learned.add_module(name, getattr(self, name))
        self.beside: dict[int, Beside] = {}
        self.beside_mlp: dict[int, BesideMLP] = {}
        self._before: Sequence[Tensor | None] = []
        self.by_row: list[ByRow] = []
        self.computing: PerPass[bool] = PerPass()
        self.orthogonal_norm: float | None = None
        self.residual_norm: float | None = None

    @property
    def realigned(self) -> bool:
        """Whether heads answer with what training changed, on top of the class rows as they are now."""
        return 0 < len(self.heads.tasks) == len(self.starts.tasks)

    @property
    def passes(self) -> int:
        """Backbone passes per image at inference, now."""
        return self.forward_passes

    @property
    def answer(self) -> Literal["heads", "calibrated"]:
        """Which readout predictions are read from; plain heads when nothing is calibrated."""
        return "heads" if self.config.calibration == "none" else self.readout

    def prepare(self, task: TaskInfo, loader: Loader) -> None:
        """Before training: opens the task's head and what :meth:`grow` adds."""
        self.heads.open(len(task.classes), self.generator(task.index))
        self._before = list(map(Beside.delta_weight, self.beside.values()))
        for wrapper in self.beside.values():
            wrapper.separate()
        self.grow(task.index)

    def grow(self, task: int) -> None:
        """Creates the parameters of a task in ``adapters`` and freezes those that it leaves alone.

        Called for task 0, 1, ... in turn, before training and when a state is loaded; nothing but ``task``,
        the configuration and the seed may decide about names and shapes.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of the current task with their learning rates, as an optimiser takes them.

        The head at ``head_learning_rate``, what takes gradients in ``adapters`` at ``learning_rate``; an
        empty list: nothing is trained.
        """
        rate = self.config.head_learning_rate * (1 if self.leader is None else LEADER_RATE)
        head = self.heads.tasks[-1] if self.leader is None else self.leader
        groups = [{"params": list(head.parameters()), "lr": rate}]
        trained = [p for p in self.adapters.parameters() if p.requires_grad]
        if trained:
            groups.append({"params": trained, "lr": vars(self.config)["learning_rate"]})
        return groups

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy over the classes of the current task only, by what leads its training."""
        features = self.batch_features(batch)
        if self.leader is not None:
            return self.leader.loss(features, batch.labels, self.class_loss)
        return self.class_loss.cross_entropy(self.heads.current(features), batch.labels)

    def batch_features(self, batch: Batch) -> Tensor:
        """Features (n, row_dim), fp32, of images of the current task while it trains."""
        return self.features(batch.images)

    def current_logits(self, images: Tensor) -> Tensor:
        """Logits (n, |Y_t|) of the classes of the task that is trained, by what leads it."""
        return (self.leader or self.heads).current(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Features (n, row_dim), fp32, as passes and training see them; the final feature comes first."""
        with self.context.autocast():
            return self.encode(images).features

    def encode(self, images: Tensor) -> Encoding:
        """One forward pass over images (n, 3, H, W), with all that :meth:`logits` needs of it."""
        return Encoding(self.extract(images).float())

    def extract(self, images: Tensor) -> Tensor:
        """Features (n, row_dim) of the adapted model for images (n, 3, H, W), see :class:`.Backbone`."""
        return self.backbone(images)  # type: ignore[no-any-return]

    def frozen_features(self, images: Tensor) -> Tensor:
        """Features (n, row_dim) of the bare backbone, fp32, from the cache where it has all the images.

        For methods whose adapters are off but for their own passes.
        """
        cache = None if self.computing.get() else self.context.cache
        found = None if cache is None else cache.lookup(images)
        if found is not None:
            return found.to(images.device)
        with torch.autocast(images.device.type, enabled=False):  # everywhere as in the cache
            return self.backbone(images).float()  # type: ignore[no-any-return]

    def query(self, images: Tensor) -> Tensor:
        """Final features (n, feature_dim) of the bare backbone: what prompts and tasks are chosen by.

        Augmented views are in no cache, and looking for them would take a digest of every one.
        """
        if not torch.is_grad_enabled():
            return self.final(self.frozen_features(images))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.final(self.backbone(images).float())

    def final(self, features: Tensor) -> Tensor:
        """The final features (n, feature_dim) among what :meth:`features` gives (n, row_dim)."""
        return features[:, : self.backbone.feature_dim]

    def head_logits(self, encoding: Encoding) -> Tensor:
        """Logits of all rows (n, R)."""
        return self.heads(encoding.features) if encoding.logits is None else encoding.logits

    def after_step(self) -> None:
        """After an optimiser step: constraints on parameters."""

    def consolidate(self, task: TaskInfo, loader: Loader) -> None:
        """After training: one pass over the task's images for the rows on the final feature."""
        self.merge()
        features, labels = self.observe(loader)
        self.remember(task, features, labels)

    def keep_by_row(self, name: str, part: ByRow) -> None:
        """Adds ``part``, learned and forgotten row by row beside the class rows, saved under ``name``."""
        self.learned.add_module(name, part)
        self.by_row.append(part)

    def attach(self, first: int | None, projections: str, make: Callable[[int, int], nn.Module]) -> None:
        """Puts an update beside the qkv projection of each adapted layer.

        Args:
            first: field ``first_adapted_layer``.
            projections: which of ``q``, ``k`` and ``v`` the update adds to.
            make: (d, columns written) -> the update, see :class:`.Beside`; called in the order of the layers.
        """
        self.beside = put_beside(self.backbone, adapted_layers(self.backbone, first), projections, make)
        self.adapters.update({str(layer): b.update for layer, b in self.beside.items()})

    def attach_lora(self, config: AdapterFields) -> None:
        """Puts one LoRA, which all tasks share, beside the qkv projection of each adapted layer."""
        generator = self.generator(0, "adapter")
        self.attach(
            config.first_adapted_layer,
            config.projections,
            lambda dim, out: LowRank(dim, out, config.rank, generator),
        )

    def attach_mlp(self, first: int | None, make: Callable[[int], nn.Module]) -> None:
        """Puts an update beside the mlp of each adapted layer; it is never merged.

        Args:
            first: field ``first_adapted_layer``.
            make: d -> the update, see :class:`.BesideMLP`; called in the order of the layers. It is saved
                under ``mlp`` and the layer.
        """
        layers = adapted_layers(self.backbone, first)
        self.beside_mlp = put_beside_mlp(self.backbone, layers, make)
        self.adapters.update({f"mlp{layer}": b.update for layer, b in self.beside_mlp.items()})

    @torch.no_grad()
    def merge(self) -> None:
        """Folds updates that can say their ``delta_weight()`` into the weights; notes the task's norm.

        Call it after training, before a pass is made for what is remembered.
        """
        moved = []
        for wrapper, before in zip(self.beside.values(), self._before, strict=True):
            wrapper.merge()
            after = wrapper.delta_weight()
            if after is not None:
                change = after if before is None else after - before
                moved.append(float(change.norm() / wrapper.frozen_norm()))
        self.orthogonal_norm = sum(moved) / len(moved) if moved else None

    @torch.no_grad()
    def logits(self, images: Tensor, *, cached: bool = True) -> BatchOutputs:
        """Readouts of a batch; the answer for an image does not depend on the others.

        Args:
            images: (B, 3, H, W).
            cached: features of the bare backbone may come from the cache; else all of it is computed.
        """
        with self.context.reading(), self.computing.holding(not cached):
            encoding = self.encode(images)
        return self.readouts(encoding)

    def readouts(self, encoding: Encoding) -> BatchOutputs:
        """What a forward pass says, with gradients where it has them."""
        config, logits = self.config, self.head_logits(encoding)
        log_q, familiarity = self.rows.posterior_and_familiarity(encoding.features)
        log_task, calibrated = self.task_posterior(encoding, log_q), None
        if config.calibration != "none":
            row_task = self.rows.row_task
            calibrated = calibrate(logits, log_q, log_task, row_task, config.calibration, config.tau)
        if self.realigned:  # they began under the covariance of their time, which later tasks change
            logits = log_q + (logits - self.starts(encoding.features)) / 2
        heads, features = logits.log_softmax(1), self.final(encoding.features)
        return BatchOutputs(heads, calibrated, log_task, familiarity, encoding.gate, features)

    def forget(self, task: int, kept: Tensor) -> None:
        """Loses classes of a task: their rows and head outputs, with the last one all that is the task's own.

        This takes rows and heads, which every method has; one that keeps more of a class or a task takes
        that as well. Indices of tasks stay as they are: a forgotten task has no rows from then on.

        Args:
            task: its index.
            kept: which of its classes stay, one bool a class; some other class of the model always does.
        """
        seen_from, stays = self.rows.reference, self.rows.staying(task, kept)
        for part in self.by_row:
            part.forget(stays)
        for heads in (self.heads, self.starts) if self.realigned else (self.heads,):
            heads.forget(task, kept)
        self.rows.forget(task, kept)
        if self.imprinted and not torch.equal(seen_from, self.rows.reference):
            # Heads began as classifiers seen from what is forgotten now, and those to come cannot be.
            self.heads.shift(*self.rows.seen_from(seen_from))
            self.starts.shift(*self.rows.seen_from(seen_from))

    def task_posterior(self, encoding: Encoding, log_q: Tensor) -> Tensor:
        """Log p(t|f) (n, T) from the pass and the posterior over rows (n, R)."""
        return self.rows.by_task(log_q)

    def state(self) -> dict[str, Tensor]:
        """Everything learned so far, by name; valid between tasks."""
        return dict(self.learned.state_dict())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave.

        Raises:
            ValueError: tensors are missing, or are not of this method and configuration.
        """
        heads = [name for name in tensors if name.startswith("heads.") and name.endswith(".weight")]
        for task in range(len(heads)):
            self.grow(task)
        try:
            self.learned.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        self.restored()

    @classmethod
    def places(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[AdaptedPlace]:
        """Describes a saved state: what it holds beside the projections of the adapted layers.

        Args:
            config: the model's configuration.
            tensors: the saved state.
        """
        return []

    @classmethod
    def part_of(cls, name: str) -> str:
        """In a word, the part of a saved state that a tensor belongs to."""
        part = name.split(".")[0]
        return {"rows": "class rows"}.get(part, part)

    def restored(self) -> None:
        """After a load: what follows from the learned state and is not saved."""
        for wrapper in self.beside.values():
            wrapper.merge()

    def simulate(self, tasks: Sequence[TaskInfo]) -> None:
        """For measurements: random numbers for what is learned beside heads, rows and adapters."""

    def pretend(self, task: int) -> None:
        """As :meth:`grow`, for measurements; a method may draw what takes long in a shorter way."""
        self.grow(task)

    def remember(self, task: TaskInfo, features: Tensor, labels: Tensor) -> None:
        """Adds the task's rows on features (n, row_dim) and fits their temperature; called once a task."""
        self.rows.replace(task.index, ClassMoments.of(features, labels, len(task.classes)))
        self.rows.fit_temperature(task.index, features, labels)

    @torch.no_grad()
    def observe(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """One pass over the task's images: features (n, row_dim) and labels (n,)."""
        features, labels = zip(*((self.features(b.images), b.labels) for b in loader()), strict=True)
        return parallel.gather(torch.cat(features)), parallel.gather(torch.cat(labels))

    @contextmanager
    def lesson(self, config: MethodConfig, seed: int) -> Iterator[None]:
        """Inside, tasks are trained with another configuration and seed.

        Args:
            config: differs from the method's own in how a task is trained, not in what its state means.
            seed: of the random draws.
        """
        before = self.config, self.seed
        self.config, self.seed = config, seed
        try:
            yield
        finally:
            self.config, self.seed = before

    def generator(self, task: int, stream: RandomStream = "head") -> torch.Generator:
        """Random numbers for a use in a task, the same on every device and after every resume.

        Args:
            task: index of the task.
            stream: what is drawn; every use in a task has a stream of its own.
        """
        return generator(self.seed, task, stream)
