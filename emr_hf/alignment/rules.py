"""What each aten operation means for the labels of its tensors.

Shapes are written as in PyTorch's documentation. Operations are named without `aten.` and without the underscore of
their in-place form; all those that PyTorch tags as pointwise have the rule named so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .atoms import cut, divide, free, frozen, joined, resolved, unite
from .tracing import Call, Dim, Label, NoRule, Trace, rule


def place_of(dim: int, dims: int) -> int:
    """A dimension counted from the front, of a tensor of so many."""
    return dim % max(dims, 1)


def places_of(dims: int | Sequence[int] | None, count: int) -> list[int]:
    """Dimensions as an operation takes them: one, several, or none for all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(count))
    return [place_of(dim, count) for dim in ([dims] if isinstance(dims, int) else dims)]


def optional(trace: Trace, tensor: Tensor | None) -> list[Label]:
    """The label of an argument that may be left out."""
    return [] if tensor is None else [trace.of(tensor)]


# Elementwise


@rule("pointwise", "masked_fill", "copy", "_prelu_kernel", "hardswish")
def pointwise(trace: Trace, call: Call) -> None:
    """Broadcast against each other; the result is ordered as all of them."""
    operands, result = list(call.tensors()), call.first
    if torch.broadcast_shapes(*(tensor.shape for tensor in operands)) != result.shape:
        raise NoRule(f"no rule for {call.name} of these shapes")
    labels = [trace.of(tensor) for tensor in operands]
    out = trace.broadcast(labels, result.dim())
    trace.record(*((label, range(-len(label), 0)) for label in labels), (out, range(-len(out), 0)))
    trace.give(result, out)


