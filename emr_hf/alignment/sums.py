"""What the aten operations that sum and multiply mean for the labels of their tensors; see `rules.py`."""

from __future__ import annotations

from torch import Tensor

from .atoms import divide, unite
from .rules import hold, optional, place_of, places_of, pointwise
from .tracing import Call, Dim, Label, NoRule, Trace, rule

# Sums, softmax, norms


@rule("sum", "mean", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm", "any", "all",
      "nansum", "var_mean", "std_mean")  # fmt: skip
def _reduce(trace: Trace, call: Call) -> None:
    """Over some dimensions, in whichever order."""
    label = trace.of(call["self"])
    places = places_of(call.get("dim"), len(label))
    keep = call.get("keepdim", False)
    for result in [call.result] if isinstance(call.result, Tensor) else call.result:
        out = [(place, Dim([]) if place in places else dim) for place, dim in enumerate(label)]
        out = [(place, dim) for place, dim in out if keep or place not in places]
        reduced = [dim for _, dim in out]
        trace.record((label, range(len(label))), (reduced, [place for place, _ in out]))
        trace.give(result, reduced)


@rule("max", "min")
def _extreme(trace: Trace, call: Call) -> None:
    """Over all, or along a dimension, with the place where it was found."""
    if call.get("other") is not None:
        return pointwise(trace, call)
    if "dim" in call.arguments:
        trace.freeze([trace.of(call["self"])[call["dim"]]], f"order met in {call.name}")
    return _reduce(trace, call)


@rule("argmax", "argmin")
def _arg(trace: Trace, call: Call) -> None:
    label = trace.of(call["self"])
    hold(trace, label, places_of(call.get("dim"), len(label)), f"order met in {call.name}")
    _reduce(trace, call)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(trace: Trace, call: Call) -> None:
    """Along a dimension, in whichever order; each value depends on all of them."""
    label = trace.of(call["self"])
    out = [Dim(dim.factors) for dim in label]
    trace.record((label, range(len(label))), (out, range(len(out))), mixed=places_of(call["dim"], len(label)))
    trace.give(call.first, out)


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(trace: Trace, call: Call) -> None:
    """Over the last dimensions; weight and bias `(*normalized_shape)`."""
    label = trace.of(call["input"])
    parameters = [found for name in ("weight", "bias") for found in optional(trace, call.get(name))]
    out = [Dim(dim.factors) for dim in trace.broadcast([label, *parameters], len(label))]
    last = range(-len(call["normalized_shape"]), 0)
    trace.record(*((each, range(-len(each), 0)) for each in (label, *parameters, out)), mixed=last)
    trace.give(call.first, out)
    for statistic in call.result[1:]:
        trace.give(statistic, [Dim([]) if place - len(out) in last else dim for place, dim in enumerate(out)])


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
      "_batch_norm_with_update", "_native_batch_norm_legit_functional", "cudnn_batch_norm")  # fmt: skip
def _batch_norm(trace: Trace, call: Call) -> None:
    """`(N, C, *)` with weight, bias, mean and variance `(C)`."""
    label = trace.of(call["input"])
    names = ("weight", "bias", "running_mean", "running_var")
    statistics = [found for name in names for found in optional(trace, call.get(name))]
    factors = label[1].factors
    for (dim,) in statistics:
        factors = unite(factors, dim.factors)
    out = [Dim(dim.factors, dim.sources) for dim in label]
    out[1] = Dim(factors, label[1].sources)
    # Where the batch's own statistics are used, values depend on each other along all other dimensions.
    mixed = [place for place in range(len(label)) if place != 1]
    trace.record((label, range(len(label))), (out, range(len(out))), *((each, [1]) for each in statistics),
                 mixed=mixed)  # fmt: skip
    trace.give(call.first, out)


