"""Makes the golden model: a saved model of the current format, and what it says about a few digits.

``python tests/golden/make.py`` refuses to replace it, for models of a released format must stay readable: a new
format gets a folder of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from duallora import ContinualLearner, DualLoRAConfig, streams
from duallora.checkpoint import FORMAT_VERSION

HERE = Path(__file__).parent
FOLDER = HERE / f"format-{FORMAT_VERSION}"
IMAGES = 12


def stream() -> streams.Stream:
    """Two tasks of two digits each, and a few test images."""
    return streams.digits(tasks=2, classes=4, train_per_class=10, holdout=3)


def main() -> None:
    """Learns two tasks, one layer and low ranks, so that the file stays small."""
    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there already")
    config = DualLoRAConfig(
        rank=2, residual_rank=2, first_adapted_layer=5, energy_threshold=0.6, epochs=1, batch_size=8
    )
    learner = ContinualLearner("embedded", config, seed=3, device="cpu", augment="crop")
    for task in stream():
        learner.learn(task.train, name=task.name)
    learner.save(FOLDER / "model")
    (FOLDER / "model" / ".lock").unlink()
    found = {}
    for task in stream():
        outputs = learner.outputs(task.test)
        found[task.name] = {
            "heads": outputs.heads.exp().tolist(),
            "calibrated": outputs.calibrated.exp().tolist(),
            "task_posterior": outputs.task_posterior.exp().tolist(),
            "familiarity": outputs.familiarity.tolist(),
            "gate": outputs.gate.tolist(),
        }
    text = json.dumps(found, indent=1)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
