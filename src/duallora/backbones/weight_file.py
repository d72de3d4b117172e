"""Weights of a backbone: local ``.safetensors`` files, and what identifies tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duallora.errors import DualLoRAError
from duallora.storage.regular import open_regular


@dataclass(frozen=True)
class WeightFile:
    """What a file holds.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        tensors: by name.
        metadata: of the header.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> WeightFile:
        """Reads a file.

        Raises:
            DualLoRAError: it cannot be read or is no complete ``.safetensors`` file.
        """
        try:
            with open_regular(path) as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            with safe_open(path, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not iterable)
                return cls(path, digest, tensors, opened.metadata() or {})
        except OSError as error:
            raise DualLoRAError(f"The backbone file {path} cannot be read ({error.strerror}).") from error
        except SafetensorError as error:
            raise DualLoRAError(
                f"{path} is not a complete .safetensors file ({error}); fetch it again, or convert it."
            ) from error

    def load_into(self, model: nn.Module, name: str) -> None:
        """Strict but for the classifier: all other tensors in their shapes, and nothing else.

        Raises:
            DualLoRAError: naming the first tensors that do not fit.
        """
        given = {key: tensor for key, tensor in self.tensors.items() if not _left_out(key)}
        wanted = {key: tensor for key, tensor in model.state_dict().items() if not _left_out(key)}
        problems = differences(given, wanted)
        if problems:
            raise DualLoRAError(
                f"{self.path} does not hold the weights of {name} in timm's keys: {problems}; "
                "give the architecture of the file with --backbone."
            )
        model.load_state_dict(given, strict=False)  # checked above: only the classifier may be left out


def differences(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Which tensors are missing, unknown or of another shape: at most three in words; empty if none."""
    problems = [f"{key} is missing" for key in wanted if key not in given]
    problems += [f"{key} is unknown" for key in given if key not in wanted]
    for key in given.keys() & wanted.keys():
        if given[key].shape != wanted[key].shape:
            problems.append(f"{key} is {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(sorted(problems)[:3]) + more


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a model's parameters and buffers, in the order of the names.

    The classifier is left out, so that removing it changes nothing.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not key.startswith(_CLASSIFIER):
            digest.update(key.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


_CLASSIFIER = ("head.", "head_dist.")


def _left_out(key: str) -> bool:
    """The classifier, and the table of places that some files of BEiT hold and every model makes itself."""
    return key.startswith(_CLASSIFIER) or key.endswith("relative_position_index")
