"""Deletion screens: perturbed cells a second, beside the plain way that upstream goes.

``python -m benchmarks.screen --output runs/benchmarks`` deletes genes of one real cell, one at a time, with random
weights of the shapes of Geneformer V1-10M and V2-104M, prints a table and writes ``screen.json``. ``--shapes`` and
``--lengths`` choose; ``--cells TABLE`` takes other token sequences than the embedded pancreas cells'. It needs an
otherwise idle machine. Every row is a process of its own.

- ``plain``: stock ``BertForMaskedLM`` in float32 over batches of deletions with their attention mask, all hidden states
  kept, the layer before the last compared with the original's gene by gene. The batch is upstream's default of 100, and
  the largest power of two below it where the logits of 100 would not fit the memory.
- ``plain, small batches``: the same with as many tokens a batch as is fastest for it here.
- ``ours``: :func:`geneformer_ray.compute.shifts.shift_cell`, in float32 and in bfloat16.

All ways do the same first ``--events`` deletions; some before the clock starts warm up. ``share of peak`` is what a way
has to multiply (the plain way its head and its last layer as well; ours is credited with a whole first layer, though
most of that is shared), against the rate of one large matrix product of the same dtype on this machine. ``peak MiB`` is
the host's. ``difference`` is the largest of any event from the plain way's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import measure

# Layers, width, heads, feed-forward, tokens, positions, and whether cells have <cls> and <eos>.
SHAPES = {
    "V1-10M": (6, 256, 4, 512, 25_426, 2_048, False),
    "V2-104M": (12, 768, 12, 3_072, 20_275, 4_096, True),
}
# Deletions that are timed: a few seconds of the plain way at 512 tokens on two cores.
EVENTS = {"V1-10M": 128, "V2-104M": 32}
UPSTREAMS_BATCH = 100
# Events of our way before the clock starts: one batch.
WARM_UP = 32
TOKENS_A_SMALL_BATCH = 4_096
LOGITS_SHARE = 0.5
BYTES_A_NUMBER = 4


def real_tokens(path: str | None, length: int, genes: int) -> NDArray[np.int64]:
    """Give the gene numbers, from 0, of a real cell's first `length` ranks."""
    if path is None:
        sequence = _pancreas_cell()
    else:
        from geneformer_ray.data.cells import CellTable

        table = CellTable(path)
        sequence = table.read([int(np.argmax(table.lengths))]).input_ids[0].astype(np.int64)
    if len(sequence) < length:
        raise SystemExit(f"the longest cell has {len(sequence):,} genes, fewer than {length:,}")
    numbers = np.unique(sequence, return_inverse=True)[1]
    return np.asarray(numbers[:length] % genes)


def _pancreas_cell() -> NDArray[np.int64]:
    """Encode the embedded cell that expresses most genes."""
    from geneformer_ray.data.expression import non_zero_medians
    from geneformer_ray.manage.demo import read_pancreas

    cells = read_pancreas()
    totals = np.asarray(cells.X.sum(axis=1, dtype=np.float64)).ravel()
    medians = non_zero_medians(cells.X, totals, list(cells.var_names), min_cells=1)
    row = cells.X[int(np.argmax(cells.X.getnnz(axis=1)))]
    value = {gene: row.data[i] / medians[cells.var_names[gene]] for i, gene in enumerate(row.indices)}
    return np.array(sorted(value, key=lambda gene: (-value[gene], gene)), dtype=np.int64)


def _model(shape: str) -> Any:
    """Make stock BertForMaskedLM with random weights."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    layers, width, heads, feed_forward, tokens, positions, _ = SHAPES[shape]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokens, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=feed_forward, max_position_embeddings=positions, hidden_act="relu", pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def _cell(given: argparse.Namespace) -> NDArray[np.int64]:
    tokens, special = SHAPES[given.shape][4], SHAPES[given.shape][6]
    first = 4 if special else 2
    genes = real_tokens(given.cells, given.length - 2 * special, tokens - first) + first
    return np.concatenate([[2], genes, [3]]) if special else genes


def plain(given: argparse.Namespace) -> Iterator[Callable[[], NDArray[np.float32]]]:
    """Go the plain way."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = _model(given.shape).to(device), torch.from_numpy(_cell(given))
    front = int(SHAPES[given.shape][6])
    genes = slice(front, len(ids) - front)

    @torch.inference_mode()
    def run(events: range) -> NDArray[np.float32]:
        values = []
        before_LD = model(input_ids=ids[None].to(device), output_hidden_states=True).hidden_states[-2][0, genes]
        for start in range(events.start, events.stop, given.batch):
            chosen = range(start, min(start + given.batch, events.stop))
            batch = torch.stack([torch.cat([ids[: front + gene], ids[front + gene + 1 :]]) for gene in chosen])
            mask = torch.ones_like(batch)
            states = model(input_ids=batch.to(device), attention_mask=mask.to(device), output_hidden_states=True)
            after_EKD = states.hidden_states[-2][:, front : batch.shape[1] - front]
            kept = torch.arange(before_LD.shape[0])
            before_EKD = torch.stack([before_LD[kept[kept != gene]] for gene in chosen])
            cosines = torch.nn.functional.cosine_similarity(after_EKD, before_EKD, dim=-1)
            values.append(cosines.mean(dim=1).cpu().numpy())
        return np.concatenate(values)

    yield lambda: run(range(min(given.batch, given.events)))
    yield lambda: run(range(given.events))


