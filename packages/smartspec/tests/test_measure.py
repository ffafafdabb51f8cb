import time

import pytest
import torch
from smartspec import FixedLength, NoSpeculation, SpecEngine
from smartspec.measure import EngineServer, VllmServer, interleave, ratio, serve, serve_online
from tenfold_shared.errors import UserError
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def server():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    return EngineServer(SpecEngine(model, model, max_num_seqs=3, max_len=64, clock=time.process_time))


PROMPTS = [[3, 4, 5], [7], [9, 2], [8, 8, 8, 1]]


def test_policies_in_turn_give_the_same_tokens(server):
    got = interleave(server, {"none": NoSpeculation(), "three": FixedLength(3)}, PROMPTS, 10, rounds=2)
    assert [len(runs) for runs in got.values()] == [2, 2]
    assert all(run.outputs == got["none"][0].outputs for runs in got.values() for run in runs)
    assert got["none"][0].mean_k == 0 < got["three"][0].mean_k
    assert got["none"][0].tokens == 40 and ratio(got["three"], got["none"]) > 0


def test_arrivals_on_a_virtual_clock(server):
    offline = serve(server, FixedLength(2), PROMPTS, 8)
    online = serve_online(server, FixedLength(2), PROMPTS, 8, arrivals=[0.0, 0.001, 500.0, 900.0])
    assert online.outputs == offline.outputs
    assert (online.latency > 0).all() and online.latency.max() < 100 and online.seconds < 100


def test_bad_rounds_and_no_vllm(server, monkeypatch):
    with pytest.raises(UserError, match="at least one"):
        interleave(server, {}, PROMPTS, 4)
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(UserError, match="make vllm"):
        VllmServer("target", None)


def test_concurrency_holds_while_requests_last(server):
    seen = []

    class Watch(FixedLength):
        def decide(self, state):
            seen.append(len(state.ids))
            return super().decide(state)

    ticks = iter(range(10_000))
    server.clock, clock = lambda: float(next(ticks)), server.clock
    run = serve(server, Watch(1), PROMPTS, 10, concurrency=3)
    server.clock = clock
    assert max(seen) == 3 and run.outputs == serve(server, NoSpeculation(), PROMPTS, 10).outputs
    # Three prompts of ten tokens run together, the fourth drains alone.
    tokens, seconds = run.full
    assert 30 <= tokens < 40 and 0 < seconds < run.seconds
    assert run.full_throughput == tokens / seconds and run.throughput == 40 / run.seconds
    alone = serve(server, FixedLength(1), PROMPTS, 10, concurrency=1)
    assert alone.full == (40, alone.seconds)
    assert serve(server, FixedLength(1), PROMPTS, 10, concurrency=9).full == (0, 0.0)
