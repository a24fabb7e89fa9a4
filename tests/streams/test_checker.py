"""The stand-in device's checker finds what it is there for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.streams import device
from tests.streams.group import RecordingGroup


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=device.NAME)


def current() -> torch.Stream:
    return torch.accelerator.current_stream()


# ---- what must be found --------------------------------------------------------------------------
# A program returns what is to be freed only after the findings were read.


def read_without_event() -> object:
    x = ones(3)
    with device.stream("side"):
        x + 1
    return x


def write_without_event() -> None:
    x = ones(3)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x + 1
    x.zero_()
    current().wait_stream(side)


def event_that_comes_too_early() -> object:
    side, event = device.stream("side"), torch.Event(device.NAME)
    event.record()
    x = ones(3)
    side.wait_event(event)
    with side:
        x + 1
    return x


def result_used_before_the_end() -> object:
    group, x = RecordingGroup(), ones(3)
    work = group.allreduce(x)
    x + 1
    work.wait()
    return x


def launched_over_another_stream() -> object:
    """A collective waits for the stream that it is called on, not for the tensor."""
    group, x, side = RecordingGroup(), ones(3), device.stream("side")
    side.wait_stream(current())
    with side:
        x.zero_()
    group.allreduce(x).wait()
    return x


def overlapping_part() -> None:
    x = ones(8)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x[:5].zero_()
    x[4:].zero_()
    current().wait_stream(side)


def list_written_in_place() -> object:
    grads = [ones(2), ones(3)]
    scalars = torch.zeros(1, device=device.NAME), ones(1)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, *scalars)
    return grads, scalars, grads[1] + 1


def read_of_nothing() -> None:
    torch.empty(3, device=device.NAME) + 1


def read_of_the_unwritten_half() -> None:
    x = torch.empty(8, device=device.NAME)
    x[:4].zero_()
    x[:6] + 1


def freed_in_use() -> None:
    x = ones(3)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x + 1
    del x


def told_the_wrong_stream() -> None:
    x = ones(3)
    side, other = device.stream("side"), device.stream("other")
    side.wait_stream(current())
    with side:
        x + 1
    x.record_stream(other)
    del x


FOUND: dict[Callable[[], object], tuple[str, ...]] = {
    read_without_event: ("race", "aten::add.out on side", "aten::fill_.Scalar on the default"),
    write_without_event: ("race", "write by aten::zero_ on the default stream", "add.out on side"),
    event_that_comes_too_early: ("race", "on side"),
    result_used_before_the_end: ("race", "allreduce 0 (aten::mul.out) on the group's stream"),
    launched_over_another_stream: ("race", "allreduce 0", "aten::zero_ on side"),
    overlapping_part: ("race", "aten::zero_ on the default stream", "aten::zero_ on side"),
    list_written_in_place: ("race", "read by aten::add.out on the default", "unscale_ on side"),
    read_of_nothing: ("uninitialised read", "aten::add.out on the default stream"),
    read_of_the_unwritten_half: ("uninitialised read", "(32 bytes"),
    freed_in_use: ("premature free", "the read by aten::add.out on side"),
    told_the_wrong_stream: ("premature free", "the read by aten::add.out on side"),
}


# ---- what must not -------------------------------------------------------------------------------


def ordered_by_events() -> None:
    x = ones(3)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        y = x + 1
    current().wait_stream(side)
    y.record_stream(current())
    assert (y * x).tolist() == [2.0] * 3


def ordered_through_a_third() -> None:
    x = ones(3)
    first, second = device.stream("first"), device.stream("second")
    first.wait_stream(current())
    second.wait_stream(first)
    with second:
        x.add_(1)
    current().wait_stream(second)
    x.zero_()


def ordered_by_the_host() -> None:
    x = ones(3)
    current().synchronize()
    side = device.stream("side")
    with side:
        x.add_(1)
    side.synchronize()
    x.zero_()


def two_readers() -> None:
    x = ones(3)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x + 1
    x + 1
    current().wait_stream(side)


def parts_of_one_storage() -> None:
    x = ones(8)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x[:4].zero_()
    x[4:].zero_()
    current().wait_stream(side)


def freed_after_record_stream() -> None:
    x = ones(3)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x + 1
    x.record_stream(side)
    del x


def freed_after_the_event() -> None:
    x = ones(3)
    side = device.stream("side")
    side.wait_stream(current())
    with side:
        x + 1
    current().wait_stream(side)
    del x


def collective_waited_for() -> None:
    group, x = RecordingGroup(size=4), ones(3)
    group.allreduce(x).wait()
    assert x.tolist() == [4.0] * 3


def collective_whose_tensor_is_dropped() -> None:
    group, x = RecordingGroup(), ones(3)
    work = group.allreduce(x)
    del x
    work.wait()


def backward_with_a_branch() -> None:
    """Autograd runs each node on its forward's stream and orders the two itself."""
    side = device.stream("side")
    w, v = ones(3, 3).requires_grad_(), ones(3, 3).requires_grad_()
    x = ones(2, 3)
    side.wait_stream(current())
    with side:
        left = x @ w
    right = x @ v
    current().wait_stream(side)
    for used_on_side in (x, w):
        used_on_side.record_stream(side)
    left.record_stream(current())
    loss = (left * right).sum()
    del left, right, x
    loss.backward()
    assert torch.equal(w.grad.cpu(), v.grad.cpu())


