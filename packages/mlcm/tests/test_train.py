"""The trainer on tiny Stable Diffusion and SDXL pipelines."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from mlcm import (
    ClassCondition,
    MLCMConfig,
    MLCMScheduler,
    MLCMTrainer,
    NoCondition,
    NoiseSchedule,
    PromptCondition,
    TrainingDivergedError,
)
from mlcm.cli import app
from mlcm.conditioners import read_prompts
from mlcm.mixture import GaussianMixture
from mlcm.network import Denoiser, adapters_off, add_lora, trainable
from mlcm.runs import image_decoder
from mlcm.testbed import PlaneStudent, plane_denoiser, side_by_side, tiny_clip, tiny_pipeline
from pydantic import ValidationError
from safetensors.torch import load_file
from tenfold_shared.errors import UserError
from tenfold_shared.hub import load_pipeline
from typer.testing import CliRunner

TEXTS = ["a red ball", "a blue cube", "a green cat"]


def config(**more) -> MLCMConfig:
    return MLCMConfig(
        **{
            "lora_rank": 4,
            "batch_size": 2,
            "guidance_scale": 3.0,
            "learning_rate": 1e-3,
            "stage2_learning_rate": 1e-3,
            "reward_margin": 1.0,
            **more,
        }
    )


def trainer(pipe, **more) -> MLCMTrainer:
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    return MLCMTrainer(
        pipe.unet, config(**more), PromptCondition(pipe, TEXTS), schedule=NoiseSchedule.from_scheduler(pipe.scheduler),
        latents_to_images=image_decoder(pipe),
    )  # fmt: skip


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def weights(made: MLCMTrainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainable(made.network).items()}


def plane(**more) -> MLCMTrainer:
    """The exact teacher as a function, a small student trained whole."""
    mixture = GaussianMixture.rings()
    student = side_by_side(plane_denoiser(), 1)
    return MLCMTrainer(
        mixture, config(batch_size=4, **more), ClassCondition(4), schedule=mixture.schedule, shape=(2,), student=student
    )


def test_every_stage_trains_and_the_teacher_stays_bit_equal(pipe):
    conditioner = PromptCondition(pipe, TEXTS)
    z, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 700])
    given = conditioner(torch.tensor([0, 1]))
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    with torch.no_grad():
        before = Denoiser(pipe.unet, schedule).guided(z, t, given, 3.0)
    made = trainer(pipe)
    with torch.no_grad():
        assert torch.equal(made.trajectory.teacher(z, t, given, 3.0), before)
    moved = weights(made)
    made.train_stage1(1)
    made.train_stage2(1)
    made.train_reward(brightness, 1, held_out=brightness)
    made.train_adversarial(1)
    assert made.progress == {"stage1": 1, "stage2": 1, "reward": 1, "adversarial": 1}
    assert any(not torch.equal(moved[k], v) for k, v in weights(made).items())
    with torch.no_grad():
        assert torch.equal(made.trajectory.teacher(z, t, given, 3.0), before)
        assert not torch.equal(made.student.x0(z, t, given), Denoiser(pipe.unet, schedule).guided(z, t, given, 3.0))


def test_guided_calls_are_one_batch_and_equal_two(pipe):
    conditioner, schedule = PromptCondition(pipe, TEXTS), NoiseSchedule.from_scheduler(pipe.scheduler)
    z, t, given = torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), conditioner(torch.tensor([0, 2]))
    model = Denoiser(pipe.unet, schedule)
    with torch.no_grad():
        both = model.guided(z, t, given, 3.0)
        null = type(given)(given.null, given.null)
        apart = model.x0(z, t, null) + 3.0 * (model.x0(z, t, given) - model.x0(z, t, null))
    torch.testing.assert_close(both, apart, rtol=1e-3, atol=1e-3)
    assert model.calls == 4 + 6


def test_sdxl_sizes_and_pooled_text_reach_both_branches(pipe):
    given = PromptCondition(pipe, TEXTS)(torch.tensor([0, 1]))
    if hasattr(pipe, "text_encoder_2"):
        for branch in (given.given, given.null):
            assert branch["added_cond_kwargs"]["text_embeds"].shape == (2, 32)
            assert branch["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    one = given.rows(torch.tensor([1]))
    assert one.given["encoder_hidden_states"].shape[0] == 1


@pytest.mark.parametrize("stage2", ["joint", "sparse", "progressive"])
def test_second_stages_learn_on_the_mixture(stage2):
    made = plane(stage2=stage2, progressive_segments=(8, 4))
    made.train_stage1(2)
    made.train_stage2(4)
    assert len(made.losses) == 6 and all(loss > 0 for loss in made.losses)


def test_milestones_are_weighted_as_the_config_says():
    losses = {}
    for weighting in ("velocity", "uniform"):
        made = plane(stage2="sparse", milestone_weighting=weighting)
        made.train_stage2(1)
        losses[weighting] = made.losses[0]
    # sigma is below 1, so a difference in v is the larger number, at most by the last milestone's 1 / sigma^2.
    most = float(made.schedule.sigmas[124]) ** -2
    assert losses["uniform"] < losses["velocity"] <= most * losses["uniform"]


def test_training_lowers_the_loss_of_a_linear_student():
    """One Gaussian: the exact flow is linear and x̂ = a(t) z can represent it; its jumps are learnt."""
    schedule = NoiseSchedule.stable_diffusion()

    class Linear(torch.nn.Module):
        """x̂ = alpha z (1 + a quadratic in t for each segment)."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(4, 3))

        def forward(self, z, t):
            u = t / 999
            powers = torch.stack([torch.ones_like(u), u, u**2], 1)
            more = (self.scale[((t - 1).clamp_min(0) * 4) // 999] * powers).sum(1)
            return schedule.alpha(t, z) * z * (1 + more[:, None])

    sample_schedule = NoiseSchedule.stable_diffusion(prediction_type="sample")
    student = Linear()
    made = MLCMTrainer(
        lambda z, t, c, w: schedule.alpha(t, z) * z,
        config(batch_size=256, learning_rate=3e-2, guidance_scale=1.0, weight_decay=0.0, lr_schedule="cosine", stage2="sparse", segments=4),
        NoCondition(), schedule=sample_schedule, shape=(2,), student=student,
    )  # fmt: skip
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))

    def apart() -> float:
        t, s = torch.full((2000,), 999), torch.full((2000,), 749)
        with torch.no_grad():
            landed = schedule.jump(z, student(z, t), t, s)
        return float((landed - z).abs().mean())

    before = apart()
    made.train_stage1(400)
    # The flow of a unit Gaussian does not move, so a jump must return its state.
    assert apart() < 0.5 * before


