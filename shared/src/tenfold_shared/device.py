"""The torch device behind `--device`."""

from typing import TYPE_CHECKING

from tenfold_shared.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(name: "str | torch.device") -> "torch.device":
    """The device of a name; "auto" is the accelerator where there is one that works, else the CPU.

    Raises UserError when torch does not know the name, or the device is not there.
    """
    import torch

    if name == "auto":
        # Without a driver, torch still names the accelerator that it was built for, unless it is asked to check.
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"device '{name}' cannot be used ({reason})", hint="pass auto or cpu") from error
    return device
