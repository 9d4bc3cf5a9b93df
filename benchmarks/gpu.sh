#!/usr/bin/env bash
# What a machine with a GPU has to show: parity with Reference, replicas per second, and a training from start to end.
#
#     bash benchmarks/gpu.sh [CUDA | HIP | OpenCL] [FILE.npz]
#
# Needs the package with its extras [test,benchmarks]; leaves runs/gpu. With a reference, its maps are compared.
set -euo pipefail
platform=${1:-CUDA}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -m openmm.testInstallation
pytest -n 0 -m gpu -rs
python benchmarks/engines.py systems/alanine_dipeptide/alanine_dipeptide.yaml --platform "$platform" --workers 1
openmm-cgflow train systems/alanine_dipeptide/alanine_dipeptide.yaml -o runs/gpu --overwrite --seed 1 \
    --set chains.platform="$platform"
openmm-cgflow info runs/gpu
openmm-cgflow evaluate runs/gpu ${2:+--reference "$2"}
