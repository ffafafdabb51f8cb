"""The offline world: questions about four tables, the SQL that answers them, and small Llamas that translate.

An answer is right when it is a query that gives, executed in sqlite on a generated database, what the reference query gives.
Whether a question belongs to the test or the training split is a function of its text, so no test question is ever
trained on; and each test question has an answer, since where the reference finds nothing many wrong queries find it too.

The target and the consistency-trained model of seed 0 come with the package (`assets/`, float16);
`python -m cllm_jacobi.testbed` trains both anew from nothing in about five minutes of one core.
"""

import random
import sqlite3
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tenfold_shared.errors import UserError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
BLOCK = 16
MAX_NEW_TOKENS = 32
ROWS = 400
NUMBERS = range(10, 100)
TARGET_STEPS, TARGET_BATCH, PROMPTS, CONSISTENCY_STEPS = 1500, 32, 10000, 1250
AR_WEIGHT = 20.0
"""Of the autoregressive loss in consistency training. The published code's 10 costs this testbed a hundredth of its answers."""

TABLES: dict[str, dict[str, Any]] = {
    "staff": {
        "words": ("employees", "workers"),
        "text": {
            "city": ("paris", "berlin", "oslo", "madrid", "rome", "vienna"),
            "team": ("sales", "legal", "design", "research", "support"),
        },
        "number": {"salary": ("salary", "pay"), "age": ("age", "years"), "score": ("score", "mark")},
    },
    "goods": {
        "words": ("products", "items"),
        "text": {
            "color": ("red", "blue", "green", "black", "white", "yellow"),
            "kind": ("tool", "toy", "lamp", "chair", "bag"),
        },
        "number": {"price": ("price", "cost"), "stock": ("stock", "supply"), "weight": ("weight", "mass")},
    },
    "trips": {
        "words": ("flights", "journeys"),
        "text": {
            "origin": ("lima", "cairo", "delhi", "tokyo", "accra", "quito"),
            "carrier": ("delta", "swiss", "qantas", "iberia", "finnair"),
        },
        "number": {"seats": ("seats", "places"), "delay": ("delay", "lateness"), "fare": ("fare", "ticket")},
    },
    "books": {
        "words": ("books", "titles"),
        "text": {
            "genre": ("crime", "poetry", "drama", "travel", "comics", "history"),
            "tongue": ("english", "french", "german", "spanish", "hindi"),
        },
        "number": {"pages": ("pages", "sheets"), "copies": ("copies", "prints"), "stars": ("stars", "rating")},
    },
}
COMPARE = {">": ("above", "over", "beyond"), "<": ("below", "under", "less-than"), "=": ("exactly", "of")}
AGGREGATE = {
    "AVG": ("average", "mean"),
    "MAX": ("largest", "highest"),
    "MIN": ("smallest", "lowest"),
    "SUM": ("total", "summed"),
}
FRAME = [
    "how",
    "many",
    "are",
    "there",
    "show",
    "list",
    "the",
    "of",
    "all",
    "with",
    "where",
    "and",
    "or",
    "in",
    "is",
    "what",
    "give",
    "me",
    "per",
    "for",
    "each",
    "top",
    "ranked",
    "by",
    "first",
    "that",
    "have",
    "more",
    "than",
    "groups",
    "number",
    "please",
    "tell",
    "find",
]
SQL = [
    "SELECT",
    "FROM",
    "WHERE",
    "AND",
    "OR",
    "COUNT",
    "(",
    "*",
    ")",
    "GROUP",
    "BY",
    "HAVING",
    "ORDER",
    "DESC",
    "ASC",
    "LIMIT",
    ",",
]
VALUES = frozenset(v for t in TABLES.values() for values in t["text"].values() for v in values)


def vocabulary() -> list[str]:
    """Every word of the world, special ones first."""
    words = ["<pad>", "<eos>", "<sql>", "<unk>", *SQL, *COMPARE, *AGGREGATE, *FRAME, *map(str, NUMBERS)]
    words += [str(n) for n in range(1, 10)]
    for table, parts in TABLES.items():
        words += [table, *parts["words"], *parts["text"], *(v for vs in parts["text"].values() for v in vs)]
        words += [w for column, names in parts["number"].items() for w in (column, *names)]
    words += [w for names in (*COMPARE.values(), *AGGREGATE.values()) for w in names]
    return list(dict.fromkeys(words))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        additional_special_tokens=["<sql>"],
        clean_up_tokenization_spaces=False,
    )


