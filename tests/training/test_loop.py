"""The loop: every stage learns, writes what it promises, and resumes bit for bit."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import (
    ALONE,
    CLASSES,
    GENERATOR,
    KINDS,
    SIDE,
    K,
    N,
    assert_equal,
    final,
    recipe_of,
    run,
    saved_tensors,
    source_of,
    updated,
)
from torch._dynamo.utils import counters

from titok_fast import ImageBert, MaskGitVQGAN, TiTok
from titok_fast.data.token_shards import shard_path, write_shard
from titok_fast.distributed import Ranks
from titok_fast.models.classifier import FashionClassifier
from titok_fast.training import checkpoints, loop
from titok_fast.training.engine import Engine
from titok_fast.training.logs import read_log
from titok_fast.training.stage_model import StageModel
from titok_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_the_export_loads(kind: str, weights: Path, tmp_path: Path) -> None:
    recipe = recipe_of(kind, weights, tmp_path, steps=12)
    assert run(recipe) == f"12 updates done; the model is in {tmp_path / 'final'}"
    name = {"generator": "loss", "classifier": "loss"}.get(kind, "reconstruction_loss")
    losses = [line[name] for line in read_log(tmp_path / "log.jsonl") if name in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses

    classes = {"vqgan": MaskGitVQGAN, "generator": ImageBert, "classifier": FashionClassifier}
    model = classes.get(kind, TiTok).from_pretrained(tmp_path / "final")
    ema = {k[4:]: v for k, v in saved_tensors(tmp_path).items() if k.startswith("ema/")}
    assert ema
    got = model.state_dict()
    assert_equal({k: got[k] for k in ema}, ema)


@pytest.fixture
def terminated_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Updates during which the process gets SIGTERM; to be filled by the test."""
    stops: list[int] = []
    apply = Trainer.apply

    def apply_and_signal(trainer: Trainer) -> None:
        apply(trainer)
        if trainer.step in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "apply", apply_and_signal)
    return stops


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(
    kind: str, weights: Path, tmp_path: Path, terminated_at: list[int]
) -> None:
    clustering = kind in ("stage1", "single_stage", "vqgan")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = recipe_of(kind, weights, whole, steps=7, clustering_vq=clustering)
    if kind == "vqgan":
        recipe = updated(recipe, losses={"adaptive_discriminator_weight": True})
    run(recipe)
    part = updated(recipe, experiment={"output_dir": str(parts)})
    terminated_at += [2, 4]  # seen at the end of the next update: 3 is no multiple of save_every
    for ended in ("after update 3;", "after update 5;", "7 updates done"):
        assert ended in run(part)
    assert_equal(saved_tensors(parts), saved_tensors(whole))
    assert_equal(final(parts), final(whole))
    lines = [
        [{k: v for k, v in line.items() if k not in ("time", "samples_per_s")} for line in log]
        for log in (read_log(whole / "log.jsonl"), read_log(parts / "log.jsonl"))
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("kind", ["stage2", "generator"])
def test_activation_checkpointing_changes_no_bit(kind: str, weights: Path, tmp_path: Path) -> None:
    plain = recipe_of(kind, weights, tmp_path / "plain", 3)
    run(plain)
    run(recipe_of(kind, weights, tmp_path / "less", 3, activation_checkpointing=True))
    assert_equal(saved_tensors(tmp_path / "less"), saved_tensors(tmp_path / "plain"))


@pytest.mark.parametrize("kind", ["stage2", "vae", "generator"])
def test_autocast_keeps_float32_weights_and_losses(
    kind: str, weights: Path, tmp_path: Path
) -> None:
    for name, precision in (("float32", "no"), ("bf16", "bf16")):
        recipe = recipe_of(kind, weights, tmp_path / name, 4, mixed_precision=precision)
        run(updated(recipe, optimizer={"learning_rate": 3e-4}))
    tensors, exact = saved_tensors(tmp_path / "bf16"), saved_tensors(tmp_path / "float32")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    name = "reconstruction_loss" if kind != "generator" else "loss"
    first, second = (
        [line[name] for line in read_log(tmp_path / d / "log.jsonl")] for d in ("float32", "bf16")
    )
    assert second != first
    assert second == pytest.approx(first, rel=0.02)
    moved = [n for n in exact if n.startswith("model/") and not torch.equal(tensors[n], exact[n])]
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "stage1", "single_stage", "generator"])
def test_autocast_learns_as_well_for_500_updates(kind: str, weights: Path, tmp_path: Path) -> None:
    ends = []
    for name, precision in (("float32", "no"), ("bf16", "bf16")):
        recipe = recipe_of(kind, weights, tmp_path / name, 500, mixed_precision=precision)
        rate = {"optimizer": {"learning_rate": 3e-4}, "lr_scheduler": {"warmup_steps": 50}}
        rare = {"experiment": {"save_every": 0}, "losses": {"discriminator_start": 1000}}
        run(updated(recipe, **rate, **rare))
        loss = "loss" if kind == "generator" else "total_loss"
        log = read_log(tmp_path / name / "log.jsonl")[-50:]
        usage = [line.get("codes/usage", 1.0) for line in log]
        ends.append((sum(line[loss] for line in log) / 50, sum(usage) / 50))
    (exact, used), (rounded, used_by_bf16) = ends
    assert rounded == pytest.approx(exact, rel=0.02)
    assert used_by_bf16 == pytest.approx(used, abs=0.01)  # a point


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage1", "generator"])
@pytest.mark.parametrize("less_memory", [False, True])
def test_compiled_blocks_learn_the_same(
    kind: str, less_memory: bool, weights: Path, tmp_path: Path
) -> None:
    for name, compile in (("plain", False), ("compiled", True)):
        torch._dynamo.reset()
        counters["stats"].clear()
        recipe = recipe_of(
            kind, weights, tmp_path / name, 3, compile=compile, activation_checkpointing=less_memory
        )
        if kind == "generator":  # compiled dropout draws other numbers
            recipe = replace(recipe, generator=replace(GENERATOR, dropout=0.0, attn_drop=0.0))
        run(recipe)
        assert bool(counters["stats"]["unique_graphs"]) == compile
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("plain", "compiled")]
    name = "total_loss" if kind == "stage1" else "loss"
    plain, compiled = ([line[name] for line in log] for log in logs)
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_without_averages_the_weights_themselves_are_exported(
    weights: Path, tmp_path: Path
) -> None:
    run(recipe_of("generator", weights, tmp_path, 3, use_ema=False))
    model = ImageBert.from_pretrained(tmp_path / "final").state_dict()
    tensors = saved_tensors(tmp_path)
    assert not [name for name in tensors if name.startswith("ema/")]
    assert_equal(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model/")})


def test_stage2_leaves_the_codes_alone(weights: Path, tmp_path: Path) -> None:
    run(recipe_of("stage2", weights, tmp_path, 3))
    first = TiTok.from_pretrained(weights / "stage1").state_dict()
    vqgan = MaskGitVQGAN.from_pretrained(weights / "vqgan").state_dict()
    now = TiTok.from_pretrained(tmp_path / "final").state_dict()
    frozen = [k for k in first if k.startswith(("encoder.", "latent_tokens", "quantize."))]
    assert len(frozen) > 10
    for name, tensor in now.items():
        before = first[name] if name in first else vqgan[name.removeprefix("pixel_")]
        assert torch.equal(tensor, before) == (name in frozen), name


def test_gradients_are_clipped_to_their_global_length() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    sgd = torch.optim.SGD([{"params": part.parameters()} for part in model], 1.0)
    stage_model = StageModel("model", model, Engine(model, ALONE), sgd)
    for limit, steep in ((0.5, 100.0), (0.5, 1e-4), (0.0, 100.0)):
        before = [p.detach().clone() for p in model.parameters()]
        (model(torch.ones(1, 3)).sum() * steep).backward()
        length = float(stage_model.gradient_norm())
        stage_model.step(2.0, limit)
        moves = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        moved = float(torch.cat([m.flatten() for m in moves]).norm())
        assert moved == pytest.approx(2 * (min(length, limit) if limit else length), rel=1e-4)
        assert all(p.grad is None for p in model.parameters())


def test_generator_learns_from_tokens_on_file(weights: Path, tmp_path: Path) -> None:
    rng, about = np.random.default_rng(0), {"codebook_size": N, "shard": 0, "shards": 1}
    labels = np.arange(24) % CLASSES
    tokens = (labels[:, None] * 5 + rng.integers(0, 2, (24, K))).astype(np.int64)
    write_shard(shard_path(tmp_path, 0), tokens, labels, about)
    recipe = updated(
        recipe_of("generator", weights, tmp_path / "out", 20),
        data={"kind": "tokens", "train": str(tmp_path), "eval": str(tmp_path)},
        experiment={"eval_every": 20, "generate_every": 20},
    )
    loop.train(recipe, ALONE, bar=False)
    log = read_log(tmp_path / "out" / "log.jsonl")
    assert log[-1]["eval/accuracy"] > 1.5 / N
    assert log[19]["loss"] < 0.9 * log[0]["loss"]
    sheet = tmp_path / "out" / "pictures" / "samples-00000020.png"
    assert Image.open(sheet).size == (2 * SIDE + 6, SIDE + 4)

    small = replace(recipe, generator=replace(GENERATOR, image_seq_len=K + 1), tokenizer=None)
    with pytest.raises(ValueError, match=r"holds 4 tokens per image .*wants 5 with ids below 16"):
        loop.train(small, ALONE, bar=False)


def test_what_is_logged_and_shown_when(weights: Path, tmp_path: Path) -> None:
    every = {"eval": 3, "generate": 2, "log": 2, "log_grad_norm": 4, "save": 1}
    recipe = updated(
        recipe_of("stage2", weights, tmp_path, 4, num_generated_images=3),
        experiment={"keep": 2, **{f"{what}_every": steps for what, steps in every.items()}},
    )
    run(recipe, (source_of(recipe), source_of(recipe)))
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log if "total_loss" in line] == [2, 4]
    assert [line["step"] for line in log if "eval/psnr" in line] == [3]
    norms = [line for line in log if "grad_norm/decoder.mask_token" in line]
    assert [line["step"] for line in norms] == [4]
    squares = [v**2 for k, v in norms[0].items() if k.startswith("grad_norm/")]
    assert sum(squares) ** 0.5 == pytest.approx(norms[0]["grad_norm"], rel=1e-4)
    assert [step for step, _ in checkpoints.found(tmp_path)] == [4, 3]
    sheets = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert sheets == [f"reconstructions-0000000{step}.png" for step in (2, 4)]


def test_random_numbers_do_not_depend_on_how_a_batch_is_shared(
    weights: Path, tmp_path: Path
) -> None:
    batch = {"tokens": torch.arange(8 * K).view(8, K) % N, "labels": torch.arange(8) % CLASSES}
    whole = Trainer(recipe_of("generator", weights, tmp_path), ALONE)
    (wanted,) = whole._parts(batch)
    names = wanted.keys() - batch.keys()
    whole.recipe = updated(whole.recipe, training={"per_gpu_batch_size": 2})
    parts = list(whole._parts(batch))
    for rank in range(2):
        whole.ranks = Ranks(rank, 2, ALONE.device)
        half = {name: x[4 * rank : 4 * rank + 4] for name, x in batch.items()}
        for name in names:
            got = torch.cat([part[name] for part in whole._parts(half)])
            assert torch.equal(got, wanted[name][4 * rank : 4 * rank + 4])
    assert_equal({k: torch.cat([d[k] for d in parts]) for k in wanted}, wanted)
    whole.step = 1
    assert not torch.equal(next(whole._parts(half))["order"], wanted["order"][4:6])
