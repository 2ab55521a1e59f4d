"""ppo.py against few-line numpy versions, closed forms, transformers' hidden states and brute force.

Run as a script under gloo this file is also the worker: it repeats EXPERIMENTS and saves what they gave.

    python -m pytest tests/test_ppo.py
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (RecordingOptimizer, close, model_weights, named_gradients, oracle_logp, oracle_logps,
                      start_workers, training_example, write_model)
from safetensors.torch import load_file, save_file
from test_processes import PlainSGD, flat, without_clock
from torch import Tensor
from transformers import AutoModelForCausalLM

import contexts
import judge as judging
import ppo
import rewards
import train
from data import Example, load_examples
from folder import find, load
from judge import Judge, JudgeArgs
from model import Decoder
from optimizer import MasterAdamW, all_reduce_gradients, learning_rate
from ppo import (Rollout, explained_variance, gae, kl_penalty, load_critic, policy_logps, policy_loss,
                 response_values, rollout_batches, token_rewards, training_batches, update, value_loss,
                 whiten)
from rewards import REWARDS, Reward, check_data, mutual_information, rewards_of
from run import UserError, main, rank, read_json, read_jsonl, seed_from, world
from sample import Sampling, generate
from tokenizer import Tokenizer
from training_log import Metrics


def arguments(**changes) -> train.Args:
    """Arguments with all defaults filled in, of the embedded model and rlvr where nothing else is said."""
    given = dict(model="tiny", method="rlvr", pass_tokens=768, dtype="float32", save_dtype="float32", slots=8)
    return ppo.resolve(contexts.resolve(train.Args(**given | changes)))


def new_critic(source: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """The critic of a run on a model folder."""
    return load_critic(source, arguments(seed=seed), lambda folder, args: load(folder, dtype))


def random_tokens(*lengths: int) -> list[Tensor]:
    """A tensor of N(0, 1) numbers of each length, in fp64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, dtype=torch.float64, generator=generator) for length in lengths]


# ------------------------------------------------------------------------- advantages

@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma, gae_lambda):
    """A_t = sum over k of (gamma lambda)^k delta_(t+k), by numpy; returns are A + V."""
    rewards, values = random_tokens(9, 9)
    r, v = rewards.numpy(), values.numpy()
    delta = r + gamma * np.append(v[1:], 0) - v
    expected = [sum((gamma * gae_lambda) ** k * delta[t + k] for k in range(9 - t)) for t in range(9)]
    advantages, returns = gae(rewards, values, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(returns, expected + v, rtol=0, atol=1e-12)


def test_gae_in_closed_form():
    """lambda 1: the rewards still to come, less the value. One token: its reward, less the value."""
    rewards, values = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, -1.0])
    advantages, returns = gae(rewards, values, 1.0, 1.0)
    close(advantages, torch.tensor([1.5, 1.0, 3.0]), 1e-6)
    close(returns, torch.tensor([2.0, 2.0, 2.0]), 1e-6)
    close(gae(rewards[2:], values[2:], 1.0, 0.95)[0], torch.tensor([3.0]), 1e-6)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_all_tokens():
    """Long responses count with all their tokens; the order is kept; equal advantages become 0."""
    advantages = [3 * own + 5 for own in random_tokens(2, 30, 1)]
    whitened = whiten(advantages)
    tokens = torch.cat(whitened)
    assert [len(own) for own in whitened] == [2, 30, 1]
    assert tokens.mean().abs() < 1e-12 and abs(tokens.var(correction=0) - 1) < 1e-12
    assert torch.equal(tokens.argsort(), torch.cat(advantages).argsort())
    close(torch.cat(whiten([torch.ones(3), torch.ones(2)])), torch.zeros(5), 0)


def test_the_score_lands_on_the_last_token():
    """Every token pays kl_weight (log pi - log pi_ref); the last one earns the score too."""
    logps, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0])
    rewards = token_rewards(4.0, logps, reference, kl_weight=0.1)
    close(rewards, torch.tensor([-0.05, 0.0, 4.1]), 1e-6)
    close(token_rewards(4.0, logps, logps, kl_weight=0.1), torch.tensor([0.0, 0.0, 4.0]), 0)


def test_the_penalty_is_the_divergence_in_the_mean():
    """Over all tokens of a small vocabulary, weighted with pi, k1 is KL(pi || pi_ref)."""
    logps, reference = (logits.log_softmax(0) for logits in random_tokens(6, 6))
    mean = (logps.exp() * kl_penalty(logps, reference)).sum()
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logps),
                                                 torch.distributions.Categorical(logits=reference))
    close(mean, expected, 1e-12)


def test_explained_variance():
    """1 of perfect values, 0 of a constant, below 0 of worse ones; 0 where there is nothing to explain."""
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns - 7, returns) == pytest.approx(1)
    assert explained_variance(torch.full((3,), 9.0), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(3)) == 0


# ------------------------------------------------------------------------- losses

