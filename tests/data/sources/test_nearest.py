"""Slips in the names of models: the nearest folder is named before anything asks the Hub."""

import pytest
from tiny import save_model

from fastdpo.cli.main import main
from fastdpo.data.sources.nearest import check_model_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the folders of a model (tiny), of an adapter (lora-out) and of data (tinny)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder, file in (("tiny", "config.json"), ("lora-out", "adapter_config.json"), ("tinny", "pairs.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("name", "meant"), [("tniy", "tiny"), ("lora_out", "lora-out"), ("./tniy", "tiny")])
def test_a_slip_names_the_nearest_folder_of_a_model(here, name, meant):
    with pytest.raises(ValueError, match=rf"ref_model must be .*, got .*{name}.*did you mean '{meant}'"):
        check_model_folder("ref_model", name)


@pytest.mark.parametrize("name", ["tiny", "gpt2", "someone/tniy", "tiny-llama-chat"])
def test_other_names_are_left_to_the_hub(here, name):
    check_model_folder("model", name)


def test_a_model_in_the_hubs_cache_is_meant_whatever_lies_here(here):
    (here / "hub" / "models--tniy").mkdir(parents=True)
    check_model_folder("model", "tniy")


@pytest.mark.parametrize("path", ["./none", "a/b/none", "~/none_at_all"])
def test_paths_that_do_not_exist_are_refused(here, path):
    with pytest.raises(ValueError, match="which does not exist"):
        check_model_folder("model", path)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--model", "tniy", "--dataset", "d.jsonl", "--output_dir", "out"],
        ["score", "--model", "tniy", "--data", "d.jsonl"],
        ["score", "--model", "tiny", "--reference", "tniy", "--data", "d.jsonl"],
        ["rank", "--models", "tniy", "tiny", "--data", "d.jsonl"],
        ["generate", "--model", "tniy", "--prompts", "d.jsonl", "--judge", "length", "-o", "p.jsonl"],
        ["generate", "--model", "tiny", "--prompts", "d.jsonl", "--judge", "implicit:tniy", "-o", "p.jsonl"],
        ["iterate", "--model", "tniy", "--prompts", "d.jsonl", "--judge", "length", "--output_dir", "out"],
        ["sweep", "--model", "tniy", "--dataset", "d.jsonl", "--output_dir", "out", "--param", "beta=0.1"],
        ["chat", "--model", "tniy"],
        ["chat", "--model", "tiny", "--against", "tniy"],
        ["merge", "tniy", "-o", "out"],
        ["plan", "--model", "tniy", "--gpu_memory", "8GB"],
        ["data", "inspect", "d.jsonl", "--model", "tniy"],
    ],
    ids=lambda words: " ".join(words[:4]),
)
def test_every_command_says_it_at_once(here, capsys, words):
    save_model(here / "tiny")
    (here / "d.jsonl").write_text('{"prompt": "p ", "chosen": "a", "rejected": "b"}\n')
    assert main(words) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert {entry.name for entry in here.iterdir()} == {"tiny", "tinny", "lora-out", "d.jsonl"}  # nothing is written
