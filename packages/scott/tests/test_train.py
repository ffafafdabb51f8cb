"""The trainer on small real models: one U-Net, resumed runs, several processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scott import AdapterStates, LatentDataset, LoRADiscriminator, NoiseSchedule, SCottConfig, SCottTrainer
from scott.adapters import TEACHER, count
from scott.conditioners import ClassConditioner
from scott.consistency import consistency_function
from scott.train import STUDENT, TARGET, with_guidance_input
from tenfold_shared.errors import UserError

SMALL = {"rank": 2, "disc_rank": 2, "batch": 4, "iterations": 4, "checkpoint_every": 2, "lr": 1e-3, "disc_lr": 1e-3}


def dataset(n=8, channels=1):
    latents = torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(3))
    return LatentDataset.of(latents, [i % 4 for i in range(n)])


def class_trainer(unet, **settings):
    config = SCottConfig(**{**SMALL, "guidance": 1.0, **settings})
    return SCottTrainer(
        unet, config, schedule=NoiseSchedule.stable_diffusion(), conditioner=ClassConditioner(5, null=4)
    )


def weights(trainer):
    return {name: torch.cat([p.detach().flatten() for p in ps]) for name, ps in trainer._weights().items()}


def output(trainer, state, unet=None):
    trainer.states.use(state)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return (unet or trainer.unet)(
            torch.randn(2, 1, 8, 8, generator=g), torch.tensor([500, 20]), class_labels=torch.tensor([1, 2])
        ).sample


def test_teacher_is_bit_equal_whatever_was_trained(class_unet):
    import copy

    untouched = copy.deepcopy(class_unet).eval()
    trainer = class_trainer(class_unet)
    before = output(trainer, TEACHER, untouched)
    assert torch.equal(output(trainer, TEACHER), before)
    assert torch.equal(output(trainer, STUDENT), before)  # an adapter starts as no change
    start = weights(trainer)
    trainer.fit(dataset())
    after = weights(trainer)
    assert all(not torch.equal(start[name], after[name]) for name in start)
    assert torch.equal(output(trainer, TEACHER), before)
    student, target = output(trainer, STUDENT), output(trainer, TARGET)
    assert not torch.equal(student, before) and not torch.equal(target, before) and not torch.equal(student, target)


def test_one_unet_and_its_memory(class_unet):
    frozen = {id(p): p.numel() for p in class_unet.parameters()}
    size = sum(frozen.values())
    trainer = class_trainer(class_unet)
    own = count([*trainer.student_parameters, *trainer.target_parameters, *trainer.discriminator.lora])
    now = {id(p): p.numel() for p in trainer.unet.parameters()}
    assert sum(now.values()) == size + own
    assert set(frozen) <= set(now) and trainer.student_unet is trainer.unet is trainer.target_unet
    pointers = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.unet.parameters()}
    assert sum(pointers.values()) == 4 * (size + own)
    assert own + count(list(trainer.discriminator.head.parameters())) < size
    trained = {id(p) for o in trainer.optimizers for p in o.param_groups[0]["params"]}
    assert not trained & set(frozen)


def test_the_discriminator_has_its_lora_in_the_decoder_alone(class_unet):
    states = AdapterStates(class_unet)
    discriminator = LoRADiscriminator(states, 2)
    named = [name for name, _ in states.unet.named_parameters() if ".disc." in name]
    assert named and all(name.startswith("up_blocks.") for name in named)
    assert len(list(discriminator.parameters())) == len(named) + len(list(discriminator.head.parameters()))
    few = AdapterStates(with_fresh(class_unet))
    assert len(few.add("a", 2, layers="attention")) < len(few.add("b", 2))
    scores = discriminator(
        torch.randn(3, 1, 8, 8), torch.tensor([5, 500, 999]), {"class_labels": torch.tensor([0, 1, 2])}
    )
    assert scores.shape == (3,)
    scores.sum().backward()
    assert all(p.grad is not None for p in discriminator.parameters())


def with_fresh(unet):
    return type(unet).from_config(unet.config)


def test_batch_equals_micro_batches(class_unet):
    whole = class_trainer(with_fresh(class_unet).requires_grad_(False))
    state = whole.unet.state_dict()
    parts = class_trainer(with_fresh(class_unet), micro_batch=1)
    parts.unet.load_state_dict(state)
    a, b = whole.fit(dataset()), parts.fit(dataset())
    assert a[-1] == pytest.approx(b[-1], rel=1e-3, abs=1e-5)
    for name, values in weights(whole).items():
        assert torch.allclose(values, weights(parts)[name], atol=1e-4), name


def test_gradient_checkpointing_changes_nothing(class_unet):
    state = class_unet.state_dict()
    results = []
    for checkpointing in (False, True):
        unet = with_fresh(class_unet)
        unet.load_state_dict(state)
        trainer = class_trainer(unet, gradient_checkpointing=checkpointing, iterations=2)
        trainer.fit(dataset())
        results.append(weights(trainer))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-6), name


def test_resumed_training_ends_with_the_same_weights(class_unet, tmp_path):
    state = {k: v.clone() for k, v in class_unet.state_dict().items()}
    straight = class_trainer(class_unet, lr_schedule="cosine")
    straight.fit(dataset(), output=tmp_path / "straight")

    def fresh():
        unet = with_fresh(class_unet)
        unet.load_state_dict(state)
        return unet

    class Stop(Exception):
        pass

    def stop(step, terms):
        if step == 3:
            raise Stop

    first = class_trainer(fresh(), lr_schedule="cosine")
    with pytest.raises(Stop):
        first.fit(dataset(), output=tmp_path / "stopped", progress=stop)
    resumed = SCottTrainer.resume(
        tmp_path / "stopped",
        fresh(),
        schedule=NoiseSchedule.stable_diffusion(),
        conditioner=ClassConditioner(5, null=4),
    )
    assert resumed.step == 2
    resumed.fit(dataset())
    for name, values in weights(straight).items():
        assert torch.equal(values, weights(resumed)[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"adv_weight": 0.0}, {"renoise": True}, {"r1": 0.1}, {"disc_warmup": 2}, {"draws": 2, "weighting": "min-snr"},
        {"student": "full"}, {"noise_below": 400, "loss": "l2"}, {"solver": "ddim-eta", "eta": 0.3, "grid": None},
        {"data": "teacher", "teacher_samples": 5, "teacher_steps": 2}, {"guidance": 3.0}, {"mixed_precision": "bf16"},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_every_setting_trains(class_unet, settings):
    trainer = class_trainer(class_unet, iterations=3, **settings)
    start = weights(trainer)
    history = trainer.fit(dataset())
    assert len(history) == 3 and set(history[-1]) == ({"cd"} if settings.get("adv_weight") == 0.0 else {"cd", "d", "g"})
    assert not torch.equal(start[STUDENT], weights(trainer)[STUDENT])
    if settings.get("disc_warmup"):
        assert "g" not in history[0]


def test_warmup_leaves_the_student_alone(class_unet):
    trainer = class_trainer(class_unet, disc_warmup=4)
    start = weights(trainer)
    trainer.fit(dataset())
    assert torch.equal(start[STUDENT], weights(trainer)[STUDENT])
    assert not torch.equal(start["discriminator"], weights(trainer)["discriminator"])


def test_the_discriminator_learns_to_tell(class_unet):
    """With the student frozen, the hinge loss of D falls from 2, where it knows nothing, well below."""
    trainer = class_trainer(class_unet, disc_warmup=30, iterations=30, disc_lr=1e-2, batch=8)
    losses = [terms["d"] for terms in trainer.fit(dataset())]
    assert losses[0] == pytest.approx(2, abs=0.1) and sum(losses[-5:]) / 5 < 1.2


def test_the_consistency_loss_is_between_student_and_average(class_unet):
    """Every pass in its own adapter state, written out for one ODE step: teacher, average, student."""
    trainer = class_trainer(class_unet, solver="ode", substeps=1, loss="l2", ema=0.5)
    trainer.fit(dataset())
    batch, schedule = trainer._draw(dataset(), range(4)), trainer.schedule
    z = schedule.add_noise(batch.x, batch.noise, batch.t_n)

    def x0(state, z, t):
        trainer.states.use(state)
        with torch.no_grad():
            return schedule.predict_x0(trainer.unet(z, t, **batch.condition).sample, z, t)

    before = trainer.solver.step(z, batch.t_n, batch.t_m, x0(TEACHER, z, batch.t_n))
    target = consistency_function(lambda z, t: x0(TARGET, z, t))(before, batch.t_m)
    jump = consistency_function(lambda z, t: x0(STUDENT, z, t))(z, batch.t_n)
    expected = float((jump - target).square().flatten(1).mean(1).sum())
    assert trainer._losses(batch, 1.0)["cd"] == pytest.approx(expected, rel=1e-5)


def gradient(trainer):
    """Of the student, from one pass of the present iteration's batch."""
    for parameter in trainer.student_parameters:
        parameter.grad = None
    trainer._losses(trainer._draw(dataset(), range(4)), 1.0)
    return torch.cat([p.grad.flatten() for p in trainer.student_parameters])


