"""What training wrote, back in a diffusers pipeline, and out again in other formats."""

from pathlib import Path
from typing import Any

from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_model, replace_atomically
from torch import Tensor

from scott.config import SCottConfig

LORA_FILE, CONFIG_FILE = "pytorch_lora_weights.safetensors", "scott.json"


def read_lora(folder: str | Path) -> dict[str, Tensor]:
    """The student's LoRA in diffusers' naming, `unet.down_blocks. ...`. Raises UserError when there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / LORA_FILE
    if not file.is_file():
        raise UserError(f"'{folder}' holds no student LoRA ({LORA_FILE})", hint="pass the folder that training wrote")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"'{file}' is damaged ({error})", hint="save the student again") from error


def check_keys(unet: Any, weights: dict[str, Tensor]) -> None:
    """Raise UserError that lists LoRA keys without a layer of the right shape in this U-Net.

    diffusers drops such keys with a warning, and the images are then the teacher's.
    """
    layers = {f"unet.{name}": module for name, module in unet.named_modules()}
    wrong = []
    for key, value in weights.items():
        layer = layers.get(key.split(".lora_")[0])
        weight = getattr(layer, "weight", None)
        side = 1 if ".lora_A." in key else 0
        if weight is None or weight.shape[side] != value.shape[side]:
            wrong.append(key)
    if wrong:
        raise UserError(
            f"{len(wrong)} LoRA keys have no place in the U-Net: {', '.join(sorted(wrong)[:5])}",
            hint="the student belongs to another model",
        )


def settings(folder: str | Path) -> SCottConfig:
    """The configuration that a student was trained with. Raises UserError when the folder is not a student's."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"'{folder}' holds no student ({CONFIG_FILE} is missing)", hint="pass what training wrote")
    return SCottConfig.load(file)


def attach(pipe: Any, folder: str | Path) -> Any:
    """Put a student into its teacher's pipeline, with LCMScheduler; returns the pipeline.

    Call it with guidance_scale 0 for a LoRA student (its guidance is trained in), or with ω for one with an ω input.

    Raises UserError when the student is damaged or of another model.
    """
    from diffusers import LCMScheduler

    folder = Path(folder)
    config = settings(folder)
    if (folder / "unet").is_dir():
        pipe.unet = load_model(type(pipe.unet), folder / "unet").to(pipe.unet.device)
    else:
        check_keys(pipe.unet, read_lora(folder))
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="scott")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=config.grid or 50)
    return pipe


def to_kohya(folder: str | Path, output: str | Path) -> Path:
    """Write the LoRA in kohya's naming, which other programs read; returns the file. Errors as in `read_lora`."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(read_lora(folder)).items()}
    output = Path(output) / "scott-kohya.safetensors"
    with replace_atomically(output) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    return output


def fuse(pipe: Any, folder: str | Path, output: str | Path) -> Path:
    """Write a whole pipeline whose U-Net is the student, LCMScheduler included; returns the folder."""
    pipe = attach(pipe, folder)
    if not (Path(folder) / "unet").is_dir():
        pipe.fuse_lora(adapter_names=["scott"])
        pipe.unload_lora_weights()
    with replace_atomically(output) as partial:
        pipe.save_pretrained(partial)
    return Path(output)