NOT_FOUND = (
    ordered_by_events,
    ordered_through_a_third,
    ordered_by_the_host,
    two_readers,
    parts_of_one_storage,
    freed_after_record_stream,
    freed_after_the_event,
    collective_waited_for,
    collective_whose_tensor_is_dropped,
    backward_with_a_branch,
)


def _run_all(rank: int, world_size: int) -> dict[str, list[tuple[str, str]]]:
    device.load()
    found = {}
    for program in (*FOUND, *NOT_FOUND):
        kept = program()
        found[program.__name__] = [(one.kind, one.text) for one in device.findings()]
        del kept
        device.findings()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[str, str]]]:
    """What was found in each program; one process runs them all."""
    [found] = run_ranks(_run_all, 1, init_group=False)
    return found


@pytest.mark.parametrize("program", FOUND, ids=lambda program: program.__name__)
def test_it_is_found(
    program: Callable[[], object], found: dict[str, list[tuple[str, str]]]
) -> None:
    [(kind, text)] = found[program.__name__]
    expected_kind, *parts = FOUND[program]
    assert kind == expected_kind, text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("program", NOT_FOUND, ids=lambda program: program.__name__)
def test_nothing_is_found(
    program: Callable[[], object], found: dict[str, list[tuple[str, str]]]
) -> None:
    assert found[program.__name__] == []


def _waits(rank: int, world_size: int) -> list[tuple[str, bool]]:
    device.load()
    x = ones(3).requires_grad_()
    device.host_syncs()
    x.detach() * 2
    x.detach().to("cpu", non_blocking=True)
    side = device.stream("side")
    side.wait_stream(current())
    assert device.host_syncs() == []

    x.sum().item()
    x.detach().cpu()
    x.detach() * 2
    event = current().record_event()
    assert not event.query()
    event.synchronize()
    assert event.query()
    side.synchronize()
    loss = x.sum()
    loss.register_hook(lambda grad: grad.item() * grad)
    loss.backward()
    syncs = device.host_syncs()
    assert all("test_checker.py" in sync.where for sync in syncs), [s.where for s in syncs]
    return [(sync.what, sync.in_backward) for sync in syncs]


def test_waits_of_the_host_are_counted() -> None:
    [waits] = run_ranks(_waits, 1, init_group=False)
    assert waits == [
        ("aten::_local_scalar_dense", False),
        ("copy to the host", False),
        ("event.synchronize", False),
        ("stream.synchronize", False),
        ("aten::_local_scalar_dense", True),
    ]


def _computes_as_the_cpu(rank: int, world_size: int) -> None:
    """Views, outputs that grow, lists of tensors, results of several tensors."""
    device.load()
    x = torch.arange(24.0).view(2, 3, 4)
    y = x.to(device.NAME)
    for f in (
        lambda t: t.transpose(0, 2)[1:, :, 0].contiguous(),
        lambda t: torch.cat([t, t * 2], 1),
        lambda t: torch.stack(t.max(2)[0:1]),
        lambda t: t.unfold(2, 2, 1).sum(3),
        lambda t: torch.view_as_real(torch.view_as_complex(t.view(2, 3, 2, 2)).conj() * 2),
        lambda t: t[torch.tensor([1, 0], device=t.device), :, 1],
        lambda t: (
            t.to(torch.bfloat16).to(memory_format=torch.channels_last_3d)
            if t.dim() == 5
            else t.double()
        ),
        lambda t: torch.mul(t, 2, out=torch.empty(0, device=t.device)),
        lambda t: t.clone().masked_fill_(t > 3, 7),
    ):
        expected, got = f(x), f(y)
        assert got.device.type == device.NAME
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
        assert torch.equal(got.cpu(), expected)
    grown = y[0].clone()
    part = grown[1]
    assert torch.equal(grown.resize_(24)[:12].cpu(), x.flatten()[:12])
    assert part.untyped_storage().data_ptr() == grown.untyped_storage().data_ptr()
    other = y.new_empty(0).set_(grown)
    grown.fill_(3)
    assert other.cpu().tolist() == [3.0] * 24

    many = [y.clone(), y[0].clone()]
    torch._foreach_mul_(many, 2)
    torch._foreach_copy_(many[:1], [y.transpose(0, 0)])
    torch._amp_foreach_non_finite_check_and_unscale_(many, *y.new_tensor([[0], [0.5]]))
    assert torch.equal(many[0].cpu() * 2, x)
    assert torch.equal(many[1].cpu(), x[0])
    assert torch.equal(torch.stack(torch._foreach_norm(many)).cpu()[1], x[0].norm())

    z = y.clone()
    z.select(0, 1).view(-1)[2:4] = 5
    assert z.cpu().flatten()[14:16].tolist() == [5.0, 5.0]
    assert device.findings() == []


def test_computes_as_the_cpu() -> None:
    run_ranks(_computes_as_the_cpu, 1, init_group=False)