def test_the_same_seed_gives_the_same_training_and_another_does_not():
    runs = [plane(seed=s) for s in (0, 0, 1)]
    for made in runs:
        made.train_stage1(2)
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_accumulation_averages_its_micro_batches():
    """A step of three micro-batches has the mean of the losses that three steps see when nothing moves between them."""
    made, still = plane(gradient_accumulation=3), plane(learning_rate=1e-12, weight_decay=0.0)
    made.train_stage1(1)
    still.train_stage1(3)
    assert len(made.losses) == 1 and made.progress["stage1"] == 1
    assert made.losses[0] == pytest.approx(sum(still.losses) / 3, rel=1e-4)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "reward"])
def test_resume_goes_on_with_the_same_losses_and_weights(pipe, tmp_path, stage):
    def train(made: MLCMTrainer, steps: int, **more) -> None:
        if stage == "reward":
            made.train_reward(brightness, steps, **more)
        else:
            getattr(made, f"train_{stage}")(steps, **more)

    again, twin = load_pipeline(pipe.name_or_path), load_pipeline(pipe.name_or_path)
    whole = trainer(pipe)
    train(whole, 3)
    train(trainer(twin, checkpoint_every=1), 2, checkpoint=tmp_path / "check")
    resumed = MLCMTrainer.resume(
        tmp_path / "check", again.unet, PromptCondition(again, TEXTS), schedule=NoiseSchedule.from_scheduler(again.scheduler),
        latents_to_images=image_decoder(again),
    )  # fmt: skip
    train(resumed, 3)
    assert resumed.losses == whole.losses[2:]
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


def test_adversarial_stage_resumes(pipe, tmp_path):
    whole, part = trainer(pipe), trainer(copy.deepcopy(pipe))
    whole.train_adversarial(2)
    part.train_adversarial(1)
    part.save(tmp_path / "check")
    part.load(tmp_path / "check")
    part.train_adversarial(2)
    assert part.losses[1:] == whole.losses[1:]


