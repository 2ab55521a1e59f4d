"""losses.dpo with N rejected responses, label smoothing and --nll, against closed forms.

Gradients of whole training steps: test_train.py. What the loss converges to: test_theory.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import OBJECTIVES, dpo
from train import Args

dpo_loss = OBJECTIVES["dpo"].loss


def random_logps(n: int, pairs: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs and reference, (pairs, 1 + n) each, fp64."""
    generator = torch.Generator().manual_seed(seed)
    logps = -20 + 6 * torch.randn(pairs, 1 + n, generator=generator, dtype=torch.float64)
    return logps, logps + 4 * torch.randn(pairs, 1 + n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_reference_the_loss_is_ln_of_the_number_of_responses(n, beta):
    """ln(1 + N) and every margin 0, whatever the responses are."""
    logps, _ = random_logps(n)
    loss, metrics = dpo(logps, logps.clone(), beta)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(n + 1)), rtol=0, atol=1e-12)
    assert not metrics["margin"].any() and not metrics["reward_chosen"].any()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_softmax_over_responses_by_hand(n):
    """-log(e^r0 / sum_j e^rj), r = beta (log pi - log pi_ref), pair by pair in plain arithmetic (Eq. 8)."""
    logps, reference = random_logps(n)
    loss, metrics = dpo(logps, reference, 0.3)
    for i in range(len(logps)):
        r = [0.3 * (logps[i, j].item() - reference[i, j].item()) for j in range(1 + n)]
        expected = -math.log(math.exp(r[0]) / sum(map(math.exp, r)))
        assert loss[i].item() == pytest.approx(expected, rel=1e-12)
        assert metrics["margin"][i].item() == pytest.approx(r[0] - sum(r[1:]) / n, rel=1e-5)
        assert bool(metrics["accuracy"][i]) == (r[0] > max(r[1:]))


def test_with_one_rejected_response_it_is_minus_log_sigmoid():
    """Eq. 8 with N = 1 is Eq. 5."""
    logps, reference = random_logps(1)
    ratio = logps - reference  # (pairs, 2)
    expected = -F.logsigmoid(0.2 * (ratio[:, 0] - ratio[:, 1]))
    torch.testing.assert_close(dpo(logps, reference, 0.2)[0], expected)


def test_the_order_of_the_rejected_responses_does_not_matter():
    """Every permutation of three columns leaves loss and metrics; changing places with the chosen one moves
    them."""
    logps, reference = random_logps(3)
    expected, metrics = dpo(logps, reference, 0.3, 0.2)
    for order in ([0, 1, 3, 2], [0, 2, 3, 1], [0, 3, 2, 1]):
        loss, others = dpo(logps[:, order], reference[:, order], 0.3, 0.2)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for key, value in metrics.items():
            torch.testing.assert_close(others[key], value)
    swapped = [1, 0, 2, 3]
    loss, _ = dpo(logps[:, swapped], reference[:, swapped], 0.3, 0.2)
    assert (loss - expected).abs().max() > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_agree_with_finite_differences(n, smoothing):
    """And at the reference they are beta (1/(N+1) - 1, 1/(N+1), ...), by hand."""
    logps, reference = random_logps(n, pairs=3)
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dpo(x, reference, 0.3, smoothing)[0], logps)
    if not smoothing:
        loss, _ = dpo(logps, logps.detach(), 0.3)
        (grad,) = torch.autograd.grad(loss.sum(), logps)
        expected = 0.3 * torch.tensor([1 / (n + 1) - 1] + [1 / (n + 1)] * n, dtype=torch.float64)
        torch.testing.assert_close(grad, expected.expand_as(grad))


# ------------------------------------------------------------------------- label smoothing

@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_label_smoothing_is_trls(share):
    """N = 1: -(1 - e) log sigmoid(m) - e log sigmoid(-m), the formula of TRL's sigmoid loss."""
    logps, reference = random_logps(1)
    rewards = 0.3 * (logps - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    expected = -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)
    torch.testing.assert_close(dpo(logps, reference, 0.3, share)[0], expected, rtol=1e-12, atol=0)
    loss, _ = dpo_loss(logps, reference, torch.ones(7, 2), Args(beta=0.3, label_smoothing=share))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_label_smoothing_takes_every_rejected_response_alike(n):
    """The loss is linear in the share e, and at the reference ln(N + 1) for any."""
    logps, reference = random_logps(n)
    loss = {share: dpo(logps, reference, 0.3, share)[0] for share in (0.0, 0.2, 0.4)}
    torch.testing.assert_close(loss[0.2], (loss[0.0] + loss[0.4]) / 2, rtol=1e-12, atol=0)
    log_shares = (0.3 * (logps - reference)).softmax(-1).log()
    wrong_way_round = -log_shares[:, 1:].sum(-1) / n
    torch.testing.assert_close(loss[0.4], 0.6 * loss[0.0] + 0.4 * wrong_way_round)
    at_reference, _ = dpo(logps, logps, 0.3, 0.4)
    assert at_reference.tolist() == pytest.approx([math.log(n + 1)] * 7, rel=1e-12)


# ------------------------------------------------------------------------- --nll

def test_the_defaults_add_nothing():
    """No smoothing, no NLL: the objective is the plain one at beta 0.1."""
    logps, reference = random_logps(2)
    assert (Args().label_smoothing, Args().nll) == (0, 0)
    rewards = 0.1 * (logps - reference)
    expected = rewards.logsumexp(-1) - rewards[:, 0]
    loss, _ = dpo_loss(logps, reference, torch.ones(7, 3), Args())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("weight", "n"), [(1.0, 1), (0.25, 3)])
def test_nll_adds_the_chosen_responses_mean_nll(weight, n):
    """w * (-log pi(y_c) / |y_c|) a pair, not over the reference; the logged loss has it, the rest not."""
    logps, reference = random_logps(n)
    chosen_lengths = [1, 2, 3, 5, 8, 13, 21]
    lengths = torch.full((7, 1 + n), 99)  # those of rejected responses do not matter
    lengths[:, 0] = torch.tensor(chosen_lengths)
    logps.requires_grad_()
    plain, metrics_without = dpo_loss(logps, reference, lengths, Args(n_neg=n))
    loss, metrics = dpo_loss(logps, reference, lengths, Args(n_neg=n, nll=weight))
    assert not any(value.requires_grad for value in metrics.values())
    added = loss - plain
    expected = [weight * -logps[i, 0].item() / length for i, length in enumerate(chosen_lengths)]
    assert added.tolist() == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(added.sum(), logps)
    assert not grad[:, 1:].any()
    assert grad[:, 0].tolist() == pytest.approx([-weight / length for length in chosen_lengths])
    assert metrics["loss"].tolist() == pytest.approx(loss.tolist(), rel=1e-6)
    assert torch.equal(metrics["margin"], metrics_without["margin"])
