from tests.entry.command import *


def test_a(toy, tmp_path):
    [endings] = run(toy.command("--fdd-metrics-file", tmp_path / "m.jsonl"))
    for e in endings:
        print(e.status)
        print(e.out[-3000:])
        print(e.err[-3000:])
    print((tmp_path / "m.jsonl").read_text())
    assert 0
