"""What is special about the orthogonal adapters: OFT, BOFT, HRA, PSOFT."""

import copy
from functools import partial

import pytest
import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from peft.tuners.boft import layer as boft_layer
from peft.tuners.oft.layer import OFTRotationModule
from torch import nn

from dora_cache import attach
from dora_cache.recipes import load_recipes
from dora_cache.recipes.blocks import rotate
from dora_cache.recipes.examples import TARGETS, Example, make_model
from dora_cache.recipes.hooks import UnusualError
from dora_cache.testing import check_recipe

EXAMPLES = {example.name: example for recipe in load_recipes() for example in recipe.examples}


def both(example, **more):
    """An example's model, its twin, and an input."""
    (model, x), (twin, _) = (make_model(example, **more) for _ in range(2))
    return model, twin, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (2, 3, 8), (2, 1, 3, 8)])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_rotating_by_blocks_is_the_einsum(shape, count, dtype):
    """To the bit, for separate and for shared blocks."""
    x = torch.randn(*shape).to(dtype)
    for blocks in (torch.randn(count, 8 // count, 8 // count), torch.randn(1, *[8 // count] * 2)):
        full = blocks.to(dtype).repeat(count // len(blocks), 1, 1)
        expected = torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (count, -1)), full)
        assert torch.equal(rotate(x, blocks.to(dtype), count), expected.flatten(-2))


@pytest.mark.parametrize("x", [torch.randn(8), torch.randn(3, 6), torch.randn(0, 8)])
def test_what_does_not_fit_is_not_rotated(x):
    """Vectors, other widths and empty inputs are left to PEFT."""
    with pytest.raises(UnusualError):
        rotate(x, torch.randn(2, 4, 4), 2)


def test_constrained_oft_writes_the_same_weights():
    """Weights follow PEFT's projection forward by forward; within their bound, there are hits."""
    example = Example(
        "OFT, coft, not settled",
        lambda *_: OFTConfig(
            r=0, oft_block_size=4, coft=True, eps=0.05, init_weights=False, target_modules=TARGETS
        ),
    )
    model, plain, x = both(example)
    before = copy.deepcopy(model.state_dict())
    with attach(model) as cache, torch.no_grad():
        for index in range(12):
            assert torch.equal(model(x), plain(x))
            state = plain.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
            if index == 0:
                assert cache.stats().stores == 0
        # On the bound, rounding decides whether they ever stay as they are.
        for key, value in [*model.named_parameters(), *plain.named_parameters()]:
            if "oft_R" in key:
                value.mul_(0.5)
        before_hits = cache.stats().hits
        for _ in range(2):
            assert torch.equal(model(x), plain(x))
        assert cache.stats().hits - before_hits >= 2
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert len(changed) == 2


def test_warming_constrained_oft_writes_to_no_weight():
    """What PEFT would only do in forward is not done ahead."""
    example = Example(
        "OFT, coft",
        lambda *_: OFTConfig(
            r=0, oft_block_size=4, coft=True, eps=0.05, init_weights=False, target_modules=TARGETS
        ),
    )
    model, _ = make_model(example)
    before = copy.deepcopy(model.state_dict())
    with attach(model) as cache:
        cache.warm()
        assert cache.stats().entries == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_rotations_are_declined():
    """A rotation module that is not PEFT's own runs as it is, and the report says so."""

    class Rotation(OFTRotationModule):
        def forward(self, x):
            return 2 * super().forward(x)

    model, plain, x = both(EXAMPLES["OFT"])
    for net in (model, plain):
        net.base_model.model.layer.oft_R["first"].__class__ = Rotation
    with pytest.warns(match="OFTRotationModule"):
        cache = attach(model)
    with cache, torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
        assert [kind for kind, *_ in cache.declined] == ["OFT"]
        assert cache.stats().hits > 0  # the other layer's


class _Kernel:
    """Does what PEFT's CUDA extension for BOFT does."""

    def forward(self, blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, grad, blocks):
        size = blocks.shape[-1]
        parts = grad.unflatten(1, (-1, size)).unflatten(3, (-1, size))
        return [parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_boft_with_several_factors(numerics, monkeypatch):
    """With PEFT's extension there are butterflies, whose product is not block-diagonal."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", _Kernel)
    example = Example(
        "BOFT, 2 factors",
        lambda *_: BOFTConfig(
            boft_block_size=4, boft_n_butterfly_factor=2, init_weights=False, target_modules=TARGETS
        ),
    )
    make = partial(make_model, example, adapters=("first", "second"))
    layer = make()[0].base_model.model.layer
    assert layer.boft_R["first"].shape[0] == 2
    assert not torch.equal(layer.boft_P[1], torch.eye(16))
    check_recipe(make, numerics=numerics)


def test_boft_stores_blocks_only_where_there_are_blocks():
    """In "fast", a permutation that is not the identity makes the stored value a matrix."""
    model, plain, x = both(EXAMPLES["BOFT"], inputs=64, layers=1)
    with attach(model, numerics="fast") as cache, torch.no_grad():
        model(x)
        small = cache.stats().nbytes
        for net in (model, plain):
            net.base_model.model.layer.boft_P.copy_(torch.eye(64).flip(0).unsqueeze(0))
        torch.testing.assert_close(model(x), plain(x))
        assert cache.stats().nbytes >= small + 64 * 64 * 4 - 64 * 8 * 4


@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [
        ("OFT", "oft_R", {"coft": True}),
        (
            "OFT, coft",
            "oft_R",
            {"num_cayley_neumann_terms": 3, "use_cayley_neumann": False, "eps": 0.01},
        ),
        (
            "PSOFT",
            "psoft_R",
            {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.01},
        ),
    ],
)
def test_numbers_that_a_rotation_keeps(name, part, changes):
    """Outputs follow each of them."""
    model, plain, x = both(EXAMPLES[name])
    with attach(model), torch.no_grad():
        last = model(x)
        assert torch.equal(last, plain(x))
        for attribute, value in changes.items():
            for net in (model, plain):
                setattr(getattr(net.base_model.model.layer, part)["first"], attribute, value)
            expected = plain(x)
            assert not torch.equal(expected, last)
            assert torch.equal(model(x), expected)
            last = expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra_as_it_is_initialized(gram_schmidt, dtype):
    """Pairs of equal vectors: reflections cancel, and Gram-Schmidt makes noise of them, or NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24)).to(dtype)
    config = HRAConfig(r=4, apply_GS=gram_schmidt, target_modules=["0"])
    plain = get_peft_model(net, config).eval()
    model, x = copy.deepcopy(plain), torch.randn(3, 16).to(dtype)
    with attach(model, numerics="fast"), torch.no_grad():
        model(x)
        tolerance = 1e-5 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(
            model(x), plain(x), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def test_hra_is_not_folded_below_the_inputs_precision():
    """A float32 input to a bfloat16 layer is multiplied in float32, as PEFT does."""
    model, plain, x = both(EXAMPLES["HRA"], dtype=torch.bfloat16)
    x = x.float()
    with attach(model, numerics="fast") as cache, torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), plain(x))
        assert cache.stats().hits > 0


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_hooks_on_psofts_rotation_still_run(numerics):
    """Its module is not called where the rotation is stored, unless somebody watches it."""
    model, plain, x = both(EXAMPLES["PSOFT"])
    with attach(model, numerics=numerics), torch.no_grad():
        model(x)
        for net in (model, plain):
            rotation = net.base_model.model.layer.psoft_R["first"]
            rotation.register_forward_hook(lambda *parts: 2 * parts[-1])
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    "settings", [{"psoft_orth": False}, {"psoft_mag_a": False}, {"use_cayley_neumann": True}]
)
@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_psofts_options(settings, numerics):
    """Each is followed, before and after its weights change."""
    example = Example(
        "PSOFT",
        lambda *_: PsoftConfig(r=4, init_weights=False, target_modules=TARGETS, **settings),
    )
    model, plain, x = both(example)
    with attach(model, numerics=numerics), torch.no_grad():
        for _ in range(2):
            for _ in range(2):
                torch.testing.assert_close(model(x), plain(x))
            for parameter in [*model.parameters(), *plain.parameters()]:
                parameter.mul_(1.1)
