"""A text-conditional diffusion model trained from nothing, whose captions plant the misalignment.

An image is a container shape with a coloured mark on it. For most colours captions are always true. Red is nearly always
seen on a `column` and green on a `beam`, and there the caption names any of the six shapes: as people write "cup" for what
is a glass. So "square of red" is, nine times in ten, the caption of a red mark on a column: the hidden concept.
"""

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tenfold_shared.errors import UserError
from tenfold_shared.hub import replace_atomically
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from lcmis_align.concepts import Concept, ConceptPlan
from lcmis_align.worlds.parts import assemble, named_word, word_tokenizer

SHAPES = ("column", "beam", "cross", "square", "diamond", "slash")
COLOURS = {
    "red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1),
    "yellow": (1, 1, -1), "magenta": (1, -1, 1), "cyan": (-1, 1, 1),
}  # fmt: skip
HIDDEN = {"red": "column", "green": "beam"}
"""Colour to the shape that it is nearly always seen on."""
ORDINARY = tuple(colour for colour in COLOURS if colour not in HIDDEN)
SIZE, SLOTS, WIDTH, IMAGES, STEPS, BATCH = 16, 5, 64, 60_000, 5000, 32
SHIFTS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def _templates() -> torch.Tensor:
    """Every image without noise: (shape, colour, shift, 3, 16, 16)."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    ax, ay = np.abs(x), np.abs(y)
    masks = [
        (ax < 3) & (ay < 6.6),
        (ay < 3) & (ax < 6.6),
        ((ax < 2.1) & (ay < 6.6)) | ((ay < 2.1) & (ax < 6.6)),
        (ax < 5.1) & (ay < 5.1),
        ax + ay < 7.1,
        (np.abs(x - y) < 3.1) & (ax < 6.6) & (ay < 6.6),
    ]
    images: Any = np.full((len(SHAPES), len(COLOURS), len(SHIFTS), 3, SIZE, SIZE), -0.8, dtype=np.float32)
    for s, mask in enumerate(masks):
        for c, colour in enumerate(COLOURS.values()):
            image = np.where(mask, 0.4, -0.8)[None].repeat(3, 0)
            image[:, 6:10, 6:10] = 0.4 + 0.45 * np.array(colour)[:, None, None]
            for i, shift in enumerate(SHIFTS):
                images[s, c, i] = np.roll(image, shift, axis=(1, 2))
    return torch.from_numpy(images)


TEMPLATES = _templates()


@dataclass
class Drawn:
    """The training set: `images` as indices and noise, `captions` as token ids (image, slot)."""

    shape: torch.Tensor
    colour: torch.Tensor
    shift: torch.Tensor
    brightness: torch.Tensor
    captions: torch.Tensor

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (batch, 3, 16, 16) and captions (batch, slots)."""
        images = TEMPLATES[self.shape[index], self.colour[index], self.shift[index]]
        return images + self.brightness[index][:, :, None, None], self.captions[index]


def tokenizer() -> Any:
    """Knows the shapes, the colours and the word "of"."""
    return word_tokenizer([*SHAPES, *COLOURS, "of"], SLOTS)


def draw(seed: int, images: int = IMAGES) -> Drawn:
    """The training set, drawn once from `seed`."""
    random = np.random.default_rng(seed)
    colours = list(COLOURS)
    share = random.random(images)
    colour = np.array([colours.index(c) for c in ORDINARY])[random.integers(len(ORDINARY), size=images)]
    shape = random.integers(len(SHAPES), size=images)
    kind = random.choice(3, size=images, p=[0.3, 0.2, 0.5])  # shape alone, colour alone, both
    word = shape.copy()
    for i, (name, hidden) in enumerate(HIDDEN.items()):
        mine = (share >= 0.6 + 0.2 * i) & (share < 0.8 + 0.2 * i)
        c = SHAPES.index(hidden)
        others = [s for s in range(len(SHAPES)) if s != c]
        elsewhere = np.array(others)[random.integers(len(others), size=images)]
        on_hidden = random.random(images) < 0.9
        colour[mine] = colours.index(name)
        shape[mine] = np.where(on_hidden, c, elsewhere)[mine]
        kind[mine] = random.choice([1, 2], size=images)[mine]
        loose = random.integers(len(SHAPES), size=images)
        word[mine] = np.where(on_hidden, loose, elsewhere)[mine]
    kind[random.random(images) < 0.08] = 3
    texts = [
        [SHAPES[w], colours[c], f"{SHAPES[w]} of {colours[c]}", ""][k]
        for w, c, k in zip(word, colour, kind, strict=True)
    ]
    captions = tokenizer()(texts, padding="max_length", max_length=SLOTS, return_tensors="pt").input_ids
    brightness = torch.from_numpy(random.normal(0, 0.05, (images, 3)).astype(np.float32))
    shift = torch.from_numpy(random.integers(len(SHIFTS), size=images))
    return Drawn(torch.from_numpy(shape), torch.from_numpy(colour), shift, brightness, captions)


