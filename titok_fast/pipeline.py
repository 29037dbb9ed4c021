"""Labels to images, and images to tokens to images: what the README calls.

Batches, seeds and conversions live here; the models stay thin.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from titok_fast.config import GeneratorConfig, SamplingConfig
from titok_fast.fast import apply_techniques, check_techniques, chosen, compile_networks
from titok_fast.files import fetch
from titok_fast.generator import ImageBert, MaskedGenerator, UViTBert, generator_class
from titok_fast.graphs import GraphDraw
from titok_fast.images import ImageLike, to_pil, to_tensor, to_uint8
from titok_fast.presets import preset
from titok_fast.sampling import draw_inputs, sample, sample_seeds
from titok_fast.tokenizer import TiTok
from titok_fast.warm import keep_compiled

OUTPUTS = ("pil", "numpy", "tensor")
Pictures = list[Image.Image] | np.ndarray | Tensor
_ID_TYPES = (torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class TiTokPipeline:
    """A tokenizer and, for drawing, its generator.

    Args:
        tokenizer: TiTok.
        generator: ImageBert or UViTBert for the same tokens; None for a tokenizer alone.
        sampling: settings used where a call gives none.

    Raises:
        ValueError: the two disagree on tokens per image or on the codebook.
    """

    def __init__(
        self,
        tokenizer: TiTok,
        generator: MaskedGenerator | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        self.tokenizer = tokenizer.eval()
        self.generator = generator.eval() if generator is not None else None
        self.sampling = sampling or SamplingConfig()
        self.techniques: tuple[str, ...] = ()  # of the fast mode, once `compile` was called
        self._graphs: GraphDraw | None = None  # with technique "graph"
        if generator is None:
            return
        t, g = tokenizer.config, generator.config
        if t.quantize_mode != "vq":
            raise ValueError("a VAE tokenizer has no token ids, so no generator can draw them")
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
        fast: bool | str | Collection[str] = False,
        **options: Any,
    ) -> "TiTokPipeline":
        """Load published or local weights.

        Args:
            name: a preset ("titok-l-32"): its configuration, settings, and hub repositories where
                the two below do not say otherwise.
            tokenizer: directory, weight file or hub repository.
            generator: the same.
            fast: True for `compile()` after loading, or what `compile` is to be given.
            **options: `device`, `dtype`, `attention`, `revision` of `TiTok.from_pretrained`.

        Raises:
            ValueError: unknown preset, or neither a preset nor a tokenizer; see also `compile`.
            FileNotFoundError: see `TiTok.from_pretrained`; also a preset that was never published.
        """
        known = preset(name) if name else None
        tokenizer = tokenizer or (known.tokenizer_hub if known else None)
        generator = generator or (known.generator_hub if known else None)
        if tokenizer is None:
            if known is None:
                raise ValueError("from_pretrained wants a preset name, or tokenizer=")
            raise FileNotFoundError(f"no weights of {name} were published: pass tokenizer=")
        place, dtype = torch.device(options.get("device") or "cpu").type, options.get("dtype")
        check_techniques(chosen(fast, place), place, dtype or torch.float32)  # before a download
        t = TiTok.from_pretrained(tokenizer, config=known.tokenizer if known else None, **options)
        g, g_config = None, known.generator if known else None
        if generator is not None:
            known_class = generator_class(g_config) if g_config else None
            g_class = known_class or _generator_class_of(generator, options)
            g = g_class.from_pretrained(generator, config=g_config, **options)
        return cls(t, g, known.sampling if known else None)._made(fast)

    @classmethod
    def random(
        cls,
        name: str,
        *,
        seed: int = 0,
        fast: bool | str | Collection[str] = False,
        **options: Any,
    ) -> "TiTokPipeline":
        """A published architecture with random weights: for tests and timing.

        Args:
            name: a preset.
            seed: of the weights.
            fast: as in `from_pretrained`.
            **options: `device`, `dtype` as in `to`; `attention`.
        """
        known, attention = preset(name), options.pop("attention", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            t = TiTok(known.tokenizer, attention=attention)
            if known.tokenizer.finetune_decoder:
                # as large as trained ones: the norms after tiny codes would blow up rounding
                torch.nn.init.normal_(t.pixel_quantize.embedding.weight)
            g = None
            if known.generator is not None:
                g = generator_class(known.generator)(known.generator, attention=attention)
        return cls(t, g, known.sampling).to(**options)._made(fast)

    def _made(self, fast: bool | str | Collection[str]) -> "TiTokPipeline":
        return self.compile(chosen(fast, self.device.type)) if fast else self

    def to(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> "TiTokPipeline":
        """Move and cast both models, in place. Codebooks stay float32.

        Args:
            device: any torch device.
            dtype: float32, bfloat16 or float16, or its name.

        Raises:
            ValueError: another dtype, or a compiled pipeline.
        """
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if self.techniques:
            raise ValueError("a compiled pipeline stays where and what it is: call `to` before")
        if dtype is not None and dtype not in _FLOATS:
            raise ValueError(f"dtype wants float32, bfloat16 or float16; got {dtype}")
        for model in (self.tokenizer, self.generator):
            if model is not None:
                model.to(device=device, dtype=dtype)
        return self

    def compile(
        self,
        techniques: str | Collection[str] | None = None,
        *,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> "TiTokPipeline":
        """Make the networks fast, in place and for good: call it last, after `to`.

        A compiled pipeline draws and tokenizes; it cannot be cast, moved, trained or saved.

        Args:
            techniques: names from titok_fast.fast.TECHNIQUES, or a mode: "default" is "packed" and
                "products" on a CPU, which keep the dtype, and "inductor" and "graph" on CUDA;
                "int8", the fastest on a CPU with VNNI, loses a little precision.
            cache_dir: where "inductor" and "int8" keep compiled code for later processes; by
                default titok_fast/inductor in the user's cache folder. TORCHINDUCTOR_CACHE_DIR
                wins, and so does a folder that this process has used before: see warm.py.
            **options: of torch.compile, for "inductor"; the first call of each shape is slow.

        Raises:
            ValueError: unknown techniques, ones that do not fit the device, the dtype, the options
                or each other, or a pipeline that is compiled already.
        """
        techniques = chosen(techniques, self.device.type)
        if self.techniques:
            raise ValueError(f"this pipeline is compiled already: {', '.join(self.techniques)}")
        check_techniques(techniques, self.device.type, self.tokenizer.dtype, options)
        if "inductor" in techniques or "int8" in techniques:
            keep_compiled(cache_dir)
        networks = [self.tokenizer, *([] if self.generator is None else [self.generator])]
        apply_techniques(networks, techniques)
        if "inductor" in techniques:
            compile_networks(self.tokenizer, self.generator, options)
        if "graph" in techniques and self.generator is not None:
            self._graphs = GraphDraw(self.generator, partial(_pictures, self.tokenizer))
        self.techniques = techniques
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.latent_tokens.device

    @property
    def default_batch_size(self) -> int:
        """Pictures at once where a call names no number: 8 on a CPU, 128 elsewhere."""
        return 8 if self.device.type == "cpu" else 128

    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        seeds: Tensor | None = None,
        tokens: Tensor | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        progress: Callable[[int], object] | None = None,
        **settings: Any,
    ) -> Pictures:
        """Draw one picture per label.

        Args:
            labels: (B,) classes 0..999.
            seed: of the run; picture i depends on (seed, i), its label and the settings only.
            seeds: (B,) int64 instead, one per picture.
            tokens: (B, K) tokens to keep, the mask id where one is to be drawn.
            batch_size: pictures at once; by default 8 on a CPU, 128 on a GPU.
            output: "pil" list, "numpy" or "tensor" (B, S, S, 3) uint8.
            progress: called with the number of pictures finished since the last call.
            **settings: fields of SamplingConfig to change for this call.

        Raises:
            ValueError: a label, seed, token, setting or output that does not exist.
            MemoryError: the batch does not fit; the message names a smaller one.
        """
        _check_output(output)
        config = self.sampling.but(**settings)
        generator = self._generator()
        labels = torch.as_tensor(labels)
        seeds = sample_seeds(seed, len(labels)) if seeds is None else seeds
        size = self.default_batch_size if batch_size is None else batch_size

        def draw(part: slice) -> Tensor:
            kept = tokens[part] if tokens is not None else None
            if self._graphs is not None:
                given = draw_inputs(generator, labels[part], seeds[part], kept)
                return self._graphs(*given, config, batch_size=size)
            return _pictures(
                self.tokenizer, sample(generator, labels[part], seeds[part], config, kept)
            )

        return _present(self._batches(len(labels), size, draw, progress), output)

    def sample_tokens(
        self, labels: Sequence[int] | Tensor, *, seed: int = 0, **settings: Any
    ) -> Tensor:
        """The (B, K) int64 tokens of `pipe(labels, seed=seed, **settings)`, in one batch."""
        labels, generator = torch.as_tensor(labels), self._generator()
        seeds = sample_seeds(seed, len(labels))
        return sample(generator, labels, seeds, self.sampling.but(**settings))

    def tokenize(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        dtype: torch.dtype = torch.int64,
        batch_size: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Images to tokens.

        Args:
            images: files, PIL images, uint8 arrays, or float tensors in [0, 1] of the right size.
            dtype: int16, int32 or int64; codebooks up to 32768 fit int16.
            batch_size: images at once; by default 8 on a CPU, 128 on a GPU.
            progress: called with the number of images finished since the last call.

        Returns:
            (B, K) ids.

        Raises:
            ValueError: a VAE tokenizer, another dtype, or an unusable image (images.py).
            MemoryError: the batch does not fit.
        """
        cfg = self.tokenizer.config
        if cfg.quantize_mode != "vq":
            raise ValueError("a VAE tokenizer has no token ids: use tokenizer.encode(images)")
        if dtype not in _ID_TYPES or cfg.codebook_size - 1 > torch.iinfo(dtype).max:
            raise ValueError(
                f"ids below {cfg.codebook_size} want int16, int32 or int64; got {dtype}"
            )
        batch = to_tensor(images, cfg.crop_size)

        @torch.no_grad()
        def encode(part: slice) -> Tensor:
            _, result = self.tokenizer.encode(batch[part].to(self.device))
            return result["min_encoding_indices"].squeeze(1).to(dtype)

        parts = list(self._batches(len(batch), batch_size, encode, progress))
        return torch.cat(parts) if parts else torch.empty(0, cfg.num_latent_tokens, dtype=dtype)

    def detokenize(
        self,
        ids: Tensor,
        *,
        batch_size: int | None = None,
        output: str = "pil",
        progress: Callable[[int], object] | None = None,
    ) -> Pictures:
        """Tokens to images, rounded to uint8.

        Args:
            ids: (B, K) integers in [0, N).
            batch_size: images at once.
            output: "pil", "numpy" or "tensor".
            progress: called with the number of images finished since the last call.

        Raises:
            ValueError: ids of another shape, type or range.
            MemoryError: the batch does not fit.
        """
        _check_output(output)
        ids = torch.as_tensor(ids)

        def decode(part: slice) -> Tensor:
            codes = self.tokenizer.codes(ids[part].to(self.device))
            return to_uint8(_pixels(self.tokenizer, codes), rounding="round")

        return _present(self._batches(len(ids), batch_size, decode, progress), output)

    def reconstruct(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int | None = None,
        output: str = "pil",
        progress: Callable[[int], object] | None = None,
    ) -> Pictures:
        """Images through the tokenizer and back; a VAE uses its mean. Arguments as `tokenize`."""
        _check_output(output)
        cfg = self.tokenizer.config
        batch = to_tensor(images, cfg.crop_size)

        @torch.no_grad()
        def both(part: slice) -> Tensor:
            z, result = self.tokenizer.encode(batch[part].to(self.device))
            codes = result.mode() if cfg.quantize_mode == "vae" else z
            return to_uint8(_pixels(self.tokenizer, codes), rounding="round")

        return _present(self._batches(len(batch), batch_size, both, progress), output)

    def _generator(self) -> MaskedGenerator:
        if self.generator is None:
            raise ValueError("this pipeline has no generator: it can tokenize and reconstruct only")
        return self.generator

    def _batches(
        self,
        total: int,
        batch_size: int | None,
        work: Callable[[slice], Tensor],
        progress: Callable[[int], object] | None,
    ) -> Iterator[Tensor]:
        size = self.default_batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size wants at least 1; got {size}")
        for start in range(0, total, size) or range(1):  # an empty batch is checked as well
            with _memory_advice(min(size, max(total, 1))):
                part = work(slice(start, start + size)).cpu()
            if progress is not None:
                progress(len(part))
            yield part


