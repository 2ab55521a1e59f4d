"""losses.py against full logits, transformers, TRL, finite differences and sums worked by hand.

    python -m pytest tests/test_losses.py
"""

import copy
import math

import datasets
import pytest
import torch
from conftest import END, CountingBar, named_gradients, oracle_logps, random_model, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from folder import load
from losses import (common_prefix_length, dpo, infonce, response_logps, sami, sequence_logps, sft,
                    split_by_tokens, token_logps)
from model import Decoder

METRICS = {"loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "accuracy_chosen",
           "accuracy_rejected", "logp_chosen", "logp_rejected"}


# ------------------------------------------------------------------------- log-probs of responses

def test_token_logps_are_the_log_softmax():
    """log softmax(hidden @ weight.T) at each target, in fp32 from bf16 too (test_fast.py says the rest)."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (11, 17))
    targets = torch.randint(17, (11,), generator=rng)
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(11), targets]
    torch.testing.assert_close(token_logps(hidden, weight, targets), expected)
    assert token_logps(hidden.bfloat16(), weight.bfloat16(), targets).dtype == torch.float32


GROUPS = [
    ([5, 6, 7, 8], [[9, 10, 11, END], [12, END], [END]]),
    ([20], [[21, 22, 23], [END, 30, END, END, 31]]),
    ([40, END, 41], [[42]]),
]
ROOTED = {  # what all prefixes begin with, and the groups
    "two_of_each": (2, [([5, 6, 7, 8], [[9, 10, END], [12, END]]), ([5, 6, 9], [[9, 13]]),
                        ([5, 6, 7], [[8]])]),
    "one_goes_on": (2, [([5, 6, 7], [[7, 8], [END]]), ([5, 6, 7, 7, 7], [[7], [7, 7, 8]])]),
    "all_the_same": (3, [([5, 6, 7, 8], [[9, END]]), ([5, 6, 7, 8], [[9, 10], [END]])]),
    "one_token": (0, [([5], [[6, 7], [END]]), ([5], [[8, 9]])]),
    "alone": (0, [([5, 6, 7], [[8, 9]])]),
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def oracle_folder(tmp_path_factory, request):
    """A tiny Llama whose pad token is its end token."""
    return write_model(tmp_path_factory.mktemp("oracle"), pad_token_id=END, scale=0.2,
                       tie_word_embeddings=request.param)


@pytest.fixture()
def oracle(oracle_folder):
    """transformers' model of it; padding_idx would take the end token's gradient away."""
    model = AutoModelForCausalLM.from_pretrained(oracle_folder, dtype=torch.float32)
    model.model.embed_tokens.padding_idx = None
    return model


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, Decoder]:
    """A tiny model in fp64, and another one to be its reference."""
    return random_model(seed=0, scale=0.2).double(), random_model(seed=1, scale=0.2).double()


@pytest.mark.parametrize("groups", [GROUPS, *(groups for _, groups in ROOTED.values())],
                         ids=["no_root", *ROOTED])
def test_response_logps_are_each_sequence_alone(oracle_folder, oracle, groups):
    """Values and all gradients are those of transformers' full logits, one sequence at a time; with a tied
    head, whose gradient has two sources, and without."""
    model = load(oracle_folder)
    logps = response_logps(model, groups)
    lengths = [[len(response) for response in responses] for _, responses in groups]
    assert [[len(tokens) for tokens in group] for group in logps] == lengths
    ours = [tokens for group in logps for tokens in group]
    theirs = [oracle_logps(oracle, prefix, response)
              for prefix, responses in groups for response in responses]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    for each in (ours, theirs):  # every token of every response counts differently
        flat = torch.cat(each)
        (flat * torch.arange(1, len(flat) + 1)).sum().backward()
    found, expected = named_gradients(model), named_gradients(oracle)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("root, groups", ROOTED.values(), ids=ROOTED)
def test_what_all_prefixes_begin_with_is_fed_once(models, root, groups):
    """The model sees the root once, the rest of every prefix, and each response but for its last token."""
    model, fed = models[0], []
    with model.register_forward_pre_hook(lambda _, args: fed.append(args[0].tolist())):
        response_logps(model, groups)
    expected = groups[0][0][:root]
    for prefix, responses in groups:
        expected = expected + prefix[root:]
        for response in responses:
            expected = expected + response[:-1]
    assert fed == [expected]
    assert common_prefix_length([prefix for prefix, _ in groups]) == root


@pytest.mark.parametrize("sequences, length", [
    ([[5, 6, 7]], 0), ([[5, 6], [5, 6]], 1), ([[5, 6, 7], [5, 6]], 1), ([[5, 6, 7], [5, 8, 7], [5, 6, 9]], 1),
    ([[4], [5]], 0), ([[5], [5, 6]], 0), ([[5, 6, 7, 8], [5, 6, 7, 9]], 3),
])  # fmt: skip
def test_the_common_prefix_leaves_every_sequence_a_token(sequences, length):
    """The longest beginning of all that is the whole of none; a single sequence has nothing in common."""
    assert common_prefix_length(sequences) == length


def test_a_shared_root_makes_room_in_a_chunk():
    """Of two groups of 8 tokens that share 5 a chunk counts 3 each; with a third that shares 2, 6 each."""
    a, b, c = (([1, 2, *rest], [[7, 8]]) for rest in ([3, 4, 5, 5], [3, 4, 5, 6], [9, 9, 9, 9]))
    apart, two, all_three = [[a], [b], [c]], [[a, b], [c]], [[a, b, c]]
    for tokens, expected in ((5, apart), (6, two), (17, two), (18, all_three)):
        assert list(split_by_tokens([a, b, c], lambda group: [group], tokens)) == expected


def test_the_end_token_counts(oracle_folder, oracle):
    """The last log-prob of a response is its end token's, although padding would be the same id."""
    assert oracle.config.pad_token_id == END
    groups = [([5, 6], [[7, 8, END], [7, 8]])]
    ((with_end, without),) = response_logps(load(oracle_folder), groups)
    expected = oracle(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].log_softmax(-1)[END]
    assert len(with_end) == 3
    torch.testing.assert_close(with_end[-1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(with_end[:-1], without)


@pytest.mark.parametrize("given", [GROUPS, ROOTED["two_of_each"][1]], ids=["no_root", "root"])
def test_response_logps_leave_their_groups_alone(models, given):
    """Ids go in and come out as they were."""
    groups = copy.deepcopy(given)
    response_logps(models[0], groups)
    assert groups == given


@pytest.mark.parametrize("groups", [
    [([5], [[]])], [([5], [[6], []])], [([], [[6]])], [([5], [[6]]), ([7], [[8, 9], []])],
])  # fmt: skip
def test_nothing_has_no_log_probability(models, groups):
    """An empty response or prefix raises instead of scoring 0."""
    with pytest.raises(ValueError, match="empty prefix or response"):
        response_logps(models[0], groups)


@pytest.mark.parametrize("max_tokens", [1, 10, 17, 18, 30, 4096])
def test_sequence_logps_are_sums_of_response_logps(models, max_tokens):
    """However many tokens a pass may hold, in order and without a graph; the bar counts groups."""
    model, graphs, bar = models[0], [], CountingBar()
    with model.register_forward_hook(lambda _, args, hidden: graphs.append(hidden.requires_grad)):
        sums = sequence_logps(model, GROUPS, max_tokens, bar)
    passes = list(split_by_tokens(GROUPS, lambda group: [group], max_tokens))
    assert not any(graphs) and len(graphs) == len(passes)
    assert bar.count == len(GROUPS)
    for found, group in zip(sums, response_logps(model, GROUPS), strict=True):
        assert found == pytest.approx([logps.sum().item() for logps in group], rel=1e-12)


@pytest.mark.parametrize("tokens, expected", [
    (1, [[0], [1], [2]]), (11, [[0], [1], [2]]), (13, [[0], [1, 2]]), (20, [[0, 1], [2]]), (24, [[0, 1, 2]]),
])  # fmt: skip
def test_chunks_hold_at_most_their_tokens(tokens, expected):
    """Groups of 11, 9 and 4 tokens, in order; one larger than the budget goes alone."""
    assert list(split_by_tokens([0, 1, 2], lambda i: [GROUPS[i]], tokens)) == expected


# ------------------------------------------------------------------------- dpo

def pairwise_dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
                 beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """dpo with one rejected response; every column is an argument of its own, (B,)."""
    return dpo(torch.stack((chosen, rejected), 1), torch.stack((ref_chosen, ref_rejected), 1), beta)


def test_dpo_by_hand():
    """beta 0.1: rewards 0.2 and -0.2, margin 0.4, loss ln(1 + e^-0.4); its mirror image; no difference."""
    chosen, rejected = torch.tensor([-10.0, -12.0, -5.0]), torch.tensor([-20.0, -18.0, -7.0])
    ref_chosen, ref_rejected = torch.tensor([-12.0, -10.0, -5.0]), torch.tensor([-18.0, -20.0, -7.0])
    loss, metrics = pairwise_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    torch.testing.assert_close(loss, torch.tensor([0.513015, 0.913015, 0.693147]), rtol=0, atol=1e-6)
    expected = {
        "loss": [0.513015, 0.913015, 0.693147], "margin": [0.4, -0.4, 0], "accuracy": [1, 0, 0],
        "reward_chosen": [0.2, -0.2, 0], "reward_rejected": [-0.2, 0.2, 0], "accuracy_chosen": [1, 0, 0],
        "accuracy_rejected": [1, 0, 0], "logp_chosen": [-10, -12, -5], "logp_rejected": [-20, -18, -7],
    }  # fmt: skip
    assert metrics.keys() == expected.keys() == METRICS
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], torch.tensor(value, dtype=torch.float32), rtol=0, atol=1e-6)


