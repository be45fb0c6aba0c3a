"""The image encoder alone: ``msdspn bench encoder``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msdspn_jax.bench import layer as benchmarks
from msdspn_jax.models.resnet import ResNet


@dataclass(frozen=True, kw_only=True)
class EncoderCase:
    """ResNet-18 in training mode, forward and backward to all parameters."""

    size: int
    width: int
    batch: int
    latent_dim: int = 512

    def convolution_flops(self) -> tuple[float, float]:
        """Of all convolutions, forward, and of the stem alone; an image."""
        network = ResNet(width=self.width, latent_dim=self.latent_dim)
        side = self.size // 2
        stem = 2.0 * side**2 * 7 * 7 * 3 * self.width
        total, channels, side = stem, self.width, side // 2
        for stage, blocks in enumerate(network.stage_sizes):
            features = self.width * 2**stage
            for block in range(blocks):
                if stage and not block:
                    side //= 2
                    total += 2.0 * side**2 * channels * features
                total += 2.0 * side**2 * 9 * (channels + features) * features
                channels = features
        positions = (side // 2) ** 2
        total += 2.0 * positions * 4 * channels * (self.latent_dim // positions)
        return total, stem


ENCODER_CASES = {
    f"{size}-{width}": EncoderCase(size=size, width=width, batch=64 if size == 64 else 32)
    for size in (64, 128)
    for width in (32, 64)
} | {"tiny": EncoderCase(size=64, width=4, batch=2, latent_dim=16)}


def build_encoder(case: EncoderCase) -> benchmarks.Layer:
    """Random parameters, images and output cotangent for a case."""
    network = ResNet(width=case.width, latent_dim=case.latent_dim)
    random = np.random.default_rng(0)
    shape = (case.batch, case.size, case.size, 3)
    images = jnp.asarray(random.uniform(size=shape), jnp.float32)
    cotangent = jnp.asarray(random.normal(size=(case.batch, case.latent_dim)), jnp.float32)
    variables = jax.jit(lambda key: network.init(key, images[:2], train=True))(jax.random.key(0))

    def forward(variables, images):
        return network.apply(variables, images, train=True, mutable=["batch_stats"])

    def training_step(variables, images, cotangent):
        def objective(params):
            latent, state = forward(variables | {"params": params}, images)
            return jnp.sum(latent * cotangent), state

        return jax.value_and_grad(objective, has_aux=True)(variables["params"])

    return benchmarks.Layer(forward, training_step, (variables, images, cotangent))


def bench_encoder(name: str, repeat: int = 5) -> dict[str, Any]:
    """Forward and training step of one of `ENCODER_CASES`.

    Returns, beside the settings of the case: ``forward_seconds`` and ``training_step_seconds``
    (medians) with ``_min`` and ``_max``; ``images_per_second`` of the training step; ``flops``, the
    operations in all convolutions of a training step, counted by hand;
    ``matmul_flops_per_second``, the rate of a large matrix product here and now; and
    ``matmul_rate_share``, which part of that rate the step reaches.
    """
    case = benchmarks._lookup("case", name, ENCODER_CASES)
    encoder = build_encoder(case)
    forward, forward_compile = benchmarks._compile(encoder.forward, *encoder.arguments[:-1])
    step, step_compile = benchmarks._compile(encoder.training_step, *encoder.arguments)
    side = 1024
    square = jnp.ones((side, side))
    product, _ = benchmarks._compile(jnp.matmul, square, square)
    times = benchmarks.time_in_turn(
        {
            "forward": lambda: forward(*encoder.arguments[:-1]),
            "training_step": lambda: step(*encoder.arguments),
            "matmul": lambda: product(square, square),
        },
        repeat,
    )
    rate = 2.0 * side**3 / min(times.pop("matmul"))
    once, stem = case.convolution_flops()
    # Two products backward for one forward, but that nobody asks for the gradient of the images.
    flops = case.batch * (3 * once - stem)
    result = {
        "case": name,
        "device": benchmarks.device_name(),
        **benchmarks._summary(times),
        "forward_compile_seconds": forward_compile,
        "training_step_compile_seconds": step_compile,
        "temp_bytes": int(getattr(step.memory_analysis(), "temp_size_in_bytes", 0)),
        "flops": flops,
        "matmul_flops_per_second": rate,
    }
    seconds = result["training_step_seconds"]
    result["images_per_second"] = case.batch / seconds
    result["matmul_rate_share"] = flops / seconds / rate
    return result | benchmarks._environment(repeat) | asdict(case)
