"""A draft model in stock vLLM that rests while nothing is drafted: `--worker-cls smartspec.vllm_drafter.SmartSpecWorker`.

vLLM runs the draft model in every step, at k = 0 too, so that its cache follows the accepted tokens; a server that does not
speculate pays for that in each step, and for a rejection sampler that has nothing to reject. Here a step without drafts,
neither to verify nor to make, is run as an engine without a drafter runs it, and what the draft model missed is taken in by
the next step that drafts, before it does. The drafts are then the same as if the model had run all along.

A worker class of one's own is vLLM's own extension point. An engine that schedules asynchronously does not have the tokens
on the host when the drafter wants them, heads that read the target's hidden states cannot take them in later, and vLLM's
second model runner has a drafter of another kind: all of these stay as they are.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import vllm
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from smartspec.serving import check_vllm

__all__ = ["RestingDraftModel", "SmartSpecWorker"]

log = logging.getLogger(__name__)
_ALL = 1 << 30
_WORKER: Any = resolve_obj_by_qualname(
    "vllm.v1.worker.cpu_worker.CPUWorker" if current_platform.is_cpu() else "vllm.v1.worker.gpu_worker.Worker"
)

check_vllm(
    vllm.__version__,
    DraftModelProposer,
    hooks=(
        "propose", "prepare_next_token_ids_padded", "build_per_group_and_layer_attn_metadata",
        "build_model_inputs_first_pass", "_set_positions", "_get_slot_mapping",
    ),
)  # fmt: skip


class RestingDraftModel(DraftModelProposer):
    """vLLM's draft model, run only in steps that draft.

    wanted: how many drafts the step in progress asks for; the worker says so before the step.
    rests: steps in which the model did not run. taken_in: tokens that it got later.
    """

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, device=device, runner=runner)
        self.runner = runner
        self.wanted = _ALL
        self.rests = self.taken_in = 0
        self._have: dict[str, int] = {}
        """Tokens of each request in this model's cache."""
        self._in_step = False
        """Some request has all its tokens in this model's cache."""

    def prepare_next_token_ids_padded(
        self, sampled_token_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.wanted:
            return super().prepare_next_token_ids_padded(sampled_token_ids, *args, **kwargs)
        # Only the drafter would read them.
        unused = torch.ones(len(sampled_token_ids), dtype=torch.int32, device=sampled_token_ids.device)
        return unused, unused

    def rest(self) -> None:
        """The step in progress leaves the model alone."""
        requests = self.runner.requests
        if self._in_step or any(name not in requests for name in self._have):
            names, _, have = self._progress()
            self._have.update(zip(names, have, strict=True))
            self._in_step = False
        self.rests += 1

    def _progress(self) -> tuple[list[str], list[int], list[int]]:
        """Names, tokens before this step, and how many of them the model has; finished requests are forgotten."""
        batch = self.runner.input_batch
        names = list(batch.req_ids)
        starts = batch.num_computed_tokens_cpu[: len(names)].tolist()
        # A prefix that vLLM found in its cache may have been written while this model rested.
        fresh = 0 if self.rests else _ALL
        self._have = {name: n for name, n in self._have.items() if name in self.runner.requests}
        return names, starts, [min(self._have.get(name, fresh), n) for name, n in zip(names, starts, strict=True)]

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(requests, num_speculative_tokens) drafted tokens."""
        if num_speculative_tokens == 0:
            self.rest()
            return torch.empty(len(self.runner.input_batch.req_ids), 0, dtype=torch.int64, device=self.device)
        names, starts, have = self._progress()
        table = kwargs["common_attn_metadata"].block_table_tensor
        while behind := [row for row in range(len(names)) if have[row] < starts[row]]:
            room, parts = self.max_num_tokens, []
            for row in behind:
                end = min(starts[row], have[row] + room)
                if end > have[row]:
                    parts.append((row, have[row], end))
                    room -= end - have[row]
                    have[row] = end
            self._take_in(parts, table)
        self._have.update(dict.fromkeys(names, _ALL))
        self._in_step = True
        return super().propose(num_speculative_tokens, *args, **kwargs)

    def _take_in(self, parts: Sequence[tuple[int, int, int]], table: torch.Tensor) -> None:
        """One pass of the draft model over known tokens, for its cache only; parts: (row, first token, one past the last).

        table: (requests, blocks) of the cache, as vLLM has it.
        """
        rows, begins, ends = (np.array(column) for column in zip(*parts, strict=True))
        lens = ends - begins
        count = int(lens.sum())
        tokens = np.concatenate([self.runner.input_batch.token_ids_cpu[row, a:b] for row, a, b in parts])
        place = torch.from_numpy(np.concatenate([np.arange(a, b) for _, a, b in parts])).to(self.device)
        own = table[torch.from_numpy(rows).to(table.device)]
        line = torch.from_numpy(np.repeat(np.arange(len(rows)), lens)).to(table.device)
        slots = own[line, place // self.block_size].long() * self.block_size + place % self.block_size
        cut = torch.from_numpy(np.concatenate([[0], np.cumsum(lens)]).astype(np.int32))
        metadata = CommonAttentionMetadata(
            query_start_loc=cut.to(self.device),
            query_start_loc_cpu=cut,
            seq_lens=torch.from_numpy(ends.astype(np.int32)).to(self.device),
            num_reqs=len(rows),
            num_actual_tokens=count,
            max_query_len=int(lens.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=own,
            slot_mapping=slots,
            seq_lens_cpu_upper_bound=torch.from_numpy(ends.astype(np.int32)),
        )
        self.input_ids[:count] = torch.from_numpy(tokens.astype(np.int32)).to(self.device)
        self._set_positions(count, place)
        inputs, _ = self.build_model_inputs_first_pass(count, count, None)
        _, layers = self.build_per_group_and_layer_attn_metadata(metadata)
        with set_forward_context(
            layers, self.vllm_config, num_tokens=count, slot_mapping=self._get_slot_mapping(count, slots)
        ):
            self.model(**inputs)
        self.taken_in += count


class SmartSpecWorker(_WORKER):
    """vLLM's worker with a draft model that rests."""

    resting: RestingDraftModel | None = None
    """None where the drafter has to run in every step."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        drafter: Any = getattr(runner, "drafter", None)
        if type(drafter) is not DraftModelProposer or runner.use_async_scheduling or drafter.use_heterogeneous_vocab:
            log.warning("the drafter runs at k = 0 too: it rests with a draft model and --no-async-scheduling only")
            return
        self.resting = runner.drafter = RestingDraftModel(self.vllm_config, self.device, runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.resting is None:
            return super().execute_model(scheduler_output)
        self.resting.wanted = wanted = scheduler_output.num_spec_tokens_to_schedule
        plain = not wanted and not scheduler_output.scheduled_spec_decode_tokens
        # The runner asks in every step whether there is a drafter; its sampling, later in this step, asks again.
        self.model_runner.speculative_config = None if plain else self.speculative_config
        output = super().execute_model(scheduler_output)
        if plain and scheduler_output.total_num_scheduled_tokens:
            self.resting.rest()
        return output
