"""Fuzz each target by coverage (atheris, on libFuzzer) for some seconds, and print a line of counts for each.

    make fuzz FUZZ_SECONDS=60

A target runs in a process of its own, with a limit on its memory and on the time of one input. What it finds worth
keeping stays in build/fuzz/TARGET, for the next run to go on from; an input that fails is kept in
build/fuzz/failures and named. The exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# An input may take so many seconds, and the process so many MB; torch alone is 500.
LONGEST, LARGEST = 10, 1500


def main() -> int:
    """Run the targets one after another; inside, one of them."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of files.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz")
    if sys.argv[1:2] == ["--inside"]:
        return fuzz(sys.argv[2], sys.argv[3:])
    options = parser.parse_args()
    from fuzz.targets import SEEDS, TARGETS

    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    failures = 0
    for name in options.targets or TARGETS:
        corpus, kept = options.work / name, options.work / "failures"
        for path in (corpus, kept):
            path.mkdir(parents=True, exist_ok=True)
        for seed in SEEDS[name]:
            (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
        before = set(kept.iterdir())
        done = subprocess.run(
            [
                sys.executable, str(Path(__file__).resolve()), "--inside", name, str(corpus),
                f"-max_total_time={options.seconds}", f"-timeout={LONGEST}", f"-rss_limit_mb={LARGEST}",
                f"-artifact_prefix={kept}/{name}-", "-max_len=8192", "-print_final_stats=1",
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
        new = sorted(set(kept.iterdir()) - before)
        # A slow input that came to an end is kept, but fails nothing.
        bad = [path for path in new if "slow-unit" not in path.name]
        ended = done.returncode != 0 or bool(bad)
        failures += ended
        print(f"{name}: {counts(done.stdout)}, {len(bad)} failures", flush=True)
        if ended:
            print("".join(f"  {line}\n" for line in done.stdout.splitlines()[-40:]) + f"  kept: {bad or 'nothing'}")
    return int(failures > 0)


def counts(log: str) -> str:
    """Sum up what libFuzzer says in the end."""
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", log))
    first = re.search(r"INITED cov: (\d+)", log)
    last = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    cov, _, size = last[-1] if last else ("?", "?", "?")
    new = int(cov) - int(first[1]) if last and first else 0
    return (
        f"{int(stats.get('number_of_executed_units', 0)):,} inputs, coverage {cov} ({new} new), {size} inputs kept, "
        f"slowest {stats.get('slowest_unit_time_sec', '?')} s, peak {stats.get('peak_rss_mb', '?')} MB"
    )


def fuzz(name: str, words: list[str]) -> int:
    """Run one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["influence_cli", "yaml", "fuzz"]):
        from fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *words], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
