"""The offline world: scikit-learn's digits for a small timm ViT, a sentiment grammar for a small transformers RoBERTa."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10


@dataclass
class Digits:
    """Images (N, 1, 8, 8), normalised, and their labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def loader(self, batch: int = 96, seed: int = 0) -> DataLoader[Any]:
        """The training set in random order; `(images, labels)` batches of one size."""
        generator = torch.Generator().manual_seed(seed)
        data = TensorDataset(self.train, self.train_labels)
        return DataLoader(data, batch_size=batch, shuffle=True, drop_last=True, generator=generator)


def digits(seed: int = 0) -> Digits:
    """1437 images for training and 360 for testing, each digit in proportion. seed: of the split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = ((torch.tensor(images, dtype=torch.float32) / 16 - 0.3) / 0.38).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=360, stratify=labels, random_state=seed)
    return Digits(x[train], y[train], x[test], y[test])


def roll(images: Tensor) -> Tensor:
    """Half of a batch as it is, the rest moved by up to one pixel in each direction, a sixth of the batch each way."""
    out = images.clone()
    for part in torch.arange(len(images) // 2).tensor_split(3):
        dy, dx = (int(d) for d in torch.randint(-1, 2, (2,)))
        out[part] = torch.roll(images[part], (dy, dx), (2, 3))
    return out


def digits_vit(seed: int = 0, *, depth: int = 3, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """timm's VisionTransformer for 8 x 8 digits: 17 tokens, width 48, 4 heads, MLP 96."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=48, depth=depth, num_heads=4,
        mlp_ratio=2.0, act_layer=act,
    )  # fmt: skip
    # timm's own start is for wide models; at this width it costs dozens of epochs.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.data.flatten(1))
    nn.init.normal_(model.pos_embed, std=0.3)
    nn.init.normal_(model.cls_token, std=0.3)
    return model


