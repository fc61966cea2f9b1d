#!/usr/bin/env python3
"""chains.py: what dumps that build upon each other capture, and for how long they freeze, without and with pre-dumps.

Run in the virtual machine (`make bench` does): it takes a kernel that tells which pages change. Every figure is out of
crab's own journal. For each number of pre-dumps a sandbox of its own with --mib of memory that differs from page to page
does --turns turns for each share of its pages that is written to; a line has the medians over these turns. An emulated
machine is some ten times slower than a real one: compare the lines, and not the milliseconds, with others.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "vm"), str(HERE.parent / "e2e")]

from heap import PAGE, Chained  # noqa: E402
from harness import CONFIG  # noqa: E402

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shares", default="2,100", help="per cent of the pages that a turn writes to")
    parser.add_argument("--pre-dumps", default="0,1,2")
    options = parser.parse_args()
    pages = options.mib * MIB // PAGE
    print(f"{options.mib} MiB, medians of {options.turns} turns; a first dump has everything")
    print(f"{'written to':>12} {'pre-dumps':>9} {'captured MB':>12} {'written MB':>11} {'frozen ms':>10} {'durable ms':>11}", flush=True)
    CONFIG.parent.mkdir(exist_ok=True)
    before = CONFIG.read_text() if CONFIG.exists() else None
    try:
        for count in options.pre_dumps.split(","):
            CONFIG.write_text(f'incremental = true\npre_dumps = "{count}"\n')
            measure(pages, options)
    finally:
        CONFIG.unlink()
        if before is not None:
            CONFIG.write_text(before)


def measure(pages: int, options: argparse.Namespace) -> None:
    """All turns of one sandbox."""
    with tempfile.TemporaryDirectory() as directory, Chained(pathlib.Path(directory), pages) as sandbox:
        show("first", [sandbox.serve()])
        seed = 0
        for share in options.shares.split(","):
            lines = []
            for _ in range(options.turns):
                seed += 1
                lines.append(sandbox.some(seed, pages * int(share) // 100))
            show(f"{share} %", lines)


def show(what: str, lines: list[dict]) -> None:
    odd = [line for line in lines if line["action"] != "full"]
    if odd:
        sys.exit(f"chains.py: no dump: {json.dumps(odd[0])}")
    median = {name: statistics.median(line[name] for line in lines) for name in ("bytes_captured", "bytes_written", "freeze_us", "durable_us")}
    counts = "/".join(sorted({str(line["pre_dumps"]) for line in lines}))
    print(
        f"{what:>12} {counts:>9} {median['bytes_captured'] / 1e6:12.2f} {median['bytes_written'] / 1e6:11.2f}"
        f" {median['freeze_us'] / 1e3:10.0f} {median['durable_us'] / 1e3:11.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
