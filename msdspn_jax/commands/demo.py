"""``msdspn demo``: what predicting sets is about, in three short acts and one picture."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdspn_jax._options import parse
from msdspn_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from msdspn_jax.training.task import Task, Variables

_WIDTH = 1520  # pixels of the picture


@dataclass(frozen=True, kw_only=True)
class Demo:
    """See set prediction work, in about two minutes on two CPU cores.

    1. Equal elements: number the elements of multisets within their classes. iDSPN learns it; a
       set-equivariant network cannot, because it gives equal elements equal outputs.
    2. A set is a minimum: real handwritten digits as point sets, decoded by descending an energy.
       The gradient is taken at the minimum, so its memory does not grow with the steps.
    3. From an image to a set: a scene is rendered, and the model in the box names its objects.
    """

    folder: str = "demo"
    """Where the picture goes: FOLDER/demo.png."""
    numbering_steps: int = 600
    """Training steps of each of the two models that number elements."""
    digits_steps: int = 400
    """Training steps of the model that decodes digits."""
    seed: int = 0
    """Initial parameters and data."""


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code."""
    # All that the acts need, before the first of them takes its minute.
    for package in ("matplotlib", "PIL", "safetensors", "sklearn"):
        importlib.import_module(package)
    options = parse(Demo, argv, prog="msdspn demo")
    folder = Path(options.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose --folder") from error

    from rich.console import Console

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    started = time.monotonic()
    figures = [
        act(options, say) for act in (number_equal_elements, decode_digits, find_the_objects)
    ]
    path = folder / "demo.png"
    _save_stacked(figures, path)
    say(
        f"\nAll of it in one picture: {path} ({time.monotonic() - started:.0f} s in all).\n"
        "Next: msdspn train digits --help, or your own data: msdspn train sets --help"
    )
    return 0


# --- 1: equal elements ---


def number_equal_elements(options: Demo, say: Callable[[str], None]) -> Figure:
    """Train iDSPN and DeepSets on class-specific numbering; draw what they say."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from msdspn_jax.models.inner import Inner
    from msdspn_jax.tasks.numbering import data
    from msdspn_jax.tasks.numbering.config import Config
    from msdspn_jax.tasks.numbering.model import build_model
    from msdspn_jax.tasks.numbering.task import build
    from msdspn_jax.training.config import Outer

    n, num_classes = 8, 4
    say(
        f"1. Equal elements. Number the {n} elements of a multiset within their {num_classes}"
        " classes:\n   [a, b, b, a] becomes [a0, b0, b1, a1]."
    )
    index = jnp.arange(512)
    batch = data.draw_batch(data.split_keys("val", index), n=n, num_classes=num_classes)
    curves, numbers, right = {}, {}, {}
    for label, name in (("iDSPN", "idspn"), ("DeepSets", "deep-sets")):
        config = Config(
            model=name,  # type: ignore[arg-type]
            seed=options.seed,
            steps=options.numbering_steps,
            batch_size=64,
            fresh=True,
            set_size=n,
            num_classes=num_classes,
            hidden_dim=128,
            latent_dim=128,
            learning_rate=0.02,
            val_size=len(index),
            outer=Outer(optimizer="muon", schedule="linear"),
            inner=Inner(num_steps=10) if name == "idspn" else Inner(),
        )
        variables, history = train(build(config), config, label)
        curves[label] = history["macro_accuracy"]
        model = build_model(config)
        noise = model.draw_noise(data.fold_in_each(jax.random.key(options.seed), index), n)
        prediction, _ = jax.jit(model.apply)(variables["params"], batch.inputs, noise)
        numbers[label], right[label] = _numbers(model.cost, prediction, batch)
        accuracy = right[label].all(-1).mean()
        say(f"   {label}: {accuracy:.1%} of {len(index)} unseen multisets numbered right.")
    same = _spread(np.asarray(batch.inputs.argmax(-1)), numbers["DeepSets"])
    say(
        "   DeepSets is set-equivariant: of its outputs for equal elements, "
        + ("no two differ." if not same else f"{same} pairs differ.")
    )
    return _draw_numbers(np.asarray(batch.inputs.argmax(-1)), numbers, right, curves)


def _numbers(cost: Any, prediction: Any, batch: Any) -> tuple[Any, Any]:
    """The predicted numbers, and which are right under the best matching within the classes."""
    import jax.numpy as jnp
    import numpy as np

    from msdspn_jax.losses import numbering_assignment

    assignment = numbering_assignment(prediction, batch.targets, batch.inputs, cost=cost)
    expected = jnp.take_along_axis(batch.targets.argmax(-1), assignment, axis=1)
    number = prediction.argmax(-1)
    return np.asarray(number), np.asarray(number == expected)


def _spread(classes: Any, numbers: Any) -> int:
    """How many pairs of equal elements got different numbers."""
    equal = classes[:, :, None] == classes[:, None, :]
    return int((equal & (numbers[:, :, None] != numbers[:, None, :])).sum() // 2)


def _draw_numbers(classes: Any, numbers: Any, right: Any, curves: Any) -> Figure:
    import numpy as np

    from msdspn_jax import plots

    shown, n = 3, classes.shape[1]
    figure = plots.new_figure(13, 1.9)
    *panels, chart = figure.subplots(1, shown + 1, width_ratios=[1.15] * shown + [1])
    names = ["input", *numbers]
    for i, axes in enumerate(panels):
        for row, name in enumerate(names):
            for column in range(n):
                place = (column, -row)
                letter = "abcdefgh"[classes[i, column]]
                wrong = row > 0 and not right[name][i, column]
                text = letter if row == 0 else f"{letter}{numbers[name][i, column]}"
                color = plots.SERIES[classes[i, column] % len(plots.SERIES)]
                axes.scatter(*place, s=330, color=color, alpha=0.25 if wrong else 0.9, linewidths=0)
                axes.text(*place, text, ha="center", va="center", fontsize=9,
                          color=plots.SERIES[1] if wrong else "white")  # fmt: skip
        axes.set(xlim=(-0.6, n - 0.4), ylim=(0.5 - len(names), 0.6), aspect="equal")
        axes.set(xticks=[], yticks=[-row for row in range(len(names))])
        axes.set_yticklabels(names if i == 0 else [], fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_title(
        "1. Equal elements need different numbers (faded: wrong)", fontsize=10, loc="left", pad=10
    )
    for color, (name, accuracy) in zip(plots.SERIES, curves.items(), strict=False):
        window = np.ones(min(20, len(accuracy))) / min(20, len(accuracy))
        chart.plot(100 * np.convolve(accuracy, window, "valid"), color=color, label=name)
    chart.set(xlabel="training step", ylabel="sets all right, %", ylim=(-3, 103))
    chart.legend(frameon=False, fontsize=8)
    plots.plain_axes(chart)
    return figure


# --- 2: a set is a minimum ---


def decode_digits(options: Demo, say: Callable[[str], None]) -> Figure:
    """Train an autoencoder of digits; draw a set on its way down the energy."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from msdspn_jax import plots
    from msdspn_jax.models.inner import Inner
    from msdspn_jax.tasks.autoencoding import digits
    from msdspn_jax.tasks.autoencoding.model import autoencoder
    from msdspn_jax.training.config import Outer

    config = digits.Config(
        seed=options.seed,
        steps=options.digits_steps,
        batch_size=32,
        learning_rate=0.03,
        hidden_dim=128,
        latent_dim=128,
        min_intensity=9,
        outer=Outer(optimizer="muon", schedule="linear"),
        inner=Inner(num_steps=12, step_size=3.0),
    )
    sets = digits.load_point_sets(min_intensity=config.min_intensity).sets
    val = jnp.asarray(sets[digits.split_indices(config.split_seed)["val"]])
    say(
        f"\n2. A set is a minimum. {len(sets):,} handwritten digits as sets of points,"
        f" encoded into\n   {config.latent_dim} numbers and decoded by"
        f" {config.inner.num_steps} steps down an energy."
    )
    task = digits.build(config)
    variables, _ = train(task, config, "iDSPN")
    decode = jax.jit(
        lambda params: autoencoder(config, *val.shape[1:]).apply(
            {"params": params}, val, return_trajectory=True
        )
    )
    minimum: Any = jax.tree.map(np.asarray, decode(variables["params"]))
    loss = task.evaluate(variables, "val", jax.random.key(options.seed))["loss"]
    say(f"   Validation loss {float(loss):.4f}. Memory that the gradient of a batch needs:")
    for steps in (12, 48):
        at_minimum, through_all = (
            _gradient_mebibytes(digits, config, model, steps) for model in ("idspn", "dspn")
        )
        say(
            f"   {steps} steps: {at_minimum:.0f} MiB taken at the minimum (iDSPN),"
            f" {through_all:.0f} MiB through all steps (DSPN)."
        )
    figure = plots.strip(
        minimum.trajectory.sets[:, 0],
        np.asarray(val[0]),
        as_digits=True,
        energy=minimum.trajectory.energy[:, 0],
    )
    figure.suptitle("2. A set is a minimum", fontsize=10, color="#e6e9ef", ha="left", x=0.01)
    return figure


def _gradient_mebibytes(digits: Any, config: Any, model: str, steps: int) -> float:
    """Temporary memory of the compiled gradient; nothing is run."""
    import dataclasses

    import jax

    inner = dataclasses.replace(config.inner, num_steps=steps)
    task = digits.build(dataclasses.replace(config, model=model, inner=inner))
    variables = jax.eval_shape(task.init, jax.random.key(0))
    sets = jax.ShapeDtypeStruct((config.batch_size, *digits.load_point_sets(
        min_intensity=config.min_intensity).sets.shape[1:]), "float32")  # fmt: skip
    loss = lambda variables, sets: task.loss(  # noqa: E731
        variables,
        sets,
        None,
        stage=steps,
        axis_name=None,  # type: ignore[arg-type]
    )[0]
    compiled = jax.jit(jax.grad(loss)).lower(variables, sets).compile()
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0) / 2**20


