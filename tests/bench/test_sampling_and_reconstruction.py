"""The benchmarks of whole models, on small ones: protocol, record, options, the rival's adapter."""

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import add_tiny, recorded, scripts, small_official
from support.official import CHECKOUT, needs_upstream
from support.tiny_models import tiny_tokenizer_config
from torch import Tensor

from titok_fast import PRESETS, TiTokPipeline
from titok_fast.presets import Preset

candidates, options, reconstruction, sampling, upstream = scripts(
    "lib.candidates", "lib.options", "reconstruction", "sampling", "lib.upstream"
)

CPU = torch.device("cpu")
RATE = {"median", "p20", "p80", "repeats"}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny(monkeypatch, options)
    monkeypatch.setitem(PRESETS, "tiny-vae", Preset(tiny_tokenizer_config("vae")))


def test_sampling_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--models tiny --batch 1 3 --steps 2 --modes eager fast"
    status, record = recorded(sampling, tmp_path / "r.json", *words.split())
    assert status == 0
    fields = "benchmark environment protocol upstream_commit matmul_flop_per_s cases"
    assert set(record) == set(fields.split())
    assert record["protocol"]["weights"] == "random"
    assert set(record["matmul_flop_per_s"]) == {"fp32-ieee", "bf16"}
    names = [(c["batch"], c["implementation"], c["dtype"], c["mode"]) for c in record["cases"]]
    assert names == [
        (B, *row)
        for B in (1, 3)
        for row in [
            ("reference", "fp32-ieee", "eager"),
            ("ours", "fp32-ieee", "eager"),
            ("ours", "fp32-ieee", "fast"),
            ("ours", "bf16", "eager"),
            ("ours", "bf16", "fast"),
        ]
    ]
    for case in record["cases"]:
        assert case["sampling"]["num_sample_steps"] == 2
        assert len(case["seconds"]) == 2
        assert set(case["images_per_s"]) == RATE
        # the middle of two rates lies between them
        rates = [case["batch"] / s for s in case["seconds"]]
        assert min(rates) <= case["images_per_s"]["median"] <= max(rates)
        order = ["generator", "vit_decoder", "pixel_decoder", "transfer"]
        assert list(case["stages_s"]) == order
        # with two calls medians are means, so stages add up to the call, but for the context's cost
        mean = sum(case["seconds"]) / 2
        assert 0.5 * mean < sum(case["stages_s"].values()) <= mean
        assert next(iter(case["gflop_per_image"])) == "generator"
    reference, same, fast, low = record["cases"][:4]
    assert same["agreement"]["ids_equal"] == 1.0
    assert same["agreement"]["pixel_rms"] == reference["agreement"]["pixel_rms"] == 0
    assert low["agreement"]["pixel_rms"] > 0
    assert low["weight_bytes"] < 0.7 * same["weight_bytes"]
    assert fast["weight_bytes"] > 0.9 * same["weight_bytes"]  # packed weights are counted
    assert fast["agreement"]["ids_equal"] == 1.0
    out = capsys.readouterr().out
    assert out.count("| ours, eager ") == out.count("| ours, fast ") == 4
    assert "| not measured" in out  # no upstream here


@pytest.mark.parametrize("model", ["tiny", "tiny-vae"])
def test_reconstruction_record(tmp_path: Path, model: str) -> None:
    path = tmp_path / "r.json"
    words = ("--models", model, "--batch", "2", "--modes", "eager")
    status, record = recorded(reconstruction, path, *words)
    assert status == 0
    names = [(c["direction"], c["dtype"]) for c in record["cases"]]
    assert names == [(d, t) for d in ("encode", "decode") for t in ("fp32-ieee", "bf16")]
    for case in record["cases"]:
        assert set(case["images_per_s"]) == RATE
    encode, decode = record["cases"][1], record["cases"][3]
    assert set(encode["agreement"]) == ({"ids_equal"} if model == "tiny" else set())
    assert 0 < decode["agreement"]["pixel_rms"] < 0.1
    stages_of = [set(c["gflop_per_image"]) for c in (encode, decode)]
    assert "encoder" in stages_of[0]
    assert "vit_decoder" in stages_of[1]
    assert not stages_of[0] & stages_of[1]


def test_float32_is_measured_even_when_not_asked_for(tmp_path: Path) -> None:
    words = ("--models", "tiny", "--batch", "1", "--dtype", "bf16", "--modes", "eager")
    _, record = recorded(reconstruction, tmp_path / "r.json", *words)
    assert [c["dtype"] for c in record["cases"]] == ["fp32-ieee", "bf16"] * 2


def test_photographs_fill_any_batch() -> None:
    pytest.importorskip("skimage")
    images, source = reconstruction.inputs(8, 32)
    assert images.shape == (8, 3, 32, 32)
    assert torch.equal(images[0], images[6])
    assert not torch.equal(images[0], images[1])
    assert "scikit-image" in source


