"""Chunked log-probabilities agree with torch's own softmax, and their gradients with autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from stackllama.model import logprobs
from stackllama.model.logprobs import summed_loss, token_logprobs


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


def _loss(part: slice, logprob_C: torch.Tensor, entropy_C: torch.Tensor) -> torch.Tensor:
    """Of both numbers, and of a token's place among all."""
    place_C = torch.arange(part.start, part.stop)
    return (1.0 + place_C) * torch.exp(-logprob_C) + logprob_C.square() - 0.3 * entropy_C.pow(3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_a_summed_loss_and_its_gradients_agree_with_autograd_whatever_the_chunk(
    softcap: float | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 3 * 11)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=draw, requires_grad=True) for n in (7, 11))
    label = torch.randint(11, (7,), generator=draw)
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    theirs = torch.distributions.Categorical(logits=logits)
    expected = _loss(slice(0, 7), theirs.log_prob(label), theirs.entropy()).sum()
    inputs = (hidden, weight) if trained else (hidden,)
    total, logprob, entropy = summed_loss(
        hidden, weight if trained else weight.detach(), label, _loss, softcap=softcap, with_entropies=True
    )
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert torch.equal(logprob, token_logprobs(hidden, weight, label, softcap=softcap))
    assert torch.allclose(entropy, theirs.entropy(), atol=1e-6)
    assert not logprob.requires_grad
    assert not entropy.requires_grad
    wanted = torch.autograd.grad(3 * expected, inputs)
    for one, two in zip(torch.autograd.grad(3 * total, inputs), wanted, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()


@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_of_log_probabilities_alone_has_the_gradient_that_these_have(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 3 * 11)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=draw, requires_grad=True) for n in (7, 11))
    label, upstream = torch.randint(11, (7,), generator=draw), torch.randn(7, generator=draw)
    weight = weight if trained else weight.detach()
    inputs = (hidden, weight) if trained else (hidden,)
    total, _, entropy = summed_loss(hidden, weight, label, lambda part, logprob, _: upstream[part] * logprob)
    assert entropy.tolist() == [0.0] * 7
    each = token_logprobs(hidden, weight, label)
    for one, two in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad((upstream * each).sum(), inputs), strict=True
    ):
        assert (one - two).norm() <= 1e-6 * two.norm()
    with torch.no_grad():
        assert torch.equal(
            summed_loss(hidden, weight, label, lambda part, logprob, _: upstream[part] * logprob)[0], total
        )


def test_an_entropy_and_its_slope_worked_by_hand() -> None:
    # Two tokens at 3/4 and 1/4: logits (0, -log 3), H = 3/4 log 4/3 + 1/4 log 4 = 0.562335. The derivative by the first
    # logit is -3/4 (log 3/4 + H) = -3/4 * 0.274653 = -0.205990, by the second the opposite.
    hidden = torch.tensor([[0.0, -math.log(3)]], requires_grad=True)
    total, _, entropy = summed_loss(
        hidden, torch.eye(2), torch.tensor([0]), lambda _, __, entropy: entropy, with_entropies=True
    )
    assert entropy.tolist() == pytest.approx([0.562335], abs=1e-6)
    (slope,) = torch.autograd.grad(total, hidden)
    assert slope[0].tolist() == pytest.approx([-0.205990, 0.205990], abs=1e-6)


def test_a_uniform_distribution_worked_by_hand() -> None:
    # Equal logits over 8 tokens: each has log-probability -log 8, and the entropy is log 8.
    hidden, weight = torch.zeros(2, 4), torch.ones(8, 4)
    assert token_logprobs(hidden, weight, torch.tensor([0, 7])).tolist() == pytest.approx([-math.log(8)] * 2)
    label = torch.tensor([0, 7])
    _, _, entropy = summed_loss(hidden, weight, label, lambda _, logprob, __: logprob, with_entropies=True)
    assert entropy.tolist() == pytest.approx([math.log(8)] * 2)


def test_precisions_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(8, 4), torch.tensor([0, 7]))


def test_the_output_matrix_alone_can_be_learned() -> None:
    draw = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(7, 5, generator=draw), torch.randn(11, 5, generator=draw, requires_grad=True)
    label = torch.randint(11, (7,), generator=draw)
    total, _, _ = summed_loss(hidden, weight, label, lambda _, logprob, __: -logprob)
    (ours,) = torch.autograd.grad(total, weight)
    (theirs,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weight.T, label, reduction="sum"), weight
    )
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_without_gradients_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: torch.Tensor) -> None:
        raise AssertionError("a slope was worked out")

    monkeypatch.setattr(logprobs, "_slopes", refuse)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    with torch.no_grad():
        total, *_ = summed_loss(hidden, weight, torch.zeros(7, dtype=torch.int64), lambda _, logprob, __: -logprob)
    assert total > 0
    assert not total.requires_grad
