"""Fine-tuning a diffusion model for faces, as LoRA or whole, by one of five methods.

sft       denoising loss on the good images
guidance  the same, plus lambda times the trajectory loss that leads the bad state to the good image (2406.17100v1; the
          formula is not public, `target` names three readings of it: x0, teacher, step)
dpo       Diffusion-DPO on (good, bad) (2406.17100v2)
refl      the reward's gradient through the last denoising step (2304.05977, section 3.2)
filter    sft on the best share of the model's own samples, by the reward
"""

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import Tensor
from tqdm.auto import tqdm

from facescore.errors import CheckpointError, TrainingError
from facescore.pairs.dataset import PairDataset, TensorPairs
from facescore.refine import losses
from facescore.refine.pipelines import Backbone, Condition, backbone_of, to_pixels

METHODS = ("sft", "guidance", "dpo", "refl", "filter")
STATE = "training.pt"


@dataclass(frozen=True)
class TuneConfig:
    """How a diffusion model is refined."""

    steps: int = 100
    lr: float = 1e-4
    batch_size: int = 4
    """Pairs of one update, over all processes."""
    resolution: int | None = None
    """Side of the square training pictures in pixels; None is the pipeline's own."""
    lora_rank: int | None = 8
    """None trains every weight."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    target: str = "x0"
    """Of guidance: x0, teacher or step."""
    guidance_weight: float = 1.0
    """lambda."""
    mask_loss: bool = True
    outside_weight: float = 0.0
    """Weight of the guidance loss outside the face mask."""
    t_min: float = 0.1
    t_max: float = 1.0
    """Shares of the training times that guidance draws from; below t_min a jump from bad to good is ill-posed."""
    step_size: float = 0.05
    """Of target="step", as a share of the training times."""
    beta: float = 2000.0
    """Of DPO."""
    max_drift: float | None = None
    """DPO stops when the winners' denoising error exceeds this multiple of the reference's (running means)."""
    general_weight: float = 0.0
    """Of the denoising loss on the `general` images, which keep other abilities."""
    keep: float = 0.25
    """Of filter: the best share of the samples."""
    samples: int = 64
    """Of filter: how many are drawn."""
    sampling_steps: int = 20
    """Of filter and refl."""
    refl_window: float = 0.2
    """Of refl: the reward is taken after a random one of this last share of the sampling steps."""
    min_snr_gamma: float | None = None
    ema_decay: float | None = None
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("steps", self.steps >= 1, "1 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("resolution", self.resolution is None or self.resolution >= 8, "8 or more"),
            ("lora_rank", self.lora_rank is None or self.lora_rank >= 1, "1 or more"),
            ("target", self.target in losses.TARGETS, f"one of {', '.join(losses.TARGETS)}"),
            ("beta", self.beta > 0, "above 0"),
            ("samples", self.samples >= 1, "1 or more"),
            ("sampling_steps", self.sampling_steps >= 1, "1 or more"),
            ("save_every", self.save_every >= 1, "1 or more"),
            ("mixed_precision", self.mixed_precision in ("no", "bf16", "fp16"), "no, bf16 or fp16"),
            ("t_min", 0 <= self.t_min < self.t_max, "at least 0 and below t_max"),
            ("t_max", self.t_max <= 1, "at most 1"),
            ("keep", 0 < self.keep <= 1, "in (0, 1]"),
            ("outside_weight", 0 <= self.outside_weight <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)}, expected {wanted}")


Scoring = Callable[[Tensor], Tensor]
"""Pixels (n, 3, H, W) in [0, 1] to rewards (n,), higher for better; differentiable for refl, NaN where there is no face."""


@dataclass
class _Latents:
    good: Tensor
    bad: Tensor | None
    mask: Tensor | None
    condition: Condition
    ids: list[str]

    def __len__(self) -> int:
        return len(self.good)


class FaceTuner:
    """Refines the denoiser of `pipe` in place.

    pairs: a `PairDataset`, or `TensorPairs` of whole images with `prompts`; not needed for refl. method: one of `METHODS`.
    scorer: the reward, for filter and refl. prompts: for filter and refl; those of the pairs when not given. general:
    images and their prompts for `general_weight`. output: folder for checkpoints. options: fields of `TuneConfig`.

    Raises UserError when something the method needs is missing.
    """

    def __init__(
        self,
        pipe: Any,
        pairs: PairDataset | TensorPairs | None = None,
        *,
        method: str = "guidance",
        config: TuneConfig | None = None,
        scorer: Scoring | None = None,
        prompts: Sequence[str] | None = None,
        general: tuple[Sequence[Image.Image], Sequence[str]] | None = None,
        output: str | Path | None = None,
        **options: Any,
    ):
        if method not in METHODS:
            raise UserError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
        if config is not None and options:
            raise UserError("pass either a config or its fields, not both")
        try:
            self.config = config or TuneConfig(**options)
        except TypeError as error:
            raise UserError(f"{error}".replace("TuneConfig.__init__()", "FaceTuner")) from error
        if method in ("sft", "guidance", "dpo") and (pairs is None or not len(pairs)):
            raise UserError(f"{method} needs pairs")
        self.prompts = list(prompts if prompts is not None else pairs.prompts if pairs is not None else [])
        if method in ("refl", "filter") and (scorer is None or not self.prompts):
            raise UserError(f"{method} needs a scorer and prompts")
        if self.config.general_weight > 0 and general is None:
            raise UserError("general_weight needs general images and their prompts")
        self.pipe, self.pairs, self.method, self.scorer = pipe, pairs, method, scorer
        self.general, self.output = general, Path(output) if output is not None else None
        self.backbone: Backbone = backbone_of(pipe)
        self.history: list[dict[str, float]] = []
        self._prepare_weights()

    def _prepare_weights(self) -> None:
        module = self.backbone.module
        self._reference: Any = None
        needs_reference = self.method == "dpo" or (self.method == "guidance" and self.config.target == "teacher")
        for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(self.pipe, name, None) is not None:
                getattr(self.pipe, name).requires_grad_(False)
        if self.config.lora_rank is None:
            module.requires_grad_(True)
            if needs_reference:
                self._reference = copy.deepcopy(module).requires_grad_(False).eval()
        else:
            from peft import LoraConfig

            module.requires_grad_(False)
            torch.manual_seed(self.config.seed)
            rank = self.config.lora_rank
            # A fresh adapter is the identity: B starts at zero.
            module.add_adapter(
                LoraConfig(
                    r=rank, lora_alpha=rank, target_modules=list(self.config.lora_targets), init_lora_weights=True
                )
            )
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Any:
        """The denoiser as it was: the copy, or with the LoRA adapter switched off."""
        if self._reference is not None:
            yield self._reference
            return
        module = self.backbone.module
        module.disable_adapters()
        try:
            yield module
        finally:
            module.enable_adapters()

    def train(self, *, resume: bool = False, on_step: Callable[[int, "FaceTuner"], None] | None = None) -> "FaceTuner":
        """Train to the end and return self. on_step: called after each update with its number.

        resume: go on from `training.pt` in the output folder. Raises TrainingError with the pair ids when a loss is not
        finite.
        """
        from accelerate import Accelerator
        from diffusers.training_utils import EMAModel

        c = self.config
        accelerator = Accelerator(mixed_precision=c.mixed_precision)
        data = self._data() if self.method != "refl" else None
        general = self._encode(list(self.general[0]), list(self.general[1])) if self.general else None
        parameters = list(self.trained.values())
        optimizer = torch.optim.AdamW(parameters, lr=c.lr)
        module, optimizer = accelerator.prepare(self.backbone.module, optimizer)
        average = EMAModel(parameters, decay=c.ema_decay) if c.ema_decay else None
        step, drift = 0, 1.0
        if resume and (saved := self._load()) is not None:
            self._restore(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            step, drift, self.history = saved["step"], saved["drift"], saved["history"]
            if average is not None:
                average.load_state_dict(saved["average"])
        module.train()
        bar = tqdm(
            total=c.steps, initial=step, desc=self.method, disable=None if accelerator.is_main_process else True,
            mininterval=2,
        )  # fmt: skip
        while step < c.steps and not (c.max_drift is not None and drift > c.max_drift):
            generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
            rows = torch.randint(len(data), (c.batch_size,), generator=generator) if data is not None else None
            loss, record = self._loss(accelerator, module, data, general, rows, generator)
            if not torch.isfinite(loss):
                ids = ", ".join(data.ids[i] for i in rows[:8]) if data is not None and rows is not None else "none"
                raise TrainingError(f"the loss is {loss.item()} at update {step}; pairs {ids}", hint="lower lr")
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, c.max_grad_norm)
            optimizer.step()
            if average is not None:
                average.step(parameters)
            step += 1
            if "drift" in record:
                drift += (record["drift"] - drift) * 0.1
            self.history.append({"step": float(step), "loss": float(loss.detach()), **record})
            bar.update()
            if self.output is not None and accelerator.is_main_process and step % c.save_every == 0:
                self._save(
                    {"step": step, "drift": drift, "weights": {n: p.detach() for n, p in self.trained.items()},
                     "optimizer": optimizer.state_dict(), "history": self.history, "config": self._signature(),
                     "average": average.state_dict() if average is not None else None}
                )  # fmt: skip
            if on_step is not None:
                on_step(step, self)
        bar.close()
        if average is not None:
            average.copy_to(parameters)
        self.backbone.module.eval()
        accelerator.wait_for_everyone()
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the LoRA for `pipe.load_lora_weights(folder)`, or the whole pipeline when every weight was trained."""
        folder = Path(folder)
        with replace_atomically(folder) as partial:
            partial.mkdir()
            if self.config.lora_rank is None:
                self.pipe.save_pretrained(partial)
            else:
                from diffusers.utils import convert_state_dict_to_diffusers
                from peft.utils import get_peft_model_state_dict

                layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.backbone.module))
                self.backbone.save_lora(partial, layers)
        return folder

    def _loss(
        self, accelerator: Any, module: Any, data: _Latents | None, general: _Latents | None, rows: Any, generator: Any
    ) -> tuple[Tensor, dict[str, float]]:
        if self.method == "refl":
            return self._refl(module, generator, accelerator)
        assert data is not None
        n, schedule, device = len(rows), self.backbone.schedule, self.backbone.device
        low = self.config.t_min if self.method == "guidance" else 0.0
        index = losses.sample_times(n, schedule, low, self.config.t_max, generator)
        noise = torch.randn((n, *data.good.shape[1:]), generator=generator)
        general_rows = torch.randint(len(general), (n,), generator=generator) if general is not None else None
        mine = np.array_split(np.arange(n), accelerator.num_processes)[accelerator.process_index]
        share = len(mine) * accelerator.num_processes / n
        rows, index, noise = rows[mine], index[mine], noise[mine].to(device)
        alpha, sigma = schedule.at(index.to(device))
        good = data.good[rows].to(device)
        condition = {k: v[rows].to(device) for k, v in data.condition.items()}
        z_good = alpha * good + sigma * noise
        wanted = losses.target(schedule.kind, good, noise, alpha, sigma)
        record: dict[str, float] = {}
        # One call of the module for everything: DDP wants one forward before each backward.
        states, times, conditions = [z_good], [index], [condition]
        if self.method in ("guidance", "dpo"):
            assert data.bad is not None
            bad = data.bad[rows].to(device)
            z_bad = alpha * bad + sigma * noise
            states, times, conditions = [z_good, z_bad], [index, index], [condition, condition]
        if general is not None and self.config.general_weight > 0:
            assert general_rows is not None
            plain_rows = general_rows[mine]
            plain = general.good[plain_rows].to(device)
            states.append(alpha * plain + sigma * noise)
            times.append(index)
            conditions.append({k: v[plain_rows].to(device) for k, v in general.condition.items()})
        joined = {k: torch.cat([c[k] for c in conditions]) for k in condition}
        predicted = self.backbone.predict(module, torch.cat(states), torch.cat(times), joined).split(len(mine))
        denoise = losses.mean_error(predicted[0] - wanted)
        if self.config.min_snr_gamma is not None and schedule.kind != "flow":
            weight = losses.min_snr_weight(schedule.kind, alpha, sigma, self.config.min_snr_gamma)
            loss = (weight * denoise).mean()
        else:
            loss = denoise.mean()
        if self.method == "guidance":
            mask = data.mask[rows].to(device) if data.mask is not None else None
            guided = self._guidance(predicted, z_good, z_bad, good, index, alpha, sigma, condition, mask).mean()
            record = {"denoise": float(loss.detach()), "guidance": float(guided.detach())}
            loss = loss + self.config.guidance_weight * guided
        if self.method == "dpo":
            wanted_bad = losses.target(schedule.kind, bad, noise, alpha, sigma)
            pair = {k: torch.cat([v, v]) for k, v in condition.items()}
            with torch.no_grad(), self.reference() as frozen:
                old = self.backbone.predict(frozen, torch.cat([z_good, z_bad]), torch.cat([index, index]), pair)
            old_good, old_bad = old.split(len(mine))
            bad_error = losses.mean_error(predicted[1] - wanted_bad)
            good_old = losses.mean_error(old_good - wanted)
            loss = losses.dpo(
                denoise, bad_error, good_old, losses.mean_error(old_bad - wanted_bad), self.config.beta
            ).mean()
            record = {"drift": float((denoise.mean() / good_old.mean()).detach())}
        if general is not None and self.config.general_weight > 0:
            wanted_plain = losses.target(schedule.kind, plain, noise, alpha, sigma)
            loss = loss + self.config.general_weight * losses.mean_error(predicted[-1] - wanted_plain).mean()
        return loss * share, record

    def _guidance(
        self, predicted: Any, z_good: Tensor, z_bad: Tensor, good: Tensor, index: Tensor, alpha: Tensor, sigma: Tensor,
        condition: Condition, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        kind = self.backbone.schedule.kind
        if mask is not None and self.config.mask_loss:
            weight = losses.latent_mask(mask, (good.shape[-2], good.shape[-1]), self.config.outside_weight)
        else:
            weight = None
        if self.config.target == "x0":
            return losses.guidance_x0(kind, predicted[1], z_bad, good, alpha, sigma, weight)
        if self.config.target == "teacher":
            with torch.no_grad(), self.reference() as frozen:
                taught = self.backbone.predict(frozen, z_good, index, condition)
            return losses.mean_error(predicted[1] - taught, weight)
        back = (index - round(self.config.step_size * self.backbone.schedule.length)).clamp(min=0)
        then = self.backbone.schedule.at(back.to(alpha.device))
        from_bad = losses.ddim_step(kind, predicted[1], z_bad, (alpha, sigma), then)
        from_good = losses.ddim_step(kind, predicted[0].detach(), z_good, (alpha, sigma), then)
        return losses.mean_error(from_bad - from_good, weight)

    def _refl(self, module: Any, generator: torch.Generator, accelerator: Any) -> tuple[Tensor, dict[str, float]]:
        """Sample without gradients to a late step, take x0 from one step with gradients, and climb its reward."""
        c, schedule, device = self.config, self.backbone.schedule, self.backbone.device
        picks = torch.randint(len(self.prompts), (c.batch_size,), generator=generator)
        stops = torch.linspace(schedule.length - 1, 0, c.sampling_steps).round().long()
        late = max(1, round(c.refl_window * c.sampling_steps))
        last = c.sampling_steps - 1 - int(torch.randint(late, (1,), generator=generator))
        noise = torch.randn((c.batch_size, *self._latent_shape()), generator=generator)
        mine = np.array_split(np.arange(c.batch_size), accelerator.num_processes)[accelerator.process_index]
        prompts = [self.prompts[int(i)] for i in picks[mine]]
        condition = self.backbone.encode_prompts(prompts, self._size())
        z = noise[mine].to(device)
        with torch.no_grad():
            for i in range(last):
                index = stops[i].expand(len(z))
                predicted = self.backbone.predict(self.backbone.module, z, index, condition)
                now, then = (schedule.at(s.expand(len(z)).to(device)) for s in (stops[i], stops[i + 1]))
                z = losses.ddim_step(schedule.kind, predicted, z, now, then)
        index = stops[last].expand(len(z))
        predicted = self.backbone.predict(module, z, index, condition)
        x0 = losses.to_x0(schedule.kind, predicted, z, *schedule.at(index.to(device)))
        assert self.scorer is not None
        rewards = self.scorer(self.backbone.decode(x0))
        found = torch.isfinite(rewards)
        # No face anywhere: nothing to climb, but the graph has to reach the weights.
        loss = -rewards[found].mean() if found.any() else 0.0 * predicted.mean()
        return loss * (len(mine) * accelerator.num_processes / c.batch_size), {"reward": -float(loss.detach())}

    def _data(self) -> _Latents:
        if self.method == "filter":
            images, prompts, scores = own_samples(
                self.pipe, self.prompts, self.scorer, self.config.samples,  # type: ignore[arg-type]
                steps=self.config.sampling_steps, seed=self.config.seed,
            )  # fmt: skip
            faces = np.flatnonzero(np.isfinite(scores))
            if not len(faces):
                raise UserError(f"the scorer found a face in none of {len(images)} samples", hint="draw more samples")
            best = faces[np.argsort(-scores[faces], kind="stable")][: max(1, round(self.config.keep * len(images)))]
            return self._encode([images[i] for i in best], [prompts[i] for i in best])
        assert self.pairs is not None
        parts = [
            self._encode_pairs(range(start, min(start + 16, len(self.pairs))))
            for start in range(0, len(self.pairs), 16)
        ]
        good, bad = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        masks = None if any(part[2] is None for part in parts) else torch.cat([part[2] for part in parts])
        return _Latents(good, bad, masks, self._conditions(self.pairs.prompts), list(self.pairs.ids))

    def _encode_pairs(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents of winners and losers and the masks (n, 1, side, side), or None when one has none."""
        assert self.pairs is not None
        side = self._size()[0]
        good, bad, masks = [], [], []
        for row in rows:
            mask = self.pairs.mask(row)
            win, lose = self.pairs.images(row)
            x1, y1, x2, y2 = (mask.getbbox() if mask is not None else None) or (0, 0, *win.size)
            centre = (x1 + x2) / 2 / win.width, (y1 + y2) / 2 / win.height
            good.append(fit(win, side, centre))
            bad.append(fit(lose, side, centre))
            if mask is not None:
                masks.append(torch.from_numpy(np.array(fit(mask, side, centre), dtype=np.float32) / 255)[None])
        whole = torch.stack(masks) if len(masks) == len(rows) else None
        return (*(self.backbone.encode_images(images).cpu().float() for images in (good, bad)), whole)

    def _encode(self, images: list[Image.Image], prompts: list[str]) -> _Latents:
        """Plain pictures and their prompts."""
        side = self._size()[0]
        fitted = [fit(image, side) for image in images]
        latents = torch.cat([self.backbone.encode_images(fitted[i : i + 16]).cpu() for i in range(0, len(fitted), 16)])
        names = [f"sample {i}" for i in range(len(images))]
        return _Latents(latents.float(), None, None, self._conditions(prompts), names)

    def _conditions(self, prompts: Sequence[str]) -> Condition:
        """Computed once; equal prompts are encoded once."""
        unique = sorted(set(prompts))
        encoded = [self.backbone.encode_prompts([p], self._size()) for p in unique]
        rows = torch.tensor([unique.index(p) for p in prompts])
        return {k: torch.cat([e[k] for e in encoded]).cpu()[rows] for k in encoded[0]}

    def _latent_shape(self) -> tuple[int, int, int]:
        config = self.backbone.module.config
        return config.in_channels, config.sample_size, config.sample_size

    def _size(self) -> tuple[int, int]:
        """Width and height of the training pictures."""
        side = self.config.resolution or self.backbone.module.config.sample_size * self.pipe.vae_scale_factor
        return side, side

    def _signature(self) -> str:
        return json.dumps({"method": self.method, **asdict(self.config)})

    def _save(self, state: dict[str, Any]) -> None:
        assert self.output is not None
        with replace_atomically(self.output / STATE) as partial:
            torch.save(state, partial)

    def _restore(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    def _load(self) -> dict[str, Any] | None:
        if self.output is None:
            raise UserError("resume needs the output folder of the run")
        path = self.output / STATE
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            before = json.loads(saved["config"])
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise CheckpointError(
                f"'{path}' is damaged ({type(error).__name__})", hint="start without resume"
            ) from error
        now = json.loads(self._signature())
        if changed := sorted(k for k in now if now[k] != before.get(k)):
            raise UserError(
                f"'{path}' was made with another {', '.join(changed)}", hint="resume with the same settings"
            )
        return saved


def own_samples(
    pipe: Any, prompts: Sequence[str], scorer: Scoring, n: int, *, steps: int = 20, seed: int = 0, batch: int = 32
) -> tuple[list[Image.Image], list[str], np.ndarray]:
    """n samples of a pipeline over the prompts in turn, with their prompts and rewards."""
    images: list[Image.Image] = []
    asked = [prompts[i % len(prompts)] for i in range(n)]
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, batch):
        images += pipe(asked[start : start + batch], num_inference_steps=steps, generator=generator).images
    scores = [float(scorer(to_pixels(image)[None])[0].detach()) for image in images]
    return images, asked, np.asarray(scores)


def best_and_worst(
    pipe: Any, prompts: Sequence[str], scorer: Scoring, *, of: int = 4, steps: int = 20, seed: int = 0
) -> TensorPairs:
    """Preference pairs as in 2406.17100v2: for each prompt, the best and the worst of `of` samples by the reward.

    Samples without a face are left out, and so are prompts with fewer than two faces. Raises UserError when none is left.
    """
    if of < 2:
        raise UserError(f"of is {of}, expected 2 or more samples per prompt")
    asked = [p for p in prompts for _ in range(of)]
    images, _, scores = own_samples(pipe, asked, scorer, len(asked), steps=steps, seed=seed)
    win, lose, kept = [], [], []
    for i, prompt in enumerate(prompts):
        rows = [r for r in range(i * of, (i + 1) * of) if np.isfinite(scores[r])]
        if len(rows) >= 2 and scores[max(rows, key=lambda r: scores[r])] > scores[min(rows, key=lambda r: scores[r])]:
            win.append(to_pixels(images[max(rows, key=lambda r: scores[r])]))
            lose.append(to_pixels(images[min(rows, key=lambda r: scores[r])]))
            kept.append(prompt)
    if not win:
        raise UserError("no prompt gave two samples with faces of different scores")
    return TensorPairs(torch.stack(win), torch.stack(lose), prompts=kept)


def fit(image: Image.Image, side: int, centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A square of `side` pixels: the shorter side scaled, the longer cut around `centre` (shares of width and height)."""
    if image.size == (side, side):
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(v * scale)) for v in image.size)
    left = min(max(round(centre[0] * width - side / 2), 0), width - side)
    top = min(max(round(centre[1] * height - side / 2), 0), height - side)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