def test_compiled_models_are_copies_on_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(TiTokPipeline, "compile", lambda self, *_: compiled.append(self) or self)
    words = "--models tiny --batch 1 --modes eager compiled"
    _, record = recorded(sampling, tmp_path / "r.json", *words.split())
    modes = [c["mode"] for c in record["cases"] if c["implementation"] == "ours"]
    assert modes == ["eager", "compiled"] * 2
    assert len({id(pipe) for pipe in compiled}) == 2


@pytest.mark.slow
def test_compiled_networks_agree_and_are_timed_by_stage(tmp_path: Path) -> None:
    words = ("--models", "tiny", "--batch", "2", "--modes", "compiled", "--dtype", "fp32-ieee")
    status, record = recorded(sampling, tmp_path / "r.json", *words)
    compiled = record["cases"][-1]
    assert status == 0
    assert compiled["mode"] == "compiled"
    assert compiled["agreement"]["ids_equal"] == 1.0
    # these weights are badly conditioned: eager float32 is 6e-5 from float64, bfloat16 2e-2
    assert compiled["agreement"]["pixel_rms"] < 1e-4
    assert len(compiled["stages_s"]) == 4
    # it was compiled, and the timed rounds were not
    assert compiled["first_call_s"] > 10 * min(compiled["seconds"])


def test_a_copy_shares_weights_and_leaves_the_original_alone() -> None:
    pipe = TiTokPipeline.random("tiny")
    decoder = pipe.tokenizer.decoder
    own = candidates.shared(pipe)
    candidates.watch(own.tokenizer, CPU)
    assert pipe.tokenizer.decoder is decoder
    assert isinstance(own.tokenizer.decoder, candidates.Stage)
    mine, theirs = pipe.generator.lm_head.weight, own.generator.lm_head.weight
    assert mine.data_ptr() == theirs.data_ptr()
    assert candidates.weight_bytes(own) == candidates.weight_bytes(pipe)
    low = candidates.in_dtypes(pipe, ["fp32-ieee", "bf16"])
    assert low["fp32-ieee"] is pipe
    assert low["bf16"].tokenizer.dtype == torch.bfloat16
    assert pipe.tokenizer.dtype == torch.float32


def candidate(name: str, call: Callable[[], object], ids: int = 0, weights: int = 0) -> Any:
    def probe() -> dict[str, Tensor]:
        return {"ids": torch.tensor([0, ids]), "pixels": torch.full((2, 2), ids / 2)}

    return candidates.Candidate(name, "fp32-ieee", "eager", call, probe, nullcontext, weights)


def test_candidates_alternate_and_a_failure_is_a_row() -> None:
    calls: list[str] = []

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    rows = candidates.measure(
        [
            candidate("a", lambda: calls.append("a")),
            candidate("bad", fail),
            candidate("b", lambda: calls.append("b"), ids=1),
        ],
        images=6,
        device=CPU,
        repeats=3,
    )
    # two cold calls of each, then rounds that take turns at being first
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert [row["implementation"] for row in rows] == ["a", "bad", "b"]
    assert rows[1]["error"] == "OutOfMemoryError"
    assert "images_per_s" not in rows[1]
    assert rows[0]["agreement"] == {"ids_equal": 1.0, "pixel_rms": 0.0}
    assert rows[2]["agreement"] == {"ids_equal": 0.5, "pixel_rms": 0.5}
    assert rows[2]["images_per_s"]["repeats"] == 3


def test_rounds_fit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "ROUND_BUDGET_S", 0.25)
    monkeypatch.setattr(candidates, "MAX_ROUNDS", 6)
    slow = candidates.measure([candidate("a", lambda: time.sleep(0.2))], images=1, device=CPU)
    middle = candidates.measure([candidate("a", lambda: time.sleep(0.05))], images=1, device=CPU)
    fast = candidates.measure([candidate("a", lambda: None)], images=1, device=CPU)
    assert len(slow[0]["seconds"]) == candidates.MIN_ROUNDS
    assert 3 <= len(middle[0]["seconds"]) <= 5
    assert len(fast[0]["seconds"]) == candidates.MAX_ROUNDS


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no way to reset it")
def test_memory_is_own_weights_plus_what_the_call_adds() -> None:
    size, weights = 200 << 20, 1 << 30
    hungry = candidate("a", lambda: torch.ones(size, dtype=torch.uint8), weights=weights)
    frugal = candidate("b", lambda: None, weights=weights)
    rows = candidates.measure([hungry, frugal], images=1, device=CPU, repeats=1)
    assert 0.9 * size < rows[0]["peak_bytes"] - weights < 1.2 * size
    assert rows[1]["peak_bytes"] - weights < 0.1 * size


