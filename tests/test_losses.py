"""losses.py against full logits, transformers, TRL, finite differences and sums worked by hand."""

import copy
import math
import weakref

import datasets
import pytest
import torch
from conftest import random_model, write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import losses
from losses import common_prefix, dpo, response_logps, sequence_logps, split_by_tokens, token_logps
from model import load

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

N, E, V, EOS = 11, 6, 17, 1
METRICS = {"loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "accuracy_chosen",
           "accuracy_rejected", "logp_chosen", "logp_rejected"}


def inputs(dtype=torch.float64, scale: float = 1.0, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, E), weight (V, E), targets (n,)."""
    g = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(n, E, generator=g, dtype=torch.float64)
    weight = torch.randn(V, E, generator=g, dtype=torch.float64)
    return (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(),
            torch.randint(V, (n,), generator=g))


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, log-softmax, gather. (N,)"""
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


CHUNKS = {"one_column": N, "two_columns": 2 * N + 3, "uneven": 4 * N, "all": 10**6, "below_one_column": 1}


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunk(request, monkeypatch) -> int:
    """CHUNK, in logits."""
    monkeypatch.setitem(losses.CHUNK, "cpu", request.param)
    return request.param


# -------------------------------------------------------------------------------- token_logps

def test_token_logps_are_the_log_softmax(chunk):
    """Value and both gradients for every chunk size, with a different upstream gradient in each row."""
    ours, theirs = inputs(), inputs()
    a, b = token_logps(*ours), naive(*theirs)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    a.backward(upstream), b.backward(upstream)
    for x, y in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


