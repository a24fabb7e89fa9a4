"""Arguments are split among the replicas, and outputs are joined, whatever holds the tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastddp
from fastddp.data_parallel.scatter import gather, scatter
from tests.data_parallel.common import CPU, FOUR, THREE, TWO, Call, Scale, spread

Pair = namedtuple("Pair", "first second")  # the untyped kind must work too


@dataclass
class Record:
    value: Any
    derived: Any = field(init=False, default=None)


@dataclass(frozen=True)
class Frozen:
    value: Any


def test_arguments_of_every_kind() -> None:
    calls: dict[int, Any] = {}

    def forward(module: Call, *args: Any, **kwargs: Any) -> Tensor:
        calls[int(args[0][0])] = (args, kwargs)
        return args[0]

    marker = object()
    x = torch.arange(4)
    default = defaultdict(list, {"x": x})
    model = spread(forward)
    model(x, [x, "text"], (x, None), {"x": x, 1: marker}, Pair(x, 2), y=Frozen([x]), z=default)
    assert sorted(calls) == [0, 2]
    for start, (args, kwargs) in calls.items():
        piece = [start, start + 1]
        assert args[0].tolist() == piece
        assert [args[1][0].tolist(), args[1][1]] == [piece, "text"]
        assert args[2][0].tolist() == piece
        assert args[2][1] is None
        assert args[3]["x"].tolist() == piece
        assert args[3][1] is marker
        assert type(args[4]) is Pair
        assert (args[4].first.tolist(), args[4].second) == (piece, 2)
        assert type(kwargs["y"]) is Frozen
        assert kwargs["y"].value[0].tolist() == piece
        assert type(kwargs["z"]) is defaultdict
        assert kwargs["z"]["x"].tolist() == piece
        assert kwargs["z"]["new"] == []


def test_outputs_of_every_kind() -> None:
    def forward(module: Call, x: Tensor) -> Any:
        record = Record(x)
        record.derived = 2 * x
        return {
            "list": [x, None],
            "tuple": (x, "text"),
            "named": Pair(x, 1.5),
            "ordered": OrderedDict(x=x),
            "record": record,
            "frozen": Frozen({"x": x}),
            "max": x.unsqueeze(1).max(1),
            "sum": x.sum(),
            "empty": (),
            3: None,
        }

    output = spread(forward, THREE)(torch.arange(5.0))
    want = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert output["list"][0].tolist() == want
    assert output["list"][1] is None
    assert (output["tuple"][0].tolist(), output["tuple"][1]) == (want, "text")
    assert type(output["named"]) is Pair
    assert (output["named"].first.tolist(), output["named"].second) == (want, 1.5)
    assert type(output["ordered"]) is OrderedDict
    assert type(output["record"]) is Record
    assert output["record"].value.tolist() == want
    assert output["record"].derived.tolist() == [2 * value for value in want]
    assert output["frozen"].value["x"].tolist() == want
    assert type(output["max"]) is torch.return_types.max
    assert output["max"].values.tolist() == want
    assert output["sum"].tolist() == [1.0, 5.0, 4.0], "one per replica"
    assert output["empty"] == ()
    assert output[3] is None


@pytest.mark.parametrize(("rows", "replicas"), [(1, 1), (3, 3), (4, 4), (5, 3), (8, 4), (9, 3)])
def test_small_and_uneven_batches(rows: int, replicas: int) -> None:
    """As `chunk`: 5 rows on 4 devices are 2, 2 and 1."""
    sizes: list[int] = []
    model = spread(
        lambda module, x: (sizes.append(len(x)), module.scale(x))[1], FOUR, scale=Scale()
    )
    x = torch.arange(float(rows))
    for _ in range(2):
        model.zero_grad()
        assert torch.equal(model(x), x)
        model(x).sum().backward()
        assert model.module.scale.weight.grad.item() == x.sum().item()
    assert len(sizes) == 4 * replicas
    assert sum(sizes) == 4 * rows


def test_an_empty_batch() -> None:
    model = fastddp.DataParallel(nn.Linear(3, 2), TWO)
    output = model(torch.empty(0, 3))
    assert output.shape == (0, 2)
    output.sum().backward()
    assert model.module.weight.grad.abs().sum() == 0


def test_keywords_only_and_no_arguments_and_no_tensors() -> None:
    calls: list[Any] = []

    def forward(module: Call, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return torch.ones(1) * len(calls)

    model = spread(forward)
    assert model(x=torch.zeros(4)).shape == (2,)
    assert [(args, len(kwargs["x"])) for args, kwargs in calls] == [((), 2)] * 2
    calls.clear()
    assert model().shape == (1,), "nothing to split: one replica"
    assert calls == [((), {})]
    calls.clear()
    assert model(5, flag=True).shape == (2,), "nothing to split: all replicas"
    assert calls == [((5,), {"flag": True})] * 2
    calls.clear()
    assert model(5, x=torch.zeros(1)).shape == (1,), "one row: one replica"
    assert len(calls) == 1


def test_another_dimension() -> None:
    model = fastddp.DataParallel(nn.Identity(), TWO, dim=1)
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(model(x), x)
    pieces, _ = model.scatter((x,), {}, model.device_ids)
    assert [piece.shape for (piece,) in pieces] == [(3, 2), (3, 2)]


def test_replicas_may_write_to_their_inputs() -> None:
    model = spread(lambda module, x: x.mul_(module.scale.weight), FOUR, scale=Scale())
    for _ in range(20):
        model.zero_grad()
        model(torch.full((8,), 2.0)).sum().backward()
        assert model.module.scale.weight.grad.item() == 16


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(4, 2), torch.ones(1, 2)), r"into 1 piece\(s\).*\(1, 2\).* into 2,.*\(2, 2\)"),
        ((torch.ones(4), torch.tensor(1.0)), r"shape \(\) along dimension 0; pass a Python number"),
    ],
)
def test_inputs_that_do_not_split_alike_are_refused(
    inputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spread(lambda _, *args: args[0])(*inputs)


@pytest.mark.parametrize(
    ("output_of", "kind", "message"),
    [
        (lambda x: len(x), TypeError, r"2 \(replica 0\) and 1 \(replica 1\); return tensors"),
        (lambda x: x if len(x) == 2 else None, TypeError, r"tensor of shape \(2,\).*None"),
        (lambda x: [x] * len(x), ValueError, "different lengths: 2 .* and 1 "),
        (lambda x: {len(x): x}, ValueError, r"different keys: \[2\] .* and \[1\]"),
        (lambda x: x.numpy(), TypeError, "not tensors"),
    ],
)
def test_outputs_that_do_not_fit_together_are_refused(
    output_of: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        spread(lambda _, x: output_of(x))(torch.ones(3))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner),
        st.builds(Frozen, inner),
    )


LEAVES = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.booleans(),
    st.sampled_from(["long", "matrix"]),
)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (Record, Frozen)):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a is b or a == b


@settings(deadline=None)
@given(
    st.recursive(LEAVES, _containers, max_leaves=12),
    st.integers(1, 5),
    st.integers(0, 7),
    st.sampled_from([0, 1, -1]),
)
def test_gather_undoes_scatter(tree: Any, count: int, rows: int, dim: int) -> None:
    def grown(node: Any) -> Any:
        """Put tensors of one batch size where a leaf asks for them."""
        if node in ("long", "matrix"):
            dtype = torch.long if node == "long" else torch.float32
            return torch.arange(rows * rows).view(rows, rows).to(dtype)
        if isinstance(node, dict):
            return type(node)((key, grown(value)) for key, value in node.items())
        if isinstance(node, Pair):
            return Pair(*map(grown, node))
        if isinstance(node, (list, tuple)):
            return type(node)(map(grown, node))
        if isinstance(node, (Record, Frozen)):
            return type(node)(grown(node.value))
        return node

    tree = grown(tree)
    pieces = scatter(tree, [CPU] * count, dim)
    assert 1 <= len(pieces) <= count
    assert _same(gather(pieces, CPU, dim), tree)
