"""`dora-cache serve`: a real server on loopback, and the openai package as its client."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from served import (
    LIMITS,
    VOCABULARY,
    Alone,
    make_model,
    serving,
    tokenizer,
    write_adapter,
    write_adapters,
)
from typer.testing import CliRunner

from dora_cache import AdapterPool, ConfigError
from dora_cache.cli.app import app
from dora_cache.serving.server import AdapterFolder, Engine, Limits, Sampling

ROOT = Path(__file__).parents[2]
LONG = 250  # tokens: requests that run until something else has happened
ONE_AT_A_TIME = Limits(
    max_prompt=64, max_tokens=256, batch=1, queue=9, kv_tokens=512, batch_tokens=64
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    write_adapters(path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return Alone(folder)


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder) as one:
        yield one


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    """After each test on the shared server, it is idle and remembers no request."""
    yield
    if "served" in request.fixturenames:
        one = request.getfixturevalue("served")
        one.until(lambda engine: not engine.running and not engine.waiting)
        one.until(lambda _: one.is_clean())


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the adapters, to be changed."""
    path = tmp_path / "adapters"
    shutil.copytree(folder, path)
    return path


def names(folder):
    return ["base", *sorted(one.name for one in folder.iterdir())]


def post(one, path="/v1/completions", **body):
    with one.http() as http:
        return http.post(path, json=body)


def error_of(response):
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


# Answers


def test_models_are_listed(served, folder):
    """/v1/models has the base model and each adapter, and knows each by its name."""
    with served.client() as client:
        assert [one.id for one in client.models.list()] == names(folder)
        assert client.models.retrieve("lora-0").id == "lora-0"
        with pytest.raises(openai.NotFoundError, match="lora-0"):
            client.models.retrieve("lora-00")


def test_adapters_are_told_apart(folder, alone):
    """What the tests compare with differs from adapter to adapter."""
    assert len({alone.text(name, "Hello there", 12) for name in names(folder)}) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_that_of_plain_peft(served, folder, alone, stream):
    """Streamed or not, base or adapter, the text is what the request alone gives with PEFT."""
    with served.client() as client:
        for name in names(folder):
            settings = {"model": name, "prompt": "Hello there", "max_tokens": 12, "temperature": 0}
            if stream:
                options = {"include_usage": True}
                chunks = list(
                    client.completions.create(**settings, stream=True, stream_options=options)
                )
                assert all(one.model == name for one in chunks)
                assert len(chunks) > 5
                text = "".join(one.choices[0].text for one in chunks[:-1])
                reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
            else:
                found = client.completions.create(**settings)
                text, reason = found.choices[0].text, found.choices[0].finish_reason
                usage = found.usage
            assert text == alone.text(name, "Hello there", 12)
            assert reason == "length"
            counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
            assert counts == (11, 12, 23)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_the_templates_text(served, alone, stream):
    """A conversation is put into the model's template, and the answer goes on from there."""
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    settings = {"model": "dora-1", "messages": messages, "max_completion_tokens": 8}
    with served.client() as client:
        found = client.chat.completions.create(**settings, temperature=0, stream=stream)
        if stream:
            chunks = list(found)
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-1].choices[0].finish_reason == "length"
            answer = "".join(one.choices[0].delta.content or "" for one in chunks)
        else:
            answer = found.choices[0].message.content
            assert found.choices[0].message.role == "assistant"
    text = "system: Be brief.\nuser: Hello there\nassistant: "
    assert answer == alone.text("dora-1", text, 8)


def test_a_model_without_a_template_does_not_chat(folder):
    """Without a chat template, a conversation is status 400, which says what to use."""
    plain = tokenizer.__wrapped__()
    plain.chat_template = None
    with serving(folder, chat=plain) as one:
        messages = [{"role": "user", "content": "Hello"}]
        response = post(one, "/v1/chat/completions", model="base", messages=messages)
        assert response.status_code == 400
        assert "/v1/completions" in error_of(response)["message"]


def test_tokens_are_a_prompt(served, alone):
    """A prompt may be a list of tokens."""
    prompt = [5, 250, 17, VOCABULARY - 1]
    assert served.complete("lora-0", prompt) == alone.text("lora-0", prompt, 12)


