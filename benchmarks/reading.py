"""The speed of reading conversations from files of every kind, without rendering and without a tokenizer.

    python -m benchmarks.reading [--megabytes 16]

"read" is what the parent of the workers does: files to records. "understand" is what each worker does before it
renders: JSON, the layout, normalised messages, refusals (one record in fifty is malformed). Times are CPU seconds
of this process; megabytes are those of the same records as JSON lines, whatever the file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_fdd.data.conversations import read_conversation
from megatron_fdd.data.documents import read_documents
from megatron_fdd.data.refusals import Refusal

_WORDS = "the river near a small house where many children play and sing until night comes 川 é".split()
_MALFORMED_EACH = 50


def conversations(num_bytes: int, calls: bool) -> Iterator[dict[str, object]]:
    """Yield made-up conversations of five messages, with so many bytes of JSON in all."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(10, 90)))

    number = 0
    while num_bytes > 0:
        number += 1
        turns: list[dict[str, object]] = [{"role": "system", "content": text()}]
        for _ in range(2):
            answer: dict[str, object] = {"role": "assistant", "content": text()}
            if calls:
                arguments = json.dumps({"where": text()})
                answer["tool_calls"] = [
                    {"type": "function", "function": {"name": "find", "arguments": arguments}}
                ]
            turns += [{"role": "user", "content": text()}, answer]
        if number % _MALFORMED_EACH == 0:
            turns[1]["role"] = "narrator"
        record: dict[str, object] = {"id": number, "messages": turns}
        num_bytes -= len(json.dumps(record, ensure_ascii=False).encode())
        yield record


def write_files(folder: Path, records: list[dict[str, object]]) -> dict[str, Path]:
    """Write the same records in every kind of file; return the files."""
    import pyarrow
    from pyarrow import parquet

    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    contents = {
        "JSON lines": lines,
        "gzip": gzip.compress(lines, 6),
        "zstd": pyarrow.compress(lines, "zstd", asbytes=True),
        "JSON array": json.dumps(records, ensure_ascii=False, indent=1).encode(),
    }
    paths = {name: folder / name.replace(" ", "-") for name in (*contents, "parquet")}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    parquet.write_table(pyarrow.Table.from_pylist(records), paths["parquet"], compression="zstd")
    return paths


def measure(path: Path) -> tuple[float, float, Counter[str]]:
    """Return CPU seconds to read, CPU seconds to understand, and how many records have each outcome."""
    before = time.process_time()
    documents = list(read_documents([str(path)], "instruction", ""))
    between = time.process_time()
    outcomes: Counter[str] = Counter()
    for document in documents:
        try:
            read_conversation(document.json_object(), document.where)
            outcomes["read"] += 1
        except Refusal as refusal:
            outcomes[refusal.reason.title] += 1
    return between - before, time.process_time() - between, outcomes


def main() -> None:
    """Print a line for each kind of file and of conversation: the best of three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=16)
    size = parser.parse_args().megabytes
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; MB/s of CPU time")
    for calls in (False, True):
        records = list(conversations(size * 10**6, calls))
        with tempfile.TemporaryDirectory() as folder:
            for name, path in write_files(Path(folder), records).items():
                read, understood, outcomes = min(measure(path) for _ in range(3))
                kind = "calls" if calls else "plain"
                print(
                    f"{kind}, {name:10}  read {size / read:5.0f}  understand {size / understood:5.0f}  "
                    f"both {size / (read + understood):5.0f}  {dict(outcomes)}"
                )


if __name__ == "__main__":
    main()
