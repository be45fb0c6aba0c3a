"""Put what was measured into the README's tables and the summary of the project.

    python experiments/benchmarks/report.py     # after run.sh

Reads results/*.json beside this file, writes between the marks of README.md and summary.json.
"""

import json
from pathlib import Path

import compare

from msdspn_jax import _markdown
from msdspn_jax.tasks.summary import Result, put_into, write_results

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAMES = {
    "torch": "PyTorch",
    "torch-compiled": "compiled",
    "torch-bfloat16": "bfloat16",
    "torchdeq": "TorchDEQ",
    "jax-sort-unrolled": "JAX, `jnp.sort`, unrolled",
    "jaxopt": "jaxopt, `jnp.sort`",
    "optimistix": "Optimistix, `jnp.sort`",
}
SOLVERS = {
    "ours-cg": "ours, `conjugate_gradient(10)`",
    "jaxopt-fspool": "jaxopt",
    "optimistix-fspool": "Optimistix",
}


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def milliseconds(seconds):
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def of_case(rows, case):
    return {row["peer"]: row for row in rows if row["case"] == case}


def decoders(rows):
    """Seconds, the share of them that matrix products take at best, and the peers as multiples."""
    measured = {row["peer"] for row in rows}
    names = {peer: name for peer, name in NAMES.items() if peer in measured}
    head = ["case", "ours, s", "floor, %", *names.values()]
    lines = []
    for name, case in compare.LAYERS.items():
        found = of_case(rows, name)
        ours = found["ours"]
        seconds = [ours[f"{what}_wall_seconds"] for what in ("forward", "step")]
        floor = case.num_steps * case.step_matmul_flops / ours["product_rate"]
        shares = [f"{100 * floor / value:.0f}" for value in seconds]
        line = [name, " / ".join(f"{value:.3f}" for value in seconds), " / ".join(shares)]
        for peer in names:
            times = [found[peer][f"{what}_wall_seconds"] / value
                     for what, value in zip(("forward", "step"), seconds, strict=True)
                     ] if peer in found else []  # fmt: skip
            line.append(" / ".join(f"{value:.2f}" for value in times))
        lines.append(line)
    return _markdown.table(head, lines)


def solvers(rows):
    """Seconds of ours, and the solvers of other libraries with our pooling as multiples of it."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        found = of_case(rows, name)
        by_peer = {
            peer: [row[f"{what}_wall_seconds"] for what in ("forward", "step")]
            for peer, row in found.items()
        }
        ours = by_peer["ours"]
        line = [name, " / ".join(f"{value:.3f}" for value in ours)]
        for peer in SOLVERS:
            times = [value / own for value, own in zip(by_peer[peer], ours, strict=True)]
            line.append(" / ".join(f"{value:.2f}" for value in times))
        lines.append(line)
    return _markdown.table(["case", "ours, `identity()`, s", *SOLVERS.values()], lines)


def products(rows):
    """Seconds with products of float32 and of bfloat16, forward pass and training step."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        line, times = [name], []
        for peer in compare.PRODUCTS:
            row = of_case(rows, name)[peer]
            times.append([row[f"{what}_wall_seconds"] for what in ("forward", "step")])
            line.append(" / ".join(f"{value:.3f}" for value in times[-1]))
        gains = [wide / narrow for wide, narrow in zip(*times, strict=True)]
        lines.append([*line, " / ".join(f"{gain:.2f}" for gain in gains)])
    return _markdown.table(["case", "float32, s", "bfloat16, s", "times as fast"], lines)


def encoders(rows):
    head = ["case", "ours", "share of the product rate, %"]
    measured = {row["peer"] for row in rows if row["case"] in compare.ENCODERS}
    peers = [peer for peer in NAMES if peer in measured]  # bfloat16 only where there are products
    head += [NAMES[peer] for peer in peers]
    lines = []
    for name, case in compare.ENCODERS.items():
        found = of_case(rows, name)
        once, stem = case.convolution_flops()
        flops = case.batch * (3 * once - stem)
        ours = found["ours"]
        share = flops / ours["step_wall_seconds"] / ours["product_rate"]
        rates = [case.batch / found[peer]["step_wall_seconds"] for peer in ("ours", *peers)]
        rates = [f"{rate:.0f}" for rate in rates]
        words = f"{case.size} px, width {case.width}, batch {case.batch}"
        lines.append([words, rates[0], f"{100 * share:.0f}", *rates[1:]])
    return _markdown.table(head, lines)


def pools(rows):
    head = ["n", *(f"{case['pool']:,}" for case in compare.POOLS.values())]
    names = {"ours": "ours", "torch": "PyTorch", "jax-sort-unrolled": "`jnp.sort`"}
    lines = [
        [words, *(milliseconds(of_case(rows, name)[peer]["step_wall_seconds"])
                  for name in compare.POOLS)]
        for peer, words in names.items()
    ]  # fmt: skip
    return _markdown.table(head, lines)


def matchings(rows):
    def cell(row, kind):
        methods = [f"{kind}/{method}" for method in ("device", "optax", "host")]
        return " / ".join(milliseconds(row["seconds"][m]) if m in row["seconds"] else "–"
                          for m in methods)  # fmt: skip

    kinds = ("trained", "untrained", "random")
    lines = [[f"{row['n']:,}", row["batch"], *(cell(row, kind) for kind in kinds)] for row in rows]
    return _markdown.table(["n", "sets", "trained", "untrained", "unrelated"], lines)


def starts(rows):
    """Wall-clock seconds, cold and warm where that makes a difference."""
    found = {}
    for row in rows:
        what, _, state = row["what"].rpartition(", ")
        if state not in ("cold", "warm"):
            what, state = row["what"], "warm"
        found.setdefault(what, {})[state] = f"{row['wall_seconds']:.2f}"
    lines = [[f"`{what}`", by.get("cold", ""), by["warm"]] for what, by in found.items()]
    return _markdown.table(["what", "cold, s", "warm, s"], lines)


def summary(rows):
    """Rows of the project's summary: training steps beside plain PyTorch."""
    kinds = {"set decoder": compare.LAYERS, "image encoder": compare.ENCODERS,
             "FSPool": compare.POOLS}  # fmt: skip
    results = []
    for name, cases in kinds.items():
        found = [of_case(rows, case) for case in cases]
        ratios = [by["torch"]["step_wall_seconds"] / by["ours"]["step_wall_seconds"]
                  for by in found]  # fmt: skip
        results.append(Result(
            "[speed](experiments/benchmarks/README.md), training step, times PyTorch's rate",
            f"{name}, {len(cases)} cases",
            "",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{rows[0]['device']}, float32",
            "",
            "experiments/benchmarks/run.sh OTHER_PYTHON",
        ))  # fmt: skip
    return results


def main():
    peers = read("peers")
    tables = {
        "decoders": decoders(peers),
        "solvers": solvers(read("solvers")),
        "products": products(read("products")),
        "encoders": encoders(peers),
        "pools": pools(peers),
        "matching": matchings(read("matching")),
        "starts": starts(read("startup")),
    }
    for name, text in tables.items():
        put_into(HERE / "README.md", text, f"report.py, {name}")
    write_results(HERE, summary(peers))
    for name in compare.SETTINGS:
        ours = of_case(peers, name)["ours"]
        print(f"{name}: product rate {ours['product_rate'] / 1e9:.0f} GFLOP/s, {ours['date']}")


if __name__ == "__main__":
    main()
