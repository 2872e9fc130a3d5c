"""Report pages of a real run, and pictures of them by a headless browser."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.attachment import attach
from dora_cache.lab.models import twin, write_adapter
from dora_cache.serving import AdapterPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dora_cache.report import CacheReport
    from dora_cache.serving.report import PoolReport

__all__ = ["BROWSERS", "SIZES", "find_browser", "run", "take"]

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
SIZES = {"desktop": (1280, 1500), "phone": (390, 1500)}
"""Of pictures, in pixels."""

_BYPASSED = 10  # of so many requests one
_PROMPT = 8  # tokens
_PATIENCE = 120.0  # seconds for one picture


@torch.no_grad()
def run(
    base: Any,
    adapters: int,
    requests: int,
    *,
    share: float,
    step: Callable[[], object],
) -> tuple[CacheReport, PoolReport]:
    """Serve requests by Zipf's law from a cache, and the same ones from a pool.

    Args:
        base: a Transformers model.
        adapters: how many random DoRA adapters there are.
        requests: how many forwards there are.
        share: caps, as a share of what all the adapters take; the pool has room for two at least.
        step: called after each request.

    Returns:
        The cache's report and the pool's.
    """
    names = [f"customer-{number:02}" for number in range(1, adapters + 1)]
    weights = [1 / place for place in range(1, adapters + 1)]
    chosen = random.Random(0).choices(names, weights, k=requests)  # noqa: S311 - no secret
    generator = torch.Generator().manual_seed(0)
    size = base.config.vocab_size
    ids = torch.randint(size, (1, _PROMPT), generator=generator).to(base.device)
    with tempfile.TemporaryDirectory(prefix="dora-cache-") as scratch:
        paths = {name: Path(scratch) / name for name in names}
        for number, path in enumerate(paths.values()):
            write_adapter(base, path, dora=True, seed=number)
        of_cache = _with_cache(twin(base), paths, chosen, ids, share, step)
        return of_cache, _with_pool(base, paths, chosen, ids, share, step)


def _with_cache(
    base: Any,
    paths: dict[str, Path],
    chosen: Sequence[str],
    ids: torch.Tensor,
    share: float,
    step: Callable[[], object],
) -> CacheReport:
    from peft import PeftModel

    (first, path), *others = paths.items()
    model = PeftModel.from_pretrained(base, str(path), adapter_name=first)
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name)
    model.eval()
    with attach(model) as cache:
        cache.warm([first])
        each = cache.stats().nbytes
    with attach(model, backend="lru", max_bytes=int(share * each * len(paths))) as cache:
        for number, name in enumerate(chosen):
            model.set_adapter(name, inference_mode=True)
            with cache.bypass() if number % _BYPASSED == 0 else nullcontext():
                model(ids)
            step()
        return cache.report()


def _with_pool(
    base: Any,
    paths: dict[str, Path],
    chosen: Sequence[str],
    ids: torch.Tensor,
    share: float,
    step: Callable[[], object],
) -> PoolReport:
    with AdapterPool(base) as pool:
        for name, path in paths.items():
            pool.add(name, path)
        sizes = sorted(row.nbytes for row in pool.report().adapters)
        # The pinned one and one more must fit.
        pool.resize(device_bytes=max(int(share * sum(sizes)), sum(sizes[-2:])))
        pool.pin(next(iter(paths)))
        for name in chosen:
            with pool.use([name, None]):
                base(ids.expand(2, -1))
            step()
        return pool.report()


def find_browser() -> str | None:
    """Return the path of a browser that can take pictures, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def take(browser: str, page: Path, picture: Path, size: tuple[int, int]) -> None:
    """Take a picture of a page, by a headless browser.

    Args:
        browser: path of Chromium, or of a browser like it.
        page: the HTML file.
        picture: the PNG file to write.
        size: width and height in pixels.

    Raises:
        RuntimeError: the browser fails.
    """
    width, height = size
    with tempfile.TemporaryDirectory(prefix="dora-cache-") as profile:
        done = subprocess.run(  # noqa: S603 - a browser of the caller's, a file of ours
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={profile}", f"--window-size={width},{height}",
                f"--screenshot={picture.resolve()}", page.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )  # fmt: skip
    if done.returncode or not picture.is_file():
        last = done.stderr.strip().splitlines()[-1:]
        msg = f"{browser} took no picture of {page}: {''.join(last) or done.returncode}"
        raise RuntimeError(msg)
