"""Floating-point tensors without numbers beside integers with them."""

import pytest
import torch
import torch.nn.functional as F

from tools.dryrun.shapes_only import ShapesOnly


def test_shapes_are_those_of_torch() -> None:
    """A block of attention, gather and loss: the same shapes, dtypes and gradients' shapes."""

    def run() -> tuple[list, torch.Tensor]:
        torch.manual_seed(0)
        lengths = torch.tensor([3, 5])
        table = torch.randn(11, 8, requires_grad=True)
        weight = torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True)
        rows = table[torch.arange(8).repeat_interleave(torch.ones(8, dtype=torch.int64))]
        mixed = F.rms_norm(rows, (8,)).to(torch.bfloat16) @ weight
        parts = mixed.split(lengths.tolist())
        attended = [F.scaled_dot_product_attention(p[None], p[None], p[None]) for p in parts]
        out = torch.cat(attended, 1)[0]
        kept = out[torch.arange(8) % 2 == 0]
        out.sum().backward()
        assert table.grad is not None and weight.grad is not None
        tensors = [rows, mixed, *parts, out, kept, table.grad, weight.grad]
        return [(t.shape, t.dtype, t.stride()) for t in tensors], lengths.cumsum(0)

    expected, ends = run()
    with ShapesOnly():
        seen, foreseen_ends = run()
    assert seen == expected
    assert torch.equal(foreseen_ends, ends)  # integers are computed


def test_takes_no_memory() -> None:
    with ShapesOnly():
        weight = torch.empty(1 << 20, 1 << 20)
        product = weight @ torch.zeros(1 << 20, 1 << 20)
    assert product.is_meta and product.shape == (1 << 20, 1 << 20)


def test_says_where_a_number_was_asked_for() -> None:
    numbers = ShapesOnly()
    with numbers:
        assert torch.randn(3).sum().item() == 1.0
        assert torch.randn(2).tolist() == [1.0, 1.0]
        assert not bool((torch.randn(3) > 0).any())
    assert sum(numbers.asked.values()) == 3
    assert all("test_shapes_only.py" in place for place in numbers.asked)


def test_refuses_a_shape_that_depends_on_numbers() -> None:
    with ShapesOnly(), pytest.raises(ValueError, match="how large its result is"):
        (torch.randn(5) > 0).nonzero()


def test_a_shape_that_does_not_fit_is_torchs_own_error() -> None:
    with ShapesOnly(), pytest.raises(RuntimeError, match="must have same reduction dim"):
        torch.randn(3, 4) @ torch.randn(5, 6)
