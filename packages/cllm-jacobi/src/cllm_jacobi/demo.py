"""The demo: a target and its consistency-trained twin decode the same questions, live, then the table and the heat map."""

import contextlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table as Grid
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
SHORT = {"steps": 500, "prompts": 600, "consistency": 300}
"""Where no trained weights are found: about two minutes of one core, a worse translator and a smaller gain."""


def models(*, seed: int = 0, progress: Callable[[int, int], None] = lambda done, of: None) -> tuple[Any, Any, bool]:
    """Target, consistency model, and whether they came with the package; else both are trained here, briefly."""
    try:
        return testbed.load("target"), testbed.load("consistent"), True
    except UserError:
        target = testbed.train_target(seed=seed, steps=SHORT["steps"], progress=progress)
        data = testbed.gather(target, SHORT["prompts"], seed=seed)
        # Trainer prints its log on stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            return target, testbed.make_consistent(target, data, seed=seed, steps=SHORT["consistency"]), False


class _Watcher:
    """Takes what a decoder emits, run by run."""

    def __init__(self, title: str, words: Any, redraw: Callable[[], None]) -> None:
        self.title, self.words, self.redraw = title, words, redraw
        self.runs: list[list[int]] = []
        self.ended = False

    def put(self, tokens: Any) -> None:
        # The first thing put is the prompt.
        self.runs.append(tokens.flatten().tolist())
        self.redraw()

    def end(self) -> None:
        self.ended = True
        self.redraw()

    def panel(self) -> Panel:
        """Tokens in two shades, changing with every pass."""
        runs = self.runs[1:]
        shown = Text()
        for i, run in enumerate(runs):
            shown.append(
                self.words.decode(run, skip_special_tokens=True) + " ", style="bold cyan" if i % 2 else "bold yellow"
            )
        state = f"{sum(map(len, runs))} tokens in {len(runs)} passes{', done' if self.ended else ''}"
        return Panel(shown + Text(f"\n{state}", style="dim"), title=self.title, title_align="left")


def watch(target: Any, consistent: Any, question: str, *, pause: float = 0.06) -> None:
    """Decode one question with both models at once, side by side, pass by pass, on stderr."""
    words = testbed.tokenizer()
    asked = words(testbed.prompt(question), return_tensors="pt", return_token_type_ids=False)

    def picture() -> Group:
        beside = Grid.grid(expand=True)
        # Halves that stay, however much either has said.
        for _ in watchers:
            beside.add_column(ratio=1)
        beside.add_row(*(watcher.panel() for watcher in watchers))
        return Group(Text(question, style="italic"), beside)

    def redraw() -> None:
        live.refresh()
        if console.is_terminal:
            time.sleep(pause)

    def decode(model: Any, watcher: _Watcher) -> None:
        jacobi_generate(
            model, **asked, streamer=watcher, max_new_tokens=testbed.MAX_NEW_TOKENS, block_size=testbed.BLOCK
        )

    watchers = [_Watcher(title, words, redraw) for title in ("target", "trained model")]
    # Drawn from the watchers at every refresh, under Live's lock: neither thread can put back what the other has moved on.
    with Live(console=console, get_renderable=picture, auto_refresh=False) as live, ThreadPoolExecutor() as threads:
        for done in [threads.submit(decode, *pair) for pair in zip((target, consistent), watchers, strict=True)]:
            done.result()
    if not console.is_terminal:
        # Live ends its last picture with a new line on terminals only.
        console.print()


def run(output: Path, seed: int, progress: Callable[[int, int], None] = lambda done, of: None) -> Table:
    """Everything; writes the picture and summary.json to `output` and gives the table."""
    target, consistent, shipped = models(seed=seed, progress=progress)
    pairs = testbed.questions(QUESTIONS, split="test", seed=100 + seed)
    # A core for each of the two that decode at once; and passes as small as these are no faster on several.
    torch.set_num_threads(1)
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
        notes.append(
            "No trained weights were found; both models were trained here, briefly: a small part of the recipe and of the gain."
        )
    caption = (
        "Share of blocks in which a position is confirmed, after each pass: one diagonal token a pass, or whole runs."
    )
    write_summary(output, "cllm-jacobi", table, [(picture.name, caption)], notes)
    return table
