"""ppo.py - proximal policy optimisation on one reward per sampled response: MIPO's baseline.

    ppo-mi, rlaif, rlaif-mi, rlvr       four rewards, rewards.py               sections 5.1, 5.2; appendix E

One loop, `ppo`: sample responses, reward them, estimate every token's advantage, update actor and critic.
The critic is a second copy of the start model with one output, the value of the state; it is not saved.
What differs from the paper: appendix E gives learning rates, batch sizes and the KL weight; other constants
come from the authors' scripts, and all are arguments. Its normalize_reward, without effect in their code, is
left out. A judge whose first replies cannot be read is refused. The embedded model's settings are ours.

Legend: B rollouts, R tokens of one response, E hidden size.

    python train.py --method rlvr
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from batches import epoch_order, idle_passes, micro_batches
from checkpoint import Checkpoints, StopSignal
from contexts import contexts_of, examples_for, sampling_for
from data import Example
from folder import load
from judge import Judge
from losses import Group, response_logps, split_by_tokens, states_before
from lora import adapters_off
from model import Decoder
from optimizer import MasterAdamW, all_reduce_gradients, gradient_norm, learning_rate
from rewards import REWARDS, mutual_information, require_readable, rewards_of
from rows import fitting_rows
from run import (UserError, barrier, flag_of, gather, option, peak_memory, progress, seed_from, share_of,
                 world)
from run_folder import begin_or_resume, complete
from sample import Sampler, Sampling
from selection import save_model
from shard import gathered, is_sharded, refresh, shard_weights
from tokenizer import Tokenizer
from training_log import Metrics, count_step, require_finite_steps

MAX_NEW_TOKENS = 256  # of a rollout; fewer where the data set's own responses are shorter

# ------------------------------------------------------------------------- arguments

DEFAULTS = dict(lr=5e-7, critic_lr=9e-6, rollout_batch=8, train_batch=4)
TINY_DEFAULTS = dict(lr=2e-4, critic_lr=1e-3, rollout_batch=32, train_batch=16)
MI_WEIGHTS = {"ppo-mi": 1.0, "rlaif-mi": 0.1}
TINY_MI_WEIGHT = 0.5  # of ppo-mi: at 1 too many rewards of the embedded model are clipped
# Options that have no effect here: any value but the default is an error.
REFUSED = ("pairs", "neg", "softmax", "beta", "label_smoothing", "nll", "reduce", "temperature_loss",
           "rounds", "batch", "eval_every", "val_limit")


@dataclass
class PPOArgs:
    """The arguments of PPO. --lr is the actor's, and --epochs counts passes over the prompts."""

    rollout_batch: int | None = option(None, "prompts whose responses are sampled, and then trained on, "
                                       "together, by all processes (default: "
                                       f"{DEFAULTS['rollout_batch']}; tiny: "
                                       f"{TINY_DEFAULTS['rollout_batch']})", "PPO")
    rollouts: int = option(1, "responses to every prompt", "PPO")
    train_batch: int | None = option(None, "responses per update (default: "
                                     f"{DEFAULTS['train_batch']}; tiny: {TINY_DEFAULTS['train_batch']})",
                                     "PPO")
    ppo_epochs: int = option(2, "passes over every batch of responses", "PPO")
    critic_lr: float | None = option(None, "peak learning rate of the critic (default: "
                                     f"{DEFAULTS['critic_lr']:g}; tiny: {TINY_DEFAULTS['critic_lr']:g})",
                                     "PPO")
    mi_weight: float | None = option(None, "weight of mutual information in the reward (default: ppo-mi "
                                     f"{MI_WEIGHTS['ppo-mi']:g}, tiny {TINY_MI_WEIGHT:g}; rlaif-mi "
                                     f"{MI_WEIGHTS['rlaif-mi']:g})", "PPO")
    reward_clip: float = option(10.0, "rewards are clipped to [-this, this]", "PPO")
    kl_weight: float = option(0.001, "weight of the KL penalty on every token", "PPO")
    gamma: float = option(1.0, "discount per token", "PPO")
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation", "PPO")
    clip: float = option(0.2, "how far the ratio of probabilities may move from 1", "PPO")
    value_clip: float = option(0.2, "how far a value may move", "PPO")
    shuffle_rewards: bool = option(False, "control: each response gets another one's reward", "PPO")


