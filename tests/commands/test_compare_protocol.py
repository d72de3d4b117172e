"""What the page of a comparison says of its protocol, and the list of methods."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from command_line import Call, caller
from compared_runs import line, result
from tiny import tiny_backbone

from duallora import METHODS, streams
from duallora.commands.compare_protocol import protocol
from duallora.commands.compared_methods import read_lines

DIGITS = streams.digits(3, classes=6, train_per_class=5, holdout=2)


# -- the protocol -------------------------------------------------------------------------------------------


def told(names: Sequence[str], same_budget: bool) -> list[str]:
    """What the page says of how these lines were trained and where they ran."""
    entries = []
    for found in read_lines(names, {}, same_budget):
        run = result(config={"method": {"name": found.method, **vars(found.config)}})
        run["environment"] = {"device": "cpu (x)", "threads": 1, "packages": {"torch": "2"}}
        if found.method != "duallora":  # the key is not in early results
            run["environment"]["precision"] = "bf16-mixed"
        for task in run["tasks"]:
            task["trainable_parameters"] *= found.method not in ("ncm", "ranpac")
        kind = METHODS[found.method].method
        entries.append(line(found.name, run, method=found.method, upper_bound=kind.all_at_once))
    setting = SimpleNamespace(stream=DIGITS, backbone=tiny_backbone(), augment="crop")
    sentences = protocol(entries, cast(Any, setting), same_budget)
    assert sentences[2] == "views of the training images: crop"
    return sentences[3:]


def test_one_budget_says_what_of_it_a_method_has() -> None:
    names = ["duallora", "lora", "duallora-paper", "l2p", "slca", "frozen", "ncm", "ranpac"]
    found = told(names, same_budget=True)
    steps = "4 epochs, at least 100 steps, batches of 32, Adam, cosine to zero"
    # Heads that begin as classifiers of their rows go on at a fifth of the rate.
    assert found[0] == (
        f"training: {steps}, heads at 0.001 (duallora, duallora-paper, frozen); "
        f"{steps}, heads at 0.005 (lora, l2p, slca)"
    )
    assert found[1] == (
        "beside the heads: what is adapted at 0.002, rank 20 + 20, layers from 1 on (duallora); "
        "what is adapted at 0.002, rank 20, layers from 1 on (lora); "
        "what is adapted at 0.002, rank 10 + 10, layers from 1 on (duallora-paper); "
        "what is adapted at 0.002 (l2p); the whole backbone at 5e-05 (slca); nothing (frozen)"
    )
    assert found[2] == "nothing is trained: ncm, ranpac"
    assert found[-1] == (
        "run on: cpu (x), 1 threads, torch 2; cpu (x), 1 threads, torch 2, precision bf16-mixed"
    )
    assert "budgets differ" not in " ".join(found)
    alike = told(["lora", "o-lora"], same_budget=True)
    assert alike[0] == f"one budget for all: {steps}, heads at 0.005"
    assert told(["lora"], same_budget=True)[1] == (
        "beside the heads: what is adapted at 0.002, rank 20, layers from 1 on"
    )
    assert told(["ncm"], same_budget=True)[0] == "nothing is trained: ncm"


def test_the_values_of_papers_are_told_line_by_line() -> None:
    found = told(["slca", "sd-lora", "lora", "joint"], same_budget=False)
    assert found[0] == (
        "training: 50 epochs, batches of 128, SGD, a tenth of the rate in the last fifth, "
        "weight decay 0.0005, heads at 0.01 (slca); "
        "20 epochs, batches of 128, SGD, constant rates, heads at 0.008 (sd-lora); "
        "4 epochs, at least 100 steps, batches of 32, Adam, cosine to zero, heads at 0.005 (lora); "
        "4 epochs, at least 100 steps, batches of 32, Adam, cosine to zero, heads at 0.001 (joint)"
    )
    assert found[1] == (
        "beside the heads: the whole backbone at 0.0001 (slca); "
        "what is adapted at 0.008, rank 10, layers from 0 on (sd-lora); "
        "what is adapted at 0.002, rank 20, layers from 1 on (lora, joint)"
    )
    assert "budgets differ (--same-budget gives one to all)" in found[2]
    assert "the defaults of the package: lora, joint; joint is no upper bound" in found[2]
    assert "budgets differ" not in " ".join(told(["lora", "linear"], same_budget=False))


# -- the list of methods ------------------------------------------------------------------------------------


def test_methods_are_listed_with_paper_and_what_they_store(capsys: pytest.CaptureFixture[str]) -> None:
    call: Call = caller(capsys)
    found = json.loads(call("methods", "--json").out)
    assert [entry["name"] for entry in found] == list(METHODS)
    for entry in found:
        method = METHODS[entry["name"]].method
        assert (entry["paper"], entry["stores"]) == (method.paper, method.stores)
        assert entry["summary"] and entry["paper"] and entry["stores"]
        assert (entry["reconstruction"], entry["forward_passes"]) == (
            method.reconstruction,
            method.forward_passes,
        )
        assert entry["more_passes"] == method.more_passes
    assert any(entry["reconstruction"] for entry in found)
    text = call("methods").out
    firsts = [row.split("│")[1].strip() for row in text.splitlines() if row.startswith("│")]
    assert [name for name in firsts if name] == list(METHODS)
    flat = " ".join(re.sub("[│┃]", " ", text).split())
    assert all(method.more_passes in flat for _, method in METHODS.values())
    assert flat.count("(reconstruction)") == sum(entry["reconstruction"] for entry in found)
