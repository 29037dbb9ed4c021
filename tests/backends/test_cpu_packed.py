"""The fast mode on a CPU: each technique against the plain layers, and what must be refused."""

import pytest
import torch
import torch.nn.functional as F
from support.processors import AVX2, BF16
from support.tiny_models import relative, tiny_generator, tiny_tokenizer
from torch import nn

from titok_fast import SamplingConfig, TiTokPipeline
from titok_fast.backends.cpu_int8 import (
    INT8_LAYERS,
    Int8Conv,
    Int8Linear,
    Int8Mlp,
    norm_arguments,
    quantize_weight,
)
from titok_fast.backends.cpu_int8_ops import (
    compiled_ops,
    norm_silu_quantize,
    quantize_image,
    quantize_rows,
)
from titok_fast.backends.cpu_packed import (
    PACKED_LAYERS,
    PackedLinear,
    PackedMlp,
    PackedUpsample,
    pack,
)
from titok_fast.backends.techniques import TECHNIQUES
from titok_fast.config import VQGANConfig
from titok_fast.models.attention import attend
from titok_fast.models.attention_cpu import dropout_mask
from titok_fast.models.blocks import Mlp
from titok_fast.models.vqgan import NormSiLU, PixelDecoder, _channels_last, upsample_conv
from titok_fast.processor.here import processor
from titok_fast.processor.rates import FORMATS

DTYPES = (torch.float32, torch.bfloat16)
# float32 sums in another order; bfloat16: the plain Mlp rounds once more, before GELU
NEAR = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


def pipeline(model_type: str = "ViT") -> TiTokPipeline:
    torch.manual_seed(0)
    return TiTokPipeline(tiny_tokenizer(), tiny_generator(model_type), SamplingConfig(4))


def layer(D: int, E: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(D, E, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    # the last two in parts: of 5, 5 and 3 pictures in float32, of 11 and 2 in bfloat16;
    # and pictures that are larger than a part
    "shape",
    [(1, 1, 2, 8), (2, 33, 4, 48), (3, 289, 2, 64), (13, 257, 4, 16), (2, 1030, 2, 8)],
)
def test_matmuls_are_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, L, H, d = shape
    qkv = torch.randn(B, L, 3, H, d).to(dtype)
    want = attend(qkv.double())
    near = {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]  # weights rounded to 8 bits
    assert relative(attend(qkv, "products").double(), want) < near
    assert attend(qkv, "products").shape == (B, L, H * d)


def test_products_have_the_gradient_of_attention() -> None:
    qkv = torch.randn(3, 600, 3, 4, 8, requires_grad=True)  # in three parts
    (want,) = torch.autograd.grad(attend(qkv).sin().sum(), qkv)
    (got,) = torch.autograd.grad(attend(qkv, "products").sin().sum(), qkv)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("B", [1, 3])
def test_products_drop_weights(B: int) -> None:
    L, H, dropout = 600, 4, 0.3  # three pictures go in three parts
    qkv = torch.randn(B, L, 3, H, 8, requires_grad=True)
    torch.manual_seed(7)
    got = attend(qkv, "products", dropout)
    torch.manual_seed(7)
    kept, factor = dropout_mask((B, H, L, L), dropout, qkv.device)
    assert kept is not None
    assert factor == 1 / (1 - dropout)
    assert abs(float(kept.float().mean()) - 0.7) < 0.01
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.mT / 8**0.5, dim=-1) * kept / (1 - dropout)
    want = (weights @ v).transpose(1, 2).flatten(2)
    assert relative(got, want) < 1e-6
    grads = (torch.autograd.grad(x.sin().sum(), qkv)[0] for x in (got, want))
    assert relative(*grads) < 1e-5


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-9])
def test_what_dropout_keeps(dropout: float) -> None:
    torch.manual_seed(1)
    mask, _ = dropout_mask((997, 101, 11), dropout, torch.device("cpu"))
    assert mask is not None
    kept = mask.double()
    n, p = kept.numel(), 1 - dropout
    assert abs(float(kept.mean()) - p) <= 4 * (p * dropout / n) ** 0.5 + 2**-17
    a, b = kept.flatten()[:-1], kept.flatten()[1:]  # neighbours come from the same number
    assert abs(float((a * b).mean() - a.mean() * b.mean())) < 4 * p * dropout / n**0.5 + 1e-12
    other, _ = dropout_mask((997, 101, 11), dropout, torch.device("cpu"))
    torch.manual_seed(1)
    again, _ = dropout_mask((997, 101, 11), dropout, torch.device("cpu"))
    assert other is not None
    assert again is not None
    assert torch.equal(mask, again)
    assert torch.equal(mask, other) == (dropout < 1e-6)  # torch's generator goes on
    none, _ = dropout_mask((0, 3), dropout, torch.device("cpu"))
    assert none is not None
    assert none.shape == (0, 3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (2, 7, 48), (513, 48), (0, 48)])
