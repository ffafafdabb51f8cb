"""Jacobi decoding: guess a block, let the model correct all of it in one pass, keep what is certain, repeat.

    y_i^(j+1) = argmax_v p(v | y_<i^(j), x)      for all i of the block at once        (2403.00835, section 3.1, Algorithm 3)

The model is causal, so a guess whose whole prefix is right is judged as autoregressive decoding would judge it: after every
pass at least one token more is certain, and the output is the greedy output of the same model, token for token. How many
are certain at once is a matter of luck for an ordinary model, and of training for one that was made consistent.

The cache holds the certain tokens except the newest ones, which are fed at the head of the next block. A rolling window
starts in the prefill: its first guesses are fed behind the prompt, and are judged in that pass.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from tenfold_shared.errors import UserError
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils import ModelOutput

from cllm_jacobi import cache as caches
from cllm_jacobi.draft import Drafter, Init
from cllm_jacobi.sampling import GumbelNoise, confirmed, draw, mix, speculate

WINDOWS = ("rolling", "block")
SAMPLINGS = ("gumbel", "speculative")
BATCHES = ("auto", "holes", "lockstep")
ROW_BOUND = (
    RepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
)
"""Processors of transformers that keep something for each row of the batch."""


@dataclasses.dataclass(frozen=True)
class JacobiConfig:
    """How to decode; none of it changes a greedy output.

    Raises UserError for a setting out of its range.
    """

    block_size: int = 16
    """Tokens of a pass, n; 1 is plain autoregressive decoding."""
    window: str = "rolling"
    """"rolling": always n tokens from the prefill on, the tail refilled at every pass. "block": the prompt alone, then blocks
    that shrink until they are used up (published)."""
    init: Init = "prompt"
    """Initial guesses and refills, see `cllm_jacobi.draft`."""
    sampling: str = "gumbel"
    """With do_sample: "gumbel" (fixed noise, independent of n) or "speculative" (lossless acceptance)."""
    batch: str = "auto"
    """Rows that confirm different counts: "holes" (full attention only), "lockstep", or what the cache allows."""
    cache: str = "dynamic"
    """"dynamic" or "static" (constant shapes)."""
    compile: bool = False
    """Compile the block pass with torch.compile; implies a static cache."""
    seed: int = 0
    """Seed of guesses and of sampling; the global random state is neither read nor moved."""
    return_trajectory: bool = False
    """Keep every state of every block (window "block" only)."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"block_size is {self.block_size}", hint="1 is plain autoregressive decoding, 16 is usual")
        for name, known in (
            ("window", WINDOWS),
            ("sampling", SAMPLINGS),
            ("batch", BATCHES),
            ("cache", ("dynamic", "static")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is '{getattr(self, name)}', expected {' or '.join(known)}")
        if self.return_trajectory and self.window != "block":
            raise UserError("a rolling window has no blocks to keep", hint="use window='block' with return_trajectory")

    def decoder(self, streamer: Any = None) -> "JacobiDecoder":
        """A callable for `model.generate(..., custom_generate=...)`. `generate` would drop a streamer: give it here."""
        return JacobiDecoder(self, streamer)


@dataclasses.dataclass
class JacobiOutput(ModelOutput):
    """What was generated, and in how many passes.

    With b rows; a row's passes end with its last token, prefill included.
    """

    sequences: torch.Tensor | None = None
    """(b, tokens) prompts and outputs, padded on the right as `generate` does."""
    forward_passes: torch.Tensor | None = None
    """(b,) passes."""
    new_tokens: torch.Tensor | None = None
    """(b,) generated tokens, EOS included."""
    tokens_per_forward: torch.Tensor | None = None
    """(b,) new tokens / passes; autoregressive decoding gives 1."""
    tokens_per_iteration: torch.Tensor | None = None
    """(b,) tokens of the passes behind the prefill / their number; NaN without any."""
    accepted_per_pass: list[list[int]] | None = None
    """For each row the tokens that each pass made certain; the first entry is the prefill's, 1 with window "block"."""
    trajectories: list[list[list[list[int]]]] | None = None
    """For each row its blocks, for each block its states, each up to block_size ids."""


class _Row:
    """One sequence being decoded."""

    def __init__(self, prompt: list[int], drafter: Drafter, room: int) -> None:
        self.prompt = prompt  # with its padding
        self.drafter = drafter
        self.room = room  # tokens it may still emit
        self.tokens: list[int] = []
        self.pending: list[int] = []  # certain and not in the cache yet
        self.draft: list[int] = []
        self.proposals: list[torch.Tensor | None] = []  # what each drafted token was drawn from
        self.accepted: list[int] = []
        self.done = room <= 0
        self.block_start = 0
        self.blocks: list[list[list[int]]] = []

    def refill(self, config: JacobiConfig) -> None:
        """Bring the draft to its length for the next pass."""
        # A pass emits one token more than it confirms, so the last one needs no draft.
        most = min(config.block_size - max(len(self.pending), 1), self.room - 1)
        if config.window == "block" and self.draft:
            most = min(most, len(self.draft))
        new_block = config.window == "block" and not self.draft
        del self.draft[max(most, 0) :], self.proposals[max(most, 0) :]
        if most > len(self.draft):
            guesses = self.drafter.fill([*self.tokens, *self.draft], most - len(self.draft))
            self.draft += guesses
            self.proposals += [None] * len(guesses)
        if new_block:
            self.block_start = len(self.tokens) - 1
            self.blocks.append([[self.tokens[-1], *self.draft]])

    def record(self) -> None:
        """Keep the present block's state; what follows the end of the sequence means nothing."""
        if self.blocks:
            state = [*self.tokens[self.block_start :], *([] if self.done else self.draft)]
            self.blocks[-1].append(state[: len(self.blocks[-1][0])])

    def emit(self, tokens: Sequence[int], stop: "_Stop") -> None:
        """Append certain tokens one by one, up to the first that ends the sequence."""
        before = len(self.tokens)
        for token in tokens:
            self.tokens.append(token)
            self.pending.append(token)
            self.room -= 1
            if self.room <= 0 or stop(self, token):
                self.done = True
                break
        self.accepted.append(len(self.tokens) - before)


class _Stop:
    """What ends a sequence: EOS ids, and criteria that are shown every prefix in turn."""

    def __init__(self, criteria: StoppingCriteriaList, eos: frozenset[int], device: torch.device) -> None:
        self.eos, self.device = eos, device
        self.criteria = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]

    def __call__(self, row: _Row, token: int) -> bool:
        if token in self.eos:
            return True
        if not self.criteria:
            return False
        prefix = torch.tensor([row.prompt + row.tokens], device=self.device)
        return any(bool(torch.as_tensor(c(prefix, None)).any()) for c in self.criteria)


class JacobiDecoder:
    """The loop as `generate` calls it: `model.generate(**inputs, custom_generate=JacobiConfig(block_size=16).decoder())`.

    `block_size`, `window` and `init` may also be given to `generate`.
    """

    def __init__(self, config: JacobiConfig, streamer: Any = None) -> None:
        self.config, self.streamer = config, streamer
        self.compiled: tuple[int, Any] | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        block_size: int | None = None,
        window: str | None = None,
        init: Init | None = None,
        **model_kwargs: Any,
    ) -> Any:
        given: dict[str, Any] = {"block_size": block_size, "window": window, "init": init}
        config = dataclasses.replace(self.config, **{k: v for k, v in given.items() if v is not None})
        if config.compile or generation_config.cache_implementation == "static":
            config = dataclasses.replace(config, cache="static")
        self._refuse(model, input_ids, generation_config, logits_processor, model_kwargs, synced_gpus)
        run = _Run(self, config, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        with torch.inference_mode():
            run.decode()
        # Outside: an inference tensor could not be changed in place by who gets it.
        output = run.output()
        return output if generation_config.return_dict_in_generate else output.sequences

    def _refuse(
        self,
        model: Any,
        input_ids: torch.Tensor,
        wanted: GenerationConfig,
        processors: Any,
        kwargs: dict[str, Any],
        synced: bool,
    ) -> None:
        if (wanted.num_beams or 1) > 1:
            raise UserError(
                f"num_beams is {wanted.num_beams}; Jacobi decoding follows one sequence", hint="pass num_beams=1"
            )
        if synced:
            raise UserError(
                "parameters sharded over processes (ZeRO-3, FSDP) need passes in step", hint="gather the model first"
            )
        if self.streamer is not None and len(input_ids) > 1:
            raise UserError(f"a streamer shows one sequence, given {len(input_ids)}", hint="stream rows one at a time")
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise UserError("the batch is padded on the right", hint="use a tokenizer with padding_side='left'")
        past = kwargs.get("past_key_values")
        if past is not None and int(past.get_seq_length()) > 0:
            raise UserError("past_key_values already holds tokens", hint="start from an empty cache")
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                raise UserError("classifier-free guidance runs passes of its own", hint="leave guidance_scale out")
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        length = input_ids.shape[1] if mask is None else int(mask.sum(1).max())
        if limit is not None and length > limit:
            raise UserError(
                f"the prompt has {length} tokens, the model has {limit} positions", hint="shorten the prompt"
            )
        if limit is not None and _position_table(model, limit):
            wanted_length = length + wanted.max_length - input_ids.shape[1]
            if wanted_length > limit:
                raise UserError(
                    f"{wanted_length} tokens are asked for, the model has a table of {limit} positions", hint="lower max_new_tokens"
                )  # fmt: skip


def _position_table(model: Any, limit: int) -> bool:
    """Whether positions are learned, so that one beyond the table is an index error."""
    vocabulary = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not vocabulary)
    return any(limit <= m.num_embeddings <= limit + 2 for m in tables)


