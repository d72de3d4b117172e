"""Published protocols: each is sound and fits its data; a run is put beside what was published."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import stream_fixtures
import timm
from command_line import Call, caller, use_tiny_backbone
from published import published

from duallora.commands import reproduce as module
from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.published_protocols import Protocol, protocols, read_protocol
from duallora.methods import METHODS
from duallora.runs.verdicts import FIGURES
from duallora.teaching.method_choice import MethodChoice

SOURCES = ("log file", "table", "LibContinual's reproduction")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets of the protocols in their own formats, with enough classes for twenty tasks."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        wnids = tuple(f"n{i:08d}" for i in range(40))
        patch.setattr(stream_fixtures, "WNIDS", wnids)
        patch.setattr(stream_fixtures, "red", lambda target: (10 + 20 * target) % 256)
        stream_fixtures.write_imagenet_r(folder)
        stream_fixtures.write_split_lists(folder / "lists")
        stream_fixtures.write_tiny_imagenet(folder)
    return folder


@pytest.fixture
def places(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folder of each data set; CIFAR's checksums are expected only while a test runs."""
    monkeypatch.setattr(stream_fixtures, "red", lambda target: (10 + 20 * target) % 256)
    kinds = dict(stream_fixtures.FIXTURES)
    for name, classes in (("cifar100", 20), ("domainnet", 10)):
        names = tuple(f"class {i:02d}" for i in range(classes))
        kinds[name] = dataclasses.replace(kinds[name], classes=names)
    monkeypatch.setattr(stream_fixtures, "FIXTURES", kinds)
    stream_fixtures.write_cifar(tmp_path, monkeypatch, "cifar100")
    stream_fixtures.write_domainnet(tmp_path)
    return {"cifar100": tmp_path, "domainnet": tmp_path, "imagenet-r": data, "tiny-imagenet": data}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


WHOLE = "cifar100-10/l2p"  # on the ViT-B/16 itself; the others on one as deep, a quarter as wide


@pytest.mark.slow
@pytest.mark.parametrize("name", protocols())
def test_a_protocol_fits_its_data_and_its_method(
    name: str, places: dict[str, Path], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = read_protocol(name)
    if name != WHOLE:
        narrow = partial(timm.create_model, embed_dim=192, num_heads=3)
        monkeypatch.setattr(timm, "create_model", narrow)
    folder = places[protocol.stream.stream]
    lists = ["--split-lists", folder / "lists"] if protocol.stream.stream == "imagenet-r" else []
    done = call("reproduce", name, "--data", folder, *lists, "--dry-run")
    assert done.code == 0, done.err
    tasks = int(re.fullmatch(r"[a-z0-9-]+-(\d+)/[a-z0-9-]+", name)[1])  # type: ignore[index]
    assert f"sound; {tasks} tasks" in done.out
    assert protocol.backbone.normalization == "none"  # as in the released code of all of them
    prompts = protocol.method.name in ("l2p", "dualprompt", "coda-prompt")
    shuffled = [seed for seed in (0, 1, 7) if protocol.ordered(seed).order == seed]
    assert shuffled == ([1, 7] if prompts else [0, 1, 7] if protocol.by_seed else [])
    assert protocol.by_seed or protocol.stream.order == "alphabetical"
    assert not prompts or protocol.ordered(0).order == "alphabetical"


@pytest.mark.parametrize("name", protocols())
def test_what_is_expected_has_a_source_and_a_tolerance(name: str) -> None:
    protocol = read_protocol(name)
    assert protocol.method.name in METHODS and protocol.method.name == name.split("/")[1]
    assert len(set(protocol.seeds)) == len(protocol.seeds) > 0
    if protocol.expected:
        figures = [protocol.expected[key] for key in FIGURES if key in protocol.expected]
        assert all(0.4 < figure < 1 for figure in figures)
        assert 0.005 <= protocol.expected["tolerance"] <= 0.02
        assert any(source in protocol.expected["source"] for source in SOURCES)


def test_the_values_of_a_protocol_are_the_published_ones() -> None:
    found = {}
    for name in protocols():
        protocol = read_protocol(name)
        model, _, tag = protocol.backbone.backbone.partition(".")
        assert model == "vit_base_patch16_224" and protocol.backbone.image_size == 224
        fields = ("learning_rate", "head_learning_rate", "epochs", "batch_size", "rank", "lamb")
        figures = [protocol.expected.get(key) for key in (*FIGURES, "tolerance")]
        found[name] = (
            *(protocol.method.fields.get(field) for field in fields),
            tag,
            *(None if figure is None else round(100 * figure, 6) for figure in figures),
        )
    assert found == published()


def test_protocols_have_what_the_released_code_does() -> None:
    """Schedules, and the reset of SD-LoRA, which its published figures are of."""
    for name in protocols():
        row = name.split("/")[1]
        fields = read_protocol(name).method.fields
        late = row in ("l2p", "dualprompt", "coda-prompt", "inflora")
        expected = "quarter-cosine" if late else {"sd-lora": "constant"}.get(row, "cosine")
        if name == "domainnet-5/inflora":
            expected = "step"  # to a tenth for the last of its five epochs
        assert fields.get("schedule", "cosine") == expected, name
        assert fields.get("reset_magnitudes", False) == (row == "sd-lora"), name


def test_the_documentation_has_every_protocol_as_it_is() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "protocols.md").read_text(encoding="utf-8")
    for name in protocols():
        protocol = read_protocol(name)
        expected, average = protocol.expected, protocol.expected.get("average_incremental_accuracy")
        order = "its seed" if protocol.by_seed else "alphabetical"
        if protocol.ordered(0) != protocol.ordered(1) and protocol.stream.order == "alphabetical":
            order = "alphabetical for 0, else its seed"
        epochs, first = (protocol.method.fields.get(field) for field in ("epochs", "first_epochs"))
        cells = [
            f"`{name}`",
            protocol.backbone.backbone.partition(".")[2],
            str(epochs) if first in (None, epochs) else f"{epochs}, first {first}",
            f"{order}; {', '.join(map(str, protocol.seeds))}",
            f"{100 * expected['final_accuracy']:.2f}" if expected else "-",
            "-" if average is None else f"{100 * average:.2f}",
            f"{100 * expected['tolerance']:.1f}" if expected else "-",
            expected.get("source", "none known").partition(";")[0],
        ]
        assert f"| {' | '.join(cells)} |" in text.splitlines()


