"""Fine-tuning: real tokens a second and peak memory, beside the stock Hugging Face Trainer with dynamic padding.

``python -m benchmarks.finetune --output runs/benchmarks`` trains one epoch of the same simulated cells with the same
model each way, one after the other, prints a table and writes ``finetune.json``. It needs an idle machine and
``pip install geneformer-ray[benchmark]``.

What is the same on both sides: the cells (and so the real tokens), the model (first-gene pooling, which stock
``BertForSequenceClassification`` computes too), float32, SDPA, no attention dropout, fused AdamW, gradients clipped to
1, a linear schedule, one thread a worker, gloo between two. No evaluation, no logging, no checkpoint. What differs is
which cells make a batch:

- ``ours``: batches of like length over a budget of padded tokens.
- ``stock``: as many cells an update as ours on average, drawn at random, padded to the batch's longest.
- ``stock, grouped by length``: the same with the Trainer's own ``train_sampling_strategy``.
- ``stock, as little memory``: as many cells as fit our budget at the greatest length: no batch is larger than ours.

Seconds are those of the training loop, without imports and building the model. Where there is a GPU it is used, and its
peak memory stands beside the host's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import measure

# Geneformer V1-10M's shape; its six layers are cut to --layers, and its 25,426 tokens to these, to spare time.
WIDTH, HEADS, FEED_FORWARD, POSITIONS = 256, 4, 512, 2048
TOKENS, CLASSES = 5_000, 10
PAD, SPECIAL = 0, (0, 1)
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
MIB = 1 << 20


def simulated(lengths: str, cells: int) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """Draw cells and their classes: log-normal lengths from 100 to 2,048, or all of 512."""
    rng = np.random.default_rng(0)
    skewed = np.clip(rng.lognormal(np.log(500), 0.7, cells), 100, POSITIONS).astype(int)
    sizes = skewed if lengths == "skewed" else np.full(cells, 512)
    sequences = [(rng.permutation(TOKENS - len(SPECIAL))[:size] + len(SPECIAL)).astype(np.int32) for size in sizes]
    return sequences, rng.integers(CLASSES, size=cells)


def _config(layers: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD, max_position_embeddings=POSITIONS, hidden_act="relu", hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.0, pad_token_id=PAD, num_labels=CLASSES, attn_implementation="sdpa",
        pooling="first_gene", has_cls=False, special_ids=list(SPECIAL),
    )  # fmt: skip


def ours(given: argparse.Namespace) -> dict[str, Any]:
    """Train with the library's own steps: the only function here that calls them."""
    import torch

    from geneformer_ray.compute.classifier import CellClassifier
    from geneformer_ray.compute.execution import choose_execution
    from geneformer_ray.compute.optimisation import Optimisation
    from geneformer_ray.compute.training import Share, TrainingOptions, classifier_loss, train_step, training_plan
    from geneformer_ray.data.vocabulary import GeneVocabulary

    sequences, targets = simulated(given.lengths, given.cells)
    names = ["<pad>", "<mask>", *(f"GENE{number}" for number in range(TOKENS - len(SPECIAL)))]
    vocabulary = GeneVocabulary({name: number for number, name in enumerate(names)}, max_length=POSITIONS)
    execution = choose_execution("fp32", cpus=1)
    share = Share(int(os.environ.get("RANK", "0")), given.workers)
    torch.manual_seed(0)
    model = CellClassifier(_config(given.layers)).to(execution.device)
    parallel: torch.nn.Module = model
    if given.workers > 1:
        torch.distributed.init_process_group("gloo")
        parallel = torch.nn.parallel.DistributedDataParallel(model)
    options = TrainingOptions(
        epochs=1, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP,
        tokens_per_batch=given.tokens_per_batch,
    )  # fmt: skip
    started = time.perf_counter()
    lengths = np.array([len(ids) for ids in sequences])
    plan = training_plan(lengths, np.zeros(len(lengths), dtype=np.int64), options, given.workers)
    optimisation = Optimisation(model, options, plan.count(0))
    padded, updates = 0, 0
    for step in plan.steps(0):
        mine = [[sequences[cell] for cell in workers[share.rank]] for workers in step.batches]
        result = train_step(
            parallel, optimisation, step, mine, classifier_loss(targets), len, options,
            vocabulary=vocabulary, execution=execution, share=share,
        )  # fmt: skip
        padded, updates = padded + result.padded_tokens, updates + 1
    return {"seconds": _now(execution.device) - started, "padded": padded, "updates": updates, **_gpu_memory()}


