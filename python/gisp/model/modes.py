"""How a model computes for a while: in evaluation mode, without parameter gradients, deterministically, exactly, by
other code."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    """New tensors on the CPU where nothing else is said, wherever ``torch.set_default_device`` of the caller puts them.

    Where that is the CPU nothing changes: a mode of torch costs every call.
    """
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, each as it was afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on a device; the settings as before afterwards."""
    algorithms = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    # Attention backward passes are deterministic only in the strict mode; a warning would not make them so.
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False
    try:
        if device.type == "cuda":
            _let_multiply(device)
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        switches.fill_uninitialized_memory = fill


@functools.cache
def _let_multiply(device: torch.device) -> None:
    """Let deterministic algorithms multiply matrices, at no cost to later products.

    Some versions of torch take cuBLAS for deterministic only with a certain workspace in the environment, and look for
    it once. Up to torch 2.11 every product then reads the workspace's size out of it, by a regular expression that
    takes the host longer than ten launches. torch hands cuBLAS a workspace of each stream. With that it is
    deterministic, whatever the environment says.
    """
    if _WORKSPACE in os.environ:
        return
    os.environ[_WORKSPACE] = ":4096:8"
    _multiply(device)
    del os.environ[_WORKSPACE]
    try:
        _multiply(device)
    except RuntimeError:
        # Here it is looked for every time.
        os.environ[_WORKSPACE] = ":4096:8"


def _multiply(device: torch.device) -> None:
    matrix = torch.ones(16, 16, device=device)
    torch.mm(matrix, matrix)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient for any parameter; everything as before afterwards.

    With no parameter needing a gradient the backward pass ends at the first scored layer.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the process has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another ``forward`` of a module for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own
