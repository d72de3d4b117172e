"""The lines of a comparison: methods, variants and files, and the fields that each gets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from duallora import METHODS
from duallora.commands import compared_methods as lines_module
from duallora.commands.compared_methods import BUDGET_FIELDS, Line, read_lines
from duallora.commands.configs import read_config, shipped_configs
from duallora.errors import DualLoRAError


def written(folder: Path, name: str, method: object) -> str:
    """A YAML file with this method block; its path as on a command line."""
    path = folder / name
    path.write_text(json.dumps({"method": method}))
    return str(path)


def only(names: Sequence[str], shared: dict[str, Any] | None = None, same_budget: bool = False) -> Line:
    (found,) = read_lines(names, shared or {}, same_budget)
    return found


def refusal(names: Sequence[str], shared: dict[str, Any] | None = None) -> str:
    with pytest.raises(DualLoRAError) as caught:
        read_lines(names, shared or {}, False)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_line_is_a_method_with_the_values_of_its_paper() -> None:
    assert only(["lora"]) == Line("lora", "lora", METHODS["lora"].config())
    found = only(["inflora"])
    assert (found.name, found.method) == ("inflora", "inflora")
    assert found.config == METHODS["inflora"].config(min_steps=0, **_own("inflora"))
    assert vars(found.config)["epochs"] == 50


def _own(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = dict(read_config(f"methods/{name}")["method"])
    del fields["name"]
    return fields


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("duallora-heads", {"calibration": "none"}),
        (
            "duallora-paper",
            {
                "rank": 10,
                "residual_rank": 10,
                "residual": "next",
                "known_domain": 2.0,
                "relevance": "energy",
                "moments": "class_token",
                "projections": "qv",
                "calibration": "task",
            },
        ),
    ],
)
def test_a_line_is_a_shipped_variant(name: str, fields: dict[str, Any]) -> None:
    assert only([name]) == Line(name, "duallora", METHODS["duallora"].config(**fields))


def test_a_line_is_a_file(tmp_path: Path) -> None:
    file = written(tmp_path, "small.yaml", {"name": "lora", "rank": 3})
    assert only([file]) == Line("small", "lora", METHODS["lora"].config(rank=3))
    (tmp_path / "bare.yml").write_text("method: lora\n")
    assert only([str(tmp_path / "bare.yml")]) == Line("bare", "lora", METHODS["lora"].config())
    both = read_lines(["lora", file], {}, False)
    assert [found.name for found in both] == ["lora", "small"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["inflor"], ["no method inflor;", "did you mean inflora"]),
        (["duallora-head"], ["did you mean duallora-heads"]),
        (["lora", "xyz"], ["no method xyz;", "valid are", "duallora-paper", "ncm"]),
        (["lora", "ncm", "lora"], ["lora twice", "YAML file of another name"]),
        (["nowhere/mine.yaml"], ["no file nowhere/mine.yaml"]),
        ([], ["no method", "duallora methods"]),
    ],
)
def test_a_wrong_line_is_refused(names: list[str], parts: list[str]) -> None:
    sentence = refusal(names)
    assert not [part for part in parts if part not in sentence], sentence


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ({"rank": 3}, ["names no method", "name: NAME"]),
        (None, ["names no method", "name: NAME"]),
        ({"name": "loro"}, ["the method loro", "did you mean lora"]),
        ({"name": ["lora"]}, ["the method ['lora']"]),
        ({"name": "lora", "sparsity": 1.0}, ["the method lora has no field sparsity"]),
        ({"name": "lora", "epochs": 0}, ["epochs must be above 0"]),
        ({"name": "lora", "epochs": "many"}, ["epochs must be a whole number"]),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, method: object, parts: list[str]) -> None:
    file = written(tmp_path, "mine.yaml", method)
    sentence = refusal([file])
    assert not [part for part in (file, *parts) if part not in sentence], sentence


def test_a_file_may_not_take_the_name_of_another_line(tmp_path: Path) -> None:
    assert "lora twice" in refusal(["lora", written(tmp_path, "lora.yaml", {"name": "lora", "rank": 3})])


def test_the_same_budget_takes_how_long_how_fast_and_how_large_from_a_file(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "epochs": 9,
        "batch_size": 5,
        "learning_rate": 1.0,
        "head_learning_rate": 1.0,
        "rank": 3,
    }
    kept = {"projections": "qkv", "tau": 3.0}
    own |= {"learning_rate": 1.0, "head_learning_rate": 1.0}
    own |= {
        "optimizer": "sgd",
        "schedule": "constant",
        "weight_decay": 0.1,
        "min_steps": 7,
        "first_epochs": 2,
        "class_weights": "balanced",
    }
    budget = {**own, "first_adapted_layer": 0}
    file = written(tmp_path, "mine.yaml", {"name": "lora", **budget, **kept})
    assert only([file]).config == METHODS["lora"].config(**budget, **kept)
    assert only([file], same_budget=True).config == METHODS["lora"].config(**kept)
    dual = written(tmp_path, "dual.yaml", {"name": "duallora", "residual_rank": 3, "residual": "own"})
    assert only([dual], same_budget=True).config == METHODS["duallora"].config(
        residual="own", rank=10, residual_rank=10
    )
    assert set(budget) | {"residual_rank"} == lines_module.BUDGET_FIELDS


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("methods/")])
def test_every_shipped_line_is_valid_with_and_without_the_same_budget(name: str) -> None:
    stem = name.removeprefix("methods/")
    own = _own(stem)
    found = only([stem])
    assert found.name == stem
    assert {field: vars(found.config)[field] for field in own} == own
    reset = only([stem], same_budget=True).config
    default = METHODS[found.method].config()
    for field, value in vars(reset).items():
        # A method itself is at its defaults then; what makes a variant one stays.
        of_variant = stem not in METHODS and field in own and field not in BUDGET_FIELDS
        if field in ("rank", "residual_rank") and getattr(reset, "residual", "none") != "none":
            continue
        assert value == (own[field] if of_variant else vars(default)[field]), field
    if getattr(reset, "residual", "none") != "none":  # two adapters have no more than one
        whole = sum(vars(reset)[name] for name in ("rank", "residual_rank"))
        both = sum(vars(default)[name] for name in ("rank", "residual_rank"))
        assert whole == (vars(default)["rank"] if "residual" in own else both)


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("sd-lora", ("sgd", "constant", 0.0, 0.008)),
        ("ranpac", ("sgd", "cosine", 5e-4, 0.01)),
        ("slca", ("sgd", "step", 5e-4, 0.01)),
        ("o-lora", ("adam", "constant", 0.0, 0.005)),
        ("l2p", ("adam", "constant", 0.0, 0.001875)),
        ("sldc", ("adamw", "cosine", 3e-5, 0.001)),
    ],
)
def test_the_optimiser_of_a_paper_is_not_that_of_the_same_budget(name: str, paper: tuple[Any, ...]) -> None:
    def found(same_budget: bool) -> tuple[Any, ...]:
        config = only([name], same_budget=same_budget).config
        return config.optimizer, config.schedule, config.weight_decay, config.head_learning_rate

    assert found(same_budget=False) == paper
    assert found(same_budget=True) == ("adam", "cosine", 0.0, 0.005)


def test_every_shipped_line_says_what_it_is_and_where_values_are_from() -> None:
    folder = Path(cast(str, lines_module.__file__)).parent.parent / "configs" / "methods"
    assert {f"methods/{path.stem}" for path in folder.iterdir()} <= set(shipped_configs())
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text().splitlines()
        assert text[0].startswith("# "), path.name
        values = [row for row in text if re.match(r"  \w+: ", row) and not row.startswith("  name:")]
        paper = METHODS[read_config(f"methods/{path.stem}")["method"]["name"]].method.paper
        own = path.stem not in ("duallora-heads", "duallora-o", "duallora-paper")
        # One comment for a block of values of one source is enough; a value of a paper has its own.
        assert not own or sum("#" in row for row in values) >= len(values) - 1, path.name
        assert paper, path.name


def test_shared_fields_lose_to_a_file_and_win_with_the_same_budget(tmp_path: Path) -> None:
    file = written(tmp_path, "mine.yaml", {"name": "lora", "epochs": 9, "projections": "qkv"})
    shared = {"epochs": 1, "projections": "qv", "batch_size": 7}
    own, same = only([file], shared).config, only([file], shared, same_budget=True).config
    assert own == METHODS["lora"].config(epochs=9, min_steps=0, projections="qkv", batch_size=7)
    assert same == METHODS["lora"].config(epochs=1, min_steps=0, projections="qv", batch_size=7)
    assert only(["lora"], shared).config == same


def test_shared_fields_go_to_the_lines_that_have_them() -> None:
    dual, lora = read_lines(["duallora", "lora"], {"residual": "own", "epochs": 2}, False)
    assert dual.config == METHODS["duallora"].config(residual="own", epochs=2, min_steps=0)
    assert lora.config == METHODS["lora"].config(epochs=2, min_steps=0)
    assert "--method.residual" in refusal(["lora", "ncm"], {"residual": "own"})
    assert "epochs must be above 0" in refusal(["lora"], {"epochs": 0})
