"""assets/tiny, the embedded model, which a newcomer meets first."""

import torch
from conftest import ROOT, sequence_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from folder import find, load
from tokenizer import Tokenizer

TINY = ROOT / "assets" / "tiny"


def test_it_is_called_tiny():
    """From any folder."""
    assert find("tiny") == TINY


def test_it_is_small():
    """At most 3M parameters and 6 MB."""
    assert sum(p.numel() for p in load(TINY).parameters()) <= 3_000_000
    assert (TINY / "model.safetensors").stat().st_size <= 6_000_000


@torch.no_grad()
def test_it_is_an_ordinary_folder():
    """transformers opens it, to equal logits and equal prompts."""
    oracle = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer, message = Tokenizer(TINY), "How do I keep bread fresh? I love gardening."
    expected = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        [dict(role="user", content=message)], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(tokenizer.chat(message))
    assert tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == expected
    logits = sequence_logits(load(TINY), ids)
    torch.testing.assert_close(logits, oracle(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
