"""The paper's curves in small: experiments, comparisons, a whole tiny run, an interrupted run."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import refused, scripts

from titok_fast import TiTok
from titok_fast.sampling_config import SCHEDULES
from titok_fast.training.recipe.recipe import Recipe

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
experiments, paper, trends, curves, work, plot = scripts(
    *(f"paper.{n}" for n in ("experiments", "published", "trends", "curves", "work")), "lib.plots"
)
(report,) = scripts("lib.quality_tables")
Experiment, FULL, SMOKE = experiments.Experiment, experiments.Settings(), experiments.SMOKE
pytestmark = pytest.mark.usefixtures("one_thread_for_all")


def everything(settings: Any) -> list[Any]:
    groups = (experiments.experiments_of(group, settings) for group in experiments.GROUPS)
    found: list[Any] = experiments.with_needs([e for group in groups for e in group])
    return found


def test_the_papers_figures() -> None:
    assert paper.table_4("rFID", "L", 8) == 6.6
    assert paper.table_4("gFID", "B", 64) == 3.5
    assert paper.table_4("probe %", "S", 4) == 50.46
    # its text: 32 tokens against 256 train 12.8 times and draw 4.5 times as fast
    for line, ratio in (("training", 12.8), ("sampling", 4.5)):
        rates = paper.SAMPLES_PER_S[line]
        assert rates[32] / rates[256] == pytest.approx(ratio, abs=0.05)
    # the same share of the proxy codes, 64 here and 256 there
    assert all(theirs == 4 * ours for ours, theirs in paper.PAPER_TOKENS.items())


def test_experiments_cover_the_groups_and_share_networks() -> None:
    found = everything(FULL)
    names = [e.name for e in found]
    assert len(set(names)) == len(names)
    assert FULL.tokens == (4, 8, 16, 32, 64)
    kinds = [e.kind for e in found]
    assert (kinds.count("tokenizer"), kinds.count("probe")) == (15, 15)
    drawn = {(e.tokens, e.variant) for e in found if e.kind == "generator"}
    assert drawn == {(K, "arccos") for K in FULL.tokens} | {(16, s) for s in SCHEDULES}
    assert {e.variant for e in found if e.kind == "training"} == {"two-stage", "single-stage", "2d"}
    for at, e in enumerate(found):
        assert set(e.needs()) <= set(found[:at])
    with pytest.raises(ValueError, match="group wants one of reconstruction-tokens"):
        experiments.experiments_of("width", FULL)


def test_recipes_have_equal_budgets(tmp_path: Path) -> None:
    for e in everything(FULL):
        if not e.trains():
            continue
        made = experiments.recipe(e, FULL, tmp_path)
        assert Recipe.from_official(made.to_official()) == made
        assert made.data.crop_size == work.SIDE
        assert made.experiment.output_dir == str(tmp_path / e.name)
        assert made.training.seed == e.seed
        updates = {"generator": FULL.generator_budget, "single_stage": 2 * FULL.budget}
        assert made.training.max_train_steps == updates.get(made.stage, FULL.budget)
        if made.stage == "generator":
            assert made.generator.image_seq_len == e.tokens
            assert made.losses.mask_schedule_strategy == made.sampling.schedule == e.variant
        elif made.stage != "vqgan":
            config = made.tokenizer
            assert config.num_latent_tokens == e.tokens
            assert config.encoder_size == config.decoder_size == dict(FULL.sizes)[e.size]
            assert config.is_2d == (e.variant == "2d")
            assert config.encoder_grid**2 == experiments.MIDDLE
            if config.is_legacy:  # 64 proxy codes
                assert (config.decoder_grid * config.proxy_block) ** 2 == 64
        if e.variant == "two-stage":
            assert made.experiment.init_weight == str(tmp_path / "tokenizer-B-16" / "final")


@pytest.mark.parametrize(
    ("ours", "theirs", "noise", "alike", "verdict", "rank"),
    [
        ((9, 5, 3, 2), (4, 3, 2, 1), 0, 6, "agrees", 1),
        ((9, 5, 2, 3), (4, 3, 2, 1), 0, 5, "mostly agrees", 0.8),
        ((1, 2, 3, 4), (4, 3, 2, 1), 0, 0, "does not agree", -1),
        ((9, 5, 5.1, 5), (4, 3, 2, 1), 0.2, 3, "not told apart", 0.632),
        ((1, 2, 5.1, 5), (4, 3, 2, 1), 0.2, 0, "does not agree", -0.8),
        ((7, 7, 7), (4, 3, 2), 0, 0, "not told apart", None),
        ((9, 1, 5), (4, 4, 5), 0, 1, "does not agree", 0),  # a tie of the paper's is no pair
    ],
)
def test_comparing(
    ours: Any, theirs: Any, noise: float, alike: int, verdict: str, rank: float | None
) -> None:
    found = curves.compare(ours, theirs, noise)
    assert (found["alike"], found["verdict"]) == (alike, verdict)
    assert found["rank_correlation"] == (rank if rank is None else pytest.approx(rank, abs=1e-3))


def figures(sign: int = 1) -> dict[str, dict[str, Any]]:
    """Of all experiments the paper's own numbers, or those with their sign changed."""
    metrics = {"tokenizer": "rFID", "probe": "probe %", "generator": "gFID"}
    found: dict[str, dict[str, Any]] = {}
    for e in everything(FULL):
        if e.kind == "training":
            value = sign * paper.TRAINING_RFID[e.variant]
        elif e.kind == "generator" and e.tokens == experiments.MIDDLE:
            value = sign * paper.SCHEDULES_GFID[e.variant]
        elif e.kind in metrics:
            value = sign * paper.table_4(metrics[e.kind], e.size, e.tokens)
        else:
            continue
        found[e.name] = {"probe_top1": value / 100} if e.kind == "probe" else {"fid": value}
    found["speed"] = {
        f"{line}_per_s": {
            str(K): {"median": sign * rates[paper.PAPER_TOKENS[K]]} for K in FULL.tokens
        }
        for line, rates in paper.SAMPLES_PER_S.items()
    }
    return found


