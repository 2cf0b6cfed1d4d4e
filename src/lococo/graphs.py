"""Functions compiled into one graph each, and written for a CPU that reads one row at a time, or a few."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lococo import loops
from lococo.errors import LococoError

# States of a model's modules that are compiled for; whoever brings more changes something with every step.
MOST_STATES = 8

# What a hook of lococo's own is marked with.
COMPILES = "lococo_compiles"

# Where transformers' hooks come from that take down what a call asks for.
CAPTURING = "transformers.utils.output_capturing"


class Graphs:
    """A function of a model's modules as compiled graphs, one for each state of the modules that a call has met.

    torch.compile looks through every attribute and tensor that the function reads before each call, which takes a fifth
    of the time of a decoding step. Here it looks at none; `kind` and the modules' attributes, compared as whole
    dictionaries, decide which graph is called. What that cannot tell apart runs as it is written: users' hooks, which
    may look at anything, and modules whose attributes change again and again.
    """

    def __init__(self, function: Callable[..., Any], root: nn.Module) -> None:
        """Compile nothing yet; `root` holds all modules that the function reads."""
        self.function = function
        self.root = root
        self._known: dict[Any, list[tuple[_State, Callable[..., Any]]]] = {}

    def __call__(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the function's graph.

        Args:
            kind: What the function asks of its arguments, hashable; of tensors, but the modules', see `kind_of`.
            *args: Of the function.
            **kwargs: Of the function.

        Raises:
            LococoError: Where there is no compiler.
        """
        known = self._known.setdefault(kind, [])
        graph = None if _anyones_hooks() else next((graph for state, graph in known if state.holds()), None)
        if graph is None:
            if _anyones_hooks() or any(map(_hooked, self.root.modules())) or len(known) == MOST_STATES:
                return self.function(*args, **kwargs)
            graph = compiled(_copied(self.function), guards=_of_the_process)
            known.append((_State(self.root), graph))
        return graph(*args, **kwargs)