def test_losses_are_numpys():
    """Both, token by token, on random numbers of which some are clipped on either side."""
    new, old, advantages, values, old_values, returns = random_tokens(*[200] * 6)
    ratio = np.exp(0.3 * (new - old).numpy())
    a = advantages.numpy()
    expected = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    np.testing.assert_allclose(policy_loss(0.3 * new, 0.3 * old, advantages, 0.2), expected, atol=1e-12)
    assert (ratio > 1.2).any() and (ratio < 0.8).any()

    v, before, r = (x.numpy() for x in (values, old_values, returns))
    near = before + np.clip(v - before, -0.2, 0.2)
    expected = np.maximum(0.5 * (v - r) ** 2, 0.5 * (near - r) ** 2)
    np.testing.assert_allclose(value_loss(values, old_values, returns, 0.2), expected, atol=1e-12)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.0, 2.0, -2.0, -2.0),  # where it starts: the plain policy gradient, -A
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # likely enough: no further reward
    (0.5, 2.0, -1.0, -1.0),  # a good token that has become unlikely is still raised
    (0.5, -2.0, 1.6, 0.0),
    (1.5, -2.0, 3.0, 3.0),
])  # fmt: skip
def test_policy_loss_in_closed_form(ratio, advantage, loss, slope):
    """Value and derivative by log pi at each kind of ratio."""
    logps = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = policy_loss(logps, torch.zeros(1), torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss) and logps.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(("value", "loss", "slope"), [
    (0.1, 0.405, -0.9),  # near the old value 0, on the way to the return 1
    (0.5, 0.32, 0.0),  # moved by more than 0.2: no gradient until the next batch
    (-0.5, 1.125, -1.5),  # moved away: it is brought back
])  # fmt: skip
def test_value_loss_in_closed_form(value, loss, slope):
    """Old value 0, return 1, clip 0.2."""
    values = torch.tensor([value], requires_grad=True)
    got = value_loss(values, torch.zeros(1), torch.ones(1), 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)


# ------------------------------------------------------------------------- critic

GROUPS = [([5, 6, 7, 8], [[9, 10, 11]]), ([5, 6, 30], [[31]]), ([5, 6, 7, 40, 41], [[42, 43]])]


@pytest.mark.parametrize("name", ["llama", "llama_untied"])
def test_values_are_of_the_states_before_the_tokens(saved, name):
    """transformers' hidden states at the prompt's last token and at all response tokens but the last."""
    source, oracle = saved(name)
    critic = new_critic(source)
    for (prompt, [response]), values in zip(GROUPS, response_values(critic, GROUPS), strict=True):
        with torch.no_grad():
            hidden = oracle.model(torch.tensor([prompt + response])).last_hidden_state[0]  # (T, E)
            expected = hidden[len(prompt) - 1 : -1] @ critic.lm_head.weight[0]  # (R,)
        close(values, expected, 1e-5)


def test_the_critic_is_a_copy_with_one_output(saved):
    """A new row without bias, N(0, 1/(E + 1)), by seed; every other weight the start model's, and its own."""
    source, oracle = saved("llama")
    critics = [new_critic(source, seed=seed) for seed in (0, 0, 1)]
    heads = [critic.lm_head for critic in critics]
    assert heads[0].weight.shape == (1, 64) and heads[0].bias is None
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert 0.7 < heads[0].weight.std().item() * 65 < 1.3
    weights = critics[0].state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], oracle.model.embed_tokens.weight)
    [values] = response_values(critics[0], GROUPS[:1])
    values.sum().backward()
    assert all(p.grad is not None for p in critics[0].parameters())


# ------------------------------------------------------------------------- mutual information

@pytest.fixture(scope="module")
def embedded():
    """The embedded model, its tokenizer and training examples."""
    return load(find("tiny")), Tokenizer(find("tiny")), load_examples("demo", "train")


@torch.no_grad()
def informations(model, tokenizer: Tokenizer, examples: list[Example], tokens: int = 24) -> np.ndarray:
    """Eq. 15 of one sampled response to each example, in nats."""
    sampling = ppo.rollout_sampling(arguments(max_new_tokens=tokens))
    prompts = [tokenizer.chat(e.user_message(e.context)) for e in examples]
    bare_prompts = [tokenizer.chat(e.user_message(None)) for e in examples]
    samples = generate(model, prompts, sampling, tokenizer.stop_ids, seed=0)
    with_context, without = (
        policy_logps(model, [(prompt, [sample.ids]) for prompt, sample in zip(side, samples, strict=True)])
        for side in (prompts, bare_prompts))
    return np.array([mutual_information(a, b).item() for a, b in zip(with_context, without, strict=True)])


def test_mutual_information_is_zero_where_nothing_is_attended_to(embedded):
    """With every o_proj zeroed no token sees the prompt: exactly 0 for every response."""
    _, tokenizer, examples = embedded
    deaf = load(find("tiny"))
    for block in deaf.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    assert (informations(deaf, tokenizer, examples[:12]) == 0).all()


def test_mutual_information_is_positive_in_the_mean(embedded):
    """It is a KL divergence: the mean's 95% interval lies above 0, though single responses are below."""
    model, tokenizer, examples = embedded
    values = informations(model, tokenizer, examples[:160:2])
    low = values.mean() - 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert low > 0 > values.min()


