"""One engine, one scenario: python driver.py SCENARIO OPTIONS ANSWER."""

import json
import sys
import time
from pathlib import Path


def open_engine(options):
    from vllm import LLM

    extra = {"nulls": options.get("nulls", "auto"), "count": options.get("count", True), **options.get("settings", {})}
    overrides = {"architectures": [options["architecture"]]} if options.get("architecture") else {}
    return LLM(
        options["model"], skip_tokenizer_init=True, dtype=options.get("dtype", "float32"), max_model_len=options.get("length", 128),
        enforce_eager=not options.get("compiled", False), hf_overrides=overrides, block_size=32, seed=0,
        additional_config={"adamoe": extra} if options.get("architecture") else {}, max_num_seqs=16,
        enable_prefix_caching=False,
    )  # fmt: skip


def blocks(llm):
    return llm.apply_model(_blocks)[0]


def _blocks(model):
    found = []
    for module in model.modules():
        router = getattr(module, "router", None)
        if hasattr(router, "pairs"):
            found.append([int(router.tokens), int(router.pairs), getattr(module.routed_experts, "rows", None)])
    return found


def generate(options):
    """Greedy tokens, and what routers and expert layers counted."""
    from vllm import SamplingParams

    llm = open_engine(options)
    prompts = [{"prompt_token_ids": p} for p in options["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=options["new"], ignore_eos=True, detokenize=False, logprobs=1)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [[next(iter(step.values())).logprob for step in o.outputs[0].logprobs] for o in outputs],
        "blocks": blocks(llm) if options.get("architecture") else [],
    }


def refused(options):
    """What is said when the engine cannot be opened."""
    try:
        open_engine(options)
    except Exception as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {"kind": "", "error": ""}


def prefill(options):
    """CPU seconds of prefilling, for several null biases in one engine, in turn."""
    from vllm import SamplingParams

    llm = open_engine(options)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": p} for p in options["prompts"]]

    def set_bias(value):
        def change(model):
            for module in model.modules():
                if hasattr(module, "null_bias"):
                    module.null_bias.fill_(value)

        llm.apply_model(change)

    result = {str(b): {"seconds": [], "load": 0.0} for b in options["biases"]}
    for turn in range(options["repeats"] + 1):
        for bias in options["biases"]:
            set_bias(bias)
            before = blocks(llm)
            start = time.process_time()
            llm.generate(prompts, params, use_tqdm=False)
            seconds = time.process_time() - start
            after = blocks(llm)
            if turn:
                result[str(bias)]["seconds"].append(seconds)
            tokens = sum(a[0] - b[0] for a, b in zip(after, before, strict=True))
            result[str(bias)]["load"] = sum(a[1] - b[1] for a, b in zip(after, before, strict=True)) / max(tokens, 1)
    return result


if __name__ == "__main__":
    import os

    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    scenario, options, path = sys.argv[1:]
    result = {f.__name__: f for f in (generate, refused, prefill)}[scenario](json.loads(options))
    Path(path).write_text(json.dumps(result))
