"""The experiment file: what it means, what is refused with which message, and that it survives writing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lvmppl.document import Dumper, Loader, read_document
from lvmppl.errors import InputError
from lvmppl.options import EMOptions, SVIOptions
from lvmppl.spec import Experiment, load_experiment, shipped_experiments, to_yaml

GOOD = """\
name: two-ways
seed: 3
data:
  source: rows.csv
  columns: {x: [a, b], y: c}
  test_fraction: 0.25
model:
  use: gaussian_mixture
  args: {num_components: 2}
fits:
  em: {algorithm: em, tolerance: 1e-5, restarts: 2}
  network:
    algorithm: svi
    guide: {use: "file.py:q", args: {hidden: [8, 4]}}
    start_from: em
    freeze: [weights]
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "two.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def message(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The error of a file, its folder left out."""
    with pytest.raises(InputError) as caught:
        load_experiment(write(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_experiment_has_the_values_of_its_file(tmp_path: Path) -> None:
    experiment, base = load_experiment(write(tmp_path, GOOD))
    assert base == tmp_path
    assert (experiment.name, experiment.seed, experiment.dtype) == ("two-ways", 3, "float64")
    assert experiment.data.columns == {"x": ["a", "b"], "y": "c"}
    assert experiment.data.test_fraction == 0.25
    assert experiment.model.args == {"num_components": 2}
    assert experiment.reference is None
    em, network = experiment.fits["em"], experiment.fits["network"]
    assert isinstance(em, EMOptions) and isinstance(network, SVIOptions)
    assert (em.tolerance, em.restarts) == (1e-5, 2)
    assert network.guide is not None and network.guide.args == {"hidden": [8, 4]}
    assert (network.start_from, network.freeze) == ("em", ("weights",))


def test_experiment_without_a_name_has_that_of_its_file(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, GOOD.replace("name: two-ways\n", "")))[0].name == "two"


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_shipped_experiment_is_found_by_name_and_survives_writing(name: str, tmp_path: Path) -> None:
    experiment, base = load_experiment(name)
    assert experiment.name == name
    assert base == shipped_experiments()[name].parent
    assert load_experiment(write(tmp_path, to_yaml(experiment)))[0] == experiment


def test_experiment_with_every_field_survives_writing(tmp_path: Path) -> None:
    full = GOOD + "reference: {algorithm: mcmc, num_samples: 20, warmup: 0}\ndtype: float32\n"
    args = 'model.args={a: "1e-8", b: 1e-8, c: null, d: [yes, "yes", 1.0], e: "θ: #"}'
    experiment, _ = load_experiment(write(tmp_path, full), [args, "data.sequence=s", "data.time=t"])
    assert experiment.model.args == {"a": "1e-8", "b": 1e-8, "c": None, "d": [True, "yes", 1.0], "e": "θ: #"}
    again, _ = load_experiment(write(tmp_path, to_yaml(experiment)))
    assert again == experiment
    assert isinstance(again.model.args["a"], str) and isinstance(again.model.args["d"][2], float)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(values)
def test_any_value_survives_writing_with_its_types(value: Any) -> None:
    read = yaml.load(yaml.dump(value, Dumper=Dumper, sort_keys=False), Loader=Loader)
    assert repr(read) == repr(value)  # unlike ==, this tells 1 from 1.0 and from True


@pytest.mark.parametrize("text", ["1e-8", "1E5", "-2e+3", "+1e3", "1.5e-3", ".5e2", "1_000e-3"])
def test_numbers_with_an_exponent_are_numbers(text: str) -> None:
    value = yaml.load(text, Loader=Loader)
    assert isinstance(value, float)
    assert value == float(text.replace("_", ""))


@pytest.mark.parametrize("text", ["e5", "1e", "x1e-8", "1e-8x", "'1e-8'", "1e5.5", "0x1e5", "12", "1e-8 m"])
def test_other_scalars_are_read_as_safe_load_reads_them(text: str) -> None:
    value = yaml.load(text, Loader=Loader)
    assert type(value) is type(yaml.safe_load(text))
    assert value == yaml.safe_load(text)


# what is wrong -> the file's text, and the whole message as a pattern
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "bracket left open": ("a: [b", r"two.yaml:1: expected YAML, got a syntax error \(.*\); look at.*"),
    "colon in a value": (
        "name: x\na: b: c",
        r"two.yaml:2: expected YAML, .*mapping values are not allowed here.*",
    ),
    "tab as indentation": ("data:\n\tsource: iris", r"two.yaml:2: expected YAML, .*"),
    "not UTF-8": (b"name: \xff\xfe", "two.yaml: expected a YAML file in UTF-8, got byte 0xff"),
    "control character": ("name: \x01", "two.yaml: expected YAML, .*special characters.*"),
    "python tag": ("name: !!python/object/apply:os.getcwd []", "two.yaml:1: expected YAML, .*constructor.*"),
    "no such date": ("name: 2020-99-99", "two.yaml: expected YAML, got month must be in 1..12"),
    "two documents": ("a: 1\n---\nb: 2", "two.yaml:2: expected YAML, .*another document.*"),
    "list as a key": ("{[1]: 2}", "two.yaml:1: expected YAML, .*unhashable key.*"),
    "nested too deep": ("[" * 5000, "two.yaml: expected YAML, got brackets nested too deep"),
    "alias of itself": (
        "a: &x [*x]",
        "two.yaml:1: expected an alias to something else, got one that contains itself",
    ),
    "empty": ("", r"two.yaml: expected a mapping \(name, data, model, fits\), got nothing"),
    "a list": ("- 1", r"two.yaml:1: expected a mapping \(name, data, model, fits\), got the list \[1\]"),
    "key twice": (GOOD + "seed: 4\n", r"two.yaml:17: seed: expected each key once, got .* in line 2\)"),
    "key twice inside": (
        GOOD.replace("restarts: 2", "restarts: 2, restarts: 2"),
        r"two.yaml:11: fits.em.restarts: expected each key once, .*",
    ),
    "nothing but a name": (
        "name: x",
        "two.yaml:1: data: expected a value, got nothing\n"
        "two.yaml:1: model: expected a value, got nothing\n"
        "two.yaml:1: fits: expected a mapping of at least one fit, got nothing; write .*",
    ),
    "unknown section": (
        GOOD + "fit: {}\n",
        "two.yaml:17: fit: expected one of name, seed, .*, got 'fit'; did you mean 'fits'.*",
    ),
    "unknown data key": (
        GOOD.replace("test_fraction", "test_fracton"),
        "two.yaml:6: data.test_fracton: .*; did you mean 'test_fraction'.*",
    ),
    "unknown model key": (
        GOOD.replace("use: gauss", "uses: gauss"),
        "two.yaml:7: model.use: .*\ntwo.yaml:8: .*did you mean 'use'.*",
    ),
    "text for seed": (
        GOOD.replace("seed: 3", "seed: three"),
        "two.yaml:2: seed: expected a whole number, got 'three'",
    ),
    "negative seed": (
        GOOD.replace("seed: 3", "seed: -3"),
        "two.yaml:2: seed: expected a number of at least 0, got -3",
    ),
    "half a seed": (
        GOOD.replace("seed: 3", "seed: 3.5"),
        "two.yaml:2: seed: expected a whole number, got 3.5",
    ),
    "number as name": (
        GOOD.replace("two-ways", "17"),
        "two.yaml:1: name: expected text, got 17; put it in quotes",
    ),
    "name with a slash": (
        GOOD.replace("two-ways", "a/b"),
        "two.yaml:1: name: expected a name of letters, .* got 'a/b'",
    ),
    "name that leaves": (
        GOOD.replace("two-ways", '".."'),
        "two.yaml:1: name: expected a name of letters, .*",
    ),
    "unknown dtype": (
        GOOD + "dtype: float16\n",
        "two.yaml:17: dtype: expected float32 or float64, got 'float16'; did you mean .*",
    ),
    "data is a name": (
        re.sub(r"data:\n(  .*\n)+", "data: iris\n", GOOD),
        "two.yaml:3: data: expected a mapping, got 'iris'; write {source: iris}",
    ),
    "number as source": (
        GOOD.replace("rows.csv", "3"),
        "two.yaml:4: data.source: expected text, got 3; put it in quotes",
    ),
    "number as column": (
        GOOD.replace("[a, b]", "[a, 3]"),
        r"two.yaml:5: data.columns.x: expected a column's name or a list of them, got the list \['a', 3\]",
    ),
    "no columns for a tensor": (
        GOOD.replace("[a, b]", "[]"),
        r"two.yaml:5: data.columns.x: .*, got the list \[\]",
    ),
    "tensor without an identifier": (
        GOOD.replace("{x: [", "{x-y: ["),
        "two.yaml:5: data.columns.x-y: expected a tensor's name that is a Python identifier, got 'x-y'",
    ),
    "test fraction of one": (
        GOOD.replace("0.25", "1"),
        "two.yaml:6: data.test_fraction: expected a number below 1, got 1",
    ),
    "args is a list": (
        GOOD.replace("{num_components: 2}", "[2]"),
        r"two.yaml:9: model.args: expected a mapping, got the list \[2\]",
    ),
    "no fits": (
        re.sub(r"fits:\n(  .*\n)+", "fits: {}\n", GOOD),
        "two.yaml:10: fits: expected a mapping of at least one fit, got the mapping {}; .*",
    ),
    "fits is a list": (
        re.sub(r"fits:\n(  .*\n)+", "fits: [em]\n", GOOD),
        r"two.yaml:10: fits: expected a mapping of at least one fit, got the list \['em'\]; .*",
    ),
    "fit is a name": (
        GOOD.replace("{algorithm: em, tolerance: 1e-5, restarts: 2}", "em"),
        "two.yaml:11: fits.em: expected a mapping, got 'em'; write {algorithm: em}",
    ),
    "fit's name has a dot": (
        GOOD.replace("  em:", "  e.m:").replace("from: em", "from: e.m"),
        "two.yaml:11: fits.e.m: .*",
    ),
    "fit's name is a yes": (
        GOOD.replace("  network:", "  yes:"),
        "two.yaml:10: fits.*: expected text, got true; .*quotes",
    ),
    "no algorithm": (
        GOOD.replace("algorithm: em, ", ""),
        "two.yaml:11: fits.em.algorithm: expected an algorithm of .*, got nothing",
    ),
    "unknown algorithm": (
        GOOD.replace("algorithm: svi", "algorithm: vi"),
        "two.yaml:13: fits.network.algorithm: expected an algorithm of .*, got 'vi'; did you mean 'svi'.*",
    ),
    "unknown option": (
        GOOD.replace("restarts", "restart"),
        "two.yaml:11: fits.em.restart: expected one of .*, got 'restart'; did you mean 'restarts'.*",
    ),
    "number in quotes": (
        GOOD.replace("1e-5", "'1e-5'"),
        "two.yaml:11: fits.em.tolerance: expected a number, got '1e-5'",
    ),
    "guide missing": (
        re.sub("    guide.*\n", "", GOOD),
        "two.yaml:12: fits.network.guide: expected a guide, which svi needs, got nothing; write .*",
    ),
    "guide in em": (
        GOOD.replace("restarts: 2", "guide: {use: categorical}"),
        "two.yaml:11: fits.em.guide: .*; guide is an option of vem, svi only",
    ),
    "starts from nowhere": (
        GOOD.replace("start_from: em", "start_from: ems"),
        r"two.yaml:15: fits.network.start_from: expected another fit \(em\), got 'ems'; did you mean 'em'.*",
    ),
    "starts from itself": (
        GOOD.replace("start_from: em", "start_from: network"),
        "two.yaml:15: .*: expected a fit that does not start from this one, got network → network",
    ),
    "start in a circle": (
        GOOD.replace("restarts: 2", "start_from: network"),
        "two.yaml:11: fits.em.start_from: .*, got em → network → em\n"
        "two.yaml:15: fits.network.start_from: .*, got network → em → network",
    ),
    "reference is no mcmc": (
        GOOD + "reference: {algorithm: em}\n",
        "two.yaml:17: reference.algorithm: expected mcmc, got 'em'",
    ),
    "everything at once": (
        GOOD.replace("seed: 3", "seed: x").replace("0.25", "y").replace("restarts: 2", "restarts: z"),
        "two.yaml:2: seed: .*\ntwo.yaml:6: data.test_fraction: .*\ntwo.yaml:11: fits.em.restarts: .*",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_file_is_refused_with_file_line_and_field(case: str, tmp_path: Path) -> None:
    text, pattern = REFUSED[case]
    found = message(tmp_path, text)
    assert re.fullmatch(pattern, found), found


def test_line_of_an_error_is_that_of_the_field_in_block_style(tmp_path: Path) -> None:
    text = GOOD.replace("    freeze: [weights]\n", "    freeze:\n      - weights\n      - 3\n")
    assert (
        message(tmp_path, text)
        == "two.yaml:18: fits.network.freeze.1: expected text, got 3; put it in quotes"
    )


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("fits.em.restarts=5", ("fits", "em", "restarts"), 5),
        ("fits.em.tolerance=1e-9", ("fits", "em", "tolerance"), 1e-9),
        ("fits.em={algorithm: em, restarts: 9}", ("fits", "em", "restarts"), 9),
        ("fits.new.algorithm=mcmc", ("fits", "new", "algorithm"), "mcmc"),
        ("fits.network.guide={use: categorical}", ("fits", "network", "guide", "use"), "categorical"),
        ("model.args.covariance=tied", ("model", "args", "covariance"), "tied"),
        ("data.columns.x=[p, q]", ("data", "columns", "x"), ["p", "q"]),
        ("model.use=a=b.py:f", ("model", "use"), "a=b.py:f"),
        ("name = other", ("name",), "other"),
        ("reference.warmup=7", ("reference", "warmup"), 7),
    ],
)
def test_override_sets_one_entry_and_no_other(
    override: str, path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    file = write(tmp_path, GOOD)
    found: Any = load_experiment(file, [override])[0].model_dump()
    for part in path:
        found = found[part]
    assert found == value
    section = path[0]
    before, after = (load_experiment(file, o)[0].model_dump() for o in ([], [override]))
    assert {k: v for k, v in before.items() if k != section} == {
        k: v for k, v in after.items() if k != section
    }


def test_later_override_wins(tmp_path: Path) -> None:
    found, _ = load_experiment(write(tmp_path, GOOD), ["seed=5", "seed=6"])
    assert found.seed == 6


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["fits.em.restarts=three"], "--set fits.em.restarts=three: expected a whole number, got 'three'"),
        (["fits.em.restart=3"], "--set fits.em.restart=3: expected one of .*; did you mean 'restarts'.*"),
        (
            ["fits.em={algorithm: em, restarts: x}"],
            "--set fits.em={.*}: fits.em.restarts: expected a whole number.*",
        ),
        (
            ["fits.third.max_steps=3"],
            r"--set fits.third.max_steps=3: fits.third: expected a fit of the file \(em, network\), or a new one with an "
            "algorithm, got 'third'; set fits.third.algorithm too",
        ),
        (
            ["fits.en.steps=10"],
            r"--set fits.en.steps=10: fits.en: expected a fit .*em, network.*, got 'en'; did you mean 'em'.",
        ),
        (
            ["fits.ne.restarts=1", "fits.nf.restarts=1"],
            r"(--set .* \(em, network\), .*, got 'n[ef]'; .*\n?){2}",
        ),
        (["fits.en={restarts: 3}"], "--set .*: fits.en.algorithm: expected an algorithm of .*, got nothing"),
        (["fits.em={restarts: 3}"], "--set .*: fits.em.algorithm: expected an algorithm of .*, got nothing"),
        (
            ["fits.em.restarts.x=3"],
            "--set .*: expected a mapping at fits.em.restarts, got 2; set .* as a whole",
        ),
        (["data.columns.x.0=a"], "--set .*: expected a mapping at data.columns.x, got the list .*"),
        (["fits.em"], "--set fits.em: expected KEY=VALUE .*"),
        (["=3"], "--set =3: expected KEY=VALUE .*"),
        (["fits..em=3"], "--set fits..em=3: expected KEY=VALUE .*"),
        (["seed="], "--set seed=: expected a whole number, got nothing"),
        (["seed=[1"], r"--set seed=\[1:1: expected YAML, .*"),
        (["model={use: a, use: b}"], "--set .*:1: use: expected each key once, .*"),
        (["seed=x", "seed=y"], "--set seed=y: expected a whole number, got 'y'"),
        (["fits.em.restarts=x", "fits.em={algorithm: em, restarts: y}"], "--set fits.em={.*: .*, got 'y'"),
    ],
)
def test_wrong_override_is_refused_and_named(overrides: list[str], pattern: str, tmp_path: Path) -> None:
    found = message(tmp_path, GOOD, *overrides)
    assert re.fullmatch(pattern, found), found


