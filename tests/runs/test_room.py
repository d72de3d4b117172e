"""Room captured and paired differences, beside figures worked out by hand."""

from __future__ import annotations

import copy
import csv
import io
import json
import math

import pytest
import torch
from compared_runs import answered, compared, line, result

from duallora.runs import resampling
from duallora.runs.comparison import Entry, Results
from duallora.runs.comparison_files import to_csv, to_json
from duallora.runs.comparison_page import markdown, page
from duallora.runs.comparison_tables import NO_ROOM, tables
from duallora.runs.resampling import DRAWS, holm, interval, p_value, resample
from duallora.runs.room import OWN, default_reference, find_evidence

BY_CLASS = [200, 200]


def bits(first: int, second: int) -> list[int]:
    """So many right answers among the first images of either class."""
    return [int(i < first) for i in range(200)] + [int(i < second) for i in range(200)]


def frozen(*runs: Results) -> Entry:
    return line("frozen", *runs, method="frozen")


def joint(*runs: Results) -> Entry:
    return line("joint", *runs, method="joint", upper_bound=True)


FLOOR, CEILING = answered(BY_CLASS, heads=bits(100, 100)), answered(BY_CLASS, heads=bits(180, 180))
MIDDLE = answered(BY_CLASS, heads=bits(160, 160))


# -- draws --------------------------------------------------------------------------------------------------


def test_the_spread_of_images_is_that_of_a_stratified_sample() -> None:
    """Variance of a share p in a class of m images: p (1 - p) / m, each class with weight m / n."""
    drawn = resample([line("a", answered(BY_CLASS, heads=bits(20, 100)))]).accuracies["a", "heads"]
    by_hand = math.sqrt((0.1 * 0.9 + 0.5 * 0.5) / 4 / 200)
    assert drawn.shape == (DRAWS,) and drawn.mean() == pytest.approx(0.3, abs=0.002)
    assert float(drawn.std()) == pytest.approx(by_hand, rel=0.06)


def test_the_spread_of_seeds_is_that_of_their_mean() -> None:
    """All images of a run alike: what is left is the sample's variance divided by the number of seeds."""
    runs = [answered([4], heads=[right] * 4) for right in (0, 1, 1)]
    drawn = resample([line("a", *runs)]).accuracies["a", "heads"]
    assert float(drawn.std()) == pytest.approx(math.sqrt(1 / 3 / 3), rel=0.06)  # sample variance 1/3
    two = resample([line("a", *runs[:2])]).accuracies["a", "heads"]
    assert float(two.std()) == pytest.approx(0.5, rel=0.06)  # sample variance 1/2
    assert resample([line("a", runs[0])]).accuracies["a", "heads"].unique().tolist() == [0.0]


def test_lines_share_images_and_seeds_in_every_draw() -> None:
    right = bits(150, 50)
    worse = [*([0] * 10), *right[10:]]  # the first ten images of it are lost
    drawn = resample([line("a", answered(BY_CLASS, heads=right)), line("b", answered(BY_CLASS, heads=worse))])
    difference = drawn.accuracies["a", "heads"] - drawn.accuracies["b", "heads"]
    assert float(difference.min()) >= 0
    by_hand = math.sqrt(0.05 * 0.95 / 4 / 200)  # ten of the 200 images of one class
    assert float(difference.std()) == pytest.approx(by_hand, rel=0.06)
    assert drawn.paired(("a", "heads"), ("b", "heads"))


def test_draws_are_the_same_whenever_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [frozen(FLOOR, FLOOR), line("a", MIDDLE)]
    first, torch_state = resample(lines), torch.random.get_rng_state()
    monkeypatch.setattr(resampling, "_CELLS", 1 << 20)  # more draws at a time
    torch.manual_seed(5)
    second = resample(lines)
    for key, drawn in first.accuracies.items():
        assert torch.equal(drawn, second.accuracies[key])
    torch.random.set_rng_state(torch_state)


def test_runs_without_answers_are_drawn_by_their_count() -> None:
    drawn = resample([line("a", result(0.3)), line("b", MIDDLE)])
    assert not drawn.paired(("a", "heads"), ("b", "heads")) and drawn.images["a", "heads"] is None
    spread = float(drawn.accuracies["a", "heads"].std())
    assert spread == pytest.approx(math.sqrt(0.3 * 0.7 / 40), rel=0.06)  # 10 and 30 test images
    mixed = resample([line("a", MIDDLE, result(0.3)), line("b", MIDDLE)])
    assert mixed.images["a", "heads"] is None and not mixed.paired(("a", "heads"), ("b", "heads"))


