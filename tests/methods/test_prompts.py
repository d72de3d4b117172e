"""CODA-Prompt, DualPrompt and L2P against their equations, written out image by image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch
from small_tasks import new_learner, small_config, three_tasks
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images
from torch import Tensor, nn
from torch.nn import functional as F
from written_vit import written_feature, written_features

from duallora import METHODS, ContinualLearner, DualLoRAError
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.commands.configs import read_config
from duallora.methods import Batch, Method
from duallora.methods.coda_prompt import Components, orthonormal_rows
from duallora.methods.dualprompt import prompted_blocks

NAMES = ("coda-prompt", "dualprompt", "l2p")
names = pytest.mark.parametrize("name", NAMES)


def learned(name: str, tasks: int = 2, family: str = "vit", **changes: Any) -> Method:
    learner = new_learner(small_config(name, **changes), family=family)
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    return exact(learner.method)


def opened(name: str, tasks: int = 2, depth: int = 2, **changes: Any) -> Method:
    """A method on a fresh backbone with the parameters of some tasks as drawn, heads of two classes."""
    method = new_learner(small_config(name, **changes), depth=depth).method
    for task in range(tasks):
        method.heads.open(2, method.generator(task))
        method.grow(task)
    return exact(method)


def exact(method: Method) -> Method:
    """Computes its losses in fp32 on every machine; gradients of the training are gone."""
    method.context = replace(method.context, autocast=nullcontext)
    method.adapters.zero_grad()
    return method


def batch(count: int = 6) -> Batch:
    labels = torch.arange(count) % 2
    return Batch(tiny_images(count, seed=5), labels, torch.arange(count))


def queries(images: Tensor, family: str = "vit") -> Tensor:
    """Final features of a backbone that no method has touched, fp64."""
    return tiny_backbone(family)(images)[:, :WIDTH].double()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.named_parameters()}


@contextmanager
def passes(method: Method) -> Iterator[list[Tensor]]:
    """What the backbone gives, pass by pass."""
    found: list[Tensor] = []
    handle = method.backbone.register_forward_hook(lambda _, __, y: found.append(y.detach()))
    yield found
    handle.remove()


# -- all three ------------------------------------------------------------------------------------------


def written_out(name: str, method: Any, images: Tensor, family: str) -> Tensor:
    """The features by the paper's equations, one image and one component, expert or prompt at a time."""
    features, bare = [], tiny_backbone(family)
    for image, query in zip(images, queries(images, family), strict=True):
        prefixes: dict[int, tuple[Tensor, Tensor]] = {}
        tokens = None
        if name == "coda-prompt":
            for layer, pool in method.pools.items():
                prompt = torch.zeros(1, 8, WIDTH, dtype=torch.float64)
                for ps, ks, attentions in zip(pool.p, pool.k, pool.a, strict=True):
                    for p, k, a in zip(ps, ks, attentions, strict=True):
                        prompt += cosine(query * a, k) * p.detach().double()
                prefixes[layer] = (prompt[:, :4], prompt[:, 4:])
        elif name == "dualprompt":
            prefixes[0] = (method.general[0][None, :3], method.general[0][None, 3:])
            pool = method.experts[1]
            similar = [cosine(query, key) for key in pool.keys]
            expert = pool.prompts[similar.index(max(similar))][None]
            prefixes[1] = (expert[:, :10], expert[:, 10:])
        else:
            similar = [cosine(query, key) for key in method.pool.keys]
            nearest = sorted(range(10), key=lambda i: -similar[i])[:5]
            tokens = torch.cat([method.pool.prompts[i] for i in nearest])[None]
        features.append(written_features(bare, image[None], prefixes, tokens))
    return torch.cat(features).detach()


@names
@pytest.mark.parametrize("family", FAMILIES)
def test_the_feature_is_that_of_the_equations(name: str, family: str) -> None:
    method, images = learned(name, family=family), tiny_images(4)
    with torch.no_grad():
        found = method.extract(images).double()
    torch.testing.assert_close(found, written_out(name, method, images, family), rtol=1e-4, atol=2e-5)
    assert float((found[:, :WIDTH] - queries(images, family)).abs().max()) > 0.02, "the prompts must matter"


@names
def test_the_query_is_that_of_the_bare_backbone(name: str) -> None:
    method, images = learned(name), tiny_images(4)
    for use in (
        lambda: method.extract(images),
        lambda: method.loss(Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(4))),
    ):
        with passes(method) as found:
            use()
        assert len(found) == method.forward_passes == 2
        assert torch.equal(found[0], tiny_backbone()(images))
        assert float((found[1] - found[0]).abs().max()) > 1e-3, "the second pass has the prompts"
    assert torch.equal(method.backbone(images), tiny_backbone()(images)), "nothing is left behind"


