"""divergence.py - how far training has moved a model from where it began, in nats a response.

KL(pi || pi_ref) = E over y ~ pi(.|x, c) of log pi(y|x, c) - log pi_ref(y|x, c), on validation prompts, one
response each at temperature 1; the interval is over prompts and contexts. Beside a win rate it says at what
price it was won.

    python results/divergence.py RUN RUN ...          writes RUN/divergence.json
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as evaluating
from folder import load
from measures import clusters_of, interval
from responses import Message, logps_after, sample_responses
from run import default_device, write_json
from tokenizer import Tokenizer

ROWS = 96


def divergence(run: Path) -> dict:
    """The divergence of a run's model from its start, and how long its responses at temperature 1 are."""
    plan = evaluating.resolve(evaluating.Args(model=str(run), split="validation", limit=ROWS,
                                               out=str(run / "divergence")))
    args, examples = plan.args, plan.examples
    tokenizer = Tokenizer(plan.base, args.date, args.template)
    trained, base = (load(model, getattr(torch, args.dtype), default_device())
                     for model in (plan.trained, plan.base))
    sampling = dataclasses.replace(plan.sampling, temperature=1.0, top_p=1.0, top_k=0)
    messages = [Message(e.user_message(e.context), e.system) for e in examples]
    samples = sample_responses(trained, tokenizer, messages, sampling, args.seed, args.slots, "trained")
    ids = [[sample.ids] for sample in samples]
    after, before = (logps_after(model, tokenizer, messages, ids, name)[:, 0]
                     for name, model in dict(trained=trained, base=base).items())  # (rows,) each
    return dict(kl=interval(after - before, **clusters_of(examples)),
                tokens=sum(len(sample.ids) for sample in samples) / len(samples))


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        measured = divergence(folder)
        write_json(folder / "divergence.json", measured)
        print(f"{folder}: KL {measured['kl']['mean']:.2f} nats, {measured['tokens']:.0f} tokens")
