"""The script that a Ray job runs; the same as `tunefleet train`, from a checkout that nobody installed.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/train.py jobs/lora_sft.yaml [key=value ...]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))
sys.path.insert(0, str(ROOT / "strategies"))

try:
    from tunefleet.__main__ import command  # found by the two lines above
except ModuleNotFoundError as error:
    sys.exit(
        f"{sys.executable} has no package {error.name}: start Ray from an environment with tunefleet's dependencies "
        "(make install), or put them into the cluster's image."
    )

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    command()
