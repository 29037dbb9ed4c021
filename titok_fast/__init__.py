"""titok_fast: TiTok (arXiv 2406.07550) and its MaskGIT generator, weight-compatible and fast.

Imports point up this list only; `docs/design.md` says why.
Reading order: processor, settings, sampling_config, config, presets, io, distributed, sampling,
models, backends, data, loading, tokenizer_pipeline, pipeline, costs, training, evaluation,
integrations, cli.
"""

from titok_fast.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok_fast.models.generator import ImageBert, UViTBert, generator_class
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.vqgan import MaskGitVQGAN
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import PRESETS, preset
from titok_fast.sampling_config import SamplingConfig
from titok_fast.settings import __version__ as __version__

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
