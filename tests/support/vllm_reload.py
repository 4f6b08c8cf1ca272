"""Runs exported folders through vLLM's own model code on a CPU; a script started by test_serving.py, one per device.

Usage: vllm_reload.py RANK DEVICES STORE FOLDER... STORE is a file the processes meet at. vLLM reads the configuration,
picks and builds the model, splits and loads the weights and computes the logits; only its attention kernel, which needs
a GPU, is replaced by torch's. Prints one JSON object per folder: architecture, heads per layer on this device and the
largest difference from the logits that transformers compute, relative to the largest logit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")

import torch

TOKENS = 40


def causal_attention(
    layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    """What vLLM's attention layer computes for one sequence; [tokens, heads * head size] each."""
    q, k, v = (
        x.view(-1, count, layer.head_size).transpose(0, 1)[None]
        for x, count in ((query, layer.num_heads), (key, layer.num_kv_heads), (value, layer.num_kv_heads))
    )
    place = torch.arange(q.shape[2])
    distance = place[:, None] - place
    mask = (distance >= 0) & (distance < (layer.sliding_window or len(place)))
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=layer.impl.scale, enable_gqa=True
    )
    return mixed[0].transpose(0, 1).flatten(1)


def serve(folder: Path, rank: int, devices: int, ids: torch.Tensor) -> tuple[str, list[list[int]], torch.Tensor]:
    """Architecture, (query, key/value) heads of every layer on this device, and logits [tokens, vocabulary]."""
    from safetensors.torch import load_file
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        DeviceConfig,
        ModelConfig,
        ParallelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    model_config = ModelConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
    )
    types = getattr(model_config.hf_config, "layer_types", None)
    config = VllmConfig(
        model_config=model_config,
        # Where layers differ in their window the model sets it itself.
        cache_config=CacheConfig(sliding_window=None if types else model_config.get_sliding_window()),
        parallel_config=ParallelConfig(
            tensor_parallel_size=devices, rank=rank, distributed_executor_backend="external_launcher"
        ),
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(mode=0, custom_ops=["none"]),
    )
    Attention.forward = causal_attention
    with set_current_vllm_config(config), torch.no_grad():
        _meet(rank, devices)
        torch.set_default_dtype(torch.float32)
        model: Any = initialize_model(config)
        loaded = model.load_weights(iter(load_file(folder / "model.safetensors").items()))
        missing = sorted({name for name, _ in model.named_parameters()} - set(loaded))
        assert not missing, missing
        process_weights_after_loading(model, model_config, torch.device("cpu"))
        with set_forward_context(None, config, num_tokens=TOKENS):
            logits: torch.Tensor = model.compute_logits(model(ids, torch.arange(TOKENS), None))
        heads = [[m.num_heads, m.num_kv_heads] for m in model.modules() if isinstance(m, Attention)]
    return type(model).__name__, heads, logits


def _meet(rank: int, devices: int) -> None:
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        init_distributed_environment(devices, rank, f"file://{sys.argv[3]}", rank, "gloo")
        initialize_model_parallel(devices, 1)


def main() -> None:
    rank, devices, folders = int(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[4:]]
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 100, (TOKENS,), generator=torch.Generator().manual_seed(0))
    wanted = {}
    # First: vLLM changes the classes it builds models from.
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted[folder] = model(input_ids=ids[None]).logits[0]
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()
    for folder in folders:
        architecture, heads, logits = serve(folder, rank, devices, ids)
        difference = float((logits - wanted[folder]).abs().max() / wanted[folder].abs().max())
        print(json.dumps({"folder": folder.name, "model": architecture, "heads": heads, "difference": difference}))


if __name__ == "__main__":
    main()
