#!/usr/bin/env python3
"""Counts what nvcc makes of kernels/: SASS instructions, registers, spills; a table, and a gate against it.

    benches/sass.py                              print the table
    benches/sass.py --write benches/results      write sass-<date>.md and sass-<date>.json there
    benches/sass.py --check FILE.json            fail (1) where a figure is worse than in FILE or over a limit
    benches/sass.py --targets sm_90a,...         only these
    benches/sass.py --save FILE.json             keep what was measured
    benches/sass.py --measured FILE.json         take it from there and compile nothing

No GPU is needed. Each file is compiled to one cubin per target and read with cuobjdump. `sass` is the static
number of instructions without NOPs, functions called included; `local` those among them that touch local
memory (spills and stack arrays). Exit: 0 good, 1 worse, 2 bad request, 77 no compiler (a line says why).

nvcc is looked for as build.rs does: --nvcc, $CUDA_HOME/bin, PATH, pip's wheels; cuobjdump beside it or on
PATH. When a kernel becomes better, or has to become larger, write the table anew and say why in the commit.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["sm_80", "sm_90a", "sm_100a"]
# The target that limits and the comparison with peers speak of.
JUDGED = "sm_90a"
SOURCES = ["kernels/src/dispatch.cu", "kernels/src/combine.cu", "kernels/src/post.cu",
           "kernels/src/expert.cu", "benches/sass_probe.cu"]
# As build.rs passes them.
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Ikernels/include"]
SKIPPED = 77

# Figures in which smaller is better, and what each is called in the table.
FIGURES = {"registers": "registers", "spill_store": "spill st B", "spill_load": "spill ld B",
           "stack": "stack B", "local": "local", "sass": "SASS"}

# What must hold on JUDGED, whatever was measured before. kernel -> {figure: largest value}.
POST = {"registers": 32, "spill_store": 0, "spill_load": 0, "cas": 0}
HEAVY = {"registers": 64, "spill_store": 0, "spill_load": 0}
LIMITS = {
    "probe_wqe": POST | {"sass": 90},
    "probe_post_one": POST | {"sass": 130},
    "probe_post_warp": POST | {"sass": 130},
    "probe_signal": POST | {"sass": 130},
    "dispatch_bf16": HEAVY,
    "dispatch_fp8": HEAVY,
    "combine_exact": HEAVY,
    "combine_reduced": HEAVY,
    "post": POST,
    # Payload moves 16 bytes at a time, never less.
    "probe_copy": {"narrow": 0},
}
# Holds for every kernel: no load through the non-coherent path, for peers write what we read.
EVERYWHERE = {"non_coherent": 0}

# Public kernels, measured once with the same flags and the same way of counting: sm_90, hidden 7168.
PEERS = [
    ("post, one WRITE", "Mooncake EP", 120, 24, "0/0"),
    ("post, one WRITE", "DeepEP V1, one thread", 148, 29, "0/0"),
    ("post, one WRITE", "DeepEP V1, whole warp", 321, 32, "0/0"),
    ("post, one WRITE", "DOCA GPUNetIO in NCCL GIN, exclusive", 369, 35, "0/0"),
    ("post, one WRITE", "NVSHMEM", 3796, 64, "0/0"),
    ("dispatch fp8", "DeepEP", 2263, 64, "28/32"),
    ("dispatch bf16", "DeepEP", 2129, 62, "0/0"),
    ("dispatch fp8", "Mooncake", 2079, 64, "0/0"),
    ("dispatch bf16", "Mooncake", 1789, 64, "0/0"),
    ("combine", "DeepEP", 2945, 56, "0/0"),
    ("combine", "Mooncake", 1721, 64, "8/8"),
]


def find_nvcc(given):
    """The compiler, or a sentence that says why there is none."""
    if given:
        return (Path(given), None) if Path(given).is_file() else (None, f"{given} is no file")
    dirs = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    dirs += [Path(d) for d in os.environ.get("PATH", "").split(os.pathsep) if d]
    dirs += [Path(d, "nvidia/cu13/bin") for d in site.getsitepackages() + [site.getusersitepackages()]]
    found = [d / "nvcc" for d in dirs if (d / "nvcc").is_file()]
    return (found[0], None) if found else (None, "no nvcc found")


def find_cuobjdump(nvcc):
    beside = nvcc.with_name("cuobjdump")
    found = str(beside) if beside.is_file() else shutil.which("cuobjdump")
    return (found, None) if found else (None, "no cuobjdump found")


def run(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


STACK_AND_SPILLS = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"


def resources(log):
    """kernel -> registers and bytes, from ptxas -v. Functions that a kernel calls count towards its bytes."""
    out, kernel = {}, None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function 'ibex_(\w+)'", line):
            kernel = out.setdefault(m[1], {"registers": 0, "spill_store": 0, "spill_load": 0, "stack": 0})
        elif m := re.search(STACK_AND_SPILLS, line):
            for figure, bytes_ in zip(("stack", "spill_store", "spill_load"), m.groups()):
                kernel[figure] += int(bytes_)
        elif m := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(m[1])
    return out


def instructions(sass):
    """kernel -> opcodes with their modifiers, one per instruction, without NOPs."""
    out, kernel = {}, None
    for line in sass.splitlines():
        if m := re.search(r"Function : ibex_(\w+)", line):
            kernel = out.setdefault(m[1], [])
        elif kernel is not None:
            m = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
            if m and not m[1].startswith("NOP"):
                kernel.append(m[1])
    return out


def count(opcodes, pattern):
    return sum(1 for opcode in opcodes if re.search(pattern, opcode))


def figures(opcodes):
    return {
        "sass": len(opcodes),
        "local": count(opcodes, r"^(LDL|STL)"),
        "cas": count(opcodes, r"^ATOM\w*\..*CAS"),
        "non_coherent": count(opcodes, r"^LDG\..*CONSTANT"),
        "narrow": count(opcodes, r"^(LDG|STG)(?!.*\.128)"),
        "sleeps": count(opcodes, r"^NANOSLEEP"),
    }


def measure_one(nvcc, cuobjdump, scratch, source, target):
    cubin = Path(scratch, f"{Path(source).stem}.{target}.cubin")
    arch = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    log = run([nvcc, *FLAGS, arch, "-Xptxas", "-v", "-cubin", "-o", cubin, source])
    counted = instructions(run([cuobjdump, "-sass", cubin]))
    return {kernel: bytes_ | figures(counted[kernel]) for kernel, bytes_ in resources(log).items()}


def measure(nvcc, cuobjdump, targets):
    """target -> kernel -> figures."""
    jobs = [(source, target) for target in targets for source in SOURCES]
    out = {target: {} for target in targets}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: measure_one(nvcc, cuobjdump, scratch, *job), jobs)
        for (_, target), result in zip(jobs, results):
            out[target] |= result
    return out


def provenance(nvcc):
    release = re.search(r"V([\d.]+)", run([nvcc, "--version"]))
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"nvcc": release[1] if release else "unknown", "flags": " ".join(FLAGS),
            "commit": git.stdout.strip() or "unknown", "date": datetime.date.today().isoformat()}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown(report):
    p = report["provenance"]
    text = f"# SASS of the kernels\n\n`benches/sass.py`, {p['date']}, commit {p['commit']}, "
    text += f"nvcc {p['nvcc']}, `{p['flags']}`.\n"
    text += "Static instructions without NOPs; `local`: those that touch local memory.\n"
    for target, kernels in report["targets"].items():
        head = [target, *FIGURES.values(), "CAS", "limit"]
        rows = []
        for kernel, f in kernels.items():
            limits = LIMITS.get(kernel, {}) if target == JUDGED else {}
            shown = [(figure, limit) for figure, limit in limits.items() if limit or figure == "cas"]
            said = ", ".join(f"{figure} <= {limit}" for figure, limit in shown)
            rows.append([f"`{kernel}`", *(f[figure] for figure in FIGURES), f["cas"], said])
        text += "\n" + table(head, rows)
    text += "\nPeers (sm_90, whole wrapper kernel, hidden 7168 compiled in, same way of counting). "
    text += "Theirs know no credits,\ndeadlines, faults, losses, member tables or signal modes, "
    text += "and take their shape at compile time.\n\n"
    rows = [[what, who, sass, registers, spill] for what, who, sass, registers, spill in PEERS]
    return text + table(["kernel", "peer", "SASS", "registers", "spill st/ld B"], rows)


def violations(report, committed):
    """Sentences, one per figure that is over a limit or worse than committed."""
    out = []
    for target, kernels in report["targets"].items():
        for kernel, f in kernels.items():
            limits = EVERYWHERE | (LIMITS.get(kernel, {}) if target == JUDGED else {})
            for figure, limit in limits.items():
                if f[figure] > limit:
                    out.append(f"{target} {kernel}: {figure} {f[figure]}, limit {limit}")
    if report["provenance"]["nvcc"] != committed["provenance"]["nvcc"]:
        print(f"SKIPPED: comparison with nvcc {committed['provenance']['nvcc']} figures: this is "
              f"{report['provenance']['nvcc']}")
        return out
    for target, measured in report["targets"].items():
        for kernel, before in committed["targets"][target].items():
            now = measured.get(kernel)
            if now is None:
                out.append(f"{target} {kernel}: committed, but not measured")
                continue
            worse = [figure for figure in FIGURES if now[figure] > before[figure]]
            for figure in worse:
                out.append(f"{target} {kernel}: {figure} {now[figure]}, committed {before[figure]}")
    return out


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", metavar="FILE")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="sm_X,...")
    parser.add_argument("--write", metavar="DIR")
    parser.add_argument("--save", metavar="FILE")
    parser.add_argument("--check", metavar="FILE")
    parser.add_argument("--measured", metavar="FILE")
    return parser.parse_args()


def obtain(args):
    if args.measured:
        return json.loads(Path(args.measured).read_text())
    nvcc, why = find_nvcc(args.nvcc)
    cuobjdump, why = find_cuobjdump(nvcc) if nvcc else (None, why)
    if why:
        print(f"SKIPPED: {why}")
        sys.exit(SKIPPED)
    return {"provenance": provenance(nvcc), "targets": measure(nvcc, cuobjdump, args.targets.split(","))}


def reject_unknown(report):
    """A limit that names no kernel guards nothing."""
    missing = set(LIMITS) - set(report["targets"].get(JUDGED, LIMITS))
    if missing:
        sys.exit(f"limits for kernels that do not exist: {', '.join(sorted(missing))}")


def main():
    args = arguments()
    report = obtain(args)
    reject_unknown(report)
    as_json = json.dumps(report, indent=1) + "\n"
    if args.save:
        Path(args.save).write_text(as_json)
    if args.write:
        stem = Path(args.write, f"sass-{report['provenance']['date']}")
        stem.with_suffix(".json").write_text(as_json)
        stem.with_suffix(".md").write_text(markdown(report))
    if args.check:
        found = violations(report, json.loads(Path(args.check).read_text()))
        print("\n".join(found) or "no figure is worse than committed, none over its limit")
        if found:
            print("for a good reason? benches/sass.py --write benches/results, and say why in the commit")
        sys.exit(1 if found else 0)
    print(markdown(report))


if __name__ == "__main__":
    main()