# --- 3: from an image to a set ---


def find_the_objects(options: Demo, say: Callable[[str], None]) -> Figure:
    """Render a scene and let the model in the box find its objects."""
    import jax
    import numpy as np

    from msdspn_jax.clevr import objects, plots
    from msdspn_jax.clevr.procedural import procedural_examples
    from msdspn_jax.trained.weights import box_model_path, load_model

    model = load_model(box_model_path())
    config: Any = model.config
    say(
        f"\n3. From an image to a set. Two scenes are rendered at {config.size} pixels; the model"
        " that comes\n   with the package finds what is in them."
    )
    keys = jax.random.split(jax.random.key(options.seed), 2)
    images, true = (np.asarray(x) for x in jax.jit(
        lambda keys: procedural_examples(keys, config.size, **config.render_options())
    )(keys))  # fmt: skip
    found = np.asarray(jax.jit(model.predict)(model.variables, images))
    for i, (prediction, target) in enumerate(zip(found, true, strict=True)):
        names, true_names = ([_name(o) for o in objects.decode(x)] for x in (prediction, target))
        say(
            f"   Scene {i + 1}: {_in_common(names, true_names)} of {len(true_names)} objects found"
            " with the right size, color, material, shape."
        )
    return plots.scenes(list(images), list(found), list(true),
                        titles=["3. From an image to a set", ""])  # fmt: skip


