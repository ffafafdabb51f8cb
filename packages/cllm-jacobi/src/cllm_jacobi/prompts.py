"""Prompts from a file, and the forms in which the published models expect them."""

import json
from dataclasses import dataclass
from pathlib import Path

from tenfold_shared.errors import UserError

TEMPLATES = {
    "none": "{question}",
    "gsm8k": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",
    "spider": "### Instruction:\n{system}{question}\n### Response:\n",
    "python": "### Instruction:\n{system}{question}\n### Response:\n",
    "sharegpt": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: {question} ASSISTANT:"
    ),
    "testbed": "{question} <sql>",
}
"""Prompt forms of the published models by task; `system` may be empty."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, the question in it, and the expected answer where the file has one."""

    text: str
    question: str
    answer: str | None = None


def read_prompts(
    file: str | Path, *, template: str = "none", system: str = "", limit: int | None = None
) -> list[Prompt]:
    """Prompts of a file: one a line, or JSON lines with `prompt` (or `question`) and perhaps `answer`.

    Raises UserError for a missing or empty file, an unknown template, and, naming the line, for a line that is neither.
    """
    if template not in TEMPLATES:
        raise UserError(f"template is '{template}', expected {', '.join(TEMPLATES)}")
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"prompt file '{file}' does not exist", hint="pass a text file of one prompt a line, or JSON lines"
        )
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not a text file", hint="pass one prompt a line, or JSON lines") from error
    if not lines:
        raise UserError(f"prompt file '{file}' is empty")
    found = []
    for number, line in enumerate(lines[:limit], 1):
        question, answer = line, None
        if path.suffix in (".jsonl", ".json"):
            try:
                record = json.loads(line)
                question = record.get("prompt", record.get("question"))
                answer = record.get("answer")
            except (json.JSONDecodeError, AttributeError) as error:
                raise UserError(f"'{file}' line {number} is no JSON object", hint="write one object a line") from error
            if not isinstance(question, str) or not question:
                raise UserError(f"'{file}' line {number} has no prompt", hint="give it a field prompt or question")
        found.append(Prompt(TEMPLATES[template].format(question=question, system=system), question, answer))
    return found
