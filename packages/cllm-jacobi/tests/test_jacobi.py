"""Jacobi decoding of a model is greedy decoding of the same model."""

import copy
from typing import Any

import pytest
import torch
from cllm_jacobi import JacobiConfig, jacobi_generate
from tenfold_shared.errors import UserError

MODELS = ["llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma3"]
SIZES = [1, 2, 7, 16, 64]
NEW = 24


def single(batch: Any, row: int = 0) -> dict[str, torch.Tensor]:
    keep = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row : row + 1, keep]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same(model: Any, inputs: Any, *, settings: dict[str, Any] | None = None, **wanted: Any) -> Any:
    """Decode both ways and compare; gives our output."""
    wanted = {"max_new_tokens": NEW, "do_sample": False, **wanted}
    plain = model.generate(**inputs, **wanted)
    ours = jacobi_generate(model, **inputs, **wanted, return_dict_in_generate=True, **(settings or {}))
    assert ours.sequences.tolist() == plain.tolist()
    return ours


@pytest.mark.parametrize("window", ["rolling", "block"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_output_is_greedy(tiny, batch, name, size, window):
    """Singles and a left-padded batch of four; block size 1 is autoregressive decoding, passes included."""
    model = tiny(name)
    for inputs in (single(batch), batch):
        ours = same(model, inputs, settings={"block_size": size, "window": window})
        assert (ours.forward_passes <= ours.new_tokens).all()
        if size == 1:
            assert ours.forward_passes.tolist() == ours.new_tokens.tolist()
            assert (ours.tokens_per_forward == 1).all()


def test_the_models_say_different_things(tiny, batch):
    """Else the identities above would prove little."""
    for name in MODELS:
        out = tiny(name).generate(**single(batch), max_new_tokens=NEW, do_sample=False)[0, 9:]
        assert len(set(out.tolist())) > 2, name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_float64(tiny, batch, name):
    model = copy.deepcopy(tiny(name)).double()
    same(model, batch, settings={"block_size": 16})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_bfloat16_processors_see_float32_logits(tiny, batch, name):
    """As in generate. One token a pass, so that the passes have generate's shapes and no tie can break differently."""
    model = copy.deepcopy(tiny(name)).bfloat16()
    for penalty in (1.03, 1.1, 1.3):
        for row in range(4):
            same(model, single(batch, row), settings={"block_size": 1}, repetition_penalty=penalty)


def test_guesses_are_drawn_from_the_rows_own_prompt(tiny, batch, monkeypatch):
    """Not from its padding."""
    from cllm_jacobi import jacobi

    sources = []

    class Watched(jacobi.Drafter):
        def __init__(self, init, prompt, **settings):
            sources.append(list(prompt))
            super().__init__(init, prompt, **settings)

    monkeypatch.setattr(jacobi, "Drafter", Watched)
    jacobi_generate(tiny("llama"), **batch, max_new_tokens=2)
    assert sources == [single(batch, row)["input_ids"][0].tolist() for row in range(4)]


@pytest.mark.parametrize("init", ["prompt", "random", "repeat", "pad", "ngram", lambda tokens, count: [5] * count])
@pytest.mark.parametrize("window", ["rolling", "block"])
def test_the_guess_does_not_matter(tiny, batch, init, window):
    same(tiny("llama"), batch, settings={"block_size": 7, "init": init, "window": window})
    same(tiny("mistral"), single(batch), settings={"block_size": 7, "init": init, "window": window})


def test_an_ngram_pool_goes_on_as_the_rejected_tail_did():
    from cllm_jacobi.draft import Drafter

    drafter = Drafter("ngram", [50], vocab_size=61)
    drafter.remember([4, 9, 7])
    assert drafter.fill([3, 4], 2) == [9, 7]
    assert drafter.fill([3, 9], 3) == [7, 50, 50]
    assert drafter.fill([3, 7], 1) == [50]  # nothing followed it
    drafter.remember([9, 8])
    assert drafter.fill([9], 1) == [8] and drafter.fill([4], 2) == [9, 7]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_both_batch_schemes_agree(tiny, batch, name):
    for scheme in ("holes", "lockstep"):
        same(tiny(name), batch, settings={"block_size": 7, "batch": scheme}, max_new_tokens=60)


def test_rows_of_a_batch_need_no_more_passes_than_alone_with_holes(tiny, batch):
    """With guesses that depend on the row's own tokens only."""
    model = tiny("llama")
    settings = {"block_size": 7, "init": "repeat", "max_new_tokens": NEW, "return_dict_in_generate": True}
    together = jacobi_generate(model, **batch, **settings)
    for row in range(4):
        alone = jacobi_generate(model, **single(batch, row), **settings)
        assert alone.accepted_per_pass[0] == together.accepted_per_pass[row]


def test_holes_are_compacted(tiny, batch, monkeypatch):
    from cllm_jacobi import cache

    calls = []
    compact = cache.compact
    monkeypatch.setattr(cache, "compact", lambda *a: calls.append(1) or compact(*a))
    model = tiny("llama")
    # One row repeats itself and runs ahead of the others.
    draft = model.generate(**single(batch), max_new_tokens=70, do_sample=False)[0, 9:].tolist()

    def oracle(tokens, count):
        follows = draft[len(tokens) : len(tokens) + count] if tokens and tokens[0] == draft[0] else []
        return follows + [3] * (count - len(follows))

    ours = same(model, batch, settings={"block_size": 7, "init": oracle, "batch": "holes"}, max_new_tokens=70)
    assert calls and max(ours.accepted_per_pass[0]) == 7


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_first_eos_of_a_list_ends_a_row(tiny, batch, name):
    model = tiny(name)
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, 9:]
    eos = [int(plain[0, 5]), int(plain[1, 11]), int(plain[2, 2])]
    ours = same(model, batch, settings={"block_size": 16}, eos_token_id=eos)
    assert len(set(ours.new_tokens.tolist())) > 1
    same(model, single(batch), settings={"block_size": 16, "window": "block"}, eos_token_id=eos)


def test_an_eos_in_the_prompt_or_in_a_rejected_guess_does_not_count(tiny, batch):
    inputs = single(batch)
    inputs["input_ids"][0, 2] = 1
    same(tiny("llama"), inputs, settings={"block_size": 16, "init": lambda tokens, count: [1] * count})


@pytest.mark.parametrize(
    "wanted",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(1, 30))},
        {"bad_words_ids": [[5], [7, 9]], "forced_eos_token_id": 1},
        {"suppress_tokens": list(range(2, 30)), "exponential_decay_length_penalty": (3, 1.5)},
    ],
)
def test_processors_see_the_drafted_prefix(tiny, batch, wanted):
    for inputs in (batch, single(batch)):
        same(tiny("llama"), inputs, settings={"block_size": 7}, **wanted)
    same(tiny("gemma3"), batch, settings={"block_size": 7}, **wanted)


