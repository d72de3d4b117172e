"""What is sent of a model is read once and is what was checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from duallora.errors import DualLoRAError
from duallora.sharing import outgoing
from duallora.sharing.outgoing import prepare
from duallora.sharing.place import HubPlace
from duallora.storage import checkpoint, copied

PLACE = HubPlace("jane/birds")


def test_a_model_is_read_and_checked_once(
    shared_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    read, check = checkpoint.read, outgoing.check
    monkeypatch.setattr(checkpoint, "read", lambda folder: done.append("read") or read(folder))
    for module in (outgoing, copied):
        monkeypatch.setattr(module, "check", lambda *model: done.append("check") or check(*model))
    prepare(shared_model, tmp_path / "sent", PLACE, None)
    assert done == ["read", "check"]


@pytest.mark.parametrize("gone", [True, False])
def test_what_changes_after_the_check_is_not_sent(
    shared_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    real = outgoing.model_card

    def meanwhile(*given: object) -> str:
        (weights,) = shared_model.glob("*.safetensors")
        if gone:
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(outgoing, "model_card", meanwhile)
    with pytest.raises(DualLoRAError, match="has changed meanwhile; repeat the command"):
        prepare(shared_model, tmp_path / "sent", PLACE, None)
    assert not (tmp_path / "sent" / "model.json").exists()
