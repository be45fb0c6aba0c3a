"""Time layers, image encoders and FSPool in this library and its peers, in turn; write the table.

    python experiments/benchmarks/compare.py --torch-python PATH/TO/python

The other interpreter has torch and torchdeq; for Optimistix also optimistix, jax, flax and optax.

Every peer is a process of its own that waits for its turn, so that a slow moment of the machine
meets all of them; so does a large matrix product, the measure of what the machine can do. Processor
seconds are kept beside wall-clock seconds: on a machine shared with others they are the steadier of
the two. The rows go to results/peers.json, of which report.py makes the page's tables.

`--solvers` times other things: the solvers of jaxopt and Optimistix with our pooling in their
energy, beside ours with two adjoints. Its rows go to results/solvers.json. `--products` times our
set decoder with products of float32 and of bfloat16; its rows go to results/products.json.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from msdspn_jax.bench import layer as benchmarks
from msdspn_jax.bench.encoder import ENCODER_CASES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
SOLVER_RESULTS = RESULTS.with_name("solvers.json")
PRODUCT_RESULTS = RESULTS.with_name("products.json")
CPUINFO = Path("/proc/cpuinfo")
# Emulated in software it is slower than float32 by far.
HAS_BFLOAT16 = CPUINFO.exists() and {"avx512_bf16", "amx_bf16"} & set(CPUINFO.read_text().split())
TORCH = ("torch", "torch-compiled") + ("torch-bfloat16",) * bool(HAS_BFLOAT16)
PEERS = ("ours", *TORCH, "torchdeq", "jax-sort-unrolled", "jaxopt", "optimistix")
SOLVERS = ("ours", "ours-cg", "jaxopt-fspool", "optimistix-fspool")
PRODUCTS = ("ours", "ours-bfloat16")
WHAT = dict.fromkeys((*PEERS, *SOLVERS, *PRODUCTS), ("forward", "step")) | {
    "ours": ("forward", "step", "product")
}
PRODUCT_FLOPS = 2 * 4096 * 512**2
OTHER_PYTHON = (*TORCH, "torchdeq", "optimistix", "optimistix-fspool")
# jaxopt descends without a projection, which numbering needs, and there the linear solve of
# Optimistix fails. What calls `jnp.sort` takes minutes a round on the largest sets.
LEFT_OUT = {
    "numbering": ("jaxopt", "optimistix", "jax-sort-unrolled"),
    "cloud": ("jaxopt", "optimistix", "jax-sort-unrolled"),
}
ENCODERS = {f"encoder-{name}": case for name, case in ENCODER_CASES.items() if name != "tiny"}
# The image encoder is compared with PyTorch alone.
FOR_ENCODERS = ("ours", *TORCH)
# FSPool alone, value and gradient, on [16, n, 64] features; the peers sort.
POOLS = {f"pool-{n}": {"pool": n} for n in (8, 32, 64, 128, 256, 512, 1024, 2048, 4096)}
FOR_POOLS = ("ours", "torch", "jax-sort-unrolled")
LAYERS = {name: case for name, case in benchmarks.LAYER_CASES.items() if name != "tiny"}
SETTINGS = {name: dataclasses.asdict(case) for name, case in (LAYERS | ENCODERS).items()} | POOLS


def start(peer, case, torch_python):
    command = [torch_python if peer in OTHER_PYTHON else sys.executable]
    script = "peer_torch.py" if peer.startswith("torch") else "peer_jax.py"
    command += [str(HERE / script), peer, json.dumps(case)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )


def ask(process, what):
    process.stdin.write(what + "\n")
    return json.loads(process.stdout.readline())


def measure(name, peers, repeat, torch_python):
    case = SETTINGS[name]
    processes = {peer: start(peer, case, torch_python) for peer in peers}
    versions, times = {}, {}
    try:
        for peer, process in processes.items():
            versions[peer] = json.loads(process.stdout.readline())["version"]
            for what in WHAT[peer]:
                ask(process, what)
        for round_number in range(1, repeat + 1):
            for peer, process in processes.items():
                for what in WHAT[peer]:
                    times.setdefault((peer, what), []).append(ask(process, what))
            yield [summary(name, peer, versions, times, round_number) for peer in peers]
    finally:
        for process in processes.values():
            process.kill()


def summary(name, peer, versions, times, repeat):
    row = {"case": name, "peer": peer, "version": versions[peer], "repeat": repeat}
    for what in ("forward", "step"):
        for index, clock in enumerate(("wall", "processor")):
            values = [pair[index] for pair in times[peer, what]]
            row[f"{what}_{clock}_seconds"] = statistics.median(values)
            row[f"{what}_{clock}_seconds_min"] = min(values)
    if (peer, "product") in times:
        row["product_rate"] = PRODUCT_FLOPS / min(wall for wall, _ in times[peer, "product"])
    return row | {"device": benchmarks.device_name(), "date": date.today().isoformat()}


def line(rows):
    """A case in one line, to be seen while it runs: training steps beside ours."""
    ours = next((row for row in rows if row["peer"] == "ours"), rows[0])
    found = [f"{row['peer']} {row['step_wall_seconds'] / ours['step_wall_seconds']:.2f}"
             for row in rows if row is not ours]  # fmt: skip
    return f"{ours['case']}: {ours['peer']} {ours['step_wall_seconds']:.4f} s; " + ", ".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--cases", help="some of " + ",".join(SETTINGS))
    parser.add_argument("--peers", help="some of " + ",".join(WHAT))
    parser.add_argument("--solvers", action="store_true", help="the solvers with our pooling")
    parser.add_argument("--products", action="store_true", help="ours, in float32 and bfloat16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cases, every, output = SETTINGS, PEERS, RESULTS
    if options.solvers:
        cases = [name for name in LAYERS if name != "numbering"]
        every, output = SOLVERS, SOLVER_RESULTS
    if options.products:
        cases, every, output = LAYERS, PRODUCTS, PRODUCT_RESULTS
    output = options.output or output
    for name in options.cases.split(",") if options.cases else cases:
        asked = options.peers.split(",") if options.peers else every
        peers = [peer for peer in asked if _fits(peer, name)]
        rows = []
        # Written after every round, so that an interrupted comparison keeps what it has.
        repeat = options.repeat * (7 if name in POOLS else 1)  # They take milliseconds.
        for rows in measure(name, peers, repeat, options.torch_python):
            keep(rows, output)
        print(line(rows), flush=True)


def _fits(peer, name):
    if name in ENCODERS:
        return peer in FOR_ENCODERS
    if name in POOLS:
        return peer in FOR_POOLS
    return peer not in LEFT_OUT.get(name, ())


def keep(rows, path):
    """Replace the rows of the same case and peer in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else []
    new = {(row["case"], row["peer"]) for row in rows}
    old = [row for row in old if (row["case"], row["peer"]) not in new]
    path.write_text(json.dumps(old + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
