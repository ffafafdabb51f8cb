"""The two worlds: what is planted, that the judge sees it, that the recipe trains, and the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lcmis_align import ScorerError, demo, testbed
from lcmis_align.worlds import exact, trained
from PIL import Image
from safetensors.torch import load_file
from tenfold_shared.errors import UserError


def test_the_exact_denoiser_is_the_posterior_mean():
    model = exact.ExactDenoiser()
    images = exact.bank().flatten(3).flatten(0, 2).double()
    log_prior = exact.prior("checker square", exact.PRIORS[".95/.03/.02"])
    x = torch.randn((2, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    for t in (10, 500, 990):
        a2 = exact.scheduler().alphas_cumprod[t].double()
        distance = (x.flatten(1).double()[:, None] - a2.sqrt() * images).square().sum(-1)
        logits = log_prior.double().repeat_interleave(8)[None] - distance / (2 * (1 - a2))
        expected = (logits.softmax(-1) @ images).reshape(x.shape)
        ours = model(x, torch.tensor(t), log_prior[None, None].expand(2, -1, -1)).sample
        torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=1e-3)


def test_the_exact_sampler_draws_from_the_prior():
    pipe = exact.load()
    drawn = pipe("checker square", num_images_per_prompt=300, num_inference_steps=40, guidance_scale=1.0,
                 generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    shape, texture = exact.look(drawn)
    circle_checker = ((shape == 0) & (texture == 2)).float().mean()
    assert abs(float(circle_checker) - 0.95) < 4 * (0.95 * 0.05 / 300) ** 0.5


def test_every_ideal_image_is_seen_as_it_is():
    for texture in exact.BANKS.values():
        pixels = ((exact.bank(texture).flatten(0, 2) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        shape, kind = exact.look([Image.fromarray(p) for p in pixels])
        assert shape.tolist() == [s for s in range(3) for _ in range(24)]
        assert kind.tolist() == [t for _ in range(3) for t in range(3) for _ in range(8)]
    flat = trained.TEMPLATES.flatten(0, 2)
    pixels = ((flat + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen = trained.look([Image.fromarray(p) for p in pixels])
    assert seen.shape.tolist() == [s for s in range(6) for _ in range(54)]
    assert seen.colour.tolist() == [c for _ in range(6) for c in range(6) for _ in range(9)]
    assert float(seen.rmse.max()) < 0.01


def test_priors_are_distributions():
    for masses in exact.PRIORS.values():
        for prompt in ("checker square", "square", "checker", ""):
            assert float(exact.prior(prompt, masses).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_captions_plant_the_misalignment():
    data = trained.draw(0, 30_000)
    words = trained.tokenizer()
    text = np.array(words.batch_decode(data.captions, skip_special_tokens=True))
    colours, red = list(trained.COLOURS), list(trained.COLOURS).index("red")
    column = trained.SHAPES.index("column")
    mine = data.colour == red
    assert float((data.shape[mine] == column).float().mean()) == pytest.approx(0.9, abs=0.02)
    named = text == "square of red"
    assert float(
        (data.shape[torch.from_numpy(named)] == trained.SHAPES.index("square")).float().mean()
    ) == pytest.approx(0.118, abs=0.05)
    for caption, shape, colour in zip(text[:3000], data.shape, data.colour, strict=False):
        if " of " in caption and colours[colour] in trained.ORDINARY:
            assert caption == f"{trained.SHAPES[shape]} of {colours[colour]}"
    assert np.mean(text == "") == pytest.approx(0.08, abs=0.01)


def test_training_is_the_same_twice_and_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "IMAGES", 2000)
    monkeypatch.setattr(trained.draw, "__defaults__", (2000,))
    whole = trained.train(tmp_path / "whole.safetensors", seed=3, steps=8, every=4)
    real, calls = trained.replace_atomically, []

    def stop_after_checkpoint(path):
        calls.append(path)
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(trained, "replace_atomically", stop_after_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        trained.train(tmp_path / "part.safetensors", seed=3, steps=8, every=4)
    monkeypatch.setattr(trained, "replace_atomically", real)
    assert (tmp_path / "part.checkpoint").exists()
    resumed = trained.train(tmp_path / "part.safetensors", seed=3, steps=8, every=4, resume=True)
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "part.checkpoint").exists()


def test_two_processes_train_what_one_does(tmp_path):
    alone = trained.train(tmp_path / "alone" / "trained-0.safetensors", seed=0, steps=3)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command = [
        *launch,
        str(Path(sys.executable).parent / "lcmis-align"),
        "train",
        "--steps",
        "3",
        "--output",
        str(tmp_path / "both"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    ours, theirs = load_file(alone), load_file(tmp_path / "both" / "trained-0.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name].float(), value.float(), atol=1e-3, rtol=1e-2)


def test_training_learns():
    """The recipe, a hundred steps of it: the loss falls."""
    torch.manual_seed(0)
    model, data, schedule = trained.Model(), trained.draw(0, 2000), trained.scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(60):
        random = torch.Generator().manual_seed(step)
        images, captions = data.batch(torch.randint(2000, (16,), generator=random))
        noise, time = torch.randn(images.shape, generator=random), torch.randint(1000, (16,), generator=random)
        loss = (
            (
                model(schedule.add_noise(images, noise, time), time, captions)
                - schedule.get_velocity(images, noise, time)
            )
            .square()
            .mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_training_errors(tmp_path):
    with pytest.raises(UserError, match="steps is 0"):
        trained.train(tmp_path / "x.safetensors", steps=0)
    torch.save({"seed": 1, "steps": 5}, tmp_path / "x.checkpoint")
    with pytest.raises(UserError, match="is of seed 1, 5 steps"):
        trained.train(tmp_path / "x.safetensors", steps=7, resume=True)


def test_weights_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        trained.load(tmp_path / "missing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="does not hold the weights of this model"):
        trained.load(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no weights at trained-9"):
        trained.load(seed=9)
    with pytest.raises(ScorerError, match="knows nothing of 'gold'"):
        trained.exact_scores([Image.new("RGB", (16, 16))], ["gold"])


def test_the_shipped_model_is_misaligned_and_two_stages_repair_it():
    pipe, plan = trained.load(), trained.plans()[2]
    plain = testbed.measure(trained, "", testbed.at_step(pipe, plan, range(16), 0), plan, 40)
    repaired = testbed.measure(trained, "", testbed.at_step(pipe, plan, range(16), 12), plan, 40)
    assert plain.both <= 0.25 < 0.75 <= repaired.both
    assert plain.latent >= 0.6


def test_attend_and_excite_runs_on_the_trained_model(recwarn):
    pipe, plan = trained.load(), trained.plans()[2]
    processors = dict(pipe.unet.attn_processors)
    images, calls = testbed.attend_and_excite(pipe, plan, [0])
    assert len(images) == 1
    assert calls > 80  # a gradient step besides each denoising step
    assert pipe.unet.attn_processors.keys() == processors.keys()


@pytest.mark.parametrize("name", testbed.METHODS)
def test_calls_of_every_method_are_what_the_denoiser_sees(name):
    pipe, rows = exact.load(), []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    images, calls = testbed.METHODS[name](pipe, exact.plan("square"), [0, 1])
    assert len(images) == 2
    assert sum(rows) == 2 * calls == testbed.cost(2, [name])[0] == testbed.cost(2, [name])[1]


def test_best_of_n_by_hand():
    assert testbed.best_of(0.1, 40) == (1, pytest.approx(0.1))
    assert testbed.best_of(0.1, 96) == (3, pytest.approx(1 - 0.9**3))
    with pytest.raises(UserError, match="world is 'x'"):
        testbed.compare("x", images=1)
    with pytest.raises(UserError, match="images is 0"):
        testbed.compare("exact", images=0)


def test_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", 4)
    monkeypatch.setattr(demo, "HELD_OUT", 10)
    monkeypatch.setattr(demo, "CURVE", (0, 20, 40))
    table = demo.run(tmp_path, seed=0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["package"] == "lcmis-align"
    assert [row[0] for row in table.rows] == ["plain sampler", "MoCE"]
    assert table.rows[1][4] > table.rows[0][4]
    for figure in summary["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 5000
        assert (tmp_path / figure["file"]).with_suffix(".svg").exists()