def test_lines_on_other_images_are_no_pair() -> None:
    other = answered(BY_CLASS, images="b", heads=bits(100, 100))
    drawn = resample([line("a", MIDDLE), line("b", other)])
    assert not drawn.paired(("a", "heads"), ("b", "heads"))


def test_answers_under_one_readout_pair_that_one_alone() -> None:
    known = copy.deepcopy(MIDDLE)
    del known["answers"]["right"]["calibrated"]
    found = find_evidence([line("a", known), line("b", FLOOR | {"readout": "heads"})])
    kinds = {kind for one, other, kind in found.differences if (one, other) == ("a", "b")}
    assert kinds == {"heads"}  # a predicts calibrated
    assert found.apart == ("a",)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0] * 99, 0.02),  # 2 (0 + 1) / 100
        ([1.0] * 98 + [-1.0], 0.04),
        ([-1.0] * 98 + [0.0], 0.04),  # a draw without a difference speaks for none
        ([0.0] * 99, 1.0),
        ([1.0] * 49 + [-1.0] * 50, 1.0),
    ],
)
def test_a_p_value_by_hand(differences: list[float], p: float) -> None:
    assert p_value(torch.tensor(differences)) == pytest.approx(p)


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interval_holds_the_middle_of_the_draws() -> None:
    assert interval(torch.arange(0, 201).double()) == pytest.approx((5.0, 195.0))


# -- room captured ------------------------------------------------------------------------------------------


def test_the_room_captured_by_hand() -> None:
    found = find_evidence([frozen(FLOOR), line("a", MIDDLE), joint(CEILING)])
    room = found.rooms["heads"]
    assert room.size == pytest.approx(0.4) and room.there
    assert room.deviation == pytest.approx(math.sqrt(0.4 * 0.6 / 400), rel=0.06)  # 80 of 200 in both classes
    captured = found.captured["a", "heads"]
    assert captured.share == pytest.approx(0.75)  # 60 of 80
    # A draw's share is the share of 60 among those of the 160 images that it took: sqrt(p q / 160).
    half = 1.96 * math.sqrt(0.75 * 0.25 / 160)
    assert captured.interval == pytest.approx((0.75 - half, 0.75 + half), abs=0.02)
    assert set(found.captured) == {("a", "heads"), ("a", "calibrated")}
    assert not found.lacking and not found.apart


def test_each_readout_has_its_own_room() -> None:
    floor = answered(BY_CLASS, heads=bits(100, 100), calibrated=bits(140, 140))
    middle = answered(BY_CLASS, heads=bits(120, 120), calibrated=bits(170, 170))
    found = find_evidence([frozen(floor), line("a", middle), joint(CEILING)])
    assert found.captured["a", "heads"].share == pytest.approx(0.25)
    assert found.captured["a", "calibrated"].share == pytest.approx(0.75)


def test_a_room_within_twice_its_spread_is_none() -> None:
    slight = answered(BY_CLASS, heads=bits(102, 100))  # by two images
    lines = [frozen(FLOOR), line("a", MIDDLE), joint(slight)]
    found = find_evidence(lines)
    assert found.rooms["heads"].size == pytest.approx(0.005) and not found.rooms["heads"].there
    assert found.captured == {}
    table = next(t for t in tables(compared(lines)) if t.title == "Room captured")
    assert {cell for row in table.cells for cell in row[3:5]} == {NO_ROOM}
    below = find_evidence([frozen(MIDDLE), line("a", FLOOR), joint(FLOOR)])
    assert below.rooms["heads"].size < 0 and not below.captured


def test_seeds_count_for_the_room() -> None:
    """The same means, and one image's spread: what the seeds differ by decides."""
    apart = [answered(BY_CLASS, heads=bits(n, n)) for n in (40, 120, 200)]
    alike = [answered(BY_CLASS, heads=bits(120, 120))] * 3
    floor = frozen(*[FLOOR] * 3)
    assert find_evidence([floor, joint(*alike)]).rooms["heads"].there
    assert not find_evidence([floor, joint(*apart)]).rooms["heads"].there


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ([line("a", MIDDLE)], "add frozen,joint to --methods"),
        ([line("a", MIDDLE), frozen(FLOOR)], "add joint to --methods"),
        ([line("a", MIDDLE), joint(CEILING)], "add frozen to --methods"),
    ],
)
def test_without_frozen_or_joint_a_sentence_says_how_to_get_it(lines: list[Entry], missing: str) -> None:
    found = find_evidence(lines)
    assert missing in found.lacking and not found.rooms
    shown = compared(lines)
    assert missing in markdown(shown, plot=False) and missing in page(shown, None)
    assert "Room captured" not in [table.title for table in tables(shown)]


