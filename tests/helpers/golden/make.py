"""Makes the golden model: a saved model of the current format, and what it says about a few images.

``PYTHONPATH=tests/helpers python tests/helpers/golden/make.py`` refuses to replace it, for models of a
released format must stay readable: a new format gets a folder of its own. The backbone is a tiny one, whose
weights lie beside the model: class statistics grow with the square of the width, and so the file stays small.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from tiny import tiny_backbone
from torch import Tensor

from duallora import ContinualLearner, DualLoRAConfig, streams
from duallora.backbones.backbone import Backbone, state_sha256
from duallora.outputs import Outputs
from duallora.storage.checkpoint import FORMAT_VERSION

HERE = Path(__file__).parent
PROBABILITIES = ("heads", "calibrated", "task_posterior")  # logs in Outputs


def stream() -> streams.Stream:
    """Two tasks of two digits each, and a few test images."""
    return streams.digits(tasks=2, classes=4, train_per_class=60, holdout=4)


def images() -> list[Image.Image]:
    """Test digits of the first task mixed with some of the second: no model can be sure of them."""
    first, second = (task.test for task in stream())
    pairs = [(first[i][0], second[i][0]) for i in range(len(first))]
    mixed = [Image.blend(a, b, share) for share in (0.3, 0.5, 0.7) for a, b in pairs]
    return [first[0][0], second[0][0], *mixed]


def figures(outputs: Outputs) -> dict[str, Tensor]:
    """What is stored: probabilities, familiarity and gate."""
    names = (*PROBABILITIES, "familiarity", "gate")
    return {name: _plain(getattr(outputs, name), name in PROBABILITIES) for name in names}


def _plain(values: Tensor, logs: bool) -> Tensor:
    return values.exp() if logs else values


def backbone(folder: Path) -> Backbone:
    """The backbone that the model in a folder belongs to; another processor would draw other weights."""
    made = tiny_backbone(depth=3)
    made.model.load_state_dict(safetensors.torch.load_file(folder / "backbone.safetensors"))
    made.info = replace(made.info, sha256=state_sha256(made.model))
    return made


def main() -> None:
    """Learns two tasks at low ranks, so that the file stays small."""
    folder = HERE / f"format-{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} is there already")
    folder.mkdir()
    weights = tiny_backbone(depth=3).model.state_dict()
    safetensors.torch.save_file(weights, folder / "backbone.safetensors")
    config = DualLoRAConfig(
        rank=2, residual="next", residual_rank=2, energy_threshold=0.6, epochs=1, batch_size=8
    )
    learner = ContinualLearner(backbone(folder), config, seed=3, device="cpu", augment="crop")
    for task in stream():
        learner.learn(task.train, name=task.name)
    learner.save(folder / "model")
    (folder / "model" / ".lock").unlink()
    outputs = learner.outputs_of([batch(learner)])
    expected = {name: values.tolist() for name, values in figures(outputs).items()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def batch(learner: ContinualLearner) -> Tensor:
    """These images as the learner sees them."""
    return torch.stack([learner.preprocess(image) for image in images()])


if __name__ == "__main__":
    main()
