"""Scale on paper: what screens, fine-tuning, embeddings and tokenising of many cells cost, and what limits them.

``python -m benchmarks.scale`` prints the tables of ``docs/scale.md``; ``--update docs/scale.md`` writes them there. It
needs neither a GPU nor Ray and takes seconds. Three kinds of figures meet in it, and each table says which it has:

- counted: multiplications and additions, by the library's own accounting (:meth:`ScreenItems.flops`), which a unit test
  holds against torch's counter; items, by the library's own cutting.
- measured: rates of this project on a CPU, read from the tables of ``BENCHMARKS.md``; bytes of Parquet files that are
  written here, with values at random, which compress least.
- assumed: how much of a GPU's peak is reached, and prices. They are flags.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.measure import table
from benchmarks.work import LAYERS_NOT_READ, SHAPES, Driver, Rates, Shape, figures
from geneformer_ray.compute.shift_tables import cell_shift_rows, gene_shift_rows
from geneformer_ray.compute.shifts import CellShifts
from geneformer_ray.data.cell_schema import cells_encoding, cells_schema
from geneformer_ray.data.shards import write_shard
from geneformer_ray.distribute.embed import CELLS_PER_ITEM as CELLS_OF_AN_EMBED_ITEM
from geneformer_ray.distribute.screen_items import FLOPS_PER_ITEM

__all__ = ["main", "parse", "report"]

BEGIN, END = "<!-- printed by python -m benchmarks.scale -->", "<!-- to here -->"
NUMBERS_OF_CELLS = (10_000, 1_000_000, 100_000_000)
LENGTHS = (1_024, 2_048, 4_096)
CELLS_WRITTEN = 500


def counted() -> str:
    """Say what one cell costs."""
    rows: list[dict[str, object]] = [
        {
            "model": name,
            "tokens": f"{length:,}",
            "GFLOP an event": _short(shape.event(length) / 1e9),
            "TFLOP a cell, every gene deleted": _short(shape.screen(length) / 1e12),
            "GFLOP a cell and epoch of fine-tuning": _short(shape.epoch(length) / 1e9),
        }
        for name, shape in SHAPES.items()
        for length in LENGTHS
        if length <= shape.positions
    ]
    return table(rows)


def rates_table(rates: Rates, given: argparse.Namespace) -> str:
    """Say what the hours are counted with."""
    rows: list[dict[str, object]] = [
        {"what": f"screen, {name}", "GFLOP/s": _short(rate), "of": "a core, float32", "figure": "measured"}
        for name, rate in rates.core_screen.items()
    ]
    rows[-1]["figure"] = "assumed: V2-104M's"
    rows.append(
        {"what": "fine-tuning", "GFLOP/s": _short(rates.core_training), "of": "a core, float32", "figure": "measured"}
    )
    share = f"assumed: {given.gpu_share:.0%} of {given.gpu_tflops:g} TFLOP/s"
    rows.append({"what": "all", "GFLOP/s": _short(rates.gpu), "of": f"a GPU, {given.gpu}, bfloat16", "figure": share})
    return table(rows)


def costs(rates: Rates, given: argparse.Namespace) -> str:
    """Say what jobs cost: core hours as measured, GPU hours and dollars as assumed."""
    rows: list[dict[str, object]] = []
    for name, shape in SHAPES.items():
        works = {
            "embed": (shape.event(given.length), rates.core_screen[name]),
            "fine-tune, an epoch": (shape.epoch(given.length), rates.core_training),
            "screen, every gene": (shape.screen(given.length), rates.core_screen[name]),
        }
        for work, (flops, core) in works.items():
            for cells in NUMBERS_OF_CELLS:
                gpu_hours = cells * flops / rates.gpu / 1e9 / 3_600
                rows.append(
                    {
                        "model": name,
                        "work": work,
                        "cells": f"{cells:,}",
                        "core hours": _short(cells * flops / core / 1e9 / 3_600),
                        "GPU hours": _short(gpu_hours),
                        "$ on demand": _short(gpu_hours * given.gpu_price),
                        "$ spot": _short(gpu_hours * given.gpu_price * given.spot_share),
                    }
                )
    return table(rows)


def tokenising(given: argparse.Namespace) -> str:
    """Say what tokenising costs, as the job on Ray was measured."""
    row = figures("Encoding", what="ours, the job on Ray", cpus="2", cells="100000")
    a_core = row["cells/s, without start-up"] / row["cpus"]
    return table(
        [
            {
                "cells": f"{cells:,}",
                "core hours": _short(cells / a_core / 3_600),
                "$ on demand": _short(cells / a_core / 3_600 * given.core_price),
            }
            for cells in NUMBERS_OF_CELLS
        ]
    )


def storage_table(given: argparse.Namespace) -> str:
    """Write each table as its job does, and say what its rows take."""
    length, shape = given.length, SHAPES["V1-10M"]
    events = _events_of_an_item(shape, length)
    names = np.array([f"ENSG{number:011d}" for number in range(25_426)], dtype=object)
    random = np.random.default_rng(0)
    genes = random.permutation(len(names))[:length]
    shifts = CellShifts(
        genes=[(int(gene),) for gene in genes[:events]],
        values_ES=random.random((events, 1), dtype=np.float32),
        affected=[np.delete(genes, i).astype(np.int32) for i in range(events)],
        gene_values=[random.random(length - 1, dtype=np.float32) for _ in range(events)],
    )
    vectors = random.random((CELLS_OF_AN_EMBED_ITEM, shape.width), dtype=np.float32)
    embeddings = {
        "cell_id": [_cell_id(number) for number in range(len(vectors))],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), shape.width),
    }
    tokens = [random.permutation(len(names))[:length].astype(np.int32) for _ in range(CELLS_WRITTEN)]
    schema = cells_schema("0" * 64)
    ids = [_cell_id(number) for number in range(len(tokens))]
    cells = pa.table([pa.array(ids), pa.array(tokens), pa.array([length] * len(ids), pa.int32())], schema=schema)
    written = {
        "tokenised cells": (cells, 1.0, cells_encoding(schema)),
        f"embeddings, {shape.width} wide": (pa.table(embeddings), 1.0, {}),
        "cell_shifts": (cell_shift_rows([_cell_id(0)], [shifts], [], names), float(length), {}),
        "gene_shifts": (gene_shift_rows([_cell_id(0)], [shifts], names), float(length * (length - 1)), {}),
    }
    rows: list[dict[str, object]] = []
    for what, (content, rows_a_cell, encoding) in written.items():
        a_row = _bytes_written(content, encoding) / content.num_rows
        sizes = [cells * rows_a_cell * a_row / 1e9 for cells in NUMBERS_OF_CELLS]
        rows.append(
            {
                "table": what,
                "rows a cell": f"{rows_a_cell:,.0f}",
                "bytes a row": _short(a_row),
                **{f"GB, {cells:,} cells": _short(size) for cells, size in zip(NUMBERS_OF_CELLS, sizes, strict=True)},
                "$ a month, the last": _short(sizes[-1] * given.storage_price),
            }
        )
    return table(rows)


def _cell_id(number: int) -> str:
    return f"cell{number:09d}"


def _events_of_an_item(shape: Shape, length: int) -> int:
    """Give the rows of a screen's first shard: a file of a few rows takes more bytes a row."""
    item = next(iter(shape.items(shape.layers - LAYERS_NOT_READ, length)))
    start, stop = item.get("part", (0, length))
    return int(stop - start)


