"""``dora-cache lab simulate``: policies of eviction against the offline optimum."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from dora_cache.cli.console import CliError, progress_bar, reported, results
from dora_cache.cli.options import OutOption
from dora_cache.cli.output import make_folder, writing

__all__ = ["simulate"]

T = TypeVar("T")


def simulate(
    *,
    traces: Annotated[
        str | None, typer.Option(metavar="LIST", help="Only these, e.g. cyclic,zipf.")
    ] = None,
    policies: Annotated[
        str | None, typer.Option(metavar="LIST", help="Only these, e.g. budget,lru.")
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.001, max=10, help="Length of the traces, 1 in full.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of all chance.")] = 0,
    out: OutOption = Path("out"),
) -> None:
    """Compare eviction policies with the offline optimum, on traces of adapter traffic.

    Needs no model and no GPU. Shows the time saved under caps of 10 to 90 per cent.
    """
    from dora_cache.lab import simulator
    from dora_cache.lab.simulator import report

    with reported():
        contestants = _chosen(simulator.policies(seed), policies, "--policies")
        known = {trace.name: trace for trace in simulator.standard_traces(seed, scale=scale)}
        chosen = list(_chosen(known, traces, "--traces").values())
        folder = make_folder(out, "simulate.json", "simulate.png")
        with progress_bar("caps", len(chosen) * len(simulator.SHARES)) as moved:
            scores = simulator.simulate(chosen, contestants, seed=seed, moved=moved)
        console = results()
        console.print(report.table(scores))
        console.print("\n" + report.legend(chosen) + "\n", markup=False)
        data, chart = folder / "simulate.json", folder / "simulate.png"
        text = json.dumps(report.as_dict(scores, chosen, seed=seed), indent=2)
        with writing(data, "folder as --out"):
            data.write_text(text + "\n", encoding="utf-8")
        console.print(f"numbers: {data}", soft_wrap=True, markup=False)
        with writing(chart, "folder as --out"):
            report.draw(scores, chosen, chart)
        console.print(f"chart:   {chart}", soft_wrap=True, markup=False)


def _chosen(known: Mapping[str, T], wanted: str | None, option: str) -> dict[str, T]:
    if wanted is None:
        return dict(known)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise CliError(f"{option}: there is no {name!r}: choose from {', '.join(known)}")
    if not names:
        raise CliError(f"{option} names none: choose from {', '.join(known)}")
    return {name: known[name] for name in known if name in names}