def test_a_function_of_the_row_constrains_each_row(tiny, batch):
    allowed = lambda row, ids: [3 + row, 20 + row, 7, 9, 11, int(ids[-1]) % 50 + 2]  # noqa: E731
    same(tiny("llama"), batch, settings={"block_size": 7}, prefix_allowed_tokens_fn=allowed)


def test_a_custom_criterion_sees_every_prefix(tiny, batch):
    seen = []

    def criterion(ids, scores, **kwargs):
        seen.append(ids.shape[1])
        return torch.full((len(ids),), bool((ids[:, -1] % 7 == 3).any()))

    model, inputs = tiny("llama"), single(batch)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, stopping_criteria=[criterion])
    asked, seen[:] = list(seen), []
    repeat = plain[0, 9:].tolist()
    ours = jacobi_generate(
        model, **inputs, max_new_tokens=NEW, stopping_criteria=[criterion], block_size=16,
        init=lambda tokens, count: (repeat[len(tokens) :] + [2] * count)[:count],
    )  # fmt: skip
    assert ours.tolist() == plain.tolist()
    assert seen == asked  # one by one although a pass gave many


def test_stop_strings(tiny, batch):
    import string

    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(string.ascii_letters + string.digits[:9])}
    inner = Tokenizer(models.BPE(letters, []))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    model, inputs = tiny("llama"), single(batch)
    word = tokenizer.decode(model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, 15:18])
    assert len(word) == 3
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, stop_strings=word, tokenizer=tokenizer)
    ours = jacobi_generate(model, **inputs, max_new_tokens=NEW, stop_strings=word, tokenizer=tokenizer, block_size=7)
    assert ours.tolist() == plain.tolist() and ours.shape[1] < 9 + NEW
    with pytest.raises(UserError, match="needs the tokenizer"):
        jacobi_generate(model, **inputs, max_new_tokens=4, stop_strings=word)


