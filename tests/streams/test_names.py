"""Names from every source in one form."""

from __future__ import annotations

import unicodedata
import warnings

import pytest
from small_tasks import Patterns, small_config
from tiny import tiny_backbone

from duallora import ContinualLearner
from duallora.streams.names import hint_at_case, normal


def test_names_are_composed_and_without_space_around() -> None:
    apart = unicodedata.normalize("NFD", " Größe\t")
    assert normal(apart) == "Größe" != apart
    assert normal("a b") == "a b"


def test_a_class_is_learned_measured_and_forgotten_whatever_form_its_name_has() -> None:
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    learner = ContinualLearner(tiny_backbone(), small_config("frozen"), device="cpu")
    learner.learn(Patterns([apart, "bee"], 4))
    assert learner.classes == [composed, "bee"]
    assert learner.evaluate(Patterns([composed, "bee"], 4)).images == 8
    assert learner.forget(name=apart).classes == (composed,)


def test_a_class_that_differs_from_a_known_one_in_case_alone_gets_a_hint() -> None:
    learner = ContinualLearner(tiny_backbone(), small_config("frozen"), device="cpu")
    learner.learn(Patterns(["cat", "bee"], 4))
    with pytest.warns(UserWarning, match="'cat' and 'Cat' differ in upper and lower case alone"):
        learner.learn(Patterns(["Cat", "dog"], 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hint_at_case(["cat", "cow"], ["cat"])
