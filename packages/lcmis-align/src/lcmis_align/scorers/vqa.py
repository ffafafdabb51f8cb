"""A concept's score as the probability that a vision-language model says "yes" when asked whether it is there."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lcmis_align.errors import ScorerError


class VQAScorer:
    """P(yes) by a transformers image-text-to-text model.

    model: AutoModelForImageTextToText. processor: its AutoProcessor. question: with {concept} in it.
    The score is the probability of "yes" and "Yes" as the next token, each image and text in a call of its own.
    """

    def __init__(
        self, model: Any, processor: Any, *, question: str = "Is there {concept} in the picture? Answer yes or no."
    ):
        self.model, self.processor, self.question = model, processor, question
        tokens = [processor.tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "Yes", " yes", " Yes")]
        self._yes = sorted({ids[0] for ids in tokens if len(ids) == 1})
        if not self._yes:
            raise ScorerError("the model's tokenizer has no single token for 'yes'")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "cpu", **kwargs: Any) -> "VQAScorer":
        """From a hub id or a folder, such as Qwen/Qwen2.5-VL-3B-Instruct.

        Raises UserError when it is neither.
        """
        from tenfold_shared.hub import load_model
        from transformers import AutoModelForImageTextToText

        from lcmis_align.scorers.base import load_processor

        return cls(load_model(AutoModelForImageTextToText, name).eval().to(device), load_processor(name), **kwargs)

    def _text(self, concept: str) -> str:
        question = self.question.format(concept=concept)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}\nAnswer:"

    @torch.no_grad()
    def score(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """(images, texts) in 0..1."""
        rows = []
        for image in images:
            row = []
            for text in texts:
                inputs = self.processor(images=image.convert("RGB"), text=self._text(text), return_tensors="pt")
                logits = self.model(**inputs.to(self.model.device)).logits[0, -1].float()
                row.append(float(logits.softmax(-1)[self._yes].sum()))
            rows.append(row)
        return torch.tensor(rows)
