"""Making one shard of tokens: read pictures, cut their views, encode, write."""

import hashlib
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titok_fast.data.crops import views
from titok_fast.data.reader import BadRecords
from titok_fast.data.sources import BadRecord, Record, Source
from titok_fast.data.token_shards import read_shard, shard_numbers, shard_path, write_shard
from titok_fast.io.images import to_tensor
from titok_fast.models.tokenizer import TiTok

_log = logging.getLogger(__name__)


def tokenizer_fingerprint(tokenizer: TiTok) -> str:
    """SHA-256 of the weights that decide token ids.

    The decoder is left out: the tokens of a stage-1 tokenizer are those of its stage 2.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name == "latent_tokens" or name.startswith(("encoder.", "quantize.")):
            values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            digest.update(f"{name} {values.shape}".encode())
            digest.update(values.astype("<f4").data)
    return digest.hexdigest()


class ShardMaker:
    """Makes any shard of a run.

    Args:
        tokenizer: on its device.
        source: of pictures.
        folder: for the shards.
        manifest: settings that decide the bytes, plain JSON values.
    """

    def __init__(
        self, tokenizer: TiTok, source: Source, folder: Path, manifest: dict[str, Any]
    ) -> None:
        self.tokenizer, self.source, self.folder = tokenizer, source, folder
        self.manifest = json.loads(json.dumps(manifest))  # as a file gives it back
        digest = hashlib.sha256(json.dumps(manifest["source"], sort_keys=True).encode())
        self._about = {**self.manifest, "source": digest.hexdigest()}

    def records(self, number: int) -> range:
        """The records of a shard."""
        size = self.manifest["shard_size"]
        return range(number * size, min((number + 1) * size, len(self.source)))

    def is_done(self, number: int) -> bool:
        """Whether a shard is there, whole, and of this run."""
        try:
            about = read_shard(shard_path(self.folder, number))[2]
        except FileNotFoundError:
            return False
        except ValueError as error:
            _log.warning("made again: %s", error)
            return False
        about.pop("skipped", None)
        if about != {**self._about, "shard": number}:
            _log.warning("made again: shard %d is of another run", number)
            return False
        return True

    def make(self, number: int, pool: ThreadPoolExecutor, bad: BadRecords) -> None:
        """Read, encode and write one shard; the next batch is read meanwhile."""
        A, K = len(self.manifest["views"]), self.tokenizer.config.num_latent_tokens
        records = self.records(number)
        step = max(1, self.manifest["batch_size"] // A)
        tokens, labels, skipped = [np.empty((0, K), np.int64)], list[int](), list[str]()

        def start(first: int) -> list[Future[tuple[np.ndarray, int] | str]]:
            return [pool.submit(self._read, index) for index in records[first : first + step]]

        waiting = start(0)
        for first in range(0, len(records), step):
            results = [future.result() for future in waiting]
            waiting = start(first + step)
            good = [result for result in results if not isinstance(result, str)]
            damaged = [
                (self.source.name(index), result)
                for index, result in zip(records[first:], results, strict=False)
                if isinstance(result, str)
            ]
            bad.add(len(results), damaged)
            skipped += [name for name, _ in damaged]
            if good:
                tokens.append(self._encode(np.concatenate([pictures for pictures, _ in good])))
                labels += [label for _, label in good for _ in range(A)]
        about = {**self._about, "shard": number, "skipped": skipped}
        path = shard_path(self.folder, number)
        write_shard(path, np.concatenate(tokens), np.array(labels, np.int64), about)

    def _read(self, index: int) -> tuple[np.ndarray, int] | str:
        """The views (A, S, S, 3) and label of a record, or what is wrong with it."""
        try:
            record = self.source.read(index)
            assert isinstance(record, Record)
            S = self.tokenizer.config.crop_size
            return views(record.image, S, self.manifest["augmentation"]), record.label
        except (BadRecord, OSError) as error:
            return str(error)

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 -> (B, K) int64."""
        images = to_tensor(pixels, self.tokenizer.config.crop_size)
        _, result = self.tokenizer.encode(images.to(self.tokenizer.latent_tokens.device))
        return result["min_encoding_indices"].squeeze(1).cpu().numpy()

    def count_rows(self, max_bad_share: float) -> int:
        """Look over the finished folder.

        Returns:
            Rows of all shards.

        Raises:
            FileNotFoundError: a shard is not there.
            ValueError: a damaged shard, or too many records were left out.
        """
        numbers = range(self.manifest["shards"])
        missing = sorted(set(numbers) - set(shard_numbers(self.folder)))
        if missing:
            raise FileNotFoundError(
                f"shard {missing[0]} was made but is not in {self.folder}: all machines want the "
                "same folder"
            )
        for path in self.folder.glob(".tokens-*.safetensors"):  # what killed writers left
            path.unlink()
        rows, skipped = 0, list[str]()
        for number in numbers:
            _, labels, about = read_shard(shard_path(self.folder, number))
            rows += len(labels)
            skipped += about["skipped"]
        if len(skipped) > max_bad_share * len(self.source):
            raise ValueError(
                f"{len(skipped)} of {len(self.source)} records are damaged, more than "
                f"max_bad_share {max_bad_share:g}; {skipped[0]} is the first"
            )
        return rows
