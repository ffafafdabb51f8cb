"""Scorers: CLIPScore against torchmetrics, the score of a concept, calibration, and answers that are none."""

import numpy as np
import pytest
import torch
from lcmis_align import (
    CalibratedScorer,
    CallableScorer,
    CLIPScorer,
    Concept,
    ImageRewardScorer,
    Scorer,
    ScorerError,
    VQAScorer,
)
from lcmis_align.scorers import checked, concept_scores
from lcmis_align.worlds.parts import word_tokenizer
from PIL import Image
from tenfold_shared.errors import UserError
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]


TEXTS = ["a tea cup", "iced coke", "A small ceramic cup with a handle."]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in the on-disk format of openai/clip-vit-base-patch32."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {
        t: i for i, t in enumerate([*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[])
    torch.manual_seed(0)
    text = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 77, "eos_token_id": vocabulary["<|endoftext|>"],
            "bos_token_id": vocabulary["<|startoftext|>"], "pad_token_id": vocabulary["<|endoftext|>"]}  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


class Tensors(torch.nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics expects of every transformers version."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *args, **kwargs):
        output = self.model.get_image_features(*args, **kwargs)
        return output if torch.is_tensor(output) else output.pooler_output

    def get_text_features(self, *args, **kwargs):
        output = self.model.get_text_features(*args, **kwargs)
        return output if torch.is_tensor(output) else output.pooler_output


def test_clip_score_is_torchmetrics(clip_folder, images):
    from torchmetrics.multimodal import CLIPScore

    ours = CLIPScorer.from_pretrained(clip_folder, prefix="")
    theirs = CLIPScore(model_name_or_path=lambda: (Tensors(parts(clip_folder)[0]), parts(clip_folder)[1]))
    scores = ours.score(images, TEXTS)
    assert scores.shape == (4, 3)
    for i, image in enumerate(images):
        for j, text in enumerate(TEXTS):
            theirs.reset()
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
            theirs.update([pixels], [text])
            assert abs(float(scores[i, j]) / 2.5 - float(theirs.compute()) / 100) < 1e-5


def test_clip_scorer_prefix_batches_and_memory(clip_folder, images):
    scorer = CLIPScorer.from_pretrained(clip_folder)
    assert isinstance(scorer, Scorer)
    plain = CLIPScorer(*parts(clip_folder), prefix="", batch_size=3)
    torch.testing.assert_close(
        scorer.score(images, TEXTS), plain.score(images, [f"A photo depicts {t}" for t in TEXTS])
    )
    assert set(scorer._known) == set(TEXTS)
    texts = []
    handle = plain_text_model(scorer, texts)
    scorer.score(images, TEXTS)
    handle.remove()
    assert not texts
    assert bool((scorer.score(images, TEXTS) >= 0).all())


def parts(folder):
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


def plain_text_model(scorer, seen):
    model = scorer._embed_texts.__closure__[0].cell_contents
    model = model if isinstance(model, CLIPModel) else scorer._embed_texts.__closure__[1].cell_contents
    return model.text_model.register_forward_pre_hook(lambda module, args: seen.append(1))


def test_open_clip(images):
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(16, {"layers": 1, "width": 32, "patch_size": 8, "image_size": 32, "head_width": 16},
                           {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}).eval()  # fmt: skip
    preprocess = open_clip.image_transform(32, is_train=False)
    scorer = CLIPScorer.from_open_clip(model, preprocess, open_clip.tokenize, prefix="")
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(im) for im in images]), normalize=True)
        text = model.encode_text(open_clip.tokenize(TEXTS), normalize=True)
    torch.testing.assert_close(scorer.score(images, TEXTS), 2.5 * (image @ text.T).clamp(min=0))