def random_columns(count: int = 16) -> list[Tensor]:
    """chosen, rejected, ref_chosen, ref_rejected in fp64, (count,) each."""
    rng = torch.Generator().manual_seed(0)
    return [-100 * torch.rand(count, generator=rng, dtype=torch.float64) for _ in range(4)]


def test_swapping_the_sides_flips_the_margin():
    """Exactly; and the two losses differ by the margin."""
    c, r, rc, rr = random_columns()
    loss, metrics = pairwise_dpo(c, r, rc, rr, 0.1)
    swapped, mirrored = pairwise_dpo(r, c, rr, rc, 0.1)
    assert torch.equal(metrics["margin"], -mirrored["margin"])
    torch.testing.assert_close(swapped - loss, 0.1 * (c - r - rc + rr))


def test_only_differences_count():
    """A constant added to a response's log-prob under both models changes nothing."""
    c, r, rc, rr = random_columns()
    shifted = pairwise_dpo(c + 7, r - 3, rc + 7, rr - 3, 0.1)[0]
    torch.testing.assert_close(shifted, pairwise_dpo(c, r, rc, rr, 0.1)[0])


def test_dpo_gradient_by_finite_differences():
    """In all four arguments; towards chosen up and rejected down."""
    columns = [column.requires_grad_() for column in random_columns(5)]
    assert torch.autograd.gradcheck(lambda *a: pairwise_dpo(*a, 0.1)[0], columns)
    pairwise_dpo(*columns, 0.1)[0].sum().backward()
    chosen, rejected = (column.grad for column in columns[:2])
    assert (chosen < 0).all() and torch.allclose(chosen, -rejected, rtol=1e-12)