@names
def test_cached_features_save_the_query_pass(name: str) -> None:
    method, images = learned(name), tiny_images(4)
    with torch.no_grad():
        expected = method.extract(images)
    method.context = replace(method.context, cache=FrozenFeatures.compute(tiny_backbone(), [images]))
    with passes(method) as found, torch.no_grad():
        assert torch.allclose(method.extract(images), expected, atol=1e-5)
    assert len(found) == 1


@names
def test_augmented_views_are_not_looked_for(name: str) -> None:
    """Training computes its queries: no view of it is ever kept."""
    method, data = learned(name), batch(4)
    method.context = replace(method.context, cache=FrozenFeatures.compute(tiny_backbone(), [data.images]))
    looked: list[Tensor] = []
    method.context.cache.lookup = looked.append  # type: ignore[method-assign, assignment]
    expected = method.loss(data)
    assert not looked and expected.requires_grad


@names
def test_an_image_chooses_by_itself(name: str) -> None:
    """Features and loss of a batch are those of its images one at a time."""
    method, data = learned(name), batch(8)
    singles = [Batch(*(x[i : i + 1] for x in data)) for i in range(8)]
    with torch.no_grad():
        whole = method.extract(data.images)
        torch.testing.assert_close(torch.cat([method.extract(one.images) for one in singles]), whole)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(method.extract(data.images[order]), whole[order])
        mean = torch.stack([method.loss(one) for one in singles]).mean()
        torch.testing.assert_close(method.loss(data), mean)


@names
def test_prompts_are_chosen_in_fp32_under_autocast(name: str) -> None:
    method, images = learned(name), tiny_images(4)
    chosen: list[list[Tensor]] = [[]]
    calls = {"coda-prompt": "forward", "dualprompt": "similarity", "l2p": "select"}
    pools = {"coda-prompt": "pools", "dualprompt": "experts", "l2p": "pool"}
    with torch.no_grad():
        found = getattr(method, pools[name])
        pool = found if name == "l2p" else found[1]
        real = getattr(pool, calls[name])
        method.context = replace(
            method.context, cache=FrozenFeatures.compute(tiny_backbone(), [images])
        )  # the same queries in both
        setattr(pool, calls[name], lambda *args: chosen[-1].append(real(*args)) or chosen[-1][-1])
        expected = method.extract(images)
        chosen.append([])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = method.extract(images)
    assert 0 < float((rounded - expected).abs().max()) < 0.2 * float(expected.abs().max())
    (before,), (after,) = chosen
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.dtype in (torch.float32, torch.int64)


@names
def test_the_parameters_of_a_task_and_their_rates(name: str) -> None:
    method = learned(name, learning_rate=3e-2)
    head, prompts = method.parameter_groups()
    assert head["lr"] == method.config.head_learning_rate and prompts["lr"] == 3e-2
    assert [id(p) for p in head["params"]] == [id(p) for p in method.heads.tasks[-1].parameters()]
    method.loss(batch()).backward()
    for p in [*head["params"], *prompts["params"]]:
        assert p.grad is not None and float(p.grad.abs().max()) > 0
    others = {id(p) for p in method.adapters.parameters()} - {id(p) for p in prompts["params"]}
    assert all(p.grad is None for p in method.adapters.parameters() if id(p) in others)
    per_task = {"coda-prompt": 2 * 3, "dualprompt": 2, "l2p": 0}[name]  # tensors that a task adds
    assert len(others) == per_task, "those of the first task"


@names
def test_what_a_later_task_moves(name: str) -> None:
    learner = new_learner(small_config(name))
    learner.learn(three_tasks()[0])
    before = copies(learner.method.adapters)
    learner.learn(three_tasks()[1])
    after = copies(learner.method.adapters)
    moved = {key for key, x in before.items() if not torch.equal(after[key], x)}
    new = after.keys() - before.keys()
    if name == "coda-prompt":
        assert not moved, "earlier components stay"
        assert new == {f"{layer}.{part}.1" for layer in (0, 1) for part in "pka"}
    elif name == "dualprompt":
        assert moved == {"general.0"}, "the general prompt is everyone's, the expert is not"
        assert new == {"1.prompts.1", "1.keys.1"}
    else:
        assert moved == {"pool.prompts", "pool.keys"} and not new