def test_mutual_information_is_transformers(embedded):
    """The difference of two sums of transformers' log-probs of the sampled ids."""
    model, tokenizer, examples = embedded
    oracle = AutoModelForCausalLM.from_pretrained(find("tiny"), dtype=torch.float32)
    [got] = informations(model, tokenizer, examples[:1])
    prompt, bare = (tokenizer.chat(examples[0].user_message(c)) for c in (examples[0].context, None))
    sampling = ppo.rollout_sampling(arguments(max_new_tokens=24))
    [sample] = generate(model, [prompt], sampling, tokenizer.stop_ids, seed=0)
    sums = []
    for ids in (prompt, bare):
        with torch.no_grad():
            logps = oracle(torch.tensor([ids + sample.ids])).logits[0].log_softmax(-1)  # (T, V)
        sums.append(sum(logps[len(ids) - 1 + t, token].item() for t, token in enumerate(sample.ids)))
    assert got == pytest.approx(sums[0] - sums[1], abs=1e-3)


# ------------------------------------------------------------------------- rewards

TEA, SUM = training_example(0, "I like tea.", check=["lowercase"]), training_example(1, answer="12")


@pytest.fixture
def scripted_judge(monkeypatch) -> list:
    """judge.reward replies 5, nothing, 2 and so on; the rows that it was asked about."""
    asked: list = []

    def reward(judge, *columns: list[str]) -> list[float | None]:
        asked.extend(zip(*columns, strict=True))
        return [(5.0, None, 2.0)[i % 3] for i in range(len(columns[0]))]

    monkeypatch.setattr(judging, "reward", reward)
    return asked


def test_an_unread_verdict_earns_the_mean_of_its_batch(scripted_judge):
    """Scores are fifths; (1 + 2/5) / 2 where there is none, which is counted."""
    earned, unread = rewards_of([TEA] * 3, ["a", "b", "c"], [0.0] * 3, None, arguments(method="rlaif"))
    assert earned == pytest.approx([1.0, 0.7, 0.4]) and unread == 1


def test_information_is_added_with_its_weight(scripted_judge):
    """rlaif-mi: a fifth of the score plus 0.1 times Eq. 15; ppo-mi: its weight times that alone."""
    rows = [TEA] * 3, ["a", "b", "c"], [3.0, -1.0, 0.0], None
    assert rewards_of(*rows, arguments(method="rlaif-mi"))[0] == pytest.approx([1.3, 0.6, 0.4])
    assert rewards_of(*rows, arguments(method="ppo-mi", mi_weight=2.0)) == ([6.0, -2.0, 0.0], 0)


def test_the_parts_of_a_reward_are_added(scripted_judge, monkeypatch):
    """A new row of REWARDS may ask for all of them: verifier, judge and information."""
    monkeypatch.setitem(REWARDS, "all", Reward(verifier=True, judge=True, information=True))
    rows = [TEA] * 3, ["quiet", "Loud", "Loud"], [3.0, -1.0, 0.0], None
    given = dataclasses.replace(arguments(method="rlaif-mi"), method="all")
    assert rewards_of(*rows, given)[0] == pytest.approx([2.3, 0.6, 0.4])


def test_the_judge_sees_the_context_or_the_right_answer(scripted_judge):
    """Prompts, contexts and responses, as judge.reward takes them."""
    rewards_of([TEA, SUM], ["a", "b"], [0.0] * 2, None, arguments(method="rlaif"))
    assert scripted_judge[0] == ("Question 0?", "I like tea.", "a")
    prompt, answer, text = scripted_judge[1]
    assert (prompt, text) == ("Question 1?", "b") and "12" in answer


def test_the_verifiers_reward_is_one_or_zero():
    """rlvr: the example's own check."""
    assert rewards_of([TEA] * 2, ["quiet", "Loud"], [0.0] * 2, None, arguments()) == ([1.0, 0.0], 0)


def test_a_reward_is_a_finite_number():
    """Clipped, a NaN would become the best reward."""
    with pytest.raises(ValueError, match=r"2 responses earn \[nan, 1\.0\], not a finite number each"):
        rewards_of([TEA] * 2, ["a", "b"], [math.nan, 1.0], None, arguments(method="ppo-mi", mi_weight=1.0))


# ------------------------------------------------------------------------- batches

def test_every_prompt_is_sampled_once_a_pass():
    """Seven prompts in batches of three: two passes in different orders, with sample indices of their own."""
    batches = rollout_batches(7, arguments(rollout_batch=3, epochs=2, rollouts=2))
    assert [len(batch) for batch in batches] == [6, 6, 2, 6, 6, 2]
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(row, number) for row in range(7) for number in range(4)]
    first, second = ([row for batch in half for row, _ in batch] for half in (batches[:3], batches[3:]))
    assert first != second


def test_every_rollout_is_trained_on_once_a_pass():
    """Two passes over five rollouts, two an update, the last one with what is left; another order each, and
    others again for the next rollouts."""
    zeros, orders = torch.zeros(3), []
    rollouts = [Rollout(row, [7] * 3, "x", True, zeros, zeros, zeros, 0.0) for row in range(5)]
    for number in (0, 1):
        batches = training_batches(rollouts, number, arguments(train_batch=2))
        assert [len(batch) for batch in batches] == [2, 2, 1] * 2
        orders += [tuple(own.row for batch in half for own in batch) for half in (batches[:3], batches[3:])]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(orders)) == 4


# ------------------------------------------------------------------------- arguments and mistakes

