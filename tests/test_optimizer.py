"""optimizer.py against torch's AdamW, the bits of bf16 numbers, and the mean of many roundings."""

import math

import pytest
import torch
import torch.distributed as dist
from conftest import random_model, random_pairs
from torch import Tensor, nn

import optimizer as optimizer_module
from losses import response_logps
from optimizer import MasterAdamW, all_reduce_gradients, gradient_norm, learning_rate, round_stochastically

BF16_STEP = 2.0**-13  # between two bf16 numbers from 1/64 to 1/32
SMALL = torch.zeros(())  # a norm that clips nothing


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------- schedule

@pytest.mark.parametrize(("steps", "warmup"), [
    (1, 1), (10, 1), (33, 1), (34, 2), (100, 3), (101, 4), (1000, 30),
])  # fmt: skip
def test_the_learning_rate_is_its_closed_form(steps, warmup):
    """Up in a line over ceil(3%) of the steps to the peak, then down a cosine to 10% of it at the last step.
    """
    rates = [learning_rate(step, steps, 2e-6) for step in range(steps)]
    line = [2e-6 * (i + 1) / warmup for i in range(warmup)]
    rest = steps - warmup
    cosine = [2e-7 + 1.8e-6 * math.cos(math.pi / 2 * t / rest) ** 2 for t in range(1, rest + 1)]
    assert rates == pytest.approx(line + cosine, rel=1e-12)
    assert max(rates) == rates[warmup - 1] == pytest.approx(2e-6)
    assert rates[-1] == pytest.approx(2e-7 if rest else 2e-6)
    assert all(a > b for a, b in zip(rates[warmup - 1 :], rates[warmup:], strict=False))


def test_the_learning_rate_of_a_thousand_steps_in_numbers():
    """First step peak / 30, the 30th at the peak, half-way down from there 55%, the last one 10%."""
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 30) and rates[29] == 1.0 > rates[30]
    assert rates[29 + 485] == pytest.approx(0.55)
    assert rates[999] == pytest.approx(0.1)


# ------------------------------------------------------------------------- stochastic rounding

