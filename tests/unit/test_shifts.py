"""Perturbations and their shifts, against one event at a time with stock transformers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.compute.cell_events import cell_events, cell_fault, count_events
from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.perturbation import PERTURBATIONS, PerturbationPlan, genes_in_enough_cells
from geneformer_ray.compute.reading import COMPARISONS, Reading
from geneformer_ray.compute.shift_tables import CELL_SHIFTS, GENE_SHIFTS, cell_shift_rows, gene_shift_rows
from geneformer_ray.compute.shifts import CellShifts, shift_cell, shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells
from tests.reference import Cell, StockTrunk, cosine, gene_positions

EXECUTION = choose_execution(cpus=1)
TOLERANCE = 2e-5
STATES = {
    name: np.random.default_rng(number).normal(size=16).astype(np.float32)
    for number, name in enumerate(["start", "goal", "other"])
}
PLANS = ["all", "list", "together", "pairs", "sets", "anchor", "anchor-list", "anchor-together", "anchor-pairs"]


# ------------------------------------------------------------------ the reference


@dataclass
class Event:
    """What the reference says of one event; values by state, gene values in the order of the genes that are left."""

    genes: list[int]
    values: list[float]
    affected: list[int]
    gene_values: list[float]


def reference_events(ids: Cell, plan: PerturbationPlan, vocabulary: GeneVocabulary) -> list[list[int]]:
    """Perturbed genes of each event whose genes the cell holds."""
    present = [int(ids[position]) for position in gene_positions(ids, vocabulary)]
    listed = present if plan.genes is None else list(plan.genes)
    listed = [gene for gene in listed if gene != plan.anchor]
    groups = [listed] if plan.together else [list(pair) for pair in itertools.combinations(listed, plan.combine)]
    if plan.sets is not None:
        groups = [[gene for gene in group if gene != plan.anchor] for group in plan.sets]
    events = [group if plan.anchor is None else [plan.anchor, *group] for group in groups]
    if plan.perturbation == "overexpress" and plan.anchor is None:
        return events
    return [event for event in events if set(event) <= set(present)]


def reference_edit(
    ids: list[int], event: list[int], plan: PerturbationPlan, vocabulary: GeneVocabulary, size: int
) -> tuple[list[int], list[int]]:
    """The original and the perturbed sequence, as a person would write them down."""
    if plan.perturbation == "delete":
        return ids, [token for token in ids if token not in event]
    genes = [ids[position] for position in gene_positions(np.array(ids), vocabulary)]
    front = [token for token in ids[:1] if token not in genes]
    behind = [token for token in ids[1:] if token not in genes]
    others = [gene for gene in genes if gene not in event]
    if plan.perturbation == "overexpress":
        room = size - len(front) - len(behind) - len(event)
        cut = others[room:]  # what no longer fits is left out of both
        return [token for token in ids if token not in cut], [*front, *event, *others[:room], *behind]
    ranks: dict[int, int] = {}
    for gene in event:
        n, rank = len(genes), genes.index(gene)
        quartile = int(4 * rank / n) + 1
        if plan.perturbation == "activate":
            quartile -= plan.rank_shift
            wanted = 0 if quartile < 1 else int((quartile - 0.5) * n / 4)
        else:
            quartile += plan.rank_shift
            wanted = n - 1 if quartile > 4 else int((quartile - 0.5) * n / 4)
        free = [rank for rank in range(n) if rank not in ranks.values()]
        ranks[gene] = next((rank for rank in free if rank >= wanted), free[-1])
    rest = iter(others)
    at = {rank: gene for gene, rank in ranks.items()}
    return ids, [*front, *(at[rank] if rank in at else next(rest) for rank in range(len(genes))), *behind]


class Reference:
    """One cell's events, one at a time; hidden states are kept, for they depend on the sequence alone."""

    def __init__(self, trunk: StockTrunk, vocabulary: GeneVocabulary, layer: int, size: int) -> None:
        self.trunk, self.vocabulary, self.layer, self.size = trunk, vocabulary, layer, size
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def hidden(self, ids: list[int]) -> np.ndarray:
        if tuple(ids) not in self.known:
            self.known[tuple(ids)] = self.trunk.hidden(np.array(ids), self.layer)
        return self.known[tuple(ids)]

    def shifts(self, ids: Cell, plan: PerturbationPlan, reading: Reading) -> list[Event]:
        made = [
            (event, *reference_edit(ids.tolist(), event, plan, self.vocabulary, self.size))
            for event in reference_events(ids, plan, self.vocabulary)
        ]
        genes = {token for token in ids.tolist() if token not in self.vocabulary.special_ids}
        return [
            self.event(original, perturbed, event, reading)
            for event, original, perturbed in made
            if (genes & set(perturbed)) - set(event)
        ]

    def event(self, ids: list[int], perturbed: list[int], genes: list[int], reading: Reading) -> Event:
        before, after = self.hidden(ids), self.hidden(perturbed)
        all_after = [perturbed[position] for position in gene_positions(np.array(perturbed), self.vocabulary)]
        left = [gene for gene in all_after if gene not in genes]
        gene_values = [cosine(after[perturbed.index(gene)], before[ids.index(gene)]) for gene in left]
        if reading.embedding == "cls":
            cell_after, cell_before = after[0], before[0]
        else:
            counted, counted_after = left, left
            if reading.comparison == "upstream":
                counted = [ids[position] for position in gene_positions(np.array(ids), self.vocabulary)]
                counted_after = all_after
            cell_after = np.mean([after[perturbed.index(gene)] for gene in counted_after], axis=0)
            cell_before = np.mean([before[ids.index(gene)] for gene in counted], axis=0)
        if reading.states:
            values = [cosine(cell_after, state) - cosine(cell_before, state) for state in reading.states.values()]
        elif reading.embedding == "cls":
            values = [cosine(cell_after, cell_before)]
        else:
            values = [float(np.mean(gene_values))]
        return Event(genes, values, left, gene_values)


