"""Replicas by Ray Serve: a real cluster on loopback, started by `dora-cache serve --replicas`."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from served import Alone, make_model, tokenizer, write_adapters
from typer.testing import CliRunner

os.environ.update(  # Ray reads them when it is imported
    RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)
)
import ray
from ray import serve

from dora_cache.cli.app import app
from dora_cache.serving.ray import APPLICATION, Settings, deployment
from dora_cache.serving.server import Limits

ROOT = Path(__file__).parents[2]
BATCH, QUEUE, LONG = 4, 8, 250
PLACES = 2 * 2 * BATCH + QUEUE  # two replicas run a batch and hold another one
PROMPT = "Hello there"
OPTIONS = {
    "--name": "base", "--replicas": 2, "--batch": BATCH, "--queue": QUEUE, "--max-prompt": 64,
    "--max-tokens": 256, "--kv-tokens": 2048, "--refresh": 0.2, "--device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    make_model().save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    write_adapters(path / "adapters", 6)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return Alone(folder / "adapters")


@pytest.fixture(scope="module")
def cluster():
    """Two logical processors, advertised on loopback, with a token; nothing is left afterwards."""
    scratch = tempfile.mkdtemp(prefix="dc-", dir="/tmp")  # short: it has Unix sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        before = set(psutil.Process().children(recursive=True))
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.2" if sys.platform == "linux" else None,
            _temp_dir=scratch,
        )
        started = set(psutil.Process().children(recursive=True)) - before
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()
        _, left = psutil.wait_procs(started, timeout=30)
    shutil.rmtree(scratch, ignore_errors=True)
    assert not left


class Replicated:
    """The command, and what it serves."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = [str(one) for pair in OPTIONS.items() for one in pair]
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "output"  # a pipe that nobody reads would hold it up
        with self.output.open("w") as output:
            self.command = subprocess.Popen(
                [sys.executable, "-m", "dora_cache", "serve", folder / "model", "--adapters",
                 folder / "adapters", "--port", str(port), *options],
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def http(self):
        return httpx.Client(base_url=self.url, timeout=120)

    def client(self, **settings):
        settings = {"max_retries": 0, "timeout": 120, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **settings)

    def is_up(self):
        if self.command.poll() is not None:
            raise AssertionError(self.output.read_text())
        try:
            with self.http() as http:
                return http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def stats(self):
        """Return what each replica has done, by its name."""
        handle = serve.get_deployment_handle("replica", APPLICATION)
        found = handle.broadcast("stats").results(timeout_s=60, return_exceptions=True)
        return dict(one for one in found if not isinstance(one, Exception))

    def total(self, what):
        return sum(one.get(what, 0) for one in self.stats().values())

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "it never came"
            time.sleep(0.02)
        return found


@pytest.fixture(scope="module")
def running(cluster):
    """Holds what runs; it is ended at the end."""
    found = []
    yield found
    for one in found:
        one.command.terminate()
        one.command.wait(60)


@pytest.fixture
def served(running, folder):
    """Two replicas that have nothing to do."""
    if not running:
        running.append(Replicated(folder))
    one = running[0]
    one.until(one.is_up)
    one.until(lambda: len(one.stats()) == 2)
    one.until(lambda: not one.total("running") + one.total("waiting"))
    return one


def names(folder):
    return ["base", *sorted(one.name for one in (folder / "adapters").iterdir())]


def complete(client, name, count=12, **more):
    settings = {"model": name, "prompt": PROMPT, "max_tokens": count, "temperature": 0}
    return client.completions.create(**settings, **more)


def text(parts):
    return "".join(part.choices[0].text for part in parts)


def error_of(response):
    return response.json()["error"]


def test_answers_are_those_of_plain_peft(served, folder, alone):
    """Twelve clients at once, streamed or not: every text is what the request alone gives."""
    jobs = [(name, 6 + number, number % 2) for number in range(8) for name in names(folder)]

    def ask(job):
        name, count, stream = job
        if stream:
            return text(complete(client, name, count, stream=True))
        return complete(client, name, count).choices[0].text

    with served.client() as client, ThreadPoolExecutor(12) as clients:
        texts = list(clients.map(ask, jobs))
    assert texts == [alone.text(name, PROMPT, count) for name, count, _ in jobs]
    assert all(one["finished"] for one in served.stats().values())


@contextlib.contextmanager
def copies(served, folder, **sources):
    """Have replicas serve copies of adapters, which none of them has on its device yet."""
    adapters = folder / "adapters"
    for name, source in sources.items():
        shutil.copytree(adapters / source, adapters / name)
    try:
        with served.client() as client:
            served.until(
                lambda: all(
                    sources.keys() <= {one.id for one in client.models.list()} for _ in range(8)
                )
            )
        yield
    finally:
        for name in sources:
            shutil.rmtree(adapters / name)


def test_a_request_goes_where_its_adapter_is(served, folder):
    """Each adapter is loaded by one replica alone, however often it is asked for."""
    own = {f"own-{number}": source for number, source in enumerate(names(folder)[1:])}
    with copies(served, folder, **own), served.client(max_retries=20) as client:
        before = served.total("loads")
        for _ in range(6):
            for name in own:
                complete(client, name, 2)
        assert served.total("loads") - before == len(own)


def test_refusals_are_those_of_one_server(served, folder):
    """What is wrong has the status and the words that a single server gives it."""
    with served.http() as http:

        def post(path="/v1/completions", **body):
            return http.post(path, json={"model": "base", "prompt": PROMPT, **body})

        unknown = post(model="dora-01")
        assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")
        assert "dora-1" in error_of(unknown)["message"]
        for body, status in (
            ({"prompt": "x" * 65}, 413),
            ({"prompt": "x" * 100_000}, 413),
            ({"max_tokens": 257}, 400),
            ({"n": 2}, 400),
            ({"model": ["base"]}, 400),
            ({"model": "../adapters/dora-1"}, 404),
        ):
            response = post(**body)
            assert response.status_code == status, response.text
            assert set(error_of(response)) == {"message", "type", "param", "code"}
        for content in (b"", b"{", b"[]", b"[" * 50_000):
            response = http.post("/v1/completions", content=content)
            assert (response.status_code, error_of(response)["param"]) == (400, None)
        assert http.put("/v1/completions").status_code == 405
        assert http.get("/v1/nothing").status_code == 404
        assert {one["id"] for one in http.get("/v1/models").json()["data"]} == set(names(folder))


def test_a_full_queue_is_429(served, alone):
    """Where all places are taken, a request is refused at once; those before it are answered."""
    with served.http() as http, ThreadPoolExecutor(2 * PLACES) as clients:
        body = {"model": "dora-1", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0}
        found = list(
            clients.map(lambda _: http.post("/v1/completions", json=body), range(2 * PLACES))
        )
    refused = [one for one in found if one.status_code != 200]
    assert refused
    for one in refused:
        assert (one.status_code, error_of(one)["code"]) == (429, "queue_full")
        assert int(one.headers["Retry-After"]) > 0
    texts = {one.json()["choices"][0]["text"] for one in found if one.status_code == 200}
    assert texts == {alone.text("dora-1", PROMPT, LONG)}


def test_a_client_that_goes_frees_its_place(served):
    """When the client of a stream goes, its request ends."""
    before = served.total("cancelled")
    with served.client() as client:
        for stream in (True, False):
            with contextlib.suppress(openai.APITimeoutError):
                found = complete(client, "lora-0", LONG, stream=stream, timeout=0.2)
                next(iter(found))
                found.close()
            served.until(lambda: served.total("cancelled") > before)
            before = served.total("cancelled")


def test_a_replica_is_killed(served, folder, alone):
    """Its requests get a status to try again on; all are answered, right; a new one comes."""
    before = served.stats()
    wrong, done, statuses = [], threading.Event(), []

    def traffic(number):
        """Ask until the end, each request until it is answered, as the client's retries do."""
        with served.client(max_retries=30) as client:
            for name in names(folder) * 200:
                if done.is_set():
                    return
                count = 2 + number
                if complete(client, name, count).choices[0].text != alone.text(name, PROMPT, count):
                    wrong.append((name, count))
                statuses.append(200)

    for name in names(folder):
        for number in range(4):
            alone.text(name, PROMPT, 2 + number)
    expected = alone.text("lora-0", PROMPT, LONG)
    with (
        copies(served, folder, only="lora-0"),  # one replica alone has it
        ThreadPoolExecutor(8) as pool,
        served.client() as client,
        served.http() as http,
    ):
        stream = complete(client, "only", LONG, stream=True)
        parts = [next(iter(stream))]
        home = next(name for name, one in served.stats().items() if one["running"])
        body = {"model": "only", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0}
        wholes = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(3)]
        served.until(lambda: served.stats()[home]["running"] + served.stats()[home]["waiting"] > 1)
        clients = [pool.submit(traffic, number) for number in range(4)]
        ray.kill(ray.get_actor(f"SERVE_REPLICA::{APPLICATION}#replica#{home}", namespace="serve"))

        with pytest.raises(openai.APIError) as broken:
            parts.extend(stream)
        assert broken.value.code == "replica_lost"
        assert expected.startswith(text(parts))
        lost = [one for one in (whole.result() for whole in wholes) if one.status_code != 200]
        assert lost
        for one in lost:
            assert (one.status_code, error_of(one)["code"]) == (503, "replica_lost")
            assert int(one.headers["Retry-After"]) > 0
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected

        served.until(lambda: len(served.stats().keys() - before.keys()) == 1)
        answered = len(statuses)
        served.until(lambda: len(statuses) > answered + 20)
        done.set()
        for one in clients:
            one.result()
    assert not wrong
    assert home not in served.stats()


