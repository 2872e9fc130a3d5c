"""What every library that quantizes base weights must show."""

import torch

import dora_cache


class Counted:
    """Counts calls of functions of a library, in their modules or classes."""

    def __init__(self, monkeypatch, *places):
        self.calls = 0
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, function):
        def counting(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return counting

    def during(self, run):
        """Return how many calls there are while something runs."""
        before = self.calls
        run()
        return self.calls - before


def base_layers(model):
    """Return the base layers that have an adapter on them."""
    return [
        module.get_base_layer() for module in model.modules() if hasattr(module, "lora_variant")
    ]


@torch.no_grad()
def dequantizes_as_plain_lora_does(setup, counted):
    """A cached DoRA model's second forward dequantizes as often as plain LoRA's; uncached, more."""
    lora, dora, uncached = (setup.build(use_dora, 64) for use_dora in (False, True, True))
    lora.run()
    plain = counted.during(lora.run)
    assert counted.during(uncached.run) > plain
    with dora_cache.attach(dora.model):
        dora.run()
        assert counted.during(dora.run) == plain


@torch.no_grad()
def notices(setup, change, *, twice=True):
    """After a change to every base layer, outputs are those of a model without a cache.

    Args:
        setup: the set-up.
        change: called with each base layer.
        twice: whether PEFT can run the set-up a second time without a cache.
    """
    found, plain = setup.build(True, 64), setup.build(True, 64)
    with dora_cache.attach(found.model) as cache:
        found.run()
        before = found.run()
        hits = cache.stats().hits
        assert hits > 0
        if twice:
            plain.run()
        for one in (found, plain):
            for layer in base_layers(one.model):
                change(layer)
        after = found.run()
        assert not torch.equal(before, after)
        assert torch.equal(after, plain.run())
        assert torch.equal(found.run(), after)
        assert cache.stats().hits > hits
