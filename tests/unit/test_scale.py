"""The cost model of docs/scale.md: its counting, what it reads, and that the document is what it prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertModel

from benchmarks import scale, work
from benchmarks.work import SHAPES, Shape
from geneformer_ray.distribute.screen_items import CellCounts, ScreenItems

DOCUMENT = Path(__file__).parents[2] / "docs" / "scale.md"
SMALL = Shape(layers=3, width=32, feed_forward=80, positions=64)


def config_of(shape: Shape, tokens: int = 50) -> BertConfig:
    return BertConfig(
        vocab_size=tokens, hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=4,
        intermediate_size=shape.feed_forward, max_position_embeddings=shape.positions, attn_implementation="eager",
    )  # fmt: skip


@pytest.mark.parametrize("length", [7, 64])
def test_a_pass_is_what_torch_counts(length: int) -> None:
    """Plain attention: torch counts every product of it. Forward once, and twice as much backward."""
    model = BertModel(config_of(SMALL), add_pooling_layer=False)
    ids = torch.arange(length)[None] % 50
    with FlopCounterMode(display=False) as forward:
        hidden = model(input_ids=ids).last_hidden_state
    assert forward.get_total_flops() == pytest.approx(SMALL.flops(length, SMALL.layers), rel=1e-12)
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(SMALL.epoch(length), rel=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_an_event_is_what_screens_are_cut_by(name: str) -> None:
    """The layer before the last is read, so that the last is not computed: of_model says the same."""
    shape, rows = SHAPES[name], np.zeros(1, dtype=np.int64)
    lengths = np.array([2_048])
    items = ScreenItems.of_model(rows, CellCounts(lengths, lengths, 0), config_of(shape), layer=-1)
    assert shape.event(2_048) == pytest.approx(float(items.flops(lengths)[0]), rel=1e-12)


@pytest.mark.parametrize(("name", "tokens"), [("V1-10M", 25_426), ("V2-104M", 20_275), ("V2-316M", 20_275)])
def test_shapes_have_as_many_parameters_as_their_names_say(name: str, tokens: int) -> None:
    with torch.device("meta"):
        model = BertForMaskedLM(config_of(SHAPES[name], tokens))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(float(name.split("-")[1].rstrip("M")), rel=0.04)


def test_a_screen_costs_an_event_a_gene_and_the_original() -> None:
    assert SMALL.screen(10) == pytest.approx(11 * SMALL.event(10))
    assert SMALL.event(10) == pytest.approx(SMALL.flops(10, SMALL.layers) * 2 / 3)


def test_measured_figures_are_those_of_the_table_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["# B", "", "## One", "", "| shape | what | cells/s |", "| --- | --- | --- |", "| A | ours | 3.5 |"]
    lines += ["", "| shape | what | ms |", "| --- | --- | --- |", "| A | ours | 7 |", "| B | ours | 28% |", ""]
    lines += ["## Two", "", "| shape | what | ms |", "| --- | --- | --- |", "| B | ours | 9 |", ""]
    file = tmp_path / "BENCHMARKS.md"
    file.write_text("\n".join(lines))
    monkeypatch.setattr(work, "BENCHMARKS", file)
    assert work.figures("One", shape="A", what="ours") == {"cells/s": 3.5}
    assert work.figures("One", shape="B") == {"ms": 28.0}
    assert work.figures("Two", shape="B") == {"ms": 9.0}
    with pytest.raises(SystemExit, match=r"Two: no row with .*'A'"):
        work.figures("Two", shape="A")


def test_dearer_and_slower_gpus_cost_more() -> None:
    def dollars(*flags: str) -> float:
        given = scale.parse(flags)
        last = scale.costs(scale.rates_of(given), given).splitlines()[-1]
        return float(last.split(" | ")[5].replace(",", ""))

    assert dollars("--gpu-price", "2.424") == pytest.approx(2 * dollars(), rel=0.01)
    assert dollars("--gpu-share", "0.175") == pytest.approx(2 * dollars(), rel=0.01)


def test_the_document_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """After a change of a rate in BENCHMARKS.md: python -m benchmarks.scale --update docs/scale.md."""
    scale.main([])
    printed = capsys.readouterr().out.strip()
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split(scale.BEGIN)[1].split(scale.END)[0].strip() == printed
    copy = tmp_path / "scale.md"
    copy.write_text(text.replace("GFLOP an event", "nothing"), encoding="utf-8")
    scale.main(["--update", str(copy)])
    assert copy.read_text(encoding="utf-8") == text
