"""The house: floors, who may import what, what a module offers, and the flags that scripts rely on."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from ray_jobs.command_line import JobConfig

ROOT = Path(__file__).resolve().parents[2]
# From the lowest floor up; a file imports only from its own floor or a lower one.
FLOORS = ("data", "compute", "manage", "distribute")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("geneformer_ray", "ray_jobs", "serve")
    for path in sorted((ROOT / package).rglob("*.py"))
}
LIBRARY = [name for name in MODULES if name.startswith("geneformer_ray.")]
LINES_AT_MOST = 350


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Every module or name that a file imports anywhere, also inside functions and for type checkers alone."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def floor(name: str) -> int | None:
    """The floor of a module or name of the library; None for what lies beside the stairs, such as its errors."""
    parts = name.split(".")
    if name == "geneformer_ray.__init__":
        return FLOORS.index("compute")  # it offers what a notebook needs, which is no more
    return FLOORS.index(parts[1]) if parts[0] == "geneformer_ray" and parts[1] in FLOORS else None


def has_code(module: str) -> bool:
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in tree(module).body)


def is_job(module: str) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree(module).body)


@functools.cache
def offered(module: str) -> list[str] | None:
    """A module's ``__all__``."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def defined(module: str) -> set[str]:
    """The names that a module binds at its top level, or there for type checkers alone."""
    found: set[str] = set()
    body = tree(module).body
    for node in [*body, *(inner for outer in body if isinstance(outer, ast.If) for inner in outer.body)]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


# ---------------------------------------------------------------------- floors


def test_there_is_a_house() -> None:
    assert {floor(name) for name in LIBRARY} >= set(range(len(FLOORS)))
    assert {"ray_jobs.screen", "serve.app"} <= MODULES.keys()
    assert {"geneformer_ray.data.storage", "geneformer_ray.errors.InputError"} <= set(imports("ray_jobs.screen_flags"))


@pytest.mark.parametrize("module", LIBRARY)
def test_a_file_imports_from_its_own_floor_or_a_lower_one(module: str) -> None:
    own = floor(module)
    for name in imports(module):
        # What lies beside the stairs serves every floor, so it may stand on none.
        assert (floor(name) or 0) <= (own or 0), f"{module} imports {name}"
        assert own is not None or floor(name) is None, f"{module} imports {name}"


@pytest.mark.parametrize("module", LIBRARY)
def test_only_the_top_floor_imports_ray(module: str) -> None:
    assert floor(module) == FLOORS.index("distribute") or "ray" not in roots(module)


@pytest.mark.parametrize("module", [name for name in LIBRARY if floor(name) in (None, 0, 1)])
def test_the_lower_floors_need_neither_tracking_nor_a_web_server(module: str) -> None:
    assert not roots(module) & {"ray", "mlflow", "fastapi"}


def test_the_library_knows_nothing_of_those_who_use_it() -> None:
    for module in LIBRARY:
        assert not roots(module) & {"ray_jobs", "serve", "benchmarks", "tests"}, module


def test_jobs_and_serving_never_import_each_other() -> None:
    for module in MODULES:
        package = module.split(".")[0]
        assert package != "serve" or "ray_jobs" not in roots(module), module
        assert package != "ray_jobs" or "serve" not in roots(module), module


@pytest.mark.parametrize("module", [name for name in MODULES if "mlflow" in roots(name)])
def test_pickles_are_off_wherever_mlflow_is_used(module: str) -> None:
    registry = "geneformer_ray.manage.registry"
    # MLflow runs these itself, once it has decided to load them.
    flavours = ("geneformer_ray.manage.pyfunc_model", "geneformer_ray.manage.gene_pyfunc_model")
    assert module in (registry, *flavours) or any(name.startswith(f"{registry}.") for name in imports(module))


# ---------------------------------------------------------------------- modules


@pytest.mark.parametrize("module", [name for name in MODULES if has_code(name) and not is_job(name)])
def test_a_module_says_what_it_offers(module: str) -> None:
    names = offered(module)
    if names is None:
        # A package whose file only prepares the import of its modules offers nothing itself.
        assert module.endswith(".__init__"), f"{module} has no __all__"
        return
    assert len(names) == len(set(names))
    assert set(names) <= defined(module)


def test_what_other_modules_import_is_offered() -> None:
    for module in MODULES:
        for name in imports(module):
            source, _, attribute = name.rpartition(".")
            if source in MODULES and not is_job(source):
                assert attribute in (offered(source) or []), f"{module} imports {name}, which is not in its __all__"


