"""``dora-cache lab pages``: report pages of a real run, with pictures of them."""

from pathlib import Path
from typing import Annotated

import typer

from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results
from dora_cache.cli.loading import check_source, load_measured, parse_device
from dora_cache.cli.options import (
    DeviceOption,
    Dtype,
    LayersOption,
    ModelOrShape,
    OutOption,
    ShapeOption,
)
from dora_cache.cli.output import make_folder, writing

__all__ = ["pages"]

_PAGES = {"report": "the cache's report", "pool-report": "the pool's report"}


def pages(
    model: ModelOrShape = None,
    *,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights.")] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Random DoRA adapters.")] = 16,
    requests: Annotated[
        int, typer.Option(min=1, help="Forwards with the cache, and again with the pool.")
    ] = 150,
    share: Annotated[
        float, typer.Option(min=0.1, max=1, help="Caps, as a share of what all adapters take.")
    ] = 0.4,
    pictures: Annotated[
        bool, typer.Option(help="Take pictures, which needs Chromium or a browser like it.")
    ] = False,
    device: DeviceOption = None,
    out: OutOption = Path("out"),
) -> None:
    """Write the report pages of a cache and of a pool that have served the same requests.

    Without MODEL and --shape: the shape tiny. Requests are for adapters by Zipf's law.
    """
    from dora_cache.lab import pages as making

    with reported():
        if model is None:
            shape = shape or "tiny"
        check_source(model, shape, layers)
        where = parse_device(device)
        browser = making.find_browser() if pictures else None
        if pictures and browser is None:
            names = ", ".join(making.BROWSERS)
            raise CliError(f"no browser for --pictures: install one of {names}")
        sizes = making.SIZES if pictures else {}
        files = [f"{page}.html" for page in _PAGES]
        files += [f"{page}-{kind}.png" for page in _PAGES for kind in sizes]
        folder = make_folder(out, *files)
        with quiet():
            base = load_measured(model, shape, where, layers=layers, dtype=dtype)
            with progress_bar("requests", 2 * requests) as move:
                of_cache, of_pool = making.run(base, adapters, requests, share=share, step=move)
        console = results()
        for name, write in (("report", of_cache.to_html), ("pool-report", of_pool.to_html)):
            page = folder / f"{name}.html"
            with writing(page, "folder as --out"):
                write(page)
            console.print(f"{_PAGES[name]}: {page}", soft_wrap=True)
            for kind, size in sizes.items():
                assert browser is not None  # noqa: S101 - for the type checker
                try:
                    making.take(browser, page, folder / f"{name}-{kind}.png", size)
                except (OSError, RuntimeError) as error:
                    raise CliError(str(error)) from None
