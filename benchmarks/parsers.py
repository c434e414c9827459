"""hypothesis writes files for every parser of LayerLens, for some minutes each, and counts what is no answer of ours.

    python benchmarks/parsers.py --seconds 600 --out benchmarks/results/parsers.json

Files of data and of checkpoints' indices are built from their grammar: rows with the columns that people have (and
others), values of every kind, delimiters, quotes, encodings, compressions, and then damage of bytes. Files of
LayerLens's own formats are the sound ones of a small job, damaged where hypothesis says (``mutations``), or JSON and
text of its own making. An exception that is no ``LayerLensError`` is "unexpected", and its file is kept in the result.
Each parser has a process of its own.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import io
import json
import multiprocessing
import os
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutated_files import _readers
from mutations import as_json, damaged_bytes
from small_job import make_job

from layerlens.exceptions import LayerLensError

OWN = {
    "configuration": "config.yaml", "manifest (JSON)": "manifest.json", "manifest (YAML)": "manifest.yaml",
    "statistics": "statistics.safetensors", "adapter directory (PEFT)": "peft",
    "adapter directory (modules)": "modules", "calibration profile": "device",
}  # fmt: skip
"""Our parsers, and what ``mutated_files`` calls their formats."""
EXAMPLES = 200
"""Of one seed; then the next seed begins, until the time is over."""
NAMES = (
    "text", "label", "labels", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "question",
    "answer", "instruction", "input", "output", "tokens", "ner_tags", "sentence1", "sentence2", "premise", "hypothesis",
    "image", "images", "context", "answers", "system", "tools", "", "Text", "label.1", "id", "idx", "Unnamed: 0",
)  # fmt: skip
TASKS = ("sequence-classification", "token-classification", "causal-lm", "seq2seq-lm", "masked-lm", "dpo", None)
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis")

texts = st.one_of(
    st.sampled_from(["", " ", "good", "bad", "0", "1", "true", "None", "nan", "1e400", "\x00", "\ud800", "[", '{"a":']),
    st.text(max_size=12), st.text(alphabet=',;"\t|\r\n\' \\ab\x85\u2028', max_size=12),
)  # fmt: skip
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-2, 3), st.floats(), st.booleans(), st.none(), st.just(10**400)
)
values = st.recursive(
    st.one_of(texts, numbers),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(NAMES), texts), inner, max_size=4)
    ),
    max_leaves=8,
)
turns = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {}, optional={
                "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "human"]), values),
                "from": st.one_of(st.sampled_from(["human", "gpt", "system"]), values),
                "value": st.one_of(texts, values),
                "content": st.one_of(
                    texts, values,
                    st.lists(st.dictionaries(st.sampled_from(["type", "text", "image"]), texts), max_size=3),
                ),
                "tool_calls": values, "name": values,
            },
        ),
        values,
    ),
    max_size=5,
)  # fmt: skip


@st.composite
def tables(draw: Any, flat: bool = False, chats: bool = False) -> list[dict[str, Any]]:
    """Rows that have, mostly, the same columns and kinds of values."""
    names = ["messages"] if chats else draw(st.lists(st.one_of(st.sampled_from(NAMES), texts), min_size=1, max_size=4))
    if chats:
        names = [draw(st.sampled_from(["messages", "conversations", "prompt", "chosen", "text"])), *draw(
            st.lists(st.sampled_from(["completion", "rejected", "tools", "images", "label"]), max_size=2))]  # fmt: skip
    kind = {
        name: draw(st.sampled_from([texts, st.sampled_from(["a", "b"]), numbers, st.lists(texts, max_size=4)]))
        for name in names
    }
    if chats:
        kind = dict.fromkeys(names, st.one_of(turns, texts))
    odd = st.one_of(texts, numbers) if flat else values
    count = draw(st.integers(0, 8))
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        row = {name: draw(odd if draw(st.integers(0, 9)) == 0 else kind[name]) for name in names}
        if draw(st.integers(0, 9)) == 0:
            row.pop(names[0], None)
        rows.append(row)
    return rows


@dataclass
class Case:
    """A folder to write, and what is set of ``data``."""

    name: str
    content: bytes
    task: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


def _encoded(draw: Any, text: str) -> bytes:
    encoding = draw(st.sampled_from(ENCODINGS))
    if encoding.startswith("utf") and draw(st.booleans()):
        return text.encode(encoding, "surrogatepass")  # halves of characters too
    return text.encode(encoding, "replace")


def _finished(draw: Any, name: str, content: bytes) -> Case:
    """Damaged in one case of four, compressed in one of eight, with columns that are named in one of four."""
    if draw(st.integers(0, 3)) == 0:
        content = damaged_bytes(content, draw(st.randoms(use_true_random=False)))
    if draw(st.integers(0, 7)) == 0:
        content, name = gzip.compress(content), name + ".gz"
        if draw(st.integers(0, 3)) == 0:
            content = damaged_bytes(content, draw(st.randoms(use_true_random=False)))
    keys: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        column = st.sampled_from([one for one in NAMES if one])
        keys = draw(st.fixed_dictionaries({}, optional={
            "text_column": column, "label_column": column, "pair_column": column, "prompt_template": st.sampled_from(
                ["{text}", "{question} {context}", "x"]), "max_rows": st.integers(1, 5),
            "delimiter": st.sampled_from([",", ";", "\t", "|"]), "encoding": st.sampled_from(["utf-8", "latin-1"]),
        }))  # fmt: skip
    return Case(name, content, draw(st.sampled_from(TASKS)), keys)


@st.composite
def csv_files(draw: Any) -> Case:
    """CSV and TSV as dialects write it, and as none does."""
    rows, out = draw(tables(flat=True)), io.StringIO()
    dialect = {
        "delimiter": draw(st.sampled_from([",", ",", ";", "\t", "|"])), "quoting": draw(st.sampled_from([0, 1, 2])),
        "lineterminator": draw(st.sampled_from(["\n", "\r\n", "\r"])), "doublequote": draw(st.booleans()),
        "escapechar": "\\",
    }  # fmt: skip
    writer = csv.writer(out, **dialect)
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(names)
    for row in rows:
        writer.writerow([row.get(name, "") for name in names][: draw(st.sampled_from([None, None, None, 1]))])
    text = draw(st.sampled_from(["", "", "sep=;\n", "\n"])) + out.getvalue()
    return _finished(draw, "rows" + draw(st.sampled_from([".csv", ".csv", ".tsv", ".CSV"])), _encoded(draw, text))


@st.composite
def json_lines(draw: Any, chats: bool = False) -> Case:
    """An object a line, with lines that are none."""
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in draw(tables(chats=chats))]
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines)))
        lines.insert(at, draw(st.sampled_from(["", "[]", "3", "null", "{", '"x"', "NaN", "[" * 3000, '{"a": 1} x'])))
    return _finished(draw, "rows.jsonl", _encoded(draw, "\n".join(lines)))


@st.composite
def json_files(draw: Any) -> Case:
    """An array, an object with an array in it, columns, or any value."""
    rows = draw(tables())
    columns = {name: [row.get(name) for row in rows] for name in {name for row in rows for name in row}}
    document = draw(st.one_of(st.just(rows), st.just({"data": rows}), st.just(columns), values))
    return _finished(draw, "rows.json", _encoded(draw, json.dumps(document, indent=draw(st.sampled_from([None, 1])))))


@st.composite
def parquet_files(draw: Any) -> Case:
    """What Arrow can write of such rows, and columns of types that rows of JSON have not."""
    import pyarrow
    import pyarrow.parquet

    kinds = st.sampled_from([
        pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.int8(), pyarrow.uint64(), pyarrow.float16(),
        pyarrow.float64(), pyarrow.bool_(), pyarrow.timestamp("ns"), pyarrow.date32(), pyarrow.decimal128(20, 3),
        pyarrow.duration("s"), pyarrow.null(), pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.int64()),
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
        pyarrow.map_(pyarrow.string(), pyarrow.string()), pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ])  # fmt: skip
    count = draw(st.integers(0, 6))
    names, arrays = [], []
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)):
        kind = draw(kinds)
        try:
            arrays.append(pyarrow.array([draw(_of_type(kind)) for _ in range(count)], type=kind))
        except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
            arrays.append(pyarrow.nulls(count))
        names.append(name)
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), out)
    except pyarrow.ArrowException:
        pyarrow.parquet.write_table(pyarrow.table([pyarrow.nulls(count)], names=["text"]), out)
    return _finished(draw, "rows.parquet", out.getvalue())


def _of_type(kind: Any) -> st.SearchStrategy[Any]:
    import pyarrow.types as of

    plain = st.text(alphabet="ab\n ,é🙂", max_size=6)
    if of.is_string(kind) or of.is_large_string(kind) or of.is_dictionary(kind):
        found: st.SearchStrategy[Any] = plain
    elif of.is_binary(kind):
        found = st.binary(max_size=8)
    elif of.is_integer(kind) or of.is_timestamp(kind) or of.is_date(kind) or of.is_duration(kind):
        found = st.integers(0, 3) | st.integers(-(2**31), 2**62)
    elif of.is_floating(kind):
        found = st.floats(width=16)
    elif of.is_boolean(kind):
        found = st.booleans()
    elif of.is_decimal(kind):
        found = st.decimals(-1000, 1000, places=2)
    elif of.is_map(kind):
        found = st.lists(st.tuples(plain, plain), max_size=2)
    elif of.is_list(kind):
        found = st.lists(_of_type(kind.value_type), max_size=3)
    elif of.is_struct(kind):
        found = st.fixed_dictionaries(
            {kind.field(n).name: _of_type(kind.field(n).type) for n in range(kind.num_fields)}
        )
    else:
        found = st.none()
    return found | st.none()


@st.composite
def conll_files(draw: Any) -> Case:
    """Words with tags, in columns, as CoNLL-2003, IOB and CoNLL-U files have them."""
    between = draw(st.sampled_from([" ", "\t", "  "]))
    words = st.one_of(
        st.sampled_from(["EU", "rejects", "-DOCSTART-", "#", ".", "1", "1-2", "1.1", "_"]), st.text(max_size=5)
    )
    tags = st.one_of(
        st.sampled_from(["O", "B-ORG", "I-ORG", "E-PER", "S-LOC", "B-", "-X-", "_", "NOUN"]), st.text(max_size=4)
    )
    suffix = draw(st.sampled_from([".conll", ".conll", ".bio", ".iob2", ".conllu", ".txt", ".tsv"]))
    columns = 10 if suffix == ".conllu" else draw(st.integers(1, 5))
    line = st.one_of(
        st.tuples(words, *[tags] * (columns - 1)).map(between.join),
        st.sampled_from(["", "", "# sent_id = 1", "# text = a b", "-DOCSTART- -X- O O", between]), texts,
    )  # fmt: skip
    text = draw(st.sampled_from(["\n", "\r\n"])).join(draw(st.lists(line, max_size=14)))
    return _finished(draw, "words" + suffix, _encoded(draw, text))


@st.composite
def index_files(draw: Any) -> Case:
    """An index of shards beside one shard, either of them odd."""
    entry = st.one_of(
        st.just({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),
        st.fixed_dictionaries({}, optional={
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "C64", "U8"]), values),
            "shape": st.one_of(st.lists(st.integers(-2, 2**40), max_size=4), values),
            "data_offsets": st.one_of(st.lists(st.integers(-9, 2**64), max_size=3), values),
        }), values,
    )  # fmt: skip
    names = st.one_of(st.sampled_from(["a", "b", "__metadata__"]), texts)
    header = as_json(draw(st.one_of(st.dictionaries(names, entry, max_size=3), values)))
    length = draw(st.sampled_from([len(header)] * 5 + [0, 1, len(header) + 1, 2**63, 2**64 - 1]))
    shard = struct.pack("<Q", length) + header + bytes(8)
    place = st.one_of(
        st.sampled_from(["a.safetensors", "b.safetensors", "../a.safetensors", "/etc/hostname", ".", ""]), values
    )
    index = draw(st.one_of(
        st.fixed_dictionaries({"weight_map": st.one_of(st.dictionaries(names, place, max_size=4), values)},
                              optional={"metadata": values}), values,
    ))  # fmt: skip
    written = as_json(index)
    if draw(st.integers(0, 4)) == 0:
        written = damaged_bytes(written, draw(st.randoms(use_true_random=False)))
    return Case("model.safetensors.index.json", written, None, {"a.safetensors": shard})


def _own(make: Callable[[Random], bytes], name: str) -> st.SearchStrategy[Case]:
    """A sound file that is damaged where hypothesis says, or what it makes up."""
    text = st.one_of(
        st.text(max_size=200).map(lambda one: one.encode("utf-8", "surrogatepass")), st.binary(max_size=200)
    )
    made_up = st.one_of(text, values.map(as_json), st.dictionaries(st.sampled_from(KEYS), values).map(as_json))
    sound = st.randoms(use_true_random=False).map(make)
    return st.one_of(sound, sound, sound, sound, made_up).map(lambda content: Case(name, content))


KEYS = (
    "schema_version", "model", "data", "optimization", "layers", "format", "peft_type", "r", "target_modules",
    "rank_pattern", "alpha_pattern", "rates", "certificate", "resources", "training", "runtime", "output",
)  # fmt: skip


def read_data(case: Case, folder: Path) -> None:
    """Read as a run reads it; what was read is looked at."""
    from layerlens.config import DataConfig
    from layerlens.data.load import first_rows, load_dataset

    path = folder / case.name
    path.write_bytes(case.content)
    try:
        config = DataConfig(source=str(path), **case.keys)
    except ValueError:  # keys that do not go together are another parser's
        config = DataConfig(source=str(path))
    try:
        if case.task is None:
            table = first_rows(config)
            json.dumps([str(row) for row in table.rows[:3]])
        else:
            dataset = load_dataset(config, task=case.task)
            json.dumps([str(column[:2]) for column in dataset.columns.values()])
    finally:
        path.unlink()


def read_index(case: Case, folder: Path) -> None:
    """As a streamed run reads it, and as the server looks at it."""
    from layerlens.integrations.safetensors_files import checkpoint_tensors
    from layerlens.service.contents import refuse_model_folder

    (folder / case.name).write_bytes(case.content)
    for name, content in case.keys.items():
        (folder / name).write_bytes(content)
    try:
        refuse_model_folder("model", "m", folder, lambda path: True, allow_pickles=False)
    except LayerLensError:
        checkpoint_tensors(folder)
        raise
    checkpoint_tensors(folder)


Parser = tuple[st.SearchStrategy[Case], Callable[[Case, Path], None]]
OF_OTHERS: dict[str, Parser] = {
    "CSV": (csv_files(), read_data),
    "JSON lines": (json_lines(), read_data),
    "JSON": (json_files(), read_data),
    "Parquet": (parquet_files(), read_data),
    "CoNLL": (conll_files(), read_data),
    "chats": (json_lines(chats=True), read_data),
    "index of shards": (index_files(), read_index),
}
"""Parsers of what others write: files for each, and what reads them."""


def parser_of(name: str, folder: Path) -> Parser:
    """Files for a parser, and what reads them."""
    if name in OF_OTHERS:
        return OF_OTHERS[name]
    file_name, make, read = _readers(make_job(folder / "job"), folder / "job")[OWN[name]]

    def reads(case: Case, place: Path) -> None:
        (place / case.name).write_bytes(case.content)
        read(place / case.name, Random(len(case.content)))

    return _own(make, file_name), reads


def tried(parser: str, seconds: float, first_seed: int) -> dict[str, Any]:
    """Counts of one parser."""
    warnings.simplefilter("ignore")
    refused: Counter[str] = Counter()
    unexpected: dict[str, dict[str, Any]] = {}
    sound, number, begun = 0, first_seed, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="layerlens-") as name:
        strategy, read = parser_of(parser, Path(name))
        place = Path(name) / "damaged"
        place.mkdir(exist_ok=True)
        begun, of_processor = time.perf_counter(), time.process_time()

        def one(case: Case) -> None:
            nonlocal sound
            if time.perf_counter() - begun > seconds:
                return
            try:
                read(case, place)
            except LayerLensError as error:
                fault = getattr(error, "fault", None)
                refused[type(error).__name__ + (f": {fault.name}" if fault else "")] += 1
            except Exception as error:
                ours = [each for each in traceback.extract_tb(error.__traceback__) if "/layerlens/" in each.filename]
                at = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "outside"
                found = unexpected.setdefault(f"{type(error).__name__} in {at}", {
                    "count": 0, "message": str(error)[:200], "task": case.task, "file": case.name,
                    "content": base64.b64encode(case.content[:300]).decode(), "keys": str(case.keys)[:200],
                })  # fmt: skip
                found["count"] += 1
            else:
                sound += 1

        while time.perf_counter() - begun < seconds:
            number += 1
            of_seed = settings(
                max_examples=EXAMPLES, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            seed(number)(of_seed(given(strategy)(one)))()
    return {
        "files": sound + refused.total() + sum(found["count"] for found in unexpected.values()),
        "seconds": round(time.perf_counter() - begun),
        "processor_seconds": round(time.process_time() - of_processor),
        "sound": sound,
        "refused": dict(sorted(refused.items())),
        "unexpected": unexpected,
    }


def main() -> None:
    """Try all, print, write; exit code 1 where anything was unexpected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each parser")
    parser.add_argument("--together", type=int, default=os.cpu_count() or 1, help="parsers at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, help="counts of parsers that are not tried now stay")
    arguments = parser.parse_args()
    names = arguments.only or [*OWN, *OF_OTHERS]
    found: dict[str, Any] = {}
    if arguments.out is not None and arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
    # Processes are started afresh: pyarrow's and torch's threads must not cross a fork.
    with multiprocessing.get_context("spawn").Pool(arguments.together, maxtasksperchild=1) as pool:
        going = {name: pool.apply_async(tried, (name, arguments.seconds, arguments.seed)) for name in names}
        for name, result in going.items():
            found[name] = result.get()
            told = {key: value["count"] for key, value in found[name]["unexpected"].items()}
            print(name, found[name]["files"], "files,", found[name]["seconds"], "s, unexpected:", told, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(any(one["unexpected"] for one in found.values()))


if __name__ == "__main__":
    main()
