"""The loss by hand, and the hand-written gradient against autograd."""

import pytest
import torch

from saelib import dictionaries
from saelib.losses import hand_gradient, sae_loss


def random_case(kind: str, dtype: torch.dtype, batch: int = 37, d: int = 11, n_features: int = 23):
    """A dictionary (zero mean, unit scale) with about half of its codes active, and a batch."""
    generator = torch.Generator().manual_seed(0)
    made = dictionaries.KINDS[kind](n_features, d, generator=generator).to(dtype)
    if kind == "topk":
        made.k.fill_(n_features // 3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.5)
    return made, torch.randn(batch, d, generator=generator, dtype=dtype)


def gradients(made) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters()}


def by_autograd(made, x, alpha: float):
    made.zero_grad()
    code = made.encode(x)
    total, error, _ = sae_loss(x, made.decode(code), code, alpha)
    total.backward()
    return gradients(made), error.detach(), code.detach()


def test_the_loss_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    x_hat = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    code = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 5.0]])
    total, error, sparsity = sae_loss(x, x_hat, code, alpha=0.1)
    assert error.item() == pytest.approx((1 + 0 + 9 + 0) / 4)
    assert sparsity.item() == pytest.approx((3 + 5) / 2)
    assert total.item() == pytest.approx(2.5 + 0.1 * 4)


@pytest.mark.parametrize("kind", dictionaries.KINDS)
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.3])
def test_the_hand_written_gradient_equals_autograd(kind, alpha):
    made, x = random_case(kind, torch.float64)
    expected, error, code = by_autograd(made, x, alpha)
    made.zero_grad()
    found = hand_gradient(made, x, alpha, torch.float64)
    assert 0.2 < (code > 0).double().mean() < 0.8
    assert set(expected) == {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    for name, gradient in gradients(made).items():
        assert expected[name].norm() > 0
        assert (gradient - expected[name]).norm() < 1e-10 * expected[name].norm(), name
    assert found["error"].item() == pytest.approx(error.item(), rel=1e-12)
    torch.testing.assert_close(found["code"], code)


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_a_dead_dictionary_has_no_gradient(kind):
    made, x = random_case(kind, torch.float64)
    with torch.no_grad():
        made.bias.fill_(-100)
    found = hand_gradient(made, x, 0.1, torch.float64)
    assert all((gradient == 0).all() for name, gradient in gradients(made).items() if name != "decoder_bias")
    rest = x - getattr(made, "decoder_bias", torch.zeros(1)).detach()
    assert found["error"].item() == pytest.approx(rest.square().mean().item())


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_the_gradient_of_unit_rows_does_not_change_their_length(kind):
    made, x = random_case(kind, torch.float64)
    hand_gradient(made, x, 1e-3, torch.float64)
    free = made.weight if kind == "tied" else made.decoder
    along = (free.grad * free).sum(1) / (free.grad.norm(dim=1) * free.norm(dim=1)).clamp(min=1e-300)
    assert along.abs().max() < 1e-10


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_gradients_replace_the_former_ones(kind):
    made, x = random_case(kind, torch.float32)
    hand_gradient(made, x, 1e-3, torch.float32)
    first = gradients(made)
    hand_gradient(made, x, 1e-3, torch.float32)
    assert all(torch.equal(gradient, first[name]) for name, gradient in gradients(made).items())


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_the_bfloat16_gradient_points_where_the_float32_one_does(kind):
    made, x = random_case(kind, torch.float32, batch=128, d=32, n_features=64)
    hand_gradient(made, x, 1e-3, torch.float32)
    expected = gradients(made)
    hand_gradient(made, x, 1e-3, torch.bfloat16)
    for name, gradient in gradients(made).items():
        assert gradient.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.99, name
        assert gradient.norm().item() == pytest.approx(expected[name].norm().item(), rel=0.05)
