import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file
from small_models import IMAGES, calibrated, timm_vit
from spikezip import QATTrainer, calibrate, quantize
from spikezip.errors import CheckpointError, UncalibratedError
from spikezip.qann.quantizer import quantizers
from spikezip.qann.training import distillation_loss
from spikezip.testbed import accuracy
from tenfold_shared.errors import UserError
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def batches(n=48, batch=16):
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = torch.arange(n) % 10
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)


def test_losses_by_hand():
    torch.manual_seed(0)
    z, t, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    kl = distillation_loss(z, t, labels=None, tau=2.0, kind="kl")
    p = (t / 2).softmax(-1)
    assert kl == pytest.approx(float(4 * (p * (p.log() - (z / 2).log_softmax(-1))).sum() / 4), rel=1e-5)
    official = distillation_loss(z, t, labels=y, tau=2.0, kind="official")
    total = 0.0
    for i in range(4):
        own, theirs = F.cross_entropy(z[i], y[i]), F.cross_entropy(t[i], y[i])
        w = 1 - math.exp(-own / theirs)
        total += float(own) + 4 * w * float(-(p[i] * (z[i] / 2).log_softmax(-1)).sum())
    assert float(official) == pytest.approx(total / 4, rel=1e-5)


def test_kl_to_oneself_is_zero_and_the_weight_has_no_gradient():
    z = torch.randn(3, 4, requires_grad=True)
    assert float(distillation_loss(z, z.detach(), labels=None, tau=3.0, kind="kl")) == pytest.approx(0, abs=1e-6)
    y = torch.tensor([0, 1, 2])
    own = F.cross_entropy(z, y, reduction="none")
    weight = (1 - torch.exp(-own / F.cross_entropy(z.detach() + 1, y, reduction="none"))).detach()
    soft = -((z.detach() + 1).softmax(-1) * z.log_softmax(-1)).sum(-1)
    wanted = torch.autograd.grad(own.mean() + (weight * soft).mean(), z)[0]
    got = torch.autograd.grad(distillation_loss(z, z.detach() + 1, labels=y, tau=1.0, kind="official"), z)[0]
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("loss", ["kl", "official"])
def test_training_lowers_the_loss_and_moves_steps(loss):
    teacher = timm_vit()
    qann = calibrated(teacher, IMAGES, levels=8)
    before = {n: q.s.item() for n, q in quantizers(qann).items()}
    trainer = QATTrainer(qann, teacher, loss=loss, lr=3e-3, device="cpu")
    assert trainer.fit(batches(), 5) is qann and not qann.training
    assert trainer.history[-1] < trainer.history[0]
    after = {n: q.s.item() for n, q in quantizers(qann).items()}
    assert all(v > 0 for v in after.values()) and sum(before[n] != after[n] for n in after) > len(after) // 2


def test_fine_tuning_recovers_what_calibration_lost(learned):
    model, data = learned
    qann = quantize(model)
    calibrate(qann, [data.train[:256]], method="lsq")
    for quantizer in quantizers(qann).values():
        quantizer.s.data *= 2.5
    lost = accuracy(qann, data.test, data.test_labels)
    QATTrainer(qann, model, loss="kl", device="cpu").fit(data.loader(), 2)
    assert accuracy(qann, data.test, data.test_labels) > lost + 0.05


SCRIPT = textwrap.dedent(
    """
    import sys, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from small_models import IMAGES, calibrated, timm_vit
    from test_training import batches
    from spikezip import QATTrainer
    teacher = timm_vit()
    qann = calibrated(teacher, IMAGES, levels=8)
    out, resume, pause = sys.argv[1], sys.argv[2] == "1", float(sys.argv[3])
    def slow(x):
        import time
        time.sleep(pause)
        return x
    trainer = QATTrainer(qann, teacher, loss="official", device="cpu", output=out, resume=resume, augment=slow)
    trainer.fit(batches(), 4)
    import os
    if os.environ.get("RANK", "0") == "0":
        save_file(qann.state_dict(), out + "/final.safetensors")
    """
).format(tests=os.path.dirname(__file__))


def script(tmp_path, *arguments, launcher=()):
    file = tmp_path / "train.py"
    if not file.exists():  # written anew, it would be empty for a moment, and a process that starts then does nothing
        file.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(file), *arguments], env=environment)


def final(folder):
    return load_file(str(folder / "final.safetensors"))


def test_two_processes_and_a_killed_run_end_with_the_same_weights(tmp_path):
    for name in ("one", "two", "cut"):
        (tmp_path / name).mkdir()
    one = script(tmp_path, str(tmp_path / "one"), "0", "0")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617")
    two = script(tmp_path, str(tmp_path / "two"), "0", "0", launcher=launcher)
    cut = script(tmp_path, str(tmp_path / "cut"), "0", "0.3")
    progress = tmp_path / "cut" / "checkpoint" / "progress.json"
    try:
        while cut.poll() is None and not progress.exists():
            time.sleep(0.05)
        cut.send_signal(signal.SIGKILL)
        cut.wait()
        assert not (tmp_path / "cut" / "final.safetensors").exists()
        assert script(tmp_path, str(tmp_path / "cut"), "1", "0").wait() == 0
        assert one.wait() == 0 and two.wait() == 0
    finally:
        for process in (one, two, cut):
            if process.poll() is None:
                process.kill()
    whole, halves, resumed = final(tmp_path / "one"), final(tmp_path / "two"), final(tmp_path / "cut")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole), "resumed to the last bit"
    # Two processes add gradients in another order.
    assert all(torch.allclose(whole[k], halves[k], atol=2e-4) for k in whole)


def test_training_errors(tmp_path):
    teacher = timm_vit()
    qann = calibrated(teacher, IMAGES)
    with pytest.raises(UncalibratedError, match=r"patch_embed\.proj\.1"):
        QATTrainer(quantize(teacher), teacher)
    for wrong in ({"loss": "mse"}, {"temperature": 0.0}, {"lr": -1.0}, {"resume": True}):
        with pytest.raises(UserError):
            QATTrainer(qann, teacher, **wrong)
    with pytest.raises(UserError, match="epochs"):
        QATTrainer(qann, teacher, device="cpu").fit(batches(), 0)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        QATTrainer(qann, teacher, device="cpu", output=tmp_path, resume=True).fit(batches(), 1)
    with pytest.raises(UserError, match="needs labels"):
        QATTrainer(qann, teacher, device="cpu").fit(DataLoader(IMAGES, batch_size=3), 1)
    with pytest.raises(UserError, match="not finite"):
        QATTrainer(qann, teacher, device="cpu", loss="kl").fit(DataLoader(IMAGES * float("nan"), batch_size=3), 1)
