"""The paper comparison of attention back ends: arithmetic by hand, and what it concludes."""

import json
from pathlib import Path

import pytest
from support.bench_scripts import scripts

(floor,) = scripts("attention_floor")


def test_one_row_by_hand() -> None:
    shape = floor.Shape("x", 33, 16, 48, 2)
    got = floor.row(shape, floor.BACKENDS[0], 128, "a100-sxm-80gb")
    assert got["padding"] == pytest.approx(128 * 128 * 64 / (33 * 33 * 48))
    assert got["us"] == pytest.approx(4 * 256 * 16 * 128 * 128 * 64 / 312e12 * 1e6)
    assert got["floor us"] == pytest.approx(2 * 256 * 33 * 4 * 768 / 2039e9 * 1e6)
    assert got["linear layers us"] == pytest.approx(24 * 256 * 33 * 768**2 / 312e12 * 1e6)


def test_no_kernel_of_our_own_pays(tmp_path: Path) -> None:
    assert floor.main(["--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["cases"]
    assert {(r["L"], r["head_dim"]) for r in rows} >= {(33, 48), (65, 48), (129, 64), (289, 64)}
    existing = [r for r in rows if r["back end"] == "sdpa efficient / xformers"]
    assert max(r["gain"] for r in existing) < 0.04  # what attention.py says
