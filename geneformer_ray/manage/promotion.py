"""Which registered version is the champion: chosen on some cells, admitted on others, and taken back in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import ModelVersion, check_name, version_of_alias, versions_of

__all__ = [
    "CHAMPION",
    "CHOOSING_METRIC",
    "LABELS_TAG",
    "PREVIOUS",
    "REPORTING_METRIC",
    "SPLIT_TAG",
    "TEST_TAG",
    "VOCABULARY_TAG",
    "Promotion",
    "promote",
    "rollback",
]

CHAMPION, PREVIOUS = "champion", "previous"
# Two metrics for two questions. Which of many new versions is the candidate: macro F1 on the choosing cells, so that
# the reporting cells are not searched for a lucky version. Whether this one candidate is better than the champion:
# macro F1 on the reporting cells, the only ones on which neither of the two was chosen. Asked once a candidate, that
# leaves them nearly untouched; whoever promotes many times on one test should hold out new cells now and then.
CHOOSING_METRIC, REPORTING_METRIC = "choosing_macro_f1", "reporting_macro_f1"
SPLIT_TAG, TEST_TAG = "split_digest", "test_digest"
LABELS_TAG, VOCABULARY_TAG = "labels_digest", "vocabulary_digest"
KEPT = {LABELS_TAG: "label set", VOCABULARY_TAG: "vocabulary"}


@dataclass(frozen=True)
class Promotion:
    """What came of it.

    Parameters
    ----------
    champion
        The champion now.
    previous
        The version that a rollback goes to; None where there is none.
    candidate
        The version that asked.
    promoted
        Whether it became the champion.
    reason
        Why, or why not.
    """

    champion: ModelVersion
    previous: int | None
    candidate: ModelVersion
    promoted: bool
    reason: str


def promote(name: str, version: int | None = None, *, margin: float = 0.0, allow_change: bool = False) -> Promotion:
    """Make a version the champion if it beats the present one; that one becomes ``previous``.

    Parameters
    ----------
    name
        The registered model.
    version
        The candidate; by default the version with the highest macro F1 on the choosing cells, among those with the
        newest version's split: figures compare only on the same cells.
    margin
        By how much more than this its macro F1 on the reporting cells must exceed the champion's.
    allow_change
        Admit a candidate of another label set or vocabulary, or measured on other cells. On other cells there is
        nothing to compare, so it is promoted unseen.

    Raises
    ------
    InputError
        If there is no such version, or it and the champion cannot be compared.
    """
    versions = versions_of(check_name(name))
    candidate = _best(name, versions) if version is None else _numbered(versions, version)
    number = version_of_alias(name, CHAMPION)
    if number is None:
        return _crown(name, candidate, None, "there was no champion")
    champion = _numbered(versions, number)
    if candidate.version == champion.version:
        return _stay(name, champion, candidate, f"version {number} is the champion already")
    changed = [what for tag, what in KEPT.items() if _differ(candidate, champion, tag)]
    retested = _differ(candidate, champion, TEST_TAG)
    if (changed or retested) and not allow_change:
        other = [f"another {what}" for what in changed] + ["other reporting cells"] * retested
        got = f"version {candidate.version}, which has {' and '.join(other)} than champion {champion.version}"
        takes = f"--version {candidate.version} --allow-change, or a version trained on the champion's cells and labels"
        raise InputError("--registered-model" if version is None else "--version", got, takes)
    if retested:
        return _crown(name, candidate, champion, "other reporting cells, so that nothing was compared: --allow-change")
    theirs, ours = _measured(champion), _measured(candidate)
    gain = round(ours - theirs, 6)  # as exact as the tags are
    compared = f"reporting macro F1 {ours:.4f} against {theirs:.4f} of champion {champion.version}"
    if gain > margin:
        return _crown(name, candidate, champion, f"{compared}, more than {margin:g} better")
    return _stay(name, champion, candidate, f"{compared}, not more than {margin:g} better")


def rollback(name: str) -> Promotion:
    """Make the previous champion the champion again, unasked; the two change places."""
    versions = versions_of(check_name(name))
    previous, number = version_of_alias(name, PREVIOUS), version_of_alias(name, CHAMPION)
    if previous is None:
        raise InputError("--rollback", f"{name} without a previous champion", "a model that was promoted twice")
    champion = _numbered(versions, previous)
    # In this order: if the second step fails, the champion that was not wanted is gone already.
    _set_alias(name, CHAMPION, previous)
    if number is not None:
        _set_alias(name, PREVIOUS, number)
    return Promotion(champion, version_of_alias(name, PREVIOUS), champion, True, "rolled back")


def _best(name: str, versions: list[ModelVersion]) -> ModelVersion:
    split = versions[-1].tags.get(SPLIT_TAG)
    measured = [
        (value, version.version, version)
        for version in versions
        if version.tags.get(SPLIT_TAG) == split and not math.isnan(value := _metric(version, CHOOSING_METRIC))
    ]
    if not measured:
        raise InputError("--version", "nothing", f"a version: none of {name} is tagged with {CHOOSING_METRIC}")
    return max(measured)[2]


def _numbered(versions: list[ModelVersion], number: int) -> ModelVersion:
    for version in versions:
        if version.version == number:
            return version
    raise InputError("--version", number, f"one of {', '.join(str(item.version) for item in versions)}")


def _metric(version: ModelVersion, tag: str) -> float:
    return float(version.tags.get(tag, "nan"))


def _measured(version: ModelVersion) -> float:
    value = _metric(version, REPORTING_METRIC)
    if math.isnan(value):
        raise InputError("--version", f"version {version.version} without {REPORTING_METRIC}", "versions of finetune")
    return value


def _differ(one: ModelVersion, other: ModelVersion, tag: str) -> bool:
    """Whether two versions differ in a digest; one that does not carry it might."""
    return tag not in one.tags or one.tags[tag] != other.tags.get(tag)


def _crown(name: str, candidate: ModelVersion, former: ModelVersion | None, reason: str) -> Promotion:
    if former is not None:
        # First: a failure between the two steps leaves a champion, and promoting once more mends the rest.
        _set_alias(name, PREVIOUS, former.version)
    _set_alias(name, CHAMPION, candidate.version)
    return Promotion(candidate, version_of_alias(name, PREVIOUS), candidate, True, reason)


def _stay(name: str, champion: ModelVersion, candidate: ModelVersion, reason: str) -> Promotion:
    return Promotion(champion, version_of_alias(name, PREVIOUS), candidate, False, reason)


def _set_alias(name: str, alias: str, version: int) -> None:
    import mlflow

    mlflow.MlflowClient().set_registered_model_alias(name, alias, str(version))