def test_metrics_are_detached():
    """One fp32 number a pair, without a graph; the loss keeps its own."""
    loss, metrics = pairwise_dpo(*(t.requires_grad_() for t in random_columns(5)), 0.1)
    assert loss.shape == (5,) and loss.requires_grad
    for value in metrics.values():
        assert value.shape == (5,) and value.dtype == torch.float32 and not value.requires_grad


@pytest.mark.parametrize("loss_of", [infonce, sami])
def test_metrics_of_sets_are_detached(loss_of):
    """Kept until the step is read, they must not keep its graph."""
    _, metrics = loss_of(torch.randn(2, 3, 3, requires_grad=True))
    assert not any(value.requires_grad for value in metrics.values())


def test_dpo_stays_finite():
    """Margins of +-1e6 have losses of 0 and 1e6 and gradients of 0 and -1."""
    margin = torch.tensor([1e6, -1e6], requires_grad=True)
    loss, _ = pairwise_dpo(margin, *(torch.zeros(2),) * 3, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0, 1e6] and margin.grad.tolist() == [0, -1]


PAIRS = [([5, 6, 7], [8, 9, END], [10, END]), ([5, 6, 7], [11, END], [12, 13, 14, 15, END]),
         ([50], [17, END], [9, END, 4, END]), ([60, 61, 62, 63, 64], [END], [70, 71])]