def test_packed_linear_and_mlp(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not processor().rates[f"linear packed {FORMATS[dtype]}"]:
        pytest.skip(f"oneDNN has no layout for {dtype} here")
    x = torch.randn(shape).to(dtype)
    for bias in (True, False):
        plain = layer(48, 80, dtype, bias=bias)
        got = PackedLinear(plain)(x)
        assert got.dtype == dtype
        assert got.shape == (*shape[:-1], 80)
        if x.numel():
            assert relative(got, plain(x)) < NEAR[dtype]
    mlp = Mlp(48, 80).to(dtype)
    if x.numel():
        assert relative(PackedMlp(mlp)(x), mlp(x)) < NEAR[dtype]


def test_weights_are_quantized_by_output_channel() -> None:
    weight = torch.randn(6, 3, 3, 3) * torch.logspace(-3, 3, 6)[:, None, None, None]
    weight[2] = 0.0
    ints, scale = quantize_weight(weight)
    back = ints.float() * scale[:, None, None, None]
    assert bool(((back - weight).abs().flatten(1).amax(1) <= 0.501 * scale).all())


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_and_mlp_are_exact_but_for_quantization(dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 64).to(dtype)
    plain = layer(64, 96, dtype)
    rows, scale = quantize_rows(x.reshape(-1, 64))
    weight, w_scale = quantize_weight(plain.weight)
    exact = ((rows.double() - 128) * scale) @ (weight.double() * w_scale[:, None]).T
    want = (exact + plain.bias.double()).view(3, 11, 96)
    got = Int8Linear(plain)(x)
    assert relative(got.double(), want) < {torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]

    mlp = Mlp(64, 96).to(dtype)
    assert relative(Int8Mlp(mlp)(x), mlp(x)) < 0.02
    # one row of another size changes nothing for the rest
    y = x.clone()
    y[0, 0] *= 100
    assert torch.equal(Int8Mlp(mlp)(y)[1:], Int8Mlp(mlp)(x)[1:])


@torch.no_grad()
@pytest.mark.parametrize("after_norm", [True, False])
@pytest.mark.parametrize("kernel", [2, 3])
def test_int8_convolution_and_its_border(kernel: int, after_norm: bool) -> None:
    weight, bias = torch.randn(24, 32, kernel, kernel), torch.randn(24)
    x = torch.randn(2, 32, 9, 8).contiguous(memory_format=torch.channels_last)
    x[1] *= 30  # each image has its own scale
    norm = NormSiLU(32) if after_norm else None
    got = Int8Conv(weight, bias, norm)(x)
    want = []
    for one in x.split(1):
        q, step, zero = (
            quantize_image(one) if norm is None else norm_silu_quantize(one, *norm_arguments(norm))
        )
        back = (q.double() - zero) * step
        ints, w_scale = quantize_weight(weight)
        exact = ints.double() * w_scale[:, None, None, None].double()
        want.append(F.conv2d(back, exact, bias.double(), padding=1))  # its padding is 0
    assert relative(got.double(), torch.cat(want)) < 1e-6
    assert got.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("side", [5, 40])  # below and above the size from which phases are used
def test_packed_upsampling(side: int) -> None:
    conv, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(1, 8, side, side)
    assert conv.bias is not None
    want = upsample_conv(x, conv.weight, conv.bias)
    packed = PackedUpsample(conv, PACKED_LAYERS)
    assert relative(packed(x), want) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("mode", ["packed", "int8"])
@pytest.mark.parametrize("width", [32, 128])
def test_pixel_decoder_of_any_width(monkeypatch: pytest.MonkeyPatch, width: int, mode: str) -> None:
    torch.manual_seed(0)
    config = VQGANConfig(hidden_channels=width, channel_mult=(1, 2), num_res_blocks=1, z_channels=8)
    plain, codes = PixelDecoder(config).eval(), torch.randn(2, 8, 32, 32)  # large enough for phases
    formats: set[bool] = set()
    for part in plain.modules():
        if isinstance(part, NormSiLU):
            part.register_forward_pre_hook(lambda _, given: formats.add(given[0].is_contiguous()))
    want = plain(codes)
    assert formats == {width * 2 < 128}  # narrow ones are channels-first, all the way
    monkeypatch.setattr("titok_fast.models.vqgan._laid_out", lambda x, _: _channels_last(x))
    assert relative(plain(codes), want) < 1e-5
    monkeypatch.undo()
    pack(plain, PACKED_LAYERS if mode == "packed" else INT8_LAYERS)
    assert relative(plain(codes), want) < {"packed": 1e-5, "int8": 0.05}[mode]


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
@pytest.mark.parametrize("techniques", [("packed",), ("products",), ("packed", "products")])
def test_same_pictures_in_float32(model_type: str, techniques: tuple[str, ...]) -> None:
    plain, fast = pipeline(model_type), pipeline(model_type).compile(techniques)
    labels = [1, 4, 2]
    tokens = plain.sample_tokens(labels, seed=3)
    assert torch.equal(fast.sample_tokens(labels, seed=3), tokens)
    a, b = (p.detokenize(tokens, output="tensor") for p in (plain, fast))
    assert int((a.int() - b.int()).abs().max()) <= 1  # a value next to the half of a step
    pictures = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.tokenize(pictures), fast.tokenize(pictures))
    assert fast.techniques == techniques


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_int8_draws_nearly_the_same(model_type: str) -> None:
    plain, fast = pipeline(model_type), pipeline(model_type).compile(("products", "int8"))
    tokens = plain.sample_tokens([1, 4, 2, 7], seed=3)
    with torch.no_grad():
        a, b = (p.tokenizer.decode_tokens(tokens) for p in (plain, fast))
        one = fast.tokenizer.decode_tokens(tokens[2:3])
    # a dozen layers, a little over 1 % each, one half from inputs and one from weights: those round
    # twice as far where the processor wants 7 bits
    weights = 127 / processor().int8_limit
    assert relative(b, a) < 0.06 * ((1 + weights**2) / 2) ** 0.5
    assert torch.equal(one, b[2:3])  # a picture does not depend on its batch
    drawn = fast.sample_tokens([1, 4, 2, 7], seed=3)
    assert (drawn == tokens).float().mean() > 0.9
    assert torch.equal(fast.sample_tokens([1, 4], seed=3), drawn[:2])


