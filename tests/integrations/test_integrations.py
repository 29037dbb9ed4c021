"""Other libraries' objects, before `accelerate`, while it acts, and after `restore`.

The packages are those of the extra `integrations`; one that is absent is skipped.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.processes import output_of
from support.round_trips import bits, kernel_calls, round_trip
from torch import Tensor, nn

from titok_fast.integrations import accelerate, diffusers, restore, vector_quantize
from titok_fast.integrations._swap import Fast


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return kernel_calls(monkeypatch, vector_quantize, diffusers)


def test_import_pulls_in_nothing_else() -> None:
    code = (
        "import sys, titok_fast; assert 'titok_fast.integrations' not in sys.modules\n"
        "import titok_fast.integrations\n"
        "print(sorted({'diffusers', 'vector_quantize_pytorch', 'transformers', 'modeling'} "
        "& set(sys.modules)))"
    )
    assert output_of(code) == "[]\n"


def test_unknown_and_plain_objects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not know torch\.nn\.modules\.linear\.Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="restore wants an accelerated object; got a plain Linear"):
        restore(nn.Linear(2, 2))


# vector_quantize_pytorch


def vq(**options: Any) -> Any:
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    return package.VectorQuantize(**{"dim": 16, "codebook_size": 300} | options).eval()


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sequence": ({}, (3, 50, 16)),
    "single": ({}, (40, 16)),
    "channels first": ({"channel_last": False}, (3, 16, 50)),
    "image": ({"accept_image_fmap": True}, (2, 16, 5, 7)),
    "video": ({"accept_3d_fmap": True}, (2, 16, 2, 3, 4)),
    "projected": ({"codebook_dim": 6}, (3, 50, 16)),
    "projected image": ({"codebook_dim": 6, "accept_image_fmap": True}, (2, 16, 5, 7)),
}


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vector_quantize(layout: str, cosine: bool, calls: list[str]) -> None:
    options, shape = LAYOUTS[layout]
    layer, x = vq(use_cosine_sim=cosine, **options), torch.randn(shape)
    round_trip(layer, lambda: layer(x))
    assert calls == ["find_codes"]
    round_trip(layer, lambda: layer(x), interpreted=True)
    accelerate(layer).bfloat16()
    calls.clear()
    got = layer(x.bfloat16())
    assert bits(got) == bits(restore(layer)(x.bfloat16()))
    assert calls == ([] if cosine else ["find_codes"])


def test_vector_quantize_gradients_of_evaluation() -> None:
    layer = vq(codebook_dim=6, learnable_codebook=True, ema_update=False)
    x = torch.randn(2, 9, 16, requires_grad=True)
    weights = [*layer.parameters(), x]
    assert len(weights) == 6

    def gradients() -> list[Tensor | None]:
        loss = layer(x)[0].square().sum()
        return list(torch.autograd.grad(loss, weights, allow_unused=True))

    round_trip(layer, gradients)


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
def test_vector_quantize_takes_a_nan(cosine: bool, calls: list[str]) -> None:
    layer, x = vq(use_cosine_sim=cosine), torch.randn(3, 50, 16)
    x[1, 7, 3] = float("nan")
    round_trip(layer, lambda: layer(x))
    assert calls == ["find_codes"]


def test_vector_quantize_leaves_other_calls_to_its_own_code(calls: list[str]) -> None:
    layer, x = vq(), torch.randn(3, 50, 16)
    mask = torch.arange(50).expand(3, 50) < torch.tensor([[50], [20], [1]])
    round_trip(layer, lambda: layer(x, mask=mask))
    round_trip(layer, lambda: layer(x, topk=2))
    round_trip(layer, lambda: layer(x, indices=torch.zeros(3, 50, dtype=torch.long)))
    round_trip(layer, lambda: layer(x, return_loss_breakdown=True))
    state = copy.deepcopy(layer.state_dict())

    def one_update() -> Any:
        layer.load_state_dict(state)
        result = layer.train()(x.requires_grad_())
        return result, copy.deepcopy(layer.eval().state_dict())

    round_trip(layer, one_update)
    assert calls == []
    accelerate(layer)(x, mask=None, freeze_codebook=True, sample_codebook_temp=0.5)
    assert calls == ["find_codes"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"heads": 2}, "heads=2"),
        ({"heads": 2, "separate_codebook_per_head": True}, "heads=2"),
        ({"affine_param": True}, "affine_param=True"),
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes=True"),
        ({"kmeans_init": True}, "kmeans_init"),
        ({"vq_bridge": nn.Identity()}, "vq_bridge"),
        ({"dim": 300}, "codebook is 300 x 300"),
    ],
)
def test_vector_quantize_refusals(options: dict[str, Any], reason: str) -> None:
    layer = vq(**options)
    with pytest.raises(ValueError, match=f"cannot take this VectorQuantize: .*{reason}"):
        accelerate(layer)
    assert not any(isinstance(part, Fast) for part in layer.modules())


def test_vector_quantize_refuses_training_and_codes_that_are_no_directions() -> None:
    with pytest.raises(ValueError, match=r"updates its codebook.*call \.eval\(\) first"):
        accelerate(vq().train())
    layer = vq(use_cosine_sim=True)
    layer.codebook = 2 * layer.codebook
    with pytest.raises(ValueError, match="not of unit length"):
        accelerate(layer)


def test_the_object_stays_itself() -> None:
    layer = vq()
    kind, keys = type(layer), list(layer.state_dict())
    seen: list[str] = []
    layer.register_forward_hook(lambda *args: seen.append("hook"))
    accelerate(accelerate(layer))
    assert isinstance(layer, kind)
    assert type(layer).__name__ == "VectorQuantize"
    assert list(layer.state_dict()) == keys
    layer(torch.randn(1, 2, 16))
    assert seen == ["hook"]
    assert type(copy.deepcopy(layer)) is kind
    assert type(pickle.loads(pickle.dumps(accelerate(vq())))) is kind
    layer.codebook = layer.codebook.flip(0)  # weights are read, not copied
    x = torch.randn(1, 20, 16)
    flipped = layer(x)[1]
    assert torch.equal(flipped, restore(layer)(x)[1])


def test_restore_sees_a_class_changed_later() -> None:
    layer = accelerate(vq())
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(ValueError, match="class was changed again"):
        restore(layer)


# diffusers


def vq_model(**options: Any) -> Any:
    package = pytest.importorskip("diffusers")
    small = {"block_out_channels": (32,), "latent_channels": 8, "num_vq_embeddings": 200}
    return package.VQModel(**small | options).eval()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane", [True, False])
def test_vq_model(legacy: bool, sane: bool, calls: list[str]) -> None:
    model = vq_model()
    model.quantize.legacy, model.quantize.sane_index_shape = legacy, sane
    images, z = torch.rand(2, 3, 16, 16), torch.randn(2, 8, 6, 5, requires_grad=True)
    round_trip(model, lambda: tuple(model(images).to_tuple()))
    assert calls == ["nearest_code_stats"]

    def with_gradients() -> Any:
        codes, loss, (_, _, ids) = model.quantize(z)
        total = loss + codes.square().sum()
        return codes, loss, ids, torch.autograd.grad(total, [z, model.quantize.embedding.weight])

    round_trip(model.quantize, with_gradients)
    calls.clear()
    model = model.bfloat16()
    with pytest.raises(ValueError, match=r"its codebook is torch\.bfloat16"):
        accelerate(model)
    accelerate(model.float()).bfloat16()
    model(images.bfloat16())
    assert calls == []


def test_vq_model_takes_a_nan(calls: list[str]) -> None:
    """Its loss is how training notices one."""
    model, z = vq_model(), torch.randn(2, 8, 6, 5, requires_grad=True)
    z.data[1, 4, 2, 2] = float("nan")

    def with_gradients() -> Any:
        codes, loss, (_, _, ids) = model.quantize(z)
        assert loss.isnan()
        return codes, ids, torch.autograd.grad(loss, z)

    round_trip(model.quantize, with_gradients)
    assert calls == ["nearest_code_stats"]


def test_vq_model_refuses_renamed_ids() -> None:
    model = vq_model()
    model.quantize.remap = "used.npy"
    with pytest.raises(ValueError, match="remap renames ids"):
        accelerate(model)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("square", [False, True], ids=["sequence", "square"])
@pytest.mark.parametrize("own_stream", [False, True], ids=["global", "generator"])
def test_amused(schedule: str, square: bool, own_stream: bool, calls: list[str]) -> None:
    scheduler = pytest.importorskip("diffusers").AmusedScheduler(64, schedule)
    scheduler.set_timesteps(6, temperature=(3, 0))
    logits = 3 * torch.randn(6, 3, 20, 64)
    start = torch.full((3, 20), 64)
    start[1, :7], start[2] = 5, 6  # samples that know some tokens, and all
    if square:
        start, logits = start.view(3, 4, 5), logits.transpose(2, 3).reshape(6, 3, 64, 4, 5)

    def run() -> Any:
        stream = torch.Generator().manual_seed(3) if own_stream else None
        ids, seen = start, []
        for i, timestep in enumerate(scheduler.timesteps):
            out = scheduler.step(logits[i], timestep, ids, 0.9, generator=stream)
            ids, drawn = scheduler.step(logits[i], timestep, ids, 0.9, stream, return_dict=False)
            seen.append((out.prev_sample, out.pred_original_sample, ids, drawn))
        return seen, None if stream is None else stream.get_state()

    round_trip(scheduler, run)
    if own_stream:
        round_trip(scheduler, run, interpreted=True)
    assert calls.count("guided_sample") == (24 if own_stream else 12)
    assert calls.count("remask") == (20 if own_stream else 10)
    calls.clear()
    json = scheduler.to_json_string()
    assert accelerate(scheduler).to_json_string() == json
    torch.manual_seed(0)
    got = scheduler.step(logits[0].bfloat16(), 3, start, return_dict=False)
    torch.manual_seed(0)
    want = restore(scheduler).step(logits[0].bfloat16(), 3, start, return_dict=False)
    assert bits(got) == bits(want)
    assert calls == []
