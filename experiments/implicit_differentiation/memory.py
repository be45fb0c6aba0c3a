"""Memory of a decoder's gradient against the number of inner steps, by XLA's own account.

Compiles the gradient of the CLEVR decoder of the paper (n = 10, d = 19, width 512, batch 128,
float32) for every way to differentiate and reads the temporary memory that the program needs.
Nothing is executed, so the numbers do not depend on how busy the machine is.

    python experiments/implicit_differentiation/memory.py

writes memory.json and memory.png beside this file. A few minutes of compiling on two CPU cores.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import msdspn_jax as ms

FOLDER = Path(__file__).parent
STEPS = (5, 10, 20, 40, 80, 160)
WAYS = {
    "identity (iDSPN)": ms.identity(),
    "neumann(3)": ms.neumann(3),
    "conjugate_gradient(5)": ms.conjugate_gradient(5),
    "unrolled (DSPN)": ms.unrolled(),
    "unrolled, rematerialised": ms.unrolled(rematerialise=True),
}


def temp_bytes(adjoint: ms.Adjoint, num_steps: int) -> int:
    """Temporary memory of the compiled gradient with respect to all decoder parameters."""
    inner = ms.Inner(num_steps=num_steps, max_grad_norm=10.0, adjoint=adjoint)
    decoder = ms.SetDecoder(10, 19, 512, inner=inner)
    latent = jax.ShapeDtypeStruct((128, 512), jnp.float32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), latent)

    def loss(params, latent):
        return jnp.mean(decoder.apply(params, latent).sets ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, latent).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def draw(measured: dict[str, list[int]], path: Path) -> None:
    """Memory against inner steps, on log axes."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4), dpi=120)
    for name, sizes in sorted(measured.items(), key=lambda item: -item[1][-1]):
        axis.loglog(STEPS, [size / 1e6 for size in sizes], "o-", ms=4, lw=1.5, label=name)
    axis.set(xlabel="inner steps", ylabel="temporary memory, MB", xticks=STEPS)
    axis.set_xticklabels(STEPS)
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main():
    """Measure, then draw."""
    measured = {name: [temp_bytes(way, steps) for steps in STEPS] for name, way in WAYS.items()}
    record = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "inner_steps": STEPS,
        "temp_bytes": measured,
    }
    (FOLDER / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(measured, FOLDER / "memory.png")
    for name, sizes in measured.items():
        print(f"{name:26}", *(f"{size / 1e6:9.1f}" for size in sizes))


if __name__ == "__main__":
    main()