@pytest.mark.parametrize("student", ["lora", "full"])
def test_the_generator_term_is_minus_the_discriminators_score(class_unet, student):
    """What the adversarial weight adds to the student's gradient is that of −λ_adv Σ D(f(z)), written out."""
    trainer = class_trainer(class_unet, student=student, loss="l2")
    trainer.fit(dataset())
    added = []
    for weight in (0.0, 100.0):
        trainer.config = trainer.config.model_copy(update={"adv_weight": weight})
        added.append(gradient(trainer))
    batch = trainer._draw(dataset(), range(4))
    z = trainer.schedule.add_noise(batch.x, batch.noise, batch.t_n)
    # One graph through the same U-Net in both states: autograd keeps the weights of the state each pass was made in.
    score = trainer.discriminator(trainer.consistency(STUDENT, batch)(z, batch.t_n), batch.t_n, batch.condition).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(-100 * score, trainer.student_parameters)])
    assert float((added[1] - added[0] - expected).norm()) < 1e-3 * float(expected.norm())


def test_the_student_learns_to_please_a_discriminator_that_has_learnt(class_unet):
    """D first, alone; then the student alone: the score of its own jumps rises, on the same batch before and after."""
    trainer = class_trainer(class_unet, disc_warmup=30, iterations=30, disc_lr=1e-2, batch=8)
    trainer.fit(dataset())
    batch = trainer._draw(dataset(), range(8))
    z = trainer.schedule.add_noise(batch.x, batch.noise, batch.t_n)

    def scores():
        with torch.no_grad():
            jump = trainer.consistency(STUDENT, batch)(z, batch.t_n)
            return [float(trainer.discriminator(x, batch.t_n, batch.condition).mean()) for x in (batch.x, jump)]

    real, fake = scores()
    assert real > fake + 0.5  # it has learnt
    trainer.config = trainer.config.model_copy(
        update={"disc_warmup": 0, "iterations": 60, "adv_weight": 100.0, "lr": 1e-2}
    )
    trainer.optimizers = trainer.optimizers[:1]
    trainer.fit(dataset())
    real_after, fake_after = scores()
    assert real_after == real and fake_after > fake + 0.25


