"""rewards.py - what a response earns in PPO: by a verifier, by a judge, by its mutual information.

    ppo-mi     log pi(y|x,c) - log pi(y|x), without a judge or a verifier                          Eq. 15
    rlaif      a judge's score from 1 to 5, divided by 5                                           section 5.1
    rlaif-mi   that, plus 0.1 times the mutual information                                         Eq. 16
    rlvr       1 where a verifier accepts the response, 0 where it does not                        section 5.1

What differs from the paper: it gives neither the division by 5 nor Eq. 16's weight, which are those of the
authors' code. That code masks the prompt out of both terms of Eq. 15, which makes their mutual information
about 0; here both are log-probs of the sampled ids, each after its whole prompt. It scores an unread verdict
0, ours gives it the mean of its batch. Its judge's temperature is 0.1, ours 0; the wording in which the judge
learns the right answer is ours.

Legend: B responses, R tokens of one response.

    python train.py --method rlvr
"""

import math
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

import judge as judging
from checks import verify
from console import first_of
from data import Example
from judge import Judge
from run import UserError

RIGHT_ANSWER = "The answer should be right, with right reasoning. The right answer is {}."  # ours


@dataclass(frozen=True)
class Reward:
    """What a method's reward is made of: the sum of these."""

    verifier: bool = False
    judge: bool = False
    information: bool = False  # --mi-weight times the mutual information


REWARDS = {
    "ppo-mi": Reward(information=True),
    "rlaif": Reward(judge=True),
    "rlaif-mi": Reward(judge=True, information=True),
    "rlvr": Reward(verifier=True),
}


def check_data(examples: list[Example], args) -> None:
    """UserError where responses to these examples cannot be rewarded in this way."""
    reward = REWARDS[args.method]

    def refuse(needs: str, without: list[Example]) -> None:
        if without:
            raise UserError(f"--method {args.method} needs {needs} in every row; {len(without)} of "
                            f"{len(examples)} have none ({first_of([e.name for e in without])})")

    if reward.information:
        refuse("a context", [e for e in examples if not e.context])
    if reward.verifier:
        refuse("a check or a right answer", [e for e in examples if verify(e, "") is None])
    if reward.judge:
        refuse("a context or a right answer", [e for e in examples if not e.context and e.answer is None])


def mutual_information(logps: Tensor, bare_logps: Tensor) -> Tensor:
    """log pi(y|x,c) - log pi(y|x), summed over the response's tokens, in nats (Eq. 15).

    logps, bare_logps (R,): of the same sampled ids, after the prompt with and without the context. The mean
    over y ~ pi(.|x,c) is a KL divergence, at least 0; a single response's may be negative.
    """
    return (logps - bare_logps).sum()


def rewards_of(examples: list[Example], texts: list[str], information: list[float], judge: Judge | None,
               args) -> tuple[list[float], int]:
    """The reward of each response, and how many verdicts could not be read; these earn the others' mean, or 0
    where none could be read.

    examples, texts, information (B each): what was asked, the response, and its mutual information, which is
    used only if the reward needs it. A judge divides its work among processes: all must call this with the
    same arguments.
    """
    reward = REWARDS[args.method]
    rewards, unread = [0.0] * len(texts), 0
    if reward.verifier:
        rewards = [float(verify(example, text)) for example, text in zip(examples, texts, strict=True)]
    if reward.judge:
        scores = judging.reward(judge, *judged(examples), texts)  # from 1 to 5
        readable = [score / 5 for score in scores if score is not None]
        mean = fmean(readable) if readable else 0.0
        earned = [mean if score is None else score / 5 for score in scores]
        rewards = [own + score for own, score in zip(rewards, earned, strict=True)]
        unread = len(scores) - len(readable)
    if reward.information:  # Eq. 15; with a judge's score Eq. 16
        rewards = [own + args.mi_weight * nats for own, nats in zip(rewards, information, strict=True)]
    if len(rewards) != len(texts) or not all(map(math.isfinite, rewards)):  # clipping makes a NaN the best
        raise ValueError(f"rewards_of: {len(texts)} responses earn {rewards}, not a finite number each")
    return rewards, unread


def judged(examples: list[Example]) -> tuple[list[str], list[str]]:
    """What a judge is shown beside a response: prompts, and contexts or, without one, the right answers."""
    contexts = [example.context or RIGHT_ANSWER.format(example.answer) for example in examples]
    return [example.prompt for example in examples], contexts


def require_readable(examples: list[Example], texts: list[str], judge: Judge) -> None:
    """UserError where most of the judge's replies to these responses hold no score: it cannot teach."""
    judging.require_readable(judge, *judged(examples), texts)