def test_a_variant_stands_for_frozen_only_where_it_is_the_only_one() -> None:
    wide = line("frozen-wide", FLOOR, method="frozen")
    assert not find_evidence([wide, joint(CEILING)]).lacking
    assert "frozen" in find_evidence([wide, line("frozen-2", FLOOR, method="frozen"), joint(CEILING)]).lacking
    both = find_evidence([wide, frozen(FLOOR), joint(CEILING)])
    assert set(both.captured) == {("frozen-wide", "heads"), ("frozen-wide", "calibrated")}


def test_a_line_on_another_backbone_has_no_share_of_the_room() -> None:
    other = MIDDLE | {"backbone": {"sha256": "other"}}
    found = find_evidence([frozen(FLOOR), line("a", other), joint(CEILING)])
    assert found.rooms and not found.captured
    assert {key[:2] for key in found.differences} == {("frozen", "joint"), ("joint", "frozen")}
    apart = find_evidence([frozen(FLOOR), line("a", other), joint(CEILING | {"backbone": {"sha256": "b"}})])
    assert "different backbones" in apart.lacking and not apart.rooms


# -- differences --------------------------------------------------------------------------------------------


def test_a_difference_by_hand() -> None:
    found = find_evidence([line("a", MIDDLE), frozen(FLOOR)])
    difference = found.differences["a", "frozen", "heads"]
    assert difference.mean == pytest.approx(0.3)  # 120 of 400
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert difference.interval == pytest.approx((0.3 - half, 0.3 + half), abs=0.01)
    assert difference.p == pytest.approx(2 / (DRAWS + 1))
    back = found.differences["frozen", "a", "heads"]
    assert back.mean == -difference.mean and back.interval.low == pytest.approx(-difference.interval.high)
    assert find_evidence([line("a", MIDDLE), line("b", MIDDLE)]).differences["a", "b", "heads"].p == 1.0


def test_lines_differ_as_they_predict_by_their_own_readouts() -> None:
    calibrated = answered(BY_CLASS, heads=bits(20, 20), calibrated=bits(160, 160))
    heads = answered(BY_CLASS, heads=bits(100, 100), calibrated=bits(20, 20)) | {"readout": "heads"}
    found = find_evidence([line("a", calibrated), line("b", heads)]).differences
    assert found["a", "b", OWN].mean == pytest.approx(0.3)
    assert found["a", "b", "heads"].mean == pytest.approx(-0.4)


def test_the_page_puts_every_line_beside_the_reference() -> None:
    lines = [line("a", MIDDLE), line("duallora", CEILING), frozen(FLOOR), line("old", result(0.5))]
    assert default_reference(lines) == "duallora"
    assert default_reference([joint(CEILING), *lines[2:]]) == "frozen"
    table = next(t for t in tables(compared(lines)) if t.title == "Final accuracy less that of duallora")
    assert [row[0] for row in table.cells] == ["a", "frozen", "old"]
    assert table.header[3:] == ["as they predict", "heads", "calibrated"]
    assert all(cell.startswith("-10.0 (") and ", p 0.001" in cell for cell in table.cells[0][3:])
    assert table.cells[2][3:] == ["-", "-", "-"]
    text = markdown(compared(lines), plot=False)
    assert "under both readouts: old." in text and "(Holm)" in text


def test_the_files_have_rooms_and_differences() -> None:
    lines = [line("a", MIDDLE), frozen(FLOOR), joint(CEILING)]
    shown = compared(lines)
    rows = list(csv.DictReader(io.StringIO(to_csv(lines, shown.evidence).decode())))
    assert [row["room_captured"] for row in rows] == ["0.75", "0.75", "", "", "", ""]
    assert float(rows[0]["room_captured_low"]) < 0.75 < float(rows[0]["room_captured_high"])
    found = json.loads(to_json(shown))
    assert found["rooms"]["heads"]["size"] == pytest.approx(0.4) and found["rooms"]["heads"]["there"] is True
    assert found["lines"][0]["readouts"]["heads"]["room_captured"]["share"] == pytest.approx(0.75)
    pairs = [(each["line"], each["other"], each["readout"]) for each in found["differences"]]
    assert len(pairs) == len(set(pairs)) == 3 * 3
    assert found["rooms_lacking"] is None and found["draws"] == DRAWS