def test_stable_diffusion_student_with_an_omega_input(sd):
    config = SCottConfig(**{**SMALL, "student": "full", "guidance": (2.0, 8.0), "iterations": 2})
    trainer = SCottTrainer(sd, config)
    trainer.fit(LatentDataset.of(dataset(channels=4)._memory, [f"image {i}" for i in range(8)]))
    low, high = (trainer.sample(["a", "b"], steps=2, guidance=w) for w in (2.0, 8.0))
    assert low.shape == (2, 4, 8, 8) and not torch.equal(low, high)


def test_an_omega_input_starts_unheeded(sd):
    student = with_guidance_input(sd.unet)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with torch.no_grad():
        a = sd.unet(z, t, encoder_hidden_states=text).sample
        b = student(z, t, encoder_hidden_states=text, timestep_cond=torch.randn(2, 256)).sample
    assert torch.allclose(a, b, atol=1e-6)


def test_guided_teacher_is_two_passes(class_unet):
    trainer = class_trainer(class_unet, guidance=3.0)
    batch = trainer._draw(dataset(), range(2))
    x0 = trainer.teacher_x0(batch)(batch.x, batch.t_n)
    trainer.states.use(TEACHER)
    with torch.no_grad():
        conditional = trainer.unet(batch.x, batch.t_n, **batch.condition).sample
        empty = trainer.unet(batch.x, batch.t_n, class_labels=torch.tensor([4, 4])).sample
    expected = trainer.schedule.predict_x0(empty + 3 * (conditional - empty), batch.x, batch.t_n)
    assert torch.allclose(x0, expected, atol=1e-4)


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from conftest import make_class_unet
from test_train import class_trainer, dataset, weights
torch.set_num_threads(1)
trainer = class_trainer(make_class_unet())
if trainer.accelerator.num_processes > 1:
    assert torch.distributed.get_backend() == "gloo"
