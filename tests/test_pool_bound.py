"""The way of a GPU, with PyTorch's operations in place of the kernels: layers are bound."""

import pytest
import torch
from pool_oracle import tokens
from test_pool import (  # noqa: F401 - run here as well
    llama_folders,
    net_folders,
    served,
    test_a_flat_batch_of_tokens,
    test_a_use_that_has_not_run_yet_ends_with_the_old_one,
    test_a_write_to_the_base_weights,
    test_any_order_of_rows,
    test_evictions_between_batches,
    test_generate,
    test_gradients_through_the_input,
    test_kinds_of_a_language_model,
    test_layers_called_by_themselves,
    test_other_dtypes,
    test_the_model_moves_to_another_dtype,
    test_threads_do_not_see_each_others,
    test_two_pools_nested,
    test_views_and_other_layouts,
)

from dora_cache import ConfigError
from dora_cache.serving import kernels, layers, routing


class Launches:
    """Stands in for the kernels of one layer; counts how often a bound layer has run them."""

    again_count = 0

    def again(self, y, x, route, layer, _):
        """Do what the kernels do."""
        Launches.again_count += 1
        return adapt(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), route, layer)


def adapt(y, x, route, layer, _=None):
    """Write what the adapters make of ``y`` to it."""
    assert y.is_contiguous()
    assert x.is_contiguous()
    changed = route.pool._by_index[layer]._sorted(y, x, route)
    if changed.data_ptr() != y.data_ptr():
        y.copy_(changed)
    return True


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda *_: True)
    monkeypatch.setattr(kernels, "adapt_", adapt)
    monkeypatch.setattr(kernels, "launches", lambda *_: Launches())
    monkeypatch.setattr(layers, "current_device", lambda: -1)
    monkeypatch.setattr(routing.Route, "rows", lambda route, _: route)
    Launches.again_count = 0


def test_the_second_forward_is_bound(served):  # noqa: F811
    """The linear layers are bound by the first forward, and stay so in other batches."""
    names = [*served.folders, None]
    served.check(names)
    assert not Launches.again_count
    served.check(names)
    linear = Launches.again_count
    assert linear > 0
    served.check(names[::-1])
    assert Launches.again_count == 2 * linear


def test_a_bound_layer_is_of_one_number_of_names(served):  # noqa: F811
    """What has been checked for a batch of some rows is not taken for checked in another's."""
    names = list(served.folders)[:4]
    served.check(names)
    served.check(names)
    before = Launches.again_count
    with served.pool.use(names[:3]), torch.no_grad(), pytest.raises(ConfigError):
        served.model.head(torch.zeros(4, 8, dtype=torch.float64))
    served.check(names[:2], tokens(2))
    assert Launches.again_count == before
