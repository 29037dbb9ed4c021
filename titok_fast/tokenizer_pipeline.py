"""Images to tokens to images, in batches: the half of TiTokPipeline that needs no generator."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from titok_fast.io.batches import Images, Progress, as_output, check_output, in_batches
from titok_fast.io.images import ImageLike, to_tensor, to_uint8
from titok_fast.models.tokenizer import TiTok

_ID_DTYPES = (torch.int16, torch.int32, torch.int64)


class TokenizerPipeline:
    """A tokenizer with batches and conversions around it.

    Args:
        tokenizer: TiTok; is put into eval mode.
    """

    def __init__(self, tokenizer: TiTok) -> None:
        self.tokenizer = tokenizer.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.latent_tokens.device

    @property
    def default_batch_size(self) -> int:
        """Images at once where a call names no number: 8 on a CPU, 128 elsewhere."""
        return 8 if self.device.type == "cpu" else 128

    def tokenize(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        dtype: torch.dtype = torch.int64,
        batch_size: int | None = None,
        progress: Progress | None = None,
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
            ValueError: a VAE tokenizer, another dtype, or an unusable image (io/images.py).
            MemoryError: the batch does not fit.
        """
        cfg = self.tokenizer.config
        cfg.check_has_ids()
        if dtype not in _ID_DTYPES or cfg.codebook_size - 1 > torch.iinfo(dtype).max:
            raise ValueError(
                f"ids below {cfg.codebook_size} want int16, int32 or int64; got {dtype}"
            )
        batch = to_tensor(images, cfg.crop_size)

        @torch.no_grad()
        def encode(part: slice) -> Tensor:
            _, result = self.tokenizer.encode(batch[part].to(self.device))
            return result["min_encoding_indices"].squeeze(1).to(dtype)

        parts = list(self._in_batches(len(batch), batch_size, encode, progress))
        return torch.cat(parts) if parts else torch.empty(0, cfg.num_latent_tokens, dtype=dtype)

    def detokenize(
        self,
        ids: Tensor,
        *,
        batch_size: int | None = None,
        output: str = "pil",
        progress: Progress | None = None,
    ) -> Images:
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
        check_output(output)
        ids = torch.as_tensor(ids)

        def decode(part: slice) -> Tensor:
            codes = self.tokenizer.codes(ids[part].to(self.device))
            return to_uint8(decode_pixels(self.tokenizer, codes), rounding="round")

        return as_output(self._in_batches(len(ids), batch_size, decode, progress), output)

    def reconstruct(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int | None = None,
        output: str = "pil",
        progress: Progress | None = None,
    ) -> Images:
        """Images through the tokenizer and back; a VAE uses its mean. Arguments as `tokenize`."""
        check_output(output)
        cfg = self.tokenizer.config
        batch = to_tensor(images, cfg.crop_size)

        @torch.no_grad()
        def there_and_back(part: slice) -> Tensor:
            z, result = self.tokenizer.encode(batch[part].to(self.device))
            codes = result.mode() if cfg.quantize_mode == "vae" else z
            return to_uint8(decode_pixels(self.tokenizer, codes), rounding="round")

        parts = self._in_batches(len(batch), batch_size, there_and_back, progress)
        return as_output(parts, output)

    def _in_batches(
        self,
        total: int,
        batch_size: int | None,
        work: Callable[[slice], Tensor],
        progress: Progress | None,
    ) -> Iterator[Tensor]:
        size = self.default_batch_size if batch_size is None else batch_size
        return in_batches(total, size, work, progress)


@torch.no_grad()
def decode_pixels(tokenizer: TiTok, codes: Tensor) -> Tensor:
    """Codes (B, C, 1, K) to pixels (B, 3, S, S); ValueError for a stage-1 tokenizer."""
    tokenizer.config.check_has_pixels()
    return tokenizer.decode(codes)