def loss_and_gradient(models: tuple[Decoder, Decoder],
                      batches: list[list[list[int]]]) -> tuple[list[float], list[Tensor]]:
    """Each pair's loss and the policy's gradient of their sum. batches: one forward pass each, of groups of
    indices of PAIRS that share a prefix."""
    policy, reference = models
    policy.zero_grad()
    losses: dict[int, float] = {}
    for batch in batches:
        groups, order = [], []
        for indices in batch:
            prefix = PAIRS[indices[0]][0]
            groups.append((prefix, [response for i in indices for response in PAIRS[i][1:]]))
            order += indices
        logps = torch.stack([tokens.sum() for group in response_logps(policy, groups) for tokens in group])
        sums = [value for group in sequence_logps(reference, groups) for value in group]
        ref = torch.tensor(sums, dtype=logps.dtype)
        loss, _ = dpo(logps.view(-1, 2), ref.view(-1, 2), 0.3)
        loss.sum().backward()
        losses.update(zip(order, loss.tolist(), strict=True))
    return [losses[i] for i in sorted(losses)], [p.grad.clone() for p in policy.parameters()]


BATCHES = {
    "permuted": [[[2], [0], [3], [1]]],
    "split": [[[0]], [[1]], [[2]], [[3]]],
    "two_batches": [[[3], [1]], [[0], [2]]],
    "merged_prefix": [[[0, 1], [2], [3]]],
    "merged_and_split": [[[3]], [[2], [1, 0]]],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_gradients_do_not_depend_on_the_batch(models, batches):
    """Permuting, splitting and merging groups leaves the gradient of the summed loss where it was (fp64)."""
    losses, gradients = loss_and_gradient(models, [[[0], [1], [2], [3]]])
    other_losses, other_gradients = loss_and_gradient(models, batches)
    assert other_losses == pytest.approx(losses, rel=1e-10)
    for a, b in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


TRL_METRICS = {"margin": "rewards/margins", "accuracy": "rewards/accuracies",
               "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
               "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dpo_is_trl(oracle_folder, oracle, tmp_path):
    """TRL's sigmoid loss, metrics and gradient on a batch of unequal pairs, away from the reference."""
    reference_folder = write_model(tmp_path / "reference", seed=9, scale=0.2)
    reference = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(oracle_folder)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = DPOTrainer(
        model=oracle, ref_model=reference, processing_class=tokenizer,
        args=DPOConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, beta=0.3,
                       loss_type=["sigmoid"], disable_tqdm=True),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )  # fmt: skip
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS]
    batch = DataCollatorForPreference(pad_token_id=END)(rows)
    expected = trainer.compute_loss(trainer.model.train(), batch)
    expected.backward()

    model, groups = load(oracle_folder), [(p, [c, r]) for p, c, r in PAIRS]
    logps = torch.stack([torch.stack([tokens.sum() for tokens in group])
                         for group in response_logps(model, groups)])  # (B, 2)
    ref = torch.tensor(sequence_logps(load(reference_folder), groups))  # (B, 2)
    loss, metrics = dpo(logps, ref, beta=0.3)
    assert abs(loss.mean().item() - math.log(2)) > 0.05
    torch.testing.assert_close(loss.mean(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in TRL_METRICS.items():
        assert metrics[ours].mean().item() == pytest.approx(trainer._metrics["train"][theirs][0], abs=1e-4)
    loss.mean().backward()
    found = named_gradients(model)
    for name, gradient in named_gradients(oracle).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- sft

def test_sft_is_the_negative_log_likelihood():
    """-log p of each chosen response, its gradient -1, and metrics without a graph."""
    logps = torch.tensor([[-3.0], [-0.5]], requires_grad=True)
    loss, metrics = sft(logps)
    assert loss.tolist() == [3.0, 0.5]
    loss.sum().backward()
    assert logps.grad.tolist() == [[-1.0], [-1.0]]
    assert metrics.keys() == {"loss", "logp_chosen"}
    assert metrics["loss"].tolist() == [3.0, 0.5] and metrics["logp_chosen"].tolist() == [-3.0, -0.5]
    assert not any(value.requires_grad for value in metrics.values())
