"""Adapters in models that accelerate has put hooks on, or whose weights it offloads."""

import pytest
from field_setups import check, ids

from dora_cache.lab.field import setups


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("numerics", ["peft"])
@pytest.mark.parametrize("setup", setups("accelerate"), ids=ids)
def test_setup(setup, numerics):
    check(setup, numerics=numerics)
