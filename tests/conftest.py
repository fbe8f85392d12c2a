"""What all tests share: a quiet environment, a small world to train in, and one Ray session for those that need it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or Ray. A test never joins somebody's cluster and never asks the hub.
os.environ.pop("RAY_ADDRESS", None)
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",  # DeepSpeed, which peft imports, warns when it has to find out by itself
    # A test never uses somebody's account: these are for the S3 server of the tests, here and in the workers.
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_CONFIG_FILE": "/dev/null",
}

import pytest
from tests.s3_server import Server, Way, s3_server

ROOT = Path(__file__).resolve().parents[1]

# Ray lives in a process of its own, so that each run joins it as it would join a cluster, and leaves it again.
_HEAD = """
import sys
import ray
context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def quickstart_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's folder at a tenth of its size: data/ (with dataset_info.json) and init/ (model, tokenizer)."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(ROOT / "jobs" / "prepare_quickstart.py"), "--small", "--to", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    return folder


@pytest.fixture(scope="session")
def tiny_model(quickstart_world: Path) -> Path:
    """A folder with a random Llama of 0.1 million parameters (two layers, grouped queries) and its tokenizer."""
    return quickstart_world / "init"


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray session on this machine with four (logical) CPUs, shared by all tests."""
    head = subprocess.Popen([sys.executable, "-c", _HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = head.stdout.readline().strip()
        assert address, "Ray did not start"
        yield address
    finally:
        head.stdin.close()
        head.wait(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An S3 server, and its buckets, of the file's own."""
    with s3_server() as running:
        yield running


@pytest.fixture
def way(server: Server) -> Iterator[Way]:
    """A way to the S3 server that the test can cut."""
    opened = Way(server)
    yield opened
    opened.close()