def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers on both sides of fp32 numbers, the one nearer to 0 first; both are x where x is one.
    """
    bits = x.view(torch.int32)
    inner = bits & -(2**16)
    outer = torch.where(bits == inner, inner, inner + 2**16)
    return inner.view(torch.float32), outer.view(torch.float32)


NUMBERS = torch.cat([
    torch.randn(1001, generator=seeded(0)),
    torch.randn(500, generator=seeded(1)) * 1e-20,
    torch.randn(500, generator=seeded(2)) * 1e20,
    torch.tensor([0.0, -0.0, 1e-40, -1e-40, 0.02, -0.02, 1 / 3]),
])


def test_a_number_goes_to_one_of_its_two_neighbours():
    """In bf16: of 2,008 numbers, negative, tiny, huge and zero, each is rounded to either, and both occur."""
    inner, outer = neighbours(NUMBERS)
    went_out = torch.zeros(len(NUMBERS), dtype=torch.bool)
    for seed in range(20):
        rounded = round_stochastically(NUMBERS, seeded(seed))
        assert rounded.dtype == torch.bfloat16 and rounded.shape == NUMBERS.shape
        is_outer = rounded.float() == outer
        assert (is_outer | (rounded.float() == inner)).all()
        went_out |= is_outer & (inner != outer)
    assert went_out.float().mean() > 0.9


def test_bf16_numbers_stay_exactly_as_they_are():
    """Signs of zeros and infinities too, whatever is drawn."""
    exact = torch.cat([NUMBERS.bfloat16(), torch.tensor([math.inf, -math.inf, 0.0, -0.0]).bfloat16()])
    for seed in range(20):
        rounded = round_stochastically(exact.float(), seeded(seed))
        assert torch.equal(rounded.view(torch.int16), exact.view(torch.int16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [2**-16, 0.01, 0.25, 0.5, 0.9])
def test_rounding_is_right_in_the_mean(share, sign):
    """A number `share` of the way to its outer neighbour goes there that often: 5 standard deviations."""
    count = 200_001
    number = sign * (1 / 64 + share * BF16_STEP)
    rounded = round_stochastically(torch.full((count,), number), seeded(3)).double()
    share = (number - sign / 64) * sign / BF16_STEP  # the number that fp32 holds is meant
    frequency = (rounded.abs() > 1 / 64).double().mean().item()
    deviation = math.sqrt(share * (1 - share) / count)
    assert abs(frequency - share) < 5 * deviation
    assert abs(rounded.mean().item() - number) < 5 * deviation * BF16_STEP


def test_numbers_side_by_side_are_rounded_independently():
    """Each of the four 16-bit parts of 64 random bits is up half of the time, whatever the others are."""
    halves = torch.full((400_000,), 1 / 64 + BF16_STEP / 2)
    is_up = (round_stochastically(halves, seeded(4)).float() > 1 / 64).float().view(-1, 4)
    assert (is_up.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(100_000)
    correlation = torch.corrcoef(is_up.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (5,), (7, 3), (3, 1, 5), ()])
def test_any_number_of_elements_is_rounded(shape):
    """The shape stays, and so do what fits in bf16 and what is drawn by a seed."""
    x = torch.randn(shape, generator=seeded(5))
    first, again = (round_stochastically(x, seeded(6)) for _ in range(2))
    assert first.shape == x.shape and torch.equal(first, again)
    assert ((first.float() - x).abs() <= x.abs() * 2**-7).all()


def test_another_seed_rounds_otherwise():
    """One seed repeats, another does not; drawing goes on in one generator."""
    x, generator = NUMBERS[:1001], seeded(0)
    first, second = (round_stochastically(x, generator) for _ in range(2))
    assert torch.equal(first, round_stochastically(x, seeded(0)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, round_stochastically(x, seeded(1)))


# ------------------------------------------------------------------------- AdamW on masters

def small(dtype: torch.dtype, size: int = 64) -> nn.Module:
    """Two layers with weights about 0.02 and a bias."""
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 3, bias=False))
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.02, generator=seeded(i))
    return model.to(dtype)


def set_gradients(model: nn.Module, step: int) -> None:
    """Gradients that another step has others of, of very different sizes."""
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=seeded(100 * step + i))
        p.grad = noise * 10.0 ** (-2 * i)


def test_in_fp32_it_is_torchs_adamw_to_the_last_bit():
    """Ten steps with a learning rate each: betas 0.9 and 0.95, epsilon 1e-8, no weight decay."""
    ours, theirs = small(torch.float32), small(torch.float32)
    optimizer = MasterAdamW(ours, lr=1.0, seed=0)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                               fused=True)
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(10):
        lr = learning_rate(step, 10, 1e-3)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(step, lr, SMALL)
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
    for before, a, b in zip(start, ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, before)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_gradients_are_clipped_to_a_norm_of_1(scale):
    """As torch's clip_grad_norm_ does it before a step, over steps whose moments remember the scale."""
    ours, theirs = small(torch.float32), small(torch.float32)
    optimizer = MasterAdamW(ours, lr=1e-3, seed=0)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(4):
        for model in (ours, theirs):
            set_gradients(model, step)
            for p in model.parameters():
                p.grad *= scale if step % 2 else 1e-3
        norm = gradient_norm(optimizer.weights)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(norm, expected)
        optimizer.step(step, 1e-3, norm)
        oracle.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_whose_norm_is_not_finite_is_none(dtype, broken):
    """Masters, moments and the count of steps stay; the next step is what it would have been."""
    skipping, plain = stepped(0, dtype), stepped(0, dtype)
    set_gradients(skipping.model, 3)
    skipping.weights[0].grad.view(-1)[5] = broken
    norm = gradient_norm(skipping.weights)
    assert not norm.isfinite()
    skipping.step(3, 1e-2, norm)
    for optimizer in (skipping, plain):
        set_gradients(optimizer.model, 4)
        optimizer.step(4, 1e-3, SMALL)
    for (name, a), (_, b) in zip(skipping.state(), plain.state(), strict=True):
        assert torch.equal(a, b), name


def test_in_fp32_the_model_is_its_own_master():
    """No second copy of the weights is held."""
    model = small(torch.float32)
    optimizer = MasterAdamW(model, lr=1e-3, seed=0)
    assert all(p is master for p, master in zip(model.parameters(), optimizer.masters, strict=True))


def steady_steps(rounding: str, lr: float = 1e-6, steps: int = 20) -> tuple[MasterAdamW, list[Tensor]]:
    """AdamW in bf16 after steps with a gradient of 1 everywhere, each of which is -lr; and the start."""
    model = nn.Linear(200, 201, bias=False)
    nn.init.uniform_(model.weight, 1 / 64, 1 / 32, generator=seeded(0))
    model.to(torch.bfloat16)
    start = [p.detach().float() for p in model.parameters()]
    optimizer = MasterAdamW(model, lr, seed=0, rounding=rounding)
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.ones(p.shape)
        optimizer.step(step, lr, SMALL)
    return optimizer, start