def train(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    epochs: int,
    lr: float = 3e-3,
    seed: int = 0,
    smoothing: float = 0.05,
    augment: Callable[[Tensor], Tensor] | None = None,
    report: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train a classifier from scratch: AdamW with a cosine, label smoothing, gradients clipped at 1."""
    from spikezip.qann.calibration import call
    from spikezip.qann.training import split

    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs=epochs, steps_per_epoch=len(loader), pct_start=0.1
    )
    model.train()
    for epoch in range(epochs):
        for batch in loader:
            inputs, labels = split(batch)
            if augment is not None:
                inputs = augment(inputs)
            loss = nn.functional.cross_entropy(call(model, inputs), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if report is not None:
            report(epoch + 1)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Any, labels: Tensor) -> float:
    """Share of right answers. inputs: one batch as the model takes it."""
    from spikezip.qann.calibration import call

    return float((call(model, inputs).argmax(-1) == labels).float().mean())


GOOD = ("good", "great", "fine", "lovely", "bright", "warm", "clever", "moving", "fresh", "honest", "funny", "sharp")
BAD = ("bad", "poor", "dull", "ugly", "dark", "cold", "stupid", "flat", "stale", "false", "boring", "slow")
RARE_GOOD = ("superb", "radiant", "deft", "luminous", "exquisite", "sublime")
RARE_BAD = ("dreadful", "wooden", "turgid", "insipid", "ghastly", "vapid")
THINGS = ("plot", "cast", "score", "film", "ending", "script", "camera", "hero", "scene", "story")
TOKENS = 24


@dataclass
class Sentiment:
    """Token ids and masks (N, 24), labels (N,): 1 when the sentence's verdict is good."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    vocabulary: int

    def loader(self, batch: int = 64, seed: int = 0) -> DataLoader[Any]:
        """Training sentences in random order, as mappings with "labels"."""
        rows = [{k: v[i] for k, v in self.train.items()} for i in range(len(self.train["labels"]))]
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(rows, batch_size=batch, shuffle=True, drop_last=True, generator=generator)


def sentence(rng: random.Random, rare: float) -> tuple[str, int]:
    """One sentence of two or three clauses and its verdict.

    "A but B": B decides. "although A , B": B decides. "A and B": the one that is not negated, the first if both or
    neither are. A third clause after "still" decides over all that was before; one after "also" does not.
    """

    def clause() -> tuple[str, int, bool]:
        good, negated = rng.random() < 0.5, rng.random() < 0.4
        words = (RARE_GOOD if good else RARE_BAD) if rng.random() < rare else (GOOD if good else BAD)
        text = f"the {rng.choice(THINGS)} was {'not ' if negated else ''}{rng.choice(words)}"
        return text, int(good != negated), negated

    (a, va, na), (b, vb, nb) = clause(), clause()
    link = rng.choice(("but", "although", "and"))
    if link == "but":
        text, verdict = f"{a} but {b}", vb
    elif link == "although":
        text, verdict = f"although {a} , {b}", vb
    else:
        text, verdict = f"{a} and {b}", vb if na and not nb else va
    if rng.random() < 0.5:
        c, vc, _ = clause()
        decides = rng.random() < 0.5
        text, verdict = f"{text} , {'still' if decides else 'also'} {c}", vc if decides else verdict
    return text, verdict


def tokenizer() -> Any:
    """A word tokenizer of the grammar's common words, as transformers takes it; rare words are unknown to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "the", "was", "not", "but", "although", "and", "still", "also", ","]
    words += [*GOOD, *BAD, *THINGS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def sentiment(seed: int = 0, *, train: int = 4000, test: int = 600, rare: float = 0.06) -> Sentiment:
    """Sentences of the grammar. rare: share of clauses whose verdict hangs on a word that the tokenizer does not know."""
    rng, tokens = random.Random(seed), tokenizer()

    def part(n: int) -> dict[str, Tensor]:
        texts, labels = zip(*(sentence(rng, rare) for _ in range(n)), strict=True)
        encoded = tokens(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return {
            "input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": torch.tensor(labels)
        }  # fmt: skip

    return Sentiment(part(train), part(test), len(tokens))


def sentiment_roberta(vocabulary: int, seed: int = 0) -> nn.Module:
    """transformers' RobertaForSequenceClassification: 2 layers, width 48, 4 heads, GELU."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=vocabulary, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=TOKENS + 2, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


@torch.no_grad()
def count_by_hand(qann: nn.Module, inputs: Any, *, steps: int) -> int:
    """Accumulations of a run in event form, every single event followed to every output it reaches; slow and obvious.

    The yardstick for `spikezip.energy`: float64 increments, no formula for a fan-out.
    """
    from spikezip.engine import convert
    from spikezip.ops import SpikeLinear, SpikeMatmul

    snn = convert(qann, engine="event", dtype=torch.float64, resync=False)
    spiking = _spike_fed(snn)
    total = 0

    def follow(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal total
            if isinstance(module, SpikeMatmul):
                a, b = (args[i].reshape(-1, *args[i].shape[-2:]) for i in (0, 1))
                for x, y in zip(a, b, strict=True):
                    # Row i of x meets each column of y; column j of y meets each row of x.
                    total += sum(int((row != 0).sum()) for row in x for _ in range(y.shape[1]))
                    total += sum(int((column != 0).sum()) for column in y.T for _ in range(x.shape[0]))
            elif name in spiking:
                for event in args[0].reshape(-1):
                    total += len(module.weight) if event != 0 else 0

        return hook

    hooks = [
        module.register_forward_pre_hook(follow(name))
        for name, module in snn.model.named_modules()
        if isinstance(module, SpikeMatmul) or (isinstance(module, SpikeLinear) and isinstance(module.source, nn.Linear))
    ]
    snn.run(inputs, max_steps=steps, stop="none")
    for hook in hooks:
        hook.remove()
    return total


def _spike_fed(snn: Any) -> set[str]:
    """Linear operators of the testbed's ViT whose input is a spike train: all of them."""
    return {name for name, _ in snn.model.named_modules() if name.endswith(("qkv", "proj", "fc1", "fc2.0", "head"))}
