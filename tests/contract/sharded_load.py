"""One rank of two that load a model of a few hundred megabytes, and watch what the system says of their memory."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from tests.contract.sharded import parameter_bytes
from tests.group import end_rank
from transformers import LlamaConfig, LlamaForCausalLM

from tunefleet.model_settings import ModelSettings
from tunefleet.training.determinism import pin
from tunefleet.training.engines.loading import Source
from tunefleet_strategies.contract import AttachContext, Precision
from tunefleet_strategies.full import Full

CONFIG = LlamaConfig(
    vocab_size=16000,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def resident_bytes() -> int:
    """Physical memory of this process, pages of mapped files included."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["VmRSS"].split()[0])


class Watch(threading.Thread):
    """The most memory since the beginning, looked at every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = resident_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, resident_bytes())


def main(rank: int, folder: Path) -> None:
    pin(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    if rank == 0:
        LlamaForCausalLM(CONFIG).save_pretrained(folder / "model", max_shard_size="64MB")
        gc.collect()
    dist.barrier()
    fp32 = Precision(torch.float32, torch.float32, torch.float32)
    watch = Watch()
    watch.start()
    settings = ModelSettings(model_name_or_path=str(folder / "model"))
    source = Source.open(settings, Full(), AttachContext(fp32))
    model = source.sharded(torch.device("cpu"), checkpointed=False)
    watch.done.set()
    watch.join()
    whole = sum(4 * parameter.numel() for parameter in model.parameters())
    seen = {"whole": whole, "most": watch.most - watch.before, "kept": parameter_bytes(model)}
    torch.save(seen, folder / f"{rank}.pt")
    end_rank()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
