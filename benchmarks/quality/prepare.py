"""Rows of tasks for the study, made once where lm-eval is installed.

    python -m benchmarks.quality.prepare DIR --out tasks.json.xz [--definitions FOLDER]

DIR holds .jsonl files with the original columns of the usual data sets (piqa.jsonl, arc_easy.jsonl, gsm8k_test.jsonl,
gsm8k_train.jsonl, ...). lm-eval's own task definitions read them; prompts, choices and answers are what lm-eval asks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.command import Parser, check_writable, exit_code
from benchmarks.quality.tasks import PreparedTask, write_tasks
from gisp.data import read_rows
from gisp.errors import GispError

# Definition of each task inside lm-eval's folder of tasks.
DEFINITIONS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
_SPLITS = {"validation": "", "test": "_test", "train": "_train"}
# The seed of few-shot examples and the longest answer that lm-eval takes where none is given.
_FEWSHOT_SEED, _MAX_NEW_TOKENS = 1234, 256


def write_definitions(data: Path, folder: Path) -> list[str]:
    """Write task files that include lm-eval's own and read local data; the names of the tasks there is data for.

    ``NAME.jsonl`` is what lm-eval evaluates on; ``NAME_test.jsonl`` and ``NAME_train.jsonl`` are splits of their own.

    Raises:
        GispError: lm-eval is missing, or the folder has data of no known task.
    """
    try:
        import lm_eval
    except ImportError:
        raise GispError("preparing tasks needs lm-eval: pip install 'gisp[eval]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, definition in DEFINITIONS.items():
        files = {split: (data / f"{name}{end}.jsonl").resolve() for split, end in _SPLITS.items()}
        files = {split: path for split, path in files.items() if path.is_file()}
        if not files.keys() - {"train"}:
            continue
        found.append(name)
        source = Path(lm_eval.__file__).parent / "tasks" / definition
        kwargs = json.dumps({"data_files": {split: str(path) for split, path in files.items()}})
        lines = [f"include: {source}", f"task: {name}", "dataset_path: json", "dataset_name: null"]
        lines.append(f"dataset_kwargs: {kwargs}")
        lines += [
            f"{key}_split: {split if split in files else 'null'}"
            for key, split in (("training", "train"), ("validation", "validation"), ("test", "test"))
        ]
        if name == "boolq" and "label" not in next(read_rows(str(next(iter(files.values()))))):
            # Its own columns; lm-eval reads those of SuperGLUE.
            lines.append("doc_to_target: '{{answer|int}}'")
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not found:
        raise GispError(f"{data} has data of no known task: give .jsonl files named {', '.join(DEFINITIONS)}")
    return found


def prepare(data: Path, definitions: Path, names: list[str]) -> dict[str, PreparedTask]:
    """Prepared tasks from task files that :func:`write_definitions` wrote.

    Raises:
        GispError: data that the definitions cannot read.
    """
    found = {}
    for name in names:
        spec = f"lm-eval:{name}@{definitions}"
        trained = (data / f"{name}_train.jsonl").is_file()
        train = tuple(_bare(row) for row in read_rows(spec)) if trained else ()
        rows = list(read_rows(spec, held_out=True))
        if "choices" in rows[0]:
            found[name] = PreparedTask(tuple(_bare(row) for row in rows), train)
        else:
            found[name] = _generating(name, definitions, train)
    return found


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "task"}


def _generating(name: str, definitions: Path, train: tuple[dict[str, Any], ...]) -> PreparedTask:
    """A task that generates: prompts with the few-shot examples that lm-eval draws, and how answers are compared."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(definitions), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    task.set_fewshot_seed(_FEWSHOT_SEED)
    task.build_all_requests()
    rows = tuple({"prompt": each.args[0], "target": str(task.doc_to_target(each.doc))} for each in task.instances)
    config = task.dump_config()
    metric = next((each for each in config["metric_list"] if each["metric"] == "exact_match"), None)
    filters = [
        {"name": each["name"], **{key: value for key, value in each["filter"][0].items() if key != "function"}}
        for each in config.get("filter_list") or ()
        if [step["function"] for step in each["filter"]] == ["regex", "take_first"]
    ]
    if metric is None or len(filters) != len(config.get("filter_list") or ()) or not filters or _changed(metric):
        raise GispError(f"task {name} compares answers in a way this study does not know: leave its data out")
    arguments = task.instances[0].args[1]
    generation = {
        "until": list(arguments["until"]),
        "max_new_tokens": arguments.get("max_gen_toks", _MAX_NEW_TOKENS),
        "filters": filters,
        "ignored": list(metric.get("regexes_to_ignore") or ()),
        "ignore_case": bool(metric.get("ignore_case")),
    }
    return PreparedTask(rows, train, generation)


def _changed(metric: dict[str, Any]) -> bool:
    return bool(metric.get("ignore_punctuation") or metric.get("ignore_numbers"))


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        GispError: bad options, unreadable data, or no lm-eval.
    """
    options = Parser(prog="python -m benchmarks.quality.prepare", description=__doc__.splitlines()[0])
    options.add_argument("data", type=Path, metavar="DIR", help="folder of the .jsonl files")
    options.add_argument("--out", type=Path, required=True, help="file to write, .json or .json.xz")
    options.add_argument("--definitions", type=Path, metavar="FOLDER", help="keep lm-eval's task files there")
    args = options.parse_args(argv)
    check_writable(args.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.definitions or Path(temporary)
        tasks = prepare(args.data, folder, write_definitions(args.data, folder))
    write_tasks(args.out, tasks)
    for name, task in tasks.items():
        print(f"{name:15s} {len(task.rows)} rows, {len(task.calibration)} to calibrate on")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