def test_the_paper_agrees_with_itself() -> None:
    found = curves.comparisons(figures(), FULL)
    # 3 + 5 reconstruction, 1 generation, 3 + 5 probe, training, schedules, 2 speeds
    assert len(found) == 21
    # tables 3b and 4 are of different tokenizers: their gFID at 64 tokens differ
    others = [c for c in found if c["group"] != "generation-tokens"]
    assert {c["verdict"] for c in others} == {"agrees"}
    assert "in every pair for: reconstruction against tokens, S;" in report.statement(found)
    turned = curves.comparisons(figures(-1), FULL)
    assert {c["alike"] for c in turned if c["group"] != "generation-tokens"} == {0}
    assert "It does not have it for: reconstruction against tokens, S" in report.statement(turned)


def test_noise_is_what_seeds_differ_by() -> None:
    found = figures()
    found[Experiment("generator", "B", 16, "sqrt", 43).name] = {"fid": 5.03}
    (one,) = [c for c in curves.comparisons(found, FULL) if c["group"] == "schedules"]
    assert one["noise"] == pytest.approx(0.6)
    assert one["x"] == SCHEDULES
    assert one["ours"][SCHEDULES.index("sqrt")] == pytest.approx(5.33)
    assert (one["untold"], one["verdict"]) == (6, "not told apart")


def test_an_unfinished_curve_is_left_out() -> None:
    found = figures()
    del found["tokenizer-L-32"], found["speed"], found["generator-B-16-sqrt-43"]
    lines = {(c["group"], c["line"]) for c in curves.comparisons(found, FULL)}
    whole = {line for group, line in lines if group == "reconstruction-tokens"}
    assert whole == {"S", "B", "4 tokens", "8 tokens", "16 tokens", "64 tokens"}
    others = {"generation-tokens", "probe-tokens", "proxy-codes"}
    assert {group for group, _ in lines} == {"reconstruction-tokens"} | others


