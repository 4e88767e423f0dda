"""A function of tensors as one list of PyTorch operations, for any sizes.

``torch.compile`` differentiates what it has compiled once, and training with forces differentiates twice. So the energy
and its gradient are recorded together, with the operations of the inner differentiation spelled out; what remains for
the compiler is one plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torchmdnet.errors import ConfigError
from torchmdnet.tracing import recording

__all__ = ["Recorded", "needs_compiler", "record"]


class Recorded(NamedTuple):
    """An argument of a function that is recorded."""

    value: Tensor
    #: Name of the size of each axis that changes from call to call, such as ``{0: "atoms"}``.
    axes: Mapping[int, str] = {}


def record(
    function: Callable[..., Any],
    arguments: Sequence[Recorded],
    weights: Mapping[str, Tensor] | None = None,
    *,
    operators: bool = False,
) -> fx.GraphModule:
    """Record a function, with all that it differentiates on the way.

    Args:
        function: Called with the mapping of weights, if there is one, and the arguments.
        arguments: Examples. Sizes of axes without a name are taken as they are; sizes with one should be at least 2 and
            all different, so that none is taken for another.
        weights: Tensors of unchanging shape, by name.
        operators: Whether to name the operators of :mod:`torchmdnet.ops.library`, or write out their definitions.

    Returns:
        The recorded function, called as the original. Tensors that it read from elsewhere are constants in it. A tensor
        that the function detached is not detached in it.

    Raises:
        RuntimeError: If the function decides something from a size, so that it would be recorded for this one only.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    import torchmdnet.ops.library  # noqa: F401  the operators that stand in recordings

    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fakes = [_fake(argument, f"argument{k}", mode) for k, argument in enumerate(arguments)]
    held = () if weights is None else ({name: mode.from_tensor(x, static_shapes=True) for name, x in weights.items()},)
    with mode, recording(operators=operators):
        graph = make_fx(function)(*held, *fakes)
    _expect_any_size(env)
    _reconnect(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fake(argument: Recorded, name: str, mode: Any) -> Tensor:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    value, axes = argument
    kinds = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(value.dim())]
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(value.detach(), source=ConstantSource(name), symbolic_context=context)


def _reconnect(graph: fx.GraphModule) -> None:
    """Undo the cuts that recording makes at results which the inner differentiation kept, such as that of tanh.

    With them, what is recorded has the right values and the wrong gradients.
    """
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)


def _expect_any_size(env: Any) -> None:
    """Raise if a size was found to matter; that two arguments agree in one is all that may be noted."""
    decided = [guard.expr for guard in env.guards if not _says_that_sizes_agree(guard.expr)]
    if decided:
        raise RuntimeError(f"the recording would only hold for sizes with {', '.join(map(str, decided))}")


def _says_that_sizes_agree(condition: Any) -> bool:
    """Whether an equation holds for all sizes that are the same, such as a = b or 3 a mod a = 0, and says no more."""
    import sympy

    sizes = condition.free_symbols
    return isinstance(condition, sympy.Eq) and all(
        bool(condition.subs(dict.fromkeys(sizes, number))) for number in (1, 2, 3, 5, 8, 21, 64, 101, 1000)
    )


def needs_compiler(what: str) -> None:
    """Refuse what cannot be done without a C++ compiler.

    Raises:
        ConfigError: If none is found.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ConfigError(
            f"{what}: no C++ compiler was found. Install g++ or clang++ (apt install g++, conda install gxx), or set "
            "the environment variable CXX."
        ) from None
