"""A run's self-contained page, and the passive page of a run that plain TRL has finished."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold_shared.cli import cell
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically

from dpo3d.alarms import DEFAULT, Alarm, Alarms, Record
from dpo3d.monitor import passive_record
from dpo3d.plots import monitor_panels

COLUMNS = {
    "step": "step",
    "delta_chosen": "Δ chosen",
    "delta_rejected": "Δ rejected",
    "drop_ratio": "drop ratio",
    "chosen_share": "chosen's share",
    "chosen_drawdown": "drawdown",
    "off_pair_mass": "off-pair mass",
    "self_ref_logp": "log π0 of samples",
    "kl_k3": "KL(π‖π0)",
    "entropy": "entropy",
}

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dpo3d: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 13.5px; }} th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #e6e6e6; }}
th {{ background: #f6f6f4; text-align: left; }} td {{ font-variant-numeric: tabular-nums; text-align: right; }}
.scroll {{ overflow-x: auto; }} .alarm {{ color: #b3261e; }} img {{ max-width: 100%; }} figcaption {{ color: #555; font-size: 13.5px; }}
figure {{ margin: 1.2rem 0; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(
    path: Path, history: Sequence[Record], alarms: Sequence[Alarm], *, title: str = "The three D's"
) -> Path:
    """Write the page with its pictures inside. Raises UserError when there is nothing to show."""
    if not history:
        raise UserError("the run has no evaluations to report")
    from matplotlib import pyplot

    esc = html.escape
    if alarms:
        body = [f'<p class="alarm">{esc(alarm.message)}</p>' for alarm in alarms]
    else:
        body = ["<p>No alarm was raised.</p>"]
    for caption, figure in monitor_panels(history):
        png = io.BytesIO()
        figure.savefig(png, format="png")
        pyplot.close(figure)
        data = base64.b64encode(png.getvalue()).decode()
        body.append(
            f'<figure><img alt="{esc(caption)}" src="data:image/png;base64,{data}"><figcaption>{esc(caption)}</figcaption></figure>'
        )
    columns = [key for key in COLUMNS if any(record.get(key) is not None for record in history)]
    head = "".join(f"<th>{esc(COLUMNS[key])}</th>" for key in columns)
    rows = "".join("<tr>" + "".join(f"<td>{esc(cell(r.get(key)))}</td>" for key in columns) + "</tr>" for r in history)
    body.append(f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>')
    with replace_atomically(path) as partial:
        partial.write_text(PAGE.format(title=esc(title), body="\n".join(body)), encoding="utf-8")
    return path


def trainer_log(run: Path) -> list[dict[str, Any]]:
    """The log history of a finished run: its `trainer_state.json`, or that of its last checkpoint.

    Raises UserError when there is none, or it is not a trainer's state.
    """
    if not run.is_dir():
        raise UserError(f"run folder '{run}' does not exist", hint="pass the output_dir of a training")
    checkpoints = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda p: _step(p.parent))
    found = [path for path in [run / "trainer_state.json", *reversed(checkpoints)] if path.exists()]
    if not found:
        raise UserError(
            f"no trainer_state.json in '{run}' or its checkpoints", hint="train with save_strategy other than no"
        )
    try:
        return json.loads(found[0].read_text(encoding="utf-8"))["log_history"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"'{found[0]}' is not a trainer's state ({type(error).__name__})", hint="save the run again"
        ) from error


def monitor_log(file: Path) -> tuple[list[Record], list[Alarm]]:
    """Records and alarms of a monitor's log. Raises UserError when the file is none."""
    try:
        history = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        raised = [Alarm(m.split(" ", 1)[0], r["step"], m) for r in history for m in r["alarms"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is not a monitor's log ({type(error).__name__})", hint="delete it") from error
    return history, raised


def _step(checkpoint: Path) -> int:
    tail = checkpoint.name.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else -1


def passive_history(
    log: Sequence[dict[str, Any]], *, beta: float = 0.1, beta_rejected: float | None = None, alarms: Alarms = DEFAULT
) -> tuple[list[Record], list[Alarm]]:
    """Records and alarms of a trainer's log. Raises UserError when it holds no likelihoods."""
    history: list[Record] = []
    raised: list[Alarm] = []
    betas = beta, beta if beta_rejected is None else beta_rejected
    for entry in log:
        record = passive_record(entry, int(entry.get("step", 0)), betas, history)
        if record is None:
            continue
        history.append(record)
        found = alarms.check(history, [alarm.kind for alarm in raised])
        record["alarms"] = [alarm.message for alarm in found]
        raised += found
    if not history:
        raise UserError("the run's log has no logps/chosen", hint="it must be of a TRL preference trainer")
    return history, raised
