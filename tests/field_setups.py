"""What every set-up of another library must show."""

import pytest

from dora_cache.lab.field import try_out


def ids(setup):
    return setup.name


def check(setup, **settings):
    """Outputs equal those without a cache; the second forward hits, or the report says why not."""
    if setup.missing:
        pytest.skip(setup.missing)
    found = try_out(setup, **settings)
    assert found.equal
    if setup.reason is None:
        assert found.hits > 0, found.report
        assert found.misses == 0, found.report
        assert not found.reasons, found.report
    else:
        assert found.hits == 0
        assert set(found.reasons) == {setup.reason.value}
        assert setup.reason.advice in found.report
    return found
