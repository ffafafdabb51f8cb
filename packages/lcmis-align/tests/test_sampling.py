"""A run that was stopped and gone on with is the run that was not stopped, bit for bit, in every family."""

import copy
import functools
import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from lcmis_align import IncompatiblePromptLength, PromptSchedule, UnsupportedPipelineError
from lcmis_align.sampling import Sampler, Warehouse
from lcmis_align.sampling.encoding import encodings
from tenfold_shared.errors import UserError

A, FULL = "a tea cup", "a tea cup of iced coke"
STEPS = 6
FAMILIES = ["sd", "sdxl", "sd3", "flux", "pixart"]
SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM eta": (DDIMScheduler, {"eta": 0.7}),
    "DDPM": (DDPMScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "LMS": (LMSDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
}


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def plain(pipe, prompt, seeds, arguments, **more):
    return pipe(
        prompt=prompt, num_inference_steps=STEPS, generator=generators(seeds), num_images_per_prompt=len(seeds),
        output_type="latent", **{**arguments, **more},
    ).images  # fmt: skip


def two_stages(pipe, k, seeds, arguments, **more):
    sampler = Sampler(pipe, seeds, num_inference_steps=STEPS, **{**arguments, **more})
    snapshot = sampler.advance(sampler.begin(), k, ((A, 1.0),))
    return sampler.advance(snapshot, sampler.length, ((FULL, 1.0),)), sampler


@pytest.mark.parametrize("family", FAMILIES)
def test_switch_at_0_is_the_plain_pipeline_and_at_the_end_the_first_concept(pipelines, family):
    pipe, arguments = pipelines(family)
    original = pipe.scheduler
    assert torch.equal(two_stages(pipe, 0, [3, 4], arguments)[0].latents, plain(pipe, FULL, [3, 4], arguments))
    assert torch.equal(two_stages(pipe, STEPS, [3, 4], arguments)[0].latents, plain(pipe, A, [3, 4], arguments))
    assert pipe.scheduler is original
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_images_are_those_of_the_pipeline(pipelines, family):
    pipe, arguments = pipelines(family)
    images = PromptSchedule([(FULL, 1.0)]).run(pipe, seeds=[3, 4], num_inference_steps=STEPS, **arguments)
    expected = pipe(
        prompt=FULL, num_inference_steps=STEPS, generator=generators([3, 4]), num_images_per_prompt=2, **arguments
    ).images
    assert all(
        np.array_equal(np.asarray(ours), np.asarray(theirs)) for ours, theirs in zip(images, expected, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_switched(pipelines, family):
    pipe, arguments = pipelines(family)
    switched = two_stages(pipe, 3, [3], arguments)[0].latents
    assert not torch.equal(switched, plain(pipe, FULL, [3], arguments))
    assert not torch.equal(switched, plain(pipe, A, [3], arguments))


def test_sd_equals_the_callback_and_the_hand_written_loop(pipelines):
    pipe, arguments = pipelines("sd")
    k, embeds = 2, {}
    for text in (A, FULL):
        positive, negative = pipe.encode_prompt(text, torch.device("cpu"), 2, True, "glass")
        embeds[text] = torch.cat([negative, positive])

    def switch(_, i, t, kwargs):
        return {"prompt_embeds": embeds[FULL]} if i + 1 == k else {}

    called = plain(
        pipe, A, [3, 4], arguments, callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = torch.cat([torch.randn((1, 4, 16, 16), generator=g) for g in generators([3, 4])])
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = pipe.unet(torch.cat([latents] * 2), t, embeds[A] if i < k else embeds[FULL]).sample
            negative, positive = output.chunk(2)
            latents = scheduler.step(negative + 5.0 * (positive - negative), t, latents).prev_sample
    ours = two_stages(pipe, k, [3, 4], arguments)[0].latents
    assert torch.equal(ours, called)
    assert torch.equal(ours, latents)


def test_sdxl_equals_the_callback_and_denoising_end_and_start(pipelines):
    pipe, arguments = pipelines("sdxl")
    steps, k = 10, 4
    sampler = Sampler(pipe, [3, 4], num_inference_steps=steps, **arguments)
    ours = sampler.advance(sampler.advance(sampler.begin(), k, ((A, 1.0),)), steps, ((FULL, 1.0),)).latents
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        FULL, device=torch.device("cpu"), num_images_per_prompt=2, negative_prompt="glass"
    )
    given = {"prompt_embeds": torch.cat([negative, embeds]), "add_text_embeds": torch.cat([negative_pooled, pooled])}
    common = {"num_inference_steps": steps, "output_type": "latent", "num_images_per_prompt": 2}
    called = pipe(
        prompt=A, generator=generators([3, 4]), callback_on_step_end=lambda _, i, t, kw: given if i + 1 == k else {},
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "add_text_embeds"], **common, **arguments,
    ).images  # fmt: skip
    half = pipe(prompt=A, generator=generators([3, 4]), denoising_end=k / steps, **common, **arguments).images
    second = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    second.set_progress_bar_config(disable=True)
    official = second(
        prompt=FULL, image=half, denoising_start=k / steps, negative_prompt="glass", guidance_scale=5.0, **common
    ).images
    assert torch.equal(ours, called)
    assert torch.equal(ours, official)
    handed = Sampler(pipe, [3, 4], num_inference_steps=steps, stage2_pipeline=second, **arguments)
    there = handed.advance(handed.begin(), k, ((A, 1.0),))
    assert torch.equal(handed.advance(there, steps, ((FULL, 1.0),), second=True).latents, official)


def test_refiner_with_its_own_encoder_and_aesthetic_score_equals_the_official_procedure(pipelines, refiner):
    pipe, arguments = pipelines("sdxl")
    steps, k = 10, 4
    sampler = Sampler(pipe, [3], num_inference_steps=steps, stage2_pipeline=refiner, **arguments)
    there = sampler.advance(sampler.begin(), k, ((A, 1.0),))
    ours = sampler.advance(there, steps, ((FULL, 1.0),), second=True).latents
    half = pipe(
        prompt=A, generator=generators([3]), denoising_end=k / steps, num_inference_steps=steps, output_type="latent",
        **arguments,
    ).images  # fmt: skip
    official = refiner(
        prompt=FULL, image=half, denoising_start=k / steps, negative_prompt="glass", guidance_scale=5.0,
        num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(ours, official)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resuming_from_the_warehouse_is_the_uninterrupted_run(pipelines, name):
    pipe, arguments = pipelines("sd")
    kind, more = SCHEDULERS[name]
    original = pipe.scheduler
    pipe.scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    try:
        whole = plain(pipe, FULL, [3, 4], arguments, **more)
        sampler = Sampler(pipe, [3, 4], num_inference_steps=STEPS, **arguments, **more)
        store = Warehouse(sampler, FULL)
        for k in (sampler.length - 1, 1, 3, 0, sampler.length):
            resumed = sampler.advance(store.at(k), sampler.length, ((FULL, 1.0),)).latents
            assert torch.equal(resumed, whole), f"{name} at {k}"
    finally:
        pipe.scheduler = original


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_resuming_flow_matching_is_the_uninterrupted_run(pipelines, family):
    pipe, arguments = pipelines(family)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    whole = plain(pipe, FULL, [3, 4], arguments)
    sampler = Sampler(pipe, [3, 4], num_inference_steps=STEPS, **arguments)
    store = Warehouse(sampler, FULL)
    for k in (4, 1, STEPS):
        assert torch.equal(sampler.advance(store.at(k), STEPS, ((FULL, 1.0),)).latents, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_seeds_is_the_single_seeds(pipelines, family):
    pipe, arguments = pipelines(family)
    batch = two_stages(pipe, 3, [3, 4, 5], arguments)[0].latents
    for i, seed in enumerate([3, 4, 5]):
        single = two_stages(pipe, 3, [seed], arguments)[0].latents[0]
        assert (single - batch[i]).abs().max() <= 1e-5 * batch[i].abs().max()


def test_the_negative_prompt_stays_and_guidance_may_be_off(pipelines):
    pipe, arguments = pipelines("sd")
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    try:
        two_stages(pipe, 3, [3, 4], arguments)
        assert all(torch.equal(one[:2], seen[0][:2]) for one in seen)
        assert not torch.equal(seen[0][2:], seen[-1][2:])
        seen.clear()
        off = {**arguments, "guidance_scale": 1.0}
        latents = two_stages(pipe, 0, [3, 4], off)[0].latents
        assert all(len(one) == 2 for one in seen)
    finally:
        handle.remove()
    assert torch.equal(latents, plain(pipe, FULL, [3, 4], off))


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_the_denoisers_evaluations(pipelines, family):
    pipe, arguments = pipelines(family)
    rows = []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        plain(pipe, FULL, [3, 4], arguments)
        of_one_image = sum(rows) / (2 * STEPS)  # 2 where guidance evaluates the empty text beside the prompt
        rows.clear()
        sampler = Sampler(pipe, [3, 4], num_inference_steps=STEPS, **arguments)
        store = Warehouse(sampler, A)
        for k in (2, 4, 3):
            sampler.decode(sampler.advance(store.at(k), STEPS, ((FULL, 1.0),)))
    finally:
        handle.remove()
    assert sampler.calls == 2 * (4 + (STEPS - 2) + (STEPS - 4) + (STEPS - 3))
    assert sum(rows) / of_one_image == sampler.calls


@pytest.mark.parametrize("family", FAMILIES)
def test_mixing_encodings_of_one_text_changes_nothing(pipelines, family):
    pipe, arguments = pipelines(family)
    sampler = Sampler(pipe, [3], num_inference_steps=STEPS, **arguments)
    mixed = sampler.advance(sampler.begin(), STEPS, ((FULL, 0.25), (FULL, 0.75)))
    assert torch.equal(mixed.latents, plain(pipe, FULL, [3], arguments))
    other = sampler.advance(sampler.begin(), STEPS, ((A, 0.5), (FULL, 0.5))).latents
    assert not torch.equal(other, mixed.latents)


def test_a_mixture_is_the_mixture_of_embeddings(pipelines):
    pipe, arguments = pipelines("sd")
    both = [pipe.encode_prompt(text, torch.device("cpu"), 1, True, "glass")[0] for text in (A, FULL)]
    sampler = Sampler(pipe, [3], num_inference_steps=STEPS, **arguments)
    ours = sampler.advance(sampler.begin(), STEPS, ((A, 0.25), (FULL, 0.75))).latents
    theirs = plain(pipe, None, [3], arguments, prompt_embeds=0.25 * both[0] + 0.75 * both[1])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixing_scores_of_one_text_changes_nothing(pipelines, family):
    pipe, arguments = pipelines(family)
    sampler = Sampler(pipe, [3, 4], num_inference_steps=STEPS, **arguments)
    mixed = sampler.advance(sampler.begin(), STEPS, ((FULL, 0.5), (FULL, 0.5)), mix="score")
    torch.testing.assert_close(mixed.latents, plain(pipe, FULL, [3, 4], arguments), atol=1e-5, rtol=1e-5)
    assert sampler.calls == 2 * 2 * STEPS


def test_composed_scores_are_composable_diffusion_by_hand(pipelines):
    pipe, arguments = pipelines("sd")
    arguments = {**arguments, "guidance_scale": 1.0}
    texts = {A: 1.0, FULL: 1.0, "": -1.0}
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn((1, 4, 16, 16), generator=generators([3])[0])
    embeds = {text: pipe.encode_prompt(text, torch.device("cpu"), 1, False)[0] for text in texts}
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = sum(weight * pipe.unet(latents, t, embeds[text]).sample for text, weight in texts.items())
            latents = scheduler.step(output, t, latents).prev_sample
    sampler = Sampler(pipe, [3], num_inference_steps=STEPS, **arguments)
    ours = PromptSchedule.composed(texts).follow(sampler)
    torch.testing.assert_close(ours.latents, latents, atol=1e-5, rtol=1e-5)
    assert sampler.calls == 3 * STEPS == PromptSchedule.composed(texts).calls(STEPS)


def test_texts_are_encoded_once(pipelines):
    pipe, arguments = pipelines("sd")
    encoded = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(1))
    try:
        sampler = Sampler(pipe, [3], num_inference_steps=STEPS, **{**arguments, "guidance_scale": 1.0})
        with sampler.remembering():
            PromptSchedule([([A, FULL], 1.0)]).follow(sampler)
    finally:
        handle.remove()
    assert len(encoded) == 3  # the empty text, A, the prompt
    with encodings(pipe):
        assert (
            pipe.encode_prompt(A, torch.device("cpu"), 1, False)[0]
            is (pipe.encode_prompt(A, torch.device("cpu"), 1, False)[0])
        )


def test_the_scheduler_keeps_its_signature(pipelines):
    from lcmis_align.sampling.window import Stretch

    pipe, _ = pipelines("sd")
    confined = Stretch(0, 1).scheduler(pipe.scheduler)
    assert isinstance(confined, DDIMScheduler)
    for name in ("step", "set_timesteps"):
        assert inspect.signature(getattr(confined, name)).parameters.keys() >= (
            inspect.signature(getattr(pipe.scheduler, name)).parameters.keys()
        )


class Ragged(StableDiffusionPipeline):
    """Encodes a text to as many vectors as it has words."""

    def encode_prompt(self, prompt, *args, **kwargs):
        length = len(prompt.split()) + 2
        return tuple(
            part if part is None else part[:, :length] for part in super().encode_prompt(prompt, *args, **kwargs)
        )


class Deaf(StableDiffusionPipeline):
    """Encodes its prompt in its own way."""

    @functools.wraps(StableDiffusionPipeline.__call__)
    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt="".join(prompt), **kwargs)


def test_encodings_that_cannot_be_mixed_are_named(pipelines):
    pipe, arguments = pipelines("sd")
    arguments = {**arguments, "guidance_scale": 1.0}
    for kind, error in ((Ragged, IncompatiblePromptLength), (Deaf, UnsupportedPipelineError)):
        other = kind(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        sampler = Sampler(other, [3], num_inference_steps=STEPS, **arguments)
        with pytest.raises(error, match="cannot be mixed"):
            sampler.advance(sampler.begin(), 2, ((A, 0.5), (FULL, 0.5)))


def test_errors_are_named(pipelines, refiner):
    pipe, arguments = pipelines("sd")
    unconditional = DDPMPipeline(UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                             up_block_types=("UpBlock2D",) * 2), DDPMScheduler())  # fmt: skip
    with pytest.raises(UnsupportedPipelineError, match="DDPMPipeline takes no prompt"):
        Sampler(unconditional, [0])
    with pytest.raises(UnsupportedPipelineError, match=r"takes no latents|starts from an image"):
        Sampler(refiner, [0])
    with pytest.raises(UserError, match="seeds"):
        Sampler(pipe, [])
    with pytest.raises(UserError, match="num_inference_steps is 0"):
        Sampler(pipe, [0], num_inference_steps=0)
    store = Warehouse(Sampler(pipe, [0], num_inference_steps=40, **arguments), A)
    with pytest.raises(ValueError, match=r"switch_step 45 is outside 0\.\.40"):
        store.at(45)
