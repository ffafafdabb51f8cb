"""The monitor: see the three D's while an unmodified trainer runs.

    monitor = ThreeDMonitor(ProbeSet.from_dataset(held_out, tokenizer), output_dir="run")
    monitor.attach(trainer)
    trainer.train()

Training is bit-identical with and without it: evaluations run without gradients, in evaluation mode, and leave every
random state and every module's mode as they were. It reaches the model through the trainer, since a trainer's callbacks
do not see the wrapped one. Without a probe it is passive, and works from what the trainer logs.
"""

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from transformers import TrainerCallback

from dpo3d.alarms import DEFAULT, Alarm, Alarms, Record
from dpo3d.losses import PairLogps
from dpo3d.probe import PAIR, ProbeSet
from dpo3d.scoring import Row, Scored, evaluating, pad_rows, preserved_rng, sample, score
from dpo3d.theory import displacement_band, grad_wrt_likelihood

logger = logging.getLogger(__name__)

OnAlarm = Literal["warn", "save", "stop"] | Callable[[Alarm], None]
LOG, BASELINE, REPORT = "dpo3d_log.jsonl", "dpo3d_baseline.json", "dpo3d_report.html"
EPSILON = 1e-3


class ThreeDMonitor(TrainerCallback):
    """Watches drop, degradation and dispersion; attach it to any TRL trainer.

    probe: answers to watch; None for a passive monitor. every: steps between evaluations, besides step 0 and the end.
    alarms: thresholds. on_alarm: `warn` logs, `save` also asks for a checkpoint, `stop` ends the training; or a function.
    output_dir: where the log (`dpo3d_log.jsonl`) and at the end the report go; nothing is written without it.
    beta, beta_rejected, gamma: of the gradient view; the trainer's own where None.
    generate: draw a fresh sample per probe prompt, for self_ref_logp, KL, entropy and distinct-2.
    max_new_tokens: of samples; the longest answer of the probe, 64 at most, where None.
    budget: padded tokens in one forward pass. every_grad: steps between looks at the first-order band, never where None.

    Raises UserError for an `every` under 1 or an unknown `on_alarm`.
    """

    def __init__(
        self,
        probe: ProbeSet | None = None,
        every: int = 50,
        *,
        alarms: Alarms = DEFAULT,
        on_alarm: OnAlarm = "warn",
        output_dir: str | Path | None = None,
        beta: float | None = None,
        beta_rejected: float | None = None,
        gamma: float | None = None,
        generate: bool = True,
        max_new_tokens: int | None = None,
        budget: int = 4096,
        every_grad: int | None = None,
    ):
        if every < 1 or (every_grad is not None and every_grad < 1):
            raise UserError(f"every is {every} and every_grad is {every_grad}, expected 1 or more")
        if not callable(on_alarm) and on_alarm not in ("warn", "save", "stop"):
            raise UserError(f"on_alarm is '{on_alarm}', expected warn, save, stop or a function")
        self.probe, self.every, self.alarms, self.on_alarm = probe, every, alarms, on_alarm
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.beta, self.beta_rejected, self.gamma = beta, beta_rejected, gamma
        self.generate, self.budget, self.every_grad = generate, budget, every_grad
        self.max_new_tokens = max_new_tokens or (min(probe.longest, 64) if probe else 0)
        self.history: list[Record] = []
        self.raised: list[Alarm] = []
        self.seconds = 0.0
        """Spent in evaluations so far."""
        self._trainer: Any = None
        self._baseline: list[list[float]] | None = None

    def attach(self, trainer: Any) -> "ThreeDMonitor":
        """Add the monitor to a trainer; returns it. Raises UserError when it is attached already."""
        if self._trainer is not None:
            raise UserError("the monitor is attached already", hint="one monitor watches one trainer")
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step 0, or the step a resumed run begins at: then the baseline comes from the output folder."""
        if self._trainer is None:
            raise UserError("the monitor is not attached", hint="call monitor.attach(trainer)")
        if state.global_step > 0:
            self._restore(state.global_step)
        if self.probe is not None and not any(r["step"] == state.global_step for r in self.history):
            self._evaluate(state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation every `every` steps."""
        if self.probe is not None and state.global_step % self.every == 0:
            self._evaluate(state.global_step, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Passive: a record from what the trainer logs."""
        if self.probe is None and (
            record := passive_record(logs or {}, state.global_step, self._betas(), self.history)
        ):
            self._add(record, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A last evaluation, and the report."""
        if self.probe is not None and self.history[-1]["step"] != state.global_step:
            self._evaluate(state.global_step, control)
        if self.output_dir is not None and self._is_main and self.history:
            from dpo3d.report import write_report

            write_report(self.output_dir / REPORT, self.history, self.raised)

    @property
    def _is_main(self) -> bool:
        return self._trainer.accelerator.is_main_process

    def _betas(self) -> tuple[float, float]:
        args = self._trainer.args if self._trainer is not None else None
        own = getattr(args, "betas", None) or (getattr(args, "beta", None) or 0.1,) * 2
        if args is not None and hasattr(args, "beta_rejected_at"):
            state = self._trainer.state
            own = own[0], args.beta_rejected_at(min(state.global_step / state.max_steps, 1.0))
        beta = own[0] if self.beta is None else self.beta
        if self.beta_rejected is not None:
            return beta, self.beta_rejected
        return beta, own[1] if self.beta is None else beta

    def _evaluate(self, step: int, control: Any) -> None:
        start = time.perf_counter()
        trainer = self._trainer
        model = trainer.model_wrapped
        with preserved_rng(), evaluating(model), trainer.accelerator.autocast():
            record = self._measure(model, step)
            if self.every_grad is not None and step % self.every_grad == 0:
                record["band"] = self._band()
        record["seconds"] = time.perf_counter() - start
        self.seconds += record["seconds"]
        self._add(record, control)

    def _add(self, record: Record, control: Any) -> None:
        self.history.append(record)
        alarms = self.alarms.check(self.history, [alarm.kind for alarm in self.raised])
        record["alarms"] = [alarm.message for alarm in alarms]
        for alarm in alarms:
            self.raised.append(alarm)
            if callable(self.on_alarm):
                self.on_alarm(alarm)
                continue
            if self._is_main:
                logger.warning("dpo3d: %s", alarm.message)
            control.should_save = control.should_save or self.on_alarm == "save"
            control.should_training_stop = control.should_training_stop or self.on_alarm == "stop"
        if self.output_dir is not None and self._is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with (self.output_dir / LOG).open("a" if len(self.history) > 1 else "w", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")

    def _measure(self, model: Any, step: int) -> Record:
        probe, trainer = self._probe, self._trainer
        whole = self._whole_model()
        if "ref_samples" in probe.wanted and "ref_samples" not in probe.answers and whole is not None:
            probe.add_reference_samples(self._draw(whole, probe.k, probe.seed))
        pad = _pad_id(probe.tokenizer)
        share = (trainer.accelerator.process_index, trainer.accelerator.num_processes)
        rows, where = probe.rows()
        fresh: list[Row] = []
        if self.generate and whole is not None:
            drawn = self._draw(whole, 1, probe.seed + 1 + step)
            fresh = [Row(p, group[0]) for p, group in zip(probe.prompts, drawn, strict=True)]
        fixed = score(model, rows, pad, budget=self.budget, share=share)
        if self._baseline is None:
            self._baseline = [s.logps for s in fixed]
            self._save_baseline(step)
        record: Record = {"step": step, "kinds": _kinds(fixed, self._baseline, where)}
        record.update(self._pair_quantities(fixed, where))
        if "known" in probe.answers:
            mass = [0.0] * len(probe.prompts)
            for s, (kind, i) in zip(fixed, where, strict=True):
                mass[i] += math.exp(s.total) if kind == "known" else 0.0
            record["off_pair_mass"] = 1 - statistics.fmean(mass)
        if fresh:
            own = score(model, fresh, pad, budget=self.budget, entropy=True, share=share)
            record.update(self._fresh_quantities(fresh, own, pad, share))
        return record

    def _draw(self, model: Any, n: int, seed: int) -> list[list[list[int]]]:
        """n samples per probe prompt, the same on all ranks."""
        probe = self._probe
        drawn = sample(model, probe.prompts, probe.tokenizer, n=n, max_new_tokens=self.max_new_tokens, seed=seed)
        if self._trainer.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (drawn,) = broadcast_object_list([drawn])
        return drawn

    @property
    def _probe(self) -> ProbeSet:
        assert self.probe is not None
        return self.probe

    def _pair_quantities(self, fixed: Sequence[Scored], where: Sequence[tuple[str, int]]) -> Record:
        """D1, D2, the unseen shift and the gradient view."""
        assert self._baseline is not None
        now = {kind: [s for s, (k, _) in zip(fixed, where, strict=True) if k == kind] for kind in PAIR}
        then = {kind: [b for b, (k, _) in zip(self._baseline, where, strict=True) if k == kind] for kind in PAIR}
        delta = {kind: [s.total - sum(b) for s, b in zip(now[kind], then[kind], strict=True)] for kind in PAIR}
        plus, minus = statistics.fmean(delta["chosen"]), statistics.fmean(delta["rejected"])
        per_token = statistics.fmean(d / len(s.logps) for d, s in zip(delta["rejected"], now["rejected"], strict=True))
        chosen = statistics.fmean(s.per_token for s in now["chosen"])
        best = max([r["chosen_per_token"] for r in self.history if "chosen_per_token" in r] + [chosen])
        unseen = {
            kind: statistics.fmean(
                s.per_token - statistics.fmean(b)
                for s, b, (k, _) in zip(fixed, self._baseline, where, strict=True)
                if k == kind
            )
            for kind in self._probe.unseen
            if any(k == kind for k, _ in where)
        }
        moved = plus - minus
        return {
            "delta_chosen": plus,
            "delta_rejected": minus,
            "delta_rejected_per_token": per_token,
            "drop_ratio": abs(minus) / max(abs(plus), EPSILON),
            "chosen_share": plus / moved if moved else None,
            "chosen_per_token": chosen,
            "chosen_drawdown": best - chosen,
            "unseen_shift": unseen,
            **self._gradient_view(now, then),
        }

    def _gradient_view(self, now: dict[str, list[Scored]], then: dict[str, list[list[float]]]) -> Record:
        beta, beta_rejected = self._betas()
        gamma = self.gamma if self.gamma is not None else getattr(self._trainer.args, "sft_gamma", 0.0)
        totals = [torch.tensor([s.total for s in now[kind]], dtype=torch.float64) for kind in PAIR]
        starts = [torch.tensor([sum(b) for b in then[kind]], dtype=torch.float64) for kind in PAIR]
        pair = PairLogps(totals[0], totals[1], starts[0], starts[1])
        log_gradients = grad_wrt_likelihood(pair, beta_chosen=beta, beta_rejected=beta_rejected, gamma=gamma)
        lengths = [torch.tensor([len(s.logps) for s in now[kind]], dtype=torch.float64) for kind in PAIR]
        w = torch.sigmoid(-pair.margin(beta, beta_rejected))
        return {
            "weight_chosen": float((beta * w + gamma).mean()),
            "weight_rejected": float((beta_rejected * w).mean()),
            "log_grad_chosen": float(log_gradients.log_chosen.mean()),
            "log_grad_rejected": float(log_gradients.log_rejected.mean()),
            "log_grad_chosen_per_token": float((log_gradients.log_chosen / lengths[0]).mean()),
            "log_grad_rejected_per_token": float((log_gradients.log_rejected / lengths[1]).mean()),
            "log_grad_ratio": float(log_gradients.log_ratio.mean()),
        }

    def _fresh_quantities(
        self, fresh: Sequence[Row], own: Sequence[Scored], pad: int, share: tuple[int, int]
    ) -> Record:
        """Entropy and variety of fresh samples, and what the reference says of them."""
        bigrams = [pair for row in fresh for pair in zip(row.completion, row.completion[1:], strict=False)]
        record: Record = {
            "entropy": statistics.fmean(s.entropy for s in own if s.entropy is not None),
            "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
            "self_ref_logp": None,
        }
        reference = self._reference_scores(fresh, pad, share)
        if reference is not None:
            # With x sampled from π and d = log π0(x) − log π(x): k1 = −d, k3 = e^d − 1 − d, both of mean KL(π‖π0).
            gaps = [r.total - s.total for r, s in zip(reference, own, strict=True)]
            record["self_ref_logp"] = statistics.fmean(r.per_token for r in reference)
            record["kl_k1"] = -statistics.fmean(gaps)
            record["kl_k3"] = statistics.fmean(math.exp(min(gap, 700.0)) - 1 - gap for gap in gaps)
        return record

    def _reference_scores(self, rows: Sequence[Row], pad: int, share: tuple[int, int]) -> list[Scored] | None:
        """Scores under the trainer's reference: its model, or its own with the adapter off; None where it keeps none."""
        trainer = self._trainer
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            with evaluating(reference):
                return score(reference, rows, pad, budget=self.budget, share=share)
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        if not hasattr(unwrapped, "peft_config"):
            return None
        from trl.trainer.utils import use_adapter

        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            return score(unwrapped, rows, pad, budget=self.budget, share=share)

    def _whole_model(self) -> Any:
        """The model to generate with; None where its weights are in pieces over the ranks."""
        trainer = self._trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return None
        return trainer.accelerator.unwrap_model(trainer.model_wrapped)

    def _band(self) -> Record | None:
        """Where β+/β− stands in the first-order band, from the gradients of the probe's first pairs."""
        model = self._whole_model()
        if model is None:
            return None
        answers = self._probe.answers
        rows = {
            kind: [Row(p, a[0]) for p, a in zip(self._probe.prompts, answers[kind], strict=True)][:4] for kind in PAIR
        }
        plus, minus = (log_gradient(model, rows[kind], _pad_id(self._probe.tokenizer)) for kind in PAIR)
        band = displacement_band(float(plus @ plus), float(plus @ minus), float(minus @ minus))
        beta, beta_rejected = self._betas()
        high = None if math.isinf(band.high) else band.high
        return {"low": band.low, "high": high, "inside": band.holds(beta, beta_rejected)}

    def _save_baseline(self, step: int) -> None:
        if self.output_dir is None or not self._is_main:
            return
        with replace_atomically(self.output_dir / BASELINE) as partial:
            text = json.dumps({"step": step, "answers": self._probe.answers, "logps": self._baseline})
            partial.write_text(text, encoding="utf-8")

    def _restore(self, step: int) -> None:
        """Take up log and baseline of the run that is resumed; without them the baseline is the present step."""
        if self.output_dir is None or not (self.output_dir / LOG).exists():
            logger.warning("dpo3d: no log of the resumed run; changes are counted from step %d", step)
            return
        from dpo3d.report import monitor_log

        history, raised = monitor_log(self.output_dir / LOG)
        self.history = [record for record in history if record["step"] <= step]
        self.raised = [alarm for alarm in raised if alarm.step <= step]
        if self._is_main:
            with replace_atomically(self.output_dir / LOG) as partial:
                partial.write_text("".join(json.dumps(r) + "\n" for r in self.history), encoding="utf-8")
        if self.probe is not None and (self.output_dir / BASELINE).exists():
            stored = json.loads((self.output_dir / BASELINE).read_text(encoding="utf-8"))
            self.probe.answers, self._baseline = stored["answers"], stored["logps"]


def passive_record(
    logs: dict[str, Any], step: int, betas: tuple[float, float], history: Sequence[Record]
) -> Record | None:
    """A record from one entry of a trainer's log, None when it tells nothing of likelihoods.

    Δ± come from `rewards/*` over β± where the trainer has a reference, else from `logps/*` since the first entry.
    """

    def number(key: str) -> float | None:
        value = logs.get(key)
        return None if value is None else float(value)

    chosen, rejected = number("logps/chosen"), number("logps/rejected")
    if chosen is None or rejected is None:
        return None
    record: Record = {"step": step, "logp_chosen": chosen, "logp_rejected": rejected, "entropy": number("entropy")}
    rewards = number("rewards/chosen"), number("rewards/rejected")
    first = history[0] if history else record
    if rewards[0] is not None and rewards[1] is not None and betas[1] > 0:
        plus, minus = rewards[0] / betas[0], rewards[1] / betas[1]
    else:
        plus, minus = chosen - first["logp_chosen"], rejected - first["logp_rejected"]
    moved = plus - minus
    return record | {
        "delta_chosen": plus,
        "delta_rejected": minus,
        "drop_ratio": abs(minus) / max(abs(plus), EPSILON),
        "chosen_share": plus / moved if moved else None,
        "alarms": [],
    }


def log_gradient(model: Any, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    """∇θ of the mean log π of the rows over the trainable parameters, flat; the parameters' own gradients stay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        ids, attention, completion = pad_rows(rows, pad_id, next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        total = (logps * completion[:, 1:]).sum() / len(rows)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten().float() for g in gradients])


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _kinds(fixed: Sequence[Scored], baseline: Sequence[list[float]], where: Sequence[tuple[str, int]]) -> Record:
    """Per kind: mean log π per sequence and per token, its quantiles over the answers, and the change since step 0."""
    groups: dict[str, list[tuple[Scored, list[float]]]] = {}
    for s, b, (kind, _) in zip(fixed, baseline, where, strict=True):
        groups.setdefault(kind, []).append((s, b))
    return {kind: _summary(members) for kind, members in groups.items()}


def _summary(members: Sequence[tuple[Scored, list[float]]]) -> Record:
    tokens = sorted(s.per_token for s, _ in members)
    return {
        "sum": statistics.fmean(s.total for s, _ in members),
        "per_token": statistics.fmean(tokens),
        "quantiles": [tokens[round(q * (len(tokens) - 1))] for q in (0.1, 0.5, 0.9)],
        "delta": statistics.fmean(s.total - sum(b) for s, b in members),
        "delta_per_token": statistics.fmean(s.per_token - statistics.fmean(b) for s, b in members),
    }
