"""Whether a place is executed on Linux, as far as the conditions around it say.

Rules kept here: a condition that cannot be judged may be true. Only the usual ways to ask for the system are known.
"""

from __future__ import annotations

import ast
from typing import Final

from ._calls import last_name
from ._scopes import Where, dotted

__all__ = ["may_be_linux"]

_ON_LINUX: Final = {
    "sys.platform": "linux",
    "platform": "linux",
    "os.name": "posix",
    "platform.system()": "Linux",
    "system()": "Linux",
}
_LONGEST_CHAIN: Final = 20  # arms of a chain that asks for the system


def may_be_linux(where: Where) -> bool:
    """Whether no condition around a place excludes Linux."""
    return not any(isinstance(each, ast.If) and _excluded(each, block) for each, block in where.arms)


def _excluded(statement: ast.If, block: int) -> bool:
    """Whether a block of an `if`, counted through its chain of `elif`, is not executed on Linux."""
    arm: ast.If | None = statement
    if block > _LONGEST_CHAIN:
        return False
    for _ in range(block):
        if arm is not None and _on_linux(arm.test) is True:
            return True  # an earlier arm is taken
        rest = arm.orelse if arm is not None else []
        arm = rest[0] if len(rest) == 1 and isinstance(rest[0], ast.If) else None
    return arm is not None and _on_linux(arm.test) is False


def _on_linux(test: ast.expr) -> bool | None:
    """The value of a condition on Linux; None if it depends on something else."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            known = _on_linux(operand)
            return None if known is None else not known
        case ast.BoolOp(op=ast.And(), values=values):
            return False if any(_on_linux(each) is False for each in values) else None
        case ast.BoolOp(op=ast.Or(), values=values):
            return True if any(_on_linux(each) is True for each in values) else None
        case ast.Compare(left=left, ops=[ast.Eq() | ast.In()], comparators=[right]):
            return _is_among(_system(left), _literal(right))
        case ast.Compare(left=left, ops=[ast.NotEq() | ast.NotIn()], comparators=[right]):
            known = _is_among(_system(left), _literal(right))
            return None if known is None else not known
        case ast.Call(func=ast.Attribute(value=owner, attr="startswith"), args=[prefix]):
            value, start = _system(owner), _literal(prefix)
            return None if value is None or not isinstance(start, (str, tuple)) else value.startswith(start)
        case ast.Call(func=ast.Name(id="hasattr"), args=[_, ast.Constant(value="SIO_KEEPALIVE_VALS" | "ioctl")]):
            return False
    return None


def _is_among(value: str | None, texts: str | tuple[str, ...] | None) -> bool | None:
    if value is None or texts is None:
        return None
    return value == texts if isinstance(texts, str) else value in texts


def _system(node: ast.expr) -> str | None:
    if isinstance(node, ast.Call):
        return _ON_LINUX.get(f"{dotted(node.func)}()") if last_name(node.func) == "system" else None
    return _ON_LINUX.get(dotted(node) or "")


def _literal(node: ast.expr) -> str | tuple[str, ...] | None:
    """A text, or a tuple of texts, that is spelt out."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            texts = [each.value for each in elements if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            return tuple(texts) if len(texts) == len(elements) else None
    return None
