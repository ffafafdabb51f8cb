import pytest


@pytest.fixture(scope="session")
def plain(pair, tmp_path_factory):
    """What transformers itself generates."""
    import torch
    from smartspec import testbed

    model = testbed.load("target")
    text = torch.tensor(testbed.prompts(12, 24, seed=3))
    with torch.no_grad():
        out = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            pad_token_id=1,
        )
    return out[:, 24:].tolist()


@pytest.mark.parametrize("draft", ["model", "prompt_lookup"])
def test_ragged_lengths_change_nothing(engine, pair, plain, draft):
    """Every request another verified length in every step, and the output is that of plain decoding."""
    got = engine("generate", target=pair["target"], draft=pair["draft"] if draft == "model" else draft, policy="ragged")
    assert got["outputs"] == plain
    assert got["accepted"] > 0 and len(set(got["lengths"])) > 2 and got["steps"] > 0


def test_the_controller_with_a_preset(engine, pair, plain):
    got = engine("generate", **pair, settings={"cost": "a100-7b-160m"})
    assert got["outputs"] == plain and got["policy"] == "GoodputController"
    assert got["counters"]['smartspec_decisions_total{reason="speculate"}'] > 0


def test_without_a_drafter_it_is_the_same_output(engine, pair, plain):
    assert engine("generate", target=pair["target"])["outputs"] == plain


@pytest.mark.parametrize("tight", [False, True])
def test_a_resting_draft_model_drafts_as_if_it_had_run(engine, pair, plain, tight):
    """The same lengths: the same tokens, and the same number of drafts kept in every single step."""
    resting, restless = (engine("rest", **pair, rest=rest, tight=tight) for rest in (True, False))
    assert resting["outputs"] == restless["outputs"] == plain
    assert resting["accepted"] == restless["accepted"] and sum(resting["accepted"]) > 20
    assert (resting["drafter"], restless["drafter"]) == ("RestingDraftModel", "DraftModelProposer")
    assert resting["rests"] > 10 and resting["taken_in"] > 100


def test_costs_are_learned_while_serving(engine, pair):
    got = engine("learn", **pair)
    assert got["fitted"] and got["policy"] == "GoodputController"
    assert got["samples"] > 40 and got["profile"]["target"] == pair["target"]
    assert "smartspec_steps_total" in got["metrics"]


def test_a_request_may_refuse_speculation(engine, pair):
    verified = engine("wishes", **pair)
    assert verified["0"] == 0 < verified["1"]


@pytest.mark.parametrize(
    ("case", "settings", "cause"),
    [
        ("no speculative_config", {}, "nothing to control"),
        ("two replicas", {}, "data_parallel_size is 2"),
        ("unknown setting", {"speed": 11}, "no setting 'speed'"),
    ],
)
def test_refusals_name_the_cause(engine, pair, case, settings, cause):
    got = engine("refused", **pair, case=case, settings=settings)
    assert cause in got["error"]