def test_prompts_alike_do_not_share_what_adapters_change(served, folder, alone):
    """One long prompt for one model after another: no answer rests on another's cached keys."""
    prompt = "The same words for everyone. " * 4
    for name in [*names(folder), *reversed(names(folder))]:
        assert served.complete(name, prompt, 8) == alone.text(name, prompt, 8)


def test_sixteen_clients_at_once(folder, alone):
    """Sixteen clients, all adapters and the base mixed, in less memory than the adapters need."""
    prompts = ["Hello there", "A", "The third of them is longer than the others are. " * 2]
    jobs = [(names(folder)[i % 5], prompts[i % 3], 6 + i % 7) for i in range(64)]
    with AdapterPool(make_model()) as pool:
        pool.add_folder(folder)
        with pool.use(pool.names):
            cap = int(pool.stats().device_bytes * 0.6)
    with serving(folder, device_bytes=cap) as one, one.client() as client:
        seen, done = [], threading.Event()

        def watch():
            while not done.is_set():
                seen.append(one.engine.pool.stats().device_bytes)
                time.sleep(0.001)

        def ask(job):
            name, prompt, count = job
            settings = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0}
            if count % 2:
                return client.completions.create(**settings).choices[0].text
            parts = client.completions.create(**settings, stream=True)
            return "".join(part.choices[0].text for part in parts)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(16) as clients:
            texts = list(clients.map(ask, jobs))
        done.set()
        watcher.join()
        assert texts == [alone.text(*job) for job in jobs]
        assert 0 < max(seen) <= cap
        assert one.engine.pool.stats().evictions > 0  # they did not all fit
        one.until(lambda _: one.is_clean())


def test_the_cache_may_be_too_small_for_all(folder, alone):
    """Where keys and values do not fit for all that run, all are answered, and right."""
    small = Limits(max_prompt=64, max_tokens=64, batch=8, queue=32, kv_tokens=160, batch_tokens=64)
    with serving(folder, limits=small) as one, ThreadPoolExecutor(8) as clients:
        jobs = [(names(folder)[i % 5], f"Number {i} of them", 40) for i in range(8)]
        texts = list(clients.map(lambda job: one.complete(*job), jobs))
        assert texts == [alone.text(*job) for job in jobs]


def test_a_stop_sequence_ends_the_text(served, alone):
    """The text ends before the stop sequence, and the request gives up its place."""
    whole = alone.text("dora-1", "Hello there", LONG)
    stop = whole[9:11]
    settings = {"model": "dora-1", "prompt": "Hello there", "max_tokens": LONG, "temperature": 0}
    with served.client() as client:
        found = client.completions.create(**settings, stop=["never there", stop])
        assert found.choices[0].text == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 20
        parts = list(client.completions.create(**settings, stop=stop, stream=True))
        assert "".join(one.choices[0].text for one in parts) == found.choices[0].text
        assert parts[-1].choices[0].finish_reason == "stop"


def test_the_end_token_ends_the_text(folder, alone):
    """A model's end token ends a request with the reason stop."""
    model = make_model()
    tokens = alone.tokens("lora-0", "Hello there", 12)
    model.generation_config.eos_token_id = [tokens[4]]
    with serving(folder, model=model) as one, one.client() as client:
        found = client.completions.create(
            model="lora-0", prompt="Hello there", max_tokens=12, temperature=0
        )
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens == tokens.index(tokens[4]) + 1


# Sampling


def draw(client, seed, **more):
    settings = {"model": "lora-0", "prompt": "Hello there", "max_tokens": 24, "temperature": 1.5}
    return client.completions.create(**settings | more, seed=seed).choices[0].text


def test_a_seed_repeats_a_text(served):
    """Sampling follows from the request's seed, whatever else is in the batch."""
    with served.client() as client:
        first = draw(client, 7)
        with ThreadPoolExecutor(6) as clients:
            again = list(clients.map(lambda seed: draw(client, seed), [7, 8, 9, 7, -7, 2**40]))
        assert again[0] == again[3] == first
        assert len({first, again[1], again[2], again[4], again[5]}) == 5
        assert draw(client, None) != draw(client, None)