def test_defaults_are_the_authors():
    """Of any model, and those of the embedded one."""
    args = arguments(model="some/model", method="ppo-mi")
    assert (args.rollout_batch, args.train_batch, args.rollouts, args.ppo_epochs) == (8, 4, 1, 2)
    assert (args.lr, args.critic_lr, args.mi_weight, args.kl_weight) == (5e-7, 9e-6, 1.0, 0.001)
    assert (args.gamma, args.gae_lambda, args.clip, args.value_clip) == (1.0, 0.95, 0.2, 0.2)
    assert args.reward_clip == 10 and arguments(model="some/model", method="rlaif-mi").mi_weight == 0.1
    tiny = arguments(method="ppo-mi")
    assert (tiny.rollout_batch, tiny.train_batch, tiny.lr, tiny.critic_lr) == (32, 16, 2e-4, 1e-3)
    assert tiny.mi_weight == 0.5 and arguments(method="ppo-mi", mi_weight=2.0, lr=0.1).lr == 0.1


def test_rollouts_are_sampled_from_the_policy_itself():
    """Temperature 1, top-p 1, at most 256 tokens, fewer where the data set's are; unless arguments say so."""
    sampling = ppo.rollout_sampling(arguments(data="gsm8k"))
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (1.0, 1.0, 256)
    assert ppo.rollout_sampling(arguments()).max_new_tokens == 96
    given = ppo.rollout_sampling(arguments(temperature=0.5, top_p=0.9, max_new_tokens=300))
    assert (given.temperature, given.top_p, given.max_new_tokens) == (0.5, 0.9, 300)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(method="rlaif"), "rlaif needs a judge"),
    (dict(eval_every=5, nll=0.1), "--nll, --eval-every: no effect with --method rlvr"),
    (dict(batch=8, val_limit=5), "--batch, --val-limit: no effect with --method rlvr"),
    (dict(neg="random", n_neg=3, beta=0.2), "--neg, --beta, --n-neg: no effect with --method rlvr"),
    (dict(mi_weight=1.0), "--mi-weight"),
    (dict(clip=0.0), "--clip"),
    (dict(rollout_batch=0), "--rollout-batch"),
    (dict(gae_lambda=1.5), "--gae-lambda"),
    (dict(kl_weight=-1.0), "--kl-weight"),
])  # fmt: skip
def test_contradictions_are_refused(changes, message):
    """One line that names what is wrong."""
    with pytest.raises(UserError, match=message):
        ppo.check(arguments(**changes))


@pytest.mark.parametrize(("method", "message"), [
    ("ppo-mi", r"needs a context in every row; 1 of 2 have none \(first: '1'\)"),
    ("rlaif-mi", "needs a context"),
    ("rlvr", r"needs a check or a right answer in every row; 1 of 2 have none \(first: '1'\)"),
    ("rlaif", "needs a context or a right answer"),
])  # fmt: skip
def test_data_without_what_the_reward_needs_are_refused(method, message):
    """Before a model is loaded: which reward, what it needs, how many rows lack it."""
    examples = [training_example(0, "I like tea.", check=["lowercase"]), training_example(1)]
    args = arguments(method=method, judge="j")
    with pytest.raises(UserError, match=message):
        check_data(examples, args)
    check_data(examples[:1], args)


def test_a_judge_whose_first_replies_cannot_be_read_is_refused(tiny, tmp_path):
    """A random model writes no number: the run ends with its first batch, before any update."""
    judge = Judge(JudgeArgs(judge=str(tiny), judge_cache=str(tmp_path / "verdicts.jsonl")))
    with pytest.raises(UserError, match=r"of its first 3 replies can't be read"):
        experiment(tiny, tmp_path, "rlaif", judge=judge)
    assert not (tmp_path / "metrics-rlaif-1.0-1.jsonl").read_text()


# ------------------------------------------------------------------------- the loop

def row(number: int) -> Example:
    """A training row with a context and a check that half of a random model's responses pass."""
    return training_example(number, f"I am number {number}.", check=["max_words", 1])


def run_ppo_in_place(actor, critic, source: Path, file: Path, args: train.Args, examples: list[Example],
                     judge=None) -> tuple[ppo.State, list[dict]]:
    """The loop with such optimizers and a frozen reference: where it ends, and the rows of metrics.jsonl."""
    reference = None if args.lora_rank else load(source, actor.model.compute).requires_grad_(False)
    state = ppo.State()
    ppo.ppo(actor, critic, reference, examples, Tokenizer(source), judge, args, Metrics(file), state)
    return state, [] if rank() else [line for _, line in read_jsonl(file)]


def test_a_reward_is_learned(tiny, tmp_path, monkeypatch):
    """Responses of three tokens that should hold an "e": the share that do rises from a third to most. With
    rewards shuffled it does not."""
    monkeypatch.setattr(rewards, "verify", lambda example, text: "e" in text)
    shares = {}
    for shuffle in (False, True):
        args = arguments(lr=1e-2, critic_lr=1e-2, max_new_tokens=3, epochs=8, kl_weight=0.0, rollout_batch=32,
                         train_batch=16, slots=32, pass_tokens=4096, shuffle_rewards=shuffle)
        actor = MasterAdamW(load(tiny), args.lr, 0)
        critic = MasterAdamW(new_critic(tiny), args.critic_lr, 0)
        _, lines = run_ppo_in_place(actor, critic, tiny, tmp_path / f"{shuffle}.jsonl", args,
                                    [row(i) for i in range(32)])
        shares[shuffle] = [line["reward"] for line in lines]
    assert shares[False][0] == shares[True][0] < 0.45
    assert min(shares[False][-2:]) > 0.75 and max(shares[True][-2:]) < 0.5


