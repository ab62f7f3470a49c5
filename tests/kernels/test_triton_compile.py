"""Every kernel compiles ahead of time for the GPUs it is meant for, inside its registers, without one being there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from deltamem_kernels import (  # noqa: E402
    triton_attention,
    triton_backward,
    triton_forward,
    triton_paged,
    triton_products,
    triton_step,
    triton_tiles,
)
from deltamem_kernels.triton_scan import SHAPES, plan_for  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter nothing is compiled"
)

INTEGERS = {
    **dict.fromkeys(("T", "N", "GROUP", "WIDTH", "H", "L", "D", "WINDOW", "page_stride"), "i32"),
    **dict.fromkeys(("n0", "n1", "n2", "n3"), "i32"),
    "scale": "fp32",
    "CAP": "fp32",
}
POINTERS = {
    "query": "*bf16",
    "keys": "*bf16",
    "values": "*bf16",
    "lengths": "*i64",
    "writes": "*i1",
    "page": "*i64",
    "projected": "*bf16",
    "packed": "*bf16",
    "d_packed": "*bf16",
    "mask": "*i1",
    "x": "*bf16",
    "in_proj": "*bf16",
    "out": "*bf16",
    **dict.fromkeys(("w0", "w1", "w2", "w3"), "*bf16"),
}
# Registers per thread at r = 8; a warp per program, so eight programs fit a multiprocessor even at 255.
BUDGET = {
    "transitions_kernel": 168,
    "compose_kernel": 144,
    "starts_kernel": 168,
    "reads_kernel": 208,
    "adjoint_offsets_kernel": 192,
    "gradients_kernel": 255,
}


def kernels(rank: int):
    """(kernel, its compile-time constants, warps), as the launches of triton_scan and triton_step have them."""
    shape, plan = SHAPES[rank], plan_for(8192, rank)
    common = {"R": rank, "LENGTH": plan.length, "GATED": True, "MASKED": True}
    walk = {"R": rank, "ROWS": plan.walked_rows, "AHEAD": shape.ahead}
    rows = {"MATRIX_ROWS": shape.matrix_rows}
    yield triton_forward.transitions_kernel, {**common, **rows, "BLOCK": shape.block}, 1
    yield triton_forward.reads_kernel, {**common, "BLOCK": shape.block}, 1
    yield triton_backward.adjoint_offsets_kernel, {**common, "BLOCK": shape.block}, 1
    yield triton_backward.gradients_kernel, {**common, "BLOCK": shape.gradient_block}, 1
    yield triton_tiles.compose_kernel, {**walk, "MATRIX_ROWS": shape.composed_rows, "ADJOINT": False}, 1
    yield triton_tiles.compose_kernel, {**walk, "MATRIX_ROWS": rank, "ADJOINT": True}, 1
    yield triton_tiles.starts_kernel, {**walk, "ADJOINT": False}, 1
    yield triton_tiles.starts_kernel, {**walk, "ADJOINT": True}, 1
    step = {"H": 2560, "R": rank, "ROWS": rank // 4, "BLOCK": triton_step.block_for(rank), "MASKED": True,
            "CHOSEN": True}  # fmt: skip
    yield triton_step.step_kernel, step, 16
    yield triton_paged.paged_step_kernel, {"R": rank, "CHOSEN": True, "PAGED": True}, 1
    yield triton_step.steer_kernel, {"NR": rank, "BLOCK": triton_step.STEER_BLOCK}, 4
    for width in (2560, 9728):
        products = {"K": width, "ROWS": triton_products.ROWS, "BLOCK": triton_products.BLOCK}
        yield triton_products.products_kernel, products, 4
    for dim in (8, 64, 128):  # narrower heads than a matrix product takes are filled up
        heads = {"D": dim, "WIDTH": triton_attention.width_for(dim), "RUNS": 32}
        constants = {"ROWS": triton_attention.LEAST_ROWS, "BLOCK": triton_attention.BLOCK, "CAPPED": dim == 64}
        yield triton_attention.attend_kernel, {**heads, **constants}, 4
        yield triton_attention.combine_kernel, heads, 4


def compile_for(kernel, constants: dict, warps: int, architecture: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else INTEGERS.get(n) or POINTERS.get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")}
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(
        ASTSource(kernel, types, constants, aligned), target=target, options={"num_warps": warps, "num_stages": 1}
    )


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """What the assembler says a kernel takes: REG, STACK, SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this build of triton comes without cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


@pytest.mark.parametrize(
    ("rank", "architecture"), [(8, 80), (8, 90), (4, 90), (16, 90), (32, 90)], ids=lambda x: str(x)
)
def test_compiles_without_spills(rank, architecture, tmp_path):
    for kernel, constants, warps in kernels(rank):
        compiled = compile_for(kernel, constants, warps, architecture)
        used = resources(compiled.asm["cubin"], tmp_path)
        name = kernel.__name__
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} at r = {rank} on sm_{architecture} spills: {used}"
        if rank == 8:
            assert used["REG"] <= BUDGET.get(name, 255), f"{name} on sm_{architecture}: {used}"


@pytest.mark.parametrize("kernel", ["transitions_kernel", "reads_kernel", "adjoint_offsets_kernel"])
def test_a_lane_sums_without_asking_its_neighbours(kernel):
    """The design rests on this: no shuffle per token, whatever layout the compiler would like better."""
    constants = {f.__name__: (f, c) for f, c, _ in kernels(8)}
    function, compile_time = constants[kernel]
    assembly = compile_for(function, compile_time, 1, 90).asm["ptx"]
    assert assembly.count("shfl.sync") < compile_time["BLOCK"]
