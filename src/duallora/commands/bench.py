"""``duallora bench``: what the methods cost beside the frozen backbone and plain LoRA."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.compared_methods import read_lines
from duallora.commands.number_ranges import require_range
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone

FORMATS = ("torch-export", "onnx")
EMBEDDED = "embedded"


def bench(
    *,
    out: Path,
    backbone: str = EMBEDDED,
    backbone_file: Path | None = None,
    image_size: int | None = None,
    methods: str | None = None,
    tasks: int | str = "1,10,50",
    batch: int | str = "1,64",
    classes: int = 10,
    images: int = 128,
    training_batch: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
    compile: bool = False,
    repeats: int = 5,
    exports: str | None = None,
    startup: bool = False,
) -> None:
    """Measure time, memory, bytes and operations of prediction and training beside the frozen backbone.

    All candidates are measured in turn in one process. States of many tasks are synthetic: random bases,
    heads and rows of the shapes that learning would leave. Weights are random too, except for the embedded
    backbone and a file: speed does not depend on them.

    Args:
        out: folder for bench.json, bench.csv and bench.png
        backbone: embedded, a timm ViT by its full tag, or hf:NAME
        backbone_file: local .safetensors file with the backbone's weights
        image_size: height and width of the input, where it is not that of the pre-training
        methods: names of duallora methods, shipped variants or paths of YAML files with a method section,
            separated by commas, each at its defaults; where it is not given, all
        tasks: numbers of tasks learned, separated by commas
        batch: images of a prediction, several numbers separated by commas
        classes: classes of a task
        images: training images of the task whose training is measured; 0 measures prediction alone
        training_batch: images of a training step; 0 takes the batch_size of each method
        device: where to compute
        precision: of the backbone in training and in prediction alike
        compile: compile all candidates with torch.compile, the bare backbone too
        repeats: samples of which the median is taken
        exports: formats in which the line duallora is also measured as an exported file, separated by
            commas: torch-export, onnx
        startup: also measure new processes: the first prediction of a saved model of the embedded backbone,
            and the command's help
    """
    if out.exists() and not out.is_dir():
        raise DualLoRAError(f"{out} is a file; name a folder for the measurement.")
    if (out / "bench.json").exists():
        raise DualLoRAError(f"{out} holds a measurement already; name another folder.")
    counts, batches = _numbers("--tasks", tasks, 1000), _numbers("--batch", batch, 65536)
    require_range("--classes", classes, 2, 1000)
    require_range("--images", images, 0, 2**20)
    require_range("--training-batch", training_batch, 0, 65536)
    require_range("--repeats", repeats, 1, 1000)
    forms = [] if exports is None else [form.strip() for form in exports.split(",") if form.strip()]
    for form in forms:
        if form not in FORMATS:
            raise DualLoRAError(f"--exports does not know {form!r}; take {' or '.join(FORMATS)}.")
    # The profiler that counts memory would otherwise say that it found no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")

    from duallora.bench import measure
    from duallora.bench.candidates import Candidate
    from duallora.bench.unfinished import Unfinished
    from duallora.methods import METHODS
    from duallora.runtime.compute import Compute
    from duallora.runtime.progress import Progress

    named = (
        list(METHODS) if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    )
    candidates = [Candidate(line.name, line.config) for line in read_lines(named, {}, True)]
    machine = Compute(device=device, precision=precision, compile=compile).start()
    plan = measure.Plan(candidates, counts, batches, classes, images, training_batch, repeats, exports=forms)

    def fresh() -> Backbone:
        from duallora.backbones.backbone import load_backbone

        known = backbone == EMBEDDED or backbone_file is not None
        return load_backbone(backbone, backbone_file, pretrained=known, image_size=image_size)

    progress = Progress()
    asked = {
        "backbone": backbone,
        "image_size": image_size,
        "candidates": {candidate.name: dataclasses.asdict(candidate.config) for candidate in candidates},
        "tasks": counts,
        "batch": batches,
        "classes": classes,
        "images": images,
        "training_batch": training_batch,
        "repeats": repeats,
        "exports": forms,
        "compute": [machine.kind, machine.precision, compile],
    }
    unfinished = Unfinished(out, asked, progress)
    rows = measure.Bench(plan, fresh, machine, progress, unfinished).rows()
    more: dict[str, Any] = {}
    if startup:
        from duallora.bench.startup import startup as measured

        first = next((c for c in candidates if c.method == "duallora"), candidates[0])
        more["startup"] = unfinished.measured(
            "new processes, in turn", lambda: measured(first, max(counts), classes, repeats)
        )
    _write(rows, more, out, machine, repeats)
    unfinished.remove()


def _numbers(option: str, text: int | str, largest: int) -> list[int]:
    try:
        numbers = sorted({int(part) for part in str(text).split(",")})
    except ValueError as error:
        raise DualLoRAError(f"{option} must be numbers separated by commas, not {text!r}.") from error
    for number in numbers:
        require_range(option, number, 1, largest)
    return numbers


def _write(rows: list[dict[str, Any]], more: dict[str, Any], out: Path, machine: Any, repeats: int) -> None:
    from duallora.bench import bench_report
    from duallora.runs.results import environment, peak_memory_bytes
    from duallora.storage.atomic import write_atomic

    about = environment(machine.device) | {
        "precision": machine.precision,
        "repeats": repeats,
        # Of everything in this process together: resident on the CPU, allocated on a GPU.
        "process_peak_bytes": peak_memory_bytes(machine.device),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "bench.json", bench_report.to_json(rows, about, more))
    write_atomic(out / "bench.csv", bench_report.to_csv(rows))
    picture = bench_report.plot(rows)
    if picture is not None:
        write_atomic(out / "bench.png", picture)
    console.rows([c.head for c in bench_report.PREDICTION], bench_report.cells(rows, bench_report.PREDICTION))
    trained = bench_report.trained(rows)
    if trained:
        columns = bench_report.TRAINING
        console.rows([c.head for c in columns], bench_report.cells(trained, columns))
    if "startup" in more:
        found = more["startup"]
        console.line(
            f"first prediction of a saved model {found['learned_seconds']:.2f} s, of torch, timm and the "
            f"bare backbone {found['frozen_seconds']:.2f} s, ratio {found['load_ratio']:.2f}; "
            f"help {found['help_seconds']:.2f} s"
        )
    console.line(f"figures: {out / 'bench.json'}")