def test_a_small_top_p_is_greedy(served, alone):
    """With a tiny nucleus only the likeliest token is left."""
    with served.client() as client:
        assert draw(client, 1, top_p=1e-6) == alone.text("lora-0", "Hello there", 24)


def test_greedy_rows_stay_greedy_beside_sampled_ones(served, alone):
    """In one batch, requests with and without sampling do not touch each other."""
    with ThreadPoolExecutor(8) as clients, served.client() as client:
        ask = lambda number: draw(client, number, temperature=number % 2 * 1.5)  # noqa: E731
        texts = list(clients.map(ask, range(8)))
    expected = alone.text("lora-0", "Hello there", 24)
    assert [text == expected for text in texts] == [True, False] * 4


def test_the_generator_of_the_process_is_left_alone(served):
    """The requests' generators are their own: the global one does not move."""
    state = torch.get_rng_state()
    with served.client() as client:
        draw(client, None)
    assert torch.equal(torch.get_rng_state(), state)


# Refusals

WRONG = {
    "logit_bias": {"1": 5},
    "n": 2,
    "best_of": 3,
    "echo": True,
    "logprobs": 1,
    "suffix": "x",
    "presence_penalty": 0.5,
    "frequency_penalty": 1,
    "temperature": -1,
    "top_p": 0,
    "max_tokens": 0,
    "seed": 2**70,
    "stop": ["a", "b", "c", "d", "e"],
    "stream": "perhaps",
    "stream_options": {"other": True},
    "prompt": ["one", "two"],
    "model": 5,
}


@pytest.mark.parametrize("param", WRONG)
def test_a_parameter_without_effect_is_refused(served, param):
    """What is not supported, or out of bounds, is status 400 with the parameter's name."""
    response = post(served, **{"model": "base", "prompt": "Hello", param: WRONG[param]})
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {"tools": []},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 3},
        {"prompt": "x"},
    ],
    ids=str,
)
def test_a_chat_parameter_without_effect_is_refused(served, body):
    """The same in conversations."""
    whole = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], **body}
    response = post(served, "/v1/chat/completions", **whole)
    assert (response.status_code, error_of(response)["param"]) == (400, next(iter(body)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 50_000, b'{"model": NaN}'],
    ids=["empty", "cut", "list", "text", "bytes", "deep", "nan"],
)
def test_a_body_that_is_no_request_is_refused(served, content):
    """Whatever is sent, the answer is status 400 in OpenAI's form."""
    with served.http() as http:
        headers = {"Content-Type": "application/json"}
        response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    error_of(response)


def test_other_addresses_are_not_found(served):
    """An address or method that there is none of is an error in OpenAI's form."""
    with served.http() as http:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
            response = http.request(method, path)
            assert response.status_code == status
            error_of(response)


def test_a_prompt_must_have_tokens_of_the_model(served):
    """An empty prompt and tokens that the model has not are status 400."""
    for prompt in ("", [], [VOCABULARY], [-1], [True]):
        response = post(served, model="base", prompt=prompt)
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


def test_too_many_tokens_are_refused(served):
    """More than max_tokens is status 400; exactly as many are generated."""
    most = LIMITS.max_tokens
    response = post(served, model="base", prompt="Hello", max_tokens=most + 1)
    assert (response.status_code, error_of(response)["param"]) == (400, "max_tokens")
    response = post(served, model="base", prompt="Hello", max_tokens=most, temperature=0)
    assert response.json()["usage"]["completion_tokens"] == most


def test_an_unknown_adapter_is_not_found(served):
    """A name that there is none of is status 404, with the names that are near."""
    response = post(served, model="dora1", prompt="Hello")
    assert response.status_code == 404
    assert "'dora-1'" in error_of(response)["message"]
    with served.client() as client, pytest.raises(openai.NotFoundError, match="'base'"):
        client.completions.create(model="base2", prompt="Hello")


