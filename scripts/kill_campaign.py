"""Kill a campaign at random moments, go on with it each time, and compare its tables with those of one left in peace.

    python scripts/kill_campaign.py [STUDY.toml] [--kills 20] [--seed 0] [--folder results/kills]

Every kill is SIGKILL to the process that measures, at a random moment: within 1.5 seconds of the next finished part (so
that it may strike while one is measured or written), or within six of its start. Exits with 1 if a table differs in any
row, or if a finished part was measured again.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

CODE = "import sys; from escape_inference.trainers.collect import collect; collect(*sys.argv[1:], resume=True, progress=False)"
STUDY = Path(__file__).parent / "studies" / "kills.toml"


def finished(output: Path) -> dict[str, int]:
    """The finished parts and when each was written."""
    return {part.name: part.stat().st_mtime_ns for part in (output / "parts").glob("[!.]*")}


def tables(output: Path) -> list[Path]:
    """The tables of a campaign."""
    return sorted(path for path in output.iterdir() if path.suffix in (".csv", ".parquet"))


def kill_once(study: Path, output: Path, generator: random.Random) -> tuple[bool, float]:
    """Go on with the campaign and kill it; was it still at work, and how many seconds after it set to work?"""
    before = len(finished(output)) if output.exists() else 0
    process = subprocess.Popen([sys.executable, "-c", CODE, str(study), str(output)], env=dict(os.environ))
    wait_for_part = generator.random() < 0.7
    moment = generator.uniform(0, 1.5 if wait_for_part else 6)  # starting up takes a few seconds
    while process.poll() is None and wait_for_part and len(finished(output)) <= before:
        time.sleep(0.002)
    began = time.perf_counter()
    while process.poll() is None and time.perf_counter() < began + moment:
        time.sleep(0.001)
    running = process.poll() is None
    if running:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return running, time.perf_counter() - began


def main(study: Path, kills: int, seed: int, folder: Path) -> int:
    """Run both campaigns and compare them."""
    generator = random.Random(seed)
    peace, killed = folder / "peace", folder / "killed"
    subprocess.run([sys.executable, "-c", CODE, str(study), str(peace)], check=True)
    struck, repeated = 0, 0
    for number in range(kills):
        before = finished(killed) if killed.exists() else {}
        running, moment = kill_once(study, killed, generator)
        after = finished(killed)
        repeated += sum(after.get(part) != written for part, written in before.items())
        struck += running
        print(
            f"kill {number + 1:2d}: {len(after):2d} parts finished, {moment:.2f} s, {'killed' if running else 'done'}"
        )
    before = finished(killed)
    subprocess.run([sys.executable, "-c", CODE, str(study), str(killed)], check=True)
    repeated += sum(finished(killed)[part] != written for part, written in before.items())
    different = []
    for path in tables(peace):
        read = pd.read_parquet if path.suffix == ".parquet" else pd.read_csv
        if not read(path).equals(read(killed / path.name)):
            different.append(path.name)
    print(f"{struck} of {kills} struck a campaign at work; {len(finished(killed))} parts, {repeated} measured twice")
    print(f"tables that differ: {', '.join(different) or 'none'} of {len(tables(peace))}")
    return 1 if different or repeated or len(tables(peace)) != len(tables(killed)) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=STUDY)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("results/kills"))
    arguments = parser.parse_args()
    sys.exit(main(arguments.study, arguments.kills, arguments.seed, arguments.folder))
