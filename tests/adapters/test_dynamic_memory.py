"""Weights of the residual adapters: by Gaussian rows, by energy, and selected."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from duallora.adapters.dynamic_memory import ENERGY_KAPPAS, DynamicMemory, EnergyMemory, GatePoint
from duallora.adapters.moments import TokenReader
from duallora.adapters.subspace import Subspace
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics

DIM, TASKS, CPU = 6, 6, torch.device("cpu")
near = partial(assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)


def task_images(task: int, classes: int = 2, per_class: int = 6, dim: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    labels = torch.arange(classes * per_class) % classes
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + 0.7 * torch.randn(len(labels), dim, generator=generator), labels


def probes(count: int = 12) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(77))


def gaussian_point(tasks: int = TASKS, top_tasks: int = 4, dim: int = DIM) -> GatePoint:
    point = GatePoint(dim, CPU, top_tasks, None)
    for task in range(tasks):
        features, labels = task_images(task, dim=dim)
        point.learn(task, features, labels, 2, None)
    return point


def naive_relevance(point: GatePoint, f: Tensor, tasks: int) -> Tensor:
    """``softmax over rows (kappa s)`` summed by task, from the stored moments, in fp64."""
    m = point.rows.moments
    freedom = float(m.count.sum()) - len(m.count)
    sigma = m.scatter / freedom
    sigma = sigma + (DIM / freedom) ** 1.5 / 2 * torch.diag(sigma.diagonal())
    inverse = torch.linalg.inv(sigma)
    result = []
    for image in f.double():
        scores = [
            math.exp(point.rows.kappa * float(image @ inverse @ mu - mu @ inverse @ mu / 2))
            for mu in m.mean[: 2 * tasks]
        ]
        result.append([(scores[2 * t] + scores[2 * t + 1]) / sum(scores) for t in range(tasks)])
    return torch.tensor(result)


def keep_top(weights: Tensor, count: int) -> Tensor:
    result = torch.zeros_like(weights)
    for i, row in enumerate(weights.tolist()):
        for t in sorted(range(len(row)), key=row.__getitem__, reverse=True)[:count]:
            result[i, t] = row[t]
    return result


# -- Gaussian rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_weights_are_the_posterior_summed_by_task(tasks: int) -> None:
    point = gaussian_point(tasks)
    found = point.weights(probes())
    near(found, naive_relevance(point, probes(), tasks))
    near(found.sum(1), torch.ones(12))
    assert 0.4 < float(found.max(1).values.mean()) < 0.99


@pytest.mark.parametrize("top_tasks", [1, 2, 4, 5])
def test_only_the_strongest_tasks_act_and_are_not_renormalised(top_tasks: int) -> None:
    point = gaussian_point(top_tasks=top_tasks)
    expected = keep_top(naive_relevance(point, probes(), TASKS), top_tasks)
    found = point.weights(probes())
    near(found, expected)
    assert ((found > 0).sum(1) == top_tasks).all()
    if top_tasks == 1:
        assert float(found.sum(1).min()) < 0.9, "renormalised weights would sum to 1"


def test_the_first_tasks_weight_is_one() -> None:
    assert torch.equal(gaussian_point(1).weights(probes()), torch.ones(12, 1))
    energy, _ = energy_point([3])
    assert torch.equal(energy.weights(probes()), torch.ones(12, 1))


def test_own_images_are_left_out_of_their_row() -> None:
    point = gaussian_point(3)
    f0, labels = task_images(2)
    own = point.rows.own(2, labels, f0)
    expected = (point.rows.kappa * point.rows.scores(f0, own)).softmax(1)
    summed = torch.stack([expected[:, 2 * t : 2 * t + 2].sum(1) for t in range(3)], 1)
    near(point.weights(f0, own), summed)
    assert float((point.weights(f0) - point.weights(f0, own))[:, 2].mean()) > 0.01, (
        "seen images look too familiar"
    )


def test_weights_take_no_gradient_and_no_autocast() -> None:
    point, f = gaussian_point(3), probes().requires_grad_()
    plain = point.weights(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = point.weights(f)
    assert not plain.requires_grad and torch.equal(plain, cast) and cast.dtype == torch.float32


def test_a_second_look_replaces_the_first() -> None:
    point, plain = gaussian_point(3), gaussian_point(2)
    features, labels = task_images(9)
    for target in (point, plain):
        target.learn(2, features, labels, 2, None)
    assert torch.equal(point.weights(probes()), plain.weights(probes()))
    assert torch.equal(point.f0, features)


# -- energy --------------------------------------------------------------------------------------------------


def energy_point(sizes: list[int], top_tasks: int = 4) -> tuple[GatePoint, list[Tensor]]:
    """A gate by energy whose tasks have the given numbers of basis vectors."""
    vectors = torch.linalg.qr(
        torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    )[0]
    subspace = Subspace(DIM)
    subspace.phi, subspace.sizes = vectors[:, : sum(sizes)], torch.tensor(list(sizes), dtype=torch.long)
    point = GatePoint(DIM, CPU, top_tasks, EnergyMemory(subspace, CPU))
    blocks = [subspace.block(task) for task in range(len(sizes))]
    for task, block in enumerate(blocks):
        features, labels = energy_images(task)
        point.learn(task, features, labels, 2, block)
    return point, blocks


def energy_images(task: int) -> tuple[Tensor, Tensor]:
    features, labels = task_images(task)
    return features * torch.linspace(1.5, 0.2, DIM).roll(2 * task), labels


def naive_energies(blocks: list[Tensor], f: Tensor) -> Tensor:
    """``|f N_j|^2 / |f|^2`` over its mean on the task's own images."""

    def shares(images: Tensor, block: Tensor) -> list[float]:
        found = []
        for image in images.double():
            found.append(
                sum(float(image @ block[:, k]) ** 2 for k in range(block.shape[1])) / float(image @ image)
            )
        return found

    columns = []
    for task, block in enumerate(blocks):
        own = shares(energy_images(task)[0], block)
        mean = sum(own) / len(own)
        columns.append(torch.tensor([value / mean if mean else 0.0 for value in shares(f, block)]))
    return torch.stack(columns, 1)