def _pair(rng: random.Random) -> tuple[str, str]:
    """One question and its query."""
    table = rng.choice(list(TABLES))
    parts = TABLES[table]
    noun = rng.choice(parts["words"])
    text, number = parts["text"], parts["number"]

    def conditions(least: int, most: int) -> tuple[list[str], list[str]]:
        asked: list[str] = []
        query: list[str] = []
        for i, column in enumerate(rng.sample([*text, *number], rng.randint(least, most))):
            if i:
                joint = rng.choice(("and", "or"))
                asked.append(joint)
                query.append(joint.upper())
            if column in text:
                value = rng.choice(text[column])
                asked += rng.choice(([column, value], ["in", value], [column, "is", value]))
                query += [column, "=", value]
            else:
                sign = rng.choice(list(COMPARE))
                value = str(rng.choice(NUMBERS))
                asked += [rng.choice(number[column]), rng.choice(COMPARE[sign]), value]
                query += [column, sign, value]
        return asked, query

    form = rng.choice(("count", "list", "aggregate", "top", "group"))
    column, key = rng.choice(list(number)), rng.choice(list(text))
    word = rng.choice(number[column])
    function = rng.choice(list(AGGREGATE))
    called = rng.choice(AGGREGATE[function])
    if form == "count":
        asked, query = conditions(2, 3)
        start = rng.choice((["how", "many", noun, "are", "there"], ["give", "me", "the", "number", "of", noun]))
        return " ".join([*start, "with", *asked]), " ".join(["SELECT COUNT ( * ) FROM", table, "WHERE", *query])
    if form == "list":
        asked, query = conditions(2, 3)
        start = [rng.choice(("show", "list", "find")), "the", key, "and", word, "of", "all", noun, "where"]
        return " ".join([*start, *asked]), " ".join(["SELECT", key, ",", column, "FROM", table, "WHERE", *query])
    if form == "aggregate":
        asked, query = conditions(2, 3)
        start = rng.choice((["what", "is", "the"], ["tell", "me", "the"]))
        sql = ["SELECT", function, "(", column, ") FROM", table, "WHERE", *query]
        return " ".join([*start, called, word, "of", noun, "with", *asked]), " ".join(sql)
    if form == "top":
        asked, query = conditions(1, 3)
        count, order = str(rng.randint(1, 9)), rng.choice(("DESC", "ASC"))
        start = ["show", "the", key, "of", "the", "top" if order == "DESC" else "first", count]
        sql = ["SELECT", key, "FROM", table, "WHERE", *query, "ORDER BY", column, order, "LIMIT", count]
        return " ".join([*start, noun, "ranked", "by", word, "with", *asked]), " ".join(sql)
    asked, query = conditions(1, 2)
    floor = str(rng.randint(10, 40))
    start = ["list", "the", called, word, "of", noun, "with", *asked, "for", "each", key]
    sql = ["SELECT", key, ",", function, "(", column, ") FROM", table, "WHERE", *query, "GROUP BY", key]
    if rng.random() < 0.5:
        start += ["groups", "that", "have", "more", "than", floor]
        sql += ["HAVING COUNT ( * ) >", floor]
    return " ".join(start), " ".join(sql)


def in_test_split(question: str) -> bool:
    """A fifth of all questions, by their text alone."""
    return zlib.crc32(question.encode()) % 5 == 0


