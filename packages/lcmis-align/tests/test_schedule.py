"""Schedules and the notation of the web interfaces."""

import numpy as np
import pytest
from lcmis_align import PromptSchedule, Ramp, ScheduleError
from lcmis_align.syntax import escape, parse


def texts(schedule, total):
    return [weights[0][0] if len(weights) == 1 else weights for weights in schedule.weights(total)]


def test_two_stages():
    assert texts(PromptSchedule([("A", 0.25), ("B", 1.0)]), 8) == ["A"] * 2 + ["B"] * 6
    assert texts(PromptSchedule([("A", 3), ("B", 1.0)]), 8) == ["A"] * 3 + ["B"] * 5
    assert texts(PromptSchedule([("A", 0), ("B", 1.0)]), 3) == ["B"] * 3
    assert texts(PromptSchedule([("A", 1.0), ("B", 1.0)]), 3) == ["A"] * 3
    assert texts(PromptSchedule([("A", 99), ("B", 1.0)]), 3) == ["A"] * 3


def test_a_share_is_not_lost_to_rounding():
    for total in (10, 20, 30, 40, 50):
        for tenth in range(11):
            assert texts(PromptSchedule([("A", tenth / 10), ("B", 1.0)]), total).count("A") == total * tenth // 10


def test_more_stages_turns_and_mixtures():
    schedule = PromptSchedule([("A", 2), (["B", "C"], 5), ({"D": 0.25, "E": 0.75}, 1.0)])
    assert texts(schedule, 7) == ["A", "A", "B", "C", "B", (("D", 0.25), ("E", 0.75)), (("D", 0.25), ("E", 0.75))]
    assert schedule.calls(7) == 7
    assert PromptSchedule(schedule.stages, mix="score").calls(7) == 9


def test_a_ramp_goes_from_one_to_the_other():
    weights = PromptSchedule([(Ramp("A", "B"), 4), ("B", 1.0)]).weights(6)
    assert weights[0] == (("A", 1.0),)
    assert weights[2] == (("A", 0.5), ("B", 0.5))
    assert weights[4:] == [(("B", 1.0),)] * 2


@pytest.mark.parametrize(("text", "expected"), [
    ("plain", ["plain"] * 4),
    ("[A:B:0.5]", ["A", "A", "B", "B"]),
    ("[A:B:1]", ["A", "B", "B", "B"]),
    ("[A:B:1.0]", ["A"] * 4),
    ("[A:B:0]", ["B"] * 4),
    ("[A:B:.25]", ["A", "B", "B", "B"]),
    ("[A:B: 2 ]", ["A", "A", "B", "B"]),
    ("a [red:blue:0.5] cup, sharp", ["a red cup, sharp"] * 2 + ["a blue cup, sharp"] * 2),
    ("cup [with handle:0.5]", ["cup"] * 2 + ["cup with handle"] * 2),
    ("cup [with handle::0.5]", ["cup with handle"] * 2 + ["cup"] * 2),
    ("[A|B]", ["A", "B", "A", "B"]),
    ("[A|B|C] x", ["A x", "B x", "C x", "A x"]),
    ("[[A:B:1]:C:0.5]", ["A", "B", "C", "C"]),
    ("[A:[B:C:3]:1]", ["A", "B", "B", "C"]),
    ("[[A|B]:C:0.5]", ["A", "B", "C", "C"]),
    ("[A:B:0.5] and [C|D]", ["A and C", "A and D", "B and C", "B and D"]),
    (r"\[A\:B\:0.5\] \| \\", ["[A:B:0.5] | \\"] * 4),
    ("ratio 3:4", ["ratio 3:4"] * 4),
    ("a | b", ["a | b"] * 4),
    ("[cup]", ["[cup]"] * 4),
    ("[A:B]", ["[A:B]"] * 4),
    ("[A:B:soon]", ["[A:B:soon]"] * 4),
    ("(cup:1.3)", ["(cup:1.3)"] * 4),
    ("", [""] * 4),
])  # fmt: skip
def test_the_notation(text, expected):
    assert texts(PromptSchedule.parse(text), 4) == expected
    assert [parse(text)(step, 4) for step in range(4)] == expected


@pytest.mark.parametrize(("text", "message"), [
    ("a [b:c:0.5", "column 3 that is not closed"), ("a [b:[c:d:1]:0.5", "column 3"), ("a [b:[c:0.5]", "column 3"),
    ("a] b", "column 2 that was not opened"), ("[a:b:1]]", "column 8"), ("x [a:b:1.5]", "share 1.5 at column 3"),
])  # fmt: skip
def test_unbalanced_brackets_are_named_with_their_column(text, message):
    with pytest.raises(ScheduleError, match=message):
        PromptSchedule.parse(text)


def test_written_and_read_again():
    for schedule in (
        PromptSchedule([("A", 0.25), ("a [B] | c: d\\", 1.0)]),
        PromptSchedule([("A", 2), ("B", 3), ("C", 1.0)]),
        PromptSchedule([(["A", "B"], 0.5), ("C", 1.0)]),
    ):
        assert texts(PromptSchedule.parse(str(schedule)), 8) == texts(schedule, 8)
    assert str(PromptSchedule([("a tea cup", 0.25), ("p", 1.0)])) == "[a tea cup:p:0.25]"
    assert str(PromptSchedule.parse("[x|y]")) == "[x|y]"
    assert parse(escape("[a:b|c\\"))(0, 1) == "[a:b|c\\"
    with pytest.raises(ScheduleError, match="cannot be written"):
        str(PromptSchedule.composed({"a": 1, "b": 1, "": -1}))


@pytest.mark.parametrize("stages", [
    [], [("A", -1)], [("A", 1.5)], [("A", True)], [("A", "soon")], [(3, 1.0)], [([], 1.0)], [({"a": 0.5}, 1.0)],
    [("A", float("nan"))],
])  # fmt: skip
def test_stages_that_cannot_be(stages):
    with pytest.raises(ScheduleError):
        PromptSchedule(stages)


def test_stages_in_the_wrong_order():
    with pytest.raises(ScheduleError, match="before the one in front"):
        PromptSchedule([("A", 0.5), ("B", 0.25), ("C", 1.0)]).weights(8)
    with pytest.raises(ScheduleError, match="mix is 'x'"):
        PromptSchedule([("A", 1.0)], mix="x")


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_every_family_runs_a_schedule(pipelines, family):
    pipe, arguments = pipelines(family)
    images = PromptSchedule.parse("[a tea cup:a tea cup of iced coke:0.5]").run(
        pipe, seeds=range(3), num_inference_steps=4, batch_size=2, **arguments
    )
    assert len(images) == 3
    assert images[0].size == (32, 32)
    one = PromptSchedule([("a tea cup", 2), ("a tea cup of iced coke", 1.0)]).run(
        pipe, seeds=[2], num_inference_steps=4, **arguments
    )
    difference = np.asarray(one[0]).astype(int) - np.asarray(images[2]).astype(int)
    assert np.abs(difference).max() <= 1