def test_shuffled_rewards_are_the_same_rewards(tiny, tmp_path, monkeypatch):
    """Every batch has the rewards that it would have had, in another order; no response has its own."""
    seen: dict[bool, list[float]] = {}
    for shuffle in (False, True):
        earned: list[float] = []

        def record(reward, *rest, earned=earned) -> Tensor:
            earned.append(reward)
            return token_rewards(reward, *rest)

        monkeypatch.setattr(ppo, "token_rewards", record)
        experiment(tiny, tmp_path, "ppo-mi", shuffle_rewards=shuffle, count=12, rollout_batch=12)
        seen[shuffle] = earned
    assert sorted(seen[True]) == pytest.approx(sorted(seen[False])) and len(set(seen[False])) == 12
    assert not any(own == pytest.approx(given) for own, given in zip(seen[False], seen[True], strict=True))


def test_every_batch_is_shuffled_in_its_own_order(tiny, tmp_path, monkeypatch):
    """By the run's seed and the batch's number."""
    given, original, seed = [], ppo.epoch_order, seed_from("shuffled rewards", 0)
    monkeypatch.setattr(ppo, "epoch_order", lambda *rest: given.append(rest) or original(*rest))
    experiment(tiny, tmp_path, "rlvr", shuffle_rewards=True, count=6)
    assert [rest for rest in given if rest[1] == seed] == [(3, seed, 0), (3, seed, 1)]


def test_unread_verdicts_of_all_batches_are_counted(tiny, tmp_path, monkeypatch):
    """One in each of three batches."""
    monkeypatch.setattr(ppo, "rewards_of", lambda asked, *rest: ([0.0] * len(asked), 1))
    args = arguments(rollout_batch=3, train_batch=3, max_new_tokens=3, lr=0.1, critic_lr=0.1)
    state, _ = run_ppo_in_place(PlainSGD(load(tiny)), PlainSGD(new_critic(tiny)), tiny,
                                tmp_path / "metrics.jsonl", args, [row(i) for i in range(7)])
    assert state.unread == 3


def test_ratios_beyond_the_clip_are_counted(tiny):
    """A policy that has become 1.5 times or half as likely to say each token, where the clip is at 0.4."""
    actor, critic = load(tiny, torch.float64), new_critic(tiny, torch.float64)
    prompts, ids = [[5, 6, 7], [5, 8], [9]], [[9, 10], [11, 12], [5, 6]]
    logps = policy_logps(actor, [(prompt, [own]) for prompt, own in zip(prompts, ids, strict=True)])
    zeros = torch.zeros(2, dtype=torch.float64)
    batch = [Rollout(i, ids[i], "x", True, logps[i].detach() - math.log(ratio), zeros, zeros, 0.0, zeros,
                     zeros) for i, ratio in enumerate((1.5, 0.5, 1.3))]
    measured = ppo.backward(actor, critic, prompts, batch, arguments(clip=0.4))
    assert [values["ratio_clipped"] for values in measured] == [1.0, 1.0, 0.0]


def test_settings_reach_both_optimizers(tmp_path, monkeypatch):
    """Actor and critic: their own learning rates, the run's seed and rounding."""
    made = []

    def make(model, lr, seed, rounding="stochastic") -> None:
        made.append((lr, seed, rounding))
        if len(made) == 2:
            raise UserError("both are made")

    monkeypatch.setattr(ppo, "MasterAdamW", make)
    args = arguments(limit=10, seed=3, rounding="nearest")
    with pytest.raises(UserError, match="both are made"):
        ppo.run_ppo(args, tmp_path / "run", find("tiny"), train.load_trainable)
    assert made == [(args.lr, 3, "nearest"), (args.critic_lr, 3, "nearest")]


def test_rewards_are_clipped_and_counted(tiny, tmp_path, monkeypatch):
    """A clip that every reward exceeds, above or below: the share is in metrics.jsonl, the mean is of what
    was earned before."""
    free = experiment(tiny, tmp_path, "ppo-mi")["metrics"][0]
    earned: list[float] = []

    def record(reward, *rest) -> Tensor:
        earned.append(reward)
        return token_rewards(reward, *rest)

    monkeypatch.setattr(ppo, "token_rewards", record)
    clipped = experiment(tiny, tmp_path, "ppo-mi", reward_clip=1e-9)["metrics"][0]
    assert {abs(reward) for reward in earned} == {1e-9}
    assert free["reward_clipped"] == 0 and clipped["reward_clipped"] == 1
    assert clipped["reward"] == free["reward"]


def test_a_batch_starts_at_the_policy_that_sampled_it(tiny, tmp_path, monkeypatch):
    """The old log-probs are those that training computes: every ratio of the first update is 1."""
    ratios = []

    def record(logps, old_logps, *rest) -> Tensor:
        ratios.append((logps - old_logps).detach().abs().max().item())
        return policy_loss(logps, old_logps, *rest)

    monkeypatch.setattr(ppo, "policy_loss", record)
    experiment(tiny, tmp_path, "rlvr", train_batch=3, ppo_epochs=2, count=3)
    assert max(ratios[:3]) < 1e-12 < min(ratios[3:])