@rule("_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "lift", "contiguous")
def _same(trace: Trace, call: Call) -> None:
    trace.rearranged(call.first, list(trace.of(call["self"])))


@rule("fill", "zero")
def _filled(trace: Trace, call: Call) -> None:
    """One value everywhere: what label the tensor had still holds."""
    if isinstance(call.get("value"), Tensor) and call["value"].dim():
        raise NoRule(f"no rule for {call.name} with a tensor")


@rule("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros",
      "new_ones", "new_full", "scalar_tensor", "empty_permuted", "empty_strided", "new_empty_strided")  # fmt: skip
def _made(trace: Trace, call: Call) -> None:
    """One value everywhere. Its dimensions get labels of their own, and do not pass as constant: what is written into
    the tensor later needs a label that all its views share."""
    trace.give(call.first, [Dim(free(count)) for count in call.first.shape])


@rule("glu")
def _glu(trace: Trace, call: Call) -> None:
    """`a * sigmoid(b)` of the halves `a` and `b` along a dimension."""
    label = trace.of(call["self"])
    place = place_of(call["dim"], len(label))
    half = label[place].size // 2
    left, right = cut(label[place].factors, [half, half])
    out = [Dim(dim.factors) for dim in label]
    out[place] = Dim(unite(left, right))
    trace.rearranged(call.first, out)


# Rearrangements


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _view(trace: Trace, call: Call) -> None:
    """Dimensions split and joined: each run of dimensions of the argument that is a run of the result's by itself."""
    label, shape = trace.of(call["self"]), call.first.shape
    if 0 in shape or call["self"].numel() != shape.numel():
        raise NoRule("an empty tensor is viewed, or a tensor of another type")
    out: Label = []
    taken = 0
    for stop, lengths in _runs([dim.size for dim in label], shape):
        run, taken = label[taken:stop], stop
        sources = frozenset().union(*(dim.sources for dim in run))
        if len(lengths) == len(run) == 1:
            out += run
            continue
        factors = [factor for dim in run for factor in dim.factors]
        if len(lengths) == 1 and _is_one_part(run):
            out.append(Dim(factors, sources))
        else:
            out += [Dim(piece, sources if count > 1 else frozenset()) for piece, count in
                    zip(divide(factors, lengths), lengths)]  # fmt: skip
    trace.rearranged(call.first, out)


def _is_one_part(run: Label) -> bool:
    """Whether dimensions are joined of which only one is longer than 1."""
    return sum(dim.size > 1 for dim in run) <= 1


def _runs(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
    """Shortest runs with the same product: where the run ends in `before`, and the sizes it has in `after`."""
    i = j = 0
    while i < len(before) or j < len(after):
        left = right = 1
        start = j
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        yield i, list(after[start:j])


@rule("as_strided")
def _restrided(trace: Trace, call: Call) -> None:
    """Only where neither sizes nor strides change, but for dimensions of size 1: pooling does that to its result."""
    sizes = [dim.size for dim in trace.of(call["self"])]
    if not call.strides or call.get("storage_offset") is not None or sizes != list(call["size"]):
        raise NoRule("no rule for aten.as_strided")
    if any(a != b for count, a, b in zip(sizes, call.strides[0], call["stride"]) if count != 1):
        raise NoRule("no rule for aten.as_strided")


@rule("permute")
def _permute(trace: Trace, call: Call) -> None:
    label = trace.of(call["self"])
    trace.rearranged(call.first, [label[dim] for dim in call["dims"]])


@rule("t", "transpose", "numpy_T", "mT")
def _transpose(trace: Trace, call: Call) -> None:
    label = list(trace.of(call["self"]))
    if call.first is call["self"]:
        raise NoRule("transposed in place")
    if len(label) >= 2:
        a, b = call.get("dim0", 0), call.get("dim1", 1)
        label[a], label[b] = label[b], label[a]
    trace.rearranged(call.first, label)


@rule("unsqueeze", "squeeze")
def _unsqueeze(trace: Trace, call: Call) -> None:
    """Dimensions of size 1 come or go."""
    if call.first is call["self"]:
        raise NoRule("squeezed in place")
    long = [dim for dim in trace.of(call["self"]) if dim.size != 1]
    trace.rearranged(call.first, [Dim([]) if count == 1 else long.pop(0) for count in call.first.shape])


@rule("expand")
def _expand(trace: Trace, call: Call) -> None:
    """Along an expanded dimension the tensor is constant."""
    label, shape = trace.of(call["self"]), call.first.shape
    label = [Dim([])] * (len(shape) - len(label)) + label
    trace.rearranged(call.first, [dim if dim.size == count else Dim([count]) for dim, count in zip(label, shape)])


@rule("repeat")
def _repeat(trace: Trace, call: Call) -> None:
    """The whole tensor over and over: which copy is the outer factor, and makes no difference."""
    label = trace.of(call["self"])
    label = [Dim([])] * (len(call["repeats"]) - len(label)) + label
    trace.rearranged(call.first, [
        dim if count == 1 else Dim(resolved([count, *dim.factors])) for dim, count in zip(label, call["repeats"])
    ])  # fmt: skip


@rule("cat")
def _cat(trace: Trace, call: Call) -> None:
    """One behind the other along a dimension, and ordered alike along the others."""
    tensors = [tensor for tensor in call["tensors"] if tensor.shape != (0,)] or call["tensors"][:1]
    labels = [trace.of(tensor) for tensor in tensors]
    place = place_of(call["dim"], len(labels[0]))
    out = trace.broadcast([[*label[:place], *label[place + 1 :]] for label in labels], len(labels[0]) - 1)
    out.insert(place, Dim(joined([label[place].factors for label in labels])))
    trace.rearranged(call.first, out)


@rule("stack")
def _stack(trace: Trace, call: Call) -> None:
    """A new dimension that tells the tensors apart, which stay in their order."""
    labels = [trace.of(tensor) for tensor in call["tensors"]]
    out = trace.broadcast(labels, len(labels[0]))
    out.insert(place_of(call["dim"], len(out) + 1), Dim(frozen(len(labels), "stacked")))
    trace.rearranged(call.first, out)


@rule("slice")
def _slice(trace: Trace, call: Call) -> None:
    """A piece of a concatenation; strided, it takes units by their place."""
    label = list(trace.of(call["self"]))
    place = place_of(call["dim"], len(label))
    count, kept = label[place].size, call.first.shape[place]
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(count)
    if kept != count:
        if step != 1 or kept == 0:
            hold(trace, label, [place], f"strided {call.name}")
            label[place] = Dim(frozen(kept, f"strided {call.name}"))
        else:
            sizes = [start, kept, count - stop]
            pieces = iter(cut(label[place].factors, [size for size in sizes if size]))
            label[place] = Dim([next(pieces) if size else [] for size in sizes][1], label[place].sources)
    trace.rearranged(call.first, label)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "split_copy", "split_with_sizes_copy")
def _split(trace: Trace, call: Call) -> None:
    """The pieces of a concatenation."""
    label = trace.of(call["self"])
    place = place_of(call["dim"], len(label))
    pieces = cut(label[place].factors, [tensor.shape[place] for tensor in call.result])
    for tensor, piece in zip(call.result, pieces):
        out = list(label)
        out[place] = Dim(piece, label[place].sources)
        trace.rearranged(tensor, out)


@rule("select", "unbind")
def _select(trace: Trace, call: Call) -> None:
    """Units taken by their place along one dimension, which goes."""
    label = list(trace.of(call["self"]))
    place = place_of(call.get("dim", 0), len(label))
    for tensor in [call.result] if isinstance(call.result, Tensor) else call.result:
        trace.rearranged(tensor, label[:place] + label[place + 1 :])
        trace.defer(tensor, [label[place]], f"taken by place in {call.name}")


def hold(trace: Trace, label: Label, places: Iterable[int], reason: str) -> None:
    """Keep the order along some of the dimensions."""
    trace.freeze([label[place] for place in places], reason)


def hold_along(trace: Trace, call: Call, places: Iterable[int], reason: str, key: str = "self") -> None:
    """The result of an operation that works along some dimensions, by place, and row by row along the others."""
    label = trace.of(call[key])
    places = set(places)
    hold(trace, label, places, reason)
    for result in [call.result] if isinstance(call.result, Tensor) else call.result:
        if result.dim() != len(label):
            raise NoRule(f"no rule for this form of {call.name}")
        out = [
            Dim(frozen(count, reason)) if place in places else dim
            for place, (dim, count) in enumerate(zip(label, result.shape))
        ]
        trace.rearranged(result, out)


@rule("roll", "flip", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk", "argsort")
def _by_place(trace: Trace, call: Call) -> None:
    dims = call.get("dims", call.get("dim"))
    hold_along(trace, call, places_of(dims, call["self"].dim()), f"order met in {call.name}")


@rule("tril", "triu")
def _triangle(trace: Trace, call: Call) -> None:
    dims = call["self"].dim()
    hold_along(trace, call, (dims - 2, dims - 1), f"order met in {call.name}")


@rule("constant_pad_nd")
def _pad(trace: Trace, call: Call) -> None:
    pad, dims = call["pad"], call["self"].dim()
    padded = [dims - 1 - index // 2 for index, count in enumerate(pad) if count]
    hold_along(trace, call, padded, "padded")


# By index


@rule("embedding")
def _embedding(trace: Trace, call: Call) -> None:
    """`(..., columns)`: rows of a `(rows, columns)` table."""
    rows, columns = trace.of(call["weight"])
    trace.freeze([rows], "rows of an embedding")
    trace.kept |= columns.sources
    trace.rearranged(call.first, [*trace.of(call["indices"]), Dim(columns.factors)])


@rule("index_select")
def _index_select(trace: Trace, call: Call) -> None:
    trace.freeze(trace.of(call["index"]), "an index")
    hold_along(trace, call, [place_of(call["dim"], call["self"].dim())], "taken by index")


@rule("index")
def _index(trace: Trace, call: Call) -> None:
    """`tensor[i, :, j]`: the indices' dimensions stand where the indexed ones stood if those are neighbours, else
    in front. A mask indexes as many dimensions as it has."""
    label = trace.of(call["self"])
    indexed: list[int] = []
    place = 0
    for index in call["indices"]:
        if index is None:
            place += 1
            continue
        trace.freeze(trace.of(index), "an index")
        width = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        indexed += range(place, place + width)
        place += width
    hold(trace, label, indexed, "taken by index")
    rest = [dim for place, dim in enumerate(label) if place not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    before = indexed[0] if adjacent and not _index_gap(call["indices"]) else 0
    fresh = call.first.shape[before : before + call.first.dim() - len(rest)]
    trace.rearranged(call.first, [*rest[:before], *trace.fixed(fresh, "taken by index"), *rest[before:]])


def _index_gap(indices: Sequence[Any]) -> bool:
    """Whether a `None` stands between two indices."""
    held = [place for place, index in enumerate(indices) if index is not None]
    return held[-1] - held[0] + 1 != len(held)


@rule("gather")
def _gather(trace: Trace, call: Call) -> None:
    """`out[i][j] = self[index[i][j]][j]` along dimension 0: ordered alike along the others."""
    label, index = trace.of(call["self"]), trace.of(call["index"])
    place = place_of(call["dim"], len(label))
    hold(trace, label, [place], "taken by index")
    # Row by row of an index that is the same in all rows is row by row of the tensor.
    for other, (ours, theirs) in enumerate(zip(label, index)):
        if ours.size != theirs.size or (other == place):
            trace.freeze([ours, theirs], "taken by index")
    out = [
        Dim(frozen(theirs.size, "taken by index")) if place == other or ours.size != theirs.size
        else Dim(unite(ours.factors, theirs.factors))
        for other, (ours, theirs) in enumerate(zip(label, index))
    ]  # fmt: skip
    trace.record((label, range(len(label))), (index, range(len(index))), (out, range(len(out))))
    trace.give(call.first, out)


@rule("index_add", "index_copy")
def _index_add(trace: Trace, call: Call) -> None:
    """Rows added to rows, by index."""
    label, source = list(trace.of(call["self"])), trace.of(call["source"])
    if len(source) != len(label):
        raise NoRule(f"no rule for this form of {call.name}")
    place = place_of(call["dim"], len(label))
    trace.freeze([label[place], source[place], *trace.of(call["index"])], "taken by index")
    out = [
        Dim(dim.factors if other == place else unite(dim.factors, source[other].factors))
        for other, dim in enumerate(label)
    ]
    trace.record(*((each, range(len(each))) for each in (label, source, out)))
    trace.give(call.first, out)


# Along space


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d",
      "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
      "_upsample_nearest_exact2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "reflection_pad1d",
      "reflection_pad2d", "replication_pad1d", "replication_pad2d", "max_pool2d")  # fmt: skip
def _spatial(trace: Trace, call: Call) -> None:
    """`(N, C, *)` channel by channel."""
    key = "self" if "self" in call.arguments else "input"
    name = call.name.removeprefix("aten.")
    width = next(int(digit) for digit in name if digit in "123")
    dims = call[key].dim()
    hold_along(trace, call, range(dims - width, dims), "along space or time", key)
