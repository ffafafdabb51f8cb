"""The prompt-editing notation of the web interfaces.

    [from:to:when]   `from` up to `when`, then `to`           [to:when]    nothing up to `when`, then `to`
    [from::when]     `from` up to `when`, then nothing         [a|b|c]      a, b, c, a, b ... step by step
    \\[  \\]  \\:  \\|    the characters themselves

`when` with a decimal point is a share of all steps, without one a number of steps. Brackets may be nested and may stand
anywhere in a text. A bracket without ":when" or "|" is an ordinary character, as it is in those interfaces.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lcmis_align.errors import ScheduleError

At = Callable[[int, int], str]
"""From (step, steps in all) to a text."""
_WHEN = re.compile(r"\s*(\d+\.\d*|\.\d+|\d+)\s*")


@dataclass
class _Group:
    """What stands in one bracket: parts split by `:` and by `|`, each a sequence of texts and groups."""

    column: int
    parts: "list[list[str | _Group]]"
    marks: list[str]


def parse(text: str) -> At:
    """Read the notation. Returns the text of each step.

    Raises ScheduleError, with the column, when a bracket is not closed or not opened.
    """
    root, end = _read(text, 0, None)
    if end < len(text):
        raise ScheduleError(f"prompt {text!r} closes a bracket at column {end + 1} that was not opened")
    sequence = [piece for part, mark in zip(root.parts, [*root.marks, ""], strict=True) for piece in (*part, mark)]
    compiled = [_compiled(piece) for piece in sequence]
    return lambda step, total: "".join(piece(step, total) for piece in compiled).strip()


def escape(text: str) -> str:
    """`text` so that `parse` reads it as it is."""
    return re.sub(r"([\[\]:|\\])", r"\\\1", text)


def steps_until(when: float | int, total: int) -> int:
    """Steps before `when`: a share in [0, 1] if it is a float, a number of steps if it is an int; at most `total`."""
    # A share such as 0.3 times 40 must not fall to 11 by rounding.
    return min(total, int(when * total + 1e-9) if isinstance(when, float) else when)


def _read(text: str, at: int, opened: int | None) -> tuple[_Group, int]:
    group = _Group(opened if opened is not None else -1, [[]], [])
    word = ""
    while at < len(text):
        character = text[at]
        if character == "\\" and at + 1 < len(text) and text[at + 1] in "[]:|\\":
            word, at = word + text[at + 1], at + 2
            continue
        if character in "[]" or (character in ":|" and opened is not None):
            group.parts[-1] += [word] if word else []
            word = ""
        if character == "[":
            inner, at = _read(text, at + 1, at)
            if at >= len(text):
                raise ScheduleError(f"prompt {text!r} opens a bracket at column {inner.column + 1} that is not closed")
            group.parts[-1].append(inner)
        elif character == "]":
            if opened is None:
                return group, at
            return group, at
        elif character in ":|" and opened is not None:
            group.marks.append(character)
            group.parts.append([])
        else:
            word += character
        at += 1
    group.parts[-1] += [word] if word else []
    return group, at


def _compiled(piece: "str | _Group") -> At:
    if isinstance(piece, str):
        return lambda step, total: piece
    parts = [[_compiled(inner) for inner in part] for part in piece.parts]

    def text(i: int, step: int, total: int) -> str:
        return "".join(inner(step, total) for inner in parts[i])

    if piece.marks and set(piece.marks) == {"|"}:
        return lambda step, total: text(step % len(parts), step, total)
    last = piece.parts[-1]
    when = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if piece.marks in ([":"], [":", ":"]) and when:
        number = float(when[1]) if "." in when[1] else int(when[1])
        if isinstance(number, float) and number > 1:
            raise ScheduleError(f"the share {number:g} at column {piece.column + 1} is outside 0..1")
        before = (lambda step, total: text(0, step, total)) if len(parts) == 3 else (lambda step, total: "")
        return lambda step, total: (
            before(step, total) if step < steps_until(number, total) else text(len(parts) - 2, step, total)
        )
    marks = [*piece.marks, ""]
    return lambda step, total: "[" + "".join(text(i, step, total) + mark for i, mark in enumerate(marks)) + "]"