def test_token_logps_gradcheck(chunk):
    """The hand-written backward agrees with finite differences."""
    assert torch.autograd.gradcheck(token_logps, inputs())


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen, monkeypatch):
    """The other side's gradient is what it was."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 3 * V)
    ours, theirs = inputs(), inputs()
    ours[frozen].requires_grad_(False)
    token_logps(*ours).square().sum().backward()
    naive(*theirs).square().sum().backward()
    assert ours[frozen].grad is None
    torch.testing.assert_close(ours[1 - frozen].grad, theirs[1 - frozen].grad)


def test_repeated_use_accumulates():
    """Two calls on one weight add their gradients; a call's own backward may run twice."""
    (h, w, t), (h2, w2, t2) = inputs(), inputs()
    total = token_logps(h[:4], w, t[:4]).sum() + token_logps(h[4:], w, t[4:]).sum()
    total.backward(retain_graph=True), total.backward()
    (2 * naive(h2, w2, t2).sum()).backward()
    torch.testing.assert_close(w.grad, w2.grad)
    torch.testing.assert_close(h.grad, h2.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(chunk, dtype):
    """Logits of +-1e4 and beyond: log-probs of 0 and of -1e4, finite gradients, no nan."""
    hidden = torch.tensor([[1e4], [-1e4], [1e4], [0.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype, requires_grad=True)
    logps = token_logps(hidden, weight, torch.tensor([0, 0, 2, 1]))
    expected = torch.tensor([0.0, -2e4, -5e3, -math.log(3)], dtype=dtype)
    torch.testing.assert_close(logps, expected)
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    torch.testing.assert_close(hidden.grad[:, 0], torch.tensor([0.0, 2.0, -0.5, -1 - 0.5 / 3], dtype=dtype))


def test_bf16_hidden_with_fp32_weight(chunk):
    """fp32 log-probs within bf16's rounding of the logits; gradients in each side's own type, within 1 %."""
    h, w, t = inputs(torch.float32, scale=2.0, n=200)
    hidden = h.detach().bfloat16().requires_grad_()
    logps = token_logps(hidden, w, t)
    assert logps.dtype == torch.float32
    exact_h = hidden.detach().double().requires_grad_()
    exact_w = w.detach().bfloat16().double().requires_grad_()
    expected = naive(exact_h, exact_w, t)
    largest = (exact_h @ exact_w.T).abs().max().item()
    assert 0 < (logps - expected).abs().max() < 2 * 2**-8 * largest
    upstream = torch.linspace(0, 2, 200)
    logps.backward(upstream), expected.backward(upstream.double())
    assert hidden.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    for got, want in ((hidden.grad, exact_h.grad), (w.grad, exact_w.grad)):
        assert torch.linalg.vector_norm(got - want) < 0.01 * torch.linalg.vector_norm(want)


def test_weight_gradients_add_up_in_fp32(monkeypatch):
    """A thousand equal rows: bf16 sums would stand still after a few hundred."""
    monkeypatch.setitem(losses.CHUNK, "cpu", V)
    weight = torch.zeros(V, E, requires_grad=True)
    token_logps(torch.ones(1000, E).bfloat16(), weight, torch.zeros(1000, dtype=torch.long)).sum().backward()
    expected = torch.full((V, E), -1000 / V)
    expected[0] += 1000
    torch.testing.assert_close(weight.grad, expected, rtol=0.01, atol=0)


class Logits(TorchDispatchMode):
    """Watches blocks of logits, (rows, columns): the `largest` made, the most `alive` at a time."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.largest, self.alive, self.made = rows, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shape = out.shape if isinstance(out, Tensor) else ()
        if len(shape) == 2 and shape[0] == self.rows and shape[1] not in (1, E):
            self.largest = max(self.largest, out.numel())
            self.made.append(weakref.ref(out))
        alive = [t for r in self.made if (t := r()) is not None]
        self.alive = max(self.alive, sum({t.data_ptr(): t.numel() for t in alive}.values()))
        return out


@pytest.mark.parametrize("n", [3, 10, 100])
@pytest.mark.parametrize("columns", [2, 5])
def test_logits_exist_a_block_at_a_time(columns, n, monkeypatch):
    """No more than CHUNK logits are ever made at once, and the last block is all that outlives its turn."""
    monkeypatch.setitem(losses.CHUNK, "cpu", columns * n + 1)
    hidden, weight, targets = inputs(n=n)
    with Logits(n) as forward:
        logps = token_logps(hidden, weight, targets)
    with Logits(n) as backward:
        logps.sum().backward()
    for watched in (forward, backward):
        assert watched.largest == columns * n
        assert watched.alive <= 3 * columns * n


# -------------------------------------------------------------------------------- score

GROUPS = [
    ([5, 6, 7, 8], [[9, 10, 11, EOS], [12, EOS], [EOS]]),
    ([20], [[21, 22, 23], [EOS, 30, EOS, EOS, 31]]),
    ([40, EOS, 41], [[42]]),
]
ROOTED = {  # what all prefixes begin with, and the groups
    "two_of_each": (2, [([5, 6, 7, 8], [[9, 10, EOS], [12, EOS]]), ([5, 6, 9], [[9, 13]]),
                        ([5, 6, 7], [[8]])]),
    "one_goes_on": (2, [([5, 6, 7], [[7, 8], [EOS]]), ([5, 6, 7, 7, 7], [[7], [7, 7, 8]])]),
    "all_the_same": (3, [([5, 6, 7, 8], [[9, EOS]]), ([5, 6, 7, 8], [[9, 10], [EOS]])]),
    "one_token": (0, [([5], [[6, 7], [EOS]]), ([5], [[8, 9]])]),
    "alone": (0, [([5, 6, 7], [[8, 9]])]),
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def oracle_folder(tmp_path_factory, request):
    """A tiny Llama whose pad token is its end token."""
    return write_model(tmp_path_factory.mktemp("oracle"), pad_token_id=EOS, scale=0.2,
                       tie_word_embeddings=request.param)


@pytest.fixture()
def oracle(oracle_folder):
    """transformers' model of it; padding_idx would take the end token's gradient away."""
    model = AutoModelForCausalLM.from_pretrained(oracle_folder, dtype=torch.float32)
    model.model.embed_tokens.padding_idx = None
    return model


@pytest.fixture(scope="module")
def exact():
    """A tiny model in fp64, and another one to be its reference."""
    models = [random_model(seed=s, scale=0.2).double() for s in (0, 1)]
    for model in models:
        model.compute = torch.float64
    return models


def alone(oracle, prefix: list[int], response: list[int]) -> Tensor:
    """transformers' log-probs of one response, from the full logits of its own sequence. (R,)"""
    ids = torch.tensor(prefix + response)
    logps = oracle(ids[None]).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[1:, None])[len(prefix) - 1 :, 0]


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("groups", [GROUPS, *(groups for _, groups in ROOTED.values())],
                         ids=["no_root", *ROOTED])
def test_score_is_each_sequence_alone(oracle_folder, oracle, groups):
    """Values and all gradients are those of transformers' full logits, one sequence at a time."""
    model = load(oracle_folder)
    scored = response_logps(model, groups)
    assert [[len(lp) for lp in group] for group in scored] == [[len(r) for r in rs] for _, rs in groups]
    ours = [lp for group in scored for lp in group]
    theirs = [alone(oracle, p, r) for p, rs in groups for r in rs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for lps in (ours, theirs):
        sum((i + 1) * (lp * torch.arange(1, len(lp) + 1)).sum() for i, lp in enumerate(lps)).backward()
    got, want = gradients(model), gradients(oracle)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-4, msg=name)  # of up to 200


@pytest.mark.parametrize("root, groups", ROOTED.values(), ids=ROOTED)
def test_what_all_prefixes_begin_with_is_fed_once(exact, root, groups):
    """The model sees the root once, the rest of every prefix, and each response but for its last token."""
    model, fed = exact[0], []
    with model.register_forward_pre_hook(lambda _, args: fed.append(args[0].tolist())):
        response_logps(model, groups)
    expected = groups[0][0][:root]
    for prefix, responses in groups:
        expected = expected + prefix[root:] + [t for r in responses for t in r[:-1]]
    assert fed == [expected] and common_prefix([prefix for prefix, _ in groups]) == root


def test_a_shared_root_makes_room_in_a_batch():
    """Of two groups of 8 tokens that share 5 a batch counts 3 each; with a third that shares 2, 6 each."""
    a, b, c = (([1, 2, *rest], [[7, 8]]) for rest in ([3, 4, 5, 5], [3, 4, 5, 6], [9, 9, 9, 9]))
    for tokens, expected in ((5, [[0], [1], [2]]), (6, [[0, 1], [2]]), (17, [[0, 1], [2]]),
                             (18, [[0, 1, 2]])):
        assert list(split_by_tokens([a, b, c], tokens)) == expected


def test_the_end_token_counts(oracle_folder, oracle):
    """The last log-prob of a response is its end token's, although padding would be the same id."""
    assert oracle.config.pad_token_id == EOS
    (with_end, without), = response_logps(load(oracle_folder), [([5, 6], [[7, 8, EOS], [7, 8]])])
    expected = oracle(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].log_softmax(-1)[EOS]
    assert len(with_end) == 3
    torch.testing.assert_close(with_end[-1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(with_end[:-1], without)


@pytest.mark.parametrize("given", [GROUPS, ROOTED["two_of_each"][1]], ids=["no_root", "root"])
def test_score_leaves_its_groups_alone(exact, given):
    """Ids go in and come out as they were."""
    groups = copy.deepcopy(given)
    response_logps(exact[0], groups)
    assert groups == given


def test_a_tied_gradient_by_the_long_way(exact):
    """Hidden states and then the head give the gradients of the head read inside the forward pass."""
    model, targets = exact[0], torch.tensor([6, 7, 8])
    grads = []
    for inside in (True, False):
        model.zero_grad()
        layout, ids = model.pack([(3, [])]), torch.tensor([5, 6, 7])
        if inside:
            logps = model(ids, layout, lambda hidden, head: token_logps(hidden, head, targets))
        else:
            logps = token_logps(model(ids, layout), model.head, targets)
        logps.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [
    [([5], [[]])], [([5], [[6], []])], [([], [[6]])], [([5], [[6]]), ([7], [[8, 9], []])],
])  # fmt: skip
def test_nothing_has_no_log_probability(exact, groups):
    """An empty response or prefix raises instead of scoring 0."""
    with pytest.raises(ValueError, match="without tokens"):
        response_logps(exact[0], groups)


@pytest.mark.parametrize("tokens", [1, 10, 17, 18, 30, 4096])
def test_sequence_logps_are_sums_of_score(exact, tokens):
    """Whatever the token budget, in the groups' order and without a graph."""
    model, graphs = exact[0], []
    with exact[0].register_forward_hook(lambda _, args, hidden: graphs.append(hidden.requires_grad)):
        got = sequence_logps(model, GROUPS, tokens)
    assert not any(graphs) and len(graphs) == len(list(split_by_tokens(GROUPS, tokens)))
    expected = [[lp.sum().item() for lp in group] for group in response_logps(model, GROUPS)]
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("tokens, expected", [
    (1, [[0], [1], [2]]), (11, [[0], [1], [2]]), (13, [[0], [1, 2]]), (20, [[0, 1], [2]]), (24, [[0, 1, 2]]),
])  # fmt: skip
def test_batches_hold_at_most_their_tokens(tokens, expected):
    """Groups of 11, 9 and 4 tokens, in order; one larger than the budget goes alone."""
    assert list(split_by_tokens(GROUPS, tokens)) == expected


# -------------------------------------------------------------------------------- dpo

def one_negative(chosen, rejected, ref_chosen, ref_rejected, beta):
    """dpo's columns, one tensor each."""
    return dpo(torch.stack((chosen, rejected), 1), torch.stack((ref_chosen, ref_rejected), 1), beta)


def test_dpo_by_hand():
    """beta 0.1: rewards 0.2 and -0.2, margin 0.4, loss ln(1 + e^-0.4); its mirror image; no difference."""
    lp = [torch.tensor(x) for x in ([-10.0, -12.0, -5.0], [-20.0, -18.0, -7.0], [-12.0, -10.0, -5.0],
                                    [-18.0, -20.0, -7.0])]
    loss, metrics = one_negative(*lp, beta=0.1)
    torch.testing.assert_close(loss, torch.tensor([0.513015, 0.913015, 0.693147]), rtol=0, atol=1e-6)
    expected = {
        "loss": [0.513015, 0.913015, 0.693147], "margin": [0.4, -0.4, 0], "accuracy": [1, 0, 0],
        "reward_chosen": [0.2, -0.2, 0], "reward_rejected": [-0.2, 0.2, 0], "accuracy_chosen": [1, 0, 0],
        "accuracy_rejected": [1, 0, 0], "logp_chosen": [-10, -12, -5], "logp_rejected": [-20, -18, -7],
    }  # fmt: skip
    assert metrics.keys() == expected.keys() == METRICS
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], torch.tensor(value, dtype=torch.float32), rtol=0, atol=1e-6)


def four(b: int = 16, seed: int = 0) -> list[Tensor]:
    """chosen, rejected, ref_chosen, ref_rejected in fp64, (b,) each."""
    g = torch.Generator().manual_seed(seed)
    return [-100 * torch.rand(b, generator=g, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_at_the_reference(beta):
    """pi = pi_ref: ln 2 and margins of exactly 0."""
    chosen, rejected, *_ = four()
    loss, metrics = one_negative(chosen, rejected, chosen, rejected, beta)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    assert not metrics["margin"].any() and not metrics["accuracy"].any()


def test_swapping_the_sides_flips_the_margin():
    """Exactly; and the two losses differ by the margin."""
    c, r, rc, rr = four()
    (loss, metrics), (swapped, mirrored) = (one_negative(*x, 0.1) for x in ((c, r, rc, rr), (r, c, rr, rc)))
    assert torch.equal(metrics["margin"], -mirrored["margin"])
    torch.testing.assert_close(swapped - loss, 0.1 * (c - r - rc + rr))


def test_only_differences_count():
    """A constant added to a response's log-prob under both models changes nothing."""
    c, r, rc, rr = four()
    shifted = one_negative(c + 7, r - 3, rc + 7, rr - 3, 0.1)[0]
    torch.testing.assert_close(shifted, one_negative(c, r, rc, rr, 0.1)[0])


def test_dpo_gradient_by_finite_differences():
    """In all four arguments; towards chosen up and rejected down."""
    args = [t.requires_grad_() for t in four(5)]
    assert torch.autograd.gradcheck(lambda *a: one_negative(*a, 0.1)[0], args)
    one_negative(*args, 0.1)[0].sum().backward()
    assert (args[0].grad < 0).all() and torch.allclose(args[0].grad, -args[1].grad, rtol=1e-12)


def test_metrics_are_detached():
    """One fp32 number a pair, without a graph; the loss keeps its own."""
    loss, metrics = one_negative(*(t.requires_grad_() for t in four(5)), 0.1)
    assert loss.shape == (5,) and loss.requires_grad
    for value in metrics.values():
        assert value.shape == (5,) and value.dtype == torch.float32 and not value.requires_grad


def test_dpo_stays_finite():
    """Margins of +-1e6 have losses of 0 and 1e6 and gradients of 0 and -1."""
    margin = torch.tensor([1e6, -1e6], requires_grad=True)
    loss, _ = one_negative(margin, *(torch.zeros(2),) * 3, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0, 1e6] and margin.grad.tolist() == [0, -1]


PAIRS = [([5, 6, 7], [8, 9, EOS], [10, EOS]), ([5, 6, 7], [11, EOS], [12, 13, 14, 15, EOS]),
         ([50], [17, EOS], [9, EOS, 4, EOS]), ([60, 61, 62, 63, 64], [EOS], [70, 71])]


def loss_gradient(models, pack) -> tuple[list[float], list[Tensor]]:
    """Each pair's loss and the policy's gradient of their sum, with pairs packed as `pack` says.

    pack: batches of groups of pair indices that share a prefix.
    """
    policy, reference = models
    policy.zero_grad()
    each = {}
    for batch in pack:
        groups = [(PAIRS[pairs[0]][0], [r for i in pairs for r in PAIRS[i][1:]]) for pairs in batch]
        order = [i for pairs in batch for i in pairs]
        lp = torch.stack([t.sum() for group in response_logps(policy, groups) for t in group])
        ref = torch.tensor([x for group in sequence_logps(reference, groups) for x in group], dtype=lp.dtype)
        loss, _ = dpo(lp.view(-1, 2), ref.view(-1, 2), 0.3)
        loss.sum().backward()
        each.update(zip(order, loss.tolist(), strict=True))
    return [each[i] for i in sorted(each)], [p.grad.clone() for p in policy.parameters()]


PACKS = {
    "permuted": [[[2], [0], [3], [1]]],
    "split": [[[0]], [[1]], [[2]], [[3]]],
    "two_batches": [[[3], [1]], [[0], [2]]],
    "merged_prefix": [[[0, 1], [2], [3]]],
    "merged_and_split": [[[3]], [[2], [1, 0]]],
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_gradients_do_not_depend_on_the_batch(exact, pack):
    """Permuting, splitting and merging groups leaves the gradient of the summed loss where it was (fp64)."""
    each, grads = loss_gradient(exact, [[[0], [1], [2], [3]]])
    others, other_grads = loss_gradient(exact, pack)
    assert others == pytest.approx(each, rel=1e-10)
    for a, b in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


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
    expected = trainer.compute_loss(trainer.model.train(), DataCollatorForPreference(pad_token_id=EOS)(rows))
    expected.backward()

    model, groups = load(oracle_folder), [(p, [c, r]) for p, c, r in PAIRS]
    logps = torch.stack([torch.stack([t.sum() for t in group]) for group in response_logps(model, groups)])
    ref = torch.tensor(sequence_logps(load(reference_folder), groups))
    loss, metrics = dpo(logps, ref, beta=0.3)
    assert abs(loss.mean().item() - math.log(2)) > 0.05
    torch.testing.assert_close(loss.mean(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in {"margin": "rewards/margins", "accuracy": "rewards/accuracies",
                         "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
                         "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}.items():
        assert metrics[ours].mean().item() == pytest.approx(trainer._metrics["train"][theirs][0], abs=1e-4)
    loss.mean().backward()
    got, want = gradients(model), gradients(oracle)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)
