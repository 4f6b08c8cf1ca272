"""GGUF exports and llama.cpp: what its answer decides, and llama.cpp itself where llama-cpp-python is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import GGUF_FAMILIES, VOCAB, Kept, dense, masked, spec_of, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import gisp.demo
from gisp.errors import GispError
from gisp.export.check import check_tokens
from gisp.export.formats.gguf import check as gguf_check
from gisp.export.formats.gguf import file as gguf_file
from gisp.export.formats.gguf.write import export_gguf

pytest.importorskip("gguf")

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
DEMO = Path(gisp.demo.__file__).parent


def _answer_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """llama.cpp's logits replaced by those of the file read back, after ``change``."""

    def answer(file: Path, ids: torch.Tensor, _: Sequence[str]) -> tuple[str, torch.Tensor, list[list[int]]]:
        with torch.no_grad():
            logits = gguf_file.read_model(file, dense("llama-mha")).float()(input_ids=ids).logits
        return "0.0", change(logits), []

    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(gguf_check, "run_llama_cpp", answer)


def test_llama_cpp_decides_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, spec = dense("llama-mha"), spec_of()
    _answer_with(monkeypatch, lambda logits: logits)
    export_gguf(base, spec, tmp_path / "fine")
    card = (tmp_path / "fine" / "README.md").read_text()
    assert "the same at 128 of 128 positions (llama-cpp-python 0.0 on a CPU, float32 cache" in card
    assert "was not run" not in card
    _answer_with(monkeypatch, lambda logits: logits.roll(1, dims=-1))
    with pytest.raises(GispError, match="logits of the exported model differ by"):
        export_gguf(base, spec, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fine"]


def test_another_first_choice_is_refused_unless_it_is_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two best logits of one position change places: no larger a difference than rounding to bfloat16 explains."""
    base, spec = dense("llama-mha"), spec_of()
    with torch.no_grad():
        wanted = masked(base, spec.keep)(input_ids=check_tokens(VOCAB, 128)).logits
    gaps = wanted.topk(2).values.diff().abs().squeeze(-1).flatten() / wanted.abs().max()
    tie = 2**-8 * math.sqrt(17)
    sure = int(torch.nonzero((gaps > 1.5 * tie) & (gaps < 2**-8 * 10))[0])
    unsure = int(torch.nonzero(gaps < 0.5 * tie)[0])

    def swap(position: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def swapped(logits: torch.Tensor) -> torch.Tensor:
            row = logits.flatten(0, 1)[position]
            best = row.topk(2)
            row[best.indices] = best.values.flip(0)
            return logits

        return swapped

    _answer_with(monkeypatch, swap(sure))
    with pytest.raises(GispError, match=r"at 99\.2% of positions only, less than 99\.9%"):
        export_gguf(base, spec, tmp_path / "out", dtype="bf16")
    assert list(tmp_path.iterdir()) == []
    _answer_with(monkeypatch, swap(unsure))
    export_gguf(base, spec, tmp_path / "out", dtype="bf16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of 128 positions, elsewhere another that is as likely but for rounding (llama-cpp" in card


def test_first_choices_count_ties_as_agreement() -> None:
    wanted = torch.tensor([[10.0, 9.99, 0.0], [10.0, 8.0, 0.0], [3.0, 2.0, 1.0], [1.0, 5.0, 0.0]])
    got = torch.tensor([[9.99, 10.0, 0.0], [8.0, 10.0, 0.0], [3.0, 2.0, 1.0], [1.0, 5.0, 0.0]])
    assert gguf_check.first_choices(wanted, got, 0.01) == (2, 0.75)
    assert gguf_check.first_choices(wanted, got, 0.0001) == (2, 0.5)
    assert gguf_check.first_choices(wanted, wanted, 0.0) == (4, 1.0)


def _stand_in(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "llama_cpp").mkdir()
    (folder / "llama_cpp" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(
        tmp_path, "def Llama(*_, **__):\n    raise ValueError('error loading model: no such tensor')\n", monkeypatch
    )
    with pytest.raises(GispError, match=r"llama\.cpp cannot use the exported model: .*no such tensor"):
        gguf_check.run_llama_cpp(tmp_path / "model.gguf", tokens(), ())


def test_the_process_hands_over_logits_and_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import json, pathlib
import numpy as np
__version__ = "1.2"
class Llama:
    def __init__(self, file, **options):
        pathlib.Path(file).with_suffix(".json").write_text(json.dumps(options))
    def reset(self):
        self.scores = None
    def eval(self, row):
        assert self.scores is None
        self.scores = np.repeat(np.array(row, dtype=np.float32)[:, None], 3, axis=1)
    def tokenize(self, text, add_bos, special):
        return [len(text), int(add_bos), int(special)]
"""
    _stand_in(tmp_path, source, monkeypatch)
    ids = tokens(2, 5)
    version, logits, split = gguf_check.run_llama_cpp(tmp_path / "model.gguf", ids, ("ab", "\u00e9"))
    assert (version, split) == ("1.2", [[2, 1, 0], [2, 1, 0]])
    assert torch.equal(logits, ids.float().unsqueeze(-1).expand(2, 5, 3))
    options = json.loads((tmp_path / "model.json").read_text())
    assert (options["type_k"], options["type_v"], options["flash_attn"], options["n_gpu_layers"]) == (0, 0, False, 0)


def _compare(file: Path, reference: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Relative difference of the logits and fraction of positions with the same most likely token."""
    _, got, _ = gguf_check.run_llama_cpp(file, ids, ())
    with torch.no_grad():
        wanted = reference(input_ids=ids).logits
    same = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
    return float((got - wanted).abs().max() / wanted.abs().max()), float(same)


@needs_llama_cpp
@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_llama_cpp_computes_the_masked_logits(family: str, tmp_path: Path) -> None:
    """Uneven heads, shared key/value heads, biases, scaled frequencies, tied embeddings, emptied layers."""
    base, spec = dense(family, **GGUF_FAMILIES[family]), spec_of()
    export_gguf(base, spec, tmp_path / "out")
    difference, same = _compare(tmp_path / "out" / "model.gguf", masked(base, spec.keep), tokens(4, 128))
    assert difference <= 1e-5
    assert same == 1.0


@needs_llama_cpp
@pytest.mark.parametrize(
    "emptied", [(0, "heads"), (3, "heads"), (0, "channels"), (3, "channels"), (0, "both"), (3, "both")]
)
def test_llama_cpp_takes_empty_layers_anywhere(emptied: tuple[int, str], tmp_path: Path) -> None:
    layer, what = emptied
    some = Kept((0, 1, 2, 5), tuple(range(24)))
    empty = Kept(some.heads if what == "channels" else (), some.channels if what == "heads" else ())
    base, spec = dense("llama-gqa"), spec_of(tuple(empty if i == layer else some for i in range(4)))
    export_gguf(base, spec, tmp_path / "out")
    assert _compare(tmp_path / "out" / "model.gguf", masked(base, spec.keep), tokens(1, 64))[0] <= 1e-5


@needs_llama_cpp
def test_llama_cpp_refuses_an_order_only_we_understand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing and reading back agree on a wrong order of rows; llama.cpp tells."""
    for name in ("interleave", "halves"):
        monkeypatch.setattr(gguf_file, name, lambda rows, heads: rows)
    with pytest.raises(GispError, match="logits of the exported model differ by"):
        export_gguf(dense("llama-mha"), spec_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
def test_a_file_llama_cpp_cannot_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "ARCHITECTURE", "llama")
    with pytest.raises(GispError, match=r"llama\.cpp cannot use the exported model: .*wrong shape"):
        export_gguf(dense("llama-mha"), spec_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
@pytest.mark.parametrize(("dtype", "unit"), [("f32", 2**-24), ("f16", 2**-11)])
def test_the_demo_decoder_with_every_other_structure(dtype: str, unit: float, tmp_path: Path) -> None:
    """A trained model on text it has not seen, 2,048 tokens, its tokenizer included."""
    base = AutoModelForCausalLM.from_pretrained(DEMO / "decoder", dtype=torch.float32)
    config = base.config
    keep = Kept(tuple(range(0, config.num_attention_heads, 2)), tuple(range(0, config.intermediate_size, 2)))
    spec = spec_of((keep,) * config.num_hidden_layers)
    export_gguf(base, spec, tmp_path / "out", tokenizer_from=DEMO / "decoder", dtype=dtype)
    assert "check texts into the same tokens" in (tmp_path / "out" / "README.md").read_text()
    lines = (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    text = "".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(AutoTokenizer.from_pretrained(DEMO / "decoder").encode(text)[: 8 * 256]).view(8, 256)
    difference, same = _compare(tmp_path / "out" / "model.gguf", masked(base, spec.keep), ids)
    products = 4 * config.num_hidden_layers + 1
    terms = config.intermediate_size if dtype == "f32" else 1
    assert difference <= unit * products * math.sqrt(terms)
    assert same >= 0.999
