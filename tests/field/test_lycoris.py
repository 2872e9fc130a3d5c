"""LyCORIS' own modules."""

import pytest
from field_setups import check, ids

from dora_cache.lab.field import setups


@pytest.mark.parametrize("setup", setups("lycoris"), ids=ids)
def test_setup(setup):
    check(setup)
