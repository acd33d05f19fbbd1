"""Draw the loss curves of a run as a PNG.

python tools/plot_metrics.py --metrics-file runs/metrics.jsonl --out runs/losses.png
"""

import argparse
from pathlib import Path

from megatron_fdd.evaluate.plot import plot_metrics


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--metrics-file", type=Path, required=True, help="what --fdd-metrics-file wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    try:
        num_panels = plot_metrics(arguments.metrics_file, arguments.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{arguments.out}: {num_panels} panels")


if __name__ == "__main__":
    main()
