"""What a run stands on beside the method and the seed: the stream, the backbone, the views."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from duallora.commands.options import BackboneOptions, StreamOptions

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone
    from duallora.methods import MethodConfig
    from duallora.streams import Stream


@dataclass(frozen=True)
class Setting:
    """A stream and a backbone, loaded.

    Attributes:
        stream: The tasks.
        backbone: Frozen; a learner that is given it keeps it.
        augment: Views of the training images.
        options: What was asked of the stream, ready for JSON.
        named: What was asked of the backbone: its name, the name of its file, the hash of the weights, and
            the preprocessing where it is not the backbone's own.
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


def load_setting(stream: StreamOptions, backbone: BackboneOptions) -> Setting:
    """Loads what the options of ``duallora run`` and ``duallora compare`` name.

    Raises:
        DualLoRAError: A stream or a backbone that is not there or does not fit.
    """
    from duallora import streams
    from duallora.backbones.backbone import load_backbone

    options = stream.asked()
    loaded = streams.load(stream.stream, data=stream.data, split_lists=stream.split_lists, **options)
    weights = load_backbone(backbone.backbone, backbone.backbone_file, **backbone.changed())
    named = {
        "backbone": backbone.backbone,
        "backbone_file": None if backbone.backbone_file is None else backbone.backbone_file.name,
        # Other weights under the same name are another run.
        "backbone_sha256": weights.info.sha256,
        **backbone.changed(),
    }
    return Setting(loaded, weights, backbone.augment or loaded.augmentation, options, named)
