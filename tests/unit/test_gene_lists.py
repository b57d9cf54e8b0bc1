"""Files of genes: lists, and sets in GMT form."""

from __future__ import annotations

from pathlib import Path

import pytest

from geneformer_ray.data.gene_lists import read_gene_list, read_gene_sets
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from ray_jobs.screen_flags import ScreenConfig, perturbation_plan


def test_a_list_is_one_gene_a_line(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("# markers\nARX\n\n  IRX2 \r\nAC004556.3\n")
    assert read_gene_list(str(tmp_path / "genes.txt")) == ["ARX", "IRX2", "AC004556.3"]


def test_sets_are_read_from_gmt(tmp_path: Path) -> None:
    (tmp_path / "sets.gmt").write_text("alpha\thttp://somewhere\tARX\tIRX2\n\nbeta\t\tPDX1\t\n")
    assert read_gene_sets(str(tmp_path / "sets.gmt")) == {"alpha": ["ARX", "IRX2"], "beta": ["PDX1"]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("alpha ARX IRX2\n", "line 1 of"),
        ("alpha\tonly a description\n", "line 1 of"),
        ("a\t\tARX\na\t\tPDX1\n", "the set a twice"),
        ("\n", "without sets"),
    ],
)
def test_what_is_no_gmt_is_refused(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "sets.gmt").write_text(content)
    with pytest.raises(InputError, match=f"--gene-sets.*{text}"):
        read_gene_sets(str(tmp_path / "sets.gmt"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--genes.*nowhere"):
        read_gene_list(str(tmp_path / "nowhere"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"--genes.*readable text"):
        read_gene_list(str(tmp_path / "binary"))


def test_a_list_longer_than_a_file_name_is_a_list(vocabulary: GeneVocabulary) -> None:
    config = ScreenConfig(cells="c", model="m", output="o", genes=",".join(vocabulary.genes))
    plan = perturbation_plan(config, vocabulary, [])
    assert plan.genes == tuple(vocabulary.tokens[gene] for gene in vocabulary.genes)
