"""Tensors without numbers: parameters and activations of any size on a machine without memory.

Floating-point tensors that a program makes are put on torch's `meta` device: shape, dtype and
gradient graph, no storage. Integer and boolean tensors (token ids, document boundaries, indices)
stay real, as do the few floats that come from a batch: how a row is cut depends on their values.
Only tables of a row against itself (attention masks) are left without.
Where the two meet, the result has no numbers either, and the real operand gives its shape.

What a program asks of a number that does not exist (a gradient's norm, a loss) is answered 1, or
False; `ShapesOnly.asked` keeps the places, as what is decided there is decided without knowledge.

torch's own `FakeTensorMode` would take the numbers of the integer tensors away too.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_HERE = str(Path(__file__).parent)
_META = torch.device("meta")
_PIXEL_DIMENSIONS = 4  # uint8 [N, 3, side, side]; a random state is uint8 too, of one dimension
_LARGE = 1 << 20  # numbers; indices into a row are far fewer
# A result whose shape depends on numbers.
_UNKNOWABLE = {aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_COUNTED = {aten.arange.default, aten.arange.start, aten.arange.start_step}
# In place, but the tensor's shape or storage changes.
_RESHAPED = {"resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_"}


def is_empty(value: Any) -> bool:
    """Whether `value` is a tensor that has, or is to have, no numbers."""
    return isinstance(value, Tensor) and (
        value.is_meta or (value.dtype == torch.uint8 and value.dim() == _PIXEL_DIMENSIONS)
    )


def place() -> str:
    """`file:line` of the innermost caller outside torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) and not any(
            part in name for part in ("/torch/", "contextlib", "cpu_backend")
        ):
            parts = name.split("/")
            start = parts.index("megatron") if "megatron" in parts else -2
            return f"{'/'.join(parts[start:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class ShapesOnly(TorchDispatchMode):
    """Entered around the whole program; see this module's docstring.

    Raises (in the program):
        ValueError: a shape depends on a number that does not exist.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self._outside = _OutsideDispatch(self)
        # (operation, operands' shapes) -> the result's: torch computes some in slow Python.
        self._known: dict[Any, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's wrapper against it costs an import of seconds."""
        return False

    def __enter__(self) -> "ShapesOnly":
        super().__enter__()
        self._outside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._outside.__exit__(*error)
        super().__exit__(*error)

    def answer(self, dtype: torch.dtype) -> float | int | bool:
        """What is said of a number that does not exist."""
        self.asked[place()] += 1
        if dtype == torch.bool:
            return False
        return 1.0 if dtype.is_floating_point else 1

    def listed(self, tensor: Any) -> Any:
        """`tensor.tolist()`, also of tensors in lists."""
        if isinstance(tensor, list | tuple):
            return [self.listed(item) for item in tensor]
        if not isinstance(tensor, Tensor):
            return tensor
        if not is_empty(tensor):
            return tensor.tolist()
        return np.full(tuple(tensor.shape), self.answer(tensor.dtype)).tolist()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors([*args, *kwargs.values()])
        if not tensors:
            return _made(func, args, kwargs)
        if not any(map(is_empty, tensors)) and not _large(tensors):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.answer(args[0].dtype)
        if func in _UNKNOWABLE:
            raise ValueError(
                f"{func} at {place()}: how large its result is depends on numbers, which a dry run "
                "does not have; take them from the batch's integer tensors"
            )
        if "device" in kwargs:
            kwargs["device"] = _META
        if func in _INDEXED:
            args = (args[0], _positions(args[1]), *args[2:])
        written = _written(func)
        if written and not is_empty(args[0]):
            return args[0]  # a real tensor keeps its value
        return self._result(func, args, kwargs, in_place=written)

    def _result(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], in_place: bool
    ) -> Any:
        key = None
        if not _is_view(func):
            key = (func, *map(_key, args), *((name, _key(v)) for name, v in kwargs.items()))
            try:
                known = self._known.get(key)
            except TypeError:  # a random generator among the operands
                key = known = None
            if known is not None:
                return args[0] if in_place else _like(known)
        result = func(*map(_emptied, args), **{name: _emptied(v) for name, v in kwargs.items()})
        if key is not None:
            if in_place:
                if result is args[0] and func.overloadpacket.__name__ not in _RESHAPED:
                    self._known[key] = ()
            elif not func._schema.is_mutable:
                description = _description(result)
                if description is not None:
                    self._known[key] = description
        return result


class _OutsideDispatch(TorchFunctionMode):
    """What never reaches the dispatcher."""

    def __init__(self, numbers: ShapesOnly) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            args = (self.numbers.listed(args[0]), *args[1:])
        elif args and is_empty(args[0]):
            if func is Tensor.tolist:
                return self.numbers.listed(args[0])
            if func is Tensor.type and len(args) == 1 and not kwargs:
                # the optimizer accepts "torch.cuda.FloatTensor" and its kin only
                return f"torch.cuda.{func(args[0]).rpartition('.')[2]}"
        return func(*args, **kwargs)


def _made(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A tensor from nothing: without numbers if it is floating-point and has a dimension."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if func in _COUNTED:
        size: Sequence[int] = (2,)
        if "dtype" not in kwargs and all(isinstance(value, int) for value in args):
            dtype = torch.int64
    else:
        size = args[0] if args and isinstance(args[0], list | tuple) else ()
    if size and dtype.is_floating_point and _takes_device(func):
        kwargs["device"] = _META
        kwargs.pop("pin_memory", None)
    return func(*args, **kwargs)


_schemas: dict[Any, tuple[bool, bool, bool]] = {}


def _schema(func: Any) -> tuple[bool, bool, bool]:
    """Whether it takes a device, writes into its first operand, returns a view."""
    if func not in _schemas:
        schema = func._schema
        first = schema.arguments[0].alias_info if schema.arguments else None
        returned = [value.alias_info for value in schema.returns]
        _schemas[func] = (
            any(argument.name == "device" for argument in schema.arguments),
            first is not None and first.is_write,
            any(alias is not None and not alias.is_write for alias in returned)
            or func is aten._reshape_alias.default,
        )
    return _schemas[func]


def _takes_device(func: Any) -> bool:
    return _schema(func)[0]


def _written(func: Any) -> bool:
    return _schema(func)[1]


def _is_view(func: Any) -> bool:
    return _schema(func)[2]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Operators take tensors and lists of tensors, no deeper."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _large(tensors: Sequence[Tensor]) -> bool:
    """Whether two real operands make a table (an attention mask) whose numbers nobody needs."""
    if len(tensors) != 2 or max(tensors[0].dim(), tensors[1].dim()) < 2:
        return False
    return tensors[0].numel() * tensors[1].numel() > _LARGE > max(t.numel() for t in tensors)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _emptied(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_emptied, value))
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return _like((value.shape, value.stride(), value.dtype))


def _description(result: Any) -> Any:
    """What `_like` makes such a result of; None for results other than tensors."""
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype
    if isinstance(result, tuple) and all(isinstance(item, Tensor) for item in result):
        return [_description(item) for item in result]
    return None


def _like(description: Any) -> Any:
    if isinstance(description, list):
        return tuple(map(_like, description))
    shape, stride, dtype = description
    return aten.empty_strided.default(shape, stride, dtype=dtype, device=_META)


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks as the positions where they are true: these count."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not is_empty(index):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
