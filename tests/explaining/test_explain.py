"""Explanations: gradient-weighted attention of every method and family; the learner stays as it is."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from small_tasks import EVERY_METHOD, Patterns, learned, new_learner, small_config, three_tasks
from tiny import FAMILIES, IMAGE, tiny_backbone
from torch.nn import functional as F

from duallora import DualLoRAError
from duallora.data.transforms import EvaluationTransform
from duallora.explaining.attention import AttentionWeights, relevance
from duallora.explaining.explain import explain
from duallora.explaining.overlay import overlay


@pytest.fixture(scope="module")
def learner():
    return learned("duallora")


def picture(seed: int = 5) -> Image.Image:
    """A random image, twice as wide as high."""
    pixels = torch.randint(0, 256, (IMAGE, 2 * IMAGE, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def test_relevance_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(1, 2, 4, 4, generator=generator).requires_grad_() for _ in range(2)]
    direction = torch.randn(2, 1, 2, 4, 4, generator=generator)
    score = sum((a * d).sum() for a, d in zip(maps, direction, strict=True))
    below, above = ((a.detach() * d).clamp(min=0).mean(1)[0] for a, d in zip(maps, direction, strict=True))
    rows = (torch.eye(4) + above) @ (torch.eye(4) + below)
    torch.testing.assert_close(relevance(maps, score, 2, False), rows.mean(0))
    score = sum((a * d).sum() for a, d in zip(maps, direction, strict=True))
    torch.testing.assert_close(relevance(maps, score, 2, True), (rows[0] + rows.mean(0)) / 2)


def test_what_the_answer_reads_is_hot():
    weights = torch.full((1, 2, 5, 5), 0.2).requires_grad_()
    found = relevance([weights], weights[..., 0, 3].sum() - weights[..., 0, 2].sum(), 1, True)
    assert int(found[1:].argmax()) == 2  # behind the class token
    assert found[2] == found[1] < found[3]  # what speaks against it counts as nothing


@pytest.mark.parametrize("masked", [None, "added", "boolean"])
def test_attention_step_by_step_is_the_fused_one(masked):
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = None if masked is None else torch.eye(6) if masked == "added" else torch.eye(6) > 0
    with AttentionWeights() as seen:
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))
    (weights,) = seen.maps
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6))


def test_only_passes_of_this_thread_with_gradients_are_noted():
    x = torch.randn(1, 2, 6, 4).requires_grad_()

    def attend():
        F.scaled_dot_product_attention(x, x, x)

    with AttentionWeights() as seen:
        other = threading.Thread(target=attend)
        other.start()
        other.join()
        with torch.no_grad():
            attend()
        assert seen.maps == []
        attend()
    assert len(seen.maps) == 1


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_every_method_explains_its_answer_and_stays_as_it_is(name):
    learner = learned(name, three_tasks(4)[:2])
    before = {key: value.clone() for key, value in learner.method.state().items()}
    (answer,) = learner.predict(picture())
    found = explain(learner, picture())
    assert (found.label, found.task) == (answer.label, answer.task)
    assert found.probability == pytest.approx(answer.probability, abs=1e-3)
    assert found.heat.shape == (4, 4)
    assert (float(found.heat.min()), float(found.heat.max())) == (0, 1)
    after = learner.method.state()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert learner.predict(picture()) == [answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_map_of_its_patches(family):
    learner = new_learner(family=family)
    for task in three_tasks(4)[:2]:
        learner.learn(task)
    heat = explain(learner, picture()).heat
    assert heat.shape == tiny_backbone(family).grid
    assert (float(heat.min()), float(heat.max())) == (0, 1)


def test_attention_that_is_not_fused_gives_the_same_map(learner):
    fused = explain(learner, picture()).heat
    attentions = [learner.backbone.attention(layer) for layer in range(learner.backbone.depth)]
    try:
        for attention in attentions:
            attention.fused_attn = False
        torch.testing.assert_close(explain(learner, picture()).heat, fused, atol=1e-4, rtol=1e-4)
    finally:
        for attention in attentions:
            attention.fused_attn = True


def test_another_class_has_another_map(learner):
    maps = {name: explain(learner, picture(), name).heat for name in learner.classes}
    assert all(explain(learner, picture(), name).label == name for name in maps)
    assert len({tuple(heat.flatten().tolist()) for heat in maps.values()}) == len(maps)


def test_the_text_names_method_and_lesson(learner):
    found = explain(learner, picture())
    assert "gradient-weighted attention" in found.text and "2103.15679" in found.text
    assert found.task in found.text and all(name in found.text for name in found.task_classes)


def test_what_cannot_be_explained_is_refused(learner):
    with pytest.raises(DualLoRAError, match="learned 'unicorn'"):
        explain(learner, picture(), "unicorn")
    with pytest.raises(DualLoRAError, match="learned nothing"):
        explain(new_learner(), picture())
    single = new_learner(small_config())
    single.learn(Patterns(["ant"], 4))
    with pytest.raises(DualLoRAError, match="single class"):
        explain(single, picture())


def test_the_overlay_shows_what_the_model_sees_and_where_it_is_hot(learner):
    found = explain(learner, picture()).overlay
    assert found.size[0] == found.size[1] >= 224  # the middle of an image twice as wide
    heat = torch.zeros(4, 4)
    heat[:, 3] = 1
    drawn = overlay(Image.new("RGB", (64, 64), (120, 120, 120)), heat).convert("L")
    width, height = drawn.size
    assert drawn.getpixel((width - 2, height // 2)) > 2 * drawn.getpixel((2, height // 2))


@pytest.mark.parametrize(("size", "box"), [((200, 100), (56, 6, 144, 94)), ((100, 100), (6, 6, 94, 94))])
def test_the_part_that_a_view_shows(size, box):
    info = tiny_backbone().info.prepared("backbone", 0.875, None)
    view = EvaluationTransform(info)
    assert view.seen(*size) == pytest.approx(box, abs=2)
    whole = tuple(round(edge) for edge in view.seen(*size))
    gradient = Image.linear_gradient("L").resize(size).convert("RGB")
    shown = torch.from_numpy(view.pixels(gradient).copy()).float()
    again = gradient.crop(whole).resize((IMAGE, IMAGE), Image.Resampling.BICUBIC)
    assert float((shown - torch.from_numpy(np.array(again)).float()).abs().max()) < 12
