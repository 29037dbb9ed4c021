"""Draw images by one CUDA graph for each batch size, from labels and seeds to bytes.

A draw is thousands of small kernels, and most take less time than their launch. One call replays
them all: the sampling loop and the decoder have static shapes and never wait for the device.

Not yet run on a GPU. On a CPU the tests prove that the recorded work never waits for the device,
and, with a fake recorder, that the images are those of the plain pipeline; the tests marked `gpu`
do the same with the real one.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from titok_fast.models.generator import MaskedGenerator
from titok_fast.sampling.unmask import unmask
from titok_fast.sampling_config import SamplingConfig

MAX_GRAPHS = 64  # each holds memory for kernels and a result, and a sweep over settings makes many
_WARMUPS = 3  # the first call compiles and tunes; libraries choose algorithms in the others


# the tensors to fill, (B, K) ids, (B,) class ids and (B,) seeds, all int64, and what runs on them
_Recording = tuple[tuple[Tensor, ...], Callable[[], Tensor]]

# Records `work(*inputs)`, and returns a function that runs it again on the inputs' new values. That
# function returns the same tensor each time, valid until another recording of the object runs.
Capture = Callable[[Callable[..., Tensor], Sequence[Tensor]], Callable[[], Tensor]]


class CudaCapture:
    """Records CUDA graphs that share one private memory pool.

    They may share it because none runs while another's result is still in use.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # one stream for all: a block of the pool is reused only on the stream that allocated it
        self._stream = torch.cuda.Stream(device)

    def __call__(
        self, work: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> Callable[[], Tensor]:
        """See Capture. The first recording compiles whatever the work compiles.

        Raises:
            torch.OutOfMemoryError: the device is too small for this batch.
            RuntimeError: the work does something that a graph cannot hold.
        """
        with torch.cuda.device(self._stream.device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARMUPS):
                    work(*inputs)
            before.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: another thread may write images or load data meanwhile
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    result = work(*inputs)
            except RuntimeError as error:
                # the first error is the context of the one that ending the capture raises
                cause = error.__context__ or error
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise RuntimeError(
                    f"technique 'graph' cannot record these networks: {cause}; compile without "
                    "it, as in pipe.compile(['inductor'])"
                ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class GraphDraw:
    """Draws batches by replaying recordings, one for each bucket and SamplingConfig.

    For one stream at a time: a call reuses the memory of the one before. `to_images` turns (B, K)
    ids into (B, S, S, 3) uint8 without a wait for the device; `capture` is by default CudaCapture.
    """

    def __init__(
        self,
        generator: MaskedGenerator,
        to_images: Callable[[Tensor], Tensor],
        capture: Capture | None = None,
    ) -> None:
        self._generator, self._to_images = generator, to_images
        self._device = generator.lm_head.weight.device
        self._capture = capture or CudaCapture(self._device)
        self._recordings: OrderedDict[tuple[int, SamplingConfig], _Recording] = OrderedDict()
        self._lock = Lock()

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        class_ids: Tensor,
        seeds: Tensor,
        config: SamplingConfig,
        *,
        batch_size: int,
    ) -> Tensor:
        """Draw a batch; the first call for a bucket and settings records, which takes a while.

        Args:
            ids: (B, K) int64, the mask id where a token is to be drawn; checked by the caller.
            class_ids: (B,) int64 in token space.
            seeds: (B,) int64, one per image, so an image does not depend on the bucket.
            config: settings.
            batch_size: largest B, and largest bucket.

        Returns:
            (B, S, S, 3) uint8 on the device, in new memory.
        """
        count = len(ids)
        with self._lock:
            inputs, replay = self._recording(bucket(count, batch_size), config)
            for buffer, values in zip(inputs, (ids, class_ids, seeds), strict=True):
                buffer[:count].copy_(values)  # later rows keep their values of an earlier call
            return replay()[:count].clone()

    def _recording(self, size: int, config: SamplingConfig) -> _Recording:
        key = size, config
        if key not in self._recordings:
            while len(self._recordings) >= MAX_GRAPHS:
                self._recordings.popitem(last=False)

            def draw(ids: Tensor, class_ids: Tensor, seeds: Tensor) -> Tensor:
                return self._to_images(unmask(self._generator, ids, class_ids, seeds, config))

            cfg = self._generator.config
            inputs = (  # of a valid draw: all masked, no class
                torch.full((size, cfg.image_seq_len), cfg.mask_token_id, device=self._device),
                torch.full((size,), cfg.no_class_id, device=self._device),
                torch.zeros(size, dtype=torch.int64, device=self._device),
            )
            self._recordings[key] = inputs, self._capture(draw, inputs)
        self._recordings.move_to_end(key)
        return self._recordings[key]


def bucket(count: int, batch_size: int) -> int:
    """Rows of the recording for `count` images: the next power of two, at most `batch_size`."""
    return min(1 << (max(count, 1) - 1).bit_length(), batch_size)