@names
@pytest.mark.parametrize("value", [0, -1])
def test_senseless_numbers_are_refused(name: str, value: int) -> None:
    fields = {
        "coda-prompt": ("layers", "components_per_task", "prompt_length"),
        "dualprompt": ("g_layers", "e_layers", "g_length", "e_length"),
        "l2p": ("pool_size", "prompt_length", "top_k"),
    }[name]
    for field in fields:
        with pytest.raises(DualLoRAError, match=f"{field} must be above 0"):
            METHODS[name].config(**{field: value})
    weight = "mu" if name == "coda-prompt" else "pull"
    METHODS[name].config(**{weight: 0})
    with pytest.raises(DualLoRAError, match=f"{weight} must be at least 0"):
        METHODS[name].config(**{weight: -0.1})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("coda-prompt", {"prompt_length": 7}),
        ("dualprompt", {"g_length": 5}),
        ("dualprompt", {"e_length": 3}),
        ("l2p", {"top_k": 11}),
    ],
)
def test_what_cannot_be_is_refused(name: str, change: dict[str, int]) -> None:
    with pytest.raises(DualLoRAError, match=next(iter(change))):
        METHODS[name].config(**change)


@names
def test_the_papers_values_are_a_configuration(name: str) -> None:
    path = resources.files("duallora") / "configs" / "methods" / f"{name}.yaml"
    values = dict(read_config(str(path))["method"])
    assert values.pop("name") == name
    METHODS[name].config(**values)


# -- CODA-Prompt ----------------------------------------------------------------------------------------


def test_coda_weights_are_cosines_of_the_attended_query() -> None:
    pool = opened("coda-prompt", tasks=3).pools[0]
    query = queries(tiny_images(4))
    found = pool.weights(query.float())
    components = [
        (k, a)
        for ks, attentions in zip(pool.k, pool.a, strict=True)
        for k, a in zip(ks, attentions, strict=True)
    ]
    expected = torch.tensor([[cosine(q * a, k) for k, a in components] for q in query])
    assert found.shape == (4, 30)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not bool(pool.weights(torch.zeros(1, WIDTH)).any()), "and no division by zero"


def test_new_coda_components_are_orthonormal_and_orthogonal_to_what_was_learned() -> None:
    method = learned("coda-prompt", components_per_task=5)
    method.grow(2)
    for pool in method.pools.values():
        for group in (pool.p, pool.k, pool.a):
            old, new = torch.cat(list(group)[:2]).detach().flatten(1), group[2].detach().flatten(1)
            assert float((old @ old.T - torch.eye(10)).abs().max()) > 1e-3, "training has bent the old ones"
            torch.testing.assert_close(new @ new.T, torch.eye(5), atol=1e-6, rtol=0)
            assert float((new @ old.T).abs().max()) < 1e-5 * float(old.norm(dim=1).max())
            assert group[2].requires_grad and not any(x.requires_grad for x in list(group)[:2])


