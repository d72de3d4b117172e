"""What a run stands on beside the method and the seed: the stream, the backbone, the views."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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


class Settings:
    """Loads settings that share streams or backbones, each of them once."""

    def __init__(self) -> None:
        self._streams: dict[StreamOptions, Stream] = {}
        self._backbones: dict[BackboneOptions, Backbone] = {}

    def load(self, stream: StreamOptions, backbone: BackboneOptions) -> Setting:
        """What the options name; see `load_setting`."""
        if stream not in self._streams:
            self._streams[stream] = _load_stream(stream)
        own = replace(backbone, augment=None)  # views of training images are no part of it
        if own not in self._backbones:
            self._backbones[own] = _load_weights(own)
        return _setting(stream, backbone, self._streams[stream], self._backbones[own])


def load_setting(stream: StreamOptions, backbone: BackboneOptions) -> Setting:
    """Loads what the options of ``duallora run`` and ``duallora compare`` name.

    Raises:
        DualLoRAError: A stream or a backbone that is not there or does not fit.
    """
    return Settings().load(stream, backbone)


def _load_stream(stream: StreamOptions) -> Stream:
    from duallora import streams

    return streams.load(stream.stream, data=stream.data, split_lists=stream.split_lists, **stream.asked())


def _load_weights(backbone: BackboneOptions) -> Backbone:
    from duallora.backbones.backbone import load_backbone

    return load_backbone(backbone.backbone, backbone.backbone_file, **backbone.changed())


def _setting(stream: StreamOptions, backbone: BackboneOptions, loaded: Stream, weights: Backbone) -> Setting:
    named = {
        "backbone": backbone.backbone,
        "backbone_file": None if backbone.backbone_file is None else backbone.backbone_file.name,
        # Other weights under the same name are another run.
        "backbone_sha256": weights.info.sha256,
        **backbone.changed(),
    }
    return Setting(loaded, weights, backbone.augment or loaded.augmentation, stream.asked(), named)
