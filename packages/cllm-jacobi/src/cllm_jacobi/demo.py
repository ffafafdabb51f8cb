"""The demo: a target and its consistency-trained twin decode the same questions, live, then the table and the heat map."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from tenfold_shared.cli import Table, console, write_summary
from tenfold_shared.errors import UserError

from cllm_jacobi import testbed
from cllm_jacobi.evaluate import LEAN, compare_decoders, decoders, speed_ratio
from cllm_jacobi.heatmap import draw_confirmed
from cllm_jacobi.jacobi import JacobiConfig, jacobi_generate
from cllm_jacobi.metrics import fast_forwarded, stationary

QUESTIONS = 40
SHOWN = 2
SHORT = {"steps": 500, "prompts": 600, "consistency": 120}
"""Where no trained weights are found: about a minute, and a worse translator."""


def models(*, seed: int = 0, progress: Callable[[int, int], None] = lambda done, of: None) -> tuple[Any, Any, bool]:
    """Target, consistency model, and whether they came with the package; else both are trained here, briefly."""
    try:
        return testbed.load("target"), testbed.load("consistent"), True
    except UserError:
        target = testbed.train_target(seed=seed, steps=SHORT["steps"], progress=progress)
        data = testbed.gather(target, SHORT["prompts"], seed=seed)
        return target, testbed.make_consistent(target, data, seed=seed, steps=SHORT["consistency"]), False


class _Watcher:
    """Takes what a decoder emits, run by run, and draws it."""

    def __init__(self, words: Any, redraw: Callable[[], None]) -> None:
        self.words, self.redraw = words, redraw
        self.runs: list[list[int]] = []
        self.ended = False

    def put(self, tokens: Any) -> None:
        # The first thing put is the prompt.
        self.runs.append(tokens.flatten().tolist())
        self.redraw()

    def end(self) -> None:
        self.ended = True
        self.redraw()

    def text(self) -> Text:
        """Tokens in two shades, changing with every pass."""
        shown = Text()
        for i, run in enumerate(self.runs[1:]):
            shown.append(
                self.words.decode(run, skip_special_tokens=True) + " ", style="bold cyan" if i % 2 else "bold yellow"
            )
        passes = max(len(self.runs) - 1, 0)
        return shown + Text(
            f"\n{sum(map(len, self.runs[1:]))} tokens in {passes} passes{', done' if self.ended else ''}", style="dim"
        )


def watch(target: Any, consistent: Any, question: str, *, pause: float = 0.06) -> None:
    """Decode one question with both models in turn, pass by pass, on stderr."""
    words = testbed.tokenizer()
    asked = words(testbed.prompt(question), return_tensors="pt", return_token_type_ids=False)
    names = ("target", "trained model")
    with Live(console=console, refresh_per_second=20, transient=False) as live:

        def redraw() -> None:
            panels = [Panel(w.text(), title=name, title_align="left") for name, w in zip(names, watchers, strict=True)]
            live.update(Group(Text(question, style="italic"), *panels), refresh=True)
            if console.is_terminal:
                time.sleep(pause)

        watchers = [_Watcher(words, redraw) for _ in names]
        for model, watcher in zip((target, consistent), watchers, strict=True):
            jacobi_generate(
                model, **asked, streamer=watcher, max_new_tokens=testbed.MAX_NEW_TOKENS, block_size=testbed.BLOCK
            )


def run(output: Path, seed: int, progress: Callable[[int, int], None] = lambda done, of: None) -> Table:
    """Everything; writes the picture and summary.json to `output` and gives the table."""
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    target, consistent, shipped = models(seed=seed, progress=progress)
    pairs = testbed.questions(QUESTIONS, split="test", seed=100 + seed)
    for question, _ in pairs[:SHOWN]:
        watch(target, consistent, question)
    words = testbed.tokenizer()
    ids = [words(testbed.prompt(q), return_tensors="pt")["input_ids"] for q, _ in pairs]
    rows, blocks = [], {}
    for name, model in (("target", target), ("trained", consistent)):
        contestants = decoders(model, JacobiConfig(seed=seed), max_new_tokens=testbed.MAX_NEW_TOKENS, eos=[1], pad=0)
        figures = compare_decoders(model, ids, contestants)
        texts = [words.decode(out, skip_special_tokens=True) for out in figures[LEAN].outputs]
        right = sum(testbed.accuracy(texts, pairs)) / len(pairs)
        for decoder, row in figures.items():
            speed = sum(row.tokens_per_forward) / len(row.tokens_per_forward)
            rows.append([name, decoder, right, row.equal == len(pairs), speed, speed_ratio(row, figures[LEAN])])
        data = testbed.collect(model, [q for q, _ in pairs], seed=seed)
        blocks[f"{name}"] = [states for record in data for states in record["trajectories"]]
    picture = draw_confirmed(blocks, output / "confirmed")
    counts = {
        name: [sum(map(count, found)) / len(found) for count in (fast_forwarded, stationary)]
        for name, found in blocks.items()
    }
    columns = [
        "model",
        "decoder",
        "execution accuracy",
        "equal output",
        "tokens per forward",
        "speed over the lean loop",
    ]
    table = Table(f"{QUESTIONS} unseen questions to SQL, block size {testbed.BLOCK}", columns, rows)
    notes = [
        f"{name}: {ff:.2f} tokens fast-forwarded an iteration, {st:.2f} stationary a block"
        for name, (ff, st) in counts.items()
    ]
    if not shipped:
        notes.append("No trained weights were found; both models were trained here for about a minute.")
    caption = (
        "Share of blocks in which a position is confirmed, after each pass: one diagonal token a pass, or whole runs."
    )
    write_summary(output, "cllm-jacobi", table, [(picture.name, caption)], notes)
    return table