def marked(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook, marked as one that does the same whenever a call's `kind` is the same, and so may be compiled."""
    setattr(hook, COMPILES, True)
    return hook


def _hooked(module: nn.Module) -> bool:
    """Tell whether a module has hooks that are not `marked`.

    transformers leaves some behind wherever hidden states or attention maps were once asked for; they do nothing in
    calls that ask for none, and no others are compiled.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(getattr(hook, COMPILES, False) or getattr(hook, "__module__", "") == CAPTURING for hook in hooks)


def _anyones_hooks() -> bool:
    """Tell whether there are hooks of all modules of the process."""
    every = nn.modules.module
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks)


class _State:
    """What the attributes of a module, of all modules in it and of their configurations were."""

    def __init__(self, root: nn.Module) -> None:
        owners = list(root.modules())
        configs = {id(owner.config): owner.config for owner in owners if hasattr(owner, "config")}
        self.attributes = [vars(owner) for owner in (*owners, *configs.values())]
        self.then = [{name: _shallow(name, value) for name, value in each.items()} for each in self.attributes]
        self.tensors = [each for owner in owners for each in (owner._parameters, owner._buffers) if each]
        self.kinds = self._kinds()

    def _kinds(self) -> list[Any]:
        return [
            (type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
            for each in self.tensors
            for tensor in each.values()
            if tensor is not None
        ]

    def holds(self) -> bool:
        """Tell whether they are still what they were; what a tensor holds does not count."""
        try:
            return self.attributes == self.then and self._kinds() == self.kinds
        except (RuntimeError, ValueError):  # an array has taken the place of another, and they are compared by number
            return False


def _shallow(name: str, value: Any) -> Any:
    # Parameters and buffers reach the graph anew with each call; of them their kinds alone count.
    if name in ("_parameters", "_buffers") or not isinstance(value, dict | list | set):
        return value
    return copy.copy(value)


def kind_of(tensor: Tensor) -> Any:
    """Return what a graph is compiled for, of a tensor."""
    strides = None if tensor.is_contiguous() else tensor.stride()  # of a dimension of 1, strides may be anything
    return tensor.dtype, tensor.device, tensor.shape, strides, tensor.is_inference()


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile does not take for the same."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def _of_the_process(guards: Any) -> list[bool]:
    """Keep what is said of the state of the whole process, such as autocast and threads."""
    return [guard.guard_type == "GLOBAL_STATE" for guard in guards]


def compiled(function: Callable[..., Any], guards: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a function as one graph, compiled by the first call of each kind.

    Args:
        function: What to compile.
        guards: Which of torch.compile's checks of a call are made; None: all.

    Raises:
        LococoError: Of the call, where there is no compiler.
    """
    options: dict[str, Any] | None = None if guards is None else {"guard_filter_fn": guards}
    graph = torch.compile(function, backend=_backend, fullgraph=True, dynamic=False, options=options)

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return graph(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = " ".join(str(error).split())[:200]
            raise LococoError(f"decoding could not be compiled ({reason}); leave out compiled") from error

    return called


def linear_step(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a row (d) by a matrix, compiled: the last step of a decoder, from hidden states to logits."""
    kinds = tuple(None if each is None else kind_of(each) for each in (row, weight, bias))
    return cast(Tensor, _linear(kinds, torch.is_grad_enabled(), torch.is_inference_mode_enabled())(row, weight, bias))


@functools.lru_cache(maxsize=64)
def _linear(*kind: Any) -> Callable[..., Any]:
    """Return a function of its own for each kind, since torch.compile gives one up after a few."""

    def linear(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(row, weight, bias)

    return compiled(_copied(linear))


@torch.library.custom_op("lococo::kept", mutates_args=())
def kept(values: Tensor) -> Tensor:
    """Return values as they are, and have the compiler write them down rather than compute them wherever they are read.

    Its loops are made of whole expressions: a row times a matrix would take the norm before it once per row of the
    matrix, and attention the sine and cosine of the query once per slot.
    """
    return values.clone()


@kept.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.lowering import lowerings, register_lowering

    if torch.ops.lococo.kept.default not in lowerings:
        register_lowering(torch.ops.lococo.kept, type_promotion_kind=None)(_written_down)
    if not any(isinstance(each, Tensor) and each.device.type != "cpu" for each in inputs):
        _write_for_cpu(graph.graph)
        graph.recompile()
    # Sizes were compared before the call, in one go (`Graphs`); the graph would do it again, tensor by tensor.
    return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches={"size_asserts": False}))


def _write_for_cpu(graph: torch.fx.Graph) -> None:
    """Put loops in place of functions that are slow for one row; a row that meets several matrices is kept once."""
    rows: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _ON_CPU:
            continue
        if node.target is functional.linear:
            row, *others = node.args
            if row not in rows:
                with graph.inserting_after(row):
                    rows[row] = graph.call_function(_row_kept, (row,))
            node.args = (rows[row], *others)
        node.target = _ON_CPU[node.target]


def _written_down(values: Any) -> Any:
    values.realize()
    return values


def _row_times_matrix(row: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply one row, see `_row_kept`, by a matrix as products and sums; a few as `loops.few_rows` does.

    The compiler makes one loop of them that reads weights as fast as memory gives them; the libraries' own products of
    matrices, made for many rows, reach half of that here (docs/log.md).
    """
    if _is_one_row(row):
        product = (row.reshape(1, -1) * weight).sum(-1).view(*row.shape[:-1], -1)
    elif loops.multiplies(row, weight):
        product = loops.few_rows(row, weight)
    else:
        return functional.linear(row, weight, bias)
    product = product.to(weight.dtype)
    return product if bias is None else product + bias


def _row_kept(row: Tensor) -> Tensor:
    """Return what `_row_times_matrix` takes, in float32; more than one row are left as they are."""
    return cast(Tensor, kept(row.float())) if _is_one_row(row) else row


def _is_one_row(row: Tensor) -> bool:
    return row.numel() == row.shape[-1]


def _attention_of_one_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with one query per head as products and sums, which are compiled into few loops."""
    if query.shape[2] != 1 or dropout_p or enable_gqa:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (kept(query.float() * scale) * key.float()).sum(-1)  # (b h s)
    logits = logits if attn_mask is None else logits + attn_mask[:, :, 0].float()
    weights = cast(Tensor, kept(logits.softmax(-1)))
    return (weights[..., None] * value.float()).sum(2, keepdim=True).to(query.dtype)


# What a graph for a CPU has in place of functions that are slow for one row.
_ON_CPU: dict[Any, Any] = {
    functional.linear: _row_times_matrix,
    functional.scaled_dot_product_attention: _attention_of_one_query,
}
