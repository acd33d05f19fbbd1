"""The quickstart's last word: exit 1 unless the distilled student passed.

It passed when its KL to the teacher fell by at least half and its perplexity is below the unigram model's, on
text that nobody was trained on.

    python examples/quickstart/verdict.py --report report.json --before NAME --after NAME
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any


def judge(report: dict[str, Any], before: str, after: str) -> list[tuple[bool, str]]:
    """Each condition: whether it holds, and its numbers in words."""
    scores = report["scores"]
    kl_before, kl_after = scores[before]["kl_to_teacher"], scores[after]["kl_to_teacher"]
    perplexity = math.exp(scores[after]["cross_entropy"])
    unigram = math.exp(report["unigram_cross_entropy"])
    return [
        (
            kl_after <= kl_before / 2,
            f"KL to the teacher fell from {kl_before:.3f} to {kl_after:.3f}; at most {kl_before / 2:.3f} passes",
        ),
        (
            perplexity < unigram,
            f"perplexity is {perplexity:.1f}; below the unigram model's {unigram:.1f} passes",
        ),
    ]


def main() -> int:
    """Print each condition; 0 when all hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--report", type=Path, required=True, help="--json-out of tools/compare_models.py")
    parser.add_argument("--before", required=True, help="name of the undistilled student in the report")
    parser.add_argument("--after", required=True, help="name of the distilled student in the report")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    conditions = judge(report, arguments.before, arguments.after)
    for holds, words in conditions:
        print(f"{'passed' if holds else 'FAILED'}: {words}")
    return 0 if all(holds for holds, _ in conditions) else 1


if __name__ == "__main__":
    sys.exit(main())