def test_masters_move_by_updates_far_below_a_bf16_step():
    """Twenty times 1e-6, a sixth of the distance between two bf16 numbers, to fp32 rounding."""
    optimizer, (start,) = steady_steps("stochastic")
    (master,) = optimizer.masters
    assert master.dtype == torch.float32
    torch.testing.assert_close(master - start, torch.full_like(start, -2e-5), rtol=1e-3, atol=0)
    assert BF16_STEP > 6 * 2e-5


def test_the_mean_of_the_working_copy_follows_the_masters():
    """Within 5 standard deviations over 40,200 weights; each weight is a neighbour of its master."""
    optimizer, (start,) = steady_steps("stochastic")
    (weight,), (master,) = optimizer.weights, optimizer.masters
    assert weight.dtype == torch.bfloat16
    share = 2e-5 / BF16_STEP
    deviation = BF16_STEP * math.sqrt(share * (1 - share) / master.numel())
    moved = (weight.detach().double() - start.double()).mean().item()
    assert abs(moved + 2e-5) < 5 * deviation < 1e-5
    inner, outer = neighbours(master.detach())
    assert ((weight.float() == inner) | (weight.float() == outer)).all()


def test_rounded_to_the_nearest_nothing_would_be_learnt():
    """What --rounding nearest is there to show: the masters move, the working copy stays where it was."""
    optimizer, (start,) = steady_steps("nearest")
    assert torch.equal(optimizer.weights[0].float(), start)
    assert not torch.equal(optimizer.masters[0], start)


def test_gradients_of_micro_batches_add_up_in_fp32():
    """1 and 1/1024 are 1 in bf16; a bf16 parameter's gradient holds both."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    MasterAdamW(model, lr=1e-3, seed=0)
    for gradient in (1.0, 2.0**-10):
        model(torch.tensor([[gradient]], dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad.dtype == torch.float32
    assert model.weight.grad.item() == 1 + 2**-10


def test_gradients_of_the_decoder_add_up_in_fp32():
    """Every parameter of a bf16 decoder, norms included, after two passes of responses."""
    model = random_model().to(torch.bfloat16)
    optimizer = MasterAdamW(model, lr=1e-3, seed=0)
    for pair in random_pairs(2):
        logps = response_logps(model, [(pair.prompt_ids, [pair.chosen.ids])])[0][0]
        logps.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    optimizer.zero_grad()
    assert all(p.grad is None for p in [*model.parameters(), *optimizer.masters])


def stepped(seed: int, dtype: torch.dtype = torch.bfloat16) -> MasterAdamW:
    """An optimizer after three steps."""
    model = small(dtype)
    optimizer = MasterAdamW(model, lr=1e-4, seed=seed)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step(step, 1e-4, SMALL)
    return optimizer


def test_one_seed_gives_equal_copies():
    """As several processes hold them; another seed rounds equal masters otherwise."""
    first, again, other = stepped(0), stepped(0), stepped(1)
    for a, b in zip(first.weights, again.weights, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.masters, other.masters, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(first.weights, other.weights, strict=True))


def test_each_step_is_rounded_by_its_own_numbers():
    """Equal masters before the first step and after the second would else be rounded alike."""
    optimizer = stepped(0)
    copies = []
    for number in (7, 8, 7):
        for p in optimizer.weights:
            p.grad = torch.zeros(p.shape)
        optimizer.step(number, 0.0, SMALL)
        copies.append(torch.cat([p.detach().flatten() for p in optimizer.weights]))
    assert torch.equal(copies[0], copies[2]) and not torch.equal(copies[0], copies[1])


def test_saved_in_its_own_type_a_model_is_the_copy_that_was_validated():
    """The very tensors that forward passes read, in bf16 as in fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        optimizer = stepped(0, dtype)
        saved = optimizer.weights_to_save(dtype)
        assert list(saved) == ["0.weight", "0.bias", "1.weight"]
        for weight, p in zip(saved.values(), optimizer.weights, strict=True):
            assert weight.dtype == dtype and weight.data_ptr() == p.data_ptr()


