"""What CODA-Prompt, DualPrompt and L2P have in common, against their equations."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch
from prompt_tools import batch, copies, cosine, learned, names, passes, queries
from small_tasks import new_learner, small_config, three_tasks
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images
from torch import Tensor
from written_vit import written_features

from duallora import METHODS, DualLoRAError
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.commands.configs import read_config
from duallora.methods import Batch

pytestmark = pytest.mark.slow

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
