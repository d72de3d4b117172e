"""CODA-Prompt against its equations, written out image by image."""

from __future__ import annotations

import torch
from prompt_tools import batch, cosine, learned, opened, queries
from small_tasks import new_learner, small_config, three_tasks
from tiny import WIDTH, tiny_backbone, tiny_images
from torch.nn import functional as F

from duallora import ContinualLearner
from duallora.methods.coda_prompt import Components, orthonormal_rows

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
