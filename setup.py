"""Packages and the C++ extension; the metadata is in pyproject.toml.

The extension fastpeft._C is built when torch can be imported here and a C++ compiler works; otherwise the package is
pure Python and runs on its reference backend. FASTPEFT_BUILD=1 makes a missing extension an error, FASTPEFT_BUILD=0
never builds it. It uses LibTorch's stable ABI and Python's limited API: one build serves Python >= 3.10, torch >= 2.10.
"""

from __future__ import annotations

import glob
import os
import platform
import sys

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("FASTPEFT_BUILD", "")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Each kernel source is compiled for its own instruction set; the processor is asked at run time (csrc/cpu/select.cpp).
ISA_FLAGS = {
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


def say(text: str) -> None:
    print(f"fastpeft: {text}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    if WANTED == "0":
        say("FASTPEFT_BUILD=0: installing without the C++ extension; operators run on the reference backend")
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        if WANTED == "1":
            raise SystemExit(
                f"fastpeft: FASTPEFT_BUILD=1, but torch cannot be imported in the build environment ({error}); "
                "install torch >= 2.10 and use `pip install --no-build-isolation`"
            ) from error
        say(
            "torch is not in the build environment: installing without the C++ extension (operators run on the "
            "reference backend). For the CPU kernels: `pip install torch`, then install again with --no-build-isolation"
        )
        return []
    sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/*/*.cpp"))
    if not X86:
        sources = [s for s in sources if os.path.basename(s) not in ISA_FLAGS]
    return [
        Extension(
            "fastpeft._C",
            sources=sources,
            depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
            include_dirs=[*include_paths(), "csrc"],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-maybe-uninitialized",
                "-Wno-psabi",
            ],
            extra_link_args=["-s"] if sys.platform == "linux" else [],
            py_limited_api=True,
        )
    ]


class BuildExtension(build_ext):
    """Compiles each source with the flags of its instruction set; a failure is a note, unless FASTPEFT_BUILD=1."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = ISA_FLAGS.get(os.path.basename(src), []) if X86 else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WANTED == "1":
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
    package_data={"fastpeft": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
