"""Features of named layers, captured by forward hooks: what the losses of this package take."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FeatureCapture", "Tap"]

REPEATED = ("raise", "first", "last", "all")
WRAPPER_PREFIXES = ("_orig_mod.", "module.")


class Tap(NamedTuple):
    """Where to take a feature: a module, and which tensor that goes in or comes out of it.

    Args:
        path: dotted path of the module as in `named_modules()`; `""` is the model itself.
        index: the key or position of the tensor in a tuple, list or dict: `0`,
            `"last_hidden_state"`, or `("hidden_states", -1)` for nested ones.
        io: `"output"`, or `"input"` for the module's first positional argument (the input of a
            classifier is the pooled feature).
    """

    path: str
    index: Any = None
    io: str = "output"


class FeatureCapture(Mapping[str, Tensor]):
    """Captures the features of named layers at every forward pass of `model`.

    It is a mapping from your names to the features of the latest forward pass, with their autograd
    graph, so `MultiLoss` takes it as it is. Use it as a context manager, or keep it and call
    `remove()`. Wrappers (`DistributedDataParallel`, `DataParallel`, `torch.compile`) are looked
    through; create it before a compiled model's first call, which would not see later hooks.
    Copies and pickles of the model made meanwhile carry no working hook.

    Activation checkpointing (`torch.utils.checkpoint`): a module inside a checkpointed part runs
    again in the backward pass, so read its feature before `backward()`. With `use_reentrant=True`
    its first run has no graph and the feature would teach nothing: that is an error; pass
    `use_reentrant=False`, or tap a module outside.

    Args:
        model: the model, wrapped or not.
        taps: `{"name": "dotted.path"}` or `{"name": Tap(...)}`, or an iterable of paths, which then
            are the names.
        clone: copy the features. A layer that works in place (`ReLU(inplace=True)`) right behind a
            captured one would overwrite it. `"auto"` copies where the model has such a layer;
            any other change in place is found when the feature is read, and raises.
        repeated: what a module called several times in one pass gives: `"raise"`, the `"first"` or
            `"last"` feature, or `"all"`, a `list[Tensor]` under every name (`MultiLoss` takes none:
            choose or stack first). A pass begins when the model itself is called, or
            with `clear()`.

    Raises:
        ValueError: an unknown path (the message lists close ones) or option.

    Example::

        with FeatureCapture(model, {"map": "layer3", "pooled": Tap("fc", io="input")}) as features:
            logits = model(images)
            loss = sp(features["map"], teacher_features["map"])
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, str | Tap] | Iterable[str],
        *,
        clone: bool | str = "auto",
        repeated: str = "raise",
    ) -> None:
        if clone not in (True, False, "auto"):
            raise ValueError(f"clone must be True, False or 'auto', got {clone!r}")
        if repeated not in REPEATED:
            raise ValueError(f"repeated must be one of {REPEATED}, got {repeated!r}")
        root = unwrap(model)
        self._taps = _read_taps(taps)
        self._records: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in self._taps}
        self._repeated = repeated
        self._grad_at_begin = False
        self._clone = clone is True or (clone == "auto" and _works_in_place(root))
        modules = {name: find_module(root, tap.path) for name, tap in self._taps.items()}
        self._handles = [root.register_forward_pre_hook(_Hook(self._begin))]
        for name, module in modules.items():
            hook = _Hook(functools.partial(self._record, name))
            # an input is taken before the module runs, which might work on it in place
            register = (
                module.register_forward_pre_hook
                if self._taps[name].io == "input"
                else module.register_forward_hook
            )
            self._handles.append(register(hook))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._taps:
            close = _suggest(name, self._taps)
            raise KeyError(f"no feature {name!r} is captured; {close}")
        records, path = self._records[name], self._taps[name].path
        if not records and not self._handles:
            raise RuntimeError(
                f"feature {name!r} is gone: the capture is closed; read features inside the `with` "
                "block, or keep the capture and call remove() later"
            )
        if not records:
            raise RuntimeError(
                f"feature {name!r} is not there: no forward pass has gone through {path!r} since "
                "the capture was made or cleared"
            )
        for feature, version in records:
            if _version(feature) != version:
                raise RuntimeError(
                    f"feature {name!r} was changed in place after {path!r} returned it, so it is "
                    "no longer that layer's; pass clone=True to FeatureCapture"
                )
        if self._repeated == "all":
            return [feature for feature, _ in records]  # type: ignore[return-value]
        if self._repeated == "raise" and len(records) > 1:
            raise RuntimeError(
                f"feature {name!r}: {path!r} ran {len(records)} times in this pass; pass "
                "repeated='first', 'last' or 'all', or call clear() between passes"
            )
        return records[-1 if self._repeated == "last" else 0][0]

    def __contains__(self, name: object) -> bool:
        return name in self._taps

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def clear(self) -> None:
        """Forget the features, and with them the graph they hold alive."""
        for records in self._records.values():
            records.clear()

    def remove(self) -> None:
        """Remove every hook and forget the features. The model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.clear()
        self._grad_at_begin = torch.is_grad_enabled()

    def _record(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any = None
    ) -> None:
        tap = self._taps[name]
        if tap.io == "input" and not inputs:
            raise ValueError(
                f"taps[{name!r}]: {tap.path!r} was called with keyword arguments only, and "
                "io='input' takes the first positional one; pass it by position, or tap the "
                "output of the module before it"
            )
        value = output if tap.io == "output" else inputs[0]
        self._require_graph(name, module)
        feature = _select(name, tap, value)
        # neither a compiled graph nor an inference tensor has a counter to tell a change by
        if self._clone or torch.compiler.is_compiling() or feature.is_inference():
            feature = feature.clone()
        self._records[name].append((feature, _version(feature)))

    def _require_graph(self, name: str, module: nn.Module) -> None:
        """Refuse a module that trains, but runs without a graph in a pass that has one."""
        if not self._grad_at_begin or torch.is_grad_enabled() or not module.training:
            return
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"feature {name!r}: {self._taps[name].path!r} is training but ran without a graph, "
                "as a part under checkpoint(..., use_reentrant=True) does, so its feature would "
                "teach nothing; pass use_reentrant=False, or put a frozen part in eval() mode"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DistributedDataParallel` and `DataParallel` wrappers."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def find_module(root: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`; prefixes that a wrapper put before it, and compiled submodules'
    own names on the way to it, are ignored.

    Raises:
        ValueError: there is none; the message lists the closest paths.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    # a compiled submodule keeps the module under another name: "0._orig_mod.1" is "0.1"
    for name, module in tuple(modules.items()):
        modules.setdefault(name.replace("._orig_mod", ""), module)
    bare = path.replace("._orig_mod", "")
    while bare not in modules and bare.startswith(WRAPPER_PREFIXES):
        bare = bare.split(".", 1)[1]
    if bare not in modules:
        raise ValueError(
            f"taps must name modules of {type(root).__name__}, got {path!r}; "
            f"{_suggest(bare, modules)}"
        )
    return modules[bare]


class _Hook:
    """A hook that a copied or pickled model does not take along.

    A plain closure would follow `copy.deepcopy(model)`, and the copy (a moving average of the
    student, say) would then write its features over those of the original.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        self.function(*arguments)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert_hook, ()


