"""The peer's own environment: LLaMA-Factory 0.9.5 in a virtual environment that this command makes once."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

LLAMAFACTORY = "llamafactory==0.9.5"


def run_quietly(argv: list[str]) -> None:
    """Run a command without showing its output.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise SystemExit(f"{tail}\nThe peer's environment could not be made; mend the command above and start again.")


def make_environment(folder: Path, requirements: Path) -> Path:
    """Return the folder of the peer's commands, making its environment first if it is missing or older than its list.

    The mark is written last, so an installation that was cut off is made anew.
    """
    mark = folder / "complete.txt"
    wanted = hashlib.sha256((LLAMAFACTORY + requirements.read_text()).encode()).hexdigest()
    if mark.is_file() and mark.read_text() == wanted:
        return folder / "bin"
    print(f"Making the peer's environment ({LLAMAFACTORY}) in {folder.name}: minutes, once.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run_quietly([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    run_quietly([*pip, "--requirement", str(requirements)])
    run_quietly([*pip, "--no-deps", LLAMAFACTORY])
    add_empty_torchaudio(folder)
    mark.write_text(wanted)
    return folder / "bin"


def add_empty_torchaudio(folder: Path) -> None:
    """Give the peer an empty `torchaudio`: it imports the module at its start and uses it for sound only."""
    (packages,) = folder.glob("lib/python*/site-packages")
    module = packages / "torchaudio"
    module.mkdir(exist_ok=True)
    (module / "__init__.py").touch()
