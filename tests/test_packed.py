"""Layers over packed weights give what plain layers give, and follow their weights when these change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framecap.model import packed
from framecap.model.packed import PackedLinear, pack_linears, use_eight_bits

SIZE = 512  # large enough to be packed


@pytest.fixture
def layer() -> PackedLinear:
    torch.manual_seed(0)
    return PackedLinear(SIZE, SIZE)


def plain(layer: PackedLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("shape", [(1, SIZE), (37, SIZE), (3, 5, SIZE), (0, SIZE)], ids=str)
@torch.inference_mode()
def test_a_packed_layer_gives_what_a_plain_one_gives(layer: PackedLinear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=0)
    assert layer._weight._packed is not None


@pytest.mark.parametrize("shape", [(1, SIZE), (37, SIZE), (3, 5, SIZE), (0, SIZE)], ids=str)
@torch.inference_mode()
def test_in_eight_bits_a_layer_gives_the_rounded_product(layer: PackedLinear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    use_eight_bits(layer)
    found = layer(x)
    torch.testing.assert_close(found, plain(layer, x), atol=0.03, rtol=0)
    steps = x.abs().amax(-1, keepdim=True) / 127
    scales = layer.weight.abs().amax(1) / 127
    whole = (x / steps).round().double() @ (layer.weight / scales[:, None]).round().double().T
    torch.testing.assert_close(found.double(), whole * steps * scales + layer.bias, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_in_eight_bits_no_row_depends_on_another(layer: PackedLinear) -> None:
    use_eight_bits(layer)
    x = torch.randn(9, SIZE) * torch.logspace(-3, 3, 9)[:, None]
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_eight_bits_may_be_asked_for_late_and_are_kept_by_copies(layer: PackedLinear) -> None:
    x = torch.randn(4, SIZE)
    with torch.inference_mode():
        exact = layer(x)
        use_eight_bits(layer)
        assert not torch.equal(layer(x), exact)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None, "training has the exact weights"


def test_a_weight_that_changes_is_packed_again(layer: PackedLinear) -> None:
    x = torch.randn(4, SIZE)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=0)
        layer.load_state_dict(PackedLinear(SIZE, SIZE).state_dict())
        torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=0)


def test_a_step_of_training_between_two_captions_is_seen(layer: PackedLinear) -> None:
    optimizer, x = torch.optim.AdamW(layer.parameters(), lr=0.1), torch.randn(4, SIZE)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-4, rtol=0)
        layer(x).square().mean().backward()
        assert layer.weight.grad is not None
        optimizer.step()


@torch.inference_mode()
def test_small_layers_and_other_dtypes_are_left_to_torch() -> None:
    small, half = PackedLinear(16, 16), PackedLinear(SIZE, SIZE).to(torch.bfloat16)
    small(torch.randn(2, 16))
    half(torch.randn(2, SIZE, dtype=torch.bfloat16))
    assert small._weight._packed is half._weight._packed is None
    assert 16 * 16 < packed._LEAST_WEIGHTS <= SIZE * SIZE


@torch.inference_mode()
def test_a_layer_in_use_can_be_copied_pickled_and_saved(layer: PackedLinear) -> None:
    x = torch.randn(4, SIZE)
    expected = layer(x)
    assert list(layer.state_dict()) == ["weight", "bias"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), expected, atol=0, rtol=0)


def test_packing_a_model_keeps_its_parameters_and_names() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()))
    before, x = dict(model.named_parameters()), torch.randn(2, 8)
    expected = model(x)
    pack_linears(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("shape", [(128, 384), (512, 128), (768, 768), (3072, 768)], ids=str)
@torch.inference_mode()
def test_a_row_gets_the_same_values_whatever_stands_beside_it(shape: tuple[int, int]) -> None:
    """To rounding: some processors have other kernels for 4 rows than for 40."""
    layer, x = PackedLinear(*shape), torch.randn(40, shape[0])
    expected = layer(x)
    for rows in (1, 2, 3, 4, 7, 39):
        torch.testing.assert_close(layer(x[-rows:]), expected[-rows:], atol=1e-5, rtol=0)
