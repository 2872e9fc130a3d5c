"""Adapters in models of diffusers whose weights are offloaded or cast by hooks."""

import pytest
from field_setups import check, ids

from dora_cache.lab.field import of_diffusers_hooks


@pytest.mark.parametrize("setup", of_diffusers_hooks.SETUPS, ids=ids)
def test_setup(setup):
    check(setup)