def test_figures_of_another_setting_say_so() -> None:
    """SD-LoRA's repository gives figures of other methods, and not on which backbone and in which order."""
    for name in protocols():
        source = read_protocol(name).expected.get("source", "")
        of_others = "of SD-LoRA's repository" in source
        assert source.endswith("; backbone and class order there are not known to be these") == of_others
        figures = name.split("/")[1] in ("l2p", "dualprompt", "coda-prompt") and "cifar" not in name
        assert of_others or not figures


def test_the_list_has_every_protocol(call: Call) -> None:
    listed = call("reproduce")
    assert listed.code == 0
    assert all(name in listed.out for name in protocols())
    assert call("reproduce", "list").out == listed.out


def test_an_unknown_protocol_is_answered_with_the_nearest(call: Call) -> None:
    done = call("reproduce", "cifar100-10/inflroa")
    assert done.code == 2
    assert "no protocol cifar100-10/inflroa" in done.err and "cifar100-10/inflora" in done.err


def test_missing_data_is_named_before_anything_is_written(call: Call, tmp_path: Path) -> None:
    done = call("reproduce", "imagenet-r-10/inflora", "--data", tmp_path / "none", "--dry-run")
    assert done.code == 2
    assert "imagenet-r" in done.err and done.err.count("\n") == 1


SMALL = Protocol(
    "digits-2/lora",
    StreamOptions(tasks=2, classes=4, train_per_class=4),
    True,
    BackboneOptions(),
    MethodChoice("lora", {"epochs": 1, "min_steps": 0}),
    (1, 2),
    {"final_accuracy": 0.5, "tolerance": 0.005, "source": "nowhere"},
)


def test_measured_figures_are_put_beside_the_published_ones(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr(module, "read_protocol", lambda name: SMALL)
    done = call("reproduce", "digits-2/lora", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "seed-1" / "results.json").exists()
    rows = [line for line in done.out.splitlines() if "final accuracy" in line and "50.00" in line]
    assert len(rows) == 1 and "±" in rows[0]
    assert ("inside" in rows[0]) != ("outside" in rows[0])
    assert "published: nowhere" in done.out
    again = call("reproduce", "digits-2/lora", "--out", tmp_path / "out", "--seeds", "2")
    assert again.code == 0
    assert "after task" not in again.err  # it is there already
    other = dataclasses.replace(SMALL, method=MethodChoice("lora", {"epochs": 2, "min_steps": 0}))
    monkeypatch.setattr(module, "read_protocol", lambda name: other)
    refused = call("reproduce", "digits-2/lora", "--out", tmp_path / "out")
    assert refused.code == 2 and "is another run" in refused.err


def test_every_run_of_a_protocol_is_logged(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr(module, "read_protocol", lambda name: SMALL)
    words = ("reproduce", "digits-2/lora", "--out", tmp_path / "out", "--logger", "csv")
    assert call(*words, "--seeds", "1").code == 0
    assert call(*words, "--seeds", "2", "--log-dir", tmp_path / "logs").code == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("metrics.csv")}
    assert found == {"out/seed-1/logs/version_0/metrics.csv", "logs/seed-2/version_0/metrics.csv"}