def smoke(folder: Path, *words: str) -> int:
    status: int = trends.main(["--smoke", "--device", "cpu", "--work", str(folder), *words])
    return status


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of every kind of experiment, and its record."""
    folder = tmp_path_factory.mktemp("trends")
    path = folder / "record.json"
    assert smoke(folder / "work", "--json", str(path), "--plots", str(folder)) == 0
    return folder, json.loads(path.read_text())


def test_a_whole_run(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, record = whole
    assert record["benchmark"] == "paper-trends"
    reconstruction = {"fid", "psnr", "codebook_usage", "accuracy_reconstructions"}
    measured = {
        "vqgan": reconstruction,
        "tokenizer": reconstruction,
        "training": reconstruction,
        "generator": {"fid", "label_agreement"},
        "probe": {"probe_top1"},
        "speed": {"training_per_s", "sampling_per_s"},
    }
    assert {c["kind"] for c in record["cases"]} == set(measured)
    assert [c["experiment"] for c in record["cases"]] == [e.name for e in everything(SMOKE)]
    for case in record["cases"]:
        assert measured[case["kind"]] <= case["figures"].keys()
    (speed,) = (c["figures"] for c in record["cases"] if c["kind"] == "speed")
    assert speed["training_per_s"]["4"]["median"] > 0
    assert {c["group"] for c in record["comparisons"]} == set(experiments.GROUPS)
    assert record["protocol"]["settings"]["budget"] == SMOKE.budget
    assert ET.parse(folder / "record.svg").getroot().tag.endswith("svg")
    assert len(plot.trends(record).axes) == 2 * len(experiments.GROUPS)
    with pytest.raises(ValueError, match=r"wants a record of trends\.py"):
        plot.trends(record | {"comparisons": []})


def test_the_section_of_the_readme(whole: tuple[Path, dict[str, Any]]) -> None:
    _, record = whole
    text = report.trends_table(record)
    for part in (
        "2 updates of batch 8 for each tokenizer",
        "| linear probe against tokens, S ",
        "| distance (paper: rFID) ",  # ours is no FID
        "4 (16), 16 (64)",
        "50.5, 48.4",  # the paper's
    ):
        assert part in text
    assert report.trends_table(record | {"comparisons": []}) == "Not measured yet."


def test_a_second_run_measures_nothing_and_wants_the_same_settings(
    whole: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, record = whole
    monkeypatch.setattr(trends, "train_network", None)
    monkeypatch.setattr(trends, "measure", None)
    path = tmp_path / "again.json"
    assert smoke(folder / "work", "--only", "probe-tokens", "--json", str(path)) == 0
    again = json.loads(path.read_text())
    assert {c["group"] for c in again["comparisons"]} == {"probe-tokens"}
    with pytest.raises(SystemExit):
        smoke(folder / "work", "--budget", "3")
    assert "experiments of another budget, classifier or data" in capsys.readouterr().err
    first, second = ([c for c in r["cases"] if c["kind"] == "probe"] for r in (record, again))
    assert first == second


def test_an_ended_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = work.train, []

    def ended(recipe: Any, *args: Any, **kwargs: Any) -> str:
        calls.append(recipe.experiment.name)
        if len(calls) == 2:
            return "stopped by SIGTERM after update 1"
        return str(real(recipe, *args, **kwargs))

    monkeypatch.setattr(work, "train", ended)
    assert smoke(tmp_path, "--only", "generation-tokens") == 130
    assert "stopped by SIGTERM after update 1" in capsys.readouterr().err
    assert [p.stem for p in (tmp_path / "experiments").iterdir()] == ["vqgan"]
    assert smoke(tmp_path, "--only", "generation-tokens") == 0
    assert calls.count("vqgan") == 1
    assert calls[1:3] == ["tokenizer-B-4"] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "width"], "--only: unknown width"),
        (["--budget", "0"], "--budget: wants at least 1; got 0"),
        (["--plots", "/nowhere/at/all"], "--plots: wants an existing folder"),
        (["--classifier", "/nowhere/at/all"], "run titok-fast train recipes/fashion/classifier"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, trends, [*words, "--work", str(tmp_path / "work"), "--device", "cpu"], said)
    assert not (tmp_path / "work").exists()


def test_a_generator_reads_its_tokenizers_ids(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    data = trends.smoke_data(64)
    setup = work.Setup(SMOKE, folder / "work", data, data, None, torch.device("cpu"))
    source = work.tokens(setup, Experiment("generator", "B", 4, "arccos"))
    tokenizer = setup.load(TiTok, Experiment("tokenizer", "B", 4))
    images = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        ids = tokenizer.encode(images)[1]["min_encoding_indices"].flatten(1)
    assert (source.tokens == ids.numpy()).all()
    assert (source.labels == data.labels).all()
