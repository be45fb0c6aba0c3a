"""The benchmarks measure what they say, and their output can be read by a program."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from msdspn_jax import adjoints as implicit
from msdspn_jax import cli
from msdspn_jax.bench import layer as benchmarks


def run(capsys, *arguments):
    assert cli.main(["bench", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_layer(capsys):
    (result,) = run(capsys, "layer", "--case", "tiny", "--json", "--repeat", "2")
    assert result["case"] == "tiny"
    assert result["device"]
    for part in ("forward", "training_step"):
        fastest, median, slowest = (result[f"{part}_seconds{end}"] for end in ("_min", "", "_max"))
        assert 0 < fastest <= median <= slowest
    case = benchmarks.LAYER_CASES["tiny"]
    # Two layers, forward and back, two operations a multiplication.
    one_step = 2 * 2 * (4 * 3 * 2 * 8 + 4 * 3 * 8 * 8)
    assert case.step_matmul_flops == one_step
    assert result["flops"] > case.num_steps * one_step
    assert result["temp_bytes"] > 0
    np.testing.assert_allclose(
        result["floor_seconds"] * result["matmul_flops_per_second"], case.num_steps * one_step
    )


def test_matching(capsys):
    (result,) = run(capsys, "matching", "--case", "tiny", "--json", "--repeat", "1")
    assert len(result["seconds"]) == 9
    assert all(value > 0 for value in result["seconds"].values())


@pytest.mark.slow
def test_step(capsys):
    (result,) = run(capsys, "step", "--case", "tiny", "--json", "--repeat", "2")
    assert result["images_per_second"] == pytest.approx(2 / result["training_step_seconds"])
    assert sum(result["share"].values()) == pytest.approx(1)
    for part in ("training_step", "encoder", "inner_loop", "matching", "render"):
        assert result[f"{part}_seconds"] > 0


def test_human_output(capsys):
    assert cli.main(["bench", "matching", "--case", "tiny", "--repeat", "1"]) == 0
    assert "trained/device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layer", "--case", "huge"), "--case: expected one of clevr-decoder"),
        (("layer", "--case", "tiny", "--repeat", "0"), "--repeat: expected a number >= 1"),
    ],
)
def test_user_errors(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_kinds_of_costs():
    """Trained predictions are matched to the element they came from, at little cost."""
    costs = {kind: benchmarks.matching_costs(kind, 4, 6) for kind in ("trained", "random")}
    best = {
        kind: np.mean([c[linear_sum_assignment(c)].sum() for c in cost])
        for kind, cost in costs.items()
    }
    assert best["trained"] < 0.1 * best["random"]


def temp_bytes(adjoint, num_steps):
    case = benchmarks.LayerCase(n=8, d=8, width=64, num_steps=num_steps, batch=16)
    layer = benchmarks.build_layer(case, adjoint=adjoint)
    compiled = jax.jit(layer.training_step).lower(*layer.arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_the_implicit_step_does_not_grow_with_inner_steps():
    few, many = (temp_bytes(implicit.identity(), steps) for steps in (5, 80))
    assert many <= 1.01 * few
    # The same measurement sees the growth where there is one.
    few, many = (temp_bytes(implicit.unrolled(), steps) for steps in (5, 80))
    assert many > 5 * few


@pytest.mark.parametrize("name", ["64-32", "128-64"])
def test_operations_of_the_encoder_are_those_of_its_convolutions(name, monkeypatch):
    from msdspn_jax.bench import encoder
    from msdspn_jax.models import resnet

    monkeypatch.setattr(resnet, "conv_general_dilated", jax.lax.conv_general_dilated)
    case = encoder.ENCODER_CASES[name]
    network = resnet.ResNet(width=case.width, latent_dim=case.latent_dim)
    images = jax.ShapeDtypeStruct((1, case.size, case.size, 3), jnp.float32)
    init = lambda x: network.init(jax.random.key(0), x, train=False)  # noqa: E731
    variables = jax.eval_shape(init, images)
    program = jax.make_jaxpr(lambda v, x: network.apply(v, x, train=False))(variables, images)
    counts = [
        2 * equation.outvars[0].aval.size * equation.invars[1].aval.size
        / equation.invars[1].aval.shape[-1]
        for equation in program.eqns
        if equation.primitive.name == "conv_general_dilated"
    ]  # fmt: skip
    assert len(counts) == 21
    assert case.convolution_flops() == pytest.approx((sum(counts), counts[0]))


@pytest.mark.slow
def test_bench_encoder_adds_up():
    from msdspn_jax.bench.encoder import bench_encoder

    result = bench_encoder("tiny", repeat=1)
    assert result["images_per_second"] == pytest.approx(2 / result["training_step_seconds"])
    share = result["flops"] / result["training_step_seconds"] / result["matmul_flops_per_second"]
    assert result["matmul_rate_share"] == pytest.approx(share)
