#!/usr/bin/env bash
# Set up and run the tests: no network (after the install), no GPU.   bash scripts/test.sh [pytest arguments …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set /s/^# \{0,1\}//p' scripts/test.sh; exit ;; esac
bash scripts/setup.sh pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15 ruff==0.17.6 tensorboard==2.21.0 playwright==1.65.2
# In the order of tests/conftest.py: else the long files, which have few tests, come last and one process waits.
# Two processes of one thread: on tiny models a second busy process makes more threads many times slower.
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 \
    exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
