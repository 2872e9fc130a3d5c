"""What is special about Poly: values go by the tasks that come with the input."""

import pytest
import torch
from peft import PolyConfig

from dora_cache import attach
from dora_cache.recipes.examples import TARGETS, Example, make_model


def make():
    config = PolyConfig(r=2, n_tasks=3, n_skills=2, init_weights=False, target_modules=TARGETS)
    (plain, x), (model, _) = (make_model(Example("Poly", lambda *_: config)) for _ in range(2))
    return plain, model, torch.cat([x, x + 1, x.flip(0), -x])


BATCHES = (
    [0, 0, 0, 0],
    [2, 2, 2, 2],
    [0, 1, 2, 1],
    [0, 0, 0, 0],
    [-1, -1, -1, -1],
    [1],
    [0, 1, 2, 1],
)


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_batches_of_one_task_and_of_several(numerics, dtype):
    """Each batch is mixed for its own tasks, whatever came before."""
    plain, model, x = make()
    with attach(model, numerics=numerics) as cache, torch.no_grad():
        for tasks in BATCHES:
            ids = torch.tensor(tasks, dtype=dtype)
            expected, found = (
                one.base_model(x[: len(tasks)], task_ids=ids) for one in (plain, model)
            )
            if numerics == "peft":
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected)
        assert cache.stats().hits


def test_a_tensor_of_tasks_may_be_written_to():
    """Tasks are told apart by their numbers, not by the tensor that holds them."""
    plain, model, x = make()
    ids = torch.zeros(4, dtype=torch.long)
    with attach(model), torch.no_grad():
        for task in (0, 1, 0, 2):
            ids.fill_(task)
            assert torch.equal(model.base_model(x, task_ids=ids), plain.base_model(x, task_ids=ids))


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("tasks", [None, [3, 3, 3, 3], [0, 0], [[0, 0, 0, 0]], [True] * 4])
def test_errors_are_pefts(numerics, tasks):
    """Tasks that are missing, unknown, too few, or of another kind are as without a cache."""
    plain, model, x = make()
    ids = None if tasks is None else torch.tensor(tasks)
    with attach(model, numerics=numerics), torch.no_grad():
        outcomes = []
        for one in (plain, model):
            try:
                outcomes.append(one.base_model(x, task_ids=ids).tolist())
            except (ValueError, RuntimeError, IndexError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_warm_derives_every_task():
    """After warm() no task of a batch of one is derived."""
    _, model, x = make()
    with attach(model) as cache, torch.no_grad():
        assert cache.warm() == 6  # three tasks in each of two layers
        for task in range(3):
            model.base_model(x[:1], task_ids=torch.tensor([task]))
        assert cache.stats().misses == 6
