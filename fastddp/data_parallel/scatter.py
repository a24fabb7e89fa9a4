"""Splits a batch into pieces for several replicas, and puts the replicas' outputs together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddp.device.nested import tensors_in


def scatter(tree: Any, devices: Sequence[torch.device], dim: int = 0) -> list[Any]:
    """Splits every tensor of a nested structure along `dim`, into one piece per device.

    Tensors are split as by :meth:`torch.Tensor.chunk`: all pieces but the last have equal sizes,
    and there may be fewer pieces than devices. A piece on the tensor's own device shares its
    memory.

    Args:
        tree: tensors in lists, tuples, namedtuples, mappings and dataclasses, nested to any depth.
        devices: the devices that the pieces go to, at least one.
        dim: the dimension along which the batch lies.

    Returns:
        One structure per piece. Each has new containers; objects that are not tensors are the same
        in all of them. If there is no tensor, there is one structure per device.

    Raises:
        ValueError: if a tensor does not have this dimension, or tensors split into different
            numbers of pieces, so that a part of the batch would be left out.
    """
    pieces: dict[int, tuple[Tensor, ...]] = {}
    for tensor in tensors_in(tree):
        if id(tensor) not in pieces:
            pieces[id(tensor)] = _split(tensor, len(devices), dim)
    counts = {len(split): split for split in pieces.values()}
    if len(counts) > 1:
        few, many = min(counts), max(counts)
        raise ValueError(
            f"fastddp.DataParallel: along dimension {dim} one input splits into {few} piece(s), the"
            f" first of shape {tuple(counts[few][0].shape)}, and another into {many}, the first of"
            f" shape {tuple(counts[many][0].shape)};"
            " expand() inputs without a batch dimension to the size of the batch, or make them"
            " buffers of the module"
        )
    count = next(iter(counts), len(devices))
    moved = {
        key: [
            piece.to(device, non_blocking=True)
            for piece, device in zip(split, devices, strict=False)  # may be fewer pieces
        ]
        for key, split in pieces.items()
    }

    def piece_of(index: int) -> Callable[[Sequence[Any]], Any]:
        return lambda leaf: moved[id(leaf[0])][index] if isinstance(leaf[0], Tensor) else leaf[0]

    return [rebuild([tree], piece_of(index)) for index in range(count)]


def _split(tensor: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"fastddp.DataParallel: cannot split an input of shape {tuple(tensor.shape)} along"
            f" dimension {dim}; pass a Python number, or expand() it to the size of the batch"
        )
    pieces = tensor.chunk(count, dim)
    if tensor.requires_grad:
        return pieces
    # Pieces of one tensor share autograd's records about it. Replicas that write to their pieces in
    # place would change these records in several threads. Without a gradient they are not needed.
    return tuple(piece.detach() for piece in pieces)


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Concatenates the tensors of equally nested structures along `dim`, on one device.

    Tensors without dimensions are stacked to a vector. Other objects must be equal in all
    structures, and are taken from the first.

    Args:
        outputs: one structure per replica, of the kinds that :func:`scatter` takes.
        device: the device that the result is on.
        dim: the dimension along which the batch lies.

    Returns:
        A structure like the first one, with concatenated tensors.

    Raises:
        TypeError: if an object that is not a tensor differs between the structures.
        ValueError: if containers at the same place differ in length or keys.
    """

    def join(leaves: Sequence[Any]) -> Any:
        first = leaves[0]
        if isinstance(first, Tensor) and all(isinstance(leaf, Tensor) for leaf in leaves):
            moved = [leaf.to(device, non_blocking=True) for leaf in leaves]
            if all(leaf.dim() == 0 for leaf in moved):
                return torch.stack(moved)
            return moved[0] if len(moved) == 1 else torch.cat(moved, dim)
        for number, other in enumerate(leaves):
            if not _equal(first, other):
                raise TypeError(
                    "fastddp.DataParallel: replicas return different values that are not tensors,"
                    f" {_brief(first)} (replica 0) and {_brief(other)} (replica {number}); return"
                    " tensors, which are concatenated"
                )
        return first

    return rebuild(outputs, join)


def rebuild(trees: Sequence[Any], leaf: Callable[[Sequence[Any]], Any]) -> Any:
    """Makes one structure of several equally nested ones.

    Args:
        trees: the structures, at least one.
        leaf: the function that makes a leaf of the result from the leaves at the same place in all
            structures.

    Returns:
        A structure like the first one.

    Raises:
        ValueError: if containers at the same place differ in length or keys.
    """
    first = trees[0]
    if isinstance(first, Tensor) or any(type(tree) is not type(first) for tree in trees):
        return leaf(trees)
    new: Any
    if isinstance(first, MutableMapping):
        _check_alike("keys", [list(tree) for tree in trees], [set(tree) for tree in trees])
        new = copy.copy(first)
        for key in first:
            new[key] = rebuild([tree[key] for tree in trees], leaf)
        return new
    if isinstance(first, (list, tuple)):
        lengths = [len(tree) for tree in trees]
        _check_alike("lengths", lengths, lengths)
        values = [rebuild(items, leaf) for items in zip(*trees, strict=True)]
        if isinstance(first, list):
            new = copy.copy(first)
            new[:] = values
            return new
        return type(first)._make(values) if hasattr(first, "_make") else type(first)(values)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        new = copy.copy(first)
        for field in dataclasses.fields(first):
            value = rebuild([getattr(tree, field.name) for tree in trees], leaf)
            object.__setattr__(new, field.name, value)  # works for frozen dataclasses too
        return new
    return leaf(trees)


def _check_alike(what: str, seen: Sequence[Any], comparable: Sequence[Any]) -> None:
    for number, other in enumerate(comparable):
        if other != comparable[0]:
            raise ValueError(
                f"fastddp.DataParallel: replicas return containers of different {what}:"
                f" {seen[0]} (replica 0) and {seen[number]} (replica {number})"
            )


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # arrays compare by element, without one answer
        return False


def _brief(value: object) -> str:
    text = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
