"""Every sub-command, as a user types it, on small models saved in the real format."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from scott.cli import app
from typer.testing import CliRunner

runner = CliRunner()


def run(*words, code=0):
    result = runner.invoke(app, [str(w) for w in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*words):
    """Exit 2, one line, no traceback."""
    result = run(*words, code=2)
    # Progress bars of loading models come before it on the same stream.
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s]" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_help_does_not_import_torch():
    code = "import sys, scott, scott.cli; assert 'torch' not in sys.modules; print(len(scott.__all__))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
    assert "solver-check" in run("--help").output


def test_every_option_says_what_it_is_for_and_every_command_shows_an_example():
    from typer.main import get_command

    commands = get_command(app).commands
    bare = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "hidden", False) and not getattr(parameter, "help", None)
    ]
    assert len(commands) == 9 and not bare
    assert all(command.epilog.startswith("Example: scott ") for command in commands.values())


def test_public_names_are_importable():
    import scott

    assert all(getattr(scott, name) is not None for name in scott.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scott.nothing  # noqa: B018


@pytest.fixture(scope="module")
def student(sd_folder, images, tmp_path_factory):
    """prepare-latents and train, as in the README."""
    folder = tmp_path_factory.mktemp("cli")
    made = run("prepare-latents", images, "--model", sd_folder, "--output", folder / "latents", "--size", 16, "--json",
               "--batch-size", 4, "--device", "cpu")  # fmt: skip
    assert json.loads(made.stdout) == {"latents": 6, "shape": "4x8x8", "folder": str(folder / "latents")}
    (folder / "c.yaml").write_text(
        f"model: {sd_folder}\ndataset: {folder / 'latents'}\nrank: 2\ndisc_rank: 2\nbatch: 2\niterations: 3\nguidance: 2\n"
        "lr: 0.01\n"
    )
    trained = run("train", "--config", folder / "c.yaml", "--output", folder / "student", "--json")
    record = json.loads(trained.stdout)
    assert record["iterations"] == 3 and {"loss cd", "loss g", "loss d"} <= set(record)
    return folder


def test_student_loads_with_diffusers_alone_and_samples(student, sd):
    """What the README tells a diffusers user: load_lora_weights and LCMScheduler, nothing of ours."""
    from diffusers import LCMScheduler

    def draw():
        generator = torch.Generator().manual_seed(0)
        return sd("a", num_inference_steps=2, guidance_scale=0, generator=generator, output_type="np").images

    sd.scheduler = LCMScheduler.from_config(sd.scheduler.config)
    before = draw()
    sd.load_lora_weights(str(student / "student"), weight_name="pytorch_lora_weights.safetensors")
    after = draw()
    assert after.shape == (1, 16, 16, 3) and not (before == after).all()
    sd.unload_lora_weights()
    assert (draw() == before).all()


def test_pipeline_and_trainer_agree_on_the_student(student, sd_folder):
    """Our sampler with the adapter state, and diffusers' pipeline with the saved LoRA, give one latent."""
    from scott import LatentDataset, SCottConfig, SCottTrainer
    from scott.sample import multistep
    from scott.student import attach
    from tenfold_shared.hub import load_pipeline

    trainer = SCottTrainer.resume(student / "student", load_pipeline(sd_folder))
    assert trainer.step == 3 and isinstance(trainer.config, SCottConfig)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = trainer._draw(LatentDataset(student / "latents"), [0])
    batch.condition = trainer.conditioner(["a"])
    ours = multistep(trainer.consistency("student", batch), noise, steps=1, schedule=trainer.schedule)
    pipe = attach(load_pipeline(sd_folder), student / "student")
    theirs = pipe("a", num_inference_steps=1, guidance_scale=0, latents=noise, output_type="latent").images
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_sample_eval_and_convert(student, sd_folder, images, tmp_path):
    from tenfold_shared.hub import load_pipeline

    made = run("sample", "--model", sd_folder, "--student", student / "student", "--prompt", "a", "--prompt", "b",
               "--output", tmp_path / "s", "--device", "cpu", "--json", "--steps", 1, 2, 4, 8)  # fmt: skip
    assert [row["steps"] for row in json.loads(made.stdout)] == [1, 2, 4, 8]
    first = Image.open(tmp_path / "s" / "steps-2" / "00000.png")
    assert first.size == (16, 16) and len(list((tmp_path / "s" / "steps-8").glob("*.png"))) == 2
    again = run("sample", "--student", student / "student", "--prompt", "a", "--output", tmp_path / "t", "--device", "cpu",
                "--steps", "2")  # fmt: skip
    assert again.exit_code == 0 and Image.open(tmp_path / "t" / "steps-2" / "00000.png").tobytes() == first.tobytes()

    table = run("eval", "--real", images, "--fake", images, "--json", "--device", "cpu", "--k", 2,
                "--metrics", "frechet", "coverage", "vendi", "diversity")  # fmt: skip
    scores = json.loads(table.stdout)
    assert scores["coverage"] == 1.0 and scores["frechet"] == pytest.approx(0, abs=1e-3) and 1 < scores["vendi"] <= 6

    kohya = json.loads(run("convert", student / "student", "--output", tmp_path / "k", "--json").stdout)["written"]
    pipe = load_pipeline(sd_folder)
    pipe.load_lora_weights(kohya)
    assert pipe.get_active_adapters()
    run("convert", student / "student", "--to", "pipeline", "--output", tmp_path / "whole")
    whole = load_pipeline(tmp_path / "whole")
    assert type(whole.scheduler).__name__ == "LCMScheduler"
    image = whole("a", num_inference_steps=2, guidance_scale=0, generator=torch.Generator().manual_seed(0)).images[0]
    gap = (torch.tensor(list(image.tobytes())).int() - torch.tensor(list(first.tobytes())).int()).abs().max()
    assert int(gap) <= 2