# ------------------------------------------------------------------ models and cells


@dataclass
class Model:
    """A trunk and its vocabulary."""

    directory: Path
    vocabulary: GeneVocabulary
    parent: GeneVocabulary

    def cells(self, lengths: list[int]) -> list[Cell]:
        """Cells as their vocabulary of origin encodes them, taken up by the model's."""
        cells = random_cells(self.parent, np.random.default_rng(1), lengths)
        return [self.vocabulary.adapt(ids, self.parent.digest) for ids in cells]

    def encoder(self, layer: int = -1) -> Encoder:
        return Encoder.load(self.directory, layer=layer, execution=EXECUTION)

    @property
    def embeddings(self) -> list[str]:
        return ["mean"] if self.vocabulary.cls_id is None else ["mean", "cls"]


@pytest.fixture(scope="module", params=["plain", "special", "extended"])
def model(
    request: pytest.FixtureRequest,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
    tmp_path_factory: pytest.TempPathFactory,
) -> Model:
    """A V1-like model, a V2-like one, and a V1-like one that learned a ``<cls>`` and takes V1's cells."""
    if request.param == "plain":
        return Model(model_directory, vocabulary, vocabulary)
    if request.param == "special":
        return Model(special_model_directory, special_vocabulary, special_vocabulary)
    directory = tmp_path_factory.mktemp("shifts") / "extended"
    classifier, extended = new_classifier(model_directory, vocabulary, ["a", "b"], "cls")
    classifier.save(directory, extended)
    return Model(directory, extended, vocabulary)