@pytest.mark.parametrize(
    ("name", "settings"),
    # A sliding window has no static roll-back.
    [(name, settings) for name in ("llama", "gpt2", "mistral") for settings in ({}, {"window": "block"})]
    + [(name, {"cache": "static"}) for name in ("llama", "gpt2")],
)
def test_up_to_the_position_limit(tiny, name, settings):
    ids = torch.randint(2, 61, (1, 90), generator=torch.Generator().manual_seed(0))
    same(tiny(name), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, settings={"block_size": 16, **settings}, max_new_tokens=6)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_a_static_cache_gives_the_same(tiny, batch, name, size):
    for inputs in (single(batch), batch):
        same(tiny(name), inputs, settings={"block_size": size, "cache": "static"})


def test_the_compiled_pass_has_one_shape(tiny, batch, monkeypatch):
    """The block pass goes through torch.compile with a constant shape; the backend here only counts graphs."""
    graphs, shapes = [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile = torch.compile

    def counted(model, **settings):
        compiled = compile(model, backend=backend, **settings)

        def call(**arguments):
            shapes.add(tuple(arguments["input_ids"].shape))
            return compiled(**arguments)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    model, inputs = tiny("llama"), single(batch)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    decoder = JacobiConfig(block_size=7, compile=True).decoder()
    first = jacobi_generate(model, **inputs, max_new_tokens=NEW, decoder=decoder)
    assert first.tolist() == plain.tolist() and graphs and shapes == {(1, 7)}
    torch._dynamo.reset()


def test_facts_of_the_fixed_point(tiny, batch):
    """After j iterations the first j tokens are greedy; k <= n; starting at the fixed point takes one pass."""
    model, inputs = tiny("llama"), single(batch)
    greedy = model.generate(**inputs, max_new_tokens=33, do_sample=False)[0, 9:].tolist()
    out = jacobi_generate(
        model,
        **inputs,
        max_new_tokens=33,
        block_size=8,
        window="block",
        return_trajectory=True,
        return_dict_in_generate=True,
    )
    at = 0
    for states in out.trajectories[0]:
        # A block starts with the newest certain token, which is the last one of the block before unless all was confirmed.
        at -= states[0][0] != greedy[at] or states[-1] != greedy[at : at + len(states[0])]
        block = greedy[at : at + len(states[0])]
        assert states[-1] == block and len(states) - 1 <= 8
        for j, state in enumerate(states):
            assert state[: j + 1] == block[: j + 1]  # the first token was certain before the first pass
        at += len(block)
    assert at >= 32
    # The first guesses of a rolling window ride in the prefill.
    for window, accepted, speed in (("block", [1, 8, 8, 8, 8], 8.0), ("rolling", [8, 8, 8, 8, 1], 25 / 4)):
        known = jacobi_generate(
            model, **inputs, max_new_tokens=33, block_size=8, window=window, return_dict_in_generate=True,
            init=lambda tokens, count: (greedy[len(tokens) :] + [2] * count)[:count],
        )  # fmt: skip
        assert known.accepted_per_pass[0] == accepted
        assert known.tokens_per_iteration.item() == speed


def test_trajectories_end_where_the_sequence_ends(tiny, batch):
    """Guesses behind an EOS inside a block belong to no state."""
    model, inputs = tiny("llama"), single(batch)
    greedy = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, 9:].tolist()
    eos = next(t for i, t in enumerate(greedy) if i > 9 and t not in greedy[:i] and i % 8)
    out = same(
        model, inputs, settings={"block_size": 8, "window": "block", "return_trajectory": True}, eos_token_id=[eos]
    )
    last = out.trajectories[0][-1]
    assert len(last[0]) == 8 and last[-1][-1] == eos and len(last[-1]) < 8
    assert last[-1] == out.sequences[0, -len(last[-1]) :].tolist()


