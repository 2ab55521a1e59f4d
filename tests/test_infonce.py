"""InfoNCE and SAMI: their losses against Eqs. 6 and 7, the K x K log-probs against transformers, their sets.

    python -m pytest tests/test_infonce.py
"""

import dataclasses
import math

import pytest
import torch
from conftest import (RecordingOptimizer, kept_bytes, metrics_of, named_gradients, oracle_logp, oracle_logps,
                      random_model, random_pairs, train_in_place, training_example)
from torch import Tensor
from transformers import AutoModelForCausalLM

import train
from batches import distinct_sets, groups_of, micro_batches, pair_logps, training_rows
from folder import load
from losses import OBJECTIVES, infonce, sami, token_count
from negatives import negative_messages
from run import UserError


def random_logps(count: int, k: int, scale: float = 3.0) -> Tensor:
    """Sets of K x K log-probs in fp64: [:, i, j] that of response j under context i."""
    generator = torch.Generator().manual_seed(k)
    return -scale * torch.rand(count, k, k, generator=generator, dtype=torch.float64)


def arguments(**values) -> train.Args:
    return train.resolve(train.Args(**dict(method="infonce", neg="random", model="x") | values))


# ------------------------------------------------------------------------- losses

def equation_6(p: Tensor) -> float:
    """Eq. 6 of one set in a loop; p[i, j] = pi(y_j | x, c_i)."""
    k = len(p)
    return -sum(math.log(p[i, i] / (sum(p[j, i] for j in range(k)) / k)) for i in range(k)) / k


def equation_7(p: Tensor) -> float:
    """Eq. 7 of one set in a loop."""
    k = len(p)
    total = 0.0
    for i in range(k):
        total += math.log(p[i, i] / (sum(p[j, i] for j in range(k)) / k))
        total += math.log(p[i, i] / (sum(p[i, j] for j in range(k)) / k))
    return -total / (2 * k)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_the_losses_are_equations_6_and_7_plus_log_k(k, temperature):
    """Against loops over probabilities, each pi raised to 1 / T."""
    logps = random_logps(4, k)
    for loss_of, equation in ((infonce, equation_6), (sami, equation_7)):
        loss, metrics = loss_of(logps, temperature)
        expected = [equation((set_ / temperature).exp()) + math.log(k) for set_ in logps]
        assert loss.tolist() == pytest.approx(expected, rel=1e-12)
        assert metrics["loss"].tolist() == pytest.approx(expected, rel=1e-6)


def test_with_two_contexts_they_are_the_authors_closed_forms():
    """-log sigmoid of the difference over T: between contexts for InfoNCE, of both kinds for SAMI."""
    logps = random_logps(3, 2, scale=200)
    a, b, c, d = logps[:, 0, 0], logps[:, 0, 1], logps[:, 1, 0], logps[:, 1, 1]
    by_context = [-torch.nn.functional.logsigmoid(x / 100) for x in (a - c, d - b)]
    torch.testing.assert_close(infonce(logps)[0], sum(by_context) / 2)
    by_both = [-torch.nn.functional.logsigmoid(x) for x in (a - c, d - b, a - b, d - c)]
    torch.testing.assert_close(sami(logps)[0], sum(by_both) / 4)


def test_the_defaults_are_the_authors_temperatures():
    """100 and 1, of the losses and of the command line."""
    logps = random_logps(2, 3)
    assert torch.equal(infonce(logps)[0], infonce(logps, 100.0)[0])
    assert torch.equal(sami(logps)[0], sami(logps, 1.0)[0])
    assert [arguments(method=name).temperature_loss for name in ("infonce", "sami")] == [100.0, 1.0]


def test_metrics_say_how_far_the_own_context_stands_out():
    """By hand: margin, accuracy and information of a set of two."""
    logps = torch.tensor([[[-1.0, -9.0], [-4.0, -8.0]]])  # response 0 prefers its own context, so does 1
    _, metrics = infonce(logps)
    assert metrics["margin"].item() == pytest.approx((3 + 1) / 2)
    assert metrics["accuracy"].item() == 1.0
    losses = [math.log1p(math.exp(-3)), math.log1p(math.exp(-1))]
    assert metrics["information"].item() == pytest.approx(math.log(2) - sum(losses) / 2, rel=1e-5)
    assert metrics["logp_chosen"].item() == -4.5 and metrics["logp_rejected"].item() == -6.5
    _, metrics = infonce(logps.mT.clone())
    assert metrics["accuracy"].item() == 0.5  # response 0 is likelier with the other's context
    _, metrics = infonce(torch.zeros(1, 3, 3))
    assert metrics["accuracy"].item() == 0  # as DPO's of a margin of 0