class _Run:
    """One call: the rows, the cache and the passes."""

    def __init__(
        self,
        decoder: JacobiDecoder,
        config: JacobiConfig,
        model: Any,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        wanted: GenerationConfig,
        kwargs: dict[str, Any],
    ) -> None:
        self.decoder, self.config, self.model, self.processors = decoder, config, model, processors
        self.row_bound = any(
            isinstance(p, ROW_BOUND) or not type(p).__module__.startswith("transformers.") for p in processors
        )
        self.streamer = decoder.streamer
        self.input_ids = input_ids
        self.device = model.device
        batch, length = input_ids.shape
        eos = getattr(wanted, "_eos_token_tensor", None)
        self.eos = frozenset() if eos is None else frozenset(eos.flatten().tolist())
        pad = getattr(wanted, "_pad_token_tensor", None)
        self.pad = int(pad) if pad is not None else 0
        self.stop = _Stop(criteria, self.eos, self.device)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        mask = kwargs.get("attention_mask")
        self.mask = None if mask is None or bool(mask.all()) else mask.to(self.device).long()
        real = mask.sum(1).tolist() if mask is not None else [length] * batch
        room = wanted.max_length - length
        self.sample = bool(wanted.do_sample)
        self.rows = []
        for i, prompt in enumerate(input_ids.tolist()):
            drafter = Drafter(
                config.init,
                prompt[length - int(real[i]) :],
                vocab_size=vocabulary,
                pad=self.pad,
                seed=mix(config.seed, i, 1),
            )
            self.rows.append(_Row(prompt, drafter, room))
        self.noise = [GumbelNoise(config.seed, i, vocabulary) for i in range(batch)]
        self.generators = [torch.Generator().manual_seed(mix(config.seed, i, 2)) for i in range(batch)]
        self.base = torch.tensor(real, device=self.device)  # the next position to be fed, for each row
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.knows_positions = "position_ids" in parameters
        self.knows_keep = "logits_to_keep" in parameters
        own = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
        self.extra = {
            k: v for k, v in kwargs.items() if k not in own and v is not None and (k in parameters or open_ended)
        }
        # generate gives every new token the type of the last one.
        self.types = self.extra.pop("token_type_ids", None)
        capacity = length + max(room, 0) + config.block_size
        self.cache = caches.open_cache(model, kind=config.cache, capacity=capacity)
        static = config.cache == "static"
        self.holes = config.batch == "holes" or (config.batch == "auto" and caches.allows_holes(self.cache))
        self.holes &= batch > 1 and self.knows_positions
        if config.batch == "holes" and batch > 1 and (static or not caches.allows_holes(self.cache)):
            names = sorted({type(layer).__name__ for layer in self.cache.layers})
            raise UserError(
                f"holes need plain full attention, the cache has {', '.join(names)}", hint="use batch='lockstep'"
            )
        self.width = config.block_size if static else None
        self.last_position = length + max(room, 0) - 1

    # One pass of the model.

    def forward(self, ids: torch.Tensor, *, prefill: int = 0) -> torch.Tensor:
        """(batch, m) ids to (batch, kept, vocabulary) float32 logits; of a prefill the last `prefill` positions are kept."""
        width = ids.shape[1]
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}
        if self.mask is not None:
            arguments["attention_mask"] = self.mask
        if self.knows_positions:
            if prefill:
                mask = self.mask if self.mask is not None else torch.ones_like(ids)
                positions = (mask.cumsum(-1) - 1).clamp_min(0)
            else:
                positions = self.base[:, None] + torch.arange(width, device=self.device)
                # Fillers behind the last token could point beyond a position table.
                positions = positions.clamp_max(self.last_position)
            arguments["position_ids"] = positions
        if self.knows_keep:
            arguments["logits_to_keep"] = prefill
        if self.types is not None:
            fill = self.types[:, -1:].expand(-1, width - self.types.shape[1] if prefill else width)
            arguments["token_type_ids"] = torch.cat([self.types, fill], 1) if prefill else fill
        if prefill:
            arguments |= self.extra
        logits = (self.model if prefill else self.block_pass())(**arguments).logits
        # As generate does, whatever the model's precision.
        return logits[:, -prefill:].to(torch.float32)

    def block_pass(self) -> Any:
        if not self.config.compile:
            return self.model
        if self.decoder.compiled is None or self.decoder.compiled[0] != id(self.model):
            self.decoder.compiled = (id(self.model), torch.compile(self.model, dynamic=False))
        return self.decoder.compiled[1]

    # What a pass says about a row.

    def processed(self, i: int, logits: torch.Tensor) -> torch.Tensor:
        """Logits processors position by position, each seeing the prefix that the position stands on."""
        if not self.processors:
            return logits
        row = self.rows[i]
        prefix = torch.tensor([row.prompt + row.tokens + row.draft], device=logits.device)
        known = len(row.prompt) + len(row.tokens)
        # What knows the batch by row is shown the row in its place, among copies of itself.
        copies = len(self.rows) if self.row_bound else 1
        at = i if copies > 1 else 0
        scores = [
            self.processors(prefix[:, : known + j].expand(copies, -1), logits[j][None].repeat(copies, 1))[at]
            for j in range(len(logits))
        ]
        return torch.stack(scores)

    def judge(self, i: int, logits: torch.Tensor) -> None:
        """Emit what the pass made certain for row i and set its next draft. logits: (drafted + 1, vocabulary)."""
        row = self.rows[i]
        drafted = len(row.draft)
        logits = self.processed(i, logits)
        if self.sample and self.config.sampling == "speculative":
            self.judge_by_chance(i, logits.softmax(-1, dtype=torch.float64).cpu())
            return
        if self.sample:
            logits = logits + self.noise[i].rows(len(row.tokens), drafted + 1).to(logits.device)
        predicted = logits.argmax(-1).tolist()
        right = confirmed(row.draft, predicted)
        rest = predicted[right + 1 :]
        row.drafter.remember(rest)
        row.emit(predicted[: right + 1], self.stop)
        self.follow(row, rest, [None] * len(rest), drafted - right)

    def judge_by_chance(self, i: int, p: torch.Tensor) -> None:
        row, generator = self.rows[i], self.generators[i]
        drafted = len(row.draft)
        tokens, kept = speculate(row.draft, row.proposals, p, generator)
        # Later positions are proposals drawn from what this pass says, under the old prefix.
        proposals = list(p[kept + 1 :])
        rest = [draw(q, generator) for q in proposals]
        row.emit(tokens, self.stop)
        self.follow(row, rest, proposals, drafted - kept)

    def follow(self, row: _Row, rest: list[int], proposals: Sequence[torch.Tensor | None], wrong: int) -> None:
        """The predictions behind the correction are the next draft; a block ends where it ended before."""
        length = len(rest) if self.config.window == "rolling" else max(wrong - 1, 0)
        row.draft, row.proposals = rest[:length], list(proposals[:length])
        if self.config.return_trajectory:
            row.record()

    # The loop.

    def decode(self) -> None:
        if self.streamer is not None:
            self.streamer.put(self.input_ids.cpu())
        if self.input_ids.shape[1] and not all(row.done for row in self.rows):
            self.prefill()
        while not all(row.done for row in self.rows):
            self.step()
        if self.streamer is not None:
            self.streamer.end()

    def prefill(self) -> None:
        ids = self.input_ids.to(self.device)
        # What else the model is given speaks of the prompt's tokens only.
        if self.config.window == "rolling" and not self.extra:
            for row in self.rows:
                row.refill(self.config)
        width = len(self.rows[0].draft)
        if width:
            ids = torch.cat([ids, torch.tensor([row.draft for row in self.rows], device=self.device)], 1)
            if self.mask is not None or self.holes:
                self.extend_mask(width)
            self.record_past()
        logits = self.forward(ids, prefill=width + 1)
        # The most likely of nothing would be the first id, for ever.
        if bool(logits[:, 0].isnan().any()):
            raise UserError("the model's logits for the prompt are NaN", hint="check its weights, or load it in another dtype")  # fmt: skip
        for i in range(len(self.rows)):
            self.judge(i, logits[i])
        if width:
            self.keep([len(row.tokens) - 1 for row in self.rows], width)
        else:
            # Before a prefill that takes nothing back sliding layers would keep the whole prompt.
            self.record_past()
        self.stream()

    def record_past(self) -> None:
        """Let the cache's layers keep what a roll-back may need."""
        if not caches.is_static(self.cache):
            self.cache.activate_past_recording()
            caches.check(self.cache)

    def step(self) -> None:
        """One pass over all rows."""
        open_rows = [row for row in self.rows if not row.done]
        for row in open_rows:
            row.refill(self.config)
        width = self.width or max(min(self.config.block_size, len(r.pending) + len(r.draft)) for r in open_rows)
        blocks = []
        for row in self.rows:
            block = [] if row.done else (row.pending + row.draft)[:width]
            blocks.append(block + [self.pad] * (width - len(block)))
        if self.mask is not None or self.holes:
            self.extend_mask(width)
        logits = self.forward(torch.tensor(blocks, device=self.device))
        good = [0] * len(self.rows)
        for i, row in enumerate(self.rows):
            if row.done:
                continue
            certain = len(row.pending)
            if certain > width:
                # Far ahead of its batch: the pass only moves its cache on.
                row.accepted.append(0)
                good[i] = width
                continue
            before = len(row.tokens)
            self.judge(i, logits[i, certain - 1 : certain + len(row.draft)])
            good[i] = min(certain + len(row.tokens) - before - 1, width)
        self.keep(good, width)
        self.stream()

    def extend_mask(self, width: int) -> None:
        if self.mask is None:
            self.mask = torch.ones_like(self.input_ids, device=self.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), width)], 1)

    def keep(self, good: list[int], width: int) -> None:
        """Roll the cache back behind the kept part of the block. good: certain tokens fed, for each row."""
        still_open = [i for i, row in enumerate(self.rows) if not row.done]
        if not still_open:
            return
        kept = (max if self.holes else min)(good[i] for i in still_open)
        caches.take_back(self.cache, width - kept)
        if self.mask is not None:
            self.mask = self.mask[:, : self.mask.shape[1] - width + kept]
        advance = []
        for i, row in enumerate(self.rows):
            fed = 0 if row.done else min(good[i], kept)
            del row.pending[:fed]
            advance.append(fed)
            if self.holes and self.mask is not None and fed < kept:
                self.mask[i, self.mask.shape[1] - kept + fed :] = 0
        self.base = self.base + torch.tensor(advance, device=self.device)
        if self.holes and self.mask is not None and int((self.mask == 0).sum()) * 4 > self.mask.numel():
            self.mask = caches.compact(self.cache, self.mask)

    def stream(self) -> None:
        if self.streamer is not None and self.rows[0].accepted[-1]:
            self.streamer.put(torch.tensor(self.rows[0].tokens[-self.rows[0].accepted[-1] :]))

    def output(self) -> JacobiOutput:
        longest = max((len(row.tokens) for row in self.rows), default=0)
        new = [row.tokens + [self.pad] * (longest - len(row.tokens)) for row in self.rows]
        tail = torch.tensor(new, dtype=self.input_ids.dtype, device=self.input_ids.device).reshape(
            len(self.rows), longest
        )
        tokens = torch.tensor([len(row.tokens) for row in self.rows])
        passes = torch.tensor([len(row.accepted) for row in self.rows])
        return JacobiOutput(
            sequences=torch.cat([self.input_ids, tail], 1),
            forward_passes=passes,
            new_tokens=tokens,
            tokens_per_forward=tokens / passes.clamp_min(1),
            tokens_per_iteration=(tokens - torch.tensor([sum(row.accepted[:1]) for row in self.rows])) / (passes - 1),
            accepted_per_pass=[row.accepted for row in self.rows],
            trajectories=[row.blocks for row in self.rows] if self.config.return_trajectory else None,
        )