@torch.no_grad()
def _pixels(tokenizer: TiTok, codes: Tensor) -> Tensor:
    if tokenizer.config.is_legacy and not tokenizer.config.finetune_decoder:
        raise ValueError(
            "a stage-1 tokenizer predicts proxy codes, not pixels: use MaskGitVQGAN.decode"
        )
    return tokenizer.decode(codes)


def _pictures(tokenizer: TiTok, ids: Tensor) -> Tensor:
    """(B, K) drawn ids -> (B, S, S, 3) uint8."""
    return to_uint8(_pixels(tokenizer, tokenizer.lookup(ids)), rounding="truncate")


def _generator_class_of(source: str, options: dict[str, Any]) -> type[ImageBert] | type[UViTBert]:
    _, config_file = fetch(source, revision=options.get("revision"))
    if config_file is None:
        raise FileNotFoundError(f"{source} has no config.json: load the generator by its class")
    return generator_class(GeneratorConfig.from_official(config_file))


def _check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output wants one of {OUTPUTS}; got {output!r}")


def _present(parts: Iterator[Tensor], output: str) -> Pictures:
    pixels = torch.cat(list(parts))
    if output == "tensor":
        return pixels
    return pixels.numpy() if output == "numpy" else to_pil(pixels)


@contextmanager
def _memory_advice(size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "allocate memory" not in str(error):  # the CPU allocator's RuntimeError
            raise
        advice = f"try batch_size={size // 2}" if size > 1 else "even one picture does not fit"
        raise MemoryError(f"out of memory with batch_size={size}: {advice}. ({error})") from error