def test_energies_equal_the_formula_and_average_one_on_own_images() -> None:
    point, blocks = energy_point([3, 1, 2])
    near(point.energy.energies(probes()), naive_energies(blocks, probes()))
    for task in range(3):
        assert float(point.energy.energies(energy_images(task)[0])[:, task].mean()) == pytest.approx(
            1, rel=1e-5
        )


def test_energies_are_read_of_the_first_columns_alone() -> None:
    """The bases are those of the class token; the mean patch token stands behind it."""
    point, blocks = energy_point([3, 1, 2])
    other, energy = torch.randn(12, DIM, generator=torch.Generator().manual_seed(4)), point.energy
    wide = torch.cat([probes(), 5 * other], 1)
    near(energy.energies(wide), energy.energies(probes()))
    near(energy.log_posterior(wide), energy.log_posterior(probes()), atol=1e-3)
    features, _ = energy_images(2)
    mean, losses = float(energy.means[2]), energy.losses[2].clone()
    wide = torch.cat([features, features.flip(1)], 1)
    energy.replace(2, blocks[2], wide)
    energy.fit_temperature(2, wide)
    assert float(energy.means[2]) == pytest.approx(mean, rel=1e-5)
    near(energy.losses[2], losses, rtol=1e-3, atol=1e-3)


def test_energy_weights_are_capped_at_one_and_selected() -> None:
    point, blocks = energy_point([2, 1, 1, 1, 1], top_tasks=3)
    capped = naive_energies(blocks, probes()).clamp(max=1)
    assert bool((capped == 1).any()) and bool((capped < 1).any())
    found = point.weights(probes())
    near(found.sort(1, descending=True).values, keep_top(capped, 3).sort(1, descending=True).values)
    near(found[found > 0], capped[found > 0])  # which of equal ones are kept is left open


def test_a_task_without_a_basis_has_no_weight_and_no_share_of_the_posterior() -> None:
    point, blocks = energy_point([3, 0, 2])
    assert not bool(point.weights(probes())[:, 1].any())
    found = point.energy.log_posterior(probes())
    assert bool((found[:, 1] == -math.inf).all())
    energies = naive_energies(blocks, probes()).double()
    expected = (point.energy.kappa * energies[:, [0, 2]].log()).log_softmax(1)
    near(found[:, [0, 2]], expected, atol=1e-3)


def test_bases_that_are_all_empty_say_nothing() -> None:
    point, _ = energy_point([0, 0])
    near(point.energy.log_posterior(probes()), torch.full((12, 2), math.log(0.5)))


def test_energy_temperature_is_the_best_over_all_tasks() -> None:
    assert_close(ENERGY_KAPPAS, torch.tensor([0.5 * 100 ** (i / 19) for i in range(20)], dtype=torch.float64))
    point, blocks = energy_point([2, 2, 2])
    total = torch.zeros(20, dtype=torch.float64)
    for task in range(3):
        log_energy = naive_energies(blocks[: task + 1], energy_images(task)[0]).double().log()
        losses = [-(0.5 * 100 ** (k / 19) * log_energy).log_softmax(1)[:, task].sum() for k in range(20)]
        near(point.energy.losses[task], torch.stack(losses), rtol=1e-3, atol=1e-3)
        total += torch.stack(losses)
    assert point.energy.kappa == pytest.approx(0.5 * 100 ** (int(total.argmin()) / 19))
    assert energy_point([3])[0].energy.kappa == pytest.approx(50.0), "ties go to the largest"


def test_a_basis_that_turns_out_empty_takes_its_loss_along() -> None:
    """The pass before a task may find a basis where the pass after finds none."""
    point, blocks = energy_point([3, 2])
    plain, _ = energy_point([3, 0])
    features, labels = energy_images(1)
    point.learn(1, features, labels, 2, blocks[1][:, :0])
    assert point.energy.losses.keys() == plain.energy.losses.keys()
    assert point.energy.kappa == plain.energy.kappa


