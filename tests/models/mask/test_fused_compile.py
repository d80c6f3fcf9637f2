"""A mask's kernels compile for a GPU, on machines that have none: Triton brings its own assembler along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.mask.fused.launch import has_triton

ROOT = Path(__file__).resolve().parents[3]
#: Compiled in a process of its own: tests run the kernels by the interpreter, which is chosen when triton is imported.
PROGRAM = '''
import inspect, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.mask.fused import kernels

sizes = dict(MIRRORED=False, TRAINED=True, SQUARE=sys.argv[1] == "0.5", HARD=False, EXPECTED=False, SCALED=True, MOVING=True,
             ADD=True, PARTS=1024, SUB=256, UNITS=32, COLUMNS=64)
kinds = {"parts": "*fp32", "scales": "*fp32", "zeros": "*i32", "out": "*bf16", "seed": "i64"}
whole, made = ("n", "steps", "count", "place", "columns", "across", "width", "units", "entries"), {}
for made_of in ("measure", "write", "scale_gradient", "logit_gradient", "measure_units", "write_units", "gather_units",
                "logit_gradient wide", "adam", "noise"):
    name, _, wide = made_of.partition(" ")
    signature, constants, sizes["WIDE"] = {}, {}, bool(wide)
    for argument in inspect.signature(getattr(kernels, name).fn).parameters:
        if argument in sizes:
            signature[argument], constants[argument] = "constexpr", sizes[argument]
        elif argument in whole:
            signature[argument] = "i32"
        elif argument in ("power", "weight", "beta1", "rest1", "beta2", "rest2", "eps", "decay", "rate", "correction"):
            signature[argument] = "fp32"
        else:
            signature[argument] = kinds.get(argument, "*bf16")
    if name == "noise":
        signature["out"] = "*i16"
    if name.endswith("units"):
        signature |= {key: "*fp32" for key in ("mask", "sums") if key in signature}
    if wide:
        signature |= {"gradient": "*fp32", "delta": "*fp32"}
    source = ASTSource(getattr(kernels, name), signature, constants)
    binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    made[made_of] = {"stages": sorted(binary.asm), "shared": binary.metadata.shared}
print(json.dumps(made))
'''


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("temperature", ["0.5", "0.3"])
def test_they_compile_for_a_gpu(temperature, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM, temperature], capture_output=True, text=True, cwd=ROOT,
                         env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    made = json.loads(run.stdout)
    assert len(made) == 10
    assert all("cubin" in kernel["stages"] and kernel["shared"] <= 64 * 1024 for kernel in made.values())
