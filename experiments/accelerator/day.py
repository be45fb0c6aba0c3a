"""Everything to be run where there is an accelerator, part by part: ``day.py --minutes 30``.

Each part is a process of its own with a time limit, and appends one JSON line to RESULTS/PART.jsonl
when it ends, well or not. A part whose last line says "done" is skipped, so the same command goes
on where the last one stopped. After every part the table is written anew (`table.py`).

The parts that measure are those of `parts.py`; what is trained stands in `trainings.txt`. This
process never imports JAX: the device is the parts' alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# One part's limit, seconds: none may take more than nine minutes.
LIMIT = 300
LIMITS = {"device": 120, "train": 540, "memory": 480, "replicates": 480}
# What is asked first: is it right, and how long is a step. Then the first training, then the rest.
FIRST = ("device", "golden", "step", "matching")
# Kept back from training, for its evaluation and export.
RESERVE, LEAST = 120, 30
# A training of seconds on a CPU.
TINY = (
    "--steps 4 --batch-size 2 --size 64 --train-size 4 --val-size 2 --test-size 2 --encoder-width 2"
    " --latent-dim 4 --hidden-dim 4 --inner.num-steps 1 --inner.late-num-steps 1"
    " --render-quality fast"
)


class Day:
    """The run of one command."""

    def __init__(self, options: argparse.Namespace):
        self.results, self.rehearse = options.results, options.rehearse
        self.only = options.only.split(",") if options.only else None
        self.ends = time.monotonic() + 60 * options.minutes
        self.results.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if self.rehearse:
            # Compiled quickly rather than well.
            self.environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def left(self) -> float:
        return self.ends - time.monotonic()

    def run(self) -> int:
        """All parts; returns how many failed."""
        extra = ["--rehearse"] * self.rehearse
        listed = [sys.executable, str(HERE / "parts.py"), "list", *extra]
        names = subprocess.check_output(listed, env=self.environment, text=True).split()
        first = [n for n in names if n.split("-")[0] in FIRST]
        first.sort(key=lambda n: FIRST.index(n.split("-")[0]))
        trainings = read_trainings(HERE / "trainings.txt")
        for name in first:
            self.measure(name, extra)
        for name in list(trainings)[:1]:
            self.train(name, trainings[name])
        for name in names:
            if name not in first:
                self.measure(name, extra)
        for name in list(trainings)[1:]:
            self.train(name, trainings[name])
        return sum(
            line["status"] in ("failed", "timeout") for line in table.last_lines(self.results)
        )

    def measure(self, name: str, extra: list[str]) -> None:
        def result(output: str) -> dict:
            return json.loads(output.splitlines()[-1])

        self.part(name, [sys.executable, str(HERE / "parts.py"), name, *extra], result)

    def train(self, name: str, flags: str) -> None:
        """Train in slices, then evaluate and export what there is; go on with it the next time."""
        run, program = self.results / "runs" / name, self.results / "runs" / f"{name}.zip"
        command = [sys.executable, "-m", "msdspn_jax.cli"]
        # Nothing that needs matplotlib or tensorboardX.
        arguments = [*flags.split(), "--run-dir", str(run), "--resume", "auto"]
        arguments += ["--no-tensorboard", "--no-progress"]
        if self.rehearse:
            arguments += [*TINY.split(), "--cache-dir", str(self.results / "images")]

        def trained(output: str) -> dict:
            metrics = run / "metrics.jsonl"
            # None yet, where it was stopped early.
            text = metrics.read_text() if metrics.exists() else ""
            lines = [json.loads(x) for x in text.splitlines()]
            last = {split: next((x for x in reversed(lines) if x["split"] == split), None)
                    for split in ("train", "val")}  # fmt: skip
            return {"result": last, "command": f"msdspn train {flags}"}

        def evaluated(output: str) -> dict:
            return {"result": json.loads((run / "evaluation.json").read_text())}

        def exported(output: str) -> dict:
            return {"result": {"said": output.strip().splitlines()[-2:]}}

        status = None
        while status in (None, "stopped") and self.left() > RESERVE + LEAST:
            status = self.part(
                f"train-{name}", [*command, "train", *arguments], trained, reserve=RESERVE
            )
        if status in ("done", "stopped"):
            # Of a run that is not at its end, for now.
            whole = status == "done"
            evaluate = [*command, "evaluate", str(run), "--no-figures"]
            self.part(f"evaluate-{name}", evaluate, evaluated, final=whole)
            export = [*command, "export", "--run", str(run), "--out", str(program), "--overwrite"]
            self.part(f"export-{name}", export, exported, final=whole)

    def part(self, name, command, result_of, *, reserve=0, final=True) -> str:
        """Run one part if it is to be run; returns how it ended, at last or now."""
        path = self.results / f"{name}.jsonl"
        last = table.last_line(path)
        if last and last["status"] == "done" and last.get("final", True):
            return "done"
        if self.only and not any(name == o or name.split("-")[0] == o for o in self.only):
            return "left out"
        # A rehearsal may be on a busy machine, and nobody waits for it.
        most = 6 * LIMIT if self.rehearse else LIMITS.get(name.split("-")[0], LIMIT)
        limit = min(most, self.left() - reserve)
        if limit < LEAST:
            print(f"{name}: no time left", flush=True)
            return "left out"
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        line = {"part": name, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "final": final}
        line |= self.ended(command, limit, result_of, soft=name.startswith("train-"))
        line["seconds"] = round(time.monotonic() - started, 1)
        line["rehearsal"] = self.rehearse
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        (self.results / "table.md").write_text(table.page(self.results))
        print(f"{name}: {line['status']}, {line['seconds']} s {line.get('error', '')}", flush=True)
        return line["status"]

    def ended(self, command, limit, result_of, *, soft) -> dict:
        """Run a command; its result, or what went wrong. ``soft``: SIGTERM makes it save."""
        process = subprocess.Popen(
            command, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        late = False
        try:
            output, error = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGTERM if soft else signal.SIGKILL)
            try:
                output, error = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                output, error = process.communicate()
        stopped = late and soft and process.returncode == 128 + signal.SIGTERM
        if late and not stopped:
            return {"status": "timeout", "error": f"more than {limit:.0f} s; {error[-500:]}"}
        if process.returncode and not stopped:
            return {"status": "failed", "error": (error or output).strip()[-1500:]}
        try:
            return {"status": "stopped" if stopped else "done"} | result_of(output)
        except (OSError, ValueError, IndexError) as unreadable:
            return {"status": "failed", "error": f"no result: {unreadable!r}; {output[-500:]}"}


def read_trainings(path: Path) -> dict[str, str]:
    """NAME -> what follows ``msdspn train``."""
    lines = [x.strip() for x in path.read_text().splitlines()]
    pairs = [x.split(":", 1) for x in lines if x and not x.startswith("#")]
    return {name.strip(): flags.strip() for name, flags in pairs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="when no more is begun")
    parser.add_argument("--rehearse", action="store_true", help="all parts, tiny, on the CPU")
    parser.add_argument("--only", help="names of parts or of their kinds, with commas: step,golden")
    parser.add_argument("--results", type=Path, help="default: results, or rehearsal, beside this")
    options = parser.parse_args()
    options.results = options.results or HERE / ("rehearsal" if options.rehearse else "results")
    return min(Day(options).run(), 1)


if __name__ == "__main__":
    sys.exit(main())
