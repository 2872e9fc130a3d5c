"""A small model, its adapters and a real server of them in a thread, for tests/serve."""

import asyncio
import contextlib
import functools
import threading
import time

import httpx
import openai
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_cache import AdapterPool
from dora_cache.serving.server import AdapterFolder, Engine, Limits, Server, create_app

VOCABULARY = 300
LIMITS = Limits(max_prompt=128, max_tokens=256, batch=8, queue=64, kv_tokens=4096, batch_tokens=64)
SETTINGS = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "head": {"target_modules": ["lm_head", "embed_tokens", "k_proj"]},
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def tokenizer():
    """One character for each token: texts differ where tokens do."""
    characters = [chr(10), *map(chr, range(32, 127)), *map(chr, range(0x400, 0x600))]
    vocabulary = {one: number for number, one in enumerate(characters[:VOCABULARY])}
    split = Tokenizer(models.BPE(vocabulary, []))
    split.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=split)
    made.chat_template = TEMPLATE
    return made


def write_adapter(folder, name, *, kind="lora", seed=1):
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, **SETTINGS[kind])
    model = make_model()
    torch.manual_seed(seed)
    get_peft_model(model, config).save_pretrained(folder / name, save_embedding_layers=False)


def write_adapters(folder, count=4):
    for number in range(count):
        kind = list(SETTINGS)[number % 3]
        write_adapter(folder, f"{kind}-{number}", kind=kind, seed=number + 1)
    return sorted(one.name for one in folder.iterdir())


class Alone:
    """What each request's answer is when plain PEFT computes it alone, greedily, in float32."""

    def __init__(self, folder):
        self._folder = folder
        self._models = {}
        self._known = {}

    def tokens(self, name, prompt, count):
        """Return the generated tokens; of the base model where no adapter has the name."""
        known = (name, tuple(prompt) if isinstance(prompt, list) else prompt, count)
        if known not in self._known:
            if name not in self._models:
                model = make_model()
                if (self._folder / name).is_dir():
                    model = PeftModel.from_pretrained(model, self._folder / name).eval()
                self._models[name] = model
            ids = prompt if isinstance(prompt, list) else tokenizer()(prompt)["input_ids"]
            found = self._models[name].generate(
                input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False
            )
            self._known[known] = found[0, len(ids) :].tolist()
        return self._known[known]

    def text(self, name, prompt, count):
        return tokenizer().decode(self.tokens(name, prompt, count), skip_special_tokens=True)

    def forget(self, name):
        """Have an adapter be read again."""
        self._models.pop(name, None)
        self._known = {key: one for key, one in self._known.items() if key[0] != name}


class Served:
    """A running server."""

    def __init__(self, server, engine, thread):
        self.server, self.engine, self.thread = server, engine, thread
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, **settings):
        settings = {"max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **settings)

    def http(self):
        return httpx.Client(base_url=self.url, timeout=60)

    def run(self, work):
        """Run a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.server._loop).result(60)

    def refresh(self):
        self.run(self.engine.refresh())

    def complete(self, name, prompt, count=12, **settings):
        """Return the text of a greedy completion."""
        with self.client() as client:
            return (
                client.completions.create(
                    model=name, prompt=prompt, max_tokens=count, temperature=0, **settings
                )
                .choices[0]
                .text
            )

    def until(self, condition, seconds=30):
        """Wait until something holds of the engine."""
        end = time.monotonic() + seconds
        while not condition(self.engine):
            assert time.monotonic() < end, "it never came"
            time.sleep(0.005)

    def paused(self):
        """Have no request go on within the block."""
        return self.engine._batcher.pause()

    def is_clean(self):
        """Tell whether nothing is left of any request."""
        engine = self.engine
        batcher = engine._batcher
        left = [
            engine._waiting, engine._running, engine._users, engine._tasks, batcher._adapters,
            batcher._samplers, batcher._leaving, batcher.batch_processor.scheduler.active_requests,
            batcher.output_router.result_handlers, engine.pool._tiers._pinned_ones,
        ]  # fmt: skip
        users = [one.users for one in engine.folder.versions]
        return not any(left) and not any(users) and batcher.output_router.output_queue.empty()


@contextlib.contextmanager
def serving(folder, *, limits=LIMITS, model=None, device_bytes=None, chat=None):
    """Run a server of a folder's adapters."""
    model = model or make_model()
    with AdapterPool(model, device_bytes=device_bytes) as pool:
        adapters = AdapterFolder(pool, folder, reserved=frozenset({"base"}))
        adapters.refresh()
        engine = Engine(model, pool, adapters, limits)
        app = create_app(engine, chat or tokenizer(), model="base", refresh=None)
        config = uvicorn.Config(app, port=0, log_level="warning")
        server = Server(config, engine, None)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Served(server, engine, thread)
        finally:
            server.should_exit = True
            thread.join(60)
        assert not thread.is_alive()
