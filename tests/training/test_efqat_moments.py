"""EfQAT: what Adam knows of a kernel's rows after another choice of them."""

import torch
from torch import Tensor

from qft_plugin.training.efqat import (
    carried,
    exchange,
)
from qft_plugin.training.held import Held


def held_rows(trained: list[bool], rows: Tensor | None = None) -> Held:
    mask = torch.tensor(trained)
    index = mask.nonzero().flatten()
    rows = torch.randn(len(index), 3) if rows is None else rows
    return Held(torch.zeros(len(trained), 3), mask, index, index, rows.requires_grad_())


def state_of(rows: int) -> dict[str, Tensor]:
    return {"step": torch.tensor(500.0), "exp_avg": torch.randn(rows, 3), "exp_avg_sq": torch.rand(rows, 3) + 1}


def test_moments_follow_their_rows() -> None:
    """Rows that stay keep both moments; a new one has a first moment of 0 and the mean of the others' second one."""
    before, after = held_rows([True, False, True, True]), held_rows([False, True, True, True])
    state = state_of(3)
    found = carried(state, before, after)
    assert float(found["step"]) == 500
    assert torch.equal(found["exp_avg"][1:], state["exp_avg"][1:])
    assert torch.equal(found["exp_avg_sq"][1:], state["exp_avg_sq"][1:])
    assert not found["exp_avg"][0].any()
    torch.testing.assert_close(found["exp_avg_sq"][0], state["exp_avg_sq"][1:].mean(0))


def test_moments_where_no_row_stays() -> None:
    """Then new rows start from the mean second moment of those that leave."""
    before, after = held_rows([True, True, False, False]), held_rows([False, False, False, True])
    state = state_of(2)
    found = carried(state, before, after)
    torch.testing.assert_close(found["exp_avg_sq"], state["exp_avg_sq"].mean(0, keepdim=True))
    assert not found["exp_avg"].any()


def test_moments_lie_in_memory_like_their_rows() -> None:
    """The fused Adam walks through memory: of rows with channels last, every moment has the channels last."""
    before, after = held_rows([True, False, True]), held_rows([False, True, True])
    shape = (2, 3, 2, 2)
    for held in (before, after):
        held.rows = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    moment = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    found = carried({"step": torch.tensor(9.0), "exp_avg": moment, "exp_avg_sq": moment + 1}, before, after)
    assert found["exp_avg"].stride() == found["exp_avg_sq"].stride() == after.rows.stride()
    torch.testing.assert_close(found["exp_avg_sq"][1], moment[1] + 1)


def test_a_new_row_does_not_jump() -> None:
    """After many steps a new row with gradients like the others' moves by about the learning rate, not by three."""
    before = held_rows([True, True, True, False])
    optimizer = torch.optim.Adam([{"params": [before.rows], "lr": 0.01}], fused=True)
    generator = torch.Generator().manual_seed(0)

    def step(rows: Tensor) -> Tensor:
        start = rows.detach().clone()
        rows.grad = torch.randn(rows.shape, generator=generator)
        optimizer.step()
        return (rows.detach() - start).abs()

    for _ in range(300):
        step(before.rows)
    after = held_rows([False, True, True, True])
    exchange(optimizer, {"w": before}, {"w": after})
    moves = torch.stack([step(after.rows)[2] for _ in range(10)])
    assert float(moves.max()) < 0.015
    assert float(moves[-1].mean()) > 0
