import pytest
import torch
from tenfold_shared.device import pick_device
from tenfold_shared.errors import UserError


def test_a_name_is_what_torch_takes_it_for() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


def test_auto_is_a_device_that_works() -> None:
    assert torch.ones(1, device=pick_device("auto")).item() == 1


def test_auto_is_the_cpu_where_the_accelerator_has_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["no-such-device", "", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device '{name}' cannot be used .*pass auto or cpu") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
