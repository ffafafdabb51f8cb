"""Planners: the grammar, a server that misbehaves in every way, a tiny local chat model, the cache."""

import copy
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
import torch
from lcmis_align import (
    ConceptPair,
    FilePlanner,
    LCMisDataset,
    OpenAICompatiblePlanner,
    PlanError,
    PlannerError,
    RulePlanner,
    TransformersPlanner,
)
from lcmis_align.planners import ConceptPlanner
from lcmis_align.planners.base import extract_json
from transformers import LlamaConfig, LlamaForCausalLM

# prompt: (drawn first, drawn second)
GRAMMAR = {
    "a tea cup of iced coke": ("a tea cup", "iced coke"),
    "A tea cup of iced coke.": ("A tea cup", "iced coke"),
    "a  tea cup   of iced coke": ("a tea cup", "iced coke"),
    "a bowl of coffee": ("a bowl", "coffee"),
    "a bucket of wine": ("a bucket", "wine"),
    "the vase of beer": ("the vase", "beer"),
    "a slice of the moon": ("a slice", "the moon"),
    "a basket of soup": ("a basket", "soup"),
    "a jar of noodles": ("a jar", "noodles"),
    "a plate of tea": ("a plate", "tea"),
    "iced coke in a tea cup": ("a tea cup", "iced coke"),
    "a penguin in the desert": ("the desert", "a penguin"),
    "a panda on the beach": ("the beach", "a panda"),
    "a tiger inside a kitchen": ("a kitchen", "a tiger"),
    "sushi inside of a temple": ("a temple", "sushi"),
    "a polar bear within a forest": ("a forest", "a polar bear"),
    "a whale at the great wall": ("the great wall", "a whale"),
    "a camel near the lake": ("the lake", "a camel"),
    "an owl beside the pyramids": ("the pyramids", "an owl"),
    "a seal under the bridge": ("the bridge", "a seal"),
    "a fox behind the house": ("the house", "a fox"),
    "a snow leopard in front of the eiffel tower": ("the eiffel tower", "a snow leopard"),
    "a candle on top of a cake": ("a cake", "a candle"),
    "a horse next to the sea": ("the sea", "a horse"),
    "coffee into a wine glass": ("a wine glass", "coffee"),
    "a parrot onto a table": ("a table", "a parrot"),
    "a bottle filled with sand": ("a bottle", "sand"),
    "a kettle filled with flowers": ("a kettle", "flowers"),
    "a bathtub overflowing with popcorn": ("a bathtub", "popcorn"),
    "a box stuffed with clouds": ("a box", "clouds"),
    "a mug brimming with stars": ("a mug", "stars"),
    "a barrel full of milk": ("a barrel", "milk"),
    "a spoon full of bees": ("a spoon", "bees"),
    "a chair made of glass": ("a chair", "glass"),
    "a chair made from cheese": ("a chair", "cheese"),
    "a car made out of wood": ("a car", "wood"),
    "a house built of ice": ("a house", "ice"),
    "a boat carved out of soap": ("a boat", "soap"),
    "a robot composed of fruit": ("a robot", "fruit"),
    "a horse covered in feathers": ("a horse", "feathers"),
    "a dog covered with scales": ("a dog", "scales"),
    "a tree wrapped in paper": ("a tree", "paper"),
    "a cat dressed in armour": ("a cat", "armour"),
    "a cake decorated with nails": ("a cake", "nails"),
    "a car coated with fur": ("a car", "fur"),
    "a glass containing fire": ("a glass", "fire"),
    "a tea cup holding beer": ("a tea cup", "beer"),
    "a man wearing leaves": ("a man", "leaves"),
    "a rabbit with tiger stripes": ("a rabbit", "tiger stripes"),
    "a zebra-patterned horse": ("horse", "zebra"),
    "a leopard patterned elephant": ("elephant", "leopard"),
    "a giraffe-spotted cow": ("cow", "giraffe"),
    "a tiger-striped rabbit": ("rabbit", "tiger"),
    "a snake-skinned dog": ("dog", "snake"),
    "the peacock-textured cat": ("cat", "peacock"),
    "a mint-flavoured cake": ("cake", "mint"),
    "a mint-flavored cake": ("cake", "mint"),
    "a rose flavoured soup": ("soup", "rose"),
    "a cat and a dog": ("a cat", "a dog"),
    "a penguin and a beach": ("a beach", "a penguin"),
    "iced coke and a tea cup": ("a tea cup", "iced coke"),
    "a spoon and a kitchen": ("a kitchen", "a spoon"),
    "a lion, a tiger": ("a lion", "a tiger"),
    "suit & sandals": ("suit", "sandals"),
    "suit + sandals": ("suit", "sandals"),
}


