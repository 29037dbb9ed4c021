"""The systems of the paper's tables 1, 2, 5 and 6: published numbers, and sizes with their sources.

Steps and samples/s are the paper's; samples/s are of one A100 and cover de-tokenisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lib.peers import models
from torch import Tensor, nn

from titok_fast import GeneratorConfig, SamplingConfig, VQGANConfig

# samples/s on one A100, "float32" (its arithmetic implies TF32): arXiv 2406.07550, tables 1 and 2
PAPER_A100 = {
    ("titok-l-32", 8): 101.6,
    ("titok-b-64", 8): 89.8,
    ("titok-s-128", 8): 53.3,
    ("titok-s-128", 64): 7.8,
    ("titok-l-64-512", 8): 41.0,
    ("titok-b-128-512", 8): 33.3,
    ("titok-b-128-512", 64): 7.4,
}


@dataclass(frozen=True)
class System:
    """One row of the paper's tables, under the paper's names.

    `paper_rate` is in samples/s, None where it gives none; `paper_millions` are parameters of the
    generator. `classes` are the libraries' that rebuild it here; `build(True)` makes a small one,
    and there is none where the paper gives no speed to set beside it.
    """

    name: str
    tokenizer: str
    generator: str
    side: int
    steps: int
    paper_rate: float | None
    paper_millions: int
    classes: str = ""
    build: Callable[[bool], models.Peer] | None = None


def _blocks(kind: str, count: int, first: str | None = None) -> tuple[str, ...]:
    """Names of `count` blocks; the first may be of another kind."""
    return (first or kind, *[kind] * (count - 1))


def _without_encoder(model: Any) -> Any:
    model.encoder, model.quant_conv = nn.Identity(), None
    return model


def _kl_decoder(tiny: bool) -> Any:
    """Stable Diffusion's f8 VAE (huggingface: stabilityai/sd-vae-ft-ema, config.json)."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=_blocks("DownEncoderBlock2D", 4),
        up_block_types=_blocks("UpDecoderBlock2D", 4),
        block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    return _without_encoder(vae)


def _vq_decoder(widths: tuple[int, ...], C: int, N: int, tiny: bool, attention: bool = True) -> Any:
    """A convolutional VQGAN with two blocks a level and, by default, attention at the coarsest."""
    from diffusers import VQModel

    first = "AttnUpDecoderBlock2D" if attention else None
    vq = VQModel(
        down_block_types=_blocks("DownEncoderBlock2D", len(widths)),
        up_block_types=_blocks("UpDecoderBlock2D", len(widths), first),
        block_out_channels=(32,) * len(widths) if tiny else widths,
        layers_per_block=2,
        latent_channels=C,
        num_vq_embeddings=64 if tiny else N,
    )
    return _without_encoder(vq)