@pytest.fixture(scope="module", params=LAYERS, ids="layer {}".format)
def layer(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def encoder(model: Model, layer: int) -> Encoder:
    return model.encoder(layer)


@pytest.fixture(scope="module")
def reference(model: Model, layer: int) -> Reference:
    return Reference(StockTrunk(model.directory), model.vocabulary, layer, model.encoder().max_length)


def make_plan(kind: str, ids: Cell, vocabulary: GeneVocabulary, perturbation: str) -> PerturbationPlan:
    """Plans whose listed genes stand in another order than in the cell; in lists and sets, one is not in it."""
    genes = [int(ids[position]) for position in gene_positions(ids, vocabulary)]
    absent = next(vocabulary.tokens[gene] for gene in vocabulary.genes if vocabulary.tokens[gene] not in genes)
    anchor = genes[1] if "anchor" in kind else None
    shift = 1 + len(genes) % 3
    listed = (genes[4], absent, genes[1], genes[0])
    if kind.endswith("together"):
        return PerturbationPlan(perturbation, (genes[3], genes[0]), True, anchor, rank_shift=shift)
    if kind.endswith("list"):
        return PerturbationPlan(perturbation, listed, anchor=anchor, rank_shift=shift)
    if kind.endswith("pairs"):
        return PerturbationPlan(perturbation, listed, anchor=anchor, combine=2, rank_shift=shift)
    if kind == "sets":
        sets = ((absent, genes[2]), (genes[5],), (genes[-1], genes[3], genes[2]), (genes[-1], absent))
        return PerturbationPlan(perturbation, sets=sets, rank_shift=shift)
    return PerturbationPlan(perturbation, anchor=anchor, rank_shift=shift)


def readings(model: Model) -> list[Reading]:
    options = itertools.product(model.embeddings, COMPARISONS, ({}, STATES), (False, True))
    return [
        Reading(embedding, comparison, states, gene_shifts) for embedding, comparison, states, gene_shifts in options
    ]


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_every_reading_of_every_plan(
    model: Model, encoder: Encoder, reference: Reference, kind: str, perturbation: str
) -> None:
    for ids in model.cells([7, 16] if perturbation != "overexpress" else [7, 15, 16]):
        plan = make_plan(kind, ids, model.vocabulary, perturbation)
        for reading in readings(model):
            ours = shift_cell(encoder, ids, plan, reading, model.vocabulary)
            expected = reference.shifts(ids, plan, reading)
            assert len(expected) > 0
            assert [list(genes) for genes in ours.genes] == [event.genes for event in expected]
            assert ours.values_ES.dtype == np.float32
            np.testing.assert_allclose(ours.values_ES, [event.values for event in expected], atol=TOLERANCE)
            if not reading.gene_shifts:
                assert ours.affected is None
                assert ours.gene_values is None
                continue
            assert ours.affected is not None
            assert ours.gene_values is not None
            assert [genes.tolist() for genes in ours.affected] == [event.affected for event in expected]
            for values, event in zip(ours.gene_values, expected, strict=True):
                np.testing.assert_allclose(values, event.gene_values, atol=TOLERANCE)


def test_the_comparisons_differ_with_states_only(model: Model) -> None:
    """In upstream's way the deleted gene still counts on the original's side."""
    ids, plan, encoder = model.cells([9])[0], PerturbationPlan(), model.encoder()

    def values(**options: object) -> list[np.ndarray]:
        return [
            shift_cell(encoder, ids, plan, Reading(comparison=name, **options), model.vocabulary).values_ES
            for name in COMPARISONS
        ]

    np.testing.assert_array_equal(*values())
    context, upstream = values(states=STATES)
    assert np.abs(context - upstream).max() > 1e-3


def test_batches_change_nothing(model: Model) -> None:
    ids, plan, encoder = model.cells([15])[0], PerturbationPlan(), model.encoder()
    for reading in readings(model):
        whole = shift_cell(encoder, ids, plan, reading, model.vocabulary)
        for tokens in (1, 40, 100):
            cut = shift_cell(encoder, ids, plan, reading, model.vocabulary, budget=TokenBudget(tokens))
            assert cut.genes == whole.genes
            np.testing.assert_allclose(cut.values_ES, whole.values_ES, atol=1e-6)
            if whole.gene_values is not None and cut.gene_values is not None:
                for mine, theirs in zip(cut.gene_values, whole.gene_values, strict=True):
                    np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("kind", ["all", "pairs", "sets", "anchor"])
def test_parts_of_a_cell_are_the_cell(model: Model, perturbation: str, kind: str) -> None:
    """Every event in its place; what a cell lacks is counted once, what leaves no gene wherever it is."""
    ids, encoder = model.cells([12])[0], model.encoder()
    plan, reading = make_plan(kind, ids, model.vocabulary, perturbation), Reading(gene_shifts=True)
    whole = shift_cell(encoder, ids, plan, reading, model.vocabulary)
    events = int(count_events([ids], plan, model.vocabulary)[0])
    cuts = [range(start, min(start + 3, events)) for start in range(0, events, 3)]
    parts = shift_cells(encoder, [ids] * len(cuts), plan, reading, model.vocabulary, parts=cuts)
    assert [genes for part in parts for genes in part.genes] == whole.genes
    np.testing.assert_allclose(np.concatenate([part.values_ES for part in parts]), whole.values_ES, atol=1e-6)
    assert sum(part.skipped for part in parts) == whole.skipped
    assert sum(part.empty for part in parts) == whole.empty


def test_what_is_not_finite_is_counted() -> None:
    values = np.array([[1, 2], [np.nan, 0], [0, np.inf], [0, 0]], np.float32)
    assert CellShifts([(2,), (3,), (4,), (5,)], values).not_finite() == 2
    gene_values = [np.array([1], np.float32)] * 3 + [np.array([np.nan], np.float32)]
    assert CellShifts([(2,), (3,), (4,), (5,)], values, gene_values=gene_values).not_finite() == 3
    assert CellShifts([], np.empty((0, 1), np.float32), [], []).not_finite() == 0


def test_cells_that_cannot_be_perturbed(special_vocabulary: GeneVocabulary) -> None:
    plan, moved = PerturbationPlan(), PerturbationPlan("overexpress")
    inside = np.array([2, 5, 3, 6, 3])
    assert cell_fault(inside, plan, special_vocabulary, 18) == ""
    assert "special token" in cell_fault(inside, moved, special_vocabulary, 18)
    assert "5 tokens, more than 4" in cell_fault(inside, plan, special_vocabulary, 4)
    assert "-1 to 9" in cell_fault(np.array([2, 9, -1]), plan, special_vocabulary, 18)
    assert cell_fault(np.array([], dtype=np.int32), moved, special_vocabulary, 18) == ""


def test_a_v1_cell_in_an_extended_vocabulary(model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    """A full cell loses its last gene to the ``<cls>``; the token itself is never perturbed nor compared."""
    classifier, extended = new_classifier(model_directory, vocabulary, ["a", "b"], "cls")
    classifier.save(tmp_path / "extended", extended)
    full = random_cells(vocabulary, np.random.default_rng(3), [16])[0]
    ids = extended.adapt(full, vocabulary.digest)
    encoder = Encoder.load(tmp_path / "extended", execution=EXECUTION)
    shifts = shift_cell(encoder, ids, PerturbationPlan(), Reading("cls", gene_shifts=True), extended)
    assert [genes[0] for genes in shifts.genes] == full[:15].tolist()
    assert shifts.affected is not None
    assert extended.cls_id not in np.concatenate(shifts.affected)
    assert [len(genes) for genes in shifts.affected] == [14] * 15


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_cell_that_holds_a_gene_twice_is_refused(vocabulary: GeneVocabulary, perturbation: str) -> None:
    """As some of upstream's files do: which of the two is perturbed, and which is compared?"""
    ids, name = np.array([10, 11, 12, 10, 13]), vocabulary.names[10]
    with pytest.raises(InputError, match=f"--cells: got a cell with the gene {name} 2 times; takes each gene once"):
        cell_events(ids, PerturbationPlan(perturbation), vocabulary)
    assert cell_fault(ids, PerturbationPlan(perturbation), vocabulary, 16) == f"the gene {name} 2 times"


# ------------------------------------------------------------------ events without a number


@pytest.mark.parametrize("states", [{}, STATES], ids=["similarity", "states"])
def test_nothing_left_to_compare(model: Model, states: dict[str, np.ndarray]) -> None:
    encoder, columns = model.encoder(), max(1, len(states))
    one, two, six = model.cells([1, 2, 6])
    genes = [int(two[position]) for position in gene_positions(two, model.vocabulary)]
    cases = [
        (one, PerturbationPlan(), 1),
        (two, PerturbationPlan(genes=tuple(genes), together=True), 1),
        (two, PerturbationPlan(anchor=genes[0]), 1),
    ]
    absent = next(token for token in range(len(model.vocabulary) - 2, 3, -1) if token not in six)
    cases += [(six, PerturbationPlan(genes=(absent,)), 1), (six, PerturbationPlan(anchor=absent), 6)]
    for embedding in model.embeddings:
        for ids, plan, events in cases:
            reading = Reading(embedding, states=states, gene_shifts=True)
            shifts = shift_cell(encoder, ids, plan, reading, model.vocabulary)
            assert len(shifts) == 0
            assert shifts.genes == []
            assert shifts.values_ES.shape == (0, columns)
            assert shifts.skipped + shifts.empty == events


def test_two_genes_are_enough(model: Model) -> None:
    shifts = shift_cell(model.encoder(), model.cells([2])[0], PerturbationPlan(), Reading(), model.vocabulary)
    assert len(shifts) == 2


def test_what_is_refused(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    ids = random_cells(vocabulary, np.random.default_rng(0), [5])[0]
    encoder = Encoder.load(model_directory, execution=EXECUTION)
    with pytest.raises(InputError, match="--embedding: got cls for a model without a <cls> token; takes mean"):
        shift_cell(encoder, ids, PerturbationPlan(), Reading("cls"), vocabulary)
    with pytest.raises(InputError, match="--embedding: got median"):
        shift_cell(encoder, ids, PerturbationPlan(), Reading("median"), vocabulary)
    with pytest.raises(InputError, match="--comparison: got both; takes one of context, upstream"):
        Reading(comparison="both")
    with pytest.raises(InputError, match="--perturbation: got knock-in"):
        PerturbationPlan("knock-in")
    with pytest.raises(InputError, match="--together"):
        PerturbationPlan(together=True)


# ------------------------------------------------------------------ which sequences


@st.composite
def cells_and_plans(draw: st.DrawFn) -> tuple[Cell, PerturbationPlan]:
    """Cells of up to nine genes (4 .. 15) between ``<cls>`` and ``<eos>``, and plans of genes that may be in them."""
    genes = draw(st.lists(st.integers(4, 15), unique=True, max_size=9))
    anchor = draw(st.none() | st.integers(4, 15))
    listed = draw(st.none() | st.lists(st.integers(4, 15), unique=True, min_size=1, max_size=4))
    together = listed is not None and draw(st.booleans())
    ids = np.array([2, *genes, 3], dtype=np.int32)
    return ids, PerturbationPlan(genes=None if listed is None else tuple(listed), together=together, anchor=anchor)


@given(case=cells_and_plans(), size=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_deleting_changes_no_order(
    special_vocabulary: GeneVocabulary, case: tuple[Cell, PerturbationPlan], size: int
) -> None:
    """A perturbed cell is the original without the perturbed genes, and kept positions hold the same genes."""
    ids, plan = case
    events = cell_events(ids, plan, special_vocabulary)
    count = 0
    for batch in events.batches(size):
        for row, genes in enumerate(batch.genes_EG):
            perturbed = [token for token in ids.tolist() if token not in genes]
            left = [token for token in perturbed if token > 3]
            assert batch.input_ids_EL[row].tolist() == perturbed
            assert ids[batch.kept_original_EK[row]].tolist() == left
            assert batch.input_ids_EL[row][batch.kept_perturbed_EK[row]].tolist() == left
            count += 1
    assert count == len(events)
    assert count == len(reference_events(ids, plan, special_vocabulary))
    assert count_events([ids, ids], plan, special_vocabulary).tolist() == [count, count]


def test_genes_in_enough_cells(special_vocabulary: GeneVocabulary) -> None:
    cells = [np.array([2, 5, 6, 3]), np.array([2, 7, 5, 3]), np.array([2, 5, 7, 9, 3])]
    assert genes_in_enough_cells(cells, special_vocabulary, 2) == (5, 7)
    assert genes_in_enough_cells(cells, special_vocabulary, 0) == (5, 6, 7, 9)
    with pytest.raises(InputError, match="--min-cells: got 4; takes at most 3"):
        genes_in_enough_cells(cells, special_vocabulary, 4)


# ------------------------------------------------------------------ tables

NAMES = np.array(["<pad>", "<mask>", "A", "B", "C"], dtype=object)


def cell_shifts(genes: list[list[int]], values: list[list[float]]) -> CellShifts:
    return CellShifts([tuple(event) for event in genes], np.array(values, np.float32))


@pytest.fixture
def three_cells() -> list[CellShifts]:
    """Two states; the second cell has no event."""
    return [
        cell_shifts([[2, 3], [2, 4]], [[0.5, -0.5], [0.25, 0]]),
        CellShifts([], np.empty((0, 2), np.float32)),
        cell_shifts([[2, 4]], [[1, 2]]),
    ]


def test_cell_shift_rows(three_cells: list[CellShifts]) -> None:
    """Cell by cell, event by event, state by state."""
    table = cell_shift_rows(["c1", "c2", "c3"], three_cells, ["goal", "start"], NAMES)
    assert table.column_names == ["cell_id", "genes", "measure", "state", "value"]
    assert table.schema == CELL_SHIFTS
    assert table.schema.field("value").type == pa.float32()
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("c1", ["A", "B"], "shift", "goal", 0.5),
        ("c1", ["A", "B"], "shift", "start", -0.5),
        ("c1", ["A", "C"], "shift", "goal", 0.25),
        ("c1", ["A", "C"], "shift", "start", 0.0),
        ("c3", ["A", "C"], "shift", "goal", 1.0),
        ("c3", ["A", "C"], "shift", "start", 2.0),
    ]


def test_cell_shift_rows_without_states() -> None:
    shifts = [CellShifts([(4,), (2,)], np.array([[0.75], [1]], np.float32))]
    table = cell_shift_rows(["c1"], shifts, [], NAMES)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("c1", ["C"], "similarity", "", 0.75),
        ("c1", ["A"], "similarity", "", 1.0),
    ]


def test_gene_shift_rows(three_cells: list[CellShifts]) -> None:
    first = CellShifts(
        [(2,), (3,)],
        np.zeros((2, 1), np.float32),
        list(np.array([[3, 4], [2, 4]], np.int32)),
        list(np.array([[0.5, 1], [0.25, 0]], np.float32)),
    )
    table = gene_shift_rows(["c1", "c2"], [first, three_cells[1]], NAMES)
    assert table.column_names == ["cell_id", "genes", "affected", "value"]
    assert table.schema == GENE_SHIFTS
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("c1", ["A"], "B", 0.5),
        ("c1", ["A"], "C", 1.0),
        ("c1", ["B"], "A", 0.25),
        ("c1", ["B"], "C", 0.0),
    ]


def test_tables_of_no_cells(three_cells: list[CellShifts]) -> None:
    nothing = three_cells[1:2]
    for table in (cell_shift_rows([], [], ["goal"], NAMES), cell_shift_rows(["c2"], nothing, ["a", "b"], NAMES)):
        assert table.num_rows == 0
        assert table.schema == CELL_SHIFTS
    for table in (gene_shift_rows([], [], NAMES), gene_shift_rows(["c2"], nothing, NAMES)):
        assert table.num_rows == 0
        assert table.schema == GENE_SHIFTS


def test_rows_name_what_was_measured(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    """From a cell to its rows: every gene of the cell once, under the vocabulary's keys."""
    ids = random_cells(vocabulary, np.random.default_rng(5), [6])[0]
    encoder = Encoder.load(model_directory, execution=EXECUTION)
    shifts = shift_cell(encoder, ids, PerturbationPlan(), Reading(states=STATES), vocabulary)
    names = np.array(vocabulary.names, dtype=object)
    rows = cell_shift_rows(["c"], [shifts], list(STATES), names).to_pylist()
    keys = [vocabulary.names[token] for token in ids]
    assert [(row["genes"], row["state"]) for row in rows] == [([key], state) for key in keys for state in STATES]
    np.testing.assert_array_equal([row["value"] for row in rows], shifts.values_ES.ravel())