def test_actor_and_critic_have_learning_rates_of_their_own(tiny, tmp_path, monkeypatch):
    """Both follow the schedule over all updates: two passes over batches of 3, 3 and 1 in twos are ten."""
    rates = []

    def record(optimizer, number: int, lr: float) -> float:
        rates.append(lr)
        return update(optimizer, number, lr)

    monkeypatch.setattr(ppo, "update", record)
    experiment(tiny, tmp_path, "rlvr", critic_lr=0.01)
    for given, peak in ((rates[::2], 0.1), (rates[1::2], 0.01)):
        assert given == [learning_rate(i, 10, peak) for i in range(10)]


def test_a_critic_that_diverges_is_noticed(tiny, tmp_path, monkeypatch):
    """An update counts as skipped where either norm is not finite."""
    monkeypatch.setattr(ppo, "value_loss", lambda values, *_: values * math.nan)
    assert experiment(tiny, tmp_path, "rlvr", count=3)["metrics"][-1]["skipped"] == 4


def test_an_update_that_is_not_finite_is_skipped(tiny, tmp_path, monkeypatch, capsys):
    """It is counted and printed, the weights stay; five in a row end the run."""
    monkeypatch.setattr(ppo, "policy_loss", lambda logps, *_: logps * math.nan)
    before = flat(load(tiny, torch.float64).parameters())
    result = experiment(tiny, tmp_path, "rlvr", count=3)
    assert result["metrics"][-1]["skipped"] == 4 and torch.equal(result["weights"], before)
    assert "4 of 4 updates were not finite" in capsys.readouterr().out
    with pytest.raises(UserError, match="five steps in a row were not finite"):
        experiment(tiny, tmp_path, "rlvr")
    lines = [line for _, line in read_jsonl(tmp_path / "metrics-rlvr-1.0-1.jsonl")]
    assert [line["skipped"] for line in lines] == [4, 8]


# ------------------------------------------------------------------------- several processes

EXPERIMENTS = ("ppo-mi", "rlvr", "rlaif-mi")


def experiment(folder: Path, scratch: Path, method: str, scale: float = 1.0, count: int = 7, judge=None,
               **changes) -> dict:
    """Plain SGD at lr 0.1 in fp64 on seven prompts, three a batch, two an update: of the last batch, and of
    some updates, the second of two processes has none.

    scale: what the second process's gradients are multiplied by before they are added up. The judge is one
    that scores by length, unless one is given.
    """
    advantages = []

    def reduce_scaled(model) -> None:
        for p in model.parameters():
            if p.grad is not None and rank():
                p.grad *= scale
        all_reduce_gradients(model)

    def whiten_recorded(values: list[Tensor]) -> list[Tensor]:
        advantages.extend(whitened := whiten(values))
        return whitened

    args = arguments(**dict(method=method, lr=0.1, critic_lr=0.1, rollout_batch=3, train_batch=2,
                            max_new_tokens=6) | changes)
    actor, critic = load(folder, torch.float64), new_critic(folder, torch.float64)
    file = scratch / f"metrics-{method}-{scale}-{world()}.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "all_reduce_gradients", reduce_scaled)
        patch.setattr(ppo, "whiten", whiten_recorded)
        if judge is None:
            patch.setattr(judging, "reward", lambda _, prompts, contexts, texts: [
                1.0 + len(text) % 5 for text in texts])
        _, rows = run_ppo_in_place(PlainSGD(actor), PlainSGD(critic), folder, file, args,
                                   [row(i) for i in range(count)], judge)
    return dict(weights=flat(actor.parameters()), critic=flat(critic.parameters()),
                advantages=flat(advantages), metrics=rows)


def work() -> None:
    """The worker: arguments are the model's folder, and one for results."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    runs = {method: experiment(folder, out, method) for method in EXPERIMENTS}
    runs["broken"] = experiment(folder, out, "ppo-mi", scale=2.0)
    for name, result in runs.items():
        stem = out / f"{name}-{rank()}"
        stem.with_suffix(".json").write_text(json.dumps(result.pop("metrics")))
        save_file(result, stem.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> list[dict[str, dict]]:
    """What two processes that run this file have saved, a dict each."""
    out = tmp_path_factory.mktemp("two")
    start_workers(2, __file__, tiny, out)

    def result(name: str, r: int) -> dict:
        stem = out / f"{name}-{r}"
        return load_file(stem.with_suffix(".safetensors")) | dict(
            metrics=json.loads(stem.with_suffix(".json").read_text()))

    return [{name: result(name, r) for name in (*EXPERIMENTS, "broken")} for r in range(2)]


@pytest.mark.parametrize("method", EXPERIMENTS)
def test_two_processes_are_one(method, two, tiny, tmp_path):
    """Advantages, whitened over both; both models after every update; each line of metrics."""
    expected = experiment(tiny, tmp_path, method)
    start = flat(load(tiny, torch.float64).parameters())
    assert (expected["weights"] - start).abs().max() > 1e-3
    for result in (own[method] for own in two):
        for name in ("weights", "critic", "advantages"):
            close(result[name], expected[name], 1e-9)
    assert torch.equal(two[0][method]["weights"], two[1][method]["weights"])
    lines = two[0][method]["metrics"]
    assert [line["responses"] for line in lines] == [3, 3, 1] and two[1][method]["metrics"] == []
    for a, b in zip(lines, expected["metrics"], strict=True):
        assert without_clock(a) == pytest.approx(without_clock(b), rel=1e-6, abs=1e-9)


def test_the_comparison_can_fail(two, tiny, tmp_path):
    """With the second process's gradients doubled it does, though both processes still agree."""
    expected = experiment(tiny, tmp_path, "ppo-mi")
    assert (two[0]["broken"]["weights"] - expected["weights"]).abs().max() > 1e-6
    assert torch.equal(two[0]["broken"]["weights"], two[1]["broken"]["weights"])