def questions(count: int, *, split: str = "train", seed: int = 0, distinct: bool = True) -> list[tuple[str, str]]:
    """`count` pairs of a question and its query. split: "train" or "test", disjoint by construction.

    The query of a test question finds something: rows, and not only NULL or a count of zero.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is '{split}', expected train or test")
    judge = Database() if split == "test" else None
    # A string seeds the same stream in every process, unlike hash().
    rng = random.Random(f"{split}-{seed}")
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(found) < count:
        pair = _pair(rng)
        if in_test_split(pair[0]) != (split == "test") or (distinct and pair[0] in seen):
            continue
        if judge is not None and not judge.finds(pair[1]):
            continue
        seen.add(pair[0])
        found.append(pair)
    return found


def prompt(question: str) -> str:
    """What the model reads: the question and the word that asks for SQL."""
    return f"{question} <sql>"


class Database:
    """Four tables of 400 rows in memory; the judge of execution accuracy."""

    def __init__(self, *, seed: int = 0) -> None:
        rng = random.Random(f"database-{seed}")
        self.connection = sqlite3.connect(":memory:")
        for table, parts in TABLES.items():
            names = [*parts["text"], *parts["number"]]
            self.connection.execute(f"CREATE TABLE {table} ({', '.join(names)})")
            rows = [
                [rng.choice(values) for values in parts["text"].values()]
                + [rng.choice(NUMBERS) for _ in parts["number"]]
                for _ in range(ROWS)
            ]
            self.connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", rows)
        # What a model writes is only ever read with.
        self.connection.execute("PRAGMA query_only = ON")

    def run(self, query: str) -> list[tuple[Any, ...]] | None:
        """Rows of the answer, or None for what is no query. Text values get their quotes here."""
        quoted = " ".join(f"'{word}'" if word in VALUES else word for word in query.split())
        try:
            cursor = self.connection.execute(quoted)
            # Only a query has columns: sqlite runs empty text too, and gives no rows.
            return cursor.fetchall() if cursor.description else None
        except sqlite3.Error:
            return None

    def finds(self, query: str) -> bool:
        """Whether it gives any value but NULL and 0."""
        return any(value for row in self.run(query) or () for value in row)

    def same(self, query: str, reference: str) -> bool:
        """Whether both give the same rows, in order where the reference asks for an order."""
        got, expected = self.run(query), self.run(reference)
        if got is None or expected is None:
            return False
        return got == expected if "ORDER BY" in reference else Counter(got) == Counter(expected)


def accuracy(
    answers: Sequence[str], pairs: Sequence[tuple[str, str]], *, database: Database | None = None
) -> list[bool]:
    """Which answers are right by execution, one for each pair."""
    judge = database or Database()
    return [judge.same(answer, query) for answer, (_, query) in zip(answers, pairs, strict=True)]


def untrained(*, seed: int = 0, layers: int = 3) -> LlamaForCausalLM:
    """A fresh Llama of the testbed's shape, about 0.4 million parameters with three layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(vocabulary()),
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=layers,
            # With three heads of 32 a model of this width learns late which number belongs to which column.
            num_attention_heads=4,
            head_dim=32,
            max_position_embeddings=256,
            # The usual 0.02 is made for widths of thousands; at this one models learn late to copy words.
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval()


