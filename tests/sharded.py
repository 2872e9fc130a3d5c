"""DoRA models sharded by FSDP2 over several processes, with and without a cache.

Run it as each process of a group, on CPUs with gloo or on GPUs with nccl:

    python -m torch.distributed.run --nproc-per-node 2 tests/sharded.py --turns 1000

Each process prints one line of JSON for each way of sharding: how many outputs were wrong, after
which kind of write, how many calls hit, and what went past the cache. ``--others`` adds writes that
nothing counts, and FSDP1. With ``--timing 100`` the forward is timed in turns with those of the
model without a cache and of plain LoRA. The exit status is 1 if an output was wrong or nothing hit.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import dora_cache

HITTING = ("resharding", "kept", "half precision")
WAYS = (*HITTING, "smaller group")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def plain_model(width, *, layers=2, dora=True):
    """Return a model that is not sharded, the same in each process."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(width) for _ in range(layers)])
    config = LoraConfig(use_dora=dora, r=3, target_modules=["up", "down"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def make(mesh, width, *, way="resharding", **settings):
    """Return a model of which each block is sharded."""
    model = plain_model(width, **settings).to(mesh.device_type)
    sharding = {
        "mesh": mesh,
        "reshard_after_forward": {"kept": False, "smaller group": 2}.get(way, True),
    }
    if way == "half precision":
        sharding["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.base_model.model:
        fully_shard(block, **sharding)
    return fully_shard(model, **sharding)


def weights(model, name):
    return [weight for key, weight in model.named_parameters() if name in key]


def in_place(name):
    def write(model, factor):
        with torch.no_grad():
            for weight in weights(model, name):
                weight.mul_(factor)

    return write


def local(model, factor):
    with torch.no_grad():
        for weight in weights(model, "lora_A"):
            weight.to_local().mul_(factor)


def step(kind, **settings):
    def write(model, _):
        chosen = weights(model, "lora_")
        for weight in chosen:
            weight.grad = torch.sign(weight.detach())
        kind(chosen, lr=0.01, **settings).step()
        for weight in chosen:
            weight.grad = None

    return write


def scaled(model, factor):
    return {name: value.detach() * factor for name, value in model.state_dict().items()}


def load(model, factor):
    model.load_state_dict(scaled(model, factor))


def assign(model, factor):
    model.load_state_dict(scaled(model, factor), assign=True)


def whole(model, factor):
    options = StateDictOptions(full_state_dict=True)
    state = {
        name: value * factor for name, value in get_model_state_dict(model, options=options).items()
    }
    set_model_state_dict(model, state, options=options)


def broadcast(model, factor):
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    state = {name: value * factor for name, value in state.items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=options)


def checkpoint(model, factor):
    """Load into the shards themselves, past the counters of the sharded parameters."""
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    dcp.save(scaled(model, factor), checkpoint_id=folder[0])
    dcp.load(model.state_dict(), checkpoint_id=folder[0])


def unsharded(model, factor):
    """Write to what has been gathered; it lasts until the next gathering."""
    for block in model.base_model.model:
        block.unshard()
    with torch.no_grad():
        for weight in weights(model, "lora_B"):
            weight.mul_(factor)


def between(model, factor):
    """Write to the shards after the gathering has read them, if there are several processes."""
    sharded = weights(model, "lora_B")
    for block in model.base_model.model:
        block.unshard(async_op=True)
    with torch.no_grad():
        for weight in sharded:
            weight.mul_(factor)


def half(model, _):
    """Move the shards elsewhere."""
    model.to(torch.float64)
    model.to(torch.float32)


WRITES = {
    "lora_A in place": in_place("lora_A"),
    "lora_B in place": in_place("lora_B"),
    "magnitude in place": in_place("magnitude"),
    "base weight in place": in_place("base_layer.weight"),
    "local shard in place": local,
    "SGD": step(torch.optim.SGD),
    "AdamW": step(torch.optim.AdamW, foreach=True),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "load_state_dict": load,
    "load_state_dict, assign": assign,
    "set_model_state_dict": whole,
    "set_model_state_dict, broadcast": broadcast,
    "checkpoint in place": checkpoint,
    "unsharded in place": unsharded,
    "shard written after gathering": between,
    "other dtype and back": half,
}
RESHARDS = ("unsharded in place", "shard written after gathering")


def check(mesh, turns, way, width):
    """Count the forwards whose output is not the plain model's."""
    device = mesh.device_type
    model, plain = (make(mesh, width, way=way) for _ in range(2))
    chosen, wrong, done = random.Random(0), {}, {}
    torch.manual_seed(dist.get_rank())
    with dora_cache.attach(model) as cache, torch.no_grad():
        name, left = "nothing", []
        for turn in range(turns):
            x = torch.randn(1 + chosen.randrange(40), width, device=device)
            if not torch.equal(model(x), plain(x)):
                wrong[name] = wrong.get(name, 0) + 1
            if name in RESHARDS:
                for one in (model, plain):
                    for block in one.base_model.model:
                        block.reshard()
            name, factor = "nothing", chosen.choice([1.01, 1 / 1.01])
            if turn % 2:  # the second forward after a write can hit
                left = left or chosen.sample(list(WRITES), len(WRITES))
                name = left.pop()
                done[name] = done.get(name, 0) + 1
                for one in (model, plain):
                    if name not in RESHARDS:
                        for block in one.base_model.model:
                            block.reshard()
                        one.reshard()
                    with torch.enable_grad():
                        WRITES[name](one, factor)
        stats = cache.stats()
    return {
        "way": way,
        "turns": turns,
        "wrong": wrong,
        "writes": done,
        "hits": stats.hits,
        "misses": stats.misses,
        "reasons": dict(stats.reasons),
    }


def late(mesh, width, *, alone):
    """Count the wrong outputs after a write that nothing counts; the audit ends them.

    Either all processes write past the counters, or the first one alone, where the others see none.
    """
    model, plain = (make(mesh, width) for _ in range(2))
    x = torch.ones(4, width, device=mesh.device_type)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for _ in range(8):
            model(x)
        for one in (model, plain):
            for weight in weights(one, "lora_B"):
                if not alone:
                    weight.data.mul_(2)
                elif dist.get_rank() == 0:
                    weight.to_local().mul_(2)
        equal = [torch.equal(model(x), plain(x)) for _ in range(80)]
        stats = cache.stats()
    left = equal[50:].count(False)
    return {
        "way": "written by one process" if alone else "written uncounted",
        "wrong": {"long after": left} if left else {},
        "late": equal.count(False),
        "hits": stats.hits,
    }


def fsdp1(mesh, width, *, flat):
    """Count the wrong outputs of the older kind of sharding."""

    def make_flat():
        model = plain_model(width)
        if flat:  # it takes no mixture of trained and frozen ones then
            model.requires_grad_(False)
        cuda = mesh.device_type == "cuda"
        device = torch.cuda.current_device() if cuda else torch.device("cpu")
        wrapped = FullyShardedDataParallel(model, use_orig_params=not flat, device_id=device)
        return wrapped.eval()

    model, plain = make_flat(), make_flat()
    wrong = 0
    with dora_cache.attach(model) as cache, torch.no_grad():
        for _ in range(20):
            x = torch.randn(4, width, device=mesh.device_type)
            wrong += not torch.equal(model(x), plain(x))
            for one in (model, plain):
                for weight in one.parameters():
                    weight.mul_(1.01)
        stats = cache.stats()
    way = "FSDP1, flat parameters" if flat else "FSDP1"
    wrong = {"in place": wrong} if wrong else {}
    return {"way": way, "wrong": wrong, "hits": stats.hits, "reasons": dict(stats.reasons)}


def inference(mesh, width):
    """Run a model whose first forward is in inference mode, so that nothing can be checked."""
    model, plain = (make(mesh, width) for _ in range(2))
    x, wrong = torch.ones(4, width, device=mesh.device_type), 0
    with dora_cache.attach(model) as cache, torch.inference_mode():
        for _ in range(3):
            wrong += not torch.equal(model(x), plain(x))
        stats = cache.stats()
    wrong = {"first forward": wrong} if wrong else {}
    return {
        "way": "inference mode",
        "wrong": wrong,
        "hits": stats.hits,
        "reasons": dict(stats.reasons),
    }


def timed(mesh, width, rounds):
    """Return milliseconds per forward of each kind of model, taken in turns."""
    device = mesh.device_type
    models = {
        "lora": make(mesh, width, layers=4, dora=False),
        "uncached": make(mesh, width, layers=4),
        "cached": make(mesh, width, layers=4),
    }
    x = torch.randn(16, width, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = {name: [] for name in models}
    with dora_cache.attach(models["cached"]), torch.no_grad():
        for turn in range(rounds + 10):
            names = list(models)
            random.Random(turn).shuffle(names)
            for name in names:
                dist.barrier()
                wait()
                start = time.perf_counter()
                models[name](x)
                wait()
                if turn >= 10:
                    taken[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratio = statistics.median(
        one / other for one, other in zip(taken["cached"], taken["lora"], strict=True)
    )
    return {"way": "timing", "width": width, "ms": medians, "cached / lora": ratio}


def main(arguments=None, tell=print):
    """Run the checks in this process of the group that the environment names; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=200, help="forwards for each way of sharding")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--others", action="store_true", help="uncounted writes, and FSDP1")
    parser.add_argument("--timing", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--timing-width", type=int, default=1024)
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= world else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=120))
    failed = False
    try:
        mesh = dist.device_mesh.init_device_mesh(device, (world,))
        jobs = [
            partial(check, mesh, given.turns, way, given.width)
            for way in given.ways
            if way != "smaller group" or (world > 2 and world % 2 == 0)
        ]
        if given.others:
            jobs += [partial(late, mesh, given.width, alone=alone) for alone in (False, True)]
            jobs += [partial(fsdp1, mesh, given.width, flat=flat) for flat in (False, True)]
            if world > 1:  # FSDP2 itself fails in a group of one
                jobs.append(partial(inference, mesh, given.width))
        if given.timing:
            jobs.append(partial(timed, mesh, given.timing_width, given.timing))
        for job in jobs:
            found = job()
            tell(json.dumps({"rank": rank, "device": device, **found}))
            unused = found["way"] in HITTING and not found["hits"]
            failed = failed or bool(found.get("wrong")) or unused
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    return int(failed)


def join(rank, world, port, arguments, results):
    """Be one process of a group over the loopback interface; put what was found on a queue."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    lines = []
    status = main(arguments, lines.append)
    results.put((status, lines))


if __name__ == "__main__":
    sys.exit(main())