def test_the_library_gives_every_name_that_it_offers() -> None:
    library = importlib.import_module("geneformer_ray")
    for name in library.__all__:
        assert getattr(library, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        library.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", LIBRARY)
def test_a_module_can_be_read_in_one_go(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LINES_AT_MOST


# ---------------------------------------------------------------------- flags

# Scripts elsewhere rely on these. A flag may be added; none of them goes away or changes its name.
FLAGS = {
    "tokenize.TokenizeConfig": (
        "config overwrite input vocabulary output obs-columns max-length counts gene-column cell-id-prefix "
        "allow-non-integer"
    ),
    "vocabulary.VocabularyConfig": (
        "config overwrite input vocabulary output genes min-cells special-tokens max-length counts gene-column "
        "allow-non-integer"
    ),
    "pretrain.PretrainConfig": "config overwrite cells vocabulary output model group validation-groups lora-rank",
    "finetune.FinetuneConfig": (
        "config overwrite cells label group filter model vocabulary pooling num-workers seeds output registered-model "
        "task gene-classes task-weights token-predictions lora-rank max-cells split-seed"
    ),
    "pooling_study.PoolingStudyConfig": (
        "config overwrite cells label group filter model vocabulary pooling num-workers seeds output bootstrap"
    ),
    "embed.EmbedConfig": "config overwrite cells filter model vocabulary embedding layer state-column output",
    "screen.ScreenConfig": (
        "config overwrite cells filter model vocabulary output perturbation genes gene-sets together combine anchor "
        "rank-shift embedding layer comparison gene-shifts gene-shifts-summary state-column start goal alternatives "
        "state-embeddings precision max-cells seed ranks decompose method tolerance most-cost held-out top controls "
        "control-cells"
    ),
    "statistics.StatisticsConfig": "config overwrite shifts output test null against cells group measure",
    "promote.PromoteConfig": "config overwrite registered-model version margin allow-change rollback",
    "register.RegisterConfig": "config overwrite output registered-model",
    "doctor.DoctorConfig": (
        "config overwrite ray-address jobs-address storage tracking-uri registry-uri registered-model api-keys-file "
        "host port model vocabulary local"
    ),
}
REQUIRED = {
    "tokenize.TokenizeConfig": "input vocabulary output",
    "vocabulary.VocabularyConfig": "output",
    "pretrain.PretrainConfig": "cells output",
    "finetune.FinetuneConfig": "cells model output",
    "pooling_study.PoolingStudyConfig": "output",
    "embed.EmbedConfig": "cells model output",
    "screen.ScreenConfig": "cells model output",
    "statistics.StatisticsConfig": "shifts output",
    "promote.PromoteConfig": "registered-model",
    "register.RegisterConfig": "output",
    "doctor.DoctorConfig": "",
}
# The choices of a flag, the default first.
CHOICES = {
    "screen.ScreenConfig perturbation": ("delete", "overexpress", "inhibit", "activate"),
    "screen.ScreenConfig embedding": ("mean", "cls"),
    "screen.ScreenConfig layer": (-1, 0),
    "screen.ScreenConfig comparison": ("context", "upstream"),
    "screen.ScreenConfig precision": ("fp32", "bf16", "auto"),
    "screen.ScreenConfig ranks": ("shift", "hold"),
    "screen.ScreenConfig method": ("exact", "first_order", "verified"),
    "embed.EmbedConfig embedding": ("mean", "cls", "gene"),
    "embed.EmbedConfig layer": (-1, 0),
    "statistics.StatisticsConfig measure": ("shift", "shift_gene", "shift_rank"),
    "statistics.StatisticsConfig test": (
        "goal_shift", "vs_null", "mixture", "aggregate", "gene_shifts", "combination", "concordance",
    ),
}  # fmt: skip


def config(job: str) -> type[JobConfig]:
    module, name = job.split(".")
    kind: type[JobConfig] = getattr(importlib.import_module(f"ray_jobs.{module}"), name)
    return kind


@pytest.mark.parametrize("job", FLAGS)
def test_the_flags_that_scripts_rely_on_are_there(job: str) -> None:
    fields = config(job).model_fields
    flags = {name.replace("_", "-") for name in fields} | {"config"}
    assert set(FLAGS[job].split()) <= flags
    # A new required flag would break every script.
    required = {name.replace("_", "-") for name, field in fields.items() if field.is_required()}
    assert required == set(REQUIRED[job].split())


@pytest.mark.parametrize("flag", CHOICES)
def test_choices_and_defaults_stay(flag: str) -> None:
    job, name = flag.split()
    field = config(job).model_fields[name]
    assert set(get_args(field.annotation)) >= set(CHOICES[flag])
    assert field.default == CHOICES[flag][0]


def test_a_screen_without_flags_takes_all_genes_of_every_cell() -> None:
    fields = config("screen.ScreenConfig").model_fields
    assert (fields["genes"].default, fields["max_cells"].default, fields["together"].default) == ("all", None, False)
