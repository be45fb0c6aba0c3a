"""Everything lowers for GPUs and TPUs, on a machine that has none.

Each row of `ROWS` is exported for each of `PLATFORMS`. Lowering is tracing and translation: nothing
is compiled for the platform and nothing runs. The test looks at what the programs contain: calls
of native code, talk with the host, and whatever was written for a CPU alone.

``python tests/test_lowering.py`` prints docs/lowering.md.
"""

import collections
import datetime
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import test_composition
from jax import export
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

import msdspn_jax as ms
from msdspn_jax import _markdown, matching, ranks, tasks
from msdspn_jax.clevr.procedural import procedural_examples
from msdspn_jax.models.inner import Inner
from msdspn_jax.tasks.autoencoding.model import autoencoder
from msdspn_jax.tasks.clevr.model import build_predictor
from msdspn_jax.tasks.numbering.model import build_model
from msdspn_jax.training.config import Devices
from msdspn_jax.training.parallel import AXIS, StepRunner
from msdspn_jax.training.state import init_states

PLATFORMS = ("cuda", "rocm", "tpu")
DEVICES = 8
MESH = AbstractMesh((DEVICES,), (AXIS,))
BATCH = 2 * DEVICES
WAYS = ("one device", "shard_map")

# Functions that only a CPU's program may come from.
CPU_ONLY = ("_ranks_by_keys", "_sortable", "computed_once", "by_columns", "_threshold_on_cpu")
# The dense solves of `exact` and `anderson`. Beside them only checks of a batch's size are called.
SOLVES = {
    "cuda": {"cusolver_getrf_ffi", "cu_lu_pivots_to_permutation"},
    "rocm": {"hipsolver_getrf_ffi", "hip_lu_pivots_to_permutation"},
    "tpu": {"LuDecomposition"},
}

TINY = {"hidden_dim": 4, "latent_dim": 4}
INNER = Inner(num_steps=2, late_num_steps=3)
CLEVR = TINY | {"size": 64, "encoder_width": 2, "slot_dim": 4, "set_size": 10, "train_size": 20}
NUMBERING = {"hidden_dim": 4, "latent_dim": 4, "width": 8, "set_size": 17, "train_size": 32}
SETS = TINY | {"set_size": 17, "set_dim": 3}


class Program(NamedTuple):
    """What a row lowers: a jitted function and the shapes of its arguments."""

    function: Any
    arguments: tuple


def shapes(tree: Any, spec: P | None = None) -> Any:
    """Shapes alone; with a spec, of arrays that lie on the mesh in this way."""
    sharding = None if spec is None else NamedSharding(MESH, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def keys(number: int) -> Any:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), number))


def mapped(
    function: Callable, way: str, params: Any, batch: tuple, *, check: bool = True
) -> Program:
    """``function(params, *batch)``; over the mesh the batch is shared out."""
    if way == "one device":
        return Program(jax.jit(function), (params, *batch))
    specs = (P(), *(P(AXIS) for _ in batch))
    over = jax.shard_map(function, mesh=MESH, in_specs=specs, out_specs=P(AXIS), check_vma=check)
    return Program(jax.jit(over), (shapes(params, P()), *shapes(batch, P(AXIS))))


# --- what is lowered ---


def training(name: str, way: str, **settings: Any) -> Program:
    """A dispatch of `training.parallel`: as many steps as its argument says, in one loop."""
    module = tasks.load(name)
    devices = Devices(parallel="none" if way == "one device" else "shard-map")
    config = module.Config(batch_size=BATCH, steps=4, devices=devices, **settings)
    task = module.build(config)
    runner = StepRunner(task, config, jax.devices()[:1])
    specs: list = [None, None]
    if way == "shard_map":
        runner.mesh, runner.local_batch = MESH, BATCH // DEVICES
        specs = [P(), P()]
    state = jax.eval_shape(
        lambda: init_states(task.init, task.optimizer, config.seed, config.replicates)
    )
    if name == "clevr" and task.data is not None:
        images = array(20, config.size, config.size, 3, dtype=jnp.uint8)
        data = {"images": images, "objects": array(20, config.set_size, 19)}
    else:
        data = None if task.data is None else task.data()
    key_data = array(*runner._key_data().shape, dtype=jnp.uint32)
    arguments = (
        shapes(state, specs[0]), key_data, array(dtype=jnp.int32), None, shapes(data, specs[1])
    )  # fmt: skip
    return Program(runner._program(task.stage(0)), arguments)