def test_stage_clock_of_a_slow_part() -> None:
    clock = candidates.StageClock(CPU, rest="end")
    part = candidates.Stage(torch.nn.Identity(), clock, "part", before="before")
    part(torch.zeros(1))  # outside a call: not counted
    for pause in (0.2, 0.01, 0.01):
        with clock:
            time.sleep(pause)
            part(torch.zeros(1))
            time.sleep(0.03)
    assert list(clock.medians(last=2)) == ["before", "part", "end"]
    times = clock.medians(last=2)  # the first call, 0.2 s, is not among them
    assert times["part"] < 0.01 <= times["before"] < 0.03 <= times["end"]


def test_weights_from_files_are_loaded_and_their_paths_stay_private(tmp_path: Path) -> None:
    saved = TiTokPipeline.random("tiny", seed=5)
    saved.tokenizer.save_pretrained(tmp_path / "t")
    saved.generator.save_pretrained(tmp_path / "g")
    words = ("--models", "tiny", "--batch", "1", "--weights", f"{tmp_path / 't'},{tmp_path / 'g'}")
    path = tmp_path / "r.json"
    status, record = recorded(sampling, path, *words)
    assert status == 0
    assert record["protocol"]["weights"] == "local files, local files"
    assert str(tmp_path) not in path.read_text()
    loaded = options.load("tiny", str(tmp_path / "t"), CPU, generate=False)
    assert loaded.generator is None
    wanted = saved.tokenizer.latent_tokens
    assert torch.equal(loaded.tokenizer.latent_tokens, wanted)
    assert not torch.equal(TiTokPipeline.random("tiny").tokenizer.latent_tokens, wanted)


def test_result_files_are_named_after_the_run(tmp_path: Path) -> None:
    environment = {
        "device": "AMD EPYC (2)",
        "date_utc": "2026-01-02T03:04",
        "commit": "0123456789ab",
    }
    record = {"benchmark": "sampling", "environment": environment}
    found = options.result_path(str(tmp_path), record)
    assert found == tmp_path / "amd-epyc-2_2026-01-02_0123456789_sampling.json"
    assert options.result_path("x.json", record) == Path("x.json")


def test_upstream_has_no_512_px_and_no_free_sizes(tmp_path: Path) -> None:
    assert upstream.supports(PRESETS["titok-l-32"].tokenizer)
    assert upstream.supports(PRESETS["titok-bl-64-vae"].tokenizer)
    assert not upstream.supports(PRESETS["titok-l-64-512"].tokenizer)
    assert not upstream.supports(PRESETS["tiny"].tokenizer)
    tiny = TiTokPipeline.random("tiny")
    assert upstream.load(tmp_path, tiny.tokenizer) is None
    with pytest.raises(FileNotFoundError, match="clone of"):
        upstream.find(tmp_path)


@pytest.fixture
def official_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_official(PRESETS["tiny"].sampling)
    monkeypatch.setitem(PRESETS, "small-vit", small)
    uvit = replace(small.generator, model_type="UViT")
    monkeypatch.setitem(PRESETS, "small-uvit", replace(small, generator=uvit))


@needs_upstream
@pytest.mark.parametrize("model", ["small-vit", "small-uvit"])
def test_upstream_on_the_same_weights(official_size: None, tmp_path: Path, model: str) -> None:
    words = ("--models", model, "--batch", "2", "--upstream", CHECKOUT)
    status, record = recorded(sampling, tmp_path / "r.json", *words)
    assert status == 0
    assert CHECKOUT not in json.dumps(record)
    plain, low = (c for c in record["cases"] if c["implementation"] == "upstream")
    assert (plain["dtype"], low["dtype"]) == ("fp32-ieee", "bf16")
    assert plain["agreement"]["ids_equal"] == 1.0
    assert plain["agreement"]["pixel_rms"] < 1e-5
    assert low["weight_bytes"] == plain["weight_bytes"]  # autocast keeps float32 weights
    assert low["agreement"]["pixel_rms"] > 1e-4  # it did run in bfloat16
    assert list(plain["stages_s"]) == ["generator", "vit_decoder", "pixel_decoder", "transfer"]


@needs_upstream
def test_upstream_draws_the_references_pictures(official_size: None) -> None:
    pipe = TiTokPipeline.random("small-vit")
    rival = upstream.Upstream(Path(CHECKOUT), pipe.tokenizer, pipe.generator)
    theirs = rival.tokenizer.decoder.ffn[0].weight
    assert theirs.data_ptr() == pipe.tokenizer.decoder.ffn[0].weight.data_ptr()
    labels = torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    wanted = rival.draw(labels, pipe.sampling)
    torch.manual_seed(0)
    got = sampling.reference(pipe, labels, pipe.sampling)
    assert (got.int() - wanted.int()).abs().max() <= 1  # 1: a value on the border of truncation
