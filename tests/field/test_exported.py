"""Baked models in other runtimes: ONNX Runtime and AOTInductor."""

import numpy as np
import onnxruntime
import pytest
import torch
from zoo import activate, dora_model, quiet, run, sample

import dora_cache

pytestmark = [
    pytest.mark.timeout(600),  # compilers
    pytest.mark.filterwarnings("default"),  # theirs
]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_onnx(tmp_path, kind, weights):
    """ONNX Runtime computes what the eager model does, by a graph without norms or reductions."""
    import onnx

    model, x = dora_model(kind), sample(kind)
    activate(model, "first")
    expected = run(model, x)
    path = tmp_path / "model.onnx"
    with dora_cache.attach(model) as cache, cache.baked(weights=weights), torch.no_grad(), quiet():
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    found = {node.op_type for node in onnx.load(path).graph.node}
    assert not {one for one in found if one.startswith("Reduce") or one in {"Div", "Sqrt"}}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_aotinductor(tmp_path):
    """Packages compute what the eager model does, and go on to when the model changes."""
    model, x = dora_model(), sample("linear")
    activate(model, "first")
    expected, programs = run(model, x), []
    with dora_cache.attach(model) as cache:
        for weights in (False, True):
            path = str(tmp_path / f"{weights}.pt2")
            with torch.no_grad(), quiet():
                with cache.baked(weights=weights):
                    program = torch.export.export(model, (x,))
                torch._inductor.aoti_compile_and_package(program, package_path=path)
                programs.append(torch._inductor.aoti_load_package(path))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    for program in programs:
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
