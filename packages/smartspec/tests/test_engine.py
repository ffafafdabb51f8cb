import numpy as np
import pytest
import torch
from smartspec import (
    AcceptLengthEMA,
    DisableByBatchSize,
    FixedLength,
    GoodputController,
    NoSpeculation,
    PiecewiseCostModel,
    SpecDecision,
    SpecEngine,
)
from smartspec.cost import DraftCost
from smartspec.engine import Sampling, check_tokenizers
from smartspec.errors import PairError, UnsupportedError
from smartspec.medusa import MedusaHeads
from smartspec.proposers import PromptLookup
from tenfold_shared.errors import UserError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 40


def make(family, seed=0, layers=2, width=32, vocab=VOCAB, positions=256):
    torch.manual_seed(seed)
    common = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
              "max_position_embeddings": positions, "initializer_range": 0.3, "eos_token_id": None,
              "bos_token_id": None, "pad_token_id": None}  # fmt: skip
    if family == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=width, **common)).eval()
    cls, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen": (Qwen2ForCausalLM, Qwen2Config)}[family]
    return cls(config(intermediate_size=64, num_key_value_heads=2, **common)).eval()


def noisy(model, scale, seed=1):
    """A draft that often agrees with its model."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(torch.randn_like(p) * scale * p.std().nan_to_num())
    return twin


def prompts(seed=0, sizes=(1, 5, 17, 40, 3, 9)):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n).tolist() for n in sizes]


def reference(model, prompt, new, **kwargs):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


class Ragged:
    """Every request another length, another one in every step."""

    def __init__(self, most=5):
        self.rng, self.most = np.random.default_rng(3), most

    def decide(self, state):
        lens = np.minimum(self.rng.integers(0, self.most + 1, len(state.ids)), state.caps)
        return SpecDecision(int(lens.max()), lens)

    def observe(self, outcome):
        assert (outcome.accepted <= outcome.verified).all()

    def forget(self, name):
        pass


def controller(**kwargs):
    cost = PiecewiseCostModel(planes=np.array([[0, 0, 0, 9.0], [0, 0.5, 0, 2.0]]), draft_cost=DraftCost(step=0.5))
    return GoodputController(cost, 6, **kwargs)


POLICIES = {
    "none": NoSpeculation,
    "fixed": lambda: FixedLength(4),
    "ragged": Ragged,
    "goodput": controller,
    "goodput ragged": lambda: controller(verify="ragged"),
    "disable": lambda: DisableByBatchSize(3, 2),
    "accept length": AcceptLengthEMA,
}


@pytest.fixture(scope="module", params=["llama", "qwen", "opt"])
def family(request):
    model = make(request.param)
    return model, [reference(model, p, 24) for p in prompts()]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("draft", [None, "prompt_lookup", "model"])
def test_greedy_equals_generate(family, draft, policy):
    model, wanted = family
    drafter = noisy(model, 0.1) if draft == "model" else draft
    engine = SpecEngine(model, drafter, policy=POLICIES[policy](), max_num_seqs=4, max_len=96, chunk=16)
    assert engine.generate(prompts(), 24) == wanted
    if draft == "model" and policy == "fixed":
        assert 0 < engine.stats.accepted < engine.stats.verified


@pytest.mark.parametrize("size", [1, 2, 6])
def test_every_batch_size_gives_the_same(family, size):
    model, wanted = family
    engine = SpecEngine(model, noisy(model, 0.1), policy=Ragged(), max_num_seqs=size, max_len=96)
    assert engine.generate(prompts(), 24) == wanted


def test_a_draft_model_that_is_not_asked_never_runs(family):
    model, wanted = family
    engine = SpecEngine(model, noisy(model, 0.1), max_num_seqs=4, max_len=96)
    passes = []
    forward = engine.proposer.slots.forward
    engine.proposer.slots.forward = lambda *a, **k: passes.append(a) or forward(*a, **k)
    assert engine.generate(prompts(), 24) == wanted and not passes
    engine.policy = FixedLength(3)
    assert engine.generate(prompts(), 24) == wanted and passes


@pytest.mark.parametrize("nodes", [1, 5, 16])
def test_medusa_trees_equal_generate(family, nodes):
    model, wanted = family
    heads = MedusaHeads(3, model.config.hidden_size, VOCAB)
    with torch.no_grad():
        for head in heads.heads:
            head[-1].weight.copy_(model.get_output_embeddings().weight)
    engine = SpecEngine(model, heads, policy=FixedLength(nodes), max_num_seqs=3, max_len=96, max_draft_len=nodes)
    assert engine.generate(prompts(), 24) == wanted
    assert engine.stats.verified > 0
    adaptive = SpecEngine(model, heads, policy=controller(), max_num_seqs=3, max_len=96)
    assert adaptive.generate(prompts(), 24) == wanted


def test_eos_and_the_last_token_inside_an_accepted_run():
    model = make("llama")
    draft = noisy(model, 0.0)
    for prompt in prompts():
        plain = reference(model, prompt, 24)
        for at in (0, 1, 4, 11):
            wanted = plain[: plain.index(plain[at]) + 1]
            engine = SpecEngine(model, draft, policy=FixedLength(6), max_len=96)
            assert engine.generate([prompt], 24, eos=plain[at]) == [wanted]
        for new in (1, 2, 3, 8):
            engine = SpecEngine(model, draft, policy=FixedLength(6), max_len=96)
            assert engine.generate([prompt], new) == [plain[:new]]


def test_a_repetition_penalty_is_applied_to_both_sides():
    model = make("qwen")
    prompt = prompts()[2]
    wanted = reference(model, prompt, 20, repetition_penalty=1.7)
    for draft in (noisy(model, 0.05), "prompt_lookup"):
        engine = SpecEngine(model, draft, policy=Ragged(), max_len=96)
        assert engine.generate([prompt], 20, sampling=Sampling(repetition_penalty=1.7)) == [wanted]


def test_a_draft_of_shorter_reach_stops_drafting():
    model, draft = make("llama"), make("llama", seed=5, positions=32)
    engine = SpecEngine(model, draft, policy=FixedLength(4), max_num_seqs=4, max_len=96)
    assert engine.generate(prompts(), 24) == [reference(model, p, 24) for p in prompts()]


def test_the_draft_catches_up_after_a_pause():
    model = make("llama")
    engine = SpecEngine(model, noisy(model, 0.0), policy=NoSpeculation(), max_len=250)
    engine.add_request(prompts()[1], 120)
    done = {}
    while engine.pending:
        if engine.stats.steps == 90:
            engine.policy = FixedLength(3)
        done.update(engine.step())
    assert done[0] == reference(model, prompts()[1], 120)
    assert engine.stats.accepted == engine.stats.verified > 0


def test_a_request_may_refuse_speculation():
    model = make("llama")
    engine = SpecEngine(model, noisy(model, 0.1), policy=FixedLength(4), max_len=96)
    engine.generate([prompts()[1]], 24, max_draft_len=0)
    assert engine.stats.verified == 0


@pytest.mark.parametrize("draft", ["model", "prompt_lookup", "medusa"])
def test_sampled_output_is_the_targets(draft):
    """Two tokens drawn 3000 times against the exact distribution."""
    model = make("llama", vocab=6)
    prompt, n = [1, 2, 3, 1, 2], 3000
    heads = MedusaHeads(2, 32, 6)
    drafter = {"model": noisy(model, 0.3), "prompt_lookup": "prompt_lookup", "medusa": heads}[draft]
    engine = SpecEngine(model, drafter, policy=FixedLength(3), max_num_seqs=500, max_len=16, seed=4)
    out = engine.generate([prompt] * n, 3, sampling=Sampling(temperature=1.0))
    with torch.no_grad():
        p = {(): model(torch.tensor([prompt])).logits[0, -1].softmax(-1)}
        for a in range(6):
            p[(a,)] = model(torch.tensor([[*prompt, a]])).logits[0, -1].softmax(-1)
    expected = n * torch.stack([p[()][a] * p[(a,)] for a in range(6)]).flatten().double().numpy()
    seen = np.bincount([6 * o[0] + o[1] for o in out], minlength=36)
    from scipy.stats import chisquare

    big = expected >= 5
    observed = np.append(seen[big], seen[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum())
    keep = wanted > 0
    assert chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue > 1e-3


def test_prompt_lookup_takes_the_latest_and_longest():
    lookup = PromptLookup()
    assert lookup.match([1, 2, 3, 9, 1, 2, 3, 7, 5, 1, 2, 3], 2) == [7, 5]
    assert lookup.match([4, 1, 8, 6, 8], 3) == [6, 8]
    assert lookup.match([1, 2, 3], 3) == [] and lookup.match([1], 3) == []


def test_medusa_checkpoints_in_the_official_layout(tmp_path):
    from safetensors.torch import save_file

    heads = MedusaHeads(3, 8, 11, blocks=2)
    state = {f"medusa_head.{k}": v.contiguous() for k, v in heads.heads.state_dict().items()}
    assert "medusa_head.0.1.linear.bias" in state and "medusa_head.2.2.weight" in state
    save_file(state, tmp_path / "medusa_lm_head.safetensors")
    torch.save(heads.heads.state_dict(), tmp_path / "medusa_lm_head.pt")
    x = torch.randn(4, 8)
    for path in (tmp_path, tmp_path / "medusa_lm_head.pt"):
        assert torch.equal(MedusaHeads.load(path)(x), heads(x))
    with pytest.raises(UserError, match="does not exist"):
        MedusaHeads.load(tmp_path / "none.pt")
    (tmp_path / "broken.pt").write_text("no")
    with pytest.raises(UserError, match="could not be read"):
        MedusaHeads.load(tmp_path / "broken.pt")
    with pytest.raises(UserError, match="Medusa heads"):
        MedusaHeads.from_state_dict({"lm_head.weight": torch.zeros(2, 2)})


def test_pairs_that_do_not_fit():
    model = make("llama")
    with pytest.raises(PairError, match="41 tokens"):
        SpecEngine(model, make("llama", vocab=41), max_len=64)
    with pytest.raises(PairError, match="vocabulary"):
        SpecEngine(model, MedusaHeads(1, 32, 9), max_len=64)
    with pytest.raises(UserError, match="draft is"):
        SpecEngine(model, "magic", max_len=64)

    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {w: i for i, w in enumerate(self.words)}

    check_tokenizers(Words("a", "b"), Words("a", "b"))
    with pytest.raises(PairError, match="'a' is 0 for the target and 1"):
        check_tokenizers(Words("a", "b"), Words("b", "a"))
    with pytest.raises(PairError, match="'c' is None"):
        check_tokenizers(Words("a"), Words("a", "c"))


def test_models_that_cannot_be_rolled_back():
    window = MistralForCausalLM(
        MistralConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="sliding window of 16"):
        SpecEngine(window, max_len=64)
    SpecEngine(window, max_len=16)
    linear = make("llama")
    linear.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        SpecEngine(linear, max_len=64)
    with pytest.raises(UserError, match="256 positions"):
        SpecEngine(make("llama"), max_len=500)


def test_bad_requests():
    engine = SpecEngine(make("llama"), max_len=32)
    for prompt, new, cause in (([], 4, "empty"), ([99], 4, "outside"), ([1], 0, "max_new"), ([1] * 30, 9, "39 tokens")):
        with pytest.raises(UserError, match=cause):
            engine.add_request(prompt, new)
    with pytest.raises(UserError, match="out of range"):
        Sampling(temperature=-1)
    with pytest.raises(UserError, match="out of range"):
        Sampling(temperature=float("nan"))
    with pytest.raises(UserError, match="max_num_seqs"):
        SpecEngine(make("llama"), max_num_seqs=0)
