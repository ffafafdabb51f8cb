import json
import time

import pytest
import torch
from smartspec import LinearCostModel, PiecewiseCostModel, StepSample
from smartspec.errors import ProfileError
from smartspec.profiling import fingerprint_of, load_profile, profile_engine, profile_vllm, save_profile
from tenfold_shared.errors import UserError
from transformers import LlamaConfig, LlamaForCausalLM


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


@pytest.mark.parametrize("draft", ["model", "prompt_lookup", None])
def test_a_profile_fits_a_cost_model(draft):
    drafter = tiny() if draft == "model" else draft
    calls = []
    samples = profile_engine(
        tiny(), drafter, batch_sizes=(1, 3), contexts=(4, 20), draft_lens=(0, 1, 3), repeats=1,
        clock=time.process_time, progress=lambda done, all: calls.append((done, all)),
    )  # fmt: skip
    targets = [s for s in samples if s.kind == "target"]
    assert len(targets) == 12 and {s.n_batched for s in targets} == {1, 2, 4, 3, 6, 12}
    assert calls[-1] == (24, 24)
    model = PiecewiseCostModel.fit([s for s in samples if s.ms > 0])
    assert model.target(12, 6) > 0
    if draft == "model":
        assert model.draft(12, 3, 3) > model.draft(12, 3, 1) > 0


def test_files_round_trip(tmp_path):
    samples = [StepSample(i, i, 1, ms=1.5) for i in range(3)]
    save_profile(tmp_path / "p.json", samples, {"device": "x"})
    assert load_profile(tmp_path / "p.json", fingerprint={"device": "x"}) == (samples, {"device": "x"})
    with pytest.raises(ProfileError, match="device x, this run has y"):
        load_profile(tmp_path / "p.json", fingerprint={"device": "y"})
    record = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**record, "schema": 2}))
    with pytest.raises(ProfileError, match="schema 2"):
        load_profile(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(json.dumps({**record, "samples": [{"speed": 1}]}))
    with pytest.raises(ProfileError, match="not a profile"):
        load_profile(tmp_path / "p.json")
    with pytest.raises(ProfileError, match="3 points"):
        LinearCostModel.fit(samples)


def test_the_fingerprint_tells_models_apart():
    found = fingerprint_of(tiny(), "prompt_lookup")
    assert "llama" in found["target"] and found["draft"] == "prompt_lookup" and found["dtype"] == "float32"


def test_bad_grids_and_foreign_engines():
    with pytest.raises(UserError, match="grid"):
        profile_engine(tiny(), batch_sizes=())
    with pytest.raises(UserError, match="repeats"):
        profile_engine(tiny(), repeats=0)
    with pytest.raises(UserError, match="SmartSpecScheduler"):
        profile_vllm(object())
