"""Many-to-one merging: its limits (pairs, duplicates), and that a shuffled copy merges into the same function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emr_hf.alignment.layout import Group, Symmetries
from emr_hf.alignment.matching import match
from emr_hf.alignment.similarity import activation_similarity
from emr_hf.alignment.zipping import clusters, zip_similarities, zip_state, zippable
from emr_hf.errors import OptionError
from tests.test_matching import MODELS, axes, batches, contracted, linear, made, shuffled


def plain() -> tuple[nn.Sequential, Symmetries]:
    """Two hidden layers without norms."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    layouts = linear("0", "first", 5) | linear("2", "second", "first") | linear("4", 3, "second")
    groups = {"first": Group("first", 8), "second": Group("second", 6)}
    return model, Symmetries(groups, layouts, contracted(layouts))


def loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model.eval()


def paired(size: int) -> Tensor:
    """Each unit like its counterpart only."""
    return torch.eye(size).repeat(2, 2)


def test_which_groups_can_be_merged() -> None:
    found = {name: zippable(made(name)[1]) for name in MODELS}
    # LayerNorm, nested groups and a flattened axis are left to the permutation; BatchNorm works unit by unit.
    assert found == {
        "mlp": ("second",),
        "attention": (),
        "grouped_attention": (),
        "conv_batch_norm": ("first",),
        "group_norm": (),
    }


def test_a_group_along_two_axes_cannot_be_merged() -> None:
    groups = {"units": Group("units", 4)}
    layouts = {"in.weight": axes("units", 3), "mix.weight": axes("units", "units"), "out.weight": axes(2, "units")}
    assert zippable(Symmetries(groups, layouts, contracted(layouts))) == ()


# ---- clusters


def test_most_similar_units_are_joined_first() -> None:
    similarity = torch.tensor(
        [[1.0, 0.95, 0.2, 0.1], [0.95, 1.0, 0.3, 0.4], [0.2, 0.3, 1.0, 0.36], [0.1, 0.4, 0.36, 1.0]]
    )
    assert clusters(similarity, 3).tolist() == [0, 0, 1, 2]
    # 3 is nearest to 1 (.4), but on average nearer to 2 (.36) than to 0 and 1 together (.25).
    assert clusters(similarity, 2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(10))
def test_clusters_are_those_of_average_linkage(seed: int) -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    units = torch.randn(14, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity = torch.corrcoef(units)
    distance = squareform((1 - similarity).fill_diagonal_(0).numpy(), checks=False)
    expected = torch.from_numpy(fcluster(linkage(distance, "average"), 7, "maxclust"))
    found = clusters(similarity, 7)
    assert torch.equal(found[:, None] == found, expected[:, None] == expected)


# ---- merging


def test_pairs_give_the_plain_average() -> None:
    (a, spec), (b, _) = plain(), plain()
    similarities = {name: paired(group.size) for name, group in spec.groups.items()}
    zipped, _ = zip_state(a.state_dict(), b.state_dict(), spec, similarities)
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(zipped[name], (tensor + b.state_dict()[name]) / 2)


def test_duplicates_within_each_model_leave_both_whole() -> None:
    """Four different units twice in each model: eight clusters hold both models, whose outputs are averaged."""
    torch.manual_seed(0)
    (a, spec), (b, _) = plain(), plain()
    for model in (a, b):
        for layer in (model[0], model[2]):
            half = layer.out_features // 2
            layer.weight.data[half:] = layer.weight.data[:half]
            layer.bias.data[half:] = layer.bias.data[:half]
    # Each unit is like its double only.
    similarities = {
        name: torch.block_diag(*[torch.eye(group.size // 2).repeat(2, 2)] * 2) for name, group in spec.groups.items()
    }
    zipped = loaded(plain()[0], zip_state(a.state_dict(), b.state_dict(), spec, similarities)[0])
    data = torch.randn(50, 5)
    torch.testing.assert_close(zipped(data), (a(data) + b(data)) / 2)


@pytest.mark.parametrize("name", ["mlp", "conv_batch_norm", "attention"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_shuffled_copy_merges_into_the_same_function(name: str, weight: float) -> None:
    model, other, spec, example, _ = shuffled(name)
    activation = activation_similarity(model, other, spec, batches(example), within=True)
    n = {group: len(matrix) // 2 for group, matrix in activation.items()}
    across = {group: matrix[: n[group], n[group] :] for group, matrix in activation.items()}
    states = model.state_dict(), other.state_dict()
    permutation = match(*states, spec, across, weight).permutation
    similarities = zip_similarities(*states, spec, permutation, activation, weight)
    assert similarities.keys() == set(zippable(spec))
    zipped, _ = zip_state(states[0], spec.permute(states[1], permutation), spec, similarities)
    torch.testing.assert_close(loaded(other, zipped)(example), model(example), rtol=1e-4, atol=1e-5)


def test_similarities_are_in_the_permuted_order() -> None:
    model, other, spec, example, _ = shuffled("mlp")
    activation = activation_similarity(model, other, spec, batches(example), within=True)
    states = model.state_dict(), other.state_dict()
    permutation = match(*states, spec).permutation
    for weight in (0.0, 1.0):
        found = zip_similarities(*states, spec, permutation, activation, weight)["second"]
        torch.testing.assert_close(found[:10, 10:], found[:10, :10], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[10:, 10:], found[:10, :10], rtol=0, atol=1e-5)


def test_a_group_that_cannot_be_merged_is_refused() -> None:
    model, spec, _ = made("mlp")
    with pytest.raises(OptionError, match="first cannot be merged many to one; those that can: second"):
        zip_state(model.state_dict(), model.state_dict(), spec, {"first": paired(12)})


def test_dtypes_and_integers_are_the_first_models() -> None:
    model, spec, _ = made("conv_batch_norm")
    other = model.state_dict()
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in other.items()}
    zipped, _ = zip_state(state, other, spec, {"first": paired(10)})
    assert {name: tensor.dtype for name, tensor in zipped.items()} == {name: t.dtype for name, t in state.items()}
