"""Draw the pictures of the site from real runs: ``python docs/_figures.py [NAME ...]``.

All, or those named; a few minutes. They are kept in docs/figures, so that the site builds without
running anything.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax

import msdspn_jax as ms

FOLDER = Path(__file__).parent / "figures"
N, D, WIDTH, BATCH, STEPS = 4, 2, 64, 64, 20
COLOURS = ("#00796b", "#e65100", "#5e35b1", "#c2185b")
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
                     "figure.dpi": 110, "savefig.facecolor": "white"})  # fmt: skip


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    trained = functools.cache(train)
    drawings = {
        "push_apart": push_apart,
        "equal_elements": lambda: equal_elements({p: trained(p) for p in ("fspool", "mean")}),
        "minimisation": lambda: minimisation(*trained("fspool")[:2]),
        "adjoints": lambda: adjoints(*trained("fspool")[:2]),
        "step_size": lambda: step_size(*trained("fspool")[:2]),
    }
    for name in names or drawings:
        drawings[name]()


def save(figure, name: str) -> None:
    figure.tight_layout()
    # Without dates and versions, so that equal pictures are equal files.
    figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)


def push_apart() -> None:
    """What `ms.push_apart` does to pairs, beside a set-equivariant function."""
    cases = [([1.0, 2.0], ms.push_apart), ([2.0, 1.0], ms.push_apart), ([1.0, 1.0], ms.push_apart),
             ([1.0, 1.0], lambda x: 1.6 * x)]  # fmt: skip
    titles = ["different elements", "in the other order", "equal elements",
              "equal elements,\nset-equivariant function"]  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharex=True, sharey=True)
    for ax, (values, function), title in zip(axes, cases, titles, strict=True):
        before = np.array(values)
        after = np.asarray(function(jnp.array(values)[:, None]))[:, 0]
        # Equal ones side by side, to be seen.
        shift = np.array([-0.07, 0.07])
        for i in range(2):
            beside = shift[i] * (before[0] == before[1]), shift[i] * (after[0] == after[1])
            start, end = (before[i] + beside[0], 1), (after[i] + beside[1], 0)
            arrow = {"arrowstyle": "->", "color": COLOURS[i], "lw": 1.5, "shrinkA": 7, "shrinkB": 7}
            ax.annotate("", end, start, arrowprops=arrow)
            ax.plot(*zip(start, end, strict=True), "o", ms=11, color=COLOURS[i])
        words = [", ".join(f"{v:g}" for v in x) for x in (before, after)]
        ax.set_title(f"{title}\n[{words[0]}] → [{words[1]}]", fontsize=10)
        ax.set(xlim=(-0.6, 3.6), ylim=(-0.3, 1.3), yticks=[1, 0], yticklabels=["X", "f(X)"])
    save(figure, "push_apart")


def train(pool: str, updates: int = 2000):
    """A set autoencoder that always starts from equal elements; model, variables, losses."""
    model = ms.set_autoencoder(
        set_size=N, set_dim=D, hidden_dim=WIDTH, latent_dim=WIDTH,
        inner=ms.Inner(num_steps=STEPS, pool=pool, step_size=4.0),
    )  # fmt: skip
    start = jnp.zeros((BATCH, N, D))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, updates))
    variables = model.init(jax.random.key(0), start)

    def update(carry, key):
        variables, state = carry
        targets = jax.random.normal(key, (BATCH, N, D))

        def loss(variables):
            sets = model.apply(variables, targets, initial_sets=start).sets
            return ms.hungarian_loss(sets, targets).mean()

        value, gradients = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(variables, updates), state), value

    @jax.jit
    def run(variables):
        carry = variables, optimizer.init(variables)
        return jax.lax.scan(update, carry, jax.random.split(jax.random.key(1), updates))

    (variables, _), losses = run(variables)
    print(f"{pool}: loss {float(losses[0]):.3f} -> {float(losses[-50:].mean()):.3f}")
    return model, variables, np.asarray(losses)


def unseen():
    return jax.random.normal(jax.random.key(7), (BATCH, N, D))


def decoded(model, variables, which: int = 3):
    """Trajectory and target of one unseen set, from equal elements."""
    targets = unseen()
    minimum = model.apply(
        variables, targets, initial_sets=jnp.zeros_like(targets), return_trajectory=True
    )
    path = minimum.trajectory
    return [np.asarray(x)[:, which] for x in path], np.asarray(targets)[which]


def paths(ax, sets, target) -> None:
    ax.plot(*target.T, "x", color="black", ms=10, mew=2, label="target")
    for i in range(N):
        ax.plot(*sets[:, i].T, "-", color=COLOURS[i], lw=1.2, alpha=0.8)
    ax.plot(*sets[-1].T, "o", color="grey", ms=0)
    for i in range(N):
        ax.plot(*sets[-1, i], "o", color=COLOURS[i], ms=8)
    ax.plot(*sets[0, 0], "s", color="grey", ms=7, label="start: all elements equal")
    ax.set_aspect("equal", adjustable="datalim")


def equal_elements(trained) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    titles = {"fspool": "iDSPN: sorts every feature", "mean": "mean pool: set-equivariant"}
    for ax, (pool, (model, variables, _)) in zip(axes[:2], trained.items(), strict=True):
        (sets, *_), target = decoded(model, variables)
        paths(ax, sets, target)
        ax.set_title(titles[pool])
    axes[0].legend(fontsize=8)
    for (pool, (*_, losses)), colour in zip(trained.items(), COLOURS, strict=False):
        smooth = losses.reshape(-1, 25).mean(1)
        x = np.arange(len(smooth)) * 25
        axes[2].semilogy(x, smooth, color=colour, label=titles[pool].split(":")[0])
    axes[2].set(xlabel="training step", title="loss")
    axes[2].legend(fontsize=8)
    save(figure, "equal_elements")


def minimisation(model, variables) -> None:
    (sets, energy, gradient_norm), target = decoded(model, variables)
    shown = (0, 1, 2, 4, 8, STEPS)
    figure = plt.figure(figsize=(10, 4.6))
    grid = figure.add_gridspec(2, 6, height_ratios=(1.3, 1))
    everything = np.concatenate([sets.reshape(-1, D), target])
    low, high = everything.min(0) - 0.4, everything.max(0) + 0.4
    for column, step in enumerate(shown):
        ax = figure.add_subplot(grid[0, column])
        ax.plot(*target.T, "x", color="black", ms=8, mew=1.5)
        for i in range(N):
            ax.plot(*sets[step, i], "o", color=COLOURS[i], ms=7)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        ax.set_title(f"step {step}", fontsize=10)
    for place, values, name in (
        (grid[1, :3], energy, "energy E(Y)"),
        (grid[1, 3:], gradient_norm, "gradient norm"),
    ):
        ax = figure.add_subplot(place)
        ax.semilogy(values, "o-", color=COLOURS[0], ms=3)
        ax.set(xlabel="inner step", title=name)
        ax.title.set_fontsize(10)
    save(figure, "minimisation")


def adjoints(model, variables) -> None:
    """How well each adjoint's gradient points along the exact one, by steps of the descent."""
    targets = unseen()
    energy, params = model.decoder.energy(variables)
    latents = model.encoder.apply({"params": variables["params"]["encoder"]}, targets)
    start = jnp.zeros_like(targets)
    optimizer = ms.nesterov(4.0, 0.9)

    def gradient(params, latents, adjoint, num_steps):
        def loss(params):
            minimum = ms.minimise(
                energy, params, ms.Context(latents, start), start,
                optimizer=optimizer, num_steps=num_steps, adjoint=adjoint,
            )  # fmt: skip
            return ms.hungarian_loss(minimum.sets, targets).mean()

        return jax.flatten_util.ravel_pytree(jax.grad(loss)(params))[0]

    compiled = jax.jit(gradient, static_argnums=2)
    best = compiled(params, latents, ms.exact(), 640)
    figure, ax = plt.subplots(figsize=(6.4, 3.4))
    steps = (1, 2, 5, 10, 20, 40, 80, 160)
    ways = [ms.exact(), ms.conjugate_gradient(5, damping=1e-3), ms.neumann(3), ms.identity()]
    for adjoint, colour in zip([*ways, ms.unrolled()], [*COLOURS, "#546e7a"], strict=True):
        fixed = isinstance(adjoint, ms.Unrolled)
        run = jax.jit(gradient, static_argnums=(2, 3)) if fixed else compiled
        cosines = []
        for number in steps:
            found = run(params, latents, adjoint, number)
            cosines.append(found @ best / (jnp.linalg.norm(found) * jnp.linalg.norm(best)))
        print(adjoint, [round(float(x), 3) for x in cosines])
        width = 4 if adjoint == ms.exact() else 1.5  # It lies beneath another.
        ax.semilogx(steps, cosines, "o-", ms=4, lw=width, color=colour, label=str(adjoint))
    ax.set(xlabel="inner steps", ylabel="cosine with the exact gradient\nafter 640 steps")
    ax.legend(fontsize=8)
    save(figure, "adjoints")


