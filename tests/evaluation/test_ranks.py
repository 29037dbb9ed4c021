"""Several ranks share one evaluation, and all get the figures of one rank."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from titok_fast.distributed import my_share
from titok_fast.evaluation.generation import Reference, evaluate_generation
from titok_fast.evaluation.networks import FashionFeatures
from titok_fast.evaluation.pictures import ArrayPictures
from titok_fast.evaluation.reconstruction import evaluate_reconstruction
from titok_fast.io.npz import Batch
from titok_fast.models.classifier import FashionClassifier


class Counted(ArrayPictures):
    """Remembers which pictures were read."""

    def __init__(self, n: int) -> None:
        drawn = np.random.default_rng(n)
        images = drawn.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        super().__init__(images, np.arange(n) % 10)
        self.read_indices: list[int] = []

    def read(self, part: range) -> Batch:
        self.read_indices += part
        return super().read(part)


def figures() -> tuple[dict[str, float], dict[str, float], list[int]]:
    torch.manual_seed(0)
    network, originals = FashionFeatures(FashionClassifier().eval()), Counted(33)

    def halve(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images / 2, (images.double().sum(dim=(1, 2, 3)) * 100).long() % 40

    a = evaluate_reconstruction(
        halve,
        originals,
        codebook_size=40,
        networks=[network],
        floor=True,
        batch_size=4,
        with_ssim=False,  # its library takes each process seconds to import
    )
    b = evaluate_generation(
        Counted(21), Reference(Counted(34)), [network], floor=True, batch_size=4
    )
    return a, b, originals.read_indices


def worker(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    torch.save(figures(), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_with_one_rank(tmp_path: Path) -> None:
    world = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (world, port, str(tmp_path)), nprocs=world)
    alone: Any = figures()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for one in found:
        for ours, theirs in zip(alone[:2], one[:2], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert theirs[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    read = [index for one in found for index in one[2]]
    assert sorted(read) == list(range(33))  # each picture on one rank only


def test_shares_are_even_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, world in ((10, 3), (2, 4), (7, 1)):
        shares = []
        for rank in range(world):
            pair = (rank, world)
            monkeypatch.setattr("titok_fast.distributed.rank_and_world", lambda p=pair: p)
            shares.append(my_share(total))
        assert [i for share in shares for i in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
