"""Every field of a configuration does something, and refuses what it cannot mean."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from small_tasks import (
    Patterns,
    assert_same_outputs,
    assert_same_state,
    new_learner,
    reloaded,
    small_config,
    three_tasks,
    unseen,
)

from duallora import METHODS, ContinualLearner, DualLoRAConfig, DualLoRAError, FrozenConfig, LoRAConfig
from duallora.methods.config import MethodConfig
from duallora.methods.ranpac import RanPACConfig
from duallora.outputs import Outputs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no direction is left")]

DEPTH = 3  # adapters in layers 1 and 2, so that a gate at every layer is not the gate at the first one
LOGS = ("heads", "calibrated", "task_posterior", "features", "gate")

# Changes of the small configuration: those compared with, the option itself, and which outputs must differ;
# the others must be equal bit for bit.
EVERYTHING = ("heads", "calibrated", "task_posterior", "features")
CALIBRATED = ("calibrated",)
Case = tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]
CASES: list[Case] = [
    ({}, {"rank": 2}, EVERYTHING),
    ({}, {"residual_rank": 2}, EVERYTHING),
    ({}, {"projections": "qv"}, EVERYTHING),
    ({}, {"projections": "qkv"}, EVERYTHING),
    ({}, {"moments": "class_token"}, EVERYTHING),
    ({"moments": "class_token"}, {"projections": "qkv"}, EVERYTHING),
    ({}, {"energy_threshold": 0.5}, EVERYTHING),
    ({}, {"residual": "protected"}, EVERYTHING),
    ({}, {"residual": "own"}, EVERYTHING),
    ({}, {"residual": "none"}, EVERYTHING),
    ({}, {"relevance": "energy"}, EVERYTHING),
    ({}, {"gate": "layer"}, EVERYTHING),
    ({}, {"gate": "off"}, EVERYTHING),
    ({}, {"first_adapted_layer": 2}, EVERYTHING),
    ({"gate": "layer"}, {"first_adapted_layer": 0}, EVERYTHING),
    ({"gate": "off"}, {"first_adapted_layer": 0}, EVERYTHING),
    ({}, {"first_adapted_layer": 1}, ()),
    ({}, {"top_tasks": 1}, EVERYTHING),
    ({}, {"top_tasks": 3}, ()),
    ({}, {"learning_rate": 1e-2}, EVERYTHING),
    ({}, {"head_learning_rate": 1e-2}, EVERYTHING),
    ({}, {"epochs": 2}, EVERYTHING),
    ({}, {"first_epochs": 2}, EVERYTHING),
    ({}, {"min_steps": 5}, EVERYTHING),
    ({}, {"batch_size": 5}, EVERYTHING),
    ({}, {"class_weights": "balanced"}, ()),  # the small tasks have as many images of every class
    ({}, {"optimizer": "adamw"}, ()),
    ({"optimizer": "adamw"}, {"weight_decay": 0.5}, EVERYTHING),
    ({}, {"optimizer": "sgd"}, EVERYTHING),
    ({}, {"schedule": "constant"}, EVERYTHING),
    ({}, {"schedule": "quarter-cosine"}, EVERYTHING),
    ({"epochs": 6}, {"schedule": "step"}, EVERYTHING),
    ({}, {"weight_decay": 0.1}, EVERYTHING),
    ({}, {"calibration": "task"}, CALIBRATED),
    ({}, {"calibration": "none"}, CALIBRATED),
    ({}, {"tau": 2.0}, ()),
    ({"calibration": "task"}, {"tau": 2.0}, CALIBRATED),
    ({"calibration": "task"}, {"tau": 0.0}, CALIBRATED),
    ({"calibration": "task"}, {"relevance": "energy"}, EVERYTHING),
]


def learned(tasks: int = 3, method: str = "duallora", **changes: Any) -> ContinualLearner:
    learner = new_learner(small_config(method, **changes), depth=DEPTH)
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    return learner


@cache
def outputs_of(method: str, changes: tuple[tuple[str, Any], ...]) -> Outputs:
    return learned(method=method, **dict(changes)).outputs(unseen(three_tasks()))


def differing(found: Outputs, expected: Outputs) -> list[str]:
    """Outputs that are not equal bit for bit."""

    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return [name for name in EVERYTHING if not equal(getattr(found, name), getattr(expected, name))]


def named(case: Case) -> str:
    start, change, _ = case
    return ", ".join(f"{key}={value}" for key, value in {**start, **change}.items())


@pytest.mark.parametrize("case", CASES, ids=named)
def test_an_option_of_duallora(case: Case, tmp_path: Path) -> None:
    start, change, expected = case
    data = unseen(three_tasks())
    learner = learned(**start, **change)
    outputs = learner.outputs(data)
    for name in LOGS:
        values = getattr(outputs, name)
        assert values is None or (not values.isnan().any() and not values.isposinf().any()), name
    loaded = reloaded(learner, tmp_path / "model", depth=DEPTH)
    assert loaded.config == learner.config
    assert_same_outputs(loaded.outputs(data), outputs)
    resumed = reloaded(learned(1, **start, **change), tmp_path / "first", depth=DEPTH)
    for task in three_tasks()[1:]:
        resumed.learn(task)
    assert_same_state(resumed, learner)
    assert differing(outputs, outputs_of("duallora", tuple(start.items()))) == list(expected)
    assert len(learner.predict(data.images[:2])) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank": 2}, EVERYTHING),
        ({"projections": "qv"}, EVERYTHING),
        ({"projections": "qkv"}, EVERYTHING),
        ({"first_adapted_layer": 2}, EVERYTHING),
        ({"first_adapted_layer": 0}, EVERYTHING),
        ({"learning_rate": 1e-2}, EVERYTHING),
        ({"calibration": "none"}, CALIBRATED),
    ],
    ids=str,
)
def test_an_option_of_lora(change: dict[str, Any], expected: tuple[str, ...], tmp_path: Path) -> None:
    learner = learned(method="lora", **change)
    outputs = learner.outputs(unseen(three_tasks()))
    assert_same_outputs(reloaded(learner, tmp_path, depth=DEPTH).outputs(unseen(three_tasks())), outputs)
    assert differing(outputs, outputs_of("lora", ())) == list(expected)


@pytest.mark.parametrize("change", [{"random_features": 24}, {"ridge": 1e4}], ids=str)
def test_an_option_of_ranpac(change: dict[str, Any], tmp_path: Path) -> None:
    """The ridge regression stands for the heads: rows and features have nothing to do with it."""
    learner = learned(method="ranpac", **change)
    outputs = learner.outputs(unseen(three_tasks()))
    assert_same_outputs(reloaded(learner, tmp_path, depth=DEPTH).outputs(unseen(three_tasks())), outputs)
    assert differing(outputs, outputs_of("ranpac", ())) == ["heads", "calibrated"]


@pytest.mark.parametrize("name", ["class_model", "random_features", "ridge"])
def test_only_ranpac_has_random_features(name: str) -> None:
    for entry in METHODS.values():
        known = {field.name for field in fields(entry.config)}
        assert (name in known) == (entry.config is RanPACConfig and name != "class_model"), entry.config


def test_every_field_and_every_choice_is_tried() -> None:
    plain = small_config()
    tried = {field.name: {field.default, getattr(plain, field.name)} for field in fields(DualLoRAConfig)}
    for start, change, _ in CASES:
        for key, value in {**start, **change}.items():
            tried[key].add(value)
    hints = get_type_hints(DualLoRAConfig)
    for name, values in tried.items():
        assert len(values) > 1, name
        if get_origin(hints[name]) is Literal:
            assert values == set(get_args(hints[name])), name


def test_the_first_choice_is_the_default() -> None:
    for entry in METHODS.values():
        hints = get_type_hints(entry.config)
        for field in fields(entry.config):
            if get_origin(hints[field.name]) is Literal:
                assert get_args(hints[field.name])[0] == field.default, field.name


COMBINATIONS = list(
    itertools.product(
        ("next", "protected", "own", "none"),
        ("gaussian", "energy"),
        ("first", "layer", "off"),
        ("class", "task"),
    )
)


@pytest.mark.parametrize(("residual", "relevance", "gate", "calibration"), COMBINATIONS)
def test_options_together(residual: str, relevance: str, gate: str, calibration: str, tmp_path: Path) -> None:
    index = COMBINATIONS.index((residual, relevance, gate, calibration))
    changes = {
        "residual": residual,
        "relevance": relevance,
        "gate": gate,
        "calibration": calibration,
        "moments": ("tokens", "class_token")[index % 5 > 2],
        "projections": ("kv", "qv", "qkv")[index % 7 % 3],
        "top_tasks": 1 + index % 3,
    }
    tasks = [Patterns(["ant", "bee"], 4), Patterns(["cat"], 3), Patterns(["dog", "elk"], [1, 5])]
    learner = new_learner(small_config(**changes), depth=DEPTH)
    for task in tasks:
        learner.learn(task)
    outputs = learner.outputs(unseen(tasks))
    loaded = reloaded(learner, tmp_path, depth=DEPTH)
    assert_same_outputs(loaded.outputs(unseen(tasks)), outputs)  # which refuses NaN
    assert outputs.calibrated is not None
    torch.testing.assert_close(outputs.calibrated.exp().sum(1), torch.ones(len(outputs.heads)))
    assert (outputs.gate is None) == (residual == "none")
    if outputs.gate is not None and gate == "off":
        assert torch.equal(outputs.gate, torch.ones_like(outputs.gate))
    elif outputs.gate is not None and gate == "first":
        assert int((outputs.gate > 0).sum(1).max()) <= changes["top_tasks"]


def test_an_exhausted_complement_is_lived_with() -> None:
    learner = new_learner(small_config(energy_threshold=1.0, rank=10, residual_rank=10), depth=DEPTH)
    learner.learn(three_tasks()[0])
    with pytest.warns(UserWarning, match="no direction is left"):
        for task in three_tasks()[1:]:
            learner.learn(task)
    assert_finite(learner)


@pytest.mark.parametrize("residual", ["own", "protected"])
def test_own_and_protected_carry_on_in_an_exhausted_complement(residual: str) -> None:
    learner = new_learner(small_config(energy_threshold=1.0, residual=residual), depth=DEPTH)
    for task in three_tasks():
        record = learner.learn(task)
    assert record.orthogonal_norm == 0.0
    assert record.residual_norm is not None and record.residual_norm > 0
    assert_finite(learner)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"rank": 0}),
        ("duallora", {"rank": 0}),
        ("duallora", {"residual_rank": 0}),
        ("duallora", {"rank": 0, "residual_rank": 0}),
    ],
)
def test_a_rank_of_zero_leaves_an_adapter_out(method: str, changes: dict[str, int], recwarn: Any) -> None:
    learner = learned(method=method, **changes)
    assert_finite(learner)
    assert not [w for w in recwarn if "energy_threshold" in str(w.message)], (
        "there is room: none was asked for"
    )


def test_a_rank_beyond_the_width_is_capped() -> None:
    learner = learned(rank=100, residual_rank=100)
    assert_finite(learner)


@pytest.mark.parametrize("tau", [1.0, 0.0])
def test_an_empty_basis_has_no_say_in_the_energy_posterior(tau: float) -> None:
    """A repeated task adds no direction: it is left out of the posterior, which stays one."""
    learner = new_learner(
        small_config(relevance="energy", calibration="task", tau=tau, energy_threshold=0.3), depth=DEPTH
    )
    for shift in (0.0, 1.0, 2.0):
        learner.learn(Patterns(["ant", "bee"], 6, shift=shift))
    blocks = next(iter(learner.method.subspaces.values())).sizes.tolist()
    assert 0 in blocks, "the case did not come up"
    outputs = learner.outputs(three_tasks()[0])
    assert outputs.calibrated is not None and outputs.task_posterior is not None and outputs.gate is not None
    torch.testing.assert_close(outputs.calibrated.exp().sum(1), torch.ones(len(outputs.heads)))
    assert outputs.task_posterior.exp()[:, blocks.index(0)].eq(0).all()
    assert outputs.gate[:, blocks.index(0)].eq(0).all()


def assert_finite(learner: ContinualLearner) -> None:
    outputs = learner.outputs(unseen(three_tasks()))
    assert outputs.heads.isfinite().all() and outputs.features.isfinite().all()
    assert outputs.calibrated is not None and not outputs.calibrated.isnan().any()


CHOICES = [
    *("projections", "moments", "residual", "relevance", "gate"),
    "calibration",
]


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused_with_the_valid_ones(name: str) -> None:
    valid = get_args(get_type_hints(DualLoRAConfig)[name])
    for value in ("sideways", valid[0].upper(), None, 1):
        with pytest.raises(DualLoRAError, match=f"^{name} must be one of {', '.join(valid)}"):
            DualLoRAConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rank", [-1, 2.5, "4", None, math.nan]),
        ("residual_rank", [-1, 2.5, "4", None]),
        ("epochs", [0, -1, 1.5, "4", None, math.inf]),
        ("batch_size", [0, -8, 2.5, None]),
        ("top_tasks", [0, -1, 1.5, None]),
        ("first_adapted_layer", [-1, 1.5, "2"]),
        ("learning_rate", [0, -1e-3, math.nan, math.inf, "fast", None]),
        ("head_learning_rate", [0, -1e-3, math.nan, math.inf, None]),
        ("energy_threshold", [0, 1.01, -0.5, math.nan, "most", None]),
        ("tau", [-1, math.nan, math.inf, None]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, values: list[Any]) -> None:
    assert_refused(DualLoRAConfig, name, values)


@pytest.mark.parametrize(
    ("name", "values"),
    [("random_features", [0, -1, 1.5, None]), ("ridge", [0, -1, math.nan, math.inf, "small"])],
)
def test_a_value_out_of_range_is_refused_by_ranpac(name: str, values: list[Any]) -> None:
    assert_refused(RanPACConfig, name, values)


def assert_refused(config: type[MethodConfig], name: str, values: list[Any]) -> None:
    accepted = []
    for value in values:
        try:
            config(**{name: value})
        except DualLoRAError as error:
            assert name in str(error), error
            continue
        except TypeError as error:
            accepted.append(f"{value!r} ({error})")
            continue
        accepted.append(repr(value))
    assert not accepted, f"{name} = {', '.join(accepted)}"


@pytest.mark.parametrize("config", [FrozenConfig, LoRAConfig])
def test_the_controls_refuse_as_well(config: Any) -> None:
    with pytest.raises(DualLoRAError, match="epochs must be above 0"):
        config(epochs=0)
    with pytest.raises(DualLoRAError, match="calibration must be one of class, task, none"):
        config(calibration="both")


def test_contradictions_are_refused() -> None:
    with pytest.raises(DualLoRAError, match="first_adapted_layer=0 leaves no frozen layer"):
        DualLoRAConfig(first_adapted_layer=0, residual="own")
    for method in ("duallora", "lora"):
        with pytest.raises(DualLoRAError, match="first_adapted_layer must be below 3"):
            new_learner(small_config(method, first_adapted_layer=3), depth=DEPTH)


def test_valid_limits_are_accepted() -> None:
    DualLoRAConfig(energy_threshold=1, tau=0, first_adapted_layer=None, top_tasks=1)
    RanPACConfig(ridge=None, random_features=1)
    DualLoRAConfig(first_adapted_layer=0, residual="own", gate="off")
    DualLoRAConfig(first_adapted_layer=0, residual="none")  # nothing for a gate to read
    DualLoRAConfig(learning_rate=1, tau=1)  # an int where a float is meant
    RanPACConfig(ridge=1)


def test_the_linear_probe_and_frozen_features_differ_in_heads_and_readout_alone() -> None:
    linear, frozen = outputs_of("linear", ()), outputs_of("frozen", ())
    assert (linear.readout, frozen.readout) == ("heads", "calibrated")
    assert differing(linear, frozen) == ["heads", "calibrated"]  # of frozen features they start from the rows
