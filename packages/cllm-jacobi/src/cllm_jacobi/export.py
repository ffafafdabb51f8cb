"""A folder that anybody can decode with: `model.generate(custom_generate=FOLDER, trust_remote_code=True, block_size=16)`."""

from pathlib import Path

from tenfold_shared.hub import replace_atomically

CODE = '''"""Jacobi decoding: exact greedy output, several tokens a pass."""

from typing import Any


def generate(model: Any, inputs: Any = None, input_ids: Any = None, generation_config: Any = None, **settings: Any) -> Any:
    from cllm_jacobi import jacobi_generate

    settings = {name: value for name, value in settings.items() if value is not None}
    if generation_config is not None:
        settings["generation_config"] = generation_config
    return jacobi_generate(model, inputs if input_ids is None else input_ids, **settings)
'''


def export_custom_generate(folder: str | Path) -> Path:
    """Write `folder`/custom_generate in the layout that transformers and the hub read; returns `folder`."""
    folder = Path(folder)
    with replace_atomically(folder / "custom_generate") as partial:
        partial.mkdir()
        (partial / "generate.py").write_text(CODE, encoding="utf-8")
        (partial / "requirements.txt").write_text("cllm-jacobi\n", encoding="utf-8")
    return folder