trainer.fit(dataset(), output=sys.argv[1])
"""


def _run_worker(tmp_path, name, processes):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(tmp_path / name), str(Path(__file__).parent)]
    if processes > 1:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
            *command[1:],
        ]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    from safetensors.torch import load_file

    return load_file(tmp_path / name / "checkpoint" / "state.safetensors")


def test_two_gloo_processes_equal_one(tmp_path):
    one, two = _run_worker(tmp_path, "one", 1), _run_worker(tmp_path, "two", 2)
    assert set(one) == set(two)
    for key in one:
        if not key.startswith("optimizer"):
            assert torch.allclose(one[key], two[key], atol=2e-4), key


def test_killed_and_resumed_from_the_command_line(sd_folder, images, tmp_path):
    """kill -9 in the middle, --resume, and the weights of the run that nobody disturbed."""
    from safetensors.torch import load_file

    settings = {
        **SMALL,
        "iterations": 6,
        "guidance": 2.0,
        "model": str(sd_folder),
        "dataset": str(tmp_path / "latents"),
    }
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    _write(tmp_path / "latents", latents, [f"image {i}" for i in range(6)])
    config = tmp_path / "config.json"
    config.write_text(SCottConfig(**settings).model_dump_json())
    base = [sys.executable, "-m", "scott", "train", "--config", str(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    killed = subprocess.Popen([*base, "--output", str(tmp_path / "b")], env=env, stderr=subprocess.PIPE)
    while not (tmp_path / "b" / "scott.json").exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for name, extra in (("a", []), ("b", ["--resume"])):
        done = subprocess.run(
            [*base, "--output", str(tmp_path / name), *extra], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (load_file(tmp_path / name / "checkpoint" / "state.safetensors") for name in ("a", "b"))
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def _write(folder, latents, captions):
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"latents": latents.half()}, folder / "latents-00000.safetensors")
    (folder / "index.json").write_text(
        json.dumps({"shards": [{"file": "latents-00000.safetensors", "rows": len(latents)}], "captions": captions})
    )


def test_errors(class_unet, sd, tmp_path):
    with pytest.raises(UserError, match="does not tell its noise schedule"):
        SCottTrainer(class_unet, SCottConfig(**SMALL))
    with pytest.raises(UserError, match="do not fit into 1000 time steps"):
        class_trainer(class_unet, skip=1200, grid=50)
    with pytest.raises(UserError, match="can take no ω input"):
        class_trainer(with_fresh(class_unet), student="full", guidance=(1.0, 2.0))
    trainer = class_trainer(class_unet)
    with pytest.raises(UserError, match="no data to train on"):
        trainer.fit(None)
    with pytest.raises(UserError, match="latents of 4 channels for a U-Net of 1"):
        trainer.fit(dataset(channels=4))
    with pytest.raises(UserError, match="without an ω input"):
        trainer.sample([1], steps=1, guidance=3.0)
    with pytest.raises(UserError, match="no adapter 'other'"):
        trainer.states.use("other")
    with pytest.raises(UserError, match="exists already"):
        trainer.states.add(STUDENT, 2)
    with pytest.raises(UserError, match="LoRA weights do not match the U-Net: nothing"):
        trainer.states.load(STUDENT, {**trainer.states.state_dict(STUDENT), "nothing.lora_A.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="holds no checkpoint"):
        SCottTrainer.resume(tmp_path, class_unet)
    trainer.save(tmp_path)
    (tmp_path / "checkpoint" / "state.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="is damaged"):
        trainer.load(tmp_path)
    trainer.save(tmp_path)
    other = class_trainer(with_fresh(class_unet), rank=3)
    with pytest.raises(UserError, match="another model or another configuration"):
        other.load(tmp_path)
    with torch.no_grad():
        trainer.student_parameters[0].fill_(torch.nan)
    with pytest.raises(UserError, match="loss not finite at iteration 0: cd = nan, d = nan, g = nan"):
        trainer.train_step(dataset())
    with pytest.raises(UserError, match="needs a teacher with a label for no class"):
        ClassConditioner(5).empty(2)
    with pytest.raises(UserError, match="class label outside 0"):
        ClassConditioner(5)([7])
    with pytest.raises(UserError, match="class labels expected"):
        ClassConditioner(5)(["a cat"])
