"""Adapters as transformers puts them into a model."""

import pytest
import torch
from field_setups import check, ids
from peft import get_peft_model

import dora_cache
from dora_cache.lab.field import setups
from dora_cache.lab.field.of_transformers import config, llama, running

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`"
)  # of a second adapter


@pytest.mark.parametrize("setup", setups("transformers"), ids=ids)
def test_setup(setup):
    check(setup)


@torch.no_grad()
def test_adapters_are_loaded_after_attaching(tmp_path):
    few = config(True, target_modules=["q_proj"])
    get_peft_model(llama(32), few).save_pretrained(tmp_path / "few")
    get_peft_model(llama(32), config(True)).save_pretrained(tmp_path / "all")
    model = llama(32)
    model.load_adapter(tmp_path / "few", "a")
    run = running(model).run
    with dora_cache.attach(model) as cache:
        model.load_adapter(tmp_path / "all", "b")
        for name, layers in [("b", 14), ("a", 2), ("b", 14)]:
            model.set_adapter(name)
            output = run()
            before = cache.stats()
            assert torch.equal(run(), output)
            after = cache.stats()
            with cache.bypass():
                assert torch.equal(run(), output)
            assert after.hits - before.hits == layers
            assert after.misses == before.misses
        model.disable_adapters()
        disabled = run()
        assert not torch.equal(disabled, output)
        model.enable_adapters()
        assert torch.equal(run(), output)
        model.set_adapter("a")
        model.delete_adapter("b")
        assert cache.stats().entries == 2


def test_a_training_loop_is_left_alone():
    """What transformers' Trainer does: train(), steps, eval()."""
    model = llama(32)
    model.add_adapter(config(True), "a")
    plain = llama(32)
    plain.add_adapter(config(True), "a")
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(1, 9)[None]
    with dora_cache.attach(model) as cache:
        optimizers = [
            torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
            for one in (model, plain)
        ]
        for _ in range(2):
            losses = []
            for one, optimizer in zip((model, plain), optimizers, strict=True):
                one.train()
                for _ in range(2):
                    loss = one(ids, labels=ids).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                one.eval()
                with torch.no_grad():
                    losses.append((loss.detach(), one(ids).logits, one(ids).logits))
            assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
        stats = cache.stats()
        assert stats.hits == stats.misses == 2 * 14  # of the two evaluations
        assert set(stats.reasons) == {"gradients wanted", "training mode"}
