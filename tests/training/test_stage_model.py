"""What is set up before a run; lean blocks: same numbers, less memory."""

import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import relative
from torch import Tensor, nn

from titok_fast.backends.cpu_training import (
    has_onednn_matmul,
    keep_freed_memory,
    recompute_in_backward,
)
from titok_fast.models.attention import ENVIRONMENT, attend
from titok_fast.models.attention_cpu import dropout_mask
from titok_fast.models.blocks import Attention, PostNormBlock, PreNormBlock, set_attention
from titok_fast.training.recipe.sections import TrainingConfig
from titok_fast.training.stage_model import WIDE, prepare_blocks
from titok_fast.training.trainer import set_cuda_math

D, HEADS, L = 32, 4, 17
KINDS: dict[str, Callable[[], nn.Module]] = {
    "pre-norm": lambda: PreNormBlock(D, HEADS, 4 * D),
    "long skip": lambda: PreNormBlock(D, HEADS, 4 * D, skip=True),
    "post-norm": lambda: PostNormBlock(D, HEADS, 4 * D, dropout=0.1, attention_dropout=0.1),
}


class Drops(nn.Dropout):
    """Dropout by the numbers that lean blocks draw."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        kept, factor = dropout_mask(x.shape, self.p, x.device)
        return x * kept * factor


def passed(
    kind: str, dtype: torch.dtype, lean: bool, *, backend: str = "products", frozen: str = ""
) -> tuple[list[Tensor | None], int]:
    """Output and gradients of a block, and the bytes kept for the backward, weights left out.

    dtype is that of a residual stream under bfloat16 autocast, or float64: no autocast.
    """
    torch.manual_seed(0)
    block, exact = KINDS[kind](), dtype == torch.float64
    block.to(torch.float64 if exact else torch.float32)
    for name, p in block.named_parameters():
        p.requires_grad_(not frozen or not name.startswith(frozen))
    set_attention(block, backend)
    if isinstance(block, PostNormBlock):
        block.dropout = Drops(block.dropout.p)
    if lean:
        assert isinstance(block, PreNormBlock | PostNormBlock)
        recompute_in_backward(block)
    x = torch.randn(3, L, D).to(dtype).requires_grad_()
    inputs = (x, torch.randn(3, L, D).to(dtype)) if kind == "long skip" else (x,)
    owned = {p.data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in owned:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(1)  # of dropout
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=not exact),
    ):
        out = block(*inputs)
    out.float().square().sum().backward()
    return [out, x.grad, *(p.grad for p in block.parameters())], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_lean_blocks_change_nothing_but_memory(kind: str, dtype: torch.dtype) -> None:
    want, plain = passed(kind, dtype, False)
    got, lean = passed(kind, dtype, True)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert lean < (0.7 if kind == "post-norm" else 0.4) * plain


@pytest.mark.parametrize("frozen", ["norm", "attn", "mlp", "mlp.fc1.weight", "mlp.fc2.bias"])
def test_lean_blocks_that_learn_in_part(frozen: str) -> None:
    want, _ = passed("pre-norm", torch.float32, False, frozen=frozen)
    got, _ = passed("pre-norm", torch.float32, True, frozen=frozen)
    assert [x is None for x in got] == [x is None for x in want]
    assert any(x is None for x in got)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_lean_blocks_in_float32_and_without_gradients() -> None:
    torch.manual_seed(0)
    block, lean = (KINDS["pre-norm"]() for _ in range(2))
    assert isinstance(lean, PreNormBlock)
    lean.load_state_dict(block.state_dict())
    recompute_in_backward(lean)
    x = torch.randn(3, L, D)
    with torch.no_grad():
        torch.testing.assert_close(lean(x), block(x))  # oneDNN adds in another order
        assert lean(x[:0]).shape == (0, L, D)
    for part in (block, lean):
        part(x).square().sum().backward()
    for mine, theirs in zip(lean.parameters(), block.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-5
    for dtype in (torch.float32, torch.float64):
        assert has_onednn_matmul(dtype) == (
            dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )


def test_lean_blocks_drop_in_training_alone() -> None:
    block = KINDS["post-norm"]()
    assert isinstance(block, PostNormBlock)
    set_attention(block, "products")
    recompute_in_backward(block)
    x = torch.randn(3, L, D)
    assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)
    plain = KINDS["post-norm"]().eval()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), plain(x))


def test_lean_blocks_once_differentiable() -> None:
    block = KINDS["pre-norm"]()
    assert isinstance(block, PreNormBlock)
    recompute_in_backward(block)
    x = torch.randn(1, L, D, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_attention_in_bfloat16_learns_as_well_as_torchs() -> None:
    def torchs(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    qkv = torch.randn(2, 65, 3, 4, 16)
    exact = qkv.double().requires_grad_()
    (want,) = torch.autograd.grad(torchs(exact).square().sum(), exact)
    errors = {}
    for name, way in {"torch": torchs, "products": partial(attend, backend="products"),
                      "sdpa": attend}.items():  # fmt: skip
        low = qkv.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):  # which leaves no float32 product as it is
            out = way(low)
        assert out.dtype == torch.bfloat16
        (got,) = torch.autograd.grad(out.float().square().sum(), low)
        errors[name] = relative(got, want)
    assert errors["products"] <= 1.5 * errors["torch"]
    assert errors["sdpa"] < 0.95 * errors["torch"]  # its products are those of float32


def model() -> nn.ModuleList:
    return nn.ModuleList(PreNormBlock(width, 4, width) for width in (WIDE - 4, WIDE))


def backends(blocks: nn.Module) -> list[str]:
    return [part.backend for part in blocks.modules() if isinstance(part, Attention)]


def lean(blocks: nn.ModuleList) -> list[bool]:
    """Whether each block's forward was replaced, by no checkpoint."""
    forwards = (getattr(block.forward, "func", None) for block in blocks)
    return [f is not None and f.__module__ == recompute_in_backward.__module__ for f in forwards]


def chosen(**settings: object) -> tuple[list[str], list[bool]]:
    """What a narrow and a wide block were told."""
    blocks = model()
    prepare_blocks(blocks, TrainingConfig(**settings))  # type: ignore[arg-type]
    return backends(blocks), lean(blocks)


def test_choices_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert chosen() == (["sdpa", "products"], [False, True])
    assert chosen(mixed_precision="no") == (["sdpa", "sdpa"], [False, True])
    assert chosen(activation_checkpointing=True) == (["sdpa", "products"], [False, False])
    monkeypatch.setenv(ENVIRONMENT, "sdpa")
    assert chosen() == (["sdpa", "sdpa"], [False, True])


def test_other_devices_are_left_as_they_are() -> None:
    with torch.device("meta"):
        blocks = model()
    prepare_blocks(blocks, TrainingConfig())
    assert backends(blocks) == ["sdpa", "sdpa"]
    assert not any(lean(blocks))


@pytest.mark.parametrize("tf32", [True, False])
def test_cuda_multiplies_as_upstreams_scripts_set_it(tf32: bool) -> None:
    set_cuda_math(tf32)
    cudnn = torch.backends.cudnn
    assert (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
    assert cudnn.benchmark


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_that_is_kept() -> None:
    code = """
import resource, torch
from titok_fast.backends.cpu_training import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(1 << 20) for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
told = keep_freed_memory()
print(int(told), *[faults() for _ in range(4)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, first, *_, last = map(int, done.stdout.split())
    assert first > 1000
    # many tensors: small objects may come to lie in a hole or two, which then are too small
    assert last < first / 10 if told else platform.libc_ver()[0] != "glibc", done.stdout


def test_a_c_library_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
