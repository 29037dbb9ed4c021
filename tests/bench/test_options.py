"""Options of all benchmarks: what is refused before any work, and what depends on the device."""

from typing import Any

import pytest
import torch
from support.bench_scripts import refused, script_apart, scripts

options, sampling = scripts("lib.options", "sampling")

REFUSED = {
    "sampling": [
        ("--models titok-xl", "--models: invalid choice: 'titok-xl'"),
        ("--models titok-bl-64-vq8k", "has no generator"),
        ("--dtype tf32", "tf32 exists on CUDA devices only"),
        ("--batch 0", "--batch: wants at least 1; got 0"),
        ("--repeats 0", "--repeats: wants at least 1; got 0"),
        ("--steps 0", "num_sample_steps wants"),
        ("--upstream /nowhere", "modeling/titok.py"),
        ("--weights a,b --models titok-s-128 titok-l-32", "wants one name"),
    ],
    "reconstruction": [("--threads 0", "--threads: wants at least 1")],
    "scaling": [
        ("--axes batch,width", "--axes: unknown width; known: batch"),
        ("--dtype tf32", "tf32 exists on CUDA devices only"),
        ("--max-batch 0", "--max-batch: wants at least 1; got 0"),
        ("--compile packed,magic", "--compile: unknown techniques ['magic']"),
        ("--plots /nowhere", "--plots: wants an existing folder"),
    ],
    "waterfall": [
        ("--model titok-xl", "--model: invalid choice: 'titok-xl'"),
        ("--model titok-bl-64-vq8k", "--model: invalid choice: 'titok-bl-64-vq8k'"),
        ("--rows plain,int4", "--rows: unknown int4; known: upstream-fp32"),
        ("--batch-size 0", "--batch-size: wants at least 1; got 0"),
        ("--upstream /nowhere", "modeling/titok.py"),
    ],
    "peers": [
        ("--peers dit,maskgit", "--peers: unknown dit; known: ldm-8"),
        ("--dtype tf32", "tf32 exists on CUDA devices only"),
        ("--batch-size 0", "--batch-size: wants at least 1; got 0"),
        ("--repeats 0", "--repeats: wants at least 1; got 0"),
    ],
    "training": [
        ("--batch 0", "--batch: wants at least 1; got 0"),
        ("--models titok-x", "invalid choice: 'titok-x'"),
        ("--upstream /nowhere", "modeling/titok.py"),
        ("--steps 0", "--steps: wants at least 1; got 0"),
    ],
    "first_call": [
        ("--batch-size 0", "--batch-size: wants at least 1; got 0"),
        ("--threads -1", "--threads: wants at least 1; got -1"),
        ("--modes graph", "invalid choice: 'graph'"),
        ("--model titok-x", "invalid choice: 'titok-x'"),
        ("--device cuda --modes fast int8", "--modes: int8 not on cuda"),
    ],
    "kernels": [("--only sort", "invalid choice: 'sort'")],
}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [(name, *one) for name, found in REFUSED.items() for one in found],
)
def test_what_is_wrong_is_refused_before_any_work(
    name: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = script_apart(name) if name == "kernels" else scripts(name)[0]
    refused(capsys, script, ["--device", "cpu", *words.split()], message)


def test_defaults_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def defaults(*words: str) -> Any:
        return options.parse_matrix(options.matrix_parser(""), list(words), sampling.MODELS)

    on_cpu = defaults("--device", "cpu")
    assert on_cpu.models == ("titok-l-32",)
    assert (on_cpu.batch, on_cpu.dtype) == ([2], ["fp32-ieee", "bf16"])
    assert on_cpu.modes == ["eager", "fast", "int8"]
    assert defaults("--device", "cpu", "--modes", "compiled").modes == ["compiled"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cuda = defaults("--device", "cuda")
    assert on_cuda.models == sampling.MODELS
    assert (on_cuda.batch, on_cuda.dtype) == ([1, 32, 128], ["fp32-ieee", "tf32", "bf16"])
    assert on_cuda.modes == ["eager", "fast", "compiled"]
