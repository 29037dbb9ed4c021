"""Labels to images, and images to tokens to images: what the README calls.

Seeds, batches and the fast mode come together here; the models stay thin.
"""

import logging
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from titok_fast.backends.compile_cache import use_cache_dir
from titok_fast.backends.cuda_graph import GraphDraw
from titok_fast.backends.techniques import (
    apply_techniques,
    check_techniques,
    compile_networks,
    resolve_fast,
)
from titok_fast.config import FLOAT_DTYPES
from titok_fast.io.batches import Images, Progress, as_output, check_output
from titok_fast.io.images import to_uint8
from titok_fast.loading import Sources, load, resolve
from titok_fast.models.generator import MaskedGenerator
from titok_fast.models.tokenizer import TiTok
from titok_fast.sampling.network import check_labels
from titok_fast.sampling.unmask import draw_inputs, sample, sample_seeds
from titok_fast.sampling_config import SamplingConfig
from titok_fast.tokenizer_pipeline import TokenizerPipeline, decode_pixels

Fast = bool | Literal["int8"]
_log = logging.getLogger(__name__)


class TiTokPipeline(TokenizerPipeline):
    """A tokenizer and, for drawing, its generator.

    Args:
        tokenizer: TiTok.
        generator: ImageBert or UViTBert for the same tokens; None for a tokenizer alone.
        sampling: settings used where a call names none.
        classes: names of the generator's classes in order, if they are known.

    Attributes:
        techniques: what `compile` chose; empty before.

    Raises:
        ValueError: the two disagree on tokens per image or on the codebook.
    """

    def __init__(
        self,
        tokenizer: TiTok,
        generator: MaskedGenerator | None = None,
        sampling: SamplingConfig | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer)
        self.generator = generator.eval() if generator is not None else None
        self.sampling = sampling or SamplingConfig()
        self.classes = tuple(classes)
        self.techniques: tuple[str, ...] = ()
        self._graphs: GraphDraw | None = None  # with technique "graph"
        if generator is None:
            return
        t, g = tokenizer.config, generator.config
        t.check_has_ids()
        if (t.num_latent_tokens, t.codebook_size) != (g.image_seq_len, g.codebook_size):
            raise ValueError(
                f"tokenizer has {t.num_latent_tokens} tokens of {t.codebook_size} codes, "
                f"generator {g.image_seq_len} of {g.codebook_size}: they do not belong together"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        *,
        tokenizer: str | None = None,
        generator: str | None = None,
        fast: Fast = False,
        **options: Any,
    ) -> "TiTokPipeline":
        """Load published or local weights.

        Args:
            name: a preset ("titok-l-32"): its configuration, settings, and hub repositories where
                the two below do not say otherwise.
            tokenizer: directory, weight file or hub repository.
            generator: the same.
            fast: True for `compile()` after loading, "int8" for 8-bit integers on a CPU.
            **options: `device`, `dtype`, `attention`, `revision` of `TiTok.from_pretrained`.

        Raises:
            ValueError: unknown preset, or neither a preset nor a tokenizer; see also `compile`.
            FileNotFoundError: see `TiTok.from_pretrained`; also a preset that was never published.
        """
        _check_fast(fast, **options)  # before a download
        sources = resolve(name, tokenizer, generator, revision=options.get("revision"))
        return cls.from_sources(sources, fast=fast, **options)

    @classmethod
    def random(
        cls, name: str, *, seed: int = 0, fast: Fast = False, **options: Any
    ) -> "TiTokPipeline":
        """A published architecture with random weights: for tests and timing.

        Args:
            name: a preset.
            seed: of the weights.
            fast: as in `from_pretrained`.
            **options: `device`, `dtype` as in `to`; `attention`.
        """
        return cls.from_sources(resolve(name, random_weights=True), fast=fast, seed=seed, **options)

    @classmethod
    def from_sources(
        cls, sources: Sources, *, fast: Fast = False, **options: Any
    ) -> "TiTokPipeline":
        """Load what `loading.resolve` found; arguments as in `from_pretrained`."""
        _check_fast(fast, **options)
        if "dtype" in options:
            options["dtype"] = _float_dtype(options["dtype"] or torch.float32)
        pipe = cls(*load(sources, **{k: v for k, v in options.items() if v is not None}))
        return pipe.compile(pipe.techniques_of(fast)) if fast else pipe

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "TiTokPipeline":
        """Move and cast both models, in place. Codebooks stay float32.

        Args:
            device: any torch device; or, as for torch's modules, the dtype alone.
            dtype: float32, bfloat16 or float16, or its name.

        Raises:
            ValueError: another dtype, two of them, or a compiled pipeline.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ValueError(f"`to` wants one dtype; got {device} and {dtype}")
            device, dtype = None, device
        if self.techniques:
            raise ValueError("a compiled pipeline stays where and what it is: call `to` before")
        dtype = None if dtype is None else _float_dtype(dtype)
        for model in (self.tokenizer, self.generator):
            if model is not None:
                model.to(device=device, dtype=dtype)
        return self

    def techniques_of(self, fast: Fast) -> tuple[str, ...]:
        """What `fast=` stands for where this pipeline is; ValueError for another value."""
        return resolve_fast(fast, self.device.type, self.tokenizer.dtype)

    def compile(
        self,
        techniques: Collection[str] | None = None,
        *,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> "TiTokPipeline":
        """Make the networks fast, in place and for good: call it last, after `to`.

        A compiled pipeline draws and tokenizes; it cannot be cast, moved, trained or saved.
        `techniques` then says what was chosen, and so does the log.

        Args:
            techniques: names from backends.techniques.TECHNIQUES. By default "packed" and
                "products" on a CPU, which keep the dtype, and "inductor" and "graph" on CUDA.
                `["products", "int8"]`, the fastest on a CPU with VNNI, loses a little precision.
            cache_dir: where "inductor" and "int8" keep compiled code for later processes; by
                default titok_fast/inductor in the user's cache folder. TORCHINDUCTOR_CACHE_DIR
                wins, and so does a folder that this process has used before: see
                backends/compile_cache.py.
            **options: of torch.compile, for "inductor"; the first call of each shape is slow.

        Raises:
            ValueError: unknown techniques, ones that do not fit the device, the dtype, the options
                or each other, or a pipeline that is compiled already.
        """
        if isinstance(techniques, str):
            raise ValueError(f"compile wants a list of techniques; got {techniques!r}")
        names = self.techniques_of(True) if techniques is None else tuple(techniques)
        if self.techniques:
            raise ValueError(f"this pipeline is compiled already: {', '.join(self.techniques)}")
        check_techniques(names, self.device.type, self.tokenizer.dtype, options)
        if "inductor" in names or "int8" in names:
            use_cache_dir(cache_dir)
        networks = [self.tokenizer, *([] if self.generator is None else [self.generator])]
        apply_techniques(networks, names)
        if "inductor" in names:
            compile_networks(self.tokenizer, self.generator, options)
        if "graph" in names and self.generator is not None:
            self._graphs = GraphDraw(self.generator, partial(_pictures, self.tokenizer))
        self.techniques = names
        _log.info("compiled for %s: %s", self.device, ", ".join(names))
        return self

    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        seeds: Tensor | None = None,
        tokens: Tensor | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        progress: Progress | None = None,
        **settings: Any,
    ) -> Images:
        """Draw one image per label.

        Args:
            labels: (B,) classes, 0..999 of ImageNet.
            seed: of the run; image i depends on (seed, i), its label and the settings only.
            seeds: (B,) int64 instead, one per image.
            tokens: (B, K) tokens to keep, the mask id where one is to be drawn.
            batch_size: images at once; by default 8 on a CPU, 128 on a GPU.
            output: "pil" list, "numpy" or "tensor" (B, S, S, 3) uint8.
            progress: called with the number of images finished since the last call.
            **settings: fields of SamplingConfig to change for this call.

        Raises:
            ValueError: a label, seed, token, setting or output that does not exist.
            MemoryError: the batch does not fit; the message names a smaller one.
        """
        check_output(output)
        config = self.sampling.updated(**settings)
        generator = self._generator()
        labels = torch.as_tensor(labels)
        if self.classes and labels.numel():
            check_labels(labels, len(self.classes), self.classes)
        seeds = sample_seeds(seed, len(labels)) if seeds is None else seeds
        size = self.default_batch_size if batch_size is None else batch_size

        def draw(part: slice) -> Tensor:
            kept = tokens[part] if tokens is not None else None
            if self._graphs is not None:
                inputs = draw_inputs(generator, labels[part], seeds[part], kept)
                return self._graphs(*inputs, config, batch_size=size)
            ids = sample(generator, labels[part], seeds[part], config, kept)
            return _pictures(self.tokenizer, ids)

        return as_output(self._in_batches(len(labels), size, draw, progress), output)

    def sample_tokens(
        self, labels: Sequence[int] | Tensor, *, seed: int = 0, **settings: Any
    ) -> Tensor:
        """The (B, K) int64 tokens of `pipe(labels, seed=seed, **settings)`, in one batch."""
        labels, generator = torch.as_tensor(labels), self._generator()
        seeds = sample_seeds(seed, len(labels))
        return sample(generator, labels, seeds, self.sampling.updated(**settings))

    def _generator(self) -> MaskedGenerator:
        if self.generator is None:
            raise ValueError("this pipeline has no generator: it can tokenize and reconstruct only")
        return self.generator


def _check_fast(
    fast: Fast, device: Any = None, dtype: str | torch.dtype | None = None, **_: Any
) -> None:
    kind, dtype = torch.device(device or "cpu").type, _float_dtype(dtype or torch.float32)
    check_techniques(resolve_fast(fast, kind, dtype), kind, dtype)


def _float_dtype(dtype: str | torch.dtype) -> torch.dtype:
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named not in [getattr(torch, name) for name in FLOAT_DTYPES]:
        raise ValueError(f"dtype wants float32, bfloat16 or float16; got {dtype}")
    assert isinstance(named, torch.dtype)
    return named


def _pictures(tokenizer: TiTok, ids: Tensor) -> Tensor:
    """(B, K) drawn ids -> (B, S, S, 3) uint8."""
    return to_uint8(decode_pixels(tokenizer, tokenizer.lookup(ids)), rounding="truncate")
