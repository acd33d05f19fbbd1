"""The report's page, and the tool that writes it."""

from __future__ import annotations

import json
import re
import runpy
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_fdd.evaluate.report import write_report
from tests.evaluate.report_files import make_run, record, write_evaluation

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """A parser of the report that checks that tags are closed.

    It collects text, images and everything that would be fetched or run.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect a tag's images and addresses."""
        self.tags.add(tag)
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "srcset", "href") if name in found]
        if tag == "img":
            self.images.append(found)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that a closed tag is the one that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += data


NAME = 'a <script>|$x$_"&'


@pytest.mark.tier("default")
def test_the_page_is_one_file_and_nothing_in_it_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "one", 400)
    make_run(tmp_path / "two", 3, **{"trajectory s6:t12": 1.0})
    write_evaluation(tmp_path / "big", model="big")
    runs = [f"{NAME}={tmp_path}/one", f"two={tmp_path}/two", f"big={tmp_path}/big"]
    write_report(runs, tmp_path / "out/report")
    page = Page((tmp_path / "out/report/report.html").read_text())
    assert page.tags.isdisjoint({"script", "link", "iframe", "i", "b"})
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert NAME in page.text
    assert " upon <b>a | time" in page.text
    assert "mean of 3 iterations" in page.text  # 400 iterations in 150 points
    assert len(page.images) == 5
    assert all(image["alt"] for image in page.images)
    assert all(f'id="{link[1:]}"' in (tmp_path / "out/report/report.html").read_text()
               for link in page.links if link.startswith("#"))  # fmt: skip

    markdown = (tmp_path / "out/report/report.md").read_text()
    pictures = re.findall(r"\]\((\w+\.png)\)", markdown)
    assert sorted(pictures) == sorted(path.name for path in (tmp_path / "out/report").glob("*.png"))
    assert "<" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {5}  # three runs
    assert not list((tmp_path / "out/report").glob("*.tmp"))


def test_scores_alone_make_a_page(tmp_path: Path) -> None:
    report = write_report([str(write_evaluation(tmp_path / "model"))], tmp_path)
    assert not report.pictures
    assert "20.00 ± 0.50" in (tmp_path / "report.md").read_text()


@pytest.mark.tier("default")
def test_a_long_run_stays_small_and_quick(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for iteration, value in enumerate(rng.normal(3, 0.3, 100_000), start=1):
            file.write(
                json.dumps(record(iteration, kd=value, total=value, **{"trajectory s2:t4": value})) + "\n"
            )
    started = time.process_time()
    write_report([str(tmp_path)], tmp_path / "report")
    assert time.process_time() - started < 20  # 5 s when tried
    assert (tmp_path / "report/report.html").stat().st_size < 1_000_000


@pytest.mark.tier("default")
def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    make_run(tmp_path / "run")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match=rf"^--out {tmp_path}/out: cannot be written: .*; make room there"):
        write_report([str(tmp_path / "run")], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_tool_says_what_it_wrote_or_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "megatron_fdd.host.process.end_with", lambda main: main()
    )  # it would end this process

    def report(run: str) -> None:
        monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / run), "--out", str(tmp_path / "out")])
        runpy.run_path(str(ROOT / "tools/report.py"), run_name="__main__")

    make_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="0"):
        report("run")
    assert capsys.readouterr().out == f"{tmp_path}/out/report.html: 1 run, 5 pictures\n"
    with pytest.raises(SystemExit, match="1"):
        report("nothing")
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("nothing: no such file or folder; give another path")
    )
