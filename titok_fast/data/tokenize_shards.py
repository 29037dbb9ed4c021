"""Images to shards of tokens, once, by any number of processes.

A shard holds the views of a fixed range of records, encoded in fixed batches, so its bytes do not
depend on the rank that makes it. Progress is recorded by the shards alone: a run that is started
again in their folder makes the missing ones, with any number of ranks.
"""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from titok_fast.data.crops import VIEWS, views
from titok_fast.data.reader import BadRecords
from titok_fast.data.sources import BadRecord, Source
from titok_fast.data.token_shards import (
    TokenSource,
    read_shard,
    shard_numbers,
    shard_path,
    write_shard,
)
from titok_fast.distributed import Ranks
from titok_fast.io.images import to_tensor
from titok_fast.io.sample_folder import claim_folder, differences, make_writable
from titok_fast.models.tokenizer import TiTok
from titok_fast.settings import __version__

_log = logging.getLogger(__name__)


def pretokenize(
    tokenizer: TiTok,
    source: Source,
    out_dir: str | Path,
    *,
    augmentation: str = "center_flip",
    batch_size: int = 128,
    shard_size: int = 4000,
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    max_bad_share: float = 0.01,
    ranks: Ranks | None = None,
    quiet: bool = True,
) -> int:
    """Encode every view of every image; call it on all ranks with the same arguments.

    Args:
        tokenizer: of kind "vq"; is moved to the rank's device and to `dtype`.
        source: of images.
        out_dir: folder for the shards: empty, or of an earlier run with the same arguments.
        augmentation: "center" (1 view), "center_flip" (2) or "ten_crop" (10), see `crops.views`.
        batch_size: views encoded at once. The bytes of the shards depend on it and on shard_size.
        shard_size: images per shard.
        dtype: of the weights while encoding.
        workers: threads that read images.
        max_bad_share: the run stops when a larger share of the records is damaged. Damaged records
            are left out.
        ranks: the ranks that share the work; None is this process alone, on the tokenizer's device.
        quiet: show no progress bar.

    Returns:
        Rows in the folder, on every rank: images times views, less the damaged.

    Raises:
        ValueError: an argument out of range, settings other than those of the earlier run or of
            rank 0, or too many damaged records.
        FileExistsError: the folder holds other files.
        RankLostError: another rank is gone; the shards made so far stay.
        OSError: the folder cannot be made or written to.
    """
    sizes = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"pretokenize wants {name} of 1 or more; got {size}")
    if augmentation not in VIEWS:
        raise ValueError(f"augmentation wants one of {', '.join(VIEWS)}; got {augmentation!r}")
    if tokenizer.config.quantize_mode != "vq":
        raise ValueError("a VAE tokenizer has no token ids: pretokenize wants one of kind vq")
    if isinstance(source, TokenSource):
        raise ValueError("pretokenize wants images; these data are tokens already")
    ranks = ranks or Ranks(0, 1, tokenizer.latent_tokens.device)
    manifest: dict[str, Any] = {
        "kind": "tokens",
        "titok_fast": __version__,
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "codebook_size": tokenizer.config.codebook_size,
        "augmentation": augmentation,
        "views": list(VIEWS[augmentation]),
        "source": source.describe(),
        "shard_size": shard_size,
        "shards": -(-len(source) // shard_size),
        "batch_size": batch_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    shards = _Shards(tokenizer.to(ranks.device, dtype).eval(), source, Path(out_dir), manifest)
    wanted, todo = ranks.agree(shards.plan)
    changed = differences(wanted, shards.manifest)
    if changed:
        raise ValueError(f"rank {ranks.rank} differs from rank 0: {'; '.join(changed)}")
    mine = todo[ranks.rank :: ranks.size]
    images = sum(len(shards.records(number)) for number in mine)
    bad = BadRecords(max_bad_share, len(source))
    bar = tqdm(total=images, desc="pretokenize", unit="image", disable=quiet or ranks.rank > 0)
    with ThreadPoolExecutor(workers) as pool, bar:  # shows the share of rank 0
        for number in mine:
            shards.make(number, pool, bad)
            bar.update(len(shards.records(number)))
    ranks.wait(
        lambda: (
            f"another rank is gone, or too slow: {shards.count_missing()} of {manifest['shards']} "
            "shards are missing. Run the same command again to make them, with any number of ranks"
        )
    )
    return ranks.agree(lambda: shards.count_rows(max_bad_share))


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


class _Shards:
    """Finds the missing shards of a run, makes one, and checks all."""

    def __init__(
        self, tokenizer: TiTok, source: Source, folder: Path, manifest: dict[str, Any]
    ) -> None:
        self.tokenizer, self.source, self.folder = tokenizer, source, folder
        self.manifest = json.loads(json.dumps(manifest))  # as a file gives it back
        digest = hashlib.sha256(json.dumps(manifest["source"], sort_keys=True).encode())
        self._about = {**self.manifest, "source": digest.hexdigest()}

    def plan(self) -> tuple[dict[str, Any], list[int]]:
        """Claim the folder; the manifest, and the numbers of the shards to make."""
        make_writable(self.folder)
        claim_folder(self.folder, self.manifest)
        return self.manifest, [n for n in range(self.manifest["shards"]) if not self._is_done(n)]

    def records(self, number: int) -> range:
        """The records of a shard."""
        size = self.manifest["shard_size"]
        return range(number * size, min((number + 1) * size, len(self.source)))

    def _is_done(self, number: int) -> bool:
        try:
            about = read_shard(shard_path(self.folder, number))[2]
        except FileNotFoundError:
            return False
        except ValueError as error:
            _log.warning("this shard is made again: %s", error)
            return False
        about.pop("skipped", None)
        if about != {**self._about, "shard": number}:
            _log.warning("shard %d is of another run and is made again", number)
            return False
        return True

    def make(self, number: int, pool: ThreadPoolExecutor, bad: BadRecords) -> None:
        """Read, encode and write one shard; the next batch is read while one is encoded."""
        A, K = len(self.manifest["views"]), self.tokenizer.config.num_latent_tokens
        records = self.records(number)
        step = max(1, self.manifest["batch_size"] // A)
        tokens, labels, skipped = [np.empty((0, K), np.int64)], list[int](), list[str]()
        pending = pool.map(self._read, records[:step])
        for first in range(0, len(records), step):
            results = list(pending)
            pending = pool.map(self._read, records[first + step : first + 2 * step])
            good = [result for result in results if not isinstance(result, str)]
            damaged = [
                (self.source.name(index), result)
                for index, result in zip(records[first:], results, strict=False)
                if isinstance(result, str)
            ]
            bad.add(len(results), damaged)
            skipped += [name for name, _ in damaged]
            if good:
                tokens.append(self._encode(np.concatenate([pixels for pixels, _ in good])))
                labels += [label for _, label in good for _ in range(A)]
        about = {**self._about, "shard": number, "skipped": skipped}
        path = shard_path(self.folder, number)
        write_shard(path, np.concatenate(tokens), np.array(labels, np.int64), about)

    def _read(self, index: int) -> tuple[np.ndarray, int] | str:
        """The views (A, S, S, 3) and label of a record, or what is wrong with it."""
        try:
            record = self.source.read(index)
            size = self.tokenizer.config.crop_size
            return views(record.values, size, self.manifest["augmentation"]), record.label
        except (BadRecord, OSError) as error:
            return str(error)

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 -> (B, K) int64."""
        images = to_tensor(pixels, self.tokenizer.config.crop_size)
        _, result = self.tokenizer.encode(images.to(self.tokenizer.latent_tokens.device))
        return result["min_encoding_indices"].squeeze(1).cpu().numpy()

    def count_missing(self) -> int:
        """How many shards are not there."""
        return self.manifest["shards"] - len(shard_numbers(self.folder))

    def count_rows(self, max_bad_share: float) -> int:
        """Check the finished folder; rows of all shards."""
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