def step_size(model, variables) -> None:
    targets = unseen()
    energy, params = model.decoder.energy(variables)
    latents = model.encoder.apply({"params": variables["params"]["encoder"]}, targets)
    start = 0.1 * jax.random.normal(jax.random.key(3), targets.shape)
    context = ms.Context(latents, start)
    found = ms.suggest_step_size(
        energy, params, context, start, key=jax.random.key(0), num_steps=STEPS, momentum=0.9
    )
    print(found.step_size, found.stable_below, found.tried)

    @jax.jit
    def after(params, context, size):
        minimum = ms.minimise(
            energy, params, context, start, num_steps=STEPS,
            optimizer=optax.sgd(size, momentum=0.9, nesterov=True),
        )  # fmt: skip
        movement = jnp.sqrt(jnp.mean((minimum.sets - start) ** 2))
        return minimum.energy.mean(), movement

    sizes = np.geomspace(1e-3, 30, 40)
    energies, movements = np.array([after(params, context, size) for size in sizes]).T
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for ax, values, name in (
        (axes[0], energies, f"mean energy after {STEPS} steps"),
        (axes[1], movements, "root-mean-square movement"),
    ):
        ax.loglog(sizes, values, "o-", ms=3, color=COLOURS[0])
        low, high = values[sizes < found.stable_below].min(), values[sizes < 1].max()
        ax.set_ylim(low / 2, high * 10)  # Beyond, it diverges to infinity.
        ax.axvline(found.step_size, color=COLOURS[1], label=f"suggested: {found.step_size:.2g}")
        ax.axvline(found.stable_below, color=COLOURS[2], ls="--",
                   label=f"stable below: {found.stable_below:.2g}")  # fmt: skip
        ax.set(xlabel="step size", title=name)
        ax.title.set_fontsize(10)
    axes[0].legend(fontsize=8)
    save(figure, "step_size")


if __name__ == "__main__":
    main(sys.argv[1:])
