"""Adapters on base weights that quanto has quantized."""

import pytest
from field_setups import check, ids

from dora_cache.lab.field import setups


@pytest.mark.parametrize("setup", setups("optimum.quanto"), ids=ids)
@pytest.mark.parametrize("numerics", ["peft"])
def test_setup(setup, numerics):
    check(setup, numerics=numerics)
