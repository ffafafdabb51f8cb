"""A planner that is a chat model on this machine."""

from pathlib import Path
from typing import Any

from lcmis_align.errors import PlannerError
from lcmis_align.planners.base import AskingPlanner


class TransformersPlanner(AskingPlanner):
    """Asks a transformers chat model, greedily.

    model: hub id or folder, or a loaded model (then pass its tokenizer). max_new_tokens: length of an answer.

    Raises UserError when the name is neither a folder nor a hub id, PlannerError when the tokenizer has no chat template.
    """

    def __init__(
        self, model: Any, *, tokenizer: Any = None, max_new_tokens: int = 400, cache: str | Path | None = None,
        max_retries: int = 3,
    ):  # fmt: skip
        name = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", "") or "local model"
        super().__init__(name, cache=cache, max_retries=max_retries)
        if isinstance(model, str | Path):
            from tenfold_shared.hub import load_model, load_tokenizer
            from transformers import AutoModelForCausalLM

            tokenizer = tokenizer or load_tokenizer(model)
            model = load_model(AutoModelForCausalLM, model).eval()
        if getattr(tokenizer, "chat_template", None) is None:
            raise PlannerError(f"the tokenizer of {name} has no chat template", hint="use a chat (instruct) model")
        self._model, self._tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The text that the model adds to the conversation."""
        import torch

        inputs = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        with torch.no_grad():
            output = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return str(self._tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