def test_metrics_are_of_all_replicas(served):
    """A scrape has each replica's metrics, which agree with its counters; `top` shows both."""
    with served.client() as client:
        complete(client, "dora-1", 2)
    with served.http() as http:
        families = {one.name: one for one in parse(http.get("/metrics").text)}
    stats = served.stats()
    finished = {
        one.labels["replica"]: one.value
        for one in families["dora_cache_requests"].samples
        if one.labels["outcome"] == "finished"
    }
    assert finished == {name: one.get("finished", 0) for name, one in stats.items()}
    loads = {
        one.labels["replica"]: one.value
        for one in families["dora_cache_pool_load_seconds"].samples
        if one.name.endswith("_count")
    }
    assert loads == {name: one["loads"] for name, one in stats.items()}
    assert len(families["dora_cache_build_info"].samples) == 1
    done = CliRunner().invoke(app, ["top", served.url, "--once"])
    assert done.exit_code == 0, done.output
    assert all(done.stdout.count(name) >= 2 for name in stats)


def config_of(application, name):
    """Return what Ray is told of a deployment of an application."""
    ingress = application._bound_deployment
    (replicas,) = [one._bound_deployment for one in ingress.init_args]
    return {"ingress": ingress, "replica": replicas}[name]._deployment_config


def test_replicas_follow_the_queue():
    """With a fewest and a most, Ray adds a replica where each has more than a batch to do."""
    limits = Limits(max_prompt=64, max_tokens=64, batch=4, queue=10, kv_tokens=512)
    settings = Settings(model="m", adapters="a", replicas=(2, 5), limits=limits)
    config = config_of(deployment(settings), "replica")
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 4
    assert (config.max_ongoing_requests, config.max_queued_requests) == (8, 50)
    fixed = config_of(deployment(settings.model_copy(update={"replicas": 3})), "replica")
    assert (fixed.num_replicas, fixed.autoscaling_config) == (3, None)


def test_settings_that_contradict_each_other_are_refused():
    """The fewest replicas are at least one and at most the most; on the command line as well."""
    for replicas in (0, (0, 2), (3, 2)):
        with pytest.raises(ValueError, match="replicas"):
            Settings(model="m", adapters="a", replicas=replicas)
    done = CliRunner().invoke(app, ["serve", "m", "--replicas", "3", "--max-replicas", "2"])
    assert (done.exit_code, "give at least 3" in done.output) == (2, True)


def test_ending_drains(served, running, alone):
    """After SIGTERM what was accepted is answered, and the command ends with status 0."""
    with served.client() as client, ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(complete, client, "dora-1", LONG) for _ in range(6)]
        served.until(lambda: served.total("running") + served.total("waiting") == len(asked))
        running.remove(served)
        served.command.send_signal(signal.SIGTERM)
        expected = alone.text("dora-1", PROMPT, LONG)
        assert [one.result().choices[0].text for one in asked] == [expected] * len(asked)
        assert served.command.wait(60) == 0, served.output.read_text()
