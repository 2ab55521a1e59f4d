"""The Triton kernels of losses.py: on a GPU as they are, elsewhere under Triton's interpreter, against fp64.

The interpreter shows that the arithmetic and the addresses are right, not that a GPU's races and limits are.
Triton 3.6's needs a NumPy before 2.4.
"""

import pytest
import torch

import losses
from fast import kernel_backward, kernel_forward
from losses import plain_backward, plain_forward, token_logps

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def inputs(rows: int, columns: int, dtype=torch.float32, scale: float = 3.0):
    """Logits (rows, columns), targets of which some lie outside the block, upstream gradients (rows,)."""
    g = torch.Generator().manual_seed(rows * columns)
    logits = (scale * torch.randn(rows, columns, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(-columns // 2, columns + columns // 2 + 1, (rows,), generator=g).to(DEVICE)
    targets[:3] = torch.tensor([columns - 1, -1, columns])[:rows]
    return logits, targets, torch.randn(rows, generator=g).to(DEVICE)


def exact(logits: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor):
    """Log-sum-exp, the target's logit or 0, and the gradient of picked - lse, row by row in fp64."""
    x = logits.double().requires_grad_()
    lse = x.logsumexp(-1)
    picked = torch.stack([row[t] if 0 <= t < len(row) else row.new_zeros(()) for row, t in
                          zip(x, targets.tolist(), strict=True)])
    ((picked - lse) * grad).sum().backward()
    return lse.detach(), picked.detach(), x.grad


@pytest.mark.parametrize("columns", [1, 7, 64, 1000, 4099])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernels_are_the_log_softmax_and_its_gradient(rows, columns, dtype):
    logits, targets, grad = inputs(rows, columns, dtype)
    lse, picked, d = exact(logits, targets, grad)
    ours = kernel_forward(logits, targets)
    torch.testing.assert_close(ours[0].double(), lse, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours[1].double(), picked)
    back = kernel_backward(logits, targets, ours[0], grad)
    assert back.dtype == dtype and back.data_ptr() != logits.data_ptr()
    torch.testing.assert_close(back.double(), d, rtol=TYPES[dtype], atol=TYPES[dtype])


def test_the_torch_path_is_the_same_function():
    """plain_forward and plain_backward give what the kernels give."""
    logits, targets, grad = inputs(9, 300)
    for a, b in zip(kernel_forward(logits, targets), plain_forward(logits, targets), strict=True):
        torch.testing.assert_close(a, b)
    lse = logits.logsumexp(-1) + 0.5  # of other blocks too
    torch.testing.assert_close(kernel_backward(logits, targets, lse, grad),
                               plain_backward(logits, targets, lse, grad))


def test_the_running_maximum_crosses_blocks():
    """A vocabulary of several kernel blocks that is no power of two; the maximum comes late, then early."""
    logits = torch.linspace(-200, 200, 20_001, device=DEVICE).expand(2, -1).contiguous()
    logits[1] = logits[1].flip(0)
    targets = torch.tensor([20_000, 3], device=DEVICE)
    lse, picked, d = exact(logits, targets, torch.ones(2, device=DEVICE))
    ours = kernel_forward(logits, targets)
    torch.testing.assert_close(ours[0].double(), lse)
    torch.testing.assert_close(ours[1].double(), picked)
    back = kernel_backward(logits, targets, ours[0], torch.ones(2, device=DEVICE))
    torch.testing.assert_close(back.double(), d, rtol=1e-4, atol=1e-5)


def test_extreme_logits():
    """Logits of +-1e4, rows of one value, a first block of minus infinity alone: all finite and right."""
    logits = torch.full((4, 9000), -1e4, device=DEVICE)
    logits[0, 17], logits[1] = 1e4, 0.0
    logits[2, :8192] = float("-inf")
    logits[3, 1::2] = float("-inf")
    targets = torch.tensor([17, 5, 8500, 0], device=DEVICE)
    lse, _ = kernel_forward(logits, targets)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1))
    d = kernel_backward(logits, targets, lse, torch.ones(4, device=DEVICE))
    assert d.isfinite().all() and (d.double().sum(-1).abs() < 1e-3).all()


def test_offsets_beyond_two_to_the_31():
    """A third row that begins 2^31 numbers after the first: on a GPU a 32-bit offset would read elsewhere
    (the interpreter's integers do not wrap, so there this shows only that such strides are taken)."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)  # mostly never touched
    logits = storage.as_strided((3, 50), (2**30 + 1024, 1))
    logits.copy_(torch.randn(3, 50))
    targets, grad = torch.tensor([3, 4, 5], device=DEVICE), torch.tensor([1.0, -2.0, 3.0], device=DEVICE)
    lse, picked = kernel_forward(logits, targets)
    torch.testing.assert_close(lse, logits.float().logsumexp(-1))
    assert picked.tolist() == [logits[i, t].item() for i, t in enumerate(targets.tolist())]
    torch.testing.assert_close(kernel_backward(logits, targets, lse, grad),
                               plain_backward(logits, targets, lse, grad))


@pytest.mark.parametrize("n", [1, 5])
def test_the_head_over_the_kernels(n, monkeypatch):
    """token_logps through the kernels, several blocks of the vocabulary: value and both gradients."""
    monkeypatch.setattr(losses, "_on_gpu", lambda x: True)
    monkeypatch.setitem(losses.CHUNK, DEVICE, 40 * n)
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(n, 8, generator=g), torch.randn(130, 8, generator=g)]
    targets = torch.randint(130, (n,), generator=g).to(DEVICE)
    ours, theirs = ([x.to(DEVICE, t, copy=True).requires_grad_() for x in made]
                    for t in (torch.float32, torch.float64))
    a = token_logps(*ours, targets)
    b = (theirs[0] @ theirs[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, n, device=DEVICE)
    (a * weights).sum().backward(), (b * weights).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)
