"""The controller in stock vLLM: `--scheduler-cls smartspec.vllm_plugin.SmartSpecScheduler`, no fork, no patch.

Settings go into `additional_config={"smartspec": {...}}` (see `smartspec.serving.Settings`). Only the scheduler decides, so
tensor and pipeline parallelism are safe; data parallelism is refused, because its ranks would choose different lengths and
wait for each other for ever.
"""

from typing import Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from smartspec.errors import UnsupportedError
from smartspec.policies import recommend_table
from smartspec.serving import Bridge, Settings, check_vllm

__all__ = ["SmartSpecScheduler", "recommend_table"]

check_vllm(vllm.__version__, AsyncScheduler)


class SmartSpecScheduler(AsyncScheduler):
    """vLLM's own scheduler with the speculation length chosen at every step.

    Raises UnsupportedError without a speculative_config and with data parallelism, UserError for unknown settings.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        if config.parallel_config.data_parallel_size > 1:
            raise UnsupportedError(
                f"data_parallel_size is {config.parallel_config.data_parallel_size}; ranks would choose different lengths",
                hint="run one server per replica",
            )
        speculative = config.speculative_config
        if not self.num_spec_tokens or speculative is None:
            raise UnsupportedError("SmartSpecScheduler has nothing to control", hint="pass a speculative_config")
        draft = getattr(speculative, "model", None)
        self.smartspec = Bridge(
            Settings.read((config.additional_config or {}).get("smartspec")),
            self.num_spec_tokens,
            max_num_seqs=self.max_num_running_reqs,
            max_model_len=self.max_model_len,
            lookup="ngram" in str(speculative.method),
            cuda=config.device_config.device_type == "cuda",
            fingerprint={
                "target": str(config.model_config.model),
                "draft": str(draft),
                "device": str(config.device_config.device_type),
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
            },
        )
        # A table makes vLLM ask for the length at every step, and ends its padding to full drafts.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size
        k = self.smartspec.decide(self.running, self.waiting, free_tokens=free, budget=self.max_num_scheduled_tokens)
        if k != self.dynamic_sd_lookup[0]:
            self.dynamic_sd_lookup = [k] * (self.max_num_running_reqs + 1)
        return super().schedule(*args, **kwargs)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        # Computed tokens are advanced below; the bridge wants them as the step starts.
        self.smartspec.started(scheduler_output, self.requests)
        super()._update_after_schedule(scheduler_output)
        if self.scheduler_config.async_scheduling:
            for name in scheduler_output.num_scheduled_tokens:
                request = self.requests[name]
                if not request.is_prefill_chunk:
                    request.spec_token_ids = [-1] * self.smartspec.verified_length(request)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is not None and request.spec_token_ids:
                request.spec_token_ids = request.spec_token_ids[: self.smartspec.verified_length(request)]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        sampled = [list(tokens) for tokens in model_runner_output.sampled_token_ids or ()]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        given = {o.request_id: len(o.new_token_ids) for group in outputs.values() for o in group.outputs}
        self.smartspec.finished(scheduler_output, sampled, model_runner_output.req_id_to_index, given)
        return outputs

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.smartspec.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        self.smartspec.write()
        super().shutdown()
