"""Settings and fixtures of the whole suite."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Two workers on two cores: more threads would only get in each other's way.
torch.set_num_threads(1)

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=50, stateful_step_count=30, **_COMMON)
settings.register_profile(
    "deep", max_examples=2000, stateful_step_count=50, print_blob=True, **_COMMON
)
settings.register_profile("debug", phases=[Phase.generate], parent=settings.get_profile("quick"))
if not os.environ.get("HYPOTHESIS_PROFILE"):
    settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("DORA_CACHE_"):
            monkeypatch.delenv(name)


def pytest_terminal_summary(terminalreporter):
    """Print which seeded bugs were caught, and how many steps that took."""
    found = [
        (*value, report.outcome)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == "mutant" and report.when == "call"
    ]
    if not found:
        return
    terminalreporter.section("seeded bugs")
    terminalreporter.line(f"{'mutant':45}{'machine':20}{'steps':>7}")
    for mutant, machine, steps, outcome in sorted(found, key=lambda row: (row[1], row[0])):
        steps_needed = steps if outcome == "passed" else "not caught"
        terminalreporter.line(f"{mutant:45}{machine:20}{steps_needed:>7}")
