"""DualPrompt and L2P against their equations, written out image by image."""

from __future__ import annotations

import pytest
import torch
from prompt_tools import batch, cosine, opened, queries
from small_tasks import small_config
from tiny import WIDTH, tiny_backbone, tiny_images
from torch.nn import functional as F
from written_vit import written_feature, written_features

from duallora import ContinualLearner, DualLoRAError
from duallora.methods.dualprompt import prompted_blocks

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
