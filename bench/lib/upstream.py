"""Run a checkout of bytedance/1d-tokenizer as a competitor: its own classes, our weights.

The tensors are shared, not copied: both implementations read the same memory.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lib.harness import command_output
from lib.weights import NoInit
from omegaconf import OmegaConf
from torch import Tensor

from titok_fast.config import TokenizerConfig, VQGANConfig
from titok_fast.models.generator import MaskedGenerator
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.weights import PretrainedModel, to_official
from titok_fast.sampling_config import SamplingConfig

# of `generate`
_SETTINGS = "guidance_scale guidance_decay guidance_scale_pow randomize_temperature"
_SETTINGS += " softmax_temperature_annealing num_sample_steps"


class Upstream:
    """Upstream's tokenizer and generator with the float32 weights of ours.

    Raises:
        ImportError: upstream's own requirements are not installed.
    """

    def __init__(
        self, checkout: Path, tokenizer: TiTok, generator: MaskedGenerator | None = None
    ) -> None:
        def frozen(ours: PretrainedModel) -> Any:
            return model_of(checkout, ours).eval().requires_grad_(False)

        self.tokenizer = frozen(tokenizer)
        self.generator: Any = None if generator is None else frozen(generator)

    @torch.no_grad()
    def ids(self, labels: Tensor, config: SamplingConfig) -> Tensor:
        """(B, K) ids; schedule and confidence are upstream's own."""
        settings = {name: getattr(config, name) for name in _SETTINGS.split()}
        return self.generator.generate(condition=labels, **settings).view(len(labels), -1)

    @torch.no_grad()
    def draw(self, labels: Tensor, config: SamplingConfig) -> Tensor:
        """What upstream's `sample_fn` does, left as a tensor: (B, S, S, 3) uint8 on the CPU."""
        pixels = self.tokenizer.decode_tokens(self.ids(labels, config)).clamp(0.0, 1.0)
        return (pixels * 255.0).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8)


def load(
    checkout: Path | None, tokenizer: TiTok, generator: MaskedGenerator | None = None
) -> Upstream | None:
    """The competitor, or None where none was asked for or upstream has no such model."""
    if checkout is None or not supports(tokenizer.config):
        return None
    return Upstream(checkout, tokenizer, generator)


def supports(config: TokenizerConfig) -> bool:
    """Whether upstream's classes can be built for a configuration: one of its named sizes."""
    sizes = config.vit_enc_model_size, config.vit_dec_model_size
    named = all(isinstance(size, str) for size in sizes)
    return named and config.pixel == VQGANConfig() and config.proxy_block == 1


def find(checkout: str | Path) -> Path:
    """The checkout as an absolute path; FileNotFoundError where it holds no modeling/titok.py."""
    path = Path(checkout).expanduser().resolve()
    if not (path / "modeling" / "titok.py").is_file():
        raise FileNotFoundError(
            f"{checkout} holds no modeling/titok.py: --upstream wants a clone of "
            "https://github.com/bytedance/1d-tokenizer"
        )
    return path


def model_of(checkout: Path, ours: PretrainedModel) -> Any:
    """Upstream's class of a model of ours on the same tensors; those it freezes stay frozen."""
    module = "titok" if isinstance(ours, TiTok) else "maskgit"
    with imports_from(checkout), NoInit():
        try:
            # both have the same names: TiTok, ImageBert, UViTBert
            kind = getattr(importlib.import_module(f"modeling.{module}"), type(ours).__name__)
        except ImportError as error:
            raise ImportError(
                f"upstream cannot be imported ({error}): pip install 'titok_fast[bench]' has what "
                "its models need"
            ) from error
        model = kind(OmegaConf.create(ours.config.to_official()))
    state = to_official(ours.state_dict(), ours.kind)
    model.load_state_dict(state, strict=True, assign=True)
    device = next(iter(state.values())).device  # BERT keeps its position ids outside the state
    return model.to(device)


def commit(checkout: Path) -> str | None:
    """The revision of a checkout, or None where git cannot tell."""
    return command_output("git", "-C", str(checkout), "rev-parse", "HEAD")


@contextmanager
def imports_from(checkout: Path) -> Iterator[None]:
    """Upstream is no package: its files import each other from its root.

    Our own root is hidden meanwhile, since transformers takes a folder `kernels` for a package that
    it knows. What upstream prints on import goes to stderr; its FutureWarnings are dropped.
    """
    root, before = Path(__file__).resolve().parents[2], sys.path[:]
    sys.path[:] = [str(find(checkout)), *(p for p in before if Path(p).resolve() != root)]
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        sys.path[:] = before