def _name(o: Any) -> str:
    return f"{o.size} {o.color} {o.material} {o.shape}"


def _in_common(a: list[str], b: list[str]) -> int:
    """Of two multisets of names, how many are in both."""
    return sum(min(a.count(name), b.count(name)) for name in set(a))


# --- what all acts need ---


def train(task: Task, config: Any, label: str) -> tuple[Variables, dict[str, Any]]:
    """A training loop without run folder: the trained variables, and each metric of each step."""
    import jax
    import numpy as np

    from msdspn_jax._progress import ProgressBar
    from msdspn_jax.errors import UserError
    from msdspn_jax.training.parallel import StepRunner

    runner = StepRunner(task, config)
    state, done, history = runner.place(runner.init()), 0, []
    with ProgressBar(f"   {label}", transient=True) as report:
        while done < config.steps:
            report(done, config.steps)
            chunk = runner.run(state, done, min(20, config.steps - done))
            if chunk.status.any():
                raise UserError(
                    f"{label}: training diverged (a step up to {done + chunk.done} was refused)"
                )
            state, done = chunk.state, done + chunk.done
            history.append({name: values[:, 0] for name, values in chunk.metrics.items()})
    variables = runner.fetch(state).variables
    return variables, jax.tree.map(lambda *x: np.concatenate(x), *history)


def _save_stacked(figures: list[Figure], path: Path) -> None:
    """Save figures below each other as one PNG, each as wide as the picture."""
    import io

    from PIL import Image

    from msdspn_jax._files import write_bytes

    rows = []
    for figure in figures:
        png = io.BytesIO()
        figure.savefig(png, dpi=_WIDTH / figure.get_figwidth(), facecolor=figure.get_facecolor())
        rows.append(Image.open(png).convert("RGB"))
    gap = 24
    height = sum(row.height for row in rows) + gap * (len(rows) - 1)
    whole = Image.new("RGB", (_WIDTH, height), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height + gap
    png = io.BytesIO()
    whole.save(png, "png", optimize=True)
    write_bytes(path, png.getvalue())