def _bytes_written(content: pa.Table, encoding: dict[str, object]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        write_shard(directory, "table", 0, content, vocabulary="0" * 64, **encoding)
        return sum(file.stat().st_size for file in Path(directory).rglob("*.parquet"))


def limits(rates: Rates, given: argparse.Namespace) -> str:
    """Say where one screen's driver ends, from the measured cost of an item."""
    rows: list[dict[str, object]] = []
    driver = Driver.measured()
    for name, shape in SHAPES.items():
        sample = 1 if shape.screen(given.length) > FLOPS_PER_ITEM else 10_000
        a_cell = sum(1 for _ in shape.items(shape.layers - LAYERS_NOT_READ, given.length, sample)) / sample
        for cells in NUMBERS_OF_CELLS:
            items = cells * a_cell
            work = cells * shape.screen(given.length) / items
            rows.append(
                {
                    "model": name,
                    "cells": f"{cells:,}",
                    "items (files)": _short(items),
                    "scheduling, hours": _short(items * driver.ms / 1e3 / 3_600),
                    "driver, GiB": _short(driver.gib(cells, items)),
                    "GPUs kept busy by one driver": _short(work / (rates.gpu * 1e9) / (driver.ms / 1e3)),
                }
            )
    return table(rows)


def _short(number: float) -> str:
    """Give three figures, and thousands with commas; nothing below a hundredth."""
    if number < 0.01:
        return "< 0.01"
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def rates_of(given: argparse.Namespace) -> Rates:
    """Give the measured rates of a core, and the assumed one of a GPU."""
    return Rates.measured(given.gpu_tflops * 1e3 * given.gpu_share)


def report(given: argparse.Namespace) -> str:
    """Give everything that is printed."""
    rates = rates_of(given)
    price = (
        f"{given.gpu} at ${given.gpu_price:g} an hour, spot at {given.spot_share:.0%} of that; "
        f"${given.core_price:g} a core hour; ${given.storage_price:g} a GB and month"
    )
    parts = {
        "What a cell costs (counted)": counted(),
        "Rates": rates_table(rates, given),
        f"Hours and dollars, cells of {given.length:,} tokens": f"Prices (assumed): {price}.\n\n{costs(rates, given)}",
        "Tokenising (measured rate)": tokenising(given),
        f"Storage, cells of {given.length:,} tokens (measured bytes a row)": storage_table(given),
        f"One screen's driver, cells of {given.length:,} tokens": limits(rates, given),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2_048, help="tokens of a cell (default: %(default)s)")
    parser.add_argument("--gpu", default="A10G", help="its name (default: %(default)s, of AWS's g5 machines)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=70, help="its dense bfloat16 peak, as it is sold (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-share",
        type=float,
        default=0.35,
        help="share of the peak that is reached: assumed (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu-price", type=float, default=1.212,
        help="dollars an hour: g5.2xlarge, us-east-1, on demand, not looked up on the day (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--spot-share", type=float, default=0.4, help="spot price as a share of it: assumed (default: %(default)s)"
    )
    parser.add_argument(
        "--core-price", type=float, default=0.0504,
        help="dollars a core hour: a sixteenth of m7i.4xlarge, same list (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--storage-price", type=float, default=0.023,
        help="dollars a GB and month: S3 standard, same region (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--update", metavar="FILE", help="write the tables into this document instead of printing them")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or put them into the document."""
    given = parse(arguments)
    text = report(given)
    if given.update is None:
        print(text)
        return
    file = Path(given.update)
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
