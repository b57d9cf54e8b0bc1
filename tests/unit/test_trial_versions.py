"""What runs and versions of every training say, whether it learned labels or classes of genes."""

from __future__ import annotations

from geneformer_ray.manage.trial_versions import parameters_of, trial_tags, what_finishes

PLAN = {
    "label": ["type", "sex"], "task_weights": {"type": 1.0, "sex": 0.5}, "workers": 2, "split": "left out",
    "lora": {"rank": 2, "alpha": 4.0}, "options": {"epochs": 3},
}  # fmt: skip
SCORES = {role: {"macro_f1": value, "accuracy": 0.5} for role, value in (("choosing", 0.25), ("reporting", 0.75))}


def test_parameters_are_entries_of_the_plan_its_adapters_and_its_options() -> None:
    assert parameters_of(PLAN, ("label", "task_weights", "workers", "folds")) == {
        "label": "type, sex", "task_weights": "type=1, sex=0.5", "workers": 2, "lora_rank": 2, "lora_alpha": 4.0,
        "epochs": 3,
    }  # fmt: skip


def test_a_version_says_where_its_adapters_lie_if_it_has_some() -> None:
    tags = trial_tags(PLAN, "/out/trials/one", SCORES)
    assert tags == {
        "choosing_macro_f1": "0.250000", "reporting_macro_f1": "0.750000", "reporting_accuracy": "0.500000",
        "model_directory": "/out/trials/one/model", "adapters": "/out/trials/one/adapters",
    }  # fmt: skip
    assert "adapters" not in trial_tags({}, "/out/trials/one", SCORES)


def test_what_finishes_a_job_can_be_pasted() -> None:
    assert "`python -m ray_jobs.register --output '/my out' --registered-model m`" in what_finishes("/my out", "m")
    assert "--registered-model" not in what_finishes("/out", None)
