"""The plug-in without vLLM: its arithmetic against the loop, and every doubt answered with fresh guesses."""

import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cllm_jacobi.vllm_plugin import NEEDED, PROPOSER, WORKER, JacobiProposer, engine_args, next_drafts, serve_args
from tenfold_shared.errors import UserError

N = 6


def proposer(**settings: Any) -> JacobiProposer:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            worker_cls=settings.pop("worker", WORKER), pipeline_parallel_size=settings.pop("stages", 1)
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=N - 1),
        additional_config={"cllm_jacobi": settings} if settings else None,
    )
    return JacobiProposer(config)


class Runner(SimpleNamespace):
    """The part of vLLM's model runner that is read."""

    def __init__(self, requests: list[str]) -> None:
        super().__init__(
            rejection_sampler=None, input_batch=SimpleNamespace(req_ids=requests), drafter=None, effective_drafter_max_model_len=100
        )  # fmt: skip


def bound(requests: list[str], **settings: Any) -> JacobiProposer:
    drafter = proposer(**settings)
    drafter.bind(Runner(requests))
    return drafter


def show(drafter: JacobiProposer, predicted: list[list[int]]) -> None:
    """A pass whose verified rows are `predicted`, one list a request."""
    drafter.start(None)
    flat = torch.nn.functional.one_hot(torch.tensor([t for row in predicted for t in row]), 50).float()
    drafter.keep(None, (SimpleNamespace(num_draft_tokens=[len(row) - 1 for row in predicted]), None, flat, None))


def propose(drafter: JacobiProposer, sampled: list[list[int]]) -> list[list[int]]:
    tokens = np.tile(np.arange(30, 50), (len(sampled), 1))
    return drafter.propose(sampled, np.full(len(sampled), 8), tokens, slot_mappings=None)


def test_next_drafts_are_the_loops():
    """Against the rolling window of the loop: the predictions behind the correction, then refill."""
    rng = random.Random(0)
    for _ in range(200):
        draft = [rng.randrange(3) for _ in range(N - 1)]
        predicted = [rng.randrange(3) for _ in range(N)]
        right = 0
        while right < N - 1 and draft[right] == predicted[right]:
            right += 1
        expected = predicted[right + 1 :]
        got = next_drafts(predicted, N - 1, right + 1, N - 1, [7])
        assert got == expected + [7] * (N - 1 - len(expected))
    assert next_drafts([1, 2, 3], 2, 0, 4, [8, 9], 1) == [9, 8, 9, 8]
    assert next_drafts([], 0, 1, 3, [5]) == [5, 5, 5]


def test_rows_of_a_mixed_batch():
    """A full draft, none at all, a short one, and a prompt that is not read whole."""
    drafter = bound(["a", "b", "c", "d"])
    show(drafter, [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], [0]])
    a, b, c, d = propose(drafter, [[1, 2], [7], [8], []])
    assert a[:4] == [3, 4, 5, 6] and len(a) == N - 1
    assert len(b) == N - 1 and c[:2] == [9, 10] and len(c) == N - 1
    assert d == []
    assert drafter.stats.accepted == 1 and drafter.stats.verified == 7 and drafter.stats.reused == 6


def test_requests_that_moved_or_vanished_are_found_by_name():
    drafter = bound(["a", "b", "c"])
    show(drafter, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    drafter.runner.input_batch.req_ids = ["c", "a", "z"]
    c, a, z = propose(drafter, [[7], [1], [4]])
    assert c[:2] == [8, 9] and a[:2] == [2, 3]
    assert z == bound(["z"]).propose([[4]], np.array([8]), np.arange(30, 50)[None])[0]


def test_what_is_stale_is_not_used():
    drafter = bound(["a"])
    show(drafter, [[1, 2, 3]])
    drafter.start(None)  # a pass that verified nothing
    (fresh,) = propose(drafter, [[1]])
    assert fresh[:2] != [2, 3] and drafter.stats.reused == 0
    show(drafter, [[1, 2, 3]])
    (other,) = propose(drafter, [[9]])  # another token came out than the row says
    assert other[:2] != [2, 3]
    show(drafter, [[1, 2, 3]])
    (long,) = propose(drafter, [[1, 2, 3, 4]])  # more came out than was verified
    assert len(long) == N - 1


def test_reuse_off_and_refills():
    drafter = bound(["a"], reuse=False, refill="repeat")
    show(drafter, [[1, 2, 3]])
    assert propose(drafter, [[1]]) == [[1] * (N - 1)]
    assert set(propose(bound(["a"]), [[1]])[0]) <= set(range(30, 38))  # tokens of the sequence's beginning


def test_a_lower_number_of_drafts_is_kept_to():
    drafter = bound(["a"])
    show(drafter, [[1, 2, 3, 4, 5, 6]])
    drafter.limit = 2
    assert propose(drafter, [[1]]) == [[2, 3]]
    drafter.start(3)
    assert drafter.limit == 3


def test_the_warm_up_of_the_sampler_is_tolerated():
    drafter = bound([])
    drafter.keep(None, (SimpleNamespace(num_draft_tokens=[]), None, torch.zeros(0, 50), None))
    drafter.keep(None, (SimpleNamespace(num_draft_tokens=[1]), None, None, None))
    assert drafter.kept.predicted is None
    assert drafter.load_model(None) is None and drafter.dummy_run(3) is None


def test_the_length_gate_is_lifted():
    drafter = bound(["a"])
    assert drafter.runner.effective_drafter_max_model_len == 100 + N


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"worker": "vllm.v1.worker.cpu_worker.CPUWorker"}, f"add --worker-cls {WORKER}"),
        ({"stages": 2}, "pipeline_parallel_size is 2"),
        ({"speed": 11}, "no setting 'speed'"),
        ({"refill": "zeros"}, "refill is 'zeros'"),
    ],
)
def test_refusals(settings, cause):
    with pytest.raises(UserError, match=cause.replace(".", "\\.")) as error:
        proposer(**settings)
    assert "\n" not in str(error.value)


def test_the_second_model_runner_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UserError, match="refuses custom proposers"):
        proposer()


def test_a_changed_vllm_is_named():
    runner = Runner(["a"])
    del runner.effective_drafter_max_model_len
    with pytest.raises(UserError, match="has no effective_drafter_max_model_len"):
        proposer().bind(runner)
    assert len(NEEDED) == 4


def test_arguments():
    found = engine_args(16)
    assert found["speculative_config"] == {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 15}
    assert found["worker_cls"] == WORKER
    assert serve_args("m", 4)[:3] == ["vllm", "serve", "m"]
    with pytest.raises(UserError, match="at least one drafted token"):
        engine_args(1)
    with pytest.raises(UserError, match="refill is"):
        engine_args(4, refill="no")


def test_it_imports_without_torch_or_vllm():
    code = "import sys, cllm_jacobi.vllm_plugin; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