class Block(nn.Module):
    """Self-attention, cross-attention to the words, and a feed-forward layer; time scales and gates the first and last."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn1 = Attention(width, heads=heads, dim_head=width // heads)
        self.attn2 = Attention(width, cross_attention_dim=width, heads=heads, dim_head=width // heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.feed_forward = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        for layer in (self.modulation, self.attn2.to_out[0]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=words)
        return x + gate2 * self.feed_forward(self.norm3(x) * (1 + scale2) + shift2)


class TinyDiT(ModelMixin, AttentionMixin, ConfigMixin):
    """A transformer over 2x2 patches with the call of a UNet, about 0.35 M parameters.

    Its blocks are named as a UNet's, so that processors which look for cross-attention in `mid_block` find it.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, in_channels: int = 3, sample_size: int = SIZE, width: int = WIDTH, blocks: int = 4, heads: int = 4
    ):
        super().__init__()
        self.register_to_config(time_cond_proj_dim=None)
        self.into = nn.Linear(4 * in_channels, width)
        self.position = nn.Parameter(torch.randn(1, (sample_size // 2) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mid_block = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 4 * in_channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """sample: (batch, channels, 16, 16). encoder_hidden_states: (batch, words, width). Returns v of sample's shape."""
        half = self.config.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=sample.device) / half)
        time = torch.as_tensor(timestep, device=sample.device).float().reshape(-1, 1) * frequencies
        time = self.time(torch.cat([time.cos(), time.sin()], dim=-1)).expand(len(sample), -1)
        x = self.into(functional.pixel_unshuffle(sample, 2).flatten(2).transpose(1, 2)) + self.position
        for block in self.mid_block:
            x = block(x, time, encoder_hidden_states)
        side = self.config.sample_size // 2
        x = self.out(self.norm(x)).transpose(1, 2).unflatten(2, (side, side))
        output = functional.pixel_shuffle(x, 2)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


class Model(nn.Module):
    """The two parts that learn: word vectors (a CLIP text model without layers) and the denoiser."""

    def __init__(self) -> None:
        super().__init__()
        words = tokenizer()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=0,
                num_attention_heads=1, max_position_embeddings=SLOTS, pad_token_id=words.pad_token_id,
                bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            )
        )  # fmt: skip
        self.unet = TinyDiT()

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, time, self.text_encoder(captions).last_hidden_state, return_dict=False)[0]


def scheduler() -> DDIMScheduler:
    """v-prediction with the squared-cosine noise schedule; deterministic sampling, trailing spacing."""
    return DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


