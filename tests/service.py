"""An object of a user's that holds an attached model and its cache, to be copied."""

import torch
from torch import nn
from zoo import dora_model

import dora_cache


class Service(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.model = dora_model(adapters=("first", "second"))
        self.cache = dora_cache.attach(self.model, **settings)

    def forward(self, x):
        with torch.no_grad():
            return self.model(x)

    def uncached(self, x):
        """What PEFT computes from the present weights."""
        with self.cache.bypass():
            return self(x)

    def change(self, factor):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(factor)


def forward(service, x, results):
    """What a spawned process does with the copy that it is given."""
    results.put(service(x).tolist())