def clevr_forward(way: str, **settings: Any) -> Program:
    config = tasks.load("clevr").Config(**settings)
    predictor = build_predictor(config)
    variables = jax.eval_shape(predictor.init, jax.random.key(0))
    images = array(BATCH, config.size, config.size, 3, dtype=jnp.uint8)

    def forward(variables, images, keys):
        return predictor.predict(variables, images, keys).objects

    return mapped(forward, way, variables, (images, keys(BATCH)))


def clevr_predict(**settings: Any) -> Program:
    """What ``msdspn export`` writes: any batch."""
    program = clevr_forward("one device", **settings)
    (batch,) = export.symbolic_shape("batch")
    variables, images, _ = program.arguments

    def predict(variables, images):
        same = jnp.broadcast_to(jax.random.key(0), images.shape[:1])
        return program.function(variables, images, same)

    images = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    return Program(jax.jit(predict), (variables, images))


def numbering_forward(way: str, **settings: Any) -> Program:
    config = tasks.load("numbering").Config(**settings)
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    n = config.set_size
    inputs = array(BATCH, n, config.num_classes), array(BATCH, n, model.noise_width)

    def forward(params, inputs, noise):
        return model.apply(params, inputs, noise)[0]

    return mapped(forward, way, params, inputs)


def sets_forward(way: str, **settings: Any) -> Program:
    config = tasks.load("random-sets").Config(**settings)
    model = autoencoder(config, config.set_size, config.set_dim)
    sets = array(BATCH, config.set_size, config.set_dim)
    variables = jax.eval_shape(model.init, jax.random.key(0), sets)
    return mapped(lambda v, sets: model.apply(v, sets).sets, way, variables, (sets,))


def option(name: str, way: str) -> Program:
    """`minimise` with values and derivatives in both modes, see `test_composition`."""
    params, context = jax.eval_shape(lambda: test_composition.problem())
    context = array(BATCH, *context.shape[1:])

    def both(params, context):
        gradients, values = test_composition.both(name, params, context)
        return gradients[0], gradients[2], values

    return mapped(both, way, params, (context,))


def matching_of(method: str, way: str) -> Program:
    """Rectangular and masked, so that all of the solver is there."""
    masks = array(BATCH, 5, dtype=bool), array(BATCH, 7, dtype=bool)

    def solve(_, cost, rows, columns):
        mask = None if method == "optax" else (rows, columns)
        return matching.matched_cost(cost, matching.assign(cost, mask=mask, method=method))

    return mapped(solve, way, None, (array(BATCH, 5, 7), *masks))


def ranks_of(method: str, n: int) -> Program:
    function = functools.partial(ranks.stable_ranks, method=method)
    return Program(jax.jit(function), (array(2, n, 3),))


def loss_of(loss: Callable) -> Program:
    gradient = jax.grad(lambda sets, target: jnp.sum(loss(sets, target)))
    return Program(jax.jit(gradient), (array(2, 20, 3), array(2, 20, 3)))


def renderer(quality: str, way: str, check: bool = False) -> Program:
    """Scenes drawn and rendered, as many side by side as an accelerator takes."""

    def draw(_, keys):
        return procedural_examples(keys, 16, quality=quality, group=2)

    return mapped(draw, way, None, (keys(BATCH),), check=check)


class Row(NamedTuple):
    make: Callable[[], Program]
    fast: bool = False
    calls: dict[str, set[str]] = {}  # noqa: RUF012 (never written to)


