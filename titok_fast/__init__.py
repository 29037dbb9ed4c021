"""titok_fast: TiTok (arXiv 2406.07550) and its MaskGIT generator, weight-compatible and fast."""

from titok_fast.config import GeneratorConfig, SamplingConfig, TokenizerConfig, VQGANConfig
from titok_fast.generator import ImageBert, UViTBert, generator_class
from titok_fast.maskgit_vqgan import MaskGitVQGAN
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import PRESETS, preset
from titok_fast.tokenizer import TiTok

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "GeneratorConfig",
    "ImageBert",
    "MaskGitVQGAN",
    "SamplingConfig",
    "TiTok",
    "TiTokPipeline",
    "TokenizerConfig",
    "UViTBert",
    "VQGANConfig",
    "generator_class",
    "preset",
]