def resolve(args):
    """A copy of the arguments in which PPO's defaults are filled in; --model must be there already."""
    is_tiny = args.model == "tiny"
    defaults = dict(TINY_DEFAULTS if is_tiny else DEFAULTS)
    defaults["mi_weight"] = MI_WEIGHTS.get(args.method)
    if is_tiny and args.method == "ppo-mi":
        defaults["mi_weight"] = TINY_MI_WEIGHT
    missing = [name for name in defaults if getattr(args, name) is None]
    return dataclasses.replace(args, **{name: defaults[name] for name in missing})


def check(args) -> None:
    """UserError where the arguments contradict each other."""
    sizes = args.rollout_batch, args.rollouts, args.train_batch, args.ppo_epochs
    rates = args.critic_lr, args.reward_clip, args.clip, args.value_clip
    if min(sizes + rates) <= 0:
        raise UserError("--rollout-batch, --rollouts, --train-batch, --ppo-epochs, --critic-lr, "
                        "--reward-clip, --clip and --value-clip must be positive")
    if args.kl_weight < 0 or not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        raise UserError("--kl-weight must be at least 0, --gamma and --gae-lambda in [0, 1]")
    given = [flag_of(field) for field in dataclasses.fields(args)
             if field.name in REFUSED and getattr(args, field.name) != field.default]
    given += ["--n-neg"] * (args.n_neg > 1)
    if given:
        raise UserError(f"{', '.join(given)}: no effect with --method {args.method}")
    if args.shuffle_rewards and args.rollout_batch * args.rollouts < 2:
        raise UserError("--shuffle-rewards needs two responses in a batch: raise --rollout-batch")
    reward = REWARDS[args.method]
    if args.judge and not reward.judge and contexts_of(args) != "infer":
        raise UserError(f"--judge has nothing to judge with --method {args.method}")
    if reward.judge and not args.judge:
        raise UserError(f"--method {args.method} needs a judge: --judge MODEL. The paper's is the start "
                        f"model itself, --judge {args.model}")
    if args.mi_weight is not None and not reward.information:
        raise UserError(f"--mi-weight: the reward of --method {args.method} has no mutual information")


def rollout_sampling(args) -> Sampling:
    """How responses are sampled: from the policy as it is, unless the arguments say otherwise."""
    sampling = sampling_for(args)
    own = dict(temperature=1.0, top_p=1.0, max_new_tokens=min(MAX_NEW_TOKENS, sampling.max_new_tokens))
    left_open = {name: value for name, value in own.items() if getattr(args, name) is None}
    return dataclasses.replace(sampling, **left_open)


# ------------------------------------------------------------------------- equations

def kl_penalty(logps: Tensor, reference: Tensor) -> Tensor:
    """log pi - log pi_ref of each sampled token, (R,): the estimator k1 of KL(pi || pi_ref), unbiased for
    samples of pi (Schulman, 2020)."""
    return logps - reference


