"""One engine, one scenario: python driver.py SCENARIO OPTIONS ANSWER."""

import json
import sys
from pathlib import Path

import numpy as np
from smartspec import SpecDecision


class Ragged:
    """Every request another length in every step."""

    def __init__(self, most):
        self.rng, self.most, self.seen = np.random.default_rng(0), most, 0

    def decide(self, state):
        lens = np.minimum(self.rng.integers(0, self.most + 1, len(state.ids)), state.caps)
        return SpecDecision(int(lens.max()), lens)

    def observe(self, outcome):
        assert (outcome.accepted <= outcome.verified).all()
        self.seen += int(outcome.accepted.sum())

    def forget(self, name):
        pass


class Scheduled:
    """The same lengths in the same steps, whatever comes out; most steps draft nothing."""

    lengths = (0, 0, 0, 3, 0, 5, 2, 0, 0, 0, 0, 4)

    def __init__(self):
        self.accepted = []

    def decide(self, state):
        lens = np.minimum(self.lengths[len(self.accepted) % len(self.lengths)], state.caps)
        return SpecDecision(int(lens.max()), lens)

    def observe(self, outcome):
        self.accepted.append(int(outcome.accepted.sum()))

    def forget(self, name):
        pass


def prompts(count):
    from smartspec import testbed

    return testbed.prompts(count, 24, seed=3)


def generate(options):
    """Serve 12 requests; which drafter and policy the options say."""
    from smartspec.measure import VllmServer, serve

    server = VllmServer(options["target"], options.get("draft"), max_draft_len=5, settings=options.get("settings"))
    policy = Ragged(5) if options.get("policy") == "ragged" else None
    served = serve(server, policy, prompts(12), 32)
    answer = {"outputs": served.outputs, "lengths": server.lengths()}
    if server.bridge is not None:
        answer.update(
            steps=server.bridge.steps, samples=len(server.bridge.samples), counters=server.bridge.counters(),
            accepted=getattr(policy, "seen", None), policy=type(server.bridge.policy).__name__,
        )  # fmt: skip
    return answer


def rest(options):
    """A draft model that rests in steps without drafts, or one that never does; more requests come than run together."""
    from smartspec.measure import VllmServer, serve

    kwargs = {"enable_prefix_caching": True, "max_num_batched_tokens": 64} if options["tight"] else {}
    server = VllmServer(options["target"], options["draft"], max_draft_len=5, settings={"policy": "none"}, rest=options["rest"], **kwargs)  # fmt: skip
    policy = Scheduled()
    served = serve(server, policy, prompts(12), 32, concurrency=5)
    drafter = server.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    return {
        "outputs": served.outputs, "accepted": policy.accepted, "drafter": type(drafter).__name__,
        "rests": getattr(drafter, "rests", 0), "taken_in": getattr(drafter, "taken_in", 0),
    }  # fmt: skip


def learn(options):
    """Serve from nothing: lengths are varied, a cost model is fitted, files are written."""
    from smartspec.measure import VllmServer, serve
    from smartspec.profiling import profile_vllm

    settings = {"calibration": 40, "every": 20, "metrics": "metrics.txt", "clock": "cpu"}
    server = VllmServer(options["target"], options["draft"], max_draft_len=5, settings=settings)
    for count in (1, 4, 12):
        serve(server, None, prompts(count), 48)
    samples = profile_vllm(server.llm, "profile.json")
    return {
        "policy": type(server.bridge.policy).__name__,
        "fitted": server.bridge.live.model is not None,
        "samples": len(samples),
        "profile": json.loads(Path("profile.json").read_text())["fingerprint"],
        "metrics": Path("metrics.txt").read_text(),
    }


def wishes(options):
    """A request that wants no speculation, beside one that says nothing."""
    from smartspec.measure import VllmServer
    from vllm import SamplingParams

    server = VllmServer(options["target"], options["draft"], max_draft_len=5, settings={"policy": "fixed"})
    verified = {"0": 0, "1": 0}
    observe = server.bridge.policy.observe

    def watch(outcome):
        for name, n in zip(outcome.ids, outcome.verified.tolist(), strict=True):
            verified[name.split("-")[0]] += n
        observe(outcome)

    server.bridge.policy.observe = watch
    for name, extra in (("0", {"smartspec": {"max_draft_len": 0}}), ("1", None)):
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, extra_args=extra)
        server.engine.add_request(name, {"prompt_token_ids": prompts(2)[int(name)]}, params)
    while server.engine.has_unfinished_requests():
        server.engine.step()
    return verified


def refused(options):
    """What the plug-in says when it cannot work."""
    from smartspec.measure import VllmServer
    from vllm import LLM

    try:
        if options["case"] in ("no speculative_config", "two replicas"):
            from smartspec.vllm_plugin import SmartSpecScheduler

            class OfTwo(SmartSpecScheduler):
                """As one rank of two starts it; a second rank would need a second engine."""

                def __init__(self, vllm_config, **others):
                    vllm_config.parallel_config.data_parallel_size = 2
                    super().__init__(vllm_config, **others)

            scheduler = OfTwo if options["case"] == "two replicas" else SmartSpecScheduler
            LLM(
                options["target"], scheduler_cls=scheduler, dtype="float32", enforce_eager=True, block_size=32,
                max_model_len=128,
            )  # fmt: skip
        else:
            VllmServer(options["target"], options["draft"], max_draft_len=3, settings=options["settings"])
    except Exception as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {"kind": "", "error": ""}


if __name__ == "__main__":
    scenario, options, path = sys.argv[1:]
    result = {f.__name__: f for f in (generate, rest, learn, wishes, refused)}[scenario](json.loads(options))
    Path(path).write_text(json.dumps(result))
