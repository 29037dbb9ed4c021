"""What is known of the processor, and what follows from it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import output_of
from support.processors import AVX2, BF16, NO_BF16

from titok_fast.processor import here as own
from titok_fast.processor.description import Processor, instruction_sets, name_in
from titok_fast.processor.here import measure_processor, processor
from titok_fast.processor.int8_products import convolution, linear, pack_convolution, pack_linear
from titok_fast.processor.rates import exact_int8_limit, measured

F32, BF = torch.float32, torch.bfloat16


def test_what_follows_from_the_rates() -> None:
    assert [p.dtype for p in (BF16, NO_BF16, AVX2)] == [BF, F32, F32]
    assert [p.packs(F32) for p in (BF16, NO_BF16, AVX2)] == [True, True, True]
    assert [p.packs(BF) for p in (BF16, NO_BF16, AVX2)] == [True, True, False]  # it would raise
    assert [p.attention(F32) for p in (BF16, NO_BF16, AVX2)] == ["sdpa"] * 3
    assert [p.attention(BF) for p in (BF16, NO_BF16, AVX2)] == ["products", "sdpa", "sdpa"]
    for kind in ("linear", "convolution"):
        assert [p.int8_result(kind, F32) for p in (BF16, NO_BF16, AVX2)] == [F32] * 3
        # never through a loop that is a thousand times slower
        assert [p.int8_result(kind, BF) for p in (BF16, NO_BF16, AVX2)] == [BF, BF, F32]


def test_int8_is_left_out_where_it_does_not_pay() -> None:
    rates = dict(AVX2.rates) | {"linear int8 to float32": 100e9}
    slow = Processor("slow", (), rates, 127)
    assert slow.int8_result("linear", F32) is None
    assert slow.int8_result("convolution", F32) == F32


def test_it_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(own, "_known", None)
    threads = torch.get_num_threads()
    found = measure_processor()
    assert torch.get_num_threads() == threads
    assert found.rates.keys() == measured().keys()
    assert min(found.rates[f"{kind} plain float32"] for kind in ("linear", "convolution")) > 0
    monkeypatch.setattr(own, "measure_processor", pytest.fail)
    assert processor() == found


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"rates": 1}', '{"rates": {}, "instruction_sets": 3}']
)
def test_a_damaged_file_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(own, "_known", None)
    monkeypatch.setattr(own, "measure_processor", lambda: BF16)
    path = own._file()
    assert path is not None
    path.parent.mkdir()
    path.write_text(text)
    assert processor() is BF16


def test_a_limit_of_the_environment_is_another_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = own._file()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert own._file() != before
    assert set(instruction_sets()) <= {"avx2"}


def test_a_home_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    own._write(own._file(), BF16)
    assert own._read(own._file()) is None


@torch.no_grad()
def test_eight_bits_are_exact_within_the_limit() -> None:
    """Largest values of one sign, where sums of pairs saturate first, and random ones."""
    limit = exact_int8_limit()
    x = torch.randint(0, 256, (5, 192), dtype=torch.uint8)
    weight = torch.randint(-limit, limit + 1, (64, 192), dtype=torch.int8)
    x[0], weight[:2] = 255, torch.tensor([[limit], [-limit]], dtype=torch.int8)
    ones = torch.ones(64)
    got = linear(x, 0, pack_linear(weight, ones), F32)
    assert torch.equal(got.double(), x.double() @ weight.double().T)
    image, kernel = (
        torch.full((1, 64, 6, 7), 255, dtype=torch.uint8),
        torch.full((32, 64, 3, 3), limit, dtype=torch.int8),
    )
    image = image.contiguous(memory_format=torch.channels_last)
    want = torch.nn.functional.conv2d(image.double(), kernel.double(), padding=1)
    assert torch.equal(
        convolution(image, 1.0, 0, pack_convolution(kernel, ones[:32]), None, F32).double(), want
    )


@pytest.mark.skipif("avx2" not in instruction_sets(), reason="sets a limit of x86 processors")
def test_avx2_alone_is_measured_in_seconds_and_right(tmp_path: Path) -> None:
    """In a process of its own: oneDNN reads its limit once."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = (
        f"import os; os.environ |= {limits | {'XDG_CACHE_HOME': str(tmp_path)}!r}\n"
        "import json; from titok_fast.processor.here import processor as p\n"
        "print(json.dumps([str(p().dtype), p().int8_limit, p().instruction_sets, dict(p().rates)]))"
    )
    dtype, limit, sets, rates = json.loads(output_of(code))
    assert (dtype, limit, sets) == ("torch.float32", 64, ["avx2"])
    assert rates["linear int8 to bfloat16"] < rates["linear int8 to float32"] / 20
    assert [path.suffix for path in (tmp_path / "titok_fast").iterdir()] == [".json"]
    assert os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2" or limit == exact_int8_limit()


def test_processors_of_one_name_are_told_apart() -> None:
    amd = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
    amd += "model name\t: AMD EPYC\nstepping\t: 1\npower management:\n"
    assert name_in(amd) == "AMD EPYC (family 25, model 17)"
    assert name_in(amd.replace("25", "26")) == "AMD EPYC (family 26, model 17)"
    assert name_in("processor : 0\nmodel name : ARMv8\n") == "ARMv8"
    assert name_in("processor : 0\n") is None


def test_rates_are_adopted_from_the_same_kind_of_processor_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own, "_known", BF16)
    again = replace(BF16, rates={**BF16.rates, "linear plain float32": 1.0})
    own.adopt(again)
    assert processor() is again
    for other in (NO_BF16, replace(BF16, int8_limit=64), replace(BF16, name="another")):
        own.adopt(other)
        assert processor() is again