def token_rewards(reward: float, logps: Tensor, reference: Tensor, kl_weight: float) -> Tensor:
    """The reward of each token, (R,): the KL penalty on every token, the response's reward on the last."""
    rewards = -kl_weight * kl_penalty(logps, reference)  # (R,)
    rewards[-1] += reward
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, Eqs. 11 to 16 there).

    rewards (R,): r_t for the t-th token. values (R,): V(s_t) of the state before that token. Returns, (R,)
    each, the advantages A_t and what the critic should have said, A_t + V(s_t).
    """
    backwards: list[float] = []  # A_R, ..., A_1
    advantage = next_value = 0.0  # nothing comes after the last token
    for reward, value in reversed(list(zip(rewards.tolist(), values.tolist(), strict=True))):
        delta = reward + gamma * next_value - value  # r_t + gamma V(s_t+1) - V(s_t)
        advantage = delta + gamma * gae_lambda * advantage  # A_t = delta_t + gamma lambda A_t+1
        backwards.append(advantage)
        next_value = value
    advantages = torch.tensor(backwards[::-1], dtype=values.dtype)  # (R,)
    return advantages, advantages + values


def whiten(advantages: list[Tensor]) -> list[Tensor]:
    """Advantages, (R,) of each response, with mean 0 and variance 1 over all tokens of all responses."""
    tokens = torch.cat(advantages)  # (tokens of the batch,)
    mean, scale = tokens.mean(), tokens.var(correction=0).clamp(min=1e-8).rsqrt()  # equal ones become 0
    return [(own - mean) * scale for own in advantages]


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective of each token, as a loss, (R,) (Schulman et al., 2017, Eq. 7 there)."""
    ratio = (logps - old_logps).exp()  # (R,): pi / pi_old
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The larger of the clipped and the unclipped half squared errors of each value, (R,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (R,)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """The share of the returns' variance that the values explain; 1: all, 0: no better than a constant."""
    variance = returns.var(correction=0)
    if variance == 0:
        return 0.0
    return (1 - (returns - values).var(correction=0) / variance).item()


# ------------------------------------------------------------------------- what the models say

def load_critic(source: Path, args, load_trainable: Callable[[Path, object], Decoder]) -> Decoder:
    """A copy of the start model whose output layer is a new (1, E) matrix without bias: a state's value.

    load_trainable(source, args): the start model, with adapters where --lora-rank asks for them.
    """
    critic = load_trainable(source, dataclasses.replace(args, shard=False))  # sharded below, with its head
    size = critic.config.hidden_size
    generator = torch.Generator().manual_seed(seed_from("critic", args.seed))
    # The spread of reward models' heads in the authors' trainer, OpenRLHF.
    weight = torch.empty(1, size).normal_(std=1 / (size + 1), generator=generator)  # (1, E)
    weight = weight.to(critic.device, critic.compute)
    critic.config = dataclasses.replace(critic.config, tie_word_embeddings=False)
    critic.lm_head = nn.Linear(size, 1, bias=False)
    critic.lm_head.weight = nn.Parameter(weight)
    return shard_weights(critic) if args.shard else critic


def policy_logps(model: Decoder, groups: list[Group]) -> list[Tensor]:
    """Log-probs of each response's tokens, (R,) each, on the CPU. groups: a prompt and its one response."""
    return on_cpu(torch.cat([logps for [logps] in response_logps(model, groups)]), groups)


def on_cpu(numbers: Tensor, groups: list[Group]) -> list[Tensor]:
    """Numbers of all tokens, one response at a time, (R,) each. Clones: of a view the whole would be sent."""
    lengths = [len(response) for _, [response] in groups]
    return [part.clone() for part in numbers.cpu().split(lengths)]


def response_values(critic: Decoder, groups: list[Group]) -> list[Tensor]:
    """The value of the state before each of a response's tokens, (R,) each, on the CPU.

    With a prompt of ids [5, 6] and the response [7, 8], these are the states after 5 6 and after 5 6 7: the
    very positions that predict 7 and 8. What comes after the last token has no value.
    """
    return on_cpu(critic.logits(states_before(critic, groups)).squeeze(1), groups)


@torch.no_grad()
def in_passes(measure: Callable[[Decoder, list[Group]], list[Tensor]], model: Decoder, groups: list[Group],
              args) -> list[Tensor]:
    """`policy_logps` or `response_values` without gradient, in passes of --pass-tokens tokens."""
    results = []
    for chunk in split_by_tokens(groups, lambda group: [group], args.pass_tokens):
        results += measure(model, chunk)
    return results


def reference_logps(reference: Decoder, groups: list[Group], args) -> list[Tensor]:
    """log pi_ref of each response's tokens, (R,) each, without gradient. With adapters the reference is the
    actor itself with them switched off."""
    with adapters_off(reference) if args.lora_rank else contextlib.nullcontext():
        return in_passes(policy_logps, reference, groups, args)


# ------------------------------------------------------------------------- rollouts

@dataclass
class Rollout:
    """A sampled response, and what models say of each of its R tokens, the end token among them."""

    row: int  # of its example
    ids: list[int]
    text: str
    finished: bool
    logps: Tensor  # (R,) of the policy that sampled it
    reference: Tensor  # (R,) log-probs of the start model
    values: Tensor  # (R,) of the states before the tokens, as the critic saw them then
    information: float  # Eq. 15, where the reward needs it
    advantages: Tensor | None = None  # (R,) whitened
    returns: Tensor | None = None  # (R,)


def rollout_batches(count: int, args) -> list[list[tuple[int, int]]]:
    """What is sampled together, as (row, sample index): --rollout-batch prompts each, in seeded order."""
    batches = []
    for epoch in range(args.epochs):
        order = epoch_order(count, args.seed, epoch)
        numbers = range(epoch * args.rollouts, (epoch + 1) * args.rollouts)
        for i in range(0, count, args.rollout_batch):
            rows = order[i : i + args.rollout_batch]
            batches.append([(row, number) for row in rows for number in numbers])
    return batches


# ------------------------------------------------------------------------- the loop

@dataclass
class State:
    """Training progress: everything in a checkpoint except tensors."""

    candidate: int = 0  # always the first: PPO takes one value of every option
    step: int = 0  # batches of rollouts done
    updates: int = 0
    tokens: int = 0  # sampled
    seconds: float = 0.0
    skipped: int = 0  # how many updates the actor or the critic skipped
    skipped_in_a_row: int = 0
    unread: int = 0  # verdicts
    rows: int = 0  # lines of metrics.jsonl


def ppo(actor: MasterAdamW, critic: MasterAdamW, reference: Decoder | None, examples: list[Example],
        tokenizer: Tokenizer, judge: Judge | None, args, metrics: Metrics, state: State,
        checkpoints: Checkpoints | None = None) -> None:
    """Train the actor's model on rewards for its own responses; every batch of them is a line of
    metrics.jsonl.

    actor, critic: optimizers, each with its model. reference: the start model; None: the actor's own model
    with its adapters off. args: the run's arguments, train.Args. `state` is continued. Processes share the
    sampling and the passes of every batch; rewards and advantages are computed on every process. With
    --shard, rollouts use whole copies of the models.
    """
    policy, value_model = gathered(actor.model), gathered(critic.model)
    reference = reference or policy  # with its adapters off
    prompts = [tokenizer.chat(e.user_message(e.context), e.system) for e in examples]  # (x, c)
    bare_prompts = [tokenizer.chat(e.user_message(None), e.system) for e in examples]  # x
    batches = rollout_batches(len(examples), args)
    update_count = args.ppo_epochs * sum(math.ceil(len(batch) / args.train_batch) for batch in batches)
    slots = min(args.slots, math.ceil(len(batches[0]) / world()))
    sampler = Sampler(policy, prompts, rollout_sampling(args), tokenizer.stop_ids, slots)
    bar = progress(sum(map(len, batches)), "responses", "training")
    bar.update(sum(map(len, batches[: state.step])))

    for number, batch in enumerate(batches[state.step :], state.step):
        started = time.perf_counter()

        # 1. Rollouts: y ~ pi(.|x,c). The sampler's own log-probs round differently from those of training,
        # so they are computed again, as training will compute them.
        refresh(policy, actor.model)
        refresh(value_model, critic.model)
        mine = share_of(batch)
        rows = [row for row, _ in mine]
        samples = sampler.sample([prompts[row] for row in rows], args.seed, mine)
        responses = [sample.ids for sample in samples]
        groups = [(prompts[row], [ids]) for row, ids in zip(rows, responses, strict=True)]
        logps = in_passes(policy_logps, policy, groups, args)  # (R,) each
        information = [0.0] * len(mine)
        if REWARDS[args.method].information:
            bare_groups = [(bare_prompts[row], [ids]) for row, ids in zip(rows, responses, strict=True)]
            bare_logps = in_passes(policy_logps, policy, bare_groups, args)  # (R,) each
            information = [mutual_information(*terms).item() for terms in zip(logps, bare_logps, strict=True)]
        start_logps = reference_logps(reference, groups, args)  # (R,) each
        old_values = in_passes(response_values, value_model, groups, args)  # (R,) each
        rollouts = gather([  # B of all processes
            Rollout(
                row=row,
                ids=sample.ids,
                text=tokenizer.answer(sample.ids),
                finished=sample.finished,
                logps=logps[k],
                reference=start_logps[k],
                values=old_values[k],
                information=information[k],
            ) for k, (row, sample) in enumerate(zip(rows, samples, strict=True))])

        # 2. Rewards, one a response. A judge whose first replies cannot be read has nothing to teach.
        asked = [examples[rollout.row] for rollout in rollouts]
        texts = [rollout.text for rollout in rollouts]
        if judge and number == 0:
            require_readable(asked, texts, judge)
        nats = [rollout.information for rollout in rollouts]
        rewards, unread = rewards_of(asked, texts, nats, judge, args)
        state.unread += unread
        if args.shuffle_rewards:
            order = epoch_order(len(rewards), seed_from("shuffled rewards", args.seed), number)
            of_next = dict(zip(order, order[1:] + order[:1], strict=True))  # only a lone one keeps its own
            rewards = [rewards[of_next[i]] for i in range(len(rewards))]

        # 3. Advantages, one a token, whitened over the whole batch.
        for rollout, reward in zip(rollouts, rewards, strict=True):
            clipped = max(-args.reward_clip, min(args.reward_clip, reward))
            of_tokens = token_rewards(clipped, rollout.logps, rollout.reference, args.kl_weight)  # (R,)
            rollout.advantages, rollout.returns = gae(of_tokens, rollout.values, args.gamma, args.gae_lambda)
        whitened = whiten([rollout.advantages for rollout in rollouts])
        for rollout, advantages in zip(rollouts, whitened, strict=True):
            rollout.advantages = advantages

        # 4. Updates: a mean over each response's tokens, then over the responses of a training batch.
        measured: list[dict[str, float]] = []  # of every response of every training batch
        norms: list[dict[str, float]] = []  # of every training batch's gradients
        for train_batch in training_batches(rollouts, number, args):
            measured += gather(backward(actor.model, critic.model, prompts, train_batch, args))
            lr = learning_rate(state.updates, update_count, args.lr)
            critic_lr = learning_rate(state.updates, update_count, args.critic_lr)
            of_actor = update(actor, state.updates, lr)
            of_critic = update(critic, state.updates, critic_lr)
            norms.append(dict(grad_norm=of_actor.item(), critic_grad_norm=of_critic.item()))
            state.updates += 1
            count_step(state, math.isfinite(sum(norms[-1].values())))

        tokens, seconds = sum(len(rollout.ids) for rollout in rollouts), time.perf_counter() - started
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        line = dict(
            candidate=0,
            step=state.step,
            updates=state.updates,
            responses=len(rollouts),
            unread=unread,
            **describe(rollouts, rewards, args),
            **means(measured),
            **means(norms),
            lr=lr,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            skipped=state.skipped,
            weights_changed=actor.share_changed().item(),
        )
        metrics.log(**line)
        require_finite_steps(state)
        bar.set_postfix_str(f"reward {line['reward']:.3f}, KL {line['kl']:.2f}, {line['length']:.0f} tokens")
        bar.update(len(rollouts))

        state.rows = metrics.rows
        if checkpoints:
            checkpoints.after_step(args.save_every, lambda: tensors_of(actor=actor, critic=critic), state)

    bar.close()
    if state.unread:
        print(f"{state.unread} verdicts could not be read; each earned its batch's mean")
    if state.skipped:
        print(f"{state.skipped} of {update_count} updates were not finite: the actor, the critic or both "
              "skipped them")


def tensors_of(**optimizers: MasterAdamW) -> dict[str, Tensor]:
    """What a checkpoint keeps of several optimizers, each under its name."""
    return {f"{name}.{key}": tensor for name, optimizer in optimizers.items()
            for key, tensor in optimizer.tensors().items()}


def training_batches(rollouts: list[Rollout], number: int, args) -> list[list[Rollout]]:
    """What each update trains on, --train-batch rollouts: --ppo-epochs passes in seeded order over the
    rollouts of one batch, which is the `number`-th."""
    batches = []
    for epoch in range(args.ppo_epochs):
        order = epoch_order(len(rollouts), seed_from("updates", args.seed, number), epoch)
        for i in range(0, len(order), args.train_batch):
            batches.append([rollouts[k] for k in order[i : i + args.train_batch]])
    return batches


def backward(actor: Decoder, critic: Decoder, prompts: list[list[int]], batch: list[Rollout],
             args) -> list[dict[str, float]]:
    """Add the gradients of this process's share of a batch; metrics of each of its rollouts.

    Each loss is one mean over the whole batch, however it is cut into passes and processes.
    """
    def groups_of(rollout: Rollout) -> list[Group]:
        return [(prompts[rollout.row], [rollout.ids])]

    own = micro_batches(batch, groups_of, args)
    measured = []
    for micro_batch in own:
        groups = [group for rollout in micro_batch for group in groups_of(rollout)]
        logps = policy_logps(actor, groups)  # (R,) each
        policy_losses = [policy_loss(new, rollout.logps, rollout.advantages, args.clip).mean()
                         for new, rollout in zip(logps, micro_batch, strict=True)]
        (sum(policy_losses) / len(batch)).backward()
        values = response_values(critic, groups)  # (R,) each
        value_losses = [value_loss(new, rollout.values, rollout.returns, args.value_clip).mean()
                        for new, rollout in zip(values, micro_batch, strict=True)]
        (sum(value_losses) / len(batch)).backward()
        for i, rollout in enumerate(micro_batch):
            ratio = (logps[i].detach() - rollout.logps).exp()  # (R,)
            measured.append(dict(
                loss=policy_losses[i].item(),
                value_loss=value_losses[i].item(),
                ratio_clipped=((ratio - 1).abs() > args.clip).float().mean().item(),
            ))
    if is_sharded(actor):  # all processes run every pass together: run dummies for those this one lacks
        most = max(len(micro_batches(batch, groups_of, args, process)) for process in range(world()))
        for _ in range(most - len(own)):
            idle_passes(actor, 1).backward()
            idle_passes(critic, 1).backward()
    return measured


def update(optimizer: MasterAdamW, number: int, lr: float) -> Tensor:
    """One step by the gradients of all processes, clipped to norm 1. Returns their norm before clipping; a
    step that is not finite is skipped."""
    all_reduce_gradients(optimizer.model)
    norm = gradient_norm(optimizer.weights)
    optimizer.step(number, lr, norm)
    optimizer.zero_grad()
    return norm


def describe(rollouts: list[Rollout], rewards: list[float], args) -> dict[str, float]:
    """What metrics.jsonl says of a batch of rollouts and of their rewards before these are clipped.

    KL from the start model is in nats per response and per token, lengths are in tokens.
    """
    divergences = [kl_penalty(rollout.logps, rollout.reference).sum().item() for rollout in rollouts]
    lengths = [len(rollout.ids) for rollout in rollouts]
    values = torch.cat([rollout.values for rollout in rollouts])  # (tokens of the batch,)
    returns = torch.cat([rollout.returns for rollout in rollouts])  # (tokens of the batch,)
    described = dict(
        reward=fmean(rewards),
        reward_clipped=fmean([abs(reward) > args.reward_clip for reward in rewards]),
        kl=fmean(divergences),
        kl_per_token=sum(divergences) / sum(lengths),
        length=fmean(lengths),
        unfinished=fmean([not rollout.finished for rollout in rollouts]),
        explained_variance=explained_variance(values, returns),
    )
    if REWARDS[args.method].information:
        described["information"] = fmean([rollout.information for rollout in rollouts])
    return described


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over all rows."""
    return {name: fmean([row[name] for row in rows]) for name in rows[0]}


# ------------------------------------------------------------------------- a run

def run_ppo(args, folder: Path, source: Path, load_trainable: Callable[[Path, object], Decoder]) -> None:
    """Models, the loop, and the run folder's files: those of a run of train.py, but for pairs.

    load_trainable(source, args): the start model, as train.py trains it.
    """
    start, processor = time.perf_counter(), time.process_time()
    checkpoints = Checkpoints(folder, args.keep)
    saved, tensors = begin_or_resume([args], folder, checkpoints)
    state = State(**saved)
    has_begun = state.rows > 0
    judge = Judge(args, args.slots, args.date) if REWARDS[args.method].judge else None
    if judge:
        judge.check_endpoint()  # before any model is loaded
    actor = MasterAdamW(load_trainable(source, args), args.lr, args.seed, args.rounding)
    critic = MasterAdamW(load_critic(source, args, load_trainable), args.critic_lr, args.seed, args.rounding)
    reference = None
    if not args.lora_rank:
        reference = load(source, actor.model.compute, actor.model.device).requires_grad_(False)
    if tensors:
        for name, optimizer in dict(actor=actor, critic=critic).items():
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()
                   if key.startswith(f"{name}.")}
            optimizer.load_tensors(own)
    tokenizer, sampling = Tokenizer(source, args.date, args.template), rollout_sampling(args)
    examples = fitting_rows(examples_for(args, "train"),
                            lambda e: [e.user_message(e.context), e.user_message(None)], tokenizer,
                            actor.model.config.max_position_embeddings, sampling.max_new_tokens)
    print(f"{folder}: {len(examples)} prompts, lr {args.lr}, critic's {args.critic_lr}, {sampling}")
    metrics = Metrics(folder / "metrics.jsonl", state.rows)
    checkpoints.stop = StopSignal()
    with checkpoints.stop:  # a signal now lets the step end first
        ppo(actor, critic, reference, examples, tokenizer, judge, args, metrics, state, checkpoints)
    save_model(actor, [], args, folder, source)
    barrier()

    summary = dict(
        steps=state.step,
        updates=state.updates,
        responses=len(examples) * args.rollouts * args.epochs,
        skipped=state.skipped,
        unread=state.unread,
        tokens=state.tokens,
        seconds_training=state.seconds,
        seconds=time.perf_counter() - start,  # since the last start
        processor_seconds=time.process_time() - processor,
        peak_memory_gb=peak_memory() / 1e9,
    )
    complete(folder, checkpoints, summary)
    span = "since the last start" if has_begun else "in all"
    print(f"{summary['updates']} updates on {summary['responses']} responses, {summary['seconds']:.0f} s "
          f"{span}, {summary['peak_memory_gb']:.1f} GB at most; model in {folder / 'model'}")
