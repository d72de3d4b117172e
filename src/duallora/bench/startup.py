"""How long new processes take: the first prediction of a saved model, and the help of the command."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

from duallora.backbones.backbone import EMBEDDED, EMBEDDED_FILE, load_backbone
from duallora.bench.candidates import Candidate
from duallora.bench.synthetic import simulated_learner
from duallora.errors import DualLoRAError

# torch, timm, the same architecture with the same weights, and one pass: nothing of this package.
_FROZEN = """
import sys
from functools import partial
import safetensors.torch, timm, torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
stem = ConvStem(depth=4, channels=(32, 64, 128, 192), stride=(2, 2, 1, 2), act_layer=torch.nn.GELU)
stem.num_features = 192
embed = partial(HybridEmbed, backbone=stem, proj=False, feature_size=(8, 8), feature_ratio=8)
model = timm.models.vision_transformer.VisionTransformer(
    img_size=64, patch_size=1, embed_dim=192, depth=6, num_heads=3, num_classes=0, embed_layer=embed
)
tensors = safetensors.torch.load_file(sys.argv[1])
model.load_state_dict({name: x for name, x in tensors.items() if not name.startswith("head.")})
with torch.no_grad():
    model.eval()(torch.zeros(1, 3, 64, 64))
"""
_LEARNED = """
import sys
import torch
from duallora import ContinualLearner
ContinualLearner.load(sys.argv[1], device="cpu").predict([torch.zeros(3, 64, 64)])
"""
_HELP = """
import sys
from duallora.cli import main
sys.exit(main(["--help"]))
"""


def startup(candidate: Candidate, tasks: int, classes: int, repeats: int) -> dict[str, Any]:
    """Median seconds of new processes on the CPU, in turn, with the embedded backbone.

    Args:
        candidate: what has been saved.
        tasks: of the saved model, synthetic.
        classes: of each task.
        repeats: of every process.

    Returns:
        ``frozen_seconds`` (torch, timm and a pass of the bare model), ``learned_seconds`` (loading the saved
        model and predicting an image), ``load_ratio`` of the two, and ``help_seconds``.

    Raises:
        DualLoRAError: a process failed.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        resources.as_file(resources.files("duallora") / "weights" / EMBEDDED_FILE) as weights,
    ):
        model = Path(folder) / "model"
        simulated_learner(load_backbone(EMBEDDED), candidate.config, tasks, classes).save(model)
        words = {
            "frozen_seconds": (_FROZEN, str(weights)),
            "learned_seconds": (_LEARNED, str(model)),
            "help_seconds": (_HELP,),
        }
        found: dict[str, list[float]] = {name: [] for name in words}
        for turn in range(repeats + 1):  # the first reads the libraries into the machine's memory
            for name, (script, *rest) in words.items():
                took = _seconds(script, rest)
                found[name] += [took] if turn else []
    medians: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    ratio = medians["learned_seconds"] / medians["frozen_seconds"]
    return medians | {"load_ratio": ratio, "method": candidate.name, "tasks": tasks}


def _seconds(script: str, words: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DualLoRAError(f"a process whose start is measured failed: {last}.")
    return time.perf_counter() - start
