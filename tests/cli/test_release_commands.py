"""``splitserve release``, ``releases`` and ``rollback``, as a person calls them."""

import shutil
from pathlib import Path

import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from splitserve import publish, publish_preprocessor
from tests.command_line import run_command
from tests.folders import MadeOnce

pytestmark = pytest.mark.heavy  # they publish

IRIS, SPECIES = load_iris(return_X_y=True)


@pytest.fixture
def models(made_once: MadeOnce, tmp_path: Path) -> Path:
    """Released as 1.1, with two more preprocessors: one of the same numbers, one of others."""
    return Path(shutil.copytree(made_once(publish_models), tmp_path, dirs_exist_ok=True))


def publish_models(repository: Path) -> None:
    publish(make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES), IRIS, name="m", repository=repository)
    for scaler in (StandardScaler(), MinMaxScaler()):
        publish_preprocessor(make_pipeline(scaler).fit(IRIS), IRIS, name="m", repository=repository)


def test_without_yes_a_release_is_shown_and_not_recorded(models: Path) -> None:
    result = run_command("release", "m", "2.1", "-r", models)

    assert result.exit_code == 0
    assert "m 2.1: the halves fit; " in result.stdout
    assert "features: equal to those trained on" in result.stdout
    assert "against release 1 (1.1), on its" in result.stdout
    assert "labels that change: 0" in result.stdout
    assert 'output "probabilities": largest change' in result.stdout
    assert "nothing was recorded; --yes records the release" in result.stdout
    assert "2.1" not in run_command("releases", "m", "-r", models).stdout


def test_with_yes_it_is_recorded_and_listed(models: Path) -> None:
    result = run_command("release", "m", "2.1", "-r", models, "--yes")

    listed = run_command("releases", "m", "-r", models)
    assert result.exit_code == listed.exit_code == 0
    assert "released m 2.1 as release 2" in result.stdout
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert [(line[0], line[1], line[3]) for line in lines[1:]] == [("1", "1.1", "pipeline"), ("2", "2.1", "halves")]
    assert lines[2][-1] == "current"
    assert "current" not in lines[1]


def test_changed_features_are_refused_unless_they_are_accepted(models: Path) -> None:
    refused = run_command("release", "m", "3.1", "-r", models, "--yes")
    accepted = run_command("release", "m", "3.1", "-r", models, "--yes", "--accept-changed-features")

    assert refused.exit_code == 1
    assert "features that differ from those trained on: 4" in refused.stdout
    assert "--accept-changed-features" in refused.stderr
    assert accepted.exit_code == 0
    assert "changed features" in run_command("releases", "m", "-r", models).stdout


def test_rollback_and_withdraw_change_what_serves(models: Path) -> None:
    run_command("release", "m", "2.1", "-r", models, "--yes")

    rolled = run_command("rollback", "m", "-r", models)
    withdrawn = run_command("release", "--withdraw", "m", "2", "-r", models)

    assert "rolled m back from release 2 to 1.1, as release 3" in rolled.stdout
    assert "withdrew release 2 of m (2.1); recorded as 4" in withdrawn.stdout
    listed = run_command("releases", "m", "-r", models).stdout
    assert "withdraws 2" in listed
    assert "current, rolls back 2" in listed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("release", "m", "9.9"), "m/preprocess/9"),
        (("release", "m", "one"), "expected the text K.M"),
        (("release", "none", "1.1"), "none/preprocess/1"),
        (("release", "--withdraw", "m", "9"), "release 9 does not exist"),
        (("release", "--withdraw", "m", "1.1"), "expected the sequence number of a release; splitserve releases m lists them"),
        (("rollback", "m"), "no release before 1 (1.1) can be rolled back to"),
        (("rollback", "none"), "none: has no release"),
        (("releases", "none"), "none: no releases in"),
    ],
)
def test_errors_exit_with_status_1(models: Path, arguments: tuple[str, ...], complaint: str) -> None:
    result = run_command(*arguments, "-r", models)

    assert result.exit_code == 1
    assert complaint in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("rollback", "m"), ("releases", "m"), ("release", "m", "1.1"), ("release", "--withdraw", "m", "1"), ("models",)],
    ids=lambda arguments: " ".join(arguments),
)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_repository_that_does_not_exist_is_named(tmp_path: Path, arguments: tuple[str, ...], prefix: str) -> None:
    """A mistyped path is not a model without releases."""
    nowhere = f"{prefix}{tmp_path / 'nowhere'}"

    result = run_command(*arguments, "-r", nowhere)

    assert (result.exit_code, result.stderr) == (1, f"{nowhere}: no such folder\n")
    assert not (tmp_path / "nowhere").exists()