@pytest.mark.parametrize("changes", [dict(pass_tokens=1), dict(slots=1), dict(pass_tokens=60, slots=2)])
def test_passes_and_slots_change_nothing(changes, tiny, tmp_path):
    """One process: rollouts decoded and scored one at a time, or some at a time. Norms are those before
    clipping, which weights alone would not show."""
    expected = experiment(tiny, tmp_path, "ppo-mi")
    got = experiment(tiny, tmp_path, "ppo-mi", **changes)
    for key in ("grad_norm", "critic_grad_norm"):
        norms = [line[key] for line in expected["metrics"]]
        assert [line[key] for line in got["metrics"]] == pytest.approx(norms, rel=1e-9)
    close(got["weights"], expected["weights"], 1e-9)
    close(got["critic"], expected["critic"], 1e-9)


# ------------------------------------------------------------------------- a run

@pytest.mark.parametrize("method", ["rlvr", "ppo-mi"])
def test_a_run_on_the_embedded_model(method, tmp_path):
    """Its folder holds arguments, a line a batch, a summary, a learning curve and a model that has moved."""
    args = arguments(method=method, limit=10, max_new_tokens=8, rollout_batch=4, rollouts=2, train_batch=4)
    folder, source = tmp_path / "run", find("tiny")
    ppo.run_ppo(args, folder, source, train.load_trainable)
    files = sorted(file.name for file in folder.iterdir())
    assert files == ["args.json", "learning_curve.png", "metrics.jsonl", "model", "summary.json"]
    written = json.loads(json.dumps(dataclasses.asdict(args)))
    assert read_json(folder / "args.json")["arguments"] == written
    rows = [line for _, line in read_jsonl(folder / "metrics.jsonl")]
    assert [line["responses"] for line in rows] == [8, 8, 4] and [line["step"] for line in rows] == [1, 2, 3]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["kl"] != 0
    assert all(math.isfinite(value) for line in rows for value in line.values())
    summary = read_json(folder / "summary.json")
    assert (summary["steps"], summary["updates"], summary["responses"]) == (3, 10, 20)
    before, after = load(source).state_dict(), model_weights(folder)
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())
    assert random_texts_differ(load(folder / "model"), load(source))


def random_texts_differ(trained, start) -> bool:
    """Whether two models sample other texts: training has moved more than the last digits."""
    sampling = ppo.rollout_sampling(arguments(max_new_tokens=12))
    prompts = [[5, 6, 7 + i] for i in range(20)]
    texts = [[sample.ids for sample in generate(model, prompts, sampling, frozenset(), seed=0)]
             for model in (trained, start)]
    return texts[0] != texts[1]


if __name__ == "__main__":
    main(work)