def test_eval_with_a_clip_model(clip_folder, images):
    from scott.features import Features, folder_images

    scores = json.loads(
        run("eval", "--real", images, "--fake", images, "--features", clip_folder, "--k", 2, "--device", "cpu", "--json",
            "--metrics", "fid", "clip", "coverage").stdout
    )  # fmt: skip
    assert scores["coverage"] == 1.0 and scores["fid"] == pytest.approx(0, abs=1e-3) and 0 <= scores["clip"] <= 100
    features, (pictures, captions) = Features(str(clip_folder)), folder_images(images)
    assert features.images(pictures).shape == features.texts(captions).shape == (6, 8)


def test_solver_check(sd_folder):
    rows = json.loads(run("solver-check", "--noise", "ode", "--model", sd_folder, "--samples", 500, "--json",
                          "--steps", 4, 32).stdout)  # fmt: skip
    assert [row["steps"] for row in rows] == [4, 32] and rows[1]["error"] < rows[0]["error"]


def test_bench_of_both_worlds():
    toy = json.loads(
        run("bench", "toy", "--solver", "ode", "--no-gan", "--iterations", 2, "--lr", 1e-3, "--json").stdout
    )
    assert [row["steps"] for row in toy] == [1, 2, 4, 8] and {"sw2", "coverage", "far"} <= set(toy[0])


