"""Time the peers on one case, each in a virtual environment of its own (5.5 GB a peer).

    python bench/peers/run.py --envs FOLDER --case CASE_FOLDER --out FOLDER [--only kronfluence,captum] [--install]

Writes FOLDER/NAME.json (time_NAME.py's record plus "command_seconds", the whole command), FOLDER/NAME.log and, with
--scores, FOLDER/NAME.npz. A peer that cannot be installed or run is listed with the last line of its error.
CASE_FOLDER holds
case.json  {"name", "model": "cnn" or "resnet18", "train": n, "tests": [1, 10, 100], "threads"}, and if wanted
           "empirical" (kronfluence's Fisher: true labels; else sampled) and "damping" (a number, or null)
model.pt   the model's state_dict
train.npz  x [n, 1, 28, 28] or [n, 3, 32, 32] float32, y [n] int64
test.npz   x, y: 100 images; x2, y2: 100 others
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
PEERS = {
    "kronfluence": "kronfluence==1.0.1",
    "captum": "captum==0.9.0",
    "pydvl": "pydvl[influence]==0.10.0",
    "traker": "traker==0.3.2",
    "dattri": "dattri==0.3.0",
}


def last_line(text: str) -> str:
    """Give the last line that says something, of a log or of an error."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def install(environment: Path, requirement: str) -> str | None:
    """Make the peer's environment, and give the last line of the error if that fails."""
    for command in (
        [sys.executable, "-m", "venv", str(environment)],
        [str(environment / "bin" / "pip"), "install", "--quiet", *TORCH, requirement],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(environment, ignore_errors=True)  # half an environment would pass for a whole one next time
            return last_line(done.stderr)
    return None


def run(name: str, python: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one peer's script under the limit, and give its record."""
    out = options.out / f"{name}.json"
    out.unlink(missing_ok=True)
    command = [str(python), str(HERE / f"time_{name}.py"), str(options.case), str(out)]
    command += ["--step-limit", str(options.step_limit), "--memory-limit", str(options.memory_limit)]
    if options.scores:
        command += ["--scores", str(options.out / f"{name}.npz")]
    log = out.with_suffix(".log")
    error = None
    # What the peer leaves behind when it is stopped goes with the folder.
    with log.open("w") as file, tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": folder})
        try:
            code = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = f"stopped after {options.limit} s in all"
        else:
            if code:
                error = f"exit code {code}: {last_line(log.read_text(errors='replace'))}"
        seconds = time.perf_counter() - started
    record = json.loads(out.read_text()) if out.exists() else {"peer": name, "steps": []}
    record["command_seconds"] = round(seconds, 2)
    if error:
        record["error"] = error
    return record


def summarise(record: dict[str, Any]) -> None:
    """Print every step's seconds and how many U they are."""
    print(f"\n{record['peer']} {record.get('version', '')}  whole command {record.get('command_seconds', '-')} s")
    unit = next((step["seconds"] for step in record["steps"] if step["step"] == "U"), None)
    for step in record["steps"]:
        seconds = step.get("seconds", "-")
        beside = step.get("error") or step.get("unsupported") or ""
        if unit and isinstance(seconds, int | float):
            beside = f"{seconds / unit:.1f} U"
        elif "extrapolated" in step:
            beside = f"extrapolated {step['extrapolated']} s"
        print(f"  {step['method']:8} {step['step']:22} {seconds:>10} {beside}")
    if "error" in record:
        print(f"  {record['error']}")


def main() -> None:
    """Install what is missing, run, write and summarise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--envs", type=Path, required=True, help="folder of the virtual environments")
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PEERS), help="comma-separated names")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--scores", action="store_true", help="save the scores of 10 test images and self-influence")
    parser.add_argument("--step-limit", type=int, default=300, metavar="SECONDS")
    parser.add_argument("--limit", type=int, default=900, metavar="SECONDS", help="for one peer in all")
    parser.add_argument("--memory-limit", type=int, default=16, metavar="GIB")
    options = parser.parse_args()
    names = options.only.split(",")
    for name in names:
        if name not in PEERS:
            parser.error(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        python = options.envs / name / "bin" / "python"
        error = None
        if not python.exists():
            error = install(options.envs / name, PEERS[name]) if options.install else "no environment; use --install"
        if error:
            record = {"peer": name, "steps": [], "error": f"not installed: {error}"}
        else:
            record = run(name, python, options)
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        summarise(record)


if __name__ == "__main__":
    main()
