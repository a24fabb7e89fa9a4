"""Autograd's nodes: a parameter's accumulator, and which nodes the current backward will run.

The C++ engine has no such file: it asks autograd's engine itself what the backward is for.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.autograd.graph import Node, get_gradient_edge


def accumulator(param: torch.nn.Parameter) -> Node:
    """Returns the node that adds gradients to the parameter's ``.grad``.

    The tensor refers to the node weakly, so code that hooks the node has to keep it alive.
    """
    trains = param.requires_grad
    with torch._C.DisableTorchFunctionSubclass():  # else a subclass gets a node of a view of it
        node = get_gradient_edge(param.requires_grad_(True)).node  # else there is none
    param.requires_grad_(trains)
    return node


def backward_accumulates(ours: Collection[Node | None]) -> bool:
    """Returns whether the current backward is one that fills ``.grad``.

    ``autograd.grad()`` and ``backward(inputs=...)`` do not, and need not involve the other ranks.
    They skip the leaves that they were not asked for, so it is enough to look at one hooked
    parameter below the current node. Where there is none, all leaves must be filled. A distributed
    backward does not tell which nodes it will run, and fills a context instead; for it the first
    gradient begins the round.

    Args:
        ours: the accumulators of the hooked parameters.
    """
    current = torch._C._current_autograd_node()
    if current is None:
        return False
    todo: list[Node | None] = [current]
    seen: set[Node | None] = {None}
    others: list[Node] = []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ours:
            return _will_run(node)
        if hasattr(node, "variable"):
            others.append(node)
        todo += [below for below, _ in node.next_functions]
    return all(_will_run(node) for node in others)


def _will_run(leaf: Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # autograd.grad() was asked for this very leaf
        return False
