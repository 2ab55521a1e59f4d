"""Decoder.checkpoint_activations: the same gradients, to the last bit, from fewer tensors that are kept."""

import pytest
import torch
from conftest import ROOT, kept_bytes, named_gradients, random_model, random_pairs
from torch import Tensor

from folder import load
from losses import response_logps
from model import Decoder, Packed


def gradients(model: Decoder, checkpoint: bool, count: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed log-prob of some pairs' responses, and its gradients, with activations kept or not."""
    model.checkpoint_activations = checkpoint
    groups = [(pair.prompt_ids, [response.ids for response in pair.responses])
              for pair in random_pairs(count, rejected=2)]
    model.zero_grad()
    total = sum(logps.sum() for responses in response_logps(model, groups) for logps in responses)
    total.backward()
    return total.detach(), named_gradients(model)


def small(**changes) -> Decoder:
    return random_model(num_hidden_layers=3, **changes)


MODELS = dict(
    llama=small,
    qwen2=lambda: small(model_type="qwen2"),
    qwen3=lambda: small(model_type="qwen3", tie_word_embeddings=False),
    embedded=lambda: load(ROOT / "assets" / "tiny"),
)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_to_the_last_bit(name):
    """In fp32, of every parameter, and so are the log-probs."""
    model = MODELS[name]()
    plain, checkpointed = (gradients(model, checkpoint) for checkpoint in (False, True))
    assert torch.equal(plain[0], checkpointed[0])
    for parameter, gradient in plain[1].items():
        assert gradient.any() and torch.equal(gradient, checkpointed[1][parameter]), parameter


def test_in_bf16_too():
    """Whose products this CPU may compute by kernels of their own."""
    model = small().to(torch.bfloat16)
    plain, checkpointed = (gradients(model, checkpoint, 1) for checkpoint in (False, True))
    assert all(torch.equal(plain[1][name], checkpointed[1][name]) for name in plain[1])


def test_it_is_off_by_default():
    """A model as it is made or loaded keeps its activations."""
    assert not random_model().checkpoint_activations


def test_of_every_block_only_its_input_is_kept():
    """T tokens of E numbers for each block, and what the tables of angles and the last norm keep."""
    model, ids = small(), torch.arange(2, 42)
    layout = Packed([(len(ids), [])])
    model.checkpoint_activations = True
    checkpointed = kept_bytes(model, lambda: model(ids, layout))
    hidden = 4 * len(ids) * model.config.hidden_size
    blocks = model.config.num_hidden_layers
    tables = 2 * 4 * len(ids) * model.config.head_dim
    last_norm = hidden + 4 * len(ids)
    assert checkpointed == blocks * hidden + tables + last_norm + ids.nbytes
    model.checkpoint_activations = False
    assert kept_bytes(model, lambda: model(ids, layout)) > 5 * checkpointed


def test_without_gradients_nothing_is_wrapped(monkeypatch):
    """Sampling and scoring call the blocks themselves: a CUDA graph could not hold a checkpoint."""
    monkeypatch.setattr("model.checkpoint", None)
    model = small()
    model.checkpoint_activations = True
    layout = Packed([(3, [])])
    with torch.no_grad():
        model(torch.tensor([2, 3, 4]), layout)
    with pytest.raises(TypeError):
        model(torch.tensor([2, 3, 4]), layout)
