"""The view Try: where the slider for unknown images begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Call, images

pytest.importorskip("gradio", reason="the extra app is not installed")

import gradio as gr

from duallora.app.answer_report import BELOW
from duallora.app.session import Session
from duallora.app.shell import Shell
from duallora.app.uploads import Uploads
from duallora.app.view_try import Try
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest

A, B = (SimpleNamespace(session_hash=name) for name in "ab")


def test_the_slider_begins_at_the_models_own_value_and_stays_where_it_was_put(
    call: Call, tmp_path: Path
) -> None:
    (tmp_path / "uploads").mkdir()
    request = ModelRequest(MethodChoice("duallora", {}), device="cpu")
    session = Session(tmp_path / "model", request, Uploads(tmp_path / "uploads"))
    shell = Shell(session)
    with gr.Blocks():
        view = Try(shell)
    place = next(i for i, part in enumerate(shell.parts) if part is view.below)
    model = session.folder
    words = ("--epochs", 1, "--method.min_steps", 0)

    def slider(who: Any = A) -> Any:
        return shell.refresh(who)[place]

    skipped, plain = gr.skip(), view.below.info
    assert view.below.value == BELOW and slider() == skipped  # there is no model
    assert call("learn", model, images(tmp_path / "few", ["cat", "dog"], 4), *words).code == 0
    assert slider() == skipped  # it held no images back
    assert call("learn", model, images(tmp_path / "many", ["owl", "yak"], 30, seed=1), *words).code == 0
    (own,) = [task.unknown_below for task in session.tasks() if task.unknown_below is not None]
    moved = slider()
    assert moved["value"] == pytest.approx(own, abs=0.01) and moved["value"] > 0
    assert moved["info"].startswith(f"{moved['value']:.2f} is this model's own value. ")
    assert slider() == skipped  # whatever the user has chosen meanwhile
    assert slider(B) == moved
    assert call("undo", model).code == 0
    assert slider() == gr.update(value=BELOW, info=plain)
    session.close()
