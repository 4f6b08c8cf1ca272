"""Uses exported folders in a process that has only torch and transformers; run as a script by test_export.py.

Usage: fresh_reload.py ROOT [EXTRA_SYS_PATH]. ROOT holds ``<family>/`` exports and ``<family>.safetensors`` with
``input_ids``, ``logits`` and ``generated`` of the masked dense model. Prints one JSON object per family.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class _NotInstalled(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in ("gisp", "gisp_kernels"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _stock_errors(folder: Path) -> dict[str, str]:
    """Exception of the stock class, with and without permission to re-initialise mismatched weights."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0].removeprefix("Gisp")
    errors = {}
    for ignore in (False, True):
        try:
            getattr(transformers, name).from_pretrained(folder, ignore_mismatched_sizes=ignore)
            errors[str(ignore)] = ""
        except Exception as error:
            errors[str(ignore)] = type(error).__name__
    return errors


def _gradients(model: Any, ids: Any) -> list[Any]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def use(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Everything a user does with a checkpoint; numbers are largest absolute differences."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    ids, logits = wanted["input_ids"], wanted["logits"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    result: dict[str, Any] = {"class": type(model).__name__, "module": type(model).__module__}

    def difference(other: Any) -> float:
        with torch.no_grad():
            return float((other(input_ids=ids).logits - logits).abs().max())

    result["logits"] = difference(model)
    for kind in ("dynamic", "static"):
        extra = {} if kind == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
        count = wanted["generated"].shape[1] - ids.shape[1]
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **extra)
        result[f"generate_{kind}"] = bool(torch.equal(out, wanted["generated"]))
    plain = _gradients(model.train(), ids)
    model.gradient_checkpointing_enable()
    checkpointed = _gradients(model, ids)
    result["checkpointing"] = max(float((a - b).abs().max()) for a, b in zip(plain, checkpointed, strict=True))
    model.gradient_checkpointing_disable()
    model.eval()
    model.set_attn_implementation("eager")
    result["eager"] = difference(model)
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    result["attention_heads"] = [weights.shape[1] for weights in attentions]
    model.set_attn_implementation("sdpa")
    result["sdpa"] = difference(model)
    for name, saved in (("causal", model), ("decoder", model.model)):
        copy = folder.with_name(f"{folder.name}-{name}")
        saved.save_pretrained(copy)
        result[f"auto_map_{name}"] = sorted(json.loads((copy / "config.json").read_text())["auto_map"])
    copy = folder.with_name(f"{folder.name}-causal")
    result["round_trip"] = difference(AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True).eval())
    hidden = model.model(input_ids=ids).last_hidden_state
    for name in ("causal", "decoder"):
        copy = folder.with_name(f"{folder.name}-{name}")
        decoder = AutoModel.from_pretrained(copy, trust_remote_code=True).eval()
        result[f"decoder_from_{name}"] = float((decoder(input_ids=ids).last_hidden_state - hidden).abs().max())
    result["stock"] = _stock_errors(folder)
    return result


def main() -> None:
    sys.meta_path.insert(0, _NotInstalled())
    sys.path[:0] = sys.argv[2:]
    from safetensors.torch import load_file

    root = Path(sys.argv[1])
    results = {path.stem: use(root / path.stem, load_file(path)) for path in sorted(root.glob("*.safetensors"))}
    import transformers

    foreign = sorted(name for name in sys.modules if name.split(".")[0] in ("gisp", "gisp_kernels"))
    print(json.dumps({"families": results, "foreign": foreign, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
