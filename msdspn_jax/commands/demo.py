"""``msdspn demo``: digits as sets, trained by DSPN and iDSPN side by side, timed and drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from msdspn_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Demo:
    """See set prediction work, in under two minutes on two CPU cores.

    Trains two autoencoders on real handwritten digits as sets of points. They differ in one
    argument: DSPN differentiates through every inner step, iDSPN at the minimum alone.
    """

    folder: str = "demo"
    """Where the pictures go."""
    steps: int = 700
    """Training steps of each model."""
    inner_steps: Annotated[int, tyro.conf.arg(name="inner.num-steps")] = 12
    """Steps of the inner minimisation that decodes a set."""
    seed: int = 0
    """Initial parameters and order of the data."""


@dataclass
class _Result:
    name: str
    seconds_per_step: float
    forward_backward_bytes: int
    forward_bytes: int
    backward_seconds: float
    validation_loss: float
    losses: list[float]
    minimum: Any


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code."""
    import tyro

    options = tyro.cli(Demo, prog="msdspn demo", args=argv)
    folder = Path(options.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose --folder") from error

    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(
        "Handwritten digits as sets of points (x, y, intensity, presence), encoded into 128"
        " numbers and decoded by minimising an energy over sets. Two models, one difference:"
        " how the minimum is differentiated.\n",
        highlight=False,
    )
    started = time.monotonic()
    results = run(options, console)
    _report(options, results, console)
    _draw(results, folder)
    console.print(
        f"\nPictures in [bold]{escape(str(folder))}/[/]: digits.png (targets and predictions),"
        " strip.png (a set moving from its initial state to the prediction), curves.png"
        " (the loss while training). "
        f"{time.monotonic() - started:.0f} s in all."
        " Next: [bold]msdspn train digits --help[/]",
        highlight=False,
    )
    return 0


def configuration(options: Demo, model: str) -> Any:
    """What the demo trains: small, but the models of `msdspn train digits`."""
    from msdspn_jax.models.inner import Inner
    from msdspn_jax.tasks.autoencoding import digits

    return digits.Config(
        model=model,  # type: ignore[arg-type]
        seed=options.seed,
        steps=options.steps,
        batch_size=32,
        learning_rate=3e-3,
        hidden_dim=128,
        latent_dim=128,
        min_intensity=9,
        # The same momentum for both, so that only the adjoint differs.
        inner=Inner(num_steps=options.inner_steps, step_size=3.0, momentum=0.9),
    )


def run(options: Demo, console: Any) -> dict[str, _Result]:
    """Train both models; the validation sets and results by model name."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from msdspn_jax.losses import hungarian_loss
    from msdspn_jax.tasks.autoencoding.digits import load_point_sets, split_indices
    from msdspn_jax.tasks.autoencoding.model import autoencoder

    config = configuration(options, "idspn")
    sets = load_point_sets(min_intensity=config.min_intensity).sets
    split = split_indices(0)
    train, val = jnp.asarray(sets[split["train"]]), jnp.asarray(sets[split["val"]])
    n, d = train.shape[1:]
    batch = config.batch_size
    order = np.random.default_rng(options.seed)
    picks = jnp.asarray(
        np.concatenate(
            [order.permutation(len(train)) for _ in range(-(-options.steps * batch // len(train)))]
        )[: options.steps * batch].reshape(options.steps, batch)
    )
    schedule = optax.cosine_decay_schedule(config.resolved_learning_rate(), options.steps, 0.05)
    optimizer = optax.adam(schedule)

    def loss_of(model):
        def loss(params, batch):
            return jnp.mean(hungarian_loss(model.apply({"params": params}, batch).sets, batch))

        return loss

    reference = autoencoder(config, n, d)
    initial = jax.jit(lambda key: reference.init(key, train[:1])["params"])(
        jax.random.key(options.seed)
    )
    example = train[:batch]

    # Decoding is the same program for both models: they differ in the backward pass alone.
    forward = _compile(loss_of(reference), initial, example)
    decode = jax.jit(
        lambda params, sets: reference.apply({"params": params}, sets, return_trajectory=True)
    )

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    results: dict[str, Any] = {}
    for label, name in (("iDSPN", "idspn"), ("DSPN", "dspn")):
        with console.status(f"{label}: compiling") as status:
            model = autoencoder(configuration(options, name), n, d)
            both = _compile(jax.value_and_grad(loss_of(model)), initial, example)
            params, state, losses = initial, optimizer.init(initial), []
            start = time.monotonic()
            for step in range(options.steps):
                value, gradient = both(params, train[picks[step]])
                params, state = update(params, state, gradient)
                losses.append(value)
                if step % 20 == 0:
                    status.update(f"{label}: step {step}/{options.steps}  loss {float(value):.4f}")
            jax.block_until_ready(params)
            per_step = (time.monotonic() - start) / options.steps
            minimum = decode(params, val)
            results[label] = _Result(
                name=label,
                seconds_per_step=per_step,
                forward_backward_bytes=both.memory_analysis().temp_size_in_bytes,
                forward_bytes=forward.memory_analysis().temp_size_in_bytes,
                backward_seconds=_backward_seconds(forward, both, params, example),
                validation_loss=float(jnp.mean(hungarian_loss(minimum.sets, val))),
                losses=[float(x) for x in losses],
                minimum=jax.tree.map(np.asarray, minimum),
            )
        console.print(
            f"{label}: {options.steps} steps, validation loss {results[label].validation_loss:.5f}",
            highlight=False,
        )
    results["target"] = np.asarray(val)
    return results


def _compile(function: Any, *arguments: Any) -> Any:
    import jax

    return jax.jit(function).lower(*arguments).compile()


def _backward_seconds(forward: Any, both: Any, *arguments: Any, repeats: int = 25) -> float:
    """Seconds of loss and gradient less those of the loss; the fastest of a few runs of each."""
    import jax

    fastest = {}
    # By turns, so that another program on the machine slows both down alike.
    for _ in range(repeats):
        for name, program in (("forward", forward), ("both", both)):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds = time.perf_counter() - start
            fastest[name] = min(seconds, fastest.get(name, seconds))
    return fastest["both"] - fastest["forward"]


def _report(options: Demo, results: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(
        title=f"Digits, {options.inner_steps} inner steps, batch 32", title_justify="left"
    )
    table.add_column("model")
    table.add_column("differentiates\n")
    for column in ("validation\nloss", "backward\npass", "peak\nmemory", "training\nstep"):
        table.add_column(column, justify="right")
    ways = {"iDSPN": "at the minimum", "DSPN": "through all steps"}
    for label, way in ways.items():
        r = results[label]
        table.add_row(
            label,
            way,
            f"{r.validation_loss:.5f}",
            f"{1e3 * r.backward_seconds:.1f} ms",
            f"{r.forward_backward_bytes / 2**20:.1f} MiB",
            f"{1e3 * r.seconds_per_step:.1f} ms",
        )
    console.print()
    console.print(table)
    console.print(
        "Backward pass: seconds of loss and gradient less those of the loss. Peak memory:"
        " XLA's temporary buffers of loss and gradient (of the loss alone:"
        f" {results['iDSPN'].forward_bytes / 2**20:.1f} MiB). DSPN's grows with the"
        " inner steps, iDSPN's does not: try --inner.num-steps 40.",
        highlight=False,
        style="dim",
    )


def _draw(results: dict[str, Any], folder: Path) -> None:
    import numpy as np

    from msdspn_jax import plots

    target, shown = results["target"], 10
    rows = {"target": target[:shown]} | {
        label: results[label].minimum.sets[:shown] for label in ("iDSPN", "DSPN")
    }
    plots.save(plots.digits(rows), folder / "digits.png")
    trajectory = results["iDSPN"].minimum.trajectory
    plots.save(
        plots.strip(
            trajectory.sets[:, 0], target[0], as_digits=True, energy=trajectory.energy[:, 0]
        ),
        folder / "strip.png",
    )
    window = 20
    lines = {
        label: np.convolve(results[label].losses, np.ones(window) / window, "valid")
        for label in ("iDSPN", "DSPN")
    }
    plots.save(plots.lines(lines, xlabel="training step", ylabel="loss"), folder / "curves.png")
