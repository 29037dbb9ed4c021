"""What the README calls: pictures out, tokens out, seeds, batches, and messages for bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.tiny_models import (
    photographs,
    relative,
    tiny_generator,
    tiny_tokenizer,
    tiny_tokenizer_config,
)

from titok_fast import SamplingConfig, TiTok, TiTokPipeline, preset
from titok_fast.models.generator import MaskedGenerator
from titok_fast.presets import PRESETS, Preset
from titok_fast.sampling.unmask import sample, sample_seeds

SETTINGS = SamplingConfig(4, 3.0, "linear", 3.0, 4.5, True)
PHOTOGRAPHS = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]


@pytest.fixture(scope="module")
def pipe() -> TiTokPipeline:
    return TiTokPipeline(tiny_tokenizer("legacy"), tiny_generator("ViT"), SETTINGS)


def test_outputs(pipe: TiTokPipeline) -> None:
    labels = [1, 207, 999]
    tensor = pipe(labels, output="tensor")
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32, 3), torch.uint8)
    array = pipe(labels, output="numpy")
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, tensor.numpy())
    pictures = pipe(labels)
    assert all(isinstance(p, Image.Image) and p.size == (32, 32) for p in pictures)
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), array)
    assert tensor.float().std() > 10  # pictures, not a flat colour


def test_pictures_are_the_decoded_samples_truncated(pipe: TiTokPipeline) -> None:
    labels = torch.tensor([3, 4])
    assert pipe.generator is not None
    ids = sample(pipe.generator, labels, sample_seeds(11, 2), SETTINGS)
    assert torch.equal(pipe.sample_tokens(labels, seed=11), ids)
    with torch.no_grad():
        pixels = pipe.tokenizer.decode_tokens(ids).clamp(0, 1) * 255
    got = pipe(labels, seed=11, output="tensor")
    assert torch.equal(got, pixels.to(torch.uint8).permute(0, 2, 3, 1))
    rounded = pipe.detokenize(ids, output="tensor")
    assert torch.equal(rounded, pixels.round().to(torch.uint8).permute(0, 2, 3, 1))


def test_a_picture_depends_on_its_place_in_the_run_not_on_the_batch(pipe: TiTokPipeline) -> None:
    labels = list(range(7))
    want = pipe(labels, seed=5, output="tensor")
    for size in (1, 2, 7, 100):
        done: list[int] = []
        got = pipe(labels, seed=5, batch_size=size, output="tensor", progress=done.append)
        assert torch.equal(got, want), size
        assert done == [len(labels[i : i + size]) for i in range(0, 7, size)]
    seeds = sample_seeds(5, 4, first=3)
    assert torch.equal(pipe(labels[3:], seeds=seeds, output="tensor"), want[3:])
    assert not torch.equal(pipe(labels, seed=6, output="tensor"), want)


def test_settings_of_a_call(pipe: TiTokPipeline) -> None:
    labels = [1, 2, 3]
    first = pipe(labels, output="tensor")
    changed = pipe(labels, output="tensor", num_sample_steps=1, guidance_scale=0.0)
    assert not torch.equal(first, changed)
    assert torch.equal(pipe(labels, output="tensor", guidance_scale=None), first)
    assert pipe.sampling == SETTINGS


def test_tokens_that_are_kept(pipe: TiTokPipeline) -> None:
    ids = torch.randint(64, (3, 8))
    kept = pipe([1, 2, 3], tokens=ids, output="tensor")
    with torch.no_grad():
        pixels = pipe.tokenizer.decode_tokens(ids).clamp(0, 1) * 255
    assert torch.equal(kept, pixels.to(torch.uint8).permute(0, 2, 3, 1))


def test_photographs_to_tokens_and_back(pipe: TiTokPipeline) -> None:
    ids = pipe.tokenize(PHOTOGRAPHS)
    assert (ids.shape, ids.dtype) == ((4, 8), torch.int64)
    assert len(ids.unique(dim=0)) > 1
    for dtype in (torch.int16, torch.int32):
        small = pipe.tokenize(PHOTOGRAPHS, dtype=dtype, batch_size=3)
        assert small.dtype == dtype
        assert torch.equal(small.long(), ids)
        by_ids = pipe.detokenize(small, output="numpy", batch_size=2)
        assert isinstance(by_ids, np.ndarray)
        direct = pipe.reconstruct(PHOTOGRAPHS, output="numpy")
        # the straight-through sum rounds differently from the table's row
        assert np.abs(by_ids.astype(int) - np.asarray(direct).astype(int)).max() <= 1
    assert torch.equal(pipe.tokenize(photographs(32)), ids[:3])
    assert torch.equal(pipe.tokenize(Image.fromarray(PHOTOGRAPHS[1])), ids[1:2])


def test_photograph_files(pipe: TiTokPipeline, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, picture in zip(paths, PHOTOGRAPHS, strict=False):
        Image.fromarray(picture).save(path)
    assert torch.equal(pipe.tokenize(paths), pipe.tokenize(PHOTOGRAPHS[:2]))
    pictures = pipe.reconstruct(paths)
    assert [p.size for p in pictures] == [(32, 32)] * 2


def test_vae_reconstructs_by_its_mean() -> None:
    pipe = TiTokPipeline(tiny_tokenizer("vae"))
    first = pipe.reconstruct(PHOTOGRAPHS, output="tensor")
    assert torch.equal(first, pipe.reconstruct(PHOTOGRAPHS, output="tensor"))
    with pytest.raises(ValueError, match=r"a VAE tokenizer has no token ids: use tokenizer\."):
        pipe.tokenize(PHOTOGRAPHS)
    with pytest.raises(ValueError, match="a VAE tokenizer has no token ids"):
        TiTokPipeline(tiny_tokenizer("vae"), tiny_generator())


def test_bfloat16(pipe: TiTokPipeline) -> None:
    half = TiTokPipeline(tiny_tokenizer("legacy"), tiny_generator("ViT"), SETTINGS)
    assert half.to("cpu", "bfloat16") is half
    assert half.tokenizer.dtype == torch.bfloat16
    assert half.tokenizer.quantize.embedding.weight.dtype == torch.float32
    assert half.tokenizer.pixel_quantize.embedding.weight.dtype == torch.float32
    assert half.generator is not None
    assert half.generator.dtype == torch.bfloat16
    assert half([1, 2], output="numpy").shape == (2, 32, 32, 3)  # type: ignore[union-attr]
    ids = pipe.tokenize(PHOTOGRAPHS)
    got = half.detokenize(ids, output="tensor").float()  # type: ignore[union-attr]
    assert relative(got, pipe.detokenize(ids, output="tensor").float()) < 0.05  # type: ignore[union-attr]
    assert half.to(torch.float32).tokenizer.dtype == torch.float32
    with pytest.raises(ValueError, match=r"`to` wants one dtype; got torch\.float16 and bfloat16"):
        half.to(torch.float16, "bfloat16")


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.float64, torch.int64])
def test_unknown_dtype(pipe: TiTokPipeline, dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype wants float32, bfloat16 or float16; got"):
        pipe.to(dtype=dtype)


def test_empty_batches(pipe: TiTokPipeline) -> None:
    assert pipe([]) == []
    assert pipe([], output="tensor").shape == (0, 32, 32, 3)  # type: ignore[union-attr]
    assert pipe.tokenize([]).shape == (0, 8)
    assert pipe.detokenize(torch.empty(0, 8, dtype=torch.int64)) == []
    assert pipe.reconstruct([]) == []
    assert pipe.reconstruct([], output="numpy").shape == (0, 32, 32, 3)  # type: ignore[union-attr]


def test_bad_labels_seeds_and_settings(pipe: TiTokPipeline) -> None:
    options: dict[str, Any]
    for options, message in (
        ({"labels": [3, 1000]}, r"labels lie in 0\.\.999; got 3\.\.1000"),
        ({"labels": [-1]}, r"labels lie in 0\.\.999; got -1\.\.-1"),
        ({"labels": [1, 2], "seeds": torch.tensor([1])}, r"seeds want shape \(2,\) int64"),
        ({"num_sample_steps": 0}, "an integer from 1 to 1024; got 0"),
        ({"num_sample_steps": 1025}, "an integer from 1 to 1024; got 1025"),
        ({"schedule": "cubic"}, r"schedule wants one of .*got 'cubic'"),
        ({"scale": 3.0}, r"sampling setting wants one of .*got \['scale'\]"),
        ({"output": "jpeg"}, r"output wants one of .*; got 'jpeg'"),
        ({"batch_size": 0}, "batch_size wants at least 1; got 0"),
        ({"batch_size": -1}, "batch_size wants at least 1; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{"labels": [1]} | options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 33, 32), r"wants \(3, 32, 32\); got \(3, 33, 32\)"),
        (object(), "wants a path, PIL image, numpy array or torch tensor"),
        (Path("absent.png"), r"no file .*absent\.png"),
    ],
)
def test_bad_images(pipe: TiTokPipeline, image: Any, message: str) -> None:
    for call in (pipe.tokenize, pipe.reconstruct):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call(image)


def test_bad_ids(pipe: TiTokPipeline) -> None:
    with pytest.raises(ValueError, match=r"wants integer ids \(B, 8\); got \(1, 9\)"):
        pipe.detokenize(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids below 64 want int16, int32 or int64; got torch\.u"):
        pipe.tokenize(PHOTOGRAPHS, dtype=torch.uint8)
    big = TiTokPipeline(tiny_tokenizer("vq", N=40_000))
    with pytest.raises(ValueError, match=r"ids below 40000 want .*; got torch\.int16"):
        big.tokenize(PHOTOGRAPHS, dtype=torch.int16)


def test_parts_that_do_not_belong_together() -> None:
    tokenizer = tiny_tokenizer()
    for generator in (tiny_generator(K=9), tiny_generator(N=65)):
        with pytest.raises(ValueError, match=r"tokenizer has 8 tokens of 64 codes, generator \d"):
            TiTokPipeline(tokenizer, generator)
    with pytest.raises(ValueError, match="no generator: it can tokenize and reconstruct only"):
        TiTokPipeline(tokenizer)([1])


def test_stage_1_has_no_pixels() -> None:
    pipe = TiTokPipeline(tiny_tokenizer("stage1"), tiny_generator())
    assert pipe.tokenize(PHOTOGRAPHS).shape == (4, 8)
    for call in (lambda: pipe([1]), lambda: pipe.reconstruct(PHOTOGRAPHS)):
        with pytest.raises(ValueError, match=r"stage-1 .*use MaskGitVQGAN\.decode"):
            call()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_suggests_a_batch(
    pipe: TiTokPipeline, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(codes: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(pipe.tokenizer, "decode", fail)
    for call in (
        lambda size: pipe([1] * 20, batch_size=size),
        lambda size: pipe.reconstruct(PHOTOGRAPHS * 5, batch_size=size),
        lambda size: pipe.detokenize(torch.zeros(20, 8, dtype=torch.int64), batch_size=size),
    ):
        with pytest.raises(MemoryError, match=r"batch_size=16: try batch_size=8\. \(.*emory"):
            call(16)
        with pytest.raises(MemoryError, match="batch_size=1: even one image does not fit"):
            call(1)


def test_other_errors_pass_through(pipe: TiTokPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(codes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipe.tokenizer, "decode", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pipe([1])


def test_unknown_preset() -> None:
    for call in (preset, TiTokPipeline.from_pretrained, TiTokPipeline.random):
        with pytest.raises(ValueError, match="unknown preset 'titok-xl'; known: titok-l-32, "):
            call("titok-xl")


def test_from_pretrained_by_directory_and_by_name(
    pipe: TiTokPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.generator is not None
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipe.generator.save_pretrained(tmp_path / "generator")
    parts = {name: str(tmp_path / name) for name in ("tokenizer", "generator")}
    want = pipe([1, 2], output="tensor")

    loaded = TiTokPipeline.from_pretrained(**parts)
    assert isinstance(loaded.generator, MaskedGenerator)
    loaded.sampling = SETTINGS
    assert torch.equal(loaded([1, 2], output="tensor"), want)
    alone = TiTokPipeline.from_pretrained(tokenizer=parts["tokenizer"], dtype=torch.bfloat16)
    assert alone.generator is None
    assert alone.tokenizer.dtype == torch.bfloat16

    known = Preset(pipe.tokenizer.config, pipe.generator.config, SETTINGS, *parts.values())
    monkeypatch.setitem(PRESETS, "tiny", known)
    named = TiTokPipeline.from_pretrained("tiny")
    assert torch.equal(named([1, 2], output="tensor"), want)
    first, second = (TiTokPipeline.random("tiny", seed=s).tokenizer.latent_tokens for s in (1, 2))
    assert torch.equal(first, TiTokPipeline.random("tiny", seed=1).tokenizer.latent_tokens)
    assert not torch.equal(first, second)


def test_from_pretrained_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name a published model \(--model\), or weights"):
        TiTokPipeline.from_pretrained()
    with pytest.raises(
        FileNotFoundError, match="no tokenizer weights of titok-l-64-512 were published"
    ):
        TiTokPipeline.from_pretrained("titok-l-64-512")
    with pytest.raises(FileNotFoundError, match="neither a directory, nor a file, nor a hub"):
        TiTokPipeline.from_pretrained(tokenizer=str(tmp_path / "absent"))


def test_unknown_attention() -> None:
    with pytest.raises(ValueError, match="unknown attention back end 'triton'; known: sdpa"):
        TiTok(tiny_tokenizer_config(), attention="triton")
