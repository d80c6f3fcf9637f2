"""The kernels compile for a GPU, on machines that have none: Triton brings its own assembler along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.moe.kernel_sum import _triton

ROOT = Path(__file__).resolve().parents[3]
#: Compiled in a process of its own: tests run the kernels by the interpreter, which is chosen when triton is imported.
PROGRAM = '''
import inspect, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.moe import kernels

name, dropout, capability = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
kernel = getattr(kernels, name)
sizes = dict(SLOTS=2, SLOTSP=16, R=16, ER=48, ERP=64, Q=16, EQ=48, EQP=64, DROPPED=8, ACT="silu", HAS_MASK=dropout, BM=32,
             BF=64, KC=64, WIDE=False, FROZEN=8, TR=24, TRP=32, FROZEN_A=8, TQ=24, TQP=32)
numbers = {"stride_gate", "stride_up", "stride_z", "stride_mixed", "tokens", "f", "tiles", "blocks"}
others = {"weights": "*fp32", "chosen": "*i64", **dict.fromkeys(
    ("parts", "parts_z", "parts_w", "parts_gate", "parts_up", "parts_a"), "*fp32")}
signature, constants = {}, {}
for argument in inspect.signature(kernel.fn).parameters:
    if argument in sizes:
        signature[argument], constants[argument] = "constexpr", sizes[argument]
    else:
        signature[argument] = "i32" if argument in numbers else others.get(argument, "*bf16")
made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
print(json.dumps({"stages": sorted(made.asm), "shared": made.metadata.shared, "dots": made.asm["ttgir"].count("dot")}))
'''


@pytest.mark.skipif(not _triton(), reason="Triton is not installed")
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "backward_tokens", "backward_factors"])
def test_compiles_for_a_gpu(kernel, dropout, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM, kernel, str(dropout), "90"], capture_output=True,
                         text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    made = json.loads(run.stdout)
    assert "cubin" in made["stages"]
    # an H100 gives a program 228 KB, an A100 164
    assert made["shared"] <= 160 * 1024
    assert made["dots"] >= 3
