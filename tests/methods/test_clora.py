"""CLoRA: what the layers share, what is their own, and what keeps the shared matrices apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import assert_same_state, new_learner, reloaded, small_config, three_tasks
from tiny import FAMILIES, tiny_backbone, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora import ContinualLearner, DualLoRAError
from duallora.methods import Batch
from duallora.methods.clora import Bases, Combined, SharedLoRA, SharedLoRAConfig

DEPTH, WIDTH, OUT = 4, 32, 64  # three adapted layers
PAIRS, HALF = 3, 2


def fresh(**changes: Any) -> tuple[ContinualLearner, SharedLoRA]:
    learner = new_learner(small_config("clora", **{"pairs": PAIRS, "rank": 2 * HALF, **changes}), depth=DEPTH)
    assert isinstance(learner.method, SharedLoRA)
    return learner, learner.method


def layers(method: SharedLoRA) -> list[Combined]:
    return [update for update in method.adapters.values() if isinstance(update, Combined)]


def fill(method: SharedLoRA) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in method.adapters.parameters():
        parameter.data.normal_(std=0.3, generator=generator)


def batch_of(learner: ContinualLearner) -> Batch:
    data = three_tasks()[0]
    images = torch.stack([learner.preprocess(image) for image in data.images])
    return Batch(images, torch.tensor(data.targets), torch.arange(len(data)))


def pairs_of(bases: Bases) -> list[tuple[Tensor, Tensor]]:
    """(D_i, U_i), cut out by hand."""
    cuts = [slice(i * HALF, (i + 1) * HALF) for i in range(bases.pairs)]
    return [(bases.d[:, cut], bases.u[cut]) for cut in cuts]


def test_each_layer_is_the_formula() -> None:
    _, method = fresh()
    fill(method)
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    assert len(layers(method)) == 3
    for update in layers(method):
        assert update.c.shape == (PAIRS, HALF)
        delta = torch.zeros(WIDTH, OUT, dtype=torch.float64)
        for (d, u), c in zip(pairs_of(method.bases), update.c, strict=True):
            assert d.shape == (WIDTH, HALF) and u.shape == (HALF, OUT)
            delta += d.double() @ torch.diag(c.double()) @ u.double()
        torch.testing.assert_close(update(x).double(), x.double() @ delta, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(update.delta_weight().double(), delta, rtol=1e-5, atol=1e-5)


def assert_shared(method: SharedLoRA) -> None:
    for wrapper in method.beside.values():
        assert isinstance(wrapper.update, Combined)
        (bases,) = wrapper.update.shared
        assert bases is method.bases is method.adapters["shared"]
        assert [name for name, _ in wrapper.update.named_parameters()] == ["c"]


def test_all_layers_hold_the_same_tensors(tmp_path: Path) -> None:
    learner, method = fresh()
    assert_shared(method)
    learner.learn(three_tasks()[0])
    assert_shared(method)
    loaded = reloaded(learner, tmp_path, depth=DEPTH)
    assert isinstance(loaded.method, SharedLoRA)
    assert_shared(loaded.method)
    for each in (learner, loaded):
        each.learn(three_tasks()[1])
    assert_same_state(loaded, learner)


def test_each_tensor_is_stored_and_trained_once() -> None:
    learner, method = fresh()
    record = learner.learn(three_tasks()[0])
    state = {name: x for name, x in method.state().items() if name.startswith("adapters")}
    own = {f"adapters.{layer}.c" for layer in (1, 2, 3)}
    assert state.keys() == own | {"adapters.shared.d", "adapters.shared.u"}
    assert len({x.data_ptr() for x in state.values()}) == len(state)
    count = PAIRS * HALF * (WIDTH + OUT) + 3 * PAIRS * HALF
    assert sum(x.numel() for x in state.values()) == count
    assert record.trainable_parameters == count + 2 * WIDTH + 2
    trained = [id(p) for group in method.parameter_groups() for p in group["params"]]
    assert len(trained) == len(set(trained)) == 2 + 2 + 3


def test_the_start_is_zero_but_learns() -> None:
    learner, method = fresh()
    for update in layers(method):
        assert not update.delta_weight().any() and update.c.eq(1).all()
    bare = tiny_backbone(depth=DEPTH)(tiny_images())
    torch.testing.assert_close(method.extract(tiny_images()), bare)
    before = {name: x.clone() for name, x in method.adapters.state_dict().items()}
    gradients: list[float] = []
    step = method.after_step

    def noted() -> None:
        if not gradients:
            assert method.bases.u.grad is not None
            gradients.append(float(method.bases.u.grad.abs().min()))
        step()

    method.after_step = noted  # type: ignore[method-assign]
    learner.learn(three_tasks()[0])
    assert gradients[0] > 0, "every row of U has a gradient at the first step"
    after = method.adapters.state_dict()
    assert all(not torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_shared_matrices_learn_from_every_layer(layer: int) -> None:
    learner, method = fresh(diversity=0.0)
    learner.learn(three_tasks()[0])
    for wrapper in method.beside.values():
        wrapper.separate()
    fill(method)
    for i, update in enumerate(layers(method)):
        if i != layer:
            update.c.data.zero_()
    method.adapters.zero_grad()
    method.loss(batch_of(learner)).backward()
    for parameter in (method.bases.d, method.bases.u, layers(method)[layer].c):
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6
    for update in layers(method):
        update.c.data.zero_()
    method.adapters.zero_grad()
    method.loss(batch_of(learner)).backward()
    for parameter in (method.bases.d, method.bases.u):
        assert not parameter.grad.any(), "no layer is left to learn from"


def similarity(matrices: list[Tensor]) -> list[float]:
    """Squared cosines of all pairs of different matrices, entry by entry."""
    found = []
    for i, a in enumerate(matrices):
        for b in matrices[i + 1 :]:
            a, b = a.detach().double(), b.detach().double()
            found.append(float((a * b).sum() ** 2 / ((a * a).sum() * (b * b).sum())))
    return found


def test_sade_is_the_formula() -> None:
    learner, method = fresh(diversity=0.7)
    learner.learn(three_tasks()[0])
    fill(method)
    cut = pairs_of(method.bases)
    cosines = [*similarity([d for d, _ in cut]), *similarity([u for _, u in cut])]
    assert len(cosines) == 6
    expected = sum(cosines) / 6
    assert expected > 1e-4
    torch.testing.assert_close(float(method.bases.similarity().detach()), expected, rtol=1e-4, atol=1e-7)
    batch = batch_of(learner)
    entropy = F.cross_entropy(method.heads.tasks[0](method.features(batch.images)[:, :WIDTH]), batch.labels)
    extra = float((method.loss(batch) - entropy).detach())
    assert extra == pytest.approx(0.7 * expected, abs=1e-6)


def test_sade_is_one_for_equal_and_zero_for_orthogonal_matrices() -> None:
    bases = Bases(WIDTH, OUT, PAIRS, HALF, torch.Generator().manual_seed(0))
    bases.d.data = bases.d.data[:, :HALF].repeat(1, PAIRS) * torch.tensor([1.0, 1, 5, 5, -2, -2])
    bases.u.data = torch.ones(PAIRS * HALF, OUT)
    torch.testing.assert_close(bases.similarity(), torch.tensor(1.0))
    bases.d.data = torch.eye(WIDTH, PAIRS * HALF)
    bases.u.data = torch.eye(PAIRS * HALF, OUT)
    assert bases.similarity() == 0


def test_sade_where_it_is_not_defined() -> None:
    start = Bases(WIDTH, OUT, PAIRS, HALF, torch.Generator().manual_seed(0))  # U is zero
    start.similarity().backward()
    assert start.d.grad is not None and start.d.grad.abs().max() > 0
    assert start.u.grad is not None and start.u.grad.eq(0).all()
    alone = Bases(WIDTH, OUT, 1, HALF, torch.Generator().manual_seed(0))
    assert alone.similarity() == 0
    learner, _ = fresh(pairs=1)
    learner.learn(three_tasks()[0])


def test_sade_drives_the_matrices_apart() -> None:
    bases = Bases(WIDTH, OUT, PAIRS, HALF, torch.Generator().manual_seed(0))
    bases.d.data = bases.d.data + 0.2
    bases.u.data = torch.ones(PAIRS * HALF, OUT) + torch.randn(
        PAIRS * HALF, OUT, generator=torch.Generator().manual_seed(1)
    )
    before = float(bases.similarity().detach())
    adam = torch.optim.Adam(bases.parameters(), 1e-2)
    for _ in range(50):
        adam.zero_grad()
        bases.similarity().backward()
        adam.step()
    assert float(bases.similarity().detach()) < before / 4


@pytest.mark.parametrize(("rank", "half"), [(1, 1), (4, 2), (5, 3), (0, 0)])
def test_the_rank_of_a_pair_is_half_the_rank(rank: int, half: int) -> None:
    learner, method = fresh(rank=rank)
    assert method.bases.d.shape == (WIDTH, PAIRS * half)
    learner.learn(three_tasks()[0])
    assert method.extract(tiny_images()).isfinite().all()


def test_no_pair_at_all_is_refused() -> None:
    with pytest.raises(DualLoRAError, match="pairs must be above 0"):
        SharedLoRAConfig(pairs=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    backbone = tiny_backbone(family)
    bare = backbone(tiny_images())
    learner = ContinualLearner(backbone, small_config("clora"), device="cpu")
    assert isinstance(learner.method, SharedLoRA)
    torch.testing.assert_close(learner.method.extract(tiny_images()), bare)
    fill(learner.method)
    assert (learner.method.extract(tiny_images()) - bare).abs().max() > 1e-3
