"""Watch which torch functions a model's forward calls outside the modules that are allowed to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tenfold_shared.errors import UserError
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def forbid(
    model: nn.Module,
    functions: set[Callable[..., Any]],
    error: type[UserError],
    message: str,
    *,
    allowed: tuple[type[nn.Module], ...] = (),
) -> Iterator[None]:
    """While this is open, a call of one of `functions` inside `model` raises `error` with the calling module's path.

    allowed: classes of modules that may call them.
    """
    stack: list[tuple[str, nn.Module]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in functions and not any(isinstance(module, allowed) for _, module in stack):
                path, module = stack[-1] if stack else ("", model)
                name = getattr(function, "__name__", str(function))
                raise error(f"{path or 'the model'} ({type(module).__name__}): {message} ({name})")
            return function(*args, **(kwargs or {}))

    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _, path=path: stack.append((path, m))))
        hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        with Watch():
            yield
    finally:
        for hook in hooks:
            hook.remove()
