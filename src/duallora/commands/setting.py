"""What a run stands on beside the method and the seed: the stream, the backbone, the views."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from duallora.backbones import Backbone
    from duallora.methods import MethodConfig
    from duallora.streams import Stream

Order = int | Literal["alphabetical"]
Augment = Literal["crop,flip", "crop", "none"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Setting:
    """A stream and a backbone, loaded.

    Attributes:
        stream: The tasks.
        backbone: Frozen; a learner that is given it keeps it.
        augment: Views of the training images.
        options: What was asked of the stream, ready for JSON.
        named: What was asked of the backbone: its name, the name of its file, and the hash of the weights.
    """

    stream: Stream
    backbone: Backbone
    augment: str
    options: dict[str, Any]
    named: dict[str, Any]

    def asked(self, name: str, config: MethodConfig, seed: int) -> dict[str, Any]:
        """The ``config`` of ``results.json``: two runs with an equal one are the same run.

        Args:
            name: The method's.
            config: Its fields.
            seed: Of initialisation, image order and augmentation.
        """
        return {
            "method": {"name": name, **asdict(config)},
            **self.named,
            "augment": self.augment,
            "seed": seed,
            **self.options,
        }


def load_setting(
    stream: str,
    domains: str | None,
    tasks: int | None,
    order: Order,
    classes: int | None,
    train_per_class: int | None,
    holdout: int,
    backbone: str,
    backbone_file: Path | None,
    augment: Augment | None,
    device: Device,
) -> Setting:
    """Loads what the options of ``duallora run`` and ``duallora compare`` name.

    Raises:
        DualLoRAError: A stream, a device or a backbone that is not there or does not fit.
    """
    from duallora import streams
    from duallora.backbones import load_backbone
    from duallora.train import make_fabric

    shown = tuple(name.strip() for name in domains.split(",")) if domains is not None else ()
    options: dict[str, Any] = {
        "tasks": tasks,
        "order": order,
        "classes": classes,
        "train_per_class": train_per_class,
        "holdout": holdout,
        "domains": shown,
    }
    loaded = streams.load(stream, **options)
    make_fabric(device)  # a device that is not there is refused before large weights are read
    weights = load_backbone(backbone, backbone_file)
    named = {
        "backbone": backbone,
        "backbone_file": None if backbone_file is None else backbone_file.name,
        # Other weights under the same name are another run.
        "backbone_sha256": weights.info.sha256,
    }
    return Setting(loaded, weights, augment or loaded.augmentation, options, named)