def rows() -> dict[str, Row]:
    """Name -> row; "NAME | WAY" where the way of mapping is part of it."""
    found: dict[str, Row] = {}

    def add(name: str, make: Callable, *arguments: Any, fast=(), calls=None, **settings: Any):
        for way in WAYS:
            found[f"{name} | {way}"] = Row(
                functools.partial(make, *arguments, way, **settings), way in fast, calls or {}
            )

    one, both = ("one device",), WAYS
    for model in ("idspn", "dspn", "slot-attention", "slot-mlp"):
        settings = CLEVR | {"model": model, "inner": INNER}
        idspn = model == "idspn"
        add(f"CLEVR {model}, training", training, "clevr", fast=both if idspn else (), **settings)
        add(
            f"CLEVR {model}, forward",
            clevr_forward,
            fast=one if model == "slot-attention" else (),
            **settings,
        )
        found[f"CLEVR {model}, exported predict"] = Row(
            functools.partial(clevr_predict, **settings), idspn,
            {p: {"shape_assertion"} for p in PLATFORMS},
        )  # fmt: skip
    fresh = CLEVR | {"inner": INNER, "fresh": True, "train_size": None, "render_quality": "fast"}
    add("CLEVR idspn, training on fresh scenes", training, "clevr", **fresh)
    half = CLEVR | {"inner": INNER, "compute_dtype": "bfloat16"}
    add("CLEVR idspn in bfloat16, training", training, "clevr", **half)
    twice = CLEVR | {"inner": INNER, "replicates": 2}
    add("CLEVR idspn, two replicates, training", training, "clevr", **twice)
    for model in ("idspn", "dspn"):
        settings = NUMBERING | {"model": model, "inner": INNER}
        fast = one if model == "idspn" else ()
        add(f"numbering {model}, training", training, "numbering", fast=fast, **settings)
        add(f"numbering {model}, forward", numbering_forward, **settings)
    for model in ("deep-sets", "transformer", "bilstm"):
        make = functools.partial(training, "numbering", "one device", model=model, **NUMBERING)
        found[f"numbering {model}, training | one device"] = Row(make)
    for model in ("idspn", "dspn"):
        settings = SETS | {"model": model, "inner": INNER}
        add(f"random sets {model}, training", training, "random-sets", **settings)
        add(f"random sets {model}, forward", sets_forward, **settings)
    add("digits idspn, training", training, "digits", **TINY, inner=INNER)
    for name in test_composition.OPTIONS:
        dense = name in ("exact", "simplex, exact", "anderson")
        add(f"minimise: {name}", option, name, calls=SOLVES if dense else None,
            fast=one if name in ("identity", "exact") else ())  # fmt: skip
    for method in ("auto", "device"):
        add(f"matching: {method}", matching_of, method, fast=one if method == "auto" else ())
    make = functools.partial(matching_of, "optax", "one device")
    found["matching: optax | one device"] = Row(make)
    for method, n in (("auto", 20), ("auto", 300), ("compare", 80), ("sort", 20)):
        make = functools.partial(ranks_of, method, n)
        found[f"ranks: {method}, n = {n}"] = Row(make, method == "auto")
    for loss in (ms.hungarian_loss, ms.chamfer_loss):
        make = functools.partial(loss_of, loss)
        found[f"{loss.__name__}, gradient"] = Row(make, loss is ms.chamfer_loss)
    add("renderer: fast", renderer, "fast")
    for quality in ("default", "high"):
        make = functools.partial(renderer, quality, "one device")
        found[f"renderer: {quality} | one device"] = Row(make)
    return found


ROWS = rows()


# --- what comes out ---


class Contents(NamedTuple):
    """What a program holds: kinds of operations, calls of native code, functions it came from."""

    operations: collections.Counter
    calls: set[str]
    written_for_cpu: set[str]
    devices: int


def contents(program: Program, platform: str) -> Contents:
    exported = export.export(program.function, platforms=(platform,))(*program.arguments)
    operations: collections.Counter = collections.Counter()
    calls = set()

    def visit(operation: Any) -> ir.WalkResult:
        operations[operation.name] += 1
        if operation.name == "stablehlo.custom_call":
            calls.add(ir.StringAttr(operation.attributes["call_target_name"]).value)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        module.operation.walk(visit)
        # The locations name the functions that every operation came from.
        text = module.operation.get_asm(enable_debug_info=True)
    return Contents(
        operations, calls, {name for name in CPU_ONLY if name in text}, exported.nr_devices
    )


def check(name: str, platform: str, program: Program) -> Contents:
    row = ROWS[name]
    found = contents(program, platform)
    # No Python callback, no library of a CPU, nothing but what is named for the row.
    assert found.calls == row.calls.get(platform, set())
    talk = {"stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv"}
    assert not talk & found.operations.keys()
    assert found.written_for_cpu == set()
    assert found.devices == (DEVICES if "shard_map" in name else 1)
    if "training" in name:
        assert ("stablehlo.all_reduce" in found.operations) == ("shard_map" in name)
        assert "stablehlo.while" in found.operations
    return found


# jaxtyping cannot tell whether shapes of unknown size broadcast.
@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    "name", [n if row.fast else pytest.param(n, marks=pytest.mark.slow) for n, row in ROWS.items()]
)
def test_lowers(name):
    # One program, so that it is traced once.
    program = ROWS[name].make()
    for platform in PLATFORMS:
        check(name, platform, program)


@pytest.mark.parametrize(
    "name", ["ranks: auto, n = 20", "minimise: simplex | one device"], ids=["ranks", "simplex"]
)
def test_a_cpu_has_its_tricks(name):
    """So that `test_lowers` would see them elsewhere."""
    assert contents(ROWS[name].make(), "cpu").written_for_cpu


def test_jax_refuses_a_callback_itself():
    def talks(x):
        return jax.pure_callback(lambda x: x, x, x)

    with pytest.raises(ValueError, match="different from the lowering platform cuda"):
        contents(Program(jax.jit(talks), (array(3),)), "cuda")


# --- what cannot be lowered is refused in words ---