def test_max_new_tokens_cuts_inside_a_run(tiny, batch):
    model, inputs = tiny("llama"), single(batch)
    greedy = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, 9:].tolist()
    for new in (1, 2, 5, 11):
        ours = jacobi_generate(
            model,
            **inputs,
            max_new_tokens=new,
            block_size=16,
            init=lambda tokens, count: greedy[len(tokens) : len(tokens) + count],
        )
        assert ours[0, 9:].tolist() == greedy[:new]


@pytest.mark.parametrize("window", ["rolling", "block"])
def test_token_types_go_on_as_in_generate(tiny, batch, window):
    types = torch.randint(0, 5, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    plain = same(tiny("gpt2"), batch, settings={"block_size": 7, "window": window})
    typed = same(tiny("gpt2"), {**batch, "token_type_ids": types}, settings={"block_size": 7, "window": window})
    assert plain.sequences.tolist() != typed.sequences.tolist()


def test_an_extra_input_of_the_prompts_length_goes_to_the_prefill_alone(tiny, batch):
    class Shifted(type(tiny("llama"))):
        def forward(self, input_ids=None, shift=None, **arguments):
            embedded = self.model.embed_tokens(input_ids)
            return super().forward(inputs_embeds=embedded if shift is None else embedded + shift, **arguments)

    model = copy.deepcopy(tiny("llama"))
    model.__class__ = Shifted
    shift = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    asked = {**single(batch), "max_new_tokens": NEW}
    one, many = (jacobi_generate(model, **asked, shift=shift, block_size=n).tolist() for n in (1, 7))
    assert one == many != jacobi_generate(model, **asked, block_size=7).tolist()


def test_through_generate(tiny, batch):
    model, inputs = tiny("llama"), single(batch)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert (
        model.generate(**inputs, max_new_tokens=NEW, custom_generate=JacobiConfig(block_size=7).decoder()).tolist()
        == plain.tolist()
    )
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        custom_generate=JacobiConfig().decoder(),
        block_size=1,
        return_dict_in_generate=True,
    )
    assert out.sequences.tolist() == plain.tolist() and out.forward_passes.item() == NEW


def test_the_streamer_gets_prompt_runs_and_end(tiny, batch):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], 0

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended += 1

    streamer = Streamer()
    model, inputs = tiny("llama"), single(batch)
    out = model.generate(**inputs, max_new_tokens=NEW, custom_generate=JacobiConfig(block_size=7).decoder(streamer))
    assert streamer.got == out[0].tolist() and streamer.ended == 1
    with pytest.raises(UserError, match="a streamer shows one sequence"):
        jacobi_generate(model, **batch, max_new_tokens=2, streamer=streamer)