@pytest.mark.parametrize(
    "name",
    ["../{outside}", "{path}/lora-0", "./lora-0", "lora-0/", "lora-0@1", "", "lora-0\0", "*"],
)
def test_names_are_not_paths(served, folder, tmp_path, name):
    """A name is looked up among the names; what it would be as a path does not matter."""
    write_adapter(tmp_path, "outside")
    outside = os.path.relpath(tmp_path / "outside", folder)
    name = name.format(outside=outside, path=folder)
    response = post(served, model=name, prompt="Hello")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_a_long_prompt_is_refused(served):
    """One token too many is status 413; the most that are allowed are served."""
    most = LIMITS.max_prompt
    assert post(served, model="lora-0", prompt="a" * most, max_tokens=1).status_code == 200
    response = post(served, model="lora-0", prompt="a" * (most + 1), max_tokens=1)
    assert (response.status_code, error_of(response)["code"]) == (413, "prompt_too_long")
    messages = [{"role": "user", "content": "a" * most}]
    response = post(served, "/v1/chat/completions", model="lora-0", messages=messages)
    assert response.status_code == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused(served, chunked):
    """A body above the bound is status 413, whether its length was announced or not."""
    content = json.dumps({"model": "base", "prompt": "a" * 200_000}).encode()
    pieces = (content[i : i + 1000] for i in range(0, len(content), 1000))
    with served.http() as http:
        headers = {"Content-Type": "application/json"}
        response = http.post(
            "/v1/completions", content=pieces if chunked else content, headers=headers
        )
    assert response.status_code == 413
    error_of(response)


def test_a_full_queue_says_when_to_try_again(folder, alone):
    """Beyond the queue, status 429 with Retry-After; what was accepted is answered."""
    limits = Limits(max_prompt=64, max_tokens=64, batch=2, queue=3, kv_tokens=512, batch_tokens=64)
    with serving(folder, limits=limits) as one, ThreadPoolExecutor(5) as clients:
        with one.paused():
            jobs = [clients.submit(one.complete, "lora-0", "Hello there") for _ in range(5)]
            one.until(lambda engine: (engine.running, engine.waiting) == (2, 3))
            response = post(one, model="base", prompt="Hello")
            assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
            assert int(response.headers["Retry-After"]) >= 1
        assert {job.result() for job in jobs} == {alone.text("lora-0", "Hello there", 12)}
        assert post(one, model="base", prompt="Hello", max_tokens=2).status_code == 200


def test_a_client_that_retries_comes_through(folder, alone):
    """The openai package tries again after 429, as it does by default, and gets its answer."""
    limits = Limits(max_prompt=64, max_tokens=64, batch=1, queue=0, kv_tokens=512, batch_tokens=64)
    settings = {"model": "dora-1", "prompt": "Hello there", "max_tokens": 12, "temperature": 0}
    with (
        serving(folder, limits=limits) as one,
        one.client(max_retries=30) as client,
        ThreadPoolExecutor(2) as clients,
    ):
        with one.paused():
            jobs = [clients.submit(client.completions.create, **settings)]
            one.until(lambda engine: engine.running == 1)
            assert post(one, model="base", prompt="Hello").status_code == 429
            jobs.append(clients.submit(client.completions.create, **settings))
            one.until(lambda engine: engine.counts["turned_away"] == 2)
        texts = {job.result().choices[0].text for job in jobs}
        assert texts == {alone.text("dora-1", "Hello there", 12)}
        assert one.engine.counts["finished"] == 2