@pytest.mark.parametrize("sizes", [None, [3, 0, 2]])
def test_state_restores_the_weights(sizes: list[int] | None) -> None:
    if sizes is None:
        point, other = gaussian_point(3), GatePoint(DIM, CPU, 4, None)
    else:
        point, _ = energy_point(sizes)
        other = GatePoint(DIM, CPU, 4, EnergyMemory(point.energy.subspace, CPU))
    other.load_state_dict({name: x.clone() for name, x in point.state_dict().items()})
    assert torch.equal(other.weights(probes()), point.weights(probes()))
    if sizes is not None:
        assert torch.equal(other.energy.log_posterior(probes()), point.energy.log_posterior(probes()))


# -- the gate of all layers ----------------------------------------------------------------------------------


def tokens(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, DIM, generator=torch.Generator().manual_seed(seed))


def described(x: Tensor) -> Tensor:
    """Class token and mean patch token of x (B, 5, d), which the gate reads above the first layer."""
    return torch.cat([x[:, 0], (x[:, 1] + x[:, 2] + x[:, 3] + x[:, 4]) / 4], 1)


def gate(mode: str, layers: list[int], tasks: int = 3) -> DynamicMemory:
    points = {layer: gaussian_point(tasks, dim=2 * DIM) for layer in layers}
    memory = DynamicMemory(mode, points, TokenReader(True, 1))
    memory.tasks = tasks
    return memory


def test_one_gate_serves_all_layers_above() -> None:
    memory = gate("first", [2])
    with memory.reading() as seen:
        first = memory.gate(2, tokens(0))
        near(first, memory.points[2].weights(described(tokens(0))))
        assert torch.equal(memory.gate(3, tokens(1)), first), "later layers use what the first one found"
    near(seen.features[2], described(tokens(0)))
    assert 3 not in seen.features
    assert torch.equal(seen.mean_weights, first)


def test_each_layer_may_have_its_own_gate() -> None:
    memory = gate("layer", [2, 3])
    with memory.reading() as seen:
        first, second = memory.gate(2, tokens(0)), memory.gate(3, tokens(1))
    near(second, memory.points[3].weights(described(tokens(1))))
    assert not torch.equal(first, second)
    near(seen.mean_weights, (first + second) / 2)


def test_without_a_gate_all_tasks_act() -> None:
    memory = gate("off", [])
    with memory.reading():
        assert torch.equal(memory.gate(2, tokens()), torch.ones(4, 3))


def test_a_pass_leaves_nothing_behind() -> None:
    memory = gate("first", [2])
    with pytest.raises(KeyboardInterrupt), memory.reading():
        memory.gate(2, tokens())
        raise KeyboardInterrupt
    assert memory.current.get() is None
    assert memory.gate(2, tokens()) is None, "outside a pass no residual adapter acts"
    with memory.reading() as seen:
        assert not seen.features and seen.mean_weights is None


def test_the_mean_patch_token_tells_tasks_apart_where_the_class_token_does_not() -> None:
    """Two tasks whose class tokens are alike and whose patches differ."""
    memory = DynamicMemory("first", {1: GatePoint(2 * DIM, CPU, 4, None)}, TokenReader(True, 1))
    drawn = [tokens(task, 16) for task in range(2)]
    for task, x in enumerate(drawn):
        x[:, 1:] += 1.5 * (2 * task - 1)
        with memory.reading() as seen:
            memory.gate(1, x)
        memory.points[1].learn(task, seen.features[1], torch.arange(16) % 2, 2, None)
    memory.tasks = 2
    for task in range(2):
        x = tokens(10 + task, 16)
        x[:, 1:] += 1.5 * (2 * task - 1)
        with memory.reading():
            assert float(memory.gate(1, x)[:, task].mean()) > 0.9


def test_before_the_first_task_there_are_no_weights_but_features() -> None:
    memory = DynamicMemory("first", {1: GatePoint(2 * DIM, CPU, 4, None)}, TokenReader(True, 1))
    with memory.reading() as seen:
        assert memory.gate(1, tokens()) is None and seen.mean_weights is None
    near(seen.features[1], described(tokens()))


def test_inside_the_context_images_are_left_out_by_their_index_in_the_task() -> None:
    memory = gate("first", [2])
    point = memory.points[2]
    f0, labels = task_images(2, dim=2 * DIM)
    point.learn(2, f0, labels, 2, None)
    picked = torch.tensor([7, 0, 4])
    x = tokens(5, 3)
    with memory.reading((labels[picked], picked)):
        found = memory.gate(2, x)
    near(found, point.weights(described(x), point.rows.own(2, labels[picked], f0[picked])))
    with memory.reading():
        assert not torch.equal(found, memory.gate(2, x)), "of other images nothing is left out"


def test_gate_rows_are_ordinary_rows() -> None:
    point, memory = gaussian_point(2), ClassStatistics(DIM, CPU)
    for task in range(2):
        features, labels = task_images(task)
        memory.replace(task, ClassMoments.of(features, labels, 2))
        memory.fit_temperature(task, features, labels)
    assert point.rows.kappa == memory.kappa and point.rows.distances == memory.distances
