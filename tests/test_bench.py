"""bench/: the count of floating-point operations, by hand and as torch counts them; the heads' common ground.
"""

import sys

import pytest
import torch
from conftest import ROOT, random_model
from torch.utils.flop_counter import FlopCounterMode

from losses import response_logps

sys.path.insert(0, str(ROOT / "bench"))

import head
from side_by_side import flops


@pytest.mark.parametrize(("groups", "fed", "seen", "predicted"), [
    ([([5, 6, 7], [[8, 9], [10]])], 3 + 1, 4.5 + 3.5, 3),
    ([([5, 6, 7], [[8, 9], [10]]), ([5, 6, 8, 9], [[7], [11, 12, 13]])],
     2 + 1 + 1 + 2 + 2, 2 + 2.5 + 3.5 + 6 + 10, 7),
], ids=["alone", "sharing"])  # fmt: skip
def test_flops_are_those_that_run(groups, fed, seen, predicted):
    """Counted by hand; and for the products with weights as torch counts a forward and backward pass, but for
    the logits that backward makes again."""
    model = random_model()
    config = model.config
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer
    head = config.vocab_size * config.hidden_size * predicted
    attention = 2 * config.num_hidden_layers * width * seen
    assert flops(config, groups) == 6 * (weights * fed + head + attention)
    with FlopCounterMode(display=False) as counter:
        logps = [each.sum() for responses in response_logps(model, groups) for each in responses]
        torch.stack(logps).sum().backward()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 6 * weights * fed + 8 * head


def test_the_exact_log_probs_are_those_of_all_logits():
    """Of a vocabulary that is cut into three slices, without a whole copy of the weight in fp64."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=rng).bfloat16() for n in (5, 600))
    targets = torch.tensor([0, 599, 255, 256, 511])
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(head.exact_logps(hidden, weight, targets), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif("torch" not in head.available(), reason="needs torch 2.13")
def test_torchs_head_runs_in_chunks(monkeypatch):
    """Without options it makes all logits at once, which is another head of the table."""
    given = []
    plain = torch.nn.functional.linear_cross_entropy
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy",
                        lambda *args, **options: given.append(options["options"]) or plain(*args, **options))
    result = head.run_head(head.HEADS["torch"], 80, 16, 300, torch.device("cpu"))
    assert result["error"] < 0.1 and result["seconds"] > 0
    assert all(isinstance(options, torch.nn.LinearCrossEntropyOptions) for options in given) and given