@pytest.mark.parametrize("method", ["infonce", "sami"])
def test_a_mean_is_over_the_tokens_of_the_response(method):
    """--reduce mean: log pi(y_j | x, c_i) is divided by the length of y_j, whatever i is."""
    means, lengths = random_logps(2, 3), torch.tensor([[2, 5, 9], [4, 1, 7]])
    sums = torch.stack([set_ * of_set for set_, of_set in zip(means, lengths, strict=True)])  # columns j
    loss_of, args = OBJECTIVES[method].loss, arguments(method=method, reduce="mean")
    expected = dict(infonce=infonce, sami=sami)[method](means, args.temperature_loss)[0]
    torch.testing.assert_close(loss_of(sums, None, lengths, args)[0], expected)


@pytest.mark.parametrize("loss_of", [infonce, sami])
def test_gradients_agree_with_finite_differences(loss_of):
    """torch's own check, in fp64."""
    logps = random_logps(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(x, 2.0)[0], logps)


# ------------------------------------------------------------------------- K x K log-probs

def test_every_response_is_scored_under_every_prompt(tiny):
    """[:, i, j] is transformers' log-prob of response j after prompt i, and lengths are the responses'."""
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    pairs = random_pairs(3, rejected=2)
    logps, lengths = pair_logps(load(tiny), pairs, arguments(n_neg=2))
    assert logps.shape == (3, 3, 3)
    for pair, set_, row in zip(pairs, logps.tolist(), lengths.tolist(), strict=True):
        assert row == [len(response.ids) for response in pair.responses]
        for prompt, values in zip(pair.responses, set_, strict=True):
            expected = [oracle_logp(oracle, prompt.prompt_ids, response.ids) for response in pair.responses]
            assert values == pytest.approx(expected, abs=1e-4)


def step_gradient(pairs, pass_tokens: int, dtype=torch.float64, **more) -> tuple[float, dict, int]:
    """(loss, gradients, bytes kept for backward) of one mean over `pairs` on a small random model."""
    model = random_model(scale=0.2).to(dtype)
    args = arguments(pass_tokens=pass_tokens, **more)
    total, kept = 0.0, 0
    for chunk in micro_batches(pairs, lambda pair: groups_of(pair, args), args):
        def loss_of(chunk=chunk) -> Tensor:
            logps, lengths = pair_logps(model, chunk, args)
            return OBJECTIVES[args.method].loss(logps, None, lengths, args)[0].sum() / len(pairs)

        kept = max(kept, kept_bytes(model, loss_of))
        loss = loss_of()
        loss.backward()
        total += loss.item()
    return total, named_gradients(model), kept


