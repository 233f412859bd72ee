"""Runs NVIDIA's compute-sanitizer over the GPU tests of the kernels, and shows that it would see an overrun.

    python benchmarks/sanitize.py --output benchmarks/results/h200/sanitizer.txt

memcheck, racecheck and initcheck each run every kernel by name on golden cases and on a batch of weights, memcheck also
with results in f32, and memcheck and initcheck the kernel of dequantize, which has no shared memory for racecheck to
watch; all at the same time. JAX takes its memory from cudaMallocAsync, whose allocations the tools know to the byte, so
that an access past the end of a buffer is one past an allocation. That this holds is shown first: a kernel writes one
float past the end of a JAX array (cupy compiles it), and the run must fail.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys

PRODUCTS = "tests/ops/test_int4pack_mm.py"
# Every kernel by name, and a Hopper tile whose last tiles are divided by rows. memcheck takes ragged n, long sums and
# results in f32 too; the slower tools take four of the golden cases.
ALSO = "(test_a_last_wave_of_few_tiles and 128x48 and bfloat16) or (test_a_batch_of_weights and bfloat16 and own)"
WIDE = f"not reference and (test_golden_cases or test_every_n_and_long_sums or {ALSO})"
FOUR = "n24_k640 or n128_k512 or n32_k256 or n128_k768"
NARROW = f"not reference and ((test_golden_cases and ({FOUR})) or {ALSO})"
WEIGHTS = "tests/ops/test_dequantize.py"
SMALL = "cuda_kernel and not 2_to_the_31"
RUNS = (
    ("memcheck", PRODUCTS, WIDE),
    ("memcheck", PRODUCTS, "test_a_result_in_f32 and bfloat16"),
    ("racecheck", PRODUCTS, NARROW),
    ("initcheck", PRODUCTS, NARROW),
    ("memcheck", WEIGHTS, SMALL),
    ("initcheck", WEIGHTS, SMALL),
)
FOUND = 9  # compute-sanitizer's exit code where it found something.

# Writes one float `past` bytes beyond the end of a JAX array of 4 KiB.
OVERRUN = """
import sys
import cupy, jax.numpy as jnp
y = jnp.zeros(1024, jnp.float32)
y.block_until_ready()
kernel = cupy.RawKernel('extern "C" __global__ void overrun(char* y, long long i) { *(float*)(y + i) = 1; }', "overrun")
kernel((1,), (1,), (cupy.uint64(y.unsafe_buffer_pointer()), cupy.int64(y.nbytes + int(sys.argv[1]))))
cupy.cuda.runtime.deviceSynchronize()
print("the overrun was written and nobody saw it")
"""
PAST = (0, 2 << 20)  # Right behind the array, and behind what JAX's "platform" allocator maps for it.


def run(tool: str, command: list[str]) -> tuple[int, str]:
    """Exit code and what matters of the output of a command under a tool of compute-sanitizer."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    lines = (result.stdout + result.stderr).splitlines()
    kept = [line for line in lines if "SUMMARY" in line or " passed" in line or "nobody saw" in line]
    # A finding is several lines: the first ones say what it is, and which two accesses a hazard is between.
    findings = [i for i, line in enumerate(lines) if "Invalid" in line or "Race reported" in line]
    for i in findings[:3]:
        kept += lines[i : i + 4]
    if result.returncode not in (0, FOUND):
        kept += lines[-5:]
    return result.returncode, "\n".join(f"  {line.strip('= ')}" for line in kept)


def main() -> None:
    """Run the plant and the tools, and write what they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True)
    report = [version.stdout.strip().splitlines()[-1]]

    failed = False
    for past in PAST:
        code, said = run("memcheck", ["-c", OVERRUN, str(past)])
        verdict = "caught" if code == FOUND else f"NOT CAUGHT (exit code {code})"
        report.append(f"planted overrun of a JAX array, {past} bytes past its end, memcheck: {verdict}\n{said}")
        failed |= code != FOUND

    def run_tests(tool: str, tests: str, selection: str) -> tuple[int, str]:
        return run(tool, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", tests, "-k", selection])

    with concurrent.futures.ThreadPoolExecutor(len(RUNS)) as pool:
        done = list(pool.map(run_tests, *zip(*RUNS, strict=True)))
    for (tool, tests, selection), (code, said) in zip(RUNS, done, strict=True):
        verdict = "clean" if code == 0 else f"exit code {code}"
        report.append(f"{tool} over {tests} -k '{selection}': {verdict}\n{said}")
        failed |= code != 0
        print(report[-1], flush=True)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n\n".join(report) + "\n")
    print("\n\n".join(report))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
