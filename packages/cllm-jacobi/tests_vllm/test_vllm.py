"""Greedy tokens of stock vLLM, with and without the plug-in."""

import pytest


def same(a, b):
    assert a["outputs"] == b["outputs"] and a["reasons"] == b["reasons"]


def test_alone_it_is_the_same_in_far_fewer_passes(engine, models):
    """The whole gain is the reuse of the rejected tail."""
    plain = engine("generate", model=models["consistent"], way="plain", together=False)
    ours = engine("generate", model=models["consistent"], together=False)
    same(ours, plain)
    assert ours["passes"] < 0.4 * plain["passes"]
    discarded = engine("generate", model=models["consistent"], way="discard", together=False)
    same(discarded, plain)
    assert discarded["passes"] > 0.9 * plain["passes"]
    assert ours["stats"]["reused"] > 0 == discarded["stats"]["reused"]


def test_mixed_batches_chunked_prefill_and_preemptions(engine, models):
    """Eight seats, mixed lengths, a token budget under the prompts, and a cache too small for all."""
    tight = {
        "max_num_seqs": 8, "max_num_batched_tokens": 48, "enable_chunked_prefill": True, "num_gpu_blocks_override": 9,
        "enable_prefix_caching": False,
    }  # fmt: skip
    options = {
        "model": models["consistent"],
        "count": 24,
        "lengths": [20, 60, 33, 7],
        "params": {"ignore_eos": True},
        "engine": tight,
    }
    plain = engine("generate", way="plain", **options)
    ours = engine("generate", n=8, **options)
    same(ours, plain)
    assert ours["num_preemptions"] > 0 and ours["passes"] < plain["passes"]


def test_prefix_cache_hits_processors_and_the_length_limit(engine, models):
    options = {
        "model": models["consistent"], "shared_prefix": True, "lengths": [64], "engine": {"max_model_len": 104, "max_num_seqs": 4},
        "params": {"repetition_penalty": 1.2, "min_tokens": 12, "ignore_eos": True},
    }  # fmt: skip
    plain = engine("generate", way="plain", **options)
    ours = engine("generate", n=8, **options)
    same(ours, plain)
    assert ours["prefix_cache_hits"] > 0 and ours["passes"] < plain["passes"]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"override": {"worker_cls": "auto"}}, "add --worker-cls"),
        ({"temperature": 0.8}, "samples wrongly with any speculation"),
    ],
)
def test_refusals_name_the_cause(engine, models, options, cause):
    assert cause in engine("refused", model=models["consistent"], **options)["error"]
