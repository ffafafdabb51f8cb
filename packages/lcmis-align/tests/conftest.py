"""Tiny random pipelines of each family, made with the libraries' own classes."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from lcmis_align.worlds.parts import word_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "tea", "cup", "of", "iced", "coke", "glass", "the", "in", "red", "on", "cat", "horse", "photo"]
torch.set_num_threads(1)


def words(length=8):
    return word_tokenizer(WORDS, length)


def clip(projection=None, hidden=32, seed=0):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, projection_dim=projection or hidden,
        hidden_act="gelu",
    )  # fmt: skip
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def t5():
    torch.manual_seed(5)
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0)
    return T5EncoderModel(config).eval()


def vae(latent=4, **kwargs):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=latent, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32, **kwargs,
    ).eval()  # fmt: skip


def ddim():
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd():
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    ).eval()  # fmt: skip
    return quiet(
        StableDiffusionPipeline(
            vae=vae(), text_encoder=clip(), tokenizer=words(), unet=unet, scheduler=ddim(), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )
    )  # fmt: skip


def sdxl_unet(cross, time_ids, seed):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=32 + 8 * time_ids,
        use_linear_projection=True,
    ).eval()  # fmt: skip


def euler():
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear", timestep_spacing="leading"
    )


def tiny_sdxl():
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(), text_encoder=clip(), text_encoder_2=clip(32, seed=3), tokenizer=words(), tokenizer_2=words(),
            unet=sdxl_unet(64, 6, 2), scheduler=euler(), add_watermarker=False,
        )
    )  # fmt: skip


def tiny_refiner():
    """As the official refiner: one text encoder, an aesthetic score."""
    return quiet(
        StableDiffusionXLImg2ImgPipeline(
            vae=vae(), text_encoder=None, text_encoder_2=clip(32, seed=3), tokenizer=None, tokenizer_2=words(),
            unet=sdxl_unet(32, 5, 9), scheduler=euler(), requires_aesthetics_score=True, add_watermarker=False,
        )
    )  # fmt: skip


def tiny_sd3():
    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.06),
            text_encoder=clip(32, hidden=16), tokenizer=words(), text_encoder_2=clip(32, hidden=16, seed=3),
            tokenizer_2=words(), text_encoder_3=t5(), tokenizer_3=words(),
        )
    )  # fmt: skip


def tiny_flux():
    torch.manual_seed(2)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ).eval()  # fmt: skip
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder=clip(),
            tokenizer=words(), text_encoder_2=t5(), tokenizer_2=words(), transformer=transformer,
            vae=vae(latent=1, shift_factor=0.06),
        )
    )  # fmt: skip


def tiny_pixart():
    torch.manual_seed(2)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    ).eval()  # fmt: skip
    return quiet(
        PixArtSigmaPipeline(
            tokenizer=words(), text_encoder=t5(), vae=vae(), transformer=transformer,
            scheduler=ddim(),
        )
    )  # fmt: skip


FAMILIES = {
    "sd": (tiny_sd, {"guidance_scale": 5.0, "height": 32, "width": 32, "negative_prompt": "glass"}),
    "sdxl": (tiny_sdxl, {"guidance_scale": 5.0, "height": 32, "width": 32, "negative_prompt": "glass"}),
    "sd3": (tiny_sd3, {"guidance_scale": 5.0, "height": 32, "width": 32, "max_sequence_length": 8}),
    "flux": (tiny_flux, {"height": 32, "width": 32, "max_sequence_length": 8}),
    "pixart": (
        tiny_pixart,
        {"height": 32, "width": 32, "max_sequence_length": 8, "clean_caption": False, "use_resolution_binning": False},
    ),
}


@pytest.fixture(scope="session")
def pipelines():
    """Each family's pipeline and the arguments it is called with, made once."""
    made = {}

    def get(name):
        if name not in made:
            build, arguments = FAMILIES[name]
            made[name] = (build(), arguments)
        return made[name]

    return get


@pytest.fixture(scope="session")
def refiner():
    return tiny_refiner()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A tokenizer of whole words with a chat template."""
    tokenizer = word_tokenizer(["user", "assistant", *WORDS], 4096)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    return tokenizer
