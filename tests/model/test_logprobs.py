"""Chunked log-probabilities agree with torch's own softmax, and their gradients with autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from stackllama.model import logprobs
from stackllama.model.logprobs import summed_logprobs, token_entropies, token_logprobs


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_agree_with_log_softmax_whatever_the_chunk(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 3 * 11)  # 3 positions a chunk: 7 positions make 3 chunks
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=draw, dtype=torch.float32, requires_grad=True) for n in (7, 11))
    label, upstream = torch.randint(11, (7,), generator=draw), torch.randn(7, generator=draw)
    ours = token_logprobs(hidden, weight, label, softcap=softcap)
    ours_grad = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    theirs = torch.log_softmax(logits, -1)[torch.arange(7), label]
    theirs_grad = torch.autograd.grad((theirs * upstream).sum(), (hidden, weight))
    assert torch.allclose(ours, theirs, atol=1e-6)
    for one, two in zip(ours_grad, theirs_grad, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_the_sum_and_a_frozen_matrix_have_the_same_gradients(
    softcap: float | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 3 * 11)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=draw, requires_grad=True) for n in (7, 11))
    label, upstream = torch.randint(11, (7,), generator=draw), torch.randn(7, generator=draw)
    expected = token_logprobs(hidden, weight, label, softcap=softcap)
    weight = weight if trained else weight.detach()
    inputs = (hidden, weight) if trained else (hidden,)
    total = summed_logprobs(hidden, weight, label, softcap=softcap)
    assert float(total.detach()) == pytest.approx(float(expected.detach().sum()), rel=1e-6)
    wanted = torch.autograd.grad(3 * expected.sum(), (hidden,) if not trained else inputs, retain_graph=True)
    for one, two in zip(torch.autograd.grad(3 * total, inputs), wanted, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()
    (one,) = torch.autograd.grad(
        (token_logprobs(hidden, weight.detach(), label, softcap=softcap) * upstream).sum(), hidden
    )
    (two,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    assert (one - two).norm() <= 1e-6 * two.norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_entropies_and_their_gradients_agree_with_autograd_whatever_the_chunk(
    softcap: float | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 3 * 11)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=draw, requires_grad=True) for n in (7, 11))
    upstream = torch.randn(7, generator=draw)
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    theirs = torch.distributions.Categorical(logits=logits).entropy()
    inputs = (hidden, weight) if trained else (hidden,)
    ours = token_entropies(hidden, weight if trained else weight.detach(), softcap=softcap)
    assert torch.allclose(ours, theirs, atol=1e-6)
    theirs_grad = torch.autograd.grad((theirs * upstream).sum(), inputs)
    for one, two in zip(torch.autograd.grad((ours * upstream).sum(), inputs), theirs_grad, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()
    with torch.no_grad():
        assert torch.equal(token_entropies(hidden, weight, softcap=softcap), ours)


def test_an_entropy_and_its_slope_worked_by_hand() -> None:
    # Two tokens at 3/4 and 1/4: logits (0, -log 3), H = 3/4 log 4/3 + 1/4 log 4 = 0.562335. The derivative by the first
    # logit is -3/4 (log 3/4 + H) = -3/4 * 0.274653 = -0.205990, by the second the opposite.
    hidden = torch.tensor([[0.0, -math.log(3)]], requires_grad=True)
    entropy = token_entropies(hidden, torch.eye(2))
    assert float(entropy.detach()) == pytest.approx(0.562335, abs=1e-6)
    (slope,) = torch.autograd.grad(entropy.sum(), hidden)
    assert slope[0].tolist() == pytest.approx([-0.205990, 0.205990], abs=1e-6)


def test_a_uniform_distribution_worked_by_hand() -> None:
    # Equal logits over 8 tokens: each has log-probability -log 8, and the entropy is log 8.
    hidden, weight = torch.zeros(2, 4), torch.ones(8, 4)
    assert token_logprobs(hidden, weight, torch.tensor([0, 7])).tolist() == pytest.approx([-math.log(8)] * 2)
    assert token_entropies(hidden, weight).tolist() == pytest.approx([math.log(8)] * 2)


def test_precisions_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(8, 4), torch.tensor([0, 7]))