@pytest.mark.parametrize("prompt", GRAMMAR)
def test_the_grammar(prompt):
    plan = RulePlanner().plan(prompt)
    assert (plan.first.name, plan.second.name) == GRAMMAR[prompt]


def test_there_are_sixty_prompts():
    assert len(GRAMMAR) >= 60


def test_the_lexicon_describes_and_names_the_hidden_concept():
    plan = RulePlanner().plan("a tea cup of iced coke")
    assert plan.first.describe
    assert plan.latent == "glass cup"
    assert RulePlanner().plan("a glass cup of iced coke").latent is None
    assert RulePlanner().plan("a horse of iced coke").latent is None


@pytest.mark.parametrize("prompt", ["red", "", "   ", "a cup of", "of coke", "and", None, 7])
def test_what_cannot_be_split(prompt):
    with pytest.raises(PlanError, match=r"could not split .* into two concepts; pass first=... and second=..."):
        RulePlanner().plan(prompt)


def test_concepts_may_be_given():
    plan = RulePlanner().plan("red", first="square", second="red")
    assert (plan.first.name, plan.second.name, plan.prompt) == ("square", "red", "red")


def test_rules_propose_pairs_that_were_not_seen():
    planner = RulePlanner()
    first = planner.propose_pairs("beverage, wrong container", 5)
    more = planner.propose_pairs("beverage, wrong container", 5, positives=first[:2], negatives=first[2:])
    assert len(first) == len(more) == 5
    assert not {p.key for p in first} & {p.key for p in more}
    assert all(planner.plan(pair.text).second.name == pair.b for pair in first)
    with pytest.raises(PlannerError, match="knows no pattern 'x'"):
        planner.propose_pairs("x", 5)


SPLIT = {
    "first_prompt": "a tea cup",
    "second_prompt": "iced coke",
    "first_describe": "A cup.",
    "second_describe": "Dark.",
}
LATENT = {"latent": "glass cup"}