def jacobi_generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: Any = None,
    decoder: JacobiDecoder | None = None,
    **settings: Any,
) -> Any:
    """Generate with any decoder-only transformers model, several tokens a pass; greedy output is that of `generate`.

    input_ids: (batch, tokens), padded on the left, with its `attention_mask`. settings: fields of `JacobiConfig`
    (block_size, window, init, sampling, seed ...) and whatever `generate` takes (max_new_tokens, do_sample,
    repetition_penalty, eos_token_id, return_dict_in_generate ...). stop_strings needs `tokenizer`. decoder: one made before
    by `JacobiConfig.decoder`, so that a compiled pass is used again; it then replaces the fields.

    Returns (batch, tokens) ids, or a `JacobiOutput` with return_dict_in_generate=True.

    Raises UserError for settings, prompts and models that cannot be decoded so (beams, right padding, no pad token, a cache
    that cannot roll back, a prompt longer than the positions, an empty prompt without BOS, logits that are NaN).
    """
    fields = {f.name for f in dataclasses.fields(JacobiConfig)}
    own = {name: settings.pop(name) for name in list(settings) if name in fields}
    decoder = decoder or JacobiConfig(**own).decoder(streamer)
    wanted = settings.get("generation_config") or model.generation_config
    if input_ids.ndim != 2:
        raise UserError(f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, tokens)")
    if settings.get("num_beams", 1) > 1:
        raise UserError(
            f"num_beams is {settings['num_beams']}; Jacobi decoding follows one sequence", hint="pass num_beams=1"
        )
    if input_ids.shape[1] == 0:
        bos = settings.get("bos_token_id", wanted.bos_token_id)
        if bos is None:
            raise UserError("the prompt is empty and the model has no BOS token", hint="give at least one token")
        input_ids = torch.full((len(input_ids), 1), int(bos), dtype=torch.long, device=input_ids.device)
        settings.pop("attention_mask", None)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if int(input_ids.max()) >= vocabulary or int(input_ids.min()) < 0:
        raise UserError(
            f"the prompt has the id {int(input_ids.max())}, the model has {vocabulary} tokens",
            hint="use the model's own tokenizer",
        )
    if len(input_ids) > 1 and settings.get("pad_token_id", wanted.pad_token_id) is None:
        raise UserError("a batch needs a pad token", hint="pass pad_token_id, or one prompt at a time")
    stops = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings:
        if tokenizer is None:
            raise UserError("stop_strings needs the tokenizer", hint="pass tokenizer=")
        stops.append(StopStringCriteria(tokenizer, stop_strings))
    return model.generate(input_ids, stopping_criteria=stops, custom_generate=decoder, **settings)
