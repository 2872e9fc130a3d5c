"""Adapters on base weights that hqq has quantized."""

import pytest
from field_setups import check, ids

from dora_cache.lab.field import setups


@pytest.mark.parametrize("setup", setups("hqq"), ids=ids)
@pytest.mark.parametrize("numerics", ["peft"])
def test_setup(setup, numerics):
    check(setup, numerics=numerics)
