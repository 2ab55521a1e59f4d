"""What MIPO converges to, in exact arithmetic: a table of log-probs trained through losses.dpo from pi_ref.

Fix (x, c): p is the distribution of chosen responses, pi_ref(.|x, c), and q that of rejected ones. The
population loss enumerates every pair (a, b) with weight p(a) q(b). With h = beta log(pi / pi_ref), its
minimiser satisfies h(a) - h(b) = r(a) - r(b), r = log p / q: only differences are determined. The policy
starts at pi_ref and never sees r.

    python -m pytest tests/test_theory.py
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from losses import dpo, infonce, sami


def distribution(*shape: int, seed: int = 0) -> Tensor:
    """Probabilities over the last dimension, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)


def all_pairs(chosen: int, rejected: int) -> Tensor:
    """Every (chosen, rejected) pair of response numbers, one a row. (chosen * rejected, 2)"""
    return torch.cartesian_prod(torch.arange(chosen), torch.arange(rejected))


def population(logits: Tensor, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The expected loss of the policy softmax(logits) over chosen a ~ p and rejected b ~ q."""
    pairs = all_pairs(len(p), len(q))
    loss, _ = dpo(logits.log_softmax(-1)[pairs], p.log()[pairs], beta)
    return (torch.outer(p, q).flatten() * loss).sum()


def minimise(objective, start: Tensor) -> Tensor:
    """The log-probs at the objective's minimum, from `start`."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0,
                                  history_size=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(-1)


def centred(x: Tensor) -> Tensor:
    """x up to a constant, which preferences do not determine."""
    return x - x.mean()


@pytest.fixture(params=[0.1, 1.0])
def beta(request) -> float:
    """The paper's strength of the reference, and 1."""
    return request.param


CONTEXTS = distribution(3, 5)  # p(y|x, c) of three contexts
PRIOR = distribution(3, seed=1)  # p(c)
MIXTURE = PRIOR @ CONTEXTS  # m(y) = sum_c p(c) p(y|x, c)


@pytest.mark.parametrize("q", [distribution(5, seed=7), MIXTURE], ids=["any", "mixture"])
def test_the_optimum_is_the_log_ratio(q, beta):
    """h differs as log p/q does, whatever q is (missing), and for the mixture over contexts (random)."""
    p = CONTEXTS[0]
    h = beta * (minimise(lambda z: population(z, p, q, beta), p.log()) - p.log())
    torch.testing.assert_close(centred(h), centred((p / q).log()), rtol=0, atol=1e-6)


def test_the_optimal_policy(beta):
    """pi = pi_ref (p/q)^(1/beta) / Z: at beta 0.1 nearly deterministic, which is why MIPO stops early."""
    p, q = CONTEXTS[0], distribution(5, seed=7)
    optimum = minimise(lambda z: population(z, p, q, beta), p.log()).exp()
    expected = p * (p / q) ** (1 / beta)
    torch.testing.assert_close(optimum, expected / expected.sum(), rtol=1e-4, atol=1e-9)
    assert beta == 1 or (optimum > 1e-6).sum() == 2  # of five


def exclusive(own: int, contexts: Tensor, prior: Tensor) -> Tensor:
    """The distribution of a rejected response whose context is never the right one: (m - w p) / (1 - w)."""
    return (prior @ contexts - prior[own] * contexts[own]) / (1 - prior[own])


def test_random_contexts_that_are_never_the_right_one(beta):
    """r = log(1 - w) + PMI - log(1 - w e^PMI): monotone in PMI, but not it."""
    p, w = CONTEXTS[0], PRIOR[0]
    pmi = (p / MIXTURE).log()
    q = exclusive(0, CONTEXTS, PRIOR)
    h = beta * (minimise(lambda z: population(z, p, q, beta), p.log()) - p.log())
    r = (1 - w).log() + pmi - (1 - w * pmi.exp()).log()
    torch.testing.assert_close(centred(h), centred(r), rtol=0, atol=1e-6)
    assert torch.equal(h.argsort(), pmi.argsort()) and (centred(h) - centred(pmi)).abs().max() > 0.05


def test_drawing_again_what_equals_the_chosen_response(beta):
    """Its optimum is log p/q - log(1 - q), in favour of common responses; leaving such pairs out is exact."""
    p, q = CONTEXTS[0], distribution(5, seed=7)
    pairs = all_pairs(5, 5)
    differ = (pairs[:, 0] != pairs[:, 1]).double()
    left_out = torch.outer(p, q).flatten() * differ
    drawn_again = torch.outer(p / (1 - q), q).flatten() * differ
    for weights, r in ((left_out, (p / q).log()), (drawn_again, (p / q).log() - (1 - q).log())):
        def loss(logits: Tensor, weights=weights) -> Tensor:
            losses, _ = dpo(logits.log_softmax(-1)[pairs], p.log()[pairs], beta)
            return (weights * losses).sum()

        h = beta * (minimise(loss, p.log()) - p.log())
        torch.testing.assert_close(centred(h), centred(r), rtol=0, atol=1e-6)
    assert (1 - q).log().abs().max() > 0.1


def test_with_many_contexts_random_becomes_pmi():
    """The gap between the optimum and PMI shrinks as the right context's share of the mixture does."""
    gaps = []
    for count in (2, 4, 16, 64):
        contexts, prior = distribution(count, 5, seed=3), torch.full((count,), 1 / count, dtype=torch.float64)
        p, q = contexts[0], exclusive(0, contexts, prior)
        h = minimise(lambda z, p=p, q=q: population(z, p, q, 1.0), p.log()) - p.log()
        gaps.append((centred(h) - centred((p / (prior @ contexts)).log())).abs().max().item())
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 10 * gaps[-1]


def test_the_gradient_is_linear_in_the_rejected_distribution(beta):
    """Averaged over random contexts c' it is the gradient at their mixture, away from the reference too."""
    p = CONTEXTS[0]
    logits = (p.log() + distribution(5, seed=5)).requires_grad_()
    each = [torch.autograd.grad(population(logits, p, q, beta), logits)[0] for q in CONTEXTS]
    mixed = torch.autograd.grad(population(logits, p, MIXTURE, beta), logits)[0]
    torch.testing.assert_close(sum(w * g for w, g in zip(PRIOR, each, strict=True)), mixed)
    assert max((g - mixed).abs().max() for g in each) > 1e-3


def test_noise_teaches_no_mutual_information():
    """Rejected responses nobody would give: margins grow without end, and among real responses h moves away
    from a PMI that favours the unlikely ones: it knows how likely they are, not what they say of c."""
    # Of eight responses the first five are real and the last three noise, which pi_ref hardly ever gives.
    real, noise = CONTEXTS[0], torch.full((3,), 1 / 3, dtype=torch.float64)
    reference = torch.cat((0.999 * real, 0.001 * noise)).log()
    p = torch.cat((real, torch.zeros(3, dtype=torch.float64)))
    q = torch.cat((torch.zeros(5, dtype=torch.float64), distribution(3)))
    pairs, weights = all_pairs(8, 8), torch.outer(p, q).flatten()
    pmi = -real.log()  # up to a constant, of a mixture m(y) in proportion to p(y)^2

    logits = reference.clone().requires_grad_()
    margins, gaps = [], []
    for step in range(3001):
        loss, metrics = dpo(logits.log_softmax(-1)[pairs], reference[pairs], 1.0)
        if step % 1000 == 0:
            margins.append((weights * metrics["margin"]).sum().item())
            h = (logits.log_softmax(-1) - reference)[:5].detach()
            gaps.append((centred(h) - centred(pmi)).abs().max().item())
        (gradient,) = torch.autograd.grad((weights * loss).sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert abs(margins[0]) < 1e-12
    assert all(later > sooner + 0.1 for sooner, later in itertools.pairwise(margins))
    assert all(later > sooner for sooner, later in itertools.pairwise(gaps))


def multinomial(drawn: tuple[int, ...]) -> int:
    """In how many orders these numbers can be drawn."""
    return math.factorial(len(drawn)) // math.prod(map(math.factorial, Counter(drawn).values()))


@pytest.mark.parametrize("softmax", [False, True], ids=["rows", "softmax"])
@pytest.mark.parametrize("count", [1, 10])
def test_the_number_of_negatives_does_not_move_the_optimum(count, softmax, beta):
    """1 or 10 rejected responses, as rows of their own or in one softmax (Eq. 8): log p/q still."""
    p, q = distribution(3, seed=2), distribution(3, seed=4)
    rejected = list(itertools.combinations_with_replacement(range(3), count))
    columns = torch.tensor([(a, *b) for a in range(3) for b in rejected])  # (rows, 1 + N)
    orders = torch.tensor([multinomial(b) for b in rejected], dtype=torch.float64).repeat(3)  # (rows,)
    weights = orders * p[columns[:, 0]] * q[columns[:, 1:]].prod(-1)
    assert weights.sum().item() == pytest.approx(1)

    def objective(logits: Tensor) -> Tensor:
        policy, reference = logits.log_softmax(-1)[columns], p.log()[columns]
        if softmax:
            loss, _ = dpo(policy, reference, beta)
        else:
            pairs = ([0, k] for k in range(1, 1 + count))
            loss = sum(dpo(policy[:, pair], reference[:, pair], beta)[0] for pair in pairs) / count
        return (weights * loss).sum()

    h = beta * (minimise(objective, p.log()) - p.log())
    torch.testing.assert_close(centred(h), centred((p / q).log()), rtol=0, atol=1e-6)


def expected_over_sets(loss_of, logps: Tensor, contexts: Tensor, temperature: float) -> Tensor:
    """The expectation of losses.infonce or losses.sami over all sets y_1, ..., y_K with y_j ~ contexts[j].

    logps (K, Y): log pi(y|x, c); contexts (K, Y): the distribution that responses are sampled from.
    """
    count, responses = contexts.shape
    sets = torch.tensor(list(itertools.product(range(responses), repeat=count)))  # (sets, K)
    weights = contexts[torch.arange(count), sets].prod(-1)  # (sets,)
    matrices = logps[:, sets].transpose(0, 1)  # (sets, K, K): [:, i, j] = log pi(y_j | x, c_i)
    loss, _ = loss_of(matrices, temperature)
    return (weights * loss).sum()


@pytest.mark.parametrize(("loss_of", "temperature", "still"), [
    (infonce, 1.0, True), (infonce, 100.0, False), (sami, 1.0, False),
])  # fmt: skip
def test_infonce_is_stationary_at_the_reference_only_at_temperature_1(loss_of, temperature, still):
    """With pi = pi_ref the gradient is zero at T = 1, where the softmax is the true posterior; the authors'
    T = 100 lives from its not being zero there, SAMI from its second part."""
    logits = CONTEXTS.log().requires_grad_()
    loss = expected_over_sets(loss_of, logits.log_softmax(-1), CONTEXTS, temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().max() < 1e-12) == still


def test_log_k_minus_infonce_is_the_mutual_information():
    """All contexts, uniform, T = 1, pi = pi_ref: I(c; y | x), worked out from the joint distribution."""
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    joint = prior[:, None] * CONTEXTS  # (C, Y)
    information = (joint * (CONTEXTS / (prior @ CONTEXTS)).log()).sum()
    loss = expected_over_sets(infonce, CONTEXTS.log(), CONTEXTS, 1.0)
    assert math.log(3) - loss.item() == pytest.approx(information.item(), abs=1e-12)
