"""What is mixed with what: keyed by the sample, of another class, near the middle of the two."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from duallora.backbones.backbone import load_backbone
from duallora.data.assembly import Chunk
from duallora.data.mixing import SHARES, Mixing
from duallora.data.transforms import Augmentation

TARGETS = [0, 0, 0, 0, 0, 0, 1, 1, 3, 3, 3]  # class 2 has no image


@pytest.fixture(scope="module")
def crops() -> Augmentation:
    return Augmentation(load_backbone("embedded").info, "crop", seed=3, task=1)


def test_partners_are_of_another_class_drawn_evenly_whatever_its_images(crops):
    mixing = Mixing(TARGETS, crops)
    drawn = [mixing.drawn(epoch, 0)[0] for epoch in range(600)]
    counts = Counter(TARGETS[partner] for partner in drawn)
    assert set(counts) == {1, 3} and min(counts.values()) > 240
    assert set(drawn) == {6, 7, 8, 9, 10}


def test_shares_lie_within_their_limits_and_use_them(crops):
    shares = [Mixing(TARGETS, crops).drawn(epoch, 4)[1] for epoch in range(300)]
    smallest, largest = SHARES
    assert smallest <= min(shares) < smallest + 0.01 and largest - 0.01 < max(shares) <= largest


def test_a_draw_depends_on_seed_task_epoch_and_sample(crops):
    one = Mixing(TARGETS, crops).drawn(2, 5)
    others = [replace(crops, seed=4), replace(crops, task=2)]
    found = [Mixing(TARGETS, other).drawn(2, 5) for other in others]
    found += [Mixing(TARGETS, crops).drawn(3, 5), Mixing(TARGETS, crops).drawn(2, 4)]
    assert Mixing(TARGETS, crops).drawn(2, 5) == one and one not in found


def test_partners_stand_behind_their_samples_in_their_order(crops):
    mixing, chunk = Mixing(TARGETS, crops), Chunk((0, 7, 10), 4)
    drawn = [mixing.drawn(4, index) for index in chunk.positions]
    assert mixing.asked(chunk) == Chunk((0, 7, 10, *(partner for partner, _ in drawn)), 4)
    assert mixing.shares(chunk) == [share for _, share in drawn]