def test_one_update_is_written_out(tiny, tmp_path, monkeypatch):
    """A batch of ppo-mi and its one update, by transformers in fp64: Eq. 15's reward, clipped; the KL penalty
    against another model; GAE, whitened over the batch; means over tokens, then over responses; the clip.
    """
    args = arguments(method="ppo-mi", mi_weight=2.0, kl_weight=0.3, gamma=0.9, gae_lambda=0.6, clip=0.3,
                     value_clip=0.4, reward_clip=1.5, rollout_batch=4, train_batch=4, ppo_epochs=1,
                     max_new_tokens=6, temperature=0.9, seed=5)
    start_folder = write_model(tmp_path / "start", seed=1)
    examples = [dataclasses.replace(row(i), system="Be brief.") for i in range(4)]
    actor = RecordingOptimizer(load(tiny, torch.float64))
    critic = RecordingOptimizer(new_critic(tiny, torch.float64))
    batches, asked, clips = [], [], []

    def watch(name: str, note) -> None:
        original = getattr(ppo, name)
        monkeypatch.setattr(ppo, name, lambda *given: note(*given) or original(*given))

    watch("backward", lambda actor, critic, prompts, batch, args: batches.append(batch))
    watch("rewards_of", lambda examples, *rest: asked.extend(examples))
    for name in ("policy_loss", "value_loss"):
        watch(name, lambda *given: clips.append(given[-1]))
    start = load(start_folder, torch.float64).requires_grad_(False)
    file, tokenizer = tmp_path / "metrics.jsonl", Tokenizer(tiny)
    ppo.ppo(actor, critic, start, examples, tokenizer, None, args, Metrics(file), ppo.State())

    # What was sampled: the policy's own responses, in seeded order, each beside its own example.
    [keys], [batch] = rollout_batches(4, args), batches
    assert asked == [examples[i] for i, _ in keys] != examples
    full = [tokenizer.chat(e.user_message(e.context), "Be brief.") for e in examples]
    samples = generate(load(tiny, torch.float64), [full[i] for i, _ in keys], Sampling(0.9, 1.0, 6),
                       tokenizer.stop_ids, 5, keys)
    rollouts = {rollout.row: rollout for rollout in batch}
    assert {i: s.ids for (i, _), s in zip(keys, samples, strict=True)} == {
        i: rollout.ids for i, rollout in rollouts.items()}
    assert clips == [0.3] * 4 + [0.4] * 4

    # What it earned, token by token.
    oracle, start, valued = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
                             for source in (tiny, start_folder, tiny))
    head = critic.model.lm_head.weight.detach().clone().requires_grad_()
    logps, values, returns, advantages, kls, rewards = [], [], [], [], [], []
    for i, e in enumerate(examples):
        ids, bare = rollouts[i].ids, tokenizer.chat(e.user_message(None), "Be brief.")
        own = oracle_logps(oracle, full[i], ids)  # (R,)
        rewards.append(2.0 * (own.sum().item() - oracle_logp(oracle, bare, ids)))
        kl = own.detach() - oracle_logps(start, full[i], ids).detach()  # (R,)
        hidden = valued.model(torch.tensor([full[i] + ids])).last_hidden_state[0]  # (T, E)
        value = hidden[len(full[i]) - 1 : -1] @ head[0]  # (R,)
        r, v = -0.3 * kl, value.detach()
        r[-1] += min(1.5, max(-1.5, rewards[-1]))
        delta = r + 0.9 * torch.cat((v[1:], torch.zeros(1))) - v
        a = [sum(0.54**k * delta[t + k] for k in range(len(v) - t)) for t in range(len(v))]  # gamma lambda
        a = torch.stack(a)  # (R,)
        columns = (logps, own), (values, value), (returns, a + v), (advantages, a), (kls, kl)
        for column, new in columns:
            column.append(new)
    tokens = torch.cat(advantages)
    white = [(a - tokens.mean()) / tokens.std(correction=0) for a in advantages]
    assert any(abs(x) > 1.5 for x in rewards) and any(abs(x) < 1.5 for x in rewards)

    # The gradients at ratio 1, where nothing is clipped but their norm.
    policy_loss = sum(-(a * own).mean() for a, own in zip(white, logps, strict=True)) / 4
    value_loss = sum(0.5 * ((v - r) ** 2).mean() for v, r in zip(values, returns, strict=True)) / 4
    policy_loss.backward()
    value_loss.backward()
    [line] = [line for _, line in read_jsonl(file)]
    expected = named_gradients(oracle), {**named_gradients(valued.model), "head": head.grad}
    ours = actor.gradients[0], critic.gradients[0]
    for found, wanted, key in zip(ours, expected, ("grad_norm", "critic_grad_norm"), strict=True):
        norm = math.sqrt(sum(g.square().sum().item() for g in wanted.values()))
        assert line[key] == pytest.approx(norm, rel=1e-4)
        for name, gradient in wanted.items():
            own = "lm_head.weight" if name == "head" else name if name in found else f"model.{name}"
            torch.testing.assert_close(found[own], gradient / max(1, norm), rtol=1e-3, atol=2e-6)
    assert line["grad_norm"] > 1

    # What metrics.jsonl says of it.
    variance = torch.cat(returns).var(correction=0)
    unexplained = (torch.cat(returns) - torch.cat(values).detach()).var(correction=0)
    said = dict(reward=np.mean(rewards), information=np.mean(rewards) / 2,
                reward_clipped=np.mean([abs(x) > 1.5 for x in rewards]),
                kl=sum(kl.sum().item() for kl in kls) / 4,
                kl_per_token=torch.cat(kls).mean().item(),
                unfinished=np.mean([not s.finished for s in samples]),
                explained_variance=(1 - unexplained / variance).item(), value_loss=value_loss.item())
    assert {key: line[key] for key in said} == pytest.approx(said, rel=1e-4, abs=1e-6)


def test_only_the_training_part_is_trained_on(tmp_path, monkeypatch):
    """As many of its rows as --limit says."""
    class Seen(Exception):
        pass

    def look(actor, critic, reference, examples, *rest) -> None:
        seen.extend(examples)
        raise Seen

    seen: list[Example] = []
    monkeypatch.setattr(ppo, "ppo", look)
    with pytest.raises(Seen):
        ppo.run_ppo(arguments(limit=10), tmp_path / "run", find("tiny"), train.load_trainable)
    assert [e.split for e in seen] == ["train"] * 10


def test_with_adapters_the_reference_is_the_start_model(tiny, tmp_path):
    """The actor without them: once they have moved, there is a divergence to pay for."""
    args = arguments(lora_rank=4, lr=0.1, critic_lr=0.1, rollout_batch=3, train_batch=3, max_new_tokens=6)
    actor, critic = train.load_trainable(tiny, args), load_critic(tiny, args, train.load_trainable)
    _, lines = run_ppo_in_place(PlainSGD(actor), PlainSGD(critic), tiny, tmp_path / "m.jsonl", args,
                                [row(i) for i in range(6)])
    assert abs(lines[0]["kl"]) < 1e-6 and abs(lines[1]["kl"]) > 1e-4
