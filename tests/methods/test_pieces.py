"""A batch in the fewest pieces that fit: found by trying, and the step stays the same."""

from __future__ import annotations

import pytest
import torch
from small_tasks import new_learner, small_config, three_tasks

from duallora import DualLoRAError, methods, training
from duallora.methods.interface import Batch
from duallora.methods.pieces import Pieces


def batch(images: int) -> Batch:
    return Batch(torch.arange(images).float()[:, None], torch.arange(images), torch.arange(images))


class Memory:
    """Holds so many images at a time, and fails as a GPU does with more."""

    def __init__(self, holds: int) -> None:
        self.holds, self.asked = holds, []

    def __call__(self, drawn):
        total = 0.0
        for part, share in drawn:
            self.asked.append(len(part.labels))
            if len(part.labels) > self.holds:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            total += float(part.images.mean()) * share
        return total


@pytest.mark.parametrize("holds", [32, 31, 16, 7, 1])
def test_the_sum_over_pieces_is_the_mean_over_the_batch(holds):
    memory, fitting = Memory(holds), Pieces(tries=True)
    assert fitting.run([(batch(32), 1.0)], memory) == pytest.approx(15.5)
    assert max(memory.asked[-2:]) <= holds
    memory.asked.clear()
    assert fitting.run([(batch(32), 1.0)], memory) == pytest.approx(15.5)
    assert max(memory.asked) <= holds, "what did not fit once is not tried again"
    assert max(memory.asked) > holds / 2 or holds == 32, "not smaller than needed"


def test_pieces_that_are_asked_for_are_divided_too():
    memory = Memory(3)
    halves = [(batch(8), 0.25), (batch(24), 0.75)]
    assert Pieces(tries=True).run(halves, memory) == pytest.approx(3.5 * 0.25 + 11.5 * 0.75)


def test_a_single_image_that_does_not_fit_is_the_callers():
    memory = Memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        Pieces(tries=True).run([(batch(4), 1.0)], memory)
    assert memory.asked == [4, 2, 1]


def test_nothing_is_tried_unasked_and_other_errors_pass():
    memory = Memory(2)
    with pytest.raises(torch.OutOfMemoryError):
        Pieces(tries=False).run([(batch(4), 1.0)], memory)
    assert memory.asked == [4]

    def broken(_):
        raise ValueError("other")

    with pytest.raises(ValueError, match="other"):
        Pieces(tries=True).run([(batch(4), 1.0)], broken)


@pytest.mark.parametrize("name", ["lora", "duallora", "sldc"])
def test_training_in_pieces_takes_the_same_steps(name, monkeypatch):
    """On a stand-in for a GPU whose memory holds three images; sums are rounded in another order."""
    whole = new_learner(small_config(name, batch_size="auto"))
    whole.learn(three_tasks()[1])
    monkeypatch.setattr(training, "Pieces", lambda tries: Pieces(True))
    divided = new_learner(small_config(name, batch_size="auto"))
    real, sizes = divided.method.loss, []

    def loss(batch):
        sizes.append(len(batch.labels))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(batch)

    monkeypatch.setattr(divided.method, "loss", loss)
    divided.learn(three_tasks()[1])
    assert sizes[:4] == [18, 9, 5, 2] or sizes[0] == 18
    assert set(sizes[sizes.index(3) if 3 in sizes else -1 :]) <= {2, 3}
    state = divided.method.state()
    for key, value in whole.method.state().items():
        torch.testing.assert_close(state[key], value, atol=1e-3, rtol=1e-2)


def test_auto_is_the_default_number_on_a_cpu(monkeypatch):
    made = []
    monkeypatch.setattr(training, "Pieces", lambda tries: made.append(tries) or Pieces(tries))
    record = new_learner(small_config("lora", batch_size="auto")).learn(three_tasks()[1])
    assert made == [False] and record.epochs == 1
    assert small_config("lora", batch_size="auto").step_images == methods.MethodConfig().step_images == 32


def test_another_word_is_refused():
    with pytest.raises(DualLoRAError, match="batch_size must be a whole number or auto, not 'many'"):
        small_config("lora", batch_size="many")