def test_the_global_random_state_is_left_alone(tiny, batch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for sampling in ("gumbel", "speculative"):
        jacobi_generate(
            tiny("llama"), **batch, max_new_tokens=5, do_sample=True, sampling=sampling, block_size=4, seed=3
        )
    assert torch.equal(before, torch.get_rng_state())


def test_an_exported_folder_decodes_the_same(tiny, batch, tmp_path):
    from cllm_jacobi.export import export_custom_generate

    model, inputs = tiny("llama"), single(batch)
    export_custom_generate(tmp_path / "hub")
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    ours = model.generate(
        **inputs, max_new_tokens=NEW, custom_generate=str(tmp_path / "hub"), trust_remote_code=True, block_size=7
    )
    assert ours.tolist() == plain.tolist()


# Bad input.


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"block_size": 0}, "1 is plain autoregressive decoding"),
        ({"window": "sliding"}, "window is 'sliding'"),
        ({"sampling": "beam"}, "sampling is 'beam'"),
        ({"init": "zeros", "max_new_tokens": 3}, "init is 'zeros'"),
        ({"init": lambda tokens, count: [], "max_new_tokens": 3}, "the draft function gave"),
        ({"num_beams": 3}, "num_beams is 3"),
        ({"return_trajectory": True}, "no blocks"),
    ],
)
def test_settings_are_refused_in_one_line(tiny, batch, settings, cause):
    with pytest.raises(UserError, match=cause) as error:
        jacobi_generate(tiny("llama"), **single(batch), **settings)
    assert "\n" not in str(error.value)


def test_inputs_are_refused(tiny, batch):
    model = tiny("llama")
    ids = batch["input_ids"]
    with pytest.raises(UserError, match="padding_side='left'"):
        jacobi_generate(model, ids.flip(1), attention_mask=batch["attention_mask"].flip(1), max_new_tokens=2)
    unpadded = copy.deepcopy(model)
    unpadded.generation_config.pad_token_id = None
    with pytest.raises(UserError, match="a batch needs a pad token"):
        jacobi_generate(unpadded, ids, max_new_tokens=2)
    with pytest.raises(UserError, match="the prompt is empty and the model has no BOS"):
        jacobi_generate(model, ids[:1, :0], max_new_tokens=2)
    assert jacobi_generate(model, ids[:1, :0], bos_token_id=4, max_new_tokens=3).shape == (1, 4)
    with pytest.raises(UserError, match="the prompt has 100 tokens, the model has 96 positions"):
        jacobi_generate(model, torch.full((1, 100), 5), max_new_tokens=2)
    with pytest.raises(UserError, match="a table of 96 positions"):
        jacobi_generate(tiny("gpt2"), torch.full((1, 90), 5), max_new_tokens=20)
    with pytest.raises(UserError, match="the prompt has the id 99"):
        jacobi_generate(model, torch.full((1, 3), 99), max_new_tokens=2)
    with pytest.raises(UserError, match="expected \\(batch, tokens\\)"):
        jacobi_generate(model, torch.tensor([3]), max_new_tokens=2)
    past = model(ids[:1]).past_key_values
    with pytest.raises(UserError, match="already holds tokens"):
        jacobi_generate(model, ids[:1], past_key_values=past, max_new_tokens=2)


def test_caches_that_cannot_roll_back_are_named(tiny, batch):
    with pytest.raises(UserError, match="StaticSlidingWindowLayer cannot roll back"):
        jacobi_generate(tiny("mistral"), **single(batch), max_new_tokens=4, cache="static")
    with pytest.raises(UserError, match="DynamicSlidingWindowLayer"):
        jacobi_generate(tiny("mistral"), **batch, max_new_tokens=4, batch="holes")


def test_models_that_cannot_be_decoded_so(batch):
    import transformers as t

    state = t.MambaForCausalLM(
        t.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, eos_token_id=1, pad_token_id=0)
    )
    with pytest.raises(UserError, match="recurrent state"):
        jacobi_generate(state, batch["input_ids"][:1], max_new_tokens=2)
    small = t.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UserError, match="encoder-decoder"):
        jacobi_generate(t.T5ForConditionalGeneration(small), batch["input_ids"][:1], max_new_tokens=2)
