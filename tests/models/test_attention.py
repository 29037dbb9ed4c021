"""Attention back ends: one result, a clear word where one cannot work, and what "auto" picks."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import relative, tiny_generator, tiny_tokenizer
from torch import Tensor

from titok_fast.models import attention
from titok_fast.models.attention import BackendError, agrees_with_sdpa, attend, backend_name
from titok_fast.models.blocks import Attention, PreNormBlock, set_attention


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No back end installed or remembered, whatever this machine has."""
    monkeypatch.delenv(attention.ENVIRONMENT, raising=False)
    for name in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    attention._load.cache_clear()
    attention._first_working.cache_clear()
    yield
    attention._load.cache_clear()
    attention._first_working.cache_clear()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, H, d) each -> (B, L, H, d), from the definition."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1), v)


class Fake:
    """Stands in for flash-attn or xformers, and works on a CPU; remembers its calls."""

    def __init__(self, backend: str, patch: pytest.MonkeyPatch, error: float = 0.0) -> None:
        self.error, self.calls = error, []  # type: ignore[var-annotated]
        module: Any = ModuleType("fake")
        module.flash_attn_qkvpacked_func = self.flash
        module.memory_efficient_attention = self.xformers
        if backend == "flash":
            patch.setitem(sys.modules, "flash_attn", module)
        else:
            patch.setitem(sys.modules, "xformers", ModuleType("xformers"))
            patch.setitem(sys.modules, "xformers.ops", module)

    def flash(self, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
        self.calls.append((tuple(qkv.shape), dropout_p))
        return plain(*qkv.unbind(2)) + self.error

    def xformers(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        self.calls.append((tuple(q.shape), p))
        return plain(q, k, v) + self.error


@pytest.fixture
def cpu_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_check", lambda backend, device_type, dtype: None)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 33, 4, 48), (3, 7, 2, 64)])
def test_sdpa_against_the_definition(shape: tuple[int, int, int, int]) -> None:
    B, L, H, d = shape
    qkv = torch.randn(B, L, 3, H, d)
    assert relative(attend(qkv), plain(*qkv.unbind(2)).flatten(2)) < 1e-6


def test_long_skip_takes_the_current_state_first() -> None:
    block = PreNormBlock(8, 2, 16, qkv_bias=False, skip=True)
    assert block.skip_linear is not None
    x, skip = torch.randn(2, 1, 3, 8).unbind(0)
    h = F.linear(torch.cat([x, skip], dim=-1), block.skip_linear.weight, block.skip_linear.bias)
    h = h + block.attn(block.norm1(h))
    torch.testing.assert_close(block(x, skip), h + block.mlp(block.norm2(h)))
    assert block.attn.qkv.bias is None


@pytest.mark.parametrize(
    ("backend", "package"), [("flash", "flash-attn"), ("xformers", "xformers")]
)
def test_a_missing_package_is_named(backend: str, package: str) -> None:
    message = (
        rf"'{backend}' needs the package {package} \(pip install 'titok_fast\[{backend}\]'\): "
    )
    for call in (lambda: backend_name(backend), lambda: set_attention(tiny_tokenizer(), backend)):
        with pytest.raises(BackendError, match=message):
            call()


def test_a_namespace_without_function_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 alone installs only a namespace."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(BackendError, match="cannot import name 'flash_attn_qkvpacked_func'"):
        backend_name("flash")


@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_cpu_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, model = Fake(backend, monkeypatch), tiny_generator()
    set_attention(model, backend)
    with pytest.raises(BackendError, match=rf"'{backend}' runs on CUDA only; .* on cpu\."):
        model(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([1]))
    assert fake.calls == []


def test_flash_refuses_float32() -> None:
    with pytest.raises(BackendError, match=r"wants float16 or bfloat16; got torch\.float32"):
        attention._check("flash", "cuda", torch.float32)
    attention._check("flash", "cuda", torch.bfloat16)
    attention._check("xformers", "cuda", torch.float32)


def test_choice_by_argument_then_environment_then_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_name(None) == "sdpa"
    Fake("xformers", monkeypatch)
    monkeypatch.setenv(attention.ENVIRONMENT, "xformers")
    assert backend_name(None) == "xformers"
    assert backend_name("sdpa") == "sdpa"
    assert backend_name("auto") == "auto"
    model = tiny_tokenizer()
    used = {m.backend for m in model.modules() if isinstance(m, Attention)}
    assert used == {"xformers"}
    set_attention(model, "sdpa")
    assert {m.backend for m in model.modules() if isinstance(m, Attention)} == {"sdpa"}


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "unknown attention back end 'math'; known: sdpa, products, flash, xformers, auto"
    with pytest.raises(ValueError, match=message):
        backend_name("math")
    monkeypatch.setenv(attention.ENVIRONMENT, "math")
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer()


@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_back_ends_are_called_with_the_packed_tensor(
    backend: str, monkeypatch: pytest.MonkeyPatch, cpu_allowed: None
) -> None:
    fake = Fake(backend, monkeypatch)
    qkv = torch.randn(2, 33, 3, 4, 48)
    assert relative(attend(qkv, backend, dropout=0.0), attend(qkv)) < 1e-6
    shape = (2, 33, 3, 4, 48) if backend == "flash" else (2, 33, 4, 48)
    assert fake.calls == [(shape, 0.0)]
    attend(qkv, backend, dropout=0.25)
    assert fake.calls[-1] == (shape, 0.25)


def test_auto_falls_back_to_sdpa() -> None:
    qkv = torch.randn(1, 5, 3, 2, 16)
    assert torch.equal(attend(qkv, "auto"), attend(qkv))
    assert attention._first_working("cpu", torch.float32, 16) == "sdpa"


def test_auto_skips_one_that_is_wrong(monkeypatch: pytest.MonkeyPatch, cpu_allowed: None) -> None:
    wrong, right = Fake("flash", monkeypatch, error=0.5), Fake("xformers", monkeypatch)
    assert not agrees_with_sdpa("flash", "cpu", torch.float32, 16)
    assert agrees_with_sdpa("xformers", "cpu", torch.float32, 16)
    attend(torch.randn(1, 5, 3, 2, 16), "auto")
    assert wrong.calls == [((2, 33, 3, 2, 16), 0.0)] * 2  # the self-test alone
    assert right.calls[-1] == ((1, 5, 2, 16), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_flash_first(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, cpu_allowed: None
) -> None:
    Fake("flash", monkeypatch)
    assert attention._first_working("cpu", dtype, 48) == "flash"


def test_auto_skips_one_that_crashes(monkeypatch: pytest.MonkeyPatch, cpu_allowed: None) -> None:
    def crash(fake: Fake, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(Fake, "flash", crash)
    Fake("flash", monkeypatch)
    assert attention._first_working("cpu", torch.bfloat16, 48) == "sdpa"