def stock(given: argparse.Namespace) -> dict[str, Any]:
    """Train with ``transformers.Trainer`` and ``DataCollatorWithPadding``."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.set_num_threads(1)
    sequences, targets = simulated(given.lengths, given.cells)
    words = Tokenizer(WordLevel({"<pad>": PAD, "<mask>": 1}, unk_token="<mask>"))
    collate = DataCollatorWithPadding(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"))
    clock = {"padded": 0}

    def counted(cells: list[dict[str, Any]]) -> Any:
        batch = collate(cells)
        clock["padded"] += batch["input_ids"].numel()
        return batch

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock["started"] = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock["ended"] = _now("cuda" if torch.cuda.is_available() else "cpu")

    with_lengths = {"length": [len(ids) for ids in sequences]}
    cells = Dataset.from_dict({"input_ids": sequences, "labels": targets, **with_lengths})
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=given.cells_per_batch,
        optim="adamw_torch_fused", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP,
        lr_scheduler_type="linear", train_sampling_strategy=given.sampling, eval_strategy="no", save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not on_gpu, seed=0,
        ddp_backend="gloo" if given.workers > 1 else None, dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False if given.workers > 1 else None,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(
        BertForSequenceClassification(_config(given.layers)), arguments, train_dataset=cells, data_collator=counted,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    seconds = clock["ended"] - clock["started"]
    return {"seconds": seconds, "padded": clock["padded"], "updates": trainer.state.global_step, **_gpu_memory()}


def _now(device: str) -> float:
    """Give the time when all that was asked of a device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _gpu_memory() -> dict[str, float]:
    import torch

    return {"gpu_peak_mib": torch.cuda.max_memory_allocated() / MIB} if torch.cuda.is_available() else {}


WAYS = {"ours": ours, "stock": stock}


def run_way(given: argparse.Namespace) -> None:
    """Run one way here, or in a process for each worker; print what it came to."""
    if given.workers == 1 or "RANK" in os.environ:
        import torch

        result = WAYS[given.way](given)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # a worker that left first would break the other's last message
            torch.distributed.destroy_process_group()
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result), flush=True)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(given.workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.finetune", *sys.argv[1:]],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(given.workers)
    ]
    sys.exit(max(abs(worker.wait()) for worker in workers))


def measured(what: str, flags: dict[str, Any], repeats: int, cpus: Sequence[int]) -> dict[str, Any]:
    """Run one configuration in fresh processes and give its row of the table: medians over the repeats."""
    command = [sys.executable, "-m", "benchmarks.finetune"]
    command += [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    runs = [measure.run(command, cpus, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") for _ in range(repeats)]
    results = [json.loads(run.last_line) for run in runs]
    real = sum(map(len, simulated(flags["lengths"], flags["cells"])[0]))
    result = results[0]
    # Every worker pads about the same; only the first one says how much.
    padding = 1 - real / max(real, result["padded"] * flags["workers"])
    return {
        "lengths": flags["lengths"],
        "workers": flags["workers"],
        "what": what,
        "cells/update": round(flags["cells"] / result["updates"], 1),
        "padding": f"{padding:.0%}",
        "seconds": round(median(one["seconds"] for one in results), 1),
        "tokens/s": round(real / median(one["seconds"] for one in results)),
        "peak MiB": round(median(run.peak_mib for run in runs)),
        **({"GPU peak MiB": round(result["gpu_peak_mib"])} if "gpu_peak_mib" in result else {}),
    }


def compare(lengths: str, workers: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every way on cells of these lengths, and set each beside the stock way."""
    shared = {name: getattr(given, name) for name in ("cells", "layers", "tokens_per_batch")}
    shared |= {"lengths": lengths, "workers": workers}
    cpus = sorted(os.sched_getaffinity(0))[:workers]
    rows = [measured("ours", {"way": "ours", **shared}, given.repeats, cpus)]
    as_many = max(1, round(rows[0]["cells/update"] / workers))
    ways = {"stock": {"cells_per_batch": as_many}}
    if lengths == "skewed":
        ways["stock, grouped by length"] = {"cells_per_batch": as_many, "sampling": "group_by_length"}
        ways["stock, as little memory"] = {"cells_per_batch": max(1, given.tokens_per_batch // POSITIONS)}
    for what, flags in ways.items():
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        rows.append(measured(what, {"way": "stock", **shared, **flags}, given.repeats, cpus))
    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return [{**row, "times stock": f"{row['tokens/s'] / rows[1]['tokens/s']:.2f}"} for row in rows]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for figures")
    parser.add_argument("--cells", type=int, default=240, help="cells of the epoch")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model: V1-10M has 6")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="padded tokens of a worker's batch, ours")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the table has medians")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated")
    parser.add_argument("--lengths", default="skewed,uniform", help="of cells, comma-separated")
    parser.add_argument("--way", choices=sorted(WAYS), help="run one way in this process (what the benchmark calls)")
    parser.add_argument("--cells-per-batch", type=int, default=8, help="of a worker, of the stock way")
    parser.add_argument("--sampling", default="random", help="of the stock way")
    given = parser.parse_args()
    if given.way:
        given.workers = int(given.workers)
        run_way(given)
        return
    rows = [
        row
        for lengths in given.lengths.split(",")
        for workers in map(int, given.workers.split(","))
        for row in compare(lengths, workers, given)
    ]
    print(measure.table(rows))
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    shape = {"layers": given.layers, "width": WIDTH, "heads": HEADS, "feed_forward": FEED_FORWARD, "tokens": TOKENS}
    content = {"machine": {**measure.machine(), **libraries}, "model": shape, "flags": vars(given), "rows": rows}
    measure.write(str(Path(given.output) / "finetune.json"), content)


if __name__ == "__main__":
    main()
