"""The step over active entries against the dense one, and the rule that chooses between them."""

import os
import subprocess
import sys

import pytest
import torch

from saelib import dictionaries, steps

LR, ALPHA = 1e-2, 2e-3


def pair(kind: str, bias: float = -0.8, n_features: int = 96, d: int = 40):
    """The same random dictionary twice, with optimisers, and a batch of which about a tenth of the codes is active."""
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        one = dictionaries.KINDS[kind](n_features, d, generator=generator)
        with torch.no_grad():
            one.bias.fill_(bias)
            if kind in ("standard", "topk"):  # their rows start short
                one.weight.mul_(10)
                one.decoder.mul_(10)
            if kind == "topk":
                one.k.fill_(9)
            if hasattr(one, "decoder_bias"):
                one.decoder_bias.normal_(std=0.1, generator=generator)
        made.append((one, steps.adam(one, LR, beta2=0.99)))
    return *made, 0.7 * torch.randn(64, d, generator=generator)


def dense(dictionary, optimiser, x, dtype):
    found = steps.hand_gradient(dictionary, x, ALPHA, dtype)
    optimiser.step()
    return found


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_several_sparse_steps_equal_dense_gradient_and_adam(kind):
    (sparse, mine), (other, theirs), x = pair(kind)
    for _ in range(5):
        found = steps._sparse_step(sparse, mine, x, ALPHA, torch.float32)[0]
        expected = dense(other, theirs, x, torch.float32)
        assert 0.02 < found["l0"] / 96 < 0.3
        assert found["error"].item() == pytest.approx(expected["error"].item(), rel=1e-5)
        assert found["l0"] == (expected["code"] != 0).sum().item() / len(x)
        assert found["sparsity"] == pytest.approx(expected["code"].sum(1).mean().item(), rel=1e-5)
    for (name, value), expected in zip(sparse.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                mine.state[value][moment], theirs.state[expected][moment], rtol=1e-3, atol=1e-7, msg=name
            )


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_in_bfloat16_only_rounding_differs(kind):
    (sparse, mine), (other, _), x = pair(kind)
    start = {name: value.detach().clone() for name, value in sparse.named_parameters()}
    found = steps._sparse_step(sparse, mine, x, ALPHA, torch.bfloat16)[0]
    expected = steps.hand_gradient(other, x, ALPHA, torch.float32)
    assert found["error"].item() == pytest.approx(expected["error"].item(), rel=1e-2)
    for name, value in sparse.named_parameters():
        moved = mine.state[value]["exp_avg"] / (1 - 0.9)
        true = dict(other.named_parameters())[name].grad
        assert torch.nn.functional.cosine_similarity(moved.flatten(), true.flatten(), dim=0) > 0.99, name
        assert not torch.equal(value, start[name])