def test_demo(tmp_path, monkeypatch):
    from scott import demo

    monkeypatch.setattr(demo, "ITERATIONS", 2)
    demo.run.__kwdefaults__["iterations"] = 2
    result = run("demo", "--output", tmp_path / "out", "--seed", 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "SCott" in result.output and [row[0] for row in summary["rows"]] == [1, 2, 4, 8]
    assert (tmp_path / "out" / "mixture.png").stat().st_size > 10_000 and (tmp_path / "out" / "mixture.svg").exists()


def test_the_verdict_of_the_demo():
    from scott.demo import verdict

    one = {"sw2": 0.1, "far": 0.1}
    assert verdict({"sw2": 0.08, "far": 0.1}, one) == "helps" and verdict({"sw2": 0.1, "far": 0.2}, one) == "harms"
    assert verdict({"sw2": 0.05, "far": 0.2}, one) == "mixed" and verdict(one, one) == "no difference"


def test_build_testbed(tmp_path, monkeypatch):
    from scott import digits, testbed

    monkeypatch.setattr(testbed, "train_denoiser", lambda m: testbed.Student(m, 1))
    monkeypatch.setattr(digits, "train_teacher", digits.make_unet)
    monkeypatch.setattr(digits, "train_classifier", digits.DigitClassifier)
    written = json.loads(run("build-testbed", "--output", tmp_path / "w", "--json").stdout)
    assert set(written) == {"mixture_denoiser", "digits_teacher", "digits_classifier"}


def test_errors(student, sd_folder, images, tmp_path, clip_folder):
    done = student / "student"
    assert "'gpu9' cannot be used" in refused("sample", "--student", done, "--prompt", "a", "--device", "gpu9")
    assert "holds no student" in refused("sample", "--student", tmp_path, "--prompt", "a")
    assert "no prompt given" in refused("sample", "--student", done)
    assert "no student given" in refused("sample", "--prompt", "a")
    assert "whole numbers" in refused("sample", "--student", done, "--prompt", "a", "--steps", "two")
    assert "expected 1 to 50" in refused("sample", "--student", done, "--prompt", "a", "--steps", 0)
    assert "without an ω input" in refused("sample", "--student", done, "--prompt", "a", "--guidance", 3)
    assert "does not exist" in refused("sample", "--model", tmp_path / "none", "--student", done, "--prompt", "a")
    assert "does not exist" in refused("prepare-latents", tmp_path / "none", "--model", sd_folder)
    assert "no teacher given" in refused("prepare-latents", images)
    assert "holds a student already" in refused("train", "--config", student / "c.yaml", "--output", done)
    (tmp_path / "bad.yaml").write_text("substeps: 30\n")
    assert "visit the same time twice" in refused("train", "--config", tmp_path / "bad.yaml")
    (tmp_path / "bare.yaml").write_text(f"model: {sd_folder}\n")
    (tmp_path / "eta.yaml").write_text("eta: 2\n")
    assert refused("train", "--config", tmp_path / "eta.yaml").startswith("error: eta is 2.0, expected 0")
    assert "no data to train on" in refused("train", "--config", tmp_path / "bare.yaml", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert "neither a folder here nor a model" in refused("prepare-latents", images, "--model", "no-such/model")
    assert "metric 'is' is unknown" in refused("eval", "--fake", images, "--metrics", "is")
    assert "no samples given" in refused("eval")
    assert "pass --real" in refused("eval", "--fake", images)
    assert "has no text features" in refused("eval", "--fake", images, "--metrics", "clip")
    assert "image folder" in refused("eval", "--fake", tmp_path / "none", "--metrics", "vendi")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (8, 8)).save(few / "a.png")
    assert "6 real and 1 fake samples" in refused("eval", "--real", images, "--fake", few, "--metrics", "coverage")
    assert "needs a caption" in refused("eval", "--fake", few, "--metrics", "clip", "--features", clip_folder)
    assert "format 'onnx' is unknown" in refused("convert", done, "--to", "onnx")
    assert "holds no student LoRA" in refused("convert", tmp_path)
    assert "noise function 'brown'" in refused("solver-check", "--noise", "brown")
    assert "substeps is 0" in refused("solver-check", "--noise", "ode", "--steps", 0)
    assert "2000 solver steps, but the schedule has 1000" in refused("solver-check", "--steps", 2000)
    assert "world 'moon'" in refused("bench", "moon")
    assert "solver 'euler'" in refused("bench", "toy", "--solver", "euler")


def test_a_student_of_another_model_is_refused(student, sd_folder, tmp_path):
    """diffusers would drop the keys with a warning and draw the teacher's images."""
    import shutil

    from safetensors.torch import load_file, save_file

    other = shutil.copytree(student / "student", tmp_path / "other")
    file = other / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    save_file({key.replace("up_blocks.0", "up_blocks.7"): value for key, value in weights.items()}, file)
    line = refused("sample", "--student", other, "--prompt", "a", "--device", "cpu")
    assert "LoRA keys have no place in the U-Net: unet.up_blocks.7" in line
    file.write_bytes(b"short")
    assert "is damaged" in refused("sample", "--student", other, "--prompt", "a", "--device", "cpu")
