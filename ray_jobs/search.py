"""Search a space of hyper-parameters with Ray Tune's ASHA, then train the best setting again and register it.

Trials are compared on the choosing cells alone; the best setting is trained again as finetune would, and reported on
cells that nothing was chosen on. A search that was stopped or killed goes on where it was by the same command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.search_space import Range
from geneformer_ray.data import storage
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.learned_labels import learn_labels
from geneformer_ray.distribute.search import search_trials
from geneformer_ray.distribute.train_workers import discard_checkpoints
from geneformer_ray.errors import RegistryUnavailable
from geneformer_ray.manage.registry import open_store, without_credentials
from geneformer_ray.manage.search_journal import Journal
from geneformer_ray.manage.search_record import SearchRecord
from geneformer_ray.manage.trained_run import TrainedRun
from geneformer_ray.manage.trial_records import log_trained_run
from geneformer_ray.manage.trials import Trial
from geneformer_ray.progress import say
from ray_jobs import finetune
from ray_jobs.command_line import main
from ray_jobs.search_flags import SearchConfig, check_flags, final_flags, read_space, shown, trial_flags
from ray_jobs.training_inputs import TrainingInputs

if TYPE_CHECKING:
    from ray_jobs.finetune_flags import FinetuneConfig

__all__ = ["SearchConfig", "check_flags", "run"]

THEN = "the search and its models are safe in {}: once it answers, the same command finishes the job"


def run(config: SearchConfig) -> dict[str, Any]:
    """Search, train the best setting again, and record it all in MLflow."""
    check_flags(config)
    space = read_space(config)
    inputs = TrainingInputs.open(config)
    output, settings = inputs.output, trial_flags(config, space, inputs.model.config)
    values = [its for its, _ in settings]
    (split,) = config.splits(inputs.table)
    plan = inputs.plan(config) | {
        "job": "search",
        **config.labels_in_plan(),
        "group": config.group,
        "groups": split.groups,
        "labels": split.labels,
        "split": split.digest,
        "pooling": config.pooling,
        "seeds": config.seeds,
        "values": [{name: shown(value) for name, value in its.items()} for its in values],
        **{name: getattr(config, name) for name in ("draw_seed", "grace_epochs", "reduction", "final_seeds")},
    }
    sources = [inputs.cells, inputs.model.source]
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=sources)
    tracking = without_credentials(open_store(inputs.store))
    say(f"MLflow: {tracking}")
    learned = learn_labels(split, config.weights())
    configs = []
    for number, (_, flags) in enumerate(settings):
        trial = Trial(flags.pooling[0], flags.seeds[0])
        its = {"trial": trial, "learned": learned, "output": storage.join(output, "search", f"{number:03d}")}
        configs.append(inputs.worker_config(flags) | its)
    journal = Journal(storage.join(output, "search"))
    with connected():
        search_trials(
            configs, journal, config.halving(), workers=config.workers(), output=output, precision=config.precision
        )
        record = SearchRecord(
            output, plan, journal, learned.chosen_by, config.epochs, values,
            [storage.join(its["trial"].directory(its["output"]), "history.json") for its in configs],
            [name for name, entry in space.entries.items() if isinstance(entry, Range) and entry.log],
        )  # fmt: skip
        files, found = record.write(), record.summary()
        say(f"\n{record.table.to_string(index=False)}\n")
        best = found["best"]
        say("best: trial {}, {}".format(best["trial"], ", ".join(f"{k} {shown(v)}" for k, v in best["values"].items())))
        final = _train_again(final_flags(config, best["values"], storage.join(output, "best")))
    run_id = record.log_runs(final, config.registered_model, THEN.format(output))
    summary = {**found, "search_run": run_id, "final": final, "files": files, "output": output, "mlflow": tracking}
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


def _train_again(flags: FinetuneConfig) -> dict[str, Any]:
    """Train and register the best setting, unless an earlier attempt has; give finetune's summary."""
    manifest = storage.join(flags.output, storage.MANIFEST)
    found: dict[str, Any] = storage.read_json(manifest) if storage.exists(manifest) else {}
    try:
        if found.get("finished"):
            # Asked again, for this attempt may register under another name than the one that trained.
            return {**found["summary"], **log_trained_run(TrainedRun.load(flags.output), flags.registered_model)}
        return finetune.run(flags)
    except RegistryUnavailable as error:
        raise RegistryUnavailable(error.store, error.why, THEN.format(flags.output.rpartition("/")[0])) from error


if __name__ == "__main__":
    main(SearchConfig, run, __doc__ or "")
