"""Compile every kernel that a GPU run would use, without a GPU: a table of registers and spills.

    python tools/compile_kernels.py                              all networks, fp16, for sm_80, sm_86 and sm_90
    python tools/compile_kernels.py -net dvs128 --amp bf16 --arch 100

The arguments of the Triton kernels are those of one training step in the published sizes; the CUDA sources are those
that SpikingJelly 0.0.0.0.14 writes for its CuPy neurons. A kernel that does not compile ends the program with an error.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools._without_gpu import Launch, cupy_sources, launches, neurons_in, pretended_step
from tools.benchmark_model import SUBJECTS
from utils.analysis.tables import markdown_table
from utils.engine import AMP_DTYPES
from utils.errors import SentenceParser, UserError, exit_with_sentence

__all__ = ["NETS", "compile_cuda", "compile_triton", "net_of"]

NETS = [name for name in SUBJECTS if name != "block"]


def net_of(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """What makes a network, and the shape of the input of its recipe."""
    subject = SUBJECTS[name]
    form = (subject.batch, 3) if subject.plain is not None else (subject.T, subject.batch, 2)
    return subject.factory, (*form, *subject.size)


class Resources(NamedTuple):
    """What a compiled kernel needs: registers of a thread, and bytes of its registers that go to memory."""

    registers: int
    spilled: int


_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_TYPES |= {torch.uint8: "u8", torch.bool: "i1"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def triton_form(launch: Launch) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """What Triton compiles for a launch: kernel, types by argument, constants, options, arguments divisible by 16."""
    module, name = launch.kernel.rsplit(".", 1)
    kernel = getattr(importlib.import_module(module), name)
    options = {key: value for key, value in launch.keywords if key in _OPTIONS}
    given = {key: value for key, value in launch.keywords if key not in _OPTIONS}
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | given
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    constants |= {name: 1 for name, value in values.items() if type(value) is int and value == 1}
    types = {name: "constexpr" if name in constants else _type(value) for name, value in values.items()}
    # Pointers of torch's allocator, and sizes, as Triton sees them at the call.
    sixteen = tuple(n for n, v in values.items() if types[n] != "constexpr" and (type(v) is not int or v % 16 == 0))
    return launch.kernel, types, constants, options, sixteen


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(one) for one in value)
    if isinstance(value, torch.dtype):
        return f"*{_TYPES[value]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_triton(launch: Launch, arch: int) -> Resources:
    """Compile the kernel of a launch to the machine code of ``arch`` (90 for sm_90)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel_name, types, constants, options, sixteen = triton_form(launch)
    module, name = kernel_name.rsplit(".", 1)
    kernel = getattr(importlib.import_module(module), name)
    types = {name: types[name] for name in kernel.arg_names}
    attributes: Any = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in sixteen if types[n][0] != "*"}
    attributes |= {path: [["tt.divisibility", 16]] for path, kind in _leaves(list(types.values())) if kind[0] == "*"}
    known: Any = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, types, known, attributes)
    return _resources(compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"])


def _leaves(types: Any, path: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], str]]:
    if isinstance(types, str):
        return [(path, types)]
    return [leaf for i, one in enumerate(types) for leaf in _leaves(one, (*path, i))]


def _resources(cubin: bytes) -> Resources:
    import triton

    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = subprocess.run([dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", words.stdout)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"])


@functools.cache
def _nvrtc() -> tuple[ctypes.CDLL, Path]:
    """NVIDIA's run-time compiler and its headers, out of the packages that torch brings.

    Raises:
        UserError: there is none.
    """
    root = Path(torch.__file__).parent.parent / "nvidia"
    found = [path for path in sorted(root.glob("**/libnvrtc.so.*")) if "alt" not in path.name]
    headers = sorted(root.glob("**/include/cuda_fp16.h"))
    if not found or not headers:
        raise UserError(f"no libnvrtc or cuda_fp16.h in {root}: install torch for CUDA from the package index")
    for part in found[-1].parent.glob("libnvrtc-builtins.so.*"):
        if "alt" not in part.name:
            ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)  # looked for by name only, on the loader's path
    return ctypes.CDLL(str(found[-1])), headers[-1].parent


def compile_cuda(source: str, arch: int) -> Resources:
    """Compile CUDA source to the machine code of ``arch``, as CuPy does.

    Raises:
        UserError: it does not compile; the message has the compiler's words.
    """
    nvrtc, headers = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture=sm_{arch}".encode(), f"-I{headers}".encode(), b"-use_fast_math"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    which = "ProgramLog" if failed else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{which}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{which}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise UserError(f"a CUDA source does not compile for sm_{arch}: {text.value.decode()}")
    return _resources(text.raw)


def main() -> None:
    """Walk one training step of every network, compile what it launches, print the table."""
    parser = SentenceParser(description=__doc__)
    parser.add_argument("-net", "--net", nargs="+", choices=NETS, default=list(NETS), help="default: all")
    parser.add_argument("--amp", nargs="+", choices=AMP_DTYPES, default=["fp16"], help="default: fp16")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 86, 90], metavar="N", help="default: 80 86 90")
    args = parser.parse_args()
    compiled: dict[str, list[Resources]] = {}
    used: dict[tuple[str, str, str], list[Resources]] = {}  # of the variants in layout and alignment, the largest
    for name, amp in itertools.product(args.net, args.amp):
        make, shape = net_of(name)
        with launches() as found:
            pretended_step(make, shape, AMP_DTYPES[amp], neurons_in("triton"))
        for launch in found:
            form = triton_form(launch)
            if (key := str(form)) not in compiled:
                compiled[key] = [compile_triton(launch, arch) for arch in args.arch]
            types = " ".join(dict.fromkeys(_TYPES[dtype] for dtype in _dtypes(launch.arguments)))
            row = (form[0].removeprefix("models.fast."), str(form[2]["T"]), types)
            used[row] = [max(pair) for pair in zip(used.get(row, compiled[key]), compiled[key], strict=True)]
        for title, source in cupy_sources(make, shape, AMP_DTYPES[amp]).items():
            row = (f"CuPy: {title}", "any", "fp16" if "half2" in title else "fp32")
            used[row] = [compile_cuda(source, arch) for arch in args.arch]
    print("Registers of a thread / bytes of them that go to memory (spills):\n")
    head = ["kernel", "T", "types", *(f"sm_{arch}" for arch in args.arch)]
    print(markdown_table([head, *([*row, *(f"{r.registers} / {r.spilled}" for r in used[row])] for row in used)]))


def _dtypes(arguments: Any) -> list[torch.dtype]:
    if isinstance(arguments, torch.dtype):
        return [arguments]
    return [d for one in arguments for d in _dtypes(one)] if isinstance(arguments, tuple) else []


if __name__ == "__main__":
    exit_with_sentence(main)