def ours(given: argparse.Namespace) -> Iterator[Callable[[], NDArray[np.float32]]]:
    """Go our way."""
    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.execution import choose_execution
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.shifts import shift_cell
    from geneformer_ray.data.vocabulary import GeneVocabulary

    tokens, positions, special = SHAPES[given.shape][4:]
    names = ["<pad>", "<mask>", *(["<cls>", "<eos>"] if special else [])]
    names += [f"GENE{number}" for number in range(tokens - len(names))]
    vocabulary = GeneVocabulary({name: number for number, name in enumerate(names)}, max_length=positions)
    encoder = Encoder(_model(given.shape).bert, execution=choose_execution(given.precision))
    ids = _cell(given)
    front = int(special)

    def run(events: int) -> NDArray[np.float32]:
        plan = PerturbationPlan(genes=tuple(ids[front : front + events].tolist()))
        return shift_cell(encoder, ids, plan, Reading(), vocabulary).values_ES[:, 0]

    yield lambda: run(min(WARM_UP, given.events))
    yield lambda: run(given.events)


def run_way(given: argparse.Namespace) -> None:
    """Run one way in this process; print its seconds, values and what it multiplied."""
    from geneformer_ray.compute.execution import use_threads

    use_threads()
    warm_up, timed = {"plain": plain, "ours": ours}[given.way](given)
    warm_up()
    started = time.perf_counter()
    values = timed()
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "values": values.tolist(), "gflop": _gflop(given), "peak": _peak(given.precision)}
    print(json.dumps(result))


def _gflop(given: argparse.Namespace) -> float:
    """Count the multiplications and additions of an event's products: what the way says it has to compute."""
    layers, width, _, feed_forward, tokens, _, _ = SHAPES[given.shape]
    length = given.length - 1
    a_layer = 4 * width**2 + 2 * width * feed_forward + 2 * length * width
    head = width**2 + width * tokens
    a_token = layers * a_layer + head if given.way == "plain" else (layers - 1) * a_layer
    return 2 * a_token * length / 1e9


def _peak(precision: str) -> float:
    """Measure one large matrix product, in GFLOP/s."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8_192 if device == "cuda" else 4_096
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    factor = torch.randn(size, size, device=device).to(dtype)
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        factor @ factor
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - started) / 1e9)
    return max(rates)


def compare(shape: str, length: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every way on one cell, and set each beside the plain way."""
    tokens = SHAPES[shape][4]
    memory = int(LOGITS_SHARE * _free_bytes())
    batch = UPSTREAMS_BATCH
    while batch > 1 and batch * length * tokens * BYTES_A_NUMBER > memory:
        batch = 1 << ((batch - 1).bit_length() - 1)
    small = max(1, TOKENS_A_SMALL_BATCH // length)
    ways = {
        f"plain, batches of {batch}": {"way": "plain", "batch": batch},
        f"plain, batches of {small}": {"way": "plain", "batch": small},
        "ours, float32": {"way": "ours"},
        "ours, bfloat16": {"way": "ours", "precision": "bf16"},
    }
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    events = given.events or EVENTS[shape]
    for what, flags in ways.items():
        flags = {"shape": shape, "length": length, "events": events, **flags}
        command = [sys.executable, "-m", "benchmarks.screen"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        run = measure.run(command + (["--cells", given.cells] if given.cells else []))
        result = json.loads(run.last_line)
        first = first or result
        rate = events / result["seconds"]
        difference = np.abs(np.array(result["values"]) - np.array(first["values"])).max()
        rows.append(
            {
                "shape": shape,
                "tokens": length,
                "what": what,
                "perturbed cells/s": f"{rate:.3g}",
                "times plain": f"{first['seconds'] / result['seconds']:.2f}",
                "share of peak": f"{rate * result['gflop'] / result['peak']:.0%}",
                "peak GFLOP/s": round(result["peak"]),
                "peak MiB": round(run.peak_mib),
                "difference": f"{difference:.1e}",
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _free_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for figures")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of models, comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--lengths", default="512,2048", help="tokens of the cell, comma-separated")
    parser.add_argument(
        "--cells", help="a table of tokenised cells; its longest is taken (default: the embedded cells)"
    )
    parser.add_argument("--events", type=int, help=f"deletions that are timed (default: {EVENTS})")
    parser.add_argument(
        "--way", choices=("plain", "ours"), help="run one way in this process (what the benchmark calls)"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of that way")
    parser.add_argument("--length", type=int, help="of that way")
    parser.add_argument("--batch", type=int, default=UPSTREAMS_BATCH, help="of the plain way")
    parser.add_argument("--precision", default="fp32", help="of our way")
    given = parser.parse_args()
    if given.way:
        run_way(given)
        return
    rows = [
        row
        for shape in given.shapes.split(",")
        for length in map(int, given.lengths.split(","))
        for row in compare(shape, length, given)
    ]
    print(measure.table(rows))
    libraries = {name: version(name) for name in ("torch", "transformers")}
    content = {"machine": {**measure.machine(), **libraries}, "flags": vars(given), "rows": rows}
    measure.write(str(Path(given.output) / "screen.json"), content)


if __name__ == "__main__":
    main()
