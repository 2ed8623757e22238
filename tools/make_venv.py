"""Make a virtual environment and install simba into it; the Makefile calls this.

    python3 tools/make_venv.py .venv --extras dev,plot --constraints constraints.txt

It needs only Python, and does nothing if the environment exists and is up to date. On a machine
without an NVIDIA GPU it never installs a CUDA build of torch, which takes gigabytes: it asks pip
for the CPU build of the version, and stops with advice if pip's sources don't have it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torch_requirement(pinned: str) -> str:
    """What to ask pip for: the CPU build on Linux without a GPU; elsewhere the default build."""
    if platform.system() != "Linux" or shutil.which("nvidia-smi"):
        return f"torch=={pinned}"
    return f"torch=={pinned}+cpu"


def pins(path: Path) -> dict[str, str]:
    """Versions by package, from a file of constraints."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.split(";")[0].strip().split("==") for line in lines if line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="of the virtual environment")
    parser.add_argument("--extras", default="dev", help="separated by commas")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    args = parser.parse_args()

    ingredients = "\n".join(
        [
            sys.version,
            args.extras,
            args.constraints.read_text(),
            (ROOT / "pyproject.toml").read_text(),
            str(ROOT),
        ]
    )
    stamp = args.path / "simba-stamp"
    digest = hashlib.sha256(ingredients.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return

    def pip(*command: str) -> int:
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.run([python, "-m", "pip", *command], env=environment).returncode

    venv.EnvBuilder(clear=True, with_pip=True).create(args.path)
    bin_dir = "Scripts" if os.name == "nt" else "bin"
    python = str(args.path / bin_dir / "python")
    torch = torch_requirement(pins(args.constraints)["torch"])
    target = f"{ROOT}[{args.extras}]" if args.extras else str(ROOT)
    # Compiling all modules takes a minute; Python compiles those that are imported.
    options = ["--quiet", "--no-compile", "--constraint", str(args.constraints)]
    # The pip that comes with Python 3.10 or 3.11 takes twice as long, but it does, too.
    pip("install", *options, "pip>=25")
    if pip("install", *options, torch, "--editable", target) != 0:
        advice = (
            f"If it found no {torch}: this machine has no NVIDIA GPU, so the CPU build of torch\n"
            "is needed, but none of pip's sources has it for this Python. Add PyTorch's index of\n"
            "CPU builds ('Start Locally' on pytorch.org, compute platform CPU) to pip's sources,\n"
            "for instance through the variable PIP_EXTRA_INDEX_URL, and run this again."
        )
        sys.exit(
            "\npip could not install simba's requirements (see above). "
            + (advice if torch.endswith("+cpu") else "")
        )
    stamp.write_text(digest)


if __name__ == "__main__":
    main()
