"""A saved model whose parts are changed by hand and whose hashes fit all the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]
"""Changes the content of ``model.json`` and the tensors in place."""


def tamper(model: Path, edit: Edit) -> None:
    """Rewrites a saved model after ``edit`` has changed it, with the hashes of what it is then."""
    manifest = json.loads((model / "model.json").read_bytes())
    old = manifest["weights"]
    tensors = safetensors.torch.load((model / old).read_bytes())
    edit(manifest, tensors)
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    weights = f"model-{digest[:12]}.safetensors"
    (model / weights).write_bytes(data)
    manifest["weights"] = weights
    manifest["files"] = {weights: digest} | {n: d for n, d in manifest["files"].items() if n != old}
    (model / "model.json").write_text(json.dumps(manifest))
