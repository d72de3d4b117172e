"""What a backbone is: which weights, and how an image is prepared for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from duallora.errors import DualLoRAError

Normalization = Literal["backbone", "imagenet", "none"]

_NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "backbone": {},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "none": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
}


@dataclass(frozen=True)
class BackboneInfo:
    """Which weights these are, and how an image is prepared for them.

    Attributes:
        name: ``"embedded"``, a timm name with its tag, or ``hf:`` and a Hugging Face name or a folder.
        sha256: of the weight file (embedded, local and Hugging Face), whatever the size of the images;
            ``duallora.backbones.weight_file.state_sha256`` of weights that timm downloaded.
        mean: per RGB channel, of images in [0, 1].
        std: per RGB channel.
        input_size: (channels, height, width).
        interpolation: as timm names it (``"bicubic"``, ``"bilinear"``).
        crop_pct: share of the resized image that the centre crop keeps.
        crop_mode: ``"center"`` keeps the aspect ratio before the crop; ``"squash"`` does not.
        file: path of a local weight file, or None.
        config: what of a Hugging Face model's ``config.json`` decides about it; None for all others.
    """

    name: str
    sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    file: str | None = None
    crop_mode: str = "center"
    config: Mapping[str, Any] | None = field(default=None, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        fields = asdict(self)
        if self.config is None:
            del fields["config"]
        return fields | {key: list(fields[key]) for key in ("mean", "std", "input_size")}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` gave, also after a way through JSON, and by an earlier version."""
        return cls(**(dict(fields) | {key: tuple(fields[key]) for key in ("mean", "std", "input_size")}))

    def refuse_other(self, other: BackboneInfo) -> None:
        """Refuses another backbone than this one, on which a model was learned.

        Raises:
            DualLoRAError: other weights, or images prepared otherwise.
        """
        if other.sha256 != self.sha256:
            raise DualLoRAError(
                f"the model was learned on backbone {self.name!r} with sha256 {self.sha256[:12]}, but "
                f"{other.name!r} here has {other.sha256[:12]}; use the weights that it was learned on."
            )
        for view in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
            if getattr(other, view) != getattr(self, view):
                raise DualLoRAError(
                    f"the model was learned on images with {view} {getattr(self, view)}, but backbone "
                    f"{self.name!r} here takes {getattr(other, view)}; load it as it was."
                )

    def prepared(
        self, normalization: Normalization, crop_pct: float | None, interpolation: str | None
    ) -> Self:
        """The same with images prepared otherwise; ``"backbone"`` and None leave things as they are.

        Raises:
            DualLoRAError: an unknown normalisation, or a share that is none.
        """
        if normalization not in _NORMALIZATIONS:
            valid = " | ".join(_NORMALIZATIONS)
            raise DualLoRAError(f"unknown normalization {normalization!r} of the backbone: choose {valid}.")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise DualLoRAError(f"crop_pct must be above 0 and at most 1, not {crop_pct}.")
        changes = dict(_NORMALIZATIONS[normalization])
        changes |= {} if crop_pct is None else {"crop_pct": float(crop_pct)}
        changes |= {} if interpolation is None else {"interpolation": interpolation}
        return replace(self, **changes)