# Clients that go


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_request_leaves_with_its_client(served, alone, stream):
    """A client that hangs up frees its place, and others are not touched."""
    body = {"model": "lora-0", "prompt": "Hello there", "max_tokens": LONG, "stream": stream}
    content = json.dumps(body).encode()
    before = served.engine.counts["cancelled"]
    raw = socket.create_connection(("127.0.0.1", served.port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    served.until(lambda engine: engine.running == 1)
    if stream:
        assert raw.recv(10)
    with served.paused():
        raw.close()
        # While nothing goes on, only the disconnection can be what ends it.
        served.until(lambda engine: any(engine._batcher.cancel_queue.queue))
    served.until(lambda engine: engine.running == 0)
    assert served.engine.counts["cancelled"] == before + 1
    assert served.complete("lora-0", "Hello there") == alone.text("lora-0", "Hello there", 12)


def test_a_waiting_request_leaves_with_its_client(folder):
    """A request that waits is gone from the queue with its client."""
    with (
        serving(folder, limits=ONE_AT_A_TIME) as one,
        ThreadPoolExecutor(1) as clients,
        one.paused(),
    ):
        clients.submit(one.complete, "base", "Hello")
        one.until(lambda engine: engine.running == 1)
        body = {"model": "lora-0", "prompt": "Hello"}
        with pytest.raises(httpx.ReadTimeout), one.http() as http:
            http.post("/v1/completions", json=body, timeout=0.3)
        one.until(lambda engine: engine.waiting == 0)
        assert one.engine.running == 1
        assert one.engine.counts["cancelled"] == 1
        assert not any(version.users for version in one.engine.folder.versions)


# Adapters that come, go and change


def replace(folder, name, **settings):
    """Put another adapter in place of one."""
    write_adapter(folder.parent / "new", name, **settings)
    (folder / name).rename(folder.parent / f"old-{name}")
    (folder.parent / "new" / name).rename(folder / name)


def test_adapters_come_and_go(own):
    """A folder that comes is served, one that goes is not found, without a new start."""
    alone = Alone(own)
    with serving(own) as one:
        write_adapter(own, "later", seed=77)
        one.refresh()
        assert one.complete("later", "Hello there") == alone.text("later", "Hello there", 12)
        shutil.rmtree(own / "later")
        write_adapter(own, ".prepared", seed=78)
        (own / "notes.txt").write_text("no adapter")
        (own / "empty").mkdir()
        one.refresh()
        assert post(one, model="later", prompt="Hello").status_code == 404
        assert len(one.engine.pool.names) == 4
        assert not one.engine.folder.refused


def test_a_folder_that_cannot_be_read_has_not_changed(own):
    """If the folder itself is not there for a while, its adapters are served as before."""
    with serving(own) as one:
        alone = Alone(own)
        text = alone.text("lora-0", "Hello", 12)
        assert one.complete("lora-0", "Hello") == text
        away = own.rename(own.parent / "away")
        with pytest.raises(FileNotFoundError):
            one.refresh()
        assert one.complete("lora-0", "Hello") == text
        away.rename(own)
        one.refresh()
        assert one.complete("lora-0", "Hello") == text


def test_a_running_request_keeps_its_adapter(own):
    """Replaced or removed, an adapter goes on for the requests that run, and only for these."""
    alone = Alone(own)
    before = {name: alone.text(name, "Hello there", LONG) for name in ("lora-0", "dora-1")}
    with serving(own) as one, ThreadPoolExecutor(2) as clients:
        with one.paused():
            jobs = {
                name: clients.submit(one.complete, name, "Hello there", LONG) for name in before
            }
            one.until(lambda engine: engine.running == 2)
        one.until(lambda engine: all(job._sent for job in list(engine._running.values())))
        with one.paused():
            replace(own, "lora-0", seed=55)
            shutil.rmtree(own / "dora-1")
            one.refresh()
            assert one.engine.running == 2
        alone.forget("lora-0")
        after = one.complete("lora-0", "Hello there")
        assert after == alone.text("lora-0", "Hello there", 12) != before["lora-0"][:12]
        assert post(one, model="dora-1", prompt="Hello").status_code == 404
        assert {name: job.result() for name, job in jobs.items()} == before
        one.until(lambda _: one.is_clean())
        assert len(one.engine.pool.names) == 3  # the old ones are gone


def test_a_waiting_request_hears_of_its_adapter(own):
    """Removed while a request waits: status 404. Replaced: 409. Others are answered."""
    with serving(own, limits=ONE_AT_A_TIME) as one, ThreadPoolExecutor(4) as clients:
        with one.paused():
            first = clients.submit(one.complete, "base", "Hello")
            one.until(lambda engine: engine.running == 1)
            gone = clients.submit(post, one, model="lora-0", prompt="Hello")
            changed = clients.submit(post, one, model="dora-1", prompt="Hello", stream=True)
            other = clients.submit(one.complete, "head-2", "Hello")
            one.until(lambda engine: engine.waiting == 3)
            shutil.rmtree(own / "lora-0")
            replace(own, "dora-1", kind="dora", seed=55)
            one.refresh()
            assert (gone.result().status_code, error_of(gone.result())["param"]) == (404, "model")
            assert changed.result().status_code == 409
            assert error_of(changed.result())["code"] == "adapter_replaced"
        alone = Alone(own)
        assert first.result() == alone.text("base", "Hello", 12)
        assert other.result() == alone.text("head-2", "Hello", 12)
        one.until(lambda _: one.is_clean())


def test_a_corrupt_adapter_is_refused_by_name(own):
    """What cannot be served is said with its reason; the others are served."""
    weights = own / "dora-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (own / "lora-3" / "adapter_config.json").write_text("{")
    write_adapter(own, "base", seed=3)
    with serving(own) as one:
        with one.http() as http:
            refused = http.get("/health").json()["refused"]
        assert set(refused) == {"dora-1", "lora-3", "base"}
        assert not any(str(own) in reason for reason in refused.values())
        response = post(one, model="dora-1", prompt="Hello")
        assert (response.status_code, error_of(response)["code"]) == (404, "adapter_refused")
        assert "adapter_model.safetensors" in error_of(response)["message"]
        alone = Alone(own)
        assert one.complete("lora-0", "Hello") == alone.text("lora-0", "Hello", 12)
        shutil.rmtree(own / "dora-1")
        write_adapter(own, "dora-1", kind="dora", seed=9)
        one.refresh()
        assert one.complete("dora-1", "Hello") == alone.text("dora-1", "Hello", 12)


def test_links_do_not_leave_the_folder(own, tmp_path):
    """A link to another place is refused, of a folder or of a file; one within it is served."""
    write_adapter(tmp_path, "elsewhere", seed=5)
    weights = "adapter_model.safetensors"
    (own / "linked").symlink_to(tmp_path / "elsewhere")
    write_adapter(own, "half", seed=6)
    (own / "half" / weights).unlink()
    (own / "half" / weights).symlink_to(tmp_path / "elsewhere" / weights)
    (own / "also").symlink_to(own / "lora-0")
    with serving(own) as one:
        assert set(one.engine.folder.refused) == {"linked", "half"}
        for name in ("linked", "half"):
            assert post(one, model=name, prompt="Hello").status_code == 404
        assert one.complete("also", "Hello") == one.complete("lora-0", "Hello")


def test_a_read_error_is_that_requests_alone(own, monkeypatch):
    """An adapter that cannot be read is status 503 with the reason; it works again afterwards."""
    from dora_cache.serving import files

    real, broken = files._safe_open, set()

    def opening(path):
        if path.parent.name in broken:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(files, "_safe_open", opening)
    settings = {"prompt": "Hello", "temperature": 0, "max_tokens": 12}
    with serving(own) as one, ThreadPoolExecutor(4) as clients:
        broken.add("dora-1")
        asked = ("lora-0", "dora-1", "head-2", "dora-1")
        jobs = [clients.submit(post, one, model=name, **settings) for name in asked]
        found = [job.result() for job in jobs]
        assert [response.status_code for response in found] == [200, 503, 200, 503]
        message = error_of(found[1])["message"]
        assert "No space left on device" in message
        assert str(own) not in message
        broken.clear()
        alone = Alone(own)
        assert one.complete("dora-1", "Hello") == alone.text("dora-1", "Hello", 12)
        assert found[0].json()["choices"][0]["text"] == alone.text("lora-0", "Hello", 12)


def test_a_change_that_was_not_seen_yet_is_noticed(own):
    """Files that change before the folder is looked at again: no request gets a mixture."""
    with serving(own) as one:
        replace(own, "lora-0", seed=55)
        response = post(one, model="lora-0", prompt="Hello")
        assert (response.status_code, error_of(response)["code"]) == (409, "adapter_replaced")
        assert one.complete("lora-0", "Hello") == Alone(own).text("lora-0", "Hello", 12)
        shutil.rmtree(own / "lora-0")
        one.engine.pool.resize(device_bytes=0)
        one.engine.pool.resize(device_bytes=None)  # it has left the device
        assert post(one, model="lora-0", prompt="Hello").status_code == 404


def test_an_adapter_above_the_cap_is_refused(own):
    """An adapter that can never fit is an error with the numbers, and others are served."""
    with AdapterPool(make_model()) as pool:
        sizes = {name: pool._known(name).nbytes for name in pool.add_folder(own)}
    cap = sizes["head-2"] - 1
    assert sizes["lora-0"] <= cap
    with serving(own, device_bytes=cap) as one:
        response = post(one, model="head-2", prompt="Hello")
        assert response.status_code == 503
        assert "device_bytes" in error_of(response)["message"]
        assert one.complete("lora-0", "Hello") == Alone(own).text("lora-0", "Hello", 12)


def test_nobody_waits_for_ever(own):
    """A request whose adapter has no room runs before most that came after it."""
    with AdapterPool(make_model()) as pool:
        pool.add_folder(own)
        cap = pool._known("lora-0").nbytes
    limits = Limits(
        max_prompt=64, max_tokens=64, batch=2, queue=64, kv_tokens=512, batch_tokens=64, patience=3
    )
    with serving(own, limits=limits, device_bytes=cap) as one:
        order = []

        async def ask(name, number):
            request = one.engine.submit([1, 2, 3], name, Sampling(), 4 + number % 3)
            async for _ in request:
                pass
            order.append((name, number))

        async def everything():
            first = [ask("lora-0", number) for number in range(2)]
            later = [ask("lora-0", number) for number in range(2, 30)]
            await asyncio.gather(*first, ask("lora-3", 0), *later)

        one.run(everything())
        assert len(order) == 31
        # Two were before it, and no more than three are let past.
        assert order.index(("lora-3", 0)) <= 5


# Failures


def test_a_batch_that_fails_is_answered(served, alone, monkeypatch):
    """An error in a forward is status 500 for its requests, and the next ones are served."""
    body = type(served.engine.model.model)
    real, left = body.forward, [1]

    def failing(self, *args, **kwargs):
        if left and left.pop():
            raise RuntimeError("the device has hiccups")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(body, "forward", failing)
    response = post(served, model="lora-0", prompt="Hello")
    assert response.status_code == 500
    assert "hiccups" in error_of(response)["message"]
    assert served.complete("lora-0", "Hello") == alone.text("lora-0", "Hello", 12)


def test_a_stream_that_fails_says_so(folder, monkeypatch):
    """An error after the first token is an event of the stream, which has no end mark then."""
    with serving(folder) as one, one.client() as client:
        parts = client.completions.create(
            model="lora-0", prompt="Hello", max_tokens=LONG, temperature=0, stream=True
        )
        next(parts)
        monkeypatch.setattr(one.engine._batcher, "_pool", None)  # every batch fails
        with pytest.raises(openai.APIError, match="generation has failed"):
            list(parts)


def test_an_engine_that_is_given_up_says_so(folder, monkeypatch):
    """When batch after batch fails, health and requests are status 503, and nobody hangs."""
    with serving(folder) as one:
        monkeypatch.setattr(one.engine._batcher, "_pool", None)
        statuses = [post(one, model="lora-0", prompt="Hello").status_code for _ in range(5)]
        assert statuses == [500] * 5
        one.until(lambda engine: engine.failure is not None)
        assert post(one, model="lora-0", prompt="Hello").status_code == 503
        with one.http() as http:
            response = http.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "failed")


def test_a_server_that_stops_answers_all(folder):
    """Requests that run or wait when the time to drain is over get status 503."""
    with serving(folder, limits=ONE_AT_A_TIME) as one, ThreadPoolExecutor(3) as clients:
        with one.paused():
            jobs = [
                clients.submit(post, one, model="lora-0", prompt="Hello", max_tokens=LONG)
                for _ in range(3)
            ]
            one.until(lambda engine: (engine.running, engine.waiting) == (1, 2))
            one.run(one.engine.drain(0))
            assert [job.result().status_code for job in jobs] == [503] * 3
        one.until(lambda _: one.is_clean())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def start(saved, folder, *options):
    """Start the command; return its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "dora_cache", "serve", str(saved), "--adapters", str(folder),
        "--port", str(port), "--max-prompt", "128", "--max-tokens", "256", "--kv-tokens", "1024",
        "--name", "base", *options,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(900):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[1])


def test_sigterm_drains(saved, folder, alone):
    """After SIGTERM what runs is finished, what comes is status 503, and the exit status is 0."""
    process, url = start(saved, folder, "--device-bytes", "64MiB")
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            parts = client.completions.create(
                model="dora-1", prompt="Hello there", max_tokens=256, temperature=0, stream=True
            )
            text = next(parts).choices[0].text
            process.send_signal(signal.SIGTERM)
            statuses = []
            while 503 not in statuses:
                body = {"model": "base", "prompt": "Hello", "max_tokens": 1}
                statuses.append(httpx.post(f"{url}/v1/completions", json=body).status_code)
            assert httpx.get(f"{url}/health").json()["status"] == "draining"
            text += "".join(part.choices[0].text for part in parts)
        assert text == alone.text("dora-1", "Hello there", 256)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_mistakes_on_the_command_line_are_one_line():
    """A model or folder that is not there is one line and exit code 2."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for arguments in (["no-such-folder/model"], ["x", "--adapters", "no-such-folder"]):
        done = subprocess.run(
            [sys.executable, "-m", "dora_cache", "serve", *arguments],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert (done.returncode, last.startswith("error: ")) == (2, True), done.stderr
        assert "no-such-folder" in last


# Metrics and limits


def test_metrics_count_requests(served):
    """/metrics has the pool's metrics and the requests', and they agree with the counters."""
    served.complete("lora-0", "Hello")
    served.complete("lora-0", "Hello")
    with served.http() as http:
        response = http.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    engine, stats = served.engine, served.engine.pool.stats()
    labels = {"model": "base", "pool": str(engine.pool.number)}
    samples = [
        one
        for family in text_string_to_metric_families(response.text)
        for one in family.samples
        if one.name != "dora_cache_build_info"
    ]
    assert all(one.labels.items() >= labels.items() for one in samples)
    found = {
        (one.name.removeprefix("dora_cache_"), *(one.labels.keys() - labels.keys())): one
        for one in samples
        if len(one.labels) == len(labels)
    }
    assert found["requests_running",].value == found["requests_waiting",].value == 0
    assert found["pool_lookups_total",].value == stats.lookups > 0
    assert found["pool_load_seconds_count",].value == stats.loads > 0
    outcomes, tiers = (
        {one.labels[label]: one.value for one in samples if one.name == f"dora_cache_{name}_total"}
        for name, label in (("requests", "outcome"), ("request_adapters", "tier"))
    )
    assert outcomes["finished"] == engine.counts["finished"] > 0
    assert tiers["device"] > 0
    assert sum(tiers.values()) <= sum(outcomes.values()) - outcomes["turned_away"]


def test_top_watches_it(served):
    """`dora-cache top` shows the pool and the requests of a server."""
    served.complete("lora-0", "Hello")
    done = CliRunner().invoke(app, ["top", served.url, "--once"])
    assert done.exit_code == 0, done.output
    pool = f"base/{served.engine.pool.number}"
    row = next(line for line in done.stdout.splitlines() if line.split()[:1] == [pool]).split()
    finished = served.engine.counts["finished"]
    assert row[1:4] == ["0", "0", str(finished)]
    assert "Adapters by tier" in done.stdout


def test_limits_must_go_together(folder):
    """Limits that contradict each other or the model are refused when they are given."""
    with pytest.raises(ConfigError, match="kv_tokens"):
        Limits(kv_tokens=100)
    with pytest.raises(ConfigError, match="batch is 0"):
        Limits(batch=0)
    with AdapterPool(make_model()) as pool:
        limits = Limits(max_prompt=600, max_tokens=10)
        with pytest.raises(ConfigError, match="positions are 512"):
            Engine(pool._model, pool, AdapterFolder(pool, folder), limits)
