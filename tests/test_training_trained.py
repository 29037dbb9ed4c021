"""What is set up before a run; blocks that form activations again: same numbers, less memory."""

from collections.abc import Callable

import pytest
import torch
from models import relative
from torch import Tensor, nn

from titok_fast.attention import ENVIRONMENT, attend
from titok_fast.blocks import Attention, PostNormBlock, PreNormBlock, set_attention
from titok_fast.training.recipe_sections import TrainingConfig
from titok_fast.training.trained import WIDE, prepare_blocks

D, HEADS, L = 32, 4, 17
KINDS: dict[str, Callable[[], nn.Module]] = {
    "pre-norm": lambda: PreNormBlock(D, HEADS, 4 * D),
    "long skip": lambda: PreNormBlock(D, HEADS, 4 * D, skip=True),
    "post-norm": lambda: PostNormBlock(D, HEADS, 4 * D, dropout=0.1, attention_dropout=0.1),
}


def passed(kind: str, bf16: bool, recompute: bool) -> tuple[list[Tensor], int]:
    """Output and gradients of a block, and the bytes kept for the backward, weights left out."""
    torch.manual_seed(0)
    block = KINDS[kind]()
    set_attention(block, "products")
    block.recompute = recompute
    x = torch.randn(3, L, D, requires_grad=True)
    inputs = (x, torch.randn(3, L, D)) if kind == "long skip" else (x,)
    owned = {p.data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in owned:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = block(*inputs)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *block.parameters()])
    return [out, *grads], sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_nothing_but_memory(kind: str, bf16: bool) -> None:
    want, plain = passed(kind, bf16, False)
    got, lean = passed(kind, bf16, True)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert lean < 0.7 * plain


def test_no_gradients_no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    block = PreNormBlock(D, HEADS, 4 * D)
    block.recompute = True
    monkeypatch.setattr("titok_fast.blocks.checkpoint", None)
    with torch.no_grad():
        block(torch.randn(2, L, D))
    with pytest.raises(TypeError):
        block(torch.randn(2, L, D))


def test_products_learn_as_well_as_sdpa_in_bfloat16() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 65, 3, 4, 16)
    errors = {}
    exact = qkv.double().requires_grad_()
    (want,) = torch.autograd.grad(attend(exact).square().sum(), exact)
    for backend in ("sdpa", "products"):
        low = qkv.bfloat16().requires_grad_()
        (got,) = torch.autograd.grad(attend(low, backend).float().square().sum(), low)
        errors[backend] = relative(got, want)
    assert errors["products"] <= 1.5 * errors["sdpa"]


def model() -> nn.ModuleList:
    return nn.ModuleList(PreNormBlock(width, 4, width) for width in (WIDE - 4, WIDE))


def backends(blocks: nn.Module) -> list[str]:
    return [part.backend for part in blocks.modules() if isinstance(part, Attention)]


def chosen(**settings: object) -> tuple[list[str], list[bool]]:
    """What a narrow and a wide block were told."""
    blocks = model()
    prepare_blocks(blocks, TrainingConfig(**settings))  # type: ignore[arg-type]
    return backends(blocks), [block.recompute for block in blocks]


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
    assert not any(block.recompute for block in blocks)