def test_no_model_where_one_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        CLIPScorer.from_pretrained(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        VQAScorer.from_pretrained(tmp_path / "empty")


def test_the_higher_mean_counts_and_not_the_mean_of_the_higher():
    table = {"A": [1.0, 0.0, 0.0], "a long A": [0.0, 0.6, 0.6], "B": [0.3, 0.3, 0.3]}
    scorer = CallableScorer(lambda images, texts: np.array([table[t] for t in texts]).T)
    scores = concept_scores(scorer, [None] * 3, [Concept("A", "a long A"), Concept("B")])
    assert scores[:, 0].tolist() == pytest.approx([0.0, 0.6, 0.6])  # its mean is .4; image by image it would be .73
    assert scores[:, 1].tolist() == pytest.approx([0.3] * 3)


def test_zscore_and_rank_by_hand(images):
    values = {id(im): v for im, v in zip(images, [1.0, 2.0, 3.0, 2.0], strict=True)}
    scorer = CallableScorer(
        lambda given, texts: [[values[id(im)] + (10 if t == "b" else 0) for t in texts] for im in given]
    )
    z = CalibratedScorer(scorer, images[:3]).score(images, ["a", "b"])
    assert z.tolist() == [pytest.approx([v, v]) for v in (-1, 0, 1, 0)]  # both texts are on one scale now
    rank = CalibratedScorer(scorer, images[:3], method="rank").score(images, ["a", "b"])
    assert rank[:, 1].tolist() == pytest.approx([1 / 6, 0.5, 5 / 6, 0.5])
    with pytest.raises(UserError, match="normalise is 'x'"):
        CalibratedScorer(scorer, images, method="x")
    with pytest.raises(UserError, match="1 reference images"):
        CalibratedScorer(scorer, images[:1])


def test_an_image_reward_model(images):
    class Reward:
        def score(self, prompt, image):
            return len(prompt) + image.size[0]

    assert ImageRewardScorer(Reward()).score(images[:2], ["ab", "abc"]).tolist() == [[34.0, 35.0]] * 2
    with pytest.raises(ScorerError, match="object has no score"):
        ImageRewardScorer(object())


@pytest.mark.parametrize(("answer", "message"), [
    (torch.zeros(3, 2), r"shape \(3, 2\), expected \(4, 2\)"),
    (torch.zeros(4), r"shape \(4,\), expected"),
    (torch.full((4, 2), float("nan")), "nan for image 0 and text 'x'"),
    (torch.tensor([[1.0, 2.0]] * 3 + [[1.0, float("inf")]]), "inf for image 3 and text 'y'"),
    ([["a", "b"]] * 4, "no array of numbers"), (None, "no array of numbers"),
])  # fmt: skip
def test_scores_that_are_none(images, answer, message):
    with pytest.raises(ScorerError, match=message):
        checked(CallableScorer(lambda given, texts: answer), images, ["x", "y"])


def test_a_question_to_a_vision_language_model(images, tmp_path):
    """A random LLaVA, saved and loaded: the score is the probability of its next token being "yes"."""
    tokenizer = word_tokenizer(["yes", "Yes", "no", "Is", "there", "a", "cup", "<image>"], 64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=token, vision_feature_layer=-1, image_seq_length=4
        )
    ).eval()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer, patch_size=16,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scorer = VQAScorer.from_pretrained(tmp_path)
    scores = checked(scorer, images[:2], ["a cup", "a horse"])
    assert bool(((scores > 0) & (scores < 1)).all())
    with torch.no_grad():
        inputs = processor(images=images[0], text=scorer._text("a cup"), return_tensors="pt")
        chances = model(**inputs).logits[0, -1].softmax(-1)
    yes = sum(float(chances[tokenizer.convert_tokens_to_ids(word)]) for word in ("yes", "Yes"))
    assert scores[0, 0] == pytest.approx(yes, abs=1e-6)


def test_a_model_that_cannot_say_yes():
    class Processor:
        tokenizer = word_tokenizer(["no"], 8)

    Processor.tokenizer = type("T", (), {"encode": lambda self, word, add_special_tokens: [1, 2]})()
    with pytest.raises(ScorerError, match="no single token for 'yes'"):
        VQAScorer(object(), Processor)