@pytest.mark.parametrize("method", ["infonce", "sami"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_set_larger_than_a_pass_has_the_same_gradient(method, reduce):
    """Two passes (the second one a prompt at a time) equal one, and keep less for backward."""
    pairs = random_pairs(2, rejected=3)
    more = dict(method=method, reduce=reduce, n_neg=3, temperature_loss=2.0)
    smallest = max(token_count([group]) for pair in pairs for group in groups_of(pair, arguments(**more)))
    loss, gradients, kept = step_gradient(pairs, 10_000, **more)
    small_loss, small_gradients, small_kept = step_gradient(pairs, smallest, **more)
    assert small_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(small_gradients[name], gradient, rtol=1e-9, atol=1e-12)
    assert small_kept < kept / 4


def test_a_step_is_the_mean_over_sets(tiny, tmp_path):
    """The clipped gradient of train.train is that of transformers' full logits through Eq. 6."""
    pairs = random_pairs(3, rejected=1)
    optimizer = RecordingOptimizer(load(tiny))
    _, (row,) = train_in_place(optimizer, pairs, tmp_path / "m.jsonl", method="infonce", neg="random",
                               batch=3, temperature_loss=1.0)
    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    losses = []
    for pair in pairs:
        set_ = torch.stack([torch.stack([oracle_logps(oracle, prompt.prompt_ids, response.ids).sum()
                                         for response in pair.responses]) for prompt in pair.responses])
        losses.append(-set_.log_softmax(0).diagonal().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = named_gradients(oracle)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in expected.values()))
    for name, gradient in optimizer.gradients[0].items():
        torch.testing.assert_close(gradient, expected[name] / max(1, norm), rtol=1e-3, atol=2e-6)


# ------------------------------------------------------------------------- sets

def test_the_contexts_of_a_set_differ_as_long_as_there_are_others():
    """Seven of seven others, each once; an eighth repeats one."""
    examples = [training_example(i, f"Context {i % 8}.", prompt=f"Question {i // 8}?") for i in range(64)]
    for seven, eight in zip(negative_messages(examples, "random", 0, 7),
                            negative_messages(examples, "random", 0, 8), strict=True):
        assert len(set(seven)) == 7 and eight[:7] == seven and eight[7] in seven


def test_sets_that_repeat_a_context_are_left_out_and_counted(capsys):
    """One of three has the same prompt twice."""
    pairs = random_pairs(3, rejected=2)
    pairs[1].rejected[1].prompt_ids = pairs[1].rejected[0].prompt_ids
    assert training_rows(pairs, arguments(n_neg=2)) == [pairs[0], pairs[2]]
    assert "1 of 3 sets repeat a context" in capsys.readouterr().out


def test_sets_that_all_repeat_a_context_are_refused():
    """A UserError that says what to do."""
    pairs = random_pairs(2, rejected=2)
    for pair in pairs:
        pair.rejected[0].prompt_ids = pair.prompt_ids
    with pytest.raises(UserError, match="smaller --n-neg"):
        distinct_sets(pairs, arguments(n_neg=2))


@pytest.mark.parametrize("change", [dict(context=None), dict(prompt_ids=[])])
def test_responses_without_a_prompt_of_their_own_are_refused(change):
    """Given pairs without contexts, or whose rejected responses came from nowhere."""
    pairs = random_pairs(2)
    if "context" in change:
        pairs[1] = dataclasses.replace(pairs[1], context=None)
    else:
        pairs[1].rejected[0].prompt_ids = []
    with pytest.raises(UserError, match="'row1'"):
        training_rows(pairs, arguments())


@pytest.mark.parametrize(("flags", "words"), [
    (["--neg", "noise"], "use --neg random or missing"),
    (["--neg", "reshuffle"], "use --neg random or missing"),
    (["--neg", "missing", "--n-neg", "2"], "use --n-neg 1, or --neg random"),
    (["--n-neg", "0"], "leaves nothing to prefer"),
    (["--temperature-loss", "-1"], "must be positive"), (["--temperature-loss", "0"], "must be positive"),
    (["--softmax"], "go with --method dpo"), (["--beta", "0.2"], "--beta has no effect"),
    (["--nll", "0.1"], "go with --method dpo"),
    (["--method", "dpo", "--reduce", "mean"], "go with infonce and sami"),
    (["--method", "sft", "--temperature-loss", "2"], "go with infonce and sami"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_options_that_contradict_the_method_are_refused(flags, words, call_train):
    """One line before anything is sampled."""
    with pytest.raises(UserError, match=words):
        call_train("--method", "infonce", *flags)


def test_data_without_contexts_are_refused(call_train, work):
    """By the first row's id."""
    (work / "bare.jsonl").write_text("".join(f'{{"id": "r{i}", "prompt": "p{i}", "split": "train"}}\n'
                                             for i in range(4)))
    with pytest.raises(UserError, match=r"4 of 4 examples have none \(first: 'r0'"):
        call_train("--method", "sami", "--neg", "random", "--data", work / "bare.jsonl")


@pytest.mark.parametrize(("method", "flags"), [
    ("infonce", ["--neg", "random", "--n-neg", "2"]), ("sami", ["--neg", "missing"]),
])  # fmt: skip
def test_a_run_trains_saves_and_draws(method, flags, call_train, work):
    """The whole program, from data to model folder and picture."""
    folder = call_train("--method", method, *flags)
    rows = [row for row in metrics_of(folder) if "loss" in row]
    assert rows and all({"information", "margin", "accuracy"} <= row.keys() for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (folder / "model" / "model.safetensors").exists() and (folder / "learning_curve.png").exists()