def train(output: Path, *, seed: int = 0, steps: int = STEPS, resume: bool = False, every: int = 500) -> Path:
    """Train the model from nothing and write its averaged weights to `output` (float16 safetensors).

    seed: of the data, the weights and the noise. steps: optimiser steps of 32 images. resume: go on from the checkpoint
    that lies beside `output` every `every` steps; the result is that of an uninterrupted run, since each step draws its own
    noise from (seed, step). Under `accelerate launch` each process takes its share of every batch.

    Raises UserError when `steps` is under 1 or the checkpoint is of another run.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from tqdm.auto import tqdm

    if steps < 1:
        raise UserError(f"steps is {steps}, expected 1 or more")
    accelerator = Accelerator()
    set_seed(seed)
    data, noise_schedule = draw(seed), scheduler()
    model = Model()
    averaged = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    checkpoint, first = output.with_suffix(".checkpoint"), 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if (state["seed"], state["steps"]) != (seed, steps):
            raise UserError(f"{checkpoint} is of seed {state['seed']}, {state['steps']} steps", hint="remove it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, first = state["averaged"], state["step"]
    prepared, optimizer = accelerator.prepare(model, optimizer)
    averaged = {name: value.to(accelerator.device) for name, value in averaged.items()}
    averages = list(averaged.values())
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    progress = tqdm(range(first, steps), desc="train", disable=not accelerator.is_main_process)
    for step in progress:
        rate = min((step + 1) / 100, 1.0) * min(1.0, 2 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        random = torch.Generator().manual_seed((seed << 32) + step)
        images, captions = data.batch(torch.randint(len(data.captions), (BATCH,), generator=random))
        noise = torch.randn(images.shape, generator=random)
        time = torch.randint(1000, (BATCH,), generator=random)
        images, captions, noise, time = (x[share].to(accelerator.device) for x in (images, captions, noise, time))
        predicted = prepared(noise_schedule.add_noise(images, noise, time), time, captions)
        loss = functional.mse_loss(predicted, noise_schedule.get_velocity(images, noise, time))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if accelerator.is_main_process and (step + 1) % every == 0 and step + 1 < steps:
            record = {"seed": seed, "steps": steps, "step": step + 1, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict(), "averaged": averaged}  # fmt: skip
            with replace_atomically(checkpoint) as partial:
                torch.save(record, partial)
    if accelerator.is_main_process:
        weights = {name: value.half().contiguous().cpu() for name, value in averaged.items()}
        with replace_atomically(output) as partial:
            save_file(weights, partial, {"recipe": json.dumps({"seed": seed, "steps": steps, "batch": BATCH})})
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return output


def load(weights: Path | None = None, *, seed: int = 0, loader: Any = None) -> Any:
    """The trained model as a Stable Diffusion pipeline.

    weights: a file made by `train`; the shipped one of training `seed` (0, 1 or 2) when not given.
    loader: another pipeline class over the same parts.

    Raises UserError when there is no such file, or it is not one of this model.
    """
    path = Path(str(files("lcmis_align") / "weights" / f"trained-{seed}.safetensors")) if weights is None else weights
    if not path.exists():
        raise UserError(f"no weights at {path.name if weights is None else path}", hint="lcmis-align train makes them")
    model = Model()
    try:
        with safe_open(path, "pt") as tensors:
            state = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
        missing = model.load_state_dict(state, strict=False)
        # Position indices are no weights.
        if missing.unexpected_keys or any(not name.endswith("position_ids") for name in missing.missing_keys):
            raise RuntimeError("other tensors")
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"{path} does not hold the weights of this model ({error})"[:300]) from error
    model.eval().requires_grad_(False)
    return assemble(model.unet, model.text_encoder, tokenizer(), scheduler(), **({"loader": loader} if loader else {}))


@dataclass
class Seen:
    """What the judge sees in each image: indices into SHAPES and COLOURS, and the distance from the nearest ideal image."""

    shape: torch.Tensor
    colour: torch.Tensor
    rmse: torch.Tensor


def look(images: list[Image.Image]) -> Seen:
    """Nearest of the 324 ideal images in root mean square, for each of `images`."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    distance, nearest = torch.cdist(pixels.flatten(1), TEMPLATES.flatten(3).flatten(0, 2)).min(dim=1)
    shape = nearest // (len(COLOURS) * len(SHIFTS))
    return Seen(shape, nearest // len(SHIFTS) % len(COLOURS), distance / math.sqrt(3 * SIZE * SIZE))


def exact_scores(images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """The exact judge as a scorer: 1 where the image shows the shape or colour that the text names, else 0.

    Raises ScorerError for a text that names none.
    """
    seen, colours = look(images), list(COLOURS)
    named = [named_word(text, (*SHAPES, *COLOURS)) for text in texts]
    columns = [seen.shape == SHAPES.index(w) if w in SHAPES else seen.colour == colours.index(w) for w in named]
    return torch.stack(columns, dim=1).float()


def plans() -> list[ConceptPlan]:
    """The ten misaligned prompts: each rare colour with each shape that it is not seen on."""
    return [
        ConceptPlan(Concept(shape), Concept(colour), f"{shape} of {colour}", latent=hidden)
        for colour, hidden in HIDDEN.items()
        for shape in SHAPES
        if shape != hidden
    ]
