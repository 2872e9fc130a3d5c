"""A DoRA model sharded by FSDP2 over several processes, with and without a cache.

Run as ``python tests/sharded.py WORLD DEVICE TURNS``, or by tests.
"""

import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import multiprocessing, nn

import dora_cache


def make(mesh, device):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    config = LoraConfig(use_dora=True, r=4, target_modules=["0", "1", "2"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]), config)
    model = model.to(device).eval()
    for layer in model.base_model.model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def step(models, _):
    for model in models:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.grad = torch.sign(weight.detach())
        torch.optim.SGD(weights, lr=0.01).step()
        for weight in weights:
            weight.grad = None


def write(name):
    @torch.no_grad()
    def act(models, factor):
        for model in models:
            for key, weight in model.named_parameters():
                if name in key:
                    weight.mul_(factor)

    return act


def load(models, factor):
    for model in models:
        state = {name: value * factor for name, value in model.state_dict().items()}
        model.load_state_dict(state)


WRITES = {
    "optimizer step": step,
    "lora_B in place": write("lora_B"),
    "magnitude in place": write("magnitude"),
    "base weight in place": write("base_layer.weight"),
    "load_state_dict": load,
    "nothing": lambda *_: None,
}


def run(rank, world, device, turns, folder):
    """Count the forwards whose output is not the plain model's; each process writes its count."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        mesh = dist.device_mesh.init_device_mesh(device, (world,))
        model, plain = make(mesh, device), make(mesh, device)
        chosen, wrong = random.Random(0), dict.fromkeys(WRITES, 0)
        with dora_cache.attach(model) as cache:
            name = "nothing"
            for _ in range(turns):
                x = torch.randn(1 + chosen.randrange(40), 64, device=device)
                with torch.no_grad():
                    wrong[name] += not torch.equal(model(x), plain(x))
                name, factor = chosen.choice(list(WRITES)), chosen.choice([1.01, 1 / 1.01])
                WRITES[name]((model, plain), factor)
                for one in (model, plain):
                    one.reshard()
            text = f"rank {rank}: {wrong}, {dict(cache.stats().reasons)}"
        (Path(folder) / f"wrong-{rank}").write_text(str(sum(wrong.values())))
        print(text, flush=True)
    finally:
        dist.destroy_process_group()


def count_wrong(world, device, turns):
    """Return how many forwards were wrong, over all processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (world, device, turns, folder), nprocs=world)
        return sum(int((Path(folder) / f"wrong-{rank}").read_text()) for rank in range(world))


if __name__ == "__main__":
    found = count_wrong(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print(f"{found} wrong")
    sys.exit(found > 0)
