"""Whether a line of a script comes after the loop that another one is in."""

from __future__ import annotations

import ast
import linecache

from fastddp.watch.frames import Frame


def is_after_loop_of(place: Frame, other: Frame) -> bool | None:
    """Returns whether a place in a script comes after the outermost loop that another one is in.

    Args:
        place: the place in question.
        other: the place in a loop.

    Returns:
        None where that cannot be told: they are in different functions, there is no loop, or the
        source is not there.
    """
    if (place.file, place.function) != (other.file, other.function):
        return None
    try:
        tree = ast.parse("".join(linecache.getlines(place.file)))
    except (SyntaxError, ValueError, RecursionError):
        return None
    loops = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, (ast.For, ast.While, ast.AsyncFor))
        and node.lineno <= other.line <= (node.end_lineno or node.lineno)
    ]
    inside = [loop for loop in loops if _is_in_function_of(tree, loop, other)]
    return place.line > min(inside)[1] if inside else None


def _is_in_function_of(tree: ast.Module, loop: tuple[int, int], place: Frame) -> bool:
    """Returns whether a loop is in the innermost function around a place."""
    around = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.lineno <= place.line <= (node.end_lineno or node.lineno)
    ]
    return not around or loop[0] > max(around)[0]
