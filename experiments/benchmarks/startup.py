"""How long it takes from the command to the first steps, with an empty and a filled compile cache.

    python experiments/benchmarks/startup.py

Every line is a process of its own. Prints wall-clock and processor seconds, and writes
results/startup.json beside this file.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from msdspn_jax.bench import layer as benchmarks

HERE = Path(__file__).parent
# The shell's entry point, of which every command is one call.
MSDSPN = [sys.executable, "-m", "msdspn_command"]


def timed(command, cache=None):
    environment = os.environ | ({"MSDSPN_COMPILATION_CACHE": cache} if cache else {})
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": wall, "processor_seconds": used}


def main():
    rows = []

    def keep(name, **result):
        rows.append({"what": name} | result | {"date": date.today().isoformat()})
        print(json.dumps(rows[-1]), flush=True)

    for module in ("jax", "flax.linen, optax", "msdspn_jax", "msdspn_command"):
        keep(f"import {module}", **timed([sys.executable, "-c", f"import {module}"]))
    keep("msdspn --help", **timed([*MSDSPN, "--help"]))
    with tempfile.TemporaryDirectory() as folder:
        bench = [*MSDSPN, "bench", "layer", "--case", "tiny", "--repeat", "1", "--json"]
        train = [*MSDSPN, "train", "random-sets", "--fresh", "--steps", "2", "--batch-size", "4"]
        train += ["--val-size", "8", "--hidden-dim", "16", "--latent-dim", "16"]
        render = [*MSDSPN, "render", "--seed", "0", "--num", "1", "--size", "64"]
        predict = [*MSDSPN, "predict", f"{folder}/cold-scenes/images/*/*.png"]
        for state in ("cold", "warm"):
            cache = f"{folder}/cache"
            scenes, found = f"{folder}/{state}-scenes", f"{folder}/{state}-found"
            keep(f"msdspn render --num 1, {state}", **timed([*render, "--out", scenes], cache))
            keep(f"msdspn predict one.png, {state}", **timed([*predict, "--out", found], cache))
            keep(f"msdspn bench layer --case tiny, {state}", **timed(bench, cache))
            run = ["--run-dir", f"{folder}/{state}"]
            keep(f"msdspn train random-sets, 2 steps, {state}", **timed([*train, *run], cache))
    output = HERE / "results" / "startup.json"
    device = benchmarks.device_name()
    output.write_text(json.dumps([row | {"device": device} for row in rows], indent=1) + "\n")


main()
