"""Packages and the compiled extensions; the metadata is in pyproject.toml.

fastpeft._C, the CPU kernels, is built when torch can be imported here and a C++ compiler works; otherwise the package
is pure Python and runs on its reference backend. FASTPEFT_BUILD=1 makes a missing extension an error, FASTPEFT_BUILD=0
never builds it.

fastpeft._cuda, the CUDA kernels, is built when FASTPEFT_CUDA names a CUDA release ("13.0") whose toolkit is here, for
the compute capabilities of FASTPEFT_CUDA_ARCH; anything missing is an error then. The version gets the label +cu130.
tools/build_wheel.py sets both, and fetches the toolkit where there is none.

Both use LibTorch's stable ABI and Python's limited API: one build serves Python >= 3.10, torch >= 2.10.
"""

from __future__ import annotations

import glob
import os
import platform
import subprocess
import sys

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))

import cuda_toolkit

WANTED = os.environ.get("FASTPEFT_BUILD", "")
CUDA = os.environ.get("FASTPEFT_CUDA", "")
if CUDA in ("0", "none"):
    CUDA = ""
ARCHS = os.environ.get("FASTPEFT_CUDA_ARCH") or cuda_toolkit.DEFAULT_ARCHS
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Each kernel source is compiled for its own instruction set; the processor is asked at run time (csrc/cpu/select.cpp).
ISA_FLAGS = {
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


def say(text: str) -> None:
    print(f"fastpeft: {text}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    if CUDA and WANTED == "0":
        raise SystemExit("fastpeft: FASTPEFT_BUILD=0 asks for no extension, FASTPEFT_CUDA for one; unset one of them")
    if WANTED == "0":
        say("FASTPEFT_BUILD=0: installing without the C++ extension; operators run on the reference backend")
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        if WANTED == "1" or CUDA:
            option = f"FASTPEFT_CUDA={CUDA}" if CUDA else "FASTPEFT_BUILD=1"
            raise SystemExit(
                f"fastpeft: {option}, but torch cannot be imported in the build environment ({error}); "
                "install torch >= 2.10 and use `pip install --no-build-isolation`"
            ) from error
        say(
            "torch is not in the build environment: installing without the C++ extension (operators run on the "
            "reference backend). For the CPU kernels: `pip install torch`, then install again with --no-build-isolation"
        )
        return []
    sources = sorted(p for p in glob.glob("csrc/*.cpp") + glob.glob("csrc/*/*.cpp") if not is_cuda(p))
    if not X86:
        sources = [s for s in sources if os.path.basename(s) not in ISA_FLAGS]
    common = {
        "library_dirs": library_paths(),
        "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")],
        "extra_compile_args": [
            "-std=c++17",
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-maybe-uninitialized",
            "-Wno-psabi",
        ],
        "extra_link_args": ["-s"] if sys.platform == "linux" else [],
        "py_limited_api": True,
    }
    headers = sorted(glob.glob("csrc/**/*.h", recursive=True))
    includes = [*include_paths(), "csrc"]
    built = [
        Extension(
            "fastpeft._C",
            sources=sources,
            depends=[p for p in headers if not is_cuda(p)],
            include_dirs=includes,
            libraries=["torch_cpu"],
            **common,
        )
    ]
    if CUDA:
        try:
            built.append(cuda_extension(common, headers, includes))
        except cuda_toolkit.ToolkitError as error:
            option = "FASTPEFT_CUDA_ARCH" if error.option == "arch" else f"FASTPEFT_CUDA={CUDA}"
            raise SystemExit(f"fastpeft: {option}: {error}") from error
    return built


def is_cuda(path: str) -> bool:
    return os.path.basename(os.path.dirname(path)) == "cuda"


def cuda_extension(common: dict, headers: list[str], includes: list[str]) -> Extension:
    """fastpeft._cuda. It loads without anything of CUDA: the runtime is linked statically and looks for the driver when
    it is asked, and what lies in libtorch_cuda is looked up when it is called."""
    toolkit, targets = cuda_toolkit.find(CUDA), cuda_toolkit.archs(ARCHS)
    cuda_toolkit.check(toolkit, targets)
    extension = Extension(
        "fastpeft._cuda",
        sources=sorted(glob.glob("csrc/cuda/*.cpp")),
        depends=[*headers, *sorted(glob.glob("csrc/cuda/*.cu*"))],
        include_dirs=[*includes, str(toolkit.root / "include")],
        libraries=["torch_cpu", "dl", "pthread", "rt"],
        **common,
    )
    extension.extra_objects = [str(toolkit.library("libcudart_static.a"))]
    extension.define_macros = [
        *extension.define_macros,
        ("FASTPEFT_CUDA_RELEASE", f'"{CUDA}"'),
        ("FASTPEFT_CUDA_ARCHS", '"{}"'.format(",".join(arch.text for arch in targets))),
        ("FASTPEFT_NVCC", f'"{toolkit.version}"'),
    ]
    extension.toolkit, extension.targets = toolkit, targets
    return extension


class LabelledVersion(egg_info):
    """The version with the label of the CUDA release: 0.1.0+cu130."""

    def finalize_options(self) -> None:
        if CUDA:  # here, since the setup.cfg of a source distribution would override an option of setup()
            try:
                self.tag_build = f"+{cuda_toolkit.label(CUDA)}"
            except cuda_toolkit.ToolkitError as error:
                raise SystemExit(f"fastpeft: FASTPEFT_CUDA: {error}") from error
        super().finalize_options()


class BuildExtension(build_ext):
    """Compiles each source with the flags of its instruction set, and csrc/cuda/*.cu with nvcc.

    A failure is a note, unless FASTPEFT_BUILD=1 or FASTPEFT_CUDA is set.
    """

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = ISA_FLAGS.get(os.path.basename(src), []) if X86 else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if (toolkit := getattr(ext, "toolkit", None)) is not None:
            folder = os.path.join(self.build_temp, "cuda-" + "-".join(arch.digits for arch in ext.targets))
            os.makedirs(folder, exist_ok=True)
            failed = []
            for source in sorted(glob.glob("csrc/cuda/*.cu")):
                target = os.path.join(folder, os.path.basename(source) + ".o")
                threads = min(len(ext.targets), os.cpu_count() or 1)
                command = cuda_toolkit.compile_command(toolkit, source, target, ext.targets, ["csrc"], threads)
                say(f"nvcc {toolkit.version}: {source} for {', '.join(arch.text for arch in ext.targets)}")
                if subprocess.run(command).returncode:
                    failed.append(source)
                ext.extra_objects = [target, *ext.extra_objects]
            if failed:
                raise SystemExit(f"fastpeft: nvcc {toolkit.version} cannot compile {', '.join(failed)}; see above")
        super().build_extension(ext)

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WANTED == "1" or CUDA:
                raise
            say(f"the C++ extension could not be built ({error}): installing without it, on the reference backend")
            self.extensions = []


setup(
    packages=[
        "fastpeft",
        *(f"fastpeft.{name}" for name in find_namespace_packages("fastpeft") if not name.startswith("kernels")),
        "fastpeft.kernels",
        *(f"fastpeft.kernels.{name}" for name in find_namespace_packages("kernels")),
    ],
    package_dir={"fastpeft": "fastpeft", "fastpeft.kernels": "kernels"},
    package_data={
        "fastpeft": ["py.typed", "*.pyi"],
        "fastpeft.ops": ["*.json"],
        "fastpeft.memory": ["shapes/*.json"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "egg_info": LabelledVersion},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
    },
)
