"""Runs NVIDIA's compute-sanitizer over the GPU tests of the kernels, and shows that it would see an overrun.

    python benchmarks/sanitize.py --output benchmarks/results/h200/sanitizer.txt

memcheck, racecheck and initcheck each run every kernel by name on golden cases. Meanwhile JAX
takes its memory from the driver call by call, so that an access past the end of a buffer is one past an allocation.
That this holds is shown first: a kernel writes one float past the end of a JAX array (cupy compiles it), and the run
must fail.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

TESTS = "tests/ops/test_int4pack_mm.py"
# Every kernel by name. memcheck takes ragged n and long sums too; the slower tools take four of the golden cases.
WIDE = "not reference and (test_golden_cases or test_every_n_and_long_sums)"
NARROW = "test_golden_cases and not reference and (n24_k640 or n128_k512 or n32_k256 or n128_k768)"
SELECTIONS = {"memcheck": WIDE, "racecheck": NARROW, "initcheck": NARROW}
FOUND = 9  # compute-sanitizer's exit code where it found something.

OVERRUN = """
import cupy, jax.numpy as jnp
y = jnp.zeros(1024, jnp.float32)
kernel = cupy.RawKernel('extern "C" __global__ void overrun(float* y, int i) { y[i] = 1; }', "overrun")
kernel((1,), (1,), (cupy.uint64(y.unsafe_buffer_pointer()), cupy.int32(1024)))
cupy.cuda.runtime.deviceSynchronize()
"""


def run(tool: str, command: list[str]) -> tuple[int, str]:
    """Exit code and the closing lines of a command under a tool of compute-sanitizer."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "SUMMARY" in line or " passed" in line]
    lines += [line for line in result.stdout.splitlines() if "Invalid" in line or "hazard" in line][:3]
    return result.returncode, "\n".join(f"  {line.strip('= ')}" for line in lines)


def main() -> None:
    """Run the plant and the tools, and write what they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True)
    report = [version.stdout.strip().splitlines()[-1]]

    code, said = run("memcheck", ["-c", OVERRUN])
    report.append(f"planted overrun of a JAX array, memcheck: {'caught' if code == FOUND else 'NOT CAUGHT'}\n{said}")
    failed = code != FOUND
    for tool, selection in SELECTIONS.items():
        code, said = run(tool, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", TESTS, "-k", selection])
        verdict = "clean" if code == 0 else f"exit code {code}"
        report.append(f"{tool} over {TESTS} -k '{selection}': {verdict}\n{said}")
        failed |= code != 0
        print(report[-1], flush=True)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n\n".join(report) + "\n")
    print("\n\n".join(report))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