def _inert_hook() -> Callable[..., None]:
    return _ignore


def _ignore(*arguments: Any) -> None:
    """What a hook becomes in a copy."""


def _read_taps(taps: Mapping[str, str | Tap] | Iterable[str]) -> dict[str, Tap]:
    if isinstance(taps, str):
        raise TypeError(f"taps must be a mapping or an iterable of paths, got the string {taps!r}")
    pairs = taps.items() if isinstance(taps, Mapping) else ((path, path) for path in taps)
    read = {name: Tap(tap) if isinstance(tap, str) else Tap(*tap) for name, tap in pairs}
    for name, tap in read.items():
        if tap.io not in ("input", "output"):
            raise ValueError(f"taps[{name!r}]: io must be 'input' or 'output', got {tap.io!r}")
    return read


def _select(name: str, tap: Tap, value: Any) -> Tensor:
    steps = tap.index if isinstance(tap.index, tuple) else (tap.index,)
    for step in steps:
        if step is None:
            continue
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"taps[{name!r}]: index {tap.index!r} does not fit the {tap.io} of {tap.path!r}, "
                f"{_describe(value)}"
            ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"taps[{name!r}]: the {tap.io} of {tap.path!r} must be a tensor, got "
            f"{_describe(value)}; choose one with Tap({tap.path!r}, index=...)"
        )
    return value


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"


def _works_in_place(model: nn.Module) -> bool:
    return any(getattr(module, "inplace", False) is True for module in model.modules())


def _version(feature: Tensor) -> int:
    if torch.compiler.is_compiling() or feature.is_inference():
        return 0
    return feature._version


def _suggest(name: str, known: Iterable[str]) -> str:
    known = [candidate for candidate in known if candidate]
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    return f"close to it: {', '.join(close)}" if close else f"known: {', '.join(known[:20])}"