def test_host_matching_is_refused_in_words():
    with pytest.raises(ValueError, match="cost, mask: expected concrete arrays with method='host'"):
        contents(matching_of("host", "one device"), "cuda")


def test_optax_matching_under_shard_map_is_refused_in_words():
    with pytest.raises(ValueError, match=r"method: expected 'device' under jax\.shard_map"):
        contents(matching_of("optax", "shard_map"), "cuda")


def test_renderer_under_shard_map_with_checks_is_refused_in_words():
    with pytest.raises(ValueError, match=r"check_vma: expected jax\.shard_map with check_vma="):
        contents(renderer("fast", "shard_map", check=True), "cuda")


def test_pmap_is_refused_by_export():
    """`jax.export` takes results of `jax.jit` alone; pmap, moreover, needs devices that exist."""
    with pytest.raises(ValueError, match="must be the result of `jit`"):
        export.export(jax.pmap(lambda x: x), platforms=("cuda",))(array(1, 3))


# --- the page ---

HEADER = """\
# What lowers for GPUs and TPUs

Every program below was exported (`jax.export`) for cuda, rocm and tpu on a machine that has none of
them. That shows that it can be written for the platform, with what is listed in it. It does not
show that the platform's compiler takes it, or how fast it runs: nothing here was compiled or run
there.

This page is the output of `python tests/test_lowering.py`, with JAX {version} on {date}. The
tests of that file check the same, but for the sizes.

- A number: it lowers for all three, and this is its size, the number of operations in it (where
  they differ, the largest).
- **one device**, **shard_map**: as it is, or its batch over an abstract mesh of {devices} devices;
  empty: not tried.
- In no program: a Python callback, talk with the host, a call of native code but those named, or
  anything written for a CPU alone:
  {cpu_only}.
- Training is a whole dispatch: a loop of steps with sampling, matching, backward and Adam.

"""
FOOTER = """
## Refused

| what | by whom, in which words |
|---|---|
| `assign(..., method="host")` under `jit` | the library: "{host}" |
| `assign(..., method="optax")` under `shard_map` | the library: "{optax}" |
| the renderer under `shard_map` with its default checks | the library: "{drawn}" |
| `jax.pmap` | `jax.export`: "{pmap}" |

`pmap` also needs as many devices as it maps over, where `shard_map` takes an abstract mesh. So
`--parallel pmap` is tested on CPU devices alone; `--parallel shard-map` does the same.

The renderer draws scenes one by one on a CPU, in groups elsewhere, and chooses by the machine on
which it is traced. To lower it for another, say `group=16`, as is done here.
"""


def words_of(make: Callable[[], Any]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error).split(" but is")[0]
    raise AssertionError("not refused")


def page() -> str:
    cpu_only = ", ".join(f"`{name}`" for name in CPU_ONLY)
    header = HEADER.format(
        version=jax.__version__, date=datetime.date.today(), devices=DEVICES, cpu_only=cpu_only
    )
    cells: dict[str, dict[str, str]] = {}
    calls: dict[str, dict[str, str]] = {}
    for name in ROWS:
        title, _, way = name.partition(" | ")
        way = way or WAYS[0]
        try:
            program = ROWS[name].make()
            found = {platform: check(name, platform, program) for platform in PLATFORMS}
            size = f"{max(sum(each.operations.values()) for each in found.values()):,}"
            native = {platform: ", ".join(sorted(each.calls)) for platform, each in found.items()}
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            size, native = f"**no**: {words}", {}
        cells.setdefault(title, {})[way] = size
        calls.setdefault(title, {}).update(native)
        print(f"{name}: {size}", file=sys.stderr, flush=True)
    rows = []
    for title, sizes in cells.items():
        named = {platform: words for platform, words in calls[title].items() if words}
        same = len(set(named.values())) == 1
        each = "; ".join(f"{platform}: {words}" for platform, words in named.items())
        shown = next(iter(named.values())) if same else each
        rows.append([title, *(sizes.get(way, "") for way in WAYS), shown])
    table = _markdown.table(["program", *WAYS, "calls of native code"], rows)
    host = words_of(lambda: contents(matching_of("host", "one device"), "cuda"))
    pmap = words_of(lambda: export.export(jax.pmap(lambda x: x), platforms=("cuda",))(array(1, 3)))
    optax = words_of(lambda: contents(matching_of("optax", "shard_map"), "cuda"))
    drawn = words_of(lambda: contents(renderer("fast", "shard_map", check=True), "cuda"))
    return header + table + FOOTER.format(host=host, optax=optax, drawn=drawn, pmap=pmap)


if __name__ == "__main__":
    print(page(), end="")