@rule("native_group_norm")
def _group_norm(trace: Trace, call: Call) -> None:
    """`(N, C, *)` over `C / G` channels of each group and `*`; weight and bias `(C)`."""
    label, groups = trace.of(call["input"]), call["group"]
    parameters = [found for name in ("weight", "bias") for found in optional(trace, call.get(name))]
    channels = label[1].factors
    for (dim,) in parameters:
        channels = unite(channels, dim.factors)
    group, within = divide(channels, [groups, call["C"] // groups])
    out = [label[0], Dim([*group, *within]), *(Dim(dim.factors) for dim in label[2:])]
    apart = [label[0], Dim(group), Dim(within), *label[2:]]
    indices = ["batch", "group", "channel", *range(2, len(label))]
    trace.record((apart, indices), *(([Dim(group), Dim(within)], ["group", "channel"]) for _ in parameters),
                 mixed=indices[2:])  # fmt: skip
    trace.give(call.first, out)


@rule("_weight_norm_interface")
def _weight_norm(trace: Trace, call: Call) -> None:
    """`v * g / |v|`, the norm over all dimensions but one, along which alone `g` is longer than 1."""
    direction, length = trace.of(call["v"]), trace.of(call["g"])
    out = trace.broadcast([direction, length], len(direction))
    place = place_of(call["dim"], len(out))
    out = [Dim(dim.factors, source.sources) for dim, source in zip(out, direction)]
    trace.record(*((each, range(len(each))) for each in (direction, length, out)),
                 mixed=[other for other in range(len(out)) if other != place])  # fmt: skip
    trace.give(call.first, out)


# Products


def _product(trace: Trace, call: Call, left: str, right: str, equation: str) -> None:
    """`equation` as in `einsum`; a third tensor, if any, is broadcast against the result and added."""
    terms, result = equation.split("->")
    a, b = (trace.of(call[name]) for name in (left, right))
    one, two = terms.split(",")
    dims: dict[str, Dim] = dict(zip(one, a))
    for index, dim in zip(two, b):
        if index not in dims:
            dims[index] = dim
        elif index in result:
            dims[index] = Dim(unite(dims[index].factors, dim.factors))
        else:
            trace.contract(dims[index], dim)
    out = [Dim(dims[index].factors) for index in result]
    operands: list[tuple[Label, str]] = [(a, one), (b, two)]
    added = call.get("bias") if "bias" in call.arguments else (call.get("self") if left != "self" else None)
    for label in optional(trace, added):
        out = [Dim(dim.factors) for dim in trace.broadcast([out, label], len(out))]
        operands.append((label, result[len(result) - len(label) :]))
    trace.record(*operands, (out, result))
    trace.give(call.first, out)


@rule("mm")
def _mm(trace: Trace, call: Call) -> None:
    _product(trace, call, "self", "mat2", "mk,kn->mn")


@rule("addmm", "_addmm_activation")
def _addmm(trace: Trace, call: Call) -> None:
    _product(trace, call, "mat1", "mat2", "mk,kn->mn")


@rule("bmm")
def _bmm(trace: Trace, call: Call) -> None:
    _product(trace, call, "self", "mat2", "bmk,bkn->bmn")


@rule("baddbmm")
def _baddbmm(trace: Trace, call: Call) -> None:
    _product(trace, call, "batch1", "batch2", "bmk,bkn->bmn")


@rule("mv")
def _mv(trace: Trace, call: Call) -> None:
    _product(trace, call, "self", "vec", "mk,k->m")


@rule("dot", "vdot")
def _dot(trace: Trace, call: Call) -> None:
    _product(trace, call, "self", "tensor" if "tensor" in call.arguments else "other", "k,k->")


@rule("linear")
def _linear(trace: Trace, call: Call) -> None:
    batch = "abcdefgh"[: call["input"].dim() - 1]
    _product(trace, call, "input", "weight", f"{batch}k,nk->{batch}n")


@rule("_grouped_mm")
def _grouped_mm(trace: Trace, call: Call) -> None:
    """`(T, K)` times `(E, K, N)`: each run of rows, up to its offset, by its expert's matrix."""
    a, b = trace.of(call["self"]), trace.of(call["mat2"])
    if len(a) != 2 or len(b) != 3 or call.get("bias") is not None:
        raise NoRule("no rule for this form of aten._grouped_mm")
    trace.freeze([a[0], b[0], *(dim for label in optional(trace, call.get("offs")) for dim in label)], "expert rows")
    trace.contract(a[1], b[1])
    out = [Dim(a[0].factors), Dim(b[2].factors)]
    trace.record((a, "tk"), (b, "ekn"), (out, "tn"))
    trace.give(call.first, out)


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(trace: Trace, call: Call) -> None:
    """`(N, C, *)` by `(O, C / groups, *)`, or transposed by `(C, O / groups, *)`: an index for the group, one for the
    channel within it, on either side."""
    label, weight = trace.of(call["input" if "input" in call.arguments else "self"]), trace.of(call["weight"])
    groups, transposed = call["groups"], call.get("transposed", False)
    if len(label) != call.first.dim() or len(label) != len(weight):
        raise NoRule(f"no rule for this form of {call.name}")
    trace.freeze(label[2:], "along space or time")
    trace.freeze(weight[2:], "within a kernel")
    inputs = divide(label[1].factors, [groups, label[1].size // groups])
    rows = divide(weight[0].factors, [groups, weight[0].size // groups])
    ins, outs = (rows[1], weight[1].factors) if transposed else (weight[1].factors, rows[1])
    group = unite(inputs[0], rows[0])
    trace.contract(Dim(inputs[1], label[1].sources), Dim(ins, weight[0 if transposed else 1].sources))
    for (dim,) in optional(trace, call.get("bias")):
        biases = divide(dim.factors, [groups, dim.size // groups])
        group, outs = unite(group, biases[0]), unite(outs, biases[1])
    space = trace.fixed(call.first.shape[2:], "along space or time")
    _note_convolution(trace, label, [Dim(group), Dim(inputs[1]), Dim(outs)], bool(optional(trace, call.get("bias"))))
    trace.give(call.first, [label[0], Dim([*group, *outs]), *space])


def _note_convolution(trace: Trace, label: Label, channels: Label, biased: bool) -> None:
    group, ins, outs = channels
    operands: list[tuple[Label, str]] = [
        ([label[0], group, ins], "ngi"), ([group, ins, outs], "gio"), ([label[0], group, outs], "ngo")
    ]  # fmt: skip
    trace.record(*operands, *([([group, outs], "go")] if biased else []))


# Attention in one operation


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def _attention(trace: Trace, call: Call) -> None:
    """`(B, H, L, D)`, `(B, H, S, D)`, `(B, H, S, E)` and a mask broadcast to `(B, H, L, S)` give `(B, H, L, E)`."""
    if call.get("dropout_p"):
        raise NoRule("attention with dropout")
    query, key, value = (trace.of(call[name]) for name in ("query", "key", "value"))
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    key, value = (_shared_by_queries(each, query[1].size) for each in (key, value))
    if call.get("is_causal"):
        trace.freeze([query[2], key[2]], "causal attention")
    batch, heads = (trace.broadcast([query[i:i + 1], key[i:i + 1], value[i:i + 1]], 1)[0] for i in (0, 1))  # fmt: skip
    units, keys = Dim(unite(query[3].factors, key[3].factors)), Dim(unite(key[2].factors, value[2].factors))
    scores = [batch, heads, query[2], keys]
    masks = optional(trace, mask)
    scores = trace.broadcast([scores, *masks], 4)
    out = [scores[0], scores[1], scores[2], Dim(value[3].factors)]
    trace.record((query, "bhld"), (key, "bhsd"), (value, "bhse"), (scores, "bhls"), (out, "bhle"),
                 *((label, "bhls"[4 - len(label):]) for label in masks), mixed="s")  # fmt: skip
    trace.contract(units)
    trace.give(call.first, out)


def _shared_by_queries(label: Label, heads: int) -> Label:
    """Keys or values of which each head serves several heads of queries."""
    if label[1].size == heads:
        return label
    return [label[0], Dim([*label[1].factors, heads // label[1].size]), *label[2:]]
