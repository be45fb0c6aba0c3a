"""A whole CLEVR training step: ``msdspn bench step``. What it costs, and which part of it."""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msdspn_jax.bench import layer as benchmarks
from msdspn_jax.clevr.procedural import procedural_examples
from msdspn_jax.losses import hungarian_loss
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.clevr.config import Config
from msdspn_jax.tasks.clevr.model import build_predictor, outer_optimizer

CASES: dict[str, Config] = {
    # As published: images of 128 x 128, ResNet18, 40 inner steps (the second half of training).
    "clevr-128": Config(batch_size=128),
    # The same but for the batch, so that it ends within minutes without an accelerator.
    "clevr-128-batch-8": Config(batch_size=8),
    "tiny": Config(
        size=64,
        encoder_width=4,
        latent_dim=16,
        hidden_dim=16,
        batch_size=2,
        inner=Inner(late_num_steps=2),
        render_quality="fast",
        max_objects=4,
    ),
}


def bench_step(name: str, repeat: int = 5) -> dict[str, Any]:
    """A training step of one of `CASES`: encoder, inner loop, matching, backward, Adam.

    Returns ``training_step_seconds`` (median, with ``_min`` and ``_max``), steps and images per
    second, and ``share``: which part of the step every part takes. Image encoder, inner loop and
    loss (the matching) are compiled and timed on their own; what remains of the step is backward,
    the update of the parameters included, so a negative share would say that the whole is faster
    than its parts. ``render_seconds`` is what drawing and rendering such a batch would add where
    scenes are drawn afresh at every step; the step is timed on images that are there.
    """
    config = benchmarks._lookup("case", name, CASES)
    predictor, optimizer = build_predictor(config), outer_optimizer(config)
    network = predictor.network(train=True)
    steps = config.resolved_inner().steps_at(1.0)

    def render(keys):
        return procedural_examples(keys, config.size, **config.render_options())

    def everything(variables):
        return {"params": variables["params"], **variables["state"]}

    def encode(variables, images):
        method = lambda network, images: network.encoder(images)  # noqa: E731
        mutable = list(variables["state"])
        return network.apply(everything(variables), images, method=method, mutable=mutable)[0]

    def decode(variables, latent):
        method = lambda network, latent: network.decoder(latent, num_steps=steps)  # noqa: E731
        minimum: Any = network.apply(everything(variables), latent, method=method)
        return minimum.sets

    def training_step(variables, optimizer_state, images, objects, keys):
        def objective(params):
            losses, _, state = predictor.loss(
                variables | {"params": params}, images, objects, keys, inner_steps=steps
            )
            return jnp.mean(losses), state

        params = variables["params"]
        (value, state), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return {"params": optax.apply_updates(params, updates), "state": state}, value

    random = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(1), config.batch_size)
    draw, _ = benchmarks._compile(render, keys)
    images, objects = draw(keys)
    objects = objects[:, : config.set_size]
    variables = jax.jit(predictor.init)(jax.random.key(0))
    latent = jnp.asarray(random.normal(size=(config.batch_size, config.latent_dim)), jnp.float32)
    optimizer_state = optimizer.init(variables["params"])
    arguments = (variables, optimizer_state, images, objects, keys)

    whole, compile_seconds = benchmarks._compile(training_step, *arguments)
    encoder, _ = benchmarks._compile(encode, variables, images)
    inner_loop, _ = benchmarks._compile(decode, variables, latent)
    sets = inner_loop(variables, latent)
    loss, _ = benchmarks._compile(hungarian_loss, sets, objects)
    times = benchmarks.time_in_turn(
        {
            "training_step": lambda: whole(*arguments),
            "encoder": lambda: encoder(variables, images),
            "inner_loop": lambda: inner_loop(variables, latent),
            "matching": lambda: loss(sets, objects),
            "render": lambda: draw(keys),
        },
        repeat,
    )
    medians = {part: statistics.median(values) for part, values in times.items()}
    step = medians["training_step"]
    share = {part: medians[part] / step for part in ("encoder", "inner_loop", "matching")}
    share["backward_and_update"] = 1 - sum(share.values())
    memory = whole.memory_analysis()
    return {
        "case": name,
        "device": benchmarks.device_name(),
        **benchmarks._summary(times),
        "steps_per_second": 1 / step,
        "images_per_second": config.batch_size / step,
        "share": share,
        "render_share_if_drawn_afresh": medians["render"] / (medians["render"] + step),
        "training_step_compile_seconds": compile_seconds,
        "temp_bytes": int(getattr(memory, "temp_size_in_bytes", 0)),
        "batch": config.batch_size,
        "size": config.size,
        "encoder": config.encoder,
        "encoder_width": config.encoder_width,
        "num_steps": steps,
        "set_size": config.set_size,
        "render_quality": config.render_quality,
    } | benchmarks._environment(repeat)