def test_saved_in_fp32_a_bf16_model_is_its_masters():
    """All that was learnt, not the rounded copy."""
    optimizer = stepped(0)
    saved = optimizer.weights_to_save(torch.float32).values()
    for weight, master, p in zip(saved, optimizer.masters, optimizer.weights, strict=True):
        assert torch.equal(weight, master) and not torch.equal(weight, p.float())


def test_saved_in_bf16_an_fp32_model_is_rounded_stochastically():
    """To neighbours of its weights, not always the nearest, and alike each time."""
    optimizer = stepped(0, torch.float32)
    saved, again = (optimizer.weights_to_save(torch.bfloat16) for _ in range(2))
    is_nearest = []
    for name, p in optimizer.model.named_parameters():
        inner, outer = neighbours(p.detach())
        weight = saved[name].float()
        assert ((weight == inner) | (weight == outer)).all() and torch.equal(saved[name], again[name])
        is_nearest.append((saved[name] == p.bfloat16()).flatten())
    assert 0.6 < torch.cat(is_nearest).float().mean() < 0.9  # 3/4 where all distances are as likely


def test_frozen_weights_stay_and_are_saved():
    """They have no master and no moments."""
    model = small(torch.bfloat16)
    model[1].weight.requires_grad_(False)
    before = model[1].weight.clone()
    optimizer = MasterAdamW(model, lr=1e-2, seed=0)
    set_gradients(model[0], 0)
    optimizer.step(0, 1e-2, SMALL)
    assert len(optimizer.masters) == 2 and torch.equal(model[1].weight, before)
    assert torch.equal(optimizer.weights_to_save(torch.float32)["1.weight"], before.float())


# ------------------------------------------------------------------------- how much of the model has changed

def test_the_share_of_changed_weights_is_that_of_bf16_values():
    """0 at the start; with every weight pushed over to the next number 1; with half of them a half."""
    model = nn.Linear(100, 100, bias=False)
    nn.init.uniform_(model.weight, 1 / 64, 1 / 40, generator=seeded(0))
    model.to(torch.bfloat16)
    optimizer = MasterAdamW(model, lr=1e-3, seed=0)
    assert optimizer.share_changed() == 0.0
    with torch.no_grad():
        model.weight[:50] += BF16_STEP
    assert optimizer.share_changed() == 0.5
    with torch.no_grad():
        model.weight[50:] += BF16_STEP
    assert optimizer.share_changed() == 1.0


def test_an_fp32_model_has_changed_where_its_bf16_value_has():
    """An update far below a bf16 step counts for hardly any weight, and rounded to the nearest for none."""
    model = nn.Linear(200, 201, bias=False)
    nn.init.uniform_(model.weight, 1 / 64, 1 / 32, generator=seeded(0))
    optimizer = MasterAdamW(model, lr=1e-6, seed=0)
    model.weight.grad = torch.ones(model.weight.shape)
    optimizer.step(0, 1e-6, SMALL)
    assert 0 < optimizer.share_changed() < 0.02
    assert steady_steps("nearest")[0].share_changed() == 0.0
    share = 2e-5 / BF16_STEP
    assert steady_steps("stochastic")[0].share_changed() == pytest.approx(share, rel=0.1)


def test_saved_weights_are_rounded_by_seed():
    """Other seeds round other weights up."""
    first, other = (stepped(seed, torch.float32).weights_to_save(torch.bfloat16) for seed in (0, 1))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_process_without_pairs_adds_gradients_of_the_others_type(monkeypatch):
    """fp32 sums for bf16 weights."""
    monkeypatch.setattr(optimizer_module, "world", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    model = small(torch.bfloat16)
    MasterAdamW(model, 1e-3, 0)
    all_reduce_gradients(model)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_of_a_large_model_a_part_is_watched(monkeypatch):
    """Weights at equal distances in each parameter, of all its columns: the share is nearly that of all."""
    monkeypatch.setattr(optimizer_module, "WATCHED", 1000)
    model = nn.Linear(225, 201)  # the stride would be 45, which comes to 5 columns
    optimizer = MasterAdamW(model, lr=1e-3, seed=0)
    assert 950 < len(optimizer.start) < 1100
    with torch.no_grad():
        model.weight[::3] += 1
    assert optimizer.share_changed() == pytest.approx(1 / 3, abs=0.03)
    with torch.no_grad():
        model.weight[::3] -= 1
        model.weight[:, ::3] += 1
    assert optimizer.share_changed() == pytest.approx(1 / 3, abs=0.03)