def test_a_feature_that_is_not_active_still_moves_by_its_momentum():
    (sparse, mine), (other, theirs), x = pair("tied")
    for batch in (x, x * 1e-6):
        steps._sparse_step(sparse, mine, batch, ALPHA, torch.float32)
        dense(other, theirs, batch, torch.float32)
    torch.testing.assert_close(sparse.weight, other.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    (one, mine), (two, theirs), x = pair("standard")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        steps._sparse_step(one, mine, x, ALPHA, torch.float32)
        torch.set_num_threads(before)
        steps._sparse_step(two, theirs, x, ALPHA, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_dense_code_is_left_to_the_dense_step_and_a_sparse_one_is_not(monkeypatch):
    calls = []
    monkeypatch.setattr(steps, "hand_gradient", lambda *a, f=steps.hand_gradient: calls.append(1) or f(*a))
    for bias, expected in ((5.0, 1), (-0.8, 0)):
        calls.clear()
        (one, optimiser), _, x = pair("tied", bias)
        before = one.weight.detach().clone()
        found = steps.step(one, optimiser, x, ALPHA, torch.float32, LR)
        assert len(calls) == expected
        assert float(found["l0"]) > 0 and float(found["sparsity"]) > 0
        assert optimiser.state[one.weight]["step"] == 1 and not torch.equal(one.weight, before)


@pytest.mark.parametrize("kind", ["tied", "untied", "standard"])
def test_a_dense_step_takes_over_the_pre_activations_of_the_sparse_attempt(kind):
    (one, mine), (two, _), x = pair(kind, bias=0.5)
    found, pre_activation = steps._sparse_step(one, mine, x, ALPHA, torch.float32)
    assert found is None
    left = steps.hand_gradient(one, x, ALPHA, torch.float32, pre_activation)
    right = steps.hand_gradient(two, x, ALPHA, torch.float32)
    torch.testing.assert_close(left["code"], right["code"], rtol=1e-4, atol=1e-5)
    for value, expected in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad, rtol=1e-3, atol=1e-6)


def test_a_batch_that_is_not_finite_shows_in_the_error():
    (one, optimiser), _, x = pair("tied")
    x[3, 4] = float("nan")
    assert not torch.isfinite(steps._sparse_step(one, optimiser, x, ALPHA, torch.float32)[0]["error"])


def test_no_active_feature_at_all():
    (one, optimiser), _, x = pair("tied", bias=-100.0)
    found = steps.step(one, optimiser, x, ALPHA, torch.float32, LR)
    assert (found["l0"], found["sparsity"]) == (0, 0)
    assert found["error"].item() == pytest.approx(x.square().mean().item(), rel=1e-5)


def test_a_step_leaves_the_number_of_threads_alone_in_a_new_process():
    """numba sets it to all cores when its threads start, which happens once in a process."""
    program = """
import torch
from saelib import dictionaries, steps
torch.set_num_threads(1)
made = dictionaries.TiedSAE(8, 4)
made.bias.data.fill_(-2.0)
assert steps._sparse_step(made, steps.adam(made, 1e-3), torch.randn(16, 4), 1e-3, torch.float32)[0]
print(torch.get_num_threads())
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "1", done.stderr


def test_a_frozen_step_counter_gives_the_rates_of_the_papers_code(monkeypatch):
    """Under a constant gradient, update / lr as measured with the original's optimiser (PAPER.md, 2.4)."""

    def constant(dictionary, x, *rest):
        for parameter in dictionary.parameters():
            parameter.grad = torch.ones_like(parameter)
        return {"error": x.sum(), "code": x}

    monkeypatch.setattr(steps, "hand_gradient", constant)
    one = dictionaries.TiedSAE(2, 2).double()
    optimiser, moved = steps.adam(one, LR), []
    for _ in range(3000):
        before = one.bias.detach().clone()
        steps.step(one, optimiser, torch.zeros(1, 2).double(), ALPHA, torch.float64, LR, frozen_step=True)
        moved.append((before - one.bias.detach())[0].item() / LR)
    by_hand = [10 * (1 - 0.9**t) / (1000 * (1 - 0.999**t)) ** 0.5 for t in range(1, 3001)]
    assert moved == pytest.approx(by_hand, rel=1e-4)
    for number, measured in ((1, 1.0), (10, 2.06), (100, 1.0), (500, 0.5), (1000, 0.4), (3000, 0.324)):
        assert moved[number - 1] == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize("kind", ["tied", "standard"])
def test_a_frozen_step_counter_does_the_same_to_sparse_and_dense_steps(kind, monkeypatch):
    (one, mine), (two, theirs), x = pair(kind)
    for _ in range(5):
        steps.step(one, mine, x, ALPHA, torch.float32, LR, frozen_step=True)
    monkeypatch.setattr(steps, "LAYOUT", {})  # dense steps only
    for _ in range(5):
        steps.step(two, theirs, x, ALPHA, torch.float32, LR, frozen_step=True)
    for value, expected in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
    assert {float(state["step"]) for state in mine.state.values()} == {1.0}