def test_more_components_than_dimensions_start_over() -> None:
    old = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    old = torch.cat([old, old[:3], torch.zeros(1, 10)])  # seven dimensions short of independent, not of ten
    new = orthonormal_rows(old, 17, torch.Generator().manual_seed(1))
    torch.testing.assert_close(new.norm(dim=1), torch.ones(17))
    assert float((new[:4] @ old.T).abs().max()) < 1e-5, "four dimensions were left"
    for rows in (new[:4], new[4:14], new[14:]):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-6, rtol=0)
    full = orthonormal_rows(torch.eye(10), 3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(full @ full.T, torch.eye(3), atol=1e-6, rtol=0)
    nothing = orthonormal_rows(torch.zeros(2, 10), 3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(nothing @ nothing.T, torch.eye(3), atol=1e-6, rtol=0)


def test_later_draws_do_not_depend_on_what_was_learned() -> None:
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    orthonormal_rows(torch.zeros(0, 10), 4, a)
    orthonormal_rows(torch.eye(10), 4, b)
    assert torch.equal(a.get_state(), b.get_state())


def test_coda_survives_more_tasks_than_room() -> None:
    """Ten components a task in 32 dimensions: the keys of the fourth task start over."""
    learner = new_learner(small_config("coda-prompt"))
    names = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]
    for i in range(0, 10, 2):
        learner.learn(type(three_tasks()[0])(names[i : i + 2], 4))
    assert all(bool(x.isfinite().all()) for x in learner.method.adapters.state_dict().values())


def test_coda_penalty_is_weighted_by_mu_and_moves_new_components_alone() -> None:
    method, plain = opened("coda-prompt", mu=0.3), opened("coda-prompt")
    for one in (method, plain):
        with torch.no_grad():  # as drawn they are orthonormal, and the penalty has no gradient there
            for i, parameter in enumerate(one.adapters.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    data = batch()
    cross_entropy = F.cross_entropy(method.heads.current(method.extract(data.images)), data.labels)
    torch.testing.assert_close(plain.loss(data), cross_entropy)
    expected = 0.0
    for pool in method.pools.values():
        for group in (pool.p, pool.k, pool.a):
            rows = [x.detach().double().flatten() for xs in group for x in xs]
            entries = [(float(a @ b) - (i == j)) ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows)]
            expected += sum(entries) / len(entries)
    torch.testing.assert_close(
        method.loss(data) - cross_entropy, torch.tensor(0.3 * expected), rtol=1e-3, atol=1e-4
    )
    sum(pool.penalty() for pool in method.pools.values()).backward()
    for pool in method.pools.values():
        for group in (pool.p, pool.k, pool.a):
            assert group[0].grad is None and float(group[1].grad.abs().max()) > 0


def test_coda_prompts_the_first_blocks() -> None:
    for layers, depth, expected in ((5, 2, [0, 1]), (1, 2, [0]), (5, 7, [0, 1, 2, 3, 4])):
        config = small_config("coda-prompt", layers=layers)
        method = ContinualLearner(tiny_backbone(depth=depth), config, device="cpu").method
        assert list(method.pools) == list(method.backbone.plain_qkv) == expected


def test_coda_lengths_and_numbers() -> None:
    pool = Components(6, 4, 5)
    for task in range(2):
        pool.grow(3, torch.Generator().manual_seed(task), torch.device("cpu"))
    assert [tuple(x.shape) for x in (*pool.p, *pool.k, *pool.a)] == [(3, 6, 4)] * 2 + [(3, 5)] * 4
    assert pool(torch.ones(2, 5)).shape == (2, 6, 4)


# -- DualPrompt -----------------------------------------------------------------------------------------


def test_dualprompt_trains_the_tasks_own_expert_whatever_key_is_nearest() -> None:
    method, data = opened("dualprompt", pull=0.7), batch()
    query, pool = queries(data.images), method.experts[1]
    with torch.no_grad():
        pool.keys[0].copy_(query.mean(0))
        pool.keys[1].copy_(-query.mean(0))
    assert all(cosine(q, pool.keys[0]) > cosine(q, pool.keys[1]) for q in query)
    halves = [
        (x[None, : len(x) // 2].expand(6, -1, -1), x[None, len(x) // 2 :].expand(6, -1, -1))
        for x in (method.general[0].detach(), pool.prompts[1].detach())
    ]
    feature = written_feature(tiny_backbone(), data.images, dict(enumerate(halves)))
    head = method.heads.tasks[1]
    logits = feature @ head.weight.detach().double().T + head.bias.detach().double()
    pulled = sum(1 - cosine(q, pool.keys[1]) for q in query) / 6
    expected = F.cross_entropy(logits, data.labels) + 0.7 * pulled
    torch.testing.assert_close(method.loss(data).double(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_pull_reaches_the_key_of_the_task() -> None:
    method, data = opened("dualprompt", pull=0.7), batch()
    pool, query = method.experts[1], queries(data.images).float()
    method.loss(data).backward()
    assert pool.keys[0].grad is None and pool.prompts[0].grad is None
    key = pool.keys[1].detach().clone().requires_grad_()
    normalised = query / query.norm(dim=1, keepdim=True)
    (0.7 * (1 - normalised @ key / key.norm()).mean()).backward()
    torch.testing.assert_close(pool.keys[1].grad, key.grad, rtol=1e-4, atol=1e-7)


def test_dualprompt_chooses_by_image_and_block() -> None:
    method, images = opened("dualprompt", tasks=3, depth=5), tiny_images(4)
    query = tiny_backbone(depth=5)(images)[:, :WIDTH]
    wanted = {2: [0, 1, 2, 1], 3: [2, 2, 0, 1], 4: [1, 0, 0, 2]}
    with torch.no_grad():
        for layer, tasks in wanted.items():
            for task in range(3):  # keys whose product with a query is 1 where it shall choose them, else -1
                signs = torch.tensor([1.0 if t == task else -1.0 for t in tasks])
                method.experts[layer].keys[task].copy_(torch.linalg.pinv(query) @ signs)
        for layer, tasks in wanted.items():
            assert method.experts[layer].similarity(query).argmax(1).tolist() == tasks
        prefixes = {n: tuple(method.general[n][None].expand(4, -1, -1).chunk(2, 1)) for n in (0, 1)}
        for layer, tasks in wanted.items():
            prompts = torch.stack([method.experts[layer].prompts[t] for t in tasks])
            prefixes[layer] = (prompts[:, :10], prompts[:, 10:])
        expected = written_features(tiny_backbone(depth=5), images, prefixes)
        torch.testing.assert_close(method.extract(images).double(), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("asked", "depth", "expected"),
    [
        ((2, 3), 12, (2, 3)),
        ((2, 3), 6, (2, 3)),
        ((2, 3), 5, (2, 3)),
        ((2, 3), 4, (2, 2)),
        ((2, 3), 3, (1, 2)),
        ((2, 3), 2, (1, 1)),
        ((9, 1), 4, (3, 1)),
        ((1, 9), 4, (1, 3)),
    ],
)
def test_general_blocks_come_first_and_both_kinds_have_one(
    asked: tuple[int, int], depth: int, expected: tuple[int, int]
) -> None:
    assert prompted_blocks(*asked, depth) == expected


def test_dualprompt_needs_two_blocks() -> None:
    with pytest.raises(DualLoRAError, match="two blocks"):
        ContinualLearner(tiny_backbone(depth=1), small_config("dualprompt"), device="cpu")


# -- L2P ------------------------------------------------------------------------------------------------


def test_l2p_pulls_the_chosen_keys_alone() -> None:
    method, data = opened("l2p", pull=0.7, top_k=2), batch(3)
    query, pool = queries(data.images), method.pool
    similar = torch.tensor([[cosine(q, key) for key in pool.keys] for q in query])
    chosen = [sorted(range(10), key=lambda i: -row[i])[:2] for row in similar]
    values, found = pool.select(query.float(), 2)
    assert found.tolist() == chosen
    torch.testing.assert_close(values, similar.gather(1, torch.tensor(chosen)), rtol=1e-4, atol=1e-6)
    loss = method.loss(data)
    cross_entropy = F.cross_entropy(method.heads.current(method.extract(data.images)), data.labels)
    mean = sum(float(similar[i, j]) for i, row in enumerate(chosen) for j in row) / 6
    torch.testing.assert_close(loss, cross_entropy - 0.7 * mean)
    loss.backward()
    keys = pool.keys.detach().clone().requires_grad_()
    pulled = [
        query[i].float() @ keys[j] / query[i].float().norm() / keys[j].norm()
        for i, row in enumerate(chosen)
        for j in row
    ]
    (-0.7 * torch.stack(pulled).mean()).backward()
    torch.testing.assert_close(pool.keys.grad, keys.grad, rtol=1e-4, atol=1e-7)
    unused = sorted(set(range(10)) - {j for row in chosen for j in row})
    assert 0 < len(unused) < 9
    for x in (pool.keys, pool.prompts):
        assert not bool(x.grad[unused].any())
        used = [i for i in range(10) if i not in unused]
        assert bool((x.grad[used].flatten(1).abs().max(1).values > 0).all())


def test_l2p_adds_the_tokens_of_the_chosen_prompts() -> None:
    method = opened("l2p", top_k=3, prompt_length=4)
    chosen = torch.tensor([[0, 4, 2], [9, 9, 1]])
    tokens = method.pool(chosen)
    assert tokens.shape == (2, 12, WIDTH)
    for i, row in enumerate(chosen.tolist()):
        assert torch.equal(tokens[i], torch.cat([method.pool.prompts[j] for j in row]))


def test_prompts_are_drawn_at_unit_size_and_keys_small_enough_to_turn() -> None:
    for name in ("dualprompt", "l2p"):
        for key, x in opened(name).adapters.state_dict().items():
            size = 0.01 if "keys" in key else 1.0
            assert -size <= float(x.min()) < -0.8 * size and 0.8 * size < float(x.max()) <= size, key


def test_a_position_for_all_prompts_only_starts_them_elsewhere() -> None:
    """PILOT adds the class token's position to every prompt; prompts that start without it learn the same."""
    plain, placed = (opened("l2p", tasks=1) for _ in range(2))
    place = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    tokens = placed.pool.forward
    placed.pool.forward = lambda chosen: tokens(chosen) + place
    with torch.no_grad():
        placed.pool.prompts.sub_(place)
    steps = [
        torch.optim.Adam([*m.pool.parameters(), *m.heads.parameters()], lr=0.02) for m in (plain, placed)
    ]
    for _ in range(4):
        losses = []
        for method, adam in zip((plain, placed), steps, strict=True):
            adam.zero_grad()
            losses.append(method.loss(batch()))
            losses[-1].backward()
            adam.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(placed.pool.prompts + place, plain.pool.prompts, rtol=0, atol=2e-3)
    assert float((plain.pool.prompts - opened("l2p", tasks=1).pool.prompts).detach().abs().max()) > 0.05
