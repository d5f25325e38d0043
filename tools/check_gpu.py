"""See what works on this GPU: one command, one table. The first thing to run on a new machine.

    python tools/check_gpu.py                     under 8 minutes on one card
    python tools/check_gpu.py                     once more: only the rows that have not passed
    python tools/check_gpu.py --rows versions triton-neurons
    python tools/check_gpu.py --device cpu        a rehearsal without a GPU: small, and it shows nothing about one

Every row runs in a process of its own, so that a row that fails, hangs or crashes does not stop the others. The
results are in results.json in the output directory, and what each row printed is in a text file next to it. The last
line says what works. The exit code is 1 where a row failed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(ROOT))

__all__ = ["ROWS", "main"]

SCRIPTS = {
    "dvs128": "vgg8_dvs128_SMA.py",
    "cifar10dvs": "vgg8_cifar10dvs_SMA.py",
    "ncaltech101": "vgg8_NCaltech101_SMA.py",
    "imagenet": "train_amp.py",
}
# Percent that the demo must reach: .ci/run promises the first two; above the linear classifier of tests/test_demo.py.
PROMISED = {"dvs128": 77.0, "imagenet": 90.0, "cifar10dvs": 57.0, "ncaltech101": 57.0}
TINY = ["--epochs", "1", "--width", "0.125", "--RCR", "4"]  # of a rehearsal: it learns nothing


@dataclass(frozen=True)
class Setting:
    """Where a row runs, and its folder."""

    device: str
    folder: Path

    @property
    def rehearses(self) -> bool:
        return self.device == "cpu"

    @property
    def tiny(self) -> list[str]:
        return TINY if self.rehearses else []

    @property
    def fp16(self) -> str:
        return "bf16" if self.rehearses else "fp16"  # the scripts have no fp16 on a CPU

    def run(self, *command: object) -> str:
        """What a program of the repository printed.

        Raises:
            RuntimeError: it ended with another code than 0; the message has the end of what it printed.
        """
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="\n")
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {' '.join((done.stderr or done.stdout).split())[-300:]}")
        return done.stdout

    def command(self, name: str, output: Path) -> list[object]:
        """The demo of a script; all runs of one share their data, which take half a minute to make."""
        data = self.folder / f"data_{name}"
        data.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "demo_data").exists():
            (output / "demo_data").symlink_to(data, target_is_directory=True)
        return [SCRIPTS[name], "--demo", "--device", self.device, "--output-dir", output]

    def demo(self, name: str, output: Path, *flags: object) -> dict[str, Any]:
        """Run the demo of a script; what its ``evaluation.json`` has."""
        self.run(*self.command(name, output), *self.tiny, *flags)
        return json.loads((output / "evaluation.json").read_text())


class NotHereError(Exception):
    """A row that this machine cannot have; the message says why."""


# Rows: each takes the setting and returns words for the table. An error is a row that failed. -------------------------


def versions(here: Setting) -> str:
    """Libraries, driver and compilers."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[^\w-]", line)[0] for line in lines if re.match(r"\w", line)]
    found, missing = {}, []
    for name in [*names, "triton"]:
        others = [f"cupy-cuda{n}x" for n in (11, 12, 13)] + ["cupy"] if name.startswith("cupy") else [name]
        try:
            found[name] = next(v for v in map(_version, others) if v)
        except StopIteration:
            missing.append(name)
    words = [f"{name} {found[name]}" for name in ("torch", "spikingjelly", "triton") if name in found]
    words += [f"CuPy {version}" for name, version in found.items() if name.startswith("cupy")]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h, which Triton needs (python3-dev)")
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        missing.append("a C compiler, which Triton needs (gcc)")
    import torch

    if not here.rehearses:
        properties = torch.cuda.get_device_properties(0)
        words.insert(0, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        words.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, driver {_driver()}")
        torch.ones(1, device="cuda").item()
    necessary = [name for name in missing if not name.startswith(("cupy", "triton", "Python.h", "a C compiler"))]
    if necessary:
        raise RuntimeError(f"missing: {', '.join(missing)}; pip install -r requirements.txt")
    return ", ".join(words) + (f"; missing: {', '.join(missing)}" if missing else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


SHAPES = [(3, 2, 5, 6, 7), (1, 1, 1, 1, 1), (2, 1, 66, 3, 17), (16, 2, 128, 32, 32)]  # the last on a GPU only


def sma_kernels(dtype: str, here: Setting) -> str:
    """The Triton kernels of SMA against PyTorch."""
    import torch

    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise NotHereError(f"{error}: SMA runs in PyTorch") from error
    from models.fast.dispatch import compare_kernels

    shapes = SHAPES[:2] if here.rehearses else SHAPES
    for shape, channels_last in product(shapes, (False, True)):
        try:
            with torch.no_grad():
                compare_kernels(torch.device(here.device), getattr(torch, dtype), channels_last, shape)
        except RuntimeError as error:
            raise RuntimeError(
                f"{list(shape)}, {'channels-last' if channels_last else 'contiguous'}: {error}"
            ) from error
    return f"{2 * len(shapes)} shapes and layouts agree"


def neurons(backend: str, here: Setting) -> str:
    """Neurons of a backend against a reference in float32, potentials near the threshold left out."""
    import torch

    from models.neurons import lif, ms_lif, select_backend, spikingjelly_version

    if backend == "cupy" and not spikingjelly_version().startswith("0.0.0.0"):
        raise NotHereError(f"SpikingJelly {spikingjelly_version()} has no CuPy code")
    device, count, worst = torch.device(here.device), 0, 0.0
    if backend == "cupy" and here.rehearses:
        raise NotHereError("CuPy needs a CUDA GPU")
    for kind, dtype, shape, layout in product(
        (lif, ms_lif),
        (torch.float32, torch.float16, torch.bfloat16),
        SHAPES[:2] if here.rehearses else SHAPES,
        ("contiguous", "channels-last"),
    ):
        node, reference = kind(), kind()
        select_backend(node, backend, device)
        generator = torch.Generator().manual_seed(0)
        x = (1 + torch.randn(shape, generator=generator)).to(dtype)
        if layout == "channels-last":
            x = x.movedim(2, 4).contiguous().movedim(4, 2)
        near, v = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[1:])
        for t, charge in enumerate(x.float()):
            u = v + (charge - v) / 2 if kind is lif else v / 4 + charge
            near[t:] |= (u - node.v_threshold).abs() < 0.02  # also what follows
            v = u * (u < node.v_threshold)
        results = []
        for one, given in ((reference, x.float()), (node, x.to(device))):
            given.requires_grad_()
            spikes = one(given)
            spikes.float().sum().backward()
            assert given.grad is not None
            results.append((spikes.detach().float().cpu(), given.grad.float().cpu()))
        where = f"{kind.__name__}, {dtype}, {list(shape)}, {layout}"
        wrong = int(((results[0][0] != results[1][0]) & ~near).sum())
        if wrong:
            raise RuntimeError(f"{wrong} spikes differ ({where})")
        clear = ~near.any(0)
        difference = (results[0][1] - results[1][1]).abs()[:, clear]
        worst = max(worst, difference.max().item() if difference.numel() else 0.0)
        if worst > 0.05:
            raise RuntimeError(f"gradients differ by {worst:.2g} ({where})")
        count += 1
    return f"{count} cases agree, gradients within {worst:.1g}"


def demo(name: str, amp: str, here: Setting) -> str:
    """Train the demo to the accuracy that it promises."""
    output = here.folder / f"demo_{name}_{amp}"
    shutil.rmtree(output, ignore_errors=True)
    used = here.fp16 if amp == "fp16" else amp
    found = here.demo(name, output, "--amp", used)
    with (output / "metrics.csv").open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    if found["acc1"] < PROMISED[name] and not here.rehearses:
        raise RuntimeError(f"{found['acc1']:.2f} % correct, and {PROMISED[name]:g} % is promised")
    each = sorted(seconds)[len(seconds) // 2]
    return f"{used}: {found['acc1']:.2f} % of {found['count']} after {len(seconds)} epoch(s) of {each:.1f} s"


def evaluation(here: Setting) -> str:
    """Evaluation on the GPU gives the CPU's counts. TF32, which rounds products, is off for that."""
    words = []
    for name in ("dvs128", "imagenet"):
        weights = here.folder / f"demo_{name}_fp16" / "last.pt"
        if not weights.exists():
            raise RuntimeError(f"the weights of row demo-{name}-fp16 are missing; run that row first")
        counts = {}
        ways = [("cpu", "cpu", "--no-tf32"), (f"here ({here.device})", here.device, "--no-tf32")]
        ways += [] if here.rehearses else [("here with TF32", here.device, "--tf32")]
        for where, device, tf32 in ways:
            output = here.folder / f"evaluation_{name}"
            here.run(*here.command(name, output), "--device", device, tf32, "--evaluate", "--weights", weights)
            counts[where] = json.loads((output / "evaluation.json").read_text())["correct"]
        if counts["cpu"] != counts[f"here ({here.device})"]:
            raise RuntimeError(f"{name}: {counts}")
        words.append(f"{name}: {', '.join(f'{where} {n}' for where, n in counts.items())}")
    return "; ".join(words) + " correct"


def resume(here: Setting) -> str:
    """With ``--deterministic`` the same bits twice, and after kill -9 and the same command once more."""
    import torch

    flags = ["--deterministic", "--amp", here.fp16, "--epochs", "2" if here.rehearses else "3"]
    weights = {}
    for way in ("first", "second", "killed"):
        output = here.folder / f"resume_{way}"
        shutil.rmtree(output, ignore_errors=True)
        if way == "killed":
            _kill_after_an_epoch(here, output, flags)
        here.demo("dvs128", output, *flags)
        weights[way] = torch.load(output / "last.pt", map_location="cpu", weights_only=True)["model"]
    same = {
        way: all(torch.equal(value, weights["first"][name]) for name, value in weights[way].items())
        for way in ("second", "killed")
    }
    if not same["second"]:
        raise RuntimeError("two runs with --deterministic end with different weights")
    if not same["killed"]:
        raise RuntimeError("a run that was killed and continued ends with other weights")
    return "two runs, and one killed after an epoch and continued, end with the same bits"


def _kill_after_an_epoch(here: Setting, output: Path, flags: list[str]) -> None:
    command = [sys.executable, *map(str, here.command("dvs128", output)), *here.tiny, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (output / "last.pt").exists():
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    if process.returncode == 0:
        raise RuntimeError("the run ended before it could be killed")


def processes(here: Setting) -> str:
    """Several processes under torchrun (on one GPU: one), with DDP, SyncBN and the exchange of both groups."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from models import sma_ms_resnet18
    from models.neurons import reset_net, select_backend

    count = 2 if here.rehearses else min(2, torch.cuda.device_count())
    output = here.folder / "processes"
    shutil.rmtree(output, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    here.run(*launcher, *here.command("imagenet", output), *here.tiny, "--epochs", "1")
    found = json.loads((output / "evaluation.json").read_text())
    device = torch.device(here.device)
    backend = "gloo" if here.rehearses else "nccl"
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        net = sma_ms_resnet18(T=2, width=0.25, num_classes=6).to(device)
        if not here.rehearses:
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        select_backend(net, "auto", device)
        trained = DistributedDataParallel(net)
        with torch.autocast(device.type, torch.float16 if not here.rehearses else torch.bfloat16):
            loss = trained(torch.randn(4, 3, 48, 48, device=device)).float().square().mean()
        loss.backward()
        reset_net(net)
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if not all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters()) or total.item() != 1:
            raise RuntimeError("a parameter is without a finite gradient under DDP")
    finally:
        dist.destroy_process_group()
    return f"{count} process(es) of {backend}, {found['count']} samples evaluated; DDP with {backend} trains"


def benchmark(here: Setting) -> str:
    """Throughput, memory and share of the matrix peak, by tools/benchmark.py."""
    path = here.folder / "benchmark.json"
    small = ["-net", "block", "-T", "4", "--image-size", "32", "-b", "1", "--runs", "1"]
    full = ["-net", "dvs128", "resnet18", "--amp", "fp16", "--runs", "5"]
    forms = ["--forms", "SMA", "SMA, direct"]
    here.run("tools/benchmark.py", "model", *(small if here.rehearses else full), *forms, "--device", here.device,
             "--json", path)  # fmt: skip
    words = []
    for row in json.loads(path.read_text())["rows"]:
        figures = [f"{key} {row[key]:.3g}" for key in ("seconds", "x direct", "peak GiB", "share of matrix peak")
                   if isinstance(row.get(key), float)]  # fmt: skip
        if row.get("form") == "SMA":
            words.append(f"{row['subject']}, {row['pass']}: {', '.join(figures)}")
    return "; ".join(words)


# Name: what runs, and the seconds that it may take.
ROWS: dict[str, tuple[Callable[[Setting], str], float]] = {
    "versions": (versions, 60),
    **{f"sma-kernels-{dtype}": (partial(sma_kernels, dtype), 120) for dtype in ("float32", "float16", "bfloat16")},
    "triton-neurons": (partial(neurons, "triton"), 120),
    "cupy-neurons": (partial(neurons, "cupy"), 120),
    **{f"demo-{name}-{amp}": (partial(demo, name, amp), 240) for name, amp in product(SCRIPTS, ("fp16", "bf16"))},
    "evaluation": (evaluation, 120),
    "resume": (resume, 180),
    "processes": (processes, 120),
    "benchmark": (benchmark, 240),
}


def _run_row(name: str, here: Setting) -> None:
    """In a process of its own: run a row and leave its result in ``<name>.json``."""
    here.folder.mkdir(parents=True, exist_ok=True)
    try:
        state, words = "ok", ROWS[name][0](here)
    except NotHereError as error:
        state, words = "not here", str(error)
    except Exception as error:  # whatever it is, it is the row's result
        traceback.print_exc()
        state, words = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    (here.folder / f"{name}.json").write_text(json.dumps({"state": state, "words": words}))


def _start_row(name: str, here: Setting, limit: float) -> dict[str, Any]:
    """Run a row in a process of its own; its state, words and seconds."""
    result = here.folder / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--row", name, "--device", here.device, "--output-dir", str(here.folder)]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if here.rehearses else {})}
    began = time.monotonic()
    with (here.folder / f"{name}.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # with the scripts that it started
                process.wait()
    seconds = round(time.monotonic() - began, 1)
    if result.exists():
        return {**json.loads(result.read_text()), "seconds": seconds}
    why = f"ended with {process.returncode}" if seconds < limit else f"not ready after {limit:g} s"
    return {"state": "failed", "words": f"{why}; see {name}.txt", "seconds": seconds}


def _state() -> dict[str, str]:
    """What a result is a result of: this code and the libraries."""
    digest = hashlib.sha256()
    files = [
        *ROOT.glob("*.py"),
        *(path for wing in ("models", "tools", "utils") for path in (ROOT / wing).rglob("*.py")),
    ]
    for path in sorted(files):
        digest.update(path.read_bytes())
    found = {name: _version(name) or "missing" for name in ("torch", "triton", "spikingjelly")}
    return {"code": digest.hexdigest()[:12], **found}


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal (default: cuda)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"only these of {', '.join(ROWS)}")
    parser.add_argument("--again", action="store_true", help="also the rows that have passed")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds that a row may take (default: its own)")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M",
                        help="begin no row after so many (default: 8)")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: output/check_gpu or ..._cpu")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the rows, print the table; 1 where one failed."""
    args = make_parser().parse_args()
    folder = args.output_dir or ROOT / "output" / f"check_{'gpu' if args.device == 'cuda' else 'cpu'}"
    here = Setting(args.device, folder.resolve())
    if args.row:
        _run_row(args.row, here)
        return 0
    here.folder.mkdir(parents=True, exist_ok=True)
    path, began = here.folder / "results.json", time.monotonic()
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("of") != (state := _state()):
        results = {"of": state}  # another version of this code or of a library: nothing has passed
    chosen = args.rows or list(ROWS)
    for name in chosen:
        old = results.get(name, {})
        if old.get("state") == "ok" and not args.again:
            print(f"{name:<22} ok        before   {old['words']}", flush=True)
            continue
        if time.monotonic() - began > 60 * args.minutes:
            results[name] = {"state": "not run", "words": "no time left; run the command again", "seconds": 0.0}
        else:
            results[name] = _start_row(name, here, args.limit or ROWS[name][1])
        one = results[name]
        print(f"{name:<22} {one['state']:<8} {one['seconds']:6.1f} s  {one['words']}", flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    states = {state: [name for name in chosen if results[name]["state"] == state]
              for state in ("ok", "failed", "not here", "not run")}  # fmt: skip
    titles = {"ok": "works", "failed": "fails", "not here": "not on this machine", "not run": "not run"}
    of = "rehearsal on a CPU, demos of one epoch at an eighth of the width: " if here.rehearses else ""
    print(of + "; ".join(f"{titles[state]}: {', '.join(names)}" for state, names in states.items() if names))
    return 1 if states["failed"] or states["not run"] else 0


if __name__ == "__main__":
    sys.exit(main())