def test_own_rows_are_compared(models: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "more.npy", IRIS[:40] * 2)

    few = run_command("release", "m", "2.1", "-r", models).stdout
    more = run_command("release", "m", "2.1", "-r", models, "--rows", tmp_path / "more.npy").stdout

    assert int(more.split("fit; ")[1].split()[0]) == int(few.split("fit; ")[1].split()[0]) + 40


def test_models_says_what_is_released_and_what_is_not(models: Path) -> None:
    """The current release, the earlier ones, and versions that no release names."""
    run_command("release", "m", "2.1", "-r", models, "--yes")

    listed = run_command("models", "-r", models)

    line = " ".join(listed.stdout.splitlines()[-1].split())
    assert (listed.exit_code, line) == (0, "m 2 2.1 1 (1.1) preprocess 3")


def test_models_lists_a_model_of_which_only_releases_are_there(models: Path) -> None:
    """A copy in progress."""
    for kind in ("preprocess", "predict"):
        shutil.rmtree(models / "m" / kind)

    listed = run_command("models", "-r", models)

    assert (listed.exit_code, " ".join(listed.stdout.splitlines()[-1].split())) == (0, "m 1 1.1 - -")


def test_models_names_a_record_that_cannot_be_read(models: Path) -> None:
    (models / "m" / "releases" / "0001-1.1" / "manifest.json").write_text("{}")

    listed = run_command("models", "-r", models)

    assert listed.exit_code == 1
    assert "m/releases/0001-1.1: manifest.json" in listed.stderr
    assert "none" in listed.stdout.splitlines()[-1]


def test_a_withdrawal_says_what_serves_then(models: Path) -> None:
    """A pair may have another release; what was rolled back may be current again; and nothing may be left."""
    run_command("release", "m", "2.1", "-r", models, "--yes")
    run_command("rollback", "m", "-r", models)

    rolled_back = run_command("release", "--withdraw", "m", "3", "-r", models)
    older = run_command("release", "--withdraw", "m", "1", "-r", models)
    last = run_command("release", "--withdraw", "m", "2", "-r", models)

    assert "m: 1.1 still serves, since release 1 names it too" in rolled_back.stderr
    assert "m: the current release is now 2 (2.1), which release 3 had rolled back" in rolled_back.stderr
    assert older.stderr == ""
    assert "m: no release is left, so it does not serve any more" in last.stderr


def test_what_a_route_pins_is_said_wherever_the_current_release_is_shown(models: Path) -> None:
    run_command("release", "m", "2.1", "-r", models, "--yes")
    (models / "m" / "route.json").write_text('{"pairs": [{"pair": "1.1"}]}')
    pinned = "m: route.json pins 1.1: requests that name no version get it, not release 2 (2.1)"

    assert pinned in run_command("releases", "m", "-r", models).stderr
    assert pinned in run_command("models", "-r", models).stderr
    assert "against release 1 (1.1), on its" in run_command("release", "m", "2.1", "-r", models).stdout

    (models / "m" / "route.json").write_text('{"pairs": [{"pair": "9.9"}]}')
    assert (
        "m: route.json pins 9.9, which has no release, so it is not followed" in run_command("releases", "m", "-r", models).stderr
    )

    (models / "m" / "route.json").write_text("{")
    assert "m: route.json: " in run_command("releases", "m", "-r", models).stderr


def test_a_record_beside_signed_ones_has_to_be_signed(models: Path, tmp_path: Path) -> None:
    """Services with the key do not follow it before, which an operator who withdraws a release must know."""
    (models / "m" / "releases" / "0001-1.1" / "model.sig").write_text("{}")

    added = run_command("release", "m", "2.1", "-r", models, "--yes")
    withdrawn = run_command("release", "--withdraw", "m", "1", "-r", models)

    assert "m/releases/0002-2.1 is not signed: services with MODEL_SIGNATURE_KEY do not follow it until" in added.stderr
    assert "m/releases/0003-1.1 is not signed" in withdrawn.stderr


def test_publishing_beside_a_pin_says_that_it_is_not_the_default(models: Path) -> None:
    (models / "m" / "route.json").write_text('{"pairs": [{"pair": "1.1"}]}')

    published = publish(make_pipeline(MinMaxScaler(), LogisticRegression()).fit(IRIS, SPECIES), IRIS, name="m", repository=models)

    assert "m: route.json pins 1.1: requests that name no version get it, not release 2 (4.2)" in str(published)