def test_error_beside_an_override_still_points_at_the_file(tmp_path: Path) -> None:
    found = message(tmp_path, GOOD.replace("seed: 3", "seed: x"), "fits.em.restarts=4")
    assert found == "two.yaml:2: seed: expected a whole number, got 'x'"


@pytest.mark.parametrize(
    ("given_name", "got"), [("nope.yaml", "nothing of that name"), ("folder", "a folder")]
)
def test_missing_experiment_is_refused_with_the_shipped_ones(
    given_name: str, got: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf"expected an experiment file, .*iris_mixture.*, got {got}"):
        load_experiment(tmp_path / given_name)


def test_misspelt_shipped_experiment_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'iris_mixture'"):
        load_experiment("iris_mixtur")


def test_aliases_and_merge_keys_mean_what_they_mean_in_yaml(tmp_path: Path) -> None:
    text = GOOD.replace("  em: {", "  em: &em {") + "  again: {<<: *em, restarts: 7}\n"
    experiment, _ = load_experiment(write(tmp_path, text))
    em, again = experiment.fits["em"], experiment.fits["again"]
    assert isinstance(em, EMOptions) and isinstance(again, EMOptions)
    assert again == em.model_copy(update={"restarts": 7})
    assert load_experiment(write(tmp_path, to_yaml(experiment)))[0] == experiment


def test_lines_of_a_document_are_those_of_its_keys() -> None:
    document = read_document("a:\n  b: 1\n\n  c:\n    - x\n    - {d: 2}\n", "f")
    expected = {"a": 1, "a.b": 2, "a.c": 4, "a.c.0": 5, "a.c.1": 6, "a.c.1.d": 6}
    assert {".".join(map(str, k)): v for k, v in document.lines.items() if k} == expected


def test_experiment_made_in_python_equals_the_one_read(tmp_path: Path) -> None:
    experiment, _ = load_experiment(write(tmp_path, GOOD))
    parts = {name: getattr(experiment, name) for name in Experiment.model_fields}
    assert Experiment(**parts) == experiment
