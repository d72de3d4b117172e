"""Fields of DualLoRA, and which of them contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from duallora.errors import DualLoRAError
from duallora.methods.config import AdapterFields, MethodConfig


@dataclass(frozen=True)
class DualLoRAConfig(AdapterFields, MethodConfig):
    """Fields of DualLoRA; the first value of a choice is the default.

    Attributes:
        head_learning_rate: learning rate of the heads, which begin as the classifiers of the rows.
        rank: r, rank of the orthogonal adapter.
        residual_rank: r_R, rank of the residual adapter.
        moments: rows behind the second moments: all tokens, or the class token alone (the paper's reading).
        energy_threshold: eps, share of a task's energy that is protected afterwards.
        residual: where the residual adapter's bases come from; with none, all is left to O.
        known_domain: mean familiarity of a task's images at the gate from which on they are of a known
            domain, whose adapters the task uses and leaves alone; below it, it trains its own, and so does
            every task above 1.
        relevance: what gates it: Gaussian rows, or energy in the tasks' bases (the paper's reading).
        gate: where the gate reads: once at the first adapted layer, at each one, or nowhere (all weights 1).
        top_tasks: most residual adapters that act on one image.
    """

    positive: ClassVar[tuple[str, ...]] = ("top_tasks",)

    head_learning_rate: float = 1e-3
    residual_rank: int = 20
    moments: Literal["tokens", "class_token"] = "tokens"
    energy_threshold: float = 0.95
    residual: Literal["own", "next", "protected", "none"] = "own"
    known_domain: float = 0.25
    relevance: Literal["gaussian", "energy"] = "gaussian"
    gate: Literal["first", "layer", "off"] = "first"
    top_tasks: int = 4

    def __post_init__(self) -> None:
        """Refuses combinations that contradict each other.

        Raises:
            DualLoRAError: naming the fields.
        """
        super().__post_init__()
        if not 0 < self.energy_threshold <= 1:
            raise DualLoRAError(f"energy_threshold must lie in (0, 1], not {self.energy_threshold}.")
        if self.first_adapted_layer == 0 and self.gate == "first" and self.residual != "none":
            raise DualLoRAError(
                "first_adapted_layer=0 leaves no frozen layer for gate='first'; take gate='layer' or 'off'."
            )