@pytest.mark.filterwarnings("ignore:no C.. compiler")
@pytest.mark.parametrize("mode", [("packed", "products"), ("products", "int8")])
def test_compiled_ops_draw_as_eager(monkeypatch: pytest.MonkeyPatch, mode: tuple[str, ...]) -> None:
    assert compiled_ops() is not None
    want = pipeline().compile(mode).sample_tokens([1, 2, 3], seed=5)
    monkeypatch.setattr("titok_fast.backends.cpu_int8_ops.compiled_ops", lambda: None)
    assert torch.equal(pipeline().compile(mode).sample_tokens([1, 2, 3], seed=5), want)


def test_pack_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"want a float32 or bfloat16 model on the CPU; got .*16"):
        pack(tiny_generator().half(), PACKED_LAYERS)
    with pytest.raises(ValueError, match=r"got torch\.float32 on meta"):
        pack(tiny_generator().to("meta"), PACKED_LAYERS)


def test_what_does_not_fit_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("titok_fast.processor.here._known", BF16)
    pipe = pipeline()
    for techniques, message in (
        (("fast",), rf"unknown techniques \['fast'\]; known: {', '.join(TECHNIQUES)}"),
        (("packed", "inductor"), "'packed' and 'inductor' both replace the layers"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.compile(techniques)
    assert pipe.techniques == ()
    with pytest.raises(ValueError, match=r"'packed' wants float32 or bfloat16; got torch.float16"):
        pipeline().to(dtype="float16").compile()
    pipe.compile()
    assert pipe.techniques == ("packed",)
    with pytest.raises(ValueError, match="compiled already: packed"):
        pipe.compile(("int8",))
    with pytest.raises(ValueError, match="call `to` before"):
        pipe.to(dtype="bfloat16")


def test_a_compiled_model_is_not_saved_half(tmp_path: object) -> None:
    pipe = pipeline().compile()
    assert pipe.generator is not None
    with pytest.raises(ValueError, match="compiled"):
        pipe.generator.save_pretrained(str(tmp_path))


def test_weights_are_copied_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titok_fast.processor.here._known", AVX2)

    def size(model: nn.Module) -> int:
        return sum(t.numel() for t in model.state_dict().values())

    pipe = pipeline()
    assert pipe.generator is not None
    before = size(pipe.generator)
    pipe.compile()
    kept = size(pipe.generator.embeddings) + size(pipe.generator.lm_head)
    assert size(pipe.generator) < kept + 0.05 * before  # and norms and positions
