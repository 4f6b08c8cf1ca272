"""Groups of any layers on the GPU: steps, the way back and optimizer state, with each backend."""

from __future__ import annotations

import pytest
import torch
from cut_models import CASES, case

from gisp_kernels import Compactor, _ext

NO_CORE = _ext.why_not("cuda")
BACKENDS = ["triton", pytest.param("native", marks=pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE)))]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_steps_move_what_they_move_on_the_cpu(name: str, dtype: torch.dtype, backend: str) -> None:
    models = {}
    for device in ("cuda", "cpu"):
        found = case(name)
        found.model.to(dtype)
        optimizer = torch.optim.SGD(found.model.parameters(), 0.1, momentum=0.9)
        for number, parameter in enumerate(found.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.grad = noise.to(parameter).reshape(parameter.shape).contiguous()
        optimizer.step()
        # Stepped on the CPU alike, so that what follows moves the same bits.
        found.model.to(device)
        for state in optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to(device)
        chosen = backend if device == "cuda" else "reference"
        models[device] = found, optimizer, Compactor(found.groups, backend=chosen, optimizer=optimizer)
    steps = [lambda c, s=step: c.remove(s) for step in case(name).steps]
    for act in (*steps, lambda c: c.rollback(), lambda c: c.pack(), lambda c: c.remove(case(name).steps[1])):
        for _, _, compactor in models.values():
            act(compactor)
        (mine, own, _), (other, its, _) = models["cuda"], models["cpu"]
        for one, two in zip(mine.model.parameters(), other.model.parameters(), strict=True):
            assert one.shape == two.shape and one.stride() == two.stride()
            assert torch.equal(one.detach().cpu(), two.detach())
            state = own.state[one]["momentum_buffer"].cpu(), its.state[two]["momentum_buffer"]
            assert torch.equal(*state)
