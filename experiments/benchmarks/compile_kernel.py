"""Compile the matching kernel for an NVIDIA GPU that need not be here, and say what came out.

Needs Triton beside JAX (``pip install triton``): Pallas makes Triton's program, Triton the machine
code. Run as: python experiments/benchmarks/compile_kernel.py [--n 64] [--capability 90]
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import triton
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxlib.mlir import ir
from jaxlib.triton import dialect
from triton.backends.compiler import GPUTarget

from msdspn_jax.matching.kernel import shortest_augmenting_paths


def triton_program(n: int) -> str:
    """What Pallas makes of the kernel for sets of n, as text."""
    device = AbstractDevice("NVIDIA H100", None, "cuda")
    mesh = AbstractMesh((1,), ("sets",), (AxisType.Explicit,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(shortest_augmenting_paths).trace(
            jax.ShapeDtypeStruct((128, n, n), "float32")
        )
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mhlo.backend_config" in op.attributes:
            found.append(op.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    with ir.Context() as context:
        dialect.register_dialect(context)
        return str(ir.Module.parse(found[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--capability", type=int, default=90)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ttir"
        source.write_text(triton_program(options.n))
        kernel = triton.compile(
            str(source),
            target=GPUTarget("cuda", options.capability, 32),
            options={"num_warps": 1, "num_stages": 1},
        )
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        usage = subprocess.check_output(
            [tools / "cuobjdump", "--dump-resource-usage", binary], text=True
        )
        code = subprocess.check_output([tools / "nvdisasm", "-c", binary], text=True)
    print(re.search(r"REG:.*", usage).group())
    print("barriers:", code.count("BAR.SYNC"), " shuffles:", code.count("SHFL.BFLY"))


if __name__ == "__main__":
    main()
