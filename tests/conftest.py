"""Settings and fixtures of the whole suite."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Two workers on two cores: more threads would only get in each other's way, unless asked for.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=50, stateful_step_count=30, **_COMMON)
settings.register_profile(
    "deep", max_examples=1000, stateful_step_count=50, print_blob=True, **_COMMON
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
    """Print how long the machines ran, and which seeded bugs they caught after how many steps."""
    found = {"machine": [], "mutant": []}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name in found and report.when == "call":
                    found[name].append((*value, outcome))
    if found["machine"]:
        terminalreporter.section("state machines")
        terminalreporter.line(f"{'machine':25}{'runs':>8}{'steps':>9}  outcome")
        for machine in sorted({row[0] for row in found["machine"]}):
            rows = [row for row in found["machine"] if row[0] == machine]
            runs, steps = (sum(row[column] for row in rows) for column in (1, 2))
            outcome = "failed" if "failed" in {row[3] for row in rows} else "passed"
            terminalreporter.line(f"{machine:25}{runs:>8}{steps:>9}  {outcome}")
    if found["mutant"]:
        terminalreporter.section("seeded bugs")
        terminalreporter.line(f"{'mutant':45}{'machine':20}{'steps':>7}")
        for mutant, machine, steps, outcome in sorted(found["mutant"], key=lambda row: row[1::-1]):
            steps_needed = steps if outcome == "passed" else "not caught"
            terminalreporter.line(f"{mutant:45}{machine:20}{steps_needed:>7}")