def _batch(pairs: Sequence[tuple[str, str]], words: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tokens) ids and labels, right-padded; only the answer is a label."""
    rows = []
    for question, query in pairs:
        ask = [words[w] for w in prompt(question).split()]
        rows.append((ask, [words[w] for w in query.split()] + [1]))
    longest = max(len(a) + len(b) for a, b in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (ask, answer) in enumerate(rows):
        ids[i, : len(ask) + len(answer)] = torch.tensor(ask + answer)
        labels[i, len(ask) : len(ask) + len(answer)] = torch.tensor(answer)
    return ids, labels


def _batches(stream: Sequence[tuple[str, str]], batch: int, rng: random.Random) -> Iterator[Sequence[tuple[str, str]]]:
    """Batches of like lengths: eight at a time are drawn, sorted and shuffled, so that a quarter less is padding."""

    def length(pair: tuple[str, str]) -> int:
        return sum(len(part.split()) for part in pair)

    for start in range(0, len(stream), 8 * batch):
        drawn = sorted(stream[start : start + 8 * batch], key=length)
        found = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
        rng.shuffle(found)
        yield from found


def train_target(
    *,
    seed: int = 0,
    steps: int = TARGET_STEPS,
    layers: int = 3,
    batch: int = TARGET_BATCH,
    learning_rate: float = 4e-3,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> LlamaForCausalLM:
    """Train the target from nothing on fresh training questions, batches of like lengths: AdamW, 60 warm-up steps, linear decay."""
    model = untrained(seed=seed, layers=layers).train()
    words = {word: i for i, word in enumerate(vocabulary())}
    stream = questions(steps * batch, seed=1000 + seed, distinct=False)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 60, 0.05 + 0.95 * (1 - step / steps))
    )
    for step, pairs in enumerate(_batches(stream, batch, random.Random(seed))):
        ids, labels = _batch(pairs, words)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)
    return model.eval()


def collect(
    model: LlamaForCausalLM, asked: Sequence[str], *, seed: int = 0, block_size: int = BLOCK, batch: int = 250
) -> Any:
    """Trajectories of a model on the given questions."""
    from cllm_jacobi.trajectory import collect_trajectories

    return collect_trajectories(
        model,
        tokenizer(),
        [prompt(q) for q in asked],
        block_size=block_size,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch,
        seed=seed,
    )


def gather(
    target: LlamaForCausalLM, count: int = PROMPTS, *, seed: int = 0, block_size: int = BLOCK, batch: int = 250
) -> Any:
    """Trajectories of the target on `count` training questions."""
    asked = [question for question, _ in questions(count, seed=2000 + seed)]
    return collect(target, asked, seed=seed, block_size=block_size, batch=batch)


def make_consistent(
    target: LlamaForCausalLM,
    trajectories: Any,
    *,
    seed: int = 0,
    steps: int = CONSISTENCY_STEPS,
    learning_rate: float = 2e-3,
    batch: int = 16,
    output: str | Path | None = None,
    lora_r: int = 0,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> LlamaForCausalLM:
    """Consistency training of a copy of the target: AdamW, 3 % warm-up, cosine. settings: fields of `ConsistencyConfig`."""
    import copy
    import tempfile

    from cllm_jacobi.trainer import ConsistencyConfig, ConsistencyTrainer

    peft_config = None
    if lora_r:
        from peft import LoraConfig

        peft_config = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "max_steps": steps,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(int(0.03 * steps), 1),
            "weight_decay": 0.0,
            "save_strategy": "no",
            "logging_steps": max(steps // 8, 1),
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": seed,
            "block_size": BLOCK,
            "ar_weight": AR_WEIGHT,
            **settings,
        }
        arguments = ConsistencyConfig(output_dir=str(output or scratch), **settings)
        trainer = ConsistencyTrainer(
            copy.deepcopy(target),
            arguments,
            train_dataset=trajectories,
            processing_class=tokenizer(),
            peft_config=peft_config,
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
    model = trainer.model.merge_and_unload() if lora_r else trainer.model
    return model.eval()


def answer(
    model: LlamaForCausalLM, pairs: Sequence[tuple[str, str]], *, batch: int = 100, **settings: Any
) -> tuple[list[str], torch.Tensor]:
    """Greedy answers as text, and the tokens per forward of each; settings: fields of `JacobiConfig`."""
    from cllm_jacobi.jacobi import jacobi_generate

    words = tokenizer()
    texts: list[str] = []
    speeds: list[torch.Tensor] = []
    for start in range(0, len(pairs), batch):
        asked = words(
            [prompt(q) for q, _ in pairs[start : start + batch]],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        out = jacobi_generate(
            model,
            **asked,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            **{"block_size": BLOCK, **settings},
        )
        texts += words.batch_decode(out.sequences[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        speeds.append(out.tokens_per_forward)
    return texts, torch.cat(speeds)


def save(model: LlamaForCausalLM, folder: str | Path) -> Path:
    """Write a model with the testbed's tokenizer, as `from_pretrained` and vLLM read it."""
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(kind: str, folder: Path = ASSETS, *, layers: int = 3) -> LlamaForCausalLM:
    """The "target" or the "consistent" model of seed 0 that comes with the package, or another stored one, in float32.

    Raises UserError when its file is not there, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, mend = folder / f"{kind}.safetensors", "python -m cllm_jacobi.testbed trains target and consistent"
    if not file.exists():
        raise UserError(f"the testbed has no model '{kind}'", hint=mend)
    model = untrained(layers=layers)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()}, strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"'{file}' does not hold weights of the testbed's model", hint=mend) from error
    model.tie_weights()
    return model


def store(model: LlamaForCausalLM, kind: str, folder: Path = ASSETS) -> None:
    """Write weights as `load` reads them: float16, the tied head left out."""
    from safetensors.torch import save_file
    from tenfold_shared.hub import replace_atomically

    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    with replace_atomically(folder / f"{kind}.safetensors") as partial:
        save_file(state, partial)


def rebuild(
    folder: Path = ASSETS,
    *,
    steps: int = TARGET_STEPS,
    prompts: int = PROMPTS,
    consistency_steps: int = CONSISTENCY_STEPS,
) -> None:
    """Train the target and the consistency model of seed 0 from nothing and store both."""
    store(train_target(steps=steps), "target", folder)
    target = load("target", folder)
    store(make_consistent(target, gather(target, prompts), steps=consistency_steps), "consistent", folder)


if __name__ == "__main__":
    # As the benchmark trains them; more threads sum in another order.
    torch.set_num_threads(1)
    rebuild(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