def _dit(side: int, tiny: bool) -> models.Peer:
    """DiT-XL/2: 28 layers, 16 heads of 72 (arXiv 2212.09748, table 1; facebook/DiT-XL-2-256).

    The library's class repeats the conditioning tables in each layer: 750M parameters for 675M.
    """
    from diffusers import DiTTransformer2DModel

    latent = 4 if tiny else side // 8
    size = {"num_layers": 2, "num_attention_heads": 2} if tiny else {"num_layers": 28}
    net: Any = DiTTransformer2DModel(sample_size=latent, out_channels=8, **size)

    def denoise(z: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = net(z, timestep=times, class_labels=labels).sample
        return out[:, :4]  # the other half is the variance

    return models.Diffusion(net, _kl_decoder(tiny), (4, latent), denoise)


def _uvit(D: int, depth: int, patch: int, side: int, tiny: bool) -> models.Peer:
    """U-ViT: L 1024 x 20, H 1152 x 28, 16 heads (baofff/U-ViT, configs/imagenet*_uvit_*.py)."""
    latent = 8 if tiny else side // 8
    net = models.UViT(64, 2, 2, latent, patch) if tiny else models.UViT(D, depth, 16, latent, patch)
    return models.Diffusion(net, _kl_decoder(tiny), (4, latent), net)


def _ldm4(tiny: bool) -> models.Peer:
    """LDM-4, class-conditional ImageNet, before VQ-f4 (arXiv 2112.10752, appendices D and E).

    192 channels x (1, 2, 3, 5), heads of 32 at the three coarser levels, cross-attention to one
    512-wide class token: 400.9M. VQ-f4: 128 channels x (1, 2, 4), 8192 codes of 3 channels.
    """
    from diffusers import UNet2DConditionModel

    widths = (32, 64, 64, 64) if tiny else (192, 384, 576, 960)
    latent, down, up = 8 if tiny else 64, "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    net: Any = UNet2DConditionModel(
        sample_size=latent,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=2,
        attention_head_dim=tuple(D // 32 for D in widths),  # the library's word for heads
        cross_attention_dim=512,
        down_block_types=_blocks(down, 4, "DownBlock2D"),
        up_block_types=(up, up, up, "UpBlock2D"),
    )

    def denoise(z: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = net(z, times, encoder_hidden_states=z.new_ones(len(z), 1, 512)).sample
        return out

    decoder = _vq_decoder((128, 256, 512), 3, 8192, tiny, attention=False)
    return models.Diffusion(net, decoder, (3, latent), denoise)


def _gpt_config(D: int, layers: int, heads: int, length: int, N: int, tiny: bool) -> Any:
    from transformers import GPT2Config

    D, layers, heads, N = (64, 2, 2, 64) if tiny else (D, layers, heads, N)
    size: Any = {"n_embd": D, "n_layer": layers, "n_head": heads, "n_positions": length}
    return GPT2Config(vocab_size=N, bos_token_id=None, eos_token_id=None, **size)


def _taming(tiny: bool) -> models.Peer:
    """GPT of 48 layers, 24 heads, width 1536, on 256 codes (arXiv 2012.09841, as released).

    Before the f16 VQGAN of 1024 codes: CompVis/taming-transformers, configs/imagenet_vqgan.yaml.
    """
    from transformers import GPT2LMHeadModel

    gpt = GPT2LMHeadModel(_gpt_config(1536, 48, 24, 257, 1024, tiny))
    decoder = _vq_decoder((128, 128, 256, 256, 512), 256, 1024, tiny)
    return models.Autoregressive(gpt, decoder, (256, 2 if tiny else 16))


def _rq(D: int, heads: int, tiny: bool) -> models.Peer:
    """RQ-Transformer: 42 body and 6 head layers on 8 x 8 x 4 codes of 16384.

    kakaobrain/rq-vae-transformer, configs/imagenet256: stage2/*-1400M.yaml and *-3800M.yaml, and
    stage1/in256-rqvae-8x8x4.yaml for the decoder.
    """
    from transformers import GPT2LMHeadModel, GPT2Model

    body = GPT2Model(_gpt_config(D, 42, heads, 65, 1, tiny))
    head = GPT2LMHeadModel(_gpt_config(D, 6, heads, 4, 16384, tiny))
    decoder = _vq_decoder((128, 128, 256, 256, 512, 512), 256, 16384, tiny)
    return models.ResidualQuantized(body, head, decoder, (256, 2 if tiny else 8))


def _vim(tiny: bool) -> models.Peer:
    """VIM-Large, 1.7B, on 1024 codes of 8192 (arXiv 2110.04627).

    Only the count is matched, by 33 layers of width 2048. Decoder: its ViT-Base, 12 layers of 768
    on 8 x 8 pixels (restated in thuanz123/enhancing-transformers, imagenet_vitvq_base.yaml).
    """
    from transformers import GPT2LMHeadModel

    gpt = GPT2LMHeadModel(_gpt_config(2048, 33, 16, 1025, 8192, tiny))
    size, grid = ((64, 2, 2, 4), 4) if tiny else ((768, 12, 12, 32), 32)
    return models.Autoregressive(gpt, models.ViTDecoder(32, *size), (32, grid))


def _masked(
    config: GeneratorConfig, pixel: VQGANConfig, guidance: float, steps_per_call: int, tiny: bool
) -> models.Peer:
    # MaskGIT's own rules (google-research/maskgit): cosine schedule, confidence by probability
    rules = SamplingConfig(8, guidance, "constant", schedule="cosine", confidence="probability")
    if tiny:
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = GeneratorConfig(intermediate_size=128, image_seq_len=16, codebook_size=64, **shape)
        pixel = VQGANConfig(32, (1, 2), 1, 16, 64)
    return models.Masked(config, pixel, rules, steps_per_call)


def _maskgit(side: int, steps_per_call: int, tiny: bool) -> models.Peer:
    """TiTok's 177M MaskGIT-ViT on MaskGIT-VQGAN's 16 x 16 or 32 x 32 codes of 1024 (paper, 4.1)."""
    config = GeneratorConfig(image_seq_len=(side // 16) ** 2, codebook_size=1024)
    return _masked(config, VQGANConfig(), 0.0, steps_per_call, tiny)


def _magvit2(side: int, tiny: bool) -> models.Peer:
    """MAGVIT-v2: 307M, BERT-large's shape, two heads of 512 for 2**18 codes (arXiv 2310.05737).

    The decoder as TencentARC/Open-MAGVIT2 restates it (imagenet_lfqgan_256_L.yaml): four blocks a
    level, 18 channels. The table of codes stands for its bits.
    """
    size = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
    config = GeneratorConfig(image_seq_len=(side // 16) ** 2, codebook_size=2 * 512, **size)
    return _masked(config, VQGANConfig(num_res_blocks=4, z_channels=18), 1.0, 2, tiny)


_OURS = "titok_fast ImageBert, MaskGitVQGAN"
_DIT = "diffusers DiTTransformer2DModel, AutoencoderKL"
_UVIT = "plain class on titok_fast blocks, diffusers AutoencoderKL"
_UNET = "diffusers UNet2DConditionModel, VQModel"
_GPT = "transformers GPT2LMHeadModel with DynamicCache, "
_RQ = _GPT + "for body and head; diffusers VQModel"
_SD, _VIT, _RQVAE = "VAE (SD ft)", "MaskGIT-ViT", "RQ-VAE"

# name: tokenizer, generator, side, steps, samples/s and millions of parameters in the paper
_PUBLISHED: dict[str, tuple[str, str, int, int, float | None, int]] = {
    "ldm-8": ("Taming-VQGAN", "LDM-8", 256, 200, None, 258),
    "ldm-4": ("VAE (OpenImages)", "LDM-4", 256, 250, 0.4, 400),
    "uvit-l-2": (_SD, "UViT-L/2", 256, 50, 1.1, 287),
    "uvit-h-2": (_SD, "UViT-H/2", 256, 50, 0.6, 501),
    "dit-xl-2": (_SD, "DiT-XL/2", 256, 250, 0.6, 675),
    "taming": ("Taming-VQGAN", "Taming-Transformer", 256, 256, 7.5, 1400),
    "rq-1.4b": (_RQVAE, "RQ-Transformer", 256, 64, 16.1, 1400),
    "rq-3.8b": (_RQVAE, "RQ-Transformer", 256, 64, 9.7, 3800),
    "maskgit": ("MaskGIT-VQGAN", _VIT, 256, 8, 50.5, 177),
    "vim-large": ("ViT-VQGAN", "VIM-Large", 256, 1024, 0.3, 1700),
    "magvit-v2": ("LFQ", "MAGVIT-v2", 256, 64, 1.1, 307),
    "uvit-l-4-512": (_SD, "UViT-L/4", 512, 50, 1.0, 287),
    "uvit-h-4-512": (_SD, "UViT-H/4", 512, 50, 0.6, 501),
    "dit-xl-2-512": (_SD, "DiT-XL/2", 512, 250, 0.1, 675),
    "maskgit-512": ("MaskGIT-VQGAN", _VIT, 512, 12, 3.9, 177),
    "magvit-v2-512": ("LFQ", "MAGVIT-v2", 512, 64, 1.0, 307),
}
_BUILT: dict[str, tuple[str, Callable[[bool], models.Peer]]] = {
    "ldm-4": (_UNET, _ldm4),
    "uvit-l-2": (_UVIT, partial(_uvit, 1024, 20, 2, 256)),
    "uvit-h-2": (_UVIT, partial(_uvit, 1152, 28, 2, 256)),
    "dit-xl-2": (_DIT, partial(_dit, 256)),
    "taming": (_GPT + "diffusers VQModel", _taming),
    "rq-1.4b": (_RQ, partial(_rq, 1536, 24)),
    "rq-3.8b": (_RQ, partial(_rq, 2560, 40)),
    "maskgit": (_OURS, partial(_maskgit, 256, 8)),
    "vim-large": (_GPT + "plain ViT on titok_fast blocks", _vim),
    "magvit-v2": (_OURS, partial(_magvit2, 256)),
    "uvit-l-4-512": (_UVIT, partial(_uvit, 1024, 20, 4, 512)),
    "uvit-h-4-512": (_UVIT, partial(_uvit, 1152, 28, 4, 512)),
    "dit-xl-2-512": (_DIT, partial(_dit, 512)),
    "maskgit-512": (_OURS, partial(_maskgit, 512, 2)),
    "magvit-v2-512": (_OURS, partial(_magvit2, 512)),
}
SYSTEMS = tuple(System(name, *of, *_BUILT.get(name, ())) for name, of in _PUBLISHED.items())
