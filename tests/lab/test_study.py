"""Study files and records: what is refused, by code and name; what identifies a run. No run is made here."""

import hashlib
import json
import subprocess
import sys

import pytest

from nanolab.cli import UserError, read_toml
from nanolab.lab.results import check_unedited, hash_of, new_record, number_at, read_results, write_results
from nanolab.lab.study import ROOT, Study, folder_of, identical_arms, read_study, study_of, to_toml
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig

FLAGS = "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --num-iterations 6"
GATE = {
    "question": 'Does a "gate" help?',
    "baseline": "none",
    "matters": 0.01,
    "flags": FLAGS,
    "arms": {"none": "", "head": "--gate head"},
    "predict": {"head": "better"},
}


def code_of(values: dict, scale: str = "") -> tuple[str, dict]:
    with pytest.raises(UserError) as error:
        study_of(values, "gate.toml").configs(scale)
    return error.value.code, error.value.values


@pytest.mark.parametrize(
    "changes,code,values",
    [
        ({"baselin": "none"}, "study-key", {"key": "baselin"}),
        ({"matters": 0}, "study-value", {"key": "matters"}),
        ({"matters": float("nan")}, "study-value", {"key": "matters"}),
        ({"seeds": [42, -1]}, "study-value", {"key": "seeds"}),
        ({"direction": "up"}, "study-value", {"key": "direction"}),
        ({"noise": {"sd": 0.1}}, "study-value", {"key": "noise"}),
        ({"noise": {"sd": 0.1, "df": 0}}, "study-value", {"key": "noise"}),
        ({"predict": {"head": "best"}}, "study-value", {"key": "predict"}),
        ({"predict": {"heed": "better"}}, "arm-unknown", {"arm": "heed"}),
        ({"baseline": "nine"}, "arm-unknown", {"arm": "nine"}),
        ({"seeds": [42]}, "too-few", {"seeds": [42]}),
        ({"seeds": [42, 43, 44, 42]}, "too-few", {"seeds": [42, 43, 44, 42]}),
        ({"arms": {"none": ""}, "predict": ""}, "too-few", {"arms": 1}),
        ({"match": "hours"}, "match-unknown", {"match": "hours"}),
        ({"flags": "--dept 1"}, "unknown-flag", {"where": "the study's flags", "flag": "dept"}),
        ({"arms": {"none": "", "head": "--gat head"}}, "unknown-flag", {"where": "arm head", "flag": "gat"}),
        ({"arms": {"none": "", "head": "--seed 3"}}, "flag-of-the-lab", {"where": "arm head", "flag": "seed"}),
        ({"arms": {"none": "", "head": "--no-resume"}}, "flag-of-the-lab", {"where": "arm head", "flag": "no_resume"}),
        ({"arms": {"none": "", "head": "--gate 'head"}}, "flags-quoted", {"where": "arm head"}),
        ({"arms": {"none": "", "head": "--softmax-n 2"}}, "flag-not-read", {"arm": "head", "flag": "softmax_n"}),
        ({"arms": {"none": "", "head": "--depth 0"}}, "flag-out-of-bounds", {"arm": "head", "flag": "depth"}),
        ({"arms": {"none": "", "head": "--depth two"}}, "arm-flags", {"arm": "head"}),
        ({"arms": {"none": "", "head": "--preset gpt9"}}, "arm-flags", {"arm": "head"}),
        ({"stage": "finetune"}, "study-value", {"key": "stage"}),
        ({"stage": "sft"}, "unknown-flag", {"where": "the study's flags", "flag": "depth"}),
        ({"stage": "sft", "flags": "--model b"}, "unknown-flag", {"where": "arm head", "flag": "gate"}),
        ({"stage": "rl", "flags": "--kl 0", "arms": {"none": "", "head": "--kl 1"}}, "model-unnamed", {"arm": "none"}),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_by_name(changes, code, values):
    found, seen = code_of(GATE | changes)
    assert found == code
    assert {name: seen[name] for name in values} == values


def test_the_nearest_key_and_flag_are_named():
    with pytest.raises(UserError, match="did you mean baseline"):
        study_of(GATE | {"baselin": "none"}, "x")
    with pytest.raises(UserError, match="did you mean --gate"):
        study_of(GATE | {"arms": {"none": "", "head": "--gat head"}}, "x").configs("")


def test_flags_of_the_study_the_scale_and_the_arm_in_this_order():
    study = study_of(
        GATE
        | {
            "flags": FLAGS + " --lr-scale 1 --smear --warmup-steps 5 --softcap 9",
            "scales": {"cpu": "--warmup-steps 6 --softcap 8", "gpu": "--warmup-steps 7"},
            "arms": {"none": "", "head": "--gate head --lr-scale 2 --no-smear --softcap 7 --sample-every 3"},
        },
        "x",
    )
    none, head = study.configs("cpu").values()
    assert (none.warmup_steps, none.lr_scale, none.smear, none.softcap, none.gate) == (6, 1, True, 8, "none")
    assert (head.warmup_steps, head.lr_scale, head.smear, head.softcap, head.gate) == (6, 2, False, 7, "head")
    assert (none.sample_every, head.sample_every) == (-1, 3)
    assert study.config("none", "gpu").warmup_steps == 7
    assert (none.eval_first, none.eval_every) == (False, 250)  # nothing reads what untrained weights score
    for flags, first in (("--eval-first", True), ("--eval-every -1", True)):
        assert study.model_copy(update={"flags": f"{FLAGS} {flags}"}).config("none").eval_first is first
    assert (study.scale(""), study.scale("gpu")) == ("cpu", "gpu")
    with pytest.raises(UserError) as error:
        study.scale("full")
    assert error.value.code == "scale-unknown"


def test_a_stage_has_its_flags_its_metric_and_its_direction(tmp_path):
    """The flags are checked against the stage's own config, and a study without a metric gets the stage's."""
    arms = {"none": "", "head": "--init-lr-frac 0.1"}
    values = GATE | {"flags": "--model b", "arms": arms}
    found = {stage: study_of(values | {"stage": stage}, "x") for stage in ("sft", "rl")}
    found["pretrain"] = study_of(GATE, "x")
    assert {stage: (type(study.config("head")), study.metric, study.direction) for stage, study in found.items()} == {
        "sft": (SFTConfig, "val/loss", "lower"),
        "rl": (RLConfig, "eval/pass@1", "higher"),
        "pretrain": (BaseTrainConfig, "val/bpb", "lower"),
    }
    assert found["rl"].config("head").init_lr_frac == 0.1
    assert (found["sft"].config("none").model, found["pretrain"].config("none").sample_every) == ("b", -1)
    for study in (*found.values(), study_of(values | {"stage": "rl", "metric": "val/bpb", "direction": "lower"}, "x")):
        (tmp_path / "x.toml").write_text(to_toml(study))
        assert read_study(tmp_path / "x.toml") == study
        assert study.fixed("")["metric"] == study.metric and study.fixed("")["stage"] == study.stage


def test_a_study_written_is_the_study_read(tmp_path):
    study = study_of(GATE | {"seeds": [1, 2, 3], "scales": {"cpu": "--keep 3"}, "noise": 0.5}, "x")
    path = tmp_path / "gate.toml"
    path.write_text(to_toml(study))
    assert read_study(path) == study
    assert read_toml(path)["question"] == 'Does a "gate" help?'
    assert folder_of(study, path, "cpu") == ROOT / "dev" / "results" / "gate" / "cpu"
    assert folder_of(study.model_copy(update={"results": "out"}), path, "") == tmp_path / "out"


def test_identical_arms_are_found():
    arms = {"none": "", "same": "--gate none", "other": "--keep 3"}
    assert identical_arms(study_of(GATE | {"arms": arms, "predict": ""}, "x").configs("")) == [["none", "same"]]


def test_predictions_are_hashed_with_the_study_and_an_edit_is_named(tmp_path):
    study = study_of(GATE, "x")
    record = new_record(study.fixed(""), threads=1) | {"seeds": [42, 43, 44]}
    assert record["study"]["predict"] == {"head": "better"}
    whole = json.dumps(record["study"], sort_keys=True).encode()
    assert record["sha256"] == hashlib.sha256(whole).hexdigest()
    rows = [{"arm": "none", "seed": 42}, {"arm": "none", "seed": 44}]

    def edited(**changes) -> list[str]:
        now: Study = study_of(GATE | changes, "x")
        try:
            check_unedited(record, rows, now.fixed(""), now.seeds, tmp_path)
        except UserError as error:
            assert error.code == "study-edited"
            return error.values["keys"]
        return []

    assert edited() == edited(seeds=[42, 43, 44, 45, 46]) == edited(noise=0.1) == []
    assert edited(noise={"sd": 0.1, "df": 9}) == ["noise"]  # it would change the verdict
    assert edited(predict={"head": "worse"}) == ["predict"]
    assert edited(matters=0.02, predict="") == ["matters", "predict"]
    assert edited(seeds=[42, 43, 45]) == ["seeds"]  # a seed that was run cannot be dropped
    del record["study"]["stage"]  # a record from before there was the key
    assert edited() == [] and "stage" in edited(stage="sft", flags="", arms={"none": "", "head": ""})
    record = new_record(study_of(GATE | {"noise": {"sd": 0.1, "df": 9}}, "x").fixed(""), 1) | {"seeds": [42, 43, 44]}
    assert edited(noise={"sd": 0.1, "df": 9}) == []
    assert edited() == edited(noise=0.1) == edited(noise={"sd": 0.2, "df": 9}) == ["noise"]
    record = new_record(study.fixed(""), threads=1) | {"seeds": [42, 43, 44]}

    write_results(tmp_path, record, rows)
    assert read_results(tmp_path) == (record, rows)
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text.replace('"better"', '"worse"'))
    with pytest.raises(UserError) as error:
        read_results(tmp_path)
    assert error.value.code == "results-damaged"


def test_a_metric_is_found_by_its_name_or_inside_another():
    result = {"val/bpb": 1.5, "centered_results": {"arc.easy": 1, "piqa": 0.25}, "kind": "base", "none": None}
    assert [number_at(result, name) for name in ("val/bpb", "centered_results.piqa")] == [1.5, 0.25]
    assert [number_at(result, name) for name in ("kind", "none", "val/bqb", "centered_results.x", "kind.x")] == [
        None
    ] * 5


@pytest.mark.slow
def test_the_sources_are_those_that_a_fresh_python_loads():
    """Whatever a start of the stage loads is among the sources, and no file of the lab is."""
    from nanolab.lab.runner import sources_of

    code = "import sys, nanolab.stages.pretrain; print(*(m for m in sys.modules if m.startswith('nanolab.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = {name for name in done.stdout.split() if (ROOT / (name.replace(".", "/") + ".py")).exists()}
    found = sources_of("nanolab.stages.pretrain")
    assert loaded and loaded <= set(found)
    assert not [name for name in found if name.split(".")[1] in ("lab", "serving", "interop")]
    path = ROOT / "nanolab" / "model" / "gpt.py"
    assert found["nanolab.model.gpt"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_of(found) == hash_of(sources_of("nanolab.stages.pretrain"))
