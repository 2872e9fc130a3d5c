"""The code of those pages of the documentation that need other libraries or several processes."""

import importlib.util
import os
import subprocess
import sys

import pytest
from documents import IN_THE_FIELD, ROOT, blocks, run_page

NEEDED = {"diffusers.md": ["diffusers"], "qdora.md": ["bitsandbytes", "torchao"], "fsdp2.md": []}


def page(name):
    for library in NEEDED[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    return ROOT / "docs" / name


def test_each_page_has_a_test():
    """No page is left out here that is left out of tests/test_docs.py."""
    assert set(NEEDED) == IN_THE_FIELD


@pytest.mark.parametrize("name", ["diffusers.md", "qdora.md"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_code_of_the_page_runs(name, tmp_path, monkeypatch):
    run_page(page(name), tmp_path, monkeypatch)


def test_the_sharded_script_hits_in_each_process(tmp_path, monkeypatch):
    """The script of docs/fsdp2.md, saved as the page says, in two processes on loopback."""
    (script,) = (block for block in blocks(page("fsdp2.md")) if block.file)
    (tmp_path / script.file).write_text(script.text, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", script.file],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0: 4 hits",
        "rank 1: 4 hits",
    ]