KILLED = """
import sys, torch
torch.set_num_threads(1)
from mlcm.cli import app
sys.argv = ["mlcm", *sys.argv[1:]]
app()
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", KILLED, *arguments]


SETTINGS = (
    "model: .\nprompts: prompts.txt\nlora_rank: 2\nbatch_size: 2\nguidance_scale: 2.0\nlora_targets: [to_q, to_k]\n"
    "stage1_steps: 6\nstage2_steps: 6\nreward_steps: 4\nreward_model: clip\nreward_margin: 1.0\n"
    "checkpoint_every: 1\nlearning_rate: 0.001\nstage2_learning_rate: 0.001\n"
)
STAGES = ("--stage", "1", "--stage", "2", "--stage", "reward", "--device", "cpu", "--output")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def small(request, tmp_path_factory):
    """A pipeline, its config and a reward model, all on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(xl=request.param == "sdxl").save_pretrained(folder)
    tiny_clip(folder / "clip")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    (folder / "config.yaml").write_text(SETTINGS)
    return folder


def final_weights(*runs):
    return [load_file(run / "checkpoint" / "trainable.safetensors") for run in runs]


def test_killed_and_resumed_ends_with_the_same_weights(small, tmp_path):
    train = ["train", "--config", str(small / "config.yaml"), *STAGES]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command(*train, str(tmp_path / "cut")), **quiet)
    state = tmp_path / "cut" / "checkpoint" / "trainer.json"
    # In the middle of another stage for each kind.
    reached = '"stage2": 2' if (small / "text_encoder_2").exists() else '"stage1": 2'
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if reached in state.read_text():
                break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert '"reward": 0' in state.read_text()
    for more in ([str(tmp_path / "cut"), "--resume"], [str(tmp_path / "whole")]):
        done = CliRunner().invoke(app, [*train, *more])
        assert done.exit_code == 0, done.output
    a, b = final_weights(tmp_path / "whole", tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert '"reward": 4' in state.read_text()


def test_two_gloo_processes_are_one(small, tmp_path):
    (small / "one.yaml").write_text(SETTINGS.replace("batch_size: 2", "batch_size: 4").replace("steps: 6", "steps: 2"))
    (small / "two.yaml").write_text(SETTINGS.replace("steps: 6", "steps: 2"))
    one = CliRunner().invoke(app, ["train", "--config", str(small / "one.yaml"), *STAGES, str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mlcm"]
    two = subprocess.run(
        [*launch, "train", "--config", str(small / "two.yaml"), *STAGES, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert one.exit_code == 0, one.output
    assert two.returncode == 0, two.stderr[-2000:]
    a, b = final_weights(tmp_path / "one", tmp_path / "two")
    moved = max(float(v.abs().max()) for k, v in a.items() if "lora_B" in k)
    # Adam divides by the gradient's size, so a rounding difference is blown up where the gradient is nearly nothing.
    assert moved > 1e-3 and all(torch.allclose(a[k], b[k], rtol=0, atol=2e-5) for k in a)


def test_two_kinds_of_pipeline_train_by_the_command(small, tmp_path):
    """Stage 1, stage 2 and the reward; the LoRA loads and changes the picture."""
    settings = small / "quick.yaml"
    settings.write_text(SETTINGS.replace("steps: 6", "steps: 1").replace("steps: 4", "steps: 1"))
    answer = CliRunner().invoke(app, ["train", "--config", str(settings), *STAGES, str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    pipe = load_pipeline(small)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MLCMScheduler.from_config(pipe.scheduler.config)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe("a ball", num_inference_steps=2, guidance_scale=0, generator=generator, output_type="latent").images

    before = draw()
    pipe.load_lora_weights(str(tmp_path / "checkpoint"))
    assert not torch.equal(draw(), before)


def test_bank_takes_the_place_of_the_loop(small):
    from mlcm import read_config
    from mlcm.runs import compute_bank

    bank = compute_bank(read_config(small / "config.yaml"), entries=3, device="cpu", batch=2)
    assert bank.states.shape == (3, 9, 4, 16, 16) and set(bank.prompts.tolist()) <= {0, 1, 2}
    pipe = load_pipeline(small)
    made = MLCMTrainer(
        pipe.unet,
        config(),
        PromptCondition(pipe, TEXTS),
        schedule=NoiseSchedule.from_scheduler(pipe.scheduler),
        bank=bank,
    )
    made.train_stage1(1)
    assert made.progress["stage1"] == 1

    def refused(text: str, texts: list[str] = TEXTS, **more) -> None:
        with pytest.raises(UserError, match=text):
            MLCMTrainer(
                pipe.unet, config(**more), PromptCondition(pipe, texts), bank=bank,
                schedule=NoiseSchedule.from_scheduler(pipe.scheduler),
            )  # fmt: skip

    refused("milestones are .*999, 874.*training's .*999, 749", segments=4)
    refused("names prompt", texts=TEXTS[: int(bank.prompts.max())])


def test_gradient_checkpointing_changes_nothing(small):
    losses = []
    for on in (False, True):
        pipe = load_pipeline(small)
        torch.manual_seed(0)
        made = MLCMTrainer(
            pipe.unet, config(gradient_checkpointing=on), PromptCondition(pipe, TEXTS),
            schedule=NoiseSchedule.from_scheduler(pipe.scheduler),
        )  # fmt: skip
        made.train_stage1(2)
        losses.append(made.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# Bad input.


@pytest.mark.parametrize(
    ("setting", "value"),
    [("segments", 0), ("skip", 0), ("skip", -3), ("guidance_scale", float("nan")), ("prediction_type", "noise"), ("stage2", "third"),
     ("lora_rank", 0), ("batch_size", 0), ("progressive_segments", ()), ("learning_rate", 0), ("unknown", 1), ("loss", "l1")],
)  # fmt: skip
def test_settings_are_checked(setting, value):
    with pytest.raises(ValidationError, match=setting) as error:
        MLCMConfig(**{setting: value})
    assert isinstance(error.value, ValueError)


def test_more_segments_than_times():
    with pytest.raises(ValueError, match="segments is 1000, expected 1 to 999"):
        plane(segments=1000)
    with pytest.raises(UserError, match="skip is 2000"):
        plane(skip=2000)


def test_a_loss_that_is_not_finite_stops_with_step_and_segment():
    mixture = GaussianMixture.rings()
    student = PlaneStudent(mixture.schedule, 4)
    with torch.no_grad():
        student.layers[0].bias.fill_(float("nan"))
    made = MLCMTrainer(mixture, config(), ClassCondition(4), schedule=mixture.schedule, shape=(2,), student=student)
    with pytest.raises(TrainingDivergedError, match=r"not finite in stage1, step 0, segment \d"):
        made.train_stage1(1)
    assert issubclass(TrainingDivergedError, ValueError) and issubclass(TrainingDivergedError, FloatingPointError)


def test_refusals_of_the_trainer(tmp_path, pipe):
    mixture = GaussianMixture.rings()
    with pytest.raises(UserError, match="needs student="):
        MLCMTrainer(mixture, config(), ClassCondition(4), schedule=mixture.schedule, shape=(2,))
    with pytest.raises(UserError, match="does not say its latents' shape"):
        MLCMTrainer(mixture, config(), ClassCondition(4), schedule=mixture.schedule, student=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="expected an even number"):
        MLCMTrainer(
            mixture,
            config(batch_size=3),
            ClassCondition(4),
            schedule=mixture.schedule,
            shape=(2,),
            student=torch.nn.Linear(2, 2),
        )
    with pytest.raises(UserError, match="rewards need latents_to_images"):
        plane().train_reward(brightness, 1)
    with pytest.raises(UserError, match="not a checkpoint of mlcm"):
        MLCMTrainer.resume(tmp_path, mixture, ClassCondition(4), schedule=mixture.schedule)
    with pytest.raises(UserError, match="no layer of Linear matches the LoRA targets"):
        add_lora(torch.nn.Linear(2, 2), 4)


def test_a_checkpoint_of_another_rank_names_its_keys(pipe, tmp_path):
    made = trainer(pipe)
    made.train_stage1(1)
    made.save(tmp_path / "check")
    other = trainer(load_pipeline(pipe.name_or_path), lora_rank=2)
    with pytest.raises(UserError, match=r"does not fit the network: .*lora_A.*\(4, .*expected \(2, "):
        other.load(tmp_path / "check")
    (tmp_path / "check" / "trainable.safetensors").write_bytes(b"xx")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        made.load(tmp_path / "check")


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n \n")
    with pytest.raises(UserError, match="is empty"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(file)
    file.write_text("one\n\n two \n")
    assert read_prompts(file) == ["one", "two"]
    assert NoCondition().prompts(torch.tensor([0, 0])) == ["", ""] and ClassCondition(3).prompts(torch.tensor([2])) == [
        "2"
    ]


def test_adapters_off_is_undone_after_an_exception(pipe):
    made = trainer(pipe)
    made.train_stage1(1)
    z, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    given = made.conditioner(torch.tensor([0]))
    with torch.no_grad():
        before = made.student.x0(z, t, given)
        with pytest.raises(RuntimeError), adapters_off(pipe.unet):
            raise RuntimeError
        assert torch.equal(made.student.x0(z, t, given), before)