class Server:
    """A chat server on the loopback that answers what it is told to, in turn."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append((self.path, body, self.headers.get("authorization")))
                answer = outer.answers.pop(0)
                if answer == "slow":
                    outer.release.wait(5)
                    answer = (500, "too late", {})
                status, text, headers = answer if isinstance(answer, tuple) else (200, chat(answer), {})
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    return

            def log_message(self, *args):
                return

        self.release = threading.Event()
        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *args):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


def chat(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def planner_of(server, waits=None, **options):
    waits = [] if waits is None else waits
    return OpenAICompatiblePlanner(
        server.url, "tiny", session=httpx.Client(trust_env=False), sleep=waits.append, **{"timeout": 2.0, **options}
    )


def test_a_server_that_answers_well_and_is_remembered(tmp_path):
    cache = tmp_path / "answers" / "cache.jsonl"
    with Server([json.dumps(SPLIT), json.dumps(LATENT)]) as server:
        plan = planner_of(server, cache=cache).plan("a tea cup of iced coke")
        assert [path for path, _, _ in server.asked] == ["/v1/chat/completions"] * 2
        assert server.asked[0][1]["model"] == "tiny"
    assert (plan.first.name, plan.second.describe, plan.latent) == ("a tea cup", "Dark.", "glass cup")
    offline = OpenAICompatiblePlanner(
        "http://127.0.0.1:9/v1", "tiny", cache=cache, session=httpx.Client(trust_env=False)
    )
    assert offline.plan("a tea cup of iced coke") == plan
    other = OpenAICompatiblePlanner("http://127.0.0.1:9/v1", "big", cache=cache, session=httpx.Client(trust_env=False))
    with pytest.raises(PlannerError, match="cannot be reached"):
        other.plan("a tea cup of iced coke")


def test_a_half_written_cache_is_passed_over(tmp_path, caplog):
    cache = tmp_path / "cache.jsonl"
    with Server([json.dumps(SPLIT), json.dumps(LATENT), json.dumps(LATENT)]) as server:
        planner_of(server, cache=cache).plan("a tea cup of iced coke")
        text = cache.read_text()
        cache.write_text(text[: len(text) - 20])
        with caplog.at_level(logging.WARNING):
            plan = planner_of(server, cache=cache).plan("a tea cup of iced coke")
        assert planner_of(server, cache=cache).plan("a tea cup of iced coke") == plan  # mended: nothing is asked
        assert len(server.asked) == 3
    assert plan.latent == "glass cup"
    assert "line 2 is no answer" in caplog.text


def test_fenced_and_wrapped_answers():
    with Server(
        [f"Sure!\n```json\n{json.dumps(SPLIT)}\n```\nDone.", f"Here: {json.dumps(LATENT)} as asked."]
    ) as server:
        assert planner_of(server).plan("x of y").latent == "glass cup"
    with pytest.raises(ValueError, match="no JSON object"):
        extract_json("none at all")


def test_wrong_answers_are_told_and_tried_again():
    broken = '{"first_prompt": "a tea cup", '
    with Server([broken, json.dumps({**SPLIT, "second_prompt": ""}), json.dumps(SPLIT), json.dumps(LATENT)]) as server:
        plan = planner_of(server).plan("x of y")
        told = server.asked[2][1]["messages"]
    assert plan.first.name == "a tea cup"
    assert "the JSON is broken" in told[2]["content"]
    assert '"second_prompt" must be a text' in told[4]["content"]


def test_answers_that_stay_wrong_end_with_the_raw_text():
    with Server(["I would rather not."] * 3) as server:
        with pytest.raises(PlannerError, match=r"no usable answer for 'split' in 3 tries.*I would rather not") as error:
            planner_of(server, max_retries=2).plan("x of y")
    assert error.value.raw == "I would rather not."
    assert "\n" not in str(error.value)


def test_busy_and_broken_servers_are_asked_again():
    waits = []
    with Server(
        [(429, "slow down", {"Retry-After": "7"}), (500, "oops", {}), json.dumps(SPLIT), json.dumps(LATENT)]
    ) as server:
        assert planner_of(server, waits).plan("x of y").latent == "glass cup"
    assert waits == [7.0, 1.0]
    with (
        Server([(500, "oops <html>", {})] * 2) as server,
        pytest.raises(PlannerError, match=r"failed 2 times.*status 500: oops"),
    ):
        planner_of(server, max_retries=1).plan("x of y")


def test_refusals_are_not_asked_again():
    with Server([(401, "who are you", {})]) as server, pytest.raises(PlannerError, match="status 401: who are you"):
        planner_of(server).plan("x of y")
    with Server([(200, "<html>", {})]) as server, pytest.raises(PlannerError, match="no chat completion: '<html>'"):
        planner_of(server).plan("x of y")


def test_a_slow_server_times_out():
    with (
        Server(["slow"]) as server,
        pytest.raises(PlannerError, match=r"failed 1 times, at last with no answer within 0.2 s"),
    ):
        planner_of(server, timeout=0.2, max_retries=0).plan("x of y")


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TINY_KEY", "sk-secret-123")
    cache = tmp_path / "cache.jsonl"
    with caplog.at_level(logging.DEBUG):
        with Server([json.dumps(SPLIT), json.dumps(LATENT), (403, "bad key sk-secret-123", {})]) as server:
            planner = planner_of(server, cache=cache, api_key_env="TINY_KEY")
            planner.plan("x of y")
            with pytest.raises(PlannerError) as error:
                planner.plan("another of these")
            assert server.asked[0][2] == "Bearer sk-secret-123"
    for text in (repr(planner), str(vars(planner)), caplog.text, cache.read_text(), str(error.value), error.value.raw):
        assert "sk-secret" not in text


def test_the_other_roles():
    pairs = {"pairs": [{"a": "tea cup", "b": "beer", "prompt": "a tea cup of beer"}] * 3}
    answers = [
        pairs,
        {"patterns": ["hats on fish"]},
        {"pattern": "wet hats"},
        {"scenes": list("abcde")},
        {"describe": "Round."},
    ]
    with Server([json.dumps(a) for a in answers]) as server:
        planner = planner_of(server)
        assert isinstance(planner, ConceptPlanner)
        found = planner.propose_pairs("wrong cup", 2, positives=[ConceptPair("a", "b")])
        assert found == [ConceptPair("tea cup", "beer", "a tea cup of beer", "wrong cup")] * 2
        assert "a / b" in server.asked[0][1]["messages"][0]["content"]
        assert planner.propose_patterns(["wrong cup"], 1) == ["hats on fish"]
        assert planner.blend_patterns("one", "two") == "wet hats"
        assert planner.scenes(found[0]) == list("abcde")
        assert planner.describe("plate", "soup").describe == "Round."
    with Server([json.dumps({"scenes": ["one"]})]) as server, pytest.raises(PlannerError, match="list of 5 or more"):
        planner_of(server, max_retries=0).scenes(found[0])


def test_a_description_that_mentions_the_other_concept_is_sent_back():
    wrong = {**SPLIT, "first_describe": "A cup for an Iced Coke."}
    with Server([json.dumps(a) for a in (wrong, SPLIT, LATENT, {"describe": "A plate of soup."})]) as server:
        assert planner_of(server).plan("a tea cup of iced coke").first.describe == "A cup."
        assert "must not mention" in server.asked[1][1]["messages"][-1]["content"]
        with pytest.raises(PlannerError, match='must not mention "soup"'):
            planner_of(server, max_retries=0).describe("plate", "soup")


def test_a_remembered_answer_that_was_spoilt_is_asked_for_again(tmp_path, caplog):
    cache = tmp_path / "cache.jsonl"
    with Server([json.dumps({"describe": "Round."})] * 3) as server:
        planner_of(server, cache=cache).describe("plate", "soup")
        record = json.loads(cache.read_text())
        for spoilt in ({"describe": 3}, "Round."):
            cache.write_text(json.dumps({**record, "answer": spoilt}) + "\n")
            assert planner_of(server, cache=cache).describe("plate", "soup").describe == "Round."
    assert "asked for again" in caplog.text


def test_json_mode_is_asked_for():
    with Server([json.dumps({"describe": "Round."})]) as server:
        planner_of(server, json_mode=True).describe("plate", "soup")
        assert server.asked[0][1]["response_format"] == {"type": "json_object"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, chat_tokenizer):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_chat_model_runs_and_fails_cleanly(chat_model, tmp_path):
    planner = TransformersPlanner(chat_model, max_new_tokens=5, max_retries=1, cache=tmp_path / "cache.jsonl")
    with pytest.raises(PlannerError, match="no usable answer for 'split' in 2 tries"):
        planner.plan("a tea cup of iced coke")
    assert not (tmp_path / "cache.jsonl").exists()
    messages = [{"role": "user", "content": "a tea cup"}]
    assert planner.complete(messages) == planner.complete(messages)


def test_a_local_model_that_is_none(tmp_path, chat_tokenizer):
    with pytest.raises(ValueError, match="does not exist"):
        TransformersPlanner(tmp_path / "missing")
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PlannerError, match="no chat template"):
        TransformersPlanner(object(), tokenizer=tokenizer)


def test_a_file_of_plans(tmp_path):
    path = LCMisDataset([RulePlanner().plan("a tea cup of iced coke")]).to_json(tmp_path / "plans.json")
    planner = FilePlanner(path)
    assert planner.plan("The tea cup of Iced Coke").first.name == "a tea cup"
    with pytest.raises(PlannerError, match="no plan for 'a plate of tea'"):
        planner.plan("a plate of tea")
    pair = planner.propose_pairs("any", 3)[0]
    assert planner.propose_pairs("any", 3, positives=[pair]) == []
