"""What all components share: a name, validated options, a readable form and a registry."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import numbers
from typing import Any, ClassVar, TypeVar, cast

C = TypeVar("C", bound="Component")

_WORDS = {"true": True, "false": False, "none": None}


@dataclasses.dataclass(frozen=True)
class Component:
    """One choice along one axis of the triple: pure data, hashable, comparable, no tensors.

    ``str(component)`` is the shorthand that :meth:`resolve` reads back, with the options that
    differ from their defaults: ``"rbf(gamma=0.5)"``.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    # filled per axis by `register`: name -> class
    choices: ClassVar[dict[str, type[Component]]]
    # one of the contract's own, which the fused kernels know; not inherited: a subclass is another
    builtin: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.builtin = vars(cls).get("builtin", False)

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @classmethod
    def register(cls, component: type[C]) -> type[C]:
        """Make ``component`` available by its ``name`` along this axis (a class decorator)."""
        name = getattr(component, "name", None)
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(
                f"{component.__name__} needs a class attribute `name`, an identifier, got {name!r}"
            )
        if not issubclass(component, cls):
            raise TypeError(f"{component.__name__} must subclass {cls.__name__}")
        if name in cls.choices:
            raise ValueError(f"{cls.kind} {name!r} exists already: {cls.choices[name].__name__}")
        cls.choices[name] = component
        return component

    @classmethod
    def resolve(cls: type[C], value: Any) -> C:
        """Turn the shorthand (``"rbf"``, ``"rbf(gamma=0.5)"``) into a component.

        Raises:
            ValueError: an unknown name (lists the choices) or an unreadable shorthand.
            TypeError: neither a string nor a component of this axis, or an unknown option.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, type) and issubclass(value, cls):
            raise TypeError(f"{cls.kind} is the class {value.__name__}; pass {value.__name__}()")
        if not isinstance(value, str):
            raise TypeError(
                f"{cls.kind} must be a name or an instance of {cls.__name__}, got "
                f"{type(value).__name__}; valid names: {', '.join(cls.choices)}"
            )
        name, options = parse_call(value)
        if name not in cls.choices:
            close = difflib.get_close_matches(name, cls.choices, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"unknown {cls.kind} {name!r}{hint}; valid names: {', '.join(cls.choices)}"
            )
        component = cls.choices[name]
        valid = [field.name for field in dataclasses.fields(component)]
        unknown = [option for option in options if option not in valid]
        if unknown:
            raise TypeError(
                f"{cls.kind} {name!r} has no option {unknown[0]!r}; "
                f"valid options: {', '.join(valid) or 'none'}"
            )
        return cast(C, component(**options))


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``"name"`` or ``"name(option=literal, ...)"``; a bare word is a string or a bool."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {cast(str, k.arg): _literal(k.value) for k in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"cannot read {text!r}: expected 'name' or 'name(option=value, ...)'")


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def check_number(
    owner: Component,
    option: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    optional: bool = False,
) -> None:
    """Raise unless the option is a finite real number (or None, where optional) in its range."""
    value: Any = getattr(owner, option)
    if value is None and optional:
        return
    wanted = "a finite number"
    if above is not None:
        wanted += f" > {above:g}"
    if at_least is not None:
        wanted += f" >= {at_least:g}"
    if optional:
        wanted += " or None"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner.name}: {option} must be {wanted}, got {value!r}")
    # NumPy's numbers would not survive the text form
    object.__setattr__(owner, option, float(value))
    too_low = (above is not None and value <= above) or (at_least is not None and value < at_least)
    if not math.isfinite(value) or too_low:
        raise ValueError(f"{owner.name}: {option} must be {wanted}, got {value!r}")


def check_integer(owner: Component, option: str, *, at_least: int, optional: bool = False) -> None:
    value = getattr(owner, option)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{owner.name}: {option} must be an integer, got {value!r}")
    object.__setattr__(owner, option, int(value))
    if value < at_least:
        raise ValueError(f"{owner.name}: {option} must be >= {at_least}, got {value!r}")


def check_flag(owner: Component, option: str) -> None:
    value = getattr(owner, option)
    if not isinstance(value, bool):
        raise TypeError(f"{owner.name}: {option} must be True or False, got {value!r}")


def check_choice(owner: Component, option: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, option)
    if value not in choices:
        raise ValueError(
            f"{owner.name}: {option} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
